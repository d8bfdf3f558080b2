/* codec_request.c - see codec.h: bodies of requests, one table of fields per API. */
#include <cjson/cJSON.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/json.h"
#include "engine/base/utf8.h"
#include "server/codec.h"

enum { PATH_BYTES = 80, MAX_MESSAGES = 65536, EXTRA_VALUES = 65536 };

/* One request being read. */
struct reader {
    struct codec_request *q;
    const struct codec_context *context;
    struct arena *arena;
    struct error *err;
    const char *body; /* [n_body] */
    size_t n_body;
};

/* A member of an object: how to read it, and where its value goes in the target. */
struct field {
    const char *name;
    enum status (*read)(struct reader *r, const struct field *f, const cJSON *v, const char *path,
                        void *target);
    size_t offset;
    double min, max;
    bool above_min; /* the minimum itself is out of range */
};

/* A place inside a request, "messages[3].role". */
struct path {
    char text[PATH_BYTES];
};

/* ---- errors ----------------------------------------------------------------------------- */

struct codec_text codec_clip(const char *text)
{
    size_t n = 0;
    while (n < 64 && text[n])
        n++;
    return (struct codec_text){text, utf8_valid_prefix(text, n)};
}

/* Fail at a path with OpenAI's error code. */
__attribute__((format(printf, 4, 5))) static enum status
wrong(struct reader *r, const char *path, const char *code, const char *format, ...)
{
    char text[sizeof(r->err->text)];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    r->q->code = code;
    return fail_field(r->err, STATUS_INVALID, path, "%s", text);
}

static enum status no_memory(struct reader *r)
{
    return fail(r->err, STATUS_NOMEM, "out of memory while reading the request");
}

static const char *type_name(const cJSON *v)
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

static enum status wrong_type(struct reader *r, const char *path, const char *expected,
                              const cJSON *v)
{
    return wrong(r, path, "invalid_type", "Invalid type for '%s': expected %s, but got %s instead.",
                 path, expected, type_name(v));
}

static enum status missing(struct reader *r, const char *path)
{
    return wrong(r, path, "missing_required_parameter", "Missing required parameter: '%s'.", path);
}

static enum status not_supported(struct reader *r, const char *path)
{
    return wrong(r, path, "unsupported_parameter", "'%s' is not supported by this server.", path);
}

static struct path path_index(const char *path, size_t i)
{
    struct path p;
    snprintf(p.text, sizeof(p.text), "%.50s[%zu]", path, i);
    return p;
}

static struct path path_member(const char *path, const char *name)
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

static enum status read_bool(struct reader *r, const struct field *f, const cJSON *v,
                             const char *path, void *target)
{
    if (!cJSON_IsBool(v))
        return wrong_type(r, path, "a boolean", v);
    *(bool *)at(f, target) = cJSON_IsTrue(v);
    return STATUS_OK;
}

static enum status check_range(struct reader *r, const struct field *f, double value,
                               const char *path, const char *kind)
{
    if (value < f->min || (f->above_min && value == f->min))
        return wrong(r, path, *kind == 'i' ? "integer_below_min_value" : "decimal_below_min_value",
                     "Invalid '%s': %s below minimum value. Expected a value %s %.10g, but got "
                     "%.10g instead.",
                     path, kind, f->above_min ? ">" : ">=", f->min, value);
    if (value > f->max)
        return wrong(r, path, *kind == 'i' ? "integer_above_max_value" : "decimal_above_max_value",
                     "Invalid '%s': %s above maximum value. Expected a value <= %.10g, but got "
                     "%.10g instead.",
                     path, kind, f->max, value);
    return STATUS_OK;
}

static enum status read_int(struct reader *r, const struct field *f, const cJSON *v,
                            const char *path, void *target)
{
    if (!cJSON_IsNumber(v) || v->valuedouble != floor(v->valuedouble))
        return wrong_type(r, path, "an integer", v);
    enum status st = check_range(r, f, v->valuedouble, path, "integer");
    if (!st)
        *(int64_t *)at(f, target) = (int64_t)v->valuedouble;
    return st;
}

static enum status read_number(struct reader *r, const struct field *f, const cJSON *v,
                               const char *path, void *target)
{
    if (!cJSON_IsNumber(v))
        return wrong_type(r, path, "a decimal", v);
    enum status st = check_range(r, f, v->valuedouble, path, "decimal");
    if (!st)
        *(double *)at(f, target) = v->valuedouble;
    return st;
}

static enum status read_string(struct reader *r, const struct field *f, const cJSON *v,
                               const char *path, void *target)
{
    if (!cJSON_IsString(v))
        return wrong_type(r, path, "a string", v);
    *(const char **)at(f, target) = v->valuestring;
    return STATUS_OK;
}

