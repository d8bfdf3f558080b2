/* skinny.cu - products of few rows: skinny_block where it can, and a slow kernel for shapes that
 * 16-byte copies cannot do.
 *
 * A product moves its weights once for every 64 rows, its activations once a block, and its
 * results. Floor at 3 TB/s with one group of rows: bytes of the weights (o of the 156M model 1.2 MB
 * 0.4 us, gate and up 9.4 MB 3.1 us, head 77 MB 25 us); what is left is the latency of a launch,
 * which the weights asked for before pdl_wait hide.
 */
#include "engine/kernels/cuda/skinny_plan.cuh"

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
    if (!skinny_possible(p) || (p->norm.weight && p->rows > NORMED_IN_BLOCK_ROWS))
        return false;
    if (p->w.dtype == DTYPE_I8 ? !skinny_plan_int8(c, p, out) : !skinny_plan_bf16(c, p, out))
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
