/* http_door.c - between accepting a connection and the library, and between two requests: a
 * request's header is looked at before the library may read it. That gives errors of ours for
 * what the library would answer with a page of its own, or would not refuse at all. */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "server/http_private.h"
#include "server/log.h"
#include "server/metrics.h"

enum { MAX_LINGERING = 512, LINGER_S = 5, MAX_DISCARDS = 8 };

static const int64_t second_ns = 1000000000;

static void build_reply(const struct http_server *s, int code, const char *message,
                        struct bytes *out)
{
    struct bytes body = {0};
    http_error_json(&body, code, message, NULL, http_error_code(code));
    bytes_format(out, "HTTP/1.1 %d %s\r\nContent-Type: application/json\r\n", code,
                 http_reason(code));
    bytes_format(out, "Content-Length: %zu\r\nConnection: close\r\n", body.n);
    if (code == 503)
        bytes_text(out, "Retry-After: 1\r\n");
    if (s->options.cors_origin)
        bytes_format(out, "Access-Control-Allow-Origin: %s\r\n", s->options.cors_origin);
    bytes_text(out, "\r\n");
    bytes_append(out, body.data, body.n);
    bytes_free(&body);
}

/* The reply fits any socket buffer, so one send is enough. */
static void send_reply(struct http_server *s, int fd, int code, const char *message)
{
    struct bytes reply = {0};
    build_reply(s, code, message, &reply);
    if (!reply.failed && send(fd, reply.data, reply.n, MSG_NOSIGNAL | MSG_DONTWAIT) < 0)
        log_event(LOG_DEBUG, "refused", "a client left before its error was sent");
    bytes_free(&reply);
}

static void note_refusal(const struct connection *c, int code, const char *message)
{
    metrics_count_request("other", "other", code);
    if (c->server->options.access_log)
        log_request(&(struct log_access){.request_id = "",
                                         .method = "",
                                         .route = "other",
                                         .client = c->client,
                                         .status = code,
                                         .prompt_tokens = -1,
                                         .output_tokens = -1});
    log_event(LOG_DEBUG, "refused", "%s: %d %s", c->client, code, message);
}

/* Answer at the door. What the client still sends is read and thrown away for a while: closing
 * at once would reset the connection, and the reset could overtake the answer. */
void door_refuse(struct connection *c, int code, const char *message)
{
    struct http_server *s = c->server;
    note_refusal(c, code, message);
    send_reply(s, c->fd, code, message);
    shutdown(c->fd, SHUT_WR);
    if (c->peer_closed || s->n_lingering >= MAX_LINGERING ||
        !loop_watch(s, EPOLL_CTL_MOD, c->fd, EPOLLIN, c)) {
        loop_end(c);
        return;
    }
    c->place = LINGERING;
    c->deadline_ns = http_now_ns() + LINGER_S * second_ns;
    s->n_lingering++;
}

void door_discard(struct connection *c)
{
    for (int i = 0; i < MAX_DISCARDS; i++) {
        if (recv(c->fd, c->server->peek, PEEK_BYTES, MSG_DONTWAIT) <= 0)
            return;
    }
}

void door_outlive(struct connection *c)
{
    struct http_server *s = c->server;
    int fd = -1;
    if (!c->peer_closed && s->n_lingering < MAX_LINGERING)
        fd = fcntl(c->fd, F_DUPFD_CLOEXEC, 0);
    struct connection *rest = fd >= 0 ? loop_adopt(s, fd, c->client) : NULL;
    if (!rest) {
        if (fd >= 0)
            close(fd);
        door_discard(c);
        return;
    }
    /* The socket stays open, so the set would not forget the library's descriptor by itself. */
    loop_watch(s, EPOLL_CTL_DEL, c->fd, 0, NULL);
    rest->place = LINGERING;
    rest->deadline_ns = http_now_ns() + LINGER_S * second_ns;
    s->n_lingering++;
}

void door_cut(struct connection *c, int code, const char *message)
{
    log_event(LOG_DEBUG, "refused", "%s: %d %s", c->client, code, message);
    c->request->code = code;
    send_reply(c->server, c->fd, code, message);
    door_discard(c);
    shutdown(c->fd, SHUT_RDWR); /* the library notices and closes */
}

void door_linger(struct connection *c)
{
    ssize_t n = recv(c->fd, c->server->peek, PEEK_BYTES, MSG_DONTWAIT);
    if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR))
        loop_end(c);
}

/* Empty lines before a request are an old client's, and are forgiven. The library must not see
 * them: what it reads is what was looked at. Returns the bytes that are left to look at. */
static size_t skip_empty_lines(struct connection *c, size_t n)
{
    char *peek = c->server->peek;
    size_t empty = 0;
    while (empty + 2 <= n && peek[empty] == '\r' && peek[empty + 1] == '\n')
        empty += 2;
    if (empty && recv(c->fd, peek, empty, MSG_DONTWAIT) == (ssize_t)empty) {
        ssize_t left = recv(c->fd, peek, PEEK_BYTES, MSG_PEEK | MSG_DONTWAIT);
        return left > 0 ? (size_t)left : 0;
    }
    return n;
}

/* The header is sound: the library may read it. */
static void let_in(struct connection *c)
{
    c->place = INSIDE;
    c->deadline_ns = 0;
    if (c->mhd) {
        inside_resume(c);
        return;
    }
    struct sockaddr_storage address = {0};
    socklen_t n_address = sizeof(address);
    getpeername(c->fd, (struct sockaddr *)&address, &n_address);
    if (!inside_enter(c, &address, n_address))
        log_event(LOG_WARN, "http", "a connection was lost: out of memory");
}

static void look_at_header(struct connection *c, size_t n)
{
    struct http_server *s = c->server;
    struct http_verdict verdict;
    size_t header =
        http_check_header(s->peek, n, (int64_t)body_limit_of_all(s), &c->framing, &verdict);
    if (verdict.code) {
        door_refuse(c, verdict.code, verdict.message);
        return;
    }
    if (!header) {
        if (c->peer_closed)
            loop_end(c);
        return;
    }
    int64_t length = c->framing.length > 0 ? c->framing.length : 0;
    c->has_surplus = !c->framing.n_coding && (int64_t)(n - header) > length;
    bytes_free(&c->header);
    bytes_append(&c->header, s->peek, header);
    if (c->header.failed)
        door_refuse(c, 503, "The server is out of memory.");
    else
        let_in(c);
}

void door_look(struct connection *c)
{
    struct http_server *s = c->server;
    ssize_t n = recv(c->fd, s->peek, PEEK_BYTES, MSG_PEEK | MSG_DONTWAIT);
    if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR)) {
        loop_end(c);
        return;
    }
    if (n < 0)
        return;
    if (!c->header_begun) {
        c->header_begun = true;
        c->deadline_ns = http_now_ns() + s->options.header_timeout * second_ns;
    }
    n = (ssize_t)skip_empty_lines(c, (size_t)n);
    if (n > 0)
        look_at_header(c, (size_t)n);
    else if (c->peer_closed)
        loop_end(c);
}

void door_await(struct connection *c)
{
    c->place = AT_DOOR;
    c->header_begun = false;
    c->deadline_ns = http_now_ns() + c->server->options.idle_timeout * second_ns;
    door_look(c);
}
