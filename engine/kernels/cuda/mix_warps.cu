/* mix_warps.cu - one row's latents and window where head_dim is 64, 96 or 128, the ring bf16 and of
 * at most 128 rows, no kv head shared, and a head has at most 32 latents.
 *
 * A block serves a head of one row after the other. Each of its four warps works for itself: on
 * its quarter of the ring, which it copied, with a maximum and a total of its own, and on its
 * quarter of the latents. The block meets twice a row: when q, k, v and gates are there, and to
 * add the quarters up. Once a warp has read its keys, it asks for the next row's, and so it does
 * with values and its first latents: memory does not wait for sums. What it takes of the next
 * row's q, k, v and gates it holds in registers while this row is computed. Nothing branches that
 * lanes could select: a warp has few others to wait beside it.
 *
 * Products go through the tensor cores with the ring as the first factor, 16 keys or dimensions
 * at a time. The second has eight columns for one vector: three of them hold it as a sum of
 * bf16 values (SPLITS), exact to 24 bits; the other five are zero. So keys and values are
 * never turned into f32, and a warp's part of the ring takes 2 D / 8 pairs of instructions.
 *
 * Bytes of a row and head: mix.cu's with one query head. At d = 96, M = 16, w = 128 49 KB of ring
 * and 2 * 6.3 KB of latents, so 1024 rows of 8 heads move 0.5 GB: 165 us at 3.08 TB/s; what memory
 * gives to copies of that kind, and what this kernel takes, is in NOTES.md. What a block needs of
 * its first row is asked for before pdl_wait, but for latents beyond a warp's first; the values
 * last, since the kernel before has a use for memory, too.
 *
 * A head's sums run in one order, given by the shape alone.
 */
#include <math.h>

#include "engine/kernels/cuda/mix.cuh"

enum {
    KEYS = 128,
    WARPS = 4,
    OWN = KEYS / WARPS, /* ring rows of a warp */
    SPLITS = 3,
    GATES_WARP = 3,
    BLOCKS = 4,          /* of an SM, if shared memory suffices: of 128 registers a thread */
    BLOCK_SHARED = 1024, /* bytes a block takes of an SM beside what it asks for */
    PASSING_ROWS = 512,  /* of a step at most, whose rings L2 keeps for nobody (NOTES.md) */
    ALIKE = 8,           /* ring rows after which `turn` is the same again */
};

template <int D> struct warps_shape {
    static constexpr int d = D, heads = 1, latents = WARP, warps = WARPS, threads = WARPS * WARP;
    static constexpr int pairs = (D + 63) / 64;
    static constexpr bool factors = false;
    typedef bf16 ring;
    static constexpr int units = D / 8; /* 16-byte pieces of a ring row */
    static constexpr int row_bytes = D * 2;
    static constexpr bool passes = D == 96;      /* see copy_async_16 about others */
    static constexpr int quads = D / 4;          /* lanes that a latent takes */
    static constexpr int at_once = WARP / quads; /* latents of a warp at a time */
    static constexpr int stride = WARPS * at_once;
    /* Byte offsets into shared memory. */
    static constexpr int keys = 0, values = KEYS * row_bytes;
    static constexpr int query = values + KEYS * row_bytes;   /* [SPLITS, D] bf16, scaled */
    static constexpr int locals = query + SPLITS * row_bytes; /* [WARPS, D] f32 */
    static constexpr int rests = locals + WARPS * D * 4;      /* [WARPS * at_once, D] f32 */
    static constexpr int tops = rests + WARPS * at_once * D * 4, totals = tops + WARPS * 4;
    static constexpr int shared = totals + WARPS * 4; /* what mix.cuh places comes after */
};

/* Where 16 bytes of a ring row lie: units change places so that the eight rows of a matrix that
 * ldmatrix reads are in different banks. */
template <int D> static __device__ __forceinline__ int turn(int row)
{
    return D % 64 ? row >> 1 & 3 : row & 7;
}

