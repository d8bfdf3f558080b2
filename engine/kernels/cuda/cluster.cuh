/* cluster.cuh - a decode layer of few rows in three or four kernels.
 *
 *   1 cluster_mix  v, q, k, RG-LRU, latents, window: a cluster a head (cluster_mix.cu)
 *   2 few_output   x and the output projection (few_output.cu)
 *   3 few_mlp_in   gate, up, activation (few_mlp.cu)
 *   4 few_mlp_out  and down; above 8 rows by clusters of 4, whose blocks share the rows' columns
 *
 * A kernel of a graph costs a microsecond or two, however little it does; an exchange between the
 * blocks of a cluster costs a third of one. So whatever the mixing of a head needs is
 * exchanged within its cluster, which computes the RG-LRU of all channels for itself. What sums
 * over heads is the next kernel's. Up to FEW_ALONE rows that kernel is few_mlp_in: the mixing has a
 * head's share of the output projection, and all blocks of few_mlp_in add the shares to x.
 *
 * Rows pass from one kernel to the next as packed.cuh has them, unnormed: x * weight in the order
 * in which lanes multiply, and sums of squares of FEW_PART values. RMSNorm's scale is a factor of
 * the row, so it is applied to products' results: rows go straight to registers, and the
 * scale is computed while they are multiplied.
 *
 * Weights are asked for before pdl_wait, while the kernels before still run: that works where all
 * of a kernel's blocks find room beside those. So the shapes are made to fit a device of 132 SMs
 * of 227 KB: the mixing has one block on each of 64, few_mlp_in one on each of 64 others, where
 * few_output has its own; an SM with either has room for one block of few_mlp_out, too.
 * Clusters of 16, of which an H100 has places for seven, and clusters for all of the mlp were
 * slower (NOTES.md).
 *
 * A row's result does not depend on the other rows or their number: products are of a tensor core's
 * tile of 16 rows, whatever the step has, and sums have one order.
 *
 * Bytes a layer at D = 768, F = 3072: weights 20 MB once, gates of the RG-LRU 0.3 MB for each
 * cluster (from L2 but once), state 62 KB a row and head. Floor 6.6 us at one row.
 */
#ifndef LATTE_CUDA_CLUSTER_CUH
#define LATTE_CUDA_CLUSTER_CUH

#include "engine/kernels/cuda/fused.cuh"
#include "engine/kernels/cuda/math.cuh"

enum {
    MIX_CLUSTERS = 8,        /* of the mixing: one a head */
    FEW_PART = 8,            /* columns of a sum of squares */
    FEW_ALONE = 2,           /* rows up to which there is no few_output */
    CLUSTER_BLOCKS = 8,      /* of a cluster */
    CLUSTER_ROWS = 16,       /* of a step at most: a tensor core's tile */
    CLUSTER_LATENTS = 16,    /* of a head at most */
    CLUSTER_RING_ROWS = 128, /* at most: two threads have a key */
    CLUSTER_THREADS = 256,
    CLUSTER_WARPS = CLUSTER_THREADS / WARP,
    /* A block of the mixing or of few_mlp_in, one of few_output and one of few_mlp_out have room on
     * an SM together, of 65,536 registers. Of a thread, multiples of 8: */
    FEW_REGISTERS = 128,
    FEW_BLOCKS = 2, /* of as many an SM: how bounds say it */
    FEW_OUTPUT_REGISTERS = 40,
    FEW_OUT_REGISTERS = 88,
    FEW_OUT_CLUSTERS_REGISTERS = 168, /* of half as many threads */
    /* Of 228 KB of shared memory, too, but that beside the mixing of more than 8 rows there is none
     * for few_output: bytes of a block at most, to which the system adds 1 KB. */
    FEW_OUT_SHARED = 50 * 1024 + 128,
    FEW_OUTPUT_SHARED = 25 * 1024,
    FEW_SHARED = 226 * 1024 - FEW_OUT_SHARED,
    FEW_IN_SHARED = 225 * 1024 - FEW_OUT_SHARED - FEW_OUTPUT_SHARED,
};
static_assert(CLUSTER_THREADS * (FEW_REGISTERS + FEW_OUTPUT_REGISTERS + FEW_OUT_REGISTERS) <= 65536,
              "beside each other");
