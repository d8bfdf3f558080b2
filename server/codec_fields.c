/* codec_fields.c - the fields of every API: one table each. See codec_private.h. */
#include "server/codec_private.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/json.h"

/* ---- fields with rules of their own ------------------------------------------------------ */

static enum status field_max_tokens(struct reader *r, const struct field *f, const cJSON *v,
                                    const char *path, void *target)
{
    struct field bounded = *f;
    bounded.max = (double)r->context->max_tokens_limit;
    return field_int(r, &bounded, v, path, target);
}

/* A double would round large seeds, so the digits come from the body's text. */
static enum status field_seed(struct reader *r, const struct field *f, const cJSON *v,
                              const char *path, void *target)
{
    (void)f, (void)target;
    size_t n = 0;
    const char *digits = json_member(r->body, r->n_body, "seed", &n);
    if (!cJSON_IsNumber(v) || !digits || v->valuedouble != floor(v->valuedouble))
        return codec_wrong_type(r, path, "an integer", v);
    char text[80];
    snprintf(text, sizeof(text), "%.*s", (int)n, digits);
    errno = 0;
    bool plain = !strpbrk(text, ".eE");
    long long seed = plain ? strtoll(text, NULL, 10) : 0;
    if (errno == ERANGE || (!plain && fabs(v->valuedouble) >= 0x1p63))
        return codec_wrong(r, path, "integer_out_of_range",
                           "Invalid '%s': expected an integer of 64 bits with sign.", path);
    r->q->seed = (uint64_t)(plain ? seed : (long long)v->valuedouble);
    r->q->has_seed = true;
    return STATUS_OK;
}

static enum status add_stop(struct reader *r, const cJSON *v, const char *path)
{
    struct codec_request *q = r->q;
    if (!cJSON_IsString(v))
        return codec_wrong_type(r, path, "a string", v);
    size_t n = strlen(v->valuestring);
    if (!n)
        return codec_wrong(
            r, path, "empty_string",
            "Invalid '%s': empty string. Expected a string with at least one character.", path);
    if (n > CODEC_MAX_STOP_BYTES)
        return codec_wrong(r, path, "string_above_max_length",
                           "Invalid '%s': string too long. Expected at most %d bytes, but got %zu "
                           "instead.",
                           path, CODEC_MAX_STOP_BYTES, n);
    const char *copy = arena_copy(r->arena, v->valuestring, n);
    if (!copy)
        return codec_no_memory(r);
    q->stops[q->n_stops++] = (struct codec_text){copy, n};
    return STATUS_OK;
}

static enum status field_stop(struct reader *r, const struct field *f, const cJSON *v,
                              const char *path, void *target)
{
    (void)f, (void)target;
    if (cJSON_IsString(v))
        return add_stop(r, v, path);
    if (!cJSON_IsArray(v))
        return codec_wrong_type(r, path, "a string or an array of strings", v);
    enum status st = codec_check_length(r, path, v, CODEC_MAX_STOPS);
    const cJSON *item;
    cJSON_ArrayForEach(item, v)
    {
        if (!st)
            st = add_stop(r, item, codec_index(path, (size_t)r->q->n_stops).text);
    }
    return st;
}

