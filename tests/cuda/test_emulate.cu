/* test_emulate.cu - the emulator finds the mistakes it promises to find (tests/emulate/emulate.h):
 * each kernel here has one. What it says of correct kernels is test_instructions.cu's.
 */
#include "engine/kernels/cuda/device.cuh"

#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

extern "C" {
#include "tests/unit/unit.h"
}

enum { N = 64 };

#define OK(call) assert_int_equal((call), cudaSuccess)

static struct queue q;
static float *out; /* device, [N] */
static float host[N];

static int open_device(void **)
{
    OK(cudaStreamCreate(&q.stream));
    OK(cudaMalloc((void **)&out, N * sizeof(float)));
    return 0;
}

static cudaError_t run_and_get(void)
{
    if (q.error)
        return q.error;
    cudaError_t error = cudaMemcpyAsync(host, out, sizeof(host), cudaMemcpyDeviceToHost, q.stream);
    return error ? error : cudaStreamSynchronize(q.stream);
}

/* ---- mistakes that end the program ---- */

static __global__ void different_barriers(float *x)
{
    pdl_wait();
    if (threadIdx.x < 32)
        __syncthreads();
    else
        __syncthreads();
    x[threadIdx.x] = 0;
}

static __global__ void lane_missing(float *x)
{
    pdl_wait();
    if (threadIdx.x != 31)
        x[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.f, 1);
    __syncthreads();
}

static __global__ void lane_returned(float *x)
{
    pdl_wait();
    if (threadIdx.x == 5)
        return;
    x[threadIdx.x] = warp_sum(1);
}

static __global__ void foreign_mask(float *x)
{
    pdl_wait();
    x[threadIdx.x] = (float)__ballot_sync(0xffu, 1);
}

static __global__ void lane_without_value(float *x)
{
    pdl_wait();
    if (threadIdx.x % 32 < 16)
        x[threadIdx.x] = __shfl_sync(0xffffu, 1.f, 20);
}

static __global__ void different_operations(float *x)
{
    pdl_wait();
    if (threadIdx.x % 2)
        x[threadIdx.x] = (float)__any_sync(0xffffffffu, 1);
    else
        x[threadIdx.x] = (float)__all_sync(0xffffffffu, 1);
}

static __global__ void write_beyond(float *x)
{
    DYNAMIC_SHARED(float, shared);
    pdl_wait();
    shared[threadIdx.x] = 0; /* one more than there are */
    x[threadIdx.x] = 0;
}

static __global__ void read_far_beyond(float *x)
{
    DYNAMIC_SHARED(float, shared);
    pdl_wait();
    x[threadIdx.x] = shared[threadIdx.x + 4096];
}

static __global__ void odd_row(float *x)
{
    DYNAMIC_SHARED(uint16_t, shared);
    uint32_t matrix[4];
    pdl_wait();
    ldmatrix_x4(matrix, shared + 9 * (threadIdx.x % 4));
    x[threadIdx.x] = (float)matrix[0];
}

static __global__ void copy_from_nowhere(float *x)
{
    DYNAMIC_SHARED(float4, shared);
    pdl_wait();
    copy_async_16((char *)shared + 4, x);
}

static __global__ void copy_to_global(float *x)
{
    pdl_wait();
    copy_async_16(x, x + 4);
}

static __global__ void no_wait(float *)
{
}

static __global__ void early_write(float *x)
{
    x[threadIdx.x] = (float)threadIdx.x;
    pdl_wait();
}

static __global__ void prefetch_shared(float *)
{
    DYNAMIC_SHARED(float, shared);
    pdl_wait();
    prefetch_l2(shared);
}

/* In clusters of two. */
static __global__ void arrive_twice(float *)
{
    pdl_wait();
    cluster_arrive();
    cluster_arrive();
    cluster_wait();
}

static __global__ void wait_only(float *)
{
    pdl_wait();
    cluster_sync();
    cluster_wait();
}

static __global__ void arrive_apart(float *)
{
    pdl_wait();
    if (threadIdx.x % 2)
        cluster_arrive();
    else
        cluster_arrive();
    cluster_wait();
}

