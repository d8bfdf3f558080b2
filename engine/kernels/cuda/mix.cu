/* mix.cu - launch 2 of a decode layer: one row's latents and window, head by head, for any shape;
 * mix_warps.cu has a faster form for some.
 *
 * A block serves one row and one or several query heads that share a kv head. Everything it
 * reads of size is on its way at once: the ring's keys and values go to shared memory in the
 * background, the latents to registers, and what is done first (rope, gates, scores) is done
 * while the rest arrives. A ring longer than a tile of keys is walked tile by tile with a
 * running maximum.
 *
 * Before pdl_wait a block fetches its slot's state: a layer's state is touched by this kernel alone
 * within a step, steps are ordered by the copy of their arrays, and those arrays are never written
 * by a kernel. Only q, k, v and the gates come from the kernels just before.
 *
 * Bytes of a row and kv head with G query heads: 2 w d ring values read and 2 d written; G latent
 * tensors of M (d + 2) f32 read and written.
 *
 * Tried: two stages of shared memory and a loop over items, so that the next item arrives while
 * one is computed: slower, since fewer blocks fit (NOTES.md). mix_warps.cu loops with one stage.
 *
 * A head's sums run in one order, given by the shape alone: whole tiles of keys in ring order,
 * latents by thread, then groups of threads one after the other.
 */
#include <math.h>

#include "engine/kernels/cuda/mix.cuh"

enum {
    MAX_RING_ROWS = 1024, /* longer ones are worth splitting over several blocks: window.cu */
};

/* D = 0: any head_dim. HEADS query heads a block. */
template <int D, int HEADS, class RING> struct mix_shape {
    static constexpr int d = D, heads = HEADS, latents = MIX_LATENTS;
    static constexpr bool factors = true;
    static constexpr int threads = D == 0 || D == 256 ? 256 : 128;
    static constexpr int warps = threads / WARP;
    static constexpr int keys = D && D * sizeof(RING) <= 256 ? 128 : 64;
    static constexpr int per_key = threads / keys;                      /* threads */
    static constexpr int pairs = D ? (D + 63) / 64 : MIX_HEAD_DIM / 64; /* rope's, of a lane */
    typedef RING ring;

    static __host__ __device__ constexpr int row_bytes(int dim)
    {
        return dim * (int)sizeof(RING);
    }
    /* Rows of keys are read by per_key threads each, 16 bytes a thread: an odd number of
     * per_key * 16 bytes puts the rows of a warp into different banks. */
    static __host__ __device__ constexpr int key_pitch(int dim)
    {
        const int units = (row_bytes(dim) + 15) / 16;
        return (((units + per_key - 1) / per_key) | 1) * per_key * 16;
    }
    static __host__ __device__ constexpr int value_pitch(int dim)
    {
        return (row_bytes(dim) + 15) / 16 * 16;
    }
};

/* ---- memory ---- */

/* Start copying n rows of the ring, but for row `skip`. */
template <class S>
static __device__ __forceinline__ void
fetch_rows(unsigned char *to, int pitch, const typename S::ring *from, int n, int skip, int dim)
{
    const int bytes = S::row_bytes(dim);
    const unsigned char *source = reinterpret_cast<const unsigned char *>(from);
    if (S::d) {
        constexpr int units = S::row_bytes(S::d ? S::d : 8) / 16;
#pragma unroll
        for (int j = 0; j < (S::keys * units + S::threads - 1) / S::threads; j++) {
            const int i = (int)threadIdx.x + j * S::threads, row = i / (units ? units : 1);
            if (row < n && row != skip)
                copy_async_16(to + row * pitch + (i - row * units) * 16, source + i * 16);
        }
    } else if (bytes % 16 == 0) {
        const int units = bytes / 16;
        for (int i = threadIdx.x; i < n * units; i += S::threads) {
            const int row = i / units;
            if (row != skip)
                copy_async_16(to + row * pitch + (i - row * units) * 16, source + i * 16);
        }
    } else {
        const int units = bytes / 8;
        for (int i = threadIdx.x; i < n * units; i += S::threads) {
            const int row = i / units;
            if (row != skip)
                *reinterpret_cast<uint2 *>(to + row * pitch + (i - row * units) * 8) =
                    *reinterpret_cast<const uint2 *>(source + i * 8);
        }
    }
}

