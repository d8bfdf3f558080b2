/* tree.c - see tree.h */
#include "weights/tree.h"

#include <stdio.h>
#include <string.h>

#include "engine/base/file.h"
#include "engine/base/json.h"
#include "engine/base/utf8.h"

enum { MAX_VALUES = 4000000 };

enum status tree_parse(cJSON **out, const char *text, size_t n, int max_depth, struct error *err)
{
    const struct json_limits limits = {.max_depth = max_depth, .max_values = MAX_VALUES};
    enum status st = json_check(text, n, &limits, err);
    if (st)
        return st;
    cJSON *tree = cJSON_ParseWithLength(text, n);
    if (!tree) /* the text is right, so only memory can be short */
        return fail(err, STATUS_NOMEM, "out of memory while reading JSON");
    *out = tree;
    return STATUS_OK;
}

enum status tree_read(cJSON **out, const char *path, size_t max_bytes, int max_depth,
                      struct error *err)
{
    struct bytes text = {0};
    enum status st = file_read(&text, path, max_bytes, err);
    if (!st) {
        st = tree_parse(out, text.data ? text.data : "", text.n, max_depth, err);
        if (st)
            fail_context(err, "%s", path);
    }
    bytes_free(&text);
    return st;
}

const cJSON *tree_find(const cJSON *object, const char *key)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(object, key);
    return cJSON_IsNull(item) ? NULL : item;
}

bool tree_whole(const cJSON *item, int64_t min, int64_t max, int64_t *out)
{
    if (!cJSON_IsNumber(item) || !(item->valuedouble >= -0x1p53 && item->valuedouble <= 0x1p53))
        return false;
    int64_t value = (int64_t)item->valuedouble;
    if ((double)value != item->valuedouble || value < min || value > max)
        return false;
    *out = value;
    return true;
}

const char *tree_kind(const cJSON *item)
{
    if (!item)
        return "nothing";
    if (cJSON_IsObject(item))
        return "an object";
    if (cJSON_IsArray(item))
        return "an array";
    if (cJSON_IsString(item))
        return "a string";
    if (cJSON_IsNumber(item))
        return "a number";
    return cJSON_IsNull(item) ? "null" : "a boolean";
}

/* The bytes of text that fit into limit without cutting a character. */
static int clip(const char *text, size_t limit)
{
    return (int)utf8_valid_prefix(text, strnlen(text, limit));
}

const char *tree_show(const cJSON *item, char out[64])
{
    if (cJSON_IsString(item)) {
        int n = clip(item->valuestring, 50);
        snprintf(out, 64, "\"%.*s\"%s", n, item->valuestring, item->valuestring[n] ? "..." : "");
    } else if (cJSON_IsNumber(item)) {
        snprintf(out, 64, "%.15g", item->valuedouble);
    } else if (cJSON_IsArray(item)) {
        snprintf(out, 64, "an array of %d", cJSON_GetArraySize(item));
    } else if (cJSON_IsBool(item)) {
        return cJSON_IsTrue(item) ? "true" : "false";
    } else {
        return tree_kind(item);
    }
    return out;
}

const char *tree_key(const cJSON *item, char out[64])
{
    snprintf(out, 64, "%.*s", clip(item->string, 60), item->string);
    return out;
}
