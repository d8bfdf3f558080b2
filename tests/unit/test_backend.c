/* test_backend.c - every op of every backend against loops in double precision.
 *
 * The oracle here knows whole sessions: all keys, values and inputs from position 0 or from a
 * random state on, with no rings, slots, packing or chunks. The backends run are the reference
 * and the CPU backend with each kernels table this processor can run. Slots that hold nothing
 * of the session hold NaN, so that a value read from the wrong place shows. Where there is a GPU,
 * or the emulator in its place (tests/emulate), the CUDA backend is one more.
 *
 * Then, bit for bit: a row's result does not depend on its neighbours or on the number of
 * threads; nor, on the host, on how its session is cut into chunks.
 */
#include "unit.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/backend.h"
#include "engine/cpu.h"

enum { MAX_ROWS = 600, MAX_SEQS = 24, MAX_DIM = 1200, N_SLOTS = 30 };

/* ---- random numbers and steps ---- */

static uint64_t seed;

static uint32_t random_bits(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return (uint32_t)(seed >> 32);
}

static int random_int(int low, int high) /* both included */
{
    return low + (int)(random_bits() % (uint32_t)(high - low + 1));
}

static float random_float(float scale)
{
    return scale * ((float)(random_bits() >> 8) / (1 << 23) - 1);
}

static float *random_floats(size_t n, float scale)
{
    float *x = malloc((n + 1) * sizeof(*x));
    assert_non_null(x);
    for (size_t i = 0; i < n; i++)
        x[i] = random_float(scale);
    return x;
}

struct batch {
    struct step step;
    int32_t tokens[MAX_ROWS], slot[MAX_SEQS], start[MAX_SEQS + 1], logit_rows[MAX_ROWS];
    int64_t positions[MAX_ROWS];
};

static void batch_init(struct batch *b)
{
    memset(b, 0, sizeof(*b));
    b->step = (struct step){.tokens = b->tokens,
                            .positions = b->positions,
                            .seq_slot = b->slot,
                            .seq_start = b->start,
                            .logit_rows = b->logit_rows};
}

static void batch_add(struct batch *b, int slot, int64_t position, int n)
{
    int i = b->step.n_seqs++, first = b->step.n_rows;
    b->slot[i] = slot;
    for (int r = 0; r < n; r++) {
        b->positions[first + r] = position + r;
        b->tokens[first + r] = random_int(0, 96);
    }
    b->step.n_rows += n;
    b->start[i + 1] = b->step.n_rows;
    if (random_int(0, 3))
        b->logit_rows[b->step.n_logit_rows++] = b->step.n_rows - 1;
}

static const int64_t positions[] = {
    0, 0, 1, 2, 5, 63, 64, 127, 130, 1000, (1 << 24) + 3, (1LL << 31) + 7, (1LL << 40) + 11,
};

/* Several sequences, one row each or chunks, at positions of every size. */
static void random_batch(struct batch *b, int n_seqs, int longest)
{
    batch_init(b);
    for (int i = 0; i < n_seqs; i++) {
        int n = random_int(0, 2) ? 1 : random_int(1, longest);
        batch_add(b, (i * 7 + 3) % N_SLOTS, positions[random_int(0, COUNT_OF(positions) - 1)], n);
    }
}

/* ---- backends ---- */

struct subject {
    const char *name, *kernels; /* kernels NULL: the reference, or the GPU */
    bool cuda;
    struct backend *b;
};

static struct subject subjects[5];
static int n_subjects;
static struct backend *exact_cuda; /* deterministic; NULL without a GPU */

static const struct backend_options base_options = {
    .n_threads = 3, .max_rows = MAX_ROWS, .max_seqs = MAX_SEQS, .max_dim = MAX_DIM};

static struct backend *open_cpu(const char *kernels, int n_threads)
{
    struct backend *b = NULL;
    struct backend_options options = base_options;
    options.n_threads = n_threads;
    const struct kernels *k = kernels_find(kernels);
    assert_true(!k || !backend_cpu_open_as(&b, &options, k, NULL));
    return b;
}

/* deterministic: products must not depend on the batch either. Without it they may go through
 * the library, which chooses by the number of rows. */
static struct backend *open_cuda(bool deterministic)
{
    struct backend *b = NULL;
    struct error err = {0};
    struct backend_options options = base_options;
    options.n_slots = N_SLOTS;
    options.max_logit_rows = MAX_ROWS;
    options.composed = true;
    options.deterministic = deterministic;
    if (backend_cuda_count() > 0 && backend_cuda_open(&b, &options, &err))
        fail_msg("%s", err.text);
    return b;
}

static int open_subjects(void **state)
{
    static const struct subject all[] = {
        {.name = "ref"},
        {.name = "cpu with avx512", .kernels = "avx512"},
        {.name = "cpu with avx2", .kernels = "avx2"},
        {.name = "cpu with portable kernels", .kernels = "portable"},
        {.name = "cuda", .cuda = true},
    };
    (void)state;
    for (size_t i = 0; i < COUNT_OF(all); i++) {
        struct subject s = all[i];
        if (s.cuda)
            s.b = open_cuda(false);
        else if (s.kernels)
            s.b = open_cpu(s.kernels, 3);
        else
            assert_int_equal(backend_ref_open(&s.b, &base_options, NULL), STATUS_OK);
        if (s.b)
            subjects[n_subjects++] = s;
        else
            print_message("no %s here: skipped\n", s.name);
    }
    exact_cuda = open_cuda(true);
    return 0;
}

static int close_subjects(void **state)
{
    (void)state;
    for (int i = 0; i < n_subjects; i++)
        subjects[i].b->ops->close(subjects[i].b);
    if (exact_cuda)
        exact_cuda->ops->close(exact_cuda);
    return 0;
}

static struct buffer *upload(struct backend *b, const void *data, size_t n_bytes)
{
    struct buffer *buffer;
    assert_int_equal(b->ops->buffer_open(b, &buffer, n_bytes, NULL), STATUS_OK);
    assert_int_equal(b->ops->write(b, buffer, 0, data, n_bytes, NULL), STATUS_OK);
    return buffer;
}

static struct buffer *upload_floats(struct backend *b, const float *x, size_t n)
{
    return upload(b, x, n * sizeof(*x));
}

static struct buffer *empty(struct backend *b, size_t n)
{
    struct buffer *buffer;
    assert_int_equal(b->ops->buffer_open(b, &buffer, n * sizeof(float), NULL), STATUS_OK);
    return buffer;
}

static float *download(struct backend *b, const struct buffer *buffer, size_t n)
{
    float *x = malloc((n + 1) * sizeof(*x));
    assert_non_null(x);
    assert_int_equal(b->ops->read(b, x, buffer, 0, n * sizeof(*x), NULL), STATUS_OK);
    return x;
}

static void release(struct backend *b, struct buffer **buffers, int n)
{
    for (int i = 0; i < n; i++)
        b->ops->buffer_close(b, buffers[i]);
}

/* |got - want| <= tolerance * (1 + |want|) */
static void expect_close(const char *what, const float *got, const double *want, size_t n,
                         double tolerance)
{
    for (size_t i = 0; i < n; i++)
        if (!(fabs(got[i] - want[i]) <= tolerance * (1 + fabs(want[i]))))
            fail_msg("%s: value %zu is %.9g, expected %.9g", what, i, got[i], want[i]);
}

static void expect_same(const char *what, const float *got, const float *want, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (memcmp(&got[i], &want[i], sizeof(float)))
            fail_msg("%s: value %zu is %.9g, expected exactly %.9g", what, i, got[i], want[i]);
}

static double *doubles(size_t n)
{
    double *x = calloc(n + 1, sizeof(*x));
    assert_non_null(x);
    return x;
}

/* ---- an op as a table entry: inputs, states, outputs ---- */

enum { MAX_INPUTS = 8, MAX_STATES = 3, MAX_OUTPUTS = 2 };

