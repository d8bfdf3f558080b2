/* stream.c - see stream.h. What a reply looks like is in stream_reply.c. */
#include "server/stream_private.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "server/http.h"
#include "server/metrics.h"

enum {
    READ_TOKENS = 16,     /* from a job at once */
    MIN_FORK_TOKENS = 16, /* shorter prompts cost less than a state that is saved and loaded */
};

/* ---- jobs ---------------------------------------------------------------------------------- */

/* What the engine samples by. Rankings of best_of need every token's logprob. */
static void fill_sampling(struct sampling_params *p, const struct codec_request *q, uint32_t choice)
{
    sampling_params_init(p);
    p->temperature = (float)q->temperature;
    p->top_k = (int)q->top_k;
    p->top_p = fmaxf((float)q->top_p, 1e-9f); /* 0: the most likely token alone */
    p->min_p = (float)q->min_p;
    p->typical_p = (float)q->typical_p;
    p->repetition_penalty = (float)q->repetition_penalty;
    p->presence_penalty = (float)q->presence_penalty;
    p->frequency_penalty = (float)q->frequency_penalty;
    p->seed = q->seed;
    p->choice = choice;
    p->min_tokens = (int)q->min_tokens;
    p->ignore_eos = q->ignore_eos;
    p->n_logprobs = (int)q->n_logprobs;
    if (p->n_logprobs < 0 && q->best_of > q->n)
        p->n_logprobs = 0;
    p->n_stop_tokens = q->n_stop_tokens;
    memcpy(p->stop_tokens, q->stop_tokens, sizeof(q->stop_tokens));
    p->n_logit_bias = q->n_logit_bias;
    p->logit_bias = q->logit_bias;
}

/* Scores of a prompt come with its own processing. */
static bool may_fork(const struct generation *g, const struct stream_prompt *prompt)
{
    const struct codec_request *q = g->setup.request;
    bool scored = q->echo && q->n_logprobs >= 0;
    return g->setup.images && !g->setup.turn && q->best_of > 1 && !scored &&
           prompt->n - prompt->n_seen > MIN_FORK_TOKENS;
}

/* A place for the state that the first choice of prompt i leaves before its last token, so that
 * each choice feeds that one itself. Without room for it each computes its whole prompt. */
static void plan_fork(struct generation *g, size_t i)
{
    const struct stream_prompt *prompt = &g->setup.prompts[i];
    const struct job_mark *last = prompt->n_marks ? &prompt->marks[prompt->n_marks - 1] : NULL;
    struct error err;
    if (!may_fork(g, prompt))
        return;
    if (last && last->at == prompt->n - 1) {
        g->forks[i] = last->image;
        image_hold(last->image);
    } else if (image_new(&g->forks[i], g->setup.images, &err)) {
        g->forks[i] = NULL;
    }
}

/* The first choice leaves the state at a mark; the others wait for it in the engine's queue. */
static void fork_job(const struct generation *g, size_t prompt, uint32_t choice,
                     struct job_request *request)
{
    size_t n_seen = request->n_prompt - 1;
    if (choice) {
        request->from = g->forks[prompt];
        request->n_seen = n_seen;
        request->after = g->sequences[prompt * (size_t)g->setup.request->best_of].job;
    } else if (!request->n_marks || request->marks[request->n_marks - 1].at < n_seen) {
        request->marks[request->n_marks++] = (struct job_mark){n_seen, g->forks[prompt]};
    }
}

/* What the first choice leaves of its way through the prompt, and the only one at its end. */
static void set_marks(const struct stream_prompt *prompt, struct job_request *request)
{
    request->n_marks = prompt->n_marks;
    memcpy(request->marks, prompt->marks, (size_t)prompt->n_marks * sizeof(*prompt->marks));
    if (prompt->answer)
        request->into = prompt->answer;
}

/* The state that a prompt's jobs begin from. */
static struct image *base_of(const struct generation *g, const struct stream_prompt *prompt)
{
    if (g->setup.turn)
        return g->setup.turn->from;
    return g->setup.from ? g->setup.from : prompt->from;
}

static enum status start_job(struct generation *g, size_t i, struct error *err)
{
    const struct codec_request *q = g->setup.request;
    struct sequence *s = &g->sequences[i];
    size_t prompt = i / (size_t)q->best_of;
    uint32_t choice = (uint32_t)(i % (size_t)q->best_of);
    struct job_request request = {
        .prompt = s->prompt->ids,
        .n_prompt = s->prompt->n,
        .shared = s->prompt->shared,
        .from = base_of(g, s->prompt),
        .n_seen = s->prompt->n_seen,
        .into = g->setup.turn ? g->setup.turn->into : NULL,
        .max_tokens = q->max_tokens,
        .deadline_ms = g->setup.deadline_ms,
        .prompt_logprobs = q->echo ? (int)q->n_logprobs : -1,
        .user = g->setup.owner,
    };
    fill_sampling(&request.sampling, q, choice);
    if (!choice) {
        set_marks(s->prompt, &request);
        plan_fork(g, prompt);
    }
    if (g->forks[prompt])
        fork_job(g, prompt, choice, &request);
    enum status st = job_new(&s->job, &request, err);
    if (st)
        return st;
    g->n_running++;
    return g->setup.submit(g->setup.submit_context, s->job, err);
}

