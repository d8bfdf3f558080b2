/* emulate.h - CUDA on the host processor, so that kernels are tested where there is no GPU.
 *
 * device.cuh includes this in place of instructions.cuh when LATTE_EMULATE is defined and g++
 * compiles a .cu file. A kernel's blocks run one after another; the threads of a block are
 * fibers that change at barriers, shuffles and the other places where threads of a block or a
 * warp meet. The blocks of a cluster live at the same time: one runs until all its threads wait
 * or have returned, then another. Everything is plain C++ on the host, so that a debugger and the
 * sanitizers work.
 *
 * What it finds, each reported with kernel, block, thread and line, then abort():
 *   - a barrier or a warp operation that some of its threads never reach, or that meets another
 *   - a shuffle from a lane that takes no part, a lane mask that is wrong
 *   - use of shared or device memory nobody wrote: both start as NaN
 *   - shared memory written or read beyond its end; misaligned ldmatrix rows, wgmma tiles,
 *     copy_async_16 and vector accesses (with -fsanitize=alignment)
 *   - data of copy_async_16 used before copy_async_wait, of bulk_copy before bulk_wait, of
 *     tensor_copy before its mbarrier's phase has ended, and copies over data still in use: the
 *     target is NaN until then; a bulk_wait for fewer bytes than were asked for, or for more than
 *     ever are; mbarriers that more threads arrive at than they count, and blocks that end before
 *     what is copied to them has come
 *   - clusters: arriving twice without waiting, waiting without having arrived, lanes of a warp
 *     that arrive or wait at different places, the cluster's functions in a kernel launched
 *     without one, use of a peer's shared memory before the peer has begun or after it has ended
 *     (found when the order lets that happen); what is sent is NaN until it is received, by a block
 *     that has begun to count and receives what it said, no more and no less
 *   - a kernel that never calls pdl_wait, which would break the order of the kernels around it
 *   - with LATTE_EMULATE_PDL=1 (slow): what kernels of the stream wrote is NaN until pdl_wait, and
 *     must not be written before
 *   - missing barriers, by order: threads and warps run forwards, backwards or shuffled, changing
 *     with every launch. LATTE_EMULATE_ORDER=n (0 forwards, 1 backwards, 2.. shuffled) fixes it.
 * What it cannot find: races that no order of whole stretches between barriers shows (products of
 * warpgroups are done at once, so that shared memory given back while they should still read it is
 * not noticed; nor is a block that ends while a peer may still arrive at its mbarriers), bank
 * conflicts, anything about speed. Device memory is host memory, so a host access to it works.
 *
 * Threads: one kernel at a time, on the thread that waits for it (see runtime.cc).
 * Errors:  a mistake of the kernel aborts; limits of the device are cudaError_t, as on a GPU.
 */
#ifndef LATTE_TESTS_EMULATE_H
#define LATTE_TESTS_EMULATE_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <functional>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

/* ---- language ---- */

#undef __shared__
#undef __constant__
#undef __launch_bounds__
#undef __maxnreg__
#undef __grid_constant__
/* Thread-local, since all such variables then lie in one place that can be filled with NaN, also
 * those of templates; fibers are of one thread. */
#define __shared__ static thread_local
#define __constant__
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __grid_constant__

#define DYNAMIC_SHARED(T, name) T *name = reinterpret_cast<T *>(emulate::dynamic_shared)

#define threadIdx (emulate::self->index)
#define blockIdx (emulate::block_index)
#define blockDim (emulate::block_dim)
#define gridDim (emulate::grid_dim)

static const int warpSize = 32;

