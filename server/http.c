/* http.c - the server and its libmicrohttpd daemon; see http.h, and http_private.h for the other
 * files.
 *
 * libmicrohttpd runs inside the io thread (external epoll). A connection is suspended while its
 * request has nothing to send, deferred or a parked stream, and between two requests, when the
 * next one's header is looked at before the library may read it. Only the io thread suspends and
 * resumes, so there is no race to think about; what must hold is
 *   - suspend only from the library's callbacks (on_request, read_stream, on_completed), resume
 * only what is suspended, and never stop the daemon while anything is: it would abort the process;
 *   - after a hang-up a suspended connection is resumed and its callback returns an error,
 *     which makes the library close it and call on_completed: the one place where requests end.
 */
#include "server/http.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include <microhttpd.h>

#include "engine/base/thread.h"
#include "server/http_private.h"
#include "server/log.h"
#include "server/metrics.h"

enum {
    POOL_BYTES = 32 * 1024, /* a connection's memory in the library: headers, not bodies */
    BODY_GRACE_S = 30,      /* a body must come at BODY_RATE bytes/s after this */
    BODY_RATE = 1024,
    SPARE_CONNECTIONS = 64,
    STUCK_SWEEPS = 2,
};

static const int64_t DRAIN_GRACE_NS = 1500000000; /* for bodies on their way */

/* Only the io thread calls the library. From 0.9.77 on it must be told so: a thread-safe daemon
 * queues an added connection for later, and inside_enter relies on its being taken at once. */
#if MHD_VERSION >= 0x00097707
enum { ONE_THREAD = MHD_USE_NO_THREAD_SAFETY };
#else
enum { ONE_THREAD = 0 };
#endif

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

/* The request line was read; the target is still as it came. */
static void *on_target(void *server, const char *target, struct MHD_Connection *mhd)
{
    (void)server;
    const union MHD_ConnectionInfo *info =
        MHD_get_connection_info(mhd, MHD_CONNECTION_INFO_SOCKET_CONTEXT);
    if (info && info->socket_context)
        connection_check_target(info->socket_context, target);
    return NULL; /* the request begins in on_request */
}

