/* cluster.cuh - a decode layer of few rows in three or four kernels.
 *
 *   1 cluster_mix  norm1, v, q, k, RG-LRU, latents, window; the output projection's share of each
 *                  head (cluster_mix.cu)
 *   2 few_settle   above FEW_ALONE rows: x += the heads' shares, norm2 (few_mlp.cu)
 *   3 few_mlp_in   up to FEW_ALONE rows what 2 does; gate, up, activation
 *   4 few_mlp_out  x += down; above 10 rows by clusters of 4, whose blocks share the rows' columns
 *
 * A kernel of a graph costs a microsecond or two, however little it does; an exchange between the
 * blocks of a cluster costs a third of one. So whatever the mixing of a head needs is
 * exchanged within its cluster, which computes the RG-LRU of all channels for itself. The output
 * projection, which sums over heads, leaves a partial row a head; the next kernel adds them to x,
 * in order. RMSNorm's scale is a factor of the row, so it is applied to the products' results,
 * and the sum of squares travels beside the rows.
 *
 * Weights are asked for before pdl_wait, while the kernels before still run: that works where all
 * of a kernel's blocks find room beside those. So the shapes are made to fit a device of 132 SMs
 * of 227 KB: the mixing has one block on each of 64, few_mlp_in one on each of 64 others, an SM
 * with either has room for one block of few_mlp_out, and few_settle takes the SMs left over.
 * Clusters of 16, of which an H100 has places for seven, and clusters for all of the mlp were
 * slower (NOTES.md).
 *
 * A row's result does not depend on the other rows or their number: products are of a tensor core's
 * tile of 16 rows, whatever the step has, and sums have one order.
 *
 * Bytes a layer at D = 768, F = 3072: weights 20 MB once, gates of the RG-LRU 0.3 MB for each
 * cluster (from L2 but once), state 62 KB a row and head; partial rows 8 D * 4 a row. Floor
 * 6.6 us at one row.
 */
#ifndef LATTE_CUDA_CLUSTER_CUH
#define LATTE_CUDA_CLUSTER_CUH

#include "engine/kernels/cuda/fused.cuh"
#include "engine/kernels/cuda/math.cuh"

enum {
    MIX_CLUSTERS = 8,        /* of the mixing: one a head */
    FEW_ALONE = 2,           /* rows that every block of few_mlp_in sums for itself */
    FEW_PART = 8,            /* columns that few_mlp_out has sums of squares of */
    CLUSTER_BLOCKS = 8,      /* of a cluster */
    CLUSTER_ROWS = 16,       /* of a step at most: a tensor core's tile */
    ROW_PIECES = 16,         /* of a row, each with a sum of squares of its own */
    CLUSTER_LATENTS = 16,    /* of a head at most */
    CLUSTER_RING_ROWS = 128, /* at most: two threads have a key */
    CLUSTER_THREADS = 256,
    CLUSTER_WARPS = CLUSTER_THREADS / WARP,
    SQUARES = ROW_PIECES * CLUSTER_ROWS,
    /* Bytes of shared memory, at most, of a block of few_mlp_out and of one of the mixing or of
     * few_mlp_in, which have room on an SM of 228 KB together: 1 KB of each is the system's. */
    FEW_OUT_SHARED = 50 * 1024 + 128,
    FEW_SHARED = 226 * 1024 - FEW_OUT_SHARED,
};

struct cluster_norm {
    const float *weight; /* [D] */
    float eps;
};

/* What the kernels know: bf16 matrices without biases, [out, in]; RMSNorm; KV heads = heads. */
struct cluster_mix {
    const float *x; /* [rows, D] the residual stream */
    struct cluster_norm norm;
    const bf16 *q, *k, *v; /* [H d, D] */
    const void *prepared;  /* cluster_prepare's */
    /* z [rows, D] f32 is what the next kernel puts into the RG-LRU's state: all clusters read the
     * old one. */
    struct device_slab<float> rglru;
    float *z;
    float z_eps;                     /* of rglru_norm */
    const bf16 *latent_q, *latent_k; /* [H (M + 1), D], [H M, D] */
    int n_latents;                   /* M, at most CLUSTER_LATENTS */
    struct device_slab<float> m, alpha, s;
    const double *frequencies; /* [d/2] */
    bf16 *ring_k, *ring_v;     /* slabs [H, w, d], w at most CLUSTER_RING_ROWS */
    int64_t ring_values;       /* of a slot */
    int ring_rows;
    float scale, softcap;
    const bf16 *o;          /* [D, H d] */
    float *partials;        /* [H, partial_rows, D] each head's share of the projection */
    int64_t partial_stride; /* values of partial_rows rows */
};

