/* playground.h - the page at /, on which a person tries the server; its files are in playground/.
 *
 * They are in the program as they were when it was built, are the same for everybody and need no
 * API key; what the page then asks for does. Without --playground they are a 404.
 *
 * Threads: the io thread. Memory: static. Errors: become the reply.
 */
#ifndef LATTE_SERVER_PLAYGROUND_H
#define LATTE_SERVER_PLAYGROUND_H

#include "server/http.h"

/* context: struct routes. */
http_handler playground_get_page, /* GET / */
    playground_get_file;          /* GET /playground/{file} */

#endif
