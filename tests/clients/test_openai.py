"""The official openai package.

Every reply is also validated strictly against the package's own pydantic types: no missing and
no mistyped field.
"""
import asyncio
import json
import socket
import threading
import time
import urllib.parse
import uuid

import openai
import pydantic
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseItem, ResponseStreamEvent

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


def test_models(client, name):
    listed = list(client.models.list())
    assert [m.id for m in listed] == [name]
    assert strict(Model, client.models.retrieve(name)).object == "model"
    e = expect(openai.NotFoundError, lambda: client.models.retrieve("none/such"))
    assert e.code == "model_not_found"


def test_completion(client, name):
    r = strict(Completion, client.completions.create(model=name, prompt="Once upon a time"))
    assert r.object == "text_completion" and r.model == name and r.id.startswith("cmpl-")
    assert r.usage.completion_tokens <= 16
    assert r.usage.total_tokens == r.usage.prompt_tokens + r.usage.completion_tokens
    assert r.choices[0].finish_reason in ("stop", "length")
    assert r._request_id


def test_completion_many(client, name):
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
        # The token that ended the text has an entry behind those of the text.
        text = c.logprobs.tokens[:-1 if c.finish_reason == "stop" else None]
        assert "".join(text) == c.text or "bytes:" in str(text)


def test_echo_scores(client, name):
    """As lm-eval-harness asks for log likelihoods."""
    r = client.completions.create(
        model=name, prompt="Once upon a time", max_tokens=0, logprobs=1, echo=True, temperature=0
    )
    lp = r.choices[0].logprobs
    assert r.choices[0].text == "Once upon a time"
    assert lp.token_logprobs[0] is None and lp.top_logprobs[0] is None
    assert all(x <= 0 for x in lp.token_logprobs[1:])
    assert all(max(top.values()) >= x for top, x in zip(lp.top_logprobs[1:], lp.token_logprobs[1:]))


def test_completion_stream(client, name):
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


def test_chat(client, name):
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


def test_chat_stream(client, name):
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


def test_chat_stream_helper(client, name):
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


def test_extra_fields(client, name):
    r = client.completions.create(
        model=name, prompt="x", max_tokens=4, seed=1,
        extra_body={"return_token_ids": True, "top_k": 5, "min_tokens": 4, "ignore_eos": True},
    )
    assert len(r.choices[0].token_ids) == 4 and r.choices[0].prompt_token_ids


def test_response(client, name):
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


def test_response_chain(client, name):
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


def test_response_stream(client, name):
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


def test_response_input_items(client, name):
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


def test_response_errors(client, name):
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


def test_errors(client, name):
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


def test_states(client, name):
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


def test_hang_up(client, name):
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


def test_retries_apply_a_turn_once(client, name):
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


def test_kept_stream(client, name):
    key = {"Idempotency-Key": str(uuid.uuid4())}

    def chunks():
        return [c.model_dump_json() for c in client.completions.create(
            model=name, prompt="Once", max_tokens=16, stream=True, extra_headers=key)]

    assert chunks() == chunks()
    expect(openai.UnprocessableEntityError, lambda: client.completions.create(
        model=name, prompt="Twice", extra_headers=key), code="idempotency_key_reused")


def async_client(server, **options):
    return openai.AsyncOpenAI(base_url=server.base, api_key="none", timeout=120, **options)


def test_async(server, name):
    async def main():
        async with async_client(server) as client:
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


