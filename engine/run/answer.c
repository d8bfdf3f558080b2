/* answer.c - see answer.h */
#include "engine/run/answer.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>

enum { DEFAULT_MAX_TOKENS = 256, READ_TOKENS = 64 };

/* ---- The request ---- */

static float chosen(double option, double model, double fallback)
{
    return (float)(!isnan(option) ? option : !isnan(model) ? model : fallback);
}

/* Stop where the template ends an answer. */
static void add_chat_stops(const struct run *r, struct sampling_params *sampling)
{
    const char *stops[4];
    int n = chat_template_stops(r->template, stops);
    for (int i = 0; i < n; i++) {
        int32_t id = tokenizer_find(r->tokenizer, stops[i], strlen(stops[i]));
        if (id >= 0)
            sampling->stop_tokens[sampling->n_stop_tokens++] = id;
    }
}

void answer_fill_sampling(struct run *r, struct sampling_params *p)
{
    struct run_options *o = &r->options;
    const struct generation_defaults *g = &r->info.generation;
    sampling_params_init(p);
    p->temperature = chosen(o->temperature, g->temperature, 1);
    p->top_p = chosen(o->top_p, g->top_p, 1);
    p->min_p = chosen(o->min_p, g->min_p, 0);
    p->typical_p = chosen(o->typical_p, g->typical_p, 1);
    p->repetition_penalty = chosen(o->repetition_penalty, g->repetition_penalty, 1);
    p->top_k = o->top_k != INT64_MIN ? (int)o->top_k : g->top_k > 0 ? g->top_k : 0;
    p->ignore_eos = o->ignore_eos;
    if (!o->has_seed && getrandom(&o->seed, sizeof(o->seed), 0) == sizeof(o->seed))
        o->seed >>= 32; /* short enough to type again */
    p->seed = o->seed;
    if (o->chat && !o->ignore_eos)
        add_chat_stops(r, p);
}

int64_t answer_max_tokens(const struct run *r)
{
    int64_t option = r->options.max_tokens, model = r->info.generation.max_new_tokens;
    if (option != INT64_MIN)
        return option;
    return model > 0 ? model : DEFAULT_MAX_TOKENS;
}

/* ---- The answer ---- */

static enum status print_text(struct bytes *text, struct error *err)
{
    if (text->failed)
        return fail(err, STATUS_NOMEM, "output: out of memory");
    if (fwrite(text->data, 1, text->n, stdout) != text->n || fflush(stdout))
        return fail(err, STATUS_IO, "stdout: %s", strerror(errno));
    bytes_consume(text, text->n);
    return STATUS_OK;
}

enum status answer_stream(struct run *r, struct job *job, struct bytes *drawn, struct error *err)
{
    struct detokenizer detokenizer;
    struct bytes text = {0};
    struct job_token tokens[READ_TOKENS];
    enum status st = STATUS_OK;
    size_t n = 1; /* 0: the job has ended and its ring is empty */
    detokenizer_init(&detokenizer, r->tokenizer, true);
    while (!st && n) {
        job_wait(job);
        n = job_read(job, tokens, READ_TOKENS);
        for (size_t i = 0; i < n; i++) {
            detokenizer_push(&detokenizer, tokens[i].token, &text);
            if (drawn)
                bytes_append(drawn, &tokens[i].token, sizeof(tokens[i].token));
        }
        if (!n)
            detokenizer_finish(&detokenizer, &text);
        if (text.n || text.failed)
            st = print_text(&text, err);
    }
    if (st)
        job_cancel(job);
    bytes_free(&text);
    return st;
}

void answer_report(const struct run *r, const struct job_snapshot *s)
{
    static const char *const ends[] = {"", "end of text", "length", "interrupted", "error"};
    int64_t prompt_end_ns = s->first_token_ns ? s->first_token_ns : s->finished_ns;
    double n_decoded = s->n_output > 1 ? (double)(s->n_output - 1) : 0;
    if (r->options.quiet)
        return;
    fprintf(stderr,
            "prompt %zu tokens, %.1f tokens/s; output %zu tokens, %.1f tokens/s; %s; seed %" PRIu64
            "\n",
            s->n_prompt_done, run_rate((double)s->n_prompt_done, s->admitted_ns, prompt_end_ns),
            s->n_output, run_rate(n_decoded, s->first_token_ns, s->finished_ns), ends[s->finish],
            r->options.seed);
}
