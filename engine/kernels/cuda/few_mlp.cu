/* few_mlp.cu - the mlp of a decode layer of few rows, see cluster.cuh: two products, as single
 * blocks but for the second of more than OUT_ALONE rows.
 *
 * few_mlp_in: a block has 1/64 of the features, their rows of gate and up in shared memory; its
 * warps are 4 quarters of D times gate and up. few_mlp_out: a block has 8 rows of down, each of its
 * warps two sixteenths of F. Of more than OUT_ALONE rows a cluster of 4 blocks has 32 rows of down,
 * each block a quarter of F, a quarter of the bytes of the rows; each adds up 8 columns, of which
 * the others send it their sums: over its weights, which are in registers before pdl_wait, since
 * there is no room beside them. Sums of the warps meet in shared memory and are added in order, the
 * same in both. Before pdl_wait all weights are on their way.
 * few_mlp_in also puts the RG-LRU's z into the state, as no block of the mixing may.
 * Bytes: 14 MB of weights at D = 768, F = 3072: floor 4.6 us; up to FEW_ALONE rows 27 KB a row and
 * block of partial rows, from L2; few_mlp_out's blocks 6 KB a row each, in clusters twice 1.5 KB.
 */
#include "engine/kernels/cuda/cluster.cuh"

enum {
    IN_BLOCKS = 64,
    SETTLE_BLOCKS = 4,                          /* at most: few SMs are without one of the others */
    SETTLE_ROWS = CLUSTER_ROWS / SETTLE_BLOCKS, /* of a block at most */
    OUT_AT_ONCE = 8, /* rows up to which few_mlp_out's weights may come beside few_mlp_in's: of
                      * more, the mixing has not read its second rows' state by then */
    OUT_ALONE = 10,  /* rows up to which few_mlp_out has no clusters */
    OUT_BLOCKS = 4,  /* of one of its clusters */
    OUT_SLICES = 16, /* of F, each with sums of its own */
    OUT_SUMS = CLUSTER_ROWS * 8, /* of a slice and 8 columns */
};

struct mlp_call {
    struct few_mlp m;
    struct device_step step;
};

template <int D, int F> struct in_shape {
    static constexpr int COLUMNS = D / 16;                               /* of a row, 16 threads' */
    static constexpr int FEATURES = F / IN_BLOCKS, TILES = FEATURES / 8; /* gate or up, of a warp */
    static constexpr int GROUPS = CLUSTER_WARPS / 2, K = D / GROUPS;     /* of warps; of a warp */
    static constexpr int ROW = D + 8, SUM = 2 * FEATURES;                /* strides, in values */
    static_assert(FEATURES % 8 == 0 && K % 32 == 0 && COLUMNS % 4 == 0 && COLUMNS <= 64 &&
                      GROUPS * SUM * 4 <= ROW * 2,
                  "tiles of products");

    static constexpr int weights = 0; /* offsets, in bytes */
    static constexpr int rows = weights + SUM * ROW * 2;
    static constexpr int sums = rows; /* in the place of the rows, when they have been used */
    static constexpr int squares = rows + CLUSTER_ROWS * ROW * 2;
    static constexpr int scales = squares + SQUARES * 4;
    static constexpr int fetched = scales + CLUSTER_ROWS * 4;
    static constexpr int bytes = fetched + sizeof(bulk_barrier);
    static_assert(bytes <= FEW_SHARED, "beside few_mlp_out");
};

template <int D, int F> struct out_shape {
    static constexpr int SLICE = F / OUT_SLICES, SLICES = OUT_SLICES / CLUSTER_WARPS; /* a warp's */
    static constexpr int ROW = F + 32; /* spreads 16 bytes of 8 rows */
    static_assert(D % 8 == 0 && SLICE % 32 == 0, "tiles of products");

    static constexpr int weights = 0;
    static constexpr int sums = weights; /* [OUT_SLICES, 16, 8], when those have been used */
    static constexpr int fetched = weights + 8 * ROW * 2;
    static constexpr int bytes = fetched + sizeof(bulk_barrier);
    static_assert(OUT_SLICES * OUT_SUMS * 4 <= fetched && bytes <= FEW_OUT_SHARED, "places");
};

