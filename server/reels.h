/* reels.h - streams that outlive their readers: the events of a generation, kept for those who
 * come back.
 *
 * A reel takes the events of one generation, numbers them 1, 2, ... ("id: n" before each), and
 * keeps them until some time after its end. A reader is an HTTP request with a place in a reel: it
 * begins behind any event that is still there, and any number of readers may read at once, each at
 * its own speed. The generation never waits for a reader.
 *
 * What is dropped, whole events and never silently: the oldest events of a stream that has more
 * than limit_one, the streams that ended longest ago when all have more than limit_all, and, when
 * that is not enough, the oldest events of the stream that grows. A reader that was there and got
 * too slow ends with an error event; one that comes too late is refused with 410.
 *
 * Threads: the io thread only; reels_stats by any.
 * Memory:  bounded by limit_all, but for the newest block (64 KB, or one event) of each stream that
 *          runs and the block that a slow reader reads from.
 * Errors:  NOMEM; what refuses a reader becomes its reply.
 */
#ifndef LATTE_SERVER_REELS_H
#define LATTE_SERVER_REELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "server/codec.h"
#include "server/http.h"

struct reels;
struct reel;

struct reels_options {
    size_t limit_all, limit_one; /* bytes */
};

enum status reels_open(struct reels **out, const struct reels_options *options, struct error *err);
/* Accepts NULL. No reader may be left. */
void reels_close(struct reels *t);

/* A new, empty reel, which is kept for keep_s after its end. owner: the API key's index. user: the
 * generation's owner, for reel_user. NULL: out of memory. */
struct reel *reel_open(struct reels *t, const char *id, int owner, int64_t keep_s, void *user);
/* Number and keep whole events, each of which ends with an empty line; readers are woken. False:
 * out of memory, events are missing, and the caller must stop the reel. */
bool reel_append(struct reel *reel, const char *data, size_t n);
/* For the access log of readers that end from now on. */
void reel_note_usage(struct reel *reel, struct codec_usage usage);
/* The last event was appended: readers end after it, and the time to keep it begins. */
void reel_finish(struct reel *reel);
/* Forget the reel: its readers end with an error event, of static texts. It is gone. */
void reel_stop(struct reel *reel, const char *reason, const char *code);

/* The owner's reel of this id, or NULL. */
struct reel *reels_find(struct reels *t, const char *id, int owner);
const char *reel_id(const struct reel *reel);
void *reel_user(const struct reel *reel); /* NULL once it is finished */

/* Answer the request with the events behind number `after` (0: from the first): with a stream that
 * follows the reel to its end, with 204 when there will be none, with 410 when the next one was
 * dropped, with 400 when there is no such event yet. Takes over the request's on_close. */
void reel_read(struct reel *reel, struct http_request *http, uint64_t after);

/* Forget what is overdue. About once a second. */
void reels_expire(struct reels *t);

struct reels_stats {
    int n_reels;
    size_t used_bytes;
};
struct reels_stats reels_stats(const struct reels *t);

#endif
