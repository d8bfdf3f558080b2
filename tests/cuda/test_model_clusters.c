/* test_model_clusters.c - models of a shape that has layers of few rows by clusters (cluster.cuh)
 * and of up to 256 by warpgroups (warpgroup.cuh), against the same device without fused layers: two
 * rows, whose heads every block of the mlp adds up, three, for which that is a launch, eleven, of
 * which some blocks mix two, and eighteen; and a prompt. Session 0 has a ring that is full and
 * wraps. A session's logits have the same bits in all steps by clusters. On an emulated device
 * these models take a minute, so there is little else here; test_model_cuda.c has more on a GPU,
 * and explains the tolerances.
 */
#include "tests/unit/unit.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tests/cuda/cuda_tests.h"

#define LOGIT_TOLERANCE 0.2
#define STATE_TOLERANCE 0.1
/* Of rings in fp8, whose values are 2^-3 apart: what rounds the other way is that far off. */
#define F8_STATE_TOLERANCE 0.3

#define FAR ((uint64_t)1 << 48)

enum {
    MAX_BATCH = 200,
    BY_CLUSTERS = 16, /* rows at most */
    PROMPT = 2,
    LONG = 68, /* session 0's: more than the window */
    MAX_ROWS = 512,
    N_STEPS = 3,
    VOCAB = 509,
    WIDE_VOCAB = 22016, /* as test_wide_vocabulary has it: 33 MB of weights */
};

/* The reference model of weights/README.md but for its depth, window and what is said. */
#define SHAPE(layers, more) SHAPE_OF("509", layers, more)
#define SHAPE_OF(vocab, layers, more)                                                              \
    "{\"model_type\":\"latte\",\"architectures\":[\"LatteForCausalLM\"],"                          \
    "\"num_hidden_layers\":" layers ",\"num_attention_heads\":8,\"eos_token_id\":0,"               \
    "\"tie_word_embeddings\":true,\"vocab_size\":" vocab ",\"hidden_size\":768,"                   \
    "\"intermediate_size\":3072,\"norm\":\"rmsnorm\",\"mlp\":\"gated\",\"layer_type\":"            \
    "\"macchiato\","                                                                               \
    "\"sliding_window\":64,\"latent_input\":\"rglru\",\"rglru_blocks\":8," more "}"

static const struct test_model reference = {"reference", SHAPE("2", "\"num_latents\":128")};
static const struct test_model fewer_latents = {
    "fewer latents, softcap, gelu",
    SHAPE("1", "\"num_latents\":64,\"attn_logit_softcapping\":2.0,\"hidden_act\":\"gelu_tanh\"")};
static const struct test_model wide = {"wide", SHAPE_OF("22016", "1", "\"num_latents\":128")};
static const struct test_model sinusoids = {
    "sinusoids", SHAPE("1", "\"num_latents\":128,\"position_embedding\":\"sinusoidal\"")};
static const struct test_model vapor = {
    "vapor", SHAPE("1", "\"num_latents\":128,\"position_embedding\":\"vapor\"")};

