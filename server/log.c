/* log.c - see log.h */
#include "server/log.h"

#include <math.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "engine/base/bytes.h"

enum { LINE_BYTES = 8192, MESSAGE_BYTES = 2048 };

static const char *const level_names[] = {"debug", "info", "warn", "error"};
static _Atomic int least_level = LOG_INFO;

void log_set_level(enum log_level level)
{
    atomic_store_explicit(&least_level, level, memory_order_relaxed);
}

bool log_enabled(enum log_level level)
{
    return (int)level >= atomic_load_explicit(&least_level, memory_order_relaxed);
}

static void append_member(struct bytes *b, const char *name, const char *value)
{
    bytes_format(b, ",\"%s\":", name);
    bytes_json_lossy(b, value ? value : "", value ? strlen(value) : 0); /* from anywhere */
}

static void begin_line(struct bytes *b, enum log_level level, const char *event)
{
    struct timespec now;
    struct tm utc;
    char text[32];
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &utc);
    strftime(text, sizeof(text), "%Y-%m-%dT%H:%M:%S", &utc);
    bytes_format(b, "{\"time\":\"%s.%03ldZ\",\"level\":\"%s\"", text, now.tv_nsec / 1000000,
                 level_names[level]);
    append_member(b, "event", event);
}

/* One write(), so that lines of several threads do not mix. A line that cannot be built or
 * written is lost: the server goes on. */
static void end_line(struct bytes *b)
{
    bytes_text(b, "}\n");
    if (!b->failed && write(STDERR_FILENO, b->data, b->n) < 0)
        b->failed = true;
    bytes_free(b);
}

void log_event(enum log_level level, const char *event, const char *format, ...)
{
    if (!log_enabled(level))
        return;
    char message[MESSAGE_BYTES];
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof(message), format, args);
    va_end(args);

    struct bytes b = {.limit = LINE_BYTES};
    begin_line(&b, level, event);
    append_member(&b, "message", message);
    end_line(&b);
}

void log_request(const struct log_access *line)
{
    struct bytes b = {.limit = LINE_BYTES};
    begin_line(&b, LOG_INFO, "request");
    append_member(&b, "request_id", line->request_id);
    append_member(&b, "client", line->client);
    append_member(&b, "method", line->method);
    append_member(&b, "route", line->route);
    bytes_format(&b, ",\"status\":%d,\"duration_ms\":", line->status);
    bytes_json_number(&b, round(line->duration_ms * 1000) / 1000);
    bytes_format(&b, ",\"bytes_in\":%llu,\"bytes_out\":%llu", (unsigned long long)line->bytes_in,
                 (unsigned long long)line->bytes_out);
    if (line->prompt_tokens >= 0)
        bytes_format(&b, ",\"prompt_tokens\":%lld", (long long)line->prompt_tokens);
    if (line->output_tokens >= 0)
        bytes_format(&b, ",\"output_tokens\":%lld", (long long)line->output_tokens);
    if (line->gone)
        bytes_text(&b, ",\"client_gone\":true");
    end_line(&b);
}
