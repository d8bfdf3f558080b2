/* session_record.c - see session_private.h: sessions as the journal's bytes, and back.
 *
 * A payload is a row of records, each with its kind (u32) first, little-endian:
 *
 *   ORIGIN   name[16], parent[16] (zeros: none), position u64, n_pending u32, pending u32,
 *            tail u32, n_chunked u64, n_single u64, tokens u32[n_chunked + n_single]
 *   SESSION  owner[16], version u64, created u64, used u64, idle_s u64, image[16], has_previous
 *            u32, previous[16], n_kept u32, for each: position u64, created u64, image[16], text;
 *            metadata as text. An image of zeros is the state before any token.
 *   DELETE   nothing
 *   LOST     owner[16], why as text
 *   ITEM     kind u32, after[16] (zeros: none), after_version u64, n u64, data[n]: the SESSION
 *            before it is an item
 *
 * A text is its length (u32) and its bytes. The entry's key is the session's id.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/session_private.h"

enum kind { ORIGIN = 1, SESSION = 2, DELETE = 3, LOST = 4, ITEM = 5 };
enum { MAX_TEXT = 1 << 20 };

static const uint8_t no_name[IMAGE_NAME_BYTES];

/* ---- writing ---- */

static void put_name(struct bytes *out, const struct image *image)
{
    bytes_append(out, image ? image->name : no_name, IMAGE_NAME_BYTES);
}

static void put_text(struct bytes *out, const char *text)
{
    size_t n = strlen(text);
    pack_u32(out, (uint32_t)n);
    bytes_append(out, text, n);
}

/* With the images' lock held, or before others know the image. */
static void put_origin(struct bytes *out, const struct image *image)
{
    const struct image_origin *o = &image->origin;
    pack_u32(out, ORIGIN);
    bytes_append(out, image->name, IMAGE_NAME_BYTES);
    put_name(out, o->parent);
    pack_u64(out, image->position);
    pack_u32(out, (uint32_t)image->n_pending);
    pack_u32(out, image->n_pending ? (uint32_t)image->pending[0] : 0);
    pack_u32(out, image->tail);
    pack_u64(out, o->n_chunked);
    pack_u64(out, o->n_single);
    for (size_t i = 0; i < o->n_chunked + o->n_single; i++)
        pack_u32(out, (uint32_t)o->tokens[i]);
}

void record_origin(struct bytes *out, const struct image *image)
{
    CHECK(image->has_origin);
    put_origin(out, image);
}

void record_session(struct bytes *out, const struct session *s, const struct content *c)
{
    pack_u32(out, SESSION);
    bytes_append(out, s->owner_tag, sizeof(s->owner_tag));
    pack_u64(out, c->version);
    pack_u64(out, (uint64_t)s->created);
    pack_u64(out, (uint64_t)c->used);
    pack_u64(out, (uint64_t)s->idle_s);
    put_name(out, c->image);
    pack_u32(out, c->has_previous);
    put_name(out, c->previous);
    pack_u32(out, (uint32_t)c->n_kept);
    for (int i = 0; i < c->n_kept; i++) {
        pack_u64(out, c->kept[i].about.position);
        pack_u64(out, (uint64_t)c->kept[i].about.created);
        put_name(out, c->kept[i].image);
        put_text(out, c->kept[i].about.name);
    }
    put_text(out, s->metadata);
    if (s->kind == SESSION_OF_USER)
        return;
    pack_u32(out, ITEM);
    pack_u32(out, s->kind);
    bytes_append(out, c->after, sizeof(c->after));
    pack_u64(out, c->after_version);
    pack_u64(out, c->n_data);
    bytes_append(out, c->data, c->n_data);
}

void record_delete(struct bytes *out)
{
    pack_u32(out, DELETE);
}

void record_lost(struct bytes *out, const struct session *s)
{
    pack_u32(out, LOST);
    bytes_append(out, s->owner_tag, sizeof(s->owner_tag));
    put_text(out, s->why);
}

/* With the images' lock held: origins on the way back that this pass has not written. */
static int n_origins(const struct image *image, uint64_t pass)
{
    int n = 0;
    for (; image && image->has_origin && image->mark != pass; image = image->origin.parent)
        n++;
    return n;
}

