/* test_stress.c - the whole engine on a GPU under random load: jobs of every kind come and go,
 * are cancelled, run out of time, wait for slow readers. For LATTE_STRESS_S seconds (5; 2 on an
 * emulated device, with a smaller model and fewer jobs).
 *
 * Every job must end as its own record says it may, with every token it counts; the engine's
 * counters must add up; and a sample of jobs, run again alone on the then idle engine, must give
 * the same tokens, since the engine is deterministic.
 */
#include "tests/unit/unit.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/engine.h"
#include "tests/cuda/cuda_tests.h"

enum {
    N_LIVE = 64, /* jobs under way at most: more than slots and queue hold, so some are refused */
    MAX_PROMPT = 90,
    MAX_OUTPUT = 60,
    N_LIVE_EMULATED = 12,
    N_KEPT = 24, /* ended jobs that are run again */
    N_KEPT_EMULATED = 6,
    LONGEST_WAIT_S = 120,
};

static uint64_t seed_of_run = 4242;

static int random_below(int n)
{
    seed_of_run = seed_of_run * 6364136223846793005u + 1442695040888963407u;
    return (int)((seed_of_run >> 33) % (uint64_t)n);
}

static double now(void)
{
    return (double)job_clock_ns() * 1e-9;
}

/* ---- jobs ---- */

static const struct logit_bias biases[] = {{5, 3.0f}, {9, -INFINITY}, {40, 1.5f}};

/* A job and what its reader has seen. */
struct record {
    struct job *job; /* NULL: the place is free */
    int32_t prompt[MAX_PROMPT];
    struct job_request request;
    bool slow, parked, cancelled;
    int n_prompt_read, n_read;
    int32_t read[MAX_OUTPUT];
    double started;
};

static struct sampling_params random_sampling(int32_t vocab_size)
{
    static const float temperatures[] = {0, 0, 0.5f, 1, 1, 2};
    struct sampling_params p;
    sampling_params_init(&p);
    p.seed = (uint64_t)random_below(1 << 30);
    p.temperature = temperatures[random_below(COUNT_OF(temperatures))];
    p.top_k = random_below(3) ? 0 : 1 + random_below(60);
    p.top_p = random_below(3) ? 1 : 0.5f + 0.05f * (float)random_below(10);
    p.min_p = random_below(8) ? 0 : 0.02f;
    p.typical_p = random_below(8) ? 1 : 0.8f;
    p.repetition_penalty = random_below(5) ? 1 : 1.2f;
    p.presence_penalty = random_below(6) ? 0 : 0.3f;
    p.ignore_eos = random_below(2);
    p.n_logprobs = random_below(6) ? -1 : random_below(4);
    if (random_below(4) == 0) {
        p.n_stop_tokens = 12;
        for (int i = 0; i < p.n_stop_tokens; i++)
            p.stop_tokens[i] = random_below(vocab_size);
    }
    if (random_below(6) == 0) {
        p.n_logit_bias = COUNT_OF(biases);
        p.logit_bias = biases;
    }
    return p;
}

static void random_record(struct record *r, int32_t vocab_size)
{
    *r = (struct record){.slow = random_below(8) == 0, .started = now()};
    const int n = 1 + random_below(random_below(3) ? 12 : MAX_PROMPT);
    for (int i = 0; i < n; i++)
        r->prompt[i] = random_below(vocab_size);
    r->request = (struct job_request){
        .prompt = r->prompt,
        .n_prompt = (size_t)n,
        .max_tokens = random_below(20) ? 1 + random_below(MAX_OUTPUT) : 0,
        .deadline_ms = random_below(12) ? 0 : 1 + random_below(300),
        .prompt_logprobs = random_below(10) ? -1 : random_below(3),
        .sampling = random_sampling(vocab_size),
    };
}

/* ---- the sample that is run again ---- */

static struct record kept[N_KEPT];
static int n_ended;

static void keep(const struct record *r)
{
    const int place = n_ended < N_KEPT ? n_ended : random_below(n_ended);
    if (place < N_KEPT)
        kept[place] = *r;
}

/* ---- totals, to be compared with the engine's ---- */