static __global__ void wait_apart(float *)
{
    pdl_wait();
    cluster_arrive();
    if (threadIdx.x % 2)
        cluster_wait();
    else
        cluster_wait();
}

static __global__ void warp_missing(float *)
{
    pdl_wait();
    if (cluster_rank() == 0 || threadIdx.x < 32)
        cluster_sync();
    else
        __syncthreads();
}

static __global__ void block_missing(float *)
{
    pdl_wait();
    if (cluster_rank() == 0)
        cluster_arrive();
    __syncthreads();
    if (threadIdx.x < 32)
        cluster_wait();
}

static __global__ void peer_not_begun(float *)
{
    DYNAMIC_SHARED(float, shared);
    pdl_wait();
    cluster_peer(shared, cluster_rank() ^ 1)[threadIdx.x] = 0;
    cluster_sync();
}

static __global__ void peer_ended(float *x)
{
    DYNAMIC_SHARED(float, shared);
    pdl_wait();
    shared[threadIdx.x] = 0;
    cluster_sync();
    x[threadIdx.x] = cluster_peer(shared, cluster_rank() ^ 1)[threadIdx.x];
}

static __global__ void write_ended(float *)
{
    DYNAMIC_SHARED(float, shared);
    pdl_wait();
    cluster_sync();
    cluster_peer(shared, cluster_rank() ^ 1)[threadIdx.x] = 0;
}

static __global__ void write_beyond_peer(float *)
{
    DYNAMIC_SHARED(float, shared);
    pdl_wait();
    cluster_sync();
    if (cluster_rank())
        cluster_peer(shared, 0)[threadIdx.x] = 0;
    cluster_sync();
}

static __global__ void read_far_beyond_peer(float *x)
{
    DYNAMIC_SHARED(float, shared);
    pdl_wait();
    cluster_sync();
    x[threadIdx.x] = cluster_peer(shared, cluster_rank() ^ 1)[threadIdx.x + 4096];
    cluster_sync();
}

static __global__ void peer_of_global(float *x)
{
    pdl_wait();
    cluster_peer(x, 0);
}

static __global__ void foreign_rank(float *)
{
    DYNAMIC_SHARED(float, shared);
    pdl_wait();
    cluster_peer(shared, 2);
}

static __global__ void copy_to_peer(float *x)
{
    DYNAMIC_SHARED(float4, shared);
    pdl_wait();
    cluster_sync();
    copy_async_16(cluster_peer(shared, cluster_rank() ^ 1), x);
}

static __global__ void row_of_peer(float *)
{
    DYNAMIC_SHARED(float4, shared);
    uint32_t matrix[4];
    pdl_wait();
    cluster_sync();
    ldmatrix_x4(matrix, cluster_peer(shared, cluster_rank() ^ 1));
}

static __global__ void odd_bulk(float *x)
{
    DYNAMIC_SHARED(uint64_t, shared);
    pdl_wait();
    if (threadIdx.x == 0)
        bulk_copy(shared + 2, x, 24, shared);
}

static __global__ void bulk_of_fewer_bytes(float *x)
{
    DYNAMIC_SHARED(uint64_t, shared);
    pdl_wait();
    if (threadIdx.x < WARP)
        bulk_begin(shared, 64);
    if (threadIdx.x == 0)
        bulk_copy(shared + 2, x, 32, shared);
    __syncthreads();
    bulk_wait(shared);
}

/* One thread too many. */
static __global__ void arrive_too_often(float *)
{
    DYNAMIC_SHARED(uint64_t, shared);
    pdl_wait();
    if (threadIdx.x == 0)
        mbarrier_begin(shared, 2);
    cluster_sync();
    if (threadIdx.x < 2 && cluster_rank() == 0)
        mbarrier_arrive(shared, 1);
    cluster_sync();
    if (threadIdx.x < 3 && cluster_rank() == 0)
        mbarrier_expect(shared, 16);
    cluster_sync();
}

static __global__ void arrive_before_begin(float *)
{
    DYNAMIC_SHARED(uint64_t, shared);
    pdl_wait();
    cluster_sync();
    if (threadIdx.x == 0)
        mbarrier_arrive(shared, cluster_rank() ^ 1);
}