/* Where a kernel's line is: default arguments are those of the caller. */
#define EMULATE_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace emulate
{

struct thread {
    uint3 index;
    int lane; /* of its warp */
};

extern thread *self; /* the fiber that runs */
extern uint3 block_index;
extern dim3 block_dim, grid_dim;
extern unsigned char *dynamic_shared;

/* Report a mistake of the running kernel, and abort. */
[[noreturn]] void mistake(const char *file, int line, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* Wait for all threads of the block that have not returned; how many gave a true predicate. */
int barrier(bool predicate, int *n_threads, const char *file, int line);

/* Wait for the lanes of mask, each of which brings arguments for the same `combine`; it is
 * called once with all of them and leaves results there. */
typedef void combine(void **arguments, uint32_t mask);
void meet(uint32_t mask, void *arguments, combine *what, const char *file, int line);

void copy_16(void *shared, const void *global, bool valid, const char *file, int line);
void commit_copies(void);
void begin_bulk(uint64_t *barrier, uint32_t n_bytes, const char *file, int line);
void copy_bulk(void *shared, const void *global, uint32_t n_bytes, uint64_t *barrier,
               const char *file, int line);
void wait_bulk(uint64_t *barrier, const char *file, int line);

void begin_phases(uint64_t *barrier, int n, const char *file, int line);
void expect(uint64_t *barrier, uint32_t n_bytes, const char *file, int line);
void arrive(uint64_t *barrier, int rank, const char *file, int line);
void wait_phase(uint64_t *barrier, uint32_t parity, const char *file, int line);

/* bf16 values; strides in bytes, that of the first dimension 2. */
struct matrix {
    const unsigned char *base;
    int n;
    uint64_t dims[5], strides[5];
    uint32_t box[5];
};
void copy_box(void *shared, const matrix *m, const int (&at)[5], uint64_t *barrier, int blocks,
              const char *file, int line);
void send(void *shared, const void *value, size_t n_bytes, int rank, uint64_t *barrier,
          const char *file, int line);
void receive(uint64_t *barrier, const char *file, int line);
void wait_copies(int n_left);
void waited(void);

/* True where [p, p + n) is shared memory of the running block (dynamic or static). */
bool is_shared(const void *p, size_t n);

/* The barrier of the cluster, and places in its blocks' dynamic shared memory. */
int rank_in_cluster(const char *file, int line);
void arrive_in_cluster(const char *file, int line);
void wait_in_cluster(const char *file, int line);
void *peer(const void *shared, int rank, const char *file, int line);

cudaError_t submit(cudaStream_t stream, const void *kernel, dim3 grid, int cluster, int block,
                   size_t shared_bytes, bool early, std::function<void()> body);

/* ---- operations of a warp ---- */

template <class T> struct shuffle {
    T in, out;
    int source;
};

template <class T>
static inline T exchange(uint32_t mask, T value, int source, const char *file, int line)
{
    static_assert(std::is_trivially_copyable<T>::value &&
                      (sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8),
                  "shuffles are of 2, 4 or 8 bytes");
    shuffle<T> mine = {value, value, source};
    if (!(mask >> source & 1))
        mistake(file, line, "shuffle from lane %d, which is not in mask %08x", source, mask);
    meet(
        mask, &mine,
        [](void **arguments, uint32_t lanes) {
            auto all = reinterpret_cast<shuffle<T> **>(arguments);
            for (; lanes; lanes &= lanes - 1) {
                shuffle<T> *one = all[__builtin_ctz(lanes)];
                one->out = all[one->source]->in;
            }
        },
        file, line);
    return mine.out;
}

template <class T, class F>
static inline T reduce(uint32_t mask, T value, F, const char *file, int line)
{
    T mine = value;
    meet(
        mask, &mine,
        [](void **arguments, uint32_t lanes) {
            T result = *(T *)arguments[__builtin_ctz(lanes)];
            for (uint32_t left = lanes & (lanes - 1); left; left &= left - 1)
                result = F()(result, *(T *)arguments[__builtin_ctz(left)]);
            for (; lanes; lanes &= lanes - 1)
                *(T *)arguments[__builtin_ctz(lanes)] = result;
        },
        file, line);
    return mine;
}

struct sum {
    template <class T> T operator()(T a, T b) const
    {
        return a + b;
    }
};
struct least {
    template <class T> T operator()(T a, T b) const
    {
        return a < b ? a : b;
    }
};
struct most {
    template <class T> T operator()(T a, T b) const
    {
        return a > b ? a : b;
    }
};
struct either {
    template <class T> T operator()(T a, T b) const
    {
        return a | b;
    }
};
struct both {
    template <class T> T operator()(T a, T b) const
    {
        return a & b;
    }
};
struct differ {
    template <class T> T operator()(T a, T b) const
    {
        return a ^ b;
    }
};

static inline float bf16_value(uint32_t bits)
{
    bits <<= 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

void mma_bf16(float *d, const uint32_t *a, const uint32_t *b, const char *file, int line);
void wgmma(float *d, const __nv_bfloat16 *a, const __nv_bfloat16 *b, int n, int column,
           const char *file, int line);
void wgmma_rows(float *d, const uint32_t *a, const __nv_bfloat16 *b, int n, int column,
                const char *file, int line);
void meet_warpgroup(const char *file, int line);
void discard(void *line_of_memory, const char *file, int line);
void ldmatrix(uint32_t *out, const void *row, int n, bool transposed, const char *file, int line);

template <class T> struct same {
    typedef T type;
};
template <class To, class From> static inline To bits(From x)
{
    static_assert(sizeof(To) == sizeof(From), "of one size");
    To y;
    memcpy(&y, &x, sizeof(y));
    return y;
}

} // namespace emulate

static inline void __syncthreads(EMULATE_PLACE)
{
    emulate::barrier(false, nullptr, file, line);
}
static inline int __syncthreads_count(int predicate, EMULATE_PLACE)
{
    return emulate::barrier(predicate, nullptr, file, line);
}
static inline int __syncthreads_or(int predicate, EMULATE_PLACE)
{
    return emulate::barrier(predicate, nullptr, file, line) > 0;
}
static inline int __syncthreads_and(int predicate, EMULATE_PLACE)
{
    int n;
    return emulate::barrier(predicate, &n, file, line) == n;
}
static inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATE_PLACE)
{
    emulate::meet(
        mask, nullptr, [](void **, uint32_t) {}, file, line);
}

template <class T>
static inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATE_PLACE)
{
    const int first = emulate::self->lane & ~(width - 1);
    return emulate::exchange(mask, value, first + (source & (width - 1)), file, line);
}
template <class T>
static inline T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, EMULATE_PLACE)
{
    const int lane = emulate::self->lane, source = lane - (int)by;
    return emulate::exchange(mask, value, source < (lane & ~(width - 1)) ? lane : source, file,
                             line);
}
template <class T>
static inline T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, EMULATE_PLACE)
{
    const int lane = emulate::self->lane, source = lane + (int)by;
    return emulate::exchange(mask, value, source > (lane | (width - 1)) ? lane : source, file,
                             line);
}
template <class T>
static inline T __shfl_xor_sync(unsigned mask, T value, int by, int width = 32, EMULATE_PLACE)
{
    const int lane = emulate::self->lane, source = lane ^ by;
    return emulate::exchange(mask, value, source > (lane | (width - 1)) ? lane : source, file,
                             line);
}

static inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATE_PLACE)
{
    return emulate::reduce<uint32_t>(mask, predicate ? 1u << emulate::self->lane : 0,
                                     emulate::either(), file, line);
}
static inline int __any_sync(unsigned mask, int predicate, EMULATE_PLACE)
{
    return emulate::reduce<int>(mask, predicate != 0, emulate::either(), file, line);
}
static inline int __all_sync(unsigned mask, int predicate, EMULATE_PLACE)
{
    return emulate::reduce<int>(mask, predicate != 0, emulate::both(), file, line);
}
#define EMULATE_REDUCE(name, operation)                                                            \
    static inline unsigned __reduce_##name##_sync(unsigned mask, unsigned value, EMULATE_PLACE)    \
    {                                                                                              \
        return emulate::reduce(mask, value, emulate::operation(), file, line);                     \
    }                                                                                              \
    static inline int __reduce_##name##_sync(unsigned mask, int value, EMULATE_PLACE)              \
    {                                                                                              \
        return emulate::reduce(mask, value, emulate::operation(), file, line);                     \
    }
EMULATE_REDUCE(add, sum)
EMULATE_REDUCE(min, least)
EMULATE_REDUCE(max, most)
EMULATE_REDUCE(or, either)
EMULATE_REDUCE(and, both)
EMULATE_REDUCE(xor, differ)
#undef EMULATE_REDUCE

