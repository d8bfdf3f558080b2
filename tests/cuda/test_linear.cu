/* test_linear.cu - matrix products of the CUDA backend against loops in double precision, in
 * every shape the kernels tell apart; and bit for bit: a row's result is the same whatever the
 * number of rows.
 *
 * Tolerances. Products of bf16 factors are exact in f32, so what is left is the rounding of f32
 * sums (2^-24 an addition; 4e-7 of the sum of |x w| covers it for these lengths) and of the
 * result: 2^-8 of it in bf16. A normed input is rounded to bf16 after f32 arithmetic that differs
 * from double in the last bits: one in some thousands is rounded to the neighbour, 2^-7 away, so
 * that two of the largest terms' 2^-7 come on top. The library rounds gate and up to bf16 first.
 */
#include <math.h>
#include <stdlib.h>

#include "engine/kernels/cuda/fused.cuh"
#include "engine/kernels/cuda/stream.cuh"
#include "tests/cuda/values.cuh"

extern "C" {
#include "weights/dtype.h"
}

static struct cuda c;
static struct step_sizes *sizes; /* device */

enum { MAX_ROWS = 80, MAX_DIM = 4096, PAD = 3 };

static int open_device(void **)
{
    struct cudaDeviceProp props;
    int n = 0;
    if (cudaGetDeviceCount(&n) != cudaSuccess || !n)
        return 0; /* each test skips */
    OK(cudaGetDeviceProperties(&props, 0));
    c.queue.capability = 10 * props.major + props.minor;
    c.queue.pdl = c.queue.capability >= 90;
    OK(cudaStreamCreate(&c.queue.stream));
    OK(cudaMalloc((void **)&c.converted, MAX_ROWS * MAX_DIM * sizeof(bf16)));
    OK(cudaMalloc((void **)&sizes, sizeof(*sizes)));
    c.partial_values = 4096;
    OK(cudaMalloc((void **)&c.partials, c.partial_values * sizeof(float)));
    c.step.sizes = sizes;
    struct error err;
    return library_open(&c.library, &c, &err);
}

static int close_device(void **)
{
    library_close(c.library);
    cudaFree(c.converted);
    cudaFree(c.partials);
    cudaFree(sizes);
    if (c.queue.stream)
        cudaStreamDestroy(c.queue.stream);
    return 0;
}

static void need_device(void)
{
    if (!c.queue.stream) {
        print_message("SKIPPED: no CUDA device\n");
        skip();
    }
}

/* The same, and not under racecheck or initcheck (make test-gpu-sanitize), of which the first stops
 * in kernels of the library's, and the second does not see what they write. */
static void need_library(void)
{
    const char *quick = getenv("LATTE_TEST_QUICK");
    need_device();
    if (quick && !strcmp(quick, "2")) {
        print_message("SKIPPED: the library's kernels are not for this tool\n");
        skip();
    }
}

static void *from_device(const void *p, size_t n_bytes)
{
    void *host = malloc(n_bytes);
    OK(c.queue.error);
    OK(cudaMemcpyAsync(host, p, n_bytes, cudaMemcpyDeviceToHost, c.queue.stream));
    OK(cudaStreamSynchronize(c.queue.stream));
    return host;
}

/* ---- a product, on the device and in double ---- */

struct shape {
    const char *name;
    int n_sms; /* what the kernels believe: it decides about tiles */
    int rows, actual, n_out, n_in;
    enum product_output output;
    int norm; /* -1: none */
    bool bias, int8, gather;
    float softcap;
    enum activation act;
};

struct operands {
    float *in;      /* [MAX_ROWS, n_in] */
    float *weights; /* [n_out, n_in], scaled */
    float *bias, *norm_weight, *norm_bias, *scales;
    int32_t in_rows[MAX_ROWS];
    struct product p; /* on the device */
    void *before;     /* out before the product */
    size_t out_bytes;
};

/* Weights are whole numbers times their row's scale. */
static const void *make_int8(struct operands *o, int n_out, int n_in)
{
    int8_t *q = (int8_t *)malloc((size_t)n_out * n_in);
    for (int r = 0; r < n_out; r++) {
        o->scales[r] = 0.5f + fabsf(o->scales[r]);
        for (int i = 0; i < n_in; i++) {
            const int64_t at = (int64_t)r * n_in + i;
            q[at] = (int8_t)((int)(test_random(&seed) % 255) - 127);
            o->weights[at] = q[at] * o->scales[r];
        }
    }
    const void *p = on_device(q, (size_t)n_out * n_in);
    free(q);
    return p;
}

static bool is_float(enum product_output output)
{
    return output == OUTPUT_F32 || output == OUTPUT_ADD;
}

static int width_of(const struct shape *s)
{
    return s->output == OUTPUT_ACTIVATE ? s->n_out / 2 : s->n_out;
}

