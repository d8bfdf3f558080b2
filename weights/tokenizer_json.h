/* tokenizer_json.h - reading checked JSON objects whose every key must be understood.
 *
 * where is the path of the object in the file ("decoder.Strip"), for error texts.
 * Threads: no state. Memory: strings are borrowed from the cJSON tree; json_check refuses
 * \u0000, so they hold no zero byte and strlen is their length.
 */
#ifndef LATTE_WEIGHTS_TOKENIZER_JSON_H
#define LATTE_WEIGHTS_TOKENIZER_JSON_H

#include <cjson/cJSON.h>
#include <stdbool.h>
#include <stdint.h>

#include "engine/base/error.h"

/* UNSUPPORTED naming the first key that is not in known (which ends with NULL); INVALID when
 * node is no object. */
enum status object_only(const cJSON *node, const char *where, const char *const *known,
                        struct error *err);

/* INVALID when the key is absent (and required) or of another type. */
enum status object_string(const cJSON *node, const char *where, const char *key, const char **out,
                          struct error *err);
enum status object_bool(const cJSON *node, const char *where, const char *key, bool required,
                        bool *out, struct error *err);
enum status object_array(const cJSON *node, const char *where, const char *key, const cJSON **out,
                         struct error *err);
/* An integer of 0..most. */
enum status object_integer(const cJSON *node, const char *where, const char *key, int32_t most,
                           int32_t *out, struct error *err);

/* The value at key, NULL when absent or null. */
const cJSON *object_get(const cJSON *node, const char *key);

/* Whether node is an integer of 0..most. */
bool node_integer(const cJSON *node, int32_t most, int32_t *out);

#endif
