/* library.cu - products of many rows through cuBLASLt: bf16 factors, f32 sums. What the library
 * does not do in one call (norms, biases, activations) is a pass of its own over the results.
 *
 * Row-major y [rows, n_out] = x [rows, n_in] W^T is the library's column-major [n_out, rows].
 * It computes all rows of the bucket: rows beyond the actual ones get what their inputs give,
 * which nobody reads. int8 weights are first turned into bf16, a block of rows at a time.
 */
#include "engine/kernels/cuda/skinny.cuh"

#include <cublasLt.h>
#include <stdlib.h>
#include <string.h>

enum {
    WORKSPACE_BYTES = 32 << 20,
    SCRATCH_BYTES = 32 << 20, /* int8 weights as bf16; sums while an algorithm is chosen */
    ALIGNMENT = 16,           /* of the matrices' addresses */
    MAX_SHAPES = 1024,
    N_CANDIDATES = 12,
    N_TIMED = 3, /* runs of a candidate; the shortest counts */
    ELEMENT_THREADS = 256,
    FINISH_AT_ONCE = 4,
};

/* What one call of the library depends on. Compared as bytes. */
struct gemm_shape {
    int64_t in_stride, out_stride;
    int32_t n_out, n_in, rows;
    int32_t f32, add; /* results are f32; they are added */
    int32_t unused;   /* no padding */
};

struct gemm {
    struct gemm_shape shape;
    cublasLtMatmulDesc_t operation;
    cublasLtMatrixLayout_t weights, in, out;
    cublasLtMatmulAlgo_t algorithm;
    bool tuned;    /* it is the fastest of some */
    bool searched; /* of the library's candidates, and not of those of other numbers of rows */
};

struct library {
    cublasLtHandle_t handle;
    cublasLtMatmulPreference_t preference;
    cudaEvent_t begin, end;
    void *workspace;
    bf16 *scratch;
    struct gemm *gemms; /* [MAX_SHAPES] */
    int n_gemms;
};

/* ---- opening ---- */

/* The scratch memory is cleared: while an algorithm is chosen, sums are added to what is there. */
static cudaError_t open_memory(struct library *l, const struct queue *q)
{
    cudaError_t error = cudaMalloc(&l->workspace, WORKSPACE_BYTES);
    if (error == cudaSuccess)
        error = cudaMalloc((void **)&l->scratch, SCRATCH_BYTES);
    if (error == cudaSuccess)
        error = cudaMemsetAsync(l->scratch, 0, SCRATCH_BYTES, q->stream);
    if (error == cudaSuccess)
        error = cudaEventCreate(&l->begin);
    if (error == cudaSuccess)
        error = cudaEventCreate(&l->end);
    return error;
}

static cublasStatus_t open_handle(struct library *l)
{
    static const cublasLtMatmulPreferenceAttributes_t aligned[] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
    const size_t n_bytes = WORKSPACE_BYTES;
    const uint32_t alignment = ALIGNMENT; /* the library would count on 256 */
    cublasStatus_t status = cublasLtCreate(&l->handle);
    if (status == CUBLAS_STATUS_SUCCESS)
        status = cublasLtMatmulPreferenceCreate(&l->preference);
    if (status == CUBLAS_STATUS_SUCCESS)
        status = cublasLtMatmulPreferenceSetAttribute(
            l->preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &n_bytes, sizeof(n_bytes));
    for (int i = 0; i < 4 && status == CUBLAS_STATUS_SUCCESS; i++)
        status = cublasLtMatmulPreferenceSetAttribute(l->preference, aligned[i], &alignment,
                                                      sizeof(alignment));
    return status;
}

