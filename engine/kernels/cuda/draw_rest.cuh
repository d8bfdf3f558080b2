/* draw_rest.cuh - the kernel for rows that draw_scan left: temperature with top_p or min_p over
 * the whole row, and by radix selection whatever else there may be. See draw.cu.
 *
 * Bytes: V * 4 a row once more, and the groups above the cut of top_p; radix selection reads
 * the row up to five times for each filter.
 */
#ifndef LATTE_CUDA_DRAW_REST_CUH
#define LATTE_CUDA_DRAW_REST_CUH

#include "engine/kernels/cuda/draw_memory.cuh"

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

static __device__ __forceinline__ uint64_t random_below(const struct drawn_row &d, uint64_t total)
{
    return __umul64hi(random_bits(d.params->hash, d.job->position), total);
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
        emit(m, d, token, state.top, state.log_sum);
}

/* Temperature, perhaps min_p: groups are summed, take one, and a token of it. */
static __device__ void draw_from_groups(const struct draw_memory &m, const struct drawn_row &d,
                                        struct rest_shared *s)
{
    const int n = n_groups_of(m);
    const uint64_t *sums = m.group_sum + (size_t)d.index * n;
    const auto get = [sums](int i) { return __ldcg(sums + i); };
    const struct chunk c = chunk_sums(n, get, &s->block);
    find_chunk(c, n, get, random_below(d, c.total), &s->block);
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
    find_chunk(c, l->n_picks, get, random_below(d, c.total), &s->block);
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
    const struct slot_options *p = d.params;
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
    const uint64_t r = random_below(d, total);
    const int32_t token = (int32_t)find_cut(d, k, 3, true, r + 1, by_id, weight, s).rank;
    const struct row_state state = m.state[d.index];
    if (threadIdx.x == 0)
        emit(m, d, token, state.top, state.log_sum);
}

/* Rows that draw_scan left. Few rows are spread over several blocks each. */
static __global__ __launch_bounds__(REST_THREADS, REST_BLOCKS) void draw_rest(
    const __grid_constant__ struct draw_memory m, const struct logit_rows logits,
    const struct step_sizes *sizes)
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
        const struct row row = {logits.data + index * logits.stride, m.n_vocab, logits.cap,
                                s.changes.any ? &s.changes : nullptr};
        const struct drawn_row d = {row, p, job, {m.state[index].best, p->scale}, index};
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

#endif
