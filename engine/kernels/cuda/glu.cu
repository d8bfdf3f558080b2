/* glu.cu - the mlp's first product of many rows, see glu.cuh.
 *
 * A stage of shared memory holds a chunk: 128 rows, then 128 weight rows of gate, then of up, of 64
 * values each, as wgmma_bf16 wants them. `full` of a stage counts the bytes of the three copies,
 * `empty` the warpgroups of both blocks that have multiplied what is in it: the copy that comes
 * next writes to both.
 */
#include "engine/kernels/cuda/glu.cuh"
#include "engine/kernels/cuda/skinny.cuh"

enum {
    TILE_ROWS = 128,
    TILE_FEATURES = 128,
    CHUNK = 64, /* values of n_in */
    GROUP_THREADS = 4 * WARP,
    GROUP_ROWS = 64,
    GROUPS = TILE_ROWS / GROUP_ROWS,
    THREADS = (1 + GROUPS) * GROUP_THREADS, /* the first warpgroup loads */
    CLUSTER = 2,
    STAGES = 4,

    ROWS_BYTES = TILE_ROWS * CHUNK * 2,
    WEIGHT_BYTES = TILE_FEATURES * CHUNK * 2, /* of gate, and of up */
    STAGE_BYTES = ROWS_BYTES + 2 * WEIGHT_BYTES,
    ATOM = 1024, /* what tiles are aligned to */
    SHARED_BYTES = ATOM + STAGES * (STAGE_BYTES + 2 * (int)sizeof(bulk_barrier)),

    /* Registers a thread: the loading warpgroup gives its own to those that hold sums. */
    LOADER_REGISTERS = 40,
    WORKER_REGISTERS = 232,
    SUMS = GROUP_ROWS * 2 * TILE_FEATURES / GROUP_THREADS, /* f32 a thread */
};

struct glu_call {
    bf16 *out;
    int64_t out_stride;
    int n_features, n_chunks;
    const int32_t *n_rows;
};

struct pipeline {
    bulk_barrier *full, *empty; /* [STAGES] */
    unsigned char *stages;
};

/* Where a thread is in the ring of stages. */
struct place {
    int stage;
    uint32_t phase;
};

static __device__ __forceinline__ void advance(struct place *p)
{
    if (++p->stage == STAGES) {
        p->stage = 0;
        p->phase ^= 1;
    }
}

/* ---- which tiles ---- */

struct tiles {
    int n_pairs, n, step; /* pairs of row tiles; tiles of a cluster; clusters */
};

static __device__ __forceinline__ struct tiles tiles_of(const struct glu_call &c)
{
    const int n_pairs = (*c.n_rows + CLUSTER * TILE_ROWS - 1) / (CLUSTER * TILE_ROWS);
    return {n_pairs, n_pairs * (c.n_features / TILE_FEATURES), (int)gridDim.x / CLUSTER};
}

static __device__ __forceinline__ int first_tile(void)
{
    return (int)blockIdx.x / CLUSTER;
}

/* ---- loading: one thread ---- */

static __device__ void load_tiles(const struct tensor_map *rows, const struct tensor_map *weights,
                                  const struct glu_call &c, const struct pipeline &p)
{
    const int rank = cluster_rank();
    const struct tiles all = tiles_of(c);
    struct place at = {0, 1}; /* the stages are empty to begin with */
    for (int tile = first_tile(); tile < all.n; tile += all.step) {
        const int row = (tile % all.n_pairs * CLUSTER + rank) * TILE_ROWS;
        const int feature = tile / all.n_pairs * TILE_FEATURES + rank * c.n_features;
        for (int chunk = 0; chunk < c.n_chunks; chunk++, advance(&at)) {
            unsigned char *const to = p.stages + at.stage * STAGE_BYTES;
            mbarrier_wait(p.empty + at.stage, at.phase);
            mbarrier_expect(p.full + at.stage, STAGE_BYTES);
            tensor_copy_2d(to, rows, chunk * CHUNK, row, p.full + at.stage);
            tensor_send_5d(to + ROWS_BYTES + rank * WEIGHT_BYTES, weights, chunk * CHUNK,
                           feature / 32, p.full + at.stage, (1 << CLUSTER) - 1);
        }
    }
}

/* ---- multiplying: a warpgroup ---- */

