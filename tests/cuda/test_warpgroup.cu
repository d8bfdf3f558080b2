/* test_warpgroup.cu - products by warpgroups (warpgroup.cuh) against loops in double precision:
 * each kind of output, rows that fill tiles and that do not, columns to spare, slices of n_in, two
 * products in one launch. Rows beyond the step's are NaN, and nothing is written there.
 *
 * Tolerances, as test_linear.cu's: products of bf16 factors are exact in f32, so what is left is
 * the rounding of f32 sums, 4e-7 of the sum of |x w|, and of the result: 2^-8 of it in bf16. A
 * row's norm is a factor of f32, good to 1e-6.
 */
#include "engine/kernels/cuda/warpgroup.cuh"
#include "tests/cuda/products.cuh"

enum { DEPTH = WARPGROUP_DEPTH, MLP = 4 * DEPTH, MAX_ROWS = WARPGROUP_ROWS };

static const float EPS = 0.25f; /* beside a mean square of a third: a wrong one shows */
static void need_warpgroups(void)
{
    if (!c.queue.stream || !warpgroups_are_there(&c)) {
        print_message("SKIPPED: no CUDA device of capability 9.0\n");
        skip();
    }
}

template <class T> static void from_device(T *host, const T *p, size_t n)
{
    OK(c.queue.error);
    OK(cudaMemcpyAsync(host, p, n * sizeof(T), cudaMemcpyDeviceToHost, c.queue.stream));
    OK(cudaStreamSynchronize(c.queue.stream));
}

/* ---- packed rows ---- */

static struct packed_rows packed_open(int n, int n_parts)
{
    struct packed_rows p = {NULL, n, NULL, n_parts, EPS};
    const size_t values = (size_t)packed_values(MAX_ROWS, n);
    OK(cudaMalloc((void **)&p.values, values * sizeof(bf16)));
    OK(cudaMemset(p.values, 0xff, values * sizeof(bf16))); /* NaN */
    if (!n_parts)
        return p;
    OK(cudaMalloc((void **)&p.squares, (size_t)MAX_ROWS * n_parts * sizeof(float)));
    OK(cudaMemset(p.squares, 0xff, (size_t)MAX_ROWS * n_parts * sizeof(float)));
    return p;
}

static void packed_close(struct packed_rows *p)
{
    cudaFree(p->values);
    cudaFree(p->squares);
}

/* x [rows, n], already rounded, as packed rows. */
static void packed_put(struct packed_rows *p, const float *x, int rows)
{
    const size_t n = (size_t)packed_values(MAX_ROWS, p->n);
    bf16 *values = (bf16 *)malloc(n * sizeof(*values));
    from_device(values, p->values, n);
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < p->n; i++)
            values[packed_at(r, i, p->n)] = __float2bfloat16_rn(x[(size_t)r * p->n + i]);
    OK(cudaMemcpy(p->values, values, n * sizeof(*values), cudaMemcpyHostToDevice));
    free(values);
}

/* All MAX_ROWS rows. */
static float *packed_get(const struct packed_rows *p)
{
    const size_t n = (size_t)packed_values(MAX_ROWS, p->n);
    bf16 *values = (bf16 *)malloc(n * sizeof(*values));
    float *x = (float *)malloc((size_t)MAX_ROWS * p->n * sizeof(*x));
    from_device(values, p->values, n);
    for (int r = 0; r < MAX_ROWS; r++)
        for (int i = 0; i < p->n; i++)
            x[(size_t)r * p->n + i] = __bfloat162float(values[packed_at(r, i, p->n)]);
    free(values);
    return x;
}

static double row_square(const float *x, int n)
{
    double sum = 0;
    for (int i = 0; i < n; i++)
        sum += (double)x[i] * x[i];
    return sum;
}

