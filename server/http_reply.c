/* http_reply.c - replies, refusals and streams; see http.h. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <microhttpd.h>

#include "server/http_private.h"
#include "server/log.h"

enum {
    DRAIN_BYTES = 64 * 1024,   /* a refused body up to this is read to keep the connection */
    STREAM_BLOCK_BYTES = 4096, /* for clients without chunked encoding */
};

static const char comment[] = ": keep-alive\n\n";

static void add_header(struct MHD_Response *response, const char *name, const char *value)
{
    if (MHD_add_response_header(response, name, value) != MHD_YES)
        log_event(LOG_WARN, "http", "the header %s could not be added to a reply", name);
}

static void add_cors_headers(const struct http_request *r, struct MHD_Response *response)
{
    const char *origin = r->server->options.cors_origin;
    if (!origin)
        return;
    add_header(response, "Access-Control-Allow-Origin", origin);
    add_header(response, "Access-Control-Expose-Headers",
               "X-Request-Id, Retry-After, ETag, X-Stream-Id, Idempotent-Replayed");
    if (strcmp(origin, "*"))
        add_header(response, "Vary", "Origin");
}

/* From now on the request has its answer; it is queued in on_request. */
static void answer(struct http_request *r, int code, const char *content_type,
                   struct MHD_Response *response)
{
    CHECK(!r->code);
    r->code = code;
    r->closes |= atomic_load(&r->server->draining);
    if (!response) { /* out of memory: all that is left is to hang up */
        r->gone = true;
    } else {
        if (content_type)
            add_header(response, "Content-Type", content_type);
        add_header(response, "X-Request-Id", r->id);
        add_cors_headers(r, response);
        for (int i = 0; i < r->n_headers; i++)
            add_header(response, r->headers[i].name, r->headers[i].value);
        if (r->closes)
            add_header(response, "Connection", "close");
        r->response = response;
    }
    request_resume(r);
}

void http_set_header(struct http_request *r, const char *name, const char *value)
{
    CHECK(r->n_headers < MAX_HEADERS);
    const char *kept = arena_copy(&r->arena, value, strlen(value));
    if (kept)
        r->headers[r->n_headers++] = (struct header){name, kept};
}

void http_reply(struct http_request *r, int code, const char *content_type, const char *body,
                size_t n)
{
    r->n_sent = n;
    answer(r, code, content_type,
           MHD_create_response_from_buffer(n, (void *)(uintptr_t)body, MHD_RESPMEM_MUST_COPY));
}

void http_reply_take(struct http_request *r, int code, const char *content_type, struct bytes *body)
{
    if (body->failed) {
        struct error err;
        fail(&err, STATUS_NOMEM, "The server is out of memory.");
        bytes_free(body);
        http_fail(r, &err, NULL);
        return;
    }
    if (!body->data) {
        http_reply(r, code, content_type, "", 0);
        return;
    }
    r->n_sent = body->n;
    struct MHD_Response *response =
        MHD_create_response_from_buffer(body->n, body->data, MHD_RESPMEM_MUST_FREE);
    if (!response)
        bytes_free(body);
    *body = (struct bytes){0};
    answer(r, code, content_type, response);
}

void http_fail_json(struct bytes *out, int http_code, const char *message, const char *param,
                    const char *code)
{
    http_error_json(out, http_code, message, param, code ? code : http_error_code(http_code));
}

void http_fail_as(struct http_request *r, int http_code, const char *message, const char *param,
                  const char *code)
{
    struct bytes json = {0};
    http_fail_json(&json, http_code, message, param, code);
    if (http_code == 429 || http_code == 503 || http_code == 409)
        http_set_header(r, "Retry-After", "1");
    if (json.failed) {
        bytes_free(&json);
        http_reply(r, http_code, "application/json", "{}", 2);
        return;
    }
    http_reply_take(r, http_code, "application/json", &json);
}

void http_fail(struct http_request *r, const struct error *err, const char *code)
{
    http_fail_as(r, http_status_of(err->status), err->text, err->field, code);
}

void http_defer(struct http_request *r)
{
    r->deferred = true;
}

/* A refusal can be said before the body was read, at the price of the connection. Short bodies
 * are read first, so that it can be kept. */
bool refusal_comes_at_once(const struct http_request *r)
{
    const struct http_framing *f = &r->framing;
    return r->code && (f->n_coding || f->length > DRAIN_BYTES || f->expects_continue);
}

void request_refuse(struct http_request *r, int http_code, const char *message)
{
    const struct http_framing *f = &r->framing;
    http_drop_body(r);
    r->closes |= http_code == 411 || f->n_coding || f->length > DRAIN_BYTES || f->expects_continue;
    http_fail_as(r, http_code, message, NULL, NULL);
}

void request_refuse_length(struct http_request *r, size_t limit)
{
    char message[120];
    snprintf(message, sizeof(message),
             "The request body is larger than the %zu bytes that the server accepts here.", limit);
    request_refuse(r, 413, message);
}

/* Streams. */

bool stream_is_between_events(const struct http_request *r)
{
    return !r->n_sent || (r->tail[0] == '\n' && r->tail[1] == '\n');
}

static void note_sent(struct http_request *r, const char *data, size_t n)
{
    r->tail[0] = n > 1 ? data[n - 2] : r->tail[1];
    r->tail[1] = data[n - 1];
    r->n_sent += n;
    r->last_sent_ns = http_now_ns();
}

static ssize_t park(struct http_request *r)
{
    if (r->connection->peer_closed || atomic_load(&r->server->stopping)) {
        r->gone = true;
        return MHD_CONTENT_READER_END_WITH_ERROR;
    }
    r->suspended = true;
    MHD_suspend_connection(r->mhd);
    return 0;
}

/* The library asks for the next piece of a stream. */
static ssize_t read_stream(void *context, uint64_t position, char *out, size_t max)
{
    (void)position;
    struct http_request *r = context;
    if (r->gone)
        return MHD_CONTENT_READER_END_WITH_ERROR;
    if (r->comment_due && max >= sizeof(comment) - 1) {
        r->comment_due = false;
        memcpy(out, comment, sizeof(comment) - 1);
        note_sent(r, out, sizeof(comment) - 1);
        return sizeof(comment) - 1;
    }
    ssize_t n = r->read(r->read_context, out, max);
    if (n == HTTP_SOURCE_PARK)
        return park(r);
    if (n == HTTP_SOURCE_END)
        return MHD_CONTENT_READER_END_OF_STREAM;
    if (n < 0)
        return MHD_CONTENT_READER_END_WITH_ERROR;
    CHECK((size_t)n <= max);
    note_sent(r, out, (size_t)n);
    return n;
}

void http_stream(struct http_request *r, int code, const char *content_type, http_source_read *read,
                 void *context)
{
    r->read = read;
    r->read_context = context;
    r->last_sent_ns = http_now_ns();
    r->is_event_stream = !strncmp(content_type, "text/event-stream", 17);
    struct MHD_Response *response = MHD_create_response_from_callback(
        MHD_SIZE_UNKNOWN, STREAM_BLOCK_BYTES, read_stream, r, NULL);
    if (r->is_event_stream) {
        http_set_header(r, "Cache-Control", "no-store");
        http_set_header(r, "X-Accel-Buffering", "no");
    }
    answer(r, code, content_type, response);
}

void http_wake(struct http_request *r)
{
    if (r->read)
        request_resume(r);
}
