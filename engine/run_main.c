/* run_main.c - latte-run: one prompt on the terminal, or the perplexity of a text.
 *
 * The completion goes to stdout as it comes, everything else to stderr. Exit code 0; 1 with one
 * sentence on any error; 130 after Ctrl-C, which ends the generation and still reports.
 *
 * Threads: main, the engine's, and one that acts on SIGINT and SIGTERM.
 */
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <math.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

#include "engine/base/bytes.h"
#include "engine/base/file.h"
#include "engine/base/utf8.h"
#include "engine/base/version.h"
#include "engine/engine.h"
#include "weights/chat_template.h"
#include "weights/tokenizer.h"

enum {
    MAX_TEXT_BYTES = 1 << 30,
    DEFAULT_MAX_TOKENS = 256,
    READ_TOKENS = 64,
    INTERRUPTED = 130, /* exit code, as shells have it */
};

/* Sampling values are NAN or INT64_MIN where the command line says nothing. */
struct run_options {
    const char *model_dir, *prompt, *prompt_file, *perplexity_file, *system;
    const char *device, *weight_dtype;
    double temperature, top_p, min_p, typical_p, repetition_penalty;
    int64_t top_k, max_tokens, threads;
    uint64_t seed;
    bool has_seed, ignore_eos, echo, chat, quiet, help, version;
};

/* ---- Options ---- */

enum value_kind { VALUE_FLAG, VALUE_TEXT, VALUE_NUMBER, VALUE_INT, VALUE_SEED };

struct option_row {
    const char *name;
    char letter; /* 0 for none */
    const char *argument, *help;
    enum value_kind kind;
    size_t offset; /* in struct run_options */
};

#define ROW(name, letter, argument, kind, field, help)                                             \
    {                                                                                              \
        name, letter, argument, help, kind, offsetof(struct run_options, field)                    \
    }

static const struct option_row rows[] = {
    ROW("model", 'm', "DIR", VALUE_TEXT, model_dir, "model directory"),
    ROW("prompt", 'p', "TEXT", VALUE_TEXT, prompt, "text to complete"),
    ROW("file", 'f', "FILE", VALUE_TEXT, prompt_file, "read the prompt from FILE, - for stdin"),
    ROW("chat", 'c', NULL, VALUE_FLAG, chat, "answer the prompt through the model's chat template"),
    ROW("system", 0, "TEXT", VALUE_TEXT, system, "with --chat: the system message"),
    ROW("max-tokens", 'n', "N", VALUE_INT, max_tokens,
        "tokens at most (default: the model's, else 256)"),
    ROW("temperature", 't', "X", VALUE_NUMBER, temperature, "0 is greedy"),
    ROW("top-k", 0, "N", VALUE_INT, top_k, "keep the N likeliest tokens, 0 for all"),
    ROW("top-p", 0, "X", VALUE_NUMBER, top_p, "keep the likeliest tokens that sum to X"),
    ROW("min-p", 0, "X", VALUE_NUMBER, min_p, "keep tokens X times as likely as the likeliest"),
    ROW("typical-p", 0, "X", VALUE_NUMBER, typical_p, "keep the most typical tokens that sum to X"),
    ROW("repetition-penalty", 0, "X", VALUE_NUMBER, repetition_penalty, "1 is none"),
    ROW("seed", 's', "N", VALUE_SEED, seed, "the same seed gives the same text"),
    ROW("ignore-eos", 0, NULL, VALUE_FLAG, ignore_eos, "go on after the end of the text"),
    ROW("echo", 0, NULL, VALUE_FLAG, echo, "print the prompt first"),
    ROW("perplexity", 0, "FILE", VALUE_TEXT, perplexity_file,
        "print perplexity and bits per byte of FILE instead, - for stdin"),
    ROW("threads", 0, "N", VALUE_INT, threads, "0 (default): one per core"),
    ROW("device", 0, "NAME", VALUE_TEXT, device, "auto, cpu or ref"),
    ROW("weight-dtype", 0, "NAME", VALUE_TEXT, weight_dtype, "auto, f32 or bf16"),
    ROW("quiet", 'q', NULL, VALUE_FLAG, quiet, "nothing but the text"),
    ROW("help", 'h', NULL, VALUE_FLAG, help, "print this"),
    ROW("version", 0, NULL, VALUE_FLAG, version, "print the version"),
};
enum { N_ROWS = sizeof(rows) / sizeof(rows[0]) };

