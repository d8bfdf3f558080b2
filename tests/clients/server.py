"""latte-server as a process of its own on a free loopback port, and what its /metrics say."""
import json
import os
import pathlib
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODEL_DIR = ROOT / "weights" / "latte-12m"
BUILD = pathlib.Path(os.environ.get("LATTE_BUILD", ROOT / "build" / "release"))
START_SECONDS = 300  # a machine may be shared
KEY, ADMIN_KEY = "test-key-of-a-user", "test-key-of-an-admin"


def program(name):
    """The path of one of the project's programs."""
    path = BUILD / name
    assert path.exists(), f"{path} is missing: run `make test-clients`"
    return str(path)


class Metrics(dict):
    """Sample (name with its labels) -> value."""

    def total(self, name, **labels):
        """The sum of a family's samples which have these labels."""
        wanted = [f'{k}="{v}"' for k, v in labels.items()]
        return sum(v for sample, v in self.items()
                   if sample.partition("{")[0] == name and all(w in sample for w in wanted))

    def mean(self, name):
        """Of what a histogram was given."""
        return self.total(name + "_sum") / self.total(name + "_count")

    def since(self, before):
        return Metrics({k: v - before.get(k, 0) for k, v in self.items()})


class Server:
    """Runs until close(). options are the server's flags, besides model, host and port."""

    def __init__(self, *options, directory):
        self.log_path = pathlib.Path(directory) / "server.log"
        self.log = open(self.log_path, "ab")
        self.process = subprocess.Popen(
            [program("latte-server"), "--model", str(MODEL_DIR), "--host", "127.0.0.1",
             "--port", "0", "--no-access-log", "--drain-timeout", "5", *options],
            stdout=subprocess.PIPE, stderr=self.log, text=True)
        line = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        if not found:
            self.close()
            raise AssertionError(f"no address in {line!r}: {self.log_path.read_text()}")
        self.url = found[0]
        self.base = self.url + "/v1"
        self.wait_until_ready()

    def wait_until_ready(self):
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log_path.read_text()
            try:
                urllib.request.urlopen(self.url + "/health/ready", timeout=10).close()
                return
            except urllib.error.HTTPError:
                time.sleep(0.2)  # loading
        raise AssertionError(f"not ready after {START_SECONDS} s")

    def get(self, path, key=None):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        request = urllib.request.Request(self.url + path, headers=headers)
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.read().decode()

    def model(self):
        return json.loads(self.get("/v1/models"))["data"][0]["id"]

    def metrics(self):
        samples = (line.rsplit(" ", 1) for line in self.get("/metrics").splitlines()
                   if line and not line.startswith("#"))
        return Metrics({name: float(value) for name, value in samples})

    def wait_for(self, condition, what, seconds=30):
        """Until condition(metrics) holds."""
        end = time.monotonic() + seconds
        while not condition(self.metrics()):
            assert time.monotonic() < end, f"after {seconds} s: not {what}"
            time.sleep(0.1)

    def close(self):
        """Stop it; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self.process.stdout.close()
        self.log.close()
        return code


def key_file(directory):
    """A file for --api-key-file with KEY and ADMIN_KEY."""
    path = pathlib.Path(directory) / "keys"
    path.write_text(f"{KEY}\n{ADMIN_KEY} admin\n")
    path.chmod(0o600)
    return str(path)
