/* stream.cu - y = W x for up to 16 rows and large bf16 matrices.
 *
 * The weight rows are shared out evenly, to one row, over two blocks of each SM that has room for
 * them: at the end of a tile, a barrier and the results, the other one keeps memory busy. Where
 * rows are long, n_in is cut into slices, whose partial sums a later pass adds in order. Each of a
 * block's 8 warps owns an eighth of the slice's items of 32 columns, keeps the activations of its
 * columns in registers for the whole job, and streams its columns of 16 weight rows at a time
 * through a ring of its own in shared memory: a lane copies the 16 bytes that it later feeds to the
 * tensor cores, so that no barrier is needed until the warps' sums meet, once every 16 rows.
 *
 * Order of sums: a function of the weights' shape, not of the number of rows. Bytes: the weights
 * once, in stages of 24 KB of which a block asks for 72 KB before pdl_wait; activations once a
 * block. Floor: Gemma's gate and up 84.9 MB 27.6 us, down 42.5 MB 13.8 us.
 */
#include "engine/kernels/cuda/stream.cuh"

#include "engine/kernels/cuda/skinny.cuh"

enum {
    STREAM_WARPS = 8,
    STREAM_THREADS = STREAM_WARPS * WARP,
    STREAM_UNIT = 3,    /* items of a stage */
    STREAM_STAGES = 3,  /* in flight */
    STREAM_STEPS = 3,   /* stages of a tile at most; 1: rows are short */
    STREAM_ITEM = 32,   /* columns */
    STREAM_TILE = 16,   /* weight rows */
    STREAM_STRIDE = 20, /* floats of an activation row's sums: spreads the banks */
    STREAM_SLICE = STREAM_WARPS * STREAM_UNIT * STREAM_STEPS, /* items at most */
    STREAM_SLICES = 8,
    STREAM_STAGE = STREAM_UNIT * 2 * WARP, /* uint4 of a warp */
    STREAM_BLOCKS = 2,                     /* of an SM */
    FINISH_THREADS = 256,
};

/* Bytes of weights from which on streaming is the faster way; a norm is a launch more. */
static const int64_t LARGE_BYTES = 8 << 20, LARGE_NORMED_BYTES = 32 << 20;

static int slices_of(int n_in)
{
    return ceil_div(ceil_div(n_in, STREAM_ITEM), STREAM_SLICE);
}

/* A warp's columns of a tile are one stage. */
static bool is_short(int n_in)
{
    return ceil_div(n_in, STREAM_ITEM) <= STREAM_WARPS * STREAM_UNIT;
}

/* A block's rows of the weights. */
struct stream_job {
    int first, n, tile_rows, n_tiles, jump; /* jump: from a tile's 8 low rows to its 8 high ones */
};

static __device__ __forceinline__ struct stream_job stream_job_of(const struct product &p,
                                                                  bool pairs)
{
    struct stream_job j;
    const int64_t n = pairs ? p.w.n_out / 2 : p.w.n_out;
    j.first = (int)(n * blockIdx.x / gridDim.x);
    j.n = (int)(n * (blockIdx.x + 1) / gridDim.x) - j.first;
    j.tile_rows = pairs ? STREAM_TILE / 2 : STREAM_TILE;
    j.n_tiles = (j.n + j.tile_rows - 1) / j.tile_rows;
    j.jump = pairs ? (int)n : STREAM_TILE / 2;
    return j;
}

/* The sum of the warps' parts of a result, in order. */
template <int HALVES>
static __device__ __forceinline__ float stream_sum(const float *sums, int row, int column)
{
    const float *at = sums + row * STREAM_STRIDE + column;
    float y = at[0];
#pragma unroll
    for (int w = 1; w < STREAM_WARPS; w++)
        y += at[w * HALVES * 8 * STREAM_STRIDE];
    return y;
}

/* Of the row whose results the thread has, 16 threads a row; 1 without factors. */
static __device__ __forceinline__ float stream_factor(const struct product &p, int rows)
{
    enum { AT_ONCE = 6 }; /* 768 values in parts of 8 */
    const struct row_factors &f = p.factors;
    if (!f.squares)
        return 1;
    const int any = min((int)threadIdx.x / STREAM_TILE, rows - 1);
    const float *const from = f.squares + (int64_t)(p.in_rows ? p.in_rows[any] : any) * f.n_parts;
    float sum = 0;
    for (int first = threadIdx.x % STREAM_TILE; first < f.n_parts; first += AT_ONCE * STREAM_TILE) {
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++)
            sum += first + k * STREAM_TILE < f.n_parts ? __ldcg(from + first + k * STREAM_TILE) : 0;
    }
