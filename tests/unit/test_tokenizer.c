/* test_tokenizer.c - against the `tokenizers` package: tests/golden/tokenizer/make.py says what
 * the golden files hold. Beside that: files that must be refused, hostile files, long texts.
 */
#include "tests/unit/unit.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/file.h"
#include "engine/base/utf8.h"
#include "weights/tokenizer.h"

static const char GOLDEN[] = "tests/golden/tokenizer";
static const char *const FAMILIES[] = {
    "gpt2",      "llama3",           "qwen2", "smollm2", "llama2",
    "metaspace", "metaspace_legacy", "gemma", "cased"};
enum { N_FAMILIES = sizeof(FAMILIES) / sizeof(FAMILIES[0]), N_SEQUENCES = 400, BLOCK = 1024 };

/* ---- helpers ---- */

static uint32_t crc32_of(uint32_t crc, const void *data, size_t n)
{
    static uint32_t table[256];
    if (!table[1])
        for (uint32_t i = 0; i < 256; i++) {
            uint32_t c = i;
            for (int k = 0; k < 8; k++)
                c = c & 1 ? 0xEDB88320u ^ c >> 1 : c >> 1;
            table[i] = c;
        }
    crc = ~crc;
    for (size_t i = 0; i < n; i++)
        crc = table[(crc ^ ((const unsigned char *)data)[i]) & 0xFF] ^ crc >> 8;
    return ~crc;
}

static struct bytes read_golden(const char *name, const char *ending)
{
    char path[256];
    struct error err;
    struct bytes data = {0};
    snprintf(path, sizeof(path), "%s/%s%s", GOLDEN, name, ending);
    if (file_read(&data, path, 1 << 24, &err))
        fail_msg("%s", err.text);
    return data;
}

static struct tokenizer *open_family(const char *name)
{
    char path[256];
    struct error err;
    struct tokenizer *t = NULL;
    snprintf(path, sizeof(path), "%s/%s.json", GOLDEN, name);
    if (tokenizer_open(&t, path, &err))
        fail_msg("%s", err.text);
    return t;
}

struct cursor {
    const unsigned char *at, *end;
};

static uint32_t read_varint(struct cursor *c)
{
    uint32_t value = 0;
    for (int shift = 0;; shift += 7) {
        assert_true(c->at < c->end && shift < 32);
        unsigned char byte = *c->at++;
        value |= (uint32_t)(byte & 127) << shift;
        if (byte < 128)
            return value;
    }
}

static uint32_t read_u32(struct cursor *c)
{
    uint32_t value;
    assert_true(c->end - c->at >= 4);
    memcpy(&value, c->at, 4);
    c->at += 4;
    return value;
}

/* The same generator as make.py's. */
static uint32_t lcg(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*state >> 32);
}

static uint32_t crc_ids(uint32_t crc, const struct token_list *list)
{
    return crc32_of(crc, list->ids, list->n * sizeof(int32_t));
}

static void encode(const struct tokenizer *t, const char *text, size_t n, unsigned flags,
                   struct token_list *out)
{
    struct error err;
    out->n = 0;
    if (tokenizer_encode(t, text, n, flags, out, &err))
        fail_msg("%s", err.text);
}

static void decode(const struct tokenizer *t, const struct token_list *ids, bool skip,
                   struct bytes *out)
{
    struct error err;
    out->n = 0;
    if (tokenizer_decode(t, ids->ids, ids->n, skip, out, &err))
        fail_msg("%s", err.text);
}

/* Push ids one by one: only whole characters may come out, and in the end what decode gives. */
static void check_incremental(const struct tokenizer *t, const struct token_list *ids, bool skip,
                              const struct bytes *whole)
{
    struct detokenizer d;
    struct bytes out = {0};
    detokenizer_init(&d, t, skip);
    for (size_t i = 0; i < ids->n; i++) {
        detokenizer_push(&d, ids->ids[i], &out);
        if (out.n)
            assert_int_equal(utf8_valid_prefix(out.data, out.n), out.n);
    }
    detokenizer_finish(&d, &out);
    assert_int_equal(out.n, whole->n);
    if (out.n)
        assert_memory_equal(out.data, whole->data, out.n);
    bytes_free(&out);
}

/* ---- golden strings ---- */

static void check_ids(const char *family, uint32_t which, struct cursor text,
                      const struct token_list *ids, struct cursor *expected)
{
    uint32_t n = read_varint(expected);
    if (n == 0) {
        if (crc_ids(0, ids) != read_u32(expected))
            fail_msg("%s: string %u: %zu other ids than expected", family, which, ids->n);
        return;
    }
    for (uint32_t i = 0; i + 1 < n; i++) {
        uint32_t id = read_varint(expected);
        if (i < ids->n && ids->ids[i] == (int32_t)id)
            continue;
        fail_msg("%s: string %u \"%.*s\": token %u of %zu is %d, expected %u of %u", family, which,
                 (int)(text.end - text.at), (const char *)text.at, i, ids->n,
                 i < ids->n ? (int)ids->ids[i] : -1, id, n - 1);
    }
    if (ids->n + 1 != n)
        fail_msg("%s: string %u: %zu ids, expected %u", family, which, ids->n, n - 1);
}

