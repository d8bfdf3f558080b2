/* upload.c - see upload.h */
#include "engine/upload.h"

#include <limits.h>
#include <math.h>
#include <stdlib.h>

/* What every step of an upload needs. */
struct upload {
    struct model_weights *weights;
    const struct model_config *config;
    struct backend *backend;
    enum dtype dtype;
    progress_fn *progress;
    void *context;
    uint64_t done_bytes, total_bytes;
    struct error *err;
};

static void report(struct upload *u, const struct tensor *t)
{
    u->done_bytes += t->n_bytes;
    if (u->progress)
        u->progress(u->context, u->done_bytes, u->total_bytes);
}

static enum status open_values(struct upload *u, struct buffer **out, const char *name,
                               const void *values, size_t n_bytes)
{
    const struct backend_ops *op = u->backend->ops;
    enum status st = op->buffer_open(u->backend, out, n_bytes, u->err);
    if (!st)
        st = op->write(u->backend, *out, 0, values, n_bytes, u->err);
    if (st)
        return fail_context(u->err, "%s: %zu bytes on the device", name, n_bytes);
    u->weights->n_bytes += n_bytes;
    return STATUS_OK;
}

/* A small tensor as f32, with offset added to each value. NULL is no tensor: nothing happens. */
static enum status upload_offset(struct upload *u, struct buffer **out, const struct tensor *t,
                                 double offset)
{
    if (!t)
        return STATUS_OK;
    size_t n_bytes;
    float *values = NULL;
    if (!__builtin_mul_overflow((size_t)t->n_values, sizeof(float), &n_bytes))
        values = malloc(n_bytes);
    if (!values)
        return fail(u->err, STATUS_NOMEM, "%s: out of memory for %lld values", t->name,
                    (long long)t->n_values);
    dtype_to_f32(values, t->data, t->dtype, (size_t)t->n_values);
    for (int64_t i = 0; offset != 0 && i < t->n_values; i++)
        values[i] = (float)(values[i] + offset);
    enum status st = open_values(u, out, t->name, values, n_bytes);
    free(values);
    if (!st)
        report(u, t);
    return st;
}

static enum status upload_small(struct upload *u, struct buffer **out, const struct tensor *t)
{
    return upload_offset(u, out, t, 0);
}

static enum status upload_norm(struct upload *u, struct norm *out, struct weight w,
                               enum norm_type type)
{
    out->type = type;
    out->eps = (float)u->config->norm_eps;
    enum status st = upload_offset(u, &out->weight, w.weight, u->config->norm_offset);
    if (!st)
        st = upload_small(u, &out->bias, w.bias);
    return st;
}

/* Post norms, q_norm, k_norm and rglru_norm are RMSNorm whatever the model's norm is. */
static enum status upload_rms_norm(struct upload *u, struct norm *out, const struct tensor *t)
{
    return upload_norm(u, out, (struct weight){.weight = t}, NORM_RMS);
}

/* Bytes of a matrix on the device, scales included. */
static size_t linear_bytes(const struct tensor *t, enum dtype dtype)
{
    return (size_t)t->n_values * dtype_bytes(dtype) +
           (dtype == DTYPE_I8 ? (size_t)t->shape[0] * sizeof(float) : 0);
}

static enum status upload_linear(struct upload *u, struct linear *out, struct weight w)
{
    const struct tensor *t = w.weight;
    if (!t)
        return STATUS_OK;
    CHECK(t->n_dims == 2);
    if (t->shape[0] > INT_MAX || t->shape[1] > INT_MAX)
        return fail(u->err, STATUS_INVALID, "%s: [%lld, %lld] is larger than a matrix may be",
                    t->name, (long long)t->shape[0], (long long)t->shape[1]);
    out->n_out = (int)t->shape[0];
    out->n_in = (int)t->shape[1];
    out->dtype = u->dtype;
    const size_t n_bytes = linear_bytes(t, u->dtype);
    enum status st = u->backend->ops->linear_open(u->backend, out, t->data, t->dtype, u->err);
    if (st)
        return fail_context(u->err, "%s: %zu bytes as %s on the device", t->name, n_bytes,
                            dtype_name(u->dtype));
    u->weights->n_bytes += n_bytes;
    report(u, t);
    return upload_small(u, &out->bias, w.bias);
}

