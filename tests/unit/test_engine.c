/* test_engine.c - the whole engine over small models: every output equals the one that plain
 * model steps and draws give, whatever runs beside it; what it refuses; what it tells. */
#include "tests/unit/unit.h"

#include <stdlib.h>
#include <string.h>

#include "engine/engine.h"
#include "engine/model.h"
#include "tests/unit/model_files.h"
#include "tests/unit/model_run.h"

enum { CHUNK = 16, MAX_OUTPUT = 40, MAX_PROMPT = 50, N_JOBS = 14 };

struct spec {
    int n_prompt, max_tokens;
    int32_t prompt[MAX_PROMPT];
    struct sampling_params sampling;
};

static void make_spec(struct spec *spec, uint64_t seed, int32_t vocab_size)
{
    uint64_t r = seed * 0x9E3779B97F4A7C15 + 1;
    *spec = (struct spec){.n_prompt = 1 + (int)(seed * 7 % MAX_PROMPT),
                          .max_tokens = 1 + (int)(seed * 5 % MAX_OUTPUT)};
    for (int i = 0; i < spec->n_prompt; i++) {
        r = r * 6364136223846793005 + 1442695040888963407;
        spec->prompt[i] = (int32_t)((r >> 33) % (uint64_t)vocab_size);
    }
    sampling_params_init(&spec->sampling);
    spec->sampling.seed = seed;
    spec->sampling.ignore_eos = true;
    if (seed % 3 == 0)
        spec->sampling.temperature = 0;
    if (seed % 4 == 1) {
        spec->sampling.top_p = 0.9f;
        spec->sampling.repetition_penalty = 1.2f;
    }
}

static struct job *submit(struct engine *e, const struct spec *spec)
{
    struct job_request request = {
        .prompt = spec->prompt,
        .n_prompt = (size_t)spec->n_prompt,
        .max_tokens = spec->max_tokens,
        .prompt_logprobs = -1,
        .sampling = spec->sampling,
    };
    struct job *job = NULL;
    struct error err;
    if (job_new(&job, &request, &err) || engine_submit(e, job, &err))
        fail_msg("%s", err.text);
    return job;
}

/* All outputs of a job, which ends with the given finish. */
static int read_all(struct job *job, int32_t *out, enum job_finish finish)
{
    struct job_token token;
    struct job_snapshot snapshot;
    int n = 0;
    do {
        job_wait(job);
        job_snapshot(job, &snapshot);
        while (job_read(job, &token, 1))
            out[n++] = token.token;
    } while (snapshot.finish == FINISH_NONE);
    if (snapshot.finish != finish)
        fail_msg("finish %d, expected %d: %s", snapshot.finish, finish,
                 snapshot.finish == FINISH_ERROR ? snapshot.error.text : "");
    return n;
}

/* The same with steps of the model alone. */
static int expect(struct run *run, const struct spec *spec, int32_t *out)
{
    float *logits = calloc((size_t)run->vocab_size, sizeof(*logits));
    struct sampler *sampler = NULL;
    int64_t limit = model_max_position(run->model);
    int n = 0;
    assert_int_equal(sampler_open(&sampler, 1, run->vocab_size, NULL, 0, NULL), STATUS_OK);
    model_reset(run->model, 0);
    for (int i = 0; i < spec->n_prompt; i += CHUNK) {
        int rows = spec->n_prompt - i < CHUNK ? spec->n_prompt - i : CHUNK;
        run_feed(run, 0, spec->prompt + i, rows, LOGITS_LAST, logits);
    }
    for (int i = 0; i < spec->n_prompt; i++)
        sampler_note(sampler, 0, spec->prompt[i], false);
    while (n < spec->max_tokens && !(limit && spec->n_prompt + n >= limit)) {
        struct sampled sampled;
        sampler_draw(sampler, 0, logits, &spec->sampling, (uint64_t)(spec->n_prompt + n), n,
                     &sampled);
        out[n++] = sampled.token;
        sampler_note(sampler, 0, sampled.token, true);
        if (n < spec->max_tokens && !(limit && spec->n_prompt + n >= limit))
            run_feed(run, 0, &sampled.token, 1, LOGITS_LAST, logits);
    }
    sampler_close(sampler);
    free(logits);
    return n;
}

static void options_for(struct engine_options *o, const char *dir, const char *device)
{
    engine_options_init(o);
    o->model_dir = dir;
    o->device = device;
    o->n_threads = 2;
    o->n_slots = 5;
    o->chunk_tokens = CHUNK;
    o->step_tokens = 40;
}

