/* http_request.c - a request from its header to its end: what was checked, its body, its
 * memory, what handlers ask of it; see http.h. */
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include <microhttpd.h>

#include "engine/base/base64.h"
#include "server/http_private.h"
#include "server/log.h"
#include "server/metrics.h"

/* The beginning of a request. */

struct comparison {
    const char *at; /* the next line of the header that was checked */
    bool same;
};

static bool same_text(struct http_slice checked, const char *found)
{
    return strlen(found) == checked.n && !memcmp(found, checked.data, checked.n);
}

static enum MHD_Result compare_field(void *context, enum MHD_ValueKind kind, const char *name,
                                     const char *value)
{
    (void)kind;
    struct comparison *c = context;
    struct http_slice checked_name, checked_value, found = {value, value ? strlen(value) : 0};
    http_trim(&found);
    c->same = c->same && http_header_field(&c->at, &checked_name, &checked_value) &&
              same_text(checked_name, name) && checked_value.n == found.n &&
              !memcmp(checked_value.data, found.data, found.n);
    return c->same ? MHD_YES : MHD_NO;
}

/* Whether what the library read is what was looked at: it may have read bytes behind an earlier
 * request before anyone could look at them. */
static bool is_checked(const struct connection *c, struct MHD_Connection *mhd, const char *method,
                       const char *version)
{
    if (!c->header.n || !c->is_target_checked)
        return false;
    struct http_slice checked_method, target, name, value;
    struct comparison fields = {http_header_line(c->header.data, &checked_method, &target), true};
    MHD_get_connection_values(mhd, MHD_HEADER_KIND, compare_field, &fields);
    bool is_http_1_0 = !strcmp(version, MHD_HTTP_VERSION_1_0);
    return fields.same && !http_header_field(&fields.at, &name, &value) &&
           same_text(checked_method, method) && is_http_1_0 == c->framing.is_http_1_0;
}

void connection_check_target(struct connection *c, const char *target)
{
    struct http_slice method, checked;
    c->is_target_checked = false;
    if (c->header.n) {
        http_header_line(c->header.data, &method, &checked);
        c->is_target_checked = same_text(checked, target);
    }
}

/* The path of "http://host/path" is what follows the host. */
static const char *path_of(const char *url)
{
    static const char *const schemes[] = {"http://", "https://"};
    for (size_t i = 0; i < sizeof(schemes) / sizeof(*schemes); i++) {
        size_t n = strlen(schemes[i]);
        if (strncasecmp(url, schemes[i], n))
            continue;
        const char *slash = strchr(url + n, '/');
        return slash ? slash : "/";
    }
    return url;
}

struct http_request *request_begin(struct connection *c, struct MHD_Connection *mhd,
                                   const char *url, const char *method, const char *version)
{
    struct http_server *s = c->server;
    if (!is_checked(c, mhd, method, version) || atomic_load(&s->stopping))
        return NULL;
    struct http_request *r = calloc(1, sizeof(*r));
    if (!r)
        return NULL;
    r->server = s;
    r->mhd = c->mhd = mhd;
    r->connection = c;
    r->framing = c->framing;
    /* The library is lenient on chunk framing: nothing that follows a chunked body is trusted. */
    r->closes =
        c->has_surplus || r->framing.is_http_1_0 || r->framing.closes || r->framing.n_coding;
    c->request = r;
    bytes_free(&c->header);
    arena_init(&r->arena, ((size_t)s->options.max_body_mb << 21) + (1 << 20));
    r->method = method;
    r->path = path_of(url);
    r->key_index = API_KEYS_NONE;
    r->arrival_ns = http_now_ns();
    r->prompt_tokens = r->output_tokens = -1;
    s->n_active++;
    request_choose_id(r);
    request_admit(r);
    return r;
}

/* The body. */

enum { STATE_SLACK_BYTES = 64 << 10 };

void http_set_state_bytes(struct http_server *s, size_t n_bytes)
{
    atomic_store(&s->state_bytes, n_bytes);
}

size_t body_limit(const struct http_server *s, unsigned flags)
{
    size_t limit = (size_t)s->options.max_body_mb << 20;
    size_t state_bytes = flags & HTTP_ROUTE_STATE ? atomic_load(&s->state_bytes) : 0;
    if (state_bytes && !(flags & HTTP_ROUTE_JSON))
        return state_bytes + STATE_SLACK_BYTES;
    return limit + base64_length(state_bytes);
}

size_t body_limit_of_all(const struct http_server *s)
{
    size_t json = body_limit(s, HTTP_ROUTE_STATE | HTTP_ROUTE_JSON);
    size_t state = body_limit(s, HTTP_ROUTE_STATE);
    return json > state ? json : state;
}

/* Of the request's own route. */
static size_t limit_of(const struct http_request *r)
{
    return body_limit(r->server, r->route ? r->route->flags : 0);
}

void http_drop_body(struct http_request *r)
{
    r->server->buffered_bytes -= r->body.cap;
    bytes_free(&r->body);
}

/* Whether n bytes more fit into what all requests may hold together. */
static bool has_room(const struct http_server *s, size_t n)
{
    size_t all = (size_t)s->options.max_buffered_mb << 20;
    return s->buffered_bytes <= all && n <= all - s->buffered_bytes;
}

