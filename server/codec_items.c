/* codec_items.c - the Responses API's input as messages and as items, and what a response repeats
 * of its request. See codec_private.h. */
#include <stdio.h>
#include <string.h>

#include "server/codec_private.h"

enum {
    MAX_ITEMS = 65536,
    MAX_METADATA = 16, /* pairs, and their lengths: OpenAI's */
    MAX_KEY = 64,
    MAX_VALUE = 512,
};

/* ---- input ------------------------------------------------------------------------------ */

/* What an assistant says is output, also where it comes back as input. */
static enum status read_part(struct reader *r, const cJSON *part, const char *path,
                             const struct chat_message *message, const char **text)
{
    if (!cJSON_IsObject(part))
        return codec_wrong_type(r, path, "an object", part);
    const char *type = NULL;
    enum status st = codec_required_text(r, part, path, "type", &type);
    bool assistant = message->role == CHAT_ROLE_ASSISTANT;
    if (st)
        return st;
    if (assistant && !strcmp(type, "refusal"))
        return codec_required_text(r, part, path, "refusal", text);
    if (!strcmp(type, assistant ? "output_text" : "input_text"))
        return codec_required_text(r, part, path, "text", text);
    struct path p = codec_path(path, "type");
    return codec_wrong(r, p.text, "invalid_value",
                       "Invalid value for '%s': '%.*s'. This model reads text only; supported "
                       "values for this role are: %s.",
                       p.text, (int)codec_clip(type).n, type,
                       assistant ? "'output_text' and 'refusal'" : "'input_text'");
}

static enum status check_item_type(struct reader *r, const cJSON *item, const char *path)
{
    const cJSON *type = codec_member(item, "type");
    struct path p = codec_path(path, "type");
    if (!type)
        return STATUS_OK;
    if (!cJSON_IsString(type))
        return codec_wrong_type(r, p.text, "a string", type);
    if (!strcmp(type->valuestring, "message"))
        return STATUS_OK;
    return codec_wrong(r, p.text, "invalid_value",
                       "Invalid value for '%s': '%.*s'. Items of this type are not supported by "
                       "this server; supported values are: 'message'.",
                       p.text, (int)codec_clip(type->valuestring).n, type->valuestring);
}

static enum status field_later(struct reader *r, const struct field *f, const cJSON *v,
                               const char *path, void *target)
{
    (void)r, (void)f, (void)v, (void)path, (void)target;
    return STATUS_OK;
}

static const struct field item_fields[] = {
    {"type", field_later, 0, 0, 0},
    {"role", field_role, 0, 0, 0},
    {"content", field_later, 0, 0, 0},
    {"id", field_ignore_string, 0, 0, 0},
    {"status", field_ignore_string, 0, 0, 0},
    {"phase", field_ignore_string, 0, 0, 0},
    {0},
};

const char *codec_item_field(size_t i)
{
    return i < sizeof(item_fields) / sizeof(*item_fields) ? item_fields[i].name : NULL;
}

static enum status read_item(struct reader *r, const cJSON *item, const char *path,
                             struct chat_message *out)
{
    static const char *const required[] = {"role", "content"};
    if (!cJSON_IsObject(item))
        return codec_wrong_type(r, path, "an object", item);
    enum status st = check_item_type(r, item, path);
    if (!st)
        st = codec_read_members(r, item_fields, item, path, out);
    for (int i = 0; !st && i < 2; i++)
        if (!codec_member(item, required[i]))
            st = codec_missing(r, codec_path(path, required[i]).text);
    if (st)
        return st;
    const cJSON *content = codec_member(item, "content");
    struct path p = codec_path(path, "content");
    if (cJSON_IsArray(content))
        return codec_join_parts(r, content, p.text, read_part, out);
    if (!cJSON_IsString(content))
        return codec_wrong_type(r, p.text, "a string or an array of text parts", content);
    out->content = content->valuestring;
    out->n = strlen(content->valuestring);
    return STATUS_OK;
}

