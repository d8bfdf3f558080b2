/* sampler.c - see sampler.h */
#include "engine/sampler.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/row.h"

/* A token's count in a slot: how often it was output, and whether the prompt had it. */
#define IN_PROMPT 0x80000000u

struct sampler {
    int n_slots;
    int32_t vocab_size;
    int n_blocks;
    int n_eos;
    int32_t *eos; /* [n_eos] */

    /* The row, padded to whole blocks, and what is known of its blocks. */
    float *x, *e;         /* [n_blocks * ROW_BLOCK] adjusted logits, exponentials */
    int32_t *block_best;  /* [n_blocks] */
    uint64_t *block_sums; /* [n_blocks] */

    /* The part of a row that a filter has kept, in order of ids. */
    int32_t *ids;           /* [V] */
    float *list_x, *list_e; /* [n_blocks * ROW_BLOCK] */
    uint32_t *rank;         /* [n_blocks * ROW_BLOCK] */
    uint64_t *bins;         /* [ROW_BINS] */

    uint32_t *counts; /* [n_slots, V] */
    int32_t *seen;    /* [n_slots, V] tokens with a count, in order of appearance */
    int32_t *n_seen;  /* [n_slots] */
};

/* What is left of a row: all of it (ids NULL), or a list. */
struct pool {
    int n;
    const int32_t *ids;
    float *x, *e;
    float top, scale; /* y = (x - top) * scale */
    uint64_t total;   /* sum of weights; block_sums belong to it */
};

void sampling_params_init(struct sampling_params *p)
{
    *p = (struct sampling_params){
        .temperature = 1,
        .top_p = 1,
        .typical_p = 1,
        .repetition_penalty = 1,
        .n_logprobs = -1,
    };
}

static enum status check_range(const char *name, double value, bool inside, const char *range,
                               struct error *err)
{
    if (inside)
        return STATUS_OK;
    return fail_field(err, STATUS_INVALID, name, "%s is %g; it must be %s", name, value, range);
}

static enum status check_tokens(const struct sampling_params *p, int32_t vocab_size,
                                struct error *err)
{
    for (int i = 0; i < p->n_stop_tokens; i++)
        if (p->stop_tokens[i] < 0 || p->stop_tokens[i] >= vocab_size)
            return fail_field(err, STATUS_INVALID, "stop_token_ids",
                              "stop token %d is outside 0..%d", p->stop_tokens[i], vocab_size - 1);
    for (int i = 0; i < p->n_logit_bias; i++) {
        int32_t token = p->logit_bias[i].token;
        if (token < 0 || token >= vocab_size)
            return fail_field(err, STATUS_INVALID, "logit_bias",
                              "logit_bias names token %d, outside 0..%d", token, vocab_size - 1);
        if (isnan(p->logit_bias[i].bias))
            return fail_field(err, STATUS_INVALID, "logit_bias", "the bias of token %d is NaN",
                              token);
    }
    return STATUS_OK;
}

enum status sampling_params_check(const struct sampling_params *p, int32_t vocab_size,
                                  struct error *err)
{
    const struct {
        const char *name;
        double value;
        bool inside;
        const char *range;
    } rules[] = {
#define RULE(name, range, condition) {#name, p->name, condition, range}
        RULE(temperature, "finite and not negative",
             p->temperature >= 0 && p->temperature <= FLT_MAX),
        RULE(top_k, "-1, 0 or more", p->top_k >= -1),
        RULE(top_p, "above 0 and at most 1", p->top_p > 0 && p->top_p <= 1),
        RULE(min_p, "between 0 and 1", p->min_p >= 0 && p->min_p <= 1),
        RULE(typical_p, "above 0 and at most 1", p->typical_p > 0 && p->typical_p <= 1),
        RULE(repetition_penalty, "finite and above 0",
             p->repetition_penalty > 0 && p->repetition_penalty <= FLT_MAX),
        RULE(presence_penalty, "between -2 and 2", fabsf(p->presence_penalty) <= 2),
        RULE(frequency_penalty, "between -2 and 2", fabsf(p->frequency_penalty) <= 2),
        RULE(min_tokens, "0 or more", p->min_tokens >= 0),
        RULE(n_logprobs, "between -1 and 20",
             p->n_logprobs >= -1 && p->n_logprobs <= SAMPLER_MAX_TOP_LOGPROBS),
        RULE(n_stop_tokens, "between 0 and 64",
             p->n_stop_tokens >= 0 && p->n_stop_tokens <= SAMPLER_MAX_STOP_TOKENS),
        RULE(n_logit_bias, "between 0 and 1024",
             p->n_logit_bias >= 0 && p->n_logit_bias <= SAMPLER_MAX_LOGIT_BIAS),
#undef RULE
    };
    for (size_t i = 0; i < sizeof(rules) / sizeof(rules[0]); i++) {
        enum status st =
            check_range(rules[i].name, rules[i].value, rules[i].inside, rules[i].range, err);
        if (st)
            return st;
    }
    return check_tokens(p, vocab_size, err);
}

