/* routes_sessions.c - see routes_sessions.h */
#include "server/routes_sessions.h"

#include <cjson/cJSON.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/json.h"
#include "server/call.h"

enum {
    MAX_FORKS = 64,
    MAX_LISTED = 100,
    LISTED = 20,
    MAX_METADATA = 16, /* pairs, and their lengths: OpenAI's */
    MAX_KEY = 64,
    MAX_VALUE = 512,
    MAX_IDLE_S = 365 * 86400,
};

/* ---- requests -------------------------------------------------------------------------------- */

/* Where a request is: every endpoint needs the model, and most the session that the path names. */
struct place {
    struct http_request *http;
    struct routes *routes;
    const char *id;
    int owner;
};

static bool find_place(struct http_request *http, void *context, struct place *out)
{
    struct routes *r = context;
    if (!call_model(http, r))
        return false;
    *out = (struct place){http, r, http_param(http), http_key_index(http)};
    return true;
}

static void refuse(const struct place *p, const struct error *err)
{
    http_fail(p->http, err, err->status == STATUS_NOT_FOUND ? "session_not_found" : NULL);
}

/* The body as an object whose members are all among names. */
static enum status read_body(const struct place *p, const char *const *names, cJSON **out,
                             struct error *err)
{
    size_t n;
    const char *body = http_body(p->http, &n);
    const struct json_limits limits = {.max_depth = CODEC_MAX_DEPTH, .max_values = 1000};
    enum status st = json_check(body, n, &limits, err);
    if (st)
        return st == STATUS_INVALID
                   ? fail_context(err, "We could not parse the JSON body of your request")
                   : st;
    cJSON *tree = cJSON_ParseWithLength(body, n);
    if (!tree)
        return fail(err, STATUS_NOMEM, "out of memory for the body of a request");
    if (!cJSON_IsObject(tree))
        st = fail(err, STATUS_INVALID, "The body of the request is no JSON object.");
    for (const cJSON *member = st ? NULL : tree->child; member; member = member->next) {
        const char *const *name = names;
        while (*name && strcmp(*name, member->string))
            name++;
        if (!*name) {
            struct codec_text shown = codec_clip(member->string);
            st = fail_field(err, STATUS_INVALID, member->string, "Unknown parameter: '%.*s'.",
                            (int)shown.n, shown.data);
            break;
        }
    }
    if (st)
        cJSON_Delete(tree);
    else
        *out = tree;
    return st;
}

/* The beginning of every endpoint with a body. False: it is answered. */
static bool begin(struct http_request *http, void *context, const char *const *names,
                  struct place *p, cJSON **tree)
{
    struct error err;
    if (!find_place(http, context, p))
        return false;
    if (!read_body(p, names, tree, &err))
        return true;
    refuse(p, &err);
    return false;
}

/* A whole number; `otherwise` when it is absent or null. */
static enum status read_number(const cJSON *tree, const char *name, int64_t least, int64_t most,
                               int64_t otherwise, int64_t *out, struct error *err)
{
    const cJSON *v = cJSON_GetObjectItemCaseSensitive(tree, name);
    *out = otherwise;
    if (!v || cJSON_IsNull(v))
        return STATUS_OK;
    bool good = cJSON_IsNumber(v) && v->valuedouble >= (double)least &&
                v->valuedouble <= (double)most && v->valuedouble == (double)(int64_t)v->valuedouble;
    if (!good)
        return fail_field(err, STATUS_INVALID, name,
                          "Invalid '%s': expected a whole number from %lld to %lld.", name,
                          (long long)least, (long long)most);
    *out = (int64_t)v->valuedouble;
    return STATUS_OK;
}

/* A name of a snapshot; NULL when it is absent or null. */
static enum status read_name(const cJSON *tree, const char *field, const char **out,
                             struct error *err)
{
    const cJSON *v = cJSON_GetObjectItemCaseSensitive(tree, field);
    *out = NULL;
    if (!v || cJSON_IsNull(v))
        return STATUS_OK;
    if (!cJSON_IsString(v) || !*v->valuestring || strlen(v->valuestring) >= SESSION_NAME_BYTES)
        return fail_field(err, STATUS_INVALID, field,
                          "Invalid '%s': expected a string of 1 to %d bytes.", field,
                          SESSION_NAME_BYTES - 1);
    *out = v->valuestring;
    return STATUS_OK;
}

