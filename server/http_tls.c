/* http_tls.c - TLS before the door; see http_tls.h.
 *
 * The door looks at every request's header as plain bytes before the library reads it, which a
 * library that decrypts for itself does not allow. So each client's socket is joined here to one
 * end of a socket pair, by a tunnel, and the io thread gets the other end in its place. All that
 * holds for plain connections (timeouts, hang-ups, refusals, a slow reader's back pressure) then
 * holds for these: what a tunnel cannot pass on fills a socket buffer, as on a network, and a
 * closed end closes the other one. A handshake counts as time that the client takes for its header.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include <gnutls/gnutls.h>

#include "engine/base/thread.h"
#include "server/http_private.h"
#include "server/http_tls.h"
#include "server/log.h"
#include "server/metrics.h"

enum {
    BUFFER_BYTES = 16384, /* the largest record: nothing read stays behind in GnuTLS */
    MAX_EVENTS = 64,
    MAX_ROUNDS = 16, /* buffers that a tunnel passes on before the others' turn */
    TICK_MS = 1000,
    CLOSING_S = 10, /* for a client to take what it was sent, after the server closed */
    STOPPING_S = 3, /* the same when the server stops */
    MAX_DISCARDS = 8,
    FIRST_BYTE = 0x16, /* of a handshake */
};

static const int64_t second_ns = 1000000000;

/* TLS 1.2 is the oldest; GnuTLS and the system's policy say the rest. */
static const char priorities[] = "NORMAL:-VERS-ALL:+VERS-TLS1.3:+VERS-TLS1.2";

/* One direction: what was read and could not be passed on yet. */
struct flow {
    size_t at, n;
    bool ended;  /* its source has no more */
    bool closed; /* its sink was told */
    char data[BUFFER_BYTES];
};

enum tunnel_stage { TUNNEL_NEW, TUNNEL_HANDSHAKE, TUNNEL_OPEN };

struct tunnel_end {
    struct tunnel *tunnel;
    int fd;
};

struct tunnel {
    struct tunnel *next, *previous;
    enum tunnel_stage stage;
    struct tunnel_end client, server; /* the client's socket; our end of the pair */
    gnutls_session_t session;
    struct tls_pair *pair;
    bool server_gone, dead;
    int64_t deadline_ns; /* once server_gone */
    struct flow up, down;
    char address[CLIENT_BYTES];
};

struct tls {
    const char *cert_path, *key_path; /* borrowed from the options */
    gnutls_priority_t priority;
    struct tls_pair *pair;
    struct tunnel *tunnels, *dead;
    int epoll_fd, event_fd;
    pthread_t thread;
    bool started;
    _Atomic bool stopping;
    pthread_mutex_t lock;
    struct tunnel *arrivals;
    struct tls_pair *coming;
};

/* Tunnels. */

static void tunnel_free(struct tunnel *t)
{
    if (t->session)
        gnutls_deinit(t->session);
    tls_pair_drop(t->pair);
    if (t->client.fd >= 0)
        close(t->client.fd);
    if (t->server.fd >= 0)
        close(t->server.fd);
    free(t);
}

/* Events of its other end may still be in this pass's list, so it is freed after that. Closing
 * with input unread would reset the connection, and the reset could overtake a reply. */
static void tunnel_end(struct tls *s, struct tunnel *t)
{
    char scratch[4096];
    for (int i = 0; i < MAX_DISCARDS; i++) {
        if (recv(t->client.fd, scratch, sizeof(scratch), MSG_DONTWAIT) <= 0)
            break;
    }
    close(t->client.fd);
    close(t->server.fd);
    t->client.fd = t->server.fd = -1;
    if (t->previous)
        t->previous->next = t->next;
    else
        s->tunnels = t->next;
    if (t->next)
        t->next->previous = t->previous;
    t->next = s->dead;
    s->dead = t;
    t->dead = true;
}

static void free_the_dead(struct tls *s)
{
    while (s->dead) {
        struct tunnel *t = s->dead;
        s->dead = t->next;
        tunnel_free(t);
    }
}

static bool watch(const struct tls *s, int operation, struct tunnel_end *end)
{
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET,
                                .data.ptr = end};
    return !epoll_ctl(s->epoll_fd, operation, end->fd, &event);
}

