/* codec_values.c - values of JSON as fields of a request: types, ranges, and what to say when
 * they are wrong. See codec_private.h. */
#include "server/codec_private.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "engine/base/utf8.h"

/* ---- errors ----------------------------------------------------------------------------- */

struct codec_text codec_clip(const char *text)
{
    size_t n = 0;
    while (n < 64 && text[n])
        n++;
    return (struct codec_text){text, utf8_valid_prefix(text, n)};
}

enum status codec_wrong(struct reader *r, const char *path, const char *code, const char *format,
                        ...)
{
    char text[sizeof(r->err->text)];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    r->q->code = code;
    return fail_field(r->err, STATUS_INVALID, path, "%s", text);
}

enum status codec_no_memory(struct reader *r)
{
    return fail(r->err, STATUS_NOMEM, "out of memory while reading the request");
}

const char *codec_type_name(const cJSON *v)
{
    if (cJSON_IsString(v))
        return "a string";
    if (cJSON_IsBool(v))
        return "a boolean";
    if (cJSON_IsNumber(v))
        return v->valuedouble == floor(v->valuedouble) ? "an integer" : "a decimal";
    if (cJSON_IsArray(v))
        return "an array";
    return cJSON_IsObject(v) ? "an object" : "null";
}

enum status codec_wrong_type(struct reader *r, const char *path, const char *expected,
                             const cJSON *v)
{
    return codec_wrong(r, path, "invalid_type",
                       "Invalid type for '%s': expected %s, but got %s instead.", path, expected,
                       codec_type_name(v));
}

enum status codec_missing(struct reader *r, const char *path)
{
    return codec_wrong(r, path, "missing_required_parameter", "Missing required parameter: '%s'.",
                       path);
}

static enum status not_supported(struct reader *r, const char *path)
{
    return codec_wrong(r, path, "unsupported_parameter", "'%s' is not supported by this server.",
                       path);
}

struct path codec_index(const char *path, size_t i)
{
    struct path p;
    snprintf(p.text, sizeof(p.text), "%.50s[%zu]", path, i);
    return p;
}

struct path codec_path(const char *path, const char *name)
{
    struct path p;
    struct codec_text clipped = codec_clip(name);
    if (clipped.n > 40)
        clipped.n = utf8_valid_prefix(name, 40);
    snprintf(p.text, sizeof(p.text), "%.36s%s%.*s", path, *path ? "." : "", (int)clipped.n, name);
    return p;
}

/* ---- plain values ----------------------------------------------------------------------- */

static void *at(const struct field *f, void *target)
{
    return (char *)target + f->offset;
}

enum status field_bool(struct reader *r, const struct field *f, const cJSON *v, const char *path,
                       void *target)
{
    if (!cJSON_IsBool(v))
        return codec_wrong_type(r, path, "a boolean", v);
    *(bool *)at(f, target) = cJSON_IsTrue(v);
    return STATUS_OK;
}

static enum status check_range(struct reader *r, const struct field *f, double value,
                               const char *path, const char *kind)
{
    if (value < f->min)
        return codec_wrong(
            r, path, *kind == 'i' ? "integer_below_min_value" : "decimal_below_min_value",
            "Invalid '%s': %s below minimum value. Expected a value >= %.10g, but got "
            "%.10g instead.",
            path, kind, f->min, value);
    if (value > f->max)
        return codec_wrong(
            r, path, *kind == 'i' ? "integer_above_max_value" : "decimal_above_max_value",
            "Invalid '%s': %s above maximum value. Expected a value <= %.10g, but got "
            "%.10g instead.",
            path, kind, f->max, value);
    return STATUS_OK;
}

enum status field_int(struct reader *r, const struct field *f, const cJSON *v, const char *path,
                      void *target)
{
    if (!cJSON_IsNumber(v) || v->valuedouble != floor(v->valuedouble))
        return codec_wrong_type(r, path, "an integer", v);
    enum status st = check_range(r, f, v->valuedouble, path, "integer");
    if (!st)
        *(int64_t *)at(f, target) = (int64_t)v->valuedouble;
    return st;
}

enum status field_number(struct reader *r, const struct field *f, const cJSON *v, const char *path,
                         void *target)
{
    if (!cJSON_IsNumber(v))
        return codec_wrong_type(r, path, "a decimal", v);
    enum status st = check_range(r, f, v->valuedouble, path, "decimal");
    if (!st)
        *(double *)at(f, target) = v->valuedouble;
    return st;
}

enum status field_string(struct reader *r, const struct field *f, const cJSON *v, const char *path,
                         void *target)
{
    if (!cJSON_IsString(v))
        return codec_wrong_type(r, path, "a string", v);
    *(const char **)at(f, target) = v->valuestring;
    return STATUS_OK;
}

enum status field_text(struct reader *r, const struct field *f, const cJSON *v, const char *path,
                       void *target)
{
    if (!cJSON_IsString(v))
        return codec_wrong_type(r, path, "a string", v);
    *(struct codec_text *)at(f, target) =
        (struct codec_text){v->valuestring, strlen(v->valuestring)};
    return STATUS_OK;
}

