/* options.h - the command line of latte-run.
 *
 * Threads: no shared state.
 * Memory:  texts are borrowed from argv.
 * Errors:  INVALID, a sentence that names the option.
 */
#ifndef LATTE_RUN_OPTIONS_H
#define LATTE_RUN_OPTIONS_H

#include <stdbool.h>
#include <stdint.h>

#include "engine/base/error.h"

enum { RUN_MAX_LENGTHS = 16, RUN_MAX_SLOTS = 1024, RUN_DEFAULT_SLOTS = 4 };

/* What is to be done. Each option has those that it is for; others refuse it. */
enum run_mode {
    RUN_COMPLETE = 1,   /* a prompt, perhaps through the chat template */
    RUN_CHAT = 2,       /* line by line */
    RUN_PERPLEXITY = 4, /* a score of a text */
    RUN_EXPLAIN = 8,    /* where the heads look */
};

/* What the command line says nothing about is NULL, false, NAN, or INT64_MIN. */
struct run_options {
    enum run_mode mode;
    const char *model_dir, *prompt, *prompt_file, *perplexity_file, *explain_file, *system;
    const char *device, *weight_dtype, *window_dtype; /* as in engine.h */
    double temperature, top_p, min_p, typical_p, repetition_penalty;
    int64_t top_k, max_tokens;               /* within int32 */
    int64_t threads;                         /* 0: one per core */
    int64_t slots;                           /* documents scored at a time, 1..RUN_MAX_SLOTS */
    int lengths[RUN_MAX_LENGTHS], n_lengths; /* ascending */
    uint64_t seed;
    bool has_seed, ignore_eos, echo, chat, deterministic, json, verbose, quiet, help, version;
};

/* With help or version given nothing else is asked for; otherwise there is a model and exactly
 * one text, or a chat without one. argv is permuted. */
enum status run_options_parse(struct run_options *out, int argc, char **argv, struct error *err);

void run_options_help(void); /* to stdout */

#endif
