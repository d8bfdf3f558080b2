/* latent_tile.cu - the rows of a piece in bf16 at once, P(eq 19) in matrix form.
 *
 * From the state (m', alpha', s') the piece starts from, with m_t the running maximum of row t
 * and alpha_t its running sum, both per latent:
 *
 *   out_t = sum_l c_tl exp(m'_l - m_tl) s'_l + sum_{s <= t} A_ts v_s
 *   A_ts  = sum_l c_tl exp(theta_sl - m_tl),  c_tl = p(l|t) / alpha_tl
 *
 * Every exponent belongs to its own row's maximum and is at most 0, so rows far below the
 * piece's maximum keep their digits. A and c are bf16 for the tensor cores, as is s' there; sums
 * and the state that is left are f32.
 */
#include "engine/kernels/cuda/attention.cuh"

namespace
{

enum {
    TILE_THREADS = 128, /* four warps of 16 rows */
    SEGMENTS = 8,       /* of a piece, for the running sums */
    SEGMENT_ROWS = PIECE_ROWS / SEGMENTS,
    MOST_LATENTS = 64,
    MAX_SHARED = 96 * 1024, /* what a block may have on every chip from 8.0 on */
    VEC = 8,                /* bf16 values of 16 bytes */
};

struct tile_args {
    struct device_step step;
    struct latent_call call;
    const float *states; /* [pieces, state_values]: m [L], alpha [L], s [L, d] */
    size_t state_values;
};

/* Shared memory in bytes. Strides keep what a warp reads at once in different banks. */
struct tile_layout {
    int padded, stride; /* latents in 16s; floats of a row of theta, m and c */
    int g_stride, c16_stride, wide_stride;
    int theta, m, c, g, ends, c16, s, v, bytes;
};

__host__ __device__ inline struct tile_layout layout_of(const struct latent_shape *sh)
{
    struct tile_layout l;
    l.padded = (sh->n_latents + 15) / 16 * 16;
    l.stride = l.padded + 4;
    l.g_stride = (sh->n_latents + sh->gated_window) | 1;
    l.c16_stride = l.padded + VEC;
    l.wide_stride = sh->head_dim + VEC;
    const int rows = PIECE_ROWS * l.stride * (int)sizeof(float);
    l.theta = 0;
    l.m = l.theta + rows;
    l.c = l.m + rows;
    l.g = l.c + rows;
    l.ends = l.g + PIECE_ROWS * l.g_stride * (int)sizeof(float);
    l.c16 = l.ends + (2 * (SEGMENTS + 1) + 1) * l.padded * (int)sizeof(float);
    l.s = l.c16 + PIECE_ROWS * l.c16_stride * (int)sizeof(bf16);
    l.v = l.s + l.padded * l.wide_stride * (int)sizeof(bf16);
    l.bytes = l.v + PIECE_ROWS * l.wide_stride * (int)sizeof(bf16);
    return l;
}

/* Maximum and sum of weights relative to it. */
struct running {
    float m, alpha;
};

__device__ __forceinline__ struct running join(struct running a, struct running b)
{
    const float e = expf(-fabsf(a.m - b.m)); /* one of the two weights is 1 */
    return {fmaxf(a.m, b.m), fmaf(a.alpha, a.m >= b.m ? 1 : e, b.alpha * (b.m >= a.m ? 1 : e))};
}

/* Rows [n_rows, n] into shared rows, zeros where there are none; no barrier. */
__device__ void stage(float *to, int to_stride, int to_n, const float *from, int64_t from_stride,
                      int n_rows, int n)
{
#pragma unroll 8
    for (int at = threadIdx.x; at < PIECE_ROWS * to_n; at += TILE_THREADS) {
        const int r = at / to_n, i = at % to_n;
        to[r * to_stride + i] = r < n_rows && i < n ? from[r * from_stride + i] : 0;
    }
}

__device__ void softmax(float *g, int n)
{
    float top = -INFINITY, sum = 0;
    for (int i = 0; i < n; i++)
        top = fmaxf(top, g[i]);
    for (int i = 0; i < n; i++)
        sum += g[i] = g[i] == top ? 1 : expf(g[i] - top);
    const float scale = 1 / sum;
    for (int i = 0; i < n; i++)
        g[i] *= scale;
}

__device__ __forceinline__ uint32_t pack(float low, float high)
{
    const __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
    return *(const uint32_t *)&x;
}

/* Four latents of A for rows g and g + 8 of a warp against 16 rows s: sum[i], in the order of
 * mma_bf16's a. */
__device__ __forceinline__ void add_weights(float sum[8], const float *theta, int stride,
                                            const float4 m[2], const float4 c[2])
{
    const float log2e = 1.4426950408889634f;
#pragma unroll
    for (int i = 0; i < 4; i++) { /* rows s: 2q, 2q + 1, 2q + 8, 2q + 9 */
        const float4 x = *(const float4 *)(theta + (i / 2 * 8 + i % 2) * stride);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float *to = sum + i / 2 * 4 + r * 2 + i % 2;
            *to = fmaf(c[r].x, quick_exp2((x.x - m[r].x) * log2e), *to);
            *to = fmaf(c[r].y, quick_exp2((x.y - m[r].y) * log2e), *to);
            *to = fmaf(c[r].z, quick_exp2((x.z - m[r].z) * log2e), *to);
            *to = fmaf(c[r].w, quick_exp2((x.w - m[r].w) * log2e), *to);
        }
    }
}

