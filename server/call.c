/* call.c - see call.h */
#include "server/call_private.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

#include "server/call_once.h"
#include "server/call_queue.h"
#include "server/metrics.h"

enum {
    MAX_REPLY_BYTES = 256 << 20, /* that wait to be sent, of one request */
    FILL_BYTES = 64 << 10, /* of one stream that go to its reel before others have their turn */
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
    c->on_worker = true;
    call_prepare(c);
    c->on_worker = false;
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

/* From now on the generation does not depend on the request. */
static void run_on(struct call *c)
{
    struct routes *r = c->routes;
    c->runs_on = true;
    c->detached_next = r->detached;
    if (r->detached)
        r->detached->detached_previous = c;
    r->detached = c;
    atomic_fetch_add(&r->n_detached, 1);
}

static void unlist_detached(struct call *c)
{
    struct routes *r = c->routes;
    if (!c->runs_on)
        return;
    c->runs_on = false;
    if (c->detached_previous)
        c->detached_previous->detached_next = c->detached_next;
    else
        r->detached = c->detached_next;
    if (c->detached_next)
        c->detached_next->detached_previous = c->detached_previous;
    atomic_fetch_sub(&r->n_detached, 1);
}

/* Before anybody was told of it. */
static void drop_reel(struct call *c)
{
    if (!c->reel)
        return;
    reel_stop(c->reel, NULL, NULL);
    c->reel = NULL;
}

/* Of its API key, for these sequences; a turn that waited has its one already. */
static enum status take_quota(struct call *c, int64_t n, struct error *err)
{
    enum status st = n > c->quota ? quotas_take(&c->routes->quotas, c->owner, n, err) : STATUS_OK;
    if (!st)
        c->quota = n;
    else if (st != STATUS_NOMEM)
        c->code = "running_quota_exceeded";
    return st;
}

/* Before the client can see the end: its next request must not find it still running. */
static void give_back_quota(struct call *c)
{
    quotas_give_back(&c->routes->quotas, c->owner, c->quota);
    c->quota = 0;
}

void call_free(struct call *c)
{
    char session_id[SESSION_ID_BYTES];
    memcpy(session_id, c->turn.id, sizeof(session_id));
    unlist_starting(c);
    unlist_woken(c);
    unlist_detached(c);
    give_back_quota(c);
    if (c->charged)
        http_uncharge(c->routes->server, c->charged);
    once_forget(c->routes, c->outcome);
    metrics_add(METRIC_TURNS_LOST, c->turn.active);
    if (c->turn.active)
        session_abandon(c->routes->storage.sessions, &c->turn);
    leave_response(c);
    stream_close(c->generation);
    call_prefix_free(c);
    for (size_t i = 0; i < c->n_prompts; i++)
        prompt_release(c->prompts[i].shared);
    image_drop(c->base);
    image_drop(c->saved);
    image_release(c->from);
    image_release(c->into);
    image_release(c->left);
    bytes_free(&c->state);
    bytes_free(&c->reply);
    arena_free(&c->arena);
    queue_note_end(c->routes, session_id);
    free(c);
}

/* All is said: the call lives as long as its request does. It may be gone afterwards. */
static void end_run(struct call *c)
{
    unlist_detached(c);
    if (!c->http && !c->working && !c->committing)
        call_free(c);
}

static void note_tokens(struct call *c)
{
    struct codec_usage usage = stream_usage(c->generation);
    if (c->http)
        http_note_tokens(c->http, usage.prompt_tokens, usage.completion_tokens);
    if (c->reel)
        reel_note_usage(c->reel, usage);
}

/* The request is over, answered or abandoned. */
static void on_close(void *context, bool delivered)
{
    (void)delivered;
    struct call *c = context;
    if (c->generation)
        note_tokens(c);
    unlist_starting(c);
    queue_leave(c->routes, c);
    if (c->runs_on)
        c->charged = http_keep_charge(c->http);
    c->http = NULL;
    if (!c->working && !c->committing && !c->runs_on)
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

void call_fail(struct call *c, const struct error *err, const char *code)
{
    give_back_quota(c);
    once_fail(c->routes, c->outcome, err, code);
    c->outcome = NULL;
    if (c->http)
        http_fail(c->http, err, code);
}

void call_defer(struct call *c)
{
    if (c->http && !c->deferred)
        http_defer(c->http);
    c->deferred = true;
}

/* The client becomes a reader like any other; the call goes on without it. */
static void begin_reel(struct call *c)
{
    if (!c->http)
        return;
    c->charged = http_keep_charge(c->http);
    reel_read(c->reel, c->http, 0);
    c->http = NULL;
}

/* The source of a stream that is its client's. */
static ssize_t read_own(void *context, char *out, size_t max)
{
    struct call *c = context;
    ssize_t n = stream_read(c->generation, out, max);
    if (stream_has_ended(c->generation))
        give_back_quota(c);
    return n;
}

static void begin_stream(struct call *c)
{
    unlist_starting(c);
    c->streaming = true;
    if (c->reel) {
        once_begin_stream(c->routes, c->outcome, reel_id(c->reel));
        begin_reel(c);
    } else {
        http_stream(c->http, 200, "text/event-stream; charset=utf-8", read_own, c);
    }
}

static void finish_reel(struct call *c)
{
    bool failed = stream_poll(c->generation) == STREAM_FAILED;
    once_end_stream(c->routes, c->outcome, failed ? stream_error(c->generation) : NULL);
    c->outcome = NULL;
    reel_finish(c->reel);
    c->reel = NULL;
    end_run(c);
}

/* The generation's events go to its reel, so many at once that the others get their turn. True:
 * there may be more now. At its end the call is gone. */
static bool fill_reel(struct call *c)
{
    const char *events;
    ssize_t n = HTTP_SOURCE_PARK;
    for (size_t n_taken = 0; n_taken < FILL_BYTES; n_taken += (size_t)n) {
        n = stream_take(c->generation, &events);
        if (n > 0 && !reel_append(c->reel, events, (size_t)n))
            n = HTTP_SOURCE_ABORT;
        if (n <= 0)
            break;
    }
    note_tokens(c);
    if (stream_has_ended(c->generation))
        give_back_quota(c);
    if (n == HTTP_SOURCE_ABORT) {
        once_forget(c->routes, c->outcome);
        c->outcome = NULL;
        call_stop(c, "The server is out of memory.", "service_unavailable");
    } else if (n == HTTP_SOURCE_END) {
        finish_reel(c);
    }
    return n > 0;
}

void call_stop(struct call *c, const char *reason, const char *code)
{
    CHECK(!c->http);
    if (c->streaming)
        once_end_stream(c->routes, c->outcome, NULL); /* and nothing of it is kept */
    else if (c->committing)                           /* that goes through */
        once_lose_reply(c->routes, c->outcome);
    else
        once_forget(c->routes, c->outcome);
    c->outcome = NULL;
    if (c->reel)
        reel_stop(c->reel, reason, code);
    c->reel = NULL;
    end_run(c); /* a turn that the journal has goes through */
}

void call_end_detached(struct routes *r)
{
    while (r->detached)
        call_stop(r->detached, "The server is shutting down.", "service_unavailable");
}

static void write_on_worker(struct work_item *item)
{
    struct call *c = (struct call *)item;
    if (c->left) {
        call_write_state(c);
        c->reply.failed |= !c->state.data;
    }
    stream_write(c->generation, &c->reply);
    bytes_free(&c->state);
}

static void reply(struct call *c)
{
    if (c->http)
        call_reply_json(c->http, &c->reply);
    end_run(c);
}

/* The store has what is replied, for those who ask again; or it is known to have not. */
static void on_kept(void *context, const struct session_outcome *outcome)
{
    (void)outcome;
    struct call *c = context;
    c->committing = false;
    if (!c->in_commit)
        reply(c);
}

static void deliver(struct call *c)
{
    struct outcome *outcome = c->outcome;
    give_back_quota(c);
    c->outcome = NULL;
    c->in_commit = c->committing = true;
    bool waits = once_keep(c->routes, outcome, &c->reply, on_kept, c);
    c->in_commit = false;
    c->committing &= waits;
    if (c->committing)
        call_defer(c);
    else
        reply(c);
}

static void on_written(struct work_item *item)
{
    struct call *c = (struct call *)item;
    c->working = false;
    deliver(c);
}

/* All choices are complete. */
static void reply_whole(struct call *c)
{
    c->item = (struct work_item){.run = write_on_worker, .done = on_written};
    bool is_small = !c->left || !call_has_large_state(c);
    if (is_small && stream_held_bytes(c->generation) <= INLINE_BYTES) {
        write_on_worker(&c->item);
        deliver(c);
        return;
    }
    c->working = true;
    call_defer(c);
    workers_submit(c->routes->workers, &c->item);
}

/* It failed before anything was said. Nobody knows of the reel yet. */
static void fail_generation(struct call *c)
{
    call_fail(c, stream_error(c->generation), NULL);
    drop_reel(c);
    end_run(c);
}

/* See how a generation stands that has not been answered yet. True: there are events for its reel.
 * The call may be gone afterwards. */
static bool step(struct call *c)
{
    switch (stream_poll(c->generation)) {
    case STREAM_WAITING:
        call_defer(c);
        break;
    case STREAM_READY:
        begin_stream(c);
        return c->reel != NULL;
    case STREAM_FAILED:
        unlist_starting(c); /* it is answered: call_begin_late must not */
        note_tokens(c);
        fail_generation(c);
        break;
    case STREAM_DONE:
        note_tokens(c);
        reply_whole(c);
        break;
    }
    return false;
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

/* What the client may come back to. A repetition of a stream needs its events, too. */
static enum status open_reel(struct call *c, const char *id, struct error *err)
{
    const struct options *o = c->routes->options;
    int64_t keep_s = o->stream_retention;
    if (!c->request.stream || !(c->request.resumable || c->outcome))
        return STATUS_OK;
    if (c->outcome && keep_s < o->idempotency_ttl)
        keep_s = o->idempotency_ttl;
    c->reel = reel_open(c->routes->reels, id, c->owner, keep_s, c);
    return c->reel ? STATUS_OK : fail(err, STATUS_NOMEM, "out of memory for a stream");
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
    call_open_turn(c, &setup);
    if (!st)
        st = open_reel(c, c->response ? c->response->id : setup.reply.id, err);
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

void call_generate(struct call *c)
{
    struct error err;
    c->code = NULL;
    enum status st = take_quota(c, (int64_t)c->n_prompts * c->request.best_of, &err);
    if (!st)
        st = charge(c, &err);
    if (!st)
        st = open_generation(c, &err);
    if (st) {
        drop_reel(c);
        if (st == STATUS_BUSY)
            metrics_add(c->code ? METRIC_QUOTA_REJECTIONS : METRIC_QUEUE_REJECTIONS, 1);
        call_fail(c, &err, c->code);
        return;
    }
    if (c->reel || c->outcome)
        run_on(c);
    c->started_ns = job_clock_ns();
    if (c->response && c->request.store)
        responses_add(c->routes->responses, c->response, time(NULL));
    if (c->request.stream)
        list_starting(c);
    note_tokens(c);
    if (step(c)) {
        call_wake(c);
        http_notify(c->routes->server);
    }
}

/* ---- the state that a turn continues -------------------------------------------------------- */

/* The session is in a turn, and the request would wait for its own. */
static void wait_for_turn(struct call *c)
{
    struct error err;
    enum status st = take_quota(c, 1, &err);
    if (!st) {
        c->code = "session_queue_full";
        st = queue_join(c->routes, c, &err);
    }
    if (!st) {
        call_defer(c);
        return;
    }
    http_drop_body(c->http);
    metrics_add(METRIC_QUOTA_REJECTIONS, st == STATUS_BUSY);
    call_fail(c, &err, st == STATUS_BUSY ? c->code : NULL);
}

/* After prepare: answer, or start the jobs. */
static void conclude(struct call *c)
{
    if (*c->waits_for) {
        wait_for_turn(c);
        return;
    }
    metrics_add(METRIC_UNKNOWN_FIELDS, (uint64_t)c->request.n_unknown_fields);
    http_drop_body(c->http);
    if (c->status)
        call_fail(c, &c->error, c->code);
    else if (c->api == CODEC_TOKENIZE || c->api == CODEC_DETOKENIZE)
        call_reply_json(c->http, &c->reply);
    else
        call_fetch_states(c);
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

/* A body outlives its request on a worker, so it is copied. */
static void prepare_by_worker(struct call *c)
{
    struct error err;
    c->own_body = malloc(c->n_body ? c->n_body : 1);
    if (!c->own_body) {
        fail(&err, STATUS_NOMEM, "out of memory for the body of a request");
        call_fail(c, &err, NULL);
        return;
    }
    c->body = memcpy(c->own_body, c->body, c->n_body);
    c->wants_worker = false;
    c->working = true;
    call_defer(c);
    workers_submit(c->routes->workers, &c->item);
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

void call_start(struct call *c)
{
    c->item = (struct work_item){.run = prepare_on_worker, .done = on_prepared};
    c->body = http_body(c->http, &c->n_body);
    if (c->n_body > INLINE_BYTES) {
        prepare_by_worker(c);
        return;
    }
    call_prepare(c);
    if (c->wants_worker)
        prepare_by_worker(c);
    else
        conclude(c);
}

void call_post(struct http_request *http, struct routes *r, enum codec_api api)
{
    const struct served_model *model = call_model(http, r);
    bool generates = api < CODEC_TOKENIZE;
    if (!model)
        return;
    struct outcome *outcome = NULL;
    struct error err;
    int64_t version;
    if (call_if_match(http, &version, &err)) {
        http_fail(http, &err, NULL);
        return;
    }
    if (generates && !once_admit(http, r, api, &outcome))
        return;
    if (generates && atomic_load(&r->draining)) {
        once_forget(r, outcome);
        call_refuse(http, STATUS_SHUTDOWN, "The server is shutting down.");
        return;
    }
    struct call *c = calloc(1, sizeof(*c));
    if (!c) {
        once_forget(r, outcome);
        call_refuse(http, STATUS_NOMEM, "out of memory for a request");
        return;
    }
    *c = (struct call){.routes = r,
                       .http = http,
                       .model = model,
                       .api = api,
                       .owner = http_key_index(http),
                       .version = version,
                       .outcome = outcome};
    http_on_close(http, on_close, c);
    call_start(c);
}

void call_wake(struct call *c)
{
    if (c->is_woken)
        return;
    c->is_woken = true;
    c->woken_next = c->routes->woken;
    c->routes->woken = c;
}

/* See to a call with news. True: again, when the others had their turn. It may be gone. */
static bool run_woken(struct call *c)
{
    if (!c->streaming)
        return step(c);
    if (c->reel)
        return fill_reel(c);
    http_wake(c->http);
    return false;
}

void call_run_woken(struct routes *r)
{
    struct call *again = NULL;
    for (struct call *c; (c = r->woken);) {
        r->woken = c->woken_next;
        c->is_woken = false;
        if (run_woken(c)) {
            c->is_woken = true;
            c->woken_next = again;
            again = c;
        }
    }
    r->woken = again;
    if (again)
        http_notify(r->server);
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