template <class T> static inline unsigned __match_any_sync(unsigned mask, T value, EMULATE_PLACE)
{
    struct match {
        T value;
        uint32_t lanes;
    } mine = {value, 0};
    emulate::meet(
        mask, &mine,
        [](void **arguments, uint32_t lanes) {
            auto all = reinterpret_cast<match **>(arguments);
            for (uint32_t i = lanes; i; i &= i - 1)
                for (uint32_t j = lanes; j; j &= j - 1)
                    if (all[__builtin_ctz(i)]->value == all[__builtin_ctz(j)]->value)
                        all[__builtin_ctz(i)]->lanes |= 1u << __builtin_ctz(j);
        },
        file, line);
    return mine.lanes;
}

/* ---- instructions.cuh ---- */

static inline void pdl_wait(void)
{
    emulate::waited();
}
static inline void pdl_trigger(void)
{
}

static inline void mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2], EMULATE_PLACE)
{
    emulate::mma_bf16(d, a, b, file, line);
}
static inline uint32_t and_or(uint32_t x, uint32_t mask, uint32_t more)
{
    return (x & mask) | more;
}
/* Of values of which double holds a b + c. */
static inline uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c)
{
    uint32_t d = 0;
    for (int i = 0; i < 32; i += 16) {
        const auto value = [i](uint32_t pair) {
            return (double)emulate::bits<float>(pair >> i << 16);
        };
        const __nv_bfloat16 one = __double2bfloat16(value(a) * value(b) + value(c));
        d |= (uint32_t)emulate::bits<uint16_t>(one) << i;
    }
    return d;
}
static inline void ldmatrix_x4(uint32_t out[4], const void *row, EMULATE_PLACE)
{
    emulate::ldmatrix(out, row, 4, false, file, line);
}
static inline void ldmatrix_x4_trans(uint32_t out[4], const void *row, EMULATE_PLACE)
{
    emulate::ldmatrix(out, row, 4, true, file, line);
}

static inline void copy_async_16(void *shared, const void *global, bool valid = true, EMULATE_PLACE)
{
    emulate::copy_16(shared, global, valid, file, line);
}
struct l2_policy {
};
static inline l2_policy l2_keep(bool)
{
    return {};
}
static inline void copy_async_16(void *shared, const void *global, bool valid, l2_policy,
                                 EMULATE_PLACE)
{
    emulate::copy_16(shared, global, valid, file, line);
}
static inline void copy_async_commit(void)
{
    emulate::commit_copies();
}
template <int N> static inline void copy_async_wait(void)
{
    emulate::wait_copies(N);
}

static inline bool cluster_fits(const void *, int, int, size_t)
{
    return true;
}

typedef uint64_t bulk_barrier;

static inline void bulk_begin(bulk_barrier *b, uint32_t n_bytes, int n = 1, EMULATE_PLACE)
{
    if (emulate::self->lane < n)
        emulate::begin_bulk(b + emulate::self->lane, n_bytes, file, line);
    __syncwarp(0xffffffffu, file, line);
}
static inline void bulk_copy(void *shared, const void *global, uint32_t n_bytes, bulk_barrier *b,
                             EMULATE_PLACE)
{
    emulate::copy_bulk(shared, global, n_bytes, b, file, line);
}
static inline void bulk_wait(bulk_barrier *b, EMULATE_PLACE)
{
    emulate::wait_bulk(b, file, line);
}

static inline void mbarrier_begin(bulk_barrier *b, int n, EMULATE_PLACE)
{
    emulate::begin_phases(b, n, file, line);
}
static inline void mbarrier_expect(bulk_barrier *b, uint32_t n_bytes, EMULATE_PLACE)
{
    emulate::expect(b, n_bytes, file, line);
}
static inline void mbarrier_arrive(bulk_barrier *b, int rank, EMULATE_PLACE)
{
    emulate::arrive(b, rank, file, line);
}
static inline void mbarrier_wait(bulk_barrier *b, uint32_t parity, EMULATE_PLACE)
{
    emulate::wait_phase(b, parity, file, line);
}