static_assert(FEW_BLOCKS * CLUSTER_THREADS * FEW_REGISTERS == 65536, "the same bounds");

/* What the kernels know: bf16 matrices without biases, [out, in]; RMSNorm; KV heads = heads.
 * Squares of packed rows are in D / FEW_PART parts. */
struct cluster_mix {
    struct packed_rows in; /* [rows, D] with squares */
    const bf16 *q, *k, *v; /* [H d, D] */
    const void *prepared;  /* cluster_prepare's */
    /* z [rows, D] f32 is what a later kernel puts into the RG-LRU's state: all clusters read the
     * old one. */
    struct device_slab<float> rglru;
    float *z;
    float z_eps;                     /* of rglru_norm */
    const bf16 *latent_q, *latent_k; /* [H (M + 1), D], [H M, D] */
    int n_latents;                   /* M, at most CLUSTER_LATENTS */
    struct device_slab<float> m, alpha, s;
    const double *frequencies; /* [d/2] */
    void *ring_k, *ring_v;     /* slabs [H, w, d], w at most CLUSTER_RING_ROWS */
    enum dtype ring_dtype;     /* BF16 or F8_E4M3 */
    int64_t ring_values;       /* of a slot */
    int ring_rows;
    float scale, softcap;
    struct packed_rows mixed; /* [rows, H d], without squares; up to FEW_ALONE rows instead: */
    const bf16 *o;            /* [D, H d] */
    float *shares;            /* [MIX_CLUSTERS, FEW_ALONE, D] of the heads, to be added to x */
};

/* Where a product adds to the residual stream, and what the next one is given. */
struct few_sum {
    const float *x;      /* [rows, D] */
    float *sum;          /* [rows, D] x and the product; may be x */
    const float *weight; /* [D] of the norm that follows; NULL: nothing is left for it */
    struct packed_rows next;
    bf16 *plain; /* [rows, D] given, next's values go there */
};

/* to.sum = to.x + W_o mixed; of more than FEW_ALONE rows. */
struct few_output {
    struct packed_rows mixed;
    const bf16 *o; /* [D, H d] */
    struct few_sum to;
};

/* What few_mlp_in adds up for itself, of up to FEW_ALONE rows. */
struct few_shares {
    const float *x;      /* [rows, D] */
    const float *shares; /* cluster_mix's */
    const float *weight; /* [D] of the norm before the mlp */
    float *sum;          /* [rows, D] x and the shares */
};

/* The rest of the layer. Rows beyond the step's are not touched. */
struct few_mlp {
    struct packed_rows in; /* [rows, D] with squares; up to FEW_ALONE rows its eps alone, and: */
    struct few_shares alone;
    const bf16 *gate, *up; /* [F, D] */
    const bf16 *down;      /* [D, F] */
    enum activation act;
    bf16 *middle;      /* [rows, F] */
    struct few_sum to; /* its x has the output projection */
    const float *z;    /* cluster_mix's, to be put into the state */
    struct device_slab<float> rglru;
};

/* The shapes there are kernels for; on devices that have such clusters. */
struct cluster_shape {
    int dim, n_heads, head_dim, mlp, rglru_blocks;
};
bool cluster_has(const struct cluster_shape *shape);
bool cluster_knows(const struct cuda *c, const struct cluster_shape *shape);

/* A layer's RG-LRU as the mixing wants it, made once: bf16 gates and constants, in its order. */
struct cluster_gates {
    const float *recurrence_gate, *recurrence_bias, *input_gate, *input_bias, *lambda;
    const float *norm_weight; /* rglru_norm's */
};
size_t cluster_prepared_bytes(const struct cluster_shape *shape);
void cluster_prepare(struct cuda *c, const struct cluster_shape *shape,
                     const struct cluster_gates *g, void *prepared);

/* Decode steps of up to CLUSTER_ROWS rows. */
void cluster_mix_launch(struct cuda *c, const struct cluster_shape *shape,
                        const struct cluster_mix *m);
