/* cluster_products.cuh - what the blocks of the mixing of few rows (cluster_mix.cu) do for each
 * other: products, the RG-LRU and the latents' logits over a block's part, sent to the blocks that
 * mix the rows.
 */
#ifndef LATTE_CUDA_CLUSTER_PRODUCTS_CUH
#define LATTE_CUDA_CLUSTER_PRODUCTS_CUH

#include "engine/kernels/cuda/cluster_held.cuh"

/* After pdl_wait, all threads: the rows' columns that the block's gates are of, to shared memory in
 * the background. */
template <class S, int WIDTH>
static __device__ __forceinline__ void copy_gate_rows(const struct mix_call &c, int rank,
                                                      unsigned char *shared)
{
    const int lane = threadIdx.x % WARP, step = threadIdx.x / WARP;
    const int first = rank * S::COLUMNS / WIDTH * WIDTH;
    if (step < S::GATE_STEPS)
        copy_async_16(at<uint4>(shared, S::rows) + threadIdx.x,
                      c.m.in.values + first * PACKED_ROWS + step * PACKED_STEP +
                          lane * PACKED_LANE);
    copy_async_commit();
}

/* One warp: z of the 8 channels of N tiles, CLUSTER_WARPS apart, which takes the past's place;
 * squares of z, a row each, over a tile's. */
template <class S, int WIDTH, int N>
static __device__ __forceinline__ void step_channels(struct held_channels<S> *held, int rank,
                                                     unsigned char *shared)
{
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    const int first = rank * S::COLUMNS % WIDTH / 8 + warp; /* tile of the gates' columns */
    const uint4 *const rows = at<uint4>(shared, S::rows) + lane;
    const uint4 *const gates = at<uint4>(shared, S::gates) + warp * S::GATE_QUADS * WARP + lane;
    float r[N][4] = {}, i[N][4] = {};
#pragma unroll
    for (int k = 0; k < S::GATE_STEPS; k += 2) { /* a quad has two steps of a gate */
        const uint4 even = rows[k * WARP], odd = rows[(k + 1) * WARP];
        const uint32_t low[4] = {even.x, even.y, even.z, even.w};
        const uint32_t high[4] = {odd.x, odd.y, odd.z, odd.w};
#pragma unroll
        for (int n = 0; n < N; n++) {
            const uint4 *const at = gates + n * CLUSTER_WARPS * S::GATE_QUADS * WARP;
            const uint4 recurrence = at[k / 2 * WARP];
            const uint4 input = at[(S::GATE_STEPS + k) / 2 * WARP];
            const uint32_t recurrence_at[2][2] = {{recurrence.x, recurrence.y},
                                                  {recurrence.z, recurrence.w}};
            const uint32_t input_at[2][2] = {{input.x, input.y}, {input.z, input.w}};
            mma_bf16(r[n], low, recurrence_at[0]);
            mma_bf16(i[n], low, input_at[0]);
            mma_bf16(r[n], high, recurrence_at[1]);
            mma_bf16(i[n], high, input_at[1]);
        }
    }
    uint2 x[N]; /* rows g and g + 8 */
#pragma unroll
    for (int n = 0; n < N; n++) {
        const int tile = first + n * CLUSTER_WARPS;
        x[n] = reinterpret_cast<const uint2 *>(rows + tile / 2 * WARP)[tile % 2];
    }
#pragma unroll
    for (int j = 0; j < S::BLOCK_ROWS; j++) {
        const int row = g + 8 * j;
        const float factor = at<float>(shared, S::scales)[row];
        float square[N];
#pragma unroll
        for (int n = 0; n < N; n++) {
            struct held_channels<S> *const one = held + n;
            const int own = 8 * (warp + n * CLUSTER_WARPS) + 2 * t;
            const float2 h =
                __bfloat1622float2(reinterpret_cast<const __nv_bfloat162 &>(j ? x[n].y : x[n].x));
            const float2 low = rglru_terms(r[n][2 * j] * factor, i[n][2 * j] * factor, h.x * factor,
                                           one->constants[0], one->begins[j]);
            const float2 high = rglru_terms(r[n][2 * j + 1] * factor, i[n][2 * j + 1] * factor,
                                            h.y * factor, one->constants[1], one->begins[j]);
            const float2 z = make_float2(fmaf(low.x, one->past[j].x, low.y),
                                         fmaf(high.x, one->past[j].y, high.y));
            one->past[j] = z;
            square[n] = fmaf(z.x, z.x, z.y * z.y);
            *reinterpret_cast<__nv_bfloat162 *>(at<bf16>(shared, S::z) + row * S::SLICE + own) =
                __floats2bfloat162_rn(z.x * one->weight.x, z.y * one->weight.y);
        }
#pragma unroll
        for (int o = 1; o < 4; o *= 2) {
#pragma unroll
            for (int n = 0; n < N; n++)
                square[n] += __shfl_xor_sync(0xffffffffu, square[n], o);
        }
#pragma unroll
        for (int n = 0; n < N; n++)
            if (t == 0)
                at<float>(shared, S::z_parts)[(warp + n * CLUSTER_WARPS) * CLUSTER_ROWS + row] =
                    square[n];
    }
}

