/* scheduler.c - see scheduler.h */
#include "engine/scheduler.h"

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/thread.h"
#include "engine/image.h"
#include "engine/inbox.h"
#include "engine/plan.h"
#include "engine/stepper.h"

enum { MAX_DEPTH = 2, MAX_SAVES = 8 };

/* A slot's state on its way into an image of its job: that of a mark, or at its end. */
struct save {
    struct slot *slot;
    struct image *image;
    bool is_mark;
};

struct scheduler {
    struct scheduler_options options;
    const struct model_config *config; /* the model's */
    int64_t max_position;
    size_t n_state_values;
    bool is_device; /* slots are not host memory */
    int depth;

    pthread_t thread;
    struct inbox inbox;
    atomic_bool stopping;
    /* [n_slots] id of the image whose state a slot holds, 0: none. The engine thread writes. */
    atomic_uint_least64_t *resident;

    /* The engine thread's own. */
    struct model *model; /* borrowed */
    struct stepper *stepper;
    struct planner *planner;
    struct plan plans[MAX_DEPTH]; /* of queued steps, and the next one */
    int oldest, n_queued;         /* which of them are on their way */
    struct save saves[MAX_SAVES]; /* a ring; finished in this order */
    int oldest_save, n_saves, max_saves;
    bool puts_off;          /* a slot whose job is cancelled or overdue has a save under way */
    int64_t busy_since_ns;  /* where the time of steps is counted from */
    int64_t queue_wake_ns;  /* the queue's earliest deadline when last swept */
    int64_t slots_wake_ns;  /* no slot has an earlier deadline */
    bool readers_have_news; /* something went on the ready list since the last wake */
};

static uint64_t resident_in(const struct scheduler *s, int slot)
{
    return atomic_load_explicit(&s->resident[slot], memory_order_relaxed);
}

static void set_resident(struct scheduler *s, int slot, uint64_t id)
{
    atomic_store_explicit(&s->resident[slot], id, memory_order_relaxed);
}

static void push_ready(struct scheduler *s, struct job *job)
{
    inbox_push_ready(&s->inbox, job);
    s->readers_have_news = true;
}

static void wake_readers(struct scheduler *s)
{
    if (s->readers_have_news && s->options.wake)
        s->options.wake(s->options.wake_context);
    s->readers_have_news = false;
}

/* ---- Ends ---- */

/* Give the job's reader the end and drop the engine's reference. */
static void end_job(struct scheduler *s, struct job *job, enum job_finish how,
                    const struct error *err)
{
    if (job_finish(job, how, err))
        push_ready(s, job);
    job_release(job);
}

static void end_slot(struct scheduler *s, struct slot *slot, enum job_finish how,
                     const struct error *err)
{
    struct job *job = slot->job;
    bool keeps_state = resident_in(s, planner_index(s->planner, slot)) != 0;
    planner_leave(s->planner, slot, keeps_state);
    inbox_leave(&s->inbox);
    end_job(s, job, how, err);
}

/* How a job ends that is over: fills err for a deadline. */
static enum job_finish why_over(const struct job *job, struct error *err)
{
    if (job_is_cancelled(job))
        return FINISH_CANCELLED;
    fail(err, STATUS_TIMEOUT, "the deadline of %lld ms passed",
         (long long)job_request(job)->deadline_ms);
    return FINISH_ERROR;
}

static int64_t earlier(int64_t a_ns, int64_t b_ns)
{
    return a_ns < b_ns ? a_ns : b_ns;
}

static void end_overdue_slots(struct scheduler *s, int64_t now)
{
    s->slots_wake_ns = INT64_MAX;
    for (int i = 0; i < s->options.n_slots; i++) {
        struct slot *slot = planner_slot(s->planner, i);
        bool is_over = slot->job && inbox_is_over(slot->job, now);
        if (is_over && slot->n_saves) {
            s->puts_off = true; /* its images are being filled; soon it ends anyway, or then */
        } else if (is_over) {
            struct error err;
            enum job_finish how = why_over(slot->job, &err);
            end_slot(s, slot, how, how == FINISH_ERROR ? &err : NULL);
        } else if (slot->job && slot->deadline_ns) {
            s->slots_wake_ns = earlier(s->slots_wake_ns, slot->deadline_ns);
        }
    }
}

static void end_overdue_queue(struct scheduler *s, int64_t now)
{
    struct job *job, *over = inbox_sweep(&s->inbox, now, &s->queue_wake_ns);
    while ((job = over)) {
        over = job_links(job)->queue_next;
        struct error err;
        enum job_finish how = why_over(job, &err);
        end_job(s, job, how, how == FINISH_ERROR ? &err : NULL);
    }
}

