/* memory.cu - see gpu.cuh: buffers, copies, and matrices side by side. */
#include <stdlib.h>

#include "engine/kernels/cuda/gpu.cuh"

/* ---- memory ---- */

enum status gpu_take(struct gpu *g, void **out, size_t n_bytes, struct error *err)
{
    if (!gpu_ready(g))
        return gpu_status(g, err);
    cudaError_t error = cudaMalloc(out, n_bytes ? n_bytes : 1);
    if (error == cudaSuccess)
        return STATUS_OK;
    (void)cudaGetLastError(); /* running out is no failure of the device */
    if (error != cudaErrorMemoryAllocation) {
        gpu_note(g, error, "cudaMalloc");
        return gpu_status(g, err);
    }
    size_t free_bytes = 0, total_bytes = 0;
    (void)cudaMemGetInfo(&free_bytes, &total_bytes);
    return fail(err, STATUS_NOMEM,
                "%s: %zu bytes of device memory are not to be had: %zu of %zu are free", g->name,
                n_bytes, free_bytes, total_bytes);
}

enum status gpu_take_zeroed(struct gpu *g, void **out, size_t n_bytes, struct error *err)
{
    enum status st = gpu_take(g, out, n_bytes, err);
    if (!st)
        gpu_note(g, cudaMemsetAsync(*out, 0, n_bytes, g->cuda.queue.stream), "cudaMemsetAsync");
    return st;
}

enum status gpu_buffer_open(struct backend *b, struct buffer **out, size_t n_bytes,
                            struct error *err)
{
    struct gpu *g = gpu_of(b);
    struct buffer *buffer = (struct buffer *)calloc(1, sizeof(*buffer));
    if (!buffer)
        return fail(err, STATUS_NOMEM, "buffer: out of memory");
    enum status st = gpu_take_zeroed(g, &buffer->data, n_bytes, err);
    if (st) {
        free(buffer);
        return st;
    }
    buffer->n_bytes = n_bytes;
    buffer->owns = true;
    g->buffer_bytes += n_bytes;
    *out = buffer;
    return STATUS_OK;
}

void gpu_buffer_close(struct backend *b, struct buffer *buffer)
{
    if (!buffer)
        return;
    (void)cudaSetDevice(cuda_of(b)->options.device);
    if (buffer->owns)
        (void)cudaFree(buffer->data);
    free(buffer);
}

static void check_range(const struct buffer *buffer, size_t offset, size_t n_bytes)
{
    CHECK(offset <= buffer->n_bytes && n_bytes <= buffer->n_bytes - offset);
}

static enum status move(struct gpu *g, void *dst, const void *src, size_t n_bytes,
                        enum cudaMemcpyKind kind, struct error *err)
{
    if (gpu_ready(g))
        gpu_note(g, cudaMemcpyAsync(dst, src, n_bytes, kind, g->cuda.queue.stream),
                 "cudaMemcpyAsync");
    if (gpu_ready(g)) /* between buffers, too: slots go to the host on a stream of their own */
        gpu_note(g, cudaStreamSynchronize(g->cuda.queue.stream), "a copy of memory");
    return gpu_status(g, err);
}

enum status gpu_write(struct backend *b, struct buffer *dst, size_t offset, const void *src,
                      size_t n_bytes, struct error *err)
{
    check_range(dst, offset, n_bytes);
    return move(gpu_of(b), (char *)dst->data + offset, src, n_bytes, cudaMemcpyHostToDevice, err);
}

enum status gpu_read(struct backend *b, void *dst, const struct buffer *src, size_t offset,
                     size_t n_bytes, struct error *err)
{
    check_range(src, offset, n_bytes);
    return move(gpu_of(b), dst, (const char *)src->data + offset, n_bytes, cudaMemcpyDeviceToHost,
                err);
}

enum status gpu_copy(struct backend *b, struct buffer *dst, size_t dst_offset,
                     const struct buffer *src, size_t src_offset, size_t n_bytes, struct error *err)
{
    check_range(dst, dst_offset, n_bytes);
    check_range(src, src_offset, n_bytes);
    return move(gpu_of(b), (char *)dst->data + dst_offset, (const char *)src->data + src_offset,
                n_bytes, cudaMemcpyDeviceToDevice, err);
}

const void *gpu_map(struct backend *b, const struct buffer *buffer, size_t n_bytes)
{
    struct gpu *g = gpu_of(b);
    struct error unused;
    if (n_bytes > g->mapped_bytes) {
        free(g->mapped);
        g->mapped = (float *)malloc(n_bytes);
        g->mapped_bytes = g->mapped ? n_bytes : 0;
    }
    if (!g->mapped || gpu_read(b, g->mapped, buffer, 0, n_bytes, &unused))
        return NULL;
    return g->mapped;
}

