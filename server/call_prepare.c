/* call_prepare.c - the part of a call before the engine: from a body to tokens. See call.h. */
#include "server/call.h"
#include "server/call_queue.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "engine/base/base64.h"

static const char *input_field(const struct call *c)
{
    if (c->api == CODEC_RESPONSES)
        return "input";
    return c->request.n_messages ? "messages" : "prompt";
}

static enum status too_long(struct call *c, int64_t limit, int64_t found)
{
    c->code = "context_length_exceeded";
    if (found < 0)
        return fail_field(&c->error, STATUS_INVALID, input_field(c),
                          "This model's maximum context length is %lld tokens. Your input is "
                          "longer than that; please reduce its length.",
                          (long long)limit);
    return fail_field(&c->error, STATUS_INVALID, input_field(c),
                      "This model's maximum context length is %lld tokens. However, your input "
                      "has %lld tokens. Please reduce its length.",
                      (long long)limit, (long long)found);
}

/* The most tokens a prompt may have. */
static int64_t prompt_limit(const struct routes *r)
{
    int64_t limit = r->options->max_prompt_tokens, positions = r->info.max_position;
    return positions > 0 && positions < limit ? positions : limit;
}

static enum status encode(struct call *c, struct codec_text text, unsigned flags,
                          struct token_list *list)
{
    list->limit = (size_t)prompt_limit(c->routes);
    enum status st =
        tokenizer_encode(c->model->tokenizer, text.data, text.n, flags, list, &c->error);
    return st == STATUS_TOO_LARGE ? too_long(c, (int64_t)list->limit, -1) : st;
}

static enum status take_prompts(struct call *c, size_t n)
{
    c->prompts = arena_take_array(&c->arena, n, sizeof(*c->prompts));
    if (!c->prompts)
        return fail(&c->error, STATUS_NOMEM, "out of memory for the prompts of a request");
    c->n_prompts = n;
    return STATUS_OK;
}

/* A prompt in memory that all its choices read. What the session's state has not seen yet goes
 * first. */
static enum status keep_prompt(struct stream_prompt *p, const struct image *from,
                               const int32_t *ids, size_t n, struct error *err)
{
    size_t n_carried = from ? (size_t)from->n_pending : 0;
    int32_t *all = n_carried ? malloc((n_carried + n) * sizeof(*all)) : NULL;
    if (n_carried && !all)
        return fail(err, STATUS_NOMEM, "out of memory for the prompt of a request");
    if (all) {
        memcpy(all, from->pending, n_carried * sizeof(*all));
        memcpy(all + n_carried, ids, n * sizeof(*all));
    }
    enum status st = prompt_new(&p->shared, all ? all : ids, n_carried + n, err);
    free(all);
    if (st)
        return st;
    p->ids = prompt_ids(p->shared);
    p->n = n_carried + n;
    p->n_carried = n_carried;
    return STATUS_OK;
}

/* Refuse a prompt that is empty or too long, and keep the others. */
static enum status set_prompt(struct call *c, size_t i, const int32_t *ids, size_t n)
{
    int64_t limit = prompt_limit(c->routes);
    if (n == 0) {
        c->code = "empty_prompt";
        return fail_field(&c->error, STATUS_INVALID, input_field(c),
                          "Invalid '%s': expected at least one token, but got none.",
                          input_field(c));
    }
    if (n > (size_t)limit)
        return too_long(c, limit, (int64_t)n);
    return keep_prompt(&c->prompts[i], call_from(c), ids, n, &c->error);
}

/* What echo gives back: the text as it was sent, or what the ids decode to. */
static enum status set_echo(struct call *c, size_t i)
{
    const struct codec_prompt *p = &c->request.prompts[i];
    struct codec_text echo = p->text;
    struct bytes text = {0};
    enum status st = STATUS_OK;
    if (!echo.data) {
        st = tokenizer_decode(c->model->tokenizer, p->tokens, p->n_tokens,
                              c->request.skip_special_tokens, &text, &c->error);
        echo = (struct codec_text){text.data, text.n};
    }
    char *copy = st || text.failed ? NULL : arena_copy(&c->arena, echo.data, echo.n);
    c->prompts[i].echo = (struct codec_text){copy, echo.n};
    bytes_free(&text);
    if (!st && !copy)
        st = fail(&c->error, STATUS_NOMEM, "out of memory for the echo of a prompt");
    return st;
}

