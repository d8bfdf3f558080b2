/* backend_ref.c - the oracle: every op as weights/README.md writes it, in plain loops.
 *
 * One thread, f32, sums in index order, nothing clever: other backends are tested against
 * this one. Angles are computed in long double, where position * frequency is exact enough
 * for any position a session can reach. Letters as in backend.h.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/backend.h"
#include "engine/host_memory.h"

struct ref {
    struct backend base;
    struct backend_options options;
    const struct step *step; /* borrowed from begin to sync */
};

static const struct step *step_of(const struct backend *b)
{
    const struct step *step = ((const struct ref *)b)->step;
    CHECK(step);
    return step;
}

static float *values(const struct buffer *buffer)
{
    return buffer ? buffer->data : NULL;
}

static float *slab_row(const struct slab *slab, int slot)
{
    return values(slab->buffer) + (int64_t)slot * slab->row_values;
}

/* ---- weights ---- */

static size_t linear_values(const struct linear *l)
{
    return (size_t)l->n_out * (size_t)l->n_in;
}

static void convert_to_bf16(uint16_t *out, const char *src, enum dtype src_dtype, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        float value;
        dtype_to_f32(&value, src + i * dtype_bytes(src_dtype), src_dtype, 1);
        out[i] = bf16_from_f32(value);
    }
}

static enum status ref_linear_open(struct backend *b, struct linear *out, const void *src,
                                   enum dtype src_dtype, struct error *err)
{
    CHECK(out->dtype == DTYPE_F32 || out->dtype == DTYPE_BF16);
    size_t n = linear_values(out);
    struct buffer *weight;
    enum status st = host_buffer_open(b, &weight, n * dtype_bytes(out->dtype), err);
    if (st)
        return st;
    if (out->dtype == DTYPE_F32)
        dtype_to_f32(weight->data, src, src_dtype, n);
    else
        convert_to_bf16(weight->data, src, src_dtype, n);
    out->weight = weight;
    return STATUS_OK;
}

static float linear_weight(const struct linear *l, int out, int in)
{
    size_t i = (size_t)out * (size_t)l->n_in + (size_t)in;
    if (l->dtype == DTYPE_F32)
        return ((const float *)l->weight->data)[i];
    return bf16_to_f32(((const uint16_t *)l->weight->data)[i]);
}

/* ---- steps ---- */

static bool ref_begin(struct backend *b, const struct step *step)
{
    struct ref *ref = (struct ref *)b;
    step_check(step, &ref->options);
    ref->step = step;
    return false;
}

/* Ops compute when they are called, so nothing is left to start or to wait for. */
static enum status ref_submit(struct backend *b, struct error *err)
{
    (void)err;
    ((struct ref *)b)->step = NULL;
    return STATUS_OK;
}

static enum status ref_wait(struct backend *b, const struct sampled **results, struct error *err)
{
    (void)b, (void)err;
    if (results)
        *results = NULL;
    return STATUS_OK;
}

/* ---- rows ---- */

/* Sine and cosine of position * frequency. */
static void angle(int64_t position, double frequency, float *sine, float *cosine)
{
    long double x = (long double)position * (long double)frequency;
    *sine = (float)sinl(x);
    *cosine = (float)cosl(x);
}

static float sinusoid(int64_t position, int column, int dim)
{
    float sine, cosine;
    angle(position, pow(10000.0, -(double)(column / 2 * 2) / dim), &sine, &cosine);
    return column % 2 ? cosine : sine;
}

static void ref_embed(struct backend *b, struct buffer *out, const struct linear *table,
                      float scale, bool sinusoidal, const struct norm *next)
{
    const struct step *step = step_of(b);
    int dim = table->n_in;
    (void)next;
    for (int r = 0; r < step->n_rows; r++) {
        CHECK(step->tokens[r] >= 0 && step->tokens[r] < table->n_out);
        for (int i = 0; i < dim; i++) {
            float x = scale * linear_weight(table, step->tokens[r], i);
            if (sinusoidal)
                x += sinusoid(step->positions[r], i, dim);
            values(out)[(size_t)r * dim + i] = x;
        }
    }
}

