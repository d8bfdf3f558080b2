/* checkpoint.c - see checkpoint.h
 *
 * Binding asks for every tensor the configuration needs, by name and shape; what the files
 * hold beyond that was asked for by nobody and is an error too.
 */
#include "weights/checkpoint.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/bytes.h"
#include "engine/base/file.h"
#include "weights/config.h"
#include "weights/fingerprint.h"
#include "weights/generation.h"

enum { NAME_BYTES = 128, SHAPE_BYTES = 200 };

enum presence { REQUIRED, OPTIONAL };

struct binder {
    const struct model_config *config;
    const struct safetensors *tensors;
    const char *dir; /* for error texts */
    bool *taken;     /* [safetensors_count], which tensors were asked for */
    char prefix[32]; /* "model.layers.N.", or empty */
    struct error *err;
    enum status status; /* the first failure; later calls do nothing */
};

/* Sizes of a tensor, outermost first; ends at the first 0. */
struct shape {
    int64_t size[4];
};

static int count_dims(const struct shape *s)
{
    int n = 0;
    while (n < 3 && s->size[n])
        n++;
    return n;
}

static const char *show_shape(char out[SHAPE_BYTES], const int64_t *sizes, int n)
{
    size_t at = (size_t)snprintf(out, SHAPE_BYTES, "[");
    for (int i = 0; i < n && at < SHAPE_BYTES; i++)
        at += (size_t)snprintf(out + at, SHAPE_BYTES - at, "%s%lld", i ? ", " : "",
                               (long long)sizes[i]);
    if (at < SHAPE_BYTES)
        snprintf(out + at, SHAPE_BYTES - at, "]");
    return out;
}

static void check_tensor(struct binder *b, const struct tensor *t, const struct shape *shape)
{
    char expected[SHAPE_BYTES], found[SHAPE_BYTES];
    int n = count_dims(shape);
    if (t->n_dims != n || memcmp(t->shape, shape->size, (size_t)n * sizeof(*t->shape)))
        b->status = fail_field(
            b->err, STATUS_INVALID, t->name, "%s: tensor %s: expected shape %s, found %s", t->file,
            t->name, show_shape(expected, shape->size, n), show_shape(found, t->shape, t->n_dims));
    else if (t->dtype == DTYPE_OTHER)
        b->status = fail_field(b->err, STATUS_INVALID, t->name,
                               "%s: tensor %s: expected dtype F32, F16 or BF16, found %s", t->file,
                               t->name, t->dtype_name);
}

/* The tensor PREFIX NAME SUFFIX, or NULL. */
static const struct tensor *bind(struct binder *b, const char *name, const char *suffix,
                                 enum presence presence, struct shape shape)
{
    char full[NAME_BYTES], expected[SHAPE_BYTES];
    if (b->status)
        return NULL;
    int n = snprintf(full, sizeof(full), "%s%s%s", b->prefix, name, suffix);
    CHECK(n > 0 && n < NAME_BYTES);
    const struct tensor *t = safetensors_find(b->tensors, full);
    if (!t) {
        if (presence == REQUIRED)
            b->status = fail_field(b->err, STATUS_INVALID, full,
                                   "%s: tensor %s is missing, expected one of shape %s", b->dir,
                                   full, show_shape(expected, shape.size, count_dims(&shape)));
        return NULL;
    }
    b->taken[t - safetensors_get(b->tensors, 0)] = true;
    check_tensor(b, t, &shape);
    return t;
}

static const struct tensor *bind_vector(struct binder *b, const char *name, int64_t n)
{
    return bind(b, name, "", REQUIRED, (struct shape){{n}});
}

static struct weight bind_linear(struct binder *b, const char *name, int64_t out, int64_t in)
{
    return (struct weight){
        .weight = bind(b, name, ".weight", REQUIRED, (struct shape){{out, in}}),
        .bias = bind(b, name, ".bias", OPTIONAL, (struct shape){{out}}),
    };
}

/* RMSNorm has no bias: one in the file is an extra tensor. */
static struct weight bind_norm(struct binder *b, const char *name)
{
    const struct shape shape = {{b->config->hidden_size}};
    struct weight w = {.weight = bind(b, name, ".weight", REQUIRED, shape)};
    if (b->config->norm == NORM_LAYER)
        w.bias = bind(b, name, ".bias", OPTIONAL, shape);
    return w;
}

