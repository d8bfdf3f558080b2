/* quotas.c - see quotas.h */
#include "server/quotas.h"

#include <stdlib.h>
#include <string.h>

static enum status add_keys(struct quotas *q, int n_keys, struct error *err)
{
    int64_t *running = realloc(q->running, (size_t)n_keys * sizeof(*running));
    if (!running)
        return fail(err, STATUS_NOMEM, "out of memory for the quota of an API key");
    memset(running + q->n_keys, 0, (size_t)(n_keys - q->n_keys) * sizeof(*running));
    q->running = running;
    q->n_keys = n_keys;
    return STATUS_OK;
}

enum status quotas_take(struct quotas *q, int key, int64_t n, struct error *err)
{
    if (key < 0 || !q->max_running)
        return STATUS_OK;
    if (n > q->max_running)
        return fail_field(err, STATUS_INVALID, "n",
                          "This request asks for %lld sequences; an API key may have %lld running.",
                          (long long)n, (long long)q->max_running);
    enum status st = key >= q->n_keys ? add_keys(q, key + 1, err) : STATUS_OK;
    if (st)
        return st;
    if (n > q->max_running - q->running[key])
        return fail(err, STATUS_BUSY,
                    "This API key has %lld sequences running or queued, and asks for %lld more; it "
                    "may have %lld.",
                    (long long)q->running[key], (long long)n, (long long)q->max_running);
    q->running[key] += n;
    return STATUS_OK;
}

void quotas_give_back(struct quotas *q, int key, int64_t n)
{
    if (key < 0 || !q->max_running || !n)
        return;
    CHECK(key < q->n_keys && q->running[key] >= n);
    q->running[key] -= n;
}

void quotas_free(struct quotas *q)
{
    free(q->running);
    *q = (struct quotas){0};
}
