/* rows.cu - what is done to rows one by one: embeddings, norms, sums, activations, rotations.
 *
 * All of it is bound by memory: each kernel reads its inputs once and writes its output once,
 * four values an access. Floors at 3 TB/s and 8,192 rows x 768: 17 us for one array in and one
 * out from memory, a third of that from L2; a row alone takes as long as a launch.
 */
#include "engine/kernels/cuda/fused.cuh"
#include "engine/kernels/cuda/math.cuh"

enum {
    THREADS = 256,
    ROW_WARPS = 4,      /* of a block of norm_kernel: a warp has a row */
    BLOCK_QUADS = 1024, /* of a row that a block of norm_block_kernel has */
};

/* ---- embeddings ---- */

static __device__ __forceinline__ float table_value(float x)
{
    return x;
}
static __device__ __forceinline__ float table_value(bf16 x)
{
    return __bfloat162float(x);
}
static __device__ __forceinline__ float table_value(int8_t x)
{
    return x;
}

template <class T, int N> struct alignas(sizeof(T) * N) pack {
    T value[N];
};

/* What a row's token is and where it stands: arrays of the step. */
struct step_tokens {
    const int32_t *given, *drawn, *row_slot, *n_rows;
    bool late; /* there after pdl_wait only */
};

/* What the first layer's norm makes of rows that are left packed, too: values NULL: of none. */
struct embed_next {
    struct packed_rows rows;
    const float *weight;
};

/* A block has a row, a thread N adjacent columns at a time, of rows that are packed 4. What is
 * drawn comes from another kernel; the step's arrays only when they are late. */
template <class T, int N>
static __global__ void embed_kernel(float *out, const T *table, const float *scales, float scale,
                                    int dim, const struct step_tokens tokens,
                                    const __grid_constant__ struct embed_next next)
{
    pdl_trigger();
    if (tokens.late)
        pdl_wait();
    const int r = blockIdx.x;
    const bool idle = r >= *tokens.n_rows;
    const int32_t given = tokens.given[r], slot = tokens.row_slot[r];
    pdl_wait();
    if (idle)
        return;
    const int64_t token = given == TOKEN_DRAWN ? tokens.drawn[slot] : given;
    const float factor = scales ? scale * scales[token] : scale;
    const T *from = table + token * dim;
    float *to = out + (int64_t)r * dim;
    for (int i = threadIdx.x * N; i < dim; i += blockDim.x * N) {
        const pack<T, N> in = *reinterpret_cast<const pack<T, N> *>(from + i);
        float4 weight = make_float4(0, 0, 0, 0);
        if (N == 4 && next.rows.values)
            weight = __ldg(reinterpret_cast<const float4 *>(next.weight + i));
        pack<float, N> y;
#pragma unroll
        for (int j = 0; j < N; j++)
            y.value[j] = factor * table_value(in.value[j]);
        *reinterpret_cast<pack<float, N> *>(to + i) = y;
        if (N == 4 && next.rows.values)
            packed_leave(next.rows, r, i, reinterpret_cast<const float4 &>(y), weight);
    }
}

/* Whole warps, enough for n work items of a row. */
static int row_threads(int n)
{
    const int threads = ceil_div(n, WARP) * WARP;
    return threads < THREADS ? threads : THREADS;
}

template <class T>
static void embed(struct cuda *c, struct buffer *out, const struct linear *table, float scale,
                  const struct embed_next &next)
{
    const int dim = table->n_in;
    const bool wide = dim % 4 == 0;
    const struct device_step *s = &c->step;
    const struct step_tokens tokens = {s->tokens, s->drawn, s->row_slot, &s->sizes->n_rows,
                                       s->late};
    launch(&c->queue, "embed", wide ? embed_kernel<T, 4> : embed_kernel<T, 1>, dim3(c->step.rows),
           row_threads(wide ? dim / 4 : dim), 0, floats(out), (const T *)table->weight->data,
           floats(table->scales), scale, dim, tokens, next);
}

