/* test_http.c - the server as a program: statuses with error objects, overload, slow and
 * vanishing clients, drain and stop, keys, sockets, logs. The shapes of the API's answers are
 * in test_api.c; the HTTP layer's corners in test_http_core.c. */
#include "tests/http/harness.h"

#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cjson/cJSON.h>

#include "tests/unit/model_files.h"

enum { WAIT_MS = 60000 };

#define RUNNING "latte_requests_running"
#define WAITING "latte_requests_waiting"
#define STEPS "latte_engine_steps_total"

/* A generation that would take hours. */
#define ENDLESS "{\"prompt\":\"a\",\"max_tokens\":1000000,\"ignore_eos\":true,\"stream\":true}"
#define ENDLESS_WHOLE "{\"prompt\":\"a\",\"max_tokens\":1000000,\"ignore_eos\":true}"

static void post_raw(int fd, const char *path, const char *body)
{
    struct bytes request = {0};
    bytes_format(&request,
                 "POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                 "Content-Length: %zu\r\n\r\n",
                 path, strlen(body));
    bytes_text(&request, body);
    raw_write(fd, request.data, request.n);
    bytes_free(&request);
}

/* A connection that has begun a completion. */
static int begin(const struct server *s, const char *body)
{
    int fd = raw_connect(s);
    post_raw(fd, "/v1/completions", body);
    return fd;
}

static void await_metric(const struct server *s, const char *sample, double value)
{
    if (!server_await_metric(s, sample, value, WAIT_MS))
        fail_msg("%s is %g, waited for %g", sample, server_metric(s, sample), value);
}

static int count(const struct bytes *b, const char *text)
{
    int n = 0;
    for (const char *at = b->data; at && (at = strstr(at, text)); at++)
        n++;
    return n;
}

static void await_log(const struct server *s, const char *text)
{
    int64_t end = now_ms() + WAIT_MS;
    for (bool found = false; !found; sleep_ms(5)) {
        char *log = server_log(s);
        found = strstr(log, text);
        free(log);
        if (!found && now_ms() > end)
            fail_msg("the log never said %s", text);
    }
}

static void assert_serves(const struct server *s)
{
    struct reply r;
    client_post(s, "/v1/completions", "{\"prompt\":\"a\",\"max_tokens\":3}", &r);
    if (r.code != 200)
        fail_msg("a plain completion was answered with %d: %s", r.code,
                 r.body.data ? r.body.data : "");
    reply_free(&r);
}

/* Statuses. */

static void test_statuses(void **state)
{
    (void)state;
    const char *args[] = {"--max-body-mb", "1", NULL};
    struct server s;
    server_start(&s, args);
    size_t n = 1100000;
    char *big = malloc(n);
    memset(big, ' ', n);
    const char *text_type[] = {"Content-Type: text/csv", NULL};
    char *long_path = malloc(9000);
    memset(long_path, 'p', 9000);
    long_path[0] = '/';
    long_path[8999] = '\0';
    const struct {
        struct client_request request;
        int code;
    } cases[] = {
        {{.path = "/v1/completions", .body = "{"}, 400},
        {{.path = "/v1/completions", .body = "{\"prompt\":1e999}"}, 400},
        {{.path = "/v1/chat/completions", .body = "[]"}, 400},
        {{.path = "/v1/models/no-such-model"}, 404},
        {{.path = "/v1/nothing"}, 404},
        {{.path = "/v1/completions"}, 405},
        {{.path = "/v1/models", .method = "DELETE"}, 405},
        {{.path = "/v1/completions", .body = big, .n_body = n}, 413},
        {{.path = "/v1/completions", .body = big, .n_body = n, .chunked = true}, 413},
        {{.path = "/tokenize", .body = "a,b", .headers = text_type}, 415},
    };
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        struct reply r;
        client_send(&s, &cases[i].request, &r);
        if (r.code != cases[i].code)
            fail_msg("case %zu: expected %d, found %d: %s", i, cases[i].code, r.code,
                     r.body.data ? r.body.data : "");
        assert_error_object(&r, cases[i].code, "invalid_request_error", NULL);
        reply_free(&r);
    }
    struct bytes out, request = {0};
    bytes_format(&request, "GET %s HTTP/1.1\r\nHost: x\r\n\r\n", long_path);
    raw_exchange(&s, request.data, request.n, &out);
    assert_non_null(strstr(out.data, "HTTP/1.1 414 "));
    assert_non_null(strstr(out.data, "{\"error\":{"));
    bytes_free(&out);
    static const char no_length[] = "POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
                                    "Connection: close\r\n\r\n";
    raw_exchange(&s, no_length, sizeof(no_length) - 1, &out);
    assert_non_null(strstr(out.data, "HTTP/1.1 411 "));
    assert_non_null(strstr(out.data, "{\"error\":{"));
    bytes_free(&out);
    bytes_free(&request);
    free(big);
    free(long_path);
    server_stop(&s);
}

