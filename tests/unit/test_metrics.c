/* test_metrics.c - the text format: parsed here by its grammar, values against plain sums. */
#include "tests/unit/unit.h"

#include <ctype.h>
#include <math.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "server/metrics.h"

static const struct metrics_service service = {.is_ready = true,
                                               .n_connections = 3,
                                               .max_connections = 40,
                                               .max_queue = 50,
                                               .max_sessions = 60,
                                               .max_state_bytes = 1 << 30};

static char *text_of(void)
{
    struct bytes b = {0};
    metrics_write(&b, NULL, NULL, NULL, &service);
    assert_false(b.failed);
    return b.data;
}

/* The value of a sample, NAN when it is absent. */
static double sample(const char *text, const char *name)
{
    size_t n = strlen(name);
    for (const char *line = text; line; line = strchr(line, '\n')) {
        line += *line == '\n';
        if (!strncmp(line, name, n) && line[n] == ' ')
            return strtod(line + n, NULL);
    }
    return NAN;
}

/* name{label="value",...} number */
static bool is_sample(const char *line, const char *end)
{
    const char *c = line;
    while (c < end && (isalnum((unsigned char)*c) || *c == '_' || *c == ':'))
        c++;
    if (c == line || isdigit((unsigned char)*line))
        return false;
    if (*c == '{') {
        for (bool quoted = false; c < end && (quoted || *c != '}'); c++)
            quoted ^= *c == '"';
        if (c++ == end)
            return false;
    }
    if (*c != ' ')
        return false;
    char *stop = NULL;
    strtod(c + 1, &stop);
    return stop == end && stop > c + 1;
}

/* Every line is a comment of the two kinds or a sample of the family announced last. */
static void test_format(void **state)
{
    (void)state;
    metrics_observe(METRIC_E2E_LATENCY, 0.5);
    metrics_count_request("GET", "/x", 200);
    metrics_observe_request("/x", 0.5);
    metrics_count_finish("stop");
    char *text = text_of();
    char family[128] = "", type[32] = "";
    for (char *line = text; *line;) {
        char *end = strchr(line, '\n');
        assert_non_null(end); /* the last line ends too */
        if (!strncmp(line, "# HELP ", 7)) {
            assert_non_null(memchr(line + 7, ' ', (size_t)(end - line - 7)));
        } else if (!strncmp(line, "# TYPE ", 7)) {
            assert_int_equal(sscanf(line + 7, "%127s %31s", family, type), 2);
            char again[140];
            snprintf(again, sizeof(again), "# TYPE %s ", family);
            assert_null(strstr(end, again)); /* each family once */
            bool is_total = strlen(family) > 6 && !strcmp(family + strlen(family) - 6, "_total");
            assert_int_equal(is_total, !strcmp(type, "counter"));
        } else {
            if (!is_sample(line, end) || strncmp(line, family, strlen(family)))
                fail_msg("not a sample of %s: %.*s", family, (int)(end - line), line);
        }
        line = end + 1;
    }
    free(text);
}

static void test_counters(void **state)
{
    (void)state;
    metrics_add(METRIC_PROMPT_TOKENS, 5);
    metrics_add(METRIC_PROMPT_TOKENS, 7);
    metrics_add(METRIC_GENERATION_TOKENS, 9007199254740991);
    metrics_count_request("POST", "/v1/completions", 200);
    metrics_count_request("POST", "/v1/completions", 200);
    metrics_count_request("POST", "/v1/completions", 400);
    metrics_count_request("BREW", "other", 405);
    metrics_count_finish("length");
    char *text = text_of();
    static const struct {
        const char *name;
        double value;
    } cases[] = {
        {"latte_prompt_tokens_total", 12},
        {"latte_queue_rejections_total", 0},
        {"latte_http_requests_total{method=\"POST\",route=\"/v1/completions\",code=\"200\"}", 2},
        {"latte_http_requests_total{method=\"POST\",route=\"/v1/completions\",code=\"400\"}", 1},
        {"latte_http_requests_total{method=\"other\",route=\"other\",code=\"405\"}", 1},
        {"latte_request_success_total{finish_reason=\"length\"}", 1},
        {"latte_request_success_total{finish_reason=\"abort\"}", 0}, /* there before the first */
        {"latte_ready", 1},
        {"latte_connections", 3},
        {"latte_connections_limit", 40},
        {"latte_requests_waiting_limit", 50},
        {"latte_sessions_limit", 60},
        {"latte_session_state_bytes_limit", 1073741824},
    };
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        if (sample(text, cases[i].name) != cases[i].value)
            fail_msg("%s is %g, expected %g", cases[i].name, sample(text, cases[i].name),
                     cases[i].value);
    }
    assert_true(sample(text, "process_resident_memory_bytes") > 1e6);
    assert_true(sample(text, "process_open_fds") >= 3);
    assert_true(sample(text, "process_start_time_seconds") > 1.6e9);
    free(text);
}

