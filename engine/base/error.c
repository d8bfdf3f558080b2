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

/* A text that was cut may end in half a character: take that away. */
static void trim(char *text)
{
    size_t n = strlen(text), start = n;
    for (int back = 0; back < 3 && start && (text[start - 1] & 0xc0) == 0x80; back++)
        start--;
    if (start && (unsigned char)text[start - 1] >= 0xc0 &&
        utf8_next(text + start - 1, n - start + 1) == 0)
        text[start - 1] = '\0';
}

static void fill(struct error *err, enum status status, const char *field, const char *format,
                 va_list args)
{
    err->status = status;
    snprintf(err->field, sizeof(err->field), "%s", field);
    vsnprintf(err->text, sizeof(err->text), format, args);
    trim(err->field);
    trim(err->text);
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
    trim(prefix);
    memcpy(text, err->text, sizeof(text));
    int room = (int)(sizeof(text) - strlen(prefix) - sizeof(": "));
    snprintf(err->text, sizeof(err->text), "%s: %.*s", prefix, room, text);
    trim(err->text);
    return err->status;
}

void check_failed(const char *condition, const char *file, int line)
{
    fprintf(stderr, "%s:%d: check failed: %s\n", file, line, condition);
    abort();
}
