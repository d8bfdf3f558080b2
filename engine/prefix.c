/* prefix.c - see prefix.h */
#include "engine/prefix.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <xxhash.h>

enum { N_BUCKETS = 4096, SECRET_BYTES = 192 };

struct entry {
    XXH128_hash_t hash;
    int owner;
    size_t n;
    struct image *image;
    struct entry *bucket_next;
    struct entry *newer, *older; /* by use */
    struct entry *found_next;    /* while one is looked for */
    int32_t ids[];               /* [n] */
};

/* How many entries have so many tokens. */
struct length {
    size_t n;
    int n_entries;
};

struct prefixes {
    struct prefix_options options;
    struct image_store *images;
    unsigned char secret[SECRET_BYTES];

    pthread_mutex_t lock; /* guards all that follows */
    XXH3_state_t *hasher;
    struct entry *buckets[N_BUCKETS];
    struct entry *newest, *oldest;
    struct length lengths[PREFIX_MAX_ENTRIES]; /* [n_lengths], ascending */
    int n_lengths, n_entries, n_reserved;
    size_t n_entry_bytes;
};

/* ---- hashes ---- */

static void hash_begin(struct prefixes *p, int owner)
{
    XXH3_128bits_reset_withSecret(p->hasher, p->secret, sizeof(p->secret));
    XXH3_128bits_update(p->hasher, &owner, sizeof(owner));
}

static void hash_more(struct prefixes *p, const int32_t *ids, size_t n)
{
    XXH3_128bits_update(p->hasher, ids, n * sizeof(*ids));
}

static XXH128_hash_t hash_now(const struct prefixes *p)
{
    XXH128_hash_t hash = XXH3_128bits_digest(p->hasher);
    if (p->options.n_hash_bits) {
        hash.low64 &= ((uint64_t)1 << p->options.n_hash_bits) - 1;
        hash.high64 = 0;
    }
    return hash;
}

static XXH128_hash_t hash_of(struct prefixes *p, int owner, const int32_t *ids, size_t n)
{
    hash_begin(p, owner);
    hash_more(p, ids, n);
    return hash_now(p);
}

static int owner_of(const struct prefixes *p, int owner)
{
    return p->options.shared ? 0 : owner;
}

/* ---- entries; with the lock held ---- */

static struct entry **bucket_of(struct prefixes *p, XXH128_hash_t hash)
{
    return &p->buckets[hash.low64 % N_BUCKETS];
}

static bool is_candidate(const struct entry *e, XXH128_hash_t hash, int owner, size_t n)
{
    return XXH128_isEqual(e->hash, hash) && e->n == n && e->owner == owner;
}

static bool has_tokens(const struct entry *e, const int32_t *ids)
{
    return !memcmp(e->ids, ids, e->n * sizeof(*ids));
}

static struct entry *entry_of(struct prefixes *p, int owner, const int32_t *ids, size_t n)
{
    XXH128_hash_t hash = hash_of(p, owner, ids, n);
    struct entry *e = *bucket_of(p, hash);
    while (e && !(is_candidate(e, hash, owner, n) && has_tokens(e, ids)))
        e = e->bucket_next;
    return e;
}

static void unlink_use(struct prefixes *p, struct entry *e)
{
    *(e->newer ? &e->newer->older : &p->newest) = e->older;
    *(e->older ? &e->older->newer : &p->oldest) = e->newer;
}

static void link_newest(struct prefixes *p, struct entry *e)
{
    e->newer = NULL;
    e->older = p->newest;
    *(e->older ? &e->older->newer : &p->oldest) = e;
    p->newest = e;
}

static void use(struct prefixes *p, struct entry *e)
{
    unlink_use(p, e);
    link_newest(p, e);
}

static size_t entry_bytes(const struct prefixes *p, size_t n)
{
    return sizeof(struct entry) + n * sizeof(int32_t) + image_bytes(p->images);
}

