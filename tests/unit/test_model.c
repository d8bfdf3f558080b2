/* test_model.c - steps, slots and states: what must hold whatever the numbers are.
 *
 * The numbers themselves are test_model_golden.c's. Here the oracle is the model fed one token
 * at a time, alone in a fresh slot; chunks, neighbours, threads, copies and used slots must give
 * the same. Where two forms of one sum are compared the tolerance says so, all else is bit-equal.
 */
#include "tests/unit/unit.h"

#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "engine/state.h"
#include "tests/unit/model_files.h"
#include "tests/unit/model_run.h"

/* Chunked sums against token by token: float32 in another order, amplified by a few layers. */
#define CHUNK_TOLERANCE 1e-4
#define CHUNK_STATE_TOLERANCE 5e-4

enum { N_TOKENS = 60, N_SLOTS = 5 };

static uint64_t seed_of_run = 20260;

static int random_below(int n)
{
    seed_of_run = seed_of_run * 6364136223846793005u + 1442695040888963407u;
    return (int)((seed_of_run >> 33) % (uint64_t)n);
}

static void fill_tokens(int32_t *tokens, int n, int32_t vocab_size)
{
    for (int i = 0; i < n; i++)
        tokens[i] = random_below(vocab_size);
}

static float *new_logits(const struct run *r, int n_rows)
{
    float *logits = calloc((size_t)n_rows * (size_t)r->vocab_size, sizeof(*logits));
    assert_non_null(logits);
    return logits;
}

static void assert_same_bits(const struct run *r, const char *what, const float *a, const float *b,
                             size_t n)
{
    if (memcmp(a, b, n * sizeof(*a)) != 0)
        fail_msg("%s: %s: not bit-equal (difference %g)", r->label, what, run_difference(a, b, n));
}

static void assert_same_state(struct run *r, const char *what, int slot_a, int slot_b)
{
    size_t n;
    float *a = run_state(r, slot_a, &n), *b = run_state(r, slot_b, &n);
    assert_same_bits(r, what, a, b, n);
    assert_int_equal(model_position(r->model, slot_a), model_position(r->model, slot_b));
    free(a);
    free(b);
}

static bool has_device(void)
{
    for (const char *const *backend = run_backends(); *backend; backend++)
        if (!strcmp(*backend, "cuda"))
            return true;
    return false;
}

/* Run a check on every golden model and backend. */
static void for_all_models(void (*check)(struct run *r, const char *dir))
{
    struct run_models models;
    run_list_models(&models);
    assert_true(models.n > 0);
    for (const char *const *backend = run_backends(); *backend; backend++)
        for (int i = 0; i < models.n; i++) {
            struct run r;
            if (run_skips(*backend, models.dirs[i]))
                continue;
            run_open(&r, models.dirs[i], &(struct run_options){*backend, 2, DTYPE_F32, N_SLOTS});
            check(&r, models.dirs[i]);
            run_close(&r);
        }
}

/* ---- chunks ---- */

/* Feed in chunks of random sizes, some of them single rows; all logits. */
static void feed_in_chunks(struct run *r, int slot, const int32_t *tokens, int n, float *logits)
{
    for (int at = 0, rows; at < n; at += rows) {
        rows = 1 + random_below(random_below(3) ? n - at : 3);
        rows = rows < n - at ? rows : n - at;
        run_feed(r, slot, tokens + at, rows, LOGITS_ALL,
                 logits + (size_t)at * (size_t)r->vocab_size);
    }
}

