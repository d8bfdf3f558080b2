/* draw_block.cuh - what the threads of a block do together when drawing: best keys, sums of
 * weights and where they reach a target, sorting.
 *
 * All functions are called by every thread of the block, and end with a barrier unless they
 * say otherwise; scratch is in shared memory.
 */
#ifndef LATTE_CUDA_DRAW_BLOCK_CUH
#define LATTE_CUDA_DRAW_BLOCK_CUH

#include "engine/kernels/cuda/draw_row.cuh"

struct block_scratch {
    uint64_t warps[WARP]; /* a value of each warp */
    uint64_t rest, mass;  /* what find_chunk found */
    int32_t index;
    int32_t count;
};

/* The largest key of a warp, in all lanes. */
static __device__ __forceinline__ uint64_t warp_best(uint64_t key)
{
    const uint32_t high = (uint32_t)(key >> 32);
    const uint32_t most = __reduce_max_sync(0xffffffffu, high);
    const uint32_t low = __reduce_max_sync(0xffffffffu, high == most ? (uint32_t)key : 0u);
    return (uint64_t)most << 32 | low;
}

static __device__ uint64_t block_best(uint64_t key, struct block_scratch *s)
{
    key = warp_best(key);
    if (threadIdx.x % WARP == 0)
        s->warps[threadIdx.x / WARP] = key;
    __syncthreads();
    uint64_t best = 0;
    for (int w = 0; w < (int)blockDim.x / WARP; w++)
        best = s->warps[w] > best ? s->warps[w] : best;
    __syncthreads();
    return best;
}

static __device__ __forceinline__ uint64_t warp_scan(uint64_t x)
{
    for (int o = 1; o < WARP; o *= 2) {
        const uint64_t below = __shfl_up_sync(0xffffffffu, x, o);
        x += (int)(threadIdx.x % WARP) >= o ? below : 0;
    }
    return x;
}

/* A warp's sum of weights of up to 2^46 a lane. */
static __device__ __forceinline__ uint64_t warp_weight(uint64_t w)
{
    const uint32_t high = __reduce_add_sync(0xffffffffu, (uint32_t)(w >> 22));
    const uint32_t low = __reduce_add_sync(0xffffffffu, (uint32_t)(w & 0x3fffff));
    return ((uint64_t)high << 22) + low;
}

/* A thread's share of a sum in order: what lies before it, its own, and all. */
struct chunk {
    uint64_t before, sum, total;
};

static __device__ struct chunk block_scan(uint64_t mine, struct block_scratch *s)
{
    const int warp = threadIdx.x / WARP;
    const uint64_t up_to = warp_scan(mine);
    if (threadIdx.x % WARP == WARP - 1)
        s->warps[warp] = up_to;
    __syncthreads();
    struct chunk c = {up_to - mine, mine, 0};
    for (int w = 0; w < (int)blockDim.x / WARP; w++) {
        c.before += w < warp ? s->warps[w] : 0;
        c.total += s->warps[w];
    }
    __syncthreads();
    return c;
}

static __device__ __forceinline__ int chunk_size(int n)
{
    return (n + blockDim.x - 1) / blockDim.x;
}

/* Sums of get(0..n-1), adjacent ones to a thread. */
template <class Get>
static __device__ __forceinline__ struct chunk chunk_sums(int n, Get get, struct block_scratch *s)
{
    const int size = chunk_size(n), first = threadIdx.x * size;
    uint64_t mine = 0;
    for (int i = first; i < first + size && i < n; i++)
        mine += get(i);
    return block_scan(mine, s);
}

/* The first i at which the running sum exceeds r < total: s->index; s->rest is r less what lies
 * before i, s->mass is get(i). */
template <class Get>
static __device__ __forceinline__ void find_chunk(struct chunk c, int n, Get get, uint64_t r,
                                                  struct block_scratch *s)
{
    if (c.before <= r && r < c.before + c.sum) {
        uint64_t rest = r - c.before;
        int i = threadIdx.x * chunk_size(n);
        for (uint64_t mass = get(i); rest >= mass; mass = get(i)) {
            rest -= mass;
            i++;
        }
        s->index = i;
        s->rest = rest;
        s->mass = get(i);
    }
    __syncthreads();
}

/* Sort keys [n] in shared memory, largest first; there is room up to the next power of two. */
static __device__ void sort_keys(uint64_t *keys, int n)
{
    int size = 1;
    while (size < n)
        size *= 2;
    for (int i = n + threadIdx.x; i < size; i += blockDim.x)
        keys[i] = 0;
    __syncthreads();
    for (int run = 2; run <= size; run *= 2)
        for (int apart = run / 2; apart; apart /= 2) {
            for (int i = threadIdx.x; i < size / 2; i += blockDim.x) {
                const int a = 2 * i - (i & (apart - 1)), b = a + apart;
                const uint64_t x = keys[a], y = keys[b];
                if ((x < y) == !(a & run)) {
                    keys[a] = y;
                    keys[b] = x;
                }
            }
            __syncthreads();
        }
}

/* Whether this block is the last of n that come here for a row; what the others wrote to global
 * memory before is then visible to it (read it past the first cache: __ldcg). */
static __device__ bool last_of(int32_t *n_done, int n, struct block_scratch *s)
{
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence(); /* for all: the barrier has ordered their writes before it */
        s->count = atomicAdd(n_done, 1);
        if (s->count == n - 1)
            *n_done = 0; /* for the next step */
        __threadfence();
    }
    __syncthreads();
    const bool last = s->count == n - 1;
    __syncthreads();
    return last;
}

#endif
