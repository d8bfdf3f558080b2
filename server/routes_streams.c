/* routes_streams.c - see routes_streams.h */
#include "server/routes_streams.h"

#include <stdlib.h>
#include <string.h>

#include "server/call.h"
#include "server/metrics.h"

/* The caller's stream that the path names, or NULL with a 404 sent. */
static struct reel *find(struct http_request *http, const struct routes *r)
{
    const char *id = http_param(http);
    struct reel *reel = reels_find(r->reels, id, http_key_index(http));
    const struct call *c = reel ? reel_user(reel) : NULL;
    struct error err;
    if (reel && !(c && c->http)) /* else nobody was told of it yet */
        return reel;
    fail(&err, STATUS_NOT_FOUND,
         "There is no stream '%.64s'. A stream is kept for %lld s after its end, and less when "
         "memory is short.",
         id, (long long)r->options->stream_retention);
    http_fail(http, &err, "stream_not_found");
    return NULL;
}

/* The number of the last event that the client has: a header when a browser reconnects by itself,
 * which then knows better than the address it was given. */
static enum status read_last(const struct http_request *http, uint64_t *last, struct error *err)
{
    const char *text = http_header(http, "Last-Event-ID");
    if (!text || !*text)
        text = http_query(http, "last_event_id");
    *last = 0;
    if (!text)
        return STATUS_OK;
    if (!*text || strlen(text) > 18 || text[strspn(text, "0123456789")])
        return fail_field(err, STATUS_INVALID, "last_event_id",
                          "Invalid 'last_event_id': expected the number of an event, but got "
                          "'%.40s'.",
                          text);
    *last = strtoull(text, NULL, 10);
    return STATUS_OK;
}

void stream_get(struct http_request *http, void *context)
{
    struct reel *reel = find(http, context);
    struct error err;
    uint64_t last;
    if (!reel)
        return;
    if (read_last(http, &last, &err)) {
        http_fail(http, &err, "invalid_value");
        return;
    }
    metrics_add(METRIC_STREAMS_RESUMED, 1);
    reel_read(reel, http, last);
}

void stream_remove(struct http_request *http, void *context)
{
    static const char reason[] = "The stream was deleted.", code[] = "stream_deleted";
    struct reel *reel = find(http, context);
    if (!reel)
        return;
    struct bytes body = {0};
    bytes_format(&body, "{\"id\":\"%s\",\"object\":\"stream.deleted\",\"deleted\":true}",
                 reel_id(reel));
    struct call *c = reel_user(reel);
    if (c)
        call_stop(c, reason, code);
    else
        reel_stop(reel, reason, code);
    call_reply_json(http, &body);
}
