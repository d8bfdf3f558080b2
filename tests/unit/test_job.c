/* test_job.c - the ring against a trivial list, parking, the bell, and two threads at once. */
#include "tests/unit/unit.h"

#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "engine/job.h"
#include "tests/unit/fail_alloc.h"

static struct job *new_job(size_t n_prompt, int64_t max_tokens, int prompt_logprobs)
{
    int32_t *prompt = calloc(n_prompt, sizeof(*prompt));
    for (size_t i = 0; i < n_prompt; i++)
        prompt[i] = (int32_t)i;
    struct job_request request = {
        .prompt = prompt,
        .n_prompt = n_prompt,
        .max_tokens = max_tokens,
        .prompt_logprobs = prompt_logprobs,
    };
    sampling_params_init(&request.sampling);
    struct job *job = NULL;
    struct error err;
    if (job_new(&job, &request, &err))
        fail_msg("%s", err.text);
    free(prompt);
    return job;
}

static void count_ring(void *context)
{
    ++*(int *)context;
}

static void put(struct job *job, int32_t token)
{
    job_put(job, &(struct job_token){.token = token, .logprob = NAN});
}

/* Jobs of one request read one copy of its prompt, which lives as long as any of them. */
static void test_shares_a_prompt(void **state)
{
    (void)state;
    const int32_t ids[] = {5, 6, 7};
    struct prompt *prompt;
    assert_int_equal(prompt_new(&prompt, ids, 3, NULL), STATUS_OK);
    struct job_request request = {
        .prompt = prompt_ids(prompt), .n_prompt = 3, .shared = prompt, .max_tokens = 1};
    sampling_params_init(&request.sampling);
    struct job *jobs[2];
    for (int i = 0; i < 2; i++)
        assert_int_equal(job_new(&jobs[i], &request, NULL), STATUS_OK);
    assert_ptr_equal(job_request(jobs[0])->prompt, prompt_ids(prompt));
    prompt_release(prompt);
    job_release(jobs[0]);
    assert_ptr_equal(job_request(jobs[1])->prompt, request.prompt);
    assert_memory_equal(job_request(jobs[1])->prompt, ids, sizeof(ids));
    job_release(jobs[1]);
}

static void test_copies_the_request(void **state)
{
    (void)state;
    int32_t prompt[] = {5, 6, 7};
    struct logit_bias bias[] = {{3, 1.5f}, {4, -2}};
    int mark;
    struct job_request request = {.prompt = prompt, .n_prompt = 3, .max_tokens = 9, .user = &mark};
    sampling_params_init(&request.sampling);
    request.sampling.logit_bias = bias;
    request.sampling.n_logit_bias = 2;
    struct job *job = NULL;
    assert_int_equal(job_new(&job, &request, NULL), STATUS_OK);
    memset(prompt, 0, sizeof(prompt));
    memset(bias, 0, sizeof(bias));
    const struct job_request *copy = job_request(job);
    assert_int_equal(copy->prompt[2], 7);
    assert_int_equal(copy->sampling.logit_bias[1].token, 4);
    assert_true(copy->sampling.logit_bias[1].bias == -2);
    assert_ptr_equal(job_user(job), &mark);
    job_set_user(job, NULL);
    assert_null(job_user(job));
    job_release(job);
    job_release(NULL);
}

static void test_refuses(void **state)
{
    (void)state;
    int32_t prompt[] = {1};
    static const struct {
        size_t n_prompt;
        int64_t max_tokens, deadline_ms;
        int prompt_logprobs, n_bias;
        const char *field;
    } cases[] = {
        {0, 1, 0, -1, 0, "prompt"},          {1, -1, 0, -1, 0, "max_tokens"},
        {1, 1, -5, -1, 0, "deadline_ms"},    {1, 1, 0, 21, 0, "prompt_logprobs"},
        {1, 1, 0, -2, 0, "prompt_logprobs"}, {1, 1, 0, -1, 1025, "logit_bias"},
        {1, 1, 0, -1, -1, "logit_bias"},
    };
    for (size_t c = 0; c < COUNT_OF(cases); c++) {
        struct job_request request = {
            .prompt = prompt,
            .n_prompt = cases[c].n_prompt,
            .max_tokens = cases[c].max_tokens,
            .deadline_ms = cases[c].deadline_ms,
            .prompt_logprobs = cases[c].prompt_logprobs,
        };
        request.sampling.n_logit_bias = cases[c].n_bias;
        struct job *job = NULL;
        struct error err;
        assert_int_equal(job_new(&job, &request, &err), STATUS_INVALID);
        assert_null(job);
        assert_string_equal(err.field, cases[c].field);
    }
}

static enum status make_and_release(void *context, struct error *err)
{
    struct job *job = NULL;
    enum status st = job_new(&job, context, err);
    job_release(job);
    return st;
}

