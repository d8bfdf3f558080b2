/* http.c - requests and replies; see http.h, and http_private.h for the other files.
 *
 * The owner of libmicrohttpd, which runs inside the io thread (external epoll). A connection is
 * suspended while its request has nothing to send: deferred, or a parked stream. Only the io
 * thread suspends and resumes, so there is no race to think about; what must hold is
 *   - suspend only from the library's callbacks (on_request, read_stream), resume only what is
 *     suspended, and never stop the daemon while anything is: it would abort the process;
 *   - after a hang-up a suspended connection is resumed and its callback returns an error,
 *     which makes the library close it and call on_completed: the one place where requests end.
 */
#include "server/http.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include <microhttpd.h>

#include "server/http_private.h"
#include "server/log.h"
#include "server/metrics.h"

enum {
    POOL_BYTES = 32 * 1024,    /* a connection's memory in the library: headers, not bodies */
    DRAIN_BYTES = 64 * 1024,   /* a refused body up to this is read to keep the connection */
    STREAM_BLOCK_BYTES = 4096, /* for clients without chunked encoding */
    BODY_GRACE_S = 30,         /* a body must come at BODY_RATE bytes/s after this */
    BODY_RATE = 1024,
    SPARE_CONNECTIONS = 64,
};

/* Only the io thread calls the library. From 0.9.77 on it must be told so: a thread-safe daemon
 * queues an added connection for later, and inside_enter relies on its being taken at once. */
#if MHD_VERSION >= 0x00097707
enum { ONE_THREAD = MHD_USE_NO_THREAD_SAFETY };
#else
enum { ONE_THREAD = 0 };
#endif

static const char comment[] = ": keep-alive\n\n";

/* Replies. */

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
    add_header(response, "Access-Control-Expose-Headers", "X-Request-Id, Retry-After");
    if (strcmp(origin, "*"))
        add_header(response, "Vary", "Origin");
}

/* From now on the request has its answer; it is queued in on_request. */
static void answer(struct http_request *r, int code, const char *content_type,
                   struct MHD_Response *response)
{
    CHECK(!r->code);
    r->code = code;
    if (!response) { /* out of memory: all that is left is to hang up */
        r->gone = true;
    } else {
        if (content_type)
            add_header(response, "Content-Type", content_type);
        add_header(response, "X-Request-Id", r->id);
        add_cors_headers(r, response);
        for (int i = 0; i < r->n_headers; i++)
            add_header(response, r->headers[i].name, r->headers[i].value);
        if (atomic_load(&r->server->draining))
            add_header(response, "Connection", "close");
        r->response = response;
    }
    if (r->suspended) {
        r->suspended = false;
        MHD_resume_connection(r->mhd);
    }
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

static void reply_error(struct http_request *r, int http_code, const char *message,
                        const char *param, const char *code)
{
    struct bytes json = {0};
    http_error_json(&json, http_code, message, param, code ? code : http_error_code(http_code));
    if (http_code == 429 || http_code == 503)
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
    reply_error(r, http_status_of(err->status), err->text, err->field, code);
}

void http_defer(struct http_request *r)
{
    r->deferred = true;
}

/* A refusal of this layer: what comes of the body is dropped. */
void request_refuse(struct http_request *r, int http_code, const char *message)
{
    http_drop_body(r);
    reply_error(r, http_code, message, NULL, NULL);
}

/* Streams. */

static bool is_between_events(const struct http_request *r)
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
    if (!r->read || !r->suspended)
        return;
    r->suspended = false;
    MHD_resume_connection(r->mhd);
}

/* The beginning of a request. */

static enum MHD_Result scan_field(void *framing, enum MHD_ValueKind kind, const char *name,
                                  const char *value)
{
    (void)kind;
    value = value ? value : "";
    http_framing_add(framing, name, strlen(name), value, strlen(value));
    return MHD_YES;
}

