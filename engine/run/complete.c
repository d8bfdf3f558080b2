/* complete.c - a completion, or the answer of a chat, as it comes. See run.h. */
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>

#include "engine/base/bytes.h"
#include "engine/run/run.h"
#include "engine/run/text.h"

enum { DEFAULT_MAX_TOKENS = 256, READ_TOKENS = 64 };

/* ---- The request ---- */

static float chosen(double option, double model, double fallback)
{
    return (float)(!isnan(option) ? option : !isnan(model) ? model : fallback);
}

static void fill_sampling(struct run *r, struct sampling_params *p)
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
}

static int64_t max_tokens(const struct run *r)
{
    int64_t option = r->options.max_tokens, model = r->info.generation.max_new_tokens;
    if (option != INT64_MIN)
        return option;
    return model > 0 ? model : DEFAULT_MAX_TOKENS;
}

/* The conversation that the prompt opens, as the template writes it. */
static enum status render_chat(const struct run *r, const struct bytes *prompt, struct bytes *out,
                               struct error *err)
{
    const char *system = r->options.system, *text = prompt->data ? prompt->data : "";
    struct chat_message messages[2];
    size_t n = 0;
    if (system)
        messages[n++] = (struct chat_message){CHAT_ROLE_SYSTEM, system, strlen(system)};
    messages[n++] = (struct chat_message){CHAT_ROLE_USER, text, prompt->n};
    return chat_template_render(r->template, messages, n, CHAT_ADD_GENERATION_PROMPT, out, err);
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

/* A template writes the beginning of the text itself: no special tokens are added to it. */
static enum status encode_prompt(const struct run *r, const struct bytes *prompt,
                                 struct token_list *out, struct error *err)
{
    struct bytes rendered = {0};
    const struct bytes *text = prompt;
    enum status st = STATUS_OK;
    if (r->options.chat) {
        st = render_chat(r, prompt, &rendered, err);
        text = &rendered;
    }
    if (!st)
        st = tokenizer_encode(r->tokenizer, text->data ? text->data : "", text->n,
                              r->options.chat ? 0 : TOKENIZER_ADD_SPECIAL, out, err);
    bytes_free(&rendered);
    return st;
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

/* Print the job's text as it comes, until it ends. */
static enum status stream_job(struct run *r, struct job *job, struct error *err)
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
        for (size_t i = 0; i < n; i++)
            detokenizer_push(&detokenizer, tokens[i].token, &text);
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

static void report(const struct run *r, const struct job_snapshot *s)
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

static enum status complete_tokens(struct run *r, const struct token_list *prompt,
                                   struct error *err)
{
    struct job_request request = {
        .prompt = prompt->ids,
        .n_prompt = prompt->n,
        .max_tokens = max_tokens(r),
        .prompt_logprobs = -1,
    };
    struct job *job;
    struct job_snapshot snapshot;
    fill_sampling(r, &request.sampling);
    if (r->options.chat)
        add_chat_stops(r, &request.sampling);
    enum status st = run_start(r, &request, &job, err);
    if (st)
        return st;
    st = stream_job(r, job, err);
    enum status ended = run_end(job, &snapshot, st ? NULL : err);
    if (st || ended)
        return st ? st : ended;
    fputc('\n', stdout);
    fflush(stdout);
    report(r, &snapshot);
    return STATUS_OK;
}

enum status complete(struct run *r, struct error *err)
{
    struct bytes text = {0};
    struct token_list prompt = {0};
    enum status st = r->options.prompt ? text_take(&text, r->options.prompt, err)
                                       : text_read(&text, r->options.prompt_file, err);
    if (!st && r->options.echo && text.n)
        fwrite(text.data, 1, text.n, stdout);
    if (!st)
        st = encode_prompt(r, &text, &prompt, err);
    if (!st)
        st = complete_tokens(r, &prompt, err);
    token_list_free(&prompt);
    bytes_free(&text);
    return st;
}
