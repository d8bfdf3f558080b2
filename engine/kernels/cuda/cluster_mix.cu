/* cluster_mix.cu - the mixing of a decode layer of few rows, see cluster.cuh: from the residual
 * stream to each head's share of the output projection.
 *
 * Cluster h serves head h; block b of it has 1/8 of the head's rows of q, k and v, 1/8 of all
 * channels of the RG-LRU, of the latents' logits' columns, of the rows of the output projection,
 * and mixes rows b and b + 8 of the step: their latents and windows.
 *   x gathered, exchanged                                                     1 cluster_sync
 *   v, q, k; gates, RG-LRU; logits over the block's channels: to the rows' blocks  2 cluster_sync
 *   rope, gates, latents P(eq 19), window P(eq 13-14); the head's output, exchanged 3 cluster_sync
 *   output projection over the head's columns, to the head's partial rows
 * Before pdl_wait: weights to shared memory; latents, ring and the RG-LRU's state to registers,
 * those of a second row to L2.
 *
 * Bytes at D = 768: 5 MB of weights, 62 KB a row and head of state: floor 1.7 us at one row,
 * 4.2 us at 16.
 */
#include "engine/kernels/cuda/cluster.cuh"
#include "engine/kernels/cuda/rglru.cuh"

enum {
    LOGIT_TILES = (2 * CLUSTER_LATENTS + 1 + 7) / 8,
    LOGITS = 8 * LOGIT_TILES,
    BLOCK_ROWS = CLUSTER_ROWS / CLUSTER_BLOCKS, /* that a block mixes, one after the other */
};

struct mix_call {
    struct cluster_mix m;
    struct device_step step;
};

template <int D, int HEAD, int WIDTH> struct mix_shape {
    static constexpr int DIM = D;
    static constexpr int COLUMNS = D / CLUSTER_BLOCKS, TILES = COLUMNS / 8; /* the block's of x */
    static constexpr int PIECE = D / ROW_PIECES;
    static constexpr int PART = HEAD / CLUSTER_BLOCKS; /* rows of each of q, k, v, the block's */
    static constexpr int QKV = 3 * PART, QKV_TILES = (QKV + 7) / 8;
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
                      WIDTH % COLUMNS == 0 && QUADS <= WARP * 2,
                  "tiles of products");

    static constexpr int qkv = 0; /* offsets, in bytes */
    static constexpr int latents = qkv + QKV * ROW * 2;
    static constexpr int o = latents + (2 * CLUSTER_LATENTS + 1) * SLICE * 2;
    static constexpr int gates = o + COLUMNS * OUT * 2; /* as cluster_prepare has them */
    static constexpr int gates_bytes = TILES * GATE_QUADS * WARP * 16;
    static constexpr int rows = gates + gates_bytes;
    /* In the place of the rows, when they have been used: */
    static constexpr int sums = rows; /* [warps, 16, 8 QKV_TILES] */
    static constexpr int local = rows, other = local + GROUPS * HEAD * 4; /* of the mixing */
    static constexpr int rows_bytes = CLUSTER_ROWS * ROW * 2;
    static constexpr int sums_bytes = CLUSTER_WARPS * CLUSTER_ROWS * 8 * QKV_TILES * 4;
    static constexpr int mixing_bytes = (GROUPS + LATENT_GROUPS) * HEAD * 4;
    static constexpr int most = sums_bytes > mixing_bytes ? sums_bytes : mixing_bytes;
    static constexpr int z = rows + (rows_bytes > most ? rows_bytes : most);
    static constexpr int mixed = z + CLUSTER_ROWS * SLICE * 2;
    /* What the cluster's blocks send to the block of a row, for each of its rows: logits [blocks,
     * LOGITS], z_squares [blocks], query [3, HEAD] f32: q, k, v. */
    static constexpr int row = mixed + CLUSTER_ROWS * OUT * 2;
    static constexpr int logits = 0, z_squares = logits + CLUSTER_BLOCKS * LOGITS * 4;
    static constexpr int query = z_squares + CLUSTER_BLOCKS * 4;
    static constexpr int row_bytes = query + 3 * HEAD * 4;
    static constexpr int squares = row + BLOCK_ROWS * row_bytes;
    static constexpr int new_key = squares + SQUARES * 4; /* [HEAD] bf16 */
    static constexpr int new_value = new_key + HEAD * 2;
    static constexpr int scales = new_value + HEAD * 2;              /* [16] */
    static constexpr int z_parts = scales + CLUSTER_ROWS * 4;        /* [tiles, 16] */
    static constexpr int stats = z_parts + TILES * CLUSTER_ROWS * 4; /* [2, warps]: tops, totals */
    static constexpr int keep = stats + 2 * CLUSTER_WARPS * 4;   /* keep, take, share [16] each */
    static constexpr int share = keep + 3 * CLUSTER_LATENTS * 4; /* p(0|t) */
    static constexpr int fetched = share + 8;
    static constexpr int angles_bytes = HEAD / 2 * 8; /* [HEAD / 2] sine, cosine, of each row */
    static constexpr int angles = fetched + (int)sizeof(bulk_barrier);
    static constexpr int bytes = angles + BLOCK_ROWS * angles_bytes;
};

