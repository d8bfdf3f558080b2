/* test_devices.c - which devices an engine takes, what is opened on them, what fits, and how
 * several share the work. Two fake GPUs stand in for the CUDA backend. */
#include "tests/unit/unit.h"

#include <stdlib.h>
#include <string.h>

#include "engine/devices.h"
#include "engine/engine.h"
#include "engine/sizing.h"
#include "tests/unit/fake_gpus.h"
#include "tests/unit/model_files.h"

/* ---- Names ---- */

static void test_names(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        int n_cuda, n; /* n 0: refused */
        enum device_kind kind;
        int indices[3];
        const char *words; /* of the refusal */
    } cases[] = {
        {"auto", 0, 1, DEVICE_CPU, {0}, ""},
        {"auto", 2, 1, DEVICE_CUDA, {0}, ""},
        {"cpu", 2, 1, DEVICE_CPU, {0}, ""},
        {"ref", 0, 1, DEVICE_REF, {0}, ""},
        {"cuda", 1, 1, DEVICE_CUDA, {0}, ""},
        {"cuda:0", 1, 1, DEVICE_CUDA, {0}, ""},
        {"cuda:11", 12, 1, DEVICE_CUDA, {11}, ""},
        {"cuda:2,cuda:0,cuda:1", 3, 3, DEVICE_CUDA, {2, 0, 1}, ""},
        {"cuda", 0, 0, 0, {0}, "no GPU"},
        {"cuda:1", 1, 0, 0, {0}, "auto, cpu, ref, cuda:0"},
        {"cuda:2", 2, 0, 0, {0}, "cuda:0, cuda:1"},
        {"cuda:0,cuda:5", 2, 0, 0, {0}, "\"cuda:5\""},
        {"cuda:0,cuda", 2, 0, 0, {0}, "twice"},
        {"cpu,cuda:0", 2, 0, 0, {0}, "all be GPUs"},
        {"cuda:0,cpu", 2, 0, 0, {0}, "all be GPUs"},
        {"cpu,cpu", 2, 0, 0, {0}, "all be GPUs"},
        {"gpu", 1, 0, 0, {0}, "\"gpu\""},
        {"", 1, 0, 0, {0}, "\"\""},
        {"cuda:", 1, 0, 0, {0}, "\"cuda:\""},
        {"cuda:-1", 1, 0, 0, {0}, "\"cuda:-1\""},
        {"cuda:0x", 1, 0, 0, {0}, "\"cuda:0x\""},
        {"cuda:99999999999", 1, 0, 0, {0}, "\"cuda:99999999999\""},
        {"cuda:0,", 1, 0, 0, {0}, "\"\""},
        {"CPU", 1, 0, 0, {0}, "\"CPU\""},
    };
    for (size_t c = 0; c < COUNT_OF(cases); c++) {
        struct device_list list = {.n = -1};
        struct error err = {0};
        enum status st = devices_parse(&list, cases[c].text, cases[c].n_cuda, &err);
        if (st != (cases[c].n ? STATUS_OK : STATUS_INVALID) || !strstr(err.text, cases[c].words))
            fail_msg("\"%s\": %d %s", cases[c].text, (int)st, err.text);
        assert_int_equal(list.n, cases[c].n ? cases[c].n : -1); /* left alone when refused */
        for (int i = 0; i < list.n; i++)
            assert_true(list.items[i].kind == cases[c].kind &&
                        list.items[i].index == cases[c].indices[i]);
    }
}

/* ---- Sizes ---- */

static const char *config_of(const char *name)
{
    for (size_t i = 0; i < n_test_models; i++)
        if (!strcmp(test_models[i].name, name))
            return test_models[i].config_json;
    fail_msg("there is no test model %s", name);
    return NULL;
}

static struct checkpoint *make_checkpoint(const char *file_dtype)
{
    char dir[100];
    struct model_files_options files = {.dtype = file_dtype};
    struct checkpoint *c = NULL;
    struct error err;
    assert_int_equal(test_dir_make(dir, sizeof(dir)), 0);
    assert_int_equal(model_files_write(dir, config_of("latte-rglru-swa++"), 7, &files), 0);
    if (checkpoint_open(&c, dir, NULL, NULL, &err))
        fail_msg("%s", err.text);
    test_dir_remove(dir);
    return c;
}

