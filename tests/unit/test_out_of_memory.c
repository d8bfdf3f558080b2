/* test_out_of_memory.c - constructors of weights/ with each of their allocations failing. */
#include "tests/unit/unit.h"

#include <stdio.h>
#include <string.h>

#include "tests/unit/fail_alloc.h"
#include "tests/unit/model_files.h"
#include "weights/checkpoint.h"
#include "weights/tokenizer.h"

static enum status open_checkpoint(void *context, struct error *err)
{
    struct checkpoint *c = NULL;
    enum status st = checkpoint_open(&c, context, NULL, NULL, err);
    assert_true(!st == !!c);
    if (c)
        assert_int_equal(strlen(c->fingerprint), 32);
    checkpoint_close(c);
    return st;
}

static void walk_model(const char *config_json, int n_shards)
{
    static const char generation[] = "{\"temperature\":0.5,\"eos_token_id\":[1,2]}";
    struct model_files_options options = {.n_shards = n_shards};
    char dir[100];
    assert_int_equal(test_dir_make(dir, sizeof(dir)), 0);
    assert_int_equal(model_files_write(dir, config_json, 1, &options), 0);
    test_file_write(dir, "generation_config.json", generation, strlen(generation));
    fail_alloc_walk(open_checkpoint, dir);
    test_dir_remove(dir);
}

/* One layer, so that the walk over every allocation stays short; a key nobody knows. */
static void test_checkpoint(void **state)
{
    (void)state;
    static const char json[] =
        "{\"vocab_size\":8,\"hidden_size\":4,\"num_hidden_layers\":1,\"intermediate_size\":4,"
        "\"num_attention_heads\":1,\"num_latents\":2,\"layer_types\":[\"macchiato\"],"
        "\"latent_input\":\"rglru\",\"norm\":\"rmsnorm\",\"mlp\":\"gated\",\"foo\":{\"a\":[1]}}";
    walk_model(json, 1);
    walk_model(json, 2);
}

static const char byte_level[] =
    "{\"version\":\"1.0\",\"added_tokens\":[{\"id\":3,\"content\":\"<s>\",\"single_word\":false,"
    "\"lstrip\":false,\"rstrip\":false,\"normalized\":false,\"special\":true}],"
    "\"normalizer\":{\"type\":\"NFC\"},\"pre_tokenizer\":{\"type\":\"Sequence\",\"pretokenizers\":["
    "{\"type\":\"Split\",\"pattern\":{\"Regex\":\" "
    "?\\\\p{L}+|[^\\\\p{L}]+\"},\"behavior\":\"Isolated\","
    "\"invert\":false},{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"trim_offsets\":true,"
    "\"use_regex\":false}]},\"post_processor\":null,\"decoder\":{\"type\":\"ByteLevel\","
    "\"add_prefix_space\":true,\"trim_offsets\":true,\"use_regex\":true},\"model\":{\"type\":"
    "\"BPE\","
    "\"dropout\":null,\"unk_token\":null,\"continuing_subword_prefix\":null,"
    "\"end_of_word_suffix\":null,\"fuse_unk\":false,\"byte_fallback\":false,"
    "\"ignore_merges\":false,\"vocab\":{\"a\":0,\"b\":1,\"ab\":2},\"merges\":[[\"a\",\"b\"]]}}";

static enum status open_tokenizer(void *context, struct error *err)
{
    struct tokenizer *t = NULL;
    enum status st = tokenizer_open(&t, context, err);
    assert_true(!st == !!t);
    tokenizer_close(t);
    return st;
}

/* Encoding and both ways of decoding: on failure the list and the buffer hold what they held. */
static enum status use_tokenizer(void *context, struct error *err)
{
    struct token_list list = {0};
    struct bytes out = {0};
    enum status st = tokenizer_encode(context, "abba <s>ab", 10, 0, &list, err);
    if (st)
        assert_int_equal(list.n, 0);
    else
        st = tokenizer_decode(context, list.ids, list.n, false, &out, err);
    token_list_free(&list);
    bytes_free(&out);
    return st;
}

static void test_tokenizer(void **state)
{
    (void)state;
    char dir[100], path[128];
    struct tokenizer *t;
    struct error err = {0};
    assert_int_equal(test_dir_make(dir, sizeof(dir)), 0);
    test_file_write(dir, "tokenizer.json", byte_level, strlen(byte_level));
    snprintf(path, sizeof(path), "%s/tokenizer.json", dir);
    if (tokenizer_open(&t, path, &err))
        fail_msg("%s", err.text);
    fail_alloc_walk(use_tokenizer, t);
    tokenizer_close(t);
    fail_alloc_walk(open_tokenizer, path);
    test_dir_remove(dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_checkpoint),
        cmocka_unit_test(test_tokenizer),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