static void test_live_before_ready(void **state)
{
    (void)state;
    struct server s;
    server_launch(&s, NULL);
    struct reply r;
    client_get(&s, "/health/live", &r); /* whatever the loading does */
    assert_int_equal(r.code, 200);
    reply_free(&r);
    client_post(&s, "/v1/completions", "{\"prompt\":\"a\"}", &r);
    assert_true(r.code == 503 || r.code == 200);
    if (r.code == 503)
        assert_error_object(&r, 503, "server_error", NULL);
    reply_free(&r);
    server_wait_ready(&s);
    assert_serves(&s);
    server_stop(&s);
}

/* Nonsense on the socket harms nobody: a stream beside it gets all it asked for. */
static void test_garbage(void **state)
{
    (void)state;
    struct server s;
    server_start(&s, NULL);
    int fd = begin(&s, "{\"prompt\":\"a\",\"max_tokens\":200,\"ignore_eos\":true,\"stream\":true,"
                       "\"stream_options\":{\"include_usage\":true}}");
    uint32_t x = 12345;
    for (int i = 0; i < 60; i++) {
        char noise[3000];
        size_t n = 1 + (size_t)i * 49;
        for (size_t k = 0; k < n; k++) {
            x = x * 1664525 + 1013904223;
            noise[k] = (char)(x >> 24);
        }
        if (i % 3 == 0)
            memcpy(noise, "POST /v1/completions HTTP/1.1\r\n", n < 31 ? n : 31);
        int other = raw_connect(&s);
        raw_write(other, noise, n);
        struct bytes out = {0};
        raw_read(other, &out, 20);
        if (out.n)
            assert_memory_equal(out.data, "HTTP/1.1 4", 10);
        bytes_free(&out);
        close(other);
    }
    struct bytes out = {0};
    assert_true(raw_await(fd, &out, "[DONE]", WAIT_MS));
    assert_non_null(strstr(out.data, "\"completion_tokens\":200"));
    bytes_free(&out);
    close(fd);
    assert_serves(&s);
    server_stop(&s);
}

/* Overload. */

static void test_overload(void **state)
{
    (void)state;
    const char *args[] = {"--max-slots", "1", "--max-queue", "1", NULL};
    struct server s;
    server_start(&s, args);
    int running = begin(&s, ENDLESS);
    await_metric(&s, RUNNING, 1);
    int waiting = begin(&s, ENDLESS);
    await_metric(&s, WAITING, 1);
    struct reply r;
    char value[64];
    client_post(&s, "/v1/completions", "{\"prompt\":\"a\"}", &r);
    assert_error_object(&r, 429, "rate_limit_error", NULL);
    assert_true(reply_header(&r, "Retry-After", value, sizeof(value)));
    assert_true(isdigit((unsigned char)value[0]));
    reply_free(&r);
    assert_true(server_metric(&s, "latte_queue_rejections_total") == 1);
    close(waiting); /* one that waits can leave too */
    await_metric(&s, WAITING, 0);
    close(running);
    await_metric(&s, RUNNING, 0);
    assert_serves(&s);
    server_stop(&s);
}

