/* prompt.cu - a layer's mixing for prompts (any step): the fused layer's way for many rows.
 *
 *   1 prompt_rope    q and k where they lie: optional norm of each head, then rope
 *   2 prompt_window  window attention by tiles of 64 queries, P(eq 13-14), into out
 *   3 latent_rows    latents by pieces (latent.cu); out = p0 * out + latents
 *   4 update_rings   the ring takes the last w rows (window.cu)
 *
 * Cost is linear in the rows for a fixed window, and there is no scratch. What a row gets depends
 * on its own piece and its sequence alone.
 */
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
    TILE_THREADS = 128, /* four warps of 16 query rows */
    VEC = 8,            /* bf16 values of 16 bytes */
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

/* VEC values of a ring as bf16 in shared memory; bf16 rings are copied in the background. */
__device__ __forceinline__ void fetch(bf16 *to, const bf16 *from)
{
    copy_async_16(to, from);
}
__device__ __forceinline__ void fetch(bf16 *to, const float *from)
{
    const float4 a = *(const float4 *)from, b = *(const float4 *)(from + 4);
    const struct eight x = {{from_float<bf16>(a.x), from_float<bf16>(a.y), from_float<bf16>(a.z),
                             from_float<bf16>(a.w), from_float<bf16>(b.x), from_float<bf16>(b.y),
                             from_float<bf16>(b.z), from_float<bf16>(b.w)}};
    *(struct eight *)to = x;
}
__device__ __forceinline__ void fetch(bf16 *to, const fp8 *from)
{
    alignas(8) fp8 raw[VEC];
    *(uint2 *)raw = *(const uint2 *)from;
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

/* Sizes of a tile for heads of up to D values, the rest zeros: D + VEC values a row, so that the
 * rows an ldmatrix reads at once lie in different banks. Wide heads take fewer keys at a time:
 * their sums fill the registers. */
template <int D> struct tile {
    static constexpr int keys = D > 128 ? 32 : 64;
    static constexpr int stride = D + VEC;
    static constexpr int blocks = D > 128 ? 1 : D > 96 ? 2 : 3; /* of an SM, at least */
    static constexpr size_t bytes = (size_t)(PIECE_ROWS + 4 * keys) * stride * sizeof(bf16);
};

/* The window as a block sees it: positions are counted from its oldest key. */
template <class R> struct key_source {
    const bf16 *own_k, *own_v; /* rows of the step, from the sequence's first on */
    int64_t own_stride;
    const R *ring_k, *ring_v;
    int64_t oldest, ring_rows;
    int n_ring, n_keys; /* keys before n_ring are in the ring, then come the step's own */
    int head_dim;
};

/* Keys `first` on into shared tiles; zeros beyond the last. */
template <int D, class R>
__device__ __forceinline__ void fetch_tile(bf16 *keys, bf16 *values, const struct key_source<R> *s,
                                           int first)
{
    const int chunks = D / VEC;
    const int64_t ring_first = first < s->n_ring ? (s->oldest + first) % s->ring_rows : 0;
#pragma unroll 2
    for (int u = 0; u < tile<D>::keys * chunks; u += TILE_THREADS) {
        const int at = u + threadIdx.x, row = at / chunks, i = at % chunks * VEC;
        if (at >= tile<D>::keys * chunks)
            break;
        const int key = first + row;
        bf16 *to_k = keys + row * tile<D>::stride + i, *to_v = values + row * tile<D>::stride + i;
        if (i >= s->head_dim) {
            *(uint4 *)to_k = *(uint4 *)to_v = make_uint4(0, 0, 0, 0);
        } else if (key >= s->n_ring) {
            const int64_t own = key < s->n_keys ? key - s->n_ring : 0;
            copy_async_16(to_k, s->own_k + own * s->own_stride + i, key < s->n_keys);
            copy_async_16(to_v, s->own_v + own * s->own_stride + i, key < s->n_keys);
        } else {
            int64_t place = ring_first + row;
            while (place >= s->ring_rows)
                place -= s->ring_rows;
            fetch(to_k, s->ring_k + place * s->head_dim + i);
            fetch(to_v, s->ring_v + place * s->head_dim + i);
        }
    }
    copy_async_commit();
}

/* Scores to base-2 logits. */
struct score_scale {
    float scale, cap; /* cap 0: none */
};
__device__ __forceinline__ float logit(float product, struct score_scale s)
{
    const float log2e = 1.4426950408889634f;
    if (s.cap == 0)
        return product * s.scale;
    /* tanh(x) = 1 - 2 / (e^2x + 1), scale here is 2 log2(e) / cap of the score's */
    return s.cap * log2e * (1 - 2 / (quick_exp2(product * s.scale) + 1));
}

/* A block: the rows of one piece and one head, against the keys of positions t-w+1..t a tile at
 * a time, the next tile on its way meanwhile. Reads (w + 64) keys and values for 64 rows from L2:
 * 75 MB at 8192 rows of the main configuration, and writes 12.6 MB; 5 GFLOP. About 25 us. */
template <int D, class R>
__global__ void __launch_bounds__(TILE_THREADS, tile<D>::blocks)
    prompt_window(const struct tile_args a)
{
    pdl_trigger();
    pdl_wait();
    if (blockIdx.x >= (unsigned)a.step.sizes->n_pieces)
        return;
    const int KEYS = tile<D>::keys, STRIDE = tile<D>::stride;
    const struct piece piece = a.step.pieces[blockIdx.x];
    const int H = a.shape.n_heads, KV = a.shape.n_kv_heads, h = blockIdx.y, kv = h / (H / KV);
    const int d = a.shape.head_dim;
    const int64_t w = a.shape.ring_rows, slot = a.step.seq_slot[piece.seq];
    const int seq_row = a.step.seq_start[piece.seq];
    const int64_t t0 = a.step.positions[seq_row]; /* the sequence's first in this step */
    const int64_t position = a.step.positions[piece.row];

    struct key_source<R> source;
    source.oldest = max((int64_t)0, position - w + 1);
    source.ring_rows = w;
    source.head_dim = d;
    source.n_ring = (int)max((int64_t)0, t0 - source.oldest);
    const int now = (int)(position - source.oldest); /* of the piece's first row */
    source.n_keys = now + piece.n_rows;
    const int64_t own_row = seq_row + max((int64_t)0, source.oldest - t0);
    source.own_stride = a.stride;
    source.own_k = a.k + own_row * a.stride + kv * d;
    source.own_v = a.v + own_row * a.stride + kv * d;
    source.ring_k = (const R *)a.ring_k.data + slot * a.ring_k.row_values + kv * w * d;
    source.ring_v = (const R *)a.ring_v.data + slot * a.ring_v.row_values + kv * w * d;

    DYNAMIC_SHARED(bf16, queries); /* [PIECE_ROWS, STRIDE], then keys and values twice */
    bf16 *tiles = queries + PIECE_ROWS * STRIDE;
    for (int at = threadIdx.x; at < PIECE_ROWS * (D / VEC); at += TILE_THREADS) {
        const int r = at / (D / VEC), i = at % (D / VEC) * VEC;
        const bool valid = r < piece.n_rows && i < d;
        const int64_t row = piece.row + (valid ? r : 0);
        copy_async_16(queries + r * STRIDE + i, a.q + row * a.stride + h * d + (valid ? i : 0), valid);
    }
    fetch_tile<D>(tiles, tiles + KEYS * STRIDE, &source, 0);

    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int quad_row = lane / 4, quad_column = lane % 4 * 2;
    const int first_row = warp * 16;
    const bool busy = first_row < piece.n_rows;
    /* This thread's rows g and g + 8: the newest key each sees. */
    const int last[2] = {now + first_row + quad_row, now + first_row + quad_row + 8};
    struct score_scale scale = {a.shape.scale * 1.4426950408889634f, 0};
    if (a.shape.softcap > 0)
        scale = {2 * scale.scale / a.shape.softcap, a.shape.softcap};
    const bf16 *query = queries + (first_row + lane % 16) * STRIDE + lane / 16 * 8;

    float sums[D / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};
    const int n_tiles = (source.n_keys + KEYS - 1) / KEYS;
    for (int t = 0; t < n_tiles; t++) {
        bf16 *keys = tiles + t % 2 * 2 * KEYS * STRIDE, *values = keys + KEYS * STRIDE;
        bf16 *next = tiles + (t + 1) % 2 * 2 * KEYS * STRIDE;
        if (t + 1 < n_tiles) {
            fetch_tile<D>(next, next + KEYS * STRIDE, &source, (t + 1) * KEYS);
            copy_async_wait<1>();
        } else {
            copy_async_wait<0>();
        }
        __syncthreads();
        const int first_key = t * KEYS;
        /* Keys this warp's rows see at all: (now + first_row - w, now + first_row + 15]. */
        const bool wanted =
            busy && first_key <= now + first_row + 15 && first_key + KEYS > now + first_row - w + 1;
        if (wanted) {
            float scores[KEYS / 8][4] = {};
#pragma unroll
            for (int i = 0; i < D; i += 16) {
                uint32_t q[4];
                ldmatrix_x4(q, query + i);
#pragma unroll
                for (int n = 0; n < KEYS; n += 16) {
                    uint32_t k[4];
                    const int key = n + lane / 16 * 8 + lane % 8;
                    ldmatrix_x4(k, keys + key * STRIDE + i + lane / 8 % 2 * 8);
                    mma_bf16(scores[n / 8], q, k);
                    mma_bf16(scores[n / 8 + 1], q, k + 2);
                }
            }
            float highest[2] = {top[0], top[1]};
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int key = first_key + n * 8 + quad_column + e % 2, newest = last[e / 2];
                    const bool seen = key <= newest && key > newest - w;
                    scores[n][e] = seen ? logit(scores[n][e], scale) : -INFINITY;
                    highest[e / 2] = fmaxf(highest[e / 2], scores[n][e]);
                }
            float shift[2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                highest[r] = fmaxf(highest[r], __shfl_xor_sync(0xffffffffu, highest[r], 1));
                highest[r] = fmaxf(highest[r], __shfl_xor_sync(0xffffffffu, highest[r], 2));
                shift[r] = highest[r] == -INFINITY ? 0 : highest[r]; /* no key seen yet */
                const float keep = quick_exp2(top[r] - shift[r]);
                top[r] = highest[r];
                total[r] *= keep;
#pragma unroll
                for (int n = 0; n < D / 8; n++) {
                    sums[n][2 * r] *= keep;
                    sums[n][2 * r + 1] *= keep;
                }
            }
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    scores[n][e] = quick_exp2(scores[n][e] - shift[e / 2]);
                    total[e / 2] += scores[n][e];
                }
#pragma unroll
            for (int n = 0; n < KEYS; n += 16) {
                const float *left = scores[n / 8], *right = scores[n / 8 + 1];
                const uint32_t p[4] = {pack(left[0], left[1]), pack(left[2], left[3]),
                                       pack(right[0], right[1]), pack(right[2], right[3])};
#pragma unroll
                for (int i = 0; i < D; i += 16) {
                    uint32_t v[4];
                    ldmatrix_x4_trans(v, values + (n + lane % 16) * STRIDE + i + lane / 16 * 8);
                    mma_bf16(sums[i / 8], p, v);
                    mma_bf16(sums[i / 8 + 1], p, v + 2);
                }
            }
        }
        __syncthreads();
    }
    if (!busy)
        return;

        /* Through the warp's own rows of the queries, for 16-byte stores. */
