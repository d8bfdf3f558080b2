/* test_tokenizer.c - against the `tokenizers` package: tests/golden/tokenizer/make.py says what
 * the golden files hold. Beside that: files that must be refused, hostile files, long texts.
 */
#include "tests/unit/unit.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/file.h"
#include "engine/base/utf8.h"
#include "weights/tokenizer_internal.h"

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

/* ---- files that are refused ---- */

static const char SMALL_MODEL[] =
    "{\"type\":\"BPE\",\"dropout\":null,\"unk_token\":\"<unk>\",\"fuse_unk\":true,"
    "\"vocab\":{\"<unk>\":0,\"a\":1,\"b\":2,\"ab\":3,\" \":4,\"<0x41>\":5},\"merges\":[\"a b\"]}";
static const char SMALL_ADDED[] =
    "[{\"id\":6,\"content\":\"<s>\",\"single_word\":false,\"lstrip\":false,\"rstrip\":false,"
    "\"normalized\":false,\"special\":true}]";

/* A whole file with one part replaced by another text. */
static struct bytes small_file(const char *part, const char *text)
{
    const char *const parts[][2] = {
        {"version", "\"1.0\""},
        {"truncation", "null"},
        {"padding", "null"},
        {"added_tokens", SMALL_ADDED},
        {"normalizer", "{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"NFC\"},{\"type\":"
                       "\"Prepend\",\"prepend\":\"_\"},{\"type\":\"Replace\",\"pattern\":"
                       "{\"String\":\" \"},\"content\":\"_\"}]}"},
        {"pre_tokenizer", "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\","
                          "\"pattern\":{\"Regex\":\"\\\\p{L}+|(?i:'s)|[^\\\\s\\\\p{N}]\"},"
                          "\"behavior\":\"Isolated\",\"invert\":false},{\"type\":\"Digits\","
                          "\"individual_digits\":true},{\"type\":\"Metaspace\","
                          "\"replacement\":\"_\",\"prepend_scheme\":\"first\"}]}"},
        {"post_processor", "{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":"
                           "{\"id\":\"<s>\",\"type_id\":0}},{\"Sequence\":{\"id\":\"A\","
                           "\"type_id\":0}}],\"pair\":[],\"special_tokens\":{\"<s>\":"
                           "{\"id\":\"<s>\",\"ids\":[6],\"tokens\":[\"<s>\"]}}}"},
        {"decoder", "{\"type\":\"Sequence\",\"decoders\":[{\"type\":\"Replace\",\"pattern\":"
                    "{\"String\":\"_\"},\"content\":\" \"},{\"type\":\"ByteFallback\"},"
                    "{\"type\":\"Fuse\"},{\"type\":\"Strip\",\"content\":\" \",\"start\":1,"
                    "\"stop\":0}]}"},
        {"model", SMALL_MODEL},
    };
    struct bytes out = {0};
    bytes_char(&out, '{');
    for (size_t i = 0; i < COUNT_OF(parts); i++)
        bytes_format(&out, "%s\"%s\":%s", i ? "," : "", parts[i][0],
                     strcmp(parts[i][0], part) == 0 ? text : parts[i][1]);
    bytes_char(&out, '}');
    return out;
}

/* Load from memory; NULL, with a sentence in err, when refused. */
static struct tokenizer *load(const struct bytes *file, struct error *err)
{
    struct tokenizer *t = calloc(1, sizeof(*t));
    assert_non_null(t);
    *err = (struct error){0};
    enum status st = tokenizer_load(t, file->data ? file->data : "", file->n, err);
    if (!st)
        return t;
    if (st != err->status || !err->text[0])
        fail_msg("%s without a sentence", status_name(st));
    tokenizer_close(t);
    return NULL;
}