static void test_many_streams(void **state)
{
    (void)state;
    struct server s;
    server_start(&s, NULL);
    int fds[64];
    for (size_t i = 0; i < COUNT_OF(fds); i++)
        fds[i] = begin(&s, "{\"prompt\":\"Once\",\"max_tokens\":24,\"ignore_eos\":true,"
                           "\"stream\":true,\"seed\":1,"
                           "\"stream_options\":{\"include_usage\":true}}");
    for (size_t i = 0; i < COUNT_OF(fds); i++) {
        struct bytes out = {0};
        assert_true(raw_await(fds[i], &out, "data: [DONE]\n\n", WAIT_MS));
        assert_int_equal(count(&out, "\"completion_tokens\":24"), 1);
        assert_int_equal(count(&out, "\"finish_reason\":\"length\""), 1);
        bytes_free(&out);
        close(fds[i]);
    }
    await_metric(&s, RUNNING, 0);
    server_stop(&s);
}

/* Clients that leave. */

static void test_hang_up_in_decode(void **state)
{
    (void)state;
    struct server s;
    server_start(&s, NULL);
    static const char *const bodies[] = {ENDLESS, ENDLESS_WHOLE};
    for (size_t i = 0; i < COUNT_OF(bodies); i++) {
        int fd = begin(&s, bodies[i]);
        await_metric(&s, RUNNING, 1);
        if (i == 0) {
            struct bytes out = {0};
            assert_true(raw_await(fd, &out, "data: ", WAIT_MS));
            bytes_free(&out);
        }
        close(fd);
        await_metric(&s, RUNNING, 0);
        assert_true(server_metric(&s, "latte_client_disconnects_total") == (double)i + 1);
    }
    server_stop(&s);
}

/* A prompt of a hundred thousand steps stops long before its end. */
static void test_hang_up_in_prefill(void **state)
{
    (void)state;
    enum { N_PROMPT = 100000 };
    const char *args[] = {"--chunk-tokens", "1", NULL};
    struct server s;
    server_start(&s, args);
    struct bytes body = {0};
    bytes_text(&body, "{\"max_tokens\":1,\"prompt\":[5");
    for (int i = 1; i < N_PROMPT; i++)
        bytes_text(&body, ",5");
    bytes_text(&body, "]}");
    int fd = begin(&s, body.data);
    await_metric(&s, RUNNING, 1);
    close(fd);
    await_metric(&s, RUNNING, 0);
    double n_steps = server_metric(&s, STEPS);
    if (n_steps >= N_PROMPT)
        fail_msg("all %g steps of the prompt were done", n_steps);
    bytes_free(&body);
    assert_serves(&s);
    server_stop(&s);
}

static int connect_slow_reader(const struct server *s)
{
    struct sockaddr_in at = {.sin_family = AF_INET,
                             .sin_port = htons((uint16_t)s->port),
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    const int small = 4096;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof(small));
    assert_false(connect(fd, (struct sockaddr *)&at, sizeof(at)));
    return fd;
}

/* One that does not read holds up nobody, and is cut off. */
static void test_slow_reader(void **state)
{
    (void)state;
    const char *args[] = {"--idle-timeout", "2", NULL};
    struct server s;
    server_start(&s, args);
    int fd = connect_slow_reader(&s);
    post_raw(fd, "/v1/completions",
             "{\"prompt\":\"a\",\"max_tokens\":1000000,\"ignore_eos\":true,\"stream\":true,"
             "\"logprobs\":5}");
    await_metric(&s, RUNNING, 1);
    for (int i = 0; i < 5; i++)
        assert_serves(&s);
    await_metric(&s, RUNNING, 0);
    close(fd);
    server_stop(&s);
}

static void test_slow_header(void **state)
{
    (void)state;
    const char *args[] = {"--header-timeout", "1", NULL};
    struct server s;
    server_start(&s, args);
    int fd = raw_connect(&s);
    raw_text(fd, "POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-A: ");
    struct bytes out = {0};
    int64_t end = now_ms() + WAIT_MS;
    while (!raw_read(fd, &out, 100) && now_ms() < end)
        raw_text(fd, "a");
    assert_non_null(out.data);
    assert_non_null(strstr(out.data, "HTTP/1.1 408 "));
    bytes_free(&out);
    close(fd);
    server_stop(&s);
}

static void await_count(int fd, struct bytes *out, const char *text, int n)
{
    int64_t end = now_ms() + WAIT_MS;
    while (count(out, text) < n && now_ms() < end)
        raw_read(fd, out, 10);
    assert_int_equal(count(out, text), n);
}

