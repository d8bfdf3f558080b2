/* latent.cu - causal Latte, P(eq 8-12, 19), for decode rows and prompts.
 *
 * Prompts go by pieces of PIECE_ROWS rows, so that their cost is linear, their memory constant
 * and a long prompt fills the chip:
 *   1 latent_sums  each piece but a sequence's last: its own m, alpha, s from nothing
 *   2 latent_scan  the state each piece starts from: slot, then one piece after the other
 *   3 latent_piece the rows of a piece one by one from its start; the last one's end is the
 *                  slot's new state
 * In bf16 1 and 3 are those of latent_tile.cu, all rows at once, for shapes it knows.
 * A sequence of one piece needs 3 alone, from the slot to the slot: that is decode.
 * Rows follow P(eq 19) itself with the running maximum of every row, so a row far below the
 * maximum of its piece keeps its digits. Letters as in backend.h.
 */
#include <float.h>

#include "engine/kernels/cuda/attention.cuh"

extern "C" {
#include "engine/base/error.h"
}

namespace
{

enum {
    CHUNK = 8,              /* rows whose scalars are in shared memory at a time */
    GROUP = 8,              /* latents a thread of latent_sums holds */
    LANES = 8,              /* that share a latent's rows there */
    AHEAD = 16,             /* rows of values it has in flight */
    SCAN_PIECES = 16,       /* that a thread of latent_scan has at a time: a segment */
    SCAN_SEGMENTS = 8,      /* of a sequence that a block has at a time, at most */
    SCAN_THREADS = 800,     /* of a block of latent_scan at most */
    SCANS = 31,             /* sequences scanned at once */
    THREADS = 256,          /* of a block at most */
    MAX_SHARED = 96 * 1024, /* what a block may have on every chip from 8.0 on */
};

static constexpr float LOG2E = 1.4426950408889634f;

struct latent_args {
    struct device_step step;
    struct latent_call call;
    float *states; /* [pieces, state_values]: m [L], alpha [L], s [L, d] */
    size_t state_values;
    int heads;             /* of a block */
    int staged;            /* rows whose theta and g a block holds at a time */
    int latents, segments; /* of a block of latent_scan */
    bool whole;            /* a block takes a whole sequence, not a piece */
};

/* exp(-|a - b|): of two weights below a common maximum one is 1 and the other is this. */
__device__ __forceinline__ float exp_apart(float a, float b)
{
    return expf(-fabsf(a - b));
}

template <class T, int N> struct columns {
    T x[N];
};
template <> struct alignas(8) columns<float, 2> {
    float x[2];
};
template <> struct alignas(4) columns<bf16, 2> {
    bf16 x[2];
};

/* Rows [n_rows, n] of global memory into shared rows of to_stride floats; no barrier. */
__device__ void stage(float *to, int to_stride, const float *from, int64_t from_stride, int n_rows,
                      int n)
{
    const int row_step = blockDim.x / n, column_step = blockDim.x % n;
    int row = threadIdx.x / n, column = threadIdx.x % n;
    while (row < n_rows) {
        float x[8];
        int at[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            at[i] = row < n_rows ? row * to_stride + column : -1;
            x[i] = row < n_rows ? from[row * from_stride + column] : 0;
            row += row_step;
            column += column_step;
            if (column >= n) {
                column -= n;
                row++;
            }
        }
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (at[i] >= 0)
                to[at[i]] = x[i];
    }
}

/* n floats between shared and global memory, by 16 bytes where both ends allow; no barrier. */
__device__ void move_floats(float *to, const float *from, int n)
{
    int whole = 0;
    if ((((uintptr_t)to | (uintptr_t)from) & 15) == 0) {
        whole = n / 4;
#pragma unroll 4
        for (int i = threadIdx.x; i < whole; i += blockDim.x)
            ((float4 *)to)[i] = ((const float4 *)from)[i];
    }
    for (int i = 4 * whole + threadIdx.x; i < n; i += blockDim.x)
        to[i] = from[i];
}

/* Row r's softmax over one head's gates, in place. */
__device__ void softmax_in_place(float *g, int n)
{
    float top = -INFINITY, sum = 0;
    for (int i = 0; i < n; i++)
        top = fmaxf(top, g[i]);
    for (int i = 0; i < n; i++) {
        const float p = g[i] == top ? 1 : expf(g[i] - top);
        g[i] = p;
        sum += p;
    }
    const float scale = 1 / sum;
    for (int i = 0; i < n; i++)
        g[i] *= scale;
}

/* The scalars of one latent over a chunk of n rows: keep and take for s, weight = p / alpha for
 * the output. Rows beyond n change nothing. theta and p: rows of the given strides. */
__device__ __forceinline__ void latent_scalars(float *keep, float *take, float *weight, float *m,
                                               float *alpha, const float *theta, int theta_stride,
                                               const float *p, int p_stride, int n)
{
    float before = *m, sum = *alpha;
#pragma unroll
    for (int r = 0; r < CHUNK; r++) {
        float k = 1, t = 0, w = 0;
        if (r < n) {
            const float now = theta[r * theta_stride], e = exp_apart(before, now);
            k = before >= now ? 1 : e;
            t = now >= before ? 1 : e;
            sum = fmaf(sum, k, t);
            before = fmaxf(before, now);
            w = p[r * p_stride] / sum;
        }
        keep[r] = k;
        take[r] = t;
        weight[r] = w;
    }
    *m = before;
    *alpha = sum;
}

template <int COLS> struct chunk_values {
    float v[CHUNK][COLS], out[CHUNK][COLS];
};

/* s = s keep + take v and out += weight s over a chunk, all latents of a head, COLS columns. */
template <int COLS>
__device__ __forceinline__ void latent_columns(struct chunk_values<COLS> *c, float *s, int d,
                                               const float *keep, const float *take,
                                               const float *weight, int n_latents)
{
    for (int l = 0; l < n_latents; l++, s += d, keep += CHUNK, take += CHUNK, weight += CHUNK) {
        struct columns<float, COLS> x = *(const struct columns<float, COLS> *)s;
        float k[CHUNK], t[CHUNK], w[CHUNK];
#pragma unroll
        for (int r = 0; r < CHUNK; r += 4) {
            *(float4 *)(k + r) = *(const float4 *)(keep + r);
            *(float4 *)(t + r) = *(const float4 *)(take + r);
            *(float4 *)(w + r) = *(const float4 *)(weight + r);
        }
#pragma unroll
        for (int r = 0; r < CHUNK; r++)
#pragma unroll
            for (int j = 0; j < COLS; j++) {
                x.x[j] = fmaf(x.x[j], k[r], t[r] * c->v[r][j]);
                c->out[r][j] = fmaf(w[r], x.x[j], c->out[r][j]);
            }
        *(struct columns<float, COLS> *)s = x;
    }
}

/* Shared memory of latent_piece, in floats; every part starts at a multiple of 4. */
struct piece_layout {
    int theta_stride, p_stride;
    int scalars, m, alpha, theta, p, s, end;
};

__host__ __device__ inline int up4(int n)
{
    return (n + 3) / 4 * 4;
}

/* Odd strides for p, which a thread walks along. */
__host__ __device__ inline struct piece_layout piece_layout_of(const struct latent_args *a,
                                                               bool s_inside)
{
    const struct latent_shape *sh = &a->call.shape;
    const int n = a->heads * sh->n_latents;
    struct piece_layout l;
    l.theta_stride = n;
    l.p_stride = a->heads * (sh->n_latents + sh->gated_window) | 1;
    l.scalars = 0;
    l.m = 2 * 3 * n * CHUNK;
    l.alpha = l.m + up4(n);
    l.theta = l.alpha + up4(n);
    l.p = l.theta + up4(a->staged * l.theta_stride);
    l.s = l.p + up4(a->staged * l.p_stride);
    l.end = l.s + (s_inside ? n * sh->head_dim : 0);
    return l;
}

/* One block: the rows of a piece (or a whole sequence) for `heads` heads. Reads theta, g, v and
 * the start state once and writes out: at 8192 rows, 8 heads, M 16, d 96 in bf16 that is 40 MB,
 * mostly in L2; the floor is arithmetic, 3 operations for each of 100M products: 11 us on 132
 * SMs. A thread has COLS columns of one head and walks over its latents, CHUNK rows at a time.
 * INSIDE: s is held in shared memory; else worked on where the slot holds it (`whole` only). */
template <class T, int COLS, bool INSIDE>
__global__ void __launch_bounds__(THREADS) latent_piece(const struct latent_args a)
{
    pdl_trigger();
    pdl_wait();
    const struct device_step *step = &a.step;
    const struct latent_call *call = &a.call;
    const int index = blockIdx.x;
    if (index >= (a.whole ? step->sizes->n_seqs : step->sizes->n_pieces))
        return;

    struct piece piece;
    if (a.whole) {
        piece.seq = index;
        piece.row = step->seq_start[index];
        piece.n_rows = step->seq_start[index + 1] - piece.row;
        piece.first = index;
    } else {
        piece = step->pieces[index];
    }
    const bool is_last = piece.row + piece.n_rows == step->seq_start[piece.seq + 1];
    const bool alone = is_last && piece.first == index; /* no other piece: slot to slot */
    const int64_t slot = step->seq_slot[piece.seq];

    const int H = call->shape.n_heads, M = call->shape.n_latents, d = call->shape.head_dim;
    const int window = call->shape.gated_window, n_g = M + window, L = H * M;
    const int h0 = blockIdx.y * a.heads, n = a.heads * M, l0 = h0 * M;

    DYNAMIC_SHARED(float, shared);
    const struct piece_layout at = piece_layout_of(&a, INSIDE);
    float *slot_m = call->m.data + slot * call->m.row_values + l0;
    float *slot_alpha = call->alpha.data + slot * call->alpha.row_values + l0;
    float *slot_s = call->s.data + slot * call->s.row_values + (int64_t)l0 * d;
    float *s = INSIDE ? shared + at.s : slot_s;

    const float *start = a.states + (size_t)index * a.state_values;
    const float *start_m = alone ? slot_m : start + l0;
    const float *start_alpha = alone ? slot_alpha : start + L + l0;
    const bool fresh = alone && step->positions[piece.row] == 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        shared[at.m + i] = fresh ? -INFINITY : start_m[i];
        shared[at.alpha + i] = fresh ? 0 : start_alpha[i];
    }
    if (fresh)
        for (int i = threadIdx.x; i < n * d; i += blockDim.x)
            s[i] = 0;
    else if (INSIDE)
        move_floats(s, alone ? slot_s : start + 2 * L + (size_t)l0 * d, n * d);

