/* warpgroup_head.cu - the logits of up to 128 rows by warpgroups, see warpgroup.cuh.
 *
 * A block for each SM, whose workers hold all rows from its beginning to its end, as packed.cuh
 * has them in registers, but for a chunk that these have no room for: so what L2 gives an SM is
 * the weights' from then on. They come in tiles of 64 columns by tensor maps, in chunks of 64
 * values of n_in, as far ahead as there is room, the first ones before pdl_wait. Of more than 64
 * rows each of the two working warpgroups has a half, of fewer each has half of a tile's columns.
 *
 * Bytes: the weights once, rows once for each SM (196 KB of 128 rows, from L2), and the logits.
 */
#include "engine/kernels/cuda/warpgroup.cuh"

enum {
    CHUNK = 64, /* values of n_in */
    CHUNKS = WARPGROUP_DEPTH / CHUNK,
    STEPS = CHUNK / PACKED_COLUMNS,
    TILE = 64,           /* columns */
    STAGES = 2 * CHUNKS, /* of weights in shared memory */
    CHUNK_BYTES = TILE * CHUNK * 2,
    GROUPS = 2,
    GROUP_THREADS = 4 * WARP,
    THREADS = (1 + GROUPS) * GROUP_THREADS, /* the first warpgroup loads */
    LANES = 4,                              /* that have values of the same row */
    ATOM = 1024,                            /* what chunks are aligned to */

    /* Registers a thread, as in glu.cu: rows take 176 of a worker's. */
    LOADER_REGISTERS = 24,
    WORKER_REGISTERS = 240,
};

/* HALVES: of the rows, one or two of 64. */
template <int HALVES> struct head_shape {
    static constexpr int columns = TILE / (GROUPS / HALVES); /* of a warpgroup */
    static constexpr int tiles = columns / 8;
    static constexpr int shared_chunks = HALVES - 1;              /* of rows, the last ones */
    static constexpr int held = (CHUNKS - shared_chunks) * STEPS; /* steps in registers */
    /* Byte offsets into shared memory, beside ATOM bytes to begin at a multiple of it. */
    static constexpr int row_bytes = shared_chunks * PACKED_ROWS * CHUNK * 2; /* of a warpgroup */
    static constexpr int rows = STAGES * CHUNK_BYTES, barriers = rows + GROUPS * row_bytes;
    static constexpr int bytes = barriers + (2 * STAGES + 1) * (int)sizeof(bulk_barrier) + ATOM;
    static_assert(bytes <= 227 * 1024, "room");
};

struct head_call {
    struct packed_rows in;
    const int32_t *in_rows; /* row r is row in_rows[r] of `in`; NULL: r */
    int rows;               /* of the bucket: that in_rows may be asked for */
    const int32_t *n_rows;
    float *out;
    int64_t out_stride;
    int n_out;
};

struct pipeline {
    unsigned char *stages;
    bulk_barrier *full, *empty; /* a chunk is there; both groups have multiplied it */
    bulk_barrier *rows;         /* the workers have theirs */
};

/* ---- loading: one thread ---- */

static __device__ __forceinline__ void
load_tiles(const struct tensor_map &weights, const struct head_call &c, const struct pipeline &p)
{
    const l2_policy once = l2_keep(false); /* L2 is the logits' */
    int stage = 0;
    uint32_t phase = 1; /* the stages are empty to begin with */
    for (int tile = blockIdx.x; tile * TILE < c.n_out; tile += (int)gridDim.x) {
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            mbarrier_wait(p.empty + stage, phase);
            mbarrier_expect(p.full + stage, CHUNK_BYTES);
            tensor_copy_2d(p.stages + stage * CHUNK_BYTES, &weights, chunk * CHUNK, tile * TILE,
                           p.full + stage, once);
            if (++stage == STAGES) {
                stage = 0;
                phase ^= 1;
            }
        }
    }
}

/* ---- rows ---- */

/* A lane's part of the warpgroup's rows. */
template <class S> struct head_rows {
    uint4 step[S::held];
};

/* Where the lane's two rows begin: the first's, and the second's unless the two are packed as a
 * product wants them. */
struct row_source {
    const bf16 *first, *second;
};

/* The packed row of a row of the logits; of one from n_rows on, anybody's. */
static __device__ __forceinline__ int source_of(const struct head_call &c, int row, int n_rows)
{
    const int from = c.in_rows && row < c.rows ? c.in_rows[row] : row;
    return row < n_rows ? from : row;
}

/* All lanes of a warp. row: the lane's first, of which the warp has 16; from: what the two are. */
static __device__ __forceinline__ struct row_source find_source(const struct head_call &c, int row,
                                                                const int (&from)[2])
{
    constexpr int n = WARPGROUP_DEPTH;
    const int pair = threadIdx.x % LANES * 2;
    const bool own = __all_sync(0xffffffffu, from[0] == row && from[1] == row + 8);
    return {c.in.values + packed_at(from[0], pair, n),
            own ? nullptr : c.in.values + packed_at(from[1], pair, n)};
}

