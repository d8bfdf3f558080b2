#!/usr/bin/env python3
"""What Prometheus and the dashboard say about a server under load, against what its client saw.

    metrics_test.py SERVER MODEL      (make metrics-test)

Debian's Prometheus scrapes a server on loopback every second, with the configuration and rules of
deploy/prometheus. The load is small and its counts are known, so they are compared exactly;
latencies are compared with those that the client took: the server's cannot be longer, and what
lies between is the way through a loopback connection. Needs nothing but Python and Prometheus.
"""
import concurrent.futures
import datetime
import json
import math
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
SLOTS, QUEUE, HOST_STATE_MB, N_SESSIONS = 4, 6, 64, 20
COMPLETIONS, CHAT, SESSIONS = "/v1/completions", "/v1/chat/completions", "/v1/sessions"
WINDOW = "3m"  # of rates: everything that happens here lies within
# Prometheus extends increases to the edges of their window, by up to half a scrape each.
EXTRAPOLATED = 0.15

passed = failed = 0


def check(name, good, detail=""):
    global passed, failed
    if good:
        passed += 1
    else:
        failed += 1
    print(f"{'ok    ' if good else 'FAILED'} {name}{'' if good or detail == '' else f': {detail}'}", flush=True)


def check_equal(name, found, expected):
    check(name, found == expected, f"found {found}, expected {expected}")


# ---- programs ----------------------------------------------------------------------------------


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def await_true(what, condition, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.2)
    raise SystemExit(f"{what}: not after {seconds} s")


def answers(url):
    try:
        with urllib.request.urlopen(url, timeout=5) as r:
            return r.status == 200
    except OSError:
        return False


def start_server(program, model, folder):
    log = open(folder / "server.log", "w+")
    process = subprocess.Popen(
        [program, "--model", model, "--port", "0", "--max-slots", str(SLOTS), "--max-queue", str(QUEUE),
         "--store", folder / "store", "--host-state-mb", str(HOST_STATE_MB), "--prefix-cache-mb", "8"],
        stdout=log, stderr=log)

    def url():
        found = re.search(r"http://127\.0\.0\.1:\d+", (folder / "server.log").read_text())
        return found and found.group()

    await_true("the server's port", url)
    await_true("/health/ready", lambda: answers(url() + "/health/ready"), 120)
    return process, url()


