/* latent_tile.cu - the rows of a piece in bf16 at once, P(eq 19) in matrix form.
 *
 * From the state (m', alpha', s') the piece starts from, with m_t the running maximum of row t
 * and alpha_t its running sum, both per latent:
 *
 *   out_t = sum_l c_tl exp(m'_l - m_tl) s'_l + sum_{s <= t} A_ts v_s
 *   A_ts  = sum_l c_tl exp(theta_sl - m_tl),  c_tl = p(l|t) / alpha_tl
 *
 * Every exponent belongs to its own row's maximum and is at most 0, so rows far below the
 * piece's maximum keep their digits. For s in an earlier block of 16 rows than t, A is itself a
 * product: with R the maximum at the end of s's block, theta_s <= R <= m_t, and
 *
 *   A_ts  = sum_l c_tl exp(R_l - m_tl) exp(theta_sl - R_l)
 *
 * loses nothing. All factors are bf16 for the tensor cores, as is s' there; sums are f32. The
 * state that is left is good to f32: its weights are three bf16 parts each.
 */
#include "engine/kernels/cuda/attention.cuh"

namespace
{

enum {
    TILE_THREADS = 128, /* four warps of 16 rows */
    SEGMENTS = 8,       /* of a piece, for the running sums */
    SEGMENT_ROWS = PIECE_ROWS / SEGMENTS,
    BLOCKS = PIECE_ROWS / 16,
    VEC = 8, /* bf16 values of 16 bytes */
    MOST_LATENTS = 64,
    MOST_COLUMNS = WARP * VEC, /* a row is one turn of a warp, or less */
    SLICE_PAIRS = 3,           /* 16 columns each, of latent_tile_sums' warps at most */
    PARTS = 3,                 /* bf16 values that make a weight */
};

static constexpr float LOG2E = 1.4426950408889634f;
static constexpr float NOTHING = -1e38f; /* below every theta; finite: differences are no NaN */

struct tile_args {
    struct device_step step;
    struct latent_call call;
    float *states; /* [pieces, state_values]: m [L], alpha [L], s [L, d] */
    size_t state_values;
};

/* A piece and what its sequence says of it: from the step's arrays alone, before pdl_wait. */
struct tile_piece {
    struct piece piece;
    bool given;   /* the step has it */
    bool is_last; /* of its sequence */
    bool alone;   /* its sequence has no other: from the slot to the slot */
    bool fresh;   /* it starts from nothing */
    int64_t slot;
};

__device__ __forceinline__ struct tile_piece find_piece(const struct device_step *step, int index)
{
    struct tile_piece p = {};
    p.given = index < step->sizes->n_pieces;
    if (!p.given)
        return p;
    p.piece = step->pieces[index];
    p.is_last = p.piece.row + p.piece.n_rows == step->seq_start[p.piece.seq + 1];
    p.alone = p.is_last && p.piece.first == index;
    p.fresh = p.alone && step->positions[p.piece.row] == 0;
    p.slot = step->seq_slot[p.piece.seq];
    return p;
}

/* Shared memory of latent_tile in bytes. Strides keep what a warp reads at once in different
 * banks. */
struct tile_layout {
    int latents, stride;          /* in 16s; floats of a row of theta, m and c */
    int half_stride, wide_stride; /* of rows of latents, of columns in bf16 */
    int theta, m, c, ends, references, first_m, last_m, rows, e, s, v, out, bytes;
};

/* Where row r of theta, m and c begins: half warps write rows 8 apart. */
__host__ __device__ inline int row_at(int stride, int r)
{
    return r * stride + r / SEGMENT_ROWS * 16;
}

__host__ __device__ inline struct tile_layout layout_of(int tiles, int head_dim)
{
    struct tile_layout l;
    l.latents = 16 * tiles;
    l.stride = l.latents + 4;
    l.half_stride = l.latents + VEC;
    l.wide_stride = head_dim + VEC;
    const int rows = row_at(l.stride, PIECE_ROWS) * (int)sizeof(float);
    const int row = l.latents * (int)sizeof(float);
    const int wide = l.wide_stride * (int)sizeof(bf16);
    l.theta = 0;
    l.m = l.theta + rows;
    l.c = l.m + rows;
    l.ends = l.c + rows;
    l.references = l.ends + 2 * SEGMENTS * row;
    l.first_m = l.references + BLOCKS * row;
    l.last_m = l.first_m + row;
    l.rows = l.last_m + row;
    l.e = l.rows + 3 * PIECE_ROWS * (int)sizeof(float);
    l.s = l.e + PIECE_ROWS * l.half_stride * (int)sizeof(bf16);
    l.v = l.s + l.latents * wide;
    l.out = l.v + PIECE_ROWS * wide;
    l.bytes = l.out + PIECE_ROWS * wide;
    return l;
}

/* exp(x - top), x at most top, to 2^-22 of what it is relative to 1. */
__device__ __forceinline__ float exp_below(float x, float top)
{
    return quick_exp2((x - top) * LOG2E);
}

/* Maximum and sum of weights relative to it. Of two weights below a common maximum one is 1. */
struct running {
    float m, alpha;
};

__device__ __forceinline__ struct running join(struct running a, struct running b)
{
    const float e = quick_exp2(-LOG2E * fabsf(a.m - b.m));
    return {fmaxf(a.m, b.m), a.m >= b.m ? fmaf(b.alpha, e, a.alpha) : fmaf(a.alpha, e, b.alpha)};
}

__device__ __forceinline__ uint32_t pack(float low, float high)
{
    const __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
    return *(const uint32_t *)&x;
}

__device__ __forceinline__ float2 unpack(uint32_t x)
{
    return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
}

/* How threads share out rows of `pieces` pieces: a thread has one place of every `step`th row. */
struct turns {
    int row, place, step;
};

__device__ __forceinline__ struct turns turns_of(int thread, int n_threads, int pieces, int n_rows)
{
    /* Quotients of numbers up to TILE_THREADS, exact: they are 1/256 or more from a whole one. */
    const float part = quick_reciprocal((float)pieces);
    const int step = (int)((n_threads + 0.5f) * part), row = (int)((thread + 0.5f) * part);
    return {row < step ? row : n_rows, thread - row * pieces, step};
}

/* The sum (or, MAX, the maximum) of each x[i] over 16 lanes: lane l has that of i = l % 16 / 2. */
template <bool MAX> __device__ __forceinline__ float sixteen(float x[SEGMENT_ROWS])
{
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int n = SEGMENT_ROWS / 2; n; n /= 2)
#pragma unroll
        for (int i = 0; i < n; i++) {
            const bool upper = lane & 2 * n;
            const float mine = upper ? x[i + n] : x[i], other = upper ? x[i] : x[i + n];
            const float theirs = __shfl_xor_sync(0xffffffffu, other, 2 * n);
            x[i] = MAX ? fmaxf(mine, theirs) : mine + theirs;
        }
    const float theirs = __shfl_xor_sync(0xffffffffu, x[0], 1);
    return MAX ? fmaxf(x[0], theirs) : x[0] + theirs;
}

