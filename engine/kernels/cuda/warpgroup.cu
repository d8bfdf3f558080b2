/* warpgroup.cu - products of up to 256 rows by warpgroups, and the RG-LRU beside those that a layer
 * begins with, see warpgroup.cuh.
 *
 * Each warpgroup has 64 rows and all of the block's columns. Its rows come straight to registers
 * (packed.cuh), STAGES chunks of 64 columns ahead of the tensor cores; shared memory holds the
 * block's weights alone, so that the next kernel's blocks find room for theirs beside it. n_in
 * above WARPGROUP_DEPTH is cut into slices, a block of a cluster each; every block adds up a share
 * of the columns, in the slices' order.
 */
#include "engine/kernels/cuda/warpgroup.cuh"
#include "engine/kernels/cuda/warpgroup_gates.cuh"

enum {
    GROUP_THREADS = 4 * WARP,
    GROUP_ROWS = 64,
    CHUNK = 64, /* columns of weights that lie together in shared memory */
    STEPS = CHUNK / PACKED_COLUMNS,
    ATOM = 1024,                        /* bytes: what the tensor cores' factors are aligned to */
    LANES = GROUP_THREADS / GROUP_ROWS, /* that add up a row's squares */
    PACK_THREADS = WARPGROUP_DEPTH / 4,
};

template <enum product_output OUTPUT, int COLUMNS, int GROUPS, int SLICES, int STAGES,
          int DEPTH = WARPGROUP_DEPTH>
struct group_shape {
    static constexpr enum product_output output = OUTPUT;
    static constexpr int columns = COLUMNS, groups = GROUPS, slices = SLICES;
    static constexpr int stages = STAGES; /* chunks of rows in registers */
    static constexpr int threads = GROUPS * GROUP_THREADS, rows = GROUPS * GROUP_ROWS;
    static constexpr int tiles = COLUMNS / 8, own = tiles / SLICES; /* of 8 columns */
    static constexpr int depth = DEPTH, in_depth = SLICES * DEPTH;  /* of a block; n_in */
    static constexpr int chunks = DEPTH / CHUNK;
    static constexpr bool pairs = OUTPUT == OUTPUT_ACTIVATE;
    /* Byte offsets; beside ATOM bytes to begin at a multiple of it. */
    static constexpr int weight_chunk = COLUMNS * CHUNK * 2;
    static constexpr int weights = 0;
    static constexpr int received = chunks * weight_chunk; /* [slices][own][threads] float4 */
    static constexpr int scales = received + (SLICES > 1 ? SLICES * own * threads * 16 : 0);
    static constexpr int came = scales + rows * 4; /* what counts the slices' sums */
    static constexpr int bytes = came + (int)sizeof(bulk_barrier) + ATOM;
    static_assert(tiles % SLICES == 0 && (!pairs || tiles % 2 == 0) && bytes <= 227 * 1024 &&
                      (SLICES == 1 || GROUPS == 1) && STAGES <= chunks && chunks % GROUPS == 0 &&
                      COLUMNS % (GROUP_THREADS / 8) == 0,
                  "shapes of blocks");
};

/* ---- a block ---- */

/* The block's place: its first column of the results' (of gate and up each), row and slice. */
struct group_place {
    int column, row, slice;
};

template <class S>
static __device__ __forceinline__ struct group_place find_place(int block, int rows)
{
    struct group_place at = {block * S::columns, rows * S::rows, 0};
    if (S::slices > 1) {
        at.slice = cluster_rank();
        at.column = block / S::slices * S::columns;
    }
    if (S::pairs)
        at.column /= 2;
    return at;
}

/* All threads: the block's weights, to where the tensor cores look for them. A thread has 16 bytes
 * of every 16th row, in every chunk of its warpgroup, so that few addresses are computed. */
