/* call_once.c - see call_once.h */
#include "server/call_once.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/pack.h"
#include "server/log.h"
#include "server/metrics.h"

/* A repetition, while the first one runs. In routes->waiters; in no particular order of keys. */
struct waiter {
    struct routes *routes;
    struct http_request *http;
    enum codec_api api;
    const struct outcome *outcome; /* NULL: known by now; the request may come in again */
    struct waiter *next;
};

/* ---- waiting --------------------------------------------------------------------------------- */

static void take_out(struct waiter *w)
{
    struct waiter **link = &w->routes->waiters;
    while (*link != w)
        link = &(*link)->next;
    *link = w->next;
    http_on_close(w->http, NULL, NULL);
    free(w);
}

static void on_close(void *context, bool delivered)
{
    (void)delivered;
    take_out(context);
}

static void await(struct http_request *http, struct routes *r, enum codec_api api,
                  const struct outcome *o)
{
    struct waiter *w = malloc(sizeof(*w));
    if (!w) {
        call_refuse(http, STATUS_NOMEM, "out of memory for a request");
        return;
    }
    *w = (struct waiter){.routes = r, .http = http, .api = api, .outcome = o};
    struct waiter **link = &r->waiters;
    while (*link)
        link = &(*link)->next;
    *link = w;
    http_on_close(http, on_close, w);
    http_defer(http);
}

/* Those who wait for it come in again, at the next notification. */
static void wake(struct routes *r, const struct outcome *o)
{
    bool any = false;
    for (struct waiter *w = r->waiters; w; w = w->next) {
        any |= w->outcome == o;
        if (w->outcome == o)
            w->outcome = NULL;
    }
    if (any)
        http_notify(r->server);
}

void once_run_ready(struct routes *r)
{
    struct waiter *w = r->waiters;
    while (w && w->outcome)
        w = w->next;
    if (!w)
        return;
    struct http_request *http = w->http;
    enum codec_api api = w->api;
    take_out(w);
    call_post(http, r, api);
    http_notify(r->server); /* for the next one */
}

void once_on_tick(struct routes *r)
{
    int64_t limit_ns = r->options->request_timeout * 1000000000, now = job_clock_ns();
    outcomes_expire(r->outcomes);
    for (struct waiter *w = r->waiters, *next; limit_ns && w; w = next) {
        next = w->next;
        if (now - http_arrival_ns(w->http) < limit_ns)
            continue;
        struct http_request *http = w->http;
        take_out(w);
        http_fail_as(http, 409, "The first request with this Idempotency-Key still runs.",
                     "Idempotency-Key", "idempotency_key_in_use");
    }
}

/* ---- replays --------------------------------------------------------------------------------- */

static void refuse_gone(struct http_request *http)
{
    http_fail_as(http, 410,
                 "The request with this Idempotency-Key was carried out, but its reply is no "
                 "longer kept (--idempotency-mb, --stream-retention-mb), or was deleted.",
                 "Idempotency-Key", "idempotent_reply_gone");
}

/* A stored reply, or a stream that runs or ran. */
static void replay(struct http_request *http, const struct routes *r, const struct outcome *o)
{
    struct outcome_record record;
    outcome_record(o, &record);
    struct reel *reel = NULL;
    if (*record.stream_id)
        reel = reels_find(r->reels, record.stream_id, record.key.owner);
    if (!reel && !record.body) {
        refuse_gone(http);
        return;
    }
    metrics_add(METRIC_IDEMPOTENT_REPLAYS, 1);
    http_set_header(http, "Idempotent-Replayed", "true");
    if (reel)
        reel_read(reel, http, 0);
    else
        http_reply(http, record.http_status, "application/json", record.body, record.n_body);
}

/* The header's key, NULL without one. INVALID names the header. */
static enum status read_key(const struct http_request *http, const char **out, struct error *err)
{
    const char *key = http_header(http, "Idempotency-Key");
    size_t n = key ? strlen(key) : 1;
    bool visible = true;
    for (size_t i = 0; key && i < n; i++)
        visible &= key[i] > ' ' && key[i] < 0x7f;
    if (!n || n > OUTCOME_MAX_KEY || !visible)
        return fail_field(err, STATUS_INVALID, "Idempotency-Key",
                          "Invalid 'Idempotency-Key': expected 1 to %d visible ASCII characters, "
                          "but got %zu%s.",
                          OUTCOME_MAX_KEY, n, visible ? "" : " with others among them");
    *out = key;
    return STATUS_OK;
}

