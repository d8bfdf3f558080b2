/* test_checkpoint.c - model directories, right and wrong. The right ones come from
 * model_files.c, which lists tensors on its own; the wrong ones are one change away. */
#include "tests/unit/unit.h"

#include <cjson/cJSON.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "tests/unit/model_files.h"
#include "weights/checkpoint.h"

static char dir[100]; /* of the test that runs */

static int make_dir(void **state)
{
    (void)state;
    return test_dir_make(dir, sizeof(dir));
}

static int remove_dir(void **state)
{
    (void)state;
    test_dir_remove(dir);
    return 0;
}

static const char *model_named(const char *name)
{
    for (size_t i = 0; i < n_test_models; i++)
        if (!strcmp(test_models[i].name, name))
            return test_models[i].config_json;
    fail_msg("no test model %s", name);
    return NULL;
}

static struct checkpoint *open_or_fail(const char *what)
{
    struct checkpoint *c = NULL;
    struct error err = {0};
    if (checkpoint_open(&c, dir, NULL, NULL, &err))
        fail_msg("%s: %s", what, err.text);
    return c;
}

static void write_config(const char *json)
{
    assert_int_equal(test_file_write(dir, "config.json", json, strlen(json)), 0);
}

/* base with the members of patch set or, where they are null, removed. Freed by the caller. */
static char *patched(const char *base, const char *patch)
{
    cJSON *root = cJSON_Parse(base), *change = cJSON_Parse(patch);
    if (!root || !change)
        fail_msg("not JSON: %s", patch);
    for (const cJSON *item = change->child; item; item = item->next) {
        cJSON_DeleteItemFromObjectCaseSensitive(root, item->string);
        if (!cJSON_IsNull(item))
            cJSON_AddItemToObject(root, item->string, cJSON_Duplicate(item, true));
    }
    char *text = cJSON_PrintUnformatted(root);
    assert_non_null(text);
    cJSON_Delete(root);
    cJSON_Delete(change);
    return text;
}

/* ---- good directories ---- */

static void compare_data(const struct checkpoint *c, const struct test_tensors *list)
{
    int64_t n_values = 0;
    assert_int_equal(safetensors_count(c->tensors), list->n);
    for (size_t i = 0; i < list->n; i++) {
        const struct tensor *t = safetensors_find(c->tensors, list->items[i].name);
        assert_non_null(t);
        assert_int_equal(t->n_bytes, list->items[i].n_bytes);
        assert_memory_equal(t->data, list->items[i].data, t->n_bytes);
        n_values += t->n_values;
    }
    assert_int_equal(c->n_parameters, n_values);
}

/* Every kind of model opens, with and without the optional tensors, in any dtype, whole or in
 * shards; sharding does not change the fingerprint, all else does. */
static void test_models_open(void **state)
{
    (void)state;
    static const char *const dtype_names[] = {"F32", "F16", "BF16"};
    char seen[128][33];
    size_t n_seen = 0;
    for (size_t i = 0; i < n_test_models; i++)
        for (int variant = 0; variant < 6; variant++) {
            const char *json = test_models[i].config_json;
            struct model_files_options options = {.dtype = dtype_names[variant % 3],
                                                  .biases = variant >= 3,
                                                  .qk_norms = variant >= 3};
            struct test_tensors list;
            assert_int_equal(test_tensors_make(&list, json, 7, &options), 0);
            write_config(json);
            assert_int_equal(test_tensors_write(&list, dir, 1), 0);
            struct checkpoint *c = open_or_fail(test_models[i].name);
            compare_data(c, &list);
            strcpy(seen[n_seen++], c->fingerprint);
            checkpoint_close(c);
            remove_dir(NULL);
            make_dir(NULL);
            write_config(json);
            assert_int_equal(test_tensors_write(&list, dir, 3), 0);
            c = open_or_fail(test_models[i].name);
            assert_string_equal(c->fingerprint, seen[n_seen - 1]);
            checkpoint_close(c);
            remove_dir(NULL);
            make_dir(NULL);
            test_tensors_free(&list);
        }
    for (size_t i = 0; i < n_seen; i++)
        for (size_t j = 0; j < i; j++)
            assert_string_not_equal(seen[i], seen[j]);
}

static void check_name(const struct tensor *t, const char *name)
{
    assert_non_null(t);
    assert_string_equal(t->name, name);
}

