"""test_playground.py - the page at / in a real browser, against the real server.

What the page shows is compared with what the server says over HTTP: positions, versions, states,
and the text that the same seed gives.
"""

import http.client
import json
import os
import re
import urllib.parse

import pytest
from axe_playwright_python.sync_playwright import Axe
from conftest import KEYS, until
from playwright.sync_api import expect

POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
          "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
LONG = 100_000  # tokens: minutes


def number(page, selector):
    return int(page.locator(selector).inner_text().replace(",", "") or -1)


def session_of(page):
    return urllib.parse.urlparse(page.url).fragment


def set_field(page, name, value):
    page.locator(f"#p-{name}").fill(str(value))


def mode(page, name):
    page.locator(f"label:has(#mode-{name})").click()


def setup(page, kind="completion", **fields):
    mode(page, kind)
    for name, value in {"seed": 7, "max_tokens": 12, **fields}.items():
        set_field(page, name, value)


def start(page, prompt):
    page.locator("#prompt").fill(prompt)
    page.locator("#send").click()


def endless(page):
    """Turns of this page do not end by themselves: the model may find its story complete."""
    set_field(page, "max_tokens", LONG)
    page.route("**/v1/completions", lambda route: route.continue_(
        post_data=json.dumps({**json.loads(route.request.post_data), "ignore_eos": True})))


def finished(page):
    until(page, "document.querySelector('#stop').hidden && !document.querySelector('#send').disabled")


def turn(page, prompt):
    start(page, prompt)
    finished(page)


def texts(page):
    return page.locator(".turn .answer").all_text_contents()


def begun(page, n=4):
    """Some tokens of an answer that goes on are there."""
    until(page, f"document.querySelectorAll('.running .tok').length >= {n}")


def reference(server, prompt, **fields):
    """What the API gives for the same request without the page."""
    body = {"prompt": prompt, "seed": 7, "max_tokens": 12, **fields}
    return server.json("/v1/completions", body)["choices"][0]["text"]


def agree(page, server):
    """The panel says what the server says."""
    s = server.session(session_of(page))
    assert number(page, "#f-position") == s["position"]
    assert number(page, "#f-version") == s["version"]
    assert page.locator("#f-bytes").get_attribute("title").replace(",", "") == f"{s['state_bytes']} bytes"
    assert page.locator("#f-tier").get_attribute("title") == s["tier"]
    return s


# ---- the page ------------------------------------------------------------------------------------

def test_loads_under_a_strict_policy(server, tabs):
    page = tabs.open(server.url + "/")
    assert page.locator("#model").input_value() == "latte-12m"
    assert page.locator("#mode-chat").is_checked()
    for path in ["/"] + [urllib.parse.urlparse(u).path for u in tabs.requests if "/playground/" in u]:
        status, headers, _ = server.raw(path)
        assert status == 200 and headers["Content-Security-Policy"] == POLICY, path
    setup(page)
    turn(page, "Once upon a time")
    assert all(u.startswith((server.url + "/", "data:", "blob:")) for u in tabs.requests)
    # The policy is in force: a script of somebody else's is not run.
    page.evaluate("document.head.append(Object.assign(document.createElement('script'), {textContent: 'window.bad = 1'}))")
    assert page.evaluate("window.bad") is None
    tabs.allow("Content Security Policy")


# ---- turns ---------------------------------------------------------------------------------------

def test_completion(server, tabs):
    page = tabs.open(server.url + "/")
    setup(page)
    turn(page, "Once upon a time")
    assert texts(page) == [reference(server, "Once upon a time")]
    s = agree(page, server)
    assert s["position"] == 4 + 12 and s["version"] == 1
    # The second turn sends what is new alone.
    turn(page, " Then Lucy")
    assert len(texts(page)) == 2
    s = agree(page, server)
    assert s["version"] == 2 and 16 + 12 < s["position"] <= 16 + 12 + 4


def test_streams(server, tabs):
    page = tabs.open(server.url + "/")
    setup(page)
    endless(page)
    start(page, "Once upon a time")
    begun(page, 2)
    few = page.locator(".tok").count()
    begun(page, few + 5)  # while it runs
    assert page.locator("#log").get_attribute("aria-busy") == "true"
    assert page.locator("#send").is_hidden()
    page.locator("#stop").click()
    finished(page)