/* The metadata as JSON text, which the caller frees; NULL when there is none. */
static enum status read_metadata(const cJSON *tree, char **out, struct error *err)
{
    const cJSON *v = cJSON_GetObjectItemCaseSensitive(tree, "metadata");
    if (!v || cJSON_IsNull(v))
        return STATUS_OK;
    bool good = cJSON_IsObject(v) && cJSON_GetArraySize(v) <= MAX_METADATA;
    for (const cJSON *item = good ? v->child : NULL; item && good; item = item->next)
        good = cJSON_IsString(item) && strlen(item->string) <= MAX_KEY &&
               strlen(item->valuestring) <= MAX_VALUE;
    if (!good)
        return fail_field(err, STATUS_INVALID, "metadata",
                          "Invalid 'metadata': expected an object of at most %d strings, keys of "
                          "at most %d and values of at most %d bytes.",
                          MAX_METADATA, MAX_KEY, MAX_VALUE);
    *out = cJSON_PrintUnformatted(v);
    return *out ? STATUS_OK : fail(err, STATUS_NOMEM, "out of memory for the metadata");
}

/* ---- replies --------------------------------------------------------------------------------- */

static void write_session(struct bytes *out, const struct routes *r,
                          const struct session_info *info)
{
    bytes_format(out,
                 "{\"id\":\"%s\",\"object\":\"session\",\"created_at\":%lld,\"last_used_at\":%lld,"
                 "\"expires_at\":",
                 info->id, (long long)info->created, (long long)info->used);
    if (info->expires)
        bytes_format(out, "%lld", (long long)info->expires);
    else
        bytes_text(out, "null");
    bytes_format(out,
                 ",\"position\":%llu,\"version\":%llu,\"state_bytes\":%zu,\"tier\":\"host\","
                 "\"in_turn\":%s,\"snapshots\":%d,\"metadata\":%s}",
                 (unsigned long long)info->position, (unsigned long long)info->version,
                 image_file_bytes(&r->images), info->in_turn ? "true" : "false", info->n_snapshots,
                 info->metadata);
}

static void set_etag(const struct place *p, const struct session_info *info)
{
    char etag[32];
    snprintf(etag, sizeof(etag), "\"%llu\"", (unsigned long long)info->version);
    http_set_header(p->http, "ETag", etag);
}

/* Ends the info. */
static void reply_session(const struct place *p, struct session_info *info)
{
    struct bytes body = {0};
    write_session(&body, p->routes, info);
    set_etag(p, info);
    session_info_free(info);
    call_reply_json(p->http, &body);
}

/* Ends the infos. */
static void reply_list(const struct place *p, struct session_info *infos, int n, bool has_more)
{
    struct bytes body = {0};
    bytes_text(&body, "{\"object\":\"list\",\"data\":[");
    for (int i = 0; i < n; i++) {
        bytes_text(&body, i ? "," : "");
        write_session(&body, p->routes, &infos[i]);
    }
    if (n)
        bytes_format(&body, "],\"first_id\":\"%s\",\"last_id\":\"%s\"", infos[0].id,
                     infos[n - 1].id);
    else
        bytes_text(&body, "],\"first_id\":null,\"last_id\":null");
    bytes_format(&body, ",\"has_more\":%s}", has_more ? "true" : "false");
    for (int i = 0; i < n; i++)
        session_info_free(&infos[i]);
    call_reply_json(p->http, &body);
}

static void write_snapshot(struct bytes *out, const struct session_snapshot *s)
{
    bytes_text(out, "{\"object\":\"session.snapshot\",\"name\":");
    bytes_json_string(out, s->name, strlen(s->name));
    bytes_format(out, ",\"position\":%llu,\"created_at\":%lld}", (unsigned long long)s->position,
                 (long long)s->created);
}

