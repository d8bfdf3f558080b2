/* cuda.cuh - the CUDA backend as its kernel files see it.
 *
 * backend_cuda.cu owns memory, steps, graphs and errors; each family of kernels is a file that
 * holds kernels, then the ops of backend.h that launch them, under the op's name with cuda_ in
 * front. Activations of these ops are f32, as backend.h says; the fused layer (layer.cu) keeps
 * its own in bf16.
 *
 *   rows.cu        embed, norm, head_norm, add, activate, gather, softcap, rope, vapor
 *   recurrence.cu  conv, rglru, block_linear
 *   rglru.cu       the RG-LRU from the residual stream, fused
 *   latent.cu      latent: one row, and prompts by pieces
 *   window.cu      window: one row (long rings split), prompts, and the rings' update
 *   prompt.cu, latent_tile.cu   a layer's mixing of prompts, fused
 *   linear.cu      linear: f32, skinny bf16 and int8 products, the library for large ones
 *   mix.cu         one row of a layer's mixing, fused; mix_warps.cu for some shapes
 *   layer.cu       the fused layer and head; layer_plain.cu for few rows, layer_scratch.cu
 *   cluster_mix.cu, few_output.cu, few_mlp.cu   a layer of few rows, by clusters
 *   warpgroup.cu   a layer of up to 256 rows, by warpgroups: all but its mixing
 *   stream.cu, residual.cu      products of large matrices; what follows them
 *   beside.cu      a second stream, for a branch of a layer
 *   draw.cu        sampling
 *
 * Threads: the engine thread. Memory: device memory is taken in backend_cuda_open and
 * buffer_open only. Errors: kept in queue.error.
 */
#ifndef LATTE_CUDA_CUDA_CUH
#define LATTE_CUDA_CUDA_CUH

#include "engine/kernels/cuda/device.cuh"

extern "C" {
#include "engine/backend.h"
}

enum {
    STEP_PLACES = 2, /* on the host, of steps in flight */
    /* Rows of a matrix in memory of its own, and columns of padded logits, come in multiples of
     * it. */
    PADDED_ROWS = 8,
};

/* What a step brings with it, from pinned memory of its place to the device. */
struct step_arrays {
    uint4 *to;
    const uint4 *from[STEP_PLACES];
    int n; /* of 16 bytes; 0: nothing */
};

struct buffer {
    void *data; /* device memory */
    size_t n_bytes;
    bool owns; /* false: part of a larger block, see linear_group */
};

struct library; /* linear.cu: cuBLASLt, its workspace and what it chose for each shape */
struct drawing; /* draw.cu: the device sampler's memory */

struct cuda {
    struct backend base;
    struct backend_options options; /* config only while opening: copy what is needed later */
    struct queue queue;
    struct device_step step; /* the one being queued; its pointers never change */
    bool may_be_late;        /* its kernels would have been right with late arrays */
    /* Where the fused head left the step's logits, a row every logits_stride values, if that is
     * not the model's buffer [n, V]; NULL otherwise. */
    const float *logits;
    int64_t logits_stride;
    float logits_cap; /* what drawing is to cap them by; 0: they are what the model says */
    struct library *library;
    struct drawing *drawing;

    /* Scratch of single ops, on the device. */
    int max_pieces;
    bf16 *converted;     /* [max_rows, max_dim] inputs of a bf16 product */
    float *piece_states; /* [max_pieces, piece_values] what latent and rglru carry over pieces */
    size_t piece_values; /* max of L * (d + 2) and 2 * max_dim, a multiple of 4 */
    float *partials;     /* [partial_values] f32 partial results of split reductions */
    size_t partial_values;
    struct layer_scratch *layer; /* layer.cuh */
    const char *layers;          /* of the step being queued, see backend.h; NULL: single ops */
};

static inline struct cuda *cuda_of(struct backend *b)
{
    return (struct cuda *)b;
}

static inline float *floats(const struct buffer *buffer)
{
    return buffer ? (float *)buffer->data : nullptr;
}

/* The rows an op works on: the bucket's size for the grid; kernels compare with *actual. */
static inline int rows_of(const struct cuda *c, enum row_set rows)
{
    return rows == ROWS_STEP ? c->step.rows : c->step.logits;
}
static inline const int32_t *actual_rows(const struct cuda *c, enum row_set rows)
{
    return rows == ROWS_STEP ? &c->step.sizes->n_rows : &c->step.sizes->n_logit_rows;
}

/* ---- ops, as backend.h ---- */
void cuda_embed(struct backend *b, struct buffer *out, const struct linear *table, float scale,
                bool sinusoidal, const struct norm *next);
void cuda_norm(struct backend *b, struct buffer *out, const struct buffer *in, const struct norm *w,
               int dim, enum row_set rows);
void cuda_head_norm(struct backend *b, struct buffer *x, const struct norm *w, int n_heads,
                    int head_dim);
