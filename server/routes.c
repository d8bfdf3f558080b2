/* routes.c - see routes.h.
 *
 * A POST becomes a call: its body is read, its input tokenized (on a worker when the body is
 * large), and then it is answered, or its jobs start and it waits for them. A call lives until
 * the request is over and no worker has it.
 */
#include "server/routes.h"

#include <errno.h>
#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

#include "server/codec.h"
#include "server/metrics.h"
#include "server/openapi.h"
#include "server/stream.h"
#include "server/workers.h"

/* Bodies beyond this are read on a worker. */
enum { INLINE_BODY_BYTES = 64 << 10, MAX_OPENAPI_BYTES = 4 << 20 };

struct routes {
    const struct options *options;
    struct http_server *server;
    struct workers *workers;
    struct bytes openapi;  /* the file of --openapi; empty: the built-in one */
    struct call *starting; /* streams that have not begun to answer */

    /* Written before `model` is published, constant afterwards. */
    struct codec_context context;
    struct engine_info info;
    char fingerprint[96];

    _Atomic(const struct served_model *) model; /* NULL while loading */
    atomic_bool draining;
};

/* One POST under way. */
struct call {
    struct work_item item;
    struct routes *routes;
    struct http_request *http; /* NULL once the request is over */
    const struct served_model *model;
    enum codec_api api;
    const char *body; /* [n_body] */
    size_t n_body;
    bool working;   /* a worker has it */
    bool deferred;  /* the connection is suspended */
    bool streaming; /* the reply has begun */

    enum status status; /* of preparing, with error and code */
    struct error error;
    const char *code;
    struct arena arena;
    struct codec_request request;
    struct token_list *lists;      /* [n_prompts] */
    struct stream_prompt *prompts; /* [n_prompts] */
    size_t n_prompts;
    struct stop_rules rules;
    struct bytes reply;
    struct generation *generation;
    int64_t started_ns;
    struct call *previous, *next; /* in routes->starting */
};

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static uint64_t random_u64(void)
{
    uint64_t value = 0;
    while (getrandom(&value, sizeof(value), 0) < 0 && errno == EINTR)
        ;
    return value;
}

/* ---- from prompts to tokens (any thread) --------------------------------------------------- */

static const char *input_field(const struct call *c)
{
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
    c->lists = arena_take_array(&c->arena, n, sizeof(*c->lists));
    if (!c->prompts || !c->lists)
        return fail(&c->error, STATUS_NOMEM, "out of memory for the prompts of a request");
    c->n_prompts = n;
    return STATUS_OK;
}

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
    c->prompts[i].ids = ids;
    c->prompts[i].n = n;
    return STATUS_OK;
}

/* What echo gives back: the text as it was sent, or what the ids decode to. */
static enum status set_echo(struct call *c, size_t i)
{
    const struct codec_prompt *p = &c->request.prompts[i];
    c->prompts[i].echo = p->text;
    if (p->text.data)
        return STATUS_OK;
    struct bytes text = {0};
    enum status st = tokenizer_decode(c->model->tokenizer, p->tokens, p->n_tokens,
                                      c->request.skip_special_tokens, &text, &c->error);
    char *copy = st ? NULL : arena_copy(&c->arena, text.data, text.n);
    c->prompts[i].echo = (struct codec_text){copy, text.n};
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
        unsigned flags = c->request.add_special_tokens ? TOKENIZER_ADD_SPECIAL : 0;
        st = encode(c, p->text, flags, &c->lists[i]);
        if (!st)
            st = set_prompt(c, i, c->lists[i].ids, c->lists[i].n);
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
    enum status st = chat_template_render(c->model->chat_template, q->messages, q->n_messages,
                                          flags, &text, &c->error);
    if (st == STATUS_UNSUPPORTED || st == STATUS_INVALID) {
        snprintf(c->error.field, sizeof(c->error.field), "messages");
        st = c->error.status = STATUS_INVALID;
    } else if (text.failed) {
        st = fail(&c->error, STATUS_NOMEM, "out of memory for the text of a conversation");
    }
    if (!st) {
        unsigned special = q->add_special_tokens ? TOKENIZER_ADD_SPECIAL : 0;
        st = encode(c, (struct codec_text){text.n ? text.data : "", text.n}, special, list);
    }
    bytes_free(&text);
    return st;
}