static __device__ __forceinline__ uint32_t load_pair(const bf16 *p)
{
    return __ldcg(reinterpret_cast<const uint32_t *>(p));
}

/* N steps from `first` on. */
template <int N>
static __device__ __forceinline__ void hold_steps(uint4 (&step)[N], const struct row_source &from,
                                                  int first)
{
    const int64_t at = first * PACKED_STEP;
    if (!from.second) {
#pragma unroll
        for (int k = 0; k < N; k++)
            step[k] = load_once(from.first + at + k * PACKED_STEP);
        return;
    }
#pragma unroll
    for (int k = 0; k < N; k++) {
        const bf16 *const x = from.first + at + k * PACKED_STEP;
        const bf16 *const y = from.second + at + k * PACKED_STEP;
        step[k] = make_uint4(load_pair(x), load_pair(y), load_pair(x + PACKED_LANE / 2),
                             load_pair(y + PACKED_LANE / 2));
    }
}

/* A chunk of the warpgroup's rows to where the tensor cores look for them. */
static __device__ __forceinline__ void put_chunk(unsigned char *chunk, const uint4 (&step)[STEPS])
{
    const int lane = threadIdx.x % WARP;
    const int row = threadIdx.x % GROUP_THREADS / WARP * 16 + lane / LANES;
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
        const uint32_t pair[4] = {step[k].x, step[k].y, step[k].z, step[k].w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int own = row + i % 2 * 8, piece = 2 * k + i / 2;
            *reinterpret_cast<uint32_t *>(chunk + own * CHUNK * 2 + (piece ^ own % 8) * 16 +
                                          lane % LANES * 4) = pair[i];
        }
    }
}

/* ---- multiplying: a warpgroup ---- */

static __device__ __forceinline__ void release(const struct pipeline &p, int stage)
{
    if (threadIdx.x % GROUP_THREADS == 0)
        mbarrier_arrive(p.empty + stage, 0);
}

/* sum = the warpgroup's rows, of which a chunk may be in shared memory, times its columns of the
 * tile that is in the stages from `first` on. */
template <class S>
static __device__ __forceinline__ void
multiply(float (&sum)[4 * S::tiles], const struct head_rows<S> &rows,
         const unsigned char *shared_rows, const struct pipeline &p, int first, uint32_t phase,
         int own_column)
{
#pragma unroll
    for (int n = 0; n < 4 * S::tiles; n++)
        sum[n] = 0;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        const bf16 *const b =
            reinterpret_cast<const bf16 *>(p.stages + (first + chunk) * CHUNK_BYTES) +
            own_column * CHUNK;
        mbarrier_wait(p.full + first + chunk, phase);
        wgmma_begin();
        if (chunk * STEPS < S::held) {
#pragma unroll
            for (int k = 0; k < STEPS; k++)
                wgmma_rows<S::columns>(sum, rows.step[(chunk * STEPS + k) % S::held], b,
                                       k * PACKED_COLUMNS);
        } else if constexpr (S::shared_chunks > 0) {
#pragma unroll
            for (int k = 0; k < STEPS; k++)
                wgmma_bf16<S::columns>(sum, reinterpret_cast<const bf16 *>(shared_rows), b,
                                       k * PACKED_COLUMNS);
        }
        wgmma_commit();
        if (chunk > 0) {
            wgmma_wait<1>();
            release(p, first + chunk - 1);
        }
    }
    wgmma_finish(sum);
    release(p, first + CHUNKS - 1);
}

/* The lane's two rows from `row` on, from `column` on. */
template <class S>
static __device__ __forceinline__ void put(const struct head_call &c,
                                           const float (&sum)[4 * S::tiles],
                                           const float (&scale)[2], int row, int column, int n_rows)
{
#pragma unroll
    for (int j = 0; j < 2; j++) {
        float *const out = c.out + (row + 8 * j) * c.out_stride + column;
        if (row + 8 * j >= n_rows)
            continue;
#pragma unroll
        for (int n = 0; n < S::tiles; n++)
            if (column + 8 * n < c.n_out)
                *reinterpret_cast<float2 *>(out + 8 * n) =
                    make_float2(sum[4 * n + 2 * j] * scale[j], sum[4 * n + 2 * j + 1] * scale[j]);
    }
}

