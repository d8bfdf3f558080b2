/* history.c - see history.h */
#include "tests/unit/history.h"

#include "tests/unit/unit.h"

#include <stdlib.h>
#include <string.h>

static uint64_t state;

void history_seed(uint64_t seed)
{
    state = seed;
}

int history_below(int n)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (int)((state >> 33) % (uint64_t)n);
}

void history_open_engine(struct engine **out, struct engine_info *info, const char *dir,
                         const char *device)
{
    struct engine_options o;
    struct error err;
    engine_options_init(&o);
    o.model_dir = dir;
    o.device = device;
    o.weight_dtype = o.window_dtype = "f32";
    o.deterministic = true;
    o.n_threads = 1;
    o.n_slots = 2;
    o.chunk_tokens = HISTORY_CHUNK;
    if (engine_open(out, &o, &err))
        fail_msg("%s on %s: %s", dir, device, err.text);
    engine_info(*out, info);
}

void history_open_oracle(struct run *out, const char *dir, const char *device)
{
    const struct run_options options = {
        .backend = device, .n_threads = 1, .dtype = DTYPE_F32, .n_slots = 1};
    const struct run_form form = {.window_dtype = DTYPE_F32, .deterministic = true};
    run_open_as(out, dir, &options, &form);
}

/* ---- turns ---- */

void history_fill(struct turn *turn, const struct image *from, int32_t vocab_size)
{
    turn->n_prompt = from ? from->n_pending : 0;
    for (int i = 0; i < turn->n_prompt; i++)
        turn->prompt[i] = from->pending[i];
    int n_new = 1 + history_below(HISTORY_MAX_PROMPT);
    for (int i = 0; i < n_new; i++)
        turn->prompt[turn->n_prompt++] = history_below(vocab_size);
    sampling_params_init(&turn->sampling);
    turn->sampling.seed = (uint64_t)history_below(1 << 30);
    turn->sampling.ignore_eos = true;
    if (history_below(3) == 0)
        turn->sampling.temperature = 0;
    if (history_below(3) == 0)
        turn->sampling.repetition_penalty = 1.3f;
}

void history_run(struct turn *turn, struct engine *engine, int max_tokens, struct image *from,
                 struct image *into, const char *label)
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
    if (job_new(&job, &request, &err) || engine_submit(engine, job, &err))
        fail_msg("%s: %s", label, err.text);
    turn->n_output = 0;
    do {
        job_wait(job);
        job_snapshot(job, &snapshot);
        while (job_read(job, &token, 1))
            turn->output[turn->n_output++] = token.token;
    } while (snapshot.finish == FINISH_NONE);
    if (snapshot.finish != FINISH_LENGTH)
        fail_msg("%s: the job ended with %d: %s", label, snapshot.finish, snapshot.error.text);
    job_release(job);
}

/* ---- the oracle ---- */

/* A turn by steps of the model: what it says, and logits of the last row if anything is drawn. */
static void compute_turn(struct run *oracle, int32_t vocab_size, const struct turn *turn,
                         int32_t *output, float *logits)
{
    struct sampler *sampler = NULL;
    struct error err;
    uint64_t before = model_position(oracle->model, 0);
    if (sampler_open(&sampler, 1, vocab_size, NULL, 0, &err))
        fail_msg("%s", err.text);
    for (int i = 0; i < turn->n_prompt; i += HISTORY_CHUNK) {
        int rows = turn->n_prompt - i < HISTORY_CHUNK ? turn->n_prompt - i : HISTORY_CHUNK;
        run_feed(oracle, 0, turn->prompt + i, rows, LOGITS_LAST, logits);
    }
    for (int i = 0; i < turn->n_prompt; i++)
        sampler_note(sampler, 0, turn->prompt[i], false);
    for (int n = 0; n < turn->n_output; n++) {
        struct sampled sampled;
        if (n)
            run_feed(oracle, 0, &output[n - 1], 1, LOGITS_LAST, logits);
        sampler_draw(sampler, 0, logits, &turn->sampling,
                     before + (uint64_t)turn->n_prompt + (uint64_t)n, n, &sampled);
        output[n] = sampled.token;
        sampler_note(sampler, 0, sampled.token, true);
    }
    sampler_close(sampler);
}

/* The whole history again, from its first token. */
void history_check(const struct history *h, const struct image *image, struct run *oracle,
                   int32_t vocab_size, const char *label)
{
    float *logits = calloc((size_t)vocab_size, sizeof(*logits));
    model_reset(oracle->model, 0);
    uint64_t length = 0;
    for (int t = 0; t < h->n_turns; t++) {
        const struct turn *turn = &h->turns[t];
        int32_t output[HISTORY_MAX_OUTPUT];
        compute_turn(oracle, vocab_size, turn, output, logits);
        if (memcmp(output, turn->output, (size_t)turn->n_output * sizeof(*output)) != 0)
            fail_msg("%s: turn %d of %d says something else than its whole history", label, t,
                     h->n_turns);
        length = model_position(oracle->model, 0) + (turn->n_output > 0);
    }
    free(logits);
    if (!image)
        return;
    if (image->position != model_position(oracle->model, 0) || image_length(image) != length)
        fail_msg("%s: the state is at %llu with %d pending; it has seen %llu of %llu tokens", label,
                 (unsigned long long)image->position, image->n_pending,
                 (unsigned long long)model_position(oracle->model, 0), (unsigned long long)length);
    size_t n;
    float *expected = run_state(oracle, 0, &n);
    assert_int_equal(n, image->store->n_values);
    if (memcmp(expected, image->values, n * sizeof(*expected)) != 0)
        fail_msg("%s: the state of a session of %d turns differs by %g", label, h->n_turns,
                 run_difference(expected, image->values, n));
    free(expected);
}
