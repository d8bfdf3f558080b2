/* chat_template.h - turning a conversation into the text a model was trained on.
 *
 * The template is recognised from tokenizer_config.json (or chat_template.jinja): ChatML,
 * Gemma, Llama-3 and plain. A template that is none of these is not guessed at: rendering
 * with it returns UNSUPPORTED.
 *
 * Threads: read-only after open. Memory: render appends to the caller's buffer.
 * Errors:  INVALID, UNSUPPORTED, IO, NOMEM.
 */
#ifndef LATTE_WEIGHTS_CHAT_TEMPLATE_H
#define LATTE_WEIGHTS_CHAT_TEMPLATE_H

#include <stdbool.h>
#include <stddef.h>

#include "engine/base/bytes.h"
#include "engine/base/error.h"

enum chat_template_kind {
    CHAT_TEMPLATE_NONE, /* the directory has no template */
    CHAT_TEMPLATE_CHATML,
    CHAT_TEMPLATE_GEMMA,
    CHAT_TEMPLATE_LLAMA3,
    CHAT_TEMPLATE_PLAIN,   /* "Role: text" lines */
    CHAT_TEMPLATE_UNKNOWN, /* there is one, and it is none of the above */
};

enum chat_role { CHAT_ROLE_SYSTEM, CHAT_ROLE_USER, CHAT_ROLE_ASSISTANT };

struct chat_message {
    enum chat_role role; /* OpenAI's "developer" is SYSTEM */
    const char *content; /* [n] valid UTF-8, borrowed */
    size_t n;
};

struct chat_template;

/* Read DIR/tokenizer_config.json and DIR/chat_template.jinja, both optional. */
enum status chat_template_open(struct chat_template **out, const char *dir, struct error *err);
void chat_template_close(struct chat_template *t); /* accepts NULL */
enum chat_template_kind chat_template_kind(const struct chat_template *t);
const char *chat_template_name(const struct chat_template *t); /* "chatml", ... for logs */

enum chat_render_flags {
    CHAT_ADD_GENERATION_PROMPT = 1,  /* end with the opening of an assistant message */
    CHAT_CONTINUE_FINAL_MESSAGE = 2, /* leave the last message open; excludes the other */
};

/* Append the rendered conversation (with BOS text when the template writes it). INVALID names
 * what the template does not permit (an empty list, a role order it refuses). */
enum status chat_template_render(const struct chat_template *t, const struct chat_message *messages,
                                 size_t n_messages, unsigned flags, struct bytes *out,
                                 struct error *err);

/* How a session's text ends, for what comes next. Stored with a session: values stay. */
enum chat_tail {
    CHAT_TAIL_NONE = 0,   /* nothing of a chat is open */
    CHAT_TAIL_OPEN = 1,   /* an assistant's message, without the template's end */
    CHAT_TAIL_CLOSED = 2, /* the template's end of a message is the session's last token */
};

/* Append what these messages add to a session that ends with an assistant's answer: the end of
 * that answer, if the session has not seen it, and then what is new. So nothing that a template
 * writes at the beginning comes again. As above; INVALID also for a template that does not show
 * the answers before. */
enum status chat_template_render_turn(const struct chat_template *t, enum chat_tail tail,
                                      const struct chat_message *messages, size_t n_messages,
                                      unsigned flags, struct bytes *out, struct error *err);

/* The texts that end an assistant's turn in this template ("<|im_end|>"), for stop rules;
 * returns the count (0..4) and sets texts[i], borrowed. */
int chat_template_stops(const struct chat_template *t, const char *texts[4]);

#endif
