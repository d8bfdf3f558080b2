"""Hooks of schemathesis: what JSON Schema cannot say of a sound request is made true before it is sent.

Only requests that schemathesis means to be sound are touched, and only where the document has words
for a rule that is no schema:

 - sums and comparisons of fields: best_of is at least n, and n where it streams; prompts times
   choices is within --max-choices; min_tokens is within max_tokens
 - what the server's options and model set: --max-tokens-limit, the vocabulary's size
 - bytes: schemas count characters
 - what must have been there before: a response to go on from, the bytes of an exported state; and a
   session's version (If-Match), which other requests change
 - what may be used once: an Idempotency-Key stands for one body
 - a query value that needs another: starting_after needs stream=true

A session, a preset or a model that is not there needs nothing: the 404 is in the document.
"""
import base64
import functools
import json
import os
import urllib.request
import uuid

import schemathesis

URL, KEY = os.environ["LATTE_URL"], os.environ.get("LATTE_KEY")
MAX_CHOICES = int(os.environ["LATTE_MAX_CHOICES"])
MAX_TOKENS = 8  # of a generation: within --max-tokens-limit, and soon over
VOCABULARY = json.loads(os.environ["LATTE_VOCABULARY"])


def post(path, body):
    headers = {"Content-Type": "application/json"}
    if KEY:
        headers["Authorization"] = f"Bearer {KEY}"
    request = urllib.request.Request(URL + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)


@functools.lru_cache
def exported_state():
    """Base64."""
    return post("/v1/completions", {"prompt": "A", "max_tokens": 1, "return_state": True})["state"]


def a_response():
    """The id of one that can be continued, whatever was deleted before."""
    return post("/v1/responses", {"input": "A", "max_output_tokens": 1})["id"]


def is_int(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def cut(text, n_bytes):
    return text.encode()[:n_bytes].decode(errors="ignore") if isinstance(text, str) else text


def ids(values):
    """Token ids of the model; texts among them stay."""
    return [ids(v) if isinstance(v, list) else int(v) % VOCABULARY if is_int(v) else v for v in values]


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


def mend_headers(case):
    if case.headers and "Idempotency-Key" in case.headers:
        case.headers["Idempotency-Key"] = case.headers["Idempotency-Key"][:200] + uuid.uuid4().hex
    if case.headers and "If-Match" in case.headers:
        case.headers["If-Match"] = "*"


@schemathesis.hook
def before_call(context, case, kwargs):
    if case.meta is None or not case.meta.generation.mode.is_positive:
        return
    mend_headers(case)
    if case.query and "starting_after" in case.query:
        case.query = {**case.query, "stream": "true"}
    if case.media_type == "application/octet-stream":
        case.body = base64.b64decode(exported_state())
    elif isinstance(case.body, dict):
        body = dict(case.body)
        if isinstance(body.get("from"), dict):
            body["from"] = dict(body["from"])
        for mend in mend_choices, mend_lengths, mend_ids, mend_bytes, mend_origin:
            mend(body)
        case.body = body
