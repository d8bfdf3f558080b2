/* session_shared.c - see session_private.h: the table as a cache of sessions in Redis.
 *
 * What was fetched is taken into the table only if the table knows the session as it did when it
 * was asked for: else something newer may have come meanwhile, and it is fetched again. A session
 * that is in a turn or a change here is left alone; nobody else can change it then, or the change
 * will be refused.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/session_private.h"

enum {
    ATTEMPTS = 8,
    UNUSED_S = 600, /* a copy is forgotten after */
    MAX_LISTED = 256,
};

struct redis_store *shared_store(const struct sessions *t)
{
    return t->options.store ? state_store_redis(t->options.store) : NULL;
}

bool sessions_are_shared(const struct sessions *t)
{
    return shared_store(t) != NULL;
}

/* False: there is no such id. */
static bool key_of(const char *id, uint8_t key[JOURNAL_KEY_BYTES])
{
    static const char digits[] = "0123456789abcdef";
    if (strncmp(id, "sess_", 5) || strlen(id) != SESSION_ID_BYTES - 1 ||
        strspn(id + 5, digits) != 2 * JOURNAL_KEY_BYTES)
        return false;
    for (size_t i = 0; i < JOURNAL_KEY_BYTES; i++)
        key[i] = (uint8_t)((strchr(digits, id[5 + 2 * i]) - digits) << 4 |
                           (strchr(digits, id[6 + 2 * i]) - digits));
    return true;
}

static void owner_text(const struct sessions *t, int owner, char out[REDIS_HEX_BYTES])
{
    static const uint8_t open_tag[SESSION_OWNER_BYTES];
    bool is_known = owner >= 0 && owner < t->options.n_owners;
    redis_store_hex(out, is_known ? t->options.owners[owner] : open_tag);
}

/* ---- what the table knows ---- */

struct known {
    bool is_here, is_busy;
    uint64_t stamp;
    char revision[REDIS_HEX_BYTES];
};

/* With the lock held. */
static struct known look(const struct sessions *t, const uint8_t key[JOURNAL_KEY_BYTES])
{
    const struct session *s = session_find_key(t, key);
    struct known k = {.is_here = s};
    if (!s)
        return k;
    k.is_busy = s->in_turn || s->is_new;
    k.stamp = s->stamp;
    if (!s->why)
        memcpy(k.revision, s->revision, sizeof(k.revision));
    return k;
}

/* With the lock held. */
static void touch(struct sessions *t, struct session *s)
{
    s->stamp = ++t->n_stamps;
    s->touched = session_now_s();
}

/* With the lock held: a place for one copy more; of those at rest the one not used for longest
 * goes. */
static void make_place(struct sessions *t)
{
    struct session *last = NULL;
    if (t->n < t->options.max_sessions)
        return;
    for (struct session *s = t->oldest; s; s = s->newer)
        if (!s->in_turn && !s->is_new && (!last || s->touched < last->touched))
            last = s;
    if (last)
        session_leave(t, last);
}

void shared_sweep(struct sessions *t)
{
    int64_t before = session_now_s() - UNUSED_S;
    pthread_mutex_lock(&t->lock);
    for (struct session *s = t->oldest, *next; s; s = next) {
        next = s->newer;
        if (!s->in_turn && !s->is_new && s->touched < before)
            session_leave(t, s);
    }
    pthread_mutex_unlock(&t->lock);
}

/* ---- taking in ---- */

static bool is_unknown(struct image *image)
{
    pthread_mutex_lock(&image->store->lock);
    bool is_unknown = !image->has_file && !image->has_origin && !image->values;
    pthread_mutex_unlock(&image->store->lock);
    return is_unknown;
}

/* A state that Redis has, or says how to compute; kept for the caller. */
static enum status take_state(struct sessions *t, const uint8_t key[JOURNAL_KEY_BYTES],
                              const struct redis_state *state, struct image **out,
                              struct error *err)
{
    enum status st = state_store_find(t->options.store, state->name, out, err);
    if (st)
        return st;
    bool is_new = is_unknown(*out);
    if (state->head && (!is_new || image_read_head(*out, state->head)))
        image_set_file(*out);
    else if (state->origin && is_new)
        st = record_read(t, key, state->origin, state->n_origin, err);
    return st;
}