enum status sampler_open(struct sampler **out, int n_slots, int32_t vocab_size, const int32_t *eos,
                         int n_eos, struct error *err)
{
    CHECK(n_slots > 0 && vocab_size > 0 && n_eos >= 0);
    struct sampler *s = calloc(1, sizeof(*s));
    if (!s)
        return fail(err, STATUS_NOMEM, "sampler: out of memory");
    size_t n_blocks = (size_t)row_n_blocks(vocab_size), n = n_blocks * ROW_BLOCK;
    size_t n_counts = (size_t)n_slots * (size_t)vocab_size;
    s->n_slots = n_slots;
    s->vocab_size = vocab_size;
    s->n_blocks = (int)n_blocks;
    s->n_eos = n_eos;
    s->eos = calloc((size_t)n_eos + 1, sizeof(*s->eos));
    s->x = calloc(n, sizeof(*s->x));
    s->e = calloc(n, sizeof(*s->e));
    s->block_best = calloc(n_blocks, sizeof(*s->block_best));
    s->block_sums = calloc(n_blocks, sizeof(*s->block_sums));
    s->ids = calloc(n, sizeof(*s->ids));
    s->list_x = calloc(n, sizeof(*s->list_x));
    s->list_e = calloc(n, sizeof(*s->list_e));
    s->rank = calloc(n, sizeof(*s->rank));
    s->bins = calloc(ROW_BINS, sizeof(*s->bins));
    s->counts = calloc(n_counts, sizeof(*s->counts));
    s->seen = calloc(n_counts, sizeof(*s->seen));
    s->n_seen = calloc((size_t)n_slots, sizeof(*s->n_seen));
    if (!s->eos || !s->x || !s->e || !s->block_best || !s->block_sums || !s->ids || !s->list_x ||
        !s->list_e || !s->rank || !s->bins || !s->counts || !s->seen || !s->n_seen) {
        sampler_close(s);
        return fail(err, STATUS_NOMEM, "sampler of %d slots over %d tokens: out of memory", n_slots,
                    vocab_size);
    }
    if (n_eos)
        memcpy(s->eos, eos, (size_t)n_eos * sizeof(*eos));
    *out = s;
    return STATUS_OK;
}

void sampler_close(struct sampler *s)
{
    if (!s)
        return;
    void *const owned[] = {s->eos,    s->x,      s->e,      s->block_best, s->block_sums,
                           s->ids,    s->list_x, s->list_e, s->rank,       s->bins,
                           s->counts, s->seen,   s->n_seen};
    for (size_t i = 0; i < sizeof(owned) / sizeof(owned[0]); i++)
        free(owned[i]);
    free(s);
}

static uint32_t *slot_counts(const struct sampler *s, int slot)
{
    CHECK(slot >= 0 && slot < s->n_slots);
    return s->counts + (size_t)slot * (size_t)s->vocab_size;
}

static int32_t *slot_seen(const struct sampler *s, int slot)
{
    return s->seen + (size_t)slot * (size_t)s->vocab_size;
}

