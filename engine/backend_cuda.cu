/* backend_cuda.cu - the GPU behind backend.h: memory, steps, recorded graphs, errors.
 *
 * A step's arrays are taken from pinned memory by its first kernel, laid out for the step's
 * bucket: sizes rounded up, so that few forms of a step exist. The first step of a form is
 * launched kernel by kernel (the library may try algorithms), the second is captured into a
 * CUDA graph, all others replay it; slots, positions and tokens are data, not part of the form.
 * Two steps may be in flight: while one runs, the host fills the other half of the pinned
 * memory. Kernels are in kernels/cuda/.
 */
#include <stdio.h>
#include <stdlib.h>

#include "engine/kernels/cuda/gpu.cuh"
#include "engine/kernels/cuda/stream.cuh"

enum { LEAST_CAPABILITY = 80 };

/* ---- errors ---- */

void gpu_note(struct gpu *g, cudaError_t error, const char *where)
{
    if (error != cudaSuccess && g->cuda.queue.error == cudaSuccess) {
        g->cuda.queue.error = error;
        g->cuda.queue.where = where;
    }
}

/* The first failure of the device, which stays. */
enum status gpu_status(struct gpu *g, struct error *err)
{
    const struct queue *q = &g->cuda.queue;
    if (q->error == cudaSuccess)
        return STATUS_OK;
    return fail(err, STATUS_DEVICE, "%s: %s: %s (%s)", g->name, q->where,
                cudaGetErrorString(q->error), cudaGetErrorName(q->error));
}

/* A thread that calls CUDA works on the device it chose last: choose, every time. */
bool gpu_ready(struct gpu *g)
{
    if (g->cuda.queue.error == cudaSuccess)
        gpu_note(g, cudaSetDevice(g->cuda.options.device), "cudaSetDevice");
    return g->cuda.queue.error == cudaSuccess;
}

static void gpu_memory(struct backend *b, struct backend_memory *out)
{
    struct gpu *g = gpu_of(b);
    *out = (struct backend_memory){};
    snprintf(out->device, sizeof(out->device), "%s", g->name);
    if (gpu_ready(g))
        gpu_note(g, cudaMemGetInfo(&out->free_bytes, &out->total_bytes), "cudaMemGetInfo");
    out->weight_bytes = g->weight_bytes;
    out->buffer_bytes = g->buffer_bytes;
    out->workspace_bytes = g->workspace_bytes;
}

/* ---- opening ---- */

/* Scratch of single ops, in values. */
struct scratch_sizes {
    size_t converted, piece_states, piece_values, partials;
    int max_pieces;
};

static size_t larger(size_t a, size_t b)
{
    return a > b ? a : b;
}

static struct scratch_sizes scratch_sizes_of(const struct backend_options *o)
{
    const struct model_config *c = o->config;
    struct scratch_sizes s = {};
    const size_t rows = larger((size_t)o->max_rows, (size_t)o->max_logit_rows);
    s.converted = rows * align_up((size_t)o->max_dim, 8);
    s.max_pieces = o->max_rows / PIECE_ROWS + o->max_seqs;
    s.piece_values = 2 * (size_t)o->max_dim;
    /* Without a configuration only single ops will be called, on small shapes. */
    if (c)
        s.piece_values = larger(s.piece_values, (size_t)c->n_latents * (size_t)(c->head_dim + 2));
    else
        s.piece_values *= 64;
    s.piece_values = align_up(s.piece_values, 4); /* pieces' states are read 16 bytes at a time */
    s.partials = c ? larger(window_partials(o), stream_partials(o))
                   : (size_t)o->max_seqs * (size_t)o->max_dim * 64;
    s.piece_states = (size_t)s.max_pieces * s.piece_values;
    return s;
}

static size_t scratch_bytes(const struct scratch_sizes *s)
{
    return s->converted * sizeof(bf16) + (s->piece_states + s->partials) * sizeof(float);
}

static enum status open_scratch(struct gpu *g, struct error *err)
{
    struct cuda *c = &g->cuda;
    const struct scratch_sizes s = scratch_sizes_of(&c->options);
    c->max_pieces = s.max_pieces;
    c->piece_values = s.piece_values;
    c->partial_values = s.partials;
    enum status st = gpu_take_zeroed(g, (void **)&c->converted, s.converted * sizeof(bf16), err);
    if (!st)
        st = gpu_take_zeroed(g, (void **)&c->piece_states, s.piece_states * sizeof(float), err);
    if (!st)
        st = gpu_take_zeroed(g, (void **)&c->partials, s.partials * sizeof(float), err);
    g->workspace_bytes += scratch_bytes(&s);
    return st;
}

