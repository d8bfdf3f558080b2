/* plan.h - the slots of a scheduler, and which of them the next step serves.
 *
 * A step takes one row of every decoding slot, of at most max_batch in turns: who was served
 * goes to the end of the line. Then chunks of prompts, in turns too, while the step has room.
 * Chunks begin at multiples of chunk_tokens (of at most 256 for scored prompts, whose rows all
 * need logits) from the job's first token and are taken whole, so which rows share a chunk does
 * not depend on the load.
 *
 * A step may be planned while the one before it still runs: a slot then counts what it has on
 * its way, tokens and places in its job's ring. A slot whose job ends meanwhile is free at
 * once; its generation tells that a queued share has lost its owner.
 *
 * Chunks end at a job's marks too. Once the chunk before a mark is queued the slot is held, and
 * gets no further rows, until the scheduler has saved its state. A slot whose job gets no more rows
 * at all may be kept from others in the same way.
 *
 * Slots wait in lists, so planning costs what the step serves and not what the model holds.
 *
 * Threads: the engine thread, open and close apart.
 * Memory:  all taken in plan_open. Jobs and what their requests point to are borrowed.
 * Errors:  NOMEM in plan_open.
 */
#ifndef LATTE_ENGINE_PLAN_H
#define LATTE_ENGINE_PLAN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/base/error.h"
#include "engine/job.h"
#include "engine/stepper.h"

struct plan_limits {
    int n_slots;
    int max_batch; /* decoding rows of one step */
    int max_rows, max_logit_rows;
    int chunk_tokens;
    int64_t max_position; /* of the model; 0: none */
};

/* A place in the model for a job. */
struct slot {
    struct job *job; /* NULL: the slot is free */
    const struct job_request *request;
    int64_t deadline_ns; /* of the job, 0 for none */
    uint32_t generation; /* a new one for each job */
    uint64_t n_before;   /* tokens the slot's state had seen before the prompt's first */
    size_t n_fed;        /* prompt tokens queued, or seen before */
    int run;             /* of request->runs, where n_fed is */
    size_t run_begin;    /* prompt token with which that run begins */
    int n_marks;         /* marks of the job that were saved */
    bool held;           /* the rows before the next mark are on their way */
    int64_t n_draws;     /* output tokens queued to be drawn */
    int64_t max_draws;   /* output tokens it may have: max_tokens, or less at the position limit */
    int64_t n_output;    /* output tokens that came back */
    int n_coming;        /* entries of the job's ring that queued steps will bring */
    enum job_finish how; /* it gets no further rows, and ends like this; FINISH_NONE: it goes on */
    int n_saves;         /* of its state, that are under way: the scheduler's */
    struct slot_list *list; /* where it waits; NULL: all its rows are queued */
    struct slot *previous, *next;
};

struct slot_list {
    struct slot *first, *last;
    int n;
};

/* What a slot has in a planned step. Its results are n_scores scores, then a draw. */
struct share {
    int slot;
    uint32_t generation;
    size_t from;       /* first prompt token of the chunk */
    int n_prompt_rows; /* length of the chunk; 0: a decoding row */
    int n_scores;
    int n_entries; /* of the job's ring: results, and the first token of a scored prompt */
    bool draws;
};

/* One step: what the stepper gets, and what to make of its results. */
struct plan {
    struct stepper_seq *seqs; /* [max_seqs], each with its share */
    struct share *shares;     /* [max_seqs] */
    int32_t *targets;         /* [max_logit_rows] of scored rows */
    int n_seqs, n_rows, n_logit_rows;
};

struct planner;

enum status planner_open(struct planner **out, const struct plan_limits *limits, struct error *err);
void planner_close(struct planner *p); /* accepts NULL */

enum status plan_open(struct plan *plan, const struct plan_limits *limits, struct error *err);
void plan_close(struct plan *plan); /* accepts a zeroed or half-built one */

/* Put a job, with the caller's reference, in a free slot, `wanted` if that is one: NULL when
 * there is none. */
struct slot *planner_enter(struct planner *p, struct job *job, int wanted);
/* The slot's job gets no further rows, and what it has on its way is nobody's, but the slot is not
 * free yet. */
void planner_end(struct planner *p, struct slot *slot, enum job_finish how);
/* The slot's job is over: it is free. The reference is the caller's again. keeps_state: what
 * the slot holds may be wanted again, so it is the last to be taken by another. */
void planner_leave(struct planner *p, struct slot *slot, bool keeps_state);

/* Slot i, free or not; and back. */
struct slot *planner_slot(const struct planner *p, int i);
int planner_index(const struct planner *p, const struct slot *slot);
bool planner_has_room(const struct planner *p);

/* Fill the plan with the next step, n_seqs 0 if there is nothing to do, and count it as queued.
 * Jobs whose ring is full are passed over until planner_retry. */
void planner_next(struct planner *p, struct plan *plan);
void planner_retry(struct planner *p);

/* The state at the slot's next mark was saved. */
void planner_release(struct planner *p, struct slot *slot);

/* The owner of a share, NULL when its job has left. */
struct slot *planner_owner(const struct planner *p, const struct share *share);
/* Rows of a scored prompt's chunk, for chunks of so many tokens. */
int planner_scored_chunk(int chunk_tokens);

#endif
