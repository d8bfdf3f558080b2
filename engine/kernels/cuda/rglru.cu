/* rglru.cu - the RG-LRU from the residual stream: norm, gates, recurrence and state of a layer.
 *
 * One row per sequence: rglru.cuh's items, alone in a grid. Prompts: h is normed once, as bf16;
 * then tiles of rows x channels of a block of the gates, twice: to reduce pieces, and after the
 * scan to run them. Recomputing the products is cheaper than storing their 8 D bytes a row.
 * Bytes a row at D = 768: x 3 KB, h 1.5 KB written and read twice (by the 16 groups of 48
 * channels: their part), z 3 KB; floor 17 us for 8,192 rows from memory.
 */
#include "engine/kernels/cuda/rglru.cuh"

enum {
    ITEM_THREADS = 256,
    NORMED_ROWS = 192, /* a launch of its own for norms pays above so many decode rows */
    GATE_TILES = 6,    /* of 8 channels, that a block has */
    GATE_CHANNELS = 8 * GATE_TILES,
    WARP_TILES = GATE_TILES / 2, /* a warp has 16 rows and half of the channels */
    GATE_ROWS = PIECE_ROWS,      /* of a tile: a piece, or several short ones */
    GATE_THREADS = 2 * GATE_ROWS / 16 * WARP,
    TERM_STRIDE = 56, /* float2 a row of terms: 8 more than a multiple of 16 spreads the banks */
};

static __global__ void __launch_bounds__(ITEM_THREADS)
    rglru_item_kernel(const __grid_constant__ struct rglru_decode d)
{
    DYNAMIC_SHARED(unsigned char, shared);
    pdl_trigger();
    rglru_item(d, blockIdx.x, shared);
}

/* ---- prompts ---- */

struct gates_call {
    const bf16 *h;
    struct rglru_front f;
    float *piece_states;
    int64_t piece_values;
    struct device_step step;
    int block_pieces; /* adjacent pieces that a block goes through */
};

/* A tile: pieces first..first + n in rows that follow each other. */
struct gates_tile {
    int first, n, row, n_rows;
};

/* The next tile at piece p: as many pieces as there is room for. Which pieces share a tile
 * depends on the batch; what is computed for each does not. full: only pieces of GATE_ROWS. */
