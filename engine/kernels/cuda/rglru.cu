/* rglru.cu - the RG-LRU from the residual stream: norm, gates, recurrence and state of a layer.
 *
 * One row per sequence: rglru.cuh's items, alone in a grid. Prompts, z_t = a_t z_{t-1} + b_t:
 *   1 gates_kernel       a and b from the gates' products, and a scan over each piece; a sequence's
 *                        first piece runs from its state, the others from zero and leave the
 *                        product of a up to each row
 *   2 rglru_scan_kernel  over pieces: what each starts from (recurrence.cu); where no piece is its
 *                        sequence's only one
 *   3 z_norm_kernel      z += product * start; bf16(norm(z))
 * Bytes a row at D = 768: h 1.5 KB, z 3 KB and products 1.5 KB written and read, the result 1.5 KB:
 * 12 KB, floor 23 us for 8,192 rows from memory, less as far as z and products are still in L2.
 */
#include "engine/kernels/cuda/rglru.cuh"

enum {
    ITEM_THREADS = 256,
    NORMED_ROWS = 16, /* a launch of its own for norms pays above so many decode rows */
    GATE_TILES = 12,  /* of 8 channels, that a block has at most: each is a warp's */
    GATE_THREADS = GATE_TILES * WARP,
    GATE_BLOCKS = 2,        /* that an SM has registers for */
    GATE_ROWS = PIECE_ROWS, /* of a tile: a piece, or several short ones */
    GROUP_ROWS = 8,         /* of a piece, that a lane has */
    GATE_GROUPS = GATE_ROWS / GROUP_ROWS,
    GATE_MMAS = GATE_ROWS / 16,
    GROUP_LANES = WARP / GATE_GROUPS, /* that have the same rows: two channels each */
    NORM_ROWS = 4, /* of a piece, that a block of z_norm_kernel has: a warp each */
};

static __global__ void __launch_bounds__(ITEM_THREADS)
    rglru_item_kernel(const __grid_constant__ struct rglru_decode d)
{
    DYNAMIC_SHARED(unsigned char, shared);
    pdl_trigger();
    rglru_item<3>(d, blockIdx.x, shared);
}

/* ---- prompts ---- */

struct gates_call {
    struct rglru_front f;
    float *piece_states;
    int64_t piece_values;
    int n_tiles; /* of 8 channels, that a block has */
    struct device_step step;
};

/* Up to GROUP_ROWS rows that follow each other in a piece; lanes GROUP_LANES g on know group g of
 * a tile. */
struct gates_group {
    int piece, slot, row;
    unsigned n : 8;                  /* 0: no such group */
    unsigned starts : 1, ends : 1;   /* its piece */
    unsigned chained : 1, alone : 1; /* not its sequence's first piece; its only one */
    unsigned begins : 1;             /* its first row has position 0 */
};

/* The tile from piece *p on, which moves on: as many pieces as there is room for, each from the
 * beginning of a group on. Which pieces share a tile depends on the batch; what is computed for
 * each does not, since all sums go by where a group lies in its piece. */
static __device__ __forceinline__ struct gates_group next_tile(const struct gates_call &c, int *p,
                                                               int end)
{
    const unsigned all = 0xffffffffu;
    const int lane = threadIdx.x % WARP, g = lane / GROUP_LANES;
    struct piece piece = {0, 0, 0, 0}; /* the g-th */
    if (*p + g < end)
        piece = c.step.pieces[*p + g];
    const int n_groups = (piece.n_rows + GROUP_ROWS - 1) / GROUP_ROWS;
    int sum = n_groups; /* of the pieces up to this one */
    for (int o = GROUP_LANES; o < WARP; o *= 2) {
        const int before = __shfl_up_sync(all, sum, o);
        if (lane >= o)
            sum += before;
    }
    const int n = __popc(__ballot_sync(all, *p + g < end && sum <= GATE_GROUPS)) / GROUP_LANES;
    int mine = 0; /* the piece that group g is of */
#pragma unroll
    for (int k = 0; k < GATE_GROUPS; k++)
        mine += __shfl_sync(all, sum, k * GROUP_LANES) <= g && k < n;
    const int from = (mine < n ? mine : 0) * GROUP_LANES;
    const int seq = __shfl_sync(all, piece.seq, from), row = __shfl_sync(all, piece.row, from);
    const int n_rows = __shfl_sync(all, piece.n_rows, from);
    const int first = __shfl_sync(all, piece.first, from);
    const int nth = g - __shfl_sync(all, sum - n_groups, from);

    struct gates_group group = {};
    if (mine < n) {
        const int done = nth * GROUP_ROWS, left = n_rows - done;
        group.piece = *p + mine;
        group.slot = c.step.seq_slot[seq];
        group.row = row + done;
        group.n = left < GROUP_ROWS ? left : GROUP_ROWS;
        group.starts = nth == 0;
        group.ends = left <= GROUP_ROWS;
        group.chained = first != group.piece;
        group.alone = c.step.seq_start[seq + 1] - c.step.seq_start[seq] <= PIECE_ROWS;
        group.begins = c.step.positions[group.row] == 0;
    }
    *p += n;
    return group;
}

