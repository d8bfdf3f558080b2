/* session.c - see session.h and session_private.h */
#include "engine/session_private.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

/* ---- ids ---- */

static void make_id(struct session *s)
{
    while (getrandom(s->key, sizeof(s->key), 0) < (ssize_t)sizeof(s->key))
        ;
    session_name(s);
}

void session_name(struct session *s)
{
    int n = snprintf(s->id, sizeof(s->id), "sess_");
    for (size_t i = 0; i < sizeof(s->key); i++)
        n += snprintf(s->id + n, sizeof(s->id) - (size_t)n, "%02x", s->key[i]);
}

/* Ids are random: their digits are the hash. */
static struct session **bucket_of(const struct sessions *t, const char *id)
{
    uint64_t hash = 0;
    for (const char *c = id; *c && c < id + SESSION_ID_BYTES; c++)
        hash = hash * 31 + (unsigned char)*c;
    return &t->buckets[(hash ^ hash >> 29) & (t->n_buckets - 1)];
}

enum status session_not_found(const char *id, struct error *err)
{
    return fail_field(err, STATUS_NOT_FOUND, "session_id", "There is no session '%.64s'.", id);
}

struct session *session_find(const struct sessions *t, const char *id)
{
    struct session *s = *bucket_of(t, id);
    while (s && strcmp(s->id, id))
        s = s->chain;
    return s;
}

struct session *session_find_key(const struct sessions *t, const uint8_t key[JOURNAL_KEY_BYTES])
{
    struct session wanted;
    memcpy(wanted.key, key, sizeof(wanted.key));
    session_name(&wanted);
    return session_find(t, wanted.id);
}

struct session *session_find_owned(const struct sessions *t, const char *id, int owner)
{
    struct session *s = session_find(t, id);
    bool is_seen = s && !s->is_new && s->kind == SESSION_OF_USER &&
                   (s->owner == owner || s->owner == OWNER_UNKNOWN);
    return is_seen ? s : NULL;
}

static enum status find(const struct sessions *t, const char *id, int owner, struct session **out,
                        struct error *err)
{
    struct session *s = session_find_owned(t, id, owner);
    if (!s)
        return session_not_found(id, err);
    if (s->why)
        return fail_field(err, STATUS_LOST, "session_id",
                          "Session '%.64s' cannot be read from the store: %.300s", id, s->why);
    *out = s;
    return STATUS_OK;
}

static enum status in_a_turn(const struct session *s, struct error *err)
{
    return fail_field(err, STATUS_CONFLICT, "session_id",
                      "Session '%.64s' is in a turn; try again when that has ended.", s->id);
}

static enum status find_idle(const struct sessions *t, const char *id, int owner,
                             struct session **out, struct error *err)
{
    struct session *s = NULL;
    enum status st = find(t, id, owner, &s, err);
    if (!st && s->in_turn)
        st = in_a_turn(s, err);
    if (!st)
        *out = s;
    return st;
}

static enum status check_version(const struct session *s, int64_t version, struct error *err)
{
    if (version == SESSION_ANY_VERSION || (uint64_t)version == s->now.version)
        return STATUS_OK;
    return fail_field(err, STATUS_PRECONDITION, "session_id",
                      "Session '%s' is at version %llu; expected version %lld.", s->id,
                      (unsigned long long)s->now.version, (long long)version);
}

/* A change of the session as it is at this version, which has been checked. */
static enum status change_at(struct change **out, struct session *s, int64_t version,
                             session_done *done, void *context, struct error *err)
{
    enum status st = change_new(out, s, done, context, err);
    if (!st)
        (*out)->is_versioned = version != SESSION_ANY_VERSION;
    return st;
}

void session_tag_owner(const struct sessions *t, struct session *s)
{
    if (s->owner >= 0 && s->owner < t->options.n_owners)
        memcpy(s->owner_tag, t->options.owners[s->owner], sizeof(s->owner_tag));
}

/* ---- contents ---- */

