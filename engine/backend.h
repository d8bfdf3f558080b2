/* backend.h - the operations a forward pass is made of, over opaque device memory.
 *
 * model.c is written once against this table. backend_ref.c is the oracle (plain loops, one
 * thread, f32 accumulated in the obvious order), backend_cpu.c the fast CPU implementation,
 * backend_cuda.cu the GPU's. Letters: R rows of the step, D hidden size,
 * H heads, KV kv heads, d head width, M latents per head, L = H*M, w ring rows, K conv taps,
 * B RG-LRU blocks, F mlp width, V vocabulary. Activations are row-major f32.
 *
 * Threads: one thread at a time calls a backend (the engine thread, once it runs); the CPU
 *          backend spreads an op over its own pool and returns when the op is done, a device
 *          backend queues it.
 * Memory:  buffers belong to the backend and are released by buffer_close; no op allocates.
 * Errors:  opening, reading, writing, submit and wait return a status. Ops return nothing: a
 *          device failure is remembered, later ops do nothing, and the next wait reports it.
 *
 * Exactness: what an op computes for a row depends only on that row, on its own sequence and
 * on the number of rows that sequence brings to the step, never on other sequences of the
 * batch or on the number of threads.
 */
#ifndef LATTE_ENGINE_BACKEND_H
#define LATTE_ENGINE_BACKEND_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/base/error.h"
#include "engine/sampler.h"
#include "weights/checkpoint.h"

struct backend;
struct buffer; /* device memory; its bytes are not for the host to touch */
struct layer_weights;
struct layer_state;

/* In place of a token: the one that the device last drew for the row's slot. */
enum { TOKEN_DRAWN = -1 };

/* A token to draw from one row of logits, and a given token to score against one. */
struct step_draw {
    int32_t logit_row; /* index among the step's logit rows */
    int32_t slot;      /* whose parameters and counts, see sampler_admit */
    uint64_t position; /* of the token to be drawn */
    int64_t n_output;  /* tokens drawn before it */
};

struct step_score {
    int32_t logit_row, target; /* target: the token whose logprob is wanted */
    int32_t n_top;             /* 0..SAMPLER_MAX_TOP_LOGPROBS alternatives */
};

/* One step: rows of several sequences. Rows of a sequence are adjacent and in order of
 * position. Arrays are host memory, borrowed until the step is submitted. */
struct step {
    int n_rows;
    int n_seqs;
    const int32_t *tokens;    /* [n_rows], each in 0..V-1, or TOKEN_DRAWN where the backend
                               * draws itself */
    const int64_t *positions; /* [n_rows] position of each row in its session, from 0 */
    const int32_t *seq_slot;  /* [n_seqs] slot of each sequence, all different */
    const int32_t *seq_start; /* [n_seqs + 1] first row of each sequence; the last is n_rows */
    int n_logit_rows;
    const int32_t *logit_rows;       /* [n_logit_rows] ascending rows whose logits are wanted */
    int n_draws, n_scores;           /* 0 where the host samples */
    const struct step_draw *draws;   /* [n_draws], each slot at most once */
    const struct step_score *scores; /* [n_scores] */
};

/* Which rows an op works on: all rows of the step, or the n_logit_rows gathered ones. */
enum row_set { ROWS_STEP, ROWS_LOGITS };

/* A weight matrix [n_out, n_in] with optional bias [n_out] f32, as the backend stores it. */
struct linear {
    struct buffer *weight; /* NULL: the linear does not exist */
    struct buffer *bias;   /* f32, or NULL */
    int n_out, n_in;
    enum dtype dtype;      /* F32, BF16, or I8 with a scale per row */
    struct buffer *scales; /* [n_out] f32 for I8, else NULL */
};

struct norm {
    struct buffer *weight; /* [n] f32 with norm_offset already added; NULL: does not exist */
    struct buffer *bias;   /* [n] f32 or NULL */
    enum norm_type type;
    float eps;
};

/* In a block that holds a slot, each row begins at a multiple of so many bytes. */
enum { SLOT_ROW_ALIGNMENT = 16 };

/* A slot's state tensor is one row of a slab [n_slots, row_values]. */
struct slab {
    struct buffer *buffer;
    int64_t row_values;
    enum dtype dtype; /* F32; rings also BF16 or F8_E4M3 where the backend has them */
};