static const struct device gpu = {DEVICE_CUDA, 0}, cpu = {DEVICE_CPU, 0};

static void test_defaults(void **state)
{
    (void)state;
    struct checkpoint *c = make_checkpoint("BF16");
    struct engine_options o;
    struct sizing s;
    engine_options_init(&o);
    assert_int_equal(sizing_choose(&s, c, &o, cpu, NULL), STATUS_OK);
    assert_int_equal(s.model.n_slots, 64);
    assert_int_equal(s.model.max_rows, 256);
    assert_int_equal(s.model.max_logit_rows, 63 + 128);
    assert_int_equal(s.scheduler.chunk_tokens, 128);
    assert_int_equal(s.scheduler.max_batch, 0); /* all of them */
    assert_true(s.model.weight_dtype == DTYPE_BF16 && s.model.window_dtype == DTYPE_F32);

    fake_gpus[0].free_bytes = (size_t)64 << 30;
    assert_int_equal(sizing_choose(&s, c, &o, gpu, NULL), STATUS_OK);
    assert_int_equal(s.model.n_slots, ENGINE_MAX_SLOTS); /* the model is tiny */
    assert_int_equal(s.model.max_rows, 8192);
    assert_int_equal(s.model.max_logit_rows, 1024 + 256);
    assert_int_equal(s.scheduler.chunk_tokens, 4096);
    assert_int_equal(s.scheduler.max_batch, 1024);
    assert_true(s.backend.n_slots == ENGINE_MAX_SLOTS && !s.backend.deterministic);

    o = (struct engine_options){.device = "cuda",
                                .weight_dtype = "auto",
                                .window_dtype = "auto",
                                .device_memory_share = 1,
                                .n_slots = 300,
                                .max_batch = 100,
                                .step_tokens = 50,
                                .chunk_tokens = 20,
                                .max_queue = 7,
                                .deterministic = true};
    assert_int_equal(sizing_choose(&s, c, &o, gpu, NULL), STATUS_OK);
    assert_true(s.model.n_slots == 300 && s.model.max_rows == 120 && s.model.max_logit_rows == 120);
    assert_true(s.backend.deterministic && s.scheduler.max_queue == 7);
    checkpoint_close(c);
}

static void test_dtypes(void **state)
{
    (void)state;
    static const struct {
        const char *file, *weights, *windows;
        enum device_kind kind;
        enum dtype weight_dtype, window_dtype;
    } cases[] = {
        {"F32", "auto", "auto", DEVICE_CUDA, DTYPE_F32, DTYPE_F32},
        {"F16", "auto", "auto", DEVICE_CUDA, DTYPE_F32, DTYPE_F32},
        {"BF16", "auto", "auto", DEVICE_CUDA, DTYPE_BF16, DTYPE_BF16},
        {"F32", "bf16", "auto", DEVICE_CUDA, DTYPE_BF16, DTYPE_BF16},
        {"BF16", "int8", "auto", DEVICE_CUDA, DTYPE_I8, DTYPE_BF16},
        {"BF16", "int8", "f8", DEVICE_CUDA, DTYPE_I8, DTYPE_F8_E4M3},
        {"BF16", "f32", "bf16", DEVICE_CUDA, DTYPE_F32, DTYPE_BF16},
        {"BF16", "auto", "f32", DEVICE_CUDA, DTYPE_BF16, DTYPE_F32},
        {"BF16", "auto", "auto", DEVICE_REF, DTYPE_BF16, DTYPE_F32},
        {"F32", "bf16", "f32", DEVICE_CPU, DTYPE_BF16, DTYPE_F32},
    };
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        struct checkpoint *c = make_checkpoint(cases[i].file);
        struct engine_options o;
        struct sizing s;
        struct error err;
        engine_options_init(&o);
        o.weight_dtype = cases[i].weights;
        o.window_dtype = cases[i].windows;
        if (sizing_choose(&s, c, &o, (struct device){cases[i].kind, 0}, &err))
            fail_msg("case %zu: %s", i, err.text);
        assert_int_equal(s.model.weight_dtype, cases[i].weight_dtype);
        assert_int_equal(s.model.window_dtype, cases[i].window_dtype);
        checkpoint_close(c);
    }
}

