/* backend_cpu.c - the fast CPU backend: opening it, and the ops that work row by row.
 *
 * Products with weights are in cpu_linear.c; what mixes rows of a sequence is in cpu_mix.c.
 * Ops cut their work into items for the pool in such a way that no sum is ever split between
 * items: results do not depend on the number of threads.
 */
#include <cblas.h>
#include <stdlib.h>
#include <string.h>

#include "engine/cpu.h"

enum {
    SERIAL_VALUES = 16384, /* smaller loops stay on the caller: some microseconds of work */
    ITEM_VALUES = 8192,    /* values of an elementwise item */
};

void cpu_each(struct cpu *c, int n_items, size_t n_values, pool_fn *fn, void *context)
{
    if (n_values >= SERIAL_VALUES) {
        pool_run(c->pool, n_items, fn, context);
        return;
    }
    for (int i = 0; i < n_items; i++)
        fn(context, i, 0);
}

/* ---- steps ---- */

static void plan_blocks(struct cpu *c)
{
    const struct step *step = c->step;
    c->n_blocks = 0;
    for (int i = 0; i < step->n_seqs; i++) {
        for (int r = step->seq_start[i]; r < step->seq_start[i + 1]; r += ROWS_PER_BLOCK) {
            int left = step->seq_start[i + 1] - r;
            c->blocks[c->n_blocks++] =
                (struct row_run){r, left < ROWS_PER_BLOCK ? left : ROWS_PER_BLOCK, i};
        }
    }
}

static bool cpu_begin(struct backend *b, const struct step *step)
{
    struct cpu *c = (struct cpu *)b;
    step_check(step, &c->options);
    c->step = step;
    cpu_plan_rows(c);
    plan_blocks(c);
    return false;
}

/* Ops compute when they are called, so nothing is left to start or to wait for. */
static enum status cpu_submit(struct backend *b, struct error *err)
{
    (void)err;
    ((struct cpu *)b)->step = NULL;
    return STATUS_OK;
}

static enum status cpu_wait(struct backend *b, const struct sampled **results, struct error *err)
{
    (void)b, (void)err;
    if (results)
        *results = NULL;
    return STATUS_OK;
}

/* ---- elementwise ops ---- */

struct row_call {
    const struct kernels *kernels;
    const struct norm *norm;
    float *out;
    const float *in, *other;
    enum activation act;
    float cap;
    size_t n;          /* values in all, or rows */
    size_t n_per_item; /* of them */
    int dim;
};

static void each_item(struct cpu *c, struct row_call *call, size_t n, size_t value_cost,
                      size_t n_per_item, pool_fn *fn)
{
    call->kernels = c->kernels;
    call->n = n;
    call->n_per_item = n_per_item;
    cpu_each(c, (int)((n + n_per_item - 1) / n_per_item), n * value_cost, fn, call);
}

/* Items are ranges of rows or of values. */
static size_t item_range(const struct row_call *call, int item, size_t *first)
{
    *first = (size_t)item * call->n_per_item;
    size_t left = call->n - *first;
    return left < call->n_per_item ? left : call->n_per_item;
}

static void norm_item(void *context, int item, int thread)
{
    const struct row_call *call = context;
    const struct norm *w = call->norm;
    size_t first, n = item_range(call, item, &first), dim = (size_t)call->dim;
    (void)thread;
    for (size_t r = first; r < first + n; r++)
        call->kernels->norm(call->out + r * dim, call->in + r * dim, values(w->weight),
                            values(w->bias), w->type, w->eps, call->dim);
}

static void norm_rows(struct cpu *c, float *out, const float *in, const struct norm *w, int dim,
                      size_t n)
{
    struct row_call call = {.norm = w, .out = out, .in = in, .dim = dim};
    each_item(c, &call, n, (size_t)dim, ITEM_VALUES / (size_t)dim + 1, norm_item);
}

static void cpu_norm(struct backend *b, struct buffer *out, const struct buffer *in,
                     const struct norm *w, int dim, enum row_set rows)
{
    struct cpu *c = cpu_of(b);
    norm_rows(c, values(out), values(in), w, dim, (size_t)step_rows(c->step, rows));
}

static void cpu_head_norm(struct backend *b, struct buffer *x, const struct norm *w, int n_heads,
                          int head_dim)
{
    struct cpu *c = cpu_of(b);
    norm_rows(c, values(x), values(x), w, head_dim, (size_t)c->step->n_rows * (size_t)n_heads);
}

