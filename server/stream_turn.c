/* stream_turn.c - the end of a session's turn: the state after exactly what the client was given.
 * See stream_private.h.
 *
 * When the engine ends a turn by itself, at its limit or with a stop token, it leaves that state.
 * A stop string is found here, when the engine may be tokens ahead: then the turn is computed
 * again from the state it began with, at the speed of a prompt. What the session has seen then is
 * the text that the client got: the tokens that lie before the stop string, and the rest of that
 * text, tokenized, where the stop string begins within a token.
 */
#include <stdlib.h>
#include <string.h>

#include "server/stream_private.h"

bool stream_turn_is_settled(const struct generation *g)
{
    return !g->setup.turn || g->turn.settled;
}

/* ---- what was given ---- */

static bool grow(struct turn *t)
{
    size_t cap = t->cap ? 2 * t->cap : 64;
    int32_t *ids = realloc(t->ids, cap * sizeof(*ids));
    t->ids = ids ? ids : t->ids;
    int64_t *ends = ids ? realloc(t->ends, cap * sizeof(*ends)) : NULL;
    t->ends = ends ? ends : t->ends;
    if (ends)
        t->cap = cap;
    return ends != NULL;
}

/* Text only grows from token to token, but for a stop string that is found and cut off. */
static void follow_text(struct turn *t, const struct output *o)
{
    size_t total = (size_t)o->n_taken_bytes + o->text.n;
    if (total > t->text.n)
        bytes_append(&t->text, o->text.data + (t->text.n - (size_t)o->n_taken_bytes),
                     total - t->text.n);
    else
        t->text.n = total;
}

void stream_turn_note(struct generation *g, const struct sequence *s, int32_t id)
{
    struct turn *t = &g->turn;
    if (t->n == t->cap && !grow(t)) {
        t->failed = true;
        return;
    }
    follow_text(t, &s->output);
    t->ids[t->n] = id;
    t->ends[t->n++] = (int64_t)t->text.n;
}

/* ---- the end ---- */

static enum status commit(struct generation *g, struct image *image, const struct stream_end *end,
                          struct error *err)
{
    const struct stream_turn *turn = g->setup.turn;
    if (g->setup.response)
        stream_response_gather(g);
    g->turn.committing = true;
    g->n_running++;
    enum status st = turn->commit(turn->commit_context, image, end, err);
    if (st) {
        g->turn.committing = false;
        g->n_running--;
    }
    return st;
}

void stream_turn_committed(struct generation *g, const struct codec_session *session,
                           const struct error *err)
{
    struct turn *t = &g->turn;
    CHECK(t->committing && !t->committed);
    t->committed = true;
    t->error = *err;
    if (!err->status)
        g->setup.reply.session = *session;
}

void stream_give_state(struct generation *g, struct codec_text state)
{
    g->turn.state = state;
}

/* True when it has been committed, or not. */
static bool end_commit(struct generation *g, struct error *err)
{
    struct turn *t = &g->turn;
    if (!t->committed)
        return false;
    t->committing = t->committed = false;
    g->n_running--;
    t->settled = !t->error.status;
    t->failed = !t->settled;
    *err = t->error;
    return true;
}

static int64_t end_of(const struct turn *t, size_t n)
{
    return n ? t->ends[n - 1] : 0;
}

/* Tokens that lie before the end of the text; the last one completed the stop string. Those at
 * the end that gave no text may be the beginning of a character that was cut off. */
static size_t n_whole_tokens(const struct turn *t)
{
    size_t n = t->n ? t->n - 1 : 0;
    while (n && end_of(t, n) > (int64_t)t->text.n)
        n--;
    while (n && end_of(t, n) == (int64_t)t->text.n && end_of(t, n - 1) == end_of(t, n))
        n--;
    return n;
}

/* ids become the turn's. */
static enum status replay(struct generation *g, int32_t *ids, size_t n, struct error *err)
{
    struct turn *t = &g->turn;
    struct job_request request = {
        .prompt = ids,
        .n_prompt = n,
        .deadline_ms = g->setup.deadline_ms,
        .prompt_logprobs = -1,
        .from = g->setup.turn->from,
        .user = g->setup.owner,
    };
    sampling_params_init(&request.sampling);
    t->replayed = ids;
    t->n_replayed = n;
    enum status st = image_new(&t->into, g->setup.turn->into->store, err);
    request.into = t->into;
    if (!st)
        st = job_new(&t->replay, &request, err);
    if (!st)
        st = g->setup.submit(g->setup.submit_context, t->replay, err);
    if (!st)
        g->n_running++;
    return st;
}