static void test_out_of_memory(void **state)
{
    (void)state;
    int32_t prompt[] = {1, 2, 3};
    struct job_request request = {.prompt = prompt, .n_prompt = 3, .max_tokens = 9};
    fail_alloc_walk(make_and_release, &request);
}

static void test_ring_sizes(void **state)
{
    (void)state;
    static const struct {
        size_t n_prompt;
        int64_t max_tokens;
        int prompt_logprobs;
        size_t expected;
    } cases[] = {
        {1, 0, -1, 1},  {1, 5, -1, 6},     {1, INT64_MAX, -1, 128}, {9999, 5, -1, 6},
        {10, 5, 0, 16}, {9999, 0, 3, 512}, {1, INT64_MAX, 0, 512},
    };
    for (size_t c = 0; c < COUNT_OF(cases); c++) {
        struct job *job = new_job(cases[c].n_prompt, cases[c].max_tokens, cases[c].prompt_logprobs);
        assert_int_equal(job_ring_size(job), cases[c].expected);
        job_release(job);
    }
}

/* Random puts and reads; what comes out is what went in, in order. */
static void test_ring_order(void **state)
{
    (void)state;
    struct job *job = new_job(1, 1000000, -1);
    size_t size = job_ring_size(job);
    struct job_token out[200];
    int32_t n_put = 0, n_read = 0;
    unsigned random = 1;
    for (int round = 0; round < 20000; round++) {
        random = random * 1664525 + 1013904223;
        size_t n = (random >> 16) % 200;
        if (random >> 31) {
            for (size_t i = 0; i < n && (size_t)(n_put - n_read) < size; i++)
                put(job, n_put++);
        } else {
            size_t held = (size_t)(n_put - n_read), got = job_read(job, out, n);
            assert_int_equal(got, held < n ? held : n);
            for (size_t i = 0; i < got; i++)
                assert_int_equal(out[i].token, n_read++);
        }
        for (size_t room = 1; room <= size; room += 31)
            assert_int_equal(job_has_room(job, room), size - (size_t)(n_put - n_read) >= room);
    }
    struct job_snapshot snapshot;
    job_snapshot(job, &snapshot);
    assert_int_equal(snapshot.n_output, n_put);
    job_release(job);
}

static void test_parking(void **state)
{
    (void)state;
    struct job *job = new_job(1, 10, -1);
    struct job_token token;
    assert_true(job_park(job));
    assert_true(job_put(job, &(struct job_token){.token = 4}));  /* wakes the parked reader */
    assert_false(job_put(job, &(struct job_token){.token = 5})); /* once */
    assert_false(job_park(job));                                 /* there is something to read */
    assert_int_equal(job_read(job, &token, 1), 1);
    assert_int_equal(token.token, 4);
    assert_false(job_park(job));
    assert_int_equal(job_read(job, &token, 1), 1);
    assert_true(job_park(job));
    assert_true(job_finish(job, FINISH_LENGTH, NULL));
    assert_false(job_park(job));
    job_wait(job); /* returns at once */
    assert_int_equal(job_read(job, &token, 1), 0);
    job_release(job);
}

static void test_bell(void **state)
{
    (void)state;
    int n_rings = 0;
    struct job *job = new_job(1, 1000, -1);
    struct job_token out[128];
    job_attach(job, count_ring, &n_rings);
    for (int32_t i = 0; i < 128; i++)
        put(job, i);
    job_read(job, out, 1);
    assert_int_equal(n_rings, 0); /* nobody waits for room */
    put(job, 0);
    assert_false(job_has_room(job, 3));
    job_read(job, out, 2);
    assert_int_equal(n_rings, 0); /* not enough yet */
    job_read(job, out, 1);
    assert_int_equal(n_rings, 1);
    job_read(job, out, 1);
    assert_int_equal(n_rings, 1); /* once */
    assert_false(job_is_cancelled(job));
    job_cancel(job);
    assert_true(job_is_cancelled(job));
    assert_int_equal(n_rings, 2);
    job_finish(job, FINISH_CANCELLED, NULL);
    job_cancel(job);
    job_read(job, out, 128);
    assert_int_equal(n_rings, 2); /* the bell may be gone after the end */
    job_release(job);
}