/* Start copying this warp's rows of the ring, if they are wanted; zeros for those that do not
 * count. A group of copies in any case. */
template <class S>
static __device__ __forceinline__ void fetch_own(unsigned char *to, const bf16 *from,
                                                 const struct mix_call &c,
                                                 const struct mix_block &b, bool wanted)
{
    const l2_policy policy = l2_keep(c.step.rows > PASSING_ROWS);
    const int lane = threadIdx.x % WARP, first = (int)threadIdx.x / WARP * OWN;
#pragma unroll
    for (int j = 0; wanted && j < ALIKE * S::units / WARP; j++) {
        const int i = lane + WARP * j, row = first + i / S::units, unit = i % S::units;
        unsigned char *const there = to + row * S::row_bytes + (unit ^ turn<S::d>(row)) * 16;
        const bf16 *const here = from + row * S::d + unit * 8;
#pragma unroll
        for (int k = 0; k < OWN; k += ALIKE) {
            const bool counts = row + k < b.n_keys && row + k != b.newest;
            if (S::passes)
                copy_async_16(there + k * S::row_bytes, here + k * S::d, counts, policy);
            else
                copy_async_16(there + k * S::row_bytes, here + k * S::d, counts);
        }
    }
    copy_async_commit();
}

/* The index-th part of x as a sum of bf16 values. */
static __device__ __forceinline__ bf16 split(float x, int index)
{
    const bf16 high = from_float<bf16>(x);
    const float rest = x - to_float(high);
    const bf16 middle = from_float<bf16>(rest);
    return index == 0 ? high : index == 1 ? middle : from_float<bf16>(rest - to_float(middle));
}

/* The index-th parts of two values; 0 from SPLITS on. Without branches, since each lane has an
 * index of its own. */
static __device__ __forceinline__ uint32_t split_pair(float x, float y, int index)
{
    uint32_t parts[SPLITS];
#pragma unroll
    for (int s = 0; s < SPLITS; s++) {
        const __nv_bfloat162 part = __floats2bfloat162_rn(x, y);
        const float2 taken = __bfloat1622float2(part);
        parts[s] = reinterpret_cast<const uint32_t &>(part);
        x -= taken.x, y -= taken.y;
    }
    uint32_t bits = index == 0 ? parts[0] : 0;
    bits = index == 1 ? parts[1] : bits;
    return index == 2 ? parts[2] : bits;
}

/* One warp: the query, normed, turned, scaled and split. */
template <class S>
static __device__ __forceinline__ void
put_split_query(const struct mix_call &c, unsigned char *shared, const struct mix_head<S> &h,
                const struct mix_angles<S> &a)
{
    const int lane = threadIdx.x % WARP;
    bf16 *const query = reinterpret_cast<bf16 *>(shared + S::query);
    float low[S::pairs], high[S::pairs];
    turn_head<S>(low, high, c, h, c.m.q_norm, a);
#pragma unroll
    for (int p = 0; p < S::pairs; p++) {
        const int i = lane + WARP * p;
        if (i >= S::d / 2)
            continue;
#pragma unroll
        for (int s = 0; s < SPLITS; s++) {
            query[s * S::d + i] = split(low[p] * c.m.window.scale, s);
            query[s * S::d + i + S::d / 2] = split(high[p] * c.m.window.scale, s);
        }
    }
}

