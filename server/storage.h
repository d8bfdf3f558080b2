/* storage.h - where a server keeps sessions and their states: in memory, and in --store.
 *
 * Threads: open and close by main; what is in here says for itself.
 * Memory:  owns it all.
 * Errors:  those of the store's files, naming them.
 */
#ifndef LATTE_SERVER_STORAGE_H
#define LATTE_SERVER_STORAGE_H

#include "engine/engine.h"
#include "engine/prefix.h"
#include "engine/session.h"
#include "engine/state_store.h"
#include "server/http.h"
#include "server/options.h"

/* For memory, on a worker: others' states are written and dropped meanwhile. */
enum { STORAGE_WAIT_MS = 20000 };

struct storage {
    struct image_store images;
    struct state_store *store; /* NULL without --store */
    struct prefixes *prefixes; /* NULL: none are kept */
    struct sessions *sessions;
    uint8_t (*owners)[SESSION_OWNER_BYTES]; /* [n_owners], the tags of the API keys */
    int n_owners;
    bool is_open, is_away; /* the store did not answer, when it was looked at last */
};

struct storage_options {
    const struct options *options;
    const struct engine *engine; /* borrowed until storage_leave_engine */
    const struct engine_info *model;
    struct http_server *server;    /* whose keys own sessions; NULL: none */
    void (*notify)(void *context); /* sessions_reap is to be called; any thread */
    void *context;
};

/* Reads all that is in the store. On failure nothing is left open. */
enum status storage_open(struct storage *s, const struct storage_options *options,
                         struct error *err);
/* It keeps what else the server has (session.h, "items"): it has a store of its own. */
bool storage_has_items(const struct storage *s);
/* About once a second: tells the log when a shared store goes and comes back. */
void storage_on_tick(struct storage *s);
/* A shared store does not answer. Any thread. */
bool storage_is_away(const struct storage *s);
/* The engine is about to be closed: whatever its slots held is gone. */
void storage_leave_engine(struct storage *s);
/* What waits for the store is done or refused, and told to those who wait; nothing is written any
 * more. No worker may be under way. May be repeated. */
void storage_stop(struct storage *s);
/* No call is under way and no image is held any more. Accepts one that is not open. */
void storage_close(struct storage *s);

#endif