/* Start to fetch the tile's rows of h: row j of group g to row j * GATE_GROUPS + g, so that the
 * lanes of a group get its rows from the products. Columns beyond the width are 0 from the
 * beginning. */
static __device__ __forceinline__ void fetch_tile(bf16 *h, const struct gates_call &c,
                                                  const struct gates_group &group, int first,
                                                  int width, int stride)
{
    const unsigned chunks = width / 8, n = GATE_ROWS * chunks;
    for (unsigned at0 = 0; at0 < n; at0 += blockDim.x) {
        const unsigned at = at0 + threadIdx.x, r = at / chunks, i = at % chunks * 8;
        const int from = r % GATE_GROUPS * GROUP_LANES, j = r / GATE_GROUPS;
        const int row = __shfl_sync(0xffffffffu, group.row, from);
        const bool here = j < __shfl_sync(0xffffffffu, (int)group.n, from);
        const bf16 *rows = c.f.h + (int64_t)(here ? row + j : 0) * c.f.dim;
        if (at < n)
            copy_async_16(h + r * stride + i, rows + first + i, here);
    }
    copy_async_commit();
}

/* Both gates' products of a tile's rows with 8 channels, in the order of rglru_products. */
static __device__ __forceinline__ void tile_products(float (&r)[GATE_MMAS][4],
                                                     float (&i)[GATE_MMAS][4], const bf16 *h,
                                                     const bf16 *recurrence, const bf16 *input,
                                                     int stride)
{
    const int lane = threadIdx.x % WARP, row = lane % 8;
    const bf16 *const a_at = h + (row + lane / 8 % 2 * 8) * stride + lane / 16 * 8;
    const bf16 *const b_at = (lane < 16 ? recurrence : input) + row * stride + lane / 8 % 2 * 8;
#pragma unroll
    for (int m = 0; m < GATE_MMAS; m++) {
#pragma unroll
        for (int j = 0; j < 4; j++)
            r[m][j] = i[m][j] = 0;
    }
#pragma unroll 3
    for (int k = 0; k < stride - 8; k += 16) {
        uint32_t a[GATE_MMAS][4], b[4];
        ldmatrix_x4(b, b_at + k);
#pragma unroll
        for (int m = 0; m < GATE_MMAS; m++)
            ldmatrix_x4(a[m], a_at + m * 16 * stride + k);
#pragma unroll
        for (int m = 0; m < GATE_MMAS; m++) {
            mma_bf16(r[m], a[m], b);
            mma_bf16(i[m], a[m], b + 2);
        }
    }
}

/* A lane's group and two channels: a and b in place of the products r and i. A row that is not
 * there leaves z as it is. */
static __device__ __forceinline__ void tile_terms(float (&r)[GATE_MMAS][4],
                                                  float (&i)[GATE_MMAS][4],
                                                  const struct gates_group &group, const bf16 *h,
                                                  const struct rglru_channel *constants, int stride)
{
    const struct rglru_channel c[2] = {constants[0], constants[1]};
    h += threadIdx.x % WARP / GROUP_LANES * stride;
#pragma unroll
    for (int j = 0; j < GROUP_ROWS; j++) {
        float *const a = r[j / 2] + j % 2 * 2, *const b = i[j / 2] + j % 2 * 2;
        const float4 t = rglru_pair(a, b, h + j * GATE_GROUPS * stride, c, j == 0 && group.begins);
        a[0] = t.x;
        b[0] = t.y;
        a[1] = t.z;
        b[1] = t.w;
    }
    if (group.n < GROUP_ROWS) {
#pragma unroll
        for (int j = 0; j < GROUP_ROWS; j++) {
            if (j >= (int)group.n) {
                r[j / 2][j % 2 * 2] = r[j / 2][j % 2 * 2 + 1] = 1;
                i[j / 2][j % 2 * 2] = i[j / 2][j % 2 * 2 + 1] = 0;
            }
        }
    }
}

