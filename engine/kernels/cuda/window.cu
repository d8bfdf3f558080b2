/* window.cu - the op window, P(eq 13-14, 20): attention of single rows to the ring and the
 * step's own rows, any shape, in f32; and the ring update.
 *
 * Keys are taken in segments of SEGMENT positions, counted from the row's oldest one, and the
 * segments' results are folded in order, SPAN segments first and then the spans. Long rings may
 * have a block for each segment and fold afterwards, or one block for all: the same sums in the
 * same order, so that the choice, which depends on the batch, shows in no bit.
 */
#include "engine/kernels/cuda/attention.cuh"

extern "C" {
#include "engine/base/error.h"
}

namespace
{

enum {
    SEGMENT = 512,
    SPAN = 16,
    THREADS = 256,
    KEY_LANES = 8, /* lanes that share a key's product */
    AHEAD = 4,     /* keys or values a thread has in flight */
    PUT_AHEAD = 3,
    PUT_BLOCKS = 8, /* that share a piece, at most */
};

struct window_args {
    struct device_step step;
    const float *q, *k, *v, *p0;
    float *out;
    const float *vapor; /* [H, d/2] or NULL */
    struct device_ring ring_k, ring_v;
    struct window_shape shape;
    float *partials; /* [rows, H, segments, d + 2]: max, sum, values */
    int segments;    /* of the whole ring */
};

/* What a block knows about its row. */
struct window_row {
    int64_t position, first_position, oldest;
    int first_row; /* of the sequence, in the step */
    int slot, n_keys, n_segments;
};

__device__ struct window_row find_row(const struct window_args *a, int row)
{
    const struct device_step *step = &a->step;
    int seq = row;
    if (!step->decode) {
        int high = step->sizes->n_seqs;
        for (seq = 0; high - seq > 1;) {
            const int middle = (seq + high) / 2;
            if (step->seq_start[middle] <= row)
                seq = middle;
            else
                high = middle;
        }
    }
    struct window_row w;
    w.first_row = step->seq_start[seq];
    w.slot = step->seq_slot[seq];
    w.position = step->positions[row];
    w.first_position = step->positions[w.first_row];
    w.oldest = w.position - a->shape.ring_rows + 1;
    if (w.oldest < 0)
        w.oldest = 0;
    w.n_keys = (int)(w.position - w.oldest + 1);
    w.n_segments = (w.n_keys + SEGMENT - 1) / SEGMENT;
    return w;
}

/* VEC values as floats; more than one only where rows are 16-byte aligned. */
template <int VEC> __device__ __forceinline__ void load_values(float *x, const float *p)
{
    if (VEC == 1) {
        x[0] = p[0];
    } else {
#pragma unroll
        for (int i = 0; i < VEC; i += 4)
            *(float4 *)(x + i) = *(const float4 *)(p + i);
    }
}
template <int VEC, class T> __device__ __forceinline__ void load_values(float *x, const T *p)
{
    if (VEC == 1) {
        x[0] = to_float(p[0]);
    } else {
        alignas(16) T raw[VEC];
        *(uint4 *)raw = load_streaming(p);
#pragma unroll
        for (int i = 0; i < VEC; i++)
            x[i] = to_float(raw[i]);
    }
}

/* Keys or values of one kv head, by position. */
template <class T, int VEC> struct key_rows {
    const float *own; /* the step's row of position `first` */
    const T *ring;
    int64_t first, ring_rows, own_stride;
    int d;

    __device__ __forceinline__ void load(float *x, int64_t position, int i) const
    {
        if (position >= first)
            load_values<VEC>(x, own + (position - first) * own_stride + i);
        else
            load_values<VEC>(x, ring + (position % ring_rows) * d + i);
    }
};

template <class T, int VEC>
__device__ struct key_rows<T, VEC> rows_of_head(const struct window_args *a,
                                                const struct window_row *w, const float *own,
                                                const struct device_ring *ring, int kv) {
    const struct window_shape *sh = &a->shape;
    struct key_rows<T, VEC> rows;
    rows.d = sh->head_dim;
    rows.own_stride = (int64_t)sh->n_kv_heads * rows.d;
    rows.own = own + w->first_row * rows.own_stride + kv * rows.d;
    rows.ring = (const T *)ring->data + w->slot * ring->row_values + kv * sh->ring_rows * rows.d;
    rows.first = w->first_position;
    rows.ring_rows = sh->ring_rows;
    return rows;
}

/* scores[n] of the keys from position `from` on. KEY_LANES lanes share a key. */
template <class T, int VEC>
__device__ void segment_scores(const struct key_rows<T, VEC> *keys, float *scores, const float *q,
                               int64_t from, int n, const struct window_shape *shape)
{
    const int lane = threadIdx.x % KEY_LANES, group = threadIdx.x / KEY_LANES;
    const int groups = THREADS / KEY_LANES;
    for (int j0 = 0; j0 < n; j0 += groups * AHEAD) {
        float sum[AHEAD] = {};
        for (int i = lane * VEC; i < keys->d; i += KEY_LANES * VEC) {
            float x[AHEAD][VEC];
#pragma unroll
            for (int u = 0; u < AHEAD; u++)
                keys->load(x[u], from + min(j0 + group + u * groups, n - 1), i);
#pragma unroll
            for (int u = 0; u < AHEAD; u++)
#pragma unroll
                for (int e = 0; e < VEC; e++)
                    sum[u] = fmaf(q[i + e], x[u][e], sum[u]);
        }
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            for (int o = KEY_LANES / 2; o; o >>= 1)
                sum[u] += __shfl_xor_sync(0xffffffffu, sum[u], o);
            const int j = j0 + group + u * groups;
            float score = sum[u] * shape->scale;
            if (shape->softcap > 0)
                score = shape->softcap * tanhf(score / shape->softcap);
            if (lane == 0 && j < n)
                scores[j] = score;
        }
    }
}

