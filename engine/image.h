/* image.h - the state of a session outside the device: immutable once it is complete.
 *
 * An image is what a slot held after so many tokens: every state tensor in f32, in the model's
 * order, and the tokens the session has that the state has not seen yet. Since nobody writes a
 * complete image, a fork, a snapshot and a rollback are references to one.
 *
 *   position    tokens the state has seen; position + n_pending is the length of the session
 *   pending     the last drawn token, when no step has fed it: the first token of the next turn
 *   tail        how the last turn ended, for whoever renders the next one; carried, not read
 *
 * An image can be somewhere else than in memory: in a file of its own, or nowhere, as its origin
 * says: the image before it and the tokens that led from there to here (state_store.h fetches
 * both kinds back). So there are two kinds of references: who holds an image finds its values in
 * memory; who keeps it only wants it to exist.
 *
 * Bytes of an exported image, little-endian (image_write, image_parse):
 *
 *      0  8  magic "LATTEIMG"
 *      8  4  format version, 1
 *     12  4  tail
 *     16 16  fingerprint of the model, as bytes
 *     32  8  position
 *     40  8  n_values, of all tensors together
 *     48  4  n_pending, 0 or 1
 *     52  4  pending token, 0 if there is none
 *     56  4 n_values   the tensors, f32, in the order of model_state_tensor
 *    end  8  XXH3-64 of all bytes before
 *
 * Threads: loading and saving by the engine thread of the model; references by any; the
 *          values of a complete image may be read by any that holds it.
 * Memory:  the values of all images of a store together are bounded by its limit. Where there is
 *          a state store, values that nobody holds make room for new ones if they have a file,
 *          if few tokens give them again, or if only later images come from them.
 * Errors:  BUSY when the store is full; INVALID naming what of a file does not fit, with what
 *          was expected and found; DEVICE from the model.
 */
#ifndef LATTE_ENGINE_IMAGE_H
#define LATTE_ENGINE_IMAGE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/base/bytes.h"
#include "engine/base/error.h"

struct model;
struct image;

enum {
    IMAGE_HEAD_BYTES = 56,
    IMAGE_TAIL_BYTES = 8,
    IMAGE_MAX_PENDING = 1,
    IMAGE_NAME_BYTES = 16,
};

/* Where the fastest copy of a state is: in a slot of a device and in host memory, in host memory,
 * or in the store only. */
enum image_tier { IMAGE_ON_DEVICE, IMAGE_IN_MEMORY, IMAGE_IN_STORE };

struct image_list {
    struct image *first, *last;
    int n;
};

/* What all images of a model have in common, and the memory they may take. image_store_init,
 * then image_store_free once no image is left. */
struct image_store {
    char fingerprint[33];
    size_t n_values;      /* f32 values of one image */
    int32_t vocab_size;   /* pending tokens are 0..vocab_size-1 */
    int64_t max_position; /* of the model, 0: no limit */
    size_t limit_bytes;
    bool has_files;    /* a state store is there: values may be written and dropped */
    bool is_shared;    /* with other servers: what nobody here refers to, others may */
    size_t max_replay; /* values may be dropped that so few tokens give again, bit for bit */
    bool (*give_way)(void *context); /* asked while it is full, without the lock: release an image
                                      * that can be done without. False: there is none. Or NULL */
    void *give_way_context;
    bool (*is_on_device)(void *context, const struct image *image); /* see image_tier; or NULL */
    void *on_device_context;

    pthread_mutex_t lock;   /* guards all that follows, and what images say is under it */
    pthread_cond_t changed; /* values came or went; work for the state store */
    size_t used_bytes;      /* of values */
    void *spare;            /* memory of values that were dropped, for the next ones: a list */
    int n_images, n_in_memory;
    uint64_t next_id, n_passes;
    struct image_list clean;  /* not held, and to be had otherwise: dropped, the least used first */
    struct image_list dirty;  /* not held, without a file: to be written when memory is short */
    struct image_list wanted; /* to be written now */
    struct image_list dead;   /* not kept either: their files are to be removed, unless shared */
    struct image **by_name;   /* [n_buckets], a power of two, where it is shared: all images */
    size_t n_buckets;
    uint64_t n_evictions, n_reloads, n_replays, n_errors;
};

/* Where an image without a file comes from: tokens that were fed to another image's state, the
 * first n_chunked in chunks, then n_single one by one. */
struct image_origin {
    struct image *parent; /* kept; NULL: the state before any token */
    int32_t *tokens;      /* [n_chunked + n_single] */
    size_t n_chunked, n_single;
};

struct image {
    struct image_store *store;      /* borrowed; outlives its images */
    uint64_t id;                    /* of this content; never used again by this process */
    uint8_t name[IMAGE_NAME_BYTES]; /* random, for ever */
    uint64_t position;
    int n_pending;
    int32_t pending[IMAGE_MAX_PENDING];
    uint32_t tail;
    float *values;       /* [store->n_values]; NULL only for those who do not hold it */
    atomic_bool is_here; /* in memory, for those who only want to tell */
    int slot;            /* where a job left this state, and a device may hold it still */

