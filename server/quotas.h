/* quotas.h - how much each API key has running.
 *
 * Counted are sequences (choices of a request), running or queued, and requests that wait for a
 * session's turn. Where the API is open there are no keys and no quotas.
 *
 * Threads: the io thread. Memory: a counter per key. Errors: BUSY, and INVALID for what could
 * never be had; NOMEM.
 */
#ifndef LATTE_SERVER_QUOTAS_H
#define LATTE_SERVER_QUOTAS_H

#include <stdint.h>

#include "engine/base/error.h"

struct quotas {
    int64_t max_running; /* of a key; 0: no limit */
    int64_t *running;    /* [n_keys] */
    int n_keys;          /* with a counter so far */
};

/* Take n more for the key with this index, or negative for none. */
enum status quotas_take(struct quotas *q, int key, int64_t n, struct error *err);
void quotas_give_back(struct quotas *q, int key, int64_t n);
void quotas_free(struct quotas *q);

#endif
