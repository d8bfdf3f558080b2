/* outcomes.h - what became of requests that carried an Idempotency-Key: the first one claims the
 * key, and what it was answered is kept for those that repeat it.
 *
 * A key belongs to an owner (an API key's index) and a path. It stands for one body: the same key
 * with another one is a mistake of the client's. An outcome is claimed, then perhaps a stream
 * (reels.h has the events), and at the end stored, or forgotten as if it had never been claimed.
 * A stored one is a plain record (struct outcome_record), which a store may write down and give
 * back after a restart.
 *
 * Threads: the io thread only; outcomes_stats by any.
 * Memory:  bounded by limit_bytes, but for what is claimed. The oldest go first: their bodies, so
 *          that it is still known that they were carried out, and once half of the limit is
 *          taken by such records, the records. A body of over a quarter of it is not kept.
 * Errors:  NOMEM.
 */
#ifndef LATTE_SERVER_OUTCOMES_H
#define LATTE_SERVER_OUTCOMES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/base/error.h"

struct outcomes;
struct outcome;

enum { OUTCOME_MAX_KEY = 255, OUTCOME_ID_BYTES = 48 };

struct outcomes_options {
    size_t limit_bytes;
    int64_t keep_s; /* after it was stored */
    /* Told of one that has lost its body, and of any that goes (is_gone), but for those at the
     * end. Or NULL. */
    void (*changed)(void *context, const struct outcome *o, bool is_gone);
    void *context;
};

enum status outcomes_open(struct outcomes **out, const struct outcomes_options *options,
                          struct error *err);
void outcomes_close(struct outcomes *t); /* accepts NULL; what is claimed must be over */

/* Who asks for what. The hash is XXH3-128 of the body's bytes. */
struct outcome_key {
    int owner;
    const char *path, *key; /* of the route; 1..OUTCOME_MAX_KEY characters */
    uint64_t body_hash[2];
};
void outcome_hash(struct outcome_key *key, const char *body, size_t n);

enum outcome_state {
    OUTCOME_CLAIMED,   /* it runs, and its status is open */
    OUTCOME_STREAMING, /* it runs; its events are in the reel */
    OUTCOME_STORED,
};

/* Claim a key. *is_new: it was free, and the caller must bring *out to an end. Otherwise *out is
 * what there is. INVALID: the key stands for another body. */
enum status outcomes_claim(struct outcomes *t, const struct outcome_key *key, struct outcome **out,
                           bool *is_new, struct error *err);

void outcome_stream(struct outcome *o, const char *stream_id); /* claimed -> streaming */
void outcome_end_stream(struct outcome *o);                    /* streaming -> stored */
/* Claimed -> stored, with a copy of the body, or without when it cannot be kept. */
void outcome_store(struct outcome *o, int http_status, const char *body, size_t n);
void outcome_forget(struct outcome *o); /* whatever its state; it is gone */

enum outcome_state outcome_state(const struct outcome *o);

/* Everything about a stored one. Borrowed until the io thread's next call. */
struct outcome_record {
    struct outcome_key key;
    int64_t stored; /* Unix time, seconds */
    int http_status;
    const char *body; /* [n_body]; NULL: not kept, or a stream */
    size_t n_body;
    const char *stream_id; /* empty: no stream */
};
void outcome_record(const struct outcome *o, struct outcome_record *out);
/* Put back what outcome_record gave. What is overdue, or there already, is left out. */
enum status outcomes_restore(struct outcomes *t, const struct outcome_record *record,
                             struct error *err);

void outcomes_expire(struct outcomes *t); /* about once a second */

struct outcomes_stats {
    int n_outcomes;
    size_t used_bytes;
};
struct outcomes_stats outcomes_stats(const struct outcomes *t);

#endif
