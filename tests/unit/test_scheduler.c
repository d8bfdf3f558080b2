/* test_scheduler.c - the scheduler over a model that is trivially right.
 *
 * This file stands in for model.c, with drawing on the host or on the "device", and a step or
 * two on their way: its "state" is a hash of all tokens a slot has seen and of
 * the places where prompts were cut in chunks, its logits are a function of that hash. So a
 * job's exact output can be computed without a scheduler, and any token applied twice, lost,
 * reordered, taken from a neighbour or cut at another place changes it.
 *
 * Steps can be held at a gate, which makes "within one step" a fact and not a race.
 */
#include "tests/unit/unit.h"

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "engine/scheduler.h"
#include "engine/stepper.h"
#include "tests/unit/fail_alloc.h"

enum {
    V = 97,
    EOS = 5,
    MAX_SLOTS = 64,
    MAX_LOG = 4096,
    MAX_RESULTS = 2048,
    MAX_QUEUED = 3,
    MAX_SAVED = 3
};

/* How steps go: how many the scheduler has on their way, and how many the model takes (0: the
 * host draws). */
static const struct variant {
    int depth, model_depth;
} variants[] = {{1, 0}, {2, 0}, {1, 1}, {2, 2}};
static const struct variant *variant = variants;

static int take_variant(void **state)
{
    variant = *state ? *state : variants;
    return 0;
}

/* ---- The model ---- */

struct fake_slot {
    uint64_t hash;
    uint64_t position;
};

/* A step of a device that is on its way. */
struct fake_queued {
    struct sampled results[MAX_RESULTS];
    bool fails;
    int step;
};

/* A slot's state on its way out. */
struct fake_save {
    int slot, n_asked, n_steps; /* n_steps: before it was begun */
};

struct log_entry {
    int step, slot, n_rows;
    uint64_t position; /* before the rows */
};

static struct fake {
    struct model_config config;
    int64_t max_position;
    int max_rows, max_logit_rows;
    struct fake_slot slots[MAX_SLOTS];
    float *logits; /* [max_logit_rows, V] */

    /* Of a device: what its slots draw with, and the steps on their way. */
    struct sampler *sampler;
    struct sampling_params params[MAX_SLOTS];
    int32_t drawn[MAX_SLOTS];
    struct fake_queued queued[MAX_QUEUED];
    int n_queued, n_collected;
    struct fake_save saves[MAX_SAVED];
    int n_begun, n_saved;
    int fail_at_save; /* -1: none */
    int n_beside;     /* steps queued while saves were under way */

    pthread_mutex_t lock; /* guards all that follows */
    pthread_cond_t changed;
    int n_allowed; /* steps that may pass the gate, -1: all */
    int n_arrived; /* steps that reached the gate */
    int n_passed;  /* and those that are behind it */
    int n_steps;   /* that were queued */
    int fail_at;   /* step that fails, -1: none */
    struct log_entry log[MAX_LOG];
    int n_log;
} fake;

static uint64_t mix(uint64_t h)
{
    h = (h ^ h >> 31) * 0x9E3779B97F4A7C15;
    return (h ^ h >> 29) * 0xBF58476D1CE4E5B9;
}

static uint64_t feed(uint64_t hash, int32_t token)
{
    return mix(hash * 31 + (uint64_t)token + 1);
}

/* Marks where a sequence's rows of one step begin: a different cut is a different state. */
static uint64_t cut(uint64_t hash, int n_rows)
{
    return n_rows > 1 ? mix(hash + 0x1234567) : hash;
}

static void logits_of(uint64_t hash, float *logits)
{
    for (int t = 0; t < V; t++)
        logits[t] = (float)(mix(hash + (uint64_t)t * 77) >> 40) * 0x1p-22f; /* 0..4 */
}

/* Wait until the gate lets a step pass. With the lock held. */
static void pass_gate(void)
{
    fake.n_arrived++;
    pthread_cond_broadcast(&fake.changed);
    while (fake.n_allowed == 0)
        pthread_cond_wait(&fake.changed, &fake.lock);
    if (fake.n_allowed > 0)
        fake.n_allowed--;
    fake.n_passed++;
}

static bool is_saved(int slot)
{
    for (int i = fake.n_saved; i < fake.n_begun; i++)
        if (fake.saves[i % MAX_SAVED].slot == slot)
            return true;
    return false;
}

/* Rows into the slots' states, logits out of them. With the lock held; returns the step. */
static int run_rows(const int32_t *tokens, const struct model_seq *seqs, int n_seqs)
{
    int step = fake.n_steps++, n_rows = 0, n_logit_rows = 0;
    bool used[MAX_SLOTS] = {false};
    for (int k = 0; k < n_seqs; k++) {
        const struct model_seq *seq = &seqs[k];
        struct fake_slot *slot = &fake.slots[seq->slot];
        CHECK(!used[seq->slot] && seq->n_rows > 0 && !is_saved(seq->slot));
        used[seq->slot] = true;
        if (fake.n_log < MAX_LOG)
            fake.log[fake.n_log++] =
                (struct log_entry){step, seq->slot, seq->n_rows, slot->position};
        slot->hash = cut(slot->hash, seq->n_rows);
        for (int i = 0; i < seq->n_rows; i++) {
            int32_t token = tokens[n_rows++];
            if (token == TOKEN_DRAWN && variant->model_depth)
                token = fake.drawn[seq->slot];
            else if (variant->model_depth && fake.sampler)
                sampler_note(fake.sampler, seq->slot, token, false);
            CHECK(token >= 0 && token < V);
            slot->hash = feed(slot->hash, token);
            slot->position++;
            bool last = i == seq->n_rows - 1;
            if (seq->logits == LOGITS_ALL || (last && seq->logits == LOGITS_LAST)) {
                CHECK(n_logit_rows < fake.max_logit_rows);
                logits_of(slot->hash, fake.logits + n_logit_rows++ * V);
            }
        }
        CHECK(!fake.max_position || slot->position <= (uint64_t)fake.max_position);
    }
    CHECK(n_rows <= fake.max_rows);
    return step;
}

static int steps_done(void)
{
    pthread_mutex_lock(&fake.lock);
    int n = fake.n_steps;
    pthread_mutex_unlock(&fake.lock);
    return n;
}

/* The functions of model.h that the scheduler and its stepper call; the archive's model.o is
 * not linked. */
enum status model_step(struct model *m, const int32_t *tokens, const struct model_seq *seqs,
                       int n_seqs, const float **logits, struct error *err)
{
    (void)m;
    CHECK(!variant->model_depth);
    pthread_mutex_lock(&fake.lock);
    pass_gate();
    int step = run_rows(tokens, seqs, n_seqs);
    bool fails = step == fake.fail_at;
    pthread_mutex_unlock(&fake.lock);
    *logits = fake.logits;
    return fails ? fail(err, STATUS_DEVICE, "broken at step %d", step) : STATUS_OK;
}

int model_depth(const struct model *m)
{
    (void)m;
    return variant->model_depth;
}

enum status model_admit(struct model *m, int slot, const struct sampling_params *params,
                        struct error *err)
{
    (void)m, (void)err;
    fake.params[slot] = *params;
    fake.drawn[slot] = -1;
    sampler_reset(fake.sampler, slot);
    return STATUS_OK;
}

enum status model_note(struct model *m, int slot, const int32_t *tokens, size_t n,
                       struct error *err)
{
    (void)m, (void)err;
    for (size_t i = 0; i < n; i++)
        sampler_note(fake.sampler, slot, tokens[i], false);
    return STATUS_OK;
}

/* All is computed when queued, and shown when collected. */
enum status model_queue(struct model *m, const int32_t *tokens, const struct model_seq *seqs,
                        int n_seqs, const struct step_draw *draws, int n_draws,
                        const struct step_score *scores, int n_scores, struct error *err)
{
    (void)m, (void)err;
    CHECK(fake.n_queued - fake.n_collected < variant->model_depth);
    CHECK(n_draws + n_scores <= MAX_RESULTS);
    struct fake_queued *q = &fake.queued[fake.n_queued++ % (variant->model_depth + 1)];
    memset(q, 0xee, sizeof(*q));
    pthread_mutex_lock(&fake.lock);
    q->step = run_rows(tokens, seqs, n_seqs);
    q->fails = q->step == fake.fail_at;
    pthread_mutex_unlock(&fake.lock);
    struct sampled *out = q->results;
    for (int i = 0; i < n_draws; i++, out++) {
        const struct step_draw *d = &draws[i];
        sampler_draw(fake.sampler, d->slot, fake.logits + d->logit_row * V, &fake.params[d->slot],
                     d->position, d->n_output, out);
        fake.drawn[d->slot] = out->token;
        sampler_note(fake.sampler, d->slot, out->token, true);
    }
    for (int i = 0; i < n_scores; i++, out++)
        sampler_score(fake.sampler, fake.logits + scores[i].logit_row * V, scores[i].target,
                      scores[i].n_top, out);
    return STATUS_OK;
}