/* All arrays are host memory owned by the case. States are whole slabs. */
struct op_case {
    struct batch batch;
    float *input[MAX_INPUTS];
    size_t n_input[MAX_INPUTS];
    float *slab[MAX_STATES]; /* before the op */
    int64_t row_values[MAX_STATES];
    double *want[MAX_OUTPUTS];
    size_t n_want[MAX_OUTPUTS];
    double *want_slab[MAX_STATES]; /* rows of the batch's slots only; NaN: anything goes */
    double tolerance;
    double cuda_tolerance; /* where the GPU rounds more; 0: as the others */
    int p[8];              /* dimensions, as the op likes */
    float f[2];
    struct buffer *buffer[MAX_INPUTS], *out[MAX_OUTPUTS];
    struct slab state[MAX_STATES];
};

typedef void run_op(struct backend *b, struct op_case *c);

static void case_free(struct op_case *c)
{
    for (int i = 0; i < MAX_INPUTS; i++)
        free(c->input[i]);
    for (int i = 0; i < MAX_STATES; i++) {
        free(c->slab[i]);
        free(c->want_slab[i]);
    }
    for (int i = 0; i < MAX_OUTPUTS; i++)
        free(c->want[i]);
}

static void case_input(struct op_case *c, int i, size_t n, float scale)
{
    c->n_input[i] = n;
    c->input[i] = random_floats(n, scale);
}

/* A slab full of NaN. */
static void case_state(struct op_case *c, int i, int64_t row_values)
{
    size_t n = (size_t)row_values * N_SLOTS;
    c->row_values[i] = row_values;
    c->slab[i] = malloc((n + 1) * sizeof(float));
    c->want_slab[i] = doubles(n);
    for (size_t j = 0; j < n; j++)
        c->slab[i][j] = NAN;
    for (size_t j = 0; j < n; j++)
        c->want_slab[i][j] = NAN;
}

static void case_output(struct op_case *c, int i, size_t n)
{
    c->n_want[i] = n;
    c->want[i] = doubles(n);
}

static void case_upload(struct backend *b, struct op_case *c)
{
    for (int i = 0; i < MAX_INPUTS; i++)
        c->buffer[i] = c->input[i] ? upload_floats(b, c->input[i], c->n_input[i]) : NULL;
    for (int i = 0; i < MAX_STATES; i++)
        if (c->slab[i])
            c->state[i] = (struct slab){
                .buffer = upload_floats(b, c->slab[i], (size_t)c->row_values[i] * N_SLOTS),
                .row_values = c->row_values[i],
            };
    for (int i = 0; i < MAX_OUTPUTS; i++)
        c->out[i] = c->want[i] ? empty(b, c->n_want[i]) : NULL;
}

static void case_release(struct backend *b, struct op_case *c)
{
    release(b, c->buffer, MAX_INPUTS);
    release(b, c->out, MAX_OUTPUTS);
    for (int i = 0; i < MAX_STATES; i++)
        if (c->slab[i])
            b->ops->buffer_close(b, c->state[i].buffer);
}

static void run_step(struct backend *b, struct op_case *c, run_op *run, const struct step *step)
{
    struct error err = {0};
    assert_false(b->ops->begin(b, step));
    run(b, c);
    if (b->ops->submit(b, &err) || b->ops->wait(b, NULL, &err))
        fail_msg("%s: %s", b->ops->name, err.text);
}

static double tolerance_of(const struct backend *b, const struct op_case *c)
{
    const bool cuda = !strcmp(b->ops->name, "cuda");
    return cuda && c->cuda_tolerance > 0 ? c->cuda_tolerance : c->tolerance;
}

static void check_outputs(struct backend *b, struct op_case *c, const char *what)
{
    for (int i = 0; i < MAX_OUTPUTS; i++) {
        if (!c->want[i])
            continue;
        float *got = download(b, c->out[i], c->n_want[i]);
        expect_close(what, got, c->want[i], c->n_want[i], tolerance_of(b, c));
        free(got);
    }
}

static void check_states(struct backend *b, struct op_case *c, const char *what)
{
    for (int i = 0; i < MAX_STATES; i++) {
        if (!c->slab[i])
            continue;
        size_t n = (size_t)c->row_values[i] * N_SLOTS;
        float *got = download(b, c->state[i].buffer, n);
        for (size_t j = 0; j < n; j++)
            if (!isnan(c->want_slab[i][j]))
                expect_close(what, got + j, c->want_slab[i] + j, 1, tolerance_of(b, c));
        free(got);
    }
}

/* Run the op on every backend against what the case expects. */
static void run_case(const char *op, struct op_case *c, run_op *run)
{
    for (int i = 0; i < n_subjects; i++) {
        char what[96];
        struct backend *b = subjects[i].b;
        snprintf(what, sizeof(what), "%s on %s", op, subjects[i].name);
        case_upload(b, c);
        run_step(b, c, run, &c->batch.step);
        check_outputs(b, c, what);
        snprintf(what, sizeof(what), "state of %s on %s", op, subjects[i].name);
        check_states(b, c, what);
        case_release(b, c);
    }
}

/* ---- rows ---- */

static int32_t exact_norm_type; /* enum norm_type of the running case */

static void run_norm(struct backend *b, struct op_case *c)
{
    struct norm w = {c->buffer[1], c->p[1] ? c->buffer[2] : NULL,
                     exact_norm_type ? NORM_LAYER : NORM_RMS, c->f[0]};
    b->ops->norm(b, c->out[0], c->buffer[0], &w, c->p[0], c->p[2] ? ROWS_LOGITS : ROWS_STEP);
}

static void run_head_norm(struct backend *b, struct op_case *c)
{
    struct norm w = {c->buffer[1], NULL, NORM_RMS, c->f[0]};
    size_t bytes = c->n_want[0] * sizeof(float);
    assert_int_equal(b->ops->copy(b, c->out[0], 0, c->buffer[0], 0, bytes, NULL), STATUS_OK);
    b->ops->head_norm(b, c->out[0], &w, c->p[1], c->p[0]);
}

static void want_norm(double *out, const float *in, const float *w, const float *bias, bool layer,
                      double eps, int n)
{
    double mean = 0, square = 0;
    for (int i = 0; i < n && layer; i++)
        mean += in[i] / (double)n;
    for (int i = 0; i < n; i++)
        square += (in[i] - mean) * (in[i] - mean) / n;
    for (int i = 0; i < n; i++)
        out[i] = (in[i] - mean) / sqrt(square + eps) * w[i] + (bias ? bias[i] : 0);
}

static void test_norm(void **state)
{
    (void)state;
    static const int dims[] = {1, 3, 16, 31, 64, 65, 96, 320, 768, 1111};
    for (size_t i = 0; i < COUNT_OF(dims) * 4; i++) {
        struct op_case c = {.tolerance = 1e-5, .f = {1e-6f}};
        int dim = dims[i / 4], logits = i % 3 == 1;
        random_batch(&c.batch, random_int(1, 8), 20);
        size_t n = (size_t)(logits ? c.batch.step.n_logit_rows : c.batch.step.n_rows);
        exact_norm_type = i % 2;
        c.p[0] = dim;
        c.p[1] = i % 4 > 1;
        c.p[2] = logits;
        case_input(&c, 0, n * dim, 3);
        case_input(&c, 1, dim, 1);
        case_input(&c, 2, dim, 1);
        case_output(&c, 0, n * dim);
        for (size_t r = 0; r < n; r++)
            want_norm(c.want[0] + r * dim, c.input[0] + r * dim, c.input[1],
                      c.p[1] ? c.input[2] : NULL, exact_norm_type, c.f[0], dim);
        run_case("norm", &c, run_norm);
        case_free(&c);
    }
}

static void test_head_norm(void **state)
{
    (void)state;
    for (int i = 0; i < 12; i++) {
        struct op_case c = {.tolerance = 1e-5, .f = {1e-6f}, .p = {random_int(1, 130), 5}};
        random_batch(&c.batch, random_int(1, 5), 9);
        size_t n = (size_t)c.batch.step.n_rows * 5, d = (size_t)c.p[0];
        case_input(&c, 0, n * d, 2);
        case_input(&c, 1, d, 2);
        case_output(&c, 0, n * d);
        for (size_t r = 0; r < n; r++)
            want_norm(c.want[0] + r * d, c.input[0] + r * d, c.input[1], NULL, false, 1e-6, (int)d);
        run_case("head_norm", &c, run_head_norm);
        case_free(&c);
    }
}

