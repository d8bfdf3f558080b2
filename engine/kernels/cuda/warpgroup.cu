/* warpgroup.cu - products of up to 256 rows by warpgroups, see warpgroup.cuh.
 *
 * Each warpgroup has 64 rows and all of the block's columns. Chunks of 64 columns of the rows have
 * a barrier each, which counts the bytes of one bulk copy; where not all chunks have a place, a
 * place is used again once the chunk in it has been multiplied. n_in above WARPGROUP_DEPTH is cut
 * into slices, a block of a cluster each; every block adds up a share of the columns, in the
 * slices' order.
 */
#include "engine/kernels/cuda/warpgroup.cuh"

enum {
    GROUP_THREADS = 4 * WARP,
    GROUP_ROWS = 64,
    CHUNKS = WARPGROUP_DEPTH / PACKED_COLUMNS,
    ATOM = 1024,                        /* bytes: what the tensor cores' factors are aligned to */
    LANES = GROUP_THREADS / GROUP_ROWS, /* that add up a row's squares */
    PACK_THREADS = WARPGROUP_DEPTH / 4,
};

/* One product, or two of the same rows and depth in one launch. */
struct group_call {
    struct warpgroup_product p[2];
    int n_first; /* blocks along x of the first */
};

template <enum product_output OUTPUT, int COLUMNS, int GROUPS, int SLICES, int PLACES>
struct group_shape {
    static constexpr enum product_output output = OUTPUT;
    static constexpr int columns = COLUMNS, groups = GROUPS, slices = SLICES;
    static constexpr int places = PLACES; /* of chunks of rows */
    static constexpr int threads = GROUPS * GROUP_THREADS, rows = GROUPS * GROUP_ROWS;
    static constexpr int tiles = COLUMNS / 8, own = tiles / SLICES; /* of 8 columns */
    static constexpr int in_depth = SLICES * WARPGROUP_DEPTH;
    static constexpr bool pairs = OUTPUT == OUTPUT_ACTIVATE;
    /* Byte offsets; beside ATOM bytes to begin at a multiple of it. */
    static constexpr int weight_chunk = COLUMNS * PACKED_COLUMNS * 2;
    static constexpr int row_chunk = rows * PACKED_COLUMNS * 2;
    static constexpr int weights = 0, values = CHUNKS * weight_chunk;
    static constexpr int received = values + PLACES * row_chunk; /* [slices][own][threads] float4 */
    static constexpr int scales = received + (SLICES > 1 ? SLICES * own * threads * 16 : 0);
    static constexpr int fetched = scales + rows * 4;
    static constexpr int bytes = fetched + CHUNKS * (int)sizeof(bulk_barrier) + ATOM;
    static_assert(tiles % SLICES == 0 && (!pairs || tiles % 2 == 0) && bytes <= 227 * 1024 &&
                      (SLICES == 1 || GROUPS == 1) && PLACES <= CHUNKS && CHUNKS % GROUPS == 0 &&
                      COLUMNS % (GROUP_THREADS / 8) == 0,
                  "shapes of blocks");
};

/* ---- a block ---- */

/* The block's place: its first column of the results' (of gate and up each), row and slice. */
struct group_place {
    int column, row, slice;
};

template <class S> static __device__ __forceinline__ struct group_place find_place(int block)
{
    struct group_place at = {block * S::columns, (int)blockIdx.y * S::rows, 0};
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
    bf16 *const to = reinterpret_cast<bf16 *>(shared + S::weights) + row0 * PACKED_COLUMNS +
                     (piece ^ (row0 % 8)) * 8;
    const bf16 *from[S::columns / AT_ONCE];
#pragma unroll
    for (int k = 0; k < S::columns / AT_ONCE; k++) {
        const int row = row0 + AT_ONCE * k;
        int out = at.column + row;
        if (S::pairs && row >= S::columns / 2)
            out += p.n_out / 2 - S::columns / 2;
        out = out < p.n_out ? out : p.n_out - 1; /* a last block with columns to spare */
        from[k] = p.weights + (int64_t)out * S::in_depth +
                  (S::slices > 1 ? at.slice * (int)WARPGROUP_DEPTH : 0) + piece * 8;
    }
#pragma unroll
    for (int i = 0; i < CHUNKS; i += S::groups) {
        const int chunk = i + group;
#pragma unroll
        for (int k = 0; k < S::columns / AT_ONCE; k++)
            copy_async_16(to + (chunk * S::columns + AT_ONCE * k) * PACKED_COLUMNS,
                          from[k] + chunk * PACKED_COLUMNS);
    }
    copy_async_commit();
}

