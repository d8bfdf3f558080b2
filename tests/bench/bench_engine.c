/* bench_engine.c - latte-bench engine: how fast the model itself runs, without HTTP.
 *
 * Prompts (tokens per second by length and number of sequences), decoding (by batch) and the
 * time of a token by the position of its session, which should not depend on it. Each figure is
 * the median of repeats, with the 10th and 90th percentile beside it.
 */
#include <errno.h>
#include <getopt.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/bytes.h"
#include "engine/model.h"
#include "tests/bench/bench.h"
#include "tests/bench/bench_random.h"

enum {
    MAX_SAMPLES = 4096,
    MAX_BATCHES = 16,
    MIN_SAMPLES = 3,
    CHUNK_ROWS = 512, /* rows of a prefill step */
    WARM_TOKENS = 32, /* before decoding is measured */
};

struct settings {
    const char *model_dir, *random, *device, *weight_dtype;
    int n_threads;
    int batches[MAX_BATCHES];
    int n_batches;
    int seconds;       /* to spend on one figure, repeats permitting */
    int real_position; /* positions up to here are reached by feeding tokens */
    bool json;
};

struct bench {
    struct settings set;
    struct model *model;
    int32_t *tokens; /* [max_rows] random, the same for every step */
    struct model_seq *seqs;
    int64_t n_parameters;
    int n_slots;
    int n_samples;
    double samples[MAX_SAMPLES];
};

/* ---- running ---- */

/* One step of n_seqs sequences in slots 0.., n_rows each; seconds it took, < 0 on failure. */
static double step(struct bench *b, int n_seqs, int n_rows)
{
    const float *logits;
    struct error err;
    for (int i = 0; i < n_seqs; i++)
        b->seqs[i] = (struct model_seq){i, n_rows, LOGITS_LAST};
    const double start = bench_now();
    if (model_step(b->model, b->tokens, b->seqs, n_seqs, &logits, &err)) {
        fprintf(stderr, "latte-bench: %s\n", err.text);
        return -1;
    }
    return bench_now() - start;
}

/* Feed n_rows tokens to each of n_seqs sequences in steps of CHUNK_ROWS rows. */
static double prefill(struct bench *b, int n_seqs, int n_rows)
{
    double seconds = 0;
    const int most = CHUNK_ROWS / n_seqs > 0 ? CHUNK_ROWS / n_seqs : 1;
    for (int done = 0, n; done < n_rows; done += n) {
        n = n_rows - done < most ? n_rows - done : most;
        double one = step(b, n_seqs, n);
        if (one < 0)
            return -1;
        seconds += one;
    }
    return seconds;
}

static void reset(struct bench *b, int n_seqs)
{
    for (int i = 0; i < n_seqs; i++)
        model_reset(b->model, i);
}

static bool fits(const struct bench *b, double n_tokens)
{
    const int64_t limit = model_max_position(b->model);
    return !limit || n_tokens <= (double)limit;
}

static bool enough(const struct bench *b, double start)
{
    return b->n_samples == MAX_SAMPLES ||
           (b->n_samples >= MIN_SAMPLES && bench_now() - start >= b->set.seconds);
}

/* Keep a sample; false for one of a step that failed. */
static bool note(struct bench *b, double value)
{
    if (value <= 0)
        return false;
    b->samples[b->n_samples++] = value;
    return true;
}

/* ---- reporting ---- */

struct spread {
    double median, low, high;
};

static struct spread spread_of(struct bench *b)
{
    const size_t n = (size_t)b->n_samples;
    return (struct spread){bench_quantile(b->samples, n, 0.5), bench_quantile(b->samples, n, 0.1),
                           bench_quantile(b->samples, n, 0.9)};
}

static void heading(const struct bench *b, const char *text)
{
    if (!b->set.json)
        printf("\n%s\n", text);
}

static void report_prefill(struct bench *b, int length, int n_seqs)
{
    const struct spread s = spread_of(b);
    if (b->set.json)
        printf("{\"kind\":\"prefill\",\"prompt_tokens\":%d,\"sequences\":%d,\"repeats\":%d,"
               "\"tokens_per_s\":%.2f,\"p10\":%.2f,\"p90\":%.2f}\n",
               length, n_seqs, b->n_samples, s.median, s.low, s.high);
    else
        printf("%8d  %9d  %10.1f  %9.1f .. %-9.1f  %7d\n", length, n_seqs, s.median, s.low, s.high,
               b->n_samples);
    fflush(stdout);
}

