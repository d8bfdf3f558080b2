/* rglru.cuh - the RG-LRU of one row per sequence, from the residual stream to the state, as a
 * piece of a kernel: rglru.cu launches it alone, front.cu beside a product. Packed rows have a
 * piece of their own, warpgroup_gates.cuh, which takes the terms of two channels from here.
 *
 * The work is cut into items: 16, 32 or 64 rows x n_tiles * 8 channels of one block of the gates.
 * An item belongs to one thread block; a warp has 16 of the rows and every so-manieth 8 channels.
 * The item's gate weights are rounded to bf16 on their way to shared memory, and the products run
 * on tensor cores with f32 sums over k in order; prompts (rglru.cu) do the same arithmetic, so
 * that a row has the same bits either way.
 *
 * What an item waits for is a chain of two loads, slot then state; rows, weights and constants
 * come beside it. Bytes of a layer at R rows: the gates' 8 D^2 / B once per item's rows (from L2
 * after the first), h [R, D] once per group of channels, state and z [R, D] once: 0.6 MB of
 * weights and 10 KB a row at D = 768, B = 8; the floor is 0.2 us for the weights.
 */
#ifndef LATTE_CUDA_RGLRU_CUH
#define LATTE_CUDA_RGLRU_CUH

#include "engine/kernels/cuda/fused.cuh"
#include "engine/kernels/cuda/math.cuh"

enum { RGLRU_ROWS = 16 };

/* By value to a kernel. */
struct rglru_decode {
    struct rglru_front f;
    const struct step_sizes *sizes;
    const int64_t *positions; /* [rows] */
    const int32_t *seq_slot;  /* [rows]: row r is sequence r */
    int rows;                 /* of the bucket: so many rows of x and the arrays may be read */
    int n_tiles;              /* of 8 channels, in an item */
    int row_tiles;            /* of 16 rows, in an item: 1, 2 or 4 */
};

/* Columns of a staged row: the block's width rounded up to what an mma takes, and 8 more, which
 * put 8 neighbouring rows into different banks. */
static inline __host__ __device__ int rglru_stride(int width)
{
    return (width + 15) / 16 * 16 + 8;
}

static inline __host__ __device__ int rglru_groups(const struct rglru_decode *d)
{
    const int tiles = d->f.dim / d->f.n_blocks / 8;
    return (tiles + d->n_tiles - 1) / d->n_tiles; /* of channels, in a block of the gates */
}

/* Items of the step: blocks that the grid needs. */
static inline __host__ __device__ int rglru_items(const struct rglru_decode *d)
{
    const int rows = RGLRU_ROWS * d->row_tiles;
    return (d->rows + rows - 1) / rows * d->f.n_blocks * rglru_groups(d);
}

/* Shared memory that an item takes, 16-byte aligned: rows, weights, constants, the norm. */
static inline __host__ __device__ size_t rglru_shared_bytes(const struct rglru_decode *d)
{
    const int stride = rglru_stride(d->f.dim / d->f.n_blocks);
    return (size_t)(RGLRU_ROWS * d->row_tiles + 2 * 8 * d->n_tiles) * stride * sizeof(bf16) +
           (size_t)d->n_tiles * 8 * 3 * sizeof(float) + (size_t)stride * 2 * sizeof(float);
}

/* The shapes that rglru_item can do: widths D/B that are multiples of 8 up to 512. */
static inline bool rglru_possible(const struct rglru_front *f)
{
    const int width = f->dim / f->n_blocks;
    return (f->h || f->norm.weight) && f->dim % f->n_blocks == 0 && width % 8 == 0 && width <= 512;
}

/* How the step's rows are cut: tall items, as rows are fewer bytes than weights, and of as few
 * channels as lets two items a processor do the step at once. */
