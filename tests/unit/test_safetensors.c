/* test_safetensors.c - reading what the reference package wrote, and refusing hostile files. */
#include "tests/unit/unit.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tests/unit/model_files.h"
#include "weights/safetensors.h"

/* The bytes of a file: length of the header, header, n_data bytes of zero. */
static char *make_file(const char *header, size_t n_data, size_t *n)
{
    uint64_t length = strlen(header);
    char *file = calloc(1, 8 + length + n_data);
    assert_non_null(file);
    memcpy(file, &length, 8);
    memcpy(file + 8, header, length);
    *n = 8 + length + n_data;
    return file;
}

static enum status open_bytes(const char *data, size_t n, struct error *err)
{
    char dir[100];
    struct safetensors *s = NULL;
    assert_int_equal(test_dir_make(dir, sizeof(dir)), 0);
    assert_int_equal(test_file_write(dir, "model.safetensors", data, n), 0);
    enum status st = safetensors_open(&s, dir, err);
    safetensors_close(s);
    test_dir_remove(dir);
    return st;
}

static void expect(const char *what, enum status st, const struct error *err, const char *text)
{
    if (!text && st)
        fail_msg("%s: refused: %s", what, err->text);
    if (text && st != STATUS_INVALID)
        fail_msg("%s: status %s, expected INVALID with \"%s\"", what, status_name(st), text);
    if (text && !strstr(err->text, text))
        fail_msg("%s: got \"%s\", expected \"%s\"", what, err->text, text);
}

/* ---- the reference package ---- */

static double value_of(const struct tensor *t, size_t i)
{
    float value;
    dtype_to_f32(&value, (const char *)t->data + i * dtype_bytes(t->dtype), t->dtype, 1);
    return value;
}

static const struct tensor *need(const struct safetensors *s, const char *name, enum dtype dtype,
                                 int n_dims, int64_t n_values)
{
    const struct tensor *t = safetensors_find(s, name);
    if (!t)
        fail_msg("no tensor %s", name);
    assert_int_equal(t->dtype, dtype);
    assert_int_equal(t->n_dims, n_dims);
    assert_int_equal(t->n_values, n_values);
    return t;
}

/* make_safetensors.py beside the file says what is in it. */
static void test_golden(void **state)
{
    (void)state;
    static const double exact[] = {0.0, -0.0, 1.0, -1.5, 0.15625, 2048.0, -0.0009765625, 240.0};
    static const struct {
        const char *name;
        enum dtype dtype;
    } rows[] = {{"exact.f32", DTYPE_F32}, {"exact.f16", DTYPE_F16}, {"exact.bf16", DTYPE_BF16}};
    struct safetensors *s;
    struct error err;
    if (safetensors_open(&s, "tests/golden/safetensors", &err))
        fail_msg("%s", err.text);
    assert_int_equal(safetensors_count(s), 10);
    for (size_t r = 0; r < COUNT_OF(rows); r++) {
        const struct tensor *t = need(s, rows[r].name, rows[r].dtype, 2, 8);
        assert_int_equal(t->shape[0], 2);
        assert_int_equal(t->shape[1], 4);
        for (size_t i = 0; i < COUNT_OF(exact); i++) {
            assert_true(value_of(t, i) == exact[i]);
            assert_int_equal(!signbit(value_of(t, i)), !signbit(exact[i]));
        }
    }
    const struct tensor *t = need(s, "special.f32", DTYPE_F32, 1, 4);
    assert_true(isnan(value_of(t, 0)) && isinf(value_of(t, 1)) && value_of(t, 2) < -3e38);
    assert_true(value_of(t, 3) == 0x1p-149);
    t = need(s, "special.f16", DTYPE_F16, 1, 4);
    assert_true(isnan(value_of(t, 0)) && isinf(value_of(t, 1)) && value_of(t, 2) == -65504);
    assert_true(value_of(t, 3) == 0x1p-24);
    t = need(s, "scalar", DTYPE_F32, 0, 1);
    assert_true(value_of(t, 0) == 42);
    t = need(s, "empty", DTYPE_BF16, 3, 0);
    assert_int_equal(t->shape[1], 0);
    t = need(s, "cube", DTYPE_F32, 4, 24);
    assert_true(value_of(t, 23) == 23);
    t = need(s, "whole", DTYPE_OTHER, 1, 3);
    assert_string_equal(t->dtype_name, "I64");
    t = need(s, "na\xc3\xafve \xe2\x98\x95", DTYPE_F32, 1, 1);
    assert_true(value_of(t, 0) == 7);
    for (size_t i = 1; i < safetensors_count(s); i++)
        assert_true(strcmp(safetensors_get(s, i - 1)->name, safetensors_get(s, i)->name) < 0);
    assert_null(safetensors_find(s, "cub"));
    safetensors_close(s);
}

