"""The command `llm`, set up as its manual says, by extra-openai-models.yaml."""
import json
import os
import subprocess
import sys

import pytest

from server import KEY


@pytest.fixture(scope="module")
def llm(server, locked_server, name, tmp_path_factory):
    """llm(arguments...): the command's output; with stdin= it reads that."""
    home = tmp_path_factory.mktemp("llm")
    (home / "keys.json").write_text(json.dumps({"latte-key": KEY, "wrong-key": "wrong-key"}))
    models = [
        {"model_id": "latte", "model_name": name, "api_base": server.base},
        {"model_id": "latte-text", "model_name": name, "api_base": server.base, "completion": True},
        {"model_id": "locked", "model_name": name, "api_base": locked_server.base,
         "api_key_name": "latte-key"},
        {"model_id": "wrong", "model_name": name, "api_base": locked_server.base,
         "api_key_name": "wrong-key"},
        {"model_id": "other", "model_name": "other", "api_base": server.base},
    ]
    (home / "extra-openai-models.yaml").write_text(json.dumps(models))  # JSON is YAML

    def run(*arguments, stdin="", code=0):
        done = subprocess.run(
            [sys.executable, "-m", "llm", *arguments], input=stdin, capture_output=True, text=True,
            timeout=300, env={**os.environ, "LLM_USER_PATH": str(home)})
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    return run


OPTIONS = "-o", "max_tokens", "12", "-o", "seed", "5"


def test_models(llm):
    listed = llm("models")
    assert "latte" in listed and "latte-text" in listed


def test_prompt(llm, client, name):
    """Streamed, as it does by itself, and whole; both are what OpenAI's package gets."""
    plain = client.chat.completions.create(
        model=name, max_tokens=12, seed=5, messages=[
            {"role": "system", "content": "You are brief."},
            {"role": "user", "content": "Tell me about a cat."}])
    text = plain.choices[0].message.content
    arguments = "-m", "latte", "-s", "You are brief.", *OPTIONS, "Tell me about a cat."
    assert llm(*arguments).rstrip("\n") == text.rstrip("\n")
    assert llm(*arguments, "--no-stream").rstrip("\n") == text.rstrip("\n")


def test_conversation(llm):
    """-c goes on with the last conversation; the log has all that was sent."""
    llm("-m", "latte", *OPTIONS, "A dog.")
    llm("-c", *OPTIONS, "And then?")
    first, second = json.loads(llm("logs", "--json", "-n", "2"))[-2:]
    if first["prompt"] == "And then?":
        first, second = second, first
    assert (first["prompt"], second["prompt"]) == ("A dog.", "And then?")
    assert first["conversation_id"] == second["conversation_id"]
    assert second["input_tokens"] > first["input_tokens"] + first["output_tokens"]
    assert second["output_tokens"] <= 12


def test_stdin(llm):
    assert llm("-m", "latte", *OPTIONS, stdin="Tell me about a cat.").strip()


def test_completion(llm, client, name):
    text = client.completions.create(
        model=name, prompt="Once upon a time", max_tokens=12, seed=5).choices[0].text
    assert llm("-m", "latte-text", *OPTIONS, "Once upon a time").rstrip("\n") == text.rstrip("\n")


def test_key(llm):
    assert llm("-m", "locked", *OPTIONS, "A dog.").strip()
    assert "API key" in llm("-m", "wrong", "A dog.", code=1)


def test_errors(llm):
    assert "model" in llm("-m", "other", "x", code=1)
    assert "temperature" in llm("-m", "latte", "-o", "temperature", "2.5", "x", code=1)
