/* session_change.c - see session_private.h: changes of sessions, into the journal and done. */
#include <stdlib.h>
#include <string.h>

#include "engine/session_private.h"

/* ---- making ---- */

enum status change_new(struct change **out, struct session *s, session_done *done, void *context,
                       struct error *err)
{
    struct change *c = calloc(1, sizeof(*c));
    if (!c)
        return fail(err, STATUS_NOMEM, "out of memory for the change of a session");
    enum status st = content_copy(&s->now, &c->next, err);
    if (st) {
        free(c);
        return st;
    }
    c->session = s;
    c->done = done;
    c->context = context;
    c->entry.user = c;
    memcpy(c->entry.key, s->key, sizeof(s->key));
    *out = c;
    return STATUS_OK;
}

void change_free(struct change *c)
{
    if (!c)
        return;
    content_free(&c->next);
    bytes_free(&c->entry.payload);
    bytes_free(&c->shared.names);
    free(c);
}

/* ---- handing in ---- */

static struct journal *journal_of(const struct sessions *t)
{
    return t->options.store ? state_store_journal(t->options.store) : NULL;
}

static void append(struct sessions *t, struct change *c)
{
    t->n_pending++;
    journal_append(journal_of(t), &c->entry);
}

/* When no change is on its way the table is what the journal says: then its place can be taken by
 * the table, written out, and those who waited for that come after it. */
static void append_whole(struct sessions *t)
{
    struct change *c =
        t->wants_whole && !t->n_pending && !t->is_shut ? calloc(1, sizeof(*c)) : NULL;
    if (!c)
        return;
    t->wants_whole = false;
    t->writes_whole = true;
    c->is_whole = c->entry.is_whole = true;
    c->entry.user = c;
    record_table(&c->entry.payload, t);
    append(t, c);
    struct change *held = t->held;
    t->held = NULL;
    t->held_end = &t->held;
    while (held) {
        struct change *next = held->next_held;
        held->next_held = NULL;
        append(t, held);
        held = next;
    }
}

/* Redis would make a session anew whose revision is not known, or delete any: that of a turn always
 * is. */
static enum status check_submit(const struct sessions *t, const struct change *c, struct error *err)
{
    const struct session *s = c->session;
    if (c->entry.payload.failed || c->shared.names.failed)
        return fail(err, STATUS_NOMEM, "out of memory for the change of a session");
    if (sessions_are_shared(t) && !s->is_new && (!c->is_delete || c->is_versioned) && !*s->revision)
        return fail_field(err, c->is_versioned ? STATUS_PRECONDITION : STATUS_CONFLICT,
                          "session_id",
                          "Another server changed the session meanwhile; nothing was done.");
    return STATUS_OK;
}

struct change *change_submit(struct sessions *t, struct change *c)
{
    struct session *s = c->session;
    s->in_turn = true;
    if (!t->options.store)
        return c;
    size_t n_origin = c->entry.payload.n;
    if (c->is_delete)
        record_delete(&c->entry.payload);
    else
        record_session(&c->entry.payload, s, &c->next);
    if (sessions_are_shared(t) && !c->is_delete)
        record_names(&c->shared.names, &c->next);
    if (check_submit(t, c, &c->entry.error)) {
        if (c->turn && *s->lease)
            redis_store_release(shared_store(t), s->lease);
        return c;
    }
    if (sessions_are_shared(t)) {
        t->n_pending++;
        shared_append(t, c, n_origin);
    } else if (t->wants_whole) {
        *t->held_end = c;
        t->held_end = &c->next_held;
    } else {
        append(t, c);
    }
    return NULL;
}

/* ---- done ---- */

/* With the lock held: the new content takes the old one's place, or nothing happens. */
static void apply(struct sessions *t, struct change *c, struct session_outcome *outcome)
{
    struct session *s = c->session;
    bool failed = outcome->error.status != STATUS_OK;
    shared_settle(t, c, failed);
    if (!failed && !c->is_delete) {
        struct content old = s->now;
        s->now = c->next;
        c->next = old;
        content_count(t, s, &s->now, 1);
        content_count(t, s, &old, -1);
        s->is_new = false;
    }
    s->in_turn = false;
    if (c->turn)
        session_end_turn(s, c->turn);
    session_describe(s, &outcome->info);
    outcome->snapshot = c->snapshot;
    outcome->info.metadata = strdup(s->metadata);
    if (failed ? s->is_new : c->is_delete)
        session_leave(t, s);
}

/* A state from which too much would have to be computed again is written soon. */
static void bound_replay(const struct change *c, struct image *image)
{
    if (!c->is_delete && image && image_replay_length(image) > STATE_STORE_MAX_REPLAY)
        image_want_file(image);
}

void change_finish(struct sessions *t, struct change *c)
{
    if (!c)
        return;
    struct session_outcome outcome = {.error = c->entry.error};
    pthread_mutex_lock(&t->lock);
    if (t->options.store && !outcome.error.status)
        bound_replay(c, c->next.image);
    apply(t, c, &outcome);
    pthread_mutex_unlock(&t->lock);
    if (c->done)
        c->done(c->context, &outcome);
    session_info_free(&outcome.info);
    change_free(c);
}

enum status change_hand_in(struct sessions *t, struct change *c, enum status st)
{
    struct change *at_once = NULL;
    if (st)
        change_free(c);
    else
        at_once = change_submit(t, c);
    pthread_mutex_unlock(&t->lock);
    change_finish(t, at_once);
    return st;
}

static void end_whole(struct sessions *t, struct change *c)
{
    enum { RETRY_S = 10 };
    if (c->entry.error.status)
        t->next_whole_s = session_now_s() + RETRY_S;
    t->writes_whole = false;
    change_free(c);
}

static void reap_shared(struct sessions *t, struct redis_store *store)
{
    for (struct redis_change *done; (done = redis_store_take_done(store));) {
        struct change *c = done->user;
        c->entry.error = done->error;
        pthread_mutex_lock(&t->lock);
        t->n_pending--;
        pthread_mutex_unlock(&t->lock);
        change_finish(t, c);
    }
}

void sessions_reap(struct sessions *t)
{
    struct journal *journal = journal_of(t);
    struct journal_entry *entry;
    if (sessions_are_shared(t))
        reap_shared(t, shared_store(t));
    if (!journal)
        return;
    while ((entry = journal_take_done(journal))) {
        struct change *c = entry->user;
        pthread_mutex_lock(&t->lock);
        t->n_pending--;
        bool is_whole = c->is_whole;
        if (is_whole)
            end_whole(t, c);
        pthread_mutex_unlock(&t->lock);
        if (!is_whole)
            change_finish(t, c);
    }
    pthread_mutex_lock(&t->lock);
    t->wants_whole |=
        !t->writes_whole && journal_is_long(journal) && session_now_s() >= t->next_whole_s;
    append_whole(t);
    pthread_mutex_unlock(&t->lock);
}

void sessions_shut(struct sessions *t)
{
    pthread_mutex_lock(&t->lock);
    t->is_shut = true;
    struct change *held = t->held;
    t->held = NULL;
    t->held_end = &t->held;
    pthread_mutex_unlock(&t->lock);
    sessions_reap(t);
    while (held) {
        struct change *next = held->next_held;
        fail(&held->entry.error, STATUS_SHUTDOWN, "The server is shutting down.");
        change_finish(t, held);
        held = next;
    }
}