/* What a block mixes. */
struct mix_row {
    int row, head, n_keys, newest; /* as struct mix_block of mix.cuh */
    int64_t slot, position;
    bool here, begins;
};

template <class T> static __device__ __forceinline__ T *at(unsigned char *shared, int offset)
{
    return reinterpret_cast<T *>(shared + offset);
}

/* Of what a block has for each of its rows, row's. */
template <class T, class S>
static __device__ __forceinline__ T *at_row(unsigned char *shared, int row, int offset)
{
    return at<T>(shared, S::row + row / CLUSTER_BLOCKS * S::row_bytes + offset);
}

static __device__ __forceinline__ float exp_below(float a, float b)
{
    return a == b ? 1 : expf(a - b);
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
    const int64_t row = head * HEAD + rank * S::PART, M = m.n_latents;
    bf16 *const qkv = at<bf16>(shared, S::qkv), *const latents = at<bf16>(shared, S::latents);
    const bf16 *const from[3] = {m.q, m.k, m.v};
    bulk_barrier *const fetched = at<bulk_barrier>(shared, S::fetched);
    if (threadIdx.x / WARP == CLUSTER_WARPS - 1) {
        if (threadIdx.x % WARP == 0)
            bulk_begin(fetched, S::QKV * D * (int)sizeof(bf16) + S::gates_bytes);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 3; i++)
            few_fetch<D>(qkv + i * S::PART * S::ROW, S::ROW, from[i] + row * D, D, S::PART,
                         fetched);
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

static __device__ __forceinline__ struct mix_row find_row(const struct mix_call &c, int head,
                                                          int row)
{
    /* Three loads that do not wait for each other: any row of the bucket may be read. */
    const int any = row < c.step.rows ? row : c.step.rows - 1, w = c.m.ring_rows;
    struct mix_row r = {row, head, 0, 0, c.step.seq_slot[any], c.step.positions[any], false, false};
    r.here = row < c.step.sizes->n_rows;
    r.begins = r.position == 0;
    r.n_keys = !r.here ? 0 : r.position < w ? (int)r.position + 1 : w;
    r.newest = (w & (w - 1)) == 0 ? (int)(r.position & (w - 1))
                                  : (int)((uint64_t)r.position % (uint32_t)w);
    return r;
}

/* The row's part of the ring and of the latents. A thread has half of a key, its every other 8
 * values, and 4 values of every LATENT_GROUPS-th latent. */
template <class S> struct held_row {
    uint4 key[S::CHUNKS];
    float4 s[S::LATENTS];
    float m, alpha; /* of latent `lane`, in the last warp */
};

template <class S, int HEAD>
static __device__ __forceinline__ void hold_row(struct held_row<S> *h, const struct mix_call &c,
                                                const struct mix_row &r)
{
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, M = c.m.n_latents;
    const int64_t ring = r.slot * c.m.ring_values + (int64_t)r.head * c.m.ring_rows * HEAD;
    const int key = threadIdx.x / 2, part = threadIdx.x % 2;
#pragma unroll
    for (int j = 0; j < S::CHUNKS; j++) {
        h->key[j] = make_uint4(0, 0, 0, 0);
        if (key < r.n_keys && key != r.newest)
            h->key[j] = load_streaming(c.m.ring_k + ring + key * HEAD + (2 * j + part) * 8);
    }
    /* values: later, there are too few registers */
    if ((int)threadIdx.x * 64 < r.n_keys * HEAD)
        prefetch_l2(c.m.ring_v + ring + threadIdx.x * 64);
    const int64_t latent = (int64_t)r.head * M;
#pragma unroll
    for (int j = 0; j < S::LATENTS; j++) {
        const int l = threadIdx.x / S::QUADS + j * S::LATENT_GROUPS;
        h->s[j] = make_float4(0, 0, 0, 0);
        if (r.here && !r.begins && l < M && (int)threadIdx.x < S::LATENT_GROUPS * S::QUADS)
            h->s[j] =
                *reinterpret_cast<const float4 *>(c.m.s.data + r.slot * c.m.s.row_values +
                                                  (latent + l) * HEAD + threadIdx.x % S::QUADS * 4);
    }
    h->m = h->alpha = 0;
    if (r.here && !r.begins && warp == CLUSTER_WARPS - 1 && lane < M) {
        h->m = c.m.m.data[r.slot * c.m.m.row_values + latent + lane];
        h->alpha = c.m.alpha.data[r.slot * c.m.alpha.row_values + latent + lane];
    }
}

/* The same to L2 alone. */
template <class S, int HEAD>
static __device__ __forceinline__ void prefetch_row(const struct mix_call &c,
                                                    const struct mix_row &r)
{
    const int64_t ring = r.slot * c.m.ring_values + (int64_t)r.head * c.m.ring_rows * HEAD;
    const int M = c.m.n_latents, at_bf16 = threadIdx.x * 64, at_f32 = threadIdx.x * 32;
    if (at_bf16 < r.n_keys * HEAD) {
        prefetch_l2(c.m.ring_k + ring + at_bf16);
        prefetch_l2(c.m.ring_v + ring + at_bf16);
    }
    if (r.here && at_f32 < M * HEAD)
        prefetch_l2(c.m.s.data + r.slot * c.m.s.row_values + (int64_t)r.head * M * HEAD + at_f32);
}

template <class S>
static __device__ __forceinline__ float2 *angles_of(unsigned char *shared, int row)
{
    return at<float2>(shared, S::angles + row / CLUSTER_BLOCKS * S::angles_bytes);
}

/* One warp: sines and cosines of the row's position, for q and k. */
template <class S, int HEAD>
static __device__ __forceinline__ void put_angles(const struct mix_call &c, const struct mix_row &r,
                                                  unsigned char *shared)
{
    float2 *const angles = angles_of<S>(shared, r.row);
    for (int i = threadIdx.x % WARP; i < HEAD / 2 && r.here; i += WARP)
        angle(r.position, c.m.frequencies[i], &angles[i].x, &angles[i].y);
}

/* The ring's values: a warp has those of its keys, a lane 8 dimensions of every n-th. */
template <class S> struct held_values {
    uint4 value[S::VALUES];
};

/* The key of a lane's j-th value. */
template <class S> static __device__ __forceinline__ int value_key(int j)
{
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    return warp * (WARP / 2) + lane / S::EIGHTS + j * S::VALUE_GROUPS;
}

template <class S, int HEAD>
static __device__ __forceinline__ void
hold_values(struct held_values<S> *h, const struct mix_call &c, const struct mix_row &r)
{
    const int lane = threadIdx.x % WARP;
    const bf16 *const ring = c.m.ring_v + r.slot * c.m.ring_values +
                             (int64_t)r.head * c.m.ring_rows * HEAD + lane % S::EIGHTS * 8;
#pragma unroll
    for (int j = 0; j < S::VALUES; j++) {
        const int key = value_key<S>(j);
        h->value[j] = make_uint4(0, 0, 0, 0);
        if (key < r.n_keys && key != r.newest && lane < S::VALUE_GROUPS * S::EIGHTS)
            h->value[j] = load_streaming(ring + key * HEAD);
    }
}

/* The RG-LRU's part of a lane: rows g and g + 8, two channels of a tile. */
struct held_channels {
    struct rglru_channel constants[2];
    float2 past[2], weight;
    bool begins[2];
};

static __device__ __forceinline__ void hold_channels(struct held_channels *h,
                                                     const struct mix_call &c, int tile)
{
    const struct cluster_mix &m = c.m;
    const int lane = threadIdx.x % WARP, channel = 8 * tile + lane % 4 * 2;
    const float4 *const constants = (const float4 *)m.prepared;
    int64_t slot[2];
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const int row = lane / 4 + 8 * j, any = row < c.step.rows ? row : c.step.rows - 1;
        h->begins[j] = c.step.positions[any] == 0;
        slot[j] = c.step.seq_slot[any];
        const float4 one = __ldg(constants + channel + j);
        h->constants[j] = {one.x, one.y, one.z};
        (j ? h->weight.y : h->weight.x) = one.w;
    }
#pragma unroll
    for (int j = 0; j < 2; j++) { /* what a fresh slot or a row beyond the step's holds is unused */
        h->past[j] = *reinterpret_cast<const float2 *>(m.rglru.data + slot[j] * m.rglru.row_values +
                                                       channel);
        if (h->begins[j])
            h->past[j] = make_float2(0, 0);
    }
}