/* The origins an image needs, its parents' first, each once in a pass. */
static void put_origins(struct bytes *out, struct image *image, uint64_t pass)
{
    if (!image)
        return;
    struct image_store *images = image->store;
    pthread_mutex_lock(&images->lock);
    int n = n_origins(image, pass);
    struct image **chain = calloc((size_t)n + 1, sizeof(struct image *));
    out->failed |= !chain;
    for (int i = 0; chain && i < n; i++, image = image->origin.parent) {
        image->mark = pass;
        chain[i] = image;
    }
    while (chain && n)
        put_origin(out, chain[--n]);
    pthread_mutex_unlock(&images->lock);
    free(chain);
}

static void put_whole_session(struct bytes *list, const struct session *s, uint64_t pass)
{
    struct bytes payload = {0};
    if (s->why) {
        record_lost(&payload, s);
    } else {
        put_origins(&payload, s->now.image, pass);
        put_origins(&payload, s->now.previous, pass);
        for (int i = 0; i < s->now.n_kept; i++)
            put_origins(&payload, s->now.kept[i].image, pass);
        record_session(&payload, s, &s->now);
    }
    list->failed |= payload.failed;
    if (!payload.failed)
        journal_list(list, s->key, payload.data, payload.n);
    bytes_free(&payload);
}

void record_table(struct bytes *out, struct sessions *t)
{
    uint64_t pass = ++t->n_passes; /* of this store's images, which are nobody else's */
    for (const struct session *s = t->oldest; s; s = s->newer)
        if (!s->is_new)
            put_whole_session(out, s, pass);
}

/* With the images' lock held: the image that this one would be computed from, or NULL. */
static struct image *parent_of(const struct image *image)
{
    return !image->has_file && image->has_origin ? image->origin.parent : NULL;
}

/* With the images' lock held. */
static void put_names(struct bytes *out, struct image *image, uint64_t pass)
{
    size_t n = 0;
    char digits[REDIS_HEX_BYTES];
    for (struct image *at = image; at && at->mark != pass; at = parent_of(at))
        n++;
    struct image **chain = calloc(n + 1, sizeof(struct image *));
    out->failed |= !chain;
    for (size_t i = 0; chain && i < n; i++, image = parent_of(image)) {
        image->mark = pass;
        chain[i] = image;
    }
    while (chain && n--) {
        redis_store_hex(digits, chain[n]->name);
        bytes_append(out, digits, sizeof(digits) - 1);
    }
    free(chain);
}

void record_names(struct bytes *out, const struct content *c)
{
    struct image *any = c->image ? c->image : c->previous;
    for (int i = 0; !any && i < c->n_kept; i++)
        any = c->kept[i].image;
    if (!any)
        return;
    struct image_store *images = any->store;
    pthread_mutex_lock(&images->lock);
    uint64_t pass = ++images->n_passes;
    put_names(out, c->image, pass);
    put_names(out, c->previous, pass);
    for (int i = 0; i < c->n_kept; i++)
        put_names(out, c->kept[i].image, pass);
    pthread_mutex_unlock(&images->lock);
}

/* ---- reading ---- */

/* A copy of the next text; NULL when there is none, or no memory. */
static char *take_text(struct unpack *u)
{
    size_t n = unpack_u32(u);
    const char *at = n <= MAX_TEXT ? unpack_skip(u, n) : NULL;
    char *text = at ? malloc(n + 1) : NULL;
    u->failed |= !text;
    if (text) {
        memcpy(text, at, n);
        text[n] = 0;
    }
    return text;
}

static enum status take_image(struct sessions *t, struct unpack *u, struct image **out,
                              struct error *err)
{
    uint8_t name[IMAGE_NAME_BYTES];
    unpack_raw(u, name, sizeof(name));
    *out = NULL;
    if (u->failed || !memcmp(name, no_name, sizeof(name)))
        return STATUS_OK;
    return state_store_find(t->options.store, name, out, err);
}

