"""screenshots.py DIR - pictures light.png and dark.png of the real page and server.

Run as  LATTE_SERVER=build/release/latte-server build/playground-venv/bin/python
tests/playground/screenshots.py server/playground/screenshots
"""

import pathlib
import sys
import time

from playwright.sync_api import sync_playwright
from servers import Server


def finished(page):
    while not page.evaluate("document.querySelector('#stop').hidden && !document.querySelector('#send').disabled"):
        page.wait_for_timeout(100)
    time.sleep(0.3)


def turn(page, prompt):
    page.locator("#prompt").fill(prompt)
    page.locator("#send").click()
    finished(page)


def branches(page):
    """A story with two ways on."""
    page.locator("label:has(#mode-completion)").click()
    page.locator("#p-seed").fill("11")
    page.locator("#p-temperature").fill("0.6")
    page.locator("#p-max_tokens").fill("90")
    turn(page, "Once upon a time there was a little girl who")
    page.locator("#snapshot-name").fill("beginning")
    page.locator("#snapshot-make").click()
    page.wait_for_selector("#snapshots li")
    root = page.url
    for prompt in ("\n\nOne morning", "\n\nBut the old man"):
        page.goto(root)
        page.wait_for_timeout(500)
        finished(page)
        page.locator("#fork").click()
        page.wait_for_timeout(500)
        finished(page)
        turn(page, prompt)


def main(directory):
    out = pathlib.Path(directory)
    out.mkdir(parents=True, exist_ok=True)
    server = Server()
    try:
        server.ready()
        with sync_playwright() as p:
            browser = p.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1120, "height": 720}, color_scheme="light")
            page.set_default_timeout(120_000)
            page.goto(server.url + "/")
            while not page.evaluate("document.querySelector('#model').value"):
                page.wait_for_timeout(100)
            branches(page)
            page.locator(".turn").last.locator(".tok").nth(12).hover()
            page.screenshot(path=out / "light.png")
            page.mouse.move(5, 5)
            page.emulate_media(color_scheme="dark")
            page.locator("#with-tint").check()
            page.locator("#panel").evaluate("e => e.scrollTo(0, 0)")
            page.screenshot(path=out / "dark.png")
            browser.close()
    finally:
        server.stop()


main(sys.argv[1])