/* The texts that end an assistant's turn, where the tokenizer knows them as tokens. */
static void add_template_stops(struct call *c)
{
    const char *texts[4];
    struct codec_request *q = &c->request;
    int n = q->ignore_eos ? 0 : chat_template_stops(c->model->chat_template, texts);
    for (int i = 0; i < n && q->n_stop_tokens < SAMPLER_MAX_STOP_TOKENS; i++) {
        int32_t id = tokenizer_find(c->model->tokenizer, texts[i], strlen(texts[i]));
        if (id >= 0 && id < c->routes->context.vocab_size)
            q->stop_tokens[q->n_stop_tokens++] = id;
    }
}

static enum status prepare_chat(struct call *c)
{
    enum status st = take_prompts(c, 1);
    if (!st)
        st = encode_chat(c, &c->lists[0]);
    if (!st)
        st = set_prompt(c, 0, c->lists[0].ids, c->lists[0].n);
    if (!st)
        add_template_stops(c);
    return st;
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
    struct codec_text shown = codec_clip(name);
    c->code = "model_not_found";
    return fail_field(&c->error, STATUS_NOT_FOUND, "model",
                      "The model `%.*s` does not exist; this server has `%s`.", (int)shown.n,
                      shown.data, codec_clip(c->model->name).data);
}

/* Everything before the engine: parse, check, tokenize. */
static void prepare(struct call *c)
{
    static enum status (*const steps[CODEC_API_COUNT])(struct call *) = {
        [CODEC_COMPLETIONS] = prepare_completion,
        [CODEC_CHAT] = prepare_chat,
        [CODEC_TOKENIZE] = prepare_tokenize,
        [CODEC_DETOKENIZE] = prepare_detokenize,
    };
    enum status st = codec_read(&c->request, c->api, c->body, c->n_body, &c->routes->context,
                                &c->arena, &c->error);
    c->code = c->request.code;
    if (!st)
        st = check_model(c);
    if (!st)
        st = steps[c->api](c);
    if (!st && c->reply.failed)
        st = fail(&c->error, STATUS_NOMEM, "out of memory while writing the reply");
    c->status = st;
}

static void prepare_on_worker(struct work_item *item)
{
    prepare((struct call *)item);
}

/* ---- the life of a call (io thread) --------------------------------------------------------- */

static void call_free(struct call *c)
{
    for (size_t i = 0; i < c->n_prompts; i++)
        token_list_free(&c->lists[i]);
    codec_request_free(&c->request);
    bytes_free(&c->reply);
    arena_free(&c->arena);
    free(c);
}

static void list_starting(struct call *c)
{
    struct routes *r = c->routes;
    c->next = r->starting;
    if (r->starting)
        r->starting->previous = c;
    r->starting = c;
}

static void unlist_starting(struct call *c)
{
    struct routes *r = c->routes;
    if (c->previous)
        c->previous->next = c->next;
    else if (r->starting == c)
        r->starting = c->next;
    if (c->next)
        c->next->previous = c->previous;
    c->previous = c->next = NULL;
}

static void note_tokens(struct call *c)
{
    struct codec_usage usage = stream_usage(c->generation);
    http_note_tokens(c->http, usage.prompt_tokens, usage.completion_tokens);
}

/* The request is over, answered or abandoned. */
static void on_close(void *context, bool delivered)
{
    (void)delivered;
    struct call *c = context;
    if (c->generation)
        note_tokens(c);
    unlist_starting(c);
    stream_close(c->generation);
    c->generation = NULL;
    c->http = NULL;
    if (!c->working)
        call_free(c);
}

