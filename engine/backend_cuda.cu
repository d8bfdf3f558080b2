/* backend_cuda.cu - the GPU behind backend.h: memory, steps, recorded graphs, errors.
 *
 * A step's arrays go to the device in one copy from pinned memory, laid out for the step's
 * bucket: sizes rounded up, so that few forms of a step exist. The first step of a form is
 * launched kernel by kernel (the library may try algorithms), the second is captured into a
 * CUDA graph, all others replay it; slots, positions and tokens are data, not part of the form.
 * Two steps may be in flight: while one runs, the host fills the other half of the pinned
 * memory. Kernels are in kernels/cuda/.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/kernels/cuda/cuda.cuh"

enum {
    DEPTH = 2,
    MAX_GRAPHS = 256,
    ALIGNMENT = 256,    /* of buffers and of arrays in the step's block */
    ROW_ALIGNMENT = 16, /* of matrices in a group: stacked when their bytes allow */
    LEAST_CAPABILITY = 80,
};

/* What one graph is good for. Compared as bytes: no padding, unused fields zero. */
struct form {
    int32_t rows, seqs, n_pieces, logits;
    int32_t decode, draws, scores;
};

struct recorded {
    struct form form;
    int n_seen;
    cudaGraphExec_t graph; /* NULL until captured */
};

/* Byte offsets of a step's arrays in its block. */
struct layout {
    size_t sizes, tokens, wanted, positions, row_slot, seq_slot, seq_start, pieces, logit_rows;
    size_t n_copied, n_bytes; /* resolved tokens lie behind what is copied */
};

/* Where one of the steps in flight lives on the host. */
struct place {
    unsigned char *staging; /* pinned, [block_bytes] */
    cudaEvent_t done;       /* the step and the copy of its results */
};

struct linear_block {
    char *data, *scales;
    size_t used, n_bytes, n_scales_used;
    int n_left; /* linears still to come */
};

struct gpu {
    struct cuda cuda;     /* first: a struct backend, too */
    unsigned char *block; /* device, [block_bytes] the step's arrays */
    size_t block_bytes;
    struct place places[DEPTH];
    int n_submitted, n_waited; /* steps; place = count % DEPTH */
    struct recorded *recorded; /* [MAX_GRAPHS] */
    int n_recorded;
    struct recorded *current; /* of the step being queued */
    bool capturing, replaying;
    struct linear_block group;
    float *mapped; /* host, what map returns */
    size_t mapped_bytes;
    size_t weight_bytes, buffer_bytes, workspace_bytes;
    char name[128];
};

static struct gpu *gpu_of(struct backend *b)
{
    return (struct gpu *)b;
}

/* ---- errors ---- */

static void note(struct gpu *g, cudaError_t error, const char *where)
{
    if (error != cudaSuccess && g->cuda.queue.error == cudaSuccess) {
        g->cuda.queue.error = error;
        g->cuda.queue.where = where;
    }
}

/* The first failure of the device, which stays. */
static enum status device_status(struct gpu *g, struct error *err)
{
    const struct queue *q = &g->cuda.queue;
    if (q->error == cudaSuccess)
        return STATUS_OK;
    return fail(err, STATUS_DEVICE, "%s: %s: %s (%s)", g->name, q->where,
                cudaGetErrorString(q->error), cudaGetErrorName(q->error));
}

/* A thread that calls CUDA works on the device it chose last: choose, every time. */
static bool ready(struct gpu *g)
{
    if (g->cuda.queue.error == cudaSuccess)
        note(g, cudaSetDevice(g->cuda.options.device), "cudaSetDevice");
    return g->cuda.queue.error == cudaSuccess;
}

/* ---- memory ---- */

static size_t align_up(size_t n, size_t alignment)
{
    return (n + alignment - 1) / alignment * alignment;
}