static inline struct rglru_decode rglru_decode_of(const struct cuda *c, const struct rglru_front *f)
{
    enum { MOST_BYTES = 96 * 1024 };
    const int width = f->dim / f->n_blocks, tiles = width / 8;
    const int rows = ceil_div(c->step.rows, RGLRU_ROWS);
    const int row_tiles = rows > 2 ? 4 : rows;
    const int most = MOST_BYTES / (rglru_stride(width) * (int)sizeof(bf16));
    const int room = (most - RGLRU_ROWS * row_tiles) / 16;
    int n = ceil_div(rows * f->n_blocks * tiles, row_tiles * 2 * c->queue.n_sms);
    n = n > room ? room : n;
    n = n < 1 ? 1 : n > 12 ? 12 : n;
    n = n > tiles ? tiles : n;
    n = ceil_div(tiles, ceil_div(tiles, n)); /* groups alike */
    return {*f, c->step.sizes, c->step.positions, c->step.seq_slot, c->step.rows, n, row_tiles};
}

/* recurrence.cu. c->piece_states has for piece p of a sequence of several the product A [D] of its
 * a, then its end Z [D] from zero; A becomes what the piece starts from, and the sequence's state
 * its end. A first piece may give A = 0 and its end from the state. */
void rglru_scan(struct cuda *c, struct device_slab<float> state, int dim);

/* ---- the arithmetic, shared with prompts ---- */

/* Constants of a channel. Exponents are of 2: rate = -8 softplus(lambda) log2(e), a = 2^(rate r);
 * biases are times -log2(e), as a sigmoid wants them. */
struct rglru_channel {
    float rate, r_bias, i_bias;
};

static __device__ __forceinline__ struct rglru_channel rglru_channel_of(const struct rglru_front &f,
                                                                        int channel)
{
    const float lambda = __ldg(f.lambda + channel), log2_e = 1.44269504f;
    const float softplus = lambda > 20 ? lambda : log1pf(expf(lambda));
    return {-8 * log2_e * softplus,
            f.recurrence_bias ? -log2_e * __ldg(f.recurrence_bias + channel) : 0,
            f.input_bias ? -log2_e * __ldg(f.input_bias + channel) : 0};
}

/* a and b of z_t = a z_{t-1} + b, from the gates' products with h. 1 - a^2 = 1 - 2^(2 exponent) is
 * a polynomial where it would cancel, good to 2e-7. begins: position 0, no past and multiplier 1.
 */
static __device__ __forceinline__ float2 rglru_terms(float r, float i, float h,
                                                     const struct rglru_channel &c, bool begins)
{
    const float r_gate = quick_reciprocal(1 + quick_exp2(fmaf(r, -1.44269504f, c.r_bias)));
    const float i_gate = quick_reciprocal(1 + quick_exp2(fmaf(i, -1.44269504f, c.i_bias)));
    const float exponent = c.rate * r_gate, gated = i_gate * h, a = quick_exp2(exponent);
    float small = fmaf(exponent, -0.0347420424f, -0.151484966f);
    small = fmaf(exponent, small, -0.443728805f);
    small = fmaf(exponent, small, -0.960892439f);
    small = fmaf(exponent, small, -1.38629425f) * exponent;
    const float rest = exponent > -0.36f ? small : fmaf(-a, a, 1);
    return begins ? make_float2(0, gated) : make_float2(a, quick_sqrt(rest) * gated);
}

/* n rows [n, width] of each gate's f32 weights to bf16 [2 n, stride] in shared memory, the
 * recurrence gate's first; zeros in the columns from width to stride - 8. AT_ONCE loads of a thread
 * go out before anything is stored. */
