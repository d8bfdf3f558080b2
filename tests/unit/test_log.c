/* test_log.c - what a log line looks like: one JSON object, whatever the text is. */
#include "tests/unit/unit.h"

#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cjson/cJSON.h>

#include "engine/base/json.h"
#include "server/log.h"

static int saved_stderr;
static FILE *captured;

static void capture(void)
{
    fflush(stderr);
    saved_stderr = dup(2);
    captured = tmpfile();
    dup2(fileno(captured), 2);
}

/* What was written since capture, as text. */
static char *captured_text(void)
{
    dup2(saved_stderr, 2);
    close(saved_stderr);
    static char text[65536];
    rewind(captured);
    size_t n = fread(text, 1, sizeof(text) - 1, captured);
    text[n] = '\0';
    fclose(captured);
    return text;
}

/* The only line of the text, checked strictly and parsed. */
static cJSON *parse_line(const char *text)
{
    size_t n = strlen(text);
    assert_true(n > 0);
    assert_ptr_equal(strchr(text, '\n'), text + n - 1);
    struct error err;
    if (json_check(text, n, &(struct json_limits){.max_depth = 3}, &err))
        fail_msg("%s in %s", err.text, text);
    cJSON *line = cJSON_Parse(text);
    assert_non_null(line);
    return line;
}

static const char *member(const cJSON *line, const char *name)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(line, name);
    assert_true(cJSON_IsString(item));
    return item->valuestring;
}

static void test_texts(void **state)
{
    (void)state;
    static const struct {
        const char *text, *expected;
    } cases[] = {
        {"plain", "plain"},
        {"two\nlines \"quoted\" \\ tab\t", "two\nlines \"quoted\" \\ tab\t"},
        {"bell\a and escape\033[31m", "bell\a and escape\033[31m"},
        {"ünï \xF0\x9F\x98\x80", "ünï \xF0\x9F\x98\x80"},
        {"bad \xFF\xC3 byte", "bad \xEF\xBF\xBD\xEF\xBF\xBD byte"},
        {"cut \xE2\x82", "cut \xEF\xBF\xBD"},
    };
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        capture();
        log_event(LOG_INFO, "test", "%s", cases[i].text);
        cJSON *line = parse_line(captured_text());
        assert_string_equal(member(line, "message"), cases[i].expected);
        assert_string_equal(member(line, "event"), "test");
        assert_string_equal(member(line, "level"), "info");
        /* 2026-01-31T12:34:56.789Z */
        assert_int_equal(strlen(member(line, "time")), 24);
        cJSON_Delete(line);
    }
}

static void test_long_text(void **state)
{
    (void)state;
    char *text = malloc(100001);
    memset(text, 'x', 100000);
    text[100000] = '\0';
    capture();
    log_event(LOG_ERROR, "long", "%s", text);
    cJSON *line = parse_line(captured_text());
    assert_true(strlen(member(line, "message")) > 1000);
    cJSON_Delete(line);
    free(text);
}

static void test_levels(void **state)
{
    (void)state;
    static const char *const names[] = {"debug", "info", "warn", "error"};
    for (int least = LOG_DEBUG; least <= LOG_ERROR; least++) {
        log_set_level(least);
        for (int level = LOG_DEBUG; level <= LOG_ERROR; level++) {
            capture();
            log_event(level, "test", "text");
            char *text = captured_text();
            assert_int_equal(log_enabled(level), level >= least);
            assert_int_equal(*text != '\0', level >= least);
            if (*text) {
                cJSON *line = parse_line(text);
                assert_string_equal(member(line, "level"), names[level]);
                cJSON_Delete(line);
            }
        }
    }
    log_set_level(LOG_INFO);
}

static void test_access_line(void **state)
{
    (void)state;
    struct log_access access = {.request_id = "req_1",
                                .method = "POST",
                                .route = "/v1/completions",
                                .client = "127.0.0.1:5",
                                .status = 200,
                                .duration_ms = 1.23456,
                                .bytes_in = 12,
                                .bytes_out = 5000000000,
                                .prompt_tokens = 3,
                                .output_tokens = 0};
    capture();
    log_request(&access);
    cJSON *line = parse_line(captured_text());
    assert_string_equal(member(line, "route"), "/v1/completions");
    assert_string_equal(member(line, "client"), "127.0.0.1:5");
    static const struct {
        const char *name;
        double value;
    } numbers[] = {{"status", 200},      {"duration_ms", 1.235}, {"bytes_in", 12},
                   {"prompt_tokens", 3}, {"output_tokens", 0},   {"bytes_out", 5e9}};
    for (size_t i = 0; i < COUNT_OF(numbers); i++) {
        const cJSON *item = cJSON_GetObjectItemCaseSensitive(line, numbers[i].name);
        assert_true(cJSON_IsNumber(item) && item->valuedouble == numbers[i].value);
    }
    assert_null(cJSON_GetObjectItemCaseSensitive(line, "client_gone"));
    cJSON_Delete(line);

    access.prompt_tokens = access.output_tokens = -1;
    access.gone = true;
    capture();
    log_request(&access);
    line = parse_line(captured_text());
    assert_null(cJSON_GetObjectItemCaseSensitive(line, "prompt_tokens"));
    assert_true(cJSON_IsTrue(cJSON_GetObjectItemCaseSensitive(line, "client_gone")));
    cJSON_Delete(line);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_texts),
        cmocka_unit_test(test_long_text),
        cmocka_unit_test(test_levels),
        cmocka_unit_test(test_access_line),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