static void print_help(void)
{
    printf(
        "Usage: latte-run -m DIR -p TEXT [options]\n\n"
        "Complete a prompt with a Latte model. Sampling options that are not given are those of\n"
        "the model's generation_config.json.\n\n");
    for (int i = 0; i < N_ROWS; i++) {
        char name[40];
        snprintf(name, sizeof(name), "--%s%s%s", rows[i].name, rows[i].argument ? " " : "",
                 rows[i].argument ? rows[i].argument : "");
        if (rows[i].letter)
            printf("  -%c, %-24s %s\n", rows[i].letter, name, rows[i].help);
        else
            printf("      %-24s %s\n", name, rows[i].help);
    }
}

static enum status bad_value(const struct option_row *row, const char *text, struct error *err)
{
    return fail(err, STATUS_INVALID, "--%s: \"%s\" is not a number it takes", row->name, text);
}

static enum status set_option(struct run_options *o, const struct option_row *row, const char *text,
                              struct error *err)
{
    void *field = (char *)o + row->offset;
    char *end = NULL;
    errno = 0;
    switch (row->kind) {
    case VALUE_FLAG:
        *(bool *)field = true;
        return STATUS_OK;
    case VALUE_TEXT:
        *(const char **)field = text;
        return STATUS_OK;
    case VALUE_NUMBER:
        *(double *)field = strtod(text, &end);
        return end == text || *end || !isfinite(*(double *)field) ? bad_value(row, text, err)
                                                                  : STATUS_OK;
    case VALUE_INT:
        *(int64_t *)field = strtoll(text, &end, 10);
        return end == text || *end || errno || llabs(*(int64_t *)field) > INT32_MAX
                   ? bad_value(row, text, err)
                   : STATUS_OK;
    case VALUE_SEED:
        *(uint64_t *)field = strtoull(text, &end, 10);
        o->has_seed = true;
        return end == text || *end || errno ? bad_value(row, text, err) : STATUS_OK;
    }
    return STATUS_INTERNAL;
}

static enum status check_options(const struct run_options *o, struct error *err)
{
    int n_texts = (o->prompt != NULL) + (o->prompt_file != NULL) + (o->perplexity_file != NULL);
    if (!o->model_dir)
        return fail(err, STATUS_INVALID, "no model: give its directory with -m DIR");
    if (n_texts != 1)
        return fail(err, STATUS_INVALID, "give one of -p TEXT, -f FILE and --perplexity FILE%s",
                    n_texts ? ", not several" : "");
    if (o->system && !o->chat)
        return fail(err, STATUS_INVALID, "--system is for --chat");
    if (o->max_tokens != INT64_MIN && o->max_tokens < 0)
        return fail(err, STATUS_INVALID, "--max-tokens is %" PRId64 "; it must be 0 or more",
                    o->max_tokens);
    return STATUS_OK;
}

static enum status parse_options(struct run_options *o, int argc, char **argv, struct error *err)
{
    *o = (struct run_options){
        .device = "auto",
        .weight_dtype = "auto",
        .temperature = NAN,
        .top_p = NAN,
        .min_p = NAN,
        .typical_p = NAN,
        .repetition_penalty = NAN,
        .top_k = INT64_MIN,
        .max_tokens = INT64_MIN,
    };
    struct option longs[N_ROWS + 1] = {0};
    char shorts[2 * N_ROWS + 2] = ":";
    for (int i = 0, n = 1; i < N_ROWS; i++) {
        int has_argument = rows[i].argument ? required_argument : no_argument;
        longs[i] = (struct option){rows[i].name, has_argument, NULL, 1000 + i};
        if (rows[i].letter)
            n += snprintf(shorts + n, sizeof(shorts) - (size_t)n, "%c%s", rows[i].letter,
                          rows[i].argument ? ":" : "");
    }
    opterr = 0;
    for (int c; (c = getopt_long(argc, argv, shorts, longs, NULL)) != -1;) {
        int row = c - 1000;
        for (int i = 0; i < N_ROWS && c < 1000; i++)
            if (rows[i].letter == c)
                row = i;
        if (c == ':')
            return fail(err, STATUS_INVALID, "%s needs a value", argv[optind - 1]);
        if (row < 0)
            return fail(err, STATUS_INVALID, "%s is no option; see --help", argv[optind - 1]);
        enum status st = set_option(o, &rows[row], optarg, err);
        if (st)
            return st;
    }
    if (o->help || o->version)
        return STATUS_OK;
    if (optind < argc)
        return fail(err, STATUS_INVALID,
                    "\"%s\" is left over; a prompt of several words needs quotes", argv[optind]);
    return check_options(o, err);
}