/* ---- hostile headers ---- */

#define TENSOR(fields) "{\"a\":{" fields "}}"
#define F32_2 "\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]"
#define A_TO_8 "{\"a\":{" F32_2 "},"

static void test_headers(void **state)
{
    (void)state;
    static const struct {
        const char *header;
        size_t n_data;
        const char *error; /* NULL: a good file */
    } table[] = {
        {TENSOR(F32_2), 8, NULL},
        {TENSOR(F32_2) "       ", 8, NULL},
        {"{\"__metadata__\":{\"format\":\"pt\"},\"a\":{" F32_2 "}}", 8, NULL},
        {TENSOR("\"data_offsets\":[0,4],\"shape\":[],\"dtype\":\"F32\""), 4, NULL},
        {TENSOR("\"dtype\":\"F32\",\"shape\":[0,3],\"data_offsets\":[0,0]"), 0, NULL},
        {TENSOR("\"dtype\":\"F4\",\"shape\":[4],\"data_offsets\":[0,2]"), 2, NULL},
        {TENSOR("\"dtype\":\"Q9_ODD\",\"shape\":[4],\"data_offsets\":[0,2]"), 2, NULL},
        {A_TO_8 "\"b\":{\"dtype\":\"BF16\",\"shape\":[1,1],\"data_offsets\":[8,10]}}", 10, NULL},
        {A_TO_8 "\"b\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]}}", 8, NULL},
        {"", 0, "does not begin with '{'"},
        {" {}", 0, "does not begin with '{'"},
        {"{}", 0, "no tensors"},
        {"[]", 0, "does not begin with '{'"},
        {"{", 0, "header: line 1"},
        {"{} {}", 0, "expected the end of the text"},
        {"{\"a\":1}", 0, "the entry is a number"},
        {"{\"a\":null}", 0, "the entry is null"},
        {"{\"a\":{}}", 0, "\"dtype\" is nothing"},
        {"{\"\":{" F32_2 "}}", 8, "name has 0 bytes or"},
        {"{\"a\\n\":{" F32_2 "}}", 8, "or a control character"},
        {"{\"a\\u0000\":{" F32_2 "}}", 8, "\\u0000"},
        {"{\"a\xff\":{" F32_2 "}}", 8, "invalid UTF-8"},
        {A_TO_8 "\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[8,12]}}", 12,
         "duplicate key \"a\""},
        {TENSOR(F32_2 ",\"extra\":1"), 8, "unknown key \"extra\""},
        {TENSOR("\"dtype\":7,\"shape\":[2],\"data_offsets\":[0,8]"), 8, "\"dtype\" is 7"},
        {TENSOR("\"dtype\":\"F32\",\"data_offsets\":[0,8]"), 8, "\"shape\" is nothing"},
        {TENSOR("\"dtype\":\"F32\",\"shape\":2,\"data_offsets\":[0,8]"), 8,
         "\"shape\" is a number"},
        {TENSOR("\"dtype\":\"F32\",\"shape\":[-2],\"data_offsets\":[0,8]"), 8,
         "tensor a: dimension 0 is not a whole number"},
        {TENSOR("\"dtype\":\"F32\",\"shape\":[1,2.5],\"data_offsets\":[0,8]"), 8, "dimension 1"},
        {TENSOR("\"dtype\":\"F32\",\"shape\":[\"2\"],\"data_offsets\":[0,8]"), 8, "dimension 0"},
        {TENSOR("\"dtype\":\"F32\",\"shape\":[1e300],\"data_offsets\":[0,8]"), 8, "dimension 0"},
        {TENSOR("\"dtype\":\"F32\",\"shape\":[18446744073709551618],\"data_offsets\":[0,8]"), 8,
         "without rounding"},
        {TENSOR("\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1,1,1],\"data_offsets\":[0,4]"), 4,
         "more than 8 dimensions"},
        {TENSOR("\"dtype\":\"F32\",\"shape\":[[2]],\"data_offsets\":[0,8]"), 8,
         "more than 3 nested"},
        {TENSOR("\"dtype\":\"F32\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,8]"), 8,
         "product of the dimensions overflows"},
        {TENSOR("\"dtype\":\"F32\",\"shape\":[4611686018427387904],\"data_offsets\":[0,0]"), 0,
         "dimension 0"},
        {TENSOR("\"dtype\":\"F32\",\"shape\":[1073741824,4294967296],\"data_offsets\":[0,0]"), 0,
         "size in bytes overflows"},
        {TENSOR("\"dtype\":\"F32\",\"shape\":[2]"), 8, "\"data_offsets\" is not"},
        {TENSOR("\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0]"), 8,
         "\"data_offsets\" is not"},
        {TENSOR("\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8,8]"), 8,
         "\"data_offsets\" is not"},
        {TENSOR("\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[-8,0]"), 8,
         "\"data_offsets\" is not"},
        {TENSOR("\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[\"0\",8]"), 8,
         "\"data_offsets\" is not"},
        {TENSOR("\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,0]"), 8, "in the wrong order"},
        {TENSOR("\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]"), 7,
         "data end at offset 8, but the file holds 7 bytes"},
        {TENSOR("\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,9007199254740992]"), 8,
         "data end at offset 9007199254740992"},
        {TENSOR("\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[0,8]"), 8,
         "3 values of F32 take 12 bytes, but data_offsets give 8"},
        {TENSOR("\"dtype\":\"F16\",\"shape\":[2],\"data_offsets\":[0,8]"), 8,
         "2 values of F16 take 4 bytes"},
        {TENSOR("\"dtype\":\"F4\",\"shape\":[3],\"data_offsets\":[0,2]"), 2, "3 values of F4"},
        {TENSOR("\"dtype\":\"F4\",\"shape\":[3],\"data_offsets\":[0,1]"), 1,
         "3 values of F4 take 2 bytes"},
        {TENSOR(F32_2), 9, "tensors cover 8 bytes of data, but the file holds 9"},
        {TENSOR("\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]"), 8,
         "begins at offset 4, but the one before it ends at 0: a hole"},
        {A_TO_8 "\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[12,16]}}", 16,
         "tensor b begins at offset 12, but the one before it ends at 8: a hole"},
        {A_TO_8 "\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}", 8,
         "tensor b begins at offset 4, but the one before it ends at 8: they overlap"},
        {A_TO_8 "\"b\":{" F32_2 "}}", 8, "they overlap"},
        {"{\"__metadata__\":[],\"a\":{" F32_2 "}}", 8, "\"__metadata__\" is an array"},
        {"{\"__metadata__\":{\"n\":1},\"a\":{" F32_2 "}}", 8, "\"__metadata__\" holds a number"},
    };
    for (size_t i = 0; i < COUNT_OF(table); i++) {
        size_t n;
        char *file = make_file(table[i].header, table[i].n_data, &n);
        struct error err = {0};
        expect(table[i].header, open_bytes(file, n, &err), &err, table[i].error);
        free(file);
    }
}