static __device__ __forceinline__ void release(const struct pipeline &p, int stage)
{
    if (threadIdx.x % GROUP_THREADS < CLUSTER)
        mbarrier_arrive(p.empty + stage, (int)threadIdx.x % GROUP_THREADS);
}

/* sum = the group's rows times the tile's weights. */
static __device__ __forceinline__ void multiply(float (&sum)[SUMS], const struct pipeline &p,
                                                int group, int n_chunks, struct place *at)
{
    int last = 0;
    for (int chunk = 0; chunk < n_chunks; chunk++, advance(at)) {
        mbarrier_wait(p.full + at->stage, at->phase);
        const bf16 *const stage =
            reinterpret_cast<const bf16 *>(p.stages + at->stage * STAGE_BYTES);
        const bf16 *const a = stage + group * GROUP_ROWS * CHUNK, *const b = stage + ROWS_BYTES / 2;
        wgmma_begin();
#pragma unroll
        for (int k = 0; k < CHUNK; k += 16)
            wgmma_bf16<2 * TILE_FEATURES>(sum, a, b, k, chunk > 0 || k > 0);
        wgmma_commit();
        if (chunk > 0) {
            wgmma_wait<1>();
            release(p, last);
        }
        last = at->stage;
    }
    wgmma_finish(sum);
    release(p, last);
}

/* Silu is x sigmoid(x), gelu's tanh form x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)). */
template <enum activation ACT> static __device__ __forceinline__ float sigmoid_of(float x)
{
    const float factor = 2 * 0.7978845608f;
    return ACT == ACTIVATION_SILU ? x : x * fmaf(factor * 0.044715f * x, x, factor);
}

/* As quick_activate, for throughput: the two share a reciprocal, so that neither may be infinite,
 * and 2^60 is as good as infinity. */
template <enum activation ACT> static __device__ __forceinline__ float2 activate(float x, float y)
{
    const float a = 1 + quick_exp2(fminf(-1.44269504f * sigmoid_of<ACT>(x), 60));
    const float b = 1 + quick_exp2(fminf(-1.44269504f * sigmoid_of<ACT>(y), 60));
    const float r = quick_reciprocal(a * b);
    return make_float2(x * (b * r), y * (a * r));
}

/* Columns of a group of 32 are where a lane's values of 4 tiles follow each other: see weights_map.
 */
template <enum activation ACT>
static __device__ __forceinline__ void put(const struct glu_call &c, const float (&sum)[SUMS],
                                           int row, int feature, int n_rows)
{
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const int own = row + lane / 4 + 8 * j;
        bf16 *const out = c.out + own * c.out_stride + feature + lane % 4 * 8;
#pragma unroll
        for (int i = 0; i < TILE_FEATURES / 32; i++) {
            uint32_t pairs[4];
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const float *const gate = sum + 4 * (4 * i + n) + 2 * j, *const up =
                                                                             gate + SUMS / 2;
                const float2 act = activate<ACT>(gate[0], gate[1]);
                pairs[n] = bf16_pair(act.x * up[0], act.y * up[1]);
            }
            if (own < n_rows)
                *reinterpret_cast<uint4 *>(out + 32 * i) =
                    make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        }
    }
}

template <enum activation ACT>
static __device__ __forceinline__ void multiply_tiles(const struct glu_call &c,
                                                      const struct pipeline &p, int group)
{
    const struct tiles all = tiles_of(c);
    const int n_rows = *c.n_rows, warp = threadIdx.x % GROUP_THREADS / WARP;
    struct place at = {0, 0};
    for (int tile = first_tile(); tile < all.n; tile += all.step) {
        const int pair = tile % all.n_pairs, feature = tile / all.n_pairs * TILE_FEATURES;
        const int row = (pair * CLUSTER + cluster_rank()) * TILE_ROWS + group * GROUP_ROWS;
        float sum[SUMS];
        multiply(sum, p, group, c.n_chunks, &at);
        put<ACT>(c, sum, row + 16 * warp, feature, n_rows);
    }
}

