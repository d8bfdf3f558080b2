/* stream.cu - y = W x for few rows and large matrices: up to 16 rows of bf16 weights, 64 of int8.
 *
 * The weight rows are shared out evenly, to one row, over two blocks of each SM that has room for
 * them: at the end of a tile, a barrier and the results, the other one keeps memory busy. Where
 * rows are long, n_in is cut into slices, whose partial sums a later pass adds in order. Each of a
 * block's 8 warps owns an eighth of the slice's items of 64 bytes of a weight row, keeps the
 * activations of its columns in registers for the whole job, and streams its columns of 16 weight
 * rows at a time through a ring of its own in shared memory: a lane copies the 16 bytes that it
 * later feeds to the tensor cores, so that no barrier is needed until the warps' sums meet, once
 * every 16 rows. int8 weights become bf16 on the way, exactly; results are multiplied by their
 * row's scale. Above 16 rows of activations each 16 have blocks of their own, which read the same
 * weights at about the same time: memory gives them once. With int8 that is still faster than what
 * the library needs, weights in bf16.
 *
 * Order of sums: a function of the weights' shape, not of the number of rows. Bytes: the weights
 * once, of which a block asks for 64 to 80 KB before pdl_wait; activations once a block. Floor:
 * Gemma's gate and up 84.9 MB 27.6 us, down 42.5 MB 13.8 us; int8 half of it.
 */
#include "engine/kernels/cuda/stream.cuh"

#include "engine/kernels/cuda/skinny.cuh"

enum {
    STREAM_WARPS = 8,
    STREAM_THREADS = STREAM_WARPS * WARP,
    STREAM_TILE = 16,   /* weight rows */
    STREAM_STRIDE = 20, /* floats of an activation row's sums: spreads the banks */
    STREAM_SLICES = 8,
    STREAM_BLOCKS = 2, /* of an SM */
    FINISH_THREADS = 256,
};

/* How weights of type W go through a warp's ring; SHORT: where rows are. Of int8 there is a stage
 * to a tile: what a stage takes besides its products is half as much a byte then. */
template <class W, bool SHORT> struct stream_shape {
    static constexpr bool NARROW = sizeof(W) == 1;
    static constexpr int COLUMNS = 64 / (int)sizeof(W); /* of an item */
    static constexpr int PIECES = COLUMNS / 32; /* 16 bytes of activations, for a lane's row */
    static constexpr int UNIT = !NARROW ? 3 : SHORT ? 2 : 5;   /* items of a stage */
    static constexpr int STAGES = !NARROW ? 3 : SHORT ? 4 : 2; /* in flight */
    static constexpr int STEPS = NARROW || SHORT ? 1 : 3;      /* stages of a tile at most */
    static constexpr int SLICE = STREAM_WARPS * UNIT * STEPS * COLUMNS; /* of a row, at most */
    static constexpr int STAGE = UNIT * 2 * WARP;                       /* uint4 of a warp */
};

template <class W> static int slices_of(int n_in)
{
    return ceil_div(n_in, stream_shape<W, false>::SLICE);
}

static int slices_of(const struct product_weight *w)
{
    return w->dtype == DTYPE_I8 ? slices_of<int8_t>(w->n_in) : slices_of<bf16>(w->n_in);
}