static struct http_verdict check_framing(struct http_request *r, const char *version)
{
    http_framing_init(&r->framing, !strcmp(version, MHD_HTTP_VERSION_1_0));
    MHD_get_connection_values(r->mhd, MHD_HEADER_KIND, scan_field, &r->framing);
    const union MHD_ConnectionInfo *info =
        MHD_get_connection_info(r->mhd, MHD_CONNECTION_INFO_REQUEST_HEADER_SIZE);
    if (strlen(r->path) > HTTP_TARGET_LIMIT)
        return (struct http_verdict){414, "The request's URL is too long."};
    if (info && info->header_size > HTTP_HEADER_LIMIT)
        return (struct http_verdict){431, "The request's header fields are too large."};
    return http_framing_verdict(&r->framing, r->server->options.max_body_mb << 20);
}

/* The path of "http://host/path" is what follows the host. */
static const char *path_of(const char *url)
{
    if (strncasecmp(url, "http://", 7))
        return url;
    const char *slash = strchr(url + 7, '/');
    return slash ? slash : "/";
}

static struct http_request *request_begin(struct http_server *s, struct MHD_Connection *mhd,
                                          const char *url, const char *method, const char *version)
{
    struct http_request *r = calloc(1, sizeof(*r));
    const union MHD_ConnectionInfo *info =
        MHD_get_connection_info(mhd, MHD_CONNECTION_INFO_SOCKET_CONTEXT);
    if (!r || !info || !info->socket_context || atomic_load(&s->stopping)) {
        free(r);
        return NULL;
    }
    r->server = s;
    r->mhd = mhd;
    r->connection = info->socket_context;
    r->connection->request = r;
    r->connection->deadline_ns = 0;
    r->connection->header_seen = 0;
    arena_init(&r->arena, ((size_t)s->options.max_body_mb << 21) + (1 << 20));
    r->method = method;
    r->path = path_of(url);
    r->key_index = API_KEYS_NONE;
    r->arrival_ns = http_now_ns();
    r->prompt_tokens = r->output_tokens = -1;
    s->n_active++;
    request_choose_id(r);
    struct http_verdict verdict = check_framing(r, version);
    if (verdict.code) {
        http_set_header(r, "Connection", "close");
        request_refuse(r, verdict.code, verdict.message);
    } else {
        request_admit(r);
    }
    return r;
}

/* A refusal can be said before the body was read, at the price of the connection. Short bodies
 * are read first, so that it can be kept. */
static bool answers_at_once(const struct http_request *r)
{
    const struct http_framing *f = &r->framing;
    return r->code && (f->n_coding || f->n_length > 1 || f->bad_length || f->length > DRAIN_BYTES ||
                       f->expects_continue);
}

/* The body. */

void http_drop_body(struct http_request *r)
{
    r->server->buffered_bytes -= r->body.cap;
    bytes_free(&r->body);
}

/* Whether n bytes more fit into what all requests may hold together. */
static bool has_room(const struct http_server *s, size_t n)
{
    size_t all = (size_t)s->options.max_buffered_mb << 20;
    return s->buffered_bytes <= all && n <= all - s->buffered_bytes;
}

bool http_charge(struct http_request *r, size_t n_bytes)
{
    if (!has_room(r->server, n_bytes))
        return false;
    r->charged += n_bytes;
    r->server->buffered_bytes += n_bytes;
    return true;
}

/* Keep n more bytes, or refuse the request: the limit of one body, and of all together. */
static void keep_body(struct http_request *r, const char *data, size_t n)
{
    struct http_server *s = r->server;
    size_t limit = (size_t)s->options.max_body_mb << 20;
    size_t spare = r->body.cap - r->body.n;
    if (n > limit - r->body.n) {
        request_refuse(r, 413, "The request body is larger than the server accepts.");
        return;
    }
    if (!has_room(s, n > spare ? n - spare : 0)) {
        request_refuse(r, 503, "The server is receiving as much as it can hold. Try again later.");
        return;
    }
    size_t before = r->body.cap;
    bytes_append(&r->body, data, n);
    s->buffered_bytes += r->body.cap - before;
    if (r->body.failed)
        request_refuse(r, 503, "The server is out of memory.");
}

/* False: the client sends on and on after it was refused. */
static bool receive(struct http_request *r, const char *data, size_t n)
{
    r->n_received += n;
    if (!r->code) {
        keep_body(r, data, n);
        return true;
    }
    r->n_drained += n;
    return r->n_drained <= (uint64_t)r->server->options.max_body_mb << 20;
}

/* The library's callbacks. */