/* The four threads of a group hold columns of one row: their sum. */
static __device__ __forceinline__ float sum_of_four(float x)
{
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

/* Scores of the warp's keys; score[i] of lane (g, t): key g + 8 i. */
template <class S>
static __device__ __forceinline__ void score_own(float score[OWN / 8], const struct mix_call &c,
                                                 const struct mix_block &b,
                                                 const unsigned char *shared)
{
    const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int first = (int)threadIdx.x / WARP * OWN;
    const unsigned char *const query = shared + S::query + g * S::row_bytes + t * 4;
    uint32_t q[S::d / 16][2];
#pragma unroll
    for (int k = 0; k < S::d / 16; k++) {
        q[k][0] = g < SPLITS ? *reinterpret_cast<const uint32_t *>(query + k * 32) : 0;
        q[k][1] = g < SPLITS ? *reinterpret_cast<const uint32_t *>(query + k * 32 + 16) : 0;
    }
#pragma unroll
    for (int tile = 0; tile < OWN / 16; tile++) {
        const int key = first + tile * 16 + lane % 16;
        const bool is_new = key == b.newest;
        const unsigned char *const row =
            shared + (is_new ? c.at.new_key : S::keys + key * S::row_bytes);
        const int x = is_new ? 0 : turn<S::d>(key);
        float sum[4] = {};
#pragma unroll
        for (int k = 0; k < S::d / 16; k++) {
            uint32_t a[4];
            ldmatrix_x4(a, row + ((2 * k + lane / 16) ^ x) * 16);
            mma_bf16(sum, a, q[k]);
        }
        score[2 * tile] = sum_of_four(sum[0] + sum[1]);
        score[2 * tile + 1] = sum_of_four(sum[2] + sum[3]);
    }
    if (c.m.window.softcap > 0) {
#pragma unroll
        for (int i = 0; i < OWN / 8; i++)
            score[i] = softcapped(score[i], c.m.window.softcap);
    }
#pragma unroll
    for (int i = 0; i < OWN / 8; i++)
        score[i] = first + g + 8 * i < b.n_keys ? score[i] : -INFINITY;
}

/* Weights in place of scores; the warp's maximum and total. */
static __device__ __forceinline__ void weigh_own(float score[OWN / 8], float *top, float *total)
{
    float most = -INFINITY, sum = 0;
#pragma unroll
    for (int i = 0; i < OWN / 8; i++)
        most = fmaxf(most, score[i]);
#pragma unroll
    for (int o = 4; o < WARP; o *= 2)
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, o));
    const float base = most == -INFINITY ? 0 : most; /* a warp may have no keys */
#pragma unroll
    for (int i = 0; i < OWN / 8; i++) {
        score[i] = exp_below(score[i], base);
        sum += score[i];
    }
#pragma unroll
    for (int o = 4; o < WARP; o *= 2)
        sum += __shfl_xor_sync(0xffffffffu, sum, o);
    *top = most;
    *total = sum;
}

/* local[D] = the warp's values times their weights. */
template <class S>
static __device__ __forceinline__ void take_own(float *local, const float weight[OWN / 8],
                                                const struct mix_call &c, const struct mix_block &b,
                                                const unsigned char *shared)
{
    const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int first = (int)threadIdx.x / WARP * OWN;
    float sum[S::d / 16][4] = {};
#pragma unroll
    for (int tile = 0; tile < OWN / 16; tile++) {
        uint32_t w[2]; /* keys 2 t and 2 t + 1, then those plus 8 */
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float of_rows = weight[2 * tile + i];
            const float even = __shfl_sync(0xffffffffu, of_rows, 8 * t);
            const float odd = __shfl_sync(0xffffffffu, of_rows, 8 * t + 4);
            w[i] = split_pair(even, odd, g);
        }
        const int key = first + tile * 16 + lane % 8 + lane / 16 * 8;
        const bool is_new = key == b.newest;
        const unsigned char *const row =
            shared + (is_new ? c.at.new_value : S::values + key * S::row_bytes);
        const int x = is_new ? 0 : turn<S::d>(key);
#pragma unroll
        for (int m = 0; m < S::d / 16; m++) {
            uint32_t a[4];
            ldmatrix_x4_trans(a, row + ((2 * m + lane / 8 % 2) ^ x) * 16);
            mma_bf16(sum[m], a, w);
        }
    }
#pragma unroll
    for (int m = 0; m < S::d / 16; m++) {
        const float low = sum_of_four(sum[m][0] + sum[m][1]);
        const float high = sum_of_four(sum[m][2] + sum[m][3]);
        if (t == m % 4) {
            local[m * 16 + g] = low;
            local[m * 16 + g + 8] = high;
        }
    }
}

