/* bytes.h - a growing byte buffer for text that is being built.
 *
 * Appending never needs a check at each call: a failure (out of memory, or the limit) is
 * remembered in `failed`, later appends do nothing, and the caller looks once at the end.
 *
 * Threads: one at a time.
 * Memory:  owns data; bytes_free releases it. A zeroed struct is an empty buffer without limit.
 */
#ifndef LATTE_BASE_BYTES_H
#define LATTE_BASE_BYTES_H

#include <stdbool.h>
#include <stddef.h>

struct bytes {
    char *data;   /* [n], followed by a zero byte whenever data is not NULL */
    size_t n;     /* bytes in use */
    size_t cap;   /* bytes allocated */
    size_t limit; /* most bytes ever held, 0 for no limit */
    bool failed;  /* an append was lost */
};

void bytes_append(struct bytes *b, const void *data, size_t n);
void bytes_text(struct bytes *b, const char *text); /* zero-terminated */
void bytes_char(struct bytes *b, char c);
void bytes_format(struct bytes *b, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* A JSON string with its quotes. text must be valid UTF-8; control characters are escaped. */
void bytes_json_string(struct bytes *b, const char *text, size_t n);

/* The same for text that may be anything: each ill-formed part of it becomes one U+FFFD. */
void bytes_json_lossy(struct bytes *b, const char *text, size_t n);

/* A finite double or float as the shortest JSON number that reads back equal; null otherwise. */
void bytes_json_number(struct bytes *b, double value);

/* Drop the first n bytes. */
void bytes_consume(struct bytes *b, size_t n);

void bytes_free(struct bytes *b);

#endif