enum status model_collect(struct model *m, const struct sampled **results, struct error *err)
{
    (void)m;
    CHECK(fake.n_collected < fake.n_queued);
    struct fake_queued *q = &fake.queued[fake.n_collected++ % (variant->model_depth + 1)];
    pthread_mutex_lock(&fake.lock);
    pass_gate();
    pthread_mutex_unlock(&fake.lock);
    *results = q->results;
    return q->fails ? fail(err, STATUS_DEVICE, "broken at step %d", q->step) : STATUS_OK;
}

void model_reset(struct model *m, int slot)
{
    (void)m;
    fake.slots[slot] = (struct fake_slot){.hash = 99};
}

bool model_is_on_device(const struct model *m)
{
    (void)m;
    return variant->model_depth > 0;
}

const struct model_config *model_config(const struct model *m)
{
    (void)m;
    return &fake.config;
}

int64_t model_max_position(const struct model *m)
{
    (void)m;
    return fake.max_position;
}

/* Outside its slot a state is the hash, in pieces of 16 bits. */
enum { HASH_PIECES = 4 };

int model_n_state_tensors(const struct model *m)
{
    (void)m;
    return 1;
}

const struct state_tensor *model_state_tensor(const struct model *m, int i)
{
    static const struct state_tensor hash = {.name = "hash", .n_values = HASH_PIECES};
    (void)m;
    CHECK(i == 0);
    return &hash;
}

static void write_hash(uint64_t hash, float *out)
{
    for (int i = 0; i < HASH_PIECES; i++)
        out[i] = (float)(hash >> 16 * i & 0xffff);
}

enum status model_load(struct model *m, int slot, const float *values, uint64_t position,
                       struct error *err)
{
    (void)m, (void)err;
    CHECK(!is_saved(slot));
    fake.slots[slot] = (struct fake_slot){.position = position};
    for (int k = 0; k < HASH_PIECES; k++)
        fake.slots[slot].hash |= (uint64_t)values[k] << 16 * k;
    return STATUS_OK;
}

int model_max_saves(const struct model *m)
{
    (void)m;
    return variant->model_depth ? MAX_SAVED : 1;
}

enum status model_begin_save(struct model *m, int slot, struct error *err)
{
    (void)m;
    CHECK(fake.n_begun - fake.n_saved < model_max_saves(m));
    if (fake.n_begun == fake.fail_at_save)
        return fail(err, STATUS_DEVICE, "broken at save %d", fake.n_begun);
    fake.saves[fake.n_begun++ % MAX_SAVED] = (struct fake_save){slot, 0, steps_done()};
    return STATUS_OK;
}

/* A device is slow, unless it is waited for, and reads when it pleases: here as late as can be. */
enum status model_finish_save(struct model *m, bool wait, float *values, bool *done,
                              struct error *err)
{
    (void)m, (void)err;
    CHECK(fake.n_saved < fake.n_begun);
    struct fake_save *save = &fake.saves[fake.n_saved % MAX_SAVED];
    *done = wait || !variant->model_depth || ++save->n_asked > 2;
    if (!*done)
        return STATUS_OK;
    write_hash(fake.slots[save->slot].hash, values);
    fake.n_beside += steps_done() - save->n_steps;
    fake.n_saved++;
    return STATUS_OK;
}

uint64_t model_position(const struct model *m, int slot)
{
    (void)m;
    return fake.slots[slot].position;
}

/* ---- Running it ---- */

static atomic_int n_wakes;

static void count_wake(void *context)
{
    (void)context;
    atomic_fetch_add(&n_wakes, 1);
}

static struct scheduler_options small_options(void)
{
    return (struct scheduler_options){
        .n_slots = 4,
        .max_queue = 100,
        .step_tokens = 24,
        .chunk_tokens = 8,
        .wake = count_wake,
    };
}

static struct scheduler *start_with(const struct scheduler_options *options, int n_allowed,
                                    int64_t max_position)
{
    memset(&fake, 0, sizeof(fake));
    fake.config = (struct model_config){.vocab_size = V, .n_eos = 1, .eos_token_id = {EOS}};
    fake.max_position = max_position;
    fake.n_allowed = n_allowed;
    fake.fail_at = fake.fail_at_save = -1;
    pthread_mutex_init(&fake.lock, NULL);
    pthread_cond_init(&fake.changed, NULL);
    scheduler_limits(options, &fake.max_rows, &fake.max_logit_rows);
    fake.logits = calloc((size_t)fake.max_logit_rows * V, sizeof(float));
    atomic_store(&n_wakes, 0);
    struct scheduler_options with_depth = *options;
    struct scheduler *s = NULL;
    struct error err;
    const int32_t eos = EOS;
    with_depth.depth = variant->depth;
    if (sampler_open(&fake.sampler, MAX_SLOTS, V, &eos, 1, &err) ||
        scheduler_open(&s, NULL, &with_depth, &err))
        fail_msg("%s", err.text);
    return s;
}

static struct scheduler *start(int n_allowed)
{
    struct scheduler_options options = small_options();
    return start_with(&options, n_allowed, 0);
}

static void stop(struct scheduler *s)
{
    pthread_mutex_lock(&fake.lock);
    fake.n_allowed = -1;
    pthread_cond_broadcast(&fake.changed);
    pthread_mutex_unlock(&fake.lock);
    scheduler_close(s);
    free(fake.logits);
    sampler_close(fake.sampler);
    pthread_cond_destroy(&fake.changed);
    pthread_mutex_destroy(&fake.lock);
}

/* Let n more steps pass (-1: all from now on), and wait for the next to arrive at the gate. */
static void allow(int n)
{
    pthread_mutex_lock(&fake.lock);
    fake.n_allowed = n;
    pthread_cond_broadcast(&fake.changed);
    pthread_mutex_unlock(&fake.lock);
}

static void wait_at_gate(int n_before)
{
    pthread_mutex_lock(&fake.lock);
    while (fake.n_arrived <= n_before || fake.n_allowed != 0)
        pthread_cond_wait(&fake.changed, &fake.lock);
    pthread_mutex_unlock(&fake.lock);
}

static void pass_steps(int n)
{
    pthread_mutex_lock(&fake.lock);
    int passed = fake.n_passed;
    pthread_mutex_unlock(&fake.lock);
    allow(n);
    wait_at_gate(passed + n);
}

struct spec {
    int n_prompt, max_tokens, prompt_logprobs, n_logprobs, deadline_ms;
    uint64_t seed;
    float temperature, repetition_penalty;
    bool stops; /* eos ends it */
    int n_marks, marks[JOB_MAX_MARKS];
    uint32_t choice;
};

static const struct spec plain = {.n_prompt = 5,
                                  .max_tokens = 10,
                                  .prompt_logprobs = -1,
                                  .n_logprobs = -1,
                                  .temperature = 1,
                                  .repetition_penalty = 1};

static int32_t prompt_token(const struct spec *spec, int i)
{
    return (int32_t)(mix(spec->seed * 1000 + (uint64_t)i) % V);
}

/* images: of its marks. from, n_seen and after as a request has them. */
static struct job *make_job_from(const struct spec *spec, struct image *const *images,
                                 struct image *from, int n_seen, struct job *after)
{
    int32_t prompt[2000];
    assert_true(spec->n_prompt <= 2000);
    for (int i = 0; i < spec->n_prompt; i++)
        prompt[i] = prompt_token(spec, i);
    struct job_request request = {
        .prompt = prompt,
        .n_prompt = (size_t)spec->n_prompt,
        .max_tokens = spec->max_tokens,
        .prompt_logprobs = spec->prompt_logprobs,
        .deadline_ms = spec->deadline_ms,
        .from = from,
        .n_seen = (size_t)n_seen,
        .after = after,
        .n_marks = images ? spec->n_marks : 0,
    };
    for (int i = 0; i < request.n_marks; i++)
        request.marks[i] = (struct job_mark){(size_t)spec->marks[i], images[i]};
    sampling_params_init(&request.sampling);
    request.sampling.seed = spec->seed;
    request.sampling.choice = spec->choice;
    request.sampling.temperature = spec->temperature;
    request.sampling.repetition_penalty = spec->repetition_penalty;
    request.sampling.n_logprobs = spec->n_logprobs;
    request.sampling.ignore_eos = !spec->stops;
    struct job *job = NULL;
    struct error err;
    if (job_new(&job, &request, &err))
        fail_msg("%s", err.text);
    return job;
}

static struct job *make_job(const struct spec *spec)
{
    return make_job_from(spec, NULL, NULL, 0, NULL);
}

static struct job *submitted(struct scheduler *s, struct job *job)
{
    struct error err;
    if (scheduler_submit(s, job, &err))
        fail_msg("%s", err.text);
    return job;
}

static struct job *submit(struct scheduler *s, const struct spec *spec)
{
    return submitted(s, make_job(spec));
}

/* How many rows the chunk that begins with prompt token i has; 0 when none begins there. */
static int chunk_at(const struct spec *spec, int chunk, int i)
{
    bool begins = i % chunk == 0;
    int end = (i / chunk + 1) * chunk;
    end = end < spec->n_prompt ? end : spec->n_prompt;
    for (int k = spec->n_marks - 1; k >= 0; k--) {
        begins |= spec->marks[k] == i;
        end = spec->marks[k] > i && spec->marks[k] < end ? spec->marks[k] : end;
    }
    return begins ? end - i : 0;
}