__device__ float block_max(float x, float *scratch)
{
    x = warp_max(x);
    if (threadIdx.x % WARP == 0)
        scratch[threadIdx.x / WARP] = x;
    __syncthreads();
    float top = scratch[0];
    for (int i = 1; i < THREADS / WARP; i++)
        top = fmaxf(top, scratch[i]);
    __syncthreads();
    return top;
}

/* A score far below the top, or both infinite. */
__device__ __forceinline__ float exp_below(float a, float b)
{
    return a == b ? 1 : expf(a - b);
}

/* values[d] = sum of weight * v over n keys. Several keys at a time, each thread VEC columns
 * of its own key; then the keys' sums in order. spread: [THREADS * VEC]. */
template <class T, int VEC>
__device__ void segment_values(const struct key_rows<T, VEC> *rows, float *values,
                               const float *weights, float *spread, int64_t from, int n)
{
    const int chunks = rows->d / VEC;
    for (int c0 = 0; c0 < chunks; c0 += THREADS) {
        const int width = min(chunks - c0, (int)THREADS), parallel = THREADS / width;
        const int mine = threadIdx.x / width, c = threadIdx.x % width;
        float sum[VEC] = {};
        if (mine < parallel) {
            for (int j0 = mine; j0 < n; j0 += parallel * AHEAD) {
                float x[AHEAD][VEC];
#pragma unroll
                for (int u = 0; u < AHEAD; u++)
                    rows->load(x[u], from + min(j0 + u * parallel, n - 1), (c0 + c) * VEC);
#pragma unroll
                for (int u = 0; u < AHEAD; u++) {
                    const float w = j0 + u * parallel < n ? weights[j0 + u * parallel] : 0;
#pragma unroll
                    for (int e = 0; e < VEC; e++)
                        sum[e] = fmaf(w, x[u][e], sum[e]);
                }
            }
#pragma unroll
            for (int e = 0; e < VEC; e++)
                spread[(mine * width + c) * VEC + e] = sum[e];
        }
        __syncthreads();
        for (int i = threadIdx.x; i < width * VEC; i += THREADS) {
            float total = 0;
            for (int u = 0; u < parallel; u++)
                total += spread[u * width * VEC + i];
            values[c0 * VEC + i] = total;
        }
        __syncthreads();
    }
}

/* The same with VAPOR, P(eq 20): v of position s is turned by (t - s) * theta. A thread has a
 * pair of columns. spread: [2 * THREADS]. */
