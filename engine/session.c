/* session.c - see session.h */
#include "engine/session.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

struct kept {
    struct session_snapshot about;
    struct image *image; /* NULL: before any token */
};

struct session {
    char id[SESSION_ID_BYTES];
    int owner;
    uint64_t version;
    int64_t created, used, idle_s;
    char *metadata;
    struct image *image;    /* NULL: before any token */
    struct image *previous; /* where the last turn began, if has_previous */
    bool has_previous, in_turn;
    struct kept *kept; /* [n_kept], oldest first */
    int n_kept;
    struct session *chain;         /* of the hash table */
    struct session *older, *newer; /* by creation */
};

struct sessions {
    struct session_options options;
    pthread_mutex_t lock;     /* guards all that follows */
    struct session **buckets; /* [n_buckets], a power of two */
    size_t n_buckets;
    struct session *newest, *oldest;
    int n;
};

/* ---- ids ---- */

static void make_id(char out[SESSION_ID_BYTES])
{
    uint64_t r[2] = {0};
    while (getrandom(r, sizeof(r), 0) < 0 && errno == EINTR)
        ;
    snprintf(out, SESSION_ID_BYTES, "sess_%016llx%016llx", (unsigned long long)r[0],
             (unsigned long long)r[1]);
}

/* Ids are random: their digits are the hash. */
static struct session **bucket_of(const struct sessions *t, const char *id)
{
    uint64_t hash = 0;
    for (const char *c = id; *c && c < id + SESSION_ID_BYTES; c++)
        hash = hash * 31 + (unsigned char)*c;
    return &t->buckets[(hash ^ hash >> 29) & (t->n_buckets - 1)];
}

static enum status not_found(const char *id, struct error *err)
{
    return fail_field(err, STATUS_NOT_FOUND, "session_id", "There is no session '%.64s'.", id);
}

/* With the lock held, as everything that takes a struct session. */
static struct session *find(const struct sessions *t, const char *id, int owner)
{
    for (struct session *s = *bucket_of(t, id); s; s = s->chain)
        if (!strcmp(s->id, id) && s->owner == owner)
            return s;
    return NULL;
}

static enum status find_idle(const struct sessions *t, const char *id, int owner,
                             struct session **out, struct error *err)
{
    struct session *s = find(t, id, owner);
    if (!s)
        return not_found(id, err);
    if (s->in_turn)
        return fail_field(err, STATUS_CONFLICT, "session_id",
                          "Session '%.64s' is in a turn; try again when that has ended.", id);
    *out = s;
    return STATUS_OK;
}

static enum status check_version(const struct session *s, int64_t version, struct error *err)
{
    if (version == SESSION_ANY_VERSION || (uint64_t)version == s->version)
        return STATUS_OK;
    return fail_field(err, STATUS_PRECONDITION, "session_id",
                      "Session '%s' is at version %llu; expected version %lld.", s->id,
                      (unsigned long long)s->version, (long long)version);
}

/* ---- references ---- */

static struct image *hold(struct image *image)
{
    if (image)
        image_hold(image);
    return image;
}

static void set_image(struct image **place, struct image *image)
{
    hold(image);
    image_release(*place);
    *place = image;
}

static int64_t now_s(void)
{
    return (int64_t)time(NULL);
}

static bool is_overdue(const struct session *s, int64_t now)
{
    return s->idle_s && !s->in_turn && now >= s->used + s->idle_s;
}

static enum status describe(const struct session *s, struct session_info *out, struct error *err)
{
    struct session_info info = {
        .position = image_length(s->image),
        .version = s->version,
        .created = s->created,
        .used = s->used,
        .expires = s->idle_s ? s->used + s->idle_s : 0,
        .in_turn = s->in_turn,
        .n_snapshots = s->n_kept,
        .metadata = strdup(s->metadata),
    };
    memcpy(info.id, s->id, sizeof(info.id));
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
    t->options = *options;
    t->buckets = buckets;
    t->n_buckets = n_buckets;
    pthread_mutex_init(&t->lock, NULL);
    *out = t;
    return STATUS_OK;
}

static void free_session(struct session *s)
{
    image_release(s->image);
    image_release(s->previous);
    for (int i = 0; i < s->n_kept; i++)
        image_release(s->kept[i].image);
    free(s->kept);
    free(s->metadata);
    free(s);
}

static void enter(struct sessions *t, struct session *s)
{
    struct session **bucket = bucket_of(t, s->id);
    s->chain = *bucket;
    *bucket = s;
    s->older = t->newest;
    *(t->newest ? &t->newest->newer : &t->oldest) = s;
    t->newest = s;
    t->n++;
}

static void leave(struct sessions *t, struct session *s)
{
    struct session **link = bucket_of(t, s->id);
    while (*link != s)
        link = &(*link)->chain;
    *link = s->chain;
    *(s->newer ? &s->newer->older : &t->newest) = s->older;
    *(s->older ? &s->older->newer : &t->oldest) = s->newer;
    t->n--;
    free_session(s);
}

