/* linear.cu - the linear op, the choice between the ways a product can go, and weights on their
 * way to the device.
 */
#include "engine/kernels/cuda/glu.cuh"
#include "engine/kernels/cuda/skinny.cuh"
#include "engine/kernels/cuda/stream.cuh"

/* ---- f32 weights: exact products, for tests and comparisons ---- */

enum {
    TILE_COLUMNS = 64, /* of the results */
    TILE_DEPTH = 16,   /* columns of the factors that are staged at a time */
    F32_THREADS = 256, /* 16 x 16, each PER x 4 results */
};

/* Small matrices (the latents' logits) are skinny products up to so many rows: they fill a few SMs
 * only, and what follows them begins beside them. Large ones (heads, a large model's mlp) take so
 * long that the library's launches do not count. */
enum {
    SMALL_VALUES = 1 << 18,
    SMALL_ROWS = 192,
    LARGE_VALUES = 1 << 24,
    LARGE_ROWS = 16,
};

/* out[rows, n_out] = in W^T + bias in plain f32, each result summed over n_in in order. A block
 * computes 16 PER x 64 results; bytes: each factor once for every tile of the other. */
template <int PER>
static __global__ void __launch_bounds__(F32_THREADS)
    linear_f32_kernel(float *out, const float *in, const float *weight, const float *bias,
                      int n_out, int n_in, const int32_t *n_rows)
{
    __shared__ float x[TILE_DEPTH][16 * PER + 4];
    __shared__ float w[TILE_DEPTH][TILE_COLUMNS + 4];
    pdl_trigger();
    pdl_wait();
    const int rows = *n_rows, row0 = blockIdx.y * 16 * PER, column0 = blockIdx.x * TILE_COLUMNS;
    if (row0 >= rows)
        return;
    const int k = threadIdx.x % TILE_DEPTH, first = threadIdx.x / TILE_DEPTH;
    float sum[PER][4] = {};
    for (int i0 = 0; i0 < n_in; i0 += TILE_DEPTH) {
        const bool inside = i0 + k < n_in;
#pragma unroll
        for (int i = 0; i < PER; i++) {
            const int row = row0 + first + 16 * i;
            x[k][first + 16 * i] = inside && row < rows ? in[(int64_t)row * n_in + i0 + k] : 0;
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int column = column0 + first + 16 * i;
            w[k][first + 16 * i] =
                inside && column < n_out ? weight[(int64_t)column * n_in + i0 + k] : 0;
        }
        __syncthreads();
#pragma unroll
        for (int d = 0; d < TILE_DEPTH; d++) {
            float a[PER], b[4];
#pragma unroll
            for (int i = 0; i < PER; i++)
                a[i] = x[d][first + 16 * i];
#pragma unroll
            for (int j = 0; j < 4; j++)
                b[j] = w[d][k + 16 * j];
#pragma unroll
            for (int i = 0; i < PER; i++)
#pragma unroll
                for (int j = 0; j < 4; j++)
                    sum[i][j] = fmaf(a[i], b[j], sum[i][j]);
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < PER; i++) {
        const int row = row0 + first + 16 * i;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int column = column0 + k + 16 * j;
            if (row < rows && column < n_out)
                out[(int64_t)row * n_out + column] = sum[i][j] + (bias ? bias[column] : 0);
        }
    }
}

static void linear_f32(struct cuda *c, float *out, const float *in, const struct linear *w,
                       enum row_set set)
{
    const int rows = rows_of(c, set), n = ceil_div(w->n_out, TILE_COLUMNS);
    const bool many = rows > 16; /* a choice of speed: the sums are the same */
    launch(&c->queue, "linear_f32", many ? linear_f32_kernel<8> : linear_f32_kernel<1>,
           dim3(n, ceil_div(rows, many ? 128 : 16)), F32_THREADS, 0, out, in, floats(w->weight),
           floats(w->bias), w->n_out, w->n_in, actual_rows(c, set));
}

/* ---- products ---- */

void fused_product(struct cuda *c, const struct product *p, bf16 *wide)
{
    if (stream_large(c, p))
        return;
    const int64_t n_values = (int64_t)p->w.n_out * p->w.n_in;
    int skinny_rows = SKINNY_ROWS;
    if (n_values <= SMALL_VALUES)
        skinny_rows = SMALL_ROWS;
    else if (n_values >= LARGE_VALUES)
        skinny_rows = LARGE_ROWS;
    if (c->queue.deterministic || p->rows <= skinny_rows) {
        skinny_product(c, p);
        return;
    }
    const struct product q = product_without_norm(c, p);
    if (!glu_pays(c, &q) || !glu_possible(c, &q) || !glu_product(c, &q))
        library_product(c, &q, wide);
}

void cuda_linear(struct backend *b, struct buffer *out, const struct buffer *in,
                 const struct linear *w, enum row_set set)
{
    struct cuda *c = cuda_of(b);
    if (w->dtype == DTYPE_F32) {
        linear_f32(c, floats(out), floats(in), w, set);
        return;
    }
    struct product p = {};
    p.in = c->converted;
    p.in_stride = w->n_in;
    p.w = weight_of(w);
    p.out = out->data;
    p.out_stride = w->n_out;
    p.output = OUTPUT_F32;
    p.rows = rows_of(c, set);
    p.n_rows = actual_rows(c, set);
    norm_to_bf16(c, c->converted, floats(in), {}, w->n_in, nullptr, p.rows, p.n_rows);
    fused_product(c, &p, nullptr);
}

