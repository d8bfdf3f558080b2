/* session_item.c - see session.h, "items", and session_private.h */
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "engine/session_private.h"

static void key_of(enum session_kind kind, const char *name, uint8_t key[JOURNAL_KEY_BYTES])
{
    XXH128_canonical_t hash;
    XXH128_canonicalFromHash(&hash, XXH3_128bits_withSeed(name, strlen(name), (XXH64_hash_t)kind));
    _Static_assert(sizeof(hash.digest) == JOURNAL_KEY_BYTES, "a key is a hash of 128 bits");
    memcpy(key, hash.digest, JOURNAL_KEY_BYTES);
}

static struct session *find(const struct sessions *t, enum session_kind kind, const char *name)
{
    uint8_t key[JOURNAL_KEY_BYTES];
    key_of(kind, name, key);
    return session_find_key(t, key);
}

/* ---- putting ---- */

static struct session *new_item(const struct sessions *t, const struct session_item *item)
{
    struct session *s = calloc(1, sizeof(*s));
    char *metadata = strdup("{}");
    if (!s || !metadata) {
        free(s);
        free(metadata);
        return NULL;
    }
    *s = (struct session){.kind = item->kind,
                          .owner = item->owner,
                          .created = session_now_s(),
                          .idle_s = item->keep_s,
                          .metadata = metadata,
                          .is_new = true};
    key_of(item->kind, item->name, s->key);
    session_name(s);
    session_tag_owner(t, s);
    return s;
}

/* What the item will be, into a change that is new. */
static enum status fill(const struct sessions *t, struct change *c, const struct session_item *item,
                        struct error *err)
{
    char *data = malloc(item->n_data + 1);
    if (!data)
        return fail(err, STATUS_NOMEM, "out of memory for a stored item of %zu bytes",
                    item->n_data);
    if (item->n_data)
        memcpy(data, item->data, item->n_data);
    free(c->next.data);
    c->next.data = data;
    c->next.n_data = item->n_data;
    c->next.used = session_now_s();
    c->next.version++;
    memset(c->next.after, 0, sizeof(c->next.after));
    if (item->after_id)
        memcpy(c->next.after, session_find(t, item->after_id)->key, sizeof(c->next.after));
    c->next.after_version = item->after_version;
    session_set_image(&c->next.image, item->image);
    if (item->tokens)
        record_origin(&c->entry.payload, item->image);
    return STATUS_OK;
}

enum status session_put_item(struct sessions *t, const struct session_item *item,
                             session_done *done, void *context, struct error *err)
{
    CHECK(t->options.store && !sessions_are_shared(t) && item->kind != SESSION_OF_USER);
    struct change *c = NULL;
    enum status st = STATUS_OK;
    if (item->tokens)
        st = image_set_origin(item->image, item->parent, item->tokens, item->n_chunked,
                              item->n_single, err);
    pthread_mutex_lock(&t->lock);
    struct session *old = find(t, item->kind, item->name), *s = old;
    if (!st && old && old->in_turn)
        st = fail(err, STATUS_CONFLICT, "'%.64s' is being saved; try again when that has ended.",
                  item->name);
    if (!st && !old && !(s = new_item(t, item)))
        st = fail(err, STATUS_NOMEM, "out of memory for a stored item");
    if (!st)
        st = change_new(&c, s, done, context, err);
    if (!st)
        st = fill(t, c, item, err);
    if (!st && !old)
        session_enter(t, s);
    else if (st && !old && s)
        session_free(s);
    if (!st)
        s->is_dropped = false;
    return change_hand_in(t, c, st);
}

/* ---- dropping, and finding again ---- */

/* Without the lock afterwards. */
static void drop(struct sessions *t, struct session *s)
{
    struct change *c = NULL;
    struct error ignored;
    s->is_dropped = true; /* if not now, when overdue sessions end */
    enum status st = s->in_turn ? STATUS_CONFLICT : change_new(&c, s, NULL, NULL, &ignored);
    if (!st)
        c->is_delete = true;
    change_hand_in(t, c, st);
}

void session_drop_item(struct sessions *t, enum session_kind kind, const char *name)
{
    pthread_mutex_lock(&t->lock);
    struct session *s = find(t, kind, name);
    if (s && s->kind == kind)
        drop(t, s);
    else
        pthread_mutex_unlock(&t->lock);
}

static bool follows(const struct sessions *t, const struct content *c)
{
    static const uint8_t none[JOURNAL_KEY_BYTES];
    if (!memcmp(c->after, none, sizeof(none)))
        return true;
    const struct session *s = session_find_key(t, c->after);
    return s && s->now.version >= c->after_version;
}

void sessions_each_item(struct sessions *t, enum session_kind kind, session_item_fn *fn,
                        void *context)
{
    pthread_mutex_lock(&t->lock);
    for (struct session *s = t->oldest; s; s = s->newer) {
        const struct session_item item = {.kind = kind,
                                          .owner = s->owner,
                                          .keep_s = s->idle_s,
                                          .data = s->now.data,
                                          .n_data = s->now.n_data,
                                          .image = s->now.image};
        if (s->kind != kind)
            continue;
        if (s->why || !follows(t, &s->now) || !fn(context, &item, s->now.used))
            s->is_dropped = true; /* when overdue sessions end */
    }
    pthread_mutex_unlock(&t->lock);
}