/* ---- Interruption ---- */

static struct {
    pthread_mutex_t lock; /* guards all that follows */
    struct job *job;      /* what a signal cancels, borrowed; NULL before and between jobs */
    bool interrupted;
} current = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* The handler may run on any thread, also one that a library started before main and whose
 * signal mask is its own; all it does is post. */
static sem_t signals;

static void post_signal(int number)
{
    (void)number;
    sem_post(&signals);
}

/* The first signal cancels the job, if there is one; the second ends the process. */
static void *wait_for_signals(void *context)
{
    for (;;) {
        if (sem_wait(&signals)) /* EINTR: the handler ran on this thread */
            continue;
        pthread_mutex_lock(&current.lock);
        if (current.interrupted || !current.job)
            _exit(INTERRUPTED);
        current.interrupted = true;
        job_cancel(current.job);
        pthread_mutex_unlock(&current.lock);
    }
    return context;
}

static enum status catch_signals(struct error *err)
{
    struct sigaction action = {.sa_handler = post_signal, .sa_flags = SA_RESTART};
    pthread_t thread;
    sem_init(&signals, 0, 0);
    int failed = pthread_create(&thread, NULL, wait_for_signals, NULL);
    if (failed)
        return fail(err, STATUS_NOMEM, "signal thread: %s", strerror(failed));
    pthread_detach(thread);
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    return STATUS_OK;
}

static void set_current_job(struct job *job)
{
    pthread_mutex_lock(&current.lock);
    current.job = job;
    pthread_mutex_unlock(&current.lock);
}

static bool was_interrupted(void)
{
    pthread_mutex_lock(&current.lock);
    bool interrupted = current.interrupted;
    pthread_mutex_unlock(&current.lock);
    return interrupted;
}

/* ---- Loading ---- */

struct run {
    struct run_options options;
    bool shows_progress; /* stderr is a terminal */
    int last_percent;
    struct tokenizer *tokenizer;
    struct chat_template *template;
    struct engine *engine;
    struct engine_info info;
};

static void show_bar(struct run *r, const char *what, int percent)
{
    char bar[31];
    if (!r->shows_progress || percent == r->last_percent)
        return;
    r->last_percent = percent;
    for (int i = 0; i < 30; i++)
        bar[i] = i < percent * 30 / 100 ? '#' : '.';
    bar[30] = 0;
    fprintf(stderr, "\r%s [%s] %3d%%", what, bar, percent);
}

static void clear_bar(struct run *r)
{
    if (r->shows_progress && r->last_percent >= 0)
        fputs("\r\033[K", stderr);
    r->last_percent = -1;
}

static void show_loading(void *context, uint64_t done, uint64_t total)
{
    show_bar(context, "loading", total ? (int)(100.0 * (double)done / (double)total) : 100);
}

static void report_loaded(struct run *r, int64_t start_ns)
{
    clear_bar(r);
    if (r->options.quiet || r->shows_progress)
        return;
    fprintf(stderr, "loaded %s: %.1fM parameters, %s, %s, %d threads, %.2f s\n",
            r->options.model_dir, (double)r->info.n_parameters * 1e-6, r->info.weight_dtype,
            r->info.backend, r->info.n_threads, (double)(job_clock_ns() - start_ns) * 1e-9);
}

static enum status load(struct run *r, struct error *err)
{
    const struct run_options *o = &r->options;
    char path[FILE_PATH_BYTES];
    int64_t start_ns = job_clock_ns();
    enum status st = file_path(path, o->model_dir, "tokenizer.json", err);
    if (!st)
        st = tokenizer_open(&r->tokenizer, path, err);
    if (!st && o->chat)
        st = chat_template_open(&r->template, o->model_dir, err);
    if (st)
        return st;

    struct engine_options options;
    engine_options_init(&options);
    options.model_dir = o->model_dir;
    options.device = o->device;
    options.weight_dtype = o->weight_dtype;
    options.n_threads = (int)o->threads;
    options.n_slots = 1;
    options.max_queue = 1;
    options.progress = show_loading;
    options.progress_context = r;
    st = engine_open(&r->engine, &options, err);
    if (st) {
        clear_bar(r);
        return st;
    }
    engine_info(r->engine, &r->info);
    report_loaded(r, start_ns);
    return STATUS_OK;
}

/* ---- Text in ---- */