/* The reader's side of a job is over. */
static void drop_job(struct generation *g, struct sequence *s)
{
    if (!s->job)
        return;
    struct job_snapshot snapshot;
    job_snapshot(s->job, &snapshot);
    stream_keep_marks(g, s, &snapshot);
    job_cancel(s->job);
    job_set_user(s->job, NULL);
    job_release(s->job);
    s->job = NULL;
    g->n_running--;
}

/* Drop all that run, counted as ended this way. */
static void drop_jobs(struct generation *g, const char *reason)
{
    for (size_t i = 0; i < g->n_sequences; i++) {
        if (g->sequences[i].job)
            metrics_count_finish(reason);
        drop_job(g, &g->sequences[i]);
    }
}

static double seconds_between(int64_t from_ns, int64_t to_ns)
{
    return (double)(to_ns - from_ns) / 1e9;
}

static void observe(const struct generation *g, const struct sequence *s,
                    const struct job_snapshot *snapshot)
{
    int64_t end = snapshot->finished_ns ? snapshot->finished_ns : job_clock_ns();
    int64_t n_output = s->output.n_tokens, arrival = g->setup.arrival_ns;
    metrics_observe(METRIC_E2E_LATENCY, seconds_between(arrival, end));
    if (snapshot->admitted_ns)
        metrics_observe(METRIC_QUEUE_TIME,
                        seconds_between(snapshot->submitted_ns, snapshot->admitted_ns));
    if (snapshot->first_token_ns)
        metrics_observe(METRIC_TIME_TO_FIRST_TOKEN,
                        seconds_between(arrival, snapshot->first_token_ns));
    if (snapshot->first_token_ns && g->setup.from)
        metrics_observe_turn(image_length(g->setup.from),
                             seconds_between(arrival, snapshot->first_token_ns));
    if (snapshot->first_token_ns && n_output > 1)
        metrics_observe(METRIC_TIME_PER_TOKEN,
                        seconds_between(snapshot->first_token_ns, end) / (double)(n_output - 1));
    metrics_observe(METRIC_PROMPT_LENGTH, (double)s->prompt->n);
    metrics_observe(METRIC_OUTPUT_LENGTH, (double)n_output);
    metrics_count_finish(s->finish);
}

static void end_with_error(struct generation *g, const struct error *err)
{
    g->error = *err;
    g->failed = true;
    drop_jobs(g, "error");
}

/* A sequence has come to its end in good order. */
static void finish_sequence(struct generation *g, struct sequence *s, const char *reason)
{
    struct job_snapshot snapshot;
    struct error err;
    job_snapshot(s->job, &snapshot);
    s->finish = reason;
    observe(g, s, &snapshot);
    drop_job(g, s);
    if (g->setup.turn && stream_turn_settle(g, s, snapshot.finish, &err))
        end_with_error(g, &err);
}

static enum status fail_too_large(const struct stream_setup *setup, struct error *err)
{
    return fail(err, STATUS_TOO_LARGE, "the reply is over %zu bytes; ask for less, or stream it",
                setup->max_bytes);
}

static void end_without_room(struct generation *g, enum status st)
{
    struct error err;
    if (st == STATUS_TOO_LARGE)
        fail_too_large(&g->setup, &err);
    else
        fail(&err, st, "out of memory while writing the reply");
    end_with_error(g, &err);
}

void stream_count_bytes(struct generation *g, struct sequence *s)
{
    size_t n = output_bytes(&s->output);
    g->n_bytes += n - s->n_bytes;
    s->n_bytes = n;
}

/* What stands in the way of going on with a sequence's output. */
static enum status check_room(const struct generation *g, const struct sequence *s)
{
    if (output_failed(&s->output))
        return STATUS_NOMEM;
    return g->n_bytes > g->setup.max_bytes ? STATUS_TOO_LARGE : STATUS_OK;
}

/* By the engine's clock, so that a client that reads slowly does not show as a slow model. */
static void observe_gap(struct sequence *s, const struct job_token *token)
{
    if (s->token_ns)
        metrics_observe(METRIC_INTER_TOKEN, seconds_between(s->token_ns, token->time_ns));
    s->token_ns = token->time_ns;
}