static void test_keep_alive(void **state)
{
    (void)state;
    struct server s;
    server_start(&s, NULL);
    int fd = raw_connect(&s);
    struct bytes out = {0};
    for (int i = 0; i < 3; i++) {
        post_raw(fd, "/v1/completions",
                 i == 1 ? "{\"prompt\":\"a\",\"max_tokens\":2,\"stream\":true}"
                        : "{\"prompt\":\"a\",\"max_tokens\":2}");
        if (i == 1)
            assert_true(raw_await(fd, &out, "\r\n0\r\n\r\n", WAIT_MS));
        else
            await_count(fd, &out, "\"usage\":", i ? 2 : 1);
    }
    raw_text(fd, "GET /version HTTP/1.1\r\nHost: x\r\n\r\n");
    assert_true(raw_await(fd, &out, "{\"version\":", WAIT_MS));
    assert_int_equal(count(&out, "HTTP/1.1 200 OK"), 4);
    assert_int_equal(count(&out, "[DONE]"), 1);
    assert_int_equal(count(&out, "\"text_completion\""), 2 + count(&out, "data: {"));
    bytes_free(&out);
    close(fd);
    assert_true(server_metric(&s, "latte_connections") >= 1);
    server_stop(&s);
}

/* Stopping. */

/* A stream that cannot end before its client reads. */
static int begin_held_stream(const struct server *s)
{
    int fd = connect_slow_reader(s);
    post_raw(fd, "/v1/completions",
             "{\"prompt\":\"a\",\"max_tokens\":1500,\"ignore_eos\":true,\"stream\":true,"
             "\"logprobs\":5,\"stream_options\":{\"include_usage\":true}}");
    await_metric(s, RUNNING, 1);
    return fd;
}

static void test_drain(void **state)
{
    (void)state;
    struct server s;
    server_start(&s, NULL);
    int stream = begin_held_stream(&s);
    int kept = raw_connect(&s);
    struct bytes out = {0};
    raw_text(kept, "GET /health/ready HTTP/1.1\r\nHost: x\r\n\r\n");
    assert_true(raw_await(kept, &out, "{\"status\":\"ok\"}", WAIT_MS));
    server_signal(&s, SIGTERM);
    await_log(&s, "\"draining\"");
    /* No new connections (the socket is closed a moment after the log line). */
    struct reply r = {0};
    int64_t end = now_ms() + WAIT_MS;
    do {
        reply_free(&r);
        client_get(&s, "/version", &r);
    } while (r.code && now_ms() < end);
    assert_int_equal(r.code, 0);
    reply_free(&r);
    /* An old one hears that it comes too late, and is closed. */
    bytes_free(&out);
    post_raw(kept, "/v1/completions", "{\"prompt\":\"a\"}");
    assert_true(raw_read(kept, &out, WAIT_MS));
    assert_non_null(strstr(out.data, "HTTP/1.1 503 "));
    assert_non_null(strstr(out.data, "{\"error\":{"));
    assert_non_null(strstr(out.data, "Connection: close"));
    bytes_free(&out);
    close(kept);
    /* What ran before goes to its end. */
    assert_true(raw_await(stream, &out, "data: [DONE]\n\n", WAIT_MS));
    assert_non_null(strstr(out.data, "\"completion_tokens\":1500"));
    bytes_free(&out);
    close(stream);
    assert_int_equal(server_wait_exit(&s, WAIT_MS), 0);
    server_stop(&s);
}

static void test_second_signal(void **state)
{
    (void)state;
    struct server s;
    server_start(&s, NULL);
    int fd = begin(&s, ENDLESS);
    await_metric(&s, RUNNING, 1);
    server_signal(&s, SIGTERM);
    await_log(&s, "\"draining\"");
    server_signal(&s, SIGINT);
    assert_int_equal(server_wait_exit(&s, WAIT_MS), 1); /* a request was cut */
    struct bytes out = {0};
    raw_read(fd, &out, WAIT_MS);
    assert_int_equal(count(&out, "[DONE]"), 0);
    bytes_free(&out);
    close(fd);
    server_stop(&s);
}

