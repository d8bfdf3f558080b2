/* routes_presets.c - see routes_presets.h */
#include "server/routes_presets.h"

#include <cjson/cJSON.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/file.h"
#include "server/call.h"
#include "server/log.h"
#include "server/refresh.h"
#include "server/request_json.h"
#include "server/state_io.h"

/* ---- replies ----------------------------------------------------------------------------------
 */

static void write_preset(struct bytes *out, const struct routes *r, const struct preset_info *info)
{
    bytes_format(out,
                 "{\"object\":\"preset\",\"name\":\"%s\",\"position\":%llu,\"state_bytes\":%zu,"
                 "\"created_at\":%lld,\"fixed\":%s}",
                 info->name, (unsigned long long)info->position,
                 image_file_bytes(&r->storage.images), (long long)info->created,
                 info->is_fixed ? "true" : "false");
}

static void refuse(struct http_request *http, const struct error *err)
{
    const char *code = NULL;
    if (err->status == STATUS_NOT_FOUND)
        code = strcmp(err->field, "preset") ? "session_not_found" : "preset_not_found";
    http_fail(http, err, code);
}

static void reply_preset(struct http_request *http, const struct routes *r,
                         const struct preset_info *info)
{
    struct bytes body = {0};
    write_preset(&body, r, info);
    call_reply_json(http, &body);
}

/* ---- reading ----------------------------------------------------------------------------------
 */

void presets_get_list(struct http_request *http, void *context)
{
    struct routes *r = context;
    struct preset_info *list = NULL;
    struct error err;
    int n = 0;
    if (!call_model(http, r))
        return;
    if (presets_list(r->presets, &list, &n, &err)) {
        http_fail(http, &err, NULL);
        return;
    }
    struct bytes body = {0};
    bytes_text(&body, "{\"object\":\"list\",\"data\":[");
    for (int i = 0; i < n; i++) {
        bytes_text(&body, i ? "," : "");
        write_preset(&body, r, &list[i]);
    }
    bytes_text(&body, "]}");
    free(list);
    call_reply_json(http, &body);
}

void preset_get(struct http_request *http, void *context)
{
    struct routes *r = context;
    struct preset_info info;
    struct error err;
    if (!call_model(http, r))
        return;
    if (presets_find(r->presets, http_param(http), NULL, &info, &err))
        refuse(http, &err);
    else
        reply_preset(http, r, &info);
}

/* ---- saving and deleting -----------------------------------------------------------------------
 */

/* False: it is answered. */
static bool begin_change(struct http_request *http, struct routes *r)
{
    if (!call_model(http, r))
        return false;
    if (http_is_admin(http))
        return true;
    call_refuse(http, STATUS_FORBIDDEN,
                r->options->api_key_file
                    ? "Presets are saved and deleted with an admin key: one whose line in "
                      "--api-key-file ends with 'admin'."
                    : "Presets are saved and deleted with an admin key, or by all where a server "
                      "without keys was started with --open-admin.");
    return false;
}

/* One that the store is to have first. */
struct saving {
    struct http_request *http; /* NULL once the request is over */
    struct routes *routes;
    char name[PRESET_NAME_BYTES];
    struct image *image; /* kept */
    bool is_waiting;
    struct saving *next; /* in routes->savings */
};

static void saving_free(struct saving *s)
{
    struct saving **link = &s->routes->savings;
    while (*link && *link != s)
        link = &(*link)->next;
    if (*link)
        *link = s->next;
    image_drop(s->image);
    free(s);
}

static void saving_on_close(void *context, bool delivered)
{
    (void)delivered;
    struct saving *s = context;
    s->http = NULL;
    if (!s->is_waiting)
        saving_free(s);
}

static void on_saved(void *context, const struct session_outcome *outcome)
{
    struct saving *s = context;
    struct routes *r = s->routes;
    struct preset_info info;
    struct error err = outcome->error;
    s->is_waiting = false;
    enum status st = err.status;
    if (!st)
        st = presets_put(r->presets, s->name, s->image, false, &info, &err);
    if (st && !outcome->error.status)
        session_drop_item(r->storage.sessions, SESSION_PRESET, -1, s->name);
    if (s->http && st)
        refuse(s->http, &err);
    else if (s->http)
        reply_preset(s->http, r, &info);
    else
        saving_free(s);
}

static void save_durably(struct http_request *http, struct routes *r, struct image *image)
{
    struct error err;
    struct saving *s = calloc(1, sizeof(*s));
    if (!s) {
        call_refuse(http, STATUS_NOMEM, "out of memory for a request");
        return;
    }
    *s = (struct saving){.http = http, .routes = r, .image = image, .is_waiting = true};
    image_keep(image);
    snprintf(s->name, sizeof(s->name), "%s", http_param(http));
    const struct session_item item = {.kind = SESSION_PRESET,
                                      .name = s->name,
                                      .owner = -1,
                                      .data = s->name,
                                      .n_data = strlen(s->name),
                                      .image = image};
    s->next = r->savings;
    r->savings = s;
    http_on_close(http, saving_on_close, s);
    enum status st = session_put_item(r->storage.sessions, &item, on_saved, s, &err);
    if (!st)
        return; /* the request is deferred: its state was read on a worker */
    s->is_waiting = false;
    refuse(http, &err);
}

