/* cluster_mix.cu - the mixing of a decode layer of few rows, see cluster.cuh: from the residual
 * stream to each head's share of the output projection.
 *
 * Cluster h serves head h; block b of it has 1/8 of the head's rows of q, k and v, 1/8 of all
 * channels of the RG-LRU, of the latents' logits' columns, of the rows of the output projection,
 * and mixes rows b and b + 8 of the step: their latents and windows, both at a time. Steps of up
 * to 8 rows have a kernel of their own, whose blocks mix one.
 *   x gathered, exchanged                                                     1 rows_came
 *   v, q, k, rope; gates, RG-LRU; logits over the block's channels: to the rows' blocks
 *                                                                             2 row_came
 *   gates, latents P(eq 19), window P(eq 13-14); the head's output, exchanged 3 mixed_came
 *   output projection over the head's columns, to the head's partial rows
 * The receiver counts the bytes, all of a launch's, so that nobody waits for more than it needs,
 * and nobody ends while something is on its way to it.
 *
 * Before pdl_wait: weights to shared memory; of one row the state, the ring's values to shared
 * memory, the rest to registers. Of two rows the keys and values of one are there, the rest in L2:
 * values come to the place of weights that have been used, keys and latents between sending and
 * receiving. There state is written, too, outside of the chain.
 *
 * Bytes at D = 768: 5 MB of weights, 62 KB a row and head of state: floor 1.7 us at one row,
 * 4.2 us at 16.
 */
#include "engine/kernels/cuda/cluster.cuh"
#include "engine/kernels/cuda/rglru.cuh"

