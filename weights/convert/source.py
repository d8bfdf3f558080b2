"""What a converter needs of a pre-trained model, wherever it comes from.

A `Source` speaks the Hugging Face ecosystem's language: `config` carries the keys of a config.json
of its `model_type`, tensors are found under the names that `transformers` gives them.
"""
from dataclasses import dataclass, field
from typing import Callable

import numpy as np


class Unsupported(ValueError):
    """The model holds something that the format cannot express; the text names it."""


@dataclass
class Source:
    name: str                                   # for messages
    config: dict                                # Hugging Face's keys
    names: set                                  # of the tensors
    tensor: Callable[[str], np.ndarray]         # a tensor by its name, as float32
    norm_offset_applied: bool = False           # Gemma: the file's norm weights already have the one added
    tokenizer_json: str = ""                    # text of tokenizer.json
    chat_template: str = ""
    special: dict = field(default_factory=dict)     # bos_token, eos_token, ... as text
    eos_ids: list = field(default_factory=list)
    notes: list = field(default_factory=list)       # what a reader should know about the conversion

    def take(self, name, shape):
        """The tensor, checked."""
        if name not in self.names:
            raise Unsupported(f"{self.name}: tensor {name} is missing")
        value = self.tensor(name)
        if tuple(value.shape) != tuple(shape):
            raise Unsupported(f"{self.name}: tensor {name}: expected shape {list(shape)}, found {list(value.shape)}")
        return np.ascontiguousarray(value, dtype=np.float32)