/* With the lock held: the session, its states first. */
static enum status take_records(struct sessions *t, const uint8_t key[JOURNAL_KEY_BYTES],
                                const struct redis_fetched *f, struct error *err)
{
    struct image **images = calloc(f->n_states + 1, sizeof(struct image *));
    if (!images)
        return fail(err, STATUS_NOMEM, "out of memory for the states of a session");
    enum status st = STATUS_OK;
    for (size_t i = 0; !st && i < f->n_states; i++) {
        struct redis_state state;
        redis_fetched_state(f, i, &state);
        st = take_state(t, key, &state, &images[i], err);
    }
    if (!st)
        st = record_read(t, key, f->record, f->n_record, err);
    for (size_t i = 0; i < f->n_states; i++)
        image_drop(images[i]);
    free(images);
    return st;
}

/* The owner has, or has not any more, what the table says. */
static void count(struct sessions *t, const struct session *s, int change)
{
    if (!s)
        return;
    session_quota_count_session(t->quota, s->owner, change);
    content_count(t, s, &s->now, change);
}

/* With the lock held. */
static enum status take_in(struct sessions *t, const uint8_t key[JOURNAL_KEY_BYTES],
                           const struct redis_fetched *f, struct error *err)
{
    struct session *s = session_find_key(t, key);
    if (!f->is_there) {
        if (s)
            session_leave(t, s);
        return STATUS_OK;
    }
    enum status st = STATUS_OK;
    if (!f->is_same) {
        bool is_new = !s;
        if (is_new)
            make_place(t);
        count(t, s, -1);
        st = take_records(t, key, f, err);
        s = session_find_key(t, key);
        count(t, s, 1);
        if (!st && s)
            st = record_find_lost(s, err);
        if (st && s && is_new) { /* half a session is nobody's */
            session_leave(t, s);
            return st;
        }
    }
    if (!s)
        return st;
    touch(t, s);
    s->is_leased = f->is_leased;
    snprintf(s->revision, sizeof(s->revision), "%s", st ? "" : f->revision);
    return st;
}

/* Once. *again: the table changed meanwhile. */
static enum status try_refresh(struct sessions *t, const uint8_t key[JOURNAL_KEY_BYTES],
                               const char *owner, const char *lease, bool *again, struct error *err)
{
    struct redis_fetched f = {0};
    pthread_mutex_lock(&t->lock);
    struct known before = look(t, key);
    pthread_mutex_unlock(&t->lock);
    *again = false;
    if (before.is_busy)
        return lease ? fail_field(err, STATUS_CONFLICT, "session_id",
                                  "The session is in a turn; try again when that has ended.")
                     : STATUS_OK;
    enum status st =
        redis_store_fetch(shared_store(t), key, before.revision, owner, lease, &f, err);
    if (st)
        return st;
    pthread_mutex_lock(&t->lock);
    struct known now = look(t, key);
    *again = now.is_busy || now.is_here != before.is_here || now.stamp != before.stamp;
    if (!*again)
        st = take_in(t, key, &f, err);
    pthread_mutex_unlock(&t->lock);
    redis_fetched_free(&f);
    return st;
}

static enum status refresh(struct sessions *t, const uint8_t key[JOURNAL_KEY_BYTES],
                           const char *owner, const char *lease, struct error *err)
{
    bool again = true;
    enum status st = STATUS_OK;
    for (int i = 0; again && !st && i < ATTEMPTS; i++)
        st = try_refresh(t, key, owner, lease, &again, err);
    if (!st && again)
        st = fail(err, STATUS_IO, "The session changes faster than it can be read; try again.");
    return st;
}

enum status session_refresh(struct sessions *t, const char *id, struct error *err)
{
    uint8_t key[JOURNAL_KEY_BYTES];
    if (!sessions_are_shared(t) || !key_of(id, key))
        return STATUS_OK;
    return refresh(t, key, "", NULL, err);
}

enum status shared_begin(struct sessions *t, const char *id, int owner, char lease[REDIS_HEX_BYTES],
                         struct error *err)
{
    uint8_t key[JOURNAL_KEY_BYTES];
    char tag[REDIS_HEX_BYTES];
    if (!key_of(id, key))
        return session_not_found(id, err);
    owner_text(t, owner, tag);
    redis_store_random(lease);
    enum status st = refresh(t, key, tag, lease, err);
    if (st) {
        redis_store_release(shared_store(t), lease);
        *lease = '\0';
    }
    return st;
}