static __global__ void phase_never_ends(float *)
{
    DYNAMIC_SHARED(uint64_t, shared);
    pdl_wait();
    if (threadIdx.x == 0) {
        mbarrier_begin(shared, 1);
        mbarrier_expect(shared, 16);
    }
    cluster_sync();
    mbarrier_wait(shared, 1); /* of the phase before the first: has ended */
    mbarrier_wait(shared, 0);
}

static __global__ void box_never_waited_for(float *x)
{
    DYNAMIC_SHARED(unsigned char, shared);
    uint64_t *const barrier = reinterpret_cast<uint64_t *>(shared + 1024);
    struct tensor_map m;
    pdl_wait();
    if (threadIdx.x == 0) {
        mbarrier_begin(barrier, 1);
        if (tensor_map_encode(&m, x, {64, 1}, {128}, {64, 1}))
            tensor_copy_2d(shared + (1024 - (uintptr_t)shared % 1024) % 1024, &m, 0, 0, barrier);
    }
}

static __global__ void odd_box(float *x)
{
    DYNAMIC_SHARED(unsigned char, shared);
    uint64_t *const barrier = reinterpret_cast<uint64_t *>(shared + 2048);
    struct tensor_map m;
    pdl_wait();
    if (threadIdx.x == 0) {
        mbarrier_begin(barrier, 1);
        if (tensor_map_encode(&m, x, {64, 1}, {128}, {64, 1}))
            tensor_copy_2d(shared + (1024 - (uintptr_t)shared % 1024) % 1024 + 128, &m, 0, 0,
                           barrier);
    }
}

/* So many values from where tiles may begin. */
template <int ON> static __global__ void odd_columns(float *x)
{
    DYNAMIC_SHARED(bf16, shared);
    float sum[8] = {};
    pdl_wait();
    const size_t first = (1024 - (uintptr_t)shared % 1024) % 1024 / sizeof(bf16);
    wgmma_rows<16>(sum, make_uint4(0, 0, 0, 0), shared + first + ON, 0);
    x[threadIdx.x] = sum[0];
}

static __global__ void warps_missing(float *x)
{
    float sum[8] = {};
    pdl_wait();
    wgmma_finish(sum); /* two warps of four */
    x[threadIdx.x] = sum[0];
}

static __global__ void early_write_of_one(float *x)
{
    if (cluster_rank() == 1)
        x[threadIdx.x] = 0;
    pdl_wait();
}