struct image *session_hold_image(struct image *image)
{
    if (image)
        image_keep(image);
    return image;
}

void session_set_image(struct image **place, struct image *image)
{
    session_hold_image(image);
    image_drop(*place);
    *place = image;
}

void content_free(struct content *c)
{
    image_drop(c->image);
    image_drop(c->previous);
    for (int i = 0; i < c->n_kept; i++)
        image_drop(c->kept[i].image);
    free(c->kept);
    free(c->data);
    *c = (struct content){0};
}

/* With room for one snapshot more. */
enum status content_copy(const struct content *c, struct content *out, struct error *err)
{
    struct kept *kept = calloc((size_t)c->n_kept + 1, sizeof(*kept));
    char *data = malloc(c->n_data + 1);
    if (!kept || !data) {
        free(kept);
        free(data);
        return fail(err, STATUS_NOMEM, "out of memory for the change of a session");
    }
    *out = *c;
    out->kept = kept;
    out->data = data;
    if (c->n_data)
        memcpy(data, c->data, c->n_data);
    session_hold_image(c->image);
    session_hold_image(c->previous);
    for (int i = 0; i < c->n_kept; i++) {
        kept[i] = c->kept[i];
        session_hold_image(kept[i].image);
    }
    return STATUS_OK;
}

void content_count(struct sessions *t, const struct session *s, const struct content *c, int change)
{
    if (s->kind != SESSION_OF_USER)
        return;
    session_quota_count_state(t->quota, s->owner, c->image, change);
    session_quota_count_state(t->quota, s->owner, c->previous, change);
    for (int i = 0; i < c->n_kept; i++)
        session_quota_count_state(t->quota, s->owner, c->kept[i].image, change);
}

int64_t session_now_s(void)
{
    return (int64_t)time(NULL);
}

static bool is_overdue(const struct session *s, int64_t now)
{
    return s->idle_s && !s->in_turn && now >= s->now.used + s->idle_s;
}

static enum image_tier tier_of(const struct session *s)
{
    return s->now.image ? image_tier(s->now.image) : IMAGE_IN_MEMORY;
}

void session_describe(const struct session *s, struct session_info *out)
{
    *out = (struct session_info){
        .position = image_length(s->now.image),
        .version = s->now.version,
        .created = s->created,
        .used = s->now.used,
        .expires = s->idle_s ? s->now.used + s->idle_s : 0,
        .in_turn = s->in_turn || s->is_leased,
        .tier = tier_of(s),
        .n_snapshots = s->now.n_kept,
        .metadata = s->metadata,
    };
    memcpy(out->id, s->id, sizeof(out->id));
}

enum status session_describe_copy(const struct session *s, struct session_info *out,
                                  struct error *err)
{
    struct session_info info;
    session_describe(s, &info);
    info.metadata = strdup(s->metadata);
    if (!info.metadata)
        return fail(err, STATUS_NOMEM, "out of memory for a session");
    *out = info;
    return STATUS_OK;
}

void session_info_free(struct session_info *info)
{
    free(info->metadata);
    info->metadata = NULL;
}

/* ---- the table ---- */

enum status sessions_open(struct sessions **out, const struct session_options *options,
                          struct error *err)
{
    CHECK(options->max_sessions > 0);
    size_t n_buckets = 16;
    while (n_buckets < (size_t)options->max_sessions)
        n_buckets *= 2;
    struct sessions *t = calloc(1, sizeof(*t));
    struct session **buckets = calloc(n_buckets, sizeof(struct session *));
    if (!t || !buckets) {
        free(t);
        free(buckets);
        return fail(err, STATUS_NOMEM, "out of memory for %d sessions", options->max_sessions);
    }
    enum status st = session_quota_open(&t->quota, &options->quota, err);
    if (st) {
        free(t);
        free(buckets);
        return st;
    }
    t->options = *options;
    t->buckets = buckets;
    t->n_buckets = n_buckets;
    t->held_end = &t->held;
    pthread_mutex_init(&t->lock, NULL);
    *out = t;
    return STATUS_OK;
}

