"""langchain-openai: chat, completions and the Responses API."""
import asyncio

import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

MESSAGES = [SystemMessage("You are brief."), HumanMessage("Tell me about a cat.")]


@pytest.fixture(scope="module")
def options(server, name):
    return dict(model=name, base_url=server.base, api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def loop():
    """For all that is asynchronous: the package shares a client between its models, and a client
    belongs to the loop that it first ran in."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def chat(options):
    return ChatOpenAI(**options, max_tokens=10, seed=3, temperature=0.7)


@pytest.fixture(scope="module")
def text(options):
    return OpenAI(**options, max_tokens=10, seed=3)


@pytest.fixture(scope="module")
def responses(options):
    return ChatOpenAI(**options, use_responses_api=True, max_tokens=10, temperature=0)


def test_chat(chat, client, name):
    reply = chat.invoke(MESSAGES)
    plain = client.chat.completions.create(
        model=name, max_tokens=10, seed=3, temperature=0.7, messages=[
            {"role": "system", "content": "You are brief."},
            {"role": "user", "content": "Tell me about a cat."}])
    assert isinstance(reply, AIMessage) and reply.content == plain.choices[0].message.content
    assert reply.response_metadata["finish_reason"] == plain.choices[0].finish_reason
    assert reply.usage_metadata["input_tokens"] == plain.usage.prompt_tokens
    assert reply.usage_metadata["output_tokens"] == plain.usage.completion_tokens
    # the reply goes back as a message
    assert chat.invoke(MESSAGES + [reply, HumanMessage("And then?")]).content is not None


def test_chat_stream(chat):
    chunks = list(chat.stream(MESSAGES, stream_usage=True))
    whole = chat.invoke(MESSAGES)
    assert "".join(c.content for c in chunks) == whole.content and len(chunks) > 2
    total = chunks[0]
    for c in chunks[1:]:
        total += c
    # cached_tokens may differ: the second one finds the first one's beginning
    for count in "input_tokens", "output_tokens", "total_tokens":
        assert total.usage_metadata[count] == whole.usage_metadata[count]


def test_chat_logprobs(options):
    chat = ChatOpenAI(**options, max_tokens=4, logprobs=True, top_logprobs=2)
    content = chat.invoke("A dog.").response_metadata["logprobs"]["content"]
    assert content and all(len(t["top_logprobs"]) == 2 and t["logprob"] <= 0 for t in content)


def test_chat_many(options):
    chat = ChatOpenAI(**options, max_tokens=4, n=2, seed=1)
    assert len(chat.generate([MESSAGES, MESSAGES]).generations[0]) == 2


def test_chat_batch_and_async(chat, loop):
    questions = ["A cat.", "A dog.", "A bird."]
    single = [chat.invoke(q).content for q in questions]
    assert [m.content for m in chat.batch(questions)] == single

    async def run():
        batch = await chat.abatch(questions)
        streamed = [c.content async for c in chat.astream(questions[0])]
        return [m.content for m in batch], "".join(streamed)

    assert loop.run(run()) == (single, single[0])


def test_completion(text, client, name, loop):
    # The package sends its own defaults, where the server would take the model's top_p.
    assert (text.temperature, text.top_p) == (0.7, 1)
    plain = client.completions.create(
        model=name, prompt="Once upon a time", max_tokens=10, seed=3, temperature=0.7, top_p=1)
    assert text.invoke("Once upon a time") == plain.choices[0].text
    assert "".join(text.stream("Once upon a time")) == plain.choices[0].text
    assert text.batch(["The sun", "The moon"]) == [text.invoke("The sun"), text.invoke("The moon")]
    assert loop.run(text.ainvoke("The sun")) == text.invoke("The sun")


def test_stop(options):
    whole = OpenAI(**options, max_tokens=16, temperature=0).invoke("Once upon a time")
    stop = whole[5:8]
    cut = OpenAI(**options, max_tokens=16, temperature=0).invoke("Once upon a time", stop=[stop])
    assert cut == whole[:whole.index(stop)]


def test_responses(responses, loop):
    first = responses.invoke("A dog.")
    assert first.response_metadata["id"].startswith("resp_")
    assert first.text and first.usage_metadata["output_tokens"] <= 10
    chunks = list(responses.stream("A dog."))
    assert "".join(c.text for c in chunks) == first.text
    assert loop.run(responses.ainvoke("A dog.")).text == first.text
    # by the id of the one before, and with the whole conversation as input
    then = responses.invoke("And then?", previous_response_id=first.response_metadata["id"])
    assert then.usage_metadata["input_token_details"]["cache_read"] == (
        first.usage_metadata["total_tokens"])
    assert responses.invoke([HumanMessage("A dog."), first, HumanMessage("And then?")]).text


def test_responses_find_the_one_before(options):
    """use_previous_response_id takes the id from the conversation."""
    chat = ChatOpenAI(**options, use_responses_api=True, use_previous_response_id=True,
                      max_tokens=6)
    first = chat.invoke("A dog.")
    then = chat.invoke([HumanMessage("A dog."), first, HumanMessage("And then?")])
    assert then.usage_metadata["input_token_details"]["cache_read"] > 0


def test_errors(chat, options):
    def function():
        """Does nothing."""

    with pytest.raises(openai.BadRequestError) as e:
        chat.bind_tools([function]).invoke("x")
    assert e.value.param == "tools"
    with pytest.raises(openai.BadRequestError) as e:
        chat.invoke("x", temperature=9)
    assert e.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as e:
        ChatOpenAI(**{**options, "model": "other"}).invoke("x")
    assert e.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        OpenAIEmbeddings(**options, check_embedding_ctx_length=False).embed_query("x")


def test_a_key(locked_server):
    with pytest.raises(openai.AuthenticationError):
        ChatOpenAI(model="latte-12m", base_url=locked_server.base, api_key="wrong-key",
                   max_retries=0).invoke("x")
