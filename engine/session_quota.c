/* session_quota.c - see session_quota.h */
#include "engine/session_quota.h"

#include <stdint.h>
#include <stdlib.h>

struct entry {
    const void *image;
    int owner;
    int n_references;
    struct entry *chain;
};

struct share {
    int n_sessions;
    size_t n_states;
};

struct session_quota {
    struct session_quota_options options;
    struct share *shares; /* [n_shares], by owner */
    int n_shares;
    struct entry **buckets; /* [n_buckets], a power of two */
    size_t n_buckets, n_entries;
};

enum { FIRST_BUCKETS = 64 };

enum status session_quota_open(struct session_quota **out,
                               const struct session_quota_options *options, struct error *err)
{
    struct session_quota *q = calloc(1, sizeof(*q));
    if (q)
        q->buckets = calloc(FIRST_BUCKETS, sizeof(struct entry *));
    if (!q || !q->buckets) {
        free(q);
        return fail(err, STATUS_NOMEM, "out of memory for quotas");
    }
    q->options = *options;
    q->n_buckets = FIRST_BUCKETS;
    *out = q;
    return STATUS_OK;
}

void session_quota_close(struct session_quota *q)
{
    if (!q)
        return;
    for (size_t i = 0; i < q->n_buckets; i++)
        while (q->buckets[i]) {
            struct entry *e = q->buckets[i];
            q->buckets[i] = e->chain;
            free(e);
        }
    free(q->buckets);
    free(q->shares);
    free(q);
}

/* ---- the table ---- */

static struct entry **bucket_of(struct entry **buckets, size_t n, int owner, const void *image)
{
    uint64_t hash = ((uint64_t)(uintptr_t)image ^ (uint64_t)owner << 48) * 0x9E3779B97F4A7C15ull;
    return &buckets[hash >> 32 & (n - 1)];
}

static struct entry **find(const struct session_quota *q, int owner, const void *image)
{
    struct entry **link = bucket_of(q->buckets, q->n_buckets, owner, image);
    while (*link && ((*link)->image != image || (*link)->owner != owner))
        link = &(*link)->chain;
    return link;
}

/* Twice the buckets, or as many as before when memory is short. */
static void grow(struct session_quota *q)
{
    size_t n = 2 * q->n_buckets;
    struct entry **buckets = q->n_entries < q->n_buckets ? NULL : calloc(n, sizeof(struct entry *));
    for (size_t i = 0; buckets && i < q->n_buckets; i++)
        while (q->buckets[i]) {
            struct entry *e = q->buckets[i], **to = bucket_of(buckets, n, e->owner, e->image);
            q->buckets[i] = e->chain;
            e->chain = *to;
            *to = e;
        }
    if (!buckets)
        return;
    free(q->buckets);
    q->buckets = buckets;
    q->n_buckets = n;
}

static const struct share *share_of(const struct session_quota *q, int owner)
{
    static const struct share nothing;
    return owner >= 0 && owner < q->n_shares ? &q->shares[owner] : &nothing;
}

/* NULL for owners that are not counted, and when memory is short. */
static struct share *own_share(struct session_quota *q, int owner)
{
    if (owner < 0)
        return NULL;
    if (owner >= q->n_shares) {
        int n = owner + 1;
        struct share *grown = realloc(q->shares, (size_t)n * sizeof(*grown));
        if (!grown)
            return NULL;
        for (int i = q->n_shares; i < n; i++)
            grown[i] = (struct share){0};
        q->shares = grown;
        q->n_shares = n;
    }
    return &q->shares[owner];
}

/* ---- counting ---- */

void session_quota_count_session(struct session_quota *q, int owner, int change)
{
    struct share *share = own_share(q, owner);
    if (share && share->n_sessions + change >= 0)
        share->n_sessions += change;
}

static void add_state(struct session_quota *q, struct share *share, int owner, const void *image)
{
    struct entry **link = find(q, owner, image);
    if (*link) {
        (*link)->n_references++;
        return;
    }
    struct entry *e = malloc(sizeof(*e));
    if (!e)
        return;
    *e = (struct entry){.image = image, .owner = owner, .n_references = 1};
    *link = e;
    share->n_states++;
    q->n_entries++;
    grow(q);
}

static void remove_state(struct session_quota *q, struct share *share, int owner, const void *image)
{
    struct entry **link = find(q, owner, image), *e = *link;
    if (!e || --e->n_references > 0)
        return;
    *link = e->chain;
    free(e);
    share->n_states--;
    q->n_entries--;
}

void session_quota_count_state(struct session_quota *q, int owner, const void *image, int change)
{
    struct share *share = image ? own_share(q, owner) : NULL;
    if (share && change > 0)
        add_state(q, share, owner, image);
    else if (share)
        remove_state(q, share, owner, image);
}

/* ---- checking ---- */

enum status session_quota_check_session(const struct session_quota *q, int owner, struct error *err)
{
    int n = share_of(q, owner)->n_sessions;
    if (owner < 0 || !q->options.max_sessions || n < q->options.max_sessions)
        return STATUS_OK;
    return fail(err, STATUS_BUSY,
                "This API key has %d sessions, as many as --max-sessions-per-key permits; delete "
                "one, or wait until one expires.",
                n);
}

enum status session_quota_check_state(const struct session_quota *q, int owner, const void *gone,
                                      struct error *err)
{
    size_t n = share_of(q, owner)->n_states, bytes = q->options.image_bytes;
    if (owner < 0 || !q->options.max_bytes)
        return STATUS_OK;
    const struct entry *e = gone ? *find(q, owner, gone) : NULL;
    size_t after = n + 1 - (e && e->n_references == 1);
    if (after * bytes <= q->options.max_bytes)
        return STATUS_OK;
    return fail(err, STATUS_BUSY,
                "This API key's sessions and snapshots have %zu states of %zu bytes; "
                "--max-stored-mb-per-key permits %zu bytes. Delete some.",
                n, bytes, q->options.max_bytes);
}