/* ---- sessions -------------------------------------------------------------------------------- */

void sessions_post(struct http_request *http, void *context)
{
    static const char *const names[] = {"metadata", "idle_ttl", NULL};
    struct place p;
    struct error err;
    struct session_info info;
    cJSON *tree = NULL;
    char *metadata = NULL;
    if (!begin(http, context, names, &p, &tree))
        return;
    struct session_request request = {.owner = p.owner};
    enum status st = read_metadata(tree, &metadata, &err);
    if (!st)
        st = read_number(tree, "idle_ttl", 1, MAX_IDLE_S, 0, &request.idle_s, &err);
    request.metadata = metadata;
    if (!st)
        st = session_create(p.routes->sessions, &request, &info, &err);
    cJSON_free(metadata);
    cJSON_Delete(tree);
    if (st)
        refuse(&p, &err);
    else
        reply_session(&p, &info);
}

void sessions_list(struct http_request *http, void *context)
{
    struct place p;
    struct error err;
    struct session_info infos[MAX_LISTED];
    int n = 0;
    bool has_more = false;
    if (!find_place(http, context, &p))
        return;
    const char *limit = http_query(http, "limit");
    char *end = NULL;
    long max = limit ? strtol(limit, &end, 10) : LISTED;
    enum status st = STATUS_OK;
    if (limit && (!*limit || *end || max < 1 || max > MAX_LISTED))
        st = fail_field(&err, STATUS_INVALID, "limit",
                        "Invalid 'limit': expected a whole number from 1 to %d.", MAX_LISTED);
    if (!st)
        st = session_list(p.routes->sessions, p.owner, http_query(http, "after"), infos, (int)max,
                          &n, &has_more, &err);
    if (st)
        refuse(&p, &err);
    else
        reply_list(&p, infos, n, has_more);
}

void session_get(struct http_request *http, void *context)
{
    struct place p;
    struct error err;
    struct session_info info;
    if (!find_place(http, context, &p))
        return;
    if (session_show(p.routes->sessions, p.id, p.owner, &info, &err))
        refuse(&p, &err);
    else
        reply_session(&p, &info);
}

void session_remove(struct http_request *http, void *context)
{
    struct place p;
    struct error err;
    if (!find_place(http, context, &p))
        return;
    if (session_delete(p.routes->sessions, p.id, p.owner, &err)) {
        refuse(&p, &err);
        return;
    }
    struct bytes body = {0};
    bytes_text(&body, "{\"id\":");
    bytes_json_string(&body, p.id, strlen(p.id));
    bytes_text(&body, ",\"object\":\"session.deleted\",\"deleted\":true}");
    call_reply_json(http, &body);
}

/* ---- forks, snapshots, rollback -------------------------------------------------------------- */

/* All children or none. */
static enum status fork_session(const struct place *p, struct session_info *children, int n,
                                struct error *err)
{
    struct session_info parent;
    struct image *image = NULL;
    int made = 0;
    enum status st = session_image(p->routes->sessions, p->id, p->owner, &image, &parent, err);
    if (st)
        return st;
    struct session_request request = {
        .owner = p->owner, .from = image, .metadata = parent.metadata};
    while (!st && made < n) {
        st = session_create(p->routes->sessions, &request, &children[made], err);
        made += !st;
    }
    image_release(image);
    session_info_free(&parent);
    while (st && made--) {
        struct error ignored;
        session_delete(p->routes->sessions, children[made].id, p->owner, &ignored);
        session_info_free(&children[made]);
    }
    return st;
}

void session_post_fork(struct http_request *http, void *context)
{
    static const char *const names[] = {"n", NULL};
    struct place p;
    struct error err;
    struct session_info children[MAX_FORKS];
    cJSON *tree = NULL;
    int64_t n = 1;
    if (!begin(http, context, names, &p, &tree))
        return;
    enum status st = read_number(tree, "n", 1, MAX_FORKS, 1, &n, &err);
    cJSON_Delete(tree);
    if (!st)
        st = fork_session(&p, children, (int)n, &err);
    if (st)
        refuse(&p, &err);
    else
        reply_list(&p, children, (int)n, false);
}