def test_chat(server, tabs):
    page = tabs.open(server.url + "/")
    setup(page, "chat", temperature=0)
    page.locator("#system-box summary").click()
    page.locator("#system").fill("You are brief.")
    turn(page, "Hello")
    messages = [{"role": "system", "content": "You are brief."}, {"role": "user", "content": "Hello"}]
    body = {"messages": messages, "seed": 7, "temperature": 0, "max_tokens": 12}
    expected = server.json("/v1/chat/completions", body)["choices"][0]["message"]["content"]
    assert texts(page) == [expected]
    first = agree(page, server)
    turn(page, "And then?")
    assert agree(page, server)["position"] > first["position"]
    assert page.locator(".turn .said").all_text_contents() == ["You are brief.", "Hello", "And then?"]


def test_stop_and_what_then(server, tabs):
    page = tabs.open(server.url + "/")
    setup(page)
    endless(page)
    start(page, "Once upon a time")
    begun(page)
    page.keyboard.press("Escape")
    finished(page)
    expect(page.locator(".foot")).to_contain_text("Stopped and not applied")
    s = agree(page, server)
    assert (s["position"], s["version"], s["in_turn"]) == (0, 0, False)
    page.locator("#edit").click()
    assert page.locator("#prompt").input_value() == "Once upon a time"
    assert page.locator(".turn").count() == 0
    # Again, and keep what there is.
    page.keyboard.press("Control+Enter")
    begun(page)
    page.locator("#stop").click()
    finished(page)
    kept = texts(page)[0]
    page.locator("#keep-text").click()
    expect(page.locator("#f-version")).to_have_text("1")
    n = server.json("/tokenize", {"prompt": "Once upon a time" + kept})["count"]
    assert agree(page, server)["position"] == n
    assert texts(page) == [kept]


def test_try_again(server, tabs):
    page = tabs.open(server.url + "/")
    setup(page)
    endless(page)
    start(page, "Once upon a time")
    begun(page)
    page.locator("#stop").click()
    finished(page)
    set_field(page, "max_tokens", 5)
    page.locator("#again").click()
    finished(page)
    assert texts(page) == [reference(server, "Once upon a time", max_tokens=5, ignore_eos=True)]
    assert agree(page, server)["version"] == 1


def test_regenerate_and_undo(server, tabs):
    page = tabs.open(server.url + "/")
    setup(page)
    turn(page, "Once upon a time")
    turn(page, " Then Lucy")
    before, first = agree(page, server), texts(page)
    set_field(page, "seed", 8)
    page.locator("#regenerate").click()
    finished(page)
    expect(page.locator("#f-version")).to_have_text("4")  # back, and a turn
    again = texts(page)
    assert again[0] == first[0] and again[1] != first[1]
    # With the first seed the session is in the same state: it says the same words.
    set_field(page, "seed", 7)
    page.locator("#regenerate").click()
    finished(page)
    assert texts(page) == first
    assert agree(page, server)["position"] == before["position"]
    page.locator("#undo").click()
    expect(page.locator(".turn")).to_have_count(1)
    assert page.locator("#prompt").input_value() == " Then Lucy"
    assert agree(page, server)["position"] == 16
    assert page.locator("#regenerate").count() == 0


def test_sampling_fields_reach_the_server(server, tabs):
    page = tabs.open(server.url + "/")
    fields = {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "presence_penalty": 0.5,
              "frequency_penalty": 0.25, "repetition_penalty": 1.1, "seed": 3, "max_tokens": 6}
    setup(page, **fields)
    page.locator("#p-stop").fill("\\n\\n\nTHE END")
    with page.expect_request("**/v1/completions") as sent:
        turn(page, "Once upon a time")
    body = json.loads(sent.value.post_data)
    assert {k: body[k] for k in fields} == fields
    assert body["stop"] == ["\n\n", "THE END"] and body["model"] == "latte-12m"
    page.locator("#sampling-reset").click()
    assert page.locator("#p-temperature").input_value() == ""
    assert page.locator("#p-max_tokens").input_value() == "128"
    page.locator("#p-temperature").press("ArrowUp")
    assert page.locator("#p-temperature").input_value() == "0.05"