/* z after a row is a z + b of the row before; of several rows too. */
struct run {
    float a, z;
};

/* Both one after the other. Where a is 0 nothing is left of what was before, not even a NaN of
 * another sequence. */
static __device__ __forceinline__ struct run follow(struct run before, struct run after)
{
    if (after.a == 0)
        return after;
    return {before.a * after.a, fmaf(after.a, before.z, after.z)};
}

/* One channel of a group: a and b of each row become those of all of the group's rows up to it.
 * What comes before the group, its piece's rows and what the piece starts from; `whole` is both
 * together. past: what the piece starts from. */
static __device__ __forceinline__ struct run
scan_groups(struct run *whole, const struct gates_group &group, float (&a)[GATE_MMAS][4],
            float (&b)[GATE_MMAS][4], int k, float past)
{
    const int lane = threadIdx.x % WARP;
    struct run mine = {a[0][k], b[0][k]};
#pragma unroll
    for (int j = 1; j < GROUP_ROWS; j++) {
        float *const at_a = &a[j / 2][j % 2 * 2 + k], *const at_b = &b[j / 2][j % 2 * 2 + k];
        mine.z = *at_b = fmaf(*at_a, mine.z, *at_b);
        mine.a = *at_a *= mine.a;
    }
    const struct run start = {(float)group.chained, past};
    if (group.starts)
        mine = {start.a * mine.a, fmaf(mine.a, past, mine.z)};
#pragma unroll
    for (int o = GROUP_LANES; o < WARP; o *= 2) {
        const struct run before = {__shfl_up_sync(0xffffffffu, mine.a, o),
                                   __shfl_up_sync(0xffffffffu, mine.z, o)};
        if (lane >= o)
            mine = follow(before, mine);
    }
    *whole = mine;
    const struct run before = {__shfl_up_sync(0xffffffffu, mine.a, GROUP_LANES),
                               __shfl_up_sync(0xffffffffu, mine.z, GROUP_LANES)};
    return group.starts ? start : before;
}

/* n rows of two channels from what came before the group; products of a where the piece is
 * chained. */
static __device__ __forceinline__ void store_rows(const struct gates_call &c,
                                                  const struct gates_group &group, int n,
                                                  const float (&a)[GATE_MMAS][4],
                                                  const float (&b)[GATE_MMAS][4],
                                                  const struct run (&before)[2], int channel)
{
    const int64_t at = (int64_t)group.row * c.f.dim + channel;
    float *const z = c.f.z + at;
    __half *const products = c.f.products + at;
#pragma unroll
    for (int j = 0; j < GROUP_ROWS; j++) {
        const int e = j % 2 * 2;
        if (j < n)
            *reinterpret_cast<float2 *>(z + j * c.f.dim) =
                make_float2(fmaf(a[j / 2][e], before[0].z, b[j / 2][e]),
                            fmaf(a[j / 2][e + 1], before[1].z, b[j / 2][e + 1]));
    }
    if (!group.chained)
        return;
#pragma unroll
    for (int j = 0; j < GROUP_ROWS; j++) {
        const int e = j % 2 * 2;
        if (j < n)
            *reinterpret_cast<__half2 *>(products + j * c.f.dim) =
                __floats2half2_rn(a[j / 2][e] * before[0].a, a[j / 2][e + 1] * before[1].a);
    }
}

/* z of two channels of the tile, from their terms, and what follows from it. */
static __device__ __forceinline__ void run_tile(const struct gates_call &c,
                                                const struct gates_group &group,
                                                float (&a)[GATE_MMAS][4], float (&b)[GATE_MMAS][4],
                                                float2 past, int channel)
{
    struct run end[2], before[2];
    before[0] = scan_groups(&end[0], group, a, b, 0, past.x);
    before[1] = scan_groups(&end[1], group, a, b, 1, past.y);
    const float2 z_end = make_float2(end[0].z, end[1].z);
    if (group.ends && group.alone) {
        *reinterpret_cast<float2 *>(c.f.state.data + group.slot * c.f.state.row_values + channel) =
            z_end;
    } else if (group.ends) {
        float *const state = c.piece_states + group.piece * c.piece_values + channel;
        *reinterpret_cast<float2 *>(state) = make_float2(end[0].a, end[1].a);
        *reinterpret_cast<float2 *>(state + c.f.dim) = z_end;
    }
    if (group.n == GROUP_ROWS)
        store_rows(c, group, GROUP_ROWS, a, b, before, channel);
    else
        store_rows(c, group, group.n, a, b, before, channel);
}

