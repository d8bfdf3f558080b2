/* engine.c - see engine.h */
#include "engine/engine.h"

#include <stdlib.h>
#include <string.h>

#include "engine/cores.h"
#include "engine/model.h"
#include "engine/pool.h"
#include "engine/scheduler.h"

enum {
    MAX_SLOTS = 4096,
    MAX_STEP_TOKENS = 1 << 20,
};

struct engine {
    struct model *model;
    struct scheduler *scheduler;
    struct engine_info info;
    char fingerprint[33];
};

void engine_options_init(struct engine_options *o)
{
    *o = (struct engine_options){
        .device = "auto",
        .weight_dtype = "auto",
        .n_slots = 64,
        .max_queue = 1024,
        .step_tokens = 256,
        .chunk_tokens = 128,
    };
}

/* ---- Options ---- */

static enum status check_options(const struct engine_options *o, struct error *err)
{
    const struct {
        const char *name;
        int value, least, most;
    } rules[] = {
        {"threads", o->n_threads, 0, POOL_MAX_THREADS},
        {"slots", o->n_slots, 1, MAX_SLOTS},
        {"max queue", o->max_queue, 1, INT32_MAX / 2},
        {"step tokens", o->step_tokens, 1, MAX_STEP_TOKENS},
        {"chunk tokens", o->chunk_tokens, 1, MAX_STEP_TOKENS},
    };
    if (!o->model_dir)
        return fail(err, STATUS_INVALID, "no model directory is given");
    for (size_t i = 0; i < sizeof(rules) / sizeof(rules[0]); i++)
        if (rules[i].value < rules[i].least || rules[i].value > rules[i].most)
            return fail_field(err, STATUS_INVALID, rules[i].name, "%s is %d; it must be %d to %d",
                              rules[i].name, rules[i].value, rules[i].least, rules[i].most);
    return STATUS_OK;
}

static enum status choose_dtype(enum dtype *out, const char *name, const struct checkpoint *c,
                                struct error *err)
{
    if (!strcmp(name, "auto")) /* half floats become f32, which holds them exactly */
        *out = c->embed_tokens->dtype == DTYPE_BF16 ? DTYPE_BF16 : DTYPE_F32;
    else if (!strcmp(name, "f32"))
        *out = DTYPE_F32;
    else if (!strcmp(name, "bf16"))
        *out = DTYPE_BF16;
    else
        return fail(err, STATUS_INVALID, "weight dtype \"%s\" is none of auto, f32, bf16", name);
    return STATUS_OK;
}

/* The one place that knows which devices there are. */
static enum status open_backend(struct backend **out, const char *device,
                                const struct backend_options *options, struct error *err)
{
    if (!strcmp(device, "auto") || !strcmp(device, "cpu"))
        return backend_cpu_open(out, options, err);
    if (!strcmp(device, "ref"))
        return backend_ref_open(out, options, err);
    return fail(err, STATUS_INVALID, "device \"%s\" is none of auto, cpu, ref", device);
}

/* ---- Loading ---- */

/* Reading the files and building the model, shown as one: half and half. */
struct progress {
    const struct engine_options *options;
    int stage;
};

static void show_progress(void *context, uint64_t done, uint64_t total)
{
    const struct progress *p = context;
    if (p->options->progress && total)
        p->options->progress(p->options->progress_context, done + (uint64_t)p->stage * total,
                             2 * total);
}

static struct scheduler_options scheduler_options_of(const struct engine_options *o)
{
    return (struct scheduler_options){
        .n_slots = o->n_slots,
        .max_queue = o->max_queue,
        .step_tokens = o->step_tokens,
        .chunk_tokens = o->chunk_tokens,
        .max_prompt_tokens = o->max_prompt_tokens,
        .wake = o->wake,
        .wake_context = o->wake_context,
    };
}

static enum status build_model(struct engine *e, const struct checkpoint *c,
                               struct progress *progress, struct error *err)
{
    const struct engine_options *o = progress->options;
    struct scheduler_options limits = scheduler_options_of(o);
    struct model_options options = {.n_slots = o->n_slots};
    scheduler_limits(&limits, &options.max_rows, &options.max_logit_rows);
    enum status st = choose_dtype(&options.weight_dtype, o->weight_dtype, c, err);
    if (st)
        return st;

