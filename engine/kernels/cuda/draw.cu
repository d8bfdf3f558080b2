/* draw.cu - sampling on the device: sampler.h's definition over the step's rows of logits.
 *
 * Two launches. draw_scan reads each row once, a block to a PART of it, and keeps the largest
 * value of each GROUP; the block that finishes a row last draws from it when that takes few
 * values: greedy rows, and top_k up to SHORT, where the k-th largest group bounds what can be
 * among the k best. draw_rest takes the others: the sums of weights, block by block, for
 * temperature, top_p and min_p; and for typical_p without top_k, for large top_k and for rows
 * full of equal values radix selections over the row by one block. It leaves at once when
 * there are no such rows.
 *
 * Bytes: V * 4 a row (67 us for 1,024 rows of 50,257 at 3.08 TB/s), as much again for counts
 * where penalties need them, and again for rows left to draw_rest.
 *
 * Penalties and biases are applied to values as they are read; the logits stay as they are.
 * Weights are integers, so that any order of adding gives the host's sums and its token.
 *
 * The host's side: a step's draws go up in one copy, results are written by the kernels into
 * pinned memory of the step's place. An admission is a copy from a ring of pinned places. A
 * step that brings tokens of the host to slots with penalties launches draw_note before its
 * graph; so prompts are counted without a node in every graph.
 */
#include <algorithm>

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/kernels/cuda/draw_block.cuh"

enum {
    SCAN_THREADS = 256,
    SCAN_BLOCKS = 4, /* of a multiprocessor */
    REST_THREADS = 512,
    REST_BLOCKS = 2,
    SHORT = SCAN_THREADS, /* tokens a row may be cut to for one thread each */
    LIST = 2048,          /* tokens that may come into question before */
    MAX_PICKS = 2048,     /* groups of a row that are bounded together: 262,144 tokens */
    BINS = 256,           /* of weight by y, eight a nat */
    RADIX_BINS = 2048,
    TOPS = SAMPLER_MAX_TOP_LOGPROBS,
    PLACES = 2,    /* steps in flight */
    STAGING = 512, /* admissions whose copies may be unfinished */
};

/* What is wanted of one row of logits. */
struct draw_job {
    int32_t slot, draw;    /* slot -1: nothing to draw; draw: where its result goes */
    int32_t target, score; /* target -1: nothing to score */
    int32_t n_top, tops;   /* alternatives, and where they go */
    uint64_t position;
    int64_t n_output;
};

/* A token of the host that counts as prompt. */
struct draw_note {
    int32_t slot, token;
};

struct draw_header {
    struct token_logprob *results, *tops; /* pinned host memory of the step's place */
    int32_t n_slow;                       /* rows left to draw_rest, counted by draw_scan */
    int32_t unused[3];
};

/* What draw_scan leaves for draw_rest. */
struct row_state {
    double log_sum; /* of the untouched row, over its largest */
    float top;      /* the untouched row's largest */
    float best;     /* the adjusted row's largest */
};

/* Everything on the device. P parts, G = P * PART_GROUPS groups, R most rows of logits. */
struct draw_memory {
    struct draw_header *header;
    struct draw_job *jobs;         /* [R], then the notes */
    struct slot_params *params;    /* [n_slots] */
    uint32_t *counts;              /* [n_slots, V] times output, and IN_PROMPT */
    int32_t *drawn;                /* [n_slots] */
    uint64_t *part_raw;            /* [R, P] best key of the untouched part */
    uint64_t *part_best;           /* [R, P] of the adjusted one */
    float *part_sum;               /* [R, P] sum of exp(x - the part's largest), untouched */
    uint64_t *part_tops;           /* [R, P, TOPS] best keys of the untouched part */
    uint32_t *group_best;          /* [R, G] height of the adjusted group's largest */
    uint64_t *group_sum;           /* [R, G] its weight */
    uint64_t *bins;                /* [R, BINS] weight by y; zero between steps */
    struct row_state *state;       /* [R] */
    int32_t *n_scanned, *n_summed; /* [R] blocks that finished; zero between steps */
    int32_t *slow;                 /* [R] rows for draw_rest; ~row: radix selection */
    int32_t n_vocab, n_parts;
};

static __host__ __device__ __forceinline__ int n_groups_of(const struct draw_memory &m)
{
    return m.n_parts * PART_GROUPS;
}

/* ---- shared by both kernels ---- */

/* A row with what drawing from it needs. */
struct drawn_row {
    struct row row;
    const struct slot_params *params;
    struct exponent by;
    int index; /* among the step's rows of logits */
};

/* Lists in shared memory. */
struct pick_lists {
    uint64_t keys[LIST];
    uint16_t picks[MAX_PICKS]; /* groups, ascending */
    int n_keys, n_picks;
};

static __device__ __forceinline__ uint64_t weight_of(const struct drawn_row &d, float x)
{
    return weight_of(exact_exp(y_of(d.by, x)));
}

/* By one thread: the row's token. */
static __device__ void emit(const struct draw_memory &m, int row, const float *logits,
                            int32_t token, float top, double log_sum)
{
    const struct draw_job *job = &m.jobs[row];
    const struct slot_params *p = &m.params[job->slot];
    m.drawn[job->slot] = token;
    if (p->counts) {
        uint32_t *count = &m.counts[(size_t)job->slot * (size_t)m.n_vocab + (size_t)token];
        if ((*count & ~IN_PROMPT) != ~IN_PROMPT)
            *count += 1;
    }
    const float x = tidy(__ldcg(logits + token));
    m.header->results[job->draw] = {token, p->n_logprobs < 0 ? NAN : log_prob(x, top, log_sum)};
}

/* Groups whose largest value passes, in order. False: too many groups to list. */
template <class Pass>
static __device__ __forceinline__ void pick_groups(struct pick_lists *l, const uint32_t *best,
                                                   int n, Pass pass, struct block_scratch *s)
{
    const auto get = [best, pass](int i) { return (uint64_t)(pass(__ldcg(best + i)) ? 1 : 0); };
    const struct chunk c = chunk_sums(n, get, s);
    const int size = chunk_size(n), first = threadIdx.x * size;
    int at = (int)c.before;
    for (int i = first; i < first + size && i < n; i++)
        if (get(i))
            l->picks[at++] = (uint16_t)i;
    if (threadIdx.x == 0) {
        l->n_picks = (int)c.total;
        l->n_keys = 0;
    }
    __syncthreads();
}

/* See all values of the picked groups, a warp to a group, several loads in flight:
 * see(pick, x, id) by lane, then done(pick) by the warp. */
