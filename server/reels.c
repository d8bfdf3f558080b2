/* reels.c - see reels.h */
#include "server/reels.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "engine/job.h"
#include "server/metrics.h"

enum { BLOCK_BYTES = 64 << 10, N_BUCKETS = 4096, ID_BYTES = 48 };

/* Events that lie together: they are dropped together. */
struct block {
    struct block *next;
    int n_references; /* the reel's, and that of each reader that reads in it */
    uint64_t first, n_events;
    struct bytes text;
};

struct reader {
    struct reel *reel;
    struct http_request *http;
    struct reader *previous, *next;
    struct block *block; /* held; NULL: none yet */
    size_t at;           /* in the block's text */
    uint64_t after;      /* without a block: the event it begins behind */
    const char *reason;  /* why the reader must end, or NULL */
    const char *code;    /* OpenAI's, of the reason */
    struct bytes last;   /* the event that says so */
    size_t n_last_sent;
};

struct reel {
    struct reels *table;
    char id[ID_BYTES];
    int owner;
    int64_t keep_s, expires_ns;
    void *user;
    bool is_listed, is_finished; /* listed: in the table */
    struct reel *bucket_next;
    struct reel *older, *newer; /* by their end; of finished ones */
    struct block *head, *tail;
    uint64_t n_events; /* appended so far: the number of the last one */
    size_t n_bytes;    /* of the blocks from head to tail */
    struct reader *readers;
    struct codec_usage usage;
};

struct reels {
    struct reels_options options;
    struct reel *buckets[N_BUCKETS];
    struct reel *oldest, *newest; /* finished ones */
    atomic_int n_reels;
    atomic_size_t used_bytes;
};

/* ---- blocks ---------------------------------------------------------------------------------- */

static void block_release(struct reels *t, struct block *b)
{
    if (!b || --b->n_references)
        return;
    t->used_bytes -= sizeof(*b) + b->text.cap;
    bytes_free(&b->text);
    free(b);
}

static struct block *add_block(struct reel *reel)
{
    struct block *b = calloc(1, sizeof(*b));
    if (!b)
        return NULL;
    b->n_references = 1;
    b->first = reel->n_events + 1;
    if (reel->tail)
        reel->tail->next = b;
    else
        reel->head = b;
    reel->tail = b;
    reel->table->used_bytes += sizeof(*b);
    return b;
}

static void drop_head(struct reel *reel)
{
    struct block *b = reel->head;
    reel->head = b->next;
    if (!reel->head)
        reel->tail = NULL;
    reel->n_bytes -= b->text.cap;
    block_release(reel->table, b);
}

static bool append_event(struct reel *reel, const char *data, size_t n)
{
    struct block *b = reel->tail;
    if (!b || b->text.n + n > BLOCK_BYTES)
        b = add_block(reel);
    if (!b)
        return false;
    size_t before = b->text.cap, length = b->text.n;
    bytes_format(&b->text, "id: %llu\n", (unsigned long long)reel->n_events + 1);
    bytes_append(&b->text, data, n);
    reel->n_bytes += b->text.cap - before;
    reel->table->used_bytes += b->text.cap - before;
    if (b->text.failed) {
        b->text.n = length; /* no half of an event */
        return false;
    }
    reel->n_events++;
    b->n_events++;
    return true;
}

/* The block with this event, or NULL: it was dropped, or is not there yet. */
static struct block *block_of(const struct reel *reel, uint64_t event)
{
    for (struct block *b = reel->head; b; b = b->next)
        if (event >= b->first && event < b->first + b->n_events)
            return b;
    return NULL;
}

static uint64_t first_kept(const struct reel *reel)
{
    return reel->head ? reel->head->first : reel->n_events + 1;
}

/* Where an event of the block begins: behind so many empty lines. */
static size_t place_of(const struct block *b, uint64_t event)
{
    const char *at = b->text.data;
    for (uint64_t i = b->first; i < event; i++)
        at = strstr(at, "\n\n") + 2;
    return (size_t)(at - b->text.data);
}

/* ---- the table ------------------------------------------------------------------------------- */

static struct reel **bucket_of(struct reels *t, const char *id)
{
    return &t->buckets[XXH3_64bits(id, strlen(id)) % N_BUCKETS];
}

static void free_if_over(struct reel *reel)
{
    struct reels *t = reel->table;
    if (reel->is_listed || reel->readers)
        return;
    while (reel->head)
        drop_head(reel);
    t->used_bytes -= sizeof(*reel);
    free(reel);
}