/* Inputs of rows that do not count are NaN, and so are the rows of results beyond. */
static void make(struct operands *o, const struct shape *s)
{
    const bool normed = s->norm >= 0;
    const size_t n_weights = (size_t)s->n_out * s->n_in;
    *o = {};
    seed = 12345;
    o->in = random_values((size_t)MAX_ROWS * s->n_in, !normed);
    o->weights = random_values(n_weights, true);
    o->bias = random_values(s->n_out, false);
    o->scales = random_values(s->n_out, false);
    o->norm_weight = random_values(s->n_in, false);
    o->norm_bias = random_values(s->n_in, false);
    for (int r = 0; r < MAX_ROWS; r++)
        o->in_rows[r] = r >= s->actual ? 1 << 30 : s->gather ? (r * 7 + 3) % s->actual : r;
    for (int r = s->actual; r < MAX_ROWS; r++)
        for (int i = 0; i < s->n_in; i++)
            o->in[(size_t)r * s->n_in + i] = NAN;

    struct product *p = &o->p;
    p->w = {nullptr, s->int8 ? DTYPE_I8 : DTYPE_BF16, nullptr, nullptr, s->n_out, s->n_in};
    p->w.data = s->int8 ? make_int8(o, s->n_out, s->n_in) : device_bf16(o->weights, n_weights);
    p->w.scales = s->int8 ? on_device(o->scales, s->n_out) : nullptr;
    p->w.bias = s->bias ? on_device(o->bias, s->n_out) : nullptr;
    p->in = normed ? (const void *)on_device(o->in, (size_t)MAX_ROWS * s->n_in)
                   : device_bf16(o->in, (size_t)MAX_ROWS * s->n_in);
    p->in_stride = s->n_in;
    if (normed)
        p->norm = {on_device(o->norm_weight, s->n_in),
                   s->norm == NORM_LAYER ? on_device(o->norm_bias, s->n_in) : nullptr,
                   (enum norm_type)s->norm, 1e-5f};
    p->in_rows = s->gather ? on_device(o->in_rows, MAX_ROWS) : nullptr;
    p->output = s->output;
    p->act = s->act;
    p->softcap = s->softcap;
    p->rows = s->rows;
    const struct step_sizes actual = {s->actual, 0, 0, s->actual, 0, 0};
    OK(cudaMemcpy(sizes, &actual, sizeof(actual), cudaMemcpyHostToDevice));
    p->n_rows = &sizes->n_rows;

    const size_t n = (size_t)MAX_ROWS * (width_of(s) + PAD);
    float *out = random_values(n, false);
    p->out_stride = width_of(s) + PAD;
    o->out_bytes = n * (is_float(s->output) ? 4 : 2);
    p->out = is_float(s->output) ? (void *)on_device(out, n) : (void *)device_bf16(out, n);
    free(out);
    o->before = from_device(p->out, o->out_bytes);
}

static void release(struct operands *o)
{
    const struct product *p = &o->p;
    const void *device[] = {p->w.data,      p->w.scales,  p->w.bias,  p->in,
                            p->norm.weight, p->norm.bias, p->in_rows, p->out};
    for (size_t i = 0; i < COUNT_OF(device); i++)
        cudaFree((void *)device[i]);
    void *host[] = {o->in, o->weights, o->bias, o->scales, o->norm_weight, o->norm_bias, o->before};
    for (size_t i = 0; i < COUNT_OF(host); i++)
        free(host[i]);
}

/* The row's input as the product sees it. */
static void input_row(double *x, const struct operands *o, const struct shape *s, int row)
{
    const float *in = o->in + (size_t)o->in_rows[row] * s->n_in;
    double mean = 0, square = 0;
    if (s->norm == NORM_LAYER)
        for (int i = 0; i < s->n_in; i++)
            mean += in[i] / s->n_in;
    for (int i = 0; i < s->n_in; i++)
        square += (in[i] - mean) * (in[i] - mean) / s->n_in;
    for (int i = 0; i < s->n_in; i++) {
        x[i] = in[i];
        if (s->norm >= 0) {
            double y = (in[i] - mean) / sqrt(square + 1e-5) * o->norm_weight[i];
            x[i] = rounded((float)(s->norm == NORM_LAYER ? y + o->norm_bias[i] : y));
        }
    }
}

struct expected {
    double y, error;  /* what it may be off */
    double size, raw; /* sum of |x w|; y before the bias */
};

static struct expected dot(const struct operands *o, const struct shape *s, const double *x, int r)
{
    const float *w = o->weights + (size_t)r * s->n_in;
    double sum = 0, size = 0, most = 0;
    for (int i = 0; i < s->n_in; i++) {
        sum += x[i] * w[i];
        size += fabs(x[i] * w[i]);
        most = fmax(most, fabs(x[i] * w[i]));
    }
    double error = 4e-7 * size + (s->norm >= 0 ? 2 * most * 0x1p-7 : 0) + 1e-6;
    return {s->bias ? sum + o->bias[r] : sum, error, size, sum};
}

/* library: products are rounded to bf16 before bias and activation, and int8 weights are. */
static struct expected product_of(const struct operands *o, const struct shape *s, const double *x,
                                  int r, bool library)
{
    struct expected e = dot(o, s, x, r);
    if (library && s->int8)
        e.error += 0x1p-8 * e.size;
    if (library && !is_float(s->output))
        e.error += 0x1p-8 * fabs(e.raw);
    return e;
}

static struct expected result(const struct operands *o, const struct shape *s, const double *x,
                              int r, double before, bool library)
{
    struct expected e = product_of(o, s, x, r, library);
    switch (s->output) {
    case OUTPUT_F32:
        if (s->softcap != 0)
            e.y = s->softcap * tanh(e.y / s->softcap);
        return e;
    case OUTPUT_ADD:
        e.y += before;
        return e;
    case OUTPUT_BF16:
        e.error += 0x1p-8 * (fabs(e.y) + e.error);
        return e;
    case OUTPUT_ACTIVATE_PLAIN: /* slopes are below 1.2 */
        e.y = activation(e.y, s->act);
        e.error = 1.2 * e.error;
        e.error += 0x1p-8 * (fabs(e.y) + e.error);
        return e;
    case OUTPUT_ACTIVATE: {
        const struct expected up = product_of(o, s, x, r + s->n_out / 2, library);
        const double act = activation(e.y, s->act), act_error = 1.2 * e.error;
        e.y = act * up.y;
        e.error = act_error * fabs(up.y) + up.error * (fabs(act) + act_error);
        e.error += 0x1p-8 * (fabs(e.y) + e.error);
        return e;
    }
    }
    return e;
}

