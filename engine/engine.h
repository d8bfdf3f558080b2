/* engine.h - tokens in, tokens out: the facade of a served model.
 *
 * engine_open loads a model directory, sizes all memory and starts an engine thread for each
 * device, which alone runs that device's steps. Jobs are submitted from any thread; each goes to
 * the bounded queue of the device with the least to do, at a tie where the state is that it goes
 * on from, and stays there.
 *
 * Threads: open, drain and close by one thread; submit, stats, take_ready and is_resident by any.
 * Memory:  sized in engine_open; afterwards the engine allocates nothing.
 * Errors:  as below; a device failure ends the device's jobs with DEVICE and is sticky.
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

enum { ENGINE_MAX_DEVICES = 16, ENGINE_MAX_SLOTS = 65536 };

struct engine_options {
    const char *model_dir;
    const char *device;       /* "auto" (cuda:0 where there is one, else cpu), "cpu", "ref", "cuda",
                               * "cuda:N", or several GPUs: "cuda:0,cuda:1" */
    const char *weight_dtype; /* "auto" (as the file), "f32", "bf16"; on a GPU also "int8" */
    const char *window_dtype; /* of attention windows: "auto", "f32"; on a GPU also "bf16", "f8".
                               * auto: f32, on a GPU bf16 unless weights are f32 */
    bool deterministic;       /* GPU: the same bits in a batch of any size */
    int n_threads;            /* CPU pool; 0: one per core this process may use */
    int n_slots;              /* sessions that are resident on a device, up to ENGINE_MAX_SLOTS;
                               * 0: 64 on a CPU, on a GPU as many as fit */
    double device_memory_share; /* of a GPU's free memory that may be taken, over 0 up to 1 */
    int max_batch;              /* most of them that decode in one step, in turns if there are
                                 * more; 0: on a CPU all, on a GPU 1024 */
    int max_queue;              /* jobs waiting for a slot of a device, 1.. */
    int step_tokens;            /* rows of one step at most: decode rows and prompt chunks. Raised
                                 * where a chunk would not fit beside max_batch decode rows, so
                                 * that no prompt starves. 0: 256, on a GPU 8192 */
    int chunk_tokens;           /* prompt rows one sequence brings to a step at most (256 at most
                                 * where the prompt is scored). Chunks begin at multiples of it,
                                 * so a result does not depend on the load. 0: 128, on a GPU 4096 */
    bool warm_up;               /* GPU: try all sizes of steps while opening; otherwise the first
                                 * step of each size takes up to 0.1 s longer */
    size_t max_prompt_tokens;   /* longer prompts are TOO_LARGE at submission; 0: no limit */
    progress_fn *progress;      /* loading, may be NULL */
    void *progress_context;
    void (*wake)(void *context); /* called by an engine thread, at most once per step, when
                                  * jobs are on the ready list; must not block; may be NULL */
    void *wake_context;
};

/* Defaults: auto, all zeros as above, queue 1024, nine tenths of a GPU's memory. */
void engine_options_init(struct engine_options *o);

/* INVALID for options out of range or a device that is not there, naming those that are;
 * UNSUPPORTED for what the device cannot do; NOMEM with the bytes that are needed and free, and
 * what to change, where the model does not fit; whatever reading the files gives. */
enum status engine_open(struct engine **out, const struct engine_options *options,
                        struct error *err);

/* Ends queued and running jobs with SHUTDOWN after the steps on their way, joins the threads,
 * releases everything, the ready list too: a reader that is to see the end asks its job. No other
 * thread may be in a call, or call later; jobs live on. wake may be called until this returns.
 * Accepts NULL. */
void engine_close(struct engine *e);

/* Queue a job; the engine takes a reference of its own. BUSY when all queues are full, SHUTDOWN
 * when draining, DEVICE when all devices failed, INVALID or TOO_LARGE for a request out of range.
 * A refused job is as before and may be submitted again; an accepted one never again. Looks at
 * every token of the prompt, waits for nothing but a short lock. */
enum status engine_submit(struct engine *e, struct job *job, struct error *err);

/* The next job that was parked and now has tokens or has finished; NULL when there is none.
 * The caller gets the list's reference and releases it. */
struct job *engine_take_ready(struct engine *e);

/* Whether a slot of a device holds the state of a complete image: a turn that goes on there
 * copies nothing. False on a CPU, whose slots are host memory like the image. Takes no lock. */
bool engine_state_is_resident(const struct engine *e, const struct image *image);

/* Refuse new jobs from now on; those queued or running go on. */
void engine_drain(struct engine *e);

struct engine_info {
    const struct model_config *config; /* borrowed */
    struct generation_defaults generation;
    const char *fingerprint; /* of the model, 32 hex characters */
    const char *backend;     /* "cpu" */
    const char *weight_dtype, *window_dtype;
    int n_threads, n_devices;
    int n_slots; /* of all devices */
    int64_t n_parameters;
    size_t weight_bytes;   /* resident, on each device */
    size_t state_bytes;    /* of one session */
    size_t n_state_values; /* of one image, see image.h */
    int64_t max_position;  /* tokens a session may reach, 0: no limit */
};
void engine_info(const struct engine *e, struct engine_info *out);

/* Where the memory of a device went. */
struct engine_device {
    char name[128];
    int n_slots;
    size_t weight_bytes, state_bytes; /* state_bytes: of all its slots */
    size_t workspace_bytes;           /* everything else */
    size_t free_bytes, total_bytes;   /* total 0: the device keeps no account */
    char layers[120]; /* after a warm_up: how it decodes, "clusters to 16 rows, passes to 1024" */
};
void engine_device(const struct engine *e, int i, struct engine_device *out);
/* That as a row of a table, and the row above the first one; cut off at n bytes. */
void engine_device_row(const struct engine_device *d, char *out, size_t n);
void engine_device_head(char *out, size_t n);

/* Counters since the start, and gauges of now, over all devices. */
struct engine_stats {
    uint64_t n_steps, n_prompt_tokens, n_output_tokens;
    uint64_t n_dropped_tokens; /* drawn ahead for jobs that had ended by then */
    uint64_t n_state_loads;    /* jobs whose state was copied into a slot */
    uint64_t n_state_hits;     /* jobs whose state was there still */
    uint64_t step_ns;          /* time in which steps ran, each device's */
    int n_running, n_waiting, n_slots;
    bool failed; /* a device is gone */
};
void engine_stats(const struct engine *e, struct engine_stats *out);

#endif
