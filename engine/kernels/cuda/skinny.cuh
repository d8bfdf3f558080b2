/* skinny.cuh - y = W x for a few rows, as a piece of a kernel: skinny.cu launches it alone, other
 * kernels give it some of their blocks.
 *
 * The weights are cut into tiles of 8 TILES rows. A block of SKINNY_THREADS threads computes the
 * tiles block, block + n_blocks, ... for one group of 8 HALVES activation rows. n_in is cut into
 * items of 64 bytes of a weight row, and each of the 8 warps owns an eighth of the items, in
 * order; partial sums meet in shared memory and are added in the order of the warps. Lane (g, t)
 * of a warp copies exactly the 16 bytes that it later feeds to the tensor cores, weight row g,
 * bytes 16 t on of the item, so that no barrier is needed before the sums meet: the k index of
 * an mma is a permutation of the columns, the same for both factors.
 *
 * Order of sums: a function of n_in, of W and of TILES <= 2 (two chains of sums or one), never
 * of the number of rows. skinny_tiles gives TILES from the shape of the weights alone; kernels
 * that compute one product must agree on TILES <= 2.
 *
 * Before pdl_wait a block asks for the first STAGES stages of its weights: all of them where
 * n_in is small, 48 to 96 KB else. Bytes: the weights once for each group of rows (from L2 after
 * the first), the activations once for each block.
 */
#ifndef LATTE_CUDA_SKINNY_CUH
#define LATTE_CUDA_SKINNY_CUH

#include "engine/kernels/cuda/fused.cuh"
#include "engine/kernels/cuda/math.cuh"

enum {
    SKINNY_WARPS = 8,
    SKINNY_THREADS = SKINNY_WARPS * WARP,
    SKINNY_PAIRED = 113 * 1024, /* shared memory of a block of which an SM takes two */
    SKINNY_HELD = 8, /* float4 of a row that a lane keeps while it is normed: n_in up to 1024 */
};

/* Where things lie in the block's shared memory, in bytes. */
struct skinny_layout {
    int stages, in_stages;
    int in, ring, sums; /* offsets */
    int bytes;          /* of it all */
    bool overlapped;    /* the sums lie over the operands */
};

template <class W, int HALVES, int TILES, bool NORM> struct skinny {
    static constexpr int COLUMNS = 64 / (int)sizeof(W); /* of an item */
    static constexpr int PIECES =
        COLUMNS / 32; /* 16-byte pieces of activations, for a lane's row */
    static constexpr int CHAINS = TILES <= 2 ? 2 : 1;
    /* Items of a stage: with few tiles a stage of one item is all latency. */
    static constexpr int UNIT = TILES <= 2 && HALVES <= 2 ? 3 : 1;
    static constexpr int STAGES = UNIT == 3    ? (TILES == 1 ? 4 : 3)
                                  : TILES == 1 ? 12
                                  : TILES == 2 ? 8
                                  : TILES <= 4 ? 5
                                               : 3;
    /* Stages of activations in flight, where they are not kept whole. */
    static constexpr int IN_STAGES = HALVES == 1 ? 4 / PIECES : 3;
    /* Groups of copies that may be unfinished when a stage is used. */
    static constexpr int PENDING = (NORM || STAGES < IN_STAGES ? STAGES : IN_STAGES) - 1;
    static constexpr int MIN_BLOCKS = HALVES < 8 && HALVES * TILES * PIECES <= 48 ? 2 : 1;

    static constexpr int RING_STAGE = UNIT * TILES * 512 * SKINNY_WARPS;
    static constexpr int IN_STAGE = UNIT * PIECES * HALVES * 512 * SKINNY_WARPS;
    /* Partial sums, then scale and bias of each weight row of the tile. */
    static constexpr int SUMS = HALVES * TILES * 256 * SKINNY_WARPS + 64 * TILES;

    /* Items of normed rows that there is room for: rows that lanes hold are written whole. */
    static inline __host__ __device__ int in_items(int items)
    {
        const int held = 4 * WARP * SKINNY_HELD / COLUMNS;
        return items < held ? held : items;
    }

    /* several: a block computes more than one tile. */
    static inline __host__ __device__ struct skinny_layout layout(int n_in, bool several)
    {
        const int items = (n_in + COLUMNS - 1) / COLUMNS;
        const int steps = ((items + SKINNY_WARPS - 1) / SKINNY_WARPS + UNIT - 1) / UNIT;
        struct skinny_layout l;
        l.stages = several || steps > STAGES ? STAGES : steps;
        l.in_stages = NORM ? 0 : several || steps > IN_STAGES ? IN_STAGES : steps;
        l.in = 0;
        l.ring = NORM ? in_items(items) * PIECES * HALVES * 512 : l.in_stages * IN_STAGE;
        l.sums = l.ring + l.stages * RING_STAGE;
        l.overlapped = !several && l.sums + SUMS > SKINNY_PAIRED;
        l.bytes = l.sums + SUMS;
        if (l.overlapped) {
            l.bytes = l.sums > SUMS ? l.sums : SUMS;
            l.sums = 0;
        }
        return l;
    }
};

