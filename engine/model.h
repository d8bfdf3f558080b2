/* model.h - a causal Latte language model: one forward step for rows of many sessions.
 *
 * A slot is a row of every state slab; it holds one session's whole state: position and the
 * tensors of LATTE's layers. A decode row and a chunk of a prompt are the same thing.
 *
 * Threads: open and close by one thread; everything else by the engine thread only.
 * Memory:  all device memory is taken in model_open; a step allocates nothing. The checkpoint
 *          may be closed after model_open.
 * Errors:  enum status; never exits, never logs. After DEVICE the model may only be closed.
 */
#ifndef LATTE_ENGINE_MODEL_H
#define LATTE_ENGINE_MODEL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/backend.h"
#include "engine/base/error.h"
#include "weights/checkpoint.h"

struct model;

struct model_options {
    int n_slots;             /* sessions whose state is resident, at least 1 */
    int max_rows;            /* most rows of one step */
    int max_logit_rows;      /* most rows whose logits one step returns; 0 means max_rows */
    enum dtype weight_dtype; /* DTYPE_F32, DTYPE_BF16 or (cuda) DTYPE_I8: how matrices are kept */
    enum dtype window_dtype; /* of the rings: DTYPE_F32, or (cuda) DTYPE_BF16, DTYPE_F8_E4M3 */
};

enum logits_wanted { LOGITS_NONE, LOGITS_LAST, LOGITS_ALL };

/* The rows one sequence brings to a step. */
struct model_seq {
    int slot;
    int n_rows; /* at least 1 */
    enum logits_wanted logits;
};

/* Build the model on a backend, which it then owns (also when opening fails). Only causal
 * language models: others are UNSUPPORTED. progress as in checkpoint_open, may be NULL. */
enum status model_open(struct model **out, const struct checkpoint *checkpoint,
                       struct backend *backend, const struct model_options *options,
                       progress_fn *progress, void *context, struct error *err);
void model_close(struct model *m); /* accepts NULL */

/* Scratch sizes a backend needs for this configuration; n_threads is left to the caller. */
void model_backend_options(const struct model_config *config, const struct model_options *options,
                           struct backend_options *out);

/* Advance the sequences' slots by their rows.
 *   tokens [sum of n_rows]  host, in sequence order, each in 0..V-1; at most max_rows
 *   seqs   [n_seqs]         1..n_slots of them, each slot at most once
 *   logits                  set to host memory [n_logit_rows, V] f32, rows in order of the
 *                           sequences (LOGITS_LAST gives one row, LOGITS_ALL n_rows), valid
 *                           until the next step
 * A slot must not pass model_max_position. All of this is asserted, max_logit_rows too. logits
 * is NULL when no sequence wants any. On failure the slots' states are lost. */
enum status model_step(struct model *m, const int32_t *tokens, const struct model_seq *seqs,
                       int n_seqs, const float **logits, struct error *err);

/* ---- steps whose tokens are drawn on the device, queued ahead of their results ---- */

/* How many steps may be queued before the oldest is collected; 0: this backend does not draw,
 * and model_step with a sampler of the host is the way. */
int model_depth(const struct model *m);

/* A new request in a slot: its sampling parameters (copied), counts forgotten. The slot's state
 * is not touched. */
enum status model_admit(struct model *m, int slot, const struct sampling_params *params,
                        struct error *err);

/* After it: tokens [n] that the slot's penalties count as prompt, and no step brings. */
enum status model_note(struct model *m, int slot, const int32_t *tokens, size_t n,
                       struct error *err);

/* As model_step, but returns when the step is queued. A sequence of one row may bring
 * TOKEN_DRAWN: the token the last draw of its slot gives, known or not. draws name logit rows
 * in the order of the step (backend.h). */
enum status model_queue(struct model *m, const int32_t *tokens, const struct model_seq *seqs,
                        int n_seqs, const struct step_draw *draws, int n_draws,
                        const struct step_score *scores, int n_scores, struct error *err);

/* Wait for the oldest queued step. results: its draws, then its scores, valid until model_depth
 * more steps are queued. On failure as model_step. */
enum status model_collect(struct model *m, const struct sampled **results, struct error *err);

/* Tokens the slot's state has seen; queued steps count. */
uint64_t model_position(const struct model *m, int slot);

/* Forget a slot: position 0, the state before any token. */
void model_reset(struct model *m, int slot);

/* Make dst's state a bit-equal copy of src's. */
enum status model_copy(struct model *m, int dst, int src, struct error *err);

/* Set the position of a slot: after its tensors were written, or of a warmed-up state for
 * measurements at positions nobody waits for. Below INT64_MAX (asserted). */
void model_set_position(struct model *m, int slot, uint64_t position);

/* The state of a slot as named tensors, for snapshots, tests and moves between machines; shapes
 * are listed in state.h. Reading shows what the slot's own tokens left and nothing of an earlier
 * session. To restore a state write every tensor, then set the position. */
struct state_tensor {
    char name[64]; /* "layers.3.latent_m" | latent_alpha | latent_s | ring_k | ring_v | conv | rglru
                    */
    int n_dims;
    int64_t shape[3];
    int64_t n_values; /* f32 */
};
int model_n_state_tensors(const struct model *m);
const struct state_tensor *model_state_tensor(const struct model *m, int i);
enum status model_state_read(struct model *m, int slot, int i, float *out, struct error *err);
enum status model_state_write(struct model *m, int slot, int i, const float *in, struct error *err);

/* The state of a slot as a whole, [n] f32: its tensors one behind the other. On a device beside
 * the steps: load as writing every tensor and the position, for the steps queued after it; saves
 * are begun and finished, as state.h says of state_begin_save and state_finish_save, at most
 * model_max_saves at once. */
enum status model_load(struct model *m, int slot, const float *values, uint64_t position,
                       struct error *err);
int model_max_saves(const struct model *m);
enum status model_begin_save(struct model *m, int slot, struct error *err);
enum status model_finish_save(struct model *m, bool wait, float *values, bool *done,
                              struct error *err);

/* Facts. */
const struct model_config *model_config(const struct model *m);
int64_t model_max_position(const struct model *m); /* 0: no limit (no full_attention layer) */
size_t model_state_bytes(const struct model *m);   /* of one slot */
size_t model_weight_bytes(const struct model *m);  /* as the backend keeps them */
const char *model_backend_name(const struct model *m);
/* backend.h next_rows: the next number of rows after n that steps are rounded up to; 0 after the
 * last, and where steps are not rounded. */
int model_next_rows(const struct model *m, int n);
/* backend.h layers: how the last step's layers are computed; "ops" where that is all there is. */
const char *model_layers(const struct model *m);
/* Whether slots are memory of a device, so that a state in one is a copy beside the host's. */
bool model_is_on_device(const struct model *m);
/* False where the backend keeps no account (ref, cpu). */
bool model_memory(const struct model *m, struct backend_memory *out);

/* Bytes a model would take with these options: matrices and small tensors, one slot's state, and
 * scratch of the forward pass. Nothing is opened. */
struct model_needs {
    size_t weight_bytes, slot_bytes, scratch_bytes;
};
void model_needs(const struct checkpoint *checkpoint, const struct model_options *options,
                 struct model_needs *out);

#endif
