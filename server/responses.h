/* responses.h - responses of the Responses API: what each has become so far, and the table of
 * those that are stored.
 *
 * A response is a record that grows while its text is generated: pieces of text are appended, and
 * at last it is completed, cut short, or failed. Its JSON object and its events are written from
 * the record, each event by its number: so a stream that is sent live, one that is replayed later
 * and a whole reply tell the same.
 *
 * The table keeps a response with the state it left (an image, engine/image.h): whoever names it
 * as previous_response_id goes on from there, any number of times, for an image does not change.
 * Responses end with their time to live, or when their owner has too many or all together take too
 * much memory: then the oldest go. Owners are as in session.h: for all others a response is not
 * there. Nothing else of the server knows how the table keeps them. Where the server has a store
 * it writes them down, too (response_pack), and is told of those that go.
 *
 * Threads: a response belongs to one thread until it is stored, then to the io thread.
 *          responses_state by any thread, also meanwhile: a lock guards the table and what it
 * reads. A response that has ended may be written by any thread that holds it. Memory:  a response
 * is counted; the table holds those stored. Bounded as the options say. Errors:  NOT_FOUND,
 * CONFLICT, INVALID, NOMEM. A lost append is remembered: response_failed.
 */
#ifndef LATTE_SERVER_RESPONSES_H
#define LATTE_SERVER_RESPONSES_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/base/bytes.h"
#include "engine/base/error.h"
#include "engine/image.h"

enum {
    RESPONSE_ID_BYTES = 38,  /* "resp_", 32 hex digits, the terminator */
    RESPONSE_MAX_PAGE = 100, /* items of the input in one list */
};

enum response_status {
    RESPONSE_IN_PROGRESS,
    RESPONSE_COMPLETED,
    RESPONSE_INCOMPLETE, /* its output limit cut it off */
    RESPONSE_FAILED,
};

/* The instructions that a chain of responses began with. */
struct response_instructions {
    bool given;
    uint64_t hash[2]; /* XXH3-128 of the text */
};
struct response_instructions response_instructions_of(const char *text); /* NULL: none */

/* Where a piece of text ends, one delta event each. */
struct response_piece {
    size_t text, logprobs;
};

/* One who is told when a response grows or ends. */
struct response_watcher {
    void (*news)(void *context);
    void *context;
    struct response_watcher *next;
};

struct response_neighbours {
    struct response *older, *newer;
};

struct response {
    atomic_int n_references;
    char id[RESPONSE_ID_BYTES];
    int owner;
    int64_t created;   /* Unix time, seconds, as are the others */
    int64_t completed; /* 0: not */
    const char *model; /* borrowed */
    struct bytes echo; /* members that repeat the request, `repeated` of codec_request */
    struct bytes items;
    size_t n_items;
    struct response_instructions instructions;

    /* Growing. */
    bool begun; /* the first token is there */
    struct bytes text;
    struct bytes logprobs; /* of all tokens, the inside of a JSON array */
    struct response_piece *pieces;
    size_t n_pieces, cap_pieces;
    bool lists_ids;          /* the request wants them: */
    struct bytes prompt_ids; /* the inside of JSON arrays */
    struct bytes token_ids;
    enum response_status status;
    struct error error; /* of a failed one */
    int64_t input_tokens, cached_tokens, output_tokens;
    struct response_watcher *watchers;
    bool lost; /* memory ran out */

    /* Guarded by the table's lock. */
    struct image *image; /* the state after it, once it has ended well; kept */
    bool stored;
    bool over; /* it has ended, well or not */
    int64_t expires;
    size_t n_bytes;  /* as counted in the table */
    size_t n_packed; /* bytes of it that are in the store */
    struct response *chain;
    struct response_neighbours links[2];
};

/* A new one with an id, in progress, with one reference; takes echo and items over. */
enum status response_new(struct response **out, struct bytes *echo, struct bytes *items,
                         size_t n_items, struct error *err);