/* The state after n tokens of the prompt. */
static uint64_t prompt_hash(const struct spec *spec, int chunk, int n)
{
    uint64_t hash = 99;
    for (int i = 0; i < n; i++) {
        hash = cut(hash, chunk_at(spec, chunk, i));
        hash = feed(hash, prompt_token(spec, i));
    }
    return hash;
}

/* What the job must give, without any scheduler: tokens[n], and how it ends. */
static int expect(const struct spec *spec, int chunk, int64_t max_position, int32_t *tokens,
                  enum job_finish *finish)
{
    uint64_t hash = prompt_hash(spec, chunk, spec->n_prompt);
    float logits[V];
    struct sampler *sampler = NULL;
    const int32_t eos = EOS;
    assert_int_equal(sampler_open(&sampler, 1, V, &eos, 1, NULL), STATUS_OK);
    for (int i = 0; i < spec->n_prompt; i++)
        sampler_note(sampler, 0, prompt_token(spec, i), false);
    struct sampling_params params;
    sampling_params_init(&params);
    params.seed = spec->seed;
    params.choice = spec->choice;
    params.temperature = spec->temperature;
    params.repetition_penalty = spec->repetition_penalty;
    params.ignore_eos = !spec->stops;
    int n = 0;
    *finish = FINISH_LENGTH;
    while (n < spec->max_tokens && !(max_position && spec->n_prompt + n >= max_position)) {
        struct sampled sampled;
        logits_of(hash, logits);
        sampler_draw(sampler, 0, logits, &params, (uint64_t)(spec->n_prompt + n), n, &sampled);
        tokens[n++] = sampled.token;
        if (spec->stops && sampled.token == EOS) {
            *finish = FINISH_STOP;
            break;
        }
        hash = feed(hash, sampled.token);
        sampler_note(sampler, 0, sampled.token, true);
    }
    sampler_close(sampler);
    return n;
}

/* Read a job to its end. Returns its outputs; scores, if given, gets the prompt entries. */
static int read_all(struct job *job, int32_t *tokens, struct job_token *scores, int *n_scores)
{
    int n = 0, n_prompt = 0;
    struct job_snapshot snapshot;
    for (;;) {
        struct job_token batch[16];
        job_wait(job);
        size_t got = job_read(job, batch, COUNT_OF(batch));
        for (size_t i = 0; i < got; i++)
            if (!batch[i].is_prompt)
                tokens[n++] = batch[i].token;
            else if (scores)
                scores[n_prompt++] = batch[i];
        job_snapshot(job, &snapshot);
        if (!got && snapshot.finish != FINISH_NONE)
            break;
    }
    if (n_scores)
        *n_scores = n_prompt;
    assert_int_equal(snapshot.n_output, n);
    return n;
}

static enum job_finish finish_of(struct job *job, enum status *status)
{
    struct job_snapshot snapshot;
    do {
        job_wait(job);
        job_snapshot(job, &snapshot);
        struct job_token token;
        job_read(job, &token, 1);
    } while (snapshot.finish == FINISH_NONE);
    if (status)
        *status = snapshot.error.status;
    return snapshot.finish;
}

static void check_output(struct job *job, const struct spec *spec, int chunk, int64_t max_position)
{
    static _Thread_local int32_t found[5000], expected[5000];
    enum job_finish finish;
    int n_expected = expect(spec, chunk, max_position, expected, &finish);
    int n = read_all(job, found, NULL, NULL);
    if (n != n_expected)
        fail_msg("%d tokens, expected %d", n, n_expected);
    for (int i = 0; i < n; i++)
        if (found[i] != expected[i])
            fail_msg("output %d of prompt %d, seed %llu is %d, expected %d", i, spec->n_prompt,
                     (unsigned long long)spec->seed, found[i], expected[i]);
    assert_int_equal(finish_of(job, NULL), finish);
    struct job_snapshot snapshot;
    job_snapshot(job, &snapshot);
    assert_int_equal(snapshot.n_prompt_done, spec->n_prompt);
    assert_int_equal(snapshot.stopped_by_token, finish == FINISH_STOP);
}

static void sleep_past(struct job *job)
{
    while (job_clock_ns() < job_deadline_ns(job))
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
}

/* Returns once the engine takes no more steps. */
static void settle(struct scheduler *s)
{
    struct engine_stats before, after;
    do {
        scheduler_stats(s, &before);
        nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
        scheduler_stats(s, &after);
    } while (before.n_steps != after.n_steps);
}

/* ---- Outputs ---- */

static void test_outputs_alone(void **state)
{
    (void)state;
    static const int lengths[] = {1, 2, 7, 8, 9, 16, 17, 100};
    struct scheduler *s = start(-1);
    for (size_t i = 0; i < COUNT_OF(lengths); i++)
        for (uint64_t seed = 0; seed < 6; seed++) {
            struct spec spec = plain;
            spec.n_prompt = lengths[i];
            spec.seed = seed;
            spec.max_tokens = seed == 5 ? 300 : 20;
            spec.stops = seed % 2;
            spec.temperature = seed == 2 ? 0 : 1;
            spec.repetition_penalty = seed == 3 ? 1.5f : 1;
            struct job *job = submit(s, &spec);
            check_output(job, &spec, 8, 0);
            job_release(job);
        }
    stop(s);
}

static void test_outputs_together(void **state)
{
    (void)state;
    enum { N = 80 };
    struct scheduler *s = start(-1);
    struct spec specs[N];
    struct job *jobs[N];
    for (int i = 0; i < N; i++) {
        specs[i] = plain;
        specs[i].seed = (uint64_t)i;
        specs[i].n_prompt = 1 + (int)(mix((uint64_t)i) % 60);
        specs[i].max_tokens = (int)(mix((uint64_t)i + 500) % 100);
        specs[i].stops = i % 3 == 0;
        specs[i].repetition_penalty = i % 4 ? 1 : 1.3f;
        jobs[i] = submit(s, &specs[i]);
    }
    uint64_t n_prompt = 0, n_output = 0;
    for (int i = N - 1; i >= 0; i--) {
        struct job_snapshot snapshot;
        check_output(jobs[i], &specs[i], 8, 0);
        job_snapshot(jobs[i], &snapshot);
        n_prompt += (uint64_t)specs[i].n_prompt;
        n_output += snapshot.n_output;
        job_release(jobs[i]);
    }
    settle(s); /* the last job may have ended with a row on its way */
    struct engine_stats stats;
    scheduler_stats(s, &stats);
    assert_true(stats.n_running == 0 && stats.n_waiting == 0);
    assert_int_equal(stats.n_prompt_tokens, n_prompt);
    assert_int_equal(stats.n_output_tokens, n_output); /* what was dropped is not among them */
    assert_int_equal(stats.n_dropped_tokens > 0, variant->depth == 2);
    stop(s);
}

static void test_position_limit(void **state)
{
    (void)state;
    struct scheduler_options options = small_options();
    struct scheduler *s = start_with(&options, -1, 20);
    for (int n_prompt = 1; n_prompt <= 20; n_prompt++) {
        struct spec spec = plain;
        spec.n_prompt = n_prompt;
        spec.max_tokens = 12;
        struct job *job = submit(s, &spec);
        check_output(job, &spec, 8, 20);
        job_release(job);
    }
    struct spec spec = plain;
    spec.n_prompt = 21;
    struct job *job = make_job(&spec);
    assert_int_equal(scheduler_submit(s, job, NULL), STATUS_TOO_LARGE);
    job_release(job);
    stop(s);
}

static void test_no_output(void **state)
{
    (void)state;
    struct scheduler *s = start(-1);
    struct spec spec = plain;
    spec.max_tokens = 0;
    spec.n_prompt = 20;
    struct job *job = submit(s, &spec);
    check_output(job, &spec, 8, 0);
    job_release(job);
    stop(s);
}

/* ---- States ---- */

static void init_store(struct image_store *store)
{
    image_store_init(store, "00112233445566778899aabbccddeeff", HASH_PIECES, V, 0, 1 << 20);
}

static void take_images(struct image **images, int n, struct image_store *store)
{
    for (int i = 0; i < n; i++)
        assert_int_equal(image_new(&images[i], store, NULL), STATUS_OK);
}

static void drop_images(struct image **images, int n, struct image_store *store)
{
    for (int i = 0; i < n; i++)
        image_release(images[i]);
    image_store_free(store); /* asserts that none is left */
}

/* Ascending places, the last token's among them at times. */
static void set_marks(struct spec *spec, uint64_t random)
{
    int at = 0;
    spec->n_marks = 0;
    while (spec->n_marks < JOB_MAX_MARKS && at < spec->n_prompt) {
        random = mix(random + 1);
        at += 1 + (int)(random % 20);
        if (at <= spec->n_prompt)
            spec->marks[spec->n_marks++] = at;
    }
}

/* Images hold what the slot had seen at the mark, whatever came after, and a job that begins
 * there gives what the whole prompt gives. */