void session_free(struct session *s)
{
    content_free(&s->now);
    free(s->metadata);
    free(s->why);
    free(s);
}

void session_enter(struct sessions *t, struct session *s)
{
    struct session **bucket = bucket_of(t, s->id);
    s->chain = *bucket;
    *bucket = s;
    s->older = t->newest;
    *(t->newest ? &t->newest->newer : &t->oldest) = s;
    t->newest = s;
    t->n += s->kind == SESSION_OF_USER;
    t->n_items += s->kind != SESSION_OF_USER;
    if (s->kind == SESSION_OF_USER)
        session_quota_count_session(t->quota, s->owner, 1);
}

void session_leave(struct sessions *t, struct session *s)
{
    struct session **link = bucket_of(t, s->id);
    while (*link != s)
        link = &(*link)->chain;
    *link = s->chain;
    *(s->newer ? &s->newer->older : &t->newest) = s->older;
    *(s->older ? &s->older->newer : &t->oldest) = s->newer;
    t->n -= s->kind == SESSION_OF_USER;
    t->n_items -= s->kind != SESSION_OF_USER;
    content_count(t, s, &s->now, -1);
    if (s->kind == SESSION_OF_USER)
        session_quota_count_session(t->quota, s->owner, -1);
    session_free(s);
}

void sessions_close(struct sessions *t)
{
    if (!t)
        return;
    while (t->newest)
        session_leave(t, t->newest);
    pthread_mutex_destroy(&t->lock);
    session_quota_close(t->quota);
    free(t->buckets);
    free(t);
}

void sessions_count(struct sessions *t, struct session_counts *out)
{
    *out = (struct session_counts){0};
    pthread_mutex_lock(&t->lock);
    out->n_sessions = t->n;
    out->n_pending = t->n_pending;
    for (const struct session *s = t->oldest; s; s = s->newer) {
        enum image_tier tier = s->kind == SESSION_OF_USER ? tier_of(s) : IMAGE_IN_STORE;
        out->n_on_device += tier == IMAGE_ON_DEVICE;
        out->n_in_memory += tier == IMAGE_IN_MEMORY;
    }
    pthread_mutex_unlock(&t->lock);
}

/* ---- sessions ---- */

static enum status new_session(struct sessions *t, const struct session_request *q,
                               struct session **out, struct error *err)
{
    if (t->n >= t->options.max_sessions && !sessions_are_shared(t))
        return fail(err, STATUS_BUSY,
                    "This server holds %d sessions, as many as --max-sessions "
                    "permits; delete one, or wait until one expires.",
                    t->n);
    enum status st = sessions_are_shared(t) ? STATUS_OK /* Redis counts them */
                                            : session_quota_check_session(t->quota, q->owner, err);
    if (st)
        return st;
    struct session *s = calloc(1, sizeof(*s));
    char *metadata = strdup(q->metadata ? q->metadata : "{}");
    if (!s || !metadata) {
        free(s);
        free(metadata);
        return fail(err, STATUS_NOMEM, "out of memory for a session");
    }
    *s = (struct session){
        .owner = q->owner,
        .created = session_now_s(),
        .idle_s = q->idle_s ? q->idle_s : t->options.idle_s,
        .metadata = metadata,
        .is_new = true,
        .now = {.used = session_now_s()},
    };
    session_tag_owner(t, s);
    make_id(s);
    *out = s;
    return STATUS_OK;
}

enum status session_create(struct sessions *t, const struct session_request *request,
                           session_done *done, void *context, struct error *err)
{
    struct session *s = NULL;
    struct change *c = NULL;
    pthread_mutex_lock(&t->lock);
    enum status st = new_session(t, request, &s, err);
    if (!st)
        st = change_new(&c, s, done, context, err);
    if (st && s)
        session_free(s);
    if (!st) {
        session_set_image(&c->next.image, request->from);
        session_enter(t, s);
    }
    return change_hand_in(t, c, st);
}