static void norm_row(float *out, const float *in, const struct norm *w, int dim)
{
    float mean = 0, square = 0;
    if (w->type == NORM_LAYER) {
        for (int i = 0; i < dim; i++)
            mean += in[i];
        mean /= dim;
    }
    for (int i = 0; i < dim; i++)
        square += (in[i] - mean) * (in[i] - mean);
    float scale = 1 / sqrtf(square / dim + w->eps);
    for (int i = 0; i < dim; i++) {
        float x = (in[i] - mean) * scale * values(w->weight)[i];
        out[i] = w->bias ? x + values(w->bias)[i] : x;
    }
}

static void ref_norm(struct backend *b, struct buffer *out, const struct buffer *in,
                     const struct norm *w, int dim, enum row_set rows)
{
    int n = step_rows(step_of(b), rows);
    for (int r = 0; r < n; r++)
        norm_row(values(out) + (size_t)r * dim, values(in) + (size_t)r * dim, w, dim);
}

static void ref_head_norm(struct backend *b, struct buffer *x, const struct norm *w, int n_heads,
                          int head_dim)
{
    for (int64_t i = 0; i < (int64_t)step_of(b)->n_rows * n_heads; i++)
        norm_row(values(x) + i * head_dim, values(x) + i * head_dim, w, head_dim);
}

static void ref_linear(struct backend *b, struct buffer *out, const struct buffer *in,
                       const struct linear *w, enum row_set rows)
{
    int n = step_rows(step_of(b), rows);
    for (int r = 0; r < n; r++) {
        const float *x = values(in) + (size_t)r * w->n_in;
        for (int o = 0; o < w->n_out; o++) {
            float sum = 0;
            for (int i = 0; i < w->n_in; i++)
                sum += x[i] * linear_weight(w, o, i);
            values(out)[(size_t)r * w->n_out + o] = w->bias ? sum + values(w->bias)[o] : sum;
        }
    }
}

static void ref_block_linear(struct backend *b, struct buffer *out, const struct buffer *in,
                             const struct buffer *weight, const struct buffer *bias, int dim,
                             int n_blocks)
{
    int width = dim / n_blocks;
    for (int r = 0; r < step_of(b)->n_rows; r++) {
        for (int o = 0; o < dim; o++) {
            const float *x = values(in) + (size_t)r * dim + o / width * width;
            const float *w = values(weight) + (size_t)o * width;
            float sum = 0;
            for (int i = 0; i < width; i++)
                sum += x[i] * w[i];
            values(out)[(size_t)r * dim + o] = bias ? sum + values(bias)[o] : sum;
        }
    }
}

static void ref_add(struct backend *b, struct buffer *x, const struct buffer *y, int dim)
{
    for (size_t i = 0; i < (size_t)step_of(b)->n_rows * dim; i++)
        values(x)[i] += values(y)[i];
}

static float sigmoid(float x)
{
    return 1 / (1 + expf(-x));
}

static float apply_activation(float x, enum activation act)
{
    switch (act) {
    case ACTIVATION_SILU:
        return x * sigmoid(x);
    case ACTIVATION_GELU:
        return 0.5f * x * erfcf(-x * (float)M_SQRT1_2); /* 1 + erf, without cancelling */
    case ACTIVATION_GELU_TANH:
        return 0.5f * x * (1 + tanhf(0.7978845608f * (x + 0.044715f * x * x * x)));
    }
    CHECK(!"a known activation");
    return 0;
}

static void ref_activate(struct backend *b, struct buffer *out, const struct buffer *gate,
                         const struct buffer *up, enum activation act, int dim)
{
    for (size_t i = 0; i < (size_t)step_of(b)->n_rows * dim; i++) {
        float u = values(up)[i];
        values(out)[i] =
            gate ? apply_activation(values(gate)[i], act) * u : apply_activation(u, act);
    }
}