enum {
    LOGIT_TILES = (2 * CLUSTER_LATENTS + 1 + 7) / 8,
    LOGITS = 8 * LOGIT_TILES,
    HALF = WARP / 2, /* of a warp: a lane has a latent of its half's row */
    MIX_ALONE = 2,   /* rows that every block reads for itself */
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

/* ROWS: that a block mixes. */
template <int D, int HEAD, int WIDTH, int ROWS> struct mix_shape {
    static constexpr int DIM = D, BLOCK_ROWS = ROWS;
    static constexpr int STEP_ROWS = ROWS * CLUSTER_BLOCKS;
    static constexpr int COLUMNS = D / CLUSTER_BLOCKS, TILES = COLUMNS / 8; /* the block's of x */
    static constexpr int PIECE = D / ROW_PIECES;
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
    static_assert(HEAD % 32 == 0 && QKV_K % 32 == 0 && COLUMNS % 32 == 0 && PIECE % 4 == 0 &&
                      PIECE <= 64 && D % (ROW_PIECES * CLUSTER_BLOCKS) == 0 && WIDTH % 32 == 0 &&
                      WIDTH % COLUMNS == 0 && QUADS <= WARP * 2 && PAIRS % 2 == 0,
                  "tiles of products");
    static_assert(CLUSTER_LATENTS == (int)HALF && ROWS <= 2, "a latent of a row a lane");

    static constexpr int qkv = 0; /* offsets, in bytes */
    static constexpr int latents = qkv + QKV * ROW * 2;
    static constexpr int o = latents + (2 * CLUSTER_LATENTS + 1) * SLICE * 2;
    static constexpr int gates = o + COLUMNS * OUT * 2; /* as cluster_prepare has them */
    static constexpr int gates_bytes = TILES * GATE_QUADS * WARP * 16;
    static constexpr int rows = gates + gates_bytes;
    static constexpr int rows_bytes = STEP_ROWS * ROW * 2;
    /* Of the mixing, in the place of the rows, when they have been used. */
    static constexpr int local = rows, other = local + ROWS * GROUPS * HEAD * 4;
    static_assert(ROWS * (GROUPS + LATENT_GROUPS) * HEAD * 4 <= rows_bytes, "place of the rows");
    /* [warps, STEP_ROWS, 8 QKV_TILES]; of two rows where the warp has used weights of q, k, v: in
     * its columns of their first rows. */
    static constexpr int sums = ROWS == 1 ? rows + rows_bytes : qkv;
    static constexpr int sums_row = ROWS == 1 ? 8 * QKV_TILES : ROW / 2; /* strides */
    static constexpr int sums_warp = ROWS == 1 ? STEP_ROWS * sums_row : QKV_K / 2;
    static_assert(8 * QKV_TILES * 4 <= QKV_K * 2 && STEP_ROWS <= QKV, "place of the sums");
    static constexpr int z = rows + rows_bytes + (ROWS == 1 ? CLUSTER_WARPS * sums_warp * 4 : 0);
    /* In the place of z: who sends it has received all that others make of z. */
    static constexpr int mixed = z;
    static_assert(OUT <= SLICE, "place of z");
    /* What the cluster's blocks send to the block of a row, for each of its rows: logits [blocks,
     * LOGITS], z_squares [blocks], the turned query and v [HEAD] f32, the turned key and v [HEAD]
     * bf16. */
    static constexpr int row = z + STEP_ROWS * SLICE * 2;
    static constexpr int logits = 0, z_squares = logits + CLUSTER_BLOCKS * LOGITS * 4;
    static constexpr int query = z_squares + CLUSTER_BLOCKS * 4, value = query + HEAD * 4;
    static constexpr int new_key = value + HEAD * 4, new_value = new_key + HEAD * 2;
    static constexpr int row_bytes = new_value + HEAD * 2;
    static constexpr int squares = row + ROWS * row_bytes;
    static constexpr int scales = squares + SQUARES * 4;             /* [16] */
    static constexpr int z_parts = scales + CLUSTER_ROWS * 4;        /* [tiles, 16] */
    static constexpr int stats = z_parts + TILES * CLUSTER_ROWS * 4; /* [ROWS, 2, warps]: tops, */
    static constexpr int angles = stats + ROWS * 2 * CLUSTER_WARPS * 4; /* totals; [16, PAIRS] */
    static constexpr int places = angles + CLUSTER_ROWS * PAIRS * 8;    /* sine, cosine; mix_row */
    static constexpr int shares = places + ROWS * (int)sizeof(struct mix_row); /* [2]; p(0|t) */
    static constexpr int fetched = shares + 2 * 4;
    static constexpr int values_fetched = fetched + (int)sizeof(bulk_barrier);
    /* What the cluster's blocks have sent: to `row` but for the logits' bytes, which depend on how
     * many latents there are; to `mixed`; to `rows` and `squares`. */
    static constexpr int row_came = values_fetched + (int)sizeof(bulk_barrier);
    static constexpr int mixed_came = row_came + (int)sizeof(bulk_barrier);
    static constexpr int rows_came = mixed_came + (int)sizeof(bulk_barrier);
    static constexpr int row_sent = row_bytes - CLUSTER_BLOCKS * LOGITS * 4;
    /* The ring's values [CLUSTER_RING_ROWS, HEAD], values_step from one row's to the other's: those
     * are in the place of weights of q, k and v, when they have been used, behind the sums. */
    static constexpr int values_bytes = CLUSTER_RING_ROWS * HEAD * 2;
    static constexpr int end = (rows_came + (int)sizeof(bulk_barrier) + 15) / 16 * 16;
    static constexpr int values = end, values_step = qkv + STEP_ROWS * ROW * 2 - values;
    static constexpr int bytes = values + values_bytes;
    static_assert(ROWS == 1 || values + values_step + values_bytes <= latents, "place of weights");
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
    if (threadIdx.x / WARP == 0) {
        bulk_begin(at<bulk_barrier>(shared, S::row_came),
                   here * (S::row_sent + CLUSTER_BLOCKS * logit_tiles(c) * 8 * (int)sizeof(float)));
        bulk_begin(at<bulk_barrier>(shared, S::mixed_came), n_rows * HEAD * (int)sizeof(bf16));
        bulk_begin(at<bulk_barrier>(shared, S::rows_came),
                   n_rows > MIX_ALONE
                       ? n_rows * (S::DIM * (int)sizeof(bf16) + ROW_PIECES * (int)sizeof(float))
                       : 0);
    }
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

/* A thread's part of a block's rows: half of a key of the ring, its every other 8 values, and 4
 * values of every LATENT_GROUPS-th latent; m and alpha of latent lane % HALF of row lane / HALF,
 * in every warp. */
template <class S> struct held_rows {
    uint4 key[S::BLOCK_ROWS][S::CHUNKS];
    float4 s[S::BLOCK_ROWS][S::LATENTS];
    float m, alpha;
};

template <class S, int HEAD>
static __device__ __forceinline__ void hold_key(uint4 (&held)[S::CHUNKS], const struct mix_call &c,
                                                const struct mix_row &r)
{
    const int key = threadIdx.x / 2, part = threadIdx.x % 2;
    const bf16 *const from = c.m.ring_k + ring_of<HEAD>(c, r) + key * HEAD + part * 8;
#pragma unroll
    for (int j = 0; j < S::CHUNKS; j++) {
        held[j] = make_uint4(0, 0, 0, 0);
        if (key < r.n_keys && key != r.newest)
            held[j] = load_streaming(from + 16 * j);
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

/* A row's latents' sums to L2, and its rings. */
template <int HEAD>
static __device__ __forceinline__ void prefetch_row(const struct mix_call &c,
                                                    const struct mix_row &r, bool rings)
{
    const int at_bf16 = threadIdx.x * 64, at_f32 = threadIdx.x * 32, M = c.m.n_latents;
    if (rings && at_bf16 < r.n_keys * HEAD) {
        prefetch_l2(c.m.ring_k + ring_of<HEAD>(c, r) + at_bf16);
        prefetch_l2(c.m.ring_v + ring_of<HEAD>(c, r) + at_bf16);
    }
    if (r.here && at_f32 < M * HEAD)
        prefetch_l2(c.m.s.data + r.slot * c.m.s.row_values + (int64_t)r.head * M * HEAD + at_f32);
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
        bulk_begin(at<bulk_barrier>(shared, S::values_fetched), n_keys * HEAD * (int)sizeof(bf16));
}

template <class S, int HEAD>
static __device__ __forceinline__ void
copy_values(const struct mix_call &c, const struct mix_row &row, int r, unsigned char *shared)
{
    if (threadIdx.x == VALUES_THREAD && row.n_keys)
        bulk_copy(shared + S::values + r * S::values_step, c.m.ring_v + ring_of<HEAD>(c, row),
                  row.n_keys * HEAD * (int)sizeof(bf16),
                  at<bulk_barrier>(shared, S::values_fetched));
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
    const int past = row.n_keys * HEAD * (int)sizeof(bf16);
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

/* ---- the rows ---- */

/* What a thread has of them: 4 values each of two pieces. Of many rows each block of the cluster
 * reads its columns and sends them to the others; of up to MIX_ALONE rows it is quicker to read all
 * of them. */
struct held_pieces {
    float4 weight[2]; /* of the norm */
    int row, piece;   /* of the first */
    bool alone, mine; /* alone: the second is the same of the next row, else the row's next */
};

template <class S>
static __device__ __forceinline__ void hold_pieces(struct held_pieces *h, const struct mix_call &c,
                                                   int n_rows, int rank)
{
    constexpr int QUADS_HERE = S::PIECE / 4, PIECES = ROW_PIECES / CLUSTER_BLOCKS;
    static_assert(PIECES == 2 && MIX_ALONE == 2 && QUADS_HERE % 2 == 0, "two quads a thread");
    const int group = threadIdx.x / 16, quad = threadIdx.x % 16;
    h->alone = n_rows <= MIX_ALONE;
    h->mine = quad < QUADS_HERE;
    h->row = h->alone ? 0 : group;
    h->piece = h->alone ? group : rank * PIECES;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int column = (h->piece + (h->alone ? 0 : i)) * S::PIECE + quad * 4;
        h->weight[i] = make_float4(0, 0, 0, 0);
        if (h->mine)
            h->weight[i] = __ldg(reinterpret_cast<const float4 *>(c.m.norm.weight + column));
    }
}

/* A row's two pieces to every block, 16 bytes at a time: an even lane has its neighbour's of the
 * first piece as well, an odd one its neighbour's of the second. */
template <class S>
static __device__ __forceinline__ void send_pieces(const uint2 (&y)[2], const struct held_pieces &h,
                                                   int n_rows, bf16 *rows, bulk_barrier *came)
{
    const int quad = threadIdx.x % 16, odd = quad % 2;
    const uint2 give = odd ? y[0] : y[1], keep = odd ? y[1] : y[0];
    const uint2 take = make_uint2(__shfl_xor_sync(0xffffffffu, give.x, 1),
                                  __shfl_xor_sync(0xffffffffu, give.y, 1));
    const uint4 both = odd ? make_uint4(take.x, take.y, keep.x, keep.y)
                           : make_uint4(keep.x, keep.y, take.x, take.y);
    uint4 *const to = reinterpret_cast<uint4 *>(rows + odd * S::PIECE + quad / 2 * 8);
#pragma unroll
    for (int peer = 0; peer < CLUSTER_BLOCKS; peer++)
        if (h.mine && h.row < n_rows)
            cluster_send(to, both, peer, came);
}

/* After pdl_wait: x times the norm's weight as bf16 [STEP_ROWS, ROW], with squares [ROW_PIECES, 16 rows];
 * complete when it returns. All threads of the cluster call it. */
template <class S>
static __device__ __forceinline__ void gather_rows(const struct mix_call &c,
                                                   const struct held_pieces &h, int n_rows,
                                                   unsigned char *shared)
{
    const int quad = threadIdx.x % 16, from = h.row * S::DIM + h.piece * S::PIECE + quad * 4;
    float *const squares = at<float>(shared, S::squares) + h.piece * CLUSTER_ROWS + h.row;
    bf16 *const rows = at<bf16>(shared, S::rows) + h.row * S::ROW + h.piece * S::PIECE;
    float4 x[2];
    uint2 y[2];
    float square[2];
    bulk_barrier *const came = at<bulk_barrier>(shared, S::rows_came);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        x[i] = make_float4(0, 0, 0, 0);
        if (h.mine && h.row + (h.alone ? i : 0) < n_rows)
            x[i] = few_load(c.m.x + from + i * (h.alone ? S::DIM : S::PIECE));
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
        y[i] = few_weighed(x[i], h.weight[i]);
    if (h.alone) {
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (h.mine)
                *reinterpret_cast<uint2 *>(rows + i * S::ROW + quad * 4) = y[i];
    } else {
        send_pieces<S>(y, h, n_rows, rows, came);
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
        square[i] = few_square(x[i]);
    copy_async_wait<0>(); /* this thread's weights */
    if (h.alone) {
        if (quad == 0)
            squares[0] = square[0], squares[1] = square[1];
        __syncthreads();
        return;
    }
    const int second = quad / CLUSTER_BLOCKS;
    if (h.row < n_rows)
        cluster_send(squares + second * CLUSTER_ROWS, second ? square[1] : square[0],
                     quad % CLUSTER_BLOCKS, came);
    cluster_receive(came);
}

/* ---- products of the block, and the RG-LRU ---- */

/* One warp: z of the 8 channels of N tiles, CLUSTER_WARPS apart, which takes the past's place;
 * squares of z, a row each, over a tile's. */
template <class S, int WIDTH, int N>
static __device__ __forceinline__ void step_channels(struct held_channels<S> *held, int rank,
                                                     float scale, unsigned char *shared)
{
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    const bf16 *const rows = at<bf16>(shared, S::rows);
    const uint4 *const gates = at<uint4>(shared, S::gates) + warp * S::GATE_QUADS * WARP + lane;
    const bf16 *const from =
        few_rows_at<S::STEP_ROWS>(rows + rank * S::COLUMNS / WIDTH * WIDTH, S::ROW);
    float r[N][4] = {}, i[N][4] = {};
#pragma unroll
    for (int k = 0; k < S::GATE_STEPS; k += 2) { /* a quad has two steps of a gate */
        uint32_t low[4], high[4];
        ldmatrix_x4(low, from + 16 * k);
        ldmatrix_x4(high, from + 16 * k + 16);
#pragma unroll
        for (int n = 0; n < N; n++) {
            const uint4 *const at = gates + n * CLUSTER_WARPS * S::GATE_QUADS * WARP;
            const uint4 recurrence = at[k / 2 * WARP];
            const uint4 input = at[(S::GATE_STEPS + k) / 2 * WARP];
            const uint32_t recurrence_at[2][2] = {{recurrence.x, recurrence.y},
                                                  {recurrence.z, recurrence.w}};
            const uint32_t input_at[2][2] = {{input.x, input.y}, {input.z, input.w}};
            mma_bf16(r[n], low, recurrence_at[0]);
            mma_bf16(i[n], low, input_at[0]);
            mma_bf16(r[n], high, recurrence_at[1]);
            mma_bf16(i[n], high, input_at[1]);
        }
    }
#pragma unroll
    for (int j = 0; j < S::BLOCK_ROWS; j++) {
        const int row = g + 8 * j;
        const float factor = __shfl_sync(0xffffffffu, scale, row);
        float square[N];
#pragma unroll
        for (int n = 0; n < N; n++) {
            struct held_channels<S> *const one = held + n;
            const int own = 8 * (warp + n * CLUSTER_WARPS) + 2 * t;
            const float2 h = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162 *>(
                rows + row * S::ROW + rank * S::COLUMNS + own));
            const float2 low = rglru_terms(r[n][2 * j] * factor, i[n][2 * j] * factor, h.x * factor,
                                           one->constants[0], one->begins[j]);
            const float2 high = rglru_terms(r[n][2 * j + 1] * factor, i[n][2 * j + 1] * factor,
                                            h.y * factor, one->constants[1], one->begins[j]);
            const float2 z = make_float2(fmaf(low.x, one->past[j].x, low.y),
                                         fmaf(high.x, one->past[j].y, high.y));
            one->past[j] = z;
            square[n] = fmaf(z.x, z.x, z.y * z.y);
            *reinterpret_cast<__nv_bfloat162 *>(at<bf16>(shared, S::z) + row * S::SLICE + own) =
                __floats2bfloat162_rn(z.x * one->weight.x, z.y * one->weight.y);
        }
#pragma unroll
        for (int o = 1; o < 4; o *= 2) {
#pragma unroll
            for (int n = 0; n < N; n++)
                square[n] += __shfl_xor_sync(0xffffffffu, square[n], o);
        }
#pragma unroll
        for (int n = 0; n < N; n++)
            if (t == 0)
                at<float>(shared, S::z_parts)[(warp + n * CLUSTER_WARPS) * CLUSTER_ROWS + row] =
                    square[n];
    }
}

template <class S>
static __device__ __forceinline__ void
put_z(const struct mix_call &c, const struct held_channels<S> &held, int tile, int n_rows)
{
    const int lane = threadIdx.x % WARP, channel = 8 * tile + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < S::BLOCK_ROWS; j++) {
        const int row = lane / 4 + 8 * j;
        if (row < n_rows)
            *reinterpret_cast<float2 *>(c.m.z + (int64_t)row * S::DIM + channel) = held.past[j];
    }
}

/* q, k, v of the block's rows of the head, q and k turned, to the blocks of the step's rows, by the
 * warps that have none of the latents' logits: a thread has two pairs of q, k or v of a block's
 * rows. */
template <class S, int HEAD>
static __device__ __forceinline__ void send_qkv(const struct mix_call &c, int rank, int n_rows,
                                                unsigned char *shared)
{
    constexpr int ITEMS = 3 * S::PAIRS / 2, FIRST = LOGIT_TILES * WARP;
    static_assert(FIRST + CLUSTER_BLOCKS * ITEMS <= CLUSTER_THREADS, "an item a thread");
    const int to = ((int)threadIdx.x - FIRST) / ITEMS, item = ((int)threadIdx.x - FIRST) % ITEMS;
    const int which = item / (S::PAIRS / 2), pair = item % (S::PAIRS / 2) * 2;
    if ((int)threadIdx.x < FIRST || to >= n_rows || to >= CLUSTER_BLOCKS)
        return;
    const float *const sums =
        at<float>(shared, S::sums) + to * S::sums_row + which * S::PART + pair;
    float2 low[S::BLOCK_ROWS] = {}, high[S::BLOCK_ROWS] = {};
#pragma unroll
    for (int w = 0; w < CLUSTER_WARPS; w++) {
#pragma unroll
        for (int r = 0; r < S::BLOCK_ROWS; r++) {
            const float *const from = sums + w * S::sums_warp + r * CLUSTER_BLOCKS * S::sums_row;
            const float2 x0 = *reinterpret_cast<const float2 *>(from);
            const float2 x1 = *reinterpret_cast<const float2 *>(from + S::PAIRS);
            low[r].x += x0.x, low[r].y += x0.y;
            high[r].x += x1.x, high[r].y += x1.y;
        }
    }
#pragma unroll
    for (int r = 0; r < S::BLOCK_ROWS; r++) {
        const int row = to + r * CLUSTER_BLOCKS;
        const float scale = at<float>(shared, S::scales)[row];
        low[r].x *= scale, low[r].y *= scale;
        high[r].x *= scale, high[r].y *= scale;
        if (which < 2) {
            const float4 a = *at<float4>(shared, S::angles + (row * S::PAIRS + pair) * 8);
            const float factor = which == 0 ? c.m.scale : 1;
            const float2 x0 = low[r], x1 = high[r];
            low[r].x = fmaf(x0.x, a.y, -x1.x * a.x) * factor;
            low[r].y = fmaf(x0.y, a.w, -x1.y * a.z) * factor;
            high[r].x = fmaf(x0.x, a.x, x1.x * a.y) * factor;
            high[r].y = fmaf(x0.y, a.z, x1.y * a.w) * factor;
        }
    }
    bulk_barrier *const came = at<bulk_barrier>(shared, S::row_came);
    const int at = rank * S::PAIRS + pair;
#pragma unroll
    for (int r = 0; r < S::BLOCK_ROWS; r++) {
        if (to + r * CLUSTER_BLOCKS >= n_rows)
            continue;
        if (which != 1) {
            float2 *const exact =
                at_row<float2, S>(shared, r, (which ? S::value : S::query) + at * 4);
            cluster_send(exact, low[r], to, came);
            cluster_send(exact + HEAD / 4, high[r], to, came);
        }
        if (which != 0) {
            __nv_bfloat162 *const kept = at_row<__nv_bfloat162, S>(
                shared, r, (which == 1 ? S::new_key : S::new_value) + at * 2);
            cluster_send(kept, __floats2bfloat162_rn(low[r].x, low[r].y), to, came);
            cluster_send(kept + HEAD / 4, __floats2bfloat162_rn(high[r].x, high[r].y), to, came);
        }
    }
}

/* The latents' logits over the block's channels, a tile of 8 a warp; squares of z. */
template <class S>
static __device__ __forceinline__ void send_logits(const struct mix_call &c, int rank, int n_rows,
                                                   unsigned char *shared)
{
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    const int n = 2 * c.m.n_latents + 1;
    bulk_barrier *const came = at<bulk_barrier>(shared, S::row_came);
    if (warp == LOGIT_TILES - 1 && lane < n_rows) {
        float square = 0;
#pragma unroll
        for (int i = 0; i < S::TILES; i++)
            square += at<float>(shared, S::z_parts)[i * CLUSTER_ROWS + lane];
        float *const to = at_row<float, S>(shared, lane / CLUSTER_BLOCKS, S::z_squares) + rank;
        cluster_send(to, square, lane % CLUSTER_BLOCKS, came);
    }
    if (warp >= logit_tiles(c))
        return;
    float sum[1][4] = {};
    few_product<1, S::COLUMNS, S::STEP_ROWS>(sum, at<bf16>(shared, S::z), S::SLICE,
                                             at<bf16>(shared, S::latents) + 8 * warp * S::SLICE,
                                             S::SLICE, n - 8 * warp - 1);
#pragma unroll
    for (int j = 0; j < S::BLOCK_ROWS; j++) {
        const int row = g + 8 * j;
        float2 *const to = at_row<float2, S>(shared, row / CLUSTER_BLOCKS,
                                             S::logits + (rank * LOGITS + 8 * warp + 2 * t) * 4);
        if (row < n_rows)
            cluster_send(to, make_float2(sum[0][2 * j], sum[0][2 * j + 1]), row % CLUSTER_BLOCKS,
                         came);
    }
}

/* ---- the block's rows of the head, all at a time: their chains of instructions overlap ---- */

/* A lane's latent (lane % HALF, of row lane / HALF), in every warp: logits of its gate, of the
 * window's and of what it takes. */
struct lane_logits {
    float gate, window, theta;
};

template <class S, int D>
static __device__ __forceinline__ struct lane_logits take_logits(const struct mix_call &c,
                                                                 unsigned char *shared)
{
    const int l = threadIdx.x % HALF, M = c.m.n_latents, of = lane_row<S>();
    const float *const logits = at_row<float, S>(shared, of, S::logits);
    const float4 *const z_squares = at_row<float4, S>(shared, of, S::z_squares);
    const float4 z_low = z_squares[0], z_high = z_squares[1];
    float w[CLUSTER_BLOCKS], gate[2] = {0, 0}, theta[2] = {0, 0};
#pragma unroll
    for (int b = 0; b < CLUSTER_BLOCKS; b++) {
        const float *const from = logits + b * LOGITS;
        w[b] = from[0];
        if (l < M) /* halves of the blocks */
            gate[b / 4] += from[1 + l], theta[b / 4] += from[1 + M + l];
    }
    const float square = ((z_low.x + z_high.x) + (z_low.z + z_high.z)) +
                         ((z_low.y + z_high.y) + (z_low.w + z_high.w));
    const float scale = norm_scale(square, D, c.m.z_eps);
    const float window = ((w[0] + w[4]) + (w[2] + w[6])) + ((w[1] + w[5]) + (w[3] + w[7]));
    return {l < M ? (gate[0] + gate[1]) * scale : -INFINITY, window * scale,
            (theta[0] + theta[1]) * scale};
}

/* Scores of the thread's key, -INFINITY where there is none. */
template <class S, int HEAD>
static __device__ __forceinline__ void score(float (&x)[S::BLOCK_ROWS], const struct mix_call &c,
                                             const struct mix_row (&rows)[S::BLOCK_ROWS],
                                             const struct held_rows<S> &h, unsigned char *shared)
{
    const int key = threadIdx.x / 2, part = threadIdx.x % 2;
    float4 sum[S::BLOCK_ROWS] = {};
#pragma unroll
    for (int j = 0; j < S::CHUNKS; j++) {
        const int i = (2 * j + part) * 8;
#pragma unroll
        for (int r = 0; r < S::BLOCK_ROWS; r++) {
            const float *const query = at_row<float, S>(shared, r, S::query) + i;
            const bf16 *const newest = at_row<bf16, S>(shared, r, S::new_key) + i;
            const float4 low = *reinterpret_cast<const float4 *>(query);
            const float4 high = *reinterpret_cast<const float4 *>(query + 4);
            float k[8];
            eight(k,
                  key == rows[r].newest ? *reinterpret_cast<const uint4 *>(newest) : h.key[r][j]);
            sum[r].x = fmaf(high.x, k[4], fmaf(low.x, k[0], sum[r].x));
            sum[r].y = fmaf(high.y, k[5], fmaf(low.y, k[1], sum[r].y));
            sum[r].z = fmaf(high.z, k[6], fmaf(low.z, k[2], sum[r].z));
            sum[r].w = fmaf(high.w, k[7], fmaf(low.w, k[3], sum[r].w));
        }
    }
#pragma unroll
    for (int r = 0; r < S::BLOCK_ROWS; r++) {
        x[r] = (sum[r].x + sum[r].y) + (sum[r].z + sum[r].w);
        x[r] += __shfl_xor_sync(0xffffffffu, x[r], 1);
        if (c.m.softcap > 0)
            x[r] = c.m.softcap * tanhf(x[r] / c.m.softcap);
        x[r] = key < rows[r].n_keys ? x[r] : -INFINITY;
    }
}

/* What a lane's latent does: s = s keep + take v, and its share of s / alpha. */
struct lane_gates {
    float keep, take, share;
};

/* Two softmaxes at a time. x becomes weights: of a warp's keys, below their maximum; maxima and
 * totals to shared memory. Over the latents and the window, every warp for itself: gates, and the
 * latents' maxima and sums of the row's theta. */
template <class S>
static __device__ __forceinline__ struct lane_gates
weigh(float (&x)[S::BLOCK_ROWS], const struct lane_logits &logits, bool begins,
      struct held_rows<S> *h, unsigned char *shared)
{
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    float top[S::BLOCK_ROWS], total[S::BLOCK_ROWS], gate_top = logits.gate;
#pragma unroll
    for (int r = 0; r < S::BLOCK_ROWS; r++)
        top[r] = x[r];
#pragma unroll
    for (int o = HALF; o > 1; o >>= 1) { /* two lanes have a key, half a warp has the latents */
#pragma unroll
        for (int r = 0; r < S::BLOCK_ROWS; r++)
            top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], o));
        gate_top = fmaxf(gate_top, __shfl_xor_sync(0xffffffffu, gate_top, o / 2));
    }
    gate_top = fmaxf(gate_top, logits.window);
    const float window = exp_below(logits.window, gate_top);
    const float gate = exp_below(logits.gate, gate_top); /* 0 where there is no latent */
    float gate_total = gate;
#pragma unroll
    for (int r = 0; r < S::BLOCK_ROWS; r++)
        total[r] = x[r] = x[r] == -INFINITY ? 0 : exp_below(x[r], top[r]);
#pragma unroll
    for (int o = HALF; o > 1; o >>= 1) {
#pragma unroll
        for (int r = 0; r < S::BLOCK_ROWS; r++)
            total[r] += __shfl_xor_sync(0xffffffffu, total[r], o);
        gate_total += __shfl_xor_sync(0xffffffffu, gate_total, o / 2);
    }
#pragma unroll
    for (int r = 0; r < S::BLOCK_ROWS; r++) {
        float *const stats = at<float>(shared, S::stats) + r * 2 * CLUSTER_WARPS + warp;
        if (lane == 0)
            stats[0] = top[r], stats[CLUSTER_WARPS] = total[r];
    }
    const float inverse = quick_reciprocal(gate_total + window);
    if (warp == 0 && lane % HALF == 0)
        at<float>(shared, S::shares)[lane / HALF] = window * inverse;
    const float now = begins ? logits.theta : fmaxf(h->m, logits.theta);
    const float kept = begins ? 0 : exp_below(h->m, now), take = exp_below(logits.theta, now);
    h->alpha = begins ? take : fmaf(h->alpha, kept, take);
    h->m = now;
    return {kept, take, gate * inverse * quick_reciprocal(h->alpha)};
}

