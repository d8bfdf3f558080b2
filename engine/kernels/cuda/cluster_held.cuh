/* cluster_held.cuh - what a block of the mixing of few rows (cluster_mix.cu) has: its shared
 * memory, the rows it mixes, and what it asks for before pdl_wait: weights, the rows' state, the
 * RG-LRU's.
 */
#ifndef LATTE_CUDA_CLUSTER_HELD_CUH
#define LATTE_CUDA_CLUSTER_HELD_CUH

#include "engine/kernels/cuda/cluster.cuh"
#include "engine/kernels/cuda/rglru.cuh"

enum {
    LOGIT_TILES = (2 * CLUSTER_LATENTS + 1 + 7) / 8,
    LOGITS = 8 * LOGIT_TILES,
    HALF = WARP / 2, /* of a warp: a lane has a latent of its half's row */
};

struct mix_call {
    struct cluster_mix m;
    struct device_step step;
};

/* What a block mixes. */
struct mix_row {
    int64_t slot;
    int row, head, n_keys, newest; /* as struct mix_block of mix.cuh */
    bool here, begins;
};

/* Eight values of a ring as they are loaded. */
template <class RING> struct ring_eight {
    typedef uint4 type;
};
template <> struct ring_eight<fp8> {
    typedef uint2 type;
};

/* RING: bf16 or fp8. ROWS: that a block mixes. ALONE: of up to FEW_ALONE rows, with the output
 * projection. */
