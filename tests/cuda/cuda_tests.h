/* cuda_tests.h - what the tests of whole models on a GPU share: small models whose heads are as
 * wide as those of real ones, so that the fused passes take them (the golden models' heads of 8
 * values are below what those need), and skipping where there is no device.
 *
 * Threads: one. Memory: none kept. Errors: end the cmocka test with a sentence.
 */
#ifndef LATTE_TESTS_CUDA_TESTS_H
#define LATTE_TESTS_CUDA_TESTS_H

#include <string.h>

#include "tests/unit/model_files.h"
#include "tests/unit/model_run.h"

#define WIDE_SIZES                                                                                 \
    "{\"model_type\":\"latte\",\"architectures\":[\"LatteForCausalLM\"],"                          \
    "\"num_hidden_layers\":2,\"num_attention_heads\":2,\"eos_token_id\":0,"                        \
    "\"tie_word_embeddings\":true,"

static const struct test_model wide_models[] = {
    /* the reference model of LATTE.md in small: d = 96, M = 16 */
    {"wide-macchiato",
     WIDE_SIZES "\"vocab_size\":509,\"hidden_size\":192,\"intermediate_size\":256,"
                "\"norm\":\"rmsnorm\",\"mlp\":\"gated\",\"num_latents\":32,"
                "\"layer_type\":\"macchiato\",\"sliding_window\":24,"
                "\"latent_input\":\"rglru\",\"rglru_blocks\":2}"},
    {"wide-gemma",
     WIDE_SIZES "\"vocab_size\":384,\"hidden_size\":128,\"intermediate_size\":192,"
                "\"norm\":\"rmsnorm\",\"mlp\":\"gated\",\"num_latents\":32,\"head_dim\":256,"
                "\"num_key_value_heads\":1,\"layer_type\":\"macchiato\",\"sliding_window\":16,"
                "\"latent_input\":\"rglru\",\"rglru_blocks\":2,\"post_norms\":true,"
                "\"embedding_scale\":11.3,\"norm_offset\":1.0,\"query_pre_attn_scalar\":256,"
                "\"attn_logit_softcapping\":50.0,\"final_logit_softcapping\":30.0,"
                "\"hidden_act\":\"gelu_tanh\",\"position_embedding\":\"rope\"}"},
    /* a window too long for the fused mixing: factors of the latents' logits are a pass */
    {"wide-gemma-long",
     WIDE_SIZES "\"vocab_size\":384,\"hidden_size\":128,\"intermediate_size\":192,"
                "\"norm\":\"rmsnorm\",\"mlp\":\"gated\",\"num_latents\":32,\"head_dim\":256,"
                "\"num_key_value_heads\":1,\"layer_type\":\"macchiato\",\"sliding_window\":1100,"
                "\"latent_input\":\"rglru\",\"rglru_blocks\":2,\"post_norms\":true,"
                "\"hidden_act\":\"gelu_tanh\",\"position_embedding\":\"rope\"}"},
    {"wide-transformer",
     WIDE_SIZES "\"vocab_size\":256,\"hidden_size\":128,\"intermediate_size\":192,"
                "\"norm\":\"rmsnorm\",\"mlp\":\"gated\",\"layer_type\":\"full_attention\","
                "\"position_embedding\":\"rope\",\"max_position_embeddings\":512}"},
    {"wide-latte-conv",
     WIDE_SIZES "\"vocab_size\":256,\"hidden_size\":128,\"intermediate_size\":192,"
                "\"norm\":\"layernorm\",\"mlp\":\"plain\",\"hidden_act\":\"gelu\","
                "\"num_latents\":32,\"layer_type\":\"latte\",\"latent_input\":\"conv\"}"},
    /* the reference model of weights/README.md but for its depth: a shape of cluster.cuh */
    {"wide-clusters",
     "{\"model_type\":\"latte\",\"architectures\":[\"LatteForCausalLM\"],"
     "\"num_hidden_layers\":2,\"num_attention_heads\":8,\"eos_token_id\":0,"
     "\"tie_word_embeddings\":true,\"vocab_size\":509,\"hidden_size\":768,"
     "\"intermediate_size\":3072,\"norm\":\"rmsnorm\",\"mlp\":\"gated\",\"num_latents\":128,"
     "\"layer_type\":\"macchiato\",\"sliding_window\":40,"
     "\"latent_input\":\"rglru\",\"rglru_blocks\":8}"},
};
enum { N_WIDE_MODELS = sizeof(wide_models) / sizeof(*wide_models) };

/* Write a model to a fresh directory; test_dir_remove takes it away. */
static inline void cuda_model_make(const struct test_model *model, uint64_t seed, char *dir,
                                   size_t n)
{
    const struct model_files_options files = {.dtype = "BF16"};
    if (test_dir_make(dir, n) || model_files_write(dir, model->config_json, seed, &files))
        fail_msg("%s: the model could not be written", model->name);
}

static inline void wide_model_make(int i, char *dir, size_t n)
{
    cuda_model_make(&wide_models[i], 90 + (uint64_t)i, dir, n);
}

/* For what takes thousands of steps: the first of them, on an emulated device one of the smallest
 * models of the same kind. */
static inline const struct test_model *busy_model(void)
{
    for (size_t i = 0; i < n_test_models && run_emulated(); i++)
        if (!strcmp(test_models[i].name, "latte-rglru-swa++"))
            return &test_models[i];
    return &wide_models[0];
}

/* Call f with each of them; on an emulated device, which takes minutes for them all, with the
 * first n_emulated alone. */
static inline void wide_models_each(int n_emulated, void (*f)(const char *name, const char *dir))
{
    const int n = run_emulated() ? n_emulated : (int)N_WIDE_MODELS;
    for (int i = 0; i < n; i++) {
        char dir[200];
        wide_model_make(i, dir, sizeof(dir));
        f(wide_models[i].name, dir);
        test_dir_remove(dir);
    }
}

static inline void test_no_device(void **state)
{
    (void)state;
    print_message("SKIPPED: no CUDA device\n");
    skip();
}

/* Run the tests, or skip aloud. */
#define RUN_CUDA_TESTS(tests)                                                                      \
    do {                                                                                           \
        const struct CMUnitTest none[] = {cmocka_unit_test(test_no_device)};                       \
        return backend_cuda_count() ? cmocka_run_group_tests(tests, NULL, NULL)                    \
                                    : cmocka_run_group_tests(none, NULL, NULL);                    \
    } while (0)

#endif