/* ---- the rows ---- */

/* After pdl_wait: x times the norm's weight as bf16 [16, ROW], with squares [ROW_PIECES, 16 rows];
 * complete when it returns. All threads of the cluster call it. Of many rows each block of the
 * cluster reads its columns and sends them to the others; of up to ALONE rows it is quicker to
 * read all of them. */
template <class S>
static __device__ __forceinline__ void gather_rows(const struct mix_call &c, int n_rows,
                                                   unsigned char *shared)
{
    constexpr int ALONE = 2, QUADS_HERE = S::PIECE / 4, PIECES = ROW_PIECES / CLUSTER_BLOCKS;
    static_assert(PIECES == 2 && ALONE == 2, "two quads a thread either way");
    const int group = threadIdx.x / 16, quad = threadIdx.x % 16, rank = cluster_rank();
    const bool alone = n_rows <= ALONE, mine = quad < QUADS_HERE;
    float *const squares = at<float>(shared, S::squares);
    bf16 *const rows = at<bf16>(shared, S::rows);
    int row[2], piece[2];
    float4 x[2], weight[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        row[i] = alone ? i : group;
        piece[i] = alone ? group : rank * PIECES + i;
        x[i] = weight[i] = make_float4(0, 0, 0, 0);
        const int column = piece[i] * S::PIECE + quad * 4;
        if (mine)
            weight[i] = __ldg(reinterpret_cast<const float4 *>(c.m.norm.weight + column));
        if (mine && row[i] < n_rows)
            x[i] = few_load(c.m.x + (int64_t)row[i] * S::DIM + column);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float square = few_square(x[i]);
        float *const square_at = squares + piece[i] * CLUSTER_ROWS + row[i];
        uint2 *const to =
            reinterpret_cast<uint2 *>(rows + row[i] * S::ROW + piece[i] * S::PIECE + quad * 4);
        const uint2 y = few_weighed(x[i], weight[i]);
        if (alone) {
            if (quad == 0)
                *square_at = square;
            if (mine)
                *to = y;
            continue;
        }
        if (row[i] >= n_rows)
            continue;
        if (quad < CLUSTER_BLOCKS)
            *cluster_peer(square_at, quad) = square;
#pragma unroll
        for (int peer = 0; peer < CLUSTER_BLOCKS; peer++)
            if (mine)
                *cluster_peer(to, peer) = y;
    }
    copy_async_wait<0>(); /* this thread's weights */
    if (alone)
        __syncthreads();
    else
        cluster_sync();
}