/* Packed rows of x times weight, with squares of x; `actual` of them. */
static void check_packed(const struct packed_rows *p, const float *x, const float *weight,
                         int actual)
{
    float *found = packed_get(p);
    float *parts = (float *)malloc((size_t)MAX_ROWS * p->n_parts * sizeof(*parts));
    from_device(parts, p->squares, (size_t)MAX_ROWS * p->n_parts);
    for (int r = 0; r < MAX_ROWS; r++) {
        double square = 0;
        for (int i = 0; i < p->n; i++) {
            const float y = found[(size_t)r * p->n + i];
            if (r >= actual ? !isnan(y) : y != rounded(x[(size_t)r * p->n + i] * weight[i]))
                fail_msg("row %d of %d, column %d: %g", r, actual, i, y);
        }
        for (int i = 0; i < p->n_parts; i++)
            square += parts[(size_t)r * p->n_parts + i];
        const double expected = r < actual ? row_square(x + (size_t)r * p->n, p->n) : 0;
        if (r >= actual ? !isnan(square) : !(fabs(square - expected) <= 1e-6 * expected))
            fail_msg("row %d of %d: squares %g, expected %g", r, actual, square, expected);
    }
    free(found);
    free(parts);
}

/* ---- products ---- */

struct rows_case {
    int rows, actual;
};
static const struct rows_case all_rows[] = {{17, 1},    {17, 17},   {64, 50},   {70, 65},
                                            {128, 128}, {136, 130}, {256, 256}, {200, 60}};

/* On an emulated device some. */
static bool is_tested(const struct rows_case *r)
{
    return !emulated || r->actual == 1 || r->rows == 64 || r->rows == 136 || r->rows == 200;
}

static void put_n_rows(int n)
{
    OK(cudaMemcpy(n_rows, &n, sizeof(n), cudaMemcpyHostToDevice));
}

/* What rows of x [.., DEPTH] times weight are multiplied as, and what norms them. */
static void put_normed(struct packed_rows *in, const float *x, const float *weight, float *values,
                       double *scales, int rows, int actual)
{
    float *const device_x = on_device(x, (size_t)MAX_ROWS * DEPTH);
    float *const device_weight = on_device(weight, DEPTH);
    pack_rows(&c, in, device_x, device_weight, rows, n_rows);
    check_packed(in, x, weight, actual);
    for (int r = 0; r < actual; r++) {
        scales[r] = 1 / sqrt(row_square(x + (size_t)r * DEPTH, DEPTH) / DEPTH + in->eps);
        for (int i = 0; i < DEPTH; i++)
            values[(size_t)r * DEPTH + i] = rounded(x[(size_t)r * DEPTH + i] * weight[i]);
    }
    cudaFree(device_x);
    cudaFree(device_weight);
}

static struct warpgroup_product product_of(const struct packed_rows *in, const bf16 *weights,
                                           int n_out, enum product_output output, int rows)
{
    struct warpgroup_product p = {};
    p.in = *in;
    p.weights = weights;
    p.n_out = n_out;
    p.output = output;
    p.rows = rows;
    p.n_rows = n_rows;
    return p;
}

