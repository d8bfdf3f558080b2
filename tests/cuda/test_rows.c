/* test_rows.c - what only the GPU's row kernels do: embeddings kept as int8, and angles of
 * positions that a double does not hold. The other ops of rows.cu are in test_backend.
 */
#include "tests/unit/unit.h"

#include <math.h>
#include <string.h>

#include "engine/backend.h"

enum { ROWS = 8, DIM = 1000, VOCABULARY = 20 };

static struct backend *b;
static float table[VOCABULARY * DIM], out[ROWS * DIM];
static int32_t tokens[ROWS];
static int64_t positions[ROWS];
static const int32_t start[] = {0, 1, 2, 3, 4, 5, 6, 7, 8}, slots[] = {0, 1, 2, 3, 4, 5, 6, 7};

static int open_backend(void **state)
{
    (void)state;
    const struct backend_options options = {.n_threads = 1,
                                            .max_rows = ROWS,
                                            .max_seqs = ROWS,
                                            .max_dim = DIM,
                                            .n_slots = ROWS,
                                            .max_logit_rows = ROWS,
                                            .composed = true};
    struct error err = {0};
    if (backend_cuda_count() > 0 && backend_cuda_open(&b, &options, &err))
        fail_msg("%s", err.text);
    return 0;
}

static int close_backend(void **state)
{
    (void)state;
    if (b)
        b->ops->close(b);
    return 0;
}

/* out = the embeddings of tokens at positions. */
static void embed(enum dtype dtype, int dim, float scale, bool sinusoidal)
{
    struct linear w = {.n_out = VOCABULARY, .n_in = dim, .dtype = dtype};
    const struct step step = {.n_rows = ROWS,
                              .n_seqs = ROWS,
                              .tokens = tokens,
                              .positions = positions,
                              .seq_slot = slots,
                              .seq_start = start};
    struct buffer *x;
    assert_int_equal(b->ops->linear_open(b, &w, table, DTYPE_F32, NULL), STATUS_OK);
    assert_int_equal(b->ops->buffer_open(b, &x, sizeof(out), NULL), STATUS_OK);
    assert_false(b->ops->begin(b, &step));
    b->ops->embed(b, x, &w, scale, sinusoidal, NULL);
    assert_int_equal(b->ops->submit(b, NULL), STATUS_OK);
    assert_int_equal(b->ops->wait(b, NULL, NULL), STATUS_OK);
    assert_int_equal(b->ops->read(b, out, x, 0, sizeof(out), NULL), STATUS_OK);
    b->ops->linear_close(b, &w);
    b->ops->buffer_close(b, x);
}

static void need_device(void)
{
    if (!b) {
        print_message("skipped: no GPU\n");
        skip();
    }
}

/* Multiples of 2^-k whose largest is 127 of them: int8 with a scale per row holds them exactly. */
static void test_int8_table(void **state)
{
    (void)state;
    need_device();
    static const int dims[] = {4, 5, 320, 1000, 999};
    uint32_t seed = 5;
    for (size_t d = 0; d < COUNT_OF(dims); d++) {
        const int dim = dims[d];
        for (int i = 0; i < VOCABULARY * dim; i++) {
            const int k = i % dim == 1 ? -127 : (int)(test_random(&seed) % 255) - 127;
            table[i] = ldexpf((float)k, -(i / dim));
        }
        for (int r = 0; r < ROWS; r++)
            tokens[r] = (int32_t)(test_random(&seed) % VOCABULARY);
        embed(DTYPE_I8, dim, 3, false);
        for (int i = 0; i < ROWS * dim; i++) {
            const float want = 3 * table[tokens[i / dim] * dim + i % dim];
            if (fabsf(out[i] - want) > 1e-6f * fabsf(want))
                fail_msg("%d columns, value %d is %.9g, expected %.9g", dim, i, out[i], want);
        }
    }
}

/* position * frequency modulo 2 pi in 113 bits: 2^62 turns lose 2^-50. */
static double far_angle(int64_t position, double frequency)
{
    const __float128 two_pi = (__float128)0x1.921fb54442d18p+2 + (__float128)0x1.1a62633145c07p-52 -
                              (__float128)0x1.f1976b7ed8fbcp-108;
    const __float128 x = (__float128)position * (__float128)frequency;
    const __float128 turns = (__float128)(__int128)(x / two_pi);
    return (double)(x - turns * two_pi);
}

static void test_far_positions(void **state)
{
    (void)state;
    need_device();
    static const int64_t far[ROWS] = {
        0,
        1,
        (1LL << 40) + 12345,
        (1LL << 53) - 1,
        (1LL << 53) + 1,
        (1LL << 60) + 987654321,
        (1LL << 62) - 1,
        (1LL << 62) - 123456789012345,
    };
    const int dim = 998; /* more than one launch's frequencies, and a row that is not aligned */
    memset(table, 0, sizeof(table));
    memset(tokens, 0, sizeof(tokens));
    memcpy(positions, far, sizeof(positions));
    embed(DTYPE_F32, dim, 1, true);
    for (int i = 0; i < ROWS * dim; i++) {
        const int column = i % dim;
        const double angle = far_angle(far[i / dim], pow(10000.0, -(double)(column / 2 * 2) / dim));
        const double want = column % 2 ? cos(angle) : sin(angle);
        if (!(fabs(out[i] - want) <= 2e-7))
            fail_msg("position %lld, column %d: %.9g, expected %.9g", (long long)far[i / dim],
                     column, out[i], want);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_int8_table),
        cmocka_unit_test(test_far_positions),
    };
    return cmocka_run_group_tests(tests, open_backend, close_backend);
}
