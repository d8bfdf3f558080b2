/* sizing.c - see sizing.h */
#include "engine/sizing.h"

#include <stdio.h>
#include <string.h>

#include "engine/cores.h"

/* What is left to us, by kind of device. max_batch 0: all slots. */
static const struct defaults {
    int n_slots, max_batch, step_tokens, chunk_tokens;
} host_defaults = {64, 0, 256, 128}, gpu_defaults = {0, 1024, 8192, 4096};

/* ---- Types of numbers ---- */

/* Where each may be chosen. */
static const struct {
    const char *name;
    enum dtype dtype;
    bool weights, windows, host_weights, host_windows;
} dtypes[] = {
    {"f32", DTYPE_F32, true, true, true, true},
    {"bf16", DTYPE_BF16, true, true, true, false},
    {"int8", DTYPE_I8, true, false, false, false},
    {"f8", DTYPE_F8_E4M3, false, true, false, false},
};

const char *sizing_dtype_name(enum dtype dtype)
{
    for (size_t i = 0; i < sizeof(dtypes) / sizeof(*dtypes); i++)
        if (dtypes[i].dtype == dtype)
            return dtypes[i].name;
    return "other";
}

static enum status choose_dtype(enum dtype *out, const char *name, bool windows, bool on_host,
                                struct error *err)
{
    const char *field = windows ? "window dtype" : "weight dtype";
    for (size_t i = 0; i < sizeof(dtypes) / sizeof(*dtypes); i++) {
        if (strcmp(name, dtypes[i].name) || !(windows ? dtypes[i].windows : dtypes[i].weights))
            continue;
        bool host_can = windows ? dtypes[i].host_windows : dtypes[i].host_weights;
        if (on_host && !host_can)
            return fail_field(err, STATUS_UNSUPPORTED, field, "%s %s needs a GPU; the CPU has %s",
                              field, name, windows ? "f32" : "f32 and bf16");
        *out = dtypes[i].dtype;
        return STATUS_OK;
    }
    return fail_field(err, STATUS_INVALID, field, "%s \"%.40s\" is none of auto, %s", field, name,
                      windows ? "f32, bf16, f8" : "f32, bf16, int8");
}

static enum status choose_dtypes(struct sizing *s, const struct checkpoint *c,
                                 const struct engine_options *o, struct error *err)
{
    bool on_host = s->device.kind != DEVICE_CUDA;
    enum status st = STATUS_OK;
    if (strcmp(o->weight_dtype, "auto"))
        st = choose_dtype(&s->model.weight_dtype, o->weight_dtype, false, on_host, err);
    else /* half floats become f32, which holds them exactly */
        s->model.weight_dtype = c->embed_tokens->dtype == DTYPE_BF16 ? DTYPE_BF16 : DTYPE_F32;
    if (!st && strcmp(o->window_dtype, "auto"))
        st = choose_dtype(&s->model.window_dtype, o->window_dtype, true, on_host, err);
    else
        s->model.window_dtype =
            on_host || s->model.weight_dtype == DTYPE_F32 ? DTYPE_F32 : DTYPE_BF16;
    return st;
}

/* ---- Memory ---- */

static void set_slots(struct sizing *s, const struct checkpoint *c, int n_slots)
{
    s->scheduler.n_slots = s->model.n_slots = n_slots;
    scheduler_limits(&s->scheduler, &s->model.max_rows, &s->model.max_logit_rows);
    model_backend_options(&c->config, &s->model, &s->backend);
}

enum status sizing_measure(const struct sizing *s, const struct checkpoint *checkpoint,
                           struct sizing_bytes *out, struct error *err)
{
    struct model_needs needs;
    struct backend_memory gpu = {0};
    enum status st = STATUS_OK;
    if (s->device.kind == DEVICE_CUDA)
        st = backend_cuda_probe(&s->backend, &gpu, err);
    if (st)
        return st;
    model_needs(checkpoint, &s->model, &needs);
    *out = (struct sizing_bytes){.gpu = gpu,
                                 .weights = needs.weight_bytes,
                                 .slot = needs.slot_bytes,
                                 .workspace = needs.scratch_bytes + gpu.workspace_bytes};
    return STATUS_OK;
}

static size_t total_bytes(const struct sizing *s, const struct sizing_bytes *b)
{
    return b->weights + (size_t)s->model.n_slots * b->slot + b->workspace;
}