bool once_admit(struct http_request *http, struct routes *r, enum codec_api api,
                struct outcome **out)
{
    struct error err;
    struct outcome_key key = {.owner = http_key_index(http), .path = http_route(http)};
    bool is_new = false;
    *out = NULL;
    if (read_key(http, &key.key, &err)) {
        http_fail(http, &err, "invalid_idempotency_key");
        return false;
    }
    if (!key.key)
        return true;
    size_t n;
    const char *body = http_body(http, &n);
    outcome_hash(&key, body, n);
    struct outcome *o;
    enum status st = outcomes_claim(r->outcomes, &key, &o, &is_new, &err);
    if (st == STATUS_INVALID)
        http_fail_as(http, 422, err.text, err.field, "idempotency_key_reused");
    else if (st)
        http_fail(http, &err, NULL);
    else if (is_new)
        *out = o;
    else if (outcome_state(o) == OUTCOME_CLAIMED)
        await(http, r, api, o);
    else
        replay(http, r, o);
    return is_new && !st;
}

/* ---- in the store ----------------------------------------------------------------------------
 *
 *   stored u64, http_status u32, body_hash u64[2], has_body u32, then the texts path, key, stream
 *   id and body, each with its length u64. */

enum { NAME_BYTES = OUTCOME_MAX_KEY + 128 };

static void write_name(char out[NAME_BYTES], const struct outcome_record *record)
{
    snprintf(out, NAME_BYTES, "%s %s", record->key.path, record->key.key);
}

static void put_text(struct bytes *out, const char *text, size_t n)
{
    pack_u64(out, n);
    bytes_append(out, text, n);
}

static void pack_record(struct bytes *out, const struct outcome_record *record)
{
    pack_u64(out, (uint64_t)record->stored);
    pack_u32(out, (uint32_t)record->http_status);
    pack_u64(out, record->key.body_hash[0]);
    pack_u64(out, record->key.body_hash[1]);
    pack_u32(out, record->body != NULL);
    put_text(out, record->key.path, strlen(record->key.path));
    put_text(out, record->key.key, strlen(record->key.key));
    put_text(out, record->stream_id, strlen(record->stream_id));
    put_text(out, record->body, record->n_body);
}

/* turn NULL: it is certain. False: done is not called. When it fails, a repetition after a restart
 * gets no reply, or is a request like any other where no turn was noted before. */
static bool write_record(struct routes *r, const struct outcome_record *record,
                         const struct session_turn *turn, session_done *done, void *context)
{
    char name[NAME_BYTES];
    struct bytes data = {0};
    struct error err;
    write_name(name, record);
    pack_record(&data, record);
    const struct session_item item = {.kind = SESSION_OUTCOME,
                                      .name = name,
                                      .owner = record->key.owner,
                                      .keep_s = r->options->idempotency_ttl,
                                      .data = data.data,
                                      .n_data = data.n,
                                      .after_id = turn ? turn->id : NULL,
                                      .after_version = turn ? turn->version + 1 : 0};
    enum status st = data.failed ? fail(&err, STATUS_NOMEM, "out of memory") : STATUS_OK;
    if (!st)
        st = session_put_item(r->storage.sessions, &item, done, context, &err);
    if (st)
        log_event(LOG_WARN, "store", "the outcome of a request is not written: %s", err.text);
    bytes_free(&data);
    return !st;
}

/* The outcome as it will be: before it is, since that may make others go, or itself. */
static bool save(struct routes *r, const struct outcome *o, int http_status,
                 const struct codec_text *body, session_done *done, void *context)
{
    struct outcome_record record;
    if (!storage_has_items(&r->storage))
        return false;
    outcome_record(o, &record);
    record.stored = time(NULL);
    record.http_status = http_status;
    record.body = body ? body->data : NULL;
    record.n_body = body ? body->n : 0;
    return write_record(r, &record, NULL, done, context);
}

/* ---- outcomes -------------------------------------------------------------------------------- */

void once_forget(struct routes *r, struct outcome *o)
{
    if (!o)
        return;
    wake(r, o);
    outcome_forget(o);
}

void once_lose_reply(struct routes *r, struct outcome *o)
{
    if (!o)
        return;
    save(r, o, 200, NULL, NULL, NULL);
    wake(r, o);
    outcome_store(o, 200, NULL, 0);
}