/* Of a block of a cluster. */
template <int D, int F> struct out_cluster_shape {
    static constexpr int COLUMNS = 8 * OUT_BLOCKS, K = F / OUT_BLOCKS;
    static constexpr int SLICE = F / OUT_SLICES, SLICES = OUT_SLICES / OUT_BLOCKS;
    static constexpr int TILES = 4; /* of 8 columns, a warp's of its slice */
    static constexpr int PARTS = OUT_BLOCKS / TILES, WARPS = SLICES * PARTS;
    static_assert(D % COLUMNS == 0 && SLICE % 32 == 0 && K % 64 == 0, "tiles of products");
    static_assert(COLUMNS == WARP && WARPS * WARP >= OUT_SUMS, "a row or a sum a lane");

    /* Row r of the weights, in values: spreads 16 bytes of two rows that follow each other, which
     * is what are read at a time. */
    static __host__ __device__ constexpr int row(int r)
    {
        return r * K + (r + 1) / 2 * 32;
    }
    static constexpr int weights = 0;
    /* [OUT_SLICES, 16, 8]: those that the block after this one sends first, its own last; over the
     * weights, which are in registers by then. */
    static constexpr int sums = weights, came_bytes = (OUT_SLICES - SLICES) * OUT_SUMS * 4;
    static constexpr int fetched = weights + row(COLUMNS) * 2;
    static constexpr int came = fetched + sizeof(bulk_barrier);
    static constexpr int bytes = came + sizeof(bulk_barrier);
    static_assert(OUT_SLICES * OUT_SUMS * 4 <= fetched && bytes <= FEW_OUT_SHARED, "places");
};

/* ---- x and the heads' shares ---- */

/* Four of the norm's weights, before pdl_wait. A plain load: the compiler moves one of read-only
 * memory to where its result is used. */
static __device__ __forceinline__ float4 early_weight(const struct cluster_norm &norm, int column,
                                                      bool mine)
{
    return mine ? *reinterpret_cast<const float4 *>(norm.weight + column) : make_float4(0, 0, 0, 0);
}

/* Four columns of N rows, summed in order; all loads before the first sum. */
template <int D, int N>
static __device__ __forceinline__ void sum_heads(float4 *x, const struct few_mlp &m, int64_t at)
{
    float4 part[N][MIX_CLUSTERS];
#pragma unroll
    for (int i = 0; i < N; i++) {
        x[i] = few_load(m.x + at + i * D);
#pragma unroll
        for (int c = 0; c < MIX_CLUSTERS; c++)
            part[i][c] = few_load(m.partials + c * m.partial_stride + at + i * D);
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
#pragma unroll
        for (int c = 0; c < MIX_CLUSTERS; c++) {
            x[i].x += part[i][c].x, x[i].y += part[i][c].y;
            x[i].z += part[i][c].z, x[i].w += part[i][c].w;
        }
    }
}

/* A row by CLUSTER_THREADS threads: between, h and its squares. The bits of what few_mlp_in does by
 * itself. Rows are spread over all of the blocks: an SM loads 27 KB for each. Bounds say one block
 * an SM, or the compiler makes three waits of the 9 loads to save registers. */
template <int D>
static __global__ void __launch_bounds__(SETTLE_ROWS *CLUSTER_THREADS, 1)
    few_settle_kernel(const __grid_constant__ struct mlp_call c)
{
    constexpr int COLUMNS = D / 16;
    const int part = threadIdx.x / CLUSTER_THREADS, thread = threadIdx.x % CLUSTER_THREADS;
    const int group = thread / 16, quad = thread % 16, row = SETTLE_BLOCKS * part + blockIdx.x;
    const int column = group * COLUMNS + quad * 4;
    bool mine = quad < COLUMNS / 4;
    const int64_t at = (int64_t)row * D + column;
    pdl_trigger();
    const float4 weight = early_weight(c.m.norm, column, mine);
    float4 x = make_float4(0, 0, 0, 0);
    mine &= row < c.step.sizes->n_rows;
    pdl_wait();
    if (mine)
        sum_heads<D, 1>(&x, c.m, at);
    const float square = few_square(x);
    if (mine) {
        *reinterpret_cast<float4 *>(c.m.between + at) = x;
        *reinterpret_cast<uint2 *>(c.m.h + at) = few_weighed(x, weight);
        if (quad == 0)
            c.m.squares[group * CLUSTER_ROWS + row] = square;
    }
}