static double value_at(const void *out, const struct shape *s, size_t i)
{
    return is_float(s->output) ? ((const float *)out)[i] : __bfloat162float(((const bf16 *)out)[i]);
}

/* Every result, and that nothing else was written: no row beyond the actual ones (those of the
 * bucket aside, where the library computed), no column beyond the last. */
static void check(const struct operands *o, const struct shape *s, const void *out, bool library)
{
    double *x = (double *)malloc(s->n_in * sizeof(*x));
    const int width = width_of(s), stride = width + PAD;
    const size_t size = is_float(s->output) ? 4 : 2;
    for (int r = 0; r < MAX_ROWS; r++) {
        if (r < s->actual)
            input_row(x, o, s, r);
        for (int i = 0; i < stride; i++) {
            const size_t at = (size_t)r * stride + i;
            if (r >= s->actual || i >= width) {
                if ((!library || r >= s->rows || i >= width) &&
                    memcmp((char *)out + at * size, (char *)o->before + at * size, size))
                    fail_msg("%s: row %d column %d was written", s->name, r, i);
                continue;
            }
            const struct expected e = result(o, s, x, i, value_at(o->before, s, at), library);
            const double y = value_at(out, s, at);
            if (!(fabs(y - e.y) <= e.error))
                fail_msg("%s: row %d column %d is %.8g, not %.8g (+- %.2g)", s->name, r, i, y, e.y,
                         e.error);
        }
    }
    free(x);
}

/* clang-format off */
static const struct shape shapes[] = {
    /* name          n_sms rows actual n_out n_in output                norm       bias   int8   gather softcap act */
    {"tiny",             8,  1,  1,   5,   24, OUTPUT_F32,               -1,         false, false, false, 0, ACTIVATION_SILU},
    {"1 tile",           8,  8,  7,  43,  264, OUTPUT_F32,               -1,         true,  false, false, 0, ACTIVATION_SILU},
    {"long",             8,  2,  2,   9, 3400, OUTPUT_ADD,               -1,         true,  false, false, 0, ACTIVATION_SILU},
    {"long, 16 rows",    8, 16, 16,   8, 1864, OUTPUT_ADD,               -1,         false, false, false, 0, ACTIVATION_SILU},
    {"2 tiles",          8, 16, 11, 150,   72, OUTPUT_BF16,              -1,         true,  false, false, 0, ACTIVATION_SILU},
    {"2 tiles, norm",    8,  1,  1, 151,  104, OUTPUT_BF16,              NORM_RMS,   true,  false, false, 0, ACTIVATION_SILU},
    {"4 tiles, norm",    8, 32, 29, 300,   40, OUTPUT_BF16,              NORM_LAYER, true,  false, false, 0, ACTIVATION_SILU},
    {"6 tiles, 40 rows", 8, 40, 34, 470,   48, OUTPUT_F32,               NORM_RMS,   false, false, true,  0, ACTIVATION_SILU},
    {"8 tiles",          8, 64, 64, 645,   32, OUTPUT_F32,               -1,         false, false, true,  9, ACTIVATION_SILU},
    {"head",             1,  4,  3, 333,  200, OUTPUT_F32,               NORM_RMS,   false, false, true, 15, ACTIVATION_SILU},
    {"head, deep",       1, 16, 13, 200, 1064, OUTPUT_F32,               NORM_LAYER, true,  false, false, 0, ACTIVATION_SILU},
    {"head, no norm",    1, 12, 12, 260,  808, OUTPUT_F32,               -1,         true,  false, true,  0, ACTIVATION_SILU},
    {"groups",           8, 70, 67,  20,   56, OUTPUT_ADD,               -1,         false, false, false, 0, ACTIVATION_SILU},
    {"groups, norm",     8, 70, 70,  20,   56, OUTPUT_BF16,              NORM_RMS,   false, false, false, 0, ACTIVATION_SILU},
    {"a group empty",    8, 70, 64,  20,   56, OUTPUT_F32,               -1,         false, false, false, 0, ACTIVATION_SILU},
    {"gated",            8,  9,  9, 156,   96, OUTPUT_ACTIVATE,          NORM_RMS,   true,  false, false, 0, ACTIVATION_GELU_TANH},
    {"gated, wide",      1, 16, 16, 384,   64, OUTPUT_ACTIVATE,          NORM_RMS,   false, false, false, 0, ACTIVATION_SILU},
    {"gated, 6 tiles",   8, 33, 33, 460,   64, OUTPUT_ACTIVATE,          -1,         false, false, false, 0, ACTIVATION_GELU},
    {"plain",            8,  6,  6,  33,   80, OUTPUT_ACTIVATE_PLAIN,    NORM_LAYER, true,  false, false, 0, ACTIVATION_GELU},
    {"int8",             8,  3,  3,  21,  144, OUTPUT_F32,               -1,         true,  true,  false, 0, ACTIVATION_SILU},
    {"int8, long",       8, 10, 10,  12, 1808, OUTPUT_ADD,               -1,         false, true,  false, 0, ACTIVATION_SILU},
    {"int8, norm",       8, 20, 18, 100,  272, OUTPUT_BF16,              NORM_RMS,   false, true,  false, 0, ACTIVATION_SILU},
    {"int8, head",       1,  2,  2, 300,  208, OUTPUT_F32,               NORM_RMS,   true,  true,  true, 30, ACTIVATION_SILU},
    {"int8, gated",      8, 50, 50, 300,   64, OUTPUT_ACTIVATE,          NORM_RMS,   true,  true,  false, 0, ACTIVATION_SILU},
    {"odd",              8,  3,  2,  17,   30, OUTPUT_F32,               -1,         true,  false, false, 5, ACTIVATION_SILU},
    {"odd, norm",        8,  3,  3,  17,   20, OUTPUT_ADD,               NORM_RMS,   true,  false, true,  0, ACTIVATION_SILU},
    {"odd, gated",       8,  5,  5,  18,   27, OUTPUT_ACTIVATE,          -1,         true,  false, false, 0, ACTIVATION_SILU},
    {"odd, int8",        8,  2,  2,   9,   24, OUTPUT_BF16,              NORM_LAYER, true,  true,  false, 0, ACTIVATION_SILU},
};
/* clang-format on */

