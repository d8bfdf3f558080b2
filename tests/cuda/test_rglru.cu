/* test_rglru.cu - the RG-LRU from the residual stream and the norms around it, against loops in
 * double precision over whole sessions.
 *
 * The oracle takes h as norm_to_bf16 gives it, after that was checked, and the gates' weights
 * rounded to bf16: what is left are sums in f32 and the quick exponentials, 1e-5. A decode row's
 * h that is not the prompt's bit for bit would show as an error of 2^-8.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/kernels/cuda/fused.cuh"

extern "C" {
#include "tests/unit/unit.h"
}

enum { MAX_ROWS = 9000, MAX_SEQS = 256 };

static uint32_t seed;

static float random_float(float scale)
{
    return scale * ((float)(test_random(&seed) >> 8) / (1 << 23) - 1);
}

static float to_bf16(float x)
{
    return __bfloat162float(__float2bfloat16_rn(x));
}

/* ---- a backend and its memory ---- */

static struct backend *open_backend(int rows, int seqs, int dim)
{
    struct backend_options options = {};
    struct backend *b = NULL;
    struct error err = {};
    options.n_threads = 1;
    options.max_rows = options.max_logit_rows = rows;
    options.max_seqs = seqs;
    options.n_slots = seqs + 1;
    options.max_dim = dim;
    options.composed = true;
    if (!backend_cuda_count()) {
        print_message("skipped: no GPU\n");
        skip();
    }
    if (backend_cuda_open(&b, &options, &err))
        fail_msg("%s", err.text);
    return b;
}

static float *put(struct backend *b, struct buffer **buffer, const float *x, size_t n)
{
    assert_int_equal(b->ops->buffer_open(b, buffer, n * sizeof(float), NULL), STATUS_OK);
    assert_int_equal(b->ops->write(b, *buffer, 0, x, n * sizeof(float), NULL), STATUS_OK);
    return floats(*buffer);
}

static float *take(size_t n, float scale)
{
    float *x = (float *)malloc((n + 1) * sizeof(float));
    assert_non_null(x);
    for (size_t i = 0; i < n; i++)
        x[i] = random_float(scale);
    return x;
}

struct batch {
    struct step step;
    int32_t tokens[MAX_ROWS], slot[MAX_SEQS], start[MAX_SEQS + 1], logit_rows[1];
    int64_t positions[MAX_ROWS];
};

static void batch_init(struct batch *b)
{
    memset(b, 0, sizeof(*b));
    b->step.tokens = b->tokens;
    b->step.positions = b->positions;
    b->step.seq_slot = b->slot;
    b->step.seq_start = b->start;
    b->step.logit_rows = b->logit_rows;
}

static void batch_add(struct batch *b, int slot, int64_t position, int n)
{
    for (int r = 0; r < n; r++)
        b->positions[b->step.n_rows + r] = position + r;
    b->slot[b->step.n_seqs++] = slot;
    b->step.n_rows += n;
    b->start[b->step.n_seqs] = b->step.n_rows;
}

static void begin(struct backend *b, const struct batch *batch)
{
    assert_false(b->ops->begin(b, &batch->step));
}

static void finish(struct backend *b)
{
    struct error err = {};
    if (b->ops->submit(b, &err) || b->ops->wait(b, NULL, &err))
        fail_msg("%s", err.text);
}

static void get(struct backend *b, void *out, const struct buffer *from, size_t n_bytes)
{
    assert_int_equal(b->ops->read(b, out, from, 0, n_bytes, NULL), STATUS_OK);
}

/* ---- a layer's RG-LRU ---- */

enum {
    X,
    NORM,
    NORM_BIAS,
    R_GATE,
    R_BIAS,
    I_GATE,
    I_BIAS,
    LAMBDA,
    STATE,
    Z,
    PRODUCTS,
    Z_NORM,
    NORMED,
    H,
    N_BUFFERS
};

struct unit {
    struct backend *b;
    struct batch batch;
    struct rglru_front f;
    struct buffer *buffer[N_BUFFERS];
    float *host[N_BUFFERS];
    int dim, n_blocks, n_slots;
};