static void add_item(void *context, int item, int thread)
{
    const struct row_call *call = context;
    size_t first, n = item_range(call, item, &first);
    (void)thread;
    call->kernels->add(call->out + first, call->in + first, n);
}

static void cpu_add(struct backend *b, struct buffer *x, const struct buffer *y, int dim)
{
    struct cpu *c = cpu_of(b);
    struct row_call call = {.out = values(x), .in = values(y)};
    each_item(c, &call, (size_t)c->step->n_rows * (size_t)dim, 1, ITEM_VALUES, add_item);
}

static void activate_item(void *context, int item, int thread)
{
    const struct row_call *call = context;
    size_t first, n = item_range(call, item, &first);
    (void)thread;
    call->kernels->activate(call->out + first, call->in ? call->in + first : NULL,
                            call->other + first, call->act, n);
}

static void cpu_activate(struct backend *b, struct buffer *out, const struct buffer *gate,
                         const struct buffer *up, enum activation act, int dim)
{
    struct cpu *c = cpu_of(b);
    struct row_call call = {
        .out = values(out), .in = values(gate), .other = values(up), .act = act};
    each_item(c, &call, (size_t)c->step->n_rows * (size_t)dim, 4, ITEM_VALUES, activate_item);
}

static void cpu_gather(struct backend *b, struct buffer *out, const struct buffer *in, int dim)
{
    const struct step *step = cpu_of(b)->step;
    for (int i = 0; i < step->n_logit_rows; i++)
        memcpy(values(out) + (size_t)i * (size_t)dim,
               values(in) + (size_t)step->logit_rows[i] * (size_t)dim, (size_t)dim * sizeof(float));
}

static void softcap_item(void *context, int item, int thread)
{
    const struct row_call *call = context;
    size_t first, n = item_range(call, item, &first);
    (void)thread;
    call->kernels->softcap(call->out + first, call->cap, n);
}

static void cpu_softcap(struct backend *b, struct buffer *x, float cap, int dim)
{
    struct cpu *c = cpu_of(b);
    struct row_call call = {.out = values(x), .cap = cap};
    each_item(c, &call, (size_t)c->step->n_logit_rows * (size_t)dim, 4, ITEM_VALUES, softcap_item);
}

struct block_call {
    struct cpu *cpu;
    const float *in, *weight, *bias;
    float *out;
    int dim, width, n_blocks;
};

/* One diagonal block of weights for some rows of the step. */
static void block_item(void *context, int item, int thread)
{
    const struct block_call *call = context;
    int block = item % call->n_blocks, first = item / call->n_blocks * ROWS_PER_BLOCK;
    int left = call->cpu->step->n_rows - first, at = block * call->width;
    (void)thread;
    call->cpu->kernels->dots(call->out + (size_t)first * call->dim + at, (size_t)call->dim,
                             call->in + (size_t)first * call->dim + at, (size_t)call->dim,
                             left < ROWS_PER_BLOCK ? left : ROWS_PER_BLOCK,
                             call->weight + (size_t)at * call->width, (size_t)call->width,
                             call->width, call->bias ? call->bias + at : NULL, call->width);
}

static void cpu_block_linear(struct backend *b, struct buffer *out, const struct buffer *in,
                             const struct buffer *weight, const struct buffer *bias, int dim,
                             int n_blocks)
{
    struct cpu *c = cpu_of(b);
    struct block_call call = {c,           values(in), values(weight), values(bias),
                              values(out), dim,        dim / n_blocks, n_blocks};
    int n_items = (c->step->n_rows + ROWS_PER_BLOCK - 1) / ROWS_PER_BLOCK * n_blocks;
    size_t n_values = (size_t)c->step->n_rows * (size_t)dim * (size_t)call.width / 4;
    cpu_each(c, n_items, n_values, block_item, &call);
}

/* ---- opening ---- */

static void cpu_close(struct backend *b)
{
    struct cpu *c = (struct cpu *)b;
    for (int i = 0; c->scratch && i < c->options.n_threads; i++)
        free(c->scratch[i]);
    for (int i = 0; c->angles && i < c->options.n_threads; i++)
        free(c->angles[i]);
    free(c->plans[ROWS_STEP].tiles);
    free(c->plans[ROWS_STEP].prompts);
    free(c->plans[ROWS_LOGITS].tiles);
    free(c->plans[ROWS_LOGITS].prompts);
    free(c->blocks);
    free(c->packed);
    free(c->vapor);
    free(c->sinusoid);
    free(c->scratch);
    free(c->angles);
    pool_close(c->pool);
    free(c);
}

