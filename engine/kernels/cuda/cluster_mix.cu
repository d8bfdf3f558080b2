/* cluster_mix.cu - the mixing of a decode layer of few rows, see cluster.cuh: from the rows that
 * the layer before has left to what each head's latents and window make of them.
 *
 * Cluster h serves head h; block b of it has 1/8 of the head's rows of q, k and v, 1/8 of all
 * channels of the RG-LRU and of the latents' logits' columns, and mixes rows b and b + 8 of the
 * step: their latents and windows, both at a time. Steps of up to 8 rows have a kernel of their
 * own, whose blocks mix one.
 *   v, q, k, rope; gates, RG-LRU; logits over the block's channels: to the rows' blocks
 *                                                                             1 row_came
 *   gates, latents P(eq 19), window P(eq 13-14): the head's output, packed for few_output
 * Up to FEW_ALONE rows it is exchanged instead, and each block has 1/8 of the rows of the output
 * projection:
 *                                                                             2 mixed_came
 *   output projection over the head's columns, to the head's shares
 * The receiver counts the bytes, all of a launch's, so that nobody waits for more than it needs,
 * and nobody ends while something is on its way to it. It takes time for every store, however
 * short: what is sent is sent 16 bytes at a time where they are aligned.
 *
 * Before pdl_wait: weights to shared memory (where the step's arrays are late, in the first layer,
 * these alone: they take longest); keys of the first row and of a single row the latents' sums to
 * registers; its values, and of two rows the second's keys and both rows' sums to shared memory.
 * The second row's values, in L2 by then, come to the place of weights that have been used. What is
 * loaded to registers between sending and receiving would be in the way of both.
 *
 * Bytes at D = 768: 4 MB of weights, 62 KB a row and head of state: floor 1.4 us at one row,
 * 4.0 us at 16.
 */
#include "engine/kernels/cuda/cluster_products.cuh"
#include "engine/kernels/cuda/cluster_rows.cuh"

/* ---- the kernel ---- */

/* The head's share of the output projection of the block's columns. */
template <class S, int D, int HEAD>
static __device__ __forceinline__ void project(const struct mix_call &c, int head, int rank,
                                               int n_rows, unsigned char *shared)
{
    constexpr int EACH = 2; /* tiles: one chain of instructions beside another */
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    if (warp >= S::TILES / EACH)
        return;
    float out[EACH][4] = {};
    few_product<EACH, HEAD>(out, few_shared_rows<S::STEP_ROWS>(at<bf16>(shared, S::mixed), S::OUT),
                            at<bf16>(shared, S::o) + 8 * EACH * warp * S::OUT, S::OUT,
                            8 * EACH - 1);
    float *const to =
        c.m.shares + (head * FEW_ALONE + g) * D + rank * S::COLUMNS + 8 * EACH * warp + 2 * t;
#pragma unroll
    for (int n = 0; n < EACH; n++)
        if (g < n_rows)
            *reinterpret_cast<float2 *>(to + 8 * n) = make_float2(out[n][0], out[n][1]);
}