void sampler_reset(struct sampler *s, int slot)
{
    uint32_t *counts = slot_counts(s, slot);
    const int32_t *seen = slot_seen(s, slot);
    for (int32_t i = 0; i < s->n_seen[slot]; i++)
        counts[seen[i]] = 0;
    s->n_seen[slot] = 0;
}

void sampler_note(struct sampler *s, int slot, int32_t token, bool is_output)
{
    CHECK(token >= 0 && token < s->vocab_size);
    uint32_t *count = slot_counts(s, slot) + token;
    if (!*count)
        slot_seen(s, slot)[s->n_seen[slot]++] = token;
    if (!is_output)
        *count |= IN_PROMPT;
    else if ((*count & ~IN_PROMPT) != ~IN_PROMPT)
        *count += 1;
}

bool sampler_counts(const struct sampling_params *p)
{
    return p->repetition_penalty != 1 || p->presence_penalty != 0 || p->frequency_penalty != 0;
}

bool sampling_is_stop(const struct sampling_params *p, const int32_t *eos, int n_eos, int32_t token)
{
    for (int i = 0; i < n_eos && !p->ignore_eos; i++)
        if (eos[i] == token)
            return true;
    for (int i = 0; i < p->n_stop_tokens; i++)
        if (p->stop_tokens[i] == token)
            return true;
    return false;
}

bool sampler_is_stop(const struct sampler *s, const struct sampling_params *p, int32_t token)
{
    return sampling_is_stop(p, s->eos, s->n_eos, token);
}

/* A changed logit goes through the rules of row_load again. */
static void put_logit(struct sampler *s, int32_t token, float value)
{
    s->x[token] = row_tidy(value);
}

static void forbid_stops(struct sampler *s, const struct sampling_params *p)
{
    for (int i = 0; i < s->n_eos && !p->ignore_eos; i++)
        s->x[s->eos[i]] = -INFINITY;
    for (int i = 0; i < p->n_stop_tokens; i++)
        s->x[p->stop_tokens[i]] = -INFINITY;
}

static void penalize(struct sampler *s, int slot, const struct sampling_params *p)
{
    const uint32_t *counts = slot_counts(s, slot);
    const int32_t *seen = slot_seen(s, slot);
    for (int32_t i = 0; i < s->n_seen[slot]; i++) {
        int32_t token = seen[i];
        uint32_t n_output = counts[token] & ~IN_PROMPT;
        float x = s->x[token];
        x = x > 0 ? x / p->repetition_penalty : x * p->repetition_penalty;
        if (n_output) {
            x -= p->presence_penalty;
            x -= p->frequency_penalty * (float)n_output;
        }
        put_logit(s, token, x);
    }
}

/* Everything that comes before temperature. */
static void adjust(struct sampler *s, int slot, const struct sampling_params *p, int64_t n_output)
{
    for (int i = 0; i < p->n_logit_bias; i++) {
        int32_t token = p->logit_bias[i].token;
        put_logit(s, token, s->x[token] + p->logit_bias[i].bias);
    }
    bool forbid = n_output < p->min_tokens, counted = sampler_counts(p);
    if (forbid)
        forbid_stops(s, p);
    if (counted)
        penalize(s, slot, p);
    if (p->n_logit_bias || forbid || counted)
        row_block_best(s->block_best, s->x, s->n_blocks);
}

static void sum_pool(struct sampler *s, struct pool *pool)
{
    pool->total = row_block_sums(s->block_sums, pool->e, row_n_blocks(pool->n));
}

static void pad_list(struct sampler *s, int n)
{
    for (int i = n; i < row_n_blocks(n) * ROW_BLOCK; i++) {
        s->list_x[i] = -INFINITY;
        s->list_e[i] = 0;
    }
}

/* Make the pool a list of those not ranked behind the cut. The list may be the pool itself:
 * writing never overtakes reading. */