void session_post_snapshot(struct http_request *http, void *context)
{
    static const char *const names[] = {"name", NULL};
    struct place p;
    struct error err;
    struct session_snapshot snapshot;
    const char *name = NULL;
    cJSON *tree = NULL;
    if (!begin(http, context, names, &p, &tree))
        return;
    enum status st = read_name(tree, "name", &name, &err);
    if (!st && !name)
        st = fail_field(&err, STATUS_INVALID, "name", "Missing required parameter: 'name'.");
    if (!st)
        st = session_keep(p.routes->sessions, p.id, p.owner, name, &snapshot, &err);
    cJSON_Delete(tree);
    if (st) {
        refuse(&p, &err);
        return;
    }
    struct bytes body = {0};
    write_snapshot(&body, &snapshot);
    call_reply_json(http, &body);
}

void session_get_snapshots(struct http_request *http, void *context)
{
    struct place p;
    struct error err;
    struct session_snapshot list[SESSION_MAX_SNAPSHOTS];
    int n = 0;
    if (!find_place(http, context, &p))
        return;
    if (session_snapshots(p.routes->sessions, p.id, p.owner, list, &n, &err)) {
        refuse(&p, &err);
        return;
    }
    struct bytes body = {0};
    bytes_text(&body, "{\"object\":\"list\",\"data\":[");
    for (int i = 0; i < n; i++) {
        bytes_text(&body, i ? "," : "");
        write_snapshot(&body, &list[i]);
    }
    bytes_text(&body, "]}");
    call_reply_json(http, &body);
}

void session_post_rollback(struct http_request *http, void *context)
{
    static const char *const names[] = {"snapshot", NULL};
    struct place p;
    struct error err;
    struct session_info info;
    const char *name = NULL;
    cJSON *tree = NULL;
    if (!begin(http, context, names, &p, &tree))
        return;
    enum status st = read_name(tree, "snapshot", &name, &err);
    if (!st)
        st = session_rollback(p.routes->sessions, p.id, p.owner, name, &info, &err);
    cJSON_Delete(tree);
    if (st)
        refuse(&p, &err);
    else
        reply_session(&p, &info);
}

/* ---- states ---------------------------------------------------------------------------------- */

void session_get_state(struct http_request *http, void *context)
{
    struct place p;
    struct error err;
    struct session_info info;
    struct image *image = NULL;
    if (!find_place(http, context, &p))
        return;
    enum status st = session_image(p.routes->sessions, p.id, p.owner, &image, &info, &err);
    if (st) {
        refuse(&p, &err);
        return;
    }
    struct bytes body = {0};
    set_etag(&p, &info);
    session_info_free(&info);
    if (image)
        image_write(image, &body);
    image_release(image);
    if (body.failed) {
        bytes_free(&body);
        call_refuse(http, STATUS_NOMEM, "out of memory for the state of a session");
    } else if (!body.n) {
        fail(&err, STATUS_NOT_FOUND, "Session '%.64s' has no state yet: it has no tokens.", p.id);
        http_fail(http, &err, NULL);
    } else {
        http_reply_take(http, 200, "application/octet-stream", &body);
    }
}

void session_put_state(struct http_request *http, void *context)
{
    struct place p;
    struct error err;
    struct session_info info;
    struct image *image = NULL;
    int64_t version;
    size_t n;
    if (!find_place(http, context, &p))
        return;
    const char *body = http_body(http, &n);
    enum status st = call_if_match(http, &version, &err);
    if (!st)
        st = session_show(p.routes->sessions, p.id, p.owner, &info, &err);
    if (!st) {
        session_info_free(&info);
        st = image_parse(&image, &p.routes->images, body, n, &err);
    }
    if (!st)
        st = session_replace(p.routes->sessions, p.id, p.owner, version, image, &info, &err);
    image_release(image);
    if (st)
        refuse(&p, &err);
    else
        reply_session(&p, &info);
}
