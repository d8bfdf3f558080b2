/* options.c - see options.h */
#include "engine/run/options.h"

#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>

enum value_kind { VALUE_FLAG, VALUE_TEXT, VALUE_NUMBER, VALUE_INT, VALUE_SEED, VALUE_LENGTHS };

struct option_row {
    const char *name;
    char letter; /* 0 for none */
    const char *argument, *help;
    unsigned modes; /* that take it */
    enum value_kind kind;
    size_t offset; /* in struct run_options */
};

#define ROW(name, letter, argument, modes, kind, field, help)                                      \
    {                                                                                              \
        name, letter, argument, help, modes, kind, offsetof(struct run_options, field)             \
    }
#define ANSWER (RUN_COMPLETE | RUN_CHAT)
#define ENGINE (ANSWER | RUN_PERPLEXITY) /* --explain has a model of its own on the CPU */
#define ANY (ENGINE | RUN_EXPLAIN)

static const struct option_row rows[] = {
    ROW("model", 'm', "DIR", ANY, VALUE_TEXT, model_dir, "model directory"),
    ROW("prompt", 'p', "TEXT", ANY, VALUE_TEXT, prompt, "text to complete"),
    ROW("file", 'f', "FILE", ANY, VALUE_TEXT, prompt_file,
        "read the prompt from FILE, - for stdin"),
    ROW("chat", 'c', NULL, ANSWER, VALUE_FLAG, chat,
        "answer the prompt through the model's chat template; without -p and -f, line by line"),
    ROW("system", 0, "TEXT", ANSWER, VALUE_TEXT, system, "with --chat: the system message"),
    ROW("max-tokens", 'n', "N", ANSWER, VALUE_INT, max_tokens,
        "tokens at most (default: the model's, else 256)"),
    ROW("temperature", 't', "X", ANSWER, VALUE_NUMBER, temperature, "0 is greedy"),
    ROW("top-k", 0, "N", ANSWER, VALUE_INT, top_k, "keep the N likeliest tokens, 0 for all"),
    ROW("top-p", 0, "X", ANSWER, VALUE_NUMBER, top_p, "keep the likeliest tokens that sum to X"),
    ROW("min-p", 0, "X", ANSWER, VALUE_NUMBER, min_p,
        "keep tokens X times as likely as the likeliest"),
    ROW("typical-p", 0, "X", ANSWER, VALUE_NUMBER, typical_p,
        "keep the most typical tokens that sum to X"),
    ROW("repetition-penalty", 0, "X", ANSWER, VALUE_NUMBER, repetition_penalty, "1 is none"),
    ROW("seed", 's', "N", ANSWER, VALUE_SEED, seed, "the same seed gives the same text"),
    ROW("ignore-eos", 0, NULL, ANSWER, VALUE_FLAG, ignore_eos,
        "go on after the end of the text or turn"),
    ROW("echo", 0, NULL, RUN_COMPLETE, VALUE_FLAG, echo, "print the prompt first"),
    ROW("perplexity", 0, "FILE", ANY, VALUE_TEXT, perplexity_file,
        "print perplexity and bits per byte of FILE instead, - for stdin"),
    ROW("lengths", 0, "N,N,...", RUN_PERPLEXITY, VALUE_LENGTHS, lengths,
        "with --perplexity: also that of the first N tokens, of documents that have more"),
    ROW("slots", 0, "N", RUN_PERPLEXITY, VALUE_INT, slots,
        "with --perplexity: documents at a time (default 4)"),
    ROW("json", 0, NULL, RUN_PERPLEXITY, VALUE_FLAG, json, "with --perplexity: print an object"),
    ROW("explain", 0, "FILE", ANY, VALUE_TEXT, explain_file,
        "do not answer: write to FILE (CSV) how much each head looks at each latent; on the CPU"),
    ROW("threads", 0, "N", ANY, VALUE_INT, threads, "0 (default): one per core"),
    ROW("device", 0, "NAME", ENGINE, VALUE_TEXT, device, "auto, cpu, ref, cuda or cuda:N"),
    ROW("weight-dtype", 0, "NAME", ENGINE, VALUE_TEXT, weight_dtype,
        "auto, f32, bf16; on a GPU int8"),
    ROW("window-dtype", 0, "NAME", ENGINE, VALUE_TEXT, window_dtype,
        "auto, f32; on a GPU bf16, f8"),
    ROW("deterministic", 0, NULL, ENGINE, VALUE_FLAG, deterministic,
        "on a GPU: the same bits in a batch of any size"),
    ROW("verbose", 'v', NULL, ENGINE, VALUE_FLAG, verbose, "say where memory goes"),
    ROW("quiet", 'q', NULL, ANY, VALUE_FLAG, quiet, "nothing but the text"),
    ROW("help", 'h', NULL, ANY, VALUE_FLAG, help, "print this"),
    ROW("version", 0, NULL, ANY, VALUE_FLAG, version, "print the version"),
};
enum { N_ROWS = sizeof(rows) / sizeof(rows[0]) };

