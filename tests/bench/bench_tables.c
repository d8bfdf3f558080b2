/* bench_tables.c - the tables of latte-bench engine.
 *
 * Steps go through the stepper, as the scheduler's do: tokens are drawn where the backend can
 * draw them, and a step is queued while the one before it runs. So a sample of decoding is the
 * time from one step's results to the next one's. Each figure is the median of repeats, with
 * the 10th and 90th percentile beside it.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/bench/bench.h"
#include "tests/bench/bench_engine.h"

enum {
    MIN_SAMPLES = 3,
    WARM_TOKENS = 32, /* of a session before decoding is measured */
    WARM_STEPS = 40,  /* not counted: recording, clocks that rise */
};

/* ---- running ---- */

static bool is_device(const struct bench *b)
{
    return b->set.device_index >= 0;
}

static bool complain(const struct error *err)
{
    fprintf(stderr, "latte-bench: %s\n", err->text);
    return false;
}

static bool collect(struct bench *b)
{
    const struct sampled *results;
    struct error err;
    b->in_flight--;
    return !stepper_collect(b->stepper, &results, &err) || complain(&err);
}

static bool drain(struct bench *b)
{
    while (b->in_flight)
        if (!collect(b))
            return false;
    return true;
}

/* Queue the n_seqs planned sequences, after waiting for the oldest step when it must be. */
static bool queue(struct bench *b, int n_seqs)
{
    struct error err;
    if (b->in_flight == stepper_depth(b->stepper) && !collect(b))
        return false;
    if (stepper_queue(b->stepper, b->seqs, n_seqs, &err))
        return complain(&err);
    b->in_flight++;
    return true;
}

/* Sequence i of the next step: n_rows tokens of a prompt, or with 0 the token last drawn. */
static void plan(struct bench *b, int i, int slot, int n_rows, bool draws)
{
    const int rows = n_rows ? n_rows : 1;
    b->seqs[i] = (struct stepper_seq){
        .slot = slot,
        .n_rows = rows,
        .tokens = n_rows ? b->tokens + slot % (b->max_rows - rows + 1) : NULL,
        .draws = draws,
        .draw_position = model_position(b->model, slot) + (uint64_t)rows,
        .n_output = b->n_output[slot],
        .n_top = -1,
    };
    b->n_output[slot] += draws;
}

/* New requests in the n slots from `first` on. */
static bool admit(struct bench *b, int first, int n, int top_k)
{
    struct sampling_params params;
    struct error err;
    sampling_params_init(&params);
    params.temperature = top_k ? 1 : 0;
    params.top_k = top_k;
    params.ignore_eos = true;
    if (!drain(b))
        return false;
    for (int slot = first; slot < first + n; slot++) {
        params.seed = (uint64_t)slot;
        if (stepper_admit(b->stepper, slot, &params, true, &err))
            return complain(&err);
        b->n_output[slot] = 0;
    }
    return true;
}

/* Rows a sequence of a prompt step gets when n_seqs share it. */
static int chunk_of(const struct bench *b, int n_seqs)
{
    const int n = b->set.step_tokens / n_seqs;
    return n > 0 ? n : 1;
}

/* Feed n_rows tokens to each of the n slots from `first` on, and draw from the last. */
static bool prefill(struct bench *b, int first, int n, int n_rows)
{
    const int most = chunk_of(b, n);
    for (int done = 0, rows; done < n_rows; done += rows) {
        rows = n_rows - done < most ? n_rows - done : most;
        for (int i = 0; i < n; i++)
            plan(b, i, first + i, rows, done + rows == n_rows);
        if (!queue(b, n))
            return false;
    }
    return drain(b);
}

/* Most tokens of any sliding window: from there on a step reads all of every ring. */
static int64_t full_window(const struct bench *b)
{
    const struct model_config *c = model_config(b->model);
    int64_t most = WARM_TOKENS;
    for (int i = 0; i < c->n_layers; i++)
        if (c->layers[i].type == LAYER_MACCHIATO && config_ring_rows(c, i) > most)
            most = config_ring_rows(c, i);
    return most;
}

/* Sessions ready to decode: a short prompt behind them, at a position where windows are full. */
static bool warm_slots(struct bench *b, int first, int n)
{
    const int64_t window = full_window(b);
    if (!admit(b, first, n, b->set.top_k))
        return false;
    for (int done = 0, group; done < n; done += group) {
        group = n - done < b->max_seqs ? n - done : b->max_seqs;
        if (!prefill(b, first + done, group, WARM_TOKENS))
            return false;
    }
    if (!model_max_position(b->model))
        for (int slot = first; slot < first + n; slot++)
            model_set_position(b->model, slot, (uint64_t)window);
    return true;
}

static bool fits(const struct bench *b, double n_tokens)
{
    const int64_t limit = model_max_position(b->model);
    return !limit || n_tokens <= (double)limit;
}

