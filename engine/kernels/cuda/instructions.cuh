/* instructions.cuh - PTX under C++ names; tests/emulate/emulate.h has the same names for the
 * host. Shapes and fragment layouts are those of the PTX manual. Included by device.cuh only. */
#ifndef LATTE_CUDA_INSTRUCTIONS_CUH
#define LATTE_CUDA_INSTRUCTIONS_CUH

#include <cuda.h>

/* T *name = the block's dynamic shared memory, aligned to 128 bytes. */
#define DYNAMIC_SHARED(T, name)                                                                    \
    extern __shared__ __align__(128) unsigned char dynamic_shared[];                               \
    T *name = reinterpret_cast<T *>(dynamic_shared)

static __device__ __forceinline__ void pdl_wait(void)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

static __device__ __forceinline__ void pdl_trigger(void)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

/* d[4] += a[4] b[2]: the warp's 16x8 f32 tile plus 16x16 bf16 (row-major) times 16x8 (column-
 * major). Lane l, g = l/4, t = l%4: a[0] rows g, columns 2t,2t+1; a[1] row g+8; a[2] row g,
 * columns 2t+8,+9; a[3] row g+8, columns 2t+8,+9. b[0] column g, rows 2t,2t+1; b[1] rows
 * 2t+8,+9. d[0..1] row g, columns 2t,2t+1; d[2..3] row g+8. */
static __device__ __forceinline__ void mma_bf16(float d[4], const uint32_t a[4],
                                                const uint32_t b[2])
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, "
                 "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* (x & mask) | more, where the compiler would make two instructions of two constants. */
static __device__ __forceinline__ uint32_t and_or(uint32_t x, uint32_t mask, uint32_t more)
{
    uint32_t y;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(x), "r"(mask), "r"(more));
    return y;
}

/* a b + c of pairs of bf16, rounded once. */
static __device__ __forceinline__ uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c)
{
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

/* Four 8x8 matrices of 16-bit values from shared memory: lane 8i+j gives the address of
 * row j of matrix i; out[i] of lane l holds row l/4, columns 2(l%4), +1 of matrix i. */
static __device__ __forceinline__ void ldmatrix_x4(uint32_t out[4], const void *row)
{
    uint32_t address = (uint32_t)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
}

/* The same, each matrix transposed. */
static __device__ __forceinline__ void ldmatrix_x4_trans(uint32_t out[4], const void *row)
{
    uint32_t address = (uint32_t)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
}

/* Copy 16 bytes, both sides aligned to 16, from global to shared memory in the background; zeros
 * where !valid (the source is not read). */
static __device__ __forceinline__ void copy_async_16(void *shared, const void *global,
                                                     bool valid = true)
{
    uint32_t address = (uint32_t)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
}

/* How L2 is to keep what is copied: as anything else or, where it is read once a step, only while
 * nothing else wants the place. */
typedef uint64_t l2_policy;

static __device__ __forceinline__ l2_policy l2_keep(bool as_usual)
{
    l2_policy usual, first;
    asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(usual));
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(first));
    return as_usual ? usual : first;
}

/* The policy counts for 9.0 alone, and by the one compiler whose machine code has been looked at.
 * Where nvcc 13.0 makes the shared address of a register and a uniform one, this is no legal
 * instruction (LDGSTS with an odd descriptor, "an illegal instruction was encountered"): what calls
 * it is to be tested on a GPU, in every shape. */
static __device__ __forceinline__ void copy_async_16(void *shared, const void *global, bool valid,
                                                     l2_policy policy)
{
#if __CUDA_ARCH__ == 900 && __CUDACC_VER_MAJOR__ == 13 && __CUDACC_VER_MINOR__ == 0
    uint32_t address = (uint32_t)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(address),
                 "l"(global), "r"(valid ? 16 : 0), "l"(policy)
                 : "memory");
#else
    (void)policy;
    copy_async_16(shared, global, valid);
#endif
}

static __device__ __forceinline__ void copy_async_commit(void)
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* Wait until at most N of this thread's committed groups are unfinished; a __syncthreads makes
 * them visible to the block. */
