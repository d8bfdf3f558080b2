"""Reads the training text: plain documents and conversations, compressed with xz or not.

`NAME.txt[.xz]` holds documents separated by a line `<|endoftext|>`; `NAME.jsonl[.xz]` holds one
conversation a line, {"messages": [{"role", "content"}, ...], "source": ...}. A conversation
becomes one document in ChatML, the same text that the chat template of the model writes.
"""
import json
import lzma
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
SPECIAL_TOKENS = [END_OF_TEXT, IM_START, IM_END]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat_text(messages):
    """The conversation as CHAT_TEMPLATE writes it."""
    return "".join(f"{IM_START}{m['role']}\n{m['content']}{IM_END}\n" for m in messages)


def open_text(path, mode="rt"):
    opened = lzma.open if Path(path).suffix == ".xz" else open
    return opened(path, mode, encoding="utf-8", newline="\n")


def read_documents(path):
    """All documents of a file, as a list of strings."""
    with open_text(path) as file:
        if ".jsonl" in Path(path).name:
            return [chat_text(json.loads(line)["messages"]) for line in file if line.strip()]
        documents = file.read().split(f"\n{END_OF_TEXT}\n")
    return [document for document in documents if document.strip()]


def read_sources(path):
    """The `source` of each conversation of a .jsonl file, in the order of read_documents."""
    with open_text(path) as file:
        return [json.loads(line).get("source", "") for line in file if line.strip()]