/* Fields of OpenAI's that change nothing here: only their types are checked. */
static enum status ignore_string(struct reader *r, const struct field *f, const cJSON *v,
                                 const char *path, void *target)
{
    (void)f, (void)target;
    return cJSON_IsString(v) ? STATUS_OK : wrong_type(r, path, "a string", v);
}

static enum status ignore_bool(struct reader *r, const struct field *f, const cJSON *v,
                               const char *path, void *target)
{
    (void)f, (void)target;
    return cJSON_IsBool(v) ? STATUS_OK : wrong_type(r, path, "a boolean", v);
}

static enum status ignore_object(struct reader *r, const struct field *f, const cJSON *v,
                                 const char *path, void *target)
{
    (void)f, (void)target;
    return cJSON_IsObject(v) ? STATUS_OK : wrong_type(r, path, "an object", v);
}

/* ---- objects ---------------------------------------------------------------------------- */

static const struct field *find_field(const struct field *table, const char *name)
{
    for (const struct field *f = table; f->name; f++)
        if (!strcmp(f->name, name))
            return f;
    return NULL;
}

/* Read the members of an object by a table; null is the same as absent. */
static enum status read_members(struct reader *r, const struct field *table, const cJSON *object,
                                const char *path, void *target)
{
    const cJSON *v;
    cJSON_ArrayForEach(v, object)
    {
        const struct field *f = find_field(table, v->string);
        enum status st = STATUS_OK;
        if (f && !cJSON_IsNull(v))
            st = f->read(r, f, v, path_member(path, v->string).text, target);
        if (!f) {
            r->q->n_unknown_fields++;
            struct path p = path_member(path, v->string);
            if (r->context->strict_fields)
                st = wrong(r, p.text, "unknown_parameter", "Unknown parameter: '%s'.", p.text);
        }
        if (st)
            return st;
    }
    return STATUS_OK;
}

/* A member that is there and not null. */
static const cJSON *member(const cJSON *object, const char *name)
{
    const cJSON *v = cJSON_GetObjectItemCaseSensitive(object, name);
    return cJSON_IsNull(v) ? NULL : v;
}

static bool is_given(const struct reader *r, const char *name)
{
    return member(r->q->tree, name) != NULL;
}

/* ---- fields with rules of their own ------------------------------------------------------ */

static enum status read_max_tokens(struct reader *r, const struct field *f, const cJSON *v,
                                   const char *path, void *target)
{
    struct field bounded = *f;
    bounded.max = (double)r->context->max_tokens_limit;
    return read_int(r, &bounded, v, path, target);
}

/* A double would round large seeds, so the digits come from the body's text. */
static enum status read_seed(struct reader *r, const struct field *f, const cJSON *v,
                             const char *path, void *target)
{
    (void)f, (void)target;
    size_t n = 0;
    const char *digits = json_member(r->body, r->n_body, "seed", &n);
    if (!cJSON_IsNumber(v) || !digits || v->valuedouble != floor(v->valuedouble))
        return wrong_type(r, path, "an integer", v);
    const double limit = 0x1p63;
    if (v->valuedouble < -limit || v->valuedouble > limit)
        return wrong(r, path, "integer_out_of_range",
                     "Invalid '%s': expected an integer of 64 bits with sign.", path);
    char text[80];
    snprintf(text, sizeof(text), "%.*s", (int)n, digits);
    bool plain = !strpbrk(text, ".eE");
    if (plain) /* in range but for the last few above 2^63 - 1, which strtoll clamps */
        r->q->seed = (uint64_t)strtoll(text, NULL, 10);
    else
        r->q->seed = v->valuedouble < limit ? (uint64_t)(int64_t)v->valuedouble : INT64_MAX;
    r->q->has_seed = true;
    return STATUS_OK;
}

static enum status add_stop(struct reader *r, const cJSON *v, const char *path)
{
    struct codec_request *q = r->q;
    if (!cJSON_IsString(v))
        return wrong_type(r, path, "a string", v);
    size_t n = strlen(v->valuestring);
    if (!n)
        return wrong(r, path, "empty_string",
                     "Invalid '%s': empty string. Expected a string with at least one character.",
                     path);
    if (n > CODEC_MAX_STOP_BYTES)
        return wrong(r, path, "string_above_max_length",
                     "Invalid '%s': string too long. Expected at most %d bytes, but got %zu "
                     "instead.",
                     path, CODEC_MAX_STOP_BYTES, n);
    q->stops[q->n_stops++] = (struct codec_text){v->valuestring, n};
    return STATUS_OK;
}

static enum status check_length(struct reader *r, const char *path, const cJSON *array, int max)
{
    int n = cJSON_GetArraySize(array);
    if (n <= max)
        return STATUS_OK;
    return wrong(r, path, "array_above_max_length",
                 "Invalid '%s': array too long. Expected an array with maximum length %d, but got "
                 "an array with length %d instead.",
                 path, max, n);
}