/* 8-row tiles of a block's tile, 1, 2, 4, 6 or 8: about one block an SM, more where the weights
 * are many. From the shape alone, see above; even for OUTPUT_ACTIVATE. */
static inline int skinny_tiles(int n_sms, const struct product_weight *w,
                               enum product_output output)
{
    const bool pairs = output == OUTPUT_ACTIVATE;
    const int n = pairs ? 2 * ceil_div(w->n_out / 2, 8) : ceil_div(w->n_out, 8);
    for (int tiles = pairs ? 2 : 1; tiles < 8; tiles += tiles == 1 ? 1 : 2)
        if (ceil_div(n, tiles) <= n_sms + n_sms / 4)
            return tiles;
    return 8;
}

/* What a block may have of shared memory. */
static inline int skinny_most_shared(const struct queue *q)
{
    const bool large = q->capability == 90 || q->capability == 100 || q->capability == 103;
    return (large ? 227 : q->capability == 80 || q->capability == 87 ? 163 : 99) * 1024;
}

/* Tiles of the weights. */
static inline __host__ __device__ int skinny_n_tiles(const struct product *p, int tiles)
{
    return p->output == OUTPUT_ACTIVATE ? (p->w.n_out / 2 + 4 * tiles - 1) / (4 * tiles)
                                        : (p->w.n_out + 8 * tiles - 1) / (8 * tiles);
}

/* The products a block can compute: what the 16-byte copies ask of shapes and addresses. */
static inline bool skinny_possible(const struct product *p)
{
    const int in_align = p->norm.weight ? 4 : 8;
    return p->w.n_in % (p->w.dtype == DTYPE_I8 ? 16 : 8) == 0 && p->in_stride % in_align == 0 &&
           (uintptr_t)p->in % 16 == 0 && (uintptr_t)p->w.data % 16 == 0 &&
           (!p->norm.weight ||
            ((uintptr_t)p->norm.weight % 16 == 0 && (uintptr_t)p->norm.bias % 16 == 0));
}

/* The product with its norm done before, in c->converted; a launch if there is one. */
struct product product_without_norm(struct cuda *c, const struct product *p);

/* library.cu: the library's scratch memory, which no work holds from one launcher to the next. */
void *library_scratch(struct library *library, size_t *n_bytes);

/* ---- pieces of the block ---- */

static __device__ __forceinline__ uint32_t bf16_pair(float low, float high)
{
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &pair, 4);
    return bits;
}

/* Bytes 0 and 2 of a word, signed, as bf16: 128 and the low seven bits, less 128 or, where the
 * sign is set, 256. Exact, as 8 bits fit the mantissa; conversions have a sixteenth of an SM's
 * lanes. */
static __device__ __forceinline__ uint32_t bf16_of_bytes(uint32_t word)
{
    return fma_bf16x2(and_or(word, 0x007f007f, 0x43004300), 0x3f803f80,
                      and_or(word, 0x00800080, 0xc300c300));
}