static enum status read_stdin(struct bytes *out, struct error *err)
{
    char piece[65536];
    size_t n;
    out->limit = MAX_TEXT_BYTES;
    while ((n = fread(piece, 1, sizeof(piece), stdin)) > 0 && !out->failed)
        bytes_append(out, piece, n);
    if (ferror(stdin))
        return fail(err, STATUS_IO, "stdin: %s", strerror(errno));
    if (out->failed)
        return fail(err, STATUS_TOO_LARGE, "stdin has more than %d bytes", MAX_TEXT_BYTES);
    return STATUS_OK;
}

/* The text of a file, or of stdin for "-", which must be UTF-8. */
static enum status read_text(struct bytes *out, const char *path, struct error *err)
{
    enum status st =
        strcmp(path, "-") ? file_read(out, path, MAX_TEXT_BYTES, err) : read_stdin(out, err);
    if (st)
        return st;
    size_t valid = utf8_valid_prefix(out->data, out->n);
    if (valid < out->n)
        return fail(err, STATUS_INVALID, "%s is not UTF-8: byte %zu is 0x%02x", path, valid,
                    (unsigned char)out->data[valid]);
    return STATUS_OK;
}

static enum status read_prompt(const struct run *r, struct bytes *out, struct error *err)
{
    const char *prompt = r->options.prompt;
    if (!prompt)
        return read_text(out, r->options.prompt_file, err);
    size_t n = strlen(prompt), valid = utf8_valid_prefix(prompt, n);
    if (valid < n)
        return fail(err, STATUS_INVALID, "the prompt is not UTF-8: byte %zu is 0x%02x", valid,
                    (unsigned char)prompt[valid]);
    bytes_append(out, prompt, n);
    return out->failed ? fail(err, STATUS_NOMEM, "prompt: out of memory") : STATUS_OK;
}

/* Replace the prompt by the conversation that it opens, and stop where the answer ends. */
static enum status apply_template(const struct run *r, struct bytes *text,
                                  struct sampling_params *sampling, struct error *err)
{
    const char *system = r->options.system, *stops[4];
    struct chat_message messages[2];
    size_t n = 0;
    if (system)
        messages[n++] = (struct chat_message){CHAT_ROLE_SYSTEM, system, strlen(system)};
    messages[n++] = (struct chat_message){CHAT_ROLE_USER, text->data ? text->data : "", text->n};
    struct bytes rendered = {0};
    enum status st =
        chat_template_render(r->template, messages, n, CHAT_ADD_GENERATION_PROMPT, &rendered, err);
    if (st) {
        bytes_free(&rendered);
        return st;
    }
    bytes_free(text);
    *text = rendered;
    int n_stops = chat_template_stops(r->template, stops);
    for (int i = 0; i < n_stops; i++) {
        int32_t id = tokenizer_find(r->tokenizer, stops[i], strlen(stops[i]));
        if (id >= 0)
            sampling->stop_tokens[sampling->n_stop_tokens++] = id;
    }
    return STATUS_OK;
}

/* ---- A completion ---- */

static float chosen(double option, double model, double fallback)
{
    return (float)(!isnan(option) ? option : !isnan(model) ? model : fallback);
}

static void fill_sampling(struct run *r, struct sampling_params *p)
{
    struct run_options *o = &r->options;
    const struct generation_defaults *g = &r->info.generation;
    sampling_params_init(p);
    p->temperature = chosen(o->temperature, g->temperature, 1);
    p->top_p = chosen(o->top_p, g->top_p, 1);
    p->min_p = chosen(o->min_p, g->min_p, 0);
    p->typical_p = chosen(o->typical_p, g->typical_p, 1);
    p->repetition_penalty = chosen(o->repetition_penalty, g->repetition_penalty, 1);
    p->top_k = o->top_k != INT64_MIN ? (int)o->top_k : g->top_k > 0 ? g->top_k : 0;
    p->ignore_eos = o->ignore_eos;
    if (!o->has_seed && getrandom(&o->seed, sizeof(o->seed), 0) == sizeof(o->seed))
        o->seed >>= 32; /* short enough to type again */
    p->seed = o->seed;
}

static enum status start_job(struct run *r, const struct job_request *request, struct job **out,
                             struct error *err)
{
    struct job *job = NULL;
    enum status st = job_new(&job, request, err);
    if (!st)
        st = engine_submit(r->engine, job, err);
    if (st) {
        job_release(job);
        return st;
    }
    set_current_job(job);
    *out = job;
    return STATUS_OK;
}

static void end_job(struct job *job, struct job_snapshot *snapshot)
{
    set_current_job(NULL);
    job_snapshot(job, snapshot);
    job_release(job);
}