template <class RING, int D, int HEAD, int WIDTH, int ROWS, bool ALONE> struct mix_shape {
    typedef RING ring;
    typedef typename ring_eight<RING>::type eight;
    static constexpr int RING_VALUE = (int)sizeof(RING); /* bytes */
    static constexpr int DIM = D, BLOCK_ROWS = ROWS;
    static constexpr bool IS_ALONE = ALONE;
    static constexpr int STEP_ROWS = ROWS * CLUSTER_BLOCKS;
    static constexpr int COLUMNS = D / CLUSTER_BLOCKS, TILES = COLUMNS / 8; /* the block's of x */
    static constexpr int PART = HEAD / CLUSTER_BLOCKS; /* rows of each of q, k, v, the block's */
    static constexpr int QKV = 3 * PART, QKV_TILES = (QKV + 7) / 8;
    static constexpr int PAIRS = PART / 2; /* of a query's or key's values that are turned, i and
                                            * i + HEAD / 2: a block has both */
    static constexpr int QKV_K = D / CLUSTER_WARPS; /* of a warp */
    static constexpr int ROW = D + 8, SLICE = COLUMNS + 8, OUT = HEAD + 8;
    static constexpr int GATE_STEPS = WIDTH / 16; /* of a product of 16 columns */
    static constexpr int GATE_QUADS = GATE_STEPS; /* 16 bytes of both gates' weights, a lane's */
    static constexpr int TURNS = (TILES + CLUSTER_WARPS - 1) / CLUSTER_WARPS; /* of the warps */
    static constexpr int CHUNKS = HEAD / 16; /* of 8 values of a key, a thread's */
    /* Values: a warp has those of its keys, 8 dimensions of every n-th a lane. */
    static constexpr int EIGHTS = HEAD / 8, VALUE_GROUPS = WARP / EIGHTS;
    static constexpr int VALUES = WARP / 2 / VALUE_GROUPS; /* a lane's */
    static constexpr int GROUPS = CLUSTER_WARPS * VALUE_GROUPS;
    static constexpr int QUADS = HEAD / 4;
    static constexpr int LATENT_GROUPS = CLUSTER_THREADS / QUADS;
    static constexpr int LATENTS = (CLUSTER_LATENTS + LATENT_GROUPS - 1) / LATENT_GROUPS;
    static_assert(HEAD % 32 == 0 && QKV_K % 32 == 0 && COLUMNS % 32 == 0 && WIDTH % 32 == 0 &&
                      WIDTH % COLUMNS == 0 && QUADS <= WARP * 2 && PAIRS % 2 == 0,
                  "tiles of products");
    static_assert(CLUSTER_LATENTS == (int)HALF && ROWS <= 2, "a latent of a row a lane");

    static constexpr int qkv = 0; /* offsets, in bytes */
    static constexpr int latents = qkv + QKV * ROW * 2;
    static constexpr int gates = latents + (2 * CLUSTER_LATENTS + 1) * SLICE * 2;
    static constexpr int gates_bytes = TILES * GATE_QUADS * WARP * 16; /* cluster_prepare's */
    /* Of the mixing, in the place of the gates, when they have been used. */
    static constexpr int local = gates, other = local + ROWS * GROUPS * HEAD * 4;
    static_assert(ROWS * (GROUPS + LATENT_GROUPS) * HEAD * 4 <= gates_bytes, "place of the gates");
    /* The gates' columns of packed rows: [GATE_STEPS, lanes] 16 bytes. */
    static constexpr int rows = gates + gates_bytes, rows_bytes = GATE_STEPS * WARP * 16;
    static_assert(GATE_STEPS <= CLUSTER_WARPS, "a step a warp");
    /* [warps, STEP_ROWS, 8 QKV_TILES]; of two rows where the warp has used weights of q, k, v: in
     * its columns of their first rows. */
    static constexpr int sums = ROWS == 1 ? rows + rows_bytes : qkv;
    static constexpr int sums_row = ROWS == 1 ? 8 * QKV_TILES : ROW / 2; /* strides */
    static constexpr int sums_warp = ROWS == 1 ? STEP_ROWS * sums_row : QKV_K / 2;
    static_assert(8 * QKV_TILES * 4 <= QKV_K * 2 && STEP_ROWS <= QKV, "place of the sums");
    static constexpr int z = rows + rows_bytes + (ROWS == 1 ? CLUSTER_WARPS * sums_warp * 4 : 0);
    /* What the cluster's blocks send to the block of a row, for each of its rows: logits [blocks,
     * LOGITS], z_squares [blocks], the turned query and v [HEAD] f32, the turned key [HEAD] as the
     * ring has it, in bf16. */
    static constexpr int row = z + STEP_ROWS * SLICE * 2;
    static constexpr int logits = 0, z_squares = logits + CLUSTER_BLOCKS * LOGITS * 4;
    static constexpr int query = z_squares + CLUSTER_BLOCKS * 4, value = query + HEAD * 4;
    static constexpr int new_key = value + HEAD * 4, row_bytes = new_key + HEAD * 2;
    static_assert(row % 16 == 0 && row_bytes % 16 == 0, "sent 16 bytes at a time");
    static constexpr int scales = row + ROWS * row_bytes;            /* [16] */
    static constexpr int z_parts = scales + CLUSTER_ROWS * 4;        /* [tiles, 16] */
    static constexpr int stats = z_parts + TILES * CLUSTER_ROWS * 4; /* [ROWS, 2, warps]: tops, */
    static constexpr int angles = stats + ROWS * 2 * CLUSTER_WARPS * 4; /* totals; [16, PAIRS] */
    static constexpr int places = angles + CLUSTER_ROWS * PAIRS * 8;    /* sine, cosine; mix_row */
    static constexpr int shares = places + ROWS * (int)sizeof(struct mix_row); /* [2]; p(0|t) */
    static constexpr int fetched = shares + 2 * 4;
    static constexpr int values_fetched = fetched + (int)sizeof(bulk_barrier);
    static constexpr int past_fetched = values_fetched + (int)sizeof(bulk_barrier); /* and keys */
    /* What the cluster's blocks have sent to `row`, but for the logits' bytes, which depend on how
     * many latents there are. */
    static constexpr int row_came = past_fetched + (int)sizeof(bulk_barrier);
    static constexpr int row_sent = row_bytes - CLUSTER_BLOCKS * LOGITS * 4;
    /* The ring's values [CLUSTER_RING_ROWS, HEAD], values_step from one row's to the other's: those
     * are in the place of weights of q, k and v, when they have been used, behind the sums. */
    static constexpr int values_bytes = CLUSTER_RING_ROWS * HEAD * RING_VALUE;
    /* Alone, sent to all: [STEP_ROWS, OUT] the head's output, in the place of z: who sends it has
     * received all that others make of z. */
    static constexpr int mixed_came = row_came + (int)sizeof(bulk_barrier);
    static constexpr int mixed = z;
    static_assert(OUT <= SLICE, "place of z");
    static constexpr int o = (mixed_came + (int)sizeof(bulk_barrier) + 15) / 16 * 16;
    static constexpr int end = o + (ALONE ? COLUMNS * OUT * 2 : 0);
    static constexpr int values = end, values_step = qkv + STEP_ROWS * ROW * 2 - values;
    /* Of two rows: the second's keys [CLUSTER_RING_ROWS, HEAD], both rows' latents' sums
     * [ROWS, CLUSTER_LATENTS, HEAD]. */
    static constexpr int keys = values + values_bytes;
    static constexpr int past = keys + (ROWS > 1 ? values_bytes : 0);
    static constexpr int past_bytes = CLUSTER_LATENTS * HEAD * 4;
    static constexpr int bytes = past + (ROWS > 1 ? ROWS * past_bytes : 0);
    static_assert(ROWS == 1 || values + values_step + values_bytes <= latents, "place of weights");
    static_assert(bytes <= (ROWS > 1 || ALONE ? FEW_SHARED : FEW_IN_SHARED), "beside the others");
};

