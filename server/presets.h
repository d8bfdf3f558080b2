/* presets.h - named states that sessions and requests may begin with.
 *
 * A preset is an image (image.h) under a name: the state after a long system prompt, say, that
 * nobody has to send again. All may use them, whatever their API key. Those given at the start are
 * fixed; others may be saved, replaced and deleted. Where there is a store it has those, too
 * (routes_presets.c).
 *
 * Threads: any; one lock around everything. Nothing in here waits or copies a state.
 * Memory:  keeps its images, which may leave memory where there is a store; at most so many names.
 * Errors:  NOT_FOUND; INVALID for a name; CONFLICT for a fixed one; BUSY at the limit; NOMEM.
 */
#ifndef LATTE_SERVER_PRESETS_H
#define LATTE_SERVER_PRESETS_H

#include <stdbool.h>
#include <stdint.h>

#include "engine/base/error.h"
#include "engine/image.h"

struct presets;

enum { PRESET_NAME_BYTES = 65 }; /* with the terminator */

struct preset_info {
    char name[PRESET_NAME_BYTES];
    uint64_t position; /* tokens of the state */
    int64_t created;   /* Unix time, seconds */
    bool is_fixed;
};

enum status presets_open(struct presets **out, int max_presets, struct error *err);
void presets_close(struct presets *p); /* accepts NULL */

/* Whether presets_put would take this name. */
enum status presets_check(struct presets *p, const char *name, bool is_fixed, struct error *err);
/* Save under a name of letters, digits, '.', '_' and '-', in place of what had it. The image,
 * which the caller holds and has secured (state_store.h), is kept. A fixed one must be new. */
enum status presets_put(struct presets *p, const char *name, struct image *image, bool is_fixed,
                        struct preset_info *out, struct error *err);
/* Put back what was saved before, kept. CONFLICT: the name is a fixed one's. */
enum status presets_restore(struct presets *p, const char *name, struct image *image,
                            int64_t created, struct error *err);
/* Accepts NULL for image or info. *image is kept for the caller. */
enum status presets_find(struct presets *p, const char *name, struct image **image,
                         struct preset_info *info, struct error *err);
enum status presets_delete(struct presets *p, const char *name, struct error *err);

/* All of them, oldest first; the caller frees *out. */
enum status presets_list(struct presets *p, struct preset_info **out, int *n, struct error *err);

#endif
