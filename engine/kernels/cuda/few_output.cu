/* few_output.cu - the output projection of a decode layer of few rows, see cluster.cuh.
 *
 * A block has 16 rows of W_o, a warp of it a head's columns of them, in registers before pdl_wait;
 * the rows come to the place that the weights had in shared memory, each thread's for itself. The
 * warps' sums meet there and are added to x in the order of the heads.
 * Blocks wait while the mixing runs, on the same SMs as its blocks or few_mlp_in's, and leave room
 * for few_mlp_out's: that is why they have few registers and little shared memory.
 * Bytes: 1.2 MB of weights at D = 768, floor 0.4 us; 24 KB of rows for each block from L2.
 */
#include "engine/kernels/cuda/cluster.cuh"

enum { OUTPUT_COLUMNS = 16 };

struct output_call {
    struct few_output o;
    struct device_step step;
};

template <int D, int HEAD> struct output_shape {
    static constexpr int HEADS = D / HEAD, TILES = OUTPUT_COLUMNS / 8, ROW = D + 8;
    static constexpr int STEPS = HEAD / PACKED_COLUMNS, SUM = OUTPUT_COLUMNS + 8; /* spreads rows */
    static_assert(HEADS == CLUSTER_WARPS && HEADS == MIX_CLUSTERS && HEAD % 32 == 0,
                  "a head a warp");
    static_assert(CLUSTER_ROWS * OUTPUT_COLUMNS == (int)CLUSTER_THREADS, "a sum a thread");

    static constexpr int weights = 0; /* offsets, in bytes */
    /* When those are in registers, of each warp: its rows [STEPS, lanes] 16 bytes; when those have
     * been used, its sums [16, SUM]. */
    static constexpr int rows = weights, rows_bytes = STEPS * WARP * 16;
    static_assert(CLUSTER_ROWS * SUM * 4 <= rows_bytes, "place of the rows");
    static constexpr int fetched = weights + OUTPUT_COLUMNS * ROW * 2;
    static_assert(HEADS * rows_bytes <= fetched, "place of the weights");
    static constexpr int bytes = fetched + sizeof(bulk_barrier);
    static_assert(bytes <= FEW_OUTPUT_SHARED, "beside the others");
};

template <int D, int HEAD>
static __global__ void __maxnreg__(FEW_OUTPUT_REGISTERS)
    few_output_kernel(const __grid_constant__ struct output_call c)
{
    typedef output_shape<D, HEAD> S;
    DYNAMIC_SHARED(unsigned char, shared);
    bf16 *const weights = reinterpret_cast<bf16 *>(shared + S::weights);
    bulk_barrier *const fetched = reinterpret_cast<bulk_barrier *>(shared + S::fetched);
    const int lane = threadIdx.x % WARP, head = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    const int row = threadIdx.x / OUTPUT_COLUMNS;
    const int column = OUTPUT_COLUMNS * blockIdx.x + threadIdx.x % OUTPUT_COLUMNS;
    pdl_trigger();
    if (head == 0) {
        bulk_begin(fetched, OUTPUT_COLUMNS * D * (int)sizeof(bf16));
        few_fetch<D>(weights, S::ROW, c.o.o + (int64_t)OUTPUT_COLUMNS * blockIdx.x * D, D,
                     OUTPUT_COLUMNS, fetched);
    }
    __syncthreads(); /* bulk_wait: the barrier has begun */
    bulk_wait(fetched);
    uint32_t w[S::STEPS / 2][S::TILES][4];
#pragma unroll
    for (int i = 0; i < S::STEPS / 2; i++) {
#pragma unroll
        for (int n = 0; n < S::TILES; n++)
            ldmatrix_x4(w[i][n], weights + (8 * n + lane % 8) * S::ROW + head * HEAD + 32 * i +
                                     lane / 8 * 8);
    }
    __syncthreads(); /* the rows come to the weights' place */

    pdl_wait();
    uint4 *const rows = reinterpret_cast<uint4 *>(shared + S::rows + head * S::rows_bytes) + lane;
    const bf16 *const from = c.o.mixed.values + head * HEAD * PACKED_ROWS + lane * (int)PACKED_LANE;
#pragma unroll
    for (int i = 0; i < S::STEPS; i++)
        copy_async_16(rows + i * WARP, from + i * PACKED_STEP);
    copy_async_commit();
    const bool mine = row < c.step.sizes->n_rows;
    const float x = mine ? __ldcg(c.o.to.x + (int64_t)row * D + column) : 0;
    const float weight = few_weight(c.o.to, column);
    copy_async_wait<0>(); /* this thread's are all that it reads */
    float sum[S::TILES][4] = {};
#pragma unroll
    for (int i = 0; i < S::STEPS; i++) {
        const uint4 one = rows[i * WARP];
        const uint32_t a[4] = {one.x, one.y, one.z, one.w};
#pragma unroll
        for (int n = 0; n < S::TILES; n++)
            mma_bf16(sum[n], a, w[i / 2][n] + i % 2 * 2);
    }
    __syncwarp(); /* the sums lie over the warp's rows */
    float *const to = reinterpret_cast<float *>(shared + S::rows + head * S::rows_bytes);
#pragma unroll
    for (int n = 0; n < S::TILES; n++)
        few_put(to + g * S::SUM + 8 * n + 2 * t, S::SUM, sum[n]);
    __syncthreads();
    float share[S::HEADS];
#pragma unroll
    for (int h = 0; h < S::HEADS; h++)
        share[h] = reinterpret_cast<const float *>(
            shared + S::rows + h * S::rows_bytes)[row * S::SUM + threadIdx.x % OUTPUT_COLUMNS];
    few_leave<D>(c.o.to, few_sum_heads(x, share), row, column, mine, weight);
}

void few_output_launch(struct cuda *c, const struct cluster_shape *shape,
                       const struct few_output *o)
{
    const struct output_call call = {*o, c->step};
    CHECK(cluster_knows(c, shape));
    launch_beside(&c->queue, "few_output", few_output_kernel<768, 96>, dim3(768 / OUTPUT_COLUMNS),
                  0, CLUSTER_THREADS, (size_t)output_shape<768, 96>::bytes, call);
}
