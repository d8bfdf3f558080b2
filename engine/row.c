/* row.c - see row.h
 *
 * Each pass is written once as an inline body over whole blocks and compiled twice, for the
 * baseline instruction set and for AVX2. Both do the same operations, so they agree bit for
 * bit; neither has fused multiply-add.
 */
#include "engine/row.h"

#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <string.h>

#define BODY static inline __attribute__((always_inline))

#if defined(__x86_64__)
#define HAVE_AVX2 __builtin_cpu_supports("avx2")
#define AVX2 __attribute__((target("avx2")))
#else
#define HAVE_AVX2 false
#define AVX2
#endif

/* Define `name` as its body, with the widest instructions this processor has. */
#define DISPATCH(type, name, params, args)                                                         \
    AVX2 static type name##_avx2 params                                                            \
    {                                                                                              \
        return name##_body args;                                                                   \
    }                                                                                              \
    type name params                                                                               \
    {                                                                                              \
        return HAVE_AVX2 ? name##_avx2 args : name##_body args;                                    \
    }

/* Choices are made on the bits, as integers: compilers vectorize those, but not float
 * comparisons, which could raise exceptions. */
union word {
    float f;
    int32_t i;
    uint32_t u;
};

enum { BITS_INF = 0x7f800000, BITS_MAX = 0x7f7fffff, BITS_2_44 = (127 - 44) << 23 };
#define BITS_MINUS_40 0xc2200000u
#define BITS_MINUS_INF 0xff800000u

/* 2^n * exp(r) with n = round(y / ln 2), ln 2 in two parts so that r is exact; Taylor to the
 * seventh power is below half a unit of f32 for |r| <= ln(2)/2. */
BODY float exp_body(float y)
{
    union word w = {.f = y};
    w.u = w.u < BITS_MINUS_40 ? w.u : BITS_MINUS_40; /* y = max(y, -40) */
    const float to_integer = 0x1.8p23f;
    float n = (w.f * 0x1.715476p+0f + to_integer) - to_integer;
    float r = (w.f - n * 0x1.62ep-1f) - n * 0x1.0bfbe8p-15f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    union word power = {.i = ((int32_t)n + 127) * (1 << 23)};
    union word e = {.f = p * power.f};
    e.i = e.i >= BITS_2_44 ? e.i : 0;
    return e.f;
}

float row_exp(float y)
{
    return exp_body(y);
}

BODY float tidy(float x)
{
    union word w = {.f = x};
    uint32_t magnitude = w.u & 0x7fffffff;
    w.u = magnitude ? w.u : 0;
    w.u = w.u == BITS_INF ? BITS_MAX : w.u; /* +inf */
    w.u = magnitude > BITS_INF ? BITS_MINUS_INF : w.u;
    return w.f;
}

float row_tidy(float x)
{
    return tidy(x);
}

BODY void row_load_body(float *x, const float *logits, int n)
{
    for (int i = 0; i < n; i++)
        x[i] = tidy(logits[i]);
    for (int i = n; i < row_n_blocks(n) * ROW_BLOCK; i++)
        x[i] = -INFINITY;
}
DISPATCH(void, row_load, (float *x, const float *logits, int n), (x, logits, n))

BODY void row_block_best_body(int32_t *best, const float *x, int n_blocks)
{
    for (int b = 0; b < n_blocks; b++) {
        int32_t most = INT32_MIN;
        for (int i = 0; i < ROW_BLOCK; i++) {
            int32_t order = row_order(x[b * ROW_BLOCK + i]);
            most = order > most ? order : most;
        }
        best[b] = most;
    }
}
DISPATCH(void, row_block_best, (int32_t * best, const float *x, int n_blocks), (best, x, n_blocks))

int row_argmax(const float *x, const int32_t *best, int n_blocks)
{
    int block = 0;
    for (int b = 1; b < n_blocks; b++)
        if (best[b] > best[block])
            block = b;
    int i = block * ROW_BLOCK;
    while (row_order(x[i]) != best[block])
        i++;
    return i;
}

BODY void row_exponentials_body(float *e, const float *x, int n_blocks, float top, float scale)
{
    for (int i = 0; i < n_blocks * ROW_BLOCK; i++)
        e[i] = exp_body((x[i] - top) * scale);
}
DISPATCH(void, row_exponentials, (float *e, const float *x, int n_blocks, float top, float scale),
         (e, x, n_blocks, top, scale))

/* A weight is split in two halves of 22 bits, so that a block adds up in 32-bit lanes. */
BODY uint64_t block_sum(const float *e)
{
    int32_t high = 0, low = 0;
    for (int i = 0; i < ROW_BLOCK; i++) {
        float scaled = e[i] * 0x1p22f;
        int32_t h = (int32_t)scaled;
        high += h;
        low += (int32_t)((scaled - (float)h) * 0x1p22f);
    }
    return ((uint64_t)high << 22) + (uint64_t)low;
}

BODY uint64_t row_block_sums_body(uint64_t *sums, const float *e, int n_blocks)
{
    uint64_t total = 0;
    for (int b = 0; b < n_blocks; b++)
        total += sums[b] = block_sum(e + b * ROW_BLOCK);
    return total;
}
DISPATCH(uint64_t, row_block_sums, (uint64_t * sums, const float *e, int n_blocks),
         (sums, e, n_blocks))

BODY void row_drop_below_body(float *e, int n_blocks, float least)
{
    for (int i = 0; i < n_blocks * ROW_BLOCK; i++)
        e[i] = e[i] >= least ? e[i] : 0.0f;
}
DISPATCH(void, row_drop_below, (float *e, int n_blocks, float least), (e, n_blocks, least))

BODY void row_rank_value_body(uint32_t *rank, const float *x, int n)
{
    for (int i = 0; i < n; i++)
        rank[i] = 0x7fffffffu - (uint32_t)row_order(x[i]);
}
DISPATCH(void, row_rank_value, (uint32_t * rank, const float *x, int n), (rank, x, n))

BODY void row_rank_distance_body(uint32_t *rank, const float *x, int n, float top, float scale,
                                 float centre)
{
    for (int i = 0; i < n; i++) {
        union word distance = {.f = fabsf((x[i] - top) * scale - centre)};
        rank[i] = distance.u;
    }
}
DISPATCH(void, row_rank_distance,
         (uint32_t * rank, const float *x, int n, float top, float scale, float centre),
         (rank, x, n, top, scale, centre))

struct row_cut row_find_cut(const uint32_t *rank, const float *e, int n, uint64_t target,
                            uint64_t *bins)
{
    static const struct {
        int shift, bits;
    } digits[] = {{21, 11}, {10, 11}, {0, 10}};
    uint64_t prefix = 0;
    for (int d = 0; d < 3; d++) {
        int shift = digits[d].shift, bits = digits[d].bits;
        memset(bins, 0, ROW_BINS * sizeof(*bins));
        for (int i = 0; i < n; i++)
            if ((uint64_t)rank[i] >> (shift + bits) == prefix)
                bins[rank[i] >> shift & ((1u << bits) - 1)] += e ? row_weight(e[i]) : 1;
        uint64_t bin = 0;
        while (bins[bin] < target)
            target -= bins[bin++];
        prefix = prefix << bits | bin;
    }
    return (struct row_cut){.rank = (uint32_t)prefix, .mass = target};
}
