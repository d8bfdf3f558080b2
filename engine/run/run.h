/* run.h - what latte-run has loaded, and the jobs it runs.
 *
 * Threads: main only.
 * Memory:  run_close releases what run_load took; a job is the caller's between run_start and
 *          run_end.
 * Errors:  enum status and a sentence for the terminal.
 */
#ifndef LATTE_RUN_RUN_H
#define LATTE_RUN_RUN_H

#include <semaphore.h>
#include <stdbool.h>
#include <stdint.h>

#include "engine/base/error.h"
#include "engine/engine.h"
#include "engine/run/options.h"
#include "weights/chat_template.h"
#include "weights/tokenizer.h"

struct run {
    struct run_options options;
    bool shows_progress; /* stderr is a terminal */
    int shown_percent;   /* of the bar on the terminal, -1: there is none */
    struct tokenizer *tokenizer;
    struct chat_template *template; /* with --chat only */
    struct engine *engine;
    struct engine_info info;
    sem_t ready; /* posted when the engine has ready jobs; with the engine */
};

/* Open the model directory that the options name, for so many jobs at a time; says so on stderr.
 * r holds the options and is otherwise zero; run_close is due whatever is returned. */
enum status run_load(struct run *r, int n_slots, struct error *err);
void run_close(struct run *r);

/* Submit a job, which Ctrl-C then cancels if it is the last one that was. */
enum status run_start(struct run *r, const struct job_request *request, struct job **out,
                      struct error *err);
/* Release a job that has finished, or that nobody reads any more. The error of one that failed. */
enum status run_end(struct job *job, struct job_snapshot *snapshot, struct error *err);

/* A bar of 0..100 percent on stderr, if that is a terminal, until it is cleared. run_load begins
 * it; who does without has to. */
void run_begin_bar(struct run *r);
void run_show_bar(struct run *r, const char *what, int percent);
void run_clear_bar(struct run *r);

/* n per second between two times of job_clock_ns, 0 where a time is not known. */
double run_rate(double n, int64_t from_ns, int64_t to_ns);

/* What latte-run does with what it has loaded. */
enum status complete(struct run *r, struct error *err);   /* complete.c */
enum status chat(struct run *r, struct error *err);       /* chat.c */
enum status perplexity(struct run *r, struct error *err); /* perplexity.c */
enum status explain(struct run *r, struct error *err);    /* explain.c */

#endif