static enum status prepare_prompt(struct call *c, size_t i)
{
    const struct codec_prompt *p = &c->request.prompts[i];
    enum status st = STATUS_OK;
    if (p->text.data) {
        bool begins = !image_length(call_from(c));
        unsigned flags = c->request.add_special_tokens && begins ? TOKENIZER_ADD_SPECIAL : 0;
        struct token_list list = {0};
        st = encode(c, p->text, flags, &list);
        if (!st)
            st = set_prompt(c, i, list.ids, list.n);
        token_list_free(&list);
    } else {
        st = set_prompt(c, i, p->tokens, p->n_tokens);
    }
    if (!st && c->request.echo)
        st = set_echo(c, i);
    return st;
}

static enum status prepare_completion(struct call *c)
{
    enum status st = take_prompts(c, c->request.n_prompts);
    for (size_t i = 0; i < c->request.n_prompts && !st; i++)
        st = prepare_prompt(c, i);
    for (size_t i = 0; i < c->request.n_prompts && !st; i++)
        call_prefix_plan(c, i, (size_t[]){c->prompts[i].n - 1}, 1);
    return st;
}

/* Render the messages and tokenize the text. What the template refuses is the request's
 * fault, and so is chat with a model that has no template. */
static enum status encode_chat(struct call *c, struct token_list *list)
{
    const struct codec_request *q = &c->request;
    unsigned flags = (q->add_generation_prompt ? CHAT_ADD_GENERATION_PROMPT : 0) |
                     (q->continue_final_message ? CHAT_CONTINUE_FINAL_MESSAGE : 0);
    struct bytes text = {0};
    enum status st =
        image_length(call_from(c))
            ? chat_template_render_turn(c->model->chat_template, (enum chat_tail)call_from(c)->tail,
                                        q->messages, q->n_messages, flags, &text, &c->error)
            : chat_template_render(c->model->chat_template, q->messages, q->n_messages, flags,
                                   &text, &c->error);
    if (st == STATUS_UNSUPPORTED || st == STATUS_INVALID) {
        snprintf(c->error.field, sizeof(c->error.field), "%s", input_field(c));
        st = c->error.status = STATUS_INVALID;
    } else if (text.failed) {
        st = fail(&c->error, STATUS_NOMEM, "out of memory for the text of a conversation");
    }
    if (!st) {
        bool begins = !image_length(call_from(c));
        unsigned special = q->add_special_tokens && begins ? TOKENIZER_ADD_SPECIAL : 0;
        st = encode(c, (struct codec_text){text.n ? text.data : "", text.n}, special, list);
    }
    bytes_free(&text);
    return st;
}

/* The texts that end an assistant's turn: tokens where the tokenizer has them, else strings. */
static void add_template_stops(struct call *c)
{
    const char *texts[CODEC_ALL_STOPS - CODEC_MAX_STOPS];
    struct codec_request *q = &c->request;
    int n = q->ignore_eos ? 0 : chat_template_stops(c->model->chat_template, texts);
    for (int i = 0; i < n; i++) {
        size_t length = strlen(texts[i]);
        int32_t id = tokenizer_find(c->model->tokenizer, texts[i], length);
        bool is_token = id >= 0 && id < c->routes->context.vocab_size;
        if (is_token && q->n_stop_tokens < SAMPLER_MAX_STOP_TOKENS)
            q->stop_tokens[q->n_stop_tokens++] = id;
        else if (!is_token && q->n_stops < CODEC_ALL_STOPS)
            q->stops[q->n_stops++] = (struct codec_text){texts[i], length};
    }
}