/* ---- weights ---- */

static enum status take_weight(struct gpu *g, struct buffer **out, size_t n_bytes,
                               struct error *err)
{
    struct buffer *buffer = (struct buffer *)calloc(1, sizeof(*buffer));
    if (!buffer)
        return fail(err, STATUS_NOMEM, "linear: out of memory");
    enum status st = gpu_take(g, &buffer->data, n_bytes, err);
    if (st) {
        free(buffer);
        return st;
    }
    buffer->n_bytes = n_bytes;
    buffer->owns = true;
    g->weight_bytes += n_bytes;
    *out = buffer;
    return STATUS_OK;
}

/* The first matrix of a group owns the block, and the others lie in it: linears of a layer are
 * closed together. Room for alignment and for scales is always there. */
enum status gpu_linear_group(struct backend *b, int n, size_t n_bytes, size_t n_rows,
                             struct error *err)
{
    struct gpu *g = gpu_of(b);
    CHECK(g->group.n_left == 0 && n > 0);
    const size_t weights = align_up(n_bytes + (size_t)n * ROW_ALIGNMENT, ALIGNMENT);
    void *data = NULL;
    enum status st = gpu_take(g, &data, weights + n_rows * sizeof(float), err);
    if (st)
        return st;
    g->weight_bytes += weights + n_rows * sizeof(float);
    g->group = (struct linear_block){(char *)data, (char *)data + weights, 0, weights, 0, n};
    return STATUS_OK;
}

static struct buffer *view(void *data, size_t n_bytes, bool owns)
{
    struct buffer *buffer = (struct buffer *)calloc(1, sizeof(*buffer));
    if (buffer)
        *buffer = (struct buffer){data, n_bytes, owns};
    return buffer;
}

static enum status take_from_group(struct gpu *g, struct linear *out, size_t n_bytes,
                                   struct error *err)
{
    struct linear_block *group = &g->group;
    const bool first = group->used == 0;
    CHECK(group->used + n_bytes <= group->n_bytes);
    out->weight = view(group->data + group->used, n_bytes, first);
    if (!out->weight) {
        if (first)
            (void)cudaFree(group->data);
        *group = (struct linear_block){};
        return fail(err, STATUS_NOMEM, "linear: out of memory");
    }
    group->used = align_up(group->used + n_bytes, ROW_ALIGNMENT);
    if (out->dtype == DTYPE_I8) {
        out->scales = view(group->scales + group->n_scales_used * sizeof(float),
                           (size_t)out->n_out * sizeof(float), false);
        group->n_scales_used += (size_t)out->n_out;
        if (!out->scales)
            return fail(err, STATUS_NOMEM, "linear: out of memory");
    }
    group->n_left--;
    if (!group->n_left)
        *group = (struct linear_block){};
    return STATUS_OK;
}

/* With rows of zeros up to a multiple of PADDED_ROWS: cuda_head counts on them. */
static enum status take_alone(struct gpu *g, struct linear *out, size_t n_bytes, struct error *err)
{
    const size_t row_bytes = n_bytes / (size_t)out->n_out;
    const size_t padded = align_up((size_t)out->n_out, PADDED_ROWS) * row_bytes;
    enum status st = take_weight(g, &out->weight, padded, err);
    if (!st)
        gpu_note(g,
                 cudaMemsetAsync((char *)out->weight->data + n_bytes, 0, padded - n_bytes,
                                 g->cuda.queue.stream),
                 "cudaMemsetAsync");
    if (!st && out->dtype == DTYPE_I8)
        st = take_weight(g, &out->scales, (size_t)out->n_out * sizeof(float), err);
    return st;
}

void gpu_linear_close(struct backend *b, struct linear *l)
{
    gpu_buffer_close(b, l->weight);
    gpu_buffer_close(b, l->scales);
    gpu_buffer_close(b, l->bias);
    *l = (struct linear){};
}

enum status gpu_linear_open(struct backend *b, struct linear *out, const void *src,
                            enum dtype src_dtype, struct error *err)
{
    struct gpu *g = gpu_of(b);
    const size_t n_bytes = (size_t)out->n_out * (size_t)out->n_in * dtype_bytes(out->dtype);
    enum status st =
        g->group.n_left ? take_from_group(g, out, n_bytes, err) : take_alone(g, out, n_bytes, err);
    if (!st)
        st = linear_upload(&g->cuda, out->weight->data, floats(out->scales), out->dtype, src,
                           src_dtype, out->n_out, out->n_in, err);
    if (st)
        gpu_linear_close(b, out);
    return st;
}