/* Values of a matrix from which on streaming is the faster way; a norm is a launch more. */
static const int64_t LARGE_VALUES = 4 << 20, LARGE_NORMED_VALUES = 16 << 20;

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
static __device__ __forceinline__ float stream_factor(const struct product &p, int row0, int rows)
{
    enum { AT_ONCE = 6 }; /* 768 values in parts of 8 */
    const struct row_factors &f = p.factors;
    if (!f.squares)
        return 1;
    const int any = row0 + min((int)threadIdx.x / STREAM_TILE, rows - 1);
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

/* The result of a tile that the thread has: of one row of activations, in one column and, where
 * they come in pairs, one `jump` further on. */
struct stream_result {
    int row, i, column; /* i: of the tile */
    bool here;
    float scale, up_scale; /* the weights' */
};

template <class W>
static __device__ __forceinline__ struct stream_result
stream_result_of(const struct product &p, const struct stream_job &j, bool pairs, int tile,
                 int rows)
{
    struct stream_result r;
    r.row = threadIdx.x / j.tile_rows;
    r.i = threadIdx.x % j.tile_rows;
    r.column = j.first + tile * j.tile_rows + r.i;
    r.here = r.row < rows && r.i < j.n - tile * j.tile_rows;
    r.scale = r.up_scale = 1;
    if (sizeof(W) == 1 && r.here)
        r.scale = p.w.scales[r.column];
    if (sizeof(W) == 1 && r.here && pairs)
        r.up_scale = p.w.scales[r.column + j.jump];
    return r;
}

/* Results of a tile: partial sums where there is room for them given. */
template <int HALVES>
static __device__ __forceinline__ void
stream_results(const struct product &p, const struct stream_job &j, bool pairs, float *partials,
               const float *sums, const struct stream_result &r, float factor)
{
    const int row = blockIdx.z * 8 * HALVES + r.row, column = r.column;
    if (!r.here)
        return;
    float y = stream_sum<HALVES>(sums, r.row, r.i) * (factor * r.scale);
    if (partials) {
        partials[((int64_t)blockIdx.y * p.rows + row) * p.w.n_out + column] = y;
        return;
    }
    y += p.w.bias ? p.w.bias[column] : 0;
    if (pairs) {
        const float up =
            stream_sum<HALVES>(sums, r.row, r.i + STREAM_TILE / 2) * (factor * r.up_scale);
        y = activate_value(y, p.act) * (up + (p.w.bias ? p.w.bias[column + j.jump] : 0));
    }
    const int64_t at = row * p.out_stride + column;
    product_store(p, at, y, p.output == OUTPUT_ADD ? ((const float *)p.out)[at] : 0);
}

/* A lane's 16 bytes of weight rows g and g + 8, as the first factors of the two products with a
 * piece of the activations. */
template <class W>
static __device__ __forceinline__ void stream_weights(uint32_t first[4], uint32_t second[4],
                                                      uint4 low, uint4 high, int piece)
{
    if (sizeof(W) == 2) {
        first[0] = low.x, first[1] = high.x, first[2] = low.y, first[3] = high.y;
        second[0] = low.z, second[1] = high.z, second[2] = low.w, second[3] = high.w;
        return;
    }
    const uint32_t words[4] = {piece ? low.z : low.x, piece ? high.z : high.x,
                               piece ? low.w : low.y, piece ? high.w : high.y};
#pragma unroll
    for (int i = 0; i < 4; i++) { /* bytes 0 and 2, 1 and 3 */
        uint32_t *const to = i < 2 ? first : second;
        to[i % 2] = bf16_of_bytes(words[i]);
        to[2 + i % 2] = bf16_of_bytes(words[i] >> 8);
    }
}

/* Eight columns of activations, in the order in which stream_weights has the weights'. */
template <class W> static __device__ __forceinline__ uint4 stream_columns(const bf16 *from)
{
    const uint4 x = *reinterpret_cast<const uint4 *>(from);
    if (sizeof(W) == 2)
        return x;
    return make_uint4(__byte_perm(x.x, x.y, 0x5410), __byte_perm(x.x, x.y, 0x7632),
                      __byte_perm(x.z, x.w, 0x5410), __byte_perm(x.z, x.w, 0x7632));
}

/* Short rows leave registers for a block of the kernel after. */
template <class W, int HALVES, bool SHORT>
static __global__ void __launch_bounds__(STREAM_THREADS, STREAM_BLOCKS + SHORT)
    stream_kernel(const __grid_constant__ struct product p, float *partials)
{
    typedef stream_shape<W, SHORT> S;
    constexpr int ITEMS = S::UNIT * S::STEPS;
    constexpr int LANE_COLUMNS = 16 / (int)sizeof(W);
    constexpr int SUMS = STREAM_WARPS * HALVES * 8 * STREAM_STRIDE;
    DYNAMIC_SHARED(uint4, shared);
    pdl_trigger();
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const bool pairs = p.output == OUTPUT_ACTIVATE && !partials;
    const struct stream_job job = stream_job_of(p, pairs);
    const int n_in = p.w.n_in, items = (n_in + S::COLUMNS - 1) / S::COLUMNS;
    const int slice0 = items * (int)blockIdx.y / (int)gridDim.y;
    const int slice = items * (int)(blockIdx.y + 1) / (int)gridDim.y - slice0;
    const int first = warp * slice / STREAM_WARPS;
    const int n_items = (warp + 1) * slice / STREAM_WARPS - first;
    const int n_steps = (n_items + S::UNIT - 1) / S::UNIT;
    const int lane_column = (slice0 + first) * S::COLUMNS + LANE_COLUMNS * t;
    const int lane_items = min(n_items, (n_in - lane_column + S::COLUMNS - 1) / S::COLUMNS);

    uint4 *ring = shared + warp * S::STAGES * S::STAGE + lane;
    const W *low = (const W *)p.w.data + (int64_t)(job.first + g) * n_in + lane_column;
    int ask_tile = n_steps ? 0 : job.n_tiles, ask_step = 0, ask_slot = 0;
    auto ask = [&]() {
        if (ask_tile >= job.n_tiles)
            return;
        const int row = ask_tile * job.tile_rows + g;
        const bool has_low = row < job.n;
        const bool has_high = pairs ? has_low : row + STREAM_TILE / 2 < job.n;
        const W *from =
            low + (int64_t)ask_tile * job.tile_rows * n_in + ask_step * S::UNIT * S::COLUMNS;
        const W *high = from + (int64_t)job.jump * n_in;
        uint4 *to = ring + ask_slot * S::STAGE;
#pragma unroll
        for (int u = 0; u < S::UNIT; u++) {
            const bool here = ask_step * S::UNIT + u < lane_items;
            copy_async_16(to + 2 * u * WARP, from + u * S::COLUMNS, here && has_low);
        }
#pragma unroll
        for (int u = 0; u < S::UNIT; u++) {
            const bool here = ask_step * S::UNIT + u < lane_items;
            copy_async_16(to + (2 * u + 1) * WARP, high + u * S::COLUMNS, here && has_high);
        }
        if (++ask_step == n_steps) {
            ask_step = 0;
            ask_tile++;
        }
        if (++ask_slot == S::STAGES)
            ask_slot = 0;
    };
#pragma unroll
    for (int s = 0; s < S::STAGES; s++) {
        ask();
        copy_async_commit();
    }
    const int row0 = blockIdx.z * 8 * HALVES;
    const int rows = min(*p.n_rows - row0, 8 * HALVES); /* there before the wait */

    pdl_wait();

    if (rows <= 0) {
        copy_async_wait<0>();
        return;
    }
    uint4 x[HALVES][ITEMS * S::PIECES];
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
        const int row = row0 + min(8 * h + g, rows - 1);
        const bf16 *in = (const bf16 *)p.in + (p.in_rows ? p.in_rows[row] : row) * p.in_stride;
#pragma unroll
        for (int i = 0; i < ITEMS * S::PIECES; i++) {
            const int item = i / S::PIECES, piece = i % S::PIECES;
            x[h][i] = make_uint4(0, 0, 0, 0);
            if (item < lane_items && 8 * h + g < rows)
                x[h][i] = stream_columns<W>(in + lane_column + item * S::COLUMNS + 8 * piece);
        }
    }

    float *const all_sums = (float *)(shared + STREAM_WARPS * S::STAGES * S::STAGE);
    const float factor = stream_factor(p, row0, rows);
    int slot = 0;
    for (int tile = 0; tile < job.n_tiles; tile++) {
        const struct stream_result result = stream_result_of<W>(p, job, pairs, tile, rows);
        float sum[2][HALVES][4] = {}; /* two chains */
#pragma unroll
        for (int s = 0; s < S::STEPS; s++) {
            if (s >= n_steps)
                break;
            copy_async_wait<S::STAGES - 1>();
            const uint4 *weights = ring + slot * S::STAGE;
#pragma unroll
            for (int i = 0; i < S::UNIT * S::PIECES; i++) {
                const int u = i / S::PIECES;
                uint32_t a0[4], a1[4];
                stream_weights<W>(a0, a1, weights[2 * u * WARP], weights[(2 * u + 1) * WARP],
                                  i % S::PIECES);
#pragma unroll
                for (int h = 0; h < HALVES; h++) {
                    const uint4 in = x[h][s * S::UNIT * S::PIECES + i];
                    const uint32_t x0[2] = {in.x, in.y}, x1[2] = {in.z, in.w};
                    mma_bf16(sum[0][h], a0, x0);
                    mma_bf16(sum[1][h], a1, x1);
                }
            }
            ask();
            copy_async_commit();
            if (++slot == S::STAGES)
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
        stream_results<HALVES>(p, job, pairs, partials, sums, result, factor);
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
    return p->rows <= (p->w.dtype == DTYPE_I8 ? STREAM_INT8_ROWS : STREAM_ROWS) &&
           p->w.dtype != DTYPE_F32 && !p->norm.weight && skinny_possible(p) &&
           slices_of(&p->w) <= STREAM_SLICES;
}

static bool has_room(const struct cuda *c, const struct product *p, int n_parts)
{
    return (size_t)n_parts * p->rows * p->w.n_out <= c->partial_values;
}

template <class W, int HALVES, bool SHORT>
static void run(struct cuda *c, const struct product *p, float *partials, int n_parts)
{
    typedef stream_shape<W, SHORT> S;
    const size_t shared = STREAM_WARPS * (S::STAGES * S::STAGE * sizeof(uint4) +
                                          2 * HALVES * 8 * STREAM_STRIDE * sizeof(float));
    enum { RESERVED = 1024 }; /* of an SM's shared memory, for each block */
    const bool have_room =
        STREAM_BLOCKS * (shared + RESERVED) <= shared_limit(&c->queue) + RESERVED;
    const int n_groups = ceil_div(p->rows, 8 * HALVES);
    const int n_blocks = c->queue.n_sms * (have_room ? STREAM_BLOCKS : 1) / (n_parts * n_groups);
    launch(&c->queue, "stream_product", stream_kernel<W, HALVES, SHORT>,
           dim3(n_blocks < 1 ? 1 : n_blocks, n_parts, n_groups), STREAM_THREADS, shared, *p,
           partials);
}

template <class W, bool SHORT>
static void run_rows(struct cuda *c, const struct product *p, float *partials, int n_parts)
{
    if (p->rows <= 8)
        run<W, 1, SHORT>(c, p, partials, n_parts);
    else
        run<W, 2, SHORT>(c, p, partials, n_parts);
}

template <class W>
static void run_lengths(struct cuda *c, const struct product *p, float *partials, int n_parts)
{
    if (p->w.n_in <= stream_shape<W, true>::SLICE)
        run_rows<W, true>(c, p, partials, n_parts);
    else
        run_rows<W, false>(c, p, partials, n_parts);
}

static void run_types(struct cuda *c, const struct product *p, float *partials, int n_parts)
{
    if (p->w.dtype == DTYPE_I8)
        run_lengths<int8_t>(c, p, partials, n_parts);
    else
        run_lengths<bf16>(c, p, partials, n_parts);
}

bool stream_product(struct cuda *c, const struct product *p)
{
    const int n_parts = slices_of(&p->w);
    if (!possible(p) || (n_parts > 1 && !has_room(c, p, n_parts)))
        return false;
    run_types(c, p, n_parts > 1 ? c->partials : nullptr, n_parts);
    if (n_parts > 1)
        launch(&c->queue, "stream_finish", stream_finish_kernel,
               dim3(p->rows, ceil_div(p->w.n_out, FINISH_THREADS)), FINISH_THREADS, 0, *p,
               (const float *)c->partials, n_parts);
    return true;
}

static bool is_large(const struct cuda *c, const struct product *p)
{
    const int64_t n_values = (int64_t)p->w.n_out * p->w.n_in;
    return !c->queue.deterministic && c->queue.capability >= 90 && p->w.n_in >= 512 &&
           n_values >= (p->norm.weight ? LARGE_NORMED_VALUES : LARGE_VALUES);
}

bool stream_factors(const struct cuda *c, const struct product *p)
{
    struct product bare = *p;
    bare.norm = {};
    return p->output == OUTPUT_F32 && slices_of(&p->w) == 1 && is_large(c, p) && possible(&bare);
}

bool stream_large(struct cuda *c, const struct product *p)
{
    struct product bare = *p;
    bare.norm = {};
    if (!is_large(c, p) || !possible(&bare) || !skinny_possible(p) ||
        (slices_of(&p->w) > 1 && !has_room(c, p, slices_of(&p->w))))
        return false;
    const struct product normed = product_without_norm(c, p);
    return stream_product(c, &normed);
}

int stream_partial_sums(struct cuda *c, const struct product *p)
{
    const int n_parts = slices_of(&p->w);
    if (!is_large(c, p) || !possible(p) || p->w.bias || !has_room(c, p, n_parts))
        return 0;
    run_types(c, p, c->partials, n_parts);
    return n_parts;
}

size_t stream_partials(const struct backend_options *options)
{
    const struct model_config *config = options->config;
    const int rows = options->max_rows < STREAM_INT8_ROWS ? options->max_rows : STREAM_INT8_ROWS;
    const int D = config->hidden_size, F = config->intermediate_size;
    /* Of weights of either type: */
    static_assert(stream_shape<bf16, false>::SLICE <= stream_shape<int8_t, false>::SLICE, "fewer");
    const int up = slices_of<bf16>(D), down = slices_of<bf16>(F),
              o = slices_of<bf16>(config->n_heads * config->head_dim);
    if (up > STREAM_SLICES || down > STREAM_SLICES || o > STREAM_SLICES)
        return 0;
    const size_t to_model = (size_t)(down > o ? down : o) * D;
    const size_t to_mlp = up > 1 ? (size_t)up * 2 * F : 0;
    return (size_t)rows * (to_model > to_mlp ? to_model : to_mlp);
}
