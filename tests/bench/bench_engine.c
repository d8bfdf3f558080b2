/* bench_engine.c - latte-bench engine: how fast the model itself runs, without HTTP: its options,
 * and the model they ask for. */
#include "tests/bench/bench_engine.h"

#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/cores.h"
#include "tests/bench/bench.h"
#include "tests/bench/bench_random.h"

enum {
    PROMPT_SEQS = 16,                 /* sequences of the widest table of prompts */
    SESSIONS_SPARE_BYTES = 512 << 20, /* left free where sessions take what fits */
    MAX_SESSIONS = 1 << 17,
};

/* ---- opening ---- */

static bool is_device(const struct bench_settings *s)
{
    return s->device_index >= 0;
}

static enum dtype dtype_of(const char *name)
{
    static const struct {
        const char *name;
        enum dtype dtype;
    } all[] = {{"f32", DTYPE_F32}, {"bf16", DTYPE_BF16}, {"int8", DTYPE_I8}, {"f8", DTYPE_F8_E4M3}};
    for (size_t i = 0; i < sizeof(all) / sizeof(*all); i++)
        if (!strcmp(name, all[i].name))
            return all[i].dtype;
    return DTYPE_OTHER;
}

/* What "auto" means for this file and device, as the engine has it. */
static void settle(struct bench_settings *s, const struct checkpoint *c)
{
    if (!strcmp(s->weight_dtype, "auto"))
        s->weight_dtype = c->embed_tokens->dtype == DTYPE_BF16 ? "bf16" : "f32";
    if (!strcmp(s->window_dtype, "auto"))
        s->window_dtype = is_device(s) ? "bf16" : "f32";
}

static enum status open_backend(struct backend **out, const struct bench_settings *s,
                                const struct backend_options *options, struct error *err)
{
    if (is_device(s))
        return backend_cuda_open(out, options, err);
    return strcmp(s->device, "ref") ? backend_cpu_open(out, options, err)
                                    : backend_ref_open(out, options, err);
}

static int larger(int a, int b)
{
    return a > b ? a : b;
}

/* Slots, sequences and rows that the tables asked for will use. */
static void size_model(struct bench *b, struct model_options *options)
{
    const struct bench_settings *s = &b->set;
    int batch = 1;
    if (s->tables & TABLE_PREFILL)
        batch = is_device(s) ? PROMPT_SEQS : 4;
    if (s->tables & TABLE_JOB)
        batch = larger(batch, 128);
    for (int i = 0; s->tables & TABLE_DECODE && i < s->n_batches; i++)
        batch = larger(batch, s->batches[i]);
    b->n_slots = batch;
    if (s->tables & TABLE_SESSIONS) {
        b->n_slots = larger(batch, s->n_sessions);
        batch = larger(batch, s->n_sessions < BENCH_TURN ? s->n_sessions : BENCH_TURN);
    }
    b->max_seqs = batch;
    b->max_rows = larger(batch, s->step_tokens);
    options->n_slots = b->n_slots;
    options->max_rows = b->max_rows;
    options->max_logit_rows = b->max_seqs;
}

static void backend_options_of(const struct bench *b, const struct checkpoint *c,
                               const struct model_options *options, struct backend_options *out)
{
    *out = (struct backend_options){.n_threads = b->set.n_threads,
                                    .device = larger(b->set.device_index, 0),
                                    .deterministic = b->set.deterministic,
                                    .composed = b->set.composed};
    model_backend_options(&c->config, options, out);
}

/* Whether n sessions fit on the device. */
static bool sessions_fit(struct bench *b, const struct checkpoint *c, struct model_options *options,
                         int n)
{
    struct backend_options bo;
    struct backend_memory memory;
    struct model_needs needs;
    struct error err;
    b->set.n_sessions = n;
    size_model(b, options);
    backend_options_of(b, c, options, &bo);
    model_needs(c, options, &needs);
    if (backend_cuda_probe(&bo, &memory, &err))
        return false;
    const size_t taken = needs.weight_bytes + needs.scratch_bytes + memory.workspace_bytes +
                         (size_t)b->n_slots * needs.slot_bytes + SESSIONS_SPARE_BYTES;
    return taken <= memory.free_bytes;
}

