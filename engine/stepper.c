/* stepper.c - see stepper.h */
#include "engine/stepper.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_DEPTH = 2 };

/* What a sequence of a queued step brings. */
struct wanted {
    int n_scores;
    bool draws;
};

/* A step that is queued and not collected. */
struct queued {
    int n_seqs, n_draws, n_scores;
    struct wanted *wanted;   /* [max_seqs]; the device's way only */
    struct sampled *results; /* [2 * max_logit_rows] in the order of the contract */
};

/* Drawing on the host; all empty where the device draws. */
struct host {
    struct sampler *sampler;
    struct sampling_params *params; /* [n_slots], each with its part of biases */
    struct logit_bias *biases;      /* [n_slots, SAMPLER_MAX_LOGIT_BIAS], touched as far as used */
    bool *counts;                   /* [n_slots] penalties need to know the tokens */
    int32_t *drawn;                 /* [n_slots] last token */
};

struct stepper {
    struct model *model; /* borrowed */
    struct stepper_options options;
    bool on_device;
    int depth, max_seqs;
    size_t vocab_size;
    struct host host;

    /* The step that is being put together. */
    int32_t *tokens;           /* [max_rows] */
    struct model_seq *seqs;    /* [max_seqs] */
    struct step_draw *draws;   /* [max_logit_rows] */
    struct step_score *scores; /* [max_logit_rows] */

    struct queued queued[MAX_DEPTH];
    int oldest, n_queued;
};

/* ---- Putting a step together ---- */

static enum logits_wanted logits_of(const struct stepper_seq *seq)
{
    return seq->n_top >= 0 ? LOGITS_ALL : seq->draws ? LOGITS_LAST : LOGITS_NONE;
}

static int n_logit_rows(const struct stepper_seq *seq)
{
    return seq->n_top >= 0 ? seq->n_rows : seq->draws;
}

/* What model_step and model_queue take alike. */
static void gather_rows(struct stepper *s, const struct stepper_seq *seqs, int n_seqs)
{
    int n_rows = 0;
    CHECK(n_seqs >= 1 && n_seqs <= s->max_seqs && s->n_queued < s->depth);
    for (int k = 0; k < n_seqs; k++) {
        const struct stepper_seq *seq = &seqs[k];
        CHECK(seq->n_rows <= s->options.max_rows - n_rows && (seq->tokens || seq->n_rows == 1));
        s->seqs[k] =
            (struct model_seq){.slot = seq->slot, .n_rows = seq->n_rows, .logits = logits_of(seq)};
        if (seq->tokens)
            memcpy(s->tokens + n_rows, seq->tokens, (size_t)seq->n_rows * sizeof(*seq->tokens));
        else
            s->tokens[n_rows] = s->on_device ? TOKEN_DRAWN : s->host.drawn[seq->slot];
        n_rows += seq->n_rows;
    }
}

/* ---- Drawing on the device ---- */

/* logit_row is the sequence's first; what it wants of its rows goes to the lists. */
static void list_wishes(struct stepper *s, struct queued *q, const struct stepper_seq *seq,
                        int logit_row)
{
    int n_scores = 0, last = logit_row + n_logit_rows(seq) - 1;
    CHECK(last < s->options.max_logit_rows);
    for (int i = 0; seq->n_top >= 0 && i < seq->n_rows; i++) {
        if (seq->targets[i] < 0)
            continue;
        s->scores[q->n_scores++] = (struct step_score){
            .logit_row = logit_row + i, .target = seq->targets[i], .n_top = seq->n_top};
        n_scores++;
    }
    if (seq->draws)
        s->draws[q->n_draws++] = (struct step_draw){.logit_row = last,
                                                    .slot = seq->slot,
                                                    .position = seq->draw_position,
                                                    .n_output = seq->n_output};
    q->wanted[q->n_seqs++] = (struct wanted){n_scores, seq->draws};
}

static enum status queue_on_device(struct stepper *s, struct queued *q,
                                   const struct stepper_seq *seqs, int n_seqs, struct error *err)
{
    int logit_row = 0;
    q->n_seqs = q->n_draws = q->n_scores = 0;
    for (int k = 0; k < n_seqs; k++) {
        list_wishes(s, q, &seqs[k], logit_row);
        logit_row += n_logit_rows(&seqs[k]);
    }
    return model_queue(s->model, s->tokens, s->seqs, n_seqs, s->draws, q->n_draws, s->scores,
                       q->n_scores, err);
}