static void test_marks(void **state)
{
    (void)state;
    enum { N = 60 };
    struct scheduler *s = start(-1);
    struct spec specs[N];
    struct job *jobs[N], *again[N] = {NULL};
    struct image *images[N][JOB_MAX_MARKS];
    struct image_store store;
    init_store(&store);
    for (int i = 0; i < N; i++) {
        specs[i] = plain;
        specs[i].seed = (uint64_t)i;
        specs[i].n_prompt = 1 + (int)(mix((uint64_t)i) % 70);
        specs[i].prompt_logprobs = i % 5 ? -1 : 2;
        specs[i].max_tokens = i % 7;
        specs[i].repetition_penalty = i % 3 ? 1 : 1.7f;
        set_marks(&specs[i], (uint64_t)i);
        take_images(images[i], specs[i].n_marks, &store);
        jobs[i] = submitted(s, make_job_from(&specs[i], images[i], NULL, 0, NULL));
    }
    for (int i = 0; i < N; i++) {
        struct job_snapshot snapshot;
        check_output(jobs[i], &specs[i], 8, 0);
        job_snapshot(jobs[i], &snapshot);
        assert_int_equal(snapshot.n_marks_done, specs[i].n_marks);
        for (int k = 0; k < specs[i].n_marks; k++) {
            float expected[HASH_PIECES];
            write_hash(prompt_hash(&specs[i], 8, specs[i].marks[k]), expected);
            assert_memory_equal(images[i][k]->values, expected, sizeof(expected));
            assert_int_equal(images[i][k]->position, specs[i].marks[k]);
            assert_int_equal(images[i][k]->n_pending, 0);
        }
        job_release(jobs[i]);
    }
    int n_again = 0;
    for (int i = 0; i < N; i++) {
        int k = specs[i].n_marks - 1;
        if (k < 0 || specs[i].marks[k] == specs[i].n_prompt || specs[i].prompt_logprobs >= 0)
            continue;
        again[i] =
            submitted(s, make_job_from(&specs[i], NULL, images[i][k], specs[i].marks[k], NULL));
        n_again++;
    }
    assert_true(n_again > N / 3);
    for (int i = 0; i < N; i++)
        if (again[i]) {
            check_output(again[i], &specs[i], 8, 0);
            job_release(again[i]);
        }
    stop(s);
    for (int i = 0; i < N; i++)
        for (int k = 0; k < specs[i].n_marks; k++)
            image_release(images[i][k]);
    image_store_free(&store);
}

/* A turn: a job that leaves its state in an image, from another one or from nothing. */
static struct job *make_turn(const struct spec *spec, struct image *from, struct image *into)
{
    int32_t prompt[100];
    int n_pending = from ? from->n_pending : 0;
    assert_true(n_pending + spec->n_prompt <= 100);
    if (n_pending)
        prompt[0] = from->pending[0];
    for (int i = 0; i < spec->n_prompt; i++)
        prompt[n_pending + i] = prompt_token(spec, i);
    struct job_request request = {
        .prompt = prompt,
        .n_prompt = (size_t)(n_pending + spec->n_prompt),
        .max_tokens = spec->max_tokens,
        .prompt_logprobs = -1,
        .from = from,
        .into = into,
    };
    sampling_params_init(&request.sampling);
    request.sampling.seed = spec->seed;
    request.sampling.ignore_eos = !spec->stops;
    struct job *job = NULL;
    struct error err;
    if (job_new(&job, &request, &err))
        fail_msg("%s", err.text);
    return job;
}

/* Read a turn to its end: its image holds what its tokens lead to, computed here from the state
 * before. otherwise: how else it may end, then false. Releases the job. */
static bool check_turn(struct job *job, const struct image *from, const struct image *into,
                       enum job_finish otherwise)
{
    const struct job_request *request = job_request(job);
    uint64_t hash = 99, position = from ? from->position : 0;
    for (int i = HASH_PIECES - 1; from && i >= 0; i--)
        hash = (i == HASH_PIECES - 1 ? 0 : hash << 16) | (uint64_t)from->values[i];
    for (size_t i = 0; i < request->n_prompt; i++) {
        size_t left = request->n_prompt - i;
        if (i % 8 == 0)
            hash = cut(hash, left < 8 ? (int)left : 8);
        hash = feed(hash, request->prompt[i]);
    }
    position += request->n_prompt;
    struct job_token token;
    struct job_snapshot snapshot;
    int n = 0;
    int32_t last = -1;
    do {
        job_wait(job);
        job_snapshot(job, &snapshot);
        while (job_read(job, &token, 1)) {
            if (n++)
                hash = feed(hash, last);
            last = token.token;
        }
    } while (snapshot.finish == FINISH_NONE);
    if (otherwise != FINISH_NONE && snapshot.finish == otherwise) {
        job_release(job);
        return false;
    }
    assert_true(snapshot.finish == FINISH_LENGTH || snapshot.finish == FINISH_STOP);
    position += n ? (uint64_t)n - 1 : 0;
    if (n && !into->n_pending) { /* a step had fed the last one already */
        hash = feed(hash, last);
        position++;
    }
    if (into->n_pending)
        assert_int_equal(into->pending[0], last);
    float expected[HASH_PIECES];
    write_hash(hash, expected);
    assert_memory_equal(into->values, expected, sizeof(expected));
    assert_int_equal(into->position, position);
    job_release(job);
    return true;
}

static void take_turn(struct scheduler *s, const struct spec *spec, struct image *from,
                      struct image *into)
{
    check_turn(submitted(s, make_turn(spec, from, into)), from, into, FINISH_NONE);
}

/* States stay in the slots of a device until others need these: empty slots are taken first, then
 * that of the state used longest ago. Slots of the host are host memory: no state is beside it. */
static void test_residents(void **state)
{
    (void)state;
    enum { N = 5, FIRST = 1 };
    struct scheduler *s = start(-1); /* 4 slots */
    const bool device = variant->model_depth > 0;
    struct image *images[N], *next[2];
    struct image_store store;
    struct engine_stats stats;
    init_store(&store);
    take_images(images, N, &store);
    take_images(next, 2, &store);
    for (int i = 0; i < N; i++) {
        struct spec spec = plain;
        spec.seed = (uint64_t)i;
        take_turn(s, &spec, NULL, images[i]);
        assert_int_equal(scheduler_is_resident(s, images[i]), device);
    }
    assert_false(scheduler_is_resident(s, images[0])); /* made way */
    for (int i = FIRST; i < N; i++)
        assert_int_equal(scheduler_is_resident(s, images[i]), device);

    take_turn(s, &plain, images[FIRST], next[0]); /* goes on where it is */
    scheduler_stats(s, &stats);
    assert_int_equal(stats.n_state_hits, 1);
    assert_int_equal(stats.n_state_loads, 0);
    assert_false(scheduler_is_resident(s, images[FIRST]));
    assert_int_equal(scheduler_is_resident(s, next[0]), device);

    struct job *other = submit(s, &plain); /* 2 was used longest ago */
    check_output(other, &plain, 8, 0);
    job_release(other);
    assert_false(scheduler_is_resident(s, images[2]));
    for (int i = 3; i < N; i++)
        assert_int_equal(scheduler_is_resident(s, images[i]), device);

    take_turn(s, &plain, images[0], next[1]); /* comes back, into the slot that is empty now */
    scheduler_stats(s, &stats);
    assert_int_equal(stats.n_state_loads, 1);
    for (int i = 3; i < N; i++)
        assert_int_equal(scheduler_is_resident(s, images[i]), device);
    stop(s);
    for (int i = 0; i < N; i++)
        image_release(images[i]);
    drop_images(next, 2, &store);
}

static struct spec turn_spec(uint64_t random)
{
    struct spec spec = plain;
    spec.seed = random;
    spec.n_prompt = 1 + (int)(random >> 8 & 0xff) % 30;
    spec.max_tokens = (int)(random >> 16 & 0xff) % 12;
    spec.stops = random >> 24 & 1;
    return spec;
}

/* Sessions of more turns than there are slots, all at once: many end in the same step, and some
 * are cancelled, which a turn whose state is on its way out does not heed. A session goes on from
 * its last good turn. Beside them a job that never pauses. */
static void test_many_turns(void **state)
{
    (void)state;
    enum { N = 12, ROUNDS = 30 };
    struct scheduler *s = start(-1); /* 4 slots */
    struct image *images[N] = {NULL}, *next[N];
    struct job *jobs[N];
    struct image_store store;
    struct spec endless = plain;
    int n_cut = 0;
    init_store(&store);
    endless.max_tokens = 1 << 30;
    struct job *beside = submit(s, &endless);
    for (int round = 0; round < ROUNDS; round++) {
        take_images(next, N, &store);
        for (int i = 0; i < N; i++) {
            uint64_t random = mix((uint64_t)(round * N + i) + 5);
            struct spec spec = turn_spec(random);
            jobs[i] = submitted(s, make_turn(&spec, images[i], next[i]));
            if (random >> 32 & 1 && i % 3 == 0)
                job_cancel(jobs[i]);
        }
        for (int i = 0; i < N; i++) {
            struct job_token tokens[32];
            while (job_read(beside, tokens, 32))
                ;
            bool good = check_turn(jobs[i], images[i], next[i], FINISH_CANCELLED);
            image_release(good ? images[i] : next[i]);
            images[i] = good ? next[i] : images[i];
            n_cut += !good;
        }
    }
    assert_true(n_cut < N * ROUNDS / 3);
    job_cancel(beside);
    finish_of(beside, NULL);
    job_release(beside);
    stop(s);
    if (variant->model_depth)
        assert_true(fake.n_beside > 0); /* others' steps did not wait */
    drop_images(images, N, &store);
}