static void run_add(struct backend *b, struct op_case *c)
{
    size_t bytes = c->n_want[0] * sizeof(float);
    assert_int_equal(b->ops->copy(b, c->out[0], 0, c->buffer[0], 0, bytes, NULL), STATUS_OK);
    b->ops->add(b, c->out[0], c->buffer[1], c->p[0]);
}

static void run_activate(struct backend *b, struct op_case *c)
{
    b->ops->activate(b, c->out[0], c->p[2] ? c->buffer[0] : NULL, c->buffer[1],
                     (enum activation)c->p[1], c->p[0]);
}

static double want_activation(double x, int act)
{
    if (act == ACTIVATION_SILU)
        return x / (1 + exp(-x));
    if (act == ACTIVATION_GELU)
        return 0.5 * x * erfc(-x / sqrt(2));
    return 0.5 * x * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

static void test_add_and_activate(void **state)
{
    (void)state;
    for (int i = 0; i < 24; i++) {
        struct op_case c = {.tolerance = i % 2 ? 6e-6 : 6e-5,
                            .p = {random_int(1, 1100), i % 3, i / 3 % 2}};
        random_batch(&c.batch, random_int(1, 8), 20);
        size_t n = (size_t)c.batch.step.n_rows * (size_t)c.p[0];
        case_input(&c, 0, n, i % 2 ? 6 : 60);
        case_input(&c, 1, n, i % 2 ? 6 : 60);
        case_output(&c, 0, n);
        for (size_t j = 0; j < n; j++)
            c.want[0][j] = (double)c.input[0][j] + c.input[1][j];
        run_case("add", &c, run_add);
        for (size_t j = 0; j < n; j++) {
            double up = c.input[1][j];
            c.want[0][j] =
                c.p[2] ? want_activation(c.input[0][j], c.p[1]) * up : want_activation(up, c.p[1]);
        }
        run_case("activate", &c, run_activate);
        case_free(&c);
    }
}

static void run_gather(struct backend *b, struct op_case *c)
{
    b->ops->gather(b, c->out[0], c->buffer[0], c->p[0]);
    if (c->f[0] > 0)
        b->ops->softcap(b, c->out[0], c->f[0], c->p[0]);
}

static void test_gather_and_softcap(void **state)
{
    (void)state;
    for (int i = 0; i < 12; i++) {
        struct op_case c = {.tolerance = 1e-6, .p = {random_int(1, 700)}, .f = {i % 2 ? 30 : 0}};
        random_batch(&c.batch, random_int(2, 9), 7);
        size_t dim = (size_t)c.p[0], n = (size_t)c.batch.step.n_logit_rows;
        case_input(&c, 0, (size_t)c.batch.step.n_rows * dim, i % 3 ? 0.1f : 300);
        case_output(&c, 0, n * dim);
        for (size_t j = 0; j < n * dim; j++) {
            double x = c.input[0][(size_t)c.batch.logit_rows[j / dim] * dim + j % dim];
            c.want[0][j] = c.f[0] > 0 ? 30 * tanh(x / 30) : x;
        }
        run_case("gather and softcap", &c, run_gather);
        case_free(&c);
    }
}

/* ---- matrices ---- */

static enum dtype matrix_dtype, file_dtype;

/* Values that F32, F16 and BF16 all hold exactly. */
static float exact_value(void)
{
    return (float)random_int(-127, 127) / 64;
}

/* The matrix as a file holds it: any dtype, at an odd address. */
static char *as_file(const float *w, size_t n)
{
    char *file = malloc(n * 4 + 1);
    for (size_t i = 0; i < n; i++) {
        _Float16 half = (_Float16)w[i];
        uint16_t brain = bf16_from_f32(w[i]);
        char *at = file + 1 + i * dtype_bytes(file_dtype);
        if (file_dtype == DTYPE_F32)
            memcpy(at, &w[i], 4);
        else if (file_dtype == DTYPE_F16)
            memcpy(at, &half, 2);
        else
            memcpy(at, &brain, 2);
    }
    return file;
}

static struct linear open_linear(struct backend *b, const struct op_case *c, bool bias)
{
    struct linear w = {.n_out = c->p[0], .n_in = c->p[1], .dtype = matrix_dtype};
    char *file = as_file(c->input[1], c->n_input[1]);
    assert_int_equal(b->ops->linear_open(b, &w, file + 1, file_dtype, NULL), STATUS_OK);
    free(file);
    if (bias)
        w.bias = upload_floats(b, c->input[2], c->n_input[2]);
    return w;
}

static void run_linear(struct backend *b, struct op_case *c)
{
    struct linear w = open_linear(b, c, c->p[2]);
    b->ops->linear(b, c->out[0], c->buffer[0], &w, c->p[3] ? ROWS_LOGITS : ROWS_STEP);
    b->ops->linear_close(b, &w);
}

static void case_matrix(struct op_case *c, int n_out, int n_in)
{
    c->p[0] = n_out;
    c->p[1] = n_in;
    case_input(c, 1, (size_t)n_out * (size_t)n_in, 1);
    for (size_t i = 0; i < c->n_input[1]; i++)
        c->input[1][i] = exact_value();
    case_input(c, 2, (size_t)n_out, 1);
}

static void want_linear(struct op_case *c, size_t n_rows)
{
    int n_out = c->p[0], n_in = c->p[1];
    for (size_t j = 0; j < n_rows * (size_t)n_out; j++) {
        const float *x = c->input[0] + j / (size_t)n_out * (size_t)n_in;
        const float *w = c->input[1] + j % (size_t)n_out * (size_t)n_in;
        double sum = c->p[2] ? c->input[2][j % (size_t)n_out] : 0;
        for (int k = 0; k < n_in; k++)
            sum += (double)x[k] * w[k];
        c->want[0][j] = sum;
    }
}

/* Sizes around panels of 32, blocks of 256 and the library's blocks; batches of one row, few,
 * many, and chunks on both sides of the library's threshold. */
static const struct {
    int n_out, n_in, n_seqs, longest;
} matrices[] = {
    {1, 1, 1, 1},        {31, 7, 3, 4},     {32, 64, 1, 1},    {33, 65, 5, 1},
    {96, 96, 2, 12},     {100, 257, 8, 3},  {7, 513, 24, 1},   {320, 320, 12, 1},
    {64, 300, 1, 127},   {130, 70, 3, 255}, {257, 90, 2, 270}, {40, 1100, 1, 300},
    {300, 1030, 2, 256}, {513, 33, 20, 10},
};

static void random_matrix_batch(struct op_case *c, int n_seqs, int longest)
{
    batch_init(&c->batch);
    for (int i = 0; i < n_seqs; i++)
        batch_add(&c->batch, i, random_int(0, 9), i % 2 ? 1 : longest);
}

static void test_linear(void **state)
{
    (void)state;
    for (size_t i = 0; i < COUNT_OF(matrices) * 4; i++) {
        size_t m = i / 4;
        struct op_case c = {.tolerance = 2e-5 + 1e-7 * matrices[m].n_in};
        matrix_dtype = i % 2 ? DTYPE_BF16 : DTYPE_F32;
        file_dtype = (enum dtype)(i % 3);
        /* the GPU rounds inputs of bf16 products to bf16: |x| < 1 by 2^-9, |w| < 2; the errors of
         * n_in products add up as in a random walk */
        if (matrix_dtype == DTYPE_BF16)
            c.cuda_tolerance = 0x1p-8 * sqrt(matrices[m].n_in);
        random_matrix_batch(&c, matrices[m].n_seqs, matrices[m].longest);
        case_matrix(&c, matrices[m].n_out, matrices[m].n_in);
        c.p[2] = i % 4 > 1;
        c.p[3] = i % 5 == 4;
        size_t n = (size_t)(c.p[3] ? c.batch.step.n_logit_rows : c.batch.step.n_rows);
        case_input(&c, 0, n * (size_t)c.p[1], 1);
        case_output(&c, 0, n * (size_t)c.p[0]);
        want_linear(&c, n);
        run_case("linear", &c, run_linear);
        case_free(&c);
    }
}

static void run_embed(struct backend *b, struct op_case *c)
{
    struct linear table = open_linear(b, c, false);
    b->ops->embed(b, c->out[0], &table, c->f[0], c->p[2], NULL);
    b->ops->linear_close(b, &table);
}

static void test_embed(void **state)
{
    (void)state;
    static const int dims[] = {2, 5, 64, 321, 768};
    for (size_t i = 0; i < COUNT_OF(dims) * 4; i++) {
        struct op_case c = {.tolerance = 1e-6, .f = {16}};
        int dim = dims[i / 4];
        matrix_dtype = i % 2 ? DTYPE_BF16 : DTYPE_F32;
        file_dtype = (enum dtype)(i % 3);
        random_batch(&c.batch, 6, 30);
        case_matrix(&c, 97, dim);
        c.p[2] = i % 4 > 1;
        size_t n = (size_t)c.batch.step.n_rows;
        case_output(&c, 0, n * (size_t)dim);
        for (size_t j = 0; j < n * (size_t)dim; j++) {
            size_t r = j / (size_t)dim, k = j % (size_t)dim;
            long double angle = (long double)c.batch.positions[r] *
                                (long double)pow(10000, -(double)(k / 2 * 2) / dim);
            double wave = k % 2 ? (double)cosl(angle) : (double)sinl(angle);
            double x = 16.0 * c.input[1][(size_t)c.batch.tokens[r] * (size_t)dim + k];
            c.want[0][j] = c.p[2] ? x + wave : x;
        }
        run_case("embed", &c, run_embed);
        case_free(&c);
    }
}

/* Rounding to bf16, seen through a product with 1. */
static void test_bf16_rounding(void **state)
{
    (void)state;
    static const uint32_t cases[][2] = {
        /* f32 bits, bf16 bits: ties to even, carries, subnormals, the end of the range */
        {0x3f800000, 0x3f80}, {0x3f808000, 0x3f80}, {0x3f818000, 0x3f82}, {0x3f808001, 0x3f81},
        {0x3fffffff, 0x4000}, {0x00008001, 0x0001}, {0x80000000, 0x8000}, {0xbf80c000, 0xbf81},
        {0x7f7fffff, 0x7f80}, {0x7f800000, 0x7f80}, {0xff800000, 0xff80},
    };
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        float x, back;
        uint32_t bits = cases[i][1] << 16;
        memcpy(&x, &cases[i][0], 4);
        assert_int_equal(bf16_from_f32(x), cases[i][1]);
        back = bf16_to_f32((uint16_t)cases[i][1]);
        assert_memory_equal(&back, &bits, 4);
    }
    assert_true(isnan(bf16_to_f32(bf16_from_f32(NAN))));
}

