/* test_schedule_cuda.c - steps as a scheduler drives a GPU: sessions that come, go, are moved out
 * and back in any order and beside anybody, and tokens drawn on the device two steps ahead.
 *
 * The oracle of an order is another order; of a draw, the host's sampler on the device's own
 * logits of the same step.
 */
#include "tests/unit/unit.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/sampler.h"
#include "tests/cuda/cuda_tests.h"

#define F32_TOLERANCE 1e-4
#define BF16_TOLERANCE 0.2 /* see test_model_cuda.c */

enum { N_SLOTS = 24, MAX_ROWS = 192, MAX_CHUNKS = 40, MAX_TOKENS = 80 };

static uint64_t seed_of_run;

static int random_below(int n)
{
    seed_of_run = seed_of_run * 6364136223846793005u + 1442695040888963407u;
    return (int)((seed_of_run >> 33) % (uint64_t)n);
}

static void open_run(struct run *r, const char *dir, enum dtype dtype, bool deterministic)
{
    const struct run_form form = {.window_dtype = dtype == DTYPE_F32 ? DTYPE_F32 : DTYPE_BF16,
                                  .max_rows = MAX_ROWS,
                                  .deterministic = deterministic};
    run_open_as(r, dir, &(struct run_options){"cuda", 1, dtype, N_SLOTS}, &form);
}

/* ---- sessions in any order ---- */

enum { N_SESSIONS = 14, POOL = 10 }; /* POOL slots for sessions; the slots above are for fillers */

/* Fixed chunks, so that what a session brings to its steps is the same in every order. */
struct session {
    int n_chunks, chunks[MAX_CHUNKS];
    int32_t tokens[MAX_TOKENS];
    float *logits; /* [n_chunks, V] last row of each chunk */

    int done, at, slot; /* chunks and tokens fed; slot -1: none */
    float *saved;       /* its state while it has no slot */
};

static void make_sessions(struct session *sessions, int n, bool single_rows, const struct run *r)
{
    seed_of_run = 31;
    for (int s = 0; s < n; s++) {
        sessions[s] = (struct session){.slot = -1};
        const int n_tokens = single_rows ? 6 + random_below(8) : 20 + random_below(40);
        for (int at = 0, rows; at < n_tokens; at += rows) {
            rows = single_rows || random_below(3) ? 1 : 1 + random_below(30);
            rows = rows < n_tokens - at ? rows : n_tokens - at;
            if (sessions[s].n_chunks == MAX_CHUNKS)
                break;
            sessions[s].chunks[sessions[s].n_chunks++] = rows;
        }
        for (int i = 0; i < MAX_TOKENS; i++)
            sessions[s].tokens[i] = random_below(r->vocab_size);
        sessions[s].logits = calloc(MAX_CHUNKS * (size_t)r->vocab_size, sizeof(float));
        assert_non_null(sessions[s].logits);
    }
}

static void free_sessions(struct session *sessions, int n)
{
    for (int s = 0; s < n; s++)
        free(sessions[s].logits);
}

static void put_state(struct run *r, struct session *s)
{
    const float *at = s->saved;
    struct error err;
    for (int i = 0; i < model_n_state_tensors(r->model); i++) {
        if (model_state_write(r->model, s->slot, i, at, &err))
            fail_msg("%s: %s", r->label, err.text);
        at += model_state_tensor(r->model, i)->n_values;
    }
    model_set_position(r->model, s->slot, (uint64_t)s->at);
    free(s->saved);
    s->saved = NULL;
}

static int free_slot(const struct session *sessions)
{
    int slots[POOL], n = 0;
    for (int slot = 0; slot < POOL; slot++) {
        bool used = false;
        for (int s = 0; s < N_SESSIONS; s++)
            used |= sessions[s].slot == slot;
        if (!used)
            slots[n++] = slot;
    }
    return n ? slots[random_below(n)] : -1;
}

/* Move out a session that takes no part in the step. */
static void evict_one(struct run *r, struct session *sessions, const bool *chosen)
{
    size_t n;
    int s;
    do
        s = random_below(N_SESSIONS);
    while (sessions[s].slot < 0 || chosen[s]);
    sessions[s].saved = run_state(r, sessions[s].slot, &n);
    sessions[s].slot = -1;
}

static void seat(struct run *r, struct session *sessions, int s, const bool *chosen)
{
    if (sessions[s].slot >= 0)
        return;
    if (free_slot(sessions) < 0)
        evict_one(r, sessions, chosen);
    sessions[s].slot = free_slot(sessions);
    if (sessions[s].saved)
        put_state(r, &sessions[s]);
    else
        model_reset(r->model, sessions[s].slot);
}

