/* prompt.cu - a layer's mixing for prompts (any step): the fused layer's way for many rows.
 *
 *   1 prompt_rope    q and k where they lie: optional norm of each head, then rope
 *   2 prompt_window  window attention by tiles of 64 queries, P(eq 13-14), into out
 *   3 latent_rows    latents by pieces (latent.cu); out = p0 * out + latents
 *   4 update_rings   the ring takes the last w rows (window.cu)
 *
 * Cost is linear in the rows for a fixed window, and there is no scratch. What a row gets depends
 * on its own sequence alone.
 */
#include <float.h>
#include <limits.h>

#include "engine/kernels/cuda/attention.cuh"
#include "engine/kernels/cuda/fused.cuh"

extern "C" {
#include "engine/base/error.h"
}

namespace
{

enum {
    ROPE_THREADS = 192,
    ROPE_ROWS = 2,      /* of a block */
    TILE_THREADS = 128, /* four warps of 16 queries: a piece */
    TILE_KEYS = 32,
    MOST_PIECES = 4, /* of a block */
    VEC = 8,         /* bf16 values of 16 bytes */
};

struct alignas(16) eight {
    bf16 x[VEC];
};

/* ---- q and k ---- */

struct rope_args {
    struct device_step step;
    bf16 *rows[2]; /* q, k: [rows, stride], head_dim values a head */
    int n_heads[2];
    const float *norm[2]; /* [d] or NULL */
    int64_t stride;
    float eps;
    const double *frequencies;
    int head_dim;
};

/* Where item `item` of a row lies. */
__device__ __forceinline__ bf16 *item_values(const struct rope_args *a, int row, int item)
{
    const int d = a->head_dim, per_head = d / (2 * VEC), head = item / per_head;
    bf16 *const at_head =
        head < a->n_heads[0] ? a->rows[0] + head * d : a->rows[1] + (head - a->n_heads[0]) * d;
    return at_head + row * a->stride + item % per_head * VEC;
}

__device__ __forceinline__ float square_sum(const bf16 *from)
{
    const struct eight x = *(const struct eight *)from;
    float sum = 0;
#pragma unroll
    for (int e = 0; e < VEC; e++)
        sum = fmaf(to_float(x.x[e]), to_float(x.x[e]), sum);
    return sum;
}

/* x and y, `half` columns apart, are normed if there is a norm, and turned. */
__device__ __forceinline__ void turn(struct eight *x, struct eight *y, const float *sine,
                                     const float *cosine, const float *norm, int half, float scale)
{
#pragma unroll
    for (int e = 0; e < VEC; e++) {
        float u = to_float(x->x[e]), v = to_float(y->x[e]);
        if (norm) {
            u *= scale * norm[e];
            v *= scale * norm[e + half];
        }
        x->x[e] = from_float<bf16>(fmaf(u, cosine[e], -v * sine[e]));
        y->x[e] = from_float<bf16>(fmaf(u, sine[e], v * cosine[e]));
    }
}

/* A block: ROPE_ROWS rows; an item is VEC columns of one head's first half and as many d/2 on.
 * Reads and writes (H + KV) d bf16 values a row, 50 MB at 8192 rows of the main configuration, of
 * which the products before left most in L2: 12 us from memory. The angles, known from the step
 * alone, are there before the wait. */
__global__ void __launch_bounds__(ROPE_THREADS, 8) prompt_rope(const struct rope_args a)
{
    pdl_trigger();
    const int first = blockIdx.x * ROPE_ROWS, d = a.head_dim, half = d / 2;
    const int n_rows = min((int)ROPE_ROWS, a.step.sizes->n_rows - first);
    const int per_head = half / VEC, items = (a.n_heads[0] + a.n_heads[1]) * per_head;
    DYNAMIC_SHARED(float, shared);
    float *sine = shared, *cosine = sine + ROPE_ROWS * half; /* [rows, half] */
    float *squares = cosine + ROPE_ROWS * half;              /* [rows, items] */
    for (int at = threadIdx.x; at < n_rows * half; at += ROPE_THREADS)
        angle(a.step.positions[first + at / half], a.frequencies[at % half], sine + at,
              cosine + at);
    pdl_wait();

    for (int at = threadIdx.x; at < n_rows * items && (a.norm[0] || a.norm[1]);
         at += ROPE_THREADS) {
        const bf16 *values = item_values(&a, first + at / items, at % items);
        squares[at] = square_sum(values) + square_sum(values + half);
    }
    __syncthreads();

    for (int at = threadIdx.x; at < n_rows * items; at += ROPE_THREADS) {
        const int r = at / items, item = at - r * items, head = item / per_head;
        const int i = (item - head * per_head) * VEC;
        bf16 *const values = item_values(&a, first + r, item);
        struct eight x = *(const struct eight *)values, y = *(const struct eight *)(values + half);
        const float *norm = a.norm[head >= a.n_heads[0]];
        float sum = 0;
        for (int n = 0; n < per_head && norm; n++)
            sum += squares[r * items + head * per_head + n];
        turn(&x, &y, sine + r * half + i, cosine + r * half + i, norm ? norm + i : nullptr, half,
             1 / sqrtf(sum / d + a.eps));
        *(struct eight *)values = x;
        *(struct eight *)(values + half) = y;
    }
}

/* ---- the window ---- */

struct tile_args {
    struct device_step step;
    const bf16 *q, *k, *v; /* q and k turned: [rows, stride], H d and KV d values */
    int64_t stride;
    struct device_ring ring_k, ring_v;
    struct window_shape shape;
    bf16 *out; /* [rows, H*d] */
};

/* VEC values of a ring as bf16 in shared memory, zeros where !valid; bf16 rings are copied in the
 * background. */
__device__ __forceinline__ void fetch(bf16 *to, const bf16 *from, bool valid)
{
    copy_async_16(to, from, valid);
}
__device__ __forceinline__ void fetch(bf16 *to, const float *from, bool valid)
{
    const float4 zeros = make_float4(0, 0, 0, 0);
    const float4 a = valid ? *(const float4 *)from : zeros;
    const float4 b = valid ? *(const float4 *)(from + 4) : zeros;
    const struct eight x = {{from_float<bf16>(a.x), from_float<bf16>(a.y), from_float<bf16>(a.z),
                             from_float<bf16>(a.w), from_float<bf16>(b.x), from_float<bf16>(b.y),
                             from_float<bf16>(b.z), from_float<bf16>(b.w)}};
    *(struct eight *)to = x;
}
__device__ __forceinline__ void fetch(bf16 *to, const fp8 *from, bool valid)
{
    alignas(8) fp8 raw[VEC];
    *(uint2 *)raw = valid ? *(const uint2 *)from : make_uint2(0, 0);
    struct eight x;
#pragma unroll
    for (int e = 0; e < VEC; e++)
        x.x[e] = from_float<bf16>(to_float(raw[e]));
    *(struct eight *)to = x;
}

__device__ __forceinline__ uint32_t pack(float low, float high)
{
    const __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
    return *(const uint32_t *)&x;
}

/* Sizes for heads of up to D values, the rest zeros. In shared memory a row has D + VEC values, so
 * that the rows an ldmatrix reads at once lie in different banks. */
template <int D> struct tile {
    static constexpr int blocks = D > 128 ? 2 : D > 96 ? 3 : 4; /* of an SM */
    static constexpr int stages = D > 192 ? 2 : 3;              /* of keys and values, or queries */
    static constexpr int stride = D + VEC;
    static constexpr int stage = 2 * TILE_KEYS * stride;                   /* values */
    static constexpr size_t bytes = (size_t)stages * stage * sizeof(bf16); /* below 98 KB */
};
static_assert(2 * TILE_KEYS == PIECE_ROWS, "a stage has room for a piece's queries");

/* A piece and what its rows attend to. Rows and keys are counted from the piece's first row, keys
 * before it are negative. Tiles begin at multiples of their length, as pieces do: a tile is from
 * the ring or from the step. */
template <class R> struct window_piece {
    const bf16 *q, *k, *v; /* row 0 */
    bf16 *out;
    const R *ring_k, *ring_v;
    int place;       /* of key 0 in the ring */
    int first;       /* of the first tile */
    int oldest;      /* the first key seen */
    int own, n_rows; /* the step's first key; one after its last is n_rows */
};

template <class R>
__device__ __forceinline__ void find_piece(struct window_piece<R> *p, const struct tile_args *a,
                                           int index, int h)
{
    const struct piece piece = a->step.pieces[index];
    const int H = a->shape.n_heads, kv = h / (H / a->shape.n_kv_heads), d = a->shape.head_dim;
    const int64_t w = a->shape.ring_rows, slot = a->step.seq_slot[piece.seq];
    const int64_t position = a->step.positions[piece.row], row = piece.row * a->stride;
    p->q = a->q + row + h * d;
    p->k = a->k + row + kv * d;
    p->v = a->v + row + kv * d;
    p->out = a->out + ((int64_t)piece.row * H + h) * d;
    p->ring_k = (const R *)a->ring_k.data + slot * a->ring_k.row_values + kv * w * d;
    p->ring_v = (const R *)a->ring_v.data + slot * a->ring_v.row_values + kv * w * d;
    p->place = (int)(position % w);
    p->oldest = -(int)min(position, w - 1);
    p->first = -(TILE_KEYS - 1 - p->oldest) / TILE_KEYS * TILE_KEYS;
    p->own = a->step.seq_start[piece.seq] - piece.row;
    p->n_rows = piece.n_rows;
}

/* What a thread copies of the rows that a block does, PASS rows at a time: columns i on. row: the
 * first one; beyond all where there are more threads than chunks. */
template <int D> struct share {
    static constexpr int CHUNKS = D / VEC, PASS = TILE_THREADS / CHUNKS;
    int row, i;
};

template <int D> __device__ __forceinline__ share<D> my_share(void)
{
    const int CHUNKS = share<D>::CHUNKS, at = threadIdx.x;
    return {at < share<D>::PASS * CHUNKS ? at / CHUNKS : (int)PIECE_ROWS, VEC * (at % CHUNKS)};
}

/* Keys `first` on into a stage: keys, then values; zeros where there are none. */
template <int D, class R>
__device__ __forceinline__ void fetch_tile(bf16 *stage, const struct window_piece<R> *p, int first,
                                           const struct tile_args *a)
{
    constexpr int STRIDE = tile<D>::stride, PASS = share<D>::PASS;
    const struct share<D> mine = my_share<D>();
    const int d = a->shape.head_dim, key = first + mine.row, from_oldest = key - p->oldest;
    const unsigned n_keys = mine.i < d ? p->n_rows - p->oldest : 0;
    bf16 *to = stage + mine.row * STRIDE + mine.i;
    if (mine.row >= PASS)
        return;
    if (first >= p->own) {
        const bf16 *k = p->k + key * a->stride + mine.i, *v = p->v + key * a->stride + mine.i;
#pragma unroll
        for (int r = 0; r < TILE_KEYS; r += PASS) {
            const bool there = (unsigned)(from_oldest + r) < n_keys;
            if (r + PASS <= TILE_KEYS || mine.row + r < TILE_KEYS) {
                copy_async_16(to + r * STRIDE, k, there);
                copy_async_16(to + (TILE_KEYS + r) * STRIDE, v, there);
            }
            k += PASS * a->stride;
            v += PASS * a->stride;
        }
    } else {
#pragma unroll 1
        for (int r = 0; mine.row + r < TILE_KEYS; r += PASS) {
            const bool there = (unsigned)(from_oldest + r) < n_keys;
            const int64_t place = p->place + key + r;
            const int64_t at =
                there ? (place < 0 ? place + a->shape.ring_rows : place) * d + mine.i : 0;
            fetch(to + r * STRIDE, p->ring_k + at, there);
            fetch(to + (TILE_KEYS + r) * STRIDE, p->ring_v + at, there);
        }
    }
}

/* The piece's queries into a stage, zeros beyond the last. */
template <int D, class R>
__device__ __forceinline__ void fetch_queries(bf16 *stage, const struct window_piece<R> *p,
                                              const struct tile_args *a)
{
    const struct share<D> mine = my_share<D>();
#pragma unroll 2
    for (int r = mine.row; r < PIECE_ROWS; r += share<D>::PASS)
        copy_async_16(stage + r * tile<D>::stride + mine.i, p->q + r * a->stride + mine.i,
                      r < p->n_rows && mine.i < a->shape.head_dim);
}

/* Scores to base-2 logits, which are factor times what is left of them. */
struct score_scale {
    float factor, scale, cap; /* cap 0: none */
};

__device__ __forceinline__ struct score_scale score_scale_of(const struct window_shape *sh)
{
    const float log2e = 1.4426950408889634f;
    if (sh->softcap > 0) /* tanh(x) = 1 - 2 / (e^2x + 1) */
        return {sh->softcap * log2e, 2 * log2e * sh->scale / sh->softcap, sh->softcap};
    return {sh->scale * log2e, 1, 0};
}

/* 16 rows of a warp and what they have seen; lane l has a part of rows l/4 and l/4 + 8. */
template <int D> struct attention {
    uint32_t q[D / 16][4];  /* as mma_bf16's a */
    float sums[D / 8][4];   /* of weighted values, as mma_bf16's d */
    float top[2], total[2]; /* what weights are relative to, their sum */
    int row, oldest, width; /* row r, `row` on, sees keys from max(oldest, r - width + 1) to r */
};

template <int D>
__device__ __forceinline__ void begin_rows(struct attention<D> *t, const bf16 *queries)
{
    const int lane = threadIdx.x % WARP;
    const bf16 *from = queries + (t->row + lane % 16) * tile<D>::stride + lane / 16 * 8;
#pragma unroll
    for (int s = 0; s < D / 16; s++)
        ldmatrix_x4(t->q[s], from + s * 16);
#pragma unroll
    for (int n = 0; n < D / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            t->sums[n][e] = 0;
    t->top[0] = t->top[1] = -FLT_MAX; /* finite: a score of -inf is below it */
    t->total[0] = t->total[1] = 0;
}

/* Whether any row sees any key of the tile that begins with `key`; whether all see all. */
template <int D> __device__ __forceinline__ bool sees(const struct attention<D> *t, int key)
{
    return key <= t->row + 15 && key + TILE_KEYS > max(t->oldest, t->row - t->width + 1);
}
template <int D> __device__ __forceinline__ bool sees_all(const struct attention<D> *t, int key)
{
    return key + TILE_KEYS - 1 <= t->row && key >= max(t->oldest, t->row + 15 - t->width + 1);
}

/* scores of a tile's keys, `first` on, -inf where a row does not see them. */
template <int D>
__device__ __forceinline__ void score_tile(float (&scores)[TILE_KEYS / 8][4],
                                           const struct attention<D> *t, const bf16 *keys,
                                           int first, struct score_scale scale)
{
    const int lane = threadIdx.x % WARP;
    const bf16 *from = keys + (lane / 16 * 8 + lane % 8) * tile<D>::stride + lane / 8 % 2 * 8;
#pragma unroll
    for (int s = 0; s < D / 16; s++)
#pragma unroll
        for (int n = 0; n < TILE_KEYS; n += 16) {
            uint32_t k[4];
            ldmatrix_x4(k, from + n * tile<D>::stride + s * 16);
            mma_bf16(scores[n / 8], t->q[s], k);
            mma_bf16(scores[n / 8 + 1], t->q[s], k + 2);
        }
    if (scale.cap > 0) {
#pragma unroll
        for (int n = 0; n < TILE_KEYS / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                scores[n][e] = 1 - 2 * quick_reciprocal(quick_exp2(scores[n][e] * scale.scale) + 1);
    }
    if (sees_all(t, first))
        return;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int row = t->row + lane / 4 + 8 * r, ago = row - first - lane % 4 * 2;
        const int n_seen = min(t->width, row - t->oldest + 1); /* keys 0.. ago */
#pragma unroll
        for (int n = 0; n < TILE_KEYS / 8; n++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                if ((unsigned)(ago - n * 8 - e) >= (unsigned)n_seen)
                    scores[n][2 * r + e] = -INFINITY;
    }
}

/* What weights are relative to rises to the largest score where that is far above, and what was
 * added up is scaled: weights of up to 2^FAR do no harm. */
template <int D>
__device__ __forceinline__ void raise_tops(struct attention<D> *t,
                                           const float (&scores)[TILE_KEYS / 8][4], float factor)
{
    const float FAR = 8;
    float keep[2];
    bool rises = false;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float highest = fmaxf(scores[0][2 * r], scores[0][2 * r + 1]);
#pragma unroll
        for (int n = 1; n < TILE_KEYS / 8; n++)
            highest = fmaxf(highest, fmaxf(scores[n][2 * r], scores[n][2 * r + 1]));
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2)) * factor;
        const bool above = highest > t->top[r] + FAR;
        keep[r] = above ? quick_exp2(t->top[r] - highest) : 1;
        t->top[r] = above ? highest : t->top[r];
        rises |= above;
    }
    if (!__any_sync(0xffffffffu, rises))
        return;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        t->total[r] *= keep[r];
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            t->sums[n][2 * r] *= keep[r];
            t->sums[n][2 * r + 1] *= keep[r];
        }
    }
}

