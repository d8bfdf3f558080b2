/* recurrence.cu - what makes the latent input: convolution and RG-LRU, with their state.
 *
 * A step of one row per sequence is one pass: the thread that reads a channel's state writes it.
 * Prompts are cut into pieces. The RG-LRU is linear in its state, z_t = a_t z_{t-1} + b_t, so a
 * piece that is not its sequence's last reduces itself to z_out = A z_in + Z; a scan over a
 * sequence's pieces gives each its z_in; then every piece runs its rows. What a sequence gets
 * depends on its own pieces alone.
 *
 * c->piece_states holds for piece p: A [D], which the scan replaces by z_in, then Z [D].
 */
#include "engine/kernels/cuda/rglru.cuh"

enum {
    THREADS = 128,
    TILE = 32,         /* rows and columns of block_linear's tiles */
    SCAN_WARPS = 16,   /* of a block of the scan */
    SCAN_PIECES = 8,   /* that a warp takes at a time */
    NORMED_ROWS = 192, /* a launch of its own for norms pays above so many decode rows */
    GROUP_ROWS = 8,    /* of a piece that a block of the convolution has */
};

/* ---- convolution, P(eq 15) ---- */

struct conv_call {
    float *out;
    const float *in, *weight, *bias;
    struct device_slab<float> state;
    int dim, n_taps;
};

static __device__ __forceinline__ float *slot_row(const struct device_slab<float> &slab,
                                                  int32_t slot)
{
    return slab.data + (int64_t)slot * slab.row_values;
}

/* Row t rows after a sequence's first: of the step, of the state [K-1, D], or before position 0,
 * which is zero. */
static __device__ __forceinline__ float conv_row(const struct conv_call &c, const float *in,
                                                 const float *state, int64_t t, int64_t position0,
                                                 int i)
{
    if (t >= 0)
        return in[t * c.dim + i];
    return position0 + t >= 0 ? state[(t + c.n_taps - 1) * c.dim + i] : 0;
}

static __device__ __forceinline__ float conv_value(const struct conv_call &c, const float *in,
                                                   const float *state, int64_t t, int64_t position0,
                                                   int i)
{
    float sum = 0;
    for (int k = 0; k < c.n_taps; k++)
        sum = fmaf(__ldg(c.weight + (int64_t)i * c.n_taps + k),
                   conv_row(c, in, state, t - k, position0, i), sum);
    return c.bias ? sum + __ldg(c.bias + i) : sum;
}

/* The last K-1 rows, oldest first: a row is read before it is overwritten. */
static __device__ __forceinline__ void conv_store(const struct conv_call &c, const float *in,
                                                  float *state, int n_rows, int64_t position0,
                                                  int i)
{
    for (int j = 0; j < c.n_taps - 1; j++)
        state[(int64_t)j * c.dim + i] =
            conv_row(c, in, state, n_rows - (c.n_taps - 1) + j, position0, i);
}

/* One row per sequence: (4 K + 8) D bytes of rows and state. */
static __global__ void __launch_bounds__(THREADS)
    conv_decode_kernel(struct conv_call c, const int64_t *positions, const int32_t *seq_slot,
                       const int32_t *n_rows)
{
    pdl_trigger();
    pdl_wait();
    const int r = blockIdx.x, i = blockIdx.y * THREADS + threadIdx.x;
    if (r >= *n_rows || i >= c.dim)
        return;
    float *state = slot_row(c.state, seq_slot[r]);
    const float *in = c.in + (int64_t)r * c.dim;
    c.out[(int64_t)r * c.dim + i] = conv_value(c, in, state, 0, positions[r], i);
    conv_store(c, in, state, 1, positions[r], i);
}

static __global__ void __launch_bounds__(THREADS)
    conv_rows_kernel(struct conv_call c, struct device_step step)
{
    pdl_trigger();
    pdl_wait();
    const int i = blockIdx.y * THREADS + threadIdx.x;
    if ((int)blockIdx.x >= step.sizes->n_pieces || i >= c.dim)
        return;
    const struct piece piece = step.pieces[blockIdx.x];
    const int row0 = step.seq_start[piece.seq];
    const float *state = slot_row(c.state, step.seq_slot[piece.seq]);
    const float *in = c.in + (int64_t)row0 * c.dim;
    const int first = blockIdx.z * GROUP_ROWS;
    const int end = first + GROUP_ROWS < piece.n_rows ? first + GROUP_ROWS : piece.n_rows;
    for (int r = piece.row + first; r < piece.row + end; r++)
        c.out[(int64_t)r * c.dim + i] = conv_value(c, in, state, r - row0, step.positions[row0], i);
}

