/* log.h - one JSON object per line on stderr. Never holds prompts, outputs or keys.
 *
 * Threads: any; a line is written with one write(). Memory: none kept. Errors: ignored.
 */
#ifndef LATTE_SERVER_LOG_H
#define LATTE_SERVER_LOG_H

#include <stdbool.h>
#include <stdint.h>

enum log_level { LOG_DEBUG, LOG_INFO, LOG_WARN, LOG_ERROR };

void log_set_level(enum log_level level);
bool log_enabled(enum log_level level);

/* {"time":..., "level":..., "event":event, "message":formatted text} */
void log_event(enum log_level level, const char *event, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* One finished request. */
struct log_access {
    const char *request_id, *method, *route, *client; /* route: the pattern, not the raw path */
    int status;
    double duration_ms;
    uint64_t bytes_in, bytes_out;
    int64_t prompt_tokens, output_tokens; /* -1: not a generation */
    bool gone;                            /* the client left before the end */
};
void log_request(const struct log_access *line);

#endif