void response_hold(struct response *r);
void response_release(struct response *r); /* accepts NULL */

/* The first token is there. */
void response_begin(struct response *r);
/* More text, whole characters of it, with the logprobs of its tokens: the inside of an array. */
void response_add(struct response *r, const char *text, size_t n, const struct bytes *logprobs);
/* It has ended well, or failed; may be repeated, and then changes nothing. */
void response_end(struct response *r, enum response_status status, int64_t now);
void response_fail(struct response *r, const struct error *err);
bool response_failed(const struct response *r);
size_t response_bytes(const struct response *r); /* that it holds, without its image */

void response_watch(struct response *r, struct response_watcher *w);
void response_unwatch(struct response *r, struct response_watcher *w);

/* ---- JSON (responses_write.c) -----------------------------------------------------------------
 */

/* The object as it is now. */
void response_write(struct bytes *out, const struct response *r);
/* Events there are by now; they are numbered from 0. The last one when it has ended. */
size_t response_n_events(const struct response *r);
/* One event with its lines and the empty line behind it. */
void response_write_event(struct bytes *out, const struct response *r, size_t number);

struct response_page {
    const char *after; /* the id of an item, NULL: from the first */
    size_t limit;      /* 1..RESPONSE_MAX_PAGE */
    bool ascending;
};
/* A list object of the input's items. NOT_FOUND when there is none with the id `after`. */
enum status response_write_items(struct bytes *out, const struct response *r,
                                 const struct response_page *page, struct error *err);

/* ---- bytes (responses_pack.c) -----------------------------------------------------------------
 */

/* One that is about to end with this status, for a store; the same on every machine. */
void response_pack(struct bytes *out, const struct response *r, enum response_status status,
                   int64_t completed);
/* The response that was packed, ended, with one reference; its model's name is borrowed. INVALID
 * for other bytes; NOMEM. */
enum status response_unpack(struct response **out, const char *data, size_t n, const char *model,
                            struct error *err);

/* ---- the table --------------------------------------------------------------------------------
 */

struct responses;

struct responses_options {
    int64_t ttl_s;
    int max_per_owner;
    size_t max_bytes; /* of all, with their images */
    void (*on_leave)(void *context,
                     const struct response *r); /* of one with n_packed that is forgotten; with
                                                 * the table's lock held; or NULL */
    void *context;
};

enum status responses_open(struct responses **out, const struct responses_options *options,
                           struct error *err);
void responses_close(struct responses *t); /* accepts NULL; nobody is told */

/* Store a response, which may still be in progress. Others may have to go for it. */
void responses_add(struct responses *t, struct response *r, int64_t now);
/* Put back one that was stored then, with its image. */
void responses_restore(struct responses *t, struct response *r, struct image *image,
                       int64_t stored);
/* The state that the response leaves: the table keeps it as long as the response. */
void responses_settle(struct responses *t, struct response *r, struct image *image);
/* It has grown, or ended: bring the count of its bytes up to date, and let others go. */
void responses_count(struct responses *t, struct response *r);
/* Forget it. Harmless when it is not stored. */
void responses_remove(struct responses *t, struct response *r);

/* A reference to a stored one, NULL when there is none of this owner. */
struct response *responses_find(struct responses *t, const char *id, int owner, int64_t now);

/* Where a response ended, for one that goes on from there: its image, kept for the caller, and the
 * instructions of the chain. NOT_FOUND; CONFLICT while it is in progress; INVALID when it failed.
 */
enum status responses_state(struct responses *t, const char *id, int owner, int64_t now,
                            struct image **image, struct response_instructions *instructions,
                            struct error *err);

/* Forget what is overdue; returns how many. */
int responses_expire(struct responses *t, int64_t now);
int responses_n(struct responses *t);
/* Those that went because of a limit, since the last call. */
int responses_take_dropped(struct responses *t);

#endif
