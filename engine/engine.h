/* engine.h - tokens in, tokens out: the facade of a served model.
 *
 * engine_open loads a model directory, sizes all memory and starts the engine thread, which
 * alone runs steps. Jobs are submitted to a bounded queue from any thread.
 *
 * Threads: open, drain and close by one thread; submit, stats and take_ready by any.
 * Memory:  sized in engine_open; afterwards the engine allocates nothing.
 * Errors:  as below; a device failure ends running jobs with DEVICE and is sticky.
 */
#ifndef LATTE_ENGINE_ENGINE_H
#define LATTE_ENGINE_ENGINE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/base/error.h"
#include "engine/job.h"
#include "weights/checkpoint.h"

struct engine;

struct engine_options {
    const char *model_dir;
    const char *device;       /* "auto", "cpu", "ref" */
    const char *weight_dtype; /* "auto" (as the file), "f32", "bf16" */
    int n_threads;            /* CPU pool; 0: one per core this process may use */
    int n_slots;              /* sessions decoded together, 1..4096 */
    int max_queue;            /* jobs waiting for a slot, 1.. */
    int step_tokens;          /* rows of one step at most: decode rows and prompt chunks. Raised
                               * to n_slots - 1 + chunk_tokens where it is less, so that no
                               * prompt starves. */
    int chunk_tokens;         /* prompt rows one sequence brings to a step at most (256 at most
                               * where the prompt is scored). Chunks begin at multiples of it,
                               * so a result does not depend on the load. */
    size_t max_prompt_tokens; /* longer prompts are TOO_LARGE at submission; 0: no limit */
    progress_fn *progress;    /* loading, may be NULL */
    void *progress_context;
    void (*wake)(void *context); /* called by the engine thread, at most once per step, when
                                  * jobs are on the ready list; must not block; may be NULL */
    void *wake_context;
};

/* Defaults: auto, auto, 0 threads, 64 slots, queue 1024, 256 step tokens, 128 chunk tokens. */
void engine_options_init(struct engine_options *o);

enum status engine_open(struct engine **out, const struct engine_options *options,
                        struct error *err);

/* Ends queued and running jobs with SHUTDOWN after the step that is on its way, joins the thread,
 * releases everything, the ready list too: a reader that is to see the end asks its job. No other
 * thread may be in a call, or call later; jobs live on. wake may be called until this returns.
 * Accepts NULL. */
void engine_close(struct engine *e);

/* Queue a job; the engine takes a reference of its own. BUSY when the queue is full, SHUTDOWN
 * when draining, DEVICE when the device failed, INVALID or TOO_LARGE for a request out of range.
 * A refused job is as before and may be submitted again; an accepted one never again. Looks at
 * every token of the prompt, waits for nothing but a short lock. */
enum status engine_submit(struct engine *e, struct job *job, struct error *err);

/* The next job that was parked and now has tokens or has finished; NULL when there is none.
 * The caller gets the list's reference and releases it. */
struct job *engine_take_ready(struct engine *e);

/* Refuse new jobs from now on; those queued or running go on. */
void engine_drain(struct engine *e);

struct engine_info {
    const struct model_config *config; /* borrowed */
    struct generation_defaults generation;
    const char *fingerprint; /* of the model, 32 hex characters */
    const char *backend;     /* "cpu" */
    const char *weight_dtype;
    int n_threads, n_slots;
    int64_t n_parameters;
    size_t weight_bytes;  /* resident */
    size_t state_bytes;   /* of one session */
    int64_t max_position; /* tokens a session may reach, 0: no limit */
};
void engine_info(const struct engine *e, struct engine_info *out);

/* Counters since the start, and gauges of now. */
struct engine_stats {
    uint64_t n_steps, n_prompt_tokens, n_output_tokens;
    uint64_t step_ns; /* time spent in steps */
    int n_running, n_waiting, n_slots;
    bool failed; /* the device is gone */
};
void engine_stats(const struct engine *e, struct engine_stats *out);

#endif