    const int per_head = d / COLS, units = a.heads * per_head;
    int buffer = 0;
    for (int r0 = 0; r0 < piece.n_rows; r0 += a.staged) {
        const int staged = min(a.staged, piece.n_rows - r0);
        const int64_t row0 = piece.row + r0;
        __syncthreads();
        stage(shared + at.theta, at.theta_stride, call->theta + row0 * call->theta_stride + l0,
              call->theta_stride, staged, n);
        stage(shared + at.p, at.p_stride, call->g + row0 * call->g_stride + h0 * n_g,
              call->g_stride, staged, a.heads * n_g);
        __syncthreads();
        for (int i = threadIdx.x; i < staged * a.heads; i += blockDim.x) {
            const int r = i / a.heads, h = i % a.heads;
            float *p = shared + at.p + r * at.p_stride + h * n_g;
            softmax_in_place(p, n_g);
            if (window && call->p0)
                call->p0[(row0 + r) * H + h0 + h] = p[0];
        }
        __syncthreads();

        /* Scalars of the next chunk go to the other buffer while slow warps still read this. */
        for (int c0 = 0; c0 < staged; c0 += CHUNK, buffer ^= 1) {
            const int rows = min((int)CHUNK, staged - c0);
            float *keep = shared + at.scalars + buffer * 3 * n * CHUNK;
            float *take = keep + n * CHUNK, *weight = take + n * CHUNK;
            struct columns<T, COLS> v[CHUNK], local[CHUNK];
            for (int u = threadIdx.x; u == (int)threadIdx.x || u < units; u += blockDim.x) {
                const int h = u / per_head, i = u % per_head * COLS;
                if (u < units) {
                    const int kv = (h0 + h) / (H / call->shape.n_kv_heads);
                    const T *values =
                        (const T *)call->v + (row0 + c0) * call->v_stride + kv * d + i;
                    const T *out =
                        (const T *)call->out + (row0 + c0) * call->out_stride + (h0 + h) * d + i;
#pragma unroll
                    for (int r = 0; r < CHUNK; r++)
                        if (r < rows) {
                            v[r] = *(const struct columns<T, COLS> *)(values + r * call->v_stride);
                            if (call->blend)
                                local[r] =
                                    *(const struct columns<T, COLS> *)(out + r * call->out_stride);
                        }
                }
                if (u == (int)threadIdx.x) { /* while the loads are on their way */
                    for (int l = threadIdx.x; l < n; l += blockDim.x)
                        latent_scalars(
                            keep + l * CHUNK, take + l * CHUNK, weight + l * CHUNK,
                            shared + at.m + l, shared + at.alpha + l,
                            shared + at.theta + c0 * at.theta_stride + l, at.theta_stride,
                            shared + at.p + c0 * at.p_stride + l / M * n_g + window + l % M,
                            at.p_stride, rows);
                    __syncthreads();
                }
                if (u >= units)
                    break;
                struct chunk_values<COLS> x;
#pragma unroll
                for (int r = 0; r < CHUNK; r++) {
                    const float p0 = call->blend && r < rows
                                         ? shared[at.p + (c0 + r) * at.p_stride + h * n_g]
                                         : 0;
#pragma unroll
                    for (int j = 0; j < COLS; j++) {
                        x.v[r][j] = r < rows ? to_float(v[r].x[j]) : 0;
                        x.out[r][j] = call->blend && r < rows ? p0 * to_float(local[r].x[j]) : 0;
                    }
                }
                latent_columns<COLS>(&x, s + (size_t)h * M * d + i, d, keep + h * M * CHUNK,
                                     take + h * M * CHUNK, weight + h * M * CHUNK, M);
                T *out = (T *)call->out + (row0 + c0) * call->out_stride + (h0 + h) * d + i;
#pragma unroll
                for (int r = 0; r < CHUNK; r++)
                    if (r < rows) {
                        struct columns<T, COLS> y;
#pragma unroll
                        for (int j = 0; j < COLS; j++)
                            y.x[j] = from_float<T>(x.out[r][j]);
                        *(struct columns<T, COLS> *)(out + r * call->out_stride) = y;
                    }
            }
        }
    }
    if (!is_last)
        return;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        slot_m[i] = shared[at.m + i];
        slot_alpha[i] = shared[at.alpha + i];
    }
    if (INSIDE)
        move_floats(slot_s, s, n * d);
}