static float *fill(struct unit *u, int i, size_t n, float scale)
{
    u->host[i] = take(n, scale);
    return put(u->b, &u->buffer[i], u->host[i], n);
}

/* The batch is set; max_rows and max_seqs are what the unit may see later. layer: LayerNorm with
 * a bias; biased: gates have biases. */
static void unit_open(struct unit *u, int max_rows, int max_seqs, int dim, int n_blocks, bool layer,
                      bool biased)
{
    const size_t D = (size_t)dim, n = (size_t)max_rows * D;
    u->b = open_backend(max_rows, max_seqs, dim);
    u->dim = dim;
    u->n_blocks = n_blocks;
    u->n_slots = max_seqs + 1;
    struct rglru_front *f = &u->f;
    *f = {};
    f->x = fill(u, X, n, 2);
    f->norm = {fill(u, NORM, D, 1.5f), NULL, layer ? NORM_LAYER : NORM_RMS, 1e-6f};
    if (layer)
        f->norm.bias = fill(u, NORM_BIAS, D, 0.5f);
    f->recurrence_gate = fill(u, R_GATE, D * D / (size_t)n_blocks, 0.3f);
    f->input_gate = fill(u, I_GATE, D * D / (size_t)n_blocks, 0.3f);
    if (biased) {
        f->recurrence_bias = fill(u, R_BIAS, D, 2);
        f->input_bias = fill(u, I_BIAS, D, 2);
    }
    f->lambda = fill(u, LAMBDA, D, 4);
    f->state = {fill(u, STATE, (size_t)u->n_slots * D, 1), dim};
    f->z = fill(u, Z, n, 0);
    f->products = (__half *)fill(u, PRODUCTS, n, 0);
    f->z_norm = {fill(u, Z_NORM, D, 1.5f), NULL, NORM_RMS, 1e-6f};
    f->normed = (bf16 *)fill(u, NORMED, n, 0);
    f->dim = dim;
    f->n_blocks = n_blocks;
    u->host[H] = take(n, 0);
    assert_int_equal(u->b->ops->buffer_open(u->b, &u->buffer[H], n * sizeof(bf16), NULL),
                     STATUS_OK);
}

static void unit_close(struct unit *u)
{
    for (int i = 0; i < N_BUFFERS; i++) {
        u->b->ops->buffer_close(u->b, u->buffer[i]);
        free(u->host[i]);
    }
    u->b->ops->close(u->b);
    free(u);
}

static struct unit *unit_new(void)
{
    struct unit *u = (struct unit *)calloc(1, sizeof(*u));
    assert_non_null(u);
    batch_init(&u->batch);
    return u;
}

/* h of the batch's rows, as the GPU norms them; checked against double: bf16 has 8 bits. */
static void make_h(struct unit *u)
{
    const int n = u->batch.step.n_rows, D = u->dim;
    bf16 *h = (bf16 *)malloc((size_t)n * D * sizeof(bf16));
    struct cuda *c = cuda_of(u->b);
    begin(u->b, &u->batch);
    norm_to_bf16(c, (bf16 *)u->buffer[H]->data, u->f.x, u->f.norm, D, NULL, c->step.rows,
                 &c->step.sizes->n_rows);
    finish(u->b);
    get(u->b, h, u->buffer[H], (size_t)n * D * sizeof(bf16));
    for (int r = 0; r < n; r++) {
        const float *x = u->host[X] + (size_t)r * D;
        double mean = 0, square = 0;
        for (int i = 0; i < D && u->f.norm.type == NORM_LAYER; i++)
            mean += (double)x[i] / D;
        for (int i = 0; i < D; i++)
            square += (x[i] - mean) * (x[i] - mean) / D;
        for (int i = 0; i < D; i++) {
            const double bias = u->host[NORM_BIAS] ? u->host[NORM_BIAS][i] : 0;
            const double want = (x[i] - mean) / sqrt(square + 1e-6) * u->host[NORM][i] + bias;
            const double got = u->host[H][(size_t)r * D + i] =
                __bfloat162float(h[(size_t)r * D + i]);
            if (!(fabs(got - want) <= 1e-6 + fabs(want) * 0x1.02p-8))
                fail_msg("h %d %d of %d: %.9g, expected %.9g", r, i, D, got, want);
        }
    }
    free(h);
}