static void run_block_linear(struct backend *b, struct op_case *c)
{
    b->ops->block_linear(b, c->out[0], c->buffer[0], c->buffer[1], c->p[2] ? c->buffer[2] : NULL,
                         c->p[0], c->p[1]);
}

static void test_block_linear(void **state)
{
    (void)state;
    for (int i = 0; i < 16; i++) {
        int blocks = random_int(1, 8), width = i % 2 ? random_int(1, 70) : 96;
        size_t dim = (size_t)(blocks * width);
        struct op_case c = {.tolerance = 2e-5, .p = {(int)dim, blocks, i % 3 != 0}};
        random_batch(&c.batch, random_int(1, 9), 40);
        size_t n = (size_t)c.batch.step.n_rows;
        case_input(&c, 0, n * dim, 1);
        case_input(&c, 1, dim * (size_t)width, 1);
        case_input(&c, 2, dim, 1);
        case_output(&c, 0, n * dim);
        for (size_t j = 0; j < n * dim; j++) {
            size_t o = j % dim, first = o / (size_t)width * (size_t)width;
            double sum = c.p[2] ? c.input[2][o] : 0;
            for (int k = 0; k < width; k++)
                sum += (double)c.input[0][j / dim * dim + first + k] *
                       c.input[1][o * (size_t)width + k];
            c.want[0][j] = sum;
        }
        run_case("block_linear", &c, run_block_linear);
        case_free(&c);
    }
}

/* ---- ops with a state ---- */

/* The session's value at row r counted from the step's first row: negative ones come before. */
static void run_conv(struct backend *b, struct op_case *c)
{
    b->ops->conv(b, c->out[0], c->buffer[0], c->buffer[1], c->p[2] ? c->buffer[2] : NULL,
                 &c->state[0], c->p[0], c->p[1]);
}

static void want_conv(struct op_case *c, int seq)
{
    int dim = c->p[0], K = c->p[1], first = c->batch.start[seq], end = c->batch.start[seq + 1];
    int64_t t0 = c->batch.positions[first];
    int past = t0 < K - 1 ? (int)t0 : K - 1, n = end - first;
    size_t at = (size_t)c->batch.slot[seq] * (size_t)c->row_values[0];
    /* h: K-1 zeros, `past` of the last replaced by a random past, then the rows. */
    float *h = calloc((size_t)(K - 1 + n) * (size_t)dim + 1, sizeof(*h));
    for (int i = (K - 1 - past) * dim; i < (K - 1) * dim; i++)
        c->slab[0][at + (size_t)i] = h[i] = random_float(1);
    memcpy(h + (K - 1) * dim, c->input[0] + (size_t)first * dim, (size_t)n * dim * sizeof(*h));
    for (int r = 0; r < n; r++)
        for (int i = 0; i < dim; i++) {
            double sum = c->p[2] ? c->input[2][i] : 0;
            for (int k = 0; k < K; k++)
                sum += (double)c->input[1][i * K + k] * h[(r + K - 1 - k) * dim + i];
            c->want[0][(size_t)(first + r) * dim + i] = sum;
        }
    for (int i = 0; i < (K - 1) * dim; i++)
        c->want_slab[0][at + (size_t)i] = h[n * dim + i];
    free(h);
}

static void test_conv(void **state)
{
    (void)state;
    for (int i = 0; i < 30; i++) {
        int dim = random_int(1, 300), K = random_int(1, 6);
        struct op_case c = {.tolerance = 3e-6, .p = {dim, K, i % 2}};
        random_batch(&c.batch, random_int(1, 9), i % 3 ? 3 : 40);
        size_t n = (size_t)c.batch.step.n_rows * (size_t)dim;
        case_input(&c, 0, n, 1);
        case_input(&c, 1, (size_t)(dim * K), 1);
        case_input(&c, 2, (size_t)dim, 1);
        case_state(&c, 0, (int64_t)(K - 1) * dim);
        case_output(&c, 0, n);
        for (int q = 0; q < c.batch.step.n_seqs; q++)
            want_conv(&c, q);
        run_case("conv", &c, run_conv);
        case_free(&c);
    }
}

static void run_rglru(struct backend *b, struct op_case *c)
{
    b->ops->rglru(b, c->out[0], c->buffer[0], c->buffer[1], c->buffer[2], c->buffer[3],
                  &c->state[0], c->p[0]);
}

static void want_rglru(struct op_case *c, int seq)
{
    int dim = c->p[0], first = c->batch.start[seq];
    size_t slot = (size_t)c->batch.slot[seq] * (size_t)dim;
    for (int i = 0; i < dim; i++) {
        double z = random_float(1);
        if (c->batch.positions[first])
            c->slab[0][slot + (size_t)i] = (float)z;
        for (int r = first; r < c->batch.start[seq + 1]; r++) {
            size_t at = (size_t)r * dim + i;
            double gated = c->input[0][at] / (1 + exp(-(double)c->input[2][at]));
            double rate = 1 / (1 + exp(-(double)c->input[1][at]));
            double log_a = -8 * log1p(exp((double)c->input[3][i])) * rate;
            if (c->batch.positions[r] == 0)
                z = gated;
            else
                z = exp(log_a) * z + sqrt(-expm1(2 * log_a)) * gated;
            c->want[0][at] = z;
        }
        c->want_slab[0][slot + (size_t)i] = z;
    }
}