__host__ __device__ inline int padded_latents(int n_latents)
{
    return (n_latents + GROUP - 1) / GROUP * GROUP;
}

/* m, alpha and s of a whole piece from nothing, relative to the piece's maximum. Reads theta and
 * v, writes L * (d + 2) floats a piece: 23 MB at 8192 rows of the main configuration, 1 operation
 * for each of 100M products, 4 us. A thread has COLS columns and GROUP latents of one head. */
template <class T, int COLS>
__global__ void __launch_bounds__(THREADS) latent_sums(const struct latent_args a)
{
    pdl_trigger();
    pdl_wait();
    const struct device_step *step = &a.step;
    const struct latent_call *call = &a.call;
    if (blockIdx.x >= (unsigned)step->sizes->n_pieces)
        return;
    const struct piece piece = step->pieces[blockIdx.x];
    if (piece.row + piece.n_rows == step->seq_start[piece.seq + 1])
        return; /* nobody starts from the end of a last piece */

    const int H = call->shape.n_heads, M = call->shape.n_latents, d = call->shape.head_dim;
    const int L = H * M, padded = padded_latents(M), stride = a.heads * padded;
    const int h0 = blockIdx.y * a.heads;
    DYNAMIC_SHARED(float, shared); /* [PIECE_ROWS, heads, padded] */
    for (int i = threadIdx.x; i < PIECE_ROWS * stride; i += blockDim.x)
        if (i % padded >= M)
            shared[i] = 0;
    for (int h = 0; h < a.heads; h++)
        stage(shared + h * padded, stride,
              call->theta + piece.row * call->theta_stride + (h0 + h) * M, call->theta_stride,
              PIECE_ROWS, M);
    __syncthreads();

    float *state = a.states + (size_t)blockIdx.x * a.state_values;
    /* Eight lanes a latent, each every eighth row; every lane goes through every shuffle. */
    for (int u0 = 0; u0 < a.heads * M * LANES; u0 += blockDim.x) {
        const int u = u0 + threadIdx.x, i = min(u / LANES, a.heads * M - 1), lane = u % LANES;
        const bool mine = u < a.heads * M * LANES;
        float *theta = shared + i / M * padded + i % M + lane * stride, top = -INFINITY, sum = 0;
        float x[PIECE_ROWS / LANES];
#pragma unroll
        for (int r = 0; r < PIECE_ROWS / LANES; r++) {
            x[r] = mine ? theta[r * LANES * stride] : 0;
            top = fmaxf(top, x[r]);
        }
        for (int o = LANES / 2; o; o >>= 1)
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, o));
#pragma unroll
        for (int r = 0; r < PIECE_ROWS / LANES; r++) {
            x[r] = x[r] == top ? 1 : expf(x[r] - top);
            sum += x[r];
            if (mine)
                theta[r * LANES * stride] = x[r];
        }
        for (int o = LANES / 2; o; o >>= 1)
            sum += __shfl_xor_sync(0xffffffffu, sum, o);
        if (mine && lane == 0) {
            state[h0 * M + i] = top;
            state[L + h0 * M + i] = sum;
        }
    }
    __syncthreads();

    const int per_head = d / COLS, groups = padded / GROUP, units = a.heads * per_head * groups;
    for (int u = threadIdx.x; u < units; u += blockDim.x) {
        const int group = u / (a.heads * per_head), rest = u % (a.heads * per_head);
        const int h = rest / per_head, i = rest % per_head * COLS;
        const int kv = (h0 + h) / (H / call->shape.n_kv_heads);
        const T *v = (const T *)call->v + piece.row * call->v_stride + kv * d + i;
        const float *e = shared + h * padded + group * GROUP;
        float sum[GROUP][COLS] = {};
        for (int r0 = 0; r0 < PIECE_ROWS; r0 += AHEAD) {
            struct columns<T, COLS> x[AHEAD];
#pragma unroll
            for (int r = 0; r < AHEAD; r++)
                x[r] = *(const struct columns<T, COLS> *)(v + (r0 + r) * call->v_stride);
#pragma unroll
            for (int r = 0; r < AHEAD; r++) {
                float w[GROUP];
                *(float4 *)w = *(const float4 *)(e + (r0 + r) * stride);
                *(float4 *)(w + 4) = *(const float4 *)(e + (r0 + r) * stride + 4);
#pragma unroll
                for (int l = 0; l < GROUP; l++)
#pragma unroll
                    for (int j = 0; j < COLS; j++)
                        sum[l][j] = fmaf(w[l], to_float(x[r].x[j]), sum[l][j]);
            }
        }
        float *s = state + 2 * L + (size_t)((h0 + h) * M + group * GROUP) * d + i;
#pragma unroll
        for (int l = 0; l < GROUP; l++)
            if (group * GROUP + l < M)
#pragma unroll
                for (int j = 0; j < COLS; j++)
                    s[(size_t)l * d + j] = sum[l][j];
    }
}

