/* routes_presets.h - the endpoints of /v1/presets; see presets.h for what they are.
 *
 * Threads: the io thread. Memory: nothing is kept. Errors: become the reply.
 */
#ifndef LATTE_SERVER_ROUTES_PRESETS_H
#define LATTE_SERVER_ROUTES_PRESETS_H

#include "server/http.h"

struct routes;

/* context: struct routes. */
http_handler presets_get_list, preset_get, preset_put, preset_remove;

/* Those that the store has; once, after the fixed ones. */
void routes_restore_presets(struct routes *r);

/* Load those of --preset; an error names the one that does not fit, and why. Once, after the
 * image store was set up. */
enum status routes_load_presets(struct routes *r, struct error *err);

#endif
