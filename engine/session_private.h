/* session_private.h - what the files of the session table share; for no one else.
 *
 *   session.c         the table, and what its users call
 *   session_change.c  changes: into the journal, and done
 *   session_item.c    items, which are sessions that no user sees
 *   session_record.c  sessions as the journal's bytes, and back
 *   session_shared.c  sessions that other servers have, too
 *
 * Everything that takes a struct session is called with the table's lock held.
 */
#ifndef LATTE_ENGINE_SESSION_PRIVATE_H
#define LATTE_ENGINE_SESSION_PRIVATE_H

#include <pthread.h>

#include "engine/base/pack.h"
#include "engine/redis_store.h"
#include "engine/session.h"
#include "engine/state_store.h"

enum {
    OWNER_NOBODY = -2,  /* the store knows it, none of today's keys is it */
    OWNER_UNKNOWN = -3, /* damaged: shown to whoever knows the id, to be refused */
};

struct kept {
    struct session_snapshot about;
    struct image *image; /* kept; NULL: before any token */
};

/* What a change replaces. */
struct content {
    uint64_t version;
    int64_t used;
    struct image *image;    /* kept; NULL: before any token */
    struct image *previous; /* kept; where the last turn began, if has_previous */
    bool has_previous;
    struct kept *kept; /* [n_kept], oldest first */
    int n_kept;
    char *data; /* [n_data], of an item; else NULL */
    size_t n_data;
    uint8_t after[JOURNAL_KEY_BYTES]; /* of an item: the session it follows; zeros: none */
    uint64_t after_version;
};

struct session {
    char id[SESSION_ID_BYTES];
    uint8_t key[JOURNAL_KEY_BYTES]; /* the id's digits */
    enum session_kind kind;
    int owner;
    uint8_t owner_tag[SESSION_OWNER_BYTES];
    int64_t created, idle_s;
    char *metadata;
    struct content now;
    bool in_turn;                  /* or in a change */
    bool is_new;                   /* not there before its change is done */
    bool is_dropped;               /* to be deleted when it is idle: an item */
    char *why;                     /* lost, for this reason; else NULL */
    struct session *chain;         /* of the hash table */
    struct session *older, *newer; /* by creation, or in a shared store by when it came here */

    /* In a shared store. */
    char revision[REDIS_HEX_BYTES]; /* of `now`; empty: it may be old, whatever Redis says */
    char lease[REDIS_HEX_BYTES];    /* of the turn that is under way here */
    bool is_leased;                 /* a turn was under way somewhere, when it was refreshed */
    uint64_t stamp;                 /* another one with each change of what is known */
    int64_t touched;                /* Unix seconds */
};

struct sessions {
    struct session_options options;
    pthread_mutex_t lock;     /* guards all that follows */
    struct session **buckets; /* [n_buckets], a power of two */
    size_t n_buckets;
    struct session *newest, *oldest;
    int n, n_items;              /* users' sessions, and the others */
    struct session_quota *quota; /* what owners have; counted from the end of recovery on */
    int n_pending;               /* changes in the journal's hands */
    bool wants_whole;            /* the journal is to be written as a whole, when none is pending */
    bool writes_whole;           /* that is under way */
    bool is_shut;                /* the journal takes nothing any more */
    int64_t next_whole_s;        /* not before, since it failed */
    struct change *held;         /* changes that wait for that, the first one first */
    struct change **held_end;
    uint64_t n_passes, n_stamps;
};

/* ---- session.c ---- */

void session_name(struct session *s);                                /* its id, from its key */
void session_tag_owner(const struct sessions *t, struct session *s); /* from its owner */
struct session *session_find(const struct sessions *t, const char *id);
struct session *session_find_key(const struct sessions *t, const uint8_t key[JOURNAL_KEY_BYTES]);
void session_enter(struct sessions *t, struct session *s);
void session_leave(struct sessions *t, struct session *s); /* frees it */
void session_free(struct session *s);
void session_end_turn(struct session *s, struct session_turn *turn);
struct image *session_hold_image(struct image *image); /* keep, or NULL */
void content_free(struct content *c);
/* Its states come to, or go from, what the owner has: change is 1 or -1. */
void content_count(struct sessions *t, const struct session *s, const struct content *c,
                   int change);
