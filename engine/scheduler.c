/* scheduler.c - see scheduler.h */
#include "engine/scheduler.h"

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "engine/inbox.h"

/* Prompt rows with scores at most: they need logits, and room in the job's ring. */
enum { MAX_SCORED_CHUNK = 256 };

/* A job that has a place in the model. */
struct slot {
    struct job *job; /* a counted reference; NULL: the slot is free */
    const struct job_request *request;
    size_t n_fed;     /* prompt tokens the model has seen */
    int64_t n_output; /* tokens drawn */
    int32_t next;     /* the last one, not fed yet, once the prompt is done */
    bool counts;      /* its penalties need to know the tokens */
};

/* The step that is being put together. */
struct plan {
    int32_t *tokens;        /* [max_rows] */
    struct model_seq *seqs; /* [n_slots] */
    int n_rows, n_seqs, n_logit_rows;
    int n_decode_rows, n_draws;
};

struct scheduler {
    struct scheduler_options options;
    struct model *model; /* borrowed */
    int32_t vocab_size;
    int64_t max_position;
    int max_rows, max_logit_rows, scored_chunk;

    pthread_t thread;
    struct inbox inbox;
    atomic_bool stopping;

    /* The engine thread's own. */
    struct sampler *sampler;
    struct slot *slots; /* [n_slots] */
    struct plan plan;
    int turn;               /* slot whose prompt is first in the next step */
    int64_t queue_wake_ns;  /* the queue's earliest deadline when last swept */
    bool readers_have_news; /* something went on the ready list since the last wake */
};

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
    *slot = (struct slot){0};
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

static void end_overdue_slots(struct scheduler *s, int64_t now)
{
    for (int i = 0; i < s->options.n_slots; i++) {
        struct slot *slot = &s->slots[i];
        if (!slot->job || !inbox_is_over(slot->job, now))
            continue;
        struct error err;
        enum job_finish how = why_over(slot->job, &err);
        end_slot(s, slot, how, how == FINISH_ERROR ? &err : NULL);
    }
}

/* The queue is looked through only when a cancellation, a submission or a deadline asks. */
static void end_overdue(struct scheduler *s, bool rung)
{
    int64_t now = job_clock_ns();
    end_overdue_slots(s, now);
    if (!rung && now < s->queue_wake_ns)
        return;
    struct job *job, *over = inbox_sweep(&s->inbox, now, &s->queue_wake_ns);
    while ((job = over)) {
        over = job_links(job)->queue_next;
        struct error err;
        enum job_finish how = why_over(job, &err);
        end_job(s, job, how, how == FINISH_ERROR ? &err : NULL);
    }
}

static void end_all(struct scheduler *s, const struct error *err)
{
    struct job *job;
    for (int i = 0; i < s->options.n_slots; i++)
        if (s->slots[i].job)
            end_slot(s, &s->slots[i], FINISH_ERROR, err);
    while ((job = inbox_take(&s->inbox)))
        end_job(s, job, FINISH_ERROR, err);
}

static void fail_device(struct scheduler *s, const struct error *cause)
{
    struct error err;
    fail(&err, STATUS_DEVICE, "the device failed: %.300s", cause->text);
    inbox_fail(&s->inbox, &err);
    end_all(s, &err);
}

/* ---- Admission ---- */

static void admit(struct scheduler *s)
{
    for (int i = 0; i < s->options.n_slots; i++) {
        struct slot *slot = &s->slots[i];
        if (slot->job)
            continue;
        struct job *job = inbox_admit(&s->inbox);
        if (!job)
            return;
        job_mark_admitted(job);
        *slot = (struct slot){.job = job, .request = job_request(job), .next = -1};
        slot->counts = sampler_counts(&slot->request->sampling);
        if (slot->counts)
            sampler_reset(s->sampler, i);
        model_reset(s->model, i);
    }
}

/* ---- Planning a step ---- */

