#!/usr/bin/env python3
"""The official openai package against a running latte-server.

    test_openai.py [URL] [--key KEY]

Every reply is also validated strictly against the package's own pydantic types: no missing and
no mistyped field. Exits with 1 when a check failed.
"""
import argparse
import asyncio
import json
import socket
import sys
import threading
import urllib.parse
import uuid

import openai
import pydantic
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseItem, ResponseStreamEvent

CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


def strict(kind, reply):
    """The package builds its objects without validation; do it again with."""
    kind.model_validate(json.loads(reply.model_dump_json()), strict=False)
    return reply


def expect(error, call, **facts):
    try:
        call()
    except error as e:
        for name, value in facts.items():
            assert getattr(e, name) == value, (name, getattr(e, name), value)
        assert e.message, e
        return e
    raise AssertionError(f"expected {error.__name__}")


MESSAGES = [
    {"role": "developer", "content": "You are brief."},
    {"role": "user", "content": [{"type": "text", "text": "Tell me about a cat."}]},
]


@check
def models(client, name):
    listed = list(client.models.list())
    assert [m.id for m in listed] == [name]
    assert strict(Model, client.models.retrieve(name)).object == "model"
    e = expect(openai.NotFoundError, lambda: client.models.retrieve("none/such"))
    assert e.code == "model_not_found"


@check
def completion(client, name):
    r = strict(Completion, client.completions.create(model=name, prompt="Once upon a time"))
    assert r.object == "text_completion" and r.model == name and r.id.startswith("cmpl-")
    assert r.usage.completion_tokens <= 16
    assert r.usage.total_tokens == r.usage.prompt_tokens + r.usage.completion_tokens
    assert r.choices[0].finish_reason in ("stop", "length")
    assert r._request_id


@check
def completion_many(client, name):
    r = strict(
        Completion,
        client.completions.create(
            model=name, prompt=["The sun", "The moon"], n=2, best_of=3, max_tokens=5, seed=1,
            logprobs=3,
        ),
    )
    assert [c.index for c in r.choices] == [0, 1, 2, 3]
    for c in r.choices:
        assert len(c.logprobs.tokens) == len(c.logprobs.token_logprobs)
        assert "".join(c.logprobs.tokens) == c.text or "bytes:" in str(c.logprobs.tokens)


@check
def echo_scores(client, name):
    """As lm-eval-harness asks for log likelihoods."""
    r = client.completions.create(
        model=name, prompt="Once upon a time", max_tokens=0, logprobs=1, echo=True, temperature=0
    )
    lp = r.choices[0].logprobs
    assert r.choices[0].text == "Once upon a time"
    assert lp.token_logprobs[0] is None and lp.top_logprobs[0] is None
    assert all(x <= 0 for x in lp.token_logprobs[1:])
    assert all(max(top.values()) >= x for top, x in zip(lp.top_logprobs[1:], lp.token_logprobs[1:]))


@check
def completion_stream(client, name):
    whole = client.completions.create(model=name, prompt="A dog", max_tokens=20, seed=7)
    text, usage = "", None
    for chunk in client.completions.create(
        model=name, prompt="A dog", max_tokens=20, seed=7, stream=True,
        stream_options={"include_usage": True},
    ):
        if chunk.usage:
            usage = chunk.usage
            assert chunk.choices == []
        for c in chunk.choices:
            text += c.text
            finish = c.finish_reason
    assert text == whole.choices[0].text
    assert finish == whole.choices[0].finish_reason
    assert usage == whole.usage


@check
def chat(client, name):
    r = strict(
        ChatCompletion,
        client.chat.completions.create(
            model=name, messages=MESSAGES, max_completion_tokens=12, logprobs=True,
            top_logprobs=2, seed=3, temperature=0.5, user="u", metadata={"k": "v"},
        ),
    )
    message = r.choices[0].message
    assert message.role == "assistant" and message.refusal is None
    content = r.choices[0].logprobs.content
    raw = b"".join(bytes(t.bytes) for t in content)
    assert raw.decode("utf-8", "replace") == message.content
    assert all(len(t.top_logprobs) == 2 for t in content)
    # the reply goes back as a message
    again = MESSAGES + [message.model_dump(), {"role": "user", "content": "More."}]
    strict(ChatCompletion, client.chat.completions.create(
        model=name, messages=again, max_completion_tokens=2))