static void ref_gather(struct backend *b, struct buffer *out, const struct buffer *in, int dim)
{
    const struct step *step = step_of(b);
    for (int i = 0; i < step->n_logit_rows; i++)
        memcpy(values(out) + (size_t)i * dim, values(in) + (size_t)step->logit_rows[i] * dim,
               (size_t)dim * sizeof(float));
}

static void ref_softcap(struct backend *b, struct buffer *x, float cap, int dim)
{
    for (size_t i = 0; i < (size_t)step_of(b)->n_logit_rows * dim; i++)
        values(x)[i] = cap * tanhf(values(x)[i] / cap);
}

/* ---- the latent input u: P(eq 15) and Griffin's RG-LRU ---- */

/* Row t of a sequence whose first row is t0: from the step, from the state, or zero. */
static float conv_input(const float *in, const float *state, int64_t t, int64_t t0, int i, int dim,
                        int n_taps)
{
    if (t < 0)
        return 0;
    if (t >= t0)
        return in[(t - t0) * dim + i];
    return state[(t - t0 + n_taps - 1) * dim + i];
}

static void conv_sequence(float *out, const float *in, const float *weight, const float *bias,
                          float *state, int64_t t0, int n, int dim, int n_taps)
{
    for (int64_t t = t0; t < t0 + n; t++) {
        for (int i = 0; i < dim; i++) {
            float sum = 0;
            for (int k = 0; k < n_taps; k++)
                sum += weight[(size_t)i * n_taps + k] *
                       conv_input(in, state, t - k, t0, i, dim, n_taps);
            out[(t - t0) * dim + i] = bias ? sum + bias[i] : sum;
        }
    }
    /* Oldest first, so a row is read before it is overwritten. */
    for (int64_t j = 0; j < n_taps - 1; j++)
        for (int i = 0; i < dim; i++)
            state[j * dim + i] =
                conv_input(in, state, t0 + n - (n_taps - 1) + j, t0, i, dim, n_taps);
}

static void ref_conv(struct backend *b, struct buffer *out, const struct buffer *in,
                     const struct buffer *weight, const struct buffer *bias,
                     const struct slab *state, int dim, int n_taps)
{
    const struct step *step = step_of(b);
    for (int i = 0; i < step->n_seqs; i++) {
        int first = step->seq_start[i];
        size_t at = (size_t)first * dim;
        conv_sequence(values(out) + at, values(in) + at, values(weight), values(bias),
                      slab_row(state, step->seq_slot[i]), step->positions[first],
                      step->seq_start[i + 1] - first, dim, n_taps);
    }
}

static float softplus(float x)
{
    return x > 20 ? x : log1pf(expf(x));
}

static void ref_rglru(struct backend *b, struct buffer *out, const struct buffer *in,
                      const struct buffer *recurrence, const struct buffer *input,
                      const struct buffer *lambda, const struct slab *state, int dim)
{
    const struct step *step = step_of(b);
    for (int q = 0; q < step->n_seqs; q++) {
        float *z = slab_row(state, step->seq_slot[q]);
        for (int r = step->seq_start[q]; r < step->seq_start[q + 1]; r++) {
            for (int i = 0; i < dim; i++) {
                size_t at = (size_t)r * dim + i;
                float gated = sigmoid(values(input)[at]) * values(in)[at];
                float log_a = -8 * softplus(values(lambda)[i]) * sigmoid(values(recurrence)[at]);
                if (step->positions[r] == 0)
                    z[i] = gated; /* no past, and multiplier 1 */
                else
                    z[i] = expf(log_a) * z[i] + sqrtf(-expm1f(2 * log_a)) * gated;
                values(out)[at] = z[i];
            }
        }
    }
}

/* ---- rotations ---- */