/* A place is left in front for the instructions. */
static enum status take_messages(struct reader *r, size_t n)
{
    struct chat_message *messages = arena_take_array(r->arena, n + 1, sizeof(*messages));
    if (!messages)
        return codec_no_memory(r);
    r->q->messages = messages + 1;
    return STATUS_OK;
}

enum status field_input(struct reader *r, const struct field *f, const cJSON *v, const char *path,
                        void *target)
{
    (void)f, (void)target;
    struct codec_request *q = r->q;
    if (!cJSON_IsString(v) && !cJSON_IsArray(v))
        return codec_wrong_type(r, path, "a string or an array of items", v);
    if (cJSON_IsArray(v) && !v->child)
        return codec_wrong(r, path, "empty_array",
                           "Invalid '%s': empty array. Expected an array with minimum length 1.",
                           path);
    enum status st = cJSON_IsArray(v) ? codec_check_length(r, path, v, MAX_ITEMS) : STATUS_OK;
    if (!st)
        st = take_messages(r, cJSON_IsArray(v) ? (size_t)cJSON_GetArraySize(v) : 1);
    if (!st && cJSON_IsString(v)) {
        q->messages[q->n_messages++] =
            (struct chat_message){CHAT_ROLE_USER, v->valuestring, strlen(v->valuestring)};
        return STATUS_OK;
    }
    const cJSON *item;
    cJSON_ArrayForEach(item, v)
    {
        if (!st)
            st = read_item(r, item, codec_index(path, q->n_messages).text,
                           &q->messages[q->n_messages]);
        q->n_messages += !st;
    }
    return st;
}

/* ---- other fields ----------------------------------------------------------------------- */

/* What is asked for that a response of text never has costs nothing. */
enum status field_include(struct reader *r, const struct field *f, const cJSON *v, const char *path,
                          void *target)
{
    (void)f, (void)target;
    static const char *const known[] = {
        "message.output_text.logprobs",
        "message.input_image.image_url",
        "reasoning.encrypted_content",
        "file_search_call.results",
        "web_search_call.results",
        "web_search_call.action.sources",
        "computer_call_output.output.image_url",
        "code_interpreter_call.outputs",
    };
    enum { N_KNOWN = sizeof(known) / sizeof(*known) };
    if (!cJSON_IsArray(v))
        return codec_wrong_type(r, path, "an array of strings", v);
    size_t at = 0;
    const cJSON *item;
    cJSON_ArrayForEach(item, v)
    {
        struct path p = codec_index(path, at++);
        size_t i = 0;
        if (!cJSON_IsString(item))
            return codec_wrong_type(r, p.text, "a string", item);
        while (i < N_KNOWN && strcmp(known[i], item->valuestring))
            i++;
        if (i == N_KNOWN)
            return codec_wrong(r, p.text, "invalid_value", "Invalid value for '%s': '%.*s'.",
                               p.text, (int)codec_clip(item->valuestring).n, item->valuestring);
        r->q->chat_logprobs |= i == 0;
    }
    return STATUS_OK;
}

enum status field_metadata(struct reader *r, const struct field *f, const cJSON *v,
                           const char *path, void *target)
{
    (void)f, (void)target;
    if (!cJSON_IsObject(v))
        return codec_wrong_type(r, path, "an object", v);
    enum status st = codec_check_length(r, path, v, MAX_METADATA);
    const cJSON *item;
    cJSON_ArrayForEach(item, v)
    {
        struct path p = codec_path(path, item->string);
        if (!st && !cJSON_IsString(item))
            st = codec_wrong_type(r, p.text, "a string", item);
        if (!st && (strlen(item->string) > MAX_KEY || strlen(item->valuestring) > MAX_VALUE))
            st = codec_wrong(r, p.text, "string_above_max_length",
                             "Invalid '%s': string too long. Expected keys of at most %d bytes "
                             "and values of at most %d.",
                             path, MAX_KEY, MAX_VALUE);
    }
    return st;
}