void sessions_close(struct sessions *t)
{
    if (!t)
        return;
    while (t->newest)
        leave(t, t->newest);
    pthread_mutex_destroy(&t->lock);
    free(t->buckets);
    free(t);
}

int sessions_count(struct sessions *t)
{
    pthread_mutex_lock(&t->lock);
    int n = t->n;
    pthread_mutex_unlock(&t->lock);
    return n;
}

int sessions_expire(struct sessions *t)
{
    int n = 0;
    int64_t now = now_s();
    pthread_mutex_lock(&t->lock);
    for (struct session *s = t->oldest, *newer; s; s = newer) {
        newer = s->newer;
        if (is_overdue(s, now)) {
            leave(t, s);
            n++;
        }
    }
    pthread_mutex_unlock(&t->lock);
    return n;
}

/* ---- sessions ---- */

static enum status create(struct sessions *t, const struct session_request *q,
                          struct session_info *out, struct error *err)
{
    if (t->n >= t->options.max_sessions)
        return fail(err, STATUS_BUSY,
                    "This server holds %d sessions, as many as --max-sessions "
                    "permits; delete one, or wait until one expires.",
                    t->n);
    struct session *s = calloc(1, sizeof(*s));
    char *metadata = strdup(q->metadata ? q->metadata : "{}");
    if (!s || !metadata) {
        free(s);
        free(metadata);
        return fail(err, STATUS_NOMEM, "out of memory for a session");
    }
    *s = (struct session){
        .owner = q->owner,
        .created = now_s(),
        .used = now_s(),
        .idle_s = q->idle_s ? q->idle_s : t->options.idle_s,
        .metadata = metadata,
        .image = hold(q->from),
    };
    make_id(s->id);
    enum status st = describe(s, out, err);
    if (st)
        free_session(s);
    else
        enter(t, s);
    return st;
}

enum status session_create(struct sessions *t, const struct session_request *request,
                           struct session_info *out, struct error *err)
{
    pthread_mutex_lock(&t->lock);
    enum status st = create(t, request, out, err);
    pthread_mutex_unlock(&t->lock);
    return st;
}

enum status session_show(struct sessions *t, const char *id, int owner, struct session_info *out,
                         struct error *err)
{
    pthread_mutex_lock(&t->lock);
    struct session *s = find(t, id, owner);
    enum status st = s ? describe(s, out, err) : not_found(id, err);
    pthread_mutex_unlock(&t->lock);
    return st;
}

enum status session_delete(struct sessions *t, const char *id, int owner, struct error *err)
{
    struct session *s = NULL;
    pthread_mutex_lock(&t->lock);
    enum status st = find_idle(t, id, owner, &s, err);
    if (!st)
        leave(t, s);
    pthread_mutex_unlock(&t->lock);
    return st;
}