/* part of the file, its new text, what the error must name (NULL: it loads). */
static const struct refusal {
    const char *part, *text, *names;
} REFUSALS[] = {
    {"version", "\"1.0\"", NULL},
    {"version", "\"2.0\"", "version"},
    {"truncation", "{}", "truncation"},
    {"padding", "{\"strategy\":\"BatchLongest\"}", "padding"},
    {"added_tokens", "null", "id 6"}, /* the template's */
    {"added_tokens", "{}", "added_tokens"},
    {"added_tokens", "[3]", "added_tokens"},
    {"added_tokens", "[{\"id\":6,\"content\":\"x\"}]", "single_word"},
    {"normalizer", "null", NULL},
    {"normalizer", "{\"type\":\"Lowercase\"}", "Lowercase"},
    {"normalizer", "{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"NFKC\"}]}", "NFKC"},
    {"normalizer", "{\"type\":\"NFC\",\"extra\":1}", "extra"},
    {"normalizer", "{\"type\":\"Prepend\"}", "prepend"},
    {"normalizer", "{\"type\":\"Replace\",\"pattern\":{\"Regex\":\" +\"},\"content\":\"\"}",
     "Regex"},
    {"normalizer", "{\"type\":\"Replace\",\"pattern\":{\"String\":\"\"},\"content\":\"\"}",
     "empty"},
    {"normalizer", "{}", "normalizer.type"},
    {"normalizer", "7", "normalizer"},
    {"pre_tokenizer", "null", NULL},
    {"pre_tokenizer", "{\"type\":\"Whitespace\"}", "Whitespace"},
    {"pre_tokenizer", "{\"type\":\"Digits\"}", "individual_digits"},
    {"pre_tokenizer", "{\"type\":\"ByteLevel\",\"add_prefix_space\":true,\"trim_offsets\":true}",
     NULL},
    {"pre_tokenizer", "{\"type\":\"ByteLevel\",\"add_prefix_space\":1}", "add_prefix_space"},
    {"pre_tokenizer",
     "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"ByteLevel\",\"add_prefix_space\":"
     "true,\"trim_offsets\":true},{\"type\":\"Digits\",\"individual_digits\":true}]}",
     "behind ByteLevel"},
    {"pre_tokenizer",
     "{\"type\":\"Split\",\"pattern\":{\"String\":\"a\"},\"behavior\":\"Odd\",\"invert\":false}",
     "Odd"},
    {"pre_tokenizer", "{\"type\":\"Metaspace\",\"replacement\":\"ab\"}", "replacement"},
    {"pre_tokenizer", "{\"type\":\"Metaspace\",\"replacement\":\"_\",\"add_prefix_space\":false}",
     "prepend_scheme"},
    {"pre_tokenizer", "{\"type\":\"Metaspace\",\"replacement\":\"_\",\"prepend_scheme\":\"last\"}",
     "last"},
    {"post_processor", "null", NULL},
    {"post_processor", "{\"type\":\"BertProcessing\"}", "BertProcessing"},
    {"post_processor", "{\"type\":\"TemplateProcessing\",\"single\":[],\"special_tokens\":{}}",
     "sequence A"},
    {"post_processor",
     "{\"type\":\"TemplateProcessing\",\"single\":[{\"Sequence\":{\"id\":\"B\",\"type_id\":0}}],"
     "\"special_tokens\":{}}",
     "B"},
    {"post_processor",
     "{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"<x>\","
     "\"type_id\":0}}],\"special_tokens\":{}}",
     "<x>"},
    {"decoder", "null", NULL},
    {"decoder", "{\"type\":\"WordPiece\"}", "WordPiece"},
    {"decoder", "{\"type\":\"Strip\",\"content\":\" \",\"start\":1,\"stop\":0}", "Strip"},
    {"decoder",
     "{\"type\":\"Sequence\",\"decoders\":[{\"type\":\"Fuse\"},{\"type\":\"Strip\","
     "\"content\":\" \",\"start\":0,\"stop\":1}]}",
     "stop"},
    {"decoder",
     "{\"type\":\"Sequence\",\"decoders\":[{\"type\":\"Fuse\"},{\"type\":\"ByteFallback\"}]}",
     "ByteFallback"},
    {"decoder",
     "{\"type\":\"Sequence\",\"decoders\":[{\"type\":\"ByteFallback\"},{\"type\":\"ByteLevel\","
     "\"add_prefix_space\":true,\"trim_offsets\":true}]}",
     "ByteLevel"},
    {"model", "null", "model"},
    {"model", "{\"type\":\"Unigram\",\"unk_id\":0,\"vocab\":[]}", "Unigram"},
    {"model", "{\"type\":\"BPE\",\"dropout\":0.1,\"vocab\":{},\"merges\":[]}", "dropout"},
    {"model", "{\"continuing_subword_prefix\":\"##\",\"vocab\":{},\"merges\":[]}",
     "continuing_subword_prefix"},
    {"model", "{\"end_of_word_suffix\":\"</w>\",\"vocab\":{},\"merges\":[]}", "end_of_word_suffix"},
    {"model", "{\"vocab\":{\"a\":-1},\"merges\":[]}", "\"a\""},
    {"model", "{\"vocab\":{\"a\":1.5},\"merges\":[]}", "\"a\""},
    {"model", "{\"vocab\":{\"a\":99999999},\"merges\":[]}", "\"a\""},
    {"model", "{\"vocab\":{\"a\":0,\"b\":0},\"merges\":[]}", "6"},
    {"model", "{\"vocab\":{\"a\":0},\"merges\":[\"a b\"]}", "\"b\""},
    {"model", "{\"vocab\":{\"a\":0,\"b\":1},\"merges\":[[\"a\",\"b\"]]}", "\"ab\""},
    {"model", "{\"vocab\":{\"a\":0},\"merges\":[\"a\"]}", "merges[0]"},
    {"model", "{\"vocab\":{\"a\":0},\"merges\":[[\"a\"]]}", "merges[0]"},
    {"model", "{\"vocab\":{\"a\":0},\"merges\":[],\"unknown\":0}", "unknown"},
    {"model", "{\"vocab\":{\"a\":0}}", "merges"},
    {"model", "{\"vocab\":[],\"merges\":[]}", "vocab"},
};

