/* cpu_mix.c - ops that mix the rows of a sequence, or turn rows by their position. */
#include <math.h>
#include <string.h>

#include "engine/cpu.h"

enum {
    COLUMNS_PER_ITEM = 256, /* of the ops that work column by column */
    TILE = 4,               /* rows of attention worked on together */
};

size_t cpu_mix_scratch(const struct backend_options *options)
{
    size_t dim = (size_t)options->max_dim;
    size_t window = dim * (2 * TILE + KEY_BLOCK + 2) + TILE * KEY_BLOCK;
    size_t latent = 3 * dim + 1;
    return window > latent ? window : latent;
}

/* ---- column by column: conv and RG-LRU ---- */

struct column_call {
    struct cpu *cpu;
    float *out;
    const float *in, *recurrence, *input, *lambda, *weight, *bias;
    const struct slab *state;
    int dim, n_taps, n_groups; /* groups of columns */
};

struct columns {
    int first, n;    /* columns of the item */
    int row, n_rows; /* the sequence's rows */
    float *state;    /* the slot's row, from the first column on */
    int64_t position;
    size_t at; /* of the first row and column in [R, dim] */
};

static struct columns item_columns(const struct column_call *call, int item)
{
    const struct step *step = call->cpu->step;
    int seq = item / call->n_groups, first = item % call->n_groups * COLUMNS_PER_ITEM;
    int left = call->dim - first, row = step->seq_start[seq];
    return (struct columns){
        .first = first,
        .n = left < COLUMNS_PER_ITEM ? left : COLUMNS_PER_ITEM,
        .row = row,
        .n_rows = step->seq_start[seq + 1] - row,
        .state = slab_row(call->state, step->seq_slot[seq]) + first,
        .position = step->positions[row],
        .at = (size_t)row * (size_t)call->dim + (size_t)first,
    };
}

static void each_columns(struct column_call *call, size_t value_cost, pool_fn *fn)
{
    const struct step *step = call->cpu->step;
    call->n_groups = (call->dim + COLUMNS_PER_ITEM - 1) / COLUMNS_PER_ITEM;
    cpu_each(call->cpu, step->n_seqs * call->n_groups,
             (size_t)step->n_rows * (size_t)call->dim * value_cost, fn, call);
}

/* Keep the last K-1 rows, oldest first. A row moves towards the front, so in this order none
 * is overwritten before it is read. */
static void conv_store(const struct column_call *call, const struct columns *c)
{
    size_t bytes = (size_t)c->n * sizeof(float), dim = (size_t)call->dim;
    int kept = call->n_taps - 1;
    for (int j = 0; j < kept; j++) {
        int row = c->n_rows - kept + j;
        float *to = c->state + (size_t)j * dim;
        if (c->position + row < 0)
            memset(to, 0, bytes);
        else if (row >= 0)
            memcpy(to, call->in + c->at + (size_t)row * dim, bytes);
        else
            memmove(to, c->state + (size_t)(kept + row) * dim, bytes);
    }
}

static void conv_item(void *context, int item, int thread)
{
    const struct column_call *call = context;
    struct columns c = item_columns(call, item);
    struct conv_run run = {
        .out = call->out + c.at,
        .in = call->in + c.at,
        .state = c.state,
        .weight = call->weight + (size_t)c.first * (size_t)call->n_taps,
        .bias = call->bias ? call->bias + c.first : NULL,
        .stride = (size_t)call->dim,
        .position = c.position,
        .n_rows = c.n_rows,
        .n = c.n,
        .n_taps = call->n_taps,
    };
    (void)thread;
    call->cpu->kernels->conv(&run);
    conv_store(call, &c);
}

void cpu_conv(struct backend *b, struct buffer *out, const struct buffer *in,
              const struct buffer *weight, const struct buffer *bias, const struct slab *state,
              int dim, int n_taps)
{
    struct column_call call = {.cpu = cpu_of(b),
                               .out = values(out),
                               .in = values(in),
                               .weight = values(weight),
                               .bias = values(bias),
                               .state = state,
                               .dim = dim,
                               .n_taps = n_taps};
    each_columns(&call, (size_t)n_taps, conv_item);
}