static void test_skinny(void **)
{
    need_device();
    for (size_t i = 0; i < COUNT_OF(shapes); i++) {
        struct operands o;
        make(&o, &shapes[i]);
        c.queue.n_sms = shapes[i].n_sms;
        skinny_product(&c, &o.p);
        void *out = from_device(o.p.out, o.out_bytes);
        check(&o, &shapes[i], out, false);
        free(out);
        release(&o);
    }
}

/* ---- products of large matrices ---- */

/* clang-format off */
static const struct shape streamed[] = {
    /* name          n_sms rows actual n_out n_in output                norm bias   int8   gather softcap act */
    {"tiny",             8,  1,  1,   5,   24, OUTPUT_F32,            -1, false, false, false, 0, ACTIVATION_SILU},
    {"fewer rows",       8,  8,  7,  43,  264, OUTPUT_BF16,           -1, true,  false, false, 0, ACTIVATION_SILU},
    {"several tiles",    2, 16, 13, 150,  776, OUTPUT_ADD,            -1, true,  false, true,  0, ACTIVATION_SILU},
    {"a whole stage",    3, 16, 15, 301,  768, OUTPUT_F32,            -1, true,  false, true, 30, ACTIVATION_SILU},
    {"a stage and more", 3,  8,  8,  99,  784, OUTPUT_BF16,           -1, false, false, false, 0, ACTIVATION_SILU},
    {"a whole slice",    3,  4,  4, 100, 2304, OUTPUT_F32,            -1, false, false, false, 9, ACTIVATION_SILU},
    {"slices",           4,  9,  9,  33, 3400, OUTPUT_ADD,            -1, true,  false, false, 0, ACTIVATION_SILU},
    {"gated",            3, 11, 10, 156,   96, OUTPUT_ACTIVATE,       -1, true,  false, false, 0, ACTIVATION_GELU_TANH},
    {"gated, slices",    5,  3,  2,  26, 2400, OUTPUT_ACTIVATE,       -1, true,  false, false, 0, ACTIVATION_SILU},
    {"plain",            1,  6,  6,  33,   80, OUTPUT_ACTIVATE_PLAIN, -1, true,  false, false, 0, ACTIVATION_GELU},
    {"int8, tiny",       8,  1,  1,   5,   48, OUTPUT_F32,            -1, false, true,  false, 0, ACTIVATION_SILU},
    {"int8, a stage",    3, 16, 15, 301,  768, OUTPUT_F32,            -1, true,  true,  true, 30, ACTIVATION_SILU},
    {"int8, short",      2,  9,  9,  70, 1024, OUTPUT_ADD,            -1, true,  true,  false, 0, ACTIVATION_SILU},
    {"int8, longer",     3,  8,  8,  99, 1040, OUTPUT_BF16,           -1, false, true,  false, 0, ACTIVATION_SILU},
    {"int8, a slice",    3, 16, 12, 100, 2560, OUTPUT_F32,            -1, false, true,  false, 9, ACTIVATION_SILU},
    {"int8, slices",     4,  5,  5,  33, 3408, OUTPUT_ADD,            -1, true,  true,  false, 0, ACTIVATION_SILU},
    {"int8, gated",      3, 11, 10, 156, 2304, OUTPUT_ACTIVATE,       -1, true,  true,  false, 0, ACTIVATION_GELU_TANH},
    {"int8, gated, two", 5,  3,  2,  26, 2576, OUTPUT_ACTIVATE,       -1, true,  true,  false, 0, ACTIVATION_SILU},
    {"int8, two groups", 3, 17, 17,  99,  800, OUTPUT_BF16,           -1, true,  true,  true,  0, ACTIVATION_SILU},
    {"int8, groups",     2, 64, 51,  70, 1040, OUTPUT_ACTIVATE,       -1, false, true,  false, 0, ACTIVATION_SILU},
    {"int8, and slices", 5, 48, 32,  33, 2576, OUTPUT_ADD,            -1, true,  true,  false, 0, ACTIVATION_SILU},
    {"int8, plain",      1,  6,  6,  33,   80, OUTPUT_ACTIVATE_PLAIN, -1, true,  true,  false, 0, ACTIVATION_GELU},
};
/* clang-format on */

static void test_stream(void **)
{
    need_device();
    for (size_t i = 0; i < COUNT_OF(streamed); i++) {
        struct operands o;
        make(&o, &streamed[i]);
        c.queue.n_sms = streamed[i].n_sms;
        assert_true(stream_product(&c, &o.p));
        void *out = from_device(o.p.out, o.out_bytes);
        check(&o, &streamed[i], out, false);
        free(out);
        release(&o);
    }
}

/* What a norm before it left to the product: each row's factor, from sums of squares in parts; of
 * gathered rows those of the rows they come from. Of results that are right without factors, so
 * what differs is the rounding of a factor, its product and the bias: some 2^-23 each. */
