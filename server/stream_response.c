/* stream_response.c - a generation of the Responses API: its one choice becomes a response
 * (responses.h), whose events are framed where the reply is a stream. See stream_private.h. */
#include <time.h>

#include "server/stream_private.h"

static void frame_events(struct generation *g)
{
    const struct response *r = g->setup.response;
    size_t n = g->setup.request->stream ? response_n_events(r) : 0;
    while (g->n_told < n)
        response_write_event(&g->events, r, g->n_told++);
}

static void add_ids(struct response *r, const struct output *o)
{
    if (!o->lists.ids.n)
        return;
    if (r->token_ids.n)
        bytes_char(&r->token_ids, ',');
    bytes_append(&r->token_ids, o->lists.ids.data, o->lists.ids.n);
}

/* What is ready moves from the output to the response, and is held there to the end. */
static void move_text(struct generation *g, struct sequence *s, bool end)
{
    struct response *r = g->setup.response;
    struct output *o = &s->output;
    size_t before = response_bytes(r);
    if (o->ready || (end && o->lists.logprobs[0].n))
        response_add(r, o->text.data, o->ready, &o->lists.logprobs[0]);
    else if (!end)
        return;
    add_ids(r, o);
    output_take(o);
    stream_count_bytes(g, s);
    g->n_bytes += response_bytes(r) - before;
}

void stream_response_gather(struct generation *g)
{
    struct response *r = g->setup.response;
    struct sequence *s = &g->sequences[0];
    const struct stream_prompt *p = s->prompt;
    response_begin(r);
    move_text(g, s, true);
    r->input_tokens = r->cached_tokens + g->usage.prompt_tokens;
    r->output_tokens = g->usage.completion_tokens;
    r->prompt_ids.n = 0;
    for (size_t i = p->n_carried; r->lists_ids && i < p->n; i++)
        bytes_format(&r->prompt_ids, i > p->n_carried ? ",%d" : "%d", p->ids[i]);
}

static void end_response(struct generation *g, const struct sequence *s)
{
    struct response *r = g->setup.response;
    stream_response_gather(g);
    response_end(r, s->finish[0] == 'l' ? RESPONSE_INCOMPLETE : RESPONSE_COMPLETED, time(NULL));
}

void stream_response_events(struct generation *g, struct sequence *s)
{
    struct response *r = g->setup.response;
    bool end = s->finish && !s->finish_sent && stream_turn_is_settled(g);
    if (s->finish_sent || !(s->begun || s->finish))
        return;
    response_begin(r);
    move_text(g, s, s->finish != NULL);
    if (end)
        end_response(g, s);
    s->finish_sent |= end;
    g->events.failed |= response_failed(r);
    frame_events(g);
}

void stream_response_error(struct generation *g)
{
    response_fail(g->setup.response, &g->error);
    frame_events(g);
}
