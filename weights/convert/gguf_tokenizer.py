"""Builds tokenizer.json from the tokens and merges of a GGUF file: BPE over bytes.

A GGUF file names its pre-tokenizer (`tokenizer.ggml.pre`) without describing it, so only the names
listed here are built; another would give text that is quietly split wrongly.
"""
import json

from source import Unsupported

CONTROL, USER_DEFINED = 3, 4                    # tokenizer.ggml.token_type

GPT2 = [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]
DIGITS = [{"type": "Digits", "individual_digits": True}]
WITHOUT_REGEX = [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]


def _split(pattern):
    return [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}]


QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")
LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
PRE = {
    "gpt-2": (None, GPT2), "smollm": (None, DIGITS + GPT2),
    "qwen2": ({"type": "NFC"}, _split(QWEN2) + WITHOUT_REGEX),
    "llama-bpe": (None, _split(LLAMA3) + WITHOUT_REGEX),
}


def build_tokenizer(fields, path):
    """tokenizer.json as text."""
    model, pre = fields("tokenizer.ggml.model"), fields("tokenizer.ggml.pre", "default")
    if model != "gpt2" or pre not in PRE:
        raise Unsupported(f"{path}: tokenizer {model!r} with pre-tokenizer {pre!r}; byte-level BPE with one of "
                          f"{', '.join(PRE)} can be rebuilt from a GGUF: bring the model's tokenizer.json (--tokenizer)")
    normalizer, steps = PRE[pre]
    tokens, kinds = fields("tokenizer.ggml.tokens"), fields("tokenizer.ggml.token_type")
    added = [{"id": n, "content": tokens[n], "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": kind == CONTROL}
             for n, kind in enumerate(kinds) if kind in (CONTROL, USER_DEFINED)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": normalizer,
        "pre_tokenizer": steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps},
        "post_processor": None, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": pre == "llama-bpe", "vocab": {token: n for n, token in enumerate(tokens)},
                  "merges": [merge.split(" ", 1) for merge in fields("tokenizer.ggml.merges")]},
    }, ensure_ascii=False)
