/* test_two_devices.c - one engine on two GPUs: jobs go to both, give what they give on one, and a
 * device that fails takes down its own jobs alone. Where there is one GPU only this is skipped,
 * aloud; the emulated runtime is told to have two. */
#include "tests/unit/unit.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/engine.h"
#include "tests/cuda/cuda_tests.h"

enum { N_SLOTS = 4, N_JOBS = 12, MAX_PROMPT = 40, MAX_OUTPUT = 24 };

static char model_dir[200];

static void open_engine(struct engine **e, const char *devices)
{
    struct engine_options options;
    struct error err;
    engine_options_init(&options);
    options.model_dir = model_dir;
    options.device = devices;
    options.deterministic = true;
    options.n_slots = N_SLOTS;
    options.step_tokens = 64;
    options.chunk_tokens = 32;
    options.warm_up = true;
    if (engine_open(e, &options, &err))
        fail_msg("%s", err.text);
}

static struct job *submit(struct engine *e, int i, int max_tokens, enum status expected)
{
    int32_t prompt[MAX_PROMPT];
    struct job *job = NULL;
    struct error err;
    struct job_request request = {.prompt = prompt,
                                  .n_prompt = (size_t)(1 + i * 11 % MAX_PROMPT),
                                  .max_tokens = max_tokens,
                                  .prompt_logprobs = -1};
    uint32_t random = (uint32_t)i + 1;
    for (int t = 0; t < MAX_PROMPT; t++)
        prompt[t] = (int32_t)(test_random(&random) % 500);
    sampling_params_init(&request.sampling);
    request.sampling.seed = (uint64_t)i;
    request.sampling.temperature = i % 3 ? 1 : 0;
    request.sampling.ignore_eos = true;
    if (job_new(&job, &request, &err))
        fail_msg("%s", err.text);
    enum status st = engine_submit(e, job, &err);
    if (st != expected)
        fail_msg("submitting job %d gave status %d: %s", i, st, st ? err.text : "");
    return job;
}

/* All outputs of a job; how it ended. */
static struct job_snapshot read_all(struct job *job, int32_t *out, int *n)
{
    struct job_token token;
    struct job_snapshot s;
    *n = 0;
    do {
        job_wait(job);
        job_snapshot(job, &s);
        while (job_read(job, &token, 1))
            if (*n < MAX_OUTPUT)
                out[(*n)++] = token.token;
    } while (s.finish == FINISH_NONE);
    job_release(job);
    return s;
}

struct outputs {
    int n[N_JOBS];
    int32_t tokens[N_JOBS][MAX_OUTPUT];
    int most_running;
};

/* All jobs at once; how many ran together at most. */
static void run_jobs(const char *devices, struct outputs *out)
{
    struct engine *e = NULL;
    struct job *jobs[N_JOBS];
    struct engine_stats stats;
    struct engine_info info;
    open_engine(&e, devices);
    engine_info(e, &info);
    assert_int_equal(info.n_slots, N_SLOTS * info.n_devices);
    for (int i = 0; i < N_JOBS; i++)
        jobs[i] = submit(e, i, 4 + i * 7 % (MAX_OUTPUT - 3), STATUS_OK);
    out->most_running = 0;
    do {
        engine_stats(e, &stats);
        if (stats.n_running > out->most_running)
            out->most_running = stats.n_running;
        usleep(500);
    } while (stats.n_waiting + stats.n_running > 0);
    for (int i = 0; i < N_JOBS; i++) {
        struct job_snapshot s = read_all(jobs[i], out->tokens[i], &out->n[i]);
        if (s.finish != FINISH_LENGTH)
            fail_msg("%s: job %d: %s", devices, i,
                     s.finish == FINISH_ERROR ? s.error.text : "did not run to its end");
    }
    engine_close(e);
}

static void skip_without_two(void)
{
    if (backend_cuda_count() >= 2)
        return;
    print_message("SKIPPED: this machine has one CUDA device\n");
    skip();
}

static void test_two_devices_share_the_jobs(void **state)
{
    (void)state;
    static struct outputs one, second, two;
    skip_without_two();
    run_jobs("cuda:0", &one);
    run_jobs("cuda:1", &second);
    run_jobs("cuda:0,cuda:1", &two);
    assert_true(one.most_running <= N_SLOTS);
    assert_true(two.most_running > N_SLOTS); /* more than one device has slots for */
    for (int i = 0; i < N_JOBS; i++) {
        assert_int_equal(one.n[i], two.n[i]);
        assert_memory_equal(one.tokens[i], two.tokens[i], (size_t)one.n[i] * sizeof(int32_t));
        assert_memory_equal(one.tokens[i], second.tokens[i], (size_t)one.n[i] * sizeof(int32_t));
    }
}