static void keep_cut(struct sampler *s, struct pool *pool, struct row_cut cut, bool weighted)
{
    int n = 0;
    for (int i = 0; i < pool->n; i++) {
        if (s->rank[i] > cut.rank)
            continue;
        if (s->rank[i] == cut.rank) {
            uint64_t mass = weighted ? row_weight(pool->e[i]) : 1;
            if (!cut.mass)
                continue;
            cut.mass -= mass < cut.mass ? mass : cut.mass;
        }
        s->ids[n] = pool->ids ? pool->ids[i] : i;
        s->list_x[n] = pool->x[i];
        s->list_e[n++] = pool->e[i];
    }
    pad_list(s, n);
    pool->n = n;
    pool->ids = s->ids;
    pool->x = s->list_x;
    pool->e = s->list_e;
}

/* The whole row as a list of the values at or above a bound, leaving out whole blocks. */
static struct pool list_above(struct sampler *s, const struct pool *row, int32_t least)
{
    int n = 0;
    for (int b = 0; b < s->n_blocks; b++) {
        if (s->block_best[b] < least)
            continue;
        for (int i = b * ROW_BLOCK; i < (b + 1) * ROW_BLOCK; i++) {
            s->ids[n] = i;
            s->list_x[n] = row->x[i];
            s->list_e[n] = row->e[i];
            n += row_order(row->x[i]) >= least;
        }
    }
    if (n > s->vocab_size)
        n = s->vocab_size; /* padding, when the bound is -inf */
    pad_list(s, n);
    struct pool list = *row;
    list.n = n;
    list.ids = s->ids;
    list.x = s->list_x;
    list.e = s->list_e;
    return list;
}

/* k values are at least as large as the k-th largest of the blocks' best: a bound that leaves
 * few blocks to look at. */
static void keep_top_k(struct sampler *s, struct pool *pool, int k)
{
    if (k <= s->n_blocks) {
        for (int b = 0; b < s->n_blocks; b++)
            s->rank[b] = 0x7fffffffu - (uint32_t)s->block_best[b];
        struct row_cut cut = row_find_cut(s->rank, NULL, s->n_blocks, (uint64_t)k, s->bins);
        *pool = list_above(s, pool, (int32_t)(0x7fffffffu - cut.rank));
    }
    row_rank_value(s->rank, pool->x, pool->n);
    keep_cut(s, pool, row_find_cut(s->rank, NULL, pool->n, (uint64_t)k, s->bins), false);
}

static uint64_t part_of(uint64_t total, float p)
{
    uint64_t part = (uint64_t)ceil((double)p * (double)total);
    return part < 1 ? 1 : part < total ? part : total;
}

/* Leave out what is too small to matter before ranking: tokens of at most missing / V each
 * sum to at most the mass that may be missing. The list is used only if it has enough. */
static void narrow(struct sampler *s, struct pool *pool, uint64_t target)
{
    double small = (double)(pool->total - target) / s->vocab_size * 0x1p-44;
    double least = (log(small) - 0.01) / pool->scale + pool->top;
    if (!(least > -FLT_MAX) || pool->ids)
        return;
    struct pool list = list_above(s, pool, row_order((float)least + 0.0f));
    if (row_block_sums(s->block_sums, list.e, row_n_blocks(list.n)) >= target)
        *pool = list;
}

static void keep_top_p(struct sampler *s, struct pool *pool, float p)
{
    uint64_t target = part_of(pool->total, p);
    narrow(s, pool, target);
    row_rank_value(s->rank, pool->x, pool->n);
    keep_cut(s, pool, row_find_cut(s->rank, pool->e, pool->n, target, s->bins), true);
    sum_pool(s, pool);
}

/* The mean of y, from integer sums. */
static float mean_y(const struct pool *pool)
{
    uint64_t sum = 0;
    for (int i = 0; i < pool->n; i++)
        if (pool->e[i] > 0)
            sum += row_weight(pool->e[i] * fabsf((pool->x[i] - pool->top) * pool->scale));
    return (float)(-(double)sum / (double)pool->total);
}