template <class S>
static __device__ __forceinline__ void
put_z(const struct mix_call &c, const struct held_channels<S> &held, int tile, int n_rows)
{
    const int lane = threadIdx.x % WARP, channel = 8 * tile + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < S::BLOCK_ROWS; j++) {
        const int row = lane / 4 + 8 * j;
        if (row < n_rows)
            *reinterpret_cast<float2 *>(c.m.z + (int64_t)row * S::DIM + channel) = held.past[j];
    }
}

/* To a block of the cluster in one store: the first N values, aligned by as much as they take. */
template <int N, class T>
static __device__ __forceinline__ void send_values(T *to, const T *values, int rank,
                                                   bulk_barrier *came)
{
    struct alignas(N * sizeof(T)) pack {
        T value[N];
    } one;
#pragma unroll
    for (int i = 0; i < N; i++)
        one.value[i] = values[i];
    cluster_send(reinterpret_cast<struct pack *>(to), one, rank, came);
}

template <class T>
static __device__ __forceinline__ void send_pairs(T *to, const T *values, bool four, int rank,
                                                  bulk_barrier *came)
{
    if (four)
        send_values<4>(to, values, rank, came);
    else
        send_values<2>(to, values, rank, came);
}

/* q, k, v of the block's rows of the head, q and k turned, to the blocks of the step's rows, by the
 * warps that have none of the latents' logits. What is sent costs its receiver time by the number
 * of stores: so of a block's six pairs of q, k or v those four that are aligned are a thread's,
 * and the other two are another's. */
