/* responses.c - see responses.h. Their JSON is in responses_write.c. */
#include "server/responses.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <xxhash.h>

struct response_instructions response_instructions_of(const char *text)
{
    struct response_instructions i = {.given = text != NULL};
    if (text) {
        XXH128_hash_t hash = XXH3_128bits(text, strlen(text));
        i.hash[0] = hash.low64;
        i.hash[1] = hash.high64;
    }
    return i;
}

/* ---- one response -----------------------------------------------------------------------------
 */

enum status response_new(struct response **out, struct bytes *echo, struct bytes *items,
                         size_t n_items, struct error *err)
{
    uint64_t digits[2] = {0};
    struct response *r = calloc(1, sizeof(*r));
    if (!r)
        return fail(err, STATUS_NOMEM, "out of memory for a response");
    while (getrandom(digits, sizeof(digits), 0) < 0 && errno == EINTR)
        ;
    snprintf(r->id, sizeof(r->id), "resp_%016llx%016llx", (unsigned long long)digits[0],
             (unsigned long long)digits[1]);
    atomic_init(&r->n_references, 1);
    r->echo = *echo;
    r->items = *items;
    r->n_items = n_items;
    *echo = *items = (struct bytes){0};
    *out = r;
    return STATUS_OK;
}

void response_hold(struct response *r)
{
    atomic_fetch_add(&r->n_references, 1);
}

void response_release(struct response *r)
{
    if (!r || atomic_fetch_sub(&r->n_references, 1) > 1)
        return;
    CHECK(!r->watchers);
    image_unpin(r->image);
    bytes_free(&r->echo);
    bytes_free(&r->items);
    bytes_free(&r->text);
    bytes_free(&r->logprobs);
    bytes_free(&r->prompt_ids);
    bytes_free(&r->token_ids);
    free(r->pieces);
    free(r);
}

static void tell(struct response *r)
{
    for (struct response_watcher *w = r->watchers; w; w = w->next)
        w->news(w->context);
}

void response_begin(struct response *r)
{
    if (!r->begun) {
        r->begun = true;
        tell(r);
    }
}

static bool grow(struct response *r)
{
    size_t cap = r->cap_pieces ? 2 * r->cap_pieces : 16;
    struct response_piece *pieces = realloc(r->pieces, cap * sizeof(*pieces));
    if (!pieces)
        return false;
    r->pieces = pieces;
    r->cap_pieces = cap;
    return true;
}

void response_add(struct response *r, const char *text, size_t n, const struct bytes *logprobs)
{
    if (r->n_pieces == r->cap_pieces && !grow(r)) {
        r->lost = true;
        return;
    }
    bytes_append(&r->text, text, n);
    if (logprobs->n && r->logprobs.n)
        bytes_char(&r->logprobs, ',');
    bytes_append(&r->logprobs, logprobs->data, logprobs->n);
    r->pieces[r->n_pieces++] = (struct response_piece){r->text.n, r->logprobs.n};
    r->begun = true;
    tell(r);
}

void response_end(struct response *r, enum response_status status, int64_t now)
{
    CHECK(status == RESPONSE_COMPLETED || status == RESPONSE_INCOMPLETE);
    if (r->status != RESPONSE_IN_PROGRESS)
        return;
    r->status = status;
    r->begun = true;
    r->completed = now;
    tell(r);
}

void response_fail(struct response *r, const struct error *err)
{
    if (r->status != RESPONSE_IN_PROGRESS)
        return;
    r->status = RESPONSE_FAILED;
    r->error = *err;
    tell(r);
}

bool response_failed(const struct response *r)
{
    return r->lost || r->text.failed || r->logprobs.failed || r->prompt_ids.failed ||
           r->token_ids.failed;
}

size_t response_bytes(const struct response *r)
{
    return sizeof(*r) + r->echo.cap + r->items.cap + r->text.cap + r->logprobs.cap +
           r->prompt_ids.cap + r->token_ids.cap + r->cap_pieces * sizeof(*r->pieces);
}

void response_watch(struct response *r, struct response_watcher *w)
{
    w->next = r->watchers;
    r->watchers = w;
}