struct latent_shape {
    int n_heads, n_latents; /* H, M per head */
    int head_dim;           /* d */
    int n_kv_heads;         /* KV; head a reads v of kv head a / (H/KV) */
    bool gated_window;      /* g has M+1 columns a head; index 0 is the window's */
};

struct window_shape {
    int n_heads, n_kv_heads, head_dim;
    int64_t ring_rows; /* w: attends to positions t-w+1..t */
    float scale;       /* of the scores */
    float softcap;     /* 0 for none: score = c tanh(score / c) */
};

/* Where a device's memory went. */
struct backend_memory {
    char device[128]; /* "NVIDIA H100 80GB HBM3 (cuda:0)" */
    size_t total_bytes, free_bytes;
    size_t weight_bytes, buffer_bytes, workspace_bytes; /* matrices; other buffers; own scratch */
};

struct backend_ops {
    const char *name; /* "ref", "cpu", "cuda" */
    void (*close)(struct backend *b);

    /* Memory. buffer_open zeroes. write, read and copy move n_bytes and are complete, as far
     * as the caller can see, when they return. */
    enum status (*buffer_open)(struct backend *b, struct buffer **out, size_t n_bytes,
                               struct error *err);
    void (*buffer_close)(struct backend *b, struct buffer *buffer); /* accepts NULL */
    enum status (*write)(struct backend *b, struct buffer *dst, size_t offset, const void *src,
                         size_t n_bytes, struct error *err);
    enum status (*read)(struct backend *b, void *dst, const struct buffer *src, size_t offset,
                        size_t n_bytes, struct error *err);
    enum status (*copy)(struct backend *b, struct buffer *dst, size_t dst_offset,
                        const struct buffer *src, size_t src_offset, size_t n_bytes,
                        struct error *err);

    /* Upload a weight matrix [n_out, n_in] held in file memory (src_dtype, any alignment) as
     * out->dtype, which the caller sets with n_out and n_in before; fills out->weight. */
    enum status (*linear_open)(struct backend *b, struct linear *out, const void *src,
                               enum dtype src_dtype, struct error *err);
    void (*linear_close)(struct backend *b, struct linear *l);

    /* A step begins here; ops until submit refer to it. True: a step of this form was recorded
     * before and will be replayed, and no op is to be called. */
    bool (*begin)(struct backend *b, const struct step *step);
    /* All ops were called: the device may begin. Up to `depth` steps may be submitted before
     * the first is waited for; their work runs in order. */
    enum status (*submit)(struct backend *b, struct error *err);
    /* Wait for the oldest submitted step; DEVICE when one of its ops failed. results (may be
     * NULL): its draws, then its scores, in host memory valid until `depth` more submits. */
    enum status (*wait)(struct backend *b, const struct sampled **results, struct error *err);
    int depth; /* 1: ops compute when called; 2: the next step can be queued behind a running one */
    /* Host view of the first n_bytes of a buffer after wait, valid until the next begin. NULL
     * where the device failed to copy. */
    const void *(*map)(struct backend *b, const struct buffer *buffer, size_t n_bytes);

    /* out[R, D] = scale * table[token] (+ sinusoidal position when asked). next: the norm that the
     * first layer begins with, which a backend may prepare for; or NULL. */
    void (*embed)(struct backend *b, struct buffer *out, const struct linear *table, float scale,
                  bool sinusoidal, const struct norm *next);
    /* out[n, dim] = norm(in) row by row; in place allowed. */
    void (*norm)(struct backend *b, struct buffer *out, const struct buffer *in,
                 const struct norm *w, int dim, enum row_set rows);
    /* RMSNorm of each of n_heads groups of d values, in place (q_norm, k_norm). */
    void (*head_norm)(struct backend *b, struct buffer *x, const struct norm *w, int n_heads,
                      int head_dim);
    /* out[n, n_out] = in[n, n_in] W^T + bias. out and in differ. */
    void (*linear)(struct backend *b, struct buffer *out, const struct buffer *in,
                   const struct linear *w, enum row_set rows);
    /* x[R, dim] += y */
    void (*add)(struct backend *b, struct buffer *x, const struct buffer *y, int dim);
    /* out[R, F] = act(gate) * up, or act(up) when gate is NULL; out may be gate or up. */
    void (*activate)(struct backend *b, struct buffer *out, const struct buffer *gate,
                     const struct buffer *up, enum activation act, int dim);
    /* out[n_logit_rows, dim] = in[logit_rows] */
    void (*gather)(struct backend *b, struct buffer *out, const struct buffer *in, int dim);
    /* x = cap * tanh(x / cap) over the n_logit_rows rows of dim values. */
    void (*softcap)(struct backend *b, struct buffer *x, float cap, int dim);