/* ---- gate and up ---- */

/* The rows times the norm's weight, and squares [16, 16 rows]: few of them from x and the heads'
 * shares, or as few_settle left them. weight: the thread's of the norm, if alone. */
template <class S, int D>
static __device__ __forceinline__ void take_rows(const struct mlp_call &c, int n_rows, bool alone,
                                                 float4 weight, unsigned char *shared)
{
    static_assert(FEW_ALONE == 2, "one row or both");
    bf16 *const rows = reinterpret_cast<bf16 *>(shared + S::rows);
    float *const squares = reinterpret_cast<float *>(shared + S::squares);
    if (!alone) {
        static_assert(CLUSTER_THREADS == 16 * CLUSTER_ROWS && D % 128 == 0 &&
                          SQUARES == (int)CLUSTER_THREADS,
                      "16 threads a row, a square a thread");
        const int row = threadIdx.x / 16, first = threadIdx.x % 16 * 8;
        if (row < n_rows) {
#pragma unroll
            for (int i = 0; i < D; i += 128)
                copy_async_16(rows + row * S::ROW + first + i, c.m.h + row * D + first + i);
        }
        copy_async_commit();
        squares[threadIdx.x] =
            (int)threadIdx.x % CLUSTER_ROWS < n_rows ? __ldcg(c.m.squares + threadIdx.x) : 0;
        copy_async_wait<0>();
        __syncthreads();
        return;
    }
    const int group = threadIdx.x / 16, quad = threadIdx.x % 16;
    const int column = group * S::COLUMNS + quad * 4;
    const bool mine = quad < S::COLUMNS / 4;
    float4 x[FEW_ALONE] = {};
    if (mine && n_rows > 1)
        sum_heads<D, FEW_ALONE>(x, c.m, column);
    else if (mine)
        sum_heads<D, 1>(x, c.m, column);
    float square[FEW_ALONE];
#pragma unroll
    for (int i = 0; i < FEW_ALONE; i++) {
        square[i] = square_sum(x[i], 0);
        if (mine)
            *reinterpret_cast<uint2 *>(rows + i * S::ROW + column) = few_weighed(x[i], weight);
    }
#pragma unroll
    for (int o = 8; o; o >>= 1) { /* few_square of both */
#pragma unroll
        for (int i = 0; i < FEW_ALONE; i++)
            square[i] += __shfl_xor_sync(0xffffffffu, square[i], o);
    }
#pragma unroll
    for (int i = 0; i < FEW_ALONE; i++) {
        if (quad == 0)
            squares[group * CLUSTER_ROWS + i] = square[i];
        if (mine && i < n_rows && blockIdx.x == 0)
            *reinterpret_cast<float4 *>(c.m.between + (int64_t)i * D + column) = x[i];
    }
    __syncthreads();
}

/* A thread's part of the RG-LRU's state: found before pdl_wait, read after it, and put in its place
 * when there is nothing else to wait for. */
struct held_state {
    float4 *to, z;
    int64_t from; /* in z; negative: none */
};

template <int D>
static __device__ __forceinline__ void find_state(struct held_state *h, const struct mlp_call &c,
                                                  int n_rows)
{
    const int i = blockIdx.x * CLUSTER_THREADS + threadIdx.x, row = i / (D / 4), quad = i % (D / 4);
    h->from = -1;
    if (row >= n_rows)
        return;
    h->from = (int64_t)row * D + quad * 4;
    h->to =
        reinterpret_cast<float4 *>(c.m.rglru.data + c.step.seq_slot[row] * c.m.rglru.row_values) +
        quad;
}

/* Columns c and c + 1 of a row of the groups' sums, added in order. */
template <class S>
static __device__ __forceinline__ float2 take_sums(const float *sums, int row, int column)
{
    float2 y = make_float2(0, 0);
#pragma unroll
    for (int g = 0; g < S::GROUPS; g++) {
        const float2 one =
            *reinterpret_cast<const float2 *>(sums + (g * CLUSTER_ROWS + row) * S::SUM + column);
        y.x += one.x, y.y += one.y;
    }
    return y;
}