static void test_drain_timeout(void **state)
{
    (void)state;
    const char *args[] = {"--drain-timeout", "1", NULL};
    struct server s;
    server_start(&s, args);
    int stream = begin(&s, ENDLESS), whole = begin(&s, ENDLESS_WHOLE);
    await_metric(&s, RUNNING, 2);
    server_signal(&s, SIGHUP); /* ignored */
    await_metric(&s, RUNNING, 2);
    server_signal(&s, SIGTERM);
    assert_int_equal(server_wait_exit(&s, WAIT_MS), 1);
    close(stream);
    close(whole);
    server_stop(&s);
}

/* Keys, origins, sockets. */

static void test_keys(void **state)
{
    (void)state;
    char dir[128], path[160];
    assert_false(test_dir_make(dir, sizeof(dir)));
    static const char keys[] = "# keys\nsk-one-00000001\nsk-two-00000002\n";
    assert_false(test_file_write(dir, "keys", keys, sizeof(keys) - 1));
    snprintf(path, sizeof(path), "%s/keys", dir);
    const char *args[] = {"--api-key-file", path, NULL};
    struct server s;
    server_start(&s, args);
    static const struct {
        const char *path, *key;
        int code;
    } cases[] = {{"/health", NULL, 200},
                 {"/health/live", NULL, 200},
                 {"/metrics", NULL, 200},
                 {"/openapi.yaml", NULL, 200},
                 {"/v1/models", NULL, 401},
                 {"/v1/models", "Authorization: Bearer sk-two-00000002", 200},
                 {"/v1/models", "Authorization: Bearer sk-two-0000000", 401},
                 {"/tokenize", NULL, 405}};
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        const char *headers[] = {cases[i].key, NULL};
        struct reply r;
        client_send(&s, &(struct client_request){.path = cases[i].path, .headers = headers}, &r);
        if (r.code != cases[i].code)
            fail_msg("%s: expected %d, found %d", cases[i].path, cases[i].code, r.code);
        if (r.code == 401)
            assert_error_object(&r, 401, "invalid_request_error", "invalid_api_key");
        reply_free(&r);
    }
    char *log = server_log(&s);
    assert_null(strstr(log, "sk-"));
    free(log);
    server_stop(&s);
    test_dir_remove(dir);
}

static void test_cors(void **state)
{
    (void)state;
    const char *args[] = {"--cors-origin", "*", NULL};
    struct server s;
    server_start(&s, args);
    const char *headers[] = {"Origin: https://a.example", "Access-Control-Request-Method: POST",
                             NULL};
    struct reply r;
    char value[64];
    client_send(&s,
                &(struct client_request){
                    .path = "/v1/chat/completions", .method = "OPTIONS", .headers = headers},
                &r);
    assert_int_equal(r.code, 204);
    assert_true(reply_header(&r, "Access-Control-Allow-Origin", value, sizeof(value)));
    assert_string_equal(value, "*");
    reply_free(&r);
    client_post(&s, "/v1/completions", "{\"prompt\":\"a\",\"max_tokens\":1,\"stream\":true}", &r);
    assert_int_equal(r.code, 200);
    assert_true(reply_header(&r, "Access-Control-Allow-Origin", value, sizeof(value)));
    reply_free(&r);
    server_stop(&s);
}

static void test_unix_socket(void **state)
{
    (void)state;
    char dir[128], path[160];
    assert_false(test_dir_make(dir, sizeof(dir)));
    snprintf(path, sizeof(path), "%s/sock", dir);
    const char *args[] = {"--unix-socket", path, NULL};
    struct server s;
    server_start(&s, args);
    struct stat info;
    assert_false(stat(path, &info));
    assert_int_equal(info.st_mode & 0777, 0660);
    assert_serves(&s);
    int fd = begin(&s, ENDLESS);
    await_metric(&s, RUNNING, 1);
    close(fd);
    await_metric(&s, RUNNING, 0);

    /* A second server is refused; one that was killed leaves a file that is taken over. */
    struct bytes output;
    const char *again[] = {"--unix-socket", path, "--model", s.model, NULL};
    assert_int_equal(server_run(again, &output), 1);
    assert_non_null(strstr(output.data, "another server"));
    bytes_free(&output);
    server_signal(&s, SIGKILL);
    assert_int_equal(server_wait_exit(&s, WAIT_MS), 128 + SIGKILL);
    server_stop(&s);
    assert_false(stat(path, &info));
    server_start(&s, args);
    assert_serves(&s);
    server_stop(&s);
    assert_int_not_equal(stat(path, &info), 0);

    assert_false(test_file_write(dir, "sock", "precious", 8)); /* no socket: left alone */
    make_tiny_model(s.model, sizeof(s.model));
    assert_int_equal(server_run(again, &output), 1);
    assert_non_null(strstr(output.data, "no socket"));
    assert_false(stat(path, &info));
    bytes_free(&output);
    test_dir_remove(s.model);
    test_dir_remove(dir);
}