void few_output_launch(struct cuda *c, const struct cluster_shape *shape,
                       const struct few_output *o);
bool few_mlp_fits(void); /* for cluster_knows */
void few_mlp_launch(struct cuda *c, const struct cluster_shape *shape, const struct few_mlp *m);

/* ---- pieces of the kernels ---- */

static __device__ __forceinline__ float4 few_load(const float *p)
{
    return __ldcg(reinterpret_cast<const float4 *>(p));
}

static __device__ __forceinline__ float few_add(float a, float b)
{
    return a + b;
}
static __device__ __forceinline__ float4 few_add(float4 a, float4 b)
{
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

/* x plus the heads' shares, in the order of all that add them: two chains. */
template <class T>
static __device__ __forceinline__ T few_sum_heads(T x, const T (&share)[MIX_CLUSTERS])
{
    T even = few_add(x, share[0]), odd = share[1];
#pragma unroll
    for (int h = 2; h < MIX_CLUSTERS; h += 2) {
        even = few_add(even, share[h]);
        odd = few_add(odd, share[h + 1]);
    }
    return few_add(even, odd);
}

/* A lane's part of K columns of 16 rows, mma_bf16's first factors, from packed rows whose first of
 * those columns is `first`, a multiple of 16. Rows beyond the step's hold anything. */
template <int K> struct few_rows {
    uint4 step[K / PACKED_COLUMNS];

    __device__ __forceinline__ void hold(const bf16 *values, int first)
    {
        const bf16 *const from =
            values + first * PACKED_ROWS + threadIdx.x % WARP * (int)PACKED_LANE;
#pragma unroll
        for (int i = 0; i < K / PACKED_COLUMNS; i++)
            step[i] = __ldcg(reinterpret_cast<const uint4 *>(from + i * PACKED_STEP));
    }
    /* Of columns k on. */
    __device__ __forceinline__ void take(uint32_t a[4], int k) const
    {
        const uint4 &one = step[k / PACKED_COLUMNS];
        a[0] = one.x, a[1] = one.y, a[2] = one.z, a[3] = one.w;
    }
};

/* The same of rows of shared memory, `stride` values apart; of 8 rows those 8 on are the same. */
template <int ROWS> struct few_shared_rows {
    const bf16 *at;

    __device__ __forceinline__ few_shared_rows(const bf16 *rows, int stride)
    {
        const int lane = threadIdx.x % WARP, row = lane % 8 + (ROWS > 8 ? lane / 8 % 2 * 8 : 0);
        at = rows + row * stride + lane / 16 * 8;
    }
    __device__ __forceinline__ void take(uint32_t a[4], int k) const
    {
        ldmatrix_x4(a, at + k);
    }
};

/* sum[TILES][4] += rows times TILES tiles of 8 weight rows; K columns, a multiple of 32.
 * weights: row r of tile n at (8 n + r) * stride; rows from `last` on are read as row last.
 * Fragments as mma_bf16 has them. Of one tile the odd steps have sums of their own, added at the
 * end: a chain half as long. */
template <int TILES, int K, class A>
static __device__ __forceinline__ void few_product(float (*sum)[4], const A &rows,
                                                   const bf16 *weights, int stride, int last)
{
    static_assert(K % 32 == 0, "steps of 32 columns");
    const int lane = threadIdx.x % WARP;
    constexpr bool APART = TILES == 1;
    const bf16 *b_at[TILES];
    float odd[TILES][4] = {};
#pragma unroll
    for (int n = 0; n < TILES; n++) {
        const int row = 8 * n + lane % 8;
        b_at[n] = weights + (row < last ? row : last) * stride + lane / 8 * 8;
    }
#pragma unroll
    for (int k = 0; k < K; k += 32) {
        uint32_t low[4], high[4];
        rows.take(low, k);
        rows.take(high, k + 16);
#pragma unroll
        for (int n = 0; n < TILES; n++) {
            uint32_t b[4];
            ldmatrix_x4(b, b_at[n] + k);
            mma_bf16(sum[n], low, b);
            mma_bf16(APART ? odd[n] : sum[n], high, b + 2);
        }
    }
#pragma unroll
    for (int n = 0; n < TILES && APART; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++)
            sum[n][i] += odd[n][i];
    }
}

