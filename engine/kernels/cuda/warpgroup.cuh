/* warpgroup.cuh - layers of up to 256 rows on the tensor cores of capability 9.0: decode steps
 * that are not for clusters (cluster.cuh).
 *
 *   out = scale(row) (in W^T), in packed (packed.cuh), W bf16 [n_out, n_in] as it is
 *
 * A decode layer of them is five launches (layer_plain.cu):
 *   1 front    v, q, k from x; beside them gates, recurrence and state, and the latents' logits
 *              from z                                            (warpgroup_front)
 *   2 mix      latents and window of each head and row           (fused_mix)
 *   3 output   x += ; what norm2 would give                      (OUTPUT_ADD)
 *   4 mlp in   act(gate) up                                      (OUTPUT_ACTIVATE)
 *   5 mlp out  x += ; what the next layer's norm1 would give     (OUTPUT_ADD)
 *
 * A block of a product has 64 or 128 of the rows and a few columns of W, whose weights are all on
 * their way to shared memory before pdl_wait. Its rows come straight to registers, a few chunks of
 * 64 columns ahead of the tensor cores, since packed.cuh has them in the order in which lanes hold
 * them. What follows a product is inside: the activation; or the residual stream, its values for
 * the next product and their squares, so that no norm is a launch.
 *
 * Bytes at D = 768, R rows: W once for every 64 or 128 rows, and R 1.5 KB of rows for each block's
 * columns from L2: 98 KB for 64 rows of a block, 0.9 us at what L2 gives an SM. What the RG-LRU
 * takes: warpgroup_gates.cuh.
 */
#ifndef LATTE_CUDA_WARPGROUP_CUH
#define LATTE_CUDA_WARPGROUP_CUH

#include "engine/kernels/cuda/fused.cuh"
#include "engine/kernels/cuda/packed.cuh"

enum {
    WARPGROUP_ROWS = 256,  /* of a step at most */
    WARPGROUP_DEPTH = 768, /* columns of W that a block has: n_in, or an equal part of it */
    WARPGROUP_PARTS = 48,  /* of the squares that a product leaves for a row of WARPGROUP_DEPTH */
    WARPGROUP_HEAD_ROWS = 128, /* of logits at most, where warpgroup_head is */
    WARPGROUP_LOGITS = 264,    /* of latents that a row has at most, for both gates */
};

struct warpgroup_product {
    struct packed_rows in;
    const bf16 *weights; /* [n_out, n_in], 16-byte aligned */
    int n_out;
    /* in has squares, but of OUTPUT_ADD.
     * OUTPUT_BF16, in warpgroup_front alone: out bf16 [rows, out_stride] = scale (in W^T), scale of
     * in's squares.
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

/* A layer's beginning: v, q, k of x; RG-LRU, its state, and the latents' logits of z. */
struct warpgroup_front {
    struct warpgroup_product vqk; /* OUTPUT_BF16; its rows are the RG-LRU's, too */
    const void *prepared;         /* cluster_prepare's (cluster.cuh) */
    struct device_slab<float> state;
    float z_eps;               /* of the norm of z */
    const bf16 *logit_weights; /* [n_logits, D] */
    int n_logits;              /* see warpgroup_has_logits */
    float *logits;             /* [rows, logit_stride] */
    int64_t logit_stride;
};

/* Whether the device has such products, and they a kernel for the shape; OUTPUT_BF16: of v, q and
 * k. */
bool warpgroups_are_there(const struct cuda *c);
bool warpgroup_has(enum product_output output, int n_out, int n_in);
/* The same of the logits' weights, [n_logits, n_in]. */
bool warpgroup_has_logits(int n_logits, int n_in);

/* OUTPUT_ADD or OUTPUT_ACTIVATE. */
void warpgroup_product(struct cuda *c, const struct warpgroup_product *p);

/* Decode steps: row r is sequence r. */
void warpgroup_front(struct cuda *c, const struct warpgroup_front *f);

/* The head's logits, p, of rows that are packed: those that the norm before it would give, its
 * weight among their values; p's in and norm are not looked at. False: not such a product, and
 * nothing was launched. */
bool warpgroup_head(struct cuda *c, const struct product *p, const struct packed_rows *in);

/* x [rows, n] f32: out's values = x * weight, and squares in WARPGROUP_PARTS parts, or in
 * twice as many. */
void pack_rows(struct cuda *c, const struct packed_rows *out, const float *x, const float *weight,
               int rows, const int32_t *n_rows);

#endif