static void test_stream_factors(void **)
{
    static const struct shape shapes[] = {
        {"factors", 3, 16, 15, 301, 768, OUTPUT_F32, -1, true, false, true, 0, ACTIVATION_SILU},
        {"factors, a row", 2, 1, 1, 50, 96, OUTPUT_F32, -1, false, false, false, 0,
         ACTIVATION_SILU},
        {"factors, int8", 3, 9, 9, 83, 768, OUTPUT_F32, -1, true, true, false, 0, ACTIVATION_SILU},
    };
    const int parts[] = {96, 12, 96};
    need_device();
    for (size_t i = 0; i < COUNT_OF(shapes); i++) {
        const struct shape *s = &shapes[i];
        struct operands o;
        make(&o, s);
        c.queue.n_sms = s->n_sms;
        assert_true(stream_product(&c, &o.p));
        float *plain = (float *)from_device(o.p.out, o.out_bytes);
        check(&o, s, plain, false);
        float *squares = random_values((size_t)MAX_ROWS * parts[i], false);
        for (int k = 0; k < MAX_ROWS * parts[i]; k++)
            squares[k] *= squares[k];
        float *device = on_device(squares, (size_t)MAX_ROWS * parts[i]);
        o.p.factors = {device, parts[i], s->n_in, 1e-5f};
        assert_true(stream_product(&c, &o.p));
        float *found = (float *)from_device(o.p.out, o.out_bytes);
        for (int r = 0; r < s->actual; r++) {
            double sum = 0;
            for (int k = 0; k < parts[i]; k++)
                sum += squares[o.in_rows[r] * parts[i] + k];
            const double factor = 1 / sqrt(sum / s->n_in + 1e-5);
            for (int k = 0; k < s->n_out; k++) {
                const double bias = s->bias ? o.bias[k] : 0, y = plain[r * o.p.out_stride + k];
                const double expected = (y - bias) * factor + bias;
                const double x = found[r * o.p.out_stride + k];
                if (!(fabs(x - expected) <= 1e-5 * (1 + fabs(y) * factor)))
                    fail_msg("%s: row %d, column %d: %g, expected %g", s->name, r, k, x, expected);
            }
        }
        OK(cudaFree(device));
        free(squares);
        free(plain);
        free(found);
        release(&o);
    }
}

/* A row alone and in a batch has the same bits. */
static void test_stream_batches(void **)
{
    need_device();
    for (size_t i = 0; i < COUNT_OF(streamed); i++) {
        struct shape s = streamed[i];
        struct operands o;
        void *first = nullptr;
        const size_t n_bytes = width_of(&s) * (is_float(s.output) ? 4 : 2);
        s.gather = false;
        c.queue.n_sms = s.n_sms;
        for (s.rows = 1; s.rows <= (s.int8 ? 52 : STREAM_ROWS); s.rows += s.rows < 16 ? 5 : 18) {
            s.actual = s.rows;
            make(&o, &s);
            assert_true(stream_product(&c, &o.p));
            void *out = from_device(o.p.out, n_bytes);
            if (first && memcmp(first, out, n_bytes))
                fail_msg("%s: row 0 differs in a batch of %d", s.name, s.rows);
            if (first)
                free(out);
            else
                first = out;
            release(&o);
        }
        free(first);
    }
}

/* ---- the end of a sublayer ---- */

static void normed_row(double *y, const double *x, const float *w, int n)
{
    double square = 0;
    for (int i = 0; i < n; i++)
        square += x[i] * x[i] / n;
    for (int i = 0; i < n; i++)
        y[i] = x[i] / sqrt(square + 1e-5) * w[i];
}

/* y: the sum of n_parts. cancels: x is nearly -post(y); bias: of the first norm, all ones. */
static void residual_case(int DIM, int n_parts, bool cancels, bool bias)
{
    enum { ROWS = 3, ACTUAL = 2 };
    const int N = ROWS * DIM;
    float *x = random_values(N, false), *y = random_values(n_parts * N, false);
    float *post = random_values(DIM, false), *next = random_values(DIM, false);
    float *ones = (float *)malloc(DIM * sizeof(*ones));
    double *y_sum = (double *)calloc(N, sizeof(*y_sum));
    double *sum = (double *)malloc(DIM * sizeof(*sum)), *z = (double *)malloc(DIM * sizeof(*z));
    for (int i = 0; i < DIM; i++)
        ones[i] = 1;
    for (int i = 0; i < n_parts * N; i++)
        y_sum[i % N] += y[i];
    for (int row = 0; row < ROWS && cancels; row++) {
        normed_row(z, y_sum + row * DIM, post, DIM);
        for (int i = 0; i < DIM; i++)
            x[row * DIM + i] = (float)(1e-3 * x[row * DIM + i] - z[i]);
    }
    bf16 *none = (bf16 *)calloc(N, sizeof(*none));
    const struct step_sizes actual = {ACTUAL, 0, 0, 0, 0, 0};
    OK(cudaMemcpy(sizes, &actual, sizeof(actual), cudaMemcpyHostToDevice));
    struct residual r = {
        on_device(x, N), on_device(y, n_parts * N), N, n_parts, DIM, {}, {}, on_device(none, N),
        &sizes->n_rows};
    r.post = {on_device(post, DIM), bias ? on_device(ones, DIM) : nullptr, NORM_RMS, 1e-5f};
    r.next = {on_device(next, DIM), nullptr, NORM_RMS, 1e-5f};
    c.step.rows = ROWS;
    residual_norm(&c, &r);
    float *x_after = (float *)from_device(r.x, N * sizeof(*x_after));
    bf16 *h = (bf16 *)from_device(r.h, N * sizeof(*h));
    for (int row = 0; row < ROWS; row++) {
        normed_row(z, y_sum + row * DIM, post, DIM);
        for (int i = 0; i < DIM; i++)
            sum[i] = x[row * DIM + i] + (row < ACTUAL ? z[i] + bias : 0);
        normed_row(z, sum, next, DIM);
        for (int i = 0; i < DIM; i++) {
            const double got = __bfloat162float(h[row * DIM + i]), want = row < ACTUAL ? z[i] : 0;
            if (!(fabs(x_after[row * DIM + i] - sum[i]) <= 1e-5) ||
                !(fabs(got - want) <= 0x1p-8 * fabs(want) + (cancels ? 1e-3 : 1e-5)))
                fail_msg("%d parts of %d: row %d column %d: %g, %g, not %g, %g", n_parts, DIM, row,
                         i, x_after[row * DIM + i], got, sum[i], want);
        }
    }
    const void *device[] = {r.x, r.y, r.post.weight, r.post.bias, r.next.weight, r.h};
    for (size_t i = 0; i < COUNT_OF(device); i++)
        cudaFree((void *)device[i]);
    void *host[] = {x, y, post, next, none, x_after, h, ones, y_sum, sum, z};
    for (size_t i = 0; i < COUNT_OF(host); i++)
        free(host[i]);
}

