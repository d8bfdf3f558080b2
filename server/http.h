/* http.h - HTTP/1.1 over libmicrohttpd: sockets, limits, authentication, replies, streams.
 *
 * One io thread owns an external-epoll daemon and everything in this file. Its loop waits for
 * the daemon's epoll fd, one eventfd (written by http_notify from any thread), the sockets of
 * requests in progress (hang-up watch) and a timer. A handler is called once per request, on
 * the io thread, when the whole body is there. It replies at once, or defers and replies
 * later from on_notify or a worker's completion, or starts a stream whose source the loop
 * pulls; a source with nothing to say is parked until http_wake.
 *
 * What never reaches a handler: over-long or smuggled requests, bodies over the limit (413),
 * unknown paths (404) and methods (405 with Allow), a body of another type than JSON (415),
 * a missing or wrong API key (401), requests beyond the connection limit (503). Each is
 * answered with OpenAI's error object. OPTIONS is answered here too.
 *
 * Every request's header is looked at as raw bytes before the library reads it. A client that
 * sends a request without waiting for the reply to the one before (pipelining) is answered, when
 * its bytes can no longer be looked at, with "Connection: close" or a closed connection, and
 * sends it again. After a refusal for what a header says about the body the connection is
 * closed, and so it is after every chunked body, on whose framing two readers might disagree. A
 * chunked body that goes on for its limit once more is cut off unanswered;
 * one that announces its length is refused at once.
 *
 * Threads: http_notify by any thread; http_open, http_close by main; the rest by the io thread.
 * Memory:  a request's arena holds what belongs to it and is released when it completes.
 */
#ifndef LATTE_SERVER_HTTP_H
#define LATTE_SERVER_HTTP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "engine/base/arena.h"
#include "engine/base/bytes.h"
#include "engine/base/error.h"
#include "server/options.h"

struct http_server;
struct http_request; /* one request on a connection; valid until its on_close has returned */

typedef void http_handler(struct http_request *r, void *context);

enum http_route_flags {
    HTTP_ROUTE_OPEN = 1, /* needs no API key */
    HTTP_ROUTE_JSON =
        2, /* POST with a JSON body: 415 on another Content-Type, 411 without length */
    HTTP_ROUTE_SLASHES = 4, /* the parameter is the rest of the path, slashes too */
    HTTP_ROUTE_STATE = 8,   /* the body is an exported state, or JSON with one as base64: its
                             * limit follows from http_set_state_bytes */
};

/* A path may have one parameter, a segment of it, percent-decoded: "/v1/sessions/{id}/fork".
 * GET routes answer HEAD as well. */
struct http_route {
    const char *method; /* "GET", "POST" */
    const char *path;
    unsigned flags;
    http_handler *handler;
};

struct http_config {
    const struct options *options;
    const struct http_route *routes; /* [n_routes], borrowed */
    size_t n_routes;
    void *context;                    /* given to handlers, on_notify and on_tick */
    void (*on_notify)(void *context); /* io thread, after http_notify calls; may coalesce them */
    void (*on_tick)(void *context);   /* io thread, about once a second */
};

/* Read the keys, listen. Nothing is answered before http_start starts the io thread. */
enum status http_open(struct http_server **out, const struct http_config *config,
                      struct error *err);
enum status http_start(struct http_server *s, struct error *err);
/* The size of an exported state. A body that is one may be so long, and a little longer, so that
 * it is told what is wrong with it; JSON with one may exceed --max-body-mb by its base64. Any
 * thread. */
void http_set_state_bytes(struct http_server *s, size_t n_bytes);
/* The port that is listened on (0 for a unix socket). */
int http_port(const struct http_server *s);
/* Read --tls-cert and --tls-key again, for the connections that come; does nothing without
 * them. After an error the certificate in use stays. Main. */
enum status http_reload(struct http_server *s, struct error *err);
/* "http://127.0.0.1:8080", "https://[::1]:8080" or "unix:/run/latte.sock". */
const char *http_url(const struct http_server *s);
/* Stop accepting connections; those open go on. Any thread. */
void http_drain(struct http_server *s);
/* Requests that are not finished yet. Any thread. */
int http_n_active(const struct http_server *s);
int http_n_connections(const struct http_server *s);
/* End what is left (every on_close is called, as not delivered) and stop the io thread.
 * http_notify may still be called, and does nothing. */
void http_stop(struct http_server *s);
/* Stop if that was not done, release. Accepts NULL. No thread may notify any more. */
void http_close(struct http_server *s);
/* Make the io thread call on_notify soon. Any thread, also a signal handler's. */
void http_notify(struct http_server *s);

