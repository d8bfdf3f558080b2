/* run.c - see run.h */
#include "engine/run/run.h"

#include <stdio.h>
#include <unistd.h>

#include "engine/base/file.h"
#include "engine/run/interrupt.h"

/* ---- The bar ---- */

void run_begin_bar(struct run *r)
{
    r->shows_progress = isatty(STDERR_FILENO) && !r->options.quiet;
    r->shown_percent = -1;
}

void run_show_bar(struct run *r, const char *what, int percent)
{
    char bar[31];
    if (!r->shows_progress || percent == r->shown_percent)
        return;
    r->shown_percent = percent;
    for (int i = 0; i < 30; i++)
        bar[i] = i < percent * 30 / 100 ? '#' : '.';
    bar[30] = 0;
    fprintf(stderr, "\r%s [%s] %3d%%", what, bar, percent);
}

void run_clear_bar(struct run *r)
{
    if (r->shows_progress && r->shown_percent >= 0)
        fputs("\r\033[K", stderr);
    r->shown_percent = -1;
}

/* ---- Loading ---- */

static void show_loading(void *context, uint64_t done, uint64_t total)
{
    run_show_bar(context, "loading", total ? (int)(100.0 * (double)done / (double)total) : 100);
}

static enum status open_text_parts(struct run *r, struct error *err)
{
    char path[FILE_PATH_BYTES];
    enum status st = file_path(path, r->options.model_dir, "tokenizer.json", err);
    if (!st)
        st = tokenizer_open(&r->tokenizer, path, err);
    if (!st && r->options.chat)
        st = chat_template_open(&r->template, r->options.model_dir, err);
    return st;
}

static void post_ready(void *context)
{
    struct run *r = context;
    sem_post(&r->ready);
}

static enum status open_engine(struct run *r, int n_slots, struct error *err)
{
    const struct run_options *o = &r->options;
    struct engine_options options;
    engine_options_init(&options);
    options.model_dir = o->model_dir;
    options.device = o->device;
    options.weight_dtype = o->weight_dtype;
    options.window_dtype = o->window_dtype;
    options.deterministic = o->deterministic;
    options.n_threads = (int)o->threads;
    options.n_slots = n_slots;
    options.max_queue = n_slots;
    options.wake = post_ready;
    options.wake_context = r;
    options.progress = show_loading;
    options.progress_context = r;
    enum status st = engine_open(&r->engine, &options, err);
    run_clear_bar(r);
    if (!st)
        engine_info(r->engine, &r->info);
    return st;
}

/* A table, a line for each device. */
static void show_memory(const struct run *r)
{
    char text[256];
    engine_device_head(text, sizeof(text));
    fprintf(stderr, "%s\n", text);
    for (int i = 0; i < r->info.n_devices; i++) {
        struct engine_device device;
        engine_device(r->engine, i, &device);
        engine_device_row(&device, text, sizeof(text));
        fprintf(stderr, "%s\n", text);
    }
}

enum status run_load(struct run *r, int n_slots, struct error *err)
{
    int64_t start_ns = job_clock_ns();
    run_begin_bar(r);
    sem_init(&r->ready, 0, 0);
    enum status st = open_text_parts(r, err);
    if (!st)
        st = open_engine(r, n_slots, err);
    if (!st && !r->options.quiet && !r->shows_progress)
        fprintf(stderr, "loaded %s: %.1fM parameters, %s, %s, %d threads, %.2f s\n",
                r->options.model_dir, (double)r->info.n_parameters * 1e-6, r->info.weight_dtype,
                r->info.backend, r->info.n_threads, (double)(job_clock_ns() - start_ns) * 1e-9);
    if (!st && r->options.verbose)
        show_memory(r);
    return st;
}

void run_close(struct run *r)
{
    engine_close(r->engine);
    chat_template_close(r->template);
    tokenizer_close(r->tokenizer);
}

/* ---- Jobs ---- */

enum status run_start(struct run *r, const struct job_request *request, struct job **out,
                      struct error *err)
{
    struct job *job = NULL;
    enum status st = job_new(&job, request, err);
    if (!st)
        st = engine_submit(r->engine, job, err);
    if (st) {
        job_release(job);
        return st;
    }
    interrupt_set_job(job);
    *out = job;
    return STATUS_OK;
}

enum status run_end(struct job *job, struct job_snapshot *snapshot, struct error *err)
{
    interrupt_set_job(NULL);
    job_snapshot(job, snapshot);
    job_release(job);
    return snapshot->finish == FINISH_ERROR
               ? fail(err, snapshot->error.status, "%s", snapshot->error.text)
               : STATUS_OK;
}

double run_rate(double n, int64_t from_ns, int64_t to_ns)
{
    return from_ns && to_ns > from_ns ? n / ((double)(to_ns - from_ns) * 1e-9) : 0;
}