/* A kernel of its own: every piece of the sequence may still read the old state before. */
static __global__ void __launch_bounds__(THREADS)
    conv_state_kernel(struct conv_call c, struct device_step step)
{
    pdl_trigger();
    pdl_wait();
    const int seq = blockIdx.x, i = blockIdx.y * THREADS + threadIdx.x;
    if (seq >= step.sizes->n_seqs || i >= c.dim)
        return;
    const int row0 = step.seq_start[seq];
    conv_store(c, c.in + (int64_t)row0 * c.dim, slot_row(c.state, step.seq_slot[seq]),
               step.seq_start[seq + 1] - row0, step.positions[row0], i);
}

static struct device_slab<float> on_device(const struct slab *slab) {
    return {floats(slab->buffer), slab->row_values};
}

void cuda_conv(struct backend *b, struct buffer *out, const struct buffer *in,
               const struct buffer *weight, const struct buffer *bias, const struct slab *state,
               int dim, int n_taps)
{
    struct cuda *c = cuda_of(b);
    const struct device_step *step = &c->step;
    const struct conv_call call = {floats(out),      floats(in), floats(weight), floats(bias),
                                   on_device(state), dim,        n_taps};
    const unsigned columns = (unsigned)ceil_div(dim, THREADS);
    if (step->decode) {
        launch(&c->queue, "conv", conv_decode_kernel, dim3(step->rows, columns), THREADS, 0, call,
               step->positions, step->seq_slot, &step->sizes->n_rows);
        return;
    }
    launch(&c->queue, "conv", conv_rows_kernel,
           dim3(step->n_pieces, columns, PIECE_ROWS / GROUP_ROWS), THREADS, 0, call, *step);
    if (n_taps > 1)
        launch(&c->queue, "conv", conv_state_kernel, dim3(step->seqs, columns), THREADS, 0, call,
               *step);
}

/* ---- RG-LRU, gates given ---- */

struct rglru_call {
    float *out;
    const float *in, *recurrence, *input, *lambda;
    struct device_slab<float> state;
    float *piece_states;
    int64_t piece_values;
    int dim;
};

/* z_t = a z_{t-1} + b; rate = -8 softplus(lambda). */
static __device__ __forceinline__ float2 exact_terms(float r, float i, float h, float rate,
                                                     bool begins)
{
    const float log_a = rate * sigmoid(r), gated = sigmoid(i) * h;
    if (begins)
        return make_float2(0, gated);
    return make_float2(expf(log_a), sqrtf(-expm1f(2 * log_a)) * gated);
}

static __device__ __forceinline__ float exact_rate(float lambda)
{
    return -8 * (lambda > 20 ? lambda : log1pf(expf(lambda)));
}

static __device__ __forceinline__ float2 terms_at(const struct rglru_call &c, int64_t row, int i,
                                                  float rate, bool begins)
{
    const int64_t at = row * c.dim + i;
    return exact_terms(c.recurrence[at], c.input[at], c.in[at], rate, begins);
}

/* Bytes a row: 4 D each of two gates, h, z, and the state twice. */
static __global__ void __launch_bounds__(THREADS)
    rglru_decode_kernel(struct rglru_call c, const int64_t *positions, const int32_t *seq_slot,
                        const int32_t *n_rows)
{
    pdl_trigger();
    pdl_wait();
    const int r = blockIdx.x, i = blockIdx.y * THREADS + threadIdx.x;
    if (r >= *n_rows || i >= c.dim)
        return;
    const bool begins = positions[r] == 0;
    float *state = slot_row(c.state, seq_slot[r]) + i;
    const float past = begins ? 0 : *state; /* a fresh slot may hold anything */
    const float2 terms = terms_at(c, r, i, exact_rate(__ldg(c.lambda + i)), begins);
    const float z = fmaf(terms.x, past, terms.y);
    *state = z;
    c.out[(int64_t)r * c.dim + i] = z;
}

