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
#include "tests/unit/history.h"
#include "tests/unit/model_files.h"
#include "tests/unit/model_run.h"

enum {
    N_SESSIONS = 9, /* of 2 slots */
    N_KEPT = 4,
};

/* ---- histories ---- */

/* A session, or a kept state of one. */
struct member {
    struct history history;
    struct image *image; /* NULL: no turns */
};

static void forget(struct member *h)
{
    image_release(h->image);
    *h = (struct member){0};
}

static void copy_history(struct member *to, const struct member *from)
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
    struct member sessions[N_SESSIONS], kept[N_KEPT];
};

static void open_engine(struct world *w)
{
    struct engine_info info;
    history_open_engine(&w->engine, &info, w->dir, w->device);
    w->vocab_size = info.config->vocab_size;
    w->store = w->store == &w->stores[0] ? &w->stores[1] : &w->stores[0];
    image_store_init(w->store, info.fingerprint, info.n_state_values, info.config->vocab_size,
                     info.max_position, (size_t)256 << 20);
}

/* ---- operations ---- */

static void go_on(struct world *w, struct member *h)
{
    struct error err;
    struct image *into = NULL;
    if (h->history.n_turns == HISTORY_MAX_TURNS)
        forget(h);
    struct turn *turn = &h->history.turns[h->history.n_turns++];
    history_fill(turn, h->image, w->vocab_size);
    if (image_new(&into, w->store, &err))
        fail_msg("%s", err.text);
    history_run(turn, w->engine, history_below(HISTORY_MAX_OUTPUT + 1), h->image, into, w->label);
    image_release(h->image);
    h->image = into;
    history_check(&h->history, h->image, &w->run, w->vocab_size, w->label);
}

/* The image as bytes and back. */
static void carry_over(struct world *w, struct member *h, struct image_store *to)
{
    struct bytes file = {0}, again = {0};
    struct image *image = NULL;
    struct error err;
    if (!h->image)
        return;
    image_write(h->image, &file);
    assert_int_equal(file.n, image_file_bytes(h->image->store));
    if (image_parse(&image, to, file.data, file.n, 0, &err))
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
    image_store_free(before); /* asserts that none is left */
}

static void operate(struct world *w)
{
    struct member *h = &w->sessions[history_below(N_SESSIONS)];
    struct member *other = &w->sessions[history_below(N_SESSIONS)];
    struct member *kept = &w->kept[history_below(N_KEPT)];
    switch (history_below(10)) {
    case 0: /* fork */
        copy_history(other, h);
        break;
    case 1: /* snapshot */
        copy_history(kept, h);
        break;
    case 2: /* rollback */
        copy_history(h, kept);
        history_check(&h->history, h->image, &w->run, w->vocab_size, w->label);
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
    history_open_oracle(&w.run, dir, device);
    history_seed(20261128);
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
    assert_int_equal(w.store->used_bytes, 0);
    image_store_free(w.store);
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
        for (const char *const *device = run_backends(); *device; device++, n += n_ops)
            check_model(dir, *device, test_models[i].name, n_ops);
        test_dir_remove(dir);
    }
    print_message("seed 20261128, %d operations in all\n", n);
}

/* ---- marks ---- */

enum { MAX_MARKED = 40 };

/* A prompt with marks, and what a job with it left. */
struct marked {
    int32_t prompt[MAX_MARKED], output[HISTORY_MAX_OUTPUT];
    struct job_request request; /* images are the caller's */
};

static void run_marked(struct world *w, struct marked *m)
{
    struct job *job = NULL;
    struct job_snapshot snapshot;
    struct error err;
    size_t n = 0;
    if (image_new(&m->request.into, w->store, &err) || job_new(&job, &m->request, &err) ||
        engine_submit(w->engine, job, &err))
        fail_msg("%s: %s", w->label, err.text);
    do {
        struct job_token token;
        job_wait(job);
        job_snapshot(job, &snapshot);
        while (job_read(job, &token, 1))
            m->output[n++] = token.token;
    } while (snapshot.finish == FINISH_NONE);
    if (snapshot.finish != FINISH_LENGTH)
        fail_msg("%s: the job ended with %d: %s", w->label, snapshot.finish, snapshot.error.text);
    assert_int_equal(snapshot.n_marks_done, m->request.n_marks);
    assert_int_equal(n, m->request.max_tokens);
    job_release(job);
}