template <int D, int F>
static __global__ void __launch_bounds__(CLUSTER_THREADS, 2)
    few_mlp_in_kernel(const __grid_constant__ struct mlp_call c)
{
    typedef in_shape<D, F> S;
    DYNAMIC_SHARED(unsigned char, shared);
    bf16 *const weights = reinterpret_cast<bf16 *>(shared + S::weights);
    const bf16 *const rows = reinterpret_cast<const bf16 *>(shared + S::rows);
    float *const sums = reinterpret_cast<float *>(shared + S::sums);
    const float *const squares = reinterpret_cast<const float *>(shared + S::squares);
    float *const scales = reinterpret_cast<float *>(shared + S::scales);
    bulk_barrier *const fetched = reinterpret_cast<bulk_barrier *>(shared + S::fetched);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    const int group = warp / 2, half = warp % 2, feature = blockIdx.x * S::FEATURES;
    const bool in_turn = c.step.rows > OUT_AT_ONCE;
    if (!in_turn)
        pdl_trigger();
    if (warp == 0) {
        bulk_begin(fetched, S::SUM * D * (int)sizeof(bf16));
        few_fetch<D>(weights, S::ROW, c.m.gate + (int64_t)feature * D, D, S::FEATURES, fetched);
        few_fetch<D>(weights + S::FEATURES * S::ROW, S::ROW, c.m.up + (int64_t)feature * D, D,
                     S::FEATURES, fetched);
    }
    const int n_rows = c.step.sizes->n_rows;
    const bool alone = c.step.rows <= FEW_ALONE;
    const int sixteenth = threadIdx.x / 16, quad = threadIdx.x % 16;
    const float4 weight =
        early_weight(c.m.norm, sixteenth * S::COLUMNS + quad * 4, alone && quad < S::COLUMNS / 4);
    struct held_state state;
    find_state<D>(&state, c, n_rows);
    if (in_turn) {
        __syncthreads(); /* bulk_wait: the barrier has begun */
        bulk_wait(fetched);
        pdl_trigger();
    }

    pdl_wait();
    if (state.from >= 0)
        state.z = few_load(c.m.z + state.from);
    take_rows<S, D>(c, n_rows, alone, weight, shared);
    bulk_wait(fetched);
    /* By all warps, without a branch: among the product's instructions it takes no time. */
    const float scale = few_scale<D>(squares, c.m.norm.eps);
    float sum[S::TILES][4] = {};
    few_product<S::TILES, S::K>(sum, rows + group * S::K, S::ROW,
                                weights + half * S::FEATURES * S::ROW + group * S::K, S::ROW,
                                S::FEATURES - 1);
    __syncthreads(); /* the sums lie over the rows */
#pragma unroll
    for (int n = 0; n < S::TILES; n++) {
        float *to = sums + (group * CLUSTER_ROWS + g) * S::SUM + half * S::FEATURES + 8 * n + 2 * t;
        *reinterpret_cast<float2 *>(to) = make_float2(sum[n][0], sum[n][1]);
        *reinterpret_cast<float2 *>(to + 8 * S::SUM) = make_float2(sum[n][2], sum[n][3]);
    }
    if (threadIdx.x < CLUSTER_ROWS)
        scales[threadIdx.x] = scale;
    __syncthreads();
    for (int i = threadIdx.x; i < n_rows * S::FEATURES / 2; i += CLUSTER_THREADS) {
        const int row = i / (S::FEATURES / 2), column = i % (S::FEATURES / 2) * 2;
        const float2 gate = take_sums<S>(sums, row, column);
        const float2 up = take_sums<S>(sums, row, S::FEATURES + column);
        const float by = scales[row];
        const float2 y = quick_activate(make_float2(gate.x * by, gate.y * by), c.m.act);
        *reinterpret_cast<__nv_bfloat162 *>(c.m.middle + (int64_t)row * F + feature + column) =
            __floats2bfloat162_rn(y.x * (up.x * by), y.y * (up.y * by));
    }
    if (state.from >= 0)
        *state.to = state.z;
}

/* ---- down ---- */

/* 16 bytes of a row of middle, zeros where there is none. */
static __device__ __forceinline__ uint4 middle_piece(const bf16 *from, bool here)
{
    return here ? __ldcg(reinterpret_cast<const uint4 *>(from)) : make_uint4(0, 0, 0, 0);
}

