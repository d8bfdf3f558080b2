/* http_healthcheck.c - asking a running server whether it is ready: see http.h
 *
 * Plain sockets, with TLS where the server has it: the question is one line, and the library that
 * serves has no client side.
 */
#include <errno.h>
#include <netdb.h>
#include <stdio.h>
#include <string.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include "server/http_private.h"
#include "server/http_tls.h"

enum { TIMEOUT_S = 4, ANSWER_BYTES = 4096 };

static enum status fail_ask(struct error *err, const char *url, const char *what)
{
    return fail(err, STATUS_IO, "%s: expected an answer from /health/ready, found: %s", url, what);
}

/* Connecting obeys the time to send. */
static int connect_to(const struct addrinfo *at)
{
    const struct timeval limit = {.tv_sec = TIMEOUT_S};
    int fd = socket(at->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -1;
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
    if (!connect(fd, at->ai_addr, at->ai_addrlen))
        return fd;
    int saved = errno;
    close(fd);
    errno = saved;
    return -1;
}

static int connect_tcp(const struct options *o, const char *url, struct error *err)
{
    struct addrinfo *found = NULL;
    int fd = -1;
    int code = socket_resolve(o, 0, &found);
    if (code) {
        fail_ask(err, url, gai_strerror(code));
        return -1;
    }
    errno = EADDRNOTAVAIL;
    for (const struct addrinfo *at = found; at && fd < 0; at = at->ai_next)
        fd = connect_to(at); /* Linux takes the address of all interfaces for its loopback */
    int saved = errno;
    freeaddrinfo(found);
    if (fd < 0)
        fail_ask(err, url, strerror(saved));
    return fd;
}

static int connect_unix(const char *path, const char *url, struct error *err)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    const struct addrinfo at = {.ai_family = AF_UNIX,
                                .ai_addr = (struct sockaddr *)&address,
                                .ai_addrlen = sizeof(address)};
    int fd = -1;
    errno = ENAMETOOLONG;
    if (strlen(path) < sizeof(address.sun_path)) {
        memcpy(address.sun_path, path, strlen(path) + 1);
        fd = connect_to(&at);
    }
    if (fd < 0)
        fail_ask(err, url, strerror(errno));
    return fd;
}

static size_t ask_plainly(int fd, const char *question, char *answer, size_t cap)
{
    size_t n = 0;
    ssize_t got = send(fd, question, strlen(question), MSG_NOSIGNAL);
    while (got > 0 && n < cap) {
        got = recv(fd, answer + n, cap - n, 0);
        n += got > 0 ? (size_t)got : 0;
    }
    return got >= 0 ? n : 0;
}

/* The whole answer as a string; false when there is none in time. */
static bool ask(const struct options *o, int fd, char answer[ANSWER_BYTES])
{
    static const char question[] = "GET /health/ready HTTP/1.1\r\nHost: localhost\r\n"
                                   "User-Agent: latte-healthcheck\r\nConnection: close\r\n\r\n";
    size_t n = (o->tls_cert ? tls_ask : ask_plainly)(fd, question, answer, ANSWER_BYTES - 1);
    answer[n] = 0;
    return n > 0;
}

static enum status judge(const char *answer, const char *url, struct error *err)
{
    const char *body = strstr(answer, "\r\n\r\n");
    int code = 0;
    sscanf(answer, "HTTP/1.%*1[01] %3d", &code);
    if (code == 200)
        return STATUS_OK;
    return fail(err, STATUS_IO, "%s: expected 200 from /health/ready, found %d %.200s", url, code,
                body ? body + 4 : "");
}

enum status http_healthcheck(const struct options *o, struct error *err)
{
    char url[160], answer[ANSWER_BYTES];
    bool is_v6 = strchr(o->host, ':') && o->host[0] != '[';
    if (o->unix_socket)
        snprintf(url, sizeof(url), "unix:%s", o->unix_socket);
    else
        snprintf(url, sizeof(url), is_v6 ? "http%s://[%s]:%d" : "http%s://%s:%d",
                 o->tls_cert ? "s" : "", o->host, (int)o->port);
    if (!o->unix_socket && !o->port)
        return fail_field(err, STATUS_INVALID, "port",
                          "--healthcheck: expected the --port that a server listens on, found 0");
    int fd = o->unix_socket ? connect_unix(o->unix_socket, url, err) : connect_tcp(o, url, err);
    if (fd < 0)
        return STATUS_IO;
    bool answered = ask(o, fd, answer);
    close(fd);
    return answered ? judge(answer, url, err) : fail_ask(err, url, "nothing");
}