static void check_model(const char *dir, const char *device, const char *name)
{
    struct engine_options options;
    struct engine *e = NULL;
    struct error err;
    options_for(&options, dir, device);
    if (engine_open(&e, &options, &err))
        fail_msg("%s on %s: %s", name, device, err.text);
    struct engine_info info;
    engine_info(e, &info);

    static struct spec specs[N_JOBS];
    struct job *jobs[N_JOBS];
    for (int i = 0; i < N_JOBS; i++) {
        make_spec(&specs[i], (uint64_t)i + 1, info.config->vocab_size);
        jobs[i] = submit(e, &specs[i]);
    }
    struct run run;
    run_open(&run, dir, &(struct run_options){device, 1, DTYPE_F32, 1});
    for (int i = 0; i < N_JOBS; i++) {
        int32_t found[MAX_OUTPUT], expected[MAX_OUTPUT];
        int n = read_all(jobs[i], found, FINISH_LENGTH);
        if (n != expect(&run, &specs[i], expected) ||
            memcmp(found, expected, (size_t)n * sizeof(*found)) != 0)
            fail_msg("%s on %s: job %d among others is not what it is alone", name, device, i);
        job_release(jobs[i]);
    }
    run_close(&run);
    engine_close(e);
}

static bool is_causal(const struct test_model *m)
{
    return strcmp(m->name, "classifier") != 0 && strcmp(m->name, "embedder") != 0;
}

static void test_outputs(void **state)
{
    (void)state;
    for (size_t i = 0; i < n_test_models; i++) {
        char dir[100];
        if (!is_causal(&test_models[i]))
            continue;
        assert_int_equal(test_dir_make(dir, sizeof(dir)), 0);
        assert_int_equal(model_files_write(dir, test_models[i].config_json, 7, NULL), 0);
        check_model(dir, "ref", test_models[i].name);
        check_model(dir, "cpu", test_models[i].name);
        test_dir_remove(dir);
    }
}

static const char *config_of(const char *name)
{
    for (size_t i = 0; i < n_test_models; i++)
        if (!strcmp(test_models[i].name, name))
            return test_models[i].config_json;
    fail_msg("there is no test model %s", name);
    return NULL;
}

struct bar {
    uint64_t last_percent;
    int n_calls;
};

static void watch_progress(void *context, uint64_t done, uint64_t total)
{
    struct bar *bar = context;
    uint64_t percent = done * 100 / total;
    assert_true(done <= total && percent >= bar->last_percent);
    bar->last_percent = percent;
    bar->n_calls++;
}

static void test_info_and_progress(void **state)
{
    (void)state;
    static const struct {
        const char *file_dtype, *asked, *expected;
    } cases[] = {
        {"F32", "auto", "f32"},  {"BF16", "auto", "bf16"}, {"F16", "auto", "f32"},
        {"F32", "bf16", "bf16"}, {"BF16", "f32", "f32"},
    };
    for (size_t c = 0; c < COUNT_OF(cases); c++) {
        char dir[100];
        struct model_files_options files = {.dtype = cases[c].file_dtype};
        assert_int_equal(test_dir_make(dir, sizeof(dir)), 0);
        assert_int_equal(model_files_write(dir, config_of("latte-rglru-swa++"), 7, &files), 0);
        struct engine_options options;
        struct bar bar = {0};
        struct engine *e = NULL;
        struct error err;
        options_for(&options, dir, "cpu");
        options.weight_dtype = cases[c].asked;
        options.progress = watch_progress;
        options.progress_context = &bar;
        if (engine_open(&e, &options, &err))
            fail_msg("%s", err.text);
        struct engine_info info;
        engine_info(e, &info);
        assert_string_equal(info.backend, "cpu");
        assert_string_equal(info.weight_dtype, cases[c].expected);
        assert_string_equal(info.window_dtype, "f32");
        assert_int_equal(strlen(info.fingerprint), 32);
        assert_true(info.n_threads == 2 && info.n_slots == 5 && info.max_position == 0);
        assert_true(info.n_parameters > 0 && info.state_bytes > 0);
        assert_true(info.weight_bytes >= 2 * (size_t)info.n_parameters);
        assert_true(bar.n_calls > 0 && bar.last_percent == 100);
        struct engine_device device;
        char row[256];
        engine_device(e, 0, &device);
        assert_true(info.n_devices == 1 && device.n_slots == 5 && device.workspace_bytes > 0);
        assert_int_equal(device.state_bytes, 5 * info.state_bytes);
        assert_int_equal(device.weight_bytes, info.weight_bytes);
        engine_device_row(&device, row, sizeof(row));
        assert_true(strstr(row, "cpu, 2 threads") && strstr(row, "5 x "));
        struct engine_stats stats;
        engine_stats(e, &stats);
        assert_true(stats.n_steps == 0 && stats.n_slots == 5 && !stats.failed);
        engine_close(e);
        test_dir_remove(dir);
    }
}