/* A lane's part of a slice of middle: 16 bytes of every 64, of rows g and g + 8. */
template <int SLICE> struct held_slice {
    uint4 low[SLICE / 32], high[SLICE / 32];
};

template <int SLICE, int F>
static __device__ __forceinline__ void hold_slice(struct held_slice<SLICE> *h, const bf16 *from,
                                                  int n_rows)
{
    const int g = threadIdx.x % WARP / 4;
#pragma unroll
    for (int p = 0; p < SLICE / 32; p++) {
        h->low[p] = middle_piece(from + p * 32, g < n_rows);
        h->high[p] = middle_piece(from + 8 * F + p * 32, g + 8 < n_rows);
    }
}

/* A lane's part of a slice of 8 rows of down, to registers. k is permuted: a lane's 16 bytes of a
 * row are what it feeds to the tensor core. */
template <int SLICE> struct slice_weights {
    uint4 piece[SLICE / 32];
};

template <int SLICE>
static __device__ __forceinline__ void take_weights(struct slice_weights<SLICE> *w,
                                                    const bf16 *from)
{
#pragma unroll
    for (int p = 0; p < SLICE / 32; p++)
        w->piece[p] = *reinterpret_cast<const uint4 *>(from + p * 32);
}

/* sum[TILES][4], zeros, += a slice times TILES tiles of 8 columns. Even and odd steps are chains of
 * their own, added at the end. */
template <int TILES, int SLICE>
static __device__ __forceinline__ void slice_product(float (*sum)[4],
                                                     const struct held_slice<SLICE> &h,
                                                     const struct slice_weights<SLICE> *weights)
{
    float odd[TILES][4] = {};
#pragma unroll
    for (int p = 0; p < SLICE / 32; p++) {
        const uint32_t a0[4] = {h.low[p].x, h.high[p].x, h.low[p].y, h.high[p].y};
        const uint32_t a1[4] = {h.low[p].z, h.high[p].z, h.low[p].w, h.high[p].w};
#pragma unroll
        for (int n = 0; n < TILES; n++) {
            const uint4 w = weights[n].piece[p];
            const uint32_t b0[2] = {w.x, w.y}, b1[2] = {w.z, w.w};
            mma_bf16(sum[n], a0, b0);
            mma_bf16(odd[n], a1, b1);
        }
    }
#pragma unroll
    for (int n = 0; n < TILES; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++)
            sum[n][i] += odd[n][i];
    }
}

/* Thread i of OUT_SUMS: the residual and its sums of all slices, halves of them in order. sums
 * [OUT_SLICES, 16, 8], in quarters, the first of which is quarter `first`. */
static __device__ __forceinline__ float add_slices(float residual, const float *sums, int first)
{
    constexpr int EACH = OUT_SLICES / 4;
    float y[2] = {residual, 0};
#pragma unroll
    for (int quarter = 0; quarter < 4; quarter++) {
        const float *const from = sums + ((quarter - first) & 3) * EACH * OUT_SUMS + threadIdx.x;
#pragma unroll
        for (int s = 0; s < EACH; s++)
            y[quarter / 2] += from[s * OUT_SUMS];
    }
    return y[0] + y[1];
}

/* Of the norm that follows, before pdl_wait. */
static __device__ __forceinline__ float next_weight(const struct mlp_call &c, int column)
{
    return c.m.next_weight ? c.m.next_weight[column] : 0;
}

/* By all threads: x in its place, and what the norm that follows makes of it, if that is known; 8
 * threads have the columns of a row. */
template <int D>
static __device__ __forceinline__ void put_x(const struct mlp_call &c, float x, int row, int column,
                                             bool mine, float weight)
{
    const int64_t at = (int64_t)row * D + column;
    if (mine)
        c.m.x[at] = x;
    if (!c.m.next_weight)
        return;
    float square = x * x;
#pragma unroll
    for (int o = 1; o < FEW_PART; o *= 2)
        square += __shfl_xor_sync(0xffffffffu, square, o);
    if (!mine)
        return;
    c.m.h[at] = from_float<bf16>(x * weight);
    if (column % FEW_PART == 0)
        c.m.next.squares[row * (D / FEW_PART) + column / FEW_PART] = square;
}