/* A segment's rows of what is kept of each row. */
__device__ __forceinline__ void segment_of(float x[SEGMENT_ROWS], const float *rows, int segment)
{
#pragma unroll
    for (int i = 0; i < SEGMENT_ROWS; i += 4)
        *(float4 *)(x + i) = *(const float4 *)(rows + segment * SEGMENT_ROWS + i);
}

/* ---- sums over the rows of a piece, good to f32: one warp, 16 latents ---- */

/* theta of the piece as mma_bf16's a: latents are its rows, 16 rows of the piece its columns. */
__device__ __forceinline__ void load_theta(float x[BLOCKS][8], const float *theta, int64_t stride,
                                           int n_rows, int n_latents)
{
    const int l = threadIdx.x % WARP / 4, q = threadIdx.x % 4 * 2;
#pragma unroll
    for (int k = 0; k < BLOCKS; k++)
#pragma unroll
        for (int e = 0; e < 8; e++) {
            const int row = k * 16 + q + e / 4 * 8 + e % 2, latent = l + e / 2 % 2 * 8;
            const bool has = row < n_rows && latent < n_latents;
            x[k][e] = has ? theta[row * stride + latent] : NOTHING;
        }
}

/* sums[16-column pair] += weights x (as load_theta left them) times v, of which `pairs` count. */
template <int PAIRS>
__device__ __forceinline__ void add_rows(float sums[PAIRS][2][4], const float x[BLOCKS][8],
                                         const bf16 *v, int stride, int pairs)
{
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int k = 0; k < BLOCKS; k++) {
        uint32_t weights[PARTS][4], b[PAIRS][4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float low = x[k][2 * i], high = x[k][2 * i + 1];
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                weights[part][i] = pack(low, high);
                const float2 taken = unpack(weights[part][i]);
                low -= taken.x;
                high -= taken.y;
            }
        }