template <class S>
static __device__ __forceinline__ void fetch_tile(const struct mix_call &c,
                                                  const struct mix_block &b, unsigned char *to,
                                                  int pitch, const void *ring, int first)
{
    const int dim = dim_of<S>(c), left = b.n_keys - first;
    const typename S::ring *from = static_cast<const typename S::ring *>(ring) +
                                   b.slot * c.ring_row_values +
                                   ((int64_t)b.kv * c.ring_rows + first) * dim;
    fetch_rows<S>(to, pitch, from, left < S::keys ? left : S::keys, b.newest - first, dim);
    copy_async_commit();
}

/* Eight values of a ring row as f32. */
static __device__ __forceinline__ void read_eight(float x[8], const unsigned char *from, bf16)
{
    const uint4 raw = *reinterpret_cast<const uint4 *>(from);
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[2 * i] = __uint_as_float(words[i] << 16);
        x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}
static __device__ __forceinline__ void read_eight(float x[8], const unsigned char *from, fp8)
{
    const uint2 raw = *reinterpret_cast<const uint2 *>(from);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        fp8 one;
        one.__x = (__nv_fp8_storage_t)((i < 4 ? raw.x : raw.y) >> (8 * (i % 4)));
        x[i] = to_float(one);
    }
}
static __device__ __forceinline__ void read_eight(float x[8], const unsigned char *from, float)
{
    const float4 low = reinterpret_cast<const float4 *>(from)[0];
    const float4 high = reinterpret_cast<const float4 *>(from)[1];
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
    x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}

/* ---- q ---- */

template <class S>
static __device__ __forceinline__ void put_query(const struct mix_call &c,
                                                 const struct mix_block &b, unsigned char *shared,
                                                 int head, const struct mix_angles<S> &a)
{
    const int lane = threadIdx.x % WARP, dim = dim_of<S>(c), half = dim / 2;
    float *query = reinterpret_cast<float *>(shared + c.at.query) + head * dim;
    float low[S::pairs], high[S::pairs];
    struct mix_head<S> h;
    hold_head<S>(&h, c, c.m.q + b.row * c.m.stride + (int64_t)(b.head + head) * dim);
    turn_head<S>(low, high, c, h, c.m.q_norm, a);
#pragma unroll
    for (int p = 0; p < S::pairs; p++) {
        const int i = lane + WARP * p;
        if (i < half) {
            query[i] = low[p] * c.m.window.scale;
            query[i + half] = high[p] * c.m.window.scale;
        }
    }
}

/* The head whose gates are this warp's work; the last warps, since the first have q and k. */
template <class S> static __device__ __forceinline__ int gate_head(void)
{
    const int head = S::warps - 1 - (int)threadIdx.x / WARP;
    return head < S::heads ? head : -1;
}

/* ---- latents ---- */

template <class S>
static __device__ __forceinline__ void
step_latents(float4 *sum, const float4 held[MIX_BATCH], const struct mix_call &c,
             const unsigned char *shared, int head, float *s, int first, int stride, float4 v)
{
    const int n = c.m.latents.n_latents;
    const float *keep = reinterpret_cast<const float *>(shared + c.at.keep) + head * n;
    const float *take = reinterpret_cast<const float *>(shared + c.at.take) + head * n;
    const float *share = reinterpret_cast<const float *>(shared + c.at.share) + head * n;
#pragma unroll
    for (int j = 0; j < MIX_BATCH; j++) {
        const int l = first + j * stride;
        if (l < n)
            step_latent(sum, s + l * dim_of<S>(c), held[j], v, keep[l], take[l], share[l], true);
    }
}