static void rglru_item(void *context, int item, int thread)
{
    const struct column_call *call = context;
    struct columns c = item_columns(call, item);
    struct rglru_run run = {
        .out = call->out + c.at,
        .z = c.state,
        .in = call->in + c.at,
        .recurrence = call->recurrence + c.at,
        .input = call->input + c.at,
        .lambda = call->lambda + c.first,
        .stride = (size_t)call->dim,
        .n_rows = c.n_rows,
        .n = c.n,
        .fresh = c.position == 0,
    };
    (void)thread;
    call->cpu->kernels->rglru(&run);
}

void cpu_rglru(struct backend *b, struct buffer *out, const struct buffer *in,
               const struct buffer *recurrence, const struct buffer *input,
               const struct buffer *lambda, const struct slab *state, int dim)
{
    struct column_call call = {.cpu = cpu_of(b),
                               .out = values(out),
                               .in = values(in),
                               .recurrence = values(recurrence),
                               .input = values(input),
                               .lambda = values(lambda),
                               .state = state,
                               .dim = dim};
    each_columns(&call, 8, rglru_item);
}

/* ---- rotations ---- */

struct turn_call {
    struct cpu *cpu;
    float *out;
    const float *x, *theta;
    const double *frequency;
    int n_heads, n_x_heads, head_dim, sign;
};

static void rope_item(void *context, int r, int thread)
{
    const struct turn_call *call = context;
    const struct kernels *k = call->cpu->kernels;
    int half = call->head_dim / 2;
    float *sine = call->cpu->scratch[thread], *cosine = sine + half;
    k->angles(sine, cosine, call->frequency, (double)call->cpu->step->positions[r], half);
    for (int h = 0; h < call->n_heads; h++) {
        float *head = call->out + ((size_t)r * call->n_heads + h) * (size_t)call->head_dim;
        k->turn(head, head, sine, cosine, half);
    }
}

void cpu_rope(struct backend *b, struct buffer *x, const struct buffer *frequencies, int n_heads,
              int head_dim)
{
    struct cpu *c = cpu_of(b);
    struct turn_call call = {.cpu = c,
                             .out = values(x),
                             .frequency = frequencies->data,
                             .n_heads = n_heads,
                             .head_dim = head_dim};
    size_t n_values = (size_t)c->step->n_rows * (size_t)head_dim * (size_t)(n_heads + 4);
    cpu_each(c, c->step->n_rows, n_values, rope_item, &call);
}

/* Learned angles are f32; reducing them by the position wants double. */
static void theta_frequencies(double *out, const float *theta, int half)
{
    for (int i = 0; i < half; i++)
        out[i] = theta[i];
}

static void vapor_item(void *context, int r, int thread)
{
    const struct turn_call *call = context;
    const struct kernels *k = call->cpu->kernels;
    int half = call->head_dim / 2, group = call->n_heads / call->n_x_heads;
    float *sine = call->cpu->scratch[thread], *cosine = sine + half;
    double *frequency = call->cpu->angles[thread];
    double position = (double)call->cpu->step->positions[r] * call->sign;
    for (int h = 0; h < call->n_heads; h++) {
        theta_frequencies(frequency, call->theta + (size_t)h * half, half);
        k->angles(sine, cosine, frequency, position, half);
        k->turn(call->out + ((size_t)r * call->n_heads + h) * (size_t)call->head_dim,
                call->x + ((size_t)r * call->n_x_heads + h / group) * (size_t)call->head_dim, sine,
                cosine, half);
    }
}

void cpu_vapor(struct backend *b, struct buffer *out, const struct buffer *x,
               const struct buffer *theta, int n_heads, int n_x_heads, int head_dim, int sign)
{
    struct cpu *c = cpu_of(b);
    CHECK(n_heads == n_x_heads || out != x);
    struct turn_call call = {.cpu = c,
                             .out = values(out),
                             .x = values(x),
                             .theta = values(theta),
                             .n_heads = n_heads,
                             .n_x_heads = n_x_heads,
                             .head_dim = head_dim,
                             .sign = sign};
    size_t n_values = 8 * (size_t)c->step->n_rows * (size_t)head_dim * (size_t)n_heads;
    cpu_each(c, c->step->n_rows, n_values, vapor_item, &call);
}