template <class See, class Done>
static __device__ __forceinline__ void see_picks(const struct pick_lists *l, struct row row,
                                                 See see, Done done)
{
    enum { LANE_VALUES = GROUP / WARP, AT_ONCE = 4 };
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, n_warps = blockDim.x / WARP;
    for (int pick = warp; pick < l->n_picks; pick += n_warps * AT_ONCE) {
        float x[AT_ONCE][LANE_VALUES];
#pragma unroll
        for (int a = 0; a < AT_ONCE; a++) {
            const int p = pick + a * n_warps;
            const int first = p < l->n_picks ? l->picks[p] * GROUP + lane : row.n;
            load_values<LANE_VALUES, WARP>(x[a], row, first);
        }
#pragma unroll
        for (int a = 0; a < AT_ONCE; a++) {
            const int p = pick + a * n_warps;
            if (p >= l->n_picks)
                break;
            const int first = l->picks[p] * GROUP + lane;
            change_values<LANE_VALUES, WARP>(x[a], row, first);
#pragma unroll
            for (int i = 0; i < LANE_VALUES; i++)
                see(p, x[a][i], first + i * WARP);
            done(p);
        }
    }
    __syncthreads();
}

static __device__ __forceinline__ void add_key(struct pick_lists *l, float x, int32_t id)
{
    const int at = atomicAdd(&l->n_keys, 1);
    if (at < LIST)
        l->keys[at] = key_of(x, id);
}

/* The token of one group at which its running sum of weight(x, id) exceeds rest; one warp,
 * adjacent values to a lane. The lane that holds it gets its id, the others -1. */
template <class Weight>
static __device__ __forceinline__ int32_t pick_in_group(struct row row, int group, uint64_t rest,
                                                        Weight weight)
{
    enum { LANE_VALUES = GROUP / WARP };
    const int first = group * GROUP + threadIdx.x % WARP * LANE_VALUES;
    float x[LANE_VALUES];
    row_values<LANE_VALUES, 1>(x, row, first);
    uint64_t w[LANE_VALUES], mine = 0;
#pragma unroll
    for (int i = 0; i < LANE_VALUES; i++)
        mine += w[i] = weight(x[i], first + i);
    uint64_t before = warp_scan(mine) - mine;
    int32_t token = -1;
#pragma unroll
    for (int i = 0; i < LANE_VALUES; i++) {
        if (before <= rest && rest < before + w[i])
            token = first + i;
        before += w[i];
    }
    return token;
}

/* ---- draw_scan ---- */

struct scan_shared {
    struct block_scratch block;
    struct changes changes;
    union {
        struct pick_lists lists;
        uint32_t heights[MAX_PICKS];
        float values[PART];
    };
    uint64_t rank[SHORT], weight[SHORT];
    double log_sum;
};

enum { SCAN_VALUES = PART / SCAN_THREADS, LANE_GROUPS = SCAN_VALUES * WARP / GROUP };

/* The best of a thread's values, which are those of tokens first, first + WARP, ... */
static __device__ __forceinline__ uint64_t best_of(const float (&x)[SCAN_VALUES], int32_t first)
{
    uint32_t most = 0;
    int32_t id = first;
#pragma unroll
    for (int i = 0; i < SCAN_VALUES; i++) {
        const uint32_t h = height(x[i]);
        id = h > most ? first + i * WARP : id;
        most = h > most ? h : most;
    }
    return key_of(most, id);
}

/* The best of them below a key. */
static __device__ __forceinline__ uint64_t best_below(const float (&x)[SCAN_VALUES], int32_t first,
                                                      uint64_t limit)
{
    uint64_t best = 0;
#pragma unroll
    for (int i = 0; i < SCAN_VALUES; i++) {
        const uint64_t key = key_of(x[i], first + i * WARP);
        best = key < limit && key > best ? key : best;
    }
    return best;
}

/* The adjusted values in place of the untouched ones, by way of shared memory: all of them at
 * once would take more registers than there are. */
static __device__ __forceinline__ void change_part(float (&x)[SCAN_VALUES], struct row row,
                                                   int32_t first, struct scan_shared *s)
{
    enum { AT_ONCE = 8 };
    float *mine = s->values + threadIdx.x;
#pragma unroll 1
    for (int i = 0; i < SCAN_VALUES; i += AT_ONCE) {
        float some[AT_ONCE];
        row_values<AT_ONCE, WARP>(some, row, first + i * WARP);
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++)
            mine[(i + k) * SCAN_THREADS] = some[k];
    }
#pragma unroll
    for (int i = 0; i < SCAN_VALUES; i++)
        x[i] = mine[i * SCAN_THREADS];
}

/* The part's sum of exp(x - its largest), and its best few: what logprobs are made of. Reads
 * the untouched values again: they need not stay in registers while others are adjusted. */
static __device__ void score_part(const struct draw_memory &m, struct row row, int32_t first,
                                  size_t at, int n_top, uint64_t best, struct scan_shared *s)
{
    float x[SCAN_VALUES];
    load_values<SCAN_VALUES, WARP>(x, row, first);
    const float top = value_of(best);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < SCAN_VALUES; i++)
        sum += is_out(x[i]) ? 0 : expf(x[i] - top);
    sum = block_sum(sum, reinterpret_cast<float *>(s->block.warps));
    if (threadIdx.x == 0)
        m.part_sum[at] = sum;
    uint64_t mine = best_of(x, first);
    for (int n = 0; n < n_top; n++) {
        const uint64_t next = block_best(mine, &s->block);
        if (threadIdx.x == 0)
            m.part_tops[at * TOPS + n] = next;
        if (mine == next)
            mine = best_below(x, first, next);
    }
}

/* The best key of a row from those of its parts. */
static __device__ uint64_t row_best(const uint64_t *parts, int n, struct block_scratch *s)
{
    uint64_t best = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        const uint64_t key = __ldcg(parts + i);
        best = key > best ? key : best;
    }
    return block_best(best, s);
}

/* log of the sum of exp(x - top) over the untouched row. */
static __device__ double row_log_sum(const struct draw_memory &m, int row, float top,
                                     struct scan_shared *s)
{
    if (threadIdx.x == 0) {
        double sum = 0;
        for (int p = 0; p < m.n_parts && !is_out(top); p++) {
            const size_t at = (size_t)row * m.n_parts + p;
            const float most = value_of(__ldcg(m.part_raw + at));
            if (!is_out(most))
                sum += (double)__ldcg(m.part_sum + at) * exp((double)most - (double)top);
        }
        s->log_sum = sum > 0 ? log(sum) : 0;
    }
    __syncthreads();
    return s->log_sum;
}

/* The row's best few from those of its parts, in chunks that fit the list. */
static __device__ void list_tops(const struct draw_memory &m, int row, const struct draw_job *job,
                                 float top, double log_sum, struct scan_shared *s)
{
    const int n_top = job->n_top < m.n_vocab ? job->n_top : m.n_vocab, n = m.n_parts * n_top;
    uint64_t *keys = s->lists.keys;
    int kept = 0;
    for (int done = 0; done < n;) {
        const int more = n - done < LIST - kept ? n - done : LIST - kept;
        for (int i = threadIdx.x; i < more; i += blockDim.x) {
            const int part = (done + i) / n_top, rank = (done + i) % n_top;
            const size_t at = ((size_t)row * m.n_parts + part) * TOPS + rank;
            keys[kept + i] = __ldcg(m.part_tops + at);
        }
        __syncthreads();
        sort_keys(keys, kept + more);
        done += more;
        kept = n_top;
    }
    for (int i = threadIdx.x; i < n_top; i += blockDim.x)
        m.header->tops[(size_t)job->tops * TOPS + i] = {id_of(keys[i]),
                                                        log_prob(value_of(keys[i]), top, log_sum)};
    __syncthreads();
}