#pragma unroll
        for (int j = 0; j < PAIRS; j++)
            if (j < pairs)
                ldmatrix_x4_trans(b[j], v + (k * 16 + lane % 16) * stride + j * 16 + lane / 16 * 8);
#pragma unroll
        for (int part = 0; part < PARTS; part++)
#pragma unroll
            for (int j = 0; j < PAIRS; j++)
                if (j < pairs) {
                    mma_bf16(sums[j][0], weights[part], b[j]);
                    mma_bf16(sums[j][1], weights[part], b[j] + 2);
                }
    }
}

/* How latent_tile_sums cuts a head: slices of `columns` columns for 16 latents. */
struct slices {
    int columns, n, tiles;
};

__host__ __device__ inline struct slices slices_of(const struct latent_shape *sh)
{
    const int pairs = sh->head_dim / 16, n = (pairs + SLICE_PAIRS - 1) / SLICE_PAIRS;
    return {(pairs + n - 1) / n * 16, n, (sh->n_latents + 15) / 16};
}

/* m, alpha and s of a whole piece from nothing, relative to the piece's maximum; a warp has one
 * head, 16 latents, and a slice of columns. Reads theta and v, writes L * (d + 2) floats a piece:
 * 23 MB at 8192 rows of the main configuration, 5 us; all of it is asked for at once. */
__global__ void __launch_bounds__(TILE_THREADS, 4) latent_tile_sums_kernel(const struct tile_args a)
{
    pdl_trigger();
    const struct latent_call *call = &a.call;
    const int H = call->shape.n_heads, M = call->shape.n_latents, d = call->shape.head_dim;
    const struct tile_piece at = find_piece(&a.step, blockIdx.x);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const struct slices slices = slices_of(&call->shape);
    const int unit = blockIdx.y * (TILE_THREADS / WARP) + warp, slice = unit % slices.n;
    const int h = unit / slices.n / slices.tiles, l0 = unit / slices.n % slices.tiles * 16;
    pdl_wait();
    if (!at.given || at.is_last || h >= H) /* nobody starts from the end of a last piece */
        return;

    DYNAMIC_SHARED(bf16, shared);
    const int stride = slices.columns + VEC, column = slice * slices.columns;
    const int columns = min(slices.columns, d - column), kv = h / (H / call->shape.n_kv_heads);
    bf16 *v = shared + warp * PIECE_ROWS * stride;
    const int latents = min(16, M - l0);
    float x[BLOCKS][8], top[2] = {NOTHING, NOTHING}, alpha[2] = {};
    load_theta(x, call->theta + at.piece.row * call->theta_stride + h * M + l0, call->theta_stride,
               PIECE_ROWS, latents);
    const struct turns t = turns_of(lane, WARP, columns / VEC, PIECE_ROWS);
    const bf16 *from = (const bf16 *)call->v + (at.piece.row + t.row) * call->v_stride + kv * d +
                       column + t.place * VEC;
    for (int row = t.row; row < PIECE_ROWS; row += t.step, from += t.step * call->v_stride)
        copy_async_16(v + row * stride + t.place * VEC, from);
    copy_async_commit();
#pragma unroll
    for (int e = 0; e < BLOCKS * 8; e++)
        top[e / 2 % 2] = fmaxf(top[e / 2 % 2], x[e / 8][e % 8]);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 1));
        top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 2));
    }
#pragma unroll
    for (int e = 0; e < BLOCKS * 8; e++) {
        const float weight = exp_below(x[e / 8][e % 8], top[e / 2 % 2]);
        x[e / 8][e % 8] = weight;
        alpha[e / 2 % 2] += weight;
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        alpha[r] += __shfl_xor_sync(0xffffffffu, alpha[r], 1);
        alpha[r] += __shfl_xor_sync(0xffffffffu, alpha[r], 2);
    }
    copy_async_wait<0>();
    __syncwarp();
    float sums[SLICE_PAIRS][2][4] = {};
    add_rows<SLICE_PAIRS>(sums, x, v, stride, columns / 16);

    float *state = a.states + (size_t)blockIdx.x * a.state_values + h * M + l0;
    float *s = a.states + (size_t)blockIdx.x * a.state_values + 2 * H * M +
               (size_t)(h * M + l0) * d + column;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int l = lane / 4 + 8 * r;
        if (l >= latents)
            continue;
        if (slice == 0 && lane % 4 == 0) {
            state[l] = top[r];
            state[H * M + l] = alpha[r];
        }