static void check_chunks(struct run *r, const char *dir)
{
    (void)dir;
    int32_t tokens[N_TOKENS];
    const size_t V = (size_t)r->vocab_size;
    size_t n;
    float *one = new_logits(r, N_TOKENS), *many = new_logits(r, N_TOKENS);
    fill_tokens(tokens, N_TOKENS, r->vocab_size);
    for (int i = 0; i < N_TOKENS; i++)
        run_feed(r, 0, tokens + i, 1, LOGITS_LAST, one + (size_t)i * V);
    float *expected = run_state(r, 0, &n);

    const int n_trials = strcmp(model_backend_name(r->model), "cuda") ? 4 : 2;
    for (int trial = 0; trial < n_trials; trial++) {
        const uint64_t seed = seed_of_run;
        model_reset(r->model, 1);
        feed_in_chunks(r, 1, tokens, N_TOKENS, many);
        float *state = run_state(r, 1, &n);
        double difference = run_difference(many, one, N_TOKENS * V);
        double excess = run_state_excess(r, state, expected, CHUNK_STATE_TOLERANCE);
        if (!(difference <= CHUNK_TOLERANCE) || !(excess <= 1))
            fail_msg("%s: chunks of seed %llu: logits differ by %g, the state by %g tolerances",
                     r->label, (unsigned long long)seed, difference, excess);
        free(state);
    }
    free(expected);
    free(one);
    free(many);
}

static void test_chunks_equal_single_tokens(void **state)
{
    (void)state;
    print_message("seed %llu\n", (unsigned long long)seed_of_run);
    for_all_models(check_chunks);
}

/* The logits of a chunk's last row, alone and among all rows: another shape of the same product. */
static void check_last(struct run *r, const char *dir)
{
    (void)dir;
    int32_t tokens[20];
    float *all = new_logits(r, 20), *last = new_logits(r, 1);
    fill_tokens(tokens, 20, r->vocab_size);
    run_feed(r, 0, tokens, 20, LOGITS_ALL, all);
    for (int n = 1; n <= 20; n++) {
        model_reset(r->model, 1);
        run_feed(r, 1, tokens, n, LOGITS_LAST, last);
        double difference = run_difference(all + (size_t)(n - 1) * (size_t)r->vocab_size, last,
                                           (size_t)r->vocab_size);
        if (!(difference <= CHUNK_TOLERANCE))
            fail_msg("%s: the last of %d rows differs by %g", r->label, n, difference);
    }
    free(all);
    free(last);
}

static void test_last_equals_all(void **state)
{
    (void)state;
    for_all_models(check_last);
}

/* ---- neighbours ---- */

/* What each of the sequences brings to the steps of the test: prompts, then single rows. */
enum { N_SEQS = 4, N_STEPS = 5 };
static const int rows_of[N_SEQS][N_STEPS] = {
    {17, 1, 1, 1, 9},
    {1, 1, 1, 1, 1},
    {30, 2, 1, 1, 1},
    {3, 11, 4, 1, 1},
};

struct scene {
    int32_t tokens[N_SEQS][64];
    float *logits[N_SEQS]; /* [sum of rows, V] alone, one thread */
    float *state[N_SEQS];
    size_t n_state;
};

static int n_rows_until(int seq, int step)
{
    int n = 0;
    for (int i = 0; i < step; i++)
        n += rows_of[seq][i];
    return n;
}

static void play_alone(struct run *r, struct scene *s)
{
    for (int q = 0; q < N_SEQS; q++) {
        s->logits[q] = new_logits(r, n_rows_until(q, N_STEPS));
        fill_tokens(s->tokens[q], 64, r->vocab_size);
        model_reset(r->model, 0);
        for (int step = 0; step < N_STEPS; step++) {
            int at = n_rows_until(q, step);
            run_feed(r, 0, s->tokens[q] + at, rows_of[q][step], LOGITS_ALL,
                     s->logits[q] + (size_t)at * (size_t)r->vocab_size);
        }
        s->state[q] = run_state(r, 0, &s->n_state);
    }
}

static void shuffle(int *items, int n)
{
    for (int i = n - 1; i > 0; i--) {
        int j = random_below(i + 1), item = items[i];
        items[i] = items[j];
        items[j] = item;
    }
}