static enum status print_text(struct bytes *text, struct error *err)
{
    if (text->failed)
        return fail(err, STATUS_NOMEM, "output: out of memory");
    if (fwrite(text->data, 1, text->n, stdout) != text->n || fflush(stdout))
        return fail(err, STATUS_IO, "stdout: %s", strerror(errno));
    bytes_consume(text, text->n);
    return STATUS_OK;
}

/* Print the job's text as it comes, until it ends. */
static enum status stream_job(struct run *r, struct job *job, struct error *err)
{
    struct detokenizer detokenizer;
    struct bytes text = {0};
    struct job_token tokens[READ_TOKENS];
    enum status st = STATUS_OK;
    size_t n;
    detokenizer_init(&detokenizer, r->tokenizer, true);
    while (!st) {
        job_wait(job);
        n = job_read(job, tokens, READ_TOKENS);
        for (size_t i = 0; i < n; i++)
            detokenizer_push(&detokenizer, tokens[i].token, &text);
        if (!n)
            detokenizer_finish(&detokenizer, &text);
        if (text.n || text.failed)
            st = print_text(&text, err);
        if (!n)
            break;
    }
    if (st)
        job_cancel(job);
    bytes_free(&text);
    return st;
}

static double seconds(int64_t from_ns, int64_t to_ns)
{
    return from_ns && to_ns > from_ns ? (double)(to_ns - from_ns) * 1e-9 : 0;
}

static double rate(double n, double s)
{
    return s > 0 ? n / s : 0;
}

static void report_completion(const struct run *r, const struct job_snapshot *s)
{
    double prompt_s =
        seconds(s->admitted_ns, s->first_token_ns ? s->first_token_ns : s->finished_ns);
    double decode_s = seconds(s->first_token_ns, s->finished_ns);
    double n_decoded = s->n_output > 1 ? (double)(s->n_output - 1) : 0;
    static const char *const ends[] = {"", "end of text", "length", "interrupted", "error"};
    if (r->options.quiet)
        return;
    fprintf(stderr,
            "prompt %zu tokens, %.1f tokens/s; output %zu tokens, %.1f tokens/s; %s; seed %" PRIu64
            "\n",
            s->n_prompt_done, rate((double)s->n_prompt_done, prompt_s), s->n_output,
            rate(n_decoded, decode_s), ends[s->finish], r->options.seed);
}

static enum status complete_tokens(struct run *r, const struct token_list *prompt,
                                   const struct sampling_params *sampling, struct error *err)
{
    int64_t most = r->options.max_tokens, model = r->info.generation.max_new_tokens;
    struct job_request request = {
        .prompt = prompt->ids,
        .n_prompt = prompt->n,
        .max_tokens = most != INT64_MIN ? most
                      : model > 0       ? model
                                        : DEFAULT_MAX_TOKENS,
        .prompt_logprobs = -1,
        .sampling = *sampling,
    };
    struct job *job;
    struct job_snapshot snapshot;
    enum status st = start_job(r, &request, &job, err);
    if (st)
        return st;
    st = stream_job(r, job, err);
    end_job(job, &snapshot);
    if (st)
        return st;
    if (snapshot.finish == FINISH_ERROR)
        return fail(err, snapshot.error.status, "%s", snapshot.error.text);
    fputc('\n', stdout);
    fflush(stdout);
    report_completion(r, &snapshot);
    return STATUS_OK;
}

static enum status complete(struct run *r, struct error *err)
{
    struct bytes text = {0};
    struct token_list prompt = {0};
    struct sampling_params sampling;
    fill_sampling(r, &sampling);
    enum status st = read_prompt(r, &text, err);
    if (!st && r->options.echo)
        fwrite(text.data, 1, text.n, stdout);
    if (!st && r->options.chat)
        st = apply_template(r, &text, &sampling, err);
    /* A template writes the beginning of the text itself. */
    if (!st)
        st = tokenizer_encode(r->tokenizer, text.data ? text.data : "", text.n,
                              r->options.chat ? 0 : TOKENIZER_ADD_SPECIAL, &prompt, err);
    if (!st)
        st = complete_tokens(r, &prompt, &sampling, err);
    token_list_free(&prompt);
    bytes_free(&text);
    return st;
}

/* ---- Perplexity ---- */

struct tally {
    size_t n_scored, n_seen, n_total; /* tokens */
    size_t unscored_bytes;            /* text of tokens that have nothing before them */
    double nats;
};