#pragma unroll
        for (int j = 0; j < SLICE_PAIRS; j++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                if (j * 16 < columns)
                    *(float2 *)(s + (size_t)l * d + j * 16 + i * 8 + lane % 4 * 2) =
                        make_float2(sums[j][i][2 * r], sums[j][i][2 * r + 1]);
    }
}

/* ---- the rows of a piece ---- */

/* Four latents of A for rows g and g + 8 of a warp against its own 16 rows: sum[i], in the order of
 * mma_bf16's a. Row g sees none of the last eight. theta and m times log2(e). */
__device__ __forceinline__ void add_weights(float sum[8], const float *theta, int stride,
                                            const float4 m[2], const float4 c[2])
{
#pragma unroll
    for (int i = 0; i < 4; i++) { /* rows s: 2q, 2q + 1, 2q + 8, 2q + 9 */
        const float4 x = *(const float4 *)(theta + row_at(stride, i / 2 * 8 + i % 2));
#pragma unroll
        for (int r = i / 2; r < 2; r++) {
            float *to = sum + i / 2 * 4 + r * 2 + i % 2;
            *to = fmaf(c[r].x, quick_exp2(x.x - m[r].x), *to);
            *to = fmaf(c[r].y, quick_exp2(x.y - m[r].y), *to);
            *to = fmaf(c[r].z, quick_exp2(x.z - m[r].z), *to);
            *to = fmaf(c[r].w, quick_exp2(x.w - m[r].w), *to);
        }
    }
}

/* A of a warp's 16 rows against its own, as mma_bf16's a. */
template <int TILES>
__device__ __forceinline__ void own_weights(uint32_t weights[4], const float *theta, const float *m,
                                            const float *c, int stride, int first)
{
    const int row = threadIdx.x % WARP / 4, q = threadIdx.x % 4 * 2;
    float sums[8] = {};
#pragma unroll
    for (int l = 0; l < 16 * TILES; l += 4) {
        float4 top[2], share[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            top[r] = *(const float4 *)(m + row_at(stride, first + row + 8 * r) + l);
            share[r] = *(const float4 *)(c + row_at(stride, first + row + 8 * r) + l);
        }
        add_weights(sums, theta + row_at(stride, first + q) + l, stride, top, share);
    }
#pragma unroll
    for (int e = 0; e < 8; e++)
        if (q + e / 4 * 8 + e % 2 > row + e / 2 % 2 * 8)
            sums[e] = 0;
#pragma unroll
    for (int i = 0; i < 4; i++)
        weights[i] = pack(sums[2 * i], sums[2 * i + 1]);
}

/* c exp(R - m) of a warp's 16 rows, as mma_bf16's a for each 16 latents. R [latents] and m times
 * log2(e). */
template <int TILES>
__device__ __forceinline__ void earlier_weights(uint32_t weights[TILES][4], const float *reference,
                                                const float *m, const float *c, int stride,
                                                int first)
{
    const int row = threadIdx.x % WARP / 4, q = threadIdx.x % 4 * 2;
#pragma unroll
    for (int k = 0; k < TILES; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int l = k * 16 + i / 2 * 8 + q, at = row_at(stride, first + row + i % 2 * 8) + l;
            const float2 top = *(const float2 *)(m + at), share = *(const float2 *)(c + at);
            const float2 before = *(const float2 *)(reference + l);
            weights[k][i] = pack(share.x * quick_exp2(before.x - top.x),
                                 share.y * quick_exp2(before.y - top.y));
        }
}

/* What is left after the rows: each warp has 16 columns at a time. Rows beyond the piece have v 0.
 */
template <int TILES>
__device__ void leave_state(float *s, const float *start_s, const float *first_m,
                            const float *last_m, const float *theta, int64_t theta_stride,
                            const bf16 *v, int stride, int n_rows, int M, int d, bool fresh)
{
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    for (int k = 0; k < TILES; k++) {
        float x[BLOCKS][8], keep[2], top[2];
        load_theta(x, theta + k * 16, theta_stride, n_rows, M - k * 16);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            top[r] = last_m[k * 16 + lane / 4 + 8 * r];
            keep[r] = exp_below(first_m[k * 16 + lane / 4 + 8 * r], top[r]);
        }
#pragma unroll
        for (int e = 0; e < BLOCKS * 8; e++)
            x[e / 8][e % 8] = exp_below(x[e / 8][e % 8], top[e / 2 % 2]);
        for (int column = warp * 16; column < d; column += TILE_THREADS / WARP * 16) {
            float sums[1][2][4] = {};
            add_rows<1>(sums, x, v + column, stride, 1);
#pragma unroll
            for (int e = 0; e < 4; e++) { /* latents g, g + 8 of either 8 columns */
                const int l = k * 16 + lane / 4 + e % 2 * 8;
                const size_t at = (size_t)l * d + column + e / 2 * 8 + lane % 4 * 2;
                const float *sum = sums[0][e / 2] + e % 2 * 2;
                if (l >= M)
                    continue;
                const float2 old = fresh ? make_float2(0, 0) : *(const float2 *)(start_s + at);
                *(float2 *)(s + at) =
                    make_float2(fmaf(keep[e % 2], old.x, sum[0]), fmaf(keep[e % 2], old.y, sum[1]));
            }
        }
    }
}