/* How a piece lies in its sequence. */
struct place {
    struct piece piece;
    int32_t slot;
    bool alone, last; /* its sequence's only piece; its last */
    bool begins;      /* its first row has position 0 */
};

static __device__ __forceinline__ struct place place_of(const struct device_step &step, int p)
{
    struct place at;
    at.piece = step.pieces[p];
    const int start = step.seq_start[at.piece.seq], end = step.seq_start[at.piece.seq + 1];
    at.slot = step.seq_slot[at.piece.seq];
    at.alone = end - start <= PIECE_ROWS;
    at.last = at.piece.row + at.piece.n_rows == end;
    at.begins = step.positions[at.piece.row] == 0;
    return at;
}

/* Rows of a piece from z on; the last z. */
template <class Each>
static __device__ __forceinline__ void each_row(const struct rglru_call &c, const struct place &at,
                                                int i, Each each)
{
    const float rate = exact_rate(__ldg(c.lambda + i));
#pragma unroll 4
    for (int r = 0; r < at.piece.n_rows; r++)
        each(r, terms_at(c, at.piece.row + r, i, rate, at.begins && r == 0));
}

static __global__ void __launch_bounds__(THREADS)
    rglru_reduce_kernel(struct rglru_call c, struct device_step step)
{
    pdl_trigger();
    pdl_wait();
    const int p = blockIdx.x, i = blockIdx.y * THREADS + threadIdx.x;
    if (p >= step.sizes->n_pieces || i >= c.dim)
        return;
    const struct place at = place_of(step, p);
    if (at.last)
        return;
    float a = 1, z = 0;
    each_row(c, at, i, [&](int, float2 terms) {
        a *= terms.x;
        z = fmaf(terms.x, z, terms.y);
    });
    float *state = c.piece_states + p * c.piece_values + i;
    state[0] = a;
    state[c.dim] = z;
}

static __global__ void __launch_bounds__(THREADS)
    rglru_rows_kernel(struct rglru_call c, struct device_step step)
{
    pdl_trigger();
    pdl_wait();
    const int p = blockIdx.x, i = blockIdx.y * THREADS + threadIdx.x;
    if (p >= step.sizes->n_pieces || i >= c.dim)
        return;
    const struct place at = place_of(step, p);
    float *state = slot_row(c.state, at.slot) + i;
    float z = !at.alone ? c.piece_states[p * c.piece_values + i] : at.begins ? 0 : *state;
    each_row(c, at, i, [&](int r, float2 terms) {
        z = fmaf(terms.x, z, terms.y);
        c.out[(int64_t)(at.piece.row + r) * c.dim + i] = z;
    });
    if (at.last)
        *state = z;
}

/* z_in of every piece of the sequences that have several. A block has 32 channels of one
 * sequence, found by its first piece; a warp takes SCAN_PIECES of its pieces, then the warps'
 * products are put together in order. Bytes: 12 D a piece. */
static __global__ void __launch_bounds__(SCAN_WARPS *WARP)
    rglru_scan_kernel(float *piece_states, int64_t piece_values, struct device_slab<float> state,
                      int dim, struct device_step step)
{
    __shared__ float2 total[SCAN_WARPS][WARP];
    pdl_trigger();
    pdl_wait();
    const int first = blockIdx.x, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    if (first >= step.sizes->n_pieces || step.pieces[first].first != first)
        return;
    const struct place at = place_of(step, first);
    if (at.alone)
        return;
    const int seq = at.piece.seq, channel = blockIdx.y * WARP + lane;
    const bool here = channel < dim;
    const int n = (step.seq_start[seq + 1] - step.seq_start[seq] + PIECE_ROWS - 1) / PIECE_ROWS;
    float base = 0;
    if (here && !at.begins)
        base = slot_row(state, at.slot)[channel];

    for (int done = 0; done < n; done += SCAN_WARPS * SCAN_PIECES) {
        const int from = done + warp * SCAN_PIECES;
        float *const states = piece_states + (first + from) * piece_values + channel;
        float2 terms[SCAN_PIECES], sum = make_float2(1, 0);
#pragma unroll
        for (int j = 0; j < SCAN_PIECES; j++) {
            terms[j] = make_float2(1, 0);
            if (here && from + j < n - 1)
                terms[j] = make_float2(states[j * piece_values], states[j * piece_values + dim]);
        }
#pragma unroll
        for (int j = 0; j < SCAN_PIECES; j++) {
            sum.y = fmaf(terms[j].x, sum.y, terms[j].y);
            sum.x *= terms[j].x;
        }
        total[warp][lane] = sum;
        __syncthreads();
        float z = base;
        for (int w = 0; w < SCAN_WARPS; w++) {
            const float2 t = total[w][lane];
            if (w < warp)
                z = fmaf(t.x, z, t.y);
            base = fmaf(t.x, base, t.y);
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < SCAN_PIECES; j++) {
            if (here && from + j < n)
                states[j * piece_values] = z;
            z = fmaf(terms[j].x, z, terms[j].y);
        }
    }
}