template <class S>
static __device__ __forceinline__ void fetch_weights(const struct warpgroup_product &p,
                                                     const struct group_place &at,
                                                     unsigned char *shared)
{
    constexpr int AT_ONCE = GROUP_THREADS / 8; /* rows */
    const int thread = threadIdx.x % GROUP_THREADS, row0 = thread / 8, piece = thread % 8;
    const int group = threadIdx.x / GROUP_THREADS;
    bf16 *const to =
        reinterpret_cast<bf16 *>(shared + S::weights) + row0 * CHUNK + (piece ^ (row0 % 8)) * 8;
    const bf16 *from[S::columns / AT_ONCE];
#pragma unroll
    for (int k = 0; k < S::columns / AT_ONCE; k++) {
        const int row = row0 + AT_ONCE * k;
        int out = at.column + row;
        if (S::pairs && row >= S::columns / 2)
            out += p.n_out / 2 - S::columns / 2;
        out = out < p.n_out ? out : p.n_out - 1; /* a last block with columns to spare */
        from[k] = p.weights + (int64_t)out * S::in_depth +
                  (S::slices > 1 ? at.slice * S::depth : 0) + piece * 8;
    }
#pragma unroll
    for (int i = 0; i < S::chunks; i += S::groups) {
        const int chunk = i + group;
#pragma unroll
        for (int k = 0; k < S::columns / AT_ONCE; k++)
            copy_async_16(to + (chunk * S::columns + AT_ONCE * k) * CHUNK, from[k] + chunk * CHUNK);
    }
    copy_async_commit();
}

/* The lane's part of the warpgroup's rows, some chunks of it. */
template <class S> struct group_rows_held {
    uint4 piece[S::stages][STEPS];
};

/* Where the lane's part of the warpgroup's rows begins. */
template <class S>
static __device__ __forceinline__ const bf16 *lane_rows(const struct warpgroup_product &p,
                                                        const struct group_place &at)
{
    const int tile = at.row / PACKED_ROWS + threadIdx.x / GROUP_THREADS;
    const int64_t step =
        (int64_t)tile * (S::in_depth / PACKED_COLUMNS) + at.slice * S::chunks * STEPS;
    return p.in.values + step * PACKED_STEP + threadIdx.x % GROUP_THREADS * PACKED_LANE;
}

template <class S>
static __device__ __forceinline__ void take_rows(struct group_rows_held<S> *h, const bf16 *rows,
                                                 int chunk)
{
#pragma unroll
    for (int k = 0; k < STEPS; k++)
        h->piece[chunk % S::stages][k] = load_once(rows + (chunk * STEPS + k) * PACKED_STEP);
}

/* sum += the warpgroup's rows, of which the first chunks are on their way, times the block's
 * weights. */
template <class S>
static __device__ __forceinline__ void multiply(float (&sum)[4 * S::tiles],
                                                struct group_rows_held<S> *h, const bf16 *rows,
                                                const unsigned char *shared)
{
    const bf16 *const weights = reinterpret_cast<const bf16 *>(shared + S::weights);
#pragma unroll
    for (int chunk = 0; chunk < S::chunks; chunk++) {
        wgmma_begin();
#pragma unroll
        for (int k = 0; k < STEPS; k++)
            wgmma_rows<S::columns>(sum, h->piece[chunk % S::stages][k],
                                   weights + chunk * (S::weight_chunk / 2), k * PACKED_COLUMNS);
        wgmma_commit();
        if (chunk > 0 && chunk - 1 + S::stages < S::chunks) { /* in place of the one before */
            wgmma_wait<1>();
            take_rows<S>(h, rows, chunk - 1 + S::stages);
        }
    }
    wgmma_finish(sum);
}

/* ---- what follows ---- */

/* Rows g and g + 8 of the warp's 16, columns 2 t and 2 t + 1 of each tile. */
struct group_lane {
    int row[2], column;
    bool here[2];
    float scale[2];
};