/* What the sizes must come to, from the parts that are asked for. */
static double bytes_for(const struct checkpoint *c, const struct sizing *s, int n_slots)
{
    struct model_options options = s->model;
    struct model_needs needs;
    options.n_slots = n_slots;
    int batch = s->scheduler.max_batch < n_slots ? s->scheduler.max_batch : n_slots - 1;
    int least = batch + s->scheduler.chunk_tokens;
    options.max_rows = s->scheduler.step_tokens > least ? s->scheduler.step_tokens : least;
    options.max_logit_rows = batch + 256;
    model_needs(c, &options, &needs);
    return (double)needs.weight_bytes + (double)needs.scratch_bytes +
           (double)n_slots * (double)(needs.slot_bytes + FAKE_PER_SLOT) +
           FAKE_PER_ROW * (double)options.max_rows;
}

static void test_as_many_slots_as_fit(void **state)
{
    (void)state;
    static const double shares[] = {0.3, 0.9, 1};
    struct checkpoint *c = make_checkpoint("BF16");
    for (size_t i = 0; i < COUNT_OF(shares); i++)
        for (size_t mb = 40; mb <= 2560; mb *= 4) {
            struct engine_options o;
            struct sizing s;
            struct error err;
            engine_options_init(&o);
            o.device_memory_share = shares[i];
            fake_gpus[0].free_bytes = mb * 1000000;
            if (sizing_choose(&s, c, &o, gpu, &err)) {
                assert_int_equal(err.status, STATUS_NOMEM);
                s.scheduler = (struct scheduler_options){
                    .max_batch = 1024, .step_tokens = 8192, .chunk_tokens = 4096};
                s.model =
                    (struct model_options){.weight_dtype = DTYPE_BF16, .window_dtype = DTYPE_BF16};
                assert_true(bytes_for(c, &s, 1) > shares[i] * (double)mb * 1e6);
                assert_null(strstr(err.text, "--max-slots"));
                continue;
            }
            double budget = shares[i] * (double)mb * 1e6;
            assert_true(bytes_for(c, &s, s.model.n_slots) <= budget);
            if (s.model.n_slots < ENGINE_MAX_SLOTS)
                assert_true(bytes_for(c, &s, s.model.n_slots + 1) > budget);
            int most = s.model.n_slots;
            o.n_slots = most; /* asked for, they fit as well; one more does not */
            assert_int_equal(sizing_choose(&s, c, &o, gpu, &err), STATUS_OK);
            assert_int_equal(s.model.n_slots, most);
            if (most == ENGINE_MAX_SLOTS)
                continue;
            char advice[40];
            o.n_slots = most + 1;
            snprintf(advice, sizeof(advice), "--max-slots %d or fewer", most);
            assert_int_equal(sizing_choose(&s, c, &o, gpu, &err), STATUS_NOMEM);
            if (!strstr(err.text, advice) || !strstr(err.text, "Fake (cuda:0)") ||
                !strstr(err.text, "--device-memory-share") || !strstr(err.text, "--step-tokens"))
                fail_msg("%s", err.text);
        }
    fake_gpus[0].free_bytes = (size_t)1 << 30;
    checkpoint_close(c);
}

/* ---- Several devices ---- */

static struct engine *open_engine(const char *device, int n_slots)
{
    char dir[100];
    struct engine_options o;
    struct engine *e = NULL;
    struct error err;
    assert_int_equal(test_dir_make(dir, sizeof(dir)), 0);
    assert_int_equal(model_files_write(dir, config_of("latte-rglru-swa++"), 7, NULL), 0);
    engine_options_init(&o);
    o.model_dir = dir;
    o.device = device;
    o.n_threads = 1;
    o.n_slots = n_slots;
    o.step_tokens = 32;
    o.chunk_tokens = 16;
    o.max_queue = 4;
    if (engine_open(&e, &o, &err))
        fail_msg("%s: %s", device, err.text);
    test_dir_remove(dir);
    for (int i = 0; i < FAKE_GPUS; i++)
        fake_gpus[i].n_begun = 0; /* forget the warming up */
    return e;
}

