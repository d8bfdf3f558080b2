/* test_bench_load.c - latte-bench load against a server whose every event comes at a known time,
 * or goes wrong in a known way, and against our own.
 *
 * The known server sends its first text 60 ms after the request and ten more 20 ms apart: TTFT
 * 60, TPOT and ITL 20, E2E 260 ms. Clocks never run short, so those are lower bounds; above, a
 * busy machine is forgiven. */
#include "tests/http/harness.h"

#include <arpa/inet.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cjson/cJSON.h>

#include "tests/bench/bench_traffic.h"

enum { FIRST_MS = 60, GAP_MS = 20, N_EVENTS = 11, LATE_MS = 150, MAX_ARRIVALS = 512 };

/* The known server: a thread a connection, one request each. The first part of the path says
 * what it does. */

static struct {
    int fd, port;
    pthread_t thread;
} known;

/* What it has heard since a run began; the connections' threads write it, with the lock. */
static struct heard {
    int n_arrivals;
    double arrivals[MAX_ARRIVALS]; /* seconds, of whole requests */
    char last_body[4096], last_header[4096];
} heard;
static pthread_mutex_t heard_lock = PTHREAD_MUTEX_INITIALIZER;

static void write_down(const char *text, double when)
{
    pthread_mutex_lock(&heard_lock);
    if (heard.n_arrivals < MAX_ARRIVALS)
        heard.arrivals[heard.n_arrivals++] = when;
    snprintf(heard.last_body, sizeof(heard.last_body), "%s", strstr(text, "\r\n\r\n") + 4);
    snprintf(heard.last_header, sizeof(heard.last_header), "%s", text);
    pthread_mutex_unlock(&heard_lock);
}

static void start_hearing(void)
{
    pthread_mutex_lock(&heard_lock);
    heard.n_arrivals = 0;
    pthread_mutex_unlock(&heard_lock);
}

static const struct heard *what_it_heard(void)
{
    static struct heard copy;
    pthread_mutex_lock(&heard_lock);
    copy = heard;
    pthread_mutex_unlock(&heard_lock);
    return &copy;
}

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* Until a time that does not depend on how long sending took. */
static void sleep_until(double end)
{
    double left = end - now_s();
    if (left > 0)
        nanosleep(&(struct timespec){(time_t)left, (long)(fmod(left, 1) * 1e9)}, NULL);
}

static void say(int fd, const char *text)
{
    if (send(fd, text, strlen(text), MSG_NOSIGNAL) < 0)
        return; /* the client gave up, as some tests want it to */
}

static void say_chunk(int fd, const char *text)
{
    char chunk[600];
    snprintf(chunk, sizeof(chunk), "%zx\r\n%s\r\n", strlen(text), text);
    say(fd, chunk);
}

/* The header and the body; false when there is none. */
static bool hear(int fd, char *text, size_t n)
{
    size_t got = 0;
    for (ssize_t k; got < n - 1 && (k = recv(fd, text + got, n - 1 - got, 0)) > 0;) {
        text[got += (size_t)k] = '\0';
        const char *end = strstr(text, "\r\n\r\n"), *length = strcasestr(text, "Content-Length: ");
        if (end && got >= (size_t)(end + 4 - text) + (length ? (size_t)atol(length + 16) : 0))
            return true;
    }
    return false;
}

static void tell_stream(int fd, double begin, bool is_chat, bool is_cut, bool has_usage)
{
    say(fd, "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
            "Connection: close\r\n\r\n");
    if (is_chat) /* at once, and without text: not the first token */
        say_chunk(fd, "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\","
                      "\"content\":\"\"}}]}\n\n");
    for (int i = 0; i < N_EVENTS; i++) {
        sleep_until(begin + (FIRST_MS + i * GAP_MS) * 1e-3);
        if (is_cut && i == 4)
            return;
        say_chunk(fd, is_chat ? "data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\n\n"
                              : ": a comment\r\n\r\ndata: {\"choices\":[{\"text\":\" a\"}],"
                                "\"usage\":null}\r\n\r\n");
    }
    if (has_usage)
        say_chunk(fd, "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":7,"
                      "\"completion_tokens\":11,\"total_tokens\":18}}\n\n");
    say_chunk(fd, "data: [DONE]\n\n");
    say(fd, "0\r\n\r\n");
}

