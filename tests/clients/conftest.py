"""Fixtures of the tests with other people's clients, and the closing line."""
import os

# Nothing here may ask a network: each package is told so before it is imported.
os.environ.update(
    HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1",
    LITELLM_LOCAL_MODEL_COST_MAP="True", LITELLM_TELEMETRY="False", LANGSMITH_TRACING="false",
    LANGCHAIN_TRACING_V2="false", DO_NOT_TRACK="1", NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
os.environ.pop("OPENAI_API_KEY", None)
os.environ.pop("OPENAI_BASE_URL", None)

import openai  # noqa: E402
import pytest  # noqa: E402

from server import KEY, Server, key_file  # noqa: E402


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """An open one, which all tests share that need no options."""
    s = Server(directory=tmp_path_factory.mktemp("server"))
    yield s
    assert s.close() == 0, s.log_path.read_text()


@pytest.fixture(scope="session")
def locked_server(tmp_path_factory):
    """One that wants KEY or ADMIN_KEY."""
    directory = tmp_path_factory.mktemp("locked")
    s = Server("--api-key-file", key_file(directory), directory=directory)
    yield s
    assert s.close() == 0, s.log_path.read_text()


@pytest.fixture
def start_server(tmp_path):
    """start_server(flags...): one of a test's own."""
    started = []

    def start(*options):
        started.append(Server(*options, directory=tmp_path))
        return started[-1]

    yield start
    for s in started:
        s.close()


@pytest.fixture(scope="session")
def name(server):
    return server.model()


@pytest.fixture(scope="session")
def client(server):
    with openai.OpenAI(base_url=server.base, api_key="none", max_retries=0, timeout=120) as c:
        yield c


@pytest.fixture
def locked_client(locked_server):
    with openai.OpenAI(base_url=locked_server.base, api_key=KEY, max_retries=0, timeout=120) as c:
        yield c


def pytest_terminal_summary(terminalreporter):
    count = {k: len(v) for k, v in terminalreporter.stats.items()}
    failed = count.get("failed", 0) + count.get("error", 0)
    terminalreporter.write_line(f"test-clients: {count.get('passed', 0)} passed, {failed} failed")
