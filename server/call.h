/* call.h - one POST under way: from its body to its reply.
 *
 * Its body is read and its input tokenized (call_prepare; on a worker when the body is large),
 * the state that it continues is brought into memory (on a worker when it is not there), and then
 * it is answered, or its jobs start and it waits for them. A turn of a session is committed before
 * the reply ends; once that has begun it goes through, also when the client has gone. A large whole
 * reply is written on a worker, too. A call lives until the request is over and no worker has it.
 *
 * A resumable stream is not its client's: from its first event on its generation fills a reel
 * (reels.h), which the request reads like any other reader, and the call lives until the
 * generation is over. So it does when the request has an Idempotency-Key (call_once.h): a client
 * that was cut off asks again.
 *
 * Threads: the io thread, or a worker, which then alone has the call.
 * Memory:  a call owns its arena, its request and its generation.
 * Errors:  become the reply.
 */
#ifndef LATTE_SERVER_CALL_H
#define LATTE_SERVER_CALL_H

#include <stdatomic.h>

#include "engine/prefix.h"
#include "engine/session.h"
#include "server/codec.h"
#include "server/outcomes.h"
#include "server/output.h"
#include "server/presets.h"
#include "server/quotas.h"
#include "server/reels.h"
#include "server/responses.h"
#include "server/routes.h"
#include "server/storage.h"
#include "server/stream.h"
#include "server/workers.h"

struct call;

struct routes {
    const struct options *options;
    struct http_server *server;
    struct workers *workers;
    struct bytes openapi;  /* the file of --openapi; empty: the built-in one */
    struct call *starting; /* streams that have not begun to answer */
    struct presets *presets;
    struct responses *responses;
    struct call *woken; /* calls with news, to be looked at once each */
    struct reels *reels;
    struct outcomes *outcomes; /* of requests with an Idempotency-Key */
    struct saving *savings;    /* presets that the store is about to have */
    struct waiter *waiters;    /* repetitions of those that run */
    struct quotas quotas;
    struct call_queue *queue; /* calls that wait for a session's turn */
    struct call *detached;    /* calls that may outlive their requests, for the end */
    atomic_int n_detached;

    /* Written before `model` is published, constant afterwards. */
    struct codec_context context;
    struct engine_info info;
    char fingerprint[96];
    struct storage storage; /* sessions and their states */

    _Atomic(const struct served_model *) model; /* NULL while loading */
    atomic_bool draining;
};

struct call {
    struct work_item item; /* first: a worker hands it back */
    struct routes *routes;
    struct http_request *http; /* the io thread's; NULL once the request is over */
    const struct served_model *model;
    enum codec_api api;
    const char *body; /* [n_body], until it is prepared */
    size_t n_body;
    char *own_body;    /* a copy for the worker, which frees it; NULL for small ones */
    bool working;      /* a worker has it */
    bool on_worker;    /* it is prepared there, where it may block */
    bool wants_worker; /* it has to be: other servers may have changed the session */
    bool deferred;     /* the connection is suspended */
    bool streaming;    /* the reply has begun */

    enum status status; /* of preparing, with error and code */
    struct error error;
    const char *code; /* OpenAI's, or NULL */
    struct arena arena;
    struct codec_request request;
    struct stream_prompt *prompts; /* [n_prompts] */
    size_t n_prompts;
    char waits_for[SESSION_ID_BYTES]; /* the session whose turn is to end first, or empty */
    struct call *line_next;           /* behind this one */
    struct session_turn turn;         /* of a request with session_id, while it is under way */
    struct image *base; /* what the prompts continue without a turn, kept: of a preset, or of the
                         * response before; or NULL */
    struct image *from, *into;    /* the states before and after, held; from may be nobody else's */
    bool leaves_state;            /* into is wanted */
    struct image *saved;          /* of a response that the store is about to have, kept */
    struct image *left;           /* the state to give back, held: into, or what a replay left */
    struct bytes state;           /* its text */
    struct codec_session session; /* where the session is after the turn */
    struct response *response;    /* of the Responses API, or NULL; held */
    bool committing;              /* the journal has the turn: the call lives until that is over */
    bool in_commit;               /* it is handed in just now */
    struct stream_turn stream_turn;
    int owner;       /* http_key_index */
    int64_t quota;   /* sequences that are counted as running */
    int64_t version; /* the session must have, from If-Match; or SESSION_ANY_VERSION */
    struct stop_rules rules;
    struct bytes reply;
    struct generation *generation;
    bool runs_on;            /* the generation, when the request is over */
    struct reel *reel;       /* takes the events of a resumable stream; NULL: none */
    struct outcome *outcome; /* what becomes of it, until that is known; NULL: no key */
    size_t charged;          /* bytes, of a request that is over */
    struct call *detached_previous, *detached_next; /* in routes->detached, when it runs on */
    int64_t started_ns;
    struct call *previous, *next; /* in routes->starting */
    struct call *woken_next;      /* in routes->woken, when is_woken */
    bool is_woken;
};

/* The state that the prompts continue, NULL for that before any token. Its values need not be in
 * memory. */
struct image *call_from(const struct call *c);

/* The version that If-Match asks a session to have; SESSION_ANY_VERSION without the header. */
enum status call_if_match(struct http_request *http, int64_t *version, struct error *err);

/* The model, or NULL with a 503 sent: it is loading. */
const struct served_model *call_model(struct http_request *http, struct routes *r);

/* Handle a POST of this API. */
void call_post(struct http_request *http, struct routes *r, enum codec_api api);

/* Read the request, here or on a worker, and go on with it. */
void call_start(struct call *c);
/* Answer with an error. */
void call_fail(struct call *c, const struct error *err, const char *code);

/* Everything before the engine: parse, check, tokenize; for tokenize and detokenize the whole
 * reply. Sets status, error and code; and waits_for, when
 * the request would wait for its session's turn. A turn that it has already is its own. The
 * request's parsed tree is gone afterwards: it may be large, and a stream lives long. Any thread.
 */
void call_prepare(struct call *c);

/* States of earlier prompts (call_prefix.c).
 *
 * plan: for prompt i, which is set, find the state that it may begin from, and reserve images for
 * those that it is to leave: at `marks`, ascending places before its last token, and after the
 * answer. marks: where messages of a chat with these ids end; returns how many. keep, as in
 * stream.h: of a call. free: let go of all that was planned. */
void call_prefix_plan(struct call *c, size_t i, const size_t *marks, int n_marks);
int call_prefix_marks(const struct call *c, const int32_t *ids, size_t n,
                      size_t marks[STREAM_MAX_MARKS]);
void call_prefix_keep(void *call, struct image *image, const int32_t *ids, size_t n);
void call_prefix_free(struct call *c);

/* A job of the call has news: call_run_woken will see to it, once for all jobs of a step. */
void call_wake(struct call *c);
void call_run_woken(struct routes *r);

/* Stop the generation behind a reel: its turn is not applied, and the reel is gone. */
void call_stop(struct call *c, const char *reason, const char *code);
/* End what runs without a request. When everything else has ended. */
void call_end_detached(struct routes *r);

/* Begin those streams whose first token is long in coming: a stream keeps its status open
 * until then, but not so long that somebody between us and the client gives up. */
void call_begin_late(struct routes *r);

/* Answer with an error of ours. */
void call_refuse(struct http_request *http, enum status status, const char *text);
/* Answer 200 with JSON, taking the buffer over. */
void call_reply_json(struct http_request *http, struct bytes *body);

#endif
