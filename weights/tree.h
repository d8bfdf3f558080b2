/* tree.h - JSON files as cJSON trees, after the strict check.
 *
 * Keys are looked up by exact case. A null stands for an absent key in configuration files,
 * so tree_find treats it as one.
 *
 * Threads: no shared state.
 * Memory:  the caller owns a tree and releases it with cJSON_Delete.
 * Errors:  those of file_read and json_check; texts name the file.
 */
#ifndef LATTE_WEIGHTS_TREE_H
#define LATTE_WEIGHTS_TREE_H

#include <cjson/cJSON.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/base/bytes.h"
#include "engine/base/error.h"

/* Check text[n] and parse it: at most max_depth levels and 4 million values. */
enum status tree_parse(cJSON **out, const char *text, size_t n, int max_depth, struct error *err);

/* The same with the file at path, of at most max_bytes. */
enum status tree_read(cJSON **out, const char *path, size_t max_bytes, int max_depth,
                      struct error *err);

/* The value of a key, NULL when it is absent or null, or when the tree is no object. */
const cJSON *tree_find(const cJSON *object, const char *key);

/* A whole number of min..max into *out. Exact up to 2^53, the largest that is taken. */
bool tree_whole(const cJSON *item, int64_t min, int64_t max, int64_t *out);

/* What an item is, for error texts: "an array", "a number". NULL is "nothing". */
const char *tree_kind(const cJSON *item);

/* A short rendering of the value itself ("\"silu\"", "0.5", "an array of 3"). */
const char *tree_show(const cJSON *item, char out[64]);

/* An item's key, cut to 60 bytes of whole characters. */
const char *tree_key(const cJSON *item, char out[64]);

#endif
