/* routes_sessions.c - see routes_sessions.h */
#include "server/routes_sessions.h"

#include <cjson/cJSON.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "server/call.h"
#include "server/refresh.h"
#include "server/request_json.h"

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
    const char *code =
        !strcmp(err->field, "from.preset") ? "preset_not_found" : "session_not_found";
    http_fail(p->http, err, err->status == STATUS_NOT_FOUND ? code : NULL);
}

/* The beginning of every endpoint with a body. False: it is answered. */
static bool begin(struct http_request *http, void *context, const char *const *names,
                  struct place *p, cJSON **tree)
{
    struct error err;
    if (!find_place(http, context, p))
        return false;
    if (!request_json_read(http, names, tree, &err))
        return true;
    refuse(p, &err);
    return false;
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

static const char *const tier_names[] = {
    [IMAGE_ON_DEVICE] = "device",
    [IMAGE_IN_MEMORY] = "host",
    [IMAGE_IN_STORE] = "store",
};

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
                 ",\"position\":%llu,\"version\":%llu,\"state_bytes\":%zu,\"tier\":\"%s\","
                 "\"in_turn\":%s,\"snapshots\":%d,\"metadata\":%s}",
                 (unsigned long long)info->position, (unsigned long long)info->version,
                 image_file_bytes(&r->storage.images), tier_names[info->tier],
                 info->in_turn ? "true" : "false", info->n_snapshots,
                 info->metadata ? info->metadata : "{}");
}

static void set_etag(const struct place *p, const struct session_info *info)
{
    char etag[32];
    snprintf(etag, sizeof(etag), "\"%llu\"", (unsigned long long)info->version);
    http_set_header(p->http, "ETag", etag);
}