/* ---- products of the block, and the RG-LRU ---- */

/* One warp: z of the 8 channels of a tile; squares of z, a row each, over them. */
template <class S, int D, int WIDTH>
static __device__ __forceinline__ void
step_channels(const struct mix_call &c, const struct held_channels &held, int tile, int rank,
              bool writes, float scale, unsigned char *shared)
{
    const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const bf16 *const rows = at<bf16>(shared, S::rows);
    const uint4 *const gates = at<uint4>(shared, S::gates) + tile * S::GATE_QUADS * WARP + lane;
    const int own = 8 * tile + 2 * t, channel = rank * S::COLUMNS + own;
    const bf16 *const block = rows + rank * S::COLUMNS / WIDTH * WIDTH;
    const bf16 *const from = block + (lane % 8 + lane / 8 % 2 * 8) * S::ROW + lane / 16 * 8;
    float r[4] = {}, i[4] = {};
#pragma unroll
    for (int k = 0; k < S::GATE_STEPS; k += 2) { /* a quad has two steps of a gate */
        const uint4 recurrence = gates[k / 2 * WARP];
        const uint4 input = gates[(S::GATE_STEPS + k) / 2 * WARP];
        const uint32_t recurrence_at[2][2] = {{recurrence.x, recurrence.y},
                                              {recurrence.z, recurrence.w}};
        const uint32_t input_at[2][2] = {{input.x, input.y}, {input.z, input.w}};
#pragma unroll
        for (int j = 0; j < 2; j++) {
            uint32_t a[4];
            ldmatrix_x4(a, from + 16 * (k + j));
            mma_bf16(r, a, recurrence_at[j]);
            mma_bf16(i, a, input_at[j]);
        }
    }
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const int row = g + 8 * j;
        const float factor = __shfl_sync(0xffffffffu, scale, row);
        const float2 h = __bfloat1622float2(
            *reinterpret_cast<const __nv_bfloat162 *>(rows + row * S::ROW + channel));
        const float2 low = rglru_terms(r[2 * j] * factor, i[2 * j] * factor, h.x * factor,
                                       held.constants[0], held.begins[j]);
        const float2 high = rglru_terms(r[2 * j + 1] * factor, i[2 * j + 1] * factor, h.y * factor,
                                        held.constants[1], held.begins[j]);
        const float2 z =
            make_float2(fmaf(low.x, held.past[j].x, low.y), fmaf(high.x, held.past[j].y, high.y));
        float square = fmaf(z.x, z.x, z.y * z.y);
        square += __shfl_xor_sync(0xffffffffu, square, 1);
        square += __shfl_xor_sync(0xffffffffu, square, 2);
        if (t == 0)
            at<float>(shared, S::z_parts)[tile * CLUSTER_ROWS + row] = square;
        *reinterpret_cast<__nv_bfloat162 *>(at<bf16>(shared, S::z) + row * S::SLICE + own) =
            __floats2bfloat162_rn(z.x * held.weight.x, z.y * held.weight.y);
        if (writes && row < c.step.sizes->n_rows)
            *reinterpret_cast<float2 *>(c.m.z + (int64_t)row * D + channel) = z;
    }
}

/* q, k, v of the block's rows of the head, to the blocks of the step's rows. */
template <class S, int HEAD>
static __device__ __forceinline__ void send_qkv(int rank, int n_rows, unsigned char *shared)
{
    const float *const sums = at<float>(shared, S::sums);
    const float *const scales = at<float>(shared, S::scales);
    for (int i = threadIdx.x; i < n_rows * S::QKV; i += CLUSTER_THREADS) {
        const int row = i / S::QKV, j = i % S::QKV;
        float y = 0;
#pragma unroll
        for (int w = 0; w < CLUSTER_WARPS; w++)
            y += sums[(w * CLUSTER_ROWS + row) * 8 * S::QKV_TILES + j];
        float *to = at_row<float, S>(shared, row, S::query) + j / S::PART * HEAD + rank * S::PART +
                    j % S::PART;
        *cluster_peer(to, row % CLUSTER_BLOCKS) = y * scales[row];
    }
}