/* What a piece starts from, start [M, d], as bf16 rows of s16, zeros for the other latents and
 * where there is nothing. */
__device__ __forceinline__ void fetch_start(bf16 *s16, int stride, int latents, const float *start,
                                            int M, int d)
{
    const struct turns t = turns_of(threadIdx.x, TILE_THREADS, d / 2, latents);
    for (int l0 = t.row; l0 < latents; l0 += SEGMENT_ROWS * t.step) {
        float2 s[SEGMENT_ROWS];
#pragma unroll
        for (int i = 0; i < SEGMENT_ROWS; i++) {
            const int l = l0 + i * t.step;
            const bool has = l < M && start;
            s[i] = has ? *(const float2 *)(start + l * d + t.place * 2) : make_float2(0, 0);
        }
#pragma unroll
        for (int i = 0; i < SEGMENT_ROWS; i++) {
            const int l = l0 + i * t.step;
            if (l < latents)
                *(uint32_t *)(s16 + l * stride + t.place * 2) = pack(s[i].x, s[i].y);
        }
    }
}

/* What a warp's 16 rows take of the start's latents, of the blocks of 16 rows before, and of
 * themselves: as mma_bf16's a. */
template <int TILES> struct row_weights {
    uint32_t start[TILES][4], earlier[BLOCKS - 1][4], own[4];
};

template <int TILES>
__device__ __forceinline__ void
find_weights(struct row_weights<TILES> *w, const float *theta, const float *m, const float *c,
             const float *references, const bf16 *e16, const struct tile_layout &at, int first)
{
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    earlier_weights<TILES>(w->start, references, m, c, at.stride, first);
#pragma unroll
    for (int b = 0; b < BLOCKS - 1; b++)
        if (b < warp) {
            uint32_t left[TILES][4];
            float sums[2][4] = {};
            earlier_weights<TILES>(left, references + (b + 1) * at.latents, m, c, at.stride, first);
#pragma unroll
            for (int k = 0; k < TILES; k++) {
                uint32_t right[4];
                const int row = b * 16 + lane / 16 * 8 + lane % 8;
                ldmatrix_x4(right, e16 + row * at.half_stride + k * 16 + lane / 8 % 2 * 8);
                mma_bf16(sums[0], left[k], right);
                mma_bf16(sums[1], left[k], right + 2);
            }
#pragma unroll
            for (int i = 0; i < 4; i++)
                w->earlier[b][i] = pack(sums[i / 2][i % 2 * 2], sums[i / 2][i % 2 * 2 + 1]);
        }
    own_weights<TILES>(w->own, theta, m, c, at.stride, first);
}

/* A warp's 16 rows of out, which has the window's part: times p0, and what is theirs of the start
 * and of the values. */