/* The weights a lane copied for an item, as the second factor of 2 mmas: for columns that piece
 * `piece` of the activations has. */
template <class W>
static __device__ __forceinline__ void skinny_weights(uint32_t b[4], uint4 raw, int piece)
{
    if (sizeof(W) == 2) {
        b[0] = raw.x, b[1] = raw.y, b[2] = raw.z, b[3] = raw.w;
        return;
    }
    const uint32_t words[2] = {piece ? raw.z : raw.x, piece ? raw.w : raw.y};
#pragma unroll
    for (int i = 0; i < 4; i++)
        b[i] = bf16_of_bytes(__byte_perm(words[i / 2], 0, i % 2 ? 0x4342 : 0x4140));
}

/* Where 16 bytes of normed activations lie: item, piece, row and lane t. Neighbouring items and
 * pieces change places in the banks, for the sake of the writer. */
template <int PIECES, int HALVES>
static __device__ __forceinline__ int skinny_in_slot(int item, int piece, int half, int g, int t)
{
    const int turn = PIECES == 1 ? item & 1 : piece;
    return ((item * PIECES + piece) * HALVES + half) * 32 + (g ^ turn) * 4 + t;
}

/* The block's rows, normed, rounded and put where skinny_in_slot says; zeros beyond n_in. */
template <class W, int HALVES> struct skinny_norm {
    static constexpr int COLUMNS = 64 / (int)sizeof(W), PIECES = COLUMNS / 32;
    static constexpr int AT_ONCE = HALVES == 1 ? 1 : 2;

    float4 weight[SKINNY_HELD]; /* the lane's, loaded before pdl_wait */

    __device__ __forceinline__ void begin(const struct product &p)
    {
        if (p.w.n_in > 4 * WARP * SKINNY_HELD)
            return;
#pragma unroll
        for (int i = 0; i < SKINNY_HELD; i++)
            weight[i] = load(p.norm.weight, p.w.n_in, i);
    }

    static __device__ __forceinline__ float4 load(const float *row, int n_in, int i)
    {
        const int column = 4 * (threadIdx.x % WARP + WARP * i);
        return row && column < n_in ? *reinterpret_cast<const float4 *>(row + column)
                                    : make_float4(0, 0, 0, 0);
    }

    static __device__ __forceinline__ void store(uint4 *in, int row, int column, float4 x,
                                                 struct row_scale s, float4 w, float4 bias)
    {
        const int within = column % COLUMNS, t = within / (COLUMNS / 4);
        const int piece = within % (COLUMNS / 4) / 8;
        const int slot =
            skinny_in_slot<PIECES, HALVES>(column / COLUMNS, piece, row / 8, row % 8, t);
        uint2 y;
        y.x = bf16_pair(normed(x.x, s, w.x, bias.x), normed(x.y, s, w.y, bias.y));
        y.y = bf16_pair(normed(x.z, s, w.z, bias.z), normed(x.w, s, w.w, bias.w));
        reinterpret_cast<uint2 *>(in + slot)[column / 4 % 2] = y;
    }

    static __device__ __forceinline__ const float *source(const struct product &p, int row)
    {
        const int from = p.in_rows ? p.in_rows[row] : row;
        return (const float *)p.in + from * p.in_stride;
    }

    __device__ __forceinline__ void run(const struct product &p, int first_row, int rows, uint4 *in)
    {
        const int warp = threadIdx.x / WARP, n_in = p.w.n_in;
        const bool layer = p.norm.type == NORM_LAYER;
        if (n_in <= 4 * WARP * SKINNY_HELD) {
            for (int row = warp; row < rows; row += SKINNY_WARPS * AT_ONCE)
                held_rows(p, first_row, rows, row, layer, in);
            return;
        }
        for (int row = warp; row < rows; row += SKINNY_WARPS) {
            const float *x = source(p, first_row + row);
            read_row(p, x, row, read_scale(x, n_in, layer, p.norm.eps), in);
        }
    }

    __device__ __forceinline__ void held_rows(const struct product &p, int first_row, int rows,
                                              int row, bool layer, uint4 *in)
    {
        float4 held[AT_ONCE][SKINNY_HELD];
#pragma unroll
        for (int a = 0; a < AT_ONCE; a++) {
            const int from = min(row + SKINNY_WARPS * a, rows - 1);
            const float *x = source(p, first_row + from);
#pragma unroll
            for (int i = 0; i < SKINNY_HELD; i++)
                held[a][i] = load(x, p.w.n_in, i);
        }
#pragma unroll
        for (int a = 0; a < AT_ONCE; a++) {
            if (row + SKINNY_WARPS * a >= rows)
                break;
            const struct row_scale s = held_scale(held[a], p.w.n_in, layer, p.norm.eps);
#pragma unroll
            for (int i = 0; i < SKINNY_HELD; i++) {
                const int column = 4 * (threadIdx.x % WARP + WARP * i);
                /* Beyond n_in weight and bias are 0, and there is room: no branch. */
                store(in, row + SKINNY_WARPS * a, column, held[a][i], s, weight[i],
                      layer ? load(p.norm.bias, p.w.n_in, i) : make_float4(0, 0, 0, 0));
            }
        }
    }

    static __device__ __forceinline__ void read_row(const struct product &p, const float *x,
                                                    int row, struct row_scale s, uint4 *in)
    {
        const int padded = (p.w.n_in + COLUMNS - 1) / COLUMNS * COLUMNS;
#pragma unroll 4
        for (int i = 0; i < (padded + 4 * WARP - 1) / (4 * WARP); i++) {
            const int column = 4 * (threadIdx.x % WARP + WARP * i);
            if (column < padded)
                store(in, row, column, load(x, p.w.n_in, i), s, load(p.norm.weight, p.w.n_in, i),
                      load(p.norm.bias, p.w.n_in, i));
        }
    }
};