static double gate(const struct unit *u, int weight, int bias, const float *h, int i)
{
    const int width = u->dim / u->n_blocks, first = i / width * width;
    double sum = u->host[bias] ? u->host[bias][i] : 0;
    for (int k = 0; k < width; k++)
        sum += (double)h[first + k] * to_bf16(u->host[weight][(size_t)i * width + k]);
    return 1 / (1 + exp(-sum));
}

/* A row of z [D] and what its norm made of it. Products of a have 11 bits: an error relative to
 * z from the piece's beginning, which may cancel. */
static void expect_normed(const struct unit *u, int r, const bf16 *normed, const double *z)
{
    double square = 0, most = 0;
    for (int i = 0; i < u->dim; i++) {
        square += z[i] * z[i] / u->dim;
        most = fmax(most, fabs(z[i]));
    }
    for (int i = 0; i < u->dim; i++) {
        const double factor = u->host[Z_NORM][i] / sqrt(square + 1e-6), want = z[i] * factor;
        const double got = __bfloat162float(normed[i]);
        const double error = 0x1.02p-8 * fabs(want) + 0x1p-11 * most * fabs(factor) + 1e-6;
        if (!(fabs(got - want) <= error))
            fail_msg("normed z of row %d of %d, channel %d of %d: %.9g, expected %.9g", r,
                     u->batch.step.n_rows, i, u->dim, got, want);
    }
}

static void expect(const char *what, const struct unit *u, int r, int i, float got, double want)
{
    if (!(fabs(got - want) <= 1e-5 * (1 + fabs(want))))
        fail_msg("%s of row %d of %d, channel %d of %d: %.9g, expected %.9g", what, r,
                 u->batch.step.n_rows, i, u->dim, got, want);
}

/* Put the states; a fresh slot may hold anything. */
static void put_states(struct unit *u)
{
    const struct step *step = &u->batch.step;
    const size_t D = (size_t)u->dim, n_bytes = (size_t)u->n_slots * D * sizeof(float);
    for (int s = 0; s < step->n_seqs; s++)
        for (size_t i = 0; i < D && step->positions[step->seq_start[s]] == 0; i++)
            u->host[STATE][(size_t)step->seq_slot[s] * D + i] = NAN;
    assert_int_equal(u->b->ops->write(u->b, u->buffer[STATE], 0, u->host[STATE], n_bytes, NULL),
                     STATUS_OK);
}

/* Every row's z, or its norm, unless NULL, and every state against the oracle, which starts from
 * host[STATE] and leaves the states there. */
static void check_sessions(struct unit *u, const float *state, const float *z, const bf16 *normed)
{
    const struct step *step = &u->batch.step;
    const size_t D = (size_t)u->dim;
    double *all = (double *)malloc((size_t)step->n_rows * D * sizeof(*all));
    for (int s = 0; s < step->n_seqs; s++) {
        float *at = u->host[STATE] + (size_t)step->seq_slot[s] * D;
        const float *left = state + (size_t)step->seq_slot[s] * D;
        for (int i = 0; i < u->dim; i++) {
            double past = at[i];
            for (int r = step->seq_start[s]; r < step->seq_start[s + 1]; r++) {
                const float *h = u->host[H] + (size_t)r * D;
                const double log_a =
                    -8 * log1p(exp((double)u->host[LAMBDA][i])) * gate(u, R_GATE, R_BIAS, h, i);
                const double gated = gate(u, I_GATE, I_BIAS, h, i) * h[i];
                past = step->positions[r] == 0
                           ? gated
                           : exp(log_a) * past + sqrt(-expm1(2 * log_a)) * gated;
                all[(size_t)r * D + i] = past;
                if (z)
                    expect("z", u, r, i, z[(size_t)r * D + i], past);
            }
            expect("state", u, step->seq_start[s + 1] - 1, i, left[i], past);
            at[i] = left[i];
        }
    }
    for (int r = 0; normed && r < step->n_rows; r++)
        expect_normed(u, r, normed + (size_t)r * D, all + (size_t)r * D);
    free(all);
    assert_memory_equal(state, u->host[STATE], (size_t)u->n_slots * D * sizeof(float));
}

