"""litellm: its names for an OpenAI-compatible server, and its own exceptions."""
import asyncio

import litellm
import pytest

from server import KEY

MESSAGES = [{"role": "user", "content": "Tell me about a cat."}]


@pytest.fixture(scope="module")
def options(server, name):
    return dict(model=f"openai/{name}", api_base=server.base, api_key="none", max_retries=0,
                num_retries=0, timeout=120)


def test_chat(options, client, name):
    r = litellm.completion(messages=MESSAGES, max_tokens=10, seed=2, **options)
    plain = client.chat.completions.create(model=name, messages=MESSAGES, max_tokens=10, seed=2)
    assert r.choices[0].message.content == plain.choices[0].message.content
    assert r.choices[0].finish_reason == plain.choices[0].finish_reason
    assert (r.usage.prompt_tokens, r.usage.completion_tokens) == (
        plain.usage.prompt_tokens, plain.usage.completion_tokens)


def test_chat_stream(options):
    args = dict(messages=MESSAGES, max_tokens=10, seed=2, **options)
    whole = litellm.completion(**args)
    chunks = list(litellm.completion(stream=True, stream_options={"include_usage": True}, **args))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    built = litellm.stream_chunk_builder(chunks, messages=MESSAGES)
    assert built.choices[0].message.content == text
    assert built.usage.completion_tokens == whole.usage.completion_tokens
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == (
        whole.choices[0].finish_reason)


def test_async(options):
    async def run():
        args = dict(messages=MESSAGES, max_tokens=10, seed=2, **options)
        whole = await litellm.acompletion(**args)
        stream = await litellm.acompletion(stream=True, **args)
        parts = [c.choices[0].delta.content or "" async for c in stream if c.choices]
        return whole.choices[0].message.content, "".join(parts)

    whole, streamed = asyncio.run(run())
    assert whole == streamed


def test_text(options, server, client, name):
    args = {**options, "model": f"text-completion-openai/{name}"}
    plain = client.completions.create(model=name, prompt="Once", max_tokens=10, seed=2)
    args.update(prompt="Once", max_tokens=10, seed=2)
    assert litellm.text_completion(**args).choices[0].text == plain.choices[0].text
    parts = [c.choices[0].text or "" for c in litellm.text_completion(stream=True, **args)]
    assert "".join(parts) == plain.choices[0].text


def test_responses(options):
    args = {k: v for k, v in options.items() if k != "num_retries"}
    limit = 16  # OpenAI's least, to which litellm raises smaller ones
    first = litellm.responses(input="A dog.", max_output_tokens=limit, **args)
    assert first.output[0].content[0].text and first.usage.output_tokens <= limit
    kinds = [e.type.value for e in litellm.responses(
        input="A dog.", max_output_tokens=limit, stream=True, **args)]
    assert kinds[0] == "response.created" and "response.output_text.delta" in kinds


def test_exceptions(options, locked_server, name):
    def expect(kind, status, **more):
        with pytest.raises(kind) as e:
            litellm.completion(**{**options, "messages": MESSAGES, **more})
        assert e.value.status_code == status
        return str(e.value)

    assert "temperature" in expect(litellm.BadRequestError, 400, temperature=9)
    assert "other" in expect(litellm.NotFoundError, 404, model="openai/other")
    expect(litellm.AuthenticationError, 401, api_base=locked_server.base, api_key="wrong-key")
    function = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    assert "tools" in expect(litellm.BadRequestError, 400, tools=[function])
    expect(litellm.Timeout, 408, timeout=1, max_tokens=1000000, extra_body={"ignore_eos": True})
    with pytest.raises(litellm.NotFoundError):
        litellm.embedding(input=["x"], **options)
    assert litellm.completion(**{**options, "messages": MESSAGES, "max_tokens": 2,
                                 "api_base": locked_server.base, "api_key": KEY})


def test_rate_limit(options, start_server, name):
    """A full queue is litellm's RateLimitError."""
    server = start_server("--max-slots", "1", "--max-queue", "1")
    args = {**options, "api_base": server.base}
    endless = dict(messages=MESSAGES, max_tokens=1000000, stream=True,
                   extra_body={"ignore_eos": True})
    running = [litellm.completion(**endless, **args)]
    next(iter(running[0]))
    import threading
    queued = threading.Thread(
        target=lambda: litellm.completion(messages=MESSAGES, max_tokens=1, **args), daemon=True)
    queued.start()
    server.wait_for(lambda m: m.total("latte_requests_waiting") == 1, "queued")
    with pytest.raises(litellm.RateLimitError) as e:
        litellm.completion(messages=MESSAGES, **args)
    assert e.value.status_code == 429
