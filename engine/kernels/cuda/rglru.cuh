/* rglru.cuh - the RG-LRU of one row per sequence, from the residual stream to the state, as a
 * piece of a kernel: rglru.cu launches it alone, front.cu beside a product.
 *
 * The work is cut into items: 16 rows (or a few times 16) x n_tiles * 8 channels of one block of
 * the gates. An item
 * belongs to one thread block of any number of warps. The item's gate weights are rounded to
 * bf16 on their way to shared memory, and the products run on tensor cores with f32 sums over k
 * in order; prompts (rglru.cu) do the same arithmetic, so that a row has the same bits
 * either way.
 *
 * Bytes of a layer at R rows: the gates' 8 D^2 / B once per 16 rows (from L2 after the first),
 * x [R, D] once per group of channels, state and z [R, D] once: 0.6 MB of weights and 9 KB a row
 * at D = 768, B = 8; the floor is 0.2 us for the weights.
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
    int row_tiles = 1;        /* of 16 rows, in an item, one after the other */
    const bf16 *h = nullptr;  /* [rows, D] = bf16(norm(x)); NULL: the items norm x themselves */
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

/* Shared memory that an item takes, 16-byte aligned. */
static inline __host__ __device__ size_t rglru_shared_bytes(const struct rglru_decode *d)
{
    const int stride = rglru_stride(d->f.dim / d->f.n_blocks);
    return (size_t)(RGLRU_ROWS + 2 * 8 * d->n_tiles) * stride * sizeof(bf16);
}

/* The shapes that rglru_item can do: widths D/B that are multiples of 8 up to 512. */
static inline bool rglru_possible(const struct rglru_front *f)
{
    const int width = f->dim / f->n_blocks;
    return f->norm.weight && f->dim % f->n_blocks == 0 && width % 8 == 0 && width <= 512;
}

/* How the step's rows are cut: few channels an item while there are few rows, so that all
 * processors read weights; many when there are many, so that rows are read less often. */
static inline struct rglru_decode rglru_decode_of(const struct cuda *c, const struct rglru_front *f)
{
    enum { MOST_BYTES = 96 * 1024 };
    const int width = f->dim / f->n_blocks, tiles = width / 8, n_sms = c->queue.n_sms;
    const int row_tiles = (c->step.rows + RGLRU_ROWS - 1) / RGLRU_ROWS;
    const int room = (MOST_BYTES / (rglru_stride(width) * (int)sizeof(bf16)) - RGLRU_ROWS) / 16;
    int n = row_tiles * f->n_blocks * tiles / n_sms;
    n = n < 1 ? 1 : n > room ? room : n;
    n = n > 16 ? 16 : n > tiles ? tiles : n;
    const int groups = (tiles + n - 1) / n; /* alike, then */
    n = (tiles + groups - 1) / groups;

    struct rglru_decode d = {*f, c->step.sizes, c->step.positions, c->step.seq_slot, c->step.rows,
                             n};
    d.row_tiles = rglru_items(&d) * 2 / (3 * n_sms);
    d.row_tiles = d.row_tiles < 1 ? 1 : d.row_tiles > 4 ? 4 : d.row_tiles;
    return d;
}

/* ---- pieces of prompts ---- */

/* How a piece lies in its sequence. */
struct rglru_place {
    struct piece piece;
    int32_t slot;
    bool alone, last; /* its sequence's only piece; its last */
    bool begins;      /* its first row has position 0 */
};

static __device__ __forceinline__ struct rglru_place rglru_place_of(const struct device_step &step,
                                                                    int p)
{
    struct rglru_place at;
    at.piece = step.pieces[p];
    const int start = step.seq_start[at.piece.seq], end = step.seq_start[at.piece.seq + 1];
    at.slot = step.seq_slot[at.piece.seq];
    at.alone = end - start <= PIECE_ROWS;
    at.last = at.piece.row + at.piece.n_rows == end;
    at.begins = step.positions[at.piece.row] == 0;
    return at;
}

/* recurrence.cu. c->piece_states has for piece p the product A [D] of its a, then its end Z [D]
 * from zero, save for last pieces; in sequences of several pieces A becomes what the piece starts
 * from. */
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

/* a and b of z_t = a z_{t-1} + b, from the gates' products with h. Both sigmoids share a
 * reciprocal: 2^60 is as good as infinity there. 1 - a^2 = 1 - e^-t is a series in t where it
 * would cancel. begins: position 0, no past and multiplier 1. */