/* A state relative to its maximum: x is one column of s, or alpha. */
struct scanned {
    float m, x;
};

__device__ __forceinline__ struct scanned join(struct scanned a, struct scanned b)
{
    const float e = quick_exp2(-LOG2E * fabsf(a.m - b.m));
    return {fmaxf(a.m, b.m), a.m >= b.m ? fmaf(b.x, e, a.x) : fmaf(a.x, e, b.x)};
}

/* The number of the first piece of sequence `seq`, which begins with `row`: every sequence before
 * it has at most one piece that is not full. */
__device__ int first_piece(const struct device_step *step, int seq, int row)
{
    __shared__ int first;
    const int least = row / PIECE_ROWS, most = min(least + seq, step->sizes->n_pieces - 1);
    for (int i = least + threadIdx.x; i <= most; i += blockDim.x)
        if (step->pieces[i].row == row)
            first = i;
    __syncthreads();
    return first;
}

/* Threads of one latent are its columns and alpha, for each of `segments` segments; all of them
 * read a piece's m before a barrier, one overwrites it after. Segments are joined one after the
 * other, however many a block has at a time. */
__device__ void scan_sequence(const struct latent_args *a, int seq)
{
    const struct device_step *step = &a->step;
    const struct latent_call *call = &a->call;
    const int row = step->seq_start[seq], n_rows = step->seq_start[seq + 1] - row;
    const int n = (n_rows + PIECE_ROWS - 1) / PIECE_ROWS, first = first_piece(step, seq, row);
    const int64_t slot = step->seq_slot[seq];
    const bool fresh = step->positions[row] == 0;
    pdl_wait();

    const int L = call->shape.n_heads * call->shape.n_latents, d = call->shape.head_dim;
    const int width = d + 1, groups = a->latents * a->segments;
    const int group = min((int)threadIdx.x / width, groups - 1), i = threadIdx.x - group * width;
    const int segment = group % a->segments, l = blockIdx.x * a->latents + group / a->segments;
    const bool active = i < width && l < L;
    DYNAMIC_SHARED(float, piece_m);                                      /* [groups, SCAN_PIECES] */
    float *tops = piece_m + groups * SCAN_PIECES, *sums = tops + groups; /* [groups, width] */

    struct scanned carried = {-INFINITY, 0};
    if (active && !fresh) {
        carried.m = call->m.data[slot * call->m.row_values + l];
        carried.x = i < d ? call->s.data[slot * call->s.row_values + (int64_t)l * d + i]
                          : call->alpha.data[slot * call->alpha.row_values + l];
    }
    const int64_t values = (int64_t)a->state_values;
    float *m = a->states + first * values + l;
    float *x = m + (i < d ? 2 * L - l + l * d + i : L);
    for (int j0 = 0; j0 < n; j0 += a->segments * SCAN_PIECES) {
        const int from = j0 + segment * SCAN_PIECES, left = active ? n - from : 0;
        const float *own_m = piece_m + group * SCAN_PIECES, *x_from = x + from * values;
        float own[SCAN_PIECES];
#pragma unroll
        for (int j = 0; j < SCAN_PIECES; j++, x_from += values)
            own[j] = j < left - 1 ? *x_from : 0;
        for (int j = i; j < SCAN_PIECES && i < width; j += width)
            piece_m[group * SCAN_PIECES + j] = j < left - 1 ? m[(from + j) * values] : -FLT_MAX;
        __syncthreads();

        struct scanned all = {-FLT_MAX, 0};
#pragma unroll
        for (int j = 0; j < SCAN_PIECES; j++)
            all.m = fmaxf(all.m, own_m[j]);
#pragma unroll
        for (int j = 0; j < SCAN_PIECES; j++)
            all.x = fmaf(quick_exp2(LOG2E * (own_m[j] - all.m)), own[j], all.x);
        if (i == 0)
            tops[group] = all.m;
        if (i < width)
            sums[group * width + i] = all.x;
        __syncthreads();

        struct scanned at = carried;
        for (int k = 0; k < a->segments; k++) {
            const int other = group - segment + k;
            if (k == segment)
                at = carried;
            carried = join(carried, {tops[other], sums[other * width + min(i, d)]});
        }
        float *to = kept_address(x + from * values); /* not 16 addresses kept since */
#pragma unroll
        for (int j = 0; j < SCAN_PIECES; j++, to += values) {
            if (j < left) {
                if (i == 0)
                    m[(from + j) * values] = at.m;
                __stcg(to, at.x);
            }
            at = join(at, {own_m[j], own[j]});
        }
        __syncthreads();
    }
}

