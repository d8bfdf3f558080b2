/* state_io.h - states that come from somewhere else, made images on a worker: read, checked, and
 * written to the store where there is one, so that sessions may begin with them.
 *
 * Threads: the io thread, but state_io_parse.
 * Memory:  what a worker has outlives the request.
 * Errors:  become the reply.
 */
#ifndef LATTE_SERVER_STATE_IO_H
#define LATTE_SERVER_STATE_IO_H

#include "engine/image.h"
#include "server/http.h"

struct routes;

/* The image is there, held as long as this runs; the request, which is deferred, goes on. */
typedef void state_io_done(struct http_request *http, struct routes *r, struct image *image);

/* Make an image of the request's body; then done answers the request. Not called when the body is
 * no state of this model (400) or the request is over. */
void state_io_read(struct http_request *http, struct routes *r, state_io_done *done);
/* The same with a copy of an image that the caller keeps, wherever it is; takes that over. */
void state_io_copy(struct http_request *http, struct routes *r, struct image *image,
                   state_io_done *done);

/* Exported bytes [n] as a new image, held, in the store if there is one. May block. */
enum status state_io_parse(struct routes *r, const char *data, size_t n, struct image **out,
                           struct error *err);

#endif