static void reply_json(struct http_request *http, struct bytes *body)
{
    if (!body->failed) {
        http_reply_take(http, 200, "application/json", body);
        return;
    }
    struct error err;
    fail(&err, STATUS_NOMEM, "out of memory while writing the reply");
    bytes_free(body);
    http_fail(http, &err, NULL);
}

static void begin_stream(struct call *c)
{
    unlist_starting(c);
    c->streaming = true;
    http_set_header(c->http, "Cache-Control", "no-cache");
    http_set_header(c->http, "X-Accel-Buffering", "no");
    http_stream(c->http, 200, "text/event-stream; charset=utf-8", stream_read, c->generation);
}

/* See how a generation stands that has not been answered yet. The call may be gone afterwards. */
static void step(struct call *c)
{
    switch (stream_poll(c->generation)) {
    case STREAM_WAITING:
        if (!c->deferred)
            http_defer(c->http);
        c->deferred = true;
        return;
    case STREAM_READY:
        begin_stream(c);
        return;
    case STREAM_FAILED:
        note_tokens(c);
        http_fail(c->http, stream_error(c->generation), NULL);
        return;
    case STREAM_DONE:
        note_tokens(c);
        stream_write(c->generation, &c->reply);
        reply_json(c->http, &c->reply);
        return;
    }
}

static enum status submit(void *context, struct job *job, struct error *err)
{
    return engine_submit(context, job, err);
}

/* What is left of the request's time, 0 for no deadline; TIMEOUT when none is. */
static enum status remaining_ms(const struct call *c, int64_t *out, struct error *err)
{
    int64_t timeout_ms = c->routes->options->request_timeout * 1000;
    int64_t elapsed_ms = (now_ns() - http_arrival_ns(c->http)) / 1000000;
    if (timeout_ms && elapsed_ms >= timeout_ms)
        return fail(err, STATUS_TIMEOUT, "the request's time of %lld s was over before it began",
                    (long long)(timeout_ms / 1000));
    *out = timeout_ms ? timeout_ms - elapsed_ms : 0;
    return STATUS_OK;
}

static void fill_reply(const struct call *c, struct codec_reply *reply)
{
    const struct codec_request *q = &c->request;
    *reply = (struct codec_reply){
        .api = c->api,
        .chunk = q->stream,
        .created = time(NULL),
        .model = c->model->name,
        .fingerprint = c->routes->fingerprint,
        .usage_field = q->stream && q->include_usage,
    };
    snprintf(reply->id, sizeof(reply->id), "%s-%016llx%08x",
             c->api == CODEC_CHAT ? "chatcmpl" : "cmpl", (unsigned long long)random_u64(),
             (unsigned)random_u64());
}

static enum status open_generation(struct call *c, struct error *err)
{
    const struct model_config *config = c->routes->info.config;
    if (!c->request.has_seed)
        c->request.seed = random_u64();
    stop_rules_init(&c->rules, &c->request, config->eos_token_id, config->n_eos);
    struct stream_setup setup = {
        .request = &c->request,
        .tokenizer = c->model->tokenizer,
        .rules = &c->rules,
        .prompts = c->prompts,
        .n_prompts = c->n_prompts,
        .arrival_ns = http_arrival_ns(c->http),
        .owner = c,
        .submit = submit,
        .submit_context = c->model->engine,
    };
    fill_reply(c, &setup.reply);
    enum status st = remaining_ms(c, &setup.deadline_ms, err);
    return st ? st : stream_open(&c->generation, &setup, err);
}

static void start_generation(struct call *c)
{
    struct error err;
    enum status st = open_generation(c, &err);
    if (st) {
        if (st == STATUS_BUSY)
            metrics_add(METRIC_QUEUE_REJECTIONS, 1);
        http_fail(c->http, &err, NULL);
        return;
    }
    c->started_ns = now_ns();
    if (c->request.stream)
        list_starting(c);
    note_tokens(c);
    step(c);
}

