/* cluster_products.cuh - what the blocks of the mixing of few rows (cluster_mix.cu) do for each
 * other: rows from the residual stream; products, the RG-LRU and the latents' logits over a block's
 * part, sent to the blocks that mix the rows.
 */
#ifndef LATTE_CUDA_CLUSTER_PRODUCTS_CUH
#define LATTE_CUDA_CLUSTER_PRODUCTS_CUH

#include "engine/kernels/cuda/cluster_held.cuh"

/* ---- the rows ---- */

/* What a thread has of them: 4 values each of two pieces. Of many rows each block of the cluster
 * reads its columns and sends them to the others; of up to MIX_ALONE rows it is quicker to read all
 * of them. */
struct held_pieces {
    float4 weight[2]; /* of the norm */
    int row, piece;   /* of the first */
    bool alone, mine; /* alone: the second is the same of the next row, else the row's next */
};

template <class S>
static __device__ __forceinline__ void hold_pieces(struct held_pieces *h, const struct mix_call &c,
                                                   int n_rows, int rank)
{
    constexpr int QUADS_HERE = S::PIECE / 4, PIECES = ROW_PIECES / CLUSTER_BLOCKS;
    static_assert(PIECES == 2 && MIX_ALONE == 2 && QUADS_HERE % 2 == 0, "two quads a thread");
    const int group = threadIdx.x / 16, quad = threadIdx.x % 16;
    h->alone = n_rows <= MIX_ALONE;
    h->mine = quad < QUADS_HERE;
    h->row = h->alone ? 0 : group;
    h->piece = h->alone ? group : rank * PIECES;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int column = (h->piece + (h->alone ? 0 : i)) * S::PIECE + quad * 4;
        h->weight[i] = make_float4(0, 0, 0, 0);
        if (h->mine)
            h->weight[i] = __ldg(reinterpret_cast<const float4 *>(c.m.norm.weight + column));
    }
}

/* A row's two pieces to every block, 16 bytes at a time: an even lane has its neighbour's of the
 * first piece as well, an odd one its neighbour's of the second. */
template <class S>
static __device__ __forceinline__ void send_pieces(const uint2 (&y)[2], const struct held_pieces &h,
                                                   int n_rows, bf16 *rows, bulk_barrier *came)
{
    const int quad = threadIdx.x % 16, odd = quad % 2;
    const uint2 give = odd ? y[0] : y[1], keep = odd ? y[1] : y[0];
    const uint2 take = make_uint2(__shfl_xor_sync(0xffffffffu, give.x, 1),
                                  __shfl_xor_sync(0xffffffffu, give.y, 1));
    const uint4 both = odd ? make_uint4(take.x, take.y, keep.x, keep.y)
                           : make_uint4(keep.x, keep.y, take.x, take.y);
    uint4 *const to = reinterpret_cast<uint4 *>(rows + odd * S::PIECE + quad / 2 * 8);
#pragma unroll
    for (int peer = 0; peer < CLUSTER_BLOCKS; peer++)
        if (h.mine && h.row < n_rows)
            cluster_send(to, both, peer, came);
}

/* After pdl_wait: x times the norm's weight as bf16 [STEP_ROWS, ROW], with squares [ROW_PIECES, 16
 * rows]; complete when it returns. All threads of the cluster call it. */
