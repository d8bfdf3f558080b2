/* test_warm_up.c - the steps a model runs before it serves: which sizes, and that nothing of them
 * is left. The device is the reference backend, which writes down what it is asked for and says
 * that it rounds rows up. */
#include "tests/unit/unit.h"

#include <stdio.h>
#include <string.h>

#include "engine/warm_up.h"
#include "tests/unit/fail_alloc.h"
#include "tests/unit/model_files.h"

enum { N_SLOTS = 20, MAX_ROWS = 24, MAX_LOGITS = 20, VOCAB = 64, MAX_STEPS = 100 };

static const int rounded[] = {1, 2, 4, 8, 10, 12, 14, 16, 20, 24};

static struct device {
    const struct backend_ops *ref;
    struct backend_ops ops;
    int n_steps, n_rows[MAX_STEPS], n_seqs[MAX_STEPS];
    int64_t furthest; /* position of any row */
} device;

static bool device_begin(struct backend *b, const struct step *step)
{
    assert_true(device.n_steps < MAX_STEPS);
    device.n_rows[device.n_steps] = step->n_rows;
    device.n_seqs[device.n_steps++] = step->n_seqs;
    for (int r = 0; r < step->n_rows; r++)
        if (step->positions[r] > device.furthest)
            device.furthest = step->positions[r];
    return device.ref->begin(b, step);
}

static int device_next_rows(const struct backend *b, int n)
{
    (void)b;
    for (size_t i = 0; i < COUNT_OF(rounded); i++)
        if (rounded[i] > n)
            return rounded[i];
    return 0;
}

static const char *device_layers(const struct backend *b)
{
    (void)b;
    return device.n_rows[device.n_steps - 1] <= 4 ? "magic" : "sorcery";
}

static struct model *open_model(const char *layers, bool rounds)
{
    char dir[100], config[800];
    struct checkpoint *c = NULL;
    struct backend *b = NULL;
    struct model *model = NULL;
    const struct model_options options = {
        .n_slots = N_SLOTS, .max_rows = MAX_ROWS, .max_logit_rows = MAX_LOGITS};
    struct backend_options backend_options = {.n_threads = 1};
    struct error err;
    snprintf(config, sizeof(config),
             "{\"architectures\":[\"LatteForCausalLM\"],\"model_type\":\"latte\","
             "\"vocab_size\":%d,\"hidden_size\":16,\"num_hidden_layers\":2,"
             "\"intermediate_size\":32,\"num_attention_heads\":2,\"norm\":\"rmsnorm\","
             "\"mlp\":\"gated\",\"hidden_act\":\"silu\",\"tie_word_embeddings\":true,"
             "\"eos_token_id\":3,%s}",
             VOCAB, layers);
    assert_int_equal(test_dir_make(dir, sizeof(dir)), 0);
    assert_int_equal(model_files_write(dir, config, 5, NULL), 0);
    if (checkpoint_open(&c, dir, NULL, NULL, &err))
        fail_msg("%s", err.text);
    model_backend_options(&c->config, &options, &backend_options);
    assert_int_equal(backend_ref_open(&b, &backend_options, &err), STATUS_OK);
    device = (struct device){.ref = b->ops, .ops = *b->ops};
    device.ops.begin = device_begin;
    device.ops.next_rows = rounds ? device_next_rows : NULL;
    device.ops.layers = rounds ? device_layers : NULL;
    b->ops = &device.ops;
    assert_int_equal(model_open(&model, c, b, &options, NULL, NULL, &err), STATUS_OK);
    checkpoint_close(c);
    test_dir_remove(dir);
    return model;
}

static const char latent_layers[] =
    "\"num_latents\":4,\"layer_type\":\"macchiato\",\"latent_input\":\"conv\",\"conv_kernel\":3,"
    "\"sliding_window\":5";
static const char limited_layers[] =
    "\"layer_type\":\"full_attention\",\"max_position_embeddings\":13";

static struct warm_up options_of(int max_batch, bool every_size)
{
    return (struct warm_up){.n_slots = N_SLOTS,
                            .max_rows = MAX_ROWS,
                            .max_logit_rows = MAX_LOGITS,
                            .chunk = 16,
                            .max_batch = max_batch,
                            .every_size = every_size};
}

static char said[WARM_UP_LAYERS];

static void run_warm_up(struct model *model, int max_batch, bool every_size)
{
    const struct warm_up options = options_of(max_batch, every_size);
    struct error err;
    if (warm_up(model, &options, said, &err))
        fail_msg("%s", err.text);
}

/* Steps with so many sequences and rows in all. */
static int count_steps(int n_seqs, int n_rows)
{
    int n = 0;
    for (int i = 0; i < device.n_steps; i++)
        n += device.n_seqs[i] == n_seqs && device.n_rows[i] == n_rows;
    return n;
}

