/* call.c - see call.h */
#include "server/call.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

#include "engine/base/base64.h"
#include "server/metrics.h"

enum {
    INLINE_BYTES = 64 << 10,     /* larger bodies are read, and replies written, on a worker */
    MAX_REPLY_BYTES = 256 << 20, /* that wait to be sent, of one request */
};

static uint64_t random_u64(void)
{
    uint64_t value = 0;
    while (getrandom(&value, sizeof(value), 0) < 0 && errno == EINTR)
        ;
    return value;
}

static void prepare_on_worker(struct work_item *item)
{
    struct call *c = (struct call *)item;
    call_prepare(c);
    free(c->own_body);
    c->own_body = NULL;
}

/* A response whose call is over before it is: who was told its id finds that it failed. */
static void leave_response(struct call *c)
{
    struct responses *t = c->routes->responses;
    struct error err;
    if (!c->response)
        return;
    if (c->response->status == RESPONSE_IN_PROGRESS || c->response->status == RESPONSE_FAILED) {
        fail(&err, STATUS_INTERNAL, "The client left before the response was complete.");
        response_fail(c->response, &err);
        if (!c->streaming)
            responses_remove(t, c->response);
    }
    responses_count(t, c->response);
    response_release(c->response);
}

static void call_free(struct call *c)
{
    metrics_add(METRIC_TURNS_LOST, c->turn.active);
    if (c->turn.active)
        session_abandon(c->routes->storage.sessions, &c->turn);
    leave_response(c);
    stream_close(c->generation);
    call_prefix_free(c);
    for (size_t i = 0; i < c->n_prompts; i++)
        prompt_release(c->prompts[i].shared);
    image_release(c->from);
    image_release(c->into);
    image_release(c->left);
    bytes_free(&c->state);
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

static void unlist_woken(struct call *c)
{
    struct call **link = &c->routes->woken;
    while (c->is_woken && *link != c)
        link = &(*link)->woken_next;
    if (c->is_woken)
        *link = c->woken_next;
    c->is_woken = false;
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
    unlist_woken(c);
    c->http = NULL;
    if (!c->working && !c->committing)
        call_free(c);
}

void call_reply_json(struct http_request *http, struct bytes *body)
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

static void defer(struct call *c)
{
    if (!c->deferred)
        http_defer(c->http);
    c->deferred = true;
}

static void begin_stream(struct call *c)
{
    unlist_starting(c);
    c->streaming = true;
    http_stream(c->http, 200, "text/event-stream; charset=utf-8", stream_read, c->generation);
}

static bool is_large_state(const struct call *c)
{
    return image_file_bytes(&c->routes->storage.images) > INLINE_BYTES;
}

/* The state to give back as text, which is empty when memory runs out. Any thread. */
static void write_state(struct call *c)
{
    struct bytes file = {0};
    image_write(c->left, &file);
    base64_encode(file.data, file.n, &c->state);
    if (file.failed || c->state.failed)
        bytes_free(&c->state);
    bytes_free(&file);
    image_release(c->left);
    c->left = NULL;
    stream_give_state(c->generation, (struct codec_text){c->state.data, c->state.n});
}

static void write_on_worker(struct work_item *item)
{
    struct call *c = (struct call *)item;
    if (c->left) {
        write_state(c);
        c->reply.failed |= !c->state.data;
    }
    stream_write(c->generation, &c->reply);
    bytes_free(&c->state);
}

static void on_written(struct work_item *item)
{
    struct call *c = (struct call *)item;
    c->working = false;
    if (c->http)
        call_reply_json(c->http, &c->reply);
    else
        call_free(c);
}

/* All choices are complete. */
static void reply_whole(struct call *c)
{
    c->item = (struct work_item){.run = write_on_worker, .done = on_written};
    bool is_small = !c->left || !is_large_state(c);
    if (is_small && stream_held_bytes(c->generation) <= INLINE_BYTES) {
        write_on_worker(&c->item);
        call_reply_json(c->http, &c->reply);
        return;
    }
    c->working = true;
    defer(c);
    workers_submit(c->routes->workers, &c->item);
}

/* See how a generation stands that has not been answered yet. The call may be gone afterwards. */
static void step(struct call *c)
{
    switch (stream_poll(c->generation)) {
    case STREAM_WAITING:
        defer(c);
        return;
    case STREAM_READY:
        begin_stream(c);
        return;
    case STREAM_FAILED:
        unlist_starting(c); /* it is answered: call_begin_late must not */
        note_tokens(c);
        http_fail(c->http, stream_error(c->generation), NULL);
        return;
    case STREAM_DONE:
        note_tokens(c);
        reply_whole(c);
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
    int64_t elapsed_ms = (job_clock_ns() - http_arrival_ns(c->http)) / 1000000;
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

/* How an assistant's turn ended, for the rendering of the next one (call_prepare.c). */
static uint32_t tail_of(const struct call *c, int32_t last, bool by_token)
{
    const char *texts[4];
    if (c->api == CODEC_COMPLETIONS)
        return CALL_TAIL_NONE;
    int n = by_token ? chat_template_stops(c->model->chat_template, texts) : 0;
    for (int i = 0; i < n; i++)
        if (tokenizer_find(c->model->tokenizer, texts[i], strlen(texts[i])) == last)
            return CALL_TAIL_CLOSED;
    return CALL_TAIL_OPEN;
}

/* The turn is over, and the reply may end. */
static void end_turn(struct call *c, const struct error *err)
{
    stream_turn_committed(c->generation, &c->session, err);
    if (c->in_commit)
        return; /* whoever polls the generation goes on */
    if (c->http)
        call_wake(c);
    else
        call_free(c);
}

static void end_with_state(struct call *c)
{
    struct error err = {0};
    if (c->http && !c->state.data)
        fail(&err, STATUS_NOMEM, "out of memory for the state after the turn");
    end_turn(c, &err);
}

static void write_state_on_worker(struct work_item *item)
{
    write_state((struct call *)item);
}

static void on_state_written(struct work_item *item)
{
    struct call *c = (struct call *)item;
    c->working = false;
    end_with_state(c);
}

/* The turn has been committed. The end of a stream has the state, where it is asked for; a whole
 * reply gets it when it is written. */
static void after_commit(struct call *c)
{
    struct error none = {0};
    if (!c->left || !c->request.stream || !c->http) {
        end_turn(c, &none);
    } else if (!is_large_state(c)) {
        write_state(c);
        end_with_state(c);
    } else {
        c->item = (struct work_item){.run = write_state_on_worker, .done = on_state_written};
        c->working = true;
        workers_submit(c->routes->workers, &c->item);
    }
}

static void on_committed(void *context, const struct session_outcome *outcome)
{
    struct call *c = context;
    const struct session_info *info = &outcome->info;
    c->session = (struct codec_session){.position = info->position, .version = info->version};
    memcpy(c->session.id, info->id, sizeof(info->id));
    c->committing = false;
    metrics_add(outcome->error.status ? METRIC_TURNS_LOST : METRIC_TURNS, 1);
    if (outcome->error.status)
        end_turn(c, &outcome->error);
    else
        after_commit(c);
}

static enum status commit_turn(void *context, struct image *image, const struct stream_end *end,
                               struct error *err)
{
    struct call *c = context;
    enum status st = STATUS_OK;
    image->tail = tail_of(c, end->last, end->by_token);
    if (c->request.return_state) {
        image_hold(image);
        c->left = image;
    }
    if (c->response)
        responses_settle(c->routes->responses, c->response, image);
    c->in_commit = true;
    c->committing = c->turn.active;
    if (c->turn.active)
        st = session_commit(c->routes->storage.sessions, &c->turn, image, end->tokens,
                            end->n_chunked, end->n_single, on_committed, c, err);
    else
        after_commit(c);
    c->in_commit = false;
    if (st)
        c->committing = false;
    return st;
}

struct image *call_from(const struct call *c)
{
    return c->turn.active ? c->turn.from : c->from;
}

static void open_turn(struct call *c, struct stream_setup *setup)
{
    setup->from = c->from;
    if (!c->into)
        return;
    c->stream_turn = (struct stream_turn){
        .from = c->from, .into = c->into, .commit = commit_turn, .commit_context = c};
    setup->turn = &c->stream_turn;
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
        .response = c->response,
        .images = &c->routes->storage.images,
        .keep = call_prefix_keep,
        .keep_context = c,
        .max_bytes = MAX_REPLY_BYTES,
        .arrival_ns = http_arrival_ns(c->http),
        .owner = c,
        .submit = submit,
        .submit_context = c->model->engine,
    };
    fill_reply(c, &setup.reply);
    enum status st = remaining_ms(c, &setup.deadline_ms, err);
    open_turn(c, &setup);
    return st ? st : stream_open(&c->generation, &setup, err);
}

/* What a request holds until it is over, waiting or running. */
static size_t held_bytes(const struct call *c)
{
    size_t n_bytes = c->arena.used_bytes + (c->response ? response_bytes(c->response) : 0);
    for (size_t i = 0; i < c->n_prompts; i++)
        n_bytes += c->prompts[i].n * sizeof(*c->prompts[i].ids);
    return n_bytes;
}

/* A place for the request's prompts among those of all others. */
static enum status charge(struct call *c, struct error *err)
{
    size_t n_bytes = held_bytes(c), limit_mb = (size_t)c->routes->options->max_buffered_mb;
    if (n_bytes > limit_mb << 20)
        return fail(err, STATUS_TOO_LARGE, "This request needs %zu bytes; the server holds %zu MB.",
                    n_bytes, limit_mb);
    if (!http_charge(c->http, n_bytes))
        return fail(err, STATUS_BUSY,
                    "The server holds as many prompts as it can. Try again later.");
    return STATUS_OK;
}

static void start_generation(struct call *c)
{
    struct error err;
    enum status st = charge(c, &err);
    if (!st)
        st = open_generation(c, &err);
    if (st) {
        if (st == STATUS_BUSY)
            metrics_add(METRIC_QUEUE_REJECTIONS, 1);
        http_fail(c->http, &err, NULL);
        return;
    }
    c->started_ns = job_clock_ns();
    if (c->response && c->request.store)
        responses_add(c->routes->responses, c->response, time(NULL));
    if (c->request.stream)
        list_starting(c);
    note_tokens(c);
    step(c);
}

/* ---- the state that a turn continues -------------------------------------------------------- */

enum { FETCH_WAIT_MS = 20000 }; /* for memory: others' states are written and dropped meanwhile */

static void fetch_on_worker(struct work_item *item)
{
    struct call *c = (struct call *)item;
    struct storage *storage = &c->routes->storage;
    if (c->turn.from && !c->from) {
        c->status = state_store_hold(storage->store, c->model->engine, c->turn.from, &c->error);
        c->from = c->status ? NULL : c->turn.from;
        if (c->status == STATUS_LOST)
            fail_context(&c->error, "Session '%s' cannot be read from the store", c->turn.id);
    }
    if (!c->status)
        c->status = image_new_wait(&c->into, &storage->images, FETCH_WAIT_MS, &c->error);
}

static void on_fetched(struct work_item *item)
{
    struct call *c = (struct call *)item;
    c->working = false;
    if (!c->http)
        call_free(c);
    else if (c->status)
        http_fail(c->http, &c->error, NULL);
    else
        start_generation(c);
}

/* Both states of a turn, at once if that is possible. */
static void fetch_states(struct call *c)
{
    struct error err;
    bool files_response = c->response && (c->request.store || c->from);
    if (!c->turn.active && !c->request.return_state && !files_response) {
        start_generation(c);
        return;
    }
    if (c->turn.from && image_try_hold(c->turn.from))
        c->from = c->turn.from;
    bool is_here = !c->turn.from || c->from;
    enum status st = is_here ? image_new(&c->into, &c->routes->storage.images, &err) : STATUS_BUSY;
    if (!st) {
        start_generation(c);
    } else if (st == STATUS_BUSY && c->routes->storage.store) {
        if (c->turn.from && c->from) { /* who waits for memory keeps others' waiting short */
            image_release(c->from);
            c->from = NULL;
        }
        c->item = (struct work_item){.run = fetch_on_worker, .done = on_fetched};
        c->working = true;
        defer(c);
        workers_submit(c->routes->workers, &c->item);
    } else {
        metrics_add(METRIC_QUEUE_REJECTIONS, st == STATUS_BUSY);
        http_fail(c->http, &err, NULL);
    }
}

/* After prepare: answer, or start the jobs. */
static void conclude(struct call *c)
{
    metrics_add(METRIC_UNKNOWN_FIELDS, (uint64_t)c->request.n_unknown_fields);
    http_drop_body(c->http);
    if (c->status)
        http_fail(c->http, &c->error, c->code);
    else if (c->api == CODEC_TOKENIZE || c->api == CODEC_DETOKENIZE)
        call_reply_json(c->http, &c->reply);
    else
        fetch_states(c);
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

void call_refuse(struct http_request *http, enum status status, const char *text)
{
    struct error err;
    fail(&err, status, "%s", text);
    http_fail(http, &err, NULL);
}

/* A large body outlives its request on a worker, so it is copied. */
static bool keep_body(struct call *c)
{
    if (c->n_body <= INLINE_BYTES)
        return true;
    c->own_body = malloc(c->n_body);
    if (c->own_body)
        c->body = memcpy(c->own_body, c->body, c->n_body);
    return c->own_body != NULL;
}

/* "7", 7 or *: the version of a session. */
enum status call_if_match(struct http_request *http, int64_t *version, struct error *err)
{
    const char *text = http_header(http, "If-Match");
    *version = SESSION_ANY_VERSION;
    if (!text || !strcmp(text, "*"))
        return STATUS_OK;
    char digits[24];
    size_t n = strlen(text);
    bool quoted = n > 2 && text[0] == '"' && text[n - 1] == '"';
    snprintf(digits, sizeof(digits), "%.*s", (int)(quoted ? n - 2 : n), text + quoted);
    if (!*digits || strlen(digits) > 18 || digits[strspn(digits, "0123456789")])
        return fail_field(err, STATUS_INVALID, "If-Match",
                          "If-Match: expected the version of a session as its ETag gives it, such "
                          "as \"7\", found '%.40s'",
                          text);
    *version = strtoll(digits, NULL, 10);
    return STATUS_OK;
}

const struct served_model *call_model(struct http_request *http, struct routes *r)
{
    const struct served_model *model = atomic_load_explicit(&r->model, memory_order_acquire);
    if (!model)
        call_refuse(http, STATUS_SHUTDOWN, "The model is still loading.");
    return model;
}

void call_post(struct http_request *http, struct routes *r, enum codec_api api)
{
    const struct served_model *model = call_model(http, r);
    bool generates = api < CODEC_TOKENIZE;
    if (!model)
        return;
    if (generates && atomic_load(&r->draining)) {
        call_refuse(http, STATUS_SHUTDOWN, "The server is shutting down.");
        return;
    }
    struct call *c = calloc(1, sizeof(*c));
    if (!c) {
        call_refuse(http, STATUS_NOMEM, "out of memory for a request");
        return;
    }
    *c = (struct call){
        .routes = r, .http = http, .model = model, .api = api, .owner = http_key_index(http)};
    c->item = (struct work_item){.run = prepare_on_worker, .done = on_prepared};
    c->body = http_body(http, &c->n_body);
    http_on_close(http, on_close, c);
    struct error err;
    if (call_if_match(http, &c->version, &err)) {
        http_fail(http, &err, NULL);
    } else if (!keep_body(c)) {
        call_refuse(http, STATUS_NOMEM, "out of memory for the body of a request");
    } else if (c->n_body > INLINE_BYTES) {
        c->working = true;
        defer(c);
        workers_submit(r->workers, &c->item);
    } else {
        call_prepare(c);
        conclude(c);
    }
}

void call_wake(struct call *c)
{
    if (c->is_woken)
        return;
    c->is_woken = true;
    c->woken_next = c->routes->woken;
    c->routes->woken = c;
}

void call_run_woken(struct routes *r)
{
    for (struct call *c; (c = r->woken);) {
        r->woken = c->woken_next;
        c->is_woken = false;
        if (c->streaming)
            http_wake(c->http);
        else
            step(c); /* the call may be gone afterwards */
    }
}

void call_begin_late(struct routes *r)
{
    int64_t limit_ns = r->options->keepalive_interval * 1000000000, now = job_clock_ns();
    for (struct call *c = r->starting, *next; c; c = next) {
        next = c->next;
        if (now - c->started_ns >= limit_ns)
            begin_stream(c);
    }
}