template <enum activation ACT>
static __global__ void __launch_bounds__(THREADS, 1)
    glu_kernel(const __grid_constant__ struct tensor_map rows,
               const __grid_constant__ struct tensor_map weights,
               const __grid_constant__ struct glu_call c)
{
    DYNAMIC_SHARED(unsigned char, unaligned);
    struct pipeline p;
    p.stages = unaligned + (ATOM - (uintptr_t)unaligned % ATOM) % ATOM;
    p.full = reinterpret_cast<bulk_barrier *>(p.stages + STAGES * STAGE_BYTES);
    p.empty = p.full + STAGES;
    pdl_trigger();
    if (threadIdx.x < STAGES) {
        mbarrier_begin(p.full + threadIdx.x, 1);
        mbarrier_begin(p.empty + threadIdx.x, CLUSTER * GROUPS);
    }
    cluster_sync();
    pdl_wait();
    const int group = (int)threadIdx.x / GROUP_THREADS - 1;
    if (group < 0) {
        registers_give<LOADER_REGISTERS>();
        if (threadIdx.x == 0)
            load_tiles(&rows, &weights, c, p);
        __syncwarp(); /* the cluster's barrier is the warp's */
    } else {
        registers_take<WORKER_REGISTERS>();
        multiply_tiles<ACT>(c, p, group);
    }
    cluster_sync(); /* what the other block sends has come */
}

/* ---- launching ---- */

static int n_clusters_of(const struct cuda *c)
{
    return c->queue.n_sms < CLUSTER ? 1 : c->queue.n_sms / CLUSTER;
}

bool glu_possible(const struct cuda *c, const struct product *p)
{
    return c->queue.capability == 90 && p->output == OUTPUT_ACTIVATE && p->w.dtype == DTYPE_BF16 &&
           !p->w.bias && p->act != ACTIVATION_GELU && !p->in_rows && !p->norm.weight &&
           p->w.n_out % (2 * TILE_FEATURES) == 0 && p->w.n_in % CHUNK == 0 &&
           p->in_stride % 8 == 0 && p->out_stride % 8 == 0 &&
           has_warpgroups((const void *)glu_kernel<ACTIVATION_SILU>) &&
           cluster_fits((const void *)glu_kernel<ACTIVATION_SILU>, CLUSTER, THREADS, SHARED_BYTES);
}

bool glu_pays(const struct cuda *c, const struct product *p)
{
    enum { TENTHS = 6 }; /* of the rounds' tiles */
    const int64_t n_features = p->w.n_out / 2;
    const int pair = CLUSTER * TILE_ROWS;
    const int64_t n_tiles = ceil_div(p->rows, pair) * (n_features / TILE_FEATURES);
    const int64_t n_clusters = n_clusters_of(c), rounds = (n_tiles + n_clusters - 1) / n_clusters;
    return 10 * p->rows * n_features > TENTHS * rounds * n_clusters * pair * TILE_FEATURES;
}

bool glu_product(struct cuda *c, const struct product *p)
{
    struct glu_call call = {};
    struct tensor_map rows, weights;
    call.out = (bf16 *)p->out;
    call.out_stride = p->out_stride;
    call.n_features = p->w.n_out / 2;
    call.n_chunks = p->w.n_in / CHUNK;
    call.n_rows = p->n_rows;
    const uint64_t row = (uint64_t)p->w.n_in * sizeof(bf16);
    /* Of 32 weight rows 8 t + 2 n + i becomes column 8 n + 2 t + i of the product, where lane t has
     * it in its tile n: so its 8 results follow each other. */
    const bool mapped =
        tensor_map_encode(&rows, p->in, {(uint64_t)p->w.n_in, (uint64_t)p->rows},
                          {(uint64_t)p->in_stride * sizeof(bf16)}, {CHUNK, TILE_ROWS}) &&
        tensor_map_encode(&weights, p->w.data,
                          {(uint64_t)p->w.n_in, 2, 4, 4, (uint64_t)p->w.n_out / 32},
                          {row, 8 * row, 2 * row, 32 * row}, {CHUNK, 2, 4, 4, TILE_FEATURES / 32});
    if (!mapped)
        return false;
    launch_cluster(&c->queue, "glu",
                   p->act == ACTIVATION_SILU ? glu_kernel<ACTIVATION_SILU>
                                             : glu_kernel<ACTIVATION_GELU_TANH>,
                   dim3((unsigned)(n_clusters_of(c) * CLUSTER)), CLUSTER, THREADS, SHARED_BYTES,
                   rows, weights, call);
    return true;
}