static void test_lengths(void **state)
{
    (void)state;
    static const struct {
        uint64_t length;
        const char *error;
    } table[] = {
        {0, "does not begin with"},
        {1, "header: line 1, column 2"},
        {64, "but only 62 follow: truncated?"},
        {100000001, "a header of 100000001 bytes, expected at most 100000000"},
        {UINT64_MAX, "a header of 18446744073709551615 bytes"},
        {UINT64_MAX - 7, "expected at most"},
    };
    size_t n;
    char *file = make_file(TENSOR(F32_2), 8, &n);
    for (size_t i = 0; i < COUNT_OF(table); i++) {
        struct error err = {0};
        memcpy(file, &table[i].length, 8);
        expect(table[i].error, open_bytes(file, n, &err), &err, table[i].error);
    }
    free(file);
}

/* Every shorter file is refused: none of its cuts makes another valid file. */
static void test_truncated(void **state)
{
    (void)state;
    size_t n;
    char *file = make_file(TENSOR(F32_2), 8, &n);
    for (size_t cut = 0; cut < n; cut++) {
        struct error err = {0};
        assert_int_equal(open_bytes(file, cut, &err), STATUS_INVALID);
        assert_true(err.text[0] != '\0');
    }
    free(file);
}

/* ---- files and shards ---- */

