/* request_json.c - see request_json.h */
#include "server/request_json.h"

#include <stdio.h>
#include <string.h>

#include "engine/base/json.h"
#include "server/call.h"

/* "from.session", "session" */
struct place {
    char text[80];
};

static struct place place_of(const char *path, const char *name)
{
    struct place p;
    struct codec_text clipped = codec_clip(name);
    snprintf(p.text, sizeof(p.text), "%.10s%s%.*s", path, *path ? "." : "", (int)clipped.n,
             clipped.data);
    return p;
}

enum status request_json_members(const cJSON *object, const char *path, const char *const *names,
                                 struct error *err)
{
    for (const cJSON *member = object->child; member; member = member->next) {
        const char *const *name = names;
        while (*name && strcmp(*name, member->string))
            name++;
        struct place p = place_of(path, member->string);
        if (!*name)
            return fail_field(err, STATUS_INVALID, p.text, "Unknown parameter: '%s'.", p.text);
    }
    return STATUS_OK;
}

enum status request_json_read(struct http_request *http, const char *const *names, cJSON **out,
                              struct error *err)
{
    size_t n;
    const char *body = http_body(http, &n);
    const struct json_limits limits = {.max_depth = CODEC_MAX_DEPTH, .max_values = 1000};
    enum status st = json_check(body, n, &limits, err);
    if (st)
        return st == STATUS_INVALID
                   ? fail_context(err, "We could not parse the JSON body of your request")
                   : st;
    cJSON *tree = cJSON_ParseWithLength(body, n);
    if (!tree)
        return fail(err, STATUS_NOMEM, "out of memory for the body of a request");
    st = cJSON_IsObject(tree)
             ? request_json_members(tree, "", names, err)
             : fail(err, STATUS_INVALID, "The body of the request is no JSON object.");
    if (st)
        cJSON_Delete(tree);
    else
        *out = tree;
    return st;
}

enum status request_json_number(const cJSON *tree, const char *name, int64_t least, int64_t most,
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

enum status request_json_name(const cJSON *tree, const char *path, const char *field,
                              const char **out, struct error *err)
{
    const cJSON *v = cJSON_GetObjectItemCaseSensitive(tree, field);
    struct place p = place_of(path, field);
    *out = NULL;
    if (!v || cJSON_IsNull(v))
        return STATUS_OK;
    if (!cJSON_IsString(v) || !*v->valuestring || strlen(v->valuestring) >= SESSION_NAME_BYTES)
        return fail_field(err, STATUS_INVALID, p.text,
                          "Invalid '%s': expected a string of 1 to %d bytes.", p.text,
                          SESSION_NAME_BYTES - 1);
    *out = v->valuestring;
    return STATUS_OK;
}

/* What a NOT_FOUND is about, as the request spells it. */
static enum status rename_field(struct error *err, const char *path)
{
    struct place p = place_of(path, !strcmp(err->field, "session_id") ? "session" : err->field);
    snprintf(err->field, sizeof(err->field), "%s", p.text);
    return err->status;
}

enum status request_json_image(struct routes *r, const cJSON *object, const char *path, int owner,
                               struct image **out, struct error *err)
{
    const char *preset, *session, *snapshot;
    enum status st = request_json_name(object, path, "preset", &preset, err);
    if (!st)
        st = request_json_name(object, path, "session", &session, err);
    if (!st)
        st = request_json_name(object, path, "snapshot", &snapshot, err);
    if (st)
        return st;
    if (!preset == !session || (preset && snapshot)) {
        struct place p = place_of(path, "session");
        return fail_field(err, STATUS_INVALID, p.text,
                          "Expected a 'session', with or without a 'snapshot' of it%s.",
                          *path ? ", or a 'preset'" : "");
    }
    st = preset ? presets_find(r->presets, preset, out, NULL, err)
                : session_image_of(r->storage.sessions, session, owner, snapshot, out, err);
    return st == STATUS_NOT_FOUND ? rename_field(err, path) : st;
}