/* What the weights of those before a thread sum to, in the order of rank. */
static __device__ __forceinline__ uint64_t before_in(const struct scan_shared *s, uint64_t rank,
                                                     int n)
{
    uint64_t before = 0;
    for (int i = 0; i < n; i++)
        before += s->rank[i] < rank ? s->weight[i] : 0;
    return before;
}

/* Everything after top_k, for a row cut to n <= SHORT tokens, best first: a thread each. */
static __device__ void draw_short(const struct draw_memory &m, const struct drawn_row &d, int n,
                                  float raw_top, double log_sum, struct scan_shared *s)
{
    const struct slot_params *p = d.params;
    const int t = threadIdx.x;
    const uint64_t key = t < n ? s->lists.keys[t] : key_of(-INFINITY, 0);
    const float y = y_of(d.by, value_of(key));
    float e = exact_exp(y);
    uint64_t w = weight_of(e);
    struct chunk c = block_scan(w, &s->block);
    if (p->typical_p < 1) {
        const uint64_t sum =
            block_scan(e > 0 ? weight_of(__fmul_rn(e, fabsf(y))) : 0, &s->block).total;
        const float centre = (float)(-(double)sum / (double)c.total);
        const float distance = fabsf(__fsub_rn(y, centre));
        s->rank[t] = (uint64_t)__float_as_uint(distance) << 32 | (uint32_t)id_of(key);
        s->weight[t] = w;
        __syncthreads();
        if (before_in(s, s->rank[t], n) >= part_of(c.total, p->typical_p)) {
            e = 0;
            w = 0;
        }
        c = block_scan(w, &s->block);
    }
    if (p->top_p < 1) {
        if (c.before >= part_of(c.total, p->top_p)) {
            e = 0;
            w = 0;
        }
        c = block_scan(w, &s->block);
    }
    if (p->min_p > 0) {
        const float most = p->typical_p < 1 ? value_of(block_best(key_of(e, t), &s->block)) : 1.0f;
        if (e < __fmul_rn(p->min_p, most))
            w = 0;
        c = block_scan(w, &s->block);
    }
    s->rank[t] = (uint32_t)id_of(key);
    s->weight[t] = w;
    __syncthreads();
    const uint64_t r = __umul64hi(random_bits(p->hash, m.jobs[d.index].position), c.total);
    if (w) {
        const uint64_t before = before_in(s, s->rank[t], n);
        if (before <= r && r < before + w)
            emit(m, d.index, d.row.logits, id_of(key), raw_top, log_sum);
    }
}

/* The top_k best, when few values come into question. False: too many do. */
static __device__ bool draw_top_k(const struct draw_memory &m, const struct drawn_row &d,
                                  float raw_top, double log_sum, struct scan_shared *s)
{
    const int n_groups = n_groups_of(m), k = d.params->top_k;
    if (n_groups > MAX_PICKS)
        return false;
    const uint32_t *best = m.group_best + (size_t)d.index * n_groups;
    uint32_t bound = 0;
    if (k <= n_groups) {
        for (int i = threadIdx.x; i < n_groups; i += blockDim.x)
            s->heights[i] = __ldcg(best + i);
        __syncthreads();
        bound = kth_largest(s->heights, n_groups, k, &s->block);
    }
    /* What is out for good need not be among the k. */
    const uint32_t least = max(bound, height(-FLT_MAX));
    struct pick_lists *l = &s->lists;
    pick_groups(
        l, best, n_groups, [least](uint32_t h) { return h >= least; }, &s->block);
    see_picks(
        l, d.row,
        [l, least](int, float x, int32_t id) {
            if (height(x) >= least)
                add_key(l, x, id);
        },
        [](int) {});
    if (l->n_keys > LIST)
        return false;
    sort_keys(l->keys, l->n_keys);
    draw_short(m, d, l->n_keys < k ? l->n_keys : k, raw_top, log_sum, s);
    return true;
}

static __device__ __forceinline__ void leave_row(const struct draw_memory &m, int row, bool radix,
                                                 struct row_state state)
{
    if (threadIdx.x)
        return;
    m.state[row] = state;
    m.slow[atomicAdd(&m.header->n_slow, 1)] = radix ? ~row : row;
}

/* All parts of a row are known. */
static __device__ void finish_row(const struct draw_memory &m, struct row row, int index,
                                  const struct draw_job *job, struct scan_shared *s)
{
    const size_t parts = (size_t)index * m.n_parts;
    const struct slot_params *p = job->slot < 0 ? nullptr : &m.params[job->slot];
    const bool scores = job->target >= 0 || p->n_logprobs >= 0;
    const uint64_t raw = row_best(m.part_raw + parts, m.n_parts, &s->block);
    const float raw_top = value_of(raw);
    const double log_sum = scores ? row_log_sum(m, index, raw_top, s) : 0;
    if (job->n_top)
        list_tops(m, index, job, raw_top, log_sum, s);
    if (job->target >= 0 && threadIdx.x == 0)
        m.header->results[job->score] = {
            job->target, log_prob(tidy(__ldcg(row.logits + job->target)), raw_top, log_sum)};
    if (!p)
        return;
    const uint64_t best = row.changes ? row_best(m.part_best + parts, m.n_parts, &s->block) : raw;
    const float top = value_of(best);
    if (is_out(top) || p->temperature == 0) {
        if (threadIdx.x == 0)
            emit(m, index, row.logits, id_of(is_out(top) ? raw : best), raw_top, log_sum);
        return;
    }
    const bool cut = p->top_k > 0 && p->top_k < m.n_vocab;
    const struct drawn_row d = {row, p, {top, p->scale}, index};
    if (cut && p->top_k <= SHORT && draw_top_k(m, d, raw_top, log_sum, s))
        return;
    leave_row(m, index, cut || p->typical_p < 1, {log_sum, raw_top, top});
}