enum status library_open(struct library **out, struct cuda *c, struct error *err)
{
    struct library *l = (struct library *)calloc(1, sizeof(*l));
    if (l)
        l->gemms = (struct gemm *)calloc(MAX_SHAPES, sizeof(*l->gemms));
    if (!l || !l->gemms) {
        library_close(l);
        return fail(err, STATUS_NOMEM, "matrix library: out of memory");
    }
    const cudaError_t error = open_memory(l, &c->queue);
    if (error != cudaSuccess) {
        library_close(l);
        return fail(err, error == cudaErrorMemoryAllocation ? STATUS_NOMEM : STATUS_DEVICE,
                    "matrix library: %d MB of workspace: %s",
                    (WORKSPACE_BYTES + SCRATCH_BYTES) >> 20, cudaGetErrorString(error));
    }
    const cublasStatus_t status = open_handle(l);
    if (status != CUBLAS_STATUS_SUCCESS) {
        library_close(l);
        return fail(err, STATUS_DEVICE, "matrix library: cuBLASLt does not open (%d)", (int)status);
    }
    *out = l;
    return STATUS_OK;
}

static void gemm_close(struct gemm *g)
{
    if (g->operation)
        cublasLtMatmulDescDestroy(g->operation);
    if (g->weights)
        cublasLtMatrixLayoutDestroy(g->weights);
    if (g->in)
        cublasLtMatrixLayoutDestroy(g->in);
    if (g->out)
        cublasLtMatrixLayoutDestroy(g->out);
    *g = {};
}

void library_close(struct library *l)
{
    if (!l)
        return;
    for (int i = 0; i < l->n_gemms; i++)
        gemm_close(&l->gemms[i]);
    if (l->preference)
        cublasLtMatmulPreferenceDestroy(l->preference);
    if (l->handle)
        cublasLtDestroy(l->handle);
    if (l->begin)
        cudaEventDestroy(l->begin);
    if (l->end)
        cudaEventDestroy(l->end);
    cudaFree(l->workspace);
    cudaFree(l->scratch);
    free(l->gemms);
    free(l);
}

size_t library_bytes(const struct library *l)
{
    (void)l;
    return WORKSPACE_BYTES + SCRATCH_BYTES;
}

size_t library_bytes_of(const struct backend_options *options)
{
    (void)options;
    return library_bytes(nullptr);
}

void *library_scratch(struct library *l, size_t *n_bytes)
{
    *n_bytes = SCRATCH_BYTES;
    return l->scratch;
}

/* ---- one call of the library ---- */

