/* warpgroup_gates.cuh - the RG-LRU of 16 rows and the latents' logits that its z gives, by a
 * cluster of eight blocks, as a piece of warpgroup.cu's front kernel: beside blocks that compute v,
 * q and k of the same rows.
 *
 * Each block has one block of the gates, 96 channels: r and i, the recurrence, the state; then what
 * its z adds to all of the logits, since z's columns are a share of their depth. A tile of 8
 * logits belongs to one block of the cluster, to which the others send what they have of it; and
 * each sends its part of z's squares to all, so that the norm of z is a factor of the sums. The
 * sums run over the blocks in order, so a row's result is the same in any step.
 *
 * Between pdl_wait and the results stand: rows and squares from L2, two chains of 6 products, one
 * exchange. Bytes of a block: 37 KB of gates, to registers, and 51 KB of the logits' weights,
 * before the wait; 3 KB of rows and 6 KB of state; 20 KB sent.
 */
#ifndef LATTE_CUDA_WARPGROUP_GATES_CUH
#define LATTE_CUDA_WARPGROUP_GATES_CUH

#include "engine/kernels/cuda/rglru.cuh"
#include "engine/kernels/cuda/warpgroup.cuh"

enum {
    GATES_BLOCKS = 8, /* of the gates: of a cluster */
    GATES_ROWS = 16,
    GATES_WIDTH = WARPGROUP_DEPTH / GATES_BLOCKS,
    GATES_STEPS = GATES_WIDTH / PACKED_COLUMNS,
    GATES_TILES = GATES_WIDTH / 8, /* of channels */
    GATES_WARPS = 4,
    GATES_OWN = GATES_TILES / GATES_WARPS,                                   /* tiles of a warp */
    GATES_LOGITS = (WARPGROUP_LOGITS / 8 + GATES_BLOCKS - 1) / GATES_BLOCKS, /* tiles of a block */
    GATES_STRIDE = GATES_WIDTH + 8, /* of the logits' weights: 8 rows are in different banks */
    GATES_LANES = GATES_WARPS * WARP / GATES_ROWS, /* that add up a row's squares */
};

struct gates_places {                 /* byte offsets in shared memory */
    static constexpr int weights = 0; /* of the logits */
    static constexpr int sums = weights + WARPGROUP_LOGITS * GATES_STRIDE * 2; /* received: */
    static constexpr int squares = sums + GATES_BLOCKS * GATES_LOGITS * WARP * 16;
    static constexpr int z = squares + GATES_BLOCKS * GATES_ROWS * 4; /* as packed.cuh */
    static constexpr int parts = z + GATES_STEPS * PACKED_WARP * 2;   /* of squares: [warps, 16] */
    static constexpr int scales = parts + GATES_WARPS * GATES_ROWS * 4;
    static constexpr int came = scales + GATES_ROWS * 4;
    static constexpr int bytes = came + (int)sizeof(bulk_barrier);
    static_assert(GATES_TILES % GATES_WARPS == 0 && GATES_STEPS % 2 == 0, "shares of warps");
};

template <class T> static __device__ __forceinline__ T *gates_at(unsigned char *shared, int offset)
{
    return reinterpret_cast<T *>(shared + offset);
}

/* The block's columns of the logits' weights; and how much is to come from the cluster. */
static __device__ __forceinline__ void fetch_logits(const struct warpgroup_front &f, int rank,
                                                    unsigned char *shared)
{
    typedef gates_places at;
    const int tiles = f.n_logits / 8, own = (tiles - rank + GATES_BLOCKS - 1) / GATES_BLOCKS;
    if (threadIdx.x < WARP)
        bulk_begin(gates_at<bulk_barrier>(shared, at::came),
                   GATES_BLOCKS * (own * WARP * 16 + GATES_ROWS * 4));
    constexpr int PIECES = GATES_WIDTH / 8;
    bf16 *const to = gates_at<bf16>(shared, at::weights);
#pragma unroll 4
    for (int i = threadIdx.x; i < f.n_logits * PIECES; i += GATES_WARPS * WARP) {
        const int row = i / PIECES, column = i % PIECES * 8;
        copy_async_16(to + row * GATES_STRIDE + column,
                      f.logit_weights + row * WARPGROUP_DEPTH + rank * GATES_WIDTH + column);
    }
    copy_async_commit();
}