/* Slots and queue are looked through only when a cancellation or a deadline asks, the queue
 * also for the deadline of a new job. */
static void end_overdue(struct scheduler *s, bool rung, bool by_job)
{
    int64_t now = job_clock_ns();
    if (by_job || now >= s->slots_wake_ns)
        end_overdue_slots(s, now);
    if (rung || now >= s->queue_wake_ns)
        end_overdue_queue(s, now);
}

static void end_all(struct scheduler *s, const struct error *err)
{
    struct job *job;
    for (int i = 0; i < s->options.n_slots; i++)
        if (planner_slot(s->planner, i)->job)
            end_slot(s, planner_slot(s->planner, i), FINISH_ERROR, err);
    while ((job = inbox_take(&s->inbox)))
        end_job(s, job, FINISH_ERROR, err);
}

/* Steps on their way are given up: the stepper may only be closed. */
static void fail_device(struct scheduler *s, const struct error *cause)
{
    struct error err;
    fail(&err, STATUS_DEVICE, "the device failed: %.300s", cause->text);
    inbox_fail(&s->inbox, &err);
    s->n_queued = s->n_saves = 0;
    for (int i = 0; i < s->options.n_slots; i++)
        set_resident(s, i, 0);
    end_all(s, &err);
}

/* ---- States on their way out ---- */

/* What was waited for goes on: the rest of the prompt after a mark, or the job's end, which its
 * reader sees only now that its states are there. */
static void use_saved(struct scheduler *s, const struct save *save)
{
    struct slot *slot = save->slot;
    int index = planner_index(s->planner, slot);
    slot->n_saves--;
    if (save->is_mark) {
        job_mark_saved(slot->job);
        planner_release(s->planner, slot);
    } else {
        save->image->slot = index;
        set_resident(s, index, save->image->id);
    }
    if (slot->how != FINISH_NONE && !slot->n_saves)
        end_slot(s, slot, slot->how, NULL);
}

/* The oldest save. False: it is not over, or the device failed. */
static bool finish_save(struct scheduler *s, bool wait)
{
    const struct save save = s->saves[s->oldest_save];
    struct error err;
    bool done = false;
    if (image_finish_save(s->model, save.image, wait, &done, &err)) {
        fail_device(s, &err);
        return false;
    }
    if (!done)
        return false;
    s->oldest_save = (s->oldest_save + 1) % MAX_SAVES;
    s->n_saves--;
    use_saved(s, &save);
    if (s->puts_off)
        s->slots_wake_ns = 0;
    s->puts_off = false;
    return true;
}

/* Those that are over; with nothing else to do the oldest is waited for. False: there is none. */
static bool finish_saves(struct scheduler *s, bool wait)
{
    bool any = false;
    while (s->n_saves && finish_save(s, wait && !any))
        any = true;
    return any;
}

/* The slot gets no rows until it is finished. Where too many are under way the oldest go first.
 * False: the device failed. */
static bool begin_save(struct scheduler *s, struct slot *slot, struct image *image, bool is_mark)
{
    struct error err;
    while (s->n_saves == s->max_saves)
        if (!finish_save(s, true))
            return false;
    if (image_begin_save(s->model, planner_index(s->planner, slot), image, &err)) {
        fail_device(s, &err);
        return false;
    }
    s->saves[(s->oldest_save + s->n_saves++) % MAX_SAVES] = (struct save){slot, image, is_mark};
    slot->n_saves++;
    return true;
}

/* The end of a job in good order, with its state where the request wants it. A step that is
 * queued may have fed the last token already: then nothing is pending. */
static void complete_slot(struct scheduler *s, struct slot *slot, enum job_finish how,
                          int32_t last_token)
{
    struct image *into = slot->request->into;
    if (into && !begin_save(s, slot, into, false))
        return;
    if (into) {
        uint64_t length = slot->n_before + slot->request->n_prompt + (uint64_t)slot->n_output;
        CHECK(into->position <= length && length - into->position <= IMAGE_MAX_PENDING);
        into->n_pending = (int)(length - into->position);
        into->pending[0] = last_token;
    }
    if (slot->n_saves) /* a mark's, too */
        planner_end(s->planner, slot, how);
    else
        end_slot(s, slot, how, NULL);
}

/* ---- Queueing a step ---- */

