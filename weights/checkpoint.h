/* checkpoint.h - a model directory: config.json, and tensors bound to their places.
 *
 * The directory is laid out as the Hugging Face ecosystem does it. Keys, defaults and tensor
 * names are listed in weights/README.md. A missing, extra, mis-shaped or mis-typed tensor is
 * an error that names it with what was expected and found.
 *
 * Threads: open and close by one thread; an open checkpoint is read-only.
 * Memory:  owns the mappings; all tensor pointers are borrowed from it until close.
 * Errors:  NOT_FOUND, INVALID (err->field is the key or tensor), TOO_LARGE, IO, NOMEM.
 */
#ifndef LATTE_WEIGHTS_CHECKPOINT_H
#define LATTE_WEIGHTS_CHECKPOINT_H

#include <stdbool.h>
#include <stdint.h>

#include "engine/base/error.h"
#include "weights/safetensors.h"

enum layer_type { LAYER_LATTE, LAYER_MACCHIATO, LAYER_FULL_ATTENTION };
enum latent_input { LATENT_INPUT_NONE, LATENT_INPUT_CONV, LATENT_INPUT_RGLRU };
enum norm_type { NORM_RMS, NORM_LAYER };
enum mlp_type { MLP_GATED, MLP_PLAIN };
enum activation { ACTIVATION_SILU, ACTIVATION_GELU, ACTIVATION_GELU_TANH };
enum position_embedding { POSITION_NONE, POSITION_SINUSOIDAL, POSITION_VAPOR };
enum rope_scaling_type { ROPE_SCALING_NONE, ROPE_SCALING_LINEAR, ROPE_SCALING_LLAMA3 };
enum model_head { HEAD_CAUSAL_LM, HEAD_SEQUENCE_CLASSIFICATION, HEAD_NONE };
enum pooling { POOLING_MEAN, POOLING_LAST };

enum { MODEL_MAX_EOS = 16 };

struct rope_scaling {
    enum rope_scaling_type type;
    double factor, low_freq_factor, high_freq_factor;
    int64_t original_max_position_embeddings;
};

struct layer_config {
    enum layer_type type;
    double rope_theta;
};

struct model_config {
    enum model_head head;
    int32_t vocab_size;  /* V */
    int32_t hidden_size; /* D */
    int32_t n_layers;
    int32_t intermediate_size; /* F, mlp width */
    int32_t n_heads;           /* H */
    int32_t n_kv_heads;        /* KV, divides H */
    int32_t head_dim;          /* d */
    int32_t n_latents;         /* L, all heads together, divisible by H; 0 for none */
    enum latent_input latent_input;
    int32_t conv_kernel;            /* K */
    int32_t rglru_blocks;           /* B, divides D */
    int32_t sliding_window;         /* w */
    double attention_scale;         /* 1/sqrt(d), or 1/sqrt(query_pre_attn_scalar) */
    double attn_logit_softcapping;  /* 0 for none */
    double final_logit_softcapping; /* 0 for none */
    enum position_embedding position_embedding;
    struct rope_scaling rope_scaling;
    bool bidirectional;
    enum norm_type norm;
    double norm_eps, norm_offset;
    bool final_norm;
    enum mlp_type mlp;
    enum activation hidden_act;
    bool post_norms;
    double embedding_scale;
    bool tie_word_embeddings;
    int64_t max_position_embeddings; /* the ring of full_attention layers */
    int32_t bos_token_id;            /* -1 for none */
    int32_t n_eos;
    int32_t eos_token_id[MODEL_MAX_EOS];
    enum pooling pooling;
    int32_t num_labels;
    struct layer_config *layers; /* [n_layers], owned by the checkpoint */
};

/* Weight and optional bias of one linear or norm; NULL where the file has none. */
struct weight {
    const struct tensor *weight, *bias;
};

struct rglru_tensors {
    struct weight input_gate, recurrence_gate; /* [B, D/B, D/B] | [D] */
    const struct tensor *lambda;               /* [D] */
};

/* Shapes as in weights/README.md; entries a configuration does not use are NULL. */
struct layer_tensors {
    struct weight norm1, norm2;       /* [D] */
    struct weight latent_q, latent_k; /* [L or H*(M+1), D], [L, D] */
    struct weight v_proj, q_proj, k_proj, o_proj;
    const struct tensor *q_norm, *k_norm; /* [d], optional */
    struct weight conv;                   /* [D, K] | [D] */
    struct rglru_tensors rglru, rglru_backward;
    const struct tensor *rglru_norm;  /* [D] */
    const struct tensor *vapor_theta; /* [H, d/2] */
    const struct tensor *post_norm1, *post_norm2;
    struct weight gate_proj, up_proj, down_proj;
};

/* generation_config.json: server-side defaults of sampling; NAN or -1 where it says nothing. */
struct generation_defaults {
    double temperature, top_p, min_p, typical_p, repetition_penalty;
    int32_t top_k;
    int32_t max_new_tokens;
};

struct checkpoint {
    struct model_config config;
    struct generation_defaults generation;
    const struct tensor *embed_tokens; /* [V, D] */
    struct layer_tensors *layers;      /* [n_layers], owned */
    struct weight norm;                /* final norm, [D] */
    struct weight lm_head;             /* [V, D]; the embedding's tensor when tied */
    struct weight score;               /* [labels, D], classifiers */
    int64_t n_parameters;              /* values of all tensors, tied ones once */
    char fingerprint[33];              /* XXH3-128 in hex, see fingerprint.h */
    char *ignored_keys;                /* unknown keys of config.json, quoted and comma-separated,
                                          for one line of log; NULL when there are none; owned */
    struct safetensors *tensors;       /* owned */
};

/* Progress of a long load: done and total bytes; called from the opening thread. */
typedef void progress_fn(void *context, uint64_t done, uint64_t total);

/* Open and check a model directory. The fingerprint reads every byte once (progress reports
 * it); progress may be NULL. */
enum status checkpoint_open(struct checkpoint **out, const char *dir, progress_fn *progress,
                            void *context, struct error *err);
void checkpoint_close(struct checkpoint *c); /* accepts NULL and half-built objects */

/* Latents per head, M = L/H. */
static inline int32_t config_latents_per_head(const struct model_config *c)
{
    return c->n_latents / c->n_heads;
}

/* Keys a layer's attention ring holds: w, max_position_embeddings, or 0 without attention. */
int64_t config_ring_rows(const struct model_config *c, int layer);

#endif