static bool tunnel_open(struct tls *s, struct tunnel *t)
{
    const gnutls_datum_t http_1_1 = {(unsigned char *)"http/1.1", 8};
    if (gnutls_init(&t->session, GNUTLS_SERVER | GNUTLS_NONBLOCK | GNUTLS_NO_SIGNAL) ||
        gnutls_priority_set(t->session, s->priority) ||
        gnutls_credentials_set(t->session, GNUTLS_CRD_CERTIFICATE, s->pair->loaded) ||
        gnutls_alpn_set_protocols(t->session, &http_1_1, 1, 0))
        return false;
    t->pair = s->pair;
    t->pair->n_users++;
    gnutls_transport_set_int(t->session, t->client.fd);
    gnutls_handshake_set_timeout(t->session, 0); /* the door has one */
    return watch(s, EPOLL_CTL_ADD, &t->client) && watch(s, EPOLL_CTL_ADD, &t->server);
}

/* A client that does not begin with a handshake gets one plain answer. */
static void answer_plainly(const struct tunnel *t)
{
    struct bytes body = {0}, reply = {0};
    http_error_json(&body, 400, "This port speaks TLS: use https://.", NULL, http_error_code(400));
    bytes_format(&reply,
                 "HTTP/1.1 400 %s\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n"
                 "Connection: close\r\n\r\n",
                 http_reason(400), body.n);
    bytes_append(&reply, body.data, body.n);
    if (!reply.failed && send(t->client.fd, reply.data, reply.n, MSG_NOSIGNAL | MSG_DONTWAIT) > 0)
        shutdown(t->client.fd, SHUT_WR);
    bytes_free(&body);
    bytes_free(&reply);
}

static void note_failure(const struct tunnel *t, const char *reason)
{
    metrics_add(METRIC_TLS_FAILURES, 1);
    log_event(LOG_DEBUG, "tls", "%s: %s", t->address, reason);
}

static bool is_later(ssize_t code)
{
    return code == GNUTLS_E_AGAIN || code == GNUTLS_E_INTERRUPTED;
}