/* A tile's keys, `first` on, and their values, for the rows of a warp. */
template <int D>
__device__ __forceinline__ void attend(struct attention<D> *t, const bf16 *keys, int first,
                                       struct score_scale scale)
{
    const int lane = threadIdx.x % WARP;
    float scores[TILE_KEYS / 8][4] = {};
    score_tile(scores, t, keys, first, scale);
    raise_tops(t, scores, scale.factor);
    /* Weights as mma_bf16's a: rows g, g + 8 of 8 keys, then of the next 8. */
    uint32_t p[TILE_KEYS / 16][4];
#pragma unroll
    for (int n = 0; n < TILE_KEYS / 8; n++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float low = quick_exp2(fmaf(scores[n][2 * r], scale.factor, -t->top[r]));
            const float high = quick_exp2(fmaf(scores[n][2 * r + 1], scale.factor, -t->top[r]));
            t->total[r] += low + high;
            p[n / 2][n % 2 * 2 + r] = pack(low, high);
        }
    const bf16 *values = keys + (TILE_KEYS + lane % 16) * tile<D>::stride + lane / 16 * 8;
#pragma unroll
    for (int n = 0; n < TILE_KEYS; n += 16)
#pragma unroll
        for (int i = 0; i < D; i += 16) {
            uint32_t v[4];
            ldmatrix_x4_trans(v, values + n * tile<D>::stride + i);
            mma_bf16(t->sums[i / 8], p[n / 16], v);
            mma_bf16(t->sums[i / 8 + 1], p[n / 16], v + 2);
        }
}

