/* perplexity.c - how well a model predicts a text. See run.h.
 *
 * Every document is read from an empty state, several at a time. Its first token has nothing
 * before it and is not scored; neither are its bytes. A model with a limited context starts anew
 * at its limit. */
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>

#include "engine/base/bytes.h"
#include "engine/run/documents.h"
#include "engine/run/interrupt.h"
#include "engine/run/run.h"

enum { READ_TOKENS = 64 };

struct tally {
    size_t n_scored, n_seen, n_total; /* tokens */
    size_t unscored_bytes;            /* text of tokens that have nothing before them */
    double nats;
    double length_nats[RUN_MAX_LENGTHS]; /* of the first tokens.. */
    size_t length_scored[RUN_MAX_LENGTHS];
};

/* A stretch of a document that is being scored. */
struct lane {
    struct job *job;  /* NULL: the lane is free */
    size_t next_seen; /* index in its document of the token that is scored next */
};

struct scoring {
    struct run *r;
    struct documents documents;
    struct lane lanes[RUN_MAX_SLOTS];
    int n_lanes;
    size_t document, at; /* where the next stretch begins */
    struct tally tally;
    int64_t start_ns, end_ns;
};

/* ---- Scores ---- */

static void count_unscored(struct scoring *s, int32_t token)
{
    struct bytes piece = {0};
    if (!tokenizer_is_special(s->r->tokenizer, token))
        tokenizer_piece(s->r->tokenizer, token, &piece);
    s->tally.unscored_bytes += piece.n;
    bytes_free(&piece);
}

static void count_score(struct scoring *s, struct lane *lane, const struct job_token *token)
{
    const struct run_options *o = &s->r->options;
    struct tally *t = &s->tally;
    size_t index = lane->next_seen++;
    t->n_seen++;
    if (isnan(token->logprob)) {
        count_unscored(s, token->token);
        return;
    }
    t->nats -= token->logprob;
    t->n_scored++;
    for (int i = 0; i < o->n_lengths; i++)
        if (index <= (size_t)o->lengths[i]) {
            t->length_nats[i] -= token->logprob;
            t->length_scored[i]++;
        }
}

/* ---- Lanes ---- */

/* Begin the next stretch, if there is one. */
static enum status start_stretch(struct scoring *s, struct lane *lane, struct error *err)
{
    if (s->document == s->documents.n)
        return STATUS_OK;
    const struct token_list *tokens = &s->documents.items[s->document].tokens;
    size_t rest = tokens->n - s->at, limit = (size_t)s->r->info.max_position;
    struct job_request request = {
        .prompt = tokens->ids + s->at,
        .n_prompt = limit && limit < rest ? limit : rest,
        .prompt_logprobs = 0,
    };
    sampling_params_init(&request.sampling);
    lane->next_seen = s->at;
    s->at += request.n_prompt;
    if (s->at == tokens->n) {
        s->document++;
        s->at = 0;
    }
    return run_start(s->r, &request, &lane->job, err);
}

/* Take what a lane has; true when it has ended, with its job's error. */
static bool drain(struct scoring *s, struct lane *lane)
{
    struct job_token scores[READ_TOKENS];
    bool is_last = false; /* it will not be woken: what is there now is the rest */
    for (;;) {
        size_t n = job_read(lane->job, scores, READ_TOKENS);
        for (size_t i = 0; i < n; i++)
            count_score(s, lane, &scores[i]);
        if (n == 0 && is_last)
            return true;
        if (n == 0 && job_park(lane->job))
            return false;
        is_last = n == 0;
    }
}

/* Sleep until some parked job has something. */
static void wait_for_lanes(struct run *r)
{
    while (sem_wait(&r->ready) && errno == EINTR)
        ;
    for (struct job *job; (job = engine_take_ready(r->engine));)
        job_release(job);
}

static enum status end_lane(struct lane *lane, struct error *err)
{
    struct job_snapshot snapshot;
    struct job *job = lane->job;
    lane->job = NULL;
    return run_end(job, &snapshot, err);
}

/* One round over all lanes: start, read, end. *busy: some are still under way. */
static enum status serve_lanes(struct scoring *s, bool *busy, struct error *err)
{
    enum status st = STATUS_OK;
    *busy = false;
    for (int i = 0; i < s->n_lanes && !st; i++) {
        struct lane *lane = &s->lanes[i];
        if (!lane->job && !interrupt_happened())
            st = start_stretch(s, lane, err);
        while (!st && lane->job && drain(s, lane)) {
            st = end_lane(lane, err);
            if (!st && !interrupt_happened())
                st = start_stretch(s, lane, err);
        }
        *busy |= lane->job != NULL;
    }
    return st;
}

static void cancel_lanes(struct scoring *s)
{
    for (int i = 0; i < s->n_lanes; i++)
        if (s->lanes[i].job)
            job_cancel(s->lanes[i].job);
}

static enum status score_all(struct scoring *s, struct error *err)
{
    bool busy;
    enum status st;
    interrupt_await(); /* lanes end and start: which job a signal cancels is left to chance */
    while (!(st = serve_lanes(s, &busy, err)) && busy) {
        run_show_bar(s->r, "scoring",
                     (int)(100.0 * (double)s->tally.n_seen / (double)s->tally.n_total));
        wait_for_lanes(s->r);
        if (interrupt_happened())
            cancel_lanes(s);
    }
    for (int i = 0; i < s->n_lanes; i++)
        if (s->lanes[i].job)
            end_lane(&s->lanes[i], NULL);
    run_clear_bar(s->r);
    return st;
}

/* ---- The report ---- */

