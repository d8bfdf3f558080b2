/* presets.h - named states that sessions and requests may begin with.
 *
 * A preset is an image (image.h) in memory under a name: the state after a long system prompt,
 * say, that nobody has to send again. All may use them, whatever their API key. Those given at the
 * start are fixed; others may be saved, replaced and deleted, and end with the process.
 *
 * Threads: any; one lock around everything. Nothing in here waits or copies a state.
 * Memory:  holds its images, which the image store bounds; at most so many names.
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

/* Save under a name of letters, digits, '.', '_' and '-', in place of what had it. The image,
 * which the caller holds and has secured (state_store.h), is held. A fixed one must be new. */
enum status presets_put(struct presets *p, const char *name, struct image *image, bool is_fixed,
                        struct preset_info *out, struct error *err);
/* Accepts NULL for image or info. *image is held for the caller. */
enum status presets_find(struct presets *p, const char *name, struct image **image,
                         struct preset_info *info, struct error *err);
enum status presets_delete(struct presets *p, const char *name, struct error *err);

/* All of them, oldest first; the caller frees *out. */
enum status presets_list(struct presets *p, struct preset_info **out, int *n, struct error *err);

#endif