template <class T> static __device__ __forceinline__ T *at(unsigned char *shared, int offset)
{
    return reinterpret_cast<T *>(shared + offset);
}

/* Of what a block has for each of its rows, that of row `of` of the block. */
template <class T, class S>
static __device__ __forceinline__ T *at_row(unsigned char *shared, int of, int offset)
{
    return at<T>(shared, S::row + of * S::row_bytes + offset);
}

/* e^(a - b), of a up to b. */
static __device__ __forceinline__ float exp_below(float a, float b)
{
    return quick_exp2((a - b) * 1.44269504f);
}

static __device__ __forceinline__ void eight(float x[8], uint4 raw)
{
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[2 * i] = __uint_as_float(words[i] << 16);
        x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}

static __device__ __forceinline__ void eight(float x[8], uint2 raw)
{
    const uint32_t words[2] = {raw.x, raw.y};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const __nv_fp8x2_storage_t two = (__nv_fp8x2_storage_t)(words[i / 2] >> 16 * (i % 2));
        const __half2 pair = __nv_cvt_fp8x2_to_halfraw2(two, __NV_E4M3);
        const float2 both = __half22float2(pair);
        x[2 * i] = both.x, x[2 * i + 1] = both.y;
    }
}

/* x as a ring has it, to the nearest. */
static __device__ __forceinline__ void pack_eight(uint4 *to, const float (&x)[8])
{
    __nv_bfloat162 pairs[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        pairs[i] = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
    memcpy(to, pairs, sizeof(pairs));
}

static __device__ __forceinline__ void pack_eight(uint2 *to, const float (&x)[8])
{
    uint32_t words[2] = {};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const __nv_fp8x2_storage_t two = __nv_cvt_float2_to_fp8x2(
            make_float2(x[2 * i], x[2 * i + 1]), __NV_SATFINITE, __NV_E4M3);
        words[i / 2] |= (uint32_t)two << 16 * (i % 2);
    }
    *to = make_uint2(words[0], words[1]);
}

/* A turned key's value, as the ring has it. */
template <class RING> static __device__ __forceinline__ bf16 as_in_ring(float x)
{
    return from_float<bf16>(sizeof(RING) == 1 ? to_float(from_float<RING>(x)) : x);
}

/* ---- before pdl_wait ---- */