/* As many sessions as the device holds beside all else; 1024 on a host. */
static void size_sessions(struct bench *b, const struct checkpoint *c,
                          struct model_options *options)
{
    int least = 1, most = is_device(&b->set) ? MAX_SESSIONS : BENCH_TURN;
    if (!is_device(&b->set))
        least = most;
    while (least < most) {
        const int middle = least + (most - least + 1) / 2;
        if (sessions_fit(b, c, options, middle))
            least = middle;
        else
            most = middle - 1;
    }
    b->set.n_sessions = least;
}

static enum status take_arrays(struct bench *b, int32_t vocab_size, struct error *err)
{
    b->tokens = calloc((size_t)b->max_rows, sizeof(*b->tokens));
    b->seqs = calloc((size_t)b->max_seqs, sizeof(*b->seqs));
    b->n_output = calloc((size_t)b->n_slots, sizeof(*b->n_output));
    if (!b->tokens || !b->seqs || !b->n_output)
        return fail(err, STATUS_NOMEM, "out of memory for %d rows", b->max_rows);
    for (int i = 0; i < b->max_rows; i++)
        b->tokens[i] = (int32_t)((uint32_t)i * 2654435761u % (uint32_t)vocab_size);
    return STATUS_OK;
}

static enum status open_model(struct bench *b, const struct checkpoint *c, struct error *err)
{
    struct backend_options bo;
    struct backend *backend = NULL;
    settle(&b->set, c);
    struct model_options options = {.weight_dtype = dtype_of(b->set.weight_dtype),
                                    .window_dtype = dtype_of(b->set.window_dtype)};
    if (b->set.tables & TABLE_SESSIONS && !b->set.n_sessions)
        size_sessions(b, c, &options);
    size_model(b, &options);
    backend_options_of(b, c, &options, &bo);
    enum status st = open_backend(&backend, &b->set, &bo, err);
    if (!st)
        st = model_open(&b->model, c, backend, &options, NULL, NULL, err);
    if (st)
        return st;
    const struct stepper_options so = {
        .n_slots = b->n_slots, .max_rows = b->max_rows, .max_logit_rows = b->max_seqs};
    b->n_parameters = c->n_parameters;
    st = take_arrays(b, c->config.vocab_size, err);
    return st ? st : stepper_open(&b->stepper, b->model, &so, err);
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
    checkpoint_close(c);
    return st == STATUS_OK;
}

static bool load_random(struct bench *b)
{
    char dir[4000];
    if (random_model_write(b->set.random, b->set.context, dir, sizeof(dir)))
        return false;
    const bool ok = load(b, dir);
    random_model_remove(dir);
    return ok;
}

static void bench_close(struct bench *b)
{
    stepper_close(b->stepper);
    model_close(b->model);
    free(b->tokens);
    free(b->seqs);
    free(b->n_output);
}

/* ---- options ---- */