static enum status read_stop(struct reader *r, const struct field *f, const cJSON *v,
                             const char *path, void *target)
{
    (void)f, (void)target;
    if (cJSON_IsString(v))
        return add_stop(r, v, path);
    if (!cJSON_IsArray(v))
        return wrong_type(r, path, "a string or an array of strings", v);
    enum status st = check_length(r, path, v, CODEC_MAX_STOPS);
    const cJSON *item;
    cJSON_ArrayForEach(item, v)
    {
        if (!st)
            st = add_stop(r, item, path_index(path, (size_t)r->q->n_stops).text);
    }
    return st;
}

static enum status read_id(struct reader *r, const cJSON *v, const char *path, int32_t *out)
{
    if (!cJSON_IsNumber(v) || v->valuedouble != floor(v->valuedouble))
        return wrong_type(r, path, "an integer", v);
    if (v->valuedouble < 0 || v->valuedouble >= r->context->vocab_size)
        return wrong(r, path, "invalid_token_id",
                     "Invalid '%s': token id %.10g is out of range. Expected 0 to %d.", path,
                     v->valuedouble, r->context->vocab_size - 1);
    *out = (int32_t)v->valuedouble;
    return STATUS_OK;
}

static enum status read_stop_ids(struct reader *r, const struct field *f, const cJSON *v,
                                 const char *path, void *target)
{
    (void)f, (void)target;
    struct codec_request *q = r->q;
    if (!cJSON_IsArray(v))
        return wrong_type(r, path, "an array of integers", v);
    /* Room is left for the few that a chat template adds. */
    enum status st = check_length(r, path, v, SAMPLER_MAX_STOP_TOKENS - 4);
    const cJSON *item;
    cJSON_ArrayForEach(item, v)
    {
        struct path p = path_index(path, (size_t)q->n_stop_tokens);
        if (!st)
            st = read_id(r, item, p.text, &q->stop_tokens[q->n_stop_tokens]);
        if (st)
            return st;
        q->n_stop_tokens++;
    }
    return st;
}

/* The token id that a key spells in plain decimal digits, or -1. */
static int32_t id_of_key(const char *key, int32_t vocab_size)
{
    size_t n = strspn(key, "0123456789");
    if (!n || n > 9 || key[n] || (key[0] == '0' && n > 1))
        return -1;
    long id = strtol(key, NULL, 10);
    return id < vocab_size ? (int32_t)id : -1;
}

static enum status read_logit_bias(struct reader *r, const struct field *f, const cJSON *v,
                                   const char *path, void *target)
{
    (void)target;
    struct codec_request *q = r->q;
    if (!cJSON_IsObject(v))
        return wrong_type(r, path, "an object", v);
    enum status st = check_length(r, path, v, SAMPLER_MAX_LOGIT_BIAS);
    if (st)
        return st;
    q->logit_bias =
        arena_take_array(r->arena, (size_t)cJSON_GetArraySize(v) + 1, sizeof(*q->logit_bias));
    if (!q->logit_bias)
        return no_memory(r);
    const struct field value = {.min = f->min, .max = f->max};
    const cJSON *item;
    cJSON_ArrayForEach(item, v)
    {
        struct path p = path_member(path, item->string);
        int32_t id = id_of_key(item->string, r->context->vocab_size);
        double bias = 0;
        if (id < 0)
            return wrong(r, p.text, "invalid_token_id",
                         "Invalid key in '%s': expected a token id from \"0\" to \"%d\", but got "
                         "\"%.*s\" instead.",
                         path, r->context->vocab_size - 1, (int)codec_clip(item->string).n,
                         item->string);
        st = read_number(r, &value, item, p.text, &bias);
        if (st)
            return st;
        q->logit_bias[q->n_logit_bias++] =
            (struct logit_bias){id, bias <= -100 ? -INFINITY : (float)bias};
    }
    return STATUS_OK;
}

static const struct field stream_options_fields[] = {
    {"include_usage", read_bool, offsetof(struct codec_request, include_usage), 0, 0, false},
    {"continuous_usage_stats", read_bool, offsetof(struct codec_request, continuous_usage), 0, 0,
     false},
    {0},
};

static enum status read_stream_options(struct reader *r, const struct field *f, const cJSON *v,
                                       const char *path, void *target)
{
    (void)f;
    if (!cJSON_IsObject(v))
        return wrong_type(r, path, "an object", v);
    return read_members(r, stream_options_fields, v, path, target);
}

static enum status read_response_format(struct reader *r, const struct field *f, const cJSON *v,
                                        const char *path, void *target)
{
    (void)f, (void)target;
    if (!cJSON_IsObject(v))
        return wrong_type(r, path, "an object", v);
    const cJSON *type = member(v, "type");
    struct path p = path_member(path, "type");
    if (!type)
        return missing(r, p.text);
    if (!cJSON_IsString(type))
        return wrong_type(r, p.text, "a string", type);
    if (strcmp(type->valuestring, "text"))
        return wrong(r, p.text, "invalid_value",
                     "Invalid value for '%s': '%.*s'. Supported values are: 'text'.", p.text,
                     (int)codec_clip(type->valuestring).n, type->valuestring);
    return STATUS_OK;
}