/* Samples are milliseconds of one step. */
static void report_decode(struct bench *b, int batch)
{
    const struct spread s = spread_of(b);
    const double rate = 1e3 * batch / s.median;
    if (b->set.json)
        printf("{\"kind\":\"decode\",\"batch\":%d,\"repeats\":%d,\"tokens_per_s\":%.2f,"
               "\"step_ms\":%.4f,\"p10\":%.4f,\"p90\":%.4f}\n",
               batch, b->n_samples, rate, s.median, s.low, s.high);
    else
        printf("%8d  %10.1f  %9.3f  %8.3f .. %-8.3f  %7d\n", batch, rate, s.median, s.low, s.high,
               b->n_samples);
    fflush(stdout);
}

static void report_position(struct bench *b, double position, bool real)
{
    const struct spread s = spread_of(b);
    if (b->set.json)
        printf("{\"kind\":\"position\",\"position\":%.0f,\"reached\":\"%s\",\"repeats\":%d,"
               "\"token_ms\":%.4f,\"p10\":%.4f,\"p90\":%.4f}\n",
               position, real ? "fed" : "set", b->n_samples, s.median, s.low, s.high);
    else
        printf("%8.0f  %-7s  %9.3f  %8.3f .. %-8.3f  %7d\n", position, real ? "fed" : "set",
               s.median, s.low, s.high, b->n_samples);
    fflush(stdout);
}

static void report_skip(const struct bench *b, double n_tokens)
{
    if (!b->set.json)
        printf("%8.0f  beyond max_position_embeddings of full attention\n", n_tokens);
}

static void report_setup(const struct bench *b)
{
    const struct model *m = b->model;
    const char *name = b->set.random ? b->set.random : b->set.model_dir;
    if (b->set.json) {
        struct bytes text = {0};
        bytes_text(&text, "{\"kind\":\"setup\",\"machine\":");
        bytes_json_string(&text, bench_machine(), strlen(bench_machine()));
        bytes_text(&text, ",\"model\":");
        bytes_json_string(&text, name, strlen(name));
        bytes_format(&text,
                     ",\"parameters\":%lld,\"backend\":\"%s\",\"threads\":%d,"
                     "\"weight_dtype\":\"%s\",\"weight_bytes\":%zu,\"state_bytes\":%zu}",
                     (long long)b->n_parameters, model_backend_name(m), b->set.n_threads,
                     b->set.weight_dtype, model_weight_bytes(m), model_state_bytes(m));
        puts(text.failed ? "{}" : text.data);
        bytes_free(&text);
        return;
    }
    printf("machine  %s\n", bench_machine());
    printf("model    %s%s, %.1fM parameters\n", name, b->set.random ? " (random weights)" : "",
           (double)b->n_parameters / 1e6);
    printf("engine   %s backend, %d threads, %s weights of %.1f MB, %.2f MB of state a session\n",
           model_backend_name(m), b->set.n_threads, b->set.weight_dtype,
           (double)model_weight_bytes(m) / 1e6, (double)model_state_bytes(m) / 1e6);
}

/* ---- the tables ---- */

static bool measure_prefill(struct bench *b, int length, int n_seqs)
{
    if (!fits(b, length)) {
        report_skip(b, length);
        return true;
    }
    const double start = bench_now();
    for (b->n_samples = 0; !enough(b, start);) {
        reset(b, n_seqs);
        if (!note(b, (double)length * n_seqs / prefill(b, n_seqs, length)))
            return false;
    }
    report_prefill(b, length, n_seqs);
    return true;
}

/* Time single steps of the first n_seqs slots, while a session may go on. */
static bool sample_steps(struct bench *b, int n_seqs)
{
    const double start = bench_now();
    for (b->n_samples = 0; !enough(b, start) && fits(b, (double)model_position(b->model, 0) + 1);)
        if (!note(b, 1e3 * step(b, n_seqs, 1)))
            return false;
    return true;
}

static bool measure_decode(struct bench *b, int batch)
{
    reset(b, batch);
    if (prefill(b, batch, WARM_TOKENS) < 0)
        return false;
    if (!sample_steps(b, batch))
        return false;
    report_decode(b, batch);
    return true;
}