/* Frequencies come from the host: at a position of 2^40 the last bit of a power counts. They
 * travel with the launch, whose arguments may have 4 KB. */
enum { WAVES = 480 };
struct waves {
    double frequency[WAVES];
};

static __global__ void sinusoid_kernel(float *x, struct waves waves, int first, int dim,
                                       const int64_t *positions, const int32_t *n_rows)
{
    pdl_trigger();
    pdl_wait();
    const int r = blockIdx.x;
    if (r >= *n_rows)
        return;
    const int64_t position = positions[r];
    float *row = x + (int64_t)r * dim;
    for (int i = threadIdx.x; i < WAVES && 2 * (first + i) < dim; i += blockDim.x) {
        const int column = 2 * (first + i);
        float sine, cosine;
        angle(position, waves.frequency[i], &sine, &cosine);
        row[column] += sine;
        if (column + 1 < dim)
            row[column + 1] += cosine;
    }
}

static void add_sinusoids(struct cuda *c, struct buffer *x, int dim)
{
    for (int first = 0; 2 * first < dim; first += WAVES) {
        struct waves waves;
        for (int i = 0; i < WAVES; i++)
            waves.frequency[i] = pow(10000.0, -(double)(2 * (first + i)) / dim);
        launch(&c->queue, "embed", sinusoid_kernel, dim3(c->step.rows), row_threads(dim / 2 + 1), 0,
               floats(x), waves, first, dim, c->step.positions, &c->step.sizes->n_rows);
    }
}

void cuda_embed(struct backend *b, struct buffer *out, const struct linear *table, float scale,
                bool sinusoidal, const struct norm *next)
{
    struct cuda *c = cuda_of(b);
    struct embed_next after = {};
    if (next && !sinusoidal && packed_first(c, next, table->n_in, &after.rows))
        after.weight = floats(next->weight);
    if (table->dtype == DTYPE_F32)
        embed<float>(c, out, table, scale, after);
    else if (table->dtype == DTYPE_BF16)
        embed<bf16>(c, out, table, scale, after);
    else
        embed<int8_t>(c, out, table, scale, after);
    if (sinusoidal)
        add_sinusoids(c, out, table->n_in);
}

/* ---- norms ---- */

struct norm_call {
    const float *in;
    struct device_norm norm; /* weight NULL: rows as they are */
    int dim;
    int64_t groups;         /* rows of dim values in a row of the step: heads, or 1 */
    const int32_t *in_rows; /* gather, or NULL */
    const int32_t *n_rows;
};

/* Where normed values go. before: what is there and will be needed. */
struct store_f32 {
    float *out;
    __device__ __forceinline__ void one(int64_t at, float y) const
    {
        out[at] = y;
    }
    __device__ __forceinline__ float4 before(int64_t) const
    {
        return make_float4(0, 0, 0, 0);
    }
    __device__ __forceinline__ void four(int64_t at, float4 y, float4) const
    {
        *reinterpret_cast<float4 *>(out + at) = y;
    }
};

struct store_bf16 {
    bf16 *out;
    __device__ __forceinline__ void one(int64_t at, float y) const
    {
        out[at] = __float2bfloat16_rn(y);
    }
    __device__ __forceinline__ float4 before(int64_t) const
    {
        return make_float4(0, 0, 0, 0);
    }
    __device__ __forceinline__ void four(int64_t at, float4 y, float4) const
    {
        pack<__nv_bfloat162, 2> both;
        both.value[0] = __floats2bfloat162_rn(y.x, y.y);
        both.value[1] = __floats2bfloat162_rn(y.z, y.w);
        *reinterpret_cast<pack<__nv_bfloat162, 2> *>(out + at) = both;
    }
};