@check
def chat_stream(client, name):
    args = dict(model=name, messages=MESSAGES, max_tokens=12, seed=5, n=2, logprobs=True)
    whole = client.chat.completions.create(**args)
    texts, roles, finish, tokens = ["", ""], [None, None], [None, None], [0, 0]
    for chunk in client.chat.completions.create(stream=True, **args):
        strict(ChatCompletionChunk, chunk)
        for c in chunk.choices:
            roles[c.index] = c.delta.role or roles[c.index]
            texts[c.index] += c.delta.content or ""
            finish[c.index] = c.finish_reason or finish[c.index]
            tokens[c.index] += len(c.logprobs.content) if c.logprobs else 0
    assert roles == ["assistant", "assistant"]
    assert texts == [c.message.content for c in whole.choices]
    assert finish == [c.finish_reason for c in whole.choices]
    assert tokens == [len(c.logprobs.content) for c in whole.choices]


@check
def chat_stream_helper(client, name):
    """The helper puts the chunks together; it raises when the length limit ended them."""
    try:
        with client.chat.completions.stream(model=name, messages=MESSAGES, max_tokens=6) as stream:
            for _ in stream:
                pass
            final = stream.get_final_completion()
    except openai.LengthFinishReasonError as e:
        final = e.completion
    assert final.choices[0].message.role == "assistant"
    assert final.choices[0].message.content


@check
def extra_fields(client, name):
    r = client.completions.create(
        model=name, prompt="x", max_tokens=4, seed=1,
        extra_body={"return_token_ids": True, "top_k": 5, "min_tokens": 4, "ignore_eos": True},
    )
    assert len(r.choices[0].token_ids) == 4 and r.choices[0].prompt_token_ids


@check
def response(client, name):
    r = strict(Response, client.responses.create(
        model=name, input="Tell me about a cat.", instructions="You are brief.",
        max_output_tokens=6, temperature=0.5, top_p=0.9, metadata={"k": "v"}, user="u",
        extra_body={"seed": 3, "ignore_eos": True}))
    assert r.status == "incomplete" and r.incomplete_details.reason == "max_output_tokens"
    assert r.object == "response" and r.model == name and r.id.startswith("resp_")
    assert r.output[0].type == "message" and r.output[0].id.startswith("msg_")
    assert r.output_text and r.error is None
    assert (r.instructions, r.temperature, r.top_p) == ("You are brief.", 0.5, 0.9)
    assert r.metadata == {"k": "v"} and r.user == "u" and r.max_output_tokens == 6
    assert r.usage.output_tokens == 6 and r.usage.input_tokens_details.cached_tokens == 0
    assert r.usage.total_tokens == r.usage.input_tokens + 6
    assert strict(Response, client.responses.retrieve(r.id)) == r
    # the output goes back as input
    again = strict(Response, client.responses.create(
        model=name, store=False, max_output_tokens=2,
        input=[{"role": "user", "content": "Tell me about a cat."}] + r.output
        + [{"role": "user", "content": [{"type": "input_text", "text": "More."}]}]))
    expect(openai.NotFoundError, lambda: client.responses.retrieve(again.id))


@check
def response_chain(client, name):
    first = client.responses.create(model=name, input="A dog.", max_output_tokens=5)
    args = dict(model=name, input="And then?", previous_response_id=first.id, max_output_tokens=5,
                temperature=0)
    second, other = (strict(Response, client.responses.create(**args)) for _ in range(2))
    assert second.previous_response_id == first.id
    assert second.output_text == other.output_text, "a state does not change"
    seen = second.usage.input_tokens_details.cached_tokens
    assert seen == first.usage.total_tokens
    third = client.responses.create(model=name, input="x", previous_response_id=second.id,
                                    max_output_tokens=1)
    assert third.usage.input_tokens_details.cached_tokens == second.usage.total_tokens
    client.responses.delete(first.id)
    expect(openai.BadRequestError, lambda: client.responses.create(**args),
           code="previous_response_not_found", param="previous_response_id")
    expect(openai.NotFoundError, lambda: client.responses.delete(first.id))
    client.responses.create(model=name, input="x", previous_response_id=second.id,
                            max_output_tokens=1)
    expect(openai.BadRequestError, lambda: client.responses.create(
        model=name, input="x", previous_response_id=second.id, instructions="Rhyme."),
        param="instructions")