void response_unwatch(struct response *r, struct response_watcher *w)
{
    struct response_watcher **link = &r->watchers;
    while (*link && *link != w)
        link = &(*link)->next;
    if (*link)
        *link = w->next;
}

/* ---- the table --------------------------------------------------------------------------------
 */

/* By age: of everybody's responses, and of an owner's. */
enum { OF_ALL, OF_OWNER };
struct line {
    struct response *oldest, *newest;
    int n;
};

struct responses {
    struct responses_options options;
    pthread_mutex_t lock;      /* guards all that follows, and of a response what its struct says */
    struct response **buckets; /* [n_buckets], a power of two */
    size_t n_buckets;
    struct line all, *owners; /* owners [n_owners]: the owner i has the place i + 1 */
    int n_owners;
    size_t n_bytes;
    int n_dropped;
};

enum status responses_open(struct responses **out, const struct responses_options *options,
                           struct error *err)
{
    enum { N_BUCKETS = 16384 };
    struct responses *t = calloc(1, sizeof(*t));
    struct response **buckets = calloc(N_BUCKETS, sizeof(struct response *));
    if (!t || !buckets) {
        free(t);
        free(buckets);
        return fail(err, STATUS_NOMEM, "out of memory for the table of responses");
    }
    t->options = *options;
    t->buckets = buckets;
    t->n_buckets = N_BUCKETS;
    pthread_mutex_init(&t->lock, NULL);
    *out = t;
    return STATUS_OK;
}

static struct response **bucket_of(const struct responses *t, const char *id)
{
    return &t->buckets[XXH3_64bits(id, strlen(id)) & (t->n_buckets - 1)];
}

/* With the lock held, as all that follow which take a table and are static. */
static struct response *find(const struct responses *t, const char *id, int owner, int64_t now)
{
    struct response *r = *bucket_of(t, id);
    while (r && (strcmp(r->id, id) || r->owner != owner || now >= r->expires))
        r = r->chain;
    return r;
}

static void line_add(struct line *l, struct response *r, int which)
{
    r->links[which] = (struct response_neighbours){.older = l->newest};
    *(l->newest ? &l->newest->links[which].newer : &l->oldest) = r;
    l->newest = r;
    l->n++;
}

static void line_remove(struct line *l, struct response *r, int which)
{
    struct response_neighbours *at = &r->links[which];
    *(at->newer ? &at->newer->links[which].older : &l->newest) = at->older;
    *(at->older ? &at->older->links[which].newer : &l->oldest) = at->newer;
    l->n--;
}

/* The line of an owner, made for the first response; NULL when there is no memory. */
static struct line *line_of(struct responses *t, int owner)
{
    int place = owner + 1;
    if (place >= t->n_owners) {
        struct line *grown = realloc(t->owners, (size_t)(place + 1) * sizeof(*grown));
        if (!grown)
            return NULL;
        memset(grown + t->n_owners, 0, (size_t)(place + 1 - t->n_owners) * sizeof(*grown));
        t->owners = grown;
        t->n_owners = place + 1;
    }
    return &t->owners[place];
}

static void leave(struct responses *t, struct response *r)
{
    struct response **link = bucket_of(t, r->id);
    while (*link != r)
        link = &(*link)->chain;
    *link = r->chain;
    line_remove(&t->all, r, OF_ALL);
    line_remove(line_of(t, r->owner), r, OF_OWNER);
    t->n_bytes -= r->n_bytes;
    r->stored = false;
    if (r->n_packed && t->options.on_leave)
        t->options.on_leave(t->options.context, r);
    response_release(r);
}

/* What a response takes of the memory that is allowed for all. */
static void count(struct responses *t, struct response *r)
{
    r->over = r->status != RESPONSE_IN_PROGRESS;
    size_t n_bytes =
        response_bytes(r) + r->n_packed + (r->image ? image_bytes(r->image->store) : 0);
    t->n_bytes += n_bytes - r->n_bytes;
    r->n_bytes = n_bytes;
}

/* The newest stays, whatever it takes. */
static void keep_limits(struct responses *t)
{
    while (t->n_bytes > t->options.max_bytes && t->all.n > 1) {
        leave(t, t->all.oldest);
        t->n_dropped++;
    }
}