/* True once there is a first byte of a handshake. */
static bool look_at_first_byte(struct tunnel *t)
{
    unsigned char first = 0;
    ssize_t n = recv(t->client.fd, &first, 1, MSG_PEEK | MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return false;
    if (n == 1 && first == FIRST_BYTE)
        return true;
    if (n == 1) {
        note_failure(t, "plain HTTP, or something else that is not TLS");
        answer_plainly(t);
    }
    t->dead = true;
    return false;
}

/* True once it is done. */
static bool shake_hands(struct tunnel *t)
{
    int code;
    do {
        code = gnutls_handshake(t->session);
    } while (code < 0 && !is_later(code) && !gnutls_error_is_fatal(code));
    if (code < 0 && !is_later(code)) {
        note_failure(t, gnutls_strerror(code));
        gnutls_alert_send_appropriate(t->session, code);
        t->dead = true;
    }
    return code == GNUTLS_E_SUCCESS;
}

static void took(struct flow *f, size_t n)
{
    f->at += n;
    f->n -= n;
}

/* From the client to the server. Each of the four returns whether anything moved. */
static bool read_client(struct tunnel *t)
{
    struct flow *f = &t->up;
    if (f->n || f->ended)
        return false;
    ssize_t n = gnutls_record_recv(t->session, f->data, sizeof(f->data));
    if (n > 0) {
        f->at = 0;
        f->n = t->server_gone ? 0 : (size_t)n;
        return true;
    }
    if (n == 0)
        f->ended = true;
    else if (!is_later(n)) /* cut off, damaged, or a renegotiation, which is not done here */
        t->dead = true;
    return false;
}

static bool write_server(struct tunnel *t)
{
    struct flow *f = &t->up;
    bool moved = false;
    if (f->n) {
        ssize_t n = send(t->server.fd, f->data + f->at, f->n, MSG_NOSIGNAL | MSG_DONTWAIT);
        moved = n > 0;
        if (n > 0)
            took(f, (size_t)n);
        else if (errno != EAGAIN && errno != EINTR)
            f->n = 0; /* the server will not read it */
    }
    if (f->ended && !f->n && !f->closed) {
        f->closed = true;
        shutdown(t->server.fd, SHUT_WR);
    }
    return moved;
}

static bool read_server(struct tunnel *t)
{
    struct flow *f = &t->down;
    if (f->n || f->ended)
        return false;
    ssize_t n = recv(t->server.fd, f->data, sizeof(f->data), MSG_DONTWAIT);
    if (n > 0) {
        f->at = 0;
        f->n = (size_t)n;
    } else if (n == 0 || (errno != EAGAIN && errno != EINTR)) {
        f->ended = true;
    }
    return n > 0;
}

static bool write_client(struct tunnel *t)
{
    struct flow *f = &t->down;
    bool moved = false;
    if (f->n) {
        ssize_t n = gnutls_record_send(t->session, f->data + f->at, f->n);
        moved = n > 0;
        if (n > 0)
            took(f, (size_t)n);
        else if (!is_later(n))
            t->dead = true;
    }
    if (f->ended && !f->n && !f->closed && !is_later(gnutls_bye(t->session, GNUTLS_SHUT_WR))) {
        f->closed = true;
        shutdown(t->client.fd, SHUT_WR);
    }
    return moved;
}

/* Pass on what can be. With more to do after a while, the epoll set is made to tell so again. */
static void pump(struct tls *s, struct tunnel *t)
{
    if (t->stage == TUNNEL_NEW && look_at_first_byte(t))
        t->stage = TUNNEL_HANDSHAKE;
    if (t->stage == TUNNEL_HANDSHAKE && shake_hands(t))
        t->stage = TUNNEL_OPEN;
    bool moves = t->stage == TUNNEL_OPEN;
    for (int i = 0; moves && !t->dead; i++) {
        if (i == MAX_ROUNDS) {
            t->dead = !watch(s, EPOLL_CTL_MOD, &t->client);
            break;
        }
        moves = read_client(t);
        moves |= write_server(t);
        moves |= read_server(t);
        moves |= write_client(t);
    }
}

static void on_tunnel(struct tls *s, struct tunnel_end *end, uint32_t events)
{
    struct tunnel *t = end->tunnel;
    if (t->dead)
        return;
    if (end == &t->server && (events & (EPOLLHUP | EPOLLERR)) && !t->server_gone) {
        t->server_gone = true;
        t->deadline_ns = http_now_ns() + CLOSING_S * second_ns;
    }
    pump(s, t);
    bool client_gone = end == &t->client && (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR));
    bool stuck = client_gone && t->up.n; /* nobody will read that, nor notice the end behind it */
    bool all_done = t->server_gone && (t->down.closed || t->stage != TUNNEL_OPEN);
    if (t->dead || stuck || all_done)
        tunnel_end(s, t);
}

/* The TLS thread. */

static void take_coming(struct tls *s)
{
    uint64_t count;
    if (read(s->event_fd, &count, sizeof(count)) < 0)
        return;
    pthread_mutex_lock(&s->lock);
    struct tunnel *arrivals = s->arrivals;
    struct tls_pair *coming = s->coming;
    s->arrivals = NULL;
    s->coming = NULL;
    pthread_mutex_unlock(&s->lock);
    if (coming) {
        tls_pair_drop(s->pair);
        s->pair = coming;
    }
    while (arrivals) {
        struct tunnel *t = arrivals;
        arrivals = t->next;
        t->next = s->tunnels;
        if (t->next)
            t->next->previous = t;
        s->tunnels = t;
        if (!tunnel_open(s, t)) {
            log_event(LOG_WARN, "tls", "a connection was lost: out of memory or descriptors");
            tunnel_end(s, t);
        }
    }
}

static void end_late(struct tls *s, int64_t now_ns)
{
    for (struct tunnel *t = s->tunnels, *next; t; t = next) {
        next = t->next;
        if (t->deadline_ns && now_ns > t->deadline_ns)
            tunnel_end(s, t);
    }
}