/* ---- causal Latte ---- */

struct latent_call {
    struct cpu *cpu;
    float *out, *p0;
    const float *theta, *g, *v;
    const struct slab *m, *alpha, *s;
    const struct latent_shape *shape;
};

/* One head of one sequence. */
static void latent_item(void *context, int item, int thread)
{
    const struct latent_call *call = context;
    const struct latent_shape *sh = call->shape;
    const struct step *step = call->cpu->step;
    size_t seq = (size_t)(item / sh->n_heads), h = (size_t)(item % sh->n_heads);
    size_t H = (size_t)sh->n_heads, KV = (size_t)sh->n_kv_heads, M = (size_t)sh->n_latents;
    size_t d = (size_t)sh->head_dim, n_g = M + sh->gated_window, kv = h / (H / KV);
    size_t row = (size_t)step->seq_start[seq];
    int slot = step->seq_slot[seq];
    struct latent_run run = {
        .out = call->out + row * H * d + h * d,
        .p0 = sh->gated_window ? call->p0 + row * H + h : NULL,
        .theta = call->theta + row * H * M + h * M,
        .g = call->g + row * H * n_g + h * n_g,
        .v = call->v + row * KV * d + kv * d,
        .out_stride = H * d,
        .p0_stride = H,
        .theta_stride = H * M,
        .g_stride = H * n_g,
        .v_stride = KV * d,
        .m = slab_row(call->m, slot) + h * M,
        .alpha = slab_row(call->alpha, slot) + h * M,
        .s = slab_row(call->s, slot) + h * M * d,
        .scratch = call->cpu->scratch[thread],
        .n_rows = step->seq_start[seq + 1] - (int)row,
        .n_latents = sh->n_latents,
        .head_dim = sh->head_dim,
        .fresh = step->positions[row] == 0,
    };
    call->cpu->kernels->latent(&run);
}

void cpu_latent(struct backend *b, struct buffer *out, struct buffer *p0,
                const struct buffer *theta, const struct buffer *g, const struct buffer *v,
                const struct slab *m, const struct slab *alpha, const struct slab *s,
                const struct latent_shape *shape)
{
    struct cpu *c = cpu_of(b);
    struct latent_call call = {c, values(out), values(p0), values(theta), values(g), values(v),
                               m, alpha,       s,          shape};
    size_t per_row = (size_t)shape->n_heads * (size_t)shape->n_latents * (size_t)shape->head_dim;
    cpu_each(c, c->step->n_seqs * shape->n_heads, (size_t)c->step->n_rows * per_row, latent_item,
             &call);
}

/* ---- sliding window, P(eq 13-14) ---- */

struct window_call {
    struct cpu *cpu;
    float *out;
    const float *p0, *q, *k, *v, *theta;
    const struct slab *ring_k, *ring_v;
    const struct window_shape *shape;
    int group;         /* query heads an item takes: those of a kv head, or one with VAPOR */
    bool store_inline; /* every sequence is one block: its items store their own keys */
};

/* What one item sees: one kv head of one sequence. */
struct window_view {
    const struct window_call *call;
    const float *k, *v;     /* row 0 of the sequence in this step */
    float *ring_k, *ring_v; /* [w, d] */
    size_t stride;          /* KV * d, of k and v */
    int64_t t0;             /* position of the sequence's first row in this step */
    int n_rows;             /* of the sequence in this step */
    int head;               /* first query head */
};

/* A run of keys that lie at equal distances in memory. */
struct key_run {
    const float *k, *v;
    size_t stride;
    int n;
};

/* The longest such run from position t on, up to `end`: in the ring up to its wrap or to the
 * step's own rows, or in the step. */
