/* config.h - config.json, checked key by key.
 *
 * Part of the checkpoint: other code includes checkpoint.h alone. Every key is listed in
 * weights/README.md; a wrong type or range is an error that names the key, what was expected
 * and what was found. Keys nobody here knows are collected, not refused.
 *
 * Threads: no shared state.
 * Memory:  config_read allocates config->layers; config_free releases it.
 * Errors:  INVALID (err->field is the key), NOT_FOUND, TOO_LARGE, IO, NOMEM.
 */
#ifndef LATTE_WEIGHTS_CONFIG_H
#define LATTE_WEIGHTS_CONFIG_H

#include "engine/base/bytes.h"
#include "engine/base/error.h"
#include "weights/checkpoint.h"

/* Read the file at path. Appends unknown keys to `ignored` as JSON strings, comma-separated.
 * *out is changed on success only. */
enum status config_read(struct model_config *out, struct bytes *ignored, const char *path,
                        struct error *err);
void config_free(struct model_config *config);

/* Append the canonical text of the keys that change what the model computes, defaults filled
 * in and unused keys left out: "key=value\n" in a fixed order. */
void config_canonical(const struct model_config *config, struct bytes *out);

/* Whether any layer is of that type. */
bool config_has_layer(const struct model_config *config, enum layer_type type);

#endif