template <class S>
static __device__ __forceinline__ void fetch_rows(const struct warpgroup_product &p,
                                                  const struct group_place &at, int chunk,
                                                  bulk_barrier *fetched, unsigned char *shared)
{
    const int64_t tile =
        at.row / PACKED_ROWS * (S::in_depth / PACKED_COLUMNS) + at.slice * CHUNKS + chunk;
    bulk_copy(shared + S::values + chunk % S::places * S::row_chunk,
              p.in.values + (tile * PACKED_ROWS + at.row % PACKED_ROWS) * PACKED_COLUMNS,
              S::row_chunk, fetched + chunk);
}

/* sum += the warpgroup's rows times the block's weights. */
template <class S>
static __device__ __forceinline__ void
multiply(float (&sum)[4 * S::tiles], const struct warpgroup_product &p,
         const struct group_place &at, bulk_barrier *fetched, unsigned char *shared)
{
    const bf16 *const weights = reinterpret_cast<const bf16 *>(shared + S::weights);
    const bf16 *const values = reinterpret_cast<const bf16 *>(shared + S::values) +
                               threadIdx.x / GROUP_THREADS * GROUP_ROWS * PACKED_COLUMNS;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        bulk_wait(fetched + chunk);
        const bf16 *const a = values + chunk % S::places * (S::row_chunk / 2);
        const bf16 *const b = weights + chunk * (S::weight_chunk / 2);
        wgmma_begin();
#pragma unroll
        for (int k = 0; k < PACKED_COLUMNS; k += 16)
            wgmma_bf16<S::columns>(sum, a, b, k);
        wgmma_commit();
        if (chunk > 0 && chunk - 1 + S::places < CHUNKS) { /* to the place of the one before */
            wgmma_wait<1>();
            __syncthreads();
            if (threadIdx.x == 0)
                fetch_rows<S>(p, at, chunk - 1 + S::places, fetched, shared);
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
            if (p.output == OUTPUT_BF16)
                *reinterpret_cast<__nv_bfloat162 *>((bf16 *)p.out + at + 8 * n) =
                    __floats2bfloat162_rn(x, y);
            else
                *reinterpret_cast<float2 *>((float *)p.out + at + 8 * n) = make_float2(x, y);
        }
    }
}