static void test_refused_files(void **state)
{
    (void)state;
    for (size_t i = 0; i < COUNT_OF(REFUSALS); i++) {
        struct bytes file = small_file(REFUSALS[i].part, REFUSALS[i].text);
        struct error err;
        struct tokenizer *t = load(&file, &err);
        if (!t != !!REFUSALS[i].names)
            fail_msg("%s = %s: %s", REFUSALS[i].part, REFUSALS[i].text, t ? "loaded" : err.text);
        if (!t && !strstr(err.text, REFUSALS[i].names))
            fail_msg("%s = %s: \"%s\" does not name %s", REFUSALS[i].part, REFUSALS[i].text,
                     err.text, REFUSALS[i].names);
        tokenizer_close(t);
        bytes_free(&file);
    }
}

/* Split patterns whose meaning may differ between regular expression libraries. */
static void test_refused_patterns(void **state)
{
    (void)state;
    static const struct {
        const char *pattern;
        bool loads;
    } cases[] = {
        {"a", true},
        {"\\s+(?!\\S)", true},
        {"[^\\r\\n\\p{L}]?\\p{L}+", true},
        {"a{1,3}", true},
        {"a{2}", true},
        {"a{2,}", true},
        {"[a\\-z-]", true},
        {"(?:ab|c)++", true},
        {"a*?b", true},
        {"\\P{L}", true},
        {"(?<=a)b(?<!c)", true},
        {"\xC3\xA9[\xE4\xB8\x80-\xE9\xBE\xA5]", true},
        {"a*", false},
        {"", false},
        {"a|", false},
        {".", false},
        {"^a", false},
        {"a$", false},
        {"\\d", false},
        {"\\w+", false},
        {"\\h", false},
        {"\\x{41}", false},
        {"\\1", false},
        {"\\p{Han}", false},
        {"\\p{^L}", false},
        {"\\pL", false},
        {"\\p{L", false},
        {"[\\S]", false},
        {"[\\P{L}]", false},
        {"[a&&b]", false},
        {"[[a]b]", false},
        {"[]a]", false},
        {"[[:alpha:]]", false},
        {"[a", false},
        {"(?i)a", false},
        {"(?>a)", false},
        {"(?<n>a)", false},
        {"a{,3}", false},
        {"a{2}+", false},
        {"a+*", false},
        {"*a", false},
        {"(a", false},
        {"a)", false},
        {"a\\", false},
        {"(?i:stop)", false},
        {"(?i:\\p{Lu})", false},
        {"(?i:\xC3\x9F)", false},
        {"(?#c)a", false},
        {"{", false},
        {"[a-\\s]", false},
    };
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        struct bytes step = {0};
        struct error err;
        bytes_text(&step, "{\"type\":\"Split\",\"pattern\":{\"Regex\":");
        bytes_json_string(&step, cases[i].pattern, strlen(cases[i].pattern));
        bytes_text(&step, "},\"behavior\":\"Isolated\",\"invert\":false}");
        struct bytes file = small_file("pre_tokenizer", step.data);
        struct tokenizer *t = load(&file, &err);
        if (!!t != cases[i].loads)
            fail_msg("pattern \"%s\": %s", cases[i].pattern, t ? "loaded" : err.text);
        tokenizer_close(t);
        bytes_free(&file);
        bytes_free(&step);
    }
}

/* ---- hostile files ---- */