static cublasStatus_t gemm_open(struct gemm *g, const struct gemm_shape *s)
{
    const cublasOperation_t transposed = CUBLAS_OP_T;
    const cudaDataType_t out_type = s->f32 ? CUDA_R_32F : CUDA_R_16BF;
    const uint64_t n_out = (uint64_t)s->n_out, n_in = (uint64_t)s->n_in, rows = (uint64_t)s->rows;
    *g = {};
    g->shape = *s;
    cublasStatus_t status = cublasLtMatmulDescCreate(&g->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    if (status == CUBLAS_STATUS_SUCCESS)
        status = cublasLtMatmulDescSetAttribute(g->operation, CUBLASLT_MATMUL_DESC_TRANSA,
                                                &transposed, sizeof(transposed));
    if (status == CUBLAS_STATUS_SUCCESS)
        status = cublasLtMatrixLayoutCreate(&g->weights, CUDA_R_16BF, n_in, n_out, s->n_in);
    if (status == CUBLAS_STATUS_SUCCESS)
        status = cublasLtMatrixLayoutCreate(&g->in, CUDA_R_16BF, n_in, rows, s->in_stride);
    if (status == CUBLAS_STATUS_SUCCESS)
        status = cublasLtMatrixLayoutCreate(&g->out, out_type, n_out, rows, s->out_stride);
    return status;
}

static cublasStatus_t gemm_run(struct cuda *c, const struct gemm *g,
                               const cublasLtMatmulAlgo_t *algorithm, const bf16 *weights,
                               const bf16 *in, void *out)
{
    const float one = 1, beta = g->shape.add ? 1 : 0;
    return cublasLtMatmul(c->library->handle, g->operation, &one, weights, g->weights, in, g->in,
                          &beta, out, g->out, out, g->out, algorithm, c->library->workspace,
                          WORKSPACE_BYTES, c->queue.stream);
}

/* Milliseconds of the fastest of a few runs, or -1 when the candidate does not run. */
static float gemm_time(struct cuda *c, const struct gemm *g, const cublasLtMatmulAlgo_t *algorithm,
                       const bf16 *weights, const bf16 *in, void *out)
{
    struct library *l = c->library;
    float best = -1;
    for (int i = 0; i < N_TIMED; i++) {
        float ms = 0;
        cudaEventRecord(l->begin, c->queue.stream);
        if (gemm_run(c, g, algorithm, weights, in, out) != CUBLAS_STATUS_SUCCESS)
            return -1;
        cudaEventRecord(l->end, c->queue.stream);
        if (cudaEventSynchronize(l->end) != cudaSuccess ||
            cudaEventElapsedTime(&ms, l->begin, l->end) != cudaSuccess)
            return -1;
        if (best < 0 || ms < best)
            best = ms;
    }
    return best;
}

static bool may_time(struct cuda *c, const struct gemm_shape *s)
{
    cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
    const size_t n_bytes = (size_t)s->rows * (size_t)s->out_stride * sizeof(float);
    return (!s->add || n_bytes <= SCRATCH_BYTES) && !c->queue.deterministic &&
           cudaStreamIsCapturing(c->queue.stream, &capturing) == cudaSuccess &&
           capturing == cudaStreamCaptureStatusNone;
}

static bool same_but_for_rows(const struct gemm_shape *a, const struct gemm_shape *b)
{
    struct gemm_shape c = *a;
    c.rows = b->rows;
    return !memcmp(&c, b, sizeof(c));
}

static bool is_power_of_two(int n)
{
    return (n & (n - 1)) == 0;
}

/* What the matrix's products of other numbers of rows were found to be fastest with among all, as
 * far as they can do this one; none where fewer than two are within a factor of two. Their kernels
 * are loaded: the library loads one in about a millisecond. Powers of two come first, but some of
 * them may be others' (glu.cuh). */
static int known_candidates(struct library *l, const struct gemm *g,
                            cublasLtMatmulAlgo_t out[N_CANDIDATES])
{
    int n = 0, n_near = 0;
    for (int i = 0; i < l->n_gemms && n < N_CANDIDATES; i++) {
        const struct gemm *other = &l->gemms[i];
        const int rows = other->shape.rows;
        cublasLtMatmulHeuristicResult_t result = {};
        if (!other->searched || !same_but_for_rows(&other->shape, &g->shape) ||
            cublasLtMatmulAlgoCheck(l->handle, g->operation, g->weights, g->in, g->out, g->out,
                                    &other->algorithm, &result) != CUBLAS_STATUS_SUCCESS ||
            result.workspaceSize > WORKSPACE_BYTES)
            continue;
        out[n++] = other->algorithm;
        n_near += rows < 2 * g->shape.rows && g->shape.rows < 2 * rows;
    }
    return n_near >= 2 ? n : 0;
}

static cublasStatus_t find_candidates(struct library *l, const struct gemm *g, int most,
                                      cublasLtMatmulAlgo_t out[N_CANDIDATES], int *n)
{
    cublasLtMatmulHeuristicResult_t results[N_CANDIDATES] = {};
    const cublasStatus_t status =
        cublasLtMatmulAlgoGetHeuristic(l->handle, g->operation, g->weights, g->in, g->out, g->out,
                                       l->preference, most, results, n);
    if (status != CUBLAS_STATUS_SUCCESS)
        return status;
    for (int i = 0; i < *n; i++)
        out[i] = results[i].algo;
    return *n ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}

/* The fastest of the candidates, -1: none runs. Timing writes results that the product itself
 * writes again; sums, which it must not disturb, go elsewhere. */
static int fastest(struct cuda *c, const struct gemm *g, const cublasLtMatmulAlgo_t *candidates,
                   int n, const bf16 *weights, const bf16 *in, void *out)
{
    void *to = g->shape.add ? c->library->scratch : out;
    int chosen = -1;
    float best = 0;
    for (int i = 0; i < n; i++) {
        const float ms = gemm_time(c, g, &candidates[i], weights, in, to);
        if (ms >= 0 && (chosen < 0 || ms < best)) {
            best = ms;
            chosen = i;
        }
    }
    return chosen;
}

/* The library's first candidate, or where timing is possible the fastest: of the library's for
 * powers of two, of those of other sizes for others, as far as they are known. */
static cublasStatus_t gemm_choose(struct cuda *c, struct gemm *g, const bf16 *weights,
                                  const bf16 *in, void *out)
{
    cublasLtMatmulAlgo_t candidates[N_CANDIDATES] = {};
    const bool timed = may_time(c, &g->shape);
    int n = 0, chosen = -1;
    if (timed && !is_power_of_two(g->shape.rows)) {
        n = known_candidates(c->library, g, candidates);
        chosen = fastest(c, g, candidates, n, weights, in, out);
    }
    g->searched = timed && chosen < 0;
    if (chosen < 0) {
        const cublasStatus_t status =
            find_candidates(c->library, g, timed ? N_CANDIDATES : 1, candidates, &n);
        if (status != CUBLAS_STATUS_SUCCESS)
            return status;
        if (timed && n > 1)
            chosen = fastest(c, g, candidates, n, weights, in, out);
    }
    g->algorithm = candidates[chosen < 0 ? 0 : chosen];
    g->tuned = timed;
    return CUBLAS_STATUS_SUCCESS;
}

/* The entry of a shape, made on its first use. A shape first met while a graph is captured is
 * timed when it is next met outside. The last entry serves all shapes the table has no room for. */
static cublasStatus_t gemm_find(struct cuda *c, const struct gemm_shape *shape, const bf16 *weights,
                                const bf16 *in, void *out, struct gemm **found)
{
    struct library *l = c->library;
    int i = 0;
    while (i < l->n_gemms && memcmp(&l->gemms[i].shape, shape, sizeof(*shape)))
        i++;
    cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
    struct gemm *g = &l->gemms[i < MAX_SHAPES ? i : MAX_SHAPES - 1];
    const bool known = i < l->n_gemms;
    if (!known) {
        gemm_close(g);
        status = gemm_open(g, shape);
        if (i < MAX_SHAPES)
            l->n_gemms = i + 1;
    }
    if (status == CUBLAS_STATUS_SUCCESS && (!known || (!g->tuned && may_time(c, shape))))
        status = gemm_choose(c, g, weights, in, out);
    *found = g;
    return status;
}

static void gemm(struct cuda *c, const struct gemm_shape *shape, const bf16 *weights,
                 const bf16 *in, void *out)
{
    struct gemm *g;
    if (c->queue.error != cudaSuccess)
        return;
    cublasStatus_t status = gemm_find(c, shape, weights, in, out, &g);
    if (status == CUBLAS_STATUS_SUCCESS)
        status = gemm_run(c, g, &g->algorithm, weights, in, out);
    if (status == CUBLAS_STATUS_SUCCESS)
        return;
    const cudaError_t error = cudaGetLastError();
    c->queue.error = error != cudaSuccess ? error : cudaErrorUnknown;
    c->queue.where = "cublasLtMatmul";
}

/* ---- passes around it; each reads and writes its arrays once ---- */

/* out [n] bf16 = q * scale of its row. n_in % 16 == 0: 16 weights a thread. */
static __global__ void dequantise_kernel(bf16 *out, const int8_t *q, const float *scales, int n_in,
                                         int64_t n)
{
    pdl_trigger();
    pdl_wait();
    const int64_t at = 16 * ((int64_t)blockIdx.x * blockDim.x + threadIdx.x);
    if (at >= n)
        return;
    const float scale = scales[at / n_in];
    const uint4 raw = load_streaming(q + at);
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
    uint32_t pairs[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const uint32_t two = words[i / 2] >> 16 * (i % 2);
        pairs[i] = bf16_pair(scale * (float)(int8_t)two, scale * (float)(int8_t)(two >> 8));
    }
    uint4 *to = reinterpret_cast<uint4 *>(out + at);
    to[0] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    to[1] = make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]);
}