static void test_bad_devices(void **state)
{
    (void)state;
    static const char *const bad[] = {"cuda:99", "cuda:0,cuda:0", "cuda:0,cpu",
                                      "cuda:x",  "cuda:0,",       "cuda:-1"};
    for (size_t i = 0; i < COUNT_OF(bad); i++) {
        struct engine_options options;
        struct engine *e = NULL;
        struct error err;
        engine_options_init(&options);
        options.model_dir = model_dir;
        options.device = bad[i];
        options.n_slots = N_SLOTS;
        enum status st = engine_open(&e, &options, &err);
        if (st != STATUS_INVALID || e)
            fail_msg("device \"%s\" gave status %d: %s", bad[i], st, st ? err.text : "");
    }
}

/* Only an emulated device fails when it is told to. */
static void skip_unless_emulated(void)
{
    if (run_emulated())
        return;
    print_message("SKIPPED: no device here fails on demand\n");
    skip();
}

/* Wait until a job is among those that run. */
static void wait_running(struct engine *e, int n)
{
    struct engine_stats stats;
    for (int i = 0; i < 20000; i++) {
        engine_stats(e, &stats);
        if (stats.n_running >= n)
            return;
        usleep(500);
    }
    fail_msg("only %d jobs run", stats.n_running);
}

static void test_a_failing_device_ends_its_jobs(void **state)
{
    (void)state;
    enum { N = 2 * N_SLOTS };
    struct engine *e = NULL;
    struct job *jobs[N];
    struct engine_stats stats;
    int32_t tokens[MAX_OUTPUT];
    int n, n_failed = 0, n_finished = 0;
    skip_unless_emulated();
    open_engine(&e, "cuda:0,cuda:1");
    for (int i = 0; i < N; i++)
        jobs[i] = submit(e, i, 40, STATUS_OK);
    wait_running(e, N);
    setenv("LATTE_EMULATE_FAIL", "20", 1); /* one device, the one that comes to it first */
    for (int i = 0; i < N; i++) {
        struct job_snapshot s = read_all(jobs[i], tokens, &n);
        n_finished += s.finish == FINISH_LENGTH;
        n_failed += s.finish == FINISH_ERROR && s.error.status == STATUS_DEVICE;
    }
    assert_int_equal(n_failed, N_SLOTS); /* jobs were spread evenly */
    assert_int_equal(n_finished, N - N_SLOTS);
    engine_stats(e, &stats);
    assert_true(stats.failed); /* health turns red */

    struct job_snapshot s = read_all(submit(e, 1, 5, STATUS_OK), tokens, &n);
    assert_int_equal(s.finish, FINISH_LENGTH); /* the other device goes on */
    setenv("LATTE_EMULATE_FAIL", "3", 1);
    s = read_all(submit(e, 2, 20, STATUS_OK), tokens, &n);
    assert_int_equal(s.finish, FINISH_ERROR);
    assert_int_equal(s.error.status, STATUS_DEVICE);
    job_release(submit(e, 3, 5, STATUS_DEVICE)); /* nothing is left to run on */
    engine_close(e);
    unsetenv("LATTE_EMULATE_FAIL");
}

/* A device that fails while the engine opens is an error of opening. */
static void test_failing_while_opening(void **state)
{
    (void)state;
    skip_unless_emulated();
    for (int n = 1; n <= 9; n += 4) {
        char value[16];
        struct engine_options options;
        struct engine *e = NULL;
        struct error err;
        engine_options_init(&options);
        options.model_dir = model_dir;
        options.device = "cuda:0";
        options.n_slots = N_SLOTS;
        snprintf(value, sizeof(value), "%d", n);
        setenv("LATTE_EMULATE_FAIL", value, 1);
        enum status st = engine_open(&e, &options, &err);
        unsetenv("LATTE_EMULATE_FAIL");
        if (st != STATUS_DEVICE)
            fail_msg("opening on a device whose kernel %d fails gave status %d", n, st);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_two_devices_share_the_jobs),
        cmocka_unit_test(test_bad_devices),
        cmocka_unit_test(test_a_failing_device_ends_its_jobs),
        cmocka_unit_test(test_failing_while_opening),
    };
    setenv("LATTE_EMULATE_DEVICES", "2", 0);
    wide_model_make(0, model_dir, sizeof(model_dir));
    const struct CMUnitTest none[] = {cmocka_unit_test(test_no_device)};
    const int n_failed = backend_cuda_count() ? cmocka_run_group_tests(tests, NULL, NULL)
                                              : cmocka_run_group_tests(none, NULL, NULL);
    test_dir_remove(model_dir);
    return n_failed;
}
