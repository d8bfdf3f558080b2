/* routes_responses.h - stored responses as a resource: shown, streamed again, deleted, their input
 * listed. How they are made is a call (call.h) of its own API.
 *
 * Threads: the io thread. Memory: the request's. Errors: become the reply.
 */
#ifndef LATTE_SERVER_ROUTES_RESPONSES_H
#define LATTE_SERVER_ROUTES_RESPONSES_H

#include "server/http.h"

struct response;
struct routes;

http_handler response_get, response_delete, response_get_items;

/* The responses that the store has; the model's name is borrowed. And telling the store of one
 * that is forgotten (responses_options). */
void routes_restore_responses(struct routes *r, const char *model);
void routes_drop_response(void *routes, const struct response *response);

#endif
