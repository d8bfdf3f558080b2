/* test_glu.cu - the mlp's first product of many rows (glu.cuh) against loops in double precision:
 * rows that fill tiles and that do not, depths of one chunk to many, more tiles than there are
 * blocks. Rows beyond the step's are NaN, and nothing is written there.
 *
 * Tolerances, as test_warpgroup.cu's: products of bf16 factors are exact in f32, so what is left is
 * the rounding of f32 sums, 4e-7 of the sum of |x w|, and of the result: 2^-8 of it.
 */
#include "engine/kernels/cuda/glu.cuh"
#include "tests/cuda/products.cuh"

struct glu_case {
    int rows, actual, n_in, n_features;
    enum activation act;
};

/* Without addresses. */
static struct product product_of(const struct glu_case *k)
{
    struct product p = {};
    p.w.dtype = DTYPE_BF16;
    p.w.n_out = 2 * k->n_features;
    p.w.n_in = k->n_in;
    p.in_stride = k->n_in + 8;
    p.out_stride = k->n_features + 16;
    p.output = OUTPUT_ACTIVATE;
    p.act = k->act;
    p.rows = k->rows;
    p.n_rows = n_rows;
    return p;
}

static void need_glu(void)
{
    const struct glu_case some = {1024, 1024, 768, 3072, ACTIVATION_SILU};
    const struct product p = product_of(&some);
    if (!c.queue.stream || !glu_possible(&c, &p)) {
        print_message("SKIPPED: no CUDA device of capability 9.0\n");
        skip();
    }
}

static void check_row(const struct glu_case *k, const float *x, const float *w, const bf16 *found,
                      int row)
{
    const int F = k->n_features;
    for (int i = 0; i < F; i++) {
        double slack[2];
        const double gate = dot(x, w + (size_t)i * k->n_in, k->n_in, &slack[0]);
        const double up = dot(x, w + (size_t)(F + i) * k->n_in, k->n_in, &slack[1]);
        const double expected = activation(gate, k->act) * up;
        /* the activations' slopes are below 1.2 */
        const double error = 1.2 * slack[0] * fabs(up) + slack[1] * fabs(gate);
        check_value(__bfloat162float(found[i]), expected, error + 0x1p-8 * fabs(expected) + 1e-6,
                    "activated", row, i);
    }
}

/* All rows are written or not, as they should be; every `every`th is compared, and the last. */
static void check_case(const struct glu_case *k, int every)
{
    struct product p = product_of(k);
    const size_t n_in = (size_t)k->rows * p.in_stride, n_out = (size_t)k->rows * p.out_stride;
    const size_t n_weights = (size_t)p.w.n_out * p.w.n_in;
    seed = 17;
    assert_true(glu_possible(&c, &p));
    OK(cudaMemcpy(n_rows, &k->actual, sizeof(k->actual), cudaMemcpyHostToDevice));
    float *x = random_values(n_in, true), *w = random_values(n_weights, true);
    for (size_t i = (size_t)k->actual * p.in_stride; i < n_in; i++)
        x[i] = NAN;
    bf16 *found = (bf16 *)malloc(n_out * sizeof(*found));
    memset((void *)found, 0xff, n_out * sizeof(*found)); /* NaN */
    bf16 *const in = device_bf16(x, n_in), *const weights = device_bf16(w, n_weights);
    p.in = in;
    p.w.data = weights;
    p.out = on_device(found, n_out);
    assert_true(glu_product(&c, &p));
    OK(c.queue.error);
    OK(cudaStreamSynchronize(c.queue.stream));
    OK(cudaMemcpy(found, p.out, n_out * sizeof(*found), cudaMemcpyDeviceToHost));
    for (int r = 0; r < k->rows; r++) {
        const bf16 *const row = found + (size_t)r * p.out_stride;
        for (int i = r < k->actual ? k->n_features : 0; i < p.out_stride; i++)
            if (!isnan(__bfloat162float(row[i])))
                fail_msg("row %d of %d, feature %d was written", r, k->actual, i);
        if (r < k->actual && (r % every == 0 || r + 1 == k->actual))
            check_row(k, x + (size_t)r * p.in_stride, w, row, r);
    }
    cudaFree(in);
    cudaFree(weights);
    cudaFree(p.out);
    free(found);
    free(x);
    free(w);
}

static void test_rows(void **)
{
    need_glu();
    static const int rows[][2] = {{257, 257}, {512, 1}, {512, 300}, {520, 520}, {1024, 640}};
    for (size_t i = 0; i < COUNT_OF(rows); i++) {
        const struct glu_case k = {rows[i][0], rows[i][1], 128, 128, ACTIVATION_SILU};
        check_case(&k, 1);
    }
}

static void test_depths(void **)
{
    need_glu();
    static const int depths[] = {64, 192, 256, 320, 768, 2304};
    for (size_t i = 0; i < (emulated ? 4 : COUNT_OF(depths)); i++) {
        const struct glu_case k = {272, 272, depths[i], 256, ACTIVATION_GELU_TANH};
        check_case(&k, 3);
    }
}

static void test_many_tiles(void **)
{
    need_glu();
    const struct glu_case all = {8192, 8000, 768, 3072, ACTIVATION_SILU};
    const struct glu_case some = {520, 513, 64, 640, ACTIVATION_SILU};
    check_case(emulated ? &some : &all, 37);
}

static void test_shapes(void **)
{
    need_glu();
    const struct glu_case k = {1024, 1024, 768, 3072, ACTIVATION_SILU};
    struct product p = product_of(&k);
    assert_true(glu_possible(&c, &p));
    p.w.n_out = 2 * 3072 + 128;
    assert_false(glu_possible(&c, &p));
    p = product_of(&k);
    p.w.n_in = 96;
    assert_false(glu_possible(&c, &p));
    p = product_of(&k);
    p.output = OUTPUT_ACTIVATE_PLAIN;
    assert_false(glu_possible(&c, &p));
    p = product_of(&k);
    p.act = ACTIVATION_GELU;
    assert_false(glu_possible(&c, &p));
    p = product_of(&k);
    p.w.dtype = DTYPE_I8;
    assert_false(glu_possible(&c, &p));
    p = product_of(&k);
    char *const values = on_device("", 1);
    p.in = values + 8;
    p.w.data = values;
    assert_false(glu_product(&c, &p));
    cudaFree(values);
}

/* On an H100: 48 tiles for 66 pairs of SMs, 24, 72, and 768. */
static void test_sizes(void **)
{
    static const struct {
        int rows;
        bool pays;
    } sizes[] = {{512, true}, {256, false}, {768, false}, {8192, true}};
    struct cuda device = {};
    device.queue.n_sms = 132;
    for (size_t i = 0; i < COUNT_OF(sizes); i++) {
        const struct glu_case k = {sizes[i].rows, sizes[i].rows, 768, 3072, ACTIVATION_SILU};
        const struct product p = product_of(&k);
        assert_int_equal(glu_pays(&device, &p), sizes[i].pays);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rows),       cmocka_unit_test(test_depths),
        cmocka_unit_test(test_many_tiles), cmocka_unit_test(test_shapes),
        cmocka_unit_test(test_sizes),
    };
    return cmocka_run_group_tests(tests, open_device, close_device);
}