/* Fields that would change the answer in a way this server cannot: empty or false is fine. */
static enum status refuse(struct reader *r, const struct field *f, const cJSON *v, const char *path,
                          void *target)
{
    (void)f, (void)target;
    bool empty = cJSON_IsFalse(v) || (cJSON_IsString(v) && !*v->valuestring) ||
                 ((cJSON_IsArray(v) || cJSON_IsObject(v)) && !v->child);
    return empty ? STATUS_OK : not_supported(r, path);
}

/* tool_choice and function_call: "none" and "auto" ask for nothing when there are no tools. */
static enum status refuse_choice(struct reader *r, const struct field *f, const cJSON *v,
                                 const char *path, void *target)
{
    (void)f, (void)target;
    bool harmless =
        cJSON_IsString(v) && (!strcmp(v->valuestring, "none") || !strcmp(v->valuestring, "auto"));
    return harmless ? STATUS_OK : not_supported(r, path);
}

static enum status refuse_modalities(struct reader *r, const struct field *f, const cJSON *v,
                                     const char *path, void *target)
{
    (void)f, (void)target;
    if (!cJSON_IsArray(v))
        return wrong_type(r, path, "an array", v);
    const cJSON *item;
    cJSON_ArrayForEach(item, v)
    {
        if (!cJSON_IsString(item) || strcmp(item->valuestring, "text"))
            return wrong(r, path, "invalid_value",
                         "Invalid value for '%s'. Supported values are: 'text'.", path);
    }
    return STATUS_OK;
}

/* ---- prompts ---------------------------------------------------------------------------- */

static enum status read_ids(struct reader *r, const cJSON *array, const char *path,
                            struct codec_prompt *out)
{
    size_t n = (size_t)cJSON_GetArraySize(array), i = 0;
    int32_t *ids = arena_take_array(r->arena, n, sizeof(*ids));
    if (!ids)
        return no_memory(r);
    const cJSON *v;
    cJSON_ArrayForEach(v, array)
    {
        /* The path is built for what is wrong only: there may be a million ids. */
        bool fits = cJSON_IsNumber(v) && v->valuedouble == floor(v->valuedouble) &&
                    v->valuedouble >= 0 && v->valuedouble < r->context->vocab_size;
        enum status st = fits ? STATUS_OK : read_id(r, v, path_index(path, i).text, &ids[i]);
        if (st)
            return st;
        ids[i++] = (int32_t)v->valuedouble;
    }
    *out = (struct codec_prompt){.tokens = ids, .n_tokens = n};
    return STATUS_OK;
}

static enum status read_one_prompt(struct reader *r, const cJSON *v, const char *path,
                                   struct codec_prompt *out)
{
    if (cJSON_IsArray(v))
        return read_ids(r, v, path, out);
    if (!cJSON_IsString(v))
        return wrong_type(r, path, "a string or an array of integers", v);
    *out = (struct codec_prompt){.text = {v->valuestring, strlen(v->valuestring)}};
    return STATUS_OK;
}

static enum status take_prompts(struct reader *r, size_t n)
{
    r->q->prompts = arena_take_array(r->arena, n, sizeof(*r->q->prompts));
    r->q->n_prompts = n;
    return r->q->prompts ? STATUS_OK : no_memory(r);
}

/* A string, an array of ids, or an array of either. */
static enum status read_prompt(struct reader *r, const struct field *f, const cJSON *v,
                               const char *path, void *target)
{
    (void)f, (void)target;
    bool many = cJSON_IsArray(v) && (cJSON_IsString(v->child) || cJSON_IsArray(v->child));
    if (!cJSON_IsString(v) && !cJSON_IsArray(v))
        return wrong_type(r, path, "a string or an array", v);
    if (cJSON_IsArray(v) && !v->child)
        return wrong(r, path, "empty_array",
                     "Invalid '%s': empty array. Expected an array with minimum length 1.", path);
    size_t n = many ? (size_t)cJSON_GetArraySize(v) : 1, i = 0;
    if (n > (size_t)r->context->max_choices)
        return check_length(r, path, v, (int)r->context->max_choices);
    enum status st = take_prompts(r, n);
    if (st || !many)
        return st ? st : read_one_prompt(r, v, path, r->q->prompts);
    const cJSON *item;
    cJSON_ArrayForEach(item, v)
    {
        if (!st)
            st = read_one_prompt(r, item, path_index(path, i).text, &r->q->prompts[i]);
        i++;
    }
    return st;
}