static void *run(void *context)
{
    struct tls *s = context;
    struct epoll_event events[MAX_EVENTS];
    int64_t end_ns = 0, swept_ns = 0;
    for (;;) {
        int n = epoll_wait(s->epoll_fd, events, MAX_EVENTS, s->tunnels ? TICK_MS : -1);
        for (int i = 0; i < n; i++) {
            if (events[i].data.ptr == s)
                take_coming(s);
            else
                on_tunnel(s, events[i].data.ptr, events[i].events);
        }
        free_the_dead(s);
        int64_t now_ns = http_now_ns();
        if (now_ns - swept_ns > second_ns) {
            end_late(s, now_ns);
            free_the_dead(s);
            swept_ns = now_ns;
        }
        if (!atomic_load(&s->stopping))
            continue;
        end_ns = end_ns ? end_ns : now_ns + STOPPING_S * second_ns;
        if (!s->tunnels || now_ns > end_ns)
            return NULL;
    }
}

static void wake(struct tls *s)
{
    const uint64_t one = 1;
    if (write(s->event_fd, &one, sizeof(one)) < 0)
        return; /* the counter is full: it is awake anyway */
}

/* What http.c and the loop call. */

enum status tls_open(struct tls **out, const char *cert_path, const char *key_path,
                     struct error *err)
{
    struct tls *s = calloc(1, sizeof(*s));
    if (!s)
        return fail(err, STATUS_NOMEM, "tls: out of memory");
    s->cert_path = cert_path;
    s->key_path = key_path;
    pthread_mutex_init(&s->lock, NULL);
    s->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    s->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = s};
    enum status st = STATUS_OK;
    if (s->epoll_fd < 0 || s->event_fd < 0 ||
        epoll_ctl(s->epoll_fd, EPOLL_CTL_ADD, s->event_fd, &event))
        st = fail(err, STATUS_IO, "tls: cannot set up the event loop: %s", strerror(errno));
    if (!st && gnutls_priority_init(&s->priority, priorities, NULL))
        st = fail(err, STATUS_INTERNAL, "tls: GnuTLS %s does not know '%s'",
                  gnutls_check_version(NULL), priorities);
    if (!st)
        st = tls_pair_load(s->cert_path, s->key_path, &s->pair, err);
    if (st)
        tls_close(s);
    else
        *out = s;
    return st;
}

enum status tls_start(struct tls *s, struct error *err)
{
    int code = thread_start(&s->thread, "latte-tls", run, s);
    if (code)
        return fail(err, STATUS_NOMEM, "tls: the thread did not start: %s", strerror(code));
    s->started = true;
    return STATUS_OK;
}

enum status tls_reload(struct tls *s, struct error *err)
{
    struct tls_pair *coming = NULL;
    enum status st = tls_pair_load(s->cert_path, s->key_path, &coming, err);
    if (st)
        return st;
    pthread_mutex_lock(&s->lock);
    struct tls_pair *unused = s->coming;
    s->coming = coming;
    pthread_mutex_unlock(&s->lock);
    tls_pair_drop(unused);
    wake(s);
    return STATUS_OK;
}

int tls_wrap(struct tls *s, int fd, const struct sockaddr_storage *address)
{
    int pair[2];
    struct tunnel *t = calloc(1, sizeof(*t));
    if (!t || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair)) {
        free(t);
        close(fd);
        return -1;
    }
    t->client = (struct tunnel_end){t, fd};
    t->server = (struct tunnel_end){t, pair[0]};
    socket_describe(address, t->address);
    pthread_mutex_lock(&s->lock);
    t->next = s->arrivals;
    s->arrivals = t;
    pthread_mutex_unlock(&s->lock);
    wake(s);
    return pair[1];
}

void tls_close(struct tls *s)
{
    if (!s)
        return;
    if (s->started) {
        atomic_store(&s->stopping, true);
        wake(s);
        pthread_join(s->thread, NULL);
    }
    while (s->tunnels)
        tunnel_end(s, s->tunnels);
    free_the_dead(s);
    for (struct tunnel *t = s->arrivals, *next; t; t = next) {
        next = t->next;
        tunnel_free(t);
    }
    tls_pair_drop(s->coming);
    tls_pair_drop(s->pair);
    if (s->priority)
        gnutls_priority_deinit(s->priority);
    if (s->epoll_fd >= 0)
        close(s->epoll_fd);
    if (s->event_fd >= 0)
        close(s->event_fd);
    pthread_mutex_destroy(&s->lock);
    free(s);
}
