/* test_model_golden.c - every kind of model against a plain PyTorch model.
 *
 * The oracle is tests/golden/models/reference.py in float64; make.py beside it wrote the models
 * and the answers, and checked that these do not hang on rounding: float32 arithmetic in another
 * order moves them by less than 5e-5, and greedy tokens lead by 5e-3 or more.
 */
#include "tests/unit/unit.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tests/unit/model_run.h"

/* Sums of float32 in any order, over a few layers, on logits of deviation 1 to 3. A GPU is held
 * to 1e-4. */
#define LOGITS_TOLERANCE 2e-4
#define CUDA_TOLERANCE 1e-4
/* A GPU's products of bf16 weights take inputs rounded to bf16 too: errors of 2^-9 at each of the
 * dozen roundings between a token and its logits, more in the models whose latent logits are
 * widened on purpose (wide-theta), since an error of e in those is a factor of exp(e) in a weight.
 */
#define CUDA_BF16_TOLERANCE 0.15
#define CUDA_BF16_WIDE_TOLERANCE 0.6
/* State values of a few units; see run_state_excess. */
#define STATE_TOLERANCE 5e-4

enum { N_MODELS = 20 };

struct golden {
    struct safetensors *file;
    const char *dir;
};

static void golden_open(struct golden *g, const char *dir)
{
    char path[200];
    struct error err;
    snprintf(path, sizeof(path), "%s/expected", dir);
    g->dir = dir;
    if (safetensors_open(&g->file, path, &err))
        fail_msg("%s", err.text);
}

static const struct tensor *golden_find(const struct golden *g, const char *name)
{
    const struct tensor *t = safetensors_find(g->file, name);
    if (!t)
        fail_msg("%s: no %s in expected", g->dir, name);
    return t;
}

/* Copies, because a mapping need not be aligned; free() them. */
static void *golden_copy(const struct golden *g, const char *name, int *n)
{
    const struct tensor *t = golden_find(g, name);
    void *copy = malloc(t->n_bytes + 1);
    assert_non_null(copy);
    memcpy(copy, t->data, t->n_bytes);
    *n = (int)t->n_values;
    return copy;
}

static double worst_cuda_bf16;

static double tolerance_of(const struct run *r, bool is_bf16)
{
    if (strcmp(model_backend_name(r->model), "cuda") != 0)
        return LOGITS_TOLERANCE;
    if (!is_bf16)
        return CUDA_TOLERANCE;
    return strstr(r->label, "wide-theta") ? CUDA_BF16_WIDE_TOLERANCE : CUDA_BF16_TOLERANCE;
}

static void check_logits(const struct run *r, const char *what, const float *logits,
                         const float *expected, size_t n)
{
    const bool is_bf16 = strstr(what, "bf16") != NULL;
    double difference = run_difference(logits, expected, n);
    if (is_bf16 && !strcmp(model_backend_name(r->model), "cuda"))
        worst_cuda_bf16 = fmax(worst_cuda_bf16, difference);
    if (!(difference <= tolerance_of(r, is_bf16)))
        fail_msg("%s: %s: logits differ by %g", r->label, what, difference);
}

/* Logits of the expected rows out of those of all rows. */
static void check_rows(const struct run *r, const struct golden *g, const char *what,
                       const float *all)
{
    int n_rows, n_expected;
    int32_t *rows = golden_copy(g, "rows", &n_rows);
    float *expected = golden_copy(g, what, &n_expected);
    const int V = r->vocab_size;
    assert_int_equal(n_expected, n_rows * V);
    for (int i = 0; i < n_rows; i++) {
        char where[80];
        snprintf(where, sizeof(where), "%s after token %d", what, rows[i]);
        check_logits(r, where, all + (size_t)rows[i] * (size_t)V, expected + (size_t)i * (size_t)V,
                     (size_t)V);
    }
    free(rows);
    free(expected);
}

static void check_state(struct run *r, const struct golden *g, int slot)
{
    size_t n, at = 0;
    float *state = run_state(r, slot, &n), *expected = calloc(n + 1, sizeof(*expected));
    assert_non_null(expected);
    for (int i = 0; i < model_n_state_tensors(r->model); i++) {
        const struct state_tensor *t = model_state_tensor(r->model, i);
        char name[80];
        snprintf(name, sizeof(name), "state.%s", t->name);
        const struct tensor *e = golden_find(g, name);
        assert_int_equal(e->n_dims, t->n_dims);
        for (int d = 0; d < t->n_dims; d++)
            assert_int_equal(e->shape[d], t->shape[d]);
        memcpy(expected + at, e->data, e->n_bytes);
        at += (size_t)t->n_values;
    }
    double excess = run_state_excess(r, state, expected, STATE_TOLERANCE);
    if (!(excess <= 1))
        fail_msg("%s: the state is off by %g tolerances", r->label, excess);
    free(state);
    free(expected);
}

static int best(const float *logits, int n)
{
    int top = 0;
    for (int i = 1; i < n; i++)
        if (logits[i] > logits[top])
            top = i;
    return top;
}

/* Continue from the last row's logits; each token must be the expected one. */
static void check_greedy(struct run *r, const struct golden *g, int slot, float *logits)
{
    int n;
    int32_t *greedy = golden_copy(g, "greedy", &n);
    for (int i = 0; i < n; i++) {
        int32_t token = best(logits, r->vocab_size);
        if (token != greedy[i])
            fail_msg("%s: greedy token %d is %d, expected %d", r->label, i, token, greedy[i]);
        run_feed(r, slot, &token, 1, LOGITS_LAST, logits);
    }
    if (model_max_position(r->model)) /* make.py goes as far as full attention reaches */
        assert_int_equal(model_position(r->model, slot), model_max_position(r->model));
    free(greedy);
}