/* All threads: n rows of K values, 16 bytes at a time. */
template <int K>
static __device__ __forceinline__ void fetch_short(bf16 *to, int stride, const bf16 *from,
                                                   int64_t from_stride, int n)
{
    constexpr int CHUNKS = K / 8;
    for (int i = threadIdx.x; i < n * CHUNKS; i += CLUSTER_THREADS)
        copy_async_16(to + i / CHUNKS * stride + i % CHUNKS * 8,
                      from + i / CHUNKS * from_stride + i % CHUNKS * 8);
}

/* All threads. Few bulk copies: each takes its thread 80 cycles or so, however short the row. */
template <class S, int D, int HEAD>
static __device__ __forceinline__ void fetch_weights(const struct mix_call &c, int head, int rank,
                                                     unsigned char *shared)
{
    const struct cluster_mix &m = c.m;
    const int64_t M = m.n_latents;
    bf16 *const qkv = at<bf16>(shared, S::qkv), *const latents = at<bf16>(shared, S::latents);
    bulk_barrier *const fetched = at<bulk_barrier>(shared, S::fetched);
    if (threadIdx.x / WARP == CLUSTER_WARPS - 1) {
        bulk_begin(fetched, S::QKV * D * (int)sizeof(bf16) + S::gates_bytes);
        for (int r = threadIdx.x % WARP; r < S::QKV; r += WARP) {
            const int i = r / S::PART, j = r % S::PART, high = j >= S::PAIRS;
            const bf16 *const from = i == 0 ? m.q : i == 1 ? m.k : m.v;
            const int64_t row =
                head * HEAD + high * (HEAD / 2) + rank * S::PAIRS + j - high * S::PAIRS;
            bulk_copy(qkv + r * S::ROW, from + row * D, D * (int)sizeof(bf16), fetched);
        }
        if (threadIdx.x % WARP == WARP - 1)
            bulk_copy(shared + S::gates,
                      (const float4 *)m.prepared + D + rank * S::gates_bytes / 16, S::gates_bytes,
                      fetched);
    }
    fetch_short<S::COLUMNS>(latents, S::SLICE, m.latent_q + head * (M + 1) * D + rank * S::COLUMNS,
                            D, (int)M + 1);
    fetch_short<S::COLUMNS>(latents + (M + 1) * S::SLICE, S::SLICE,
                            m.latent_k + head * M * D + rank * S::COLUMNS, D, (int)M);
    if (S::IS_ALONE)
        fetch_short<HEAD>(at<bf16>(shared, S::o), S::OUT,
                          m.o + (int64_t)rank * S::COLUMNS * D + head * HEAD, D, S::COLUMNS);
    copy_async_commit();
}

/* Tiles of the latents' logits. */
static __device__ __forceinline__ int logit_tiles(const struct mix_call &c)
{
    return (2 * c.m.n_latents + 1 + 7) / 8;
}

/* What the block will be sent. The cluster's barrier comes between this and sending. */
template <class S, int HEAD>
static __device__ __forceinline__ void begin_exchanges(const struct mix_call &c, int rank,
                                                       int n_rows, unsigned char *shared)
{
    const int here = rank < n_rows ? (n_rows - 1 - rank) / CLUSTER_BLOCKS + 1 : 0;
    if (threadIdx.x / WARP == 0)
        bulk_begin(at<bulk_barrier>(shared, S::row_came),
                   here * (S::row_sent + CLUSTER_BLOCKS * logit_tiles(c) * 8 * (int)sizeof(float)));
    if (S::IS_ALONE && threadIdx.x / WARP == 0)
        bulk_begin(at<bulk_barrier>(shared, S::mixed_came), n_rows * HEAD * (int)sizeof(bf16));
}