/* One of the words in choices[], which NULL ends. */
static enum status read_word(struct reader *r, const cJSON *v, const char *path,
                             const char *const *choices)
{
    if (!cJSON_IsString(v))
        return codec_wrong_type(r, path, "a string", v);
    for (; *choices; choices++)
        if (!strcmp(*choices, v->valuestring))
            return STATUS_OK;
    return codec_wrong(r, path, "invalid_value", "Invalid value for '%s': '%.*s'.", path,
                       (int)codec_clip(v->valuestring).n, v->valuestring);
}

/* "auto" may drop the beginning of what a model has no room for; here everything has room. */
enum status field_truncation(struct reader *r, const struct field *f, const cJSON *v,
                             const char *path, void *target)
{
    (void)f, (void)target;
    static const char *const words[] = {"disabled", "auto", NULL};
    return read_word(r, v, path, words);
}

static enum status field_verbosity(struct reader *r, const struct field *f, const cJSON *v,
                                   const char *path, void *target)
{
    (void)f, (void)target;
    static const char *const words[] = {"low", "medium", "high", NULL};
    return read_word(r, v, path, words);
}

static enum status field_format(struct reader *r, const struct field *f, const cJSON *v,
                                const char *path, void *target)
{
    (void)f, (void)target;
    static const char *const words[] = {"text", NULL};
    struct path p = codec_path(path, "type");
    if (!cJSON_IsObject(v))
        return codec_wrong_type(r, path, "an object", v);
    const cJSON *type = codec_member(v, "type");
    return type ? read_word(r, type, p.text, words) : codec_missing(r, p.text);
}

enum status field_text_options(struct reader *r, const struct field *f, const cJSON *v,
                               const char *path, void *target)
{
    (void)f;
    static const struct field fields[] = {
        {"format", field_format, 0, 0, 0},
        {"verbosity", field_verbosity, 0, 0, 0},
        {0},
    };
    if (!cJSON_IsObject(v))
        return codec_wrong_type(r, path, "an object", v);
    return codec_read_members(r, fields, v, path, target);
}

/* This model does not reason: members that ask for none are fine. */
enum status field_reasoning(struct reader *r, const struct field *f, const cJSON *v,
                            const char *path, void *target)
{
    (void)f, (void)target;
    static const char *const words[] = {"none", NULL};
    if (!cJSON_IsObject(v))
        return codec_wrong_type(r, path, "an object", v);
    const cJSON *item;
    cJSON_ArrayForEach(item, v)
    {
        struct path p = codec_path(path, item->string);
        if (cJSON_IsNull(item) ||
            (!strcmp(item->string, "effort") && !read_word(r, item, p.text, words)))
            continue;
        return codec_wrong(r, p.text, "unsupported_parameter",
                           "'%s' is not supported by this server: the model does not reason.",
                           p.text);
    }
    return STATUS_OK;
}

enum status field_obfuscation(struct reader *r, const struct field *f, const cJSON *v,
                              const char *path, void *target)
{
    (void)f;
    static const struct field fields[] = {{"include_obfuscation", field_refuse, 0, 0, 0}, {0}};
    if (!cJSON_IsObject(v))
        return codec_wrong_type(r, path, "an object", v);
    return codec_read_members(r, fields, v, path, target);
}

/* ---- items ------------------------------------------------------------------------------ */

static void write_text(struct bytes *out, const char *text)
{
    bytes_json_string(out, text, strlen(text));
}

static void write_part(struct bytes *out, const char *type, const char *text)
{
    bytes_format(out, "{\"type\":\"%s\",\"%s\":", type,
                 strcmp(type, "refusal") ? "text" : "refusal");
    write_text(out, text);
    bytes_text(out, strcmp(type, "output_text") ? "}" : ",\"annotations\":[]}");
}