/* The warp's latents, of which `held` are the first, step on; rests [WARPS * at_once, D]. */
template <class S>
static __device__ __forceinline__ void step_own(float4 held[MIX_BATCH], const struct mix_call &c,
                                                const struct mix_block &b, unsigned char *shared,
                                                int first, int n_latents)
{
    const int quad = (int)threadIdx.x % WARP % S::quads, n = c.m.latents.n_latents;
    const float *const keep = reinterpret_cast<const float *>(shared + c.at.keep);
    const float *const take = reinterpret_cast<const float *>(shared + c.at.take);
    const float *const share = reinterpret_cast<const float *>(shared + c.at.share);
    float *const s = latents_of<S>(c, b, 0, quad);
    const float4 v = reinterpret_cast<const float4 *>(shared + c.at.value)[quad];
    float4 rest = make_float4(0, 0, 0, 0);
    for (int l = first; l - first < n; l += MIX_BATCH * S::stride) { /* alike for all lanes */
        if (l != first)
            fetch_latents<S>(held, c, s, l, S::stride, b.begins ? 0 : n_latents);
        float k[MIX_BATCH], t[MIX_BATCH], p[MIX_BATCH];
#pragma unroll
        for (int j = 0; j < MIX_BATCH; j++) { /* all at once: shared memory takes its time */
            const int own = min(l + j * S::stride, n - 1);
            k[j] = keep[own], t[j] = take[own], p[j] = share[own];
        }
#pragma unroll
        for (int j = 0; j < MIX_BATCH; j++)
            step_latent(&rest, s + (l + j * S::stride) * S::d, held[j], v, k[j], t[j], p[j],
                        l + j * S::stride < n_latents);
    }
    if (n_latents)
        reinterpret_cast<float4 *>(shared + S::rests)[first * S::quads + quad] = rest;
}

/* out = window local + latents, the warps' parts in order; window: p(0|t). */
template <class S>
static __device__ __forceinline__ void put_sum(const struct mix_call &c, const struct mix_block &b,
                                               const unsigned char *shared, float window)
{
    const float *const locals = reinterpret_cast<const float *>(shared + S::locals);
    const float *const rests = reinterpret_cast<const float *>(shared + S::rests);
    const float *const tops = reinterpret_cast<const float *>(shared + S::tops);
    const float *const totals = reinterpret_cast<const float *>(shared + S::totals);
    const int i = threadIdx.x;
    if (i >= S::d)
        return;
    float top = -INFINITY, local = 0, total = 0, rest = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++)
        top = fmaxf(top, tops[w]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        const float scale = exp_below(tops[w], top);
        local = fmaf(scale, locals[w * S::d + i], local);
        total = fmaf(scale, totals[w], total);
    }
#pragma unroll
    for (int w = 0; w < WARPS * S::at_once; w++)
        rest += rests[w * S::d + i];
    rest = fmaf(window * quick_reciprocal(total), local, rest);
    *out_of(c, b, i, S::d) = from_float<bf16>(rest);
}

/* What a lane takes of a row's products and gates: a head of q, k or v, or the gates. One set of
 * registers for all, which are loaded a row ahead. */
struct row_held {
    uint32_t words[4];
};

template <class S>
static __device__ __forceinline__ void hold_row(struct row_held *h, const struct mix_call &c,
                                                int row, int head)
{
    const int warp = threadIdx.x / WARP;
    static_assert(2 * S::pairs <= 4 && mix_gates<S>::parts == 1, "what a lane holds");
    if (warp == GATES_WARP) {
        struct mix_gates<S> gates;
        hold_gates<S>(&gates, c, row, head);
        h->words[0] = __float_as_uint(gates.window);
        h->words[1] = __float_as_uint(gates.theta[0]);
        h->words[2] = __float_as_uint(gates.g[0]);
    } else {
        struct mix_head<S> x;
        const bf16 *const from = warp == 0 ? c.m.q : warp == 1 ? c.m.k : c.m.v;
        hold_head<S>(&x, c, from + row * c.m.stride + head * S::d);
#pragma unroll
        for (int p = 0; p < S::pairs; p++) {
            h->words[2 * p] = __bfloat16_as_ushort(x.low[p]);
            h->words[2 * p + 1] = __bfloat16_as_ushort(x.high[p]);
        }
    }
}

