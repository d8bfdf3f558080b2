/* perplexity.c - how well a model predicts a text. See run.h. */
#include <math.h>
#include <stdio.h>

#include "engine/base/bytes.h"
#include "engine/run/interrupt.h"
#include "engine/run/run.h"
#include "engine/run/text.h"

enum { READ_TOKENS = 64 };

struct tally {
    size_t n_scored, n_seen, n_total; /* tokens */
    size_t unscored_bytes;            /* text of tokens that have nothing before them */
    double nats;
};

static void count_score(const struct run *r, struct tally *t, const struct job_token *token)
{
    t->n_seen++;
    if (!isnan(token->logprob)) {
        t->nats -= token->logprob;
        t->n_scored++;
        return;
    }
    struct bytes piece = {0};
    if (!tokenizer_is_special(r->tokenizer, token->token))
        tokenizer_piece(r->tokenizer, token->token, &piece);
    t->unscored_bytes += piece.n;
    bytes_free(&piece);
}

static void count_scores(struct run *r, struct tally *t, struct job *job)
{
    struct job_token scores[READ_TOKENS];
    for (;;) {
        job_wait(job);
        size_t n = job_read(job, scores, READ_TOKENS);
        if (!n)
            return;
        for (size_t i = 0; i < n; i++)
            count_score(r, t, &scores[i]);
        run_show_bar(r, "scoring", (int)(100.0 * (double)t->n_seen / (double)t->n_total));
    }
}

/* One stretch of tokens, scored from an empty state. */
static enum status score_tokens(struct run *r, const int32_t *tokens, size_t n, struct tally *t,
                                struct error *err)
{
    struct job_request request = {.prompt = tokens, .n_prompt = n, .prompt_logprobs = 0};
    struct job *job;
    struct job_snapshot snapshot;
    sampling_params_init(&request.sampling);
    enum status st = run_start(r, &request, &job, err);
    if (st)
        return st;
    count_scores(r, t, job);
    return run_end(job, &snapshot, err);
}

/* A model with a limited context starts anew at its limit. */
static enum status score_all(struct run *r, const struct token_list *tokens, struct tally *t,
                             struct error *err)
{
    size_t limit = r->info.max_position ? (size_t)r->info.max_position : tokens->n;
    enum status st = STATUS_OK;
    for (size_t i = 0; !st && i < tokens->n && !interrupt_happened(); i += limit) {
        size_t rest = tokens->n - i;
        st = score_tokens(r, tokens->ids + i, rest < limit ? rest : limit, t, err);
    }
    run_clear_bar(r);
    return st;
}

static void report(const struct run *r, const struct tally *t, size_t n_bytes, int64_t start_ns)
{
    bool whole = t->n_seen == t->n_total;
    if (t->n_scored == 0) {
        printf("nothing to score: %zu tokens\n", t->n_total);
        return;
    }
    printf("perplexity %.4f a token", exp(t->nats / (double)t->n_scored));
    if (whole && n_bytes > t->unscored_bytes)
        printf(", %.4f bits a byte", t->nats / M_LN2 / (double)(n_bytes - t->unscored_bytes));
    printf("; %zu tokens, %zu bytes%s\n", t->n_seen, n_bytes, whole ? "" : " (interrupted)");
    if (!r->options.quiet)
        fprintf(stderr, "%.1f tokens/s\n", run_rate((double)t->n_seen, start_ns, job_clock_ns()));
}

enum status perplexity(struct run *r, struct error *err)
{
    struct bytes text = {0};
    struct token_list tokens = {0};
    enum status st = text_read(&text, r->options.perplexity_file, err);
    if (!st)
        st = tokenizer_encode(r->tokenizer, text.data ? text.data : "", text.n,
                              TOKENIZER_ADD_SPECIAL, &tokens, err);
    struct tally tally = {.n_total = tokens.n};
    int64_t start_ns = job_clock_ns();
    if (!st)
        st = score_all(r, &tokens, &tally, err);
    if (!st)
        report(r, &tally, text.n, start_ns);
    token_list_free(&tokens);
    bytes_free(&text);
    return st;
}
