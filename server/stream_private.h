/* stream_private.h - what the files of a generation share; for no one else.
 *
 *   stream.c        jobs, their progress, the life of a generation
 *   stream_turn.c   the end of a session's turn
 *   stream_keep.c   states to be kept for later prompts
 *   stream_reply.c  what its choices have to say, as events or as a whole
 *   stream_response.c  the same of the Responses API
 *
 * Threads, memory, errors: as stream.h says.
 */
#ifndef LATTE_SERVER_STREAM_PRIVATE_H
#define LATTE_SERVER_STREAM_PRIVATE_H

#include "server/stream.h"

/* One job and the choice it becomes. */
struct sequence {
    struct job *job; /* NULL once it is over */
    struct output output;
    const struct stream_prompt *prompt;
    int64_t index;      /* of the choice */
    const char *finish; /* OpenAI's finish_reason once it is over */
    size_t n_bytes;     /* of its output, as counted in the generation's */
    bool begun;         /* its first token came */
    int64_t token_ns;   /* when the engine gave its last output token, 0 before the first */
    bool role_sent, prompt_sent, finish_sent;
    int n_kept;      /* marks of its prompt whose images were handed on */
    int32_t *answer; /* [n_answer] its tokens, where the state after them is to be kept */
    size_t n_answer, cap_answer;
    bool answer_lost; /* memory ran out */
};

/* What a session's turn has given so far, and how it is brought to an end. */
struct turn {
    struct job *replay; /* computes the state after what was given, where the engine went further */
    struct image *into; /* its image, owned */
    int32_t *replayed;  /* [n_replayed] its tokens, owned */
    size_t n_replayed;
    bool committing;         /* it is being committed, which counts as running */
    bool committed;          /* that is over, and not looked at yet */
    bool settled;            /* the reply may end */
    struct codec_text state; /* as the reply gives it, borrowed; data NULL: it does not */
    struct error error;      /* of committing */
    int32_t *ids;            /* [n] output tokens */
    int64_t *ends;           /* [n] bytes of the choice's text after each */
    size_t n, cap;
    struct bytes text; /* of the choice */
    bool failed;       /* memory ran out */
};

struct generation {
    struct stream_setup setup;
    struct image **forks; /* [n_prompts] the state before the prompt's last token, for the choices
                           * after the first; NULL where each has its own. Owned */
    struct sequence *sequences; /* [n_sequences], best_of of one prompt together */
    size_t n_sequences, n_running;
    size_t n_bytes;   /* held by all outputs */
    struct turn turn; /* of a session, when setup.turn is not NULL */
    struct codec_usage usage;
    struct bytes events; /* framed, not sent yet */
    size_t n_sent;       /* bytes of events that were read */
    size_t n_told;       /* events of the response that were framed */
    bool open, ended;    /* all jobs were submitted; the last event is framed */
    bool failed;
    struct error error;
};

/* Bring the count of the bytes that a sequence's output holds up to date. */
void stream_count_bytes(struct generation *g, struct sequence *s);

/* Note the token that the sequence's output was given last. */
void stream_turn_note(struct generation *g, const struct sequence *s, int32_t id);
/* The sequence has come to its end: commit what the engine left, or begin a replay, which counts
 * as running. ended: how its job did, NONE when it was cut short. */
enum status stream_turn_settle(struct generation *g, const struct sequence *s,
                               enum job_finish ended, struct error *err);
/* See whether the replay is over, which commits it, and whether that is. True when anything
 * happened. */
bool stream_turn_advance(struct generation *g, struct error *err);
/* May the end of the reply be told. */
bool stream_turn_is_settled(const struct generation *g);
void stream_turn_free(struct generation *g);

/* Hand on the images of marks that the sequence's job has passed; of its answer, when the engine
 * ended it and it was given whole. note: the token that its output was given last. */
void stream_keep_marks(struct generation *g, struct sequence *s,
                       const struct job_snapshot *snapshot);
void stream_keep_note(struct sequence *s, int32_t id);
void stream_keep_answer(struct generation *g, struct sequence *s);

/* Frame what a choice has to say, if anything; the end of all, with the usage when it was asked
 * for; the generation's error, as the last event. */
void stream_reply_events(struct generation *g, struct sequence *s);
void stream_reply_end(struct generation *g);
void stream_reply_error(struct generation *g);
/* The same three where there is a response: it becomes what the choice says, and events come from
 * it if they are wanted. */
void stream_response_events(struct generation *g, struct sequence *s);
/* Everything of the response but its end; its choice is complete. */
void stream_response_gather(struct generation *g);
void stream_response_error(struct generation *g);

#endif
