/* warm_up.h - steps that a model runs before it serves, so that no request pays for first times.
 *
 * A prompt and a single row touch memory and start threads, on every device. A GPU also pays for
 * each number of rows that steps are rounded up to: its matrix products are tuned, its kernels
 * loaded, its graph recorded. That takes up to 0.1 s a number, and would take it from everybody
 * who is being served.
 *
 * Threads: the caller has the model for itself.
 * Memory:  released again.
 * Errors:  NOMEM, DEVICE.
 */
#ifndef LATTE_ENGINE_WARM_UP_H
#define LATTE_ENGINE_WARM_UP_H

#include <stdbool.h>

#include "engine/model.h"

struct warm_up {
    int n_slots, max_rows, max_logit_rows; /* the model's */
    int chunk;                             /* most prompt rows that a sequence brings to a step */
    int max_batch;                         /* most sequences that decode in one */
    bool every_size; /* steps of all sizes, prompts and decoding, on a device that rounds them */
};

enum { WARM_UP_LAYERS = 120 };

/* The slots are empty before and after. layers: how steps of how many rows are decoded, for people
 * ("clusters to 16 rows, warpgroups to 256, passes to 1024"); of every size alone, else empty. */
enum status warm_up(struct model *model, const struct warm_up *options, char layers[WARM_UP_LAYERS],
                    struct error *err);

#endif
