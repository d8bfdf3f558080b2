/* state_store.h - states on disk, or in Redis: written behind, read back, or computed again.
 *
 * Either a directory of this server's own, or a Redis that several servers share (redis_store.h):
 * there, what nobody here refers to is still others', and what is known here may be old.
 *
 * A directory with two things in it: the journal of what happened to sessions (journal.h), and
 * one file for each state that was written, states/NAME.state, in the format of image.h. A file
 * is made under another name, synced and renamed, so one that is there is whole.
 *
 * A thread writes states without a file: those that are wanted on disk, since too much would
 * have to be computed again otherwise, and those that have not been used for longest while
 * memory is short. It removes the files of states that nobody needs, as soon as the journal says
 * so durably.
 *
 * Threads: open and close by one; state_store_hold and _secure by any that may block.
 * Memory:  a few states' worth while it reads and writes.
 * Errors:  IO with the system's reason; a state that was lost is NOT_FOUND and says why, once
 *          and for all. A state that cannot be written is kept in memory, and tried again.
 */
#ifndef LATTE_ENGINE_STATE_STORE_H
#define LATTE_ENGINE_STATE_STORE_H

#include "engine/base/error.h"
#include "engine/image.h"
#include "engine/journal.h"

struct engine;
struct redis_store;
struct state_store;

struct state_store_options {
    const char *path;                /* the directory, made if it is not there; or Redis's URL */
    struct image_store *images;      /* borrowed; no image yet */
    struct journal_options *journal; /* its path is the store's */
    int timeout_ms, lease_ms;        /* of Redis */
};

enum status state_store_open(struct state_store **out, const struct state_store_options *options,
                             struct error *err);
/* One of them is there, the other one NULL. */
struct journal *state_store_journal(struct state_store *s);
struct redis_store *state_store_redis(struct state_store *s);
void state_store_count(struct state_store *s, struct journal_counts *out);
/* All images of the journal are known: remove the files that are no one's, note for each image
 * whether its file is there, and begin. */
enum status state_store_start(struct state_store *s, struct error *err);
/* Ends the threads: the journal's entries are done, and states are not written any more. */
void state_store_stop(struct state_store *s);
/* Stops and releases. Images may still be used. Accepts NULL. */
void state_store_close(struct state_store *s);

/* An image that was found in the journal, or in a session of Redis: known by name from now on, kept
 * once for the caller. has_file: its file is there and has the right length. */
enum status state_store_find(struct state_store *s, const uint8_t name[IMAGE_NAME_BYTES],
                             struct image **out, struct error *err);

/* Hold an image that the caller keeps, wherever it is: read its file, or compute it by the
 * engine. s NULL: there is no store, and it is in memory. */
enum status state_store_hold(struct state_store *s, struct engine *engine, struct image *image,
                             struct error *err);
/* Write the file of an image that the caller holds, unless it has one or an origin. In Redis it
 * stays for an hour, or as long as sessions need it. */
enum status state_store_secure(struct state_store *s, struct image *image, struct error *err);

/* Redis lacks the state: write it once more. The caller holds it. */
enum status state_store_restore(struct state_store *s, struct image *image, struct error *err);

/* Tokens that may have to be computed again for one state before it is written. */
enum { STATE_STORE_MAX_REPLAY = 512 };

#endif