static struct weight bind_gate(struct binder *b, const char *unit, const char *gate)
{
    char name[NAME_BYTES];
    int64_t D = b->config->hidden_size, n_blocks = b->config->rglru_blocks;
    snprintf(name, sizeof(name), "mix.%s.%s", unit, gate);
    return (struct weight){
        .weight = bind(b, name, ".weight", REQUIRED,
                       (struct shape){{n_blocks, D / n_blocks, D / n_blocks}}),
        .bias = bind(b, name, ".bias", OPTIONAL, (struct shape){{D}}),
    };
}

static struct rglru_tensors bind_rglru(struct binder *b, const char *unit)
{
    char lambda[NAME_BYTES];
    snprintf(lambda, sizeof(lambda), "mix.%s.lambda", unit);
    return (struct rglru_tensors){
        .input_gate = bind_gate(b, unit, "input_gate"),
        .recurrence_gate = bind_gate(b, unit, "recurrence_gate"),
        .lambda = bind_vector(b, lambda, b->config->hidden_size),
    };
}

static void bind_latent_input(struct binder *b, struct layer_tensors *l)
{
    const struct model_config *c = b->config;
    const struct shape taps = {{c->hidden_size, c->conv_kernel}}, width = {{c->hidden_size}};
    if (c->latent_input == LATENT_INPUT_CONV) {
        l->conv.weight = bind(b, "mix.conv", ".weight", REQUIRED, taps);
        l->conv.bias = bind(b, "mix.conv", ".bias", OPTIONAL, width);
    } else if (c->latent_input == LATENT_INPUT_RGLRU) {
        l->rglru = bind_rglru(b, "rglru");
        if (c->bidirectional)
            l->rglru_backward = bind_rglru(b, "rglru_backward");
        l->rglru_norm = bind_vector(b, "mix.rglru_norm.weight", c->hidden_size);
    }
}

static void bind_mix(struct binder *b, struct layer_tensors *l, enum layer_type type)
{
    const struct model_config *c = b->config;
    const int64_t D = c->hidden_size, H = c->n_heads, KV = c->n_kv_heads, d = c->head_dim;
    const struct shape head = {{d}};
    bool window = type != LAYER_LATTE;
    if (type != LAYER_FULL_ATTENTION) {
        bind_latent_input(b, l);
        if (c->n_latents) {
            l->latent_q = bind_linear(b, "mix.latent_q", c->n_latents + (window ? H : 0), D);
            l->latent_k = bind_linear(b, "mix.latent_k", c->n_latents, D);
        }
        if (c->position_embedding == POSITION_VAPOR)
            l->vapor_theta = bind(b, "mix.vapor.theta", "", REQUIRED, (struct shape){{H, d / 2}});
    }
    if (window) {
        l->q_proj = bind_linear(b, "mix.q_proj", H * d, D);
        l->k_proj = bind_linear(b, "mix.k_proj", KV * d, D);
        l->q_norm = bind(b, "mix.q_norm", ".weight", OPTIONAL, head);
        l->k_norm = bind(b, "mix.k_norm", ".weight", OPTIONAL, head);
    }
    l->v_proj = bind_linear(b, "mix.v_proj", KV * d, D);
    l->o_proj = bind_linear(b, "mix.o_proj", D, H * d);
}

static void bind_layer(struct binder *b, struct layer_tensors *l, int layer)
{
    const struct model_config *c = b->config;
    const int64_t D = c->hidden_size, F = c->intermediate_size;
    snprintf(b->prefix, sizeof(b->prefix), "model.layers.%d.", layer);
    l->norm1 = bind_norm(b, "norm1");
    bind_mix(b, l, c->layers[layer].type);
    l->norm2 = bind_norm(b, "norm2");
    if (c->post_norms) {
        l->post_norm1 = bind_vector(b, "post_norm1.weight", D);
        l->post_norm2 = bind_vector(b, "post_norm2.weight", D);
    }
    if (c->mlp == MLP_GATED)
        l->gate_proj = bind_linear(b, "mlp.gate_proj", F, D);
    l->up_proj = bind_linear(b, "mlp.up_proj", F, D);
    l->down_proj = bind_linear(b, "mlp.down_proj", D, F);
    b->prefix[0] = '\0';
}