/* What is left after the rows: theta gives way to exp(theta - m), a thread has four latents and
 * two columns. No row beyond the piece counts: its v is 0 here. */
__device__ void leave_state(float *s, const float *start_s, const float *start_m, const float *m,
                            float *theta, const bf16 *v, const struct tile_layout *at, int n_rows,
                            int M, int d, bool fresh)
{
    for (int i = threadIdx.x; i < n_rows * M; i += TILE_THREADS) {
        float *x = theta + i / M * at->stride + i % M;
        *x = expf(*x - m[i % M]);
    }
    __syncthreads();
    const int pairs = d / 2, units = (M + 3) / 4 * pairs;
    for (int u = threadIdx.x; u < units; u += TILE_THREADS) {
        const int l0 = u / pairs * 4, i = u % pairs * 2;
        float sum[4][2];
#pragma unroll
        for (int l = 0; l < 4; l++) {
            const bool has = l0 + l < M && !fresh;
            const float keep = has ? expf(start_m[l0 + l] - m[l0 + l]) : 0;
            sum[l][0] = has ? keep * start_s[(size_t)(l0 + l) * d + i] : 0;
            sum[l][1] = has ? keep * start_s[(size_t)(l0 + l) * d + i + 1] : 0;
        }
#pragma unroll 8
        for (int r = 0; r < n_rows; r++) {
            const float4 e = *(const float4 *)(theta + r * at->stride + l0);
            const float w[4] = {e.x, e.y, e.z, e.w};
            const __nv_bfloat162 x = *(const __nv_bfloat162 *)(v + r * at->wide_stride + i);
            const float low = to_float(x.x), high = to_float(x.y);
#pragma unroll
            for (int l = 0; l < 4; l++) {
                sum[l][0] = fmaf(w[l], low, sum[l][0]);
                sum[l][1] = fmaf(w[l], high, sum[l][1]);
            }
        }
#pragma unroll
        for (int l = 0; l < 4; l++)
            if (l0 + l < M) {
                s[(size_t)(l0 + l) * d + i] = sum[l][0];
                s[(size_t)(l0 + l) * d + i + 1] = sum[l][1];
            }
    }
}

/* A block: a piece and one head. At 8192 rows, 8 heads, M 16, d 96 it reads 60 MB, mostly in L2,
 * writes 12.6 MB and takes 42M exponentials: 11 us of them on 132 SMs. */
