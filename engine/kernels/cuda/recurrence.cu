/* recurrence.cu - what makes the latent input: convolution and RG-LRU, with their state.
 *
 * A step of one row per sequence is one pass: the thread that reads a channel's state writes it.
 * Prompts are cut into pieces. The RG-LRU is linear in its state, z_t = a_t z_{t-1} + b_t, so a
 * piece reduces itself to z_out = A z_in + Z; a scan over a sequence's pieces gives each its z_in
 * and the state its end; then every piece runs its rows. What a sequence gets depends on its own
 * pieces alone.
 *
 * c->piece_states holds for piece p: A [D], which the scan replaces by z_in, then Z [D].
 */
#include "engine/kernels/cuda/rglru.cuh"

enum {
    THREADS = 128,
    TILE = 32,       /* rows and columns of block_linear's tiles */
    SCAN_WARPS = 16, /* of a block of the scan */
    SCAN_PIECES = 8, /* that a warp takes at a time */
    SCAN_WINDOW = 8, /* pieces among which a block of the scan looks for sequences */
    GROUP_ROWS = 8,  /* of a piece that a block of the convolution has */
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

/* How a piece lies in its sequence. */
struct rglru_place {
    struct piece piece;
    int32_t slot;
    bool alone;  /* its sequence's only piece */
    bool begins; /* its first row has position 0 */
};

static __device__ __forceinline__ struct rglru_place rglru_place_of(const struct device_step &step,
                                                                    int p)
{
    struct rglru_place at;
    at.piece = step.pieces[p];
    const int start = step.seq_start[at.piece.seq], end = step.seq_start[at.piece.seq + 1];
    at.slot = step.seq_slot[at.piece.seq];
    at.alone = end - start <= PIECE_ROWS;
    at.begins = step.positions[at.piece.row] == 0;
    return at;
}

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

/* each(row, terms) for the rows of a piece. */
template <class Each>
static __device__ __forceinline__ void each_row(const struct rglru_call &c,
                                                const struct rglru_place &at, int i, Each each)
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
    const struct rglru_place at = rglru_place_of(step, p);
    if (at.alone)
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
    const struct rglru_place at = rglru_place_of(step, p);
    float *state = slot_row(c.state, at.slot) + i;
    float z = !at.alone ? c.piece_states[p * c.piece_values + i] : at.begins ? 0 : *state;
    each_row(c, at, i, [&](int r, float2 terms) {
        z = fmaf(terms.x, z, terms.y);
        c.out[(int64_t)(at.piece.row + r) * c.dim + i] = z;
    });
    if (at.alone)
        *state = z;
}

/* z_in of the pieces of one sequence, whose first piece is `first`, and its state: 32 channels. A
 * warp takes SCAN_PIECES, then the warps' products are put together in order. */
static __device__ __forceinline__ void scan_sequence(float2 (&total)[SCAN_WARPS][WARP],
                                                     float *piece_states, int64_t piece_values,
                                                     const struct device_slab<float> &state,
                                                     int dim, const struct device_step &step,
                                                     int first)
{
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const struct rglru_place at = rglru_place_of(step, first);
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
            if (here && from + j < n)
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
    if (here && warp == 0)
        slot_row(state, at.slot)[channel] = base;
}

/* A block has 32 channels of the sequences of several pieces that begin among SCAN_WINDOW
 * pieces: few blocks have nothing to do, few have much. Bytes: 12 D a piece. */
static __global__ void __launch_bounds__(SCAN_WARPS *WARP)
    rglru_scan_kernel(float *piece_states, int64_t piece_values, struct device_slab<float> state,
                      int dim, struct device_step step)
{
    __shared__ float2 total[SCAN_WARPS][WARP];
    pdl_trigger();
    pdl_wait();
    const int lane = threadIdx.x % WARP, p = blockIdx.x * SCAN_WINDOW + lane;
    const bool chained = lane < SCAN_WINDOW && p + 1 < step.sizes->n_pieces &&
                         step.pieces[p].first == p && step.pieces[p + 1].first == p;
    unsigned left = __ballot_sync(0xffffffffu, chained);
    for (; left; left &= left - 1)
        scan_sequence(total, piece_states, piece_values, state, dim, step,
                      blockIdx.x * SCAN_WINDOW + __ffs(left) - 1);
}

void rglru_scan(struct cuda *c, struct device_slab<float> state, int dim)
{
    launch(&c->queue, "rglru", rglru_scan_kernel,
           dim3(ceil_div(c->step.n_pieces, SCAN_WINDOW), ceil_div(dim, WARP)), SCAN_WARPS * WARP, 0,
           c->piece_states, (int64_t)c->piece_values, state, dim, c->step);
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
        rglru_scan(c, call.state, dim);
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
