/* interrupt.h - Ctrl-C ends the generation, and what there is is still reported.
 *
 * The first SIGINT or SIGTERM cancels the current job; with no job, or the second time, it ends
 * the process with INTERRUPTED_EXIT. In a chat SIGTERM ends it at once, and SIGINT cancels a job
 * as often as it comes; with no job it ends a chat that is not typed, and only says so in one
 * that is: a Ctrl-C that came as the answer ended by itself shall not cost the conversation.
 *
 * Threads: a thread of its own acts on signals; the functions are for main.
 * Memory:  the current job is borrowed: take it back (NULL) before releasing it.
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
void interrupt_in_chat(bool is_typed);   /* from now on signals mean what they do in a chat */
bool interrupt_happened(void);           /* a job was cancelled by a signal */
void interrupt_forget(void);             /* as if none had been: the program goes on */

#endif