static void usage(FILE *out)
{
    fprintf(out,
            "usage: latte-bench engine (-m DIR | --random SHAPE) [options]\n"
            "  -m, --model DIR        the model to measure\n"
            "      --random SHAPE     random weights of a known shape: %s\n"
            "      --context N        positions of a random shape with full attention\n"
            "      --device NAME      cpu (default), ref, or cuda[:N]\n"
            "      --threads N        compute threads (default: one per core)\n"
            "      --weight-dtype T   auto (as the file, default), f32, bf16, or on a GPU int8\n"
            "      --window-dtype T   auto (default: bf16 on a GPU), f32, or on a GPU bf16, f8\n"
            "      --deterministic    (GPU) the same bits whatever else is in the batch\n"
            "      --composed         (GPU) no fused layers: what fusing gains\n"
            "      --only LIST        of prefill, decode, job, position, memory, sessions\n"
            "                         (default: the first, second and fourth; on a GPU all)\n"
            "      --batches LIST     sessions decoded together (default 1,4,16,64,128; on a GPU\n"
            "                         1,4,16,32,64,128,256,512,1024)\n"
            "      --top-k N          decode by drawing among the top N (default 0: greedy)\n"
            "      --positions LIST   (default 1000,10000,100000,1000000,10000000)\n"
            "      --real-position N  positions up to N are reached by feeding tokens, those\n"
            "                         beyond are set (default 10000)\n"
            "      --step-tokens N    rows of a step of prompts (default 512; on a GPU 8192)\n"
            "      --sessions N       live sessions that decode in turn (default auto: what fits)\n"
            "      --bandwidth GB/s   of memory, for floors (default 3080 on a GPU)\n"
            "      --tflops N         of bf16 products, for floors (default 720 on a GPU)\n"
            "      --seconds N        to spend on a figure at least (default 2; on a GPU 1)\n"
            "      --json, --csv      lines for programs instead of tables\n",
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

static bool parse_list(int *out, int *n, const char *text, int most)
{
    char copy[400], *rest = copy;
    if ((size_t)snprintf(copy, sizeof(copy), "%s", text) >= sizeof(copy))
        return false;
    *n = 0;
    for (char *item; (item = strsep(&rest, ","));)
        if (*n == BENCH_MAX_LIST || !parse_count(&out[(*n)++], item, 1, most))
            return false;
    return true;
}

static bool parse_tables(unsigned *out, const char *text)
{
    static const struct {
        const char *name;
        unsigned table;
    } all[] = {{"prefill", TABLE_PREFILL}, {"decode", TABLE_DECODE},
               {"job", TABLE_JOB},         {"position", TABLE_POSITION},
               {"memory", TABLE_MEMORY},   {"sessions", TABLE_SESSIONS}};
    char copy[200], *rest = copy;
    if ((size_t)snprintf(copy, sizeof(copy), "%s", text) >= sizeof(copy))
        return false;
    *out = 0;
    for (char *item; (item = strsep(&rest, ","));) {
        const unsigned before = *out;
        for (size_t i = 0; i < sizeof(all) / sizeof(*all); i++)
            if (!strcmp(item, all[i].name))
                *out |= all[i].table;
        if (*out == before)
            return false;
    }
    return true;
}

static bool one_of(const char **out, const char *text, const char *const *names)
{
    for (; *names; names++)
        if (!strcmp(text, *names)) {
            *out = *names;
            return true;
        }
    return false;
}

static bool parse_device(struct bench_settings *s, const char *text)
{
    static const char *const hosts[] = {"cpu", "ref", NULL};
    s->device_index = -1;
    if (one_of(&s->device, text, hosts))
        return true;
    s->device = "cuda";
    if (!strcmp(text, "cuda"))
        return parse_count(&s->device_index, "0", 0, 0);
    return !strncmp(text, "cuda:", 5) && parse_count(&s->device_index, text + 5, 0, 1023);
}

static bool parse_option(struct bench_settings *s, int option)
{
    static const char *const weights[] = {"auto", "f32", "bf16", "int8", NULL};
    static const char *const windows[] = {"auto", "f32", "bf16", "f8", NULL};
    switch (option) {
    case 'm':
        s->model_dir = optarg;
        return true;
    case 'r':
        s->random = optarg;
        return true;
    case 'c':
        return parse_count(&s->context, optarg, 1, INT32_MAX);
    case 'd':
        return parse_device(s, optarg);
    case 'w':
        return one_of(&s->weight_dtype, optarg, weights);
    case 'W':
        return one_of(&s->window_dtype, optarg, windows);
    case 'D':
        return s->deterministic = true;
    case 'C':
        return s->composed = true;
    case 't':
        return parse_count(&s->n_threads, optarg, 1, 1024);
    case 'o':
        return parse_tables(&s->tables, optarg);
    case 'b':
        return parse_list(s->batches, &s->n_batches, optarg, 65536);
    case 'k':
        return parse_count(&s->top_k, optarg, 0, 1 << 24);
    case 'P':
        return parse_list(s->positions, &s->n_positions, optarg, 2000000000);
    case 'p':
        return parse_count(&s->real_position, optarg, 0, 1000000000);
    case 'T':
        return parse_count(&s->step_tokens, optarg, 1, 1 << 20);
    case 'n':
        return !strcmp(optarg, "auto") || parse_count(&s->n_sessions, optarg, 1, MAX_SESSIONS);
    case 'B':
        return parse_count(&s->bandwidth, optarg, 1, 1000000);
    case 'f':
        return parse_count(&s->tflops, optarg, 1, 1000000);
    case 's':
        return parse_count(&s->seconds, optarg, 0, 3600);
    case 'j':
        s->output = OUTPUT_JSON;
        return true;
    case 'v':
        s->output = OUTPUT_CSV;
        return true;
    default:
        return false;
    }
}

/* What the device decides of the settings that nobody gave. */
static void set_defaults(struct bench_settings *s)
{
    const bool device = is_device(s);
    if (!s->tables)
        s->tables = TABLE_PREFILL | TABLE_DECODE | TABLE_POSITION |
                    (device ? TABLE_JOB | TABLE_MEMORY | TABLE_SESSIONS : 0);
    if (!s->n_batches)
        parse_list(s->batches, &s->n_batches,
                   device ? "1,4,16,32,64,128,256,512,1024" : "1,4,16,64,128", 4096);
    if (!s->n_positions)
        parse_list(s->positions, &s->n_positions, "1000,10000,100000,1000000,10000000", INT32_MAX);
    if (!s->step_tokens)
        s->step_tokens = device ? 8192 : 512;
    if (s->seconds < 0)
        s->seconds = device ? 1 : 2;
    if (!s->bandwidth && device)
        s->bandwidth = 3080;
    if (!s->tflops && device)
        s->tflops = 720;
}

/* 0 to go on, else the exit code plus one. */
static int parse(struct bench_settings *s, int argc, char **argv)
{
    static const struct option options[] = {{"model", 1, 0, 'm'},
                                            {"random", 1, 0, 'r'},
                                            {"context", 1, 0, 'c'},
                                            {"device", 1, 0, 'd'},
                                            {"threads", 1, 0, 't'},
                                            {"weight-dtype", 1, 0, 'w'},
                                            {"window-dtype", 1, 0, 'W'},
                                            {"deterministic", 0, 0, 'D'},
                                            {"composed", 0, 0, 'C'},
                                            {"only", 1, 0, 'o'},
                                            {"batches", 1, 0, 'b'},
                                            {"top-k", 1, 0, 'k'},
                                            {"positions", 1, 0, 'P'},
                                            {"real-position", 1, 0, 'p'},
                                            {"step-tokens", 1, 0, 'T'},
                                            {"sessions", 1, 0, 'n'},
                                            {"bandwidth", 1, 0, 'B'},
                                            {"tflops", 1, 0, 'f'},
                                            {"seconds", 1, 0, 's'},
                                            {"json", 0, 0, 'j'},
                                            {"csv", 0, 0, 'v'},
                                            {"help", 0, 0, 'h'},
                                            {0, 0, 0, 0}};
    bool ok = true;
    for (int c; ok && (c = getopt_long(argc, argv, "m:h", options, NULL)) != -1;) {
        if (c == 'h') {
            usage(stdout);
            return 1;
        }
        ok = parse_option(s, c);
    }
    if (ok && optind == argc && (s->model_dir != NULL) != (s->random != NULL)) {
        set_defaults(s);
        return 0;
    }
    usage(stderr);
    return 3;
}

int bench_engine(int argc, char **argv)
{
    static struct bench b; /* the samples are no stack's business */
    b.set = (struct bench_settings){.device = "cpu",
                                    .device_index = -1,
                                    .weight_dtype = "auto",
                                    .window_dtype = "auto",
                                    .n_threads = cores_available(),
                                    .seconds = -1,
                                    .real_position = 10000};
    const int code = parse(&b.set, argc, argv);
    if (code)
        return code - 1;
    bool ok = b.set.random ? load_random(&b) : load(&b, b.set.model_dir);
    if (ok) {
        bench_report_setup(&b);
        ok = bench_measure(&b);
    }
    bench_close(&b);
    return ok ? 0 : 1;
}
