"""conftest.py - the servers and the browser that the tests share."""

import re
import time

import pytest
from playwright.sync_api import expect, sync_playwright
from servers import Proxy, Server, model_without_template

KEYS = ("key-of-the-first", "key-of-the-second")


expect.set_options(timeout=120_000)  # machines that run tests are slow


def until(page, condition, timeout_s=120):
    """Wait for an expression. Playwright's own way of it needs eval, which the page's policy forbids."""
    end = time.monotonic() + timeout_s
    while not page.evaluate(condition):
        assert time.monotonic() < end, f"not within {timeout_s} s: {condition}"
        page.wait_for_timeout(50)


def serve(*args, **options):
    s = Server(*args, **options)
    try:
        yield s.ready()
    finally:
        s.stop()


@pytest.fixture(scope="session")
def server():
    yield from serve("--step-tokens", "64")


@pytest.fixture(scope="session")
def keyed(tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("\n".join(KEYS) + "\n")
    yield from serve("--api-key-file", str(keys), "--max-running-per-key", "1")


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    yield from serve(model=model_without_template(tmp_path_factory.mktemp("plain")))


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
            context.set_default_timeout(180_000)
            self.contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: m.type in ("error", "warning") and self.complaints.append(m.text))
        page.on("pageerror", lambda e: self.complaints.append(f"exception: {e}"))
        page.on("request", lambda r: self.requests.append(r.url))
        page.goto(url)
        until(page, "document.querySelector('#model').value || !document.querySelector('#banner').hidden")
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