/* The new values in place of those that leave the rings; each by the warp that reads them. */
template <class S, int HEAD>
static __device__ __forceinline__ void renew_values(const struct mix_row (&rows)[S::BLOCK_ROWS],
                                                    unsigned char *shared)
{
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
    for (int r = 0; r < S::BLOCK_ROWS; r++)
        if (rows[r].newest / HALF == warp && lane < S::EIGHTS)
            at<uint4>(shared, S::values + r * S::values_step + rows[r].newest * HEAD * 2)[lane] =
                at_row<uint4, S>(shared, r, S::new_value)[lane];
    __syncwarp();
}

/* local [ROWS, GROUPS, HEAD]: the values of a warp's keys, weighted; a lane has 8 dimensions of
 * every VALUE_GROUPS-th. weight: the lane's key's. */
template <class S, int HEAD>
static __device__ __forceinline__ void take_values(const float (&weight)[S::BLOCK_ROWS],
                                                   unsigned char *shared)
{
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const bool mine = lane < S::VALUE_GROUPS * S::EIGHTS;
    const int group = mine ? lane / S::EIGHTS : 0, first = lane % S::EIGHTS * 8;
    const bf16 *const values = at<bf16>(shared, S::values) + (warp * HALF + group) * HEAD + first;
    float sum[S::BLOCK_ROWS][8] = {};
#pragma unroll
    for (int j = 0; j < S::VALUES; j++) {
        const int key = group + j * S::VALUE_GROUPS; /* of the warp's */
#pragma unroll
        for (int r = 0; r < S::BLOCK_ROWS; r++) {
            const float share = __shfl_sync(0xffffffffu, weight[r], 2 * key);
            float v[8];
            eight(v, *reinterpret_cast<const uint4 *>(values + r * (S::values_step / 2) +
                                                      j * S::VALUE_GROUPS * HEAD));
#pragma unroll
            for (int i = 0; i < 8; i++)
                sum[r][i] = fmaf(share, v[i], sum[r][i]);
        }
    }
    if (!mine)
        return;
    float4 *const to =
        at<float4>(shared, S::local + ((warp * S::VALUE_GROUPS + group) * HEAD + first) * 4);
#pragma unroll
    for (int r = 0; r < S::BLOCK_ROWS; r++) {
        to[r * S::GROUPS * HEAD / 4] = make_float4(sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
        to[r * S::GROUPS * HEAD / 4 + 1] = make_float4(sum[r][4], sum[r][5], sum[r][6], sum[r][7]);
    }
}

/* s = s keep + take v, P(eq 19), in registers; other [ROWS, LATENT_GROUPS, HEAD]: shares of
 * s / alpha. */
template <class S, int HEAD>
static __device__ __forceinline__ void step_latents(const struct mix_call &c,
                                                    const struct lane_gates &gates,
                                                    struct held_rows<S> *h, unsigned char *shared)
{
    const int group = threadIdx.x / S::QUADS, first = threadIdx.x % S::QUADS * 4;
#pragma unroll
    for (int r = 0; r < S::BLOCK_ROWS; r++) {
        const float4 v = *at_row<float4, S>(shared, r, S::value + first * 4);
        float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int j = 0; j < S::LATENTS; j++) {
            const int l = group + j * S::LATENT_GROUPS, of = r * HALF + l % HALF;
            const float k = __shfl_sync(0xffffffffu, gates.keep, of);
            const float t = __shfl_sync(0xffffffffu, gates.take, of);
            const float p = __shfl_sync(0xffffffffu, gates.share, of);
            if (l >= c.m.n_latents)
                continue;
            const float4 old = h->s[r][j];
            const float4 now = make_float4(fmaf(old.x, k, t * v.x), fmaf(old.y, k, t * v.y),
                                           fmaf(old.z, k, t * v.z), fmaf(old.w, k, t * v.w));
            h->s[r][j] = now;
            sum = make_float4(fmaf(p, now.x, sum.x), fmaf(p, now.y, sum.y), fmaf(p, now.z, sum.z),
                              fmaf(p, now.w, sum.w));
        }
        if (group < S::LATENT_GROUPS)
            *at<float4>(shared, S::other + ((r * S::LATENT_GROUPS + group) * HEAD + first) * 4) =
                sum;
    }
}