static enum status read_text_prompt(struct reader *r, const struct field *f, const cJSON *v,
                                    const char *path, void *target)
{
    (void)f, (void)target;
    if (!cJSON_IsString(v))
        return wrong_type(r, path, "a string", v);
    enum status st = take_prompts(r, 1);
    return st ? st : read_one_prompt(r, v, path, r->q->prompts);
}

static enum status read_token_list(struct reader *r, const struct field *f, const cJSON *v,
                                   const char *path, void *target)
{
    (void)f, (void)target;
    if (!cJSON_IsArray(v))
        return wrong_type(r, path, "an array of integers", v);
    enum status st = take_prompts(r, 1);
    return st ? st : read_ids(r, v, path, r->q->prompts);
}

/* ---- messages --------------------------------------------------------------------------- */

static enum status read_role(struct reader *r, const struct field *f, const cJSON *v,
                             const char *path, void *target)
{
    static const struct {
        const char *name;
        enum chat_role role;
    } roles[] = {
        {"system", CHAT_ROLE_SYSTEM},
        {"developer", CHAT_ROLE_SYSTEM},
        {"user", CHAT_ROLE_USER},
        {"assistant", CHAT_ROLE_ASSISTANT},
    };
    if (!cJSON_IsString(v))
        return wrong_type(r, path, "a string", v);
    for (size_t i = 0; i < sizeof(roles) / sizeof(*roles); i++)
        if (!strcmp(v->valuestring, roles[i].name)) {
            *(enum chat_role *)at(f, target) = roles[i].role;
            return STATUS_OK;
        }
    return wrong(r, path, "invalid_value",
                 "Invalid value for '%s': '%.*s'. Supported values are: 'system', 'developer', "
                 "'user', and 'assistant'.",
                 path, (int)codec_clip(v->valuestring).n, v->valuestring);
}

/* The text of one part of a content array. */
static enum status read_part(struct reader *r, const cJSON *part, const char *path,
                             const char **text)
{
    if (!cJSON_IsObject(part))
        return wrong_type(r, path, "an object", part);
    const cJSON *type = member(part, "type");
    struct path p = path_member(path, "type");
    if (!type)
        return missing(r, p.text);
    if (!cJSON_IsString(type))
        return wrong_type(r, p.text, "a string", type);
    bool refusal = !strcmp(type->valuestring, "refusal");
    if (!refusal && strcmp(type->valuestring, "text"))
        return wrong(r, p.text, "invalid_value",
                     "Invalid value for '%s': '%.*s'. This model reads text only; supported "
                     "values are: 'text'.",
                     p.text, (int)codec_clip(type->valuestring).n, type->valuestring);
    const char *name = refusal ? "refusal" : "text";
    const cJSON *v = member(part, name);
    p = path_member(path, name);
    if (!v)
        return missing(r, p.text);
    if (!cJSON_IsString(v))
        return wrong_type(r, p.text, "a string", v);
    *text = v->valuestring;
    return STATUS_OK;
}

/* Join text parts with newlines, as other servers of text models do. */
static enum status join_parts(struct reader *r, const cJSON *parts, const char *path,
                              struct chat_message *out)
{
    size_t total = 0, i = 0;
    const cJSON *part;
    const char *text = NULL;
    cJSON_ArrayForEach(part, parts)
    {
        enum status st = read_part(r, part, path_index(path, i++).text, &text);
        if (st)
            return st;
        total += strlen(text) + 1;
    }
    if (!total)
        return wrong(r, path, "empty_array",
                     "Invalid '%s': empty array. Expected an array with minimum length 1.", path);
    char *joined = arena_take(r->arena, total), *end = joined;
    if (!joined)
        return no_memory(r);
    cJSON_ArrayForEach(part, parts)
    {
        read_part(r, part, path, &text);
        end = stpcpy(end, text);
        *end++ = '\n';
    }
    out->content = joined;
    out->n = total - 1;
    return STATUS_OK;
}

static enum status read_content(struct reader *r, const struct field *f, const cJSON *v,
                                const char *path, void *target)
{
    (void)f;
    struct chat_message *out = target;
    if (cJSON_IsArray(v))
        return join_parts(r, v, path, out);
    if (!cJSON_IsString(v))
        return wrong_type(r, path, "a string or an array of text parts", v);
    out->content = v->valuestring;
    out->n = strlen(v->valuestring);
    return STATUS_OK;
}

static const struct field message_fields[] = {
    {"role", read_role, offsetof(struct chat_message, role), 0, 0, false},
    {"content", read_content, 0, 0, 0, false},
    {"name", ignore_string, 0, 0, 0, false},
    {"refusal", ignore_string, 0, 0, 0, false},
    {"tool_calls", refuse, 0, 0, 0, false},
    {"function_call", refuse, 0, 0, 0, false},
    {"audio", refuse, 0, 0, 0, false},
    {"annotations", refuse, 0, 0, 0, false}, /* empty in our own replies, which come back */
    {0},
};