template <int D, int F>
static __global__ void __launch_bounds__(CLUSTER_THREADS, 2)
    few_mlp_out_kernel(const __grid_constant__ struct mlp_call c)
{
    typedef out_shape<D, F> S;
    DYNAMIC_SHARED(unsigned char, shared);
    bf16 *const weights = reinterpret_cast<bf16 *>(shared + S::weights);
    float *const sums = reinterpret_cast<float *>(shared + S::sums);
    bulk_barrier *const fetched = reinterpret_cast<bulk_barrier *>(shared + S::fetched);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    const int row = threadIdx.x / 8, column = 8 * blockIdx.x + threadIdx.x % 8;
    const int first = warp * S::SLICES; /* of the warp's slices */
    pdl_trigger();
    if (warp == 0) {
        bulk_begin(fetched, 8 * F * (int)sizeof(bf16));
        few_fetch<F>(weights, S::ROW, c.m.down + (int64_t)8 * blockIdx.x * F, F, 8, fetched);
    }
    const int n_rows = c.step.sizes->n_rows;
    __syncthreads(); /* bulk_wait: the barrier has begun */
    const bf16 *const middle = kept_address(c.m.middle + (int64_t)g * F + first * S::SLICE + t * 8);
    const float weight = next_weight(c, column);

    pdl_wait();
    struct held_slice<S::SLICE> held[S::SLICES];
#pragma unroll
    for (int s = 0; s < S::SLICES; s++)
        hold_slice<S::SLICE, F>(held + s, middle + s * S::SLICE, n_rows);
    const bool mine = threadIdx.x < OUT_SUMS && row < n_rows;
    const float residual = mine ? __ldcg(c.m.between + (int64_t)row * D + column) : 0;
    bulk_wait(fetched);
    const bf16 *const own = weights + g * S::ROW + first * S::SLICE + t * 8;
    float sum[S::SLICES][4] = {};
#pragma unroll
    for (int s = 0; s < S::SLICES; s++) {
        struct slice_weights<S::SLICE> w;
        take_weights(&w, own + s * S::SLICE);
        slice_product<1>(sum + s, held[s], &w);
    }
    __syncthreads();
#pragma unroll
    for (int s = 0; s < S::SLICES; s++) {
        float *const to = sums + (first + s) * OUT_SUMS + g * 8 + 2 * t;
        *reinterpret_cast<float2 *>(to) = make_float2(sum[s][0], sum[s][1]);
        *reinterpret_cast<float2 *>(to + 64) = make_float2(sum[s][2], sum[s][3]);
    }
    __syncthreads();
    put_x<D>(c, mine ? add_slices(residual, sums, 0) : 0, row, column, mine, weight);
}

/* The same bits, of a cluster's 32 columns: block r of it has quarter r of the slices, and adds up
 * columns 8 r on. */
