/* fingerprint.h - the identity of a model: what its states and caches belong to.
 *
 * XXH3-128 over the configuration that changes the result and over every tensor, so it does
 * not depend on how the tensors are spread over files. The byte layout is in the .c.
 *
 * Threads: the calling thread only, which also calls progress.
 * Memory:  allocates its hash state and a page of text; frees both.
 * Errors:  NOMEM.
 */
#ifndef LATTE_WEIGHTS_FINGERPRINT_H
#define LATTE_WEIGHTS_FINGERPRINT_H

#include "engine/base/error.h"
#include "weights/checkpoint.h"

enum { FINGERPRINT_BYTES = 33 }; /* 32 hex digits and the terminator */

/* Reads every tensor once. progress may be NULL. */
enum status fingerprint_compute(char out[FINGERPRINT_BYTES], const struct model_config *config,
                                const struct safetensors *tensors, progress_fn *progress,
                                void *context, struct error *err);

#endif