static enum MHD_Result queue(struct http_request *r)
{
    enum MHD_Result result = MHD_queue_response(r->mhd, (unsigned)r->code, r->response);
    MHD_destroy_response(r->response);
    r->response = NULL;
    return result;
}

static void handle(struct http_request *r)
{
    r->handled = true;
    if (r->code)
        return;
    r->route->handler(r, r->server->config.context);
    CHECK(r->code || r->deferred);
}

/* Called with the header, then with pieces of the body, then without until there is a reply. */
static enum MHD_Result on_request(void *server, struct MHD_Connection *mhd, const char *url,
                                  const char *method, const char *version, const char *upload,
                                  size_t *n_upload, void **context)
{
    struct http_request *r = *context;
    if (!r) {
        *context = r = request_begin(server, mhd, url, method, version);
        if (!r || r->gone)
            return MHD_NO;
        return answers_at_once(r) ? queue(r) : MHD_YES;
    }
    if (r->gone)
        return MHD_NO;
    if (*n_upload) {
        bool goes_on = receive(r, upload, *n_upload);
        *n_upload = 0;
        return goes_on ? MHD_YES : MHD_NO;
    }
    if (!r->handled)
        handle(r);
    if (r->gone)
        return MHD_NO;
    if (r->response)
        return queue(r);
    if (r->connection->peer_closed || atomic_load(&r->server->stopping)) {
        r->gone = true;
        return MHD_NO;
    }
    r->suspended = true;
    MHD_suspend_connection(r->mhd);
    return MHD_YES;
}

static void log_end(const struct http_request *r, bool gone)
{
    const char *route = r->route ? r->route->path : "other";
    metrics_count_request(r->method, route, r->code ? r->code : 499);
    if (gone)
        metrics_add(METRIC_CLIENT_DISCONNECTS, 1);
    if (!r->server->options.access_log)
        return;
    log_request(&(struct log_access){
        .request_id = r->id,
        .method = r->method,
        .route = route,
        .client = r->connection->client,
        .status = r->code ? r->code : 499,
        .duration_ms = (double)(http_now_ns() - r->arrival_ns) * 1e-6,
        .bytes_in = r->n_received,
        .bytes_out = r->n_sent,
        .prompt_tokens = r->prompt_tokens,
        .output_tokens = r->output_tokens,
        .gone = gone,
    });
}

/* The request is over, in whatever way. */
static void on_completed(void *server, struct MHD_Connection *mhd, void **context,
                         enum MHD_RequestTerminationCode how)
{
    (void)mhd;
    struct http_server *s = server;
    struct http_request *r = *context;
    if (!r)
        return;
    *context = NULL;
    bool delivered = how == MHD_REQUEST_TERMINATED_COMPLETED_OK && !r->gone;
    if (r->on_close)
        r->on_close(r->on_close_context, delivered);
    log_end(r, !delivered);
    r->connection->request = NULL;
    r->connection->header_seen = 0;
    s->has_half_closed |= r->connection->peer_closed;
    if (r->response)
        MHD_destroy_response(r->response);
    http_drop_body(r);
    s->buffered_bytes -= r->charged;
    arena_free(&r->arena);
    free(r);
    s->n_active--;
}

static void on_connection(void *server, struct MHD_Connection *mhd, void **socket_context,
                          enum MHD_ConnectionNotificationCode what)
{
    (void)mhd;
    struct http_server *s = server;
    if (what == MHD_CONNECTION_NOTIFY_STARTED) {
        *socket_context = s->entering;
        s->entering->place = INSIDE;
    } else if (*socket_context != s->entering) { /* else it did not get in: see inside_enter */
        loop_forget(*socket_context);
        *socket_context = NULL;
    }
}

/* "%41" to "A" in place; "%00" is left as it is, it would cut the text. */
static size_t unescape(void *server, struct MHD_Connection *mhd, char *text)
{
    (void)server;
    (void)mhd;
    char *out = text;
    for (const char *in = text; *in;) {
        unsigned value = 0;
        char digits[3] = {in[0] == '%' ? in[1] : '\0', in[0] == '%' && in[1] ? in[2] : '\0', 0};
        bool escaped = strspn(digits, "0123456789abcdefABCDEF") == 2 &&
                       sscanf(digits, "%x", &value) == 1 && value;
        *out++ = escaped ? (char)value : *in;
        in += escaped ? 3 : 1;
    }
    *out = '\0';
    return (size_t)(out - text);
}

