"""schemathesis makes requests from openapi.yaml, sound and wrong ones, and checks the replies.

All checks, all routes, no exceptions. Examples and time are bounded, and the seed is fixed, so
that a run can be repeated; LATTE_SCHEMA_EXAMPLES and LATTE_SCHEMA_SEED look further.
schema_hooks.py makes true what schemas cannot say of a sound request.
"""
import json
import os
import subprocess
import sys

import pytest
import yaml

from server import ADMIN_KEY, MODEL_DIR, ROOT, Server, key_file

EXAMPLES = os.environ.get("LATTE_SCHEMA_EXAMPLES", "10")
SEED = os.environ.get("LATTE_SCHEMA_SEED", "1")
MAX_CHOICES = "8"
# Generations are short, and whatever is stored stays small.
OPTIONS = ("--default-max-tokens", "4", "--max-tokens-limit", "128", "--max-choices", MAX_CHOICES,
           "--max-prompt-tokens", "4096")


def run(document, server, directory, *arguments, key=None):
    report = directory / "report.json"
    vocabulary = json.loads((MODEL_DIR / "config.json").read_text())["vocab_size"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests/clients"), "LATTE_URL": server.url,
                   "LATTE_MAX_CHOICES": MAX_CHOICES, "LATTE_VOCABULARY": str(vocabulary),
                   "SCHEMATHESIS_HOOKS": "schema_hooks"}
    if key:
        environment["LATTE_KEY"] = key
    done = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", str(document), "--url", server.url,
         "--checks", "all", "--phases", "examples,coverage,fuzzing,stateful",
         "--max-examples", EXAMPLES, "--seed", SEED, "--continue-on-failure",
         "--generation-allow-x00", "false",  # the document: \u0000 is refused in every string
         "--suppress-health-check", "all", "--request-timeout", "60",
         "--report", "json", "--report-json-path", str(report), *arguments],
        cwd=directory, env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-4000:]
    assert "No issues found" in done.stdout, done.stdout[-4000:]


@pytest.fixture
def served(tmp_path):
    """The document as the server sends it, which is the one in the tree."""
    def fetch(server):
        path = tmp_path / "openapi.yaml"
        path.write_text(server.get("/openapi.yaml"))
        assert path.read_text() == (ROOT / "openapi.yaml").read_text()
        return path
    return fetch


def test_open(start_server, served, tmp_path):
    server = start_server("--open-admin", *OPTIONS)
    run(served(server), server, tmp_path)
    assert server.process.poll() is None


def test_with_keys(start_server, served, tmp_path):
    """A server with keys: the document's alternative without one is left out."""
    server = start_server("--api-key-file", key_file(tmp_path), *OPTIONS)
    document = yaml.safe_load(served(server).read_text())
    document["security"] = [{"apiKey": []}]
    path = tmp_path / "locked.yaml"
    path.write_text(yaml.safe_dump(document))
    run(path, server, tmp_path, "--header", f"Authorization: Bearer {ADMIN_KEY}", key=ADMIN_KEY)