/* The device gives draws first and scores behind; without scores that is the order already. */
static const struct sampled *in_order(struct queued *q, const struct sampled *results)
{
    if (!q->n_scores)
        return results;
    const struct sampled *draw = results, *score = results + q->n_draws;
    struct sampled *out = q->results;
    for (int k = 0; k < q->n_seqs; k++) {
        for (int i = 0; i < q->wanted[k].n_scores; i++)
            *out++ = *score++;
        if (q->wanted[k].draws)
            *out++ = *draw++;
    }
    return q->results;
}

/* ---- Drawing on the host ---- */

static void admit_on_host(struct stepper *s, int slot, const struct sampling_params *params)
{
    struct host *h = &s->host;
    struct logit_bias *biases = h->biases + (size_t)slot * SAMPLER_MAX_LOGIT_BIAS;
    CHECK(params->n_logit_bias <= SAMPLER_MAX_LOGIT_BIAS);
    if (params->n_logit_bias)
        memcpy(biases, params->logit_bias, (size_t)params->n_logit_bias * sizeof(*biases));
    h->params[slot] = *params;
    h->params[slot].logit_bias = biases;
    h->counts[slot] = sampler_counts(params);
    h->drawn[slot] = -1;
    if (h->counts[slot])
        sampler_reset(h->sampler, slot);
}

/* One sequence's results from its logits; returns the end of them. */
static struct sampled *sample(struct stepper *s, const struct stepper_seq *seq, const float *logits,
                              struct sampled *out)
{
    struct host *h = &s->host;
    for (int i = 0; h->counts[seq->slot] && seq->tokens && i < seq->n_rows; i++)
        sampler_note(h->sampler, seq->slot, seq->tokens[i], false);
    for (int i = 0; seq->n_top >= 0 && i < seq->n_rows; i++)
        if (seq->targets[i] >= 0)
            sampler_score(h->sampler, logits + (size_t)i * s->vocab_size, seq->targets[i],
                          seq->n_top, out++);
    if (!seq->draws)
        return out;
    sampler_draw(h->sampler, seq->slot, logits + (size_t)(n_logit_rows(seq) - 1) * s->vocab_size,
                 &h->params[seq->slot], seq->draw_position, seq->n_output, out);
    h->drawn[seq->slot] = out->token;
    if (h->counts[seq->slot])
        sampler_note(h->sampler, seq->slot, out->token, true);
    return out + 1;
}

static enum status step_on_host(struct stepper *s, struct queued *q, const struct stepper_seq *seqs,
                                int n_seqs, struct error *err)
{
    const float *logits = NULL;
    struct sampled *out = q->results;
    enum status st = model_step(s->model, s->tokens, s->seqs, n_seqs, &logits, err);
    for (int k = 0; !st && k < n_seqs; k++) {
        out = sample(s, &seqs[k], logits, out);
        if (logits)
            logits += (size_t)n_logit_rows(&seqs[k]) * s->vocab_size;
    }
    return st;
}

/* ---- Steps ---- */

int stepper_depth(const struct stepper *s)
{
    return s->depth;
}

enum status stepper_admit(struct stepper *s, int slot, const struct sampling_params *params,
                          bool empty, struct error *err)
{
    CHECK(slot >= 0 && slot < s->options.n_slots);
    if (empty)
        model_reset(s->model, slot);
    if (s->on_device)
        return model_admit(s->model, slot, params, err);
    admit_on_host(s, slot, params);
    return STATUS_OK;
}

enum status stepper_note(struct stepper *s, int slot, const int32_t *tokens, size_t n,
                         struct error *err)
{
    CHECK(slot >= 0 && slot < s->options.n_slots);
    if (s->on_device)
        return model_note(s->model, slot, tokens, n, err);
    for (size_t i = 0; s->host.counts[slot] && i < n; i++)
        sampler_note(s->host.sampler, slot, tokens[i], false);
    return STATUS_OK;
}

enum status stepper_queue(struct stepper *s, const struct stepper_seq *seqs, int n_seqs,
                          struct error *err)
{
    gather_rows(s, seqs, n_seqs);
    struct queued *q = &s->queued[(s->oldest + s->n_queued) % s->depth];
    enum status st = s->on_device ? queue_on_device(s, q, seqs, n_seqs, err)
                                  : step_on_host(s, q, seqs, n_seqs, err);
    if (!st)
        s->n_queued++;
    return st;
}

