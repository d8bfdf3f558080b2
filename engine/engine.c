/* engine.c - see engine.h */
#include "engine/engine.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/devices.h"
#include "engine/image.h"
#include "engine/model.h"
#include "engine/pool.h"
#include "engine/scheduler.h"
#include "engine/sizing.h"
#include "engine/warm_up.h"

enum { MAX_STEP_TOKENS = 1 << 20 };

/* A device with its own copy of the model and its own thread. */
struct unit {
    struct model *model;
    struct scheduler *scheduler;
    struct engine_device device;
};

struct engine {
    struct unit units[ENGINE_MAX_DEVICES];
    int n_units;
    struct engine_info info;
    char fingerprint[33];
};

void engine_options_init(struct engine_options *o)
{
    *o = (struct engine_options){
        .device = "auto",
        .weight_dtype = "auto",
        .window_dtype = "auto",
        .device_memory_share = 0.9,
        .max_queue = 1024,
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
        {"slots", o->n_slots, 0, ENGINE_MAX_SLOTS},
        {"max batch", o->max_batch, 0, ENGINE_MAX_SLOTS},
        {"max queue", o->max_queue, 1, INT32_MAX / 2},
        {"step tokens", o->step_tokens, 0, MAX_STEP_TOKENS},
        {"chunk tokens", o->chunk_tokens, 0, MAX_STEP_TOKENS},
    };
    if (!o->model_dir)
        return fail(err, STATUS_INVALID, "no model directory is given");
    for (size_t i = 0; i < sizeof(rules) / sizeof(rules[0]); i++)
        if (rules[i].value < rules[i].least || rules[i].value > rules[i].most)
            return fail_field(err, STATUS_INVALID, rules[i].name, "%s is %d; it must be %d to %d",
                              rules[i].name, rules[i].value, rules[i].least, rules[i].most);
    if (!(o->device_memory_share > 0 && o->device_memory_share <= 1))
        return fail_field(err, STATUS_INVALID, "device memory share",
                          "device memory share is %g; it must be over 0 and at most 1",
                          o->device_memory_share);
    return STATUS_OK;
}

/* ---- Loading ---- */

/* Reading the files and building the model on each device, shown as one. */
struct progress {
    const struct engine_options *options;
    int stage, n_stages;
};

static void show_progress(void *context, uint64_t done, uint64_t total)
{
    const struct progress *p = context;
    if (p->options->progress && total)
        p->options->progress(p->options->progress_context, done + (uint64_t)p->stage * total,
                             (uint64_t)p->n_stages * total);
}

static enum status open_backend(struct backend **out, const struct sizing *s, struct error *err)
{
    switch (s->device.kind) {
    case DEVICE_CPU:
        return backend_cpu_open(out, &s->backend, err);
    case DEVICE_REF:
        return backend_ref_open(out, &s->backend, err);
    case DEVICE_CUDA:
        break;
    }
    return backend_cuda_open(out, &s->backend, err);
}

static enum status run_warm_up(struct unit *u, const struct sizing *s,
                               const struct engine_options *o, struct error *err)
{
    const struct warm_up w = {.n_slots = s->model.n_slots,
                              .max_rows = s->model.max_rows,
                              .max_logit_rows = s->model.max_logit_rows,
                              .chunk = s->scheduler.chunk_tokens,
                              .max_batch = s->scheduler.max_batch ? s->scheduler.max_batch
                                                                  : s->model.n_slots,
                              .every_size = o->warm_up};
    _Static_assert(sizeof(u->device.layers) == WARM_UP_LAYERS, "filled by warm_up");
    return warm_up(u->model, &w, u->device.layers, err);
}