static enum status read_origin(struct sessions *t, struct unpack *u, struct error *err)
{
    struct image *image = NULL, *parent = NULL;
    enum status st = take_image(t, u, &image, err);
    if (!st)
        st = take_image(t, u, &parent, err);
    uint64_t position = unpack_u64(u);
    uint32_t n_pending = unpack_u32(u), pending = unpack_u32(u), tail = unpack_u32(u);
    uint64_t n_chunked = unpack_u64(u), n_single = unpack_u64(u), n = n_chunked + n_single;
    const char *at = n < JOURNAL_MAX_PAYLOAD / 4 ? unpack_skip(u, 4 * n) : NULL;
    u->failed |= !at || !image || n_pending > IMAGE_MAX_PENDING || n_chunked > n;
    int32_t *tokens = u->failed || st ? NULL : calloc(n + 1, sizeof(*tokens));
    if (tokens && !image->has_file && !image->has_origin) {
        struct unpack list = {.at = at, .end = at + 4 * n};
        for (uint64_t i = 0; i < n; i++)
            tokens[i] = (int32_t)unpack_u32(&list);
        image->position = position;
        image->n_pending = (int)n_pending;
        image->pending[0] = (int32_t)pending;
        image->tail = tail;
        st = image_set_origin(image, parent, tokens, n_chunked, n_single, err);
    }
    free(tokens);
    image_drop(image);
    image_drop(parent);
    return st;
}

static int owner_of(const struct sessions *t, const uint8_t tag[SESSION_OWNER_BYTES])
{
    static const uint8_t open_tag[SESSION_OWNER_BYTES];
    for (int i = 0; i < t->options.n_owners; i++)
        if (!memcmp(t->options.owners[i], tag, SESSION_OWNER_BYTES))
            return i;
    return memcmp(tag, open_tag, SESSION_OWNER_BYTES) ? OWNER_NOBODY : -1;
}

static enum status read_kept(struct sessions *t, struct unpack *u, struct content *c,
                             struct error *err)
{
    uint32_t n = unpack_u32(u);
    u->failed |= n > SESSION_MAX_SNAPSHOTS;
    c->kept = u->failed ? NULL : calloc(n + 1, sizeof(*c->kept));
    enum status st = STATUS_OK;
    while (c->kept && !st && !u->failed && c->n_kept < (int)n) {
        struct kept *k = &c->kept[c->n_kept++];
        k->about.position = unpack_u64(u);
        k->about.created = (int64_t)unpack_u64(u);
        st = take_image(t, u, &k->image, err);
        char *name = st ? NULL : take_text(u);
        if (name)
            snprintf(k->about.name, sizeof(k->about.name), "%s", name);
        free(name);
    }
    return st;
}

/* A session as this record says, for the one that is there already or a new one. */
static enum status read_session(struct sessions *t, struct session *s, struct unpack *u,
                                struct error *err)
{
    struct content c = {0};
    unpack_raw(u, s->owner_tag, sizeof(s->owner_tag));
    s->owner = owner_of(t, s->owner_tag);
    c.version = unpack_u64(u);
    s->created = (int64_t)unpack_u64(u);
    c.used = (int64_t)unpack_u64(u);
    s->idle_s = (int64_t)unpack_u64(u);
    enum status st = take_image(t, u, &c.image, err);
    c.has_previous = unpack_u32(u);
    if (!st)
        st = take_image(t, u, &c.previous, err);
    if (!st)
        st = read_kept(t, u, &c, err);
    char *metadata = st ? NULL : take_text(u);
    if (!metadata || u->failed) {
        free(metadata);
        content_free(&c);
        return st;
    }
    content_free(&s->now);
    free(s->metadata);
    free(s->why);
    s->why = NULL;
    s->now = c;
    s->metadata = metadata;
    return STATUS_OK;
}

static enum status read_item(struct sessions *t, struct session *s, struct unpack *u,
                             struct error *err)
{
    uint32_t kind = unpack_u32(u);
    unpack_raw(u, s->now.after, sizeof(s->now.after));
    s->now.after_version = unpack_u64(u);
    uint64_t n = unpack_u64(u);
    const char *at = n < JOURNAL_MAX_PAYLOAD ? unpack_skip(u, n) : NULL;
    u->failed |= !at || kind == SESSION_OF_USER || kind > SESSION_PRESET;
    char *data = u->failed ? NULL : malloc(n + 1);
    if (!data)
        return u->failed ? STATUS_OK : fail(err, STATUS_NOMEM, "out of memory for a stored item");
    memcpy(data, at, n);
    free(s->now.data);
    s->now.data = data;
    s->now.n_data = n;
    t->n -= s->kind == SESSION_OF_USER;
    t->n_items += s->kind == SESSION_OF_USER;
    s->kind = (enum session_kind)kind;
    return STATUS_OK;
}

static struct session *session_for(struct sessions *t, const uint8_t key[JOURNAL_KEY_BYTES])
{
    struct session *s = session_find_key(t, key);
    if (s)
        return s;
    s = calloc(1, sizeof(*s));
    char *metadata = strdup("{}");
    if (!s || !metadata) {
        free(s);
        free(metadata);
        return NULL;
    }
    s->owner = OWNER_UNKNOWN;
    s->metadata = metadata;
    memcpy(s->key, key, sizeof(s->key));
    session_name(s);
    session_enter(t, s);
    return s;
}