/* One step of the chosen sessions in the given order; fillers keep the batch at its size. */
static void step_of(struct run *r, struct session *sessions, const int *order, int n, int fillers)
{
    int32_t tokens[MAX_ROWS];
    struct model_seq seqs[N_SLOTS];
    const size_t V = (size_t)r->vocab_size;
    const float *logits;
    struct error err;
    int n_rows = 0;
    for (int i = 0; i < n; i++) {
        const struct session *s = &sessions[order[i]];
        const int rows = s->chunks[s->done];
        seqs[i] = (struct model_seq){s->slot, rows, LOGITS_LAST};
        memcpy(tokens + n_rows, s->tokens + s->at, (size_t)rows * sizeof(*tokens));
        n_rows += rows;
    }
    for (int i = 0; i < fillers; i++) {
        seqs[n + i] = (struct model_seq){POOL + i, 1, LOGITS_LAST};
        tokens[n_rows++] = 1;
    }
    if (model_step(r->model, tokens, seqs, n + fillers, &logits, &err))
        fail_msg("%s: %s", r->label, err.text);
    for (int i = 0; i < n; i++, logits += V) {
        struct session *s = &sessions[order[i]];
        memcpy(s->logits + (size_t)s->done * V, logits, V * sizeof(*logits));
        s->at += s->chunks[s->done++];
        if (s->done == s->n_chunks)
            s->slot = -1;
    }
}

/* Feed all sessions to their ends in an order made from the seed. fixed: every step has `batch`
 * sequences, else 1 to batch. */
static void play(struct run *r, struct session *sessions, uint64_t seed, int batch, bool fixed)
{
    seed_of_run = seed;
    for (int s = 0; s < N_SESSIONS; s++)
        sessions[s].done = sessions[s].at = 0;
    for (;;) {
        int order[N_SESSIONS], n_live = 0, n = 0;
        bool chosen[N_SESSIONS] = {false};
        for (int s = 0; s < N_SESSIONS; s++)
            if (sessions[s].done < sessions[s].n_chunks)
                order[n_live++] = s;
        if (!n_live)
            return;
        const int wanted = fixed ? batch : 1 + random_below(batch);
        for (int n_rows = 0; n < n_live && n < wanted; n++) {
            const int other = n + random_below(n_live - n), s = order[other];
            n_rows += sessions[s].chunks[sessions[s].done];
            if (n_rows > MAX_ROWS)
                break;
            order[other] = order[n];
            order[n] = s;
            chosen[s] = true;
        }
        for (int i = 0; i < n; i++)
            seat(r, sessions, order[i], chosen);
        step_of(r, sessions, order, n, fixed ? batch - n : 0);
    }
}

/* Play in two orders; the largest difference of any logit. */
static double order_difference(const char *dir, enum dtype dtype, bool deterministic, bool fixed,
                               bool single_rows)
{
    struct session first[N_SESSIONS], second[N_SESSIONS];
    struct run r;
    double worst = 0;
    open_run(&r, dir, dtype, deterministic);
    make_sessions(first, N_SESSIONS, single_rows, &r);
    make_sessions(second, N_SESSIONS, single_rows, &r);
    play(&r, first, 1, 8, fixed);
    play(&r, second, 2, deterministic ? 1 : 8, fixed); /* alone, or in another order */
    for (int s = 0; s < N_SESSIONS; s++) {
        const size_t n = (size_t)first[s].n_chunks * (size_t)r.vocab_size;
        worst = fmax(worst, run_difference(first[s].logits, second[s].logits, n));
    }
    free_sessions(first, N_SESSIONS);
    free_sessions(second, N_SESSIONS);
    run_close(&r);
    return worst;
}

static void for_wide(void (*f)(const char *name, const char *dir))
{
    if (run_emulated()) {
        char dir[200];
        cuda_model_make(busy_model(), 90, dir, sizeof(dir));
        f(busy_model()->name, dir);
        test_dir_remove(dir);
    }
    wide_models_each(0, f);
}

static void check_one_bucket(const char *name, const char *dir)
{
    double difference = order_difference(dir, DTYPE_BF16, false, true, true);
    if (difference != 0)
        fail_msg("%s: the order of sessions changed logits by %g", name, difference);
}

static void test_order_changes_nothing_at_one_batch_size(void **state)
{
    (void)state;
    for_wide(check_one_bucket);
}

