/* http_loop.c - the io thread: one epoll set over everything that can happen.
 *
 * The set holds the library's own epoll fd, the listening socket, an eventfd (http_notify), a
 * timerfd (once a second) and every client socket, edge-triggered with EPOLLRDHUP: that is the
 * hang-up watch, which the library has not for suspended connections.
 *
 * Connections are accepted here, not by the library. So one over the limit gets an answer
 * instead of waiting in the backlog, and every request passes the door (http_door.c).
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#include "server/http_private.h"
#include "server/log.h"
#include "server/metrics.h"

enum { MAX_EVENTS = 256, MAX_ACCEPTS = 64 };

static const int64_t second_ns = 1000000000;

int64_t http_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * second_ns + t.tv_nsec;
}

/* Connections. */

static struct connection *connection_new(struct http_server *s, int fd)
{
    struct connection *c = calloc(1, sizeof(*c));
    if (!c)
        return NULL;
    c->server = s;
    c->fd = fd;
    c->deadline_ns = http_now_ns() + s->options.header_timeout * second_ns;
    c->next = s->connections;
    if (c->next)
        c->next->previous = c;
    s->connections = c;
    s->n_connections++;
    return c;
}

void loop_forget(struct connection *c)
{
    struct http_server *s = c->server;
    if (c->previous)
        c->previous->next = c->next;
    else
        s->connections = c->next;
    if (c->next)
        c->next->previous = c->previous;
    s->n_lingering -= c->place == LINGERING;
    s->n_connections--;
    bytes_free(&c->header);
    free(c);
}

struct connection *loop_adopt(struct http_server *s, int fd, const char *client)
{
    struct connection *c = connection_new(s, fd);
    if (c && !loop_watch(s, EPOLL_CTL_ADD, fd, EPOLLIN, c)) {
        loop_forget(c);
        return NULL;
    }
    if (c)
        snprintf(c->client, sizeof(c->client), "%s", client);
    return c;
}

void loop_end(struct connection *c)
{
    if (!c->mhd) {
        close(c->fd);
        loop_forget(c);
        return;
    }
    /* The library has the socket: it finds it closed. */
    c->server->n_lingering -= c->place == LINGERING;
    c->place = INSIDE;
    c->deadline_ns = 0;
    shutdown(c->fd, SHUT_RDWR);
    inside_resume(c);
}

bool loop_watch(struct http_server *s, int operation, int fd, uint32_t events, void *data)
{
    struct epoll_event event = {.events = events, .data.ptr = data};
    return !epoll_ctl(s->epoll_fd, operation, fd, &event);
}

static void on_client(struct connection *c, uint32_t events)
{
    if (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR))
        c->peer_closed = c->server->has_half_closed = true;
    if (c->place == LINGERING) {
        door_linger(c);
    } else if (c->place == AT_DOOR) {
        door_look(c);
    } else {
        if (c->peer_closed)
            inside_hang_up(c);
    }
}

/* Accepting. */

static void admit(struct http_server *s, int fd, const struct sockaddr_storage *address)
{
    metrics_add(METRIC_CONNECTIONS, 1);
    socket_tune(fd);
    if (s->tls && (fd = tls_wrap(s->tls, fd, address)) >= 0)
        socket_tune(fd);
    if (fd < 0) {
        log_event(LOG_WARN, "http", "a connection was lost: out of memory or descriptors");
        return;
    }
    struct connection *c = connection_new(s, fd);
    if (c)
        socket_describe(address, c->client);
    if (!c || !loop_watch(s, EPOLL_CTL_ADD, fd, EPOLLIN | EPOLLRDHUP | EPOLLET, c)) {
        close(fd);
        if (c)
            loop_forget(c);
        return;
    }
    if (s->n_connections - s->n_lingering > s->options.max_connections)
        door_refuse(c, 503, "The server has as many connections as it accepts. Try again later.");
    else
        door_look(c);
}

/* Out of descriptors: listening pauses until the next tick, or the loop would spin. */
static void pause_listening(struct http_server *s)
{
    log_event(LOG_WARN, "http", "cannot accept connections: %s", strerror(errno));
    s->listen_paused = loop_watch(s, EPOLL_CTL_MOD, s->listen_fd, 0, &s->listen_fd);
}

static void accept_clients(struct http_server *s)
{
    for (int i = 0; i < MAX_ACCEPTS && s->listen_fd >= 0; i++) {
        struct sockaddr_storage address = {0};
        socklen_t n = sizeof(address);
        int fd =
            accept4(s->listen_fd, (struct sockaddr *)&address, &n, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (fd >= 0) {
            admit(s, fd, &address);
        } else if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
            pause_listening(s);
            return;
        } else if (errno != ECONNABORTED && errno != EINTR) {
            return; /* EAGAIN: that was all */
        }
    }
}

/* Once a second. */