static __device__ __forceinline__ struct mix_row find_row(const struct mix_call &c, int head,
                                                          int row)
{
    /* Three loads that do not wait for each other: any row of the bucket may be read. */
    const int any = row < c.step.rows ? row : c.step.rows - 1, w = c.m.ring_rows;
    const int64_t position = c.step.positions[any];
    struct mix_row r = {c.step.seq_slot[any], row, head, 0, 0, row < c.step.sizes->n_rows, false};
    r.begins = position == 0;
    r.n_keys = !r.here ? 0 : position < w ? (int)position + 1 : w;
    r.newest =
        (w & (w - 1)) == 0 ? (int)(position & (w - 1)) : (int)((uint64_t)position % (uint32_t)w);
    return r;
}

/* The block's rows to shared memory: in registers they would be in the way until they are used
 * again. A __syncthreads comes before that. */
template <class S>
static __device__ __forceinline__ void keep_places(const struct mix_row (&rows)[S::BLOCK_ROWS],
                                                   unsigned char *shared)
{
#pragma unroll
    for (int r = 0; r < S::BLOCK_ROWS; r++)
        if (threadIdx.x == 0)
            at<struct mix_row>(shared, S::places)[r] = rows[r];
}

template <class S>
static __device__ __forceinline__ void take_places(struct mix_row (&rows)[S::BLOCK_ROWS],
                                                   unsigned char *shared)
{
#pragma unroll
    for (int r = 0; r < S::BLOCK_ROWS; r++)
        rows[r] = at<struct mix_row>(shared, S::places)[r];
}

/* Where the rings of the row's slot and head begin. */
template <int HEAD>
static __device__ __forceinline__ int64_t ring_of(const struct mix_call &c, const struct mix_row &r)
{
    return r.slot * c.m.ring_values + (int64_t)r.head * c.m.ring_rows * HEAD;
}

/* A thread's part of a block's rows: half of a key of the first one's ring, its every other 8
 * values, and 4 values of every LATENT_GROUPS-th latent; m and alpha of latent lane % HALF of row
 * lane / HALF, in every warp. */
template <class S> struct held_rows {
    typename S::eight key[S::CHUNKS];
    float4 s[S::BLOCK_ROWS][S::LATENTS];
    float m, alpha;
};

/* Where in the thread's key the j-th 8 values are that it looks at: keys of shared memory that are
 * read at a time begin at two banks only. */
static __device__ __forceinline__ int key_chunk(int j)
{
    const int key = threadIdx.x / 2, part = threadIdx.x % 2;
    return (2 * (j ^ (key / 2 % 2)) + part) * 8;
}

static __device__ __forceinline__ void load_eight(uint4 *to, const bf16 *from)
{
    *to = load_streaming(from);
}

static __device__ __forceinline__ void load_eight(uint2 *to, const fp8 *from)
{
    *to = __ldg(reinterpret_cast<const uint2 *>(from));
}

template <class S, int HEAD>
static __device__ __forceinline__ void hold_key(struct held_rows<S> *h, const struct mix_call &c,
                                                const struct mix_row &r)
{
    static_assert(S::CHUNKS % 2 == 0, "chunks change places by pairs");
    const int key = threadIdx.x / 2;
    const typename S::ring *const from =
        (const typename S::ring *)c.m.ring_k + ring_of<HEAD>(c, r) + key * HEAD;
#pragma unroll
    for (int j = 0; j < S::CHUNKS; j++) {
        h->key[j] = {};
        if (key < r.n_keys && key != r.newest)
            load_eight(&h->key[j], from + key_chunk(j));
    }
}

/* Where a thread's latents' sums are: of latent `group` on, 4 values. */
template <class S, int HEAD>
static __device__ __forceinline__ float *sums_of(const struct mix_call &c, const struct mix_row &r)
{
    const int group = threadIdx.x / S::QUADS, first = threadIdx.x % S::QUADS * 4;
    return c.m.s.data + r.slot * c.m.s.row_values +
           ((int64_t)r.head * c.m.n_latents + group) * HEAD + first;
}