/* Fields of OpenAI's that change nothing here: only their types are checked. */
enum status field_ignore_string(struct reader *r, const struct field *f, const cJSON *v,
                                const char *path, void *target)
{
    (void)f, (void)target;
    return cJSON_IsString(v) ? STATUS_OK : codec_wrong_type(r, path, "a string", v);
}

enum status field_ignore_bool(struct reader *r, const struct field *f, const cJSON *v,
                              const char *path, void *target)
{
    (void)f, (void)target;
    return cJSON_IsBool(v) ? STATUS_OK : codec_wrong_type(r, path, "a boolean", v);
}

enum status field_ignore_int(struct reader *r, const struct field *f, const cJSON *v,
                             const char *path, void *target)
{
    (void)f, (void)target;
    bool whole = cJSON_IsNumber(v) && v->valuedouble == floor(v->valuedouble);
    return whole ? STATUS_OK : codec_wrong_type(r, path, "an integer", v);
}

enum status field_ignore_object(struct reader *r, const struct field *f, const cJSON *v,
                                const char *path, void *target)
{
    (void)f, (void)target;
    return cJSON_IsObject(v) ? STATUS_OK : codec_wrong_type(r, path, "an object", v);
}

/* Fields that would change the answer in a way this server cannot: empty or false is fine. */
enum status field_refuse(struct reader *r, const struct field *f, const cJSON *v, const char *path,
                         void *target)
{
    (void)f, (void)target;
    bool empty = cJSON_IsFalse(v) || (cJSON_IsString(v) && !*v->valuestring) ||
                 ((cJSON_IsArray(v) || cJSON_IsObject(v)) && !v->child);
    return empty ? STATUS_OK : not_supported(r, path);
}

/* tool_choice and function_call: "none" and "auto" ask for nothing when there are no tools. */
enum status field_refuse_choice(struct reader *r, const struct field *f, const cJSON *v,
                                const char *path, void *target)
{
    (void)f, (void)target;
    bool harmless =
        cJSON_IsString(v) && (!strcmp(v->valuestring, "none") || !strcmp(v->valuestring, "auto"));
    return harmless ? STATUS_OK : not_supported(r, path);
}

/* ---- arrays and objects ------------------------------------------------------------------ */

enum status codec_check_length(struct reader *r, const char *path, const cJSON *array, int max)
{
    int n = cJSON_GetArraySize(array);
    if (n <= max)
        return STATUS_OK;
    return codec_wrong(
        r, path, "array_above_max_length",
        "Invalid '%s': array too long. Expected an array with maximum length %d, but got "
        "an array with length %d instead.",
        path, max, n);
}

enum status codec_read_id(struct reader *r, const cJSON *v, const char *path, int32_t *out)
{
    if (!cJSON_IsNumber(v) || v->valuedouble != floor(v->valuedouble))
        return codec_wrong_type(r, path, "an integer", v);
    if (v->valuedouble < 0 || v->valuedouble >= r->context->vocab_size)
        return codec_wrong(r, path, "invalid_token_id",
                           "Invalid '%s': token id %.10g is out of range. Expected 0 to %d.", path,
                           v->valuedouble, r->context->vocab_size - 1);
    *out = (int32_t)v->valuedouble;
    return STATUS_OK;
}

static const struct field *find_field(const struct field *table, const char *name)
{
    for (const struct field *f = table; f->name; f++)
        if (!strcmp(f->name, name))
            return f;
    return NULL;
}

/* Read the members of an object by a table; null is the same as absent. */
enum status codec_read_members(struct reader *r, const struct field *table, const cJSON *object,
                               const char *path, void *target)
{
    const cJSON *v;
    cJSON_ArrayForEach(v, object)
    {
        const struct field *f = find_field(table, v->string);
        enum status st = STATUS_OK;
        if (f && !cJSON_IsNull(v))
            st = f->read(r, f, v, codec_path(path, v->string).text, target);
        if (!f) {
            r->q->n_unknown_fields++;
            struct path p = codec_path(path, v->string);
            if (r->context->strict_fields)
                st =
                    codec_wrong(r, p.text, "unknown_parameter", "Unknown parameter: '%s'.", p.text);
        }
        if (st)
            return st;
    }
    return STATUS_OK;
}

/* A member that is there and not null. */
const cJSON *codec_member(const cJSON *object, const char *name)
{
    const cJSON *v = cJSON_GetObjectItemCaseSensitive(object, name);
    return cJSON_IsNull(v) ? NULL : v;
}

enum status codec_required_text(struct reader *r, const cJSON *object, const char *path,
                                const char *name, const char **out)
{
    const cJSON *v = codec_member(object, name);
    struct path p = codec_path(path, name);
    if (!v)
        return codec_missing(r, p.text);
    if (!cJSON_IsString(v))
        return codec_wrong_type(r, p.text, "a string", v);
    *out = v->valuestring;
    return STATUS_OK;
}