/* The rest of the layer. Scratch is of CLUSTER_ROWS rows. */
struct few_mlp {
    float *x;              /* [rows, D] */
    const float *partials; /* [MIX_CLUSTERS, partial_rows, D] the heads' shares, to be added to x */
    int64_t partial_stride;
    struct cluster_norm norm;
    float *between;        /* [rows, D] x with the heads' shares */
    bf16 *h;               /* [rows, D] between * norm's weight; in the end x * next_weight */
    float *squares;        /* [ROW_PIECES, CLUSTER_ROWS] of the rows of between */
    const bf16 *gate, *up; /* [F, D] */
    const bf16 *down;      /* [D, F] */
    enum activation act;
    bf16 *middle;             /* [rows, F] */
    const float *next_weight; /* [D] of the norm that follows; NULL: h is not written for it */
    struct row_factors next;  /* with it, parts of FEW_PART values */
    const float *z;           /* cluster_mix's, to be put into the state */
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
void few_mlp_launch(struct cuda *c, const struct cluster_shape *shape, const struct few_mlp *m);

/* ---- pieces of the kernels. 16 threads have a sixteenth of a row each ---- */

static __device__ __forceinline__ float4 few_load(const float *p)
{
    return __ldcg(reinterpret_cast<const float4 *>(p));
}

/* x[4] times the norm's weight, as bf16. */
static __device__ __forceinline__ uint2 few_weighed(float4 x, float4 weight)
{
    const __nv_bfloat162 low = __floats2bfloat162_rn(x.x * weight.x, x.y * weight.y);
    const __nv_bfloat162 high = __floats2bfloat162_rn(x.z * weight.z, x.w * weight.w);
    uint2 pair;
    memcpy(&pair.x, &low, 4);
    memcpy(&pair.y, &high, 4);
    return pair;
}

/* The sum of squares over 16 threads, 4 values each. */
static __device__ __forceinline__ float few_square(float4 x)
{
    float square = square_sum(x, 0);
#pragma unroll
    for (int o = 8; o; o >>= 1)
        square += __shfl_xor_sync(0xffffffffu, square, o);
    return square;
}

/* 1 / sqrt(mean square + eps) of row lane % 16, from squares [ROW_PIECES, 16 rows]. */
template <int D> static __device__ __forceinline__ float few_scale(const float *squares, float eps)
{
    float sum = 0;
#pragma unroll
    for (int p = 0; p < ROW_PIECES; p++)
        sum += squares[p * CLUSTER_ROWS + threadIdx.x % 16];
    return norm_scale(sum, D, eps);
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

/* Where a lane's address for ldmatrix_x4 of 16 rows begins; of 8 rows: twice the same ones, of
 * which the second results are unused. */
template <int ROWS>
static __device__ __forceinline__ const bf16 *few_rows_at(const bf16 *rows, int stride)
{
    const int lane = threadIdx.x % WARP, row = lane % 8 + (ROWS > 8 ? lane / 8 % 2 * 8 : 0);
    return rows + row * stride + lane / 16 * 8;
}

/* sum[TILES][4] += 16 or 8 rows (k columns from `rows` on) times TILES tiles of 8 weight rows; K
 * columns, a multiple of 32. weights: row r of tile n at (8 n + r) * stride; rows from `last` on
 * are read as row last. Fragments as mma_bf16 has them. A row has the same bits among 8 and 16. Of
 * few tiles the odd steps have sums of their own, added at the end: a chain half as long. */
template <int TILES, int K, int ROWS = CLUSTER_ROWS>
static __device__ __forceinline__ void few_product(float (*sum)[4], const bf16 *rows, int stride,
                                                   const bf16 *weights, int weight_stride, int last)
{
    static_assert(K % 32 == 0, "steps of 32 columns");
    const int lane = threadIdx.x % WARP;
    constexpr bool APART = TILES <= 2;
    const bf16 *const a_at = few_rows_at<ROWS>(rows, stride);
    const bf16 *b_at[TILES];
    float odd[TILES][4] = {};
#pragma unroll
    for (int n = 0; n < TILES; n++) {
        const int row = 8 * n + lane % 8;
        b_at[n] = weights + (row < last ? row : last) * weight_stride + lane / 8 * 8;
    }
#pragma unroll
    for (int k = 0; k < K; k += 32) {
        uint32_t low[4], high[4];
        ldmatrix_x4(low, a_at + k);
        ldmatrix_x4(high, a_at + k + 16);
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

#endif
