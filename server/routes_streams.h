/* routes_streams.h - the endpoints under /v1/streams: coming back to a resumable stream.
 *
 * Threads: the io thread. Errors: become the reply.
 */
#ifndef LATTE_SERVER_ROUTES_STREAMS_H
#define LATTE_SERVER_ROUTES_STREAMS_H

#include "server/http.h"

http_handler stream_get, stream_remove; /* context: struct routes */

#endif