static enum status set_lost(struct session *s, const char *why, struct error *err)
{
    free(s->why);
    s->why = strdup(why);
    return s->why ? STATUS_OK : fail(err, STATUS_NOMEM, "out of memory for a session");
}

static enum status read_lost(struct sessions *t, struct session *s, struct unpack *u,
                             struct error *err)
{
    static const uint8_t open_tag[SESSION_OWNER_BYTES];
    unpack_raw(u, s->owner_tag, sizeof(s->owner_tag));
    bool is_known = memcmp(s->owner_tag, open_tag, sizeof(open_tag)) || !t->options.n_owners;
    s->owner = is_known ? owner_of(t, s->owner_tag) : OWNER_UNKNOWN;
    char *why = take_text(u);
    enum status st = why ? set_lost(s, why, err) : STATUS_OK;
    free(why);
    return st;
}

enum status record_read(struct sessions *t, const uint8_t key[JOURNAL_KEY_BYTES],
                        const char *payload, size_t n, struct error *err)
{
    struct session *s = session_for(t, key);
    enum status st = STATUS_OK;
    if (!s)
        return fail(err, STATUS_NOMEM, "out of memory for the sessions of a store");
    if (!payload)
        return set_lost(s, "an entry of the journal about it is damaged", err);
    struct unpack u = {.at = payload, .end = payload + n};
    while (!st && u.at < u.end && !u.failed) {
        enum kind kind = unpack_u32(&u);
        if (kind == ORIGIN)
            st = read_origin(t, &u, err);
        else if (kind == SESSION)
            st = read_session(t, s, &u, err);
        else if (kind == ITEM)
            st = read_item(t, s, &u, err);
        else if (kind == LOST)
            st = read_lost(t, s, &u, err);
        else if (kind == DELETE && u.at == u.end)
            session_leave(t, s);
        else
            u.failed = true;
    }
    return u.failed && !st ? set_lost(s, "an entry of the journal about it is not readable", err)
                           : st;
}

static enum status read_entry(void *context, const uint8_t key[JOURNAL_KEY_BYTES],
                              const char *payload, size_t n, struct error *err)
{
    return record_read(context, key, payload, n, err);
}

enum status record_find_lost(struct session *s, struct error *err)
{
    const struct image *at = s->now.image;
    if (!at || s->why)
        return STATUS_OK;
    pthread_mutex_t *lock = &at->store->lock;
    pthread_mutex_lock(lock);
    while (at && !at->has_file && !at->values && at->has_origin)
        at = at->origin.parent;
    bool is_lost = at && !at->has_file && !at->values;
    pthread_mutex_unlock(lock);
    return is_lost ? set_lost(s, "the file of its state is missing or of another length", err)
                   : STATUS_OK;
}

static enum status find_lost(struct sessions *t, struct session_found *found, struct error *err)
{
    for (struct session *s = t->oldest; s; s = s->newer) {
        if (record_find_lost(s, err))
            return err->status;
        found->n_lost += s->why && s->kind == SESSION_OF_USER;
        found->n_sessions += s->kind == SESSION_OF_USER;
    }
    return STATUS_OK;
}

/* Only now is it known whose each session is. */
static void count_owners(struct sessions *t)
{
    for (struct session *s = t->oldest; s; s = s->newer) {
        if (s->kind == SESSION_OF_USER)
            session_quota_count_session(t->quota, s->owner, 1);
        content_count(t, s, &s->now, 1);
    }
}

enum status sessions_recover(struct sessions *t, struct session_found *found, struct error *err)
{
    struct journal_found journal = {0};
    *found = (struct session_found){0};
    if (!t->options.store || sessions_are_shared(t))
        return STATUS_OK;
    pthread_mutex_lock(&t->lock);
    enum status st =
        journal_replay(state_store_journal(t->options.store), read_entry, t, &journal, err);
    if (!st)
        st = find_lost(t, found, err);
    if (!st)
        count_owners(t);
    pthread_mutex_unlock(&t->lock);
    found->n_entries = journal.n_frames;
    found->n_damaged = journal.n_damaged;
    found->n_cut_bytes = journal.n_cut_bytes;
    return st;
}