/* As the backend keeps account, or as it was planned. */
static void describe_device(struct unit *u, const struct sizing *s, const struct sizing_bytes *b)
{
    struct engine_device *d = &u->device;
    struct backend_memory memory;
    d->n_slots = s->model.n_slots;
    d->weight_bytes = model_weight_bytes(u->model);
    d->state_bytes = (size_t)s->model.n_slots * model_state_bytes(u->model);
    d->workspace_bytes = b->workspace;
    snprintf(d->name, sizeof(d->name), "%s, %d threads", model_backend_name(u->model),
             s->backend.n_threads);
    if (!model_memory(u->model, &memory))
        return;
    size_t taken = memory.weight_bytes + memory.buffer_bytes + memory.workspace_bytes;
    size_t known = d->weight_bytes + d->state_bytes;
    memcpy(d->name, memory.device, sizeof(d->name));
    d->workspace_bytes = taken > known ? taken - known : 0;
    d->free_bytes = memory.free_bytes;
    d->total_bytes = memory.total_bytes;
}

static enum status open_unit(struct engine *e, const struct checkpoint *c, struct device device,
                             struct progress *progress, struct error *err)
{
    struct unit *u = &e->units[e->n_units];
    struct sizing s;
    struct sizing_bytes bytes;
    struct backend *backend = NULL;
    enum status st = sizing_choose(&s, c, progress->options, device, err);
    if (!st)
        st = sizing_measure(&s, c, &bytes, err);
    if (!st)
        st = open_backend(&backend, &s, err);
    if (st)
        return st;
    progress->stage++;
    e->n_units++;
    st = model_open(&u->model, c, backend, &s.model, show_progress, progress, err);
    if (!st)
        st = run_warm_up(u, &s, progress->options, err);
    if (st)
        return st;
    describe_device(u, &s, &bytes);
    e->info.n_threads = s.backend.n_threads;
    e->info.n_slots += s.model.n_slots;
    e->info.weight_dtype = sizing_dtype_name(s.model.weight_dtype);
    e->info.window_dtype = sizing_dtype_name(s.model.window_dtype);
    return scheduler_open(&u->scheduler, u->model, &s.scheduler, err);
}

static void describe(struct engine *e, const struct checkpoint *c)
{
    const struct model *model = e->units[0].model;
    memcpy(e->fingerprint, c->fingerprint, sizeof(e->fingerprint));
    e->info.config = model_config(model);
    e->info.generation = c->generation;
    e->info.fingerprint = e->fingerprint;
    e->info.backend = model_backend_name(model);
    e->info.n_devices = e->n_units;
    e->info.n_parameters = c->n_parameters;
    e->info.weight_bytes = model_weight_bytes(model);
    e->info.state_bytes = model_state_bytes(model);
    e->info.n_state_values = image_values_of(model);
    e->info.max_position = model_max_position(model);
}

enum status engine_open(struct engine **out, const struct engine_options *options,
                        struct error *err)
{
    struct device_list devices;
    enum status st = check_options(options, err);
    if (!st)
        st = devices_parse(&devices, options->device, backend_cuda_count(), err);
    if (st)
        return st;
    struct engine *e = calloc(1, sizeof(*e));
    if (!e)
        return fail(err, STATUS_NOMEM, "engine: out of memory");

    struct progress progress = {.options = options, .n_stages = 1 + devices.n};
    struct checkpoint *checkpoint = NULL;
    st = checkpoint_open(&checkpoint, options->model_dir, show_progress, &progress, err);
    for (int i = 0; i < devices.n && !st; i++)
        st = open_unit(e, checkpoint, devices.items[i], &progress, err);
    if (!st)
        describe(e, checkpoint);
    checkpoint_close(checkpoint);
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
    for (int i = 0; i < e->n_units; i++) {
        scheduler_close(e->units[i].scheduler);
        model_close(e->units[i].model);
    }
    free(e);
}

/* ---- Serving ---- */

/* Jobs that a device has, in halves: the one whose slot holds the new job's state wins a tie. */
static int load_of(struct scheduler *s, const struct image *from)
{
    struct engine_stats stats;
    scheduler_stats(s, &stats);
    return 2 * (stats.n_running + stats.n_waiting) - (from && scheduler_is_resident(s, from));
}

