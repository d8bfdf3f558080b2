/* test_image.c - states outside the device: sessions that go on, fork, are kept, rolled back,
 * written to bytes and read again, moved out of their slots, and carried over a restart, in random
 * order. Beside each the same history is computed from its first token, with the same chunks, by
 * the model alone: tokens and states must be equal bit for bit.
 *
 * LATTE_IMAGE_OPS operations for each model and backend (120).
 */
#include "tests/unit/unit.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/engine.h"
#include "tests/unit/model_files.h"
#include "tests/unit/model_run.h"

enum {
    CHUNK = 8,
    N_SESSIONS = 9, /* of 2 slots */
    N_KEPT = 4,
    MAX_PROMPT = 20,
    MAX_OUTPUT = 6,
    MAX_DEPTH = 5, /* turns; after that a session begins again */
};

static uint64_t random_state;

static int random_below(int n)
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (int)((random_state >> 33) % (uint64_t)n);
}

/* ---- histories ---- */

struct turn {
    int n_prompt, n_output;
    int32_t prompt[MAX_PROMPT + IMAGE_MAX_PENDING], output[MAX_OUTPUT];
    struct sampling_params sampling;
};

/* A session, or a kept state of one. */
struct history {
    int n_turns;
    struct turn turns[MAX_DEPTH];
    struct image *image; /* NULL: no turns */
};

static void forget(struct history *h)
{
    image_release(h->image);
    *h = (struct history){0};
}

static void copy_history(struct history *to, const struct history *from)
{
    if (from->image)
        image_hold(from->image);
    image_release(to->image);
    *to = *from;
}

/* ---- the server's side ---- */

struct world {
    const char *dir, *device, *label;
    struct engine *engine;
    struct image_store stores[2], *store; /* one for each engine, in turns */
    int32_t vocab_size;
    struct run run; /* the oracle */
    struct history sessions[N_SESSIONS], kept[N_KEPT];
};

static void open_engine(struct world *w)
{
    struct engine_options o;
    struct engine_info info;
    struct error err;
    engine_options_init(&o);
    o.model_dir = w->dir;
    o.device = w->device;
    o.n_threads = 1;
    o.n_slots = 2;
    o.chunk_tokens = CHUNK;
    if (engine_open(&w->engine, &o, &err))
        fail_msg("%s: %s", w->label, err.text);
    engine_info(w->engine, &info);
    w->vocab_size = info.config->vocab_size;
    w->store = w->store == &w->stores[0] ? &w->stores[1] : &w->stores[0];
    image_store_init(w->store, info.fingerprint, info.n_state_values, info.config->vocab_size,
                     info.max_position, (size_t)256 << 20);
}

static void fill_turn(struct world *w, struct turn *turn, const struct image *from)
{
    turn->n_prompt = from ? from->n_pending : 0;
    for (int i = 0; i < turn->n_prompt; i++)
        turn->prompt[i] = from->pending[i];
    int n_new = 1 + random_below(MAX_PROMPT);
    for (int i = 0; i < n_new; i++)
        turn->prompt[turn->n_prompt++] = random_below(w->vocab_size);
    sampling_params_init(&turn->sampling);
    turn->sampling.seed = (uint64_t)random_below(1 << 30);
    turn->sampling.ignore_eos = true;
    if (random_below(3) == 0)
        turn->sampling.temperature = 0;
    if (random_below(3) == 0)
        turn->sampling.repetition_penalty = 1.3f;
}

static void run_job(struct world *w, struct turn *turn, int max_tokens, struct image *from,
                    struct image *into)
{
    struct job_request request = {.prompt = turn->prompt,
                                  .n_prompt = (size_t)turn->n_prompt,
                                  .max_tokens = max_tokens,
                                  .prompt_logprobs = -1,
                                  .sampling = turn->sampling,
                                  .from = from,
                                  .into = into};
    struct job *job = NULL;
    struct job_snapshot snapshot;
    struct job_token token;
    struct error err;
    if (job_new(&job, &request, &err) || engine_submit(w->engine, job, &err))
        fail_msg("%s: %s", w->label, err.text);
    turn->n_output = 0;
    do {
        job_wait(job);
        job_snapshot(job, &snapshot);
        while (job_read(job, &token, 1))
            turn->output[turn->n_output++] = token.token;
    } while (snapshot.finish == FINISH_NONE);
    if (snapshot.finish != FINISH_LENGTH)
        fail_msg("%s: the job ended with %d: %s", w->label, snapshot.finish, snapshot.error.text);
    job_release(job);
}

/* ---- the oracle ---- */

