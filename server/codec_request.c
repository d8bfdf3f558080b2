/* codec_request.c - see codec.h: a body becomes a request, and the rules between its fields. */
#include "server/codec_private.h"

#include "engine/base/json.h"

/* Values in a body besides the ids of the longest prompt. */
enum { EXTRA_VALUES = 65536 };

static bool is_given(const struct reader *r, const char *name)
{
    return codec_member(r->q->tree, name) != NULL;
}

static enum status check_stream(struct reader *r)
{
    struct codec_request *q = r->q;
    if (is_given(r, "stream_options") && !q->stream)
        return codec_wrong(
            r, "stream_options", "invalid_parameter_combination",
            "The 'stream_options' parameter is only allowed when 'stream' is enabled.");
    if (q->resumable && !q->stream)
        return codec_wrong(r, "resumable", "invalid_parameter_combination",
                           "The 'resumable' parameter is only allowed when 'stream' is enabled.");
    if (q->stream && q->best_of > q->n)
        return codec_wrong(
            r, "best_of", "invalid_parameter_combination",
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
        return codec_wrong(r, "best_of", "invalid_value",
                           "Invalid 'best_of': expected at least 'n' (%lld), but got %lld instead.",
                           (long long)q->n, (long long)q->best_of);
    int64_t n_prompts = q->n_prompts ? (int64_t)q->n_prompts : 1;
    if (n_prompts * q->best_of > r->context->max_choices)
        return codec_wrong(
            r, q->best_of > q->n ? "best_of" : "n", "integer_above_max_value",
            "This request asks for %lld sequences (prompts times choices); this server "
            "permits %lld.",
            (long long)(n_prompts * q->best_of), (long long)r->context->max_choices);
    return STATUS_OK;
}

/* What the prompt continues is named once. */
static enum status check_origin(struct reader *r, const char **origin)
{
    const struct codec_request *q = r->q;
    const char *names[3];
    int n = 0;
    if (q->session_id)
        names[n++] = "session_id";
    if (q->from_preset)
        names[n++] = "from";
    if (q->state.data)
        names[n++] = "state";
    *origin = n ? names[0] : NULL;
    if (n > 1)
        return codec_wrong(r, names[n - 1], "invalid_parameter_combination",
                           "'%s' and '%s' both say what the request continues; expected one of "
                           "them.",
                           names[0], names[n - 1]);
    return STATUS_OK;
}

/* A session goes one way, and so does a state that is given back. */
static enum status check_session(struct reader *r)
{
    struct codec_request *q = r->q;
    if (q->queue && !q->session_id)
        return codec_wrong(r, "queue", "invalid_parameter_combination",
                           "The 'queue' parameter is only allowed with 'session_id'.");
    const char *origin, *field = q->best_of > q->n ? "best_of" : q->n > 1 ? "n" : "prompt";
    enum status st = check_origin(r, &origin);
    if (!st && (q->session_id || q->return_state) && (q->best_of > 1 || q->n_prompts > 1))
        st = codec_wrong(r, field, "invalid_parameter_combination",
                         "A request with '%s' has one prompt and one choice%s.",
                         q->session_id ? "session_id" : "return_state",
                         q->session_id ? "; fork the session for more" : "");
    if (!st && q->echo && (origin || q->return_state))
        st = codec_wrong(r, "echo", "invalid_parameter_combination",
                         "'echo' cannot be used with '%s'.", origin ? origin : "return_state");
    return st;
}

static enum status check_max_tokens(struct reader *r)
{
    struct codec_request *q = r->q;
    if (q->max_tokens >= 0 && q->max_completion_tokens >= 0)
        return codec_wrong(
            r, "max_tokens", "invalid_parameter_combination",
            "Setting 'max_tokens' and 'max_completion_tokens' at the same time is not "
            "supported.");
    if (q->max_completion_tokens >= 0)
        q->max_tokens = q->max_completion_tokens;
    if (q->max_tokens < 0) {
        q->max_tokens = q->api == CODEC_COMPLETIONS ? 16 : r->context->chat_max_tokens;
        if (q->max_tokens < q->min_tokens && q->min_tokens <= r->context->max_tokens_limit)
            q->max_tokens = q->min_tokens;
    }
    if (q->min_tokens > q->max_tokens)
        return codec_wrong(
            r, "min_tokens", "invalid_value",
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
        return codec_wrong(
            r, "continue_final_message", "invalid_parameter_combination",
            "'continue_final_message' and 'add_generation_prompt' cannot both be true.");
    q->add_generation_prompt = false;
    return STATUS_OK;
}

static enum status finish_completion(struct reader *r)
{
    if (!is_given(r, "prompt"))
        return codec_missing(r, "prompt");
    enum status st = check_choices(r);
    if (!st)
        st = check_session(r);
    if (!st)
        st = check_stream(r);
    return st ? st : check_max_tokens(r);
}

static enum status finish_chat(struct reader *r)
{
    struct codec_request *q = r->q;
    if (!is_given(r, "messages"))
        return codec_missing(r, "messages");
    if (q->top_logprobs >= 0 && !q->chat_logprobs)
        return codec_wrong(
            r, "top_logprobs", "invalid_parameter_combination",
            "The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled.");
    if (q->chat_logprobs)
        q->n_logprobs = q->top_logprobs > 0 ? q->top_logprobs : 0;
    enum status st = check_choices(r);
    if (!st)
        st = check_session(r);
    if (!st)
        st = check_stream(r);
    if (!st)
        st = check_template_flags(r);
    return st ? st : check_max_tokens(r);
}

static enum status finish_response(struct reader *r)
{
    struct codec_request *q = r->q;
    if (!is_given(r, "input"))
        return codec_missing(r, "input");
    if (q->chat_logprobs || q->top_logprobs > 0)
        q->n_logprobs = q->top_logprobs > 0 ? q->top_logprobs : 0;
    enum status st = check_stream(r);
    if (!st)
        st = check_max_tokens(r);
    return st ? st : codec_finish_response(r);
}

static enum status finish_tokenize(struct reader *r)
{
    struct codec_request *q = r->q;
    bool prompt = is_given(r, "prompt"), content = is_given(r, "content"),
         messages = is_given(r, "messages");
    if (prompt + content + messages == 0)
        return codec_missing(r, "prompt");
    if (prompt + content + messages > 1)
        return codec_wrong(r, messages ? "messages" : "content", "invalid_parameter_combination",
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
    case CODEC_RESPONSES:
        return finish_response(r);
    case CODEC_TOKENIZE:
        return finish_tokenize(r);
    default:
        return is_given(r, "tokens") ? STATUS_OK : codec_missing(r, "tokens");
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
        .skip_special_tokens = api < CODEC_TOKENIZE,
        .store = true,
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
        return codec_no_memory(&r);
    out->tree = tree;
    if (!cJSON_IsObject(tree))
        return fail(err, STATUS_INVALID, "The body of the request is %s; expected a JSON object.",
                    codec_type_name(tree));
    st = codec_read_members(&r, codec_tables[api], tree, "", out);
    return st ? st : finish(&r);
}

void codec_request_free(struct codec_request *q)
{
    cJSON_Delete(q->tree);
    q->tree = NULL;
    q->model = q->session_id = q->from_preset = NULL;
    q->instructions = q->previous_response_id = NULL;
    q->state = (struct codec_text){0};
    bytes_free(&q->repeated);
    bytes_free(&q->items);
    q->n_items = 0;
    q->prompts = NULL;
    q->messages = NULL;
    q->n_prompts = q->n_messages = 0;
}
