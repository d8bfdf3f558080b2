/* rglru.cu - the RG-LRU from the residual stream: norm, gates, recurrence and state of a layer.
 *
 * One row per sequence: rglru.cuh's items, alone in a grid. Prompts: tiles of rows x channels of
 * a block of the gates. A sequence's first piece runs from its state; the others run from zero
 * and also leave the product of a up to each row, so that after the scan over pieces a pass adds
 * product * carry to their rows. The gates are computed once.
 * Bytes a row at D = 768: h 1.5 KB read by two groups of 48 channels a block, z and products
 * 6 KB written and read, z 3 KB written again: 17 KB, floor 45 us for 8,192 rows from memory,
 * less as far as z and products are still in L2.
 */
#include "engine/kernels/cuda/rglru.cuh"

enum {
    ITEM_THREADS = 256,
    NORMED_ROWS = 16, /* a launch of its own for norms pays above so many decode rows */
    GATE_TILES = 6,   /* of 8 channels, that a block has */
    GATE_CHANNELS = 8 * GATE_TILES,
    WARP_TILES = GATE_TILES / 2, /* a warp has 16 rows and half of the channels */
    GATE_ROWS = PIECE_ROWS,      /* of a tile: a piece, or several short ones */
    GATE_THREADS = 2 * GATE_ROWS / 16 * WARP,
    TILE_PIECES = WARP, /* of a tile at most */
    CARRY_THREADS = 256,
    CARRY_ROWS = 16,  /* of a piece, that a block of the carry has */
    TERM_STRIDE = 56, /* float2 a row of terms: 8 more than a multiple of 16 spreads the banks */
};

template <bool PACKED>
static __global__ void __launch_bounds__(ITEM_THREADS)
    rglru_item_kernel(const __grid_constant__ struct rglru_decode d)
{
    DYNAMIC_SHARED(unsigned char, shared);
    pdl_trigger();
    rglru_item<3, PACKED>(d, blockIdx.x, shared);
}

/* ---- prompts ---- */

struct gates_call {
    const bf16 *h;
    struct rglru_front f;
    float *piece_states;
    int64_t piece_values;
    struct device_step step;
};

/* A tile: pieces first..first + n in rows that follow each other. */
struct gates_tile {
    int first, n, row, n_rows;
};

/* The next tile at piece p: as many pieces as there is room for; by every warp, a lane a piece.
 * Which pieces share a tile depends on the batch; what is computed for each does not. */
static __device__ __forceinline__ struct gates_tile next_tile(const struct gates_call &c, int p,
                                                              int end)
{
    const int lane = threadIdx.x % WARP;
    struct piece piece = {0, 0, 0, 0};
    if (p + lane < end)
        piece = c.step.pieces[p + lane];
    int sum = piece.n_rows;
    for (int o = 1; o < WARP; o *= 2) {
        const int before = __shfl_up_sync(0xffffffffu, sum, o);
        if (lane >= o)
            sum += before;
    }
    const bool fits = p + lane < end && sum <= GATE_ROWS;
    struct gates_tile t = {p, __popc(__ballot_sync(0xffffffffu, fits)), 0, 0};
    t.row = __shfl_sync(0xffffffffu, piece.row, 0);
    t.n_rows = t.n ? __shfl_sync(0xffffffffu, sum, t.n - 1) : 0;
    return t;
}

/* Where the tile's pieces lie: the last warp's work. */
static __device__ __forceinline__ void
place_tile(struct rglru_place *places, const struct gates_call &c, const struct gates_tile &t)
{
    const int n = (int)threadIdx.x - (GATE_THREADS - WARP);
    if (n >= 0 && n < t.n)
        places[n] = rglru_place_of(c.step, t.first + n);
}