/* One block a part of a row, grid (parts, rows). */
static __global__
__launch_bounds__(SCAN_THREADS,
                  SCAN_BLOCKS) void draw_scan(const __grid_constant__ struct draw_memory m,
                                              const float *logits, const struct step_sizes *sizes)
{
    __shared__ struct scan_shared s;
    pdl_trigger();
    const int index = blockIdx.y, part = blockIdx.x;
    /* The step's arrays are copied before its first kernel: they are there. */
    const bool idle = index >= sizes->n_logit_rows || (!sizes->n_draws && !sizes->n_scores);
    const struct draw_job *job = &m.jobs[index];
    const int slot = idle ? -1 : job->slot;
    const bool scored = !idle && job->target >= 0;
    pdl_wait();
    if (slot < 0 && !scored)
        return;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int32_t first = part * PART + warp * SCAN_VALUES * WARP + lane;
    struct row row = {logits + (size_t)index * (size_t)m.n_vocab, m.n_vocab, nullptr};
    float x[SCAN_VALUES];
    load_values<SCAN_VALUES, WARP>(x, row, first);
    const struct slot_params *p = slot < 0 ? nullptr : &m.params[slot];
    const size_t at = (size_t)index * m.n_parts + part;

    const uint64_t raw = block_best(best_of(x, first), &s.block);
    if (threadIdx.x == 0)
        m.part_raw[at] = raw;
    if (p) {
        load_changes(&s.changes, p, m.counts + (size_t)slot * (size_t)m.n_vocab, job->n_output);
        if (s.changes.any) {
            row.changes = &s.changes;
            change_part(x, row, first, &s);
            const uint64_t best = block_best(best_of(x, first), &s.block);
            if (threadIdx.x == 0)
                m.part_best[at] = best;
        }
        uint32_t *group_best = m.group_best + at * PART_GROUPS + warp * LANE_GROUPS;
#pragma unroll
        for (int g = 0; g < LANE_GROUPS; g++) {
            const float most =
                fmaxf(fmaxf(x[4 * g], x[4 * g + 1]), fmaxf(x[4 * g + 2], x[4 * g + 3]));
            const uint32_t tallest = __reduce_max_sync(0xffffffffu, height(most));
            if (lane == g)
                group_best[g] = tallest;
        }
    }
    if (scored || p->n_logprobs >= 0)
        score_part(m, row, first, at, job->n_top, raw, &s);
    if (last_of(&m.n_scanned[index], m.n_parts, &s.block))
        finish_row(m, row, index, job, &s);
}

/* ---- draw_rest ---- */

struct rest_shared {
    struct block_scratch block;
    struct changes changes;
    struct pick_lists lists;
    uint64_t sums[MAX_PICKS]; /* of picked groups; or bins */
};

static __device__ __forceinline__ int bin_of(float y)
{
    return (int)fminf(__fmul_rn(y, -8.0f), BINS - 1);
}