/* Load what is left of a file; whatever loads must encode and decode. */
static int try_file(const struct bytes *file)
{
    static const char text[] = "ab <s> a\xCC\x81 _'s 42 \xF0\x9F\x99\x82\n\n";
    struct error err;
    struct tokenizer *t = load(file, &err);
    if (!t)
        return 0;
    struct token_list ids = {0};
    struct bytes out = {0};
    if (!tokenizer_encode(t, text, sizeof(text), TOKENIZER_ADD_SPECIAL, &ids, &err))
        decode(t, &ids, false, &out);
    token_list_free(&ids);
    bytes_free(&out);
    tokenizer_close(t);
    return 1;
}

static void mutate(struct bytes *file, const struct bytes *source, uint64_t *state)
{
    static const char bytes[] = "{}[]\",:0-9 \\u\x01\xFF\x80.etn(?+*";
    file->n = 0;
    bytes_append(file, source->data, source->n);
    for (uint32_t k = 1 + lcg(state) % 3; k; k--) {
        size_t at = lcg(state) % file->n, n = lcg(state) % 12;
        switch (lcg(state) % 4) {
        case 0:
            file->data[at] = bytes[lcg(state) % (sizeof(bytes) - 1)];
            break;
        case 1: /* a piece again somewhere else */
            if (at + n < file->n)
                memmove(file->data + at, file->data + lcg(state) % (file->n - n), n);
            break;
        case 2: /* a piece gone */
            if (at + n < file->n) {
                memmove(file->data + at, file->data + at + n, file->n - at - n);
                file->n -= n;
            }
            break;
        default:
            file->data[at] ^= (char)(1u << lcg(state) % 8);
        }
    }
}

static void test_hostile_files(void **state)
{
    (void)state;
    struct bytes source = small_file("", ""), file = {0};
    uint64_t random = 5;
    int loaded = 0;
    assert_int_equal(try_file(&source), 1);
    for (size_t n = 0; n < source.n; n++) {
        struct bytes cut = {.data = source.data, .n = n};
        assert_int_equal(try_file(&cut), 0);
    }
    for (int i = 0; i < 6000; i++) {
        mutate(&file, &source, &random);
        loaded += try_file(&file);
    }
    assert_true(loaded > 50 && loaded < 5000);
    for (int f = 0; f < N_FAMILIES; f++) {
        struct bytes whole = read_golden(FAMILIES[f], ".json");
        for (int i = 0; i < 12; i++) {
            mutate(&file, &whole, &random);
            try_file(&file);
        }
        bytes_free(&whole);
    }
    bytes_free(&file);
    bytes_free(&source);
}

/* ---- texts ---- */

static void test_bad_text(void **state)
{
    (void)state;
    static const char *const texts[] = {"\x80", "a\xC3", "\xED\xA0\x80", "ok \xF4\x90\x80\x80"};
    struct tokenizer *t = open_family("gpt2");
    struct token_list ids = {0};
    struct error err;
    encode(t, "kept", 4, 0, &ids);
    size_t n = ids.n;
    for (size_t i = 0; i < COUNT_OF(texts); i++) {
        assert_int_equal(tokenizer_encode(t, texts[i], strlen(texts[i]), 0, &ids, &err),
                         STATUS_INVALID);
        assert_int_equal(ids.n, n);
    }
    ids.limit = n + 5;
    assert_int_equal(tokenizer_encode(t, "1 2 3 4 5 6", 11, 0, &ids, &err), STATUS_TOO_LARGE);
    assert_int_equal(ids.n, n);
    assert_int_equal(tokenizer_encode(t, "1 2", 3, 0, &ids, &err), STATUS_OK);
    assert_true(ids.n > n);
    token_list_free(&ids);
    tokenizer_close(t);
}

/* Half a megabyte of one thing: an algorithm that is quadratic would take minutes. Byte-level
 * text comes back as it was. */
static void test_long_texts(void **state)
{
    (void)state;
    static const char *const units[] = {"a",         " ",        "\n", " \n", "\xCC\x81\xCC\xA3",
                                        "1",         "the cat ", "'s", "=",   "\xE4\xB8\x80",
                                        "<|im_start"};
    static const char *const families[] = {"gpt2", "llama3", "qwen2", "gemma", "cased"};
    enum { N = 1 << 19 };
    char *text = malloc(N);
    assert_non_null(text);
    for (int f = 0; (size_t)f < COUNT_OF(families); f++) {
        struct tokenizer *t = open_family(families[f]);
        for (size_t u = 0; u < COUNT_OF(units); u++) {
            struct token_list ids = {0};
            struct bytes out = {0};
            size_t n = 0, step = strlen(units[u]);
            for (; n + step <= N; n += step)
                memcpy(text + n, units[u], step);
            encode(t, text, n, 0, &ids);
            decode(t, &ids, false, &out);
            if (f == 0 && (out.n != n || memcmp(out.data, text, n) != 0))
                fail_msg("%s: half a megabyte of \"%s\" does not come back", families[f], units[u]);
            token_list_free(&ids);
            bytes_free(&out);
        }
        tokenizer_close(t);
    }
    free(text);
}

