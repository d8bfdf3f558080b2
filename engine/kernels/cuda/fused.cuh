/* fused.cuh - the passes a fused layer is made of. Activations between them are bf16, sums f32.
 *
 * A decode layer of the main configuration is five launches:
 *   1 front    v, q, k = W norm1(x); gates, RG-LRU        (fused_front)
 *   2 mix      latents and window of one head of one row  (fused_mix)
 *   3 output   x += W_o mixed                             (fused_product)
 *   4 mlp in   up = act(gate(norm2(x))) * up(norm2(x))    (fused_product)
 *   5 mlp out  x += W_down up                             (fused_product)
 * Above FRONT_ROWS rows the first is three: norm_to_bf16, fused_rglru, fused_product. Some shapes
 * have forms of their own: for few rows cluster.cuh, for up to 256 warpgroup.cuh; large matrices:
 * stream.cuh; the mlp's first product of many rows: glu.cuh.
 * Each prefetches its weights before pdl_wait, so that memory stays busy while the one before
 * it drains. Weights are read once, whatever the batch, up to SKINNY_ROWS rows.
 *
 * Every struct is passed to a kernel by value. Strides are in values, rows 16-byte aligned.
 */
#ifndef LATTE_CUDA_FUSED_CUH
#define LATTE_CUDA_FUSED_CUH

#include "engine/kernels/cuda/packed.cuh"

enum {
    SKINNY_ROWS = 48,          /* the skinny product is the way up to so many rows */
    NORMED_IN_BLOCK_ROWS = 16, /* up to so many, every block norms the rows for itself */
    FRONT_ROWS = 16,           /* fused_front is; above, h = norm1(x) is computed once, for both */
};

/* Weights of one or several matrices stacked, [n_out, n_in] row-major, 16-byte aligned. */
struct product_weight {
    const void *data;
    enum dtype dtype;    /* BF16 or I8 */
    const float *scales; /* [n_out] for I8 */
    const float *bias;   /* [n_out] or NULL */
    int n_out, n_in;     /* n_in a multiple of 8 (BF16), 16 (I8); any n_out */
};

static inline struct product_weight weight_of(const struct linear *l)
{
    return {l->weight->data, l->dtype, floats(l->scales), floats(l->bias), l->n_out, l->n_in};
}

struct device_norm {
    const float *weight; /* [n_in]; NULL: no norm */
    const float *bias;   /* [n_in] or NULL */
    enum norm_type type;
    float eps;
};

enum product_output {
    OUTPUT_BF16,     /* out bf16 = y + bias */
    OUTPUT_F32,      /* out f32 = softcap(y + bias) */
    OUTPUT_ADD,      /* out f32 += y + bias: the residual stream */
    OUTPUT_ACTIVATE, /* out bf16 = act(y_gate) * y_up; weights are the F gate rows, then F up rows;
                      * n_out = 2F, out has F columns */
    OUTPUT_ACTIVATE_PLAIN, /* out bf16 = act(y) */
};

struct product {
    const void *in; /* bf16 [rows, n_in], or f32 when it is to be normed */
    int64_t in_stride;
    struct device_norm norm;    /* given: in is f32, the product's input is bf16(norm(in)) */
    const int32_t *in_rows;     /* gather: row r reads in[in_rows[r]]; or NULL */
    struct row_factors factors; /* of in's rows, as norm would have them: where stream_factors */
    struct product_weight w;
    void *out;
    int64_t out_stride;
    int n_padded; /* n_out or more: rows of w that may be read and columns of out that
                   * may be written, those beyond n_out with anything; 0: n_out */
    enum product_output output;
    enum activation act;
    float softcap;         /* 0: none */
    int rows;              /* of the bucket */
    const int32_t *n_rows; /* actual, on the device; rows beyond are not written */
};

/* Rows 1..SKINNY_ROWS, or any number when the queue is deterministic. A row's result has the
 * same bits whatever the number of rows: sums run over n_in in one fixed order. */
void skinny_product(struct cuda *c, const struct product *p);