/* ROWS: that a block mixes; the step has up to ROWS * CLUSTER_BLOCKS, alone up to FEW_ALONE. */
template <class RING, int D, int HEAD, int WIDTH, int ROWS, bool ALONE>
static __global__ void __launch_bounds__(CLUSTER_THREADS, FEW_BLOCKS)
    cluster_mix_kernel(const __grid_constant__ struct mix_call c)
{
    typedef mix_shape<RING, D, HEAD, WIDTH, ROWS, ALONE> S;
    static_assert(S::TURNS == 2 && S::TILES % 2 == 0, "two tiles a warp");
    DYNAMIC_SHARED(unsigned char, shared);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    const int head = blockIdx.x / CLUSTER_BLOCKS, rank = cluster_rank();
    const bool has_second = warp + CLUSTER_WARPS < S::TILES; /* tile of channels */
    fetch_weights<S, D, HEAD>(c, head, rank, shared);
    if (c.step.late)
        pdl_wait();
    const int n_rows = c.step.sizes->n_rows;
    struct mix_row rows[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        rows[r] = find_row(c, head, rank + r * CLUSTER_BLOCKS);
    begin_exchanges<S, HEAD>(c, rank, n_rows, shared);
    cluster_arrive_relaxed(); /* when all blocks have: their shared memory may be written */
    struct held_channels<S> channels[2];
    hold_channels(&channels[0], c, rank * S::TILES + warp);
    hold_channels(&channels[1], c, rank * S::TILES + (has_second ? CLUSTER_WARPS : 0) + warp);
    struct held_rows<S> held;
    hold_key<S, HEAD>(&held, c, rows[0]);
    begin_values<S, HEAD>(rows, shared);
    copy_values<S, HEAD>(c, rows[0], 0, shared);
    clear_values<S, HEAD>(rows[0], 0, shared);
    if (ROWS == 1) {
        hold_sums<S, HEAD>(held.s[0], c, rows[0]);
    } else {
        copy_past<S, HEAD>(c, rows, shared);
        prefetch_values<S, HEAD>(c, rows[ROWS - 1]); /* later, there is too little room */
    }
    keep_places<S>(rows, shared);
    hold_gates<S>(&held, c, rows);
    put_angles<S>(c, rank, shared);
    cluster_wait();

    pdl_wait();
    struct few_rows<S::QKV_K> own;
    struct few_scale<D> scale;
    const int scaled = threadIdx.x / 16;
    own.hold(c.m.in.values, warp * S::QKV_K);
    scale.begin(c.m.in.squares, scaled, scaled < n_rows);
    copy_gate_rows<S, WIDTH>(c, rank, shared);

    bulk_wait(at<bulk_barrier>(shared, S::fetched));
    pdl_trigger(); /* not before: the next kernel's weights would come between these */
    float sum[S::QKV_TILES][4] = {};
    few_product<S::QKV_TILES, S::QKV_K>(sum, own, at<bf16>(shared, S::qkv) + warp * S::QKV_K,
                                        S::ROW, S::QKV - 1);
    __syncwarp(); /* sums may lie over weights */
#pragma unroll
    for (int n = 0; n < S::QKV_TILES; n++) {
        float *const to =
            at<float>(shared, S::sums) + warp * S::sums_warp + g * S::sums_row + 8 * n + 2 * t;
#pragma unroll
        for (int j = 0; j < ROWS; j++)
            *reinterpret_cast<float2 *>(to + j * 8 * S::sums_row) =
                make_float2(sum[n][2 * j], sum[n][2 * j + 1]);
    }
    const float factor = few_scale<D>::end(scale.sum(), c.m.in.eps);
    if (threadIdx.x % 16 == 0)
        at<float>(shared, S::scales)[scaled] = factor;
    copy_async_wait<0>();
    __syncthreads();
    if (has_second)
        step_channels<S, WIDTH, 2>(channels, rank, shared);
    else
        step_channels<S, WIDTH, 1>(channels, rank, shared);
    __syncthreads();
    take_places<S>(rows, shared);
    if (ROWS > 1) /* over weights of q, k and v */
        copy_values<S, HEAD>(c, rows[ROWS - 1], ROWS - 1, shared);
    send_logits<S>(c, rank, n_rows, shared);
    send_qkv<S, HEAD>(c, rank, n_rows, shared);
    if (ROWS > 1)
        clear_values<S, HEAD>(rows[ROWS - 1], ROWS - 1, shared);
    if (head == 0) {
        put_z(c, channels[0], rank * S::TILES + warp, n_rows);
        if (has_second)
            put_z(c, channels[1], rank * S::TILES + warp + CLUSTER_WARPS, n_rows);
    }

    if (rows[0].here) {
        cluster_receive(at<bulk_barrier>(shared, S::row_came));
        mix_rows<S, D, HEAD>(c, rows, &held, shared);
    }
    if (ALONE) {
        cluster_receive(at<bulk_barrier>(shared, S::mixed_came));
        project<S, D, HEAD>(c, head, rank, n_rows, shared);
    }
}

/* ---- launching ---- */

bool cluster_has(const struct cluster_shape *s)
{
    return s->dim == 768 && s->n_heads == MIX_CLUSTERS && s->head_dim == 96 && s->mlp == 3072 &&
           s->rglru_blocks == 8;
}

template <class RING, int ROWS, bool ALONE> static bool mix_fits(void)
{
    return cluster_fits((const void *)cluster_mix_kernel<RING, 768, 96, 96, ROWS, ALONE>,
                        CLUSTER_BLOCKS, CLUSTER_THREADS,
                        (size_t)mix_shape<RING, 768, 96, 96, ROWS, ALONE>::bytes);
}

template <class RING> static bool mixes_fit(void)
{
    return mix_fits<RING, 1, true>() && mix_fits<RING, 1, false>() && mix_fits<RING, 2, false>();
}

bool cluster_knows(const struct cuda *c, const struct cluster_shape *s)
{
    const int capability = c->queue.capability;
    return (capability == 90 || capability == 100 || capability == 103) && cluster_has(s) &&
           mixes_fit<bf16>() && mixes_fit<fp8>() && few_mlp_fits();
}

/* Lane (g, t) of a warp with channels 8 tile on: weights of row g, columns 16 k + 8 i + 2 t, + 1.
 */
template <int WIDTH>
static __global__ void __launch_bounds__(CLUSTER_THREADS)
    prepare_kernel(const __grid_constant__ struct cluster_gates g, uint4 *gates, float4 *constants)
{
    constexpr int STEPS = WIDTH / 16, QUADS = STEPS;
    pdl_trigger();
    pdl_wait();
    const int tile = blockIdx.x, lane = threadIdx.x % WARP, q = threadIdx.x / WARP;
    const int row = 8 * tile + lane / 4;
    if (q < QUADS) {
        uint32_t words[4];
#pragma unroll
        for (int w = 0; w < 4; w++) {
            const int at = 4 * q + w, step = at / 2 % STEPS, half = at % 2;
            const float *from = (at / 2 / STEPS ? g.input_gate : g.recurrence_gate) + row * WIDTH +
                                16 * step + 8 * half + lane % 4 * 2;
            const __nv_bfloat162 pair = __floats2bfloat162_rn(from[0], from[1]);
            memcpy(&words[w], &pair, 4);
        }
        gates[(tile * QUADS + q) * WARP + lane] =
            make_uint4(words[0], words[1], words[2], words[3]);
    }
    if (threadIdx.x < 8) {
        const int channel = 8 * tile + threadIdx.x;
        struct rglru_front f = {};
        f.recurrence_bias = g.recurrence_bias;
        f.input_bias = g.input_bias;
        f.lambda = g.lambda;
        const struct rglru_channel one = rglru_channel_of(f, channel);
        constants[channel] = make_float4(one.rate, one.r_bias, one.i_bias, g.norm_weight[channel]);
    }
}

size_t cluster_prepared_bytes(const struct cluster_shape *s)
{
    const size_t D = (size_t)s->dim;
    return 2 * D * (D / (size_t)s->rglru_blocks) * sizeof(bf16) + D * sizeof(float4);
}

void cluster_prepare(struct cuda *c, const struct cluster_shape *s, const struct cluster_gates *g,
                     void *prepared)
{
    float4 *const constants = (float4 *)prepared;
    CHECK(cluster_knows(c, s));
    launch(&c->queue, "cluster_prepare", prepare_kernel<96>, dim3((unsigned)s->dim / 8),
           CLUSTER_THREADS, 0, *g, (uint4 *)(constants + s->dim), constants);
}

template <class RING, int ROWS, bool ALONE>
static void run_mix(struct cuda *c, const struct mix_call *call)
{
    launch_beside(&c->queue, "cluster_mix", cluster_mix_kernel<RING, 768, 96, 96, ROWS, ALONE>,
                  dim3(MIX_CLUSTERS * CLUSTER_BLOCKS), CLUSTER_BLOCKS, CLUSTER_THREADS,
                  (size_t)mix_shape<RING, 768, 96, 96, ROWS, ALONE>::bytes, *call);
}

template <class RING> static void run_rows(struct cuda *c, const struct mix_call *call)
{
    if (c->step.rows <= FEW_ALONE)
        run_mix<RING, 1, true>(c, call);
    else if (c->step.rows <= CLUSTER_BLOCKS)
        run_mix<RING, 1, false>(c, call);
    else
        run_mix<RING, 2, false>(c, call);
}

void cluster_mix_launch(struct cuda *c, const struct cluster_shape *shape,
                        const struct cluster_mix *m)
{
    const struct mix_call call = {*m, c->step};
    CHECK(cluster_knows(c, shape) && m->n_latents <= CLUSTER_LATENTS &&
          m->ring_rows <= CLUSTER_RING_ROWS);
    if (m->ring_dtype == DTYPE_F8_E4M3)
        run_rows<fp8>(c, &call);
    else
        run_rows<bf16>(c, &call);
}