/* Move slot 0 on to the position, by tokens as far as that was asked for, and time some more. */
static bool measure_position(struct bench *b, double position)
{
    const double reached = (double)model_position(b->model, 0);
    const bool real = position <= b->set.real_position;
    if (!fits(b, position + MIN_SAMPLES)) {
        report_skip(b, position);
        return true;
    }
    if (!real)
        model_set_position(b->model, 0, (uint64_t)position);
    else if (position > reached && prefill(b, 1, (int)(position - reached)) < 0)
        return false;
    if (!sample_steps(b, 1))
        return false;
    report_position(b, position, real);
    return true;
}

static bool measure_all(struct bench *b)
{
    static const int prompts[][2] = {{128, 1}, {1024, 1}, {4096, 1}, {128, 4}, {1024, 4}};
    static const double positions[] = {1e3, 1e4, 1e5, 1e6};
    bool ok = true;
    heading(b, "prompts: tokens, sequences at once, tokens/s, 10th..90th percentile, repeats");
    for (size_t i = 0; ok && i < sizeof(prompts) / sizeof(*prompts); i++)
        if (prompts[i][1] <= b->n_slots)
            ok = measure_prefill(b, prompts[i][0], prompts[i][1]);
    heading(b, "decoding: batch, tokens/s, ms a step, 10th..90th percentile, steps");
    for (int i = 0; ok && i < b->set.n_batches; i++)
        ok = measure_decode(b, b->set.batches[i]);
    heading(b, "one session: position, reached by tokens fed or by being set, ms a token, "
               "10th..90th percentile, tokens");
    model_reset(b->model, 0);
    for (size_t i = 0; ok && i < sizeof(positions) / sizeof(*positions); i++)
        ok = measure_position(b, positions[i]);
    return ok;
}

/* ---- opening ---- */

static int n_cores(void)
{
    cpu_set_t set;
    return sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
}

/* "auto" is what the file holds; F16 files are kept as f32, as the engine does. */
static enum dtype choose_dtype(struct settings *s, const struct checkpoint *c)
{
    if (!strcmp(s->weight_dtype, "auto"))
        s->weight_dtype = c->embed_tokens->dtype == DTYPE_BF16 ? "bf16" : "f32";
    return strcmp(s->weight_dtype, "f32") ? DTYPE_BF16 : DTYPE_F32;
}

static int largest_batch(const struct settings *s)
{
    int most = 4; /* the prompts' sequences */
    for (int i = 0; i < s->n_batches; i++)
        most = s->batches[i] > most ? s->batches[i] : most;
    return most;
}

static enum status open_model(struct bench *b, const struct checkpoint *c, struct error *err)
{
    b->n_slots = largest_batch(&b->set);
    const int most_rows = b->n_slots > CHUNK_ROWS ? b->n_slots : CHUNK_ROWS;
    const struct model_options options = {.n_slots = b->n_slots,
                                          .max_rows = most_rows,
                                          .max_logit_rows = b->n_slots,
                                          .weight_dtype = choose_dtype(&b->set, c)};
    struct backend_options bo = {.n_threads = b->set.n_threads};
    struct backend *backend = NULL;
    model_backend_options(&c->config, &options, &bo);
    enum status st = strcmp(b->set.device, "ref") ? backend_cpu_open(&backend, &bo, err)
                                                  : backend_ref_open(&backend, &bo, err);
    if (!st)
        st = model_open(&b->model, c, backend, &options, NULL, NULL, err);
    if (st)
        return st;
    b->tokens = calloc((size_t)most_rows, sizeof(*b->tokens));
    b->seqs = calloc((size_t)b->n_slots, sizeof(*b->seqs));
    if (!b->tokens || !b->seqs)
        return fail(err, STATUS_NOMEM, "out of memory for %d rows", most_rows);
    for (int i = 0; i < most_rows; i++)
        b->tokens[i] = (int32_t)((uint32_t)i * 2654435761u % (uint32_t)c->config.vocab_size);
    return STATUS_OK;
}

/* The files are not needed once the model is open. */
static bool load(struct bench *b, const char *dir)
{
    struct checkpoint *c = NULL;
    struct error err;
    enum status st = checkpoint_open(&c, dir, NULL, NULL, &err);
    if (!st)
        st = open_model(b, c, &err);
    if (st)
        fprintf(stderr, "latte-bench: %s\n", err.text);
    else
        b->n_parameters = c->n_parameters;
    checkpoint_close(c);
    return st == STATUS_OK;
}