static void open_model(struct run *r, const char *dir, bool composed, int vocab_size,
                       enum dtype window)
{
    const struct run_form form = {.window_dtype = window,
                                  .max_rows = MAX_ROWS,
                                  .max_logit_rows = MAX_BATCH,
                                  .composed = composed};
    run_open_as(r, dir, &(struct run_options){"cuda", 1, DTYPE_BF16, MAX_BATCH + 1}, &form);
    assert_int_equal(r->vocab_size, vocab_size);
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

/* Step s of sessions 0 .. batch - 1: a prompt, then a token each, together; alone: each prompt for
 * itself, session 0's a long one. Odd numbers of sessions take their tokens in reversed order, so
 * that a session is a block's first row in some steps and its second in others. */
static void feed(struct run *r, int batch, int s, bool alone, float *out)
{
    const int together = s || !alone ? batch : 1;
    int32_t tokens[LONG + MAX_BATCH * PROMPT], first[MAX_BATCH], n = 0;
    struct model_seq seqs[MAX_BATCH];
    const float *logits = NULL;
    struct error err;
    for (int row = 0; row < batch; row++) {
        const int q = s && batch % 2 ? batch - 1 - row : row;
        if (!s)
            model_reset(r->model, q);
        seqs[row] = (struct model_seq){q, s ? 1 : q || !alone ? PROMPT : LONG, LOGITS_LAST};
        first[row] = n;
        for (int i = 0; i < seqs[row].n_rows; i++)
            tokens[n++] = (q * 131 + s * 57 + i * 29 + 3) % VOCAB;
    }
    for (int row = 0; row < batch; row += together) {
        if (model_step(r->model, tokens + first[row], seqs + row, together, &logits, &err))
            fail_msg("%s: %s", r->label, err.text);
        for (int i = 0; i < together; i++)
            memcpy(out + seqs[row + i].slot * VOCAB, logits + i * VOCAB, VOCAB * sizeof(*out));
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

/* The largest difference of the logits of all steps. most: see check_bits; NULL: not asked, and
 * two steps after short prompts will do. */
static double difference(struct run *run, struct run *other, int batch, int *most)
{
    static float found[MAX_BATCH * VOCAB], expected[MAX_BATCH * VOCAB];
    double worst = 0;
    for (int s = 0; s < (most ? N_STEPS : 2); s++) {
        if (s == 1)
            stain(run);
        feed(run, batch, s, most != NULL, found);
        feed(other, batch, s, most != NULL, expected);
        if (most && batch <= BY_CLUSTERS)
            check_bits(found, batch, s, *most);
        worst = fmax(worst, run_difference(found, expected, (size_t)batch * VOCAB));
    }
    if (most && batch > *most)
        *most = batch;
    return worst;
}

/* Results alone would not tell whether a layer went the slower way. */
static void check_layers(const struct run *r, const char *expected)
{
    struct backend_memory memory;
    assert_true(model_memory(r->model, &memory));
    const bool is_known =
        run_emulated() || strstr(memory.device, "H100") || strstr(memory.device, "H200");
    if (is_known && strcmp(model_layers(r->model), expected))
        fail_msg("%s: layers by %s, expected by %s", r->label, model_layers(r->model), expected);
}

static void check_batch(struct run *fused, struct run *composed, int batch, int *most,
                        enum dtype window)
{
    const double state_may = window == DTYPE_F8_E4M3 ? F8_STATE_TOLERANCE : STATE_TOLERANCE;
    const double worst = difference(fused, composed, batch, most);
    size_t n;
    check_layers(fused, batch <= BY_CLUSTERS ? "clusters" : "warpgroups");
    check_layers(composed, "ops");
    print_message("%d rows: logits differ by %g\n", batch, worst);
    if (!(worst <= LOGIT_TOLERANCE))
        fail_msg("%d rows: logits differ by %g", batch, worst);
    if (batch == 1)
        return; /* over a long prompt more rounding adds up in a state than is allowed here */
    float *a = run_state(fused, batch - 1, &n), *b = run_state(composed, batch - 1, &n);
    const double excess = run_state_excess(fused, a, b, state_may);
    free(a);
    free(b);
    if (!(excess <= 1))
        fail_msg("%d rows: the last session's state is off by %g tolerances", batch, excess);
}

static void open_two(struct run *fused, struct run *composed, const struct test_model *model,
                     enum dtype window)
{
    char dir[200];
    cuda_model_make(model, 94, dir, sizeof(dir));
    const int vocab_size = model == &wide ? WIDE_VOCAB : VOCAB;
    open_model(fused, dir, false, vocab_size, window);
    open_model(composed, dir, true, vocab_size, window);
    test_dir_remove(dir);
}

static void check_batches(const struct test_model *model, const int *batches, size_t n,
                          enum dtype window)
{
    struct run fused, composed;
    const bool bits = model == &reference && !run_least();
    int most = 0;
    open_two(&fused, &composed, model, window);
    for (size_t i = 0; i < n; i++)
        check_batch(&fused, &composed, batches[i], bits ? &most : NULL, window);
    run_close(&fused);
    run_close(&composed);
}

static void test_reference(void **state)
{
    static const int few[] = {2, 3, 11, 18}, quick[] = {2, 9, 17}, least[] = {2, 11, 17};
    static const int all[] = {1, 2, 3, 5, 8, 9, 13, 16, 17, 33, 64, 65, 128, 200};
    (void)state;
    if (run_emulated())
        check_batches(&reference, few, COUNT_OF(few), DTYPE_BF16);
    else if (run_least())
        check_batches(&reference, least, COUNT_OF(least), DTYPE_BF16);
    else if (run_quick())
        check_batches(&reference, quick, COUNT_OF(quick), DTYPE_BF16);
    else
        check_batches(&reference, all, COUNT_OF(all), DTYPE_BF16);
}

/* Rings in fp8; those of more than 16 rows are not the warpgroups' own mixing's. */
static void test_narrow_rings(void **state)
{
    static const int few[] = {2, 3, 11}, all[] = {1, 2, 3, 8, 9, 13, 16, 17, 64};
    (void)state;
    if (run_emulated() || run_quick())
        check_batches(&reference, few, COUNT_OF(few), DTYPE_F8_E4M3);
    else
        check_batches(&reference, all, COUNT_OF(all), DTYPE_F8_E4M3);
}

static void test_fewer_latents(void **state)
{
    static const int batches[] = {3, 17};
    (void)state;
    check_batches(&fewer_latents, batches, COUNT_OF(batches), DTYPE_BF16);
}

/* What the embedding cannot leave packed for the first layer is packed by a launch. */
static void test_sinusoids(void **state)
{
    static const int batches[] = {3, 17};
    (void)state;
    check_batches(&sinusoids, batches, COUNT_OF(batches), DTYPE_BF16);
}

/* Clusters and warpgroups do not have VAPOR: such layers are composed, by whatever device. */
static void test_vapor(void **state)
{
    struct run fused, composed;
    (void)state;
    open_two(&fused, &composed, &vapor, DTYPE_BF16);
    assert_true(difference(&fused, &composed, 2, NULL) == 0);
    check_layers(&fused, "ops");
    assert_true(difference(&fused, &composed, 17, NULL) == 0);
    check_layers(&fused, "ops");
    run_close(&fused);
    run_close(&composed);
}

/* A head that streams its weights (stream.cuh) and takes its norm from the last layer. */
static void test_wide_vocabulary(void **state)
{
    static const int batches[] = {2, 11};
    struct run both[2];
    struct error err;
    (void)state;
    open_two(&both[0], &both[1], &wide, DTYPE_BF16);
    for (size_t i = 0; i < COUNT_OF(batches); i++) {
        struct model_seq seqs[16];
        int32_t tokens[16];
        for (int s = 0; s < N_STEPS; s++) {
            const float *logits[2];
            for (int q = 0; q < batches[i]; q++) {
                seqs[q] = (struct model_seq){q, 1, LOGITS_LAST};
                tokens[q] = (q * 1013 + s * 57 + 3) % WIDE_VOCAB;
            }
            for (int k = 0; k < 2; k++)
                if (model_step(both[k].model, tokens, seqs, batches[i], &logits[k], &err))
                    fail_msg("%s: %s", both[k].label, err.text);
            check_layers(&both[0], "clusters");
            const double worst =
                run_difference(logits[0], logits[1], (size_t)batches[i] * WIDE_VOCAB);
            print_message("%d rows, step %d: logits differ by %g\n", batches[i], s, worst);
            if (!(worst > 0 && worst <= LOGIT_TOLERANCE))
                fail_msg("%d rows, step %d: logits differ by %g", batches[i], s, worst);
        }
    }
    run_close(&both[0]);
    run_close(&both[1]);
}

/* A prompt of so many rows that the mlp's first product is glu.cuh's. */
static void test_long_prompt(void **state)
{
    static int32_t tokens[MAX_ROWS];
    const struct model_seq seq = {0, MAX_ROWS, LOGITS_LAST};
    struct run both[2];
    const float *logits[2];
    struct error err;
    (void)state;
    if (run_emulated()) {
        print_message("SKIPPED: 512 rows of this width take minutes\n");
        skip();
    }
    open_two(&both[0], &both[1], &reference, DTYPE_BF16);
    for (int i = 0; i < MAX_ROWS; i++)
        tokens[i] = (i * 37 + i / 11) % VOCAB;
    for (int i = 0; i < 2; i++)
        if (model_step(both[i].model, tokens, &seq, 1, &logits[i], &err))
            fail_msg("%s: %s", both[i].label, err.text);
    check_layers(&both[0], "passes");
    check_layers(&both[1], "ops");
    const double worst = run_difference(logits[0], logits[1], VOCAB);
    print_message("%d rows of a prompt: logits differ by %g\n", MAX_ROWS, worst);
    if (!(worst > 0 && worst <= LOGIT_TOLERANCE))
        fail_msg("%d rows of a prompt: logits differ by %g", MAX_ROWS, worst);
    run_close(&both[0]);
    run_close(&both[1]);
}

int main(void)
{
    const struct CMUnitTest least[] = {cmocka_unit_test(test_reference)};
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_reference),       cmocka_unit_test(test_fewer_latents),
        cmocka_unit_test(test_sinusoids),       cmocka_unit_test(test_vapor),
        cmocka_unit_test(test_wide_vocabulary), cmocka_unit_test(test_long_prompt),
        cmocka_unit_test(test_narrow_rings),
    };
    if (run_least())
        RUN_CUDA_TESTS(least);
    RUN_CUDA_TESTS(tests);
}
