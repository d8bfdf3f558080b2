/* outcomes.c - see outcomes.h */
#include "server/outcomes.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <xxhash.h>

#include "server/metrics.h"

enum { N_BUCKETS = 4096, LARGEST_SHARE = 4 };

struct outcome {
    struct outcomes *table;
    struct outcome *bucket_next;
    struct outcome *older, *newer; /* of stored ones */
    enum outcome_state state;
    int owner;
    char *path, *key; /* in the same block of memory */
    uint64_t body_hash[2];
    int64_t stored;
    int http_status;
    char *body; /* [n_body], or NULL */
    size_t n_body;
    char stream_id[OUTCOME_ID_BYTES];
    size_t n_bytes; /* of this struct with its texts */
    char texts[];
};

struct outcomes {
    struct outcomes_options options;
    struct outcome *buckets[N_BUCKETS];
    struct outcome *oldest, *newest; /* stored ones, by time */
    struct outcome *bodies;          /* those before have no body; NULL: none has */
    size_t record_bytes;             /* of used_bytes, what is no body */
    atomic_int n_outcomes;
    atomic_size_t used_bytes;
};

static int64_t now_s(void)
{
    return (int64_t)time(NULL);
}

static struct outcome **bucket_of(struct outcomes *t, const char *path, const char *key, int owner)
{
    uint64_t seed = XXH3_64bits_withSeed(path, strlen(path), (uint64_t)(int64_t)owner);
    return &t->buckets[XXH3_64bits_withSeed(key, strlen(key), seed) % N_BUCKETS];
}

static struct outcome *find(struct outcomes *t, const struct outcome_key *key)
{
    struct outcome *o = *bucket_of(t, key->path, key->key, key->owner);
    while (o && (o->owner != key->owner || strcmp(o->key, key->key) || strcmp(o->path, key->path)))
        o = o->bucket_next;
    return o;
}

void outcome_hash(struct outcome_key *key, const char *body, size_t n)
{
    XXH128_hash_t hash = XXH3_128bits(body, n);
    key->body_hash[0] = hash.low64;
    key->body_hash[1] = hash.high64;
}

/* ---- what is kept ---------------------------------------------------------------------------- */

static void drop_body(struct outcome *o)
{
    o->table->used_bytes -= o->n_body;
    free(o->body);
    o->body = NULL;
    o->n_body = 0;
}

static void tell(const struct outcome *o, bool is_gone)
{
    const struct outcomes_options *options = &o->table->options;
    if (options->changed)
        options->changed(options->context, o, is_gone);
}

static void unlink_stored(struct outcome *o)
{
    struct outcomes *t = o->table;
    if (t->bodies == o)
        t->bodies = o->newer;
    *(o->older ? &o->older->newer : &t->oldest) = o->newer;
    *(o->newer ? &o->newer->older : &t->newest) = o->older;
}

void outcome_forget(struct outcome *o)
{
    struct outcomes *t = o->table;
    tell(o, true);
    struct outcome **link = bucket_of(t, o->path, o->key, o->owner);
    while (*link != o)
        link = &(*link)->bucket_next;
    *link = o->bucket_next;
    if (o->state == OUTCOME_STORED)
        unlink_stored(o);
    drop_body(o);
    t->used_bytes -= o->n_bytes;
    t->record_bytes -= o->n_bytes;
    t->n_outcomes--;
    free(o);
}

static void keep_limit(struct outcomes *t)
{
    while (t->used_bytes > t->options.limit_bytes && t->oldest) {
        while (t->bodies && !t->bodies->body)
            t->bodies = t->bodies->newer;
        if (t->bodies && t->record_bytes <= t->options.limit_bytes / 2) {
            drop_body(t->bodies);
            tell(t->bodies, false);
        } else {
            metrics_add(METRIC_OUTCOMES_EVICTED, 1);
            outcome_forget(t->oldest);
        }
    }
}

static void link_stored(struct outcome *o, int64_t stored)
{
    struct outcomes *t = o->table;
    o->state = OUTCOME_STORED;
    o->stored = stored;
    o->older = t->newest;
    *(t->newest ? &t->newest->newer : &t->oldest) = o;
    t->newest = o;
    if (!t->bodies)
        t->bodies = o;
}

static void keep_body(struct outcome *o, const char *body, size_t n)
{
    struct outcomes *t = o->table;
    if (!body || n > t->options.limit_bytes / LARGEST_SHARE)
        return;
    o->body = malloc(n + 1);
    if (!o->body)
        return;
    memcpy(o->body, body, n);
    o->n_body = n;
    t->used_bytes += n;
}