def start_prometheus(target, folder):
    """With the shipped configuration; only the address and the intervals are the test's."""
    text = (DEPLOY / "prometheus/prometheus.yml").read_text()
    text, n_targets = re.subn(r'targets: \["[a-z-]+:8080"\]', f'targets: ["{target}"]', text)
    text, n_intervals = re.subn(r"_interval: 15s", "_interval: 1s", text)
    check("prometheus.yml has one target and two intervals", (n_targets, n_intervals) == (1, 2))
    (folder / "prometheus.yml").write_text(text)
    (folder / "alerts.yml").write_text((DEPLOY / "prometheus/alerts.yml").read_text())
    port = free_port()
    log = open(folder / "prometheus.log", "w")
    process = subprocess.Popen(
        ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb",
         f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    await_true("prometheus", lambda: answers(url + "/-/ready"))
    return process, url


def promtool(name, *arguments, **options):
    r = subprocess.run(["promtool", *map(str, arguments)], text=True, capture_output=True, **options)
    check(name, r.returncode == 0 and not r.stderr, r.stdout + r.stderr)


# ---- the client --------------------------------------------------------------------------------


class Client:
    """Sends requests and keeps books: answers by route and status, tokens, times."""

    def __init__(self, url):
        self.url = url
        self.lock = threading.Lock()
        self.answers = {}
        self.prompt_tokens = self.output_tokens = self.n_choices = self.n_gaps = self.n_turns = 0
        self.first_token_s, self.gap_s, self.stream_s = [], [], 0.0
        self.finishes = {}

    def count(self, route, code):
        with self.lock:
            self.answers[route, code] = self.answers.get((route, code), 0) + 1

    def send(self, method, path, body=None, route=None):
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as r:
                code, text = r.status, r.read()
        except urllib.error.HTTPError as e:
            code, text = e.code, e.read()
        self.count(route or path, code)
        return code, json.loads(text)

    def count_usage(self, usage, finishes):
        with self.lock:
            self.prompt_tokens += usage["prompt_tokens"]
            self.output_tokens += usage["completion_tokens"]
            self.n_gaps += usage["completion_tokens"] - len(finishes)
            self.n_choices += len(finishes)
            for f in finishes:
                self.finishes[f] = self.finishes.get(f, 0) + 1

    def whole(self, path, body):
        code, reply = self.send("POST", path, body)
        assert code == 200, reply
        self.count_usage(reply["usage"], [c["finish_reason"] for c in reply["choices"]])
        return reply

    def stream(self, body):
        """A streamed completion: times its first token, and those after it."""
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        start = time.monotonic()
        first = last = None
        usage, finishes = None, []
        request = urllib.request.Request(self.url + COMPLETIONS, json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=120) as r:
            for line in r:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                usage = event.get("usage") or usage
                if event["choices"]:
                    last = time.monotonic()
                    first = first or last
                    finishes += [c["finish_reason"] for c in event["choices"] if c["finish_reason"]]
        self.count(COMPLETIONS, 200)
        self.count_usage(usage, finishes)
        with self.lock:
            self.first_token_s.append(first - start)
            self.stream_s += last - first
            self.gap_s.append((last - first) / (usage["completion_tokens"] - 1))

    def open_stream(self, body):
        """An endless stream, read until the socket that is returned is shut down."""
        at = urllib.parse.urlsplit(self.url)
        data = json.dumps({**body, "stream": True})
        s = socket.create_connection((at.hostname, at.port))
        s.sendall(f"POST {COMPLETIONS} HTTP/1.1\r\nHost: {at.netloc}\r\nContent-Length: {len(data)}\r\n\r\n{data}".encode())

        def read():
            while s.recv(65536):
                pass

        threading.Thread(target=read, daemon=True).start()
        return s


def stream_all(client):
    """Sixteen completions of known lengths, eight at a time."""
    def one(i):
        client.stream({"prompt": f"Once upon a time, {i} cats", "max_tokens": 24 + i, "ignore_eos": True,
                       "seed": i})

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(16)))


def generate(client):
    """Chats, and n choices that share one reading of their prompt."""
    for i in range(4):
        client.whole(CHAT, {"messages": [{"role": "user", "content": f"Hello {i}"}], "max_tokens": 8,
                            "ignore_eos": True})
    client.whole(COMPLETIONS, {"prompt": "The sea was", "n": 3, "max_tokens": 5, "ignore_eos": True})


def use_sessions(client):
    ids = []
    for i in range(N_SESSIONS):
        code, reply = client.send("POST", SESSIONS, {})
        assert code in (200, 201), reply
        ids.append(reply["id"])
        for _ in range(2 if i < 5 else 1):
            client.whole(COMPLETIONS, {"session_id": ids[-1], "prompt": "The sea", "max_tokens": 4,
                                       "ignore_eos": True})
            client.n_turns += 1
    code, _ = client.send("DELETE", f"{SESSIONS}/{ids.pop()}", route=f"{SESSIONS}/{{id}}")
    assert code in (200, 204)
    return ids


def make_errors(client):
    for body in (b"{", b"[]", b'{"prompt": 1e400}'):
        assert client.send("POST", COMPLETIONS, body)[0] == 400
    for _ in range(2):
        client.send("GET", f"{SESSIONS}/sess_00000000000000000000000000000000", route=f"{SESSIONS}/{{id}}")
    assert client.send("GET", "/nowhere", route="other")[0] == 404


# ---- Prometheus --------------------------------------------------------------------------------


class Prometheus:
    def __init__(self, url):
        self.url = url

    def get(self, path, **query):
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=20) as r:
                return json.load(r)["data"]
        except urllib.error.HTTPError as e:
            raise SystemExit(f"{query}: {e.read().decode()}")

    def vector(self, expression):
        result = self.get("query", query=expression)
        assert result["resultType"] == "vector", expression
        return [(s["metric"], float(s["value"][1])) for s in result["result"]]

    def value(self, expression):
        samples = self.vector(expression)
        return samples[0][1] if len(samples) == 1 else math.nan

    def await_scrape(self):
        """Until a scrape that began after now is there, and queries see it."""
        start = time.time()
        await_true("a scrape", lambda: self.value("timestamp(latte_ready)") > start)

    def await_rules(self):
        """Until the rules were evaluated on what has been scraped by now."""
        start = time.time()

        def last():
            group = self.get("rules")["groups"][0]["lastEvaluation"]
            return datetime.datetime.fromisoformat(group[:19] + "+00:00").timestamp() > start

        await_true("an evaluation", last)

    def by(self, label, expression):
        return {m.get(label): v for m, v in self.vector(expression)}


