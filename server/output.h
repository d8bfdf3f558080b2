/* output.h - one choice on its way from tokens to text: detokenized, searched for stop
 * strings, held back where the beginning of one could stand, listed with logprobs.
 *
 * Text that is ready never contains a part of a stop string and always ends at a whole UTF-8
 * character. What is ready after a token depends on the tokens alone, not on when they came,
 * so a streamed reply and a whole one have the same text and the same lists.
 *
 * Threads: one at a time.
 * Memory:  owns its buffers; rules and texts are borrowed.
 * Errors:  a lost append is remembered: output_failed.
 */
#ifndef LATTE_SERVER_OUTPUT_H
#define LATTE_SERVER_OUTPUT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/engine.h"
#include "engine/job.h"
#include "server/codec.h"
#include "weights/tokenizer.h"

/* A stop string with the failure table of Knuth, Morris and Pratt: fallback[i] is the length of
 * the longest proper prefix that also ends the first i+1 bytes. */
struct stop_string {
    struct codec_text text;
    int16_t fallback[CODEC_MAX_STOP_BYTES];
};

/* When the choices of a request stop, shared by all of them. */
struct stop_rules {
    int n_strings;
    struct stop_string strings[CODEC_ALL_STOPS];
    bool include;       /* the stop string or stop token belongs to the text */
    int64_t min_tokens; /* stop strings are not looked for in these first output tokens */
    int n_tokens;
    int32_t tokens[SAMPLER_MAX_STOP_TOKENS + MODEL_MAX_EOS]; /* that end a job */
};

/* The rules of a request for a model with these eos ids. */
void stop_rules_init(struct stop_rules *rules, const struct codec_request *q, const int32_t *eos,
                     int n_eos);

/* A token whose text is not all ready. */
struct output_token {
    struct job_token token;
    int64_t start, end; /* bytes of the choice's text before it and after it */
    int64_t char_start;
};

struct output_options {
    enum codec_api api;
    const struct tokenizer *tokenizer;
    const struct stop_rules *rules;
    bool skip_special, ids; /* ids: list them */
    int64_t n_logprobs;     /* -1: no list */
};

struct output {
    struct output_options options;
    struct detokenizer detokenizer;
    struct bytes text; /* not taken yet: `ready` bytes for the reader, then what is held back */
    size_t ready;
    int64_t n_taken_bytes, n_chars; /* taken before; characters so far */
    struct codec_lists lists;       /* of tokens whose text is ready, not taken yet */
    int64_t n_tokens;               /* output tokens so far */
    double sum_logprob;
    bool stopped; /* a stop string was found: later tokens are not wanted */

    int matched[CODEC_ALL_STOPS]; /* bytes of each stop string that end the text */
    struct output_token *pending; /* [n_pending] */
    size_t n_pending, cap_pending;
    struct job_token held; /* a stop token, not part of the text unless another follows */
    bool has_held, lost;
    struct codec_text echo; /* the prompt's text, for the offsets of its tokens */
    size_t echo_at;
    int64_t echo_chars;
    struct detokenizer echo_detokenizer;
};

/* prompt [n_prompt]: the ids before the output; their end tells how its first word is spaced. */
void output_init(struct output *o, const struct output_options *options, const int32_t *prompt,
                 size_t n_prompt);
void output_free(struct output *o);

/* Begin the text with the prompt's (echo), borrowed; before any token. */
void output_echo(struct output *o, struct codec_text text);
/* A scored prompt token, for the lists only. */
void output_push_prompt(struct output *o, const struct job_token *token);

/* The next output token. Sets o->stopped when its text completes a stop string; the text then
 * ends before it (or behind it, see stop_rules), and so do the lists. */
void output_push(struct output *o, const struct job_token *token);

/* No more tokens: everything becomes ready. by_token: the last one was a stop token. */
void output_finish(struct output *o, bool by_token);

/* Forget text and lists that are ready: they have been written. */
void output_take(struct output *o);

/* Bytes of text and lists that are held: ready, held back, or pending. */
size_t output_bytes(const struct output *o);

/* Whether memory ran out and something was lost. */
bool output_failed(const struct output *o);

#endif