template <int AT_ONCE>
static __device__ __forceinline__ void rglru_stage(bf16 *to, const float *recurrence,
                                                   const float *input, int n, int width, int stride)
{
    const unsigned quads = (unsigned)(stride - 8) / 4, total = 2 * n * quads;
    for (unsigned from = threadIdx.x; from < total; from += AT_ONCE * blockDim.x) {
        float4 w[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            const unsigned at = from + k * blockDim.x;
            const int row = at / quads, i = at % quads * 4;
            const float *weights = row < n ? recurrence : input - (size_t)n * width;
            w[k] = make_float4(0, 0, 0, 0);
            if (at < total && i < width)
                w[k] = __ldg(reinterpret_cast<const float4 *>(weights + (size_t)row * width + i));
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            const unsigned at = from + k * blockDim.x;
            if (at >= total)
                break;
            __nv_bfloat162 *out =
                reinterpret_cast<__nv_bfloat162 *>(to + at / quads * stride + at % quads * 4);
            out[0] = __floats2bfloat162_rn(w[k].x, w[k].y);
            out[1] = __floats2bfloat162_rn(w[k].z, w[k].w);
        }
    }
}

/* Both gates' products of 16 rows of h with 8 channels, in the layout of an mma's d; recurrence and
 * input are the channels' staged weights. */
static __device__ __forceinline__ void rglru_products(float (&r)[4], float (&i)[4], const bf16 *h,
                                                      const bf16 *recurrence, const bf16 *input,
                                                      int stride)
{
    const int lane = threadIdx.x % WARP, row = lane % 8;
    const bf16 *a_at = h + (row + lane / 8 % 2 * 8) * stride + lane / 16 * 8;
    const bf16 *b_at = (lane < 16 ? recurrence : input) + row * stride + lane / 8 % 2 * 8;
#pragma unroll
    for (int j = 0; j < 4; j++)
        r[j] = i[j] = 0;
#pragma unroll 2
    for (int k = 0; k < stride - 8; k += 16) {
        uint32_t a[4], b[4];
        ldmatrix_x4(a, a_at + k);
        ldmatrix_x4(b, b_at + k);
        mma_bf16(r, a, b);
        mma_bf16(i, a, b + 2);
    }
}

/* Two channels' terms of one row, from a lane's products (r, i at j and j + 1). scale: what norms
 * the row, where it is not normed (warpgroup_gates.cuh). */
static __device__ __forceinline__ float4 rglru_pair(const float *r, const float *i, const bf16 *h,
                                                    const struct rglru_channel (&c)[2], bool begins,
                                                    float scale = 1)
{
    const float2 x = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162 *>(h));
    const float2 u = rglru_terms(r[0] * scale, i[0] * scale, x.x * scale, c[0], begins);
    const float2 v = rglru_terms(r[1] * scale, i[1] * scale, x.y * scale, c[1], begins);
    return make_float4(u.x, u.y, v.x, v.y);
}

/* ---- an item ---- */

/* A lane's rows, g and g + 8 of its warp's 16. */
struct rglru_lane {
    bool here[2], begins[2];
    int64_t state[2]; /* offsets of the rows' slots */
};

static __device__ __forceinline__ void rglru_locate(struct rglru_lane *at,
                                                    const struct rglru_decode &d, int row0)
{
    const int n_rows = d.sizes->n_rows;
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const int row = row0 + threadIdx.x % WARP / 4 + 8 * j;
        const int any = row < d.rows ? row : d.rows - 1; /* read while n_rows is on its way */
        at->begins[j] = d.positions[any] == 0;
        at->state[j] = (int64_t)d.seq_slot[any] * d.f.state.row_values;
        at->here[j] = row < n_rows;
    }
}

static __device__ __forceinline__ void rglru_past(float2 past[2], const struct rglru_decode &d,
                                                  const struct rglru_lane &at, int channel)
{
#pragma unroll
    for (int j = 0; j < 2; j++) {
        past[j] = make_float2(0, 0);
        if (at.here[j] && !at.begins[j]) /* a fresh slot may hold anything */
            past[j] = *reinterpret_cast<const float2 *>(d.f.state.data + at.state[j] + channel);
    }
}

/* h: the item's columns of n normed rows from row0 on, as bf16; zeros beyond the bucket's rows.
 * weight, bias: the columns' part of the norm. The first row is the last warp's: the first warps
 * have states to fetch. */