struct add_f32 {
    float *out;
    __device__ __forceinline__ void one(int64_t at, float y) const
    {
        out[at] += y;
    }
    __device__ __forceinline__ float4 before(int64_t at) const
    {
        return *reinterpret_cast<const float4 *>(out + at);
    }
    __device__ __forceinline__ void four(int64_t at, float4 y, float4 x) const
    {
        *reinterpret_cast<float4 *>(out + at) =
            make_float4(x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w);
    }
};

/* dim a multiple of 4 and at most 128 PER: a lane holds its part of the row. For the usual
 * lengths everything is asked for at once, the weights before the kernel in front has ended: what
 * is waited for is one load and the sums. Bytes: 4 dim a row in, and what Store writes. */
template <int PER, class Store>
static __global__ void __launch_bounds__(ROW_WARPS *WARP)
    norm_kernel(const __grid_constant__ struct norm_call call, Store store)
{
    constexpr bool AHEAD = PER <= 8;
    const float4 zero = make_float4(0, 0, 0, 0);
    const int lane = threadIdx.x % WARP, quads = call.dim / 4;
    const float *const weight = call.norm.weight, *const bias = call.norm.bias;
    pdl_trigger();
    float4 w[AHEAD ? PER : 1], before[AHEAD ? PER : 1], held[PER];
#pragma unroll
    for (int p = 0; AHEAD && p < PER; p++)
        w[p] = weight && lane + p * WARP < quads ? quad_at(weight, lane + p * WARP) : zero;

    const int64_t row = (int64_t)blockIdx.x * ROW_WARPS + threadIdx.x / WARP;
    const bool idle = row >= *call.n_rows * call.groups; /* there before the wait */
    pdl_wait();
    if (idle)
        return;
    const int64_t from = call.in_rows ? call.in_rows[row] : row;
    const float4 *in = reinterpret_cast<const float4 *>(call.in + from * call.dim);
#pragma unroll
    for (int p = 0; p < PER; p++) {
        const int quad = lane + p * WARP;
        held[p] = quad < quads ? in[quad] : zero;
        if (AHEAD)
            before[p] = quad < quads ? store.before(row * call.dim + 4 * quad) : zero;
    }

    struct row_scale s = {0, 1};
    if (weight)
        s = held_scale<PER>(held, call.dim, call.norm.type == NORM_LAYER, call.norm.eps);
#pragma unroll
    for (int p = 0; p < PER; p++) {
        const int quad = lane + p * WARP;
        if (quad >= quads)
            break;
        const int64_t at = row * call.dim + 4 * quad;
        float4 y = held[p];
        if (weight)
            y = normed_quad(y, s, AHEAD ? w[p] : quad_at(weight, quad),
                            bias ? quad_at(bias, quad) : zero);
        store.four(at, y, AHEAD ? before[p] : store.before(at));
    }
}

/* Values of all threads of the block, a warp after the other as norm_kernel has them in one lane:
 * the same bits. */
static __device__ __forceinline__ float ordered_sum(float x, float (&partial)[WARP][WARP])
{
    const int lane = threadIdx.x % WARP, n_warps = blockDim.x / WARP;
    partial[threadIdx.x / WARP][lane] = x;
    __syncthreads();
    float sum = 0;
    for (int p = 0; p < n_warps; p++)
        sum += partial[p][lane];
    return warp_sum(sum);
}

/* Few long rows: a block has a row, a thread four values. Results are norm_kernel's, bit for bit.
 */