/* What the row's products and gates give, each by a warp; m and alpha: as they were. */
template <class S>
static __device__ __forceinline__ void
put_row(const struct mix_call &c, const struct mix_block &b, unsigned char *shared,
        const struct row_held &h, float m, float alpha, const struct mix_angles<S> &angles)
{
    const int warp = threadIdx.x / WARP;
    struct mix_head<S> x;
#pragma unroll
    for (int p = 0; p < S::pairs; p++) {
        x.low[p] = __ushort_as_bfloat16((unsigned short)h.words[2 * p]);
        x.high[p] = __ushort_as_bfloat16((unsigned short)h.words[2 * p + 1]);
    }
    if (warp == 0)
        put_split_query<S>(c, shared, x, angles);
    else if (warp == 1)
        put_key<S>(c, b, shared, x, angles);
    else if (warp == 2)
        put_value<S>(c, b, shared, x);
    else if (warp == GATES_WARP)
        put_gates<S>(c, b, shared, 0,
                     {__uint_as_float(h.words[0]),
                      {__uint_as_float(h.words[1])},
                      {__uint_as_float(h.words[2])}},
                     m, alpha);
}

/* The head's rings of a slot. */
template <class S>
static __device__ __forceinline__ const bf16 *ring_of(const void *ring, const struct mix_call &c,
                                                      const struct mix_block &b)
{
    return static_cast<const bf16 *>(ring) + b.slot * c.ring_row_values +
           (int64_t)b.kv * c.ring_rows * S::d;
}

/* grid: heads, and blocks that share the rows out. */
template <class S>
__global__ void __launch_bounds__(S::threads)
    mix_warps_kernel(const __grid_constant__ struct mix_call c)
{
    DYNAMIC_SHARED(unsigned char, shared);
    pdl_trigger();
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int n_rows = c.step.sizes->n_rows;
    if ((int)blockIdx.y >= n_rows) {
        pdl_wait();
        return;
    }
    struct mix_block b = find_block(c, (int)blockIdx.y, (int)blockIdx.x);
    fetch_own<S>(shared + S::keys, ring_of<S>(c.ring_k, c, b), c, b, true);
    /* This lane's latents; some lanes have none. */
    const int first = warp * S::at_once + lane / S::quads, quad = lane % S::quads;
    const int n_latents = lane < S::quads * S::at_once ? c.m.latents.n_latents : 0;
    const int my_head = warp == GATES_WARP ? 0 : -1;
    float4 held[MIX_BATCH];
    fetch_latents<S>(held, c, latents_of<S>(c, b, 0, quad), first, S::stride,
                     b.begins ? 0 : n_latents);
    float m, alpha;
    fetch_gates(&m, &alpha, c, b, my_head);
    struct mix_frequencies<S> frequencies;
    struct mix_angles<S> angles = {
    };
    if (warp < 2) {
        read_frequencies<S>(&frequencies, c);
        find_angles<S>(&angles, frequencies, b.position);
    }
    fetch_own<S>(shared + S::values, ring_of<S>(c.ring_v, c, b), c, b, true);

    pdl_wait();
    struct row_held row;
    hold_row<S>(&row, c, b.row, b.head);
    for (;;) {
        const int next_row = b.row + (int)gridDim.y;
        const bool more = next_row < n_rows;
        const int64_t next_slot = c.step.seq_slot[more ? next_row : b.row];
        const int64_t next_position = c.step.positions[more ? next_row : b.row];
        put_row<S>(c, b, shared, row, m, alpha, angles);
        if (more && warp < 2)
            find_angles<S>(&angles, frequencies, next_position);
        copy_async_wait<1>(); /* the keys */
        __syncthreads();

        if (more)
            hold_row<S>(&row, c, next_row, b.head);
        const float window = *reinterpret_cast<const float *>(shared + c.at.window_share);
        float score[OWN / 8], top, total;
        score_own<S>(score, c, b, shared);
        weigh_own(score, &top, &total);
        if (lane == 0) {
            reinterpret_cast<float *>(shared + S::tops)[warp] = top;
            reinterpret_cast<float *>(shared + S::totals)[warp] = total;
        }
        const struct mix_block next = block_of(c, next_row, b.head, next_slot, next_position);
        __syncwarp();
        fetch_own<S>(shared + S::keys, ring_of<S>(c.ring_k, c, next), c, next, more);
        copy_async_wait<1>(); /* the values */
        __syncwarp();
        take_own<S>(reinterpret_cast<float *>(shared + S::locals) + warp * S::d, score, c, b,
                    shared);
        __syncwarp();
        fetch_own<S>(shared + S::values, ring_of<S>(c.ring_v, c, next), c, next, more);

        step_own<S>(held, c, b, shared, first, n_latents);
        if (more) {
            fetch_latents<S>(held, c, latents_of<S>(c, next, 0, quad), first, S::stride,
                             next.begins ? 0 : n_latents);
            fetch_gates(&m, &alpha, c, next, my_head);
        }
        __syncthreads();
        put_sum<S>(c, b, shared, window);
        if (!more)
            break;
        b = next;
    }
}

