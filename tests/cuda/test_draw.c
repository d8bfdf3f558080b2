/* test_draw.c - sampling on the device against sampler.c on equal logits: the same tokens, the
 * same alternatives, logprobs to 1e-5, whatever the options and the values of a row.
 *
 * The driver plays sessions of random requests: slots are admitted again and again, bring
 * prompts and drawn tokens in steps with others, draw or score or both; two steps are in flight.
 * sampler.c itself is tested in tests/unit/test_sampler.c against definitions from outside.
 */
#include "tests/unit/unit.h"

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/backend.h"

enum {
    N_SLOTS = 7,
    N_MANY = 600, /* more than admissions that may be under way */
    MAX_ROWS = 24,
    DEPTH = 2,
    EOS_A = 3,
    EOS_B = 11,
};

static uint64_t seed_of_run = 1;

static uint64_t random_bits(void)
{
    uint64_t z = seed_of_run += 0x9E3779B97F4A7C15;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
}

static int below(int n)
{
    return (int)(random_bits() % (uint64_t)n);
}

static float uniform(void)
{
    return (float)((double)(random_bits() >> 11) * 0x1p-53);
}

static float normal(void)
{
    double a = uniform(), b = uniform();
    return (float)(sqrt(-2 * log(1 - a)) * cos(6.283185307179586 * b));
}

#define PICK(...)                                                                                  \
    ((const float[]){                                                                              \
        __VA_ARGS__})[below((int)(sizeof((const float[]){__VA_ARGS__}) / sizeof(float)))]

/* ---- rows of logits ---- */

enum row_kind {
    ROW_NORMAL,
    ROW_WIDE,
    ROW_TIES,
    ROW_SPOILT, /* NaN and infinities among the values */
    ROW_BARE,   /* few tokens are possible */
    ROW_NONE,   /* none is */
    ROW_EQUAL,
    ROW_FLAT,
    ROW_HUGE,
    N_ROW_KINDS
};

static float one_logit(enum row_kind kind)
{
    const float x = normal();
    switch (kind) {
    case ROW_NORMAL:
        return 3 * x;
    case ROW_WIDE:
        return 15 * x;
    case ROW_TIES:
        return floorf(2 * x) / 2;
    case ROW_SPOILT:
        return below(20) ? 2 * x : PICK(NAN, -NAN, INFINITY, -INFINITY, -0.0f, 0, FLT_MAX);
    case ROW_BARE:
        return below(12) ? -INFINITY : x;
    case ROW_NONE:
        return below(2) ? -INFINITY : NAN;
    case ROW_EQUAL:
        return 1.25f;
    case ROW_FLAT:
        return 5 + 1e-3f * x;
    default:
        return below(9) ? 1e37f * x : PICK(FLT_MAX, -FLT_MAX, 1e-40f, -1e-40f);
    }
}

static void fill_row(float *logits, int n)
{
    const enum row_kind kind = below(3) ? ROW_NORMAL : (enum row_kind)below(N_ROW_KINDS);
    for (int i = 0; i < n; i++)
        logits[i] = one_logit(kind);
}

/* ---- requests ---- */

struct request {
    struct sampling_params params;
    struct logit_bias bias[SAMPLER_MAX_LOGIT_BIAS];
    int64_t position, n_output;
    int n_left; /* steps to live */
};

static void random_bias(struct request *r, int vocab_size)
{
    static const int sizes[] = {1, 3, 30, SAMPLER_MAX_LOGIT_BIAS};
    r->params.n_logit_bias = sizes[below(4)];
    r->params.logit_bias = r->bias;
    for (int i = 0; i < r->params.n_logit_bias; i++) {
        r->bias[i].token = below(vocab_size);
        r->bias[i].bias = below(8) ? 4 * normal() : PICK(-INFINITY, INFINITY, FLT_MAX, 0);
    }
    if (vocab_size <= SAMPLER_MAX_LOGIT_BIAS && below(6) == 0) { /* nothing is left */
        r->params.n_logit_bias = vocab_size;
        for (int i = 0; i < vocab_size; i++)
            r->bias[i] = (struct logit_bias){i, -INFINITY};
    }
}

static void random_filters(struct sampling_params *p, int vocab_size)
{
    const int k[] = {1, 2, 5, 40, 64, 200, 256, 257, 1000, vocab_size - 1, vocab_size, -1};
    if (below(2))
        p->top_k = k[below((int)COUNT_OF(k))];
    if (below(2))
        p->top_p = PICK(0.999f, 0.95f, 0.9f, 0.5f, 0.1f, 1e-6f);
    if (below(3) == 0)
        p->min_p = PICK(0.001f, 0.05f, 0.3f, 1);
    if (below(4) == 0)
        p->typical_p = PICK(0.99f, 0.9f, 0.5f, 0.1f, 1e-6f);
}

