"""conftest.py - the servers and the browser that the tests share."""

import re

import pytest
from playwright.sync_api import sync_playwright
from servers import Proxy, Server, model_without_template

KEYS = ("key-of-the-first", "key-of-the-second")


@pytest.fixture(scope="session")
def all_servers(tmp_path_factory):
    """Started together: loading takes a while."""
    directory = tmp_path_factory.mktemp("playground")
    keys = directory / "keys"
    keys.write_text("\n".join(KEYS) + "\n")
    plain = directory / "plain"
    plain.mkdir()
    started = {
        "open": Server("--step-tokens", "64"),
        "keyed": Server("--api-key-file", str(keys), "--max-running-per-key", "1"),
        "plain": Server(model=model_without_template(plain)),
    }
    yield {name: s.ready() for name, s in started.items()}
    for s in started.values():
        s.stop()


@pytest.fixture(scope="session")
def server(all_servers):
    return all_servers["open"]


@pytest.fixture
def proxy(server):
    p = Proxy(server.port)
    yield p
    p.close()


@pytest.fixture(scope="session")
def browser():
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        yield b
        b.close()


class Tabs:
    """Opens tabs, and knows what each of them complained about and asked for."""

    def __init__(self, browser):
        self.browser = browser
        self.contexts = []
        self.complaints = []
        self.requests = []
        self.allowed = []

    def open(self, url, context=None, **options):
        if context is None:
            context = self.browser.new_context(viewport={"width": 1280, "height": 800}, **options)
            context.set_default_timeout(60_000)
            self.contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: m.type in ("error", "warning") and self.complaints.append(m.text))
        page.on("pageerror", lambda e: self.complaints.append(f"exception: {e}"))
        page.on("request", lambda r: self.requests.append(r.url))
        page.goto(url)
        page.wait_for_function("document.querySelector('#model').value || !document.querySelector('#banner').hidden")
        return page

    def allow(self, *patterns):
        """A browser itself writes of each answer that is no 2xx: where a test provokes those."""
        self.allowed += patterns

    def check(self):
        left = [c for c in self.complaints if not any(re.search(a, c) for a in self.allowed)]
        assert not left, left


@pytest.fixture
def tabs(browser):
    t = Tabs(browser)
    yield t
    for context in t.contexts:
        context.close()
    t.check()


def pytest_terminal_summary(terminalreporter):
    count = lambda *kinds: sum(len(terminalreporter.stats.get(k, [])) for k in kinds)
    terminalreporter.write_line(f"{count('passed')} passed, {count('failed', 'error')} failed")