static void count_score(const struct run *r, struct tally *t, const struct job_token *token)
{
    t->n_seen++;
    if (!isnan(token->logprob)) {
        t->nats -= token->logprob;
        t->n_scored++;
        return;
    }
    struct bytes piece = {0};
    if (!tokenizer_is_special(r->tokenizer, token->token))
        tokenizer_piece(r->tokenizer, token->token, &piece);
    t->unscored_bytes += piece.n;
    bytes_free(&piece);
}

/* One stretch of tokens, scored from an empty state. */
static enum status score_tokens(struct run *r, const int32_t *tokens, size_t n, struct tally *t,
                                struct error *err)
{
    struct job_request request = {.prompt = tokens, .n_prompt = n, .prompt_logprobs = 0};
    struct job *job;
    struct job_snapshot snapshot;
    struct job_token scores[READ_TOKENS];
    sampling_params_init(&request.sampling);
    enum status st = start_job(r, &request, &job, err);
    if (st)
        return st;
    for (;;) {
        job_wait(job);
        size_t got = job_read(job, scores, READ_TOKENS);
        for (size_t i = 0; i < got; i++)
            count_score(r, t, &scores[i]);
        if (!got)
            break;
        show_bar(r, "scoring", (int)(100.0 * (double)t->n_seen / (double)t->n_total));
    }
    end_job(job, &snapshot);
    return snapshot.finish == FINISH_ERROR
               ? fail(err, snapshot.error.status, "%s", snapshot.error.text)
               : STATUS_OK;
}

static void report_perplexity(struct run *r, const struct tally *t, size_t n_bytes,
                              int64_t start_ns)
{
    clear_bar(r);
    bool whole = t->n_seen == t->n_total;
    if (t->n_scored == 0) {
        printf("nothing to score: %zu tokens\n", t->n_total);
        return;
    }
    printf("perplexity %.4f a token", exp(t->nats / (double)t->n_scored));
    if (whole && n_bytes > t->unscored_bytes)
        printf(", %.4f bits a byte", t->nats / M_LN2 / (double)(n_bytes - t->unscored_bytes));
    printf("; %zu tokens, %zu bytes%s\n", t->n_seen, n_bytes, whole ? "" : " (interrupted)");
    if (!r->options.quiet)
        fprintf(stderr, "%.1f tokens/s\n",
                rate((double)t->n_seen, seconds(start_ns, job_clock_ns())));
}

/* The whole text as one session; a model with a limited context starts anew at its limit. */
static enum status perplexity(struct run *r, struct error *err)
{
    struct bytes text = {0};
    struct token_list tokens = {0};
    enum status st = read_text(&text, r->options.perplexity_file, err);
    if (!st)
        st = tokenizer_encode(r->tokenizer, text.data ? text.data : "", text.n,
                              TOKENIZER_ADD_SPECIAL, &tokens, err);
    struct tally tally = {.n_total = tokens.n};
    size_t stretch = r->info.max_position ? (size_t)r->info.max_position : tokens.n;
    int64_t start_ns = job_clock_ns();
    for (size_t i = 0; !st && i < tokens.n && !was_interrupted(); i += stretch)
        st = score_tokens(r, tokens.ids + i, tokens.n - i < stretch ? tokens.n - i : stretch,
                          &tally, err);
    if (!st)
        report_perplexity(r, &tally, text.n, start_ns);
    clear_bar(r);
    token_list_free(&tokens);
    bytes_free(&text);
    return st;
}

/* ---- Main ---- */

static enum status run(struct run *r, struct error *err)
{
    enum status st = catch_signals(err);
    if (!st)
        st = load(r, err);
    if (!st)
        st = r->options.perplexity_file ? perplexity(r, err) : complete(r, err);
    engine_close(r->engine);
    chat_template_close(r->template);
    tokenizer_close(r->tokenizer);
    return st;
}

int main(int argc, char **argv)
{
    struct run r = {.last_percent = -1};
    struct error err;
    enum status st = parse_options(&r.options, argc, argv, &err);
    if (!st && r.options.help) {
        print_help();
        return 0;
    }
    if (!st && r.options.version) {
        puts("latte-run " LATTE_VERSION);
        return 0;
    }
    r.shows_progress = isatty(STDERR_FILENO) && !r.options.quiet;
    if (!st)
        st = run(&r, &err);
    if (st) {
        fprintf(stderr, "latte-run: %s\n", err.text);
        return 1;
    }
    return was_interrupted() ? INTERRUPTED : 0;
}