template <class S, int HEAD>
static __device__ __forceinline__ void send_qkv(const struct mix_call &c, int rank, int n_rows,
                                                unsigned char *shared)
{
    constexpr int FIRST = LOGIT_TILES * WARP, ITEMS = 6;
    static_assert(S::PAIRS == 6 && FIRST + ITEMS * S::STEP_ROWS <= CLUSTER_THREADS,
                  "an item a thread");
    const int i = (int)threadIdx.x - FIRST, row = i % S::STEP_ROWS, which = i / S::STEP_ROWS / 2;
    const bool four = i / S::STEP_ROWS % 2;
    const int pair = rank % 2 ? four * 2 : 4 - four * 4;
    if (i < 0 || which >= 3 || row >= n_rows)
        return;
    const float *const sums =
        at<float>(shared, S::sums) + row * S::sums_row + which * S::PART + pair;
    float low[4] = {}, high[4] = {};
#pragma unroll
    for (int w = 0; w < CLUSTER_WARPS; w++) {
#pragma unroll
        for (int k = 0; k < 4; k += 2) {
            if (k && !four)
                continue;
            const float *const from = sums + w * S::sums_warp + k;
            const float2 x0 = *reinterpret_cast<const float2 *>(from);
            const float2 x1 = *reinterpret_cast<const float2 *>(from + S::PAIRS);
            low[k] += x0.x, low[k + 1] += x0.y;
            high[k] += x1.x, high[k + 1] += x1.y;
        }
    }
    const float scale = at<float>(shared, S::scales)[row];
    const float2 *const angles = at<float2>(shared, S::angles) + row * S::PAIRS + pair;
    const float factor = which == 0 ? c.m.scale : 1;
#pragma unroll
    for (int k = 0; k < 4; k++) {
        low[k] *= scale, high[k] *= scale;
        if (which == 2 || (k > 1 && !four))
            continue;
        const float2 a = angles[k];
        const float x0 = low[k], x1 = high[k];
        low[k] = fmaf(x0, a.y, -x1 * a.x) * factor;
        high[k] = fmaf(x0, a.x, x1 * a.y) * factor;
    }
    bulk_barrier *const came = at<bulk_barrier>(shared, S::row_came);
    const int of = row / CLUSTER_BLOCKS, to = row % CLUSTER_BLOCKS, first = rank * S::PAIRS + pair;
    if (which == 1) {
        bf16 *const key = at_row<bf16, S>(shared, of, S::new_key) + first;
        bf16 low_key[4], high_key[4];
#pragma unroll
        for (int k = 0; k < 4; k++)
            low_key[k] = as_in_ring<typename S::ring>(low[k]),
            high_key[k] = as_in_ring<typename S::ring>(high[k]);
        send_pairs(key, low_key, four, to, came);
        send_pairs(key + HEAD / 2, high_key, four, to, came);
    } else {
        float *const exact = at_row<float, S>(shared, of, which ? S::value : S::query) + first;
        send_pairs(exact, low, four, to, came);
        send_pairs(exact + HEAD / 2, high, four, to, came);
    }
}

/* The latents' logits over the block's channels, a tile of 8 a warp; squares of z. */
template <class S>
static __device__ __forceinline__ void send_logits(const struct mix_call &c, int rank, int n_rows,
                                                   unsigned char *shared)
{
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    const int n = 2 * c.m.n_latents + 1;
    bulk_barrier *const came = at<bulk_barrier>(shared, S::row_came);
    if (warp == LOGIT_TILES - 1 && lane < n_rows) {
        float square = 0;
#pragma unroll
        for (int i = 0; i < S::TILES; i++)
            square += at<float>(shared, S::z_parts)[i * CLUSTER_ROWS + lane];
        float *const to = at_row<float, S>(shared, lane / CLUSTER_BLOCKS, S::z_squares) + rank;
        cluster_send(to, square, lane % CLUSTER_BLOCKS, came);
    }
    if (warp >= logit_tiles(c))
        return;
    float sum[1][4] = {};
    few_product<1, S::COLUMNS>(sum, few_shared_rows<S::STEP_ROWS>(at<bf16>(shared, S::z), S::SLICE),
                               at<bf16>(shared, S::latents) + 8 * warp * S::SLICE, S::SLICE,
                               n - 8 * warp - 1);
    /* Four columns a lane, of row g where t is even, of row g + 8 where it is odd. */
    const int odd = t % 2, row = g + 8 * odd;
    const float give[2] = {odd ? sum[0][0] : sum[0][2], odd ? sum[0][1] : sum[0][3]};
    const float keep[2] = {odd ? sum[0][2] : sum[0][0], odd ? sum[0][3] : sum[0][1]};
    float take[2];
#pragma unroll
    for (int i = 0; i < 2; i++)
        take[i] = __shfl_xor_sync(0xffffffffu, give[i], 1);
    const float four[4] = {odd ? take[0] : keep[0], odd ? take[1] : keep[1],
                           odd ? keep[0] : take[0], odd ? keep[1] : take[1]};
    if (row < n_rows)
        send_values<4>(at_row<float, S>(shared, row / CLUSTER_BLOCKS, S::logits) + rank * LOGITS +
                           8 * warp + t / 2 * 4,
                       four, row % CLUSTER_BLOCKS, came);
}

#endif