/* One step of all sequences in a random order; compare every row's logits. */
static void play_step_together(struct run *r, const struct scene *s, const int *slots, int step)
{
    int order[N_SEQS] = {0, 1, 2, 3}, n_rows = 0;
    int32_t tokens[RUN_MAX_ROWS];
    struct model_seq seqs[N_SEQS];
    const size_t V = (size_t)r->vocab_size;
    const float *logits = NULL;
    struct error err;
    shuffle(order, N_SEQS);
    for (int i = 0; i < N_SEQS; i++) {
        const int q = order[i], n = rows_of[q][step];
        seqs[i] = (struct model_seq){slots[q], n, LOGITS_ALL};
        memcpy(tokens + n_rows, s->tokens[q] + n_rows_until(q, step), (size_t)n * sizeof(*tokens));
        n_rows += n;
    }
    if (model_step(r->model, tokens, seqs, N_SEQS, &logits, &err))
        fail_msg("%s: %s", r->label, err.text);
    for (int i = 0; i < N_SEQS; i++) {
        const int q = order[i];
        const size_t n = (size_t)rows_of[q][step] * V;
        assert_same_bits(r, "logits beside others", logits,
                         s->logits[q] + (size_t)n_rows_until(q, step) * V, n);
        logits += n;
    }
}

static void play_together(struct run *r, const struct scene *s)
{
    int slots[N_SLOTS] = {0, 1, 2, 3, 4};
    shuffle(slots, N_SLOTS);
    for (int q = 0; q < N_SEQS; q++)
        model_reset(r->model, slots[q]);
    for (int step = 0; step < N_STEPS; step++)
        play_step_together(r, s, slots, step);
    for (int q = 0; q < N_SEQS; q++) {
        size_t n;
        float *state = run_state(r, slots[q], &n);
        assert_same_bits(r, "the state beside others", state, s->state[q], n);
        free(state);
    }
}

/* A GPU promises this when it is asked to be deterministic; it has no threads to vary. */
static void check_neighbours(const char *dir, const char *backend, enum dtype dtype)
{
    struct scene scene;
    struct run alone;
    struct run_options options = {backend, 1, dtype, N_SLOTS};
    const struct run_form form = {.window_dtype = DTYPE_F32, .deterministic = true};
    run_open_as(&alone, dir, &options, &form);
    play_alone(&alone, &scene);
    run_close(&alone);
    const int most = strcmp(backend, "cuda") ? 3 : 1;
    for (options.n_threads = 1; options.n_threads <= most; options.n_threads++) {
        struct run r;
        run_open_as(&r, dir, &options, &form);
        play_together(&r, &scene);
        play_together(&r, &scene); /* used slots, another order */
        run_close(&r);
    }
    for (int q = 0; q < N_SEQS; q++) {
        free(scene.logits[q]);
        free(scene.state[q]);
    }
}

static void test_neighbours_change_nothing(void **state)
{
    (void)state;
    struct run_models models;
    run_list_models(&models);
    for (int i = 0; i < models.n; i++)
        for (const char *const *backend = run_backends(); *backend; backend++) {
            if (run_skips(*backend, models.dirs[i]))
                continue;
            check_neighbours(models.dirs[i], *backend, DTYPE_F32);
            check_neighbours(models.dirs[i], *backend, DTYPE_BF16);
        }
}

/* ---- slots ---- */

static void check_copy(struct run *r, const char *dir)
{
    (void)dir;
    int32_t tokens[30], others[30];
    float *a = new_logits(r, 30), *b = new_logits(r, 30);
    const size_t V = (size_t)r->vocab_size;
    struct error err;
    fill_tokens(tokens, 30, r->vocab_size);
    fill_tokens(others, 30, r->vocab_size);
    run_feed(r, 0, tokens, 20, LOGITS_NONE, NULL);
    run_feed(r, 3, others, 30, LOGITS_NONE, NULL); /* dst holds something else */
    assert_int_equal(model_copy(r->model, 3, 0, &err), STATUS_OK);
    assert_same_state(r, "a copy", 0, 3);

    run_feed(r, 3, others, 10, LOGITS_NONE, NULL); /* the child goes its own way */
    assert_int_equal(model_position(r->model, 0), 20);
    assert_int_equal(model_copy(r->model, 2, 0, &err), STATUS_OK);
    run_feed(r, 0, tokens + 20, 10, LOGITS_ALL, a);
    run_feed(r, 2, tokens + 20, 10, LOGITS_ALL, b);
    assert_same_bits(r, "logits after a copy", a, b, 10 * V);
    assert_same_state(r, "states after a copy", 0, 2);
    assert_int_equal(model_copy(r->model, 2, 2, &err), STATUS_OK);
    free(a);
    free(b);
}

