#!/usr/bin/env python3
"""Writes the golden data of test_tokenizer.c: small tokenizers of every family, trained here,
and what the `tokenizers` package makes of some thousands of strings.

    python tests/golden/tokenizer/make.py [DIR]      (default: this directory)

Needs `tokenizers`; text comes from Python's own standard library. Everything is seeded. Files:

  strings.bin    varint count; then each string: varint bytes, bytes
  NAME.json      the tokenizer
  NAME.bin       for each string: varint n + 1 and n ids as varints without special tokens added,
                 or 0 and a CRC-32 of the ids (little-endian u32) where they are many;
                 then a CRC-32 over: ids with special tokens added, ids with special tokens' text
                 as ordinary text, the decoded text of the first, the same skipping specials
                 then a CRC-32 of the ids of each block of code points (BLOCKS), then a CRC-32 of
                 the decoded texts of each random id sequence (SEQUENCES)
"""
import glob
import json
import os
import random
import struct
import sys
import sysconfig
import unicodedata
import zlib

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

HERE = sys.argv[1] if len(sys.argv) > 1 else os.path.dirname(os.path.abspath(__file__))
MAX_LISTED = 160   # longer id lists are checked by their CRC
SEQUENCES = 400
BLOCK = 1024       # code points of one block string
PLANES = (0, 1, 2, 3, 14)

rng = random.Random(20260101)

# ---------------------------------------------------------------------------- text

SENTENCES = """Σήμερα είναι μια όμορφη μέρα· ο ήλιος λάμπει.
Съешь же ещё этих мягких французских булок, да выпей чаю 42.
El pingüino Wenceslao hizo kilómetros bajo exhaustiva lluvia y frío, añoraba a su querido cachorro.
Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. STRASSE, Straße!
Pchnąć w tę łódź jeża lub ośm skrzyń fig — naïve façade, coöperate, Ångström.
Příliš žluťoučký kůň úpěl ďábelské ódy; İstanbul'da ıssız ırmak.
いろはにほへと ちりぬるを。漢字とカタカナ、ｶﾀｶﾅ１２３！
我能吞下玻璃而不伤身体。我能吞下玻璃而不傷身體，２０２４年。
키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다.
هذا نص عربي، مع أرقام ٠١٢٣ و علامات ترقيم؟ لا إله
זה משפט בעברית עם נִקּוּד ומספרים 123.
यह हिन्दी में एक वाक्य है। संख्या १२३ और क्षत्रिय।
இது தமிழ் சொற்றொடர்; எண்கள் ௧௨௩.
นี่คือประโยคภาษาไทยที่ไม่มีช่องว่าง ๑๒๓
Đây là một câu tiếng Việt với dấu thanh: ầ ẩ ẫ ấ ậ.
ქართული ტექსტი და Հայերեն տեքստ, የአማርኛ ጽሑፍ።
x = {k: [v ** 2 for v in range(10)] for k in "abc"}  # comment
for (int i = 0; i < n; ++i) { a[i] += b[i] * 0x1F; }\t// tabs\tand\ttabs
SELECT * FROM users WHERE name LIKE '%o''brien%' AND age >= 18;
https://example.org/path?query=1&other=%20#frag me@example.com C:\\Users\\x
I'll, you've, we're, he'd, it's, don't, I'm — I'LL YOU'VE WE'RE HE'D IT'S DON'T I'M
1234567890 3.14159 1,000,000 -17 +3e-10 ½ ² Ⅷ ①② 0b1010 12:34:56""".split("\n")


def library_lines():
    """Lines of the standard library: prose of its licence, code and docstrings."""
    root = sysconfig.get_paths()["stdlib"]
    lines = []
    for name in ("LICENSE.txt", "argparse.py", "asyncio/base_events.py", "decimal.py", "_pydecimal.py",
                 "collections/__init__.py", "datetime.py", "difflib.py", "turtle.py", "zipfile.py",
                 "typing.py", "logging/__init__.py", "email/message.py", "statistics.py"):
        path = os.path.join(root, name)
        if os.path.exists(path):
            lines += open(path, encoding="utf-8").read().split("\n")
    return lines


LINES = library_lines()
CORPUS = LINES + SENTENCES * 6

# ---------------------------------------------------------------------------- strings