template <int HALVES>
static __device__ __forceinline__ void multiply_tiles(const struct head_call &c,
                                                      const struct pipeline &p, int group)
{
    typedef head_shape<HALVES> S;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % 4, n_rows = *c.n_rows;
    const int row = (HALVES == GROUPS ? group * PACKED_ROWS : 0) + 16 * warp + lane / LANES;
    const int own_column = HALVES == GROUPS ? 0 : group * S::columns;
    const int from[2] = {source_of(c, row, n_rows), source_of(c, row + 8, n_rows)};
    const struct row_source source = find_source(c, row, from);
    unsigned char *const shared_rows = p.stages + S::rows + group * S::row_bytes;

    pdl_wait();
    struct head_rows<S> rows;
    hold_steps(rows.step, source, 0);
    if (S::shared_chunks > 0) {
        uint4 step[STEPS];
        hold_steps(step, source, S::held);
        put_chunk(shared_rows, step);
        shared_for_products();
    }
    mbarrier_arrive(p.rows, 0);
    float scale[2];
    struct packed_squares<LANES> squares[2];
#pragma unroll
    for (int j = 0; j < 2; j++)
        hold_squares(&squares[j], c.in, from[j], row + 8 * j < n_rows);
#pragma unroll
    for (int j = 0; j < 2; j++)
        scale[j] = scale_of_squares(squares[j], c.in);
    mbarrier_wait(p.rows, 0);
    int stage = 0;
    uint32_t phase = 0;
    for (int tile = blockIdx.x; tile * TILE < c.n_out; tile += (int)gridDim.x) {
        float sum[4 * S::tiles];
        multiply<S>(sum, rows, shared_rows, p, stage, phase, own_column);
        put<S>(c, sum, scale, row, tile * TILE + own_column + lane % LANES * 2, n_rows);
        phase ^= stage > 0;
        stage = CHUNKS - stage;
    }
}

template <int HALVES>
static __global__ void __launch_bounds__(THREADS, 1)
    head_kernel(const __grid_constant__ struct tensor_map weights,
                const __grid_constant__ struct head_call c)
{
    typedef head_shape<HALVES> S;
    DYNAMIC_SHARED(unsigned char, unaligned);
    struct pipeline p;
    p.stages = unaligned + (ATOM - (uintptr_t)unaligned % ATOM) % ATOM;
    p.full = reinterpret_cast<bulk_barrier *>(p.stages + S::barriers);
    p.empty = p.full + STAGES;
    p.rows = p.empty + STAGES;
    pdl_trigger();
    if (threadIdx.x < STAGES) {
        mbarrier_begin(p.full + threadIdx.x, 1);
        mbarrier_begin(p.empty + threadIdx.x, GROUPS);
        if (threadIdx.x == 0)
            mbarrier_begin(p.rows, GROUPS * GROUP_THREADS);
    }
    __syncthreads();
    const int group = (int)threadIdx.x / GROUP_THREADS - 1;
    if (group < 0) {
        registers_give<LOADER_REGISTERS>();
        if (threadIdx.x == 0)
            load_tiles(weights, c, p);
        pdl_wait();
    } else {
        registers_take<WORKER_REGISTERS>();
        multiply_tiles<HALVES>(c, p, group);
    }
}

/* ---- launching ---- */

template <int HALVES>
static bool run(struct cuda *c, const struct product *p, const struct head_call *call)
{
    typedef head_shape<HALVES> S;
    struct tensor_map weights;
    if (!has_warpgroups((const void *)head_kernel<HALVES>) ||
        !tensor_map_encode(&weights, p->w.data, {WARPGROUP_DEPTH, (uint64_t)p->w.n_out},
                           {WARPGROUP_DEPTH * sizeof(bf16)}, {CHUNK, TILE}))
        return false;
    /* Of one block: there are barriers, which are arrived at as a cluster's are. */
    launch_cluster(&c->queue, "warpgroup_head", head_kernel<HALVES>, dim3((unsigned)c->queue.n_sms),
                   1, THREADS, (size_t)S::bytes, weights, *call);
    return true;
}

bool warpgroup_head(struct cuda *c, const struct product *p, const struct packed_rows *in)
{
    struct head_call call = {};
    call.in = *in;
    call.in_rows = p->in_rows;
    call.rows = p->rows;
    call.n_rows = p->n_rows;
    call.out = (float *)p->out;
    call.out_stride = p->out_stride;
    call.n_out = p->w.n_out;
    if (c->queue.capability != 90 || p->rows > WARPGROUP_HEAD_ROWS || p->output != OUTPUT_F32 ||
        p->softcap > 0 || p->w.dtype != DTYPE_BF16 || p->w.bias || p->out_stride % 2 ||
        p->w.n_in != WARPGROUP_DEPTH || in->n != p->w.n_in || in->n_parts > PACKED_PARTS)
        return false;
    return p->rows > PACKED_ROWS ? run<2>(c, p, &call) : run<1>(c, p, &call);
}