template <class S>
static __device__ __forceinline__ void put_results(const struct warpgroup_product &p,
                                                   const float (&sum)[4 * S::tiles],
                                                   const struct group_lane &l)
{
#pragma unroll
    for (int j = 0; j < 2; j++) {
        if (!l.here[j])
            continue;
        const int64_t at = l.row[j] * p.out_stride + l.column;
#pragma unroll
        for (int n = 0; n < S::tiles; n++) {
            const float x = sum[4 * n + 2 * j] * l.scale[j],
                        y = sum[4 * n + 2 * j + 1] * l.scale[j];
            if (l.column + 8 * n >= p.n_out)
                break;
            *reinterpret_cast<__nv_bfloat162 *>((bf16 *)p.out + at + 8 * n) =
                __floats2bfloat162_rn(x, y);
        }
    }
}

template <class S>
static __device__ __forceinline__ void put_activated(const struct warpgroup_product &p,
                                                     const float (&sum)[4 * S::tiles],
                                                     const struct group_lane &l)
{
    if (!l.here[0])
        return;
#pragma unroll
    for (int n = 0; n < S::tiles / 2; n++) {
        float2 y[2];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const float *const gate = sum + 4 * n + 2 * j, *const up = gate + 2 * S::tiles;
            const float2 act =
                quick_activate(make_float2(gate[0] * l.scale[j], gate[1] * l.scale[j]), p.act);
            y[j] = make_float2(act.x * (up[0] * l.scale[j]), act.y * (up[1] * l.scale[j]));
        }
        packed_store_rows(p.next.values, p.next.n, l.row[0], l.column + 8 * n, y[0], y[1],
                          l.here[1]);
    }
}

/* What a lane adds to: N tiles' values of its rows, and the weights of the norm that follows. */
template <int N> struct held_sums {
    float2 x[2][N], weight[N];
};

template <int N>
static __device__ __forceinline__ void
hold_sums(struct held_sums<N> *h, const struct warpgroup_product &p, const struct group_lane &l)
{
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            h->x[j][n] = make_float2(0, 0);
            if (l.here[j])
                h->x[j][n] = __ldcg(reinterpret_cast<const float2 *>(
                    (const float *)p.out + l.row[j] * p.out_stride + l.column + 8 * n));
        }
    }
}

template <int N>
static __device__ __forceinline__ void put_sums(const struct warpgroup_product &p,
                                                struct held_sums<N> *h, const float *sum,
                                                const struct group_lane &l)
{
    static_assert(N % 2 == 0, "a part of the squares is of 16 columns");
#pragma unroll
    for (int j = 0; j < 2; j++) {
        float square[N / 2] = {};
#pragma unroll
        for (int n = 0; n < N; n++) {
            float2 *const x = &h->x[j][n];
            x->x += sum[4 * n + 2 * j], x->y += sum[4 * n + 2 * j + 1];
            square[n / 2] = fmaf(x->x, x->x, fmaf(x->y, x->y, square[n / 2]));
            if (l.here[j])
                *reinterpret_cast<float2 *>((float *)p.out + l.row[j] * p.out_stride + l.column +
                                            8 * n) = *x;
        }
#pragma unroll
        for (int n = 0; n < N / 2; n++) {
            square[n] += __shfl_xor_sync(0xffffffffu, square[n], 1);
            square[n] += __shfl_xor_sync(0xffffffffu, square[n], 2);
            if (p.next.values && l.here[j] && threadIdx.x % 4 == 0)
                p.next.squares[l.row[j] * p.next.n_parts + l.column / 16 + n] = square[n];
        }
    }
    if (!p.next.values || !l.here[0])
        return;
#pragma unroll
    for (int n = 0; n < N; n++) {
        const float2 w = h->weight[n], x = h->x[0][n], y = h->x[1][n];
        packed_store_rows(p.next.values, p.next.n, l.row[0], l.column + 8 * n,
                          make_float2(x.x * w.x, x.y * w.y), make_float2(y.x * w.x, y.y * w.y),
                          l.here[1]);
    }
}