/* The slot that holds the state already, or -1. */
static int resident_slot(const struct scheduler *s, const struct image *image)
{
    bool is_there =
        image && image->slot < s->options.n_slots && resident_in(s, image->slot) == image->id;
    return is_there ? image->slot : -1;
}

/* Parameters and state of a new job; the state only if it is not there already. */
static enum status prepare_slot(struct scheduler *s, struct slot *slot, struct error *err)
{
    const struct job_request *request = slot->request;
    int index = planner_index(s->planner, slot);
    bool is_there = request->from && resident_in(s, index) == request->from->id;
    set_resident(s, index, 0);
    enum status st = stepper_admit(s->stepper, index, &request->sampling, !is_there, err);
    if (!st && request->n_seen)
        st = stepper_note(s->stepper, index, request->prompt, request->n_seen, err);
    if (!st && request->from && !is_there)
        st = image_load(s->model, index, request->from, err);
    if (request->from)
        inbox_count(&s->inbox,
                    &(struct engine_stats){.n_state_hits = is_there, .n_state_loads = !is_there});
    return st;
}

/* The job that was to compute the state it begins from ended before that. */
static void end_lost(struct scheduler *s, struct job *job)
{
    struct error err;
    fail(&err, STATUS_CONFLICT, "the state that the job begins from was not computed");
    inbox_leave(&s->inbox);
    end_job(s, job, FINISH_ERROR, &err);
}

static void admit(struct scheduler *s)
{
    struct job *job;
    struct error err;
    while (planner_has_room(s->planner) && (job = inbox_admit(&s->inbox))) {
        if (job_start(job) == JOB_LOST) {
            end_lost(s, job);
            continue;
        }
        struct slot *slot =
            planner_enter(s->planner, job, resident_slot(s, job_request(job)->from));
        job_mark_admitted(job);
        if (slot->deadline_ns)
            s->slots_wake_ns = earlier(s->slots_wake_ns, slot->deadline_ns);
        if (prepare_slot(s, slot, &err)) {
            fail_device(s, &err);
            return;
        }
    }
}

/* False: there is nothing to do. */
static bool queue_step(struct scheduler *s)
{
    struct plan *plan = &s->plans[(s->oldest + s->n_queued) % s->depth];
    struct error err;
    planner_next(s->planner, plan);
    if (!plan->n_seqs)
        return false;
    if (!s->n_queued)
        s->busy_since_ns = job_clock_ns();
    if (stepper_queue(s->stepper, plan->seqs, plan->n_seqs, &err))
        fail_device(s, &err);
    else
        s->n_queued++;
    return true;
}

/* ---- Collecting a step ---- */

static void put(struct scheduler *s, struct slot *slot, const struct sampled *sampled,
                bool is_prompt)
{
    struct job_token token = {
        .token = sampled->token,
        .is_prompt = is_prompt,
        .logprob = sampled->logprob,
        .n_top = sampled->n_top,
    };
    memcpy(token.top, sampled->top, (size_t)sampled->n_top * sizeof(token.top[0]));
    if (job_put(slot->job, &token))
        push_ready(s, slot->job);
}

static void put_draw(struct scheduler *s, struct slot *slot, const struct sampled *sampled)
{
    const struct model_config *config = s->config;
    slot->n_output++;
    put(s, slot, sampled, false);
    if (sampling_is_stop(&slot->request->sampling, config->eos_token_id, config->n_eos,
                         sampled->token))
        complete_slot(s, slot, FINISH_STOP, sampled->token);
    else if (slot->n_output >= slot->max_draws)
        complete_slot(s, slot, FINISH_LENGTH, sampled->token);
}

/* The slot is held at a mark: nothing of it was queued behind the rows that came back. False:
 * the device failed. */
static bool save_mark(struct scheduler *s, struct slot *slot)
{
    const struct job_mark *mark = &slot->request->marks[slot->n_marks];
    if (!begin_save(s, slot, mark->image, true))
        return false;
    CHECK(mark->image->position == slot->n_before + mark->at);
    return true;
}

/* results: the share's scores of the tokens after its rows, then its draw. */
static void use_share(struct scheduler *s, struct slot *slot, const struct share *share,
                      const struct sampled *results)
{
    const struct job_request *request = slot->request;
    size_t end = share->from + (size_t)share->n_prompt_rows;
    slot->n_coming -= share->n_entries;
    if (share->n_prompt_rows)
        job_mark_prompt_done(slot->job, end);
    if (share->n_entries > share->n_scores + share->draws)
        put(s, slot, &(struct sampled){.token = request->prompt[0], .logprob = NAN}, true);
    for (int i = 0; i < share->n_scores; i++)
        put(s, slot, &results[i], true);
    if (share->n_prompt_rows && slot->held && slot->n_fed == end && !save_mark(s, slot))
        return;
    if (share->draws)
        put_draw(s, slot, &results[share->n_scores]);
    else if (end == request->n_prompt)
        complete_slot(s, slot, FINISH_LENGTH, 0);
}

