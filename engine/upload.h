/* upload.h - a checkpoint's tensors as the backend keeps them.
 *
 * Matrices get the weight dtype the model was opened with, those that read the same rows one
 * behind the other (latent_q, latent_k; v, q, k; gate, up); norms (norm_offset added), biases
 * and the small tensors of conv, RG-LRU and VAPOR become f32. A struct whose weight is NULL is
 * something the configuration does not have.
 *
 * Threads: the model's.
 * Memory:  device memory, taken in weights_open and released in weights_close. The checkpoint
 *          is only read, and not needed afterwards.
 * Errors:  NOMEM names the tensor and its bytes; DEVICE from the backend.
 */
#ifndef LATTE_ENGINE_UPLOAD_H
#define LATTE_ENGINE_UPLOAD_H

#include <stddef.h>

#include "engine/backend.h"
#include "engine/base/error.h"
#include "weights/checkpoint.h"

struct layer_weights {
    struct norm norm1, norm2, post_norm1, post_norm2; /* [D] */
    struct linear latent_q, latent_k;                 /* [L or H*(M+1), D], [L, D] */
    struct linear v_proj, q_proj, k_proj, o_proj;
    struct norm q_norm, k_norm;             /* [d] */
    struct buffer *conv, *conv_bias;        /* [D, K], [D] */
    struct buffer *input_gate, *input_bias; /* [B, D/B, D/B], [D] */
    struct buffer *recurrence_gate, *recurrence_bias;
    struct buffer *lambda;      /* [D] */
    struct norm rglru_norm;     /* [D] */
    struct buffer *vapor_theta; /* [H, d/2] */
    struct buffer *rope;        /* [d/2] f64 frequencies; with a window only */
    struct linear gate_proj, up_proj, down_proj;
};

struct model_weights {
    struct backend *backend;      /* borrowed */
    struct linear embed;          /* [V, D] */
    struct linear lm_head;        /* [V, D]; shares embed's matrix when tied */
    struct norm norm;             /* [D] */
    struct layer_weights *layers; /* [n_layers + 1], owned; of the last, which is none, norm1 is
                                   * norm: what the layer before it is followed by */
    int n_layers;
    size_t n_bytes; /* on the device */
};

/* Upload all tensors of a causal language model. dtype is that of matrices, F32, BF16 or I8;
 * progress counts the checkpoint's bytes and may be NULL. */
enum status weights_open(struct model_weights **out, const struct checkpoint *checkpoint,
                         struct backend *backend, enum dtype dtype, progress_fn *progress,
                         void *context, struct error *err);
/* The bytes that weights_open would take. */
size_t weights_bytes_of(const struct checkpoint *checkpoint, enum dtype dtype);

void weights_close(struct model_weights *w); /* accepts NULL and half-built objects */

/* Rope's angles per position, out [d/2], with the configuration's scaling applied as Hugging
 * Face defines "linear" and "llama3", in double. */
void rope_frequencies(double *out, const struct model_config *config, int layer);

#endif
