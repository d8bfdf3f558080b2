/* prompt.c - see prompt.h */
#include "engine/prompt.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

struct prompt {
    atomic_int n_references;
    int32_t ids[];
};

enum status prompt_new(struct prompt **out, const int32_t *ids, size_t n, struct error *err)
{
    CHECK(n > 0);
    struct prompt *p = NULL;
    if (n <= (SIZE_MAX - sizeof(*p)) / sizeof(*ids))
        p = malloc(sizeof(*p) + n * sizeof(*ids));
    if (!p)
        return fail(err, STATUS_NOMEM, "out of memory for a prompt of %zu tokens", n);
    atomic_init(&p->n_references, 1);
    memcpy(p->ids, ids, n * sizeof(*ids));
    *out = p;
    return STATUS_OK;
}

void prompt_hold(struct prompt *p)
{
    CHECK(atomic_fetch_add(&p->n_references, 1) > 0);
}

void prompt_release(struct prompt *p)
{
    if (p && atomic_fetch_sub(&p->n_references, 1) == 1)
        free(p);
}

const int32_t *prompt_ids(const struct prompt *p)
{
    return p->ids;
}