static void scan_pieces(struct cuda *c, struct device_slab<float> state, int dim)
{
    launch(&c->queue, "rglru", rglru_scan_kernel, dim3(c->step.n_pieces, ceil_div(dim, WARP)),
           SCAN_WARPS * WARP, 0, c->piece_states, (int64_t)c->piece_values, state, dim, c->step);
}

void cuda_rglru(struct backend *b, struct buffer *out, const struct buffer *in,
                const struct buffer *recurrence, const struct buffer *input,
                const struct buffer *lambda, const struct slab *state, int dim)
{
    struct cuda *c = cuda_of(b);
    const struct device_step *step = &c->step;
    const struct rglru_call call = {floats(out),
                                    floats(in),
                                    floats(recurrence),
                                    floats(input),
                                    floats(lambda),
                                    on_device(state),
                                    c->piece_states,
                                    (int64_t)c->piece_values,
                                    dim};
    const unsigned columns = (unsigned)ceil_div(dim, THREADS);
    if (step->decode) {
        launch(&c->queue, "rglru", rglru_decode_kernel, dim3(step->rows, columns), THREADS, 0, call,
               step->positions, step->seq_slot, &step->sizes->n_rows);
        return;
    }
    const dim3 grid(step->n_pieces, columns);
    if (step->rows > PIECE_ROWS) {
        launch(&c->queue, "rglru", rglru_reduce_kernel, grid, THREADS, 0, call, *step);
        scan_pieces(c, call.state, dim);
    }
    launch(&c->queue, "rglru", rglru_rows_kernel, grid, THREADS, 0, call, *step);
}

/* ---- block-diagonal products ---- */

struct block_call {
    float *out;
    const float *in, *weight, *bias;
    int dim, width;
};

/* f32 with sums in order of k. A block has 32 rows and 32 columns of one diagonal block; warp w
 * has rows w, w + 8, ..., a lane a column. Bytes: 4 D a row per 32 columns of a block, and the
 * weights per 32 rows. */
static __global__ void __launch_bounds__(8 * WARP)
    block_linear_kernel(struct block_call c, const int32_t *actual)
{
    __shared__ float x[TILE][TILE + 1], w[TILE][TILE + 1];
    pdl_trigger();
    pdl_wait();
    const int tiles = (c.width + TILE - 1) / TILE, n_rows = *actual;
    const int row0 = blockIdx.x * TILE;
    const int first = blockIdx.y / tiles * c.width, out0 = blockIdx.y % tiles * TILE;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    if (row0 >= n_rows)
        return;
    float sum[4] = {0, 0, 0, 0};
    for (int k0 = 0; k0 < c.width; k0 += TILE) {
        const int k = k0 + lane;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int i = warp + 8 * j, row = row0 + i, o = out0 + i;
            x[i][lane] = row < n_rows && k < c.width ? c.in[(int64_t)row * c.dim + first + k] : 0;
            w[i][lane] = o < c.width && k < c.width
                             ? __ldg(c.weight + (int64_t)(first + o) * c.width + k)
                             : 0;
        }
        __syncthreads();
        if (row0 + warp < n_rows) {
#pragma unroll 8
            for (int i = 0; i < TILE; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++)
                    sum[j] = fmaf(x[warp + 8 * j][i], w[lane][i], sum[j]);
            }
        }
        __syncthreads();
    }
    const int o = out0 + lane;
    for (int j = 0; j < 4; j++) {
        const int row = row0 + warp + 8 * j;
        if (row < n_rows && o < c.width)
            c.out[(int64_t)row * c.dim + first + o] =
                c.bias ? sum[j] + __ldg(c.bias + first + o) : sum[j];
    }
}

