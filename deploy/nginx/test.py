#!/usr/bin/env python3
"""Debian's nginx with deploy/nginx/latte.conf in front of a real latte-server, on the loopback.

usage: test.py BINARY MODEL

Nothing here measures time: that events are not held back shows in that the server is still at
work, as its own metrics say, when their first ones have come through nginx.
"""
import http.client
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time

PATIENCE_S = 120
CONF = pathlib.Path(__file__).with_name("latte.conf")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(condition, what):
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"{what} did not come true in {PATIENCE_S} s")
        time.sleep(0.1)


def can_connect(port):
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


class Site:
    """The server, nginx, and requests to either."""

    def __init__(self, binary, model):
        self.scratch = pathlib.Path(tempfile.mkdtemp())
        self.port, self.http_port, self.https_port = free_port(), free_port(), free_port()
        self.log = open(self.scratch / "server.log", "w", encoding="utf-8")
        self.server = subprocess.Popen(
            [binary, "--model", model, "--port", str(self.port), "--max-body-mb", "1",
             "--open-admin"], stdout=self.log, stderr=self.log)
        try:
            self.start_nginx()
            wait_for(lambda: can_connect(self.port) and self.ask("GET", "/health/ready",
                                                                 direct=True)[0] == 200, "ready")
        except BaseException:
            self.close()
            raise

    def start_nginx(self):
        where = self.scratch
        self.certificate = where / "cert.pem"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
             "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext",
             "subjectAltName=IP:127.0.0.1", "-keyout", where / "key.pem", "-out",
             self.certificate], check=True, capture_output=True)
        text = CONF.read_text(encoding="utf-8")
        for found, put in [
            (r"server 127\.0\.0\.1:8080;", f"server 127.0.0.1:{self.port};"),
            (r"listen 80;", f"listen 127.0.0.1:{self.http_port};"),
            (r"listen 443 ssl http2;", f"listen 127.0.0.1:{self.https_port} ssl http2;"),
            (r"listen \[::\]:.*\n", ""),
            (r"/etc/ssl/latte/fullchain\.pem", str(self.certificate)),
            (r"/etc/ssl/latte/privkey\.pem", str(where / "key.pem")),
            (r"/var/log/nginx/latte\.log", str(where / "nginx-access.log")),
        ]:
            text, n = re.subn(found, put, text)
            assert n, f"latte.conf has no {found}"
        (where / "latte.conf").write_text(text, encoding="utf-8")
        temporary = "".join(
            f"    {kind}_temp_path {where}/{kind};\n"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        user = "user root;\n" if os.geteuid() == 0 else ""
        (where / "nginx.conf").write_text(
            f"{user}daemon off;\nmaster_process off;\npid {where}/pid;\n"
            f"error_log {where}/nginx-error.log;\nevents {{}}\nhttp {{\n{temporary}"
            f"    access_log off;\n    include {where}/latte.conf;\n}}\n", encoding="utf-8")
        nginx = shutil.which("nginx") or "/usr/sbin/nginx"
        command = [nginx, "-p", where, "-e", where / "nginx-error.log", "-c", where / "nginx.conf"]
        subprocess.run([*command, "-t", "-q"], check=True)
        self.nginx = subprocess.Popen(command)
        wait_for(lambda: can_connect(self.https_port), "nginx")

    def connect(self, direct=False):
        if direct:
            return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        trust = ssl.create_default_context(cafile=self.certificate)
        return http.client.HTTPSConnection("127.0.0.1", self.https_port, timeout=PATIENCE_S,
                                           context=trust)

    def ask(self, method, path, body=None, headers=None, direct=False):
        """Status, headers, body."""
        connection = self.connect(direct)
        try:
            if isinstance(body, dict):
                body = json.dumps(body)
                headers = {"Content-Type": "application/json", **(headers or {})}
            try:
                connection.request(method, path, body, headers or {})
            except (BrokenPipeError, ConnectionResetError):
                pass  # refused before all of it was sent; the reply says why
            reply = connection.getresponse()
            return reply.status, reply.headers, reply.read()
        finally:
            connection.close()

    def metric(self, name):
        text = self.ask("GET", "/metrics", direct=True)[2].decode()
        return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.M)[1])

    def stream(self, n_tokens, headers=None):
        """A reply whose events are there to be read."""
        connection = self.connect()
        connection.request("POST", "/v1/completions", json.dumps(
            {"prompt": "Once upon a time", "max_tokens": n_tokens, "stream": True,
             "ignore_eos": True}), {"Content-Type": "application/json", **(headers or {})})
        reply = connection.getresponse()
        assert reply.status == 200, reply.read()
        return connection, reply

    def stop_server(self):
        self.server.send_signal(signal.SIGTERM)
        assert self.server.wait(PATIENCE_S) == 0

    def close(self):
        for process in (getattr(self, "nginx", None), self.server):
            if process and process.poll() is None:
                process.terminate()
                process.wait(PATIENCE_S)
        self.log.close()
        shutil.rmtree(self.scratch)


def next_event(reply):
    while True:
        line = reply.readline()
        if line.startswith(b"data: ") or not line:
            return line


# The tests, in this order.


def test_events_come_one_by_one(site):
    connection, reply = site.stream(250)
    before = site.metric("latte_generation_tokens_total")
    for _ in range(2):
        assert next_event(reply)
    # The server is not done with what nginx has passed on the beginning of.
    assert site.metric("latte_requests_running") == 1, "the first events came when all was over"
    n = 2
    while (line := next_event(reply)) and line.strip() != b"data: [DONE]":
        n += 1
    assert line, "the stream has no end"
    assert n > 20, f"{n} events"
    assert site.metric("latte_generation_tokens_total") > before
    assert reply.headers["X-Accel-Buffering"] is None, "an instruction to nginx went out"
    connection.close()


