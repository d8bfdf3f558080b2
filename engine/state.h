/* state.h - the slots of a model: what a session is between two steps.
 *
 * A layer's state is a few small tensors of fixed size; each lives in a slab [n_slots, row],
 * so that a step names slots and never copies states together. Which tensors a layer has, and
 * their shapes, follow from the configuration alone.
 *
 *   layers.N.latent_m, latent_alpha  [H, M]     running maximum and sum, P(eq 19)
 *   layers.N.latent_s                [H, M, d]  running weighted sum of values
 *   layers.N.ring_k, ring_v          [KV, w, d] k after rope, v as projected; row = position mod w
 *   layers.N.conv                    [K-1, D]   the last rows of h, oldest first
 *   layers.N.rglru                   [D]
 *
 * Threads: the model's.
 * Memory:  the slabs are the backend's, taken in state_open and released in state_close.
 * Errors:  NOMEM says how many bytes for what; DEVICE from the backend.
 */
#ifndef LATTE_ENGINE_STATE_H
#define LATTE_ENGINE_STATE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/backend.h"
#include "engine/base/error.h"
#include "engine/model.h"

enum state_kind {
    STATE_LATENT_M,
    STATE_LATENT_ALPHA,
    STATE_LATENT_S,
    STATE_RING_K,
    STATE_RING_V,
    STATE_CONV,
    STATE_RGLRU,
    STATE_KINDS,
};

/* One layer's slabs by kind; those the layer does not have are zero. */
struct layer_state {
    struct slab slabs[STATE_KINDS];
};

struct state_entry {
    struct state_tensor tensor; /* what the outside sees */
    enum state_kind kind;
    const struct slab *slab; /* borrowed from its layer */
};

enum { STATE_MAX_SAVES = 8 };

/* A slot whose state is on its way out. */
struct state_save {
    int slot;
    uint64_t position;
};

struct state {
    struct backend *backend; /* borrowed */
    int n_slots, n_layers;
    enum dtype window_dtype;
    uint64_t *positions;         /* [n_slots] tokens each slot has seen, owned */
    struct layer_state *layers;  /* [n_layers], owned */
    struct state_entry *entries; /* [n_entries] in order of layer and kind, owned */
    int n_entries;
    size_t n_values;                          /* f32 values of a slot, of all tensors */
    struct state_save saves[STATE_MAX_SAVES]; /* a ring */
    int oldest_save, n_saves, max_saves;
};

/* Take the slabs of n_slots sessions; all slots are reset. window_dtype is that of the rings. */
enum status state_open(struct state **out, const struct model_config *config,
                       struct backend *backend, int n_slots, enum dtype window_dtype,
                       struct error *err);
void state_close(struct state *s); /* accepts NULL and half-built objects */

/* Bytes of one slot; the same for a state that is not open. */
size_t state_bytes(const struct state *s);
size_t state_bytes_of(const struct model_config *config, enum dtype window_dtype);

/* The tensors of a slot, f32 on the host whatever the slab's dtype. Reading gives what the
 * session's own tokens left: rows of a ring or of conv that it has not reached read as zero, and at
 * position 0 so does everything, except latent_m which is -inf. Whatever an earlier session left
 * stays unseen. */
enum status state_read(const struct state *s, int slot, int entry, float *out, struct error *err);
enum status state_write(struct state *s, int slot, int entry, const float *in, struct error *err);

/* A whole slot: its tensors in order, [n_values] f32, as state_read and state_write each of them.
 *
 * On a device these copies run beside the steps. A load is done, for the steps submitted after it,
 * when it returns; it may wait for one before. A save is begun, of what the steps submitted so far
 * leave, and finished later: until then no step may have the slot, and nobody write to it. Saves
 * are finished in the order in which they were begun, max_saves may be under way at once
 * (asserted). finish: *done false, and nothing is written, where the oldest save is not over and
 * was not to be waited for. */
enum status state_load(struct state *s, int slot, const float *values, uint64_t position,
                       struct error *err);
enum status state_begin_save(struct state *s, int slot, struct error *err);
enum status state_finish_save(struct state *s, bool wait, float *values, bool *done,
                              struct error *err);

/* Make dst a bit-equal copy of src, position included. */
enum status state_copy(struct state *s, int dst, int src, struct error *err);

#endif
