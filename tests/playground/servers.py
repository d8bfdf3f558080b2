"""servers.py - latte-server in a test, a proxy that loses connections, and plain requests."""

import json
import os
import pathlib
import re
import select
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request

MODEL = pathlib.Path(os.environ.get("LATTE_MODEL", "weights/latte-12m"))
BINARY = os.environ["LATTE_SERVER"]


class Server:
    """The real binary on a free port. ready() waits until the model is loaded."""

    def __init__(self, *args, model=MODEL):
        self.dir = tempfile.mkdtemp(prefix="latte-playground-")
        self.log = open(os.path.join(self.dir, "log"), "w+b")
        env = {k: v for k, v in os.environ.items() if not k.startswith("LATTE_")}
        self.process = subprocess.Popen(
            [BINARY, "--model", str(model), "--port", "0", "--device", "cpu", *args],
            stdout=subprocess.PIPE, stderr=self.log, env=env)
        line = self.process.stdout.readline().decode()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        if not found:
            raise RuntimeError(f"the server did not start: {self.text()}")
        self.url = found.group(0)
        self.port = int(found.group(1))

    def text(self):
        self.log.flush()
        return pathlib.Path(self.log.name).read_text()

    def ready(self, timeout_s=180):
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            try:
                urllib.request.urlopen(self.url + "/health/ready", timeout=5).close()
                return self
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise RuntimeError(f"the server is not ready: {self.text()}")

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(40)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.log.close()
        shutil.rmtree(self.dir, ignore_errors=True)

    def raw(self, path, body=None, method=None, headers=None, key=None):
        """(status, headers, bytes); errors are answers as well."""
        headers = dict(headers or {})
        if key:
            headers["Authorization"] = f"Bearer {key}"
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers.setdefault("Content-Type", "application/json")
        request = urllib.request.Request(self.url + path, data=body, method=method, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                return reply.status, reply.headers, reply.read()
        except urllib.error.HTTPError as e:
            return e.code, e.headers, e.read()

    def json(self, path, body=None, **more):
        status, _, data = self.raw(path, body, **more)
        assert status == 200, (path, status, data)
        return json.loads(data)

    def session(self, session_id):
        return self.json(f"/v1/sessions/{session_id}")


class Proxy:
    """A TCP proxy on loopback. cut() breaks all connections; while refusing, new ones break at once.
    With cut_after a connection breaks by itself once so many bytes of an event stream have passed."""

    def __init__(self, port):
        self.target = port
        self.refusing = False
        self.cut_after = None
        self.n_cuts = 0
        self.pairs = set()
        self.lock = threading.Lock()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            if self.refusing:
                self._reset(client)
                continue
            threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    @staticmethod
    def _reset(sock):
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            sock.close()
        except OSError:
            pass

    def _carry(self, client):
        try:
            server = socket.create_connection(("127.0.0.1", self.target))
        except OSError:
            self._reset(client)
            return
        pair = (client, server)
        with self.lock:
            self.pairs.add(pair)
        streamed, is_stream = 0, False
        try:
            while True:
                for sock in select.select(pair, [], [], 60)[0]:
                    data = sock.recv(65536)
                    if not data:
                        return
                    if sock is server:
                        is_stream = is_stream or b"text/event-stream" in data
                        streamed += len(data) if is_stream else 0
                        if self.cut_after is not None and streamed > self.cut_after:
                            data, self.cut_after = data[: len(data) // 2], None  # amid an event
                            client.sendall(data)
                            self.n_cuts += 1
                            self._reset(client)
                            return
                    (client if sock is server else server).sendall(data)
        except OSError:
            pass
        finally:
            with self.lock:
                self.pairs.discard(pair)
            for sock in pair:
                sock.close()

    def cut(self):
        with self.lock:
            pairs = list(self.pairs)
        for client, server in pairs:
            self.n_cuts += 1
            for sock in (client, server):
                try:
                    sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass

    def close(self):
        self.listener.close()
        self.cut()


def model_without_template(directory):
    """The bundled model, but for its chat template."""
    for file in MODEL.iterdir():
        if file.name != "tokenizer_config.json":
            os.symlink(file.resolve(), os.path.join(directory, file.name))
    config = json.loads((MODEL / "tokenizer_config.json").read_text())
    del config["chat_template"]
    pathlib.Path(directory, "tokenizer_config.json").write_text(json.dumps(config))
    return directory