static void check_any_batch(const char *name, const char *dir)
{
    static const struct {
        enum dtype dtype;
        double tolerance;
    } cases[] = {{DTYPE_F32, F32_TOLERANCE}, {DTYPE_BF16, BF16_TOLERANCE}};
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        double difference = order_difference(dir, cases[i].dtype, false, false, false);
        print_message("%-20s %-5s any order, any batch: logits within %.2e\n", name,
                      dtype_name(cases[i].dtype), difference);
        if (!(difference <= cases[i].tolerance))
            fail_msg("%s: the order of sessions changed logits by %g", name, difference);
    }
}

static void test_order_at_any_batch_size(void **state)
{
    (void)state;
    for_wide(check_any_batch);
}

static void check_deterministic(const char *name, const char *dir, bool single_rows)
{
    static const enum dtype dtypes[] = {DTYPE_BF16, DTYPE_F32, DTYPE_I8};
    for (size_t i = 0; i < (run_emulated() ? 1 : COUNT_OF(dtypes)); i++) {
        double difference = order_difference(dir, dtypes[i], true, false, single_rows);
        if (difference != 0)
            fail_msg("%s, %s: deterministic, but a batch changed logits by %g", name,
                     dtype_name(dtypes[i]), difference);
    }
}

static void check_deterministic_decoding(const char *name, const char *dir)
{
    check_deterministic(name, dir, true);
}

static void test_deterministic_decoding_is_bit_equal(void **state)
{
    (void)state;
    for_wide(check_deterministic_decoding);
}

/* Rows that decode beside others' prompts, and prompts beside others. */
static void check_deterministic_mixed(const char *name, const char *dir)
{
    check_deterministic(name, dir, false);
}

static void test_deterministic_beside_prompts_is_bit_equal(void **state)
{
    (void)state;
    for_wide(check_deterministic_mixed);
}

/* ---- tokens drawn on the device ---- */

enum { N_DRAWERS = 12, N_STEPS = 24, PROMPT = 5 };

static const struct logit_bias biases[] = {{3, 4.0f}, {11, -INFINITY}, {17, 2.5f}};

/* Slot by slot another way of drawing. */
static struct sampling_params params_of(int slot)
{
    struct sampling_params p;
    sampling_params_init(&p);
    p.seed = 1000 + (uint64_t)slot;
    p.temperature = slot % 4 == 0 ? 0 : slot % 4 == 1 ? 1 : 0.7f;
    p.top_k = slot % 3 == 1 ? 40 : 0;
    p.top_p = slot % 3 == 2 ? 0.8f : 1;
    p.min_p = slot == 5 ? 0.05f : 0;
    p.typical_p = slot == 7 ? 0.6f : 1;
    p.repetition_penalty = slot == 8 || slot == 9 ? 1.3f : 1;
    p.presence_penalty = slot == 9 ? 0.5f : 0;
    p.frequency_penalty = slot == 10 ? 0.4f : 0;
    p.min_tokens = slot == 6 ? 10 : 0;
    p.n_logprobs = slot % 5 == 0 ? 3 : -1;
    p.n_logit_bias = slot == 11 || slot == 4 ? (int)COUNT_OF(biases) : 0;
    p.logit_bias = biases;
    return p;
}

struct drawn {
    struct sampled all[N_STEPS][N_DRAWERS];
    int32_t prompts[N_DRAWERS][PROMPT + N_DRAWERS];
};

/* Slots bring prompts of different lengths in step 0, then the token they drew. */
static int plan(const struct drawn *d, int step, bool known, int32_t *tokens,
                struct model_seq *seqs)
{
    int n_rows = 0;
    for (int slot = 0; slot < N_DRAWERS; slot++) {
        const int n = step ? 1 : PROMPT + slot;
        seqs[slot] = (struct model_seq){slot, n, LOGITS_LAST};
        if (!step)
            memcpy(tokens + n_rows, d->prompts[slot], (size_t)n * sizeof(*tokens));
        else
            tokens[n_rows] = known ? d->all[step - 1][slot].token : TOKEN_DRAWN;
        n_rows += n;
    }
    return n_rows;
}

static void collect(struct run *r, struct drawn *d, int step)
{
    const struct sampled *results = NULL;
    struct error err;
    if (model_collect(r->model, &results, &err))
        fail_msg("%s: %s", r->label, err.text);
    memcpy(d->all[step], results, sizeof(d->all[step]));
}

