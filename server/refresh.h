/* refresh.h - before a request about a session: what other servers did to it.
 *
 * Threads: the io thread.
 * Memory:  what a worker has outlives the request.
 * Errors:  become the reply: 503 when the store cannot be reached.
 */
#ifndef LATTE_SERVER_REFRESH_H
#define LATTE_SERVER_REFRESH_H

#include <stdbool.h>

struct http_request;
struct routes;

typedef void refreshed(struct http_request *http, void *routes);

/* Handle the request by `then`; in a shared store once the session (id NULL: none) is as all
 * servers know it, which a worker asks for. */
void refresh_then(struct http_request *http, struct routes *r, const char *id, refreshed *then);

/* Whether it would ask: what is to be refreshed need not be looked for otherwise. */
bool refresh_asks(const struct routes *r);

#endif