template <int TILES>
__device__ __forceinline__ void multiply_rows(const struct row_weights<TILES> &w, const bf16 *s16,
                                              const bf16 *v, bf16 *own, const float *p0, int stride,
                                              int d)
{
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    /* What is there of the window counts p0: as one more product, by p0 as a diagonal. */
    const int row = lane / 4, q = lane % 4 * 2, first = warp * 16;
    uint32_t from_local[2][4] = {};
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float p = p0[row + 8 * r];
        const float low = q == row ? p : 0, high = q + 1 == row ? p : 0;
        from_local[0][3 * r] = pack(low, high);
        const float2 taken = unpack(from_local[0][3 * r]);
        from_local[1][3 * r] = pack(low - taken.x, high - taken.y);
    }
    const bf16 *const right = v + lane % 16 * stride + lane / 16 * 8;
    const bf16 *const start_right = s16 + lane % 16 * stride + lane / 16 * 8;
    for (int i = 0; i < d; i += 16) {
        float y[2][4] = {};
        uint32_t b[4];
#pragma unroll
        for (int k = 0; k < TILES; k++) {
            ldmatrix_x4_trans(b, start_right + k * 16 * stride + i);
            mma_bf16(y[0], w.start[k], b);
            mma_bf16(y[1], w.start[k], b + 2);
        }
#pragma unroll
        for (int k = 0; k < BLOCKS - 1; k++)
            if (k < warp) {
                ldmatrix_x4_trans(b, right + k * 16 * stride + i);
                mma_bf16(y[0], w.earlier[k], b);
                mma_bf16(y[1], w.earlier[k], b + 2);
            }
        ldmatrix_x4_trans(b, right + first * stride + i);
        mma_bf16(y[0], w.own, b);
        mma_bf16(y[1], w.own, b + 2);
        ldmatrix_x4_trans(b, own + lane % 16 * stride + lane / 16 * 8 + i);
#pragma unroll
        for (int part = 0; part < 2; part++) {
            mma_bf16(y[0], from_local[part], b);
            mma_bf16(y[1], from_local[part], b + 2);
        }
        __syncwarp();
#pragma unroll
        for (int e = 0; e < 4; e++)
            *(uint32_t *)(own + (row + e % 2 * 8) * stride + i + e / 2 * 8 + q) =
                pack(y[e / 2][e % 2 * 2], y[e / 2][e % 2 * 2 + 1]);
    }
}

/* A block: a piece and one head. At 8192 rows, 8 heads, M 16, d 96 it reads 40 MB, part of it in
 * L2, writes 12.6 MB and takes 20M exponentials: 12 us of bytes, 6 of exponentials on 132 SMs. */
