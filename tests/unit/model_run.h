/* model_run.h - open golden models on a backend and feed them, for tests.
 *
 * Memory:  run_close releases a run; arrays are the caller's.
 * Errors:  anything unexpected ends the cmocka test with a sentence.
 */
#ifndef LATTE_TESTS_MODEL_RUN_H
#define LATTE_TESTS_MODEL_RUN_H

#include <stdbool.h>

#include "engine/model.h"
#include "weights/checkpoint.h"
#include "weights/safetensors.h"

enum { RUN_MAX_ROWS = 128, RUN_MAX_MODELS = 64 };

struct run_options {
    const char *backend; /* "ref", "cpu" or "cuda" */
    int n_threads;
    enum dtype dtype; /* of matrices */
    int n_slots;
};

/* What else a model may be opened with; all zero by default. */
struct run_form {
    enum dtype window_dtype;
    int max_rows, max_logit_rows; /* 0: RUN_MAX_ROWS, max_rows */
    int device;
    bool deterministic, composed; /* as backend_options */
};

/* One open model; V and a label for messages beside it. */
struct run {
    struct model *model;
    int32_t vocab_size;
    char label[200];
};

/* "ref", "cpu", and "cuda" where there is a device, real or emulated; ends with NULL. */
const char *const *run_backends(void);

/* Whether the CUDA devices here are emulated on the host. */
bool run_emulated(void);

/* Whether tests on the device are to be small: LATTE_TEST_QUICK=1 or 2 (under compute-sanitizer),
 * or it is an emulated one. */
bool run_quick(void);
/* LATTE_TEST_QUICK=2: only so much that every kernel runs, under tools that take minutes for a step
 * of a model. */
bool run_least(void);

/* Whether to leave out a golden model on this backend, because the device is slow: the first of
 * each kind of layer, latent input and position stays. */
bool run_skips(const char *backend, const char *dir);

enum status run_try_backend(struct backend **out, const char *name,
                            const struct backend_options *options, struct error *err);
void run_open(struct run *r, const char *dir, const struct run_options *options);
void run_open_as(struct run *r, const char *dir, const struct run_options *options,
                 const struct run_form *form);
void run_close(struct run *r);

/* The golden models, sorted by name: paths without a trailing slash. */
struct run_models {
    int n;
    char dirs[RUN_MAX_MODELS][160];
};
void run_list_models(struct run_models *out);

/* One step of one sequence; logits [n or 1, V] copied to out, which may be NULL (LOGITS_NONE). */
void run_feed(struct run *r, int slot, const int32_t *tokens, int n, enum logits_wanted wanted,
              float *out);

/* Largest |a - b|; NaN or infinity anywhere counts as infinite. */
double run_difference(const float *a, const float *b, size_t n);

/* All state tensors of a slot, one behind the other; free() it. */
float *run_state(struct run *r, int slot, size_t *n);

/* Compare two such states: maxima absolutely, sums and values relative to the maxima, each within
 * tolerance * (1 + |b|). Returns the worst excess as a ratio to the tolerance, <= 1 if equal. */
double run_state_excess(struct run *r, const float *a, const float *b, double tolerance);

#endif
