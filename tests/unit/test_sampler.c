/* test_sampler.c - the sampler against a literal double-precision reading of its definition,
 * against distributions from Hugging Face transformers (tests/golden/sampler), against the
 * known answers of Philox, and by chi-square. Seeds are fixed: nothing here depends on luck. */
#include "tests/unit/unit.h"

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/row.h"
#include "engine/sampler.h"
#include "tests/unit/fail_alloc.h"

enum { MAX_V = 5000 };

/* A small generator for test data, independent of the sampler's. */
static uint64_t next_random(uint64_t *state)
{
    uint64_t z = *state += 0x9E3779B97F4A7C15;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
}

static double uniform(uint64_t *state)
{
    return (double)(next_random(state) >> 11) * 0x1p-53;
}

static float normal(uint64_t *state)
{
    double a = uniform(state), b = uniform(state);
    return (float)(sqrt(-2 * log(1 - a)) * cos(6.283185307179586 * b));
}

static struct sampler *open_sampler(int n_slots, int32_t vocab_size)
{
    static const int32_t eos[] = {0, 2};
    struct sampler *s = NULL;
    struct error err;
    if (sampler_open(&s, n_slots, vocab_size, eos, 2, &err))
        fail_msg("%s", err.text);
    return s;
}

/* ---- The oracle: every step as sampler.h words it, with full sorts, in double. ---- */

struct entry {
    int32_t token;
    double x, p, distance;
};

static int by_value(const void *a, const void *b)
{
    const struct entry *x = a, *y = b;
    if (x->x != y->x)
        return x->x > y->x ? -1 : 1;
    return x->token - y->token;
}

static int by_distance(const void *a, const void *b)
{
    const struct entry *x = a, *y = b;
    if (x->distance != y->distance)
        return x->distance < y->distance ? -1 : 1;
    return x->token - y->token;
}

static void normalize(struct entry *kept, int n)
{
    double sum = 0;
    for (int i = 0; i < n; i++)
        sum += kept[i].p;
    for (int i = 0; i < n; i++)
        kept[i].p /= sum;
}

static int shortest_prefix(struct entry *kept, int n, double p)
{
    double sum = 0;
    for (int i = 0; i < n; i++) {
        sum += kept[i].p;
        if (sum >= p) {
            normalize(kept, i + 1);
            return i + 1;
        }
    }
    return n;
}

static int oracle_typical(struct entry *kept, int n, double p)
{
    double entropy = 0;
    for (int i = 0; i < n; i++)
        entropy -= kept[i].p > 0 ? kept[i].p * log(kept[i].p) : 0;
    for (int i = 0; i < n; i++)
        kept[i].distance = fabs(-log(kept[i].p) - entropy);
    qsort(kept, (size_t)n, sizeof(*kept), by_distance);
    n = shortest_prefix(kept, n, p);
    qsort(kept, (size_t)n, sizeof(*kept), by_value);
    return n;
}

static int oracle_min_p(struct entry *kept, int n, double p)
{
    int m = 0;
    while (m < n && kept[m].p >= p * kept[0].p)
        m++;
    normalize(kept, m);
    return m;
}

/* Distribution of an already adjusted row. */
static void oracle(const float *x, int n_vocab, const struct sampling_params *p, double *probs)
{
    static struct entry kept[MAX_V];
    int n = 0;
    for (int i = 0; i < n_vocab; i++)
        if (x[i] > -INFINITY)
            kept[n++] = (struct entry){.token = i, .x = x[i]};
    qsort(kept, (size_t)n, sizeof(*kept), by_value);
    if (p->temperature == 0)
        n = 1;
    if (p->top_k > 0 && p->top_k < n)
        n = p->top_k;
    for (int i = 0; i < n; i++)
        kept[i].p = p->temperature ? exp((kept[i].x - kept[0].x) / p->temperature) : 1;
    normalize(kept, n);
    if (p->typical_p < 1)
        n = oracle_typical(kept, n, p->typical_p);
    if (p->top_p < 1)
        n = shortest_prefix(kept, n, p->top_p);
    if (p->min_p > 0)
        n = oracle_min_p(kept, n, p->min_p);
    memset(probs, 0, (size_t)n_vocab * sizeof(*probs));
    for (int i = 0; i < n; i++)
        probs[kept[i].token] = kept[i].p;
}