struct totals {
    uint64_t n_prompt, n_output;
    int n_stop, n_length, n_cancelled, n_late, n_refused, n_parked;
};

static void check_end(const struct record *r, const struct job_snapshot *s)
{
    const int n_prompt = r->request.prompt_logprobs < 0 ? 0 : (int)r->request.n_prompt;
    assert_int_equal(r->n_read, s->n_output);
    assert_true(r->n_read <= r->request.max_tokens);
    switch (s->finish) {
    case FINISH_LENGTH:
        assert_int_equal(r->n_read, r->request.max_tokens);
        break;
    case FINISH_STOP:
        assert_true(s->stopped_by_token && r->n_read > 0);
        break;
    case FINISH_CANCELLED:
        assert_true(r->cancelled);
        return;
    case FINISH_ERROR:
        if (s->error.status != STATUS_TIMEOUT || !r->request.deadline_ms)
            fail_msg("a job ended with: %s", s->error.text);
        return;
    case FINISH_NONE:
        fail_msg("a job that has not finished ended");
    }
    assert_int_equal(r->n_prompt_read, n_prompt); /* what ended early may lack some */
    assert_int_equal(s->n_prompt_done, r->request.n_prompt);
}

static void end(struct record *r, const struct job_snapshot *s, struct totals *t)
{
    check_end(r, s);
    t->n_prompt += s->n_prompt_done;
    t->n_output += s->n_output;
    t->n_stop += s->finish == FINISH_STOP;
    t->n_length += s->finish == FINISH_LENGTH;
    t->n_cancelled += s->finish == FINISH_CANCELLED;
    t->n_late += s->finish == FINISH_ERROR;
    job_release(r->job);
    r->job = NULL;
    n_ended++;
    if (r->n_read)
        keep(r);
}

/* ---- the reader ---- */

static void take_tokens(struct record *r, size_t most)
{
    struct job_token tokens[8];
    size_t n;
    while (most && (n = job_read(r->job, tokens, most < 8 ? most : 8))) {
        most -= n;
        for (size_t i = 0; i < n; i++) {
            if (tokens[i].is_prompt) {
                assert_int_equal(tokens[i].token, r->prompt[r->n_prompt_read++]);
                assert_int_equal(r->n_read, 0);
            } else {
                assert_true(r->n_read < MAX_OUTPUT);
                r->read[r->n_read++] = tokens[i].token;
            }
        }
    }
}

/* Look at a job once, in one of the ways readers have. */
static void visit(struct record *r, struct totals *t)
{
    struct job_snapshot s;
    if (r->parked)
        return;
    if (r->slow && random_below(50))
        return;
    if (!r->cancelled && random_below(400) == 0) {
        job_cancel(r->job);
        r->cancelled = true;
    }
    job_snapshot(r->job, &s); /* before reading: what has finished has put all its tokens */
    take_tokens(r, r->slow ? 1 + (size_t)random_below(3) : SIZE_MAX);
    if (s.finish != FINISH_NONE) {
        take_tokens(r, SIZE_MAX);
        end(r, &s, t);
    } else if (random_below(2)) {
        r->parked = job_park(r->job);
        t->n_parked += r->parked;
    }
    if (r->job && now() - r->started > LONGEST_WAIT_S)
        fail_msg("a job is lost: %zu prompt tokens done, %d of %lld tokens read", s.n_prompt_done,
                 r->n_read, (long long)r->request.max_tokens);
}

static void unpark(struct engine *e)
{
    for (struct job *job; (job = engine_take_ready(e));) {
        struct record *r = job_user(job);
        assert_true(r->job == job && r->parked);
        r->parked = false;
        job_release(job);
    }
}

static void start(struct engine *e, struct record *r, int32_t vocab_size, struct totals *t)
{
    struct error err;
    random_record(r, vocab_size);
    if (job_new(&r->job, &r->request, &err))
        fail_msg("%s", err.text);
    job_set_user(r->job, r);
    enum status st = engine_submit(e, r->job, &err);
    if (!st)
        return;
    if (st != STATUS_BUSY)
        fail_msg("%s", err.text);
    job_release(r->job);
    r->job = NULL;
    t->n_refused++;
}

