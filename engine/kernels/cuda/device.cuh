/* device.cuh - what every CUDA kernel of this folder stands on: the queue kernels are launched
 * into, the step as the device sees it, and a few instructions that C++ has no word for.
 *
 * Kernels use plain CUDA C++ and what is declared here, nothing else: no cooperative groups, no
 * grid-wide barrier, no inline assembly of their own. So the same files are also built by the
 * host compiler against tests/emulate/emulate.h (LATTE_EMULATE), which runs the threads of a
 * block as fibers, block after block: `make test` checks every kernel on machines without a GPU.
 *
 * Clusters (launch_cluster, capability 9.0 and later): blocks that run at the same time, meet at
 * cluster_sync() and reach each other's dynamic shared memory by cluster_peer().
 *
 * Programmatic dependent launch: on compute capability 9.0 and later a kernel may start while
 * its predecessor still runs. Every kernel therefore calls pdl_wait() before it reads what
 * another kernel of the step wrote and before its first write to global memory. Before that it
 * may read weights and constants, the step's arrays (which are there when the first kernel after
 * the one that takes them begins, unless it is told that they are late), and state that no
 * earlier kernel of the step writes: that is what the overlap is for.
 * pdl_trigger() lets the successor start; kernels call it first thing, but for those whose
 * successor's weights would come before what they read themselves. Blocks with nothing to do
 * may return without waiting as long as some block of each grid waits: the kernel after it counts
 * on all kernels before it.
 *
 * Threads: launchers are called by the engine thread alone.
 * Memory:  launchers allocate nothing. Kernels get raw device pointers.
 * Errors:  the first failed launch is kept in queue.error; launchers return nothing.
 */
#ifndef LATTE_CUDA_DEVICE_CUH
#define LATTE_CUDA_DEVICE_CUH

#include <stdint.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

typedef __nv_bfloat16 bf16;
typedef __nv_fp8_e4m3 fp8;

enum {
    WARP = 32,
    PIECE_ROWS = 64, /* rows of a piece at most: the unit in which prompts are cut for kernels */
};

/* Where kernels go: one stream of one device. */
struct queue {
    cudaStream_t stream;
    cudaError_t error; /* the first failure, cudaSuccess if none */
    const char *where; /* the launcher it happened in */
    int n_sms;
    size_t l2_bytes;
    int capability;     /* 10 * major + minor: 80, 90, ... */
    bool pdl;           /* programmatic dependent launch is possible and wanted */
    bool alone;         /* the next launch begins when all before it has ended */
    bool deterministic; /* every result the same whatever the batch */
};

/* Actual sizes of this step; a captured graph is launched for up to the sizes of its bucket. */
struct step_sizes {
    int32_t n_rows, n_seqs, n_pieces, n_logit_rows, n_draws, n_scores;
};

/* Adjacent rows of one sequence, at most PIECE_ROWS. Pieces are in order of rows; a sequence's
 * first piece starts at its first row and all but its last are full, so that what a piece
 * computes does not depend on other sequences. */
struct piece {
    int32_t seq, row, n_rows; /* row: the first one, in the step */
    int32_t first;            /* index of the sequence's first piece */
};

/* A step in device memory. Arrays as in struct step of backend.h. */
struct device_step {
    const struct step_sizes *sizes;
    const int32_t *tokens;      /* [n_rows] as the host gave them, TOKEN_DRAWN among them */
    const int32_t *drawn;       /* [n_slots] what TOKEN_DRAWN stands for; NULL: it never occurs */
    const int64_t *positions;   /* [n_rows] */
    const int32_t *row_slot;    /* [n_rows] slot of the row's sequence */
    const int32_t *seq_slot;    /* [n_seqs] */
    const int32_t *seq_start;   /* [n_seqs + 1] */
    const struct piece *pieces; /* [n_pieces] */
    const int32_t *logit_rows;  /* [n_logit_rows] */

    /* Sizes of the bucket, known when launching: grids are made from these, kernels look at
     * *sizes and return early. */
    int rows, seqs, n_pieces, logits;
    bool decode;     /* every sequence has exactly one row: row r is sequence r */
    bool drawn_from; /* the step draws or scores: the host sees no logits of it */
    bool late;       /* the kernels that now come see these arrays only after pdl_wait */
};