static enum status prepare_chat(struct call *c)
{
    struct token_list list = {0};
    enum status st = take_prompts(c, 1);
    if (!st)
        st = encode_chat(c, &list);
    if (!st)
        st = set_prompt(c, 0, list.ids, list.n);
    token_list_free(&list);
    if (!st) {
        size_t marks[STREAM_MAX_MARKS];
        int n_marks = call_prefix_marks(c, c->prompts[0].ids, c->prompts[0].n, marks);
        call_prefix_plan(c, 0, marks, n_marks);
        add_template_stops(c);
    }
    return st;
}

/* The state that a response goes on from, and that its chain has these instructions. */
static enum status find_previous(struct call *c, struct response_instructions *instructions)
{
    const struct codec_request *q = &c->request;
    struct response_instructions chain;
    enum status st = responses_state(c->routes->responses, q->previous_response_id, c->owner,
                                     time(NULL), &c->base, &chain, &c->error);
    if (st) {
        c->code = st == STATUS_CONFLICT ? NULL : "previous_response_not_found";
        snprintf(c->error.field, sizeof(c->error.field), "previous_response_id");
        return st == STATUS_NOT_FOUND ? c->error.status = STATUS_INVALID : st;
    }
    bool same = instructions->given == chain.given &&
                !memcmp(instructions->hash, chain.hash, sizeof(chain.hash));
    if (instructions->given && !same) {
        c->code = "unsupported_value";
        return fail_field(&c->error, STATUS_INVALID, "instructions",
                          "'instructions' differ from those that response '%.64s' began with. A "
                          "state cannot forget what it has read: leave them out, or begin anew.",
                          q->previous_response_id);
    }
    *instructions = chain;
    return STATUS_OK;
}

static enum status prepare_response(struct call *c)
{
    struct codec_request *q = &c->request;
    struct response_instructions instructions = response_instructions_of(q->instructions);
    enum status st = q->previous_response_id ? find_previous(c, &instructions) : STATUS_OK;
    if (!st)
        st = prepare_chat(c);
    if (!st)
        st = response_new(&c->response, &q->repeated, &q->items, q->n_items, &c->error);
    if (st)
        return st;
    c->response->owner = c->owner;
    c->response->created = time(NULL);
    c->response->model = c->model->name;
    c->response->instructions = instructions;
    c->response->lists_ids = q->return_token_ids;
    c->response->cached_tokens = (int64_t)image_length(call_from(c));
    return STATUS_OK;
}

static enum status prepare_tokenize(struct call *c)
{
    const struct codec_request *q = &c->request;
    unsigned flags = (q->add_special_tokens ? TOKENIZER_ADD_SPECIAL : 0) |
                     (q->parse_special ? 0 : TOKENIZER_NO_PARSE_SPECIAL);
    struct token_list list = {0};
    enum status st =
        q->n_messages ? encode_chat(c, &list) : encode(c, q->prompts[0].text, flags, &list);
    if (!st)
        codec_write_tokenized(&c->reply, q, c->model->tokenizer, list.ids, list.n,
                              prompt_limit(c->routes));
    token_list_free(&list);
    return st;
}

static enum status prepare_detokenize(struct call *c)
{
    const struct codec_prompt *p = c->request.prompts;
    struct bytes text = {0};
    enum status st = tokenizer_decode(c->model->tokenizer, p->tokens, p->n_tokens,
                                      c->request.skip_special_tokens, &text, &c->error);
    if (!st)
        codec_write_detokenized(&c->reply, text.n ? text.data : "", text.n);
    c->reply.failed |= text.failed;
    bytes_free(&text);
    return st;
}

static enum status check_model(struct call *c)
{
    const char *name = c->request.model;
    if (!name || !strcmp(name, c->model->name))
        return STATUS_OK;
    struct codec_text shown = codec_clip(name), ours = codec_clip(c->model->name);
    c->code = "model_not_found";
    return fail_field(&c->error, STATUS_NOT_FOUND, "model",
                      "The model `%.*s` does not exist; this server has `%.*s`.", (int)shown.n,
                      shown.data, (int)ours.n, ours.data);
}

