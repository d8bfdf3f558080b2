/* fuzz_tokenizer.c - any bytes as tokenizer.json; what is accepted encodes and decodes. */
#include <string.h>

#include "tests/fuzz/fuzz.h"
#include "weights/tokenizer.h"

static const char sample[] = "Hello  w\xc3\xb6rld, it's 12345\n\t\xe2\x98\x95 <s>\xf0\x9f\x98\x80";

/* The incremental decoder must say what the whole one says. */
static void decode_both_ways(const struct tokenizer *t, const struct token_list *list)
{
    struct bytes whole = {0}, pieces = {0};
    struct error err = {0};
    struct detokenizer d;
    if (tokenizer_decode(t, list->ids, list->n, false, &whole, &err))
        fuzz_expect_reason(&err);
    detokenizer_init(&d, t, false);
    for (size_t i = 0; i < list->n; i++)
        detokenizer_push(&d, list->ids[i], &pieces);
    detokenizer_finish(&d, &pieces);
    CHECK(whole.n == pieces.n && (!whole.n || !memcmp(whole.data, pieces.data, whole.n)));
    bytes_free(&whole);
    bytes_free(&pieces);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    struct tokenizer *t = NULL;
    struct token_list list = {0};
    struct error err = {0};
    if (tokenizer_open(&t, fuzz_file("tokenizer.json", data, n), &err)) {
        fuzz_expect_reason(&err);
        return 0;
    }
    if (tokenizer_encode(t, sample, strlen(sample), TOKENIZER_ADD_SPECIAL, &list, &err))
        fuzz_expect_reason(&err);
    for (size_t i = 0; i < list.n; i++)
        CHECK(list.ids[i] >= 0 && list.ids[i] < tokenizer_size(t));
    decode_both_ways(t, &list);
    token_list_free(&list);
    tokenizer_close(t);
    return 0;
}