/* Turn the pair (x_i, x_{i+d/2}). */
static void turn(float *out, const float *x, int i, int head_dim, float sine, float cosine)
{
    int j = i + head_dim / 2;
    float a = x[i], b = x[j];
    out[i] = a * cosine - b * sine;
    out[j] = a * sine + b * cosine;
}

static void ref_rope(struct backend *b, struct buffer *x, const struct buffer *frequencies,
                     int n_heads, int head_dim)
{
    const struct step *step = step_of(b);
    const double *frequency = frequencies->data;
    for (int r = 0; r < step->n_rows; r++) {
        for (int i = 0; i < head_dim / 2; i++) {
            float sine, cosine;
            angle(step->positions[r], frequency[i], &sine, &cosine);
            for (int h = 0; h < n_heads; h++) {
                float *head = values(x) + ((size_t)r * n_heads + h) * head_dim;
                turn(head, head, i, head_dim, sine, cosine);
            }
        }
    }
}

static void ref_vapor(struct backend *b, struct buffer *out, const struct buffer *x,
                      const struct buffer *theta, int n_heads, int n_x_heads, int head_dim,
                      int sign)
{
    const struct step *step = step_of(b);
    CHECK(n_heads == n_x_heads || out != x);
    for (int r = 0; r < step->n_rows; r++) {
        for (int h = 0; h < n_heads; h++) {
            int from = h / (n_heads / n_x_heads);
            for (int i = 0; i < head_dim / 2; i++) {
                float sine, cosine;
                double frequency = values(theta)[(size_t)h * (head_dim / 2) + i];
                angle(step->positions[r], sign * frequency, &sine, &cosine);
                turn(values(out) + ((size_t)r * n_heads + h) * head_dim,
                     values(x) + ((size_t)r * n_x_heads + from) * head_dim, i, head_dim, sine,
                     cosine);
            }
        }
    }
}

/* ---- causal Latte, P(eq 19) ---- */

/* exp(a - b) for a <= b. Equal arguments give 1 even when both are infinite. */
static float exp_below(float a, float b)
{
    return a == b ? 1 : expf(a - b);
}

static void softmax(float *p, const float *g, int n)
{
    float top = -INFINITY, sum = 0;
    for (int i = 0; i < n; i++)
        top = fmaxf(top, g[i]);
    for (int i = 0; i < n; i++) {
        p[i] = exp_below(g[i], top);
        sum += p[i];
    }
    for (int i = 0; i < n; i++)
        p[i] /= sum;
}

/* One latent of one head takes in one token; its answer p * s / alpha is added to out. */
static void latent_update(float *out, float *m, float *alpha, float *s, float theta, float p,
                          const float *v, bool fresh, int head_dim)
{
    float before = fresh ? -INFINITY : *m; /* a fresh slot may hold anything: never read it */
    float top = fmaxf(before, theta);
    float keep = fresh ? 0 : exp_below(before, top);
    float take = exp_below(theta, top);
    *m = top;
    *alpha = fresh ? take : *alpha * keep + take;
    for (int i = 0; i < head_dim; i++) {
        s[i] = fresh ? take * v[i] : s[i] * keep + take * v[i];
        out[i] += p * s[i] / *alpha;
    }
}

struct latent_call {
    float *out, *p0;
    const float *theta, *g, *v;
    const struct latent_shape *shape;
};

static void latent_head(const struct latent_call *c, int row, int h, float *m, float *alpha,
                        float *s, bool fresh)
{
    const struct latent_shape *sh = c->shape;
    int M = sh->n_latents, d = sh->head_dim, n_g = M + sh->gated_window;
    size_t head = (size_t)row * sh->n_heads + h;
    int kv = h / (sh->n_heads / sh->n_kv_heads);
    const float *v = c->v + ((size_t)row * sh->n_kv_heads + kv) * d;
    float *out = c->out + head * d;

    float p[n_g];
    softmax(p, c->g + head * n_g, n_g);
    if (sh->gated_window)
        c->p0[head] = p[0];
    memset(out, 0, (size_t)d * sizeof(*out));
    for (int l = 0; l < M; l++) {
        int at = h * M + l;
        latent_update(out, m + at, alpha + at, s + (size_t)at * d, c->theta[head * M + l],
                      p[l + sh->gated_window], v, fresh, d);
    }
}

