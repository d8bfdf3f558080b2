/* base64.h - bytes as text: RFC 4648's base64 with padding, as JSON carries what is no text.
 *
 * Threads: no shared state.
 * Memory:  appends to the caller's buffer.
 * Errors:  INVALID naming the first character that is wrong; NOMEM.
 */
#ifndef LATTE_BASE_BASE64_H
#define LATTE_BASE_BASE64_H

#include <stddef.h>

#include "engine/base/bytes.h"
#include "engine/base/error.h"

/* Characters that n bytes become. */
size_t base64_length(size_t n);

/* Append data[n] as text; a failure is remembered in out, as ever. */
void base64_encode(const void *data, size_t n, struct bytes *out);

/* Append the bytes that text[n] stands for. Only what base64_encode writes is accepted: no blanks
 * or line ends, '+' and '/' rather than '-' and '_', padding to a multiple of four, unused bits
 * zero. After a failure out may have grown. */
enum status base64_decode(const char *text, size_t n, struct bytes *out, struct error *err);

#endif