/* Each field points at the tensor of its name; fields a model does not use are NULL. */
static void test_binding(void **state)
{
    (void)state;
    struct model_files_options options = {.biases = true, .qk_norms = true};
    assert_int_equal(model_files_write(dir, model_named("gemma-macchiato"), 1, &options), 0);
    struct checkpoint *c = open_or_fail("gemma-macchiato");
    const struct layer_tensors *l = &c->layers[1];
    check_name(c->embed_tokens, "model.embed_tokens.weight");
    assert_ptr_equal(c->lm_head.weight, c->embed_tokens);
    assert_null(c->lm_head.bias);
    check_name(c->norm.weight, "model.norm.weight");
    assert_null(c->norm.bias);
    assert_null(c->score.weight);
    check_name(l->norm1.weight, "model.layers.1.norm1.weight");
    check_name(l->norm2.weight, "model.layers.1.norm2.weight");
    check_name(l->latent_q.weight, "model.layers.1.mix.latent_q.weight");
    check_name(l->latent_q.bias, "model.layers.1.mix.latent_q.bias");
    check_name(l->latent_k.weight, "model.layers.1.mix.latent_k.weight");
    check_name(l->v_proj.weight, "model.layers.1.mix.v_proj.weight");
    check_name(l->q_proj.bias, "model.layers.1.mix.q_proj.bias");
    check_name(l->k_proj.weight, "model.layers.1.mix.k_proj.weight");
    check_name(l->o_proj.bias, "model.layers.1.mix.o_proj.bias");
    check_name(l->q_norm, "model.layers.1.mix.q_norm.weight");
    check_name(l->k_norm, "model.layers.1.mix.k_norm.weight");
    check_name(l->rglru.input_gate.weight, "model.layers.1.mix.rglru.input_gate.weight");
    check_name(l->rglru.recurrence_gate.bias, "model.layers.1.mix.rglru.recurrence_gate.bias");
    check_name(l->rglru.lambda, "model.layers.1.mix.rglru.lambda");
    check_name(l->rglru_norm, "model.layers.1.mix.rglru_norm.weight");
    check_name(l->post_norm1, "model.layers.1.post_norm1.weight");
    check_name(l->post_norm2, "model.layers.1.post_norm2.weight");
    check_name(l->gate_proj.weight, "model.layers.1.mlp.gate_proj.weight");
    check_name(l->up_proj.weight, "model.layers.1.mlp.up_proj.weight");
    check_name(l->down_proj.bias, "model.layers.1.mlp.down_proj.bias");
    assert_null(l->rglru_backward.lambda);
    assert_null(l->conv.weight);
    assert_null(l->vapor_theta);
    checkpoint_close(c);
}

static void test_binding_of_others(void **state)
{
    (void)state;
    assert_int_equal(model_files_write(dir, model_named("classifier"), 1, NULL), 0);
    struct checkpoint *c = open_or_fail("classifier");
    check_name(c->layers[0].rglru_backward.lambda, "model.layers.0.mix.rglru_backward.lambda");
    check_name(c->score.weight, "score.weight");
    assert_null(c->lm_head.weight);
    assert_int_equal(c->config.num_labels, 3);
    assert_int_equal(c->config.pooling, POOLING_LAST);
    assert_true(c->config.bidirectional);
    checkpoint_close(c);
    remove_dir(NULL);
    make_dir(NULL);
    assert_int_equal(model_files_write(dir, model_named("mixed-layers"), 1, NULL), 0);
    c = open_or_fail("mixed-layers");
    check_name(c->layers[0].vapor_theta, "model.layers.0.mix.vapor.theta");
    assert_null(c->layers[1].vapor_theta);
    assert_null(c->layers[1].rglru.lambda);
    assert_null(c->layers[1].latent_q.weight);
    check_name(c->layers[1].q_proj.weight, "model.layers.1.mix.q_proj.weight");
    assert_int_equal(config_ring_rows(&c->config, 0), 4);
    assert_int_equal(config_ring_rows(&c->config, 1), 4096);
    checkpoint_close(c);
}

/* ---- config.json ---- */

static void test_defaults(void **state)
{
    (void)state;
    assert_int_equal(model_files_write(dir,
                                       "{\"vocab_size\":10,\"hidden_size\":8,"
                                       "\"num_hidden_layers\":1,\"intermediate_size\":4,"
                                       "\"num_attention_heads\":2,\"num_latents\":6,"
                                       "\"layer_type\":\"latte\",\"norm\":\"layernorm\","
                                       "\"mlp\":\"plain\",\"rope_scaling\":null}",
                                       1, NULL),
                     0);
    struct checkpoint *c = open_or_fail("defaults");
    const struct model_config *m = &c->config;
    assert_int_equal(m->head, HEAD_CAUSAL_LM);
    assert_int_equal(m->n_kv_heads, 2);
    assert_int_equal(m->head_dim, 4);
    assert_int_equal(config_latents_per_head(m), 3);
    assert_int_equal(m->latent_input, LATENT_INPUT_NONE);
    assert_int_equal(m->conv_kernel, 3);
    assert_int_equal(m->rglru_blocks, 1);
    assert_int_equal(m->sliding_window, 128);
    assert_true(m->attention_scale == 0.5);
    assert_true(m->attn_logit_softcapping == 0 && m->final_logit_softcapping == 0);
    assert_int_equal(m->position_embedding, POSITION_NONE);
    assert_int_equal(m->rope_scaling.type, ROPE_SCALING_NONE);
    assert_true(m->layers[0].rope_theta == 10000);
    assert_false(m->bidirectional || m->post_norms || m->tie_word_embeddings);
    assert_int_equal(m->norm, NORM_LAYER);
    assert_true(m->norm_eps == 1e-6 && m->norm_offset == 0 && m->final_norm);
    assert_int_equal(m->mlp, MLP_PLAIN);
    assert_int_equal(m->hidden_act, ACTIVATION_SILU);
    assert_true(m->embedding_scale == 1);
    assert_int_equal(m->max_position_embeddings, 4096);
    assert_int_equal(m->bos_token_id, -1);
    assert_int_equal(m->n_eos, 0);
    assert_int_equal(m->pooling, POOLING_MEAN);
    assert_int_equal(config_ring_rows(m, 0), 0);
    assert_null(c->ignored_keys);
    assert_true(isnan(c->generation.temperature) && isnan(c->generation.top_p));
    assert_int_equal(c->generation.top_k, -1);
    assert_int_equal(c->generation.max_new_tokens, -1);
    checkpoint_close(c);
}