/* Start to fetch the tile's rows of h; columns beyond the width are 0 from the beginning. */
static __device__ __forceinline__ void fetch_tile(bf16 *h, const struct gates_call &c,
                                                  const struct gates_tile &t, int first, int width,
                                                  int stride)
{
    const int chunks = width / 8;
    for (int at = threadIdx.x; at < GATE_ROWS * chunks; at += GATE_THREADS) {
        const int r = at / chunks, i = at % chunks * 8;
        const bool here = r < t.n_rows;
        const bf16 *from = c.h + (int64_t)(t.row + (here ? r : 0)) * c.f.dim + first + i;
        copy_async_16(h + r * stride + i, from, here);
    }
    copy_async_commit();
}

/* terms[row][channel] = a, b of the tile's rows. */
static __device__ __forceinline__ void tile_terms(float2 *terms, const struct gates_call &call,
                                                  const struct gates_tile &t, const bf16 *h,
                                                  const bf16 *recurrence, const bf16 *input,
                                                  const struct rglru_channel *constants, int out0,
                                                  int n_tiles, int stride)
{
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int row0 = warp / 2 * 16, tile0 = warp % 2 * WARP_TILES;
    if (row0 >= t.n_rows || tile0 >= n_tiles)
        return;
    bool begins[2];
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const int row = row0 + lane / 4 + 8 * j;
        begins[j] = row < t.n_rows && call.step.positions[t.row + row] == 0;
    }
    float r[WARP_TILES][4], i[WARP_TILES][4];
    rglru_products<WARP_TILES>(r, i, h + row0 * stride, recurrence + 8 * tile0 * stride,
                               input + 8 * tile0 * stride, stride);
#pragma unroll
    for (int n = 0; n < WARP_TILES; n++) {
        if (tile0 + n >= n_tiles)
            break;
        const int channel = 8 * (tile0 + n) + lane % 4 * 2;
        const struct rglru_channel c[2] = {constants[channel], constants[channel + 1]};
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int row = row0 + lane / 4 + 8 * j;
            *reinterpret_cast<float4 *>(terms + row * TERM_STRIDE + channel) = rglru_pair(
                r[n] + 2 * j, i[n] + 2 * j, h + row * stride + out0 + channel, c, begins[j]);
        }
    }
}

/* What a piece starts from, as far as that is known: the state. */
static __device__ __forceinline__ float piece_past(const struct gates_call &c, int p,
                                                   const struct rglru_place &at, int channel)
{
    if (at.piece.first != p || at.begins)
        return 0; /* a fresh slot may hold anything */
    return c.f.state.data[at.slot * c.f.state.row_values + channel];
}

/* z of one channel of a piece, whose terms begin at `terms`; CHAINED: from zero, with the
 * products of a. */
template <bool CHAINED>
static __device__ __forceinline__ void run_piece(const struct gates_call &c, int p,
                                                 const struct rglru_place &at, const float2 *terms,
                                                 float z, int channel)
{
    const int64_t row = (int64_t)at.piece.row * c.f.dim + channel;
    float *const out = c.f.z + row, *const products = c.f.products + row;
    float a = CHAINED;
#pragma unroll 8
    for (int r = 0; r < at.piece.n_rows; r++) {
        const float2 term = terms[r * TERM_STRIDE];
        z = fmaf(term.x, z, term.y);
        out[(int64_t)r * c.f.dim] = z;
        if (CHAINED) {
            a *= term.x;
            products[(int64_t)r * c.f.dim] = a;
        }
    }
    if (!at.last) {
        float *state = c.piece_states + p * c.piece_values + channel;
        state[0] = a;
        state[c.f.dim] = z;
    } else if (!CHAINED) {
        c.f.state.data[at.slot * c.f.state.row_values + channel] = z;
    }
}

/* Each block has its columns of an equal share of the pieces; in a tile each thread has one
 * channel of every n-th piece. */