static void test_residual(void **)
{
    need_device();
    seed = 7;
    residual_case(1188, 3, false, false);
    residual_case(1188, 3, false, true);
    residual_case(1188, 1, true, false);
    residual_case(2304, 4, false, false);
    residual_case(2304, 5, true, false);
    residual_case(20, 8, false, false);
    residual_case(4096, 1, false, false);
    residual_case(4100, 2, false, false);
}

static void library_case(const struct shape *s)
{
    struct operands o;
    bf16 *wide;
    make(&o, s);
    const size_t n_bytes = (size_t)MAX_ROWS * s->n_out * sizeof(bf16);
    OK(cudaMalloc((void **)&wide, n_bytes));
    OK(cudaMemset(wide, 0xff,
                  n_bytes)); /* NaN; initcheck does not see all that the library stores */
    c.queue.n_sms = s->n_sms;
    library_product(&c, &o.p, wide);
    void *out = from_device(o.p.out, o.out_bytes);
    check(&o, s, out, true);
    free(out);
    cudaFree(wide);
    release(&o);
}

static void test_library(void **)
{
    static const struct shape large[] = {
        /* more int8 weights than are turned into bf16 at a time */
        {"int8, blocks", 8, 1, 1, 4128, 4096, OUTPUT_ADD, -1, true, true, false, 0,
         ACTIVATION_SILU},
        /* several blocks of values to a row, of aligned rows and of others */
        {"capped", 8, 3, 2, 8205, 16, OUTPUT_F32, -1, true, false, false, 7, ACTIVATION_SILU},
        {"capped, odd", 8, 2, 2, 8204, 16, OUTPUT_F32, -1, false, false, false, 2, ACTIVATION_SILU},
    };
    need_library();
    for (size_t i = 0; i < COUNT_OF(shapes); i++)
        library_case(&shapes[i]);
    for (size_t i = 0; i < COUNT_OF(large); i++)
        library_case(&large[i]);
}

/* ---- a row's bits do not depend on the batch ---- */

static void test_batches(void **)
{
    static const int batches[] = {3, 8, 9, 17, 40, 70};
    static const struct shape same[] = {
        {"1 tile", 8, 0, 0, 40, 808, OUTPUT_ADD, -1, true, false, false, 0, ACTIVATION_SILU},
        {"2 tiles", 8, 0, 0, 120, 104, OUTPUT_F32, NORM_RMS, false, false, false, 0,
         ACTIVATION_SILU},
        {"gated", 8, 0, 0, 320, 72, OUTPUT_ACTIVATE, NORM_LAYER, false, false, false, 0,
         ACTIVATION_SILU},
        {"head", 1, 0, 0, 200, 264, OUTPUT_F32, NORM_RMS, false, false, false, 0, ACTIVATION_SILU},
        {"int8", 8, 0, 0, 40, 336, OUTPUT_F32, NORM_RMS, false, true, false, 0, ACTIVATION_SILU},
        {"odd", 8, 0, 0, 11, 30, OUTPUT_F32, NORM_RMS, false, false, false, 0, ACTIVATION_SILU},
    };
    need_device();
    for (size_t i = 0; i < COUNT_OF(same); i++) {
        struct shape s = same[i];
        struct operands o;
        s.rows = s.actual = 1;
        c.queue.n_sms = s.n_sms;
        make(&o, &s);
        skinny_product(&c, &o.p);
        const size_t n_bytes = width_of(&s) * (is_float(s.output) ? 4 : 2);
        void *alone = from_device(o.p.out, n_bytes);
        release(&o);
        for (size_t j = 0; j < COUNT_OF(batches); j++) {
            s.rows = s.actual = batches[j];
            make(&o, &s);
            skinny_product(&c, &o.p);
            void *together = from_device(o.p.out, n_bytes);
            if (memcmp(alone, together, n_bytes))
                fail_msg("%s: row 0 differs in a batch of %d", s.name, batches[j]);
            free(together);
            release(&o);
        }
        free(alone);
    }
}

