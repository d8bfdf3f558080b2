/* bench_server.c - see bench_server.h */
#include "tests/bench/bench_server.h"

#include <arpa/inet.h>
#include <curl/curl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/bench/bench.h"

enum { START_TIMEOUT_S = 120, MAX_ARGS = 96, TIMEOUT_S = 3600 };

/* ---- the server ---- */

int bench_free_port(void)
{
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t n = sizeof(a);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    int port = 0;
    if (fd >= 0 && !bind(fd, (struct sockaddr *)&a, n) &&
        !getsockname(fd, (struct sockaddr *)&a, &n))
        port = ntohs(a.sin_port);
    if (fd >= 0)
        close(fd);
    return port;
}

static void exec_server(const char *const *given, int port)
{
    char path[4096], port_text[16];
    char *args[MAX_ARGS + 8];
    int n = 0;
    ssize_t length = readlink("/proc/self/exe", path, sizeof(path) - 32);
    if (length < 0)
        return;
    path[length] = '\0';
    strcpy(strrchr(path, '/'), "/latte-server");
    snprintf(port_text, sizeof(port_text), "%d", port);
    const char *const fixed[] = {path,          "--port", port_text, "--no-access-log",
                                 "--log-level", "warn"};
    for (size_t i = 0; i < sizeof(fixed) / sizeof(*fixed); i++)
        args[n++] = (char *)fixed[i];
    while (*given && n < MAX_ARGS)
        args[n++] = (char *)*given++;
    args[n] = NULL;
    execv(path, args);
    perror(path);
}

pid_t bench_server_start(const char *const *args, int port)
{
    pid_t pid = fork();
    if (pid == 0) {
        dup2(STDERR_FILENO, STDOUT_FILENO); /* stdout is for the table */
        exec_server(args, port);
        _exit(127);
    }
    return pid;
}

bool bench_server_await(const char *base, pid_t pid)
{
    struct bench_client client;
    const double deadline = bench_now() + START_TIMEOUT_S;
    bool ready = false, there = bench_client_open(&client, base);
    while (there && !ready && bench_now() < deadline) {
        ready = bench_request(&client, "GET", "/health/ready", NULL, 0);
        if (!ready)
            usleep(5000);
        there = pid <= 0 || waitpid(pid, NULL, WNOHANG) == 0;
    }
    bench_client_close(&client);
    return ready;
}

void bench_server_stop(pid_t pid)
{
    if (pid <= 0)
        return;
    kill(pid, SIGTERM);
    waitpid(pid, NULL, 0);
}

/* ---- requests ---- */

static size_t take_body(char *data, size_t size, size_t n, void *context)
{
    struct bytes *body = context;
    bytes_append(body, data, size * n);
    return body->failed ? 0 : size * n;
}

bool bench_client_open(struct bench_client *c, const char *base)
{
    *c = (struct bench_client){.base = base, .curl = curl_easy_init()};
    return c->curl != NULL;
}

void bench_client_close(struct bench_client *c)
{
    if (c->curl)
        curl_easy_cleanup(c->curl);
    bytes_free(&c->body);
    c->curl = NULL;
}

bool bench_request(struct bench_client *c, const char *method, const char *path, const char *body,
                   size_t n)
{
    char url[700];
    snprintf(url, sizeof(url), "%s%s", c->base, path);
    struct curl_slist *headers = curl_slist_append(NULL, "Content-Type: application/json");
    headers = curl_slist_append(headers, "Expect:");
    c->body.n = 0;
    c->code = 0;
    curl_easy_reset(c->curl); /* keeps the connection */
    curl_easy_setopt(c->curl, CURLOPT_URL, url);
    curl_easy_setopt(c->curl, CURLOPT_CUSTOMREQUEST, method);
    curl_easy_setopt(c->curl, CURLOPT_WRITEFUNCTION, take_body);
    curl_easy_setopt(c->curl, CURLOPT_WRITEDATA, &c->body);
    curl_easy_setopt(c->curl, CURLOPT_TIMEOUT, (long)TIMEOUT_S);
    curl_easy_setopt(c->curl, CURLOPT_NOSIGNAL, 1L);
    if (body) {
        curl_easy_setopt(c->curl, CURLOPT_HTTPHEADER, headers);
        curl_easy_setopt(c->curl, CURLOPT_POSTFIELDSIZE, (long)n);
        curl_easy_setopt(c->curl, CURLOPT_POSTFIELDS, body);
    }
    const double started = bench_now();
    if (curl_easy_perform(c->curl) == CURLE_OK)
        curl_easy_getinfo(c->curl, CURLINFO_RESPONSE_CODE, &c->code);
    c->seconds = bench_now() - started;
    curl_slist_free_all(headers);
    return c->code == 200;
}

bool bench_post(struct bench_client *c, const char *path, const char *format, ...)
{
    char *text = NULL;
    va_list args;
    va_start(args, format);
    int n = vasprintf(&text, format, args);
    va_end(args);
    bool ok = n >= 0 && bench_request(c, "POST", path, text, (size_t)n);
    free(n >= 0 ? text : NULL);
    return ok;
}

/* What stands behind "name":, or NULL. */
static const char *find(const struct bench_client *c, const char *name)
{
    char quoted[80];
    snprintf(quoted, sizeof(quoted), "\"%s\":", name);
    const char *at = c->body.n ? strstr(c->body.data, quoted) : NULL;
    return at ? at + strlen(quoted) : NULL;
}

double bench_number(const struct bench_client *c, const char *name)
{
    const char *at = find(c, name);
    return at ? strtod(at, NULL) : 0;
}

const char *bench_string(const struct bench_client *c, const char *name)
{
    static _Thread_local char text[200];
    const char *at = find(c, name);
    *text = '\0';
    if (at && *at == '"')
        snprintf(text, sizeof(text), "%.*s", (int)strcspn(at + 1, "\""), at + 1);
    return text;
}