def check_counts(prom, client):
    found = {(m["route"], int(m["code"])): v for m, v in prom.vector(
        'sum by (route, code) (latte_http_requests_total{route!~"/metrics|/health.*"})')}
    check_equal("answers by route and status are the client's", found, client.answers)
    routes = {}
    for (route, _), n in client.answers.items():
        routes[route] = routes.get(route, 0) + n
    found = prom.by("route", 'latte_http_request_duration_seconds_count{route!~"/metrics|/health.*"}')
    check_equal("durations by route: as many as requests", found, routes)
    for metric, expected in (
        ("latte_prompt_tokens_total", client.prompt_tokens),
        ("latte_generation_tokens_total", client.output_tokens),
        ("latte_request_generation_tokens_sum", client.output_tokens),
        ("latte_session_turns_total", client.n_turns),
        ("latte_e2e_request_latency_seconds_count", client.n_choices),
        ("latte_time_to_first_token_seconds_count", client.n_choices),
        ("latte_request_queue_time_seconds_count", client.n_choices),
        ("latte_inter_token_latency_seconds_count", client.n_gaps),
        ("latte_queue_rejections_total", 0),
    ):
        check_equal(f"{metric} is the client's", prom.value(metric), expected)
    found = {k: v for k, v in prom.by("finish_reason", "latte_request_success_total").items() if v}
    check_equal("choices by finish_reason are the client's", found, client.finishes)
    increase = prom.value(f"increase(latte_generation_tokens_total[{WINDOW}])")
    check("tokens/s over the time is what the client got",
          abs(increase - client.output_tokens) <= EXTRAPOLATED * client.output_tokens,
          f"found {increase}, expected about {client.output_tokens}")


def quantile(values, q):
    values = sorted(values)
    return values[min(len(values) - 1, int(q * len(values)))]


def bucket_below(prom, metric, value):
    """The lower bound of the bucket that a quantile lies in."""
    bounds = sorted(float(le) for le in prom.by("le", f"{metric}_bucket"))
    return max([b for b in bounds if b < value * (1 - 1e-9)], default=0)


def check_latencies(prom, client):
    """Only streams have passed so far, so both sides speak of the same choices."""
    for metric, seen in (("latte_time_to_first_token_seconds", client.first_token_s),
                         ("latte_time_per_output_token_seconds", client.gap_s)):
        for q in (0.5, 0.9):
            found = prom.value(f"histogram_quantile({q}, sum by (le) (rate({metric}_bucket[{WINDOW}])))")
            low, client_q = bucket_below(prom, metric, found), quantile(seen, q)
            # A gap may look shorter to the client, when events wait for each other on their way.
            slack = 1.25 if "per_output" in metric else 1
            check(f"{metric} p{q * 100:g} is plausible",
                  found > 0 and low <= client_q * slack + 1e-3, f"server {found} (above {low}), client {client_q}")
        mean = prom.value(f"rate({metric}_sum[{WINDOW}]) / rate({metric}_count[{WINDOW}])")
        seen_mean = sum(seen) / len(seen)
        print(f"       {metric}: mean {mean * 1e3:.1f} ms, the client's {seen_mean * 1e3:.1f} ms")
        check(f"{metric}: its mean is near the client's",
              seen_mean * 0.5 - 0.005 <= mean <= seen_mean * 1.25 + 0.005, f"server {mean}, client {seen_mean}")
    gaps = prom.value("latte_inter_token_latency_seconds_sum")
    check("inter-token latencies add up to the streams' time",
          0.5 * client.stream_s <= gaps <= 1.25 * client.stream_s + 0.1, f"server {gaps}, client {client.stream_s}")