/* out = act(gate + bias) * (up + bias), 8 values a thread, or 1 where rows are not aligned. */
template <int N>
static __global__ void activate_wide_kernel(const struct product p, const bf16 *wide)
{
    pdl_trigger();
    pdl_wait();
    const int row = blockIdx.x, width = p.w.n_out / 2;
    const int column = N * (blockIdx.y * blockDim.x + threadIdx.x);
    if (row >= *p.n_rows || column >= width)
        return;
    const bf16 *gate = wide + (int64_t)row * p.w.n_out + column, *up = gate + width;
    bf16 *out = (bf16 *)p.out + row * p.out_stride + column;
    alignas(16) bf16 g[N], u[N], y[N];
    if (N == 8) {
        *reinterpret_cast<uint4 *>(g) = *reinterpret_cast<const uint4 *>(gate);
        *reinterpret_cast<uint4 *>(u) = *reinterpret_cast<const uint4 *>(up);
    } else {
        g[0] = gate[0], u[0] = up[0];
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        const float b = p.w.bias ? p.w.bias[column + i] : 0;
        const float b_up = p.w.bias ? p.w.bias[width + column + i] : 0;
        y[i] =
            from_float<bf16>(activate_value(to_float(g[i]) + b, p.act) * (to_float(u[i]) + b_up));
    }
    if (N == 8)
        *reinterpret_cast<uint4 *>(out) = *reinterpret_cast<const uint4 *>(y);
    else
        out[0] = y[0];
}

