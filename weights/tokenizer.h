/* tokenizer.h - text to token ids and back, as a Hugging Face tokenizer.json says.
 *
 * Understood: BPE with byte level (GPT-2, Llama-3, Qwen, SmolLM2 pipelines) and BPE with byte
 * fallback (Llama-2 and Gemma pipelines): normalizers, pre-tokenizers, decoders and post-
 * processors of those families, added and special tokens. Whatever else a file contains is an
 * error at load that names it. Character classes and NFC are those of the `tokenizers` package,
 * whatever Unicode version the system's libraries have (weights/tokenizer_unicode.c).
 *
 * Threads: open and close by one thread; an open tokenizer is read-only and may be used by any
 *          number of threads. A detokenizer belongs to one thread.
 * Memory:  encode appends to a token_list that the caller owns.
 * Errors:  INVALID, UNSUPPORTED (a component it does not know), TOO_LARGE, IO, NOMEM.
 */
#ifndef LATTE_WEIGHTS_TOKENIZER_H
#define LATTE_WEIGHTS_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/base/bytes.h"
#include "engine/base/error.h"

struct tokenizer;

/* A growing list of ids; zero-initialised it is empty and unlimited. */
struct token_list {
    int32_t *ids; /* [n], owned; token_list_free */
    size_t n, cap;
    size_t limit; /* most ids, 0 for none; beyond it encode returns TOO_LARGE */
};
void token_list_free(struct token_list *list);

enum tokenizer_flags {
    TOKENIZER_ADD_SPECIAL = 1,      /* apply the post-processor (bos, eos) as the file says */
    TOKENIZER_NO_PARSE_SPECIAL = 2, /* text of special tokens is ordinary text (other added
                                     * tokens are still found) */
};

/* Read tokenizer.json at path. */
enum status tokenizer_open(struct tokenizer **out, const char *path, struct error *err);
void tokenizer_close(struct tokenizer *t); /* accepts NULL */

/* One more than the largest id. */
int32_t tokenizer_size(const struct tokenizer *t);

/* XXH3-128 of the file in hex, 32 characters. */
const char *tokenizer_fingerprint(const struct tokenizer *t);

/* The id of a token by its exact content in the vocabulary or the added tokens; -1 if none. */
int32_t tokenizer_find(const struct tokenizer *t, const char *content, size_t n);

/* Whether an id is a special added token. */
bool tokenizer_is_special(const struct tokenizer *t, int32_t id);

/* Append the ids of text[n], valid UTF-8 (else INVALID); zero bytes are text like any other.
 * flags of enum tokenizer_flags. O(n log n). On failure the list holds what it held. */
enum status tokenizer_encode(const struct tokenizer *t, const char *text, size_t n, unsigned flags,
                             struct token_list *out, struct error *err);

/* Decode all ids at once, as `tokenizers` does; invalid UTF-8 becomes U+FFFD. */
enum status tokenizer_decode(const struct tokenizer *t, const int32_t *ids, size_t n,
                             bool skip_special, struct bytes *out, struct error *err);

/* Append the bytes one token stands for, by itself (may be a part of a character), for
 * logprobs' `token` and `bytes`. Rules about the first token of a text do not apply. Ids
 * outside the vocabulary append nothing. */
void tokenizer_piece(const struct tokenizer *t, int32_t id, struct bytes *out);

/* Incremental decoding: the concatenation of all outputs equals tokenizer_decode of all ids.
 * Text is held back while later tokens can still change it: an incomplete character, and with
 * byte fallback a run of byte tokens, which decodes as a whole (one wrong byte turns all of
 * it into U+FFFD) once a token of another kind, or the end, follows. */
struct detokenizer {
    const struct tokenizer *tokenizer; /* borrowed */
    bool skip_special;
    bool started;          /* a token was seen: leading-space rules are over */
    unsigned char held[8]; /* bytes of a character that is not complete yet */
    int n_held;
    struct bytes run;    /* byte tokens held back, owned */
    uint32_t strip_left; /* leading characters still to be cut */
};

void detokenizer_init(struct detokenizer *d, const struct tokenizer *t, bool skip_special);

/* Append to out the text that id completes: always whole UTF-8 characters, maybe nothing.
 * Running out of memory sets out->failed. */
void detokenizer_push(struct detokenizer *d, int32_t id, struct bytes *out);

/* Append what is held back; an incomplete character becomes U+FFFD. Releases what d owns; d
 * may then only be initialised again. */
void detokenizer_finish(struct detokenizer *d, struct bytes *out);

/* Release what d owns without finishing; harmless after finish. */
void detokenizer_free(struct detokenizer *d);

#endif