static bool has_ipv6(void)
{
    struct sockaddr_in6 at = {.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT};
    int fd = socket(AF_INET6, SOCK_STREAM, 0);
    bool works = fd >= 0 && !bind(fd, (struct sockaddr *)&at, sizeof(at));
    if (fd >= 0)
        close(fd);
    return works;
}

static void test_ipv6(void **state)
{
    (void)state;
    if (!has_ipv6()) {
        print_message("SKIPPED: this machine has no IPv6 loopback address\n");
        skip();
    }
    static const char *const hosts[] = {"::1", "[::1]", "::"};
    for (size_t i = 0; i < COUNT_OF(hosts); i++) {
        const char *args[] = {"--host", hosts[i], NULL};
        struct server s;
        server_start(&s, args);
        assert_non_null(strstr(s.url, "http://[::"));
        assert_serves(&s);
        if (i == 2) { /* the unspecified address takes IPv4 too */
            snprintf(s.url, sizeof(s.url), "http://127.0.0.1:%d", s.port);
            assert_serves(&s);
        }
        server_stop(&s);
    }
}

/* Logs. */

static void test_access_log(void **state)
{
    (void)state;
    static const char secret[] = "zebra-4711";
    const char *args[] = {"--log-level", "debug", NULL};
    struct server s;
    server_start(&s, args);
    static const char *const bodies[] = {
        "{\"prompt\":\"zebra-4711\",\"max_tokens\":2}",
        "{\"prompt\":\"zebra-4711\",\"max_tokens\":\"zebra-4711\"}",
        "{\"prompt\":\"zebra-4711",
        "{\"zebra-4711\":\"zebra-4711\"}",
        "{\"model\":\"zebra-4711\",\"prompt\":\"a\"}",
    };
    for (size_t i = 0; i < COUNT_OF(bodies); i++) {
        const char *headers[] = {"X-Request-Id: mine-1", NULL};
        struct reply r;
        client_send(&s,
                    &(struct client_request){
                        .path = "/v1/completions", .body = bodies[i], .headers = headers},
                    &r);
        char id[64] = "";
        assert_true(reply_header(&r, "X-Request-Id", id, sizeof(id)));
        assert_string_equal(id, "mine-1");
        reply_free(&r);
    }
    struct reply r;
    client_get(&s, "/v1/zebra-4711?zebra-4711=zebra-4711", &r);
    reply_free(&r);
    client_get(&s, "/v1/models/zebra-4711", &r);
    reply_free(&r);
    await_log(&s, "\"route\":\"/v1/models/{id}\"");
    char *log = server_log(&s);
    if (strstr(log, secret))
        fail_msg("the log holds what a client sent: %s", log);
    int n_requests = 0;
    for (char *line = strtok(log, "\n"); line; line = strtok(NULL, "\n")) {
        cJSON *object = cJSON_Parse(line); /* every line is one object */
        if (!cJSON_IsObject(object))
            fail_msg("not a JSON object: %s", line);
        const cJSON *id = cJSON_GetObjectItemCaseSensitive(object, "request_id");
        n_requests += cJSON_IsString(id) && !strcmp(id->valuestring, "mine-1");
        cJSON_Delete(object);
    }
    assert_int_equal(n_requests, COUNT_OF(bodies));
    free(log);
    server_stop(&s);
}

/* A proxy that cannot send on reports that and not the reply, so the body of a request that was
 * refused by its header is taken for a while. */