template <class T>
__device__ void segment_values_turned(const struct key_rows<T, 1> *rows, float *values,
                                      const float *weights, float *spread, int64_t from, int n,
                                      int64_t position, const float *theta)
{
    const int half = rows->d / 2;
    for (int c0 = 0; c0 < half; c0 += THREADS) {
        const int width = min(half - c0, (int)THREADS), parallel = THREADS / width;
        const int mine = threadIdx.x / width, c = c0 + threadIdx.x % width;
        float low = 0, high = 0;
        for (int j = mine; j < n && mine < parallel; j += parallel) {
            float a, b, sine, cosine;
            rows->load(&a, from + j, c);
            rows->load(&b, from + j, c + half);
            angle(position - (from + j), (double)theta[c], &sine, &cosine);
            low = fmaf(weights[j], fmaf(a, cosine, -b * sine), low);
            high = fmaf(weights[j], fmaf(a, sine, b * cosine), high);
        }
        spread[threadIdx.x] = low;
        spread[THREADS + threadIdx.x] = high;
        __syncthreads();
        for (int i = threadIdx.x; i < 2 * width; i += THREADS) {
            const float *from_keys = spread + i / width * THREADS + i % width;
            float total = 0;
            for (int u = 0; u < parallel; u++)
                total += from_keys[u * width];
            values[i / width * half + c0 + i % width] = total;
        }
        __syncthreads();
    }
}

/* A softmax over some keys: the scores' maximum, the weights' sum, the weighted values. The
 * values of a thread's column are kept by the caller. */
struct part {
    float top, sum;
};

/* a takes in b; value_a * keep + value_b * take for the values. */
struct fold {
    float keep, take;
};
__device__ __forceinline__ struct fold fold_parts(struct part *a, struct part b)
{
    const float top = fmaxf(a->top, b.top);
    const struct fold f = {exp_below(a->top, top), exp_below(b.top, top)};
    a->sum = fmaf(a->sum, f.keep, b.sum * f.take);
    a->top = top;
    return f;
}
__device__ __forceinline__ float fold_values(float a, float b, struct fold f)
{
    return fmaf(a, f.keep, b * f.take);
}

__device__ __forceinline__ void write_out(const struct window_args *a, int row, int h, int i,
                                          float value, float sum)
{
    const size_t head = (size_t)row * a->shape.n_heads + h, at = head * a->shape.head_dim + i;
    const float local = value / sum;
    a->out[at] = a->p0 ? fmaf(a->p0[head], local, a->out[at]) : local;
}

/* One block: one row and head; all keys, or with `split` segment blockIdx.z, whose result goes to
 * partials. Reads 2 d values a key once: the ring's bytes are the floor. */