static void push_tokens(struct generation *g, struct sequence *s, const struct job_token *tokens,
                        size_t n)
{
    int64_t before = s->output.n_tokens;
    s->begun |= n > 0;
    for (size_t i = 0; i < n && !s->output.stopped; i++) {
        if (tokens[i].is_prompt) {
            output_push_prompt(&s->output, &tokens[i]);
        } else {
            output_push(&s->output, &tokens[i]);
            observe_gap(s, &tokens[i]);
        }
        if (g->setup.turn && !tokens[i].is_prompt)
            stream_turn_note(g, s, tokens[i].token);
        if (s->prompt->answer && !tokens[i].is_prompt)
            stream_keep_note(s, tokens[i].token);
    }
    int64_t n_new = s->output.n_tokens - before;
    g->usage.completion_tokens += n_new;
    metrics_add(METRIC_GENERATION_TOKENS, (uint64_t)n_new);
    stream_count_bytes(g, s);
}

/* The ring is drained and the job has finished. */
static void end_sequence(struct generation *g, struct sequence *s,
                         const struct job_snapshot *snapshot)
{
    if (snapshot->finish == FINISH_ERROR) {
        end_with_error(g, &snapshot->error);
        return;
    }
    output_finish(&s->output, snapshot->finish == FINISH_STOP && snapshot->stopped_by_token);
    if (output_failed(&s->output)) {
        end_without_room(g, STATUS_NOMEM);
        return;
    }
    if (snapshot->finish == FINISH_STOP || snapshot->finish == FINISH_LENGTH)
        stream_keep_answer(g, s);
    bool length = snapshot->finish == FINISH_LENGTH && !s->output.stopped;
    finish_sequence(g, s, length ? "length" : "stop");
}

/* Take what a job has. True when anything came of it. */
static bool advance_sequence(struct generation *g, struct sequence *s)
{
    struct job_token tokens[READ_TOKENS];
    struct job_snapshot snapshot;
    job_snapshot(s->job, &snapshot); /* before the ring: what finished has put all its tokens */
    stream_keep_marks(g, s, &snapshot);
    size_t n = job_read(s->job, tokens, READ_TOKENS);
    push_tokens(g, s, tokens, n);
    enum status st = check_room(g, s);
    if (st) {
        end_without_room(g, st);
    } else if (s->output.stopped) {
        finish_sequence(g, s, "stop");
    } else if (n < READ_TOKENS && snapshot.finish != FINISH_NONE) {
        end_sequence(g, s, &snapshot);
        return true;
    }
    return n > 0;
}

/* ---- progress ------------------------------------------------------------------------------ */

struct codec_usage stream_usage(const struct generation *g)
{
    return g->usage;
}

/* One round over the jobs. True when anything happened. */
static bool advance_all(struct generation *g)
{
    bool any = false;
    for (size_t i = 0; i < g->n_sequences && !g->failed; i++)
        if (g->sequences[i].job)
            any |= advance_sequence(g, &g->sequences[i]);
    struct error err;
    if ((g->turn.replay || g->turn.committing) && !g->failed) {
        any |= stream_turn_advance(g, &err);
        if (g->turn.failed)
            end_with_error(g, &err);
    }
    if (g->failed || !(g->setup.request->stream || g->setup.response))
        return any;
    for (size_t i = 0; i < g->n_sequences; i++)
        stream_reply_events(g, &g->sequences[i]);
    if (!g->n_running && !g->ended)
        stream_reply_end(g);
    return any;
}

static bool park_all(struct generation *g)
{
    for (size_t i = 0; i < g->n_sequences; i++)
        if (g->sequences[i].job && !job_park(g->sequences[i].job))
            return false;
    return !g->turn.replay || job_park(g->turn.replay);
}

/* Go on until there are events, the end, a failure, or nothing to do but wait. */
static void progress(struct generation *g)
{
    while (!g->failed && g->n_running && g->n_sent == g->events.n) {
        if (!advance_all(g) && g->n_running && g->n_sent == g->events.n && park_all(g))
            return;
    }
    if (!g->failed && g->events.failed)
        end_without_room(g, STATUS_NOMEM);
}

enum stream_state stream_poll(struct generation *g)
{
    progress(g);
    if (g->failed)
        return STREAM_FAILED;
    if (g->events.n > g->n_sent)
        return STREAM_READY;
    return g->n_running ? STREAM_WAITING : STREAM_DONE;
}

const struct error *stream_error(const struct generation *g)
{
    return &g->error;
}

size_t stream_held_bytes(const struct generation *g)
{
    return g->n_bytes;
}

