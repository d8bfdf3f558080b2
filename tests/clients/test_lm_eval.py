"""lm-eval's local-completions (echo and logprobs) against `latte-run --perplexity`.

The texts of heldout.txt were written for this test. What lm-eval makes of the server's log
probabilities has to be what the program computes without a server, without HTTP and from tokens of
its own tokenizer.
"""
import json
import math
import subprocess

import pytest
from lm_eval import simple_evaluate
from lm_eval.api.task import ConfigurableTask

from server import MODEL_DIR, ROOT, program

END = "<|endoftext|>"
TEXTS = (ROOT / "tests/clients/heldout.txt").read_text().rstrip("\n").split(f"\n{END}\n")
N_CONTEXT = 60  # a text's beginning has so many characters at most, and ends with a word
# The likeliest token behind this text is the one that ends an answer.
ANSWER = ("<|im_start|>user\nTell me about a cat.<|im_end|>\n"
          "<|im_start|>assistant\nCats are nice.")
ENDS = TEXTS + [ANSWER]
# Logprobs travel as JSON numbers of f32; batches of other sizes add in another order.
TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def nats(tmp_path_factory):
    """nats(text): minus its log likelihood, all tokens but the first, and their number."""
    path = tmp_path_factory.mktemp("perplexity") / "text"

    def score(text):
        path.write_bytes(text.encode())
        done = subprocess.run(
            [program("latte-run"), "-m", str(MODEL_DIR), "--perplexity", str(path), "--json", "-q"],
            capture_output=True, text=True, timeout=300, check=True)
        found = json.loads(done.stdout)
        n = found["tokens"] - 1
        return n * math.log(found["perplexity"]), n

    return score


def beginning(text):
    """Up to a word's end: of a word cut in two lm-eval would score what no tokenizer makes of it,
    the beginning's own tokens and then the whole text's behind as many."""
    return text[:text.rindex(" ", 0, N_CONTEXT)]


def tasks(directory):
    """One task that scores whole texts, and one that scores their ends."""
    whole, ends = directory / "whole.jsonl", directory / "ends.jsonl"
    whole.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    ends.write_text("".join(
        json.dumps({"begin": beginning(t), "end": t[len(beginning(t)):]}) + "\n" for t in ENDS))

    def data(path):
        return dict(dataset_path="json", test_split="test",
                    dataset_kwargs={"data_files": {"test": str(path)}})

    return [
        ConfigurableTask(config=dict(
            task="heldout_whole", output_type="loglikelihood_rolling", doc_to_text="",
            doc_to_target="{{text}}", **data(whole),
            metric_list=[{"metric": m} for m in ("bits_per_byte", "byte_perplexity")])),
        ConfigurableTask(config=dict(
            task="heldout_ends", output_type="loglikelihood", doc_to_text="{{begin}}",
            doc_to_target="{{end}}", target_delimiter="", **data(ends),
            metric_list=[{"metric": "perplexity"}])),
    ]


@pytest.fixture(scope="module", params=["tokens", "text"])
def results(request, server, name, tmp_path_factory):
    directory = tmp_path_factory.mktemp("lm-eval")
    return simple_evaluate(
        model="local-completions",
        model_args=dict(
            model=name, base_url=server.base + "/completions", tokenizer=str(MODEL_DIR),
            tokenizer_backend="huggingface", tokenized_requests=request.param == "tokens",
            num_concurrent=1, max_retries=1, max_length=2048, batch_size=2),
        tasks=tasks(directory), log_samples=True, bootstrap_iters=0)


def test_whole_texts(results, nats):
    """lm-eval puts the end-of-text token before a text, so its first token counts."""
    samples = sorted(results["samples"]["heldout_whole"], key=lambda s: s["doc_id"])
    assert len(samples) == len(TEXTS)
    total = 0
    for sample, text in zip(samples, TEXTS):
        wanted, _ = nats(END + text)
        got = -sample["resps"][0][0]
        assert got == pytest.approx(wanted, rel=TOLERANCE)
        total += wanted
    n_bytes = sum(len(t.encode()) for t in TEXTS)
    found = results["results"]["heldout_whole"]["bits_per_byte,none"]
    assert found == pytest.approx(total / math.log(2) / n_bytes, rel=TOLERANCE)
    assert 0.5 < found < 3, "no English text is that likely or unlikely to this model"


def test_ends_of_texts(results, nats):
    samples = sorted(results["samples"]["heldout_ends"], key=lambda s: s["doc_id"])
    assert len(samples) == len(ENDS)
    for sample, text in zip(samples, ENDS):
        wanted = nats(text)[0] - nats(beginning(text))[0]
        assert -sample["resps"][0][0][0] == pytest.approx(wanted, rel=TOLERANCE)
        assert sample["resps"][0][0][1] in (True, False)  # would greedy decoding have said it
