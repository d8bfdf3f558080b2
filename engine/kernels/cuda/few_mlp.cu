/* few_mlp.cu - the mlp of a decode layer of few rows, see cluster.cuh: two products, as single
 * blocks but for the second of more than OUT_ALONE rows.
 *
 * few_mlp_in: a block has 1/64 of the features, their rows of gate and up in shared memory; its
 * warps have an eighth of D each. few_mlp_out: a block has 8 rows of down, each of its
 * warps two sixteenths of F. Of more than OUT_ALONE rows a cluster of 4 blocks has 32 rows of down,
 * each block a quarter of F, a quarter of the bytes of the rows; each adds up 8 columns, of which
 * the others send it their sums: over its weights, which are in registers before pdl_wait, since
 * there is no room beside them. Sums of the warps meet in shared memory and are added in order, the
 * same in both. Before pdl_wait all weights are on their way.
 * few_mlp_in also puts the RG-LRU's z into the state, as no block of the mixing may.
 * Bytes: 14 MB of weights at D = 768, F = 3072: floor 4.6 us; few_mlp_in's blocks 24 KB of rows
 * each, from L2; few_mlp_out's 6 KB a row, in clusters 1.5 KB.
 */
#include "engine/kernels/cuda/cluster.cuh"

enum {
    IN_BLOCKS = 64,
    OUT_ALONE = 8,               /* rows up to which few_mlp_out has no clusters */
    OUT_BLOCKS = 4,              /* of one of its clusters */
    OUT_SLICES = 16,             /* of F, each with sums of its own */
    OUT_SUMS = CLUSTER_ROWS * 8, /* of a slice and 8 columns */
};

struct mlp_call {
    struct few_mlp m;
    struct device_step step;
};