static void sweep(struct connection *c, int64_t now_ns)
{
    bool late = c->deadline_ns && now_ns > c->deadline_ns;
    if (c->place == INSIDE) {
        if (late && !c->request)
            shutdown(c->fd, SHUT_RDWR); /* a slow header; the library notices and closes */
        inside_sweep(c, now_ns);
    } else if (late && c->place == AT_DOOR) {
        char first;
        if (recv(c->fd, &first, 1, MSG_PEEK | MSG_DONTWAIT) == 1)
            door_refuse(c, 408, "The request's header did not arrive in time.");
        else
            loop_end(c);
    } else if (late) {
        loop_end(c);
    }
}

static void on_timer(struct http_server *s)
{
    uint64_t expirations;
    if (read(s->timer_fd, &expirations, sizeof(expirations)) < 0)
        return;
    if (s->listen_paused && s->listen_fd >= 0)
        s->listen_paused = !loop_watch(s, EPOLL_CTL_MOD, s->listen_fd, EPOLLIN, &s->listen_fd);
    int64_t now_ns = http_now_ns();
    for (struct connection *c = s->connections, *next; c; c = next) {
        next = c->next;
        sweep(c, now_ns);
    }
    if (s->config.on_tick)
        s->config.on_tick(s->config.context);
    /* No wake-up may be lost for longer than a tick, whoever lost it. */
    atomic_store(&s->notified, true);
}

static void on_event(struct http_server *s)
{
    uint64_t count;
    if (read(s->event_fd, &count, sizeof(count)) < 0)
        return;
    if (!atomic_load(&s->draining))
        return;
    socket_unlisten(s);
    if (!s->drain_ns)
        s->drain_ns = http_now_ns();
}

static void dispatch(struct http_server *s, const struct epoll_event *event)
{
    void *source = event->data.ptr;
    if (source == &s->listen_fd)
        accept_clients(s);
    else if (source == &s->timer_fd)
        on_timer(s);
    else if (source == &s->event_fd)
        on_event(s);
    else if (source != &s->daemon)
        on_client(source, event->events);
}

/* One pass. Clients' events come before the library runs: it may close their sockets. The timer
 * is looked at last for the same reason: its sweep may free connections that have events. */
static void pass(struct http_server *s, int timeout_ms)
{
    struct epoll_event events[MAX_EVENTS];
    int n = epoll_wait(s->epoll_fd, events, MAX_EVENTS, timeout_ms);
    const struct epoll_event *timer = NULL;
    for (int i = 0; i < n; i++) {
        if (events[i].data.ptr == &s->timer_fd)
            timer = &events[i];
        else
            dispatch(s, &events[i]);
    }
    if (timer)
        dispatch(s, timer);
    if (atomic_exchange(&s->notified, false) && s->config.on_notify)
        s->config.on_notify(s->config.context);
}

/* The library sees no end of input that came together with data it read: one edge, one read.
 * When it has nothing left to do for such a client, it is told. */
static void end_half_closed(struct http_server *s)
{
    s->has_half_closed = false;
    for (struct connection *c = s->connections; c; c = c->next) {
        if (c->place == INSIDE && c->peer_closed && inside_awaits_input(c))
            shutdown(c->fd, SHUT_RDWR);
    }
}

static void close_those_outside(struct http_server *s)
{
    for (struct connection *c = s->connections, *next; c; c = next) {
        next = c->next;
        if (c->place != INSIDE)
            loop_end(c);
    }
}

void *loop_run(void *server)
{
    struct http_server *s = server;
    int timeout_ms = 0;
    while (!atomic_load(&s->stopping)) {
        pass(s, timeout_ms);
        timeout_ms = inside_run(s);
        if (timeout_ms && s->has_half_closed)
            end_half_closed(s);
    }
    socket_unlisten(s);
    close_those_outside(s);
    inside_end_all(s);
    return NULL;
}

enum status loop_open(struct http_server *s, struct error *err)
{
    s->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    s->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    s->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    const struct itimerspec every_second = {{1, 0}, {1, 0}};
    int library_fd = inside_epoll_fd(s);
    if (s->epoll_fd < 0 || s->event_fd < 0 || s->timer_fd < 0 ||
        timerfd_settime(s->timer_fd, 0, &every_second, NULL) ||
        !loop_watch(s, EPOLL_CTL_ADD, s->event_fd, EPOLLIN, &s->event_fd) ||
        !loop_watch(s, EPOLL_CTL_ADD, s->timer_fd, EPOLLIN, &s->timer_fd) ||
        !loop_watch(s, EPOLL_CTL_ADD, s->listen_fd, EPOLLIN, &s->listen_fd) ||
        !loop_watch(s, EPOLL_CTL_ADD, library_fd, EPOLLIN, &s->daemon))
        return fail(err, STATUS_IO, "http: cannot set up the event loop: %s", strerror(errno));
    return STATUS_OK;
}

void loop_close(struct http_server *s)
{
    const int fds[] = {s->epoll_fd, s->event_fd, s->timer_fd};
    for (size_t i = 0; i < sizeof(fds) / sizeof(*fds); i++) {
        if (fds[i] >= 0)
            close(fds[i]);
    }
}