#pragma unroll
    for (int o = STREAM_TILE / 2; o; o >>= 1)
        sum += __shfl_xor_sync(0xffffffffu, sum, o);
    return norm_scale(sum, f.n, f.eps);
}

/* Results of a tile: partial sums where there is room for them given. */
template <int HALVES>
static __device__ __forceinline__ void
stream_results(const struct product &p, const struct stream_job &j, bool pairs, float *partials,
               const float *sums, int tile, int rows, float factor)
{
    const int columns = j.tile_rows, n = j.n - tile * columns;
    const int row = threadIdx.x / columns, i = threadIdx.x % columns;
    const int column = j.first + tile * columns + i;
    if (row >= rows || i >= n)
        return;
    float y = stream_sum<HALVES>(sums, row, i) * factor;
    if (partials) {
        partials[((int64_t)blockIdx.y * p.rows + row) * p.w.n_out + column] = y;
        return;
    }
    y += p.w.bias ? p.w.bias[column] : 0;
    if (pairs) {
        const float up = stream_sum<HALVES>(sums, row, i + STREAM_TILE / 2);
        y = activate_value(y, p.act) * (up + (p.w.bias ? p.w.bias[column + j.jump] : 0));
    }
    const int64_t at = row * p.out_stride + column;
    product_store(p, at, y, p.output == OUTPUT_ADD ? ((const float *)p.out)[at] : 0);
}

/* Short rows leave registers for a block of the kernel after. */
template <int HALVES, int STEPS>
static __global__ void __launch_bounds__(STREAM_THREADS, STREAM_BLOCKS + (STEPS == 1))
    stream_kernel(const __grid_constant__ struct product p, float *partials)
{
    constexpr int ITEMS = STREAM_UNIT * STEPS;
    constexpr int SUMS = STREAM_WARPS * HALVES * 8 * STREAM_STRIDE;
    DYNAMIC_SHARED(uint4, shared);
    pdl_trigger();
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const bool pairs = p.output == OUTPUT_ACTIVATE && !partials;
    const struct stream_job job = stream_job_of(p, pairs);
    const int n_in = p.w.n_in, items = (n_in + STREAM_ITEM - 1) / STREAM_ITEM;
    const int slice0 = items * (int)blockIdx.y / (int)gridDim.y;
    const int slice = items * (int)(blockIdx.y + 1) / (int)gridDim.y - slice0;
    const int first = warp * slice / STREAM_WARPS;
    const int n_items = (warp + 1) * slice / STREAM_WARPS - first;
    const int n_steps = (n_items + STREAM_UNIT - 1) / STREAM_UNIT;
    const int lane_column = (slice0 + first) * STREAM_ITEM + 8 * t;
    const int lane_items = min(n_items, (n_in - lane_column + STREAM_ITEM - 1) / STREAM_ITEM);

    uint4 *ring = shared + warp * STREAM_STAGES * STREAM_STAGE + lane;
    const bf16 *low = (const bf16 *)p.w.data + (int64_t)(job.first + g) * n_in + lane_column;
    int ask_tile = n_steps ? 0 : job.n_tiles, ask_step = 0, ask_slot = 0;
    auto ask = [&]() {
        if (ask_tile >= job.n_tiles)
            return;
        const int row = ask_tile * job.tile_rows + g;
        const bool has_low = row < job.n;
        const bool has_high = pairs ? has_low : row + STREAM_TILE / 2 < job.n;
        const bf16 *from =
            low + (int64_t)ask_tile * job.tile_rows * n_in + ask_step * STREAM_UNIT * STREAM_ITEM;
        const bf16 *high = from + (int64_t)job.jump * n_in;
        uint4 *to = ring + ask_slot * STREAM_STAGE;
#pragma unroll
        for (int u = 0; u < STREAM_UNIT; u++) {
            const bool here = ask_step * STREAM_UNIT + u < lane_items;
            copy_async_16(to + 2 * u * WARP, from + u * STREAM_ITEM, here && has_low);
        }
#pragma unroll
        for (int u = 0; u < STREAM_UNIT; u++) {
            const bool here = ask_step * STREAM_UNIT + u < lane_items;
            copy_async_16(to + (2 * u + 1) * WARP, high + u * STREAM_ITEM, here && has_high);
        }
        if (++ask_step == n_steps) {
            ask_step = 0;
            ask_tile++;
        }
        if (++ask_slot == STREAM_STAGES)
            ask_slot = 0;
    };
#pragma unroll
    for (int s = 0; s < STREAM_STAGES; s++) {
        ask();
        copy_async_commit();
    }
    const int rows = min(*p.n_rows, 8 * HALVES); /* there before the wait */

    pdl_wait();

    if (rows <= 0) {
        copy_async_wait<0>();
        return;
    }
    uint4 x[HALVES][ITEMS];
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
        const int row = min(8 * h + g, rows - 1);
        const bf16 *in = (const bf16 *)p.in + (p.in_rows ? p.in_rows[row] : row) * p.in_stride;
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            x[h][i] = make_uint4(0, 0, 0, 0);
            if (i < lane_items && 8 * h + g < rows)
                x[h][i] = *reinterpret_cast<const uint4 *>(in + lane_column + i * STREAM_ITEM);
        }
    }

    float *const all_sums = (float *)(shared + STREAM_WARPS * STREAM_STAGES * STREAM_STAGE);
    const float factor = stream_factor(p, rows);
    int slot = 0;
    for (int tile = 0; tile < job.n_tiles; tile++) {
        float sum[2][HALVES][4] = {}; /* two chains */
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            if (s >= n_steps)
                break;
            copy_async_wait<STREAM_STAGES - 1>();
            const uint4 *weights = ring + slot * STREAM_STAGE;
#pragma unroll
            for (int u = 0; u < STREAM_UNIT; u++) {
                const uint4 a = weights[2 * u * WARP], b = weights[(2 * u + 1) * WARP];
                const uint32_t a0[4] = {a.x, b.x, a.y, b.y}, a1[4] = {a.z, b.z, a.w, b.w};
#pragma unroll
                for (int h = 0; h < HALVES; h++) {
                    const uint4 in = x[h][s * STREAM_UNIT + u];
                    const uint32_t x0[2] = {in.x, in.y}, x1[2] = {in.z, in.w};
                    mma_bf16(sum[0][h], a0, x0);
                    mma_bf16(sum[1][h], a1, x1);
                }
            }
            ask();
            copy_async_commit();
            if (++slot == STREAM_STAGES)
                slot = 0;
        }
        /* Turns about, so that one barrier a tile is enough. */
        float *const sums = all_sums + tile % 2 * SUMS;
        float *const mine = sums + (warp * HALVES * 8 + 2 * t) * STREAM_STRIDE + g;