static enum status open_places(struct gpu *g, struct error *err)
{
    g->block_bytes = gpu_block_bytes(&g->cuda.options);
    enum status st = gpu_take_zeroed(g, (void **)&g->block, g->block_bytes, err);
    g->workspace_bytes += g->block_bytes;
    if (!st)
        st = gpu_take_zeroed(g, (void **)&g->turn, sizeof(*g->turn), err);
    for (int i = 0; !st && i < DEPTH; i++) {
        gpu_note(g, cudaMallocHost((void **)&g->places[i].staging, g->block_bytes),
                 "cudaMallocHost");
        if (g->cuda.queue.error == cudaSuccess)
            memset(g->places[i].staging, 0, g->block_bytes);
        gpu_note(g, cudaEventCreateWithFlags(&g->places[i].done, cudaEventDisableTiming),
                 "cudaEventCreate");
        st = gpu_status(g, err);
    }
    return st;
}

static enum status open_device(struct gpu *g, struct error *err)
{
    struct queue *q = &g->cuda.queue;
    const int device = g->cuda.options.device, n = backend_cuda_count();
    if (device < 0 || device >= n)
        return fail(err, STATUS_DEVICE, "device cuda:%d: this machine has %d CUDA device%s", device,
                    n, n == 1 ? "" : "s");
    struct cudaDeviceProp props;
    snprintf(g->name, sizeof(g->name), "cuda:%d", device);
    gpu_note(g, cudaGetDeviceProperties(&props, device), "cudaGetDeviceProperties");
    if (!gpu_ready(g))
        return gpu_status(g, err);
    snprintf(g->name, sizeof(g->name), "%.100s (cuda:%d)", props.name, device);
    q->capability = 10 * props.major + props.minor;
    q->n_sms = props.multiProcessorCount;
    q->l2_bytes = (size_t)props.l2CacheSize;
    q->deterministic = g->cuda.options.deterministic;
    q->pdl = q->capability >= 90 && !getenv("LATTE_NO_PDL");
    if (q->capability < LEAST_CAPABILITY)
        return fail(err, STATUS_UNSUPPORTED,
                    "%s has compute capability %d.%d; at least %d.%d is "
                    "needed",
                    g->name, props.major, props.minor, LEAST_CAPABILITY / 10,
                    LEAST_CAPABILITY % 10);
    gpu_note(g, cudaStreamCreateWithFlags(&q->stream, cudaStreamNonBlocking), "cudaStreamCreate");
    return gpu_status(g, err);
}

static void gpu_close(struct backend *b)
{
    struct gpu *g = gpu_of(b);
    struct cuda *c = &g->cuda;
    (void)cudaSetDevice(c->options.device);
    if (c->queue.stream)
        (void)cudaStreamSynchronize(c->queue.stream);
    gpu_slots_close(g);
    for (int i = 0; i < g->n_recorded; i++)
        if (g->recorded[i].graph)
            (void)cudaGraphExecDestroy(g->recorded[i].graph);
    if (c->drawing)
        drawing_close(c->drawing);
    if (c->library)
        library_close(c->library);
    layer_scratch_close(c);
    void *const owned[] = {c->converted, c->piece_states, c->partials, g->block, g->turn};
    for (size_t i = 0; i < sizeof(owned) / sizeof(*owned); i++)
        (void)cudaFree(owned[i]);
    for (int i = 0; i < DEPTH; i++) {
        (void)cudaFreeHost(g->places[i].staging);
        if (g->places[i].done)
            (void)cudaEventDestroy(g->places[i].done);
    }
    if (c->queue.stream)
        (void)cudaStreamDestroy(c->queue.stream);
    free(g->recorded);
    free(g->mapped);
    free(g);
}