/* Gates and constants of the warp's tiles, as cluster_prepare left them: in registers before
 * pdl_wait. 16 bytes of a gate are two steps'. */
struct gates_held {
    uint4 recurrence[GATES_OWN][GATES_STEPS / 2], input[GATES_OWN][GATES_STEPS / 2];
    float4 constants[GATES_OWN][2]; /* rate, biases; the weight of the norm of z */
};

static __device__ __forceinline__ void hold_gates(struct gates_held *h,
                                                  const struct warpgroup_front &f, int rank)
{
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const float4 *const constants = (const float4 *)f.prepared;
    const uint4 *const gates = (const uint4 *)(constants + WARPGROUP_DEPTH);
#pragma unroll
    for (int n = 0; n < GATES_OWN; n++) {
        const int tile = rank * GATES_TILES + warp + n * GATES_WARPS;
        const uint4 *const at = gates + tile * GATES_STEPS * WARP + lane;
#pragma unroll
        for (int k = 0; k < GATES_STEPS / 2; k++) {
            h->recurrence[n][k] = load_streaming(at + k * WARP);
            h->input[n][k] = load_streaming(at + (GATES_STEPS / 2 + k) * WARP);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint4 raw = load_streaming(constants + tile * 8 + lane % 4 * 2 + i);
            h->constants[n][i] = reinterpret_cast<const float4 &>(raw);
        }
    }
}

/* A lane's rows, g and g + 8, and the channels that are its own of each of the warp's tiles. */
struct gates_lane {
    bool here[2], begins[2];
    float *state[2]; /* of the first tile's channels */
    float2 past[GATES_OWN][2];
};

static __device__ __forceinline__ void find_past(struct gates_lane *l,
                                                 const struct warpgroup_front &f,
                                                 const struct device_step &step, int row0,
                                                 int channel)
{
    const int n_rows = step.sizes->n_rows;
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const int row = row0 + (int)threadIdx.x % WARP / 4 + 8 * j;
        const int any = row < step.rows ? row : step.rows - 1;
        l->begins[j] = step.positions[any] == 0;
        l->here[j] = row < n_rows;
        l->state[j] = f.state.data + step.seq_slot[any] * f.state.row_values + channel;
    }
#pragma unroll
    for (int j = 0; j < 2; j++) {
#pragma unroll
        for (int n = 0; n < GATES_OWN; n++) {
            l->past[n][j] = make_float2(0, 0);
            if (l->here[j] && !l->begins[j]) /* a fresh slot may hold anything */
                l->past[n][j] =
                    *reinterpret_cast<const float2 *>(l->state[j] + n * GATES_WARPS * 8);
        }
    }
}

/* d += a step of 16 rows times 8 columns. */
static __device__ __forceinline__ void step_product(float (&d)[4], const uint4 &rows, uint32_t low,
                                                    uint32_t high)
{
    const uint32_t a[4] = {rows.x, rows.y, rows.z, rows.w}, b[2] = {low, high};
    mma_bf16(d, a, b);
}

/* Both gates of the warp's tiles. */
static __device__ __forceinline__ void multiply_gates(float (&r)[GATES_OWN][4],
                                                      float (&i)[GATES_OWN][4],
                                                      const uint4 (&rows)[GATES_STEPS],
                                                      const struct gates_held &gates)
{
#pragma unroll
    for (int k = 0; k < GATES_STEPS; k += 2) {
#pragma unroll
        for (int n = 0; n < GATES_OWN; n++) {
            const uint4 &recurrence = gates.recurrence[n][k / 2], &input = gates.input[n][k / 2];
            step_product(r[n], rows[k], recurrence.x, recurrence.y);
            step_product(i[n], rows[k], input.x, input.y);
            step_product(r[n], rows[k + 1], recurrence.z, recurrence.w);
            step_product(i[n], rows[k + 1], input.z, input.w);
        }
    }
}

/* z of the warp's tiles: to the state; times the norm's weight to shared memory, with squares. h:
 * the tiles' channels of x, rows g and g + 8. */