template <class T, int VEC>
__global__ void __launch_bounds__(THREADS) window_rows(const struct window_args a, bool split)
{
    pdl_trigger();
    pdl_wait();
    const int row = blockIdx.x, h = blockIdx.y;
    if (row >= a.step.sizes->n_rows)
        return;
    const struct window_row w = find_row(&a, row);
    const int first = split ? blockIdx.z : 0, end = split ? first + 1 : w.n_segments;
    if (first >= w.n_segments)
        return;

    const int d = a.shape.head_dim, kv = h / (a.shape.n_heads / a.shape.n_kv_heads);
    DYNAMIC_SHARED(float, shared);
    float *scores = shared, *spread = scores + SEGMENT;
    float *scratch = spread + THREADS * (VEC > 2 ? VEC : 2), *q = scratch + WARP;
    float *values = q + (d + 3) / 4 * 4, *span = values + d, *total = span + d;
    for (int i = threadIdx.x; i < d; i += THREADS) {
        q[i] = a.q[((size_t)row * a.shape.n_heads + h) * d + i];
        span[i] = total[i] = 0;
    }
    const struct key_rows<T, VEC> keys = rows_of_head<T, VEC>(&a, &w, a.k, &a.ring_k, kv);
    const struct key_rows<T, VEC> rows = rows_of_head<T, VEC>(&a, &w, a.v, &a.ring_v, kv);
    __syncthreads();

    struct part in_span = {-INFINITY, 0}, in_all = {-INFINITY, 0};
    for (int segment = first; segment < end; segment++) {
        const int64_t from = w.oldest + (int64_t)segment * SEGMENT;
        const int n = min((int)SEGMENT, w.n_keys - segment * SEGMENT);
        segment_scores(&keys, scores, q, from, n, &a.shape);
        __syncthreads();
        struct part part = {-INFINITY, 0};
        for (int j = threadIdx.x; j < n; j += THREADS)
            part.top = fmaxf(part.top, scores[j]);
        part.top = block_max(part.top, scratch);
        for (int j = threadIdx.x; j < n; j += THREADS) {
            scores[j] = exp_below(scores[j], part.top);
            part.sum += scores[j];
        }
        part.sum = block_sum(part.sum, scratch);
        if constexpr (VEC == 1) {
            if (a.vapor)
                segment_values_turned(&rows, values, scores, spread, from, n, w.position,
                                      a.vapor + (size_t)h * (d / 2));
            else
                segment_values(&rows, values, scores, spread, from, n);
        } else {
            segment_values(&rows, values, scores, spread, from, n);
        }

        if (split) {
            float *to =
                a.partials + (((size_t)row * a.shape.n_heads + h) * a.segments + segment) * (d + 2);
            if (threadIdx.x == 0) {
                to[0] = part.top;
                to[1] = part.sum;
            }
            for (int i = threadIdx.x; i < d; i += THREADS)
                to[2 + i] = values[i];
            return;
        }
        const struct fold f = fold_parts(&in_span, part);
        for (int i = threadIdx.x; i < d; i += THREADS)
            span[i] = fold_values(span[i], values[i], f);
        if (segment % SPAN == SPAN - 1 || segment == end - 1) {
            const struct fold g = fold_parts(&in_all, in_span);
            for (int i = threadIdx.x; i < d; i += THREADS) {
                total[i] = fold_values(total[i], span[i], g);
                span[i] = 0;
            }
            in_span = {-INFINITY, 0};
        }
        __syncthreads();
    }
    for (int i = threadIdx.x; i < d; i += THREADS)
        write_out(&a, row, h, i, total[i], in_all.sum);
}

/* Fold what the split blocks left. Threads: groups of d, a span each; then one group folds the
 * spans. Shared: [groups, d + 2]. */
__global__ void window_fold(const struct window_args a)
{
    pdl_trigger();
    pdl_wait();
    const int row = blockIdx.x, h = blockIdx.y;
    if (row >= a.step.sizes->n_rows)
        return;
    const struct window_row w = find_row(&a, row);
    const int d = a.shape.head_dim, groups = blockDim.x / d;
    const int group = threadIdx.x / d, i = threadIdx.x % d;
    const float *partials = a.partials + ((size_t)row * a.shape.n_heads + h) * a.segments * (d + 2);
    DYNAMIC_SHARED(float, shared);

    struct part all = {-INFINITY, 0};
    float total = 0;
    const int n_spans = (w.n_segments + SPAN - 1) / SPAN;
    for (int s0 = 0; s0 < n_spans; s0 += groups) {
        if (group < groups && s0 + group < n_spans) {
            struct part parts[SPAN], span = {-INFINITY, 0};
            float x[SPAN], value = 0;
            const int first = (s0 + group) * SPAN, n = min((int)SPAN, w.n_segments - first);
#pragma unroll
            for (int j = 0; j < SPAN; j++) {
                const float *from = partials + (size_t)(first + min(j, n - 1)) * (d + 2);
                parts[j] = {from[0], from[1]};
                x[j] = from[2 + i];
            }
#pragma unroll
            for (int j = 0; j < SPAN; j++)
                if (j < n)
                    value = fold_values(value, x[j], fold_parts(&span, parts[j]));
            shared[group * (d + 2) + 2 + i] = value;
            if (i == 0) {
                shared[group * (d + 2)] = span.top;
                shared[group * (d + 2) + 1] = span.sum;
            }
        }
        __syncthreads();
        for (int g = 0; group == 0 && g < groups && s0 + g < n_spans; g++) {
            const float *from = shared + g * (d + 2);
            total = fold_values(total, from[2 + i], fold_parts(&all, {from[0], from[1]}));
        }
        __syncthreads();
    }
    if (group == 0)
        write_out(&a, row, h, i, total, all.sum);
}

/* ---- the ring ---- */

template <class T, int VEC> struct alignas(VEC * sizeof(T)) stored {
    T x[VEC];
};