void responses_close(struct responses *t)
{
    if (!t)
        return;
    t->options.on_leave = NULL;
    while (t->all.oldest)
        leave(t, t->all.oldest);
    pthread_mutex_destroy(&t->lock);
    free(t->owners);
    free(t->buckets);
    free(t);
}

/* With the lock held. */
static void add(struct responses *t, struct response *r, int64_t now)
{
    struct line *line = line_of(t, r->owner);
    if (line) {
        response_hold(r);
        r->stored = true;
        r->expires = now + t->options.ttl_s;
        struct response **bucket = bucket_of(t, r->id);
        r->chain = *bucket;
        *bucket = r;
        line_add(&t->all, r, OF_ALL);
        line_add(line, r, OF_OWNER);
        count(t, r);
    }
    while (line && line->n > t->options.max_per_owner) {
        leave(t, line->oldest);
        t->n_dropped++;
    }
    keep_limits(t);
}

void responses_add(struct responses *t, struct response *r, int64_t now)
{
    pthread_mutex_lock(&t->lock);
    add(t, r, now);
    pthread_mutex_unlock(&t->lock);
}

void responses_restore(struct responses *t, struct response *r, struct image *image, int64_t stored)
{
    image_pin(image);
    pthread_mutex_lock(&t->lock);
    r->image = image;
    add(t, r, stored);
    pthread_mutex_unlock(&t->lock);
}

void responses_settle(struct responses *t, struct response *r, struct image *image)
{
    pthread_mutex_lock(&t->lock);
    if (r->stored && !r->image) {
        image_pin(image);
        r->image = image;
        count(t, r);
        keep_limits(t);
    }
    pthread_mutex_unlock(&t->lock);
}

void responses_count(struct responses *t, struct response *r)
{
    pthread_mutex_lock(&t->lock);
    if (r->stored) {
        count(t, r);
        keep_limits(t);
    }
    pthread_mutex_unlock(&t->lock);
}

void responses_remove(struct responses *t, struct response *r)
{
    pthread_mutex_lock(&t->lock);
    if (r->stored)
        leave(t, r);
    pthread_mutex_unlock(&t->lock);
}

struct response *responses_find(struct responses *t, const char *id, int owner, int64_t now)
{
    pthread_mutex_lock(&t->lock);
    struct response *r = find(t, id, owner, now);
    if (r)
        response_hold(r);
    pthread_mutex_unlock(&t->lock);
    return r;
}

static enum status state(struct responses *t, const char *id, int owner, int64_t now,
                         struct image **image, struct response_instructions *instructions,
                         struct error *err)
{
    struct response *r = find(t, id, owner, now);
    if (!r)
        return fail(err, STATUS_NOT_FOUND, "Previous response with id '%.64s' not found.", id);
    if (!r->image && !r->over)
        return fail(err, STATUS_CONFLICT,
                    "Previous response '%s' is still in progress; try again when it has ended.",
                    id);
    if (!r->image)
        return fail(err, STATUS_INVALID,
                    "Previous response '%s' failed; there is nothing to go on from.", id);
    image_keep(r->image);
    *image = r->image;
    *instructions = r->instructions;
    return STATUS_OK;
}

enum status responses_state(struct responses *t, const char *id, int owner, int64_t now,
                            struct image **image, struct response_instructions *instructions,
                            struct error *err)
{
    pthread_mutex_lock(&t->lock);
    enum status st = state(t, id, owner, now, image, instructions, err);
    pthread_mutex_unlock(&t->lock);
    return st;
}

/* All live equally long: the oldest are overdue first. */
int responses_expire(struct responses *t, int64_t now)
{
    int n = 0;
    pthread_mutex_lock(&t->lock);
    for (; t->all.oldest && now >= t->all.oldest->expires; n++)
        leave(t, t->all.oldest);
    pthread_mutex_unlock(&t->lock);
    return n;
}

int responses_n(struct responses *t)
{
    pthread_mutex_lock(&t->lock);
    int n = t->all.n;
    pthread_mutex_unlock(&t->lock);
    return n;
}

int responses_take_dropped(struct responses *t)
{
    pthread_mutex_lock(&t->lock);
    int n = t->n_dropped;
    t->n_dropped = 0;
    pthread_mutex_unlock(&t->lock);
    return n;
}