static void test_values(void **state)
{
    (void)state;
    char *json = patched(
        model_named("gemma-macchiato"),
        "{\"rope_theta\":[10000,1e6],\"eos_token_id\":[3,5,3],\"bos_token_id\":2,"
        "\"norm_eps\":1e-5,\"rope_scaling\":{\"type\":\"linear\",\"factor\":4},"
        "\"torch_dtype\":\"bfloat16\",\"use_cache\":true,\"foo\":1,\"b\\\"ar\":[],\"bos\":null}");
    assert_int_equal(model_files_write(dir, json, 1, NULL), 0);
    struct checkpoint *c = open_or_fail("values");
    const struct model_config *m = &c->config;
    assert_true(m->layers[0].rope_theta == 10000 && m->layers[1].rope_theta == 1e6);
    assert_int_equal(m->n_eos, 2);
    assert_int_equal(m->eos_token_id[0], 3);
    assert_int_equal(m->eos_token_id[1], 5);
    assert_int_equal(m->bos_token_id, 2);
    assert_true(m->norm_eps == 1e-5 && m->norm_offset == 1 && m->embedding_scale == 5.65);
    assert_int_equal(m->rope_scaling.type, ROPE_SCALING_LINEAR);
    assert_true(m->rope_scaling.factor == 4);
    assert_true(m->attention_scale == 1 / sqrt(20.0));
    assert_true(m->attn_logit_softcapping == 50 && m->final_logit_softcapping == 30);
    assert_int_equal(m->hidden_act, ACTIVATION_GELU_TANH);
    assert_string_equal(c->ignored_keys, "\"foo\", \"b\\\"ar\"");
    checkpoint_close(c);
    free(json);
}

