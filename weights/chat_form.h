/* chat_form.h - a Jinja template in a normal form, so that templates which differ only in
 * spelling compare equal. Private to chat_template.c.
 *
 * Normal form: whitespace control and trimming (as transformers sets it: trim_blocks and
 * lstrip_blocks) carried out; text made part of outputs; adjacent outputs joined by +, adjacent
 * literals joined; no space outside literals but one between names; m['x'] written m.x; all
 * literals in single quotes, with \n as a newline; comments gone. Two templates of one normal form
 * render alike; nothing is promised about templates whose forms differ.
 *
 * Threads: no state. Memory: appends to the caller's buffer.
 * Errors:  UNSUPPORTED for what it cannot read; NOMEM.
 */
#ifndef LATTE_WEIGHTS_CHAT_FORM_H
#define LATTE_WEIGHTS_CHAT_FORM_H

#include "engine/base/bytes.h"
#include "engine/base/error.h"

/* A quote, or a backslash escape other than \n, inside a literal of the normal form. */
enum { CHAT_FORM_QUOTE = 2, CHAT_FORM_ESCAPE = 3 };

enum status chat_form(const char *source, size_t n, struct bytes *out, struct error *err);

#endif