ASSIGNED = [c for c in range(0x110000)
            if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")]
BY_CATEGORY = {}
for c_ in ASSIGNED:
    BY_CATEGORY.setdefault(unicodedata.category(chr(c_)), []).append(c_)
MARKS = [chr(c) for c in ASSIGNED if unicodedata.combining(chr(c))]
SPACES = [chr(c) for c in (9, 10, 11, 12, 13, 0x1C, 0x1D, 0x1E, 0x1F, 0x20, 0x85, 0xA0, 0x1680, 0x180E,
                           *range(0x2000, 0x200E), 0x2028, 0x2029, 0x202F, 0x205F, 0x2060, 0x3000,
                           0x3164, 0xFEFF)]
WORDS = "the and of Hello world token it's don't naïve Über ПРИВЕТ 東京 카페 x y foo_bar 42 1999 3.14 I'm".split()
SPECIALS = ["<s>", "</s>", "<unk>", "<pad>", "<bos>", "<eos>", "<|endoftext|>", "<|im_start|>", "<|im_end|>",
            "<|begin_of_text|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<tool_call>", "[LEFT]",
            "[RIGHT]", "[BOTH]", "WORD", "Norm al", "nor", "norm", "\n\n\n", "<0x41>", "<0x0A>", "café", "  ", "▁▁"]
EMOJI = ["👨\u200d👩\u200d👧\u200d👦", "🏳️\u200d🌈", "🇩🇪🇫🇷🇯🇵", "👍🏽👍🏿", "❤️\u200d🔥", "1️⃣2️⃣#️⃣", "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
         "🧑🏻\u200d💻", "😀😃😄", "☺︎☺️", "🫠🫡🪿🫎", "🤷🏾\u200d♀️", "👩\u200d❤️\u200d💋\u200d👨", "🅰️🆎"]


def block_strings():
    """Some characters of every 128 (in large scripts 512) code points that has any."""
    groups = {}
    for c in ASSIGNED:
        large = 0x3400 <= c < 0xA000 or 0xAC00 <= c < 0xD800 or c >= 0x17000
        groups.setdefault((large, c // (512 if large else 128)), []).append(c)
    out = []
    for key in sorted(groups, key=lambda k: groups[k][0]):
        chosen = [chr(rng.choice(groups[key])) for _ in range(6)]
        out.append("a" + chosen[0] + "b " + chosen[1] + chosen[2] + " 1" + chosen[3] + "\n" + chosen[4] + chosen[5])
    return out


def category_strings():
    out = []
    for name in sorted(BY_CATEGORY):
        for _ in range(9):
            pick = lambda: chr(rng.choice(BY_CATEGORY[name]))
            out.append(rng.choice(["", " ", "a", "1"]) + pick() + pick() + rng.choice(["", " ", "a", "9", "'s"]) + pick())
    for c in range(0x20):
        out += [chr(c), "a" + chr(c) + "b", " " + chr(c) * 3 + " x"]
    for c in (0x7F, 0x80, 0x85, 0x9F, 0xA0, 0xAD):
        out += [chr(c), "a " + chr(c) + chr(c) + "b"]
    for c in (0xFEFF, 0xFFFD, 0xFFFE, 0xFFFF, 0xFDD0, 0xFDEF, 0x1FFFE, 0x10FFFE, 0x10FFFF, 0xE000, 0xF8FF, 0xF0000,
              0x100000, 0x378, 0x1FFF0, 0x200B, 0x200D, 0x2066, 0xE0001, 0x149F4, 0xD7FF):
        out += [chr(c), "x" + chr(c) + " " + chr(c) + "9", chr(c) * 4]
    return out


def whitespace_strings():
    out = ["", " ", "  ", "\n", "\r\n", "\t"]
    for s in SPACES:
        out += [s, s * 3, "a" + s + "b", "a" + s * 2 + "b", s + "a", "a" + s, "." + s + ".", s + "\n" + s + "x"]
    for _ in range(160):
        run = "".join(rng.choice([" ", " ", " ", "\n", "\r\n", "\t"] + SPACES) for _ in range(rng.randint(1, 9)))
        out.append(rng.choice(["", "a", "é", "1", "!"]) + run + rng.choice(["", "b", "2", "?", "'s"]))
    return out


def mark_strings():
    bases = [chr(c) for c in (0x41, 0x65, 0x6F, 0x75, 0x41E, 0x3B1, 0x915, 0x9C7, 0xBC6, 0xE01, 0x1100, 0x1112, 0x1161,
                              0x1175, 0x11A8, 0x11C2, 0xAC00, 0xAC01, 0x4E00, 0x3042, 0xF900, 0x212B, 0x2126, 0x1E9B,
                              0x0344, 0x0958, 0x11099, 0x110A5, 0x1D15E, 0x2ADC, 0xFB1D, 0x11935, 0x11930, 0x0DD9, 0x0DCF)]
    out = []
    for _ in range(200):
        text = ""
        for _ in range(rng.randint(1, 4)):
            text += rng.choice(bases) + "".join(rng.choice(MARKS) for _ in range(rng.randint(0, 4)))
        out.append(text)
    composed = [chr(c) for c in ASSIGNED if unicodedata.decomposition(chr(c)) and unicodedata.decomposition(chr(c))[0] != "<"]
    for _ in range(80):
        text = "".join(rng.choice(composed) for _ in range(3))
        out += [unicodedata.normalize("NFD", text)[::rng.choice([1, -1])], text + rng.choice(MARKS)]
    for _ in range(40):
        out.append("".join(chr(rng.choice([rng.randint(0x1100, 0x11FF), rng.randint(0xAC00, 0xD7A3), rng.randint(0xA960, 0xA97C),
                                           rng.randint(0xD7B0, 0xD7FB)])) for _ in range(5)))
    out += ["a" + "\u0301\u0323" * 60, "\u0301" * 30, "q" + "".join(rng.choice(MARKS) for _ in range(300))]
    return out


def contraction_strings():
    out = []
    for mark in "'’ʼ`＇":
        for end in ("s", "S", "ſ", "t", "T", "re", "RE", "Re", "ve", "VE", "m", "M", "ll", "LL", "lL", "d", "D", "K", "\u212a", "ß", "ﬀ", "sx"):
            out.append(rng.choice(["I", "it", "ПРИ", "東", "é", "9"]) + mark + end + rng.choice(["", " x", "a", "!"]))
    return out


def special_strings():
    out = list(SPECIALS)
    for s in SPECIALS:
        out += ["a " + s + " b", "a" + s + "b", s + s, "  " + s + " \n x", "_" + s + "é"]
    for _ in range(150):
        parts = [rng.choice(SPECIALS + WORDS + [" ", "  ", "\n", "\u3000", "", ""]) for _ in range(rng.randint(2, 6))]
        out.append("".join(parts))
    return out


def long_strings():
    letters = "abcdefghijklmnopqrstuvwxyz"
    out = ["a" * 3000, "ab" * 1500, "a " * 1500, " " * 3000, "\n" * 2000, " \n" * 1000, "=" * 2500, "1" * 2000, "é" * 1500,
           "🙂" * 500, "一" * 1200, "x" + "\u0301" * 800, "\x00" * 700, "▁" * 900, "'s" * 700, "\ufffd" * 500, "가" * 700,
           "\u1100\u1161\u11a8" * 300, " " * 1000 + "x", "<" * 999, "</s" * 400]
    for n in (500, 2000, 5000):
        out.append("".join(rng.choice(letters) for _ in range(n)))
        out.append("".join(rng.choice("aeiou \n\tTHE.,'0123456789éß東\U0001F600") for _ in range(n)))
    out.append("\n".join(LINES[100:160]))
    return out


def line_strings():
    prose = [s for s in LINES if 10 < len(s) < 90]
    out = list(SENTENCES)
    out += [rng.choice(prose) for _ in range(230)]
    for _ in range(330):
        parts = []
        for _ in range(rng.randint(2, 5)):
            kind = rng.randint(0, 5)
            parts.append(rng.choice([WORDS, EMOJI, SPACES, WORDS][kind]) if kind < 4 else
                         rng.choice(SENTENCES)[rng.randint(0, 30):][:rng.randint(1, 9)] if kind == 4 else
                         str(rng.randint(0, 10 ** rng.randint(1, 12))))
        out.append(rng.choice(["", " "]).join(parts))
    return out + EMOJI + [" ".join(EMOJI), "".join(EMOJI)]


def all_strings():
    found, seen = [], set()
    for s in (block_strings() + category_strings() + whitespace_strings() + mark_strings() + contraction_strings() +
              special_strings() + line_strings() + long_strings()):
        if s not in seen:
            seen.add(s)
            found.append(s)
    return found


# ---------------------------------------------------------------------------- tokenizers

GPT4_STYLE = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
              r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN_STYLE = GPT4_STYLE.replace("{1,3}", "")
CASED = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
         r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
         r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def added(token_id, content, special=True, **flags):
    token = dict(id=token_id, content=content, single_word=False, lstrip=False, rstrip=False, normalized=False,
                 special=special)
    token.update(flags)
    return token


def byte_level(add_prefix_space=False, trim_offsets=True, use_regex=True):
    return dict(type="ByteLevel", add_prefix_space=add_prefix_space, trim_offsets=trim_offsets, use_regex=use_regex)


def split(pattern, behavior="Isolated", invert=False, kind="Regex"):
    return dict(type="Split", pattern={kind: pattern}, behavior=behavior, invert=invert)


def sequence(key, *items):
    return {"type": "Sequence", key: list(items)}


def template(prefix, suffix, ids):
    item = lambda t: {"SpecialToken": {"id": t, "type_id": 0}}
    one = [item(t) for t in prefix] + [{"Sequence": {"id": "A", "type_id": 0}}] + [item(t) for t in suffix]
    return dict(type="TemplateProcessing", single=one, pair=one + [{"Sequence": {"id": "B", "type_id": 1}}],
                special_tokens={t: dict(id=t, ids=[ids[t]], tokens=[t]) for t in sorted(set(prefix + suffix))})


def document(model, added_tokens, normalizer, pre_tokenizer, post_processor, decoder):
    return dict(version="1.0", truncation=None, padding=None, added_tokens=added_tokens, normalizer=normalizer,
                pre_tokenizer=pre_tokenizer, post_processor=post_processor, decoder=decoder, model=model)


def train(normalizer, pre_tokenizer, size, alphabet, specials=()):
    """Learn merges on the corpus; returns ({token: id}, [[left, right]...])."""
    empty = dict(type="BPE", vocab={}, merges=[])
    t = Tokenizer.from_str(json.dumps(document(empty, [], normalizer, pre_tokenizer, None, None)))
    limit = {} if alphabet else {"limit_alphabet": 240}
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=sorted(alphabet), special_tokens=list(specials),
                                  show_progress=False, **limit)
    t.train_from_iterator(CORPUS, trainer)
    model = json.loads(t.to_str())["model"]
    return model["vocab"], [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]


def bpe(vocab, merges, **options):
    model = dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None,
                 fuse_unk=False, byte_fallback=False, ignore_merges=False)
    model.update(options)
    model.update(vocab=vocab, merges=merges)
    return model


BYTES = pre_tokenizers.ByteLevel.alphabet()


def gpt2():
    pre = byte_level()
    vocab, merges = train(None, pre, 1200, BYTES)
    model = bpe(vocab, [" ".join(m) for m in merges], continuing_subword_prefix="", end_of_word_suffix="")
    del model["ignore_merges"]
    return document(model, [added(len(vocab), "<|endoftext|>", normalized=True)], None, pre,
                    byte_level(trim_offsets=False), byte_level(True))


def llama3():
    pre = sequence("pretokenizers", split(GPT4_STYLE), byte_level(use_regex=False))
    vocab, merges = train(None, pre, 1300, BYTES)
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    ids = {n: len(vocab) + i for i, n in enumerate(names)}
    # Words that are tokens but that merges do not reach: what ignore_merges is for.
    merges = [m for i, m in enumerate(merges) if i < 400 or i % 3]
    reached = {a + b for a, b in merges} | {t for t in vocab if len(t) == 1}
    merges = [m for m in merges if m[0] in reached and m[1] in reached]
    post = sequence("processors", byte_level(True), template(["<|begin_of_text|>"], [], ids))
    return document(bpe(vocab, merges, ignore_merges=True), [added(i, n) for n, i in ids.items()], None, pre, post,
                    byte_level(True))


def qwen2():
    pre = sequence("pretokenizers", split(QWEN_STYLE), byte_level(use_regex=False))
    normalizer = dict(type="NFC")
    vocab, merges = train(normalizer, pre, 1200, BYTES)
    n = len(vocab)
    tokens = [added(n, "<|endoftext|>"), added(n + 1, "<|im_start|>"), added(n + 2, "<|im_end|>"),
              added(n + 3, "<tool_call>", special=False), added(n + 4, "cafe\u0301", special=False, normalized=True)]
    return document(bpe(vocab, [" ".join(m) for m in merges], continuing_subword_prefix="", end_of_word_suffix=""), tokens,
                    normalizer, pre, byte_level(use_regex=False), byte_level(use_regex=False))


def smollm2():
    pre = sequence("pretokenizers", dict(type="Digits", individual_digits=True), byte_level())
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab, merges = train(None, pre, 1200, BYTES, names)
    return document(bpe(vocab, merges), [added(i, n) for i, n in enumerate(names)], None, pre, None, byte_level(True))


def sentencepiece(normalizer, pre_tokenizer, names, with_bytes=True, size=900):
    """A vocabulary in SentencePiece's order: specials, bytes, learned."""
    vocab, merges = train(normalizer, pre_tokenizer, size, [])
    order = list(names) + ([f"<0x{b:02X}>" for b in range(256)] if with_bytes else [])
    order += [t for t in sorted(vocab, key=vocab.get) if t not in order]
    return {t: i for i, t in enumerate(order)}, merges


def replace(text, content):
    return dict(type="Replace", pattern={"String": text}, content=content)


def llama2():
    normalizer = sequence("normalizers", dict(type="Prepend", prepend="▁"), replace(" ", "▁"))
    vocab, merges = sentencepiece(normalizer, split("▁", "MergedWithNext", kind="String"), ["<unk>", "<s>", "</s>"])
    n = len(vocab)
    tokens = [added(0, "<unk>"), added(1, "<s>"), added(2, "</s>"), added(n, "<pad>", lstrip=True),
              added(n + 1, "nor", special=False, normalized=True), added(n + 2, "[RIGHT]", rstrip=True)]
    decoder = sequence("decoders", replace("▁", " "), dict(type="ByteFallback"), dict(type="Fuse"),
                       dict(type="Strip", content=" ", start=1, stop=0))
    return document(bpe(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True), tokens, normalizer, None,
                    template(["<s>"], [], vocab), decoder)


def metaspace():
    """Llama-2 as newer converters write it, without all byte tokens, so that unk happens."""
    pre = dict(type="Metaspace", replacement="▁", prepend_scheme="first", split=False)
    vocab, merges = sentencepiece(None, dict(pre, split=True), ["<unk>", "<s>", "</s>"])
    for b in (0xF0, 0xE2, 0x00):
        token = f"<0x{b:02X}>"
        vocab[token + "x"] = vocab.pop(token)
    vocab = dict(sorted(vocab.items(), key=lambda kv: kv[1]))
    tokens = [added(0, "<unk>"), added(1, "<s>"), added(2, "</s>")]
    decoder = sequence("decoders", replace("▁", " "), dict(type="ByteFallback"), dict(type="Fuse"),
                       dict(type="Strip", content=" ", start=2, stop=0))
    return document(bpe(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True), tokens, None, pre,
                    template(["<s>"], ["</s>"], vocab), decoder)


def metaspace_legacy():
    """The older form of Metaspace, split into words, no bytes, unknowns one by one."""
    pre = dict(type="Metaspace", replacement="▁", str_rep="▁", add_prefix_space=True)
    vocab, merges = sentencepiece(None, pre, ["<unk>", "<s>", "</s>"], with_bytes=False, size=700)
    n = len(vocab)
    tokens = [added(0, "<unk>"), added(1, "<s>"), added(2, "</s>"), added(n, "[LEFT]", special=False, lstrip=True),
              added(n + 1, "[BOTH]", special=False, lstrip=True, rstrip=True),
              added(n + 2, "WORD", special=False, single_word=True), added(n + 3, "norm", special=False, normalized=True)]
    return document(bpe(vocab, merges, unk_token="<unk>"), tokens, None, pre, template(["<s>"], ["</s>"], vocab), pre)


def gemma():
    normalizer = replace(" ", "▁")
    pre = split(" ", "MergedWithPrevious", kind="String")
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "\n\n\n", "▁▁"]
    vocab, merges = sentencepiece(normalizer, split("▁", "MergedWithNext", kind="String"), names)
    tokens = [added(i, n) for i, n in enumerate(names[:6])] + [added(i + 6, n, special=False) for i, n in enumerate(names[6:])]
    decoder = sequence("decoders", replace("▁", " "), dict(type="ByteFallback"), dict(type="Fuse"))
    return document(bpe(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True), tokens, normalizer, pre,
                    template(["<bos>"], [], vocab), decoder)