#pragma unroll
        for (int h = 0; h < HALVES; h++)
#pragma unroll
            for (int k = 0; k < 4; k++)
                mine[(8 * h + k % 2) * STREAM_STRIDE + k / 2 * 8] = sum[0][h][k] + sum[1][h][k];
        __syncthreads();
        stream_results<HALVES>(p, job, pairs, partials, sums, tile, rows, factor);
    }
}

/* Results from partial sums. */
static __global__ void stream_finish_kernel(const struct product p, const float *partials,
                                            int n_parts)
{
    pdl_trigger();
    pdl_wait();
    const bool pairs = p.output == OUTPUT_ACTIVATE;
    const int row = blockIdx.x, column = blockIdx.y * FINISH_THREADS + threadIdx.x;
    const int n = pairs ? p.w.n_out / 2 : p.w.n_out;
    if (row >= *p.n_rows || column >= n)
        return;
    float y[2] = {0, 0};
    for (int k = 0; k < (pairs ? 2 : 1); k++) {
        const float *from = partials + (int64_t)row * p.w.n_out + column + k * n;
        for (int i = 0; i < n_parts; i++)
            y[k] += from[(int64_t)i * p.rows * p.w.n_out];
        y[k] += p.w.bias ? p.w.bias[column + k * n] : 0;
    }
    const int64_t at = row * p.out_stride + column;
    product_store(p, at, pairs ? activate_value(y[0], p.act) * y[1] : y[0],
                  p.output == OUTPUT_ADD ? ((const float *)p.out)[at] : 0);
}

static bool possible(const struct product *p)
{
    return p->rows <= STREAM_ROWS && p->w.dtype == DTYPE_BF16 && !p->norm.weight &&
           skinny_possible(p) && slices_of(p->w.n_in) <= STREAM_SLICES;
}