/* Sums of groups, or of bins under top_p, for parts first to end - 1 of a row. */
static __device__ void sum_parts(const struct draw_memory &m, const struct drawn_row &d, int first,
                                 int end, struct rest_shared *s)
{
    enum { VALUES = PART / REST_THREADS, GROUPS = VALUES * WARP / GROUP };
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const bool binned = d.params->top_p < 1;
    const float least = d.params->min_p; /* of the largest e, which is 1 */
    for (int i = threadIdx.x; i < BINS; i += blockDim.x)
        s->sums[i] = 0;
    __syncthreads();
    for (int part = first; part < end; part++) {
        const int32_t id = part * PART + warp * VALUES * WARP + lane;
        float x[VALUES];
        row_values<VALUES, WARP>(x, d.row, id);
        uint64_t sum[GROUPS] = {};
#pragma unroll
        for (int i = 0; i < VALUES; i++) {
            const float y = y_of(d.by, x[i]), e = exact_exp(y);
            if (!binned)
                sum[i * WARP / GROUP] += e < least ? 0 : weight_of(e);
            else if (e > 0)
                atomicAdd((unsigned long long *)&s->sums[bin_of(y)],
                          (unsigned long long)weight_of(e));
        }
        if (!binned) {
            uint64_t *out =
                m.group_sum + (size_t)d.index * n_groups_of(m) + part * PART_GROUPS + warp * GROUPS;
#pragma unroll
            for (int g = 0; g < GROUPS; g++) {
                const uint64_t all = warp_weight(sum[g]);
                if (lane == g)
                    out[g] = all;
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; binned && i < BINS; i += blockDim.x)
        if (s->sums[i])
            atomicAdd((unsigned long long *)&m.bins[(size_t)d.index * BINS + i],
                      (unsigned long long)s->sums[i]);
}

static __device__ __forceinline__ uint64_t random_below(const struct draw_memory &m,
                                                        const struct drawn_row &d, uint64_t total)
{
    return __umul64hi(random_bits(d.params->hash, m.jobs[d.index].position), total);
}

/* The first warp picks within a group and tells the result. */
template <class Weight>
static __device__ __forceinline__ void emit_in_group(const struct draw_memory &m,
                                                     const struct drawn_row &d, int group,
                                                     uint64_t rest, Weight weight)
{
    if (threadIdx.x >= WARP)
        return;
    const int32_t token = pick_in_group(d.row, group, rest, weight);
    const struct row_state state = m.state[d.index];
    if (token >= 0)
        emit(m, d.index, d.row.logits, token, state.top, state.log_sum);
}

/* Temperature, perhaps min_p: groups are summed, take one, and a token of it. */
static __device__ void draw_from_groups(const struct draw_memory &m, const struct drawn_row &d,
                                        struct rest_shared *s)
{
    const int n = n_groups_of(m);
    const uint64_t *sums = m.group_sum + (size_t)d.index * n;
    const auto get = [sums](int i) { return __ldcg(sums + i); };
    const struct chunk c = chunk_sums(n, get, &s->block);
    find_chunk(c, n, get, random_below(m, d, c.total), &s->block);
    const float least = d.params->min_p;
    emit_in_group(m, d, s->block.index, s->block.rest, [&d, least](float x, int32_t) {
        const float e = exact_exp(y_of(d.by, x));
        return e < least ? (uint64_t)0 : weight_of(e);
    });
}

/* The bin in which the running weight reaches p of the total: s->block.index, and what of it
 * is wanted, less one: s->block.rest. The bins are left zero. */
static __device__ void find_bin(const struct draw_memory &m, const struct drawn_row &d,
                                struct rest_shared *s)
{
    uint64_t *bins = m.bins + (size_t)d.index * BINS;
    for (int i = threadIdx.x; i < BINS; i += blockDim.x) {
        s->sums[i] = __ldcg(bins + i);
        bins[i] = 0;
    }
    __syncthreads();
    const auto get = [s](int i) { return s->sums[i]; };
    const struct chunk c = chunk_sums(BINS, get, &s->block);
    find_chunk(c, BINS, get, part_of(c.total, d.params->top_p) - 1, &s->block);
}

/* top_p, perhaps min_p. The bin of the cut is sorted; what lies above it is in. False: the bin
 * holds too many tokens. */
static __device__ bool draw_top_p(const struct draw_memory &m, const struct drawn_row &d,
                                  struct rest_shared *s)
{
    const int n = n_groups_of(m);
    struct pick_lists *l = &s->lists;
    find_bin(m, d, s);
    if (n > MAX_PICKS)
        return false;
    const int bin = s->block.index;
    const uint64_t wanted = s->block.rest;
    const float least = d.params->min_p;
    __syncthreads();
    for (int i = threadIdx.x; i < MAX_PICKS; i += blockDim.x)
        s->sums[i] = 0;
    const struct exponent by = d.by;
    pick_groups(
        l, m.group_best + (size_t)d.index * n, n,
        [by, bin](uint32_t h) { return bin_of(y_of(by, value_at(h))) <= bin; }, &s->block);
    uint64_t sum = 0;
    see_picks(
        l, d.row,
        [l, by, bin, least, &sum](int, float x, int32_t id) {
            const float y = y_of(by, x), e = exact_exp(y);
            const int b = bin_of(y);
            if (b == bin && e > 0)
                add_key(l, x, id);
            else if (b < bin && e >= least)
                sum += weight_of(e);
        },
        [s, &sum](int pick) {
            const uint64_t all = warp_weight(sum);
            if (threadIdx.x % WARP == 0)
                s->sums[pick] = all;
            sum = 0;
        });
    if (l->n_keys > LIST)
        return false;
    sort_keys(l->keys, l->n_keys);
    const auto weight = [l, &d](int i) { return weight_of(d, value_of(l->keys[i])); };
    const int n_keys = l->n_keys;
    find_chunk(chunk_sums(n_keys, weight, &s->block), n_keys, weight, wanted, &s->block);
    const int last = s->block.index;
    const uint64_t cut = l->keys[last];
    for (int i = threadIdx.x; i <= last; i += blockDim.x) {
        const float e = exact_exp(y_of(by, value_of(l->keys[i])));
        if (e < least)
            continue;
        const int group = id_of(l->keys[i]) / GROUP;
        int low = 0, high = l->n_picks - 1;
        while (low < high) {
            const int middle = (low + high) / 2;
            if (l->picks[middle] < group)
                low = middle + 1;
            else
                high = middle;
        }
        atomicAdd((unsigned long long *)&s->sums[low], (unsigned long long)weight_of(e));
    }
    __syncthreads();
    const auto get = [s](int i) { return s->sums[i]; };
    const struct chunk c = chunk_sums(l->n_picks, get, &s->block);
    find_chunk(c, l->n_picks, get, random_below(m, d, c.total), &s->block);
    emit_in_group(m, d, l->picks[s->block.index], s->block.rest,
                  [by, least, cut](float x, int32_t id) {
                      const float e = exact_exp(y_of(by, x));
                      return key_of(x, id) >= cut && e >= least ? weight_of(e) : 0;
                  });
    return true;
}

/* ---- any row, any options: radix selection ---- */

/* What the filters have left of a row: ranks (ascending, with the id below) up to a cut. */
struct kept {
    uint64_t by_value, by_distance;
    float centre, least;
};

struct token {
    float y, e;
    uint64_t by_value, by_distance;
    bool in;
};

static __device__ __forceinline__ struct token token_of(const struct drawn_row &d,
                                                        const struct kept &k, float x, int32_t id)
{
    struct token t;
    t.y = y_of(d.by, x);
    t.e = exact_exp(t.y);
    t.by_value = (uint64_t)~height(x) << ID_BITS | (uint32_t)id;
    t.by_distance =
        (uint64_t)__float_as_uint(fabsf(__fsub_rn(t.y, k.centre))) << ID_BITS | (uint32_t)id;
    t.in = t.by_value <= k.by_value && t.by_distance <= k.by_distance && t.e >= k.least;
    return t;
}

template <class See>
static __device__ __forceinline__ void see_row(const struct drawn_row &d, const struct kept &k,
                                               See see)
{
    enum { AT_ONCE = 4 };
    for (int id = threadIdx.x; id < d.row.n; id += REST_THREADS * AT_ONCE) {
        float x[AT_ONCE];
        row_values<AT_ONCE, REST_THREADS>(x, d.row, id);
#pragma unroll
        for (int a = 0; a < AT_ONCE; a++)
            if (id + a * REST_THREADS < d.row.n) {
                const struct token t = token_of(d, k, x[a], id + a * REST_THREADS);
                if (t.in)
                    see(t, id + a * REST_THREADS);
            }
    }
    __syncthreads();
}

enum { DIGITS = 5 };

struct cut {
    uint64_t rank, mass; /* the last rank that is in, and what all that are in weigh */
};

/* Where the mass by ascending rank(t, id), both of a token that is in, reaches target. exact:
 * the rank is that of a token; otherwise of anything between it and the next one. */
template <class Rank, class Mass>
static __device__ __forceinline__ struct cut
find_cut(const struct drawn_row &d, const struct kept &k, int first_digit, bool exact,
         uint64_t target, Rank rank, Mass mass, struct rest_shared *s)
{
    int shift = first_digit ? ID_BITS : 32 + ID_BITS;
    unsigned long long *bins = (unsigned long long *)s->sums;
    uint64_t prefix = 0, before = 0;
    for (int digit = first_digit; digit < DIGITS; digit++) {
        const int width = digit == 2 ? 10 : 11;
        shift -= width;
        for (int i = threadIdx.x; i < RADIX_BINS; i += blockDim.x)
            bins[i] = 0;
        __syncthreads();
        see_row(d, k, [=](const struct token &t, int32_t id) {
            const uint64_t r = rank(t, id);
            if (r >> shift >> width == prefix)
                atomicAdd(&bins[r >> shift & ((1u << width) - 1)], (unsigned long long)mass(t));
        });
        const auto get = [bins](int i) { return (uint64_t)bins[i]; };
        find_chunk(chunk_sums(1 << width, get, &s->block), 1 << width, get, target - 1, &s->block);
        const uint64_t rest = s->block.rest + 1, in_bin = s->block.mass;
        before += target - rest;
        target = rest;
        prefix = prefix << width | (uint64_t)s->block.index;
        __syncthreads();
        if (digit == DIGITS - 1 || (!exact && target == in_bin))
            return {(((prefix + 1) << shift) - 1), before + in_bin};
    }
    return {0, 0}; /* not reached */
}

static __device__ uint64_t total_of(const struct drawn_row &d, const struct kept &k,
                                    struct rest_shared *s)
{
    uint64_t sum = 0;
    see_row(d, k, [&sum](const struct token &t, int32_t) { sum += weight_of(t.e); });
    return block_scan(sum, &s->block).total;
}

static __device__ float mean_y(const struct drawn_row &d, const struct kept &k, uint64_t total,
                               struct rest_shared *s)
{
    uint64_t sum = 0;
    see_row(d, k, [&sum](const struct token &t, int32_t) {
        sum += t.e > 0 ? weight_of(__fmul_rn(t.e, fabsf(t.y))) : 0;
    });
    return (float)(-(double)block_scan(sum, &s->block).total / (double)total);
}

static __device__ float largest_e(const struct drawn_row &d, const struct kept &k,
                                  struct rest_shared *s)
{
    float most = 0;
    see_row(d, k, [&most](const struct token &t, int32_t) { most = fmaxf(most, t.e); });
    return value_of(block_best(key_of(most, 0), &s->block));
}

static __device__ void draw_by_radix(const struct draw_memory &m, const struct drawn_row &d,
                                     struct rest_shared *s)
{
    const struct slot_params *p = d.params;
    const auto by_value = [](const struct token &t, int32_t) { return t.by_value; };
    const auto by_distance = [](const struct token &t, int32_t) { return t.by_distance; };
    const auto by_id = [](const struct token &, int32_t id) { return (uint64_t)id; };
    const auto one = [](const struct token &) { return (uint64_t)1; };
    const auto weight = [](const struct token &t) { return weight_of(t.e); };
    struct kept k = {~(uint64_t)0, ~(uint64_t)0, 0, 0};
    if (p->top_k > 0 && p->top_k < m.n_vocab)
        k.by_value = find_cut(d, k, 0, false, (uint64_t)p->top_k, by_value, one, s).rank;
    uint64_t total = total_of(d, k, s);
    if (p->typical_p < 1) {
        k.centre = mean_y(d, k, total, s);
        const struct cut c =
            find_cut(d, k, 0, false, part_of(total, p->typical_p), by_distance, weight, s);
        k.by_distance = c.rank;
        total = c.mass;
    }
    if (p->top_p < 1) {
        const struct cut c =
            find_cut(d, k, 0, false, part_of(total, p->top_p), by_value, weight, s);
        k.by_value = c.rank;
        total = c.mass;
    }
    if (p->min_p > 0) {
        k.least = __fmul_rn(p->min_p, p->typical_p < 1 ? largest_e(d, k, s) : 1.0f);
        total = total_of(d, k, s);
    }
    const uint64_t r = random_below(m, d, total);
    const int32_t token = (int32_t)find_cut(d, k, 3, true, r + 1, by_id, weight, s).rank;
    const struct row_state state = m.state[d.index];
    if (threadIdx.x == 0)
        emit(m, d.index, d.row.logits, token, state.top, state.log_sum);
}

/* Rows that draw_scan left. Few rows are spread over several blocks each. */
static __global__
__launch_bounds__(REST_THREADS,
                  REST_BLOCKS) void draw_rest(const __grid_constant__ struct draw_memory m,
                                              const float *logits, const struct step_sizes *sizes)
{
    __shared__ struct rest_shared s;
    pdl_trigger();
    pdl_wait();
    if (!sizes->n_draws)
        return;
    const int n_slow = m.header->n_slow;
    const int spread = n_slow ? (int)gridDim.x / n_slow : 0;
    const int n_blocks = spread < 1 ? 1 : spread < m.n_parts ? spread : m.n_parts;
    for (int item = blockIdx.x; item < n_slow * n_blocks; item += gridDim.x) {
        const int entry = m.slow[item / n_blocks], block = item % n_blocks;
        const bool radix = entry < 0;
        if (radix && block)
            continue;
        const int index = radix ? ~entry : entry;
        const struct draw_job *job = &m.jobs[index];
        const struct slot_params *p = &m.params[job->slot];
        load_changes(&s.changes, p, m.counts + (size_t)job->slot * (size_t)m.n_vocab,
                     job->n_output);
        const struct row row = {logits + (size_t)index * (size_t)m.n_vocab, m.n_vocab,
                                s.changes.any ? &s.changes : nullptr};
        const struct drawn_row d = {row, p, {m.state[index].best, p->scale}, index};
        if (radix) {
            draw_by_radix(m, d, &s);
        } else {
            sum_parts(m, d, block * m.n_parts / n_blocks, (block + 1) * m.n_parts / n_blocks, &s);
            if (!last_of(&m.n_summed[index], n_blocks, &s.block))
                continue;
            if (p->top_p == 1)
                draw_from_groups(m, d, &s);
            else if (!draw_top_p(m, d, &s))
                draw_by_radix(m, d, &s);
        }
        __syncthreads(); /* shared memory is used again */
    }
}

/* Tokens of the host count as prompt. */
static __global__ void draw_note_prompt(struct draw_memory m, const struct draw_note *notes, int n)
{
    pdl_trigger();
    pdl_wait();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n)
        atomicOr(&m.counts[(size_t)notes[i].slot * (size_t)m.n_vocab + (size_t)notes[i].token],
                 IN_PROMPT);
}

/* ---- the host's side ---- */

/* What a draw or score of the step gets back. */
struct wanted {
    int32_t n_top, tops; /* tops: index of the row's list */
};

struct draw_place {
    unsigned char *upload;         /* pinned: header, jobs, notes */
    struct token_logprob *results; /* pinned [2 * R] */
    struct token_logprob *tops;    /* pinned [R, TOPS] */
    struct wanted *wanted;         /* [2 * R] */
    struct sampled *sampled;       /* [2 * R] */
    int n_results;
};

struct slot_mirror {
    int8_t n_logprobs;
    bool counts;
};

struct drawing {
    struct draw_memory memory;
    unsigned char *block; /* device, all of memory's arrays */
    size_t n_bytes, upload_bytes;
    int n_slots, max_logit_rows, max_rows;
    int32_t n_eos, eos[MODEL_MAX_EOS];
    struct draw_place places[PLACES];
    struct slot_mirror *slots;   /* [n_slots] */
    struct slot_params *staging; /* pinned [STAGING] */
    cudaEvent_t staged[STAGING]; /* the copy from it is done */
    bool ever_staged[STAGING];
    int next_staging;
};

static int n_parts_of(const struct model_config *config)
{
    return ceil_div(config->vocab_size, PART);
}

static size_t upload_bytes_of(const struct backend_options *o)
{
    return sizeof(struct draw_header) + (size_t)o->max_logit_rows * sizeof(struct draw_job) +
           (size_t)o->max_rows * sizeof(struct draw_note);
}

/* Lay the arrays out in a block; returns its size. With base NULL only that. */
static size_t lay_out(struct draw_memory *m, unsigned char *base, const struct backend_options *o)
{
    const size_t rows = (size_t)o->max_logit_rows, slots = (size_t)o->n_slots;
    const size_t parts = rows * (size_t)n_parts_of(o->config), groups = parts * PART_GROUPS;
    size_t at = 0;
    const auto place = [&at, base](auto **out, size_t n_bytes) {
        *out = reinterpret_cast<std::remove_reference_t<decltype(*out)>>(base + at);
        at += (n_bytes + 255) / 256 * 256;
    };
    place(&m->header, upload_bytes_of(o));
    m->jobs = reinterpret_cast<struct draw_job *>(m->header + 1);
    place(&m->params, slots * sizeof(*m->params));
    place(&m->counts, slots * (size_t)o->config->vocab_size * sizeof(*m->counts));
    place(&m->drawn, slots * sizeof(*m->drawn));
    place(&m->part_raw, parts * sizeof(*m->part_raw));
    place(&m->part_best, parts * sizeof(*m->part_best));
    place(&m->part_sum, parts * sizeof(*m->part_sum));
    place(&m->part_tops, parts * TOPS * sizeof(*m->part_tops));
    place(&m->group_best, groups * sizeof(*m->group_best));
    place(&m->group_sum, groups * sizeof(*m->group_sum));
    place(&m->bins, rows * BINS * sizeof(*m->bins));
    place(&m->state, rows * sizeof(*m->state));
    place(&m->n_scanned, rows * sizeof(*m->n_scanned));
    place(&m->n_summed, rows * sizeof(*m->n_summed));
    place(&m->slow, rows * sizeof(*m->slow));
    m->n_vocab = o->config->vocab_size;
    m->n_parts = n_parts_of(o->config);
    return at;
}

size_t drawing_bytes_of(const struct backend_options *options)
{
    struct draw_memory unused;
    return options->config ? lay_out(&unused, nullptr, options) : 0;
}

size_t drawing_bytes(const struct drawing *d)
{
    return d->n_bytes;
}

const int32_t *drawing_tokens(const struct drawing *d)
{
    return d->memory.drawn;
}

static bool succeeds(struct cuda *c, cudaError_t error, const char *where)
{
    if (error != cudaSuccess && c->queue.error == cudaSuccess) {
        c->queue.error = error;
        c->queue.where = where;
    }
    return c->queue.error == cudaSuccess;
}

static cudaError_t open_place(struct draw_place *p, size_t upload_bytes, size_t max_logit_rows)
{
    cudaError_t error = cudaMallocHost((void **)&p->upload, upload_bytes);
    if (error == cudaSuccess)
        error = cudaMallocHost((void **)&p->results, 2 * max_logit_rows * sizeof(*p->results));
    if (error == cudaSuccess)
        error = cudaMallocHost((void **)&p->tops, max_logit_rows * TOPS * sizeof(*p->tops));
    p->wanted = (struct wanted *)calloc(2 * max_logit_rows, sizeof(*p->wanted));
    p->sampled = (struct sampled *)calloc(2 * max_logit_rows, sizeof(*p->sampled));
    if (error == cudaSuccess && (!p->wanted || !p->sampled))
        error = cudaErrorMemoryAllocation;
    return error;
}

static cudaError_t open_memory(struct drawing *d, struct cuda *c)
{
    const struct backend_options *o = &c->options;
    d->n_bytes = lay_out(&d->memory, nullptr, o);
    cudaError_t error = cudaMalloc((void **)&d->block, d->n_bytes);
    if (error == cudaSuccess) {
        lay_out(&d->memory, d->block, o);
        error = cudaMemsetAsync(d->block, 0, d->n_bytes, c->queue.stream);
    }
    for (int i = 0; error == cudaSuccess && i < PLACES; i++)
        error = open_place(&d->places[i], d->upload_bytes, (size_t)d->max_logit_rows);
    if (error == cudaSuccess)
        error = cudaMallocHost((void **)&d->staging, STAGING * sizeof(*d->staging));
    for (int i = 0; error == cudaSuccess && i < STAGING; i++)
        error = cudaEventCreateWithFlags(&d->staged[i], cudaEventDisableTiming);
    d->slots = (struct slot_mirror *)calloc((size_t)d->n_slots, sizeof(*d->slots));
    return error == cudaSuccess && !d->slots ? cudaErrorMemoryAllocation : error;
}

enum status drawing_open(struct drawing **out, struct cuda *c, struct error *err)
{
    const struct backend_options *o = &c->options;
    CHECK(o->n_slots > 0 && o->max_logit_rows > 0 && o->max_rows > 0);
    if (o->config->vocab_size > 1 << ID_BITS)
        return fail(err, STATUS_UNSUPPORTED,
                    "drawing on the device: a vocabulary of %d; at most "
                    "%d is possible",
                    o->config->vocab_size, 1 << ID_BITS);
    struct drawing *d = (struct drawing *)calloc(1, sizeof(*d));
    if (!d)
        return fail(err, STATUS_NOMEM, "drawing on the device: out of memory");
    d->n_slots = o->n_slots;
    d->max_logit_rows = o->max_logit_rows;
    d->max_rows = o->max_rows;
    d->upload_bytes = upload_bytes_of(o);
    d->n_eos = o->config->n_eos;
    memcpy(d->eos, o->config->eos_token_id, sizeof(d->eos));
    const cudaError_t error = open_memory(d, c);
    if (error == cudaSuccess) {
        *out = d;
        return STATUS_OK;
    }
    drawing_close(d);
    if (error != cudaErrorMemoryAllocation) {
        (void)succeeds(c, error, "drawing_open");
        return fail(err, STATUS_DEVICE, "drawing on the device: %s", cudaGetErrorString(error));
    }
    (void)cudaGetLastError(); /* running out is no failure of the device */
    return fail(err, STATUS_NOMEM,
                "drawing for %d slots over %d tokens: %zu bytes of device "
                "memory are not to be had",
                o->n_slots, o->config->vocab_size, drawing_bytes_of(o));
}

void drawing_close(struct drawing *d)
{
    if (!d)
        return;
    (void)cudaFree(d->block);
    (void)cudaFreeHost(d->staging);
    for (int i = 0; i < STAGING; i++)
        if (d->staged[i])
            (void)cudaEventDestroy(d->staged[i]);
    for (int i = 0; i < PLACES; i++) {
        struct draw_place *p = &d->places[i];
        (void)cudaFreeHost(p->upload);
        (void)cudaFreeHost(p->results);
        (void)cudaFreeHost(p->tops);
        free(p->wanted);
        free(p->sampled);
    }
    free(d->slots);
    free(d);
}

/* ---- admission ---- */

static uint64_t mix(uint64_t h) /* as sampler.c */
{
    h = (h ^ h >> 33) * 0xff51afd7ed558ccdull;
    h = (h ^ h >> 33) * 0xc4ceb9fe1a85ec53ull;
    return h ^ h >> 33;
}

/* By token; those of one token stay in order, as each addition rounds. */
static void sort_bias(struct logit_bias *out, const struct logit_bias *bias, int n)
{
    uint64_t order[SAMPLER_MAX_LOGIT_BIAS];
    for (int i = 0; i < n; i++)
        order[i] = (uint64_t)(uint32_t)bias[i].token << 32 | (uint32_t)i;
    std::sort(order, order + n);
    for (int i = 0; i < n; i++)
        out[i] = bias[(uint32_t)order[i]];
}

static void fill_params(struct slot_params *out, const struct drawing *d,
                        const struct sampling_params *p)
{
    const float scale = 1.0f / p->temperature;
    out->hash = mix(mix(p->seed) + p->choice);
    out->temperature = p->temperature;
    out->scale = scale < FLT_MAX ? scale : FLT_MAX;
    out->top_p = p->top_p;
    out->min_p = p->min_p;
    out->typical_p = p->typical_p;
    out->repetition = p->repetition_penalty;
    out->presence = p->presence_penalty;
    out->frequency = p->frequency_penalty;
    out->top_k = p->top_k > 0 ? p->top_k : 0;
    out->n_logprobs = p->n_logprobs;
    out->min_tokens = p->min_tokens;
    out->counts = sampler_counts(p);
    out->n_forbidden = 0;
    for (int i = 0; i < d->n_eos && !p->ignore_eos; i++)
        out->forbidden[out->n_forbidden++] = d->eos[i];
    for (int i = 0; i < p->n_stop_tokens; i++)
        out->forbidden[out->n_forbidden++] = p->stop_tokens[i];
    out->n_bias = p->n_logit_bias;
    sort_bias(out->bias, p->logit_bias, p->n_logit_bias);
}

enum status cuda_admit(struct backend *b, int slot, const struct sampling_params *params,
                       struct error *err)
{
    struct cuda *c = cuda_of(b);
    struct drawing *d = c->drawing;
    CHECK(d && slot >= 0 && slot < d->n_slots);
    cudaStream_t stream = c->queue.stream;
    const int at = d->next_staging++ % STAGING;
    struct slot_params *p = &d->staging[at];
    bool good = succeeds(c, cudaSetDevice(c->options.device), "cudaSetDevice");
    if (good && d->ever_staged[at])
        good = succeeds(c, cudaEventSynchronize(d->staged[at]), "an admission");
    if (good) {
        fill_params(p, d, params);
        d->slots[slot] = {(int8_t)params->n_logprobs, p->counts != 0};
        const size_t n_bytes =
            offsetof(struct slot_params, bias) + (size_t)p->n_bias * sizeof(*p->bias);
        good = succeeds(
            c, cudaMemcpyAsync(&d->memory.params[slot], p, n_bytes, cudaMemcpyHostToDevice, stream),
            "copying an admission");
    }
    if (good)
        good = succeeds(c, cudaEventRecord(d->staged[at], stream), "an admission");
    d->ever_staged[at] = true;
    const size_t row = (size_t)d->memory.n_vocab;
    if (good && p->counts)
        good = succeeds(c,
                        cudaMemsetAsync(d->memory.counts + (size_t)slot * row, 0,
                                        row * sizeof(uint32_t), stream),
                        "forgetting counts");
    d->next_staging %= STAGING;
    if (good)
        return STATUS_OK;
    return fail(err, STATUS_DEVICE, "cuda:%d: %s: %s", c->options.device, c->queue.where,
                cudaGetErrorString(c->queue.error));
}

/* ---- a step ---- */

static void want_draws(struct draw_job *jobs, struct draw_place *p, const struct drawing *d,
                       const struct step *step)
{
    for (int i = 0; i < step->n_draws; i++) {
        const struct step_draw *draw = &step->draws[i];
        CHECK(draw->slot >= 0 && draw->slot < d->n_slots && draw->logit_row >= 0 &&
              draw->logit_row < step->n_logit_rows);
        struct draw_job *job = &jobs[draw->logit_row];
        CHECK(job->slot < 0);
        job->slot = draw->slot;
        job->draw = i;
        job->position = draw->position;
        job->n_output = draw->n_output;
        const int n_top = d->slots[draw->slot].n_logprobs;
        p->wanted[i] = {n_top > 0 ? n_top : 0, draw->logit_row};
        job->n_top = p->wanted[i].n_top;
    }
}

static void want_scores(struct draw_job *jobs, struct draw_place *p, const struct drawing *d,
                        const struct step *step)
{
    for (int i = 0; i < step->n_scores; i++) {
        const struct step_score *score = &step->scores[i];
        CHECK(score->target >= 0 && score->target < d->memory.n_vocab && score->logit_row >= 0 &&
              score->logit_row < step->n_logit_rows);
        struct draw_job *job = &jobs[score->logit_row];
        CHECK(job->target < 0 && score->n_top >= 0 && score->n_top <= TOPS);
        job->target = score->target;
        job->score = step->n_draws + i;
        p->wanted[job->score] = {score->n_top, score->logit_row};
        if (job->n_top < score->n_top)
            job->n_top = score->n_top;
    }
}

/* Tokens of the host for slots whose penalties count them. */
static int fill_notes(struct draw_note *notes, const struct drawing *d, const struct step *step)
{
    int n = 0;
    for (int s = 0; s < step->n_seqs; s++) {
        const int slot = step->seq_slot[s];
        if (!d->slots[slot].counts)
            continue;
        for (int r = step->seq_start[s]; r < step->seq_start[s + 1]; r++)
            if (step->tokens[r] != TOKEN_DRAWN)
                notes[n++] = {slot, step->tokens[r]};
    }
    return n;
}

void drawing_begin(struct cuda *c, int place, const struct step *step)
{
    struct drawing *d = c->drawing;
    struct draw_place *p = &d->places[place];
    struct draw_header *header = (struct draw_header *)p->upload;
    struct draw_job *jobs = (struct draw_job *)(header + 1);
    const bool draws = step->n_draws || step->n_scores;
    const int n_jobs = draws ? step->n_logit_rows : 0;
    struct draw_note *notes = (struct draw_note *)(jobs + n_jobs);
    p->n_results = step->n_draws + step->n_scores;
    for (int i = 0; i < n_jobs; i++)
        jobs[i] = {-1, 0, -1, 0, 0, i, 0, 0};
    want_draws(jobs, p, d, step);
    want_scores(jobs, p, d, step);
    const int n_notes = fill_notes(notes, d, step);
    if (!draws && !n_notes)
        return;
    *header = {p->results, p->tops, 0, {0, 0, 0}};
    const size_t n_bytes = (size_t)((unsigned char *)(notes + n_notes) - p->upload);
    if (!succeeds(c,
                  cudaMemcpyAsync(d->memory.header, p->upload, n_bytes, cudaMemcpyHostToDevice,
                                  c->queue.stream),
                  "copying draws to the device"))
        return;
    if (n_notes)
        launch(&c->queue, "draw_note_prompt", draw_note_prompt, dim3(ceil_div(n_notes, 256)), 256,
               0, d->memory, (const struct draw_note *)(d->memory.jobs + n_jobs), n_notes);
}

void cuda_draw(struct backend *b, const struct buffer *logits)
{
    struct cuda *c = cuda_of(b);
    const struct drawing *d = c->drawing;
    if (!d || !c->step.logits)
        return;
    const struct step_sizes *sizes = c->step.sizes;
    const dim3 grid((unsigned)d->memory.n_parts, (unsigned)c->step.logits);
    launch(&c->queue, "draw_scan", draw_scan, grid, SCAN_THREADS, 0, d->memory,
           (const float *)floats(logits), sizes);
    const int most = c->step.logits * d->memory.n_parts, blocks = REST_BLOCKS * c->queue.n_sms;
    launch(&c->queue, "draw_rest", draw_rest, dim3(most < blocks ? most : blocks), REST_THREADS, 0,
           d->memory, (const float *)floats(logits), sizes);
}

/* The kernels have written the results to the host themselves. */
void drawing_submit(struct cuda *c, int place)
{
    (void)c;
    (void)place;
}

const struct sampled *drawing_results(struct cuda *c, int place)
{
    const struct drawing *d = c->drawing;
    const struct draw_place *p = &d->places[place];
    for (int i = 0; i < p->n_results; i++) {
        const struct wanted *w = &p->wanted[i];
        struct sampled *out = &p->sampled[i];
        out->token = p->results[i].token;
        out->logprob = p->results[i].logprob;
        out->n_top = w->n_top < d->memory.n_vocab ? w->n_top : d->memory.n_vocab;
        memcpy(out->top, p->tops + (size_t)w->tops * TOPS, (size_t)out->n_top * sizeof(*out->top));
    }
    return p->sampled;
}