    struct backend_options backend_options;
    struct backend *backend = NULL;
    model_backend_options(&c->config, &options, &backend_options);
    backend_options.n_threads = o->n_threads ? o->n_threads : cores_available();
    st = open_backend(&backend, o->device, &backend_options, err);
    if (st)
        return st;
    progress->stage = 1;
    st = model_open(&e->model, c, backend, &options, show_progress, progress, err);
    if (st)
        return st;
    e->info.n_threads = backend_options.n_threads;
    e->info.weight_dtype = options.weight_dtype == DTYPE_BF16 ? "bf16" : "f32";
    return STATUS_OK;
}

static void describe(struct engine *e, const struct checkpoint *c, const struct engine_options *o)
{
    memcpy(e->fingerprint, c->fingerprint, sizeof(e->fingerprint));
    e->info.config = model_config(e->model);
    e->info.generation = c->generation;
    e->info.fingerprint = e->fingerprint;
    e->info.backend = model_backend_name(e->model);
    e->info.n_slots = o->n_slots;
    e->info.n_parameters = c->n_parameters;
    e->info.weight_bytes = model_weight_bytes(e->model);
    e->info.state_bytes = model_state_bytes(e->model);
    e->info.max_position = model_max_position(e->model);
}

/* A chunk and a single row, so that the first request finds memory touched and threads up. */
static enum status warm_up(struct engine *e, const struct engine_options *o, struct error *err)
{
    int32_t tokens[64] = {0};
    const float *logits;
    int64_t limit = model_max_position(e->model);
    int n = o->chunk_tokens < 64 ? o->chunk_tokens : 64;
    if (limit && limit < n + 1)
        return STATUS_OK;
    struct model_seq chunk = {.slot = 0, .n_rows = n, .logits = LOGITS_LAST};
    struct model_seq row = {.slot = 0, .n_rows = 1, .logits = LOGITS_LAST};
    enum status st = model_step(e->model, tokens, &chunk, 1, &logits, err);
    if (!st)
        st = model_step(e->model, tokens, &row, 1, &logits, err);
    model_reset(e->model, 0);
    return st;
}

enum status engine_open(struct engine **out, const struct engine_options *options,
                        struct error *err)
{
    enum status st = check_options(options, err);
    if (st)
        return st;
    struct engine *e = calloc(1, sizeof(*e));
    if (!e)
        return fail(err, STATUS_NOMEM, "engine: out of memory");

    struct progress progress = {.options = options};
    struct checkpoint *checkpoint = NULL;
    st = checkpoint_open(&checkpoint, options->model_dir, show_progress, &progress, err);
    if (!st)
        st = build_model(e, checkpoint, &progress, err);
    if (!st)
        describe(e, checkpoint, options);
    checkpoint_close(checkpoint);
    if (!st)
        st = warm_up(e, options, err);
    if (!st) {
        struct scheduler_options scheduler_options = scheduler_options_of(options);
        st = scheduler_open(&e->scheduler, e->model, &scheduler_options, err);
    }
    if (st) {
        engine_close(e);
        return st;
    }
    *out = e;
    return STATUS_OK;
}

void engine_close(struct engine *e)
{
    if (!e)
        return;
    scheduler_close(e->scheduler);
    model_close(e->model);
    free(e);
}

/* ---- Serving ---- */

enum status engine_submit(struct engine *e, struct job *job, struct error *err)
{
    return scheduler_submit(e->scheduler, job, err);
}

struct job *engine_take_ready(struct engine *e)
{
    return scheduler_take_ready(e->scheduler);
}

void engine_drain(struct engine *e)
{
    scheduler_drain(e->scheduler);
}

void engine_info(const struct engine *e, struct engine_info *out)
{
    *out = e->info;
}

void engine_stats(const struct engine *e, struct engine_stats *out)
{
    scheduler_stats(e->scheduler, out);
}