template <int N> static __device__ __forceinline__ void copy_async_wait(void)
{
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

/* 2^x, 1 / x and the square root, one instruction each: good to 2 units in the last place, and
 * what is subnormal counts as 0. */
static __device__ __forceinline__ float quick_exp2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

static __device__ __forceinline__ float quick_reciprocal(float x)
{
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

static __device__ __forceinline__ float quick_sqrt(float x)
{
    float y;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* 16 bytes of read-only memory that will not be read again soon (weights, rings). */
static __device__ __forceinline__ uint4 load_streaming(const void *p)
{
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

/* 16 bytes that an earlier kernel wrote, for this thread alone; after what stands before it. */
static __device__ __forceinline__ uint4 load_once(const void *p)
{
    uint4 v;
    asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

/* p, computed here and kept: without it the compiler may compute an address again for every load,
 * after a wait rather than before it. */
template <class T> static __device__ __forceinline__ T *kept_address(T *p)
{
    asm volatile("" : "+l"(p));
    return p;
}

/* Ask for the line of global memory that p is in; a hint, for data soon to be read. */
static __device__ __forceinline__ void prefetch_l2(const void *p)
{
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

/* The 128 bytes at p, aligned, need not be kept: until they are written again they hold anything,
 * and what L2 has of them does not go to memory. */
static __device__ __forceinline__ void discard_line(void *p)
{
    asm volatile("discard.global.L2 [%0], 128;" ::"l"(p) : "memory");
}

/* ---- clusters: the blocks of a launch_cluster() that run at the same time (9.0 and later) ---- */

static __device__ __forceinline__ int cluster_rank(void)
{
    uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return (int)rank;
}

/* The cluster's barrier, in two halves: what a thread wrote before it arrives (to its own, its
 * peers' or global memory) is seen by all that have waited. Threads that have returned are not
 * waited for. All lanes of a warp together. */
static __device__ __forceinline__ void cluster_arrive(void)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#else
    __trap();
#endif
}

/* The same before a thread has written anything: it waits for no memory. */
static __device__ __forceinline__ void cluster_arrive_relaxed(void)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#else
    __trap();
#endif
}

static __device__ __forceinline__ void cluster_wait(void)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    __trap();
#endif
}

static __device__ __forceinline__ void cluster_sync(void)
{
    cluster_arrive();
    cluster_wait();
}

/* The same place in the dynamic shared memory of block `rank` of the cluster, for plain loads
 * and stores. That block must have begun and must not end meanwhile: a cluster_sync before the
 * first use and one after the last. */
template <class T> static __device__ __forceinline__ T *cluster_peer(T *shared, int rank)
{
#if __CUDA_ARCH__ >= 900
    uint64_t address;
    asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(shared), "r"(rank));
    return reinterpret_cast<T *>(address);
#else
    __trap();
    return shared + 0 * rank;
#endif
}

/* ---- bulk copies: whole rows to shared memory, a few instructions a block (9.0 and later) ---- */

/* Counts the bytes of the copies that name it, once in a kernel. In shared memory. */
typedef uint64_t bulk_barrier;

/* All lanes of a warp: n_bytes are to come, for each of n barriers, at most one a lane. Before it,
 * nobody may copy; before a barrier of the block that comes after it, nobody may wait. */
static __device__ __forceinline__ void bulk_begin(bulk_barrier *b, uint32_t n_bytes, int n = 1)
{
#if __CUDA_ARCH__ >= 900
    const int lane = threadIdx.x % WARP;
    const uint32_t address = (uint32_t)__cvta_generic_to_shared(b + lane);
    if (lane < n) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncwarp(); /* for racecheck, which takes the two for different lanes' */
    if (lane < n)
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address),
                     "r"(n_bytes)
                     : "memory");
    __syncwarp();
#else
    (void)b, (void)n_bytes, (void)n;
    __trap();
#endif
}

/* One thread: copy n_bytes in the background; addresses and sizes are multiples of 16. */
static __device__ __forceinline__ void bulk_copy(void *shared, const void *global, uint32_t n_bytes,
                                                 bulk_barrier *b)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], "
                 "%2, [%3];" ::"r"((uint32_t)__cvta_generic_to_shared(shared)),
                 "l"(global), "r"(n_bytes), "r"((uint32_t)__cvta_generic_to_shared(b))
                 : "memory");