static void test_copy_forks(void **state)
{
    (void)state;
    for_all_models(check_copy);
}

/* Write NaN over a slot's whole state. */
static void poison(struct run *r, int slot)
{
    struct error err;
    for (int i = 0; i < model_n_state_tensors(r->model); i++) {
        const int64_t n = model_state_tensor(r->model, i)->n_values;
        float *garbage = malloc((size_t)n * sizeof(*garbage));
        assert_non_null(garbage);
        for (int64_t j = 0; j < n; j++)
            garbage[j] = NAN;
        assert_int_equal(model_state_write(r->model, slot, i, garbage, &err), STATUS_OK);
        free(garbage);
    }
}

/* ---- whole slots ---- */

static void begin_save(struct run *r, int slot)
{
    struct error err;
    if (model_begin_save(r->model, slot, &err))
        fail_msg("%s: %s", r->label, err.text);
}

/* The oldest save, polled or waited for; the caller frees the values [n]. */
static float *finish_save(struct run *r, bool polls, size_t n)
{
    float *values = malloc(n * sizeof(*values));
    struct error err;
    bool done = false;
    assert_non_null(values);
    for (int i = 0; !done; i++) {
        assert_true(i < 1000000 && (polls || !i));
        if (model_finish_save(r->model, !polls, values, &done, &err))
            fail_msg("%s: %s", r->label, err.text);
    }
    return values;
}

/* A state is the same whether a slot is read as a whole or tensor by tensor, and goes on bit for
 * bit in another slot, into which it was loaded as a whole; steps of others go on meanwhile. */
static void check_whole_slots(struct run *r, const char *dir)
{
    (void)dir;
    enum { N = 30, LATER = 3, OTHER = N_SLOTS - 1 };
    const int longest = run_emulated() ? N / 2 : N;
    const int lengths[OTHER] = {longest, 1, 7, 0}; /* the last one's slot was another's */
    int32_t tokens[N + LATER];
    float *saved[OTHER], *a = new_logits(r, LATER), *b = new_logits(r, LATER);
    size_t n;
    struct error err;
    fill_tokens(tokens, N + LATER, r->vocab_size);
    run_feed(r, OTHER - 1, tokens, longest, LOGITS_NONE, NULL);
    model_reset(r->model, OTHER - 1);
    for (int slot = 0; slot < OTHER; slot++)
        if (lengths[slot])
            run_feed(r, slot, tokens, lengths[slot], LOGITS_NONE, NULL);
    const int most = model_max_saves(r->model);
    assert_true(most >= 1);
    free(run_state(r, 0, &n));
    for (int slot = 0, next = 0; slot < OTHER; slot++) {
        while (next < OTHER && next < slot + most)
            begin_save(r, next++);
        run_feed(r, OTHER, tokens + slot, 1, LOGITS_NONE, NULL);
        saved[slot] = finish_save(r, slot % 2, n);
    }
    for (int slot = 0; slot < OTHER; slot++) {
        float *expected = run_state(r, slot, &n);
        assert_same_bits(r, "a slot as a whole", saved[slot], expected, n);
        free(expected);
    }
    for (int slot = 0; slot < OTHER; slot++) {
        const uint64_t position = model_position(r->model, slot);
        assert_int_equal(position, lengths[slot]);
        poison(r, OTHER);
        if (model_load(r->model, OTHER, saved[slot], position, &err))
            fail_msg("%s: %s", r->label, err.text);
        begin_save(r, OTHER); /* without a step between */
        float *again = finish_save(r, false, n);
        assert_same_bits(r, "a slot that was loaded", again, saved[slot], n);
        assert_int_equal(model_position(r->model, OTHER), position);
        run_feed(r, slot, tokens + N, LATER, LOGITS_ALL, a);
        run_feed(r, OTHER, tokens + N, LATER, LOGITS_ALL, b);
        assert_same_bits(r, "logits after a load", a, b, LATER * (size_t)r->vocab_size);
        assert_same_state(r, "the state after a load", slot, OTHER);
        free(again);
        free(saved[slot]);
    }
    free(a);
    free(b);
}