struct tensor_map {
    emulate::matrix map;
};
/* What the driver refuses, as far as it can be met here. */
template <int N>
static inline bool tensor_map_encode(struct tensor_map *m, const void *base,
                                     const uint64_t (&dims)[N], const uint64_t (&strides)[N - 1],
                                     const uint32_t (&box)[N])
{
    bool good = (uintptr_t)base % 16 == 0 && box[0] == 64;
    m->map = {(const unsigned char *)base, N, {}, {2}, {}};
    for (int i = 0; i < N; i++) {
        good &= dims[i] > 0 && dims[i] <= (uint64_t)1 << 32 && box[i] > 0 && box[i] <= 256;
        good &= i == 0 || strides[i - 1] % 16 == 0;
        m->map.dims[i] = dims[i];
        m->map.box[i] = box[i];
        if (i > 0)
            m->map.strides[i] = strides[i - 1];
    }
    return good;
}
static inline void tensor_copy_2d(void *shared, const struct tensor_map *m, int x, int y,
                                  bulk_barrier *b, EMULATE_PLACE)
{
    emulate::copy_box(shared, &m->map, {x, y, 0, 0, 0}, b, 0, file, line);
}
static inline void tensor_copy_2d(void *shared, const struct tensor_map *m, int x, int y,
                                  bulk_barrier *b, l2_policy, EMULATE_PLACE)
{
    emulate::copy_box(shared, &m->map, {x, y, 0, 0, 0}, b, 0, file, line);
}
static inline void tensor_send_5d(void *shared, const struct tensor_map *m, int x, int y,
                                  bulk_barrier *b, int blocks, EMULATE_PLACE)
{
    emulate::copy_box(shared, &m->map, {x, 0, 0, 0, y}, b, blocks, file, line);
}
template <int N> static inline void registers_give(void)
{
}
template <int N> static inline void registers_take(void)
{
}

/* Products of warpgroups, each warp for its 16 rows, at once; but the four warps' products are one
 * on the device, whose end all wait for. */
static inline void shared_for_products(void)
{
}
static inline void wgmma_begin(void)
{
}
static inline void wgmma_commit(void)
{
}
template <int N> static inline void wgmma_wait(EMULATE_PLACE)
{
    emulate::meet_warpgroup(file, line);
}
template <int N> static inline void wgmma_finish(float (&)[N], EMULATE_PLACE)
{
    emulate::meet_warpgroup(file, line);
}
template <int N>
static inline void wgmma_bf16(float (&d)[N / 2], const __nv_bfloat16 *a, const __nv_bfloat16 *b,
                              int column, bool add = true, EMULATE_PLACE)
{
    for (int i = 0; i < N / 2 && !add; i++)
        d[i] = 0;
    emulate::wgmma(d, a, b, N, column, file, line);
}
template <int N>
static inline void wgmma_rows(float (&d)[N / 2], const uint4 &a, const __nv_bfloat16 *b, int column,
                              EMULATE_PLACE)
{
    emulate::wgmma_rows(d, &a.x, b, N, column, file, line);
}
static inline bool has_warpgroups(const void *)
{
    return true;
}

template <class T>
static inline void cluster_send(T *shared, const T &value, int rank, bulk_barrier *b, EMULATE_PLACE)
{
    emulate::send(shared, &value, sizeof(T), rank, b, file, line);
}
static inline void cluster_receive(bulk_barrier *b, EMULATE_PLACE)
{
    emulate::receive(b, file, line);
}

static inline float quick_exp2(float x)
{
    return exp2f(x);
}
static inline float quick_reciprocal(float x)
{
    return 1 / x;
}
static inline float quick_sqrt(float x)
{
    return sqrtf(x);
}

static inline uint4 load_streaming(const void *p, EMULATE_PLACE)
{
    if ((uintptr_t)p % 16)
        emulate::mistake(file, line, "load_streaming from %p, not aligned to 16", p);
    return *(const uint4 *)p;
}