/* Whether n_slots fit; b tells what they need. */
static enum status try_slots(struct sizing *s, const struct checkpoint *c, int n_slots,
                             double share, struct sizing_bytes *b, bool *fit, struct error *err)
{
    set_slots(s, c, n_slots);
    enum status st = sizing_measure(s, c, b, err);
    if (!st)
        *fit = (double)total_bytes(s, b) <= share * (double)b->gpu.free_bytes;
    return st;
}

/* The most slots that fit, 0 if none do. */
static enum status most_slots(struct sizing *s, const struct checkpoint *c, double share, int *out,
                              struct error *err)
{
    int fits = 0, too_many = ENGINE_MAX_SLOTS + 1;
    while (too_many - fits > 1) {
        int n = fits + (too_many - fits) / 2;
        struct sizing_bytes b;
        bool fit;
        enum status st = try_slots(s, c, n, share, &b, &fit, err);
        if (st)
            return st;
        *(fit ? &fits : &too_many) = n;
    }
    *out = fits;
    return STATUS_OK;
}

static enum status does_not_fit(const struct sizing *s, const struct sizing_bytes *b, double share,
                                int most, struct error *err)
{
    const double gb = 1e-9;
    char advice[60] = "";
    if (most)
        snprintf(advice, sizeof(advice), "--max-slots %d or fewer, ", most);
    return fail(err, STATUS_NOMEM,
                "%s: weights need %.3f GB, %d slots of %.2f MB %.3f GB, the workspace %.3f GB: "
                "%.3f GB together; %.3f GB are free, %.3f GB of them may be taken. Change one of: "
                "%sa larger --device-memory-share (now %g), a smaller --weight-dtype, "
                "--window-dtype, --max-batch or --step-tokens",
                b->gpu.device, (double)b->weights * gb, s->model.n_slots, (double)b->slot * 1e-6,
                (double)s->model.n_slots * (double)b->slot * gb, (double)b->workspace * gb,
                (double)total_bytes(s, b) * gb, (double)b->gpu.free_bytes * gb,
                share * (double)b->gpu.free_bytes * gb, advice, share);
}

/* The slots that were asked for, or as many as fit. */
static enum status fit_gpu(struct sizing *s, const struct checkpoint *c, int asked, double share,
                           struct error *err)
{
    struct sizing_bytes b;
    bool fit = false;
    int most = 0;
    enum status st = STATUS_OK;
    if (asked)
        st = try_slots(s, c, asked, share, &b, &fit, err);
    if (st || fit)
        return st;
    st = most_slots(s, c, share, &most, err);
    int n_slots = asked ? asked : most ? most : 1;
    if (!st)
        st = try_slots(s, c, n_slots, share, &b, &fit, err);
    if (st)
        return st;
    return fit ? STATUS_OK : does_not_fit(s, &b, share, most, err);
}

/* ---- All of it ---- */

static int or_default(int value, int otherwise)
{
    return value ? value : otherwise;
}

enum status sizing_choose(struct sizing *out, const struct checkpoint *checkpoint,
                          const struct engine_options *options, struct device device,
                          struct error *err)
{
    const struct engine_options *o = options;
    const struct defaults *d = device.kind == DEVICE_CUDA ? &gpu_defaults : &host_defaults;
    struct sizing s = {
        .device = device,
        .scheduler = {.max_queue = o->max_queue,
                      .max_batch = or_default(o->max_batch, d->max_batch),
                      .step_tokens = or_default(o->step_tokens, d->step_tokens),
                      .chunk_tokens = or_default(o->chunk_tokens, d->chunk_tokens),
                      .max_prompt_tokens = o->max_prompt_tokens,
                      .wake = o->wake,
                      .wake_context = o->wake_context},
        .backend = {.n_threads = o->n_threads ? o->n_threads : cores_available(),
                    .device = device.index,
                    .deterministic = o->deterministic},
    };
    int n_slots = or_default(o->n_slots, d->n_slots);
    enum status st = choose_dtypes(&s, checkpoint, o, err);
    if (!st && device.kind == DEVICE_CUDA)
        st = fit_gpu(&s, checkpoint, n_slots, o->device_memory_share, err);
    else if (!st)
        set_slots(&s, checkpoint, n_slots);
    if (!st)
        *out = s;
    return st;
}
