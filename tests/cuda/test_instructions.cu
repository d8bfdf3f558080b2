/* test_instructions.cu - what kernels stand on (instructions.cuh, shuffles, barriers, graphs)
 * against plain loops. On a GPU this tests instructions.cuh; on the host it tests that the
 * emulator says the same.
 */
#include "engine/kernels/cuda/device.cuh"

#include <stdlib.h>

extern "C" {
#include "tests/unit/unit.h"
}

enum { N = 256 };

#define OK(call) assert_int_equal((call), cudaSuccess)

struct fixture {
    struct queue q;
    float *in, *out; /* device, [N * 16] */
    float host[N * 16];
};

static struct fixture f;

static int open_device(void **)
{
    int n = 0;
    if (cudaGetDeviceCount(&n) != cudaSuccess || !n)
        return 0; /* each test skips */
    int major = 0, minor = 0;
    OK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
    OK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0));
    f.q.n_sms = 1;
    f.q.capability = 10 * major + minor;
    OK(cudaStreamCreate(&f.q.stream));
    OK(cudaMalloc((void **)&f.in, sizeof(f.host)));
    OK(cudaMalloc((void **)&f.out, sizeof(f.host)));
    OK(cudaMemset(f.out, 0, sizeof(f.host))); /* what kernels do not write is read with the rest */
    return 0;
}

static void need_device(void)
{
    if (!f.q.stream) {
        print_message("skipped: no GPU\n");
        skip();
    }
}

static void need_clusters(void)
{
    need_device();
    if (f.q.capability < 90) {
        print_message("skipped: no clusters\n");
        skip();
    }
}

/* Numbers that bf16 holds and whose products add up exactly. */
static void put_random(uint32_t seed)
{
    for (int i = 0; i < N * 16; i++)
        f.host[i] = (float)((int)(test_random(&seed) % 33) - 16) / 8;
    OK(cudaMemcpy(f.in, f.host, sizeof(f.host), cudaMemcpyHostToDevice));
}

static void get(float *out)
{
    OK(f.q.error);
    OK(cudaMemcpyAsync(out, f.out, sizeof(f.host), cudaMemcpyDeviceToHost, f.q.stream));
    OK(cudaStreamSynchronize(f.q.stream));
}

/* ---- matrices ---- */

static __device__ uint32_t pair(const float *p, int step)
{
    __nv_bfloat162 two = __floats2bfloat162_rn(p[0], p[step]);
    return *reinterpret_cast<uint32_t *>(&two);
}

/* d [16, 8] = a [16, 16] b [16, 8] + c, fragments filled from memory as the header describes. */
static __global__ void fragments(float *d, const float *a, const float *b, const float *c)
{
    pdl_trigger();
    pdl_wait();
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    uint32_t x[4], y[2];
    float z[4];
    for (int i = 0; i < 4; i++)
        x[i] = pair(a + (g + 8 * (i & 1)) * 16 + 2 * t + 8 * (i / 2), 1);
    for (int i = 0; i < 2; i++)
        y[i] = pair(b + (2 * t + 8 * i) * 8 + g, 8);
    for (int i = 0; i < 4; i++)
        z[i] = c[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2];
    mma_bf16(z, x, y);
    for (int i = 0; i < 4; i++)
        d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = z[i];
}

/* The same by ldmatrix from shared memory, rows of 16 padded to 24. b is stored as it is and
 * read transposed, or stored transposed and read as it is. */
template <bool TRANS>
static __global__ void matrices(float *d, const float *a, const float *b, const float *c)
{
    enum { WIDTH = 24 };
    DYNAMIC_SHARED(bf16, shared);
    bf16 *sa = shared, *sb = shared + 16 * WIDTH;
    pdl_trigger();
    pdl_wait();
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    for (int i = lane; i < 256; i += WARP)
        sa[i / 16 * WIDTH + i % 16] = from_float<bf16>(a[i]);
    for (int i = lane; i < 128; i += WARP)
        sb[TRANS ? i / 8 * WIDTH + i % 8 : i % 8 * WIDTH + i / 8] = from_float<bf16>(b[i]);
    __syncwarp();
    uint32_t x[4], y[4];
    float z[4];
    ldmatrix_x4(x, sa + lane % 16 * WIDTH + lane / 16 * 8);
    if (TRANS)
        ldmatrix_x4_trans(y, sb + lane % 16 * WIDTH);
    else
        ldmatrix_x4(y, sb + lane % 8 * WIDTH + lane / 8 % 2 * 8);
    for (int i = 0; i < 4; i++)
        z[i] = c[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2];
    mma_bf16(z, x, y);
    for (int i = 0; i < 4; i++)
        d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = z[i];
}