static enum status field_stop_ids(struct reader *r, const struct field *f, const cJSON *v,
                                  const char *path, void *target)
{
    (void)f, (void)target;
    struct codec_request *q = r->q;
    if (!cJSON_IsArray(v))
        return codec_wrong_type(r, path, "an array of integers", v);
    /* Room is left for the few that a chat template adds. */
    enum status st = codec_check_length(r, path, v, SAMPLER_MAX_STOP_TOKENS - 4);
    const cJSON *item;
    cJSON_ArrayForEach(item, v)
    {
        struct path p = codec_index(path, (size_t)q->n_stop_tokens);
        if (!st)
            st = codec_read_id(r, item, p.text, &q->stop_tokens[q->n_stop_tokens]);
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

static enum status field_logit_bias(struct reader *r, const struct field *f, const cJSON *v,
                                    const char *path, void *target)
{
    (void)target;
    struct codec_request *q = r->q;
    if (!cJSON_IsObject(v))
        return codec_wrong_type(r, path, "an object", v);
    enum status st = codec_check_length(r, path, v, SAMPLER_MAX_LOGIT_BIAS);
    if (st)
        return st;
    q->logit_bias =
        arena_take_array(r->arena, (size_t)cJSON_GetArraySize(v) + 1, sizeof(*q->logit_bias));
    if (!q->logit_bias)
        return codec_no_memory(r);
    const struct field value = {.min = f->min, .max = f->max};
    const cJSON *item;
    cJSON_ArrayForEach(item, v)
    {
        struct path p = codec_path(path, item->string);
        int32_t id = id_of_key(item->string, r->context->vocab_size);
        double bias = 0;
        if (id < 0)
            return codec_wrong(
                r, p.text, "invalid_token_id",
                "Invalid key in '%s': expected a token id from \"0\" to \"%d\", but got "
                "\"%.*s\" instead.",
                path, r->context->vocab_size - 1, (int)codec_clip(item->string).n, item->string);
        st = field_number(r, &value, item, p.text, &bias);
        if (st)
            return st;
        q->logit_bias[q->n_logit_bias++] =
            (struct logit_bias){id, bias <= -100 ? -INFINITY : (float)bias};
    }
    return STATUS_OK;
}

static const struct field stream_options_fields[] = {
    {"include_usage", field_bool, offsetof(struct codec_request, include_usage), 0, 0},
    {"continuous_usage_stats", field_bool, offsetof(struct codec_request, continuous_usage), 0, 0},
    {0},
};

static enum status field_stream_options(struct reader *r, const struct field *f, const cJSON *v,
                                        const char *path, void *target)
{
    (void)f;
    if (!cJSON_IsObject(v))
        return codec_wrong_type(r, path, "an object", v);
    return codec_read_members(r, stream_options_fields, v, path, target);
}

static const struct field from_fields[] = {
    {"preset", field_string, offsetof(struct codec_request, from_preset), 0, 0},
    {0},
};

/* What a request begins with must not be overlooked: a member that is unknown is an error. */
static enum status field_from(struct reader *r, const struct field *f, const cJSON *v,
                              const char *path, void *target)
{
    (void)f;
    if (!cJSON_IsObject(v))
        return codec_wrong_type(r, path, "an object", v);
    const cJSON *item;
    cJSON_ArrayForEach(item, v)
    {
        struct path p = codec_path(path, item->string);
        if (strcmp(item->string, "preset"))
            return codec_wrong(r, p.text, "unknown_parameter",
                               "Unknown parameter: '%s'. A request begins from a 'preset'.",
                               p.text);
    }
    enum status st = codec_read_members(r, from_fields, v, path, target);
    if (!st && !r->q->from_preset)
        st = codec_missing(r, codec_path(path, "preset").text);
    return st;
}

static enum status field_response_format(struct reader *r, const struct field *f, const cJSON *v,
                                         const char *path, void *target)
{
    (void)f, (void)target;
    if (!cJSON_IsObject(v))
        return codec_wrong_type(r, path, "an object", v);
    const char *type = NULL;
    enum status st = codec_required_text(r, v, path, "type", &type);
    struct path p = codec_path(path, "type");
    if (!st && strcmp(type, "text"))
        st = codec_wrong(r, p.text, "invalid_value",
                         "Invalid value for '%s': '%.*s'. Supported values are: 'text'.", p.text,
                         (int)codec_clip(type).n, type);
    return st;
}

static enum status field_refuse_modalities(struct reader *r, const struct field *f, const cJSON *v,
                                           const char *path, void *target)
{
    (void)f, (void)target;
    if (!cJSON_IsArray(v))
        return codec_wrong_type(r, path, "an array", v);
    const cJSON *item;
    cJSON_ArrayForEach(item, v)
    {
        if (!cJSON_IsString(item) || strcmp(item->valuestring, "text"))
            return codec_wrong(r, path, "invalid_value",
                               "Invalid value for '%s'. Supported values are: 'text'.", path);
    }
    return STATUS_OK;
}

/* ---- the tables ------------------------------------------------------------------------- */

#define AT(member) offsetof(struct codec_request, member)
#define FLAG(name, member)                                                                         \
    {                                                                                              \
        name, field_bool, AT(member), 0, 0                                                         \
    }
#define INT(name, member, min, max)                                                                \
    {                                                                                              \
        name, field_int, AT(member), min, max                                                      \
    }
#define NUMBER(name, member, min, max)                                                             \
    {                                                                                              \
        name, field_number, AT(member), min, max                                                   \
    }
#define CUSTOM(name, read)                                                                         \
    {                                                                                              \
        name, read, 0, 0, 0                                                                        \
    }

/* What all generating APIs take. */
#define SAMPLING_FIELDS                                                                            \
    {"model", field_string, AT(model), 0, 0}, FLAG("stream", stream),                              \
        NUMBER("temperature", temperature, 0, 2), NUMBER("top_p", top_p, 0, 1),                    \
        INT("top_k", top_k, -1, INT32_MAX), NUMBER("min_p", min_p, 0, 1),                          \
        NUMBER("typical_p", typical_p, 1e-6, 1),                                                   \
        NUMBER("repetition_penalty", repetition_penalty, 1e-3, 1000),                              \
        NUMBER("presence_penalty", presence_penalty, -2, 2),                                       \
        NUMBER("frequency_penalty", frequency_penalty, -2, 2), CUSTOM("seed", field_seed),         \
        {"logit_bias", field_logit_bias, 0, -100, 100}, CUSTOM("stop", field_stop),                \
        CUSTOM("stop_token_ids", field_stop_ids),                                                  \
        FLAG("include_stop_str_in_output", include_stop),                                          \
        INT("min_tokens", min_tokens, 0, INT32_MAX), FLAG("ignore_eos", ignore_eos),               \
        FLAG("skip_special_tokens", skip_special_tokens),                                          \
        FLAG("add_special_tokens", add_special_tokens),                                            \
        FLAG("return_token_ids", return_token_ids), CUSTOM("user", field_ignore_string)

/* What completions and chat take. */
#define GENERATION_FIELDS                                                                          \
    SAMPLING_FIELDS, INT("n", n, 1, CODEC_MAX_N), FLAG("resumable", resumable),                    \
        FLAG("queue", queue), {"session_id", field_string, AT(session_id), 0, 0},                  \
        CUSTOM("from", field_from), {"state", field_text, AT(state), 0, 0},                        \
        FLAG("return_state", return_state), CUSTOM("store", field_ignore_bool),                    \
        CUSTOM("stream_options", field_stream_options),                                            \
        CUSTOM("response_format", field_response_format)

static const struct field completion_fields[] = {
    GENERATION_FIELDS,
    CUSTOM("prompt", field_prompt),
    INT("best_of", best_of, 1, CODEC_MAX_N),
    {"max_tokens", field_max_tokens, AT(max_tokens), 0, 0},
    FLAG("echo", echo),
    INT("logprobs", n_logprobs, 0, SAMPLER_MAX_TOP_LOGPROBS),
    CUSTOM("suffix", field_refuse),
    CUSTOM("use_beam_search", field_refuse),
    {0},
};

static const struct field chat_fields[] = {
    GENERATION_FIELDS,
    CUSTOM("messages", field_messages),
    FLAG("add_generation_prompt", add_generation_prompt),
    FLAG("continue_final_message", continue_final_message),
    {"max_tokens", field_max_tokens, AT(max_tokens), 1, 0},
    {"max_completion_tokens", field_max_tokens, AT(max_completion_tokens), 1, 0},
    FLAG("logprobs", chat_logprobs),
    INT("top_logprobs", top_logprobs, 0, SAMPLER_MAX_TOP_LOGPROBS),
    CUSTOM("metadata", field_ignore_object),
    CUSTOM("service_tier", field_ignore_string),
    CUSTOM("safety_identifier", field_ignore_string),
    CUSTOM("prompt_cache_key", field_ignore_string),
    CUSTOM("prompt_cache_retention", field_ignore_string),
    CUSTOM("reasoning_effort", field_ignore_string),
    CUSTOM("verbosity", field_ignore_string),
    CUSTOM("parallel_tool_calls", field_ignore_bool),
    CUSTOM("modalities", field_refuse_modalities),
    CUSTOM("tools", field_refuse),
    CUSTOM("tool_choice", field_refuse_choice),
    CUSTOM("functions", field_refuse),
    CUSTOM("function_call", field_refuse_choice),
    CUSTOM("audio", field_refuse),
    CUSTOM("prediction", field_refuse),
    CUSTOM("web_search_options", field_refuse),
    CUSTOM("chat_template", field_refuse),
    {0},
};

static const struct field response_fields[] = {
    SAMPLING_FIELDS,
    CUSTOM("input", field_input),
    {"instructions", field_string, AT(instructions), 0, 0},
    {"previous_response_id", field_string, AT(previous_response_id), 0, 0},
    FLAG("store", store),
    {"max_output_tokens", field_max_tokens, AT(max_tokens), 1, 0},
    CUSTOM("include", field_include),
    INT("top_logprobs", top_logprobs, 0, SAMPLER_MAX_TOP_LOGPROBS),
    CUSTOM("metadata", field_metadata),
    CUSTOM("text", field_text_options),
    CUSTOM("truncation", field_truncation),
    CUSTOM("stream_options", field_obfuscation),
    CUSTOM("service_tier", field_ignore_string),
    CUSTOM("safety_identifier", field_ignore_string),
    CUSTOM("prompt_cache_key", field_ignore_string),
    CUSTOM("prompt_cache_retention", field_ignore_string),
    CUSTOM("prompt_cache_options", field_ignore_object),
    CUSTOM("parallel_tool_calls", field_ignore_bool),
    CUSTOM("max_tool_calls", field_ignore_int),
    CUSTOM("tools", field_refuse),
    CUSTOM("tool_choice", field_refuse_choice),
    CUSTOM("reasoning", field_reasoning),
    CUSTOM("background", field_refuse),
    CUSTOM("conversation", field_refuse),
    CUSTOM("prompt", field_refuse),
    CUSTOM("context_management", field_refuse),
    CUSTOM("moderation", field_refuse),
    {0},
};

static const struct field tokenize_fields[] = {
    {"model", field_string, AT(model), 0, 0},
    CUSTOM("prompt", field_text_prompt),
    CUSTOM("content", field_text_prompt),
    CUSTOM("messages", field_messages),
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
    {"model", field_string, AT(model), 0, 0},
    CUSTOM("tokens", field_token_list),
    FLAG("skip_special_tokens", skip_special_tokens),
    {0},
};

const struct field *const codec_tables[CODEC_API_COUNT] = {
    [CODEC_COMPLETIONS] = completion_fields, [CODEC_CHAT] = chat_fields,
    [CODEC_RESPONSES] = response_fields,     [CODEC_TOKENIZE] = tokenize_fields,
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
    return nth_name(codec_tables[api], &i);
}

const char *codec_stream_option(size_t i)
{
    return nth_name(stream_options_fields, &i);
}

const char *codec_from_field(size_t i)
{
    return nth_name(from_fields, &i);
}

const char *codec_message_field(size_t i)
{
    return nth_name(codec_message_fields, &i);
}