/* What the group's piece starts from, as far as that is known: the state. */
static __device__ __forceinline__ float2 piece_past(const struct gates_call &c,
                                                    const struct gates_group &group, int channel)
{
    if (!group.starts || group.chained || group.begins)
        return make_float2(0, 0); /* a fresh slot may hold anything */
    return *reinterpret_cast<const float2 *>(c.f.state.data + group.slot * c.f.state.row_values +
                                             channel);
}

/* A block has its columns of an equal share of the pieces, a warp 8 of the columns: products,
 * terms and scan of a tile are in its registers, the next tile's rows on their way. WIDTH: of a
 * block of the gates; 0: any. */
template <int WIDTH>
static __global__ void __launch_bounds__(GATE_THREADS, GATE_BLOCKS)
    gates_kernel(const __grid_constant__ struct gates_call c)
{
    DYNAMIC_SHARED(bf16, h); /* two tiles, then weights and constants */
    const struct rglru_front &f = c.f;
    const int width = WIDTH ? WIDTH : f.dim / f.n_blocks, stride = rglru_stride(width);
    const int groups = (width / 8 + c.n_tiles - 1) / c.n_tiles;
    const int first = blockIdx.x / groups * width, tile0 = blockIdx.x % groups * c.n_tiles;
    const int left = width / 8 - tile0, n_tiles = left < c.n_tiles ? left : c.n_tiles;
    bf16 *const recurrence = h + 2 * GATE_ROWS * stride;
    bf16 *const input = recurrence + n_tiles * 8 * stride;
    struct rglru_channel *const constants =
        reinterpret_cast<struct rglru_channel *>(input + n_tiles * 8 * stride);
    pdl_trigger();

    const size_t weights = (size_t)(first + tile0 * 8) * width;
    rglru_stage<6>(recurrence, f.recurrence_gate + weights, f.input_gate + weights, n_tiles * 8,
                   width, stride);
    for (int r = threadIdx.x; r < 2 * GATE_ROWS; r += blockDim.x)
        for (int i = width; i < stride - 8; i++)
            h[r * stride + i] = __float2bfloat16_rn(0);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int tile = warp < n_tiles ? warp : 0; /* a warp without one has nothing to do */
    const int column = (tile0 + tile) * 8 + lane % GROUP_LANES * 2, channel = first + column;
    for (int i = threadIdx.x; i < n_tiles * 8; i += blockDim.x)
        constants[i] = rglru_channel_of(f, first + tile0 * 8 + i);

    /* The step's arrays are there before the wait. */
    const int n_pieces = c.step.sizes->n_pieces, share = (n_pieces + gridDim.y - 1) / gridDim.y;
    const int p0 = blockIdx.y * share, end = p0 + share < n_pieces ? p0 + share : n_pieces;
    int p = p0;
    struct gates_group group = next_tile(c, &p, end);
    pdl_wait();
    if (p0 >= end)
        return;
    fetch_tile(h, c, group, first, width, stride);
    for (int odd = 0;; odd = !odd) {
        const bf16 *const rows = h + odd * GATE_ROWS * stride;
        copy_async_wait<0>();
        __syncthreads(); /* the rows are there, and nobody reads those before */
        const bool more = p < end;
        const struct gates_group next = next_tile(c, &p, end);
        if (more)
            fetch_tile(h + !odd * GATE_ROWS * stride, c, next, first, width, stride);
        if (warp < n_tiles) {
            const float2 past = piece_past(c, group, channel);
            float a[GATE_MMAS][4], b[GATE_MMAS][4];
            tile_products(a, b, rows, recurrence + tile * 8 * stride, input + tile * 8 * stride,
                          stride);
            tile_terms(a, b, group, rows + column, constants + tile * 8 + lane % GROUP_LANES * 2,
                       stride);
            run_tile(c, group, a, b, past, channel);
        }
        if (!more)
            break;
        group = next;
    }
}