/* The state that came with the request. */
static enum status read_state(struct call *c)
{
    const struct codec_text *text = &c->request.state;
    struct bytes file = {0};
    enum status st = base64_decode(text->data, text->n, &file, &c->error);
    if (!st)
        st = image_parse(&c->from, &c->routes->storage.images, file.n ? file.data : "", file.n,
                         c->working ? STORAGE_WAIT_MS : 0, &c->error);
    bytes_free(&file);
    if (st != STATUS_INVALID)
        return st;
    c->code = "invalid_value";
    snprintf(c->error.field, sizeof(c->error.field), "state");
    return fail_context(&c->error, "Invalid 'state'");
}

static enum status find_preset(struct call *c)
{
    enum status st =
        presets_find(c->routes->presets, c->request.from_preset, &c->base, NULL, &c->error);
    if (st == STATUS_NOT_FOUND) {
        c->code = "preset_not_found";
        snprintf(c->error.field, sizeof(c->error.field), "from.preset");
    }
    return st;
}

/* Of a session that others wait for it is not this one's turn. */
static enum status begin_turn(struct call *c)
{
    const char *id = c->request.session_id;
    if (c->turn.active)
        return STATUS_OK; /* it came while the request waited */
    enum status st;
    c->wants_worker = !c->on_worker && sessions_are_shared(c->routes->storage.sessions);
    if (c->wants_worker)
        return STATUS_BUSY; /* that is said to nobody */
    if (queue_is_ahead(c->routes->queue, id, c->owner))
        st = fail_field(&c->error, STATUS_CONFLICT, "session_id",
                        "Session '%.64s' is in a turn; try again when that has ended.", id);
    else
        st = session_begin(c->routes->storage.sessions, id, c->owner, c->version, &c->turn,
                           &c->error);
    if (st == STATUS_NOT_FOUND)
        c->code = "session_not_found";
    if (st == STATUS_CONFLICT && c->request.queue)
        snprintf(c->waits_for, sizeof(c->waits_for), "%s", id);
    return st;
}

/* What the prompts continue. */
static enum status find_origin(struct call *c)
{
    const struct codec_request *q = &c->request;
    if (q->session_id)
        return begin_turn(c);
    if (q->from_preset)
        return find_preset(c);
    return q->state.data ? read_state(c) : STATUS_OK;
}

/* Move what the generation reads of a request to the call's arena; the rest of it goes. */
static enum status keep(struct call *c)
{
    struct codec_request *q = &c->request;
    for (int i = 0; i < q->n_stops; i++) {
        q->stops[i].data = arena_copy(&c->arena, q->stops[i].data, q->stops[i].n);
        if (!q->stops[i].data)
            return fail(&c->error, STATUS_NOMEM, "out of memory for the stop strings of a request");
    }
    size_t n_bytes = (size_t)q->n_logit_bias * sizeof(*q->logit_bias);
    struct logit_bias *bias = arena_take(&c->arena, n_bytes);
    if (!bias)
        return fail(&c->error, STATUS_NOMEM, "out of memory for the logit_bias of a request");
    if (n_bytes)
        memcpy(bias, q->logit_bias, n_bytes);
    q->logit_bias = bias;
    return STATUS_OK;
}

void call_prepare(struct call *c)
{
    static enum status (*const steps[CODEC_API_COUNT])(struct call *) = {
        [CODEC_COMPLETIONS] = prepare_completion, [CODEC_CHAT] = prepare_chat,
        [CODEC_RESPONSES] = prepare_response,     [CODEC_TOKENIZE] = prepare_tokenize,
        [CODEC_DETOKENIZE] = prepare_detokenize,
    };
    struct codec_request *q = &c->request;
    struct arena parsed;
    arena_init(&parsed, 0);
    enum status st =
        codec_read(q, c->api, c->body, c->n_body, &c->routes->context, &parsed, &c->error);
    c->code = q->code;
    if (!st)
        st = check_model(c);
    if (!st)
        st = find_origin(c);
    if (!st)
        st = steps[c->api](c);
    if (!st && c->reply.failed)
        st = fail(&c->error, STATUS_NOMEM, "out of memory while writing the reply");
    if (!st)
        st = keep(c);
    codec_request_free(q);
    arena_free(&parsed);
    c->status = st;
}