/* The request. Strings are borrowed for the request's life. */
const char *http_method(const struct http_request *r);
const char *http_route(const struct http_request *r); /* the pattern that matched */
const char *http_param(const struct http_request *r); /* value of {id}, or NULL */
const char *http_query(const struct http_request *r, const char *key);   /* or NULL */
const char *http_header(const struct http_request *r, const char *name); /* or NULL */
const char *http_body(const struct http_request *r, size_t *n);
/* Free the body before the request ends: the memory of all bodies together is bounded by
 * --max-buffered-mb, and a stream may live long. */
void http_drop_body(struct http_request *r);
/* Count n_bytes more that the request holds (its prompts' tokens, say) against
 * --max-buffered-mb, until it completes. False, and nothing is counted, when that is too much. */
bool http_charge(struct http_request *r, size_t n_bytes);
/* What is charged outlives the request: returns how much, for http_uncharge. */
size_t http_keep_charge(struct http_request *r);
void http_uncharge(struct http_server *s, size_t n_bytes);
/* The body becomes the caller's, and counts until the request ends. */
void http_take_body(struct http_request *r, struct bytes *out);
struct arena *http_arena(struct http_request *r);
const char *
http_request_id(const struct http_request *r);    /* the client's X-Request-Id if sane, else ours */
int http_key_index(const struct http_request *r); /* which API key, -1 when the API is open */
bool http_is_admin(const struct http_request *r); /* an admin key, or --open-admin without keys */
/* The API keys of a server, and a tag of one that is the same for the same key and secret. */
enum { HTTP_TAG_SECRET_BYTES = 192, HTTP_TAG_BYTES = 16 };
int http_n_keys(const struct http_server *s);
void http_tag_key(const struct http_server *s, int key_index,
                  const uint8_t secret[HTTP_TAG_SECRET_BYTES], uint8_t out[HTTP_TAG_BYTES]);
int64_t http_arrival_ns(const struct http_request *r); /* CLOCK_MONOTONIC */

/* What goes to the access log: -1 unless told. */
void http_note_tokens(struct http_request *r, int64_t prompt_tokens, int64_t output_tokens);

/* Called once when the request is over, whatever the way: delivered tells whether all of the
 * reply was handed to the kernel. One such function per request: a later one takes its place, NULL
 * is none. */
void http_on_close(struct http_request *r, void (*fn)(void *context, bool delivered),
                   void *context);

/* Reply with a whole body (copied unless it is in the arena or static: see take). Headers set
 * before with http_set_header go along. Exactly one of reply, fail and stream per request; they
 * may be called from the handler, or later on the io thread after http_defer. */
void http_set_header(struct http_request *r, const char *name, const char *value);
void http_reply(struct http_request *r, int code, const char *content_type, const char *body,
                size_t n);
/* The same, taking over the buffer's memory. */
void http_reply_take(struct http_request *r, int code, const char *content_type,
                     struct bytes *body);
/* OpenAI's error object for an error of ours; code (OpenAI's "code") may be NULL. BUSY adds
 * Retry-After. */
void http_fail(struct http_request *r, const struct error *err, const char *code);
/* Its body: the same bytes. code NULL: the status's own. */
void http_fail_json(struct bytes *out, int http_code, const char *message, const char *param,
                    const char *code);
/* The same for a status that no error of ours maps to. */
void http_fail_as(struct http_request *r, int http_code, const char *message, const char *param,
                  const char *code);

/* No reply yet: suspend the connection. A hang-up meanwhile ends the request (on_close). A
 * client that shuts down its sending side counts as gone: a closed socket looks the same. */
void http_defer(struct http_request *r);

/* A body that is produced piece by piece, sent chunked.
 * read: io thread; put up to max bytes in out. Returns the count, HTTP_SOURCE_PARK when there
 * is nothing now (the source is called again after http_wake), HTTP_SOURCE_END at the end, or
 * HTTP_SOURCE_ABORT to cut the connection. Whoever made read park must call http_wake later.
 *
 * A parked text/event-stream whose output so far is empty or ends with an empty line (between
 * two events, that is) is sent the comment ": keep-alive" every --keepalive-interval. */
enum { HTTP_SOURCE_PARK = 0, HTTP_SOURCE_END = -1, HTTP_SOURCE_ABORT = -2 };
typedef ssize_t http_source_read(void *context, char *out, size_t max);
void http_stream(struct http_request *r, int code, const char *content_type, http_source_read *read,
                 void *context);

/* Resume a parked stream; harmless when it is not parked. */
void http_wake(struct http_request *r);

/* OpenAI's error object as JSON: {"error":{"message","type","param","code"}}. */
void http_error_json(struct bytes *out, int http_code, const char *message, const char *param,
                     const char *code);
/* The HTTP status an error of ours maps to. */
int http_status_of(enum status status);

/* The other side, for health checks: ask the server that these options are of, on its address,
 * port or unix socket, for /health/ready, and wait a few seconds. OK: it answered 200. Otherwise
 * IO, or INVALID for port 0; the text says what was found. */
enum status http_healthcheck(const struct options *o, struct error *err);

#endif