/* bf16 results of normed rows and f32 ones of others, in one launch. */
static void test_two_products(void **)
{
    enum { N_BF16 = 104, N_F32 = 56, STRIDE = 112 };
    need_warpgroups();
    for (const struct rows_case &k : all_rows) {
        if (!is_tested(&k))
            continue;
        seed = 7;
        put_n_rows(k.actual);
        struct packed_rows in[2];
        float *norm = random_values(DEPTH, false), *w = random_values(160 * DEPTH, true);
        static float values[2][MAX_ROWS * DEPTH], found32[MAX_ROWS * N_F32];
        static double scales[2][MAX_ROWS];
        static bf16 found16[MAX_ROWS * STRIDE];
        for (int i = 0; i < 2; i++) {
            float *x = random_values((size_t)MAX_ROWS * DEPTH, false);
            in[i] = packed_open(DEPTH, WARPGROUP_PARTS);
            in[i].eps = EPS * (1 + i);
            put_normed(&in[i], x, norm, values[i], scales[i], k.rows, k.actual);
            free(x);
        }
        bf16 *const weights = device_bf16(w, 160 * DEPTH);
        struct warpgroup_product p[] = {
            product_of(&in[0], weights, N_BF16, OUTPUT_BF16, k.rows),
            product_of(&in[1], weights + N_BF16 * DEPTH, N_F32, OUTPUT_F32, k.rows)};
        memset((void *)found16, 0xff, sizeof(found16));
        memset(found32, 0xff, sizeof(found32));
        p[0].out = on_device(found16, MAX_ROWS * STRIDE);
        p[0].out_stride = STRIDE;
        p[1].out = on_device(found32, MAX_ROWS * N_F32);
        p[1].out_stride = N_F32;
        warpgroup_products(&c, p, 2);
        from_device(found16, (bf16 *)p[0].out, MAX_ROWS * STRIDE);
        from_device(found32, (float *)p[1].out, MAX_ROWS * N_F32);
        for (int r = 0; r < MAX_ROWS; r++) {
            for (int i = 0; i < STRIDE + N_F32; i++) {
                const bool first = i < STRIDE, there = r < k.actual && (!first || i < N_BF16);
                const float y = first ? __bfloat162float(found16[r * STRIDE + i])
                                      : found32[r * N_F32 + i - STRIDE];
                const int row = first ? i : i - STRIDE + N_BF16;
                double slack;
                if (!there && isnan(y))
                    continue;
                if (!there)
                    fail_msg("row %d of %d, column %d: %g was written", r, k.actual, i, y);
                const double scale = scales[!first][r];
                const double sum =
                    scale * dot(values[!first] + r * DEPTH, w + row * DEPTH, DEPTH, &slack);
                check_value(y, sum, slack * scale + (first ? 0x1p-8 * fabs(sum) : 0),
                            first ? "bf16" : "f32", r, i);
            }
        }
        cudaFree(weights);
        cudaFree(p[0].out);
        cudaFree(p[1].out);
        packed_close(&in[0]);
        packed_close(&in[1]);
        free(norm);
        free(w);
    }
}

static void test_activated(void **)
{
    enum { FEATURES = 64 * 3, F0 = 48 }; /* the results' columns; those that are computed */
    need_warpgroups();
    const enum activation acts[] = {ACTIVATION_SILU, ACTIVATION_GELU, ACTIVATION_GELU_TANH};
    for (size_t j = 0; j < COUNT_OF(all_rows) + 2; j++) {
        const struct rows_case k = all_rows[j < COUNT_OF(all_rows) ? j : 2];
        const enum activation act = acts[j < COUNT_OF(all_rows) ? 0 : j - COUNT_OF(all_rows) + 1];
        if (!is_tested(&k))
            continue;
        seed = 11;
        put_n_rows(k.actual);
        struct packed_rows in = packed_open(DEPTH, WARPGROUP_PARTS);
        struct packed_rows out = packed_open(FEATURES, 0);
        float *x = random_values((size_t)MAX_ROWS * DEPTH, false);
        float *norm = random_values(DEPTH, false), *w = random_values(2 * F0 * DEPTH, true);
        static float values[MAX_ROWS * DEPTH];
        static double scales[MAX_ROWS];
        put_normed(&in, x, norm, values, scales, k.rows, k.actual);
        bf16 *const weights = device_bf16(w, 2 * F0 * DEPTH);
        struct warpgroup_product p = product_of(&in, weights, 2 * F0, OUTPUT_ACTIVATE, k.rows);
        p.act = act;
        p.next = out;
        warpgroup_products(&c, &p, 1);
        float *found = packed_get(&out);
        for (int r = 0; r < MAX_ROWS; r++) {
            for (int i = 0; i < FEATURES; i++) {
                const float y = found[(size_t)r * FEATURES + i];
                if (r >= k.actual || i >= F0) {
                    if (!isnan(y))
                        fail_msg("row %d of %d, feature %d: %g was written", r, k.actual, i, y);
                    continue;
                }
                double slack[2];
                const float *const row = values + r * DEPTH;
                const double gate = scales[r] * dot(row, w + i * DEPTH, DEPTH, &slack[0]);
                const double up = scales[r] * dot(row, w + (F0 + i) * DEPTH, DEPTH, &slack[1]);
                const double expected = activation(gate, act) * up;
                /* the activations' slopes are below 1.2 */
                const double error =
                    scales[r] * (1.2 * slack[0] * fabs(up) + slack[1] * fabs(gate));
                check_value(y, expected, error + 0x1p-8 * fabs(expected) + 1e-6, "activated", r, i);
            }
        }
        cudaFree(weights);
        packed_close(&in);
        packed_close(&out);
        free(x);
        free(norm);
        free(w);
        free(found);
    }
}