static inline uint4 load_once(const void *p, EMULATE_PLACE)
{
    if ((uintptr_t)p % 16)
        emulate::mistake(file, line, "load_once from %p, not aligned to 16", p);
    return *(const uint4 *)p;
}

template <class T> static inline T *kept_address(T *p)
{
    return p;
}

static inline void discard_line(void *p, EMULATE_PLACE)
{
    emulate::discard(p, file, line);
}

/* Nothing happens, but p must be global memory. */
static inline void prefetch_l2(const void *p, EMULATE_PLACE)
{
    if (!p || emulate::is_shared(p, 1))
        emulate::mistake(file, line, "prefetch_l2 of %p, which is not global memory", p);
}

static inline int cluster_rank(EMULATE_PLACE)
{
    return emulate::rank_in_cluster(file, line);
}
static inline void cluster_arrive(EMULATE_PLACE)
{
    emulate::arrive_in_cluster(file, line);
}
static inline void cluster_arrive_relaxed(EMULATE_PLACE)
{
    emulate::arrive_in_cluster(file, line);
}
static inline void cluster_wait(EMULATE_PLACE)
{
    emulate::wait_in_cluster(file, line);
}
static inline void cluster_sync(EMULATE_PLACE)
{
    emulate::arrive_in_cluster(file, line);
    emulate::wait_in_cluster(file, line);
}
template <class T> static inline T *cluster_peer(T *shared, int rank, EMULATE_PLACE)
{
    return (T *)emulate::peer(shared, rank, file, line);
}

template <class... P> static inline cudaError_t prefer_shared(void (*)(P...))
{
    return cudaSuccess;
}

template <class... P>
static inline cudaError_t launch_kernel(struct queue *q, void (*kernel)(P...), dim3 grid,
                                        int cluster, int block, size_t shared_bytes, P... args)
{
    return emulate::submit(q->stream, (const void *)kernel, grid, cluster, block, shared_bytes,
                           q->pdl, [=]() { kernel(args...); });
}

/* ---- memory ---- */

template <class T> static inline T __ldg(const T *p)
{
    return *p;
}
#define __ldcs __ldg
#define __ldcg __ldg
#define __ldca __ldg
#define __ldcv __ldg
#define __ldlu __ldg
template <class T> static inline void __stcs(T *p, typename emulate::same<T>::type x)
{
    *p = x;
}
#define __stcg __stcs
#define __stwb __stcs
#define __stwt __stcs

static inline void __threadfence(void)
{
}
#define __threadfence_block __threadfence
#define __threadfence_system __threadfence

/* Fibers change only where threads meet, so plain accesses are atomic. */
#define EMULATE_ATOMIC(name, expression)                                                           \
    template <class T> static inline T atomic##name(T *p, typename emulate::same<T>::type x)       \
    {                                                                                              \
        T old = *p;                                                                                \
        *p = (expression);                                                                         \
        return old;                                                                                \
    }
EMULATE_ATOMIC(Add, old + x)
EMULATE_ATOMIC(Sub, old - x)
EMULATE_ATOMIC(Max, old > x ? old : x)
EMULATE_ATOMIC(Min, old < x ? old : x)
EMULATE_ATOMIC(Or, old | x)
EMULATE_ATOMIC(And, old &x)
EMULATE_ATOMIC(Xor, old ^ x)
EMULATE_ATOMIC(Exch, x)
EMULATE_ATOMIC(Inc, old >= x ? 0 : old + 1)
EMULATE_ATOMIC(Dec, old == 0 || old > x ? x : old - 1)
#undef EMULATE_ATOMIC
template <class T>
static inline T atomicCAS(T *p, typename emulate::same<T>::type expected,
                          typename emulate::same<T>::type x)
{
    T old = *p;
    if (old == expected)
        *p = x;
    return old;
}

/* ---- numbers ---- */