template <int D, int F>
static __global__ void __launch_bounds__(out_cluster_shape<D, F>::WARPS *WARP, 2)
    few_mlp_out_clusters_kernel(const __grid_constant__ struct mlp_call c)
{
    typedef out_cluster_shape<D, F> S;
    DYNAMIC_SHARED(unsigned char, shared);
    bf16 *const weights = reinterpret_cast<bf16 *>(shared + S::weights);
    float *const sums = reinterpret_cast<float *>(shared + S::sums);
    bulk_barrier *const fetched = reinterpret_cast<bulk_barrier *>(shared + S::fetched);
    bulk_barrier *const came = reinterpret_cast<bulk_barrier *>(shared + S::came);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    const int rank = cluster_rank(), slice = warp / S::PARTS, tile = warp % S::PARTS * S::TILES;
    const int row = threadIdx.x / 8, column = 8 * blockIdx.x + threadIdx.x % 8;
    pdl_trigger();
    if (warp == 0) {
        const int64_t from = (int64_t)(blockIdx.x / OUT_BLOCKS * S::COLUMNS + lane) * F;
        bulk_begin(fetched, S::COLUMNS * S::K * (int)sizeof(bf16));
        bulk_copy(weights + S::row(lane), c.m.down + from + rank * S::K, S::K * (int)sizeof(bf16),
                  fetched);
    }
    const int n_rows = c.step.sizes->n_rows;
    if (warp == 1)
        bulk_begin(came, n_rows * (S::came_bytes / CLUSTER_ROWS));
    __syncthreads(); /* bulk_wait: the barrier has begun */
    bulk_wait(fetched);
    struct slice_weights<S::SLICE> w[S::TILES];
#pragma unroll
    for (int n = 0; n < S::TILES; n++)
        take_weights(w + n,
                     weights + S::row(8 * (tile + n)) + S::row(g) + slice * S::SLICE + t * 8);
    cluster_arrive(); /* when all blocks have: their sums may be written */
    const bf16 *const middle =
        kept_address(c.m.middle + (int64_t)g * F + rank * S::K + slice * S::SLICE + t * 8);
    const float weight = next_weight(c, column);
    cluster_wait();

    pdl_wait();
    struct held_slice<S::SLICE> held;
    hold_slice<S::SLICE, F>(&held, middle, n_rows);
    const bool mine = threadIdx.x < OUT_SUMS && row < n_rows;
    const float residual = mine ? __ldcg(c.m.between + (int64_t)row * D + column) : 0;
    float sum[S::TILES][4] = {};
    slice_product<S::TILES>(sum, held, w);
#pragma unroll
    for (int n = 0; n < S::TILES; n++) {
        const int peer = tile + n, quarter = (rank - peer - 1) & 3;
        float *const to = sums + (quarter * S::SLICES + slice) * OUT_SUMS + g * 8 + 2 * t;
#pragma unroll
        for (int j = 0; j < 2; j++) {
            float2 *const place = reinterpret_cast<float2 *>(to + j * OUT_SUMS / 2);
            const float2 two = make_float2(sum[n][2 * j], sum[n][2 * j + 1]);
            if (peer == rank)
                *place = two;
            else if (g + 8 * j < n_rows)
                cluster_send(place, two, peer, came);
        }
    }
    __syncthreads(); /* the block's own */
    cluster_receive(came);
    put_x<D>(c, mine ? add_slices(residual, sums, rank + 1) : 0, row, column, mine, weight);
}

/* ---- launching ---- */

template <int D, int F> static void run_out(struct cuda *c, const struct mlp_call *call)
{
    typedef out_cluster_shape<D, F> S;
    constexpr int THREADS = S::WARPS * WARP;
    if (c->step.rows > OUT_ALONE && cluster_fits((const void *)few_mlp_out_clusters_kernel<D, F>,
                                                 OUT_BLOCKS, THREADS, (size_t)S::bytes))
        launch_beside(&c->queue, "few_mlp_out", few_mlp_out_clusters_kernel<D, F>, dim3(D / 8),
                      OUT_BLOCKS, THREADS, (size_t)S::bytes, *call);
    else
        launch_beside(&c->queue, "few_mlp_out", few_mlp_out_kernel<D, F>, dim3(D / 8), 0,
                      CLUSTER_THREADS, (size_t)out_shape<D, F>::bytes, *call);
}

template <int D, int F> static void run_mlp(struct cuda *c, const struct mlp_call *call)
{
    static_assert(CLUSTER_ROWS * D / 4 <= IN_BLOCKS * CLUSTER_THREADS, "few_mlp_in keeps all of z");
    const int n_rows = c->step.rows, blocks = n_rows < SETTLE_BLOCKS ? n_rows : SETTLE_BLOCKS;
    if (n_rows > FEW_ALONE)
        launch(&c->queue, "few_settle", few_settle_kernel<D>, dim3((unsigned)blocks),
               ceil_div(n_rows, blocks) * CLUSTER_THREADS, 0, *call);
    launch_beside(&c->queue, "few_mlp_in", few_mlp_in_kernel<D, F>, dim3(IN_BLOCKS), 0,
                  CLUSTER_THREADS, (size_t)in_shape<D, F>::bytes, *call);
    run_out<D, F>(c, call);
}

void few_mlp_launch(struct cuda *c, const struct cluster_shape *shape, const struct few_mlp *m)
{
    const struct mlp_call call = {*m, c->step};
    CHECK(cluster_knows(c, shape));
    run_mlp<768, 3072>(c, &call);
}