/* Tokens are counted before readers can see them, so that the counters never lag behind. What a
 * job that has ended still had on its way is nobody's. */
static void count_step(struct scheduler *s, const struct plan *plan)
{
    struct engine_stats more = {.n_steps = 1};
    for (int k = 0; k < plan->n_seqs; k++) {
        const struct share *share = &plan->shares[k];
        bool owned = planner_owner(s->planner, share) != NULL;
        more.n_prompt_tokens += owned ? (uint64_t)share->n_prompt_rows : 0;
        more.n_output_tokens += share->draws && owned;
        more.n_dropped_tokens += share->draws && !owned;
    }
    inbox_count(&s->inbox, &more);
}

static void collect_step(struct scheduler *s)
{
    const struct plan *plan = &s->plans[s->oldest];
    const struct sampled *results = NULL;
    struct error err;
    if (stepper_collect(s->stepper, &results, &err)) {
        fail_device(s, &err);
        return;
    }
    s->oldest = (s->oldest + 1) % s->depth;
    s->n_queued--;
    count_step(s, plan);
    for (int k = 0; k < plan->n_seqs; k++) {
        const struct share *share = &plan->shares[k];
        struct slot *slot = planner_owner(s->planner, share);
        if (slot)
            use_share(s, slot, share, results);
        results += share->n_scores + share->draws;
    }
    int64_t now = job_clock_ns();
    inbox_count(&s->inbox, &(struct engine_stats){.step_ns = (uint64_t)(now - s->busy_since_ns)});
    s->busy_since_ns = now;
}

/* ---- The thread ---- */

/* One turn: queue a step if there is something to do, collect the oldest when no more can be
 * queued, and finish what was saved meanwhile. False: nothing was done. */
static bool turn(struct scheduler *s)
{
    bool by_job, rung = inbox_answer(&s->inbox, &by_job);
    end_overdue(s, rung, by_job);
    if (by_job)
        planner_retry(s->planner);
    admit(s);
    bool queued = queue_step(s);
    bool collects = s->n_queued && (!queued || s->n_queued == s->depth);
    if (collects)
        collect_step(s);
    bool saved = finish_saves(s, !queued && !collects);
    wake_readers(s);
    return queued || collects || saved;
}

static void *run(void *context)
{
    struct scheduler *s = context;
    /* Asked again after the turn, which may have answered the very ring that went with it. */
    while (!atomic_load(&s->stopping))
        if (!turn(s) && !atomic_load(&s->stopping))
            inbox_sleep(&s->inbox, earlier(s->queue_wake_ns, s->slots_wake_ns));
    while (s->n_queued)
        collect_step(s);
    while (s->n_saves)
        finish_saves(s, true);
    struct error err;
    fail(&err, STATUS_SHUTDOWN, "the engine is shutting down");
    end_all(s, &err);
    wake_readers(s);
    return NULL;
}

/* ---- Opening, closing, submitting ---- */

static int max_batch(const struct scheduler_options *o)
{
    return o->max_batch && o->max_batch < o->n_slots ? o->max_batch : o->n_slots;
}

void scheduler_limits(const struct scheduler_options *o, int *max_rows, int *max_logit_rows)
{
    int n_beside = max_batch(o) < o->n_slots ? max_batch(o) : o->n_slots - 1;
    int least = n_beside + o->chunk_tokens;
    *max_rows = o->step_tokens > least ? o->step_tokens : least;
    *max_logit_rows = n_beside + planner_scored_chunk(o->chunk_tokens);
}

