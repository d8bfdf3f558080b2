/* harness.h - the real server in a test: start it, talk to it, look at it, end it.
 *
 * server_start runs build/<variant>/latte-server (found beside the running test) on a free port
 * with a tiny random model that carries the bundled tokenizer, and returns when it is ready.
 * The client side is libcurl for well-formed requests and plain sockets for the others.
 *
 * Threads: the test's own; client_send may be used by several threads at once.
 * Memory:  a reply owns its buffers until reply_free; a server its files until server_stop.
 * Errors:  whatever goes wrong in the harness fails the running test with the server's log.
 */
#ifndef LATTE_TESTS_HARNESS_H
#define LATTE_TESTS_HARNESS_H

#include "tests/unit/unit.h"

#include <stdbool.h>
#include <sys/types.h>

#include "engine/base/bytes.h"

struct server {
    pid_t pid;
    int port;          /* 0 when it listens on a unix socket */
    char url[96];      /* "http://127.0.0.1:4711", no slash at the end */
    char socket[108];  /* path of the unix socket, or empty */
    char trusted[160]; /* with --tls-cert: that file, which clients trust; or empty */
    char dir[128];     /* scratch directory: log, model */
    char model[160];   /* model directory given with --model */
    int stdout_fd;
};

/* Start with flags besides --model and --port 0, ending with NULL; args may be NULL. A
 * --model among them replaces the tiny model. Waits for /health/ready. */
void server_start(struct server *s, const char *const *args);
/* The same without waiting: returns once the port is printed. */
void server_launch(struct server *s, const char *const *args);
void server_wait_ready(const struct server *s);
/* Run the binary to its end with exactly these flags; returns the exit code and what it
 * printed on stdout and stderr together. */
int server_run(const char *const *args, struct bytes *output);

/* Send a signal; wait for the end and return its exit code (128 + n when a signal ended it). */
void server_signal(const struct server *s, int signal_number);
int server_wait_exit(struct server *s, int timeout_ms);
/* SIGTERM, wait, remove the files. The test fails when the server did not exit with 0. */
void server_stop(struct server *s);

/* Everything logged so far, zero-terminated; free it. */
char *server_log(const struct server *s);
/* The value of a sample of /metrics, by its exact name and labels, -1 when it is absent. */
double server_metric(const struct server *s, const char *sample);
/* Poll until the sample has the value; false after timeout_ms. */
bool server_await_metric(const struct server *s, const char *sample, double value, int timeout_ms);

/* Write the tiny model into a fresh directory (for tests that start the server themselves);
 * the caller removes it with test_dir_remove of model_files.h. */
void make_tiny_model(char *dir, size_t n);

/* One request through libcurl. */
struct client_request {
    const char *method;         /* NULL: GET, or POST when there is a body */
    const char *path;           /* "/v1/models", query included */
    const char *body;           /* NULL for none */
    size_t n_body;              /* 0: strlen(body) */
    bool chunked;               /* send the body chunked */
    const char *const *headers; /* "Name: value", ends with NULL; may be NULL. A body is sent as
                                 * application/json unless a Content-Type is among them. */
    int timeout_ms;             /* 0: a minute */
    /* Called with each piece of the body as it arrives; false hangs up. May be NULL. */
    bool (*on_data)(void *context, const char *data, size_t n);
    void *context;
};
struct reply {
    int code;             /* 0: no answer; see curl_error */
    int curl_error;       /* CURLcode */
    struct bytes headers; /* as received, status line included */
    struct bytes body;
};
void client_send(const struct server *s, const struct client_request *request, struct reply *reply);
void client_get(const struct server *s, const char *path, struct reply *reply);
void client_post(const struct server *s, const char *path, const char *json, struct reply *reply);
/* The value of a header (case-insensitive name), copied into value[n]; false when absent. */
bool reply_header(const struct reply *reply, const char *name, char *value, size_t n);
void reply_free(struct reply *reply);

/* The reply is OpenAI's error object with this HTTP code and type, a message, and, when it is
 * not NULL, this "code"; fails the test otherwise. */
void assert_error_object(const struct reply *reply, int http_code, const char *type,
                         const char *code);

/* Raw sockets: connect, write all of it, read until the peer closes or timeout_ms of silence. */
int raw_connect(const struct server *s);
void raw_write(int fd, const char *data, size_t n);
void raw_text(int fd, const char *text);
/* Append to out; true when the peer has closed. */
bool raw_read(int fd, struct bytes *out, int timeout_ms);
/* Read until out contains text; false on timeout or close. */
bool raw_await(int fd, struct bytes *out, const char *text, int timeout_ms);
/* Send the text on a connection of its own and collect all that comes back. */
void raw_exchange(const struct server *s, const char *data, size_t n, struct bytes *out);

void sleep_ms(int ms);
int64_t now_ms(void); /* CLOCK_MONOTONIC */

#endif
