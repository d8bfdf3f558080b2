/* error.c - see error.h */
#include "engine/base/error.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/utf8.h"

const char *status_name(enum status status)
{
    static const char *const names[] = {
#define X(code, name) name,
        STATUS_LIST(X)
#undef X
    };
    return status < STATUS_COUNT ? names[status] : "unknown";
}

/* What is no UTF-8 is left out: a character that the end of the text cut in half, or a format's
 * precision within it, or bytes that somebody sent. */
static void mend(char *text)
{
    size_t n = strlen(text), to = 0;
    for (size_t at = 0; at < n;) {
        int length = utf8_next(text + at, n - at);
        size_t step = length > 0 ? (size_t)length : length ? (size_t)-length : n - at;
        if (length > 0) {
            memmove(text + to, text + at, step);
            to += step;
        }
        at += step;
    }
    text[to] = '\0';
}

static void fill(struct error *err, enum status status, const char *field, const char *format,
                 va_list args)
{
    err->status = status;
    snprintf(err->field, sizeof(err->field), "%s", field);
    vsnprintf(err->text, sizeof(err->text), format, args);
    mend(err->field);
    mend(err->text);
}

enum status fail(struct error *err, enum status status, const char *format, ...)
{
    if (err) {
        va_list args;
        va_start(args, format);
        fill(err, status, "", format, args);
        va_end(args);
    }
    return status;
}

enum status fail_field(struct error *err, enum status status, const char *field, const char *format,
                       ...)
{
    if (err) {
        va_list args;
        va_start(args, format);
        fill(err, status, field, format, args);
        va_end(args);
    }
    return status;
}

enum status fail_context(struct error *err, const char *format, ...)
{
    if (!err)
        return STATUS_INTERNAL;
    char prefix[sizeof(err->text) / 2]; /* a long path must not push out the reason */
    char text[sizeof(err->text)];
    va_list args;
    va_start(args, format);
    vsnprintf(prefix, sizeof(prefix), format, args);
    va_end(args);
    mend(prefix);
    memcpy(text, err->text, sizeof(text));
    int room = (int)(sizeof(text) - strlen(prefix) - sizeof(": "));
    snprintf(err->text, sizeof(err->text), "%s: %.*s", prefix, room, text);
    mend(err->text);
    return err->status;
}

void check_failed(const char *condition, const char *file, int line)
{
    fprintf(stderr, "%s:%d: check failed: %s\n", file, line, condition);
    abort();
}