def test_a_disconnect_frees_the_job(site):
    before = site.metric("latte_client_disconnects_total")
    connection, reply = site.stream(900000)
    next_event(reply)
    assert site.metric("latte_requests_running") == 1
    reply.close()
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    wait_for(lambda: site.metric("latte_client_disconnects_total") == before + 1, "disconnect")
    wait_for(lambda: site.metric("latte_requests_running") == 0, "no job")


def test_a_large_state_passes_both_ways(site):
    session = {}
    for name in ("from", "to"):
        code, _, body = site.ask("POST", "/v1/sessions", {})
        assert code in (200, 201), body
        session[name] = json.loads(body)["id"]
    code, _, body = site.ask("POST", "/v1/completions", {
        "prompt": "Once upon a time", "max_tokens": 4, "session_id": session["from"]})
    assert code == 200, body
    code, _, state = site.ask("GET", f"/v1/sessions/{session['from']}/state")
    assert code == 200, state[:300]
    assert len(state) > 1 << 20, f"a state of {len(state)} bytes shows nothing"
    code, _, body = site.ask("PUT", f"/v1/sessions/{session['to']}/state", state,
                             {"Content-Type": "application/octet-stream"})
    assert code in (200, 201), (code, body[:300])
    positions = [json.loads(site.ask("GET", f"/v1/sessions/{s}")[2])["position"]
                 for s in session.values()]
    assert positions[0] == positions[1] > 4, positions


def test_errors_are_the_servers(site):
    big = json.dumps({"prompt": "x" * (3 << 20)})
    cases = [("GET", "/v1/nothing", None), ("POST", "/v1/models", "{}"),
             ("POST", "/v1/completions", "{"), ("POST", "/tokenize", big)]
    codes = []
    for method, path, body in cases:
        headers = {"Content-Type": "application/json"} if body else {}
        mine = site.ask(method, path, body, headers)
        its = site.ask(method, path, body, headers, direct=True)
        assert (mine[0], mine[2]) == (its[0], its[2]), (mine, its)
        assert "error" in json.loads(mine[2])
        codes.append(mine[0])
    assert codes == [404, 405, 400, 413], codes


def test_connections_are_kept(site):
    before = site.metric("latte_connections_total")
    for _ in range(10):
        assert site.ask("GET", "/v1/models")[0] == 200
    opened = site.metric("latte_connections_total") - before - 1  # that which asks
    assert opened <= 3, f"{opened} connections for 10 requests"


def test_logs_can_be_joined(site):
    assert site.ask("GET", "/v1/models", headers={"X-Request-Id": "mine-1234"})[1][
        "X-Request-Id"] == "mine-1234"
    made = site.ask("GET", "/v1/models")[1]["X-Request-Id"]
    for request_id in ("mine-1234", made):
        def access():
            lines = (site.scratch / "nginx-access.log").read_text().splitlines()
            return [line for line in lines if line.endswith(" " + request_id)]

        wait_for(access, f"a line with {request_id}")  # written after the reply
        assert len(access()) == 1 and access()[0].startswith("127.0.0.1 "), access()
        assert f'"{request_id}"' in (site.scratch / "server.log").read_text()


def test_metrics_for_the_loopback_and_redirect(site):
    assert b"latte_connections" in site.ask("GET", "/metrics")[2]
    connection = http.client.HTTPConnection("127.0.0.1", site.http_port, timeout=PATIENCE_S)
    connection.request("POST", "/v1/completions?a=b", "{}", {"Host": "llm.example"})
    reply = connection.getresponse()
    assert reply.status == 308
    assert reply.headers["Location"] == "https://llm.example/v1/completions?a=b"
    connection.close()


def test_http_2(site):
    done = subprocess.run(
        ["curl", "-sN", "--noproxy", "*", "--http2", "--cacert", site.certificate, "-w",
         "\n%{http_version}", f"https://127.0.0.1:{site.https_port}/v1/completions", "-d",
         '{"prompt":"a","max_tokens":5,"stream":true}'], capture_output=True, text=True,
        timeout=PATIENCE_S, check=True)
    assert done.stdout.endswith("data: [DONE]\n\n\n2"), done.stdout[-200:]


def test_a_stopped_server_is_told_of(site):
    site.stop_server()
    code, headers, body = site.ask("GET", "/v1/models")
    assert code == 503 and headers["Content-Type"] == "application/json", (code, body)
    assert headers["Retry-After"] == "5"
    assert json.loads(body)["error"]["code"] == "server_unreachable"


def main():
    binary, model = sys.argv[1:]
    passed = failed = 0
    site = Site(binary, model)
    try:
        for name, test in list(globals().items()):
            if not name.startswith("test_"):
                continue
            try:
                test(site)
                passed += 1
                print("ok      " + name[5:].replace("_", " "), flush=True)
            except (AssertionError, OSError, http.client.HTTPException, KeyError, TypeError,
                    subprocess.SubprocessError, ValueError) as error:
                failed += 1
                print(f"FAILED  {name[5:].replace('_', ' ')}: {type(error).__name__}: {error}",
                      flush=True)
        if failed:
            print((site.scratch / "nginx-error.log").read_text()[-3000:])
    finally:
        site.close()
    print(f"{passed} passed, {failed} failed")
    sys.exit(1 if failed or not passed else 0)


main()