/* sums [groups, heads, d] of the block's groups of threads. held: the first batch. */
template <class S>
static __device__ __forceinline__ void
mix_latents(float *sums, float4 held[MIX_BATCH], const struct mix_call &c,
            const struct mix_block &b, const unsigned char *shared)
{
    const int dim = dim_of<S>(c), quads = dim / 4, n_groups = S::threads / quads;
    const int group = (int)threadIdx.x / quads, quad = (int)threadIdx.x % quads;
    const int n = c.m.latents.n_latents, batch = n_groups * MIX_BATCH;
    if (group >= n_groups)
        return;
    const float4 v = reinterpret_cast<const float4 *>(shared + c.at.value)[quad];
#pragma unroll
    for (int h = 0; h < S::heads; h++) {
        float *const s = latents_of<S>(c, b, h, quad);
        float4 sum = make_float4(0, 0, 0, 0);
        for (int first = group; first < n; first += batch) {
            const bool more = first + batch < n;
            float4 next[MIX_BATCH];
            if (more || h + 1 < S::heads)
                fetch_latents<S>(next, c, more ? s : latents_of<S>(c, b, h + 1, quad),
                                 more ? first + batch : group, n_groups, b.begins ? 0 : n);
            step_latents<S>(&sum, held, c, shared, h, s, first, n_groups, v);
            if (more || h + 1 < S::heads) {
#pragma unroll
                for (int j = 0; j < MIX_BATCH; j++)
                    held[j] = next[j];
            }
        }
        *reinterpret_cast<float4 *>(sums + (group * S::heads + h) * dim + quad * 4) = sum;
    }
}

/* ---- the window ---- */

/* Scores of this thread's key; -inf where there is none. per_key threads get the same ones. */
template <class S>
static __device__ __forceinline__ void score_key(float score[S::heads], const struct mix_call &c,
                                                 const struct mix_block &b,
                                                 const unsigned char *shared, int first, int n)
{
    const int dim = dim_of<S>(c);
    const int key = (int)threadIdx.x / S::per_key, part = (int)threadIdx.x % S::per_key;
    const unsigned char *row = shared + c.at.keys + key * S::key_pitch(dim);
    if (first + key == b.newest)
        row = shared + c.at.new_key;
    const float *query = reinterpret_cast<const float *>(shared + c.at.query);
    float4 sum[S::heads];
#pragma unroll
    for (int h = 0; h < S::heads; h++)
        sum[h] = make_float4(0, 0, 0, 0);
    if (key < n) {
#pragma unroll 4
        for (int i = part; i < dim / 8; i += S::per_key) {
            float k[8];
            read_eight(k, row + i * 8 * (int)sizeof(typename S::ring), typename S::ring());
#pragma unroll
            for (int h = 0; h < S::heads; h++) {
                const float4 *q = reinterpret_cast<const float4 *>(query + h * dim + i * 8);
                const float4 low = q[0], high = q[1];
                sum[h].x = fmaf(high.x, k[4], fmaf(low.x, k[0], sum[h].x));
                sum[h].y = fmaf(high.y, k[5], fmaf(low.y, k[1], sum[h].y));
                sum[h].z = fmaf(high.z, k[6], fmaf(low.z, k[2], sum[h].z));
                sum[h].w = fmaf(high.w, k[7], fmaf(low.w, k[3], sum[h].w));
            }
        }
    }
    const float cap = c.m.window.softcap;
#pragma unroll
    for (int h = 0; h < S::heads; h++) {
        float x = (sum[h].x + sum[h].y) + (sum[h].z + sum[h].w);
#pragma unroll
        for (int o = 1; o < S::per_key; o *= 2)
            x += __shfl_xor_sync(0xffffffffu, x, o);
        if (cap > 0)
            x = cap * tanhf(x / cap);
        score[h] = key < n ? x : -INFINITY;
    }
}

