/* skinny.cu - products of few rows: kernels around skinny_block, the choice of one, and a slow
 * kernel for shapes that 16-byte copies cannot do.
 *
 * A product moves its weights once for every 64 rows, its activations once a block, and its
 * results. Floor at 3 TB/s with one group of rows: bytes of the weights (o of the 156M model 1.2 MB
 * 0.4 us, gate and up 9.4 MB 3.1 us, head 77 MB 25 us); what is left is the latency of a launch,
 * which the weights asked for before pdl_wait hide.
 */
#include "engine/kernels/cuda/skinny.cuh"

typedef void product_kernel(struct product);

struct skinny_launch {
    product_kernel *kernel;
    int n_blocks, n_groups; /* of a group of rows; groups of rows */
    size_t shared_bytes;
};

template <class W, int HALVES, int TILES, bool NORM>
static __global__ void __launch_bounds__(SKINNY_THREADS,
                                         (skinny<W, HALVES, TILES, NORM>::MIN_BLOCKS))
    skinny_kernel(const __grid_constant__ struct product p)
{
    DYNAMIC_SHARED(unsigned char, shared);
    pdl_trigger();
    skinny_block<W, HALVES, TILES, NORM>(p, blockIdx.x, gridDim.x, blockIdx.y, shared);
}

/* A tile a block, or where there are more tiles than SMs have room for, as many as make blocks
 * equally long. False: not enough shared memory. */
template <class W, int HALVES, int TILES, bool NORM>
static bool plan_launch(const struct cuda *c, const struct product *p, struct skinny_launch *out)
{
    typedef skinny<W, HALVES, TILES, NORM> S;
    const int most = skinny_most_shared(&c->queue), n_tiles = skinny_n_tiles(p, TILES);
    const struct skinny_layout single = S::layout(p->w.n_in, false);
    const struct skinny_layout several = S::layout(p->w.n_in, true);
    out->kernel = skinny_kernel<W, HALVES, TILES, NORM>;
    out->n_groups = ceil_div(p->rows, 8 * HALVES);
    out->n_blocks = n_tiles;
    out->shared_bytes = (size_t)single.bytes;
    if (several.bytes <= most && out->n_groups == 1) {
        const bool two = S::MIN_BLOCKS == 2 && several.bytes <= SKINNY_PAIRED;
        const int rounds = ceil_div(n_tiles, (two ? 2 : 1) * c->queue.n_sms);
        if (rounds > 1) {
            out->n_blocks = ceil_div(n_tiles, rounds);
            out->shared_bytes = (size_t)several.bytes;
        }
    }
    return single.bytes <= most;
}

/* Groups of as many rows as there are, up to 64, or as shared memory allows. */
template <class W, int TILES, bool NORM>
static bool plan_rows(const struct cuda *c, const struct product *p, struct skinny_launch *out)
{
    return (p->rows > 32 && plan_launch<W, 8, TILES, NORM>(c, p, out)) ||
           (p->rows > 16 && plan_launch<W, 4, TILES, NORM>(c, p, out)) ||
           (p->rows > 8 && plan_launch<W, 2, TILES, NORM>(c, p, out)) ||
           plan_launch<W, 1, TILES, NORM>(c, p, out);
}

/* Tiles as skinny_tiles says, or fewer that give the same bits. */
template <class W, bool NORM>
static bool plan_tiles(const struct cuda *c, const struct product *p, struct skinny_launch *out)
{
    const int tiles = skinny_tiles(c->queue.n_sms, &p->w, p->output);
    if (tiles <= 2)
        return (tiles == 2 && plan_rows<W, 2, NORM>(c, p, out)) ||
               (p->output != OUTPUT_ACTIVATE && plan_rows<W, 1, NORM>(c, p, out));
    return (tiles == 8 && plan_rows<W, 8, NORM>(c, p, out)) ||
           (tiles >= 6 && plan_rows<W, 6, NORM>(c, p, out)) || plan_rows<W, 4, NORM>(c, p, out);
}

