#!/usr/bin/env python3
"""Writes cases.json for test_chat_template.c: what transformers' apply_chat_template renders.

    python tests/golden/chat_template/make.py

Needs `transformers`. `chats` are conversations of [role, content]. Each entry of `known`: the
template's spelling, its kind, the bos_token, and `texts`: for each conversation and each of the flags
0, 1 (add_generation_prompt), 2 (continue_final_message) the text, or null when the template refuses. `changed` has, for each byte of the template, the CRC-32 of what the template
without that byte renders: a template that is recognised in spite of the change must render that.
"""
import json
import os
import random
import zlib

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

HERE = os.path.dirname(os.path.abspath(__file__))
rng = random.Random(7)

CHATML_LOOP = "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
CHATML_END = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"


def chatml_default(text):
    return ("{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n" +
            text + "<|im_end|>\\n' }}{% endif %}" + CHATML_LOOP + CHATML_END)


ALTERNATE = ("{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}")
GEMMA = ("{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
         "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}" + ALTERNATE +
         "{% endif %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
         "{% endif %}{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}")
GEMMA3 = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        """ + ALTERNATE.replace("'", '"') + """
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\\n'}}
{%- endif -%}
"""
LLAMA3_LOOP = ("{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
               "message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
               "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}")
LLAMA3_END = "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"


def plain(role, end, prompt):
    return ("{% for message in messages %}{{ " + role + " + ': ' + message['content'] + '" + end + "' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '" + prompt + "' }}{% endif %}")


LOOP = "{% for message in messages %}"
TEMPLATES = [
    ("chatml", LOOP + CHATML_LOOP + CHATML_END),
    ("chatml", (LOOP + CHATML_LOOP + CHATML_END).replace("\\n", "\n")),
    ("chatml", (LOOP + CHATML_LOOP + CHATML_END).replace("'", '"').replace('["role"]', ".role").replace(" + ", "+")),
    ("chatml", "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}" + LOOP +
     CHATML_LOOP + CHATML_END),
    ("chatml", """{# ChatML, spelled as text #}
{%- for message in messages %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""),
    ("chatml", chatml_default("You are a helpful assistant.")),
    ("chatml", chatml_default("You are a helpful AI assistant named SmolLM, trained by Hugging Face")),
    ("chatml", chatml_default("Zwei\\nZeilen \u00e9 \u6771")),
    ("gemma", GEMMA),
    ("gemma", GEMMA3),
    ("llama3", LLAMA3_LOOP + LLAMA3_END),
    ("llama3", LLAMA3_LOOP + "{% if add_generation_prompt %}" + LLAMA3_END + "{% endif %}"),
    ("plain", plain("message['role'] | capitalize", "\\n", "Assistant:")),
    ("plain", plain("message['role'].title()", "\\n", "Assistant:").replace(".title()", " | title")),
    ("plain", plain("message['role'] | capitalize", "\\n\\n", "Assistant:")),
    ("plain", plain("message['role']", "\\n", "assistant:")),
]
UNKNOWN = [
    chatml_default("It\\'s me"),
    chatml_default("tab\\there"),
    chatml_default("a' + tools + 'b"),
    LOOP + CHATML_LOOP.replace("content'] +", "content'] | trim +") + CHATML_END,
    LOOP + CHATML_LOOP + CHATML_END + "!",
    LOOP + CHATML_LOOP.replace("im_end", "im_stop") + CHATML_END,
    LOOP + CHATML_LOOP + CHATML_END.replace("assistant", "bot"),
    LOOP + CHATML_LOOP + "{% if tools %}{{ tools }}{% endif %}" + CHATML_END,
    GEMMA.replace("| trim ", ""),
    LLAMA3_LOOP + "{% generation %}" + LLAMA3_END + "{% endgeneration %}",
    "[INST] {{ messages[0]['content'] }} [/INST]",
    "", " ", "{{", "{% for", "{{ '", "{#", "{{ messages }}", "{%+ if x %}{% endif %}",
]

CONTENTS = ["Hello", "  padded \n", "", " ", "\n\n", "multi\nline", "<|im_end|>", "caf\u00e9 \u6771\u4eac \U0001F600", "{{ x }}", "'quoted'",
            "\u3000wide\u2003", "\x1ctrim\x1f", "a\u200b", "<end_of_turn>\n", "\ttab\x0b"]


def conversations():
    out = [["user"], ["user", "assistant"], ["system", "user"], ["system", "user", "assistant", "user"], ["assistant"], ["system"],
           ["user", "user"], ["user", "system", "user"], ["system", "system", "user"], ["user", "assistant", "user", "assistant"],
           ["system", "assistant"], ["user", "assistant", "system"]]
    result = [[[role, "Text"] for role in roles] for roles in out]
    for content in CONTENTS:
        result.append([["system", content], ["user", "Q"], ["assistant", content]])
    for _ in range(16):
        result.append([[rng.choice(["system", "user", "assistant"]) if rng.random() < .3 else ["user", "assistant"][i % 2],
                        rng.choice(CONTENTS)] for i in range(rng.randint(1, 5))])
    return result


TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])), bos_token="<s>")


def render(template, messages, flags):
    try:
        return TOKENIZER.apply_chat_template([dict(role=r, content=c) for r, c in messages], chat_template=template, tokenize=False,
                                             add_generation_prompt=bool(flags & 1), continue_final_message=bool(flags & 2))
    except Exception:  # any refusal is a refusal
        return None


PROBES = [([["user", " Q "], ["assistant", "A "]], 1), ([["system", "S"], ["user", "Q"]], 0)]


def probe(template):
    crc = 0
    for messages, flags in PROBES:
        text = render(template, messages, flags)
        crc = zlib.crc32(b"\0" if text is None else text.encode(), crc)
    return crc


def main():
    chats = conversations()
    entries = []
    for kind, template in TEMPLATES:
        texts = [render(template, messages, flags) for messages in chats for flags in (0, 1, 2)]
        data = template.encode()
        changed = []
        for i in range(len(data)):
            try:
                changed.append(probe((data[:i] + data[i + 1:]).decode()))
            except UnicodeDecodeError:
                changed.append(0)
        entries.append(dict(kind=kind, template=template, bos="<s>", texts=texts, changed=changed))
    with open(os.path.join(HERE, "cases.json"), "w", encoding="utf-8") as f:
        json.dump(dict(chats=chats, known=entries, unknown=UNKNOWN), f, ensure_ascii=True, separators=(",", ":"), indent=None)
        f.write("\n")


if __name__ == "__main__":
    main()