/* A turn by steps of the model: what it says, and logits of the last row if anything is drawn. */
static void compute_turn(struct world *w, const struct turn *turn, int32_t *output, float *logits)
{
    struct sampler *sampler = NULL;
    struct error err;
    uint64_t before = model_position(w->run.model, 0);
    if (sampler_open(&sampler, 1, w->vocab_size, NULL, 0, &err))
        fail_msg("%s", err.text);
    for (int i = 0; i < turn->n_prompt; i += CHUNK) {
        int rows = turn->n_prompt - i < CHUNK ? turn->n_prompt - i : CHUNK;
        run_feed(&w->run, 0, turn->prompt + i, rows, LOGITS_LAST, logits);
    }
    for (int i = 0; i < turn->n_prompt; i++)
        sampler_note(sampler, 0, turn->prompt[i], false);
    for (int n = 0; n < turn->n_output; n++) {
        struct sampled sampled;
        if (n)
            run_feed(&w->run, 0, &output[n - 1], 1, LOGITS_LAST, logits);
        sampler_draw(sampler, 0, logits, &turn->sampling,
                     before + (uint64_t)turn->n_prompt + (uint64_t)n, n, &sampled);
        output[n] = sampled.token;
        sampler_note(sampler, 0, sampled.token, true);
    }
    sampler_close(sampler);
}

/* The whole history again, from its first token. */
static void check(struct world *w, const struct history *h)
{
    float *logits = calloc((size_t)w->vocab_size, sizeof(*logits));
    model_reset(w->run.model, 0);
    uint64_t length = 0;
    for (int t = 0; t < h->n_turns; t++) {
        const struct turn *turn = &h->turns[t];
        int32_t output[MAX_OUTPUT];
        compute_turn(w, turn, output, logits);
        if (memcmp(output, turn->output, (size_t)turn->n_output * sizeof(*output)) != 0)
            fail_msg("%s: turn %d of %d says something else than its whole history", w->label, t,
                     h->n_turns);
        length = model_position(w->run.model, 0) + (turn->n_output > 0);
    }
    free(logits);
    if (!h->image)
        return;
    if (h->image->position != model_position(w->run.model, 0) || image_length(h->image) != length)
        fail_msg("%s: the state is at %llu with %d pending; it has seen %llu of %llu tokens",
                 w->label, (unsigned long long)h->image->position, h->image->n_pending,
                 (unsigned long long)model_position(w->run.model, 0), (unsigned long long)length);
    size_t n;
    float *expected = run_state(&w->run, 0, &n);
    assert_int_equal(n, w->store->n_values);
    if (memcmp(expected, h->image->values, n * sizeof(*expected)) != 0)
        fail_msg("%s: the state of a session of %d turns differs by %g", w->label, h->n_turns,
                 run_difference(expected, h->image->values, n));
    free(expected);
}

/* ---- operations ---- */

static void go_on(struct world *w, struct history *h)
{
    struct error err;
    struct image *into = NULL;
    if (h->n_turns == MAX_DEPTH)
        forget(h);
    struct turn *turn = &h->turns[h->n_turns++];
    fill_turn(w, turn, h->image);
    if (image_new(&into, w->store, &err))
        fail_msg("%s", err.text);
    run_job(w, turn, random_below(MAX_OUTPUT + 1), h->image, into);
    image_release(h->image);
    h->image = into;
    check(w, h);
}

/* The image as bytes and back. */
static void carry_over(struct world *w, struct history *h, struct image_store *to)
{
    struct bytes file = {0}, again = {0};
    struct image *image = NULL;
    struct error err;
    if (!h->image)
        return;
    image_write(h->image, &file);
    assert_int_equal(file.n, image_file_bytes(h->image->store));
    if (image_parse(&image, to, file.data, file.n, &err))
        fail_msg("%s: %s", w->label, err.text);
    image_write(image, &again);
    assert_int_equal(again.n, file.n);
    assert_memory_equal(again.data, file.data, file.n);
    bytes_free(&file);
    bytes_free(&again);
    image_release(h->image);
    h->image = image;
}

/* Everything goes over to another engine as bytes. */
static void restart(struct world *w)
{
    struct image_store *before = w->store;
    engine_close(w->engine);
    open_engine(w);
    for (int i = 0; i < N_SESSIONS; i++)
        carry_over(w, &w->sessions[i], w->store);
    for (int i = 0; i < N_KEPT; i++)
        carry_over(w, &w->kept[i], w->store);
    assert_int_equal(before->n_images, 0);
}

static void operate(struct world *w)
{
    struct history *h = &w->sessions[random_below(N_SESSIONS)];
    struct history *other = &w->sessions[random_below(N_SESSIONS)];
    struct history *kept = &w->kept[random_below(N_KEPT)];
    switch (random_below(10)) {
    case 0: /* fork */
        copy_history(other, h);
        break;
    case 1: /* snapshot */
        copy_history(kept, h);
        break;
    case 2: /* rollback */
        copy_history(h, kept);
        check(w, h);
        break;
    case 3: /* export, import */
        carry_over(w, h, w->store);
        break;
    default:
        go_on(w, h);
    }
}