def test_async_chat_and_responses(client, server, name):
    """The same requests by the asynchronous client get what the other one gets."""
    chat = dict(model=name, messages=MESSAGES, max_tokens=8, seed=4)
    respond = dict(model=name, input="A dog.", max_output_tokens=8, extra_body={"seed": 4})

    async def main():
        async with async_client(server) as c:
            whole = await c.chat.completions.create(**chat)
            parts = [p async for p in await c.chat.completions.create(stream=True, **chat)]
            response = await c.responses.create(**respond)
            again = await c.responses.retrieve(response.id)
            async with c.responses.stream(**respond) as stream:
                events = [e async for e in stream]
                last = await stream.get_final_response()
            assert again == response and last.output_text == response.output_text
            assert events[-1].type in ("response.completed", "response.incomplete")
            with_error = c.completions.create(model="other", prompt="x")
            try:
                await with_error
                raise AssertionError("no error")
            except openai.NotFoundError as e:
                assert e.code == "model_not_found"
            return whole, "".join(p.choices[0].delta.content or "" for p in parts), response

    whole, streamed, response = asyncio.run(main())
    text = client.chat.completions.create(**chat).choices[0].message.content
    assert whole.choices[0].message.content == streamed == text
    assert client.responses.create(**respond).output_text == response.output_text


def test_response_stream_helper(client, name):
    args = dict(model=name, input="A dog.", max_output_tokens=8, extra_body={"seed": 6})
    with client.responses.stream(**args) as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert final.output_text == text == client.responses.create(**args).output_text
    items = client.responses.input_items.list(final.id)
    assert [i.content[0].text for i in items] == ["A dog."]
    events = list(client.responses.retrieve(final.id, stream=True, starting_after=4))
    assert events[0].sequence_number == 5 and events[-1].response.id == final.id


def test_raw_response(client, name):
    raw = client.completions.with_raw_response.create(model=name, prompt="x", max_tokens=1)
    assert raw.status_code == 200 and raw.headers["x-request-id"] == raw.parse()._request_id
    with client.completions.with_streaming_response.create(
            model=name, prompt="x", max_tokens=4, stream=True) as raw:
        lines = [line for line in raw.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)


def test_stop(client, name):
    """A stop string is found across tokens, and the text ends before it."""
    args = dict(model=name, prompt="Once upon a time", max_tokens=24, seed=11,
                extra_body={"ignore_eos": True})
    text = client.completions.create(**args).choices[0].text
    stop = text[10:14]
    end = text.index(stop)
    cut = client.completions.create(stop=[stop, "\x01"], **args).choices[0]
    assert (cut.text, cut.finish_reason) == (text[:end], "stop")
    parts = list(client.completions.create(stop=stop, stream=True, **args))
    assert "".join(c.choices[0].text for c in parts) == text[:end]


def test_logit_bias_and_penalties(client, name):
    ids = client.completions.create(
        model=name, prompt="x", max_tokens=1, temperature=0,
        extra_body={"return_token_ids": True}).choices[0].token_ids
    other = client.completions.create(
        model=name, prompt="x", max_tokens=1, temperature=0, logit_bias={str(ids[0]): -100},
        extra_body={"return_token_ids": True}).choices[0].token_ids
    assert other != ids
    r = client.completions.create(model=name, prompt="a a a", max_tokens=8, seed=1,
                                  presence_penalty=1.5, frequency_penalty=-0.5, top_p=0.5)
    assert r.choices[0].finish_reason in ("stop", "length")


def test_what_is_not_offered_is_said_clearly(client, name):
    """Nothing that a program relies on is taken in silence."""
    function = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}
    chat = client.chat.completions.create
    bad = openai.BadRequestError

    def refused(param, **args):
        e = expect(bad, lambda: chat(model=name, messages=MESSAGES, **args), param=param,
                   type="invalid_request_error")
        assert param.split(".")[0] in e.message

    refused("tools", tools=[function])
    refused("tool_choice", tool_choice="required")
    refused("response_format.type", response_format=schema)
    refused("audio", audio={"voice": "alloy", "format": "wav"}, modalities=["text"])
    e = expect(bad, lambda: client.completions.create(model=name, prompt="x", suffix="y"),
               param="suffix")
    assert "suffix" in e.message

    class Reply(pydantic.BaseModel):
        text: str

    expect(bad, lambda: client.chat.completions.parse(
        model=name, messages=MESSAGES, response_format=Reply), param="response_format.type")
    expect(bad, lambda: client.responses.parse(model=name, input="x", text_format=Reply),
           param="text.format.type")


