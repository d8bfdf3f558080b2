/* generation.h - generation_config.json: a model's own defaults of sampling.
 *
 * Part of the checkpoint: other code includes checkpoint.h alone. Keys that do not concern
 * sampling here are ignored, as other servers do.
 *
 * Threads: no shared state.
 * Memory:  frees what it allocates.
 * Errors:  INVALID (err->field is the key), TOO_LARGE, IO, NOMEM.
 */
#ifndef LATTE_WEIGHTS_GENERATION_H
#define LATTE_WEIGHTS_GENERATION_H

#include "engine/base/error.h"
#include "weights/checkpoint.h"

/* Read the file at path; one that is not there sets nothing and is no error. Its eos_token_id
 * is added to the config's. */
enum status generation_read(struct generation_defaults *out, struct model_config *config,
                            const char *path, struct error *err);

#endif