bool once_keep(struct routes *r, struct outcome *o, const struct bytes *body, session_done *done,
               void *context)
{
    if (!o)
        return false;
    if (body->failed) {
        once_lose_reply(r, o);
        return false;
    }
    const struct codec_text text = {body->data, body->n};
    bool waits = save(r, o, 200, &text, done, context);
    wake(r, o);
    outcome_store(o, 200, body->data, body->n);
    return waits;
}

/* Asked again, the same request would be answered the same. */
static bool is_final(int http_status)
{
    return http_status >= 400 && http_status < 500 && http_status != 408 && http_status != 409 &&
           http_status != 429;
}

void once_fail(struct routes *r, struct outcome *o, const struct error *err, const char *code)
{
    int http_status = http_status_of(err->status);
    struct bytes json = {0};
    if (!o)
        return;
    if (is_final(http_status))
        http_fail_json(&json, http_status, err->text, err->field, code);
    if (!json.n || json.failed) {
        once_forget(r, o);
    } else {
        const struct codec_text text = {json.data, json.n};
        save(r, o, http_status, &text, NULL, NULL);
        wake(r, o);
        outcome_store(o, http_status, json.data, json.n);
    }
    bytes_free(&json);
}

void once_begin_stream(struct routes *r, struct outcome *o, const char *stream_id)
{
    if (!o)
        return;
    outcome_stream(o, stream_id);
    wake(r, o);
}

void once_end_stream(struct routes *r, struct outcome *o, const struct error *err)
{
    if (!o)
        return;
    if (err && !is_final(http_status_of(err->status))) {
        once_forget(r, o);
        return;
    }
    save(r, o, 200, NULL, NULL, NULL);
    outcome_end_stream(o);
}

void once_note_turn(struct routes *r, const struct outcome *o, const struct session_turn *turn)
{
    struct outcome_record record;
    if (!o || !storage_has_items(&r->storage))
        return;
    outcome_record(o, &record);
    record.stored = time(NULL);
    record.http_status = 200;
    write_record(r, &record, turn, NULL, NULL);
}

void once_changed(void *routes, const struct outcome *o, bool is_gone)
{
    struct routes *r = routes;
    struct outcome_record record;
    char name[NAME_BYTES];
    if (!storage_has_items(&r->storage))
        return;
    outcome_record(o, &record);
    write_name(name, &record);
    if (is_gone)
        session_drop_item(r->storage.sessions, SESSION_OUTCOME, record.key.owner, name);
    else
        write_record(r, &record, NULL, NULL, NULL);
}

/* ---- from the store -------------------------------------------------------------------------- */

/* A copy with an end, which the caller frees; NULL when it is not there. */
static char *take_text(struct unpack *u, size_t *n)
{
    *n = unpack_u64(u);
    const char *at = *n <= (size_t)(u->end - u->at) ? unpack_skip(u, *n) : NULL;
    char *text = at ? malloc(*n + 1) : NULL;
    u->failed |= !text;
    if (!text)
        return NULL;
    memcpy(text, at, *n);
    text[*n] = 0;
    return text;
}

static bool restore(void *context, const struct session_item *item, int64_t created)
{
    (void)created;
    struct routes *r = context;
    struct unpack u = {.at = item->data, .end = item->data + item->n_data};
    struct outcome_record record = {.key.owner = item->owner};
    struct error err;
    size_t n;
    if (item->owner < -1)
        return true; /* no key of today's has it */
    record.stored = (int64_t)unpack_u64(&u);
    record.http_status = (int)unpack_u32(&u);
    record.key.body_hash[0] = unpack_u64(&u);
    record.key.body_hash[1] = unpack_u64(&u);
    bool has_body = unpack_u32(&u);
    char *path = take_text(&u, &n), *key = take_text(&u, &n), *stream = take_text(&u, &n);
    char *body = take_text(&u, &record.n_body);
    record.key.path = path;
    record.key.key = key;
    record.stream_id = stream;
    record.body = has_body ? body : NULL;
    bool good = !u.failed && !outcomes_restore(r->outcomes, &record, &err);
    free(path);
    free(key);
    free(stream);
    free(body);
    return good;
}

void once_restore(struct routes *r)
{
    sessions_each_item(r->storage.sessions, SESSION_OUTCOME, restore, r);
}