static void test_a_refused_body_is_taken(void **state)
{
    (void)state;
    struct server s;
    struct bytes out = {0};
    server_start(&s, NULL);
    int fd = raw_connect(&s);
    raw_text(fd, "POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                 "Content-Length: 1048700\r\n\r\n{");
    assert_true(raw_await(fd, &out, "\"error\"", 10000));
    sleep_ms(200); /* the library has closed its side by now */
    static const char piece[50000];
    for (int i = 0; i < 20; i++) {
        if (send(fd, piece, sizeof(piece), MSG_NOSIGNAL) != (ssize_t)sizeof(piece))
            fail_msg("piece %d: %s", i, strerror(errno));
    }
    shutdown(fd, SHUT_WR);
    assert_true(raw_read(fd, &out, 10000));
    assert_non_null(strstr(out.data, "HTTP/1.1 404 "));
    close(fd);
    bytes_free(&out);
    assert_true(server_await_metric(&s, "latte_connections", 1, 10000));
    server_stop(&s);
}

/* Starting. */

static void test_command_line(void **state)
{
    (void)state;
    static const struct {
        const char *args[4];
        int code;
        const char *said;
    } cases[] = {{{"--help"}, 0, "--max-slots"},
                 {{"--version"}, 0, "\nlibraries  libmicrohttpd "},
                 {{NULL}, 2, "--model"},
                 {{"--model", "x", "--port=70000"}, 2, "0 to 65535"},
                 {{"--model", "/nonexistent-dir", "--port=0"}, 1, "/nonexistent-dir"},
                 {{"--model", "x", "--host=256.1.1.1"}, 1, "256.1.1.1"},
                 {{"--model", "x", "--api-key-file=/nonexistent"}, 1, "/nonexistent"}};
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        const char *args[5] = {NULL};
        memcpy(args, cases[i].args, sizeof(cases[i].args));
        struct bytes output;
        int code = server_run(args, &output);
        if (code != cases[i].code || !output.data || !strstr(output.data, cases[i].said))
            fail_msg("case %zu: exit code %d, expected %d, output: %s", i, code, cases[i].code,
                     output.data ? output.data : "");
        bytes_free(&output);
    }
}

/* Run --healthcheck to its end. */
static void expect_healthcheck(const char *flag, const char *value, const char *host, int code,
                               const char *said)
{
    const char *args[] = {"--healthcheck", flag, value, "--host", host, NULL};
    struct bytes output;
    int found = server_run(args, &output);
    if (found != code || !output.data || !strstr(output.data, said))
        fail_msg("%s %s on %s: exit code %d, expected %d, output: %s", flag, value, host, found,
                 code, output.data ? output.data : "");
    bytes_free(&output);
}

static void expect_healthcheck_of(const char *port, const char *answer, const char *said)
{
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t n = sizeof(at);
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const int on = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    at.sin_port = htons((uint16_t)atoi(port));
    assert_false(bind(listener, (struct sockaddr *)&at, n) || listen(listener, 1));
    pid_t child = fork();
    if (!child) { /* one client; it is read to the empty line, so that closing is no reset */
        char seen[1024] = "";
        int fd = accept(listener, NULL, NULL);
        for (ssize_t got = 0, all = 0; !strstr(seen, "\r\n\r\n"); all += got)
            got = read(fd, seen + all, sizeof(seen) - 1 - (size_t)all);
        ssize_t sent = write(fd, answer, strlen(answer));
        _exit(sent < 0 || !strstr(seen, "GET /health/ready HTTP/1.1\r\n"));
    }
    close(listener);
    expect_healthcheck("--port", port, "127.0.0.1", 1, said);
    int how = 0;
    assert_int_equal(waitpid(child, &how, 0), child);
    assert_int_equal(how, 0);
}

/* What a container's or a supervisor's health check runs. */
static void test_healthcheck(void **state)
{
    (void)state;
    struct server s;
    char port[16], path[160];
    const char *on_all[] = {"--host", "0.0.0.0", NULL};
    server_start(&s, on_all);
    snprintf(port, sizeof(port), "%d", s.port);
    expect_healthcheck("--port", port, "127.0.0.1", 0, "ready");
    expect_healthcheck("--port", port, "0.0.0.0", 0, "ready");
    expect_healthcheck("--port", port, "localhost", 0, "ready");
    server_stop(&s);
    expect_healthcheck("--port", port, "127.0.0.1", 1, "refused");
    expect_healthcheck("--port", "0", "127.0.0.1", 1, "found 0");
    expect_healthcheck_of(port, "HTTP/1.1 503 Service Unavailable\r\n\r\n{\"status\":\"loading\"}",
                          "503 {\"status\":\"loading\"}");
    expect_healthcheck_of(port, "", "nothing");
    expect_healthcheck_of(port, "SSH-2.0-server\r\n", "expected 200");

    if (has_ipv6()) {
        const char *on_v6[] = {"--host", "::", NULL};
        server_start(&s, on_v6);
        snprintf(port, sizeof(port), "%d", s.port);
        expect_healthcheck("--port", port, "::", 0, "ready");
        expect_healthcheck("--port", port, "[::1]", 0, "ready");
        server_stop(&s);
    }
    snprintf(path, sizeof(path), "/tmp/latte-health-%d", (int)getpid());
    expect_healthcheck("--unix-socket", path, "127.0.0.1", 1, "No such file");
    const char *on_socket[] = {"--unix-socket", path, NULL};
    server_start(&s, on_socket);
    expect_healthcheck("--unix-socket", path, "127.0.0.1", 0, "ready");
    server_stop(&s);
}

static void test_port_in_use(void **state)
{
    (void)state;
    struct server s;
    server_start(&s, NULL);
    char port[16];
    snprintf(port, sizeof(port), "%d", s.port);
    const char *args[] = {"--model", s.model, "--port", port, NULL};
    struct bytes output;
    assert_int_equal(server_run(args, &output), 1);
    assert_non_null(strstr(output.data, port));
    bytes_free(&output);
    server_stop(&s);
}

/* Cut, changed and empty model files: a sentence and exit code 1, never a crash. */
static void test_broken_models(void **state)
{
    (void)state;
    static const char *const names[] = {"model.safetensors", "config.json", "tokenizer.json"};
    for (size_t i = 0; i < COUNT_OF(names); i++) {
        char dir[160], path[256];
        make_tiny_model(dir, sizeof(dir));
        snprintf(path, sizeof(path), "%s/%s", dir, names[i]);
        size_t n = 0;
        char *text = test_file_read(path, &n);
        const size_t cuts[] = {0, 5, n / 2, n - 1};
        for (size_t k = 0; k < COUNT_OF(cuts); k++) {
            assert_false(test_file_write(dir, names[i], text, cuts[k]));
            const char *args[] = {"--model", dir, "--port", "0", NULL};
            struct bytes output;
            int code = server_run(args, &output);
            if (code != 1 || !strstr(output.data, "latte-server: "))
                fail_msg("%s cut to %zu bytes: exit code %d, output: %s", names[i], cuts[k], code,
                         output.data);
            bytes_free(&output);
        }
        free(text);
        test_dir_remove(dir);
    }
}

int main(int argc, char **argv)
{
    if (argc > 1)
        cmocka_set_test_filter(argv[1]);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_statuses),
        cmocka_unit_test(test_live_before_ready),
        cmocka_unit_test(test_garbage),
        cmocka_unit_test(test_overload),
        cmocka_unit_test(test_many_streams),
        cmocka_unit_test(test_hang_up_in_decode),
        cmocka_unit_test(test_hang_up_in_prefill),
        cmocka_unit_test(test_slow_reader),
        cmocka_unit_test(test_slow_header),
        cmocka_unit_test(test_keep_alive),
        cmocka_unit_test(test_drain),
        cmocka_unit_test(test_second_signal),
        cmocka_unit_test(test_drain_timeout),
        cmocka_unit_test(test_keys),
        cmocka_unit_test(test_cors),
        cmocka_unit_test(test_unix_socket),
        cmocka_unit_test(test_ipv6),
        cmocka_unit_test(test_access_log),
        cmocka_unit_test(test_a_refused_body_is_taken),
        cmocka_unit_test(test_command_line),
        cmocka_unit_test(test_healthcheck),
        cmocka_unit_test(test_port_in_use),
        cmocka_unit_test(test_broken_models),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
