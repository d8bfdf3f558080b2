/* prompt.h - tokens that several jobs read: one copy for all choices of a request.
 *
 * Threads: hold and release by any; the tokens never change.
 * Memory:  counted references; the last release frees.
 * Errors:  NOMEM.
 */
#ifndef LATTE_ENGINE_PROMPT_H
#define LATTE_ENGINE_PROMPT_H

#include <stddef.h>
#include <stdint.h>

#include "engine/base/error.h"

struct prompt;

/* A copy of ids[n] with one reference, the caller's. n is at least 1. */
enum status prompt_new(struct prompt **out, const int32_t *ids, size_t n, struct error *err);
void prompt_hold(struct prompt *p);
void prompt_release(struct prompt *p); /* accepts NULL */

const int32_t *prompt_ids(const struct prompt *p);

#endif
