/* bench_server.h - a latte-server of the bench's own, and requests to it or another one.
 *
 * Threads: a client by one thread at a time.
 * Memory:  a client owns its connection and the last reply.
 * Errors:  false or -1; what a request came to is in the client.
 */
#ifndef LATTE_TESTS_BENCH_SERVER_H
#define LATTE_TESTS_BENCH_SERVER_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

#include "engine/base/bytes.h"

/* A loopback port nobody listens on at the moment. */
int bench_free_port(void);
/* Start the latte-server that stands beside this program on that port, with these arguments,
 * which end with NULL. Its pid, or -1. */
pid_t bench_server_start(const char *const *args, int port);
/* Until /health/ready is 200; false when the process ends before, or after two minutes. pid 0: a
 * server of somebody else's. */
bool bench_server_await(const char *base, pid_t pid);
void bench_server_stop(pid_t pid); /* SIGTERM, and wait; accepts 0 and -1 */

struct bench_client {
    const char *base; /* "http://127.0.0.1:8080", borrowed */
    void *curl;       /* its connection, which is kept */
    struct bytes body;
    long code;      /* of the last reply, 0 without one */
    double seconds; /* from sending the request to the end of the reply */
};

bool bench_client_open(struct bench_client *c, const char *base);
void bench_client_close(struct bench_client *c);
/* One request; body may be NULL for n of 0. True for 200. */
bool bench_request(struct bench_client *c, const char *method, const char *path, const char *body,
                   size_t n);
/* The same with a body that is formatted. */
bool bench_post(struct bench_client *c, const char *path, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
/* The number or the string behind "name": in the last reply; 0 and "" when there is none. The
 * string is valid until the next call. */
double bench_number(const struct bench_client *c, const char *name);
const char *bench_string(const struct bench_client *c, const char *name);

#endif