static const struct {
    const char *name;
    void (*kernel)(float *);
    size_t shared_bytes;
    const char *says;
    int cluster;
} mistakes[] = {
    {"different_barriers", different_barriers, 0, "meets another", 0},
    {"lane_missing", lane_missing, 0, "lanes 7fffffff wait", 0},
    {"lane_returned", lane_returned, 0, "00000020, which have returned", 0},
    {"foreign_mask", foreign_mask, 0, "is not in its own mask", 0},
    {"lane_without_value", lane_without_value, 0, "from lane 20, which is not in mask", 0},
    {"different_operations", different_operations, 0, "meets another warp operation", 0},
    {"write_beyond", write_beyond, (N - 1) * sizeof(float), "written at offset 252", 0},
    {"read_far_beyond", read_far_beyond, N * sizeof(float), "offset 16", 0},
    {"odd_row", odd_row, 256, "not aligned to 16", 0},
    {"copy_from_nowhere", copy_from_nowhere, 256, "not aligned to 16", 0},
    {"copy_to_global", copy_to_global, 256, "is not shared memory", 0},
    {"odd_bulk", odd_bulk, 256, "not multiples of 16", 0},
    {"bulk_of_fewer_bytes", bulk_of_fewer_bytes, 256, "for bytes", 0},
    {"no_wait", no_wait, 0, "called pdl_wait", 0},
    {"early_write", early_write, 0, "written before pdl_wait", 0},
    {"prefetch_shared", prefetch_shared, 256, "is not global memory", 0},
    {"without a cluster", arrive_twice, 0, "launched without clusters", 0},
    {"arrive_twice", arrive_twice, 0, "twice without waiting", 2},
    {"wait_only", wait_only, 0, "without having arrived", 2},
    {"arrive_apart", arrive_apart, 0, "another lane of the warp arrives", 2},
    {"wait_apart", wait_apart, 0, "another lane of the warp waits", 2},
    {"warp_missing", warp_missing, 0, "for the cluster", 2},
    {"block_missing", block_missing, 0, "without having arrived", 2},
    {"peer_not_begun", peer_not_begun, 256, "which has not begun", 2},
    {"peer_ended", peer_ended, 256, "which has ended", 2},
    {"write_ended", write_ended, 256, "which has ended", 2},
    {"write_beyond_peer", write_beyond_peer, 252, "written at offset 252", 2},
    {"read_far_beyond_peer", read_far_beyond_peer, 256, "which runs", 2},
    {"peer_of_global", peer_of_global, 256, "is not dynamic shared memory", 2},
    {"foreign_rank", foreign_rank, 256, "block 2 of a cluster of 2", 2},
    {"copy_to_peer", copy_to_peer, 256, "is not shared memory", 2},
    {"row_of_peer", row_of_peer, 256, "is not shared memory", 2},
    {"arrive_too_often", arrive_too_often, 256, "more than the 2 that an mbarrier counts", 2},
    {"arrive_before_begin", arrive_before_begin, 256, "that has not begun", 2},
    {"phase_never_ends", phase_never_ends, 256, "for bytes or others", 2},
    {"box_never_waited_for", box_never_waited_for, 2064, "before what is copied to it", 0},
    {"odd_box", odd_box, 3072, "not 1,024-byte aligned", 0},
    {"odd_columns", odd_columns<64>, 4096, "not 1,024-byte aligned tiles", 0},
    {"columns_beyond", odd_columns<0>, 2032, "not 1,024-byte aligned tiles", 0},
    {"warps_missing", warps_missing, 0, "for bytes or others", 0},
    {"early_write_of_one", early_write_of_one, 0, "written before pdl_wait", 2},
};

static __global__ void put(float *x, float value)
{
    pdl_wait();
    x[threadIdx.x] = value;
}

/* What a process of its own says when it runs the kernel; how it ends. */
static int run_apart(size_t i, char *said, size_t n)
{
    int ends[2];
    assert_int_equal(pipe(ends), 0);
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        dup2(ends[1], 2);
        close(ends[0]);
        setenv("LATTE_EMULATE_PDL", "1", 1);
        q.pdl = true;
        launch(&q, "put", put, dim3(1), N, 0, out, 1.f); /* somebody to wait for */
        const int cluster = mistakes[i].cluster;
        q.error = launch_kernel(&q, mistakes[i].kernel, dim3(cluster ? cluster : 1), cluster, N,
                                mistakes[i].shared_bytes, out);
        run_and_get();
        _exit(0);
    }
    close(ends[1]);
    size_t length = 0;
    for (ssize_t got; (got = read(ends[0], said + length, n - 1 - length)) > 0;)
        length += (size_t)got;
    said[length] = 0;
    close(ends[0]);
    int status = 0;
    waitpid(pid, &status, 0);
    return status;
}

static void test_mistakes(void **)
{
    static char said[16384];
    for (size_t i = 0; i < COUNT_OF(mistakes); i++) {
        const int status = run_apart(i, said, sizeof(said));
        if (WIFEXITED(status) && WEXITSTATUS(status) == 0)
            fail_msg("%s: went through", mistakes[i].name);
        if (!strstr(said, mistakes[i].says))
            fail_msg("%s: says %s", mistakes[i].name, said);
        if (!strstr(said, "kernel "))
            fail_msg("%s: names no kernel: %s", mistakes[i].name, said);
    }
}

/* ---- mistakes that show in the result ---- */

static __global__ void use_what_nobody_wrote(float *x)
{
    __shared__ float still[N];
    DYNAMIC_SHARED(float, shared);
    pdl_wait();
    if (threadIdx.x)
        still[threadIdx.x] = shared[threadIdx.x] = 1;
    __syncthreads();
    x[threadIdx.x] = still[threadIdx.x] + shared[threadIdx.x];
    if (threadIdx.x == 1)
        x[1] = x[2] + still[0];
    if (threadIdx.x == 2)
        x[2] = shared[0];
}

