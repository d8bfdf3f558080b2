/* test_json.c - json_check against tables of texts judged by RFC 8259. */
#include "tests/unit/unit.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/json.h"

static enum status check(const char *text, struct error *err)
{
    const struct json_limits limits = {.max_depth = 8};
    return json_check(text, strlen(text), &limits, err);
}

static void test_accepts(void **state)
{
    (void)state;
    static const char *const texts[] = {
        "0",
        "-0",
        " \t\r\n1\n",
        "true",
        "false",
        "null",
        "\"\"",
        "{}",
        "[]",
        "[ ]",
        "{ }",
        "[1,2.5,-3e+2,4E-2,0.0,1e308,0e0]",
        "{\"a\":{\"a\":1},\"b\":[{\"a\":2},{\"a\":3}]}",
        "\"\\\"\\\\\\/\\b\\f\\n\\r\\t\\u00e9\\ud83d\\uDE00\"",
        "\"h\xc3\xa9 \xe2\x82\xac \xf0\x9f\x98\x80 \x7f\"",
        "9007199254740992",
        "-9007199254740992",
        "9007199254740994",
        "18446744073709551616",
        "1e-999",
        "{\"a\":1,\"A\":2,\"\":3,\"aa\":4}",
        "[[[[[[[[1]]]]]]]]",
        "[{}]",
        "[[],[],[],[],[],{},{},{},{},[]]",
        "0.1000000000000000055511151231257827021181583404541015625",
    };
    for (size_t i = 0; i < COUNT_OF(texts); i++) {
        struct error err = {0};
        if (check(texts[i], &err))
            fail_msg("%s: %s", texts[i], err.text);
    }
}

static void test_refuses(void **state)
{
    (void)state;
    static const struct {
        const char *text, *error;
    } table[] = {
        {"", "line 1, column 1: expected a value, found the end of the text"},
        {"  ", "line 1, column 3: expected a value"},
        {"\n\n  x", "line 3, column 3: expected a value, found 'x'"},
        {"nul", "expected a value"},
        {"True", "expected a value, found 'T'"},
        {"NaN", "expected a value"},
        {"-Infinity", "expected a digit, found 'I'"},
        {"+1", "expected a value, found '+'"},
        {".5", "expected a value, found '.'"},
        {"1.", "expected a digit"},
        {"1e", "expected a digit"},
        {"-", "expected a digit"},
        {"01", "leading zero"},
        {"-00", "leading zero"},
        {"[1.5, 012]", "line 1, column 7: a number with a leading zero"},
        {"0x10", "expected the end of the text, found 'x'"},
        {"1e999", "out of range"},
        {"-1e400", "out of range"},
        {"9007199254740993", "without rounding"},
        {"-9007199254740995", "without rounding"},
        {"18446744073709551615", "without rounding"},
        {"0.00000000000000000000000000000000000000000000000000000000000001", "of more than 63"},
        {"1 2", "expected the end of the text, found '2'"},
        {"{} x", "expected the end"},
        {"[1,]", "expected a value, found ']'"},
        {"[,1]", "expected a value, found ','"},
        {"[1 2]", "expected ',' or ']', found '2'"},
        {"[1", "expected ',' or ']', found the end"},
        {"{\"a\":1,}", "expected a key in quotes, found '}'"},
        {"{\"a\" 1}", "expected ':' after a key"},
        {"{\"a\":}", "expected a value"},
        {"{a:1}", "expected a key in quotes, found 'a'"},
        {"{'a':1}", "expected a key"},
        {"{\"a\":1", "expected ',' or '}'"},
        {"{\"a\":1]", "expected ',' or '}', found ']'"},
        {"/* no */ 1", "expected a value, found '/'"},
        {"\"abc", "line 1, column 1: this string is never closed"},
        {"\"a\nb\"", "raw control byte 0x0a"},
        {"\"a\tb\"", "raw control byte 0x09"},
        {"\"\\x41\"", "unknown or cut escape"},
        {"\"\\u12g4\"", "unknown or cut escape"},
        {"\"\\u12", "unknown or cut escape"},
        {"\"\\", "unknown or cut escape"},
        {"\"a\\u0000b\"", "\\u0000"},
        {"\"\\ud800\"", "unpaired surrogate \\ud800"},
        {"\"\\ud800\\ud800\"", "unpaired surrogate"},
        {"\"\\udc00\\ud800\"", "unpaired surrogate \\udc00"},
        {"\"\\ud800\\n\"", "unpaired surrogate"},
        {"\"\\udc00\\udc00\"", "unpaired surrogate \\udc00"},
        {"\"\xff\"", "invalid UTF-8: byte 0xff"},
        {"\"\xc0\x80\"", "invalid UTF-8"},
        {"\"\xed\xa0\x80\"", "invalid UTF-8"},
        {"\"\xf4\x90\x80\x80\"", "invalid UTF-8"},
        {"\"\xe2\x82\"", "invalid UTF-8"},
        {"\xef\xbb\xbf{}", "byte order mark"},
        {"\xc2\xa0"
         "1",
         "found byte 0xc2"},
        {"{\"a\":1,\"b\":2,\"a\":3}", "line 1, column 15: duplicate key \"a\""},
        {"{\"ab\":1,\"\\u0061b\":2}", "duplicate key"},
        {"{\"\\ud83d\\ude00\":1,\"\xf0\x9f\x98\x80\":2}", "duplicate key"},
        {"{\"/\":1,\"\\/\":2}", "duplicate key"},
        {"[{\"x\":{\"y\":1,\"y\":1}}]", "duplicate key \"y\""},
        {"[[[[[[[[[1]]]]]]]]]", "more than 8 nested"},
        {"[[[[[[[[{}]]]]]]]]", "more than 8 nested"},
    };
    for (size_t i = 0; i < COUNT_OF(table); i++) {
        struct error err = {0};
        if (check(table[i].text, &err) != STATUS_INVALID)
            fail_msg("accepted: %s", table[i].text);
        if (!strstr(err.text, table[i].error))
            fail_msg("%s: got \"%s\", expected \"%s\"", table[i].text, err.text, table[i].error);
    }
}

