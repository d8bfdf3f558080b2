"""Hooks of schemathesis: what JSON Schema cannot say of a sound request is made true before it is sent.

Only requests that schemathesis means to be sound are touched, and only where the document has words
for a rule that is no schema:

 - sums and comparisons of fields: best_of is at least n, and n where it streams; prompts times
   choices is within --max-choices; min_tokens is within max_tokens
 - what the server's options and model set: --max-tokens-limit, the vocabulary's size
 - bytes: schemas count characters
 - what must have been there before: a response to go on from, the bytes of an exported state, a
   session's first turn, events of a stream; and a session's version (If-Match), which other requests
   change
 - what may be used once: an Idempotency-Key stands for one body
 - a query value that needs another: starting_after needs stream=true
 - two of chat's rules that schemas do say: the generator spells out all combinations of a request's
   rules and gives up above some tens of them, and chat has 80. before_load_schema takes these two out;
   test_openapi's test_rules holds the server to both

A session, a response, a stream or a preset that is not there needs nothing: the 404 is in the
document. But of the ids that schemathesis made up three of four become real ones, so that the
requests about them come to the heart of the matter.
"""
import base64
import contextlib
import functools
import json
import os
import re
import urllib.error
import urllib.request
import uuid
import zlib

import schemathesis

URL, KEY = os.environ["LATTE_URL"], os.environ.get("LATTE_KEY")
MAX_CHOICES = int(os.environ["LATTE_MAX_CHOICES"])
MAX_TOKENS = 8  # of a generation: within --max-tokens-limit, and soon over
VOCABULARY = json.loads(os.environ["LATTE_VOCABULARY"])


def send(method, path, data, content_type="application/json"):
    """The reply's headers and bytes."""
    headers = {"Content-Type": content_type}
    if KEY:
        headers["Authorization"] = f"Bearer {KEY}"
    request = urllib.request.Request(URL + path, data, headers, method=method)
    with urllib.request.urlopen(request, timeout=120) as reply:
        return reply.headers, reply.read()


def post(path, body):
    return json.loads(send("POST", path, json.dumps(body).encode())[1])


@functools.lru_cache
def exported_state():
    """Base64."""
    return post("/v1/completions", {"prompt": "A", "max_tokens": 1, "return_state": True})["state"]


def a_response():
    """The id of one that can be continued, whatever was deleted before."""
    return post("/v1/responses", {"input": "A", "max_output_tokens": 1})["id"]


def a_session():
    """With a turn behind it, and a snapshot "taken"."""
    session = post("/v1/sessions", {})["id"]
    post("/v1/completions", {"prompt": "A", "max_tokens": 1, "session_id": session})
    post(f"/v1/sessions/{session}/snapshots", {"name": "taken"})
    return session


def a_stream():
    body = {"prompt": "A", "max_tokens": 1, "stream": True, "resumable": True}
    return send("POST", "/v1/completions", json.dumps(body).encode())[0]["X-Stream-Id"]


def a_preset():
    name = "made-" + uuid.uuid4().hex[:8]
    send("PUT", f"/v1/presets/{name}", base64.b64decode(exported_state()), "application/octet-stream")
    return name


def is_made_up(name):
    """Whether it is one of those to be replaced, the same ones in every run."""
    return isinstance(name, str) and not re.match("(sess|resp|cmpl|chatcmpl)[_-]|made-", name) and (
        zlib.crc32(name.encode()) % 4)