static bool in_prompt(const struct slot *slot)
{
    return slot->n_fed < slot->request->n_prompt;
}

static bool is_scored(const struct slot *slot)
{
    return slot->request->prompt_logprobs >= 0;
}

/* Whether the job goes on to draw tokens when its prompt is done. */
static bool will_draw(const struct scheduler *s, const struct slot *slot)
{
    size_t n_prompt = slot->request->n_prompt;
    return slot->request->max_tokens > 0 &&
           (!s->max_position || n_prompt < (uint64_t)s->max_position);
}

static void add_seq(struct scheduler *s, int slot, const int32_t *tokens, int n_rows,
                    enum logits_wanted logits)
{
    struct plan *plan = &s->plan;
    memcpy(plan->tokens + plan->n_rows, tokens, (size_t)n_rows * sizeof(*tokens));
    plan->seqs[plan->n_seqs++] =
        (struct model_seq){.slot = slot, .n_rows = n_rows, .logits = logits};
    plan->n_rows += n_rows;
    plan->n_logit_rows += logits == LOGITS_ALL ? n_rows : logits == LOGITS_LAST;
}

static void plan_decoding(struct scheduler *s)
{
    for (int i = 0; i < s->options.n_slots; i++) {
        struct slot *slot = &s->slots[i];
        if (!slot->job || in_prompt(slot) || !job_has_room(slot->job, 1))
            continue;
        add_seq(s, i, &slot->next, 1, LOGITS_LAST);
        s->plan.n_decode_rows++;
        s->plan.n_draws++;
    }
}

/* The prompt's next chunk, if the step has room for it. False: it has not. */
static bool plan_chunk(struct scheduler *s, int i)
{
    struct slot *slot = &s->slots[i];
    size_t chunk = (size_t)(is_scored(slot) ? s->scored_chunk : s->options.chunk_tokens);
    size_t n_prompt = slot->request->n_prompt, end = (slot->n_fed / chunk + 1) * chunk;
    end = end < n_prompt ? end : n_prompt;
    int n_rows = (int)(end - slot->n_fed);
    bool draws = end == n_prompt && will_draw(s, slot);
    enum logits_wanted logits = is_scored(slot) ? LOGITS_ALL : draws ? LOGITS_LAST : LOGITS_NONE;
    int n_logit_rows = is_scored(slot) ? n_rows : draws;
    if (s->plan.n_rows + n_rows > s->max_rows ||
        s->plan.n_logit_rows + n_logit_rows > s->max_logit_rows)
        return false;

    /* A row scores the token after it; the very first token has an entry without a score. */
    int n_puts = draws;
    if (is_scored(slot))
        n_puts += (slot->n_fed == 0) + n_rows - (end == n_prompt);
    if (n_puts && !job_has_room(slot->job, (size_t)n_puts))
        return true;
    add_seq(s, i, slot->request->prompt + slot->n_fed, n_rows, logits);
    s->plan.n_draws += draws;
    return true;
}

/* Prompts in turns: the first that finds no room is the first of the next step. */
static void plan_prompts(struct scheduler *s)
{
    int n_slots = s->options.n_slots, first = s->turn, left_out = -1;
    for (int k = 0; k < n_slots; k++) {
        int i = (first + k) % n_slots;
        if (s->slots[i].job && in_prompt(&s->slots[i]) && !plan_chunk(s, i) && left_out < 0)
            left_out = i;
    }
    if (left_out >= 0)
        s->turn = left_out;
}

static void make_plan(struct scheduler *s)
{
    struct plan *plan = &s->plan;
    plan->n_rows = plan->n_seqs = plan->n_logit_rows = plan->n_decode_rows = plan->n_draws = 0;
    plan_decoding(s);
    plan_prompts(s);
}

/* ---- After a step ---- */

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