template <class S>
static __device__ __forceinline__ void put_activated(const struct warpgroup_product &p,
                                                     const float (&sum)[4 * S::tiles],
                                                     const struct group_lane &l)
{
#pragma unroll
    for (int j = 0; j < 2; j++) {
        if (!l.here[j])
            continue;
#pragma unroll
        for (int n = 0; n < S::tiles / 2; n++) {
            const float *const gate = sum + 4 * n + 2 * j, *const up = gate + 2 * S::tiles;
            const float2 act =
                quick_activate(make_float2(gate[0] * l.scale[j], gate[1] * l.scale[j]), p.act);
            packed_store(p.next.values, p.next.n, l.row[j], l.column + 8 * n,
                         act.x * (up[0] * l.scale[j]), act.y * (up[1] * l.scale[j]));
        }
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
    static_assert(N == 2, "a part of the squares is of 16 columns");
#pragma unroll
    for (int j = 0; j < 2; j++) {
        float square = 0;
#pragma unroll
        for (int n = 0; n < N; n++) {
            float2 *const x = &h->x[j][n];
            x->x += sum[4 * n + 2 * j], x->y += sum[4 * n + 2 * j + 1];
            square = fmaf(x->x, x->x, fmaf(x->y, x->y, square));
            if (!l.here[j])
                continue;
            *reinterpret_cast<float2 *>((float *)p.out + l.row[j] * p.out_stride + l.column +
                                        8 * n) = *x;
            if (p.next.values)
                packed_store(p.next.values, p.next.n, l.row[j], l.column + 8 * n,
                             x->x * h->weight[n].x, x->y * h->weight[n].y);
        }
        square += __shfl_xor_sync(0xffffffffu, square, 1);
        square += __shfl_xor_sync(0xffffffffu, square, 2);
        if (p.next.values && l.here[j] && threadIdx.x % 4 == 0)
            p.next.squares[l.row[j] * p.next.n_parts + l.column / (8 * N)] = square;
    }
}

/* The slices' sums of the block's share of the columns, in their order: to sum's beginning. */
template <class S>
static __device__ __forceinline__ void exchange(float (&sum)[4 * S::tiles], int slice,
                                                unsigned char *shared)
{
    float4 *const received = reinterpret_cast<float4 *>(shared + S::received) + threadIdx.x;
    cluster_wait(); /* the others have begun */
#pragma unroll
    for (int s = 0; s < S::slices; s++) {
#pragma unroll
        for (int n = 0; n < S::own; n++) {
            const float *const from = sum + 4 * (s * S::own + n);
            *cluster_peer(received + (slice * S::own + n) * S::threads, s) =
                make_float4(from[0], from[1], from[2], from[3]);
        }
    }
    cluster_sync();
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

template <class S>
static __global__ void __launch_bounds__(S::threads, 1)
    warpgroup_kernel(const __grid_constant__ struct group_call c)
{
    DYNAMIC_SHARED(unsigned char, unaligned);
    unsigned char *const shared = unaligned + (ATOM - (uintptr_t)unaligned % ATOM) % ATOM;
    const bool second = (int)blockIdx.x >= c.n_first;
    const struct warpgroup_product &p = c.p[second];
    const struct group_place at = find_place<S>((int)blockIdx.x - (second ? c.n_first : 0));
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    bulk_barrier *const fetched = reinterpret_cast<bulk_barrier *>(shared + S::fetched);
    float *const scales = reinterpret_cast<float *>(shared + S::scales);
    pdl_trigger();
    if (S::slices > 1)
        cluster_arrive_relaxed();
    if (warp == 0)
        bulk_begin(fetched, S::row_chunk, CHUNKS);
    fetch_weights<S>(p, at, shared);
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

    pdl_wait();
    if (warp == 0 && lane < S::places)
        fetch_rows<S>(p, at, lane, fetched, shared);
    if (S::output == OUTPUT_ADD)
        hold_sums<HELD>(&held, p, l);
    struct packed_squares<LANES> squares;
    const int scaled = (int)threadIdx.x / LANES; /* the row it helps to norm */
    if (S::output != OUTPUT_ADD)
        hold_squares(&squares, p.in, at.row + scaled, at.row + scaled < n_rows);
    copy_async_wait<0>();
    if (S::output != OUTPUT_ADD) {
        const float scale = scale_of_squares(squares, p.in);
        if (threadIdx.x % LANES == 0)
            scales[scaled] = scale;
    }
    shared_for_products();
    __syncthreads();
    float sum[4 * S::tiles] = {};
    multiply<S>(sum, p, at, fetched, shared);
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

/* ---- rows to begin with ---- */

/* A block a row, 4 values a thread. */
static __global__ void __launch_bounds__(PACK_THREADS)
    pack_kernel(const __grid_constant__ struct packed_rows out, const float *x, const float *weight,
                const int32_t *n_rows)
{
    pdl_trigger();
    const int row = blockIdx.x, column = 4 * threadIdx.x;
    const float4 w = __ldg(reinterpret_cast<const float4 *>(weight + column));
    const bool here = row < *n_rows;
    pdl_wait();
    float4 v = make_float4(0, 0, 0, 0);
    if (here)
        v = *reinterpret_cast<const float4 *>(x + (int64_t)row * out.n + column);
    float square = square_sum(v, 0);
    square += __shfl_xor_sync(0xffffffffu, square, 1);
    square += __shfl_xor_sync(0xffffffffu, square, 2);
    if (!here)
        return;
    packed_store(out.values, out.n, row, column, v.x * w.x, v.y * w.y);
    packed_store(out.values, out.n, row, column + 2, v.z * w.z, v.w * w.w);
    if (threadIdx.x % 4 == 0)
        out.squares[row * out.n_parts + column / 16] = square;
}

/* ---- launching ---- */

/* Blocks of 128 rows and 24 features where there are so many rows; else of 64. Every shape is for
 * an SM of its own: what lets blocks of successive kernels, or two of one kernel, share an SM
 * (fewer places) made each of them slower by more than it saved. */
typedef group_shape<OUTPUT_BF16, 48, 1, 1, CHUNKS> group_rows; /* and OUTPUT_F32 */
typedef group_shape<OUTPUT_ADD, 16, 1, 1, CHUNKS> group_add;
typedef group_shape<OUTPUT_ADD, 64, 1, 4, CHUNKS> group_add_slices;
typedef group_shape<OUTPUT_ACTIVATE, 48, 1, 1, CHUNKS> group_activate;
typedef group_shape<OUTPUT_ACTIVATE, 48, 2, 1, 8> group_activate_wide;

template <class S>
static void run(struct cuda *c, const char *name, const struct warpgroup_product *p, int n)
{
    struct group_call call = {};
    int wide = 0;
    for (int i = 0; i < n; i++) {
        call.p[i] = p[i];
        wide += ceil_div(p[i].n_out, S::columns) * S::slices;
        call.n_first = i ? call.n_first : wide;
    }
    const dim3 grid((unsigned)wide, (unsigned)ceil_div(p->rows, S::rows));
    if (S::slices > 1)
        launch_cluster(&c->queue, name, warpgroup_kernel<S>, grid, S::slices, S::threads,
                       (size_t)S::bytes, call);
    else
        launch(&c->queue, name, warpgroup_kernel<S>, grid, S::threads, (size_t)S::bytes, call);
}

bool warpgroups_are_there(const struct cuda *c)
{
    typedef group_add_slices S;
    return c->queue.capability == 90 && has_warpgroups((const void *)warpgroup_kernel<S>) &&
           cluster_fits((const void *)warpgroup_kernel<S>, S::slices, S::threads, (size_t)S::bytes);
}

bool warpgroup_has(enum product_output output, int n_out, int n_in)
{
    switch (output) {
    case OUTPUT_ADD:
        return n_out == WARPGROUP_DEPTH && (n_in == n_out || n_in == group_add_slices::in_depth);
    case OUTPUT_ACTIVATE:
        return n_in == WARPGROUP_DEPTH && n_out % group_activate::columns == 0;
    case OUTPUT_BF16:
    case OUTPUT_F32:
        return n_in == WARPGROUP_DEPTH && n_out % 8 == 0;
    default:
        return false;
    }
}

void warpgroup_products(struct cuda *c, const struct warpgroup_product *p, int n)
{
    for (int i = 0; i < n; i++)
        CHECK(warpgroup_has(p[i].output, p[i].n_out, p[i].in.n) && p[i].rows == p->rows &&
              (p[i].output == OUTPUT_ADD) == !p[i].in.squares);
    CHECK(n == 1 || (n == 2 && p[0].output <= OUTPUT_F32 && p[1].output <= OUTPUT_F32));
    if (p->output == OUTPUT_ADD && p->in.n > WARPGROUP_DEPTH)
        run<group_add_slices>(c, "warpgroup_add", p, n);
    else if (p->output == OUTPUT_ADD)
        run<group_add>(c, "warpgroup_add", p, n);
    else if (p->output == OUTPUT_ACTIVATE && p->rows > GROUP_ROWS)
        run<group_activate_wide>(c, "warpgroup_activate", p, n);
    else if (p->output == OUTPUT_ACTIVATE)
        run<group_activate>(c, "warpgroup_activate", p, n);
    else
        run<group_rows>(c, "warpgroup_rows", p, n);
}

void pack_rows(struct cuda *c, const struct packed_rows *out, const float *x, const float *weight,
               int rows, const int32_t *n_rows)
{
    CHECK(out->n == WARPGROUP_DEPTH && out->n_parts == WARPGROUP_PARTS);
    launch(&c->queue, "pack_rows", pack_kernel, dim3((unsigned)rows), PACK_THREADS, 0, *out, x,
           weight, n_rows);
}