static void test_rglru(void **state)
{
    (void)state;
    for (int i = 0; i < 24; i++) {
        int dim = random_int(1, 600);
        struct op_case c = {.tolerance = 5e-6, .p = {dim}};
        random_batch(&c.batch, random_int(1, 9), 40);
        size_t n = (size_t)c.batch.step.n_rows * (size_t)dim;
        case_input(&c, 0, n, 1);
        case_input(&c, 1, n, i % 3 ? 3 : 40); /* gates that close: a near 1, 1 - a^2 near 0 */
        case_input(&c, 2, n, i % 3 ? 3 : 40);
        case_input(&c, 3, (size_t)dim, i % 2 ? 3 : 30);
        case_state(&c, 0, dim);
        case_output(&c, 0, n);
        for (int q = 0; q < c.batch.step.n_seqs; q++)
            want_rglru(&c, q);
        run_case("rglru", &c, run_rglru);
        case_free(&c);
    }
}

/* ---- rotations ---- */

static void turn_pair(double *x, int i, int half, long double angle)
{
    double s = (double)sinl(angle), c = (double)cosl(angle), a = x[i], b = x[i + half];
    x[i] = a * c - b * s;
    x[i + half] = a * s + b * c;
}

static void run_rope(struct backend *b, struct op_case *c)
{
    size_t bytes = c->n_want[0] * sizeof(float);
    double frequency[MAX_DIM];
    for (int i = 0; i < c->p[0] / 2; i++)
        frequency[i] = pow(10000, -2.0 * i / c->p[0]);
    struct buffer *f = upload(b, frequency, (size_t)(c->p[0] / 2) * sizeof(double));
    assert_int_equal(b->ops->copy(b, c->out[0], 0, c->buffer[0], 0, bytes, NULL), STATUS_OK);
    b->ops->rope(b, c->out[0], f, c->p[1], c->p[0]);
    b->ops->buffer_close(b, f);
}

static void run_vapor(struct backend *b, struct op_case *c)
{
    b->ops->vapor(b, c->out[0], c->buffer[0], c->buffer[1], c->p[1], c->p[2], c->p[0], c->p[3]);
}

/* theta NULL: rope */
static void want_turns(struct op_case *c, const float *theta)
{
    int d = c->p[0], H = c->p[1], from = c->p[2];
    for (int row = 0; row < c->batch.step.n_rows * H; row++) {
        int r = row / H, h = row % H;
        double *out = c->want[0] + (size_t)row * d;
        for (int i = 0; i < d; i++)
            out[i] = c->input[0][((size_t)r * from + h / (H / from)) * d + i];
        for (int i = 0; i < d / 2; i++) {
            double f = theta ? c->p[3] * (double)theta[h * (d / 2) + i] : pow(10000, -2.0 * i / d);
            turn_pair(out, i, d / 2, (long double)c->batch.positions[r] * f);
        }
    }
}

static void test_rotations(void **state)
{
    (void)state;
    for (int i = 0; i < 24; i++) {
        int d = 2 * random_int(1, 70), from = random_int(1, 3),
            group = i % 2 ? random_int(1, 3) : 1;
        struct op_case c = {.tolerance = 2e-6, .p = {d, from * group, from, i % 3 ? -1 : 1}};
        random_batch(&c.batch, random_int(1, 9), 20);
        size_t rows = (size_t)c.batch.step.n_rows * (size_t)d;
        case_input(&c, 0, rows * (size_t)from, 1);
        case_input(&c, 1, (size_t)(from * group * d / 2), 2);
        case_output(&c, 0, rows * (size_t)(from * group));
        want_turns(&c, c.input[1]);
        run_case("vapor", &c, run_vapor);
        if (group == 1) {
            want_turns(&c, NULL);
            run_case("rope", &c, run_rope);
        }
        case_free(&c);
    }
}

/* ---- causal Latte ---- */

static struct latent_shape latent_shape_of(const struct op_case *c)
{
    return (struct latent_shape){.n_heads = c->p[0],
                                 .n_latents = c->p[1],
                                 .head_dim = c->p[2],
                                 .n_kv_heads = c->p[3],
                                 .gated_window = c->p[4]};
}

static void run_latent(struct backend *b, struct op_case *c)
{
    struct latent_shape shape = latent_shape_of(c);
    b->ops->latent(b, c->out[0], c->out[1], c->buffer[0], c->buffer[1], c->buffer[2], &c->state[0],
                   &c->state[1], &c->state[2], &shape);
}

/* One latent of one head over a sequence: everything in double against the sequence's own
 * maximum so far, summed anew for every row. */
static void want_latent(struct op_case *c, int seq, int h, int l)
{
    int H = c->p[0], M = c->p[1], d = c->p[2], KV = c->p[3], window = c->p[4], n_g = M + window;
    int first = c->batch.start[seq], end = c->batch.start[seq + 1], kv = h / (H / KV);
    size_t at = (size_t)c->batch.slot[seq] * (size_t)(H * M) + (size_t)(h * M + l);
    double m = -INFINITY, alpha = 0, *s = doubles((size_t)d);
    if (c->batch.positions[first]) {
        m = c->slab[0][at] = random_float(5);
        alpha = c->slab[1][at] = 1 + fabsf(random_float(50));
        for (int i = 0; i < d; i++)
            s[i] = c->slab[2][at * d + i] = random_float((float)alpha);
    }
    for (int r = first; r < end; r++) {
        double theta = c->input[0][(size_t)r * H * M + h * M + l], top = fmax(m, theta);
        double keep = m == -INFINITY ? 0 : exp(m - top), take = exp(theta - top), sum = 0;
        const float *g = c->input[1] + (size_t)(r * H + h) * n_g;
        for (int i = 0; i < n_g; i++)
            sum += exp((double)g[i] - g[l + window]);
        m = top;
        alpha = alpha * keep + take;
        for (int i = 0; i < d; i++) {
            s[i] = s[i] * keep + take * c->input[2][(size_t)(r * KV + kv) * d + i];
            c->want[0][(size_t)(r * H + h) * d + i] += s[i] / alpha / sum;
        }
        sum = 0;
        for (int i = 0; i < n_g; i++)
            sum += exp((double)g[i] - g[0]);
        if (window)
            c->want[1][r * H + h] = 1 / sum;
    }
    c->want_slab[0][at] = m;
    c->want_slab[1][at] = alpha;
    for (int i = 0; i < d; i++)
        c->want_slab[2][at * d + i] = s[i];
    free(s);
}

static void case_latent(struct op_case *c, float theta_scale)
{
    int H = c->p[0], M = c->p[1], d = c->p[2], KV = c->p[3];
    size_t n = (size_t)c->batch.step.n_rows;
    case_input(c, 0, n * (size_t)(H * M), theta_scale);
    case_input(c, 1, n * (size_t)(H * (M + c->p[4])), 4);
    case_input(c, 2, n * (size_t)(KV * d), 1);
    case_state(c, 0, H * M);
    case_state(c, 1, H * M);
    case_state(c, 2, (int64_t)H * M * d);
    case_output(c, 0, n * (size_t)(H * d));
    if (c->p[4])
        case_output(c, 1, n * (size_t)H);
    for (int q = 0; q < c->batch.step.n_seqs; q++)
        for (int i = 0; i < H * M; i++)
            want_latent(c, q, i / M, i % M);
}

static void test_latent(void **state)
{
    (void)state;
    for (int i = 0; i < 40; i++) {
        int KV = random_int(1, 3), H = KV * random_int(1, 3);
        struct op_case c = {.tolerance = 1e-5,
                            .p = {H, random_int(1, 20), random_int(1, 100), KV, i % 2}};
        random_batch(&c.batch, random_int(1, 6), i % 3 ? 5 : 60);
        /* thetas of all sizes, in random order: up to 1000 in both directions */
        case_latent(&c, i % 4 == 0 ? 1000 : i % 4 == 1 ? 100 : 3);
        run_case("latent", &c, run_latent);
        case_free(&c);
    }
}

/* Thetas that only rise, only fall, or jump between the ends of the range. */
static void test_latent_extremes(void **state)
{
    (void)state;
    for (int shape = 0; shape < 4; shape++) {
        struct op_case c = {.tolerance = 1e-5, .p = {2, 5, 33, 1, 1}};
        batch_init(&c.batch);
        batch_add(&c.batch, 4, 0, 120);
        case_latent(&c, 1);
        for (int r = 0; r < 120; r++)
            for (int i = 0; i < 10; i++) {
                float rise = -1000 + 2000 * (float)r / 119, jump = (r * 7 + i) % 3 ? 1000 : -1000;
                c.input[0][r * 10 + i] = shape == 0   ? rise
                                         : shape == 1 ? -rise
                                         : shape == 2 ? jump
                                                      : -1000;
            }
        memset(c.want[0], 0, c.n_want[0] * sizeof(double));
        for (int i = 0; i < 10; i++)
            want_latent(&c, 0, i / 5, i % 5);
        run_case("latent with extreme thetas", &c, run_latent);
        case_free(&c);
    }
}