static enum status read_message(struct reader *r, const cJSON *v, const char *path,
                                struct chat_message *out)
{
    if (!cJSON_IsObject(v))
        return wrong_type(r, path, "an object", v);
    static const char *const required[] = {"role", "content"};
    enum status st = read_members(r, message_fields, v, path, out);
    for (int i = 0; !st && i < 2; i++)
        if (!member(v, required[i]))
            st = missing(r, path_member(path, required[i]).text);
    return st;
}

static enum status read_messages(struct reader *r, const struct field *f, const cJSON *v,
                                 const char *path, void *target)
{
    (void)f, (void)target;
    struct codec_request *q = r->q;
    if (!cJSON_IsArray(v))
        return wrong_type(r, path, "an array of objects", v);
    if (!v->child)
        return wrong(r, path, "empty_array",
                     "Invalid '%s': empty array. Expected an array with minimum length 1.", path);
    enum status st = check_length(r, path, v, MAX_MESSAGES);
    if (st)
        return st;
    size_t n = (size_t)cJSON_GetArraySize(v);
    q->messages = arena_take_array(r->arena, n, sizeof(*q->messages));
    if (!q->messages)
        return no_memory(r);
    const cJSON *item;
    cJSON_ArrayForEach(item, v)
    {
        st = read_message(r, item, path_index(path, q->n_messages).text,
                          &q->messages[q->n_messages]);
        if (st)
            return st;
        q->n_messages++;
    }
    return STATUS_OK;
}

/* ---- the tables ------------------------------------------------------------------------- */

#define AT(member) offsetof(struct codec_request, member)
#define FLAG(name, member)                                                                         \
    {                                                                                              \
        name, read_bool, AT(member), 0, 0, false                                                   \
    }
#define INT(name, member, min, max)                                                                \
    {                                                                                              \
        name, read_int, AT(member), min, max, false                                                \
    }
#define NUMBER(name, member, min, max)                                                             \
    {                                                                                              \
        name, read_number, AT(member), min, max, false                                             \
    }
#define ABOVE(name, member, min, max)                                                              \
    {                                                                                              \
        name, read_number, AT(member), min, max, true                                              \
    }
#define CUSTOM(name, read)                                                                         \
    {                                                                                              \
        name, read, 0, 0, 0, false                                                                 \
    }

/* What both generating APIs take. */
#define GENERATION_FIELDS                                                                          \
    {"model", read_string, AT(model), 0, 0, false}, INT("n", n, 1, CODEC_MAX_N),                   \
        FLAG("stream", stream), CUSTOM("stream_options", read_stream_options),                     \
        NUMBER("temperature", temperature, 0, 2), NUMBER("top_p", top_p, 0, 1),                    \
        INT("top_k", top_k, -1, INT32_MAX), NUMBER("min_p", min_p, 0, 1),                          \
        ABOVE("typical_p", typical_p, 0, 1),                                                       \
        ABOVE("repetition_penalty", repetition_penalty, 0, 1000),                                  \
        NUMBER("presence_penalty", presence_penalty, -2, 2),                                       \
        NUMBER("frequency_penalty", frequency_penalty, -2, 2), CUSTOM("seed", read_seed),          \
        {"logit_bias", read_logit_bias, 0, -100, 100, false}, CUSTOM("stop", read_stop),           \
        CUSTOM("stop_token_ids", read_stop_ids), FLAG("include_stop_str_in_output", include_stop), \
        INT("min_tokens", min_tokens, 0, INT32_MAX), FLAG("ignore_eos", ignore_eos),               \
        FLAG("skip_special_tokens", skip_special_tokens),                                          \
        FLAG("add_special_tokens", add_special_tokens),                                            \
        FLAG("return_token_ids", return_token_ids),                                                \
        CUSTOM("response_format", read_response_format), CUSTOM("user", ignore_string)

static const struct field completion_fields[] = {
    GENERATION_FIELDS,
    CUSTOM("prompt", read_prompt),
    INT("best_of", best_of, 1, CODEC_MAX_N),
    {"max_tokens", read_max_tokens, AT(max_tokens), 0, 0, false},
    FLAG("echo", echo),
    INT("logprobs", n_logprobs, 0, SAMPLER_MAX_TOP_LOGPROBS),
    CUSTOM("suffix", refuse),
    CUSTOM("use_beam_search", refuse),
    {0},
};