template <int TILES>
__global__ void __launch_bounds__(TILE_THREADS, TILES == 1 ? 4 : 3)
    latent_tile(const struct tile_args a)
{
    pdl_trigger();
    const struct latent_call *call = &a.call;
    const int index = blockIdx.y, h = blockIdx.x;
    const struct tile_piece found = find_piece(&a.step, index);
    const int H = call->shape.n_heads, M = call->shape.n_latents, d = call->shape.head_dim;
    const int window = call->shape.gated_window, n_g = M + window, L = H * M;
    const int n = found.piece.n_rows, kv = h / (H / call->shape.n_kv_heads);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;

    DYNAMIC_SHARED(unsigned char, shared);
    const struct tile_layout at = layout_of(TILES, d);
    float *theta = (float *)(shared + at.theta), *m = (float *)(shared + at.m);
    float *c = (float *)(shared + at.c), *tops = (float *)(shared + at.rows);
    float *scales = tops + PIECE_ROWS, *p0 = scales + PIECE_ROWS; /* of the gates' softmax */
    float *ends_m = (float *)(shared + at.ends), *ends_alpha = ends_m + SEGMENTS * at.latents;
    float *references = (float *)(shared + at.references); /* before each block of 16 rows */
    float *first_m = (float *)(shared + at.first_m), *last_m = (float *)(shared + at.last_m);
    bf16 *e16 = (bf16 *)(shared + at.e), *s16 = (bf16 *)(shared + at.s);
    bf16 *v = (bf16 *)(shared + at.v), *out = (bf16 *)(shared + at.out);
    pdl_wait();
    if (!found.given)
        return;

    bf16 *const all_out = (bf16 *)call->out + found.piece.row * call->out_stride + h * d;
    const bf16 *const all_v = (const bf16 *)call->v + found.piece.row * call->v_stride + kv * d;
    /* A thread has 8 rows of one latent in 16. */
    const int segment = threadIdx.x / 16, column = threadIdx.x % 16;
    float x[TILES][SEGMENT_ROWS], p[TILES][SEGMENT_ROWS];
    struct running before[TILES];
    const float *start = a.states + (size_t)index * a.state_values;
    float *slot_m = call->m.data + found.slot * call->m.row_values + h * M;
    float *slot_alpha = call->alpha.data + found.slot * call->alpha.row_values + h * M;
    float *slot_s = call->s.data + found.slot * call->s.row_values + (int64_t)h * M * d;
    const float *start_m = found.alone ? slot_m : start + h * M;
    const float *start_alpha = found.alone ? slot_alpha : start + L + h * M;
    const float *start_s = found.alone ? slot_s : start + 2 * L + (size_t)h * M * d;
    const int row0 = found.piece.row + segment * SEGMENT_ROWS;
    const float *theta_row = kept_address(call->theta + row0 * call->theta_stride + h * M + column);
    const float *g_row = kept_address(call->g + row0 * call->g_stride + h * n_g + window + column);
    const int gated = segment * SEGMENT_ROWS + column / 2; /* the row whose sums this lane has */
    float gate = NOTHING;
    if (window && gated < n)
        gate = call->g[(row0 + column / 2) * call->g_stride + h * n_g];
#pragma unroll
    for (int i = 0; i < SEGMENT_ROWS; i++) {
        const bool has = segment * SEGMENT_ROWS + i < n;
#pragma unroll
        for (int k = 0; k < TILES; k++) {
            const int l = k * 16 + column;
            x[k][i] = has && l < M ? __ldcg(theta_row + k * 16) : NOTHING;
            p[k][i] = has && l < M ? __ldcg(g_row + k * 16) : NOTHING;
        }
        theta_row += call->theta_stride;
        g_row += call->g_stride;
    }
#pragma unroll
    for (int k = 0; k < TILES; k++) {
        const int l = k * 16 + column;
        const bool has = l < M && !found.fresh;
        before[k] = {has ? fmaxf(start_m[l], NOTHING) : NOTHING, has ? start_alpha[l] : 0};
    }
    struct turns t = turns_of(threadIdx.x, TILE_THREADS, d / VEC, PIECE_ROWS);
    const bf16 *v_from = all_v + t.row * call->v_stride + t.place * VEC;
    const bf16 *out_from = all_out + t.row * call->out_stride + t.place * VEC;
    for (int r = t.row; r < PIECE_ROWS; r += t.step) {
        const int to = r * at.wide_stride + t.place * VEC;
        copy_async_16(v + to, v_from, r < n);
        copy_async_16(out + to, out_from, r < n && call->blend);
        v_from += t.step * call->v_stride;
        out_from += t.step * call->out_stride;
    }
    copy_async_commit();
    fetch_start(s16, at.wide_stride, at.latents, found.fresh ? nullptr : start_s, M, d);

    /* Running m and alpha: each segment from nothing, then from what is before it. */
    float top[TILES], of_rows[SEGMENT_ROWS], scaled[SEGMENT_ROWS];
#pragma unroll
    for (int k = 0; k < TILES; k++) {
        float sum = 0;
        top[k] = NOTHING;
#pragma unroll
        for (int i = 0; i < SEGMENT_ROWS; i++)
            top[k] = fmaxf(top[k], x[k][i]);
#pragma unroll
        for (int i = 0; i < SEGMENT_ROWS; i++)
            sum += exp_below(x[k][i], top[k]);
        ends_m[segment * at.latents + k * 16 + column] = top[k];
        ends_alpha[segment * at.latents + k * 16 + column] = sum;
    }
    /* The gates' softmax: of each row over 16 lanes. */
#pragma unroll
    for (int i = 0; i < SEGMENT_ROWS; i++) {
        of_rows[i] = p[0][i];
#pragma unroll
        for (int k = 1; k < TILES; k++)
            of_rows[i] = fmaxf(of_rows[i], p[k][i]);
    }
    const float most = fmaxf(gate, sixteen<true>(of_rows));
    if (column % 2 == 0)
        tops[gated] = most * LOG2E;
    __syncwarp();
    segment_of(scaled, tops, segment);
#pragma unroll
    for (int i = 0; i < SEGMENT_ROWS; i++) {
        of_rows[i] = 0;
#pragma unroll
        for (int k = 0; k < TILES; k++)
            of_rows[i] += p[k][i] = quick_exp2(fmaf(p[k][i], LOG2E, -scaled[i]));
    }
    const float share = exp_below(gate, most);
    const float scale = quick_reciprocal(share + sixteen<false>(of_rows));
    if (column % 2 == 0) {
        scales[gated] = scale;
        p0[gated] = call->blend ? share * scale : 0;
    }
    __syncthreads();
    segment_of(scaled, scales, segment);
#pragma unroll
    for (int k = 0; k < TILES; k++) {
        const int l = k * 16 + column;
        if (segment == 0)
            first_m[l] = before[k].m;
#pragma unroll
        for (int i = 0; i < SEGMENTS - 1; i++)
            if (i < segment)
                before[k] =
                    join(before[k], {ends_m[i * at.latents + l], ends_alpha[i * at.latents + l]});
        if (segment % 2 == 0)
            references[warp * at.latents + l] = before[k].m * LOG2E;
        const float end = LOG2E * __shfl_sync(0xffffffffu, fmaxf(before[k].m, top[k]), lane | 16);
        struct running r = before[k];
#pragma unroll
        for (int i = 0; i < SEGMENT_ROWS; i++) {
            const int row = segment * SEGMENT_ROWS + i, to = row_at(at.stride, row) + l;
            const float logit = x[k][i] * LOG2E;
            r = join(r, {x[k][i], 1});
            theta[to] = logit;
            m[to] = r.m * LOG2E;
            c[to] = p[k][i] * scaled[i] * quick_reciprocal(r.alpha);
            e16[row * at.half_stride + l] = from_float<bf16>(quick_exp2(logit - end));
        }
        if (found.is_last && l < M && (n - 1) / SEGMENT_ROWS == segment) {
            last_m[l] = slot_m[l] = r.m;
            slot_alpha[l] = r.alpha;
        }
    }
    copy_async_wait<0>();
    __syncthreads();

    const int first = warp * 16;
    if (first < n) {
        struct row_weights<TILES> w;
        find_weights(&w, theta, m, c, references, e16, at, first);
        multiply_rows(w, s16, v, out + first * at.wide_stride, p0 + first, at.wide_stride, d);
        __syncwarp();
        t = turns_of(lane, WARP, d / VEC, 16);
        const bf16 *const own = out + first * at.wide_stride;
        bf16 *to = all_out + (first + t.row) * call->out_stride + t.place * VEC;
        for (int r = t.row; r < min(16, n - first); r += t.step, to += t.step * call->out_stride)
            *(uint4 *)to = *(const uint4 *)(own + r * at.wide_stride + t.place * VEC);
    }
    if (found.is_last)
        leave_state<TILES>(slot_s, start_s, first_m, last_m,
                           call->theta + found.piece.row * call->theta_stride + h * M,
                           call->theta_stride, v, at.wide_stride, n, M, d, found.fresh);
}