template <int VEC, class T> __device__ __forceinline__ void store_values(T *to, const float *x)
{
    struct stored<T, VEC> y;
#pragma unroll
    for (int e = 0; e < VEC; e++)
        y.x[e] = from_float<T>(x[e]);
    *(struct stored<T, VEC> *)to = y;
}

/* The rows of a piece that the ring keeps, shared by the blocks of one x, each of which has up to
 * PUT_AHEAD places of keys and of values in flight a thread. Moves 2 KV d values a kept row: 50 MB,
 * 12 us, for 8192 rows in bf16 of which all are kept. */
template <class S, class T, int VEC>
__global__ void __launch_bounds__(THREADS)
    ring_put(const struct device_step step, const struct ring_update u)
{
    pdl_trigger();
    if (blockIdx.x >= (unsigned)step.sizes->n_pieces)
        return;
    const struct piece piece = step.pieces[blockIdx.x];
    const int64_t w = u.ring_rows, slot = step.seq_slot[piece.seq];
    const int end = step.seq_start[piece.seq + 1];
    const int skip = (int)max((int64_t)0, end - w - piece.row);
    if (skip >= piece.n_rows) /* not the sequence's last piece */
        return;
    const unsigned place = (unsigned)(step.positions[piece.row] % w); /* of the first row */
    const S *const k = (const S *)u.k + piece.row * u.k_stride;
    const S *const v = (const S *)u.v + piece.row * u.v_stride;
    T *const ring_k = (T *)u.ring_k.data + slot * u.ring_k.row_values;
    T *const ring_v = (T *)u.ring_v.data + slot * u.ring_v.row_values;
    pdl_wait();

    const int chunks = u.head_dim / VEC, units = u.n_kv_heads * chunks, n = piece.n_rows * units;
    const int apart = (int)gridDim.y * THREADS;
    for (int at0 = skip * units + (int)(blockIdx.y * THREADS + threadIdx.x); at0 < n;
         at0 += PUT_AHEAD * apart) {
        float x[PUT_AHEAD][VEC], y[PUT_AHEAD][VEC];
#pragma unroll
        for (int j = 0; j < PUT_AHEAD; j++) {
            const int at = at0 + j * apart, i = at % units * VEC;
            if (at < n) {
                load_values<VEC>(x[j], k + at / units * u.k_stride + i);
                load_values<VEC>(y[j], v + at / units * u.v_stride + i);
            }
        }
#pragma unroll
        for (int j = 0; j < PUT_AHEAD; j++) {
            const int at = at0 + j * apart, kv = at % units / chunks, i = at % chunks * VEC;
            const int64_t row = kv * w + (place + (unsigned)(at / units)) % (unsigned)w;
            if (at < n) {
                store_values<VEC>(ring_k + row * u.head_dim + i, x[j]);
                store_values<VEC>(ring_v + row * u.head_dim + i, y[j]);
            }
        }
    }
}

template <class S, class T, int VEC> void put_values(struct cuda *c, const struct ring_update *u)
{
    const int units = u->n_kv_heads * (u->head_dim / VEC) * (c->step.decode ? 1 : PIECE_ROWS);
    const int blocks = ceil_div(units, PUT_AHEAD * THREADS);
    launch(&c->queue, "ring_put", ring_put<S, T, VEC>,
           dim3(c->step.n_pieces, blocks < PUT_BLOCKS ? blocks : PUT_BLOCKS), THREADS, 0, c->step,
           *u);
}

template <class S, class T> void put(struct cuda *c, const struct ring_update *u)
{
    const bool wide = sizeof(S) == 2 && u->head_dim % 8 == 0 && u->k_stride % 8 == 0 &&
                      u->v_stride % 8 == 0 && u->ring_k.row_values % 8 == 0 &&
                      u->ring_v.row_values % 8 == 0;
    if (wide)
        put_values<S, T, sizeof(S) == 2 ? 8 : 1>(c, u);
    else
        put_values<S, T, 1>(c, u);
}

/* ---- launching ---- */

size_t row_bytes(int d, int vec)
{
    const int spread = THREADS * (vec > 2 ? vec : 2);
    return (size_t)(SEGMENT + spread + WARP + (d + 3) / 4 * 4 + 3 * d) * sizeof(float);
}