/* What a block carries from tile to tile, for each head. */
template <class S> struct mix_window {
    float top[S::heads];    /* of all scores so far */
    float total[S::heads];  /* of the weights of this thread's keys */
    float sum[S::heads][8]; /* of weighted values: 8 dimensions of every n_groups-th key */
};

/* After a barrier: the new maximum; what was summed before is scaled to it; weights. */
template <class S>
static __device__ __forceinline__ void
weigh_key(struct mix_window<S> *w, const float score[S::heads], const struct mix_call &c,
          unsigned char *shared, int n)
{
    const int key = (int)threadIdx.x / S::per_key, part = (int)threadIdx.x % S::per_key;
    const float *stats = reinterpret_cast<const float *>(shared + c.at.stats);
    float *weights = reinterpret_cast<float *>(shared + c.at.weights);
#pragma unroll
    for (int h = 0; h < S::heads; h++) {
        float top = w->top[h];
#pragma unroll
        for (int i = 0; i < S::warps; i++)
            top = fmaxf(top, stats[i * S::heads + h]);
        const float scale = exp_below(w->top[h], top);
        const float weight = key < n ? exp_below(score[h], top) : 0;
        if (part == 0)
            weights[h * S::keys + key] = weight;
        w->top[h] = top;
        w->total[h] = fmaf(w->total[h], scale, part == 0 ? weight : 0);
#pragma unroll
        for (int i = 0; i < 8; i++)
            w->sum[h][i] *= scale;
    }
}

template <class S>
static __device__ __forceinline__ void
take_values(struct mix_window<S> *w, const struct mix_call &c, const struct mix_block &b,
            const unsigned char *shared, int first, int n)
{
    const int dim = dim_of<S>(c), eights = dim / 8, n_groups = S::threads / eights;
    const int group = (int)threadIdx.x / eights, eight = (int)threadIdx.x % eights;
    const int offset = eight * 8 * (int)sizeof(typename S::ring);
    const unsigned char *tile = shared + c.at.values + offset;
    const unsigned char *newest = shared + c.at.new_value + offset;
    const float *weights = reinterpret_cast<const float *>(shared + c.at.weights);
    if (group >= n_groups)
        return;
#pragma unroll 4
    for (int key = group; key < n; key += n_groups) {
        float v[8];
        read_eight(v, first + key == b.newest ? newest : tile + key * S::value_pitch(dim),
                   typename S::ring());
#pragma unroll
        for (int h = 0; h < S::heads; h++) {
            const float weight = weights[h * S::keys + key];
#pragma unroll
            for (int i = 0; i < 8; i++)
                w->sum[h][i] = fmaf(weight, v[i], w->sum[h][i]);
        }
    }
}

/* sums [groups, heads, d], and the weights' totals by warp. */
template <class S>
static __device__ __forceinline__ void put_window(float *sums, const struct mix_window<S> &w,
                                                  const struct mix_call &c, unsigned char *shared)
{
    const int dim = dim_of<S>(c), eights = dim / 8, n_groups = S::threads / eights;
    const int group = (int)threadIdx.x / eights, eight = (int)threadIdx.x % eights;
    float *stats = reinterpret_cast<float *>(shared + c.at.stats);
#pragma unroll
    for (int h = 0; h < S::heads; h++) {
        const float total = warp_sum(w.total[h]);
        if (threadIdx.x % WARP == 0)
            stats[(int)threadIdx.x / WARP * S::heads + h] = total;
        if (group < n_groups) {
            float4 *out =
                reinterpret_cast<float4 *>(sums + (group * S::heads + h) * dim + eight * 8);
            out[0] = make_float4(w.sum[h][0], w.sum[h][1], w.sum[h][2], w.sum[h][3]);
            out[1] = make_float4(w.sum[h][4], w.sum[h][5], w.sum[h][6], w.sum[h][7]);
        }
    }
}