/* A slot's state tensor: row `slot` of [n_slots, row_values]. */
template <class T> struct device_slab {
    T *data;
    int64_t row_values;
};

#ifdef LATTE_EMULATE
#include "tests/emulate/emulate.h"
#else
#include "engine/kernels/cuda/instructions.cuh"
#endif

/* Launch kernel<<<grid, block, shared_bytes>>>(args...) in clusters of `cluster` blocks along x, at
 * most 16, of which grid.x is a multiple; with programmatic dependent launch where the queue wants
 * it. Does nothing once the queue has failed. */
template <class... P, class... A>
static inline void launch_cluster(struct queue *q, const char *where, void (*kernel)(P...),
                                  dim3 grid, int cluster, int block, size_t shared_bytes, A... args)
{
    if (q->error != cudaSuccess || !grid.x || !grid.y || !grid.z)
        return;
    const bool overlaps = q->pdl;
    q->pdl &= !q->alone;
    q->alone = false;
    q->error =
        launch_kernel(q, kernel, grid, cluster, block, shared_bytes, static_cast<P>(args)...);
    q->pdl = overlaps;
    if (q->error != cudaSuccess)
        q->where = where;
}

/* The same, for kernels whose blocks are made to find room beside others': an SM's shared memory is
 * otherwise no larger than the first kernel's own blocks need. */
template <class... P, class... A>
static inline void launch_beside(struct queue *q, const char *where, void (*kernel)(P...),
                                 dim3 grid, int cluster, int block, size_t shared_bytes, A... args)
{
    if (q->error == cudaSuccess && (q->error = prefer_shared(kernel)) != cudaSuccess)
        q->where = where;
    launch_cluster(q, where, kernel, grid, cluster, block, shared_bytes, args...);
}

/* launch_cluster without clusters. */
template <class... P, class... A>
static inline void launch(struct queue *q, const char *where, void (*kernel)(P...), dim3 grid,
                          int block, size_t shared_bytes, A... args)
{
    launch_cluster(q, where, kernel, grid, 0, block, shared_bytes, args...);
}

/* Shared memory that one block may have. */
static inline size_t shared_limit(const struct queue *q)
{
    const bool large = q->capability == 80 || q->capability == 87;
    const bool largest = q->capability == 90 || q->capability / 10 == 10;
    return (size_t)(largest ? 227 : large ? 163 : 99) * 1024;
}

static inline int ceil_div(int a, int b)
{
    return (a + b - 1) / b;
}

/* ---- reductions; every thread gets the result ---- */

static __device__ __forceinline__ float warp_sum(float x)
{
    for (int o = 16; o; o >>= 1)
        x += __shfl_xor_sync(0xffffffffu, x, o);
    return x;
}

static __device__ __forceinline__ float warp_max(float x)
{
    for (int o = 16; o; o >>= 1)
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, o));
    return x;
}

/* Over a block of up to 1024 threads, a multiple of 32; scratch [32] is shared memory. Ends
 * with a barrier, so scratch may be used again at once. */
static __device__ __forceinline__ float block_sum(float x, float *scratch)
{
    const int warp = threadIdx.x / WARP, n = blockDim.x / WARP;
    x = warp_sum(x);
    if (threadIdx.x % WARP == 0)
        scratch[warp] = x;
    __syncthreads();
    float sum = 0;
    for (int i = 0; i < n; i++)
        sum += scratch[i];
    __syncthreads();
    return sum;
}

/* ---- values of any storage type as float ---- */

static __device__ __forceinline__ float to_float(float x)
{
    return x;
}
static __device__ __forceinline__ float to_float(bf16 x)
{
    return __bfloat162float(x);
}
static __device__ __forceinline__ float to_float(fp8 x)
{
    return float(x);
}
template <class T> static __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x)
{
    return x;
}
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x)
{
    return __float2bfloat16_rn(x);
}
template <> __device__ __forceinline__ fp8 from_float<fp8>(float x)
{
    return fp8(x); /* saturates at 448 */
}

#endif