/* An element of a tile's results, in the order in which threads take them. N: 8-column tiles. */
template <int N> struct skinny_element {
    int row, half, tile, column; /* of the group of rows; of the results */
    bool valid;

    __device__ __forceinline__ skinny_element(const struct product &p, int e, int block_tile,
                                              int rows)
    {
        half = e / (64 * N);
        tile = e / 64 % N;
        row = half * 8 + e / 8 % 8;
        column = (block_tile * N + tile) * 8 + e % 8;
        valid = row < rows && column < (p.output == OUTPUT_ACTIVATE ? p.w.n_out / 2 : p.w.n_out);
    }
};

/* A weight row's result: the warps' partial sums in order, scaled, with bias. */
template <class W, int HALVES, int TILES>
static __device__ __forceinline__ float skinny_sum(const float *sums, int half, int tile, int e)
{
    const float *at = sums + (half * TILES + tile) * 64 + e % 64;
    const float *terms = sums + SKINNY_WARPS * HALVES * TILES * 64 + tile * 8 + e % 8;
    float y = at[0];
#pragma unroll
    for (int w = 1; w < SKINNY_WARPS; w++)
        y += at[w * HALVES * TILES * 64];
    return sizeof(W) == 1 ? fmaf(y, terms[0], terms[8 * TILES]) : y + terms[8 * TILES];
}

/* What becomes of a result; residual: what OUTPUT_ADD adds to. */
static __device__ __forceinline__ void product_store(const struct product &p, int64_t at, float y,
                                                     float residual)
{
    switch (p.output) {
    case OUTPUT_BF16:
        ((bf16 *)p.out)[at] = from_float<bf16>(y);
        break;
    case OUTPUT_F32:
        ((float *)p.out)[at] = p.softcap != 0 ? softcapped(y, p.softcap) : y;
        break;
    case OUTPUT_ADD:
        ((float *)p.out)[at] = residual + y;
        break;
    case OUTPUT_ACTIVATE: /* y is complete */
        ((bf16 *)p.out)[at] = from_float<bf16>(y);
        break;
    case OUTPUT_ACTIVATE_PLAIN:
        ((bf16 *)p.out)[at] = from_float<bf16>(activate_value(y, p.act));
        break;
    }
}