static void fill_marked(struct world *w, struct marked *m)
{
    *m = (struct marked){0};
    struct job_request *r = &m->request;
    r->prompt = m->prompt;
    r->n_prompt = 1 + (size_t)history_below(MAX_MARKED);
    r->prompt_logprobs = -1;
    r->max_tokens = history_below(HISTORY_MAX_OUTPUT + 1);
    for (size_t i = 0; i < r->n_prompt; i++)
        m->prompt[i] = history_below(w->vocab_size);
    sampling_params_init(&r->sampling);
    r->sampling.seed = (uint64_t)history_below(1 << 30);
    r->sampling.ignore_eos = true;
    for (size_t at = 0; r->n_marks < JOB_MAX_MARKS; r->n_marks++) {
        struct error err;
        at += 1 + (size_t)history_below(12);
        if (at > r->n_prompt)
            break;
        r->marks[r->n_marks].at = at;
        assert_int_equal(image_new(&r->marks[r->n_marks].image, w->store, &err), STATUS_OK);
    }
}

static void expect_state(struct world *w, const struct image *image)
{
    size_t n;
    float *expected = run_state(&w->run, 0, &n);
    assert_int_equal(image->position, model_position(w->run.model, 0));
    assert_int_equal(image->n_pending, 0);
    if (memcmp(expected, image->values, n * sizeof(*expected)) != 0)
        fail_msg("%s: the state after %llu tokens of a prompt differs by %g", w->label,
                 (unsigned long long)image->position, run_difference(expected, image->values, n));
    free(expected);
}

/* The prompt by steps of the model, cut at the same places. */
static void check_marks(struct world *w, const struct marked *m)
{
    const struct job_request *r = &m->request;
    float *logits = calloc((size_t)w->vocab_size, sizeof(*logits));
    size_t at = 0;
    model_reset(w->run.model, 0);
    for (int k = 0; k < r->n_marks; k++) {
        while (at < r->marks[k].at) {
            size_t end = (at / HISTORY_CHUNK + 1) * HISTORY_CHUNK;
            end = end < r->marks[k].at ? end : r->marks[k].at;
            run_feed(&w->run, 0, m->prompt + at, (int)(end - at), LOGITS_LAST, logits);
            at = end;
        }
        expect_state(w, r->marks[k].image);
    }
    free(logits);
}

/* From a mark's state the rest of the prompt gives the same tokens and leaves the same state. */
static void check_from_mark(struct world *w, const struct marked *m, int mark)
{
    struct marked again = *m;
    struct job_request *r = &again.request;
    r->prompt = again.prompt;
    r->from = m->request.marks[mark].image;
    r->n_seen = m->request.marks[mark].at;
    r->n_marks = 0;
    for (int k = mark + 1; k < m->request.n_marks; k++) { /* the same chunks */
        r->marks[r->n_marks].at = m->request.marks[k].at;
        assert_int_equal(image_new(&r->marks[r->n_marks++].image, w->store, NULL), STATUS_OK);
    }
    run_marked(w, &again);
    assert_memory_equal(again.output, m->output, (size_t)r->max_tokens * sizeof(*again.output));
    assert_int_equal(r->into->position, m->request.into->position);
    assert_int_equal(r->into->n_pending, m->request.into->n_pending);
    assert_memory_equal(r->into->values, m->request.into->values,
                        w->store->n_values * sizeof(float));
    for (int k = 0; k < r->n_marks; k++) {
        const struct image *first = m->request.marks[mark + 1 + k].image;
        assert_memory_equal(r->marks[k].image->values, first->values,
                            w->store->n_values * sizeof(float));
        image_release(r->marks[k].image);
    }
    image_release(r->into);
}

static void check_model_marks(const char *dir, const char *device, const char *name, int n_rounds)
{
    static struct world w;
    char label[100];
    snprintf(label, sizeof(label), "%s on %s", name, device);
    w = (struct world){.dir = dir, .device = device, .label = label};
    open_engine(&w);
    history_open_oracle(&w.run, dir, device);
    history_seed(41);
    for (int i = 0; i < n_rounds; i++) {
        struct marked m;
        fill_marked(&w, &m);
        run_marked(&w, &m);
        check_marks(&w, &m);
        for (int k = 0; k < m.request.n_marks; k++)
            if (m.request.marks[k].at < m.request.n_prompt)
                check_from_mark(&w, &m, k);
        for (int k = 0; k < m.request.n_marks; k++)
            image_release(m.request.marks[k].image);
        image_release(m.request.into);
    }
    engine_close(w.engine);
    image_store_free(w.store);
    run_close(&w.run);
}

static void test_marks(void **state)
{
    (void)state;
    for (size_t i = 0; i < n_test_models; i++) {
        char dir[100];
        if (!is_causal(&test_models[i]) || !strcmp(test_models[i].name, "transformer++"))
            continue;
        assert_int_equal(test_dir_make(dir, sizeof(dir)), 0);
        assert_int_equal(model_files_write(dir, test_models[i].config_json, 7, NULL), 0);
        for (const char *const *device = run_backends(); *device; device++)
            check_model_marks(dir, *device, test_models[i].name, strcmp(*device, "ref") ? 8 : 4);
        test_dir_remove(dir);
    }
}

/* ---- another backend ---- */