static void test_matrices(void **)
{
    need_device();
    enum { SHARED = 32 * 24 * 2 };
    for (int way = 0; way < 3; way++) {
        put_random(7 + way);
        const float *a = f.in, *b = f.in + 256, *c = f.in + 512;
        if (way == 0)
            launch(&f.q, "fragments", fragments, dim3(1), WARP, 0, f.out, a, b, c);
        if (way == 1)
            launch(&f.q, "matrices", matrices<false>, dim3(1), WARP, SHARED, f.out, a, b, c);
        if (way == 2)
            launch(&f.q, "matrices", matrices<true>, dim3(1), WARP, SHARED, f.out, a, b, c);
        static float out[N * 16];
        get(out);
        for (int i = 0; i < 16; i++) {
            for (int j = 0; j < 8; j++) {
                float sum = f.host[512 + i * 8 + j];
                for (int k = 0; k < 16; k++)
                    sum += f.host[i * 16 + k] * f.host[256 + k * 8 + j];
                if (sum != out[i * 8 + j])
                    fail_msg("way %d, %d %d: %g, expected %g", way, i, j, out[i * 8 + j], sum);
            }
        }
    }
}

/* x4 and x4_trans give the pairs that the header names. */
static __global__ void load_four(uint32_t *out)
{
    DYNAMIC_SHARED(uint16_t, shared);
    pdl_trigger();
    pdl_wait();
    for (int i = threadIdx.x; i < 256; i += WARP)
        shared[i] = (uint16_t)i;
    __syncwarp();
    uint32_t straight[4], across[4];
    ldmatrix_x4(straight, shared + threadIdx.x * 8);
    ldmatrix_x4_trans(across, shared + threadIdx.x * 8);
    for (int i = 0; i < 4; i++) {
        out[threadIdx.x * 8 + i] = straight[i];
        out[threadIdx.x * 8 + 4 + i] = across[i];
    }
}

static void test_load_four(void **)
{
    need_device();
    launch(&f.q, "load_four", load_four, dim3(1), WARP, 512, (uint32_t *)f.out);
    static uint32_t out[N * 16];
    get((float *)out);
    for (unsigned lane = 0; lane < 32; lane++) {
        for (unsigned i = 0; i < 4; i++) {
            unsigned row = lane / 4, column = 2 * (lane % 4);
            unsigned low = i * 64 + row * 8 + column, t_low = i * 64 + column * 8 + row;
            assert_int_equal(out[lane * 8 + i], low | (low + 1) << 16);
            assert_int_equal(out[lane * 8 + 4 + i], t_low | (t_low + 8) << 16);
        }
    }
}

/* ---- pairs ---- */

/* out[i] = in[i] in[i + 1] + in[i + 2] where i is even, and of odd i the same but one further on:
 * the pairs' other halves. */
static __global__ void sum_pairs(float *out, const float *in)
{
    pdl_trigger();
    pdl_wait();
    const int i = 2 * threadIdx.x;
    const uint32_t two = fma_bf16x2(pair(in + i, 1), pair(in + i + 1, 1), pair(in + i + 2, 1));
    out[i] = __uint_as_float(two << 16);
    out[i + 1] = __uint_as_float(two & 0xffff0000);
}