/* The latents' logits over the block's channels, a tile of 8 a warp; squares of z. */
template <class S>
static __device__ __forceinline__ void send_logits(const struct mix_call &c, int rank, int n_rows,
                                                   unsigned char *shared)
{
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    const int n = 2 * c.m.n_latents + 1;
    if (warp == CLUSTER_WARPS - 1 && lane < n_rows) {
        float square = 0;
#pragma unroll
        for (int i = 0; i < S::TILES; i++)
            square += at<float>(shared, S::z_parts)[i * CLUSTER_ROWS + lane];
        *cluster_peer(at_row<float, S>(shared, lane, S::z_squares) + rank, lane % CLUSTER_BLOCKS) =
            square;
    }
    if (8 * warp >= n)
        return;
    float sum[1][4] = {};
    few_product<1, S::COLUMNS>(sum, at<bf16>(shared, S::z), S::SLICE,
                               at<bf16>(shared, S::latents) + 8 * warp * S::SLICE, S::SLICE,
                               n - 8 * warp - 1);
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const int row = g + 8 * j;
        float *const to =
            at_row<float, S>(shared, row, S::logits) + rank * LOGITS + 8 * warp + 2 * t;
        if (row < n_rows)
            *reinterpret_cast<float2 *>(cluster_peer(to, row % CLUSTER_BLOCKS)) =
                make_float2(sum[0][2 * j], sum[0][2 * j + 1]);
    }
}

/* ---- one row of the head ---- */

/* Warp 0 turns the query, warp 1 the key. */
template <class S, int HEAD>
static __device__ __forceinline__ void turn(const struct mix_call &c, const struct mix_row &r,
                                            int which, unsigned char *shared)
{
    float *const x = at_row<float, S>(shared, r.row, S::query) + which * HEAD;
    const float2 *const angles = angles_of<S>(shared, r.row);
    bf16 *const key = at<bf16>(shared, S::new_key);
    bf16 *const ring =
        c.m.ring_k + r.slot * c.m.ring_values + ((int64_t)r.head * c.m.ring_rows + r.newest) * HEAD;
    for (int i = threadIdx.x % WARP; i < HEAD / 2; i += WARP) {
        const float2 a = angles[i];
        const float x0 = x[i], x1 = x[i + HEAD / 2];
        const float low = fmaf(x0, a.y, -x1 * a.x), high = fmaf(x0, a.x, x1 * a.y);
        if (which == 0) {
            x[i] = low * c.m.scale;
            x[i + HEAD / 2] = high * c.m.scale;
        } else {
            ring[i] = key[i] = from_float<bf16>(low);
            ring[i + HEAD / 2] = key[i + HEAD / 2] = from_float<bf16>(high);
        }
    }
}

template <class S, int HEAD>
static __device__ __forceinline__ void put_value(const struct mix_call &c, const struct mix_row &r,
                                                 unsigned char *shared)
{
    const float *const v = at_row<float, S>(shared, r.row, S::query) + 2 * HEAD;
    bf16 *const kept = at<bf16>(shared, S::new_value);
    bf16 *const ring =
        c.m.ring_v + r.slot * c.m.ring_values + ((int64_t)r.head * c.m.ring_rows + r.newest) * HEAD;
    for (int i = threadIdx.x % WARP; i < HEAD; i += WARP)
        ring[i] = kept[i] = from_float<bf16>(v[i]);
}

/* The last warp: softmax of g, and what the row's theta does to the latents' maxima and sums. */
template <class S, int D>
static __device__ __forceinline__ void put_gates(const struct mix_call &c, const struct mix_row &r,
                                                 const struct held_row<S> &h, unsigned char *shared)
{
    const int lane = threadIdx.x % WARP, M = c.m.n_latents;
    const float *const logits = at_row<float, S>(shared, r.row, S::logits);
    const float *const z_squares = at_row<float, S>(shared, r.row, S::z_squares);
    float square = lane < CLUSTER_BLOCKS ? z_squares[lane] : 0;
    float window = lane < CLUSTER_BLOCKS ? logits[lane * LOGITS] : 0, g = 0, theta = 0;
#pragma unroll
    for (int b = 0; b < CLUSTER_BLOCKS / 2; b++) { /* half of the blocks a half of the warp */
        const float *const from = logits + (lane / 16 * (CLUSTER_BLOCKS / 2) + b) * LOGITS;
        if (lane % 16 < M)
            g += from[1 + lane % 16], theta += from[1 + M + lane % 16];
    }
    g += __shfl_xor_sync(0xffffffffu, g, 16);
    theta += __shfl_xor_sync(0xffffffffu, theta, 16);
    window = warp_sum(window);
    const float scale = norm_scale(warp_sum(square), D, c.m.z_eps);
    window *= scale, theta *= scale;
    g = lane < M ? g * scale : -INFINITY;
    const float top = fmaxf(warp_max(g), window);
    const float p = lane < M ? exp_below(g, top) : 0, p0 = exp_below(window, top);
    const float total = 1 / (warp_sum(p) + p0);
    float *const keep = at<float>(shared, S::keep);
    if (lane == 0)
        *at<float>(shared, S::share) = p0 * total;
    if (lane >= M)
        return;
    const float now = r.begins ? theta : fmaxf(h.m, theta);
    const float kept = r.begins ? 0 : exp_below(h.m, now), take = exp_below(theta, now);
    const float sum = r.begins ? take : fmaf(h.alpha, kept, take);
    c.m.m.data[r.slot * c.m.m.row_values + (int64_t)r.head * M + lane] = now;
    c.m.alpha.data[r.slot * c.m.alpha.row_values + (int64_t)r.head * M + lane] = sum;
    keep[lane] = kept;
    keep[CLUSTER_LATENTS + lane] = take;
    keep[2 * CLUSTER_LATENTS + lane] = p * total / sum;
}