/* A tile's sums, as mma_bf16 leaves them, to rows `stride` apart: `to` is the lane's place in row
 * lane / 4; both: row lane / 4 + 8, too. */
static __device__ __forceinline__ void few_put(float *to, int stride, const float (&sum)[4],
                                               bool both = true)
{
    *reinterpret_cast<float2 *>(to) = make_float2(sum[0], sum[1]);
    if (both)
        *reinterpret_cast<float2 *>(to + 8 * stride) = make_float2(sum[2], sum[3]);
}

/* The norm's scale of a row, 16 threads a row, all of which get it: begun after pdl_wait from
 * squares [rows, D / FEW_PART], of global memory or SHARED, ended when there is time. */
template <int D> struct few_scale {
    static constexpr int QUADS = D / FEW_PART / 4, EACH = (QUADS + 15) / 16;
    float4 part[EACH];

    template <bool SHARED = false>
    __device__ __forceinline__ void begin(const float *squares, int row, bool here)
    {
        const float4 *const from = reinterpret_cast<const float4 *>(squares + row * (D / FEW_PART));
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int quad = threadIdx.x % 16 + 16 * i;
            part[i] = make_float4(0, 0, 0, 0);
            if (here && quad < QUADS)
                part[i] = SHARED ? from[quad] : __ldcg(from + quad);
        }
    }
    /* What they come to, in one register instead of eight. */
    __device__ __forceinline__ float sum(void) const
    {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < EACH; i++)
            sum += (part[i].x + part[i].y) + (part[i].z + part[i].w);
        return sum;
    }
    static __device__ __forceinline__ float end(float sum, float eps)
    {
#pragma unroll
        for (int o = 8; o; o >>= 1)
            sum += __shfl_xor_sync(0xffffffffu, sum, o);
        return norm_scale(sum, D, eps);
    }
};

/* The sum of squares of FEW_PART columns, of which a lane has the 4 at x and the lane beside it the
 * others: the bits that few_leave's have. */
static __device__ __forceinline__ float few_square(float4 x)
{
    const float square = __fadd_rn(__fadd_rn(__fmul_rn(x.x, x.x), __fmul_rn(x.y, x.y)),
                                   __fadd_rn(__fmul_rn(x.z, x.z), __fmul_rn(x.w, x.w)));
    return square + __shfl_xor_sync(0xffffffffu, square, 1);
}

/* What the norm that follows multiplies the column by: a constant. */
static __device__ __forceinline__ float few_weight(const struct few_sum &to, int column)
{
    return to.weight ? to.weight[column] : 0;
}

/* By whole warps, of which FEW_PART lanes have columns of a row: the sum in its place, and what
 * the norm that follows makes of it, if that is known. */
template <int D>
static __device__ __forceinline__ void few_leave(const struct few_sum &to, float x, int row,
                                                 int column, bool mine, float weight)
{
    const int64_t at = (int64_t)row * D + column;
    if (mine)
        to.sum[at] = x;
    if (!to.weight)
        return;
    float square = __fmul_rn(x, x); /* not fused into a sum: as few_square has it */
#pragma unroll
    for (int o = 1; o < FEW_PART; o *= 2)
        square += __shfl_xor_sync(0xffffffffu, square, o);
    if (!mine)
        return;
    bf16 *const value = to.plain ? to.plain + at : to.next.values + packed_at(row, column, D);
    *value = from_float<bf16>(x * weight);
    if (column % FEW_PART == 0)
        to.next.squares[row * (D / FEW_PART) + column / FEW_PART] = square;
}

/* One warp: start copying n rows of K values, each from + r * from_stride, to rows of `stride`
 * values; bytes as bulk_begin was told. */
template <int K>
static __device__ __forceinline__ void few_fetch(bf16 *to, int stride, const bf16 *from,
                                                 int64_t from_stride, int n, bulk_barrier *b)
{
    for (int r = threadIdx.x % WARP; r < n; r += WARP)
        bulk_copy(to + r * stride, from + r * from_stride, K * sizeof(bf16), b);
}

#endif
