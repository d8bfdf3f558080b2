/* test_stepper.c - steps and what is drawn from them, on the host and by a device, one and two
 * on their way: all give what steps of the model and a sampler by hand give.
 *
 * The device is the reference backend with drawing added here.
 */
#include "tests/unit/unit.h"

#include <stdlib.h>
#include <string.h>

#include "engine/stepper.h"
#include "tests/unit/fail_alloc.h"
#include "tests/unit/model_files.h"
#include "tests/unit/model_run.h"

enum { N_SLOTS = 6, MAX_ROWS = 60, MAX_LOGITS = 40, MAX_STEPS = 80, MAX_RESULTS = 4000 };

/* ---- The device ---- */

static struct drawing {
    const struct backend_ops *ref;
    struct backend_ops ops;
    struct step step; /* with the tokens that are fed */
    int32_t tokens[MAX_ROWS];
    struct sampler *sampler;
    struct sampling_params params[N_SLOTS];
    struct logit_bias biases[N_SLOTS];
    int32_t drawn[N_SLOTS];
    struct sampled results[3][2 * MAX_LOGITS];
    int n_begun, n_waited;
} drawing;

static bool device_begin(struct backend *b, const struct step *step)
{
    drawing.step = *step;
    drawing.step.tokens = drawing.tokens;
    for (int i = 0; i < step->n_seqs; i++)
        for (int r = step->seq_start[i]; r < step->seq_start[i + 1]; r++) {
            bool is_drawn = step->tokens[r] == TOKEN_DRAWN;
            drawing.tokens[r] = is_drawn ? drawing.drawn[step->seq_slot[i]] : step->tokens[r];
            if (!is_drawn)
                sampler_note(drawing.sampler, step->seq_slot[i], step->tokens[r], false);
        }
    memset(drawing.results[drawing.n_begun++ % 3], 0xee, sizeof(drawing.results[0]));
    return drawing.ref->begin(b, &drawing.step);
}

static void device_draw(struct backend *b, const struct buffer *logits)
{
    const struct step *step = &drawing.step;
    struct sampled *out = drawing.results[(drawing.n_begun - 1) % 3];
    const size_t n_vocab = 64;
    const float *rows =
        b->ops->map(b, logits, (size_t)step->n_logit_rows * n_vocab * sizeof(float));
    for (int i = 0; i < step->n_draws; i++, out++) {
        const struct step_draw *d = &step->draws[i];
        sampler_draw(drawing.sampler, d->slot, rows + (size_t)d->logit_row * n_vocab,
                     &drawing.params[d->slot], d->position, d->n_output, out);
        drawing.drawn[d->slot] = out->token;
        sampler_note(drawing.sampler, d->slot, out->token, true);
    }
    for (int i = 0; i < step->n_scores; i++, out++)
        sampler_score(drawing.sampler, rows + (size_t)step->scores[i].logit_row * n_vocab,
                      step->scores[i].target, step->scores[i].n_top, out);
}

static enum status device_admit(struct backend *b, int slot, const struct sampling_params *params,
                                struct error *err)
{
    (void)b, (void)err;
    drawing.biases[slot] = *params->logit_bias;
    drawing.params[slot] = *params;
    drawing.params[slot].logit_bias = &drawing.biases[slot];
    drawing.drawn[slot] = -7; /* no token: feeding it fails */
    sampler_reset(drawing.sampler, slot);
    return STATUS_OK;
}

static enum status device_wait(struct backend *b, const struct sampled **results, struct error *err)
{
    if (results)
        *results = drawing.results[drawing.n_waited % 3];
    drawing.n_waited++;
    return drawing.ref->wait(b, NULL, err);
}

/* ---- A model in one of the ways ---- */

struct way {
    int depth, device_depth; /* 0: the host draws */
};
static const struct way ways[] = {{1, 0}, {2, 0}, {0, 0}, {1, 1}, {1, 2}, {2, 2}, {0, 2}};