static void on_library_log(void *server, const char *format, va_list args)
{
    (void)server;
    if (!log_enabled(LOG_DEBUG))
        return;
    char text[512];
    vsnprintf(text, sizeof(text), format, args);
    text[strcspn(text, "\r\n")] = '\0';
    log_event(LOG_DEBUG, "libmicrohttpd", "%s", text);
}

/* What the loop calls. */

bool inside_enter(struct connection *c, const struct sockaddr_storage *address, socklen_t n_address)
{
    struct http_server *s = c->server;
    s->entering = c;
    c->deadline_ns = 0;
    bool entered = MHD_add_connection(s->daemon, c->fd, (const struct sockaddr *)address,
                                      n_address) == MHD_YES;
    s->entering = NULL;
    if (!entered) /* the socket was closed */
        loop_forget(c);
    return entered;
}

static void end_suspended(struct http_request *r)
{
    r->gone = true;
    if (r->suspended) {
        r->suspended = false;
        MHD_resume_connection(r->mhd);
    }
}

void inside_hang_up(struct connection *c)
{
    struct http_request *r = c->request;
    if (r && r->suspended)
        end_suspended(r);
}

int inside_epoll_fd(const struct http_server *s)
{
    return MHD_get_daemon_info(s->daemon, MHD_DAEMON_INFO_EPOLL_FD)->epoll_fd;
}

int inside_run(struct http_server *s)
{
    MHD_UNSIGNED_LONG_LONG timeout_ms = 1000;
    MHD_run(s->daemon);
    if (MHD_get_timeout(s->daemon, &timeout_ms) != MHD_YES || timeout_ms > 1000)
        return 1000;
    return (int)timeout_ms;
}

bool inside_awaits_input(const struct connection *c)
{
    return !c->request || !c->request->handled;
}

void inside_sweep(struct connection *c, int64_t now_ns)
{
    struct http_request *r = c->request;
    if (!r)
        return;
    int64_t age_s = (now_ns - r->arrival_ns) / 1000000000;
    if (inside_awaits_input(c) && age_s > BODY_GRACE_S + (int64_t)(r->n_received / BODY_RATE))
        shutdown(c->fd, SHUT_RDWR); /* a body that trickles; the library notices and closes */
    int64_t silent_s = (now_ns - r->last_sent_ns) / 1000000000;
    if (r->read && r->suspended && r->is_event_stream && is_between_events(r) &&
        silent_s >= c->server->options.keepalive_interval) {
        r->comment_due = true;
        http_wake(r);
    }
}

/* The library closes what is left when it is stopped, and must not find anything suspended. */
void inside_end_all(struct http_server *s)
{
    for (struct connection *c = s->connections; c; c = c->next) {
        if (c->request)
            end_suspended(c->request);
    }
    MHD_run(s->daemon);
    MHD_run(s->daemon);
    MHD_stop_daemon(s->daemon);
    s->daemon = NULL;
}

/* Opening and closing. */

static enum status start_library(struct http_server *s, struct error *err)
{
    unsigned limit = (unsigned)s->options.max_connections + SPARE_CONNECTIONS;
    s->daemon = MHD_start_daemon(MHD_USE_EPOLL | MHD_ALLOW_SUSPEND_RESUME |
                                     MHD_USE_NO_LISTEN_SOCKET | MHD_USE_ERROR_LOG | ONE_THREAD,
                                 0, NULL, NULL, on_request, s, MHD_OPTION_EXTERNAL_LOGGER,
                                 on_library_log, s, MHD_OPTION_CONNECTION_LIMIT, limit,
                                 MHD_OPTION_CONNECTION_TIMEOUT, (unsigned)s->options.idle_timeout,
                                 MHD_OPTION_CONNECTION_MEMORY_LIMIT, (size_t)POOL_BYTES,
                                 MHD_OPTION_STRICT_FOR_CLIENT, 1, MHD_OPTION_UNESCAPE_CALLBACK,
                                 unescape, s, MHD_OPTION_NOTIFY_COMPLETED, on_completed, s,
                                 MHD_OPTION_NOTIFY_CONNECTION, on_connection, s, MHD_OPTION_END);
    return s->daemon ? STATUS_OK : fail(err, STATUS_INTERNAL, "http: libmicrohttpd did not start");
}