/* Changes to the "latte-rglru-swa++" model that make no valid configuration. */
static void test_config_errors(void **state)
{
    (void)state;
    static const struct {
        const char *patch, *field, *error;
    } table[] = {
        {"{\"vocab_size\":null}", "vocab_size", "this key is required"},
        {"{\"norm\":null}", "norm", "this key is required"},
        {"{\"mlp\":null}", "mlp", "this key is required"},
        {"{\"layer_type\":null}", "layer_type", "found neither"},
        {"{\"layer_types\":[\"latte\",\"latte\"]}", "layer_type", "found both"},
        {"{\"vocab_size\":\"61\"}", "vocab_size", "a whole number of 1 to 16777216, found \"61\""},
        {"{\"vocab_size\":0}", "vocab_size", "found 0"},
        {"{\"vocab_size\":1e18}", "vocab_size", "found 1e+18"},
        {"{\"hidden_size\":-32}", "hidden_size", "found -32"},
        {"{\"hidden_size\":32.5}", "hidden_size", "found 32.5"},
        {"{\"hidden_size\":[32]}", "hidden_size", "found an array of 1"},
        {"{\"hidden_size\":true}", "hidden_size", "found true"},
        {"{\"num_hidden_layers\":1000000000}", "num_hidden_layers", "1 to 1024"},
        {"{\"intermediate_size\":{}}", "intermediate_size", "found an object"},
        {"{\"num_attention_heads\":0}", "num_attention_heads", "found 0"},
        {"{\"num_attention_heads\":5}", "num_attention_heads", "a divisor of hidden_size (32)"},
        {"{\"num_key_value_heads\":3}", "num_key_value_heads",
         "a divisor of num_attention_heads (4), found 3"},
        {"{\"head_dim\":7}", "head_dim", "even number"},
        {"{\"num_latents\":18}", "num_latents", "a multiple of num_attention_heads (4), found 18"},
        {"{\"num_latents\":-4}", "num_latents", "found -4"},
        {"{\"num_latents\":0,\"layer_type\":\"latte\"}", "num_latents", "expected above 0"},
        {"{\"layer_type\":\"mamba\"}", "layer_type", "found \"mamba\""},
        {"{\"layer_type\":3}", "layer_type", "found 3"},
        {"{\"layer_type\":null,\"layer_types\":[\"latte\"]}", "layer_types",
         "expected 2 items, one a layer, found 1"},
        {"{\"layer_type\":null,\"layer_types\":[\"latte\",\"Latte\"]}", "layer_types",
         "found \"Latte\""},
        {"{\"layer_type\":null,\"layer_types\":\"latte\"}", "layer_types", "expected a list"},
        {"{\"layer_type\":null,\"layer_types\":[\"latte\",\"latte\",\"latte\"]}", "layer_types",
         "expected 2 items, one a layer, found 3"},
        {"{\"layer_type\":\"full_attention\"}", "num_latents", "all layers are"},
        {"{\"layer_type\":\"full_attention\",\"num_latents\":0}", "latent_input", "all layers are"},
        {"{\"layer_type\":\"full_attention\",\"num_latents\":0,\"latent_input\":\"none\","
         "\"position_embedding\":\"vapor\"}",
         "position_embedding", "has no use"},
        {"{\"latent_input\":\"lstm\"}", "latent_input",
         "one of \"none\", \"conv\", \"rglru\", found \"lstm\""},
        {"{\"conv_kernel\":0}", "conv_kernel", "1 to 64"},
        {"{\"rglru_blocks\":3}", "rglru_blocks", "a divisor of hidden_size (32), found 3"},
        {"{\"sliding_window\":0}", "sliding_window", "found 0"},
        {"{\"rope_theta\":0}", "rope_theta", "found 0"},
        {"{\"rope_theta\":\"1e4\"}", "rope_theta", "found \"1e4\""},
        {"{\"rope_theta\":[10000]}", "rope_theta", "one a layer, found 1"},
        {"{\"rope_theta\":[10000,-1]}", "rope_theta", "found -1"},
        {"{\"rope_scaling\":\"linear\"}", "rope_scaling", "expected an object"},
        {"{\"rope_scaling\":{}}", "rope_scaling.rope_type", "found nothing"},
        {"{\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":2}}", "rope_scaling.rope_type",
         "found \"yarn\""},
        {"{\"rope_scaling\":{\"rope_type\":\"linear\"}}", "rope_scaling.factor", "found nothing"},
        {"{\"rope_scaling\":{\"rope_type\":\"linear\",\"factor\":2,\"x\":1}}", "rope_scaling",
         "expected 2 keys for \"linear\", found 3"},
        {"{\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8,\"low_freq_factor\":4,"
         "\"high_freq_factor\":1,\"original_max_position_embeddings\":32}}",
         "rope_scaling", "low_freq_factor below high_freq_factor"},
        {"{\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8,\"low_freq_factor\":1,"
         "\"high_freq_factor\":4,\"original_max_position_embeddings\":32.5}}",
         "rope_scaling.original_max_position_embeddings", "found 32.5"},
        {"{\"query_pre_attn_scalar\":0}", "query_pre_attn_scalar", "found 0"},
        {"{\"attn_logit_softcapping\":-1}", "attn_logit_softcapping", "found -1"},
        {"{\"position_embedding\":\"alibi\"}", "position_embedding", "\"sinusoidal\", \"vapor\""},
        {"{\"bidirectional\":1}", "bidirectional", "expected true or false, found 1"},
        {"{\"bidirectional\":true}", "bidirectional", "LatteForCausalLM cannot"},
        {"{\"norm\":\"RMSNorm\"}", "norm", "found \"RMSNorm\""},
        {"{\"norm_eps\":0}", "norm_eps", "found 0"},
        {"{\"norm_eps\":\"1e-6\"}", "norm_eps", "found \"1e-6\""},
        {"{\"norm_offset\":1000}", "norm_offset", "found 1000"},
        {"{\"final_norm\":\"false\"}", "final_norm", "true or false"},
        {"{\"hidden_act\":\"relu\"}", "hidden_act", "found \"relu\""},
        {"{\"embedding_scale\":0}", "embedding_scale", "found 0"},
        {"{\"max_position_embeddings\":3e9}", "max_position_embeddings", "found 3000000000"},
        {"{\"model_type\":\"llama\"}", "model_type", "expected \"latte\", found \"llama\""},
        {"{\"architectures\":[]}", "architectures", "found an array of 0"},
        {"{\"architectures\":[\"GPT2LMHeadModel\"]}", "architectures", "found \"GPT2LMHeadModel\""},
        {"{\"eos_token_id\":61}", "eos_token_id", "below vocab_size, found 61"},
        {"{\"eos_token_id\":[0,-1]}", "eos_token_id", "found -1"},
        {"{\"eos_token_id\":[[0]]}", "eos_token_id", "found an array"},
        {"{\"eos_token_id\":[0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16]}", "eos_token_id",
         "at most 16 ids"},
        {"{\"bos_token_id\":\"<s>\"}", "bos_token_id", "found \"<s>\""},
        {"{\"pooling\":\"max\"}", "pooling", "found \"max\""},
        {"{\"num_labels\":0}", "num_labels", "found 0"},
        {"{\"id2label\":[\"a\"]}", "id2label", "expected an object"},
        {"{\"id2label\":{}}", "id2label", "found 0"},
        {"{\"id2label\":{\"0\":\"a\",\"2\":\"b\"}}", "id2label", "expected \"1\" and a name"},
        {"{\"id2label\":{\"0\":\"a\",\"1\":2}}", "id2label", "and a number"},
        {"{\"num_labels\":3,\"id2label\":{\"0\":\"a\",\"1\":\"b\"}}", "id2label",
         "expected 3 entries (num_labels), found 2"},
    };
    const char *base = model_named("latte-rglru-swa++");
    assert_int_equal(model_files_write(dir, base, 1, NULL), 0);
    checkpoint_close(open_or_fail("base"));
    for (size_t i = 0; i < COUNT_OF(table); i++) {
        struct checkpoint *c = NULL;
        struct error err = {0};
        char *json = patched(base, table[i].patch);
        write_config(json);
        if (checkpoint_open(&c, dir, NULL, NULL, &err) != STATUS_INVALID)
            fail_msg("accepted: %s", table[i].patch);
        assert_null(c);
        if (!strstr(err.text, table[i].error) || !strstr(err.text, "config.json: "))
            fail_msg("%s: got \"%s\", expected \"%s\"", table[i].patch, err.text, table[i].error);
        assert_string_equal(err.field, table[i].field);
        free(json);
    }
}