bool http_charge(struct http_request *r, size_t n_bytes)
{
    if (!has_room(r->server, n_bytes))
        return false;
    r->charged += n_bytes;
    r->server->buffered_bytes += n_bytes;
    return true;
}

size_t http_keep_charge(struct http_request *r)
{
    size_t n_bytes = r->charged;
    r->charged = 0;
    return n_bytes;
}

void http_uncharge(struct http_server *s, size_t n_bytes)
{
    s->buffered_bytes -= n_bytes;
}

/* Keep n more bytes, or refuse the request: the limit of one body, and of all together. */
static void keep_body(struct http_request *r, const char *data, size_t n)
{
    struct http_server *s = r->server;
    size_t limit = limit_of(r);
    size_t spare = r->body.cap - r->body.n;
    if (r->body.n + n > limit) {
        request_refuse_length(r, limit);
        return;
    }
    if (!has_room(s, n > spare ? n - spare : 0)) {
        request_refuse(r, 503, "The server is receiving as much as it can hold. Try again later.");
        return;
    }
    size_t before = r->body.cap;
    bytes_append(&r->body, data, n);
    s->buffered_bytes += r->body.cap - before;
    if (r->body.failed)
        request_refuse(r, 503, "The server is out of memory.");
}

/* False: the client sends on and on after it was refused. */
bool request_receive(struct http_request *r, const char *data, size_t n)
{
    r->n_received += n;
    if (!r->code) {
        keep_body(r, data, n);
        return true;
    }
    r->n_drained += n;
    return r->n_drained <= limit_of(r);
}

/* The end of a request. */

static void log_end(const struct http_request *r, bool gone)
{
    const char *route = r->route ? r->route->path : "other";
    metrics_count_request(r->method, route, r->code ? r->code : 499);
    metrics_observe_request(route, (double)(http_now_ns() - r->arrival_ns) * 1e-9);
    if (gone)
        metrics_add(METRIC_CLIENT_DISCONNECTS, 1);
    if (!r->server->options.access_log)
        return;
    log_request(&(struct log_access){
        .request_id = r->id,
        .method = r->method,
        .route = route,
        .client = r->connection->client,
        .status = r->code ? r->code : 499,
        .duration_ms = (double)(http_now_ns() - r->arrival_ns) * 1e-6,
        .bytes_in = r->n_received,
        .bytes_out = r->n_sent,
        .prompt_tokens = r->prompt_tokens,
        .output_tokens = r->output_tokens,
        .gone = gone,
    });
}

void request_end(struct http_request *r, bool delivered)
{
    struct http_server *s = r->server;
    if (r->on_close)
        r->on_close(r->on_close_context, delivered);
    log_end(r, !delivered);
    r->connection->request = NULL;
    s->has_half_closed |= r->connection->peer_closed;
    if (r->response)
        MHD_destroy_response(r->response);
    http_drop_body(r);
    s->buffered_bytes -= r->charged;
    arena_free(&r->arena);
    free(r);
    s->n_active--;
}

void request_resume(struct http_request *r)
{
    if (!r->suspended)
        return;
    r->suspended = false;
    r->server->has_resumed = true;
    MHD_resume_connection(r->mhd);
}

void request_cancel(struct http_request *r)
{
    r->gone = true;
    request_resume(r);
}

/* The request, as handlers see it. */

const char *http_method(const struct http_request *r)
{
    return r->method;
}

const char *http_route(const struct http_request *r)
{
    return r->route ? r->route->path : "other";
}

const char *http_param(const struct http_request *r)
{
    return r->param;
}

const char *http_query(const struct http_request *r, const char *key)
{
    return MHD_lookup_connection_value(r->mhd, MHD_GET_ARGUMENT_KIND, key);
}

const char *http_header(const struct http_request *r, const char *name)
{
    return MHD_lookup_connection_value(r->mhd, MHD_HEADER_KIND, name);
}

const char *http_body(const struct http_request *r, size_t *n)
{
    *n = r->body.n;
    return r->body.data ? r->body.data : "";
}

void http_take_body(struct http_request *r, struct bytes *out)
{
    *out = r->body;
    r->charged += r->body.cap;
    r->body = (struct bytes){0};
}

struct arena *http_arena(struct http_request *r)
{
    return &r->arena;
}

const char *http_request_id(const struct http_request *r)
{
    return r->id;
}

int http_key_index(const struct http_request *r)
{
    return r->key_index;
}

bool http_is_admin(const struct http_request *r)
{
    const struct http_server *s = r->server;
    return s->keys ? api_keys_is_admin(s->keys, r->key_index) : s->options.open_admin;
}

int64_t http_arrival_ns(const struct http_request *r)
{
    return r->arrival_ns;
}

void http_note_tokens(struct http_request *r, int64_t prompt_tokens, int64_t output_tokens)
{
    r->prompt_tokens = prompt_tokens;
    r->output_tokens = output_tokens;
}

void http_on_close(struct http_request *r, void (*fn)(void *context, bool delivered), void *context)
{
    r->on_close = fn;
    r->on_close_context = context;
}