/* Special tokens added, special text as text, and both decodings, in one checksum. */
static void check_variants(const char *family, const struct tokenizer *t, uint32_t which,
                           struct cursor text, struct cursor *expected)
{
    struct token_list ids = {0}, ordinary = {0};
    struct bytes out = {0};
    const char *s = (const char *)text.at;
    size_t n = (size_t)(text.end - text.at);
    encode(t, s, n, TOKENIZER_ADD_SPECIAL, &ids);
    encode(t, s, n, TOKENIZER_NO_PARSE_SPECIAL, &ordinary);
    uint32_t crc = crc_ids(crc_ids(0, &ids), &ordinary);
    for (int skip = 0; skip < 2; skip++) {
        decode(t, &ids, skip, &out);
        check_incremental(t, &ids, skip, &out);
        crc = crc32_of(crc, out.data, out.n);
    }
    if (crc != read_u32(expected))
        fail_msg("%s: string %u \"%.*s\": another result with special tokens, or decoded: \"%s\"",
                 family, which, (int)(n > 300 ? 300 : n), s, out.data ? out.data : "");
    token_list_free(&ids);
    token_list_free(&ordinary);
    bytes_free(&out);
}

static void check_strings(const char *family, const struct tokenizer *t, struct cursor *expected)
{
    struct bytes strings = read_golden("strings", ".bin");
    struct cursor c = {(unsigned char *)strings.data, (unsigned char *)strings.data + strings.n};
    struct token_list ids = {0};
    uint32_t count = read_varint(&c);
    assert_true(count >= 2000);
    for (uint32_t i = 0; i < count; i++) {
        uint32_t n = read_varint(&c);
        struct cursor text = {c.at, c.at + n};
        encode(t, (const char *)text.at, n, 0, &ids);
        check_ids(family, i, text, &ids, expected);
        check_variants(family, t, i, text, expected);
        c.at += n;
    }
    token_list_free(&ids);
    bytes_free(&strings);
}

/* Every code point of the planes that have any, BLOCK to a string. */
static void check_code_points(const char *family, const struct tokenizer *t,
                              struct cursor *expected)
{
    static const uint32_t planes[] = {0, 1, 2, 3, 14};
    struct bytes text = {0};
    struct token_list ids = {0};
    for (size_t p = 0; p < sizeof(planes) / sizeof(planes[0]); p++)
        for (uint32_t first = planes[p] << 16; first < (planes[p] + 1) << 16; first += BLOCK) {
            text.n = 0;
            for (uint32_t c = first; c < first + BLOCK; c++) {
                char s[4];
                if (c >= 0xD800 && c <= 0xDFFF)
                    continue;
                int n = utf8_encode(c, s);
                bytes_format(&text, "a%.*sb %.*s1", n, s, n, s);
                if (c == 0) /* printf stops at zero bytes */
                    text.n = 0, bytes_append(&text,
                                             "a\0b \0"
                                             "1",
                                             6);
            }
            if (!text.n)
                continue;
            encode(t, text.data, text.n, 0, &ids);
            if (crc_ids(0, &ids) != read_u32(expected))
                fail_msg("%s: the ids of U+%04X to U+%04X differ", family, first,
                         first + BLOCK - 1);
        }
    token_list_free(&ids);
    bytes_free(&text);
}

static void check_sequences(const char *family, const struct tokenizer *t, struct cursor *expected)
{
    uint32_t size = (uint32_t)tokenizer_size(t);
    for (uint64_t i = 0; i < N_SEQUENCES; i++) {
        int32_t numbers[64];
        struct token_list ids = {.ids = numbers};
        struct bytes out = {0};
        uint64_t state = 1000 + i;
        for (uint32_t n = lcg(&state) % 40; n; n--) {
            uint32_t span = lcg(&state) % 3 ? 300 : size + 2;
            numbers[ids.n++] = (int32_t)(lcg(&state) % (span < size + 2 ? span : size + 2));
        }
        uint32_t crc = 0;
        for (int skip = 0; skip < 2; skip++) {
            decode(t, &ids, skip, &out);
            check_incremental(t, &ids, skip, &out);
            crc = crc32_of(crc, out.data, out.n);
        }
        if (crc != read_u32(expected))
            fail_msg("%s: random ids %u decode to \"%s\"", family, (unsigned)i, out.data);
        bytes_free(&out);
    }
}

static void test_golden(void **state)
{
    (void)state;
    for (int f = 0; f < N_FAMILIES; f++) {
        struct tokenizer *t = open_family(FAMILIES[f]);
        struct bytes golden = read_golden(FAMILIES[f], ".bin");
        struct cursor c = {(unsigned char *)golden.data, (unsigned char *)golden.data + golden.n};
        check_strings(FAMILIES[f], t, &c);
        check_code_points(FAMILIES[f], t, &c);
        check_sequences(FAMILIES[f], t, &c);
        assert_ptr_equal(c.at, c.end);
        bytes_free(&golden);
        tokenizer_close(t);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_golden),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
