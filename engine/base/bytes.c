/* bytes.c - see bytes.h */
#include "engine/base/bytes.h"

#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/utf8.h"

/* Make room for n more bytes and a terminator. */
static bool reserve(struct bytes *b, size_t n)
{
    if (b->failed)
        return false;
    if (n > SIZE_MAX / 4 - b->n || (b->limit && n > b->limit - b->n)) {
        b->failed = true;
        return false;
    }
    size_t need = b->n + n + 1;
    if (need <= b->cap)
        return true;
    size_t cap = b->cap ? b->cap : 64;
    while (cap < need)
        cap *= 2;
    char *data = realloc(b->data, cap);
    if (!data) {
        b->failed = true;
        return false;
    }
    b->data = data;
    b->cap = cap;
    return true;
}

void bytes_append(struct bytes *b, const void *data, size_t n)
{
    if (!reserve(b, n))
        return;
    if (n)
        memcpy(b->data + b->n, data, n);
    b->n += n;
    b->data[b->n] = '\0';
}

void bytes_text(struct bytes *b, const char *text)
{
    bytes_append(b, text, strlen(text));
}

void bytes_char(struct bytes *b, char c)
{
    bytes_append(b, &c, 1);
}

void bytes_format(struct bytes *b, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    int n = vsnprintf(NULL, 0, format, args);
    va_end(args);
    if (n < 0 || !reserve(b, (size_t)n)) {
        b->failed = true;
        return;
    }
    va_start(args, format);
    vsnprintf(b->data + b->n, (size_t)n + 1, format, args);
    va_end(args);
    b->n += (size_t)n;
}

static void escape(struct bytes *b, unsigned char c)
{
    switch (c) {
    case '"':
        bytes_append(b, "\\\"", 2);
        break;
    case '\\':
        bytes_append(b, "\\\\", 2);
        break;
    case '\n':
        bytes_append(b, "\\n", 2);
        break;
    case '\r':
        bytes_append(b, "\\r", 2);
        break;
    case '\t':
        bytes_append(b, "\\t", 2);
        break;
    default:
        bytes_format(b, "\\u%04x", c);
    }
}

static void append_escaped(struct bytes *b, const char *text, size_t n)
{
    size_t start = 0;
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)text[i];
        if (c >= 0x20 && c != '"' && c != '\\' && c != 0x7f)
            continue;
        bytes_append(b, text + start, i - start);
        escape(b, c);
        start = i + 1;
    }
    bytes_append(b, text + start, n - start);
}

void bytes_json_string(struct bytes *b, const char *text, size_t n)
{
    bytes_char(b, '"');
    append_escaped(b, text, n);
    bytes_char(b, '"');
}

void bytes_json_lossy(struct bytes *b, const char *text, size_t n)
{
    bytes_char(b, '"');
    for (size_t at = 0; at < n;) {
        size_t sound = utf8_valid_prefix(text + at, n - at);
        append_escaped(b, text + at, sound);
        at += sound;
        if (at == n)
            break;
        int length = utf8_next(text + at, n - at); /* 0: a character cut off by the end */
        at += length ? (size_t)-length : n - at;
        bytes_text(b, "\xEF\xBF\xBD");
    }
    bytes_char(b, '"');
}

void bytes_json_number(struct bytes *b, double value)
{
    if (!isfinite(value)) {
        bytes_text(b, "null");
        return;
    }
    char text[32];
    for (int digits = 6; digits <= 17; digits++) {
        snprintf(text, sizeof(text), "%.*g", digits, value);
        if (strtod(text, NULL) == value)
            break;
    }
    bytes_text(b, text);
}

void bytes_consume(struct bytes *b, size_t n)
{
    if (n >= b->n) {
        b->n = 0;
        return;
    }
    memmove(b->data, b->data + n, b->n - n);
    b->n -= n;
}

void bytes_free(struct bytes *b)
{
    free(b->data);
    *b = (struct bytes){.limit = b->limit};
}
