/* warpgroup.cuh - products of up to 256 rows on the tensor cores of capability 9.0: decode steps
 * that are not for clusters (cluster.cuh).
 *
 *   out = scale(row) (in W^T), in packed (packed.cuh), W bf16 [n_out, n_in] as it is
 *
 * A decode layer of them is six launches (layer_plain.cu):
 *   1 rglru    gates, recurrence, state; z                       (fused_rglru)
 *   2 front    v, q, k from x; the latents' logits from z        (two products)
 *   3 mix      latents and window of each head and row           (fused_mix)
 *   4 output   x += ; what norm2 would give                      (OUTPUT_ADD)
 *   5 mlp in   act(gate) up                                      (OUTPUT_ACTIVATE)
 *   6 mlp out  x += ; what the next layer's norm1 would give     (OUTPUT_ADD)
 *
 * A block has 64 or 128 of the rows and a few columns of W, whose weights are all on their way to
 * shared memory before pdl_wait; then its rows come in bulk copies of 64 columns each, and each is
 * multiplied as soon as it is there. What follows a product is inside: the activation; or the
 * residual stream, its values for the next product and their squares, so that no norm is a launch.
 *
 * Bytes at D = 768, R rows: W once for every 64 or 128 rows, and R 1.5 KB of rows for each block's
 * columns from L2: 98 or 196 KB a block, 1.7 us at what L2 gives an SM.
 */
#ifndef LATTE_CUDA_WARPGROUP_CUH
#define LATTE_CUDA_WARPGROUP_CUH

#include "engine/kernels/cuda/fused.cuh"
#include "engine/kernels/cuda/packed.cuh"

enum {
    WARPGROUP_ROWS = 256,  /* of a step at most */
    WARPGROUP_DEPTH = 768, /* columns of W that a block has: n_in, or an equal part of it */
    WARPGROUP_PARTS = 48,  /* of the squares that a product leaves for a row of WARPGROUP_DEPTH */
};

struct warpgroup_product {
    struct packed_rows in;
    const bf16 *weights; /* [n_out, n_in], 16-byte aligned */
    int n_out;
    /* in has squares, but of OUTPUT_ADD.
     * OUTPUT_BF16, OUTPUT_F32: out [rows, out_stride] = scale (in W^T), scale of in's squares.
     * OUTPUT_ACTIVATE: next's values = act(gate) up; weights are n_out / 2 rows of gate, then up.
     * OUTPUT_ADD: out f32 += in W^T; then next's values = out * next_weight and its squares, unless
     * they are NULL. */
    enum product_output output;
    enum activation act;
    void *out;
    int64_t out_stride;
    struct packed_rows next;
    const float *next_weight;
    int rows;              /* of the bucket */
    const int32_t *n_rows; /* actual, on the device; rows beyond are not written */
};

/* Whether the device has such products, and they a kernel for the shape. */
bool warpgroups_are_there(const struct cuda *c);
bool warpgroup_has(enum product_output output, int n_out, int n_in);
/* n products as one launch: one, or two of OUTPUT_BF16 or OUTPUT_F32. */
void warpgroup_products(struct cuda *c, const struct warpgroup_product *p, int n);

/* x [rows, n] f32: out's values = x * weight, and squares in WARPGROUP_PARTS parts. */
void pack_rows(struct cuda *c, const struct packed_rows *out, const float *x, const float *weight,
               int rows, const int32_t *n_rows);

#endif
