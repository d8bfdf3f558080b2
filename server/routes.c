/* routes.c - see routes.h. What the POSTs do is in call.c. */
#include "server/routes.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "server/call.h"
#include "server/call_once.h"
#include "server/call_queue.h"
#include "server/metrics.h"
#include "server/openapi.h"
#include "server/playground.h"
#include "server/routes_presets.h"
#include "server/routes_responses.h"
#include "server/routes_sessions.h"
#include "server/routes_streams.h"

enum { MAX_OPENAPI_BYTES = 4 << 20, MEGABYTE = 1 << 20 };

/* ---- endpoints ------------------------------------------------------------------------------- */

static void post_completions(struct http_request *http, void *context)
{
    call_post(http, context, CODEC_COMPLETIONS);
}

static void post_chat(struct http_request *http, void *context)
{
    call_post(http, context, CODEC_CHAT);
}

static void post_response(struct http_request *http, void *context)
{
    call_post(http, context, CODEC_RESPONSES);
}

static void post_tokenize(struct http_request *http, void *context)
{
    call_post(http, context, CODEC_TOKENIZE);
}

static void post_detokenize(struct http_request *http, void *context)
{
    call_post(http, context, CODEC_DETOKENIZE);
}

static void get_models(struct http_request *http, void *context)
{
    struct routes *r = context;
    const struct served_model *model = call_model(http, r);
    if (!model)
        return;
    struct bytes body = {0};
    bytes_text(&body, "{\"object\":\"list\",\"data\":[");
    codec_write_model(&body, model->name, model->created, r->info.max_position);
    bytes_text(&body, "]}");
    call_reply_json(http, &body);
}

static void get_one_model(struct http_request *http, void *context)
{
    struct routes *r = context;
    const struct served_model *model = call_model(http, r);
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
    call_reply_json(http, &body);
}