/* Any number of rows, through the library; norm, activation and accumulation included, in as
 * many launches as it takes. Uses c->converted and `wide` [rows, n_out] bf16 scratch for ACTIVATE.
 */
void library_product(struct cuda *c, const struct product *p, bf16 *wide);

/* The one of the two that is faster for the shape, or glu.cuh's, or stream.cuh's. */
void fused_product(struct cuda *c, const struct product *p, bf16 *wide);

/* RG-LRU from the residual stream: h = norm(x) (bf16-rounded), gates from block-diagonal
 * products, recurrence, state; z [rows, D] f32 before rglru_norm. Any rows and sequences. Steps
 * with prompts leave bf16(z_norm(z)) in `normed`, and z is scratch. */
struct rglru_front {
    const float *x;
    struct device_norm norm;
    const float *recurrence_gate, *recurrence_bias; /* [B, D/B, D/B], [D] or NULL */
    const float *input_gate, *input_bias;
    const float *lambda; /* [D] */
    struct device_slab<float> state;
    float *z;
    int dim, n_blocks;
    /* Steps with prompts: */
    bf16 *normed = nullptr;         /* [rows, D] the result */
    struct device_norm z_norm = {}; /* with a weight */
    __half *products = nullptr;     /* [rows, D] scratch */
    const bf16 *h = nullptr; /* [rows, D] norm(x) as norm_to_bf16 gives it: x and norm are then
                              * not used; NULL: normed here */
    /* Decode steps, with h: bf16(z * out_weight) [rows, D] and squares in D / 8 parts, and not z.
     */
    bf16 *weighted = nullptr;
    struct row_factors factors = {};
    const float *out_weight = nullptr; /* [D] */
};
/* False: not for this shape (D/B no multiple of 8, above 512 ...): the caller composes. */
bool fused_rglru(struct cuda *c, const struct rglru_front *f);

/* Launch 1: p's product and f's RG-LRU in one grid, where both read the same x. Decode only,
 * up to FRONT_ROWS rows.
 * False: the caller launches them one after the other. */
bool fused_front(struct cuda *c, const struct product *p, const struct rglru_front *f);

/* Launch 2, decode only: for each row and head softmax of the gates, rope of q and k, the latent
 * step P(eq 19), the window over the ring with this row put in, P(eq 13-14). */
struct mix {
    bf16 *q, *k; /* before norm and rope; q NULL: no window */
    const bf16 *v;
    int64_t stride;         /* of rows of q, k and v */
    const float *theta, *g; /* [rows, gate_stride]: M, and M or M+1 a head; NULL: no latents */
    int64_t gate_stride;
    struct row_factors gate_factors; /* of theta and g, which are to be multiplied by them */
    const float *q_norm, *k_norm;    /* [d] or NULL */
    float qk_eps;
    const double *frequencies; /* [d/2] */
    struct latent_shape latents;
    struct window_shape window; /* ring_rows 0: none */
    struct device_slab<float> m, alpha, s;
    struct slab ring_k, ring_v; /* dtype as they say */
    bf16 *out;                  /* [rows, H*d] */
    struct packed_rows packed;  /* given, decode only: it goes there instead */
};
/* False: not for this shape (head_dim, ring too long): the caller composes. */
bool fused_mix(struct cuda *c, const struct mix *m);

/* The same for prompts (any step), by pieces and tiles: theta and g given; q and k, raw, are normed
 * and turned where they lie. */
bool prompt_mix(struct cuda *c, const struct mix *m);

/* layer_plain.cu: where the embedding is to leave the first layer's rows packed, with norm's
 * squares; n: values of a row. False: that layer would not look at them (true: it may). */
bool packed_first(struct cuda *c, const struct norm *norm, int n, struct packed_rows *out);

/* x[rows, dim] f32 += norm(y f32) (post norms). */
void norm_add(struct cuda *c, float *x, const float *y, struct device_norm norm, int dim);
/* out bf16 = norm(in f32), rows of the step or gathered. */
void norm_to_bf16(struct cuda *c, bf16 *out, const float *in, struct device_norm norm, int dim,
                  const int32_t *in_rows, int rows, const int32_t *n_rows);

#endif