/* Called with the header, then with pieces of the body, then without until there is a reply. */
static enum MHD_Result on_request(void *server, struct MHD_Connection *mhd, const char *url,
                                  const char *method, const char *version, const char *upload,
                                  size_t *n_upload, void **context)
{
    (void)server;
    struct http_request *r = *context;
    if (!r) {
        const union MHD_ConnectionInfo *info =
            MHD_get_connection_info(mhd, MHD_CONNECTION_INFO_SOCKET_CONTEXT);
        if (info && info->socket_context)
            *context = r = request_begin(info->socket_context, mhd, url, method, version);
        if (!r || r->gone)
            return MHD_NO;
        return refusal_comes_at_once(r) ? queue(r) : MHD_YES;
    }
    if (r->gone)
        return MHD_NO;
    if (*n_upload) {
        bool goes_on = request_receive(r, upload, *n_upload);
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

/* The request is over, in whatever way. A connection that is kept waits at the door. */
static void on_completed(void *server, struct MHD_Connection *mhd, void **context,
                         enum MHD_RequestTerminationCode how)
{
    struct http_server *s = server;
    struct http_request *r = *context;
    if (!r)
        return;
    *context = NULL;
    struct connection *c = r->connection;
    bool delivered = how == MHD_REQUEST_TERMINATED_COMPLETED_OK && !r->gone;
    bool early = delivered && !r->handled; /* refused, with a body on its way */
    bool kept = delivered && r->handled && !r->closes && !atomic_load(&s->stopping);
    request_end(r, delivered);
    if (kept) {
        MHD_suspend_connection(mhd);
        door_await(c);
    } else if (early) {
        door_outlive(c);
    } else if (delivered) {
        door_discard(c);
    }
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

void inside_resume(struct connection *c)
{
    c->server->has_resumed = true;
    MHD_resume_connection(c->mhd);
}

void inside_hang_up(struct connection *c)
{
    if (c->request && c->request->suspended)
        request_cancel(c->request);
}

int inside_epoll_fd(const struct http_server *s)
{
    return MHD_get_daemon_info(s->daemon, MHD_DAEMON_INFO_EPOLL_FD)->epoll_fd;
}

int inside_run(struct http_server *s)
{
    MHD_UNSIGNED_LONG_LONG timeout_ms = 1000;
    s->has_resumed = false;
    MHD_run(s->daemon);
    if (s->has_resumed) /* 0.9.75 does not count that as work to do */
        return 0;
    if (MHD_get_timeout(s->daemon, &timeout_ms) != MHD_YES || timeout_ms > 1000)
        return 1000;
    return (int)timeout_ms;
}

bool inside_awaits_input(const struct connection *c)
{
    return !c->request || !c->request->handled;
}

/* The library reads a body whenever it can. Bytes that stay unread while none arrive here are
 * framing that it cannot take: an endless chunk size, or what may follow one. */
static bool is_stuck(struct http_request *r)
{
    int n_unread = 0;
    ioctl(r->connection->fd, FIONREAD, &n_unread);
    r->n_stuck = n_unread && r->n_received == r->n_at_sweep ? r->n_stuck + 1 : 0;
    r->n_at_sweep = r->n_received;
    return r->n_stuck > STUCK_SWEEPS;
}

/* A body that is not there yet must come, and soon when the server is about to stop. */
static void watch_body(struct http_request *r, int64_t now_ns)
{
    const struct http_server *s = r->server;
    int64_t age_s = (now_ns - r->arrival_ns) / 1000000000;
    bool late = age_s > BODY_GRACE_S + (int64_t)(r->n_received / BODY_RATE);
    bool stopping = s->drain_ns && now_ns - s->drain_ns > DRAIN_GRACE_NS;
    bool stuck = is_stuck(r);
    if (r->code && (late || stopping || stuck))
        shutdown(r->connection->fd, SHUT_RDWR); /* refused; the library notices and closes */
    else if (stuck)
        door_cut(r->connection, 400, "The body's chunks are not framed as HTTP says.");
    else if (late)
        door_cut(r->connection, 408, "The request's body did not arrive in time.");
    else if (stopping)
        door_cut(r->connection, 503, "The server is shutting down.");
}

void inside_sweep(struct connection *c, int64_t now_ns)
{
    struct http_request *r = c->request;
    if (!r)
        return;
    if (!r->handled)
        watch_body(r, now_ns);
    int64_t silent_s = (now_ns - r->last_sent_ns) / 1000000000;
    if (r->read && r->suspended && r->is_event_stream && stream_is_between_events(r) &&
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
            request_cancel(c->request);
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
    s->daemon = MHD_start_daemon(
        MHD_USE_EPOLL | MHD_ALLOW_SUSPEND_RESUME | MHD_USE_NO_LISTEN_SOCKET | MHD_USE_ERROR_LOG |
            ONE_THREAD,
        0, NULL, NULL, on_request, s, MHD_OPTION_EXTERNAL_LOGGER, on_library_log, s,
        MHD_OPTION_CONNECTION_LIMIT, limit, MHD_OPTION_CONNECTION_TIMEOUT,
        (unsigned)s->options.idle_timeout, MHD_OPTION_CONNECTION_MEMORY_LIMIT, (size_t)POOL_BYTES,
        MHD_OPTION_STRICT_FOR_CLIENT, 1, MHD_OPTION_UNESCAPE_CALLBACK, unescape, s,
        MHD_OPTION_URI_LOG_CALLBACK, on_target, s, MHD_OPTION_NOTIFY_COMPLETED, on_completed, s,
        MHD_OPTION_NOTIFY_CONNECTION, on_connection, s, MHD_OPTION_END);
    return s->daemon ? STATUS_OK : fail(err, STATUS_INTERNAL, "http: libmicrohttpd did not start");
}

static enum status open_tls(struct http_server *s, struct error *err)
{
    if (!s->options.tls_cert)
        return STATUS_OK;
    return tls_open(&s->tls, s->options.tls_cert, s->options.tls_key, err);
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
        st = open_tls(s, err);
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
    enum status st = s->tls ? tls_start(s->tls, err) : STATUS_OK;
    if (st)
        return st;
    int code = thread_start(&s->thread, "latte-io", loop_run, s);
    if (code)
        return fail(err, STATUS_NOMEM, "http: the io thread did not start: %s", strerror(code));
    s->started = true;
    return STATUS_OK;
}

enum status http_reload(struct http_server *s, struct error *err)
{
    return s->tls ? tls_reload(s->tls, err) : STATUS_OK;
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
        tls_close(s->tls);
        s->tls = NULL;
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
    tls_close(s->tls);
    loop_close(s);
    api_keys_close(s->keys);
    free(s);
}