static void write_item(struct bytes *out, const char *role, const cJSON *content)
{
    bytes_format(out, "\"type\":\"message\",\"status\":\"completed\",\"role\":\"%s\",\"content\":[",
                 role);
    if (cJSON_IsString(content))
        write_part(out, strcmp(role, "assistant") ? "input_text" : "output_text",
                   content->valuestring);
    for (const cJSON *part = cJSON_IsArray(content) ? content->child : NULL; part;
         part = part->next) {
        const char *type = codec_member(part, "type")->valuestring;
        const char *name = strcmp(type, "refusal") ? "text" : "refusal";
        write_part(out, type, codec_member(part, name)->valuestring);
        bytes_text(out, part->next ? "," : "");
    }
    bytes_text(out, "]\n");
}

static void write_items(struct codec_request *q)
{
    const cJSON *input = codec_member(q->tree, "input");
    if (cJSON_IsString(input)) {
        write_item(&q->items, "user", input);
        q->n_items = 1;
        return;
    }
    const cJSON *item;
    cJSON_ArrayForEach(item, input)
    {
        write_item(&q->items, codec_member(item, "role")->valuestring,
                   codec_member(item, "content"));
        q->n_items++;
    }
}

/* ---- what a response repeats ------------------------------------------------------------ */

/* ,"name": and the value as it came, or what stands for it when it is absent. */
static void repeat(struct codec_request *q, const char *name, const char *otherwise)
{
    const cJSON *v = codec_member(q->tree, name);
    char *text = v ? cJSON_PrintUnformatted(v) : NULL;
    bytes_format(&q->repeated, ",\"%s\":", name);
    bytes_text(&q->repeated, text ? text : otherwise);
    q->repeated.failed |= v && !text;
    cJSON_free(text);
}

static void write_number(struct bytes *out, const char *name, double value)
{
    bytes_format(out, ",\"%s\":", name);
    bytes_json_number(out, value);
}

static void write_echo(struct codec_request *q)
{
    struct bytes *out = &q->repeated;
    const cJSON *text = codec_member(q->tree, "text"), *verbosity = codec_member(text, "verbosity");
    repeat(q, "instructions", "null");
    repeat(q, "max_output_tokens", "null");
    repeat(q, "max_tool_calls", "null");
    repeat(q, "metadata", "{}");
    repeat(q, "parallel_tool_calls", "true");
    repeat(q, "previous_response_id", "null");
    repeat(q, "prompt_cache_key", "null");
    bytes_text(out, ",\"reasoning\":{\"effort\":null,\"summary\":null}");
    repeat(q, "safety_identifier", "null");
    bytes_format(out, ",\"service_tier\":\"default\",\"store\":%s", q->store ? "true" : "false");
    write_number(out, "temperature", q->temperature);
    bytes_format(out, ",\"text\":{\"format\":{\"type\":\"text\"},\"verbosity\":\"%s\"}",
                 verbosity ? verbosity->valuestring : "medium");
    repeat(q, "tool_choice", "\"auto\"");
    bytes_text(out, ",\"tools\":[]");
    bytes_format(out, ",\"top_logprobs\":%lld", (long long)(q->n_logprobs > 0 ? q->n_logprobs : 0));
    write_number(out, "top_p", q->top_p);
    repeat(q, "truncation", "\"disabled\"");
    repeat(q, "user", "null");
}

enum status codec_finish_response(struct reader *r)
{
    struct codec_request *q = r->q;
    if (q->instructions && !*q->instructions)
        q->instructions = NULL;
    write_items(q);
    write_echo(q);
    if (q->instructions && !q->previous_response_id) {
        *--q->messages =
            (struct chat_message){CHAT_ROLE_SYSTEM, q->instructions, strlen(q->instructions)};
        q->n_messages++;
    }
    return q->repeated.failed || q->items.failed ? codec_no_memory(r) : STATUS_OK;
}
