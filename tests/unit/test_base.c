/* test_base.c - errors, arenas, byte buffers and files. */
#include "tests/unit/unit.h"

#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "engine/base/arena.h"
#include "engine/base/bytes.h"
#include "engine/base/error.h"
#include "engine/base/file.h"
#include "engine/base/json.h"
#include "engine/base/utf8.h"
#include "tests/unit/fail_alloc.h"
#include "tests/unit/model_files.h"

/* ---- error ---- */

static void test_error(void **state)
{
    (void)state;
    struct error err;
    assert_int_equal(fail(&err, STATUS_BUSY, "queue of %d is full", 7), STATUS_BUSY);
    assert_int_equal(err.status, STATUS_BUSY);
    assert_string_equal(err.text, "queue of 7 is full");
    assert_string_equal(err.field, "");
    assert_int_equal(fail_field(&err, STATUS_INVALID, "top_p", "found %s", "2"), STATUS_INVALID);
    assert_string_equal(err.field, "top_p");
    assert_int_equal(fail_context(&err, "config %s", "a.json"), STATUS_INVALID);
    assert_string_equal(err.text, "config a.json: found 2");
    assert_string_equal(err.field, "top_p");
    assert_int_equal(fail(NULL, STATUS_IO, "nobody listens"), STATUS_IO);
    assert_string_equal(status_name(STATUS_OK), "ok");
    assert_string_equal(status_name(STATUS_INTERNAL), "internal");
    assert_string_equal(status_name(STATUS_COUNT), "unknown");
    for (int i = 0; i < STATUS_COUNT; i++)
        assert_true(strlen(status_name((enum status)i)) > 1);
}

/* Sentences and prefixes of any length are cut, never overrun. */
static void test_long_error(void **state)
{
    (void)state;
    char longest[2000];
    for (size_t n = 0; n < sizeof(longest) - 1; n += 97) {
        struct error err;
        memset(longest, 'x', n);
        longest[n] = '\0';
        fail_field(&err, STATUS_INVALID, longest, "%s", longest);
        assert_true(strlen(err.text) == (n < sizeof(err.text) ? n : sizeof(err.text) - 1));
        fail_context(&err, "%s", longest);
        assert_true(strlen(err.text) < sizeof(err.text));
        assert_true(strlen(err.field) < sizeof(err.field));
    }
}

/* A cut never leaves half a character, and a long prefix never pushes out the reason. */
static void test_cut_error(void **state)
{
    (void)state;
    static const char cup[] = "\xf0\x9f\x8d\xb5";
    char many[600];
    for (size_t shift = 0; shift < 4; shift++) {
        struct error err;
        memset(many, 'x', shift);
        for (size_t i = shift; i + 5 < sizeof(many); i += 4)
            memcpy(many + i, cup, 5);
        fail_field(&err, STATUS_INVALID, many, "%s", many);
        assert_int_equal(utf8_valid_prefix(err.text, strlen(err.text)), strlen(err.text));
        assert_int_equal(utf8_valid_prefix(err.field, strlen(err.field)), strlen(err.field));
        assert_in_range(strlen(err.text), sizeof(err.text) - 4, sizeof(err.text) - 1);
        fail(&err, STATUS_INVALID, "the reason");
        fail_context(&err, "%s", many);
        assert_non_null(strstr(err.text, ": the reason"));
    }
    static const char *const cut[] = {"", "", "", "\xf0\x9f\x8d\xb5", "\xf0\x9f\x8d\xb5"};
    for (int n = 1; n <= 5; n++) { /* in the middle of a sentence */
        struct error err;
        char expected[40];
        fail(&err, STATUS_INVALID, "no '%.*s'", n, "\xf0\x9f\x8d\xb5\xf0");
        snprintf(expected, sizeof(expected), "no '%s'", cut[n - 1]);
        assert_string_equal(err.text, expected);
    }
    struct error err;
    fail(&err, STATUS_INVALID, "no '%s'",
         "a\xff\xc3\xa9\xc0\x80"
         "b\xed\xa0\x80");
    assert_string_equal(err.text, "no 'a\xc3\xa9"
                                  "b'");
}