/* A copy fails: that is the device's failure, for those whose state is on its way out, too. */
static void test_save_fails(void **state)
{
    (void)state;
    enum { N = 6 };
    struct scheduler *s = start(0);
    struct image *images[N];
    struct image_store store;
    struct job *jobs[N];
    int n_good = 0;
    init_store(&store);
    take_images(images, N, &store);
    for (int i = 0; i < N; i++)
        jobs[i] = submitted(s, make_turn(&plain, NULL, images[i]));
    fake.fail_at_save = 2;
    allow(-1);
    for (int i = 0; i < N; i++) {
        enum status status = STATUS_OK;
        bool good = finish_of(jobs[i], &status) == FINISH_LENGTH;
        assert_int_equal(good ? STATUS_DEVICE : status, STATUS_DEVICE);
        n_good += good;
        job_release(jobs[i]);
    }
    assert_true(n_good <= 2);
    stop(s);
    drop_images(images, N, &store);
}

/* The server stops at any moment: turns end well or with SHUTDOWN, and their images are free. */
static void test_close_in_turns(void **state)
{
    (void)state;
    enum { N = 8, ROUNDS = 12 };
    for (int round = 0; round < ROUNDS; round++) {
        struct scheduler *s = start(round);
        struct image *images[N];
        struct image_store store;
        struct job *jobs[N];
        init_store(&store);
        take_images(images, N, &store);
        for (int i = 0; i < N; i++) {
            struct spec spec = turn_spec(mix((uint64_t)(round * N + i)));
            jobs[i] = submitted(s, make_turn(&spec, NULL, images[i]));
        }
        stop(s);
        for (int i = 0; i < N; i++) {
            struct job_snapshot snapshot;
            job_snapshot(jobs[i], &snapshot);
            if (snapshot.finish == FINISH_ERROR)
                assert_int_equal(snapshot.error.status, STATUS_SHUTDOWN);
            check_turn(jobs[i], NULL, images[i], FINISH_ERROR);
        }
        drop_images(images, N, &store);
    }
}

/* Jobs that wait for a mark are in the queue, where others pass them, and begin there. */
static void test_forks(void **state)
{
    (void)state;
    enum { N = 6 };
    struct scheduler *s = start(0); /* 4 slots */
    struct spec specs[N];
    struct job *jobs[N], *others[2];
    struct image *image[1];
    struct image_store store;
    init_store(&store);
    take_images(image, 1, &store);
    for (int i = 0; i < N; i++) {
        specs[i] = plain;
        specs[i].n_prompt = 100;
        specs[i].choice = (uint32_t)i;
        specs[i].n_marks = 1;
        specs[i].marks[0] = 99;
        jobs[i] = submitted(s, i ? make_job_from(&specs[i], NULL, image[0], 99, jobs[0])
                                 : make_job_from(&specs[i], image, NULL, 0, NULL));
    }
    for (int i = 0; i < 2; i++)
        others[i] = submit(s, &plain);
    struct engine_stats stats;
    wait_at_gate(0);
    pass_steps(3);
    scheduler_stats(s, &stats);
    assert_int_equal(stats.n_waiting, N - 1);
    assert_int_equal(stats.n_running, 3);
    allow(-1);
    for (int i = 0; i < 2; i++) {
        check_output(others[i], &plain, 8, 0);
        job_release(others[i]);
    }
    for (int i = N - 1; i >= 0; i--) {
        check_output(jobs[i], &specs[i], 8, 0);
        job_release(jobs[i]);
    }
    scheduler_stats(s, &stats);
    assert_int_equal(stats.n_prompt_tokens, 100 + (N - 1) + 2 * plain.n_prompt);
    stop(s);
    drop_images(image, 1, &store);
}

/* The first ends before it gets there: nobody waits for ever. */
static void test_lost_forks(void **state)
{
    (void)state;
    struct scheduler *s = start(0);
    struct spec spec = plain;
    struct image *image[1];
    struct image_store store;
    enum status status;
    init_store(&store);
    take_images(image, 1, &store);
    spec.n_prompt = 500;
    spec.n_marks = 1;
    spec.marks[0] = 499;
    struct job *first = submitted(s, make_job_from(&spec, image, NULL, 0, NULL));
    struct job *lost = submitted(s, make_job_from(&spec, NULL, image[0], 499, first));
    struct job *cancelled = submitted(s, make_job_from(&spec, NULL, image[0], 499, first));
    spec.deadline_ms = 1;
    struct job *late = submitted(s, make_job_from(&spec, NULL, image[0], 499, first));
    wait_at_gate(0);
    sleep_past(late);
    job_cancel(cancelled);
    pass_steps(2);
    assert_int_equal(finish_of(cancelled, NULL), FINISH_CANCELLED);
    assert_int_equal(finish_of(late, &status), FINISH_ERROR);
    assert_int_equal(status, STATUS_TIMEOUT);
    job_cancel(first);
    allow(-1);
    assert_int_equal(finish_of(first, NULL), FINISH_CANCELLED);
    assert_int_equal(finish_of(lost, &status), FINISH_ERROR);
    assert_int_equal(status, STATUS_CONFLICT);
    struct job *jobs[] = {lost, cancelled, late, first};
    for (int i = 0; i < 4; i++)
        job_release(jobs[i]);
    struct job *after = submit(s, &plain);
    check_output(after, &plain, 8, 0);
    job_release(after);
    stop(s);
    drop_images(image, 1, &store);
}

/* Scores against a log softmax in double over the same logits. */
static void check_scores(const struct spec *spec, int chunk, const struct job_token *scores, int n)
{
    uint64_t hash = 99;
    float logits[V];
    assert_int_equal(n, spec->n_prompt);
    for (int i = 0; i < n; i++) {
        assert_int_equal(scores[i].token, prompt_token(spec, i));
        if (i == 0) {
            assert_true(isnan(scores[i].logprob) && scores[i].n_top == 0);
        } else {
            double sum = 0;
            int best = 0;
            logits_of(hash, logits);
            for (int t = 0; t < V; t++) {
                sum += exp(logits[t]);
                best = logits[t] > logits[best] ? t : best;
            }
            assert_true(fabs(scores[i].logprob - (logits[scores[i].token] - log(sum))) < 1e-5);
            assert_int_equal(scores[i].n_top, spec->prompt_logprobs);
            if (scores[i].n_top)
                assert_int_equal(scores[i].top[0].token, best);
        }
        int rest = n - i;
        if (i % chunk == 0)
            hash = cut(hash, rest < chunk ? rest : chunk);
        hash = feed(hash, prompt_token(spec, i));
    }
}

static void test_prompt_logprobs(void **state)
{
    (void)state;
    static const int lengths[] = {1, 2, 8, 9, 40, 1500};
    static struct job_token scores[2000];
    static int32_t tokens[100], expected[100];
    struct scheduler_options options = small_options();
    options.chunk_tokens = 400; /* scored chunks are of 256 at most */
    struct scheduler *s = start_with(&options, -1, 0);
    for (size_t i = 0; i < COUNT_OF(lengths); i++)
        for (int max_tokens = 0; max_tokens <= 5; max_tokens += 5) {
            struct spec spec = plain, noise = plain;
            spec.n_prompt = lengths[i];
            spec.max_tokens = max_tokens;
            spec.prompt_logprobs = (int)i;
            noise.seed = 7;
            noise.max_tokens = 400;
            struct job *other = submit(s, &noise), *job = submit(s, &spec);
            int n_scores;
            int n = read_all(job, tokens, scores, &n_scores);
            check_scores(&spec, 256, scores, n_scores);
            enum job_finish finish;
            assert_int_equal(n, expect(&spec, 256, 0, expected, &finish));
            assert_memory_equal(tokens, expected, (size_t)n * sizeof(*tokens));
            job_release(job);
            check_output(other, &noise, 400, 0);
            job_release(other);
        }
    stop(s);
}

static void test_logprobs_come_through(void **state)
{
    (void)state;
    struct scheduler *s = start(-1);
    struct spec spec = plain;
    spec.n_logprobs = 3;
    struct job *job = submit(s, &spec);
    struct job_token token;
    for (int i = 0; i < spec.max_tokens; i++) {
        job_wait(job);
        assert_int_equal(job_read(job, &token, 1), 1);
        assert_true(token.n_top == 3 && token.logprob < 0 &&
                    token.top[0].logprob >= token.logprob &&
                    token.top[0].logprob >= token.top[1].logprob);
    }
    job_release(job);
    stop(s);
}

/* ---- Batches ---- */

static int rows_of(int step, int slot)
{
    for (int i = 0; i < fake.n_log; i++)
        if (fake.log[i].step == step && fake.log[i].slot == slot)
            return fake.log[i].n_rows;
    return 0;
}