def test_paths_that_are_not_there(client, name):
    """404, and the path in the message."""
    for path, call in (
            ("/v1/embeddings", lambda: client.embeddings.create(model=name, input="x")),
            ("/v1/moderations", lambda: client.moderations.create(input="x")),
            ("/v1/files", lambda: client.files.list()),
            ("/v1/images/generations", lambda: client.images.generate(prompt="x"))):
        e = expect(openai.NotFoundError, call, type="invalid_request_error")
        assert path in e.message, e.message
        assert e.body["message"] and e.request_id


def test_authentication(locked_server, locked_client):
    assert locked_client.models.list().data
    with openai.OpenAI(base_url=locked_server.base, api_key="wrong-key", max_retries=0) as c:
        expect(openai.AuthenticationError, lambda: c.models.list(), status_code=401,
               code="invalid_api_key")


def test_connection_refused():
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0) as c:
        expect(openai.APIConnectionError, lambda: c.models.list())


def test_client_timeout(server, client, name):
    """The client gives up, and the server stops the generation."""
    before = server.metrics().total("latte_client_disconnects_total")
    endless = dict(model=name, max_tokens=1000000, timeout=1, extra_body={"ignore_eos": True})
    for call in (lambda: client.completions.create(prompt="x", **endless),
                 lambda: client.chat.completions.create(messages=MESSAGES, **endless)):
        start = time.monotonic()
        expect(openai.APITimeoutError, call)
        assert time.monotonic() - start < 30
    server.wait_for(lambda m: m.total("latte_requests_running") == 0
                    and m.total("latte_client_disconnects_total") >= before + 2, "cancelled")


def test_server_timeout(start_server):
    server = start_server("--request-timeout", "1")
    with openai.OpenAI(base_url=server.base, api_key="none", max_retries=0) as c:
        e = expect(openai.InternalServerError, lambda: c.completions.create(
            model=server.model(), prompt="x", max_tokens=1000000,
            extra_body={"ignore_eos": True}), status_code=504)
        assert e.type == "server_error"


def test_retry_after(start_server):
    """A 429 has Retry-After, and the package waits so long before it asks again."""
    server = start_server("--max-slots", "1", "--max-queue", "1")
    name, sent, replies = server.model(), [], []
    endless = dict(model=name, prompt="x", max_tokens=1000000, stream=True,
                   extra_body={"ignore_eos": True})
    with openai.OpenAI(base_url=server.base, api_key="none", max_retries=0) as c:
        running = c.completions.create(**endless)
        next(iter(running))

        def note_reply(r):
            replies.append((r.status_code, r.headers.get("retry-after")))
            running.close()

        hooks = {"request": [lambda r: sent.append(time.monotonic())], "response": [note_reply]}
        queued = threading.Thread(target=lambda: c.completions.create(
            model=name, prompt="x", max_tokens=1), daemon=True)
        queued.start()
        server.wait_for(lambda m: m.total("latte_requests_waiting") == 1, "queued")
        e = expect(openai.RateLimitError, lambda: c.completions.create(
            model=name, prompt="x"), status_code=429, type="rate_limit_error")
        wait = int(e.response.headers["retry-after"])
        assert wait >= 1
        with openai.OpenAI(base_url=server.base, api_key="none", max_retries=3,
                           http_client=openai.DefaultHttpxClient(event_hooks=hooks)) as patient:
            assert patient.completions.create(model=name, prompt="x", max_tokens=1).choices
        queued.join(60)
    assert [code for code, _ in replies][-1] == 200 and replies[0] == (429, str(wait)), replies
    for (code, after), begin, next_begin in zip(replies, sent, sent[1:]):
        assert code == 429 and next_begin - begin >= int(after), (replies, sent)
