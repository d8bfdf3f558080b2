"""The adaptation's losses against plain autograd, and a run that stops and goes on; seconds on a CPU.

    python test_adapt.py        or        pytest test_adapt.py
"""
import os
import socket
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

import adapt
import distill
from export import export
from model import Config, Latte, load
from teacher import Teacher

TINY = {
    "model_type": "latte", "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_latents": 16, "layer_type": "macchiato",
    "latent_input": "rglru", "rglru_blocks": 2, "sliding_window": 8, "norm": "rmsnorm", "mlp": "gated",
    "tie_word_embeddings": True,
}


def tiny_model():
    torch.manual_seed(0)
    model = Latte(Config({**TINY, "latent_q_bias": True}))
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_head_loss_is_what_autograd_gives(monkeypatch):
    monkeypatch.setattr(distill, "CHUNK", 5)
    torch.manual_seed(0)
    weight, student, teacher = torch.randn(30, 8), torch.randn(2, 7, 8, requires_grad=True), torch.randn(2, 7, 8)
    targets = torch.randint(0, 30, (2, 7))
    kl, ce = torch.tensor(0.7), torch.tensor(0.3)
    loss, parts = distill.HeadLoss(weight)(student, teacher, targets, kl, ce)
    loss.backward()
    got, student.grad = student.grad, None

    logits = F.linear(student, weight).flatten(0, 1)
    taught = F.linear(teacher, weight).flatten(0, 1).log_softmax(-1)
    expected_kl = F.kl_div(logits.log_softmax(-1), taught, log_target=True, reduction="batchmean")
    expected_ce = F.cross_entropy(logits, targets.flatten())
    (0.7 * expected_kl + 0.3 * expected_ce).backward()
    torch.testing.assert_close(got, student.grad)
    torch.testing.assert_close(parts["kl"], expected_kl.detach())
    torch.testing.assert_close(parts["ce"], expected_ce.detach())

    student.grad = None
    loss, _ = distill.HeadLoss(weight)(student, None, targets, kl, ce)
    loss.backward()
    expected, = torch.autograd.grad(F.cross_entropy(F.linear(student, weight).flatten(0, 1), targets.flatten()), student)
    torch.testing.assert_close(student.grad, expected)


@torch.no_grad()
def test_teacher_is_the_transformer_of_the_same_weights():
    model = tiny_model()
    values = {key: v for key, v in TINY.items() if key not in ("num_latents", "latent_input", "rglru_blocks")}
    full = Latte(Config({**values, "layer_type": "full_attention"}))
    base = {name: p for name, p in model.state_dict().items() if not adapt.is_trained(name)}
    full.load_state_dict(base)
    tokens = torch.randint(0, 60, (2, 30))
    torch.testing.assert_close(Teacher(model).hidden(tokens, torch.float32), full.hidden(tokens)[0], atol=1e-5, rtol=1e-4)
    for layer in model.model.layers:            # the window alone
        layer.mix.latent_q.bias.view(4, -1)[:, 0] = 60.0
    torch.testing.assert_close(Teacher(model, 8).hidden(tokens, torch.float32), model.hidden(tokens)[0], atol=1e-5, rtol=1e-4)


def arguments(tmp_path, monkeypatch, *more):
    monkeypatch.setattr(sys, "argv", [
        "adapt.py", "--model", str(tmp_path / "fresh"), "--data", str(tmp_path), "--out", str(tmp_path / "run"),
        "--shares", "text=1", "--valid", "text", "--rows", "2", "--segment", "16", "--teacher-length", "32",
        "--no-compile", "--device", "cpu", "--log-seconds", "0.2", "--warmup", "3", *more])
    return adapt.arguments()