/* ---- the block ---- */

/* Heads of q, then k, then v, one a warp and turn. */
template <class S>
static __device__ __forceinline__ void put_row(const struct mix_call &c, const struct mix_block &b,
                                               unsigned char *shared, const struct mix_angles<S> &a)
{
    for (int i = (int)threadIdx.x / WARP; i < S::heads + 2; i += S::warps) {
        struct mix_head<S> h;
        const int64_t at = b.row * c.m.stride + (int64_t)b.kv * dim_of<S>(c);
        if (i == S::heads + 1) {
            hold_head<S>(&h, c, c.m.v + at);
            put_value<S>(c, b, shared, h);
        } else if (c.ring_rows && i == S::heads) {
            hold_head<S>(&h, c, c.m.k + at);
            put_key<S>(c, b, shared, h, a);
        } else if (c.ring_rows) {
            put_query<S>(c, b, shared, i, a);
        }
    }
}

/* out = p(0|t) local + sum over latents, from the groups' sums in order. */
template <class S>
static __device__ __forceinline__ void put_out(const struct mix_call &c, const struct mix_block &b,
                                               const unsigned char *shared, const float *local,
                                               const float *latents)
{
    const int dim = dim_of<S>(c), n = S::heads * dim;
    const int local_groups = c.ring_rows ? S::threads / (dim / 8) : 0;
    const int latent_groups = c.m.latents.n_latents ? S::threads / (dim / 4) : 0;
    const float *stats = reinterpret_cast<const float *>(shared + c.at.stats);
    const float *share = reinterpret_cast<const float *>(shared + c.at.window_share);
    for (int i = threadIdx.x; i < n; i += S::threads) {
        const int h = i / dim;
        float sum = 0, total = 0, rest = 0;
#pragma unroll 4
        for (int g = 0; g < local_groups; g++)
            sum += local[g * n + i];
#pragma unroll 4
        for (int g = 0; g < latent_groups; g++)
            rest += latents[g * n + i];
        if (c.ring_rows) {
#pragma unroll
            for (int w = 0; w < S::warps; w++)
                total += stats[w * S::heads + h];
            rest = fmaf(latent_groups ? share[h] : 1, sum / total, rest);
        }
        *out_of(c, b, i, dim) = from_float<bf16>(rest);
    }
}