/* Linears of the same input. */
struct linear_group {
    int n;
    struct {
        struct linear *out;
        struct weight weight;
    } items[3];
};

static enum status upload_group(struct upload *u, const struct linear_group *group)
{
    const struct backend_ops *op = u->backend->ops;
    size_t n_bytes = 0, n_rows = 0;
    int n = 0;
    for (int i = 0; i < group->n; i++) {
        const struct tensor *t = group->items[i].weight.weight;
        if (!t)
            continue;
        n_bytes += (size_t)t->n_values * dtype_bytes(u->dtype);
        n_rows += (size_t)t->shape[0];
        n++;
    }
    enum status st = STATUS_OK;
    if (op->linear_group && n > 1)
        st = op->linear_group(u->backend, n, n_bytes, n_rows, u->err);
    for (int i = 0; !st && i < group->n; i++)
        st = upload_linear(u, group->items[i].out, group->items[i].weight);
    return st;
}

void rope_frequencies(double *out, const struct model_config *config, int layer)
{
    const struct rope_scaling *s = &config->rope_scaling;
    const double d = config->head_dim, old = (double)s->original_max_position_embeddings;
    for (int i = 0; i < config->head_dim / 2; i++) {
        const double f = pow(config->layers[layer].rope_theta, -2.0 * i / d);
        out[i] = f;
        if (s->type == ROPE_SCALING_LINEAR)
            out[i] = f / s->factor;
        if (s->type == ROPE_SCALING_LLAMA3) {
            /* turns per old context: few are slowed down, many are kept, between them a blend */
            const double turns = old * f / (2 * M_PI);
            const double span = s->high_freq_factor - s->low_freq_factor;
            const double keep = fmin(fmax((turns - s->low_freq_factor) / span, 0), 1);
            out[i] = (1 - keep) * f / s->factor + keep * f;
        }
    }
}

static enum status upload_rope(struct upload *u, struct layer_weights *w, int layer)
{
    if (!config_ring_rows(u->config, layer))
        return STATUS_OK;
    const size_t n_bytes = (size_t)(u->config->head_dim / 2) * sizeof(double);
    double *frequencies = malloc(n_bytes);
    if (!frequencies)
        return fail(u->err, STATUS_NOMEM, "rope: out of memory for %zu bytes", n_bytes);
    rope_frequencies(frequencies, u->config, layer);
    enum status st = open_values(u, &w->rope, "rope", frequencies, n_bytes);
    free(frequencies);
    return st;
}

static enum status upload_mlp(struct upload *u, struct layer_weights *w,
                              const struct layer_tensors *t)
{
    const struct linear_group gate_up = {
        2, {{&w->gate_proj, t->gate_proj}, {&w->up_proj, t->up_proj}}};
    enum status st = upload_group(u, &gate_up);
    return st ? st : upload_linear(u, &w->down_proj, t->down_proj);
}

static enum status upload_norms(struct upload *u, struct layer_weights *w,
                                const struct layer_tensors *t)
{
    enum status st = upload_norm(u, &w->norm1, t->norm1, u->config->norm);
    if (!st)
        st = upload_norm(u, &w->norm2, t->norm2, u->config->norm);
    if (!st)
        st = upload_rms_norm(u, &w->post_norm1, t->post_norm1);
    if (!st)
        st = upload_rms_norm(u, &w->post_norm2, t->post_norm2);
    if (!st)
        st = upload_rms_norm(u, &w->q_norm, t->q_norm);
    if (!st)
        st = upload_rms_norm(u, &w->k_norm, t->k_norm);
    if (!st)
        st = upload_rms_norm(u, &w->rglru_norm, t->rglru_norm);
    return st;
}

