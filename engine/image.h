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
 * Threads: image_load and image_save by the engine thread of the model; references counted
 *          atomically, by any; a complete image may be read by any.
 * Memory:  all images of a store together are bounded by its limit; the last release frees.
 * Errors:  BUSY when the store is full; INVALID naming what of a file does not fit, with what
 *          was expected and found; DEVICE from the model.
 */
#ifndef LATTE_ENGINE_IMAGE_H
#define LATTE_ENGINE_IMAGE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/base/bytes.h"
#include "engine/base/error.h"

struct model;

enum { IMAGE_HEAD_BYTES = 56, IMAGE_TAIL_BYTES = 8, IMAGE_MAX_PENDING = 1 };

/* What all images of a model have in common, and the memory they may take. Zero-initialised,
 * then image_store_init. */
struct image_store {
    char fingerprint[33];
    size_t n_values;      /* f32 values of one image */
    int32_t vocab_size;   /* pending tokens are 0..vocab_size-1 */
    int64_t max_position; /* of the model, 0: no limit */
    size_t limit_bytes;
    atomic_size_t used_bytes;
    atomic_int n_images;
    _Atomic uint64_t next_id;
};

struct image {
    struct image_store *store; /* borrowed; outlives its images */
    uint64_t id;               /* of this content; never used again by this process */
    atomic_int n_references;
    uint64_t position;
    int n_pending;
    int32_t pending[IMAGE_MAX_PENDING];
    uint32_t tail;
    float values[]; /* [store->n_values] */
};

void image_store_init(struct image_store *store, const char *fingerprint, size_t n_values,
                      int32_t vocab_size, int64_t max_position, size_t limit_bytes);

/* An image to be filled: by image_save, or by image_parse. One reference, the caller's. */
enum status image_new(struct image **out, struct image_store *store, struct error *err);
void image_hold(struct image *image);
void image_release(struct image *image); /* accepts NULL */

/* Tokens of a session that has this image; NULL is the state before any token. */
uint64_t image_length(const struct image *image);
/* Bytes of one image in memory, and of an exported one. */
size_t image_bytes(const struct image_store *store);
size_t image_file_bytes(const struct image_store *store);

/* f32 values of a slot of the model. */
size_t image_values_of(const struct model *model);
/* Put the image into a slot, position included; and take it from there. The caller says what
 * is pending. Steps that are queued count as done. */
enum status image_load(struct model *model, int slot, const struct image *image, struct error *err);
enum status image_save(struct model *model, int slot, struct image *image, struct error *err);

void image_write(const struct image *image, struct bytes *out);
/* A new image from exported bytes [n]; nothing is kept of them. */
enum status image_parse(struct image **out, struct image_store *store, const char *data, size_t n,
                        struct error *err);

#endif
