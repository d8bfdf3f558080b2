/* http_socket.c - listening on TCP or a unix socket, and the options of a client's socket. */
#include <arpa/inet.h>
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "server/http_private.h"

enum {
    BACKLOG = 1024,
    USER_TIMEOUT_MS = 25000,
    SEND_BUFFER_BYTES = 64 * 1024,
    SOCKET_HOST_BYTES = 64
};

static enum status fail_listen(struct error *err, const char *what)
{
    return fail(err, STATUS_IO, "cannot listen on %s: %s", what, strerror(errno));
}

/* Whether anybody accepts connections at this unix socket. */
static bool is_alive(const struct sockaddr_un *address)
{
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return true;
    bool refused =
        connect(fd, (const struct sockaddr *)address, sizeof(*address)) && errno == ECONNREFUSED;
    close(fd);
    return !refused;
}

/* A socket file that a killed server left behind goes; everything else stays. */
static enum status remove_stale(const struct sockaddr_un *address, struct error *err)
{
    struct stat info;
    if (lstat(address->sun_path, &info))
        return errno == ENOENT ? STATUS_OK : fail_listen(err, address->sun_path);
    if (!S_ISSOCK(info.st_mode))
        return fail(err, STATUS_IO, "cannot listen on %s: it exists and is no socket",
                    address->sun_path);
    if (is_alive(address))
        return fail(err, STATUS_IO, "cannot listen on %s: another server listens there",
                    address->sun_path);
    if (unlink(address->sun_path))
        return fail_listen(err, address->sun_path);
    return STATUS_OK;
}

static enum status listen_unix(struct http_server *s, struct error *err)
{
    const char *path = s->options.unix_socket;
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof(address.sun_path))
        return fail_field(err, STATUS_INVALID, "unix-socket",
                          "--unix-socket: expected a path of at most %zu bytes, found %zu",
                          sizeof(address.sun_path) - 1, strlen(path));
    memcpy(address.sun_path, path, strlen(path) + 1);
    enum status st = remove_stale(&address, err);
    if (st)
        return st;
    s->listen_fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    mode_t mask = umask(0117); /* 0660 from the start, not a moment later */
    int failed = s->listen_fd < 0 || bind(s->listen_fd, (void *)&address, sizeof(address));
    umask(mask);
    struct stat info;
    if (failed || listen(s->listen_fd, BACKLOG) || lstat(path, &info))
        return fail_listen(err, path);
    s->socket_file = (struct stat_identity){info.st_dev, info.st_ino};
    snprintf(s->url, sizeof(s->url), "unix:%s", path);
    return STATUS_OK;
}

static int bind_address(const struct addrinfo *at)
{
    int fd = socket(at->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return -1;
    const int on = 1, off = 0;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    if (at->ai_family == AF_INET6) /* "::" takes IPv4 clients too */
        setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof(off));
    if (!bind(fd, at->ai_addr, at->ai_addrlen) && !listen(fd, BACKLOG))
        return fd;
    int saved = errno;
    close(fd);
    errno = saved;
    return -1;
}

static int bound_port(int fd)
{
    struct sockaddr_storage at;
    socklen_t n = sizeof(at);
    if (getsockname(fd, (struct sockaddr *)&at, &n))
        return 0;
    return ntohs(at.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)&at)->sin6_port
                                          : ((struct sockaddr_in *)&at)->sin_port);
}

/* "[::1]" is taken as "::1". */
static void strip_brackets(const char *host, char *out, size_t n)
{
    size_t length = strlen(host);
    bool bracketed = length > 2 && host[0] == '[' && host[length - 1] == ']';
    snprintf(out, n, "%.*s", (int)(bracketed ? length - 2 : length), host + bracketed);
}

int socket_resolve(const struct options *o, int flags, struct addrinfo **found)
{
    char host[SOCKET_HOST_BYTES], port[16];
    const struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = flags};
    strip_brackets(o->host, host, sizeof(host));
    snprintf(port, sizeof(port), "%d", (int)o->port);
    return getaddrinfo(host, port, &hints, found);
}

static enum status listen_tcp(struct http_server *s, struct error *err)
{
    char host[SOCKET_HOST_BYTES], what[96];
    struct addrinfo *found = NULL;
    strip_brackets(s->options.host, host, sizeof(host));
    snprintf(what, sizeof(what), "%s port %d", host, (int)s->options.port);
    int code = socket_resolve(&s->options, AI_PASSIVE, &found);
    if (code)
        return fail(err, STATUS_IO, "cannot listen on %s: %s", what, gai_strerror(code));
    errno = EADDRNOTAVAIL;
    for (const struct addrinfo *at = found; at && s->listen_fd < 0; at = at->ai_next)
        s->listen_fd = bind_address(at);
    int saved = errno;
    freeaddrinfo(found);
    errno = saved;
    if (s->listen_fd < 0)
        return fail_listen(err, what);
    s->port = bound_port(s->listen_fd);
    bool is_v6 = strchr(host, ':');
    snprintf(s->url, sizeof(s->url), is_v6 ? "%s://[%s]:%d" : "%s://%s:%d",
             s->options.tls_cert ? "https" : "http", host, s->port);
    return STATUS_OK;
}

enum status socket_listen(struct http_server *s, struct error *err)
{
    return s->options.unix_socket ? listen_unix(s, err) : listen_tcp(s, err);
}

void socket_unlisten(struct http_server *s)
{
    if (s->listen_fd < 0)
        return;
    close(s->listen_fd);
    s->listen_fd = -1;
    struct stat info;
    const char *path = s->options.unix_socket;
    /* Another server may have taken the path meanwhile; its file is not ours to remove. */
    if (path && s->socket_file.inode && !lstat(path, &info) &&
        info.st_dev == s->socket_file.device && info.st_ino == s->socket_file.inode)
        unlink(path);
}

void socket_tune(int fd)
{
    const int on = 1, give_up_ms = USER_TIMEOUT_MS, buffer = SEND_BUFFER_BYTES;
    /* A bounded send buffer makes a slow reader felt here; these fail on unix sockets. */
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &buffer, sizeof(buffer));
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
    setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &give_up_ms, sizeof(give_up_ms));
}

void socket_describe(const struct sockaddr_storage *address, char out[CLIENT_BYTES])
{
    char host[INET6_ADDRSTRLEN] = "";
    if (address->ss_family == AF_INET) {
        const struct sockaddr_in *at = (const struct sockaddr_in *)address;
        inet_ntop(AF_INET, &at->sin_addr, host, sizeof(host));
        snprintf(out, CLIENT_BYTES, "%s:%u", host, ntohs(at->sin_port));
    } else if (address->ss_family == AF_INET6) {
        const struct sockaddr_in6 *at = (const struct sockaddr_in6 *)address;
        inet_ntop(AF_INET6, &at->sin6_addr, host, sizeof(host));
        snprintf(out, CLIENT_BYTES, "[%s]:%u", host, ntohs(at->sin6_port));
    } else {
        snprintf(out, CLIENT_BYTES, "unix");
    }
}