#define GPU_OPS                                                                                    \
    .name = "cuda", .close = gpu_close, .buffer_open = gpu_buffer_open,                            \
    .buffer_close = gpu_buffer_close, .write = gpu_write, .read = gpu_read, .copy = gpu_copy,      \
    .linear_open = gpu_linear_open, .linear_close = gpu_linear_close, .begin = gpu_begin,          \
    .submit = gpu_submit, .wait = gpu_wait, .depth = DEPTH, .map = gpu_map, .embed = cuda_embed,   \
    .norm = cuda_norm, .head_norm = cuda_head_norm, .linear = cuda_linear, .add = cuda_add,        \
    .activate = cuda_activate, .gather = cuda_gather, .softcap = cuda_softcap, .conv = cuda_conv,  \
    .rglru = cuda_rglru, .block_linear = cuda_block_linear, .rope = cuda_rope,                     \
    .vapor = cuda_vapor, .latent = cuda_latent, .window = cuda_window

#define GPU_SLOT_OPS                                                                               \
    .slots_open = gpu_slots_open, .fetch = gpu_fetch, .fetched = gpu_fetched, .stage = gpu_stage,  \
    .put = gpu_put, .is_device = true

static const struct backend_ops fused_ops = {
    GPU_OPS,
    .layer = cuda_layer,
    .head = cuda_head,
    .linear_group = gpu_linear_group,
    .admit = cuda_admit,
    .draw = cuda_draw,
    .note = cuda_note,
    GPU_SLOT_OPS,
    .memory = gpu_memory,
    .next_rows = gpu_next_rows,
    .layers = gpu_layers,
};

static const struct backend_ops composed_ops = {
    GPU_OPS,
    .layer = NULL,
    .head = NULL,
    .linear_group = gpu_linear_group,
    .admit = cuda_admit,
    .draw = cuda_draw,
    .note = cuda_note,
    GPU_SLOT_OPS,
    .memory = gpu_memory,
    .next_rows = NULL, /* nothing is recorded */
    .layers = NULL,
};

extern "C" int backend_cuda_count(void)
{
    int n = 0;
    if (cudaGetDeviceCount(&n) != cudaSuccess) {
        (void)cudaGetLastError();
        return 0;
    }
    return n;
}

extern "C" enum status backend_cuda_open(struct backend **out,
                                         const struct backend_options *options, struct error *err)
{
    struct gpu *g = (struct gpu *)calloc(1, sizeof(*g));
    if (!g)
        return fail(err, STATUS_NOMEM, "cuda backend: out of memory");
    struct cuda *c = &g->cuda;
    c->base.ops = options->composed ? &composed_ops : &fused_ops;
    c->options = *options;
    g->recorded = (struct recorded *)calloc(MAX_GRAPHS, sizeof(*g->recorded));
    enum status st = STATUS_OK;
    if (!g->recorded)
        st = fail(err, STATUS_NOMEM, "cuda backend: out of memory");
    if (!st)
        st = open_device(g, err);
    if (!st)
        st = open_places(g, err);
    if (!st)
        st = open_scratch(g, err);
    if (!st)
        st = library_open(&c->library, c, err);
    if (!st && c->options.config && !c->options.composed)
        st = layer_scratch_open(c, err);
    if (!st && c->options.config)
        st = drawing_open(&c->drawing, c, err);
    if (st) {
        gpu_close(&c->base);
        return st;
    }
    g->workspace_bytes += library_bytes(c->library) + layer_scratch_bytes(c) +
                          (c->drawing ? drawing_bytes(c->drawing) : 0);
    c->options.config = NULL; /* borrowed while opening */
    *out = &c->base;
    return STATUS_OK;
}

extern "C" enum status backend_cuda_probe(const struct backend_options *options,
                                          struct backend_memory *out, struct error *err)
{
    struct cudaDeviceProp props;
    *out = (struct backend_memory){};
    cudaError_t error = cudaSetDevice(options->device);
    if (error == cudaSuccess)
        error = cudaGetDeviceProperties(&props, options->device);
    if (error == cudaSuccess)
        error = cudaMemGetInfo(&out->free_bytes, &out->total_bytes);
    if (error != cudaSuccess) {
        (void)cudaGetLastError();
        return fail(err, STATUS_DEVICE, "device cuda:%d: %s", options->device,
                    cudaGetErrorString(error));
    }
    snprintf(out->device, sizeof(out->device), "%.100s (cuda:%d)", props.name, options->device);
    if (!options->config) /* asked for the device alone */
        return STATUS_OK;
    const struct scratch_sizes s = scratch_sizes_of(options);
    out->workspace_bytes = gpu_block_bytes(options) + scratch_bytes(&s) +
                           library_bytes_of(options) + layer_scratch_bytes_of(options) +
                           drawing_bytes_of(options);
    return STATUS_OK;
}