/* ---- weights ---- */

static __device__ __forceinline__ float half_value(uint16_t h)
{
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest >= 0x7c00) /* infinity and NaN */
        return __uint_as_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    const float tiny = (float)rest * 0x1p-24f; /* without an exponent */
    const float x = rest < 0x400 ? tiny : __uint_as_float((rest << 13) + (112u << 23));
    return sign ? -x : x;
}

static __device__ __forceinline__ float source_value(const void *src, enum dtype dtype, int64_t i)
{
    if (dtype == DTYPE_F32)
        return ((const float *)src)[i];
    if (dtype == DTYPE_BF16)
        return to_float(((const bf16 *)src)[i]);
    return half_value(((const uint16_t *)src)[i]);
}

template <class T>
static __global__ void convert_kernel(T *out, const void *src, enum dtype dtype, int64_t n)
{
    pdl_trigger();
    pdl_wait();
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n)
        out[i] = from_float<T>(source_value(src, dtype, i));
}

/* A block a row: q = w / scale to the nearest, scale = max |w| / 127. */
static __global__ void quantise_kernel(int8_t *out, float *scales, const void *src,
                                       enum dtype dtype, int n_in)
{
    __shared__ float most[WARP];
    pdl_trigger();
    pdl_wait();
    const int64_t row = (int64_t)blockIdx.x * n_in;
    float largest = 0;
    for (int i = threadIdx.x; i < n_in; i += blockDim.x)
        largest = fmaxf(largest, fabsf(source_value(src, dtype, row + i)));
    largest = warp_max(largest);
    if (threadIdx.x % WARP == 0)
        most[threadIdx.x / WARP] = largest;
    __syncthreads();
    for (int i = 0; i < (int)blockDim.x / WARP; i++)
        largest = fmaxf(largest, most[i]);
    const float scale = largest / 127;
    for (int i = threadIdx.x; i < n_in; i += blockDim.x) {
        const float q = largest > 0 ? rintf(source_value(src, dtype, row + i) / scale) : 0;
        out[row + i] = (int8_t)fminf(fmaxf(q, -127.f), 127.f);
    }
    if (threadIdx.x == 0)
        scales[blockIdx.x] = scale;
}

/* Rows [first, first + n) from the device's staging memory into place. */
static void convert_rows(struct cuda *c, void *weight, float *scales, enum dtype dtype,
                         const void *staged, enum dtype src_dtype, int first, int n_rows, int n_in)
{
    const int64_t at = (int64_t)first * n_in, n = (int64_t)n_rows * n_in;
    const dim3 grid((unsigned)((n + 255) / 256));
    if (dtype == DTYPE_I8)
        launch(&c->queue, "linear_upload", quantise_kernel, dim3(n_rows), 256, 0,
               (int8_t *)weight + at, scales + first, staged, src_dtype, n_in);
    else if (dtype == DTYPE_BF16)
        launch(&c->queue, "linear_upload", convert_kernel<bf16>, grid, 256, 0, (bf16 *)weight + at,
               staged, src_dtype, n);
    else
        launch(&c->queue, "linear_upload", convert_kernel<float>, grid, 256, 0,
               (float *)weight + at, staged, src_dtype, n);
}

enum status linear_upload(struct cuda *c, void *weight, float *scales, enum dtype dtype,
                          const void *src, enum dtype src_dtype, int n_out, int n_in,
                          struct error *err)
{
    size_t staging_bytes;
    void *staging = library_scratch(c->library, &staging_bytes);
    const size_t row_bytes = (size_t)n_in * dtype_bytes(src_dtype);
    const bool as_is = dtype == src_dtype;
    const int most = as_is ? n_out : (int)(staging_bytes / row_bytes);
    if (most == 0)
        return fail(err, STATUS_UNSUPPORTED, "a weight row of %zu bytes; at most %zu fit",
                    row_bytes, staging_bytes);
    cudaError_t error = c->queue.error;
    for (int first = 0; first < n_out && error == cudaSuccess; first += most) {
        const int n = n_out - first < most ? n_out - first : most;
        /* From pageable memory, so src is free again when this returns. */
        error =
            cudaMemcpyAsync(as_is ? weight : staging, (const char *)src + (size_t)first * row_bytes,
                            (size_t)n * row_bytes, cudaMemcpyHostToDevice, c->queue.stream);
        if (error == cudaSuccess && !as_is)
            convert_rows(c, weight, scales, dtype, staging, src_dtype, first, n, n_in);
        if (error == cudaSuccess)
            error = c->queue.error;
    }
    if (error == cudaSuccess)
        error = cudaStreamSynchronize(c->queue.stream);
    if (error != cudaSuccess)
        return fail(err, STATUS_DEVICE, "uploading weights: %s", cudaGetErrorString(error));
    return STATUS_OK;
}