static const struct field chat_fields[] = {
    GENERATION_FIELDS,
    CUSTOM("messages", read_messages),
    FLAG("add_generation_prompt", add_generation_prompt),
    FLAG("continue_final_message", continue_final_message),
    {"max_tokens", read_max_tokens, AT(max_tokens), 1, 0, false},
    {"max_completion_tokens", read_max_tokens, AT(max_completion_tokens), 1, 0, false},
    FLAG("logprobs", chat_logprobs),
    INT("top_logprobs", top_logprobs, 0, SAMPLER_MAX_TOP_LOGPROBS),
    CUSTOM("metadata", ignore_object),
    CUSTOM("store", ignore_bool),
    CUSTOM("service_tier", ignore_string),
    CUSTOM("safety_identifier", ignore_string),
    CUSTOM("prompt_cache_key", ignore_string),
    CUSTOM("prompt_cache_retention", ignore_string),
    CUSTOM("reasoning_effort", ignore_string),
    CUSTOM("verbosity", ignore_string),
    CUSTOM("parallel_tool_calls", ignore_bool),
    CUSTOM("modalities", refuse_modalities),
    CUSTOM("tools", refuse),
    CUSTOM("tool_choice", refuse_choice),
    CUSTOM("functions", refuse),
    CUSTOM("function_call", refuse_choice),
    CUSTOM("audio", refuse),
    CUSTOM("prediction", refuse),
    CUSTOM("web_search_options", refuse),
    CUSTOM("chat_template", refuse),
    {0},
};

static const struct field tokenize_fields[] = {
    {"model", read_string, AT(model), 0, 0, false},
    CUSTOM("prompt", read_text_prompt),
    CUSTOM("content", read_text_prompt),
    CUSTOM("messages", read_messages),
    FLAG("add_generation_prompt", add_generation_prompt),
    FLAG("continue_final_message", continue_final_message),
    FLAG("add_special_tokens", add_special_tokens),
    FLAG("add_special", add_special_tokens),
    FLAG("parse_special", parse_special),
    FLAG("return_token_strs", return_token_strings),
    FLAG("with_pieces", with_pieces),
    {0},
};

static const struct field detokenize_fields[] = {
    {"model", read_string, AT(model), 0, 0, false},
    CUSTOM("tokens", read_token_list),
    FLAG("skip_special_tokens", skip_special_tokens),
    {0},
};

static const struct field *const tables[CODEC_API_COUNT] = {
    [CODEC_COMPLETIONS] = completion_fields,
    [CODEC_CHAT] = chat_fields,
    [CODEC_TOKENIZE] = tokenize_fields,
    [CODEC_DETOKENIZE] = detokenize_fields,
};

/* The i-th of a table's names; *i becomes what is left to count. */
static const char *nth_name(const struct field *table, size_t *i)
{
    for (const struct field *f = table; f->name; f++)
        if ((*i)-- == 0)
            return f->name;
    return NULL;
}

const char *codec_field(enum codec_api api, size_t i)
{
    CHECK(api < CODEC_API_COUNT);
    return nth_name(tables[api], &i);
}

const char *codec_stream_option(size_t i)
{
    return nth_name(stream_options_fields, &i);
}

const char *codec_message_field(size_t i)
{
    return nth_name(message_fields, &i);
}

/* ---- rules between fields ---------------------------------------------------------------- */

static enum status check_stream(struct reader *r)
{
    struct codec_request *q = r->q;
    if (is_given(r, "stream_options") && !q->stream)
        return wrong(r, "stream_options", "invalid_parameter_combination",
                     "The 'stream_options' parameter is only allowed when 'stream' is enabled.");
    if (q->stream && q->best_of > q->n)
        return wrong(r, "best_of", "invalid_parameter_combination",
                     "'best_of' greater than 'n' cannot be streamed: the choices are not known "
                     "before all are complete.");
    return STATUS_OK;
}

static enum status check_choices(struct reader *r)
{
    struct codec_request *q = r->q;
    if (!is_given(r, "best_of"))
        q->best_of = q->n;
    if (q->best_of < q->n)
        return wrong(r, "best_of", "invalid_value",
                     "Invalid 'best_of': expected at least 'n' (%lld), but got %lld instead.",
                     (long long)q->n, (long long)q->best_of);
    int64_t n_prompts = q->n_prompts ? (int64_t)q->n_prompts : 1;
    if (n_prompts * q->best_of > r->context->max_choices)
        return wrong(r, q->best_of > q->n ? "best_of" : "n", "integer_above_max_value",
                     "This request asks for %lld sequences (prompts times choices); this server "
                     "permits %lld.",
                     (long long)(n_prompts * q->best_of), (long long)r->context->max_choices);
    return STATUS_OK;
}

static enum status check_max_tokens(struct reader *r)
{
    struct codec_request *q = r->q;
    if (q->max_tokens >= 0 && q->max_completion_tokens >= 0)
        return wrong(r, "max_tokens", "invalid_parameter_combination",
                     "Setting 'max_tokens' and 'max_completion_tokens' at the same time is not "
                     "supported.");
    if (q->max_completion_tokens >= 0)
        q->max_tokens = q->max_completion_tokens;
    if (q->max_tokens < 0) {
        q->max_tokens = q->api == CODEC_CHAT ? r->context->chat_max_tokens : 16;
        if (q->max_tokens < q->min_tokens && q->min_tokens <= r->context->max_tokens_limit)
            q->max_tokens = q->min_tokens;
    }
    if (q->min_tokens > q->max_tokens)
        return wrong(r, "min_tokens", "invalid_value",
                     "Invalid 'min_tokens': expected at most the output limit (%lld), but got %lld "
                     "instead.",
                     (long long)q->max_tokens, (long long)q->min_tokens);
    return STATUS_OK;
}

