/* config_parts.h - keys of config.json with a form of their own: lists, objects, defaults that
 * lean on other keys.
 *
 * Private to config.c and generation.c; contracts as in config.h. Out-parameters are filled in
 * place: a configuration that failed half-way is thrown away as a whole.
 */
#ifndef LATTE_WEIGHTS_CONFIG_PARTS_H
#define LATTE_WEIGHTS_CONFIG_PARTS_H

#include "engine/base/error.h"
#include "weights/checkpoint.h"
#include "weights/tree.h"

enum { CONFIG_MAX_BYTES = 4 << 20, CONFIG_MAX_DEPTH = 16 };

/* INVALID: "KEY: expected EXPECTED, found ITEM". */
enum status config_wrong(struct error *err, const char *key, const char *expected,
                         const cJSON *item);

/* A number of min..max, both included. */
enum status config_number(double *out, const char *key, const cJSON *item, double min, double max,
                          struct error *err);

/* model_type and architectures: sets head. */
enum status config_read_architecture(struct model_config *c, const cJSON *root, struct error *err);

/* All others, once the table of config.c is read: allocates c->layers. */
enum status config_read_parts(struct model_config *c, const cJSON *root, struct error *err);

/* eos_token_id, a number or a list, added to those that are there. */
enum status config_read_eos(struct model_config *c, const cJSON *root, struct error *err);

#endif
