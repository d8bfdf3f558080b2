/* packed.cuh - activations in the order in which the lanes of a warp hold them as factors of
 * products on the tensor cores (mma_bf16's a; wgmma_rows's, warpgroup.cuh).
 *
 * [row tiles of 64][n / 16 steps][4 warps][32 lanes][8 values] bf16: what a lane multiplies in a
 * step of 16 columns is 16 bytes, and a warp's 16 rows are 512 bytes that follow each other. So a
 * product takes its rows straight to registers, with one load a step, and needs shared memory for
 * its weights alone.
 *
 * A row may be unnormed: values are x * weight, and the row's squares are added up elsewhere, so
 * that what norms it, a factor of the row, is applied to results. Then nothing stands between the
 * product that ends one sublayer and the product that begins the next.
 */
#ifndef LATTE_CUDA_PACKED_CUH
#define LATTE_CUDA_PACKED_CUH

#include "engine/kernels/cuda/math.cuh"

enum {
    PACKED_ROWS = 64,                           /* of a tile */
    PACKED_COLUMNS = 16,                        /* of a step */
    PACKED_STEP = PACKED_ROWS * PACKED_COLUMNS, /* values of a tile's step */
    PACKED_WARP = PACKED_STEP / 4,              /* of a warp's part of it: 16 rows */
    PACKED_LANE = PACKED_WARP / WARP,           /* of a lane's */
    PACKED_PARTS = 48,                          /* of a row's squares at most, for hold_squares */
};

/* By value to a kernel. */
struct packed_rows {
    bf16 *values; /* packed_values; rows beyond the step's hold anything */
    int n;        /* values of a row, a multiple of PACKED_COLUMNS */
    /* Sums of squares of each row before its weight, in parts: [rows, n_parts]; NULL: the rows
     * are what is to be multiplied. */
    float *squares;
    int n_parts; /* a multiple of 4 */
    float eps;   /* of the norm */
};

/* Of so many rows, those of a block that has twice PACKED_ROWS included. */
static inline __host__ __device__ int64_t packed_values(int rows, int n)
{
    return (int64_t)((rows + 2 * PACKED_ROWS - 1) / (2 * PACKED_ROWS)) * 2 * PACKED_ROWS * n;
}

/* Where the value of a row and column lies. Lane 4 g + t has, of a warp's 16 rows, row g's columns
 * 2 t and 2 t + 1, row g + 8's, then both rows' columns 8 on. */
static inline __host__ __device__ int64_t packed_at(int row, int column, int n)
{
    const int64_t step =
        (int64_t)(row / PACKED_ROWS) * (n / PACKED_COLUMNS) + column / PACKED_COLUMNS;
    const int warp = row % PACKED_ROWS / 16, lane = row % 8 * 4 + column % 8 / 2;
    return step * PACKED_STEP + warp * PACKED_WARP + lane * PACKED_LANE + column % 16 / 8 * 4 +
           row % 16 / 8 * 2 + column % 2;
}

/* The squares of a row that LANES lanes, which follow each other, hold until they are there. */
template <int LANES> struct packed_squares {
    static constexpr int n = (PACKED_PARTS / 4 + LANES - 1) / LANES; /* of a lane */
    float4 part[n];
};

template <int LANES>
static __device__ __forceinline__ void hold_squares(struct packed_squares<LANES> *h,
                                                    const struct packed_rows &p, int row, bool here)
{
    const float4 *const parts =
        reinterpret_cast<const float4 *>(p.squares + (int64_t)row * p.n_parts);
#pragma unroll
    for (int k = 0; k < packed_squares<LANES>::n; k++) {
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
    for (int k = 0; k < packed_squares<LANES>::n; k++)
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

/* The same of a row and, if `both`, of the row 8 on, as a product leaves them; row % 16 < 8. */
static __device__ __forceinline__ void packed_store_rows(bf16 *values, int n, int row, int column,
                                                         float2 first, float2 second, bool both)
{
    const __nv_bfloat162 pair[2] = {__floats2bfloat162_rn(first.x, first.y),
                                    __floats2bfloat162_rn(second.x, second.y)};
    bf16 *const to = values + packed_at(row, column, n);
    if (both)
        *reinterpret_cast<uint2 *>(to) = reinterpret_cast<const uint2 &>(pair);
    else
        *reinterpret_cast<__nv_bfloat162 *>(to) = pair[0];
}

/* By whole warps, whose lanes have 4 columns of a row each: x * weight, and squares in parts of 8
 * or 16 columns. */
static __device__ __forceinline__ void packed_leave(const struct packed_rows &to, int row,
                                                    int column, float4 x, float4 weight)
{
    const int part = to.n / to.n_parts;
    float square = square_sum(x, 0);
    square += __shfl_xor_sync(0xffffffffu, square, 1);
    const float others = __shfl_xor_sync(0xffffffffu, square, 2);
    packed_store(to.values, to.n, row, column, x.x * weight.x, x.y * weight.y);
    packed_store(to.values, to.n, row, column + 2, x.z * weight.z, x.w * weight.w);
    if (column % part == 0)
        to.squares[row * to.n_parts + column / part] = part > 8 ? square + others : square;
}

#endif