static void test_unwritten_shared_memory(void **)
{
    for (int round = 0; round < 3; round++) { /* not what the last block left either */
        launch(&q, "use", use_what_nobody_wrote, dim3(2), N, N * sizeof(float), out);
        OK(run_and_get());
        assert_true(isnan(host[0]) && isnan(host[1]) && isnan(host[2]));
        assert_true(host[3] == 2);
    }
}

static void test_unwritten_device_memory(void **)
{
    float *fresh;
    OK(cudaMalloc((void **)&fresh, 64));
    OK(cudaMemcpy(host, fresh, 64, cudaMemcpyDeviceToHost));
    OK(cudaFree(fresh));
    for (int i = 0; i < 16; i++)
        assert_true(isnan(host[i]));
}

template <bool WAIT> static __global__ void copied(float *x)
{
    DYNAMIC_SHARED(float4, shared);
    pdl_wait();
    shared[threadIdx.x] = {1, 1, 1, 1};
    copy_async_16(shared + threadIdx.x, x + 4 * (threadIdx.x % 16));
    copy_async_commit();
    copy_async_wait<WAIT ? 0 : 1>();
    x[threadIdx.x] = shared[threadIdx.x].x;
}

static void test_copies_not_waited_for(void **)
{
    for (int wait = 0; wait < 2; wait++) {
        OK(cudaMemset(out, 0, sizeof(host)));
        launch(&q, "copied", wait ? copied<true> : copied<false>, dim3(1), N, 16 * N, out);
        OK(run_and_get());
        for (int i = 0; i < N; i++)
            assert_true(wait ? host[i] == 0 : isnan(host[i]));
    }
}

/* The orders tell kernels apart that need a barrier. */
template <bool BARRIER> static __global__ void neighbour(float *x)
{
    __shared__ float line[N];
    pdl_wait();
    line[threadIdx.x] = (float)threadIdx.x;
    if (BARRIER)
        __syncthreads();
    x[threadIdx.x] = line[(threadIdx.x + N - 1) % N];
}

static void test_orders(void **)
{
    for (int barrier = 0; barrier < 2; barrier++) {
        int n_wrong = 0;
        for (int round = 0; round < 3; round++) {
            launch(&q, "neighbour", barrier ? neighbour<true> : neighbour<false>, dim3(1), N, 0,
                   out);
            OK(run_and_get());
            for (int i = 1; i < N; i++)
                n_wrong += host[i] != (float)(i - 1);
        }
        assert_true(barrier ? n_wrong == 0 : n_wrong > 0);
    }
}

/* So do the orders of a cluster's blocks: each must not write before all have read. */
template <bool BARRIER> static __global__ void next_block(float *x)
{
    DYNAMIC_SHARED(float, shared);
    pdl_wait();
    shared[threadIdx.x] = (float)cluster_rank();
    cluster_sync();
    const float next = cluster_peer(shared, (cluster_rank() + 1) % 4)[threadIdx.x];
    if (BARRIER)
        cluster_sync();
    shared[threadIdx.x] = -1;
    cluster_sync();
    if (threadIdx.x == 0)
        x[blockIdx.x] = next;
}

static void test_orders_of_blocks(void **)
{
    for (int barrier = 0; barrier < 2; barrier++) {
        int n_wrong = 0;
        for (int round = 0; round < 3; round++) {
            launch_cluster(&q, "next_block", barrier ? next_block<true> : next_block<false>,
                           dim3(8), 4, N, N * sizeof(float), out);
            OK(run_and_get());
            for (int i = 0; i < 8; i++)
                n_wrong += host[i] != (float)((i + 1) % 4);
        }
        assert_true(barrier ? n_wrong == 0 : n_wrong > 0);
    }
}

static __global__ void read_peer_unwritten(float *x)
{
    __shared__ float still[2];
    DYNAMIC_SHARED(float, shared);
    pdl_wait();
    if (threadIdx.x == 0 && cluster_rank() == 0)
        shared[0] = still[0] = 1;
    cluster_sync();
    const float theirs = cluster_peer(shared, 1)[0];
    cluster_sync();
    if (threadIdx.x == 0) {
        x[2 * blockIdx.x] = theirs;
        x[2 * blockIdx.x + 1] = still[0]; /* each block has its own */
    }
}

