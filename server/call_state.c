/* call_state.c - the states of a call: the one that its prompts continue is brought into memory,
 * the one it leads to is committed, to its session or with its response, and given back where that
 * is asked for. See call_private.h. */
#include <string.h>
#include <time.h>

#include "engine/base/base64.h"
#include "server/call_once.h"
#include "server/call_private.h"
#include "server/call_queue.h"
#include "server/metrics.h"

/* ---- the state before ---- */

/* The state that it continues, wherever that is; NULL for one that came with the request. */
static struct image *kept_from(const struct call *c)
{
    return c->turn.active ? c->turn.from : c->base;
}

struct image *call_from(const struct call *c)
{
    return kept_from(c) ? kept_from(c) : c->from;
}

static void fetch_on_worker(struct work_item *item)
{
    struct call *c = (struct call *)item;
    struct storage *storage = &c->routes->storage;
    struct image *from = kept_from(c);
    if (from && !c->from) {
        c->status = state_store_hold(storage->store, c->model->engine, from, &c->error);
        c->from = c->status ? NULL : from;
        if (c->status == STATUS_LOST)
            fail_context(&c->error, "%s%s%s cannot be read from the store",
                         c->turn.active ? "Session '" : "The state to go on from",
                         c->turn.active ? c->turn.id : "", c->turn.active ? "'" : "");
    }
    if (!c->status && c->leaves_state)
        c->status = image_new_wait(&c->into, &storage->images, STORAGE_WAIT_MS, &c->error);
}

static void on_fetched(struct work_item *item)
{
    struct call *c = (struct call *)item;
    c->working = false;
    if (!c->http)
        call_free(c);
    else if (c->status)
        call_fail(c, &c->error, NULL);
    else
        call_generate(c);
}

/* Both states of a turn, at once if that is possible. */
void call_fetch_states(struct call *c)
{
    struct error err;
    struct image *from = kept_from(c);
    bool files_response = c->response && (c->request.store || call_from(c));
    c->leaves_state = c->turn.active || c->request.return_state || files_response;
    if (from && !c->from && image_try_hold(from))
        c->from = from;
    enum status st = !from || c->from ? STATUS_OK : STATUS_BUSY;
    if (!st && c->leaves_state)
        st = image_new(&c->into, &c->routes->storage.images, &err);
    if (!st) {
        call_generate(c);
    } else if (st == STATUS_BUSY && c->routes->storage.store) {
        if (from && c->from) { /* who waits for memory keeps others' waiting short */
            image_release(c->from);
            c->from = NULL;
        }
        c->item = (struct work_item){.run = fetch_on_worker, .done = on_fetched};
        c->working = true;
        call_defer(c);
        workers_submit(c->routes->workers, &c->item);
    } else {
        metrics_add(METRIC_QUEUE_REJECTIONS, st == STATUS_BUSY);
        call_fail(c, &err, NULL);
    }
}

/* ---- the state to give back ---- */

bool call_has_large_state(const struct call *c)
{
    return image_file_bytes(&c->routes->storage.images) > INLINE_BYTES;
}

/* The state to give back as text, which is empty when memory runs out. Any thread. */
void call_write_state(struct call *c)
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

/* The turn is over, and the reply may end. */
static void end_turn(struct call *c, const struct error *err)
{
    stream_turn_committed(c->generation, &c->session, err);
    if (c->in_commit)
        return; /* whoever polls the generation goes on */
    if (c->http || c->runs_on)
        call_wake(c);
    else
        call_free(c);
}

static void end_with_state(struct call *c)
{
    struct error err = {0};
    if ((c->http || c->runs_on) && !c->state.data)
        fail(&err, STATUS_NOMEM, "out of memory for the state after the turn");
    end_turn(c, &err);
}

static void write_state_on_worker(struct work_item *item)
{
    call_write_state((struct call *)item);
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
    if (!c->left || !c->request.stream || !(c->http || c->runs_on)) {
        end_turn(c, &none);
    } else if (!call_has_large_state(c)) {
        call_write_state(c);
        end_with_state(c);
    } else {
        c->item = (struct work_item){.run = write_state_on_worker, .done = on_state_written};
        c->working = true;
        workers_submit(c->routes->workers, &c->item);
    }
}