static void unlink_finished(struct reel *reel)
{
    struct reels *t = reel->table;
    *(reel->older ? &reel->older->newer : &t->oldest) = reel->newer;
    *(reel->newer ? &reel->newer->older : &t->newest) = reel->older;
}

/* Nobody finds it any more; its readers read it to its end. */
static void unlist(struct reel *reel)
{
    struct reels *t = reel->table;
    struct reel **link = bucket_of(t, reel->id);
    while (*link != reel)
        link = &(*link)->bucket_next;
    *link = reel->bucket_next;
    if (reel->is_finished)
        unlink_finished(reel);
    reel->is_listed = false;
    t->n_reels--;
    free_if_over(reel);
}

static bool evict_one(struct reels *t)
{
    struct reel *reel = t->oldest;
    while (reel && reel->readers)
        reel = reel->newer;
    if (!reel)
        return false;
    metrics_add(METRIC_STREAMS_EVICTED, 1);
    unlist(reel);
    return true;
}

static void drop_oldest(struct reel *reel)
{
    metrics_add(METRIC_STREAM_EVENTS_DROPPED, reel->head->n_events);
    drop_head(reel);
}

static void keep_limits(struct reel *reel)
{
    struct reels *t = reel->table;
    while (reel->n_bytes > t->options.limit_one && reel->head != reel->tail)
        drop_oldest(reel);
    while (t->used_bytes > t->options.limit_all) {
        if (evict_one(t))
            continue;
        if (reel->head == reel->tail)
            break;
        drop_oldest(reel);
    }
}

enum status reels_open(struct reels **out, const struct reels_options *options, struct error *err)
{
    struct reels *t = calloc(1, sizeof(*t));
    if (!t)
        return fail(err, STATUS_NOMEM, "streams: out of memory");
    t->options = *options;
    *out = t;
    return STATUS_OK;
}

void reels_close(struct reels *t)
{
    for (int i = 0; t && i < N_BUCKETS; i++)
        while (t->buckets[i])
            unlist(t->buckets[i]);
    free(t);
}

struct reel *reels_find(struct reels *t, const char *id, int owner)
{
    struct reel *reel = *bucket_of(t, id);
    while (reel && (strcmp(reel->id, id) || reel->owner != owner))
        reel = reel->bucket_next;
    return reel;
}

void reels_expire(struct reels *t)
{
    int64_t now = job_clock_ns();
    for (struct reel *reel = t->oldest, *next; reel; reel = next) {
        next = reel->newer;
        if (now >= reel->expires_ns)
            unlist(reel);
    }
}

struct reels_stats reels_stats(const struct reels *t)
{
    return (struct reels_stats){atomic_load(&t->n_reels), atomic_load(&t->used_bytes)};
}

/* ---- the generation's side ------------------------------------------------------------------- */

struct reel *reel_open(struct reels *t, const char *id, int owner, int64_t keep_s, void *user)
{
    struct reel *reel = calloc(1, sizeof(*reel));
    if (!reel)
        return NULL;
    struct reel **bucket = bucket_of(t, id);
    *reel = (struct reel){.table = t,
                          .owner = owner,
                          .keep_s = keep_s,
                          .user = user,
                          .is_listed = true,
                          .bucket_next = *bucket};
    snprintf(reel->id, sizeof(reel->id), "%s", id);
    *bucket = reel;
    t->n_reels++;
    t->used_bytes += sizeof(*reel);
    return reel;
}

static void wake_readers(const struct reel *reel)
{
    for (const struct reader *r = reel->readers; r; r = r->next)
        http_wake(r->http);
}

bool reel_append(struct reel *reel, const char *data, size_t n)
{
    bool good = true;
    while (n && good) {
        const char *end = memmem(data, n, "\n\n", 2);
        CHECK(end);
        size_t n_event = (size_t)(end - data) + 2;
        good = append_event(reel, data, n_event);
        data += n_event;
        n -= n_event;
    }
    keep_limits(reel);
    wake_readers(reel);
    return good;
}

void reel_note_usage(struct reel *reel, struct codec_usage usage)
{
    reel->usage = usage;
}

void reel_finish(struct reel *reel)
{
    struct reels *t = reel->table;
    reel->is_finished = true;
    reel->user = NULL;
    reel->expires_ns = job_clock_ns() + reel->keep_s * 1000000000;
    reel->older = t->newest;
    *(t->newest ? &t->newest->newer : &t->oldest) = reel;
    t->newest = reel;
    wake_readers(reel);
}

void reel_stop(struct reel *reel, const char *reason, const char *code)
{
    reel->user = NULL;
    for (struct reader *r = reel->readers; r; r = r->next) {
        r->reason = reason;
        r->code = code;
    }
    wake_readers(reel);
    unlist(reel);
}