/* Decoding slots get their row in every step, prompts share what is left in turns, and chunks
 * begin at multiples of chunk_tokens. */
static void test_batches(void **state)
{
    (void)state;
    struct scheduler *s = start(0); /* 4 slots, 24 rows, chunks of 8 */
    struct spec decoder = plain, prompt = plain;
    decoder.n_prompt = 3;
    decoder.max_tokens = 60;
    prompt.n_prompt = 100;
    prompt.max_tokens = 1;
    struct job *jobs[4] = {submit(s, &decoder)};
    wait_at_gate(0);
    for (int i = 1; i < 4; i++)
        jobs[i] = submit(s, &prompt);
    pass_steps(20);
    pthread_mutex_lock(&fake.lock);
    int fed[4] = {0};
    assert_int_equal(rows_of(0, 0), 3);
    for (int step = 1; step < 20; step++) {
        int n_rows = 0;
        assert_int_equal(rows_of(step, 0), 1); /* decodes in every step */
        for (int i = 0; i < 4; i++)
            n_rows += rows_of(step, i);
        assert_int_equal(n_rows, 17); /* and two whole chunks fit beside it */
        for (int i = 1; i < 4; i++)
            fed[i] += rows_of(step, i);
        for (int i = 1; i < 4; i++)
            for (int k = 1; k < 4; k++)
                assert_true(abs(fed[i] - fed[k]) <= 8); /* nobody is ahead by more than one */
        if (fed[1] + fed[2] + fed[3] > 250)
            break;
    }
    for (int i = 0; i < fake.n_log; i++)
        if (fake.log[i].n_rows > 1)
            assert_int_equal(fake.log[i].position % 8, 0);
    pthread_mutex_unlock(&fake.lock);
    allow(-1);
    check_output(jobs[0], &decoder, 8, 0);
    for (int i = 0; i < 4; i++) {
        finish_of(jobs[i], NULL);
        job_release(jobs[i]);
    }
    stop(s);
}

/* More slots than step_tokens: the step grows so that a prompt still gets its whole chunk. */
static void test_small_budget(void **state)
{
    (void)state;
    struct scheduler_options options = small_options();
    options.n_slots = 16;
    options.step_tokens = 2;
    int max_rows, max_logit_rows;
    scheduler_limits(&options, &max_rows, &max_logit_rows);
    assert_int_equal(max_rows, 15 + 8);
    assert_int_equal(max_logit_rows, 15 + 8);
    struct scheduler *s = start_with(&options, -1, 0);
    struct job *jobs[40];
    struct spec spec = plain;
    for (int i = 0; i < 40; i++) {
        spec.seed = (uint64_t)i;
        spec.n_prompt = 30 + i;
        jobs[i] = submit(s, &spec);
    }
    for (int i = 0; i < 40; i++) {
        spec.seed = (uint64_t)i;
        spec.n_prompt = 30 + i;
        check_output(jobs[i], &spec, 8, 0);
        job_release(jobs[i]);
    }
    stop(s);
}

/* More decoding slots than a step takes: each waits for the others' turn, and prompts still
 * get their chunk beside a full batch. */
static void test_turns(void **state)
{
    (void)state;
    enum { SLOTS = 23, BATCH = 4 };
    struct scheduler_options options = small_options();
    options.n_slots = SLOTS;
    options.max_batch = BATCH;
    options.step_tokens = 2;
    int max_rows, max_logit_rows;
    scheduler_limits(&options, &max_rows, &max_logit_rows);
    assert_int_equal(max_rows, BATCH + 8); /* all of a batch may decode beside the chunk */
    assert_int_equal(max_logit_rows, BATCH + 8);
    struct scheduler *s = start_with(&options, 0, 0);
    struct job *jobs[SLOTS + 1];
    struct spec spec = plain;
    spec.max_tokens = 100; /* nobody ends in the time that is looked at, also where the first job
                            * was ahead of the others */
    spec.n_prompt = 30;
    for (int i = 0; i <= SLOTS; i++) {
        spec.seed = (uint64_t)i;
        jobs[i] = submit(s, &spec);
    }
    allow(-1);
    for (int i = 0; i <= SLOTS; i++) {
        spec.seed = (uint64_t)i;
        check_output(jobs[i], &spec, 8, 0);
        job_release(jobs[i]);
    }
    /* Once all decode, they follow each other in a circle. */
    int first = 0, n_chunks = 0;
    while (n_chunks < SLOTS * 4)
        n_chunks += fake.log[first++].n_rows > 1;
    for (int i = first; i < first + SLOTS * 20; i++) {
        assert_int_equal(fake.log[i].n_rows, 1);
        assert_true(i < first + SLOTS || fake.log[i].slot == fake.log[i - SLOTS].slot);
        assert_int_not_equal(fake.log[i].step, fake.log[i - BATCH].step);
    }
    stop(s);
}

static void test_first_in_first_out(void **state)
{
    (void)state;
    struct scheduler_options options = small_options();
    options.n_slots = 1;
    struct scheduler *s = start_with(&options, 0, 0);
    struct job *jobs[6];
    for (int i = 0; i < 6; i++)
        jobs[i] = submit(s, &plain);
    allow(-1);
    int64_t last_ns = 0;
    for (int i = 0; i < 6; i++) {
        finish_of(jobs[i], NULL);
        struct job_snapshot snapshot;
        job_snapshot(jobs[i], &snapshot);
        assert_true(snapshot.admitted_ns >= last_ns);
        last_ns = snapshot.finished_ns;
        job_release(jobs[i]);
    }
    stop(s);
}

/* ---- Refusals ---- */

static void test_refusals(void **state)
{
    (void)state;
    struct scheduler_options options = small_options();
    options.max_prompt_tokens = 50;
    struct scheduler *s = start_with(&options, -1, 0);
    struct error err;
    struct spec spec = plain;
    spec.n_prompt = 51;
    struct job *job = make_job(&spec);
    assert_int_equal(scheduler_submit(s, job, &err), STATUS_TOO_LARGE);
    job_release(job);

    spec = plain;
    spec.temperature = -1;
    job = make_job(&spec);
    assert_int_equal(scheduler_submit(s, job, &err), STATUS_INVALID);
    assert_string_equal(err.field, "temperature");
    job_release(job);

    const int32_t prompts[][2] = {{3, V}, {-1, 3}};
    for (int i = 0; i < 2; i++) {
        struct job_request request = {.prompt = prompts[i], .n_prompt = 2};
        sampling_params_init(&request.sampling);
        assert_int_equal(job_new(&job, &request, NULL), STATUS_OK);
        assert_int_equal(scheduler_submit(s, job, &err), STATUS_INVALID);
        assert_string_equal(err.field, "prompt");
        job_release(job);
    }
    stop(s);
}

static void test_full_queue(void **state)
{
    (void)state;
    struct scheduler_options options = small_options();
    options.n_slots = 2;
    options.max_queue = 3;
    struct scheduler *s = start_with(&options, 0, 0);
    struct job *jobs[5], *extra = make_job(&plain);
    for (int i = 0; i < 5; i++)
        jobs[i] = submit(s, &plain);
    wait_at_gate(0);
    assert_int_equal(scheduler_submit(s, extra, NULL), STATUS_BUSY);
    struct engine_stats stats;
    scheduler_stats(s, &stats);
    assert_int_equal(stats.n_running + stats.n_waiting, 5);
    job_cancel(jobs[4]); /* makes room within a step */
    pass_steps(1);
    assert_int_equal(scheduler_submit(s, extra, NULL), STATUS_OK);
    allow(-1);
    check_output(extra, &plain, 8, 0);
    assert_int_equal(finish_of(jobs[4], NULL), FINISH_CANCELLED);
    job_release(extra);
    for (int i = 0; i < 5; i++) {
        finish_of(jobs[i], NULL);
        job_release(jobs[i]);
    }
    stop(s);
}

/* ---- Ends ---- */

static void test_cancel(void **state)
{
    (void)state;
    struct scheduler_options options = small_options();
    options.n_slots = 2;
    struct scheduler *s = start_with(&options, 0, 0);
    struct spec decoding = plain, reading = plain;
    decoding.max_tokens = 1000;
    reading.n_prompt = 2000;
    struct job *a = submit(s, &decoding), *b = submit(s, &reading), *waiting = submit(s, &plain);
    wait_at_gate(0);
    pass_steps(5);
    int done = steps_done();
    job_cancel(a);
    job_cancel(b);
    job_cancel(waiting);
    allow(-1);
    assert_int_equal(finish_of(a, NULL), FINISH_CANCELLED);
    assert_int_equal(finish_of(b, NULL), FINISH_CANCELLED);
    assert_int_equal(finish_of(waiting, NULL), FINISH_CANCELLED);
    assert_true(steps_done() <= done + variant->depth); /* the steps that were on their way */
    struct job_snapshot snapshot;
    job_snapshot(waiting, &snapshot);
    assert_true(snapshot.admitted_ns == 0);
    struct job *after = submit(s, &plain); /* the slots are clean again */
    check_output(after, &plain, 8, 0);
    struct job *jobs[] = {a, b, waiting, after};
    for (int i = 0; i < 4; i++)
        job_release(jobs[i]);

    struct job *early = make_job(&plain); /* cancelled before it is submitted */
    job_cancel(early);
    assert_int_equal(scheduler_submit(s, early, NULL), STATUS_OK);
    assert_int_equal(finish_of(early, NULL), FINISH_CANCELLED);
    job_release(early);
    stop(s);
}

