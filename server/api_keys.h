/* api_keys.h - the keys that open the API, from a file.
 *
 * One key per line, 8 to 255 printable ASCII characters without blanks; empty lines and lines
 * that begin with '#' are skipped. A blank and the word "admin" behind a key make it an admin key.
 *
 * Threads: read-only after open.
 * Memory:  owns the keys and wipes them at close.
 * Errors:  INVALID names the line, IO the file; NOMEM.
 */
#ifndef LATTE_SERVER_API_KEYS_H
#define LATTE_SERVER_API_KEYS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/base/error.h"

struct api_keys;

enum { API_KEYS_NONE = -1 };

enum status api_keys_open(struct api_keys **out, const char *path, struct error *err);
void api_keys_close(struct api_keys *keys); /* accepts NULL */
int api_keys_count(const struct api_keys *keys);

/* The index of the key that "Authorization: Bearer KEY" carries (authorization is the header's
 * value, may be NULL), or API_KEYS_NONE. Takes the same time for any key of the table and any
 * wrong one: all keys are compared, over their full width. */
int api_keys_find(const struct api_keys *keys, const char *authorization);

/* 16 bytes that stand for key i, under a secret of 136 bytes or more: XXH3-128. */
void api_keys_tag(const struct api_keys *keys, int i, const uint8_t *secret, size_t n_secret,
                  uint8_t out[16]);

/* Whether the key of this index, or API_KEYS_NONE, is an admin key. */
bool api_keys_is_admin(const struct api_keys *keys, int index);

#endif