static void test_config_files(void **state)
{
    (void)state;
    static const struct {
        const char *text, *error;
    } table[] = {
        {"", "config.json: line 1, column 1: expected a value"},
        {"[]", "config.json: expected an object, found an array"},
        {"{\"vocab_size\":1,\"vocab_size\":2}", "duplicate key \"vocab_size\""},
        {"{\"vocab_size\":01}", "leading zero"},
        {"{\"vocab_size\":NaN}", "expected a value"},
        {"{\"norm_eps\":1e999}", "out of range"},
        {"{\"vocab_size\":\"\xff\"}", "invalid UTF-8"},
        {"[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]", "nested"},
    };
    struct checkpoint *c = NULL;
    struct error err = {0};
    assert_int_equal(checkpoint_open(&c, dir, NULL, NULL, &err), STATUS_NOT_FOUND);
    assert_non_null(strstr(err.text, "config.json: No such file"));
    for (size_t i = 0; i < COUNT_OF(table); i++) {
        write_config(table[i].text);
        assert_int_equal(checkpoint_open(&c, dir, NULL, NULL, &err), STATUS_INVALID);
        if (!strstr(err.text, table[i].error))
            fail_msg("%s: got \"%s\"", table[i].text, err.text);
    }
    size_t n = 5 << 20;
    char *large = malloc(n);
    memset(large, ' ', n);
    assert_int_equal(test_file_write(dir, "config.json", large, n), 0);
    free(large);
    assert_int_equal(checkpoint_open(&c, dir, NULL, NULL, &err), STATUS_TOO_LARGE);
    assert_null(c);
}

/* ---- tensors ---- */

static void expect_tensor_error(const char *name, const char *fragment)
{
    struct checkpoint *c = NULL;
    struct error err = {0};
    if (checkpoint_open(&c, dir, NULL, NULL, &err) != STATUS_INVALID)
        fail_msg("%s (%s): accepted", name, fragment);
    if (!strstr(err.text, name) || !strstr(err.text, fragment))
        fail_msg("got \"%s\", expected \"%s\" and \"%s\"", err.text, name, fragment);
    assert_string_equal(err.field, name);
    assert_null(c);
}

static bool is_optional(const char *name)
{
    size_t n = strlen(name);
    return strstr(name, "_norm.weight") && !strstr(name, "rglru_norm")
               ? true
               : n > 5 && !strcmp(name + n - 5, ".bias");
}

/* Each tensor in turn is left out, given another shape, a dimension more, another dtype. */
static void walk_tensors(const char *json)
{
    struct model_files_options options = {.biases = true, .qk_norms = true};
    struct test_tensors list, rest;
    write_config(json);
    assert_int_equal(test_tensors_make(&list, json, 1, &options), 0);
    for (size_t i = 0; i < list.n; i++) {
        struct test_tensor *t = &list.items[i], before = *t;
        assert_int_equal(test_tensors_make(&rest, json, 1, &options), 0);
        test_tensors_remove(&rest, t->name);
        assert_int_equal(test_tensors_write(&rest, dir, 1), 0);
        test_tensors_free(&rest);
        if (is_optional(t->name))
            checkpoint_close(open_or_fail(t->name));
        else
            expect_tensor_error(t->name, "is missing, expected one of shape [");
        t->shape[t->n_dims++] = 1;
        assert_int_equal(test_tensors_write(&list, dir, 1), 0);
        expect_tensor_error(t->name, ", 1]");
        *t = before;
        strcpy(t->dtype, "I32");
        assert_int_equal(test_tensors_write(&list, dir, 1), 0);
        expect_tensor_error(t->name, "expected dtype F32, F16 or BF16, found I32");
        *t = before;
    }
    test_tensors_free(&list);
}

static void test_tensor_errors(void **state)
{
    (void)state;
    walk_tensors(model_named("mixed-layers"));
    walk_tensors(model_named("classifier"));
    walk_tensors(model_named("latte"));
}