def is_int(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def cut(text, n_bytes):
    return text.encode()[:n_bytes].decode(errors="ignore") if isinstance(text, str) else text


def ids(values):
    """Token ids of the model; texts among them stay."""
    return [ids(v) if isinstance(v, list) else int(v) % VOCABULARY if is_int(v) else v for v in values]


def is_taken_out(rule):
    text = json.dumps(rule)
    return "OpenMessage" in text or "top_logprobs" in text


@schemathesis.hook
def before_load_schema(context, raw_schema):
    chat = raw_schema["components"]["schemas"]["ChatCompletionRequest"]
    rules = [r for r in chat["allOf"] if not is_taken_out(r)]
    assert len(rules) == len(chat["allOf"]) - 2
    chat["allOf"] = rules


def mend_chat(body):
    if body.get("continue_final_message") and "messages" in body:
        body.pop("add_generation_prompt", None)
    if is_int(body.get("top_logprobs")) and "messages" in body:
        body["logprobs"] = True


def mend_choices(body):
    prompt = body.get("prompt")
    n_prompts = len(prompt) if isinstance(prompt, list) and prompt and not is_int(prompt[0]) else 1
    if n_prompts > MAX_CHOICES:
        body["prompt"], n_prompts = prompt[:MAX_CHOICES], MAX_CHOICES
    most = MAX_CHOICES // n_prompts
    if is_int(body.get("n")):
        body["n"] = min(body["n"], most)
    if is_int(body.get("best_of")):
        n = body.get("n") or 1
        body["best_of"] = n if body.get("stream") else min(max(body["best_of"], n), most)


def mend_lengths(body):
    limits = [k for k in ("max_tokens", "max_completion_tokens", "max_output_tokens")
              if is_int(body.get(k))]
    for k in limits:
        body[k] = min(body[k], MAX_TOKENS)
    if is_int(body.get("min_tokens")):
        body["min_tokens"] = min(body["min_tokens"], *(body[k] for k in limits), MAX_TOKENS)


def mend_ids(body):
    for k in "prompt", "stop_token_ids", "tokens":
        if isinstance(body.get(k), list):
            body[k] = ids(body[k])
    if isinstance(body.get("logit_bias"), dict):
        body["logit_bias"] = {str(int(k) % VOCABULARY): v for k, v in body["logit_bias"].items()}


def mend_bytes(body):
    stop = body.get("stop")
    if stop:
        body["stop"] = [cut(s, 1024) for s in stop] if isinstance(stop, list) else cut(stop, 1024)
    if isinstance(body.get("metadata"), dict):
        body["metadata"] = {cut(k, 64): cut(v, 512) for k, v in body["metadata"].items()}
    for names in (body, body.get("from")):
        for k in "name", "preset", "session", "snapshot":
            if isinstance(names, dict) and isinstance(names.get(k), str):
                names[k] = cut(names[k], 64)


def mend_origin(body):
    if isinstance(body.get("state"), str):
        body["state"] = exported_state()
    if isinstance(body.get("previous_response_id"), str):
        body["previous_response_id"] = a_response()
        body.pop("instructions", None)  # of its chain, which began without
    for names in (body, body.get("from")):
        if not isinstance(names, dict):
            continue
        for k, make in ("session_id", a_session), ("session", a_session), ("preset", a_preset):
            if is_made_up(names.get(k)):
                names[k] = make()
                if names.get("snapshot"):
                    names["snapshot"] = "taken"


def begin_session(session):
    """A state and a turn to go back from are there after the first turn; a 404 otherwise."""
    body = {"prompt": "A", "max_tokens": 1, "session_id": session}
    with contextlib.suppress(urllib.error.HTTPError):  # a session that is not there
        post("/v1/completions", body)


MAKERS = {"/v1/sessions/{id}": a_session, "/v1/responses/{id}": a_response,
          "/v1/streams/{id}": a_stream, "/v1/presets/{name}": a_preset,
          "/playground/{file}": lambda: "style.css"}


def mend_path(case):
    for path, make in MAKERS.items():
        for k, name in (case.path_parameters or {}).items():
            if case.operation.path.startswith(path) and is_made_up(name):
                case.path_parameters = {**case.path_parameters, k: make()}


def mend_headers(case):
    if case.headers and "Idempotency-Key" in case.headers:
        case.headers["Idempotency-Key"] = case.headers["Idempotency-Key"][:200] + uuid.uuid4().hex
    if case.headers and "If-Match" in case.headers:
        case.headers["If-Match"] = "*"
    if case.headers and "Last-Event-ID" in case.headers:
        case.headers["Last-Event-ID"] = "1"  # of two that each stream has at least


@schemathesis.hook
def before_call(context, case, kwargs):
    if case.meta is None or not case.meta.generation.mode.is_positive:
        return
    mend_headers(case)
    mend_path(case)
    if case.query and "starting_after" in case.query:
        case.query = {**case.query, "stream": "true"}
    if case.query and "last_event_id" in case.query:
        case.query = {**case.query, "last_event_id": 1}
    if case.operation.path in ("/v1/sessions/{id}/state", "/v1/sessions/{id}/rollback"):
        begin_session(case.path_parameters["id"])
    if case.media_type == "application/octet-stream":
        case.body = base64.b64decode(exported_state())
    elif isinstance(case.body, dict):
        body = dict(case.body)
        if isinstance(body.get("from"), dict):
            body["from"] = dict(body["from"])
        for mend in mend_chat, mend_choices, mend_lengths, mend_ids, mend_bytes, mend_origin:
            mend(body)
        case.body = body