template <class Store>
static __global__ void __launch_bounds__(BLOCK_QUADS)
    norm_block_kernel(const __grid_constant__ struct norm_call call, Store store)
{
    __shared__ float partial[2][WARP][WARP];
    const float4 zero = make_float4(0, 0, 0, 0);
    const int quad = threadIdx.x, dim = call.dim;
    const bool here = quad < dim / 4;
    const float *const weight = call.norm.weight, *const bias = call.norm.bias;
    pdl_trigger();
    const float4 w = here && weight ? quad_at(weight, quad) : zero;
    const float4 b = here && bias ? quad_at(bias, quad) : zero;
    const int64_t row = blockIdx.x, at = row * dim + 4 * quad;
    const bool idle = row >= *call.n_rows * call.groups;
    pdl_wait();
    if (idle)
        return;
    const int64_t from = call.in_rows ? call.in_rows[row] : row;
    float4 y = zero, before = zero;
    if (here) {
        y = reinterpret_cast<const float4 *>(call.in + from * dim)[quad];
        before = store.before(at);
    }
    if (weight) {
        struct row_scale s = {0, 0};
        if (call.norm.type == NORM_LAYER)
            s.mean = ordered_sum((y.x + y.y) + (y.z + y.w), partial[0]) / dim;
        const float squares = ordered_sum(here ? square_sum(y, s.mean) : 0, partial[1]);
        s.scale = norm_scale(squares, dim, call.norm.eps);
        y = normed_quad(y, s, w, b);
    }
    if (here)
        store.four(at, y, before);
}

/* Longer rows, read again for each pass: they stay in the first cache. */
template <class Store>
static __global__ void __launch_bounds__(ROW_WARPS *WARP)
    norm_long_kernel(struct norm_call call, Store store)
{
    pdl_trigger();
    pdl_wait();
    const int64_t row = (int64_t)blockIdx.x * ROW_WARPS + threadIdx.x / WARP;
    if (row >= *call.n_rows * call.groups)
        return;
    const int lane = threadIdx.x % WARP;
    const int64_t from = call.in_rows ? call.in_rows[row] : row;
    const float *in = call.in + from * call.dim;
    struct row_scale s = {0, 1};
    if (call.norm.weight)
        s = read_scale(in, call.dim, call.norm.type == NORM_LAYER, call.norm.eps);
    for (int quad = lane; quad < call.dim / 4; quad += WARP) {
        float4 y = reinterpret_cast<const float4 *>(in)[quad];
        if (call.norm.weight)
            y = normed_quad(y, s, quad_at(call.norm.weight, quad),
                            call.norm.bias ? quad_at(call.norm.bias, quad)
                                           : make_float4(0, 0, 0, 0));
        const int64_t at = row * call.dim + 4 * quad;
        store.four(at, y, store.before(at));
    }
}

/* Rows that are not aligned to 16 bytes. */
template <class Store>
static __global__ void __launch_bounds__(ROW_WARPS *WARP)
    norm_odd_kernel(struct norm_call call, Store store)
{
    pdl_trigger();
    pdl_wait();
    const int64_t row = (int64_t)blockIdx.x * ROW_WARPS + threadIdx.x / WARP;
    if (row >= *call.n_rows * call.groups)
        return;
    const int lane = threadIdx.x % WARP, dim = call.dim;
    const int64_t from = call.in_rows ? call.in_rows[row] : row;
    const float *in = call.in + from * dim;
    struct row_scale s = {0, 1};
    if (call.norm.weight) {
        float sum = 0, square = 0;
        for (int i = lane; call.norm.type == NORM_LAYER && i < dim; i += WARP)
            sum += in[i];
        s.mean = warp_sum(sum) / dim;
        for (int i = lane; i < dim; i += WARP)
            square = fmaf(in[i] - s.mean, in[i] - s.mean, square);
        s.scale = 1 / sqrtf(warp_sum(square) / dim + call.norm.eps);
    }
    for (int i = lane; i < dim; i += WARP) {
        float y = in[i];
        if (call.norm.weight)
            y = normed(y, s, call.norm.weight[i], call.norm.bias ? call.norm.bias[i] : 0);
        store.one(row * dim + i, y);
    }
}