enum status session_show(struct sessions *t, const char *id, int owner, struct session_info *out,
                         struct error *err)
{
    struct session *s = NULL;
    pthread_mutex_lock(&t->lock);
    enum status st = find(t, id, owner, &s, err);
    if (!st)
        st = session_describe_copy(s, out, err);
    pthread_mutex_unlock(&t->lock);
    return st;
}

enum status session_delete(struct sessions *t, const char *id, int owner, int64_t version,
                           session_done *done, void *context, struct error *err)
{
    struct change *c = NULL;
    pthread_mutex_lock(&t->lock);
    struct session *s = session_find_owned(t, id, owner); /* also one that is lost */
    enum status st = !s ? session_not_found(id, err) : s->in_turn ? in_a_turn(s, err) : STATUS_OK;
    if (!st && !s->why) /* a lost one's is not known */
        st = check_version(s, version, err);
    if (!st)
        st = change_at(&c, s, s->why ? SESSION_ANY_VERSION : version, done, context, err);
    if (!st)
        c->is_delete = true;
    return change_hand_in(t, c, st);
}

int sessions_expire(struct sessions *t)
{
    int n = 0;
    if (sessions_are_shared(t)) {
        shared_sweep(t);
        return redis_store_take_expired(shared_store(t));
    }
    int64_t now = session_now_s();
    struct change *first = NULL, **end = &first;
    pthread_mutex_lock(&t->lock);
    for (struct session *s = t->oldest; s; s = s->newer) {
        struct error ignored;
        struct change *c = NULL;
        bool ends = is_overdue(s, now) || (s->is_dropped && !s->in_turn);
        if (!ends || change_new(&c, s, NULL, NULL, &ignored))
            continue;
        c->is_delete = true;
        n += s->kind == SESSION_OF_USER;
        if ((*end = change_submit(t, c)))
            end = &(*end)->next_held;
    }
    pthread_mutex_unlock(&t->lock);
    while (first) {
        struct change *c = first;
        first = c->next_held;
        change_finish(t, c);
    }
    return n;
}

static enum status list(struct sessions *t, int owner, const char *after, struct session_info *out,
                        int max, int *n, bool *has_more, struct error *err)
{
    struct session *s = t->newest;
    if (after) {
        s = session_find_owned(t, after, owner);
        if (!s)
            return session_not_found(after, err);
        s = s->older;
    }
    *n = 0;
    *has_more = false;
    for (; s; s = s->older) {
        if (s->owner != owner || s->kind != SESSION_OF_USER || s->is_new || s->why)
            continue;
        if (*n == max) {
            *has_more = true;
            break;
        }
        enum status st = session_describe_copy(s, &out[*n], err);
        if (st) {
            while (*n)
                session_info_free(&out[--*n]);
            return st;
        }
        ++*n;
    }
    return STATUS_OK;
}

enum status session_list(struct sessions *t, int owner, const char *after, struct session_info *out,
                         int max, int *n, bool *has_more, struct error *err)
{
    if (sessions_are_shared(t))
        return shared_list(t, owner, after, out, max, n, has_more, err);
    pthread_mutex_lock(&t->lock);
    enum status st = list(t, owner, after, out, max, n, has_more, err);
    pthread_mutex_unlock(&t->lock);
    return st;
}

/* ---- turns ---- */

enum status session_begin(struct sessions *t, const char *id, int owner, int64_t version,
                          struct session_turn *out, struct error *err)
{
    struct session *s = NULL;
    char lease[REDIS_HEX_BYTES] = "";
    enum status st = STATUS_OK;
    if (sessions_are_shared(t))
        st = shared_begin(t, id, owner, lease, err);
    if (st)
        return st;
    pthread_mutex_lock(&t->lock);
    st = find_idle(t, id, owner, &s, err);
    if (!st)
        st = check_version(s, version, err);
    if (!st)
        st = session_quota_check_state(t->quota, s->owner, s->now.previous, err);
    if (st && *lease)
        redis_store_release(shared_store(t), lease);
    if (!st) {
        s->in_turn = true;
        memcpy(s->lease, lease, sizeof(lease));
        s->now.used = session_now_s();
        *out = (struct session_turn){
            .version = s->now.version, .from = session_hold_image(s->now.image), .active = true};
        memcpy(out->id, s->id, sizeof(out->id));
    }
    pthread_mutex_unlock(&t->lock);
    return st;
}