/* The head's output of the rows, to every block: 4 lanes have 2 dimensions, a quarter of the sums
 * each; 8 lanes send 4 to a block each. */
template <class S, int HEAD>
static __device__ __forceinline__ void send_mixed(const struct mix_row (&rows)[S::BLOCK_ROWS],
                                                  unsigned char *shared)
{
    constexpr int EACH = S::GROUPS / 4; /* sums of weighted values, of every other warp */
    static_assert(S::VALUE_GROUPS == 2 && EACH == CLUSTER_WARPS / 2, "two sums a warp");
    const int pair = threadIdx.x / 4, part = threadIdx.x % 4;
    const bool mine = pair < HEAD / 2;
    float2 y[S::BLOCK_ROWS];
    float total[S::BLOCK_ROWS], share[S::BLOCK_ROWS];
#pragma unroll
    for (int r = 0; r < S::BLOCK_ROWS; r++) {
        const float *const stats = at<float>(shared, S::stats) + r * 2 * CLUSTER_WARPS;
        const float2 *const local =
            at<float2>(shared, S::local + ((r * S::GROUPS + part) * HEAD + 2 * pair) * 4);
        float tops[CLUSTER_WARPS], top = -INFINITY;
#pragma unroll
        for (int w = 0; w < CLUSTER_WARPS; w++) {
            tops[w] = stats[w];
            top = fmaxf(top, tops[w]);
        }
        total[r] = 0;
        y[r] = make_float2(0, 0);
#pragma unroll
        for (int i = 0; i < EACH; i++) { /* sum 4 i + part, of warp 2 i + part / 2 */
            const float factor = exp_below(part < 2 ? tops[2 * i] : tops[2 * i + 1], top);
            total[r] = fmaf(factor, stats[CLUSTER_WARPS + 2 * i + part / 2], total[r]);
            const float2 x = mine ? local[4 * i * HEAD / 2] : make_float2(0, 0);
            y[r].x = fmaf(factor, x.x, y[r].x), y[r].y = fmaf(factor, x.y, y[r].y);
        }
        share[r] = at<float>(shared, S::shares)[r];
    }
#pragma unroll
    for (int r = 0; r < S::BLOCK_ROWS; r++)
        total[r] += __shfl_xor_sync(0xffffffffu, total[r], 2);
#pragma unroll
    for (int r = 0; r < S::BLOCK_ROWS; r++) {
        const float2 *const other =
            at<float2>(shared, S::other + ((r * S::LATENT_GROUPS + part) * HEAD + 2 * pair) * 4);
        share[r] *= quick_reciprocal(total[r]);
        y[r].x *= share[r], y[r].y *= share[r];
#pragma unroll
        for (int i = 0; i < (S::LATENT_GROUPS + 3) / 4; i++)
            if (mine && 4 * i + part < S::LATENT_GROUPS) {
                const float2 x = other[4 * i * HEAD / 2];
                y[r].x += x.x, y[r].y += x.y;
            }
    }
#pragma unroll
    for (int o = 1; o < 4; o *= 2) {
#pragma unroll
        for (int r = 0; r < S::BLOCK_ROWS; r++) {
            y[r].x += __shfl_xor_sync(0xffffffffu, y[r].x, o);
            y[r].y += __shfl_xor_sync(0xffffffffu, y[r].y, o);
        }
    }
#pragma unroll
    for (int r = 0; r < S::BLOCK_ROWS; r++) {
        const __nv_bfloat162 two = __floats2bfloat162_rn(y[r].x, y[r].y);
        uint32_t own, other;
        memcpy(&own, &two, 4);
        other = __shfl_xor_sync(0xffffffffu, own, 4);
        uint2 *const to =
            at<uint2>(shared, S::mixed + (rows[r].row * S::OUT + pair / 2 * 4) * (int)sizeof(bf16));
        if (mine && rows[r].here)
            cluster_send(to, pair % 2 ? make_uint2(other, own) : make_uint2(own, other),
                         threadIdx.x % CLUSTER_BLOCKS, at<bulk_barrier>(shared, S::mixed_came));
    }
}