#define EMULATE_MIN_MAX(A, B, R)                                                                   \
    static inline R min(A a, B b)                                                                  \
    {                                                                                              \
        return (R)a < (R)b ? (R)a : (R)b;                                                          \
    }                                                                                              \
    static inline R max(A a, B b)                                                                  \
    {                                                                                              \
        return (R)a > (R)b ? (R)a : (R)b;                                                          \
    }
EMULATE_MIN_MAX(int, int, int)
EMULATE_MIN_MAX(unsigned, unsigned, unsigned)
EMULATE_MIN_MAX(int, unsigned, unsigned)
EMULATE_MIN_MAX(unsigned, int, unsigned)
EMULATE_MIN_MAX(long, long, long)
EMULATE_MIN_MAX(unsigned long, unsigned long, unsigned long)
EMULATE_MIN_MAX(long, unsigned long, unsigned long)
EMULATE_MIN_MAX(unsigned long, long, unsigned long)
EMULATE_MIN_MAX(long long, long long, long long)
EMULATE_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
EMULATE_MIN_MAX(long long, unsigned long long, unsigned long long)
EMULATE_MIN_MAX(unsigned long long, long long, unsigned long long)
#undef EMULATE_MIN_MAX
static inline float min(float a, float b)
{
    return fminf(a, b);
}
static inline float max(float a, float b)
{
    return fmaxf(a, b);
}
static inline double min(double a, double b)
{
    return fmin(a, b);
}
static inline double max(double a, double b)
{
    return fmax(a, b);
}

/* The C library has functions of these names, or declares them. */
#define __expf expf
#define __exp10f exp10f
#define __logf logf
#define __log2f log2f
#define __log10f log10f
#define __sinf sinf
#define __cosf cosf
#define __tanf tanf
#define __powf powf
#define __sincosf sincosf
#define __tanhf tanhf

#define EMULATE_ROUND(T, prefix, suffix)                                                           \
    static inline T __##prefix##add_##suffix(T a, T b)                                             \
    {                                                                                              \
        return a + b;                                                                              \
    }                                                                                              \
    static inline T __##prefix##sub_##suffix(T a, T b)                                             \
    {                                                                                              \
        return a - b;                                                                              \
    }                                                                                              \
    static inline T __##prefix##mul_##suffix(T a, T b)                                             \
    {                                                                                              \
        return a * b;                                                                              \
    }                                                                                              \
    static inline T __##prefix##div_##suffix(T a, T b)                                             \
    {                                                                                              \
        return a / b;                                                                              \
    }                                                                                              \
    static inline T __##prefix##rcp_##suffix(T a)                                                  \
    {                                                                                              \
        return 1 / a;                                                                              \
    }
EMULATE_ROUND(float, f, rn)
EMULATE_ROUND(double, d, rn)
#undef EMULATE_ROUND
static inline float __fsqrt_rn(float x)
{
    return sqrtf(x);
}
static inline double __dsqrt_rn(double x)
{
    return sqrt(x);
}
static inline float __frsqrt_rn(float x)
{
    return 1 / sqrtf(x);
}
static inline float __fmaf_rn(float a, float b, float c)
{
    return fmaf(a, b, c);
}
static inline double __fma_rn(double a, double b, double c)
{
    return fma(a, b, c);
}
static inline float __fdividef(float a, float b)
{
    return a / b;
}
static inline float fdividef(float a, float b)
{
    return a / b;
}
static inline float __saturatef(float x)
{
    return x > 0 ? x < 1 ? x : 1 : 0; /* NaN gives 0 */
}
static inline float rsqrtf(float x)
{
    return 1 / sqrtf(x);
}
static inline double rsqrt(double x)
{
    return 1 / sqrt(x);
}
static inline float sinpif(float x)
{
    return (float)sin(M_PI * fmod(x, 2));
}
static inline float cospif(float x)
{
    return (float)cos(M_PI * fmod(x, 2));
}
static inline void sincospif(float x, float *s, float *c)
{
    *s = sinpif(x);
    *c = cospif(x);
}
static inline double sinpi(double x)
{
    return sin(M_PI * fmod(x, 2));
}
static inline double cospi(double x)
{
    return cos(M_PI * fmod(x, 2));
}
static inline void sincospi(double x, double *s, double *c)
{
    *s = sinpi(x);
    *c = cospi(x);
}

