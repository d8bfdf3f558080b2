/* state_io.c - see state_io.h */
#include "server/state_io.h"

#include <stdlib.h>

#include "server/call.h"

/* One state on its way in. */
struct transfer {
    struct work_item item;     /* first: a worker hands it back */
    struct http_request *http; /* NULL once the request is over */
    struct routes *routes;
    state_io_done *done;
    struct image *source; /* kept; NULL: it comes as bytes */
    struct bytes bytes;
    struct image *image; /* held */
    struct error error;
    enum status status;
};

static void transfer_free(struct transfer *t)
{
    image_drop(t->source);
    image_release(t->image);
    bytes_free(&t->bytes);
    free(t);
}

static void on_close(void *context, bool delivered)
{
    (void)delivered;
    struct transfer *t = context;
    t->http = NULL; /* a worker has it */
}

enum status state_io_parse(struct routes *r, const char *data, size_t n, struct image **out,
                           struct error *err)
{
    struct storage *storage = &r->storage;
    struct image *image = NULL;
    enum status st = image_parse(&image, &storage->images, n ? data : "", n, err);
    if (!st)
        st = state_store_secure(storage->store, image, err);
    if (st)
        image_release(image);
    else
        *out = image;
    return st;
}

/* The source's bytes: the copy is a state of its own, which does not need the other's origin. */
static enum status write_source(struct transfer *t)
{
    struct routes *r = t->routes;
    const struct served_model *model = atomic_load_explicit(&r->model, memory_order_acquire);
    enum status st = state_store_hold(r->storage.store, model->engine, t->source, &t->error);
    if (st)
        return st;
    image_write(t->source, &t->bytes);
    image_release(t->source);
    return t->bytes.failed ? fail(&t->error, STATUS_NOMEM, "out of memory for the copy of a state")
                           : STATUS_OK;
}

static void run(struct work_item *item)
{
    struct transfer *t = (struct transfer *)item;
    if (t->source)
        t->status = write_source(t);
    if (!t->status)
        t->status = state_io_parse(t->routes, t->bytes.data, t->bytes.n, &t->image, &t->error);
    bytes_free(&t->bytes);
}

static void on_run(struct work_item *item)
{
    struct transfer *t = (struct transfer *)item;
    struct http_request *http = t->http;
    if (http)
        http_on_close(http, NULL, NULL);
    if (http && t->status)
        http_fail(http, &t->error, NULL);
    else if (http)
        t->done(http, t->routes, t->image);
    transfer_free(t);
}

/* Takes the source over. */
static void begin(struct http_request *http, struct routes *r, struct image *source,
                  state_io_done *done)
{
    struct transfer *t = calloc(1, sizeof(*t));
    if (!t) {
        image_drop(source);
        call_refuse(http, STATUS_NOMEM, "out of memory for a request");
        return;
    }
    *t = (struct transfer){.http = http, .routes = r, .done = done, .source = source};
    t->item = (struct work_item){.run = run, .done = on_run};
    http_on_close(http, on_close, t);
    if (!source)
        http_take_body(http, &t->bytes);
    http_defer(http);
    workers_submit(r->workers, &t->item);
}

void state_io_read(struct http_request *http, struct routes *r, state_io_done *done)
{
    begin(http, r, NULL, done);
}

void state_io_copy(struct http_request *http, struct routes *r, struct image *image,
                   state_io_done *done)
{
    begin(http, r, image, done);
}
