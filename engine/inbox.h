/* inbox.h - where other threads meet the engine thread: the bounded queue of jobs, the ready
 * list of jobs with news for their readers, the bell that wakes the engine, the counters.
 *
 * Threads: submit, take_ready, drain and stats by any; the others by the engine thread. One
 *          lock guards queue, list, counters and every job's links; no job's lock is ever
 *          taken under it. The bell takes no lock at all, so it may be rung under any.
 * Memory:  intrusive lists, nothing is allocated. A job in the queue or on the list is held.
 * Errors:  of submission only: BUSY, SHUTDOWN, DEVICE.
 */
#ifndef LATTE_ENGINE_INBOX_H
#define LATTE_ENGINE_INBOX_H

#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "engine/base/error.h"
#include "engine/engine.h"
#include "engine/job.h"

/* rung stays set until the engine looks, so that posts do not pile up; by_job beside it when
 * a job in a slot or in the queue may have been cancelled, or a full ring has room. */
struct bell {
    sem_t posts;
    atomic_bool rung, by_job;
};

struct inbox {
    struct bell bell;
    int max_queue;

    pthread_mutex_t lock; /* guards all that follows, and every job's links */
    struct job *queue_first, *queue_last;
    struct job *ready_first, *ready_last;
    struct engine_stats stats;
    bool draining;
    struct error failure; /* status 0: none */
};

void inbox_init(struct inbox *in, int n_slots, int max_queue);
void inbox_free(struct inbox *in); /* releases what is still on the ready list */

/* Queue a job with a reference of the engine's own. BUSY when n_slots + max_queue jobs are
 * running or waiting. */
enum status inbox_submit(struct inbox *in, struct job *job, struct error *err);

/* The longest waiting job, NULL if there is none. admit passes over those that wait for a state,
 * and counts what it gives as running, until leave. */
struct job *inbox_take(struct inbox *in);
struct job *inbox_admit(struct inbox *in);
void inbox_leave(struct inbox *in);

/* Take the jobs that are cancelled or overdue at now_ns out of the queue, as a list by
 * queue_next. Sets the earliest deadline of those that stay, INT64_MAX for none. */
struct job *inbox_sweep(struct inbox *in, int64_t now_ns, int64_t *next_deadline_ns);
bool inbox_is_over(const struct job *job, int64_t now_ns);

/* The ready list; a job is on it at most once. */
void inbox_push_ready(struct inbox *in, struct job *job);
struct job *inbox_take_ready(struct inbox *in);

/* Refuse jobs from now on: with SHUTDOWN, or with the device's failure. */
void inbox_drain(struct inbox *in);
void inbox_fail(struct inbox *in, const struct error *failure);

void inbox_ring(void *bell);
void inbox_ring_by_job(void *bell);
/* Whether the bell was rung since the last time, and whether a job did. */
bool inbox_answer(struct inbox *in, bool *by_job);
/* Until the bell rings or the clock says until_ns (INT64_MAX: no limit). May return early. */
void inbox_sleep(struct inbox *in, int64_t until_ns);

/* Add to the counters (not the gauges); read all. */
void inbox_count(struct inbox *in, const struct engine_stats *more);
void inbox_stats(struct inbox *in, struct engine_stats *out);

#endif