template <class Store>
static void norm_rows(struct cuda *c, const char *where, const struct norm_call *call, int rows,
                      Store store)
{
    void (*kernel)(struct norm_call, Store) = norm_long_kernel<Store>;
    const int64_t n = rows * call->groups;
    if (call->dim % 4 == 0 && call->dim > 1024 && call->dim <= 4 * BLOCK_QUADS &&
        n <= 2 * c->queue.n_sms) {
        launch(&c->queue, where, norm_block_kernel<Store>, dim3((unsigned)n),
               ceil_div(call->dim / 4, WARP) * WARP, 0, *call, store);
        return;
    }
    if (call->dim % 4)
        kernel = norm_odd_kernel<Store>;
    else if (call->dim <= 256)
        kernel = norm_kernel<2, Store>;
    else if (call->dim <= 768)
        kernel = norm_kernel<6, Store>;
    else if (call->dim <= 1024)
        kernel = norm_kernel<8, Store>;
    else if (call->dim <= 2560)
        kernel = norm_kernel<20, Store>;
    launch(&c->queue, where, kernel, dim3((unsigned)((n + ROW_WARPS - 1) / ROW_WARPS)),
           ROW_WARPS * WARP, 0, *call, store);
}

static struct device_norm on_device(const struct norm *w)
{
    return {floats(w->weight), floats(w->bias), w->type, w->eps};
}

void cuda_norm(struct backend *b, struct buffer *out, const struct buffer *in, const struct norm *w,
               int dim, enum row_set rows)
{
    struct cuda *c = cuda_of(b);
    const struct norm_call call = {floats(in), on_device(w), dim, 1, nullptr, actual_rows(c, rows)};
    norm_rows(c, "norm", &call, rows_of(c, rows), store_f32{floats(out)});
}

void cuda_head_norm(struct backend *b, struct buffer *x, const struct norm *w, int n_heads,
                    int head_dim)
{
    struct cuda *c = cuda_of(b);
    const struct norm_call call = {floats(x), on_device(w), head_dim,
                                   n_heads,   nullptr,      actual_rows(c, ROWS_STEP)};
    norm_rows(c, "head_norm", &call, c->step.rows, store_f32{floats(x)});
}

void norm_add(struct cuda *c, float *x, const float *y, struct device_norm norm, int dim)
{
    const struct norm_call call = {y, norm, dim, 1, nullptr, actual_rows(c, ROWS_STEP)};
    norm_rows(c, "norm_add", &call, c->step.rows, add_f32{x});
}

void norm_to_bf16(struct cuda *c, bf16 *out, const float *in, struct device_norm norm, int dim,
                  const int32_t *in_rows, int rows, const int32_t *n_rows)
{
    const struct norm_call call = {in, norm, dim, 1, in_rows, n_rows};
    norm_rows(c, "norm_to_bf16", &call, rows, store_bf16{out});
}

/* ---- value by value ---- */

struct add_values {
    float *x;
    const float *y;
    __device__ __forceinline__ void operator()(float4 *v, int64_t quad) const
    {
        const float4 a = reinterpret_cast<const float4 *>(x)[quad];
        const float4 b = reinterpret_cast<const float4 *>(y)[quad];
        *v = make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
    }
    __device__ __forceinline__ float one(int64_t i) const
    {
        return x[i] + y[i];
    }
};

template <enum activation ACT> struct activated {
    const float *gate, *up; /* gate may be NULL */
    __device__ __forceinline__ void operator()(float4 *v, int64_t quad) const
    {
        const float4 u = reinterpret_cast<const float4 *>(up)[quad];
        if (!gate) {
            *v = make_float4(activate_value(u.x, ACT), activate_value(u.y, ACT),
                             activate_value(u.z, ACT), activate_value(u.w, ACT));
            return;
        }
        const float4 g = reinterpret_cast<const float4 *>(gate)[quad];
        *v = make_float4(activate_value(g.x, ACT) * u.x, activate_value(g.y, ACT) * u.y,
                         activate_value(g.z, ACT) * u.z, activate_value(g.w, ACT) * u.w);
    }
    __device__ __forceinline__ float one(int64_t i) const
    {
        return gate ? activate_value(gate[i], ACT) * up[i] : activate_value(up[i], ACT);
    }
};