static void keep_typical(struct sampler *s, struct pool *pool, float p)
{
    row_rank_distance(s->rank, pool->x, pool->n, pool->top, pool->scale, mean_y(pool));
    struct row_cut cut = row_find_cut(s->rank, pool->e, pool->n, part_of(pool->total, p), s->bins);
    keep_cut(s, pool, cut, true);
    sum_pool(s, pool);
}

static float largest_e(const struct pool *pool)
{
    float most = 0;
    for (int i = 0; i < pool->n; i++)
        most = pool->e[i] > most ? pool->e[i] : most;
    return most;
}

/* Only typical_p may have removed the top, whose e is 1. */
static void keep_min_p(struct sampler *s, struct pool *pool, const struct sampling_params *p)
{
    float most = p->typical_p < 1 ? largest_e(pool) : 1;
    row_drop_below(pool->e, row_n_blocks(pool->n), p->min_p * most);
    sum_pool(s, pool);
}

/* Temperature and the filters, for an adjusted row whose largest value is finite. */
static struct pool filter(struct sampler *s, const struct sampling_params *p, float top)
{
    float scale = 1.0f / p->temperature;
    struct pool pool = {
        .n = s->vocab_size,
        .x = s->x,
        .e = s->e,
        .top = top,
        .scale = scale < FLT_MAX ? scale : FLT_MAX,
    };
    if (p->top_k > 0 && p->top_k < s->vocab_size)
        keep_top_k(s, &pool, p->top_k);
    row_exponentials(pool.e, pool.x, row_n_blocks(pool.n), pool.top, pool.scale);
    sum_pool(s, &pool);
    if (p->typical_p < 1)
        keep_typical(s, &pool, p->typical_p);
    if (p->top_p < 1)
        keep_top_p(s, &pool, p->top_p);
    if (p->min_p > 0)
        keep_min_p(s, &pool, p);
    return pool;
}

void philox4x32(uint32_t out[4], const uint32_t counter[4], const uint32_t key[2])
{
    uint32_t c[4] = {counter[0], counter[1], counter[2], counter[3]};
    uint32_t k[2] = {key[0], key[1]};
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)0xD2511F53 * c[0], b = (uint64_t)0xCD9E8D57 * c[2];
        c[0] = (uint32_t)(b >> 32) ^ c[1] ^ k[0];
        c[1] = (uint32_t)b;
        c[2] = (uint32_t)(a >> 32) ^ c[3] ^ k[1];
        c[3] = (uint32_t)a;
        k[0] += 0x9E3779B9;
        k[1] += 0xBB67AE85;
    }
    memcpy(out, c, sizeof(c));
}

/* A bijection of 64-bit words that spreads near-by seeds (the finalizer of MurmurHash3). */
static uint64_t mix(uint64_t h)
{
    h = (h ^ h >> 33) * 0xff51afd7ed558ccdull;
    h = (h ^ h >> 33) * 0xc4ceb9fe1a85ec53ull;
    return h ^ h >> 33;
}

static uint64_t random_bits(const struct sampling_params *p, uint64_t position)
{
    uint64_t hash = mix(mix(p->seed) + p->choice);
    const uint32_t key[2] = {(uint32_t)hash, (uint32_t)(hash >> 32)};
    const uint32_t counter[4] = {(uint32_t)position, (uint32_t)(position >> 32), 0, 0};
    uint32_t bits[4];
    philox4x32(bits, counter, key);
    return (uint64_t)bits[1] << 32 | bits[0];
}

/* Inverse of the running sum in order of ids: block by block, then within the block. */
static int32_t pick(const struct sampler *s, const struct pool *pool, uint64_t random)
{
    uint64_t r = (uint64_t)((unsigned __int128)random * pool->total >> 64);
    int block = 0;
    while (r >= s->block_sums[block])
        r -= s->block_sums[block++];
    int i = block * ROW_BLOCK;
    for (uint64_t w = row_weight(pool->e[i]); r >= w; w = row_weight(pool->e[i])) {
        r -= w;
        i++;
    }
    return pool->ids ? pool->ids[i] : i;
}

/* Load and adjust a row. Returns its best token; when that is ruled out (the whole row is), the
 * best of the untouched row, and *open is false. */
