/* http_admit.c - what the header of a request decides before its body is read: its id, its
 * route, and the refusals 401, 404, 405, 411, 413 and 415; OPTIONS is answered here. */
#include <stdio.h>
#include <string.h>
#include <strings.h>

#include "server/http_private.h"

static bool is_sane_id(const char *id)
{
    size_t n = strlen(id);
    for (size_t i = 0; i < n; i++) {
        bool ok = (id[i] >= '0' && id[i] <= '9') || (id[i] >= 'a' && id[i] <= 'z') ||
                  (id[i] >= 'A' && id[i] <= 'Z') || strchr("-_.", id[i]);
        if (!ok)
            return false;
    }
    return n > 0 && n < REQUEST_ID_BYTES;
}

/* The client's own id when it is harmless in a log; else one of ours, that none can guess the
 * next of: a counter run through a 64-bit mix. */
void request_choose_id(struct http_request *r)
{
    const char *given = http_header(r, "X-Request-Id");
    if (given && is_sane_id(given)) {
        snprintf(r->id, sizeof(r->id), "%s", given);
        return;
    }
    struct http_server *s = r->server;
    uint64_t x = s->id_seed + ++s->n_requests * 0x9E3779B97F4A7C15ull;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    snprintf(r->id, sizeof(r->id), "req_%016llx%08llx", (unsigned long long)(x ^ (x >> 31)),
             (unsigned long long)(s->n_requests & 0xFFFFFFFF));
}

static bool is_json_type(const char *type)
{
    /* curl -d says "form" of anything; nobody sends a form here. */
    static const char *const accepted[] = {"application/json", "application/x-www-form-urlencoded",
                                           "text/json"};
    if (!type)
        return true;
    size_t n = strcspn(type, "; \t");
    for (size_t i = 0; i < sizeof(accepted) / sizeof(*accepted); i++) {
        if (strlen(accepted[i]) == n && !strncasecmp(type, accepted[i], n))
            return true;
    }
    return n > 17 && !strncasecmp(type, "application/", 12) &&
           !strncasecmp(type + n - 5, "+json", 5);
}

static bool is_utf8_charset(const char *type)
{
    const char *charset = type ? strcasestr(type, "charset=") : NULL;
    if (!charset)
        return true;
    charset += 8;
    charset += *charset == '"';
    return !strncasecmp(charset, "utf-8", 5) || !strncasecmp(charset, "us-ascii", 8);
}

static void check_json_body(struct http_request *r)
{
    const char *type = http_header(r, "Content-Type");
    const char *coding = http_header(r, "Content-Encoding");
    if (!r->framing.n_length && !r->framing.n_coding)
        request_refuse(r, 411,
                       "The request has no body: send JSON with Content-Length, or chunked.");
    else if (!is_json_type(type) || !is_utf8_charset(type))
        request_refuse(r, 415, "The body must be JSON in UTF-8: Content-Type: application/json.");
    else if (coding && strcasecmp(coding, "identity"))
        request_refuse(r, 415,
                       "The body must not be compressed: no Content-Encoding is supported.");
}

static void check_length(struct http_request *r)
{
    size_t limit = body_limit(r->server, r->route->flags);
    if (r->framing.length > 0 && (uint64_t)r->framing.length > limit)
        request_refuse_length(r, limit);
}

static void check_key(struct http_request *r)
{
    struct api_keys *keys = r->server->keys;
    if (!keys)
        return;
    const char *authorization = http_header(r, "Authorization");
    r->key_index = api_keys_find(keys, authorization);
    if (r->key_index != API_KEYS_NONE || (r->route->flags & HTTP_ROUTE_OPEN))
        return;
    http_set_header(r, "WWW-Authenticate", "Bearer realm=\"latte-server\"");
    if (authorization)
        request_refuse(r, 401, "Incorrect API key provided.");
    else
        request_refuse(r, 401,
                       "You didn't provide an API key. Send it in an Authorization header: "
                       "Authorization: Bearer YOUR_KEY.");
}

static void refuse_method(struct http_request *r)
{
    struct bytes allow = {0};
    const struct http_config *config = &r->server->config;
    route_allow(config->routes, config->n_routes, r->path, &allow);
    http_set_header(r, "Allow", allow.data ? allow.data : "OPTIONS");
    bytes_free(&allow);
    char message[160];
    snprintf(message, sizeof(message), "Not allowed to %.32s on %.96s.", r->method, r->path);
    request_refuse(r, 405, message);
}

/* A browser asks before it sends; without --cors-origin it gets no permission. */
static void reply_options(struct http_request *r)
{
    struct bytes allow = {0};
    const struct http_config *config = &r->server->config;
    route_allow(config->routes, config->n_routes, r->path, &allow);
    const char *methods = allow.data ? allow.data : "OPTIONS";
    http_set_header(r, "Allow", methods);
    if (r->server->options.cors_origin) {
        const char *wanted = http_header(r, "Access-Control-Request-Headers");
        http_set_header(r, "Access-Control-Allow-Methods", methods);
        http_set_header(r, "Access-Control-Allow-Headers",
                        wanted ? wanted : "Authorization, Content-Type");
        http_set_header(r, "Access-Control-Max-Age", "600");
    }
    bytes_free(&allow);
    http_reply(r, 204, NULL, "", 0);
}

/* Find the route and refuse what can be refused by the header alone. */
void request_admit(struct http_request *r)
{
    const struct http_config *config = &r->server->config;
    struct route_match found = route_find(config->routes, config->n_routes, r->method, r->path);
    r->route = found.route;
    char message[160];
    if (found.param && !(r->param = arena_copy(&r->arena, found.param, found.n_param))) {
        request_refuse(r, 503, "out of memory for a request");
        return;
    }
    if (!found.path_exists) {
        snprintf(message, sizeof(message), "Invalid URL (%.32s %.96s)", r->method, r->path);
        request_refuse(r, 404, message);
    } else if (!strcmp(r->method, "OPTIONS")) {
        reply_options(r);
    } else if (!found.route) {
        refuse_method(r);
    } else {
        check_key(r);
        if (!r->code)
            check_length(r);
        if (!r->code && (found.route->flags & HTTP_ROUTE_JSON))
            check_json_body(r);
    }
}

int http_n_keys(const struct http_server *s)
{
    return s->keys ? api_keys_count(s->keys) : 0;
}

void http_tag_key(const struct http_server *s, int key_index,
                  const uint8_t secret[HTTP_TAG_SECRET_BYTES], uint8_t out[HTTP_TAG_BYTES])
{
    api_keys_tag(s->keys, key_index, secret, HTTP_TAG_SECRET_BYTES, out);
}