static void test_embedded_zero(void **state)
{
    (void)state;
    const struct json_limits limits = {.max_depth = 2};
    struct error err;
    assert_int_equal(json_check("1\0", 2, &limits, &err), STATUS_INVALID);
    assert_int_equal(json_check("\"a\0b\"", 5, &limits, &err), STATUS_INVALID);
    assert_int_equal(json_check("[1]garbage", 3, &limits, &err), STATUS_OK);
}

static void test_limits(void **state)
{
    (void)state;
    struct json_limits limits = {.max_depth = 2, .max_values = 4};
    struct error err;
    assert_int_equal(json_check("[1,2,3]", 7, &limits, &err), STATUS_OK);
    assert_int_equal(json_check("[1,2,3,4]", 9, &limits, &err), STATUS_INVALID);
    assert_non_null(strstr(err.text, "more than 4 values"));
    limits = (struct json_limits){.max_depth = 1000};
    char deep[2001];
    memset(deep, '[', 1000);
    memset(deep + 1000, ']', 1000);
    assert_int_equal(json_check(deep, 2000, &limits, &err), STATUS_OK);
    memset(deep, '[', 2000);
    assert_int_equal(json_check(deep, 2000, &limits, &err), STATUS_INVALID);
}

/* With any_integer, digits that a double would lose pass, and json_member finds them. */
static void test_members(void **state)
{
    (void)state;
    static const struct {
        const char *text, *key, *value; /* NULL: no such member */
    } table[] = {
        {"{\"seed\":18446744073709551615}", "seed", "18446744073709551615"},
        {" { \"a\" : { \"seed\" : 1 } , \"seed\" : -7 } ", "seed", "-7"},
        {"{\"a\":[{\"seed\":1}],\"b\":\"seed\",\"seed\":[1, 2]}", "seed", "[1, 2]"},
        {"{\"s\\u0065ed\":9007199254740993}", "seed", "9007199254740993"},
        {"{\"seeds\":1,\"see\":2}", "seed", NULL},
        {"{}", "seed", NULL},
        {"[\"seed\"]", "seed", NULL},
        {"\"seed\"", "seed", NULL},
    };
    const struct json_limits limits = {.max_depth = 8, .any_integer = true};
    for (size_t i = 0; i < COUNT_OF(table); i++) {
        const char *text = table[i].text, *value = table[i].value;
        size_t n = 0;
        struct error err = {0};
        assert_int_equal(json_check(text, strlen(text), &limits, &err), STATUS_OK);
        const char *found = json_member(text, strlen(text), table[i].key, &n);
        assert_true(!found == !value);
        if (value && (n != strlen(value) || memcmp(found, value, n)))
            fail_msg("%s: found %.*s", text, (int)n, found);
    }
}

/* Distinct keys in adverse orders stay quick, and one duplicate among them is found. */
static void test_many_keys(void **state)
{
    (void)state;
    enum { KEYS = 100000 };
    const struct json_limits limits = {.max_depth = 1};
    char *text = malloc(KEYS * 24 + 2);
    assert_non_null(text);
    for (int duplicate = 0; duplicate < 2; duplicate++) {
        size_t n = 0;
        for (uint32_t i = 0; i < KEYS; i++) {
            uint32_t key = duplicate && i == KEYS - 1 ? 7 : i * 2654435761u;
            if (duplicate && i == 10)
                key = 7;
            n += (size_t)sprintf(text + n, "%c\"k%u\":0", i ? ',' : '{', key);
        }
        text[n++] = '}';
        struct error err = {0};
        assert_int_equal(json_check(text, n, &limits, &err),
                         duplicate ? STATUS_INVALID : STATUS_OK);
        if (duplicate)
            assert_non_null(strstr(err.text, "duplicate key \"k7\""));
    }
    free(text);
}

/* Every prefix of a valid text is refused, and every single-byte change is survived. */
static void test_cut_and_changed(void **state)
{
    (void)state;
    static const char text[] =
        "{\"a\\u00e9\":[1,-2.5e3,true,{\"\xe2\x82\xac\":null}],\"b\":\"\\n\"}";
    const struct json_limits limits = {.max_depth = 8};
    char copy[sizeof(text)];
    size_t n = sizeof(text) - 1;
    struct error err;
    for (size_t i = 0; i < n; i++)
        assert_int_equal(json_check(text, i, &limits, &err), STATUS_INVALID);
    for (size_t i = 0; i < n; i++)
        for (int c = 0; c < 256; c++) {
            memcpy(copy, text, n);
            copy[i] = (char)c;
            enum status st = json_check(copy, n, &limits, &err);
            assert_true(st == STATUS_OK || st == STATUS_INVALID);
        }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_accepts),         cmocka_unit_test(test_refuses),
        cmocka_unit_test(test_embedded_zero),   cmocka_unit_test(test_limits),
        cmocka_unit_test(test_members),         cmocka_unit_test(test_many_keys),
        cmocka_unit_test(test_cut_and_changed),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