static void ref_latent(struct backend *b, struct buffer *out, struct buffer *p0,
                       const struct buffer *theta, const struct buffer *g, const struct buffer *v,
                       const struct slab *m, const struct slab *alpha, const struct slab *s,
                       const struct latent_shape *shape)
{
    const struct step *step = step_of(b);
    struct latent_call call = {values(out), values(p0), values(theta), values(g), values(v), shape};
    for (int i = 0; i < step->n_seqs; i++) {
        int slot = step->seq_slot[i];
        for (int r = step->seq_start[i]; r < step->seq_start[i + 1]; r++)
            for (int h = 0; h < shape->n_heads; h++)
                latent_head(&call, r, h, slab_row(m, slot), slab_row(alpha, slot),
                            slab_row(s, slot), step->positions[r] == 0);
    }
}

/* ---- sliding window, P(eq 13-14, 20) ---- */

/* One sequence of the step, as its keys and values see it. */
struct window_seq {
    const struct window_shape *shape;
    const float *k, *v;     /* [n, KV, d] rows of this step */
    float *ring_k, *ring_v; /* [KV, w, d] rows of earlier steps */
    const float *vapor;     /* [H, d/2] or NULL */
    int64_t t0;             /* position of the first row */
    int n;
};

/* The key or value of position t: this step's own, or an earlier one from the ring. */
static const float *window_row(const struct window_seq *q, const float *own, const float *ring,
                               int64_t t, int kv)
{
    const struct window_shape *sh = q->shape;
    if (t >= q->t0)
        return own + ((t - q->t0) * sh->n_kv_heads + kv) * sh->head_dim;
    return ring + ((int64_t)kv * sh->ring_rows + t % sh->ring_rows) * sh->head_dim;
}

static float window_score(const struct window_seq *q, const float *query, int64_t t, int kv)
{
    const struct window_shape *sh = q->shape;
    const float *key = window_row(q, q->k, q->ring_k, t, kv);
    float sum = 0;
    for (int i = 0; i < sh->head_dim; i++)
        sum += query[i] * key[i];
    sum *= sh->scale;
    return sh->softcap > 0 ? sh->softcap * tanhf(sum / sh->softcap) : sum;
}

/* local += weight * v, the value turned by distance * theta with VAPOR. */
static void window_take(const struct window_seq *q, float *local, float weight, int64_t t,
                        int64_t distance, int h, int kv)
{
    int d = q->shape->head_dim;
    const float *value = window_row(q, q->v, q->ring_v, t, kv);
    float turned[d];
    if (q->vapor) {
        for (int i = 0; i < d / 2; i++) {
            float sine, cosine;
            angle(distance, q->vapor[(size_t)h * (d / 2) + i], &sine, &cosine);
            turn(turned, value, i, d, sine, cosine);
        }
        value = turned;
    }
    for (int i = 0; i < d; i++)
        local[i] += weight * value[i];
}

/* local [d] = attention of one head's query at position t. */
static void window_head(const struct window_seq *q, float *local, const float *query, int64_t t,
                        int h)
{
    const struct window_shape *sh = q->shape;
    int kv = h / (sh->n_heads / sh->n_kv_heads);
    int64_t oldest = t - sh->ring_rows + 1 > 0 ? t - sh->ring_rows + 1 : 0;
    float top = -INFINITY, sum = 0;
    for (int64_t s = oldest; s <= t; s++)
        top = fmaxf(top, window_score(q, query, s, kv));
    memset(local, 0, (size_t)sh->head_dim * sizeof(*local));
    for (int64_t s = oldest; s <= t; s++) {
        float weight = exp_below(window_score(q, query, s, kv), top);
        sum += weight;
        window_take(q, local, weight, s, t - s, h, kv);
    }
    for (int i = 0; i < sh->head_dim; i++)
        local[i] /= sum;
}