@pytest.mark.parametrize("options", [[], ["--norms"], ["--o-rank", "2"]])
def test_run_stops_resumes_and_learns(tmp_path, monkeypatch, options):
    norms = "--norms" in options
    export(tiny_model().state_dict(), TINY, tmp_path / "fresh")
    np.savez(tmp_path / "text.npz", tokens=np.random.default_rng(0).integers(0, 60, 4000).astype(np.uint16),
             starts=np.arange(0, 4000, 100))
    plan = "layers:1:16:1e-2,logits:0.5:16,logits:0.5:64"
    first = adapt.Run(arguments(tmp_path, monkeypatch, "--plan", plan, "--seconds", "1.5", *options))
    before = float(first.losses_of(first.valid["text"])["kl"])
    first.run()
    saved = {name: p.detach().clone() for name, p in first.student.trained.items()}

    second = adapt.Run(arguments(tmp_path, monkeypatch, "--plan", plan, *options))
    assert (second.step, second.tokens, second.elapsed) == (first.step, first.tokens, first.elapsed)
    for name, parameter in second.student.trained.items():
        torch.testing.assert_close(parameter, saved[name], rtol=0, atol=0)
    assert second.optimiser.state_dict()["state"].keys() == first.optimiser.state_dict()["state"].keys()
    second.run()
    assert second.elapsed >= second.total and second.step > first.step
    assert float(second.losses_of(second.valid["text"])["kl"]) < before

    adapter, frozen = tmp_path / "run" / "adapter.safetensors", load(tmp_path / "fresh").state_dict()
    third = adapt.Run(arguments(tmp_path, monkeypatch, "--plan", plan, "--out", str(tmp_path / "other"), "--init", str(adapter), *options))
    assert (third.step, third.elapsed) == (second.step, 0)
    with safe_open(adapter, framework="pt") as opened:
        assert set(opened.keys()) == set(third.student.trained)
    with_norms = adapt.Run(arguments(tmp_path, monkeypatch, *options, "--norms", "--init", str(adapter),
                                       "--out", str(tmp_path / "more")))
    for name, parameter in with_norms.student.trained.items():
        expected = frozen[name] if not norms and not adapt.is_trained(name) else third.student.trained[name]
        torch.testing.assert_close(parameter, expected, rtol=0, atol=0)
    for name, parameter in second.student.model.state_dict().items():
        if not adapt.is_trained(name, norms):
            torch.testing.assert_close(parameter.float(), frozen[name], rtol=0, atol=0)
    kept = Teacher(load(tmp_path / "fresh")).hidden(torch.arange(30)[None], torch.float32)
    torch.testing.assert_close(second.student.teacher.hidden(torch.arange(30)[None], torch.float32), kept, rtol=0, atol=0)


def test_a_run_that_lost_its_way_goes_back(tmp_path, monkeypatch):
    export(tiny_model().state_dict(), TINY, tmp_path / "fresh")
    np.savez(tmp_path / "text.npz", tokens=np.random.default_rng(0).integers(0, 60, 4000).astype(np.uint16),
             starts=np.arange(0, 4000, 100))
    run = adapt.Run(arguments(tmp_path, monkeypatch, "--plan", "logits:1:16"))
    run.judge()
    good = {name: p.detach().clone() for name, p in run.student.trained.items()}
    with torch.no_grad():
        for parameter in run.student.trained.values():
            parameter.mul_(float("nan"))
    run.stage = 0
    before = run.rate()
    run.judge()
    assert run.rate() == before / 2
    for name, parameter in run.student.trained.items():
        torch.testing.assert_close(parameter, good[name], rtol=0, atol=0)


def average_in_one_of_two(rank, port, out):
    os.environ.update(WORLD_SIZE="2", RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    group = adapt.Group("cpu")
    weights = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4))]
    for i, weight in enumerate(weights):
        weight.grad = torch.full_like(weight, float(10 * i + rank))
    group.average_gradients(weights)
    torch.save([weight.grad for weight in weights] + [group.agreed(rank + 5.0, "cpu")], f"{out}/{rank}.pt")
    group.close()


def test_two_processes_share_gradients_and_the_clock(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(average_in_one_of_two, (port, str(tmp_path)), nprocs=2)
    for rank in range(2):
        first, second, clock = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(first, torch.full((2, 3), 0.5))
        torch.testing.assert_close(second, torch.full((4,), 10.5))
        assert clock == 5.0


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q"]))
