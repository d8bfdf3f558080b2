/* mix.cuh - one row's mixing, what its two forms have in common: mix.cu for any shape, and
 * mix_warps.cu for some. A block serves a row and one or several query heads.
 *
 * S, a form's shape: d (0: any head_dim), heads (query heads of a block), latents (of a head, at
 * most), factors (gates may have some), threads, warps, pairs (of rope, a lane), ring (the type of
 * keys and values).
 */
#ifndef LATTE_CUDA_MIX_CUH
#define LATTE_CUDA_MIX_CUH

#include "engine/kernels/cuda/fused.cuh"
#include "engine/kernels/cuda/math.cuh"

enum {
    MIX_HEAD_DIM = 256, /* at most */
    MIX_LATENTS = 128,  /* of a head */
    MIX_BATCH = 4,      /* latents a thread has on their way at a time */
};

/* Byte offsets into shared memory, G query heads a block. */
struct mix_places {
    int new_key, new_value; /* [d] as the ring has them */
    int value;              /* [d] f32 */
    int keep, take, share;  /* [G, M] of the latents */
    int window_share;       /* [G] p(0|t) */
    /* Of mix.cu alone. */
    int keys, values; /* tiles of the ring; sums of groups of threads at the end */
    int query;        /* [G, d] f32, scaled */
    int weights;      /* [G, keys of a tile] */
    int stats;        /* [warps, G] */
    int total;
};

struct mix_call {
    struct mix m; /* its slabs of rings are the host's */
    struct device_step step;
    void *ring_k, *ring_v;
    int64_t ring_row_values;
    int head_dim, ring_rows;
    struct mix_places at;
};

/* What a block works on. */
struct mix_block {
    int row, head, kv; /* head: the first */
    int64_t slot, position;
    int n_keys;  /* ring rows that count, the new one included */
    int newest;  /* the ring row of this position: its old content does not count */
    bool begins; /* position 0: the slot's latents hold nothing of this session */
};

template <class S> static __device__ __forceinline__ int dim_of(const struct mix_call &c)
{
    return S::d ? S::d : c.head_dim;
}

/* Where value i of the block's heads, of dim values each, goes. */
static __device__ __forceinline__ bf16 *out_of(const struct mix_call &c, const struct mix_block &b,
                                               int i, int dim)
{
    const int n = c.m.window.n_heads * dim, column = b.head * dim + i;
    if (c.m.packed.values)
        return c.m.packed.values + packed_at(b.row, column, n);
    return c.m.out + (int64_t)b.row * n + column;
}

/* e^(a - b) for a <= b, to 2^-22 of what it is relative to 1; 1 for equal ones, even infinite. No
 * branch: the compiler would make one of expf beside a condition, and stop to wait for it. */
static __device__ __forceinline__ float exp_below(float a, float b)
{
    const float power = quick_exp2((a - b) * 1.44269504f);
    return a == b ? 1 : power;
}

/* slot and position: the row's. */
static __device__ __forceinline__ struct mix_block
block_of(const struct mix_call &c, int row, int head, int64_t slot, int64_t position)
{
    struct mix_block b;
    b.row = row;
    b.head = head;
    b.kv = b.head / (c.m.window.n_heads / c.m.window.n_kv_heads);
    b.slot = slot;
    b.position = position;
    b.begins = b.position == 0;
    b.n_keys = b.newest = 0;
    if (c.ring_rows) {
        b.n_keys = b.position < c.ring_rows ? (int)b.position + 1 : c.ring_rows;
        b.newest = (c.ring_rows & (c.ring_rows - 1)) == 0
                       ? (int)(b.position & (c.ring_rows - 1))
                       : (int)((uint64_t)b.position % (uint32_t)c.ring_rows);
    }
    return b;
}

static __device__ __forceinline__ struct mix_block find_block(const struct mix_call &c, int row,
                                                              int head)
{
    return block_of(c, row, head, c.step.seq_slot[row], c.step.positions[row]);
}

/* ---- q, k and v ---- */

/* Frequencies of this lane's pairs (i, i + d/2), i = lane + 32 p, and their angles at a position.
 */
