/* workers.h - a few threads for work that would hold up the io thread: parsing and tokenizing
 * large bodies.
 *
 * Threads: submit and reap by the io thread; run on a worker; done on the io thread by reap.
 * Memory:  an item is embedded in the caller's own struct and must live until done was called.
 * Errors:  the queue is bounded by the connections; submit does not fail.
 */
#ifndef LATTE_SERVER_WORKERS_H
#define LATTE_SERVER_WORKERS_H

#include "engine/base/error.h"

struct workers;

struct work_item {
    void (*run)(struct work_item *item);  /* worker thread */
    void (*done)(struct work_item *item); /* io thread, exactly once, also at shutdown */
    struct work_item *next;               /* workers' own */
};

/* notify is called (any thread) when an item is ready to be reaped. */
enum status workers_open(struct workers **out, int n_threads, void (*notify)(void *context),
                         void *context, struct error *err);
void workers_submit(struct workers *w, struct work_item *item);
void workers_reap(struct workers *w);
/* Finish what was submitted (run and done), join, release. By the io thread or after it. */
void workers_close(struct workers *w);

#endif
