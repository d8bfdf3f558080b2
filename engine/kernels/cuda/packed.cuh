/* packed.cuh - activations in the order in which warpgroups multiply them (warpgroup.cuh).
 *
 * [row tiles of 128][n / 64 chunks][128 rows][64 values] bf16: a block's part of a chunk, 64 or 128
 * rows, is one piece of memory that one bulk copy brings. The 16-byte pieces of a row of 64 values
 * have changed places by the row's number modulo 8, which is how the tensor cores read 128 bytes
 * a row without meeting in a bank (the PTX manual's 128-byte swizzle).
 *
 * A row may be unnormed: values are x * weight, and the row's squares are added up elsewhere, so
 * that what norms it, a factor of the row, is applied to results. Then nothing stands between the
 * product that ends one sublayer and the product that begins the next.
 */
#ifndef LATTE_CUDA_PACKED_CUH
#define LATTE_CUDA_PACKED_CUH

#include "engine/kernels/cuda/math.cuh"

enum {
    PACKED_ROWS = 128,   /* of a tile */
    PACKED_COLUMNS = 64, /* of a chunk */
    PACKED_PARTS = 96,   /* of a row's squares at most */
};

/* By value to a kernel. */
struct packed_rows {
    bf16 *values; /* of rows rounded up to PACKED_ROWS; those beyond the step's hold anything */
    int n;        /* values of a row, a multiple of PACKED_COLUMNS */
    /* Sums of squares of each row before its weight, in parts: [rows, n_parts]; NULL: the rows
     * are what is to be multiplied. */
    float *squares;
    int n_parts; /* a multiple of 4, at most PACKED_PARTS */
    float eps;   /* of the norm */
};

static inline __host__ __device__ int64_t packed_values(int rows, int n)
{
    return (int64_t)((rows + PACKED_ROWS - 1) / PACKED_ROWS) * PACKED_ROWS * n;
}

/* Where the value of a row and column lies; 8 columns that begin at a multiple of 8 lie together.
 */
static inline __host__ __device__ int64_t packed_at(int row, int column, int n)
{
    const int64_t chunk =
        (int64_t)(row / PACKED_ROWS) * (n / PACKED_COLUMNS) + column / PACKED_COLUMNS;
    const int piece = (column % PACKED_COLUMNS / 8) ^ (row % 8);
    return (chunk * PACKED_ROWS + row % PACKED_ROWS) * PACKED_COLUMNS + piece * 8 + column % 8;
}

/* The squares of a row that LANES lanes, which follow each other, hold until they are there. */
template <int LANES> struct packed_squares {
    float4 part[PACKED_PARTS / 4 / LANES];
};

template <int LANES>
static __device__ __forceinline__ void hold_squares(struct packed_squares<LANES> *h,
                                                    const struct packed_rows &p, int row, bool here)
{
    const float4 *const parts =
        reinterpret_cast<const float4 *>(p.squares + (int64_t)row * p.n_parts);
#pragma unroll
    for (int k = 0; k < PACKED_PARTS / 4 / LANES; k++) {
        const int i = threadIdx.x % LANES + k * LANES;
        h->part[k] = make_float4(0, 0, 0, 0);
        if (here && i < p.n_parts / 4)
            h->part[k] = __ldcg(parts + i);
    }
}

/* What norms the row, to all of its lanes; all lanes of a warp call. */
template <int LANES>
static __device__ __forceinline__ float scale_of_squares(const struct packed_squares<LANES> &h,
                                                         const struct packed_rows &p)
{
    float sum = 0;
#pragma unroll
    for (int k = 0; k < PACKED_PARTS / 4 / LANES; k++)
        sum += (h.part[k].x + h.part[k].y) + (h.part[k].z + h.part[k].w);
#pragma unroll
    for (int o = LANES / 2; o; o >>= 1)
        sum += __shfl_xor_sync(0xffffffffu, sum, o);
    return norm_scale(sum, p.n, p.eps);
}

/* The same of rows that are not packed: by value to a kernel. */
struct row_factors {
    float *squares; /* [rows, n_parts] sums of squares before the weight; NULL: no factors */
    int n_parts, n; /* n: values of a row */
    float eps;
};

/* One warp: the factor of a row, 1 where there are none. All loads are in flight together. */
static __device__ __forceinline__ float factor_of_row(const struct row_factors &f, int row)
{
    enum { AT_ONCE = 9 }; /* 2,304 values in parts of 8 */
    if (!f.squares)
        return 1;
    const float *const squares = f.squares + (int64_t)row * f.n_parts;
    float sum = 0;
    for (int first = threadIdx.x % WARP; first < f.n_parts; first += AT_ONCE * WARP) {
        float part[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++)
            part[k] = first + k * WARP < f.n_parts ? squares[first + k * WARP] : 0;
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++)
            sum += part[k];
    }
    return norm_scale(warp_sum(sum), f.n, f.eps);
}

/* Two values that follow each other, from an even column on. */
static __device__ __forceinline__ void packed_store(bf16 *values, int n, int row, int column,
                                                    float x, float y)
{
    *reinterpret_cast<__nv_bfloat162 *>(values + packed_at(row, column, n)) =
        __floats2bfloat162_rn(x, y);
}

#endif