static __device__ __forceinline__ float2 rglru_terms(float r, float i, float h,
                                                     const struct rglru_channel &c, bool begins)
{
    const float one_r = 1 + quick_exp2(fminf(fmaf(r, -1.44269504f, c.r_bias), 60));
    const float one_i = 1 + quick_exp2(fminf(fmaf(i, -1.44269504f, c.i_bias), 60));
    const float inverse = quick_reciprocal(one_r * one_i);
    const float exponent = c.rate * (inverse * one_i), gated = inverse * one_r * h;
    const float a = quick_exp2(exponent), t = -2 * 0.69314718f * exponent;
    float series = fmaf(t, -1.f / 5040, 1.f / 720);
    series = fmaf(t, series, -1.f / 120);
    series = fmaf(t, series, 1.f / 24);
    series = fmaf(t, series, -1.f / 6);
    series = fmaf(t, series, 0.5f);
    series = fmaf(t, -series, 1) * t;
    const float rest = t < 0.5f ? series : fmaf(-a, a, 1);
    return begins ? make_float2(0, gated) : make_float2(a, quick_sqrt(rest) * gated);
}

/* n rows [n, width] of f32 weights to bf16 [n, stride] in shared memory; zeros in the columns
 * from width to stride - 8. */
static __device__ __forceinline__ void rglru_stage(bf16 *to, const float *from, int n, int width,
                                                   int stride)
{
    const int quads = (stride - 8) / 4;
#pragma unroll 4
    for (int at = threadIdx.x; at < n * quads; at += blockDim.x) {
        const int row = at / quads, i = at % quads * 4;
        float4 w = make_float4(0, 0, 0, 0);
        if (i < width)
            w = __ldg(reinterpret_cast<const float4 *>(from + (size_t)row * width + i));
        __nv_bfloat162 *out = reinterpret_cast<__nv_bfloat162 *>(to + row * stride + i);
        out[0] = __floats2bfloat162_rn(w.x, w.y);
        out[1] = __floats2bfloat162_rn(w.z, w.w);
    }
}

/* Both gates' products of 16 rows of h with TILES times 8 channels, in the layout of an mma's d;
 * recurrence and input are the channels' staged weights. */
template <int TILES>
static __device__ __forceinline__ void rglru_products(float (&r)[TILES][4], float (&i)[TILES][4],
                                                      const bf16 *h, const bf16 *recurrence,
                                                      const bf16 *input, int stride)
{
    const int lane = threadIdx.x % WARP, row = lane % 8;
    const bf16 *a_at = h + (row + lane / 8 % 2 * 8) * stride + lane / 16 * 8;
    const bf16 *b_at = (lane < 16 ? recurrence : input) + row * stride + lane / 8 % 2 * 8;
#pragma unroll
    for (int n = 0; n < TILES; n++) {
#pragma unroll
        for (int j = 0; j < 4; j++)
            r[n][j] = i[n][j] = 0;
    }
#pragma unroll 2
    for (int k = 0; k < stride - 8; k += 16) {
        uint32_t a[4];
        ldmatrix_x4(a, a_at + k);
#pragma unroll
        for (int n = 0; n < TILES; n++) {
            uint32_t b[4];
            ldmatrix_x4(b, b_at + n * 8 * stride + k);
            mma_bf16(r[n], a, b);
            mma_bf16(i[n], a, b + 2);
        }
    }
}

/* Two channels' terms of one row, from a lane's products (r, i at j and j + 1). */
static __device__ __forceinline__ float4 rglru_pair(const float *r, const float *i, const bf16 *h,
                                                    const struct rglru_channel (&c)[2], bool begins)
{
    const float2 x = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162 *>(h));
    const float2 u = rglru_terms(r[0], i[0], x.x, c[0], begins);
    const float2 v = rglru_terms(r[1], i[1], x.y, c[1], begins);
    return make_float4(u.x, u.y, v.x, v.y);
}

/* ---- an item ---- */

/* A lane's four values of a tile: rows g and g + 8, two channels. */
struct rglru_lane {
    bool here[2], begins[2]; /* of its rows */
    int64_t state[2];        /* offsets of the rows' slots */
};

