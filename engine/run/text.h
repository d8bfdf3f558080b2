/* text.h - the texts latte-run is given: an argument, a file, or stdin.
 *
 * Threads: main only. Memory: appended to the caller's buffer.
 * Errors:  IO, NOT_FOUND, TOO_LARGE, NOMEM; INVALID for what is not UTF-8.
 */
#ifndef LATTE_RUN_TEXT_H
#define LATTE_RUN_TEXT_H

#include "engine/base/bytes.h"
#include "engine/base/error.h"

/* The text of a file, or of stdin for "-"; at most 1 GiB. */
enum status text_read(struct bytes *out, const char *path, struct error *err);

/* A text from the command line. */
enum status text_take(struct bytes *out, const char *text, struct error *err);

#endif
