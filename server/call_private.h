/* call_private.h - what the files of a call share; for no one else.
 *
 *   call.c          from a request to its reply
 *   call_state.c    the states before and after
 */
#ifndef LATTE_SERVER_CALL_PRIVATE_H
#define LATTE_SERVER_CALL_PRIVATE_H

#include "server/call.h"

enum { INLINE_BYTES = 64 << 10 }; /* larger bodies are read, and replies written, on a worker */

/* ---- call.c ---- */

/* The jobs begin: the states are there. */
void call_generate(struct call *c);
/* The request waits from now on. May be repeated. */
void call_defer(struct call *c);
/* Nobody has it any more: not its request, no worker, no journal. */
void call_free(struct call *c);

/* ---- call_state.c ---- */

/* Both states of a turn, at once if that is possible; then call_generate. */
void call_fetch_states(struct call *c);
/* Tell a generation of the states. */
void call_open_turn(struct call *c, struct stream_setup *setup);
/* The state to give back as text, which is empty when memory runs out. Any thread; a large one by
 * a worker. */
void call_write_state(struct call *c);
bool call_has_large_state(const struct call *c);

#endif