template <class S, int HEAD>
static __device__ __forceinline__ void hold_sums(float4 (&held)[S::LATENTS],
                                                 const struct mix_call &c, const struct mix_row &r)
{
    const int group = threadIdx.x / S::QUADS;
    const float *const from = sums_of<S, HEAD>(c, r);
#pragma unroll
    for (int j = 0; j < S::LATENTS; j++) {
        held[j] = make_float4(0, 0, 0, 0);
        if (r.here && !r.begins && group < S::LATENT_GROUPS &&
            group + j * S::LATENT_GROUPS < c.m.n_latents)
            held[j] = *reinterpret_cast<const float4 *>(from + j * S::LATENT_GROUPS * HEAD);
    }
}

/* Which of the block's rows a lane's latent is of. */
template <class S> static __device__ __forceinline__ int lane_row(void)
{
    return threadIdx.x / HALF % S::BLOCK_ROWS;
}

template <class S>
static __device__ __forceinline__ void hold_gates(struct held_rows<S> *h, const struct mix_call &c,
                                                  const struct mix_row (&rows)[S::BLOCK_ROWS])
{
    const struct mix_row r = lane_row<S>() == 0 ? rows[0] : rows[S::BLOCK_ROWS - 1];
    const int l = threadIdx.x % HALF, M = c.m.n_latents;
    h->m = h->alpha = 0;
    if (r.here && !r.begins && l < M) {
        h->m = c.m.m.data[r.slot * c.m.m.row_values + (int64_t)r.head * M + l];
        h->alpha = c.m.alpha.data[r.slot * c.m.alpha.row_values + (int64_t)r.head * M + l];
    }
}

/* The values of a row's ring to L2. */
template <class S, int HEAD>
static __device__ __forceinline__ void prefetch_values(const struct mix_call &c,
                                                       const struct mix_row &r)
{
    const int i = threadIdx.x * (128 / S::RING_VALUE);
    if (i < r.n_keys * HEAD)
        prefetch_l2((const typename S::ring *)c.m.ring_v + ring_of<HEAD>(c, r) + i);
}

/* Sines and cosines of 16 rows' positions, for the block's pairs of q and k. Any row of
 * the bucket may be read. */
template <class S>
static __device__ __forceinline__ void put_angles(const struct mix_call &c, int rank,
                                                  unsigned char *shared)
{
    float2 *const angles = at<float2>(shared, S::angles);
    const int i = threadIdx.x, row = i / S::PAIRS;
    if (row < CLUSTER_ROWS && row < c.step.rows)
        angle(c.step.positions[row], c.m.frequencies[rank * S::PAIRS + i % S::PAIRS], &angles[i].x,
              &angles[i].y);
}

/* The rings' values to shared memory, all by one thread, of a warp that has little to do until the
 * rows have been sent: begin, then, where they have room, copy. A __syncthreads comes between begin
 * and bulk_wait. */
enum { VALUES_THREAD = 2 * WARP };

template <class S, int HEAD>
static __device__ __forceinline__ void begin_values(const struct mix_row (&rows)[S::BLOCK_ROWS],
                                                    unsigned char *shared)
{
    int n_keys = 0;
#pragma unroll
    for (int r = 0; r < S::BLOCK_ROWS; r++)
        n_keys += rows[r].n_keys;
    if (threadIdx.x / WARP == VALUES_THREAD / WARP)
        bulk_begin(at<bulk_barrier>(shared, S::values_fetched), n_keys * HEAD * S::RING_VALUE);
}

template <class S, int HEAD>
static __device__ __forceinline__ void
copy_values(const struct mix_call &c, const struct mix_row &row, int r, unsigned char *shared)
{
    if (threadIdx.x == VALUES_THREAD && row.n_keys)
        bulk_copy(shared + S::values + r * S::values_step,
                  (const typename S::ring *)c.m.ring_v + ring_of<HEAD>(c, row),
                  row.n_keys * HEAD * S::RING_VALUE, at<bulk_barrier>(shared, S::values_fetched));
}

/* Of two rows: the second's keys and both rows' latents' sums to shared memory, by the thread that
 * copies values. */