static void test_check(void **state)
{
    (void)state;
    CHECK(1 + 1 == 2);
    pid_t child = fork();
    if (child == 0) {
        fclose(stderr);
        check_failed("x", "file.c", 1);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT);
}

/* ---- arena ---- */

static void test_arena(void **state)
{
    (void)state;
    struct arena a;
    unsigned char *blocks[200];
    arena_init(&a, 0);
    for (size_t i = 0; i < COUNT_OF(blocks); i++) {
        size_t n = i * 97;
        blocks[i] = arena_take(&a, n);
        assert_non_null(blocks[i]);
        assert_int_equal((uintptr_t)blocks[i] % _Alignof(max_align_t), 0);
        for (size_t j = 0; j < n; j++)
            assert_int_equal(blocks[i][j], 0);
        memset(blocks[i], (int)i, n);
    }
    for (size_t i = 0; i < COUNT_OF(blocks); i++)
        for (size_t j = 0; j < i * 97; j++)
            assert_int_equal(blocks[i][j], (unsigned char)i);
    assert_string_equal(arena_copy(&a, "latte art", 5), "latte");
    assert_string_equal(arena_copy(&a, NULL, 0), "");
    arena_free(&a);
    assert_int_equal(a.used_bytes, 0);
}

static void test_arena_limits(void **state)
{
    (void)state;
    struct arena a;
    arena_init(&a, 100000);
    assert_null(arena_take(&a, 100001));
    assert_null(arena_take(&a, SIZE_MAX));
    assert_null(arena_take(&a, SIZE_MAX - 8));
    assert_null(arena_take_array(&a, SIZE_MAX / 2, 4));
    assert_null(arena_copy(&a, "x", SIZE_MAX));
    size_t taken = 0;
    while (arena_take(&a, 1000))
        taken += 1000;
    assert_in_range(taken, 50000, 100000);
    assert_true(a.used_bytes <= 100000);
    arena_free(&a);
    assert_non_null(arena_take(&a, 50000));
    assert_non_null(arena_take_array(&a, 0, 8));
    arena_free(&a);
}

/* ---- bytes ---- */

static void test_bytes(void **state)
{
    (void)state;
    struct bytes b = {0};
    bytes_text(&b, "");
    assert_int_equal(b.n, 0);
    bytes_text(&b, "one ");
    bytes_format(&b, "%d%s", 2, " three");
    bytes_char(&b, '!');
    bytes_append(&b, "\0x", 2);
    assert_int_equal(b.n, 14);
    assert_memory_equal(b.data, "one 2 three!\0x", 15);
    bytes_consume(&b, 4);
    assert_memory_equal(b.data, "2 three!\0x", 10);
    bytes_consume(&b, 99);
    assert_int_equal(b.n, 0);
    for (int i = 0; i < 10000; i++)
        bytes_format(&b, "%d,", i % 10);
    assert_int_equal(b.n, 20000);
    assert_int_equal(strlen(b.data), 20000);
    assert_false(b.failed);
    bytes_free(&b);
    assert_null(b.data);
}

static void test_bytes_limit(void **state)
{
    (void)state;
    struct bytes b = {.limit = 5};
    bytes_text(&b, "abcde");
    assert_false(b.failed);
    bytes_char(&b, 'f');
    assert_true(b.failed);
    bytes_format(&b, "%s", "");
    bytes_text(&b, "");
    assert_string_equal(b.data, "abcde");
    bytes_free(&b);
    bytes_format(&b, "%06d", 1);
    assert_true(b.failed);
    bytes_free(&b);
    assert_int_equal(b.limit, 5);
}

