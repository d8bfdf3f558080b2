/* redis_server.c - see redis_server.h */
#include "tests/unit/redis_server.h"

#include "tests/unit/unit.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <hiredis/hiredis.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/unit/model_files.h"

enum { ATTEMPTS = 5 }; /* to find a port that nobody takes meanwhile */

bool redis_server_is_installed(void)
{
    bool is_there = !system("command -v redis-server >/dev/null 2>&1");
    if (!is_there)
        print_message("SKIPPED: tests with Redis, there is no redis-server\n");
    return is_there;
}

static int free_port(void)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t n = sizeof(address);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, n) ||
        getsockname(fd, (struct sockaddr *)&address, &n))
        fail_msg("no free port");
    close(fd);
    return ntohs(address.sin_port);
}

static void run(const struct redis_server *s)
{
    char port[12], socket_path[140], log[140];
    snprintf(port, sizeof(port), "%d", s->port);
    snprintf(socket_path, sizeof(socket_path), "%s/socket", s->dir);
    snprintf(log, sizeof(log), "%s/log", s->dir);
    execlp("redis-server", "redis-server", "--port", port, "--bind", "127.0.0.1", "--unixsocket",
           socket_path, "--dir", s->dir, "--logfile", log, "--save", "", "--appendonly", "yes",
           "--appendfsync", "always", "--daemonize", "no", *s->password ? "--requirepass" : NULL,
           s->password, NULL);
    _exit(127);
}

/* By its socket: the port may be somebody else's by now. */
static redisContext *connect_to(const struct redis_server *s)
{
    const struct timeval limit = {5, 0};
    char path[140];
    snprintf(path, sizeof(path), "%s/socket", s->dir);
    redisContext *c = redisConnectUnixWithTimeout(path, limit);
    if (!c || c->err)
        return c;
    redisSetTimeout(c, limit);
    if (*s->password)
        freeReplyObject(redisCommand(c, "AUTH %s", s->password));
    return c;
}

static bool answers(const struct redis_server *s)
{
    redisContext *c = connect_to(s);
    redisReply *reply = c && !c->err ? redisCommand(c, "PING") : NULL;
    bool good = reply && reply->type == REDIS_REPLY_STATUS;
    if (reply)
        freeReplyObject(reply);
    if (c)
        redisFree(c);
    return good;
}

/* False: it ended at once, since the port was taken, say. */
static bool begin(struct redis_server *s)
{
    pid_t parent = getpid();
    s->pid = fork();
    assert_true(s->pid >= 0);
    if (!s->pid) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != parent)
            _exit(127);
        run(s);
    }
    for (int i = 0; !answers(s); i++) {
        if (waitpid(s->pid, NULL, WNOHANG)) {
            s->pid = 0;
            return false;
        }
        if (i > 500)
            fail_msg("redis-server does not answer; its log is %s/log", s->dir);
        usleep(20000);
    }
    return true;
}

void redis_server_start(struct redis_server *s)
{
    if (!begin(s))
        fail_msg("redis-server does not begin; its log is %s/log", s->dir);
}

void redis_server_open(struct redis_server *s, const char *password)
{
    *s = (struct redis_server){0};
    signal(SIGPIPE, SIG_IGN);
    snprintf(s->password, sizeof(s->password), "%s", password ? password : "");
    assert_int_equal(test_dir_make(s->dir, sizeof(s->dir)), 0);
    const char *login = password ? s->password : "", *at = password ? "@" : "",
               *colon = password ? ":" : "";
    for (int i = 0; i < ATTEMPTS && !s->pid; i++) {
        s->port = free_port();
        begin(s);
    }
    if (!s->pid)
        fail_msg("redis-server does not begin; its log is %s/log", s->dir);
    snprintf(s->url, sizeof(s->url), "redis://%s%s%s127.0.0.1:%d/0", colon, login, at, s->port);
    snprintf(s->socket_url, sizeof(s->socket_url), "unix://%s%s%s%s/socket", colon, login, at,
             s->dir);
}

void redis_server_kill(struct redis_server *s)
{
    if (s->pid <= 0)
        return;
    kill(s->pid, SIGKILL);
    waitpid(s->pid, NULL, 0);
    s->pid = 0;
}

void redis_server_ask(const struct redis_server *s, const char *const *words, char *out, int n)
{
    int count = 0;
    while (words[count])
        count++;
    redisContext *c = connect_to(s);
    redisReply *whole = redisCommandArgv(c, count, (const char **)words, NULL);
    if (!whole)
        fail_msg("redis-server: %s", c->errstr);
    const redisReply *reply = whole;
    if (reply->type == REDIS_REPLY_ARRAY && reply->elements)
        reply = reply->element[0];
    if (reply->type == REDIS_REPLY_INTEGER)
        snprintf(out, (size_t)n, "%lld", reply->integer);
    else
        snprintf(out, (size_t)n, "%s", reply->str ? reply->str : "(nil)");
    freeReplyObject(whole);
    redisFree(c);
}

void redis_server_close(struct redis_server *s)
{
    if (!*s->dir)
        return;
    redis_server_kill(s);
    test_dir_remove(s->dir);
    *s = (struct redis_server){0};
}