/* Among those that are left; ties go to the lower index. */
static int least_loaded(const struct engine *e, const struct image *from, const bool *tried)
{
    int best = -1, least = 0;
    for (int i = 0; i < e->n_units; i++) {
        int load = tried[i] ? 0 : load_of(e->units[i].scheduler, from);
        if (!tried[i] && (best < 0 || load < least)) {
            best = i;
            least = load;
        }
    }
    return best;
}

enum status engine_submit(struct engine *e, struct job *job, struct error *err)
{
    bool tried[ENGINE_MAX_DEVICES] = {false};
    enum status st = STATUS_OK;
    const struct job *after = job_request(job)->after;
    if (after) {
        job_set_unit(job, job_unit(after));
        return scheduler_submit(e->units[job_unit(after)].scheduler, job, err);
    }
    for (int k = 0; k < e->n_units; k++) {
        int i = least_loaded(e, job_request(job)->from, tried);
        tried[i] = true;
        job_set_unit(job, i);
        st = scheduler_submit(e->units[i].scheduler, job, err);
        if (st != STATUS_BUSY && st != STATUS_DEVICE)
            break;
    }
    return st;
}

struct job *engine_take_ready(struct engine *e)
{
    struct job *job = NULL;
    for (int i = 0; i < e->n_units && !job; i++)
        job = scheduler_take_ready(e->units[i].scheduler);
    return job;
}

bool engine_state_is_resident(const struct engine *e, const struct image *image)
{
    bool is_resident = false;
    for (int i = 0; i < e->n_units && !is_resident; i++)
        is_resident = scheduler_is_resident(e->units[i].scheduler, image);
    return is_resident;
}

void engine_drain(struct engine *e)
{
    for (int i = 0; i < e->n_units; i++)
        scheduler_drain(e->units[i].scheduler);
}

/* ---- Facts ---- */

void engine_info(const struct engine *e, struct engine_info *out)
{
    *out = e->info;
}

void engine_device(const struct engine *e, int i, struct engine_device *out)
{
    CHECK(i >= 0 && i < e->n_units);
    *out = e->units[i].device;
}

void engine_device_head(char *out, size_t n)
{
    snprintf(out, n, "%-40s %12s %26s %12s %12s", "device", "weights", "states", "workspace",
             "free");
}

void engine_device_row(const struct engine_device *d, char *out, size_t n)
{
    const double mb = 1e-6;
    char states[48], unused[24] = "-";
    snprintf(states, sizeof(states), "%d x %.2f = %.0f MB", d->n_slots,
             d->n_slots ? (double)d->state_bytes / d->n_slots * mb : 0,
             (double)d->state_bytes * mb);
    if (d->total_bytes)
        snprintf(unused, sizeof(unused), "%.0f MB", (double)d->free_bytes * mb);
    snprintf(out, n, "%-40.60s %9.1f MB %26s %9.1f MB %12s", d->name, (double)d->weight_bytes * mb,
             states, (double)d->workspace_bytes * mb, unused);
}

void engine_stats(const struct engine *e, struct engine_stats *out)
{
    struct engine_stats sum = {0};
    for (int i = 0; i < e->n_units; i++) {
        struct engine_stats stats;
        scheduler_stats(e->units[i].scheduler, &stats);
        sum.n_steps += stats.n_steps;
        sum.n_prompt_tokens += stats.n_prompt_tokens;
        sum.n_output_tokens += stats.n_output_tokens;
        sum.n_dropped_tokens += stats.n_dropped_tokens;
        sum.step_ns += stats.step_ns;
        sum.n_state_loads += stats.n_state_loads;
        sum.n_state_hits += stats.n_state_hits;
        sum.n_running += stats.n_running;
        sum.n_waiting += stats.n_waiting;
        sum.n_slots += stats.n_slots;
        sum.failed |= stats.failed;
    }
    *out = sum;
}
