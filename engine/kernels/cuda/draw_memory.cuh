/* draw_memory.cuh - what draw_scan and draw_rest share: the device's memory for drawing, groups
 * picked out of a row, and giving a row its token.
 */
#ifndef LATTE_CUDA_DRAW_MEMORY_CUH
#define LATTE_CUDA_DRAW_MEMORY_CUH

#include <float.h>

#include "engine/kernels/cuda/draw_block.cuh"

enum {
    SCAN_THREADS = 256,
    SCAN_BLOCKS = 6, /* of a multiprocessor */
    REST_THREADS = 512,
    REST_BLOCKS = 2,
    SHORT = SCAN_THREADS, /* tokens a row may be cut to for one thread each */
    LIST = 2048,          /* tokens that may come into question before */
    MAX_PICKS = 2048,     /* groups of a row that are bounded together: 262,144 tokens */
    BINS = 256,           /* of weight by y, eight a nat */
    RADIX_BINS = 2048,
    TOPS = SAMPLER_MAX_TOP_LOGPROBS,
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
    struct draw_job *jobs;         /* [R], behind the header */
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

/* A row with what drawing from it needs. */
struct drawn_row {
    struct row row;
    const struct slot_options *params;
    const struct draw_job *job;
    struct exponent by;
    int index; /* among the step's rows of logits */
};

/* Lists in shared memory. */
struct pick_lists {
    uint64_t keys[LIST];
    uint16_t picks[MAX_PICKS]; /* groups; pick_groups' are ascending */
    int n_keys, n_picks;
};

static __device__ __forceinline__ uint64_t weight_of(const struct drawn_row &d, float x)
{
    return weight_of(exact_exp(y_of(d.by, x)));
}

/* By one thread: the row's token. */
static __device__ void emit(const struct draw_memory &m, const struct drawn_row &d, int32_t token,
                            float top, double log_sum)
{
    const struct draw_job *job = d.job;
    const struct slot_options *p = d.params;
    m.drawn[job->slot] = token;
    if (p->counts) {
        uint32_t *count = &m.counts[(size_t)job->slot * (size_t)m.n_vocab + (size_t)token];
        if ((*count & ~IN_PROMPT) != ~IN_PROMPT)
            *count += 1;
    }
    float logprob = NAN;
    if (p->n_logprobs >= 0)
        logprob = log_prob(logit_of(d.row, __ldcg(d.row.logits + token)), top, log_sum);
    m.header->results[job->draw] = {token, logprob};
}

/* Groups whose largest value passes, in order. */
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

#endif