def cased():
    """Case-aware pattern, a space put in front, added tokens with every flag, no decoder chain."""
    pre = sequence("pretokenizers", dict(type="Digits", individual_digits=False), split(CASED, "Removed", True),
                   split("_", "MergedWithNext", kind="String"), split(r"[\-=]+", "Contiguous"),
                   split(r"\P{L}\p{P}", "MergedWithPrevious"), byte_level(True, use_regex=False))
    vocab, merges = train(None, pre, 900, BYTES)
    n = len(vocab)
    tokens = [added(n, "<s>", rstrip=True), added(n + 1, "</s>", lstrip=True, single_word=True),
              added(n + 2, "[BOTH]", special=False, lstrip=True, rstrip=True),
              added(n + 3, "Norm al", special=False, normalized=True), added(n + 4, "nor", special=False, single_word=True),
              added(n + 5, "norm", special=False), added(n + 6, "  ", special=False, rstrip=True), added(n + 7, "  <unk>")]
    return document(bpe(vocab, merges), tokens, None, pre, None, None)


FAMILIES = dict(gpt2=gpt2, llama3=llama3, qwen2=qwen2, smollm2=smollm2, llama2=llama2, metaspace=metaspace,
                metaspace_legacy=metaspace_legacy, gemma=gemma, cased=cased)

