/* error.c - see error.h */
#include "engine/base/error.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *status_name(enum status status)
{
    static const char *const names[] = {
#define X(code, name) name,
        STATUS_LIST(X)
#undef X
    };
    return status < STATUS_COUNT ? names[status] : "unknown";
}

static void fill(struct error *err, enum status status, const char *field, const char *format,
                 va_list args)
{
    err->status = status;
    snprintf(err->field, sizeof(err->field), "%s", field);
    vsnprintf(err->text, sizeof(err->text), format, args);
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

enum status fail_field(struct error *err, enum status status, const char *field,
                       const char *format, ...)
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
    char prefix[sizeof(err->text)];
    va_list args;
    va_start(args, format);
    vsnprintf(prefix, sizeof(prefix), format, args);
    va_end(args);
    char text[sizeof(err->text)];
    snprintf(text, sizeof(text), "%s: %.*s", prefix,
             (int)(sizeof(text) - 3 - strnlen(prefix, sizeof(text) - 4)), err->text);
    memcpy(err->text, text, sizeof(text));
    return err->status;
}

void check_failed(const char *condition, const char *file, int line)
{
    fprintf(stderr, "%s:%d: check failed: %s\n", file, line, condition);
    abort();
}
