/* routes_sessions.h - the endpoints of /v1/sessions; see session.h for what they do.
 *
 * Threads: the io thread. Memory: nothing is kept. Errors: become the reply.
 */
#ifndef LATTE_SERVER_ROUTES_SESSIONS_H
#define LATTE_SERVER_ROUTES_SESSIONS_H

#include "server/http.h"

/* context: struct routes. */
http_handler sessions_post, sessions_list, session_get, session_remove, session_post_fork,
    session_post_snapshot, session_get_snapshots, session_post_rollback, session_get_state,
    session_put_state;

#endif