/* Run the batch. Rows and slots that take no part must stay as they are. */
static void run_and_check(struct unit *u, int max_rows)
{
    const struct step *step = &u->batch.step;
    const size_t D = (size_t)u->dim, n_states = (size_t)u->n_slots * D;
    const size_t n_z = (size_t)max_rows * D;
    make_h(u);
    put_states(u);
    const bool decode = step->n_rows == step->n_seqs;
    const int out = decode ? Z : NORMED; /* floats; NaN as bf16 */
    for (size_t i = 0; i < n_z; i++)
        u->host[out][i] = decode ? -77 : NAN;
    assert_int_equal(u->b->ops->write(u->b, u->buffer[out], 0, u->host[out], n_z * 4, NULL),
                     STATUS_OK);

    struct rglru_front f = u->f;
    if (step->n_rows % 2) { /* h given, and nothing else to take it from */
        f.h = (const bf16 *)u->buffer[H]->data;
        f.x = NULL;
        f.norm.weight = f.norm.bias = NULL;
    }
    begin(u->b, &u->batch);
    assert_true(fused_rglru(cuda_of(u->b), &f));
    finish(u->b);

    float *state = take(n_states, 0), *z = take(n_z, 0);
    get(u->b, state, u->buffer[STATE], n_states * 4);
    get(u->b, z, u->buffer[out], n_z * 4);
    if (decode)
        check_sessions(u, state, z, NULL);
    else
        check_sessions(u, state, NULL, (const bf16 *)z);
    const size_t untouched = (size_t)step->n_rows * D * (decode ? 4 : 2);
    assert_memory_equal((char *)z + untouched, (char *)u->host[out] + untouched,
                        n_z * 4 - untouched);
    free(state);
    free(z);
}

/* z as it is left with its norm's weight and its squares. */
static void check_weighted(const struct unit *u, int max_rows, const float *state,
                           const bf16 *values, const float *parts)
{
    const struct step *step = &u->batch.step;
    const int D = u->dim, n_parts = D / 8;
    for (int r = 0; r < max_rows; r++) {
        const float *z = r < step->n_rows ? state + (size_t)step->seq_slot[r] * D : NULL;
        for (int i = 0; i < D; i++) {
            const float got = __bfloat162float(values[(size_t)r * D + i]);
            if (z ? got != to_bf16(z[i] * u->host[Z_NORM][i]) : !isnan(got))
                fail_msg("weighted z of row %d of %d, channel %d: %g", r, step->n_rows, i, got);
        }
        for (int i = 0; z && i < n_parts; i++) {
            double want = 0;
            for (int k = 8 * i; k < 8 * i + 8; k++)
                want += (double)z[k] * z[k];
            expect("squares", u, r, i, parts[r * n_parts + i], want);
        }
    }
}

/* h given, and z left with its norm's weight and squares. */
static void run_weighted(struct unit *u, int max_rows)
{
    const size_t D = (size_t)u->dim, n = (size_t)max_rows * D, n_parts = (size_t)max_rows * D / 8;
    const size_t n_states = (size_t)u->n_slots * D;
    bf16 *values = (bf16 *)malloc((n + 1) * sizeof(*values));
    float *parts = take(n_parts, 0), *state = take(n_states, 0);
    struct buffer *buffer[2] = {};
    memset((void *)values, 0xff, (n + 1) * sizeof(*values)); /* NaN */
    make_h(u);
    struct rglru_front f = u->f;
    f.h = (const bf16 *)u->buffer[H]->data;
    f.x = f.z = NULL;
    f.norm.weight = f.norm.bias = NULL;
    f.weighted = (bf16 *)put(u->b, &buffer[0], (const float *)values, (n + 1) / 2);
    f.factors = {put(u->b, &buffer[1], parts, n_parts), u->dim / 8, u->dim, 0};
    f.out_weight = f.z_norm.weight;
    put_states(u);
    begin(u->b, &u->batch);
    assert_true(fused_rglru(cuda_of(u->b), &f));
    finish(u->b);
    get(u->b, state, u->buffer[STATE], n_states * sizeof(float));
    get(u->b, values, buffer[0], n * sizeof(*values));
    get(u->b, parts, buffer[1], n_parts * sizeof(float));
    check_sessions(u, state, NULL, NULL);
    check_weighted(u, max_rows, state, values, parts);
    for (int i = 0; i < 2; i++)
        u->b->ops->buffer_close(u->b, buffer[i]);
    free(values);
    free(parts);
    free(state);
}