static const char *model_config_json(void)
{
    return "{\"architectures\":[\"LatteForCausalLM\"],\"model_type\":\"latte\",\"vocab_size\":64,"
           "\"hidden_size\":16,\"num_hidden_layers\":2,\"intermediate_size\":32,"
           "\"num_attention_heads\":2,\"num_latents\":4,\"layer_type\":\"macchiato\","
           "\"latent_input\":\"conv\",\"conv_kernel\":3,\"sliding_window\":5,\"norm\":\"rmsnorm\","
           "\"mlp\":\"gated\",\"hidden_act\":\"silu\",\"tie_word_embeddings\":true,"
           "\"eos_token_id\":3}";
}

static struct model *open_model(const struct way *way)
{
    char dir[100];
    struct checkpoint *c = NULL;
    struct backend *b = NULL;
    struct model *model = NULL;
    struct model_options options = {
        .n_slots = N_SLOTS, .max_rows = MAX_ROWS, .max_logit_rows = MAX_LOGITS};
    struct backend_options backend_options = {.n_threads = 1};
    struct error err;
    assert_int_equal(test_dir_make(dir, sizeof(dir)), 0);
    assert_int_equal(model_files_write(dir, model_config_json(), 5, NULL), 0);
    if (checkpoint_open(&c, dir, NULL, NULL, &err))
        fail_msg("%s", err.text);
    model_backend_options(&c->config, &options, &backend_options);
    assert_int_equal(backend_ref_open(&b, &backend_options, &err), STATUS_OK);
    drawing = (struct drawing){.ref = b->ops, .ops = *b->ops};
    if (way->device_depth) {
        drawing.ops.begin = device_begin;
        drawing.ops.draw = device_draw;
        drawing.ops.admit = device_admit;
        drawing.ops.wait = device_wait;
        drawing.ops.depth = way->device_depth;
        b->ops = &drawing.ops;
    }
    assert_int_equal(sampler_open(&drawing.sampler, N_SLOTS, 64, NULL, 0, &err), STATUS_OK);
    assert_int_equal(model_open(&model, c, b, &options, NULL, NULL, &err), STATUS_OK);
    checkpoint_close(c);
    test_dir_remove(dir);
    return model;
}

static void close_model(struct model *model)
{
    model_close(model);
    sampler_close(drawing.sampler);
}

/* ---- The work: sequences that come, are scored, draw and leave ---- */

struct session {
    bool used;
    struct sampling_params params;
    struct logit_bias bias;
    int32_t prompt[12];
    int n_prompt, n_fed, n_drawn, n_left; /* n_left: draws until it leaves */
    int n_top;
    bool admitted;
};

struct work {
    uint32_t random;
    struct session sessions[N_SLOTS];
    int32_t targets[N_SLOTS][12];
};

static void arrive(struct work *w, struct session *s)
{
    *s = (struct session){.used = true};
    sampling_params_init(&s->params);
    s->params.seed = test_random(&w->random);
    s->params.temperature = test_random(&w->random) % 4 ? 1 : 0;
    s->params.repetition_penalty = test_random(&w->random) % 2 ? 1.5f : 1;
    s->params.n_logprobs = (int)(test_random(&w->random) % 4) - 1;
    s->bias = (struct logit_bias){.token = (int32_t)(test_random(&w->random) % 64), .bias = 3};
    s->params.n_logit_bias = (int)(test_random(&w->random) % 2);
    s->params.logit_bias = &s->bias;
    s->n_prompt = 1 + (int)(test_random(&w->random) % 12);
    s->n_left = (int)(test_random(&w->random) % 9);
    s->n_top = test_random(&w->random) % 3 ? -1 : (int)(test_random(&w->random) % 3);
    for (int i = 0; i < s->n_prompt; i++)
        s->prompt[i] = (int32_t)(test_random(&w->random) % 64);
}