const char *reel_id(const struct reel *reel)
{
    return reel->id;
}

void *reel_user(const struct reel *reel)
{
    return reel->user;
}

/* ---- readers --------------------------------------------------------------------------------- */

static void on_close(void *context, bool delivered)
{
    (void)delivered;
    struct reader *r = context;
    struct reel *reel = r->reel;
    if (r->previous)
        r->previous->next = r->next;
    else
        reel->readers = r->next;
    if (r->next)
        r->next->previous = r->previous;
    http_note_tokens(r->http, reel->usage.prompt_tokens, reel->usage.completion_tokens);
    block_release(reel->table, r->block);
    bytes_free(&r->last);
    free(r);
    free_if_over(reel);
}

/* Go to the next event's block. False: there is none. */
static bool advance(struct reader *r)
{
    uint64_t after = r->block ? r->block->first + r->block->n_events - 1 : r->after;
    struct block *b = block_of(r->reel, after + 1);
    if (!b) {
        if (after + 1 < first_kept(r->reel)) {
            r->reason = "This reader was too slow: the events that come next were dropped.";
            r->code = "stream_events_dropped";
        }
        return false;
    }
    b->n_references++;
    block_release(r->reel->table, r->block);
    r->block = b;
    r->at = place_of(b, after + 1);
    return true;
}

static ssize_t copy(const struct bytes *from, size_t *at, char *out, size_t max)
{
    size_t left = from->n - *at, n = left < max ? left : max;
    memcpy(out, from->data + *at, n);
    *at += n;
    return (ssize_t)n;
}

/* The last event of a reader that must end. It has no number: who comes back with the last number
 * gets what follows, or is told that it is gone. */
static ssize_t read_reason(struct reader *r, char *out, size_t max)
{
    if (!r->last.n) {
        bytes_text(&r->last, "data: ");
        http_error_json(&r->last, 410, r->reason, NULL, r->code);
        bytes_text(&r->last, "\n\n");
    }
    if (r->last.failed)
        return HTTP_SOURCE_ABORT;
    if (r->n_last_sent == r->last.n)
        return HTTP_SOURCE_END;
    return copy(&r->last, &r->n_last_sent, out, max);
}

/* An http_source_read. A block may grow until the next one is there. */
static ssize_t read_events(void *context, char *out, size_t max)
{
    struct reader *r = context;
    do {
        if (r->block && r->at < r->block->text.n)
            return copy(&r->block->text, &r->at, out, max);
    } while (!r->reason && advance(r));
    if (r->reason)
        return read_reason(r, out, max);
    return r->reel->is_finished ? HTTP_SOURCE_END : HTTP_SOURCE_PARK;
}

/* True: answered, with what stands in the way of reading on behind this event. */
static bool refuse_reader(const struct reel *reel, struct http_request *http, uint64_t after)
{
    char text[240];
    if (after > reel->n_events) {
        snprintf(text, sizeof(text),
                 "Invalid 'last_event_id': the last event of stream '%s' so far is %llu, but got "
                 "%llu.",
                 reel->id, (unsigned long long)reel->n_events, (unsigned long long)after);
        http_fail_as(http, 400, text, "last_event_id", "invalid_value");
    } else if (after + 1 < first_kept(reel)) {
        snprintf(text, sizeof(text),
                 "The events %llu to %llu of stream '%s' were dropped: it is longer than what is "
                 "kept of a stream (--stream-limit-mb, --stream-retention-mb).",
                 (unsigned long long)after + 1, (unsigned long long)first_kept(reel) - 1, reel->id);
        http_fail_as(http, 410, text, "last_event_id", "stream_events_dropped");
    } else if (reel->is_finished && after == reel->n_events) {
        http_reply(http, 204, NULL, "", 0);
    } else {
        return false;
    }
    return true;
}

void reel_read(struct reel *reel, struct http_request *http, uint64_t after)
{
    struct error err;
    http_set_header(http, "X-Stream-Id", reel->id);
    if (refuse_reader(reel, http, after))
        return;
    struct reader *r = calloc(1, sizeof(*r));
    if (!r) {
        fail(&err, STATUS_NOMEM, "out of memory for a reader of a stream");
        http_fail(http, &err, NULL);
        return;
    }
    *r = (struct reader){.reel = reel, .http = http, .after = after, .next = reel->readers};
    if (r->next)
        r->next->previous = r;
    reel->readers = r;
    http_on_close(http, on_close, r);
    http_stream(http, 200, "text/event-stream; charset=utf-8", read_events, r);
}