/* x += W in; then x times the next norm's weight and its squares, or nothing. */
static void check_added(const struct rows_case *k, int n_in, bool has_next)
{
    seed = 13;
    put_n_rows(k->actual);
    struct packed_rows in = packed_open(n_in, 0), next = packed_open(DEPTH, WARPGROUP_PARTS);
    float *values = random_values((size_t)MAX_ROWS * n_in, true);
    float *w = random_values((size_t)DEPTH * n_in, true), *norm = random_values(DEPTH, false);
    float *x = random_values((size_t)MAX_ROWS * DEPTH, false);
    float *found = (float *)malloc((size_t)MAX_ROWS * DEPTH * sizeof(*found));
    packed_put(&in, values, k->actual);
    bf16 *const weights = device_bf16(w, (size_t)DEPTH * n_in);
    float *const device_norm = on_device(norm, DEPTH);
    struct warpgroup_product p = product_of(&in, weights, DEPTH, OUTPUT_ADD, k->rows);
    p.out = on_device(x, (size_t)MAX_ROWS * DEPTH);
    p.out_stride = DEPTH;
    if (has_next) {
        p.next = next;
        p.next_weight = device_norm;
    }
    warpgroup_products(&c, &p, 1);
    from_device(found, (float *)p.out, (size_t)MAX_ROWS * DEPTH);
    for (int r = 0; r < MAX_ROWS; r++) {
        for (int i = 0; i < DEPTH; i++) {
            const size_t at = (size_t)r * DEPTH + i;
            double slack = 0, y = x[at];
            if (r < k->actual)
                y += dot(values + (size_t)r * n_in, w + (size_t)i * n_in, n_in, &slack);
            else if (found[at] != x[at])
                fail_msg("row %d of %d was written", r, k->actual);
            check_value(found[at], y, slack, "added", r, i);
        }
    }
    check_packed(&next, found, norm, has_next ? k->actual : 0);
    cudaFree(weights);
    cudaFree(device_norm);
    cudaFree(p.out);
    packed_close(&in);
    packed_close(&next);
    free(values);
    free(w);
    free(norm);
    free(x);
    free(found);
}

static void test_added(void **)
{
    need_warpgroups();
    for (const struct rows_case &k : all_rows) {
        if (is_tested(&k))
            check_added(&k, DEPTH, k.rows != 64);
    }
}

static void test_added_slices(void **)
{
    need_warpgroups();
    for (const struct rows_case &k : all_rows) {
        if (emulated ? k.rows == 17 && k.actual == 17 : is_tested(&k))
            check_added(&k, MLP, k.rows != 64);
    }
}

static void test_shapes(void **)
{
    assert_true(warpgroup_has(OUTPUT_BF16, 2304, DEPTH));
    assert_true(warpgroup_has(OUTPUT_F32, 264, DEPTH));
    assert_true(warpgroup_has(OUTPUT_ACTIVATE, 2 * MLP, DEPTH));
    assert_true(warpgroup_has(OUTPUT_ADD, DEPTH, MLP));
    assert_false(warpgroup_has(OUTPUT_BF16, 2304, 512));
    assert_false(warpgroup_has(OUTPUT_F32, 263, DEPTH));
    assert_false(warpgroup_has(OUTPUT_ACTIVATE, 100, DEPTH));
    assert_false(warpgroup_has(OUTPUT_ADD, DEPTH, 2 * DEPTH));
    assert_false(warpgroup_has(OUTPUT_ACTIVATE_PLAIN, 96, DEPTH));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_shapes),       cmocka_unit_test(test_two_products),
        cmocka_unit_test(test_activated),    cmocka_unit_test(test_added),
        cmocka_unit_test(test_added_slices),
    };
    return cmocka_run_group_tests(tests, open_device, close_device);
}