/* The slices' sums of the block's share of the columns, in their order: to sum's beginning. */
template <class S>
static __device__ __forceinline__ void exchange(float (&sum)[4 * S::tiles], int slice,
                                                unsigned char *shared)
{
    float4 *const received = reinterpret_cast<float4 *>(shared + S::received) + threadIdx.x;
    bulk_barrier *const came = reinterpret_cast<bulk_barrier *>(shared + S::came);
#pragma unroll
    for (int s = 0; s < S::slices; s++) {
#pragma unroll
        for (int n = 0; n < S::own; n++) {
            const float *const from = sum + 4 * (s * S::own + n);
            cluster_send(received + (slice * S::own + n) * S::threads,
                         make_float4(from[0], from[1], from[2], from[3]), s, came);
        }
    }
    cluster_receive(came);
#pragma unroll
    for (int n = 0; n < S::own; n++) {
        float4 x = received[n * S::threads];
#pragma unroll
        for (int s = 1; s < S::slices; s++) {
            const float4 more = received[(s * S::own + n) * S::threads];
            x = make_float4(x.x + more.x, x.y + more.y, x.z + more.z, x.w + more.w);
        }
        sum[4 * n] = x.x, sum[4 * n + 1] = x.y, sum[4 * n + 2] = x.z, sum[4 * n + 3] = x.w;
    }
}

/* All threads of a block. late: the step's arrays are there only after pdl_wait, for the kernels
 * that come next, too. */
template <class S>
static __device__ __forceinline__ void product_block(const struct warpgroup_product &p,
                                                     const struct group_place &at,
                                                     unsigned char *shared, bool late)
{
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    float *const scales = reinterpret_cast<float *>(shared + S::scales);
    if (!late)
        pdl_trigger();
    if (S::slices > 1) {
        if (warp == 0)
            bulk_begin(reinterpret_cast<bulk_barrier *>(shared + S::came),
                       S::slices * S::own * S::threads * (int)sizeof(float4));
        cluster_arrive_relaxed();
    }
    fetch_weights<S>(p, at, shared);
    if (late) {
        pdl_wait();
        pdl_trigger();
    }
    const int n_rows = *p.n_rows;
    struct group_lane l;
    l.column = at.column + lane % 4 * 2 + (S::slices > 1 ? 8 * at.slice * S::own : 0);
#pragma unroll
    for (int j = 0; j < 2; j++) {
        l.row[j] = at.row + 16 * warp + lane / 4 + 8 * j;
        l.here[j] = l.row[j] < n_rows;
        l.scale[j] = 1;
    }
    constexpr int HELD = S::output == OUTPUT_ADD ? S::own : 1;
    struct held_sums<HELD> held;
    if (S::output == OUTPUT_ADD && p.next.values) {
#pragma unroll
        for (int n = 0; n < HELD; n++)
            held.weight[n] =
                __ldg(reinterpret_cast<const float2 *>(p.next_weight + l.column + 8 * n));
    }

    const bf16 *const rows = lane_rows<S>(p, at);
    if (S::slices > 1)
        cluster_wait(); /* the others have begun to count */

    pdl_wait();
    struct packed_squares<LANES> squares;
    const int scaled = (int)threadIdx.x / LANES; /* the row it helps to norm */
    if (S::output != OUTPUT_ADD)
        hold_squares(&squares, p.in, at.row + scaled, at.row + scaled < n_rows);
    struct group_rows_held<S> taken;
#pragma unroll
    for (int chunk = 0; chunk < S::stages; chunk++)
        take_rows<S>(&taken, rows, chunk);
    if (S::output == OUTPUT_ADD)
        hold_sums<HELD>(&held, p, l);
    copy_async_wait<0>();
    if (S::output != OUTPUT_ADD) {
        const float scale = scale_of_squares(squares, p.in);
        if (threadIdx.x % LANES == 0)
            scales[scaled] = scale;
    }
    shared_for_products();
    __syncthreads();
    float sum[4 * S::tiles] = {};
    multiply<S>(sum, &taken, rows, shared);
    if (S::output != OUTPUT_ADD) {
        l.scale[0] = scales[l.row[0] - at.row];
        l.scale[1] = scales[l.row[1] - at.row];
    }
    if (S::slices > 1)
        exchange<S>(sum, at.slice, shared);
    if constexpr (S::output == OUTPUT_ADD)
        put_sums<HELD>(p, &held, sum, l);
    else if constexpr (S::pairs)
        put_activated<S>(p, sum, l);
    else
        put_results<S>(p, sum, l);
}

