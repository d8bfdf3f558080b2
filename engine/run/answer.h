/* answer.h - a generation, as the options and the model want it, and its text on the terminal.
 *
 * Threads: main only.
 * Memory:  nothing is kept.
 * Errors:  IO for a stdout that takes nothing; NOMEM.
 */
#ifndef LATTE_RUN_ANSWER_H
#define LATTE_RUN_ANSWER_H

#include <stdint.h>

#include "engine/base/bytes.h"
#include "engine/run/run.h"

/* Sampling: an option first, then the model's default. Without a seed one is drawn and put into
 * the options. With --chat it stops where the template ends an answer, if that is a token.
 */
void answer_fill_sampling(struct run *r, struct sampling_params *p);
int64_t answer_max_tokens(const struct run *r);

/* Print the job's text as it comes, until it ends; it is cancelled if that fails. drawn, if not
 * NULL, gets its tokens appended: [n] int32. */
enum status answer_stream(struct run *r, struct job *job, struct bytes *drawn, struct error *err);

/* On stderr, what it took. */
void answer_report(const struct run *r, const struct job_snapshot *s);

#endif