/* A state moved to a position nobody waits for. */
static void check_far(struct run *r, const struct golden *g)
{
    if (!safetensors_find(g->file, "far"))
        return;
    int n, n_tokens, n_expected;
    int64_t *far = golden_copy(g, "far", &n);
    int32_t *tokens = golden_copy(g, "tokens", &n_tokens);
    float *expected = golden_copy(g, "far_logits", &n_expected);
    const size_t V = (size_t)r->vocab_size;
    const int first = (int)far[0], end = (int)far[2], kept = (int)far[3];
    float *logits = calloc((size_t)end * V, sizeof(*logits));
    assert_non_null(logits);

    model_reset(r->model, 2);
    run_feed(r, 2, tokens, first, LOGITS_NONE, NULL);
    model_set_position(r->model, 2, (uint64_t)far[1]);
    run_feed(r, 2, tokens + first, end - first, LOGITS_ALL, logits);
    check_logits(r, "far away", logits + (size_t)(end - first - kept) * V, expected,
                 (size_t)kept * V);
    assert_int_equal(model_position(r->model, 2), far[1] + end - first);
    free(far);
    free(tokens);
    free(expected);
    free(logits);
}

static void check_model(const char *dir, const char *backend, enum dtype dtype)
{
    struct run r;
    struct golden g;
    int n;
    golden_open(&g, dir);
    run_open(&r, dir, &(struct run_options){backend, 2, dtype, 3});
    const char *what = dtype == DTYPE_F32 ? "logits" : "logits_bf16";
    const size_t V = (size_t)r.vocab_size;
    int32_t *tokens = golden_copy(&g, "tokens", &n);
    float *logits = calloc((size_t)n * V, sizeof(*logits));
    assert_non_null(logits);

    run_feed(&r, 0, tokens, n, LOGITS_ALL, logits); /* the whole prompt at once */
    check_rows(&r, &g, what, logits);
    for (int i = 0; i < n; i++) /* and token by token */
        run_feed(&r, 1, tokens + i, 1, LOGITS_LAST, logits + (size_t)i * V);
    check_rows(&r, &g, what, logits);
    if (dtype == DTYPE_F32) {
        check_state(&r, &g, 0);
        check_state(&r, &g, 1);
        check_greedy(&r, &g, 0, logits + (size_t)(n - 1) * V);
        check_far(&r, &g);
    }
    free(tokens);
    free(logits);
    run_close(&r);
    safetensors_close(g.file);
}

static void check_all(const char *backend, enum dtype dtype)
{
    struct run_models models;
    run_list_models(&models);
    assert_int_equal(models.n, N_MODELS);
    for (int i = 0; i < models.n; i++)
        if (!run_skips(backend, models.dirs[i]))
            check_model(models.dirs[i], backend, dtype);
}

static void test_ref_f32(void **state)
{
    (void)state;
    check_all("ref", DTYPE_F32);
}

static void test_cpu_f32(void **state)
{
    (void)state;
    check_all("cpu", DTYPE_F32);
}

/* The engine rounds matrices to bf16, the oracle too: the tolerance stays that of f32. */
static void test_ref_bf16(void **state)
{
    (void)state;
    check_all("ref", DTYPE_BF16);
}

static void test_cpu_bf16(void **state)
{
    (void)state;
    check_all("cpu", DTYPE_BF16);
}

static void test_cuda_f32(void **state)
{
    (void)state;
    check_all("cuda", DTYPE_F32);
}

static void test_cuda_bf16(void **state)
{
    (void)state;
    check_all("cuda", DTYPE_BF16);
    print_message("bf16 on the device: logits within %.3g\n", worst_cuda_bf16);
}

/* The model in this repository, against logits of reference.py (bundled.py writes them). */
static void test_bundled_model(void **state)
{
    (void)state;
    if (access("weights/latte-12m/model.safetensors.index.json", R_OK) != 0 &&
        access("weights/latte-12m/model.safetensors", R_OK) != 0) {
        print_message("SKIPPED: weights/latte-12m has no weights yet\n");
        skip();
    }
    struct run r;
    struct golden g;
    int n;
    golden_open(&g, "tests/golden/models/bundled");
    run_open(&r, "weights/latte-12m", &(struct run_options){"cpu", 2, DTYPE_BF16, 1});
    int32_t *tokens = golden_copy(&g, "tokens", &n);
    float *logits = calloc((size_t)n * (size_t)r.vocab_size, sizeof(*logits));
    assert_non_null(logits);
    run_feed(&r, 0, tokens, n, LOGITS_ALL, logits);
    check_rows(&r, &g, "logits", logits);
    check_greedy(&r, &g, 0, logits + (size_t)(n - 1) * (size_t)r.vocab_size);
    free(tokens);
    free(logits);
    run_close(&r);
    safetensors_close(g.file);
}

int main(void)
{
    const struct CMUnitTest hosts[] = {
        cmocka_unit_test(test_ref_f32),       cmocka_unit_test(test_cpu_f32),
        cmocka_unit_test(test_ref_bf16),      cmocka_unit_test(test_cpu_bf16),
        cmocka_unit_test(test_bundled_model),
    };
    const struct CMUnitTest devices[] = {
        cmocka_unit_test(test_cuda_f32),
        cmocka_unit_test(test_cuda_bf16),
    };
    int n_failed = cmocka_run_group_tests(hosts, NULL, NULL);
    if (backend_cuda_count() > 0)
        n_failed += cmocka_run_group_tests(devices, NULL, NULL);
    return n_failed;
}
