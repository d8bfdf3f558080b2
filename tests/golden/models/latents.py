"""Writes latents.json: how much each head of the bundled model looks at each latent, by reference.py.

    python tests/golden/models/latents.py

p [layers, heads, latents + 1] is the mean of softmax(latent_q) over the tokens of the prompt, the
window's p(0|t) first; entropy [layers, heads] the mean entropy of it, in nats.
"""
import json
import pathlib

import torch
from tokenizers import Tokenizer

import reference

HERE = pathlib.Path(__file__).parent / "bundled"
PROMPT = "Once upon a time there was a house by the sea."


class Recorder(reference.Model):
    """Keeps what the latents' queries give."""

    def linear(self, x, name):
        y = super().linear(x, name)
        if name.endswith("latent_q"):
            self.gates.append(y.reshape(self.H, -1))
        return y


if __name__ == "__main__":
    directory = pathlib.Path("weights/latte-12m")
    tokens = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(PROMPT).ids
    model = Recorder(*reference.load(directory))
    model.gates = []
    for token in tokens:
        model.step(token)
    p = torch.softmax(torch.stack(model.gates), -1).view(len(tokens), -1, *model.gates[0].shape)
    entropy = torch.special.entr(p).sum(-1).mean(0)
    values = {"prompt": PROMPT, "p": p.mean(0).tolist(), "entropy": entropy.tolist()}
    rounded = json.loads(json.dumps(values), parse_float=lambda text: float(f"{float(text):.7g}"))
    (HERE / "latents.json").write_text(json.dumps(rounded) + "\n")