static void test_unwritten_in_clusters(void **)
{
    for (int round = 0; round < 3; round++) {
        launch_cluster(&q, "read", read_peer_unwritten, dim3(4), 2, N, 16, out);
        OK(run_and_get());
        for (int b = 0; b < 4; b++) {
            assert_true(isnan(host[2 * b]));
            assert_true(b % 2 ? isnan(host[2 * b + 1]) : host[2 * b + 1] == 1);
        }
    }
}

/* ---- the runtime ---- */

/* Reads what the kernel before it wrote, and writes, without waiting for it. */
static __global__ void hasty(float *x, bool writes)
{
    const float read = x[threadIdx.x];
    if (writes)
        x[threadIdx.x] = read;
    pdl_wait();
    x[threadIdx.x] = read + 1;
}

static void test_early_reads(void **)
{
    for (int early = 0; early < 2; early++) {
        struct queue one = q;
        one.pdl = early;
        setenv("LATTE_EMULATE_PDL", "1", 1);
        OK(cudaMemset(out, 0, sizeof(host)));
        launch(&one, "hasty", hasty, dim3(1), N, 0, out, false); /* follows no kernel */
        launch(&one, "hasty", hasty, dim3(1), N, 0, out, false);
        OK(run_and_get());
        unsetenv("LATTE_EMULATE_PDL");
        int n_right = 0; /* once one thread has waited the others see all */
        for (int i = 0; i < N; i++)
            n_right += host[i] == 2;
        assert_true(early ? n_right < N : n_right == N);
    }
}

/* One block of the cluster waits. The others may read when they have met it, not before. */
template <bool MEET> static __global__ void hasty_blocks(float *x, const float *from)
{
    if (cluster_rank() == 0)
        pdl_wait();
    if (MEET)
        cluster_sync();
    const float read = from[threadIdx.x];
    if (!MEET && cluster_rank())
        pdl_wait();
    x[blockIdx.x * N / 4 + threadIdx.x] = read;
}

static void test_early_reads_of_blocks(void **)
{
    float *from;
    struct queue one = q;
    one.pdl = true;
    OK(cudaMalloc((void **)&from, N * sizeof(float)));
    setenv("LATTE_EMULATE_PDL", "1", 1);
    for (int meet = 0; meet < 2; meet++) {
        for (int round = 0; round < 3; round++) {
            OK(cudaMemset(from, 0, N * sizeof(float)));
            launch(&one, "put", put, dim3(1), N, 0, from, 5.f); /* follows no kernel */
            launch(&one, "put", put, dim3(1), N, 0, from, 6.f);
            launch_cluster(&one, "hasty", meet ? hasty_blocks<true> : hasty_blocks<false>, dim3(4),
                           4, N / 4, 0, out, (const float *)from);
            OK(one.error);
            OK(run_and_get());
            for (int b = 0; b < 4; b++) {
                int n_right = 0; /* once one thread has waited the others of its block see all */
                for (int i = 0; i < N / 4; i++)
                    n_right += host[b * N / 4 + i] == 6;
                assert_true(meet || b == 0 ? n_right == N / 4 : n_right < N / 4);
            }
        }
    }
    unsetenv("LATTE_EMULATE_PDL");
    OK(cudaFree(from));
}

static void test_work_is_done_late(void **)
{
    float *pinned;
    OK(cudaMallocHost((void **)&pinned, N * sizeof(float)));
    memset(pinned, 0, N * sizeof(float));
    launch(&q, "put", put, dim3(1), N, 0, out, 3.f);
    OK(cudaMemcpyAsync(pinned, out, N * sizeof(float), cudaMemcpyDeviceToHost, q.stream));
    cudaEvent_t done;
    OK(cudaEventCreate(&done));
    OK(cudaEventRecord(done, q.stream));
    assert_int_equal(cudaEventQuery(done), cudaErrorNotReady);
    assert_true(pinned[0] == 0);
    OK(cudaEventSynchronize(done));
    assert_true(pinned[N - 1] == 3);
    OK(cudaEventQuery(done));

    /* A pinned source is read when the copy runs, other memory when it is queued. */
    float other = 5;
    pinned[0] = 5;
    OK(cudaMemcpyAsync(out, pinned, sizeof(float), cudaMemcpyHostToDevice, q.stream));
    OK(cudaMemcpyAsync(out + 1, &other, sizeof(float), cudaMemcpyHostToDevice, q.stream));
    pinned[0] = other = 6;
    OK(run_and_get());
    assert_true(host[0] == 6 && host[1] == 5);
    OK(cudaEventDestroy(done));
    OK(cudaFreeHost(pinned));
}