#else
    (void)shared, (void)global, (void)n_bytes, (void)b;
    __trap();
#endif
}

/* Any thread: until all of the bytes are there, for this thread to read. */
static __device__ __forceinline__ void bulk_wait(bulk_barrier *b)
{
#if __CUDA_ARCH__ >= 900
    const uint32_t address = (uint32_t)__cvta_generic_to_shared(b);
    uint32_t done = 0;
    while (!done)
        asm volatile("{\n.reg .pred p;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0;\n"
                     "selp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(address)
                     : "memory");
#else
    (void)b;
    __trap();
#endif
}

/* Machine code for 9.0 alone (sm_90a). */
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define LATTE_WARPGROUPS 1
#endif

/* ---- barriers that are used again and again (PTX's mbarrier), and copies by tensor maps (9.0 and
 * later) ----
 *
 * A phase of a barrier ends when all arrivals that it counts have come, and all bytes that were
 * expected in it; then the next one begins. Phases are named by their parity, the first by 0. */

/* One thread: n arrivals a phase. A cluster_sync, or in a block alone its barrier, before others
 * use it. */
static __device__ __forceinline__ void mbarrier_begin(bulk_barrier *b, int n)
{
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"((uint32_t)__cvta_generic_to_shared(b)),
        "r"(n)
        : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
    (void)b, (void)n;
    __trap();
#endif
}

/* Arrive, and expect so many bytes of copies in this phase. */
static __device__ __forceinline__ void mbarrier_expect(bulk_barrier *b, uint32_t n_bytes)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                     (uint32_t)__cvta_generic_to_shared(b)),
                 "r"(n_bytes)
                 : "memory");
#else
    (void)b, (void)n_bytes;
    __trap();
#endif
}

/* Arrive at the same barrier of block `rank` of the cluster, after what the thread's products have
 * read of shared memory; what it has written there is for products after a shared_for_products
 * before this. */
static __device__ __forceinline__ void mbarrier_arrive(bulk_barrier *b, int rank)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("{\n.reg .b32 there;\n"
                 "mapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(
                     (uint32_t)__cvta_generic_to_shared(b)),
                 "r"(rank)
                 : "memory");
#else
    (void)b, (void)rank;
    __trap();
#endif
}

/* Until the phase of that parity has ended. The phase before the first counts as ended. */
static __device__ __forceinline__ void mbarrier_wait(bulk_barrier *b, uint32_t parity)
{
#if __CUDA_ARCH__ >= 900
    const uint32_t address = (uint32_t)__cvta_generic_to_shared(b);
    uint32_t done = 0;
    while (!done)
        asm volatile("{\n.reg .pred p;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(address), "r"(parity)
                     : "memory");
#else
    (void)b, (void)parity;
    __trap();
#endif
}

/* A matrix in global memory, and the boxes that are copied of it. A __grid_constant__ parameter. */
struct tensor_map {
    CUtensorMap map;
};

/* bf16 values at `base`, dims values of which strides bytes apart (the first: 2), in boxes whose
 * rows of 64 values have changed places as wgmma_bf16 wants them. False: not such a matrix, or the
 * driver has no tensor maps. What lies beyond it is copied as zeros. */
template <int N>
static inline bool tensor_map_encode(struct tensor_map *m, const void *base,
                                     const uint64_t (&dims)[N], const uint64_t (&strides)[N - 1],
                                     const uint32_t (&box)[N])
{
    void *encode = nullptr;
    cudaDriverEntryPointQueryResult found;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000,
                                         cudaEnableDefault, &found) != cudaSuccess ||
        found != cudaDriverEntryPointSuccess) {
        (void)cudaGetLastError(); /* an answer, not a failure */
        return false;
    }
    const uint32_t steps[5] = {1, 1, 1, 1, 1};
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encode)(
               &m->map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, N, const_cast<void *>(base), dims,
               strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

/* One thread: the box at (x, y) of a matrix of two dimensions, to 1,024-byte aligned shared memory;
 * its bytes are counted by b. */
static __device__ __forceinline__ void tensor_copy_2d(void *shared, const struct tensor_map *m,
                                                      int x, int y, bulk_barrier *b,
                                                      l2_policy policy)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                 ".L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(
                     (uint32_t)__cvta_generic_to_shared(shared)),
                 "l"(m), "r"(x), "r"(y), "r"((uint32_t)__cvta_generic_to_shared(b)), "l"(policy)
                 : "memory");