static void test_missing(void **state)
{
    (void)state;
    struct safetensors *s = NULL;
    struct error err;
    char dir[100], path[160];
    assert_int_equal(safetensors_open(&s, "/nonexistent/model", &err), STATUS_NOT_FOUND);
    assert_non_null(strstr(err.text, "neither model.safetensors nor model.safetensors.index.json"));
    assert_int_equal(test_dir_make(dir, sizeof(dir)), 0);
    snprintf(path, sizeof(path), "%s/model.safetensors", dir);
    assert_int_equal(mkfifo(path, 0600), 0);
    assert_int_equal(safetensors_open(&s, dir, &err), STATUS_INVALID);
    assert_non_null(strstr(err.text, "not a regular file"));
    assert_null(s);
    test_dir_remove(dir);
}

static void write_shards(const char *dir)
{
    size_t n;
    char *a = make_file("{\"a\":{" F32_2 "}}", 8, &n);
    assert_int_equal(test_file_write(dir, "one.safetensors", a, n), 0);
    free(a);
    char *b = make_file("{\"b\":{" F32_2 "},\"c\":{\"dtype\":\"F32\",\"shape\":[1],"
                        "\"data_offsets\":[8,12]}}",
                        12, &n);
    assert_int_equal(test_file_write(dir, "two.safetensors", b, n), 0);
    assert_int_equal(test_file_write(dir, "same.safetensors", b, n), 0);
    free(b);
}

#define MAP(entries) "{\"weight_map\":{" entries "}}"
#define GOOD "\"a\":\"one.safetensors\",\"b\":\"two.safetensors\",\"c\":\"two.safetensors\""