    /* Under the store's lock. */
    int n_holds, n_keeps;
    int n_children; /* those of n_keeps that are images which come from it */
    int n_pins;     /* of those who keep it, that would not find it in the store */
    bool has_file, has_origin, wants_file;
    bool stays;                 /* the store would not take it: no session needs it */
    bool is_busy;               /* the state store reads or writes it */
    char *why;                  /* it cannot be had any more, for this reason; else NULL */
    struct image_origin origin; /* if has_origin */
    size_t n_replayed;          /* tokens from the nearest image with a file to this one */
    uint64_t mark;              /* the pass over all images that came by last */
    struct image_list *list;    /* of the store, where it waits, or NULL */
    struct image *previous, *next;
    struct image *chain; /* of by_name */
};

void image_store_init(struct image_store *store, const char *fingerprint, size_t n_values,
                      int32_t vocab_size, int64_t max_position, size_t limit_bytes);
void image_store_free(struct image_store *store);

struct image_counts {
    int n_images, n_in_memory;
    size_t used_bytes;
    uint64_t n_evictions, n_reloads, n_replays, n_errors;
};
void image_count(struct image_store *store, struct image_counts *out);

/* An image to be filled: from a slot, or by image_parse. Held once, by the caller. */
enum status image_new(struct image **out, struct image_store *store, struct error *err);
/* The same, waiting for others' values to be written and dropped, up to wait_ms, where that is
 * possible. */
enum status image_new_wait(struct image **out, struct image_store *store, int wait_ms,
                           struct error *err);
void image_hold(struct image *image);
void image_release(struct image *image); /* accepts NULL */
/* Hold an image that is kept, if its values are in memory. */
bool image_try_hold(struct image *image);
void image_keep(struct image *image);
void image_drop(struct image *image); /* accepts NULL */

/* Keep an image whose values are in memory, and them, too, where the store is shared: there what no
 * session needs goes from the store. */
void image_pin(struct image *image);
void image_unpin(struct image *image); /* accepts NULL */

/* Whether somebody else holds it too. */
bool image_is_shared(struct image *image);

/* Where a complete image is now. Takes no lock; may be old when it returns. A state that left host
 * memory is in the store, whatever slots hold: the next turn brings it back first. */
enum image_tier image_tier(const struct image *image);

/* Tokens of a session that has this image; NULL is the state before any token. */
uint64_t image_length(const struct image *image);
/* Bytes of one image in memory, and of an exported one. */
size_t image_bytes(const struct image_store *store);
size_t image_file_bytes(const struct image_store *store);

/* f32 values of a slot of the model. */
size_t image_values_of(const struct model *model);
/* Put the image into a slot, position included. Steps that are queued count as done. */
enum status image_load(struct model *model, int slot, const struct image *image, struct error *err);
/* Take it from there: begin gives its position, and finish, of the oldest save that was begun, its
 * values; the slot rests in between (model_begin_save). The caller says what is pending. *done
 * false: it is not there yet, and was not to be waited for. */
enum status image_begin_save(struct model *model, int slot, struct image *image, struct error *err);
enum status image_finish_save(struct model *model, struct image *image, bool wait, bool *done,
                              struct error *err);

/* The bytes around the values of a held image: its head, and the checksum of all. */
void image_frame(const struct image *image, unsigned char head[IMAGE_HEAD_BYTES],
                 unsigned char tail[IMAGE_TAIL_BYTES]);
void image_write(const struct image *image, struct bytes *out);
/* A new image from exported bytes [n]; nothing is kept of them. wait_ms: as image_new_wait. */
enum status image_parse(struct image **out, struct image_store *store, const char *data, size_t n,
                        int wait_ms, struct error *err);

/* ---- for the state store ---- */

/* An image that is known by name only, kept once by the caller. */
enum status image_new_named(struct image **out, struct image_store *store,
                            const uint8_t name[IMAGE_NAME_BYTES], struct error *err);
/* The image of this name, kept once more for the caller, or NULL. Where the store is shared. */
struct image *image_find(struct image_store *store, const uint8_t name[IMAGE_NAME_BYTES]);
/* Where it comes from; tokens are copied. Before others know the image. NOMEM. */
enum status image_set_origin(struct image *image, struct image *parent, const int32_t *tokens,
                             size_t n_chunked, size_t n_single, struct error *err);
/* Its file is there: its origin is not needed any more. */
void image_set_file(struct image *image);
/* The values of an image that the caller holds become another's, whose state is the same. */
void image_move_values(struct image *from, struct image *to);
/* Tokens from the nearest image with a file to this one: what computing it again would feed. */
size_t image_replay_length(struct image *image);
/* It wants a file soon, without giving its values up. */
void image_want_file(struct image *image);
/* With the lock held: find the list on which the image belongs now, after a change. It may be
 * gone afterwards. */
void image_settle(struct image *image);
void image_set_lost(struct image *image, const char *why);
void image_free(struct image *image); /* one of the dead, taken from their list */
/* The first image of a list, taken off; NULL when it is empty. With the lock held. */
struct image *image_list_take(struct image_list *list);
/* What the head of exported bytes says of the state, into an image that is known by name only.
 * False: it is not a head of this model's. */
bool image_read_head(struct image *image, const char head[IMAGE_HEAD_BYTES]);
/* Check exported bytes against what is known of the image. */
enum status image_check_file(const struct image *image, const char *data, size_t n,
                             struct error *err);

#endif
