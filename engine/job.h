/* job.h - one generation: what the front end and the engine thread share.
 *
 * Life: job_new -> engine_submit -> tokens appear in its ring -> finished -> both sides release.
 * The reader (io thread, or latte-run's main) takes tokens with job_read. When nothing is
 * there it parks with job_park; the engine puts parked jobs that grew, or finished, on its
 * ready list and wakes the reader once per step. When the ring is full the job waits its turn
 * and job_read rings the engine's bell; so does job_cancel.
 *
 * Threads: job_read, job_park, job_cancel by the reader; job_put, job_finish by the engine
 *          thread; the lock guards the fields listed in the .c. job_release by any holder.
 * Memory:  the job owns copies of its parameters, and of its prompt unless that is shared.
 *          Counted references: the reader's, the engine's, and the ready list's while the job
 *          is on it; the last release frees.
 *          A job outlives the engine if its reader still holds it.
 * Errors:  job_new: INVALID, NOMEM. Nothing else can fail.
 */
#ifndef LATTE_ENGINE_JOB_H
#define LATTE_ENGINE_JOB_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/base/error.h"
#include "engine/image.h"
#include "engine/prompt.h"
#include "engine/sampler.h"

struct job;

/* Tokens as they came in one turn: first a prompt in chunks, then outputs one by one. */
struct job_run {
    size_t n_chunked, n_single;
};

enum { JOB_MAX_MARKS = 4 };

/* A place in a prompt where the state is kept, for others to begin from. A chunk of the prompt
 * ends there, so a job from that image, with the rest of the prompt, is bit-equal to this one;
 * against a prompt that is cut elsewhere the tolerance of chunks holds. */
struct job_mark {
    size_t at;           /* tokens of the prompt before it; over n_seen, up to n_prompt */
    struct image *image; /* new: filled when the job gets there, nothing pending. Held by the job */
};

struct job_request {
    const int32_t *prompt; /* [n_prompt], at least 1 token, each in 0..V-1; copied if not shared */
    size_t n_prompt;
    struct prompt *shared; /* the holder of `prompt`, which the job then holds too; or NULL */
    int64_t max_tokens;    /* output tokens, 0 or more (0: only process and score the prompt) */
    int64_t deadline_ms;   /* from submission; 0 for none */
    int prompt_logprobs;   /* -1: none; k: score each prompt token, with the top k */
    struct sampling_params sampling; /* copied, logit_bias too */
    struct image *from;              /* the state that the prompt continues, its pending tokens
                                      * first; NULL: that before any token. Held by the job */
    struct image *into;              /* new: filled with the state that the job leaves when it
                                      * ends with STOP or LENGTH. Held by the job; NULL: none */
    const struct job_run *runs;      /* [n_runs], copied: a replay. The prompt is made of these runs
                                      * and is cut where they were, so that the state is the same
                                      * bits as theirs. NULL: one run, chunked */
    int n_runs;
    /* Tokens at the front of the prompt that `from` has seen as its last ones: they are not fed
     * again, but penalties know them. Not for scored prompts. */
    size_t n_seen;
    int n_marks;
    struct job_mark marks[JOB_MAX_MARKS]; /* [n_marks], in ascending order */
    struct job *after; /* `from` is one of its marks' images: wait in the queue until it is filled,
                        * on the same device. Held by the job; NULL: `from` is complete */
    void *user;        /* the reader's own pointer, see job_user */
};

enum job_finish {
    FINISH_NONE,   /* still running */
    FINISH_STOP,   /* eos or a stop token, which is the last token in the ring */
    FINISH_LENGTH, /* max_tokens, or the model's position limit */
    FINISH_CANCELLED,
    FINISH_ERROR, /* job_snapshot's error tells; TIMEOUT for a deadline */
};