static struct job *submit_between(struct engine *e, struct image *from, struct image *into,
                                  int seed, enum status expected)
{
    const int32_t prompt[] = {1, 2, 3};
    struct job_request request = {
        .prompt = prompt, .n_prompt = 3, .max_tokens = 12, .prompt_logprobs = -1};
    request.from = from;
    request.into = into;
    struct job *job = NULL;
    struct error err = {0};
    sampling_params_init(&request.sampling);
    request.sampling.seed = (uint64_t)seed;
    request.sampling.ignore_eos = true;
    assert_int_equal(job_new(&job, &request, NULL), STATUS_OK);
    if (engine_submit(e, job, &err) != expected)
        fail_msg("expected %d: %s", (int)expected, err.text);
    return job;
}

static struct job *submit(struct engine *e, int seed, enum status expected)
{
    return submit_between(e, NULL, NULL, seed, expected);
}

static enum job_finish finish(struct job *job, int32_t *tokens)
{
    struct job_snapshot snapshot;
    struct job_token token;
    int n = 0;
    do {
        job_wait(job);
        job_snapshot(job, &snapshot);
        while (job_read(job, &token, 1))
            tokens[n++] = token.token;
    } while (snapshot.finish == FINISH_NONE);
    if (snapshot.finish == FINISH_ERROR)
        assert_int_equal(snapshot.error.status, STATUS_DEVICE);
    job_release(job);
    return snapshot.finish;
}

static void hold_gpus(bool held)
{
    for (int i = 0; i < FAKE_GPUS; i++)
        fake_gpus[i].held = held;
}

/* Jobs go where there is least to do; the same job gives the same tokens on either. */
static void test_load_is_shared(void **state)
{
    (void)state;
    enum { N = 12 };
    struct engine *e = open_engine("cuda:1,cuda:0", 2);
    struct engine_info info;
    struct engine_stats stats;
    struct engine_device device;
    engine_info(e, &info);
    assert_true(info.n_devices == 2 && info.n_slots == 4);
    assert_string_equal(info.backend, "cuda");
    engine_device(e, 1, &device);
    assert_true(device.n_slots == 2 && device.total_bytes == (size_t)2 << 30);
    assert_string_equal(device.name, "Fake (cuda:0)");
    char row[256];
    engine_device_row(&device, row, sizeof(row));
    assert_non_null(strstr(row, "134 MB")); /* free */

    hold_gpus(true);
    struct job *jobs[N];
    for (int i = 0; i < N; i++) /* two slots and four waiting on each: full */
        jobs[i] = submit(e, i / 2, STATUS_OK);
    job_release(submit(e, 0, STATUS_BUSY));
    engine_stats(e, &stats);
    assert_true(stats.n_running + stats.n_waiting == N && stats.n_slots == 4 && !stats.failed);
    hold_gpus(false);
    for (int i = 0; i < N; i += 2) {
        int32_t a[12], b[12];
        assert_int_equal(finish(jobs[i], a), FINISH_LENGTH);
        assert_int_equal(finish(jobs[i + 1], b), FINISH_LENGTH);
        assert_memory_equal(a, b, sizeof(a));
    }
    assert_int_equal(fake_gpus[0].n_begun, N / 2);
    assert_int_equal(fake_gpus[1].n_begun, N / 2);
    engine_stats(e, &stats);
    assert_int_equal(stats.n_prompt_tokens, 3 * N);
    assert_int_equal(stats.n_output_tokens, 12 * N);

    hold_gpus(true); /* parked readers on both are woken through the one list */
    for (int i = 0; i < 4; i++) {
        jobs[i] = submit(e, i, STATUS_OK);
        assert_true(job_park(jobs[i]));
    }
    hold_gpus(false);
    for (int n = 0; n < 4;) {
        struct job *ready = engine_take_ready(e);
        n += ready != NULL;
        job_release(ready);
    }
    engine_drain(e);
    job_release(submit(e, 0, STATUS_SHUTDOWN));
    for (int i = 0; i < 4; i++) {
        int32_t tokens[12];
        assert_int_equal(finish(jobs[i], tokens), FINISH_LENGTH);
    }
    engine_close(e);
}

