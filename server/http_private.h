/* http_private.h - what http.c, http_loop.c and their helpers share; for no one else.
 *
 *   http.c         opening, closing, libmicrohttpd's daemon and its callbacks
 *   http_request.c a request from its header to its end, its body and memory
 *   http_reply.c   replies and streams
 *   http_admit.c   what a request's header decides: route, key, type of body
 *   http_loop.c    the io thread: epoll, accept, timers, stop order
 *   http_door.c    looking at a request's header before the library reads it
 *   http_tls.c     TLS before the door, by a thread of its own
 *   http_socket.c  listening sockets and socket options
 *   http_route.c   paths and methods
 *   http_error.c   the error object
 *   http_check.c   request headers
 *   http_healthcheck.c  the client of --healthcheck
 *
 * A client socket's life: accepted by the loop, which holds it at the door until the header of
 * a request is there and sound; then the library may read it (inside). When the reply is sent
 * the connection goes back to the door, suspended in the library. A refused client gets a reply
 * from the door and lingers until it has read it.
 *
 * The library reads all that is there, so a request that was sent behind another without
 * waiting may be read unseen. When the door sees that coming, the reply says that it is the
 * last one. In any case a request begins only when its header, as the library understood it, is
 * word for word the one that was looked at.
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
#include "server/http_tls.h"

struct MHD_Connection;
struct addrinfo;
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
    struct http_request *request; /* in progress */
    struct MHD_Connection *mhd;   /* once the library knows it; else the fd is ours */
    int fd;
    enum connection_place place;
    bool peer_closed;    /* the client will send no more */
    int64_t deadline_ns; /* at the door and lingering; 0 for none */
    /* Of the request at the door, then of the one that was let in. */
    bool header_begun, has_surplus; /* surplus: bytes behind its end */
    bool is_target_checked;         /* the library read the target that was looked at */
    struct http_framing framing;
    struct bytes header;       /* as it was looked at, until the request begins */
    char client[CLIENT_BYTES]; /* its address, for the log */
};

struct header {
    const char *name, *value;
};

/* One request, from request_begin to request_end. */
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
    uint64_t n_at_sweep;            /* n_received, once a second */
    int n_stuck;                    /* sweeps without progress though bytes were there */
    bool handled;                   /* the handler was called */
    bool deferred, suspended;
    bool closes; /* the connection ends with the reply */
    bool gone;   /* the client left: nothing more is sent */

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
    struct tls *tls;       /* NULL: plain HTTP */
    struct MHD_Daemon *daemon;
    int listen_fd, port;
    char url[160];
    struct stat_identity {
        unsigned long device, inode;
    } socket_file; /* of the unix socket we made */
    int epoll_fd, event_fd, timer_fd;
    int64_t drain_ns;     /* when draining began, 0 before */
    bool has_resumed;     /* something was resumed that the library has not looked at */
    bool has_half_closed; /* some client will send no more; see end_half_closed */
    bool listen_paused;   /* out of file descriptors until the next tick */
    pthread_t thread;
    bool started;
    struct connection *connections; /* all of them */
    struct connection *entering;    /* being handed to the library */
    int n_lingering;
    size_t buffered_bytes; /* memory of all request bodies, and what was charged */
    uint64_t id_seed, n_requests;
    _Atomic size_t state_bytes; /* of an exported state, 0 before it is known */
    _Atomic bool notified, draining, stopping;
    _Atomic int n_active, n_connections;
    char peek[PEEK_BYTES];
};

int64_t http_now_ns(void); /* CLOCK_MONOTONIC */

/* http_socket.c */
enum status socket_listen(struct http_server *s, struct error *err);
/* The addresses of --host and --port, to be freed by freeaddrinfo; getaddrinfo's code. */
int socket_resolve(const struct options *o, int flags, struct addrinfo **found);
void socket_unlisten(struct http_server *s); /* close and unlink; harmless twice */
void socket_tune(int fd);
void socket_describe(const struct sockaddr_storage *address, char out[CLIENT_BYTES]);

/* http_route.c */
struct route_match {
    const struct http_route *route; /* NULL: see path_exists */
    const char *param;              /* [n_param] inside the path given, or NULL */
    size_t n_param;
    bool path_exists; /* with other methods: 405, not 404 */
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
bool loop_watch(struct http_server *s, int operation, int fd, uint32_t events, void *data);
/* A connection of this descriptor, watched for input; NULL without memory. */
struct connection *loop_adopt(struct http_server *s, int fd, const char *client);
void loop_end(struct connection *c); /* close, by ourselves or through the library */
/* Forget a connection whose socket the library closes. */
void loop_forget(struct connection *c);

/* http_door.c */
void door_look(struct connection *c);  /* something came */
void door_await(struct connection *c); /* the reply is sent: wait for the next request */
void door_linger(struct connection *c);
/* Answer, and read and throw away what the client still sends: closing at once would reset the
 * connection, and the reset could overtake the answer. */
void door_refuse(struct connection *c, int code, const char *message);
/* The same for a request whose body the library is still reading; ends it. */
void door_cut(struct connection *c, int code, const char *message);
/* The library is about to close the connection of a refused request, whose body may still be on
 * its way: read on through a descriptor of our own for a while, and throw it away. */
void door_outlive(struct connection *c);
/* Drop what a client sent behind its last request: closing with it unread would reset the
 * connection, and the reset could overtake the reply. */
void door_discard(struct connection *c);

/* http_request.c */
/* The library has read a request line with this target, or a whole header. NULL, for the
 * connection to be closed, when that is not what was looked at. */
void connection_check_target(struct connection *c, const char *target);
struct http_request *request_begin(struct connection *c, struct MHD_Connection *mhd,
                                   const char *url, const char *method, const char *version);
/* A piece of the body. False: the client sends on and on after it was refused. */
bool request_receive(struct http_request *r, const char *data, size_t n);
void request_end(struct http_request *r, bool delivered); /* frees it */
void request_resume(struct http_request *r);
/* The most bytes that the body of a route with these flags may have; of any route. */
size_t body_limit(const struct http_server *s, unsigned flags);
size_t body_limit_of_all(const struct http_server *s);
void request_cancel(struct http_request *r); /* nothing more is sent; it will end soon */

/* http_reply.c */
/* A refusal of this layer: what comes of the body is dropped. */
void request_refuse(struct http_request *r, int http_code, const char *message);
void request_refuse_length(struct http_request *r, size_t limit); /* 413 */
bool refusal_comes_at_once(const struct http_request *r);         /* before the body */
bool stream_is_between_events(const struct http_request *r);

/* http.c, called by the loop */
bool inside_enter(struct connection *c, const struct sockaddr_storage *address,
                  socklen_t n_address);
void inside_resume(struct connection *c);  /* from the door */
void inside_hang_up(struct connection *c); /* the client will send no more */
int inside_epoll_fd(const struct http_server *s);
/* Let the library work; returns the milliseconds it can wait, at most 1000. */
int inside_run(struct http_server *s);
bool inside_awaits_input(const struct connection *c);    /* of a request, or for one to begin */
void inside_sweep(struct connection *c, int64_t now_ns); /* once a second */
void inside_end_all(struct http_server *s);

#endif