/* Bias and activation of bf16 results that are in place. */
static __global__ void finish_kernel(const struct product p)
{
    pdl_trigger();
    pdl_wait();
    const int row = blockIdx.x, column = blockIdx.y * blockDim.x + threadIdx.x;
    if (row >= *p.n_rows || column >= p.w.n_out)
        return;
    const int64_t at = row * p.out_stride + column;
    const float bias = p.w.bias ? p.w.bias[column] : 0;
    product_store(p, at, to_float(((const bf16 *)p.out)[at]) + bias, 0);
}

static __device__ __forceinline__ float finished(const struct product &p, float y, int column)
{
    y += p.w.bias && column < p.w.n_out ? __ldg(p.w.bias + column) : 0;
    return p.softcap != 0 ? softcapped(y, p.softcap) : y;
}

/* Bias and softcap of f32 results that are in place: FINISH_AT_ONCE times N adjacent values a
 * thread, which are all on their way before the first is changed. N: 4, or 1 where rows are not
 * aligned. Bytes: 8 a value. */
template <int N>
static __global__ void __launch_bounds__(ELEMENT_THREADS)
    finish_f32_kernel(const __grid_constant__ struct product p)
{
    pdl_trigger();
    const int row = blockIdx.x, n = p.w.n_out;
    const bool here = row < *p.n_rows;
    const int first = N * (blockIdx.y * FINISH_AT_ONCE * ELEMENT_THREADS + threadIdx.x);
    float *const y = (float *)p.out + row * p.out_stride + first;
    pdl_wait();
    if (!here)
        return;
    alignas(16) float v[FINISH_AT_ONCE][N];
#pragma unroll
    for (int k = 0; k < FINISH_AT_ONCE; k++) {
        const int at = k * N * ELEMENT_THREADS;
        if (N == 4 && first + at + N <= n) {
            *reinterpret_cast<float4 *>(v[k]) = *reinterpret_cast<const float4 *>(y + at);
        } else {
#pragma unroll
            for (int i = 0; i < N; i++)
                v[k][i] = first + at + i < n ? y[at + i] : 0;
        }
    }
#pragma unroll
    for (int k = 0; k < FINISH_AT_ONCE; k++) {
        const int at = k * N * ELEMENT_THREADS;
#pragma unroll
        for (int i = 0; i < N; i++)
            v[k][i] = finished(p, v[k][i], first + at + i);
        if (N == 4 && first + at + N <= n) {
            *reinterpret_cast<float4 *>(y + at) = *reinterpret_cast<const float4 *>(v[k]);
        } else {
#pragma unroll
            for (int i = 0; i < N; i++)
                if (first + at + i < n)
                    y[at + i] = v[k][i];
        }
    }
}

static dim3 element_grid(const struct product *p, int width, int per_thread)
{
    return dim3(p->rows, ceil_div(width, ELEMENT_THREADS * per_thread));
}