/* ---- launching ---- */

template <class S> static bool run(struct cuda *c, struct mix_call *call)
{
    int at = S::shared;
    const auto place = [&at](int n_bytes) {
        const int offset = at;
        at = (at + n_bytes + 15) / 16 * 16;
        return offset;
    };
    const int n_gates = call->m.latents.n_latents * (int)sizeof(float);
    call->at.new_key = place(S::row_bytes);
    call->at.new_value = place(S::row_bytes);
    call->at.value = place(S::d * (int)sizeof(float));
    call->at.keep = place(n_gates);
    call->at.take = place(n_gates);
    call->at.share = place(n_gates);
    call->at.window_share = place(sizeof(float));
    if ((size_t)at > shared_limit(&c->queue))
        return false;
    const int heads = call->m.window.n_heads, rows = c->step.rows;
    const int fit = ((int)shared_limit(&c->queue) + BLOCK_SHARED) / (at + BLOCK_SHARED);
    const int room = c->queue.n_sms * (fit < BLOCKS ? fit : BLOCKS) / heads; /* rows at a time */
    const int turns = room > 0 && rows > room ? ceil_div(rows, room) : 1;
    const dim3 grid((unsigned)heads, (unsigned)ceil_div(rows, turns));
    launch(&c->queue, "fused_mix", mix_warps_kernel<S>, grid, S::threads, (size_t)at, *call);
    return true;
}

bool mix_is_by_warps(const struct mix *m)
{
    const int d = m->window.head_dim, n = m->latents.n_latents;
    return m->q && !m->gate_factors.squares && m->window.ring_rows >= 1 &&
           m->window.ring_rows <= KEYS && n >= 1 && n <= WARP &&
           m->window.n_heads == m->window.n_kv_heads && m->ring_k.dtype == DTYPE_BF16 &&
           m->ring_k.row_values % 8 == 0 && (d == 64 || d == 96 || d == 128);
}

bool mix_by_warps(struct cuda *c, struct mix_call *call)
{
    switch (call->head_dim) {
    case 64:
        return run<warps_shape<64>>(c, call);
    case 96:
        return run<warps_shape<96>>(c, call);
    default:
        return run<warps_shape<128>>(c, call);
    }
}