static __device__ __forceinline__ unsigned char *aligned(unsigned char *shared)
{
    return shared + (ATOM - (uintptr_t)shared % ATOM) % ATOM;
}

template <class S>
static __global__ void __launch_bounds__(S::threads, 1)
    warpgroup_kernel(const __grid_constant__ struct warpgroup_product p)
{
    DYNAMIC_SHARED(unsigned char, shared);
    product_block<S>(p, find_place<S>((int)blockIdx.x, (int)blockIdx.y), aligned(shared), false);
}

struct front_call {
    struct warpgroup_front f;
    struct device_step step;
    int n_gates;    /* blocks of the RG-LRU's clusters, which are the first */
    int n_products; /* of v, q, k; what is left to fill a cluster has nothing to do */
    int wide;       /* of these, that have the same rows */
};

template <class S>
static __global__ void __launch_bounds__(S::threads, 1)
    front_kernel(const __grid_constant__ struct front_call c)
{
    DYNAMIC_SHARED(unsigned char, shared);
    const int block = (int)blockIdx.x - c.n_gates;
    if (block < 0)
        gates_block(c.f, c.step, (int)blockIdx.x / GATES_BLOCKS * GATES_ROWS, shared);
    else if (block < c.n_products)
        product_block<S>(c.f.vqk, find_place<S>(block % c.wide, block / c.wide), aligned(shared),
                         c.step.late);
    else
        pdl_wait();
}

/* ---- rows to begin with ---- */

/* A block a row, 4 values a thread. */
static __global__ void __launch_bounds__(PACK_THREADS)
    pack_kernel(const __grid_constant__ struct packed_rows out, const float *x, const float *weight,
                const int32_t *n_rows)
{
    pdl_trigger();
    const int row = blockIdx.x, column = 4 * threadIdx.x;
    const float4 w = __ldg(reinterpret_cast<const float4 *>(weight + column));
    pdl_wait();
    if (row < *n_rows) /* which may be late */
        packed_leave(out, row, column,
                     *reinterpret_cast<const float4 *>(x + (int64_t)row * out.n + column), w);
}

/* ---- launching ---- */

/* What was fastest, with how many chunks in registers (NOTES.md). Blocks of 128 rows and 24
 * features where there are so many rows; else of 64. Registers are what keeps the next kernel's
 * blocks away: mlp in and mlp out of 128 rows are made to fit beside each other. */
typedef group_shape<OUTPUT_BF16, 96, 1, 1, 8> group_rows; /* of the front */
typedef group_shape<OUTPUT_ADD, 16, 1, 1, 10> group_add;
typedef group_shape<OUTPUT_ADD, 64, 1, 4, 6> group_add_slices;
typedef group_shape<OUTPUT_ADD, 128, 1, 8, 6, WARPGROUP_DEPTH / 2>
    group_add_few; /* up to 64 rows */
typedef group_shape<OUTPUT_ACTIVATE, 48, 1, 1, 10> group_activate;
typedef group_shape<OUTPUT_ACTIVATE, 48, 2, 1, 8> group_activate_wide;

template <class S>
static void run(struct cuda *c, const char *name, const struct warpgroup_product *p)
{
    const dim3 grid((unsigned)(ceil_div(p->n_out, S::columns) * S::slices),
                    (unsigned)ceil_div(p->rows, S::rows));
    if (S::slices > 1)
        launch_cluster(&c->queue, name, warpgroup_kernel<S>, grid, S::slices, S::threads,
                       (size_t)S::bytes, *p);
    else
        launch(&c->queue, name, warpgroup_kernel<S>, grid, S::threads, (size_t)S::bytes, *p);
}

/* Of shared memory, as both of the front's kinds of blocks need. */
static int front_bytes(void)
{
    return group_rows::bytes > gates_places::bytes ? group_rows::bytes : gates_places::bytes;
}