template <class S> struct mix_frequencies {
    double of[S::pairs];
};
template <class S> struct mix_angles {
    float sine[S::pairs], cosine[S::pairs];
};

template <class S>
static __device__ __forceinline__ void read_frequencies(struct mix_frequencies<S> *f,
                                                        const struct mix_call &c)
{
    const int half = dim_of<S>(c) / 2;
#pragma unroll
    for (int p = 0; p < S::pairs; p++) {
        const int i = (int)threadIdx.x % WARP + WARP * p;
        f->of[p] = i < half ? c.m.frequencies[i] : 0;
    }
}

template <class S>
static __device__ __forceinline__ void
find_angles(struct mix_angles<S> *a, const struct mix_frequencies<S> &f, int64_t position)
{
#pragma unroll
    for (int p = 0; p < S::pairs; p++)
        angle(position, f.of[p], &a->sine[p], &a->cosine[p]);
}

/* A lane's values (i, i + d/2), i = lane + 32 p, of a head of q, k or v, as they are loaded. */
template <class S> struct mix_head {
    bf16 low[S::pairs], high[S::pairs];
};

template <class S>
static __device__ __forceinline__ void hold_head(struct mix_head<S> *h, const struct mix_call &c,
                                                 const bf16 *x)
{
    const int lane = threadIdx.x % WARP, half = dim_of<S>(c) / 2;
#pragma unroll
    for (int p = 0; p < S::pairs; p++) {
        const int i = lane + WARP * p;
        h->low[p] = i < half ? x[i] : __float2bfloat16_rn(0);
        h->high[p] = i < half ? x[i + half] : __float2bfloat16_rn(0);
    }
}

/* One warp: a head of q or k, normed and turned; low[p] and high[p] are a lane's pairs. */
template <class S>
static __device__ __forceinline__ void
turn_head(float low[S::pairs], float high[S::pairs], const struct mix_call &c,
          const struct mix_head<S> &h, const float *norm, const struct mix_angles<S> &a)
{
    const int lane = threadIdx.x % WARP, dim = dim_of<S>(c), half = dim / 2;
    float square = 0;
#pragma unroll
    for (int p = 0; p < S::pairs; p++) {
        low[p] = to_float(h.low[p]);
        high[p] = to_float(h.high[p]);
        square += fmaf(low[p], low[p], high[p] * high[p]);
    }
    const float scale = norm ? 1 / sqrtf(warp_sum(square) / (float)dim + c.m.qk_eps) : 1;
#pragma unroll
    for (int p = 0; p < S::pairs; p++) {
        const int i = lane + WARP * p;
        float x0 = low[p], x1 = high[p];
        if (norm && i < half)
            x0 *= scale * norm[i], x1 *= scale * norm[i + half];
        low[p] = fmaf(x0, a.cosine[p], -x1 * a.sine[p]);
        high[p] = fmaf(x0, a.sine[p], x1 * a.cosine[p]);
    }
}

/* Where this position's key or value belongs in the ring. */
template <class S>
static __device__ __forceinline__ typename S::ring *ring_row(const struct mix_call &c,
                                                             const struct mix_block &b, void *ring)
{
    return static_cast<typename S::ring *>(ring) + b.slot * c.ring_row_values +
           ((int64_t)b.kv * c.ring_rows + b.newest) * dim_of<S>(c);
}

/* Of the blocks that share a kv head, the first writes the ring; none reads that row. */
static __device__ __forceinline__ bool writes_ring(const struct mix_call &c,
                                                   const struct mix_block &b)
{
    return b.head % (c.m.window.n_heads / c.m.window.n_kv_heads) == 0;
}

template <class S>
static __device__ __forceinline__ void put_key(const struct mix_call &c, const struct mix_block &b,
                                               unsigned char *shared, const struct mix_head<S> &h,
                                               const struct mix_angles<S> &a)
{
    typedef typename S::ring ring;
    const int lane = threadIdx.x % WARP, dim = dim_of<S>(c), half = dim / 2;
    ring *key = reinterpret_cast<ring *>(shared + c.at.new_key);
    ring *out = ring_row<S>(c, b, c.ring_k);
    const bool writes = writes_ring(c, b);
    float low[S::pairs], high[S::pairs];
    turn_head<S>(low, high, c, h, c.m.k_norm, a);
#pragma unroll
    for (int p = 0; p < S::pairs; p++) {
        const int i = lane + WARP * p;
        if (i < half) {
            key[i] = from_float<ring>(low[p]);
            key[i + half] = from_float<ring>(high[p]);
            if (writes)
                out[i] = key[i], out[i + half] = key[i + half];
        }
    }
}