#else
    (void)shared, (void)m, (void)x, (void)y, (void)b, (void)policy;
    __trap();
#endif
}

static __device__ __forceinline__ void tensor_copy_2d(void *shared, const struct tensor_map *m,
                                                      int x, int y, bulk_barrier *b)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3}], [%4];" ::"r"((uint32_t)__cvta_generic_to_shared(shared)),
                 "l"(m), "r"(x), "r"(y), "r"((uint32_t)__cvta_generic_to_shared(b))
                 : "memory");
#else
    (void)shared, (void)m, (void)x, (void)y, (void)b;
    __trap();
#endif
}

/* The same of five dimensions, at (x, 0, 0, 0, y), to the same place in each block of the cluster
 * whose bit is set, and counted by the same barrier there. Of 9.0 alone. */
static __device__ __forceinline__ void tensor_send_5d(void *shared, const struct tensor_map *m,
                                                      int x, int y, bulk_barrier *b, int blocks)
{
#ifdef LATTE_WARPGROUPS
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                 ".multicast::cluster [%0], [%1, {%2, %3, %3, %3, %4}], [%5], %6;" ::"r"(
                     (uint32_t)__cvta_generic_to_shared(shared)),
                 "l"(m), "r"(x), "r"(0), "r"(y), "r"((uint32_t)__cvta_generic_to_shared(b)),
                 "h"((uint16_t)blocks)
                 : "memory");
#else
    (void)shared, (void)m, (void)x, (void)y, (void)b, (void)blocks;
    __trap();
#endif
}

/* ---- products of warpgroups: four warps, 64 rows (machine code for 9.0 alone, sm_90a) ----
 *
 * What lies in shared memory is rows of 64 bf16 values, beginning at a multiple of 1,024 bytes: the
 * 16-byte pieces of a row have changed places, piece p of row r lies at p ^ (r % 8). */

/* All threads of a warpgroup: so many registers a thread from here on, what others gave. */
template <int N> static __device__ __forceinline__ void registers_give(void)
{
#ifdef LATTE_WARPGROUPS
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
#endif
}

template <int N> static __device__ __forceinline__ void registers_take(void)
{
#ifdef LATTE_WARPGROUPS
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
#endif
}

/* What threads have written to shared memory is seen by products and bulk copies that follow. */
static __device__ __forceinline__ void shared_for_products(void)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

static __device__ __forceinline__ uint64_t wgmma_factor(const bf16 *rows)
{
    const uint64_t address = (uint64_t)__cvta_generic_to_shared(rows);
    const uint64_t eight_rows = 1024 >> 4, swizzle_128 = 1;
    return (address & 0x3ffff) >> 4 | (uint64_t)1 << 16 | eight_rows << 32 | swizzle_128 << 62;
}

/* Before the first product, when registers of the sums have been written. */
static __device__ __forceinline__ void wgmma_begin(void)
{
#ifdef LATTE_WARPGROUPS
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

static __device__ __forceinline__ void wgmma_commit(void)
{
#ifdef LATTE_WARPGROUPS
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

/* Until at most N of the committed groups are unfinished. Before sums are read: wgmma_finish. */
template <int N> static __device__ __forceinline__ void wgmma_wait(void)
{
#ifdef LATTE_WARPGROUPS
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
#endif
}

#define WGMMA_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WGMMA_16(d, i) WGMMA_4(d, i), WGMMA_4(d, i + 4), WGMMA_4(d, i + 8), WGMMA_4(d, i + 12)

/* d[N / 2] += a b^T (or, if !add, d = a b^T) in the background: 64 rows of a, N of b, 16 columns,
 * from `column` on of the 64.
 * Of tile n of 8 columns d[4 n ..] are as mma_bf16's d, in warp w's rows 16 w on. */
template <int N>
static __device__ __forceinline__ void wgmma_bf16(float (&d)[N / 2], const bf16 *a, const bf16 *b,
                                                  int column, bool add = true)
{
    static_assert(N == 64 || N == 256, "instructions there are names for");
    const uint64_t left = wgmma_factor(a) + column / 8, right = wgmma_factor(b) + column / 8;
#ifdef LATTE_WARPGROUPS
    if constexpr (N == 64)
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
                     "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
                     "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "
                     "%32, %33, p, 1, 1, 0, 0;\n}"
                     : WGMMA_16(d, 0), WGMMA_16(d, 16)
                     : "l"(left), "l"(right), "r"((int)add));
    if constexpr (N == 256)
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
                     "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
                     "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
                     "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
                     "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"
                     "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"
                     "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"
                     "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,"
                     "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%"
                     "127}, %128, %129, p, 1, 1, 0, 0;\n}"
                     : WGMMA_16(d, 0), WGMMA_16(d, 16), WGMMA_16(d, 32), WGMMA_16(d, 48),
                       WGMMA_16(d, 64), WGMMA_16(d, 80), WGMMA_16(d, 96), WGMMA_16(d, 112)
                     : "l"(left), "l"(right), "r"((int)add));
#else
    (void)left, (void)right, (void)add, (void)d;
    __trap();
#endif
}

