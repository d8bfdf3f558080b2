/* job.c - see job.h */
#include "engine/job.h"

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* A reader that keeps up never fills these; a scored prompt brings a chunk at once. */
enum { RING_TOKENS = 128, RING_TOKENS_SCORED = 512 };

struct job {
    /* Fixed after job_new and job_attach. */
    struct job_request request; /* its prompt is always shared: a reference */
    struct logit_bias *bias;    /* [n_logit_bias], owned */
    struct job_run *runs;       /* [n_runs], owned */
    size_t ring_size;
    int64_t deadline_ns;
    int unit; /* of the engine */

    atomic_int n_references;
    atomic_bool cancelled;
    atomic_int n_marks_done; /* as in progress, for those that come after */
    atomic_bool over;
    _Atomic(void *) user;
    struct job_links links; /* guarded by the scheduler's lock */

    pthread_mutex_t lock; /* guards all that follows */
    pthread_cond_t grown; /* for job_wait */
    bool waiting;         /* somebody is in job_wait */
    bool parked;
    size_t wanted_room; /* the engine waits for so many free places; 0: it does not */
    void (*ring_bell)(void *context);
    void *bell_context;
    struct job_token *ring; /* [ring_size], owned */
    size_t first, n_ring;
    struct job_snapshot progress;
};

int64_t job_clock_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Runs that are given are the prompt, cut. */
static bool runs_fit(const struct job_request *r)
{
    size_t n = 0;
    for (int i = 0; i < r->n_runs; i++)
        n += r->runs[i].n_chunked + r->runs[i].n_single;
    return r->n_runs == 0 || n == r->n_prompt;
}

/* Our own mistakes. */
static void check_states(const struct job_request *r)
{
    size_t at = r->n_seen;
    CHECK(r->n_seen < r->n_prompt && (!r->n_seen || (r->from && r->prompt_logprobs < 0)));
    CHECK(!r->n_runs || (!r->n_seen && !r->n_marks));
    CHECK(r->n_marks >= 0 && r->n_marks <= JOB_MAX_MARKS && (!r->after || r->from));
    for (int i = 0; i < r->n_marks; i++) {
        CHECK(r->marks[i].image && r->marks[i].at > at && r->marks[i].at <= r->n_prompt);
        at = r->marks[i].at;
    }
}

static enum status check_request(const struct job_request *r, struct error *err)
{
    if (!r->prompt || r->n_prompt == 0)
        return fail_field(err, STATUS_INVALID, "prompt", "the prompt has no tokens");
    if (!runs_fit(r))
        return fail(err, STATUS_INVALID, "the %d runs of a replay are not its %zu tokens",
                    r->n_runs, r->n_prompt);
    if (r->max_tokens < 0)
        return fail_field(err, STATUS_INVALID, "max_tokens",
                          "max_tokens is %lld; it must be 0 or more", (long long)r->max_tokens);
    if (r->deadline_ms < 0)
        return fail_field(err, STATUS_INVALID, "deadline_ms", "the deadline of %lld ms is negative",
                          (long long)r->deadline_ms);
    if (r->prompt_logprobs < -1 || r->prompt_logprobs > SAMPLER_MAX_TOP_LOGPROBS)
        return fail_field(err, STATUS_INVALID, "prompt_logprobs",
                          "prompt_logprobs is %d; it must be between -1 and %d", r->prompt_logprobs,
                          SAMPLER_MAX_TOP_LOGPROBS);
    if (r->sampling.n_logit_bias < 0 || r->sampling.n_logit_bias > SAMPLER_MAX_LOGIT_BIAS)
        return fail_field(err, STATUS_INVALID, "logit_bias",
                          "logit_bias has %d entries; at most %d are taken",
                          r->sampling.n_logit_bias, SAMPLER_MAX_LOGIT_BIAS);
    return STATUS_OK;
}

/* No larger than all that the job can ever put. */
static size_t ring_size(const struct job_request *r)
{
    bool scored = r->prompt_logprobs >= 0;
    size_t size = scored ? RING_TOKENS_SCORED : RING_TOKENS;
    size_t n_scores = !scored ? 0 : r->n_prompt < size ? r->n_prompt : size;
    size_t n_output = (uint64_t)r->max_tokens < size ? (size_t)r->max_tokens : size;
    return n_scores + n_output + 1 < size ? n_scores + n_output + 1 : size;
}

static void *copy_of(const void *source, size_t count, size_t size)
{
    void *copy = calloc(count ? count : 1, size);
    if (copy && count)
        memcpy(copy, source, count * size);
    return copy;
}

