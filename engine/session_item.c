/* session_item.c - see session.h, "items", and session_private.h */
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "engine/session_private.h"

/* Of the owner's tag and the name: files of keys may change their order. */
static void key_of(const struct sessions *t, enum session_kind kind, int owner, const char *name,
                   uint8_t key[JOURNAL_KEY_BYTES])
{
    static const uint8_t no_tag[SESSION_OWNER_BYTES];
    bool has_tag = owner >= 0 && owner < t->options.n_owners;
    uint64_t seed = XXH3_64bits_withSeed(has_tag ? t->options.owners[owner] : no_tag,
                                         sizeof(no_tag), (XXH64_hash_t)kind);
    XXH128_canonical_t hash;
    XXH128_canonicalFromHash(&hash, XXH3_128bits_withSeed(name, strlen(name), seed));
    _Static_assert(sizeof(hash.digest) == JOURNAL_KEY_BYTES, "a key is a hash of 128 bits");
    memcpy(key, hash.digest, JOURNAL_KEY_BYTES);
}

static struct session *find(const struct sessions *t, enum session_kind kind, int owner,
                            const char *name)
{
    uint8_t key[JOURNAL_KEY_BYTES];
    key_of(t, kind, owner, name, key);
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
    key_of(t, item->kind, item->owner, item->name, s->key);
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
    struct session *old = find(t, item->kind, item->owner, item->name), *s = old;
    if (!st && t->is_shut)
        st = fail(err, STATUS_SHUTDOWN, "the store is closed");
    if (!st && old && (old->in_turn || old->kind != item->kind))
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

/* With the lock held, and without it afterwards. */
static void drop_found(struct sessions *t, struct session *s, enum session_kind kind)
{
    if (s && s->kind == kind && !t->is_shut)
        drop(t, s);
    else
        pthread_mutex_unlock(&t->lock);
}

void session_drop_item(struct sessions *t, enum session_kind kind, int owner, const char *name)
{
    pthread_mutex_lock(&t->lock);
    drop_found(t, find(t, kind, owner, name), kind);
}

static bool follows(const struct sessions *t, const struct content *c)
{
    static const uint8_t none[JOURNAL_KEY_BYTES];
    if (!memcmp(c->after, none, sizeof(none)))
        return true;
    const struct session *s = session_find_key(t, c->after);
    return s && s->now.version >= c->after_version;
}

/* Show one to fn, which may call whatever it likes; false: it is to go. */
static bool visit(struct sessions *t, const uint8_t key[JOURNAL_KEY_BYTES], session_item_fn *fn,
                  void *context)
{
    pthread_mutex_lock(&t->lock);
    const struct session *s = session_find_key(t, key);
    bool is_good = s && !s->why && follows(t, &s->now);
    char *data = is_good ? malloc(s->now.n_data + 1) : NULL;
    if (!data) {
        pthread_mutex_unlock(&t->lock);
        return is_good; /* out of memory: it stays in the store */
    }
    struct session_item item = {.kind = s->kind,
                                .owner = s->owner,
                                .keep_s = s->idle_s,
                                .data = data,
                                .n_data = s->now.n_data,
                                .image = session_hold_image(s->now.image)};
    int64_t created = s->now.used;
    if (item.n_data)
        memcpy(data, s->now.data, item.n_data);
    pthread_mutex_unlock(&t->lock);
    bool is_wanted = fn(context, &item, created);
    image_drop(item.image);
    free(data);
    return is_wanted;
}

void sessions_each_item(struct sessions *t, enum session_kind kind, session_item_fn *fn,
                        void *context)
{
    size_t n = 0;
    pthread_mutex_lock(&t->lock);
    uint8_t(*keys)[JOURNAL_KEY_BYTES] = calloc((size_t)t->n_items + 1, sizeof(*keys));
    for (const struct session *s = keys ? t->oldest : NULL; s; s = s->newer)
        if (s->kind == kind)
            memcpy(keys[n++], s->key, sizeof(*keys));
    pthread_mutex_unlock(&t->lock);
    for (size_t i = 0; i < n; i++) {
        if (visit(t, keys[i], fn, context))
            continue;
        pthread_mutex_lock(&t->lock);
        drop_found(t, session_find_key(t, keys[i]), kind);
    }
    free(keys);
}
