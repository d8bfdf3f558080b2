/* inbox.c - see inbox.h */
#include "engine/inbox.h"

#include <time.h>

void inbox_init(struct inbox *in, int n_slots, int max_queue)
{
    *in = (struct inbox){.max_queue = max_queue, .stats.n_slots = n_slots};
    sem_init(&in->bell.posts, 0, 0);
    pthread_mutex_init(&in->lock, NULL);
}

void inbox_free(struct inbox *in)
{
    struct job *job;
    while ((job = inbox_take_ready(in)))
        job_release(job);
    pthread_mutex_destroy(&in->lock);
    sem_destroy(&in->bell.posts);
}

/* ---- The bell ---- */

void inbox_ring(void *context)
{
    struct bell *bell = context;
    if (!atomic_exchange(&bell->rung, true))
        sem_post(&bell->posts);
}

void inbox_ring_by_job(void *context)
{
    struct bell *bell = context;
    atomic_store(&bell->by_job, true); /* before rung, so that it is never seen too late */
    inbox_ring(bell);
}

bool inbox_answer(struct inbox *in, bool *by_job)
{
    while (sem_trywait(&in->bell.posts) == 0)
        ;
    bool rung = atomic_exchange(&in->bell.rung, false);
    *by_job = atomic_exchange(&in->bell.by_job, false);
    return rung || *by_job;
}

void inbox_sleep(struct inbox *in, int64_t until_ns)
{
    if (until_ns == INT64_MAX) {
        sem_wait(&in->bell.posts);
        return;
    }
    struct timespec t = {.tv_sec = until_ns / 1000000000, .tv_nsec = until_ns % 1000000000};
    sem_clockwait(&in->bell.posts, CLOCK_MONOTONIC, &t);
}

/* ---- The queue ---- */

/* With the lock held. */
static void append(struct inbox *in, struct job *job)
{
    job_links(job)->queue_next = NULL;
    if (in->queue_last)
        job_links(in->queue_last)->queue_next = job;
    else
        in->queue_first = job;
    in->queue_last = job;
    in->stats.n_waiting++;
}

/* With the lock held. */
static enum status check_place(const struct inbox *in, struct error *err)
{
    const struct engine_stats *s = &in->stats;
    if (in->failure.status)
        return fail(err, in->failure.status, "%s", in->failure.text);
    if (in->draining)
        return fail(err, STATUS_SHUTDOWN, "the engine is shutting down");
    if (s->n_running + s->n_waiting >= s->n_slots + in->max_queue)
        return fail(err, STATUS_BUSY, "the queue is full: %d requests are running, %d are waiting",
                    s->n_running, s->n_waiting);
    return STATUS_OK;
}

enum status inbox_submit(struct inbox *in, struct job *job, struct error *err)
{
    job_hold(job);
    job_attach(job, inbox_ring_by_job, &in->bell);
    pthread_mutex_lock(&in->lock);
    enum status st = check_place(in, err);
    if (!st)
        append(in, job);
    pthread_mutex_unlock(&in->lock);
    if (st) {
        job_detach(job);
        job_release(job);
        return st;
    }
    inbox_ring(&in->bell);
    return STATUS_OK;
}

/* Take the job behind `before` (NULL: the first) out of the queue. With the lock held. */
static struct job *unlink_job(struct inbox *in, struct job *before)
{
    struct job **link = before ? &job_links(before)->queue_next : &in->queue_first;
    struct job *job = *link;
    *link = job_links(job)->queue_next;
    if (in->queue_last == job)
        in->queue_last = before;
    in->stats.n_waiting--;
    return job;
}

struct job *inbox_take(struct inbox *in)
{
    pthread_mutex_lock(&in->lock);
    struct job *job = in->queue_first ? unlink_job(in, NULL) : NULL;
    pthread_mutex_unlock(&in->lock);
    return job;
}

struct job *inbox_admit(struct inbox *in)
{
    pthread_mutex_lock(&in->lock);
    struct job *before = NULL, *job = in->queue_first;
    while (job && job_start(job) == JOB_WAITS) {
        before = job;
        job = job_links(job)->queue_next;
    }
    if (job) {
        unlink_job(in, before);
        in->stats.n_running++;
    }
    pthread_mutex_unlock(&in->lock);
    return job;
}

void inbox_leave(struct inbox *in)
{
    pthread_mutex_lock(&in->lock);
    in->stats.n_running--;
    pthread_mutex_unlock(&in->lock);
}

bool inbox_is_over(const struct job *job, int64_t now_ns)
{
    int64_t deadline_ns = job_deadline_ns(job);
    return job_is_cancelled(job) || (deadline_ns && now_ns >= deadline_ns);
}

struct job *inbox_sweep(struct inbox *in, int64_t now_ns, int64_t *next_deadline_ns)
{
    struct job *over = NULL, *job;
    *next_deadline_ns = INT64_MAX;
    pthread_mutex_lock(&in->lock);
    struct job *queue = in->queue_first;
    in->queue_first = in->queue_last = NULL;
    in->stats.n_waiting = 0;
    while ((job = queue)) {
        queue = job_links(job)->queue_next;
        if (inbox_is_over(job, now_ns)) {
            job_links(job)->queue_next = over;
            over = job;
            continue;
        }
        append(in, job);
        int64_t deadline_ns = job_deadline_ns(job);
        if (deadline_ns && deadline_ns < *next_deadline_ns)
            *next_deadline_ns = deadline_ns;
    }
    pthread_mutex_unlock(&in->lock);
    return over;
}

/* ---- The ready list ---- */

void inbox_push_ready(struct inbox *in, struct job *job)
{
    struct job_links *links = job_links(job);
    pthread_mutex_lock(&in->lock);
    if (!links->on_ready_list) {
        job_hold(job);
        links->on_ready_list = true;
        links->ready_next = NULL;
        if (in->ready_last)
            job_links(in->ready_last)->ready_next = job;
        else
            in->ready_first = job;
        in->ready_last = job;
    }
    pthread_mutex_unlock(&in->lock);
}

struct job *inbox_take_ready(struct inbox *in)
{
    pthread_mutex_lock(&in->lock);
    struct job *job = in->ready_first;
    if (job) {
        in->ready_first = job_links(job)->ready_next;
        if (!in->ready_first)
            in->ready_last = NULL;
        job_links(job)->on_ready_list = false;
    }
    pthread_mutex_unlock(&in->lock);
    return job;
}

/* ---- State ---- */

void inbox_drain(struct inbox *in)
{
    pthread_mutex_lock(&in->lock);
    in->draining = true;
    pthread_mutex_unlock(&in->lock);
}

void inbox_fail(struct inbox *in, const struct error *failure)
{
    pthread_mutex_lock(&in->lock);
    in->failure = *failure;
    in->stats.failed = true;
    pthread_mutex_unlock(&in->lock);
}

void inbox_count(struct inbox *in, const struct engine_stats *more)
{
    pthread_mutex_lock(&in->lock);
    in->stats.n_steps += more->n_steps;
    in->stats.n_prompt_tokens += more->n_prompt_tokens;
    in->stats.n_output_tokens += more->n_output_tokens;
    in->stats.n_dropped_tokens += more->n_dropped_tokens;
    in->stats.n_state_loads += more->n_state_loads;
    in->stats.n_state_hits += more->n_state_hits;
    in->stats.step_ns += more->step_ns;
    pthread_mutex_unlock(&in->lock);
}

void inbox_stats(struct inbox *in, struct engine_stats *out)
{
    pthread_mutex_lock(&in->lock);
    *out = in->stats;
    pthread_mutex_unlock(&in->lock);
}