/* out = sums / total. */
template <int D>
__device__ __forceinline__ void write_rows(const struct attention<D> *t, bf16 *out, int64_t stride,
                                           int n_rows, int d)
{
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float total = t->total[r];
        total += __shfl_xor_sync(0xffffffffu, total, 1);
        total += __shfl_xor_sync(0xffffffffu, total, 2);
        const float scale = quick_reciprocal(total);
        const int row = t->row + lane / 4 + 8 * r;
        bf16 *to = out + row * stride + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < D / 8; n++)
            if (row < n_rows && n * 8 < d)
                *(uint32_t *)(to + n * 8) =
                    pack(t->sums[n][2 * r] * scale, t->sums[n][2 * r + 1] * scale);
    }
}

/* What is in a stage: the tile of the block's piece `index` that begins with `key`, or, before the
 * piece's first tile, its queries. n_rows: the piece's. */
struct item {
    int index, key, n_rows;
};
enum { QUERIES = INT_MIN }; /* for a key */

template <class R>
__device__ __forceinline__ struct item next_item(struct item at,
                                                 const struct window_piece<R> *pieces)
{
    at.key = at.key == QUERIES ? pieces[at.index].first : at.key + TILE_KEYS;
    if (at.key < at.n_rows)
        return at;
    at.index++;
    return {at.index, QUERIES, pieces[at.index].n_rows}; /* of one more than there are: anything */
}