/* ---- the header's promises ------------------------------------------------------------------- */

enum status outcomes_open(struct outcomes **out, const struct outcomes_options *options,
                          struct error *err)
{
    struct outcomes *t = calloc(1, sizeof(*t));
    if (!t)
        return fail(err, STATUS_NOMEM, "outcomes: out of memory");
    t->options = *options;
    *out = t;
    return STATUS_OK;
}

void outcomes_close(struct outcomes *t)
{
    if (t)
        t->options.changed = NULL;
    while (t && t->oldest)
        outcome_forget(t->oldest);
    free(t);
}

static struct outcome *add(struct outcomes *t, const struct outcome_key *key)
{
    size_t n_key = strlen(key->key) + 1, n_path = strlen(key->path) + 1;
    size_t n_bytes = sizeof(struct outcome) + n_key + n_path;
    struct outcome *o = calloc(1, n_bytes);
    if (!o)
        return NULL;
    struct outcome **bucket = bucket_of(t, key->path, key->key, key->owner);
    o->table = t;
    o->bucket_next = *bucket;
    *bucket = o;
    o->owner = key->owner;
    o->key = memcpy(o->texts, key->key, n_key);
    o->path = memcpy(o->texts + n_key, key->path, n_path);
    memcpy(o->body_hash, key->body_hash, sizeof(o->body_hash));
    o->n_bytes = n_bytes;
    t->used_bytes += n_bytes;
    t->record_bytes += n_bytes;
    t->n_outcomes++;
    return o;
}

enum status outcomes_claim(struct outcomes *t, const struct outcome_key *key, struct outcome **out,
                           bool *is_new, struct error *err)
{
    struct outcome *o = find(t, key);
    *is_new = !o;
    if (o && memcmp(o->body_hash, key->body_hash, sizeof(o->body_hash)))
        return fail_field(err, STATUS_INVALID, "Idempotency-Key",
                          "This Idempotency-Key was used for a request with another body. Use a "
                          "key for one request and its repetitions only.");
    if (!o)
        o = add(t, key);
    if (!o)
        return fail(err, STATUS_NOMEM, "out of memory for the key of a request");
    *out = o;
    return STATUS_OK;
}

void outcome_stream(struct outcome *o, const char *stream_id)
{
    CHECK(o->state == OUTCOME_CLAIMED);
    o->state = OUTCOME_STREAMING;
    o->http_status = 200;
    snprintf(o->stream_id, sizeof(o->stream_id), "%s", stream_id);
}

void outcome_end_stream(struct outcome *o)
{
    CHECK(o->state == OUTCOME_STREAMING);
    link_stored(o, now_s());
    keep_limit(o->table);
}

void outcome_store(struct outcome *o, int http_status, const char *body, size_t n)
{
    CHECK(o->state == OUTCOME_CLAIMED);
    o->http_status = http_status;
    keep_body(o, body, n);
    link_stored(o, now_s());
    keep_limit(o->table);
}

enum outcome_state outcome_state(const struct outcome *o)
{
    return o->state;
}

void outcome_record(const struct outcome *o, struct outcome_record *out)
{
    *out = (struct outcome_record){
        .key = {o->owner, o->path, o->key, {o->body_hash[0], o->body_hash[1]}},
        .stored = o->stored,
        .http_status = o->http_status,
        .body = o->body,
        .n_body = o->n_body,
        .stream_id = o->stream_id,
    };
}

static bool is_overdue(const struct outcomes *t, int64_t stored)
{
    return now_s() >= stored + t->options.keep_s;
}

enum status outcomes_restore(struct outcomes *t, const struct outcome_record *record,
                             struct error *err)
{
    if (is_overdue(t, record->stored) || find(t, &record->key))
        return STATUS_OK;
    struct outcome *o = add(t, &record->key);
    if (!o)
        return fail(err, STATUS_NOMEM, "out of memory for the outcome of a request");
    o->http_status = record->http_status;
    snprintf(o->stream_id, sizeof(o->stream_id), "%s", record->stream_id);
    keep_body(o, record->body, record->n_body);
    link_stored(o, record->stored);
    keep_limit(t);
    return STATUS_OK;
}

void outcomes_expire(struct outcomes *t)
{
    while (t->oldest && is_overdue(t, t->oldest->stored))
        outcome_forget(t->oldest);
}

struct outcomes_stats outcomes_stats(const struct outcomes *t)
{
    return (struct outcomes_stats){atomic_load(&t->n_outcomes), atomic_load(&t->used_bytes)};
}