static void finish_f32(struct cuda *c, const struct product *p)
{
    const bool aligned = p->out_stride % 4 == 0;
    launch(&c->queue, "product_finish", aligned ? finish_f32_kernel<4> : finish_f32_kernel<1>,
           element_grid(p, p->w.n_out, FINISH_AT_ONCE * (aligned ? 4 : 1)), ELEMENT_THREADS, 0, *p);
}

static void finish(struct cuda *c, const struct product *p, const bf16 *wide)
{
    if (p->output == OUTPUT_ACTIVATE) {
        const int width = p->w.n_out / 2;
        const bool aligned = width % 8 == 0 && p->out_stride % 8 == 0;
        launch(&c->queue, "activate_wide",
               aligned ? activate_wide_kernel<8> : activate_wide_kernel<1>,
               element_grid(p, width, aligned ? 8 : 1), ELEMENT_THREADS, 0, *p, wide);
    } else if (p->output == OUTPUT_F32 || p->output == OUTPUT_ADD) {
        if (p->w.bias || p->softcap != 0)
            finish_f32(c, p);
    } else if (p->w.bias || p->output == OUTPUT_ACTIVATE_PLAIN) {
        launch(&c->queue, "product_finish", finish_kernel, element_grid(p, p->w.n_out, 1),
               ELEMENT_THREADS, 0, *p);
    }
}

/* ---- the product ---- */

/* Columns that the library computes: it wants 16-byte multiples, or falls back to a kernel that
 * is several times slower. */
static int columns_of(const struct product *p)
{
    return p->n_padded ? p->n_padded : p->w.n_out;
}

/* int8 weights block by block, so that the scratch memory bounds what they take as bf16. */
static void gemm_int8(struct cuda *c, const struct product *p, struct gemm_shape *shape, char *out)
{
    const int n_in = p->w.n_in;
    const int most = (int)(SCRATCH_BYTES / sizeof(bf16)) / n_in / ALIGNMENT * ALIGNMENT;
    bf16 *const weights = c->library->scratch;
    for (int first = 0; first < p->w.n_out && c->queue.error == cudaSuccess; first += most) {
        const int n_left = columns_of(p) - first, n_there = p->w.n_out - first;
        const int n_out = n_left < most ? n_left : most;
        const int64_t n = (int64_t)(n_there < n_out ? n_there : n_out) * n_in;
        char *to = out + (size_t)first * (shape->f32 ? 4 : 2);
        struct gemm *g; /* found before the weights are there: choosing uses the scratch memory */
        shape->n_out = n_out;
        gemm_find(c, shape, weights, (const bf16 *)p->in, to, &g);
        launch(&c->queue, "dequantise", dequantise_kernel,
               dim3((unsigned)((n / 16 + ELEMENT_THREADS - 1) / ELEMENT_THREADS)), ELEMENT_THREADS,
               0, weights, (const int8_t *)p->w.data + (int64_t)first * n_in, p->w.scales + first,
               n_in, n);
        gemm(c, shape, weights, (const bf16 *)p->in, to);
    }
}

void library_product(struct cuda *c, const struct product *p, bf16 *wide)
{
    const struct product q = product_without_norm(c, p);
    const bool pairs = q.output == OUTPUT_ACTIVATE;
    char *out = pairs ? (char *)wide : (char *)q.out;
    /* The library gathers nothing, and was told that addresses are aligned. */
    if (q.in_rows || !skinny_possible(&q) || (uintptr_t)out % ALIGNMENT) {
        skinny_product(c, &q);
        return;
    }
    struct gemm_shape shape = {}; /* padding is compared, too */
    shape.in_stride = q.in_stride;
    shape.out_stride = pairs ? q.w.n_out : q.out_stride;
    shape.n_out = columns_of(&q);
    shape.n_in = q.w.n_in;
    shape.rows = q.rows;
    shape.f32 = q.output == OUTPUT_F32 || q.output == OUTPUT_ADD;
    shape.add = q.output == OUTPUT_ADD;
    if (q.w.dtype == DTYPE_I8)
        gemm_int8(c, &q, &shape, out);
    else
        gemm(c, &shape, (const bf16 *)q.w.data, (const bf16 *)q.in, out);
    finish(c, &q, wide);
}
