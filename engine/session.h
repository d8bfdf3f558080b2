/* session.h - the sessions of a server: who they belong to, and which state each has reached.
 *
 * A session is a name for an image (image.h), and moves from one to the next by turns. A turn is
 * begun, which nobody else can meanwhile; it is committed with the image it leads to, or it is
 * abandoned and the session stays as it was. Every commit, rollback and import makes a new
 * version. Snapshots and forks are references to images and cost no copy. The state before the
 * last turn is kept as well, for a rollback without a name ("regenerate").
 *
 * Where there is a state store (state_store.h), a change is in its journal before it is done:
 * until then nobody sees it, and if it cannot be written it has not been. So what a client was
 * told is what the next start finds. A turn's entry holds the tokens that led to its state, a
 * few bytes each; the state itself is written later, if at all.
 *
 * Where that store is a Redis which several servers share, the table holds copies: what is known
 * of a session here may be old. session_refresh makes it new, and is called before everything that
 * is about a session. A change is made of what is known here, and refused (CONFLICT) when another
 * server's came between. A turn holds a lease, so that it is the only one on all servers. What
 * is not used here for a while is forgotten here only.
 *
 * Owners: a session is seen by the owner that made it (an API key's index, -1 where the API is
 * open); for everybody else it is not there. In the store an owner is a tag, so that sessions
 * find their key again when the file of keys has been changed.
 *
 * Threads: any; one lock around everything. Nothing in here waits or copies a state, but
 *          session_refresh, and where the store is shared session_begin and session_list: these ask
 *          Redis. Changes are done in the call, or later in sessions_reap, by the thread that calls
 *          that.
 * Memory:  bounded by max_sessions, SESSION_MAX_SNAPSHOTS each, and the image store's limit.
 * Errors:  NOT_FOUND; CONFLICT for a session that is in a turn; BUSY at the limits, naming them;
 *          PRECONDITION when the version is not the expected one; LOST for a session whose place
 *          in the store is damaged; IO when the store cannot be written; NOMEM.
 */
#ifndef LATTE_ENGINE_SESSION_H
#define LATTE_ENGINE_SESSION_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/base/error.h"
#include "engine/image.h"
#include "engine/session_quota.h"

struct sessions;
struct state_store;

enum {
    SESSION_ID_BYTES = 38, /* "sess_", 32 hex digits, the terminator */
    SESSION_MAX_SNAPSHOTS = 64,
    SESSION_NAME_BYTES = 65, /* of a snapshot's name, with the terminator */
    SESSION_ANY_VERSION = -1,
    SESSION_OWNER_BYTES = 16,
};

/* A copy of what there is to tell. Times are Unix seconds. */
struct session_info {
    char id[SESSION_ID_BYTES];
    uint64_t position; /* tokens of the session */
    uint64_t version;  /* 0 for a new one, one more with each change */
    int64_t created, used;
    int64_t expires; /* 0: never */
    bool in_turn;
    enum image_tier tier; /* of its state; IMAGE_IN_MEMORY if it has none yet */
    int n_snapshots;
    char *metadata; /* a JSON object, "{}" at least; the copy's own */
};
void session_info_free(struct session_info *info);

struct session_snapshot {
    char name[SESSION_NAME_BYTES];
    uint64_t position;
    int64_t created;
};

struct session_options {
    int max_sessions;
    int64_t idle_s; /* a session unused so long is forgotten; 0: never */
    struct state_store
        *store; /* borrowed; opened, not started. NULL: nothing outlives the process */
    const uint8_t (*owners)[SESSION_OWNER_BYTES]; /* [n_owners], their tags, by index */
    int n_owners;
    struct session_quota_options quota; /* of each owner */
};

/* What opening found in the store. */
struct session_found {
    int n_sessions, n_lost;
    uint64_t n_entries, n_damaged, n_cut_bytes;
};

enum status sessions_open(struct sessions **out, const struct session_options *options,
                          struct error *err);
/* Read the store's journal, if there is one: before anything else. */
enum status sessions_recover(struct sessions *t, struct session_found *found, struct error *err);
/* The store is stopped: what it has done is reaped, what it has not is refused, and nothing of
 * items is written any more. */
void sessions_shut(struct sessions *t);
/* The store is closed. Accepts NULL; no turn may be under way. */
void sessions_close(struct sessions *t);
/* Changes that the journal has taken, or not, are done. Soon after the journal notified. */
void sessions_reap(struct sessions *t);

/* Whether other servers have the same sessions. */
bool sessions_are_shared(const struct sessions *t);
/* What is known here of a session becomes what is known to all; one that is nowhere is not found
 * afterwards. IO when that cannot be known. Does nothing where none is shared. */
enum status session_refresh(struct sessions *t, const char *id, struct error *err);

/* How a change ended. What it points to is valid until the function returns. */
struct session_outcome {
    struct error error;               /* status OK, or nothing has changed */
    struct session_info info;         /* as it is now; of a deleted one only its id */
    struct session_snapshot snapshot; /* of session_keep */
};
/* Called exactly once for a change that was not refused at once. */
typedef void session_done(void *context, const struct session_outcome *outcome);

struct session_request {
    int owner;
    struct image *from;   /* the state it begins with, secured; kept by the session; NULL: none */
    const char *metadata; /* copied; a JSON object or NULL */
    int64_t idle_s;       /* 0: as the options say */
};
enum status session_create(struct sessions *t, const struct session_request *request,
                           session_done *done, void *context, struct error *err);
