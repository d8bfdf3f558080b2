"""Trains the byte-level BPE tokenizer and writes tokenizer.json and tokenizer_config.json.

    python train_tokenizer.py --out ../latte-12m --size 8192 FILE...

Digits are split one by one, then the text is cut as GPT-2 does; there is no post-processor, so
nothing is put before a prompt. Large files are thinned: every document is cut into pieces of
64 KiB and every `--keep`-th piece is used.
"""
import argparse
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from corpus import CHAT_TEMPLATE, END_OF_TEXT, IM_END, SPECIAL_TOKENS, read_documents

PIECE = 1 << 16


def pieces(paths, keep):
    """Every keep-th piece of the text; special tokens are cut out, the tokenizer has them whole."""
    count = 0
    for path in paths:
        for document in read_documents(path):
            for special in SPECIAL_TOKENS:
                document = document.replace(special, "")
            for start in range(0, len(document), PIECE):
                count += 1
                if count % keep == 0:
                    yield document[start:start + PIECE]


def train(paths, size, keep):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pieces(paths, keep), trainer)
    return tokenizer


def tokenizer_config():
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": SPECIAL_TOKENS[1:],
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(1e18),
        "chat_template": CHAT_TEMPLATE,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, default=8192)
    parser.add_argument("--keep", type=int, default=1, help="use every n-th piece of the text")
    args = parser.parse_args()

    tokenizer = train(args.files, args.size, args.keep)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(args.out / "tokenizer.json"))
    (args.out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(), indent=2) + "\n")

    print(f"{tokenizer.get_vocab_size()} entries, {IM_END} is {tokenizer.token_to_id(IM_END)}")


if __name__ == "__main__":
    main()