static enum status list(struct sessions *t, int owner, const char *after, struct session_info *out,
                        int max, int *n, bool *has_more, struct error *err)
{
    struct session *s = t->newest;
    if (after) {
        s = find(t, after, owner);
        if (!s)
            return not_found(after, err);
        s = s->older;
    }
    *n = 0;
    *has_more = false;
    for (; s; s = s->older) {
        if (s->owner != owner)
            continue;
        if (*n == max) {
            *has_more = true;
            break;
        }
        enum status st = describe(s, &out[*n], err);
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
    pthread_mutex_lock(&t->lock);
    enum status st = find_idle(t, id, owner, &s, err);
    if (!st)
        st = check_version(s, version, err);
    if (!st) {
        s->in_turn = true;
        s->used = now_s();
        *out = (struct session_turn){.from = hold(s->image), .active = true};
        memcpy(out->id, s->id, sizeof(out->id));
    }
    pthread_mutex_unlock(&t->lock);
    return st;
}

/* The turn's session, whoever owns it: nobody can delete it meanwhile. */
static struct session *session_of(const struct sessions *t, const struct session_turn *turn)
{
    struct session *s = *bucket_of(t, turn->id);
    while (s && strcmp(s->id, turn->id))
        s = s->chain;
    CHECK(s && s->in_turn);
    return s;
}

static void end_turn(struct session *s, struct session_turn *turn)
{
    s->in_turn = false;
    s->used = now_s();
    image_release(turn->from);
    turn->from = NULL;
    turn->active = false;
}

/* A session goes on from another image; the one before is kept. */
static void advance(struct session *s, struct image *image)
{
    set_image(&s->previous, s->image);
    s->has_previous = true;
    set_image(&s->image, image);
    s->version++;
    s->used = now_s();
}

void session_commit(struct sessions *t, struct session_turn *turn, struct image *image,
                    struct session_info *info)
{
    CHECK(turn->active);
    pthread_mutex_lock(&t->lock);
    struct session *s = session_of(t, turn);
    advance(s, image);
    end_turn(s, turn);
    *info = (struct session_info){.position = image_length(s->image),
                                  .version = s->version,
                                  .created = s->created,
                                  .used = s->used};
    memcpy(info->id, s->id, sizeof(info->id));
    pthread_mutex_unlock(&t->lock);
}

void session_abandon(struct sessions *t, struct session_turn *turn)
{
    if (!turn->active)
        return;
    pthread_mutex_lock(&t->lock);
    end_turn(session_of(t, turn), turn);
    pthread_mutex_unlock(&t->lock);
}

/* ---- states ---- */

enum status session_image(struct sessions *t, const char *id, int owner, struct image **out,
                          struct session_info *info, struct error *err)
{
    pthread_mutex_lock(&t->lock);
    struct session *s = find(t, id, owner);
    enum status st = s ? describe(s, info, err) : not_found(id, err);
    if (!st)
        *out = hold(s->image);
    pthread_mutex_unlock(&t->lock);
    return st;
}

enum status session_replace(struct sessions *t, const char *id, int owner, int64_t version,
                            struct image *image, struct session_info *info, struct error *err)
{
    struct session *s = NULL;
    pthread_mutex_lock(&t->lock);
    enum status st = find_idle(t, id, owner, &s, err);
    if (!st)
        st = check_version(s, version, err);
    if (!st)
        advance(s, image);
    if (!st)
        st = describe(s, info, err);
    pthread_mutex_unlock(&t->lock);
    return st;
}

static struct kept *find_kept(const struct session *s, const char *name)
{
    for (int i = 0; i < s->n_kept; i++)
        if (!strcmp(s->kept[i].about.name, name))
            return &s->kept[i];
    return NULL;
}

static enum status keep(struct session *s, const char *name, struct session_snapshot *out,
                        struct error *err)
{
    if (find_kept(s, name))
        return fail_field(err, STATUS_CONFLICT, "name",
                          "Session '%s' has a snapshot '%s' already; snapshots do not change.",
                          s->id, name);
    if (s->n_kept == SESSION_MAX_SNAPSHOTS)
        return fail_field(err, STATUS_BUSY, "name",
                          "Session '%s' has %d snapshots, the most there can be.", s->id,
                          s->n_kept);
    struct kept *grown = realloc(s->kept, (size_t)(s->n_kept + 1) * sizeof(*grown));
    if (!grown)
        return fail(err, STATUS_NOMEM, "out of memory for a snapshot");
    s->kept = grown;
    struct kept *k = &s->kept[s->n_kept++];
    *k = (struct kept){.image = hold(s->image)};
    snprintf(k->about.name, sizeof(k->about.name), "%s", name);
    k->about.position = image_length(s->image);
    k->about.created = now_s();
    *out = k->about;
    return STATUS_OK;
}

enum status session_keep(struct sessions *t, const char *id, int owner, const char *name,
                         struct session_snapshot *out, struct error *err)
{
    struct session *s = NULL;
    CHECK(strlen(name) < SESSION_NAME_BYTES);
    pthread_mutex_lock(&t->lock);
    enum status st = find_idle(t, id, owner, &s, err);
    if (!st)
        st = keep(s, name, out, err);
    pthread_mutex_unlock(&t->lock);
    return st;
}

/* Back to where the last turn began: that turn is undone, and there is none before it. */
static enum status undo_turn(struct session *s, struct error *err)
{
    if (!s->has_previous)
        return fail_field(err, STATUS_NOT_FOUND, "snapshot",
                          "Session '%s' has no turn to roll back.", s->id);
    set_image(&s->image, s->previous);
    set_image(&s->previous, NULL);
    s->has_previous = false;
    return STATUS_OK;
}

static enum status roll_back(struct session *s, const char *name, struct error *err)
{
    enum status st = STATUS_OK;
    struct kept *k = name ? find_kept(s, name) : NULL;
    if (k)
        set_image(&s->image, k->image);
    else if (!name)
        st = undo_turn(s, err);
    else
        st = fail_field(err, STATUS_NOT_FOUND, "snapshot", "Session '%s' has no snapshot '%.64s'.",
                        s->id, name);
    if (st)
        return st;
    if (k) {
        set_image(&s->previous, NULL);
        s->has_previous = false;
    }
    s->version++;
    s->used = now_s();
    return STATUS_OK;
}

enum status session_rollback(struct sessions *t, const char *id, int owner, const char *name,
                             struct session_info *info, struct error *err)
{
    struct session *s = NULL;
    pthread_mutex_lock(&t->lock);
    enum status st = find_idle(t, id, owner, &s, err);
    if (!st)
        st = roll_back(s, name, err);
    if (!st)
        st = describe(s, info, err);
    pthread_mutex_unlock(&t->lock);
    return st;
}

enum status session_snapshots(struct sessions *t, const char *id, int owner,
                              struct session_snapshot out[SESSION_MAX_SNAPSHOTS], int *n,
                              struct error *err)
{
    pthread_mutex_lock(&t->lock);
    struct session *s = find(t, id, owner);
    enum status st = s ? STATUS_OK : not_found(id, err);
    for (int i = 0; s && i < s->n_kept; i++)
        out[i] = s->kept[i].about;
    if (s)
        *n = s->n_kept;
    pthread_mutex_unlock(&t->lock);
    return st;
}
