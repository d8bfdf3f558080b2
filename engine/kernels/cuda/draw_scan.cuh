/* draw_scan.cuh - the kernel that reads every row: largest values of parts and groups, scores,
 * and the tokens of rows that are greedy or cut to a few by top_k. See draw.cu.
 *
 * Bytes: V * 4 a row, as much again for its counts. A block has 16 KB in flight, SCAN_BLOCKS are
 * on a multiprocessor; the last of a row reads another 20 KB for top_k 40.
 */
#ifndef LATTE_CUDA_DRAW_SCAN_CUH
#define LATTE_CUDA_DRAW_SCAN_CUH

#include "engine/kernels/cuda/draw_memory.cuh"

enum {
    SCAN_VALUES = PART / SCAN_THREADS,
    SCAN_WARPS = SCAN_THREADS / WARP,
    LANE_VALUES = GROUP / WARP,              /* 4: adjacent values of a group, one access */
    LANE_GROUPS = SCAN_VALUES / LANE_VALUES, /* adjacent groups that a warp has values of */
    OPTION_WORDS = sizeof(struct slot_options) / sizeof(uint32_t),
    JOB_WORDS = sizeof(struct draw_job) / sizeof(uint32_t),
};

struct scan_shared {
    struct block_scratch block;
    struct changes changes;
    union { /* of the row */
        struct slot_options options;
        uint32_t option_words[OPTION_WORDS];
    };
    union {
        struct draw_job job;
        uint32_t job_words[JOB_WORDS];
    };
    uint64_t raw[SCAN_WARPS], best[SCAN_WARPS]; /* best keys of the warps, as part_raw, part_best */
    union {
        struct pick_lists lists;
        float4 values[PART / LANE_VALUES];
    };
    uint64_t rank[SHORT], weight[SHORT];
    double log_sum;
};

/* A thread's value i is that of token first + token_at(i). */
static __device__ __forceinline__ constexpr int32_t token_at(int i)
{
    return i / LANE_VALUES * GROUP + i % LANE_VALUES;
}

/* As they lie there; -inf beyond the row's end. All loads are in flight together. */
static __device__ __forceinline__ void load_part(float (&x)[SCAN_VALUES], struct row row,
                                                 int32_t first, bool aligned)
{
#pragma unroll
    for (int i = 0; i < SCAN_VALUES; i++)
        x[i] = -INFINITY;
    if (aligned) {
#pragma unroll
        for (int i = 0; i < SCAN_VALUES; i += LANE_VALUES)
            if (first + token_at(i) < row.n) {
                const float4 four = __ldcg((const float4 *)(row.logits + first + token_at(i)));
                x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
            }
    } else { /* four accesses of a warp read the same bytes: from the first cache */
#pragma unroll
        for (int i = 0; i < SCAN_VALUES; i++)
            if (first + token_at(i) < row.n)
                x[i] = row.logits[first + token_at(i)];
    }
}

static __device__ __forceinline__ void tidy_part(float (&x)[SCAN_VALUES], struct row row,
                                                 int32_t first)
{
    if (row.cap != 0) { /* a branch around them all */
#pragma unroll
        for (int i = 0; i < SCAN_VALUES; i++)
            x[i] = softcapped(x[i], row.cap);
    }
#pragma unroll
    for (int i = 0; i < SCAN_VALUES; i++)
        x[i] = tidy(x[i]);
    if (first + token_at(SCAN_VALUES - 1) >= row.n)
#pragma unroll
        for (int i = 0; i < SCAN_VALUES; i++)
            x[i] = first + token_at(i) < row.n ? x[i] : -INFINITY;
}

/* Heights of the largest values of the warp's groups, in all lanes. */
static __device__ __forceinline__ void group_heights(uint32_t (&most)[LANE_GROUPS],
                                                     const float (&x)[SCAN_VALUES])
{
#pragma unroll
    for (int g = 0; g < LANE_GROUPS; g++) {
        const float *four = x + LANE_VALUES * g;
        const float largest = fmaxf(fmaxf(four[0], four[1]), fmaxf(four[2], four[3]));
        most[g] = __reduce_max_sync(0xffffffffu, height(largest));
    }
}