/* The same with less shared memory a block, which makes tiles and groups smaller. */
static void test_small_devices(void **)
{
    static const int capabilities[] = {80, 86};
    static const struct shape same[] = {
        {"deep", 8, 64, 64, 16, 1600, OUTPUT_F32, -1, false, false, false, 0, ACTIVATION_SILU},
        {"tiles", 1, 33, 33, 96, 840, OUTPUT_F32, NORM_RMS, false, false, false, 0,
         ACTIVATION_SILU},
    };
    need_device();
    const int capability = c.queue.capability;
    for (size_t i = 0; i < COUNT_OF(same); i++) {
        struct operands o;
        c.queue.n_sms = same[i].n_sms;
        make(&o, &same[i]);
        skinny_product(&c, &o.p);
        void *large = from_device(o.p.out, o.out_bytes);
        for (size_t j = 0; j < COUNT_OF(capabilities); j++) {
            c.queue.capability = capabilities[j];
            OK(cudaMemset(o.p.out, 0, o.out_bytes));
            OK(cudaMemcpy(o.p.out, o.before, o.out_bytes, cudaMemcpyHostToDevice));
            skinny_product(&c, &o.p);
            c.queue.capability = capability;
            void *small = from_device(o.p.out, o.out_bytes);
            check(&o, &same[i], small, false);
            assert_memory_equal(small, large, o.out_bytes);
            free(small);
        }
        free(large);
        release(&o);
    }
}

/* ---- the op ---- */

static struct buffer buffer_of(void *data, size_t n_bytes)
{
    return {data, n_bytes, false};
}

/* out = in W^T + bias for f32 inputs; bf16 and int8 weights round the inputs to bf16, 2^-8 of
 * each, which adds at most 2^-8 of the sum of |x w|. */
static void linear_case(int rows, int n_out, int n_in, enum dtype dtype, enum row_set set)
{
    const int actual = rows > 1 ? rows - 1 : 1, other = actual + 1;
    float *in = random_values((size_t)rows * n_in, false),
          *w = random_values((size_t)n_out * n_in, true);
    float *bias = random_values(n_out, false), *out = random_values((size_t)rows * n_out, false);
    struct step_sizes n = {actual, 0, 0, other, 0, 0};
    if (set == ROWS_LOGITS)
        n = {other, 0, 0, actual, 0, 0};
    OK(cudaMemcpy(sizes, &n, sizeof(n), cudaMemcpyHostToDevice));
    c.step.rows = set == ROWS_STEP ? rows : 1;
    c.step.logits = set == ROWS_STEP ? 1 : rows;
    for (int i = 0; i < n_in && actual < rows; i++)
        in[(size_t)actual * n_in + i] = NAN;

    const size_t n_weights = (size_t)n_out * n_in;
    void *weight;
    float *scales, *q = (float *)malloc(n_weights * sizeof(*q));
    OK(cudaMalloc(&weight, n_weights * 4));
    OK(cudaMalloc((void **)&scales, n_out * 4));
    struct error err;
    assert_int_equal(linear_upload(&c, weight, scales, dtype, w, DTYPE_F32, n_out, n_in, &err),
                     STATUS_OK);
    memcpy(q, w, n_weights * sizeof(*q)); /* exact as f32 and bf16 */
    if (dtype == DTYPE_I8) {
        int8_t *q8 = (int8_t *)from_device(weight, n_weights);
        float *s8 = (float *)from_device(scales, n_out * 4);
        for (size_t i = 0; i < n_weights; i++)
            q[i] = q8[i] * s8[i / n_in];
        free(q8);
        free(s8);
    }
    struct buffer weight_buffer = buffer_of(weight, n_weights * 4);
    struct buffer scale_buffer = buffer_of(scales, n_out * 4);
    struct buffer bias_buffer = buffer_of(on_device(bias, n_out), n_out * 4);
    struct buffer in_buffer =
        buffer_of(on_device(in, (size_t)rows * n_in), (size_t)rows * n_in * 4);
    struct buffer out_buffer =
        buffer_of(on_device(out, (size_t)rows * n_out), (size_t)rows * n_out * 4);
    const struct linear l = {&weight_buffer, &bias_buffer, n_out, n_in, dtype, &scale_buffer};
    cuda_linear(&c.base, &out_buffer, &in_buffer, &l, set);
    float *y = (float *)from_device(out_buffer.data, out_buffer.n_bytes);
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < n_out; o++) {
            double sum = bias[o], size = fabs(bias[o]);
            for (int i = 0; i < n_in && r < actual; i++) {
                sum += (double)in[(size_t)r * n_in + i] * q[(size_t)o * n_in + i];
                size += fabs((double)in[(size_t)r * n_in + i] * q[(size_t)o * n_in + i]);
            }
            const float got = y[(size_t)r * n_out + o];
            if (r >= actual && got != out[(size_t)r * n_out + o] && !(rows > SKINNY_ROWS))
                fail_msg("%s %dx%d: row %d was written", dtype_name(dtype), n_out, n_in, r);
            if (r < actual && !(fabs(got - sum) <= size * (dtype == DTYPE_F32 ? 4e-7 : 0x1p-8)))
                fail_msg("%s %dx%d: row %d column %d is %.8g, not %.8g", dtype_name(dtype), n_out,
                         n_in, r, o, got, sum);
        }
    free(y);
    cudaFree(weight);
    cudaFree(scales);
    cudaFree(bias_buffer.data);
    cudaFree(in_buffer.data);
    cudaFree(out_buffer.data);
    free(in);
    free(w);
    free(q);
    free(bias);
    free(out);
}