/* A block: the rows of up to MOST_PIECES adjacent pieces and one head, one piece after the other,
 * against the keys of positions t-w+1..t a tile at a time, the next tiles on their way meanwhile,
 * also those of the next piece. Reads (w + 64) keys and values for 64 rows, mostly from L2: 75 MB
 * at 8192 rows of the main configuration, and q, 12.6 MB; writes as much: 17 us. 4 GFLOP. */
template <int D, class R>
__global__ void __launch_bounds__(TILE_THREADS, tile<D>::blocks)
    prompt_window(const struct tile_args a, int n_together)
{
    __shared__ struct window_piece<R> pieces[MOST_PIECES + 1];
    DYNAMIC_SHARED(bf16, stages); /* [STAGES][keys, values][TILE_KEYS, stride] */
    constexpr int STAGES = tile<D>::stages, LAST = (STAGES - 1) * tile<D>::stage;
    pdl_trigger();
    const int first = blockIdx.x * n_together;
    const int n_pieces = min(n_together, a.step.sizes->n_pieces - first);
    if (n_pieces <= 0)
        return;
    if ((int)threadIdx.x < n_pieces)
        find_piece(&pieces[threadIdx.x], &a, first + threadIdx.x, blockIdx.y);
    __syncthreads();

    const struct score_scale scale = score_scale_of(&a.shape);
    struct attention<D> rows;
    rows.row = threadIdx.x / WARP * 16;
    rows.width = (int)a.shape.ring_rows;
    struct item at = {0, QUERIES, pieces[0].n_rows}, ahead = at;
    int stage = 0;
    pdl_wait();
    /* Each time around: what is STAGES - 1 items ahead is asked for, then `at` is looked at. */
#pragma unroll 1
    for (int n = 1 - STAGES; at.index < n_pieces; n++) {
        if (n >= 0) {
            copy_async_wait<STAGES - 2>();
            __syncthreads();
        }
        if (ahead.index < n_pieces) {
            const struct window_piece<R> *p = pieces + ahead.index;
            if (ahead.key == QUERIES)
                fetch_queries<D>(stages + stage, p, &a);
            else
                fetch_tile<D>(stages + stage, p, ahead.key, &a);
            ahead = next_item(ahead, pieces);
        }
        copy_async_commit();
        stage = stage < LAST ? stage + tile<D>::stage : 0;
        if (n < 0)
            continue;

        if (at.key == QUERIES) {
            rows.oldest = pieces[at.index].oldest;
            begin_rows(&rows, stages + stage);
        } else if (rows.row < at.n_rows) {
            if (sees(&rows, at.key))
                attend(&rows, stages + stage, at.key, scale);
            if (at.key + TILE_KEYS >= at.n_rows)
                write_rows(&rows, pieces[at.index].out, (int64_t)a.shape.n_heads * a.shape.head_dim,
                           at.n_rows, a.shape.head_dim);
        }
        at = next_item(at, pieces);
    }
}