static __device__ __forceinline__ void rglru_norm_rows(bf16 *h, const struct rglru_decode &d,
                                                       int row0, int n, int first, int width,
                                                       int stride, const float *weight,
                                                       const float *bias)
{
    const struct rglru_front &f = d.f;
    const int lane = threadIdx.x % WARP, n_warps = blockDim.x / WARP;
    for (int r = n_warps - 1 - threadIdx.x / WARP; r < n; r += n_warps) {
        const bool here = row0 + r < d.rows;
        const float *x = f.x + (int64_t)(row0 + r) * f.dim;
        struct row_scale s = {0, 0};
        if (here)
            s = read_scale(x, f.dim, f.norm.type == NORM_LAYER, f.norm.eps);
        for (int i = lane; i < stride - 8; i += WARP) {
            float y = 0;
            if (here && i < width)
                y = normed(x[first + i], s, weight[i], bias[i]);
            h[r * stride + i] = __float2bfloat16_rn(y);
        }
    }
}

/* The same from rows that were normed before, in the background. */
static __device__ __forceinline__ void rglru_take_rows(bf16 *h, const struct rglru_decode &d,
                                                       int row0, int n, int first, int width,
                                                       int stride)
{
    const unsigned chunks = (unsigned)(stride - 8) / 8;
    for (unsigned at = threadIdx.x; at < n * chunks; at += blockDim.x) {
        const int r = at / chunks, i = at % chunks * 8;
        const bool here = row0 + r < d.rows && i < width;
        const bf16 *from = d.f.h + (here ? (int64_t)(row0 + r) * d.f.dim + first + i : 0);
        copy_async_16(h + r * stride + i, from, here);
    }
    copy_async_commit();
}

/* Two channels of z of a row, for the product that comes; all lanes of a warp. */
static __device__ __forceinline__ void rglru_weigh(const struct rglru_front &f, float2 z,
                                                   const float *weight, int row, int channel,
                                                   bool here)
{
    float square = fmaf(z.x, z.x, z.y * z.y);
    square += __shfl_xor_sync(0xffffffffu, square, 1);
    square += __shfl_xor_sync(0xffffffffu, square, 2);
    if (!here)
        return;
    *reinterpret_cast<__nv_bfloat162 *>(f.weighted + (int64_t)row * f.dim + channel) =
        __floats2bfloat162_rn(z.x * weight[0], z.y * weight[1]);
    if (threadIdx.x % 4 == 0)
        f.factors.squares[row * f.factors.n_parts + channel / 8] = square;
}

/* One lane's part of a tile: z of two rows and two channels, to the state and to z. h: the
 * warp's rows; constants and weight, out_weight's part: the channels'. */
static __device__ __forceinline__ void
rglru_tile(const struct rglru_decode &d, const struct rglru_lane &at, const float2 past[2],
           const bf16 *h, const bf16 *recurrence, const bf16 *input,
           const struct rglru_channel *constants, const float *weight, int row0, int first,
           int channel, int stride)
{
    const struct rglru_front &f = d.f;
    const int lane = threadIdx.x % WARP;
    const struct rglru_channel c[2] = {constants[0], constants[1]};
    float r[4], i[4];
    rglru_products(r, i, h, recurrence, input, stride);
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const int row = lane / 4 + 8 * j;
        const bf16 *const own = h + row * stride + channel - first;
        const float4 t = rglru_pair(r + 2 * j, i + 2 * j, own, c, at.begins[j]);
        const float2 z = make_float2(fmaf(t.x, past[j].x, t.y), fmaf(t.z, past[j].y, t.w));
        if (at.here[j]) {
            *reinterpret_cast<float2 *>(f.state.data + at.state[j] + channel) = z;
            if (!f.weighted)
                *reinterpret_cast<float2 *>(f.z + (int64_t)(row0 + row) * f.dim + channel) = z;
        }
        if (f.weighted)
            rglru_weigh(f, z, weight, row0 + row, channel, at.here[j]);
    }
}