static bool has_room(const struct cuda *c, const struct product *p, int n_parts)
{
    return (size_t)n_parts * p->rows * p->w.n_out <= c->partial_values;
}

template <int HALVES, int STEPS>
static void run(struct cuda *c, const struct product *p, float *partials, int n_parts)
{
    const size_t shared = STREAM_WARPS * (STREAM_STAGES * STREAM_STAGE * sizeof(uint4) +
                                          2 * HALVES * 8 * STREAM_STRIDE * sizeof(float));
    enum { RESERVED = 1024 }; /* of an SM's shared memory, for each block */
    const bool have_room =
        STREAM_BLOCKS * (shared + RESERVED) <= shared_limit(&c->queue) + RESERVED;
    const int n_blocks = c->queue.n_sms * (have_room ? STREAM_BLOCKS : 1) / n_parts;
    launch(&c->queue, "stream_product", stream_kernel<HALVES, STEPS>,
           dim3(n_blocks < 1 ? 1 : n_blocks, n_parts), STREAM_THREADS, shared, *p, partials);
}

template <int STEPS>
static void run_rows(struct cuda *c, const struct product *p, float *partials, int n_parts)
{
    if (p->rows <= 8)
        run<1, STEPS>(c, p, partials, n_parts);
    else
        run<2, STEPS>(c, p, partials, n_parts);
}

static void run_steps(struct cuda *c, const struct product *p, float *partials, int n_parts)
{
    if (is_short(p->w.n_in))
        run_rows<1>(c, p, partials, n_parts);
    else
        run_rows<STREAM_STEPS>(c, p, partials, n_parts);
}

bool stream_product(struct cuda *c, const struct product *p)
{
    const int n_parts = slices_of(p->w.n_in);
    if (!possible(p) || (n_parts > 1 && !has_room(c, p, n_parts)))
        return false;
    run_steps(c, p, n_parts > 1 ? c->partials : nullptr, n_parts);
    if (n_parts > 1)
        launch(&c->queue, "stream_finish", stream_finish_kernel,
               dim3(p->rows, ceil_div(p->w.n_out, FINISH_THREADS)), FINISH_THREADS, 0, *p,
               (const float *)c->partials, n_parts);
    return true;
}

static bool is_large(const struct cuda *c, const struct product *p)
{
    const int64_t n_bytes = (int64_t)p->w.n_out * p->w.n_in * (int)sizeof(bf16);
    return !c->queue.deterministic && c->queue.capability >= 90 && p->w.n_in >= 512 &&
           n_bytes >= (p->norm.weight ? LARGE_NORMED_BYTES : LARGE_BYTES);
}

bool stream_factors(const struct cuda *c, const struct product *p)
{
    struct product bare = *p;
    bare.norm = {};
    return p->output == OUTPUT_F32 && slices_of(p->w.n_in) == 1 && is_large(c, p) &&
           possible(&bare);
}

bool stream_large(struct cuda *c, const struct product *p)
{
    struct product bare = *p;
    bare.norm = {};
    if (!is_large(c, p) || !possible(&bare) || !skinny_possible(p) ||
        (slices_of(p->w.n_in) > 1 && !has_room(c, p, slices_of(p->w.n_in))))
        return false;
    const struct product normed = product_without_norm(c, p);
    return stream_product(c, &normed);
}

int stream_partial_sums(struct cuda *c, const struct product *p)
{
    const int n_parts = slices_of(p->w.n_in);
    if (!is_large(c, p) || !possible(p) || p->w.bias || !has_room(c, p, n_parts))
        return 0;
    run_steps(c, p, c->partials, n_parts);
    return n_parts;
}

size_t stream_partials(const struct backend_options *options)
{
    const struct model_config *config = options->config;
    const int rows = options->max_rows < STREAM_ROWS ? options->max_rows : STREAM_ROWS;
    const int D = config->hidden_size, F = config->intermediate_size;
    const int up = slices_of(D), down = slices_of(F),
              o = slices_of(config->n_heads * config->head_dim);
    const int ins[] = {D, F, config->n_heads * config->head_dim};
    for (int n_in : ins)
        if (slices_of(n_in) > STREAM_SLICES)
            return 0;
    const size_t to_model = (size_t)(down > o ? down : o) * D;
    const size_t to_mlp = up > 1 ? (size_t)up * 2 * F : 0;
    return (size_t)rows * (to_model > to_mlp ? to_model : to_mlp);
}