/* ---- z from what its piece started from, and its norm ---- */

/* Where a row of z lies. start: what a chained piece starts from, else NULL. */
struct z_row {
    float4 *z;
    const uint2 *products;
    const float4 *start;
    __nv_bfloat162 *out;
};

static __device__ __forceinline__ float4 z_at(const struct z_row &row, int quad)
{
    const float4 z = row.z[quad];
    if (!row.start)
        return z;
    const uint2 products = row.products[quad];
    const float4 start = row.start[quad];
    const float2 low = __half22float2(reinterpret_cast<const __half2 &>(products.x));
    const float2 high = __half22float2(reinterpret_cast<const __half2 &>(products.y));
    return make_float4(fmaf(low.x, start.x, z.x), fmaf(low.y, start.y, z.y),
                       fmaf(high.x, start.z, z.z), fmaf(high.y, start.w, z.w));
}

static __device__ __forceinline__ void store_z(const struct z_row &row, int quad, float4 z,
                                               struct row_scale s, float4 weight,
                                               const struct device_norm &norm)
{
    const float4 y =
        normed_quad(z, s, weight, norm.bias ? quad_at(norm.bias, quad) : make_float4(0, 0, 0, 0));
    row.out[2 * quad] = __floats2bfloat162_rn(y.x, y.y);
    row.out[2 * quad + 1] = __floats2bfloat162_rn(y.z, y.w);
}

/* A block has NORM_ROWS rows of a piece at a time, a warp one of them, with the sums of norm_kernel
 * (rows.cu); the blocks of one x share the piece. PER: quads of a lane, which holds them; 0: any
 * number, z is completed in place and read again. Bytes: 6 D a row in, 4 D where z is z; 2 D out.
 */
template <int PER>
static __global__ void __launch_bounds__(NORM_ROWS *WARP)
    z_norm_kernel(const __grid_constant__ struct gates_call c)
{
    constexpr bool AHEAD = PER > 0 && PER <= 8;
    const float4 zero = make_float4(0, 0, 0, 0);
    const struct device_norm &norm = c.f.z_norm;
    const int lane = threadIdx.x % WARP, dim = c.f.dim, quads = dim / 4;
    const bool layer = norm.type == NORM_LAYER;
    pdl_trigger();
    float4 weight[AHEAD ? PER : 1];
#pragma unroll
    for (int k = 0; AHEAD && k < PER; k++)
        weight[k] = lane + k * WARP < quads ? quad_at(norm.weight, lane + k * WARP) : zero;
    const int p = blockIdx.x;
    const bool here = p < c.step.sizes->n_pieces;
    const struct piece piece = c.step.pieces[here ? p : 0];
    const float *const start = piece.first == p ? nullptr : c.piece_states + p * c.piece_values;
    pdl_wait();
    if (!here)
        return;
#pragma unroll 1
    for (int r = blockIdx.y * NORM_ROWS + threadIdx.x / WARP; r < piece.n_rows;
         r += gridDim.y * NORM_ROWS) {
        const int64_t at = (int64_t)(piece.row + r) * dim;
        const struct z_row row = {reinterpret_cast<float4 *>(c.f.z + at),
                                  reinterpret_cast<const uint2 *>(c.f.products + at),
                                  reinterpret_cast<const float4 *>(start),
                                  reinterpret_cast<__nv_bfloat162 *>(c.f.normed + at)};
        if constexpr (PER > 0) {
            float4 held[PER];
#pragma unroll
            for (int k = 0; k < PER; k++)
                held[k] = lane + k * WARP < quads ? z_at(row, lane + k * WARP) : zero;
            const struct row_scale s = held_scale<PER>(held, dim, layer, norm.eps);
#pragma unroll
            for (int k = 0; k < PER; k++) {
                const int quad = lane + k * WARP;
                if (quad < quads)
                    store_z(row, quad, held[k], s, AHEAD ? weight[k] : quad_at(norm.weight, quad),
                            norm);
            }
        } else {
            for (int quad = lane; row.start && quad < quads; quad += WARP)
                row.z[quad] = z_at(row, quad);
            const struct row_scale s =
                read_scale(reinterpret_cast<const float *>(row.z), dim, layer, norm.eps);
            for (int quad = lane; quad < quads; quad += WARP)
                store_z(row, quad, row.z[quad], s, quad_at(norm.weight, quad), norm);
        }
    }
}