static void free_job(struct job *job)
{
    prompt_release(job->request.shared);
    image_release(job->request.from);
    image_release(job->request.into);
    for (int i = 0; i < job->request.n_marks; i++)
        image_release(job->request.marks[i].image);
    job_release(job->request.after);
    free(job->bias);
    free(job->runs);
    free(job->ring);
    free(job);
}

/* References for the job. */
static void hold_states(const struct job_request *r)
{
    if (r->from)
        image_hold(r->from);
    if (r->into)
        image_hold(r->into);
    for (int i = 0; i < r->n_marks; i++)
        image_hold(r->marks[i].image);
    if (r->after)
        job_hold(r->after);
}

/* The prompt of a request, with a reference for the job. */
static enum status hold_prompt(struct prompt **out, const struct job_request *r, struct error *err)
{
    if (!r->shared)
        return prompt_new(out, r->prompt, r->n_prompt, err);
    CHECK(r->prompt == prompt_ids(r->shared));
    prompt_hold(r->shared);
    *out = r->shared;
    return STATUS_OK;
}

enum status job_new(struct job **out, const struct job_request *request, struct error *err)
{
    enum status st = check_request(request, err);
    if (st)
        return st;
    check_states(request);
    struct job *job = calloc(1, sizeof(*job));
    if (!job)
        return fail(err, STATUS_NOMEM, "job: out of memory");
    const struct sampling_params *sampling = &request->sampling;
    job->request = *request;
    job->request.shared = NULL;
    hold_states(request);
    job->ring_size = ring_size(request);
    job->bias = copy_of(sampling->logit_bias, (size_t)sampling->n_logit_bias, sizeof(*job->bias));
    job->runs = copy_of(request->runs, (size_t)request->n_runs, sizeof(*job->runs));
    job->ring = calloc(job->ring_size, sizeof(*job->ring));
    if (!job->bias || !job->runs || !job->ring)
        st = fail(err, STATUS_NOMEM, "job: out of memory");
    if (!st)
        st = hold_prompt(&job->request.shared, request, err);
    if (st) {
        free_job(job);
        return st;
    }
    job->request.prompt = prompt_ids(job->request.shared);
    job->request.sampling.logit_bias = job->bias;
    job->request.runs = job->runs;
    atomic_init(&job->n_references, 1);
    atomic_init(&job->cancelled, false);
    atomic_init(&job->n_marks_done, 0);
    atomic_init(&job->over, false);
    atomic_init(&job->user, request->user);
    pthread_mutex_init(&job->lock, NULL);
    pthread_cond_init(&job->grown, NULL);
    *out = job;
    return STATUS_OK;
}

void job_hold(struct job *job)
{
    CHECK(atomic_fetch_add(&job->n_references, 1) > 0);
}

void job_release(struct job *job)
{
    if (!job)
        return;
    int before = atomic_fetch_sub(&job->n_references, 1);
    CHECK(before > 0);
    if (before > 1)
        return;
    pthread_cond_destroy(&job->grown);
    pthread_mutex_destroy(&job->lock);
    free_job(job);
}

size_t job_read(struct job *job, struct job_token *out, size_t max)
{
    pthread_mutex_lock(&job->lock);
    size_t n = job->n_ring < max ? job->n_ring : max;
    for (size_t i = 0; i < n; i++)
        out[i] = job->ring[(job->first + i) % job->ring_size];
    job->first = (job->first + n) % job->ring_size;
    job->n_ring -= n;
    if (job->wanted_room && job->ring_size - job->n_ring >= job->wanted_room) {
        job->wanted_room = 0;
        if (job->ring_bell)
            job->ring_bell(job->bell_context);
    }
    pthread_mutex_unlock(&job->lock);
    return n;
}

/* With the lock held. */
static bool has_news(const struct job *job)
{
    return job->n_ring > 0 || job->progress.finish != FINISH_NONE;
}

bool job_park(struct job *job)
{
    pthread_mutex_lock(&job->lock);
    job->parked = !has_news(job);
    bool parked = job->parked;
    pthread_mutex_unlock(&job->lock);
    return parked;
}

void job_wait(struct job *job)
{
    pthread_mutex_lock(&job->lock);
    job->waiting = true;
    while (!has_news(job))
        pthread_cond_wait(&job->grown, &job->lock);
    job->waiting = false;
    pthread_mutex_unlock(&job->lock);
}

void job_snapshot(struct job *job, struct job_snapshot *out)
{
    pthread_mutex_lock(&job->lock);
    *out = job->progress;
    pthread_mutex_unlock(&job->lock);
}

/* The lock keeps job_finish, and so the end of the bell's life, out of the call. */
void job_cancel(struct job *job)
{
    pthread_mutex_lock(&job->lock);
    atomic_store(&job->cancelled, true);
    if (job->ring_bell)
        job->ring_bell(job->bell_context);
    pthread_mutex_unlock(&job->lock);
}

