/* http_private.h - what http.c, http_loop.c and their helpers share; for no one else.
 *
 *   http.c         requests and replies: the owner of libmicrohttpd
 *   http_admit.c   what a request's header decides: route, key, type of body
 *   http_loop.c    the io thread: epoll, accept, the door, timers, stop order
 *   http_socket.c  listening sockets and socket options
 *   http_route.c   paths and methods
 *   http_error.c   the error object
 *   http_check.c   request headers
 *
 * A client socket's life: accepted by the loop, which holds it at the door until the header of
 * its first request is there and sound; then the library owns it (inside). A refused client
 * gets a reply from the door and lingers until it has read it.
 *
 * Threads: everything belongs to the io thread, but the atomics.
 */
#ifndef LATTE_SERVER_HTTP_PRIVATE_H
#define LATTE_SERVER_HTTP_PRIVATE_H

#include <pthread.h>
#include <stdatomic.h>
#include <sys/socket.h>

#include "server/api_keys.h"
#include "server/http.h"
#include "server/http_check.h"

struct MHD_Connection;
struct MHD_Daemon;
struct MHD_Response;

enum {
    REQUEST_ID_BYTES = 72,
    CLIENT_BYTES = 64,
    PEEK_BYTES = HTTP_HEADER_LIMIT + 1,
    MAX_HEADERS = 16, /* that a handler sets */
};

enum connection_place { AT_DOOR, LINGERING, INSIDE };

struct connection {
    struct http_server *server;
    struct connection *next, *previous;
    struct http_request *request; /* in progress, owned by http.c */
    int fd;
    enum connection_place place;
    bool peer_closed;          /* the client will send no more */
    int64_t deadline_ns;       /* for the header, or the end of lingering; 0 for none */
    size_t header_seen;        /* inside, between requests: bytes of the next header */
    char client[CLIENT_BYTES]; /* its address, for the log */
};

struct header {
    const char *name, *value;
};

/* One request, from its header to on_completed in http.c, which frees it. */
struct http_request {
    struct connection *connection;
    struct http_server *server;
    struct MHD_Connection *mhd;
    struct arena arena;
    const char *method, *path, *param;
    const struct http_route *route; /* NULL when nothing matched */
    char id[REQUEST_ID_BYTES];
    int key_index;
    int64_t arrival_ns;
    struct http_framing framing;

    struct bytes body;
    size_t charged;                 /* bytes, by http_charge */
    uint64_t n_received, n_drained; /* body bytes kept or dropped */
    bool handled;                   /* the handler was called */
    bool deferred, suspended;
    bool gone; /* the client left: nothing more is sent */

    struct MHD_Response *response; /* chosen, not queued yet; owned */
    int code;                      /* of the response, 0 while there is none */
    struct header headers[MAX_HEADERS];
    int n_headers;

    http_source_read *read; /* of a stream */
    void *read_context;
    bool is_event_stream, comment_due;
    char tail[2];         /* the last bytes of the stream */
    int64_t last_sent_ns; /* on a stream */
    uint64_t n_sent;

    void (*on_close)(void *context, bool delivered);
    void *on_close_context;
    int64_t prompt_tokens, output_tokens;
};

struct http_server {
    struct http_config config;
    struct options options;
    struct api_keys *keys; /* NULL: the API is open */
    struct MHD_Daemon *daemon;
    int listen_fd, port;
    char url[160];
    struct stat_identity {
        unsigned long device, inode;
    } socket_file; /* of the unix socket we made */
    int epoll_fd, event_fd, timer_fd;
    bool has_half_closed; /* some client will send no more; see end_half_closed */
    bool listen_paused;   /* out of file descriptors until the next tick */
    pthread_t thread;
    bool started;
    struct connection *connections; /* all of them */
    struct connection *entering;    /* being handed to the library */
    int n_lingering;
    size_t buffered_bytes; /* memory of all request bodies, and what was charged */
    uint64_t id_seed, n_requests;
    _Atomic bool notified, draining, stopping;
    _Atomic int n_active, n_connections;
    char peek[PEEK_BYTES];
};

int64_t http_now_ns(void); /* CLOCK_MONOTONIC */

/* http_socket.c */
enum status socket_listen(struct http_server *s, struct error *err);
void socket_unlisten(struct http_server *s); /* close and unlink; harmless twice */
void socket_tune(int fd);
void socket_describe(const struct sockaddr_storage *address, char out[CLIENT_BYTES]);

/* http_route.c */
struct route_match {
    const struct http_route *route; /* NULL: see path_exists */
    const char *param;              /* inside the path given, or NULL */
    bool path_exists;               /* with other methods: 405, not 404 */
};
struct route_match route_find(const struct http_route *routes, size_t n, const char *method,
                              const char *path);
/* The value of Allow for a path that exists: "GET, HEAD, OPTIONS". */
void route_allow(const struct http_route *routes, size_t n, const char *path, struct bytes *out);

/* http_error.c */
const char *http_reason(int http_code);
const char *http_error_code(int http_code); /* OpenAI's "code" for errors of this layer */

/* http_admit.c */
void request_choose_id(struct http_request *r);
void request_admit(struct http_request *r); /* find the route, or refuse */

/* http_loop.c */
enum status loop_open(struct http_server *s, struct error *err);
void loop_close(struct http_server *s);
void *loop_run(void *server);
/* Forget a connection whose socket the library closes. */
void loop_forget(struct connection *c);

/* http.c */
/* A refusal of this layer: what comes of the body is dropped. */
void request_refuse(struct http_request *r, int http_code, const char *message);
/* Called by the loop: */
bool inside_enter(struct connection *c, const struct sockaddr_storage *address,
                  socklen_t n_address);
void inside_hang_up(struct connection *c); /* the client will send no more */
int inside_epoll_fd(const struct http_server *s);
/* Let the library work; returns the milliseconds it can wait, at most 1000. */
int inside_run(struct http_server *s);
bool inside_awaits_input(const struct connection *c);    /* of a request, or for one to begin */
void inside_sweep(struct connection *c, int64_t now_ns); /* once a second */
void inside_end_all(struct http_server *s);

#endif
