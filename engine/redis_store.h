/* redis_store.h - sessions and states in Redis, which several servers share.
 *
 * All keys begin with latte:{FINGERPRINT}: (one slot of a cluster, and another model's sessions
 * never meet these):
 *
 *   s:ID     hash of a session: rev (a name for its last change), past (the last ones), owner,
 *            record (session_record.c), names (the states that it needs: its own, and those from
 *            which they would be computed again), seq (its place in lists)
 *   l:ID     the lease of the turn that is under way; goes by itself when nobody renews it
 *   o:NAME   where a state comes from (ORIGIN of session_record.c)
 *   i:NAME   a state, in the format of image.h
 *   r:NAME   set of the sessions that need the state: with the last of them o, i and r go
 *   u:OWNER  sorted set of an owner's sessions; all: everybody's; e: those that expire; n: counter
 *   secret   the secret of owners' tags
 *
 * A change is one script: it checks that the session is still at the revision that the change was
 * made of and that nobody else has a turn of it, and then writes all or nothing. A change that
 * was sent and not answered is sent again: the script finds its own revision in `past` and
 * changes nothing. A turn begins by taking the lease and is applied only while it has it, so
 * that what a server says that was thought dead comes to nothing.
 *
 * Threads: any; what blocks says so. A thread of its own commits changes, all that wait at once;
 *          another renews leases and deletes sessions that are overdue.
 * Memory:  a change is its owner's until it is taken back.
 * Errors:  IO when Redis cannot be reached or refuses, naming it; else as said.
 */
#ifndef LATTE_ENGINE_REDIS_STORE_H
#define LATTE_ENGINE_REDIS_STORE_H

#include "engine/base/bytes.h"
#include "engine/base/error.h"
#include "engine/image.h"
#include "engine/journal.h"

struct redis_store;

enum {
    REDIS_HEX_BYTES = 33, /* 16 bytes as digits, with the terminator */
    REDIS_SECRET_BYTES = 192,
};

struct redis_store_options {
    const char *url;         /* redis.h */
    const char *fingerprint; /* of the model */
    int timeout_ms, lease_ms;
    void (*notify)(void *context); /* changes are done; any thread; must not block */
    void *context;
};

/* Blocks. INVALID where a state of file_bytes has no place in Redis. */
enum status redis_store_open(struct redis_store **out, const struct redis_store_options *options,
                             size_t file_bytes, struct error *err);
enum status redis_store_start(struct redis_store *s, struct error *err);
/* Commits what waits; nothing can be appended any more. */
void redis_store_stop(struct redis_store *s);
void redis_store_close(struct redis_store *s); /* accepts NULL */
const char *redis_store_address(const struct redis_store *s);
bool redis_store_is_up(struct redis_store *s);
/* What of Redis's configuration may lose what was told, as a sentence; empty: nothing. Blocks. */
void redis_store_warning(struct redis_store *s, bool durable, char *out, size_t n);
/* The secret that all servers have in common. Blocks. */
enum status redis_store_secret(struct redis_store *s, uint8_t secret[REDIS_SECRET_BYTES],
                               struct error *err);

/* 16 bytes as digits; and random ones. */
void redis_store_hex(char out[REDIS_HEX_BYTES], const uint8_t bytes[16]);
void redis_store_random(char out[REDIS_HEX_BYTES]);

/* ---- states; all block ---- */

/* The bytes of a held image, if a session needs it; or for now, so that one may. *out: written. */
enum status redis_store_write(struct redis_store *s, const struct image *image, bool for_now,
                              bool *out, struct error *err);
/* data [n], all of it. LOST when it is not there although a session needs it, CONFLICT when none
 * does any more. */
enum status redis_store_read(struct redis_store *s, const uint8_t name[IMAGE_NAME_BYTES],
                             char *data, size_t n, struct error *err);

/* ---- sessions ---- */

struct redis_change {
    uint8_t key[16];                /* of the session */
    char revision[REDIS_HEX_BYTES]; /* that it makes */
    char expected[REDIS_HEX_BYTES]; /* that it was made of; empty: the session is new, or any that a
                                     * delete finds */
    char lease[REDIS_HEX_BYTES];    /* of a turn; empty: none */
    char owner[REDIS_HEX_BYTES];
    const char *record, *origin; /* [n_record], [n_origin], borrowed; of the new state, or 0 */
    size_t n_record, n_origin;
    char origin_name[REDIS_HEX_BYTES];
    struct bytes names; /* of states that the session needs, REDIS_HEX_BYTES - 1 digits each */
    int64_t expires;    /* Unix seconds, 0: never */
    int max_sessions, max_of_owner; /* for a new one; 0: no limit */
    bool is_delete;
    bool is_versioned; /* another change that came first is a PRECONDITION, not a CONFLICT */
    /* Called once, by the committing thread, when Redis lacks a state: write it and fill `names`
     * anew; false: it cannot be had. */
    bool (*restore)(struct redis_change *change);
    void *user;
    /* Once done. CONFLICT: another change came first, another's turn is under way, or the turn's
     * lease is over; NOT_FOUND; BUSY at a limit. IO may leave open whether it was applied. */
    struct error error;
    struct redis_change *next; /* the store's */
    bool is_restored;
};
void redis_store_append(struct redis_store *s, struct redis_change *change);
struct redis_change *redis_store_take_done(struct redis_store *s);
/* A turn is over without a change: its lease goes, soon. */
void redis_store_release(struct redis_store *s, const char lease[REDIS_HEX_BYTES]);

/* A session as Redis has it. */
struct redis_fetched {
    bool is_there, is_same, is_leased; /* same: as known; nothing of it is here */
    char revision[REDIS_HEX_BYTES];
    const char *record; /* [n_record], until it is freed */
    size_t n_record;
    size_t n_states; /* that it needs, parents first */
    struct redisReply *reply;
};
/* One of them: the head of its bytes, or its origin; both NULL when it is lost. */
struct redis_state {
    uint8_t name[IMAGE_NAME_BYTES];
    const char *head, *origin; /* [IMAGE_HEAD_BYTES], [n_origin] */
    size_t n_origin;
};
/* Blocks. known: the revision that is here, or "". lease not NULL: for a turn of the owner, to
 * be renewed from now on until a change or a release ends it; CONFLICT while another has one;
 * is_there false also for a session of another owner. */
enum status redis_store_fetch(struct redis_store *s, const uint8_t key[16], const char *known,
                              const char *owner, const char *lease, struct redis_fetched *out,
                              struct error *err);
void redis_fetched_state(const struct redis_fetched *f, size_t i, struct redis_state *out);
void redis_fetched_free(struct redis_fetched *f);

/* Up to max of the owner's sessions, newest first, after one (NULL: from the first), which has to
 * be the owner's: else NOT_FOUND. Blocks. */
enum status redis_store_list(struct redis_store *s, const char *owner, const uint8_t *after,
                             int max, uint8_t (*keys)[16], int *n, struct error *err);

/* Sessions that this server found overdue and deleted since the last call. */
int redis_store_take_expired(struct redis_store *s);
void redis_store_count(struct redis_store *s, struct journal_counts *out);

#endif