/* Eighths times eighths and more: sums that bf16 does not hold, which are rounded once. */
static void test_pairs(void **)
{
    need_device();
    put_random(11);
    launch(&f.q, "sum_pairs", sum_pairs, dim3(1), N / 2, 0, f.out, (const float *)f.in);
    static float out[N * 16];
    get(out);
    int n_rounded = 0;
    for (int i = 0; i < N; i++) {
        const float sum = f.host[i] * f.host[i + 1] + f.host[i + 2]; /* f32 holds it */
        const float expected = __bfloat162float(__float2bfloat16_rn(sum));
        n_rounded += expected != sum;
        if (out[i] != expected)
            fail_msg("%d: %g, expected %g", i, out[i], expected);
    }
    assert_true(n_rounded > 0);
}

/* ---- products of warpgroups ---- */

enum { GROUP_ROWS = 64, GROUP_DEPTH = 64, MOST_COLUMNS = 128 };

/* d [64, COLUMNS] = 1 + a [64, 64] b^T [COLUMNS, 64]: a warp's 16 rows in its registers, b's pieces
 * of 16 bytes where instructions.cuh says. */
template <int COLUMNS>
static __global__ void group_product(float *d, const float *a, const float *b)
{
    DYNAMIC_SHARED(unsigned char, shared);
    bf16 *const columns =
        reinterpret_cast<bf16 *>(shared + (1024 - (uintptr_t)shared % 1024) % 1024);
    const int lane = threadIdx.x % WARP, t = lane % 4, row = threadIdx.x / WARP * 16 + lane / 4;
    pdl_trigger();
    pdl_wait();
    for (int i = threadIdx.x; i < COLUMNS * GROUP_DEPTH; i += blockDim.x) {
        const int column = i / GROUP_DEPTH, k = i % GROUP_DEPTH;
        columns[column * GROUP_DEPTH + (k / 8 ^ column % 8) * 8 + k % 8] = from_float<bf16>(b[i]);
    }
    uint4 rows[GROUP_DEPTH / 16];
    for (int k = 0; k < GROUP_DEPTH / 16; k++) {
        const float *const from = a + row * GROUP_DEPTH + 16 * k + 2 * t;
        rows[k] = make_uint4(pair(from, 1), pair(from + 8 * GROUP_DEPTH, 1), pair(from + 8, 1),
                             pair(from + 8 * GROUP_DEPTH + 8, 1));
    }
    float sum[COLUMNS / 2];
    for (int i = 0; i < COLUMNS / 2; i++)
        sum[i] = 1;
    shared_for_products();
    __syncthreads();
    wgmma_begin();
#pragma unroll
    for (int k = 0; k < GROUP_DEPTH / 16; k++)
        wgmma_rows<COLUMNS>(sum, rows[k], columns, 16 * k);
    wgmma_commit();
    wgmma_finish(sum);
    for (int i = 0; i < COLUMNS / 2; i++)
        d[(row + i / 2 % 2 * 8) * COLUMNS + i / 4 * 8 + 2 * t + i % 2] = sum[i];
}

static void test_products_of_warpgroups(void **)
{
    static const struct {
        int columns;
        void (*kernel)(float *, const float *, const float *);
    } sizes[] = {{16, group_product<16>}, {32, group_product<32>},
                 {48, group_product<48>}, {64, group_product<64>},
                 {96, group_product<96>}, {MOST_COLUMNS, group_product<MOST_COLUMNS>}};
    static float a[GROUP_ROWS * GROUP_DEPTH], b[MOST_COLUMNS * GROUP_DEPTH];
    static float d[GROUP_ROWS * MOST_COLUMNS];
    float *in, *out;
    uint32_t seed = 41;
    need_device();
    if (f.q.capability != 90 || !has_warpgroups((const void *)group_product<16>)) {
        print_message("skipped: no warpgroups\n");
        skip();
    }
    for (float &x : a) /* as put_random's: sums are exact */
        x = (float)((int)(test_random(&seed) % 33) - 16) / 8;
    for (float &x : b)
        x = (float)((int)(test_random(&seed) % 33) - 16) / 8;
    OK(cudaMalloc((void **)&in, sizeof(a) + sizeof(b)));
    OK(cudaMalloc((void **)&out, sizeof(d)));
    OK(cudaMemcpy(in, a, sizeof(a), cudaMemcpyHostToDevice));
    OK(cudaMemcpy(in + COUNT_OF(a), b, sizeof(b), cudaMemcpyHostToDevice));
    for (const auto &s : sizes) {
        const size_t shared = 1024 + (size_t)s.columns * GROUP_DEPTH * sizeof(bf16);
        launch(&f.q, "group_product", s.kernel, dim3(1), 4 * WARP, shared, out, (const float *)in,
               (const float *)in + COUNT_OF(a));
        OK(f.q.error);
        OK(cudaMemcpyAsync(d, out, (size_t)GROUP_ROWS * s.columns * sizeof(*d),
                           cudaMemcpyDeviceToHost, f.q.stream));
        OK(cudaStreamSynchronize(f.q.stream));
        for (int r = 0; r < GROUP_ROWS; r++) {
            for (int i = 0; i < s.columns; i++) {
                float sum = 1;
                for (int k = 0; k < GROUP_DEPTH; k++)
                    sum += a[r * GROUP_DEPTH + k] * b[i * GROUP_DEPTH + k];
                if (sum != d[r * s.columns + i])
                    fail_msg("%d columns, %d %d: %g, expected %g", s.columns, r, i,
                             d[r * s.columns + i], sum);
            }
        }
    }
    cudaFree(in);
    cudaFree(out);
}