/* The turn's session, whoever owns it: nobody can delete it meanwhile. */
static struct session *session_of(const struct sessions *t, const struct session_turn *turn)
{
    struct session *s = session_find(t, turn->id);
    CHECK(s && s->in_turn);
    return s;
}

/* A session goes on from another image; the one before is kept. */
static void advance(struct content *c, struct image *image)
{
    session_set_image(&c->previous, c->image);
    c->has_previous = true;
    session_set_image(&c->image, image);
    c->version++;
    c->used = session_now_s();
}

enum status session_commit(struct sessions *t, struct session_turn *turn, struct image *image,
                           const int32_t *tokens, size_t n_chunked, size_t n_single,
                           session_done *done, void *context, struct error *err)
{
    CHECK(turn->active);
    struct change *c = NULL;
    enum status st = STATUS_OK;
    if (t->options.store)
        st = image_set_origin(image, turn->from, tokens, n_chunked, n_single, err);
    pthread_mutex_lock(&t->lock);
    if (!st)
        st = change_new(&c, session_of(t, turn), done, context, err);
    if (!st) {
        advance(&c->next, image);
        c->turn = turn;
        if (t->options.store)
            record_origin(&c->entry.payload, image);
    }
    return change_hand_in(t, c, st);
}

void session_abandon(struct sessions *t, struct session_turn *turn)
{
    if (!turn->active)
        return;
    pthread_mutex_lock(&t->lock);
    struct session *s = session_of(t, turn);
    if (*s->lease)
        redis_store_release(shared_store(t), s->lease);
    session_end_turn(s, turn);
    pthread_mutex_unlock(&t->lock);
}

void session_end_turn(struct session *s, struct session_turn *turn)
{
    s->in_turn = false;
    *s->lease = '\0';
    image_drop(turn->from);
    turn->from = NULL;
    turn->active = false;
}

/* ---- states ---- */

enum status session_image(struct sessions *t, const char *id, int owner, int64_t version,
                          struct image **out, struct session_info *info, struct error *err)
{
    struct session *s = NULL;
    pthread_mutex_lock(&t->lock);
    enum status st = find(t, id, owner, &s, err);
    if (!st)
        st = check_version(s, version, err);
    if (!st)
        st = session_describe_copy(s, info, err);
    if (!st)
        *out = session_hold_image(s->now.image);
    pthread_mutex_unlock(&t->lock);
    return st;
}

enum status session_replace(struct sessions *t, const char *id, int owner, int64_t version,
                            struct image *image, session_done *done, void *context,
                            struct error *err)
{
    struct session *s = NULL;
    struct change *c = NULL;
    pthread_mutex_lock(&t->lock);
    enum status st = find_idle(t, id, owner, &s, err);
    if (!st)
        st = check_version(s, version, err);
    if (!st)
        st = session_quota_check_state(t->quota, s->owner, s->now.previous, err);
    if (!st)
        st = change_at(&c, s, version, done, context, err);
    if (!st)
        advance(&c->next, image);
    return change_hand_in(t, c, st);
}

static struct kept *find_kept(const struct session *s, const char *name)
{
    for (int i = 0; i < s->now.n_kept; i++)
        if (!strcmp(s->now.kept[i].about.name, name))
            return &s->now.kept[i];
    return NULL;
}

static enum status no_snapshot(const struct session *s, const char *name, enum status st,
                               struct error *err)
{
    return fail_field(err, st, "snapshot", "Session '%s' has no snapshot '%.64s'.", s->id, name);
}