void run_options_help(void)
{
    printf(
        "Usage: latte-run -m DIR -p TEXT [options]           complete a prompt\n"
        "       latte-run -m DIR --chat [options]            talk\n"
        "       latte-run -m DIR --perplexity FILE [options] score a text\n\n"
        "Sampling options that are not given are those of the model's generation_config.json.\n\n");
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

/* Ascending numbers with commas between them; false for anything else. */
static bool read_lengths(struct run_options *o, const char *text)
{
    o->n_lengths = 0;
    for (const char *at = text;; at++) {
        char *end;
        errno = 0;
        long n = strtol(at, &end, 10);
        int least = o->n_lengths ? o->lengths[o->n_lengths - 1] + 1 : 1;
        if (end == at || errno || n < least || n >= INT32_MAX || o->n_lengths == RUN_MAX_LENGTHS)
            return false;
        o->lengths[o->n_lengths++] = (int)n;
        at = end;
        if (!*at)
            return true;
        if (*at != ',')
            return false;
    }
}

static enum status set_option(struct run_options *o, const struct option_row *row, const char *text,
                              struct error *err)
{
    void *field = (char *)o + row->offset;
    const char *end = text;
    bool in_range = true;
    errno = 0;
    switch (row->kind) {
    case VALUE_FLAG:
        *(bool *)field = true;
        return STATUS_OK;
    case VALUE_TEXT:
        *(const char **)field = text;
        return STATUS_OK;
    case VALUE_NUMBER:
        *(double *)field = strtod(text, (char **)&end);
        in_range = isfinite(*(double *)field);
        break;
    case VALUE_INT:
        *(int64_t *)field = strtoll(text, (char **)&end, 10);
        in_range = !errno && llabs(*(int64_t *)field) <= INT32_MAX;
        break;
    case VALUE_SEED:
        *(uint64_t *)field = strtoull(text, (char **)&end, 10);
        in_range = !errno;
        o->has_seed = true;
        break;
    case VALUE_LENGTHS:
        in_range = read_lengths(o, text);
        end = in_range ? "" : text;
        break;
    }
    if (end == text || *end || !in_range)
        return fail(err, STATUS_INVALID, "--%s: \"%s\" is not a number it takes", row->name, text);
    return STATUS_OK;
}

static enum status check_options(const struct run_options *o, struct error *err)
{
    int n_texts = (o->prompt != NULL) + (o->prompt_file != NULL) + (o->perplexity_file != NULL);
    if (!o->model_dir)
        return fail(err, STATUS_INVALID, "no model: give its directory with -m DIR");
    if (n_texts != 1 && (n_texts || !o->chat))
        return fail(err, STATUS_INVALID,
                    "give one of -p TEXT, -f FILE, --chat and --perplexity FILE%s",
                    n_texts ? ", not several" : "");
    if (o->explain_file && (o->chat || o->perplexity_file))
        return fail(err, STATUS_INVALID, "--explain reads -p TEXT or -f FILE as it is, alone");
    if (o->system && !o->chat)
        return fail(err, STATUS_INVALID, "--system is for --chat");
    if (o->slots < 1 || o->slots > RUN_MAX_SLOTS)
        return fail(err, STATUS_INVALID, "--slots is %" PRId64 "; it must be 1 to %d", o->slots,
                    RUN_MAX_SLOTS);
    if (o->max_tokens != INT64_MIN && o->max_tokens < 0)
        return fail(err, STATUS_INVALID, "--max-tokens is %" PRId64 "; it must be 0 or more",
                    o->max_tokens);
    return STATUS_OK;
}

static enum run_mode mode_of(const struct run_options *o)
{
    if (o->perplexity_file)
        return RUN_PERPLEXITY;
    if (o->explain_file)
        return RUN_EXPLAIN;
    return o->prompt || o->prompt_file ? RUN_COMPLETE : RUN_CHAT;
}

/* An option that would be without effect is a mistake. given [N_ROWS]: those of the command line.
 */
static enum status check_given(const struct run_options *o, const bool *given, struct error *err)
{
    static const char *const names[] = {
        [RUN_COMPLETE] = "a completion",
        [RUN_CHAT] = "--chat line by line",
        [RUN_PERPLEXITY] = "--perplexity",
        [RUN_EXPLAIN] = "--explain",
    };
    for (int i = 0; i < N_ROWS; i++) {
        if (!given[i] || rows[i].modes & o->mode)
            continue;
        return rows[i].modes == RUN_PERPLEXITY
                   ? fail(err, STATUS_INVALID, "--%s is for --perplexity", rows[i].name)
                   : fail(err, STATUS_INVALID, "--%s is not for %s", rows[i].name, names[o->mode]);
    }
    return STATUS_OK;
}

/* The rows as getopt_long wants them. A long option's value is FIRST_LONG + its row. */
struct getopt_tables {
    struct option longs[N_ROWS + 1];
    char shorts[2 * N_ROWS + 2];
};

enum { FIRST_LONG = 1000 };

static void fill_tables(struct getopt_tables *t)
{
    char *s = t->shorts;
    *t = (struct getopt_tables){0};
    *s++ = ':'; /* a missing value is told from an unknown option */
    for (int i = 0; i < N_ROWS; i++) {
        int has_argument = rows[i].argument ? required_argument : no_argument;
        t->longs[i] = (struct option){rows[i].name, has_argument, NULL, FIRST_LONG + i};
        if (!rows[i].letter)
            continue;
        *s++ = rows[i].letter;
        if (rows[i].argument)
            *s++ = ':';
    }
}

/* The row of what getopt_long returned, NULL for none. */
static const struct option_row *row_of(int found)
{
    if (found >= FIRST_LONG)
        return &rows[found - FIRST_LONG];
    for (int i = 0; i < N_ROWS; i++)
        if (rows[i].letter == found)
            return &rows[i];
    return NULL;
}

/* given [N_ROWS] gets those that are there. */
static enum status read_options(struct run_options *o, bool *given, int argc, char **argv,
                                struct error *err)
{
    struct getopt_tables tables;
    fill_tables(&tables);
    opterr = 0;
    for (int c; (c = getopt_long(argc, argv, tables.shorts, tables.longs, NULL)) != -1;) {
        const struct option_row *row = row_of(c);
        if (c == ':')
            return fail(err, STATUS_INVALID, "%s needs a value", argv[optind - 1]);
        if (!row)
            return fail(err, STATUS_INVALID, "%s is no option; see --help", argv[optind - 1]);
        given[row - rows] = true;
        enum status st = set_option(o, row, optarg, err);
        if (st)
            return st;
    }
    return STATUS_OK;
}

enum status run_options_parse(struct run_options *out, int argc, char **argv, struct error *err)
{
    struct run_options o = {
        .device = "auto",
        .weight_dtype = "auto",
        .window_dtype = "auto",
        .temperature = NAN,
        .top_p = NAN,
        .min_p = NAN,
        .typical_p = NAN,
        .repetition_penalty = NAN,
        .top_k = INT64_MIN,
        .max_tokens = INT64_MIN,
        .slots = RUN_DEFAULT_SLOTS,
    };
    bool given[N_ROWS] = {false};
    enum status st = read_options(&o, given, argc, argv, err);
    if (!st && !o.help && !o.version && optind < argc)
        st = fail(err, STATUS_INVALID,
                  "\"%s\" is left over; a prompt of several words needs quotes", argv[optind]);
    if (!st && !o.help && !o.version)
        st = check_options(&o, err);
    o.mode = mode_of(&o);
    if (!st && !o.help && !o.version)
        st = check_given(&o, given, err);
    if (!st)
        *out = o;
    return st;
}