static struct key_run keys_at(const struct window_view *w, int64_t t, int64_t end)
{
    int64_t ring_rows = w->call->shape->ring_rows, d = w->call->shape->head_dim;
    if (t >= w->t0) {
        size_t at = (size_t)(t - w->t0) * w->stride;
        return (struct key_run){w->k + at, w->v + at, w->stride, (int)(end - t)};
    }
    int64_t row = t % ring_rows, n = (end < w->t0 ? end : w->t0) - t;
    if (n > ring_rows - row)
        n = ring_rows - row;
    return (struct key_run){w->ring_k + row * d, w->ring_v + row * d, (size_t)d, (int)n};
}

/* A few (row, query head) pairs of a view, worked on together. */
struct window_tile {
    int n;
    int64_t position[TILE];
    size_t at[TILE]; /* head's index in [R, H] */
    float top[TILE], sum[TILE], keep[TILE];
    float *q, *acc; /* [TILE, d] */
    float *scores;  /* [TILE, KEY_BLOCK] */
    float *turned;  /* [KEY_BLOCK, d] values with VAPOR, and 2 rows of angles */
};

static int64_t oldest_key(const struct window_view *w, int64_t t)
{
    int64_t oldest = t - w->call->shape->ring_rows + 1;
    return oldest > 0 ? oldest : 0;
}

/* VAPOR: positions are turned relative to their key block's first one, by tables that serve
 * all blocks: angle -j * theta for j below KEY_BLOCK, then +KEY_BLOCK * theta. */
static const float *vapor_angles(const struct window_view *w, int j)
{
    size_t d = (size_t)w->call->shape->head_dim;
    return w->call->cpu->vapor + ((size_t)w->head * (KEY_BLOCK + 1) + (size_t)j) * d;
}

static const float *turn_values(const struct window_view *w, const struct window_tile *tile,
                                const struct key_run *keys, int first)
{
    int d = w->call->shape->head_dim, half = d / 2;
    for (int j = 0; j < keys->n; j++) {
        const float *sine = vapor_angles(w, first + j);
        w->call->cpu->kernels->turn(tile->turned + (size_t)j * d,
                                    keys->v + (size_t)j * keys->stride, sine, sine + half, half);
    }
    return tile->turned;
}

/* Move the sums' reference to the key block at base, for rows that reach it. */
static void turn_sums(const struct window_view *w, const struct window_tile *tile, int64_t base)
{
    int d = w->call->shape->head_dim, half = d / 2;
    const float *sine = vapor_angles(w, KEY_BLOCK);
    for (int i = 0; i < tile->n; i++)
        if (tile->position[i] >= base)
            w->call->cpu->kernels->turn(tile->acc + (size_t)i * d, tile->acc + (size_t)i * d, sine,
                                        sine + half, half);
}

/* From the first position of the row's last block to the row's own. */
static void turn_result(const struct window_view *w, const struct window_tile *tile, int i)
{
    int d = w->call->shape->head_dim, half = d / 2;
    const float *angle = vapor_angles(w, (int)(tile->position[i] % KEY_BLOCK));
    float *sine = tile->turned + (size_t)KEY_BLOCK * d;
    for (int j = 0; j < half; j++)
        sine[j] = -angle[j];
    w->call->cpu->kernels->turn(tile->acc + (size_t)i * d, tile->acc + (size_t)i * d, sine,
                                angle + half, half);
}

/* Positions base..base+KEY_BLOCK-1 for all rows of the tile. Blocks lie at multiples of
 * KEY_BLOCK and not at the window's edge, so a row meets the same ones in every chunking. */