template <class S, int HEAD>
static __device__ __forceinline__ float score(const struct mix_call &c, const struct mix_row &r,
                                              const struct held_row<S> &h, unsigned char *shared)
{
    const float *const query = at_row<float, S>(shared, r.row, S::query);
    const int key = threadIdx.x / 2, part = threadIdx.x % 2;
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int j = 0; j < S::CHUNKS; j++) {
        const int i = (2 * j + part) * 8;
        const float4 low = *reinterpret_cast<const float4 *>(query + i);
        const float4 high = *reinterpret_cast<const float4 *>(query + i + 4);
        float k[8];
        eight(k, key == r.newest
                     ? *reinterpret_cast<const uint4 *>(at<bf16>(shared, S::new_key) + i)
                     : h.key[j]);
        sum.x = fmaf(high.x, k[4], fmaf(low.x, k[0], sum.x));
        sum.y = fmaf(high.y, k[5], fmaf(low.y, k[1], sum.y));
        sum.z = fmaf(high.z, k[6], fmaf(low.z, k[2], sum.z));
        sum.w = fmaf(high.w, k[7], fmaf(low.w, k[3], sum.w));
    }
    float x = (sum.x + sum.y) + (sum.z + sum.w);
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    if (c.m.softcap > 0)
        x = c.m.softcap * tanhf(x / c.m.softcap);
    return key < r.n_keys ? x : -INFINITY;
}

/* A warp's keys: its maximum, weights below it and their total, and local [GROUPS, HEAD], the
 * weighted values. x: the lane's score. */
template <class S, int HEAD>
static __device__ __forceinline__ void
take_values(float x, const struct mix_row &r, const struct held_values<S> &h, unsigned char *shared)
{
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int group = lane / S::EIGHTS, first = lane % S::EIGHTS * 8;
    const bf16 *const newest = at<bf16>(shared, S::new_value) + first;
    const float top = warp_max(x);
    const float weight = x == -INFINITY ? 0 : exp_below(x, top);
    const float total = warp_sum(lane % 2 ? 0 : weight);
    if (lane == 0) {
        at<float>(shared, S::stats)[warp] = top;
        at<float>(shared, S::stats)[CLUSTER_WARPS + warp] = total;
    }
    float sum[8] = {};
#pragma unroll
    for (int j = 0; j < S::VALUES; j++) {
        const int key = value_key<S>(j);
        const float share = __shfl_sync(0xffffffffu, weight, 2 * key % WARP);
        float v[8];
        eight(v, h.value[j]);
        if (key == r.newest && group < S::VALUE_GROUPS)
            eight(v, *reinterpret_cast<const uint4 *>(newest));
#pragma unroll
        for (int i = 0; i < 8; i++)
            sum[i] = fmaf(share, v[i], sum[i]);
    }
    if (group >= S::VALUE_GROUPS)
        return;
    float4 *const to =
        at<float4>(shared, S::local + ((warp * S::VALUE_GROUPS + group) * HEAD + first) * 4);
    to[0] = make_float4(sum[0], sum[1], sum[2], sum[3]);
    to[1] = make_float4(sum[4], sum[5], sum[6], sum[7]);
}

/* s = s keep + take v, P(eq 19); other [LATENT_GROUPS, HEAD]: shares of s / alpha. */
template <class S, int HEAD>
static __device__ __forceinline__ void
step_latents(const struct mix_call &c, const struct mix_row &r, const struct held_row<S> &h,
             unsigned char *shared)
{
    const int group = threadIdx.x / S::QUADS, first = threadIdx.x % S::QUADS * 4;
    const float *const keep = at<float>(shared, S::keep);
    if (group >= S::LATENT_GROUPS)
        return;
    const float4 v = *reinterpret_cast<const float4 *>(at_row<float, S>(shared, r.row, S::query) +
                                                       2 * HEAD + first);
    float *const s =
        c.m.s.data + r.slot * c.m.s.row_values + (int64_t)r.head * c.m.n_latents * HEAD + first;
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int j = 0; j < S::LATENTS; j++) {
        const int l = group + j * S::LATENT_GROUPS;
        if (l >= c.m.n_latents)
            continue;
        const float k = keep[l], t = keep[CLUSTER_LATENTS + l], p = keep[2 * CLUSTER_LATENTS + l];
        const float4 old = h.s[j];
        const float4 now = make_float4(fmaf(old.x, k, t * v.x), fmaf(old.y, k, t * v.y),
                                       fmaf(old.z, k, t * v.z), fmaf(old.w, k, t * v.w));
        __stcg(reinterpret_cast<float4 *>(s + l * HEAD), now);
        sum = make_float4(fmaf(p, now.x, sum.x), fmaf(p, now.y, sum.y), fmaf(p, now.z, sum.z),
                          fmaf(p, now.w, sum.w));
    }
    *at<float4>(shared, S::other + (group * HEAD + first) * 4) = sum;
}

