/* row.h - the passes over a row of logits that sampling is made of.
 *
 * Values are finite floats or -inf. A weight is 2^44 times exp(scale * (x - top)), cut to an
 * integer, so sums of weights are exact and do not depend on the order of adding: a parallel
 * reduction anywhere gives the same sums, cuts and draws. A token whose weight is 0 (30.5 nats
 * below the top) is out. exp is row_exp, plain f32 operations without fused multiply-add.
 *
 * Rows are stored in whole blocks of ROW_BLOCK values, padded with -inf.
 *
 * Threads: no shared state. Memory: the caller's; nothing allocates. Errors: none.
 */
#ifndef LATTE_ENGINE_ROW_H
#define LATTE_ENGINE_ROW_H

#include <stdint.h>

enum { ROW_BLOCK = 64, ROW_BINS = 2048, ROW_WEIGHT_BITS = 44 };

static inline int row_n_blocks(int n)
{
    return (n + ROW_BLOCK - 1) / ROW_BLOCK;
}

/* An integer in the order of the floats, larger for larger; x is no NaN and no -0. */
static inline int32_t row_order(float x)
{
    union {
        float f;
        int32_t i;
    } u = {.f = x};
    return u.i ^ ((u.i >> 31) & 0x7fffffff);
}

/* The integer weight that e = row_exp(...) in 0..1 stands for. */
static inline uint64_t row_weight(float e)
{
    return (uint64_t)(int64_t)(e * 0x1p44f);
}

/* exp(y) for y <= 0; 0 below 2^-44. Relative error under 3e-7, exactly 1 at 0. */
float row_exp(float y);

/* NaN becomes -inf, +inf FLT_MAX, -0 becomes 0. */
float row_tidy(float x);

/* x[padded n] = row_tidy(logits[n]) */
void row_load(float *x, const float *logits, int n);

/* best[n_blocks] = row_order of the largest value of each block. */
void row_block_best(int32_t *best, const float *x, int n_blocks);

/* The index of the largest value, the lowest one of equals. best as from row_block_best. */
int row_argmax(const float *x, const int32_t *best, int n_blocks);

/* e = row_exp((x - top) * scale) for n_blocks whole blocks. */
void row_exponentials(float *e, const float *x, int n_blocks, float top, float scale);

/* sums[n_blocks] = the blocks' sums of weights; returns their sum. */
uint64_t row_block_sums(uint64_t *sums, const float *e, int n_blocks);

/* e = 0 where e < least. */
void row_drop_below(float *e, int n_blocks, float least);

/* rank[n]: 0 is best; row_rank_value orders by descending x, row_rank_distance by ascending
 * |(x - top) * scale - centre|. */
void row_rank_value(uint32_t *rank, const float *x, int n);
void row_rank_distance(uint32_t *rank, const float *x, int n, float top, float scale, float centre);

/* The end of a ranking: ranks below `rank` are in, those above are out, and those equal to it
 * are in, in index order, until they have brought `mass`. */
struct row_cut {
    uint32_t rank;
    uint64_t mass;
};

/* Where the best ranks' mass reaches target (1..total). The mass of i is the weight of e[i], or
 * 1 when e is NULL. Radix selection in three passes, O(n) always. bins [ROW_BINS] is scratch. */
struct row_cut row_find_cut(const uint32_t *rank, const float *e, int n, uint64_t target,
                            uint64_t *bins);

#endif