/* ---- warps and blocks ---- */

static __global__ void shuffles(float *out, const float *in)
{
    pdl_trigger();
    pdl_wait();
    const unsigned all = 0xffffffffu;
    const int i = threadIdx.x;
    const float x = in[i];
    out[i] = __shfl_sync(all, x, (i * 7 + 3) & 31);
    out[N + i] = __shfl_up_sync(all, x, 3, 16);
    out[2 * N + i] = __shfl_down_sync(all, x, 5);
    out[3 * N + i] = __shfl_xor_sync(all, x, 4, 8);
    out[4 * N + i] = (float)__popc(__ballot_sync(all, x > 0));
    out[5 * N + i] = (float)__any_sync(all, x > 1.9f) + 2 * (float)__all_sync(all, x < 5);
    out[6 * N + i] = (float)__shfl_xor_sync(all, (double)x, 1);
    out[7 * N + i] = (float)__reduce_max_sync(all, (int)(8 * x));
    if (i % 32 < 16) /* half a warp alone */
        out[8 * N + i] = __shfl_xor_sync(0xffffu, x, 8, 16);
    else
        out[8 * N + i] = __shfl_xor_sync(0xffff0000u, x, 1, 16);
}

static void test_shuffles(void **)
{
    need_device();
    put_random(3);
    launch(&f.q, "shuffles", shuffles, dim3(1), N, 0, f.out, (const float *)f.in);
    static float out[N * 16];
    get(out);
    for (int i = 0; i < N; i++) {
        const int lane = i % 32;
        const float *x = f.host, *warp = x + i - lane;
        int positive = 0, any = 0, most = -1000;
        for (int j = 0; j < 32; j++) {
            positive += warp[j] > 0;
            any |= warp[j] > 1.9f;
            most = (int)(8 * warp[j]) > most ? (int)(8 * warp[j]) : most;
        }
        assert_true(out[i] == warp[((i % N) * 7 + 3) & 31]);
        assert_true(out[N + i] == x[lane % 16 < 3 ? i : i - 3]);
        assert_true(out[2 * N + i] == x[lane + 5 > 31 ? i : i + 5]);
        assert_true(out[3 * N + i] == x[i ^ 4]);
        assert_true(out[4 * N + i] == (float)positive);
        assert_true(out[5 * N + i] == (float)(any + 2));
        assert_true(out[6 * N + i] == x[i ^ 1]);
        assert_true(out[7 * N + i] == (float)most);
        assert_true(out[8 * N + i] == x[lane < 16 ? i ^ 8 : i ^ 1]);
    }
}