static __device__ __forceinline__ void
step_gates(const struct gates_lane &l, const struct gates_held &gates,
           const float (&r)[GATES_OWN][4], const float (&i)[GATES_OWN][4],
           const uint2 (&h)[GATES_OWN], unsigned char *shared)
{
    typedef gates_places at;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4;
    const float *const scales = gates_at<float>(shared, at::scales);
    float square[2] = {};
#pragma unroll
    for (int n = 0; n < GATES_OWN; n++) {
        const int tile = warp + n * GATES_WARPS;
        const float4 c0 = gates.constants[n][0], c1 = gates.constants[n][1];
        const struct rglru_channel channel[2] = {{c0.x, c0.y, c0.z}, {c1.x, c1.y, c1.z}};
        uint2 y;
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const uint32_t bits = j ? h[n].y : h[n].x;
            const float4 t = rglru_pair(r[n] + 2 * j, i[n] + 2 * j, (const bf16 *)&bits, channel,
                                        l.begins[j], scales[g + 8 * j]);
            const float2 z =
                make_float2(fmaf(t.x, l.past[n][j].x, t.y), fmaf(t.z, l.past[n][j].y, t.w));
            if (l.here[j])
                *reinterpret_cast<float2 *>(l.state[j] + n * GATES_WARPS * 8) = z;
            square[j] = fmaf(z.x, z.x, fmaf(z.y, z.y, square[j]));
            const __nv_bfloat162 pair = __floats2bfloat162_rn(z.x * c0.w, z.y * c1.w);
            (j ? y.y : y.x) = reinterpret_cast<const uint32_t &>(pair);
        }
        bf16 *const to = gates_at<bf16>(shared, at::z) + tile / 2 * PACKED_WARP +
                         lane * PACKED_LANE + tile % 2 * 4;
        *reinterpret_cast<uint2 *>(to) = y;
    }
#pragma unroll
    for (int j = 0; j < 2; j++) {
        square[j] += __shfl_xor_sync(0xffffffffu, square[j], 1);
        square[j] += __shfl_xor_sync(0xffffffffu, square[j], 2);
        if (lane % 4 == 0)
            gates_at<float>(shared, at::parts)[warp * GATES_ROWS + g + 8 * j] = square[j];
    }
}

/* What the block's z adds to the logits, to the blocks that they belong to; z's squares to all. */
static __device__ __forceinline__ void send_logits(const struct warpgroup_front &f, int rank,
                                                   unsigned char *shared)
{
    typedef gates_places at;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    bulk_barrier *const came = gates_at<bulk_barrier>(shared, at::came);
    const uint4 *const z = gates_at<uint4>(shared, at::z) + lane;
    uint4 rows[GATES_STEPS];
#pragma unroll
    for (int k = 0; k < GATES_STEPS; k++)
        rows[k] = z[k * WARP];
    static_assert(GATES_WARPS * WARP == GATES_BLOCKS * GATES_ROWS, "a row of a block a thread");
    const int row = threadIdx.x % GATES_ROWS;
    float square = 0;
#pragma unroll
    for (int w = 0; w < GATES_WARPS; w++)
        square += gates_at<float>(shared, at::parts)[w * GATES_ROWS + row];
    cluster_send(gates_at<float>(shared, at::squares) + rank * GATES_ROWS + row, square,
                 (int)threadIdx.x / GATES_ROWS, came);

    const bf16 *const weights =
        gates_at<bf16>(shared, at::weights) + lane % 8 * GATES_STRIDE + lane / 8 * 8;
    float4 *const sums = gates_at<float4>(shared, at::sums) + rank * GATES_LOGITS * WARP + lane;
#pragma unroll 3
    for (int tile = warp; tile < f.n_logits / 8; tile += GATES_WARPS) {
        float even[4] = {}, odd[4] = {};
#pragma unroll
        for (int k = 0; k < GATES_STEPS; k += 2) {
            uint32_t b[4];
            ldmatrix_x4(b, weights + tile * 8 * GATES_STRIDE + k * PACKED_COLUMNS);
            step_product(even, rows[k], b[0], b[1]);
            step_product(odd, rows[k + 1], b[2], b[3]);
        }
        cluster_send(
            sums + tile / GATES_BLOCKS * WARP,
            make_float4(even[0] + odd[0], even[1] + odd[1], even[2] + odd[2], even[3] + odd[3]),
            tile % GATES_BLOCKS, came);
    }
}

