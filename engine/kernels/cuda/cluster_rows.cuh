/* cluster_rows.cuh - a block's rows of its head in the mixing of few rows (cluster_mix.cu): gates,
 * latents, window, the head's output. All rows at a time: their chains of instructions overlap.
 */
#ifndef LATTE_CUDA_CLUSTER_ROWS_CUH
#define LATTE_CUDA_CLUSTER_ROWS_CUH

#include "engine/kernels/cuda/cluster_held.cuh"

/* A lane's latent (lane % HALF, of row lane / HALF), in every warp: logits of its gate, of the
 * window's and of what it takes. */
struct lane_logits {
    float gate, window, theta;
};

template <class S, int D>
static __device__ __forceinline__ struct lane_logits take_logits(const struct mix_call &c,
                                                                 unsigned char *shared)
{
    const int l = threadIdx.x % HALF, M = c.m.n_latents, of = lane_row<S>();
    const float *const logits = at_row<float, S>(shared, of, S::logits);
    const float4 *const z_squares = at_row<float4, S>(shared, of, S::z_squares);
    const float4 z_low = z_squares[0], z_high = z_squares[1];
    float w[CLUSTER_BLOCKS], gate[2] = {0, 0}, theta[2] = {0, 0};
#pragma unroll
    for (int b = 0; b < CLUSTER_BLOCKS; b++) {
        const float *const from = logits + b * LOGITS;
        w[b] = from[0];
        if (l < M) /* halves of the blocks */
            gate[b / 4] += from[1 + l], theta[b / 4] += from[1 + M + l];
    }
    const float square = ((z_low.x + z_high.x) + (z_low.z + z_high.z)) +
                         ((z_low.y + z_high.y) + (z_low.w + z_high.w));
    const float scale = norm_scale(square, D, c.m.z_eps);
    const float window = ((w[0] + w[4]) + (w[2] + w[6])) + ((w[1] + w[5]) + (w[3] + w[7]));
    return {l < M ? (gate[0] + gate[1]) * scale : -INFINITY, window * scale,
            (theta[0] + theta[1]) * scale};
}

/* Eight values of a key, of the row's own as it has come or of one of the ring's. */
static __device__ __forceinline__ void key_of(float k[8], bool is_newest, const bf16 *newest,
                                              uint4 old)
{
    eight(k, is_newest ? *reinterpret_cast<const uint4 *>(newest) : old);
}
static __device__ __forceinline__ void key_of(float k[8], bool is_newest, const bf16 *newest,
                                              const bf16 *old)
{
    eight(k, *reinterpret_cast<const uint4 *>(is_newest ? newest : old));
}
static __device__ __forceinline__ void key_of(float k[8], bool is_newest, const bf16 *newest,
                                              uint2 old)
{
    if (is_newest)
        eight(k, *reinterpret_cast<const uint4 *>(newest));
    else
        eight(k, old);
}
static __device__ __forceinline__ void key_of(float k[8], bool is_newest, const bf16 *newest,
                                              const fp8 *old)
{
    key_of(k, is_newest, newest, *reinterpret_cast<const uint2 *>(old));
}

/* Scores of the thread's key, -INFINITY where there is none. */
template <class S, int HEAD>
static __device__ __forceinline__ void score(float (&x)[S::BLOCK_ROWS], const struct mix_call &c,
                                             const struct mix_row (&rows)[S::BLOCK_ROWS],
                                             const struct held_rows<S> &h, unsigned char *shared)
{
    const int key = threadIdx.x / 2;
    const typename S::ring *const second = at<typename S::ring>(shared, S::keys) + key * HEAD;
    float4 sum[S::BLOCK_ROWS] = {};
#pragma unroll
    for (int j = 0; j < S::CHUNKS; j++) {
        const int i = key_chunk(j);
#pragma unroll
        for (int r = 0; r < S::BLOCK_ROWS; r++) {
            const float *const query = at_row<float, S>(shared, r, S::query) + i;
            const bf16 *const newest = at_row<bf16, S>(shared, r, S::new_key) + i;
            const bool is_newest = key == rows[r].newest;
            const float4 low = *reinterpret_cast<const float4 *>(query);
            const float4 high = *reinterpret_cast<const float4 *>(query + 4);
            float k[8];
            if (r == 0)
                key_of(k, is_newest, newest, h.key[j]);
            else
                key_of(k, is_newest, newest, second + i);
            sum[r].x = fmaf(high.x, k[4], fmaf(low.x, k[0], sum[r].x));
            sum[r].y = fmaf(high.y, k[5], fmaf(low.y, k[1], sum[r].y));
            sum[r].z = fmaf(high.z, k[6], fmaf(low.z, k[2], sum[r].z));
            sum[r].w = fmaf(high.w, k[7], fmaf(low.w, k[3], sum[r].w));
        }
    }
#pragma unroll
    for (int r = 0; r < S::BLOCK_ROWS; r++) {
        x[r] = (sum[r].x + sum[r].y) + (sum[r].z + sum[r].w);
        x[r] += __shfl_xor_sync(0xffffffffu, x[r], 1);
        if (c.m.softcap > 0)
            x[r] = c.m.softcap * tanhf(x[r] / c.m.softcap);
        x[r] = key < rows[r].n_keys ? x[r] : -INFINITY;
    }
}