enum status http_open(struct http_server **out, const struct http_config *config, struct error *err)
{
    struct http_server *s = calloc(1, sizeof(*s));
    if (!s)
        return fail(err, STATUS_NOMEM, "http: out of memory");
    s->config = *config;
    s->options = *config->options;
    s->listen_fd = s->epoll_fd = s->event_fd = s->timer_fd = -1;
    if (getrandom(&s->id_seed, sizeof(s->id_seed), 0) < 0)
        s->id_seed = (uint64_t)http_now_ns();
    enum status st = STATUS_OK;
    if (s->options.api_key_file)
        st = api_keys_open(&s->keys, s->options.api_key_file, err);
    if (!st)
        st = socket_listen(s, err);
    if (!st)
        st = start_library(s, err);
    if (!st)
        st = loop_open(s, err);
    if (st) {
        http_close(s);
        return st;
    }
    *out = s;
    return STATUS_OK;
}

enum status http_start(struct http_server *s, struct error *err)
{
    int code = pthread_create(&s->thread, NULL, loop_run, s);
    if (code)
        return fail(err, STATUS_NOMEM, "http: the io thread did not start: %s", strerror(code));
    s->started = true;
    return STATUS_OK;
}

int http_port(const struct http_server *s)
{
    return s->port;
}

const char *http_url(const struct http_server *s)
{
    return s->url;
}

int http_n_active(const struct http_server *s)
{
    return atomic_load(&s->n_active);
}

int http_n_connections(const struct http_server *s)
{
    return atomic_load(&s->n_connections);
}

static void signal_loop(struct http_server *s)
{
    const uint64_t one = 1;
    if (write(s->event_fd, &one, sizeof(one)) < 0)
        return; /* the counter is full: the loop is awake anyway */
}

void http_notify(struct http_server *s)
{
    if (!atomic_exchange(&s->notified, true))
        signal_loop(s);
}

void http_drain(struct http_server *s)
{
    atomic_store(&s->draining, true);
    signal_loop(s);
}

void http_stop(struct http_server *s)
{
    if (s->started) {
        atomic_store(&s->stopping, true);
        signal_loop(s);
        pthread_join(s->thread, NULL);
        s->started = false;
    }
}

void http_close(struct http_server *s)
{
    if (!s)
        return;
    http_stop(s);
    socket_unlisten(s);
    if (s->daemon)
        MHD_stop_daemon(s->daemon);
    loop_close(s);
    api_keys_close(s->keys);
    free(s);
}

/* The request, as handlers see it. */

const char *http_method(const struct http_request *r)
{
    return r->method;
}

const char *http_route(const struct http_request *r)
{
    return r->route ? r->route->path : "other";
}

const char *http_param(const struct http_request *r)
{
    return r->param;
}

const char *http_query(const struct http_request *r, const char *key)
{
    return MHD_lookup_connection_value(r->mhd, MHD_GET_ARGUMENT_KIND, key);
}

const char *http_header(const struct http_request *r, const char *name)
{
    return MHD_lookup_connection_value(r->mhd, MHD_HEADER_KIND, name);
}

const char *http_body(const struct http_request *r, size_t *n)
{
    *n = r->body.n;
    return r->body.data ? r->body.data : "";
}

struct arena *http_arena(struct http_request *r)
{
    return &r->arena;
}

const char *http_request_id(const struct http_request *r)
{
    return r->id;
}

int http_key_index(const struct http_request *r)
{
    return r->key_index;
}

int64_t http_arrival_ns(const struct http_request *r)
{
    return r->arrival_ns;
}

void http_note_tokens(struct http_request *r, int64_t prompt_tokens, int64_t output_tokens)
{
    r->prompt_tokens = prompt_tokens;
    r->output_tokens = output_tokens;
}

void http_on_close(struct http_request *r, void (*fn)(void *context, bool delivered), void *context)
{
    r->on_close = fn;
    r->on_close_context = context;
}