static void draw(struct scheduler *s, int i, const float *logits)
{
    struct slot *slot = &s->slots[i];
    const struct job_request *request = slot->request;
    const struct sampling_params *params = &request->sampling;
    struct sampled sampled;
    sampler_draw(s->sampler, i, logits, params, request->n_prompt + (uint64_t)slot->n_output,
                 slot->n_output, &sampled);
    slot->n_output++;
    slot->next = sampled.token;
    if (slot->counts)
        sampler_note(s->sampler, i, sampled.token, true);
    put(s, slot, &sampled, false);

    uint64_t position = request->n_prompt + (uint64_t)slot->n_output;
    if (sampler_is_stop(s->sampler, params, sampled.token))
        end_slot(s, slot, FINISH_STOP, NULL);
    else if (slot->n_output >= request->max_tokens ||
             (s->max_position && position >= (uint64_t)s->max_position))
        end_slot(s, slot, FINISH_LENGTH, NULL);
}

/* Rows from..end of the prompt are done; logits [end - from, V] score the tokens after them. */
static void put_scores(struct scheduler *s, struct slot *slot, size_t from, size_t end,
                       const float *logits)
{
    const struct job_request *request = slot->request;
    struct sampled sampled = {.token = request->prompt[0], .logprob = NAN};
    if (from == 0)
        put(s, slot, &sampled, true);
    for (size_t t = from; t < end && t + 1 < request->n_prompt; t++) {
        sampler_score(s->sampler, logits + (t - from) * (size_t)s->vocab_size,
                      request->prompt[t + 1], request->prompt_logprobs, &sampled);
        put(s, slot, &sampled, true);
    }
}

static void finish_chunk(struct scheduler *s, int i, int n_rows, const float *logits,
                         int n_logit_rows)
{
    struct slot *slot = &s->slots[i];
    const struct job_request *request = slot->request;
    size_t from = slot->n_fed, end = from + (size_t)n_rows;
    slot->n_fed = end;
    job_mark_prompt_done(slot->job, end);
    for (size_t t = from; slot->counts && t < end; t++)
        sampler_note(s->sampler, i, request->prompt[t], false);
    if (is_scored(slot))
        put_scores(s, slot, from, end, logits);
    if (end < request->n_prompt)
        return;
    if (will_draw(s, slot))
        draw(s, i, logits + (size_t)(n_logit_rows - 1) * (size_t)s->vocab_size);
    else
        end_slot(s, slot, FINISH_LENGTH, NULL);
}

static void use_results(struct scheduler *s, const float *logits)
{
    for (int k = 0; k < s->plan.n_seqs; k++) {
        const struct model_seq *seq = &s->plan.seqs[k];
        int n_logit_rows = seq->logits == LOGITS_ALL ? seq->n_rows : seq->logits == LOGITS_LAST;
        if (in_prompt(&s->slots[seq->slot]))
            finish_chunk(s, seq->slot, seq->n_rows, logits, n_logit_rows);
        else
            draw(s, seq->slot, logits);
        logits += (size_t)n_logit_rows * (size_t)s->vocab_size;
    }
}

/* Tokens are counted before readers can see them, so that the counters never lag behind. */
static void step(struct scheduler *s)
{
    const struct plan *plan = &s->plan;
    const float *logits = NULL;
    struct error err;
    int64_t start_ns = job_clock_ns();
    if (model_step(s->model, plan->tokens, plan->seqs, plan->n_seqs, &logits, &err)) {
        fail_device(s, &err);
        return;
    }
    inbox_count(&s->inbox, &(struct engine_stats){
                               .n_steps = 1,
                               .n_prompt_tokens = (uint64_t)(plan->n_rows - plan->n_decode_rows),
                               .n_output_tokens = (uint64_t)plan->n_draws,
                           });
    use_results(s, logits);
    inbox_count(&s->inbox,
                &(struct engine_stats){.step_ns = (uint64_t)(job_clock_ns() - start_ns)});
}

/* ---- The thread ---- */