/* A device that fails ends its own jobs; the others go on and get the new ones. */
/* With as much to do on either, a state goes on where it is. */
static void test_state_draws_its_jobs(void **state)
{
    (void)state;
    struct engine *e = open_engine("cuda:0,cuda:1", 2);
    struct engine_info info;
    struct image_store store;
    struct image *image = NULL;
    int32_t tokens[12];
    engine_info(e, &info);
    image_store_init(&store, info.fingerprint, info.n_state_values, info.config->vocab_size, 0,
                     1 << 20);
    assert_int_equal(image_new(&image, &store, NULL), STATUS_OK);

    hold_gpus(true);
    struct job *first = submit(e, 0, STATUS_OK);
    struct job *second = submit_between(e, NULL, image, 1, STATUS_OK);
    hold_gpus(false);
    finish(first, tokens);
    finish(second, tokens);
    assert_true(engine_state_is_resident(e, image));

    int before = fake_gpus[0].n_rows;
    finish(submit_between(e, image, NULL, 2, STATUS_OK), tokens);
    assert_int_equal(fake_gpus[0].n_rows, before); /* though ties go to the first */
    assert_false(engine_state_is_resident(e, image));

    struct image *lost = NULL; /* what a device had that failed is nowhere on it */
    assert_int_equal(image_new(&lost, &store, NULL), STATUS_OK);
    finish(submit_between(e, NULL, lost, 3, STATUS_OK), tokens);
    assert_true(engine_state_is_resident(e, lost));
    for (int i = 0; i < FAKE_GPUS; i++)
        fake_gpus[i].broken = true;
    assert_int_equal(finish(submit(e, 4, STATUS_OK), tokens), FINISH_ERROR);
    for (int i = 0; i < FAKE_GPUS; i++)
        fake_gpus[i].broken = false;
    assert_false(engine_state_is_resident(e, lost));
    image_release(lost);

    engine_close(e);
    image_release(image);
    image_store_free(&store);
}

static void test_one_of_two_fails(void **state)
{
    (void)state;
    struct engine *e = open_engine("cuda:0,cuda:1", 4);
    struct engine_stats stats;
    struct job *jobs[6];
    int32_t tokens[12];
    hold_gpus(true);
    for (int i = 0; i < 6; i++)
        jobs[i] = submit(e, i, STATUS_OK);
    fake_gpus[0].broken = true;
    hold_gpus(false);
    for (int i = 0; i < 6; i++)
        assert_int_equal(finish(jobs[i], tokens), i % 2 ? FINISH_LENGTH : FINISH_ERROR);
    engine_stats(e, &stats);
    assert_true(stats.failed && stats.n_running == 0 && stats.n_waiting == 0);
    for (int i = 0; i < 3; i++)
        assert_int_equal(finish(submit(e, i, STATUS_OK), tokens), FINISH_LENGTH);
    fake_gpus[1].broken = true;
    assert_int_equal(finish(submit(e, 0, STATUS_OK), tokens), FINISH_ERROR);
    job_release(submit(e, 0, STATUS_DEVICE));
    engine_close(e);
    fake_gpus[0].broken = fake_gpus[1].broken = false;
}

static void test_auto_is_the_first_gpu(void **state)
{
    (void)state;
    struct engine_info info;
    for (n_fake_gpus = 0; n_fake_gpus < 3; n_fake_gpus++) {
        struct engine *e = open_engine("auto", 2);
        engine_info(e, &info);
        assert_string_equal(info.backend, n_fake_gpus ? "cuda" : "cpu");
        assert_int_equal(info.n_devices, 1);
        engine_close(e);
    }
    n_fake_gpus = FAKE_GPUS;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_names),
        cmocka_unit_test(test_defaults),
        cmocka_unit_test(test_dtypes),
        cmocka_unit_test(test_as_many_slots_as_fit),
        cmocka_unit_test(test_load_is_shared),
        cmocka_unit_test(test_state_draws_its_jobs),
        cmocka_unit_test(test_one_of_two_fails),
        cmocka_unit_test(test_auto_is_the_first_gpu),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