# ---------------------------------------------------------------------------- expectations


def varint(n):
    out = b""
    while n >= 128:
        out += bytes([n & 127 | 128])
        n >>= 7
    return out + bytes([n])


def id_bytes(ids):
    return struct.pack(f"<{len(ids)}I", *ids)


def expect_string(t, s):
    ids = t.encode(s, add_special_tokens=False).ids
    out = varint(len(ids) + 1) + b"".join(map(varint, ids)) if len(ids) <= MAX_LISTED else \
        b"\0" + struct.pack("<I", zlib.crc32(id_bytes(ids)))
    whole = t.encode(s, add_special_tokens=True).ids
    t.encode_special_tokens = True
    ordinary = t.encode(s, add_special_tokens=False).ids
    t.encode_special_tokens = False
    crc = zlib.crc32(id_bytes(whole))
    crc = zlib.crc32(id_bytes(ordinary), crc)
    crc = zlib.crc32(t.decode(whole, skip_special_tokens=False).encode(), crc)
    crc = zlib.crc32(t.decode(whole, skip_special_tokens=True).encode(), crc)
    return out + struct.pack("<I", crc)


def code_point_blocks():
    """Each assigned plane, BLOCK code points at a time, each between a letter, a digit and spaces."""
    for plane in PLANES:
        for first in range(plane << 16, (plane + 1) << 16, BLOCK):
            points = [c for c in range(first, first + BLOCK) if not 0xD800 <= c <= 0xDFFF]
            if points:
                yield "".join(f"a{chr(c)}b {chr(c)}1" for c in points)