/* d[N / 2] += a b^T with a in registers, each warp's 16 rows as mma_bf16 has them: they are not
 * touched before a wgmma_wait that covers the product. */
template <int N>
static __device__ __forceinline__ void wgmma_rows(float (&d)[N / 2], const uint4 &a, const bf16 *b,
                                                  int column)
{
    static_assert(N == 16 || N == 32 || N == 48 || N == 64 || N == 96 || N == 128,
                  "instructions there are names for");
    const uint64_t right = wgmma_factor(b) + column / 8;
#ifdef LATTE_WARPGROUPS
    if constexpr (N == 16)
        asm volatile("wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 "
                     "{%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9,%10,%11}, %12, 1, 1, 1, 0;"
                     : WGMMA_4(d, 0), WGMMA_4(d, 4)
                     : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(right));
    if constexpr (N == 32)
        asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
                     "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, {%16,%17,%18,%19}, "
                     "%20, 1, 1, 1, 0;"
                     : WGMMA_16(d, 0)
                     : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(right));
    if constexpr (N == 48)
        asm volatile("wgmma.mma_async.sync.aligned.m64n48k16.f32.bf16.bf16 "
                     "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,"
                     "%21,%22,%23}, {%24,%25,%26,%27}, %28, 1, 1, 1, 0;"
                     : WGMMA_4(d, 0), WGMMA_4(d, 4), WGMMA_4(d, 8), WGMMA_4(d, 12), WGMMA_4(d, 16),
                       WGMMA_4(d, 20)
                     : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(right));
    if constexpr (N == 64)
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                     "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,"
                     "%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, {%32,%33,%34,%35}, %36, 1, 1, "
                     "1, 0;"
                     : WGMMA_16(d, 0), WGMMA_16(d, 16)
                     : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(right));
    if constexpr (N == 96)
        asm volatile("wgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16 "
                     "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,"
                     "%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,"
                     "%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47}, {%48,%49,%50,%51},"
                     " %52, 1, 1, 1, 0;"
                     : WGMMA_16(d, 0), WGMMA_16(d, 16), WGMMA_16(d, 32)
                     : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(right));
    if constexpr (N == 128)
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
                     "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,"
                     "%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,"
                     "%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,"
                     "%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, {%64,%65,%66,%67}, %68,"
                     " 1, 1, 1, 0;"
                     : WGMMA_16(d, 0), WGMMA_16(d, 16), WGMMA_16(d, 32), WGMMA_16(d, 48)
                     : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(right));
#else
    (void)right, (void)a, (void)d;
    __trap();
#endif
}

#undef WGMMA_4
#undef WGMMA_16

/* Until all are finished; d is not touched before. */
template <int N> static __device__ __forceinline__ void wgmma_finish(float (&d)[N])
{
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < N; i++)
        asm volatile("" : "+f"(d[i])::"memory");
}

/* Whether the device runs machine code of this kernel that was made for its warpgroups. The build
 * says of a file that there is such code (LATTE_SM_90A): the driver does not. */