/* Two steps in flight: no token is known to the host before the step that feeds it is queued. */
static void draw_ahead(struct run *r, struct drawn *d)
{
    int32_t tokens[MAX_ROWS];
    struct model_seq seqs[N_DRAWERS];
    struct step_draw draws[N_DRAWERS];
    struct error err;
    for (int slot = 0; slot < N_DRAWERS; slot++) {
        const struct sampling_params p = params_of(slot);
        model_reset(r->model, slot);
        if (model_admit(r->model, slot, &p, &err))
            fail_msg("%s: %s", r->label, err.text);
    }
    for (int step = 0; step < N_STEPS; step++) {
        if (step >= 2)
            collect(r, d, step - 2);
        plan(d, step, false, tokens, seqs);
        for (int slot = 0; slot < N_DRAWERS; slot++)
            draws[slot] = (struct step_draw){.logit_row = slot,
                                             .slot = slot,
                                             .position = (uint64_t)(PROMPT + slot + step),
                                             .n_output = step};
        if (model_queue(r->model, tokens, seqs, N_DRAWERS, draws, N_DRAWERS, NULL, 0, &err))
            fail_msg("%s: %s", r->label, err.text);
    }
    collect(r, d, N_STEPS - 2);
    collect(r, d, N_STEPS - 1);
}

/* Whether the host's draw and the device's lie side by side, with less than 1e-6 between them,
 * or the device's token is just behind a cut-off. */
static bool near_boundary(struct sampler *s, int slot, const float *logits,
                          const struct sampling_params *p, int64_t n_output, int32_t host,
                          int32_t device, int32_t vocab_size)
{
    double *probs = calloc((size_t)vocab_size, sizeof(*probs)), between = 0;
    assert_non_null(probs);
    sampler_distribution(s, slot, logits, p, n_output, probs);
    for (int32_t t = (host < device ? host : device) + 1; t < (host > device ? host : device); t++)
        between += probs[t];
    const bool near = probs[device] == 0 || between < 1e-6;
    free(probs);
    return near;
}

static void check_logprobs(const struct run *r, const char *what, const struct sampled *found,
                           const struct sampled *expected)
{
    if (isnan(expected->logprob) != isnan(found->logprob) ||
        fabsf(expected->logprob - found->logprob) > 1e-4f || expected->n_top != found->n_top)
        fail_msg("%s: %s: logprob %g with %d others, expected %g with %d", r->label, what,
                 found->logprob, found->n_top, expected->logprob, expected->n_top);
    for (int i = 0; i < expected->n_top; i++)
        if (fabsf(expected->top[i].logprob - found->top[i].logprob) > 1e-4f)
            fail_msg("%s: %s: top logprob %d is %g, expected %g", r->label, what, i,
                     found->top[i].logprob, expected->top[i].logprob);
}

/* The device's token against the host's on the same logits; counts and lists what differs. */
static bool same_draw(struct run *r, struct sampler *s, int slot, int step, const float *logits,
                      const struct sampled *found)
{
    const struct sampling_params p = params_of(slot);
    struct sampled expected;
    sampler_draw(s, slot, logits, &p, (uint64_t)(PROMPT + slot + step), step, &expected);
    if (expected.token == found->token) {
        if (p.n_logprobs >= 0)
            check_logprobs(r, "a draw", found, &expected);
        return true;
    }
    print_message("%s: slot %d, step %d: drew %d, the host %d\n", r->label, slot, step,
                  found->token, expected.token);
    if (!near_boundary(s, slot, logits, &p, step, expected.token, found->token, r->vocab_size))
        fail_msg("and no boundary is near");
    return false;
}

/* Feed the drawn tokens again, known this time, and draw from the logits on the host. */
static int count_differences(struct run *r, const struct drawn *d)
{
    struct sampler *sampler = NULL;
    const int32_t eos = 0;
    int n_different = 0;
    struct error err;
    assert_int_equal(sampler_open(&sampler, N_DRAWERS, r->vocab_size, &eos, 1, &err), STATUS_OK);
    for (int slot = 0; slot < N_DRAWERS; slot++) {
        model_reset(r->model, slot);
        for (int i = 0; i < PROMPT + slot; i++)
            sampler_note(sampler, slot, d->prompts[slot][i], false);
    }
    for (int step = 0; step < N_STEPS; step++) {
        int32_t tokens[MAX_ROWS];
        struct model_seq seqs[N_DRAWERS];
        const float *logits = NULL;
        plan(d, step, true, tokens, seqs);
        if (model_step(r->model, tokens, seqs, N_DRAWERS, &logits, &err))
            fail_msg("%s: %s", r->label, err.text);
        for (int slot = 0; slot < N_DRAWERS; slot++) {
            const struct sampled *found = &d->all[step][slot];
            n_different += !same_draw(r, sampler, slot, step,
                                      logits + (size_t)slot * (size_t)r->vocab_size, found);
            sampler_note(sampler, slot, found->token, true);
        }
    }
    sampler_close(sampler);
    return n_different;
}