static void test_whole_slots(void **state)
{
    (void)state;
    static const enum dtype narrow[] = {DTYPE_BF16, DTYPE_F8_E4M3};
    struct run_models models;
    for_all_models(check_whole_slots);
    run_list_models(&models);
    for (int i = 0; i < 2 * models.n; i += run_emulated() ? 3 : 1) { /* two models of three there */
        const struct run_form form = {.window_dtype = narrow[i % 2]};
        const struct run_options options = {"cuda", 2, DTYPE_F32, N_SLOTS};
        struct run r;
        if (!has_device() || run_skips("cuda", models.dirs[i / 2]))
            continue;
        run_open_as(&r, models.dirs[i / 2], &options, &form);
        check_whole_slots(&r, NULL);
        run_close(&r);
    }
}

/* ---- used slots ---- */

/* -inf maxima, and zero for the rest. */
static void check_initial(struct run *r, int slot)
{
    struct error err;
    for (int i = 0; i < model_n_state_tensors(r->model); i++) {
        const struct state_tensor *t = model_state_tensor(r->model, i);
        float *values = malloc((size_t)t->n_values * sizeof(*values));
        assert_non_null(values);
        assert_int_equal(model_state_read(r->model, slot, i, values, &err), STATUS_OK);
        const float expected = strstr(t->name, "latent_m") ? -INFINITY : 0;
        for (int64_t j = 0; j < t->n_values; j++)
            if (values[j] != expected)
                fail_msg("%s: %s[%lld] is %g after reset", r->label, t->name, (long long)j,
                         values[j]);
        free(values);
    }
}

static void check_reset(struct run *r, const char *dir)
{
    (void)dir;
    int32_t tokens[24];
    float *fresh = new_logits(r, 24), *used = new_logits(r, 24);
    const size_t V = (size_t)r->vocab_size;
    fill_tokens(tokens, 24, r->vocab_size);
    check_initial(r, 0);
    const int chunks[] = {1, 2, 20, 1};
    for (int slot = 0; slot < 2; slot++) {
        if (slot == 1) {
            run_feed(r, 1, tokens, 24, LOGITS_NONE, NULL);
            poison(r, 1);
            model_reset(r->model, 1);
            check_initial(r, 1);
        }
        for (int i = 0, at = 0; i < 4; at += chunks[i++]) {
            run_feed(r, slot, tokens + at, chunks[i], LOGITS_ALL,
                     (slot ? used : fresh) + (size_t)at * V);
            if (slot == 1 && i < 2) { /* an earlier session's rows must not show */
                size_t n;
                float *values = run_state(r, 1, &n);
                assert_true(run_difference(values, values, n) == 0);
                free(values);
            }
        }
    }
    assert_same_bits(r, "logits in a used slot", used, fresh, 24 * V);
    assert_same_state(r, "the state of a used slot", 1, 0);
    free(fresh);
    free(used);
}

static void test_reset_after_garbage(void **state)
{
    (void)state;
    for_all_models(check_reset);
}

/* A state read out of one model and written into another goes on bit for bit. */
static void check_transfer(struct run *r, const char *dir)
{
    int32_t tokens[30];
    struct run other;
    struct error err;
    float *a = new_logits(r, 10), *b = new_logits(r, 10);
    fill_tokens(tokens, 30, r->vocab_size);
    run_open(&other, dir,
             &(struct run_options){model_backend_name(r->model), 2, DTYPE_F32, N_SLOTS});
    run_feed(r, 0, tokens, 20, LOGITS_NONE, NULL);
    size_t n, at = 0;
    float *values = run_state(r, 0, &n);
    for (int i = 0; i < model_n_state_tensors(r->model); i++) {
        assert_int_equal(model_state_write(other.model, 4, i, values + at, &err), STATUS_OK);
        at += (size_t)model_state_tensor(r->model, i)->n_values;
    }
    model_set_position(other.model, 4, model_position(r->model, 0));
    run_feed(r, 0, tokens + 20, 10, LOGITS_ALL, a);
    run_feed(&other, 4, tokens + 20, 10, LOGITS_ALL, b);
    assert_same_bits(r, "logits after a move", a, b, 10 * (size_t)r->vocab_size);
    free(values);
    free(a);
    free(b);
    run_close(&other);
}