/* After prepare: answer, or start the jobs. */
static void conclude(struct call *c)
{
    metrics_add(METRIC_UNKNOWN_FIELDS, (uint64_t)c->request.n_unknown_fields);
    http_drop_body(c->http);
    if (c->status)
        http_fail(c->http, &c->error, c->code);
    else if (c->api == CODEC_TOKENIZE || c->api == CODEC_DETOKENIZE)
        reply_json(c->http, &c->reply);
    else
        start_generation(c);
}

static void on_prepared(struct work_item *item)
{
    struct call *c = (struct call *)item;
    c->working = false;
    if (c->http)
        conclude(c);
    else
        call_free(c);
}

static void reply_status(struct http_request *http, enum status status, const char *text)
{
    struct error err;
    fail(&err, status, "%s", text);
    http_fail(http, &err, NULL);
}

/* A large body outlives its request on a worker, so it is copied. */
static bool keep_body(struct call *c)
{
    if (c->n_body <= INLINE_BODY_BYTES)
        return true;
    c->body = arena_copy(&c->arena, c->body, c->n_body);
    return c->body != NULL;
}

static void post(struct http_request *http, void *context, enum codec_api api)
{
    struct routes *r = context;
    const struct served_model *model = atomic_load_explicit(&r->model, memory_order_acquire);
    bool generates = api == CODEC_COMPLETIONS || api == CODEC_CHAT;
    if (!model) {
        reply_status(http, STATUS_SHUTDOWN, "The model is still loading.");
        return;
    }
    if (generates && atomic_load(&r->draining)) {
        reply_status(http, STATUS_SHUTDOWN, "The server is shutting down.");
        return;
    }
    struct call *c = calloc(1, sizeof(*c));
    if (!c) {
        reply_status(http, STATUS_NOMEM, "out of memory for a request");
        return;
    }
    *c = (struct call){.routes = r, .http = http, .model = model, .api = api};
    c->item = (struct work_item){.run = prepare_on_worker, .done = on_prepared};
    c->body = http_body(http, &c->n_body);
    http_on_close(http, on_close, c);
    if (!keep_body(c)) {
        reply_status(http, STATUS_NOMEM, "out of memory for the body of a request");
    } else if (c->n_body > INLINE_BODY_BYTES) {
        c->working = c->deferred = true;
        http_defer(http);
        workers_submit(r->workers, &c->item);
    } else {
        prepare(c);
        conclude(c);
    }
}

static void post_completions(struct http_request *http, void *context)
{
    post(http, context, CODEC_COMPLETIONS);
}

static void post_chat(struct http_request *http, void *context)
{
    post(http, context, CODEC_CHAT);
}

static void post_tokenize(struct http_request *http, void *context)
{
    post(http, context, CODEC_TOKENIZE);
}

static void post_detokenize(struct http_request *http, void *context)
{
    post(http, context, CODEC_DETOKENIZE);
}

/* ---- the rest of the endpoints -------------------------------------------------------------- */

static const struct served_model *get_model(struct http_request *http, struct routes *r)
{
    const struct served_model *model = atomic_load_explicit(&r->model, memory_order_acquire);
    if (!model)
        reply_status(http, STATUS_SHUTDOWN, "The model is still loading.");
    return model;
}

static void get_models(struct http_request *http, void *context)
{
    struct routes *r = context;
    const struct served_model *model = get_model(http, r);
    if (!model)
        return;
    struct bytes body = {0};
    bytes_text(&body, "{\"object\":\"list\",\"data\":[");
    codec_write_model(&body, model->name, model->created, r->info.max_position);
    bytes_text(&body, "]}");
    reply_json(http, &body);
}

static void get_one_model(struct http_request *http, void *context)
{
    struct routes *r = context;
    const struct served_model *model = get_model(http, r);
    if (!model)
        return;
    const char *name = http_param(http);
    if (strcmp(name, model->name)) {
        struct error err;
        struct codec_text shown = codec_clip(name);
        fail_field(&err, STATUS_NOT_FOUND, "model", "The model `%.*s` does not exist.",
                   (int)shown.n, shown.data);
        http_fail(http, &err, "model_not_found");
        return;
    }
    struct bytes body = {0};
    codec_write_model(&body, model->name, model->created, r->info.max_position);
    reply_json(http, &body);
}