/* The head's output of the row, to every block: 4 lanes have 2 dimensions, a quarter of the sums
 * and of the blocks each. */
template <class S, int HEAD>
static __device__ __forceinline__ void send_mixed(int row, unsigned char *shared)
{
    const int pair = threadIdx.x / 4, part = threadIdx.x % 4;
    const float *const stats = at<float>(shared, S::stats);
    float factor[CLUSTER_WARPS], top = -INFINITY, total = 0;
#pragma unroll
    for (int w = 0; w < CLUSTER_WARPS; w++)
        top = fmaxf(top, stats[w]);
#pragma unroll
    for (int w = 0; w < CLUSTER_WARPS; w++) {
        factor[w] = expf(stats[w] - top);
        total = fmaf(factor[w], stats[CLUSTER_WARPS + w], total);
    }
    const float share = *at<float>(shared, S::share) / total;
    float2 y = make_float2(0, 0);
    if (pair < HEAD / 2) {
#pragma unroll
        for (int w = 0; w < CLUSTER_WARPS; w++) {
#pragma unroll
            for (int i = 0; i < S::VALUE_GROUPS; i++) {
                const int g = w * S::VALUE_GROUPS + i;
                if (g % 4 != part)
                    continue;
                const float2 x = *at<float2>(shared, S::local + (g * HEAD + 2 * pair) * 4);
                y.x = fmaf(factor[w], x.x, y.x), y.y = fmaf(factor[w], x.y, y.y);
            }
        }
        y.x *= share, y.y *= share;
#pragma unroll
        for (int i = 0; i < (S::LATENT_GROUPS + 3) / 4; i++) {
            const int g = 4 * i + part;
            if (g >= S::LATENT_GROUPS)
                break;
            const float2 x = *at<float2>(shared, S::other + (g * HEAD + 2 * pair) * 4);
            y.x += x.x, y.y += x.y;
        }
    }
#pragma unroll
    for (int o = 1; o < 4; o *= 2) {
        y.x += __shfl_xor_sync(0xffffffffu, y.x, o);
        y.y += __shfl_xor_sync(0xffffffffu, y.y, o);
    }
    if (pair >= HEAD / 2)
        return;
    __nv_bfloat162 *to =
        reinterpret_cast<__nv_bfloat162 *>(at<bf16>(shared, S::mixed) + row * S::OUT + 2 * pair);
#pragma unroll
    for (int i = 0; i < CLUSTER_BLOCKS / 4; i++)
        *cluster_peer(to, part + 4 * i) = __floats2bfloat162_rn(y.x, y.y);
}

/* r's row, which is held; then, where it is next's turn, that row's state takes its place. */
template <class S, int D, int HEAD>
static __device__ __forceinline__ void
mix_row_of_block(const struct mix_call &c, const struct mix_row &r, struct held_row<S> *h,
                 struct held_values<S> *values, const struct mix_row &next, unsigned char *shared)
{
    const int warp = threadIdx.x / WARP;
    if (warp < 2)
        turn<S, HEAD>(c, r, warp, shared);
    else if (warp == 2)
        put_value<S, HEAD>(c, r, shared);
    else if (warp == CLUSTER_WARPS - 1)
        put_gates<S, D>(c, r, *h, shared);
    __syncthreads();
    take_values<S, HEAD>(score<S, HEAD>(c, r, *h, shared), r, *values, shared);
    step_latents<S, HEAD>(c, r, *h, shared);
    if (next.here) {
        hold_row<S, HEAD>(h, c, next);
        hold_values<S, HEAD>(values, c, next);
    }
    __syncthreads();
    send_mixed<S, HEAD>(r.row, shared);
}

/* ---- the kernel ---- */