def test_wrong_field(server, tabs):
    tabs.allow("400")
    page = tabs.open(server.url + "/")
    setup(page, temperature=9)
    start(page, "Once upon a time")
    expect(page.locator("#banner")).to_contain_text("Not accepted: temperature")
    expect(page.locator("#banner")).to_contain_text("<= 2, but got 9")
    field = page.locator("#p-temperature")
    expect(field).to_have_attribute("aria-invalid", "true")
    expect(field).to_be_focused()
    assert page.locator("#prompt").input_value() == "Once upon a time"
    field.fill("1")
    assert field.get_attribute("aria-invalid") is None
    page.locator("#send").click()
    finished(page)
    assert len(texts(page)) == 1


# ---- probabilities -------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_probabilities(server, tabs, kind):
    page = tabs.open(server.url + "/")
    setup(page, kind)
    turn(page, "Once upon a time")
    token = page.locator(".tok").nth(2)
    token.hover()
    probe = page.locator("#probe")
    expect(probe).to_be_visible()
    assert probe.locator(".chosen code").inner_text().replace("·", " ") == token.text_content()
    shares = [float(re.sub(r"[^\d.]", "", t)) for t in probe.locator(".row span").all_inner_texts()]
    assert shares == sorted(shares, reverse=True) and sum(shares) <= 101 and len(shares) >= 5
    if kind == "completion":
        reply = server.json("/v1/completions", {"prompt": "Once upon a time", "seed": 7, "max_tokens": 12, "logprobs": 5})
        p = 100 * 2.718281828 ** reply["choices"][0]["logprobs"]["token_logprobs"][2]
        assert abs(float(re.sub(r"[^\d.]", "", probe.locator(".chosen span").inner_text())) - p) <= 0.5
    page.mouse.move(5, 5)
    expect(probe).to_be_hidden()
    # By keyboard.
    answer = page.locator(".answer")
    answer.focus()
    page.keyboard.press("ArrowRight")
    expect(probe).to_be_visible()
    assert page.locator(".tok.here").get_attribute("data-i") == "0"
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    n = page.locator(".tok").count()
    assert page.locator(".tok.here").get_attribute("data-i") == str(n - 2)
    assert "%" in page.locator("#status").inner_text()
    page.keyboard.press("Escape")
    expect(probe).to_be_hidden()
    page.locator("#with-tint").check()
    colours = page.locator(".tok").evaluate_all("e => e.map(x => getComputedStyle(x).backgroundColor)")
    assert len(set(colours)) > 1