/* ---- launching ---- */

template <int D, class R> void tiles_of(struct cuda *c, const struct tile_args *a)
{
    const int H = a->shape.n_heads, n = c->step.n_pieces, room = tile<D>::blocks * c->queue.n_sms;
    const int together = min(ceil_div(n * H, room), (int)MOST_PIECES); /* all blocks at a time */
    launch(&c->queue, "prompt_window", prompt_window<D, R>, dim3(ceil_div(n, together), H),
           TILE_THREADS, tile<D>::bytes, *a, together);
}

template <int D> void tiles_of(struct cuda *c, const struct tile_args *a)
{
    switch (a->ring_k.dtype) {
    case DTYPE_F32:
        tiles_of<D, float>(c, a);
        break;
    case DTYPE_BF16:
        tiles_of<D, bf16>(c, a);
        break;
    case DTYPE_F8_E4M3:
        tiles_of<D, fp8>(c, a);
        break;
    default:
        CHECK(!"a dtype that rings have");
    }
}

void launch_tiles(struct cuda *c, const struct tile_args *a)
{
    const int d = a->shape.head_dim;
    if (d <= 32)
        tiles_of<32>(c, a);
    else if (d <= 64)
        tiles_of<64>(c, a);
    else if (d <= 80)
        tiles_of<80>(c, a);
    else if (d <= 96)
        tiles_of<96>(c, a);
    else if (d <= 128)
        tiles_of<128>(c, a);
    else if (d <= 192)
        tiles_of<192>(c, a);
    else
        tiles_of<256>(c, a);
}

