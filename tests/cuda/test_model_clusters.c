/* test_model_clusters.c - a model of a shape that has layers of few rows by clusters (cluster.cuh)
 * and of up to 256 by warpgroups (warpgroup.cuh), against the same device without fused layers: two
 * rows, which every block gathers for itself, eleven, which are exchanged, some blocks mixing two
 * of them, and twenty. A session's logits have the same bits in all steps by clusters. On an
 * emulated device this model takes a minute, so there is little else here; test_model_cuda.c has
 * more on a GPU, and explains the tolerances.
 */
#include "tests/unit/unit.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tests/cuda/cuda_tests.h"

#define LOGIT_TOLERANCE 0.2
#define STATE_TOLERANCE 0.1

#define FAR ((uint64_t)1 << 48)

enum { MAX_BATCH = 200, BY_CLUSTERS = 16, PROMPT = 2, MAX_ROWS = 400, N_STEPS = 3, VOCAB = 509 };

static void open_model(struct run *r, const char *dir, bool composed)
{
    const struct run_form form = {.window_dtype = DTYPE_BF16,
                                  .max_rows = MAX_ROWS,
                                  .max_logit_rows = MAX_BATCH,
                                  .composed = composed};
    run_open_as(r, dir, &(struct run_options){"cuda", 1, DTYPE_BF16, MAX_BATCH + 1}, &form);
    assert_int_equal(r->vocab_size, VOCAB);
}

/* Steps of another session, one for each of a backend's places for steps, after which the place of
 * a smaller step's slots has held positions: kernels that read ahead of knowing how many rows
 * there are must not take them for slots. Quick: rows that our own products take, since initcheck
 * does not see what the library's write. */
static void stain(struct run *r)
{
    static const int32_t tokens[MAX_ROWS];
    const struct model_seq seq = {MAX_BATCH, run_quick() ? 40 : MAX_ROWS, LOGITS_LAST};
    const float *logits = NULL;
    struct error err;
    model_reset(r->model, seq.slot);
    model_set_position(r->model, seq.slot, FAR);
    for (int i = 0; i < 2; i++)
        if (model_step(r->model, tokens, &seq, 1, &logits, &err))
            fail_msg("%s: %s", r->label, err.text);
}

/* Step s of sessions 0 .. batch - 1: a prompt, each for itself; then a token each, together. */
static void feed(struct run *r, int batch, int s, float *out)
{
    const int n = s ? 1 : PROMPT, together = s ? batch : 1;
    int32_t tokens[MAX_BATCH * PROMPT];
    struct model_seq seqs[MAX_BATCH];
    const float *logits = NULL;
    struct error err;
    for (int q = 0; q < batch; q++) {
        if (!s)
            model_reset(r->model, q);
        seqs[q] = (struct model_seq){q, n, LOGITS_LAST};
        for (int i = 0; i < n; i++)
            tokens[q * n + i] = (q * 131 + s * 57 + i * 29 + 3) % VOCAB;
    }
    for (int q = 0; q < batch; q += together) {
        if (model_step(r->model, tokens + q * n, seqs + q, together, &logits, &err))
            fail_msg("%s: %s", r->label, err.text);
        memcpy(out + q * VOCAB, logits, (size_t)together * VOCAB * sizeof(*out));
    }
}

/* The first sessions' logits of step s are those they had beside others, of which there were n
 * and now are `batch`. */
static void check_bits(const float *found, int batch, int s, int n)
{
    static float kept[N_STEPS][MAX_BATCH * VOCAB];
    const int both = batch < n ? batch : n;
    for (int q = 0; q < both; q++)
        if (memcmp(found + q * VOCAB, kept[s] + q * VOCAB, VOCAB * sizeof(*found)) != 0)
            fail_msg("step %d: session %d has other logits among %d than among %d", s, q, batch, n);
    if (batch > n)
        memcpy(kept[s], found, (size_t)batch * VOCAB * sizeof(*found));
}

static void check_batch(struct run *fused, struct run *composed, int batch, int *most)
{
    static float found[MAX_BATCH * VOCAB], expected[MAX_BATCH * VOCAB];
    double worst = 0;
    size_t n;
    for (int s = 0; s < N_STEPS; s++) {
        if (s == 1)
            stain(fused);
        feed(fused, batch, s, found);
        feed(composed, batch, s, expected);
        if (batch <= BY_CLUSTERS)
            check_bits(found, batch, s, *most);
        worst = fmax(worst, run_difference(found, expected, (size_t)batch * VOCAB));
    }
    *most = batch > *most ? batch : *most;
    print_message("%d rows: logits differ by %g\n", batch, worst);
    if (!(worst <= LOGIT_TOLERANCE) || worst == 0) /* 0: were they fused at all? */
        fail_msg("%d rows: logits differ by %g", batch, worst);
    float *a = run_state(fused, batch - 1, &n), *b = run_state(composed, batch - 1, &n);
    const double excess = run_state_excess(fused, a, b, STATE_TOLERANCE);
    free(a);
    free(b);
    if (!(excess <= 1))
        fail_msg("%d rows: the last session's state is off by %g tolerances", batch, excess);
}

static void test_few_rows(void **state)
{
    static const int few[] = {2, 11, 20}, quick[] = {2, 9, 17};
    static const int all[] = {1, 2, 3, 5, 8, 9, 13, 16, 17, 33, 64, 65, 128, 200};
    const int *batches = all;
    size_t n = COUNT_OF(all);
    struct run fused, composed;
    char dir[200];
    int most = 0;
    (void)state;
    assert_string_equal(wide_models[N_WIDE_MODELS - 1].name, "wide-clusters");
    if (run_emulated()) {
        batches = few;
        n = COUNT_OF(few);
    } else if (run_quick()) {
        batches = quick;
        n = COUNT_OF(quick);
    }
    wide_model_make(N_WIDE_MODELS - 1, dir, sizeof(dir));
    open_model(&fused, dir, false);
    open_model(&composed, dir, true);
    for (size_t i = 0; i < n; i++)
        check_batch(&fused, &composed, batches[i], &most);
    run_close(&fused);
    run_close(&composed);
    test_dir_remove(dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_few_rows)};
    RUN_CUDA_TESTS(tests);
}