/* The prompt again, then what was given of the output. */
static enum status begin_replay(struct generation *g, struct error *err)
{
    struct turn *t = &g->turn;
    const struct stream_prompt *prompt = g->setup.prompts;
    size_t n_whole = n_whole_tokens(t), at = (size_t)end_of(t, n_whole);
    struct token_list rest = {0};
    enum status st = STATUS_OK;
    if (at < t->text.n)
        st = tokenizer_encode(g->setup.tokenizer, t->text.data + at, t->text.n - at,
                              TOKENIZER_NO_PARSE_SPECIAL, &rest, err);
    size_t n = prompt->n + n_whole + rest.n;
    int32_t *ids = st ? NULL : malloc(n * sizeof(*ids));
    if (!st && !ids)
        st = fail(err, STATUS_NOMEM, "out of memory for the turn of a session");
    if (ids) {
        memcpy(ids, prompt->ids, prompt->n * sizeof(*ids));
        if (n_whole)
            memcpy(ids + prompt->n, t->ids, n_whole * sizeof(*ids));
        if (rest.n)
            memcpy(ids + prompt->n + n_whole, rest.ids, rest.n * sizeof(*ids));
        st = replay(g, ids, n, err);
    }
    token_list_free(&rest);
    return st;
}

/* The engine left the state after what was given; where it fed the last token already, that too. */
static enum status commit_whole(struct generation *g, enum job_finish ended, struct error *err)
{
    struct turn *t = &g->turn;
    const struct stream_prompt *prompt = g->setup.prompts;
    struct image *image = g->setup.turn->into;
    size_t n_fed = t->n - (size_t)image->n_pending;
    int32_t *ids = malloc((prompt->n + t->n + 1) * sizeof(*ids));
    if (!ids)
        return fail(err, STATUS_NOMEM, "out of memory for the turn of a session");
    memcpy(ids, prompt->ids, prompt->n * sizeof(*ids));
    if (n_fed)
        memcpy(ids + prompt->n, t->ids, n_fed * sizeof(*ids));
    struct stream_end end = {.tokens = ids,
                             .n_chunked = prompt->n,
                             .n_single = n_fed,
                             .last = t->n ? t->ids[t->n - 1] : -1,
                             .by_token = ended == FINISH_STOP,
                             .by_limit = ended == FINISH_LENGTH};
    enum status st = commit(g, image, &end, err);
    free(ids);
    return st;
}

enum status stream_turn_settle(struct generation *g, const struct sequence *s,
                               enum job_finish ended, struct error *err)
{
    struct turn *t = &g->turn;
    if (s->output.stopped)
        follow_text(t, &s->output); /* the end may have brought the cut */
    if (t->failed || t->text.failed)
        return fail(err, STATUS_NOMEM, "out of memory for the turn of a session");
    if (s->output.stopped)
        return begin_replay(g, err);
    CHECK(ended == FINISH_STOP || ended == FINISH_LENGTH);
    return commit_whole(g, ended, err);
}

/* True when the replay is over. */
static bool end_replay(struct generation *g, struct error *err)
{
    struct turn *t = &g->turn;
    struct job_snapshot snapshot;
    job_snapshot(t->replay, &snapshot);
    if (snapshot.finish == FINISH_NONE)
        return false;
    job_set_user(t->replay, NULL);
    job_release(t->replay);
    t->replay = NULL;
    g->n_running--;
    *err = snapshot.error;
    struct stream_end end = {.tokens = t->replayed, .n_chunked = t->n_replayed, .last = -1};
    t->failed = snapshot.finish != FINISH_LENGTH || commit(g, t->into, &end, err);
    return true;
}

bool stream_turn_advance(struct generation *g, struct error *err)
{
    bool any = g->turn.replay && end_replay(g, err);
    if (!g->turn.failed && g->turn.committing)
        any |= end_commit(g, err);
    return any;
}

void stream_turn_free(struct generation *g)
{
    struct turn *t = &g->turn;
    if (t->replay) {
        job_cancel(t->replay);
        job_set_user(t->replay, NULL);
        job_release(t->replay);
    }
    image_release(t->into);
    bytes_free(&t->text);
    free(t->replayed);
    free(t->ids);
    free(t->ends);
}