#pragma unroll
    for (int r = 0; r < 2; r++) {
        total[r] += __shfl_xor_sync(0xffffffffu, total[r], 1);
        total[r] += __shfl_xor_sync(0xffffffffu, total[r], 2);
        const float scaled = 1 / total[r];
        bf16 *to = queries + (first_row + quad_row + 8 * r) * STRIDE + quad_column;
#pragma unroll
        for (int n = 0; n < D / 8; n++)
            *(uint32_t *)(to + n * 8) = pack(sums[n][2 * r] * scaled, sums[n][2 * r + 1] * scaled);
    }
    __syncwarp();
    for (int at = lane; at < 16 * (D / VEC); at += WARP) {
        const int r = first_row + at / (D / VEC), i = at % (D / VEC) * VEC;
        if (r < piece.n_rows && i < d)
            *(uint4 *)(a.out + ((int64_t)(piece.row + r) * H + h) * d + i) =
                *(const uint4 *)(queries + r * STRIDE + i);
    }
}

/* ---- launching ---- */

template <int D, class R> void tiles_of(struct cuda *c, const struct tile_args *a)
{
    launch(&c->queue, "prompt_window", prompt_window<D, R>,
           dim3(c->step.n_pieces, a->shape.n_heads), TILE_THREADS, tile<D>::bytes, *a);
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