static void test_state_moves_between_models(void **state)
{
    (void)state;
    for_all_models(check_transfer);
}

/* ---- facts and refusals ---- */

static void test_state_tensors_of_macchiato(void **state)
{
    (void)state;
    static const struct {
        const char *name;
        int n_dims;
        int64_t shape[3];
    } expected[] = {
        {"layers.0.latent_m", 2, {4, 4, 0}}, {"layers.0.latent_alpha", 2, {4, 4, 0}},
        {"layers.0.latent_s", 3, {4, 4, 8}}, {"layers.0.ring_k", 3, {4, 8, 8}},
        {"layers.0.ring_v", 3, {4, 8, 8}},   {"layers.0.rglru", 1, {32, 0, 0}},
        {"layers.1.latent_m", 2, {4, 4, 0}}, {"layers.1.latent_alpha", 2, {4, 4, 0}},
        {"layers.1.latent_s", 3, {4, 4, 8}}, {"layers.1.ring_k", 3, {4, 8, 8}},
        {"layers.1.ring_v", 3, {4, 8, 8}},   {"layers.1.rglru", 1, {32, 0, 0}},
    };
    struct run r;
    size_t n_values = 0;
    run_open(&r, "tests/golden/models/macchiato",
             &(struct run_options){"ref", 1, DTYPE_F32, N_SLOTS});
    assert_int_equal(model_n_state_tensors(r.model), COUNT_OF(expected));
    for (size_t i = 0; i < COUNT_OF(expected); i++) {
        const struct state_tensor *t = model_state_tensor(r.model, (int)i);
        assert_string_equal(t->name, expected[i].name);
        assert_int_equal(t->n_dims, expected[i].n_dims);
        for (int d = 0; d < t->n_dims; d++)
            assert_int_equal(t->shape[d], expected[i].shape[d]);
        n_values += (size_t)t->n_values;
    }
    assert_int_equal(model_state_bytes(r.model), n_values * 4);
    assert_int_equal(model_max_position(r.model), 0);
    run_close(&r);
}

static void test_no_logits_wanted(void **state)
{
    (void)state;
    struct run r;
    run_open(&r, "tests/golden/models/macchiato",
             &(struct run_options){"ref", 1, DTYPE_F32, N_SLOTS});
    const int32_t tokens[] = {3, 1, 4, 1, 5};
    const struct model_seq seq = {1, 5, LOGITS_NONE};
    const float *logits = &(float){0};
    struct error err;
    assert_int_equal(model_step(r.model, tokens, &seq, 1, &logits, &err), STATUS_OK);
    assert_null(logits);
    run_feed(&r, 0, tokens, 5, LOGITS_ALL, NULL);
    assert_same_state(&r, "without logits", 1, 0);
    run_close(&r);
}

#define ENCODER                                                                                    \
    "{\"model_type\":\"latte\",\"architectures\":[\"%s\"],\"vocab_size\":20,\"hidden_size\":16,"   \
    "\"num_hidden_layers\":1,\"intermediate_size\":16,\"num_attention_heads\":2,"                  \
    "\"num_latents\":4,\"layer_type\":\"latte\",\"norm\":\"rmsnorm\",\"mlp\":\"gated\"%s}"