static void random_request(struct request *r, int vocab_size)
{
    struct sampling_params *p = &r->params;
    sampling_params_init(p);
    p->temperature = below(8) ? PICK(0, 1, 1, 0.7f, 1.7f) : PICK(1e-3f, 1e-39f, 3e38f, 50);
    random_filters(p, vocab_size);
    if (below(3) == 0) {
        p->repetition_penalty = PICK(1, 1.3f, 0.8f);
        p->presence_penalty = PICK(0, 0.7f, -0.4f);
        p->frequency_penalty = PICK(0, 0.3f, -0.2f);
    }
    if (below(4) == 0)
        random_bias(r, vocab_size);
    p->seed = random_bits();
    p->choice = (uint32_t)below(4);
    p->min_tokens = below(3) ? 0 : below(6);
    p->ignore_eos = below(2);
    p->n_stop_tokens = below(3) ? 0 : below(SAMPLER_MAX_STOP_TOKENS + 1);
    for (int i = 0; i < p->n_stop_tokens; i++)
        p->stop_tokens[i] = below(vocab_size);
    p->n_logprobs = below(2) ? -1 : below(SAMPLER_MAX_TOP_LOGPROBS + 1);
    r->position = below(2) ? 0 : (int64_t)(random_bits() >> 20);
    r->n_output = 0;
    r->n_left = 1 + below(9);
}

/* ---- the device and the host side by side ---- */

struct expected {
    int n;
    struct sampled results[2 * MAX_ROWS];
};

struct pair {
    struct backend *b;
    struct buffer *logits;
    struct sampler *host;
    int32_t vocab_size;
    float *rows; /* [MAX_ROWS, V] */
    struct request requests[N_SLOTS];
    struct expected expected[DEPTH];
    int n_queued, n_waited, n_results;
};

static void open_pair(struct pair *p, int32_t vocab_size, int n_slots, bool composed)
{
    static const int32_t eos[] = {EOS_A, EOS_B};
    static struct layer_config layer;
    const struct model_config config = {
        .vocab_size = vocab_size,
        .hidden_size = 16,
        .n_layers = 1,
        .intermediate_size = 16,
        .n_heads = 1,
        .n_kv_heads = 1,
        .head_dim = 16,
        .n_eos = 2,
        .eos_token_id = {EOS_A, EOS_B},
        .layers = &layer,
    };
    const struct backend_options options = {
        .n_threads = 1,
        .max_rows = MAX_ROWS,
        .max_seqs = MAX_ROWS,
        .max_dim = 16,
        .config = &config,
        .n_slots = n_slots,
        .max_logit_rows = MAX_ROWS,
        .composed = composed,
    };
    struct error err;
    const size_t n = (size_t)MAX_ROWS * (size_t)vocab_size;
    *p = (struct pair){.vocab_size = vocab_size, .rows = calloc(n, sizeof(float))};
    if (!p->rows || backend_cuda_open(&p->b, &options, &err) ||
        p->b->ops->buffer_open(p->b, &p->logits, n * sizeof(float), &err) ||
        sampler_open(&p->host, N_SLOTS, vocab_size, eos, 2, &err))
        fail_msg("%s", err.text);
}

static void close_pair(struct pair *p)
{
    p->b->ops->buffer_close(p->b, p->logits);
    p->b->ops->close(p->b);
    sampler_close(p->host);
    free(p->rows);
}

static bool same_logprob(float a, float b)
{
    if (isnan(b) || isinf(b))
        return isnan(b) ? isnan(a) : a == b;
    return fabsf(a - b) <= 1e-5f * fmaxf(1, fabsf(b));
}

static void check_sampled(const struct sampled *found, const struct sampled *right,
                          const char *what)
{
    if (found->token != right->token)
        fail_msg("%s: token %d, expected %d", what, found->token, right->token);
    if (!same_logprob(found->logprob, right->logprob))
        fail_msg("%s: logprob %.9g, expected %.9g", what, found->logprob, right->logprob);
    if (found->n_top != right->n_top)
        fail_msg("%s: %d alternatives, expected %d", what, found->n_top, right->n_top);
    for (int i = 0; i < right->n_top; i++)
        if (found->top[i].token != right->top[i].token ||
            !same_logprob(found->top[i].logprob, right->top[i].logprob))
            fail_msg("%s: alternative %d is %d at %.9g, expected %d at %.9g", what, i,
                     found->top[i].token, found->top[i].logprob, right->top[i].token,
                     right->top[i].logprob);
}