static void test_copies_beyond_the_end(void **)
{
    assert_int_equal(cudaMemcpyAsync(out + 1, host, sizeof(host), cudaMemcpyHostToDevice, q.stream),
                     cudaErrorInvalidValue);
    assert_int_equal(cudaMemcpyAsync(host, host + 1, 4, cudaMemcpyDeviceToHost, q.stream),
                     cudaErrorInvalidValue);
    assert_int_equal(cudaMemsetAsync(out, 0, sizeof(host) + 1, q.stream), cudaErrorInvalidValue);
    assert_int_equal(cudaGetLastError(), cudaErrorInvalidValue);
    OK(cudaGetLastError());
}

static void test_capture_forbids(void **)
{
    void *p;
    cudaGraph_t graph;
    OK(cudaStreamBeginCapture(q.stream, cudaStreamCaptureModeGlobal));
    assert_int_equal(cudaMalloc(&p, 16), cudaErrorStreamCaptureUnsupported);
    assert_int_equal(cudaStreamSynchronize(q.stream), cudaErrorStreamCaptureUnsupported);
    OK(cudaStreamEndCapture(q.stream, &graph));
    OK(cudaGraphDestroy(graph));
    (void)cudaGetLastError();
}

static void test_memory_ends(void **)
{
    void *p = NULL;
    size_t available, total, later;
    setenv("LATTE_EMULATE_MEMORY", "1000000", 1);
    OK(cudaMemGetInfo(&available, &total));
    assert_int_equal(total, 1000000);
    assert_int_equal(cudaMalloc(&p, available + 1), cudaErrorMemoryAllocation);
    OK(cudaMalloc(&p, available));
    OK(cudaMemGetInfo(&later, &total));
    assert_int_equal(later, 0);
    OK(cudaFree(p));
    unsetenv("LATTE_EMULATE_MEMORY");
    (void)cudaGetLastError();
}

static void test_injected_failure(void **)
{
    setenv("LATTE_EMULATE_FAIL", "2", 1);
    launch(&q, "put", put, dim3(1), N, 0, out, 1.f);
    OK(run_and_get());
    launch(&q, "put", put, dim3(1), N, 0, out, 2.f); /* queued; fails when it runs */
    OK(q.error);
    assert_int_equal(cudaStreamSynchronize(q.stream), cudaErrorLaunchFailure);
    launch(&q, "put", put, dim3(1), N, 0, out, 3.f);
    assert_int_equal(q.error, cudaErrorLaunchFailure);
    assert_string_equal(q.where, "put");
    unsetenv("LATTE_EMULATE_FAIL");
    q.error = cudaSuccess;
    launch(&q, "put", put, dim3(1), N, 0, out, 4.f);
    OK(run_and_get());
    assert_true(host[0] == 4);
    (void)cudaGetLastError();
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_mistakes),
        cmocka_unit_test(test_unwritten_shared_memory),
        cmocka_unit_test(test_unwritten_device_memory),
        cmocka_unit_test(test_copies_not_waited_for),
        cmocka_unit_test(test_orders),
        cmocka_unit_test(test_orders_of_blocks),
        cmocka_unit_test(test_unwritten_in_clusters),
        cmocka_unit_test(test_early_reads),
        cmocka_unit_test(test_early_reads_of_blocks),
        cmocka_unit_test(test_work_is_done_late),
        cmocka_unit_test(test_copies_beyond_the_end),
        cmocka_unit_test(test_capture_forbids),
        cmocka_unit_test(test_memory_ends),
        cmocka_unit_test(test_injected_failure),
    };
    return cmocka_run_group_tests(tests, open_device, NULL);
}