enum status session_image_of(struct sessions *t, const char *id, int owner, const char *name,
                             struct image **out, struct error *err)
{
    struct session *s = NULL;
    pthread_mutex_lock(&t->lock);
    enum status st = find(t, id, owner, &s, err);
    struct kept *k = !st && name ? find_kept(s, name) : NULL;
    if (!st && name && !k)
        st = no_snapshot(s, name, STATUS_NOT_FOUND, err);
    if (!st)
        *out = session_hold_image(k ? k->image : s->now.image);
    pthread_mutex_unlock(&t->lock);
    return st;
}

static enum status check_new_name(const struct session *s, const char *name, struct error *err)
{
    if (find_kept(s, name))
        return fail_field(err, STATUS_CONFLICT, "name",
                          "Session '%s' has a snapshot '%s' already; snapshots do not change.",
                          s->id, name);
    if (s->now.n_kept == SESSION_MAX_SNAPSHOTS)
        return fail_field(err, STATUS_BUSY, "name",
                          "Session '%s' has %d snapshots, the most there can be.", s->id,
                          s->now.n_kept);
    return STATUS_OK;
}

enum status session_keep(struct sessions *t, const char *id, int owner, int64_t version,
                         const char *name, session_done *done, void *context, struct error *err)
{
    struct session *s = NULL;
    struct change *c = NULL;
    CHECK(strlen(name) < SESSION_NAME_BYTES);
    pthread_mutex_lock(&t->lock);
    enum status st = find_idle(t, id, owner, &s, err);
    if (!st)
        st = check_version(s, version, err);
    if (!st)
        st = check_new_name(s, name, err);
    if (!st)
        st = change_at(&c, s, version, done, context, err);
    if (!st) {
        struct kept *k = &c->next.kept[c->next.n_kept++];
        k->image = session_hold_image(s->now.image);
        snprintf(k->about.name, sizeof(k->about.name), "%s", name);
        k->about.position = image_length(s->now.image);
        k->about.created = session_now_s();
        c->snapshot = k->about;
    }
    return change_hand_in(t, c, st);
}

/* To a snapshot, or to where the last turn began: then there is none before it. Where either is
 * missing, the session is not as the request takes it to be; not found would say it is gone. */
static enum status roll_back(const struct session *s, const char *name, struct content *c,
                             struct error *err)
{
    const struct kept *k = name ? find_kept(s, name) : NULL;
    if (name && !k)
        return no_snapshot(s, name, STATUS_CONFLICT, err);
    if (!name && !s->now.has_previous)
        return fail_field(err, STATUS_CONFLICT, "snapshot",
                          "Session '%s' has no turn to roll back.", s->id);
    session_set_image(&c->image, k ? k->image : s->now.previous);
    session_set_image(&c->previous, NULL);
    c->has_previous = false;
    c->version++;
    c->used = session_now_s();
    return STATUS_OK;
}

enum status session_rollback(struct sessions *t, const char *id, int owner, int64_t version,
                             const char *name, session_done *done, void *context, struct error *err)
{
    struct session *s = NULL;
    struct change *c = NULL;
    pthread_mutex_lock(&t->lock);
    enum status st = find_idle(t, id, owner, &s, err);
    if (!st)
        st = check_version(s, version, err);
    if (!st)
        st = change_at(&c, s, version, done, context, err);
    if (!st)
        st = roll_back(s, name, &c->next, err);
    return change_hand_in(t, c, st);
}

enum status session_snapshots(struct sessions *t, const char *id, int owner,
                              struct session_snapshot out[SESSION_MAX_SNAPSHOTS], int *n,
                              struct error *err)
{
    struct session *s = NULL;
    pthread_mutex_lock(&t->lock);
    enum status st = find(t, id, owner, &s, err);
    for (int i = 0; !st && i < s->now.n_kept; i++)
        out[i] = s->now.kept[i].about;
    if (!st)
        *n = s->now.n_kept;
    pthread_mutex_unlock(&t->lock);
    return st;
}