static int n_live(const struct record *records)
{
    int n = 0;
    for (int i = 0; i < N_LIVE; i++)
        n += records[i].job != NULL;
    return n;
}

/* Load for some seconds, then wait for the rest. */
static void stress(struct engine *e, double seconds, int32_t vocab_size, struct totals *t)
{
    static struct record records[N_LIVE];
    const double until = now() + seconds;
    const int most = run_emulated() ? N_LIVE_EMULATED : N_LIVE;
    while (now() < until || n_live(records)) {
        unpark(e);
        for (int i = 0; i < most; i++) {
            if (records[i].job)
                visit(&records[i], t);
            else if (now() < until && random_below(40) == 0)
                start(e, &records[i], vocab_size, t);
        }
        usleep(200);
    }
}

/* ---- running again ---- */

/* What a job gave must be what it gives alone, as far as it got. */
static void run_again(struct engine *e, const struct record *r)
{
    struct job_request request = r->request;
    struct record again = {.request = request};
    struct job_snapshot s;
    struct error err;
    memcpy(again.prompt, r->prompt, sizeof(again.prompt));
    request.prompt = again.prompt;
    request.deadline_ms = 0;
    if (job_new(&again.job, &request, &err) || engine_submit(e, again.job, &err))
        fail_msg("%s", err.text);
    do {
        job_wait(again.job);
        job_snapshot(again.job, &s);
        take_tokens(&again, SIZE_MAX);
    } while (s.finish == FINISH_NONE);
    job_release(again.job);
    assert_true(again.n_read >= r->n_read);
    for (int i = 0; i < r->n_read; i++)
        if (again.read[i] != r->read[i])
            fail_msg("token %d of a job (seed %llu, temperature %g) was %d among others and is %d "
                     "alone",
                     i, (unsigned long long)request.sampling.seed, request.sampling.temperature,
                     r->read[i], again.read[i]);
}

static void check_totals(struct engine *e, const struct totals *t)
{
    struct engine_stats stats;
    engine_stats(e, &stats);
    assert_false(stats.failed);
    assert_int_equal(stats.n_running, 0);
    assert_int_equal(stats.n_waiting, 0);
    assert_int_equal(stats.n_output_tokens, t->n_output);
    assert_int_equal(stats.n_prompt_tokens, t->n_prompt);
    print_message("%d jobs: %d stopped, %d at their length, %d cancelled, %d too late; %d refused; "
                  "%d times parked; %llu prompt and %llu output tokens in %llu steps\n",
                  n_ended, t->n_stop, t->n_length, t->n_cancelled, t->n_late, t->n_refused,
                  t->n_parked, (unsigned long long)t->n_prompt, (unsigned long long)t->n_output,
                  (unsigned long long)stats.n_steps);
}

static void open_engine(struct engine **e, const char *dir)
{
    struct engine_options options;
    struct error err;
    engine_options_init(&options);
    options.model_dir = dir;
    options.device = "cuda:0";
    options.deterministic = true;
    options.n_slots = 24;
    options.max_batch = 16; /* decoding takes turns */
    options.max_queue = 32;
    options.step_tokens = 96;
    options.chunk_tokens = 32;
    options.warm_up = true;
    if (engine_open(e, &options, &err))
        fail_msg("%s", err.text);
}

static void test_random_load(void **state)
{
    (void)state;
    const char *asked = getenv("LATTE_STRESS_S");
    const double seconds = asked ? atof(asked) : run_emulated() ? 2 : 5;
    char dir[200];
    struct engine *e = NULL;
    struct engine_info info;
    struct totals totals = {0};
    cuda_model_make(busy_model(), 90, dir, sizeof(dir));
    open_engine(&e, dir);
    engine_info(e, &info);
    stress(e, seconds, info.config->vocab_size, &totals);
    check_totals(e, &totals);
    assert_true(n_ended > 0);
    const int most = run_emulated() ? N_KEPT_EMULATED : N_KEPT;
    const int n = n_ended < most ? n_ended : most;
    for (int i = 0; i < n; i++)
        if (kept[i].n_read)
            run_again(e, &kept[i]);
    engine_close(e);
    test_dir_remove(dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_random_load)};
    RUN_CUDA_TESTS(tests);
}