static void test_json_string(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        size_t n;
        const char *json;
    } table[] = {
        {"", 0, "\"\""},
        {"plain", 5, "\"plain\""},
        {"a\"b\\c/", 6, "\"a\\\"b\\\\c/\""},
        {"\n\r\t", 3, "\"\\n\\r\\t\""},
        {"\0\x01\x1f\x7f", 4, "\"\\u0000\\u0001\\u001f\\u007f\""},
        {"h\xc3\xa9 \xf0\x9f\x98\x80", 8, "\"h\xc3\xa9 \xf0\x9f\x98\x80\""},
    };
    for (size_t i = 0; i < COUNT_OF(table); i++) {
        struct bytes b = {0};
        bytes_json_string(&b, table[i].text, table[i].n);
        assert_string_equal(b.data, table[i].json);
        bytes_free(&b);
    }
}

/* The expected texts are what Python's bytes.decode("utf-8", "replace") gives. */
static void test_json_lossy(void **state)
{
    (void)state;
#define X "\xef\xbf\xbd"
    static const struct {
        const char *text;
        size_t n;
        const char *json;
    } table[] = {
        {NULL, 0, "\"\""},
        {"a\"\n", 3, "\"a\\\"\\n\""},
        {"h\xc3\xa9", 3, "\"h\xc3\xa9\""},
        {"\xff\xfe"
         "a",
         3, "\"" X X "a\""},
        {"a\xe2\x82", 3, "\"a" X "\""}, /* cut off: one part */
        {"\xe2\x82"
         "a\x80",
         4, "\"" X "a" X "\""},
        {"\xed\xa0\x80", 3, "\"" X X X "\""}, /* a surrogate: three */
        {"\xf0\x9f\x98"
         "b\xf0\x9f",
         6, "\"" X "b" X "\""},
    };
#undef X
    for (size_t i = 0; i < COUNT_OF(table); i++) {
        struct bytes b = {0};
        bytes_json_lossy(&b, table[i].text, table[i].n);
        assert_string_equal(b.data, table[i].json);
        bytes_free(&b);
    }
}

static void test_json_number(void **state)
{
    (void)state;
    static const struct {
        double value;
        const char *json;
    } table[] = {
        {0, "0"},      {1, "1"},           {-2.5, "-2.5"},  {0.1, "0.1"},       {1e100, "1e+100"},
        {NAN, "null"}, {INFINITY, "null"}, {1e-7, "1e-07"}, {100000, "100000"},
    };
    const struct json_limits limits = {.max_depth = 1};
    for (size_t i = 0; i < COUNT_OF(table); i++) {
        struct bytes b = {0};
        bytes_json_number(&b, table[i].value);
        assert_string_equal(b.data, table[i].json);
        bytes_free(&b);
    }
    uint32_t seed = 1;
    for (int i = 0; i < 20000; i++) {
        uint64_t bits = (uint64_t)test_random(&seed) << 32 | test_random(&seed);
        double value;
        memcpy(&value, &bits, sizeof(value));
        if (!isfinite(value))
            continue;
        struct bytes b = {0};
        struct error err;
        bytes_json_number(&b, value);
        assert_true(strtod(b.data, NULL) == value);
        assert_int_equal(json_check(b.data, b.n, &limits, &err), STATUS_OK);
        bytes_free(&b);
    }
}

/* ---- file ---- */