static void test_deadlines(void **state)
{
    (void)state;
    struct scheduler_options options = small_options();
    options.n_slots = 2;
    struct scheduler *s = start_with(&options, 0, 0);
    struct spec decoding = plain, reading = plain, waiting = plain;
    decoding.max_tokens = 1000;
    reading.n_prompt = 2000;
    decoding.deadline_ms = reading.deadline_ms = waiting.deadline_ms = 1;
    struct job *jobs[] = {submit(s, &decoding), submit(s, &reading), submit(s, &waiting)};
    struct job *patient = submit(s, &plain);
    for (int i = 0; i < 3; i++)
        sleep_past(jobs[i]);
    allow(-1);
    for (int i = 0; i < 3; i++) {
        enum status status;
        assert_int_equal(finish_of(jobs[i], &status), FINISH_ERROR);
        assert_int_equal(status, STATUS_TIMEOUT);
        job_release(jobs[i]);
    }
    check_output(patient, &plain, 8, 0);
    job_release(patient);
    stop(s);
}

/* A job whose reader does not read waits without steps, others go on; then it continues. */
static void test_full_ring(void **state)
{
    (void)state;
    struct scheduler *s = start(-1);
    struct spec slow = plain, scored = plain;
    slow.max_tokens = 1000;
    scored.n_prompt = 1400;
    scored.prompt_logprobs = 0;
    struct job *a = submit(s, &slow), *b = submit(s, &scored);
    struct job_snapshot snapshot;
    for (int ms = 0; ms < 20000; ms++) { /* a busy machine may let the engine's thread wait */
        job_snapshot(a, &snapshot);
        if (snapshot.n_output >= job_ring_size(a))
            break;
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
    settle(s);
    job_snapshot(a, &snapshot);
    assert_int_equal(snapshot.n_output, job_ring_size(a)); /* filled to the brim */
    struct job *other = submit(s, &plain);
    check_output(other, &plain, 8, 0);
    job_release(other);
    settle(s);
    check_output(a, &slow, 8, 0);
    check_output(b, &scored, 8, 0);
    job_release(a);
    job_release(b);

    a = submit(s, &slow); /* a sleeping engine also sees a cancellation */
    settle(s);
    job_cancel(a);
    assert_int_equal(finish_of(a, NULL), FINISH_CANCELLED);
    job_release(a);
    slow.deadline_ms = 100; /* and a deadline, with nothing else to wake it */
    a = submit(s, &slow);
    struct job *queued[4];
    for (int i = 0; i < 4; i++)
        queued[i] = submit(s, &slow);
    for (int i = 0; i < 4; i++) {
        do { /* without reading: the rings stay full */
            nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
            job_snapshot(queued[i], &snapshot);
        } while (snapshot.finish == FINISH_NONE);
        assert_int_equal(snapshot.error.status, STATUS_TIMEOUT);
        job_release(queued[i]);
    }
    job_release(a);
    stop(s);
}

/* One slot, many jobs: what a job has in a step behind its end never reaches the next one. */
static void test_rows_without_owner(void **state)
{
    (void)state;
    enum { N = 40 };
    struct scheduler_options options = small_options();
    options.n_slots = 1;
    struct scheduler *s = start_with(&options, -1, 0);
    struct job *jobs[N];
    struct spec specs[N];
    for (int i = 0; i < N; i++) {
        specs[i] = plain;
        specs[i].seed = (uint64_t)i + 3;
        specs[i].n_prompt = 1 + i % 9;
        specs[i].max_tokens = i % 5 ? 150 : i % 3; /* eos ends most of them */
        specs[i].stops = true;
        specs[i].prompt_logprobs = i % 4 == 1 ? 1 : -1;
        jobs[i] = submit(s, &specs[i]);
    }
    for (int i = 0; i < N; i++) {
        check_output(jobs[i], &specs[i], 8, 0);
        job_release(jobs[i]);
    }
    settle(s);
    struct engine_stats stats;
    scheduler_stats(s, &stats);
    assert_int_equal(stats.n_dropped_tokens > 10, variant->depth == 2);
    stop(s);
}

static void fail_at(int step)
{
    pthread_mutex_lock(&fake.lock);
    fake.fail_at = step;
    pthread_mutex_unlock(&fake.lock);
}

static void test_device_failure(void **state)
{
    (void)state;
    struct scheduler *s = start(0);
    struct spec spec = plain;
    spec.max_tokens = 1000;
    struct job *jobs[7];
    for (int i = 0; i < 7; i++)
        jobs[i] = submit(s, &spec);
    fail_at(3);
    allow(-1);
    for (int i = 0; i < 7; i++) {
        enum status status;
        assert_int_equal(finish_of(jobs[i], &status), FINISH_ERROR);
        assert_int_equal(status, STATUS_DEVICE);
    }
    struct job *late = make_job(&plain);
    struct error err;
    assert_int_equal(scheduler_submit(s, late, &err), STATUS_DEVICE);
    assert_non_null(strstr(err.text, "broken at step 3"));
    job_release(late);
    struct engine_stats stats;
    scheduler_stats(s, &stats);
    assert_true(stats.failed && stats.n_running == 0 && stats.n_waiting == 0);
    assert_int_equal(steps_done(), variant->model_depth == 2 ? 5 : 4);
    for (int i = 0; i < 7; i++)
        job_release(jobs[i]);
    stop(s);
}

static void test_drain_and_close(void **state)
{
    (void)state;
    struct scheduler *s = start(0);
    struct job *running = submit(s, &plain), *late = make_job(&plain);
    wait_at_gate(0);
    scheduler_drain(s);
    assert_int_equal(scheduler_submit(s, late, NULL), STATUS_SHUTDOWN);
    allow(-1);
    check_output(running, &plain, 8, 0); /* goes on to its end */
    job_release(running);
    job_release(late);
    stop(s);

    s = start(0);
    struct spec spec = plain;
    spec.max_tokens = 1000000;
    struct job *jobs[6];
    for (int i = 0; i < 6; i++)
        jobs[i] = submit(s, &spec);
    assert_true(job_park(jobs[5])); /* stays on the ready list that nobody takes */
    stop(s);
    for (int i = 0; i < 6; i++) {
        enum status status;
        assert_int_equal(finish_of(jobs[i], &status), FINISH_ERROR);
        assert_int_equal(status, STATUS_SHUTDOWN);
        job_cancel(jobs[i]); /* outlives its engine */
        job_release(jobs[i]);
    }
    scheduler_close(NULL);
}

/* Closed at any moment of its first turns, the thread hears of it: it may be about to sleep. */
static void test_close_soon(void **state)
{
    (void)state;
    alarm(120); /* else a thread that never wakes would stay */
    for (int i = 0; i < 3000; i++) {
        struct scheduler *s = start(-1);
        for (volatile int spin = i % 500 * 100; spin; spin--)
            ;
        stop(s);
    }
    alarm(0);
}

/* ---- Wake-ups ---- */

/* Take what is ready and read it; returns the tokens found. */
static int read_ready(struct scheduler *s)
{
    struct job *job;
    int n = 0;
    while ((job = scheduler_take_ready(s))) {
        struct job_token tokens[8];
        size_t got;
        do {
            n += (int)(got = job_read(job, tokens, 8));
        } while (!job_park(job) && got);
        job_release(job);
    }
    return n;
}

static void test_ready_list(void **state)
{
    (void)state;
    struct scheduler *s = start(0);
    struct spec spec = plain;
    spec.max_tokens = 6;
    struct job *jobs[3];
    for (int i = 0; i < 3; i++) {
        jobs[i] = submit(s, &spec);
        assert_true(job_park(jobs[i]));
    }
    wait_at_gate(0);
    assert_null(scheduler_take_ready(s));
    int n_read = 0, n_steps = 0;
    while (n_read < 9) { /* one wake-up for each step, whatever number of jobs it served */
        pass_steps(1);
        n_read += read_ready(s);
        assert_int_equal(atomic_load(&n_wakes), ++n_steps);
    }
    allow(-1);
    while (n_read < 18)
        n_read += read_ready(s);
    for (int i = 0; i < 3; i++) {
        finish_of(jobs[i], NULL);
        job_release(jobs[i]);
    }
    assert_int_equal(n_read, 18);
    stop(s);
}

/* A job that is parked again before it was taken from the list is on it only once. */
static void test_ready_once(void **state)
{
    (void)state;
    struct scheduler *s = start(0);
    struct spec spec = plain;
    spec.max_tokens = 100;
    struct job *job = submit(s, &spec);
    struct job_token tokens[8];
    assert_true(job_park(job));
    wait_at_gate(0);
    for (int i = 0; i < 5; i++) {
        pass_steps(1);
        assert_int_equal(job_read(job, tokens, 8), 1);
        assert_true(job_park(job));
    }
    struct job *ready = scheduler_take_ready(s);
    assert_ptr_equal(ready, job);
    job_release(ready);
    assert_null(scheduler_take_ready(s));
    job_release(job);
    stop(s);
}

/* The next job of the ready list, waited for. */
static struct job *await_ready(struct scheduler *s)
{
    struct job *job;
    while (!(job = scheduler_take_ready(s)))
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    return job;
}

/* Readers that are parked learn of every end: of a running job and of those in the queue. */
static void test_ends_reach_parked_readers(void **state)
{
    (void)state;
    struct scheduler_options options = small_options();
    options.n_slots = 1;
    struct scheduler *s = start_with(&options, 0, 0);
    struct spec running = plain, late = plain;
    running.n_prompt = 2000;
    late.deadline_ms = 300; /* not before the first step is at its gate, on a busy machine either */
    struct job *jobs[] = {submit(s, &running), submit(s, &plain), submit(s, &late)};
    for (int i = 0; i < 3; i++)
        assert_true(job_park(jobs[i]));
    wait_at_gate(0);
    sleep_past(jobs[2]);
    job_cancel(jobs[0]);
    job_cancel(jobs[1]);
    assert_null(scheduler_take_ready(s));
    allow(-1);
    bool seen[3] = {false};
    for (int k = 0; k < 3; k++) {
        struct job *job = await_ready(s);
        for (int i = 0; i < 3; i++)
            seen[i] |= jobs[i] == job;
        assert_false(job_park(job)); /* nothing more will come of it */
        job_release(job);
    }
    for (int i = 0; i < 3; i++) {
        assert_true(seen[i]);
        assert_int_equal(finish_of(jobs[i], NULL), i == 2 ? FINISH_ERROR : FINISH_CANCELLED);
        job_release(jobs[i]);
    }
    assert_int_equal(steps_done(), 1);
    stop(s);
    assert_int_equal(atomic_load(&n_wakes), 1);
}

/* ---- Allocation ---- */

static void test_engine_allocates_nothing(void **state)
{
    (void)state;
    if (!fail_alloc_works())
        skip();
    struct scheduler *s = start(-1);
    fail_alloc_count_others();
    for (int round = 0; round < 3; round++) {
        struct job *jobs[30];
        for (int i = 0; i < 30; i++) {
            struct spec spec = plain;
            spec.seed = (uint64_t)i;
            spec.n_prompt = 50 + i;
            spec.n_logprobs = i % 3 - 1;
            spec.prompt_logprobs = i % 5 - 1;
            spec.repetition_penalty = 1 + (float)(i % 2);
            spec.deadline_ms = i % 7 == 6;
            jobs[i] = submit(s, &spec);
            if (i % 11 == 5)
                job_cancel(jobs[i]);
        }
        for (int i = 0; i < 30; i++) {
            finish_of(jobs[i], NULL);
            job_release(jobs[i]);
        }
    }
    assert_int_equal(fail_alloc_count_others(), 0);
    stop(s);
}

static enum status open_and_close(void *context, struct error *err)
{
    struct scheduler_options options = small_options();
    struct scheduler *s = NULL;
    (void)context;
    enum status st = scheduler_open(&s, NULL, &options, err);
    scheduler_close(s);
    return st;
}

static void test_out_of_memory(void **state)
{
    (void)state;
    stop(start(-1)); /* the model's facts stay */
    fail_alloc_walk(open_and_close, NULL);
}

/* ---- Stress ---- */

struct stress {
    struct scheduler *s;
    uint64_t seed;
    int n_jobs;
    char problem[128]; /* empty: none. cmocka's asserts belong to the main thread. */
};

static void stress_one(struct stress *t, uint64_t r)
{
    struct spec spec = plain;
    spec.seed = r;
    spec.n_prompt = 1 + (int)(r % 70);
    spec.max_tokens = (int)((r >> 8) % 200);
    spec.stops = r >> 20 & 1;
    spec.repetition_penalty = r >> 21 & 1 ? 1.2f : 1;
    spec.prompt_logprobs = r >> 22 & 1 ? 2 : -1;
    struct job *job = make_job(&spec);
    int cancel_after = r >> 23 & 3 ? -1 : (int)((r >> 25) % 100);
    struct error err;
    enum status st = scheduler_submit(t->s, job, &err);
    if (st == STATUS_BUSY) {
        job_release(job);
        return;
    }
    static _Thread_local int32_t expected[5000];
    enum job_finish finish;
    int n_expected = expect(&spec, 8, 0, expected, &finish), n = 0, n_prompt = 0;
    struct job_snapshot snapshot = {0};
    for (;;) {
        struct job_token tokens[32];
        if (n == cancel_after)
            job_cancel(job);
        job_wait(job);
        job_snapshot(job, &snapshot);
        size_t got = job_read(job, tokens, 1 + (r >> 30) % 32);
        for (size_t i = 0; i < got; i++) {
            n_prompt += tokens[i].is_prompt;
            if (!tokens[i].is_prompt && (n >= n_expected || tokens[i].token != expected[n++]))
                snprintf(t->problem, sizeof(t->problem), "seed %llx: output %d differs",
                         (unsigned long long)r, n - 1);
        }
        if (!got && snapshot.finish != FINISH_NONE)
            break;
    }
    bool cancelled = snapshot.finish == FINISH_CANCELLED;
    if (cancelled ? cancel_after < 0 : n != n_expected || snapshot.finish != finish)
        snprintf(t->problem, sizeof(t->problem), "seed %llx: %d tokens of %d, finish %d of %d",
                 (unsigned long long)r, n, n_expected, snapshot.finish, finish);
    if (!cancelled && spec.prompt_logprobs >= 0 && n_prompt != spec.n_prompt)
        snprintf(t->problem, sizeof(t->problem), "seed %llx: %d scores", (unsigned long long)r,
                 n_prompt);
    job_release(job);
}

static void *stress_thread(void *context)
{
    struct stress *t = context;
    for (int i = 0; i < t->n_jobs; i++)
        stress_one(t, mix(t->seed * 1000000 + (uint64_t)i));
    return NULL;
}

/* Many readers that cancel, dawdle and race: every output is the one computed alone. */
#ifdef __SANITIZE_THREAD__ /* each job takes ten times as long */
enum { STRESS_JOBS = 80 };
#else
enum { STRESS_JOBS = 250 };
#endif

static void test_stress(void **state)
{
    (void)state;
    enum { THREADS = 12 };
    struct scheduler_options options = small_options();
    options.n_slots = 7;
    options.max_queue = 3;
    struct scheduler *s = start_with(&options, -1, 0);
    static struct stress threads[THREADS];
    pthread_t ids[THREADS];
    for (int i = 0; i < THREADS; i++) {
        threads[i] = (struct stress){.s = s, .seed = (uint64_t)i + 1, .n_jobs = STRESS_JOBS};
        pthread_create(&ids[i], NULL, stress_thread, &threads[i]);
    }
    for (int i = 0; i < THREADS; i++)
        pthread_join(ids[i], NULL);
    for (int i = 0; i < THREADS; i++)
        if (threads[i].problem[0])
            fail_msg("%s", threads[i].problem);
    struct engine_stats stats;
    scheduler_stats(s, &stats);
    assert_true(stats.n_running == 0 && stats.n_waiting == 0 && !stats.failed);
    stop(s);
}

#define IN(test, v)                                                                                \
    {                                                                                              \
#test " " #v, test, take_variant, NULL, (void *)(uintptr_t)&variants[v]                    \
    }
#define IN_ALL(test) IN(test, 0), IN(test, 1), IN(test, 2), IN(test, 3)

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        IN_ALL(test_outputs_alone),
        IN_ALL(test_outputs_together),
        IN_ALL(test_position_limit),
        IN_ALL(test_no_output),
        IN_ALL(test_marks),
        IN_ALL(test_residents),
        IN_ALL(test_many_turns),
        IN_ALL(test_save_fails),
        IN_ALL(test_close_in_turns),
        IN_ALL(test_forks),
        IN_ALL(test_lost_forks),
        IN_ALL(test_prompt_logprobs),
        IN_ALL(test_logprobs_come_through),
        IN(test_batches, 0),
        IN(test_batches, 1),
        IN_ALL(test_small_budget),
        IN_ALL(test_turns),
        IN_ALL(test_first_in_first_out),
        IN(test_refusals, 0),
        IN(test_full_queue, 0),
        IN_ALL(test_cancel),
        IN_ALL(test_deadlines),
        IN_ALL(test_full_ring),
        IN_ALL(test_rows_without_owner),
        IN_ALL(test_device_failure),
        IN_ALL(test_drain_and_close),
        IN(test_close_soon, 0),
        IN(test_ready_list, 0),
        IN(test_ready_once, 0),
        IN(test_ends_reach_parked_readers, 0),
        IN_ALL(test_engine_allocates_nothing),
        IN_ALL(test_out_of_memory),
        IN_ALL(test_stress),
    };
    if (argc > 1)
        cmocka_set_test_filter(argv[1]);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
