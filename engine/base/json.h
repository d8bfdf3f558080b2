/* json.h - strict checking of JSON text before a lenient parser sees it.
 *
 * cJSON accepts a good deal that RFC 8259 forbids and silently changes some of what it permits.
 * json_check is the gate in front of it: a text that passes is RFC 8259 JSON in valid UTF-8
 * with nothing that cJSON would cut, round or merge without saying so.
 *
 * Threads: no shared state.
 * Memory:  allocates only to compare object keys; frees it all. Recurses once per level.
 * Errors:  INVALID, NOMEM.
 */
#ifndef LATTE_BASE_JSON_H
#define LATTE_BASE_JSON_H

#include <stdbool.h>
#include <stddef.h>

#include "engine/base/error.h"

struct json_limits {
    int max_depth;     /* nested arrays and objects, 1..1000 (asserted) */
    size_t max_values; /* values of all kinds, 0 for no limit */
    bool any_integer;  /* let integers pass that a double rounds: json_member finds their digits */
};

/* Check text[n] (needs no terminator). Refused, naming line, column (in bytes) and what is wrong:
 * anything outside the grammar (control bytes in strings, leading zeros, trailing commas or
 * text, NaN), invalid UTF-8 or a byte order mark, unpaired surrogates, the escape \u0000,
 * numbers of over 63 characters or whose double is not finite, integers of more than 2^53 in
 * magnitude that a double cannot hold exactly, duplicate keys in one object (compared after
 * unescaping), more than max_depth levels or max_values values. Runs in O(n log n). */
enum status json_check(const char *text, size_t n, const struct json_limits *limits,
                       struct error *err);

/* The text of the value of a member of the outermost object of text[n], which json_check has
 * passed; sets *n_value. NULL when text is no object or has no such key. key is plain ASCII. */
const char *json_member(const char *text, size_t n, const char *key, size_t *n_value);

#endif
