/* utf8.h - decoding and checking UTF-8 (RFC 3629: no surrogates, no overlong forms).
 *
 * Threads: no state. Memory: none. Errors: by return value.
 */
#ifndef LATTE_BASE_UTF8_H
#define LATTE_BASE_UTF8_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Decode the character at text[0..n). Returns its length 1..4 and sets *code_point, or 0 when
 * n is 0 or the bytes there are no valid character. */
int utf8_decode(const char *text, size_t n, uint32_t *code_point);

/* Encode a scalar value into out[4]; returns the length. */
int utf8_encode(uint32_t code_point, char *out);

/* The offset of the first invalid byte, n when all is valid. */
size_t utf8_valid_prefix(const char *text, size_t n);

/* What stands at text[0..n): the length of a valid character (1..4), 0 when the bytes are a
 * correct beginning of a character that more bytes could complete, or -k when the first k
 * bytes (1..3) are a maximal ill-formed part, to be replaced by one U+FFFD as Unicode
 * recommends (and as Python and Rust do). n is at least 1. */
int utf8_next(const char *text, size_t n);

#endif