/* Only after all rows are done: their keys replace ring rows that earlier rows still read. */
static void window_store(const struct window_seq *q)
{
    const struct window_shape *sh = q->shape;
    int64_t w = sh->ring_rows, end = q->t0 + q->n;
    int64_t first = end - w > q->t0 ? end - w : q->t0;
    size_t bytes = (size_t)sh->head_dim * sizeof(float);
    for (int64_t t = first; t < end; t++) {
        for (int kv = 0; kv < sh->n_kv_heads; kv++) {
            int64_t at = (kv * w + t % w) * sh->head_dim;
            memcpy(q->ring_k + at, window_row(q, q->k, NULL, t, kv), bytes);
            memcpy(q->ring_v + at, window_row(q, q->v, NULL, t, kv), bytes);
        }
    }
}

static void ref_window(struct backend *b, struct buffer *out, const struct buffer *p0,
                       const struct buffer *q, const struct buffer *k, const struct buffer *v,
                       const struct slab *ring_k, const struct slab *ring_v,
                       const struct buffer *vapor_theta, const struct window_shape *shape)
{
    const struct step *step = step_of(b);
    int d = shape->head_dim;
    float local[d];
    for (int i = 0; i < step->n_seqs; i++) {
        int first = step->seq_start[i], slot = step->seq_slot[i];
        size_t at = (size_t)first * shape->n_kv_heads * d;
        struct window_seq seq = {
            .shape = shape,
            .k = values(k) + at,
            .v = values(v) + at,
            .ring_k = slab_row(ring_k, slot),
            .ring_v = slab_row(ring_v, slot),
            .vapor = values(vapor_theta),
            .t0 = step->positions[first],
            .n = step->seq_start[i + 1] - first,
        };
        for (int r = first; r < step->seq_start[i + 1]; r++) {
            for (int h = 0; h < shape->n_heads; h++) {
                size_t head = (size_t)r * shape->n_heads + h;
                window_head(&seq, local, values(q) + head * d, step->positions[r], h);
                for (int j = 0; j < d; j++) {
                    float *o = values(out) + head * d + j;
                    *o = p0 ? *o + values(p0)[head] * local[j] : local[j];
                }
            }
        }
        window_store(&seq);
    }
}

/* ---- the table ---- */

static void ref_close(struct backend *b)
{
    free(b);
}

static const struct backend_ops ref_ops = {
    .name = "ref",
    .close = ref_close,
    .buffer_open = host_buffer_open,
    .buffer_close = host_buffer_close,
    .write = host_write,
    .read = host_read,
    .copy = host_copy,
    .linear_open = ref_linear_open,
    .linear_close = host_linear_close,
    .begin = ref_begin,
    .submit = ref_submit,
    .wait = ref_wait,
    .depth = 1,
    .map = host_map,
    .embed = ref_embed,
    .norm = ref_norm,
    .head_norm = ref_head_norm,
    .linear = ref_linear,
    .add = ref_add,
    .activate = ref_activate,
    .gather = ref_gather,
    .softcap = ref_softcap,
    .conv = ref_conv,
    .rglru = ref_rglru,
    .block_linear = ref_block_linear,
    .rope = ref_rope,
    .vapor = ref_vapor,
    .latent = ref_latent,
    .window = ref_window,
};

enum status backend_ref_open(struct backend **out, const struct backend_options *options,
                             struct error *err)
{
    struct ref *ref = calloc(1, sizeof(*ref));
    if (!ref)
        return fail(err, STATUS_NOMEM, "reference backend: out of memory");
    ref->base.ops = &ref_ops;
    ref->options = *options;
    *out = &ref->base;
    return STATUS_OK;
}