bool aligned(const void *p)
{
    return ((uintptr_t)p & 15) == 0;
}

/* Rope, window: out = local, nothing of the gates yet. */
void mix_window(struct cuda *c, const struct mix *m)
{
    const struct window_shape *sh = &m->window;
    const int H = sh->n_heads, KV = sh->n_kv_heads, d = sh->head_dim;

    struct rope_args rope = {};
    rope.step = c->step;
    rope.rows[0] = m->q;
    rope.rows[1] = m->k;
    rope.n_heads[0] = H;
    rope.n_heads[1] = KV;
    rope.norm[0] = m->q_norm;
    rope.norm[1] = m->k_norm;
    rope.stride = m->stride;
    rope.eps = m->qk_eps;
    rope.frequencies = m->frequencies;
    rope.head_dim = d;
    const size_t bytes = ROPE_ROWS * (size_t)(d + (H + KV) * d / (2 * VEC)) * sizeof(float);
    launch(&c->queue, "prompt_rope", prompt_rope, dim3(ceil_div(c->step.rows, ROPE_ROWS)),
           ROPE_THREADS, bytes, rope);

    struct tile_args tiles = {};
    tiles.step = c->step;
    tiles.q = m->q;
    tiles.k = m->k;
    tiles.v = m->v;
    tiles.stride = m->stride;
    tiles.ring_k = device_ring(&m->ring_k);
    tiles.ring_v = device_ring(&m->ring_v);
    tiles.shape = *sh;
    tiles.out = m->out;
    launch_tiles(c, &tiles);
}