/* Item `item` of rglru_items. Decode steps only. Calls pdl_wait itself, after it has fetched its
 * weights and read the step's arrays, which are there before; no thread of the block may have
 * returned before. shared: rglru_shared_bytes. The block has a multiple of 4 warps; AT_ONCE: tiles
 * whose states a lane asks for at a time. */
template <int AT_ONCE>
static __device__ __forceinline__ void rglru_item(const struct rglru_decode &d, int item,
                                                  unsigned char *shared)
{
    const struct rglru_front &f = d.f;
    const int width = f.dim / f.n_blocks, stride = rglru_stride(width);
    const int groups = rglru_groups(&d), group = item % groups;
    const int first = item / groups % f.n_blocks * width, out0 = group * d.n_tiles * 8;
    const int n = RGLRU_ROWS * d.row_tiles, row0 = item / groups / f.n_blocks * n;
    const int left = (width - out0) / 8, n_tiles = left < d.n_tiles ? left : d.n_tiles;
    bf16 *const h = reinterpret_cast<bf16 *>(shared);
    bf16 *const weights = h + n * stride;
    struct rglru_channel *const constants =
        reinterpret_cast<struct rglru_channel *>(weights + 2 * 8 * d.n_tiles * stride);
    float *const norm_weight = reinterpret_cast<float *>(constants + 8 * d.n_tiles);
    float *const norm_bias = norm_weight + stride;
    float *const out_weight = norm_weight; /* of the item's channels: no norm here, then */
    const bool normed = f.h;

    const size_t from = (size_t)(first + out0) * width;
    rglru_stage<4>(weights, f.recurrence_gate + from, f.input_gate + from, n_tiles * 8, width,
                   stride);
    for (int i = threadIdx.x; i < n_tiles * 8; i += blockDim.x)
        constants[i] = rglru_channel_of(f, first + out0 + i);
    for (int i = threadIdx.x; f.out_weight && i < n_tiles * 8; i += blockDim.x)
        out_weight[i] = __ldg(f.out_weight + first + out0 + i);
    for (int i = threadIdx.x; !normed && i < width; i += blockDim.x) {
        norm_weight[i] = __ldg(f.norm.weight + first + i);
        norm_bias[i] = f.norm.bias ? __ldg(f.norm.bias + first + i) : 0;
    }
    if (!normed)
        __syncthreads();

    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int my_row = warp % d.row_tiles * RGLRU_ROWS, step = blockDim.x / WARP / d.row_tiles;
    struct rglru_lane at = {};
    if (warp / d.row_tiles < n_tiles)
        rglru_locate(&at, d, row0 + my_row);

    pdl_wait();
    if (normed)
        rglru_take_rows(h, d, row0, n, first, width, stride);
    bool ready = false;
    for (int tile0 = warp / d.row_tiles; !ready || tile0 < n_tiles; tile0 += AT_ONCE * step) {
        float2 past[AT_ONCE][2];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            if (tile0 + k * step < n_tiles)
                rglru_past(past[k], d, at, first + out0 + (tile0 + k * step) * 8 + lane % 4 * 2);
        }
        if (!ready) {
            if (normed)
                copy_async_wait<0>();
            else
                rglru_norm_rows(h, d, row0, n, first, width, stride, norm_weight, norm_bias);
            __syncthreads();
            ready = true;
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            const int tile = tile0 + k * step, column = tile * 8 + lane % 4 * 2;
            if (tile < n_tiles)
                rglru_tile(d, at, past[k], h + my_row * stride, weights + tile * 8 * stride,
                           weights + (n_tiles + tile) * 8 * stride, constants + column,
                           out_weight + column, row0 + my_row, first, first + out0 + column,
                           stride);
        }
    }
}

#endif