/* The start stays where it was, however the clocks' seconds turn: else it reads as a restart. */
static void test_start(void **state)
{
    (void)state;
    char *text = text_of();
    double start = sample(text, "process_start_time_seconds");
    free(text);
    for (int i = 0; i < 25; i++) {
        nanosleep(&(struct timespec){.tv_nsec = 50000000}, NULL);
        text = text_of();
        assert_true(sample(text, "process_start_time_seconds") == start);
        free(text);
    }
}

static void test_histogram(void **state)
{
    (void)state;
    static const double values[] = {0, 0.001, 0.00100001, 0.05, 119, 120, 121, 1e9, NAN, INFINITY};
    double sum = 0;
    for (size_t i = 0; i < COUNT_OF(values); i++) {
        metrics_observe(METRIC_QUEUE_TIME, values[i]);
        sum += isfinite(values[i]) ? values[i] : 0; /* the others are dropped */
    }
    char *text = text_of();
    assert_true(fabs(sample(text, "latte_request_queue_time_seconds_sum") - sum) < 1e-3);
    assert_int_equal((int)sample(text, "latte_request_queue_time_seconds_count"), 8);
    /* Each bucket counts what is at most its bound. */
    int n_buckets = 0;
    for (const char *at = text; (at = strstr(at, "latte_request_queue_time_seconds_bucket{le=\""));
         n_buckets++) {
        at += strlen("latte_request_queue_time_seconds_bucket{le=\"");
        char *rest = NULL;
        double bound = strtod(at, &rest), expected = 0; /* strtod reads "+Inf" too */
        for (size_t i = 0; i < 8; i++)
            expected += values[i] <= bound;
        assert_true(strtod(strchr(rest, ' '), NULL) == expected);
    }
    assert_true(n_buckets > 10);
    free(text);
}

static void *count_a_lot(void *context)
{
    (void)context;
    for (int i = 0; i < 10000; i++) {
        metrics_add(METRIC_UNKNOWN_FIELDS, 1);
        metrics_observe(METRIC_TIME_PER_TOKEN, 0.5);
        metrics_count_request("PUT", "/many", 201);
    }
    return NULL;
}

static void test_threads(void **state)
{
    (void)state;
    pthread_t threads[4];
    for (size_t i = 0; i < COUNT_OF(threads); i++)
        assert_false(pthread_create(&threads[i], NULL, count_a_lot, NULL));
    for (size_t i = 0; i < COUNT_OF(threads); i++)
        pthread_join(threads[i], NULL);
    char *text = text_of();
    assert_true(sample(text, "latte_unknown_request_fields_total") == 40000);
    assert_true(sample(text, "latte_time_per_output_token_seconds_sum") == 20000);
    assert_true(sample(text, "latte_http_requests_total{method=\"PUT\",route=\"/many\","
                             "code=\"201\"}") == 40000);
    free(text);
}