/* One slot's part of the next step. */
static struct stepper_seq next_seq(struct work *w, int slot)
{
    struct session *s = &w->sessions[slot];
    struct stepper_seq seq = {.slot = slot,
                              .n_rows = 1,
                              .draws = true,
                              .draw_position = (uint64_t)(s->n_prompt + s->n_drawn),
                              .n_output = s->n_drawn,
                              .n_top = -1};
    if (s->n_fed < s->n_prompt) {
        int left = s->n_prompt - s->n_fed;
        seq.n_rows = left < 5 ? left : 5;
        seq.tokens = s->prompt + s->n_fed;
        seq.n_top = s->n_top;
        seq.targets = w->targets[slot];
        for (int i = 0; i < seq.n_rows; i++)
            w->targets[slot][i] = s->n_fed + i + 1 < s->n_prompt ? s->prompt[s->n_fed + i + 1] : -1;
        s->n_fed += seq.n_rows;
        seq.draws = s->n_fed == s->n_prompt && s->n_left > 0;
    }
    s->n_drawn += seq.draws;
    s->n_left -= seq.draws;
    s->used = s->n_fed < s->n_prompt || s->n_left > 0;
    return seq;
}

/* Some of the slots, in any order. */
static int next_step(struct work *w, struct stepper_seq *seqs)
{
    int n = 0, first = (int)(test_random(&w->random) % N_SLOTS);
    for (int k = 0; k < N_SLOTS; k++) {
        int slot = (first + k) % N_SLOTS;
        if (!w->sessions[slot].used)
            arrive(w, &w->sessions[slot]);
        if (test_random(&w->random) % 3)
            seqs[n++] = next_seq(w, slot);
    }
    return n;
}

static int n_results(const struct stepper_seq *seqs, int n_seqs)
{
    int n = 0;
    for (int k = 0; k < n_seqs; k++) {
        n += seqs[k].draws;
        for (int i = 0; seqs[k].n_top >= 0 && i < seqs[k].n_rows; i++)
            n += seqs[k].targets[i] >= 0;
    }
    return n;
}

/* What is compared: the alternatives that count, NAN as 0. */
static struct sampled tidy(const struct sampled *in)
{
    struct sampled out = {.token = in->token, .n_top = in->n_top};
    out.logprob = in->logprob == in->logprob ? in->logprob : 0;
    memcpy(out.top, in->top, (size_t)in->n_top * sizeof(out.top[0]));
    return out;
}

static void collect(struct stepper *stepper, int n, struct sampled *out)
{
    const struct sampled *results = NULL;
    assert_int_equal(stepper_collect(stepper, &results, NULL), STATUS_OK);
    for (int i = 0; i < n; i++)
        out[i] = tidy(&results[i]);
}

/* All results of the work, in order. Slots are admitted when their session begins. */
static int run_work(struct stepper *stepper, struct sampled *out)
{
    struct work w = {.random = 12345};
    int pending[2] = {0}, n_pending = 0, total = 0;
    for (int step = 0; step < MAX_STEPS; step++) {
        struct stepper_seq seqs[N_SLOTS];
        int n = next_step(&w, seqs);
        if (!n)
            continue;
        for (int k = 0; k < n; k++) {
            struct session *s = &w.sessions[seqs[k].slot];
            if (s->admitted)
                continue;
            s->admitted = true;
            struct sampling_params params = s->params; /* it and its biases are copied */
            struct logit_bias bias = s->bias;
            params.logit_bias = &bias;
            assert_int_equal(stepper_admit(stepper, seqs[k].slot, &params, true, NULL), STATUS_OK);
            bias.bias = 1000;
            params.seed++;
        }
        assert_int_equal(stepper_queue(stepper, seqs, n, NULL), STATUS_OK);
        pending[n_pending++] = n_results(seqs, n);
        if (n_pending < stepper_depth(stepper))
            continue;
        collect(stepper, pending[0], out + total);
        total += pending[0];
        pending[0] = pending[1];
        n_pending--;
    }
    for (int i = 0; i < n_pending; i++) {
        collect(stepper, pending[i], out + total);
        total += pending[i];
    }
    assert_true(total < MAX_RESULTS);
    return total;
}

