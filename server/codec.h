/* codec.h - JSON in, JSON out: requests as typed values, replies as OpenAI's objects.
 *
 * One table per API lists the fields of a request: name, type, range, target. A known field of
 * a wrong type or range is an error that names it; an unknown one is counted, or an error in
 * strict mode. JSON null stands for an absent field wherever the field is optional.
 *
 * Threads: no shared state; one thread at a time per request (the io thread or a worker).
 * Memory:  a request borrows its input's texts and the model's name from its parsed tree, and
 *          arrays and stop strings from the caller's arena; codec_request_free releases the
 *          tree, repeated and items. What says how to generate outlives it.
 * Errors:  INVALID naming the field, UNSUPPORTED is never used for fields (it means 415), NOMEM.
 *          `code` of the request then holds OpenAI's error code.
 */
#ifndef LATTE_SERVER_CODEC_H
#define LATTE_SERVER_CODEC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/base/arena.h"
#include "engine/base/bytes.h"
#include "engine/base/error.h"
#include "engine/job.h"
#include "weights/chat_template.h"
#include "weights/tokenizer.h"

enum codec_api {
    CODEC_COMPLETIONS,
    CODEC_CHAT,
    CODEC_RESPONSES,
    CODEC_TOKENIZE,
    CODEC_DETOKENIZE,
    CODEC_API_COUNT
};

enum {
    CODEC_MAX_DEPTH = 64,        /* nested arrays and objects of a body */
    CODEC_MAX_STOPS = 4,         /* stop strings of a request */
    CODEC_ALL_STOPS = 8,         /* with those of a chat template */
    CODEC_MAX_STOP_BYTES = 1024, /* bytes of one */
    CODEC_MAX_N = 128,           /* choices per prompt */
};

/* What bounds a request, and the values of fields that it leaves out. */
struct codec_context {
    int32_t vocab_size;        /* token ids are 0..vocab_size-1 */
    int64_t max_prompt_tokens; /* bounds a prompt of ids, and the values in a body */
    int64_t max_tokens_limit;
    int64_t max_choices; /* prompts x best_of */
    bool strict_fields;
    int64_t chat_max_tokens; /* default of max_tokens in chat */
    double temperature, top_p, min_p, typical_p, repetition_penalty;
    int64_t top_k;
};

struct codec_text {
    const char *data; /* [n] valid UTF-8 without zero bytes */
    size_t n;
};

/* One prompt: a text, or token ids when text.data is NULL. */
struct codec_prompt {
    struct codec_text text;
    const int32_t *tokens; /* [n_tokens], each in 0..vocab_size-1 */
    size_t n_tokens;
};

struct codec_request {
    enum codec_api api;
    const char *code; /* after a failure: OpenAI's error code, or NULL */
    int64_t n_unknown_fields;
    const char *model; /* NULL when the request names none */

    /* Input: prompts, or messages. A detokenize request has one prompt, of ids. */
    struct codec_prompt *prompts; /* [n_prompts] */
    size_t n_prompts;
    struct chat_message *messages; /* [n_messages] */
    size_t n_messages;
    bool add_generation_prompt, continue_final_message;
    bool add_special_tokens; /* of the tokenizer's post-processor, for text prompts */
    const char *session_id;  /* NULL: none. The prompt is what is new in that session */
    const char *from_preset; /* NULL: none. The same for the state of this name */
    struct codec_text state; /* base64 of an exported state, and the same; data NULL: none */
    bool return_state;       /* the reply has the state after the turn */
    bool parse_special;      /* tokenize: text of special tokens becomes those tokens */

    /* Responses. `repeated` and `items` are the request's own until somebody takes them over. */
    const char *instructions;         /* NULL: none; else messages begin with them, unless */
    const char *previous_response_id; /* names the response that this one continues */
    bool store;
    struct bytes repeated; /* the members of the response object that repeat the request */
    struct bytes items;    /* the input as items without their ids: `"type":...,"role":...`, a line
                            * each */
    size_t n_items;

    /* Output. */
    int64_t n, best_of; /* best_of >= n >= 1 */
    int64_t max_tokens;
    bool echo, stream, include_usage, continuous_usage;
    bool resumable; /* the stream's events are kept, and it runs on without a client */
    bool queue;     /* wait for the session's running turn */
    bool skip_special_tokens, return_token_ids, include_stop;
    int64_t n_logprobs; /* -1: none; k: the token's own and the k most likely */
    int n_stops;
    struct codec_text stops[CODEC_ALL_STOPS];
    bool return_token_strings, with_pieces; /* tokenize: vLLM's and llama-server's form */

