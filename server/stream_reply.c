/* stream_reply.c - what the choices of a generation have to say: server-sent events, or the whole
 * reply. See stream_private.h. */
#include "server/stream_private.h"

#include <math.h>

#include "server/http.h"

enum { LIST_BYTES = 64 << 10 }; /* lists of this size are sent without any text */

/* ---- events -------------------------------------------------------------------------------- */

/* One event with one choice. Chat names the prompt's ids at the top of the first event. */
static void write_event(struct generation *g, struct sequence *s, struct codec_choice *c)
{
    const struct codec_request *q = g->setup.request;
    bool ids_now = q->return_token_ids && !s->prompt_sent;
    bool chat = q->api == CODEC_CHAT;
    struct codec_reply reply = g->setup.reply;
    if (c->finish)
        reply.state = g->turn.state;
    if (ids_now && !chat) {
        c->prompt_ids = s->prompt->ids + s->prompt->n_carried;
        c->n_prompt_ids = s->prompt->n - s->prompt->n_carried;
    }
    c->index = s->index;
    c->lists = &s->output.lists;
    c->logprobs = q->n_logprobs >= 0 && !c->role;
    c->ids = q->return_token_ids;
    bytes_text(&g->events, "data: ");
    codec_write_head(&g->events, &reply,
                     ids_now && chat ? s->prompt->ids + s->prompt->n_carried : NULL,
                     s->prompt->n - s->prompt->n_carried);
    codec_write_choice(&g->events, &reply, c, true);
    codec_write_tail(&g->events, &reply,
                     q->include_usage && q->continuous_usage ? &g->usage : NULL);
    bytes_text(&g->events, "\n\n");
    s->prompt_sent = true;
}

static size_t list_bytes(const struct output *o)
{
    return o->lists.logprobs[0].n + o->lists.ids.n;
}

/* An echo waits for the first token, as the status of the reply does. Chat gives the role first
 * and the finish_reason in a last event of its own; completions put it beside the last text. */
void stream_reply_events(struct generation *g, struct sequence *s)
{
    if (g->setup.response) {
        stream_response_events(g, s);
        return;
    }
    bool chat = g->setup.request->api == CODEC_CHAT;
    struct output *o = &s->output;
    bool end = s->finish && !s->finish_sent && stream_turn_is_settled(g);
    bool any = o->ready || (s->finish ? list_bytes(o) > 0 : list_bytes(o) > LIST_BYTES);
    if (!end && !(any && s->begun))
        return;
    if (chat && !s->role_sent) {
        write_event(g, s, &(struct codec_choice){.role = true});
        s->role_sent = true;
    }
    if (any || !chat) {
        struct codec_choice c = {.text = {o->text.data, o->ready}};
        c.finish = chat || !end ? NULL : s->finish;
        write_event(g, s, &c);
        output_take(o);
        stream_count_bytes(g, s);
    }
    if (end && chat)
        write_event(g, s, &(struct codec_choice){.finish = s->finish});
    s->finish_sent |= end;
}

void stream_reply_end(struct generation *g)
{
    g->ended = true;
    if (g->setup.response) /* its last event is the end */
        return;
    if (g->setup.request->include_usage) {
        bytes_text(&g->events, "data: ");
        codec_write_head(&g->events, &g->setup.reply, NULL, 0);
        codec_write_tail(&g->events, &g->setup.reply, &g->usage);
        bytes_text(&g->events, "\n\n");
    }
    bytes_text(&g->events, "data: [DONE]\n\n");
}

void stream_reply_error(struct generation *g)
{
    g->ended = true;
    if (g->setup.response) {
        stream_response_error(g);
        return;
    }
    bytes_text(&g->events, "data: ");
    http_error_json(&g->events, http_status_of(g->error.status), g->error.text,
                    *g->error.field ? g->error.field : NULL, NULL);
    bytes_text(&g->events, "\n\n");
}

/* ---- whole replies ------------------------------------------------------------------------- */

static double mean_logprob(const struct sequence *s)
{
    return s->output.n_tokens ? s->output.sum_logprob / (double)s->output.n_tokens : -INFINITY;
}

/* Put the likeliest sequences of one prompt first; equal ones stay in order. */
static void rank(struct sequence *sequences, size_t n)
{
    for (size_t i = 1; i < n; i++) {
        struct sequence s = sequences[i];
        size_t j = i;
        for (; j && mean_logprob(&sequences[j - 1]) < mean_logprob(&s); j--)
            sequences[j] = sequences[j - 1];
        sequences[j] = s;
    }
}

static void write_whole_choice(struct generation *g, struct sequence *s, int64_t index,
                               struct bytes *out)
{
    const struct codec_request *q = g->setup.request;
    struct codec_choice c = {
        .index = index,
        .text = {s->output.text.data, s->output.ready},
        .lists = &s->output.lists,
        .logprobs = q->n_logprobs >= 0,
        .ids = q->return_token_ids,
        .finish = s->finish,
    };
    if (q->return_token_ids && q->api == CODEC_COMPLETIONS) {
        c.prompt_ids = s->prompt->ids + s->prompt->n_carried;
        c.n_prompt_ids = s->prompt->n - s->prompt->n_carried;
    }
    codec_write_choice(out, &g->setup.reply, &c, index == 0);
}

void stream_write(struct generation *g, struct bytes *out)
{
    if (g->setup.response) {
        response_write(out, g->setup.response);
        return;
    }
    const struct codec_request *q = g->setup.request;
    size_t best_of = (size_t)q->best_of, n = (size_t)q->n;
    bool ids = q->return_token_ids && q->api == CODEC_CHAT;
    const struct stream_prompt *first = g->setup.prompts;
    struct codec_reply reply = g->setup.reply;
    reply.state = g->turn.state;
    codec_write_head(out, &reply, ids ? first->ids + first->n_carried : NULL,
                     first->n - first->n_carried);
    for (size_t p = 0; p < g->setup.n_prompts; p++) {
        struct sequence *of_prompt = g->sequences + p * best_of;
        if (best_of > n)
            rank(of_prompt, best_of);
        for (size_t i = 0; i < n; i++)
            write_whole_choice(g, &of_prompt[i], (int64_t)(p * n + i), out);
    }
    codec_write_tail(out, &reply, &g->usage);
}
