/* refresh.c - see refresh.h */
#include "server/refresh.h"

#include <stdio.h>
#include <stdlib.h>

#include "server/call.h"

struct refresh {
    struct work_item item;     /* first: a worker hands it back */
    struct http_request *http; /* NULL once the request is over */
    struct routes *routes;
    refreshed *then;
    char id[SESSION_ID_BYTES + 1]; /* one more: an id that is too long stays one */
    enum status status;            /* with error */
    struct error error;
};

static void on_close(void *context, bool delivered)
{
    (void)delivered;
    struct refresh *f = context;
    f->http = NULL;
}

static void run(struct work_item *item)
{
    struct refresh *f = (struct refresh *)item;
    f->status = session_refresh(f->routes->storage.sessions, f->id, &f->error);
}

static void on_run(struct work_item *item)
{
    struct refresh f = *(struct refresh *)item;
    free(item);
    if (!f.http)
        return;
    http_on_close(f.http, NULL, NULL);
    if (f.status)
        http_fail(f.http, &f.error, NULL);
    else
        f.then(f.http, f.routes);
}

bool refresh_asks(const struct routes *r)
{
    return atomic_load_explicit(&r->model, memory_order_acquire) &&
           sessions_are_shared(r->storage.sessions);
}

void refresh_then(struct http_request *http, struct routes *r, const char *id, refreshed *then)
{
    if (!id || !refresh_asks(r)) {
        then(http, r);
        return;
    }
    struct refresh *f = calloc(1, sizeof(*f));
    if (!f) {
        call_refuse(http, STATUS_NOMEM, "out of memory for a request");
        return;
    }
    f->item = (struct work_item){.run = run, .done = on_run};
    f->http = http;
    f->routes = r;
    f->then = then;
    snprintf(f->id, sizeof(f->id), "%s", id);
    http_on_close(http, on_close, f);
    http_defer(http);
    workers_submit(r->workers, &f->item);
}