static enum status take_memory(struct scheduler *s, struct model *model, struct error *err)
{
    struct plan_limits limits = {.n_slots = s->options.n_slots,
                                 .max_batch = max_batch(&s->options),
                                 .chunk_tokens = s->options.chunk_tokens,
                                 .max_position = s->max_position};
    scheduler_limits(&s->options, &limits.max_rows, &limits.max_logit_rows);
    struct stepper_options options = {.n_slots = limits.n_slots,
                                      .max_rows = limits.max_rows,
                                      .max_logit_rows = limits.max_logit_rows,
                                      .depth = s->options.depth};
    s->model = model;
    s->resident = calloc((size_t)limits.n_slots, sizeof(*s->resident));
    if (!s->resident)
        return fail(err, STATUS_NOMEM, "scheduler of %d slots: out of memory", limits.n_slots);
    enum status st = stepper_open(&s->stepper, model, &options, err);
    if (!st)
        st = planner_open(&s->planner, &limits, err);
    s->depth = st ? 0 : stepper_depth(s->stepper);
    s->max_saves = model_max_saves(model) < MAX_SAVES ? model_max_saves(model) : MAX_SAVES;
    for (int i = 0; i < s->depth && !st; i++)
        st = plan_open(&s->plans[i], &limits, err);
    return st;
}

static void free_memory(struct scheduler *s)
{
    stepper_close(s->stepper);
    planner_close(s->planner);
    for (int i = 0; i < MAX_DEPTH; i++)
        plan_close(&s->plans[i]);
    inbox_free(&s->inbox);
    free(s->resident);
    free(s);
}

enum status scheduler_open(struct scheduler **out, struct model *model,
                           const struct scheduler_options *options, struct error *err)
{
    CHECK(options->n_slots > 0 && options->max_queue > 0 && options->chunk_tokens > 0);
    struct scheduler *s = calloc(1, sizeof(*s));
    if (!s)
        return fail(err, STATUS_NOMEM, "scheduler: out of memory");
    s->options = *options;
    s->config = model_config(model);
    s->max_position = model_max_position(model);
    s->n_state_values = image_values_of(model);
    s->is_device = model_is_on_device(model);
    s->queue_wake_ns = s->slots_wake_ns = INT64_MAX;
    inbox_init(&s->inbox, options->n_slots, options->max_queue);

    enum status st = take_memory(s, model, err);
    if (!st) {
        int failed = thread_start(&s->thread, "latte-engine", run, s);
        if (failed)
            st = fail(err, STATUS_NOMEM, "engine thread: %s", strerror(failed));
    }
    if (st) {
        free_memory(s);
        return st;
    }
    *out = s;
    return STATUS_OK;
}

void scheduler_close(struct scheduler *s)
{
    if (!s)
        return;
    inbox_drain(&s->inbox);
    atomic_store(&s->stopping, true);
    inbox_ring(&s->inbox.bell);
    pthread_join(s->thread, NULL);
    free_memory(s);
}

static enum status check_prompt(const struct scheduler *s, const struct job_request *r,
                                struct error *err)
{
    size_t limit = s->options.max_prompt_tokens;
    if (limit && r->n_prompt > limit)
        return fail_field(err, STATUS_TOO_LARGE, "prompt",
                          "the prompt has %zu tokens; this server takes at most %zu", r->n_prompt,
                          limit);
    uint64_t seen = r->from && !r->after ? r->from->position - r->n_seen : 0;
    if (s->max_position && r->n_prompt + seen > (uint64_t)s->max_position)
        return fail_field(err, STATUS_TOO_LARGE, "prompt",
                          "the prompt has %zu tokens after %llu; this model's context holds %lld",
                          r->n_prompt, (unsigned long long)seen, (long long)s->max_position);
    if (r->from && r->from->store->n_values != s->n_state_values)
        return fail(err, STATUS_INVALID, "the state has %zu values; this model's has %zu",
                    r->from->store->n_values, s->n_state_values);
    for (size_t i = 0; i < r->n_prompt; i++)
        if (r->prompt[i] < 0 || r->prompt[i] >= s->config->vocab_size)
            return fail_field(err, STATUS_INVALID, "prompt",
                              "token %d at index %zu of the prompt is outside 0..%d", r->prompt[i],
                              i, s->config->vocab_size - 1);
    return STATUS_OK;
}

enum status scheduler_submit(struct scheduler *s, struct job *job, struct error *err)
{
    const struct job_request *request = job_request(job);
    enum status st = check_prompt(s, request, err);
    if (!st)
        st = sampling_params_check(&request->sampling, s->config->vocab_size, err);
    return st ? st : inbox_submit(&s->inbox, job, err);
}

struct job *scheduler_take_ready(struct scheduler *s)
{
    return inbox_take_ready(&s->inbox);
}

void scheduler_drain(struct scheduler *s)
{
    inbox_drain(&s->inbox);
}

void scheduler_stats(struct scheduler *s, struct engine_stats *out)
{
    inbox_stats(&s->inbox, out);
}

bool scheduler_is_resident(const struct scheduler *s, const struct image *image)
{
    return s->is_device && resident_slot(s, image) >= 0;
}