/* ---- launches ---- */

static size_t gates_shared_bytes(const struct rglru_front *f, int n_tiles)
{
    const int stride = rglru_stride(f->dim / f->n_blocks);
    return (size_t)(2 * GATE_ROWS + 2 * 8 * n_tiles) * stride * sizeof(bf16) +
           (size_t)n_tiles * 8 * sizeof(struct rglru_channel);
}

/* Tiles of 8 channels a block: as many as fit, alike. 0: not one does. */
static int gate_tiles(const struct cuda *c, const struct rglru_front *f)
{
    const int tiles = f->dim / f->n_blocks / 8;
    int n = tiles < GATE_TILES ? tiles : GATE_TILES;
    while (n && gates_shared_bytes(f, n) > shared_limit(&c->queue))
        n--;
    return n ? ceil_div(tiles, ceil_div(tiles, n)) : 0;
}

/* Blocks that share the pieces: what fits the device at once, so that each stages its weights
 * for as many rows as possible. */
static int shares(const struct cuda *c, int columns, int n_tiles, size_t shared_bytes)
{
    const int room = (int)(shared_limit(&c->queue) / (shared_bytes + 1024));
    const int most = GATE_BLOCKS * GATE_TILES / n_tiles, fit = room < 1      ? 1
                                                               : room < most ? room
                                                                             : most;
    const int n = c->queue.n_sms * fit / columns;
    return n < 1 ? 1 : n < c->step.n_pieces ? n : c->step.n_pieces;
}

static void z_norm(struct cuda *c, const struct gates_call *call)
{
    const int dim = call->f.dim;
    void (*kernel)(struct gates_call) = z_norm_kernel<0>;
    if (dim <= 256)
        kernel = z_norm_kernel<2>;
    else if (dim <= 768)
        kernel = z_norm_kernel<6>;
    else if (dim <= 1024)
        kernel = z_norm_kernel<8>;
    else if (dim <= 2560)
        kernel = z_norm_kernel<20>;
    /* Of many short sequences most pieces are short. */
    const int rows = ceil_div(c->step.rows, c->step.n_pieces), blocks = ceil_div(rows, NORM_ROWS);
    launch(
        &c->queue, "rglru", kernel,
        dim3(c->step.n_pieces, blocks < PIECE_ROWS / NORM_ROWS ? blocks : PIECE_ROWS / NORM_ROWS),
        NORM_ROWS * WARP, 0, *call);
}

static void prompt_rglru(struct cuda *c, const struct rglru_front *f, int n_tiles)
{
    const struct device_step *step = &c->step;
    const int columns = f->n_blocks * ceil_div(f->dim / f->n_blocks / 8, n_tiles);
    const size_t shared = gates_shared_bytes(f, n_tiles);
    const struct gates_call call = {*f, c->piece_states, (int64_t)c->piece_values, n_tiles, *step};
    launch(&c->queue, "rglru", f->dim / f->n_blocks == 96 ? gates_kernel<96> : gates_kernel<0>,
           dim3(columns, shares(c, columns, n_tiles, shared)), n_tiles * WARP, shared, call);
    if (step->rows > PIECE_ROWS)
        rglru_scan(c, f->state, f->dim);
    z_norm(c, &call);
}

bool fused_rglru(struct cuda *c, const struct rglru_front *front)
{
    const bool decode = c->step.decode;
    struct rglru_front f = *front;
    CHECK(!f.weighted || (decode && f.h && f.out_weight));
    CHECK(decode || (f.products && f.normed && f.z_norm.weight));
    if (!rglru_possible(&f))
        return false;
    const int n_tiles = gate_tiles(c, &f);
    if (!n_tiles)
        return false;
    if (!f.h && (!decode || c->step.rows > NORMED_ROWS)) {
        norm_to_bf16(c, c->converted, f.x, f.norm, f.dim, nullptr, c->step.rows,
                     &c->step.sizes->n_rows);
        f.h = c->converted;
    }
    if (!decode) {
        prompt_rglru(c, &f, n_tiles);
        return true;
    }
    const struct rglru_decode d = rglru_decode_of(c, &f);
    launch(&c->queue, "rglru", rglru_item_kernel, dim3(rglru_items(&d)), ITEM_THREADS,
           rglru_shared_bytes(&d), d);
    return true;
}