static __device__ __forceinline__ void
rglru_locate(struct rglru_lane *at, const struct rglru_decode &d, int row0, int n_rows)
{
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const int row = row0 + threadIdx.x % WARP / 4 + 8 * j;
        const int any = row < d.rows ? row : d.rows - 1; /* read while n_rows is on its way */
        at->here[j] = row < n_rows;
        at->begins[j] = d.positions[any] == 0;
        at->state[j] = (int64_t)d.seq_slot[any] * d.f.state.row_values;
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

/* h: columns first..first+width of 16 normed rows from row0 on, as bf16; zeros beyond n_rows. */
static __device__ __forceinline__ void rglru_norm_rows(bf16 *h, const struct rglru_front &f,
                                                       int row0, int n_rows, int first, int width,
                                                       int stride)
{
    const int lane = threadIdx.x % WARP;
    for (int r = threadIdx.x / WARP; r < RGLRU_ROWS; r += blockDim.x / WARP) {
        const bool here = row0 + r < n_rows;
        const float *x = f.x + (int64_t)(row0 + r) * f.dim;
        struct row_scale s = {0, 0};
        if (here)
            s = read_scale(x, f.dim, f.norm.type == NORM_LAYER, f.norm.eps);
        for (int i = lane; i < stride - 8; i += WARP) {
            float y = 0;
            if (here && i < width) {
                const int c = first + i;
                y = normed(x[c], s, __ldg(f.norm.weight + c),
                           f.norm.bias ? __ldg(f.norm.bias + c) : 0);
            }
            h[r * stride + i] = __float2bfloat16_rn(y);
        }
    }
}

/* The same from rows that were normed before. */
static __device__ __forceinline__ void rglru_take_rows(bf16 *h, const struct rglru_decode &d,
                                                       int row0, int n_rows, int first, int width,
                                                       int stride)
{
    const int chunks = (stride - 8) / 8;
    for (int at = threadIdx.x; at < RGLRU_ROWS * chunks; at += blockDim.x) {
        const int r = at / chunks, i = at % chunks * 8;
        uint4 v = make_uint4(0, 0, 0, 0);
        if (row0 + r < n_rows && i < width)
            v = *reinterpret_cast<const uint4 *>(d.h + (int64_t)(row0 + r) * d.f.dim + first + i);
        *reinterpret_cast<uint4 *>(h + r * stride + i) = v;
    }
}

/* One lane's part of a tile: z of two rows and two channels, to the state and to z. */
static __device__ __forceinline__ void rglru_tile(const struct rglru_decode &d,
                                                  const struct rglru_lane &at, const float2 past[2],
                                                  const bf16 *h, const bf16 *recurrence,
                                                  const bf16 *input, int row0, int first,
                                                  int channel, int stride)
{
    const struct rglru_front &f = d.f;
    const int lane = threadIdx.x % WARP;
    const struct rglru_channel c[2] = {rglru_channel_of(f, channel),
                                       rglru_channel_of(f, channel + 1)};
    float r[1][4], i[1][4];
    rglru_products<1>(r, i, h, recurrence, input, stride);
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const int row = lane / 4 + 8 * j;
        const float4 t = rglru_pair(r[0] + 2 * j, i[0] + 2 * j, h + row * stride + channel - first,
                                    c, at.begins[j]);
        const float2 z = make_float2(fmaf(t.x, past[j].x, t.y), fmaf(t.z, past[j].y, t.w));
        if (at.here[j]) {
            *reinterpret_cast<float2 *>(f.state.data + at.state[j] + channel) = z;
            *reinterpret_cast<float2 *>(f.z + (int64_t)(row0 + row) * f.dim + channel) = z;
        }
    }
}

/* Item `item` of rglru_items. Decode steps only. Calls pdl_wait itself, after it has fetched its
 * weights; no thread of the block may have returned before. shared: rglru_shared_bytes. */
static __device__ __forceinline__ void rglru_item(const struct rglru_decode &d, int item,
                                                  unsigned char *shared)
{
    const struct rglru_front &f = d.f;
    const int width = f.dim / f.n_blocks, stride = rglru_stride(width);
    const int groups = rglru_groups(&d), group = item % groups;
    const int first = item / groups % f.n_blocks * width, out0 = group * d.n_tiles * 8;
    const int row_tile = item / groups / f.n_blocks * d.row_tiles;
    const int left = (width - out0) / 8, n_tiles = left < d.n_tiles ? left : d.n_tiles;
    bf16 *const h = reinterpret_cast<bf16 *>(shared);
    bf16 *const recurrence = h + RGLRU_ROWS * stride;
    bf16 *const input = recurrence + d.n_tiles * 8 * stride;

    const size_t weights = (size_t)(first + out0) * width;
    rglru_stage(recurrence, f.recurrence_gate + weights, n_tiles * 8, width, stride);
    rglru_stage(input, f.input_gate + weights, n_tiles * 8, width, stride);

    pdl_wait();
    const int warp = threadIdx.x / WARP, n_warps = blockDim.x / WARP;
    const int mine = first + out0 + warp * 8 + threadIdx.x % 4 * 2;
    const int n_rows = d.sizes->n_rows;
    for (int t = row_tile; t < row_tile + d.row_tiles; t++) {
        const int row0 = t * RGLRU_ROWS;
        if (row0 >= n_rows)
            return;
        struct rglru_lane at;
        float2 past[2];
        rglru_locate(&at, d, row0, n_rows);
        if (warp < n_tiles)
            rglru_past(past, d, at, mine);
        if (d.h)
            rglru_take_rows(h, d, row0, n_rows, first, width, stride);
        else
            rglru_norm_rows(h, f, row0, n_rows, first, width, stride);
        __syncthreads();
        for (int tile = warp; tile < n_tiles; tile += n_warps) {
            const int channel = mine + (tile - warp) * 8, next = channel + n_warps * 8;
            rglru_tile(d, at, past, h, recurrence + tile * 8 * stride, input + tile * 8 * stride,
                       row0, first, channel, stride);
            if (tile + n_warps < n_tiles)
                rglru_past(past, d, at, next);
        }
        __syncthreads(); /* before h is overwritten */
    }
}

#endif