static void test_shapes(void **state)
{
    (void)state;
    const char *json = model_named("latte-rglru-swa++");
    struct test_tensors list;
    write_config(json);
    assert_int_equal(test_tensors_make(&list, json, 1, NULL), 0);
    struct test_tensor *t = test_tensors_find(&list, "model.layers.1.mix.latent_q.weight");
    t->shape[0] = 10; /* M = 4 latents and the window for 4 heads: 20 rows */
    t->shape[1] = 64;
    assert_int_equal(test_tensors_write(&list, dir, 1), 0);
    expect_tensor_error(t->name, "expected shape [20, 32], found [10, 64]");
    test_tensors_free(&list);
}

/* Tensors a configuration has no place for. */
static void test_extra(void **state)
{
    (void)state;
    static const struct {
        const char *model, *name;
    } table[] = {
        {"latte++", "model.layers.2.norm1.weight"},
        {"latte++", "model.layers.0.norm1.bias"},
        {"latte++", "model.norm.bias"},
        {"latte++", "lm_head.weight"},
        {"latte++", "model.layers.0.mix.q_proj.weight"},
        {"latte++", "model.layers.0.mix.conv.weight"},
        {"latte++", "score.weight"},
        {"latte++", "aaa"},
        {"latte-rglru++", "model.layers.0.mix.rglru_backward.lambda"},
        {"latte-rglru++", "model.layers.0.mix.vapor.theta"},
        {"rglru-swa++", "model.layers.0.mix.latent_k.weight"},
        {"transformer++", "model.layers.0.mix.rglru.lambda"},
        {"latte", "model.layers.0.mlp.gate_proj.weight"},
        {"latte", "model.layers.0.post_norm1.weight"},
        {"classifier", "lm_head.weight"},
        {"embedder", "model.norm.weight"},
    };
    for (size_t i = 0; i < COUNT_OF(table); i++) {
        const char *json = model_named(table[i].model);
        struct test_tensors list;
        write_config(json);
        assert_int_equal(test_tensors_make(&list, json, 1, NULL), 0);
        test_tensors_add(&list, table[i].name, "F32", (int64_t[8]){32}, 1, 0, 1);
        assert_int_equal(test_tensors_write(&list, dir, 1), 0);
        expect_tensor_error(table[i].name, "has no place in this configuration");
        test_tensors_free(&list);
    }
}

/* ---- generation_config.json ---- */

static void write_generation(const char *text)
{
    assert_int_equal(test_file_write(dir, "generation_config.json", text, strlen(text)), 0);
}

static void test_generation(void **state)
{
    (void)state;
    assert_int_equal(model_files_write(dir, model_named("latte++"), 1, NULL), 0);
    struct checkpoint *c = open_or_fail("without");
    char without[33];
    strcpy(without, c->fingerprint);
    checkpoint_close(c);
    write_generation("{\"temperature\":0.7,\"top_k\":40,\"top_p\":0.95,\"min_p\":0.05,"
                     "\"typical_p\":0.9,\"repetition_penalty\":1.1,\"max_new_tokens\":64,"
                     "\"eos_token_id\":[0,7],\"transformers_version\":\"4\",\"num_beams\":1}");
    c = open_or_fail("with");
    assert_true(c->generation.temperature == 0.7 && c->generation.top_p == 0.95);
    assert_true(c->generation.min_p == 0.05 && c->generation.typical_p == 0.9);
    assert_true(c->generation.repetition_penalty == 1.1);
    assert_int_equal(c->generation.top_k, 40);
    assert_int_equal(c->generation.max_new_tokens, 64);
    assert_int_equal(c->config.n_eos, 2);
    assert_int_equal(c->config.eos_token_id[1], 7);
    assert_string_equal(c->fingerprint, without);
    checkpoint_close(c);
    write_generation("{\"do_sample\":false,\"temperature\":1.5}");
    c = open_or_fail("greedy");
    assert_true(c->generation.temperature == 0);
    checkpoint_close(c);
}

static void test_generation_errors(void **state)
{
    (void)state;
    static const struct {
        const char *text, *error;
    } table[] = {
        {"", "generation_config.json: line 1"},
        {"[]", "expected an object"},
        {"{\"temperature\":-1}", "temperature: expected a number of 0 to 100, found -1"},
        {"{\"temperature\":\"0.5\"}", "found \"0.5\""},
        {"{\"top_p\":1.5}", "top_p: "},
        {"{\"min_p\":[]}", "min_p: "},
        {"{\"typical_p\":2}", "typical_p: "},
        {"{\"typical_p\":0}", "typical_p: "},
        {"{\"repetition_penalty\":0}", "repetition_penalty: "},
        {"{\"top_k\":1.5}", "top_k: expected a whole number of 0 or more"},
        {"{\"max_new_tokens\":0}", "max_new_tokens: expected a whole number above 0"},
        {"{\"eos_token_id\":99}", "eos_token_id: "},
        {"{\"do_sample\":1}", "do_sample: expected true or false"},
    };
    assert_int_equal(model_files_write(dir, model_named("latte++"), 1, NULL), 0);
    for (size_t i = 0; i < COUNT_OF(table); i++) {
        struct checkpoint *c = NULL;
        struct error err = {0};
        write_generation(table[i].text);
        assert_int_equal(checkpoint_open(&c, dir, NULL, NULL, &err), STATUS_INVALID);
        if (!strstr(err.text, table[i].error))
            fail_msg("%s: got \"%s\"", table[i].text, err.text);
    }
}