static enum status upload_latent_input(struct upload *u, struct layer_weights *w,
                                       const struct layer_tensors *t)
{
    const struct {
        struct buffer **out;
        const struct tensor *tensor;
    } small[] = {
        {&w->conv, t->conv.weight},
        {&w->conv_bias, t->conv.bias},
        {&w->input_gate, t->rglru.input_gate.weight},
        {&w->input_bias, t->rglru.input_gate.bias},
        {&w->recurrence_gate, t->rglru.recurrence_gate.weight},
        {&w->recurrence_bias, t->rglru.recurrence_gate.bias},
        {&w->lambda, t->rglru.lambda},
        {&w->vapor_theta, t->vapor_theta},
    };
    enum status st = STATUS_OK;
    for (size_t i = 0; !st && i < sizeof(small) / sizeof(*small); i++)
        st = upload_small(u, small[i].out, small[i].tensor);
    return st;
}

static enum status upload_mix(struct upload *u, struct layer_weights *w,
                              const struct layer_tensors *t)
{
    const struct linear_group gates = {2,
                                       {{&w->latent_q, t->latent_q}, {&w->latent_k, t->latent_k}}};
    const struct linear_group vqk = {
        3, {{&w->v_proj, t->v_proj}, {&w->q_proj, t->q_proj}, {&w->k_proj, t->k_proj}}};
    enum status st = upload_latent_input(u, w, t);
    if (!st)
        st = upload_group(u, &gates);
    if (!st)
        st = upload_group(u, &vqk);
    return st ? st : upload_linear(u, &w->o_proj, t->o_proj);
}

static enum status upload_layer(struct upload *u, const struct checkpoint *c, int layer)
{
    struct layer_weights *w = &u->weights->layers[layer];
    const struct layer_tensors *t = &c->layers[layer];
    enum status st = upload_norms(u, w, t);
    if (!st)
        st = upload_mix(u, w, t);
    if (!st)
        st = upload_rope(u, w, layer);
    if (!st)
        st = upload_mlp(u, w, t);
    return st;
}

static enum status upload_head(struct upload *u, const struct checkpoint *c)
{
    struct model_weights *w = u->weights;
    enum status st = upload_norm(u, &w->norm, c->norm, u->config->norm);
    if (st)
        return st;
    if (!u->config->tie_word_embeddings)
        return upload_linear(u, &w->lm_head, c->lm_head);
    w->lm_head = w->embed; /* one matrix; lm_head may still have a bias of its own */
    return upload_small(u, &w->lm_head.bias, c->lm_head.bias);
}

enum status weights_open(struct model_weights **out, const struct checkpoint *checkpoint,
                         struct backend *backend, enum dtype dtype, progress_fn *progress,
                         void *context, struct error *err)
{
    struct model_weights *w = calloc(1, sizeof(*w));
    if (!w)
        return fail(err, STATUS_NOMEM, "model weights: out of memory");
    struct upload u = {w,        &checkpoint->config,
                       backend,  dtype,
                       progress, context,
                       0,        safetensors_n_bytes(checkpoint->tensors),
                       err};
    w->backend = backend;
    w->n_layers = checkpoint->config.n_layers;
    w->layers = calloc((size_t)w->n_layers + 1, sizeof(*w->layers));

    enum status st = STATUS_OK;
    if (!w->layers)
        st = fail(err, STATUS_NOMEM, "model weights: out of memory for %d layers", w->n_layers);
    if (!st)
        st = upload_linear(&u, &w->embed, (struct weight){.weight = checkpoint->embed_tokens});
    for (int l = 0; !st && l < w->n_layers; l++)
        st = upload_layer(&u, checkpoint, l);
    if (!st)
        st = upload_head(&u, checkpoint);
    if (st) {
        weights_close(w);
        return st;
    }
    w->layers[w->n_layers].norm1 = w->norm;
    *out = w;
    return STATUS_OK;
}

static size_t small_bytes(const struct tensor *t)
{
    return t ? (size_t)t->n_values * sizeof(float) : 0;
}