/* Pieces of a sequence one after the other: what latent_sums left for a piece gives way to the
 * state the piece starts from. Moves L * (d + 2) floats a piece each way, within L2: 13 MB for 128
 * pieces of the main configuration, 3 us, asked for at once. */
__global__ void __launch_bounds__(SCAN_THREADS) latent_scan(const struct latent_args a)
{
    pdl_trigger();
    const struct device_step *step = &a.step;
    const int n_seqs = step->sizes->n_seqs;
    for (int base = blockIdx.y; base < n_seqs; base += WARP * gridDim.y) {
        const int mine = base + (int)(threadIdx.x % WARP * gridDim.y);
        const bool several =
            mine < n_seqs && step->seq_start[mine + 1] - step->seq_start[mine] > PIECE_ROWS;
        unsigned found = __ballot_sync(0xffffffffu, several);
        for (; found; found &= found - 1)
            scan_sequence(&a, base + (__ffs((int)found) - 1) * (int)gridDim.y);
    }
    pdl_wait(); /* of blocks with nothing to do, too: the next kernel counts on it */
}

int round_to_warp(int n)
{
    return (n + WARP - 1) / WARP * WARP;
}

template <class T, int COLS> struct latent_family {
    static size_t piece_bytes(const struct latent_args *a, bool inside)
    {
        return (size_t)piece_layout_of(a, inside).end * sizeof(float);
    }

    /* Heads of a block: about 192 threads of it, but a block for every head of a few rows. */
    static void choose_heads(struct latent_args *a, int n_blocks, int n_sms)
    {
        const int H = a->call.shape.n_heads, per_head = a->call.shape.head_dim / COLS;
        a->heads = 1;
        for (int heads = 2; heads <= H && heads * per_head <= 192; heads++)
            if (H % heads == 0 && n_blocks * H / heads >= 2 * n_sms)
                a->heads = heads;
        while (a->heads > 1 && (H % a->heads || piece_bytes(a, true) > 64 * 1024))
            a->heads--;
    }

    static void rows(struct cuda *c, struct latent_args *a, int n_blocks)
    {
        const int H = a->call.shape.n_heads;
        a->staged = PIECE_ROWS;
        choose_heads(a, n_blocks, c->queue.n_sms);
        if (piece_bytes(a, true) > MAX_SHARED)
            a->staged = CHUNK;
        const bool inside = piece_bytes(a, true) <= MAX_SHARED;
        const dim3 grid(n_blocks, H / a->heads);
        const int units = a->heads * a->call.shape.head_dim / COLS;
        const int block = min((int)THREADS, round_to_warp(units));
        CHECK(inside || a->whole);
        if (inside)
            launch(&c->queue, "latent_piece", latent_piece<T, COLS, true>, grid, block,
                   piece_bytes(a, true), *a);
        else
            launch(&c->queue, "latent_piece", latent_piece<T, COLS, false>, grid, block,
                   piece_bytes(a, false), *a);
    }

    static void sums(struct cuda *c, struct latent_args *a)
    {
        const int H = a->call.shape.n_heads, n = c->step.n_pieces;
        const int padded = padded_latents(a->call.shape.n_latents);
        const int per_head = a->call.shape.head_dim / COLS * (padded / GROUP);
        const size_t head_bytes = (size_t)PIECE_ROWS * padded * sizeof(float);
        a->heads = 2 * per_head <= THREADS && H % 2 == 0 && 2 * head_bytes <= MAX_SHARED ? 2 : 1;
        const size_t bytes = a->heads * head_bytes;
        const int block = min((int)THREADS, round_to_warp(a->heads * per_head));
        launch(&c->queue, "latent_sums", latent_sums<T, COLS>, dim3(n, H / a->heads), block, bytes,
               *a);
    }

    static void scan(struct cuda *c, struct latent_args *a)
    {
        const int L = a->call.shape.n_heads * a->call.shape.n_latents;
        const int width = a->call.shape.head_dim + 1;
        const int most = min((int)SCAN_SEGMENTS, SCAN_THREADS / width);
        const int seqs = min(c->step.seqs, c->step.rows / (PIECE_ROWS + 1) + 1);
        a->segments = min(most, ceil_div(c->step.rows, seqs * PIECE_ROWS * SCAN_PIECES));
        a->latents = max(1, 128 / (width * a->segments));
        const int groups = a->latents * a->segments;
        const size_t bytes = (size_t)groups * (SCAN_PIECES + 1 + width) * sizeof(float);
        launch(&c->queue, "latent_scan", latent_scan,
               dim3(ceil_div(L, a->latents), min(seqs, (int)SCANS)), round_to_warp(groups * width),
               bytes, *a);
    }

    /* Whether pieces of this shape have room for their states here. */
    static bool by_pieces(const struct cuda *c, struct latent_args *a)
    {
        const struct latent_shape *sh = &a->call.shape;
        a->heads = 1;
        a->staged = CHUNK;
        return c->piece_states && c->step.n_pieces <= c->max_pieces &&
               a->state_values <= c->piece_values && sh->head_dim < SCAN_THREADS &&
               piece_bytes(a, true) <= MAX_SHARED &&
               (size_t)PIECE_ROWS * padded_latents(sh->n_latents) * sizeof(float) <= MAX_SHARED;
    }

    static void run(struct cuda *c, const struct latent_call *call)
    {
        struct latent_args a = {};
        a.step = c->step;
        a.call = *call;
        a.states = c->piece_states;
        a.state_values =
            (size_t)call->shape.n_heads * call->shape.n_latents * (call->shape.head_dim + 2);
        a.whole = !by_pieces(c, &a);
        const bool tiles = !a.whole && latent_tiles_fit(c, call);
        if (!a.whole && !c->step.decode) {
            tiles ? latent_tile_sums(c, call, a.states, a.state_values) : sums(c, &a);
            scan(c, &a);
        }
        if (tiles)
            latent_tiles(c, call, a.states, a.state_values);
        else
            rows(c, &a, a.whole ? c->step.seqs : c->step.n_pieces);
    }
};

} // namespace

