/* test_http_check.c - the request header check: whole, cut anywhere, and with any byte changed.
 * (What each malformed request is answered with is in tests/http/test_http_core.c.) */
#include "tests/unit/unit.h"

#include <stdlib.h>
#include <string.h>

#include "server/http_check.h"

enum { MAX_BODY = 1000 };

static const char *const good[] = {
    "GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "GET / HTTP/1.0\r\n\r\n",
    "\r\nGET /a?b=c HTTP/1.1\r\nhost:x\r\nX-A: \t tab and \xC3\xBC \r\nEmpty:\r\n\r\n",
    "POST /v1 HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\nExpect: 100-continue\r\n\r\n",
    "POST /v1 HTTP/1.1\r\nTransfer-Encoding:chunked\r\nHost: x\r\n\r\n",
    "OPTIONS * HTTP/1.1\r\nHost: \r\n\r\n",
};

/* The bytes lie at the end of a block of their own, so that reading past them is noticed. */
static size_t check(const char *data, size_t n, struct http_verdict *verdict)
{
    char *copy = malloc(n ? n : 1);
    memcpy(copy, data, n);
    struct http_framing framing;
    size_t length = http_check_header(copy, n, MAX_BODY, &framing, verdict);
    free(copy);
    return length;
}

static void test_good(void **state)
{
    (void)state;
    for (size_t i = 0; i < COUNT_OF(good); i++) {
        struct http_verdict v;
        size_t n = strlen(good[i]);
        assert_int_equal(check(good[i], n, &v), n);
        assert_int_equal(v.code, 0);
        /* What follows the header is not its business. */
        char *longer = malloc(n + 4);
        memcpy(longer, good[i], n);
        memcpy(longer + n, "\0\xFF\n\n", 4);
        assert_int_equal(check(longer, n + 4, &v), n);
        assert_int_equal(v.code, 0);
        free(longer);
    }
}

static void test_cut(void **state)
{
    (void)state;
    for (size_t i = 0; i < COUNT_OF(good); i++) {
        for (size_t n = 0; n < strlen(good[i]); n++) {
            struct http_verdict v;
            if (check(good[i], n, &v) || v.code)
                fail_msg("%zu bytes of '%s': verdict %d", n, good[i], v.code);
        }
    }
}

/* Whatever one byte becomes: a verdict, a length within the data, or a wish for more. */
static void test_changed(void **state)
{
    (void)state;
    for (size_t i = 0; i < COUNT_OF(good); i++) {
        size_t n = strlen(good[i]);
        char *text = malloc(n);
        for (size_t at = 0; at < n; at++) {
            for (int byte = 0; byte < 256; byte++) {
                struct http_verdict v;
                memcpy(text, good[i], n);
                text[at] = (char)byte;
                size_t length = check(text, n, &v);
                assert_true(length <= n);
                assert_true(v.code == 0 || (v.code >= 400 && v.code <= 505 && v.message));
                if (byte == 0 && at + 1 < n) /* without its last byte a header has no end */
                    assert_true(v.code == 400);
            }
        }
        free(text);
    }
}

static void test_limits(void **state)
{
    (void)state;
    static const struct {
        size_t n_target, n_value, n_fields;
        int code;
    } cases[] = {{HTTP_TARGET_LIMIT, 0, 0, 0},       {HTTP_TARGET_LIMIT + 1, 0, 0, 414},
                 {1, HTTP_HEADER_LIMIT - 100, 0, 0}, {1, HTTP_HEADER_LIMIT, 0, 431},
                 {1, 0, HTTP_FIELDS_LIMIT - 2, 0},   {1, 0, HTTP_FIELDS_LIMIT - 1, 431}};
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        char *text = malloc(65536), *at = text;
        at = stpcpy(at, "GET ");
        memset(at, '/', cases[i].n_target);
        at += cases[i].n_target;
        at = stpcpy(at, " HTTP/1.1\r\nHost: x\r\nLong: ");
        memset(at, 'v', cases[i].n_value);
        at += cases[i].n_value;
        at = stpcpy(at, "\r\n");
        for (size_t k = 0; k < cases[i].n_fields; k++)
            at = stpcpy(at, "a: b\r\n");
        at = stpcpy(at, "\r\n");
        struct http_verdict v;
        check(text, (size_t)(at - text), &v);
        if (v.code != cases[i].code)
            fail_msg("case %zu: expected %d, found %d", i, cases[i].code, v.code);
        free(text);
    }
}

/* Header bytes without an end are refused at the limit, not waited for. */
static void test_endless(void **state)
{
    (void)state;
    static const struct {
        const char *begin;
        char fill;
        int code;
    } cases[] = {{"GET /", 'a', 414}, {"GET / HTTP/1.1\r\nX: ", 'a', 431}};
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        char text[HTTP_HEADER_LIMIT + 1];
        memset(text, cases[i].fill, sizeof(text));
        memcpy(text, cases[i].begin, strlen(cases[i].begin));
        struct http_verdict v;
        assert_int_equal(check(text, sizeof(text), &v), 0);
        assert_int_equal(v.code, cases[i].code);
    }
}

static void expect_slice(struct http_slice found, const char *expected)
{
    assert_int_equal(found.n, strlen(expected));
    assert_memory_equal(found.data, expected, found.n);
}

static void test_walk(void **state)
{
    (void)state;
    static const char header[] = "GET /a?b=c HTTP/1.1\r\nHost:x\r\nX:\r\nx-Y: \t a b:c \t\r\n\r\n";
    static const char *const fields[][2] = {{"Host", "x"}, {"X", ""}, {"x-Y", "a b:c"}};
    struct http_slice name, value;
    const char *at = http_header_line(header, &name, &value);
    expect_slice(name, "GET");
    expect_slice(value, "/a?b=c");
    for (size_t i = 0; i < COUNT_OF(fields); i++) {
        assert_true(http_header_field(&at, &name, &value));
        expect_slice(name, fields[i][0]);
        expect_slice(value, fields[i][1]);
    }
    assert_false(http_header_field(&at, &name, &value));
    assert_false(http_header_field(&at, &name, &value));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_good),    cmocka_unit_test(test_cut),
        cmocka_unit_test(test_changed), cmocka_unit_test(test_limits),
        cmocka_unit_test(test_endless), cmocka_unit_test(test_walk),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