    /* Sampling. */
    double temperature, top_p, min_p, typical_p, repetition_penalty;
    double presence_penalty, frequency_penalty;
    int64_t top_k, min_tokens;
    bool ignore_eos, has_seed;
    uint64_t seed;
    int n_stop_tokens;
    int32_t stop_tokens[SAMPLER_MAX_STOP_TOKENS];
    struct logit_bias *logit_bias; /* [n_logit_bias] */
    int n_logit_bias;

    /* The codec's own. */
    int64_t max_completion_tokens, top_logprobs; /* -1 when absent */
    bool chat_logprobs;                          /* responses: `include` names them */
    void *tree;                                  /* cJSON, owned */
};

/* Parse body[n] into *out. On failure out->code tells OpenAI's code; free the request in any
 * case. Arrays come from arena a. */
enum status codec_read(struct codec_request *out, enum codec_api api, const char *body, size_t n,
                       const struct codec_context *context, struct arena *a, struct error *err);
/* Release the parsed tree; what was borrowed from it, and prompts and messages, are then NULL and
 * 0. May be repeated. */
void codec_request_free(struct codec_request *q);

/* The i-th field that an API, the objects stream_options and from, or a message knows; NULL behind
 * the last. For the test that compares them with openapi.yaml. */
const char *codec_field(enum codec_api api, size_t i);
const char *codec_stream_option(size_t i);
const char *codec_message_field(size_t i);
const char *codec_item_field(size_t i); /* of a message among the input of a response */
const char *codec_from_field(size_t i);

/* Cut text that came from outside for use in an error: at most 64 bytes, whole characters. */
struct codec_text codec_clip(const char *text);

/* ---- replies ---------------------------------------------------------------------------- */

/* The "session" object of a reply. */
struct codec_session {
    char id[48];
    uint64_t position, version;
};

/* What every chunk of a reply repeats. */
struct codec_reply {
    enum codec_api api; /* COMPLETIONS or CHAT */
    bool chunk;         /* a streamed piece rather than the whole */
    char id[48];        /* "cmpl-..." */
    int64_t created;    /* Unix time, seconds */
    const char *model, *fingerprint;
    bool usage_field;             /* chunks carry "usage": null until the last */
    struct codec_session session; /* where it is after the turn; no id: not known, or none */
    struct codec_text state;      /* base64 of the state after the turn; data NULL: none */
};

struct codec_usage { /* of this request: a session's earlier tokens do not count */
    int64_t prompt_tokens, completion_tokens;
    int64_t cached_tokens; /* of the prompt, that a stored state had seen */
};

/* A choice's tokens as the inside of JSON arrays, growing token by token. Completions use all
 * four logprob buffers, chat the first. */
struct codec_lists {
    struct bytes logprobs[4]; /* tokens or content, token_logprobs, top_logprobs, text_offset */
    struct bytes ids;
};

/* Append a token with its logprobs; n_top as asked for, text_offset in characters. */
void codec_add_logprob(struct codec_lists *l, enum codec_api api, const struct tokenizer *t,
                       const struct job_token *token, int64_t n_top, int64_t text_offset);
void codec_add_id(struct codec_lists *l, int32_t id);
void codec_lists_clear(struct codec_lists *l); /* keeps the memory */
void codec_lists_free(struct codec_lists *l);
bool codec_lists_failed(const struct codec_lists *l);

struct codec_choice {
    int64_t index;
    struct codec_text text;
    const struct codec_lists *lists; /* never NULL */
    bool logprobs, ids;              /* which of the lists were asked for */
    const int32_t *prompt_ids;       /* [n_prompt_ids], NULL when not asked for or sent before */
    size_t n_prompt_ids;
    bool role;          /* chat chunk: the first of its choice, with the role and no text */
    const char *finish; /* finish_reason, NULL while running */
};

/* One object: head, then any number of choices, then the tail. usage may be NULL. */
void codec_write_head(struct bytes *out, const struct codec_reply *r, const int32_t *prompt_ids,
                      size_t n_prompt_ids);
void codec_write_choice(struct bytes *out, const struct codec_reply *r,
                        const struct codec_choice *c, bool is_first);
void codec_write_tail(struct bytes *out, const struct codec_reply *r,
                      const struct codec_usage *usage);

void codec_write_ids(struct bytes *out, const int32_t *ids, size_t n);

/* Replies of /tokenize and /detokenize. */
void codec_write_tokenized(struct bytes *out, const struct codec_request *q,
                           const struct tokenizer *t, const int32_t *ids, size_t n,
                           int64_t max_model_len);
void codec_write_detokenized(struct bytes *out, const char *text, size_t n);

/* One entry of /v1/models; max_model_len 0 when the model has no limit. */
void codec_write_model(struct bytes *out, const char *id, int64_t created, int64_t max_model_len);

#endif
