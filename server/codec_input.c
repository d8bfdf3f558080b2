/* codec_input.c - what a request is about: prompts and messages. See codec_private.h. */
#include "server/codec_private.h"

#include <math.h>
#include <string.h>

enum { MAX_MESSAGES = 65536 };

/* ---- prompts ---------------------------------------------------------------------------- */

static enum status read_ids(struct reader *r, const cJSON *array, const char *path,
                            struct codec_prompt *out)
{
    size_t n = (size_t)cJSON_GetArraySize(array), i = 0;
    int32_t *ids = arena_take_array(r->arena, n, sizeof(*ids));
    if (!ids)
        return codec_no_memory(r);
    const cJSON *v;
    cJSON_ArrayForEach(v, array)
    {
        /* The path is built for what is wrong only: there may be a million ids. */
        bool fits = cJSON_IsNumber(v) && v->valuedouble == floor(v->valuedouble) &&
                    v->valuedouble >= 0 && v->valuedouble < r->context->vocab_size;
        enum status st = fits ? STATUS_OK : codec_read_id(r, v, codec_index(path, i).text, &ids[i]);
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
        return codec_wrong_type(r, path, "a string or an array of integers", v);
    *out = (struct codec_prompt){.text = {v->valuestring, strlen(v->valuestring)}};
    return STATUS_OK;
}

static enum status take_prompts(struct reader *r, size_t n)
{
    r->q->prompts = arena_take_array(r->arena, n, sizeof(*r->q->prompts));
    r->q->n_prompts = n;
    return r->q->prompts ? STATUS_OK : codec_no_memory(r);
}

/* A string, an array of ids, or an array of either. */
enum status field_prompt(struct reader *r, const struct field *f, const cJSON *v, const char *path,
                         void *target)
{
    (void)f, (void)target;
    bool many = cJSON_IsArray(v) && (cJSON_IsString(v->child) || cJSON_IsArray(v->child));
    if (!cJSON_IsString(v) && !cJSON_IsArray(v))
        return codec_wrong_type(r, path, "a string or an array", v);
    if (cJSON_IsArray(v) && !v->child)
        return codec_wrong(r, path, "empty_array",
                           "Invalid '%s': empty array. Expected an array with minimum length 1.",
                           path);
    size_t n = many ? (size_t)cJSON_GetArraySize(v) : 1, i = 0;
    if (n > (size_t)r->context->max_choices)
        return codec_check_length(r, path, v, (int)r->context->max_choices);
    enum status st = take_prompts(r, n);
    if (st || !many)
        return st ? st : read_one_prompt(r, v, path, r->q->prompts);
    const cJSON *item;
    cJSON_ArrayForEach(item, v)
    {
        if (!st)
            st = read_one_prompt(r, item, codec_index(path, i).text, &r->q->prompts[i]);
        i++;
    }
    return st;
}

enum status field_text_prompt(struct reader *r, const struct field *f, const cJSON *v,
                              const char *path, void *target)
{
    (void)f, (void)target;
    if (!cJSON_IsString(v))
        return codec_wrong_type(r, path, "a string", v);
    enum status st = take_prompts(r, 1);
    return st ? st : read_one_prompt(r, v, path, r->q->prompts);
}

enum status field_token_list(struct reader *r, const struct field *f, const cJSON *v,
                             const char *path, void *target)
{
    (void)f, (void)target;
    if (!cJSON_IsArray(v))
        return codec_wrong_type(r, path, "an array of integers", v);
    enum status st = take_prompts(r, 1);
    return st ? st : read_ids(r, v, path, r->q->prompts);
}

/* ---- messages --------------------------------------------------------------------------- */

enum status field_role(struct reader *r, const struct field *f, const cJSON *v, const char *path,
                       void *target)
{
    (void)f;
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
        return codec_wrong_type(r, path, "a string", v);
    for (size_t i = 0; i < sizeof(roles) / sizeof(*roles); i++)
        if (!strcmp(v->valuestring, roles[i].name)) {
            ((struct chat_message *)target)->role = roles[i].role;
            return STATUS_OK;
        }
    return codec_wrong(
        r, path, "invalid_value",
        "Invalid value for '%s': '%.*s'. Supported values are: 'system', 'developer', "
        "'user', and 'assistant'.",
        path, (int)codec_clip(v->valuestring).n, v->valuestring);
}

/* The text of one part of a content array. */
static enum status read_part(struct reader *r, const cJSON *part, const char *path,
                             const struct chat_message *message, const char **text)
{
    (void)message;
    if (!cJSON_IsObject(part))
        return codec_wrong_type(r, path, "an object", part);
    const char *type = NULL;
    enum status st = codec_required_text(r, part, path, "type", &type);
    if (st)
        return st;
    if (!strcmp(type, "text") || !strcmp(type, "refusal")) /* the text's member is named so too */
        return codec_required_text(r, part, path, type, text);
    struct path p = codec_path(path, "type");
    return codec_wrong(r, p.text, "invalid_value",
                       "Invalid value for '%s': '%.*s'. This model reads text only; supported "
                       "values are: 'text' and 'refusal'.",
                       p.text, (int)codec_clip(type).n, type);
}

/* Join text parts with newlines, as other servers of text models do. */
enum status codec_join_parts(struct reader *r, const cJSON *parts, const char *path,
                             part_read *read, struct chat_message *out)
{
    size_t total = 0, i = 0;
    const cJSON *part;
    const char *text = NULL;
    cJSON_ArrayForEach(part, parts)
    {
        enum status st = read(r, part, codec_index(path, i++).text, out, &text);
        if (st)
            return st;
        total += strlen(text) + 1;
    }
    if (!total)
        return codec_wrong(r, path, "empty_array",
                           "Invalid '%s': empty array. Expected an array with minimum length 1.",
                           path);
    char *joined = arena_take(r->arena, total), *end = joined;
    if (!joined)
        return codec_no_memory(r);
    cJSON_ArrayForEach(part, parts)
    {
        read(r, part, path, out, &text);
        end = stpcpy(end, text);
        *end++ = '\n';
    }
    end[-1] = '\0';
    out->content = joined;
    out->n = total - 1;
    return STATUS_OK;
}

static enum status field_content(struct reader *r, const struct field *f, const cJSON *v,
                                 const char *path, void *target)
{
    (void)f;
    struct chat_message *out = target;
    if (cJSON_IsArray(v))
        return codec_join_parts(r, v, path, read_part, out);
    if (!cJSON_IsString(v))
        return codec_wrong_type(r, path, "a string or an array of text parts", v);
    out->content = v->valuestring;
    out->n = strlen(v->valuestring);
    return STATUS_OK;
}

const struct field codec_message_fields[] = {
    {"role", field_role, 0, 0, 0},
    {"content", field_content, 0, 0, 0},
    {"name", field_ignore_string, 0, 0, 0},
    {"refusal", field_ignore_string, 0, 0, 0},
    {"tool_calls", field_refuse, 0, 0, 0},
    {"function_call", field_refuse, 0, 0, 0},
    {"audio", field_refuse, 0, 0, 0},
    {"annotations", field_refuse, 0, 0, 0}, /* empty in our own replies, which come back */
    {0},
};

static enum status read_message(struct reader *r, const cJSON *v, const char *path,
                                struct chat_message *out)
{
    if (!cJSON_IsObject(v))
        return codec_wrong_type(r, path, "an object", v);
    static const char *const required[] = {"role", "content"};
    enum status st = codec_read_members(r, codec_message_fields, v, path, out);
    for (int i = 0; !st && i < 2; i++)
        if (!codec_member(v, required[i]))
            st = codec_missing(r, codec_path(path, required[i]).text);
    return st;
}

enum status field_messages(struct reader *r, const struct field *f, const cJSON *v,
                           const char *path, void *target)
{
    (void)f, (void)target;
    struct codec_request *q = r->q;
    if (!cJSON_IsArray(v))
        return codec_wrong_type(r, path, "an array of objects", v);
    if (!v->child)
        return codec_wrong(r, path, "empty_array",
                           "Invalid '%s': empty array. Expected an array with minimum length 1.",
                           path);
    enum status st = codec_check_length(r, path, v, MAX_MESSAGES);
    if (st)
        return st;
    size_t n = (size_t)cJSON_GetArraySize(v);
    q->messages = arena_take_array(r->arena, n, sizeof(*q->messages));
    if (!q->messages)
        return codec_no_memory(r);
    const cJSON *item;
    cJSON_ArrayForEach(item, v)
    {
        st = read_message(r, item, codec_index(path, q->n_messages).text,
                          &q->messages[q->n_messages]);
        if (st)
            return st;
        q->n_messages++;
    }
    return STATUS_OK;
}
