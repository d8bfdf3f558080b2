"""Two models answer the same 40 prompts, side by side in one file.

    python chat.py --server ../../build/release/latte-server --out chat.md \\
        --model teacher=../../build/smollm2-teacher --model Macchiato=../../build/smollm2

Each model is served in turn and gets every conversation of chat-prompts.jsonl, its own answers
before the next question. Greedy decoding without a repetition penalty, 200 tokens at most; with
--sampled as a user gets it, by the model's generation_config.json, with a fixed seed.
Needs Python alone.
"""
import argparse
import concurrent.futures
import contextlib
import http.client
import json
import re
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

HERE = Path(__file__).parent
GREEDY = {"temperature": 0, "repetition_penalty": 1.0}
SAMPLED = {"seed": 1}
ANSWER_SECONDS = 600


def fetch(request, seconds):
    """The reply's JSON; a server that refuses, is silent or is gone ends the program with one sentence."""
    url = getattr(request, "full_url", request)
    try:
        with urllib.request.urlopen(request, timeout=seconds) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{url}: status {error.code}, {error.read(1000).decode(errors='replace').strip()}")
    except TimeoutError:
        raise SystemExit(f"{url} did not answer within {seconds} seconds")
    except (OSError, http.client.HTTPException, ValueError) as error:    # URLError is an OSError
        raise SystemExit(f"{url} did not answer: {getattr(error, 'reason', error)}")


def wait_until_ready(url, process, seconds=600):
    reason = None
    for _ in range(seconds):
        try:
            return urllib.request.urlopen(f"{url}/health/ready", timeout=10).close()
        except OSError as error:                # still loading: status 503, or too busy to say so
            reason = error
        if process.poll() is not None:
            raise SystemExit(f"{url}: the server ended with code {process.returncode} while it loaded")
        time.sleep(1)
    raise SystemExit(f"{url} was not ready after {seconds} seconds: {reason}")


@contextlib.contextmanager
def serving(server, directory, at_once):
    """The address of a server that ends with the block."""
    process = subprocess.Popen([server, "--model", str(directory), "--port", "0", "--max-slots", str(at_once),
                                "--prefix-cache-mb", "0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        line = next((line for line in process.stdout if "http://" in line), None)
        if line is None:
            raise SystemExit(f"{server} ended before it listened; it says why when it is started with --model {directory}")
        url = re.search(r"http://[^ \n]+", line)[0]
        wait_until_ready(url, process)
        yield url
    finally:
        process.terminate()
        process.wait()


def ask(url, messages, options):
    """(answer, whether it ended by itself, the server's fingerprint)"""
    body = {"messages": messages, **options}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    reply = fetch(request, ANSWER_SECONDS)
    choice = reply["choices"][0]
    return choice["message"]["content"], choice["finish_reason"] == "stop", reply["system_fingerprint"]


def converse(url, turns, options):
    """[(question, answer, ended)], and the fingerprint"""
    messages, out, fingerprint = [], [], ""
    for question in turns:
        messages.append({"role": "user", "content": question})
        answer, ended, fingerprint = ask(url, messages, options)
        messages.append({"role": "assistant", "content": answer})
        out.append((question, answer, ended))
    return out, fingerprint


def cell(text):
    """Text inside a Markdown table, as it is."""
    for mark, name in (("&", "&amp;"), ("<", "&lt;"), ("|", "&#124;"), ("*", "&#42;"), ("_", "&#95;"), ("`", "&#96;")):
        text = text.replace(mark, name)
    return text.strip().replace("\n", "<br>")


def answer_cell(answer, ended):
    return cell(answer) + ("" if ended else " **[cut]**")


def markdown(prompts, answers, fingerprints, way):
    names = list(answers)
    n_turns = sum(len(p["turns"]) for p in prompts)
    stopped = {name: sum(ended for talk in talks for _, _, ended in talk) for name, talks in answers.items()}
    lines = ["# The same prompts, side by side", "",
             f"Written by `chat.py`: {len(prompts)} conversations, {n_turns} answers of each model. {way}; "
             "**[cut]** marks an answer that had not ended by then.", "",
             "| model | ended by itself | served as |", "|---|---:|---|"]
    lines += [f"| {name} | {stopped[name]} of {n_turns} | `{fingerprints[name]}` |" for name in names]
    for i, prompt in enumerate(prompts):
        lines += ["", f"## {prompt['id']}", "", "| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for turn, question in enumerate(prompt["turns"]):
            cells = [answer_cell(*answers[name][i][turn][1:]) for name in names]
            lines.append(f"| **{cell(question)}** | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def named(text):
    name, _, directory = text.partition("=")
    if not name or not directory:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIRECTORY")
    return name, Path(directory)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--server", required=True)
    parser.add_argument("--model", type=named, action="append", required=True, metavar="NAME=DIR")
    parser.add_argument("--prompts", type=Path, default=HERE / "chat-prompts.jsonl")
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--sampled", action="store_true", help="as the model's generation_config.json says, seed 1")
    parser.add_argument("--at-once", type=int, default=1, help="conversations; answers are the same")
    parser.add_argument("--only", type=int, help="the first N conversations, to try it out")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    prompts = [json.loads(line) for line in args.prompts.read_text(encoding="utf-8").splitlines()][:args.only]
    options = {"max_tokens": args.max_tokens, **(SAMPLED if args.sampled else GREEDY)}
    way = "By the model's `generation_config.json`, seed 1" if args.sampled else "Greedy decoding, no repetition penalty"
    answers, fingerprints = {}, {}
    for name, directory in args.model:
        with (serving(args.server, directory, args.at_once) as url,
              concurrent.futures.ThreadPoolExecutor(args.at_once) as pool):
            answers[name] = []
            for prompt, (talk, fingerprints[name]) in zip(
                    prompts, pool.map(lambda prompt: converse(url, prompt["turns"], options), prompts)):
                answers[name].append(talk)
                print(f"{name}: {prompt['id']}", flush=True)
    way += f", {args.max_tokens} tokens at most"
    args.out.write_text(markdown(prompts, answers, fingerprints, way), encoding="utf-8")


if __name__ == "__main__":
    main()