@check
def response_stream(client, name):
    args = dict(model=name, input="A dog.", max_output_tokens=12,
                include=["message.output_text.logprobs"], top_logprobs=2,
                extra_body={"seed": 5, "ignore_eos": True})
    whole = strict(Response, client.responses.create(**args))
    events = list(client.responses.create(stream=True, **args))
    adapter = pydantic.TypeAdapter(ResponseStreamEvent)
    for i, event in enumerate(events):
        found = adapter.validate_python(json.loads(event.model_dump_json()))
        assert type(found) is type(event) and event.sequence_number == i
    kinds = [e.type for e in events]
    n = kinds.count("response.output_text.delta")
    assert kinds == [
        "response.created", "response.in_progress", "response.output_item.added",
        "response.content_part.added"] + n * ["response.output_text.delta"] + [
        "response.output_text.done", "response.content_part.done", "response.output_item.done",
        "response.incomplete"]
    deltas = [e for e in events if e.type == "response.output_text.delta"]
    assert "".join(e.delta for e in deltas) == whole.output_text == events[4 + n].text
    assert sum(len(e.logprobs) for e in deltas) == 12
    last = events[-1].response
    logprobs = last.output[0].content[0].logprobs
    assert logprobs == whole.output[0].content[0].logprobs and len(logprobs[0].top_logprobs) == 2
    assert last.usage == whole.usage
    assert strict(Response, client.responses.retrieve(last.id)) == last
    rest = list(client.responses.retrieve(last.id, stream=True, starting_after=6))
    assert [e.model_dump() for e in rest] == [e.model_dump() for e in events[7:]]


@check
def response_stream_helper(client, name):
    with client.responses.stream(model=name, input="A cat.", max_output_tokens=6) as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert final.output_text == text


@check
def response_input_items(client, name):
    words = ["one", "two", "three", "four", "five"]
    r = client.responses.create(model=name, max_output_tokens=1, input=[
        {"role": "assistant" if i % 2 else "user", "content": w} for i, w in enumerate(words)])
    adapter = pydantic.TypeAdapter(ResponseItem)
    for order in "asc", "desc":
        items = list(client.responses.input_items.list(r.id, order=order, limit=2))
        for item in items:
            adapter.validate_python(json.loads(item.model_dump_json()))
        assert [i.content[0].text for i in items] == (words if order == "asc" else words[::-1])
    assert [i.content[0].type for i in items[:2]] == ["input_text", "output_text"]


@check
def response_errors(client, name):
    def wrong(param, **args):
        body = dict(model=name, input="x")
        body.update(args)
        expect(openai.BadRequestError, lambda: client.responses.create(**body), param=param)

    wrong("temperature", temperature=3)
    wrong("tools", tools=[{"type": "web_search"}])
    wrong("background", background=True)
    wrong("reasoning.effort", reasoning={"effort": "high"})
    wrong("text.format.type", text={"format": {"type": "json_object"}})
    wrong("input[0].type", input=[{"type": "function_call_output", "call_id": "c", "output": "o"}])
    wrong("input[0].content[0].type", input=[{"role": "user", "content": [
        {"type": "input_image", "image_url": "data:image/png;base64,"}]}])
    wrong("input", input=[])


@check
def errors(client, name):
    bad = openai.BadRequestError
    c = client.completions.create
    expect(bad, lambda: c(model=name, prompt="x", temperature=3), param="temperature",
           code="decimal_above_max_value", type="invalid_request_error", status_code=400)
    expect(bad, lambda: c(model=name, prompt=""), param="prompt")
    expect(bad, lambda: c(model=name, prompt="x", stop=["a"] * 5), param="stop")
    expect(bad, lambda: c(model=name, prompt="x", stream_options={"include_usage": True}),
           param="stream_options")
    expect(bad, lambda: client.chat.completions.create(model=name, messages=[]), param="messages")
    expect(bad, lambda: client.chat.completions.create(
        model=name, messages=MESSAGES, response_format={"type": "json_object"}),
        param="response_format.type")
    expect(openai.NotFoundError, lambda: c(model="other", prompt="x"), code="model_not_found",
           param="model")


