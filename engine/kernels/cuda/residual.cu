/* residual.cu - between two sublayers of a model with post norms: x += post(y), h = next(x).
 *
 * A block a row; a thread keeps its values of x and y in registers, so that each is read once.
 * Norms' weights are asked for before pdl_wait. Bytes a row: 8 dim of x, 4 dim of each part of y,
 * 2 dim of h; few rows are all latency: two sums over the block, or of norms without means and
 * biases one of four values.
 */
#include "engine/kernels/cuda/math.cuh"
#include "engine/kernels/cuda/stream.cuh"

enum {
    RESIDUAL_HELD = 3, /* float4 of a thread */
    RESIDUAL_THREADS = 1024,
    QUICK_HELD = 2, /* the same of norms without means */
    QUICK_THREADS = 512,
    QUICK_PARTS = 4, /* of y, that a thread has on their way at a time */
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

/* ---- norms without means and biases ---- */

/* The block's sum of each of a thread's four values, to all threads; one barrier. */
static __device__ __forceinline__ float4 block_sums(float4 v, float4 scratch[QUICK_THREADS / WARP])
{
    const unsigned all = 0xffffffffu;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const bool high = lane & 16, odd = lane & 8;
    /* A half of the warp goes on with two of the values, a quarter with one. */
    float a = high ? v.z : v.x, b = high ? v.w : v.y;
    a += __shfl_xor_sync(all, high ? v.x : v.z, 16);
    b += __shfl_xor_sync(all, high ? v.y : v.w, 16);
    float sum = odd ? b : a;
    sum += __shfl_xor_sync(all, odd ? a : b, 8);
#pragma unroll
    for (int o = 4; o; o >>= 1)
        sum += __shfl_xor_sync(all, sum, o);
    if (lane % 8 == 0)
        reinterpret_cast<float *>(scratch + warp)[lane / 8] = sum;
    __syncthreads();
    v = scratch[0];
#pragma unroll 4
    for (int w = 1; w < (int)blockDim.x / WARP; w++)
        add(&v, scratch[w]);
    return v;
}

static __device__ __forceinline__ float dot(float4 a, float4 b)
{
    return fmaf(a.x, b.x, a.y * b.y) + fmaf(a.z, b.z, a.w * b.w);
}

static __device__ __forceinline__ float4 product(float4 a, float4 b)
{
    return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w);
}

/* The squares of x + scale u, u being y times the norm's weight, are x^2 + 2 scale x u + scale^2
 * u^2: so all sums are there after one barrier. Where they cancel they are added up once more. */
static __global__ void __launch_bounds__(QUICK_THREADS)
    residual_quick_kernel(const __grid_constant__ struct residual r)
{
    __shared__ float4 scratch[2][QUICK_THREADS / WARP];
    const float4 zero = make_float4(0, 0, 0, 0);
    float4 post[QUICK_HELD], next[QUICK_HELD], x[QUICK_HELD], y[QUICK_HELD];
    bool inside[QUICK_HELD];
    pdl_trigger();
    const int64_t at = (int64_t)blockIdx.x * r.dim;
#pragma unroll
    for (int k = 0; k < QUICK_HELD; k++) {
        const int quad = threadIdx.x + k * blockDim.x;
        inside[k] = quad < r.dim / 4;
        post[k] = inside[k] ? quad_at(r.post.weight, quad) : zero;
        next[k] = inside[k] && r.next.weight ? quad_at(r.next.weight, quad) : zero;
    }
    const bool here = (int)blockIdx.x < *r.n_rows;
    pdl_wait();
    if (!here)
        return;
    float4 *const to = reinterpret_cast<float4 *>(r.x + at) + threadIdx.x;
    const float4 *const from = reinterpret_cast<const float4 *>(r.y + at) + threadIdx.x;
    for (int first = 0; first < r.n_parts; first += QUICK_PARTS) {
        float4 part[QUICK_PARTS][QUICK_HELD];
#pragma unroll
        for (int i = 0; i < QUICK_PARTS; i++)
#pragma unroll
            for (int k = 0; k < QUICK_HELD; k++) {
                part[i][k] = zero;
                if (inside[k] && first + i < r.n_parts)
                    part[i][k] = from[(first + i) * (r.part_values / 4) + k * blockDim.x];
            }
#pragma unroll
        for (int k = 0; k < QUICK_HELD; k++) {
            if (first == 0)
                x[k] = inside[k] ? to[k * blockDim.x] : zero;
#pragma unroll
            for (int i = 0; i < QUICK_PARTS; i++) {
                if (first + i == 0)
                    y[k] = part[i][k];
                else if (first + i < r.n_parts)
                    add(&y[k], part[i][k]);
            }
        }
    }
    float4 sums = zero; /* of y^2, x^2, x u and u^2 */
#pragma unroll
    for (int k = 0; k < QUICK_HELD; k++) {
        const float4 u = product(y[k], post[k]);
        add(&sums, make_float4(dot(y[k], y[k]), dot(x[k], x[k]), dot(x[k], u), dot(u, u)));
        y[k] = u;
    }
    sums = block_sums(sums, scratch[0]);
    const float scale = norm_scale(sums.x, r.dim, r.post.eps), own = scale * scale * sums.w;
#pragma unroll
    for (int k = 0; k < QUICK_HELD; k++) {
        x[k] = make_float4(fmaf(y[k].x, scale, x[k].x), fmaf(y[k].y, scale, x[k].y),
                           fmaf(y[k].z, scale, x[k].z), fmaf(y[k].w, scale, x[k].w));
        if (inside[k])
            to[k * blockDim.x] = x[k];
    }
    if (!r.next.weight)
        return;
    float square = fmaf(2 * scale, sums.z, sums.y + own);
    if (!(square > (sums.y + own) / 64)) {
        square = 0;
#pragma unroll
        for (int k = 0; k < QUICK_HELD; k++)
            square += dot(x[k], x[k]);
        square = block_sums(make_float4(square, 0, 0, 0), scratch[1]).x;
    }
    const float next_scale = norm_scale(square, r.dim, r.next.eps);
#pragma unroll
    for (int k = 0; k < QUICK_HELD; k++) {
        if (!inside[k])
            continue;
        __nv_bfloat162 *const h = reinterpret_cast<__nv_bfloat162 *>(
            r.h + at + 4 * (int64_t)(threadIdx.x + k * blockDim.x));
        h[0] =
            __floats2bfloat162_rn(x[k].x * next_scale * next[k].x, x[k].y * next_scale * next[k].y);
        h[1] =
            __floats2bfloat162_rn(x[k].z * next_scale * next[k].z, x[k].w * next_scale * next[k].w);
    }
}

static bool is_quick(const struct device_norm *n)
{
    return n->type == NORM_RMS && !n->bias;
}

bool residual_possible(int dim)
{
    return dim % 4 == 0 && dim <= 4 * RESIDUAL_HELD * RESIDUAL_THREADS;
}

void residual_norm(struct cuda *c, const struct residual *r)
{
    const bool quick = is_quick(&r->post) && (!r->next.weight || is_quick(&r->next)) &&
                       r->dim <= 4 * QUICK_HELD * QUICK_THREADS && r->part_values % 4 == 0;
    const int held = quick ? QUICK_HELD : RESIDUAL_HELD;
    const int threads = ceil_div(ceil_div(r->dim / 4, held), WARP) * WARP;
    launch(&c->queue, "residual_norm", quick ? residual_quick_kernel : residual_kernel,
           dim3(c->step.rows), threads, 0, *r);
}