/* ---- fingerprint ---- */

static void fingerprint_of(char out[33], const char *json)
{
    write_config(json);
    struct checkpoint *c = open_or_fail(json);
    strcpy(out, c->fingerprint);
    checkpoint_close(c);
}

/* The byte layout that fingerprint.c documents, spelled out for one small model. */
static void test_fingerprint_layout(void **state)
{
    (void)state;
    static const char json[] =
        "{\"vocab_size\":3,\"hidden_size\":2,\"num_hidden_layers\":1,\"intermediate_size\":1,"
        "\"num_attention_heads\":1,\"num_latents\":1,\"layer_type\":\"latte\",\"norm\":\"rmsnorm\","
        "\"mlp\":\"plain\",\"tie_word_embeddings\":true,\"final_norm\":false}";
    static const char head[] =
        "latte fingerprint 1\nhead=0\nvocab_size=3\nhidden_size=2\nnum_hidden_layers=1\n"
        "intermediate_size=1\nnum_attention_heads=1\nnum_key_value_heads=1\nhead_dim=2\n"
        "num_latents=1\nlatent_input=none\nattn_logit_softcapping=0\nfinal_logit_softcapping=0\n"
        "position_embedding=none\nbidirectional=0\nnorm=rmsnorm\nnorm_eps=1e-06\nnorm_offset=0\n"
        "final_norm=0\nmlp=plain\nhidden_act=silu\npost_norms=0\nembedding_scale=1\n"
        "tie_word_embeddings=1\nlayer=latte\n";
    static const struct {
        const char *name, *line;
    } tensors[] = {
        {"model.embed_tokens.weight", "model.embed_tokens.weight BF16 [3,2]\n"},
        {"model.layers.0.mix.latent_k.weight", "model.layers.0.mix.latent_k.weight BF16 [1,2]\n"},
        {"model.layers.0.mix.latent_q.weight", "model.layers.0.mix.latent_q.weight BF16 [1,2]\n"},
        {"model.layers.0.mix.o_proj.weight", "model.layers.0.mix.o_proj.weight BF16 [2,2]\n"},
        {"model.layers.0.mix.v_proj.weight", "model.layers.0.mix.v_proj.weight BF16 [2,2]\n"},
        {"model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.down_proj.weight BF16 [2,1]\n"},
        {"model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight BF16 [1,2]\n"},
        {"model.layers.0.norm1.weight", "model.layers.0.norm1.weight BF16 [2]\n"},
        {"model.layers.0.norm2.weight", "model.layers.0.norm2.weight BF16 [2]\n"},
    };
    struct model_files_options options = {.dtype = "BF16"};
    struct test_tensors list;
    char expected[33], got[33], all[4096];
    size_t n = strlen(head);
    memcpy(all, head, n);
    assert_int_equal(test_tensors_make(&list, json, 1, &options), 0);
    assert_int_equal(list.n, COUNT_OF(tensors));
    for (size_t i = 0; i < COUNT_OF(tensors); i++) {
        const struct test_tensor *t = test_tensors_find(&list, tensors[i].name);
        assert_non_null(t);
        n += (size_t)sprintf(all + n, "%s", tensors[i].line);
        memcpy(all + n, t->data, t->n_bytes);
        n += t->n_bytes;
    }
    XXH128_hash_t hash = XXH3_128bits(all, n);
    snprintf(expected, sizeof(expected), "%016llx%016llx", (unsigned long long)hash.high64,
             (unsigned long long)hash.low64);
    assert_int_equal(test_tensors_write(&list, dir, 1), 0);
    test_tensors_free(&list);
    fingerprint_of(got, json);
    assert_string_equal(got, expected);
}