/* The bundled model's tokenizer gives every text back. */
static void test_bundled(void **state)
{
    (void)state;
    struct tokenizer *t = NULL;
    struct error err;
    if (tokenizer_open(&t, "weights/latte-12m/tokenizer.json", &err))
        fail_msg("%s", err.text);
    struct bytes strings = read_golden("strings", ".bin"), out = {0};
    struct cursor c = {(unsigned char *)strings.data, (unsigned char *)strings.data + strings.n};
    struct token_list ids = {0};
    for (uint32_t count = read_varint(&c); count; count--) {
        uint32_t n = read_varint(&c);
        encode(t, (const char *)c.at, n, TOKENIZER_ADD_SPECIAL, &ids);
        decode(t, &ids, false, &out);
        if (out.n != n || (n && memcmp(out.data, c.at, n) != 0))
            fail_msg("\"%.*s\" comes back as \"%s\"", (int)n, (const char *)c.at, out.data);
        c.at += n;
    }
    token_list_free(&ids);
    bytes_free(&out);
    bytes_free(&strings);
    tokenizer_close(t);
}

/* ---- looking up ---- */

static void check_piece(const struct tokenizer *t, const char *content, const char *piece)
{
    struct bytes out = {0};
    int32_t id = tokenizer_find(t, content, strlen(content));
    assert_true(id >= 0 && id < tokenizer_size(t));
    tokenizer_piece(t, id, &out);
    if (out.n != strlen(piece) || memcmp(out.data, piece, out.n) != 0)
        fail_msg("the piece of \"%s\" is \"%s\", expected \"%s\"", content, out.data, piece);
    bytes_free(&out);
}

static void test_lookups(void **state)
{
    (void)state;
    struct tokenizer *t = open_family("gpt2");
    struct bytes out = {0};
    check_piece(t, "\xC4\xA0the", " the");
    check_piece(t, "\xC4\x8A", "\n");
    check_piece(t, "\xC3\xA9", "\xE9"); /* byte E9, not the letter */
    check_piece(t, "<|endoftext|>", "<|endoftext|>");
    assert_int_equal(tokenizer_find(t, "no such token", 13), -1);
    assert_int_equal(tokenizer_find(t, "", 0), -1);
    int32_t end = tokenizer_find(t, "<|endoftext|>", 13);
    assert_int_equal(end, tokenizer_size(t) - 1);
    assert_true(tokenizer_is_special(t, end));
    assert_false(tokenizer_is_special(t, 0));
    assert_false(tokenizer_is_special(t, -1));
    assert_false(tokenizer_is_special(t, tokenizer_size(t)));
    tokenizer_piece(t, -1, &out);
    tokenizer_piece(t, tokenizer_size(t), &out);
    assert_int_equal(out.n, 0);
    assert_int_equal(strlen(tokenizer_fingerprint(t)), 32);
    tokenizer_close(t);

    t = open_family("llama2");
    check_piece(t, "<0x0A>", "\n");
    check_piece(t, "<0xE2>", "\xE2");
    check_piece(t, "\xE2\x96\x81the", " the");
    tokenizer_close(t);
    t = open_family("metaspace_legacy");
    check_piece(t, "\xE2\x96\x81the", " the");
    tokenizer_close(t);
    tokenizer_close(NULL);
}

static void test_no_file(void **state)
{
    (void)state;
    struct tokenizer *t = NULL;
    struct error err;
    assert_int_equal(tokenizer_open(&t, "tests/golden/tokenizer/none.json", &err),
                     STATUS_NOT_FOUND);
    assert_null(t);
    assert_non_null(strstr(err.text, "none.json"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_golden),           cmocka_unit_test(test_refused_files),
        cmocka_unit_test(test_refused_patterns), cmocka_unit_test(test_hostile_files),
        cmocka_unit_test(test_bad_text),         cmocka_unit_test(test_long_texts),
        cmocka_unit_test(test_bundled),          cmocka_unit_test(test_lookups),
        cmocka_unit_test(test_no_file),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