static int new_seed(void **)
{
    seed = 12345;
    return 0;
}

/* Blocks of 96 as in the 156M model, of 288 as at D = 2304, of 40 (half an mma in k), and small
 * ones; rows around the tiles of 16 and on both sides of where norms get a launch of their own. */
static void test_decode(void **)
{
    static const struct {
        int dim, n_blocks, rows[3];
    } shapes[] = {
        {768, 8, {1, 19, 2}}, {2304, 8, {1, 3, 0}}, {320, 8, {16, 5, 33}},
        {64, 1, {17, 1, 65}}, {24, 3, {200, 8, 9}}, {1024, 2, {2, 0, 0}},
    };
    for (size_t i = 0; i < COUNT_OF(shapes); i++) {
        struct unit *u = unit_new();
        const int most = shapes[i].rows[0] > 65 ? 208 : 65;
        unit_open(u, most, most, shapes[i].dim, shapes[i].n_blocks, i % 2, i % 3 > 0);
        for (int j = 0; j < 3 && shapes[i].rows[j]; j++) {
            batch_init(&u->batch);
            for (int r = 0; r < shapes[i].rows[j]; r++)
                batch_add(&u->batch, most - r, r % 3 == 1 ? 0 : 1 + r, 1);
            run_and_check(u, most);
            run_weighted(u, most);
        }
        unit_close(u);
    }
}

/* Lengths around a piece, short sequences that share tiles, single rows between prompts. */
static void test_prompts(void **)
{
    static const int lengths[][8] = {
        {1, 64, 65, 1, 1, 130},
        {5, 1, 1, 7, 200, 63, 1},
        {128},
        {64},
        {3, 2, 60, 1},
        {193, 192},
        {8, 9, 16, 17, 1, 129},
        {1, 7, 130, 8, 1, 1, 1, 66},
        {70, 2},
        {65, 1},
        {66, 3},
    };
    static const int shapes[][2] = {{96, 1},  {320, 8}, {64, 4},   {192, 2},  {288, 1}, {56, 1},
                                    {768, 8}, {8, 1},   {2304, 8}, {1024, 2}, {2688, 7}};
    for (size_t i = 0; i < COUNT_OF(lengths); i++) {
        struct unit *u = unit_new();
        unit_open(u, 400, 8, shapes[i][0], shapes[i][1], i % 3 == 2, i % 2);
        for (int round = 0; round < 2; round++) {
            batch_init(&u->batch);
            for (int s = 0; s < 8 && lengths[i][s]; s++)
                batch_add(&u->batch, 8 - s, (s + round) % 2 ? 0 : 1000 + s, lengths[i][s]);
            run_and_check(u, 400);
        }
        unit_close(u);
    }
}

/* More pieces than one round of the scan takes. */
static void test_long_prompt(void **)
{
    struct unit *u = unit_new();
    unit_open(u, 8320, 2, 8, 1, false, true);
    batch_add(&u->batch, 1, 0, 8300);
    batch_add(&u->batch, 0, 4, 1);
    run_and_check(u, 8320);
    unit_close(u);
}

/* A row alone, among other rows, and beside prompts: the same bits. So are a prompt alone and a
 * prompt beside others. */