static void *serve_one(void *context)
{
    int fd = (int)(intptr_t)context;
    char *text = calloc(1, 65536);
    if (hear(fd, text, 65536)) {
        double begin = now_s();
        write_down(text, begin);
        if (strstr(text, "/500/"))
            say(fd, "HTTP/1.1 500 Oops\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno");
        else if (strstr(text, "/hang/"))
            sleep_until(begin + 1.5);
        else
            tell_stream(fd, begin, strstr(text, "/chat/completions "), strstr(text, "/cut/"),
                        !strstr(text, "/no-usage/"));
    }
    shutdown(fd, SHUT_WR);
    close(fd);
    free(text);
    return NULL;
}

static void *accept_all(void *context)
{
    (void)context;
    for (int fd; (fd = accept(known.fd, NULL, NULL)) >= 0;) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, serve_one, (void *)(intptr_t)fd))
            close(fd);
        else
            pthread_detach(thread);
    }
    return NULL;
}

static int open_known(void **state)
{
    (void)state;
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t n = sizeof(at);
    known.fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (bind(known.fd, (struct sockaddr *)&at, n) || listen(known.fd, 512) ||
        getsockname(known.fd, (struct sockaddr *)&at, &n))
        return -1;
    known.port = ntohs(at.sin_port);
    return pthread_create(&known.thread, NULL, accept_all, NULL);
}

static int close_known(void **state)
{
    (void)state;
    shutdown(known.fd, SHUT_RDWR);
    pthread_join(known.thread, NULL);
    close(known.fd);
    return 0;
}

/* Running latte-bench. */

static void find_bench(char *path, size_t n)
{
    ssize_t length = readlink("/proc/self/exe", path, n - 1);
    assert_true(length > 0);
    path[length] = '\0';
    for (int up = 0; up < 3; up++)
        *strrchr(path, '/') = '\0';
    strncat(path, "/latte-bench", n - strlen(path) - 1);
}

/* The exit code of "latte-bench load --url URL" and these words; what it printed in *out. */
static int run_bench(const char *url, const char *words, struct bytes *out)
{
    char binary[512], command[1400], piece[4096];
    *out = (struct bytes){0};
    find_bench(binary, sizeof(binary));
    snprintf(command, sizeof(command), "exec %s load --url %s %s 2>&1", binary, url, words);
    FILE *f = popen(command, "r");
    assert_non_null(f);
    for (size_t n; (n = fread(piece, 1, sizeof(piece), f)) > 0;)
        bytes_append(out, piece, n);
    int how = pclose(f);
    return WIFEXITED(how) ? WEXITSTATUS(how) : 128;
}

static int run_known(const char *mode, const char *words, struct bytes *out)
{
    char url[80];
    snprintf(url, sizeof(url), "http://127.0.0.1:%d/%s", known.port, mode);
    start_hearing();
    return run_bench(url, words, out);
}

/* The same with --json -, parsed. */
static cJSON *results_of(const char *mode, const char *words, int expected_code)
{
    char all[600];
    struct bytes out;
    snprintf(all, sizeof(all), "--model m --warmup 0 --json - %s", words);
    int code = run_known(mode, all, &out);
    cJSON *json = cJSON_Parse(out.data ? out.data : "");
    if (code != expected_code || !json)
        fail_msg("exit code %d: %s", code, out.data ? out.data : "");
    bytes_free(&out);
    return json;
}

static double number(const cJSON *json, const char *name)
{
    const cJSON *value = cJSON_GetObjectItemCaseSensitive(json, name);
    if (!cJSON_IsNumber(value))
        fail_msg("%s is no number", name);
    return value->valuedouble;
}

static double part(const cJSON *json, const char *name, const char *of)
{
    return number(cJSON_GetObjectItemCaseSensitive(json, name), of);
}

static void expect_between(double value, double low, double high, const char *what)
{
    if (!(value >= low && value <= high))
        fail_msg("%s: expected %.1f to %.1f, found %.2f", what, low, high, value);
}

static void expect_known_times(const cJSON *json)
{
    const double tokens = N_EVENTS - 1, e2e = FIRST_MS + tokens * GAP_MS;
    expect_between(part(json, "ttft_ms", "p50"), FIRST_MS, FIRST_MS + LATE_MS, "TTFT");
    /* A first event that came late shortens what follows, but the middle of many does not. */
    expect_between(part(json, "tpot_ms", "p50"), GAP_MS - 5, GAP_MS + 15, "TPOT");
    expect_between(part(json, "itl_ms", "mean"), GAP_MS - 5, GAP_MS + 15, "ITL");
    expect_between(part(json, "e2e_ms", "p50"), e2e, e2e + LATE_MS, "E2E");
}