static void test_encoders_are_refused(void **state)
{
    (void)state;
    static const struct {
        const char *architecture, *keys;
    } cases[] = {
        {"LatteForSequenceClassification", ",\"num_labels\":2"},
        {"LatteModel", ",\"bidirectional\":true"},
    };
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        char dir[200], config[600];
        struct checkpoint *c = NULL;
        struct backend *backend = NULL;
        struct model *m = NULL;
        struct error err;
        const struct model_options options = {1, 4, 0, DTYPE_F32, DTYPE_F32};
        struct backend_options bo = {.n_threads = 1};
        assert_int_equal(test_dir_make(dir, sizeof(dir)), 0);
        snprintf(config, sizeof(config), ENCODER, cases[i].architecture, cases[i].keys);
        assert_int_equal(model_files_write(dir, config, 1, NULL), 0);
        if (checkpoint_open(&c, dir, NULL, NULL, &err))
            fail_msg("%s", err.text);
        model_backend_options(&c->config, &options, &bo);
        assert_int_equal(backend_ref_open(&backend, &bo, &err), STATUS_OK);
        assert_int_equal(model_open(&m, c, backend, &options, NULL, NULL, &err),
                         STATUS_UNSUPPORTED);
        assert_null(m);
        checkpoint_close(c);
        test_dir_remove(dir);
    }
}

/* ---- memory that runs out ---- */

static const struct backend_ops *real_ops;
static int calls_left;

static enum status scarce_buffer(struct backend *b, struct buffer **out, size_t n_bytes,
                                 struct error *err)
{
    if (calls_left-- == 0)
        return fail(err, STATUS_NOMEM, "no device memory");
    return real_ops->buffer_open(b, out, n_bytes, err);
}

static enum status scarce_linear(struct backend *b, struct linear *out, const void *src,
                                 enum dtype src_dtype, struct error *err)
{
    if (calls_left-- == 0)
        return fail(err, STATUS_NOMEM, "no device memory");
    return real_ops->linear_open(b, out, src, src_dtype, err);
}

/* Open a model on a backend whose n-th allocation fails. */
static enum status open_scarce(struct model **out, const struct checkpoint *c, int n,
                               struct error *err)
{
    static struct backend_ops scarce;
    const struct model_options options = {2, 8, 0, DTYPE_F32, DTYPE_F32};
    struct backend_options bo = {.n_threads = 1};
    struct backend *backend = NULL;
    model_backend_options(&c->config, &options, &bo);
    assert_int_equal(backend_ref_open(&backend, &bo, err), STATUS_OK);
    real_ops = backend->ops;
    scarce = *real_ops;
    scarce.buffer_open = scarce_buffer;
    scarce.linear_open = scarce_linear;
    backend->ops = &scarce;
    calls_left = n;
    return model_open(out, c, backend, &options, NULL, NULL, err);
}

static void test_every_allocation_may_fail(void **state)
{
    (void)state;
    struct checkpoint *c = NULL;
    struct error err;
    if (checkpoint_open(&c, "tests/golden/models/no-final-norm", NULL, NULL, &err))
        fail_msg("%s", err.text);
    int n = 0;
    for (enum status st = STATUS_NOMEM; st; n++) {
        struct model *m = NULL;
        st = open_scarce(&m, c, n, &err);
        assert_true(st == STATUS_OK || st == STATUS_NOMEM);
        if (st) {
            assert_null(m);
            assert_non_null(strstr(err.text, "bytes"));
            assert_non_null(strstr(err.text, "no device memory"));
        }
        model_close(m);
    }
    assert_true(n > 60); /* slabs, scratch and tensors of two layers */
    checkpoint_close(c);
}

/* Products that leave int64 (the shape) or size_t (the bytes of all slots) are refused before
 * anything is allocated. */
static void test_sizes_that_overflow(void **state)
{
    (void)state;
    static const struct {
        int64_t ring_rows;
        const char *says;
    } cases[] = {
        {INT64_MAX / 16, "the shape of layers.0.ring_k overflows"},
        {(int64_t)1 << 50, "1024 slots of layers.0.ring_k"},
    };
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        struct layer_config layer = {.type = LAYER_FULL_ATTENTION};
        const struct model_config config = {.n_layers = 1,
                                            .n_heads = 4,
                                            .n_kv_heads = 4,
                                            .head_dim = 8,
                                            .max_position_embeddings = cases[i].ring_rows,
                                            .layers = &layer};
        struct backend *backend = NULL;
        struct state *slots = NULL;
        struct error err;
        const struct backend_options bo = {.n_threads = 1, .max_rows = 1, .max_seqs = 1};
        assert_int_equal(backend_ref_open(&backend, &bo, &err), STATUS_OK);
        assert_int_equal(state_open(&slots, &config, backend, 1024, DTYPE_F32, &err), STATUS_NOMEM);
        assert_non_null(strstr(err.text, cases[i].says));
        assert_null(slots);
        backend->ops->close(backend);
    }
}