void latent_rows(struct cuda *c, const struct latent_call *call)
{
    const bool pairs =
        call->shape.head_dim % 2 == 0 && call->v_stride % 2 == 0 && call->out_stride % 2 == 0;
    if (call->half)
        pairs ? latent_family<bf16, 2>::run(c, call) : latent_family<bf16, 1>::run(c, call);
    else
        pairs ? latent_family<float, 2>::run(c, call) : latent_family<float, 1>::run(c, call);
}

void cuda_latent(struct backend *b, struct buffer *out, struct buffer *p0,
                 const struct buffer *theta, const struct buffer *g, const struct buffer *v,
                 const struct slab *m, const struct slab *alpha, const struct slab *s,
                 const struct latent_shape *shape)
{
    struct cuda *c = cuda_of(b);
    const int H = shape->n_heads, M = shape->n_latents, d = shape->head_dim;
    struct latent_call call = {};
    call.theta = floats(theta);
    call.g = floats(g);
    call.theta_stride = (int64_t)H * M;
    call.g_stride = (int64_t)H * (M + shape->gated_window);
    call.v = floats(v);
    call.v_stride = (int64_t)shape->n_kv_heads * d;
    call.out = floats(out);
    call.out_stride = (int64_t)H * d;
    call.p0 = shape->gated_window ? floats(p0) : nullptr;
    call.shape = *shape;
    call.m = {floats(m->buffer), m->row_values};
    call.alpha = {floats(alpha->buffer), alpha->row_values};
    call.s = {floats(s->buffer), s->row_values};
    latent_rows(c, &call);
}