static void window_block(const struct window_view *w, struct window_tile *tile, int64_t base)
{
    const struct kernels *k = w->call->cpu->kernels;
    const struct window_shape *sh = w->call->shape;
    int d = sh->head_dim, last = tile->n - 1;
    int64_t first = oldest_key(w, tile->position[0]), end = tile->position[last] + 1;
    if (first < base)
        first = base;
    if (end > base + KEY_BLOCK)
        end = base + KEY_BLOCK;
    struct key_run keys;
    for (int64_t t = first; t < end; t += keys.n) {
        keys = keys_at(w, t, end);
        k->dots(tile->scores + (t - base), KEY_BLOCK, tile->q, (size_t)d, tile->n, keys.k,
                keys.stride, keys.n, NULL, d);
    }
    for (int i = 0; i < tile->n; i++) {
        int64_t lo = oldest_key(w, tile->position[i]) - base, hi = tile->position[i] + 1 - base;
        tile->keep[i] = k->soft_block(tile->scores + i * KEY_BLOCK, lo > 0 ? (int)lo : 0,
                                      hi < KEY_BLOCK ? (int)hi : KEY_BLOCK, sh->scale, sh->softcap,
                                      &tile->top[i], &tile->sum[i]);
    }
    for (int64_t t = first; t < end; t += keys.n) {
        keys = keys_at(w, t, end);
        const float *v = keys.v;
        size_t stride = keys.stride;
        if (w->call->theta) {
            v = turn_values(w, tile, &keys, (int)(t - base));
            stride = (size_t)d;
        }
        k->accumulate(tile->acc, (size_t)d, t == first ? tile->keep : NULL,
                      tile->scores + (t - base), tile->n, v, stride, keys.n, d);
    }
}

static void finish_tile(const struct window_view *w, struct window_tile *tile)
{
    const struct window_call *call = w->call;
    size_t d = (size_t)call->shape->head_dim;
    for (int i = 0; i < tile->n; i++) {
        float scale = 1 / tile->sum[i];
        if (call->theta)
            turn_result(w, tile, i);
        if (call->p0)
            scale *= call->p0[tile->at[i]];
        call->cpu->kernels->blend(call->out + tile->at[i] * d, tile->acc + (size_t)i * d,
                                  call->p0 ? 1 : 0, scale, (int)d);
    }
}

static void window_tile(const struct window_view *w, struct window_tile *tile)
{
    size_t d = (size_t)w->call->shape->head_dim;
    for (int i = 0; i < tile->n; i++) {
        memcpy(tile->q + (size_t)i * d, w->call->q + tile->at[i] * d, d * sizeof(float));
        tile->top[i] = -INFINITY;
        tile->sum[i] = 0;
    }
    memset(tile->acc, 0, (size_t)tile->n * d * sizeof(float));
    int64_t first = oldest_key(w, tile->position[0]) / KEY_BLOCK * KEY_BLOCK;
    int64_t last = tile->position[tile->n - 1];
    for (int64_t base = first; base <= last; base += KEY_BLOCK) {
        if (w->call->theta && base > first)
            turn_sums(w, tile, base);
        window_block(w, tile, base);
    }
    finish_tile(w, tile);
}

static void store_keys(const struct window_view *w)
{
    size_t d = (size_t)w->call->shape->head_dim, bytes = d * sizeof(float);
    int64_t ring_rows = w->call->shape->ring_rows;
    int first = w->n_rows > ring_rows ? w->n_rows - (int)ring_rows : 0;
    for (int r = first; r < w->n_rows; r++) {
        size_t row = (size_t)((w->t0 + r) % ring_rows);
        memcpy(w->ring_k + row * d, w->k + (size_t)r * w->stride, bytes);
        memcpy(w->ring_v + row * d, w->v + (size_t)r * w->stride, bytes);
    }
}

static struct window_view view_of(const struct window_call *call, int seq, int head)
{
    const struct window_shape *sh = call->shape;
    const struct step *step = call->cpu->step;
    int row = step->seq_start[seq], slot = step->seq_slot[seq];
    int kv = head / (sh->n_heads / sh->n_kv_heads);
    size_t d = (size_t)sh->head_dim, stride = (size_t)sh->n_kv_heads * d;
    size_t ring = (size_t)kv * (size_t)sh->ring_rows * d;
    return (struct window_view){
        .call = call,
        .k = call->k + (size_t)row * stride + (size_t)kv * d,
        .v = call->v + (size_t)row * stride + (size_t)kv * d,
        .ring_k = slab_row(call->ring_k, slot) + ring,
        .ring_v = slab_row(call->ring_v, slot) + ring,
        .stride = stride,
        .t0 = step->positions[row],
        .n_rows = step->seq_start[seq + 1] - row,
        .head = head,
    };
}

