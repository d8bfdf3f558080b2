/* request_json.h - the small JSON bodies of requests about sessions and presets.
 *
 * Threads: the io thread.
 * Memory:  trees are the caller's.
 * Errors:  INVALID naming the field; NOT_FOUND for what it names; NOMEM.
 */
#ifndef LATTE_SERVER_REQUEST_JSON_H
#define LATTE_SERVER_REQUEST_JSON_H

#include <cjson/cJSON.h>
#include <stdint.h>

#include "engine/image.h"
#include "server/http.h"

struct routes;

/* The body as an object whose members are all among names, which end with NULL. */
enum status request_json_read(struct http_request *http, const char *const *names, cJSON **out,
                              struct error *err);
/* The same check for an object inside. path names it in errors: "from", or "" for the body. */
enum status request_json_members(const cJSON *object, const char *path, const char *const *names,
                                 struct error *err);

/* A whole number; `otherwise` when it is absent or null. */
enum status request_json_number(const cJSON *tree, const char *name, int64_t least, int64_t most,
                                int64_t otherwise, int64_t *out, struct error *err);
/* A name of 1 to 64 bytes; NULL when it is absent or null. */
enum status request_json_name(const cJSON *tree, const char *path, const char *field,
                              const char **out, struct error *err);

/* The state that {"session": id}, {"session": id, "snapshot": name} or {"preset": name} means,
 * kept for the caller; NULL for a session without tokens. path as above. */
enum status request_json_image(struct routes *r, const cJSON *object, const char *path, int owner,
                               struct image **out, struct error *err);

#endif
