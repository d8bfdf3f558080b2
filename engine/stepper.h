/* stepper.h - steps with the tokens drawn from them: what the scheduler drives.
 *
 * One interface over the two ways of drawing. A backend that samples on the device queues a
 * step behind the one that is running, so the tokens a step feeds need not be known to the host
 * when it is queued. For the others the stepper runs the model and the host's sampler at once;
 * results are the same either way (sampler.h).
 *
 * Threads: the engine thread, open and close apart.
 * Memory:  all taken in stepper_open. The model is borrowed.
 * Errors:  DEVICE and whatever the model says; afterwards only close.
 */
#ifndef LATTE_ENGINE_STEPPER_H
#define LATTE_ENGINE_STEPPER_H

#include <stdbool.h>
#include <stdint.h>

#include "engine/base/error.h"
#include "engine/model.h"
#include "engine/sampler.h"

struct stepper;

struct stepper_options {
    int n_slots, max_rows, max_logit_rows;
    int depth; /* 0: as the backend. 2 on a host backend holds results back by a step: tests */
};

/* The rows one slot brings to a step, and what is wanted of them. */
struct stepper_seq {
    int slot;
    int n_rows;
    const int32_t *tokens;  /* [n_rows], copied; NULL: one row, the token last drawn here */
    bool draws;             /* draw a token from the last row */
    uint64_t draw_position; /* of that token, sampler_draw's position */
    int64_t n_output;       /* tokens drawn before it */
    int n_top;              /* -1: no scores; else each row scores its target with so many tops */
    const int32_t *targets; /* [n_rows], -1 for none; copied */
};

enum status stepper_open(struct stepper **out, struct model *model,
                         const struct stepper_options *options, struct error *err);
void stepper_close(struct stepper *s); /* accepts NULL */

/* Steps that may be queued and not yet collected: 1 or 2. */
int stepper_depth(const struct stepper *s);

/* A new request in a slot: these parameters (copied) and, with `empty`, the state before any
 * token; without, what the slot holds. */
enum status stepper_admit(struct stepper *s, int slot, const struct sampling_params *params,
                          bool empty, struct error *err);

/* After it: tokens [n] of the request's prompt that its state has seen, so that no step feeds
 * them; a repetition penalty counts them all the same. */
enum status stepper_note(struct stepper *s, int slot, const int32_t *tokens, size_t n,
                         struct error *err);

/* Queue a step of n_seqs sequences, each slot at most once. */
enum status stepper_queue(struct stepper *s, const struct stepper_seq *seqs, int n_seqs,
                          struct error *err);

/* Wait for the oldest step. results: for each sequence in order its scores (one per row with a
 * target), then its draw; valid until the next call of stepper_queue. */
enum status stepper_collect(struct stepper *s, const struct sampled **results, struct error *err);

#endif