/* ---- window ---- */

static struct window_shape window_shape_of(const struct op_case *c)
{
    return (struct window_shape){.n_heads = c->p[0],
                                 .n_kv_heads = c->p[1],
                                 .head_dim = c->p[2],
                                 .ring_rows = c->p[3],
                                 .scale = c->f[0],
                                 .softcap = c->f[1]};
}

/* out starts as input 3, to which the window is added with p0. */
static void run_window(struct backend *b, struct op_case *c)
{
    struct window_shape shape = window_shape_of(c);
    size_t bytes = c->n_want[0] * sizeof(float);
    assert_int_equal(b->ops->copy(b, c->out[0], 0, c->buffer[3], 0, bytes, NULL), STATUS_OK);
    b->ops->window(b, c->out[0], c->p[4] ? c->buffer[4] : NULL, c->buffer[0], c->buffer[1],
                   c->buffer[2], &c->state[0], &c->state[1], c->p[5] ? c->buffer[5] : NULL, &shape);
}

/* What the oracle sees: all keys from w-1 before the step's first row, or from position 0. */
struct history {
    float *k, *v; /* [n_past + n, KV, d] */
    int n_past, n;
    int64_t t0;
};

static struct history make_history(struct op_case *c, int seq)
{
    int KV = c->p[1], d = c->p[2], w = c->p[3], first = c->batch.start[seq];
    int64_t t0 = c->batch.positions[first];
    struct history h = {
        .n_past = t0 < w ? (int)t0 : w, .n = c->batch.start[seq + 1] - first, .t0 = t0};
    size_t row = (size_t)(KV * d), slot = (size_t)c->batch.slot[seq] * (size_t)c->row_values[0];
    h.k = random_floats((size_t)(h.n_past + h.n) * row, 1);
    h.v = random_floats((size_t)(h.n_past + h.n) * row, 1);
    memcpy(h.k + (size_t)h.n_past * row, c->input[1] + (size_t)first * row,
           (size_t)h.n * row * sizeof(float));
    memcpy(h.v + (size_t)h.n_past * row, c->input[2] + (size_t)first * row,
           (size_t)h.n * row * sizeof(float));
    for (int j = 0; j < h.n_past + h.n; j++) {
        int64_t t = t0 - h.n_past + j;
        for (int i = 0; i < KV * d; i++) {
            size_t at = slot + (size_t)((i / d) * (int64_t)w + t % w) * d + i % d;
            float k = h.k[(size_t)j * row + i], v = h.v[(size_t)j * row + i];
            if (j < h.n_past) {
                c->slab[0][at] = k;
                c->slab[1][at] = v;
            }
            c->want_slab[0][at] = k; /* the last position of a row stays */
            c->want_slab[1][at] = v;
        }
    }
    return h;
}

static double want_score(const struct op_case *c, const float *q, const float *k)
{
    double sum = 0;
    for (int i = 0; i < c->p[2]; i++)
        sum += (double)q[i] * k[i];
    sum *= c->f[0];
    return c->f[1] > 0 ? c->f[1] * tanh(sum / c->f[1]) : sum;
}

static void want_window_row(struct op_case *c, const struct history *hist, int row, int r, int h)
{
    int H = c->p[0], KV = c->p[1], d = c->p[2], w = c->p[3], kv = h / (H / KV);
    int now = hist->n_past + r, oldest = now - w + 1 > 0 ? now - w + 1 : 0;
    const float *q = c->input[0] + (size_t)(row * H + h) * d;
    double *local = doubles((size_t)d), *v = doubles((size_t)d), sum = 0;
    for (int j = oldest; j <= now; j++) {
        size_t at = (size_t)(j * KV + kv) * d;
        double p = exp(want_score(c, q, hist->k + at));
        for (int i = 0; i < d; i++)
            v[i] = hist->v[at + i];
        for (int i = 0; i < d / 2 && c->p[5]; i++)
            turn_pair(v, i, d / 2, (now - j) * (long double)c->input[5][h * (d / 2) + i]);
        sum += p;
        for (int i = 0; i < d; i++)
            local[i] += p * v[i];
    }
    for (int i = 0; i < d; i++) {
        size_t at = (size_t)(row * H + h) * d + i;
        double scale = c->p[4] ? c->input[4][row * H + h] : 1;
        c->want[0][at] = scale * local[i] / sum + (c->p[4] ? c->input[3][at] : 0);
    }
    free(local);
    free(v);
}

static void case_window(struct op_case *c)
{
    int H = c->p[0], KV = c->p[1], d = c->p[2], w = c->p[3];
    size_t n = (size_t)c->batch.step.n_rows;
    case_input(c, 0, n * (size_t)(H * d), 2);
    case_input(c, 1, n * (size_t)(KV * d), 1);
    case_input(c, 2, n * (size_t)(KV * d), 1);
    case_input(c, 3, n * (size_t)(H * d), 1);
    case_input(c, 4, n * (size_t)H, 1);
    case_input(c, 5, (size_t)(H * d / 2), 2);
    case_state(c, 0, (int64_t)KV * w * d);
    case_state(c, 1, (int64_t)KV * w * d);
    case_output(c, 0, n * (size_t)(H * d));
    for (int s = 0; s < c->batch.step.n_seqs; s++) {
        struct history hist = make_history(c, s);
        for (int r = 0; r < hist.n; r++)
            for (int h = 0; h < H; h++)
                want_window_row(c, &hist, c->batch.start[s] + r, r, h);
        free(hist.k);
        free(hist.v);
    }
}

static void test_window(void **state)
{
    (void)state;
    static const int rings[] = {1, 2, 5, 16, 63, 64, 65, 128, 200};
    for (int i = 0; i < 54; i++) {
        int KV = random_int(1, 3), H = KV * random_int(1, 3), d = 2 * random_int(1, 40);
        struct op_case c = {
            .tolerance = 1e-5,
            .p = {H, KV, d, rings[i % (int)COUNT_OF(rings)], i % 2, i % 3 == 0},
            .f = {i % 5 ? 1 / sqrtf((float)d) : 1, i % 4 == 3 ? 5 : 0},
        };
        random_batch(&c.batch, random_int(1, 6), i % 2 ? 90 : 6);
        case_window(&c);
        run_case("window", &c, run_window);
        case_free(&c);
    }
}

/* The ring of full attention: keys from the beginning of the session on. */
static void test_window_wide(void **state)
{
    (void)state;
    struct op_case c = {.tolerance = 2e-5, .p = {4, 2, 64, 4096, 0, 0}, .f = {0.125f, 0}};
    batch_init(&c.batch);
    batch_add(&c.batch, 3, 0, 70);
    batch_add(&c.batch, 5, 3000, 1);
    batch_add(&c.batch, 6, 4090, 5);
    case_window(&c);
    run_case("window of 4096", &c, run_window);
    case_free(&c);
}

/* ---- exact equalities ---- */

/* The rows of sequence `seq`, n values each, out of a whole batch's. */
static float *rows_of(const struct op_case *c, int seq, const float *x, size_t row_values)
{
    int first = c->batch.start[seq], n = c->batch.start[seq + 1] - first;
    float *rows = malloc((size_t)n * row_values * sizeof(float) + 1);
    memcpy(rows, x + (size_t)first * row_values, (size_t)n * row_values * sizeof(float));
    return rows;
}

/* A case of one sequence out of a batch, in which inputs 0..n_rows-1 have a row per token.
 * It borrows nothing. */