template <class W>
static bool plan(const struct cuda *c, const struct product *p, struct skinny_launch *out)
{
    return p->norm.weight ? plan_tiles<W, true>(c, p, out) : plan_tiles<W, false>(c, p, out);
}

/* ---- any shape ---- */

static __device__ __forceinline__ float product_weight_at(const struct product &p, int row, int i)
{
    const int64_t at = (int64_t)row * p.w.n_in + i;
    if (p.w.dtype == DTYPE_I8)
        return ((const int8_t *)p.w.data)[at];
    return to_float(((const bf16 *)p.w.data)[at]);
}

/* One weight row times one row of bf16 activations, by a warp. */
static __device__ __forceinline__ float plain_sum(const struct product &p, const bf16 *in, int row)
{
    float sum = 0;
    for (int i = threadIdx.x % WARP; i < p.w.n_in; i += WARP)
        sum = fmaf(to_float(in[i]), product_weight_at(p, row, i), sum);
    sum = warp_sum(sum);
    if (p.w.dtype == DTYPE_I8)
        sum *= p.w.scales[row];
    return p.w.bias ? sum + p.w.bias[row] : sum;
}

/* A warp a result; without a norm. Reads the weights once a row: for odd shapes only. */
static __global__ void plain_product_kernel(const struct product p)
{
    pdl_trigger();
    pdl_wait();
    const bool pairs = p.output == OUTPUT_ACTIVATE;
    const int n = pairs ? p.w.n_out / 2 : p.w.n_out;
    const int row = blockIdx.x;
    const int column = blockIdx.y * SKINNY_WARPS + threadIdx.x / WARP;
    if (row >= *p.n_rows || column >= n)
        return;
    const bf16 *in = (const bf16 *)p.in + (p.in_rows ? p.in_rows[row] : row) * p.in_stride;
    float y = plain_sum(p, in, column);
    if (pairs)
        y = activate_value(y, p.act) * plain_sum(p, in, n + column);
    const int64_t at = row * p.out_stride + column;
    if (threadIdx.x % WARP == 0)
        product_store(p, at, y, p.output == OUTPUT_ADD ? ((const float *)p.out)[at] : 0);
}

static void plain_product(struct cuda *c, const struct product *p)
{
    const int n = p->output == OUTPUT_ACTIVATE ? p->w.n_out / 2 : p->w.n_out;
    const dim3 grid(p->rows, ceil_div(n, SKINNY_WARPS));
    launch(&c->queue, "plain_product", plain_product_kernel, grid, SKINNY_THREADS, 0, *p);
}

/* ---- the product ---- */

struct product product_without_norm(struct cuda *c, const struct product *p)
{
    struct product normed = *p;
    if (!p->norm.weight)
        return normed;
    norm_to_bf16(c, c->converted, (const float *)p->in, p->norm, p->w.n_in, p->in_rows, p->rows,
                 p->n_rows);
    normed.in = c->converted;
    normed.in_stride = p->w.n_in;
    normed.in_rows = nullptr;
    normed.norm = {};
    return normed;
}

/* A norm in the block saves a launch as long as all rows are one group; several groups would
 * norm every row again and again. */
static bool plan_product(const struct cuda *c, const struct product *p, struct skinny_launch *out)
{
    if (!skinny_possible(p) || (p->norm.weight && p->rows > SKINNY_ROWS))
        return false;
    if (p->w.dtype == DTYPE_I8 ? !plan<int8_t>(c, p, out) : !plan<bf16>(c, p, out))
        return false;
    return !p->norm.weight || out->n_groups == 1;
}

void skinny_product(struct cuda *c, const struct product *p)
{
    struct skinny_launch l;
    if (plan_product(c, p, &l)) {
        launch(&c->queue, "skinny_product", l.kernel, dim3(l.n_blocks, l.n_groups), SKINNY_THREADS,
               l.shared_bytes, *p);
        return;
    }
    const struct product normed = product_without_norm(c, p);
    if (p->norm.weight)
        skinny_product(c, &normed);
    else
        plain_product(c, &normed);
}