/* The head's output of the rows, to every block. Their new state stays in registers. */
template <class S, int D, int HEAD>
static __device__ __forceinline__ void mix_rows(const struct mix_call &c,
                                                const struct mix_row (&rows)[S::BLOCK_ROWS],
                                                struct held_rows<S> *h, unsigned char *shared)
{
    float x[S::BLOCK_ROWS];
    const struct lane_logits logits = take_logits<S, D>(c, shared);
    score<S, HEAD>(x, c, rows, *h, shared);
    bulk_wait(at<bulk_barrier>(shared, S::values_fetched));
    renew_values<S, HEAD>(rows, shared);
    const bool begins = rows[S::BLOCK_ROWS - 1].begins;
    const struct lane_gates gates =
        weigh<S>(x, logits, lane_row<S>() == 0 ? rows[0].begins : begins, h, shared);
    take_values<S, HEAD>(x, shared);
    step_latents<S, HEAD>(c, gates, h, shared);
    __syncthreads();
    send_mixed<S, HEAD>(rows, shared);
}

/* The rows' new state. */
template <class S, int HEAD>
static __device__ __forceinline__ void
keep_rows(const struct mix_call &c, const struct mix_row (&rows)[S::BLOCK_ROWS],
          const struct held_rows<S> &h, unsigned char *shared)
{
    const int l = threadIdx.x % HALF, group = threadIdx.x / S::QUADS, M = c.m.n_latents;
    const struct mix_row own = lane_row<S>() == 0 ? rows[0] : rows[S::BLOCK_ROWS - 1];
    if (own.here && l < M && (int)threadIdx.x < S::BLOCK_ROWS * HALF) {
        c.m.m.data[own.slot * c.m.m.row_values + (int64_t)own.head * M + l] = h.m;
        c.m.alpha.data[own.slot * c.m.alpha.row_values + (int64_t)own.head * M + l] = h.alpha;
    }
#pragma unroll
    for (int r = 0; r < S::BLOCK_ROWS; r++) {
        if (!rows[r].here)
            continue;
        float *const s = sums_of<S, HEAD>(c, rows[r]);
#pragma unroll
        for (int j = 0; j < S::LATENTS; j++)
            if (group < S::LATENT_GROUPS && group + j * S::LATENT_GROUPS < M)
                __stcg(reinterpret_cast<float4 *>(s + j * S::LATENT_GROUPS * HEAD), h.s[r][j]);
        const int i = threadIdx.x % WARP * 8;
        const int64_t at = ring_of<HEAD>(c, rows[r]) + rows[r].newest * HEAD + i;
        if (threadIdx.x / WARP < 2 && i < HEAD) {
            const bool key = threadIdx.x < WARP;
            *reinterpret_cast<uint4 *>((key ? c.m.ring_k : c.m.ring_v) + at) =
                *at_row<uint4, S>(shared, r, (key ? S::new_key : S::new_value) + i * 2);
        }
    }
}