    /* u_t = sum_i w_i * h_{t-i} (+ bias), P(eq 15). weight [D, K] f32, bias [D] or NULL.
     * state row [K-1, D]: the last K-1 rows of h, oldest first; zero before position 0. */
    void (*conv)(struct backend *b, struct buffer *out, const struct buffer *in,
                 const struct buffer *weight, const struct buffer *bias, const struct slab *state,
                 int dim, int n_taps);
    /* RG-LRU (Griffin). gates: pre-activations r, i [R, D] (the block-diagonal products with
     * bias); lambda [D]; in h [R, D]; out z [R, D]; state row [D]. Position 0: z = i * h. */
    void (*rglru)(struct backend *b, struct buffer *out, const struct buffer *in,
                  const struct buffer *recurrence, const struct buffer *input,
                  const struct buffer *lambda, const struct slab *state, int dim);
    /* out[R, D] = block-diagonal product: weight [n_blocks, D/n_blocks, D/n_blocks] f32 as
     * [block, out, in], bias [D] or NULL. */
    void (*block_linear)(struct backend *b, struct buffer *out, const struct buffer *in,
                         const struct buffer *weight, const struct buffer *bias, int dim,
                         int n_blocks);
    /* Rotate pairs (i, i + d/2) of each head by position * frequency, in place;
     * frequencies [d/2] f64 (host side scaling already applied), reduced mod 2 pi in double. */
    void (*rope)(struct backend *b, struct buffer *x, const struct buffer *frequencies, int n_heads,
                 int head_dim);
    /* VAPOR, P(eq 20): rotate each head's pairs by sign * position * theta[head, i];
     * theta [H, d/2] f32. out may be x. With n_x_heads < n_heads (grouped kv), x has n_x_heads
     * heads and out gets n_heads, head a from x's head a / (n_heads / n_x_heads). */
    void (*vapor)(struct backend *b, struct buffer *out, const struct buffer *x,
                  const struct buffer *theta, int n_heads, int n_x_heads, int head_dim, int sign);
    /* Causal Latte, P(eq 8-12, 19). theta [R, H*M], g [R, H*M or H*(M+1)], v [R, KV*d].
     * State rows m [H*M], alpha [H*M], s [H*M, d] f32; a sequence whose first row has position
     * 0 starts from m = -inf, alpha = 0, s = 0 whatever the slot holds.
     * out [R, H*d] = sum_l p(l|t) s_l / alpha_l; p0 [R, H] = p(0|t), untouched without window. */
    void (*latent)(struct backend *b, struct buffer *out, struct buffer *p0,
                   const struct buffer *theta, const struct buffer *g, const struct buffer *v,
                   const struct slab *m, const struct slab *alpha, const struct slab *s,
                   const struct latent_shape *shape);
    /* Sliding-window attention over the ring and this step's rows, P(eq 13-14).
     * q [R, H*d], k, v [R, KV*d] after rope. Ring rows [KV, w, d], row = position mod w; rows
     * of positions before 0 take no part. p0 [R, H] given: out += p0 * local, else out = local.
     * vapor_theta (or NULL): v_s is rotated by (t - s) * theta when read [H, d/2]. */
    void (*window)(struct backend *b, struct buffer *out, const struct buffer *p0,
                   const struct buffer *q, const struct buffer *k, const struct buffer *v,
                   const struct slab *ring_k, const struct slab *ring_v,
                   const struct buffer *vapor_theta, const struct window_shape *shape);

    /* ---- what a backend may have; NULL where it has not ---- */

    /* A whole layer, or the head, in a few fused passes. False: not for this configuration; the
     * model composes it from the ops above, which is also what tests compare it with. w is the
     * element `layer` of an array of all config->n_layers and one more, which has only the norm
     * before the head, as its norm1: a layer may end with what comes next begins with. Layers are
     * called in order. */
    bool (*layer)(struct backend *b, struct buffer *x, const struct layer_weights *w,
                  const struct layer_state *state, const struct model_config *config, int layer);
    /* logits[n_logit_rows, V] = softcap(lm_head(norm(x[logit_rows]))); norm->weight may be NULL. */
    bool (*head)(struct backend *b, struct buffer *logits, const struct buffer *x,
                 const struct norm *norm, const struct linear *lm_head, float softcap);
    /* The next n linear_opens are read together: their matrices, n_bytes and n_rows in all, are
     * wanted one behind the other. */
    enum status (*linear_group)(struct backend *b, int n, size_t n_bytes, size_t n_rows,
                                struct error *err);