def check_sessions(prom, client, ids):
    tiers, sizes = {"device": 0, "host": 0, "store": 0}, set()
    for i in ids:
        _, session = client.send("GET", f"{SESSIONS}/{i}", route=f"{SESSIONS}/{{id}}")
        tiers[session["tier"]] += 1
        sizes.add(session["state_bytes"])
    check_equal("sessions by tier are what the API says", prom.by("tier", "latte_sessions_by_tier"), tiers)
    check("some are on the host and some in the store only", tiers["host"] and tiers["store"], tiers)
    check_equal("latte_sessions", prom.value("latte_sessions"), len(ids))
    least, most = (prom.value(f"{f}_over_time(latte_state_bytes_per_slot[{WINDOW}])") for f in ("min", "max"))
    check("state_bytes was constant", least == most > 0, f"{least} to {most}")
    check("all sessions have one state_bytes, that of a slot and a header",
          len(sizes) == 1 and 0 <= sizes.pop() - most < 65536, f"{sizes}, slot {most}")
    check("memory of states stays within --host-state-mb",
          0 < prom.value(f"max_over_time(latte_session_state_bytes[{WINDOW}])") <= HOST_STATE_MB << 20)
    for name, limit in (("requests_waiting", QUEUE), ("session_state_bytes", HOST_STATE_MB << 20)):
        check_equal(f"latte_{name}_limit is the option's", prom.value(f"latte_{name}_limit"), limit)


def check_overload(prom, client):
    """Two requests of five endless choices fill 4 slots and 6 places; more get 429."""
    open_streams = [client.open_stream({"prompt": "Once", "n": 5, "max_tokens": 100000, "ignore_eos": True})
                    for _ in range(2)]
    prom.await_scrape()
    await_true("ten choices", lambda: prom.value("latte_requests_running + latte_requests_waiting") == 10)
    for _ in range(3):
        code, _ = client.send("POST", COMPLETIONS, {"prompt": "Once", "max_tokens": 4})
        check_equal("a request beyond the queue gets 429", code, 429)
    prom.await_scrape()
    check_equal("latte_requests_running is the slots", prom.value("latte_requests_running"), SLOTS)
    check_equal("latte_requests_waiting is the rest", prom.value("latte_requests_waiting"), QUEUE)
    prom.await_rules()
    check_equal("the recorded use of the queue is 1", prom.value("instance:latte_queue_usage:ratio"), 1)
    alerts = {a["labels"]["alertname"]: a["state"] for a in prom.get("alerts")["alerts"]}
    check_equal("the alert for the queue is pending", alerts.get("LatteQueueFilling"), "pending")
    for s in open_streams:
        s.shutdown(socket.SHUT_RDWR)
    await_true("the slots are free", lambda: prom.value("latte_requests_running") == 0)
    prom.await_scrape()
    check_equal("choices that were left count as abort",
                prom.value('latte_request_success_total{finish_reason="abort"}'), 10)
    check_equal("latte_client_disconnects_total", prom.value("latte_client_disconnects_total"), 2)
    check_equal("latte_queue_rejections_total", prom.value("latte_queue_rejections_total"), 3)
    check_equal("429s of the route",
                prom.value(f'latte_http_requests_total{{route="{COMPLETIONS}",code="429"}}'), 3)
    check_equal("nothing waits any more", prom.value("latte_requests_waiting + latte_requests_running"), 0)


# ---- the dashboard -----------------------------------------------------------------------------


def panels_of(dashboard):
    for p in dashboard["panels"]:
        yield p
        yield from p.get("panels", [])


def check_dashboard(prom, dashboard):
    variables = {v["name"]: v for v in dashboard["templating"]["list"]}
    values = {"__rate_interval": WINDOW, "datasource": "prometheus"}
    for name in ("job", "instance"):
        # As Grafana fills them: label_values(selector, label), with the variables so far.
        found = re.fullmatch(r"label_values\((.+), (\w+)\)", variables[name]["query"]["query"])
        selector = found[1].replace("$job", values.get("job", ""))
        labels = prom.by(found[2], f"count by ({found[2]}) ({selector})")
        check(f"the dashboard's variable {name} has a value", len(labels) == 1, labels)
        values[name] = next(iter(labels), "")
    ids = [p["id"] for p in panels_of(dashboard)]
    check("panels have ids of their own", len(ids) == len(set(ids)))
    n, silent = 0, []
    for p in panels_of(dashboard):
        for target in p.get("targets", []):
            n += 1
            expression = re.sub(r"\$(\w+)", lambda m: values[m[1]], target["expr"])
            samples = prom.vector(expression)
            if not any(math.isfinite(v) for _, v in samples):
                silent.append(f"{p['title']}: {expression} gives {samples}")
            if target["datasource"]["uid"] != "${datasource}":
                silent.append(f"{p['title']}: a data source of its own")
    check(f"each of the dashboard's {n} queries returns data", n > 40 and not silent, "\n  ".join(silent))