static void test_known_times(void **state)
{
    (void)state;
    cJSON *json = results_of("good", "--concurrency 4 --requests 12 --output-tokens 9", 0);
    expect_known_times(json);
    assert_true(number(json, "n_completed") == 12 && number(json, "n_failed") == 0);
    assert_true(number(json, "input_tokens") == 12 * 7);
    assert_true(number(json, "output_tokens") == 12 * 11);
    double duration = number(json, "duration_s");
    expect_between(duration, 3 * 0.26, 3 * 0.26 + 3, "duration");
    expect_between(number(json, "output_token_throughput") * duration, 131.9, 132.1, "tokens");
    expect_between(number(json, "request_throughput") * duration, 11.9, 12.1, "requests");
    assert_string_equal(cJSON_GetObjectItem(json, "tokens_from")->valuestring, "usage");
    const char *body = what_it_heard()->last_body;
    assert_non_null(strstr(body, "\"max_tokens\":9,\"stream\":true,"
                                 "\"stream_options\":{\"include_usage\":true}}"));
    assert_null(strstr(body, "ignore_eos"));
    cJSON_Delete(json);
}

static void test_chat_and_key(void **state)
{
    (void)state;
    setenv("BENCH_TEST_KEY", "sk-bench", 1);
    cJSON *json = results_of("good",
                             "--endpoint chat --concurrency 6 --requests 6 --ignore-eos "
                             "--api-key-env BENCH_TEST_KEY --input-tokens 3",
                             0);
    expect_known_times(json); /* the role's event is no token */
    const struct heard *h = what_it_heard();
    assert_non_null(strstr(h->last_header, "POST /good/v1/chat/completions "));
    assert_non_null(strcasestr(h->last_header, "Authorization: Bearer sk-bench\r\n"));
    assert_non_null(strstr(h->last_body, "\"ignore_eos\":true"));
    const char *words = strstr(h->last_body, "\"content\":\"");
    assert_non_null(words);
    int n_blanks = 0;
    for (words += 11; *words != '"'; words++)
        n_blanks += *words == ' ';
    assert_int_equal(n_blanks, 2);
    cJSON_Delete(json);
}

/* Goodput counts those within all limits: all of them, or none. */
static void test_goodput(void **state)
{
    (void)state;
    cJSON *json = results_of("good", "--concurrency 4 --requests 4 --slo ttft:59,e2e:9000", 0);
    assert_true(number(json, "goodput") == 0);
    cJSON_Delete(json);
    json = results_of("good", "--concurrency 4 --requests 4 --slo ttft:5000,tpot:2000,e2e:9000", 0);
    assert_true(number(json, "goodput") == number(json, "request_throughput"));
    cJSON_Delete(json);
}

/* Gaps have the mean 1 / rate and, by the gamma distribution's variance, vary by 1 / sqrt of the
 * burstiness; as a Poisson process's do, by 1, for 1. */
static void expect_gaps(double rate, double burstiness)
{
    enum { N = 20000 };
    uint64_t state = 5;
    double sum = 0, squares = 0;
    for (int i = 0; i < N; i++) {
        double gap = traffic_gap(&state, rate, burstiness);
        assert_true(gap >= 0);
        sum += gap;
        squares += gap * gap;
    }
    double mean = sum / N, deviation = sqrt(squares / N - mean * mean);
    expect_between(mean * rate, 0.96, 1.04, "mean gap");
    expect_between(deviation * rate * sqrt(burstiness), 0.95, 1.05, "variation");
}

static void test_arrivals(void **state)
{
    (void)state;
    expect_gaps(3, 1);
    expect_gaps(200, 0.3);
    expect_gaps(1, 16);
    uint64_t random = 5;
    assert_true(traffic_gap(&random, 8, INFINITY) == 0.125);
}

/* An open loop: requests come at their times, not when others end. */
static void test_rate(void **state)
{
    (void)state;
    cJSON_Delete(results_of("good", "--rate 50 --burstiness inf --requests 50", 0));
    const struct heard *h = what_it_heard();
    assert_int_equal(h->n_arrivals, 50);
    double span = h->arrivals[49] - h->arrivals[0];
    expect_between(span, 49 * 0.02 - 0.1, 49 * 0.02 + 1.5, "span"); /* 13 s one by one */
}