/* One allocation of n values; remembers a failure in *failed. */
static void *take(size_t n, size_t size, bool *failed)
{
    void *block = n <= SIZE_MAX / 2 / size ? host_block(n * size) : NULL;
    *failed |= !block;
    return block;
}

static void take_plans(struct cpu *c, bool *failed)
{
    size_t rows = (size_t)c->options.max_rows, seqs = (size_t)c->options.max_seqs;
    for (int i = 0; i < 2; i++) {
        c->plans[i].tiles = take(rows, sizeof(struct row_run), failed);
        c->plans[i].prompts = take(seqs, sizeof(struct row_run), failed);
    }
    c->blocks = take(rows / ROWS_PER_BLOCK + seqs, sizeof(struct row_run), failed);
}

static void take_thread_scratch(struct cpu *c, bool *failed)
{
    size_t linear = cpu_linear_scratch(&c->options), mix = cpu_mix_scratch(&c->options);
    size_t n_threads = (size_t)c->options.n_threads;
    c->scratch = take(n_threads, sizeof(*c->scratch), failed);
    c->angles = take(n_threads, sizeof(*c->angles), failed);
    for (size_t i = 0; i < n_threads && !*failed; i++) {
        c->scratch[i] = take(linear > mix ? linear : mix, sizeof(float), failed);
        c->angles[i] = take((size_t)c->options.max_dim, sizeof(double), failed);
    }
}

static enum status take_memory(struct cpu *c, struct error *err)
{
    bool failed = false;
    size_t rows = (size_t)c->options.max_rows, dim = (size_t)c->options.max_dim;
    take_plans(c, &failed);
    c->packed = take(rows * dim, sizeof(float), &failed);
    c->vapor = take((KEY_BLOCK + 1) * dim, sizeof(float), &failed);
    c->sinusoid = take(dim, sizeof(double), &failed);
    take_thread_scratch(c, &failed);
    if (failed)
        return fail(err, STATUS_NOMEM, "CPU backend for %zu rows of %zu values: out of memory",
                    rows, dim);
    return STATUS_OK;
}

static const struct backend_ops cpu_ops = {
    .name = "cpu",
    .close = cpu_close,
    .buffer_open = host_buffer_open,
    .buffer_close = host_buffer_close,
    .write = host_write,
    .read = host_read,
    .copy = host_copy,
    .linear_open = cpu_linear_open,
    .linear_close = host_linear_close,
    .begin = cpu_begin,
    .submit = cpu_submit,
    .wait = cpu_wait,
    .depth = 1,
    .map = host_map,
    .embed = cpu_embed,
    .norm = cpu_norm,
    .head_norm = cpu_head_norm,
    .linear = cpu_linear,
    .add = cpu_add,
    .activate = cpu_activate,
    .gather = cpu_gather,
    .softcap = cpu_softcap,
    .conv = cpu_conv,
    .rglru = cpu_rglru,
    .block_linear = cpu_block_linear,
    .rope = cpu_rope,
    .vapor = cpu_vapor,
    .latent = cpu_latent,
    .window = cpu_window,
};

enum status backend_cpu_open_as(struct backend **out, const struct backend_options *options,
                                const struct kernels *kernels, struct error *err)
{
    CHECK(options->max_rows >= 1 && options->max_seqs >= 1 && options->max_dim >= 1);
    struct cpu *c = calloc(1, sizeof(*c));
    if (!c)
        return fail(err, STATUS_NOMEM, "CPU backend: out of memory");
    c->base.ops = &cpu_ops;
    c->options = *options;
    c->kernels = kernels;
    openblas_set_num_threads(1); /* the pool's threads each call it for a part */
    c->library_gemm =
        (kernels != kernels_find("avx512") || cpu_library_is_wide()) && cpu_library_is_right();
    enum status st = pool_open(&c->pool, options->n_threads, err);
    if (!st)
        st = take_memory(c, err);
    if (st) {
        cpu_close(&c->base);
        return st;
    }
    *out = &c->base;
    return STATUS_OK;
}

enum status backend_cpu_open(struct backend **out, const struct backend_options *options,
                             struct error *err)
{
    return backend_cpu_open_as(out, options, kernels_pick(), err);
}
