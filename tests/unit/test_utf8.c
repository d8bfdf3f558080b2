/* test_utf8.c - every scalar value, every short byte string, and the Unicode standard's
 * examples, against a decoder written from the bit layout alone. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine/base/utf8.h"

/* The oracle: RFC 3629's table read literally, accepting exactly n bytes. */
static bool is_character(const unsigned char *s, size_t n, uint32_t *value)
{
    static const uint32_t smallest[5] = {0, 0, 0x80, 0x800, 0x10000};
    if (n == 1) {
        *value = s[0];
        return s[0] < 0x80;
    }
    static const unsigned char mark[5] = {0, 0, 0xC0, 0xE0, 0xF0};
    static const unsigned char mask[5] = {0, 0, 0xE0, 0xF0, 0xF8};
    if ((s[0] & mask[n]) != mark[n])
        return false;
    uint32_t v = s[0] & ~mask[n] & 0xFF;
    for (size_t i = 1; i < n; i++) {
        if ((s[i] & 0xC0) != 0x80)
            return false;
        v = v * 64 + (s[i] & 0x3F);
    }
    *value = v;
    return v >= smallest[n] && v <= 0x10FFFF && !(v >= 0xD800 && v <= 0xDFFF);
}

static void test_every_scalar_value(void **state)
{
    (void)state;
    for (uint32_t c = 0; c <= 0x10FFFF; c++) {
        if (c >= 0xD800 && c <= 0xDFFF)
            continue;
        char text[4];
        int n = utf8_encode(c, text);
        uint32_t oracle = 0, decoded = 0;
        if (!is_character((unsigned char *)text, (size_t)n, &oracle) || oracle != c)
            fail_msg("U+%04X is encoded wrongly", c);
        if (utf8_decode(text, (size_t)n, &decoded) != n || decoded != c)
            fail_msg("U+%04X is decoded as U+%04X", c, decoded);
        for (int k = 1; k < n; k++)
            assert_int_equal(utf8_next(text, (size_t)k), 0);
    }
}

/* Every string of one to three bytes, and every fourth byte behind each legal start. */
static void check_bytes(const unsigned char *s, size_t n)
{
    uint32_t oracle = 0, decoded = 0;
    int expected = 0;
    for (size_t k = 1; k <= n; k++)
        if (is_character(s, k, &oracle)) {
            expected = (int)k;
            break;
        }
    int found = utf8_decode((const char *)s, n, &decoded);
    if (found != expected || (found && decoded != oracle))
        fail_msg("%02x %02x %02x %02x: length %d, expected %d", s[0], s[1], s[2], s[3], found,
                 expected);
}

static void test_every_byte_string(void **state)
{
    (void)state;
    for (unsigned v = 0; v < 1u << 24; v++) {
        unsigned char s[4] = {v >> 16, v >> 8 & 0xFF, v & 0xFF, 0x80};
        check_bytes(s, 3);
        if (s[0] >= 0xF0 && v % 7 == 0) {
            s[3] = (unsigned char)(v * 31);
            check_bytes(s, 4);
        }
    }
}

/* The replacements that Python's bytes.decode("utf-8", "replace") makes, as lengths. */
static void test_maximal_parts(void **state)
{
    (void)state;
    static const struct {
        const char *bytes;
        int n, steps[8];
    } cases[] = {
        {"\xC0\xAF\x41", 3, {-1, -1, 1}},
        {"\xE0\x9F\x80\x41", 4, {-1, -1, -1, 1}},
        {"\xED\xA0\x80\x41", 4, {-1, -1, -1, 1}},
        {"\xF4\x90\x80\x80", 4, {-1, -1, -1, -1}},
        {"\xE1\x80\xE2\xF0\x91\x92\xF1\xBF", 8, {-2, -1, -3, 0}},
        {"\xF0\x9F\x98\x41", 4, {-3, 1}},
        {"\xFF\xFE\x80", 3, {-1, -1, -1}},
        {"\xF0\x80", 2, {-1, -1}},
        {"\xF0\x90", 2, {0}},
        {"\xC3\xA9\xC3", 3, {2, 0}},
        {"\0\x7F", 2, {1, 1}},
    };
    for (size_t c = 0; c < sizeof(cases) / sizeof(cases[0]); c++) {
        int at = 0;
        for (int i = 0; at < cases[c].n; i++) {
            int step = utf8_next(cases[c].bytes + at, (size_t)(cases[c].n - at));
            if (step != cases[c].steps[i])
                fail_msg("case %zu step %d: %d, expected %d", c, i, step, cases[c].steps[i]);
            if (step == 0)
                break;
            at += abs(step);
        }
    }
}

static void test_valid_prefix(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        size_t n, valid;
    } cases[] = {
        {"", 0, 0},
        {"plain", 5, 5},
        {"a\0b", 3, 3},
        {"\xF0\x9F\x98\x80!", 5, 5},
        {"ab\xF0\x9F\x98", 5, 2},
        {"ab\x80 cd", 6, 2},
        {"\xEF\xBF\xBD\xEF\xBB\xBF", 6, 6},
        {"\xED\xA0\x80", 3, 0},
    };
    for (size_t c = 0; c < sizeof(cases) / sizeof(cases[0]); c++)
        assert_int_equal(utf8_valid_prefix(cases[c].text, cases[c].n), cases[c].valid);
    uint32_t value;
    assert_int_equal(utf8_decode("", 0, &value), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_scalar_value),
        cmocka_unit_test(test_every_byte_string),
        cmocka_unit_test(test_maximal_parts),
        cmocka_unit_test(test_valid_prefix),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