/* Where the length is, or would be. */
static int length_at(const struct prefixes *p, size_t n)
{
    int low = 0, high = p->n_lengths;
    while (low < high) {
        int middle = (low + high) / 2;
        if (p->lengths[middle].n < n)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static void count_length(struct prefixes *p, size_t n, int more)
{
    int i = length_at(p, n);
    struct length *at = &p->lengths[i];
    if (i == p->n_lengths || at->n != n) {
        memmove(at + 1, at, (size_t)(p->n_lengths - i) * sizeof(*at));
        *at = (struct length){.n = n};
        p->n_lengths++;
    }
    at->n_entries += more;
    if (at->n_entries)
        return;
    p->n_lengths--;
    memmove(at, at + 1, (size_t)(p->n_lengths - i) * sizeof(*at));
}

static void drop(struct prefixes *p, struct entry *e)
{
    struct entry **link = bucket_of(p, e->hash);
    while (*link != e)
        link = &(*link)->bucket_next;
    *link = e->bucket_next;
    unlink_use(p, e);
    count_length(p, e->n, -1);
    p->n_entries--;
    p->n_entry_bytes -= entry_bytes(p, e->n);
    image_release(e->image);
    free(e);
}

static size_t n_bytes(const struct prefixes *p)
{
    return p->n_entry_bytes + (size_t)p->n_reserved * image_bytes(p->images);
}

/* Whether so many bytes more are within the limit, once the oldest entries are gone. */
static bool make_room(struct prefixes *p, size_t more)
{
    while (p->oldest && n_bytes(p) + more > p->options.limit_bytes)
        drop(p, p->oldest);
    return n_bytes(p) + more <= p->options.limit_bytes;
}

/* ---- looking ---- */

/* Those that may be it, the longest first. */
static struct entry *candidates(struct prefixes *p, int owner, const int32_t *ids, size_t n)
{
    struct entry *found = NULL;
    size_t at = 0;
    hash_begin(p, owner);
    for (int i = 0; i < p->n_lengths && p->lengths[i].n < n; i++) {
        hash_more(p, ids + at, p->lengths[i].n - at);
        at = p->lengths[i].n;
        XXH128_hash_t hash = hash_now(p);
        for (struct entry *e = *bucket_of(p, hash); e; e = e->bucket_next) {
            if (!is_candidate(e, hash, owner, at))
                continue;
            e->found_next = found;
            found = e;
        }
    }
    return found;
}

struct image *prefixes_find(struct prefixes *p, int owner, const int32_t *ids, size_t n,
                            size_t *n_seen)
{
    struct image *image = NULL;
    if (!p)
        return NULL;
    pthread_mutex_lock(&p->lock);
    struct entry *e = candidates(p, owner_of(p, owner), ids, n);
    while (e && !has_tokens(e, ids))
        e = e->found_next;
    if (e) {
        use(p, e);
        image = e->image;
        image_hold(image);
        *n_seen = e->n;
    }
    pthread_mutex_unlock(&p->lock);
    return image;
}

bool prefixes_has(struct prefixes *p, int owner, const int32_t *ids, size_t n)
{
    if (!p)
        return false;
    pthread_mutex_lock(&p->lock);
    struct entry *e = entry_of(p, owner_of(p, owner), ids, n);
    if (e)
        use(p, e);
    pthread_mutex_unlock(&p->lock);
    return e != NULL;
}

/* ---- keeping ---- */

struct image *prefixes_reserve(struct prefixes *p)
{
    struct image *image = NULL;
    struct error err;
    if (!p)
        return NULL;
    size_t one = image_bytes(p->images);
    pthread_mutex_lock(&p->lock);
    bool room =
        ((size_t)p->n_reserved + 1) * one <= p->options.limit_bytes / 2 && make_room(p, one);
    p->n_reserved += room;
    pthread_mutex_unlock(&p->lock);
    if (!room)
        return NULL;
    if (image_new(&image, p->images, &err)) {
        pthread_mutex_lock(&p->lock);
        p->n_reserved--;
        pthread_mutex_unlock(&p->lock);
        return NULL;
    }
    return image;
}

void prefixes_cancel(struct prefixes *p, struct image *image)
{
    if (!image)
        return;
    pthread_mutex_lock(&p->lock);
    CHECK(p->n_reserved > 0);
    p->n_reserved--;
    pthread_mutex_unlock(&p->lock);
    image_release(image);
}

/* With the lock held. */
static void insert(struct prefixes *p, int owner, const int32_t *ids, size_t n, struct image *image)
{
    struct entry *e = malloc(sizeof(*e) + n * sizeof(*ids));
    if (!e) {
        image_release(image);
        return;
    }
    *e = (struct entry){.hash = hash_of(p, owner, ids, n), .owner = owner, .n = n, .image = image};
    memcpy(e->ids, ids, n * sizeof(*ids));
    e->bucket_next = *bucket_of(p, e->hash);
    *bucket_of(p, e->hash) = e;
    link_newest(p, e);
    count_length(p, n, 1);
    p->n_entries++;
    p->n_entry_bytes += entry_bytes(p, n);
}

void prefixes_add(struct prefixes *p, int owner, const int32_t *ids, size_t n, struct image *image)
{
    CHECK(n > 0 && image->position == n);
    owner = owner_of(p, owner);
    pthread_mutex_lock(&p->lock);
    CHECK(p->n_reserved > 0);
    p->n_reserved--;
    struct entry *same = entry_of(p, owner, ids, n);
    if (same)
        use(p, same);
    if (!same && p->n_entries == PREFIX_MAX_ENTRIES)
        drop(p, p->oldest);
    if (same || !make_room(p, entry_bytes(p, n)))
        image_release(image);
    else
        insert(p, owner, ids, n, image);
    pthread_mutex_unlock(&p->lock);
}

bool prefixes_give_way(void *context)
{
    struct prefixes *p = context;
    pthread_mutex_lock(&p->lock);
    struct entry *e = p->oldest;
    while (e && image_is_shared(e->image))
        e = e->newer;
    if (e)
        drop(p, e);
    pthread_mutex_unlock(&p->lock);
    return e != NULL;
}

void prefixes_stats(struct prefixes *p, struct prefix_stats *out)
{
    *out = (struct prefix_stats){0};
    if (!p)
        return;
    pthread_mutex_lock(&p->lock);
    *out = (struct prefix_stats){
        .n_entries = p->n_entries, .n_reserved = p->n_reserved, .n_bytes = n_bytes(p)};
    pthread_mutex_unlock(&p->lock);
}

/* ---- life ---- */

enum status prefixes_open(struct prefixes **out, const struct prefix_options *options,
                          struct image_store *images, struct error *err)
{
    struct prefixes *p = calloc(1, sizeof(*p));
    XXH3_state_t *hasher = XXH3_createState();
    if (!p || !hasher) {
        free(p);
        XXH3_freeState(hasher);
        return fail(err, STATUS_NOMEM, "prefix index: out of memory");
    }
    p->options = *options;
    p->images = images;
    p->hasher = hasher;
    for (size_t n = 0; n < sizeof(p->secret);) {
        ssize_t got = getrandom(p->secret + n, sizeof(p->secret) - n, 0);
        CHECK(got >= 0 || errno == EINTR);
        n += got > 0 ? (size_t)got : 0;
    }
    pthread_mutex_init(&p->lock, NULL);
    *out = p;
    return STATUS_OK;
}

void prefixes_close(struct prefixes *p)
{
    if (!p)
        return;
    while (p->oldest)
        drop(p, p->oldest);
    pthread_mutex_destroy(&p->lock);
    XXH3_freeState(p->hasher);
    free(p);
}