/* Results of a tile. early: the residual of the thread's first element, if has_early. */
template <class W, int HALVES, int TILES>
static __device__ __forceinline__ void skinny_results(const struct product &p, const float *sums,
                                                      int block_tile, int first_row, int rows,
                                                      bool has_early, float early)
{
    for (int e = threadIdx.x; e < HALVES * TILES * 64; e += SKINNY_THREADS) {
        const skinny_element<TILES> at(p, e, block_tile, rows);
        if (!at.valid)
            continue;
        const int64_t to = (first_row + at.row) * p.out_stride + at.column;
        float residual = early;
        if (p.output == OUTPUT_ADD && !(has_early && e < SKINNY_THREADS))
            residual = ((const float *)p.out)[to];
        const float y = skinny_sum<W, HALVES, TILES>(sums, at.half, at.tile, e);
        product_store(p, to, y, residual);
    }
}

template <class W, int HALVES, int TILES>
static __device__ __forceinline__ void skinny_pairs(const struct product &p, const float *sums,
                                                    int block_tile, int first_row, int rows)
{
    constexpr int N = TILES / 2 ? TILES / 2 : 1;
    for (int e = threadIdx.x; e < HALVES * N * 64; e += SKINNY_THREADS) {
        const skinny_element<N> at(p, e, block_tile, rows);
        if (!at.valid)
            continue;
        const float gate = skinny_sum<W, HALVES, TILES>(sums, at.half, at.tile, e);
        const float up = skinny_sum<W, HALVES, TILES>(sums, at.half, at.tile + N, e);
        product_store(p, (first_row + at.row) * p.out_stride + at.column,
                      activate_value(gate, p.act) * up, 0);
    }
}

/* ---- the block ---- */

/* Compute tiles block, block + n_blocks, ... of rows 8 HALVES row_group on. All SKINNY_THREADS
 * threads of the block call it, after pdl_trigger; it calls pdl_wait. shared: layout().bytes
 * with several = n_blocks < skinny_n_tiles, aligned to 128. p must satisfy skinny_possible, and
 * NORM says whether it has a norm. */