static void test_same_bits(void **)
{
    static const struct {
        int before, after; /* single rows around the sequence */
    } ways[] = {{0, 0}, {5, 30}, {3, 0}, {200, 0}, {0, 7}};
    static const int lengths[] = {1, 9, 40, 150};
    for (size_t l = 0; l < COUNT_OF(lengths); l++) {
        struct unit *u = unit_new();
        const int n = lengths[l], D = 96;
        bf16 first[150 * 96], z[400 * 96];
        float first_state[96], state[96];
        unit_open(u, 400, 240, D, 1, false, true);
        float *x = take((size_t)400 * D, 2), *rows = take((size_t)400 * D, 2);
        for (size_t w = 0; w < 2 * COUNT_OF(ways); w++) {
            const int before = ways[w / 2].before, after = ways[w / 2].after;
            batch_init(&u->batch);
            for (int i = 0; i < before; i++)
                batch_add(&u->batch, i + 1, i, 1);
            batch_add(&u->batch, 0, 7, n);
            for (int i = 0; i < after; i++)
                batch_add(&u->batch, before + i + 1, i, 1);
            if (w % 2) /* not a decode step any more */
                batch_add(&u->batch, 239, 0, 20);
            memcpy(rows + before * D, x, (size_t)n * D * 4);
            assert_int_equal(u->b->ops->write(u->b, u->buffer[X], 0, rows, 400 * D * 4, NULL),
                             STATUS_OK);
            assert_int_equal(
                u->b->ops->write(u->b, u->buffer[STATE], 0, u->host[STATE], D * 4, NULL),
                STATUS_OK);
            begin(u->b, &u->batch);
            struct cuda *c = cuda_of(u->b);
            assert_true(fused_rglru(c, &u->f));
            if (c->step.decode)
                norm_to_bf16(c, u->f.normed, u->f.z, u->f.z_norm, D, NULL, c->step.rows,
                             &c->step.sizes->n_rows);
            finish(u->b);
            get(u->b, z, u->buffer[NORMED], sizeof(z));
            get(u->b, state, u->buffer[STATE], sizeof(state));
            if (w == 0) {
                memcpy(first, z, (size_t)n * D * sizeof(*z));
                memcpy(first_state, state, sizeof(state));
            } else if (memcmp(first, z + before * D, (size_t)n * D * sizeof(*z)) ||
                       memcmp(first_state, state, sizeof(state))) {
                fail_msg("a sequence of %d rows changes in company %zu", n, w);
            }
        }
        free(x);
        free(rows);
        unit_close(u);
    }
}

static void test_refusals(void **)
{
    struct unit *u = unit_new();
    unit_open(u, 4, 4, 1040, 1, false, false);
    batch_add(&u->batch, 0, 0, 1);
    begin(u->b, &u->batch);
    assert_false(fused_rglru(cuda_of(u->b), &u->f)); /* 1040 columns a block */
    u->f.dim = 60;
    u->f.n_blocks = 5;
    assert_false(fused_rglru(cuda_of(u->b), &u->f)); /* 12 */
    finish(u->b);
    unit_close(u);
}

