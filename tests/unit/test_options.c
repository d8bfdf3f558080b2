/* test_options.c - flags, environment, ranges and errors of the option table. */
#include "tests/unit/unit.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "server/options.h"

enum { MAX_ARGS = 16 };

/* Parse a command line given as words. */
static enum status parse(struct options *o, struct error *err, const char *const *words)
{
    char *argv[MAX_ARGS] = {(char *)"latte-server"};
    int argc = 1;
    for (; *words; words++)
        argv[argc++] = (char *)(uintptr_t)*words;
    return options_parse(o, argc, argv, err);
}

#define PARSE(o, err, ...) parse(o, err, (const char *const[]){__VA_ARGS__, NULL})

static int clear_environment(void **state)
{
    (void)state;
    unsetenv("LATTE_MODEL");
    unsetenv("LATTE_PORT");
    unsetenv("LATTE_MAX_SLOTS");
    unsetenv("LATTE_ACCESS_LOG");
    unsetenv("LATTE_LOG_LEVEL");
    unsetenv("LATTE_PRESET");
    return 0;
}

static void test_defaults(void **state)
{
    (void)state;
    struct options o;
    struct error err;
    assert_int_equal(PARSE(&o, &err, "--model", "dir"), STATUS_OK);
    assert_string_equal(o.model, "dir");
    assert_string_equal(o.host, "127.0.0.1");
    assert_int_equal(o.port, 8080);
    assert_int_equal(o.max_slots, 0);
    assert_string_equal(o.device, "auto");
    assert_true(o.device_memory_share == 0.9);
    assert_false(o.deterministic || o.no_warmup);
    assert_int_equal(o.max_body_mb, 32);
    assert_null(o.api_key_file);
    assert_null(o.unix_socket);
    assert_true(o.access_log);
    assert_false(o.strict_fields);
}

static void test_cors_origin(void **state)
{
    (void)state;
    static const struct {
        const char *origin;
        bool good;
    } cases[] = {
        {"*", true},
        {"https://app.example", true},
        {"http://localhost:3000", true},
        {"http://[::1]:80", true},
        {"chrome-extension://abcdef", true},
        {"https://app.example/", false},
        {"https://a.example, https://b.example", false},
        {"https://a\r\nSet-Cookie: x", false},
        {"https://a\n", false},
        {"https://a b", false},
        {"https://\xc3\xa4.example", false},
        {"https://", false},
        {"://a", false},
        {"app.example", false},
        {"**", false},
    };
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        struct options o;
        struct error err = {0};
        enum status st = PARSE(&o, &err, "--model", "m", "--cors-origin", cases[i].origin);
        if (st != (cases[i].good ? STATUS_OK : STATUS_INVALID))
            fail_msg("'%s': found %d %s", cases[i].origin, (int)st, err.text);
        if (st)
            assert_string_equal(err.field, "cors-origin");
    }
}

static void test_forms(void **state)
{
    (void)state;
    struct options o;
    struct error err;
    assert_int_equal(PARSE(&o, &err, "--model=a=b", "--port=0", "--strict-fields",
                           "--no-access-log", "--max-slots", "7", "--host=::1",
                           "--device=cuda:0,cuda:1"),
                     STATUS_OK);
    assert_string_equal(o.model, "a=b");
    assert_int_equal(o.port, 0);
    assert_int_equal(o.max_slots, 7);
    assert_true(o.strict_fields);
    assert_false(o.access_log);
    assert_string_equal(o.host, "::1");
    assert_string_equal(o.device, "cuda:0,cuda:1"); /* the engine knows which there are */
    assert_int_equal(PARSE(&o, &err, "--model", "a", "--device-memory-share", "0.25",
                           "--deterministic", "--max-batch=2000", "--window-dtype", "f8"),
                     STATUS_OK);
    assert_true(o.device_memory_share == 0.25 && o.deterministic && o.max_batch == 2000);
    assert_int_equal(PARSE(&o, &err, "-m", "a"), STATUS_OK);
    assert_string_equal(o.model, "a");
    assert_int_equal(PARSE(&o, &err, "-h"), STATUS_OK);
    assert_true(o.help);
    assert_int_equal(PARSE(&o, &err, "--model", "a", "--window-dtype", "f8"), STATUS_OK);
    assert_string_equal(o.window_dtype, "f8");
    assert_int_equal(PARSE(&o, &err, "--model", "a", "--access-log=false", "--model", "b"),
                     STATUS_OK);
    assert_string_equal(o.model, "b"); /* the last one counts */
    assert_false(o.access_log);
    assert_int_equal(PARSE(&o, &err, "--help"), STATUS_OK); /* needs no model */
    assert_true(o.help);
    assert_int_equal(PARSE(&o, &err, "--version"), STATUS_OK);
}