static void case_alone(struct op_case *out, const struct op_case *c, int seq,
                       const bool per_row[MAX_INPUTS])
{
    *out = *c;
    int first = c->batch.start[seq], n = c->batch.start[seq + 1] - first;
    batch_init(&out->batch);
    batch_add(&out->batch, c->batch.slot[seq], c->batch.positions[first], n);
    for (int i = 0; i < MAX_INPUTS; i++) {
        size_t row = c->n_input[i] / (size_t)c->batch.step.n_rows;
        if (!c->input[i])
            continue;
        out->n_input[i] = per_row[i] ? row * (size_t)n : c->n_input[i];
        out->input[i] = per_row[i]
                            ? rows_of(c, seq, c->input[i], row)
                            : memcpy(malloc(c->n_input[i] * 4 + 1), c->input[i], c->n_input[i] * 4);
    }
    for (int i = 0; i < MAX_STATES; i++) {
        size_t size = (size_t)c->row_values[i] * N_SLOTS;
        out->slab[i] = c->slab[i] ? memcpy(malloc(size * 4 + 1), c->slab[i], size * 4) : NULL;
        out->want_slab[i] = NULL;
    }
    for (int i = 0; i < MAX_OUTPUTS; i++) {
        out->n_want[i] = c->n_want[i] / (size_t)c->batch.step.n_rows * (size_t)n;
        out->want[i] = c->want[i] ? doubles(out->n_want[i]) : NULL;
    }
}

/* Bit for bit, or (tolerance > 0) nearly. */
static void expect_alike(const char *what, const float *got, const float *want, size_t n,
                         double tolerance)
{
    if (tolerance == 0) {
        expect_same(what, got, want, n);
        return;
    }
    for (size_t i = 0; i < n; i++)
        if (!isnan(got[i]) || !isnan(want[i]))
            expect_close(what, got + i, (const double[]){want[i]}, 1, tolerance);
}

/* Outputs of `got` are those of sequence seq in `whole`; states too. */
static void expect_part(const char *what, struct backend *b, struct op_case *got,
                        struct backend *whole_b, struct op_case *whole, int seq, double tolerance)
{
    for (int i = 0; i < MAX_OUTPUTS; i++) {
        if (!whole->want[i])
            continue;
        size_t row = whole->n_want[i] / (size_t)whole->batch.step.n_rows;
        float *x = download(b, got->out[i], got->n_want[i]);
        float *all = download(whole_b, whole->out[i], whole->n_want[i]);
        expect_alike(what, x, all + (size_t)whole->batch.start[seq] * row, got->n_want[i],
                     tolerance);
        free(x);
        free(all);
    }
    for (int i = 0; i < MAX_STATES; i++) {
        if (!whole->slab[i])
            continue;
        size_t n = (size_t)whole->row_values[i], at = (size_t)whole->batch.slot[seq] * n;
        float *x = download(b, got->state[i].buffer, n * N_SLOTS);
        float *all = download(whole_b, whole->state[i].buffer, n * N_SLOTS);
        expect_alike(what, x + at, all + at, n, tolerance);
        free(x);
        free(all);
    }
}

/* Split the sequence's rows at random and run the pieces one after the other. Inputs and
 * outputs of a piece move through buffers of the case, whose rows are those of the piece. */
static void run_in_chunks(struct backend *b, const struct op_case *alone, run_op *run,
                          const bool per_row[MAX_INPUTS], struct op_case *joined)
{
    int n = alone->batch.step.n_rows;
    *joined = *alone;
    case_upload(b, joined);
    for (int first = 0, rows; first < n; first += rows) {
        rows = random_int(1, 3) > 1 ? 1 : random_int(1, 40);
        rows = rows < n - first ? rows : n - first;
        struct op_case piece = *joined;
        batch_init(&piece.batch);
        batch_add(&piece.batch, alone->batch.slot[0], alone->batch.positions[0] + first, rows);
        for (int i = 0; i < MAX_INPUTS; i++) {
            size_t row = alone->n_input[i] / (size_t)n;
            if (alone->input[i] && per_row[i])
                piece.buffer[i] =
                    upload_floats(b, alone->input[i] + (size_t)first * row, (size_t)rows * row);
        }
        for (int i = 0; i < MAX_OUTPUTS; i++) {
            piece.n_want[i] = alone->n_want[i] / (size_t)n * (size_t)rows;
            piece.out[i] = alone->want[i] ? empty(b, piece.n_want[i]) : NULL;
        }
        run_step(b, &piece, run, &piece.batch.step);
        for (int i = 0; i < MAX_INPUTS; i++)
            if (alone->input[i] && per_row[i])
                b->ops->buffer_close(b, piece.buffer[i]);
        for (int i = 0; i < MAX_OUTPUTS; i++) {
            size_t row = alone->n_want[i] / (size_t)n * sizeof(float);
            if (!alone->want[i])
                continue;
            b->ops->copy(b, joined->out[i], (size_t)first * row, piece.out[i], 0,
                         (size_t)rows * row, NULL);
            b->ops->buffer_close(b, piece.out[i]);
        }
    }
}

/* Kernels of the GPU for prompts and for single rows add in other orders. */
static const double chunk_tolerance = 1e-5;

/* For every subject: the batch with 1 and with 5 threads, each sequence alone, and each in
 * random chunks when `chunks`. */
static void check_exact(const char *op, struct op_case *c, run_op *run, const bool *per_row,
                        bool chunks)
{
    for (int i = 0; i < n_subjects; i++) {
        char what[96];
        const struct subject *subject = &subjects[i];
        struct backend *b = subject->cuda ? exact_cuda : subject->b;
        struct backend *other = subject->kernels ? open_cpu(subject->kernels, i % 2 ? 5 : 1) : NULL;
        struct op_case threads = *c, alone, joined;
        snprintf(what, sizeof(what), "%s on %s", op, subject->name);
        case_upload(b, c);
        run_step(b, c, run, &c->batch.step);
        if (other) {
            case_upload(other, &threads);
            run_step(other, &threads, run, &c->batch.step);
        }
        for (int seq = 0; seq < c->batch.step.n_seqs; seq++) {
            case_alone(&alone, c, seq, per_row);
            case_upload(b, &alone);
            run_step(b, &alone, run, &alone.batch.step);
            expect_part(what, b, &alone, b, c, seq, 0);
            if (other)
                expect_part(what, b, &alone, other, &threads, seq, 0);
            case_release(b, &alone);
            if (chunks) {
                run_in_chunks(b, &alone, run, per_row, &joined);
                expect_part(what, b, &joined, b, c, seq, subject->cuda ? chunk_tolerance : 0);
                case_release(b, &joined);
            }
            case_free(&alone);
        }
        case_release(b, c);
        if (other) {
            case_release(other, &threads);
            other->ops->close(other);
        }
    }
}

static void test_exact_linear(void **state)
{
    (void)state;
    static const bool per_row[MAX_INPUTS] = {true};
    for (int i = 0; i < 10; i++) {
        struct op_case c = {.p = {0}};
        matrix_dtype = i % 2 ? DTYPE_BF16 : DTYPE_F32;
        file_dtype = DTYPE_F32;
        random_batch(&c.batch, random_int(2, 5), 25);
        /* with the library a chunk's result may depend on its own length, not on others */
        bool library = i % 3 == 2;
        if (library) {
            batch_add(&c.batch, 1, 0, 260);
            batch_add(&c.batch, 2, 0, 3);
        }
        case_matrix(&c, random_int(1, 400), random_int(1, 600));
        c.p[2] = 1;
        case_input(&c, 0, (size_t)c.batch.step.n_rows * (size_t)c.p[1], 1);
        case_output(&c, 0, (size_t)c.batch.step.n_rows * (size_t)c.p[0]);
        check_exact("linear", &c, run_linear, per_row, !library);
        case_free(&c);
    }
}

static void test_exact_latent(void **state)
{
    (void)state;
    static const bool per_row[MAX_INPUTS] = {true, true, true};
    for (int i = 0; i < 6; i++) {
        struct op_case c = {.p = {4, random_int(1, 20), random_int(1, 100), 2, i % 2}};
        random_batch(&c.batch, random_int(2, 6), 60);
        case_latent(&c, i % 2 ? 3 : 1000);
        check_exact("latent", &c, run_latent, per_row, true);
        case_free(&c);
    }
}