/* What a lane's latent does: s = s keep + take v, and its share of s / alpha. */
struct lane_gates {
    float keep, take, share;
};

/* Two softmaxes at a time. x becomes weights: of a warp's keys, below their maximum; maxima and
 * totals to shared memory. Over the latents and the window, every warp for itself: gates, and the
 * latents' maxima and sums of the row's theta. */
template <class S>
static __device__ __forceinline__ struct lane_gates
weigh(float (&x)[S::BLOCK_ROWS], const struct lane_logits &logits, bool begins,
      struct held_rows<S> *h, unsigned char *shared)
{
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    float top[S::BLOCK_ROWS], total[S::BLOCK_ROWS], gate_top = logits.gate;
#pragma unroll
    for (int r = 0; r < S::BLOCK_ROWS; r++)
        top[r] = x[r];
#pragma unroll
    for (int o = HALF; o > 1; o >>= 1) { /* two lanes have a key, half a warp has the latents */
#pragma unroll
        for (int r = 0; r < S::BLOCK_ROWS; r++)
            top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], o));
        gate_top = fmaxf(gate_top, __shfl_xor_sync(0xffffffffu, gate_top, o / 2));
    }
    gate_top = fmaxf(gate_top, logits.window);
    const float window = exp_below(logits.window, gate_top);
    const float gate = exp_below(logits.gate, gate_top); /* 0 where there is no latent */
    float gate_total = gate;
#pragma unroll
    for (int r = 0; r < S::BLOCK_ROWS; r++)
        total[r] = x[r] = x[r] == -INFINITY ? 0 : exp_below(x[r], top[r]);
#pragma unroll
    for (int o = HALF; o > 1; o >>= 1) {
#pragma unroll
        for (int r = 0; r < S::BLOCK_ROWS; r++)
            total[r] += __shfl_xor_sync(0xffffffffu, total[r], o);
        gate_total += __shfl_xor_sync(0xffffffffu, gate_total, o / 2);
    }
#pragma unroll
    for (int r = 0; r < S::BLOCK_ROWS; r++) {
        float *const stats = at<float>(shared, S::stats) + r * 2 * CLUSTER_WARPS + warp;
        if (lane == 0)
            stats[0] = top[r], stats[CLUSTER_WARPS] = total[r];
    }
    const float inverse = quick_reciprocal(gate_total + window);
    if (warp == 0 && lane % HALF == 0)
        at<float>(shared, S::shares)[lane / HALF] = window * inverse;
    const float now = begins ? logits.theta : fmaxf(h->m, logits.theta);
    const float kept = begins ? 0 : exp_below(h->m, now), take = exp_below(logits.theta, now);
    h->alpha = begins ? take : fmaf(h->alpha, kept, take);
    h->m = now;
    return {kept, take, gate * inverse * quick_reciprocal(h->alpha)};
}

/* 8 of the row's new values, as the ring has them. */
template <class S>
static __device__ __forceinline__ typename S::eight new_values(int r, int eighth,
                                                               unsigned char *shared)
{
    const float4 *const v = at_row<float4, S>(shared, r, S::value) + 2 * eighth;
    const float4 low = v[0], high = v[1];
    typename S::eight packed;
    pack_eight(&packed, {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w});
    return packed;
}