@check
def states(client, name):
    """A conversation of which the server keeps nothing; streams have the state in their end."""
    def say(text, state, **more):
        extra = {"return_state": True, **({"state": state} if state else {})}
        return client.chat.completions.create(
            model=name, messages=[{"role": "user", "content": text}], max_tokens=8, seed=2,
            store=False, extra_body=extra, **more)

    whole = streamed = None
    for text in "one", "two":
        r = say(text, whole)
        whole, parts, found = r.state, [], []
        for chunk in say(text, streamed, stream=True):
            parts += [c.delta.content or "" for c in chunk.choices]
            found += [chunk.state] if "state" in chunk.model_extra else []
        assert "".join(parts) == r.choices[0].message.content and found == [whole]
        streamed = found[0]


@check
def hang_up(client, name):
    stream = client.completions.create(
        model=name, prompt="x", max_tokens=5000, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    assert client.models.list()


class CuttingProxy:
    """Passes connections on, but cuts the first ones when the reply's first bytes came."""

    def __init__(self, url, n_cuts):
        parts = urllib.parse.urlparse(url)
        self.target, self.n_cuts, self.n_connections = (parts.hostname, parts.port), n_cuts, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/v1"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            client, _ = self.listener.accept()
            self.n_connections += 1
            cut = self.n_connections <= self.n_cuts
            server = socket.create_connection(self.target)
            for pair in (client, server, False), (server, client, cut):
                threading.Thread(target=self.pump, args=pair, daemon=True).start()

    @staticmethod
    def pump(source, sink, cut):
        while data := source.recv(65536):
            if cut:
                break
            sink.sendall(data)
        for s in source, sink:
            try:
                s.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


@check
def retries_apply_a_turn_once(client, name):
    """The package asks again by itself after a lost connection: two times, with the same headers."""
    url = str(client.base_url).removesuffix("/v1/")
    session = client.post("/sessions", cast_to=object, body={})["id"]
    proxy = CuttingProxy(url, n_cuts=2)
    with openai.OpenAI(base_url=proxy.url, api_key=client.api_key) as retrying:
        r = retrying.completions.create(
            model=name, prompt="Once", max_tokens=8, extra_body={"session_id": session},
            extra_headers={"Idempotency-Key": str(uuid.uuid4())})
    assert proxy.n_connections == 3, proxy.n_connections
    assert strict(Completion, r).session["version"] == 1
    assert client.get(f"/sessions/{session}", cast_to=object)["version"] == 1


@check
def kept_stream(client, name):
    key = {"Idempotency-Key": str(uuid.uuid4())}

    def chunks():
        return [c.model_dump_json() for c in client.completions.create(
            model=name, prompt="Once", max_tokens=16, stream=True, extra_headers=key)]

    assert chunks() == chunks()
    expect(openai.UnprocessableEntityError, lambda: client.completions.create(
        model=name, prompt="Twice", extra_headers=key), code="idempotency_key_reused")


def run_async(url, key, name):
    async def main():
        async with openai.AsyncOpenAI(base_url=url + "/v1", api_key=key) as client:
            async def one(seed):
                parts = []
                stream = await client.completions.create(
                    model=name, prompt="Once", max_tokens=24, seed=seed, stream=True)
                async for chunk in stream:
                    parts += [c.text for c in chunk.choices]
                return "".join(parts)

            texts = await asyncio.gather(*(one(i % 4) for i in range(32)))
            for i, text in enumerate(texts):
                assert text == texts[i % 4], "a seed gives the same text under load"

    asyncio.run(main())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8080")
    parser.add_argument("--key", default="none")
    args = parser.parse_args()
    client = openai.OpenAI(base_url=args.url + "/v1", api_key=args.key, max_retries=0)
    name = client.models.list().data[0].id
    failed = 0
    for function in CHECKS + [run_async]:
        try:
            if function is run_async:
                run_async(args.url, args.key, name)
            else:
                function(client, name)
            print(f"ok      {function.__name__}")
        except Exception as e:
            failed += 1
            print(f"FAILED  {function.__name__}: {type(e).__name__}: {e}")
    print(f"{len(CHECKS) + 1} checks, {failed} failed (openai {openai.__version__})")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
