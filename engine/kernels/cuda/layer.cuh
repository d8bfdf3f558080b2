/* layer.cuh - what the files of a layer share: layer.cu has the passes that any shape goes by, and
 * the head; layer_plain.cu the kernels of few rows; layer_scratch.cu the memory between them.
 *
 * Threads and errors: as cuda.cuh.
 */
#ifndef LATTE_CUDA_LAYER_CUH
#define LATTE_CUDA_LAYER_CUH

#include "engine/kernels/cuda/beside.cuh"
#include "engine/kernels/cuda/cluster.cuh"
#include "engine/kernels/cuda/fused.cuh"
#include "engine/kernels/cuda/warpgroup.cuh"

extern "C" {
#include "engine/state.h"
#include "engine/upload.h"
}

/* Activations between the passes, [max_rows, ...]; NULL where the configuration has no use. */
struct layer_scratch {
    bf16 *vqk;    /* [R, (H + 2 KV) d] v, q and k of a row side by side */
    bf16 *h;      /* [R, D] norm1(x), where both the RG-LRU and v, q, k want it; norm1 or norm2
                   * of x behind a post norm */
    float *z;     /* [R, D] the RG-LRU's output */
    float *gates; /* [R, columns of g + L] g, then theta */
    bf16 *mixed;  /* [R, H d] */
    bf16 *up;     /* [R, F] */
    bf16 *wide;   /* [R, 2F] what the library leaves for an activation */
    float *y;     /* [R, D] a sublayer's output that a post norm goes over */
    /* The long way of attention over whole contexts, and of gates in wide blocks. */
    float *v32, *q32, *k32, *mixed32;    /* [R, KV d], [R, H d], [R, KV d], [R, H d] */
    float *h32, *recurrence32, *input32; /* [R, D]; the latter two also for the RG-LRU: of
                                          * prompts __half products and bf16 normed z, of decode
                                          * steps squares of z and bf16 weighted z */
    float *logits; /* [max_logit_rows, V padded], where V is not a multiple of PADDED_ROWS */
    int n_vocab;   /* V */
    /* Layers of few rows, CLUSTER_ROWS at most. */
    float *x_between; /* [rows, D] the residual stream within the layer */
    float *shares;    /* [MIX_CLUSTERS, FEW_ALONE, D] what each head adds to it */
    void *prepared;   /* [layers] cluster_prepare's; for the rows below, too */
    int n_prepared;   /* layers that are */
    /* Layers of up to WARPGROUP_ROWS rows: x, what is mixed and the mlp's features. */
    bf16 *packed_x, *packed_mixed, *packed_up;
    float *x_squares; /* [rows, packed_parts] */
    int packed_layer; /* whose norm1 the layer before, or the embedding, left in packed_x; -1:
                       * nobody's */
    int packed_parts; /* of a row's squares there */
    size_t n_bytes;
    int h_layer; /* whose norm1(x) the layer before left in h; -1: nobody's */
    /* The last layer left x times the weight of the norm before the head in h, and its squares. */
    bool h_is_heads;
    struct row_factors heads;
    /* The same in packed_x; values NULL: not there. */
    struct packed_rows packed_heads;
    struct beside beside; /* v, q and k, while the queue has the RG-LRU */
};

/* A layer of a step. */
struct pass {
    struct cuda *c;
    struct backend *b;
    struct layer_scratch *s;
    const struct layer_weights *w; /* an element of the model's array of layers */
    const struct layer_state *state;
    const struct model_config *config;
    struct buffer *x;
    bool full, latents, window;
    bool chained;  /* each sublayer ends with the norm that the next one begins with */
    bool normed;   /* h is norm1(x) already */
    bool packed;   /* packed_x is norm1's already */
    bool factored; /* z is weighted_z, what norms it is left to the mixing */
    int layer;
};

/* By clusters or by warpgroups: the word for it (backend.h layers); NULL, and nothing was done,
 * where the configuration, the device or the number of rows is another. */
const char *layer_plain(const struct pass *p);

/* What the mixing is given of the layer, rows that are packed apart. */
struct mix layer_mix(const struct pass *p);

static inline struct device_norm norm_of(const struct norm *n)
{
    return {floats(n->weight), floats(n->bias), n->type, n->eps};
}

/* Matrices that lie one behind the other, without biases, are one matrix. */
static inline bool stack(struct product_weight *out, const struct linear *const *linears, int n)
{
    *out = weight_of(linears[0]);
    for (int i = 1; i < n; i++) {
        const struct product_weight next = weight_of(linears[i]);
        const char *end = (const char *)out->data +
                          (size_t)out->n_out * (size_t)out->n_in * dtype_bytes(out->dtype);
        if (out->bias || next.bias || next.n_in != out->n_in || end != next.data ||
            (out->scales && out->scales + out->n_out != next.scales))
            return false;
        out->n_out += next.n_out;
    }
    return true;
}

static inline int head_values(const struct pass *p, int n_heads)
{
    return n_heads * p->config->head_dim;
}

static inline int64_t vqk_stride(const struct pass *p)
{
    return head_values(p, p->config->n_heads + 2 * p->config->n_kv_heads);
}

static inline device_slab<float> float_slab(const struct slab *slab)
{
    return {floats(slab->buffer), slab->row_values};
}

static inline struct cluster_shape cluster_shape_of(const struct model_config *c)
{
    return {c->hidden_size, c->n_heads, c->head_dim, c->intermediate_size, c->rglru_blocks};
}

static inline int64_t padded_columns(int n)
{
    return (int64_t)ceil_div(n, PADDED_ROWS) * PADDED_ROWS;
}

#endif
