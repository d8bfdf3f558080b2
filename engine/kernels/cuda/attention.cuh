/* attention.cuh - what the ops latent and window share with the fused prompt path: latents by
 * pieces for f32 and bf16 activations, and the ring update.
 *
 * Threads, memory, errors: as device.cuh.
 */
#ifndef LATTE_CUDA_ATTENTION_CUH
#define LATTE_CUDA_ATTENTION_CUH

#include "engine/kernels/cuda/math.cuh"

/* Causal Latte over all rows of the step, P(eq 8-12, 19); f32, or bf16 values and outputs. */
struct latent_call {
    const float *theta; /* [rows, theta_stride], M a head */
    const float *g;     /* [rows, g_stride], M or M+1 a head */
    int64_t theta_stride, g_stride;
    const void *v; /* [rows, v_stride], d a kv head */
    void *out;     /* [rows, out_stride], d a head; type of v */
    int64_t v_stride, out_stride;
    float *p0;  /* [rows, H]: p(0|t) when the window is gated; or NULL */
    bool half;  /* v and out are bf16 */
    bool blend; /* out = p(0|t) * out + latents, where out holds the window's part */
    struct latent_shape shape;
    struct device_slab<float> m, alpha, s;
};
void latent_rows(struct cuda *c, const struct latent_call *call);

/* The same by pieces in bf16 on the tensor cores, for calls that fit. States: [pieces,
 * state_values], m [L], alpha [L], s [L, d], state_values even. */
bool latent_tiles_fit(const struct cuda *c, const struct latent_call *call);
/* Of each piece but a sequence's last its own state, from nothing. */
void latent_tile_sums(struct cuda *c, const struct latent_call *call, float *states,
                      size_t state_values);
/* The rows of all pieces from the states they start from (a sequence of one piece: from its
 * slot), and the slots' new states. */
void latent_tiles(struct cuda *c, const struct latent_call *call, float *states,
                  size_t state_values);

/* Keys or values of a layer in device memory: slabs of rings [KV, w, d]. */
struct device_ring {
    void *data;
    int64_t row_values;
    enum dtype dtype;
};

static inline struct device_ring device_ring(const struct slab *slab)
{
    return {slab->buffer->data, slab->row_values, slab->dtype};
}

/* Put the last min(rows, w) rows of each sequence into its ring; rows of k and v [KV, d] are
 * f32, or bf16 when `half`. Goes after every kernel that reads old rows of the ring. */
struct ring_update {
    const void *k, *v;
    int64_t k_stride, v_stride;
    bool half;
    int n_kv_heads, head_dim;
    int64_t ring_rows;
    struct device_ring ring_k, ring_v;
};
void update_rings(struct cuda *c, const struct ring_update *u);

#endif