static bool enough(const struct bench *b, double start)
{
    return b->n_samples == BENCH_MAX_SAMPLES ||
           (b->n_samples >= MIN_SAMPLES && bench_now() - start >= b->set.seconds);
}

/* Time steps in which `turn` of the first n slots feed the token they drew, one group after the
 * other. Milliseconds of a step. */
static bool sample_decoding(struct bench *b, int n, int turn)
{
    const int n_warm = is_device(b) ? WARM_STEPS : 1;
    double start = bench_now(), last = start;
    b->n_samples = 0;
    for (int s = 0; !enough(b, start); s++) {
        const int first = (int)((int64_t)s * turn % n);
        if (!fits(b, (double)model_position(b->model, first) + 1))
            break;
        for (int i = 0; i < turn; i++)
            plan(b, i, (first + i) % n, 0, true);
        if (!queue(b, turn))
            return false;
        const double now = bench_now();
        if (s < n_warm)
            start = now;
        else
            b->samples[b->n_samples++] = 1e3 * (now - last);
        last = now;
    }
    return drain(b);
}

/* ---- floors: the time that moving the bytes takes ---- */

/* Weights that a step reads whatever its rows are. A tied embedding is read by the head. */
static double weight_bytes(const struct bench *b)
{
    const struct model_config *c = model_config(b->model);
    const double rows = (double)c->vocab_size * c->hidden_size;
    const double per_value = (double)model_weight_bytes(b->model) / (double)b->n_parameters;
    return (double)model_weight_bytes(b->model) - (c->tie_word_embeddings ? 0 : rows * per_value);
}

/* What one token at a position reads and writes of its session's state. */
static double state_bytes(const struct bench *b, double position)
{
    const double ring_value = !strcmp(b->set.window_dtype, "f32")    ? 4
                              : !strcmp(b->set.window_dtype, "bf16") ? 2
                                                                     : 1;
    double sum = 0;
    for (int i = 0; i < model_n_state_tensors(b->model); i++) {
        const struct state_tensor *t = model_state_tensor(b->model, i);
        if (strstr(t->name, "ring")) /* [KV, w, d]: reads what there is, writes a row */
            sum += ring_value * (double)(t->n_values / t->shape[1]) *
                   (fmin(position, (double)t->shape[1]) + 1);
        else
            sum += 2 * 4 * (double)t->n_values;
    }
    return sum;
}

/* Milliseconds; NAN where the bandwidth is not known. */
static double floor_ms(const struct bench *b, double n_seqs, double position)
{
    if (!b->set.bandwidth)
        return NAN;
    return (weight_bytes(b) + n_seqs * state_bytes(b, position)) / (1e6 * b->set.bandwidth);
}

/* The same of a prompt's steps, or their products' time where that is longer. */
static double prompt_floor_ms(const struct bench *b, int length, int n_seqs)
{
    const struct model_config *c = model_config(b->model);
    const double unused = (double)c->vocab_size * c->hidden_size * (c->tie_word_embeddings ? 1 : 2);
    const double n_steps = ceil((double)length / chunk_of(b, n_seqs));
    const double bytes = n_steps * floor_ms(b, n_seqs, length);
    if (!b->set.tflops)
        return bytes;
    const double products = 2 * ((double)b->n_parameters - unused) * length * n_seqs;
    return fmax(bytes, products / (1e9 * b->set.tflops));
}

/* ---- the tables ---- */

struct spread {
    double median, low, high, mean;
};

static struct spread spread_of(struct bench *b)
{
    const size_t n = (size_t)b->n_samples;
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += b->samples[i];
    return (struct spread){bench_quantile(b->samples, n, 0.5), bench_quantile(b->samples, n, 0.1),
                           bench_quantile(b->samples, n, 0.9), n ? sum / (double)n : NAN};
}

#define REPORT(b, kind, title, ...)                                                                \
    bench_report(b, kind, title, (const struct bench_column[]){__VA_ARGS__},                       \
                 sizeof((const struct bench_column[]){__VA_ARGS__}) / sizeof(struct bench_column))

static bool beyond(const struct bench *b, double n_tokens)
{
    if (fits(b, n_tokens))
        return false;
    bench_remark(b, "%10.0f  beyond max_position_embeddings of full attention", n_tokens);
    return true;
}