template <class S>
static __device__ __forceinline__ void gather_rows(const struct mix_call &c,
                                                   const struct held_pieces &h, int n_rows,
                                                   unsigned char *shared)
{
    const int quad = threadIdx.x % 16, from = h.row * S::DIM + h.piece * S::PIECE + quad * 4;
    float *const squares = at<float>(shared, S::squares) + h.piece * CLUSTER_ROWS + h.row;
    bf16 *const rows = at<bf16>(shared, S::rows) + h.row * S::ROW + h.piece * S::PIECE;
    float4 x[2];
    uint2 y[2];
    float square[2];
    bulk_barrier *const came = at<bulk_barrier>(shared, S::rows_came);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        x[i] = make_float4(0, 0, 0, 0);
        if (h.mine && h.row + (h.alone ? i : 0) < n_rows)
            x[i] = few_load(c.m.x + from + i * (h.alone ? S::DIM : S::PIECE));
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
        y[i] = few_weighed(x[i], h.weight[i]);
    if (h.alone) {
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (h.mine)
                *reinterpret_cast<uint2 *>(rows + i * S::ROW + quad * 4) = y[i];
    } else {
        send_pieces<S>(y, h, n_rows, rows, came);
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
        square[i] = few_square(x[i]);
    copy_async_wait<0>(); /* this thread's weights */
    if (h.alone) {
        if (quad == 0)
            squares[0] = square[0], squares[1] = square[1];
        __syncthreads();
        return;
    }
    const int second = quad / CLUSTER_BLOCKS;
    if (h.row < n_rows)
        cluster_send(squares + second * CLUSTER_ROWS, second ? square[1] : square[0],
                     quad % CLUSTER_BLOCKS, came);
    cluster_receive(came);
}

/* ---- products of the block, and the RG-LRU ---- */

/* One warp: z of the 8 channels of N tiles, CLUSTER_WARPS apart, which takes the past's place;
 * squares of z, a row each, over a tile's. */
template <class S, int WIDTH, int N>
static __device__ __forceinline__ void step_channels(struct held_channels<S> *held, int rank,
                                                     float scale, unsigned char *shared)
{
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    const bf16 *const rows = at<bf16>(shared, S::rows);
    const uint4 *const gates = at<uint4>(shared, S::gates) + warp * S::GATE_QUADS * WARP + lane;
    const bf16 *const from =
        few_rows_at<S::STEP_ROWS>(rows + rank * S::COLUMNS / WIDTH * WIDTH, S::ROW);
    float r[N][4] = {}, i[N][4] = {};
#pragma unroll
    for (int k = 0; k < S::GATE_STEPS; k += 2) { /* a quad has two steps of a gate */
        uint32_t low[4], high[4];
        ldmatrix_x4(low, from + 16 * k);
        ldmatrix_x4(high, from + 16 * k + 16);
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
#pragma unroll
    for (int j = 0; j < S::BLOCK_ROWS; j++) {
        const int row = g + 8 * j;
        const float factor = __shfl_sync(0xffffffffu, scale, row);
        float square[N];
#pragma unroll
        for (int n = 0; n < N; n++) {
            struct held_channels<S> *const one = held + n;
            const int own = 8 * (warp + n * CLUSTER_WARPS) + 2 * t;
            const float2 h = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162 *>(
                rows + row * S::ROW + rank * S::COLUMNS + own));
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

/* q, k, v of the block's rows of the head, q and k turned, to the blocks of the step's rows, by the
 * warps that have none of the latents' logits: a thread has two pairs of q, k or v of a block's
 * rows. */
template <class S, int HEAD>
static __device__ __forceinline__ void send_qkv(const struct mix_call &c, int rank, int n_rows,
                                                unsigned char *shared)
{
    constexpr int ITEMS = 3 * S::PAIRS / 2, FIRST = LOGIT_TILES * WARP;
    static_assert(FIRST + CLUSTER_BLOCKS * ITEMS <= CLUSTER_THREADS, "an item a thread");
    const int to = ((int)threadIdx.x - FIRST) / ITEMS, item = ((int)threadIdx.x - FIRST) % ITEMS;
    const int which = item / (S::PAIRS / 2), pair = item % (S::PAIRS / 2) * 2;
    if ((int)threadIdx.x < FIRST || to >= n_rows || to >= CLUSTER_BLOCKS)
        return;
    const float *const sums =
        at<float>(shared, S::sums) + to * S::sums_row + which * S::PART + pair;
    float2 low[S::BLOCK_ROWS] = {}, high[S::BLOCK_ROWS] = {};
#pragma unroll
    for (int w = 0; w < CLUSTER_WARPS; w++) {
#pragma unroll
        for (int r = 0; r < S::BLOCK_ROWS; r++) {
            const float *const from = sums + w * S::sums_warp + r * CLUSTER_BLOCKS * S::sums_row;
            const float2 x0 = *reinterpret_cast<const float2 *>(from);
            const float2 x1 = *reinterpret_cast<const float2 *>(from + S::PAIRS);
            low[r].x += x0.x, low[r].y += x0.y;
            high[r].x += x1.x, high[r].y += x1.y;
        }
    }
#pragma unroll
    for (int r = 0; r < S::BLOCK_ROWS; r++) {
        const int row = to + r * CLUSTER_BLOCKS;
        const float scale = at<float>(shared, S::scales)[row];
        low[r].x *= scale, low[r].y *= scale;
        high[r].x *= scale, high[r].y *= scale;
        if (which < 2) {
            const float4 a = *at<float4>(shared, S::angles + (row * S::PAIRS + pair) * 8);
            const float factor = which == 0 ? c.m.scale : 1;
            const float2 x0 = low[r], x1 = high[r];
            low[r].x = fmaf(x0.x, a.y, -x1.x * a.x) * factor;
            low[r].y = fmaf(x0.y, a.w, -x1.y * a.z) * factor;
            high[r].x = fmaf(x0.x, a.x, x1.x * a.y) * factor;
            high[r].y = fmaf(x0.y, a.z, x1.y * a.w) * factor;
        }
    }
    bulk_barrier *const came = at<bulk_barrier>(shared, S::row_came);
    const int at = rank * S::PAIRS + pair;
#pragma unroll
    for (int r = 0; r < S::BLOCK_ROWS; r++) {
        if (to + r * CLUSTER_BLOCKS >= n_rows)
            continue;
        if (which != 1) {
            float2 *const exact =
                at_row<float2, S>(shared, r, (which ? S::value : S::query) + at * 4);
            cluster_send(exact, low[r], to, came);
            cluster_send(exact + HEAD / 4, high[r], to, came);
        }
        if (which != 0) {
            __nv_bfloat162 *const kept = at_row<__nv_bfloat162, S>(
                shared, r, (which == 1 ? S::new_key : S::new_value) + at * 2);
            cluster_send(kept, __floats2bfloat162_rn(low[r].x, low[r].y), to, came);
            cluster_send(kept + HEAD / 4, __floats2bfloat162_rn(high[r].x, high[r].y), to, came);
        }
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
    few_product<1, S::COLUMNS, S::STEP_ROWS>(sum, at<bf16>(shared, S::z), S::SLICE,
                                             at<bf16>(shared, S::latents) + 8 * warp * S::SLICE,
                                             S::SLICE, n - 8 * warp - 1);
#pragma unroll
    for (int j = 0; j < S::BLOCK_ROWS; j++) {
        const int row = g + 8 * j;
        float2 *const to = at_row<float2, S>(shared, row / CLUSTER_BLOCKS,
                                             S::logits + (rank * LOGITS + 8 * warp + 2 * t) * 4);
        if (row < n_rows)
            cluster_send(to, make_float2(sum[0][2 * j], sum[0][2 * j + 1]), row % CLUSTER_BLOCKS,
                         came);
    }
}

#endif
