/* stream.h - one request's generation: its jobs, its choices, and the reply under construction,
 * streamed as server-sent events or collected as a whole.
 *
 * A whole reply is what a stream would have sent, gathered: both come out of the same code.
 * When nothing is there to read, every running job is parked; the engine's ready list then
 * names a job of this generation (job_user gives the owner), and its owner polls again.
 *
 * Threads: the io thread only.
 * Memory:  owns its jobs' references and all buffers; request, rules, prompts, tokenizer and
 *          the texts of reply are borrowed until stream_close.
 * Errors:  the first job that fails ends the generation with that job's error; NOMEM and
 *          TOO_LARGE (over max_bytes held for all choices together) end it as well.
 */
#ifndef LATTE_SERVER_STREAM_H
#define LATTE_SERVER_STREAM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "engine/base/bytes.h"
#include "engine/base/error.h"
#include "engine/image.h"
#include "engine/job.h"
#include "server/codec.h"
#include "server/output.h"
#include "server/responses.h"

struct generation;

enum { STREAM_MAX_MARKS = 2 };

/* A prompt as the engine gets it. */
struct stream_prompt {
    const int32_t *ids; /* [n], at least one */
    size_t n;
    size_t n_carried;       /* ids at the front that are an earlier turn's */
    struct prompt *shared;  /* the holder of ids, for the jobs; NULL: each copies them */
    struct codec_text echo; /* its text, when the request wants it back */
    struct image *from;     /* has seen n_seen of the ids already; NULL: none. Borrowed */
    size_t n_seen;
    int n_marks; /* places before the last id, in order, whose states are to be kept */
    struct job_mark marks[STREAM_MAX_MARKS]; /* images borrowed */
    struct image *answer; /* to be kept: after the answer, of one choice; or NULL. Borrowed */
};

/* How a turn ended. */
struct stream_end {
    const int32_t *tokens; /* all that were fed: [n_chunked] in chunks, [n_single] one by one */
    size_t n_chunked, n_single;
    int32_t last;  /* the last token of the output, -1: none that counts */
    bool by_token; /* it is a stop token, and ended the turn */
    bool by_limit; /* the turn's length did */
};

/* A turn of a session: one prompt, one choice. Before the reply ends the turn is committed, with
 * the state after exactly what the client was given. */
struct stream_turn {
    struct image *from; /* NULL: a session without tokens; borrowed */
    struct image *into; /* new, for the state after the turn; borrowed */
    /* The turn is complete, with this image. Its owner calls stream_turn_committed once it is
     * safe, or has failed, in here or later; unless this fails. */
    enum status (*commit)(void *context, struct image *image, const struct stream_end *end,
                          struct error *err);
    void *commit_context;
};

struct stream_setup {
    const struct codec_request *request; /* completions or chat */
    const struct tokenizer *tokenizer;
    const struct stop_rules *rules;
    const struct stream_prompt *prompts; /* [n_prompts] */
    size_t n_prompts;
    const struct stream_turn *turn; /* NULL: none */
    struct response *response; /* of the Responses API: the reply is written from it; or NULL */
    struct image *from; /* without a turn: the state that all prompts continue, or NULL; borrowed */
    struct image_store *images; /* for the state that the choices of a prompt share; NULL: each
                                 * choice computes its whole prompt */
    /* An image of a prompt is complete: the state after ids[n]. NULL: there are none to keep. */
    void (*keep)(void *context, struct image *image, const int32_t *ids, size_t n);
    void *keep_context;
    struct codec_reply reply;
    size_t max_bytes;    /* text and lists of all choices that may wait to be sent */
    int64_t arrival_ns;  /* CLOCK_MONOTONIC, for the metrics */
    int64_t deadline_ms; /* for the jobs; 0: none */
    void *owner;         /* what job_user of the jobs gives */
    /* Hand a job to the engine (which takes its own reference). */
    enum status (*submit)(void *context, struct job *job, struct error *err);
    void *submit_context;
};

/* Make and submit all jobs. When one is refused the others are cancelled, and nothing is left.
 * TOO_LARGE when the prompts alone, once per choice that echoes them, are beyond the limit. */
enum status stream_open(struct generation **out, const struct stream_setup *setup,
                        struct error *err);
/* Cancel what still runs and release everything. Accepts NULL. */
void stream_close(struct generation *g);

enum stream_state {
    STREAM_WAITING, /* all jobs are parked, nothing to send yet */
    STREAM_READY,   /* events are there to be read (streams only) */
    STREAM_DONE,    /* a whole reply is complete (streams: READY until all is read) */
    STREAM_FAILED,  /* nothing was sent; see stream_error */
};

/* Take what the jobs have. Before a stream begins, and for whole replies. */
enum stream_state stream_poll(struct generation *g);
const struct error *stream_error(const struct generation *g);

/* What became of the turn: where the session is now, unless err says that it stayed where it was.
 * The generation is to be polled again. */
void stream_turn_committed(struct generation *g, const struct codec_session *session,
                           const struct error *err);

/* The state after the turn as the reply gives it, borrowed until stream_close: for a stream before
 * stream_turn_committed, for a whole reply before stream_write. */
void stream_give_state(struct generation *g, struct codec_text state);

/* Text and lists that wait to be sent. */
size_t stream_held_bytes(const struct generation *g);

/* The whole reply's JSON, after DONE. By any thread that has the generation for itself. */
void stream_write(struct generation *g, struct bytes *out);

/* A stream's source, see http_stream: events, whole ones whenever it parks. An error after the
 * beginning becomes an event of its own, and the end. context: struct generation. */
ssize_t stream_read(void *context, char *out, size_t max);

/* The same for one who keeps the events: gives whole ones, valid until the next call. Returns their
 * bytes, HTTP_SOURCE_PARK, _END or _ABORT. */
ssize_t stream_take(struct generation *g, const char **events);

/* A stream's last event is there, if it was not taken yet. */
bool stream_has_ended(const struct generation *g);

/* Tokens of the prompts, each once, and of all outputs so far. */
struct codec_usage stream_usage(const struct generation *g);

#endif