void store_window(struct cuda *c, const struct mix *m)
{
    const struct window_shape *sh = &m->window;
    struct ring_update u = {};
    u.k = m->k;
    u.v = m->v;
    u.k_stride = u.v_stride = m->stride;
    u.half = true;
    u.n_kv_heads = sh->n_kv_heads;
    u.head_dim = sh->head_dim;
    u.ring_rows = sh->ring_rows;
    u.ring_k = device_ring(&m->ring_k);
    u.ring_v = device_ring(&m->ring_v);
    update_rings(c, &u);
}

void mix_latents(struct cuda *c, const struct mix *m, bool blend)
{
    struct latent_call call = {};
    call.theta = m->theta;
    call.g = m->g;
    call.theta_stride = call.g_stride = m->gate_stride;
    call.v = m->v;
    call.v_stride = m->stride;
    call.out = m->out;
    call.out_stride = (int64_t)m->latents.n_heads * m->latents.head_dim;
    call.half = true;
    call.blend = blend;
    call.shape = m->latents;
    call.m = m->m;
    call.alpha = m->alpha;
    call.s = m->s;
    latent_rows(c, &call);
}

bool window_fits(const struct mix *m)
{
    const struct window_shape *sh = &m->window;
    return sh->head_dim % (2 * VEC) == 0 && sh->head_dim <= 256 && m->stride % VEC == 0 &&
           aligned(m->q) && aligned(m->k) && aligned(m->v) && aligned(m->out) &&
           sh->ring_rows < INT32_MAX / 2 && m->ring_k.row_values % 16 == 0 &&
           m->ring_v.row_values % 16 == 0;
}

} // namespace

bool prompt_mix(struct cuda *c, const struct mix *m)
{
    const bool window = m->q && m->window.ring_rows > 0, latents = m->latents.n_latents > 0;
    if (!window && !latents)
        return false;
    if (latents && (!m->theta || !m->g || m->latents.gated_window != window))
        return false;
    if (window && !window_fits(m))
        return false;

    if (window)
        mix_window(c, m);
    if (latents)
        mix_latents(c, m, window);
    if (window)
        store_window(c, m);
    return true;
}
