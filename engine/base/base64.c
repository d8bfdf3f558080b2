/* base64.c - see base64.h */
#include "engine/base/base64.h"

#include <stdint.h>

static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

enum { BLOCK = 3072 }; /* bytes encoded or decoded between two appends, of whole groups */

size_t base64_length(size_t n)
{
    return (n + 2) / 3 * 4;
}

static void encode_group(const unsigned char *in, size_t n, char out[4])
{
    uint32_t bits = (uint32_t)in[0] << 16;
    bits |= n > 1 ? (uint32_t)in[1] << 8 : 0;
    bits |= n > 2 ? in[2] : 0;
    out[0] = digits[bits >> 18];
    out[1] = digits[bits >> 12 & 63];
    out[2] = n > 1 ? digits[bits >> 6 & 63] : '=';
    out[3] = n > 2 ? digits[bits & 63] : '=';
}

void base64_encode(const void *data, size_t n, struct bytes *out)
{
    const unsigned char *in = data;
    char text[BLOCK / 3 * 4];
    while (n) {
        size_t n_block = n < BLOCK ? n : BLOCK, n_text = 0;
        for (size_t i = 0; i < n_block; i += 3, n_text += 4)
            encode_group(in + i, n_block - i, text + n_text);
        bytes_append(out, text, n_text);
        in += n_block;
        n -= n_block;
    }
}

/* What a digit is worth plus one; 0 for what is none. */
static void fill_values(unsigned char values[256])
{
    for (int i = 0; i < 256; i++)
        values[i] = 0;
    for (int i = 0; i < 64; i++)
        values[(unsigned char)digits[i]] = (unsigned char)(i + 1);
}

static enum status wrong(size_t at, char found, struct error *err)
{
    if (found > ' ' && found < 0x7f)
        return fail(err, STATUS_INVALID, "expected base64, found '%c' as character %zu", found,
                    at + 1);
    return fail(err, STATUS_INVALID, "expected base64, found the byte 0x%02x as character %zu",
                (unsigned char)found, at + 1);
}

/* The last group, of n = 2 or 3 digits and padding. */
static enum status decode_end(const char *text, size_t at, size_t n,
                              const unsigned char values[256], struct bytes *out, struct error *err)
{
    uint32_t bits = 0;
    for (size_t i = 0; i < n; i++) {
        unsigned char value = values[(unsigned char)text[at + i]];
        if (!value)
            return wrong(at + i, text[at + i], err);
        bits |= (uint32_t)(value - 1) << (18 - 6 * i);
    }
    if (bits & (n == 2 ? 0xffff : 0xff))
        return fail(err, STATUS_INVALID,
                    "expected base64, found bits behind the last byte, in character %zu", at + n);
    const unsigned char last[2] = {(unsigned char)(bits >> 16), (unsigned char)(bits >> 8)};
    bytes_append(out, last, n - 1);
    return STATUS_OK;
}

enum status base64_decode(const char *text, size_t n, struct bytes *out, struct error *err)
{
    unsigned char values[256], block[BLOCK] = {0};
    size_t n_block = 0, at = 0;
    fill_values(values);
    if (n % 4)
        return fail(err, STATUS_INVALID,
                    "expected base64, padded to a multiple of 4 characters, found %zu characters",
                    n);
    size_t padding = n && text[n - 1] == '=' ? 1 + (text[n - 2] == '=') : 0;
    size_t end = padding ? n - 4 : n;
    for (; at < end; at += 4) {
        uint32_t bits = 0;
        for (size_t i = 0; i < 4; i++) {
            unsigned char value = values[(unsigned char)text[at + i]];
            if (!value)
                return wrong(at + i, text[at + i], err);
            bits = bits << 6 | (uint32_t)(value - 1);
        }
        block[n_block++] = (unsigned char)(bits >> 16);
        block[n_block++] = (unsigned char)(bits >> 8);
        block[n_block++] = (unsigned char)bits;
        if (n_block == BLOCK) {
            bytes_append(out, block, n_block);
            n_block = 0;
        }
    }
    bytes_append(out, block, n_block);
    enum status st = padding ? decode_end(text, at, 4 - padding, values, out, err) : STATUS_OK;
    if (!st && out->failed)
        st = fail(err, STATUS_NOMEM, "out of memory for %zu characters of base64", n);
    return st;
}
