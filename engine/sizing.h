/* sizing.h - everything that is opened for a device, chosen before any of it is taken: types of
 * numbers, rows of a step, and how many sessions fit.
 *
 * What a GPU must hold for n slots: the weights, n states, the scratch of the forward pass and
 * what the backend takes for itself, of which some is for each slot too. The sum may be as much
 * as the given share of the memory that is free.
 *
 * Threads: the opening one. Memory: borrows the configuration.
 * Errors:  INVALID, UNSUPPORTED, DEVICE; NOMEM with bytes and advice where it does not fit.
 */
#ifndef LATTE_ENGINE_SIZING_H
#define LATTE_ENGINE_SIZING_H

#include "engine/backend.h"
#include "engine/devices.h"
#include "engine/engine.h"
#include "engine/model.h"
#include "engine/scheduler.h"

struct sizing {
    struct device device;
    struct scheduler_options scheduler;
    struct model_options model;
    struct backend_options backend;
};

/* Options are in range; zeros stand for what engine.h says of them. */
enum status sizing_choose(struct sizing *out, const struct checkpoint *checkpoint,
                          const struct engine_options *options, struct device device,
                          struct error *err);

/* Bytes on the device with n_slots of them: reported, not taken. */
struct sizing_bytes {
    struct backend_memory gpu; /* its name, total and free; zero on a CPU */
    size_t weights, slot, workspace;
};
enum status sizing_measure(const struct sizing *s, const struct checkpoint *checkpoint,
                           struct sizing_bytes *out, struct error *err);

/* "f32", "bf16", "int8", "f8", as options spell them. */
const char *sizing_dtype_name(enum dtype dtype);

#endif