enum status stepper_collect(struct stepper *s, const struct sampled **results, struct error *err)
{
    CHECK(s->n_queued > 0);
    struct queued *q = &s->queued[s->oldest];
    const struct sampled *drawn = NULL;
    enum status st = s->on_device ? model_collect(s->model, &drawn, err) : STATUS_OK;
    if (st)
        return st;
    *results = s->on_device ? in_order(q, drawn) : q->results;
    s->oldest = (s->oldest + 1) % s->depth;
    s->n_queued--;
    return STATUS_OK;
}

/* ---- Opening ---- */

static enum status out_of_memory(const struct stepper *s, struct error *err)
{
    return fail(err, STATUS_NOMEM, "steps of %d rows, %d slots: out of memory", s->options.max_rows,
                s->options.n_slots);
}

static enum status open_host(struct stepper *s, struct error *err)
{
    struct host *h = &s->host;
    const struct model_config *config = model_config(s->model);
    size_t n_slots = (size_t)s->options.n_slots;
    h->params = calloc(n_slots, sizeof(*h->params));
    h->biases = calloc(n_slots, SAMPLER_MAX_LOGIT_BIAS * sizeof(*h->biases));
    h->counts = calloc(n_slots, sizeof(*h->counts));
    h->drawn = calloc(n_slots, sizeof(*h->drawn));
    if (!h->params || !h->biases || !h->counts || !h->drawn)
        return out_of_memory(s, err);
    return sampler_open(&h->sampler, s->options.n_slots, config->vocab_size, config->eos_token_id,
                        config->n_eos, err);
}

static enum status take_memory(struct stepper *s, struct error *err)
{
    size_t max_logit_rows = (size_t)s->options.max_logit_rows, max_seqs = (size_t)s->max_seqs;
    s->tokens = calloc((size_t)s->options.max_rows, sizeof(*s->tokens));
    s->seqs = calloc(max_seqs, sizeof(*s->seqs));
    s->draws = calloc(max_logit_rows, sizeof(*s->draws));
    s->scores = calloc(max_logit_rows, sizeof(*s->scores));
    bool taken = s->tokens && s->seqs && s->draws && s->scores;
    for (int i = 0; i < s->depth; i++) {
        struct queued *q = &s->queued[i];
        q->wanted = calloc(max_seqs, sizeof(*q->wanted));
        q->results = calloc(2 * max_logit_rows, sizeof(*q->results));
        taken = taken && q->wanted && q->results;
    }
    if (!taken)
        return out_of_memory(s, err);
    return s->on_device ? STATUS_OK : open_host(s, err);
}

enum status stepper_open(struct stepper **out, struct model *model,
                         const struct stepper_options *options, struct error *err)
{
    CHECK(options->n_slots > 0 && options->max_rows > 0 && options->max_logit_rows > 0);
    CHECK(options->depth >= 0 && options->depth <= MAX_DEPTH);
    struct stepper *s = calloc(1, sizeof(*s));
    if (!s)
        return fail(err, STATUS_NOMEM, "stepper: out of memory");
    int model_ahead = model_depth(model);
    s->model = model;
    s->options = *options;
    s->on_device = model_ahead > 0;
    s->depth = options->depth ? options->depth : s->on_device ? model_ahead : 1;
    if (s->on_device && s->depth > model_ahead)
        s->depth = model_ahead;
    s->depth = s->depth < MAX_DEPTH ? s->depth : MAX_DEPTH;
    s->max_seqs = options->n_slots < options->max_rows ? options->n_slots : options->max_rows;
    s->vocab_size = (size_t)model_config(model)->vocab_size;
    enum status st = take_memory(s, err);
    if (st) {
        stepper_close(s);
        return st;
    }
    *out = s;
    return STATUS_OK;
}

void stepper_close(struct stepper *s)
{
    if (!s)
        return;
    sampler_close(s->host.sampler);
    void *const owned[] = {s->host.params,
                           s->host.biases,
                           s->host.counts,
                           s->host.drawn,
                           s->tokens,
                           s->seqs,
                           s->draws,
                           s->scores,
                           s->queued[0].wanted,
                           s->queued[0].results,
                           s->queued[1].wanted,
                           s->queued[1].results};
    for (size_t i = 0; i < sizeof(owned) / sizeof(owned[0]); i++)
        free(owned[i]);
    free(s);
}
