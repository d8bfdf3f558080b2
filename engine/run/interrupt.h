/* interrupt.h - Ctrl-C ends the generation, and what there is is still reported.
 *
 * The first SIGINT or SIGTERM cancels the current job; with no job, or the second time, it ends
 * the process with INTERRUPTED_EXIT. A program with several jobs, or with times between them,
 * awaits it: then the first one never ends the process. In a chat SIGTERM ends it at once, and
 * SIGINT cancels a job as often as it comes; with no job it ends a chat that is not typed, and only
 * says so in one that is: a Ctrl-C that came as the answer ended by itself shall not cost the
 * conversation.
 *
 * Threads: a thread of its own acts on signals; the functions are for main.
 * Memory:  the current job is borrowed: take it back (NULL) before releasing it. So is the hint.
 * Errors:  NOMEM when the thread cannot be started.
 */
#ifndef LATTE_RUN_INTERRUPT_H
#define LATTE_RUN_INTERRUPT_H

#include <stdbool.h>

#include "engine/base/error.h"
#include "engine/job.h"

enum { INTERRUPTED_EXIT = 130 }; /* as shells have it */

enum status interrupt_catch(struct error *err);
void interrupt_set_job(struct job *job); /* what a signal cancels; NULL for nothing */
/* From now on the first signal is acted on by whoever asks interrupt_happened, again and again. */
void interrupt_await(void);
/* From now on signals mean what they do in a chat. hint is what one that is typed says when there
 * is no job; NULL: nobody types. */
void interrupt_in_chat(const char *hint);
bool interrupt_happened(void); /* the first signal came, and has not been forgotten */
void interrupt_forget(void);   /* as if none had been: the program goes on */

#endif