def check_provisioning(dashboard):
    source = (DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text()
    current = next(v for v in dashboard["templating"]["list"] if v["name"] == "datasource")["current"]
    check("the dashboard's data source is the provisioned one", f"uid: {current['value']}\n" in source)
    check("Grafana's interval is Prometheus's",
          "timeInterval: 15s" in source and "scrape_interval: 15s" in (DEPLOY / "prometheus/prometheus.yml").read_text())


def check_table(text):
    """deploy/prometheus/README.md has every metric of the server, and no other."""
    names = set(re.findall(r"^# TYPE (\S+) ", text, re.M))
    rows = r"^\| `([a-z0-9_]+)`[^|]*\| (?:counter|gauge|histogram) \|"
    table = set(re.findall(rows, (DEPLOY / "prometheus/README.md").read_text(), re.M))
    check("the README's table names every metric", names == table, f"only one has {sorted(names ^ table)}")


# ---- all ---------------------------------------------------------------------------------------


def check_rules(prom):
    wrong = [(r["name"], r.get("lastError")) for g in prom.get("rules")["groups"] for r in g["rules"]
             if r["health"] != "ok"]
    check("every rule is evaluated without an error", not wrong, wrong)
    for r in (r for g in prom.get("rules", type="record")["groups"] for r in g["rules"]):
        check(f"{r['name']} is recorded", math.isfinite(prom.value(r["name"])))
    firing = [a["labels"]["alertname"] for a in prom.get("alerts")["alerts"] if a["state"] == "firing"]
    check("no alert fires on a server that is well", not firing, firing)


def check_files():
    rules = DEPLOY / "prometheus"
    promtool("promtool check config", "check", "config", rules / "prometheus.yml")
    promtool("promtool check rules", "check", "rules", rules / "alerts.yml")
    promtool("promtool test rules", "test", "rules", rules / "alerts_test.yml")
    alerts = set(re.findall(r"alert: (\w+)", (rules / "alerts.yml").read_text()))
    tested = set(re.findall(r"alertname: (\w+)\n +exp_alerts", (rules / "alerts_test.yml").read_text()))
    check("each alert is seen firing in alerts_test.yml", alerts == tested, alerts ^ tested)


def check_all(server, url, folder):
    client = Client(url)
    dashboard = json.loads((DEPLOY / "grafana/dashboards/latte.json").read_text())
    prometheus, prom_url = start_prometheus(urllib.parse.urlsplit(url).netloc, folder)
    try:
        prom = Prometheus(prom_url)
        await_true("the first scrape", lambda: prom.vector("latte_ready == 1"))
        prom.await_scrape()  # zeros are there before anything is counted
        stream_all(client)
        prom.await_scrape()
        check_latencies(prom, client)
        generate(client)
        ids = use_sessions(client)
        make_errors(client)
        prom.await_scrape()
        check_counts(prom, client)
        check_sessions(prom, client, ids)
        check_overload(prom, client)
        check_dashboard(prom, dashboard)
        check_rules(prom)
        with urllib.request.urlopen(url + "/metrics") as r:
            text = r.read().decode()
        promtool("promtool check metrics has no complaint", "check", "metrics", input=text)
        check_provisioning(dashboard)
        check_table(text)
        server.terminate()
        check_equal("the server ends well", server.wait(60), 0)
        await_true("up is 0 then", lambda: prom.value('up{job="latte"}') == 0)
        prom.await_rules()
        check("and LatteDown is pending", any(a["labels"]["alertname"] == "LatteDown" for a in prom.get("alerts")["alerts"]))
    finally:
        prometheus.terminate()
        prometheus.wait(60)


def main():
    program, model = sys.argv[1:3]
    check_files()
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "build", prefix="metrics-test-") as name:
        folder = pathlib.Path(name)
        process = None
        try:
            process, url = start_server(program, model, folder)
            check_all(process, url, folder)
        finally:
            if process and process.poll() is None:
                process.kill()
                process.wait()
    print(f"{passed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
