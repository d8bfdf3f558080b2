/* kernels.h - the inner loops of the CPU backend, one table per instruction set.
 *
 * Every table computes the same thing from the same source (template.h) over vectors of
 * another width; kernels_pick chooses by what the processor can do. Nothing here knows of
 * threads, slots or steps.
 *
 * Sums run in an order that depends on the length of the sum alone. So a value is bit-equal
 * however many rows, columns or keys are computed together with it.
 *
 * Threads: no state; any number.
 * Memory:  the caller's. Pointers need the alignment of their type only, and nothing is read
 *          or written past the stated ranges.
 * Errors:  none.
 */
#ifndef LATTE_KERNELS_KERNELS_H
#define LATTE_KERNELS_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "weights/checkpoint.h"

/* A packed matrix [n_out, n_in]: panels of 32 outputs, each [n_in] groups of 32 values; the
 * last panel is filled up with zeros. f32: 32 floats in order. bf16: 16 words, of which word j
 * holds output j below and output 16 + j above, so that a shift or a mask widens them. */
enum { PANEL = 32, PANEL_WORDS = 16 };

/* Rows times panels: out[r, 32 p + c] = sum_k x[k, r] * panel p [k, c]. */
struct gemm {
    float *out; /* [n_rows, out_stride], whole panels are written */
    size_t out_stride;
    const float *x;      /* [n_in, n_rows], the tile's rows interleaved by pack_rows */
    int n_rows;          /* 1..tile_rows */
    const void *panels;  /* [n_panels] */
    size_t panel_stride; /* 32-bit words from one panel to the next */
    int n_panels;
    int n_in;
};

/* One head of one sequence through the recurrence P(eq 19). */
struct latent_run {
    float *out;                 /* [n_rows, d] */
    float *p0;                  /* [n_rows]; NULL without window */
    const float *theta, *g, *v; /* [n_rows, M], [n_rows, M (+ 1)], [n_rows, d] */
    size_t out_stride, p0_stride, theta_stride, g_stride, v_stride;
    float *m, *alpha, *s; /* [M], [M], [M, d] */
    float *scratch;       /* [3 * M + 1] */
    int n_rows, n_latents, head_dim;
    bool fresh; /* the state before any token, whatever m, alpha, s hold */
};

/* A few columns of one sequence through the RG-LRU. */
struct rglru_run {
    float *out, *z;                       /* [n_rows, n], [n] */
    const float *in, *recurrence, *input; /* [n_rows, n] */
    const float *lambda;                  /* [n] */
    size_t stride;                        /* of out, in, recurrence, input */
    int n_rows, n;
    bool fresh; /* the first row has position 0 */
};

/* A few columns of one sequence through the convolution. */
struct conv_run {
    float *out;
    const float *in;            /* [n_rows, n] */
    const float *state;         /* [K - 1, n] the rows before, oldest first */
    const float *weight, *bias; /* [n, K], [n] or NULL */
    size_t stride;              /* of out, in and state */
    int64_t position;           /* of the first row; rows before position 0 are zero */
    int n_rows, n, n_taps;
};

/* Scores of keys in blocks: an attention row meets this many at a time. */
enum { KEY_BLOCK = 64 };

struct kernels {
    const char *name;
    int tile_rows; /* most rows of a gemm tile */

    /* out [k, n_rows] = in [n_rows, k] turned over, k floats of each row. */
    void (*pack_rows)(float *out, const float *in, size_t stride, int n_rows, int k);
    void (*gemm_f32)(const struct gemm *g);
    void (*gemm_bf16)(const struct gemm *g);
    /* One bf16 panel [n_in] as an f32 panel. */
    void (*widen)(float *out, const uint32_t *panel, int n_in);
    /* out[i, j] = a_i . b_j over k values (+ bias[j] unless NULL). */
    void (*dots)(float *out, size_t out_stride, const float *a, size_t a_stride, int n_a,
                 const float *b, size_t b_stride, int n_b, const float *bias, int k);

    /* out may be in. */
    void (*norm)(float *out, const float *in, const float *weight, const float *bias,
                 enum norm_type type, float eps, int n);
    void (*add)(float *x, const float *y, size_t n);
    void (*add_bias)(float *x, size_t stride, const float *bias, int n_rows, int n);
    void (*activate)(float *out, const float *gate, const float *up, enum activation act, size_t n);
    void (*softcap)(float *x, float cap, size_t n);
    void (*exp)(float *out, const float *in, size_t n); /* within 2 ulp */

    /* Sine and cosine of position * frequency[i], reduced exactly, |position| <= 2^53. */
    void (*angles)(float *sine, float *cosine, const double *frequency, double position, int n);
    /* out = the pairs (x_i, x_{i+half}) turned by the angles; out may be x. */
    void (*turn)(float *out, const float *x, const float *sine, const float *cosine, int half);

    void (*conv)(const struct conv_run *c);
    void (*rglru)(const struct rglru_run *r);
    void (*latent)(const struct latent_run *l);

    /* Scores of one row against KEY_BLOCK keys become weights exp(score - top), in place.
     * Only keys lo..hi-1 take part. Returns what earlier weights are to be multiplied with;
     * *top and *sum go on from block to block, from -inf and 0. */
    float (*soft_block)(float *scores, int lo, int hi, float scale, float cap, float *top,
                        float *sum);
    /* out[i] = out[i] * keep[i] + sum_j p[i, j] v_j for n_rows rows of d values; p has
     * KEY_BLOCK columns a row. keep NULL is 1. */
    void (*accumulate)(float *out, size_t out_stride, const float *keep, const float *p, int n_rows,
                       const float *v, size_t v_stride, int n_keys, int d);
    /* out = keep * out + scale * x, or scale * x alone when keep is 0 (out is not read). */
    void (*blend)(float *out, const float *x, float keep, float scale, int n);
};

/* The best table for this processor; never NULL. */
const struct kernels *kernels_pick(void);

/* The table of that name ("avx512", "avx2", "portable"), or NULL when the processor cannot
 * run it. */
const struct kernels *kernels_find(const char *name);

#endif