/* What must and what must not change it. */
static void test_fingerprint_changes(void **state)
{
    (void)state;
    static const struct {
        const char *patch;
        bool same;
    } table[] = {
        {"{\"torch_dtype\":\"float32\",\"anything\":[1]}", true},
        {"{\"norm_eps\":1e-6,\"rope_theta\":10000,\"norm_offset\":0.0}", true},
        {"{\"rope_theta\":[10000,10000]}", true},
        {"{\"layer_type\":null,\"layer_types\":[\"macchiato\",\"macchiato\"]}", true},
        {"{\"eos_token_id\":5,\"bos_token_id\":1}", true},
        {"{\"conv_kernel\":5,\"max_position_embeddings\":99}", true},
        {"{\"num_key_value_heads\":4,\"head_dim\":8}", true},
        {"{\"position_embedding\":\"rope\"}", true},
        {"{\"norm_eps\":1e-5}", false},
        {"{\"norm_offset\":1}", false},
        {"{\"rope_theta\":20000}", false},
        {"{\"rope_theta\":[10000,20000]}", false},
        {"{\"rope_scaling\":{\"type\":\"linear\",\"factor\":2}}", false},
        {"{\"sliding_window\":6}", false},
        {"{\"hidden_act\":\"gelu\"}", false},
        {"{\"embedding_scale\":2}", false},
        {"{\"query_pre_attn_scalar\":9}", false},
        {"{\"attn_logit_softcapping\":9}", false},
        {"{\"final_logit_softcapping\":9}", false},
        {"{\"position_embedding\":\"sinusoidal\"}", false},
    };
    const char *json = model_named("latte-rglru-swa++");
    char first[33], other[33];
    assert_int_equal(model_files_write(dir, json, 1, NULL), 0);
    fingerprint_of(first, json);
    for (size_t i = 0; i < COUNT_OF(table); i++) {
        char *changed = patched(json, table[i].patch);
        fingerprint_of(other, changed);
        if (table[i].same != !strcmp(first, other))
            fail_msg("%s: expected %s fingerprint", table[i].patch,
                     table[i].same ? "the same" : "another");
        free(changed);
    }
}

/* One bit of any tensor changes it. */
static void test_fingerprint_of_data(void **state)
{
    (void)state;
    const char *json = model_named("latte++");
    struct test_tensors list;
    char first[33], other[33];
    assert_int_equal(model_files_write(dir, json, 1, NULL), 0);
    fingerprint_of(first, json);
    assert_int_equal(test_tensors_make(&list, json, 1, NULL), 0);
    for (size_t i = 0; i < list.n; i++) {
        unsigned char *last = (unsigned char *)list.items[i].data + list.items[i].n_bytes - 1;
        *last ^= 1;
        assert_int_equal(test_tensors_write(&list, dir, 1), 0);
        fingerprint_of(other, json);
        assert_string_not_equal(first, other);
        *last ^= 1;
    }
    test_tensors_free(&list);
}

struct watched {
    uint64_t done, total;
    int calls;
};

static void watch(void *context, uint64_t done, uint64_t total)
{
    struct watched *w = context;
    assert_true(done > w->done && done <= total);
    *w = (struct watched){done, total, w->calls + 1};
}

static void test_progress(void **state)
{
    (void)state;
    struct watched w = {0};
    struct checkpoint *c = NULL;
    struct error err = {0};
    assert_int_equal(model_files_write(dir, model_named("latte++"), 1, NULL), 0);
    assert_int_equal(checkpoint_open(&c, dir, watch, &w, &err), STATUS_OK);
    assert_true(w.calls > 1);
    assert_int_equal(w.total, safetensors_n_bytes(c->tensors));
    assert_int_equal(w.done, w.total);
    checkpoint_close(c);
    checkpoint_close(NULL);
}

/* ---- mutations ---- */

/* Bytes of config.json changed at random: opened or refused with a reason, never a crash. */
static void test_mutations(void **state)
{
    (void)state;
    static const char interesting[] = "{}[],:\"0123456789-eE.\\u \xff nulltruefalse";
    enum { ROUNDS = 3000 };
    uint32_t seed = 88172645u;
    const char *json = model_named("mixed-layers");
    size_t n = strlen(json);
    char *copy = malloc(n + 1);
    assert_int_equal(model_files_write(dir, json, 1, NULL), 0);
    for (int round = 0; round < ROUNDS; round++) {
        memcpy(copy, json, n + 1);
        for (uint32_t k = test_random(&seed) % 3 + 1; k; k--)
            copy[test_random(&seed) % n] =
                interesting[test_random(&seed) % (sizeof(interesting) - 1)];
        size_t length = test_random(&seed) % 8 ? n : test_random(&seed) % n;
        assert_int_equal(test_file_write(dir, "config.json", copy, length), 0);
        struct checkpoint *c = NULL;
        struct error err = {0};
        enum status st = checkpoint_open(&c, dir, NULL, NULL, &err);
        if (st)
            assert_true(st == STATUS_INVALID && err.text[0] && !c);
        checkpoint_close(c);
    }
    free(copy);
}

#define IN_DIR(test) cmocka_unit_test_setup_teardown(test, make_dir, remove_dir)

int main(void)
{
    const struct CMUnitTest tests[] = {
        IN_DIR(test_models_open),
        IN_DIR(test_binding),
        IN_DIR(test_binding_of_others),
        IN_DIR(test_defaults),
        IN_DIR(test_values),
        IN_DIR(test_config_errors),
        IN_DIR(test_config_files),
        IN_DIR(test_tensor_errors),
        IN_DIR(test_shapes),
        IN_DIR(test_extra),
        IN_DIR(test_generation),
        IN_DIR(test_generation_errors),
        IN_DIR(test_fingerprint_layout),
        IN_DIR(test_fingerprint_changes),
        IN_DIR(test_fingerprint_of_data),
        IN_DIR(test_progress),
        IN_DIR(test_mutations),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