void cuda_block_linear(struct backend *b, struct buffer *out, const struct buffer *in,
                       const struct buffer *weight, const struct buffer *bias, int dim,
                       int n_blocks)
{
    struct cuda *c = cuda_of(b);
    const struct block_call call = {floats(out),  floats(in), floats(weight),
                                    floats(bias), dim,        dim / n_blocks};
    launch(&c->queue, "block_linear", block_linear_kernel,
           dim3(ceil_div(c->step.rows, TILE), n_blocks * ceil_div(call.width, TILE)), 8 * WARP, 0,
           call, &c->step.sizes->n_rows);
}

/* ---- RG-LRU from the residual stream ---- */

static __global__ void __launch_bounds__(2 * THREADS) rglru_item_kernel(struct rglru_decode d)
{
    DYNAMIC_SHARED(unsigned char, shared);
    pdl_trigger();
    rglru_item(d, blockIdx.x, shared);
}

/* Prompts: h is normed once, as bf16; then tiles of rows x channels of a block of the gates,
 * twice: to reduce pieces, and after the scan to run them. Recomputing the products is cheaper
 * than storing their 8 D bytes a row. Bytes a row at D = 768: x 3 KB, h 1.5 KB written and read
 * twice per 48 channels of a block (L2), z 3 KB: floor 17 us for 8,192 rows. */
enum {
    GATE_TILES = 6, /* of 8 channels, that a block has */
    GATE_CHANNELS = 8 * GATE_TILES,
    GATE_ROWS = PIECE_ROWS,                   /* of a tile: a piece, or several short ones */
    GATE_THREADS = 2 * GATE_ROWS / 16 * WARP, /* a warp has 16 rows and half of the channels */
    TERM_STRIDE = 56, /* float2 a row of terms: 8 more than a multiple of 16 spreads the banks */
};

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

/* Constants of the two channels a lane has in each of its tiles. */
struct gates_lane {
    float2 rate, r_bias, i_bias;
};

/* terms[row][channel] = a, b of the tile's rows. */
static __device__ __forceinline__ void tile_terms(float2 *terms, const struct gates_call &c,
                                                  const struct gates_tile &t, const bf16 *h,
                                                  const bf16 *recurrence, const bf16 *input,
                                                  const struct gates_lane lanes[GATE_TILES / 2],
                                                  int out0, int n_tiles, int stride)
{
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int row0 = warp / 2 * 16, tile0 = warp % 2 * (GATE_TILES / 2);
    if (row0 >= t.n_rows)
        return;
    bool begins[2];
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const int row = row0 + lane / 4 + 8 * j;
        begins[j] = row < t.n_rows && c.step.positions[t.row + row] == 0;
    }
#pragma unroll
    for (int n = 0; n < GATE_TILES / 2; n++) {
        const int tile = tile0 + n, channel = 8 * tile + lane % 4 * 2;
        if (tile >= n_tiles)
            break;
        float r[4], i[4];
        rglru_products(r, i, h + row0 * stride, recurrence + 8 * tile * stride,
                       input + 8 * tile * stride, stride);
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int row = row0 + lane / 4 + 8 * j;
            const float2 x = __bfloat1622float2(
                *reinterpret_cast<const __nv_bfloat162 *>(h + row * stride + out0 + channel));
            const float2 u = rglru_terms(r[2 * j] + lanes[n].r_bias.x, i[2 * j] + lanes[n].i_bias.x,
                                         x.x, lanes[n].rate.x, begins[j]);
            const float2 v =
                rglru_terms(r[2 * j + 1] + lanes[n].r_bias.y, i[2 * j + 1] + lanes[n].i_bias.y, x.y,
                            lanes[n].rate.y, begins[j]);
            *reinterpret_cast<float4 *>(terms + row * TERM_STRIDE + channel) =
                make_float4(u.x, u.y, v.x, v.y);
        }
    }
}