static double perplexity_of(double nats, size_t n)
{
    return n ? exp(nats / (double)n) : NAN;
}

/* NAN where some of the text has not been scored, or is cut. */
static double bits_per_byte(const struct scoring *s)
{
    const struct tally *t = &s->tally;
    size_t n_bytes = documents_bytes(&s->documents);
    return t->n_seen == t->n_total && n_bytes > t->unscored_bytes
               ? t->nats / M_LN2 / (double)(n_bytes - t->unscored_bytes)
               : NAN;
}

static void report_text(const struct scoring *s)
{
    const struct tally *t = &s->tally;
    const struct run_options *o = &s->r->options;
    double bits = bits_per_byte(s);
    size_t n_bytes = documents_bytes(&s->documents);
    if (t->n_scored == 0) {
        printf(t->n_seen == t->n_total ? "nothing to score: %zu tokens\n"
                                       : "nothing was scored of %zu tokens (interrupted)\n",
               t->n_total);
        return;
    }
    for (int i = 0; i < o->n_lengths; i++)
        printf("first %d tokens: perplexity %.4f a token\n", o->lengths[i],
               perplexity_of(t->length_nats[i], t->length_scored[i]));
    printf("perplexity %.4f a token", perplexity_of(t->nats, t->n_scored));
    if (!isnan(bits))
        printf(", %.4f bits a byte", bits);
    printf("; %zu tokens", t->n_seen);
    if (n_bytes)
        printf(", %zu bytes", n_bytes);
    if (s->documents.n > 1)
        printf(", %zu documents", s->documents.n);
    puts(t->n_seen == t->n_total ? "" : " (interrupted)");
    if (!o->quiet)
        fprintf(stderr, "%.1f tokens/s\n", run_rate((double)t->n_seen, s->start_ns, s->end_ns));
}

static void add_number(struct bytes *out, const char *name, double value)
{
    bytes_format(out, "\"%s\":", name);
    bytes_json_number(out, value); /* null for NAN */
    bytes_text(out, ",");
}

static void add_lengths(struct bytes *out, const struct scoring *s)
{
    const struct run_options *o = &s->r->options;
    bytes_text(out, "\"lengths\":[");
    for (int i = 0; i < o->n_lengths; i++) {
        bytes_format(out, "%s{\"tokens\":%d,\"perplexity\":", i ? "," : "", o->lengths[i]);
        bytes_json_number(out, perplexity_of(s->tally.length_nats[i], s->tally.length_scored[i]));
        bytes_text(out, "}");
    }
    bytes_text(out, "],");
}

static enum status report_json(const struct scoring *s, struct error *err)
{
    const struct tally *t = &s->tally;
    struct bytes out = {0};
    bytes_text(&out, "{");
    add_number(&out, "perplexity", perplexity_of(t->nats, t->n_scored));
    add_number(&out, "bits_per_byte", bits_per_byte(s));
    add_lengths(&out, s);
    add_number(&out, "tokens_per_second", run_rate((double)t->n_seen, s->start_ns, s->end_ns));
    bytes_format(&out, "\"documents\":%zu,\"bytes\":%zu,\"tokens\":%zu,\"scored_tokens\":%zu",
                 s->documents.n, documents_bytes(&s->documents), t->n_seen, t->n_scored);
    bytes_format(&out, ",\"complete\":%s}", t->n_seen == t->n_total ? "true" : "false");
    enum status st = out.failed ? fail(err, STATUS_NOMEM, "out of memory for a report") : STATUS_OK;
    if (!st)
        puts(out.data);
    bytes_free(&out);
    return st;
}

/* ---- All together ---- */

/* With lengths all documents are cut to the longest, and those that are shorter go: so that all
 * figures are of the same texts. N scored tokens need one before them. */
static enum status cut_to_lengths(struct scoring *s, struct error *err)
{
    const struct run_options *o = &s->r->options;
    if (!o->n_lengths)
        return STATUS_OK;
    int longest = o->lengths[o->n_lengths - 1];
    if (s->r->info.max_position && longest >= s->r->info.max_position)
        return fail(err, STATUS_INVALID,
                    "--lengths %d: the model reads %" PRId64 " tokens at most, and one more is "
                    "needed (max_position_embeddings of its config.json)",
                    longest, s->r->info.max_position);
    documents_cut(&s->documents, (size_t)longest + 1);
    if (s->documents.n == 0)
        return fail(err, STATUS_INVALID, "--lengths %d: no document has more tokens than that",
                    longest);
    return STATUS_OK;
}

static enum status load_and_score(struct scoring *s, struct error *err)
{
    struct run *r = s->r;
    int64_t n_slots = r->options.slots;
    s->n_lanes = (int)((size_t)n_slots < s->documents.n ? (size_t)n_slots : s->documents.n);
    s->n_lanes = s->n_lanes ? s->n_lanes : 1;
    enum status st = run_load(r, s->n_lanes, err);
    if (!st)
        st = documents_encode(&s->documents, r->tokenizer, err);
    if (!st)
        st = cut_to_lengths(s, err);
    if (st)
        return st;
    s->tally.n_total = documents_tokens(&s->documents);
    s->start_ns = job_clock_ns();
    st = score_all(s, err);
    s->end_ns = job_clock_ns();
    return st;
}

enum status perplexity(struct run *r, struct error *err)
{
    struct scoring s = {.r = r};
    enum status st = documents_read(&s.documents, r->options.perplexity_file, err);
    if (!st)
        st = load_and_score(&s, err);
    if (!st && r->options.json)
        st = report_json(&s, err);
    else if (!st)
        report_text(&s);
    documents_free(&s.documents);
    return st;
}
