/* call_queue.h - calls that wait for a turn of their session ("queue": true), first in, first out.
 *
 * When a turn ends the first in line begins the next one; until it has, nobody else can. A call
 * leaves the line when its client hangs up or its time (--request-timeout) is over. What the
 * request asks for beside, If-Match say, is looked at when its turn comes.
 *
 * Threads: queue_is_ahead by any, for workers that prepare calls; the rest by the io thread.
 * Memory:  a line per session that somebody waits for; --max-queued-turns calls in it.
 * Errors:  BUSY, a full line; NOMEM.
 */
#ifndef LATTE_SERVER_CALL_QUEUE_H
#define LATTE_SERVER_CALL_QUEUE_H

#include <stdbool.h>

#include "engine/base/error.h"

struct call;
struct call_queue;
struct routes;

enum status queue_open(struct call_queue **out, struct error *err);
void queue_close(struct call_queue *q); /* accepts NULL; nobody may wait any more */

/* Whether calls of this owner wait for a turn of this session. */
bool queue_is_ahead(struct call_queue *q, const char *session_id, int owner);

/* Wait for a turn of the session that c->waits_for names. */
enum status queue_join(struct routes *r, struct call *c, struct error *err);
void queue_leave(struct routes *r, struct call *c); /* harmless when it does not wait */

/* A turn of the session is over: the first in line is next, with the next notification. */
void queue_note_end(struct routes *r, const char *session_id);

void queue_run(struct routes *r);     /* with every notification */
void queue_on_tick(struct routes *r); /* about once a second */
int queue_length(const struct call_queue *q);

#endif