/* A and Z of one channel of a piece, whose terms begin at `terms`. */
static __device__ __forceinline__ void reduce_piece(const struct gates_call &c, int p,
                                                    const struct place &at, const float2 *terms,
                                                    int channel)
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
                                                 const struct place &at, const float2 *terms,
                                                 int channel)
{
    float *state = slot_row(c.f.state, at.slot) + channel;
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
static __global__ void __launch_bounds__(GATE_THREADS) gates_kernel(struct gates_call c)
{
    DYNAMIC_SHARED(unsigned char, shared);
    const struct rglru_front &f = c.f;
    const int width = f.dim / f.n_blocks, stride = rglru_stride(width);
    const int groups = (width + GATE_CHANNELS - 1) / GATE_CHANNELS;
    const int first = blockIdx.x / groups * width, out0 = blockIdx.x % groups * GATE_CHANNELS;
    const int channels = width - out0 < GATE_CHANNELS ? width - out0 : GATE_CHANNELS;
    float2 *const terms = reinterpret_cast<float2 *>(shared);
    bf16 *const h = reinterpret_cast<bf16 *>(terms + GATE_ROWS * TERM_STRIDE);
    bf16 *const recurrence = h + GATE_ROWS * stride, *const input =
                                                         recurrence + GATE_CHANNELS * stride;
    pdl_trigger();

    const size_t weights = (size_t)(first + out0) * width;
    rglru_stage(recurrence, f.recurrence_gate + weights, channels, width, stride);
    rglru_stage(input, f.input_gate + weights, channels, width, stride);
    for (int r = threadIdx.x; r < GATE_ROWS; r += GATE_THREADS)
        for (int i = width; i < stride - 8; i++)
            h[r * stride + i] = __float2bfloat16_rn(0);
    struct gates_lane lanes[GATE_TILES / 2];
#pragma unroll
    for (int n = 0; n < GATE_TILES / 2; n++) {
        const int tile = threadIdx.x / WARP % 2 * (GATE_TILES / 2) + n;
        const int channel = first + out0 + 8 * tile + threadIdx.x % 4 * 2;
        lanes[n] = {};
        if (8 * tile < channels) {
            const float2 lambda = __ldg(reinterpret_cast<const float2 *>(f.lambda + channel));
            lanes[n].rate = make_float2(rglru_rate(lambda.x), rglru_rate(lambda.y));
            lanes[n].r_bias = bias_pair(f.recurrence_bias, channel);
            lanes[n].i_bias = bias_pair(f.input_bias, channel);
        }
    }

    pdl_wait();
    const int n_pieces = c.step.sizes->n_pieces, p0 = blockIdx.y * c.block_pieces;
    if (p0 >= n_pieces)
        return;
    const int end = p0 + c.block_pieces < n_pieces ? p0 + c.block_pieces : n_pieces;
    struct gates_tile t = next_tile(c, p0, end, !LAST);
    fetch_tile(h, c, t, first, width, stride);
    const int mine = threadIdx.x % GATE_CHANNELS, nth = threadIdx.x / GATE_CHANNELS;
    const int n_threads = GATE_THREADS / GATE_CHANNELS;
    while (t.n) {
        copy_async_wait<0>();
        __syncthreads();
        tile_terms(terms, c, t, h, recurrence, input, lanes, out0, channels / 8, stride);
        __syncthreads();
        const struct gates_tile next = next_tile(c, t.first + t.n, end, !LAST);
        if (next.n)
            fetch_tile(h, c, next, first, width, stride);
        for (int n = nth; n < t.n && mine < channels && nth < n_threads; n += n_threads) {
            const struct place at = place_of(c.step, t.first + n);
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

/* What a block may have of shared memory. */
static size_t most_shared_bytes(const struct queue *q)
{
    const int kilobytes = q->capability == 90                          ? 227
                          : q->capability == 80 || q->capability == 87 ? 163
                                                                       : 99;
    return (size_t)kilobytes * 1024;
}

/* Pieces for a block: so that the grid fits the device at once, and weights are converted for
 * several pieces. */
static int block_pieces(const struct cuda *c, int columns, size_t shared_bytes)
{
    const int fit = (int)(most_shared_bytes(&c->queue) / (shared_bytes + 1024));
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
        scan_pieces(c, f->state, f->dim);
    }
    launch(&c->queue, "rglru", gates_kernel<true>, grid, GATE_THREADS, shared, call);
}

bool fused_rglru(struct cuda *c, const struct rglru_front *f)
{
    if (!rglru_possible(f) || gates_shared_bytes(f) > most_shared_bytes(&c->queue))
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
    launch(&c->queue, "rglru", rglru_item_kernel, dim3(rglru_items(&d)), 2 * THREADS,
           rglru_shared_bytes(&d), d);
    return true;
}