static void get_version(struct http_request *http, void *context)
{
    (void)context;
    struct bytes body = {0};
    bytes_format(&body, "{\"version\":\"%s\"}", latte_version);
    reply_json(http, &body);
}

static const char *health(struct routes *r)
{
    const struct served_model *model = atomic_load_explicit(&r->model, memory_order_acquire);
    struct engine_stats stats = {0};
    if (model)
        engine_stats(model->engine, &stats);
    if (stats.failed)
        return "failed";
    if (atomic_load(&r->draining))
        return "draining";
    return model ? "ok" : "loading";
}

static void reply_health(struct http_request *http, const char *status, bool good)
{
    char body[48];
    int n = snprintf(body, sizeof(body), "{\"status\":\"%s\"}", status);
    http_reply(http, good ? 200 : 503, "application/json", body, (size_t)n);
}

/* Ready: a new request would be served. */
static void get_ready(struct http_request *http, void *context)
{
    const char *status = health(context);
    reply_health(http, status, !strcmp(status, "ok"));
}

/* Alive: a restart would not help. */
static void get_live(struct http_request *http, void *context)
{
    const char *status = health(context);
    reply_health(http, status, strcmp(status, "failed") != 0);
}

static void get_metrics(struct http_request *http, void *context)
{
    struct routes *r = context;
    const struct served_model *model = atomic_load_explicit(&r->model, memory_order_acquire);
    struct bytes body = {0};
    metrics_write(&body, model ? model->engine : NULL, http_n_connections(r->server));
    if (body.failed) {
        bytes_free(&body);
        reply_status(http, STATUS_NOMEM, "out of memory while writing the metrics");
        return;
    }
    http_reply_take(http, 200, "text/plain; version=0.0.4; charset=utf-8", &body);
}

static void get_openapi(struct http_request *http, void *context)
{
    const struct routes *r = context;
    const char *text = openapi_text;
    size_t n = (size_t)(openapi_text_end - openapi_text);
    if (r->options->openapi) {
        text = r->openapi.data;
        n = r->openapi.n;
    }
    http_reply(http, 200, "application/yaml; charset=utf-8", text, n);
}

static const struct http_route table[] = {
    {"POST", "/v1/completions", HTTP_ROUTE_JSON, post_completions},
    {"POST", "/v1/chat/completions", HTTP_ROUTE_JSON, post_chat},
    {"GET", "/v1/models", 0, get_models},
    {"GET", "/v1/models/{id}", 0, get_one_model},
    {"POST", "/tokenize", HTTP_ROUTE_JSON, post_tokenize},
    {"POST", "/detokenize", HTTP_ROUTE_JSON, post_detokenize},
    {"GET", "/version", 0, get_version},
    {"GET", "/health", HTTP_ROUTE_OPEN, get_ready},
    {"GET", "/health/live", HTTP_ROUTE_OPEN, get_live},
    {"GET", "/health/ready", HTTP_ROUTE_OPEN, get_ready},
    {"GET", "/metrics", HTTP_ROUTE_OPEN, get_metrics},
    {"GET", "/openapi.yaml", HTTP_ROUTE_OPEN, get_openapi},
};

const struct http_route *routes_table(size_t *n)
{
    *n = sizeof(table) / sizeof(*table);
    return table;
}

/* ---- events of the io thread ----------------------------------------------------------------- */

void routes_on_notify(void *context)
{
    struct routes *r = context;
    workers_reap(r->workers);
    const struct served_model *model = atomic_load_explicit(&r->model, memory_order_acquire);
    struct job *job = NULL;
    while (model && (job = engine_take_ready(model->engine))) {
        struct call *c = job_user(job); /* NULL: its request is over */
        if (c && c->streaming)
            http_wake(c->http);
        else if (c && c->http)
            step(c);
        job_release(job);
    }
}