/* ---- lists ---- */

/* One line of the list; none for what is gone, or cannot be read. */
static enum status list_one(struct sessions *t, const uint8_t key[JOURNAL_KEY_BYTES], int owner,
                            struct session_info *out, int *n, struct error *err)
{
    enum status st = refresh(t, key, "", NULL, err);
    if (st)
        return st;
    pthread_mutex_lock(&t->lock);
    const struct session *s = session_find_key(t, key);
    if (s && s->owner == owner && !s->is_new && !s->why) {
        st = session_describe_copy(s, &out[*n], err);
        *n += !st;
    }
    pthread_mutex_unlock(&t->lock);
    return st;
}

enum status shared_list(struct sessions *t, int owner, const char *after, struct session_info *out,
                        int max, int *n, bool *has_more, struct error *err)
{
    uint8_t keys[MAX_LISTED][JOURNAL_KEY_BYTES], after_key[JOURNAL_KEY_BYTES];
    char tag[REDIS_HEX_BYTES];
    int n_keys = 0;
    CHECK(max < MAX_LISTED);
    if (after && !key_of(after, after_key))
        return session_not_found(after, err);
    owner_text(t, owner, tag);
    enum status st = redis_store_list(shared_store(t), tag, after ? after_key : NULL, max + 1, keys,
                                      &n_keys, err);
    if (st == STATUS_NOT_FOUND)
        return session_not_found(after, err);
    *n = 0;
    *has_more = n_keys > max;
    for (int i = 0; !st && i < n_keys && i < max; i++)
        st = list_one(t, keys[i], owner, out, n, err);
    while (st && *n)
        session_info_free(&out[--*n]);
    return st;
}

/* ---- changes ---- */

/* Redis lacks a state that only this server has, a preset's say. By the committing thread: the
 * change is not touched by others meanwhile. */
static bool restore(struct redis_change *shared)
{
    struct change *c = shared->user;
    struct content *next = &c->next;
    for (int i = -2; i < next->n_kept; i++) {
        struct image *image = i == -2   ? next->image
                              : i == -1 ? next->previous
                                        : next->kept[i].image;
        struct error ignored;
        if (!image || !image_try_hold(image))
            continue;
        enum status st = state_store_restore(c->store, image, &ignored);
        image_release(image);
        if (st)
            return false;
    }
    shared->names.n = 0;
    record_names(&shared->names, next);
    *shared->origin_name = '\0';
    shared->n_origin = 0;
    return !shared->names.failed;
}

void shared_append(struct sessions *t, struct change *c, size_t n_origin)
{
    const struct session *s = c->session;
    struct redis_change *r = &c->shared;
    memcpy(r->key, s->key, sizeof(r->key));
    redis_store_random(r->revision);
    if (!s->is_new && (!c->is_delete || c->is_versioned))
        memcpy(r->expected, s->revision, sizeof(r->expected));
    if (c->turn)
        memcpy(r->lease, s->lease, sizeof(r->lease));
    redis_store_hex(r->owner, s->owner_tag);
    r->origin = c->entry.payload.data;
    r->n_origin = n_origin;
    r->record = c->entry.payload.data + n_origin;
    r->n_record = c->entry.payload.n - n_origin;
    if (n_origin)
        redis_store_hex(r->origin_name, c->next.image->name);
    r->expires = s->idle_s ? c->next.used + s->idle_s : 0;
    r->max_sessions = t->options.max_sessions;
    r->max_of_owner = s->owner >= 0 ? t->options.quota.max_sessions : 0;
    r->is_delete = c->is_delete;
    r->is_versioned = c->is_versioned;
    r->restore = restore;
    r->user = c;
    c->store = t->options.store;
    redis_store_append(shared_store(t), r);
}

void shared_settle(struct sessions *t, const struct change *c, bool failed)
{
    struct session *s = c->session;
    if (!sessions_are_shared(t))
        return;
    touch(t, s);
    s->is_leased = false;
    snprintf(s->revision, sizeof(s->revision), "%s", failed ? "" : c->shared.revision);
}