static void test_environment(void **state)
{
    (void)state;
    struct options o;
    struct error err;
    setenv("LATTE_MODEL", "env-dir", 1);
    setenv("LATTE_PORT", "1234", 1);
    setenv("LATTE_MAX_SLOTS", "", 1); /* as good as not set */
    setenv("LATTE_ACCESS_LOG", "no", 1);
    assert_int_equal(PARSE(&o, &err, "--port", "99"), STATUS_OK);
    assert_string_equal(o.model, "env-dir");
    assert_int_equal(o.port, 99); /* the command line wins */
    assert_int_equal(o.max_slots, 0);
    assert_false(o.access_log);
    setenv("LATTE_PORT", "many", 1);
    assert_int_equal(PARSE(&o, &err, "--max-slots", "1"), STATUS_INVALID);
    assert_non_null(strstr(err.text, "LATTE_PORT"));
}

static void test_repeated(void **state)
{
    (void)state;
    struct options o;
    struct error err;
    assert_int_equal(PARSE(&o, &err, "--model", "a"), STATUS_OK);
    assert_int_equal(o.preset.n, 0);
    setenv("LATTE_PRESET", "e=env", 1);
    assert_int_equal(PARSE(&o, &err, "--model", "a"), STATUS_OK);
    assert_int_equal(o.preset.n, 1);
    assert_string_equal(o.preset.values[0], "e=env");
    assert_int_equal(PARSE(&o, &err, "--model", "a", "--preset", "b=1", "--preset=c=2"), STATUS_OK);
    assert_int_equal(o.preset.n, 2); /* the command line wins */
    assert_string_equal(o.preset.values[0], "b=1");
    assert_string_equal(o.preset.values[1], "c=2");
    assert_int_equal(PARSE(&o, &err, "--model", "a", "--preset="), STATUS_INVALID);
    assert_non_null(strstr(err.text, "NAME=FILE"));
}

