/* routes_responses.c - see routes_responses.h */
#include "server/routes_responses.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "server/call.h"

enum { LISTED = 20, FRAME_BYTES = 16 << 10 };

/* ---- requests -------------------------------------------------------------------------------- */

/* The stored response that the path names, with a reference; NULL when the request is answered. */
static struct response *find(struct http_request *http, struct routes *r)
{
    struct error err;
    if (!call_model(http, r))
        return NULL;
    const char *id = http_param(http);
    struct response *found = responses_find(r->responses, id, http_key_index(http), time(NULL));
    if (found)
        return found;
    struct codec_text shown = codec_clip(id);
    fail(&err, STATUS_NOT_FOUND, "Response with id '%.*s' not found.", (int)shown.n, shown.data);
    http_fail(http, &err, NULL);
    return NULL;
}

/* A whole number among the query's values; `otherwise` without it. */
static enum status read_number(struct http_request *http, const char *name, long least, long most,
                               long otherwise, long *out, struct error *err)
{
    const char *text = http_query(http, name);
    char *end = NULL;
    *out = text ? strtol(text, &end, 10) : otherwise;
    if (!text || (*text && !*end && *out >= least && *out <= most))
        return STATUS_OK;
    return fail_field(err, STATUS_INVALID, name,
                      "Invalid '%s': expected a whole number from %ld to %ld.", name, least, most);
}

/* One of two words; the first without it. */
static enum status read_word(struct http_request *http, const char *name, const char *first,
                             const char *second, bool *is_second, struct error *err)
{
    const char *text = http_query(http, name);
    *is_second = text && !strcmp(text, second);
    if (!text || *is_second || !strcmp(text, first))
        return STATUS_OK;
    return fail_field(err, STATUS_INVALID, name, "Invalid '%s': expected '%s' or '%s'.", name,
                      first, second);
}

/* ---- a response as a stream -------------------------------------------------------------------
 */

/* Somebody who reads the events of a response; in the request's arena. */
struct reader {
    struct response_watcher watcher;
    struct http_request *http;
    struct response *response; /* held */
    size_t next;               /* the number of the next event to frame */
    struct bytes events;
    size_t n_sent;
};

static void on_news(void *context)
{
    struct reader *reader = context;
    http_wake(reader->http);
}

static void on_close(void *context, bool delivered)
{
    (void)delivered;
    struct reader *reader = context;
    response_unwatch(reader->response, &reader->watcher);
    response_release(reader->response);
    bytes_free(&reader->events);
}

static void frame(struct reader *reader)
{
    size_t n = response_n_events(reader->response);
    reader->events.n = reader->n_sent = 0;
    while (reader->next < n && reader->events.n < FRAME_BYTES)
        response_write_event(&reader->events, reader->response, reader->next++);
}

static ssize_t read_events(void *context, char *out, size_t max)
{
    struct reader *reader = context;
    if (reader->n_sent == reader->events.n)
        frame(reader);
    if (reader->events.failed)
        return HTTP_SOURCE_ABORT;
    size_t left = reader->events.n - reader->n_sent, n = left < max ? left : max;
    if (!left)
        return reader->response->status == RESPONSE_IN_PROGRESS ? HTTP_SOURCE_PARK
                                                                : HTTP_SOURCE_END;
    memcpy(out, reader->events.data + reader->n_sent, n);
    reader->n_sent += n;
    return (ssize_t)n;
}

/* Takes the reference over. */
static void stream(struct http_request *http, struct response *response, size_t next)
{
    struct reader *reader = arena_take(http_arena(http), sizeof(*reader));
    if (!reader) {
        response_release(response);
        call_refuse(http, STATUS_NOMEM, "out of memory for a stream");
        return;
    }
    *reader = (struct reader){
        .watcher = {.news = on_news, .context = reader},
        .http = http,
        .response = response,
        .next = next,
    };
    response_watch(response, &reader->watcher);
    http_on_close(http, on_close, reader);
    http_stream(http, 200, "text/event-stream; charset=utf-8", read_events, reader);
}

/* ---- endpoints --------------------------------------------------------------------------------
 */

void response_get(struct http_request *http, void *context)
{
    struct error err;
    bool streams = false, obfuscates = false;
    long after = -1;
    struct response *response = find(http, context);
    if (!response)
        return;
    enum status st = read_word(http, "stream", "false", "true", &streams, &err);
    if (!st)
        st = read_number(http, "starting_after", 0, INT32_MAX, -1, &after, &err);
    if (!st)
        st = read_word(http, "include_obfuscation", "false", "true", &obfuscates, &err);
    if (!st && obfuscates)
        st = fail_field(&err, STATUS_INVALID, "include_obfuscation",
                        "'include_obfuscation' is not supported by this server.");
    if (!st && after >= 0 && !streams)
        st = fail_field(&err, STATUS_INVALID, "starting_after",
                        "'starting_after' is only allowed when 'stream' is true.");
    if (!st && streams) {
        stream(http, response, (size_t)(after + 1));
        return;
    }
    struct bytes body = {0};
    if (!st)
        response_write(&body, response);
    response_release(response);
    if (st)
        http_fail(http, &err, NULL);
    else
        call_reply_json(http, &body);
}

void response_delete(struct http_request *http, void *context)
{
    struct routes *r = context;
    struct response *response = find(http, r);
    if (!response)
        return;
    struct bytes body = {0};
    bytes_format(&body, "{\"id\":\"%s\",\"object\":\"response\",\"deleted\":true}", response->id);
    responses_remove(r->responses, response);
    response_release(response);
    call_reply_json(http, &body);
}

void response_get_items(struct http_request *http, void *context)
{
    struct error err;
    struct response_page page = {.after = http_query(http, "after")};
    long limit = LISTED;
    struct response *response = find(http, context);
    if (!response)
        return;
    struct bytes body = {0};
    enum status st = read_number(http, "limit", 1, RESPONSE_MAX_PAGE, LISTED, &limit, &err);
    if (!st)
        st = read_word(http, "order", "desc", "asc", &page.ascending, &err);
    page.limit = (size_t)limit;
    if (!st)
        st = response_write_items(&body, response, &page, &err);
    response_release(response);
    if (st)
        http_fail(http, &err, NULL);
    else
        call_reply_json(http, &body);
}

/* ---- in the store ---------------------------------------------------------------------------- */

struct restoring {
    struct routes *routes;
    const char *model;
};

static bool restore(void *context, const struct session_item *item, int64_t created)
{
    const struct restoring *at = context;
    struct response *response = NULL;
    struct error err;
    if (item->owner < -1)
        return true; /* no key of today's has it */
    if (!item->image || response_unpack(&response, item->data, item->n_data, at->model, &err))
        return false;
    response->owner = item->owner;
    responses_restore(at->routes->responses, response, item->image, created);
    response_release(response);
    return true;
}

void routes_restore_responses(struct routes *r, const char *model)
{
    struct restoring at = {r, model};
    sessions_each_item(r->storage.sessions, SESSION_RESPONSE, restore, &at);
}

void routes_drop_response(void *routes, const struct response *response)
{
    struct routes *r = routes;
    if (storage_has_items(&r->storage))
        session_drop_item(r->storage.sessions, SESSION_RESPONSE, response->owner, response->id);
}
