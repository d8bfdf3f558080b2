/* journal.h - what happened to sessions, in order, in one append-only file.
 *
 * Whoever has something to tell appends an entry; a thread writes all that wait at once, makes
 * them durable with one fdatasync (group commit), and hands them back as done. An entry whose
 * write failed is done with its error and is not in the file, nor is half of it.
 *
 * The file begins with a head that names the format and the model. A frame holds one entry:
 *
 *      0  4  magic "LTJF"
 *      4  4  n, bytes of the payload
 *      8  8  sequence number, one more than the frame before
 *     16 16  key: whom the entry is about
 *     32  8  XXH3-64 of the payload
 *     40  8  XXH3-64 of the 40 bytes before
 *     48  n  payload
 *  48+n  16  key once more
 *  64+n   8  sequence number
 *  72+n   8  XXH3-64 of the 24 bytes before
 *
 * So a frame that was damaged is found to be, and says whom it was about, whichever of its bytes
 * are wrong; the frames after it are read all the same. A file that ends within a frame was cut
 * off while that was written: nobody was told that it is there, and it is dropped.
 *
 * Modes: TURN     done means on the disk (fdatasync)
 *        INTERVAL done means handed to the system, which writes it at the latest after interval_ms
 *        NONE     done means handed to the system
 * In all modes a killed process loses nothing that was done; a machine that loses its power
 * loses nothing in TURN.
 *
 * Threads: append, sequences and take_done by any; open, replay, start and close by one.
 * Memory:  an entry is its owner's and must live until it is done.
 * Errors:  INVALID for a file of another format or model, CONFLICT if another process has it
 *          open, IO with the system's reason.
 */
#ifndef LATTE_ENGINE_JOURNAL_H
#define LATTE_ENGINE_JOURNAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/base/bytes.h"
#include "engine/base/error.h"

struct journal;

enum journal_mode { JOURNAL_TURN, JOURNAL_INTERVAL, JOURNAL_NONE };
enum { JOURNAL_KEY_BYTES = 16, JOURNAL_MAX_PAYLOAD = 1 << 30 };

struct journal_options {
    const char *path;        /* of the file, made if it is not there */
    const char *fingerprint; /* of the model, 32 hex digits */
    enum journal_mode mode;
    int interval_ms;
    void (*notify)(void *context); /* entries are done; any thread; must not block */
    void *context;
};

struct journal_entry {
    uint8_t key[JOURNAL_KEY_BYTES];
    struct bytes payload; /* read until it is done */
    bool is_whole;        /* payload is a list (journal_list) that takes the place of the file */
    struct error error;   /* once done: status OK, or why it is not in the file */
    void *user;
    struct journal_entry *next; /* the journal's */
};

enum status journal_open(struct journal **out, const struct journal_options *options,
                         struct error *err);
/* Writes what waits and hands it back as done; nothing can be appended any more. */
void journal_stop(struct journal *j);
/* Stops, and closes the file. What is done and was not taken is forgotten. Accepts NULL. */
void journal_close(struct journal *j);

/* Give every entry of the file to fn, in order: payload NULL for one that is damaged. What was
 * being written at the end is cut off. fn's error ends it. */
struct journal_found {
    uint64_t n_frames, n_damaged;
    uint64_t n_bytes, n_cut_bytes;
};
typedef enum status journal_fn(void *context, const uint8_t key[JOURNAL_KEY_BYTES],
                               const char *payload, size_t n, struct error *err);
enum status journal_replay(struct journal *j, journal_fn *fn, void *context,
                           struct journal_found *found, struct error *err);
enum status journal_start(struct journal *j, struct error *err);

void journal_append(struct journal *j, struct journal_entry *entry);
/* The next entry that is done, in the order of appending; NULL when there is none. */
struct journal_entry *journal_take_done(struct journal *j);

/* Put one entry behind others in the list of an entry that is_whole. */
void journal_list(struct bytes *list, const uint8_t key[JOURNAL_KEY_BYTES], const char *payload,
                  size_t n);
/* The file has grown to a multiple of what it was when it was last written as a whole. */
bool journal_is_long(struct journal *j);

/* The number of the entry appended last, and whether that and all before it are durable. */
uint64_t journal_sequence(struct journal *j);
bool journal_is_durable(struct journal *j, uint64_t sequence);

struct journal_counts {
    uint64_t n_entries, n_writes, n_syncs, n_errors, n_bytes;
};
void journal_count(struct journal *j, struct journal_counts *out);

#endif