template <class S>
static __device__ __forceinline__ void put_value(const struct mix_call &c,
                                                 const struct mix_block &b, unsigned char *shared,
                                                 const struct mix_head<S> &h)
{
    typedef typename S::ring ring;
    const int half = dim_of<S>(c) / 2;
    float *value = reinterpret_cast<float *>(shared + c.at.value);
    ring *kept = reinterpret_cast<ring *>(shared + c.at.new_value);
    ring *out = c.ring_rows ? ring_row<S>(c, b, c.ring_v) : nullptr;
    const bool writes = c.ring_rows && writes_ring(c, b);
#pragma unroll
    for (int p = 0; p < 2 * S::pairs; p++) {
        const int i = (int)threadIdx.x % WARP + WARP * (p / 2), at = i + p % 2 * half;
        if (i < half) {
            value[at] = to_float(p % 2 ? h.high[p / 2] : h.low[p / 2]);
            if (c.ring_rows)
                kept[at] = from_float<ring>(value[at]);
            if (writes)
                out[at] = kept[at];
        }
    }
}

/* ---- the softmax of the gates, and what it does to the latents' maxima and sums ---- */

/* What a lane has of a head's gates, as they are loaded: the window's, and theta and g of latents
 * lane, lane + 32, ... */
template <class S> struct mix_gates {
    static constexpr int parts = (S::latents + WARP - 1) / WARP;
    float window, theta[parts], g[parts];
};

template <class S>
static __device__ __forceinline__ void hold_gates(struct mix_gates<S> *h, const struct mix_call &c,
                                                  int row, int head)
{
    const int lane = threadIdx.x % WARP, n = c.m.latents.n_latents;
    const int gated = c.m.latents.gated_window;
    const float *const theta = c.m.theta + row * c.m.gate_stride + head * n;
    const float *const g = c.m.g + row * c.m.gate_stride + head * (n + gated);
    h->window = gated ? g[0] : 0;
#pragma unroll
    for (int j = 0; j < mix_gates<S>::parts; j++) {
        const int l = lane + WARP * j;
        h->theta[j] = l < n ? theta[l] : 0;
        h->g[j] = l < n ? g[l + gated] : -INFINITY;
    }
}

static __device__ __forceinline__ int64_t latent_at(const struct mix_call &c,
                                                    const struct mix_block &b,
                                                    const struct device_slab<float> &slab, int head)
{
    return b.slot * slab.row_values + (int64_t)(b.head + head) * c.m.latents.n_latents;
}

/* m and alpha of latent `lane` of this warp's head, -1: none, as they were. */
static __device__ __forceinline__ void fetch_gates(float *m, float *alpha, const struct mix_call &c,
                                                   const struct mix_block &b, int head)
{
    const int lane = threadIdx.x % WARP;
    *m = *alpha = 0;
    if (head >= 0 && lane < c.m.latents.n_latents && !b.begins) {
        *m = c.m.m.data[latent_at(c, b, c.m.m, head) + lane];
        *alpha = c.m.alpha.data[latent_at(c, b, c.m.alpha, head) + lane];
    }
}