/* First tokens of turns are counted by the age of what they go on from. */
static void test_positions(void **state)
{
    (void)state;
    static const uint64_t positions[] = {0, 999, 1000, 99999, 999999, 1000000, UINT64_MAX};
    static const struct {
        const char *position;
        int n;
    } expected[] = {
        {"0-999", 2}, {"1000-9999", 1}, {"10000-99999", 1}, {"100000-999999", 1}, {"1000000-", 2}};
    for (size_t i = 0; i < COUNT_OF(positions); i++)
        metrics_observe_turn(positions[i], 0.03);
    char *text = text_of();
    for (size_t i = 0; i < COUNT_OF(expected); i++) {
        char name[120];
        snprintf(name, sizeof(name), "latte_turn_first_token_seconds_count{position=\"%s\"}",
                 expected[i].position);
        assert_true(sample(text, name) == expected[i].n);
        snprintf(name, sizeof(name),
                 "latte_turn_first_token_seconds_bucket{position=\"%s\",le=\"0.02\"}",
                 expected[i].position);
        assert_true(sample(text, name) == 0);
    }
    free(text);
}

/* Each route has a histogram of its own, whose buckets count what is at most their bound. */
static void test_durations(void **state)
{
    (void)state;
    metrics_observe_request("/slow", 0.001);
    metrics_observe_request("/slow", 0.3);
    metrics_observe_request("/slow", 601);
    metrics_observe_request("/slow", NAN);
    metrics_observe_request("/fast", 0.002);
    char *text = text_of();
    static const struct {
        const char *name;
        double value;
    } cases[] = {
        {"_bucket{route=\"/slow\",le=\"0.001\"}", 1}, {"_bucket{route=\"/slow\",le=\"0.25\"}", 1},
        {"_bucket{route=\"/slow\",le=\"0.5\"}", 2},   {"_bucket{route=\"/slow\",le=\"600\"}", 2},
        {"_bucket{route=\"/slow\",le=\"+Inf\"}", 3},  {"_count{route=\"/slow\"}", 3},
        {"_sum{route=\"/slow\"}", 601.301},           {"_count{route=\"/fast\"}", 1},
    };
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        char name[120];
        snprintf(name, sizeof(name), "latte_http_request_duration_seconds%s", cases[i].name);
        assert_true(fabs(sample(text, name) - cases[i].value) < 1e-9);
    }
    free(text);
}

/* A store is named as up or away; without one there is no such metric. */
static void test_store(void **state)
{
    (void)state;
    struct metrics_sessions sessions = {.has_store = true};
    for (int away = 0; away < 2; away++) {
        struct bytes b = {0};
        sessions.store_is_away = away;
        metrics_write(&b, NULL, &sessions, NULL, &service);
        assert_true(sample(b.data, "latte_store_up") == !away);
        bytes_free(&b);
    }
    char *text = text_of();
    assert_null(strstr(text, "latte_store_up"));
    free(text);
}

/* Each session is in one tier. */
static void test_tiers(void **state)
{
    (void)state;
    const struct metrics_sessions sessions = {
        .sessions = {.n_sessions = 12, .n_on_device = 3, .n_in_memory = 4}};
    struct bytes b = {0};
    metrics_write(&b, NULL, &sessions, NULL, &service);
    assert_false(b.failed);
    assert_true(sample(b.data, "latte_sessions") == 12);
    assert_true(sample(b.data, "latte_sessions_by_tier{tier=\"device\"}") == 3);
    assert_true(sample(b.data, "latte_sessions_by_tier{tier=\"host\"}") == 4);
    assert_true(sample(b.data, "latte_sessions_by_tier{tier=\"store\"}") == 5);
    bytes_free(&b);
}

/* Many routes and codes do not grow the table without end. */
static void test_bounded(void **state)
{
    (void)state;
    for (int code = 0; code < 5000; code++)
        metrics_count_request("GET", "/bounded", code);
    char *text = text_of();
    int n = 0;
    for (const char *at = text; (at = strstr(at, "latte_http_requests_total{")); at++)
        n++;
    assert_true(n > 100 && n <= 256);
    free(text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_format),    cmocka_unit_test(test_counters),
        cmocka_unit_test(test_histogram), cmocka_unit_test(test_threads),
        cmocka_unit_test(test_positions), cmocka_unit_test(test_durations),
        cmocka_unit_test(test_start),     cmocka_unit_test(test_store),
        cmocka_unit_test(test_tiers),     cmocka_unit_test(test_bounded),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