/* Rounds of: write my place, meet, read my neighbour's. Half the threads return early. */
static __global__ void barriers(float *out, const float *in)
{
    __shared__ float line[N], scratch[32];
    pdl_trigger();
    pdl_wait();
    const int i = threadIdx.x, half = N / 2;
    float x = in[blockIdx.x * N + i];
    const float sum = block_sum(x, scratch);
    if (i >= half)
        return;
    for (int round = 0; round < 5; round++) {
        line[i] = x;
        __syncthreads();
        x = line[(i + 1) % half];
        __syncthreads();
    }
    out[blockIdx.x * N + i] = x;
    out[blockIdx.x * N + half + i] = sum;
    if (i == 0)
        atomicAdd(&out[15 * N], 1.f);
}

static void test_barriers(void **)
{
    need_device();
    put_random(5);
    OK(cudaMemset(f.out, 0, sizeof(f.host)));
    launch(&f.q, "barriers", barriers, dim3(8), N, 0, f.out, (const float *)f.in);
    static float out[N * 16];
    get(out);
    for (int b = 0; b < 8; b++) {
        float sum = 0;
        for (int i = 0; i < N; i++)
            sum += f.host[b * N + i];
        for (int i = 0; i < N / 2; i++) {
            assert_true(out[b * N + i] == f.host[b * N + (i + 5) % (N / 2)]);
            assert_true(out[b * N + N / 2 + i] == sum);
        }
    }
    assert_true(out[15 * N] == 8);
}

/* Two stages in flight, the last row left out. */
static __global__ void copies(float *out, const float *in)
{
    DYNAMIC_SHARED(float4, stage); /* [2, N] */
    pdl_trigger();
    pdl_wait();
    const float4 *from = reinterpret_cast<const float4 *>(in);
    const int i = threadIdx.x;
    copy_async_16(stage + i, from + i);
    copy_async_commit();
    for (int row = 0; row < 4; row++) {
        if (row < 3)
            copy_async_16(stage + (row + 1) % 2 * N + i, from + (row + 1) * N + i, row + 1 != 3);
        copy_async_commit();
        copy_async_wait<1>();
        __syncthreads();
        const float4 x = stage[row % 2 * N + (i + 1) % N];
        reinterpret_cast<float4 *>(out)[row * N + i] = x;
        __syncthreads();
    }
}

static void test_copies(void **)
{
    need_device();
    put_random(9);
    launch(&f.q, "copies", copies, dim3(1), N, 2 * N * sizeof(float4), f.out, (const float *)f.in);
    static float out[N * 16];
    get(out);
    for (int row = 0; row < 4; row++)
        for (int i = 0; i < N * 4; i++)
            assert_true(out[row * N * 4 + i] ==
                        (row == 3 ? 0 : f.host[row * N * 4 + (i + 4) % (N * 4)]));
}

static __global__ void prefetches(float *out, const float *in)
{
    pdl_trigger();
    prefetch_l2(in + threadIdx.x);
    pdl_wait();
    out[threadIdx.x] = in[threadIdx.x];
}

static void test_prefetch(void **)
{
    need_device();
    put_random(13);
    launch(&f.q, "prefetches", prefetches, dim3(1), N, 0, f.out, (const float *)f.in);
    static float out[N * 16];
    get(out);
    for (int i = 0; i < N; i++)
        assert_true(out[i] == f.host[i]);
}

/* ---- clusters ---- */

static const int cluster_sizes[] = {1, 2, 8, 16};

/* Each block writes to the next one's memory and reads all peers', from another place of each.
 * What lies between arrive and wait concerns the block alone. */
static __global__ void exchange(float *out, const float *in, int n)
{
    __shared__ float scratch[32], kept;
    DYNAMIC_SHARED(float, mine); /* [N] */
    float *given = mine + N, *line = given + N;
    const int i = threadIdx.x, rank = cluster_rank();
    pdl_trigger();
    if (i == 0)
        kept = (float)rank;
    cluster_sync(); /* all have begun */
    pdl_wait();
    const float x = in[blockIdx.x * N + i];
    mine[i] = line[i] = x;
    cluster_peer(given, (rank + 1) % n)[i] = 2 * x;
    cluster_arrive();
    const float sum = block_sum(x, scratch);
    const float neighbour = line[(i + 1) % N];
    __syncthreads();
    line[i] = 0;
    cluster_wait();
    float peers = 0;
    for (int r = 0; r < n; r++) {
        const float *theirs = mine;
        peers += cluster_peer(theirs, r)[(i + r) % N];
    }
    cluster_sync(); /* nobody ends before */
    out[blockIdx.x * N + i] = peers + given[i] + 64 * neighbour + 2 * sum + kept + line[i];
}