static __device__ __forceinline__ struct gates_tile next_tile(const struct gates_call &c, int p,
                                                              int end, bool full)
{
    struct gates_tile t = {p, 0, 0, 0};
    for (; p < end; p++) {
        const struct piece piece = c.step.pieces[p];
        if (t.n_rows + piece.n_rows > GATE_ROWS)
            break;
        if (full && piece.n_rows < GATE_ROWS)
            continue;
        if (!t.n) {
            t.first = p;
            t.row = piece.row;
        }
        t.n++;
        t.n_rows += piece.n_rows;
    }
    return t;
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

/* A and Z of one channel of a piece, whose terms begin at `terms`. */
static __device__ __forceinline__ void reduce_piece(const struct gates_call &c, int p,
                                                    const struct rglru_place &at,
                                                    const float2 *terms, int channel)
{
    if (at.last)
        return;
    float a = 1, z = 0;
#pragma unroll 8
    for (int r = 0; r < PIECE_ROWS; r++) { /* only the last piece has fewer rows */
        const float2 term = terms[r * TERM_STRIDE];
        a *= term.x;
        z = fmaf(term.x, z, term.y);
    }
    float *state = c.piece_states + p * c.piece_values + channel;
    state[0] = a;
    state[c.f.dim] = z;
}

static __device__ __forceinline__ void run_piece(const struct gates_call &c, int p,
                                                 const struct rglru_place &at, const float2 *terms,
                                                 int channel)
{
    float *state = c.f.state.data + at.slot * c.f.state.row_values + channel;
    float z = !at.alone ? c.piece_states[p * c.piece_values + channel] : at.begins ? 0 : *state;
    float *out = c.f.z + (int64_t)at.piece.row * c.f.dim + channel;
#pragma unroll 8
    for (int r = 0; r < at.piece.n_rows; r++) {
        const float2 term = terms[r * TERM_STRIDE];
        z = fmaf(term.x, z, term.y);
        out[(int64_t)r * c.f.dim] = z;
    }
    if (at.last)
        *state = z;
}

/* LAST: run the rows; else reduce pieces. Each thread has one channel of every n-th piece. */
template <bool LAST>
static __global__ void __launch_bounds__(GATE_THREADS, 3)
    gates_kernel(const __grid_constant__ struct gates_call c)
{
    DYNAMIC_SHARED(unsigned char, shared);
    __shared__ struct rglru_channel constants[GATE_CHANNELS];
    const struct rglru_front &f = c.f;
    const int width = f.dim / f.n_blocks, stride = rglru_stride(width);
    const int groups = (width + GATE_CHANNELS - 1) / GATE_CHANNELS;
    const int first = blockIdx.x / groups * width, out0 = blockIdx.x % groups * GATE_CHANNELS;
    const int channels = width - out0 < GATE_CHANNELS ? width - out0 : GATE_CHANNELS;
    float2 *const terms = reinterpret_cast<float2 *>(shared);
    bf16 *const h = reinterpret_cast<bf16 *>(terms + GATE_ROWS * TERM_STRIDE);
    bf16 *const recurrence = h + GATE_ROWS * stride;
    bf16 *const input = recurrence + GATE_CHANNELS * stride;
    pdl_trigger();

    const size_t weights = (size_t)(first + out0) * width;
    rglru_stage(recurrence, f.recurrence_gate + weights, channels, width, stride);
    rglru_stage(input, f.input_gate + weights, channels, width, stride);
    for (int r = threadIdx.x; r < GATE_ROWS; r += GATE_THREADS)
        for (int i = width; i < stride - 8; i++)
            h[r * stride + i] = __float2bfloat16_rn(0);
    for (int i = threadIdx.x; i < channels; i += GATE_THREADS)
        constants[i] = rglru_channel_of(f, first + out0 + i);

    pdl_wait();
    const int n_pieces = c.step.sizes->n_pieces, p0 = blockIdx.y * c.block_pieces;
    if (p0 >= n_pieces)
        return;
    const int end = p0 + c.block_pieces < n_pieces ? p0 + c.block_pieces : n_pieces;
    struct gates_tile t = next_tile(c, p0, end, !LAST);
    if (t.n)
        fetch_tile(h, c, t, first, width, stride);
    const int mine = threadIdx.x % GATE_CHANNELS, nth = threadIdx.x / GATE_CHANNELS;
    const int n_threads = GATE_THREADS / GATE_CHANNELS;
    while (t.n) {
        copy_async_wait<0>();
        __syncthreads();
        tile_terms(terms, c, t, h, recurrence, input, constants, out0, channels / 8, stride);
        __syncthreads();
        const struct gates_tile next = next_tile(c, t.first + t.n, end, !LAST);
        if (next.n)
            fetch_tile(h, c, next, first, width, stride);
        for (int n = nth; n < t.n && mine < channels && nth < n_threads; n += n_threads) {
            const struct rglru_place at = rglru_place_of(c.step, t.first + n);
            const float2 *from = terms + (at.piece.row - t.row) * TERM_STRIDE + mine;
            if (LAST)
                run_piece(c, t.first + n, at, from, first + out0 + mine);
            else
                reduce_piece(c, t.first + n, at, from, first + out0 + mine);
        }
        t = next;
    }
}

static size_t gates_shared_bytes(const struct rglru_front *f)
{
    const int stride = rglru_stride(f->dim / f->n_blocks);
    return GATE_ROWS * TERM_STRIDE * sizeof(float2) +
           (size_t)(GATE_ROWS + 2 * GATE_CHANNELS) * stride * sizeof(bf16);
}

/* Pieces for a block: so that the grid fits the device at once, and weights are converted for
 * several pieces. */
static int block_pieces(const struct cuda *c, int columns, size_t shared_bytes)
{
    const int fit = (int)(shared_limit(&c->queue) / (shared_bytes + 2048));
    const int blocks = c->queue.n_sms * (fit < 3 ? fit : 3);
    const int n = ceil_div(c->step.n_pieces * columns, blocks);
    return n > 8 ? 8 : n;
}

static void prompt_rglru(struct cuda *c, const struct rglru_front *f)
{
    const struct device_step *step = &c->step;
    const int width = f->dim / f->n_blocks;
    const int columns = f->n_blocks * ceil_div(width, GATE_CHANNELS);
    const size_t shared = gates_shared_bytes(f);
    const int pieces = block_pieces(c, columns, shared);
    const struct gates_call call = {c->converted, *f,    c->piece_states, (int64_t)c->piece_values,
                                    *step,        pieces};
    const dim3 grid(columns, ceil_div(step->n_pieces, pieces));

    norm_to_bf16(c, c->converted, f->x, f->norm, f->dim, nullptr, step->rows, &step->sizes->n_rows);
    if (step->rows > PIECE_ROWS) {
        launch(&c->queue, "rglru", gates_kernel<false>, grid, GATE_THREADS, shared, call);
        rglru_scan(c, f->state, f->dim);
    }
    launch(&c->queue, "rglru", gates_kernel<true>, grid, GATE_THREADS, shared, call);
}

bool fused_rglru(struct cuda *c, const struct rglru_front *f)
{
    if (!rglru_possible(f) || gates_shared_bytes(f) > shared_limit(&c->queue))
        return false;
    if (!c->step.decode) {
        prompt_rglru(c, f);
        return true;
    }
    struct rglru_decode d = rglru_decode_of(c, f);
    if (c->step.rows > NORMED_ROWS) {
        d.h = c->converted;
        norm_to_bf16(c, c->converted, f->x, f->norm, f->dim, nullptr, c->step.rows,
                     &c->step.sizes->n_rows);
    }
    launch(&c->queue, "rglru", rglru_item_kernel, dim3(rglru_items(&d)), ITEM_THREADS,
           rglru_shared_bytes(&d), d);
    return true;
}
