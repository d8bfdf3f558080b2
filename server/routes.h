/* routes.h - the endpoints: one function each, over engine, tokenizer and chat template.
 *
 * Threads: everything on the io thread, but routes_publish (main, once).
 * Memory:  routes_open's struct owns the workers; what main publishes stays main's.
 */
#ifndef LATTE_SERVER_ROUTES_H
#define LATTE_SERVER_ROUTES_H

#include "engine/engine.h"
#include "server/http.h"
#include "weights/chat_template.h"
#include "weights/tokenizer.h"

struct routes;

/* A loaded model, borrowed from main until the server is closed. */
struct served_model {
    const char *name; /* its id in the API */
    int64_t created;  /* Unix time, seconds */
    struct engine *engine;
    const struct tokenizer *tokenizer;
    const struct chat_template *chat_template;
};

enum status routes_open(struct routes **out, const struct options *options, struct error *err);
/* The server has stopped: end the workers, while the engine still runs; nothing asks it later. */
void routes_stop(struct routes *r);
/* After the engine is closed: its jobs hold states that are the routes'. */
void routes_close(struct routes *r);

/* What http_open needs; the table is static. */
const struct http_route *routes_table(size_t *n);
void routes_on_notify(void *context); /* context: struct routes */
void routes_on_tick(void *context);

/* Tell which server this routes object works for (before the io thread handles requests). */
void routes_set_server(struct routes *r, struct http_server *server);

/* From loading to serving: the store is read, /health/ready turns 200. A release store; requests
 * see it all. Fails when the store or a preset of the options cannot be read; then nothing is
 * served. */
enum status routes_publish(struct routes *r, const struct served_model *model, struct error *err);

/* From serving to draining: /health/ready turns 503 and new generations are refused. Any thread. */
void routes_drain(struct routes *r);

/* Generations that may run without a request: their clients left. Any thread. */
int routes_n_detached(const struct routes *r);

#endif
