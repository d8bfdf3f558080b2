/* tokenizer_json.c - see tokenizer_json.h */
#include "weights/tokenizer_json.h"

#include <string.h>

enum status object_only(const cJSON *node, const char *where, const char *const *known,
                        struct error *err)
{
    if (!cJSON_IsObject(node))
        return fail(err, STATUS_INVALID, "%s: not an object", where);
    const cJSON *child;
    cJSON_ArrayForEach(child, node)
    {
        const char *const *k = known;
        while (*k && strcmp(*k, child->string) != 0)
            k++;
        if (!*k)
            return fail(err, STATUS_UNSUPPORTED, "%s: the key \"%.80s\" is not supported", where,
                        child->string);
    }
    return STATUS_OK;
}

const cJSON *object_get(const cJSON *node, const char *key)
{
    const cJSON *value = cJSON_GetObjectItemCaseSensitive(node, key);
    return cJSON_IsNull(value) ? NULL : value;
}

enum status object_string(const cJSON *node, const char *where, const char *key, const char **out,
                          struct error *err)
{
    const cJSON *value = object_get(node, key);
    if (!cJSON_IsString(value))
        return fail(err, STATUS_INVALID, "%s.%s: expected a string", where, key);
    *out = value->valuestring;
    return STATUS_OK;
}

enum status object_bool(const cJSON *node, const char *where, const char *key, bool required,
                        bool *out, struct error *err)
{
    const cJSON *value = object_get(node, key);
    if (!value && !required)
        return STATUS_OK;
    if (!cJSON_IsBool(value))
        return fail(err, STATUS_INVALID, "%s.%s: expected true or false", where, key);
    *out = cJSON_IsTrue(value);
    return STATUS_OK;
}

enum status object_array(const cJSON *node, const char *where, const char *key, const cJSON **out,
                         struct error *err)
{
    const cJSON *value = object_get(node, key);
    if (!cJSON_IsArray(value))
        return fail(err, STATUS_INVALID, "%s.%s: expected a list", where, key);
    *out = value;
    return STATUS_OK;
}

bool node_integer(const cJSON *node, int32_t most, int32_t *out)
{
    if (!cJSON_IsNumber(node) || !(node->valuedouble >= 0 && node->valuedouble <= most) ||
        node->valuedouble != (int32_t)node->valuedouble)
        return false;
    *out = (int32_t)node->valuedouble;
    return true;
}

enum status object_integer(const cJSON *node, const char *where, const char *key, int32_t most,
                           int32_t *out, struct error *err)
{
    if (!node_integer(object_get(node, key), most, out))
        return fail(err, STATUS_INVALID, "%s.%s: expected an integer of 0 to %d", where, key,
                    (int)most);
    return STATUS_OK;
}