/* x += norm(y), and gathered rows to bf16, for lengths of every kernel. */
static void test_norms(void **)
{
    static const int dims[] = {5, 64, 100, 256, 260, 1024, 1028, 2304, 2564, 3001, 4096, 4100};
    for (size_t d = 0; d < COUNT_OF(dims); d++) {
        const int D = dims[d], n = 7, most = 9;
        struct backend *b = open_backend(most, most, D);
        struct cuda *c = cuda_of(b);
        struct batch *batch = (struct batch *)calloc(1, sizeof(*batch));
        struct buffer *buffer[4];
        const bool layer = d % 2, bare = d % 3 == 2;
        float *x = take((size_t)most * D, 1), *y = take((size_t)most * D, 3), *w = take(D, 2);
        struct device_norm norm = {put(b, &buffer[2], w, D), NULL, layer ? NORM_LAYER : NORM_RMS,
                                   1e-5f};
        float *dx = put(b, &buffer[0], x, (size_t)most * D);
        const float *dy = put(b, &buffer[1], y, (size_t)most * D);
        assert_int_equal(b->ops->buffer_open(b, &buffer[3], (size_t)most * D * 2, NULL), STATUS_OK);
        if (bare)
            norm.weight = NULL;
        batch_init(batch);
        batch_add(batch, 0, 3, n);
        batch->logit_rows[0] = 4;
        batch->step.n_logit_rows = 1;
        begin(b, batch);
        norm_add(c, dx, dy, norm, D);
        norm_to_bf16(c, (bf16 *)buffer[3]->data, dy, norm, D, c->step.logit_rows, c->step.logits,
                     &c->step.sizes->n_logit_rows);
        finish(b);
        float *got = take((size_t)most * D, 0);
        bf16 *h = (bf16 *)calloc((size_t)D, sizeof(bf16));
        get(b, got, buffer[0], (size_t)most * D * 4);
        get(b, h, buffer[3], (size_t)D * 2);
        for (int r = 0; r < most; r++) {
            double mean = 0, square = 0;
            for (int i = 0; i < D && layer; i++)
                mean += (double)y[r * D + i] / D;
            for (int i = 0; i < D; i++)
                square += (y[r * D + i] - mean) * (y[r * D + i] - mean) / D;
            for (int i = 0; i < D; i++) {
                const double v = y[r * D + i];
                const double normed = bare ? v : (v - mean) / sqrt(square + 1e-5) * w[i];
                const double want = r < n ? x[r * D + i] + normed : x[r * D + i];
                if (!(fabs(got[r * D + i] - want) <= 2e-6 * (1 + fabs(want))))
                    fail_msg("norm_add %d %d of %d: %.9g, expected %.9g", r, i, D, got[r * D + i],
                             want);
                if (r == 4 &&
                    !(fabs(__bfloat162float(h[i]) - normed) <= 1e-6 + fabs(normed) * 0x1.02p-8))
                    fail_msg("norm_to_bf16 %d of %d", i, D);
            }
        }
        for (int i = 0; i < 4; i++)
            b->ops->buffer_close(b, buffer[i]);
        b->ops->close(b);
        free(batch);
        free(x);
        free(y);
        free(w);
        free(got);
        free(h);
    }
}

/* Few long rows have a kernel of their own: a row alone has the bits it has among many. */
static void test_norm_of_any_rows(void **)
{
    static const int dims[] = {768, 1028, 2304, 3004, 4096, 4100};
    for (size_t d = 0; d < COUNT_OF(dims); d++) {
        const int D = dims[d], most = 320, n_few = 3;
        const size_t n = (size_t)most * D;
        struct backend *b = open_backend(most, most, D);
        struct batch *batch = (struct batch *)calloc(1, sizeof(*batch));
        struct buffer *buffer[5];
        bf16 *many = (bf16 *)malloc(n * sizeof(bf16)), *few = (bf16 *)malloc(n * sizeof(bf16));
        float *in = take(n, 3), *weight = take(D, 2), *bias = take(D, 1);
        const float *x = put(b, &buffer[0], in, n);
        const float *w = put(b, &buffer[1], weight, D), *shift = put(b, &buffer[2], bias, D);
        for (int i = 3; i < 5; i++)
            assert_int_equal(b->ops->buffer_open(b, &buffer[i], n * sizeof(bf16), NULL), STATUS_OK);
        for (int layer = 0; layer < 2; layer++) {
            const struct device_norm norm = {w, layer ? shift : NULL, layer ? NORM_LAYER : NORM_RMS,
                                             1e-5f};
            for (int i = 3; i < 5; i++) {
                const int rows = i == 3 ? most : n_few;
                struct cuda *c = cuda_of(b);
                batch_init(batch);
                batch_add(batch, 0, 0, rows);
                begin(b, batch);
                norm_to_bf16(c, (bf16 *)buffer[i]->data, x, norm, D, NULL, rows,
                             &c->step.sizes->n_rows);
                finish(b);
            }
            get(b, many, buffer[3], n_few * D * sizeof(bf16));
            get(b, few, buffer[4], n_few * D * sizeof(bf16));
            if (memcmp(many, few, n_few * D * sizeof(bf16)))
                fail_msg("rows of %d change in company", D);
        }
        for (int i = 0; i < 5; i++)
            b->ops->buffer_close(b, buffer[i]);
        b->ops->close(b);
        free(batch);
        free(many);
        free(few);
        free(in);
        free(weight);
        free(bias);
    }
}

#define TEST(f) cmocka_unit_test_setup(f, new_seed)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_norms),
        TEST(test_decode),
        TEST(test_prompts),
        TEST(test_long_prompt),
        TEST(test_same_bits),
        TEST(test_refusals),
        TEST(test_norm_of_any_rows),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