bool aligned(const void *p)
{
    return ((uintptr_t)p & 15) == 0;
}

struct tile_args args_of(struct cuda *c, const struct latent_call *call, float *states,
                         size_t state_values)
{
    struct tile_args a = {};
    a.step = c->step;
    a.call = *call;
    a.states = states;
    a.state_values = state_values;
    return a;
}

template <int TILES> void launch_tiles(struct cuda *c, const struct tile_args *a)
{
    const struct latent_shape *sh = &a->call.shape;
    launch(&c->queue, "latent_tile", latent_tile<TILES>, dim3(sh->n_heads, c->step.n_pieces),
           TILE_THREADS, layout_of(TILES, sh->head_dim).bytes, *a);
}

} // namespace

bool latent_tiles_fit(const struct cuda *c, const struct latent_call *call)
{
    const struct latent_shape *sh = &call->shape;
    return call->half && sh->head_dim % 16 == 0 && sh->head_dim <= MOST_COLUMNS &&
           sh->n_latents <= MOST_LATENTS &&
           (size_t)layout_of(slices_of(sh).tiles, sh->head_dim).bytes <= shared_limit(&c->queue) &&
           call->v_stride % VEC == 0 && call->out_stride % VEC == 0 && aligned(call->v) &&
           aligned(call->out) && call->s.row_values % 2 == 0 && c->step.n_pieces <= 65535 &&
           (!sh->gated_window || call->blend);
}

void latent_tile_sums(struct cuda *c, const struct latent_call *call, float *states,
                      size_t state_values)
{
    const struct slices s = slices_of(&call->shape);
    const int warps = TILE_THREADS / WARP;
    const size_t bytes = (size_t)warps * PIECE_ROWS * (s.columns + VEC) * sizeof(bf16);
    launch(&c->queue, "latent_tile_sums", latent_tile_sums_kernel,
           dim3(c->step.n_pieces, ceil_div(call->shape.n_heads * s.tiles * s.n, warps)),
           TILE_THREADS, bytes, args_of(c, call, states, state_values));
}

void latent_tiles(struct cuda *c, const struct latent_call *call, float *states,
                  size_t state_values)
{
    const struct tile_args a = args_of(c, call, states, state_values);
    switch (slices_of(&call->shape).tiles) {
    case 1:
        launch_tiles<1>(c, &a);
        break;
    case 2:
        launch_tiles<2>(c, &a);
        break;
    case 3:
        launch_tiles<3>(c, &a);
        break;
    default:
        launch_tiles<4>(c, &a);
    }
}