enum status session_show(struct sessions *t, const char *id, int owner, struct session_info *out,
                         struct error *err);
/* version, here and below: the one that the session must be at, or SESSION_ANY_VERSION; at another
 * nothing is done (PRECONDITION), also when another server's change comes between. A session that
 * is lost is deleted at any. */
enum status session_delete(struct sessions *t, const char *id, int owner, int64_t version,
                           session_done *done, void *context, struct error *err);

/* Up to max of the owner's sessions, newest first, those after the one named `after` (NULL: from
 * the first). has_more: there are others. */
enum status session_list(struct sessions *t, int owner, const char *after, struct session_info *out,
                         int max, int *n, bool *has_more, struct error *err);

/* A turn. from: a reference of the turn's, which keeps the image; NULL for a session without
 * tokens. */
struct session_turn {
    char id[SESSION_ID_BYTES];
    uint64_t version; /* of the session before it */
    struct image *from;
    bool active;
};
enum status session_begin(struct sessions *t, const char *id, int owner, int64_t version,
                          struct session_turn *out, struct error *err);
/* The session goes on from this image, which is `from` after these tokens: n_chunked in chunks,
 * then n_single one by one, all that were fed. The turn, and the change, are over when done is
 * called; if it failed the turn was abandoned. A refusal leaves the turn as it is. */
enum status session_commit(struct sessions *t, struct session_turn *turn, struct image *image,
                           const int32_t *tokens, size_t n_chunked, size_t n_single,
                           session_done *done, void *context, struct error *err);
/* The session stays as it was. Accepts a turn that is over. */
void session_abandon(struct sessions *t, struct session_turn *turn);

/* The session's image, kept for the caller; *out NULL for one without tokens. */
enum status session_image(struct sessions *t, const char *id, int owner, int64_t version,
                          struct image **out, struct session_info *info, struct error *err);
/* The image of one of its snapshots, or the session's own for a name of NULL; kept for the caller.
 */
enum status session_image_of(struct sessions *t, const char *id, int owner, const char *name,
                             struct image **out, struct error *err);
/* Put another image, secured, in its place, not as a turn: an import. */
enum status session_replace(struct sessions *t, const char *id, int owner, int64_t version,
                            struct image *image, session_done *done, void *context,
                            struct error *err);

enum status session_keep(struct sessions *t, const char *id, int owner, int64_t version,
                         const char *name, session_done *done, void *context, struct error *err);
/* name NULL: to where the last turn began. STATUS_CONFLICT: also where there is no such snapshot or
 * turn. */
enum status session_rollback(struct sessions *t, const char *id, int owner, int64_t version,
                             const char *name, session_done *done, void *context,
                             struct error *err);
enum status session_snapshots(struct sessions *t, const char *id, int owner,
                              struct session_snapshot out[SESSION_MAX_SNAPSHOTS], int *n,
                              struct error *err);

/* Forget what is overdue; returns how many. About once a second. In a shared store the store does
 * that; here copies that are not used go. */
int sessions_expire(struct sessions *t);

/* ---- items -----------------------------------------------------------------------------------
 *
 * What else a store keeps for the server: text or bytes, perhaps with a state. An item is durable
 * as a session is, by the same journal, and never seen by those who use sessions. Only where there
 * is a store that is not shared. */

enum session_kind { SESSION_OF_USER, SESSION_RESPONSE, SESSION_OUTCOME, SESSION_PRESET };

struct session_item {
    enum session_kind kind;
    const char *name; /* unique within its kind and owner; what opening finds again is in data */
    int owner;
    int64_t keep_s;   /* from now on; 0: for ever */
    const char *data; /* [n_data], copied */
    size_t n_data;
    struct image *image;   /* kept by the item; NULL: none. Secured, or what follows is given: */
    struct image *parent;  /* it is the state after the tokens that led here from parent */
    const int32_t *tokens; /* [n_chunked + n_single], or NULL */
    size_t n_chunked, n_single;
    const char *after_id; /* of a session in a turn: it is found again only if this session has got
                             to this version, or */
    uint64_t after_version; /* beyond; NULL: in any case */
};
/* Put it in the place of the one that has its name, if there is one. done NULL: nobody asks. The
 * outcome's info is without meaning. CONFLICT while that is being changed. */
enum status session_put_item(struct sessions *t, const struct session_item *item,
                             session_done *done, void *context, struct error *err);
/* Forget one, now or soon; harmless when there is none. */
void session_drop_item(struct sessions *t, enum session_kind kind, int owner, const char *name);

/* Every item of a kind, oldest first, as opening has found them: before turns begin. The item is
 * valid until fn returns; created: Unix seconds. False: the item is not wanted, and is forgotten.
 */
typedef bool session_item_fn(void *context, const struct session_item *item, int64_t created);
void sessions_each_item(struct sessions *t, enum session_kind kind, session_item_fn *fn,
                        void *context);

struct session_counts {
    int n_sessions;               /* known here; the states of those that are on neither are in */
    int n_on_device, n_in_memory; /* the store only */
    int n_pending;                /* changes that wait for the journal */
};
void sessions_count(struct sessions *t, struct session_counts *out);

#endif