static float exchanged(const float *in, int b, int i, int n)
{
    const int first = b / n * n, before = first + (b - first + n - 1) % n;
    float sum = 2 * in[before * N + i] + 64 * in[b * N + (i + 1) % N] + (float)(b - first);
    for (int j = 0; j < N; j++)
        sum += 2 * in[b * N + j];
    for (int r = 0; r < n; r++)
        sum += in[(first + r) * N + (i + r) % N];
    return sum;
}

static void launch_exchange(struct queue *q, float *out, const float *in, int n)
{
    launch_cluster(q, "exchange", exchange, dim3(16), n, N, 3 * N * sizeof(float), out, in, n);
}

static void test_clusters(void **)
{
    need_clusters();
    for (int n : cluster_sizes) {
        for (int round = 0; round < 3; round++) {
            static float out[N * 16];
            put_random(17 + round);
            launch_exchange(&f.q, f.out, f.in, n);
            get(out);
            for (int i = 0; i < N * 16; i++)
                if (out[i] != exchanged(f.host, i / N, i % N, n))
                    fail_msg("clusters of %d, block %d, thread %d: %g, expected %g", n, i / N,
                             i % N, out[i], exchanged(f.host, i / N, i % N, n));
        }
    }
}

/* Rounds of the barrier in a line of blocks along y and z, each thread after its own way: warps
 * of the first half return early, and the last warp of each block later. */
static __global__ void rounds(float *out)
{
    DYNAMIC_SHARED(int, shared);
    const int i = threadIdx.x, rank = cluster_rank();
    const int b = (int)(blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z));
    pdl_trigger();
    pdl_wait();
    if (i < N / 2)
        return;
    shared[i] = rank;
    cluster_sync();
    for (int round = 0; round < 5; round++) {
        const int x = cluster_peer(shared, rank ^ 1)[i];
        cluster_sync();
        shared[i] = x + 1;
        if (round == 3 && i >= N - WARP)
            break;
        cluster_sync();
    }
    out[b * N + i] = (float)shared[i];
}

static void test_cluster_rounds(void **)
{
    need_clusters();
    for (int round = 0; round < 3; round++) {
        static float out[N * 16];
        launch_cluster(&f.q, "rounds", rounds, dim3(4, 2, 2), 2, N, N * sizeof(int), f.out);
        get(out);
        for (int b = 0; b < 16; b++)
            for (int i = N / 2; i < N; i++) /* swapped 5 times, or 4 */
                assert_true(out[b * N + i] == (float)(i < N - WARP ? 5 + (b % 2 ^ 1) : 4 + b % 2));
    }
}

/* Kernels that begin while the one before them runs. */
static void test_clusters_early(void **)
{
    need_clusters();
    struct queue q = f.q;
    q.pdl = true;
    setenv("LATTE_EMULATE_PDL", "1", 1); /* for the emulator */
    for (int n : cluster_sizes) {
        static float out[N * 16], once[N * 16];
        for (int i = 0; i < N * 16; i++)
            f.host[i] = (float)(i * 7 % 3 - 1) / 8;
        OK(cudaMemcpy(f.in, f.host, sizeof(f.host), cudaMemcpyHostToDevice));
        launch_exchange(&q, f.out, f.in, n);
        launch_exchange(&q, f.in, f.out, n);
        launch(&q, "prefetches", prefetches, dim3(1), N, 0, f.out, (const float *)f.in);
        OK(q.error);
        get(out);
        for (int i = 0; i < N * 16; i++)
            once[i] = exchanged(f.host, i / N, i % N, n);
        for (int i = 0; i < N * 16; i++)
            assert_true(out[i] == (i < N ? exchanged(once, 0, i, n) : once[i]));
    }
    unsetenv("LATTE_EMULATE_PDL");
}

