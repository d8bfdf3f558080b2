/* test_base64.c - base64 against RFC 4648's vectors, and every way of being wrong. */
#include "tests/unit/unit.h"

#include <stdlib.h>
#include <string.h>

#include "engine/base/base64.h"

/* RFC 4648, section 10. */
static const char *const vectors[][2] = {{"", ""},
                                         {"f", "Zg=="},
                                         {"fo", "Zm8="},
                                         {"foo", "Zm9v"},
                                         {"foob", "Zm9vYg=="},
                                         {"fooba", "Zm9vYmE="},
                                         {"foobar", "Zm9vYmFy"}};

static void test_vectors(void **state)
{
    (void)state;
    for (size_t i = 0; i < COUNT_OF(vectors); i++) {
        struct bytes text = {0}, data = {0};
        struct error err;
        const char *plain = vectors[i][0], *coded = vectors[i][1];
        base64_encode(plain, strlen(plain), &text);
        assert_int_equal(text.n, strlen(coded));
        assert_int_equal(base64_length(strlen(plain)), text.n);
        if (text.n)
            assert_memory_equal(text.data, coded, text.n);
        assert_int_equal(base64_decode(coded, strlen(coded), &data, &err), STATUS_OK);
        assert_int_equal(data.n, strlen(plain));
        if (data.n)
            assert_memory_equal(data.data, plain, data.n);
        bytes_free(&text);
        bytes_free(&data);
    }
}

/* All bytes, at lengths around the blocks in which the work is done. */
static void test_there_and_back(void **state)
{
    (void)state;
    enum { N = 10000 };
    unsigned char *bytes = malloc(N);
    for (int i = 0; i < N; i++)
        bytes[i] = (unsigned char)(i * 167 + i / 256);
    for (size_t n = 3060; n < N; n += n < 3090 ? 1 : 997) {
        struct bytes text = {0}, data = {0};
        struct error err;
        base64_encode(bytes, n, &text);
        assert_int_equal(text.n, base64_length(n));
        assert_int_equal(base64_decode(text.data, text.n, &data, &err), STATUS_OK);
        assert_int_equal(data.n, n);
        assert_memory_equal(data.data, bytes, n);
        bytes_free(&text);
        bytes_free(&data);
    }
    free(bytes);
}

static void test_what_is_wrong(void **state)
{
    (void)state;
    static const char *const cases[][2] = {
        {"Zm9", "found 3 characters"},
        {"Zm9vY", "found 5 characters"},
        {"Zm9v\nZm9", "0x0a as character 5"},
        {"Zm9 ", "0x20 as character 4"},
        {"Zm-v", "'-' as character 3"},
        {"Zm_v", "'_' as character 3"},
        {"Z===", "'=' as character 2"},
        {"====", "'=' as character 1"},
        {"Zg==Zm9v", "'=' as character 3"},
        {"Zh==", "bits behind the last byte, in character 2"},
        {"Zm9=", "bits behind the last byte, in character 3"},
        {"Zm9vZ\xc3==", "0xc3 as character 6"},
    };
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        struct bytes data = {0};
        struct error err;
        enum status st = base64_decode(cases[i][0], strlen(cases[i][0]), &data, &err);
        assert_int_equal(st, STATUS_INVALID);
        if (!strstr(err.text, cases[i][1]))
            fail_msg("'%s': %s", cases[i][0], err.text);
        bytes_free(&data);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_vectors),
        cmocka_unit_test(test_there_and_back),
        cmocka_unit_test(test_what_is_wrong),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