static void get_version(struct http_request *http, void *context)
{
    (void)context;
    struct bytes body = {0};
    bytes_format(&body, "{\"version\":\"%s\"}", latte_version);
    call_reply_json(http, &body);
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

static void reply_health(struct http_request *http, struct routes *r, const char *status, bool good)
{
    char body[80];
    bool is_away =
        atomic_load_explicit(&r->model, memory_order_acquire) && storage_is_away(&r->storage);
    int n = snprintf(body, sizeof(body), "{\"status\":\"%s\"%s}", status,
                     is_away ? ",\"store\":\"unreachable\"" : "");
    http_reply(http, good ? 200 : 503, "application/json", body, (size_t)n);
}

/* Ready: a new request would be served. One about a session would not while the store is away, but
 * that is so on all servers that share it, and the others are served. */
static void get_ready(struct http_request *http, void *context)
{
    const char *status = health(context);
    reply_health(http, context, status, !strcmp(status, "ok"));
}

/* Alive: a restart would not help. */
static void get_live(struct http_request *http, void *context)
{
    const char *status = health(context);
    reply_health(http, context, status, strcmp(status, "failed") != 0);
}

/* They lie in the same store as the states of sessions. */
static void count_prefixes(struct routes *r, struct metrics_sessions *out)
{
    struct prefix_stats stats;
    struct image_counts *images = &out->images;
    prefixes_stats(r->storage.prefixes, &stats);
    int n = stats.n_entries + stats.n_reserved;
    out->n_prefixes = stats.n_entries;
    out->prefix_bytes = stats.n_bytes;
    n = n < images->n_in_memory ? n : images->n_in_memory;
    images->n_images -= n;
    images->n_in_memory -= n;
    images->used_bytes -= (size_t)n * image_bytes(&r->storage.images);
}

static void fill_metrics(struct routes *r, struct metrics_sessions *out)
{
    sessions_count(r->storage.sessions, &out->sessions);
    image_count(&r->storage.images, &out->images);
    out->n_responses = responses_n(r->responses);
    out->has_store = r->storage.store != NULL;
    out->store_is_away = storage_is_away(&r->storage);
    if (r->storage.store)
        state_store_count(r->storage.store, &out->journal);
    count_prefixes(r, out);
}

static void get_metrics(struct http_request *http, void *context)
{
    struct routes *r = context;
    const struct served_model *model = atomic_load_explicit(&r->model, memory_order_acquire);
    struct bytes body = {0};
    struct metrics_sessions sessions = {0};
    if (model)
        fill_metrics(r, &sessions);
    struct reels_stats reels = reels_stats(r->reels);
    struct outcomes_stats outcomes = outcomes_stats(r->outcomes);
    struct metrics_kept kept = {.n_streams = reels.n_reels,
                                .stream_bytes = reels.used_bytes,
                                .n_waiting = queue_length(r->queue),
                                .n_outcomes = outcomes.n_outcomes,
                                .outcome_bytes = outcomes.used_bytes};
    const struct options *o = r->options;
    struct metrics_service service = {.is_ready = !strcmp(health(r), "ok"),
                                      .n_connections = http_n_connections(r->server),
                                      .max_connections = o->max_connections,
                                      .max_queue = o->max_queue,
                                      .max_sessions = o->max_sessions,
                                      .max_state_bytes = (size_t)o->host_state_mb << 20};
    metrics_write(&body, model ? model->engine : NULL, model ? &sessions : NULL, &kept, &service);
    if (body.failed) {
        bytes_free(&body);
        call_refuse(http, STATUS_NOMEM, "out of memory while writing the metrics");
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
    {"POST", "/v1/completions", HTTP_ROUTE_JSON | HTTP_ROUTE_STATE, post_completions},
    {"POST", "/v1/chat/completions", HTTP_ROUTE_JSON | HTTP_ROUTE_STATE, post_chat},
    {"POST", "/v1/responses", HTTP_ROUTE_JSON, post_response},
    {"GET", "/v1/responses/{id}", 0, response_get},
    {"DELETE", "/v1/responses/{id}", 0, response_delete},
    {"GET", "/v1/responses/{id}/input_items", 0, response_get_items},
    {"GET", "/v1/models", 0, get_models},
    {"GET", "/v1/models/{id}", HTTP_ROUTE_SLASHES, get_one_model},
    {"POST", "/v1/sessions", HTTP_ROUTE_JSON, sessions_post},
    {"GET", "/v1/sessions", 0, sessions_list},
    {"GET", "/v1/sessions/{id}", 0, session_get},
    {"DELETE", "/v1/sessions/{id}", 0, session_remove},
    {"POST", "/v1/sessions/{id}/fork", HTTP_ROUTE_JSON, session_post_fork},
    {"POST", "/v1/sessions/{id}/snapshots", HTTP_ROUTE_JSON, session_post_snapshot},
    {"GET", "/v1/sessions/{id}/snapshots", 0, session_get_snapshots},
    {"POST", "/v1/sessions/{id}/rollback", HTTP_ROUTE_JSON, session_post_rollback},
    {"GET", "/v1/sessions/{id}/state", 0, session_get_state},
    {"PUT", "/v1/sessions/{id}/state", HTTP_ROUTE_STATE, session_put_state},
    {"GET", "/v1/presets", 0, presets_get_list},
    {"GET", "/v1/presets/{name}", 0, preset_get},
    {"PUT", "/v1/presets/{name}", HTTP_ROUTE_STATE, preset_put},
    {"DELETE", "/v1/presets/{name}", 0, preset_remove},
    {"GET", "/v1/streams/{id}", 0, stream_get},
    {"DELETE", "/v1/streams/{id}", 0, stream_remove},
    {"POST", "/tokenize", HTTP_ROUTE_JSON, post_tokenize},
    {"POST", "/detokenize", HTTP_ROUTE_JSON, post_detokenize},
    {"GET", "/version", 0, get_version},
    {"GET", "/health", HTTP_ROUTE_OPEN, get_ready},
    {"GET", "/health/live", HTTP_ROUTE_OPEN, get_live},
    {"GET", "/health/ready", HTTP_ROUTE_OPEN, get_ready},
    {"GET", "/metrics", HTTP_ROUTE_OPEN, get_metrics},
    {"GET", "/openapi.yaml", HTTP_ROUTE_OPEN, get_openapi},
    {"GET", "/", HTTP_ROUTE_OPEN, playground_get_page},
    {"GET", "/playground/{file}", HTTP_ROUTE_OPEN, playground_get_file},
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
    if (model)
        sessions_reap(r->storage.sessions);
    struct job *job = NULL;
    while (model && (job = engine_take_ready(model->engine))) {
        struct call *c = job_user(job); /* NULL: its request is over */
        if (c)
            call_wake(c);
        job_release(job);
    }
    call_run_woken(r);
    once_run_ready(r);
    queue_run(r);
}

void routes_on_tick(void *context)
{
    struct routes *r = context;
    call_begin_late(r);
    reels_expire(r->reels);
    once_on_tick(r);
    queue_on_tick(r);
    if (!atomic_load_explicit(&r->model, memory_order_acquire))
        return;
    metrics_add(METRIC_SESSIONS_EXPIRED, (uint64_t)sessions_expire(r->storage.sessions));
    sessions_reap(r->storage.sessions);
    storage_on_tick(&r->storage);
    metrics_add(METRIC_RESPONSES_EXPIRED, (uint64_t)responses_expire(r->responses, time(NULL)));
    metrics_add(METRIC_RESPONSES_DROPPED, (uint64_t)responses_take_dropped(r->responses));
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
    r->quotas.max_running = options->max_running_per_key;
    atomic_init(&r->model, NULL);
    atomic_init(&r->draining, false);
    const struct reels_options reels = {.limit_all =
                                            (size_t)(options->stream_retention_mb * MEGABYTE),
                                        .limit_one = (size_t)(options->stream_limit_mb * MEGABYTE)};
    const struct outcomes_options outcomes = {.limit_bytes =
                                                  (size_t)(options->idempotency_mb * MEGABYTE),
                                              .keep_s = options->idempotency_ttl,
                                              .changed = once_changed,
                                              .context = r};
    size_t half_of_states = (size_t)options->host_state_mb << 19,
           response_bytes = (size_t)options->response_mb << 20;
    const struct responses_options responses = {
        .ttl_s = options->response_ttl,
        .max_per_owner = (int)options->max_responses,
        .max_bytes = response_bytes < half_of_states ? response_bytes : half_of_states,
        .on_leave = routes_drop_response,
        .context = r,
    };
    enum status st = options->openapi ? read_openapi(r, err) : STATUS_OK;
    if (!st)
        st = presets_open(&r->presets, (int)options->max_presets, err);
    if (!st)
        st = responses_open(&r->responses, &responses, err);
    if (!st)
        st = reels_open(&r->reels, &reels, err);
    if (!st)
        st = outcomes_open(&r->outcomes, &outcomes, err);
    if (!st)
        st = queue_open(&r->queue, err);
    if (!st)
        st = workers_open(&r->workers, (int)options->workers, notify, r, err);
    if (st) {
        queue_close(r->queue);
        outcomes_close(r->outcomes);
        reels_close(r->reels);
        responses_close(r->responses);
        presets_close(r->presets);
        bytes_free(&r->openapi);
        free(r);
        return st;
    }
    *out = r;
    return STATUS_OK;
}

void routes_stop(struct routes *r)
{
    if (!r)
        return;
    workers_close(r->workers);
    r->workers = NULL;
    storage_leave_engine(&r->storage);
}

void routes_close(struct routes *r)
{
    if (!r)
        return;
    routes_stop(r);
    call_end_detached(r);
    storage_stop(&r->storage);
    responses_close(r->responses);
    presets_close(r->presets);
    storage_close(&r->storage);
    queue_close(r->queue);
    quotas_free(&r->quotas);
    outcomes_close(r->outcomes);
    reels_close(r->reels);
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
        .max_choices = o->max_choices < o->max_queue ? o->max_choices : o->max_queue,
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

/* What the store has beside sessions. */
static void restore(struct routes *r, const char *model)
{
    routes_restore_presets(r);
    routes_restore_responses(r, model);
    once_restore(r);
}

enum status routes_publish(struct routes *r, const struct served_model *model, struct error *err)
{
    engine_info(model->engine, &r->info);
    fill_context(r);
    struct storage_options storage = {.options = r->options,
                                      .engine = model->engine,
                                      .model = &r->info,
                                      .server = r->server,
                                      .notify = notify,
                                      .context = r};
    enum status st = storage_open(&r->storage, &storage, err);
    if (!st)
        st = routes_load_presets(r, err);
    if (st)
        return st;
    if (storage_has_items(&r->storage))
        restore(r, model->name);
    http_set_state_bytes(r->server, image_file_bytes(&r->storage.images));
    /* What decides a seed's outcome: the model, the program, and how it computes. */
    snprintf(r->fingerprint, sizeof(r->fingerprint), "fp_%.10s-%s-%s-%s-%s", r->info.fingerprint,
             latte_version, r->info.backend, r->info.weight_dtype, r->info.window_dtype);
    atomic_store_explicit(&r->model, model, memory_order_release);
    return STATUS_OK;
}

int routes_n_detached(const struct routes *r)
{
    return atomic_load(&r->n_detached);
}

void routes_drain(struct routes *r)
{
    atomic_store(&r->draining, true);
}