/* The same of its key. */
static __device__ __forceinline__ void new_key_as(uint4 *to, const uint4 &key)
{
    *to = key;
}
static __device__ __forceinline__ void new_key_as(uint2 *to, const uint4 &key)
{
    float x[8];
    eight(x, key);
    pack_eight(to, x);
}

/* The new values in place of those that leave the rings; each by the warp that reads them. */
template <class S, int HEAD>
static __device__ __forceinline__ void renew_values(const struct mix_row (&rows)[S::BLOCK_ROWS],
                                                    unsigned char *shared)
{
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
    for (int r = 0; r < S::BLOCK_ROWS; r++)
        if (rows[r].newest / HALF == warp && lane < S::EIGHTS)
            at<typename S::eight>(shared, S::values + r * S::values_step +
                                              rows[r].newest * HEAD * S::RING_VALUE)[lane] =
                new_values<S>(r, lane, shared);
    __syncwarp();
}

/* local [ROWS, GROUPS, HEAD]: the values of a warp's keys, weighted; a lane has 8 dimensions of
 * every VALUE_GROUPS-th. weight: the lane's key's. */
template <class S, int HEAD>
static __device__ __forceinline__ void take_values(const float (&weight)[S::BLOCK_ROWS],
                                                   unsigned char *shared)
{
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const bool mine = lane < S::VALUE_GROUPS * S::EIGHTS;
    const int group = mine ? lane / S::EIGHTS : 0, first = lane % S::EIGHTS * 8;
    const typename S::ring *const values =
        at<typename S::ring>(shared, S::values) + (warp * HALF + group) * HEAD + first;
    float sum[S::BLOCK_ROWS][8] = {};
#pragma unroll
    for (int j = 0; j < S::VALUES; j++) {
        const int key = group + j * S::VALUE_GROUPS; /* of the warp's */
#pragma unroll
        for (int r = 0; r < S::BLOCK_ROWS; r++) {
            const float share = __shfl_sync(0xffffffffu, weight[r], 2 * key);
            float v[8];
            eight(v,
                  *reinterpret_cast<const typename S::eight *>(
                      values + r * (S::values_step / S::RING_VALUE) + j * S::VALUE_GROUPS * HEAD));
#pragma unroll
            for (int i = 0; i < 8; i++)
                sum[r][i] = fmaf(share, v[i], sum[r][i]);
        }
    }
    if (!mine)
        return;
    float4 *const to =
        at<float4>(shared, S::local + ((warp * S::VALUE_GROUPS + group) * HEAD + first) * 4);
#pragma unroll
    for (int r = 0; r < S::BLOCK_ROWS; r++) {
        to[r * S::GROUPS * HEAD / 4] = make_float4(sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
        to[r * S::GROUPS * HEAD / 4 + 1] = make_float4(sum[r][4], sum[r][5], sum[r][6], sum[r][7]);
    }
}

/* s = s keep + take v, P(eq 19), in registers; other [ROWS, LATENT_GROUPS, HEAD]: shares of
 * s / alpha. */
template <class S, int HEAD>
static __device__ __forceinline__ void
step_latents(const struct mix_call &c, const struct lane_gates &gates,
             const bool (&begins)[S::BLOCK_ROWS], struct held_rows<S> *h, unsigned char *shared)
{
    const int group = threadIdx.x / S::QUADS, first = threadIdx.x % S::QUADS * 4;
#pragma unroll
    for (int r = 0; r < S::BLOCK_ROWS; r++) {
        const float4 v = *at_row<float4, S>(shared, r, S::value + first * 4);
        float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int j = 0; j < S::LATENTS; j++) {
            const int l = group + j * S::LATENT_GROUPS, of = r * HALF + l % HALF;
            const float k = __shfl_sync(0xffffffffu, gates.keep, of);
            const float t = __shfl_sync(0xffffffffu, gates.take, of);
            const float p = __shfl_sync(0xffffffffu, gates.share, of);
            if (group >= S::LATENT_GROUPS || l >= c.m.n_latents)
                continue;
            float4 old = h->s[r][j];
            if (S::BLOCK_ROWS > 1)
                old = begins[r] ? make_float4(0, 0, 0, 0)
                                : *at<float4>(shared,
                                              S::past + r * S::past_bytes + (l * HEAD + first) * 4);
            const float4 now = make_float4(fmaf(old.x, k, t * v.x), fmaf(old.y, k, t * v.y),
                                           fmaf(old.z, k, t * v.z), fmaf(old.w, k, t * v.w));
            h->s[r][j] = now;
            sum = make_float4(fmaf(p, now.x, sum.x), fmaf(p, now.y, sum.y), fmaf(p, now.z, sum.z),
                              fmaf(p, now.w, sum.w));
        }
        if (group < S::LATENT_GROUPS)
            *at<float4>(shared, S::other + ((r * S::LATENT_GROUPS + group) * HEAD + first) * 4) =
                sum;
    }
}