/* When a job that only waits runs into its deadline. */
static int64_t next_deadline_ns(const struct scheduler *s)
{
    int64_t earliest = s->queue_wake_ns;
    for (int i = 0; i < s->options.n_slots; i++) {
        int64_t deadline_ns = s->slots[i].job ? job_deadline_ns(s->slots[i].job) : 0;
        if (deadline_ns && deadline_ns < earliest)
            earliest = deadline_ns;
    }
    return earliest;
}

static void *run(void *context)
{
    struct scheduler *s = context;
    while (!atomic_load(&s->stopping)) {
        end_overdue(s, inbox_answer(&s->inbox));
        admit(s);
        make_plan(s);
        if (s->plan.n_seqs)
            step(s);
        wake_readers(s);
        if (!s->plan.n_seqs)
            inbox_sleep(&s->inbox, next_deadline_ns(s));
    }
    struct error err;
    fail(&err, STATUS_SHUTDOWN, "the engine is shutting down");
    end_all(s, &err);
    wake_readers(s);
    return NULL;
}

/* ---- Opening, closing, submitting ---- */

void scheduler_limits(const struct scheduler_options *o, int *max_rows, int *max_logit_rows)
{
    int least = o->n_slots - 1 + o->chunk_tokens;
    int scored = o->chunk_tokens < MAX_SCORED_CHUNK ? o->chunk_tokens : MAX_SCORED_CHUNK;
    *max_rows = o->step_tokens > least ? o->step_tokens : least;
    *max_logit_rows = o->n_slots - 1 + scored;
}

static enum status take_memory(struct scheduler *s, struct error *err)
{
    size_t n_slots = (size_t)s->options.n_slots;
    s->slots = calloc(n_slots, sizeof(*s->slots));
    s->plan.tokens = calloc((size_t)s->max_rows, sizeof(*s->plan.tokens));
    s->plan.seqs = calloc(n_slots, sizeof(*s->plan.seqs));
    if (!s->slots || !s->plan.tokens || !s->plan.seqs)
        return fail(err, STATUS_NOMEM, "scheduler of %zu slots: out of memory", n_slots);
    const struct model_config *config = model_config(s->model);
    return sampler_open(&s->sampler, s->options.n_slots, config->vocab_size, config->eos_token_id,
                        config->n_eos, err);
}

static void free_memory(struct scheduler *s)
{
    sampler_close(s->sampler);
    inbox_free(&s->inbox);
    free(s->plan.tokens);
    free(s->plan.seqs);
    free(s->slots);
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
    s->model = model;
    s->vocab_size = model_config(model)->vocab_size;
    s->max_position = model_max_position(model);
    s->scored_chunk =
        options->chunk_tokens < MAX_SCORED_CHUNK ? options->chunk_tokens : MAX_SCORED_CHUNK;
    scheduler_limits(options, &s->max_rows, &s->max_logit_rows);
    s->queue_wake_ns = INT64_MAX;
    inbox_init(&s->inbox, options->n_slots, options->max_queue);

    enum status st = take_memory(s, err);
    if (!st) {
        int failed = pthread_create(&s->thread, NULL, run, s);
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
    if (s->max_position && r->n_prompt > (uint64_t)s->max_position)
        return fail_field(err, STATUS_TOO_LARGE, "prompt",
                          "the prompt has %zu tokens; this model's context holds %lld", r->n_prompt,
                          (long long)s->max_position);
    for (size_t i = 0; i < r->n_prompt; i++)
        if (r->prompt[i] < 0 || r->prompt[i] >= s->vocab_size)
            return fail_field(err, STATUS_INVALID, "prompt",
                              "token %d at index %zu of the prompt is outside 0..%d", r->prompt[i],
                              i, s->vocab_size - 1);
    return STATUS_OK;
}

enum status scheduler_submit(struct scheduler *s, struct job *job, struct error *err)
{
    const struct job_request *request = job_request(job);
    enum status st = check_prompt(s, request, err);
    if (!st)
        st = sampling_params_check(&request->sampling, s->vocab_size, err);
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