/* The logits that belong to the block, once all of the cluster have sent. */
static __device__ __forceinline__ void put_logits(const struct warpgroup_front &f,
                                                  const struct gates_lane &l, int row0, int rank,
                                                  unsigned char *shared)
{
    typedef gates_places at;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4;
    const float *const squares = gates_at<float>(shared, at::squares) + g;
    cluster_receive(gates_at<bulk_barrier>(shared, at::came));
    float scale[2];
#pragma unroll
    for (int j = 0; j < 2; j++) {
        float square = 0;
#pragma unroll
        for (int b = 0; b < GATES_BLOCKS; b++)
            square += squares[b * GATES_ROWS + 8 * j];
        scale[j] = norm_scale(square, WARPGROUP_DEPTH, f.z_eps);
    }
    for (int own = warp; own * GATES_BLOCKS + rank < f.n_logits / 8; own += GATES_WARPS) {
        const float4 *const from = gates_at<float4>(shared, at::sums) + own * WARP + lane;
        float4 sum = from[0];
#pragma unroll
        for (int b = 1; b < GATES_BLOCKS; b++) {
            const float4 more = from[b * GATES_LOGITS * WARP];
            sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
        }
        float *const to = f.logits + (int64_t)(row0 + g) * f.logit_stride +
                          (own * GATES_BLOCKS + rank) * 8 + lane % 4 * 2;
        if (l.here[0])
            *reinterpret_cast<float2 *>(to) = make_float2(sum.x * scale[0], sum.y * scale[0]);
        if (l.here[1])
            *reinterpret_cast<float2 *>(to + 8 * f.logit_stride) =
                make_float2(sum.z * scale[1], sum.w * scale[1]);
    }
}

/* All threads of a cluster's blocks; row0: the first of the cluster's rows. */
static __device__ __forceinline__ void gates_block(const struct warpgroup_front &f,
                                                   const struct device_step &step, int row0,
                                                   unsigned char *shared)
{
    typedef gates_places at;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, rank = cluster_rank();
    const int first = rank * GATES_WIDTH, channel = first + warp * 8;
    if (!step.late)
        pdl_trigger();
    fetch_logits(f, rank, shared);
    cluster_arrive_relaxed();
    struct gates_held gates;
    hold_gates(&gates, f, rank);
    if (step.late) { /* as in product_block */
        pdl_wait();
        pdl_trigger();
    }
    struct gates_lane l;
    find_past(&l, f, step, row0, channel + lane % 4 * 2);
    const struct packed_rows &x = f.vqk.in;
    const bf16 *const from = x.values + packed_at(row0, first, x.n) + lane * PACKED_LANE;
    const bf16 *const own = x.values + lane * PACKED_LANE;
    cluster_wait();

    pdl_wait();
    struct packed_squares<GATES_LANES> squares;
    const int scaled = row0 + (int)threadIdx.x / GATES_LANES; /* the row it helps to norm */
    hold_squares(&squares, x, scaled, scaled < step.rows);
    uint4 rows[GATES_STEPS];
#pragma unroll
    for (int k = 0; k < GATES_STEPS; k++)
        rows[k] = load_once(from + k * PACKED_STEP);
    uint2 h[GATES_OWN];
#pragma unroll
    for (int n = 0; n < GATES_OWN; n++)
        h[n] = __ldcg(reinterpret_cast<const uint2 *>(
            own + packed_at(row0, channel + n * GATES_WARPS * 8, x.n)));
    copy_async_wait<0>();
    const float scale = scale_of_squares(squares, x);
    if (threadIdx.x % GATES_LANES == 0)
        gates_at<float>(shared, at::scales)[threadIdx.x / GATES_LANES] = scale;
    __syncthreads();
    float r[GATES_OWN][4] = {}, i[GATES_OWN][4] = {};
    multiply_gates(r, i, rows, gates);
    step_gates(l, gates, r, i, h, shared);
    __syncthreads();
    send_logits(f, rank, shared);
    put_logits(f, l, row0, rank, shared);
}

#endif