static void save(struct http_request *http, struct routes *r, struct image *image)
{
    struct preset_info info;
    struct error err;
    const char *name = http_param(http);
    if (presets_check(r->presets, name, false, &err))
        refuse(http, &err);
    else if (storage_has_items(&r->storage))
        save_durably(http, r, image);
    else if (presets_put(r->presets, name, image, false, &info, &err))
        refuse(http, &err);
    else
        reply_preset(http, r, &info);
}

/* {"session": id, "snapshot": name}: the state that a session, or its snapshot, has now. */
static const char *const session_names[] = {"session", "snapshot", NULL};

static void save_refreshed(struct http_request *http, void *context)
{
    struct routes *r = context;
    struct error err;
    struct image *image = NULL;
    cJSON *tree = NULL;
    enum status st = request_json_read(http, session_names, &tree, &err);
    if (!st)
        st = request_json_image(r, tree, "", http_key_index(http), &image, &err);
    if (!st && !image)
        st = fail_field(&err, STATUS_INVALID, "session",
                        "Session '%s' has no state yet: it has no tokens.",
                        cJSON_GetObjectItemCaseSensitive(tree, "session")->valuestring);
    cJSON_Delete(tree);
    if (st)
        refuse(http, &err);
    else
        state_io_copy(http, r, image, save);
}

static void save_session(struct http_request *http, struct routes *r)
{
    struct error ignored; /* it is told when the body is read for good */
    cJSON *tree = NULL;
    const cJSON *id = NULL;
    if (refresh_asks(r) && !request_json_read(http, session_names, &tree, &ignored))
        id = cJSON_GetObjectItemCaseSensitive(tree, "session");
    refresh_then(http, r, cJSON_IsString(id) ? id->valuestring : NULL, save_refreshed);
    cJSON_Delete(tree);
}

void preset_put(struct http_request *http, void *context)
{
    struct routes *r = context;
    size_t n;
    if (!begin_change(http, r))
        return;
    const char *body = http_body(http, &n);
    while (n && strchr(" \t\r\n", *body)) /* of JSON; no state begins with one */
        body++, n--;
    if (n && *body == '{')
        save_session(http, r);
    else
        state_io_read(http, r, save);
}

void preset_remove(struct http_request *http, void *context)
{
    struct routes *r = context;
    struct error err;
    if (!begin_change(http, r))
        return;
    for (const struct saving *s = r->savings; s; s = s->next)
        if (s->is_waiting && !strcmp(s->name, http_param(http))) {
            call_refuse(http, STATUS_CONFLICT, "The preset is being saved; try again.");
            return;
        }
    if (presets_delete(r->presets, http_param(http), &err)) {
        refuse(http, &err);
        return;
    }
    if (storage_has_items(&r->storage))
        session_drop_item(r->storage.sessions, SESSION_PRESET, -1, http_param(http));
    struct bytes body = {0};
    bytes_text(&body, "{\"name\":");
    bytes_json_string(&body, http_param(http), strlen(http_param(http)));
    bytes_text(&body, ",\"object\":\"preset.deleted\",\"deleted\":true}");
    call_reply_json(http, &body);
}

/* ---- those that were there before --------------------------------------------------------------
 */

static bool restore(void *context, const struct session_item *item, int64_t created)
{
    struct routes *r = context;
    char name[PRESET_NAME_BYTES];
    struct error err;
    snprintf(name, sizeof(name), "%.*s", (int)item->n_data, item->data);
    if (!item->image || presets_restore(r->presets, name, item->image, created, &err)) {
        log_event(LOG_WARN, "store", "preset '%s' is left out: %s", name,
                  item->image ? err.text : "its state is not there");
        return item->image != NULL; /* there may be room at another start */
    }
    return true;
}

void routes_restore_presets(struct routes *r)
{
    sessions_each_item(r->storage.sessions, SESSION_PRESET, restore, r);
}

/* ---- those given at the start -------------------------------------------------------------------
 */

/* "NAME=FILE", of n bytes. */
static enum status load_preset(struct routes *r, const char *text, size_t n, struct error *err)
{
    char name[PRESET_NAME_BYTES + 1], path[FILE_PATH_BYTES];
    const char *equals = memchr(text, '=', n);
    size_t n_name = equals ? (size_t)(equals - text) : 0, n_path = equals ? n - n_name - 1 : 0;
    if (!n_name || !n_path || n_path >= sizeof(path))
        return fail(err, STATUS_INVALID, "expected NAME=FILE");
    snprintf(name, sizeof(name), "%.*s", (int)n_name, text);
    snprintf(path, sizeof(path), "%.*s", (int)n_path, equals + 1);
    struct bytes file = {0};
    struct preset_info info;
    struct image *image = NULL;
    enum status st = file_read(&file, path, image_file_bytes(&r->storage.images) + (64 << 10), err);
    if (!st)
        st = state_io_parse(r, file.data, file.n, &image, err);
    if (!st)
        st = presets_put(r->presets, name, image, true, &info, err);
    image_release(image);
    bytes_free(&file);
    return st;
}

enum status routes_load_presets(struct routes *r, struct error *err)
{
    const struct option_strings *given = &r->options->preset;
    for (int i = 0; i < given->n; i++)
        for (const char *at = given->values[i]; *at;) {
            size_t n = strcspn(at, ",");
            if (load_preset(r, at, n, err))
                return fail_context(err, "--preset %.*s", (int)(n < 200 ? n : 200), at);
            at += n + (at[n] == ',');
        }
    return STATUS_OK;
}