/* The head's output of the rows, packed for few_output or, alone, to every block: 4 lanes have 2
 * dimensions, a quarter of the sums each; of what is sent 8 lanes have 4, a block each. */
template <class S, int HEAD>
static __device__ __forceinline__ void put_mixed(const struct mix_call &c,
                                                 const struct mix_row (&rows)[S::BLOCK_ROWS],
                                                 unsigned char *shared)
{
    constexpr int EACH = S::GROUPS / 4; /* sums of weighted values, of every other warp */
    static_assert(S::VALUE_GROUPS == 2 && EACH == CLUSTER_WARPS / 2, "two sums a warp");
    const int pair = threadIdx.x / 4, part = threadIdx.x % 4;
    const bool mine = pair < HEAD / 2;
    float2 y[S::BLOCK_ROWS];
    float total[S::BLOCK_ROWS], share[S::BLOCK_ROWS];
#pragma unroll
    for (int r = 0; r < S::BLOCK_ROWS; r++) {
        const float *const stats = at<float>(shared, S::stats) + r * 2 * CLUSTER_WARPS;
        const float2 *const local =
            at<float2>(shared, S::local + ((r * S::GROUPS + part) * HEAD + 2 * pair) * 4);
        float tops[CLUSTER_WARPS], top = -INFINITY;
#pragma unroll
        for (int w = 0; w < CLUSTER_WARPS; w++) {
            tops[w] = stats[w];
            top = fmaxf(top, tops[w]);
        }
        total[r] = 0;
        y[r] = make_float2(0, 0);
#pragma unroll
        for (int i = 0; i < EACH; i++) { /* sum 4 i + part, of warp 2 i + part / 2 */
            const float factor = exp_below(part < 2 ? tops[2 * i] : tops[2 * i + 1], top);
            total[r] = fmaf(factor, stats[CLUSTER_WARPS + 2 * i + part / 2], total[r]);
            const float2 x = mine ? local[4 * i * HEAD / 2] : make_float2(0, 0);
            y[r].x = fmaf(factor, x.x, y[r].x), y[r].y = fmaf(factor, x.y, y[r].y);
        }
        share[r] = at<float>(shared, S::shares)[r];
    }
#pragma unroll
    for (int r = 0; r < S::BLOCK_ROWS; r++)
        total[r] += __shfl_xor_sync(0xffffffffu, total[r], 2);
#pragma unroll
    for (int r = 0; r < S::BLOCK_ROWS; r++) {
        const float2 *const other =
            at<float2>(shared, S::other + ((r * S::LATENT_GROUPS + part) * HEAD + 2 * pair) * 4);
        share[r] *= quick_reciprocal(total[r]);
        y[r].x *= share[r], y[r].y *= share[r];
#pragma unroll
        for (int i = 0; i < (S::LATENT_GROUPS + 3) / 4; i++)
            if (mine && 4 * i + part < S::LATENT_GROUPS) {
                const float2 x = other[4 * i * HEAD / 2];
                y[r].x += x.x, y[r].y += x.y;
            }
    }
#pragma unroll
    for (int o = 1; o < 4; o *= 2) {
#pragma unroll
        for (int r = 0; r < S::BLOCK_ROWS; r++) {
            y[r].x += __shfl_xor_sync(0xffffffffu, y[r].x, o);
            y[r].y += __shfl_xor_sync(0xffffffffu, y[r].y, o);
        }
    }
    constexpr int LAST = S::BLOCK_ROWS - 1;
    if (S::IS_ALONE) {
        static_assert(!S::IS_ALONE || S::BLOCK_ROWS == 1, "a row");
        const __nv_bfloat162 two = __floats2bfloat162_rn(y[0].x, y[0].y);
        uint32_t own, other;
        memcpy(&own, &two, 4);
        other = __shfl_xor_sync(0xffffffffu, own, 4);
        if (mine)
            cluster_send(at<uint2>(shared, S::mixed + (rows[0].row * S::OUT + pair / 2 * 4) * 2),
                         pair % 2 ? make_uint2(other, own) : make_uint2(own, other),
                         threadIdx.x % CLUSTER_BLOCKS, at<bulk_barrier>(shared, S::mixed_came));
    } else if (mine && part == 0)
        packed_store_rows(c.m.mixed.values, S::DIM, rows[0].row, rows[0].head * HEAD + 2 * pair,
                          y[0], y[LAST], LAST && rows[LAST].here);
}