/* A stream keeps its status open until the first token, but not so long that somebody between
 * us and the client gives up: then it begins, and can be kept alive by comments. */
void routes_on_tick(void *context)
{
    struct routes *r = context;
    int64_t limit_ns = r->options->keepalive_interval * 1000000000, now = now_ns();
    for (struct call *c = r->starting, *next; c; c = next) {
        next = c->next;
        if (now - c->started_ns >= limit_ns)
            begin_stream(c);
    }
}

/* ---- life -------------------------------------------------------------------------------------
 */

static void notify(void *context)
{
    struct routes *r = context;
    if (r->server)
        http_notify(r->server);
}

static enum status read_openapi(struct routes *r, struct error *err)
{
    const char *path = r->options->openapi;
    FILE *f = fopen(path, "rb");
    if (!f)
        return fail(err, STATUS_IO, "--openapi %s: %s", path, strerror(errno));
    char piece[4096];
    r->openapi.limit = MAX_OPENAPI_BYTES;
    for (size_t n; (n = fread(piece, 1, sizeof(piece), f)) > 0;)
        bytes_append(&r->openapi, piece, n);
    bool broken = ferror(f) || r->openapi.failed || !r->openapi.n;
    fclose(f);
    if (broken)
        return fail(err, STATUS_IO, "--openapi %s: cannot be read, is empty, or is over %d bytes",
                    path, MAX_OPENAPI_BYTES);
    return STATUS_OK;
}

enum status routes_open(struct routes **out, const struct options *options, struct error *err)
{
    struct routes *r = calloc(1, sizeof(*r));
    if (!r)
        return fail(err, STATUS_NOMEM, "routes: out of memory");
    r->options = options;
    atomic_init(&r->model, NULL);
    atomic_init(&r->draining, false);
    enum status st = options->openapi ? read_openapi(r, err) : STATUS_OK;
    if (!st)
        st = workers_open(&r->workers, (int)options->workers, notify, r, err);
    if (st) {
        bytes_free(&r->openapi);
        free(r);
        return st;
    }
    *out = r;
    return STATUS_OK;
}

void routes_close(struct routes *r)
{
    if (!r)
        return;
    workers_close(r->workers);
    bytes_free(&r->openapi);
    free(r);
}

void routes_set_server(struct routes *r, struct http_server *server)
{
    r->server = server;
}

static double or_default(double value, double otherwise)
{
    return isnan(value) || value < 0 ? otherwise : value;
}

static void fill_context(struct routes *r)
{
    const struct options *o = r->options;
    const struct generation_defaults *d = &r->info.generation;
    int64_t chat = d->max_new_tokens > 0 ? d->max_new_tokens : o->default_max_tokens;
    r->context = (struct codec_context){
        .vocab_size = r->info.config->vocab_size,
        .max_prompt_tokens = o->max_prompt_tokens,
        .max_tokens_limit = o->max_tokens_limit,
        .max_choices = o->max_choices,
        .strict_fields = o->strict_fields,
        .chat_max_tokens = chat < o->max_tokens_limit ? chat : o->max_tokens_limit,
        .temperature = or_default(d->temperature, 1),
        .top_p = or_default(d->top_p, 1),
        .min_p = or_default(d->min_p, 0),
        .typical_p = or_default(d->typical_p, 1),
        .repetition_penalty = or_default(d->repetition_penalty, 1),
        .top_k = d->top_k > 0 ? d->top_k : 0,
    };
}

void routes_publish(struct routes *r, const struct served_model *model)
{
    engine_info(model->engine, &r->info);
    fill_context(r);
    /* What decides a seed's outcome: the model, the program, and how it computes. */
    snprintf(r->fingerprint, sizeof(r->fingerprint), "fp_%.10s-%s-%s-%s", r->info.fingerprint,
             latte_version, r->info.backend, r->info.weight_dtype);
    atomic_store_explicit(&r->model, model, memory_order_release);
}

void routes_drain(struct routes *r)
{
    atomic_store(&r->draining, true);
}