/* The best key of a warp's values, whose groups' heights are known: only a group as high as the
 * highest is searched for the token. */
static __device__ __forceinline__ uint64_t best_of_warp(const float (&x)[SCAN_VALUES],
                                                        const uint32_t (&heights)[LANE_GROUPS],
                                                        int32_t first)
{
    uint32_t most = 0, low = 0;
#pragma unroll
    for (int g = 0; g < LANE_GROUPS; g++)
        most = max(most, heights[g]);
    const float top = value_at(most);
#pragma unroll
    for (int g = LANE_GROUPS - 1; g >= 0; g--)
        if (heights[g] == most)
#pragma unroll
            for (int i = LANE_VALUES * (g + 1) - 1; i >= LANE_VALUES * g; i--)
                low = x[i] == top ? (uint32_t)key_of(most, first + token_at(i)) : low;
    return (uint64_t)most << 32 | __reduce_max_sync(0xffffffffu, low);
}

static __device__ __forceinline__ uint64_t best_of_warps(const uint64_t *keys)
{
    uint64_t best = 0;
#pragma unroll
    for (int w = 0; w < SCAN_WARPS; w++)
        best = keys[w] > best ? keys[w] : best;
    return best;
}

/* The best of a thread's values. */
static __device__ __forceinline__ uint64_t best_of(const float (&x)[SCAN_VALUES], int32_t first)
{
    uint32_t most = 0;
    int32_t id = first;
#pragma unroll
    for (int i = 0; i < SCAN_VALUES; i++) {
        const uint32_t h = height(x[i]);
        id = h > most ? first + token_at(i) : id;
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
        const uint64_t key = key_of(x[i], first + token_at(i));
        best = key < limit && key > best ? key : best;
    }
    return best;
}

/* The adjusted values in place of the untouched ones, by way of shared memory: adjusting all of
 * them at once would take more registers than there are. */
static __device__ __forceinline__ void change_part(float (&x)[SCAN_VALUES], struct row row,
                                                   int32_t first, struct scan_shared *s)
{
    float4 *mine = s->values + threadIdx.x;
#pragma unroll
    for (int i = 0; i < SCAN_VALUES; i += LANE_VALUES)
        mine[i / LANE_VALUES * SCAN_THREADS] = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
#pragma unroll 1
    for (int g = 0; g < LANE_GROUPS; g++) {
        const float4 four = mine[g * SCAN_THREADS];
        float some[LANE_VALUES] = {four.x, four.y, four.z, four.w};
        change_values<LANE_VALUES, 1>(some, row, first + g * GROUP);
        mine[g * SCAN_THREADS] = make_float4(some[0], some[1], some[2], some[3]);
    }
#pragma unroll
    for (int i = 0; i < SCAN_VALUES; i += LANE_VALUES) {
        const float4 four = mine[i / LANE_VALUES * SCAN_THREADS];
        x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
    }
}

/* The part's sum of exp(x - its largest), and its best few: what logprobs are made of. Reads
 * the untouched values again: they need not stay in registers while others are adjusted. */