/* ---- the kernel ---- */

/* ROWS: that a block mixes; the step has up to ROWS * CLUSTER_BLOCKS. */
template <int D, int HEAD, int WIDTH, int ROWS>
static __global__ void __launch_bounds__(CLUSTER_THREADS, 2)
    cluster_mix_kernel(const __grid_constant__ struct mix_call c)
{
    typedef mix_shape<D, HEAD, WIDTH, ROWS> S;
    static_assert(S::TURNS == 2 && S::TILES % 2 == 0, "two tiles a warp");
    DYNAMIC_SHARED(unsigned char, shared);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    const int head = blockIdx.x / CLUSTER_BLOCKS, rank = cluster_rank();
    const bool has_second = warp + CLUSTER_WARPS < S::TILES; /* tile of channels */
    fetch_weights<S, D, HEAD>(c, head, rank, shared);
    const int n_rows = c.step.sizes->n_rows;
    struct mix_row rows[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        rows[r] = find_row(c, head, rank + r * CLUSTER_BLOCKS);
    begin_exchanges<S, HEAD>(c, rank, n_rows, shared);
    cluster_arrive_relaxed(); /* when all blocks have: their shared memory may be written */
    struct held_channels<S> channels[2];
    hold_channels(&channels[0], c, rank * S::TILES + warp);
    hold_channels(&channels[1], c, rank * S::TILES + (has_second ? CLUSTER_WARPS : 0) + warp);
    struct held_rows<S> held;
    hold_key<S, HEAD>(held.key[0], c, rows[0]);
    begin_values<S, HEAD>(rows, shared);
    copy_values<S, HEAD>(c, rows[0], 0, shared);
    clear_values<S, HEAD>(rows[0], 0, shared);
    if (ROWS == 1)
        hold_sums<S, HEAD>(held.s[0], c, rows[0]);
#pragma unroll
    for (int r = 0; r < ROWS && ROWS > 1; r++) /* later, there is too little room */
        prefetch_row<HEAD>(c, rows[r], r > 0);
    keep_places<S>(rows, shared);
    hold_gates<S>(&held, c, rows);
    put_angles<S>(c, rank, shared);
    struct held_pieces pieces;
    hold_pieces<S>(&pieces, c, n_rows, rank);
    cluster_wait();

    pdl_wait();
    gather_rows<S>(c, pieces, n_rows, shared);

    bulk_wait(at<bulk_barrier>(shared, S::fetched));
    pdl_trigger(); /* not before: the next kernel's weights would come between these */
    /* Without a branch until the product has ended, among whose instructions it takes no time. */
    const float scale = few_scale<D>(at<float>(shared, S::squares), c.m.norm.eps);
    float sum[S::QKV_TILES][4] = {};
    few_product<S::QKV_TILES, S::QKV_K, S::STEP_ROWS>(
        sum, at<bf16>(shared, S::rows) + warp * S::QKV_K, S::ROW,
        at<bf16>(shared, S::qkv) + warp * S::QKV_K, S::ROW, S::QKV - 1);
    __syncwarp(); /* sums may lie over weights */
#pragma unroll
    for (int n = 0; n < S::QKV_TILES; n++) {
        float *const to =
            at<float>(shared, S::sums) + warp * S::sums_warp + g * S::sums_row + 8 * n + 2 * t;
#pragma unroll
        for (int j = 0; j < ROWS; j++)
            *reinterpret_cast<float2 *>(to + j * 8 * S::sums_row) =
                make_float2(sum[n][2 * j], sum[n][2 * j + 1]);
    }
    if (warp == CLUSTER_WARPS - 1 && lane < CLUSTER_ROWS)
        at<float>(shared, S::scales)[lane] = scale;
    if (has_second)
        step_channels<S, WIDTH, 2>(channels, rank, scale, shared);
    else
        step_channels<S, WIDTH, 1>(channels, rank, scale, shared);
    __syncthreads();
    take_places<S>(rows, shared);
    if (ROWS > 1) /* over weights of q, k and v */
        copy_values<S, HEAD>(c, rows[ROWS - 1], ROWS - 1, shared);
    send_logits<S>(c, rank, n_rows, shared);
    send_qkv<S, HEAD>(c, rank, n_rows, shared);
    if (ROWS > 1) {
        clear_values<S, HEAD>(rows[ROWS - 1], ROWS - 1, shared);
        hold_key<S, HEAD>(held.key[ROWS - 1], c, rows[ROWS - 1]);
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            hold_sums<S, HEAD>(held.s[r], c, rows[r]);
    }
    if (head == 0) {
        put_z(c, channels[0], rank * S::TILES + warp, n_rows);
        if (has_second)
            put_z(c, channels[1], rank * S::TILES + warp + CLUSTER_WARPS, n_rows);
    }

    if (rows[0].here) {
        cluster_receive(at<bulk_barrier>(shared, S::row_came));
        mix_rows<S, D, HEAD>(c, rows, &held, shared);
        take_places<S>(rows, shared);
        keep_rows<S, HEAD>(c, rows, held, shared);
    }
    cluster_receive(at<bulk_barrier>(shared, S::mixed_came));

    constexpr int EACH = 2; /* tiles of output: one chain of instructions beside another */
    if (warp >= S::TILES / EACH)
        return;
    float out[EACH][4] = {};
    few_product<EACH, HEAD, S::STEP_ROWS>(out, at<bf16>(shared, S::mixed), S::OUT,
                                          at<bf16>(shared, S::o) + 8 * EACH * warp * S::OUT, S::OUT,
                                          8 * EACH - 1);
    float *const to =
        c.m.partials + head * c.m.partial_stride + rank * S::COLUMNS + 8 * EACH * warp + 2 * t;
#pragma unroll
    for (int n = 0; n < EACH; n++) {
#pragma unroll
        for (int j = 0; j < ROWS; j++)
            if (g + 8 * j < n_rows)
                *reinterpret_cast<float2 *>(to + (int64_t)(g + 8 * j) * D + 8 * n) =
                    make_float2(out[n][2 * j], out[n][2 * j + 1]);
    }
}

/* ---- launching ---- */

bool cluster_has(const struct cluster_shape *s)
{
    return s->dim == 768 && s->n_heads == MIX_CLUSTERS && s->head_dim == 96 && s->mlp == 3072 &&
           s->rglru_blocks == 8;
}

template <int D, int HEAD, int WIDTH, int ROWS> static bool mix_fits(void)
{
    return cluster_fits((const void *)cluster_mix_kernel<D, HEAD, WIDTH, ROWS>, CLUSTER_BLOCKS,
                        CLUSTER_THREADS, (size_t)mix_shape<D, HEAD, WIDTH, ROWS>::bytes);
}

bool cluster_knows(const struct cuda *c, const struct cluster_shape *s)
{
    const int capability = c->queue.capability;
    return (capability == 90 || capability == 100 || capability == 103) && cluster_has(s) &&
           mix_fits<768, 96, 96, 1>() && mix_fits<768, 96, 96, 2>();
}

/* Lane (g, t) of a warp with channels 8 tile on: weights of row g, columns 16 k + 8 i + 2 t, + 1.
 */
template <int WIDTH>
static __global__ void __launch_bounds__(CLUSTER_THREADS)
    prepare_kernel(const __grid_constant__ struct cluster_gates g, uint4 *gates, float4 *constants)
{
    constexpr int STEPS = WIDTH / 16, QUADS = STEPS;
    pdl_trigger();
    pdl_wait();
    const int tile = blockIdx.x, lane = threadIdx.x % WARP, q = threadIdx.x / WARP;
    const int row = 8 * tile + lane / 4;
    if (q < QUADS) {
        uint32_t words[4];
#pragma unroll
        for (int w = 0; w < 4; w++) {
            const int at = 4 * q + w, step = at / 2 % STEPS, half = at % 2;
            const float *from = (at / 2 / STEPS ? g.input_gate : g.recurrence_gate) + row * WIDTH +
                                16 * step + 8 * half + lane % 4 * 2;
            const __nv_bfloat162 pair = __floats2bfloat162_rn(from[0], from[1]);
            memcpy(&words[w], &pair, 4);
        }
        gates[(tile * QUADS + q) * WARP + lane] =
            make_uint4(words[0], words[1], words[2], words[3]);
    }
    if (threadIdx.x < 8) {
        const int channel = 8 * tile + threadIdx.x;
        struct rglru_front f = {};
        f.recurrence_bias = g.recurrence_bias;
        f.input_bias = g.input_bias;
        f.lambda = g.lambda;
        const struct rglru_channel one = rglru_channel_of(f, channel);
        constants[channel] = make_float4(one.rate, one.r_bias, one.i_bias, g.norm_weight[channel]);
    }
}

size_t cluster_prepared_bytes(const struct cluster_shape *s)
{
    const size_t D = (size_t)s->dim;
    return 2 * D * (D / (size_t)s->rglru_blocks) * sizeof(bf16) + D * sizeof(float4);
}

void cluster_prepare(struct cuda *c, const struct cluster_shape *s, const struct cluster_gates *g,
                     void *prepared)
{
    float4 *const constants = (float4 *)prepared;
    CHECK(cluster_knows(c, s));
    launch(&c->queue, "cluster_prepare", prepare_kernel<96>, dim3((unsigned)s->dim / 8),
           CLUSTER_THREADS, 0, *g, (uint4 *)(constants + s->dim), constants);
}

template <int D, int HEAD, int WIDTH, int ROWS>
static void run_mix(struct cuda *c, const struct mix_call *call)
{
    launch_cluster(&c->queue, "cluster_mix", cluster_mix_kernel<D, HEAD, WIDTH, ROWS>,
                   dim3(MIX_CLUSTERS * CLUSTER_BLOCKS), CLUSTER_BLOCKS, CLUSTER_THREADS,
                   (size_t)mix_shape<D, HEAD, WIDTH, ROWS>::bytes, *call);
}

void cluster_mix_launch(struct cuda *c, const struct cluster_shape *shape,
                        const struct cluster_mix *m)
{
    const struct mix_call call = {*m, c->step};
    CHECK(cluster_knows(c, shape) && m->n_latents <= CLUSTER_LATENTS &&
          m->ring_rows <= CLUSTER_RING_ROWS);
    if (c->step.rows <= CLUSTER_BLOCKS)
        run_mix<768, 96, 96, 1>(c, &call);
    else
        run_mix<768, 96, 96, 2>(c, &call);
}