static void test_exact_window(void **state)
{
    (void)state;
    static const bool per_row[MAX_INPUTS] = {true, true, true, true, true};
    static const int rings[] = {3, 40, 64, 100, 130, 256};
    for (int i = 0; i < 12; i++) {
        int d = 2 * random_int(1, 40);
        struct op_case c = {.p = {6, 2, d, rings[i % 6], i % 2, i % 4 > 1}, .f = {0.2f, 0}};
        random_batch(&c.batch, random_int(2, 5), 80);
        case_window(&c);
        check_exact("window", &c, run_window, per_row, true);
        case_free(&c);
    }
}

static void test_exact_inputs(void **state)
{
    (void)state;
    static const bool conv_rows[MAX_INPUTS] = {true};
    static const bool rglru_rows[MAX_INPUTS] = {true, true, true};
    for (int i = 0; i < 6; i++) {
        struct op_case c = {.p = {random_int(1, 400), random_int(2, 5), i % 2}};
        random_batch(&c.batch, random_int(2, 6), 60);
        size_t dim = (size_t)c.p[0], n = (size_t)c.batch.step.n_rows * dim;
        case_input(&c, 0, n, 1);
        case_input(&c, 1, dim * (size_t)c.p[1], 1);
        case_input(&c, 2, dim, 1);
        case_state(&c, 0, (int64_t)(c.p[1] - 1) * (int64_t)dim);
        case_output(&c, 0, n);
        for (int q = 0; q < c.batch.step.n_seqs; q++)
            want_conv(&c, q);
        check_exact("conv", &c, run_conv, conv_rows, true);
        case_free(&c);

        struct op_case g = {.p = {(int)dim}};
        random_batch(&g.batch, random_int(2, 6), 60);
        n = (size_t)g.batch.step.n_rows * dim;
        for (int j = 0; j < 3; j++)
            case_input(&g, j, n, 2);
        case_input(&g, 3, dim, 2);
        case_state(&g, 0, (int64_t)dim);
        case_output(&g, 0, n);
        for (int q = 0; q < g.batch.step.n_seqs; q++)
            want_rglru(&g, q);
        check_exact("rglru", &g, run_rglru, rglru_rows, true);
        case_free(&g);
    }
}

/* ---- kernels and memory ---- */

static void test_exp(void **state)
{
    (void)state;
    static const char *const tables[] = {"avx512", "avx2", "portable"};
    static const float special[] = {0,      -0.0f,  1,        -1,        88.7f,   88.8f,   1000,
                                    -87.3f, -88,    -100,     -103,      -103.9f, -104.1f, -1000,
                                    3e38f,  -3e38f, INFINITY, -INFINITY, 1e-30f,  -1e-40f};
    enum { N = 200000 };
    float *x = malloc(N * sizeof(*x)), *y = malloc(N * sizeof(*y));
    for (int i = 0; i < N; i++)
        x[i] = i < (int)COUNT_OF(special) ? special[i] : -104 + 193 * (float)i / N;
    for (size_t t = 0; t < COUNT_OF(tables); t++) {
        const struct kernels *k = kernels_find(tables[t]);
        if (!k)
            continue;
        k->exp(y, x, N);
        for (int i = 0; i < N; i++) {
            double want = exp((double)x[i]);
            double ulp = fmax(fabs(want) * 0x1p-23, 0x1p-149);
            if ((float)want == INFINITY ? y[i] < 3.4e38f : !(fabs(y[i] - want) <= 2 * ulp))
                fail_msg("%s: exp(%.9g) is %.9g, expected %.9g", k->name, x[i], y[i], want);
        }
        float nan = NAN;
        k->exp(&nan, &nan, 1);
        assert_true(isnan(nan));
    }
    free(x);
    free(y);
}

/* Angles of positions up to 2^53: against residues computed in 128-bit integers. theta is
 * 2 pi p / 2^q, so position * theta is 2 pi times an exact fraction, save that theta itself is
 * rounded to double: positions stay below 2^53 / 2^20 there. */
static void test_large_angles(void **state)
{
    (void)state;
    const struct kernels *k = kernels_pick();
    for (int i = 0; i < 2000; i++) {
        int64_t position = (int64_t)random_bits() * 2 + 1; /* up to 2^33 */
        int64_t p = random_int(1, 1 << 20);
        double frequency = 2 * M_PI * (double)p / (1 << 20);
        long double turns = (long double)((position * (__int128)p) % (1 << 20)) / (1 << 20);
        float sine, cosine;
        k->angles(&sine, &cosine, &frequency, (double)position, 1);
        /* the frequency is rounded: 2.4e-16 for pi and 7e-16 for the product, once a turn */
        double slack = 1e-6 + 1e-15 * (double)position * (double)p / (1 << 20);
        assert_true(fabs(sine - (double)sinl(2 * M_PIl * turns)) < slack);
        assert_true(fabs(cosine - (double)cosl(2 * M_PIl * turns)) < slack);
    }
    double one = 1;
    for (int64_t position = (1LL << 53) - 40; position <= 1LL << 53; position++) {
        float sine, cosine;
        k->angles(&sine, &cosine, &one, (double)position, 1);
        assert_true(fabs(sine - sin((double)position)) < 1e-6);
        assert_true(fabs(cosine - cos((double)position)) < 1e-6);
    }
}

static void test_library(void **state)
{
    (void)state;
    if (!cpu_library_is_right())
        print_message("OpenBLAS computes wrong products here: the backend does without it\n");
    else if (!cpu_library_is_wide())
        print_message("OpenBLAS without AVX-512: the AVX-512 kernels do without it\n");
}

static void test_memory(void **state)
{
    (void)state;
    for (int i = 0; i < n_subjects; i++) {
        struct backend *b = subjects[i].b;
        struct buffer *x, *y;
        char text[8] = "abcdefg", back[8];
        struct error err;
        assert_int_equal(b->ops->buffer_open(b, &x, 8, NULL), STATUS_OK);
        assert_int_equal(b->ops->buffer_open(b, &y, 8, NULL), STATUS_OK);
        assert_int_equal(b->ops->read(b, back, x, 0, 8, NULL), STATUS_OK);
        assert_memory_equal(back, "\0\0\0\0\0\0\0\0", 8);
        assert_int_equal(b->ops->write(b, x, 0, text, 8, NULL), STATUS_OK);
        assert_int_equal(b->ops->copy(b, y, 2, x, 1, 3, NULL), STATUS_OK);
        assert_int_equal(b->ops->read(b, back, y, 0, 8, NULL), STATUS_OK);
        assert_memory_equal(back, "\0\0bcd\0\0\0", 8);
        assert_memory_equal(b->ops->map(b, x, 8), text, 8);
        /* ranges that end past the buffer, or wrap around; the GPU asserts them */
        if (!subjects[i].cuda) {
            assert_int_equal(b->ops->write(b, x, 1, text, 8, &err), STATUS_INTERNAL);
            assert_int_equal(b->ops->read(b, back, x, 9, 0, &err), STATUS_INTERNAL);
            assert_int_equal(b->ops->copy(b, y, 0, x, SIZE_MAX, 2, &err), STATUS_INTERNAL);
        }
        assert_int_equal(b->ops->buffer_open(b, &x, SIZE_MAX / 2, &err), STATUS_NOMEM);
        release(b, (struct buffer *[]){x, y, NULL}, 3);
    }
}

static int new_seed(void **state)
{
    (void)state;
    seed = 0x9e3779b97f4a7c15u; /* every test alone gives what it gives in the suite */
    return 0;
}

#define TEST(f) cmocka_unit_test_setup(f, new_seed)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_memory),
        TEST(test_norm),
        TEST(test_head_norm),
        TEST(test_add_and_activate),
        TEST(test_gather_and_softcap),
        TEST(test_linear),
        TEST(test_embed),
        TEST(test_bf16_rounding),
        TEST(test_block_linear),
        TEST(test_conv),
        TEST(test_rglru),
        TEST(test_rotations),
        TEST(test_latent),
        TEST(test_latent_extremes),
        TEST(test_window),
        TEST(test_window_wide),
        TEST(test_exact_linear),
        TEST(test_exact_latent),
        TEST(test_exact_window),
        TEST(test_exact_inputs),
        TEST(test_exp),
        TEST(test_large_angles),
        TEST(test_library),
    };
    return cmocka_run_group_tests(tests, open_subjects, close_subjects);
}