static __global__ void __launch_bounds__(GATE_THREADS, 3)
    gates_kernel(const __grid_constant__ struct gates_call c)
{
    DYNAMIC_SHARED(unsigned char, shared);
    __shared__ struct rglru_channel constants[GATE_CHANNELS];
    __shared__ struct rglru_place places[2][TILE_PIECES];
    const struct rglru_front &f = c.f;
    const int width = f.dim / f.n_blocks, stride = rglru_stride(width);
    const int groups = (width + GATE_CHANNELS - 1) / GATE_CHANNELS;
    const int first = blockIdx.x / groups * width, out0 = blockIdx.x % groups * GATE_CHANNELS;
    const int channels = width - out0 < GATE_CHANNELS ? width - out0 : GATE_CHANNELS;
    float2 *const terms = reinterpret_cast<float2 *>(shared);
    bf16 *const h = reinterpret_cast<bf16 *>(terms + GATE_ROWS * TERM_STRIDE);
    bf16 *const recurrence = h + GATE_ROWS * stride;
    bf16 *const input = recurrence + channels * stride;
    pdl_trigger();

    const size_t weights = (size_t)(first + out0) * width;
    rglru_stage(recurrence, f.recurrence_gate + weights, f.input_gate + weights, channels, width,
                stride);
    for (int r = threadIdx.x; r < GATE_ROWS; r += GATE_THREADS)
        for (int i = width; i < stride - 8; i++)
            h[r * stride + i] = __float2bfloat16_rn(0);
    for (int i = threadIdx.x; i < channels; i += GATE_THREADS)
        constants[i] = rglru_channel_of(f, first + out0 + i);

    /* The step's arrays are copied before its first kernel. */
    const int n_pieces = c.step.sizes->n_pieces, share = (n_pieces + gridDim.y - 1) / gridDim.y;
    const int p0 = blockIdx.y * share, end = p0 + share < n_pieces ? p0 + share : n_pieces;
    struct gates_tile t = next_tile(c, p0, end);
    place_tile(places[0], c, t);

    pdl_wait();
    if (!t.n)
        return;
    fetch_tile(h, c, t, first, width, stride);
    const int mine = threadIdx.x % GATE_CHANNELS, n_threads = GATE_THREADS / GATE_CHANNELS;
    int nth = threadIdx.x / GATE_CHANNELS;
    if (mine >= channels || nth >= n_threads)
        nth = TILE_PIECES;
    const int channel = first + out0 + mine;
    for (int now = 0; t.n; now = !now) {
        copy_async_wait<0>();
        __syncthreads();
        float past = nth < t.n ? piece_past(c, t.first + nth, places[now][nth], channel) : 0;
        tile_terms(terms, c, t, h, recurrence, input, constants, out0, channels / 8, stride);
        const struct gates_tile next = next_tile(c, t.first + t.n, end);
        __syncthreads();
        if (next.n)
            fetch_tile(h, c, next, first, width, stride);
        place_tile(places[!now], c, next);
        for (int n = nth; n < t.n; n += n_threads) {
            const struct rglru_place &at = places[now][n];
            const float2 *from = terms + (at.piece.row - t.row) * TERM_STRIDE + mine;
            if (n > nth)
                past = piece_past(c, t.first + n, at, channel);
            if (at.piece.first == t.first + n)
                run_piece<false>(c, t.first + n, at, from, past, channel);
            else
                run_piece<true>(c, t.first + n, at, from, 0, channel);
        }
        t = next;
    }
}

/* z += product * carry for the rows of pieces that are not their sequence's first; the last row
 * of a sequence goes to its state. Bytes: 12 D a row. */
