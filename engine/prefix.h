/* prefix.h - states after the beginnings of earlier prompts, found by their tokens: a client that
 * sends its whole conversation again pays for what is new in it.
 *
 * An entry is an image and the tokens it has seen, from the first. It is looked for by XXH3-128 of
 * the tokens, with a random secret, so that nobody can choose tokens that collide; before use the
 * tokens are compared. Entries belong to owners (API keys, -1 where the API is open), who do not
 * see each other's unless all are shared.
 *
 * A new image is reserved first, as its job may wait and run long: reserved ones take at most half
 * of the memory. The least recently used entries make room, for new ones and, as prefixes_give_way
 * of the image store, for the states of sessions.
 *
 * Threads: any; one lock around everything. It hashes and compares tokens under it, copies no
 *          state and waits for nothing.
 * Memory:  entries with their tokens and reserved images are bounded by limit_bytes, and entries
 *          by PREFIX_MAX_ENTRIES. All functions but open take NULL for an index that keeps nothing.
 * Errors:  NOMEM in prefixes_open. Afterwards what finds no memory is not kept.
 */
#ifndef LATTE_ENGINE_PREFIX_H
#define LATTE_ENGINE_PREFIX_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/base/error.h"
#include "engine/image.h"

struct prefixes;

enum { PREFIX_MAX_ENTRIES = 4096 };

struct prefix_options {
    size_t limit_bytes;
    bool shared;     /* among owners */
    int n_hash_bits; /* of the hash that count, 0 for all. Few make collisions: tests */
};

struct prefix_stats {
    int n_entries, n_reserved;
    size_t n_bytes; /* of entries, their tokens and reserved images */
};

/* images: borrowed; may be initialised later, before the first prefixes_reserve. */
enum status prefixes_open(struct prefixes **out, const struct prefix_options *options,
                          struct image_store *images, struct error *err);
void prefixes_close(struct prefixes *p);

/* The image after the most of ids[n], but not all, with a reference for the caller; n_seen says
 * after how many. NULL: there is none. */
struct image *prefixes_find(struct prefixes *p, int owner, const int32_t *ids, size_t n,
                            size_t *n_seen);
/* Whether there is one after exactly these, which counts as a use. */
bool prefixes_has(struct prefixes *p, int owner, const int32_t *ids, size_t n);

/* An image to be filled and then added, or cancelled. NULL: there is no room. */
struct image *prefixes_reserve(struct prefixes *p);
/* A reserved image is complete: the state after ids[n], which are copied. It is the index's. */
void prefixes_add(struct prefixes *p, int owner, const int32_t *ids, size_t n, struct image *image);
void prefixes_cancel(struct prefixes *p, struct image *image); /* accepts a NULL image */

/* Drop the least recently used entry whose state nobody else holds. False: there is none.
 * context: struct prefixes. */
bool prefixes_give_way(void *context);

void prefixes_stats(struct prefixes *p, struct prefix_stats *out);

#endif