static size_t matrix_bytes(struct weight w, enum dtype dtype)
{
    return (w.weight ? linear_bytes(w.weight, dtype) : 0) + small_bytes(w.bias);
}

static size_t layer_bytes(const struct layer_tensors *t, enum dtype dtype)
{
    const struct weight matrices[] = {t->latent_q, t->latent_k,  t->v_proj,  t->q_proj,   t->k_proj,
                                      t->o_proj,   t->gate_proj, t->up_proj, t->down_proj};
    const struct tensor *const small[] = {
        t->norm1.weight,
        t->norm1.bias,
        t->norm2.weight,
        t->norm2.bias,
        t->post_norm1,
        t->post_norm2,
        t->q_norm,
        t->k_norm,
        t->rglru_norm,
        t->conv.weight,
        t->conv.bias,
        t->rglru.input_gate.weight,
        t->rglru.input_gate.bias,
        t->rglru.recurrence_gate.weight,
        t->rglru.recurrence_gate.bias,
        t->rglru.lambda,
        t->vapor_theta,
    };
    size_t n = 0;
    for (size_t i = 0; i < sizeof(matrices) / sizeof(*matrices); i++)
        n += matrix_bytes(matrices[i], dtype);
    for (size_t i = 0; i < sizeof(small) / sizeof(*small); i++)
        n += small_bytes(small[i]);
    return n;
}

size_t weights_bytes_of(const struct checkpoint *c, enum dtype dtype)
{
    size_t n = linear_bytes(c->embed_tokens, dtype);
    for (int l = 0; l < c->config.n_layers; l++) {
        n += layer_bytes(&c->layers[l], dtype);
        if (config_ring_rows(&c->config, l))
            n += (size_t)(c->config.head_dim / 2) * sizeof(double);
    }
    n += small_bytes(c->norm.weight) + small_bytes(c->norm.bias);
    return n + (c->config.tie_word_embeddings ? small_bytes(c->lm_head.bias)
                                              : matrix_bytes(c->lm_head, dtype));
}

static void close_linear(struct backend *b, struct linear *l)
{
    if (l->weight)
        b->ops->linear_close(b, l);
}

static void close_norm(struct backend *b, struct norm *n)
{
    b->ops->buffer_close(b, n->weight);
    b->ops->buffer_close(b, n->bias);
}

static void close_layer(struct backend *b, struct layer_weights *w)
{
    struct norm *norms[] = {&w->norm1,  &w->norm2,  &w->post_norm1, &w->post_norm2,
                            &w->q_norm, &w->k_norm, &w->rglru_norm};
    struct linear *linears[] = {&w->latent_q, &w->latent_k,  &w->v_proj,  &w->q_proj,   &w->k_proj,
                                &w->o_proj,   &w->gate_proj, &w->up_proj, &w->down_proj};
    struct buffer *buffers[] = {w->conv,       w->conv_bias,       w->input_gate,
                                w->input_bias, w->recurrence_gate, w->recurrence_bias,
                                w->lambda,     w->vapor_theta,     w->rope};
    for (size_t i = 0; i < sizeof(norms) / sizeof(*norms); i++)
        close_norm(b, norms[i]);
    for (size_t i = 0; i < sizeof(linears) / sizeof(*linears); i++)
        close_linear(b, linears[i]);
    for (size_t i = 0; i < sizeof(buffers) / sizeof(*buffers); i++)
        b->ops->buffer_close(b, buffers[i]);
}

void weights_close(struct model_weights *w)
{
    if (!w)
        return;
    struct backend *b = w->backend;
    for (int l = 0; w->layers && l < w->n_layers; l++)
        close_layer(b, &w->layers[l]);
    if (w->lm_head.weight == w->embed.weight)
        b->ops->buffer_close(b, w->lm_head.bias);
    else
        close_linear(b, &w->lm_head);
    close_linear(b, &w->embed);
    close_norm(b, &w->norm);
    free(w->layers);
    free(w);
}