static bool measure_prefill(struct bench *b, int length, int n_seqs)
{
    if (beyond(b, length))
        return true;
    const double n_tokens = (double)length * n_seqs;
    double start = bench_now();
    b->n_samples = -1; /* the first repeat only warms up */
    while (b->n_samples < 0 || !enough(b, start)) {
        const double began = admit(b, 0, n_seqs, 0) ? bench_now() : 0;
        if (began == 0 || !prefill(b, 0, n_seqs, length))
            return false;
        if (b->n_samples >= 0)
            b->samples[b->n_samples] = 1e3 * (bench_now() - began);
        else
            start = bench_now();
        b->n_samples++;
    }
    const struct spread s = spread_of(b);
    REPORT(b, "prefill", "prompts, to the first token drawn", {"prompt_tokens", length, 0},
           {"sequences", n_seqs, 0}, {"tokens_per_s", 1e3 * n_tokens / s.median, 0},
           {"ms", s.median, 3}, {"floor_ms", prompt_floor_ms(b, length, n_seqs), 3},
           {"p10_ms", s.low, 3}, {"p90_ms", s.high, 3}, {"repeats", b->n_samples, 0});
    return true;
}

static bool measure_decode(struct bench *b, int batch)
{
    if (!warm_slots(b, 0, batch) || !sample_decoding(b, batch, batch))
        return false;
    const struct spread s = spread_of(b);
    const double position = (double)full_window(b);
    REPORT(b, "decode", "decoding", {"batch", batch, 0},
           {"tokens_per_s", 1e3 * batch / s.median, 0}, {"step_ms", s.median, 4},
           {"floor_ms", floor_ms(b, batch, position), 4}, {"p10_ms", s.low, 4},
           {"p90_ms", s.high, 4}, {"mean_ms", s.mean, 4}, {"steps", b->n_samples, 0});
    return true;
}

/* The paper's Table 9: from nothing to the last token of `batch` sessions. Seconds. */
static bool run_job(struct bench *b, int batch)
{
    if (!admit(b, 0, batch, BENCH_JOB_TOP_K))
        return false;
    const int most = chunk_of(b, BENCH_JOB_PROMPT);
    for (int done = 0, n; done < batch; done += n) {
        n = batch - done < most ? batch - done : most;
        for (int i = 0; i < n; i++)
            plan(b, i, done + i, BENCH_JOB_PROMPT, true);
        if (!queue(b, n))
            return false;
    }
    for (int t = 1; t < BENCH_JOB_OUTPUT; t++) {
        for (int i = 0; i < batch; i++)
            plan(b, i, i, 0, true);
        if (!queue(b, batch))
            return false;
    }
    return drain(b);
}

static double job_floor_s(const struct bench *b, int batch)
{
    double ms = floor_ms(b, batch, BENCH_JOB_PROMPT);
    for (int t = 1; t < BENCH_JOB_OUTPUT; t++)
        ms += floor_ms(b, batch, BENCH_JOB_PROMPT + t);
    return 1e-3 * ms;
}

static bool measure_job(struct bench *b, int batch)
{
    if (batch > b->n_slots || beyond(b, BENCH_JOB_PROMPT + BENCH_JOB_OUTPUT))
        return true;
    const double start = bench_now();
    b->n_samples = is_device(b) ? -1 : 0; /* the first repeat only warms up */
    while (b->n_samples < 0 || !enough(b, start)) {
        const double began = bench_now();
        if (!run_job(b, batch))
            return false;
        if (b->n_samples >= 0)
            b->samples[b->n_samples] = bench_now() - began;
        b->n_samples++;
    }
    const struct spread s = spread_of(b);
    REPORT(b, "job", "20 prompt tokens and 256 generated, top-k 40", {"batch", batch, 0},
           {"seconds", s.median, 4}, {"floor_s", job_floor_s(b, batch), 4}, {"p10_s", s.low, 4},
           {"p90_s", s.high, 4}, {"tokens_per_s", BENCH_JOB_OUTPUT * batch / s.median, 0},
           {"repeats", b->n_samples, 0});
    return true;
}

/* Rows of full attention that no token has written are pages that the system has not given out yet,
 * and reading them costs nothing: a position that is set would look too good. */
static bool fill_rings(struct bench *b)
{
    for (int i = 0; i < model_n_state_tensors(b->model); i++) {
        const struct state_tensor *t = model_state_tensor(b->model, i);
        struct error err;
        if (!strstr(t->name, "ring"))
            continue;
        float *values = malloc((size_t)t->n_values * sizeof(*values));
        for (int64_t k = 0; values && k < t->n_values; k++)
            values[k] = (float)(k % 17) * 0.01f;
        const enum status st = values ? model_state_write(b->model, 0, i, values, &err)
                                      : fail(&err, STATUS_NOMEM, "out of memory for a ring");
        free(values);
        if (st) {
            fprintf(stderr, "latte-bench: %s\n", err.text);
            return false;
        }
    }
    return true;
}

/* Move slot 0 on to the position, by tokens as far as that was asked for, and time some more.
 * *fed counts the tokens that were really fed, *first_ms is the first row's figure. */