static void collect(struct pair *p)
{
    struct error err;
    const struct sampled *results = NULL;
    if (p->b->ops->wait(p->b, &results, &err))
        fail_msg("%s", err.text);
    const struct expected *e = &p->expected[p->n_waited++ % DEPTH];
    for (int i = 0; i < e->n; i++) {
        char what[80];
        snprintf(what, sizeof(what), "V %d, step %d, result %d of %d", p->vocab_size,
                 p->n_waited - 1, i, e->n);
        check_sampled(&results[i], &e->results[i], what);
    }
    p->n_results += e->n;
}

static void admit(struct pair *p, int slot)
{
    struct error err;
    struct request *r = &p->requests[slot];
    random_request(r, p->vocab_size);
    sampler_reset(p->host, slot);
    if (p->b->ops->admit(p->b, slot, &r->params, &err))
        fail_msg("%s", err.text);
    int32_t noted[10];
    size_t n_noted = below(3) ? 0 : (size_t)below(10);
    for (size_t i = 0; i < n_noted; i++) {
        noted[i] = below(p->vocab_size);
        sampler_note(p->host, slot, noted[i], false);
    }
    if (p->b->ops->note(p->b, slot, noted, n_noted, &err))
        fail_msg("%s", err.text);
    memset(&err, 0, sizeof(err)); /* what was given is the caller's again */
    memset(noted, 0, sizeof(noted));
}

/* A step under construction. */
struct build {
    int32_t tokens[MAX_ROWS], seq_slot[MAX_ROWS], seq_start[MAX_ROWS + 1], logit_rows[MAX_ROWS];
    int64_t positions[MAX_ROWS];
    struct step_draw draws[MAX_ROWS];
    struct step_score scores[MAX_ROWS];
    struct step step;
};

static void start_build(struct build *b)
{
    memset(b, 0, sizeof(*b));
    b->step.tokens = b->tokens;
    b->step.positions = b->positions;
    b->step.seq_slot = b->seq_slot;
    b->step.seq_start = b->seq_start;
    b->step.logit_rows = b->logit_rows;
    b->step.draws = b->draws;
    b->step.scores = b->scores;
}

static void add_score(struct build *b, const struct pair *p)
{
    struct step_score *s = &b->scores[b->step.n_scores++];
    s->logit_row = b->step.n_logit_rows;
    s->target = below(p->vocab_size);
    s->n_top = below(3) ? 0 : below(SAMPLER_MAX_TOP_LOGPROBS + 1);
}

static void add_draw(struct build *b, struct pair *p, int slot)
{
    struct request *r = &p->requests[slot];
    b->draws[b->step.n_draws++] = (struct step_draw){.logit_row = b->step.n_logit_rows,
                                                     .slot = slot,
                                                     .position = (uint64_t)r->position,
                                                     .n_output = r->n_output++};
}

/* One sequence: a few tokens of the host, or the one drawn last. */
static void add_sequence(struct build *b, struct pair *p, int slot, bool scoring)
{
    struct request *r = &p->requests[slot];
    const bool fed = r->n_output > 0 && below(4);
    const int n_rows = fed ? 1 : 1 + below(3);
    const bool draws = below(5) > 0;
    b->seq_slot[b->step.n_seqs] = slot;
    b->seq_start[b->step.n_seqs++] = b->step.n_rows;
    for (int i = 0; i < n_rows; i++) {
        const int row = b->step.n_rows++;
        const bool last = i == n_rows - 1, score = scoring && below(2);
        b->tokens[row] = fed ? TOKEN_DRAWN : below(p->vocab_size);
        b->positions[row] = r->position++;
        if (!fed)
            sampler_note(p->host, slot, b->tokens[row], false);
        if (score)
            add_score(b, p);
        if (last && draws)
            add_draw(b, p, slot);
        if (score || (last && draws))
            b->logit_rows[b->step.n_logit_rows++] = row;
    }
    b->seq_start[b->step.n_seqs] = b->step.n_rows;
    r->n_left--;
}

/* What the host makes of the step. */
static void expect(struct pair *p, const struct build *b)
{
    struct expected *e = &p->expected[p->n_queued % DEPTH];
    const size_t width = (size_t)p->vocab_size;
    e->n = 0;
    for (int i = 0; i < b->step.n_draws; i++) {
        const struct step_draw *d = &b->draws[i];
        struct sampled *out = &e->results[e->n++];
        sampler_draw(p->host, d->slot, p->rows + (size_t)d->logit_row * width,
                     &p->requests[d->slot].params, d->position, d->n_output, out);
        sampler_note(p->host, d->slot, out->token, true);
    }
    for (int i = 0; i < b->step.n_scores; i++) {
        const struct step_score *s = &b->scores[i];
        sampler_score(p->host, p->rows + (size_t)s->logit_row * width, s->target, s->n_top,
                      &e->results[e->n++]);
    }
}