__global__ void __launch_bounds__(TILE_THREADS) latent_tile(const struct tile_args a)
{
    pdl_trigger();
    pdl_wait();
    const struct device_step *step = &a.step;
    const struct latent_call *call = &a.call;
    const int index = blockIdx.y, h = blockIdx.x;
    if (index >= step->sizes->n_pieces)
        return;
    const struct piece piece = step->pieces[index];
    const bool is_last = piece.row + piece.n_rows == step->seq_start[piece.seq + 1];
    const bool alone = is_last && piece.first == index; /* no other piece: slot to slot */
    const bool fresh = alone && step->positions[piece.row] == 0;
    const int64_t slot = step->seq_slot[piece.seq];
    const int H = call->shape.n_heads, M = call->shape.n_latents, d = call->shape.head_dim;
    const int window = call->shape.gated_window, n_g = M + window, L = H * M, n = piece.n_rows;
    const int kv = h / (H / call->shape.n_kv_heads);

    DYNAMIC_SHARED(unsigned char, shared);
    const struct tile_layout at = layout_of(&call->shape);
    float *theta = (float *)(shared + at.theta), *m = (float *)(shared + at.m);
    float *c = (float *)(shared + at.c), *g = (float *)(shared + at.g);
    float *ends_m = (float *)(shared + at.ends), *ends_alpha = ends_m + (SEGMENTS + 1) * at.padded;
    float *last_m = ends_alpha + (SEGMENTS + 1) * at.padded;
    bf16 *c16 = (bf16 *)(shared + at.c16), *s16 = (bf16 *)(shared + at.s);
    bf16 *v = (bf16 *)(shared + at.v);

    for (int i = threadIdx.x; i < PIECE_ROWS * (d / VEC); i += TILE_THREADS) {
        const int r = i / (d / VEC), column = i % (d / VEC) * VEC;
        const bf16 *from =
            (const bf16 *)call->v + (piece.row + (r < n ? r : 0)) * call->v_stride + kv * d;
        copy_async_16(v + r * at.wide_stride + column, from + column, r < n);
    }
    copy_async_commit();
    stage(theta, at.stride, at.padded, call->theta + piece.row * call->theta_stride + h * M,
          call->theta_stride, n, M);
    stage(g, at.g_stride, n_g, call->g + piece.row * call->g_stride + h * n_g, call->g_stride, n,
          n_g);
    const float *start = a.states + (size_t)index * a.state_values;
    float *slot_m = call->m.data + slot * call->m.row_values + h * M;
    float *slot_alpha = call->alpha.data + slot * call->alpha.row_values + h * M;
    float *slot_s = call->s.data + slot * call->s.row_values + (int64_t)h * M * d;
    const float *start_m = alone ? slot_m : start + h * M;
    const float *start_alpha = alone ? slot_alpha : start + L + h * M;
    const float *start_s = alone ? slot_s : start + 2 * L + (size_t)h * M * d;
    for (int l = threadIdx.x; l < at.padded; l += TILE_THREADS) {
        ends_m[l] = l < M && !fresh ? start_m[l] : -INFINITY;
        ends_alpha[l] = l < M && !fresh ? start_alpha[l] : 0;
    }
#pragma unroll 4
    for (int i = threadIdx.x; i < at.padded * (d / 2); i += TILE_THREADS) {
        const int l = i / (d / 2), column = i % (d / 2) * 2;
        const float *from = start_s + (size_t)l * d + column;
        const bool has = l < M && !fresh;
        *(uint32_t *)(s16 + l * at.wide_stride + column) = has ? pack(from[0], from[1]) : 0;
    }
    __syncthreads();

    /* Running m and alpha: each segment from nothing, then from what is before it. */
    for (int u = threadIdx.x; u < SEGMENTS * at.padded; u += TILE_THREADS) {
        const int segment = u / at.padded, l = u % at.padded;
        struct running x = {-INFINITY, 0};
        for (int r = segment * SEGMENT_ROWS; r < min(n, (segment + 1) * SEGMENT_ROWS); r++)
            x = join(x, {theta[r * at.stride + l], 1});
        ends_m[at.padded + u] = x.m;
        ends_alpha[at.padded + u] = x.alpha;
    }
    if ((int)threadIdx.x < n)
        softmax(g + threadIdx.x * at.g_stride, n_g);
    __syncthreads();
    for (int u = threadIdx.x; u < SEGMENTS * at.padded; u += TILE_THREADS) {
        const int segment = u / at.padded, l = u % at.padded;
        struct running x = {ends_m[l], ends_alpha[l]};
        const float before = x.m;
        for (int i = 1; i <= segment; i++)
            x = join(x, {ends_m[i * at.padded + l], ends_alpha[i * at.padded + l]});
        for (int i = 0; i < SEGMENT_ROWS; i++) {
            const int r = segment * SEGMENT_ROWS + i;
            const bool has = r < n && l < M;
            if (has)
                x = join(x, {theta[r * at.stride + l], 1});
            const float weight = has ? g[r * at.g_stride + window + l] / x.alpha : 0;
            m[r * at.stride + l] = has ? x.m : 0;
            c[r * at.stride + l] = weight;
            c16[r * at.c16_stride + l] =
                from_float<bf16>(has && before > -INFINITY ? weight * expf(before - x.m) : 0);
        }
        if (is_last && l < M && (n - 1) / SEGMENT_ROWS == segment) {
            slot_alpha[l] = x.alpha;
            last_m[l] = x.m;
        }
    }
    copy_async_wait<0>();
    __syncthreads();

    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, first = warp * 16;
    const int quad_row = lane / 4, quad_column = lane % 4 * 2;
    if (first < n) {
        float sums[4][8] = {};
        for (int l = 0; l < M; l += 4) {
            float4 top[2], weight[2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int row = (first + quad_row + 8 * r) * at.stride + l;
                top[r] = *(const float4 *)(m + row);
                weight[r] = *(const float4 *)(c + row);
            }
#pragma unroll
            for (int k = 0; k < 4; k++)
                if (k <= warp)
                    add_weights(sums[k], theta + (k * 16 + quad_column) * at.stride + l, at.stride,
                                top, weight);
        }
        uint32_t weights[4][4], state_weights[MOST_LATENTS / 16][4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
#pragma unroll
            for (int e = 0; e < 8; e++) {
                const int r = first + quad_row + e / 2 % 2 * 8;
                const int from = k * 16 + quad_column + e / 4 * 8 + e % 2;
                sums[k][e] = from <= r ? sums[k][e] : 0;
            }
#pragma unroll
            for (int e = 0; e < 4; e++)
                weights[k][e] = pack(sums[k][2 * e], sums[k][2 * e + 1]);
        }
#pragma unroll
        for (int k = 0; k < MOST_LATENTS / 16; k++)
            if (k * 16 < at.padded)
                ldmatrix_x4(state_weights[k],
                            c16 + (first + lane % 16) * at.c16_stride + k * 16 + lane / 16 * 8);

        float p0[2];
        bf16 *out[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int row = first + quad_row + 8 * r;
            p0[r] = call->blend ? g[row * at.g_stride] : 0;
            out[r] = (bf16 *)call->out + (piece.row + row) * call->out_stride + h * d;
        }
        for (int i = 0; i < d; i += 16) {
            uint32_t local[2][2] = {};
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (call->blend && first + quad_row + e % 2 * 8 < n)
                    local[e / 2][e % 2] =
                        *(const uint32_t *)(out[e % 2] + i + e / 2 * 8 + quad_column);
            float x[2][4] = {};
            uint32_t b[4];
#pragma unroll
            for (int k = 0; k < MOST_LATENTS / 16; k++)
                if (k * 16 < at.padded) {
                    ldmatrix_x4_trans(b, s16 + (k * 16 + lane % 16) * at.wide_stride + i +
                                             lane / 16 * 8);
                    mma_bf16(x[0], state_weights[k], b);
                    mma_bf16(x[1], state_weights[k], b + 2);
                }
#pragma unroll
            for (int k = 0; k < 4; k++)
                if (k <= warp) {
                    ldmatrix_x4_trans(b, v + (k * 16 + lane % 16) * at.wide_stride + i +
                                             lane / 16 * 8);
                    mma_bf16(x[0], weights[k], b);
                    mma_bf16(x[1], weights[k], b + 2);
                }
#pragma unroll
            for (int e = 0; e < 4; e++) {
                if (first + quad_row + e % 2 * 8 >= n)
                    continue;
                const __nv_bfloat162 old = *(const __nv_bfloat162 *)&local[e / 2][e % 2];
                const float *y = x[e / 2] + e % 2 * 2, blend = p0[e % 2];
                *(uint32_t *)(out[e % 2] + i + e / 2 * 8 + quad_column) =
                    pack(fmaf(blend, to_float(old.x), y[0]), fmaf(blend, to_float(old.y), y[1]));
            }
        }
    }
    if (!is_last)
        return;
    __syncthreads();
    leave_state(slot_s, start_s, ends_m, last_m, theta, v, &at, n, M, d, fresh);
    for (int l = threadIdx.x; l < M; l += TILE_THREADS)
        slot_m[l] = last_m[l];
}

bool aligned(const void *p)
{
    return ((uintptr_t)p & 15) == 0;
}

} // namespace

bool latent_tiles(struct cuda *c, const struct latent_call *call, const float *states,
                  size_t state_values)
{
    const struct latent_shape *sh = &call->shape;
    const struct tile_layout at = layout_of(sh);
    if (!call->half || sh->head_dim % 16 || sh->n_latents > MOST_LATENTS || at.bytes > MAX_SHARED ||
        call->v_stride % VEC || call->out_stride % VEC || !aligned(call->v) ||
        !aligned(call->out) || c->step.n_pieces > 65535 || (sh->gated_window && !call->blend))
        return false;
    struct tile_args a = {};
    a.step = c->step;
    a.call = *call;
    a.states = states;
    a.state_values = state_values;
    launch(&c->queue, "latent_tile", latent_tile, dim3(sh->n_heads, c->step.n_pieces), TILE_THREADS,
           at.bytes, a);
    return true;
}