static void test_index(void **state)
{
    (void)state;
    static const struct {
        const char *index, *error;
    } table[] = {
        {MAP(GOOD), NULL},
        {"{\"metadata\":{\"total_size\":20},\"weight_map\":{" GOOD "}}", NULL},
        {"", "model.safetensors.index.json: line 1"},
        {"[]", "\"weight_map\" is nothing"},
        {"{}", "\"weight_map\" is nothing"},
        {"{\"weight_map\":[]}", "\"weight_map\" is an array"},
        {MAP(""), "\"weight_map\" is empty"},
        {MAP("\"a\":1"), "a is mapped to 1, expected a plain file name"},
        {MAP("\"a\":\"../one.safetensors\""), "expected a plain file name"},
        {MAP("\"a\":\"/etc/passwd\""), "expected a plain file name"},
        {MAP("\"a\":\"sub/one.safetensors\""), "expected a plain file name"},
        {MAP("\"a\":\"..\""), "expected a plain file name"},
        {MAP("\"a\":\"\""), "expected a plain file name"},
        {MAP("\"a\":\"one\\nsafetensors\""), "expected a plain file name"},
        {MAP("\"a\":\"..\\\\one.safetensors\""), "expected a plain file name"},
        {MAP("\"a\":\"three.safetensors\""), "three.safetensors, which is not there"},
        {MAP("\"a\":\"one.safetensors\",\"b\":\"two.safetensors\""),
         "tensor c of two.safetensors is not in the index"},
        {MAP(GOOD ",\"d\":\"two.safetensors\""), "tensor d is missing in two.safetensors"},
        {MAP("\"a\":\"two.safetensors\",\"b\":\"one.safetensors\",\"c\":\"two.safetensors\""),
         "tensor a is in one.safetensors, but the index says two.safetensors"},
        {MAP("\"a\":\"one.safetensors\",\"b\":\"two.safetensors\",\"c\":\"same.safetensors\""),
         "tensor b is in two files"},
        {MAP(GOOD ",\"a\":\"one.safetensors\""), "duplicate key"},
    };
    char dir[100];
    assert_int_equal(test_dir_make(dir, sizeof(dir)), 0);
    write_shards(dir);
    for (size_t i = 0; i < COUNT_OF(table); i++) {
        struct safetensors *s = NULL;
        struct error err = {0};
        const char *text = table[i].index;
        assert_int_equal(test_file_write(dir, "model.safetensors.index.json", text, strlen(text)),
                         0);
        expect(text, safetensors_open(&s, dir, &err), &err, table[i].error);
        if (s) {
            assert_int_equal(safetensors_count(s), 3);
            assert_int_equal(safetensors_n_bytes(s), 20);
        }
        safetensors_close(s);
    }
    test_dir_remove(dir);
}

/* ---- mutations ---- */

/* Touch every byte that an accepted file promises. */
static void touch(const struct safetensors *s)
{
    for (size_t i = 0; i < safetensors_count(s); i++) {
        const struct tensor *t = safetensors_get(s, i);
        const volatile unsigned char *data = t->data;
        size_t sum = 0;
        for (size_t j = 0; j < t->n_bytes; j++)
            sum += data[j];
        (void)sum;
        assert_ptr_equal(safetensors_find(s, t->name), t);
    }
}

/* A few bytes changed, a piece repeated or removed: an error or a consistent set, never a crash. */
static void test_mutations(void **state)
{
    (void)state;
    static const char interesting[] = "{}[],:\"0123456789-eE.\\u \xff\x80";
    enum { ROUNDS = 4000 };
    uint32_t seed = 2463534242u;
    char dir[100];
    size_t n;
    char *file = make_file("{\"__metadata__\":{\"k\":\"v\"},\"a\":{" F32_2 "},\"b\":{\"dtype\":"
                           "\"BF16\",\"shape\":[2,1,2],\"data_offsets\":[8,16]}}",
                           16, &n);
    char *copy = malloc(2 * n);
    assert_int_equal(test_dir_make(dir, sizeof(dir)), 0);
    for (int round = 0; round < ROUNDS; round++) {
        size_t length = n;
        memcpy(copy, file, n);
        for (uint32_t k = test_random(&seed) % 3 + 1; k; k--)
            copy[test_random(&seed) % (n - 16)] =
                interesting[test_random(&seed) % (sizeof(interesting) - 1)];
        if (test_random(&seed) % 4 == 0)
            length = test_random(&seed) % (n + 1);
        if (test_random(&seed) % 4 == 0) {
            size_t from = test_random(&seed) % n, piece = test_random(&seed) % (n - from);
            memcpy(copy + length, file + from, piece);
            length += piece;
        }
        struct safetensors *s = NULL;
        struct error err = {0};
        assert_int_equal(test_file_write(dir, "model.safetensors", copy, length), 0);
        if (safetensors_open(&s, dir, &err))
            assert_true(err.text[0] != '\0');
        else
            touch(s);
        safetensors_close(s);
    }
    free(copy);
    free(file);
    test_dir_remove(dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_golden),    cmocka_unit_test(test_headers),
        cmocka_unit_test(test_lengths),   cmocka_unit_test(test_truncated),
        cmocka_unit_test(test_missing),   cmocka_unit_test(test_index),
        cmocka_unit_test(test_mutations),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