/* See to it that there are events; returns their bytes, or why there are none. */
static ssize_t await_events(struct generation *g)
{
    if (g->n_sent == g->events.n) {
        g->events.n = g->n_sent = 0;
        if (!g->ended)
            progress(g);
        if (g->failed && !g->ended)
            stream_reply_error(g);
        if (g->events.failed)
            return HTTP_SOURCE_ABORT;
    }
    size_t left = g->events.n - g->n_sent;
    if (!left)
        return g->ended ? HTTP_SOURCE_END : HTTP_SOURCE_PARK;
    return (ssize_t)left;
}

ssize_t stream_read(void *context, char *out, size_t max)
{
    struct generation *g = context;
    ssize_t left = await_events(g);
    if (left <= 0)
        return left;
    size_t n = (size_t)left < max ? (size_t)left : max;
    memcpy(out, g->events.data + g->n_sent, n);
    g->n_sent += n;
    return (ssize_t)n;
}

ssize_t stream_take(struct generation *g, const char **events)
{
    ssize_t n = await_events(g);
    if (n > 0) {
        *events = g->events.data + g->n_sent;
        g->n_sent += (size_t)n;
    }
    return n;
}

bool stream_has_ended(const struct generation *g)
{
    return g->ended;
}

/* ---- life ---------------------------------------------------------------------------------- */

static void init_sequence(struct generation *g, size_t i)
{
    const struct stream_setup *setup = &g->setup;
    const struct codec_request *q = setup->request;
    struct sequence *s = &g->sequences[i];
    struct output_options options = {
        .api = q->api,
        .tokenizer = setup->tokenizer,
        .rules = setup->rules,
        .skip_special = q->skip_special_tokens,
        .ids = q->return_token_ids,
        .n_logprobs = q->n_logprobs,
    };
    s->index = (int64_t)i;
    s->prompt = &setup->prompts[i / (size_t)q->best_of];
    output_init(&s->output, &options, s->prompt->ids, s->prompt->n);
    if (q->echo)
        output_echo(&s->output, s->prompt->echo);
}

static enum status check_echo(const struct stream_setup *setup, struct error *err)
{
    size_t limit = setup->max_bytes / (size_t)setup->request->best_of, n_bytes = 0;
    for (size_t i = 0; setup->request->echo && i < setup->n_prompts; i++)
        n_bytes += setup->prompts[i].echo.n;
    return n_bytes > limit ? fail_too_large(setup, err) : STATUS_OK;
}

/* A generation whose jobs are still to be made, or NULL. */
static struct generation *new_generation(const struct stream_setup *setup)
{
    struct generation *g = calloc(1, sizeof(*g));
    size_t n = setup->n_prompts * (size_t)setup->request->best_of;
    if (g) {
        g->sequences = calloc(n, sizeof(*g->sequences));
        g->forks = calloc(setup->n_prompts, sizeof(*g->forks));
    }
    if (!g || !g->sequences || !g->forks) {
        if (g) {
            free(g->sequences);
            free(g->forks);
        }
        free(g);
        return NULL;
    }
    g->setup = *setup;
    g->n_sequences = n;
    for (size_t i = 0; i < n; i++)
        init_sequence(g, i);
    for (size_t i = 0; i < setup->n_prompts; i++) {
        g->usage.prompt_tokens += (int64_t)(setup->prompts[i].n - setup->prompts[i].n_carried);
        g->usage.cached_tokens += (int64_t)setup->prompts[i].n_seen;
    }
    return g;
}

enum status stream_open(struct generation **out, const struct stream_setup *setup,
                        struct error *err)
{
    enum status st = check_echo(setup, err);
    if (st)
        return st;
    struct generation *g = new_generation(setup);
    if (!g)
        return fail(err, STATUS_NOMEM, "out of memory for the choices of a request");
    for (size_t i = 0; i < g->n_sequences && !st; i++)
        st = start_job(g, i, err);
    if (st) {
        stream_close(g);
        return st;
    }
    g->open = true;
    metrics_add(METRIC_PROMPT_TOKENS, (uint64_t)g->usage.prompt_tokens);
    metrics_add(METRIC_PREFIX_TOKENS, (uint64_t)g->usage.cached_tokens);
    for (size_t i = 0; i < setup->n_prompts; i++)
        metrics_add(METRIC_PREFIX_HITS, setup->prompts[i].n_seen > 0);
    *out = g;
    return STATUS_OK;
}

void stream_close(struct generation *g)
{
    if (!g)
        return;
    if (g->open)
        drop_jobs(g, "abort");
    for (size_t i = 0; i < g->n_sequences; i++) {
        drop_job(g, &g->sequences[i]);
        output_free(&g->sequences[i].output);
        free(g->sequences[i].answer);
    }
    for (size_t i = 0; i < g->setup.n_prompts; i++)
        image_release(g->forks[i]);
    free(g->forks);
    stream_turn_free(g);
    bytes_free(&g->events);
    free(g->sequences);
    free(g);
}