/* ALONE: of up to FEW_ALONE rows, from x and the heads' shares. */
template <int D, int F, bool ALONE> struct in_shape {
    static constexpr int FEATURES = F / IN_BLOCKS, COLUMNS = 2 * FEATURES, TILES = COLUMNS / 8;
    static constexpr int K = D / CLUSTER_WARPS, PARTS = D / FEW_PART; /* of a warp; of a row */
    static constexpr int ROW = D + 8; /* stride, in values: spreads banks */
    static_assert(FEATURES % 8 == 0 && K % 32 == 0, "tiles of products");

    static constexpr int weights = 0; /* offsets, in bytes */
    /* A warp's sums are where it has used weights: of a row gate's in the warp's columns of one
     * row of weights, up's in those of the next one. */
    static constexpr int SUMS_WARP = K / 2, SUMS_UP = ROW / 2, SUMS_ROW = 2 * SUMS_UP;
    static_assert(FEATURES * 4 <= K * 2 && 2 * CLUSTER_ROWS <= COLUMNS, "place of the weights");
    static constexpr int scales = weights + COLUMNS * ROW * 2;
    static constexpr int rows = scales + CLUSTER_ROWS * 4; /* ALONE: [FEW_ALONE, ROW] */
    static constexpr int squares = rows + (ALONE ? FEW_ALONE * ROW * 2 : 0); /* and [.., PARTS] */
    static constexpr int fetched = squares + (ALONE ? FEW_ALONE * PARTS * 4 : 0);
    static constexpr int bytes = fetched + sizeof(bulk_barrier);
    static_assert(bytes <= (ALONE ? FEW_SHARED : FEW_IN_SHARED), "beside the others");
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
    static_assert(WARPS * FEW_OUT_CLUSTERS_REGISTERS <= CLUSTER_WARPS * FEW_OUT_REGISTERS,
                  "beside the others");

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

/* ---- gate and up ---- */

/* N rows as the sum of x and the heads' shares, times the norm's weight, of which `weight` are the
 * thread's 4, and their squares, to shared memory; by the threads that there are columns for, whole
 * warps. */
template <class S, int D, int N>
static __device__ __forceinline__ void sum_rows(const struct few_shares &in, float4 weight,
                                                unsigned char *shared)
{
    static_assert(D % (4 * WARP) == 0, "whole warps");
    const int column = 4 * threadIdx.x;
    bf16 *const rows = reinterpret_cast<bf16 *>(shared + S::rows);
    float *const squares = reinterpret_cast<float *>(shared + S::squares);
    float4 x[N], share[N][MIX_CLUSTERS];
    if (column >= D)
        return;
#pragma unroll
    for (int r = 0; r < N; r++) { /* all loads before the first sum */
        x[r] = few_load(in.x + r * D + column);
#pragma unroll
        for (int h = 0; h < MIX_CLUSTERS; h++)
            share[r][h] = few_load(in.shares + (h * FEW_ALONE + r) * D + column);
    }
#pragma unroll
    for (int r = 0; r < N; r++) {
        x[r] = few_sum_heads(x[r], share[r]);
        const float square = few_square(x[r]);
        __nv_bfloat162 *const to = reinterpret_cast<__nv_bfloat162 *>(rows + r * S::ROW + column);
        to[0] = __floats2bfloat162_rn(x[r].x * weight.x, x[r].y * weight.y);
        to[1] = __floats2bfloat162_rn(x[r].z * weight.z, x[r].w * weight.w);
        if (threadIdx.x % 2 == 0)
            squares[r * S::PARTS + column / FEW_PART] = square;
        if (blockIdx.x == 0)
            *reinterpret_cast<float4 *>(in.sum + r * D + column) = x[r];
    }
}

/* These as mma_bf16's first factors; rows FEW_ALONE on are repetitions. */
struct alone_rows {
    const bf16 *at;

    __device__ __forceinline__ void take(uint32_t a[4], int k) const
    {
        a[0] = a[1] = *reinterpret_cast<const uint32_t *>(at + k);
        a[2] = a[3] = *reinterpret_cast<const uint32_t *>(at + k + 8);
    }
};

/* Two of the warps' sums that follow each other, added in order. */
template <class S> static __device__ __forceinline__ float2 take_sums(const float *sums)
{
    float2 y = make_float2(0, 0);
#pragma unroll
    for (int w = 0; w < CLUSTER_WARPS; w++) {
        const float2 one = *reinterpret_cast<const float2 *>(sums + w * S::SUMS_WARP);
        y.x += one.x, y.y += one.y;
    }
    return y;
}

/* The block's features from the warps' sums, times the rows' scales. */
template <class S, int F>
static __device__ __forceinline__ void activate_rows(const struct few_mlp &m, int feature,
                                                     int n_rows, const float *sums,
                                                     const float *scales)
{
    constexpr int PAIRS = S::FEATURES / 2;
    for (int i = threadIdx.x; i < n_rows * PAIRS; i += CLUSTER_THREADS) {
        const int row = i / PAIRS, column = i % PAIRS * 2;
        const float2 gate = take_sums<S>(sums + row * S::SUMS_ROW + column);
        const float2 up = take_sums<S>(sums + row * S::SUMS_ROW + S::SUMS_UP + column);
        const float by = scales[row];
        const float2 y = quick_activate(make_float2(gate.x * by, gate.y * by), m.act);
        *reinterpret_cast<__nv_bfloat162 *>(m.middle + (int64_t)row * F + feature + column) =
            __floats2bfloat162_rn(y.x * (up.x * by), y.y * (up.y * by));
    }
}

template <int D, int F, bool ALONE>
static __global__ void __launch_bounds__(CLUSTER_THREADS, FEW_BLOCKS)
    few_mlp_in_kernel(const __grid_constant__ struct mlp_call c)
{
    typedef in_shape<D, F, ALONE> S;
    DYNAMIC_SHARED(unsigned char, shared);
    bf16 *const weights = reinterpret_cast<bf16 *>(shared + S::weights);
    float *const sums = reinterpret_cast<float *>(shared + S::weights);
    float *const scales = reinterpret_cast<float *>(shared + S::scales);
    bulk_barrier *const fetched = reinterpret_cast<bulk_barrier *>(shared + S::fetched);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    const int feature = blockIdx.x * S::FEATURES, scaled = threadIdx.x / 16;
    const int kept = blockIdx.x * CLUSTER_THREADS + threadIdx.x; /* 4 values of z, a thread's */
    pdl_trigger();
    if (warp == 0) {
        bulk_begin(fetched, S::COLUMNS * D * (int)sizeof(bf16));
        few_fetch<D>(weights, S::ROW, c.m.gate + (int64_t)feature * D, D, S::FEATURES, fetched);
        few_fetch<D>(weights + S::FEATURES * S::ROW, S::ROW, c.m.up + (int64_t)feature * D, D,
                     S::FEATURES, fetched);
    }
    const int n_rows = c.step.sizes->n_rows;
    const bool keeps = kept / (D / 4) < n_rows;
    const int32_t slot = keeps ? c.step.seq_slot[kept / (D / 4)] : 0;
    float4 weight = make_float4(0, 0, 0, 0);
    if (ALONE && 4 * (int)threadIdx.x < D)
        weight = *reinterpret_cast<const float4 *>(c.m.alone.weight + 4 * threadIdx.x);
    __syncthreads(); /* bulk_wait: the barrier has begun */

    pdl_wait();
    struct few_scale<D> scale;
    float sum[S::TILES][4] = {}, square;
    if (ALONE) {
        static_assert(FEW_ALONE == 2, "one row or both");
        if (n_rows > 1)
            sum_rows<S, D, FEW_ALONE>(c.m.alone, weight, shared);
        else
            sum_rows<S, D, 1>(c.m.alone, weight, shared);
        __syncthreads();
        const struct alone_rows rows = {reinterpret_cast<const bf16 *>(shared + S::rows) +
                                        g % FEW_ALONE * S::ROW + warp * S::K + 2 * t};
        bulk_wait(fetched);
        few_product<S::TILES, S::K>(sum, rows, weights + warp * S::K, S::ROW, S::COLUMNS - 1);
        scale.template begin<true>(reinterpret_cast<const float *>(shared + S::squares), scaled,
                                   scaled < n_rows);
        square = scale.sum();
    } else {
        struct few_rows<S::K> rows;
        rows.hold(c.m.in.values, warp * S::K);
        scale.begin(c.m.in.squares, scaled, scaled < n_rows);
        bulk_wait(fetched);
        square = scale.sum();
        few_product<S::TILES, S::K>(sum, rows, weights + warp * S::K, S::ROW, S::COLUMNS - 1);
    }
    const float factor = few_scale<D>::end(square, c.m.in.eps);
    if (threadIdx.x % 16 == 0)
        scales[scaled] = factor;
    __syncwarp(); /* the sums lie over the warp's weights */
#pragma unroll
    for (int n = 0; n < S::TILES; n++) {
        const int up = 8 * n / S::FEATURES, column = 8 * n - up * S::FEATURES + 2 * t;
        float *const to = sums + g * S::SUMS_ROW + up * S::SUMS_UP + warp * S::SUMS_WARP + column;
        few_put(to, S::SUMS_ROW, sum[n], c.step.rows > 8);
    }
    float4 z = make_float4(0, 0, 0, 0); /* asked for once there are registers for it */
    if (keeps)
        z = few_load(c.m.z + 4 * kept);
    __syncthreads();
    activate_rows<S, F>(c.m, feature, n_rows, sums, scales);
    if (keeps)
        *reinterpret_cast<float4 *>(c.m.rglru.data + slot * c.m.rglru.row_values + 4 * kept % D) =
            z;
}

/* ---- down ---- */

/* 16 bytes of a row of middle, zeros where there is none. */
static __device__ __forceinline__ uint4 middle_piece(const bf16 *from, bool here)
{
    return here ? __ldcg(reinterpret_cast<const uint4 *>(from)) : make_uint4(0, 0, 0, 0);
}

/* A lane's part of a slice of middle: 16 bytes of every 64, of row g and, of 16 rows, g + 8. */
template <int SLICE, int ROWS> struct held_slice {
    uint4 low[SLICE / 32], high[ROWS > 8 ? SLICE / 32 : 1];
};

template <int SLICE, int F, int ROWS>
static __device__ __forceinline__ void hold_slice(struct held_slice<SLICE, ROWS> *h,
                                                  const bf16 *from, int n_rows)
{
    const int g = threadIdx.x % WARP / 4;
    h->high[0] = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int p = 0; p < SLICE / 32; p++) {
        h->low[p] = middle_piece(from + p * 32, g < n_rows);
        if (ROWS > 8)
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
template <int TILES, int SLICE, int ROWS>
static __device__ __forceinline__ void slice_product(float (*sum)[4],
                                                     const struct held_slice<SLICE, ROWS> &h,
                                                     const struct slice_weights<SLICE> *weights)
{
    float odd[TILES][4] = {};
#pragma unroll
    for (int p = 0; p < SLICE / 32; p++) {
        const uint4 &low = h.low[p], &high = h.high[ROWS > 8 ? p : 0];
        const uint32_t a0[4] = {low.x, high.x, low.y, high.y};
        const uint32_t a1[4] = {low.z, high.z, low.w, high.w};
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

template <int D, int F>
static __global__ void __maxnreg__(FEW_OUT_REGISTERS)
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
    if (warp == 0) {
        bulk_begin(fetched, 8 * F * (int)sizeof(bf16));
        few_fetch<F>(weights, S::ROW, c.m.down + (int64_t)8 * blockIdx.x * F, F, 8, fetched);
    }
    const int n_rows = c.step.sizes->n_rows;
    __syncthreads(); /* bulk_wait: the barrier has begun */
    const bf16 *const middle = kept_address(c.m.middle + (int64_t)g * F + first * S::SLICE + t * 8);
    const float weight = few_weight(c.m.to, column);
    bulk_wait(fetched);
    pdl_trigger(); /* the mixing's weights and state are more, and would be in the way */

    pdl_wait();
    struct held_slice<S::SLICE, OUT_ALONE> held[S::SLICES];
#pragma unroll
    for (int s = 0; s < S::SLICES; s++)
        hold_slice<S::SLICE, F, OUT_ALONE>(held + s, middle + s * S::SLICE, n_rows);
    const bool mine = threadIdx.x < OUT_SUMS && row < n_rows;
    const float residual = mine ? __ldcg(c.m.to.x + (int64_t)row * D + column) : 0;
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
        few_put(sums + (first + s) * OUT_SUMS + g * 8 + 2 * t, 8, sum[s]);
    }
    __syncthreads();
    few_leave<D>(c.m.to, mine ? add_slices(residual, sums, 0) : 0, row, column, mine, weight);
}

/* The same bits, of a cluster's 32 columns: block r of it has quarter r of the slices, and adds up
 * columns 8 r on. */
template <int D, int F>
static __global__ void __maxnreg__(FEW_OUT_CLUSTERS_REGISTERS)
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
    const float weight = few_weight(c.m.to, column);
    cluster_wait();

    pdl_wait();
    struct held_slice<S::SLICE, CLUSTER_ROWS> held;
    hold_slice<S::SLICE, F, CLUSTER_ROWS>(&held, middle, n_rows);
    const bool mine = threadIdx.x < OUT_SUMS && row < n_rows;
    const float residual = mine ? __ldcg(c.m.to.x + (int64_t)row * D + column) : 0;
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
    few_leave<D>(c.m.to, mine ? add_slices(residual, sums, rank + 1) : 0, row, column, mine,
                 weight);
}

/* ---- launching ---- */

bool few_mlp_fits(void)
{
    typedef out_cluster_shape<768, 3072> S;
    return cluster_fits((const void *)few_mlp_out_clusters_kernel<768, 3072>, OUT_BLOCKS,
                        S::WARPS * WARP, (size_t)S::bytes);
}

template <int D, int F> static void run_out(struct cuda *c, const struct mlp_call *call)
{
    typedef out_cluster_shape<D, F> S;
    if (c->step.rows > OUT_ALONE)
        launch_beside(&c->queue, "few_mlp_out", few_mlp_out_clusters_kernel<D, F>, dim3(D / 8),
                      OUT_BLOCKS, S::WARPS * WARP, (size_t)S::bytes, *call);
    else
        launch_beside(&c->queue, "few_mlp_out", few_mlp_out_kernel<D, F>, dim3(D / 8), 0,
                      CLUSTER_THREADS, (size_t)out_shape<D, F>::bytes, *call);
}

template <int D, int F, bool ALONE> static void run_in(struct cuda *c, const struct mlp_call *call)
{
    launch_beside(&c->queue, "few_mlp_in", few_mlp_in_kernel<D, F, ALONE>, dim3(IN_BLOCKS), 0,
                  CLUSTER_THREADS, (size_t)in_shape<D, F, ALONE>::bytes, *call);
}

template <int D, int F> static void run_mlp(struct cuda *c, const struct mlp_call *call)
{
    static_assert(CLUSTER_ROWS * D / 4 <= IN_BLOCKS * CLUSTER_THREADS, "few_mlp_in keeps all of z");
    if (c->step.rows <= FEW_ALONE)
        run_in<D, F, true>(c, call);
    else
        run_in<D, F, false>(c, call);
    run_out<D, F>(c, call);
}

void few_mlp_launch(struct cuda *c, const struct cluster_shape *shape, const struct few_mlp *m)
{
    const struct mlp_call call = {*m, c->step};
    CHECK(cluster_knows(c, shape));
    run_mlp<768, 3072>(c, &call);
}