static void check_model(const char *dir, const char *device, const char *name, int n_ops)
{
    static struct world w;
    char label[100];
    snprintf(label, sizeof(label), "%s on %s", name, device);
    w = (struct world){.dir = dir, .device = device, .label = label};
    open_engine(&w);
    run_open(&w.run, dir, &(struct run_options){device, 1, DTYPE_F32, 1});
    random_state = 20261128;
    for (int i = 0; i < n_ops; i++) {
        operate(&w);
        if (i % 60 == 59)
            restart(&w);
    }
    for (int i = 0; i < N_SESSIONS; i++)
        forget(&w.sessions[i]);
    for (int i = 0; i < N_KEPT; i++)
        forget(&w.kept[i]);
    engine_close(w.engine);
    assert_int_equal(w.store->n_images, 0);
    assert_int_equal(w.store->used_bytes, 0);
    run_close(&w.run);
}

static bool is_causal(const struct test_model *m)
{
    return strcmp(m->name, "classifier") != 0 && strcmp(m->name, "embedder") != 0;
}

static void test_random_operations(void **state)
{
    (void)state;
    const char *asked = getenv("LATTE_IMAGE_OPS");
    int n_ops = asked ? atoi(asked) : 120, n = 0;
    for (size_t i = 0; i < n_test_models; i++) {
        char dir[100];
        if (!is_causal(&test_models[i]) || !strcmp(test_models[i].name, "transformer++"))
            continue; /* its context is too short for these histories */
        assert_int_equal(test_dir_make(dir, sizeof(dir)), 0);
        assert_int_equal(model_files_write(dir, test_models[i].config_json, 7, NULL), 0);
        check_model(dir, "ref", test_models[i].name, n_ops);
        check_model(dir, "cpu", test_models[i].name, n_ops);
        n += 2 * n_ops;
        test_dir_remove(dir);
    }
    print_message("seed 20261128, %d operations in all\n", n);
}

/* ---- limits ---- */

static void test_memory_is_bounded(void **state)
{
    (void)state;
    struct image_store store;
    struct image *images[3] = {NULL};
    struct error err;
    image_store_init(&store, "00112233445566778899aabbccddeeff", 100, 50, 0, 0);
    store.limit_bytes = 2 * image_bytes(&store);
    assert_int_equal(image_new(&images[0], &store, &err), STATUS_OK);
    assert_int_equal(image_new(&images[1], &store, &err), STATUS_OK);
    assert_int_equal(image_new(&images[2], &store, &err), STATUS_BUSY);
    image_release(images[0]);
    assert_int_equal(image_new(&images[2], &store, &err), STATUS_OK);
    assert_true(images[2]->id != images[1]->id);
    image_release(images[1]);
    image_release(images[2]);
    image_release(NULL);
    assert_int_equal(store.used_bytes, 0);
}

/* Files that a checksum cannot tell from good ones. */
static void test_numbers_are_checked(void **state)
{
    (void)state;
    struct image_store store;
    struct image *image = NULL, *read = NULL;
    struct error err;
    image_store_init(&store, "00112233445566778899aabbccddeeff", 3, 50, 64, 1 << 20);
    static const struct {
        uint64_t position;
        int n_pending;
        int32_t pending;
        const char *word; /* NULL: good */
    } cases[] = {{63, 1, 49, NULL},
                 {64, 0, 0, NULL},
                 {64, 1, 3, "position"},
                 {65, 0, 0, "position"},
                 {10, 1, 50, "pending"},
                 {10, 1, -1, "pending"},
                 {UINT64_MAX, 1, 0, "position"},
                 {0, 0, 0, NULL}};
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        struct bytes file = {0};
        assert_int_equal(image_new(&image, &store, &err), STATUS_OK);
        memset(image->values, 0, 3 * sizeof(float));
        image->position = cases[i].position;
        image->n_pending = cases[i].n_pending;
        image->pending[0] = cases[i].pending;
        image_write(image, &file);
        image_release(image);
        enum status st = image_parse(&read, &store, file.data, file.n, &err);
        if (cases[i].word && (st != STATUS_INVALID || !strstr(err.text, cases[i].word)))
            fail_msg("case %zu: status %d, expected a word on %s", i, st, cases[i].word);
        if (!cases[i].word) {
            assert_int_equal(st, STATUS_OK);
            assert_true(read->position == cases[i].position);
            image_release(read);
        }
        bytes_free(&file);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_random_operations),
        cmocka_unit_test(test_memory_is_bounded),
        cmocka_unit_test(test_numbers_are_checked),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