static void test_refusals(void **state)
{
    (void)state;
    char dir[100];
    struct engine *e = NULL;
    struct engine_options good, bad;
    struct error err;
    assert_int_equal(test_dir_make(dir, sizeof(dir)), 0);
    assert_int_equal(model_files_write(dir, config_of("transformer++"), 7, NULL), 0);
    options_for(&good, dir, "cpu");
#define REFUSED(change, expected, words)                                                           \
    do {                                                                                           \
        bad = good;                                                                                \
        bad.change;                                                                                \
        assert_int_equal(engine_open(&e, &bad, &err), expected);                                   \
        if (!strstr(err.text, words))                                                              \
            fail_msg("\"%s\" does not say \"%s\"", err.text, words);                               \
        assert_null(e);                                                                            \
    } while (0)
    REFUSED(model_dir = NULL, STATUS_INVALID, "no model directory");
    REFUSED(model_dir = "/nowhere/at/all", STATUS_NOT_FOUND, "/nowhere/at/all");
    REFUSED(device = "tpu", STATUS_INVALID, "\"tpu\"");
    REFUSED(weight_dtype = "int3", STATUS_INVALID, "\"int3\"");
    REFUSED(n_slots = -1, STATUS_INVALID, "slots is -1");
    REFUSED(n_slots = 70000, STATUS_INVALID, "slots is 70000");
    REFUSED(max_batch = -1, STATUS_INVALID, "max batch is -1");
    REFUSED(device = "cuda:99", STATUS_INVALID, "there are auto, cpu, ref");
    REFUSED(device = "", STATUS_INVALID, "\"\"");
    REFUSED(weight_dtype = "int8", STATUS_UNSUPPORTED, "needs a GPU");
    REFUSED(window_dtype = "bf16", STATUS_UNSUPPORTED, "needs a GPU");
    REFUSED(window_dtype = "f8", STATUS_UNSUPPORTED, "the CPU has f32");
    REFUSED(window_dtype = "int8", STATUS_INVALID, "none of auto, f32, bf16, f8");
    REFUSED(device_memory_share = 0, STATUS_INVALID, "device memory share is 0");
    REFUSED(device_memory_share = 1.5, STATUS_INVALID, "device memory share is 1.5");
    REFUSED(n_threads = -1, STATUS_INVALID, "threads is -1");
    REFUSED(max_queue = 0, STATUS_INVALID, "max queue is 0");
    REFUSED(step_tokens = -1, STATUS_INVALID, "step tokens is -1");
    REFUSED(chunk_tokens = -1, STATUS_INVALID, "chunk tokens is -1");
#undef REFUSED

    assert_int_equal(engine_open(&e, &good, &err), STATUS_OK); /* a context of 64 */
    struct spec spec;
    struct job *job = NULL;
    make_spec(&spec, 9, 8);
    struct job_request request = {.prompt = calloc(65, sizeof(int32_t)), .n_prompt = 65};
    sampling_params_init(&request.sampling);
    assert_int_equal(job_new(&job, &request, &err), STATUS_OK);
    assert_int_equal(engine_submit(e, job, &err), STATUS_TOO_LARGE);
    job_release(job);
    free((void *)request.prompt);

    struct job *running = submit(e, &spec);
    engine_drain(e);
    request = (struct job_request){.prompt = spec.prompt, .n_prompt = 1};
    sampling_params_init(&request.sampling);
    assert_int_equal(job_new(&job, &request, &err), STATUS_OK);
    assert_int_equal(engine_submit(e, job, &err), STATUS_SHUTDOWN);
    int32_t tokens[MAX_OUTPUT];
    assert_int_equal(read_all(running, tokens, FINISH_LENGTH), spec.max_tokens);
    job_release(running);
    job_release(job);
    engine_close(e);
    engine_close(NULL);
    test_dir_remove(dir);

    assert_int_equal(test_dir_make(dir, sizeof(dir)), 0);
    assert_int_equal(model_files_write(dir, config_of("embedder"), 7, NULL), 0);
    e = NULL;
    assert_int_equal(engine_open(&e, &good, &err), STATUS_UNSUPPORTED);
    test_dir_remove(dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_outputs),
        cmocka_unit_test(test_info_and_progress),
        cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