static __device__ __attribute__((noinline)) void score_part(const struct draw_memory &m,
                                                            struct row row, bool aligned,
                                                            int32_t first, size_t at,
                                                            struct scan_shared *s)
{
    float x[SCAN_VALUES];
    load_part(x, row, first, aligned);
    tidy_part(x, row, first);
    const uint64_t best = best_of_warps(s->raw);
    const int n_top = s->job.n_top;
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

/* The best key of a row from those of its parts: by every warp, without a barrier. */
static __device__ uint64_t row_best(const uint64_t *parts, int n)
{
    uint64_t best = 0;
    for (int i = threadIdx.x % WARP; i < n; i += WARP) {
        const uint64_t key = __ldcg(parts + i);
        best = key > best ? key : best;
    }
    return warp_best(best);
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
    const struct slot_options *p = d.params;
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
    const uint64_t r = __umul64hi(random_bits(p->hash, d.job->position), c.total);
    if (w) {
        const uint64_t before = before_in(s, s->rank[t], n);
        if (before <= r && r < before + w)
            emit(m, d, id_of(key), raw_top, log_sum);
    }
}

/* What k of the threads have at least, in its highest BOUND_BITS bits: sign, exponent and 9 of the
 * mantissa of a height. Rounds of the block's barrier that counts: a short chain, and little code,
 * which is cold when a step comes to it. */
static __device__ __forceinline__ uint32_t bound_of(uint32_t mine, int k)
{
    enum { BOUND_BITS = 18 };
    uint32_t bound = 0;
#pragma unroll 1
    for (uint32_t bit = 1u << 31; bit >= 1u << (32 - BOUND_BITS); bit >>= 1)
        if (__syncthreads_count(mine >= (bound | bit)) >= k)
            bound |= bit;
    return bound;
}

/* Keys, no two of which are equal, largest first; up to one a thread by their ranks. */
static __device__ __forceinline__ void order_keys(uint64_t *keys, int n)
{
    if (n > SCAN_THREADS) {
        sort_keys(keys, n);
        return;
    }
    const bool mine = (int)threadIdx.x < n;
    const uint64_t key = mine ? keys[threadIdx.x] : 0;
    int rank = 0;
    for (int i = 0; i < n; i++)
        rank += keys[i] > key;
    __syncthreads();
    if (mine)
        keys[rank] = key;
    __syncthreads();
}

/* The top_k best, when few values come into question: those of groups that are as high as what k
 * threads have among their groups. False: too many do. */
static __device__ bool draw_top_k(const struct draw_memory &m, const struct drawn_row &d,
                                  float raw_top, double log_sum, struct scan_shared *s)
{
    const int n_groups = n_groups_of(m), k = d.params->top_k;
    if (n_groups > MAX_PICKS)
        return false;
    const uint32_t *best = m.group_best + (size_t)d.index * n_groups;
    struct pick_lists *l = &s->lists;
    uint32_t held[MAX_PICKS / SCAN_THREADS], most = 0;
#pragma unroll
    for (int i = 0; i < MAX_PICKS / SCAN_THREADS; i++) {
        const int group = threadIdx.x + i * SCAN_THREADS;
        held[i] = group < n_groups ? __ldcg(best + group) : 0;
        most = max(most, held[i]);
    }
    if (threadIdx.x == 0)
        l->n_picks = l->n_keys = 0;
    /* What is out for good need not be among the k. */
    const uint32_t least = max(bound_of(most, k), height(-FLT_MAX));
#pragma unroll
    for (int i = 0; i < MAX_PICKS / SCAN_THREADS; i++)
        if (held[i] >= least)
            l->picks[atomicAdd(&l->n_picks, 1)] = (uint16_t)(threadIdx.x + i * SCAN_THREADS);
    __syncthreads();
    see_picks(
        l, d.row,
        [l, least](int, float x, int32_t id) {
            if (height(x) >= least)
                add_key(l, x, id);
        },
        [](int) {});
    if (l->n_keys > LIST)
        return false;
    order_keys(l->keys, l->n_keys);
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

/* All parts of a row are known. A call of its own, so that what few blocks do takes no registers
 * from reading. */
static __device__ __attribute__((noinline)) void
finish_row(const struct draw_memory &m, struct row row, int index, struct scan_shared *s)
{
    const size_t parts = (size_t)index * m.n_parts;
    const struct draw_job *job = &s->job;
    const struct slot_options *p = job->slot < 0 ? nullptr : &s->options;
    const bool scores = job->target >= 0 || p->n_logprobs >= 0;
    const uint64_t raw = row_best(m.part_raw + parts, m.n_parts);
    const float raw_top = value_of(raw);
    const double log_sum = scores ? row_log_sum(m, index, raw_top, s) : 0;
    if (job->n_top)
        list_tops(m, index, job, raw_top, log_sum, s);
    if (job->target >= 0 && threadIdx.x == 0)
        m.header->results[job->score] = {
            job->target,
            log_prob(logit_of(row, __ldcg(row.logits + job->target)), raw_top, log_sum)};
    if (!p)
        return;
    const uint64_t best = row.changes ? row_best(m.part_best + parts, m.n_parts) : raw;
    const float top = value_of(best);
    const struct drawn_row d = {row, p, job, {top, p->scale}, index};
    if (is_out(top) || p->temperature == 0) {
        if (threadIdx.x == 0)
            emit(m, d, id_of(is_out(top) ? raw : best), raw_top, log_sum);
        return;
    }
    const bool cut = p->top_k > 0 && p->top_k < m.n_vocab;
    if (cut && p->top_k <= SHORT && draw_top_k(m, d, raw_top, log_sum, s))
        return;
    leave_row(m, index, cut || p->typical_p < 1, {log_sum, raw_top, top});
}

/* A part's values are on their way: what is known of them alone goes to memory. */
static __device__ __forceinline__ void scan_part(const struct draw_memory &m, struct row *row,
                                                 float (&x)[SCAN_VALUES], int32_t first, size_t at,
                                                 struct scan_shared *s)
{
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, slot = s->job.slot;
    uint32_t heights[LANE_GROUPS];
    tidy_part(x, *row, first);
    group_heights(heights, x);
    const uint64_t raw = best_of_warp(x, heights, first);
    if (lane == 0)
        s->raw[warp] = raw;
    if (slot < 0)
        return;
    if (has_changes(&s->options, s->job.n_output)) {
        load_changes(&s->changes, &m.params[slot], m.counts + (size_t)slot * (size_t)m.n_vocab,
                     s->job.n_output);
        row->changes = &s->changes;
        change_part(x, *row, first, s);
        group_heights(heights, x);
        const uint64_t best = best_of_warp(x, heights, first);
        if (lane == 0)
            s->best[warp] = best;
    }
    uint32_t *group_best = m.group_best + at * PART_GROUPS + warp * LANE_GROUPS;
#pragma unroll
    for (int g = 0; g < LANE_GROUPS; g++)
        if (lane == g)
            group_best[g] = heights[g];
}

/* One block a part of a row, grid (parts, rows). The step's arrays and the slots' parameters are
 * there before the wait. */
static __global__ __launch_bounds__(SCAN_THREADS, SCAN_BLOCKS) void draw_scan(
    const __grid_constant__ struct draw_memory m, const struct logit_rows logits,
    const struct step_sizes *sizes)
{
    __shared__ struct scan_shared s;
    pdl_trigger();
    const int index = blockIdx.y, part = blockIdx.x, t = threadIdx.x;
    const bool idle = index >= sizes->n_logit_rows || (!sizes->n_draws && !sizes->n_scores);
    const struct draw_job *job = &m.jobs[index];
    const int slot = job->slot;
    const bool scored = job->target >= 0;
    if (idle || (slot < 0 && !scored)) {
        pdl_wait();
        return;
    }
    uint32_t option = 0, word = 0; /* they become shared when the values are on their way */
    if (t < OPTION_WORDS && slot >= 0)
        option = ((const uint32_t *)static_cast<const slot_options *>(&m.params[slot]))[t];
    if (t < JOB_WORDS)
        word = ((const uint32_t *)job)[t];
    pdl_wait();
    const int32_t first = part * PART + (t / WARP * LANE_GROUPS * WARP + t % WARP) * LANE_VALUES;
    struct row row = {logits.data + index * logits.stride, m.n_vocab, logits.cap, nullptr};
    float x[SCAN_VALUES];
    load_part(x, row, first, logits.aligned);
    if (t < OPTION_WORDS)
        s.option_words[t] = option;
    if (t < JOB_WORDS)
        s.job_words[t] = word;
    __syncthreads();

    const size_t at = (size_t)index * m.n_parts + part;
    scan_part(m, &row, x, first, at, &s);
    __syncthreads();
    if (scored || s.options.n_logprobs >= 0)
        score_part(m, row, logits.aligned, first, at, &s);
    if (t == 0) {
        m.part_raw[at] = best_of_warps(s.raw);
        if (row.changes)
            m.part_best[at] = best_of_warps(s.best);
    }
    if (last_of(&m.n_scanned[index], m.n_parts, &s.block))
        finish_row(m, row, index, &s);
}

#endif
