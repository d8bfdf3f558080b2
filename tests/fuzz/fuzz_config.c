/* fuzz_config.c - any bytes as config.json; what is accepted, as generation_config.json too. */
#include "tests/fuzz/fuzz.h"
#include "weights/config.h"
#include "weights/generation.h"

/* Relations that the engine builds on without looking again. */
static void check_promises(const struct model_config *c)
{
    CHECK(c->n_layers >= 1 && c->layers);
    CHECK(c->n_heads % c->n_kv_heads == 0 && c->n_latents % c->n_heads == 0);
    CHECK(c->latent_input != LATENT_INPUT_RGLRU || c->hidden_size % c->rglru_blocks == 0);
    CHECK(c->attention_scale > 0 && c->norm_eps > 0);
    CHECK(c->n_eos >= 0 && c->n_eos <= MODEL_MAX_EOS);
    for (int i = 0; i < c->n_layers; i++) {
        CHECK(c->layers[i].type != LAYER_LATTE || c->n_latents > 0);
        CHECK(c->layers[i].type == LAYER_LATTE || c->head_dim % 2 == 0);
        CHECK(c->layers[i].rope_theta >= 1);
        CHECK(config_ring_rows(c, i) >= 0);
    }
}

static void read_more(struct model_config *c, const char *path)
{
    struct generation_defaults g;
    struct bytes text = {0};
    struct error err = {0};
    config_canonical(c, &text);
    CHECK(text.n > 0 || text.failed);
    bytes_free(&text);
    if (generation_read(&g, c, path, &err))
        fuzz_expect_reason(&err);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    struct model_config config = {0};
    struct bytes ignored = {0};
    struct error err = {0};
    const char *path = fuzz_file("config.json", data, n);
    if (config_read(&config, &ignored, path, &err)) {
        fuzz_expect_reason(&err);
    } else {
        check_promises(&config);
        read_more(&config, path);
    }
    config_free(&config);
    bytes_free(&ignored);
    return 0;
}