/* Twice: a step is recorded when its form comes the second time. */
static void test_every_size_is_stepped(void **state)
{
    (void)state;
    struct model *model = open_model(latent_layers, true);
    run_warm_up(model, 12, true);
    for (size_t i = 0; i < COUNT_OF(rounded); i++) {
        assert_true(count_steps(1, rounded[i]) >= 1);
        if (rounded[i] <= 12)
            assert_true(count_steps(rounded[i], rounded[i]) >= 2);
    }
    for (int i = 0; i < device.n_steps; i++)
        assert_true(device.n_seqs[i] <= 12);
    assert_string_equal(said, "magic to 4 rows, sorcery to 12");
    model_close(model);
}

static int first_step(int n_seqs, int n_rows)
{
    int i = 0;
    while (i < device.n_steps && (device.n_seqs[i] != n_seqs || device.n_rows[i] != n_rows))
        i++;
    assert_true(i < device.n_steps);
    return i;
}

/* The others choose from what is found for them. */
static void test_powers_of_two_come_first(void **state)
{
    (void)state;
    struct model *model = open_model(latent_layers, true);
    run_warm_up(model, 16, true);
    assert_true(first_step(1, 16) < first_step(1, 10));
    assert_true(first_step(16, 16) < first_step(10, 10));
    assert_string_equal(said, "magic to 4 rows, sorcery to 16");
    model_close(model);
}

/* Steps of 9 rows are rounded up to 10, and are made as they will be. */
static void test_a_batch_between_sizes(void **state)
{
    (void)state;
    struct model *model = open_model(latent_layers, true);
    run_warm_up(model, 9, true);
    assert_true(count_steps(8, 8) >= 2 && count_steps(9, 9) >= 2);
    assert_int_equal(count_steps(10, 10), 0);
    assert_string_equal(said, "magic to 4 rows, sorcery to 9");
    model_close(model);
}

static void test_few_steps_otherwise(void **state)
{
    (void)state;
    for (int rounds = 0; rounds < 2; rounds++) {
        struct model *model = open_model(latent_layers, rounds);
        run_warm_up(model, 12, !rounds);
        assert_int_equal(device.n_steps, 2);
        assert_int_equal(count_steps(1, 16), 1);
        assert_int_equal(count_steps(1, 1), 1);
        assert_string_equal(said, "");
        model_close(model);
    }
}

static void test_limited_contexts_are_kept(void **state)
{
    (void)state;
    struct model *model = open_model(limited_layers, true);
    run_warm_up(model, 12, true);
    assert_int_equal(model_max_position(model), 13);
    assert_true(device.furthest < 13);
    assert_true(count_steps(1, 12) >= 1);
    model_close(model);
}

static void feed(struct model *model, int slot, float out[VOCAB])
{
    const int32_t tokens[] = {7, 9, 11, 13, 15, 17, 19};
    const struct model_seq seq = {.slot = slot, .n_rows = COUNT_OF(tokens), .logits = LOGITS_LAST};
    const float *logits = NULL;
    struct error err;
    assert_int_equal(model_position(model, slot), 0);
    assert_int_equal(model_step(model, tokens, &seq, 1, &logits, &err), STATUS_OK);
    memcpy(out, logits, VOCAB * sizeof(*out));
}

static void test_nothing_is_left(void **state)
{
    (void)state;
    const char *const layers[] = {latent_layers, limited_layers};
    for (size_t i = 0; i < COUNT_OF(layers); i++) {
        float expected[VOCAB], found[VOCAB];
        struct model *cold = open_model(layers[i], true);
        feed(cold, 0, expected);
        model_close(cold);
        struct model *model = open_model(layers[i], true);
        run_warm_up(model, 12, true);
        for (int slot = 0; slot < N_SLOTS; slot++) {
            feed(model, slot, found);
            assert_memory_equal(found, expected, sizeof(found));
        }
        model_close(model);
    }
}

static struct model *walked;

static enum status warm_up_once(void *context, struct error *err)
{
    (void)context;
    const struct warm_up options = options_of(4, false);
    return warm_up(walked, &options, said, err);
}

static void test_out_of_memory(void **state)
{
    (void)state;
    walked = open_model(latent_layers, true);
    fail_alloc_walk(warm_up_once, NULL);
    model_close(walked);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_size_is_stepped),
        cmocka_unit_test(test_powers_of_two_come_first),
        cmocka_unit_test(test_a_batch_between_sizes),
        cmocka_unit_test(test_few_steps_otherwise),
        cmocka_unit_test(test_limited_contexts_are_kept),
        cmocka_unit_test(test_nothing_is_left),
        cmocka_unit_test(test_out_of_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