struct capped {
    const float *x;
    float cap;
    __device__ __forceinline__ float one(int64_t i) const
    {
        return softcapped(x[i], cap);
    }
    __device__ __forceinline__ void operator()(float4 *v, int64_t quad) const
    {
        const float4 a = reinterpret_cast<const float4 *>(x)[quad];
        *v = make_float4(softcapped(a.x, cap), softcapped(a.y, cap), softcapped(a.z, cap),
                         softcapped(a.w, cap));
    }
};

/* out[i] = f of values at i, over rows * dim values: buffers are aligned, rows need not be. */
template <class F>
static __global__ void __launch_bounds__(THREADS)
    values_kernel(float *out, F f, int dim, const int32_t *n_rows)
{
    pdl_trigger();
    pdl_wait();
    const int64_t n = (int64_t)*n_rows * dim;
    const int64_t quad = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (4 * quad + 4 <= n) {
        float4 v;
        f(&v, quad);
        reinterpret_cast<float4 *>(out)[quad] = v;
    } else {
        for (int64_t i = 4 * quad; i < n; i++)
            out[i] = f.one(i);
    }
}

template <class F>
static void every_value(struct cuda *c, const char *where, float *out, F f, int dim,
                        enum row_set rows)
{
    const int64_t quads = ((int64_t)rows_of(c, rows) * dim + 3) / 4;
    launch(&c->queue, where, values_kernel<F>, dim3((unsigned)((quads + THREADS - 1) / THREADS)),
           THREADS, 0, out, f, dim, actual_rows(c, rows));
}

void cuda_add(struct backend *b, struct buffer *x, const struct buffer *y, int dim)
{
    every_value(cuda_of(b), "add", floats(x), add_values{floats(x), floats(y)}, dim, ROWS_STEP);
}

template <enum activation ACT>
static void activate(struct backend *b, struct buffer *out, const struct buffer *gate,
                     const struct buffer *up, int dim)
{
    every_value(cuda_of(b), "activate", floats(out), activated<ACT>{floats(gate), floats(up)}, dim,
                ROWS_STEP);
}

void cuda_activate(struct backend *b, struct buffer *out, const struct buffer *gate,
                   const struct buffer *up, enum activation act, int dim)
{
    if (act == ACTIVATION_SILU)
        activate<ACTIVATION_SILU>(b, out, gate, up, dim);
    else if (act == ACTIVATION_GELU)
        activate<ACTIVATION_GELU>(b, out, gate, up, dim);
    else
        activate<ACTIVATION_GELU_TANH>(b, out, gate, up, dim);
}

void cuda_softcap(struct backend *b, struct buffer *x, float cap, int dim)
{
    every_value(cuda_of(b), "softcap", floats(x), capped{floats(x), cap}, dim, ROWS_LOGITS);
}

static __global__ void gather_kernel(float *out, const float *in, int dim,
                                     const int32_t *logit_rows, const int32_t *n_rows)
{
    pdl_trigger();
    pdl_wait();
    const int r = blockIdx.x;
    if (r >= *n_rows)
        return;
    const float *from = in + (int64_t)logit_rows[r] * dim;
    float *to = out + (int64_t)r * dim;
    if (dim % 4 == 0) {
        for (int i = threadIdx.x; i < dim / 4; i += blockDim.x)
            reinterpret_cast<float4 *>(to)[i] = reinterpret_cast<const float4 *>(from)[i];
    } else {
        for (int i = threadIdx.x; i < dim; i += blockDim.x)
            to[i] = from[i];
    }
}