static enum status take(struct gpu *g, void **out, size_t n_bytes, struct error *err)
{
    if (!ready(g))
        return device_status(g, err);
    cudaError_t error = cudaMalloc(out, n_bytes ? n_bytes : 1);
    if (error == cudaSuccess)
        return STATUS_OK;
    (void)cudaGetLastError(); /* running out is no failure of the device */
    if (error != cudaErrorMemoryAllocation) {
        note(g, error, "cudaMalloc");
        return device_status(g, err);
    }
    size_t free_bytes = 0, total_bytes = 0;
    (void)cudaMemGetInfo(&free_bytes, &total_bytes);
    return fail(err, STATUS_NOMEM,
                "%s: %zu bytes of device memory are not to be had: %zu of %zu are free", g->name,
                n_bytes, free_bytes, total_bytes);
}

static enum status take_zeroed(struct gpu *g, void **out, size_t n_bytes, struct error *err)
{
    enum status st = take(g, out, n_bytes, err);
    if (!st)
        note(g, cudaMemsetAsync(*out, 0, n_bytes, g->cuda.queue.stream), "cudaMemsetAsync");
    return st;
}

static enum status gpu_buffer_open(struct backend *b, struct buffer **out, size_t n_bytes,
                                   struct error *err)
{
    struct gpu *g = gpu_of(b);
    struct buffer *buffer = (struct buffer *)calloc(1, sizeof(*buffer));
    if (!buffer)
        return fail(err, STATUS_NOMEM, "buffer: out of memory");
    enum status st = take_zeroed(g, &buffer->data, n_bytes, err);
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

static void gpu_buffer_close(struct backend *b, struct buffer *buffer)
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
    if (ready(g))
        note(g, cudaMemcpyAsync(dst, src, n_bytes, kind, g->cuda.queue.stream), "cudaMemcpyAsync");
    if (ready(g) && kind != cudaMemcpyDeviceToDevice)
        note(g, cudaStreamSynchronize(g->cuda.queue.stream), "a copy between host and device");
    return device_status(g, err);
}

static enum status gpu_write(struct backend *b, struct buffer *dst, size_t offset, const void *src,
                             size_t n_bytes, struct error *err)
{
    check_range(dst, offset, n_bytes);
    return move(gpu_of(b), (char *)dst->data + offset, src, n_bytes, cudaMemcpyHostToDevice, err);
}

static enum status gpu_read(struct backend *b, void *dst, const struct buffer *src, size_t offset,
                            size_t n_bytes, struct error *err)
{
    check_range(src, offset, n_bytes);
    return move(gpu_of(b), dst, (const char *)src->data + offset, n_bytes, cudaMemcpyDeviceToHost,
                err);
}

static enum status gpu_copy(struct backend *b, struct buffer *dst, size_t dst_offset,
                            const struct buffer *src, size_t src_offset, size_t n_bytes,
                            struct error *err)
{
    check_range(dst, dst_offset, n_bytes);
    check_range(src, src_offset, n_bytes);
    return move(gpu_of(b), (char *)dst->data + dst_offset, (const char *)src->data + src_offset,
                n_bytes, cudaMemcpyDeviceToDevice, err);
}