/* Rows of 24 floats, in bulk; out: what was there before the wait does not matter. */
static __global__ void bulk_rows(float *out, const float *in)
{
    DYNAMIC_SHARED(float, shared);
    bulk_barrier *const fetched = reinterpret_cast<bulk_barrier *>(shared + 8 * 28);
    pdl_wait();
    if (threadIdx.x < WARP) {
        bulk_begin(fetched, 8 * 24 * sizeof(float));
        if (threadIdx.x < 8)
            bulk_copy(shared + threadIdx.x * 28, in + threadIdx.x * 24, 24 * sizeof(float),
                      fetched);
    }
    __syncthreads();
    bulk_wait(fetched);
    if (threadIdx.x < 192)
        out[threadIdx.x] = shared[threadIdx.x / 24 * 28 + threadIdx.x % 24];
}

static void test_bulk_copies(void **)
{
    need_clusters();
    static float out[N * 16];
    for (int i = 0; i < N * 16; i++)
        f.host[i] = (float)i;
    OK(cudaMemcpy(f.in, f.host, sizeof(f.host), cudaMemcpyHostToDevice));
    launch(&f.q, "bulk_rows", bulk_rows, dim3(1), N, 8 * 28 * sizeof(float) + 8, f.out,
           (const float *)f.in);
    OK(f.q.error);
    get(out);
    for (int i = 0; i < 192; i++)
        assert_true(out[i] == (float)i);
}

/* ---- graphs and streams ---- */

static __global__ void scale(float *x, float by, int n)
{
    pdl_trigger();
    pdl_wait();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n)
        x[i] *= by;
}

static void test_graph(void **)
{
    need_device();
    put_random(11);
    float *from;
    OK(cudaHostAlloc((void **)&from, sizeof(f.host), cudaHostAllocDefault));
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    OK(cudaStreamBeginCapture(f.q.stream, cudaStreamCaptureModeThreadLocal));
    OK(cudaMemcpyAsync(f.out, from, sizeof(f.host), cudaMemcpyHostToDevice, f.q.stream));
    launch(&f.q, "scale", scale, dim3(N * 16 / 128), 128, 0, f.out, 2.f, N * 16);
    launch(&f.q, "scale", scale, dim3(1), 128, 0, f.out, -1.f, 100);
    OK(cudaStreamEndCapture(f.q.stream, &graph));
    OK(cudaGraphInstantiate(&exec, graph, 0));
    OK(cudaGraphDestroy(graph));
    for (int round = 1; round < 4; round++) { /* the copy reads what is there when it runs */
        static float out[N * 16];
        for (int i = 0; i < N * 16; i++)
            from[i] = f.host[i] * (float)round;
        OK(cudaGraphLaunch(exec, f.q.stream));
        get(out);
        for (int i = 0; i < N * 16; i++)
            assert_true(out[i] == f.host[i] * (float)round * (i < 100 ? -2 : 2));
    }
    OK(cudaGraphExecDestroy(exec));
    OK(cudaFreeHost(from));
}

/* Each block sends 4, 8 and 16 bytes a thread to three others, some of which end early. */
static __global__ void sends(float *out, const float *in, int n)
{
    DYNAMIC_SHARED(float, shared); /* [7, N], then the barriers */
    bulk_barrier *const came = reinterpret_cast<bulk_barrier *>(shared + 7 * N);
    const int i = threadIdx.x, rank = cluster_rank();
    float4 *const four = reinterpret_cast<float4 *>(shared) + i;
    float2 *const two = reinterpret_cast<float2 *>(shared + 4 * N) + i;
    float *const one = shared + 6 * N + i;
    if (i < WARP) {
        bulk_begin(came, 7 * N * sizeof(float));
        bulk_begin(came + 1, 0);
    }
    cluster_arrive_relaxed();
    cluster_wait();
    pdl_wait();
    const float x = in[blockIdx.x * N + i];
    cluster_send(one, x, (rank + 1) % n, came);
    cluster_send(two, make_float2(2 * x, 3 * x), (rank + 2) % n, came);
    cluster_send(four, make_float4(4 * x, 5 * x, 6 * x, 7 * x), (rank + 3) % n, came);
    cluster_receive(came + 1);
    cluster_receive(came);
    out[blockIdx.x * N + i] =
        *one + (two->x + two->y) + ((four->x + four->y) + (four->z + four->w));
}