static bool load_random(struct bench *b)
{
    char dir[4000];
    if (random_model_write(b->set.random, dir, sizeof(dir)))
        return false;
    const bool ok = load(b, dir);
    random_model_remove(dir);
    return ok;
}

/* ---- options ---- */

static void usage(FILE *out)
{
    fprintf(out,
            "usage: latte-bench engine (-m DIR | --random SHAPE) [options]\n"
            "  -m, --model DIR        the model to measure\n"
            "      --random SHAPE     random weights of a known shape: %s\n"
            "      --device NAME      cpu (default) or ref\n"
            "      --threads N        compute threads (default: one per core)\n"
            "      --weight-dtype T   auto (as the file, default), f32 or bf16\n"
            "      --batches LIST     sessions decoded together (default 1,4,16,64,128)\n"
            "      --seconds N        to spend on a figure at least (default 2)\n"
            "      --real-position N  positions up to N are reached by feeding tokens, those\n"
            "                         beyond are set (default 10000)\n"
            "      --json             one JSON object a line instead of tables\n",
            random_model_names());
}

static bool parse_count(int *out, const char *text, int least, int most)
{
    char *end;
    errno = 0;
    const long n = strtol(text, &end, 10);
    if (errno || end == text || *end || n < least || n > most)
        return false;
    *out = (int)n;
    return true;
}

static bool parse_batches(struct settings *s, const char *text)
{
    char copy[200], *rest = copy;
    if ((size_t)snprintf(copy, sizeof(copy), "%s", text) >= sizeof(copy))
        return false;
    s->n_batches = 0;
    for (char *item; (item = strsep(&rest, ","));)
        if (s->n_batches == MAX_BATCHES || !parse_count(&s->batches[s->n_batches++], item, 1, 4096))
            return false;
    return true;
}

static bool one_of(const char *text, const char *const *names)
{
    for (; *names; names++)
        if (!strcmp(text, *names))
            return true;
    return false;
}

static bool parse_option(struct settings *s, int option)
{
    static const char *const devices[] = {"cpu", "ref", NULL};
    static const char *const dtypes[] = {"auto", "f32", "bf16", NULL};
    switch (option) {
    case 'm':
        s->model_dir = optarg;
        return true;
    case 'r':
        s->random = optarg;
        return true;
    case 'd':
        s->device = optarg;
        return one_of(optarg, devices);
    case 'w':
        s->weight_dtype = optarg;
        return one_of(optarg, dtypes);
    case 't':
        return parse_count(&s->n_threads, optarg, 1, 1024);
    case 'b':
        return parse_batches(s, optarg);
    case 's':
        return parse_count(&s->seconds, optarg, 0, 3600);
    case 'p':
        return parse_count(&s->real_position, optarg, 0, 1000000000);
    case 'j':
        return s->json = true;
    default:
        return false;
    }
}

int bench_engine(int argc, char **argv)
{
    static const struct option options[] = {{"model", 1, 0, 'm'},
                                            {"random", 1, 0, 'r'},
                                            {"device", 1, 0, 'd'},
                                            {"weight-dtype", 1, 0, 'w'},
                                            {"threads", 1, 0, 't'},
                                            {"batches", 1, 0, 'b'},
                                            {"seconds", 1, 0, 's'},
                                            {"json", 0, 0, 'j'},
                                            {"real-position", 1, 0, 'p'},
                                            {"help", 0, 0, 'h'},
                                            {0, 0, 0, 0}};
    static struct bench b; /* the samples are no stack's business */
    b.set = (struct settings){.device = "cpu",
                              .weight_dtype = "auto",
                              .n_threads = n_cores(),
                              .batches = {1, 4, 16, 64, 128},
                              .n_batches = 5,
                              .seconds = 2,
                              .real_position = 10000};
    bool ok = true;
    for (int c; ok && (c = getopt_long(argc, argv, "m:h", options, NULL)) != -1;) {
        if (c == 'h') {
            usage(stdout);
            return 0;
        }
        ok = parse_option(&b.set, c);
    }
    if (!ok || optind != argc || (b.set.model_dir != NULL) == (b.set.random != NULL)) {
        usage(stderr);
        return 2;
    }
    ok = b.set.random ? load_random(&b) : load(&b, b.set.model_dir);
    if (ok) {
        report_setup(&b);
        ok = measure_all(&b);
    }
    model_close(b.model);
    free(b.tokens);
    free(b.seqs);
    return ok ? 0 : 1;
}