template <class W, int HALVES, int TILES, bool NORM>
static __device__ __forceinline__ void
skinny_block(const struct product &p, int block, int n_blocks, int row_group, unsigned char *shared)
{
    typedef skinny<W, HALVES, TILES, NORM> S;
    constexpr int M = (HALVES + 1) / 2; /* mma tiles of rows */
    constexpr int LANE_VALUES = 16 / (int)sizeof(W);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int n_in = p.w.n_in, items = (n_in + S::COLUMNS - 1) / S::COLUMNS;
    const int first = warp * items / SKINNY_WARPS;
    const int n_items = (warp + 1) * items / SKINNY_WARPS - first;
    const int n_steps = (n_items + S::UNIT - 1) / S::UNIT;
    const int n_tiles = skinny_n_tiles(&p, TILES);
    const struct skinny_layout l = S::layout(n_in, n_blocks < n_tiles);
    /* The lane's part of the items; of the last one it may be none. */
    const int lane_column = first * S::COLUMNS + t * LANE_VALUES;
    const int lane_items = min(n_items, (n_in - lane_column + S::COLUMNS - 1) / S::COLUMNS);

    /* The weight rows of a tile: TILES groups of 8 in order, or half of them gates and as many
     * rows further on the values they multiply. */
    const bool pairs = p.output == OUTPUT_ACTIVATE;
    const int tile_rows = pairs ? 4 * TILES : 8 * TILES;
    const int n_low = pairs ? p.w.n_out / 2 : p.w.n_out, jump = pairs ? n_low - 4 * TILES : 0;
    auto weight_row = [&](int tile, int r, bool *valid) {
        const int row = tile * tile_rows + r + (r >= 4 * TILES ? jump : 0);
        *valid = row < (r >= 4 * TILES ? p.w.n_out : n_low);
        return row;
    };

    uint4 *ring = (uint4 *)(shared + l.ring) + warp * l.stages * S::UNIT * TILES * 32 + lane;
    int ask_tile = block, ask_step = 0, ask_slot = 0;
    uint32_t ask_rows = 0; /* a bit for each of the lane's rows that exist */
    auto ask_weights = [&]() {
        if (ask_tile >= n_tiles || !n_steps)
            return;
        if (ask_step == 0) {
            ask_rows = 0;
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                bool valid;
                weight_row(ask_tile, 8 * i + g, &valid);
                ask_rows |= (uint32_t)valid << i;
            }
        }
        uint4 *to = ring + ask_slot * S::UNIT * TILES * 32;
        const int item = ask_step * S::UNIT;
        const W *from = (const W *)p.w.data + (int64_t)(ask_tile * tile_rows + g) * n_in +
                        lane_column + item * S::COLUMNS;
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            const W *row = from + (int64_t)(8 * i + (2 * i >= TILES ? jump : 0)) * n_in;
#pragma unroll
            for (int u = 0; u < S::UNIT; u++)
                copy_async_16(to + (u * TILES + i) * 32, row + u * S::COLUMNS,
                              item + u < lane_items && ask_rows >> i & 1);
        }
        if (++ask_step == n_steps) {
            ask_step = 0;
            ask_tile += n_blocks;
        }
        if (++ask_slot == l.stages)
            ask_slot = 0;
    };
    for (int s = 0; s < S::STAGES; s++) {
        ask_weights();
        copy_async_commit();
    }
    skinny_norm<W, HALVES> norm;
    if (NORM)
        norm.begin(p);
    /* The step's sizes are there before the wait. */
    const int first_row = row_group * 8 * HALVES, rows = min(*p.n_rows - first_row, 8 * HALVES);

    pdl_wait();

    if (rows <= 0) {
        copy_async_wait<0>();
        return;
    }
    uint4 *in = (uint4 *)(shared + l.in) +
                (NORM ? 0 : warp * l.in_stages * S::UNIT * S::PIECES * HALVES * 32 + lane);
    const bf16 *source[NORM ? 1 : HALVES]; /* the lane's columns of its rows */
    int in_tile = block, in_step = 0, in_slot = 0;
    auto ask_in = [&]() {
        if (in_tile >= n_tiles || !n_steps)
            return;
        uint4 *to = in + in_slot * S::UNIT * S::PIECES * HALVES * 32;
        const int item = in_step * S::UNIT;
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
            if (8 * h + g >= rows)
                continue;
            const bf16 *from = source[NORM ? 0 : h] + item * S::COLUMNS;
#pragma unroll
            for (int u = 0; u < S::UNIT; u++)
#pragma unroll
                for (int piece = 0; piece < S::PIECES; piece++)
                    copy_async_16(to + ((u * S::PIECES + piece) * HALVES + h) * 32,
                                  from + u * S::COLUMNS + 8 * piece, item + u < lane_items);
        }
        if (++in_step == n_steps) {
            in_step = 0;
            in_tile += n_blocks;
        }
        if (++in_slot == l.in_stages)
            in_slot = 0;
    };

    /* The residual that the thread's first result is added to; it is back before the sums are. */
    float early = 0;
    if (p.output == OUTPUT_ADD) {
        const skinny_element<TILES> at(p, threadIdx.x, block, rows);
        if (at.valid && block < n_tiles && threadIdx.x < HALVES * TILES * 64)
            early = ((const float *)p.out)[(first_row + at.row) * p.out_stride + at.column];
    }
    if (NORM) {
        norm.run(p, first_row, rows, in);
        __syncthreads();
    } else {
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
            const int row = first_row + min(8 * h + g, rows - 1);
            source[NORM ? 0 : h] =
                (const bf16 *)p.in + (p.in_rows ? p.in_rows[row] : row) * p.in_stride + lane_column;
        }
        for (int s = 0; s < S::IN_STAGES; s++) {
            ask_in();
            copy_async_commit();
        }
    }

    float *sums = (float *)(shared + l.sums);
    int slot = 0, use_in_slot = 0;
    for (int tile = block; tile < n_tiles; tile += n_blocks) {
        float scale = 1, bias = 0; /* of the thread's row of the tile */
        if (threadIdx.x < 8 * TILES && (sizeof(W) == 1 || p.w.bias)) {
            bool valid;
            const int row = weight_row(tile, threadIdx.x, &valid);
            if (sizeof(W) == 1 && valid)
                scale = p.w.scales[row];
            if (p.w.bias && valid)
                bias = p.w.bias[row];
        }

        float sum[S::CHAINS][M][TILES][4];
#pragma unroll
        for (int i = 0; i < S::CHAINS * M * TILES * 4; i++)
            (&sum[0][0][0][0])[i] = 0;

        for (int step = 0; step < n_steps; step++) {
            copy_async_wait<S::PENDING>();
            const uint4 *weights = ring + slot * S::UNIT * TILES * 32;
            const uint4 *staged = in + use_in_slot * S::UNIT * S::PIECES * HALVES * 32;
#pragma unroll
            for (int u = 0; u < S::UNIT; u++) {
                const int item = step * S::UNIT + u;
                uint4 raw[TILES];
#pragma unroll
                for (int i = 0; i < TILES; i++)
                    raw[i] = weights[(u * TILES + i) * 32];
#pragma unroll
                for (int piece = 0; piece < S::PIECES; piece++) {
                    uint4 x[2 * M];
#pragma unroll
                    for (int h = 0; h < 2 * M; h++) {
                        x[h] = make_uint4(0, 0, 0, 0);
                        if (h < HALVES && 8 * h + g < rows && (S::UNIT == 1 || item < n_items))
                            x[h] = NORM ? in[skinny_in_slot<S::PIECES, HALVES>(first + item, piece,
                                                                               h, g, t)]
                                        : staged[((u * S::PIECES + piece) * HALVES + h) * 32];
                    }
#pragma unroll
                    for (int i = 0; i < TILES; i++) {
                        uint32_t b[4];
                        skinny_weights<W>(b, raw[i], piece);
#pragma unroll
                        for (int m = 0; m < M; m++) {
                            const uint4 low = x[2 * m], high = x[2 * m + 1];
                            const uint32_t a0[4] = {low.x, high.x, low.y, high.y};
                            const uint32_t a1[4] = {low.z, high.z, low.w, high.w};
                            mma_bf16(sum[0][m][i], a0, b);
                            mma_bf16(sum[S::CHAINS - 1][m][i], a1, b + 2);
                        }
                    }
                }
            }
            ask_weights();
            if (!NORM)
                ask_in();
            copy_async_commit();
            if (++slot == l.stages)
                slot = 0;
            if (!NORM && ++use_in_slot == l.in_stages)
                use_in_slot = 0;
        }

        if (l.overlapped) {
            copy_async_wait<0>();
            __syncthreads();
        }
        if (threadIdx.x < 8 * TILES) {
            float *terms = sums + SKINNY_WARPS * HALVES * TILES * 64 + threadIdx.x;
            terms[0] = scale;
            terms[8 * TILES] = bias;
        }
        float *mine = sums + warp * HALVES * TILES * 64 + g * 8 + 2 * t;
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
            if (8 * h + g >= rows)
                continue;
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                float2 y =
                    make_float2(sum[0][h / 2][i][h % 2 * 2], sum[0][h / 2][i][h % 2 * 2 + 1]);
                if (S::CHAINS == 2) {
                    y.x += sum[S::CHAINS - 1][h / 2][i][h % 2 * 2];
                    y.y += sum[S::CHAINS - 1][h / 2][i][h % 2 * 2 + 1];
                }
                *reinterpret_cast<float2 *>(mine + (h * TILES + i) * 64) = y;
            }
        }
        __syncthreads();
        if (pairs)
            skinny_pairs<W, HALVES, TILES>(p, sums, tile, first_row, rows);
        else
            skinny_results<W, HALVES, TILES>(p, sums, tile, first_row, rows, tile == block, early);
        if (tile + n_blocks < n_tiles)
            __syncthreads(); /* before the next tile's sums */
    }
}

#endif