def test_probabilities_up_to_a_stop_token(server, tabs):
    """The stop token is listed with the others, but is no part of the text."""
    page = tabs.open(server.url + "/")
    setup(page, max_tokens=60, seed=1)
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    turn(page, prompt)
    reply = server.json("/v1/completions", {"prompt": prompt, "max_tokens": 60, "seed": 1, "logprobs": 5})
    choice = reply["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["logprobs"]["tokens"][-1] == "<|im_end|>"
    assert page.locator(".answer").text_content() == choice["text"]
    assert page.locator(".tok").all_text_contents() == choice["logprobs"]["tokens"][:-1]


def test_without_probabilities(server, tabs):
    page = tabs.open(server.url + "/")
    setup(page)
    page.locator("#with-logprobs").uncheck()
    turn(page, "Once upon a time")
    assert texts(page) == [reference(server, "Once upon a time")]
    assert page.locator(".tok").count() == 0


def test_split_characters(server, tabs):
    """A character of several tokens is one piece, and the text is what the server says."""
    page = tabs.open(server.url + "/")
    setup(page, temperature=2, max_tokens=60)
    prompt = "日本語 ☕ 日本語 ☕ 日本語"
    turn(page, prompt)
    assert texts(page) == [reference(server, prompt, temperature=2, max_tokens=60)]


# ---- the session ---------------------------------------------------------------------------------

def test_plot(server, tabs):
    page = tabs.open(server.url + "/")
    setup(page, max_tokens=200)
    turn(page, "Once upon a time")
    assert page.locator("#plot circle").count() >= 3
    assert re.search(r"position \d+ to \d+: median [\d.]+ ms", page.locator("#plot").get_attribute("aria-label"))
    assert "ms" in page.locator("#plot-now").inner_text()


def test_forks(server, tabs):
    page = tabs.open(server.url + "/")
    setup(page)
    turn(page, "Once upon a time")
    root, at = session_of(page), agree(page, server)["position"]
    page.locator("#fork").click()
    expect(page.locator("#tree ul ul .branch")).to_have_count(1)
    until(page, f"location.hash !== '#{root}'")
    child = session_of(page)
    assert agree(page, server)["position"] == at
    assert len(texts(page)) == 1
    turn(page, " Then Lucy")
    grown = agree(page, server)["position"]
    assert grown > at and server.session(root)["position"] == at
    # A branch of the branch, and back to the root.
    page.locator("#fork").click()
    expect(page.locator("#tree ul ul ul .branch")).to_have_count(1)
    expect(page.locator("#tree ul ul ul .branch")).to_contain_text("Branch 1.1")
    page.locator(f'[data-session="{root}"]').click()
    expect(page.locator("#f-position")).to_have_text(str(at))
    assert len(texts(page)) == 1 and page.locator("#tree [aria-current]").get_attribute("data-session") == root
    turn(page, " Then Peter")
    assert server.session(child)["position"] == grown
    # The tree is the server's: another tab that opens one sees it whole.
    other = tabs.open(server.url + "/#" + child)
    expect(other.locator("#tree ul ul ul .branch")).to_have_count(1)
    expect(other.locator(".gap")).to_contain_text(f"{grown} tokens")
    # A reload keeps the words.
    page.reload()
    expect(page.locator(".turn")).to_have_count(2)


def test_snapshots(server, tabs):
    page = tabs.open(server.url + "/")
    setup(page)
    turn(page, "Once upon a time")
    at = agree(page, server)["position"]
    page.locator("#snapshot-name").fill("early")
    page.locator("#snapshot-make").click()
    expect(page.locator("#snapshots li")).to_have_count(1)
    turn(page, " Then Lucy")
    later, words = agree(page, server)["position"], texts(page)
    page.locator("#snapshot-name").fill("late")
    page.locator("#snapshot-name").press("Enter")
    expect(page.locator("#snapshots li")).to_have_count(2)
    listed = server.json(f"/v1/sessions/{session_of(page)}/snapshots")["data"]
    assert [(x["name"], x["position"]) for x in listed] == [("early", at), ("late", later)]
    page.get_by_role("button", name="Roll back to early").click()
    expect(page.locator("#f-position")).to_have_text(str(at))
    assert texts(page) == words[:1]
    agree(page, server)
    # Forward again, to what is not on this way any more.
    page.get_by_role("button", name="Roll back to late").click()
    expect(page.locator("#f-position")).to_have_text(str(later))
    assert texts(page) == words
    agree(page, server)
    tabs.allow("400", "409")
    page.locator("#snapshot-name").fill("late")
    page.locator("#snapshot-make").click()
    expect(page.locator("#banner")).to_contain_text("has a snapshot 'late' already")


def test_export_and_import(server, tabs, tmp_path):
    page = tabs.open(server.url + "/")
    setup(page)
    turn(page, "Once upon a time")
    first = agree(page, server)
    with page.expect_download() as got:
        page.locator("#export").click()
    file = tmp_path / got.value.suggested_filename
    got.value.save_as(file)
    data = file.read_bytes()
    assert data == server.raw(f"/v1/sessions/{first['id']}/state")[2] and len(data) == first["state_bytes"]
    with page.expect_file_chooser() as chooser:
        page.locator("#import").click()
    chooser.value.set_files(file)
    until(page, f"location.hash !== '#{first['id']}'")
    second = agree(page, server)
    assert second["position"] == first["position"]
    assert server.raw(f"/v1/sessions/{second['id']}/state")[2] == data
    # A file that is no state is refused, and leaves nothing behind.
    tabs.allow("400")
    bad = tmp_path / "bad.state"
    bad.write_bytes(data[:1000])
    n = len(server.json("/v1/sessions?limit=100")["data"])
    page.locator("#import-file").set_input_files(bad)
    expect(page.locator("#banner")).to_be_visible()
    expect(page.locator("#banner")).to_contain_text("400")
    assert len(server.json("/v1/sessions?limit=100")["data"]) == n


def test_new_refresh_and_delete(server, tabs):
    page = tabs.open(server.url + "/")
    setup(page)
    turn(page, "Once upon a time")
    first = session_of(page)
    page.locator("#new").click()
    expect(page.locator(".turn")).to_have_count(0)
    assert session_of(page) == "" and page.locator("#session-facts").is_hidden()
    turn(page, "A cat")
    second = session_of(page)
    assert second not in ("", first)
    # Somebody else goes on with it.
    server.json("/v1/completions", {"session_id": second, "prompt": " ran", "max_tokens": 3})
    page.locator("#refresh").click()
    expect(page.locator(".gap")).to_be_visible()
    agree(page, server)
    page.locator("#delete").click()
    expect(page.locator("#confirm-no")).to_be_focused()
    page.locator("#confirm-no").click()
    assert server.raw(f"/v1/sessions/{second}")[0] == 200
    page.locator("#delete").click()
    page.locator("#confirm-yes").click()
    expect(page.locator("#session-facts")).to_be_hidden()
    assert server.raw(f"/v1/sessions/{second}")[0] == 404


def test_session_that_is_gone(server, tabs):
    tabs.allow("404")
    page = tabs.open(server.url + "/")
    setup(page)
    turn(page, "Once upon a time")
    server.raw(f"/v1/sessions/{session_of(page)}", method="DELETE")
    start(page, " and then")
    expect(page.locator("#banner")).to_contain_text("This session is gone")
    finished(page)
    page.locator("#gone-new").click()
    assert page.locator("#prompt").input_value() == " and then"
    expect(page.locator("#session-facts")).to_be_hidden()


# ---- what goes wrong -----------------------------------------------------------------------------

NETWORK = r"net::ERR_"


def test_lost_connection(server, proxy, tabs):
    tabs.allow(NETWORK)
    page = tabs.open(proxy.url + "/")
    setup(page, max_tokens=80)
    expected = reference(server, "Once upon a time", max_tokens=80)
    proxy.cut_after = 12_000
    start(page, "Once upon a time")
    finished(page)
    assert proxy.n_cuts == 1
    assert texts(page) == [expected]  # nothing lost, nothing twice
    assert page.locator(".tok").count() > 40
    assert agree(page, server)["version"] == 1
    assert page.locator("#banner").is_hidden()


def test_lost_for_good(server, proxy, tabs):
    tabs.allow(NETWORK, "404")
    page = tabs.open(proxy.url + "/")
    setup(page)
    endless(page)
    with page.expect_response("**/v1/completions") as answered:
        start(page, "Once upon a time")
    stream = answered.value.headers["x-stream-id"]
    begun(page)
    proxy.refusing = True
    proxy.cut()
    expect(page.locator("#progress")).to_contain_text("connection lost")
    assert server.raw(f"/v1/streams/{stream}", method="DELETE")[0] == 200
    proxy.refusing = False
    expect(page.locator("#banner")).to_contain_text("The connection was lost")
    expect(page.locator("#banner")).to_contain_text("not applied")
    finished(page)
    assert agree(page, server)["version"] == 0
    page.locator("#newest").click()
    finished(page)
    assert page.locator("#banner").is_hidden()


def test_stop_while_lost(server, proxy, tabs):
    tabs.allow(NETWORK, "404")
    page = tabs.open(proxy.url + "/")
    setup(page)
    endless(page)
    start(page, "Once upon a time")
    begun(page)
    proxy.refusing = True
    proxy.cut()
    expect(page.locator("#progress")).to_contain_text("connection lost")
    page.locator("#stop").click()
    page.wait_for_timeout(300)
    proxy.refusing = False
    finished(page)
    s = agree(page, server)
    assert (s["version"], s["in_turn"]) == (0, False)
    expect(page.locator(".foot")).to_contain_text("Stopped")


def test_no_server(server, proxy, tabs):
    tabs.allow(NETWORK)
    page = tabs.open(proxy.url + "/")
    setup(page)
    proxy.refusing = True
    proxy.cut()
    start(page, "Once upon a time")
    expect(page.locator("#banner")).to_contain_text("cannot be reached")
    proxy.refusing = False
    page.locator("#retry").click()
    finished(page)
    assert texts(page) == [reference(server, "Once upon a time")]
    assert page.locator("#prompt").input_value() == ""


def test_reload_in_mid_stream(server, tabs):
    page = tabs.open(server.url + "/")
    setup(page, max_tokens=400)
    start(page, "Once upon a time")
    begun(page, 2)
    page.reload()
    page.wait_for_selector(".turn .answer")
    finished(page)
    assert texts(page) == [reference(server, "Once upon a time", max_tokens=400)]
    assert agree(page, server)["version"] == 1


def test_401(keyed, tabs):
    tabs.allow("401")
    page = tabs.open(keyed.url + "/")
    expect(page.locator("#banner")).to_contain_text("An API key is needed")
    expect(page.locator("#key")).to_be_focused()
    page.locator("#key").fill("key-of-nobody")
    page.locator("#key-use").click()
    expect(page.locator("#banner")).to_contain_text("Incorrect API key")
    page.locator("#key").fill(KEYS[0])
    page.keyboard.press("Enter")
    expect(page.locator("#model")).to_have_value("latte-12m")
    expect(page.locator("#banner")).to_be_hidden()
    setup(page)
    turn(page, "Once upon a time")
    assert len(texts(page)) == 1
    stored = page.evaluate("JSON.stringify([{...sessionStorage}, {...localStorage}])")
    assert KEYS[0] not in stored and KEYS[0] not in page.url
    # Kept only if asked to, and then over a reload.
    page.reload()
    expect(page.locator("#banner")).to_contain_text("An API key is needed")
    page.locator("#key").fill(KEYS[0])
    page.locator("#key-keep").check()
    page.locator("#key-use").click()
    expect(page.locator("#f-version")).to_have_text("1")
    page.reload()
    expect(page.locator("#f-version")).to_have_text("1")


def test_429(keyed, tabs):
    tabs.allow("401", "429")
    page = tabs.open(keyed.url + "/")
    page.locator("#key").fill(KEYS[1])
    page.locator("#key-use").click()
    setup(page)
    other = keyed.json("/v1/sessions", {}, key=KEYS[1])["id"]
    body = {"session_id": other, "prompt": "x", "max_tokens": LONG, "ignore_eos": True, "stream": True, "resumable": True}
    running = http.client.HTTPConnection("127.0.0.1", keyed.port)
    running.request("POST", "/v1/completions", json.dumps(body),
                    {"Content-Type": "application/json", "Authorization": f"Bearer {KEYS[1]}"})
    stream = running.getresponse().headers["X-Stream-Id"]
    start(page, "Once upon a time")
    banner = page.locator("#banner")
    expect(banner).to_contain_text("The server is busy")
    expect(banner).to_contain_text(re.compile(r"wait \d+ s"))
    assert page.locator("#retry").is_disabled()
    assert page.locator("#prompt").input_value() == "Once upon a time"
    assert keyed.raw(f"/v1/streams/{stream}", method="DELETE", key=KEYS[1])[0] == 200
    running.close()
    expect(page.locator("#retry")).to_be_enabled()
    page.locator("#retry").click()
    page.wait_for_selector(".turn")
    finished(page)
    assert len(texts(page)) == 1 and page.locator("#prompt").input_value() == ""


def test_two_tabs(server, tabs):
    tabs.allow("409", "412")
    one = tabs.open(server.url + "/")
    setup(one)
    turn(one, "Once upon a time")
    two = tabs.open(server.url + "/#" + session_of(one))
    setup(two)
    expect(two.locator("#f-version")).to_have_text("1")
    turn(two, " Then Lucy")
    two.locator("#snapshot-name").fill("lucy")
    two.locator("#snapshot-make").click()
    expect(two.locator("#snapshots li")).to_have_count(1)
    start(one, " Then Peter")
    expect(one.locator("#banner")).to_contain_text("The session has moved on")
    assert one.locator("#prompt").input_value() == " Then Peter"
    assert server.session(session_of(one))["version"] == 2  # nothing was applied twice
    one.locator("#newest").click()
    expect(one.locator("#f-version")).to_have_text("2")
    expect(one.locator(".gap")).to_be_visible()
    one.locator("#send").click()
    expect(one.locator("#f-version")).to_have_text("3")
    finished(one)
    # What two does to the session as it knows it is refused, too.
    before = server.session(session_of(one))
    for control in ("#regenerate", "#undo", "#snapshots li button", "#snapshot-make", "#export"):
        with two.expect_response(lambda r: r.status == 412):
            two.locator(control).click()
        expect(two.locator("#banner")).to_contain_text("The session has moved on")
    two.locator("#delete").click()
    with two.expect_response(lambda r: r.status == 412):
        two.locator("#confirm-yes").click()
    now = server.session(session_of(one))
    assert (now["version"], now["position"]) == (3, before["position"])
    two.locator("#newest").click()
    expect(two.locator("#f-version")).to_have_text("3")
    # While one of them is in a turn.
    endless(one)
    start(one, " And")
    begun(one)
    start(two, " But")
    expect(two.locator("#banner")).to_contain_text("The session is in use")
    one.locator("#stop").click()
    finished(one)
    two.locator("#retry").click()
    expect(two.locator("#f-version")).to_have_text("4")


def test_no_chat_template(plain, tabs):
    tabs.allow("400")
    page = tabs.open(plain.url + "/")
    assert page.locator("#mode-chat").is_disabled() and page.locator("#mode-completion").is_checked()
    expect(page.locator("#mode-note")).to_contain_text("no chat template")
    set_field(page, "max_tokens", 5)
    turn(page, "Once upon a time")
    assert len(texts(page)) == 1


# ---- for everybody -------------------------------------------------------------------------------

def violations(page):
    found = Axe().run(page).response["violations"]
    return [(v["id"], [n["html"][:120] for n in v["nodes"]]) for v in found]


@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessible(server, tabs, scheme, width):
    page = tabs.open(server.url + "/", color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 740})
    assert violations(page) == []
    if width < 900:
        page.locator("#panel-toggle").click()
    set_field(page, "max_tokens", 16)
    page.locator("#with-tint").check()
    if width < 900:
        assert violations(page) == []
        page.locator("#panel-toggle").click()
    turn(page, "Hello")
    if width < 900:
        page.locator("#panel-toggle").click()
    page.locator("#fork").click()
    page.wait_for_selector("#tree ul ul")
    page.locator("#snapshot-make").click()
    page.wait_for_selector("#snapshots li")
    assert violations(page) == []
    if width < 900:
        page.locator("#panel-toggle").click()
    page.locator("#key-toggle").click()
    assert violations(page) == []
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(overflow) == 0
    outside = """[...document.querySelectorAll('body *')].filter(e => e.checkVisibility() && !e.closest('.sr, .skip, svg')
      && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"""
    assert page.evaluate(outside) == []
    if shots := os.environ.get("LATTE_SCREENSHOTS"):
        page.screenshot(path=f"{shots}/{scheme}-{width}.png")


