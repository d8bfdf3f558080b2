/* scheduler.h - the thread of a device: queue, slots, steps, deadlines.
 *
 * A job waits in a bounded queue (first in, first out) until one of n_slots slots is free. What
 * a step serves is said in plan.h: every decoding slot, or max_batch of them in turns, then
 * chunks of prompts while there is room. So a decoding job waits for max_rows rows at most from
 * one of its turns to the next, however many prompts arrive. Before each step, cancelled and
 * overdue jobs end, those in the queue too. A job whose ring has no room misses steps until its
 * reader makes some. With nothing to do the thread sleeps.
 *
 * Where the stepper takes a second step while the first runs, it is planned without the first
 * one's tokens. What a job has there that ended in the first is dropped when it comes back.
 *
 * A job whose state is wanted ends when that is in its image: the copy is begun when its last rows
 * are back, goes on beside the steps of others, and is looked after from one step to the next. So
 * it is with marks. The slot rests meanwhile. Neither a cancellation nor a deadline
 * ends the job before it is over.
 *
 * Threads: open, drain and close by one thread; submit, take_ready, stats and is_resident by
 *          any. The engine thread, started by open, drives the stepper.
 * Memory:  all taken in scheduler_open; the engine thread allocates nothing.
 * Errors:  as in engine.h. Whatever fails in a step is a DEVICE error and sticky: all jobs end
 *          with it, and later ones are refused.
 */
#ifndef LATTE_ENGINE_SCHEDULER_H
#define LATTE_ENGINE_SCHEDULER_H

#include <stdbool.h>
#include <stddef.h>

#include "engine/base/error.h"
#include "engine/engine.h"
#include "engine/job.h"
#include "engine/model.h"

struct scheduler;

struct scheduler_options {
    int n_slots, max_queue;
    int max_batch;                 /* decoding rows of one step at most; 0: n_slots */
    int step_tokens, chunk_tokens; /* as in engine.h */
    int depth;                     /* of the stepper; 0: as the backend */
    size_t max_prompt_tokens;      /* 0: no limit */
    void (*wake)(void *context);
    void *wake_context;
};

/* The max_rows and max_logit_rows that the model must be opened with. max_rows is step_tokens,
 * or more where a prompt's whole chunk would not fit beside as many decoding rows as there can
 * be: max_batch, and n_slots - 1. */
void scheduler_limits(const struct scheduler_options *options, int *max_rows, int *max_logit_rows);

/* Start serving jobs with a model, borrowed until scheduler_close; nobody else may use it. */
enum status scheduler_open(struct scheduler **out, struct model *model,
                           const struct scheduler_options *options, struct error *err);
/* Ends queued and running jobs with SHUTDOWN and joins the thread. Accepts NULL. */
void scheduler_close(struct scheduler *s);

/* As the engine_ functions of the same names. */
enum status scheduler_submit(struct scheduler *s, struct job *job, struct error *err);
struct job *scheduler_take_ready(struct scheduler *s);
void scheduler_drain(struct scheduler *s);
void scheduler_stats(struct scheduler *s, struct engine_stats *out);

/* Whether a slot of this device holds the state of a complete image, so that a job from it copies
 * nothing. Any thread; false where slots are host memory. */
bool scheduler_is_resident(const struct scheduler *s, const struct image *image);

#endif
