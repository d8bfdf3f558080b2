"""aiperf as the load generator: its report against the server's /metrics and latte-bench's."""
import json
import os
import subprocess
import sys

import pytest

from server import MODEL_DIR, program

TOKENIZER = "latte/latte-12m"
N_REQUESTS, CONCURRENCY, PROMPT_TOKENS, OUTPUT_TOKENS = 24, 2, 48, 16


def hub_cache(directory):
    """A cache of Hugging Face's hub with the tokenizer under TOKENIZER: offline, as it is here,
    aiperf looks for a tokenizer nowhere else, not even at a path."""
    commit = "0" * 40
    repository = directory / "hub" / f"models--{TOKENIZER.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for name in "config.json", "tokenizer.json", "tokenizer_config.json":
        (snapshot / name).symlink_to(MODEL_DIR / name)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return directory


@pytest.fixture(scope="module")
def measured(server, name, tmp_path_factory):
    """aiperf's report, and what the metrics rose by meanwhile."""
    directory = tmp_path_factory.mktemp("aiperf")
    before = server.metrics()
    done = subprocess.run(
        [sys.executable, "-m", "aiperf", "profile", "--model", name, "--url", server.url,
         "--endpoint-type", "completions", "--streaming", "--tokenizer", TOKENIZER,
         "--concurrency", str(CONCURRENCY), "--request-count", str(N_REQUESTS),
         "--isl", str(PROMPT_TOKENS), "--osl", str(OUTPUT_TOKENS),
         "--extra-inputs", "ignore_eos:true", "--random-seed", "1", "--workers-max", "1",
         "--record-processors", "1", "--no-server-metrics", "--no-gpu-telemetry", "--ui-type",
         "none", "--artifact-dir", str(directory)],
        cwd=directory, capture_output=True, text=True,
        env={**os.environ, "HOME": str(directory), "HF_HOME": str(hub_cache(directory))},
        timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    report = json.loads(next(directory.rglob("profile_export_aiperf.json")).read_text())
    return report, server.metrics().since(before)


def test_requests_and_tokens(measured):
    report, metrics = measured
    assert report["request_count"]["avg"] == N_REQUESTS
    assert metrics.total("latte_http_requests_total", route="/v1/completions") == N_REQUESTS
    assert metrics.total("latte_request_success_total") == N_REQUESTS
    assert metrics.total("latte_generation_tokens_total") == N_REQUESTS * OUTPUT_TOKENS
    # aiperf tokenizes the pieces' text again, where two tokens may have become one.
    assert report["output_sequence_length"]["avg"] == pytest.approx(OUTPUT_TOKENS, rel=0.1)
    prompt = metrics.total("latte_prompt_tokens_total") / N_REQUESTS
    assert report["input_sequence_length"]["avg"] == pytest.approx(prompt, abs=1.5)


def test_latencies(measured):
    """A client sees what the server sees, and its own way to it and back on the same machine."""
    report, metrics = measured
    for ours, theirs in (("latte_time_to_first_token_seconds", "time_to_first_token"),
                         ("latte_e2e_request_latency_seconds", "request_latency")):
        served, seen = metrics.mean(ours) * 1e3, report[theirs]["avg"]
        assert served * 0.9 <= seen <= served * 1.5 + 100, (ours, served, seen)
    served = metrics.mean("latte_time_per_output_token_seconds") * 1e3
    assert report["inter_token_latency"]["avg"] == pytest.approx(served, rel=0.35, abs=3)


def test_our_own_tool_agrees(measured, server):
    """latte-bench with the same load on the same server: within a factor of two of aiperf."""
    report, _ = measured
    before = server.metrics()
    done = subprocess.run(
        [program("latte-bench"), "serve", "--url", server.url, "--streams",
         str(CONCURRENCY), "--rounds", str(N_REQUESTS // CONCURRENCY), "--prompt-tokens",
         str(PROMPT_TOKENS), "--max-tokens", str(OUTPUT_TOKENS), "--json"],
        capture_output=True, text=True, timeout=600, check=True)
    ours = json.loads([x for x in done.stdout.splitlines() if '"kind":"serve"' in x][-1])
    rise = server.metrics().since(before)
    assert ours["failed"] == 0 and ours["requests"] >= N_REQUESTS
    assert rise.total("latte_generation_tokens_total") >= ours["requests"] * OUTPUT_TOKENS
    ratio = ours["tokens_per_second"] / report["output_token_throughput"]["avg"]
    assert 0.5 < ratio < 4, ratio  # aiperf's own processes take a share of the cores