def test_colours(server, tabs):
    back = "getComputedStyle(document.body).backgroundColor"
    light = tabs.open(server.url + "/", color_scheme="light")
    dark = tabs.open(server.url + "/", color_scheme="dark")
    by_system = light.evaluate(back), dark.evaluate(back)
    assert by_system[0] != by_system[1]
    light.locator("#theme").click()  # light
    assert light.evaluate(back) == by_system[0]
    light.locator("#theme").click()  # dark
    assert light.evaluate(back) == by_system[1]
    light.reload()
    assert light.evaluate(back) == by_system[1]
    light.locator("#theme").click()
    expect(light.locator("#theme")).to_have_text("Colours: system")
    assert light.evaluate(back) == by_system[0]


def test_keyboard_alone(server, tabs):
    page = tabs.open(server.url + "/")
    seen = []
    for _ in range(40):
        page.keyboard.press("Tab")
        what = page.evaluate("document.activeElement.id || document.activeElement.className || document.activeElement.tagName")
        seen.append(what)
        if what == "prompt":
            break
    assert seen[0] == "skip"
    order = [x for x in seen if x in ("model", "key-toggle", "theme", "mode-chat", "new", "log", "prompt")]
    assert order == ["model", "key-toggle", "theme", "mode-chat", "new", "log", "prompt"]
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    set_field(page, "max_tokens", 8)
    page.locator("#prompt").focus()
    page.keyboard.type("Hello")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".turn")
    finished(page)
    assert len(texts(page)) == 1
    assert "Answer of" in page.locator("#status").inner_text()
    # What is said aloud is not each token.
    assert page.locator("#log").get_attribute("aria-live") is None