static inline bool has_warpgroups(const void *kernel)
{
#ifdef LATTE_SM_90A
    cudaFuncAttributes attributes = {};
    if (cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess)
        return attributes.binaryVersion == 90 && attributes.ptxVersion == 90;
    (void)cudaGetLastError(); /* an answer, not a failure */
#else
    (void)kernel;
#endif
    return false;
}

/* One thread: `value`, of 4, 8 or 16 bytes, to the same place in the dynamic shared memory of block
 * `rank` of the cluster, where its bytes are counted by b: no fence and no barrier. That block has
 * begun b, and a barrier of the cluster come between; it does not end before it has received. */
template <class T>
static __device__ __forceinline__ void cluster_send(T *shared, const T &value, int rank,
                                                    bulk_barrier *b)
{
#if __CUDA_ARCH__ >= 900
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "one store");
    uint32_t words[4], to, barrier;
    memcpy(words, &value, sizeof(T));
    asm("mapa.shared::cluster.u32 %0, %1, %2;"
        : "=r"(to)
        : "r"((uint32_t)__cvta_generic_to_shared(shared)), "r"(rank));
    asm("mapa.shared::cluster.u32 %0, %1, %2;"
        : "=r"(barrier)
        : "r"((uint32_t)__cvta_generic_to_shared(b)), "r"(rank));
    if (sizeof(T) == 4)
        asm volatile(
            "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to),
            "r"(words[0]), "r"(barrier)
            : "memory");
    else if (sizeof(T) == 8)
        asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1,%2}, "
                     "[%3];" ::"r"(to),
                     "r"(words[0]), "r"(words[1]), "r"(barrier)
                     : "memory");
    else
        asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], "
                     "{%1,%2,%3,%4}, [%5];" ::"r"(to),
                     "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]), "r"(barrier)
                     : "memory");
#else
    (void)shared, (void)value, (void)rank, (void)b;
    __trap();
#endif
}

/* Any thread: until all of the bytes sent to b are there, for this thread to read. Nothing else
 * that the peers wrote need be seen: an acquire in the cluster would empty the L1. */
static __device__ __forceinline__ void cluster_receive(bulk_barrier *b)
{
    bulk_wait(b);
}

/* Whether the device has room for one such cluster: how large they may be depends on how many
 * processors its parts have left. */
static inline bool cluster_fits(const void *kernel, int cluster, int block, size_t shared_bytes)
{
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {(unsigned)cluster, 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)cluster);
    config.blockDim = dim3((unsigned)block);
    config.dynamicSmemBytes = shared_bytes;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int n = 0;
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             (int)shared_bytes);
    if (error == cudaSuccess)
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error == cudaSuccess)
        error = cudaOccupancyMaxActiveClusters(&n, kernel, &config);
    if (error != cudaSuccess)
        (void)cudaGetLastError(); /* an answer, not a failure */
    return error == cudaSuccess && n > 0;
}

/* Of what an SM has for both, the most for shared memory. */
template <class... P> static inline cudaError_t prefer_shared(void (*kernel)(P...))
{
    return cudaFuncSetAttribute((const void *)kernel,
                                cudaFuncAttributePreferredSharedMemoryCarveout,
                                cudaSharedmemCarveoutMaxShared);
}

/* cluster: blocks of a cluster, along x; 0: none. */
template <class... P>
static inline cudaError_t launch_kernel(struct queue *q, void (*kernel)(P...), dim3 grid,
                                        int cluster, int block, size_t shared_bytes, P... args)
{
    enum { PORTABLE = 8 }; /* the largest cluster of every device that has them */
    cudaError_t error = cudaSuccess;
    if (shared_bytes > 48 * 1024)
        error = cudaFuncSetAttribute(
            (const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes);
    if (error == cudaSuccess && cluster > PORTABLE)
        error = cudaFuncSetAttribute((const void *)kernel,
                                     cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess)
        return error;
    cudaLaunchAttribute attributes[2] = {};
    unsigned n = 0;
    if (q->pdl) {
        attributes[n].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[n++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (cluster) {
        attributes[n].id = cudaLaunchAttributeClusterDimension;
        attributes[n++].val.clusterDim = {(unsigned)cluster, 1, 1};
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3((unsigned)block);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = q->stream;
    config.attrs = attributes;
    config.numAttrs = n;
    return cudaLaunchKernelEx(&config, kernel, args...);
}

#endif