static enum status check_template_flags(struct reader *r)
{
    struct codec_request *q = r->q;
    if (!q->continue_final_message)
        return STATUS_OK;
    if (is_given(r, "add_generation_prompt") && q->add_generation_prompt)
        return wrong(r, "continue_final_message", "invalid_parameter_combination",
                     "'continue_final_message' and 'add_generation_prompt' cannot both be true.");
    q->add_generation_prompt = false;
    return STATUS_OK;
}

static enum status finish_completion(struct reader *r)
{
    if (!is_given(r, "prompt"))
        return missing(r, "prompt");
    enum status st = check_choices(r);
    if (!st)
        st = check_stream(r);
    return st ? st : check_max_tokens(r);
}

static enum status finish_chat(struct reader *r)
{
    struct codec_request *q = r->q;
    if (!is_given(r, "messages"))
        return missing(r, "messages");
    if (q->top_logprobs >= 0 && !q->chat_logprobs)
        return wrong(r, "top_logprobs", "invalid_parameter_combination",
                     "The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled.");
    if (q->chat_logprobs)
        q->n_logprobs = q->top_logprobs > 0 ? q->top_logprobs : 0;
    enum status st = check_choices(r);
    if (!st)
        st = check_stream(r);
    if (!st)
        st = check_template_flags(r);
    return st ? st : check_max_tokens(r);
}

static enum status finish_tokenize(struct reader *r)
{
    struct codec_request *q = r->q;
    bool prompt = is_given(r, "prompt"), content = is_given(r, "content"),
         messages = is_given(r, "messages");
    if (prompt + content + messages == 0)
        return missing(r, "prompt");
    if (prompt + content + messages > 1)
        return wrong(r, messages ? "messages" : "content", "invalid_parameter_combination",
                     "Exactly one of 'prompt', 'messages' and 'content' is expected.");
    /* vLLM adds special tokens to a prompt, llama-server none to a content. */
    if (!is_given(r, "add_special_tokens") && !is_given(r, "add_special"))
        q->add_special_tokens = prompt;
    return check_template_flags(r);
}

static enum status finish(struct reader *r)
{
    switch (r->q->api) {
    case CODEC_COMPLETIONS:
        return finish_completion(r);
    case CODEC_CHAT:
        return finish_chat(r);
    case CODEC_TOKENIZE:
        return finish_tokenize(r);
    default:
        return is_given(r, "tokens") ? STATUS_OK : missing(r, "tokens");
    }
}

static void set_defaults(struct codec_request *q, enum codec_api api, const struct codec_context *c)
{
    *q = (struct codec_request){
        .api = api,
        .add_generation_prompt = true,
        .add_special_tokens = api == CODEC_COMPLETIONS,
        .parse_special = true,
        .n = 1,
        .best_of = 1,
        .max_tokens = -1,
        .max_completion_tokens = -1,
        .skip_special_tokens = api == CODEC_COMPLETIONS || api == CODEC_CHAT,
        .n_logprobs = -1,
        .top_logprobs = -1,
        .temperature = c->temperature,
        .top_p = c->top_p,
        .min_p = c->min_p,
        .typical_p = c->typical_p,
        .repetition_penalty = c->repetition_penalty,
        .top_k = c->top_k,
    };
}

enum status codec_read(struct codec_request *out, enum codec_api api, const char *body, size_t n,
                       const struct codec_context *context, struct arena *a, struct error *err)
{
    set_defaults(out, api, context);
    struct reader r = {out, context, a, err, body, n};
    struct json_limits limits = {
        .max_depth = CODEC_MAX_DEPTH,
        .max_values = (size_t)context->max_prompt_tokens + EXTRA_VALUES,
        .any_integer = true,
    };
    enum status st = json_check(body, n, &limits, err);
    if (st == STATUS_INVALID) {
        fail_context(err, "We could not parse the JSON body of your request");
        return st;
    }
    if (st)
        return st;
    cJSON *tree = cJSON_ParseWithLength(body, n);
    if (!tree)
        return no_memory(&r);
    out->tree = tree;
    if (!cJSON_IsObject(tree))
        return fail(err, STATUS_INVALID, "The body of the request is %s; expected a JSON object.",
                    type_name(tree));
    st = read_members(&r, tables[api], tree, "", out);
    return st ? st : finish(&r);
}

void codec_request_free(struct codec_request *q)
{
    cJSON_Delete(q->tree);
    q->tree = NULL;
}