template <class S>
__global__ void __launch_bounds__(S::threads) mix_kernel(const __grid_constant__ struct mix_call c)
{
    DYNAMIC_SHARED(unsigned char, shared);
    pdl_trigger();
    const bool latents = c.m.latents.n_latents > 0;
    const struct mix_block b = find_block(c, (int)blockIdx.y, (int)blockIdx.x * S::heads);
    if (b.row >= c.step.sizes->n_rows) {
        pdl_wait();
        return;
    }

    const int dim = dim_of<S>(c), n_lanes = dim / 4;
    unsigned char *keys = shared + c.at.keys, *values = shared + c.at.values;
    if (c.ring_rows) {
        fetch_tile<S>(c, b, keys, S::key_pitch(dim), c.ring_k, 0);
        fetch_tile<S>(c, b, values, S::value_pitch(dim), c.ring_v, 0);
    }
    const int my_head = latents ? gate_head<S>() : -1, lane = (int)threadIdx.x % WARP;
    float4 held[MIX_BATCH] = {};
    float before, sum;
    if (latents && (int)threadIdx.x / n_lanes < S::threads / n_lanes)
        fetch_latents<S>(held, c, latents_of<S>(c, b, 0, (int)threadIdx.x % n_lanes),
                         (int)threadIdx.x / n_lanes, S::threads / n_lanes,
                         b.begins ? 0 : c.m.latents.n_latents);
    fetch_gates(&before, &sum, c, b, my_head);
    struct mix_frequencies<S> frequencies;
    struct mix_angles<S> angles = {
    };
    if (c.ring_rows && (int)threadIdx.x / WARP <= S::heads) {
        read_frequencies<S>(&frequencies, c);
        find_angles<S>(&angles, frequencies, b.position);
    }

    pdl_wait();
    put_row<S>(c, b, shared, angles);
    if (my_head >= 0) {
        struct mix_gates<S> gates;
        hold_gates<S>(&gates, c, b.row, b.head + my_head);
        put_gates<S>(c, b, shared, my_head, gates, before, sum);
    }

    struct mix_window<S> w = {
    };
#pragma unroll
    for (int h = 0; h < S::heads; h++)
        w.top[h] = -INFINITY;
    for (int first = 0; first < b.n_keys; first += S::keys) {
        const int n = b.n_keys - first < S::keys ? b.n_keys - first : S::keys;
        const bool more = first + S::keys < b.n_keys;
        float score[S::heads];
        copy_async_wait<1>(); /* the keys, and what came before them */
        __syncthreads();
        score_key<S>(score, c, b, shared, first, n);
#pragma unroll
        for (int h = 0; h < S::heads; h++) {
            const float top = warp_max(score[h]);
            if (lane == 0)
                reinterpret_cast<float *>(shared +
                                          c.at.stats)[(int)threadIdx.x / WARP * S::heads + h] = top;
        }
        __syncthreads();
        weigh_key<S>(&w, score, c, shared, n);
        copy_async_wait<0>(); /* the values */
        __syncthreads();
        if (more)
            fetch_tile<S>(c, b, keys, S::key_pitch(dim), c.ring_k, first + S::keys);
        take_values<S>(&w, c, b, shared, first, n);
        if (more) {
            __syncthreads();
            fetch_tile<S>(c, b, values, S::value_pitch(dim), c.ring_v, first + S::keys);
        }
    }
    if (!c.ring_rows)
        __syncthreads();

    /* The keys' place is free: nobody reads it after the last barrier. */
    float *local = reinterpret_cast<float *>(keys);
    float *other = local + 8 * S::threads * S::heads;
    if (latents)
        mix_latents<S>(other, held, c, b, shared);
    if (c.ring_rows)
        put_window<S>(local, w, c, shared);
    __syncthreads();
    put_out<S>(c, b, shared, local, other);
}

/* ---- launching ---- */

template <class S> static void place_shared(struct mix_call *c)
{
    const int dim = c->head_dim, n_latents = c->m.latents.n_latents * S::heads;
    const int size = sizeof(typename S::ring), window = c->ring_rows > 0;
    int at = 0;
    const auto place = [&at](int n_bytes) {
        const int offset = at;
        at = (at + n_bytes + 15) / 16 * 16;
        return offset;
    };
    const int sums = 12 * S::threads * S::heads * (int)sizeof(float);
    const int keys = window * S::keys * S::key_pitch(dim);
    c->at.keys = place(keys > sums ? keys : sums);
    c->at.values = place(window * S::keys * S::value_pitch(dim));
    c->at.query = place(window * S::heads * dim * (int)sizeof(float));
    c->at.new_key = place(window * dim * size);
    c->at.new_value = place(window * dim * size);
    c->at.value = place(dim * (int)sizeof(float));
    c->at.weights = place(window * S::heads * S::keys * (int)sizeof(float));
    c->at.stats = place(S::warps * S::heads * (int)sizeof(float));
    c->at.keep = place(n_latents * (int)sizeof(float));
    c->at.take = place(n_latents * (int)sizeof(float));
    c->at.share = place(n_latents * (int)sizeof(float));
    c->at.window_share = place(S::heads * (int)sizeof(float));
    c->at.total = at;
}