static bool measure_position(struct bench *b, int position, double *fed, double *first_ms)
{
    if (beyond(b, (double)position + WARM_STEPS + MIN_SAMPLES))
        return true;
    const int64_t reached = (int64_t)model_position(b->model, 0);
    if (position > b->set.real_position) {
        if (model_max_position(b->model) && !fill_rings(b))
            return false;
        model_set_position(b->model, 0, (uint64_t)position);
    } else if (position > reached) {
        if (!prefill(b, 0, 1, (int)(position - reached)))
            return false;
        *fed = position;
    }
    if (!sample_decoding(b, 1, 1))
        return false;
    const struct spread s = spread_of(b);
    *first_ms = isnan(*first_ms) ? s.median : *first_ms;
    REPORT(b, "position", "one session, by its position (those beyond tokens_fed were set)",
           {"position", position, 0}, {"tokens_fed", *fed, 0}, {"token_ms", s.median, 4},
           {"ratio", s.median / *first_ms, 3}, {"floor_ms", floor_ms(b, 1, position), 4},
           {"p10_ms", s.low, 4}, {"p90_ms", s.high, 4}, {"steps", b->n_samples, 0});
    return true;
}

static bool measure_positions(struct bench *b)
{
    double fed = 0, first_ms = NAN;
    bool ok = admit(b, 0, 1, b->set.top_k) && prefill(b, 0, 1, 1);
    for (int i = 0; ok && i < b->set.n_positions; i++)
        ok = measure_position(b, b->set.positions[i], &fed, &first_ms);
    return ok;
}

/* What is free on the device before and after prompts of any length. */
static bool measure_memory(struct bench *b)
{
    static const int lengths[] = {0, 4096, 65536, 262144};
    struct backend_memory memory;
    double before = NAN;
    if (!model_memory(b->model, &memory)) {
        bench_remark(b, "\nmemory: this backend keeps no account of it");
        return true;
    }
    for (size_t i = 0; i < sizeof(lengths) / sizeof(*lengths); i++) {
        if (beyond(b, lengths[i]))
            continue;
        if (!admit(b, 0, 1, 0) || (lengths[i] && !prefill(b, 0, 1, lengths[i])))
            return false;
        model_memory(b->model, &memory);
        const double free_mb = (double)memory.free_bytes / 1e6;
        before = isnan(before) ? free_mb : before;
        REPORT(b, "memory", "device memory after one prompt", {"prompt_tokens", lengths[i], 0},
               {"free_mb", free_mb, 1}, {"taken_mb", before - free_mb, 1});
    }
    return true;
}

static bool measure_sessions(struct bench *b)
{
    const int n = b->set.n_sessions, turn = n < BENCH_TURN ? n : BENCH_TURN;
    if (!warm_slots(b, 0, n) || !sample_decoding(b, n, turn))
        return false;
    const struct spread s = spread_of(b);
    REPORT(b, "sessions", "live sessions decoding in turn", {"sessions", n, 0},
           {"state_gb", (double)n * (double)model_state_bytes(b->model) / 1e9, 2},
           {"turn", turn, 0}, {"steps_per_s", 1e3 / s.median, 1}, {"step_ms", s.median, 4},
           {"floor_ms", floor_ms(b, turn, (double)full_window(b)), 4}, {"p10_ms", s.low, 4},
           {"p90_ms", s.high, 4}, {"tokens_per_s", 1e3 * turn / s.median, 0},
           {"rounds", (double)b->n_samples * turn / n, 1});
    return true;
}

static bool measure_prompts(struct bench *b)
{
    static const int of_host[][2] = {{128, 1}, {1024, 1}, {4096, 1}, {128, 4}, {1024, 4}, {0, 0}};
    static const int of_device[][2] = {{16, 1},   {128, 1},   {1024, 1},  {4096, 1},
                                       {8192, 1}, {65536, 1}, {4096, 16}, {0, 0}};
    bool ok = true;
    for (const int(*p)[2] = is_device(b) ? of_device : of_host; ok && (*p)[0]; p++)
        ok = measure_prefill(b, (*p)[0], (*p)[1]);
    return ok;
}

bool bench_measure(struct bench *b)
{
    const unsigned wanted = b->set.tables;
    bool ok = true;
    if (wanted & TABLE_PREFILL)
        ok = measure_prompts(b);
    for (int i = 0; ok && wanted & TABLE_DECODE && i < b->set.n_batches; i++)
        ok = measure_decode(b, b->set.batches[i]);
    if (ok && wanted & TABLE_JOB)
        ok = measure_job(b, 16) && measure_job(b, 128);
    if (ok && wanted & TABLE_POSITION)
        ok = measure_positions(b);
    if (ok && wanted & TABLE_MEMORY)
        ok = measure_memory(b);
    if (ok && wanted & TABLE_SESSIONS)
        ok = measure_sessions(b);
    return ok;
}