/* The rows of one block for the query heads of one group, tile by tile. */
static void window_item(void *context, int item, int thread)
{
    const struct window_call *call = context;
    int H = call->shape->n_heads, n_groups = H / call->group;
    const struct row_run *rows = &call->cpu->blocks[item / n_groups];
    struct window_view view = view_of(call, rows->seq, item % n_groups * call->group);
    size_t d = (size_t)call->shape->head_dim;
    struct window_tile tile = {.q = call->cpu->scratch[thread]};
    tile.acc = tile.q + TILE * d;
    tile.scores = tile.acc + TILE * d;
    tile.turned = tile.scores + TILE * KEY_BLOCK;
    int n_pairs = rows->n * call->group;
    for (int pair = 0; pair < n_pairs; pair += TILE) {
        tile.n = n_pairs - pair < TILE ? n_pairs - pair : TILE;
        for (int i = 0; i < tile.n; i++) {
            int row = rows->first + (pair + i) / call->group;
            tile.position[i] = call->cpu->step->positions[row];
            tile.at[i] = (size_t)row * H + (size_t)(view.head + (pair + i) % call->group);
        }
        window_tile(&view, &tile);
    }
    if (call->store_inline)
        store_keys(&view);
}

/* Only after all rows are done: these keys replace ring rows that earlier rows still read. */
static void store_item(void *context, int item, int thread)
{
    const struct window_call *call = context;
    const struct window_shape *sh = call->shape;
    int seq = item / sh->n_kv_heads, kv = item % sh->n_kv_heads;
    struct window_view view = view_of(call, seq, kv * (sh->n_heads / sh->n_kv_heads));
    (void)thread;
    store_keys(&view);
}

static void vapor_table_item(void *context, int h, int thread)
{
    const struct window_call *call = context;
    int d = call->shape->head_dim, half = d / 2;
    struct window_view view = {.call = call, .head = h};
    double *frequency = call->cpu->angles[thread];
    theta_frequencies(frequency, call->theta + (size_t)h * half, half);
    for (int j = 0; j <= KEY_BLOCK; j++) {
        float *sine = (float *)vapor_angles(&view, j);
        call->cpu->kernels->angles(sine, sine + half, frequency, j < KEY_BLOCK ? -j : j, half);
    }
}

void cpu_window(struct backend *b, struct buffer *out, const struct buffer *p0,
                const struct buffer *q, const struct buffer *k, const struct buffer *v,
                const struct slab *ring_k, const struct slab *ring_v,
                const struct buffer *vapor_theta, const struct window_shape *shape)
{
    struct cpu *c = cpu_of(b);
    const struct step *step = c->step;
    int H = shape->n_heads, KV = shape->n_kv_heads;
    CHECK(H * shape->head_dim <= c->options.max_dim);
    struct window_call call = {
        .cpu = c,
        .out = values(out),
        .p0 = values(p0),
        .q = values(q),
        .k = values(k),
        .v = values(v),
        .theta = values(vapor_theta),
        .ring_k = ring_k,
        .ring_v = ring_v,
        .shape = shape,
        .group = vapor_theta ? 1 : H / KV,
        .store_inline = c->n_blocks == step->n_seqs && (!vapor_theta || H == KV),
    };
    if (vapor_theta)
        pool_run(c->pool, H, vapor_table_item, &call);
    size_t n_values = (size_t)step->n_rows * (size_t)H * (size_t)shape->head_dim *
                      (size_t)(shape->ring_rows < 4096 ? shape->ring_rows : 4096) / 4;
    cpu_each(c, c->n_blocks * (H / call.group), n_values, window_item, &call);
    if (!call.store_inline)
        cpu_each(c, step->n_seqs * KV, (size_t)step->n_rows * (size_t)(KV * shape->head_dim),
                 store_item, &call);
}