enum status content_copy(const struct content *c, struct content *out, struct error *err);
void session_describe(const struct session *s, struct session_info *out); /* metadata borrowed */
enum status session_describe_copy(const struct session *s, struct session_info *out,
                                  struct error *err);
/* The owner's session of this id, readable or not; and what there is to say without one. */
struct session *session_find_owned(const struct sessions *t, const char *id, int owner);
enum status session_not_found(const char *id, struct error *err);
int64_t session_now_s(void);
void session_set_image(struct image **place, struct image *image); /* kept in its place */

/* ---- session_change.c ---- */

struct change {
    struct journal_entry entry;
    struct session *session; /* in_turn until it is done */
    struct content next;     /* owned */
    bool is_delete, is_whole;
    bool is_versioned; /* asked for at a version: if another server's came first, PRECONDITION */
    struct redis_change shared; /* in place of the entry, whose payload has its bytes */
    struct state_store *store;  /* borrowed, of a shared one */
    struct session_snapshot snapshot;
    struct session_turn *turn; /* that ends with it, or NULL */
    session_done *done;        /* or NULL */
    void *context;
    struct change *next_held;
};

/* A change of the session, whose next content is a copy of what it has, to be altered. */
enum status change_new(struct change **out, struct session *s, session_done *done, void *context,
                       struct error *err);
void change_free(struct change *c);
/* Hand a change in that is ready, or was refused, as st says: whatever it is, the lock is given
 * back and the change is its journal's, done or gone. Returns st. */
enum status change_hand_in(struct sessions *t, struct change *c, enum status st);
/* Hand it in, with a new state's origin in its payload already. Without a store it is done now.
 * Called with the lock held; returns what is to be finished, without it, by change_finish. */
struct change *change_submit(struct sessions *t, struct change *c);
/* Without the lock: apply what change_submit returned. Accepts NULL. */
void change_finish(struct sessions *t, struct change *c);

/* ---- session_record.c ---- */

/* The origin of a state; and a session with this content; its end; that it is lost. */
void record_origin(struct bytes *out, const struct image *image);
void record_session(struct bytes *out, const struct session *s, const struct content *c);
void record_delete(struct bytes *out);
void record_lost(struct bytes *out, const struct session *s);
/* The states that a session with this content needs, and those that they would be computed from,
 * parents first: REDIS_HEX_BYTES - 1 digits each. */
void record_names(struct bytes *out, const struct content *c);
/* The whole table, as the list of an entry that takes the journal's place. */
void record_table(struct bytes *out, struct sessions *t);

/* Take records [n] about the session of this key into the table: as in the journal. */
enum status record_read(struct sessions *t, const uint8_t key[JOURNAL_KEY_BYTES],
                        const char *payload, size_t n, struct error *err);
/* A session whose state is nowhere is lost, and told so. */
enum status record_find_lost(struct session *s, struct error *err);

/* ---- session_shared.c ---- */

struct redis_store *shared_store(const struct sessions *t); /* NULL: there is none */
/* Without the lock. Refresh an owner's session, and get the lease of its next turn. */
enum status shared_begin(struct sessions *t, const char *id, int owner, char lease[REDIS_HEX_BYTES],
                         struct error *err);
enum status shared_list(struct sessions *t, int owner, const char *after, struct session_info *out,
                        int max, int *n, bool *has_more, struct error *err);
/* Copies that were not used for long go. */
void shared_sweep(struct sessions *t);
/* Hand in a change, whose records are in its payload: n_origin bytes of a new state's origin first.
 */
void shared_append(struct sessions *t, struct change *c, size_t n_origin);
/* It is done, or was refused: what is known of its session now. */
void shared_settle(struct sessions *t, const struct change *c, bool failed);

#endif