template <class S> static bool run_mix(struct cuda *c, struct mix_call *call)
{
    place_shared<S>(call);
    if ((size_t)call->at.total > shared_limit(&c->queue))
        return false;
    const dim3 grid((unsigned)(call->m.window.n_heads / S::heads), (unsigned)c->step.rows);
    launch(&c->queue, "fused_mix", mix_kernel<S>, grid, S::threads, (size_t)call->at.total, *call);
    return true;
}

/* How the block's heads are chosen must not depend on the batch: from the shape alone. */
template <int D, class RING> static bool run_heads(struct cuda *c, struct mix_call *call)
{
    const int group = call->m.window.n_heads / call->m.window.n_kv_heads;
    constexpr bool wide = D && sizeof(RING) == 2;
    if (wide && call->ring_rows && group % 4 == 0)
        return run_mix<mix_shape<D, wide ? 4 : 2, RING>>(c, call);
    if (call->ring_rows && group % 2 == 0)
        return run_mix<mix_shape<D, 2, RING>>(c, call);
    return run_mix<mix_shape<D, 1, RING>>(c, call);
}

/* Of the sizes that have code of their own, the host that emulates a device has these two. */
#ifdef LATTE_EMULATE
static constexpr int known_dim(int dim)
{
    return dim == 96 || dim == 256 ? dim : 0;
}
#else
static constexpr int known_dim(int dim)
{
    return dim;
}
#endif

template <class RING> static bool run_dim(struct cuda *c, struct mix_call *call)
{
    switch (call->head_dim) {
    case 64:
        return run_heads<known_dim(64), RING>(c, call);
    case 80:
        return run_heads<(sizeof(RING) == 2 ? known_dim(80) : 0), RING>(c, call);
    case 96:
        return run_heads<known_dim(96), RING>(c, call);
    case 128:
        return run_heads<known_dim(128), RING>(c, call);
    case 256:
        return run_heads<known_dim(256), RING>(c, call);
    default:
        return run_heads<0, RING>(c, call);
    }
}

static bool mix_fits(const struct cuda *c, const struct mix *m, int head_dim)
{
    const bool window = m->q && m->window.ring_rows;
    const int n_latents = m->latents.n_latents;
    if (!c->step.decode || head_dim % 8 || head_dim < 8 || head_dim > MIX_HEAD_DIM)
        return false;
    if (window &&
        (m->window.ring_rows > MAX_RING_ROWS || m->ring_k.row_values % head_dim ||
         m->ring_k.row_values != m->ring_v.row_values || m->ring_k.dtype != m->ring_v.dtype))
        return false;
    if (n_latents > MIX_LATENTS || (n_latents && m->s.row_values % 4))
        return false;
    return !n_latents || m->theta;
}

bool fused_mix(struct cuda *c, const struct mix *m)
{
    struct mix_call call = {};
    const bool window = m->q && m->window.ring_rows;
    call.m = *m;
    call.step = c->step;
    call.head_dim = m->latents.n_latents ? m->latents.head_dim : m->window.head_dim;
    if (!mix_fits(c, m, call.head_dim))
        return false;
    if (!window) { /* one description of the heads for both */
        call.m.window = (struct window_shape){};
        call.m.window.n_heads = m->latents.n_heads;
        call.m.window.n_kv_heads = m->latents.n_kv_heads;
        return run_dim<bf16>(c, &call);
    }
    call.ring_rows = (int)m->window.ring_rows;
    call.ring_k = m->ring_k.buffer->data;
    call.ring_v = m->ring_v.buffer->data;
    call.ring_row_values = m->ring_k.row_values;
    if (mix_is_by_warps(m) && mix_by_warps(c, &call))
        return true;
    switch (m->ring_k.dtype) {
    case DTYPE_BF16:
        return run_dim<bf16>(c, &call);
    case DTYPE_F8_E4M3:
        return run_dim<fp8>(c, &call);
    case DTYPE_F32:
        return run_heads<0, float>(c, &call);
    default:
        return false;
    }
}