static void check_draws(const char *name, const char *dir)
{
    static struct drawn d;
    struct run r;
    open_run(&r, dir, DTYPE_BF16, false);
    if (!model_depth(r.model))
        fail_msg("%s: the device does not draw", name);
    assert_int_equal(model_depth(r.model), 2);
    seed_of_run = 5;
    for (int slot = 0; slot < N_DRAWERS; slot++)
        for (int i = 0; i < PROMPT + slot; i++)
            d.prompts[slot][i] = random_below(r.vocab_size);
    for (int round = 0; round < 2; round++) { /* the second one's steps are replayed */
        draw_ahead(&r, &d);
        const int n = count_differences(&r, &d);
        print_message("%s: %d of %d draws differ from the host's\n", name, n, N_STEPS * N_DRAWERS);
        assert_true(n <= N_STEPS * N_DRAWERS / 100);
    }
    run_close(&r);
}

static void test_draws_equal_the_hosts(void **state)
{
    (void)state;
    for_wide(check_draws);
}

/* Logits that a draw caps as it reads them, and that the host is given capped. */
static void test_draws_from_capped_logits(void **state)
{
    (void)state;
    int n = 0;
    for (size_t i = 0; i < n_test_models; i++) {
        char dir[200];
        if (strcmp(test_models[i].name, "gemma-macchiato"))
            continue;
        cuda_model_make(&test_models[i], 91, dir, sizeof(dir));
        check_draws(test_models[i].name, dir);
        test_dir_remove(dir);
        n++;
    }
    assert_int_equal(n, 1);
}

/* Every row of a prompt scored, beside a session that draws. */
static void check_scores(const char *name, const char *dir)
{
    enum { N = 12, N_TOP = 4 };
    struct run r;
    struct sampler *sampler = NULL;
    struct error err;
    int32_t tokens[N + 1];
    const struct model_seq seqs[] = {{2, N, LOGITS_ALL}, {5, 1, LOGITS_LAST}};
    struct step_score scores[N];
    const struct step_draw draw = {.logit_row = N, .slot = 5, .position = 1};
    struct sampled found[N + 1], expected;
    const struct sampled *results = NULL;
    const float *logits = NULL;
    struct sampling_params greedy;
    open_run(&r, dir, DTYPE_BF16, false);
    assert_int_equal(sampler_open(&sampler, 1, r.vocab_size, NULL, 0, &err), STATUS_OK);
    sampling_params_init(&greedy);
    greedy.temperature = 0;
    for (int i = 0; i <= N; i++)
        tokens[i] = random_below(r.vocab_size);
    for (int i = 0; i < N; i++)
        scores[i] = (struct step_score){.logit_row = i, .target = tokens[i + 1], .n_top = N_TOP};
    if (model_admit(r.model, 5, &greedy, &err) ||
        model_queue(r.model, tokens, seqs, 2, &draw, 1, scores, N, &err) ||
        model_collect(r.model, &results, &err))
        fail_msg("%s: %s", name, err.text);
    memcpy(found, results, sizeof(found));
    model_reset(r.model, 2);
    model_reset(r.model, 5);
    if (model_step(r.model, tokens, seqs, 2, &logits, &err))
        fail_msg("%s: %s", name, err.text);
    sampler_draw(sampler, 0, logits + (size_t)N * (size_t)r.vocab_size, &greedy, 1, 0, &expected);
    assert_int_equal(found[0].token, expected.token); /* draws come first */
    for (int i = 0; i < N; i++) {
        sampler_score(sampler, logits + (size_t)i * (size_t)r.vocab_size, tokens[i + 1], N_TOP,
                      &expected);
        assert_int_equal(found[i + 1].token, expected.token);
        check_logprobs(&r, "a score", &found[i + 1], &expected);
    }
    sampler_close(sampler);
    run_close(&r);
}

static void test_scores_equal_the_hosts(void **state)
{
    (void)state;
    for_wide(check_scores);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_order_changes_nothing_at_one_batch_size),
        cmocka_unit_test(test_order_at_any_batch_size),
        cmocka_unit_test(test_deterministic_decoding_is_bit_equal),
        cmocka_unit_test(test_deterministic_beside_prompts_is_bit_equal),
        cmocka_unit_test(test_draws_equal_the_hosts),
        cmocka_unit_test(test_draws_from_capped_logits),
        cmocka_unit_test(test_scores_equal_the_hosts),
    };
    RUN_CUDA_TESTS(tests);
}