static void test_op(void **)
{
    need_library();
    c.queue.n_sms = 8;
    seed = 99;
    linear_case(1, 7, 20, DTYPE_F32, ROWS_STEP);
    linear_case(5, 70, 33, DTYPE_F32, ROWS_LOGITS);
    linear_case(70, 67, 40, DTYPE_F32, ROWS_STEP);
    linear_case(4, 50, 64, DTYPE_BF16, ROWS_STEP);
    linear_case(3, 50, 30, DTYPE_BF16, ROWS_LOGITS);
    linear_case(70, 24, 48, DTYPE_BF16, ROWS_STEP);
    linear_case(6, 30, 96, DTYPE_I8, ROWS_LOGITS);
    linear_case(3, 30, 20, DTYPE_I8, ROWS_STEP);
    linear_case(66, 24, 64, DTYPE_I8, ROWS_STEP);
}

/* cap tanh(x / cap) to four units in the last place, from tiny values to infinite ones. */
static void test_softcap(void **)
{
    enum { N = 4099 };
    static float x[N];
    need_library();
    for (int i = 0; i < N; i++)
        x[i] = i % 2 ? -ldexpf(1 + (float)(i % 97) / 97, i / 60 - 40) : 0.01f * i;
    x[0] = INFINITY;
    x[1] = -INFINITY;
    const struct step_sizes n = {1, 0, 0, 1, 0, 0};
    OK(cudaMemcpy(sizes, &n, sizeof(n), cudaMemcpyHostToDevice));
    c.step.rows = c.step.logits = 1;
    for (float cap = 1; cap < 100; cap *= 5.5f) {
        struct buffer buffer = buffer_of(on_device(x, N), sizeof(x));
        cuda_softcap(&c.base, &buffer, cap, N);
        float *y = (float *)from_device(buffer.data, sizeof(x));
        for (int i = 0; i < N; i++) {
            const double want = cap * tanh((double)x[i] / cap);
            if (!(fabs(y[i] - want) <= 4 * 0x1p-23 * fabs(want)))
                fail_msg("cap %g: %.9g became %.9g, not %.9g", cap, x[i], y[i], want);
        }
        free(y);
        cudaFree(buffer.data);
    }
}

/* ---- weights on their way ---- */

/* Files hold any bits, at any alignment. Finite values only: what NaN becomes is not defined. */
static void test_upload(void **)
{
    static const enum dtype from[] = {DTYPE_F32, DTYPE_F16, DTYPE_BF16};
    static const enum dtype to[] = {DTYPE_F32, DTYPE_BF16, DTYPE_I8};
    enum { N_OUT = 13, N_IN = 37, N = N_OUT * N_IN };
    static char file[N * 4 + 1];
    static float source[N];
    need_device();
    seed = 5;
    for (size_t i = 0; i < COUNT_OF(from); i++) {
        const size_t size = dtype_bytes(from[i]);
        for (int k = 0; k < N; k++) {
            do {
                const uint32_t bits = k % 3 ? test_random(&seed)
                                            : test_random(&seed) & 0x3fff83ff; /* tiny ones, too */
                memcpy(file + 1 + k * size, &bits, size);
                dtype_to_f32(&source[k], file + 1 + k * size, from[i], 1);
            } while (!isfinite(source[k]) || fabsf(source[k]) > 1e30f);
        }
        memset(file + 1 + 5 * N_IN * size, 0, N_IN * size); /* a row of zeros has no scale */
        memset(source + 5 * N_IN, 0, N_IN * sizeof(*source));
        for (size_t j = 0; j < COUNT_OF(to); j++) {
            void *weight;
            float *scales;
            struct error err;
            OK(cudaMalloc(&weight, N * 4));
            OK(cudaMalloc((void **)&scales, N_OUT * 4));
            OK(cudaMemset(scales, 0, N_OUT * 4)); /* only int8 has any */
            assert_int_equal(
                linear_upload(&c, weight, scales, to[j], file + 1, from[i], N_OUT, N_IN, &err),
                STATUS_OK);
            char *w = (char *)from_device(weight, N * dtype_bytes(to[j]));
            float *s = (float *)from_device(scales, N_OUT * 4);
            for (int k = 0; k < N; k++) {
                float most = 0, expected = source[k], got;
                for (int x = 0; x < N_IN; x++)
                    most = fmaxf(most, fabsf(source[k / N_IN * N_IN + x]));
                if (to[j] == DTYPE_I8) {
                    const float scale = s[k / N_IN], q = ((int8_t *)w)[k];
                    if (fabsf(scale - most / 127) > 1e-6f * scale)
                        fail_msg("scale %g, not %g", scale, most / 127);
                    if (fabs(q * scale - expected) > 0.50001 * scale)
                        fail_msg("%s to I8: %g became %g x %g", dtype_name(from[i]), expected, q,
                                 scale);
                    continue;
                }
                dtype_to_f32(&got, w + k * dtype_bytes(to[j]), to[j], 1);
                if (to[j] == DTYPE_BF16)
                    expected = rounded(expected);
                if (got != expected)
                    fail_msg("%s to %s: %g became %g", dtype_name(from[i]), dtype_name(to[j]),
                             source[k], got);
            }
            free(w);
            free(s);
            cudaFree(weight);
            cudaFree(scales);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_skinny),
        cmocka_unit_test(test_batches),
        cmocka_unit_test(test_small_devices),
        cmocka_unit_test(test_stream),
        cmocka_unit_test(test_stream_factors),
        cmocka_unit_test(test_stream_batches),
        cmocka_unit_test(test_residual),
        cmocka_unit_test(test_library),
        cmocka_unit_test(test_op),
        cmocka_unit_test(test_softcap),
        cmocka_unit_test(test_upload),
    };
    return cmocka_run_group_tests(tests, open_device, close_device);
}