static void test_duration(void **state)
{
    (void)state;
    cJSON *json = results_of("good", "--concurrency 2 --duration 0.6", 0);
    expect_between(number(json, "n_sent"), 2, 6, "requests");
    assert_true(number(json, "n_sent") == number(json, "n_completed"));
    expect_between(number(json, "duration_s"), 0.6, 2.5, "duration");
    cJSON_Delete(json);
}

static void expect_failures(const char *mode, const char *words, const char *reason)
{
    cJSON *json = results_of(mode, words, 1); /* none completed */
    const cJSON *errors = cJSON_GetObjectItem(json, "errors");
    if (!cJSON_GetObjectItem(errors, reason) || cJSON_GetArraySize(errors) != 1) {
        char *text = cJSON_PrintUnformatted(errors);
        fail_msg("%s: expected '%s', found %s", mode, reason, text);
    }
    assert_true(number(errors, reason) == 3 && number(json, "n_failed") == 3);
    assert_true(number(json, "output_tokens") == 0 && number(json, "request_throughput") == 0);
    assert_true(cJSON_IsNull(cJSON_GetObjectItem(cJSON_GetObjectItem(json, "ttft_ms"), "p50")));
    cJSON_Delete(json);
}

static void test_failures(void **state)
{
    (void)state;
    expect_failures("500", "--requests 3", "HTTP 500");
    expect_failures("cut", "--requests 3 --concurrency 3", "stream cut");
    expect_failures("hang", "--requests 3 --concurrency 3 --timeout 0.4", "timeout");
}

static void test_without_usage(void **state)
{
    (void)state;
    struct bytes out;
    assert_int_equal(run_known("no-usage", "--model m --requests 2 --concurrency 2", &out), 0);
    assert_non_null(strstr(out.data, "COUNTED EVENTS"));
    bytes_free(&out);
    cJSON *json = results_of("no-usage", "--requests 2 --concurrency 2", 0);
    assert_string_equal(cJSON_GetObjectItem(json, "tokens_from")->valuestring, "events");
    assert_true(number(json, "output_tokens") == 2 * N_EVENTS);
    assert_true(cJSON_IsNull(cJSON_GetObjectItem(json, "input_tokens")));
    cJSON_Delete(json);
}

static void test_usage_errors(void **state)
{
    (void)state;
    static const char *const wrong[] = {
        "--rate 0",           "--slo x:1", "--rate 1 --concurrency 2",
        "--input-tokens 5-2", "--bogus 1", "word"};
    for (size_t i = 0; i < COUNT_OF(wrong); i++) {
        struct bytes out;
        if (run_known("good", wrong[i], &out) != 2)
            fail_msg("%s: %s", wrong[i], out.data ? out.data : "");
        bytes_free(&out);
    }
    assert_int_equal(what_it_heard()->n_arrivals, 0);
}

static void test_our_server(void **state)
{
    (void)state;
    struct server s;
    struct bytes out;
    server_start(&s, NULL);
    double before = server_metric(&s, "latte_generation_tokens_total");
    int code = run_bench(s.url,
                         "--requests 5 --concurrency 2 --output-tokens 6 --ignore-eos "
                         "--warmup 1 --json -",
                         &out);
    if (code)
        fail_msg("exit code %d: %s", code, out.data ? out.data : "");
    cJSON *json = cJSON_Parse(out.data);
    assert_true(number(json, "n_completed") == 5);
    assert_true(number(json, "output_tokens") == 30);
    /* The server counted the same, and the warm-up. */
    assert_true(server_metric(&s, "latte_generation_tokens_total") - before == 36);
    expect_between(number(json, "input_tokens"), 5 * 32, 5 * 64, "input tokens");
    cJSON_Delete(json);
    bytes_free(&out);
    server_stop(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_known_times),  cmocka_unit_test(test_chat_and_key),
        cmocka_unit_test(test_goodput),      cmocka_unit_test(test_arrivals),
        cmocka_unit_test(test_rate),         cmocka_unit_test(test_duration),
        cmocka_unit_test(test_failures),     cmocka_unit_test(test_without_usage),
        cmocka_unit_test(test_usage_errors), cmocka_unit_test(test_our_server),
    };
    return cmocka_run_group_tests(tests, open_known, close_known);
}