template <int D, int HEAD, int WIDTH>
static __global__ void __launch_bounds__(CLUSTER_THREADS, 2)
    cluster_mix_kernel(const __grid_constant__ struct mix_call c)
{
    typedef mix_shape<D, HEAD, WIDTH> S;
    static_assert(BLOCK_ROWS == 2 && S::TURNS == 2, "two rows a block, two tiles a warp");
    DYNAMIC_SHARED(unsigned char, shared);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    const int head = blockIdx.x / CLUSTER_BLOCKS, rank = cluster_rank();
    const bool has_second = warp + CLUSTER_WARPS < S::TILES; /* tile of channels */
    cluster_arrive_relaxed(); /* when all blocks have: their shared memory may be written */

    fetch_weights<S, D, HEAD>(c, head, rank, shared);
    const struct mix_row first = find_row(c, head, rank);
    const struct mix_row second = find_row(c, head, rank + CLUSTER_BLOCKS);
    struct held_channels channels, more_channels;
    hold_channels(&channels, c, rank * S::TILES + warp);
    hold_channels(&more_channels, c, rank * S::TILES + (has_second ? CLUSTER_WARPS : 0) + warp);
    struct held_row<S> held;
    hold_row<S, HEAD>(&held, c, first);
    prefetch_row<S, HEAD>(c, second);
    const int n_rows = c.step.sizes->n_rows;
    if (warp == CLUSTER_WARPS - 2)
        put_angles<S, HEAD>(c, first, shared);
    if (warp == CLUSTER_WARPS - 3)
        put_angles<S, HEAD>(c, second, shared);
    cluster_wait();

    pdl_wait();
    gather_rows<S>(c, n_rows, shared);

    const float scale = few_scale<D>(at<float>(shared, S::squares), c.m.norm.eps);
    bulk_wait(at<bulk_barrier>(shared, S::fetched));
    pdl_trigger(); /* not before: the next kernel's weights would come between these */
    if (warp == CLUSTER_WARPS - 1 && lane < CLUSTER_ROWS)
        at<float>(shared, S::scales)[lane] = scale;
    float sum[S::QKV_TILES][4] = {};
    few_product<S::QKV_TILES, S::QKV_K>(sum, at<bf16>(shared, S::rows) + warp * S::QKV_K, S::ROW,
                                        at<bf16>(shared, S::qkv) + warp * S::QKV_K, S::ROW,
                                        S::QKV - 1);
    step_channels<S, D, WIDTH>(c, channels, warp, rank, head == 0, scale, shared);
    if (has_second)
        step_channels<S, D, WIDTH>(c, more_channels, warp + CLUSTER_WARPS, rank, head == 0, scale,
                                   shared);
    __syncthreads(); /* the sums lie over the rows */
    float *const sums = at<float>(shared, S::sums) + warp * CLUSTER_ROWS * 8 * S::QKV_TILES;
#pragma unroll
    for (int n = 0; n < S::QKV_TILES; n++) {
        float *to = sums + g * 8 * S::QKV_TILES + 8 * n + 2 * t;
        *reinterpret_cast<float2 *>(to) = make_float2(sum[n][0], sum[n][1]);
        *reinterpret_cast<float2 *>(to + 8 * 8 * S::QKV_TILES) = make_float2(sum[n][2], sum[n][3]);
    }
    struct held_values<S> values;
    hold_values<S, HEAD>(&values, c, first);
    __syncthreads();
    send_logits<S>(c, rank, n_rows, shared);
    send_qkv<S, HEAD>(rank, n_rows, shared);
    cluster_sync();

    struct mix_row none = first;
    none.here = false;
    if (first.here)
        mix_row_of_block<S, D, HEAD>(c, first, &held, &values, second, shared);
    if (second.here) {
        __syncthreads(); /* the first row's share has been read */
        mix_row_of_block<S, D, HEAD>(c, second, &held, &values, none, shared);
    }
    cluster_sync();

    for (int tile = warp; tile < S::TILES; tile += CLUSTER_WARPS) {
        float out[1][4] = {};
        few_product<1, HEAD>(out, at<bf16>(shared, S::mixed), S::OUT,
                             at<bf16>(shared, S::o) + 8 * tile * S::OUT, S::OUT, 7);
        float *const to =
            c.m.partials + head * c.m.partial_stride + rank * S::COLUMNS + 8 * tile + 2 * t;
#pragma unroll
        for (int j = 0; j < 2; j++)
            if (g + 8 * j < n_rows)
                *reinterpret_cast<float2 *>(to + (int64_t)(g + 8 * j) * D) =
                    make_float2(out[0][2 * j], out[0][2 * j + 1]);
    }
}

/* ---- launching ---- */

bool cluster_has(const struct cluster_shape *s)
{
    return s->dim == 768 && s->n_heads == MIX_CLUSTERS && s->head_dim == 96 && s->mlp == 3072 &&
           s->rglru_blocks == 8;
}

bool cluster_knows(const struct cuda *c, const struct cluster_shape *s)
{
    const int capability = c->queue.capability;
    return (capability == 90 || capability == 100 || capability == 103) && cluster_has(s) &&
           cluster_fits((const void *)cluster_mix_kernel<768, 96, 96>, CLUSTER_BLOCKS,
                        CLUSTER_THREADS, (size_t)mix_shape<768, 96, 96>::bytes);
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

template <int D, int HEAD, int WIDTH>
static void run_mix(struct cuda *c, const struct mix_call *call)
{
    launch_cluster(&c->queue, "cluster_mix", cluster_mix_kernel<D, HEAD, WIDTH>,
                   dim3(MIX_CLUSTERS * CLUSTER_BLOCKS), CLUSTER_BLOCKS, CLUSTER_THREADS,
                   (size_t)mix_shape<D, HEAD, WIDTH>::bytes, *call);
}

void cluster_mix_launch(struct cuda *c, const struct cluster_shape *shape,
                        const struct cluster_mix *m)
{
    const struct mix_call call = {*m, c->step};
    CHECK(cluster_knows(c, shape) && m->n_latents <= CLUSTER_LATENTS &&
          m->ring_rows <= CLUSTER_RING_ROWS);
    run_mix<768, 96, 96>(c, &call);
}
