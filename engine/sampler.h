/* sampler.h - from logits to the next token.
 *
 * Order of operations on a row of logits: logit_bias; forbidden tokens (those that would end
 * generation, before min_tokens; eos under ignore_eos is permitted but does not stop);
 * repetition penalty (tokens of this request's prompt and output: positive logits divided,
 * negative multiplied); presence and frequency penalties (tokens of its output); temperature;
 * top_k; typical_p; top_p; min_p; one draw. Reported logprobs are the model's own: log softmax
 * of the untouched row, as vLLM's default.
 *
 * Definition, so that every implementation draws the same token from the same logits. All
 * values are f32, no fused multiply-add. NaN counts as -inf, +inf as FLT_MAX, before anything
 * else and again after each changed logit. x is the adjusted row, m its largest value,
 * s = min(1/temperature, FLT_MAX), y = (x - m) * s.
 *   order      tokens rank by x descending, then by id ascending
 *   greedy     temperature 0: the first token in that order
 *   weight     floor(2^44 exp(y)) as an integer (row.h); tokens of weight 0 are out, for good
 *   top_k      the first k in that order
 *   typical_p  c = -(sum floor(2^44 exp(y) |y|)) / (sum of weights); of the tokens by ascending
 *              |y - c|, then id, the fewest whose weights sum to typical_p of the total
 *   top_p      of the order above, the fewest whose weights sum to top_p of the total
 *   min_p      tokens with exp(y) >= min_p * the largest exp(y) that is left
 *   draw       r = floor(u * total / 2^64) with u 64 bits of Philox; in order of ids, the first
 *              token at which the running sum of weights exceeds r
 * "Sum to p" means at least ceil(p * total), computed in f64, and always at least one token.
 * Each filter's total is what the filters before it left. Integer sums make cuts and draws
 * independent of the order of adding, so a device may add in any order.
 *
 * Randomness is counter-based (Philox 4x32-10, Salmon et al. 2011): key = hash(seed, choice
 * index), counter = position of the token that is drawn. So a seed gives the same tokens
 * whatever else runs, in whatever order.
 *
 * Threads: one at a time. Memory: sampler_open takes all of it. Errors: NOMEM at open only.
 */
#ifndef LATTE_ENGINE_SAMPLER_H
#define LATTE_ENGINE_SAMPLER_H

#include <stdbool.h>
#include <stdint.h>

#include "engine/base/error.h"

enum {
    SAMPLER_MAX_TOP_LOGPROBS = 20,
    SAMPLER_MAX_STOP_TOKENS = 64,
    SAMPLER_MAX_LOGIT_BIAS = 1024,
};

struct logit_bias {
    int32_t token;
    float bias; /* added to the logit; -INFINITY forbids */
};

struct sampling_params {
    float temperature;                         /* 0 is greedy; otherwise > 0 */
    int top_k;                                 /* 0 or -1: all */
    float top_p;                               /* (0, 1] */
    float min_p;                               /* [0, 1] */
    float typical_p;                           /* (0, 1] */
    float repetition_penalty;                  /* > 0, 1 for none */
    float presence_penalty, frequency_penalty; /* [-2, 2], 0 for none */
    uint64_t seed;   /* the caller draws a fresh random one when the user gave none */
    uint32_t choice; /* index of the choice among n */
    int min_tokens;  /* no eos or stop token before this many output tokens */
    bool ignore_eos;
    int n_logprobs; /* -1: none; 0: the chosen token's; k: and the top k, at most 20 */
    int n_stop_tokens;
    int32_t stop_tokens[SAMPLER_MAX_STOP_TOKENS];
    int n_logit_bias;
    const struct logit_bias *logit_bias; /* [n_logit_bias], borrowed for the job's life */
};

/* temperature 1, everything else off, seed 0, no logprobs. */
void sampling_params_init(struct sampling_params *p);

/* INVALID, naming the field, when a value is outside the range given above or a token outside
 * 0..vocab_size-1. */
enum status sampling_params_check(const struct sampling_params *p, int32_t vocab_size,
                                  struct error *err);

struct token_logprob {
    int32_t token;
    float logprob;
};

struct sampled {
    int32_t token;
    float logprob; /* when asked for, else NAN; -INFINITY for what the model rules out */
    int n_top;
    struct token_logprob top[SAMPLER_MAX_TOP_LOGPROBS]; /* descending; ties by lower id */
};

/* Scratch and penalty counts for n_slots concurrent samplings over V tokens. The counts'
 * 8 * n_slots * V bytes are touched only as far as penalties are used. */
struct sampler;
enum status sampler_open(struct sampler **out, int n_slots, int32_t vocab_size, const int32_t *eos,
                         int n_eos, struct error *err);
void sampler_close(struct sampler *s); /* accepts NULL */

/* A new request begins in a slot: forget counts. */
void sampler_reset(struct sampler *s, int slot);
/* Tell of a prompt token or an output token (counts for penalties). */
void sampler_note(struct sampler *s, int slot, int32_t token, bool is_output);
/* Whether these params need sampler_note at all. */
bool sampler_counts(const struct sampling_params *p);

/* Draw the next token of the slot from logits [V]. position is the position the token will
 * have; n_output the number of output tokens so far. NaN logits count as -inf; a row with
 * nothing left to draw gives the largest untouched logit. */
void sampler_draw(struct sampler *s, int slot, const float *logits, const struct sampling_params *p,
                  uint64_t position, int64_t n_output, struct sampled *out);

/* probs [V] = the probabilities that sampler_draw would draw with. */
void sampler_distribution(struct sampler *s, int slot, const float *logits,
                          const struct sampling_params *p, int64_t n_output, double *probs);

/* logprob of a given token (for prompts: echo with logprobs) and the top alternatives. */
void sampler_score(struct sampler *s, const float *logits, int32_t token, int n_top,
                   struct sampled *out);

/* Whether a token ends generation under these params: one of eos [n_eos] unless ignored, or a
 * stop token. sampler_is_stop: with the eos of sampler_open. */
bool sampling_is_stop(const struct sampling_params *p, const int32_t *eos, int n_eos,
                      int32_t token);
bool sampler_is_stop(const struct sampler *s, const struct sampling_params *p, int32_t token);

/* Philox 4x32-10: out = bijection of counter under key; exposed for its known-answer test. */
void philox4x32(uint32_t out[4], const uint32_t counter[4], const uint32_t key[2]);

#endif