/* What is wrong, and what the message must name. */
static const struct {
    const char *words[4];
    const char *named[3];
} wrong[] = {
    {{"--port", "65536"}, {"--port", "0 to 65535", "'65536'"}},
    {{"--port", "-1"}, {"--port", "0 to 65535", "'-1'"}},
    {{"--port", "80x"}, {"--port", "whole number", "'80x'"}},
    {{"--port", " 80"}, {"--port", "whole number", "' 80'"}},
    {{"--port", "1e3"}, {"--port", "whole number", "'1e3'"}},
    {{"--port="}, {"--port", "whole number", "''"}},
    {{"--port", "99999999999999999999"}, {"--port", "0 to 65535", "9999"}},
    {{"--max-slots", "65537"}, {"--max-slots", "0 to 65536", "'65537'"}},
    {{"--device-memory-share", "1.1"}, {"--device-memory-share", "a number from 0 to 1", "'1.1'"}},
    {{"--device-memory-share", "-0.1"}, {"--device-memory-share", "from 0 to 1", "'-0.1'"}},
    {{"--device-memory-share", "0.5x"}, {"--device-memory-share", "from 0 to 1", "'0.5x'"}},
    {{"--device-memory-share", "nan"}, {"--device-memory-share", "from 0 to 1", "'nan'"}},
    {{"--device-memory-share="}, {"--device-memory-share", "from 0 to 1", "''"}},
    {{"--port"}, {"--port", "expected N", "nothing"}},
    {{"--host="}, {"--host", "expected ADDR", "nothing"}},
    {{"--device="}, {"--device", "expected NAME", "nothing"}},
    {{"--weight-dtype", "int3"}, {"--weight-dtype", "auto|f32|bf16|int8", "'int3'"}},
    {{"--window-dtype", "int8"}, {"--window-dtype", "auto|f32|bf16|f8", "'int8'"}},
    {{"--window-dtype", "f"}, {"--window-dtype", "auto|f32|bf16|f8", "'f'"}},
    {{"--log-level", "info|warn"}, {"--log-level", "debug|info|warn|error", "'info|warn'"}},
    {{"--strict-fields=maybe"}, {"--strict-fields", "true or false", "'maybe'"}},
    {{"--no-port"}, {"--no-port", "unknown", "--help"}},
    {{"--no-strict-fields=1"}, {"--no-strict-fields", "unknown", "--help"}},
    {{"--frobnicate"}, {"--frobnicate", "unknown", "--help"}},
    {{"--por", "80"}, {"--por", "unknown", "--help"}},
    {{"model"}, {"'model'", "expected a flag", "--model"}},
    {{"-p"}, {"'-p'", "expected a flag", "--model"}},
    {{"--"}, {"'--'", "expected a flag", "--model"}},
};

static void test_errors(void **state)
{
    (void)state;
    for (size_t i = 0; i < COUNT_OF(wrong); i++) {
        const char *words[8] = {"--model", "dir"};
        for (int k = 0; k < 4 && wrong[i].words[k]; k++)
            words[2 + k] = wrong[i].words[k];
        struct options o = {.port = 4711};
        struct error err = {0};
        if (parse(&o, &err, words) != STATUS_INVALID)
            fail_msg("%s was accepted", wrong[i].words[0]);
        for (int k = 0; k < 3; k++) {
            if (!strstr(err.text, wrong[i].named[k]))
                fail_msg("'%s' does not say '%s'", err.text, wrong[i].named[k]);
        }
        assert_int_equal(o.port, 4711); /* left as it was */
    }
    struct options o;
    struct error err;
    assert_int_equal(PARSE(&o, &err, "--port", "1"), STATUS_INVALID);
    assert_non_null(strstr(err.text, "--model"));
}

/* Every option stands in the help with its variable; every default passes its own check. */
static void test_help(void **state)
{
    (void)state;
    char *text = NULL;
    size_t n = 0;
    FILE *out = open_memstream(&text, &n);
    options_print_help(out);
    fclose(out);
    static const char *const flags[] = {
#define X(field, kind, flag, ...) flag,
        OPTION_LIST(X)
#undef X
    };
    for (size_t i = 0; i < COUNT_OF(flags); i++) {
        char name[80] = "LATTE_";
        for (size_t k = 0; k <= strlen(flags[i]); k++)
            name[6 + k] = flags[i][k] == '-'                         ? '_'
                          : flags[i][k] >= 'a' && flags[i][k] <= 'z' ? (char)(flags[i][k] - 32)
                                                                     : flags[i][k];
        if (!strstr(text, flags[i]) || !strstr(text, name))
            fail_msg("--help lacks --%s or %s", flags[i], name);
    }
    free(text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(test_defaults, clear_environment),
        cmocka_unit_test_setup(test_forms, clear_environment),
        cmocka_unit_test_setup(test_cors_origin, clear_environment),
        cmocka_unit_test_setup_teardown(test_environment, clear_environment, clear_environment),
        cmocka_unit_test_setup_teardown(test_repeated, clear_environment, clear_environment),
        cmocka_unit_test_setup(test_errors, clear_environment),
        cmocka_unit_test(test_help),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