void cuda_add(struct backend *b, struct buffer *x, const struct buffer *y, int dim);
void cuda_activate(struct backend *b, struct buffer *out, const struct buffer *gate,
                   const struct buffer *up, enum activation act, int dim);
void cuda_gather(struct backend *b, struct buffer *out, const struct buffer *in, int dim);
void cuda_softcap(struct backend *b, struct buffer *x, float cap, int dim);
void cuda_rope(struct backend *b, struct buffer *x, const struct buffer *frequencies, int n_heads,
               int head_dim);
void cuda_vapor(struct backend *b, struct buffer *out, const struct buffer *x,
                const struct buffer *theta, int n_heads, int n_x_heads, int head_dim, int sign);
void cuda_conv(struct backend *b, struct buffer *out, const struct buffer *in,
               const struct buffer *weight, const struct buffer *bias, const struct slab *state,
               int dim, int n_taps);
void cuda_rglru(struct backend *b, struct buffer *out, const struct buffer *in,
                const struct buffer *recurrence, const struct buffer *input,
                const struct buffer *lambda, const struct slab *state, int dim);
void cuda_block_linear(struct backend *b, struct buffer *out, const struct buffer *in,
                       const struct buffer *weight, const struct buffer *bias, int dim,
                       int n_blocks);
void cuda_latent(struct backend *b, struct buffer *out, struct buffer *p0,
                 const struct buffer *theta, const struct buffer *g, const struct buffer *v,
                 const struct slab *m, const struct slab *alpha, const struct slab *s,
                 const struct latent_shape *shape);
void cuda_window(struct backend *b, struct buffer *out, const struct buffer *p0,
                 const struct buffer *q, const struct buffer *k, const struct buffer *v,
                 const struct slab *ring_k, const struct slab *ring_v,
                 const struct buffer *vapor_theta, const struct window_shape *shape);
void cuda_linear(struct backend *b, struct buffer *out, const struct buffer *in,
                 const struct linear *w, enum row_set rows);
bool cuda_layer(struct backend *b, struct buffer *x, const struct layer_weights *w,
                const struct layer_state *state, const struct model_config *config, int layer);
bool cuda_head(struct backend *b, struct buffer *logits, const struct buffer *x,
               const struct norm *norm, const struct linear *lm_head, float softcap);
enum status cuda_admit(struct backend *b, int slot, const struct sampling_params *params,
                       struct error *err);
void cuda_draw(struct backend *b, const struct buffer *logits);
enum status cuda_note(struct backend *b, int slot, const int32_t *tokens, size_t n,
                      struct error *err);

/* ---- what backend_cuda.cu asks of the families ---- */

/* linear.cu. Weights are put on the device as dtype (F32, BF16, I8 with one scale a row: the
 * largest |w| of the row / 127); conversion runs on the device. scales as struct linear's. */
enum status library_open(struct library **out, struct cuda *c, struct error *err);
void library_close(struct library *library);
size_t library_bytes(const struct library *library); /* of device memory */
/* Before opening: at most so many. */
size_t library_bytes_of(const struct backend_options *options);
enum status linear_upload(struct cuda *c, void *weight, float *scales, enum dtype dtype,
                          const void *src, enum dtype src_dtype, int n_out, int n_in,
                          struct error *err);

/* Values of `partials` that window.cu wants for such options, config included. */
size_t window_partials(const struct backend_options *options);

/* draw.cu. results: pinned host memory that step_results of a slot of the ring points to. */
enum status drawing_open(struct drawing **out, struct cuda *c, struct error *err);
void drawing_close(struct drawing *d);
size_t drawing_bytes(const struct drawing *d);
size_t drawing_bytes_of(const struct backend_options *options);
const int32_t *drawing_tokens(const struct drawing *d); /* device [n_slots], the last drawn */
/* Host side of a step: fill the pinned arrays of place `place` from the step's draws and scores,
 * and queue what counts its prompts' tokens. */
void drawing_begin(struct cuda *c, int place, const struct step *step);
/* What of them steps with up to n_logit_rows rows of logits bring to the device. */
struct step_arrays drawing_arrays(const struct drawing *d, int n_logit_rows);
/* Once a step is done, what the kernels left in its place; as backend.h's wait gives it. */
const struct sampled *drawing_results(struct cuda *c, int place);

/* layer.cu, layer_scratch.cu */
enum status layer_scratch_open(struct cuda *c, struct error *err);
void layer_scratch_close(struct cuda *c);
size_t layer_scratch_bytes(const struct cuda *c);
size_t layer_scratch_bytes_of(const struct backend_options *options);

enum { LINE = 128 }; /* bytes of L2's lines, as discard_line has them */

/* Lines that a step has left and the next one does not read: where L2 has them, they need not go
 * to memory. */
struct spent_lines {
    char *first;
    int n; /* 0: none */
};
/* What a step of so many rows of logits leaves, if L2 has room for it and it is worth the while;
 * the one before is taken to have had as many as the one that begins. */
struct spent_lines layer_spent(const struct cuda *c, int n_logit_rows);

#endif