static inline int __float_as_int(float x)
{
    return emulate::bits<int>(x);
}
static inline unsigned __float_as_uint(float x)
{
    return emulate::bits<unsigned>(x);
}
static inline float __int_as_float(int x)
{
    return emulate::bits<float>(x);
}
static inline float __uint_as_float(unsigned x)
{
    return emulate::bits<float>(x);
}
static inline long long __double_as_longlong(double x)
{
    return emulate::bits<long long>(x);
}
static inline double __longlong_as_double(long long x)
{
    return emulate::bits<double>(x);
}
static inline int __float2int_rn(float x)
{
    return (int)rintf(x);
}
static inline int __float2int_rz(float x)
{
    return (int)x;
}
static inline int __float2int_rd(float x)
{
    return (int)floorf(x);
}
static inline int __float2int_ru(float x)
{
    return (int)ceilf(x);
}
static inline unsigned __float2uint_rn(float x)
{
    return (unsigned)rintf(x);
}
static inline unsigned __float2uint_rz(float x)
{
    return (unsigned)x;
}
static inline long long __float2ll_rn(float x)
{
    return (long long)rintf(x);
}
static inline int __double2int_rn(double x)
{
    return (int)rint(x);
}
static inline long long __double2ll_rn(double x)
{
    return (long long)rint(x);
}
static inline float __double2float_rn(double x)
{
    return (float)x;
}
static inline float __int2float_rn(int x)
{
    return (float)x;
}
static inline float __uint2float_rn(unsigned x)
{
    return (float)x;
}
static inline float __ll2float_rn(long long x)
{
    return (float)x;
}
static inline float __ull2float_rn(unsigned long long x)
{
    return (float)x;
}
static inline double __int2double_rn(int x)
{
    return x;
}
static inline double __ll2double_rn(long long x)
{
    return (double)x;
}

static inline int __popc(unsigned x)
{
    return __builtin_popcount(x);
}
static inline int __popcll(unsigned long long x)
{
    return __builtin_popcountll(x);
}
static inline int __clz(int x)
{
    return x ? __builtin_clz((unsigned)x) : 32;
}
static inline int __clzll(long long x)
{
    return x ? __builtin_clzll((unsigned long long)x) : 64;
}
static inline int __ffs(int x)
{
    return __builtin_ffs(x);
}
static inline int __ffsll(long long x)
{
    return __builtin_ffsll(x);
}
static inline unsigned __brev(unsigned x)
{
    unsigned y = 0;
    for (int i = 0; i < 32; i++)
        y |= (x >> i & 1) << (31 - i);
    return y;
}
static inline int __mulhi(int a, int b)
{
    return (int)((int64_t)a * b >> 32);
}
static inline unsigned __umulhi(unsigned a, unsigned b)
{
    return (unsigned)((uint64_t)a * b >> 32);
}
static inline long long __mul64hi(long long a, long long b)
{
    return (long long)((__int128)a * b >> 64);
}
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b)
{
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
static inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector)
{
    const uint64_t bytes = (uint64_t)y << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        unsigned one = selector >> 4 * i & 15, byte = bytes >> 8 * (one & 7) & 255;
        if (one & 8) /* the sign of that byte */
            byte = byte & 128 ? 255 : 0;
        result |= byte << 8 * i;
    }
    return result;
}
static inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by)
{
    return (unsigned)(((uint64_t)high << 32 | low) << (by & 31) >> 32);
}
static inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by)
{
    return (unsigned)(((uint64_t)high << 32 | low) >> (by & 31));
}
static inline int __dp4a(int a, int b, int c)
{
    for (int i = 0; i < 4; i++)
        c += (int8_t)(a >> 8 * i) * (int8_t)(b >> 8 * i);
    return c;
}
static inline void __nanosleep(unsigned)
{
}
#define __trap() emulate::mistake(__FILE__, __LINE__, "__trap")

#endif