void cuda_gather(struct backend *b, struct buffer *out, const struct buffer *in, int dim)
{
    struct cuda *c = cuda_of(b);
    launch(&c->queue, "gather", gather_kernel, dim3(c->step.logits),
           row_threads(dim % 4 ? dim : dim / 4), 0, floats(out), floats(in), dim,
           c->step.logit_rows, &c->step.sizes->n_logit_rows);
}

/* ---- rotations ---- */

/* A block has a row: its d/2 angles are computed once for all heads. */
static __global__ void __launch_bounds__(THREADS)
    rope_kernel(float *x, const double *frequencies, int n_heads, int head_dim,
                const int64_t *positions, const int32_t *n_rows)
{
    DYNAMIC_SHARED(float2, turns); /* [d/2] cosine, sine */
    pdl_trigger();
    pdl_wait();
    const int r = blockIdx.x, half = head_dim / 2;
    if (r >= *n_rows)
        return;
    for (int i = threadIdx.x; i < half; i += blockDim.x)
        angle(positions[r], frequencies[i], &turns[i].y, &turns[i].x);
    __syncthreads();
    float *row = x + (int64_t)r * n_heads * head_dim;
    for (int at = threadIdx.x; at < n_heads * half; at += blockDim.x) {
        const int i = at % half;
        float *head = row + at / half * head_dim;
        const float a = head[i], b = head[i + half];
        const float2 turn = turns[i];
        head[i] = fmaf(a, turn.x, -b * turn.y);
        head[i + half] = fmaf(a, turn.y, b * turn.x);
    }
}

void cuda_rope(struct backend *b, struct buffer *x, const struct buffer *frequencies, int n_heads,
               int head_dim)
{
    struct cuda *c = cuda_of(b);
    launch(&c->queue, "rope", rope_kernel, dim3(c->step.rows),
           row_threads(n_heads * (head_dim / 2)), head_dim / 2 * sizeof(float2), floats(x),
           (const double *)frequencies->data, n_heads, head_dim, c->step.positions,
           &c->step.sizes->n_rows);
}

struct vapor_call {
    float *out;
    const float *x, *theta;
    int n_heads, group, head_dim; /* group: heads of out that a head of x feeds */
    double sign;
};

/* Every head turns by angles of its own. A thread reads its pair before it writes it, so out may
 * be x where their heads are the same. */
static __global__ void __launch_bounds__(THREADS)
    vapor_kernel(struct vapor_call call, const int64_t *positions, const int32_t *n_rows)
{
    pdl_trigger();
    pdl_wait();
    const int r = blockIdx.x, half = call.head_dim / 2;
    if (r >= *n_rows)
        return;
    const int64_t position = positions[r];
    const int n_x_heads = call.n_heads / call.group;
    const float *x = call.x + (int64_t)r * n_x_heads * call.head_dim;
    float *out = call.out + (int64_t)r * call.n_heads * call.head_dim;
    for (int at = threadIdx.x; at < call.n_heads * half; at += blockDim.x) {
        const int h = at / half, i = at % half;
        const float *from = x + h / call.group * call.head_dim;
        float *to = out + h * call.head_dim;
        float sine, cosine;
        angle(position, call.sign * (double)call.theta[at], &sine, &cosine);
        const float a = from[i], b = from[i + half];
        to[i] = fmaf(a, cosine, -b * sine);
        to[i + half] = fmaf(a, sine, b * cosine);
    }
}

void cuda_vapor(struct backend *b, struct buffer *out, const struct buffer *x,
                const struct buffer *theta, int n_heads, int n_x_heads, int head_dim, int sign)
{
    struct cuda *c = cuda_of(b);
    const struct vapor_call call = {floats(out),         floats(x), floats(theta), n_heads,
                                    n_heads / n_x_heads, head_dim,  (double)sign};
    launch(&c->queue, "vapor", vapor_kernel, dim3(c->step.rows),
           row_threads(n_heads * (head_dim / 2)), 0, call, c->step.positions,
           &c->step.sizes->n_rows);
}