void *job_user(const struct job *job)
{
    return atomic_load(&job->user);
}

void job_set_user(struct job *job, void *user)
{
    atomic_store(&job->user, user);
}

const struct job_request *job_request(const struct job *job)
{
    return &job->request;
}

void job_attach(struct job *job, void (*ring)(void *context), void *context)
{
    pthread_mutex_lock(&job->lock);
    CHECK(!job->ring_bell && job->progress.finish == FINISH_NONE);
    job->ring_bell = ring;
    job->bell_context = context;
    int64_t now = job_clock_ns(), ms = job->request.deadline_ms;
    job->progress.submitted_ns = now;
    if (ms > 0)
        job->deadline_ns = ms < (INT64_MAX - now) / 1000000 ? now + ms * 1000000 : INT64_MAX;
    pthread_mutex_unlock(&job->lock);
}

void job_detach(struct job *job)
{
    pthread_mutex_lock(&job->lock);
    job->ring_bell = NULL;
    job->progress.submitted_ns = 0;
    job->deadline_ns = 0;
    pthread_mutex_unlock(&job->lock);
}

int64_t job_deadline_ns(const struct job *job)
{
    return job->deadline_ns;
}

bool job_is_cancelled(const struct job *job)
{
    return atomic_load(&job->cancelled);
}

size_t job_ring_size(const struct job *job)
{
    return job->ring_size;
}

bool job_has_room(struct job *job, size_t n)
{
    CHECK(n >= 1 && n <= job->ring_size);
    pthread_mutex_lock(&job->lock);
    bool room = job->ring_size - job->n_ring >= n;
    job->wanted_room = room ? 0 : n;
    pthread_mutex_unlock(&job->lock);
    return room;
}

/* With the lock held, after a change the reader waits for. */
static bool unpark(struct job *job)
{
    if (job->waiting)
        pthread_cond_signal(&job->grown);
    bool was_parked = job->parked;
    job->parked = false;
    return was_parked;
}

bool job_put(struct job *job, const struct job_token *token)
{
    pthread_mutex_lock(&job->lock);
    CHECK(job->n_ring < job->ring_size && job->progress.finish == FINISH_NONE);
    struct job_token *placed = &job->ring[(job->first + job->n_ring++) % job->ring_size];
    *placed = *token;
    if (!token->is_prompt) {
        placed->time_ns = job_clock_ns();
        if (job->progress.n_output++ == 0)
            job->progress.first_token_ns = placed->time_ns;
    }
    bool was_parked = unpark(job);
    pthread_mutex_unlock(&job->lock);
    return was_parked;
}

bool job_finish(struct job *job, enum job_finish how, const struct error *err)
{
    pthread_mutex_lock(&job->lock);
    CHECK(how != FINISH_NONE && job->progress.finish == FINISH_NONE);
    CHECK((how == FINISH_ERROR) == (err != NULL));
    job->progress.finish = how;
    job->progress.stopped_by_token = how == FINISH_STOP;
    job->progress.finished_ns = job_clock_ns();
    if (err)
        job->progress.error = *err;
    job->ring_bell = NULL;
    job->wanted_room = 0;
    atomic_store(&job->over, true);
    bool was_parked = unpark(job);
    pthread_mutex_unlock(&job->lock);
    return was_parked;
}

void job_mark_admitted(struct job *job)
{
    pthread_mutex_lock(&job->lock);
    job->progress.admitted_ns = job_clock_ns();
    pthread_mutex_unlock(&job->lock);
}

void job_mark_prompt_done(struct job *job, size_t n_prompt_done)
{
    pthread_mutex_lock(&job->lock);
    job->progress.n_prompt_done = n_prompt_done;
    pthread_mutex_unlock(&job->lock);
}

void job_mark_saved(struct job *job)
{
    pthread_mutex_lock(&job->lock);
    CHECK(job->progress.n_marks_done < job->request.n_marks);
    atomic_store(&job->n_marks_done, ++job->progress.n_marks_done);
    pthread_mutex_unlock(&job->lock);
}

enum job_start job_start(const struct job *job)
{
    const struct job *after = job->request.after;
    if (!after)
        return JOB_READY;
    bool over = atomic_load(&after->over); /* before the count: what is over saves no more */
    for (int i = atomic_load(&after->n_marks_done) - 1; i >= 0; i--)
        if (after->request.marks[i].image == job->request.from)
            return JOB_READY;
    return over ? JOB_LOST : JOB_WAITS;
}

void job_set_unit(struct job *job, int unit)
{
    job->unit = unit;
}

int job_unit(const struct job *job)
{
    return job->unit;
}

struct job_links *job_links(struct job *job)
{
    return &job->links;
}