static void queue(struct pair *p, struct build *b)
{
    const struct backend_ops *op = p->b->ops;
    struct error err;
    const size_t n = (size_t)b->step.n_logit_rows * (size_t)p->vocab_size;
    for (int i = 0; i < b->step.n_logit_rows; i++)
        fill_row(p->rows + (size_t)i * (size_t)p->vocab_size, p->vocab_size);
    if (n && op->write(p->b, p->logits, 0, p->rows, n * sizeof(float), &err))
        fail_msg("%s", err.text);
    expect(p, b);
    if (!op->begin(p->b, &b->step) && b->step.n_draws + b->step.n_scores > 0)
        op->draw(p->b, p->logits);
    if (op->submit(p->b, &err))
        fail_msg("%s", err.text);
    p->n_queued++;
}

static void play(struct pair *p, int n_steps)
{
    for (int n = 0; n < n_steps; n++) {
        static struct build b;
        start_build(&b);
        const bool scoring = below(3) == 0;
        const int first = below(N_SLOTS), n_seqs = 1 + below(N_SLOTS);
        for (int i = 0; i < n_seqs; i++) {
            const int slot = (first + i) % N_SLOTS;
            if (p->requests[slot].n_left == 0)
                admit(p, slot);
            add_sequence(&b, p, slot, scoring);
        }
        if (p->n_queued - p->n_waited == DEPTH)
            collect(p);
        queue(p, &b);
    }
    while (p->n_waited < p->n_queued)
        collect(p);
}

static void run(int32_t vocab_size, bool composed, int n_steps)
{
    const char *factor = getenv("LATTE_TEST_FACTOR"); /* longer runs, for a GPU */
    struct pair p;
    if (getenv("LATTE_TEST_QUICK"))
        n_steps = n_steps / 8 + 2;
    seed_of_run = (uint64_t)vocab_size * 2 + composed;
    open_pair(&p, vocab_size, N_SLOTS, composed);
    play(&p, factor ? n_steps * atoi(factor) : n_steps);
    print_message("V %d: %d results in %d steps\n", vocab_size, p.n_results, p.n_waited);
    assert_true(p.n_results > 0);
    close_pair(&p);
}

static void test_small(void **state)
{
    (void)state;
    run(97, false, 400);
    run(97, true, 100);
}

static void test_medium(void **state)
{
    (void)state;
    run(1000, false, 150);
    run(8192, true, 30);
}

static void test_large(void **state)
{
    (void)state;
    run(50257, false, 6);
    run(300000, true, 2);
}

/* Parameters on their way to the device are not written over by later ones. */
static void test_many_admissions(void **state)
{
    (void)state;
    static struct build b;
    struct pair p;
    struct error err;
    struct sampling_params params[N_MANY];
    seed_of_run = 5;
    open_pair(&p, 97, N_MANY, false);
    for (int slot = 0; slot < N_MANY; slot++) {
        sampling_params_init(&params[slot]);
        params[slot].seed = random_bits();
        params[slot].top_k = slot % 97;
        if (p.b->ops->admit(p.b, slot, &params[slot], &err))
            fail_msg("%s", err.text);
    }
    for (int slot = 0; slot < N_MANY; slot += MAX_ROWS) {
        const struct sampled *results = NULL;
        start_build(&b);
        b.step.n_rows = b.step.n_seqs = b.step.n_logit_rows = b.step.n_draws = MAX_ROWS;
        for (int i = 0; i < MAX_ROWS; i++) {
            b.seq_slot[i] = slot + i;
            b.seq_start[i + 1] = i + 1;
            b.logit_rows[i] = i;
            b.draws[i] = (struct step_draw){.logit_row = i, .slot = slot + i, .position = 9};
            fill_row(p.rows + i * 97, 97);
        }
        if (p.b->ops->write(p.b, p.logits, 0, p.rows, MAX_ROWS * 97 * sizeof(float), &err))
            fail_msg("%s", err.text);
        if (!p.b->ops->begin(p.b, &b.step))
            p.b->ops->draw(p.b, p.logits);
        if (p.b->ops->submit(p.b, &err) || p.b->ops->wait(p.b, &results, &err))
            fail_msg("%s", err.text);
        for (int i = 0; i < MAX_ROWS; i++) {
            struct sampled right;
            sampler_draw(p.host, 0, p.rows + i * 97, &params[slot + i], 9, 0, &right);
            check_sampled(&results[i], &right, "one of many slots");
        }
    }
    close_pair(&p);
}

static void test_no_device(void **state)
{
    (void)state;
    print_message("SKIPPED: no CUDA device\n");
    skip();
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_small),
        cmocka_unit_test(test_medium),
        cmocka_unit_test(test_large),
        cmocka_unit_test(test_many_admissions),
    };
    const struct CMUnitTest none[] = {cmocka_unit_test(test_no_device)};
    return backend_cuda_count() ? cmocka_run_group_tests(tests, NULL, NULL)
                                : cmocka_run_group_tests(none, NULL, NULL);
}
