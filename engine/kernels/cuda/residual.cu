/* residual.cu - between two sublayers of a model with post norms: x += post(y), h = next(x).
 *
 * A block a row; a thread keeps its values of x and y in registers, so that each is read once.
 * Norms' weights are asked for before pdl_wait. Bytes a row: 8 dim of x, 4 dim of each part of y,
 * 2 dim of h; few rows are all latency: two sums over the block.
 */
#include "engine/kernels/cuda/math.cuh"
#include "engine/kernels/cuda/stream.cuh"

enum {
    RESIDUAL_HELD = 3, /* float4 of a thread */
    RESIDUAL_THREADS = 1024,
};

struct residual_lane {
    float4 v[RESIDUAL_HELD]; /* 0 beyond the row */
};

static __device__ __forceinline__ struct residual_lane lane_of(const float *row, int quads)
{
    struct residual_lane l;
#pragma unroll
    for (int k = 0; k < RESIDUAL_HELD; k++) {
        const int quad = threadIdx.x + k * blockDim.x;
        l.v[k] = row && quad < quads ? reinterpret_cast<const float4 *>(row)[quad]
                                     : make_float4(0, 0, 0, 0);
    }
    return l;
}

static __device__ __forceinline__ void add(float4 *to, float4 x)
{
    *to = make_float4(to->x + x.x, to->y + x.y, to->z + x.z, to->w + x.w);
}

static __device__ __forceinline__ struct row_scale
block_scale(const struct residual_lane &l, int dim, const struct device_norm &norm, float *scratch)
{
    struct row_scale s = {0, 0};
    float sum = 0, square = 0;
    if (norm.type == NORM_LAYER) {
#pragma unroll
        for (int k = 0; k < RESIDUAL_HELD; k++)
            sum += (l.v[k].x + l.v[k].y) + (l.v[k].z + l.v[k].w);
        s.mean = block_sum(sum, scratch) / dim;
    }
#pragma unroll
    for (int k = 0; k < RESIDUAL_HELD; k++)
        if ((int)(threadIdx.x + k * blockDim.x) < dim / 4)
            square += square_sum(l.v[k], s.mean);
    s.scale = norm_scale(block_sum(square, scratch), dim, norm.eps);
    return s;
}

static __global__ void __launch_bounds__(RESIDUAL_THREADS)
    residual_kernel(const __grid_constant__ struct residual r)
{
    __shared__ float scratch[WARP];
    pdl_trigger();
    const int quads = r.dim / 4;
    const int64_t at = (int64_t)blockIdx.x * r.dim;
    const struct residual_lane post = lane_of(r.post.weight, quads);
    const struct residual_lane next = lane_of(r.next.weight, quads);
    const bool here = (int)blockIdx.x < *r.n_rows;
    pdl_wait();
    if (!here)
        return;
    struct residual_lane y = lane_of(r.y + at, quads), x = lane_of(r.x + at, quads);
    for (int i = 1; i < r.n_parts; i++) {
        const struct residual_lane part = lane_of(r.y + i * r.part_values + at, quads);
#pragma unroll
        for (int k = 0; k < RESIDUAL_HELD; k++)
            add(&y.v[k], part.v[k]);
    }
    struct row_scale s = block_scale(y, r.dim, r.post, scratch);
    struct residual_lane bias = lane_of(r.post.bias, quads);
#pragma unroll
    for (int k = 0; k < RESIDUAL_HELD; k++) {
        const int quad = threadIdx.x + k * blockDim.x;
        if (quad >= quads)
            continue;
        add(&x.v[k], normed_quad(y.v[k], s, post.v[k], bias.v[k]));
        reinterpret_cast<float4 *>(r.x + at)[quad] = x.v[k];
    }
    if (!r.next.weight)
        return;
    s = block_scale(x, r.dim, r.next, scratch);
    bias = lane_of(r.next.bias, quads);
#pragma unroll
    for (int k = 0; k < RESIDUAL_HELD; k++) {
        const int quad = threadIdx.x + k * blockDim.x;
        if (quad >= quads)
            continue;
        const float4 h = normed_quad(x.v[k], s, next.v[k], bias.v[k]);
        __nv_bfloat162 *to = reinterpret_cast<__nv_bfloat162 *>(r.h + at + 4 * quad);
        to[0] = __floats2bfloat162_rn(h.x, h.y);
        to[1] = __floats2bfloat162_rn(h.z, h.w);
    }
}

bool residual_possible(int dim)
{
    return dim % 4 == 0 && dim <= 4 * RESIDUAL_HELD * RESIDUAL_THREADS;
}

void residual_norm(struct cuda *c, const struct residual *r)
{
    const int threads = ceil_div(ceil_div(r->dim / 4, RESIDUAL_HELD), WARP) * WARP;
    launch(&c->queue, "residual_norm", residual_kernel, dim3(c->step.rows), threads, 0, *r);
}