static void bind_heads(struct binder *b, struct checkpoint *out)
{
    const struct model_config *c = b->config;
    if (c->final_norm)
        out->norm = bind_norm(b, "model.norm");
    if (c->head == HEAD_SEQUENCE_CLASSIFICATION)
        out->score = bind_linear(b, "score", c->num_labels, c->hidden_size);
    if (c->head != HEAD_CAUSAL_LM)
        return;
    if (c->tie_word_embeddings)
        out->lm_head.weight = out->embed_tokens;
    else
        out->lm_head = bind_linear(b, "lm_head", c->vocab_size, c->hidden_size);
}

static void refuse_rest(struct binder *b)
{
    for (size_t i = 0; !b->status && i < safetensors_count(b->tensors); i++) {
        const struct tensor *t = safetensors_get(b->tensors, i);
        if (!b->taken[i])
            b->status =
                fail_field(b->err, STATUS_INVALID, t->name,
                           "%s: tensor %s has no place in this configuration", t->file, t->name);
    }
}

static enum status bind_tensors(struct checkpoint *c, const char *dir, struct error *err)
{
    struct binder b = {.config = &c->config, .tensors = c->tensors, .dir = dir, .err = err};
    b.taken = calloc(safetensors_count(c->tensors), sizeof(*b.taken));
    c->layers = calloc((size_t)c->config.n_layers, sizeof(*c->layers));
    if (!b.taken || !c->layers) {
        free(b.taken);
        return fail(err, STATUS_NOMEM, "out of memory");
    }
    c->embed_tokens = bind(&b, "model.embed_tokens", ".weight", REQUIRED,
                           (struct shape){{c->config.vocab_size, c->config.hidden_size}});
    for (int i = 0; !b.status && i < c->config.n_layers; i++)
        bind_layer(&b, &c->layers[i], i);
    bind_heads(&b, c);
    refuse_rest(&b);
    free(b.taken);
    for (size_t i = 0; i < safetensors_count(c->tensors); i++)
        c->n_parameters += safetensors_get(c->tensors, i)->n_values;
    return b.status;
}

static enum status read_configs(struct checkpoint *c, const char *dir, struct error *err)
{
    char path[FILE_PATH_BYTES];
    struct bytes ignored = {0};
    enum status st = file_path(path, dir, "config.json", err);
    if (!st)
        st = config_read(&c->config, &ignored, path, err);
    c->ignored_keys = ignored.data;
    if (!st)
        st = file_path(path, dir, "generation_config.json", err);
    if (!st)
        st = generation_read(&c->generation, &c->config, path, err);
    return st;
}

enum status checkpoint_open(struct checkpoint **out, const char *dir, progress_fn *progress,
                            void *context, struct error *err)
{
    struct checkpoint *c = calloc(1, sizeof(*c));
    if (!c)
        return fail(err, STATUS_NOMEM, "%s: out of memory", dir);
    enum status st = read_configs(c, dir, err);
    if (!st)
        st = safetensors_open(&c->tensors, dir, err);
    if (!st)
        st = bind_tensors(c, dir, err);
    if (!st)
        st = fingerprint_compute(c->fingerprint, &c->config, c->tensors, progress, context, err);
    if (st) {
        checkpoint_close(c);
        return st;
    }
    *out = c;
    return STATUS_OK;
}

void checkpoint_close(struct checkpoint *c)
{
    if (!c)
        return;
    safetensors_close(c->tensors);
    config_free(&c->config);
    free(c->layers);
    free(c->ignored_keys);
    free(c);
}

int64_t config_ring_rows(const struct model_config *c, int layer)
{
    switch (c->layers[layer].type) {
    case LAYER_LATTE:
        return 0;
    case LAYER_MACCHIATO:
        return c->sliding_window;
    case LAYER_FULL_ATTENTION:
        return c->max_position_embeddings;
    }
    return 0;
}