/* The rows' new state. */
template <class S, int HEAD>
static __device__ __forceinline__ void
keep_rows(const struct mix_call &c, const struct mix_row (&rows)[S::BLOCK_ROWS],
          const struct held_rows<S> &h, unsigned char *shared)
{
    const int l = threadIdx.x % HALF, group = threadIdx.x / S::QUADS, M = c.m.n_latents;
    const struct mix_row own = lane_row<S>() == 0 ? rows[0] : rows[S::BLOCK_ROWS - 1];
    if (own.here && l < M && (int)threadIdx.x < S::BLOCK_ROWS * HALF) {
        c.m.m.data[own.slot * c.m.m.row_values + (int64_t)own.head * M + l] = h.m;
        c.m.alpha.data[own.slot * c.m.alpha.row_values + (int64_t)own.head * M + l] = h.alpha;
    }
#pragma unroll
    for (int r = 0; r < S::BLOCK_ROWS; r++) {
        if (!rows[r].here)
            continue;
        float *const s = sums_of<S, HEAD>(c, rows[r]);
#pragma unroll
        for (int j = 0; j < S::LATENTS; j++)
            if (group < S::LATENT_GROUPS && group + j * S::LATENT_GROUPS < M)
                __stcg(reinterpret_cast<float4 *>(s + j * S::LATENT_GROUPS * HEAD), h.s[r][j]);
        const int i = threadIdx.x % WARP, warp = threadIdx.x / WARP;
        const int64_t at = ring_of<HEAD>(c, rows[r]) + rows[r].newest * HEAD + i * 8;
        typename S::ring *const key = (typename S::ring *)c.m.ring_k + at;
        typename S::ring *const value = (typename S::ring *)c.m.ring_v + at;
        if (warp == 0 && i < S::EIGHTS)
            new_key_as(reinterpret_cast<typename S::eight *>(key),
                       at_row<uint4, S>(shared, r, S::new_key)[i]);
        if (warp == 1 && i < S::EIGHTS)
            *reinterpret_cast<typename S::eight *>(value) = new_values<S>(r, i, shared);
    }
}

/* Their state and the head's output of them. */
template <class S, int D, int HEAD>
static __device__ __forceinline__ void mix_rows(const struct mix_call &c,
                                                struct mix_row (&rows)[S::BLOCK_ROWS],
                                                struct held_rows<S> *h, unsigned char *shared)
{
    float x[S::BLOCK_ROWS];
    bool begins[S::BLOCK_ROWS];
#pragma unroll
    for (int r = 0; r < S::BLOCK_ROWS; r++)
        begins[r] = !rows[r].here || rows[r].begins;
    const struct lane_logits logits = take_logits<S, D>(c, shared);
    if (S::BLOCK_ROWS > 1)
        bulk_wait(at<bulk_barrier>(shared, S::past_fetched));
    score<S, HEAD>(x, c, rows, *h, shared);
    bulk_wait(at<bulk_barrier>(shared, S::values_fetched));
    renew_values<S, HEAD>(rows, shared);
    const struct lane_gates gates =
        weigh<S>(x, logits, lane_row<S>() == 0 ? begins[0] : begins[S::BLOCK_ROWS - 1], h, shared);
    take_values<S, HEAD>(x, shared);
    step_latents<S, HEAD>(c, gates, begins, h, shared);
    keep_rows<S, HEAD>(c, rows, *h, shared); /* its stores on their way meanwhile */
    __syncthreads();
    put_mixed<S, HEAD>(c, rows, shared);
}

#endif