    /* Sampling on the device, as sampler.h defines it; memory for it is taken at opening. admit:
     * a new request in a slot, its counts forgotten; params and their logit_bias are copied.
     * Takes effect for steps begun later. draw: the step's draws and scores from
     * logits [n_logit_rows, V]; a drawn token is kept for TOKEN_DRAWN. Where the slot's
     * penalties count tokens, rows that bring a token from the host count as prompt first. */
    enum status (*admit)(struct backend *b, int slot, const struct sampling_params *params,
                         struct error *err);
    void (*draw)(struct backend *b, const struct buffer *logits);
    /* After admit: tokens [n] that count as prompt too, which no step brings. */
    enum status (*note)(struct backend *b, int slot, const int32_t *tokens, size_t n,
                        struct error *err);

    /* Whole slots to the host and back, beside the steps. slots_open, once: a slot is a row of each
     * of these slabs [n_slabs]; in a block of host memory they lie in this order, each from the
     * next multiple of SLOT_ROW_ALIGNMENT on. *most: so many fetches may be begun and not yet
     * over. fetch: begin to copy a slot as the steps submitted so far leave it; no later step may
     * have it, and nothing be put there, until that is over. fetched: the oldest fetch, if it is
     * over or after waiting for it; its block stays as it is until `most` more are begun. NULL: it
     * is not over. stage: a block to be filled, waiting until one is free; put: what was staged
     * last is the slot's state for all steps submitted later. */
    enum status (*slots_open)(struct backend *b, const struct slab *const *slabs, int n_slabs,
                              int *most, struct error *err);
    enum status (*fetch)(struct backend *b, int slot, struct error *err);
    enum status (*fetched)(struct backend *b, bool wait, const void **block, struct error *err);
    enum status (*stage)(struct backend *b, void **block, struct error *err);
    enum status (*put)(struct backend *b, int slot, struct error *err);

    bool is_device; /* buffers are memory of its own, and not the host's */
    void (*memory)(struct backend *b, struct backend_memory *out);
    /* The rows of a step are rounded up, to few numbers; the first step of each costs more. The
     * next such number after n, 0 after the last. */
    int (*next_rows)(const struct backend *b, int n);
    /* How the layers of the step last begun are computed, the last one where they differ; a word for
     * people: which kernels there are depends on the model's shape, the device and the number of
     * rows. NULL: by single ops. */
    const char *(*layers)(const struct backend *b);
};

struct backend {
    const struct backend_ops *ops;
};

struct backend_options {
    int n_threads; /* threads of the CPU pool, at least 1; the caller's is one of them */
    int max_rows;  /* most rows of a step: scratch is sized by it */
    int max_seqs;
    int max_dim; /* widest row an op will see (max of D, H*d, F, H*(M+1), L), V excluded */

    /* Of device backends. */
    int device;                        /* its index, 0 first */
    const struct model_config *config; /* borrowed while opening */
    int n_slots, max_logit_rows;
    bool deterministic; /* the same bits whatever else is in the batch, at any batch size */
    bool composed;      /* no fused layers and no recorded steps: for tests */
};

/* Our own mistakes in a step, asserted: sequences cover the rows in order, positions count
 * up by one, logit rows ascend, and nothing is larger than the options allow. */
void step_check(const struct step *step, const struct backend_options *options);

enum status backend_ref_open(struct backend **out, const struct backend_options *options,
                             struct error *err);
enum status backend_cpu_open(struct backend **out, const struct backend_options *options,
                             struct error *err);
/* UNSUPPORTED in a build without CUDA; DEVICE when there is no such device. */
enum status backend_cuda_open(struct backend **out, const struct backend_options *options,
                              struct error *err);
/* GPUs that this process may use; 0 in a build without CUDA or a machine without a driver. */
int backend_cuda_count(void);
/* Bytes in all and free on a GPU, its name, and what backend_cuda_open would take beside the
 * buffers and matrices opened later (options as for opening; without config no such figure). */
enum status backend_cuda_probe(const struct backend_options *options, struct backend_memory *out,
                               struct error *err);

#endif