template <class T, int VEC> void attend(struct cuda *c, struct window_args *a)
{
    const int H = a->shape.n_heads, d = a->shape.head_dim, rows = c->step.rows;
    const int64_t segments = (a->shape.ring_rows + SEGMENT - 1) / SEGMENT;
    const size_t wanted = (size_t)rows * H * segments * (d + 2);
    const bool split = segments > 1 && segments <= 65535 && d <= 1024 && c->partials &&
                       wanted <= c->partial_values;
    a->segments = (int)segments;
    a->partials = c->partials;
    launch(&c->queue, "window_rows", window_rows<T, VEC>, dim3(rows, H, split ? segments : 1),
           THREADS, row_bytes(d, VEC), *a, split);
    if (!split)
        return;
    const int groups = d > 512 ? 1 : 512 / d;
    launch(&c->queue, "window_fold", window_fold, dim3(rows, H),
           (groups * d + WARP - 1) / WARP * WARP, (size_t)groups * (d + 2) * sizeof(float), *a);
}

template <class T> void attend_as(struct cuda *c, struct window_args *a)
{
    const int vec = 16 / (int)sizeof(T);
    const int64_t rows = a->ring_k.row_values | a->ring_v.row_values;
    if (!a->vapor && a->shape.head_dim % vec == 0 && rows % vec == 0)
        attend<T, 16 / (int)sizeof(T)>(c, a);
    else
        attend<T, 1>(c, a);
}

} // namespace

void update_rings(struct cuda *c, const struct ring_update *u)
{
    switch (u->ring_k.dtype) {
    case DTYPE_F32:
        u->half ? put<bf16, float>(c, u) : put<float, float>(c, u);
        break;
    case DTYPE_BF16:
        u->half ? put<bf16, bf16>(c, u) : put<float, bf16>(c, u);
        break;
    case DTYPE_F8_E4M3:
        u->half ? put<bf16, fp8>(c, u) : put<float, fp8>(c, u);
        break;
    default:
        CHECK(!"a dtype that rings have");
    }
}

void cuda_window(struct backend *b, struct buffer *out, const struct buffer *p0,
                 const struct buffer *q, const struct buffer *k, const struct buffer *v,
                 const struct slab *ring_k, const struct slab *ring_v,
                 const struct buffer *vapor_theta, const struct window_shape *shape)
{
    struct cuda *c = cuda_of(b);
    const int64_t kv_values = (int64_t)shape->n_kv_heads * shape->head_dim;
    CHECK(shape->ring_rows < INT32_MAX);
    struct window_args a = {};
    a.step = c->step;
    a.q = floats(q);
    a.k = floats(k);
    a.v = floats(v);
    a.p0 = floats(p0);
    a.out = floats(out);
    a.vapor = floats(vapor_theta);
    a.shape = *shape;
    a.ring_k = device_ring(ring_k);
    a.ring_v = device_ring(ring_v);
    switch (ring_k->dtype) {
    case DTYPE_F32:
        attend_as<float>(c, &a);
        break;
    case DTYPE_BF16:
        attend_as<bf16>(c, &a);
        break;
    case DTYPE_F8_E4M3:
        attend_as<fp8>(c, &a);
        break;
    default:
        CHECK(!"a dtype that rings have");
    }
    const struct ring_update update = {floats(k),
                                       floats(v),
                                       kv_values,
                                       kv_values,
                                       false,
                                       shape->n_kv_heads,
                                       shape->head_dim,
                                       shape->ring_rows,
                                       device_ring(ring_k),
                                       device_ring(ring_v)};
    update_rings(c, &update);
}

/* Enough to split rings over blocks for as many rows as do not fill the device by themselves. */
size_t window_partials(const struct backend_options *options)
{
    const struct model_config *config = options->config;
    const size_t most = 32u << 20, head = (size_t)config->head_dim + 2;
    int64_t ring = 0;
    for (int i = 0; i < config->n_layers; i++)
        ring = config_ring_rows(config, i) > ring ? config_ring_rows(config, i) : ring;
    const size_t segments = (size_t)(ring + SEGMENT - 1) / SEGMENT;
    if (segments <= 1)
        return 0;
    const size_t row = (size_t)config->n_heads * segments * head;
    size_t rows = 512 / (size_t)config->n_heads + 1;
    rows = rows < (size_t)options->max_rows ? rows : (size_t)options->max_rows;
    while (rows > 1 && rows * row > most)
        rows--;
    return rows * row;
}
