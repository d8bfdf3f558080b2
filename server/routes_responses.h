/* routes_responses.h - stored responses as a resource: shown, streamed again, deleted, their input
 * listed. How they are made is a call (call.h) of its own API.
 *
 * Threads: the io thread. Memory: the request's. Errors: become the reply.
 */
#ifndef LATTE_SERVER_ROUTES_RESPONSES_H
#define LATTE_SERVER_ROUTES_RESPONSES_H

#include "server/http.h"

http_handler response_get, response_delete, response_get_items;

#endif