/* ---- the state after ---- */

/* How an assistant's turn ended, for the rendering of the next one (weights/chat_turn.c). */
static uint32_t tail_of(const struct call *c, int32_t last, bool by_token)
{
    const char *texts[4];
    if (c->api == CODEC_COMPLETIONS)
        return CHAT_TAIL_NONE;
    int n = by_token ? chat_template_stops(c->model->chat_template, texts) : 0;
    for (int i = 0; i < n; i++)
        if (tokenizer_find(c->model->tokenizer, texts[i], strlen(texts[i])) == last)
            return CHAT_TAIL_CLOSED;
    return CHAT_TAIL_OPEN;
}

static void on_committed(void *context, const struct session_outcome *outcome)
{
    struct call *c = context;
    const struct session_info *info = &outcome->info;
    c->session = (struct codec_session){.position = info->position, .version = info->version};
    memcpy(c->session.id, info->id, sizeof(info->id));
    c->committing = false;
    queue_note_end(c->routes, info->id);
    metrics_add(outcome->error.status ? METRIC_TURNS_LOST : METRIC_TURNS, 1);
    if (outcome->error.status)
        end_turn(c, &outcome->error);
    else
        after_commit(c);
}

static void on_response_saved(void *context, const struct session_outcome *outcome)
{
    struct call *c = context;
    struct responses *responses = c->routes->responses;
    c->committing = false;
    if (outcome->error.status || !(c->http || c->runs_on))
        responses_remove(responses, c->response); /* it has failed: nobody goes on from it */
    else
        responses_settle(responses, c->response, c->saved);
    image_drop(c->saved);
    c->saved = NULL;
    if (outcome->error.status)
        end_turn(c, &outcome->error);
    else
        after_commit(c);
}

/* A stored response goes into the store as it will be once it has ended. */
static enum status save_response(struct call *c, struct image *image, const struct stream_end *end,
                                 struct error *err)
{
    struct bytes data = {0};
    enum response_status how = end->by_limit ? RESPONSE_INCOMPLETE : RESPONSE_COMPLETED;
    response_pack(&data, c->response, how, time(NULL));
    const struct session_item item = {.kind = SESSION_RESPONSE,
                                      .name = c->response->id,
                                      .owner = c->owner,
                                      .keep_s = c->routes->options->response_ttl,
                                      .data = data.data,
                                      .n_data = data.n,
                                      .image = image,
                                      .parent = c->from,
                                      .tokens = end->tokens,
                                      .n_chunked = end->n_chunked,
                                      .n_single = end->n_single};
    enum status st =
        data.failed ? fail(err, STATUS_NOMEM, "out of memory for a response") : STATUS_OK;
    c->response->n_packed = data.n;
    c->saved = image;
    image_keep(image);
    if (!st)
        st = session_put_item(c->routes->storage.sessions, &item, on_response_saved, c, err);
    bytes_free(&data);
    return st;
}

static enum status commit_turn(void *context, struct image *image, const struct stream_end *end,
                               struct error *err)
{
    struct call *c = context;
    struct sessions *sessions = c->routes->storage.sessions;
    bool saves = storage_has_items(&c->routes->storage) && c->response && c->response->stored;
    enum status st = STATUS_OK;
    image->tail = tail_of(c, end->last, end->by_token);
    if (c->request.return_state) {
        image_hold(image);
        c->left = image;
    }
    c->in_commit = true;
    c->committing = c->turn.active || saves;
    if (c->turn.active) {
        once_note_turn(c->routes, c->outcome, &c->turn);
        st = session_commit(sessions, &c->turn, image, end->tokens, end->n_chunked, end->n_single,
                            on_committed, c, err);
    } else if (saves) {
        st = save_response(c, image, end, err);
    } else {
        after_commit(c);
    }
    if (!st && c->response && !saves)
        responses_settle(c->routes->responses, c->response, image);
    c->in_commit = false;
    if (st)
        c->committing = false;
    return st;
}

void call_open_turn(struct call *c, struct stream_setup *setup)
{
    setup->from = c->from;
    if (!c->into)
        return;
    c->stream_turn = (struct stream_turn){
        .from = c->from, .into = c->into, .commit = commit_turn, .commit_context = c};
    setup->turn = &c->stream_turn;
}