static void test_sends(void **)
{
    need_clusters();
    for (int n : cluster_sizes) {
        static float out[N * 16];
        if (n == 1) /* memcheck has sends need clusters of two blocks at least */
            continue;
        for (int i = 0; i < N * 16; i++)
            f.host[i] = (float)(i % 1013);
        OK(cudaMemcpy(f.in, f.host, sizeof(f.host), cudaMemcpyHostToDevice));
        for (int round = 0; round < 3; round++) {
            launch_cluster(&f.q, "sends", sends, dim3(16), n, N, 7 * N * sizeof(float) + 16, f.out,
                           f.in, n);
            get(out);
            for (int i = 0; i < N * 16; i++) {
                const int first = i / N / n * n, rank = i / N - first;
                const float *const from = f.host + first * N + i % N;
                assert_true(out[i] == from[(rank + n - 1 % n) % n * N] +
                                          5 * from[(rank + n - 2 % n) % n * N] +
                                          22 * from[(rank + n - 3 % n) % n * N]);
            }
        }
    }
}

static void test_graph_of_clusters(void **)
{
    need_clusters();
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    OK(cudaStreamBeginCapture(f.q.stream, cudaStreamCaptureModeThreadLocal));
    launch_exchange(&f.q, f.out, f.in, 8);
    launch(&f.q, "scale", scale, dim3(1), 128, 0, f.out, -1.f, 100);
    OK(cudaStreamEndCapture(f.q.stream, &graph));
    OK(cudaGraphInstantiate(&exec, graph, 0));
    OK(cudaGraphDestroy(graph));
    for (int round = 0; round < 3; round++) {
        static float out[N * 16];
        put_random(23 + round);
        OK(cudaGraphLaunch(exec, f.q.stream));
        get(out);
        for (int i = 0; i < N * 16; i++)
            assert_true(out[i] == exchanged(f.host, i / N, i % N, 8) * (i < 100 ? -1 : 1));
    }
    OK(cudaGraphExecDestroy(exec));
}

static void test_limits(void **)
{
    need_device();
    struct queue q = f.q;
    launch(&q, "scale", scale, dim3(1), 2048, 0, f.out, 2.f, 1);
    assert_int_not_equal(q.error, cudaSuccess);
    assert_string_equal(q.where, "scale");
    q = f.q;
    launch(&q, "scale", scale, dim3(1), 32, 300 * 1024, f.out, 2.f, 1);
    assert_int_not_equal(q.error, cudaSuccess);
    q = f.q;
    launch_cluster(&q, "scale", scale, dim3(3), 2, 32, 0, f.out, 2.f, 1); /* no multiple */
    assert_int_not_equal(q.error, cudaSuccess);
    assert_string_equal(q.where, "scale");
    q = f.q;
    launch_cluster(&q, "scale", scale, dim3(34), 17, 32, 0, f.out, 2.f, 1);
    assert_int_not_equal(q.error, cudaSuccess);
    q = f.q;
    launch(&q, "scale", scale, dim3(0), 32, 0, f.out, 2.f, 1); /* nothing to do */
    assert_int_equal(q.error, cudaSuccess);
    (void)cudaGetLastError();
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_matrices),       cmocka_unit_test(test_products_of_warpgroups),
        cmocka_unit_test(test_load_four),      cmocka_unit_test(test_shuffles),
        cmocka_unit_test(test_barriers),       cmocka_unit_test(test_copies),
        cmocka_unit_test(test_prefetch),       cmocka_unit_test(test_clusters),
        cmocka_unit_test(test_cluster_rounds), cmocka_unit_test(test_clusters_early),
        cmocka_unit_test(test_bulk_copies),    cmocka_unit_test(test_sends),
        cmocka_unit_test(test_graph),          cmocka_unit_test(test_graph_of_clusters),
        cmocka_unit_test(test_limits),         cmocka_unit_test(test_pairs),
    };
    return cmocka_run_group_tests(tests, open_device, NULL);
}