static void test_file(void **state)
{
    (void)state;
    char dir[100], path[FILE_PATH_BYTES], longest[FILE_PATH_BYTES];
    struct bytes b = {0};
    struct file_map map = {0};
    struct error err;
    assert_int_equal(test_dir_make(dir, sizeof(dir)), 0);
    assert_int_equal(file_path(path, dir, "f", &err), STATUS_OK);
    assert_int_equal(file_read(&b, path, 10, &err), STATUS_NOT_FOUND);
    assert_non_null(strstr(err.text, path));
    assert_int_equal(file_map(&map, path, &err), STATUS_NOT_FOUND);
    test_file_write(dir, "f", "0123456789", 10);
    bytes_text(&b, ">");
    assert_int_equal(file_read(&b, path, 10, &err), STATUS_OK);
    assert_string_equal(b.data, ">0123456789");
    assert_int_equal(file_read(&b, path, 9, &err), STATUS_TOO_LARGE);
    assert_int_equal(b.n, 11);
    assert_int_equal(file_map(&map, path, &err), STATUS_OK);
    assert_int_equal(map.n, 10);
    assert_memory_equal(map.data, "0123456789", 10);
    file_unmap(&map);
    file_unmap(&map);
    test_file_write(dir, "f", "", 0);
    assert_int_equal(file_map(&map, path, &err), STATUS_OK);
    assert_true(map.n == 0 && !map.data);
    assert_int_equal(file_read(&b, dir, 10, &err), STATUS_INVALID);
    assert_non_null(strstr(err.text, "not a regular file"));
    unlink(path);
    assert_int_equal(mkfifo(path, 0600), 0);
    assert_int_equal(file_read(&b, path, 10, &err), STATUS_INVALID);
    assert_int_equal(file_read(&b, "/proc/self/mem", 10, &err), STATUS_IO);
    memset(longest, 'x', sizeof(longest) - 1);
    longest[sizeof(longest) - 1] = '\0';
    assert_int_equal(file_path(path, longest, "f", &err), STATUS_INVALID);
    bytes_free(&b);
    test_dir_remove(dir);
}

/* ---- out of memory ---- */

static enum status take_bytes(void *context, struct error *err)
{
    (void)context;
    struct bytes b = {0};
    for (int i = 0; i < 1000; i++)
        bytes_format(&b, "%d", i);
    bool whole = !b.failed;
    if (whole)
        assert_int_equal(b.n, 2890);
    bytes_free(&b);
    return whole ? STATUS_OK : fail(err, STATUS_NOMEM, "out of memory");
}

static enum status take_arena(void *context, struct error *err)
{
    (void)context;
    struct arena a;
    bool whole = true;
    arena_init(&a, 0);
    for (int i = 0; i < 100; i++)
        whole = arena_take(&a, 1000) && whole;
    arena_free(&a);
    return whole ? STATUS_OK : fail(err, STATUS_NOMEM, "out of memory");
}

static enum status check_json(void *context, struct error *err)
{
    const struct bytes *text = context;
    const struct json_limits limits = {.max_depth = 4};
    return json_check(text->data, text->n, &limits, err);
}

static void test_out_of_memory(void **state)
{
    (void)state;
    struct bytes text = {0};
    fail_alloc_walk(take_bytes, NULL);
    fail_alloc_walk(take_arena, NULL);
    for (int i = 0; i < 200; i++)
        bytes_format(&text, "%s\"k%d\":{\"x\":1,\"y\":2}", i ? "," : "{", i);
    bytes_char(&text, '}');
    fail_alloc_walk(check_json, &text);
    bytes_free(&text);
}

/* The walker itself: it sees the allocations of this program and of its libraries. */
static void test_fail_alloc(void **state)
{
    (void)state;
    if (!fail_alloc_works())
        skip();
    long balance;
    fail_alloc_start(2, false);
    void *first = malloc(1), *second = malloc(1), *third = calloc(1, 1);
    assert_int_equal(fail_alloc_stop(&balance), 3);
    assert_true(first && !second && third);
    assert_int_equal(balance, 2);
    free(first);
    free(third);
    fail_alloc_start(1, true);
    char *copy = strdup("by libc");
    void *grown = realloc(NULL, 8);
    fail_alloc_stop(NULL);
    assert_true(!copy && !grown);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_error),         cmocka_unit_test(test_long_error),
        cmocka_unit_test(test_check),         cmocka_unit_test(test_cut_error),
        cmocka_unit_test(test_arena),         cmocka_unit_test(test_arena_limits),
        cmocka_unit_test(test_bytes),         cmocka_unit_test(test_bytes_limit),
        cmocka_unit_test(test_json_string),   cmocka_unit_test(test_json_number),
        cmocka_unit_test(test_json_lossy),    cmocka_unit_test(test_file),
        cmocka_unit_test(test_out_of_memory), cmocka_unit_test(test_fail_alloc),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
