/* history.h - the turns of a session, and an oracle: the same turns from the first token on, with
 * the same chunks, by the model alone. Tokens and states must be equal bit for bit.
 */
#ifndef LATTE_TESTS_HISTORY_H
#define LATTE_TESTS_HISTORY_H

#include <stddef.h>
#include <stdint.h>

#include "engine/engine.h"
#include "engine/image.h"
#include "tests/unit/model_run.h"

enum {
    HISTORY_CHUNK = 8,
    HISTORY_MAX_PROMPT = 20,
    HISTORY_MAX_OUTPUT = 6,
    HISTORY_MAX_TURNS = 5,
};

struct turn {
    int n_prompt, n_output;
    int32_t prompt[HISTORY_MAX_PROMPT + IMAGE_MAX_PENDING], output[HISTORY_MAX_OUTPUT];
    struct sampling_params sampling;
};

struct history {
    int n_turns;
    struct turn turns[HISTORY_MAX_TURNS];
};

/* A reproducible number in 0..n-1. */
void history_seed(uint64_t seed);
int history_below(int n);

/* An engine of chunks of HISTORY_CHUNK with two slots, and the oracle: the same model on the same
 * kind of device by itself; f32, on a GPU deterministic. */
void history_open_engine(struct engine **out, struct engine_info *info, const char *dir,
                         const char *device);
void history_open_oracle(struct run *out, const char *dir, const char *device);

/* A turn to come after an image (NULL: none): its pending tokens, then random ones. */
void history_fill(struct turn *turn, const struct image *from, int32_t vocab_size);
/* Run it in an engine of chunks of HISTORY_CHUNK: its output comes into the turn. */
void history_run(struct turn *turn, struct engine *engine, int max_tokens, struct image *from,
                 struct image *into, const char *label);
/* Compute all turns with the model alone; compare outputs, and the state with a held image unless
 * that is NULL. */
void history_check(const struct history *h, const struct image *image, struct run *oracle,
                   int32_t vocab_size, const char *label);

#endif
