/* pool.h - a fixed set of threads that share the items of one loop at a time.
 *
 * A loop ends when its items are done, not when every thread has turned up: a worker that the
 * system has put aside costs nothing unless it holds an item. Idle workers look for work for
 * some microseconds, then sleep; the caller waits for the last items in the same way.
 *
 * Threads: pool_run by one thread at a time, which works too; items of one loop run at the
 *          same time and in any order.
 * Memory:  all of it is taken in pool_open.
 * Errors:  NOMEM, and INTERNAL when a thread cannot be started.
 */
#ifndef LATTE_ENGINE_POOL_H
#define LATTE_ENGINE_POOL_H

#include "engine/base/error.h"

struct pool;

enum { POOL_MAX_THREADS = 1024 };

/* One item of a loop. thread is 0 for the caller of pool_run, 1..n_threads-1 for workers: no
 * two items run under the same number at the same time, so it may index scratch memory. */
typedef void pool_fn(void *context, int item, int thread);

/* n_threads counts the caller: 1 starts none. */
enum status pool_open(struct pool **out, int n_threads, struct error *err);
void pool_close(struct pool *p); /* accepts NULL; no loop may be running */
int pool_n_threads(const struct pool *p);

/* Call fn for items 0..n_items-1 and return when all are done. What the items wrote is
 * visible to the caller. Not to be called from an item. */
void pool_run(struct pool *p, int n_items, pool_fn *fn, void *context);

#endif
