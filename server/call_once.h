/* call_once.h - requests with an Idempotency-Key: each is run once, and repetitions get what the
 * first one was answered.
 *
 * While the first one runs, a repetition waits for its status; a stream's repetition then reads
 * the same events from the first one on. What is kept is what the request itself decided: 2xx, and
 * 4xx but 409 and 429. After anything else the next one in line runs.
 *
 * Threads: the io thread. Memory: a waiting request. Errors: become the reply.
 */
#ifndef LATTE_SERVER_CALL_ONCE_H
#define LATTE_SERVER_CALL_ONCE_H

#include "server/call.h"
#include "server/outcomes.h"

/* True: the request is to be run; *out is what becomes of it, NULL when it has no key. False: it
 * is answered, or waits and comes back through call_post. */
bool once_admit(struct http_request *http, struct routes *r, enum codec_api api,
                struct outcome **out);

/* The outcome of a request is known, or not worth keeping. Each ends the caller's use of it and
 * accepts NULL. */
/* Of a 200. True: a store is about to have it, and calls done; not before, the client is told. */
bool once_keep(struct routes *r, struct outcome *o, const struct bytes *body, session_done *done,
               void *context);
void once_fail(struct routes *r, struct outcome *o, const struct error *err, const char *code);
void once_forget(struct routes *r, struct outcome *o);
/* It was carried out, or will be, and there is no reply. */
void once_lose_reply(struct routes *r, struct outcome *o);
/* NULL: in good order; otherwise the error that ended it. */
void once_end_stream(struct routes *r, struct outcome *o, const struct error *err);
/* Its events may be read. Accepts NULL. */
void once_begin_stream(struct routes *r, struct outcome *o, const char *stream_id);

/* A turn of a session is about to be committed, with this outcome: a store has that first, so that
 * no restart lets a repetition through. Accepts NULL. */
void once_note_turn(struct routes *r, const struct outcome *o, const struct session_turn *turn);
/* The outcomes that the store has; and, as outcomes_options.changed, telling it. */
void once_restore(struct routes *r);
void once_changed(void *routes, const struct outcome *o, bool is_gone);

void once_run_ready(struct routes *r); /* with every notification */
void once_on_tick(struct routes *r);   /* about once a second */

#endif