/* Equal kept sets, and probabilities to the error of f32's exp. Tokens below 2^-43 of the
 * best may be out. */
static void check_equal(const double *found, const double *expected, int n, const char *what, int c)
{
    double most = 0;
    for (int i = 0; i < n; i++)
        most = expected[i] > most ? expected[i] : most;
    for (int i = 0; i < n; i++) {
        bool in = expected[i] > 0, tiny = expected[i] < most * 0x1p-43;
        if (((found[i] > 0) != in && !tiny) ||
            fabs(found[i] - expected[i]) > 2e-6 * expected[i] + 1e-12)
            fail_msg("%s, case %d: token %d has probability %.9g, expected %.9g", what, c, i,
                     found[i], expected[i]);
    }
}

/* ---- Known answers ---- */

static void test_philox(void **state)
{
    (void)state;
    /* kat_vectors of Random123 1.14, philox4x32 10 */
    static const struct {
        uint32_t counter[4], key[2], out[4];
    } cases[] = {
        {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
         {0xffffffff, 0xffffffff},
         {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
         {0xa4093822, 0x299f31d0},
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    for (size_t c = 0; c < COUNT_OF(cases); c++) {
        uint32_t out[4];
        philox4x32(out, cases[c].counter, cases[c].key);
        for (int i = 0; i < 4; i++)
            assert_int_equal(out[i], cases[c].out[i]);
    }
}

static void test_exp(void **state)
{
    (void)state;
    float x[ROW_BLOCK], e[ROW_BLOCK];
    uint64_t seed = 1, sums[1];
    for (int round = 0; round < 4000; round++) {
        uint64_t expected = 0;
        for (int i = 0; i < ROW_BLOCK; i++)
            x[i] = -(float)(uniform(&seed) * uniform(&seed) * 45);
        x[0] = 0;
        x[1] = -INFINITY;
        row_exponentials(e, x, 1, 0, 1);
        for (int i = 0; i < ROW_BLOCK; i++) {
            double right = exp(x[i]);
            if (right < 0x1p-44 * 1.000001 ? e[i] > 0x1.00001p-44f : fabs(e[i] / right - 1) > 3e-7)
                fail_msg("exp(%.9g) = %.9g, expected %.9g", x[i], e[i], right);
            assert_true(e[i] == row_exp(x[i])); /* vector and scalar code agree bit for bit */
            expected += row_weight(e[i]);
        }
        assert_true(e[0] == 1 && e[1] == 0);
        assert_true(row_block_sums(sums, e, 1) == expected && sums[0] == expected);
    }
}

static int compare_u32(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}

static void test_find_cut(void **state)
{
    (void)state;
    uint64_t seed = 3, bins[ROW_BINS];
    uint32_t rank[512], sorted[512];
    for (int c = 0; c < 3000; c++) {
        int n = 1 + (int)(next_random(&seed) % 512);
        uint32_t mask = c % 3 == 0 ? 7 : c % 3 == 1 ? 0xffff0000 : 0xffffffff;
        for (int i = 0; i < n; i++)
            sorted[i] = rank[i] = (uint32_t)next_random(&seed) & mask;
        qsort(sorted, (size_t)n, sizeof(*sorted), compare_u32);
        int k = 1 + (int)(next_random(&seed) % (uint64_t)n), equal = 0;
        struct row_cut cut = row_find_cut(rank, NULL, n, (uint64_t)k, bins);
        assert_int_equal(cut.rank, sorted[k - 1]);
        for (int i = 0; i < k; i++)
            equal += sorted[i] == cut.rank;
        assert_int_equal(cut.mass, equal);
    }
}

/* ---- Distributions ---- */

static void random_params(struct sampling_params *p, uint64_t *seed)
{
    static const float temperatures[] = {1, 1, 0.7f, 0.3f, 1.7f, 0};
    sampling_params_init(p);
    p->temperature = temperatures[next_random(seed) % COUNT_OF(temperatures)];
    if (next_random(seed) % 2)
        p->top_k = (int)(next_random(seed) % 300);
    if (next_random(seed) % 2)
        p->top_p = 0.05f + 0.949f * (float)uniform(seed);
    if (next_random(seed) % 3 == 0)
        p->typical_p = 0.05f + 0.949f * (float)uniform(seed);
    if (next_random(seed) % 3 == 0)
        p->min_p = 0.3f * (float)uniform(seed);
}

static void test_against_oracle(void **state)
{
    (void)state;
    static const int sizes[] = {1, 2, 63, 64, 65, 300, 1000, MAX_V};
    static float x[MAX_V];
    static double found[MAX_V], expected[MAX_V];
    uint64_t seed = 5;
    for (size_t i = 0; i < COUNT_OF(sizes); i++) {
        int n = sizes[i];
        struct sampler *s = open_sampler(1, n < 3 ? 3 : n);
        n = n < 3 ? 3 : n;
        for (int c = 0; c < 150; c++) {
            float spread = 0.5f + 4 * (float)uniform(&seed);
            for (int t = 0; t < n; t++)
                x[t] = spread * normal(&seed) + (c % 4 == 0) * 100;
            if (c % 5 == 1)
                for (int t = 0; t < n; t++) /* many ties */
                    x[t] = roundf(x[t] * 2) / 2;
            if (c % 7 == 2)
                for (int t = 0; t < n; t += 2) /* half ruled out */
                    x[t] = t % 4 ? -INFINITY : NAN;
            struct sampling_params p;
            random_params(&p, &seed);
            sampler_distribution(s, 0, x, &p, 0, found);
            oracle(x, n, &p, expected);
            check_equal(found, expected, n, "oracle", c);
        }
        sampler_close(s);
    }
}

static void take(FILE *f, void *out, size_t size, size_t count)
{
    if (fread(out, size, count, f) != count)
        fail_msg("warpers.bin ends early");
}

static void test_against_transformers(void **state)
{
    (void)state;
    FILE *f = fopen("tests/golden/sampler/warpers.bin", "rb");
    assert_non_null(f);
    int32_t n_cases, head[3], seen[64];
    float knobs[5];
    static float logits[512], probs[512];
    static double found[512], expected[512];
    take(f, &n_cases, 4, 1);
    assert_true(n_cases >= 40);
    for (int c = 0; c < n_cases; c++) {
        take(f, head, 4, 3);
        take(f, knobs, 4, 5);
        assert_true(head[0] <= 512 && head[2] <= 64);
        take(f, seen, 4, (size_t)head[2]);
        take(f, logits, 4, (size_t)head[0]);
        take(f, probs, 4, (size_t)head[0]);
        struct sampling_params p;
        sampling_params_init(&p);
        p.top_k = head[1];
        p.temperature = knobs[0];
        p.top_p = knobs[1];
        p.min_p = knobs[2];
        p.typical_p = knobs[3];
        p.repetition_penalty = knobs[4];
        struct sampler *s = open_sampler(1, head[0]);
        for (int i = 0; i < head[2]; i++)
            sampler_note(s, 0, seen[i], i % 2);
        sampler_distribution(s, 0, logits, &p, 0, found);
        for (int i = 0; i < head[0]; i++)
            expected[i] = probs[i];
        check_equal(found, expected, head[0], "transformers", c);
        sampler_close(s);
    }
    fclose(f);
}

/* ---- Adjustments ---- */

/* The token drawn greedily from {0, .1, .2, ...} adjusted as asked. */
static void test_bias_and_penalties(void **state)
{
    (void)state;
    enum { V = 8 };
    static const struct logit_bias forbid_7[] = {{7, -INFINITY}};
    static const struct logit_bias twice[] = {{3, 5}, {3, 5}, {4, 9.5f}};
    static const struct logit_bias infinite[] = {{1, INFINITY}};
    static const struct {
        const char *what;
        float logits[V];
        const struct logit_bias *bias;
        int n_bias;
        float repetition, presence, frequency;
        int prompt[4], output[4]; /* tokens noted, -1 ends */
        int expected;
    } cases[] = {
        {"nothing", {0, 1, 2, 3, 4, 5, 6, 7}, NULL, 0, 1, 0, 0, {-1}, {-1}, 7},
        {"forbidden", {0, 1, 2, 3, 4, 5, 6, 7}, forbid_7, 1, 1, 0, 0, {-1}, {-1}, 6},
        {"biases add up", {0, 1, 2, 3, 4, 5, 6, 7}, twice, 3, 1, 0, 0, {-1}, {-1}, 4},
        {"infinite bias", {0, 1, 2, 3, 4, 5, 6, 7}, infinite, 1, 1, 0, 0, {-1}, {-1}, 1},
        {"ties go to the lower id", {1, 1, 3, 3, 2, 3, 0, 3}, NULL, 0, 1, 0, 0, {-1}, {-1}, 2},
        {"signed zeros tie", {-0.0f, 0, -1, -1, -1, -1, -1, -1}, NULL, 0, 1, 0, 0, {-1}, {-1}, 0},
        {"repetition of the prompt",
         {0, 1, 2, 3, 4, 5, 6, 7},
         NULL,
         0,
         1.5f,
         0,
         0,
         {7, -1},
         {-1},
         6},
        {"repetition of the output",
         {0, 1, 2, 3, 4, 5, 6, 7},
         NULL,
         0,
         1.5f,
         0,
         0,
         {-1},
         {7, -1},
         6},
        {"negative logits are multiplied",
         {-3, -3, -3, -2, -3, -3, -3, -3},
         NULL,
         0,
         2,
         0,
         0,
         {3, -1},
         {-1},
         0},
        {"repetition counts once",
         {0, 0, 0, 0, 0, 0, 6, 8},
         NULL,
         0,
         1.3f,
         0,
         0,
         {7, 7, -1},
         {7, 7, -1},
         7},
        {"presence counts output only",
         {0, 1, 2, 3, 4, 5, 6, 7},
         NULL,
         0,
         1,
         1.5f,
         0,
         {7, -1},
         {6, -1},
         7},
        {"presence counts once",
         {0, 0, 0, 0, 0, 0, 5, 7},
         NULL,
         0,
         1,
         1.5f,
         0,
         {-1},
         {7, 7, 7, -1},
         7},
        {"frequency counts each",
         {0, 0, 0, 0, 0, 0, 5, 7},
         NULL,
         0,
         1,
         0,
         0.75f,
         {-1},
         {7, 7, 7, -1},
         6},
        {"negative frequency attracts",
         {0, 0, 6, 0, 0, 0, 0, 7},
         NULL,
         0,
         1,
         0,
         -0.75f,
         {-1},
         {2, 2, -1},
         2},
        {"all NaN", {NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN}, NULL, 0, 1, 0, 0, {-1}, {-1}, 0},
        {"+inf is the largest",
         {0, INFINITY, FLT_MAX, INFINITY, 0, 0, 0, NAN},
         NULL,
         0,
         1,
         0,
         0,
         {-1},
         {-1},
         1},
    };
    struct sampler *s = open_sampler(2, V);
    for (size_t c = 0; c < COUNT_OF(cases); c++)
        for (int greedy = 0; greedy < 2; greedy++) {
            struct sampling_params p;
            sampling_params_init(&p);
            p.temperature = greedy ? 0 : 1e-30f; /* next to nothing draws the same */
            p.top_k = greedy ? 0 : 1;
            p.logit_bias = cases[c].bias;
            p.n_logit_bias = cases[c].n_bias;
            p.repetition_penalty = cases[c].repetition;
            p.presence_penalty = cases[c].presence;
            p.frequency_penalty = cases[c].frequency;
            sampler_reset(s, 1);
            for (int i = 0; cases[c].prompt[i] >= 0; i++)
                sampler_note(s, 1, cases[c].prompt[i], false);
            for (int i = 0; cases[c].output[i] >= 0; i++)
                sampler_note(s, 1, cases[c].output[i], true);
            struct sampled out;
            sampler_draw(s, 1, cases[c].logits, &p, 9, 0, &out);
            if (out.token != cases[c].expected)
                fail_msg("%s: token %d, expected %d", cases[c].what, out.token, cases[c].expected);
            assert_true(isnan(out.logprob) && out.n_top == 0);
        }
    sampler_close(s);
}

static void test_stop_rules(void **state)
{
    (void)state;
    enum { V = 6 }; /* eos are 0 and 2 */
    static const float logits[V] = {9, 1, 8, 5, 4, 7};
    static const struct {
        bool ignore_eos;
        int min_tokens, n_output, stop, expected;
        bool stops;
    } cases[] = {
        {false, 0, 0, -1, 0, true}, {false, 2, 1, -1, 5, false}, {false, 2, 2, -1, 0, true},
        {true, 0, 0, -1, 0, false}, {true, 2, 1, -1, 0, false},  {false, 2, 1, 5, 3, false},
        {true, 0, 0, 0, 0, true},   {true, 2, 0, 0, 2, false},
    };
    struct sampler *s = open_sampler(1, V);
    for (size_t c = 0; c < COUNT_OF(cases); c++) {
        struct sampling_params p;
        sampling_params_init(&p);
        p.temperature = 0;
        p.ignore_eos = cases[c].ignore_eos;
        p.min_tokens = cases[c].min_tokens;
        if (cases[c].stop >= 0)
            p.stop_tokens[p.n_stop_tokens++] = cases[c].stop;
        struct sampled out;
        sampler_draw(s, 0, logits, &p, 3, cases[c].n_output, &out);
        if (out.token != cases[c].expected)
            fail_msg("case %zu: token %d, expected %d", c, out.token, cases[c].expected);
        assert_int_equal(sampler_is_stop(s, &p, out.token), cases[c].stops);
    }
    /* When every token would stop, min_tokens gives way: something must be drawn. */
    struct sampling_params p;
    sampling_params_init(&p);
    p.min_tokens = 5;
    p.n_stop_tokens = V;
    for (int i = 0; i < V; i++)
        p.stop_tokens[i] = i;
    struct sampled out;
    sampler_draw(s, 0, logits, &p, 3, 0, &out);
    assert_int_equal(out.token, 0);
    sampler_close(s);
}

static void test_extreme_temperatures(void **state)
{
    (void)state;
    static const float logits[4] = {1, 3, 3, -FLT_MAX};
    static const struct {
        float temperature;
        double expected[4];
    } cases[] = {
        {FLT_TRUE_MIN, {0, 0.5, 0.5, 0}},
        {FLT_MIN, {0, 0.5, 0.5, 0}},
        {1e-6f, {0, 0.5, 0.5, 0}},
        {1e30f, {1 / 3.0, 1 / 3.0, 1 / 3.0, 0}},
    };
    struct sampler *s = open_sampler(1, 4);
    for (size_t c = 0; c < COUNT_OF(cases); c++) {
        struct sampling_params p;
        double found[4];
        sampling_params_init(&p);
        p.temperature = cases[c].temperature;
        sampler_distribution(s, 0, logits, &p, 0, found);
        check_equal(found, cases[c].expected, 4, "temperature", (int)c);
    }
    sampler_close(s);
}

static void test_params_check(void **state)
{
    (void)state;
    static const struct logit_bias outside[] = {{10, 1}}, nan_bias[] = {{1, NAN}};
    struct sampling_params good, bad;
    struct error err;
    sampling_params_init(&good);
    assert_int_equal(sampling_params_check(&good, 10, &err), STATUS_OK);
#define REFUSED(change, name)                                                                      \
    do {                                                                                           \
        bad = good;                                                                                \
        bad.change;                                                                                \
        assert_int_equal(sampling_params_check(&bad, 10, &err), STATUS_INVALID);                   \
        assert_string_equal(err.field, name);                                                      \
    } while (0)
    REFUSED(temperature = -0.1f, "temperature");
    REFUSED(temperature = NAN, "temperature");
    REFUSED(temperature = INFINITY, "temperature");
    REFUSED(top_k = -2, "top_k");
    REFUSED(top_p = 0, "top_p");
    REFUSED(top_p = 1.01f, "top_p");
    REFUSED(min_p = -1, "min_p");
    REFUSED(typical_p = NAN, "typical_p");
    REFUSED(repetition_penalty = 0, "repetition_penalty");
    REFUSED(presence_penalty = 2.1f, "presence_penalty");
    REFUSED(frequency_penalty = NAN, "frequency_penalty");
    REFUSED(min_tokens = -1, "min_tokens");
    REFUSED(n_logprobs = 21, "n_logprobs");
    REFUSED(n_stop_tokens = 65, "n_stop_tokens");
    REFUSED(n_logit_bias = 1025, "n_logit_bias");
    bad = good;
    bad.n_stop_tokens = 1;
    REFUSED(stop_tokens[bad.n_stop_tokens++] = 10, "stop_token_ids");
    REFUSED(stop_tokens[bad.n_stop_tokens++] = -1, "stop_token_ids");
    REFUSED(logit_bias = outside; bad.n_logit_bias = 1, "logit_bias");
    REFUSED(logit_bias = nan_bias; bad.n_logit_bias = 1, "logit_bias");
#undef REFUSED
}

/* ---- Logprobs ---- */

static void test_logprobs(void **state)
{
    (void)state;
    static const int sizes[] = {3, 20, 64, 1000, MAX_V};
    static float x[MAX_V];
    static struct entry sorted[MAX_V];
    uint64_t seed = 11;
    for (size_t i = 0; i < COUNT_OF(sizes); i++) {
        int n = sizes[i];
        struct sampler *s = open_sampler(1, n);
        for (int c = 0; c < 30; c++) {
            double sum = 0;
            for (int t = 0; t < n; t++) {
                x[t] = 3 * normal(&seed) - 50;
                x[t] = c % 3 ? x[t] : roundf(x[t]);
                sum += exp(x[t]);
                sorted[t] = (struct entry){.token = t, .x = x[t]};
            }
            qsort(sorted, (size_t)n, sizeof(*sorted), by_value);
            struct sampling_params p;
            sampling_params_init(&p);
            p.temperature = 2; /* reported logprobs are the model's own */
            p.n_logprobs = c % 21;
            p.top_k = 5;
            p.min_tokens = 1;
            struct sampled drawn, scored;
            sampler_draw(s, 0, x, &p, (uint64_t)c, 0, &drawn);
            sampler_score(s, x, drawn.token, p.n_logprobs, &scored);
            assert_int_equal(drawn.n_top, c % 21 < n ? c % 21 : n);
            assert_memory_equal(&drawn, &scored,
                                offsetof(struct sampled, top) +
                                    (size_t)drawn.n_top * sizeof(drawn.top[0]));
            assert_true(fabs(drawn.logprob - (x[drawn.token] - log(sum))) < 4e-6);
            for (int t = 0; t < drawn.n_top; t++) {
                assert_int_equal(drawn.top[t].token, sorted[t].token);
                assert_true(fabs(drawn.top[t].logprob - (sorted[t].x - log(sum))) < 4e-6);
            }
        }
        sampler_close(s);
    }
}

static void test_logprobs_of_nothing(void **state)
{
    (void)state;
    static const float none[4] = {NAN, -INFINITY, -INFINITY, NAN};
    static const float some[4] = {-INFINITY, 2, NAN, -INFINITY};
    struct sampler *s = open_sampler(1, 4);
    struct sampled out;
    sampler_score(s, none, 1, 2, &out);
    assert_true(out.logprob == -INFINITY && out.n_top == 2 && out.top[0].logprob == -INFINITY);
    sampler_score(s, some, 1, 2, &out);
    assert_true(out.logprob == 0 && out.top[0].token == 1 && out.top[1].logprob == -INFINITY);
    sampler_close(s);
}

/* ---- Draws ---- */

/* Chi-square of n_draws draws at consecutive positions against the distribution; cells of
 * under 5 expected draws are merged. Returns the statistic and its degrees of freedom. */
static double chi_square(struct sampler *s, const float *x, int n, const struct sampling_params *p,
                         int n_draws, int *freedom)
{
    static double probs[MAX_V];
    static int count[MAX_V];
    sampler_distribution(s, 0, x, p, 0, probs);
    memset(count, 0, sizeof(count));
    for (int i = 0; i < n_draws; i++) {
        struct sampled out;
        sampler_draw(s, 0, x, p, (uint64_t)i, 0, &out);
        count[out.token]++;
    }
    double sum = 0, rest = 0, rest_count = 0;
    *freedom = -1;
    for (int t = 0; t < n; t++) {
        double expected = probs[t] * n_draws;
        if (probs[t] == 0)
            assert_int_equal(count[t], 0);
        if (expected < 5) {
            rest += expected;
            rest_count += count[t];
            continue;
        }
        sum += (count[t] - expected) * (count[t] - expected) / expected;
        ++*freedom;
    }
    if (rest >= 5) {
        sum += (rest_count - rest) * (rest_count - rest) / rest;
        ++*freedom;
    }
    return sum;
}

static void test_chi_square(void **state)
{
    (void)state;
    static const struct {
        int n, n_draws, top_k;
        float temperature, top_p, min_p, typical_p;
    } cases[] = {
        {10, 20000, 0, 1, 1, 0, 1},
        {200, 20000, 0, 1.5f, 1, 0, 1},
        {1000, 20000, 40, 0.8f, 1, 0, 1},
        {1000, 20000, 0, 1, 0.9f, 0, 1},
        {1000, 20000, 0, 1, 1, 0.05f, 1},
        {1000, 20000, 0, 1, 1, 0, 0.6f},
        {1000, 20000, 100, 1.2f, 0.95f, 0.01f, 0.9f},
    };
    static float x[MAX_V];
    uint64_t seed = 23;
    for (size_t c = 0; c < COUNT_OF(cases); c++) {
        struct sampler *s = open_sampler(1, cases[c].n);
        for (int t = 0; t < cases[c].n; t++)
            x[t] = 1.5f * normal(&seed);
        struct sampling_params p;
        sampling_params_init(&p);
        p.temperature = cases[c].temperature;
        p.top_k = cases[c].top_k;
        p.top_p = cases[c].top_p;
        p.min_p = cases[c].min_p;
        p.typical_p = cases[c].typical_p;
        p.seed = 100 + c;
        int freedom;
        double statistic = chi_square(s, x, cases[c].n, &p, cases[c].n_draws, &freedom);
        /* Wilson-Hilferty: z is standard normal. Both tails: too good is wrong as well. */
        double z =
            (cbrt(statistic / freedom) - (1 - 2 / (9.0 * freedom))) / sqrt(2 / (9.0 * freedom));
        if (!(fabs(z) < 3))
            fail_msg("case %zu: chi-square %.1f with %d degrees of freedom", c, statistic, freedom);
        sampler_close(s);
    }
}

/* Seeds, choices and positions each give streams of their own: over a grid of them a uniform
 * distribution comes out uniform, also in pairs of neighbours. */
static void test_streams_are_independent(void **state)
{
    (void)state;
    enum { V = 8, N = 40 };
    static const float flat[V] = {0};
    static int pairs[3][V][V];
    static int32_t drawn[N][N][N]; /* seed, choice, position */
    struct sampler *s = open_sampler(1, V);
    struct sampling_params p;
    sampling_params_init(&p);
    for (int a = 0; a < N; a++)
        for (int b = 0; b < N; b++)
            for (int c = 0; c < N; c++) {
                p.seed = (uint64_t)a;
                p.choice = (uint32_t)b;
                struct sampled out;
                sampler_draw(s, 0, flat, &p, (uint64_t)c, 0, &out);
                drawn[a][b][c] = out.token;
                if (a && b && c) {
                    pairs[0][out.token][drawn[a - 1][b][c]]++;
                    pairs[1][out.token][drawn[a][b - 1][c]]++;
                    pairs[2][out.token][drawn[a][b][c - 1]]++;
                }
            }
    double expected = pow(N - 1, 3) / (V * V);
    for (int k = 0; k < 3; k++) {
        double statistic = 0;
        for (int i = 0; i < V * V; i++)
            statistic += pow(pairs[k][i / V][i % V] - expected, 2) / expected;
        if (statistic > 103 || statistic < 32) /* 63 degrees of freedom, 0.1% in each tail */
            fail_msg("neighbours along axis %d depend: chi-square %.1f", k, statistic);
    }
    sampler_close(s);
}

static void test_slots_do_not_mix(void **state)
{
    (void)state;
    enum { V = 100, STEPS = 200 };
    static float x[V];
    uint64_t seed = 31;
    for (int t = 0; t < V; t++)
        x[t] = normal(&seed);
    struct sampling_params p;
    sampling_params_init(&p);
    p.repetition_penalty = 1.2f;
    p.frequency_penalty = 0.3f;
    p.seed = 77;
    int32_t alone[STEPS];
    struct sampler *s = open_sampler(3, V);
    for (int round = 0; round < 2; round++) {
        sampler_reset(s, 1);
        for (int i = 0; i < STEPS; i++) {
            struct sampled out;
            sampler_draw(s, 1, x, &p, (uint64_t)i, i, &out);
            sampler_note(s, 1, out.token, true);
            if (round == 0)
                alone[i] = out.token;
            assert_int_equal(out.token, alone[i]);
            if (round == 1) { /* neighbours in between */
                struct sampling_params q = p;
                q.seed = (uint64_t)i;
                sampler_draw(s, i % 2 ? 0 : 2, x, &q, 5, 0, &out);
                sampler_note(s, i % 2 ? 0 : 2, out.token, true);
            }
        }
    }
    sampler_close(s);
}

static enum status open_and_close(void *context, struct error *err)
{
    struct sampler *s = NULL;
    enum status st = sampler_open(&s, 2, 100, context, 1, err);
    sampler_close(s);
    return st;
}

static void test_out_of_memory(void **state)
{
    (void)state;
    int32_t eos = 3;
    fail_alloc_walk(open_and_close, &eos);
    sampler_close(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_philox),
        cmocka_unit_test(test_exp),
        cmocka_unit_test(test_find_cut),
        cmocka_unit_test(test_against_oracle),
        cmocka_unit_test(test_against_transformers),
        cmocka_unit_test(test_bias_and_penalties),
        cmocka_unit_test(test_stop_rules),
        cmocka_unit_test(test_extreme_temperatures),
        cmocka_unit_test(test_params_check),
        cmocka_unit_test(test_logprobs),
        cmocka_unit_test(test_logprobs_of_nothing),
        cmocka_unit_test(test_chi_square),
        cmocka_unit_test(test_streams_are_independent),
        cmocka_unit_test(test_slots_do_not_mix),
        cmocka_unit_test(test_out_of_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