static __global__ void __launch_bounds__(CARRY_THREADS)
    carry_kernel(const __grid_constant__ struct gates_call c)
{
    enum { AT_ONCE = 4 };
    pdl_trigger();
    const int p = blockIdx.x, row0 = blockIdx.y * CARRY_ROWS;
    const bool here = p < c.step.sizes->n_pieces;
    const struct piece piece = c.step.pieces[here ? p : 0];
    pdl_wait();
    if (!here || piece.first == p || row0 >= piece.n_rows)
        return;
    const int left = piece.n_rows - row0, quads = c.f.dim / 4;
    const int n = (left < CARRY_ROWS ? left : CARRY_ROWS) * quads;
    const int end = c.step.seq_start[piece.seq + 1] - piece.row - row0; /* of the sequence */
    const int64_t slot = c.step.seq_slot[piece.seq];
    float4 *const state = reinterpret_cast<float4 *>(c.f.state.data + slot * c.f.state.row_values);
    const float4 *const carry =
        reinterpret_cast<const float4 *>(c.piece_states + p * c.piece_values);
    const int64_t at = (int64_t)(piece.row + row0) * quads;
    float4 *const z = reinterpret_cast<float4 *>(c.f.z) + at;
    const float4 *const products = reinterpret_cast<const float4 *>(c.f.products) + at;
    for (int from = threadIdx.x; from < n; from += AT_ONCE * CARRY_THREADS) {
        float4 sum[AT_ONCE], a[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            const int i = from + k * CARRY_THREADS;
            sum[k] = a[k] = make_float4(0, 0, 0, 0);
            if (i < n) {
                sum[k] = z[i];
                a[k] = products[i];
            }
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            const int i = from + k * CARRY_THREADS;
            if (i >= n)
                break;
            const float4 in = carry[i % quads];
            const float4 y =
                make_float4(fmaf(a[k].x, in.x, sum[k].x), fmaf(a[k].y, in.y, sum[k].y),
                            fmaf(a[k].z, in.z, sum[k].z), fmaf(a[k].w, in.w, sum[k].w));
            z[i] = y;
            if (i / quads == end - 1)
                state[i % quads] = y;
        }
    }
}

static size_t gates_shared_bytes(const struct rglru_front *f)
{
    const int stride = rglru_stride(f->dim / f->n_blocks);
    return GATE_ROWS * TERM_STRIDE * sizeof(float2) +
           (size_t)(GATE_ROWS + 2 * GATE_CHANNELS) * stride * sizeof(bf16);
}

/* Blocks that share the pieces: what fits the device at once, so that each stages its weights
 * for as many rows as possible. */
static int shares(const struct cuda *c, int columns, size_t shared_bytes)
{
    const int fit = (int)(shared_limit(&c->queue) / (shared_bytes + 4096));
    const int n = c->queue.n_sms * (fit < 1 ? 1 : fit < 3 ? fit : 3) / columns;
    return n < 1 ? 1 : n < c->step.n_pieces ? n : c->step.n_pieces;
}

static void prompt_rglru(struct cuda *c, const struct rglru_front *f)
{
    const struct device_step *step = &c->step;
    const int width = f->dim / f->n_blocks;
    const int columns = f->n_blocks * ceil_div(width, GATE_CHANNELS);
    const size_t shared = gates_shared_bytes(f);
    const struct gates_call call = {f->h, *f, c->piece_states, (int64_t)c->piece_values, *step};
    launch(&c->queue, "rglru", gates_kernel, dim3(columns, shares(c, columns, shared)),
           GATE_THREADS, shared, call);
    if (step->rows > PIECE_ROWS) {
        rglru_scan(c, f->state, f->dim);
        launch(&c->queue, "rglru", carry_kernel, dim3(step->n_pieces, PIECE_ROWS / CARRY_ROWS),
               CARRY_THREADS, 0, call);
    }
}

bool fused_rglru(struct cuda *c, const struct rglru_front *front)
{
    const bool decode = c->step.decode;
    struct rglru_front f = *front;
    CHECK(!f.out.values || (decode && f.packed.values));
    if (!rglru_possible(&f) || gates_shared_bytes(&f) > shared_limit(&c->queue))
        return false;
    if (!decode && c->step.rows > PIECE_ROWS && !f.products)
        return false;
    if (!f.h && !f.packed.values && (!decode || c->step.rows > NORMED_ROWS)) {
        norm_to_bf16(c, c->converted, f.x, f.norm, f.dim, nullptr, c->step.rows,
                     &c->step.sizes->n_rows);
        f.h = c->converted;
    }
    if (!decode) {
        prompt_rglru(c, &f);
        return true;
    }
    const struct rglru_decode d = rglru_decode_of(c, &f);
    launch(&c->queue, "rglru", f.packed.values ? rglru_item_kernel<true> : rglru_item_kernel<false>,
           dim3(rglru_items(&d)), ITEM_THREADS, rglru_shared_bytes(&d), d);
    return true;
}