/* The same by hand. */
static int expect_work(struct model *model, struct sampled *out)
{
    struct work w = {.random = 12345};
    struct sampler *sampler = NULL;
    int32_t last[N_SLOTS] = {0};
    int total = 0;
    assert_int_equal(sampler_open(&sampler, N_SLOTS, 64, NULL, 0, NULL), STATUS_OK);
    for (int step = 0; step < MAX_STEPS; step++) {
        struct stepper_seq seqs[N_SLOTS];
        int n = next_step(&w, seqs);
        for (int k = 0; k < n;
             k++) { /* one sequence a step: it does not matter what is beside it */
            const struct stepper_seq *q = &seqs[k];
            struct session *s = &w.sessions[q->slot];
            if (!s->admitted) {
                model_reset(model, q->slot);
                sampler_reset(sampler, q->slot);
                s->admitted = true;
            }
            const struct model_seq seq = {q->slot, q->n_rows, LOGITS_ALL};
            const float *logits;
            struct sampled sampled;
            assert_int_equal(
                model_step(model, q->tokens ? q->tokens : &last[q->slot], &seq, 1, &logits, NULL),
                STATUS_OK);
            for (int i = 0; q->tokens && i < q->n_rows; i++)
                sampler_note(sampler, q->slot, q->tokens[i], false);
            for (int i = 0; q->n_top >= 0 && i < q->n_rows; i++) {
                if (q->targets[i] < 0)
                    continue;
                sampler_score(sampler, logits + i * 64, q->targets[i], q->n_top, &sampled);
                out[total++] = tidy(&sampled);
            }
            if (!q->draws)
                continue;
            sampler_draw(sampler, q->slot, logits + (q->n_rows - 1) * 64, &s->params,
                         q->draw_position, q->n_output, &sampled);
            sampler_note(sampler, q->slot, sampled.token, true);
            last[q->slot] = sampled.token;
            out[total++] = tidy(&sampled);
        }
    }
    sampler_close(sampler);
    return total;
}

static const struct stepper_options sizes = {
    .n_slots = N_SLOTS, .max_rows = MAX_ROWS, .max_logit_rows = MAX_LOGITS};

static void test_every_way_gives_the_same(void **state)
{
    (void)state;
    static struct sampled expected[MAX_RESULTS], found[MAX_RESULTS];
    struct model *model = open_model(&ways[0]);
    int n_expected = expect_work(model, expected);
    assert_true(n_expected > 200);
    close_model(model);
    for (size_t i = 0; i < COUNT_OF(ways); i++) {
        struct stepper_options options = sizes;
        struct stepper *stepper = NULL;
        options.depth = ways[i].depth;
        model = open_model(&ways[i]);
        assert_int_equal(stepper_open(&stepper, model, &options, NULL), STATUS_OK);
        int by_itself = ways[i].device_depth ? ways[i].device_depth : 1;
        assert_int_equal(stepper_depth(stepper), ways[i].depth ? ways[i].depth : by_itself);
        assert_int_equal(run_work(stepper, found), n_expected);
        for (int k = 0; k < n_expected; k++)
            if (memcmp(&found[k], &expected[k], sizeof(found[k])))
                fail_msg("way %zu: result %d is token %d (%g), expected %d (%g)", i, k,
                         found[k].token, (double)found[k].logprob, expected[k].token,
                         (double)expected[k].logprob);
        stepper_close(stepper);
        close_model(model);
    }
}

static struct model *walked;

static enum status open_and_close(void *context, struct error *err)
{
    (void)context;
    struct stepper *stepper = NULL;
    enum status st = stepper_open(&stepper, walked, &sizes, err);
    stepper_close(stepper);
    return st;
}

static void test_out_of_memory(void **state)
{
    (void)state;
    for (size_t i = 0; i < COUNT_OF(ways); i += COUNT_OF(ways) - 1) {
        walked = open_model(&ways[i]);
        fail_alloc_walk(open_and_close, NULL);
        close_model(walked);
    }
    stepper_close(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_way_gives_the_same),
        cmocka_unit_test(test_out_of_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