/* One entry of the ring. Prompt scores come first, in order, then outputs. */
struct job_token {
    int32_t token;
    bool is_prompt;  /* a scored prompt token; its first has logprob NAN */
    float logprob;   /* when asked for, else NAN */
    int64_t time_ns; /* of an output: when job_put got it, CLOCK_MONOTONIC */
    int n_top;
    struct token_logprob top[SAMPLER_MAX_TOP_LOGPROBS];
};

/* A consistent copy of a job's progress. Times are CLOCK_MONOTONIC nanoseconds, 0 if not yet. */
struct job_snapshot {
    enum job_finish finish;
    struct error error;    /* filled for FINISH_ERROR */
    size_t n_prompt_done;  /* prompt tokens processed, those seen before included */
    int n_marks_done;      /* marks whose images are complete */
    size_t n_output;       /* tokens generated, also those not read yet */
    bool stopped_by_token; /* FINISH_STOP: the last output token is the stop token */
    int64_t submitted_ns, admitted_ns, first_token_ns, finished_ns;
};

enum status job_new(struct job **out, const struct job_request *request, struct error *err);
void job_hold(struct job *job);
void job_release(struct job *job); /* accepts NULL */

/* Reader side. */
/* Copy up to max tokens out of the ring, in order; returns how many. */
size_t job_read(struct job *job, struct job_token *out, size_t max);
/* True: the ring is empty and the job unfinished, and the reader will be woken when that
 * changes (through the ready list). False: there is something to read, or it has finished, and
 * nobody will wake a reader that goes away now. */
bool job_park(struct job *job) __attribute__((warn_unused_result));
void job_snapshot(struct job *job, struct job_snapshot *out);
/* Ask to stop; takes effect before the next step. Harmless when finished. */
void job_cancel(struct job *job);
/* Block until there is something to read or the job has finished (programs without a loop). */
void job_wait(struct job *job);
void *job_user(const struct job *job);
void job_set_user(struct job *job, void *user);

/* Engine side. */
const struct job_request *job_request(const struct job *job);
/* The job was accepted now: its times and deadline count from here. ring(context) is called, at
 * times under the job's lock, when a cancelled job or room in a full ring wants the engine's
 * attention; it must not block or take a lock. Until job_finish, which ends its use. */
void job_attach(struct job *job, void (*ring)(void *context), void *context);
/* It was refused after all: as before job_attach. */
void job_detach(struct job *job);
/* CLOCK_MONOTONIC nanoseconds; 0 for none. Valid after job_attach. */
int64_t job_deadline_ns(const struct job *job);
bool job_is_cancelled(const struct job *job); /* takes no lock */
/* Places in the ring, all together: a step may put at most so many tokens at once. */
size_t job_ring_size(const struct job *job);
/* Whether n places (1..job_ring_size) are free. If not, the bell rings when they are. */
bool job_has_room(struct job *job, size_t n);
/* Append a token (room must be there). Returns true when the reader was parked: the caller
 * then puts the job on the ready list; it is not parked any more. */
bool job_put(struct job *job, const struct job_token *token);
bool job_finish(struct job *job, enum job_finish how, const struct error *err); /* likewise */
void job_mark_admitted(struct job *job);
void job_mark_prompt_done(struct job *job, size_t n_prompt_done);
void job_mark_saved(struct job *job); /* the next of its marks */
/* Whether the state that it begins from is there. Takes no lock. */
enum job_start {
    JOB_READY,
    JOB_WAITS, /* for a mark of `after` */
    JOB_LOST,  /* which ended before it got there */
};
enum job_start job_start(const struct job *job);
/* The device that has the job: of engine_submit, for those that come after it. */
void job_set_unit(struct job *job, int unit);
int job_unit(const struct job *job);

/* CLOCK_MONOTONIC now, in nanoseconds. */
int64_t job_clock_ns(void);

/* Intrusive links, guarded by the scheduler's lock. */
struct job_links {
    struct job *queue_next, *ready_next;
    bool on_ready_list;
};
struct job_links *job_links(struct job *job);

#endif