/* One warp, one head. before, sum: m and alpha of latent `lane`, fetched early. */
template <class S>
static __device__ __forceinline__ void
put_gates(const struct mix_call &c, const struct mix_block &b, unsigned char *shared, int head,
          const struct mix_gates<S> &h, float before, float sum)
{
    constexpr int parts = mix_gates<S>::parts;
    const int lane = threadIdx.x % WARP, n = c.m.latents.n_latents;
    const bool gated = c.m.latents.gated_window;
    float *m = c.m.m.data + latent_at(c, b, c.m.m, head);
    float *alpha = c.m.alpha.data + latent_at(c, b, c.m.alpha, head);
    float theta[parts], p[parts], top = -INFINITY, total = 0, window = h.window;
#pragma unroll
    for (int j = 0; j < parts; j++)
        theta[j] = h.theta[j], p[j] = h.g[j];
    if (S::factors) {
        const float factor = factor_of_row(c.m.gate_factors, b.row);
        window *= factor;
#pragma unroll
        for (int j = 0; j < parts; j++) {
            theta[j] *= factor;
            p[j] *= factor;
        }
    }
    if (gated)
        top = window;
#pragma unroll
    for (int j = 0; j < parts; j++)
        top = fmaxf(top, p[j]);
    top = warp_max(top);
#pragma unroll
    for (int j = 0; j < parts; j++) {
        p[j] = lane + WARP * j < n ? exp_below(p[j], top) : 0;
        total += p[j];
    }
    window = gated ? exp_below(window, top) : 0;
    total = quick_reciprocal(warp_sum(total) + window);
    if (lane == 0)
        reinterpret_cast<float *>(shared + c.at.window_share)[head] = gated ? window * total : 1;

#pragma unroll
    for (int j = 0; j < parts; j++) {
        const int l = lane + WARP * j;
        if (l >= n)
            continue;
        if (j && !b.begins)
            before = m[l], sum = alpha[l];
        const float now = b.begins ? theta[j] : fmaxf(before, theta[j]);
        const float keep = b.begins ? 0 : exp_below(before, now), take = exp_below(theta[j], now);
        const float sum_now = b.begins ? take : fmaf(sum, keep, take);
        m[l] = now;
        alpha[l] = sum_now;
        reinterpret_cast<float *>(shared + c.at.keep)[head * n + l] = keep;
        reinterpret_cast<float *>(shared + c.at.take)[head * n + l] = take;
        reinterpret_cast<float *>(shared + c.at.share)[head * n + l] =
            p[j] * total * quick_reciprocal(sum_now);
    }
}

/* ---- latents: a thread has 4 dimensions of latents first, first + stride, ... ---- */

/* Dimensions 4 quad on of the head's first latent. */
template <class S>
static __device__ __forceinline__ float *latents_of(const struct mix_call &c,
                                                    const struct mix_block &b, int head, int quad)
{
    return c.m.s.data + b.slot * c.m.s.row_values +
           (int64_t)(b.head + head) * c.m.latents.n_latents * dim_of<S>(c) + quad * 4;
}

/* MIX_BATCH of them, below n; zeros for others. */
template <class S>
static __device__ __forceinline__ void fetch_latents(float4 held[MIX_BATCH],
                                                     const struct mix_call &c, const float *s,
                                                     int first, int stride, int n)
{
#pragma unroll
    for (int j = 0; j < MIX_BATCH; j++) {
        const int l = first + j * stride;
        held[j] = l < n ? *reinterpret_cast<const float4 *>(s + l * dim_of<S>(c))
                        : make_float4(0, 0, 0, 0);
    }
}

/* One of them, if it is there: s = s keep + take v, old being what was there; *sum += share s. The
 * store is spelled out, since the compiler makes four of 4 bytes of an assignment. */
static __device__ __forceinline__ void step_latent(float4 *sum, float *s, float4 old, float4 v,
                                                   float keep, float take, float share, bool there)
{
    const float4 now = make_float4(fmaf(old.x, keep, take * v.x), fmaf(old.y, keep, take * v.y),
                                   fmaf(old.z, keep, take * v.z), fmaf(old.w, keep, take * v.w));
    if (there)
        __stcg(reinterpret_cast<float4 *>(s), now);
    share = there ? share : 0;
    *sum = make_float4(fmaf(share, now.x, sum->x), fmaf(share, now.y, sum->y),
                       fmaf(share, now.z, sum->z), fmaf(share, now.w, sum->w));
}

/* ---- launching ---- */

/* mix_warps.cu: whether it knows the shape, and, for those, call without places. False: there is
 * too little shared memory; nothing was launched. */
bool mix_is_by_warps(const struct mix *m);
bool mix_by_warps(struct cuda *c, struct mix_call *call);

#endif
