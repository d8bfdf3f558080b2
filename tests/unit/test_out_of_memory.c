/* test_out_of_memory.c - constructors of weights/ with each of their allocations failing. */
#include "tests/unit/unit.h"

#include <string.h>

#include "tests/unit/fail_alloc.h"
#include "tests/unit/model_files.h"
#include "weights/checkpoint.h"

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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_checkpoint),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