static void reply_session(const struct place *p, const struct session_info *info)
{
    struct bytes body = {0};
    write_session(&body, p->routes, info);
    set_etag(p, info);
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

/* ---- errands ---------------------------------------------------------------------------------
 *
 * What is not done at once: a change that waits for the journal, a state that is read or written
 * on a worker. The request may be over before. */

struct errand {
    struct work_item item; /* first: a worker hands it back */
    struct place place;    /* http is NULL once the request is over */
    char id[SESSION_ID_BYTES];
    bool deferred, working;
    int n_waiting; /* outcomes to come */
    struct error error;

    struct image *image; /* of a fork: kept; of a state: held; owned */
    struct session_info info;
    int64_t version;
    char *body; /* [n_body] of an import, for the worker */
    size_t n_body;
    struct bytes reply;
    struct session_info *children; /* [n_children], of a fork */
    int n_children, n_made;
    bool has_more; /* of a list, whose sessions are the children */
};

static void errand_free(struct errand *e)
{
    for (int i = 0; i < e->n_made; i++)
        session_info_free(&e->children[i]);
    session_info_free(&e->info);
    bytes_free(&e->reply);
    free(e->children);
    free(e->body);
    free(e);
}

static void errand_on_close(void *context, bool delivered)
{
    (void)delivered;
    struct errand *e = context;
    e->place.http = NULL;
    if (!e->working && !e->n_waiting)
        errand_free(e);
}

/* NULL: it is answered. */
static struct errand *errand_new(const struct place *p)
{
    struct errand *e = calloc(1, sizeof(*e));
    if (!e) {
        call_refuse(p->http, STATUS_NOMEM, "out of memory for a request");
        return NULL;
    }
    e->place = *p;
    snprintf(e->id, sizeof(e->id), "%s", p->id ? p->id : "");
    e->place.id = e->id;
    http_on_close(p->http, errand_on_close, e);
    return e;
}

/* The same for what is about a session as it is: at the version that If-Match names, if any. */
static struct errand *errand_new_if_match(const struct place *p)
{
    int64_t version;
    struct error err;
    if (call_if_match(p->http, &version, &err)) {
        refuse(p, &err);
        return NULL;
    }
    struct errand *e = errand_new(p);
    if (e)
        e->version = version;
    return e;
}

/* An errand that is over, or goes on without its request, has its last words in here. */
static void errand_wait(struct errand *e)
{
    if ((e->n_waiting || e->working) && !e->deferred) {
        e->deferred = true;
        http_defer(e->place.http);
    }
}

static void errand_work(struct errand *e, void (*run)(struct work_item *),
                        void (*done)(struct work_item *))
{
    e->item = (struct work_item){.run = run, .done = done};
    e->working = true;
    errand_wait(e);
    workers_submit(e->place.routes->workers, &e->item);
}

/* One outcome has come. False: there is nobody to tell, and the errand is gone. */
static bool errand_goes_on(struct errand *e)
{
    e->n_waiting--;
    if (!e->place.http && !e->n_waiting && !e->working) {
        errand_free(e);
        return false;
    }
    return e->place.http != NULL;
}

static void on_session(void *context, const struct session_outcome *outcome)
{
    struct errand *e = context;
    if (!errand_goes_on(e))
        return;
    if (outcome->error.status)
        refuse(&e->place, &outcome->error);
    else
        reply_session(&e->place, &outcome->info);
}

static void on_deleted(void *context, const struct session_outcome *outcome)
{
    struct errand *e = context;
    if (!errand_goes_on(e))
        return;
    if (outcome->error.status) {
        refuse(&e->place, &outcome->error);
        return;
    }
    struct bytes body = {0};
    bytes_text(&body, "{\"id\":");
    bytes_json_string(&body, e->id, strlen(e->id));
    bytes_text(&body, ",\"object\":\"session.deleted\",\"deleted\":true}");
    call_reply_json(e->place.http, &body);
}

static void on_snapshot(void *context, const struct session_outcome *outcome)
{
    struct errand *e = context;
    if (!errand_goes_on(e))
        return;
    if (outcome->error.status) {
        refuse(&e->place, &outcome->error);
        return;
    }
    struct bytes body = {0};
    write_snapshot(&body, &outcome->snapshot);
    call_reply_json(e->place.http, &body);
}

/* After a change was handed in with this errand as its context: refused, done, or waiting. The
 * count went up before, since it may be done in the call. */
static void errand_handed_in(struct errand *e, enum status st, const struct error *err)
{
    if (!st) {
        if (e->place.http)
            errand_wait(e);
        return;
    }
    e->n_waiting--;
    refuse(&e->place, err);
}

/* ---- sessions -------------------------------------------------------------------------------- */

/* The image that a new session begins with, kept; NULL: before any token. */
static enum status read_from(const struct place *p, const cJSON *tree, struct image **out,
                             struct error *err)
{
    static const char *const names[] = {"preset", "session", "snapshot", NULL};
    const cJSON *from = cJSON_GetObjectItemCaseSensitive(tree, "from");
    if (!from || cJSON_IsNull(from))
        return STATUS_OK;
    if (!cJSON_IsObject(from))
        return fail_field(err, STATUS_INVALID, "from", "Invalid 'from': expected an object.");
    enum status st = request_json_members(from, "from", names, err);
    return st ? st : request_json_image(p->routes, from, "from", p->owner, out, err);
}

static const char *const new_names[] = {"metadata", "idle_ttl", "from", NULL};

static void post_session(struct http_request *http, void *context)
{
    struct place p;
    struct error err;
    cJSON *tree = NULL;
    char *metadata = NULL;
    struct image *image = NULL;
    if (!begin(http, context, new_names, &p, &tree))
        return;
    struct session_request request = {.owner = p.owner};
    enum status st = read_metadata(tree, &metadata, &err);
    if (!st)
        st = request_json_number(tree, "idle_ttl", 1, MAX_IDLE_S, 0, &request.idle_s, &err);
    if (!st)
        st = read_from(&p, tree, &image, &err);
    request.metadata = metadata;
    request.from = image;
    struct errand *e = st ? NULL : errand_new(&p);
    if (st)
        refuse(&p, &err);
    if (e) {
        e->n_waiting = 1;
        st = session_create(p.routes->storage.sessions, &request, on_session, e, &err);
        errand_handed_in(e, st, &err);
    }
    image_drop(image);
    cJSON_free(metadata);
    cJSON_Delete(tree);
}

void sessions_post(struct http_request *http, void *context)
{
    struct error ignored; /* it is found again, and told, when the body is read for good */
    cJSON *tree = NULL;
    const cJSON *id = NULL;
    if (refresh_asks(context) && !request_json_read(http, new_names, &tree, &ignored))
        id = cJSON_GetObjectItemCaseSensitive(cJSON_GetObjectItemCaseSensitive(tree, "from"),
                                              "session");
    refresh_then(http, context, cJSON_IsString(id) ? id->valuestring : NULL, post_session);
    cJSON_Delete(tree);
}

/* In a shared store, where a list is asked for on a worker. */
static void list_shared(struct work_item *item)
{
    struct errand *e = (struct errand *)item;
    struct error err;
    if (session_list(e->place.routes->storage.sessions, e->place.owner, *e->id ? e->id : NULL,
                     e->children, e->n_children, &e->n_made, &e->has_more, &err))
        e->error = err;
}

static void on_listed(struct work_item *item)
{
    struct errand *e = (struct errand *)item;
    int n = e->n_made;
    e->working = false;
    if (!e->place.http) {
        errand_free(e);
        return;
    }
    e->n_made = 0;
    if (e->error.status)
        refuse(&e->place, &e->error);
    else
        reply_list(&e->place, e->children, n, e->has_more);
}

static void list_by_worker(const struct place *p, const char *after, int max)
{
    struct errand *e = errand_new(p);
    if (!e)
        return;
    snprintf(e->id, sizeof(e->id), "%s", after ? after : "");
    e->n_children = max;
    e->children = calloc((size_t)max, sizeof(*e->children));
    if (e->children)
        errand_work(e, list_shared, on_listed);
    else
        call_refuse(p->http, STATUS_NOMEM, "out of memory for a list of sessions");
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
    const char *after = http_query(http, "after");
    bool is_id = !after || strlen(after) < SESSION_ID_BYTES;
    const char *limit = http_query(http, "limit");
    char *end = NULL;
    long max = limit ? strtol(limit, &end, 10) : LISTED;
    enum status st = STATUS_OK;
    if (limit && (!*limit || *end || max < 1 || max > MAX_LISTED))
        st = fail_field(&err, STATUS_INVALID, "limit",
                        "Invalid 'limit': expected a whole number from 1 to %d.", MAX_LISTED);
    if (!st && is_id && sessions_are_shared(p.routes->storage.sessions)) {
        list_by_worker(&p, after, (int)max);
        return;
    }
    if (!st)
        st = session_list(p.routes->storage.sessions, p.owner, after, infos, (int)max, &n,
                          &has_more, &err);
    if (st)
        refuse(&p, &err);
    else
        reply_list(&p, infos, n, has_more);
}

static void show(struct http_request *http, void *context)
{
    struct place p;
    struct error err;
    struct session_info info = {0};
    if (!find_place(http, context, &p))
        return;
    if (session_show(p.routes->storage.sessions, p.id, p.owner, &info, &err))
        refuse(&p, &err);
    else
        reply_session(&p, &info);
    session_info_free(&info);
}

static void remove_session(struct http_request *http, void *context)
{
    struct place p;
    struct error err;
    struct errand *e = find_place(http, context, &p) ? errand_new_if_match(&p) : NULL;
    if (!e)
        return;
    e->n_waiting = 1;
    enum status st =
        session_delete(p.routes->storage.sessions, e->id, p.owner, e->version, on_deleted, e, &err);
    errand_handed_in(e, st, &err);
}

/* ---- forks, snapshots, rollback -------------------------------------------------------------- */

static void on_forked(void *context, const struct session_outcome *outcome);

/* All children or none: those that were made go again. */
static void end_fork(struct errand *e)
{
    struct error ignored;
    if (!e->error.status) {
        int n = e->n_made;
        e->n_made = 0;
        reply_list(&e->place, e->children, n, false);
        return;
    }
    for (int i = 0; i < e->n_made; i++)
        session_delete(e->place.routes->storage.sessions, e->children[i].id, e->place.owner,
                       SESSION_ANY_VERSION, NULL, NULL, &ignored);
    refuse(&e->place, &e->error);
}

static void on_forked(void *context, const struct session_outcome *outcome)
{
    struct errand *e = context;
    if (outcome->error.status) {
        e->error = outcome->error;
    } else {
        struct session_info *child = &e->children[e->n_made++];
        *child = outcome->info;
        child->metadata = outcome->info.metadata ? strdup(outcome->info.metadata) : NULL;
    }
    if (errand_goes_on(e) && !e->n_waiting)
        end_fork(e);
}

/* One outcome more is awaited than there are children, until all are handed in. */
static enum status fork_session(struct errand *e, struct error *err)
{
    const struct place *p = &e->place;
    struct session_info parent;
    struct image *image = NULL;
    enum status st = session_image(p->routes->storage.sessions, e->id, p->owner, e->version, &image,
                                   &parent, err);
    if (st)
        return st;
    e->children = calloc((size_t)e->n_children, sizeof(*e->children));
    if (!e->children)
        st = fail(err, STATUS_NOMEM, "out of memory for the forks of a session");
    struct session_request request = {
        .owner = p->owner, .from = image, .metadata = parent.metadata};
    for (int i = 0; i < e->n_children && !st; i++) {
        e->n_waiting++;
        st = session_create(p->routes->storage.sessions, &request, on_forked, e, err);
        e->n_waiting -= st != STATUS_OK;
    }
    image_drop(image);
    session_info_free(&parent);
    return st;
}

static void post_fork(struct http_request *http, void *context)
{
    static const char *const names[] = {"n", NULL};
    struct place p;
    struct error err;
    cJSON *tree = NULL;
    int64_t n = 1;
    if (!begin(http, context, names, &p, &tree))
        return;
    enum status st = request_json_number(tree, "n", 1, MAX_FORKS, 1, &n, &err);
    cJSON_Delete(tree);
    if (st)
        refuse(&p, &err);
    struct errand *e = st ? NULL : errand_new_if_match(&p);
    if (!e)
        return;
    e->n_children = (int)n;
    e->n_waiting = 1; /* this function's own */
    st = fork_session(e, &err);
    if (st)
        e->error = err;
    e->n_waiting--;
    if (e->n_waiting)
        errand_wait(e);
    else
        end_fork(e);
}

static void post_snapshot(struct http_request *http, void *context)
{
    static const char *const names[] = {"name", NULL};
    struct place p;
    struct error err;
    const char *name = NULL;
    cJSON *tree = NULL;
    if (!begin(http, context, names, &p, &tree))
        return;
    enum status st = request_json_name(tree, "", "name", &name, &err);
    if (!st && !name)
        st = fail_field(&err, STATUS_INVALID, "name", "Missing required parameter: 'name'.");
    struct errand *e = st ? NULL : errand_new_if_match(&p);
    if (st)
        refuse(&p, &err);
    if (e) {
        e->n_waiting = 1;
        st = session_keep(p.routes->storage.sessions, e->id, p.owner, e->version, name, on_snapshot,
                          e, &err);
        errand_handed_in(e, st, &err);
    }
    cJSON_Delete(tree);
}

static void get_snapshots(struct http_request *http, void *context)
{
    struct place p;
    struct error err;
    struct session_snapshot list[SESSION_MAX_SNAPSHOTS];
    int n = 0;
    if (!find_place(http, context, &p))
        return;
    if (session_snapshots(p.routes->storage.sessions, p.id, p.owner, list, &n, &err)) {
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

static void post_rollback(struct http_request *http, void *context)
{
    static const char *const names[] = {"snapshot", NULL};
    struct place p;
    struct error err;
    const char *name = NULL;
    cJSON *tree = NULL;
    if (!begin(http, context, names, &p, &tree))
        return;
    enum status st = request_json_name(tree, "", "snapshot", &name, &err);
    struct errand *e = st ? NULL : errand_new_if_match(&p);
    if (st)
        refuse(&p, &err);
    if (e) {
        e->n_waiting = 1;
        st = session_rollback(p.routes->storage.sessions, e->id, p.owner, e->version, name,
                              on_session, e, &err);
        errand_handed_in(e, st, &err);
    }
    cJSON_Delete(tree);
}

/* ---- states ---------------------------------------------------------------------------------- */

static void write_state(struct work_item *item)
{
    struct errand *e = (struct errand *)item;
    struct storage *storage = &e->place.routes->storage;
    const struct served_model *model = atomic_load(&e->place.routes->model);
    struct error *err = &e->error;
    if (state_store_hold(storage->store, model->engine, e->image, err)) {
        if (err->status == STATUS_LOST)
            fail_context(err, "Session '%s' cannot be read from the store", e->id);
    } else {
        image_write(e->image, &e->reply);
        image_release(e->image);
    }
    image_drop(e->image);
    e->image = NULL;
}

static void on_state_written(struct work_item *item)
{
    struct errand *e = (struct errand *)item;
    e->working = false;
    if (!e->place.http) {
        errand_free(e);
    } else if (e->error.status) {
        refuse(&e->place, &e->error);
    } else if (e->reply.failed) {
        call_refuse(e->place.http, STATUS_NOMEM, "out of memory for the state of a session");
    } else {
        set_etag(&e->place, &e->info);
        http_reply_take(e->place.http, 200, "application/octet-stream", &e->reply);
    }
}

static void get_state(struct http_request *http, void *context)
{
    struct place p;
    struct error err;
    struct errand *e = find_place(http, context, &p) ? errand_new_if_match(&p) : NULL;
    if (!e)
        return;
    enum status st = session_image(p.routes->storage.sessions, e->id, p.owner, e->version,
                                   &e->image, &e->info, &err);
    if (st) {
        refuse(&p, &err);
    } else if (!e->image) {
        fail(&err, STATUS_NOT_FOUND, "Session '%.64s' has no state yet: it has no tokens.", e->id);
        http_fail(http, &err, NULL);
    } else {
        errand_work(e, write_state, on_state_written);
    }
}

/* The state is in the store before the session says that it is its own. */
static void read_state(struct work_item *item)
{
    struct errand *e = (struct errand *)item;
    struct storage *storage = &e->place.routes->storage;
    enum status st =
        image_parse(&e->image, &storage->images, e->body, e->n_body, STORAGE_WAIT_MS, &e->error);
    if (!st && state_store_secure(storage->store, e->image, &e->error)) {
        image_release(e->image);
        e->image = NULL;
    }
    free(e->body);
    e->body = NULL;
}

static void on_state_read(struct work_item *item)
{
    struct errand *e = (struct errand *)item;
    struct error err = e->error;
    enum status st = err.status;
    e->working = false;
    if (!e->place.http) {
        image_release(e->image);
        errand_free(e);
        return;
    }
    struct image *image = e->image; /* the errand may be gone after the call */
    e->image = NULL;
    e->n_waiting = 1;
    if (!st)
        st = session_replace(e->place.routes->storage.sessions, e->id, e->place.owner, e->version,
                             image, on_session, e, &err);
    errand_handed_in(e, st, &err);
    image_release(image);
}

static void put_state(struct http_request *http, void *context)
{
    struct place p;
    struct error err;
    struct errand *e = find_place(http, context, &p) ? errand_new_if_match(&p) : NULL;
    if (!e)
        return;
    const char *body = http_body(http, &e->n_body);
    enum status st = session_show(p.routes->storage.sessions, e->id, p.owner, &e->info, &err);
    if (!st && !(e->body = malloc(e->n_body ? e->n_body : 1)))
        st = fail(&err, STATUS_NOMEM, "out of memory for the state of a session");
    if (st) {
        refuse(&p, &err);
        return;
    }
    if (e->n_body)
        memcpy(e->body, body, e->n_body);
    http_drop_body(http);
    errand_work(e, read_state, on_state_read);
}

/* ---- in a shared store other servers may have been there before -------------------------------
 */

#define REFRESHED(name, then)                                                                      \
    void name(struct http_request *http, void *context)                                            \
    {                                                                                              \
        refresh_then(http, context, http_param(http), then);                                       \
    }
REFRESHED(session_get, show)
REFRESHED(session_remove, remove_session)
REFRESHED(session_post_fork, post_fork)
REFRESHED(session_post_snapshot, post_snapshot)
REFRESHED(session_get_snapshots, get_snapshots)
REFRESHED(session_post_rollback, post_rollback)
REFRESHED(session_get_state, get_state)
REFRESHED(session_put_state, put_state)
