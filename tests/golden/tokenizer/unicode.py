#!/usr/bin/env python3
"""Writes weights/tokenizer_unicode.c: the code points that the `tokenizers` package puts in a
character class and PCRE2 (Unicode 14 tables) does not, and those its NFC does not know.

    python tests/golden/tokenizer/unicode.py > weights/tokenizer_unicode.c

Every code point is asked. Needs `tokenizers` and libpcre2-8 10.42.
"""
import ctypes
import sys
import unicodedata

import tokenizers
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

POINTS = [c for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]
pcre2 = ctypes.CDLL("libpcre2-8.so.0")
for name in ("pcre2_compile_8", "pcre2_match_data_create_8"):
    getattr(pcre2, name).restype = ctypes.c_void_p
UTF, UCP = 0x00080000, 0x00020000


def pcre2_class(pattern):
    code_error, offset = ctypes.c_int(), ctypes.c_size_t()
    code = ctypes.c_void_p(pcre2.pcre2_compile_8(
        pattern.encode(), ctypes.c_size_t(len(pattern)), UTF | UCP, ctypes.byref(code_error),
        ctypes.byref(offset), None))
    data = ctypes.c_void_p(pcre2.pcre2_match_data_create_8(1, None))
    found = set()
    for c in POINTS:
        text = chr(c).encode()
        if pcre2.pcre2_match_8(code, text, ctypes.c_size_t(len(text)), ctypes.c_size_t(0), 0,
                               data, None) >= 0:
            found.add(c)
    return found


def regex_class(pattern):
    erase, found = normalizers.Replace(Regex(pattern), ""), set()
    for i in range(0, len(POINTS), 4096):
        block = POINTS[i:i + 4096]
        found |= set(block) - set(map(ord, erase.normalize_str("".join(map(chr, block)))))
    return found


def digit_class():
    digits = pre_tokenizers.Digits(individual_digits=False)
    return {c for c in POINTS if len(digits.pre_tokenize_str("a" + chr(c))) == 2}


def word_class():
    t = Tokenizer(models.BPE({"a": 0}, []))
    t.add_tokens([tokenizers.AddedToken("X", single_word=True, normalized=False)])
    return {c for c in POINTS if t.token_to_id("X") not in t.encode("X" + chr(c)).ids}


def nfc_unknown():
    """Code points that this package's NFC treats as unassigned: the marks of a later Unicode
    than its tables, which to it are starters that compose with nothing."""
    nfc, marks = normalizers.NFC(), {}
    for c in POINTS:
        k = unicodedata.ucd_3_2_0.combining(chr(c))
        if k and k == unicodedata.combining(chr(c)):
            marks.setdefault(k, chr(c))
    every = "".join(marks[k] for k in sorted(marks))
    bad = set()
    for c in POINTS:
        s = chr(c)
        for t in ("q" + s + every, "q" + every + s, "A" + s + "\u0301"):
            if nfc.normalize_str(t) != unicodedata.normalize("NFC", t):
                bad.add(c)
    for c in POINTS:  # pairs that compose in later versions only
        d = unicodedata.decomposition(chr(c))
        if d and d[0] != "<":
            pair = "".join(chr(int(x, 16)) for x in d.split())
            if nfc.normalize_str(pair) != unicodedata.normalize("NFC", pair):
                bad |= {c} | set(map(ord, pair))
    # Unicode 15 and 16, for newer libraries: marks and parts of new compositions.
    newer = [(0x897, 0x897), (0x105C0, 0x105F3), (0x10D69, 0x10D6D), (0x10EFC, 0x10EFF),
             (0x11380, 0x113E2), (0x11F41, 0x11F42), (0x16100, 0x16139), (0x16D40, 0x16D6C),
             (0x1E08F, 0x1E08F), (0x1E4EC, 0x1E4EF), (0x1E5EE, 0x1E5EF)]
    for low, high in newer:
        bad |= set(range(low, high + 1))
    return bad


def ranges(points):
    out = []
    for c in sorted(points):
        if out and out[-1][1] == c - 1:
            out[-1][1] = c
        else:
            out.append([c, c])
    return out


def as_class(points):
    text = "".join(f"\\\\x{{{a:X}}}" + (f"-\\\\x{{{b:X}}}" if b > a else "")
                   for a, b in ranges(points))
    lines, line = [], ""
    for part in text.replace("\\\\x", "\0\\\\x").replace("-\0", "-").split("\0")[1:]:
        if len(line) + len(part) > 80:
            lines.append(line)
            line = ""
        line += part
    return "\n     ".join(f'"{s}"' for s in lines + [line])


def main():
    names = ["L", "Lu", "Ll", "Lt", "Lm", "Lo", "M", "N", "P", "S", "Z"]
    print(f"""/* tokenizer_unicode.c - where Unicode tables differ; made by tests/golden/tokenizer/unicode.py.
 *
 * The reference, the `tokenizers` package (here {tokenizers.__version__}), knows Unicode 16 in its patterns, 17 in
 * Digits, and 9 in NFC; PCRE2 10.42 knows 14 and utf8proc 15. Each list holds what the reference
 * has on top of PCRE2's class; nothing needs to be taken away, so a newer PCRE2 changes nothing.
 */
#include "weights/tokenizer_internal.h"

const struct unicode_class tokenizer_classes[] = {{""")
    for name in names:
        p = pcre2_class(f"\\p{{{name}}}")
        r = regex_class(f"\\p{{{name}}}")
        assert not p - r, name
        print(f'    {{"{name}",\n     {as_class(r - p)}}},')
    print("    {NULL, NULL}};\n")
    numbers = digit_class()
    p = pcre2_class("\\p{N}")
    assert not p - numbers
    print(f'const char tokenizer_digit_class[] =\n     "[\\\\p{{N}}"\n     {as_class(numbers - p)}\n     "]";\n')
    base = "[\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\p{Join_Control}]"
    words, p = word_class(), pcre2_class(base)
    assert not p - words
    print('const char tokenizer_word_class[] =\n     "' + base[:-1].replace("\\", "\\\\") +
          f'"\n     {as_class(words - p)}\n     "]";\n')
    print("const struct code_range tokenizer_nfc_unknown[] = {")
    for a, b in ranges(nfc_unknown()):
        print(f"    {{0x{a:X}, 0x{b:X}}},")
    print("    {0, 0}};")


if __name__ == "__main__":
    sys.exit(main())