class Lcg:
    """Knuth's MMIX generator, the upper half of each state; test_tokenizer.c has the same."""

    def __init__(self, seed):
        self.state = seed

    def next(self):
        self.state = (self.state * 6364136223846793005 + 1442695040888963407) % 2 ** 64
        return self.state >> 32


def expect_sequence(t, size, seed):
    g = Lcg(seed)
    ids = []
    for _ in range(g.next() % 40):
        span = 300 if g.next() % 3 else size + 2
        ids.append(g.next() % min(span, size + 2))
    crc = 0
    for skip in (False, True):
        crc = zlib.crc32(t.decode(ids, skip_special_tokens=skip).encode(), crc)
    return struct.pack("<I", crc)


def main():
    strings = all_strings()
    with open(os.path.join(HERE, "strings.bin"), "wb") as f:
        f.write(varint(len(strings)))
        for s in strings:
            data = s.encode()
            f.write(varint(len(data)) + data)
    blocks = list(code_point_blocks())
    total = os.path.getsize(os.path.join(HERE, "strings.bin"))
    for name, build in FAMILIES.items():
        text = json.dumps(build(), ensure_ascii=False, separators=(",", ":")).replace('],["', '],\n["')
        t = Tokenizer.from_str(text)
        size = max(t.get_vocab().values()) + 1
        with open(os.path.join(HERE, name + ".json"), "w", encoding="utf-8") as f:
            f.write(text + "\n")
        with open(os.path.join(HERE, name + ".bin"), "wb") as f:
            for s in strings:
                f.write(expect_string(t, s))
            for s in blocks:
                f.write(struct.pack("<I", zlib.crc32(id_bytes(t.encode(s, add_special_tokens=False).ids))))
            for i in range(SEQUENCES):
                f.write(expect_sequence(t, size, 1000 + i))
        total += sum(os.path.getsize(os.path.join(HERE, name + e)) for e in (".json", ".bin"))
        print(name, "vocabulary", size)
    print(len(strings), "strings,", total, "bytes")


if __name__ == "__main__":
    main()