static int32_t prepare(struct sampler *s, int slot, const struct sampling_params *p,
                       int64_t n_output, bool *open)
{
    int32_t untouched = row_argmax(s->x, s->block_best, s->n_blocks);
    adjust(s, slot, p, n_output);
    int32_t best = row_argmax(s->x, s->block_best, s->n_blocks);
    *open = s->x[best] > -INFINITY;
    return *open ? best : untouched;
}

static void load(struct sampler *s, const float *logits)
{
    row_load(s->x, logits, s->vocab_size);
    row_block_best(s->block_best, s->x, s->n_blocks);
}

static float log_prob(float x, float top, double log_sum)
{
    return x > -INFINITY ? (float)((double)x - top - log_sum) : -INFINITY;
}

/* The n best of the loaded row, best first. */
static void list_top(struct sampler *s, int n, float top, double log_sum, struct sampled *out)
{
    struct pool pool = {.n = s->vocab_size, .x = s->x, .e = s->e};
    out->n_top = n < pool.n ? n : pool.n;
    if (!out->n_top)
        return;
    keep_top_k(s, &pool, out->n_top);
    for (int i = 0; i < pool.n; i++) { /* insertion; equal values stay in order of ids */
        struct token_logprob entry = {pool.ids[i], log_prob(pool.x[i], top, log_sum)};
        int at = i;
        for (; at > 0 && s->x[out->top[at - 1].token] < pool.x[i]; at--)
            out->top[at] = out->top[at - 1];
        out->top[at] = entry;
    }
}

/* Log of the sum of exp(x - top) over the loaded row; fills the top alternatives. */
static double score_row(struct sampler *s, int n_top, float *top, struct sampled *out)
{
    *top = s->x[row_argmax(s->x, s->block_best, s->n_blocks)];
    double log_sum = 0;
    if (*top > -INFINITY) {
        row_exponentials(s->e, s->x, s->n_blocks, *top, 1);
        log_sum = log((double)row_block_sums(s->block_sums, s->e, s->n_blocks) * 0x1p-44);
    }
    list_top(s, n_top, *top, log_sum, out);
    return log_sum;
}

void sampler_draw(struct sampler *s, int slot, const float *logits, const struct sampling_params *p,
                  uint64_t position, int64_t n_output, struct sampled *out)
{
    float top = 0;
    double log_sum = 0;
    load(s, logits);
    out->n_top = 0;
    if (p->n_logprobs >= 0)
        log_sum = score_row(s, p->n_logprobs, &top, out);
    bool open;
    out->token = prepare(s, slot, p, n_output, &open);
    if (open && p->temperature > 0) {
        struct pool pool = filter(s, p, s->x[out->token]);
        out->token = pick(s, &pool, random_bits(p, position));
    }
    float chosen = row_tidy(logits[out->token]);
    out->logprob = p->n_logprobs >= 0 ? log_prob(chosen, top, log_sum) : NAN;
}

void sampler_distribution(struct sampler *s, int slot, const float *logits,
                          const struct sampling_params *p, int64_t n_output, double *probs)
{
    load(s, logits);
    bool open;
    int32_t best = prepare(s, slot, p, n_output, &open);
    memset(probs, 0, (size_t)s->vocab_size * sizeof(*probs));
    if (!open || p->temperature == 0) {
        probs[best] = 1;
        return;
    }
    struct pool pool = filter(s, p, s->x[best]);
    for (int i = 0; i < pool.n; i++)
        probs[pool.ids ? pool.ids[i] : i] = (double)row_weight(pool.e[i]) / (double)pool.total;
}

void sampler_score(struct sampler *s, const float *logits, int32_t token, int n_top,
                   struct sampled *out)
{
    CHECK(token >= 0 && token < s->vocab_size && n_top <= SAMPLER_MAX_TOP_LOGPROBS);
    float top;
    load(s, logits);
    double log_sum = score_row(s, n_top, &top, out);
    out->token = token;
    out->logprob = log_prob(s->x[token], top, log_sum);
}