struct progress {
    uint64_t done, total;
    int n_calls;
};

static void note_progress(void *context, uint64_t done, uint64_t total)
{
    struct progress *p = context;
    assert_true(done >= p->done && done <= total);
    *p = (struct progress){done, total, p->n_calls + 1};
}

/* How a child that feeds n tokens to slot 0 ends: its wait status. */
static int status_of_feeding(struct run *r, int n)
{
    int32_t tokens[RUN_MAX_ROWS] = {0};
    pid_t child = fork();
    if (child == 0) {
        fclose(stderr);
        run_feed(r, 0, tokens, n, LOGITS_NONE, NULL);
        _exit(0);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    return status;
}

/* A ring of full attention must not wrap: going past it is caught, from wherever one starts. */
static void test_position_limit_is_asserted(void **state)
{
    (void)state;
    enum { LIMIT = 32 };
    char dir[100];
    const char *config =
        "{\"vocab_size\":64,\"hidden_size\":16,\"num_hidden_layers\":1,\"intermediate_size\":24,"
        "\"num_attention_heads\":2,\"layer_type\":\"full_attention\","
        "\"max_position_embeddings\":32,\"norm\":\"rmsnorm\",\"mlp\":\"gated\"}";
    assert_int_equal(test_dir_make(dir, sizeof(dir)), 0);
    assert_int_equal(model_files_write(dir, config, 3, NULL), 0);
    struct run r;
    run_open(&r, dir, &(struct run_options){"ref", 1, DTYPE_F32, 1});
    assert_int_equal(model_max_position(r.model), LIMIT);
    for (int position = 0; position <= LIMIT; position += 8) {
        model_set_position(r.model, 0, (uint64_t)position);
        if (position < LIMIT)
            assert_true(WIFEXITED(status_of_feeding(&r, LIMIT - position)));
        int status = status_of_feeding(&r, LIMIT - position + 1);
        assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT);
        assert_true(WIFSIGNALED(status_of_feeding(&r, RUN_MAX_ROWS)));
    }
    run_close(&r);
    test_dir_remove(dir);
}

static void test_progress_reaches_the_end(void **state)
{
    (void)state;
    struct checkpoint *c = NULL;
    struct backend *backend = NULL;
    struct model *m = NULL;
    struct error err;
    struct progress p = {0};
    const struct model_options options = {1, 4, 0, DTYPE_BF16, DTYPE_F32};
    struct backend_options bo = {.n_threads = 1};
    if (checkpoint_open(&c, "tests/golden/models/latte-conv-swa-plus", NULL, NULL, &err))
        fail_msg("%s", err.text);
    model_backend_options(&c->config, &options, &bo);
    assert_int_equal(backend_ref_open(&backend, &bo, &err), STATUS_OK);
    assert_int_equal(model_open(&m, c, backend, &options, note_progress, &p, &err), STATUS_OK);
    assert_int_equal(p.done, p.total);
    assert_int_equal(p.total, safetensors_n_bytes(c->tensors));
    assert_int_equal(p.n_calls, safetensors_count(c->tensors));
    model_close(m);
    checkpoint_close(c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_chunks_equal_single_tokens),
        cmocka_unit_test(test_last_equals_all),
        cmocka_unit_test(test_neighbours_change_nothing),
        cmocka_unit_test(test_copy_forks),
        cmocka_unit_test(test_whole_slots),
        cmocka_unit_test(test_reset_after_garbage),
        cmocka_unit_test(test_state_moves_between_models),
        cmocka_unit_test(test_state_tensors_of_macchiato),
        cmocka_unit_test(test_no_logits_wanted),
        cmocka_unit_test(test_encoders_are_refused),
        cmocka_unit_test(test_every_allocation_may_fail),
        cmocka_unit_test(test_sizes_that_overflow),
        cmocka_unit_test(test_position_limit_is_asserted),
        cmocka_unit_test(test_progress_reaches_the_end),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