bool warpgroups_are_there(const struct cuda *c)
{
    typedef group_add_slices S;
    typedef group_add_few F;
    return c->queue.capability == 90 && has_warpgroups((const void *)warpgroup_kernel<S>) &&
           cluster_fits((const void *)warpgroup_kernel<S>, S::slices, S::threads,
                        (size_t)S::bytes) &&
           cluster_fits((const void *)warpgroup_kernel<F>, F::slices, F::threads,
                        (size_t)F::bytes) &&
           cluster_fits((const void *)front_kernel<group_rows>, GATES_BLOCKS, group_rows::threads,
                        (size_t)front_bytes());
}

bool warpgroup_has(enum product_output output, int n_out, int n_in)
{
    switch (output) {
    case OUTPUT_ADD:
        return n_out == WARPGROUP_DEPTH && (n_in == n_out || n_in == group_add_slices::in_depth);
    case OUTPUT_ACTIVATE:
        return n_in == WARPGROUP_DEPTH && n_out % group_activate::columns == 0;
    case OUTPUT_BF16:
        return n_in == WARPGROUP_DEPTH && n_out % 8 == 0;
    default:
        return false;
    }
}

bool warpgroup_has_logits(int n_logits, int n_in)
{
    return n_in == WARPGROUP_DEPTH && n_logits % 8 == 0 && n_logits <= WARPGROUP_LOGITS;
}

void warpgroup_product(struct cuda *c, const struct warpgroup_product *p)
{
    CHECK(p->output != OUTPUT_BF16 && warpgroup_has(p->output, p->n_out, p->in.n) &&
          (p->output == OUTPUT_ADD) == !p->in.squares);
    if (p->output == OUTPUT_ADD && p->in.n > WARPGROUP_DEPTH && p->rows <= GROUP_ROWS)
        run<group_add_few>(c, "warpgroup_add", p);
    else if (p->output == OUTPUT_ADD && p->in.n > WARPGROUP_DEPTH)
        run<group_add_slices>(c, "warpgroup_add", p);
    else if (p->output == OUTPUT_ADD)
        run<group_add>(c, "warpgroup_add", p);
    else if (p->output == OUTPUT_ACTIVATE && p->rows > GROUP_ROWS)
        run<group_activate_wide>(c, "warpgroup_activate", p);
    else
        run<group_activate>(c, "warpgroup_activate", p);
}

void warpgroup_front(struct cuda *c, const struct warpgroup_front *f)
{
    typedef group_rows S;
    struct front_call call = {*f, c->step};
    CHECK(c->step.decode && c->step.rows == f->vqk.rows &&
          warpgroup_has_logits(f->n_logits, f->vqk.in.n));
    CHECK(f->vqk.output == OUTPUT_BF16 && f->vqk.in.squares &&
          warpgroup_has(OUTPUT_BF16, f->vqk.n_out, f->vqk.in.n));
    call.n_gates = ceil_div(f->vqk.rows, GATES_ROWS) * GATES_BLOCKS;
    call.wide = ceil_div(f->vqk.n_out, S::columns);
    call.n_products = call.wide * ceil_div(f->vqk.rows, S::rows);
    const int blocks = call.n_gates + call.n_products;
    launch_cluster(&c->queue, "warpgroup_front", front_kernel<S>,
                   dim3((unsigned)ceil_div(blocks, GATES_BLOCKS) * GATES_BLOCKS), GATES_BLOCKS,
                   S::threads, (size_t)front_bytes(), call);
}

void pack_rows(struct cuda *c, const struct packed_rows *out, const float *x, const float *weight,
               int rows, const int32_t *n_rows)
{
    CHECK(out->n == WARPGROUP_DEPTH &&
          (out->n_parts == WARPGROUP_PARTS || out->n_parts == 2 * WARPGROUP_PARTS));
    launch(&c->queue, "pack_rows", pack_kernel, dim3((unsigned)rows), PACK_THREADS, 0, *out, x,
           weight, n_rows);
}