static void test_snapshot(void **state)
{
    (void)state;
    struct job *job = new_job(7, 10, -1);
    struct job_snapshot s;
    int n_rings = 0;
    job_snapshot(job, &s);
    assert_true(s.finish == FINISH_NONE && !s.submitted_ns && !s.n_output && !s.finished_ns);
    job_attach(job, count_ring, &n_rings);
    job_detach(job);
    job_snapshot(job, &s);
    assert_true(s.submitted_ns == 0);
    job_attach(job, count_ring, &n_rings);
    job_mark_admitted(job);
    job_mark_prompt_done(job, 7);
    job_put(job, &(struct job_token){.token = 1, .is_prompt = true});
    job_snapshot(job, &s);
    assert_true(s.n_prompt_done == 7 && s.n_output == 0 && s.first_token_ns == 0);
    put(job, 2);
    struct error err;
    fail(&err, STATUS_TIMEOUT, "too late");
    job_finish(job, FINISH_ERROR, &err);
    job_snapshot(job, &s);
    assert_true(s.finish == FINISH_ERROR && s.error.status == STATUS_TIMEOUT);
    assert_string_equal(s.error.text, "too late");
    assert_true(s.n_output == 1 && !s.stopped_by_token);
    assert_true(0 < s.submitted_ns && s.submitted_ns <= s.admitted_ns &&
                s.admitted_ns <= s.first_token_ns && s.first_token_ns <= s.finished_ns);
    job_release(job);
}

static void test_deadline(void **state)
{
    (void)state;
    static const int64_t deadlines_ms[] = {0, 1, 60000, INT64_MAX / 1000000, INT64_MAX};
    for (size_t c = 0; c < COUNT_OF(deadlines_ms); c++) {
        int32_t prompt = 0;
        struct job_request request = {
            .prompt = &prompt, .n_prompt = 1, .deadline_ms = deadlines_ms[c]};
        struct job *job = NULL;
        int n_rings;
        assert_int_equal(job_new(&job, &request, NULL), STATUS_OK);
        int64_t before = job_clock_ns();
        job_attach(job, count_ring, &n_rings);
        int64_t deadline = job_deadline_ns(job);
        if (c == 0)
            assert_true(deadline == 0);
        else if (c < 3)
            assert_true(deadline >= before + deadlines_ms[c] * 1000000 &&
                        deadline <= job_clock_ns() + deadlines_ms[c] * 1000000);
        else
            assert_true(deadline == INT64_MAX);
        job_release(job);
    }
}

/* A writer and a reader that block on each other only through job_wait and the bell. */
struct pair {
    struct job *job;
    pthread_mutex_t lock;
    pthread_cond_t rung;
    int n_rings;
};

enum { PAIR_TOKENS = 50000 };

static void ring_pair(void *context)
{
    struct pair *pair = context;
    pthread_mutex_lock(&pair->lock);
    pair->n_rings++;
    pthread_cond_signal(&pair->rung);
    pthread_mutex_unlock(&pair->lock);
}

static void *write_tokens(void *context)
{
    struct pair *pair = context;
    int n_answered = 0;
    for (int32_t i = 0; i < PAIR_TOKENS; i++) {
        if (!job_has_room(pair->job, 1)) {
            pthread_mutex_lock(&pair->lock);
            while (pair->n_rings == n_answered)
                pthread_cond_wait(&pair->rung, &pair->lock);
            n_answered = pair->n_rings;
            pthread_mutex_unlock(&pair->lock);
        }
        put(pair->job, i);
    }
    job_finish(pair->job, FINISH_LENGTH, NULL);
    job_release(pair->job);
    return NULL;
}

static void test_two_threads(void **state)
{
    (void)state;
    struct pair pair = {.job = new_job(1, PAIR_TOKENS, -1)};
    pthread_mutex_init(&pair.lock, NULL);
    pthread_cond_init(&pair.rung, NULL);
    job_attach(pair.job, ring_pair, &pair);
    job_hold(pair.job);
    pthread_t writer;
    pthread_create(&writer, NULL, write_tokens, &pair);
    struct job_token out[50];
    struct job_snapshot snapshot = {0};
    int32_t n_read = 0;
    while (n_read < PAIR_TOKENS || snapshot.finish == FINISH_NONE) {
        job_wait(pair.job);
        size_t n = job_read(pair.job, out, 1 + (size_t)n_read % 50);
        for (size_t i = 0; i < n; i++)
            assert_int_equal(out[i].token, n_read++);
        job_snapshot(pair.job, &snapshot);
    }
    pthread_join(writer, NULL);
    job_release(pair.job);
    pthread_cond_destroy(&pair.rung);
    pthread_mutex_destroy(&pair.lock);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_copies_the_request),
        cmocka_unit_test(test_shares_a_prompt),
        cmocka_unit_test(test_refuses),
        cmocka_unit_test(test_out_of_memory),
        cmocka_unit_test(test_ring_sizes),
        cmocka_unit_test(test_ring_order),
        cmocka_unit_test(test_parking),
        cmocka_unit_test(test_bell),
        cmocka_unit_test(test_snapshot),
        cmocka_unit_test(test_deadline),
        cmocka_unit_test(test_two_threads),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