template <class S, int HEAD>
static __device__ __forceinline__ void copy_past(const struct mix_call &c,
                                                 const struct mix_row (&rows)[S::BLOCK_ROWS],
                                                 unsigned char *shared)
{
    constexpr int LAST = S::BLOCK_ROWS - 1;
    bulk_barrier *const fetched = at<bulk_barrier>(shared, S::past_fetched);
    const int M = c.m.n_latents, sums_bytes = M * HEAD * (int)sizeof(float);
    const int keys_bytes = rows[LAST].n_keys * HEAD * S::RING_VALUE;
    int n_bytes = keys_bytes;
#pragma unroll
    for (int r = 0; r < S::BLOCK_ROWS; r++)
        n_bytes += rows[r].here && !rows[r].begins ? sums_bytes : 0;
    if (threadIdx.x / WARP == VALUES_THREAD / WARP)
        bulk_begin(fetched, n_bytes);
    if (threadIdx.x != VALUES_THREAD)
        return;
    if (keys_bytes)
        bulk_copy(shared + S::keys,
                  (const typename S::ring *)c.m.ring_k + ring_of<HEAD>(c, rows[LAST]), keys_bytes,
                  fetched);
#pragma unroll
    for (int r = 0; r < S::BLOCK_ROWS; r++)
        if (rows[r].here && !rows[r].begins)
            bulk_copy(shared + S::past + r * S::past_bytes,
                      c.m.s.data + rows[r].slot * c.m.s.row_values +
                          (int64_t)rows[r].head * M * HEAD,
                      sums_bytes, fetched);
}

/* Zeros in place of the values of keys that a row does not have yet; each by the warp that reads
 * them, which a __syncwarp follows. */
template <class S, int HEAD>
static __device__ __forceinline__ void clear_values(const struct mix_row &row, int r,
                                                    unsigned char *shared)
{
    constexpr int OWN = S::values_bytes / CLUSTER_WARPS;
    static_assert(CLUSTER_RING_ROWS == CLUSTER_WARPS * (int)HALF, "a warp's keys");
    const int first = threadIdx.x / WARP * OWN;
    const int past = row.n_keys * HEAD * S::RING_VALUE;
    for (int i = (past > first ? past : first) + threadIdx.x % WARP * 16; i < first + OWN;
         i += WARP * 16)
        *at<uint4>(shared, S::values + r * S::values_step + i) = make_uint4(0, 0, 0, 0);
}

/* The RG-LRU's part of a lane: rows g and g + 8, two channels of a tile. */
template <class S> struct held_channels {
    struct rglru_channel constants[2];
    float2 past[S::BLOCK_ROWS], weight;
    bool begins[S::BLOCK_ROWS];
};

template <class S>
static __device__ __forceinline__ void hold_channels(struct held_channels<S> *h,
                                                     const struct mix_call &c, int tile)
{
    const struct cluster_mix &m = c.m;
    const int lane = threadIdx.x % WARP, channel = 8 * tile + lane % 4 * 2;
    const float4 *const constants = (const float4 *)m.prepared;
    int64_t slot[S::BLOCK_ROWS];
#pragma unroll
    for (int j = 0; j < S::BLOCK_ROWS; j++) {
        const int row = lane / 4 + 8 * j, any = row < c.step.rows ? row : c.step.rows - 1;
        h->begins[j] = c.step.positions[any] == 0;
        slot[j] = c.step.seq_slot[any];
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float4 one = __ldg(constants + channel + i);
        h->constants[i] = {one.x, one.y, one.z};
        (i ? h->weight.y : h->weight.x) = one.w;
    }
#pragma unroll
    for (int j = 0; j < S::BLOCK_ROWS;
         j++) { /* a fresh slot's and rows beyond the step's: unused */
        h->past[j] = *reinterpret_cast<const float2 *>(m.rglru.data + slot[j] * m.rglru.row_values +
                                                       channel);
        if (h->begins[j])
            h->past[j] = make_float2(0, 0);
    }
}

#endif