static const void *gpu_map(struct backend *b, const struct buffer *buffer, size_t n_bytes)
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
    enum status st = take(g, &buffer->data, n_bytes, err);
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
static enum status gpu_linear_group(struct backend *b, int n, size_t n_bytes, size_t n_rows,
                                    struct error *err)
{
    struct gpu *g = gpu_of(b);
    CHECK(g->group.n_left == 0 && n > 0);
    const size_t weights = align_up(n_bytes + (size_t)n * ROW_ALIGNMENT, ALIGNMENT);
    void *data = NULL;
    enum status st = take(g, &data, weights + n_rows * sizeof(float), err);
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

static enum status take_alone(struct gpu *g, struct linear *out, size_t n_bytes, struct error *err)
{
    enum status st = take_weight(g, &out->weight, n_bytes, err);
    if (!st && out->dtype == DTYPE_I8)
        st = take_weight(g, &out->scales, (size_t)out->n_out * sizeof(float), err);
    return st;
}

static void gpu_linear_close(struct backend *b, struct linear *l)
{
    gpu_buffer_close(b, l->weight);
    gpu_buffer_close(b, l->scales);
    gpu_buffer_close(b, l->bias);
    *l = (struct linear){};
}

static enum status gpu_linear_open(struct backend *b, struct linear *out, const void *src,
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

/* ---- forms of steps ---- */

/* n rounded up: powers of two to 8, then four sizes an octave; never above most. */
static int bucket(int n, int most)
{
    int size = 1;
    while (size < n && size < 8)
        size *= 2;
    if (n > 8) {
        int octave = 8;
        while (octave * 2 < n)
            octave *= 2;
        size = octave;
        while (size < n)
            size += octave / 4;
    }
    return size < most ? size : most;
}

static struct form form_of(const struct gpu *g, const struct step *step)
{
    const struct backend_options *o = &g->cuda.options;
    struct form f = {};
    f.decode = step->n_rows == step->n_seqs;
    f.rows =
        bucket(step->n_rows, f.decode && o->max_seqs < o->max_rows ? o->max_seqs : o->max_rows);
    f.seqs = f.decode ? f.rows : bucket(step->n_seqs, o->max_seqs);
    f.n_pieces = f.decode ? f.rows : f.rows / PIECE_ROWS + f.seqs;
    f.logits = step->n_logit_rows == step->n_rows ? f.rows
               : step->n_logit_rows               ? bucket(step->n_logit_rows, o->max_logit_rows)
                                                  : 0;
    if (f.logits > o->max_logit_rows)
        f.logits = o->max_logit_rows;
    f.draws = step->n_draws > 0;
    f.scores = step->n_scores > 0;
    return f;
}

static struct layout layout_of(const struct form *f)
{
    struct layout l;
    size_t at = 0;
    const auto place = [&at](size_t n_bytes) {
        const size_t offset = at;
        at = align_up(at + n_bytes, ALIGNMENT);
        return offset;
    };
    l.sizes = place(sizeof(struct step_sizes));
    l.wanted = place((size_t)f->rows * sizeof(int32_t));
    l.positions = place((size_t)f->rows * sizeof(int64_t));
    l.row_slot = place((size_t)f->rows * sizeof(int32_t));
    l.seq_slot = place((size_t)f->seqs * sizeof(int32_t));
    l.seq_start = place((size_t)(f->seqs + 1) * sizeof(int32_t));
    l.pieces = place((size_t)f->n_pieces * sizeof(struct piece));
    l.logit_rows = place((size_t)f->logits * sizeof(int32_t));
    l.n_copied = at;
    l.tokens = place((size_t)f->rows * sizeof(int32_t));
    l.n_bytes = at;
    return l;
}

static size_t block_bytes_of(const struct backend_options *o)
{
    const struct form largest = {o->max_rows,
                                 o->max_seqs,
                                 o->max_rows / PIECE_ROWS + o->max_seqs,
                                 o->max_logit_rows,
                                 0,
                                 1,
                                 1};
    return layout_of(&largest).n_bytes;
}

static void fill_pieces(struct piece *pieces, const struct step *step, int32_t *n_pieces)
{
    int n = 0;
    for (int s = 0; s < step->n_seqs; s++) {
        const int first = n;
        for (int r = step->seq_start[s]; r < step->seq_start[s + 1]; r += PIECE_ROWS) {
            const int left = step->seq_start[s + 1] - r;
            pieces[n++] = (struct piece){s, r, left < PIECE_ROWS ? left : PIECE_ROWS, first};
        }
    }
    *n_pieces = n;
}

static void fill_block(unsigned char *at, const struct layout *l, const struct step *step)
{
    struct step_sizes *sizes = (struct step_sizes *)(at + l->sizes);
    *sizes = (struct step_sizes){
        .n_rows = step->n_rows,
        .n_seqs = step->n_seqs,
        .n_pieces = 0,
        .n_logit_rows = step->n_logit_rows,
        .n_draws = step->n_draws,
        .n_scores = step->n_scores,
    };
    int32_t *row_slot = (int32_t *)(at + l->row_slot);
    for (int s = 0; s < step->n_seqs; s++)
        for (int r = step->seq_start[s]; r < step->seq_start[s + 1]; r++)
            row_slot[r] = step->seq_slot[s];
    const size_t n_rows = (size_t)step->n_rows, n_seqs = (size_t)step->n_seqs;
    memcpy(at + l->wanted, step->tokens, n_rows * sizeof(int32_t));
    memcpy(at + l->positions, step->positions, n_rows * sizeof(int64_t));
    memcpy(at + l->seq_slot, step->seq_slot, n_seqs * sizeof(int32_t));
    memcpy(at + l->seq_start, step->seq_start, (n_seqs + 1) * sizeof(int32_t));
    if (step->n_logit_rows)
        memcpy(at + l->logit_rows, step->logit_rows, (size_t)step->n_logit_rows * sizeof(int32_t));
    fill_pieces((struct piece *)(at + l->pieces), step, &sizes->n_pieces);
}

static void point_step(struct gpu *g, const struct form *f, const struct layout *l)
{
    unsigned char *at = g->block;
    g->cuda.step = (struct device_step){
        .sizes = (const struct step_sizes *)(at + l->sizes),
        .tokens = (const int32_t *)(at + l->tokens),
        .wanted_tokens = (const int32_t *)(at + l->wanted),
        .positions = (const int64_t *)(at + l->positions),
        .row_slot = (const int32_t *)(at + l->row_slot),
        .seq_slot = (const int32_t *)(at + l->seq_slot),
        .seq_start = (const int32_t *)(at + l->seq_start),
        .pieces = (const struct piece *)(at + l->pieces),
        .logit_rows = (const int32_t *)(at + l->logit_rows),
        .rows = f->rows,
        .seqs = f->seqs,
        .n_pieces = f->n_pieces,
        .logits = f->logits,
        .decode = f->decode != 0,
    };
}

/* ---- steps ---- */

static struct recorded *find_form(struct gpu *g, const struct form *f)
{
    if (g->cuda.options.composed)
        return NULL;
    for (int i = 0; i < g->n_recorded; i++)
        if (!memcmp(&g->recorded[i].form, f, sizeof(*f)))
            return &g->recorded[i];
    if (g->n_recorded == MAX_GRAPHS)
        return NULL; /* launched kernel by kernel */
    struct recorded *r = &g->recorded[g->n_recorded++];
    *r = (struct recorded){*f, 0, NULL};
    return r;
}

static void begin_capture(struct gpu *g)
{
    g->capturing = true;
    note(g, cudaStreamBeginCapture(g->cuda.queue.stream, cudaStreamCaptureModeThreadLocal),
         "cudaStreamBeginCapture");
}

static bool gpu_begin(struct backend *b, const struct step *step)
{
    struct gpu *g = gpu_of(b);
    step_check(step, &g->cuda.options);
    CHECK(step->n_logit_rows <= g->cuda.options.max_logit_rows);
    CHECK(g->n_submitted - g->n_waited < DEPTH);
    const struct form form = form_of(g, step);
    const struct layout layout = layout_of(&form);
    CHECK(layout.n_bytes <= g->block_bytes);
    const int place = g->n_submitted % DEPTH;
    point_step(g, &form, &layout);
    if (!ready(g))
        return true;

    fill_block(g->places[place].staging, &layout, step);
    note(g,
         cudaMemcpyAsync(g->block, g->places[place].staging, layout.n_copied,
                         cudaMemcpyHostToDevice, g->cuda.queue.stream),
         "copying a step to the device");
    if (g->cuda.drawing)
        drawing_begin(&g->cuda, place, step);
    g->current = find_form(g, &form);
    g->replaying = g->current && g->current->graph;
    if (g->replaying)
        return true;
    if (g->current && g->current->n_seen++ > 0)
        begin_capture(g);
    cuda_resolve_tokens(&g->cuda, (int32_t *)g->cuda.step.tokens, g->cuda.step.wanted_tokens,
                        g->cuda.drawing ? drawing_tokens(g->cuda.drawing) : NULL);
    return false;
}

static void end_capture(struct gpu *g)
{
    cudaGraph_t graph = NULL;
    g->capturing = false;
    note(g, cudaStreamEndCapture(g->cuda.queue.stream, &graph), "cudaStreamEndCapture");
    if (graph && g->cuda.queue.error == cudaSuccess)
        note(g, cudaGraphInstantiate(&g->current->graph, graph, 0), "cudaGraphInstantiate");
    if (graph)
        (void)cudaGraphDestroy(graph);
}

static enum status gpu_submit(struct backend *b, struct error *err)
{
    struct gpu *g = gpu_of(b);
    const int place = g->n_submitted % DEPTH;
    if (g->capturing) {
        end_capture(g);
        g->replaying = true;
    }
    if (ready(g) && g->replaying)
        note(g, cudaGraphLaunch(g->current->graph, g->cuda.queue.stream), "cudaGraphLaunch");
    if (ready(g) && g->cuda.drawing)
        drawing_submit(&g->cuda, place);
    if (ready(g))
        note(g, cudaEventRecord(g->places[place].done, g->cuda.queue.stream), "cudaEventRecord");
    g->replaying = false;
    if (g->cuda.queue.error == cudaSuccess)
        g->n_submitted++;
    return device_status(g, err);
}

static enum status gpu_wait(struct backend *b, const struct sampled **results, struct error *err)
{
    struct gpu *g = gpu_of(b);
    if (!ready(g))
        return device_status(g, err);
    CHECK(g->n_waited < g->n_submitted);
    const int place = g->n_waited % DEPTH;
    note(g, cudaEventSynchronize(g->places[place].done), "a step");
    if (!ready(g))
        return device_status(g, err);
    g->n_waited++;
    if (results)
        *results = g->cuda.drawing ? drawing_results(&g->cuda, place) : NULL;
    return STATUS_OK;
}

static void gpu_memory(struct backend *b, struct backend_memory *out)
{
    struct gpu *g = gpu_of(b);
    *out = (struct backend_memory){};
    snprintf(out->device, sizeof(out->device), "%s", g->name);
    if (ready(g))
        note(g, cudaMemGetInfo(&out->free_bytes, &out->total_bytes), "cudaMemGetInfo");
    out->weight_bytes = g->weight_bytes;
    out->buffer_bytes = g->buffer_bytes;
    out->workspace_bytes = g->workspace_bytes;
}

/* ---- opening ---- */

/* Scratch of single ops, in values. */
struct scratch_sizes {
    size_t converted, piece_states, piece_values, partials, prompt_bytes;
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
    s.partials = c ? window_partials(o) : (size_t)o->max_seqs * (size_t)o->max_dim * 64;
    s.prompt_bytes = c ? prompt_scratch_bytes(o) : 0;
    s.piece_states = (size_t)s.max_pieces * s.piece_values;
    return s;
}

static size_t scratch_bytes(const struct scratch_sizes *s)
{
    return s->converted * sizeof(bf16) + (s->piece_states + s->partials) * sizeof(float) +
           s->prompt_bytes;
}

static enum status open_scratch(struct gpu *g, struct error *err)
{
    struct cuda *c = &g->cuda;
    const struct scratch_sizes s = scratch_sizes_of(&c->options);
    c->max_pieces = s.max_pieces;
    c->piece_values = s.piece_values;
    c->partial_values = s.partials;
    enum status st = take_zeroed(g, (void **)&c->converted, s.converted * sizeof(bf16), err);
    if (!st)
        st = take_zeroed(g, (void **)&c->piece_states, s.piece_states * sizeof(float), err);
    if (!st)
        st = take_zeroed(g, (void **)&c->partials, s.partials * sizeof(float), err);
    if (!st)
        st = take_zeroed(g, &c->prompt_scratch, s.prompt_bytes, err);
    g->workspace_bytes += scratch_bytes(&s);
    return st;
}

static enum status open_places(struct gpu *g, struct error *err)
{
    g->block_bytes = block_bytes_of(&g->cuda.options);
    enum status st = take_zeroed(g, (void **)&g->block, g->block_bytes, err);
    g->workspace_bytes += g->block_bytes;
    for (int i = 0; !st && i < DEPTH; i++) {
        note(g, cudaMallocHost((void **)&g->places[i].staging, g->block_bytes), "cudaMallocHost");
        if (g->cuda.queue.error == cudaSuccess)
            memset(g->places[i].staging, 0, g->block_bytes);
        note(g, cudaEventCreateWithFlags(&g->places[i].done, cudaEventDisableTiming),
             "cudaEventCreate");
        st = device_status(g, err);
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
    note(g, cudaGetDeviceProperties(&props, device), "cudaGetDeviceProperties");
    if (!ready(g))
        return device_status(g, err);
    snprintf(g->name, sizeof(g->name), "%.100s (cuda:%d)", props.name, device);
    q->capability = 10 * props.major + props.minor;
    q->n_sms = props.multiProcessorCount;
    q->deterministic = g->cuda.options.deterministic;
    q->pdl = q->capability >= 90 && !getenv("LATTE_NO_PDL");
    if (q->capability < LEAST_CAPABILITY)
        return fail(err, STATUS_UNSUPPORTED,
                    "%s has compute capability %d.%d; at least %d.%d is "
                    "needed",
                    g->name, props.major, props.minor, LEAST_CAPABILITY / 10,
                    LEAST_CAPABILITY % 10);
    note(g, cudaStreamCreateWithFlags(&q->stream, cudaStreamNonBlocking), "cudaStreamCreate");
    return device_status(g, err);
}

static void gpu_close(struct backend *b)
{
    struct gpu *g = gpu_of(b);
    struct cuda *c = &g->cuda;
    (void)cudaSetDevice(c->options.device);
    if (c->queue.stream)
        (void)cudaStreamSynchronize(c->queue.stream);
    for (int i = 0; i < g->n_recorded; i++)
        if (g->recorded[i].graph)
            (void)cudaGraphExecDestroy(g->recorded[i].graph);
    if (c->drawing)
        drawing_close(c->drawing);
    if (c->library)
        library_close(c->library);
    layer_scratch_close(c);
    void *const owned[] = {c->converted, c->piece_states, c->partials, c->prompt_scratch, g->block};
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

static const struct backend_ops fused_ops = {
    GPU_OPS,
    .layer = cuda_layer,
    .head = cuda_head,
    .linear_group = gpu_linear_group,
    .admit = cuda_admit,
    .draw = cuda_draw,
    .memory = gpu_memory,
};

static const struct backend_ops composed_ops = {
    GPU_OPS,
    .layer = NULL,
    .head = NULL,
    .linear_group = gpu_linear_group,
    .admit = cuda_admit,
    .draw = cuda_draw,
    .memory = gpu_memory,
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
    const struct scratch_sizes s = scratch_sizes_of(options);
    out->workspace_bytes = block_bytes_of(options) + scratch_bytes(&s) + library_bytes_of(options) +
                           layer_scratch_bytes_of(options) + drawing_bytes_of(options);
    return STATUS_OK;
}