/* Run a turn after an image of the world's store; the new image. */
static struct image *take_turn(struct world *w, struct turn *turn, struct image *from)
{
    struct image *into = NULL;
    struct error err;
    if (image_new(&into, w->store, &err))
        fail_msg("%s: %s", w->label, err.text);
    history_run(turn, w->engine, HISTORY_MAX_OUTPUT, from, into, w->label);
    return into;
}

/* One state goes on where it was made and where it was carried to: the same likeliest tokens, and
 * states that are as near as f32 sums in another order. */
static void check_carried(const char *dir, const char *made_on, const char *goes_on_on)
{
    static struct world worlds[2];
    struct turn first, turns[2];
    struct image *after[2];
    char label[200];
    snprintf(label, sizeof(label), "%s: from %s to %s", dir, made_on, goes_on_on);
    worlds[0] = (struct world){.dir = dir, .device = made_on, .label = label};
    worlds[1] = (struct world){.dir = dir, .device = goes_on_on, .label = label};
    for (int i = 0; i < 2; i++)
        open_engine(&worlds[i]);
    history_fill(&first, NULL, worlds[0].vocab_size);
    struct member made = {.image = take_turn(&worlds[0], &first, NULL)}, carried = made;
    image_hold(made.image);
    carry_over(&worlds[1], &carried, worlds[1].store);
    history_fill(&turns[0], made.image, worlds[0].vocab_size);
    turns[0].sampling.temperature = 0;
    turns[1] = turns[0];
    after[0] = take_turn(&worlds[0], &turns[0], made.image);
    after[1] = take_turn(&worlds[1], &turns[1], carried.image);
    assert_memory_equal(turns[0].output, turns[1].output, sizeof(turns[0].output));
    double off = run_difference(after[0]->values, after[1]->values, worlds[0].store->n_values);
    if (off > 1e-4)
        fail_msg("%s: the states differ by %g", label, off);
    image_release(made.image);
    image_release(carried.image);
    for (int i = 0; i < 2; i++) {
        image_release(after[i]);
        engine_close(worlds[i].engine);
        image_store_free(worlds[i].store);
    }
}

static void test_other_backends(void **state)
{
    (void)state;
    history_seed(43);
    for (size_t i = 0; i < n_test_models; i++) {
        char dir[100];
        if (!is_causal(&test_models[i]))
            continue;
        assert_int_equal(test_dir_make(dir, sizeof(dir)), 0);
        assert_int_equal(model_files_write(dir, test_models[i].config_json, 7, NULL), 0);
        for (const char *const *a = run_backends(); *a; a++)
            for (const char *const *b = run_backends(); *b; b++)
                if (a != b)
                    check_carried(dir, *a, *b);
        test_dir_remove(dir);
    }
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
    image_store_free(&store);
}

/* Where no state may be computed again, one that a session has stays in memory until it is written.
 * When the session has gone on and it is only what the next one comes from, it makes room. */
static void test_ancestors_make_room(void **state)
{
    (void)state;
    const int32_t tokens[3] = {1, 2, 3};
    struct image_store store;
    struct image *first = NULL, *second = NULL, *third = NULL;
    struct error err;
    image_store_init(&store, "00112233445566778899aabbccddeeff", 100, 50, 0, 0);
    store.limit_bytes = 2 * image_bytes(&store);
    store.has_files = true;
    assert_int_equal(image_new(&first, &store, &err), STATUS_OK);
    assert_int_equal(image_set_origin(first, NULL, tokens, 3, 0, &err), STATUS_OK);
    assert_int_equal(image_new(&second, &store, &err), STATUS_OK);
    assert_int_equal(image_set_origin(second, first, tokens, 3, 0, &err), STATUS_OK);
    image_keep(first);
    image_keep(second);
    image_release(first);
    image_release(second);
    assert_int_equal(image_new(&third, &store, &err), STATUS_BUSY);
    assert_true(first->is_here && second->is_here);
    image_drop(first);
    assert_int_equal(image_new(&third, &store, &err), STATUS_OK);
    assert_true(!first->is_here && second->is_here);
    image_release(third);
    image_drop(second);
    assert_int_equal(store.used_bytes, 0);
    image_store_free(&store); /* asserts that none is left */
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
        enum status st = image_parse(&read, &store, file.data, file.n, 0, &err);
        if (cases[i].word && (st != STATUS_INVALID || !strstr(err.text, cases[i].word)))
            fail_msg("case %zu: status %d, expected a word on %s", i, st, cases[i].word);
        if (!cases[i].word) {
            assert_int_equal(st, STATUS_OK);
            assert_true(read->position == cases[i].position);
            image_release(read);
        }
        bytes_free(&file);
    }
    image_store_free(&store);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_random_operations),   cmocka_unit_test(test_marks),
        cmocka_unit_test(test_other_backends),      cmocka_unit_test(test_memory_is_bounded),
        cmocka_unit_test(test_ancestors_make_room), cmocka_unit_test(test_numbers_are_checked),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
