/* slots.cu - see gpu.cuh: whole slots to the host and back, beside the steps.
 *
 * A slot is a row of each of many slabs. One kernel copies them all between the slabs and a block
 * of pinned host memory, which it reads and writes across the bus by itself: a launch and an event
 * for a slot, where a copy of each row would be a call of a few microseconds. Slots that leave and
 * slots that come have a stream each, beside that of the steps.
 *
 * Order: a copy waits for the last step that had its slot, if that is still on its way. Steps wait
 * for slots that come, and slots that leave for those, too. Nothing else waits for anything: that
 * a slot rests while it leaves is the caller's part (backend.h).
 */
#include <stdlib.h>
#include <string.h>

#include "engine/kernels/cuda/gpu.cuh"

enum {
    MAX_LANES = 8, /* slots under way in a direction */
    COPY_THREADS = 256,
    COPY_BLOCKS = 16, /* for a row, at most: enough to fill the bus */
    COPY_WORDS = 4,   /* of 16 bytes for a thread, before there are more blocks */
};

static const size_t PINNED_BYTES = 64 << 20; /* of all lanes, while each direction has one */

/* A slab, and where its row lies in a block. */
struct slot_row {
    unsigned char *slab;
    size_t n_bytes, offset;
};

/* A block that a slot goes through. */
struct lane {
    unsigned char *block; /* pinned, [block_bytes] */
    cudaEvent_t done;     /* its last copy */
};

/* In one direction: lanes are used in turns. */
struct lanes {
    cudaStream_t stream;
    int n;
    struct lane list[MAX_LANES]; /* [n] */
    uint64_t n_begun, n_over;    /* copies; lane = count % n */
};

struct gpu_slots {
    struct slot_row *rows; /* device, [n_rows] */
    int n_rows, copy_blocks;
    size_t block_bytes;
    int64_t *last_step; /* [n_slots] number of the last submitted step that had it, -1: none */
    struct lanes out, in;
};

template <class T>
static __device__ void copy_row(unsigned char *to, const unsigned char *from, size_t n_bytes)
{
    const size_t stride = (size_t)gridDim.x * blockDim.x;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n_bytes / sizeof(T);
         i += stride)
        ((T *)to)[i] = ((const T *)from)[i];
}

/* Rows of a slab follow each other without a gap: their length tells how they are aligned. */
static __global__ void __launch_bounds__(COPY_THREADS)
    copy_slot(const struct slot_row *rows, unsigned char *block, int slot, bool out)
{
    pdl_wait();
    const struct slot_row row = rows[blockIdx.y];
    unsigned char *in_slab = row.slab + (size_t)slot * row.n_bytes, *in_block = block + row.offset;
    unsigned char *to = out ? in_block : in_slab;
    const unsigned char *from = out ? in_slab : in_block;
    if (row.n_bytes % sizeof(uint4) == 0)
        copy_row<uint4>(to, from, row.n_bytes);
    else if (row.n_bytes % sizeof(uint32_t) == 0)
        copy_row<uint32_t>(to, from, row.n_bytes);
    else
        copy_row<unsigned char>(to, from, row.n_bytes);
}

/* ---- opening ---- */

static enum status open_rows(struct gpu *g, const struct slab *const *slabs, struct error *err)
{
    struct gpu_slots *s = g->slots;
    const size_t n_bytes = (size_t)s->n_rows * sizeof(struct slot_row);
    struct slot_row *rows = (struct slot_row *)calloc((size_t)s->n_rows, sizeof(*rows));
    size_t longest = 0;
    if (!rows)
        return fail(err, STATUS_NOMEM, "%s: out of memory for the rows of a slot", g->name);
    const size_t n_slots = (size_t)g->cuda.options.n_slots;
    for (int i = 0; i < s->n_rows; i++) {
        const size_t offset = align_up(s->block_bytes, SLOT_ROW_ALIGNMENT);
        const size_t row_bytes = (size_t)slabs[i]->row_values * dtype_bytes(slabs[i]->dtype);
        CHECK(row_bytes && n_slots <= slabs[i]->buffer->n_bytes / row_bytes);
        rows[i] = (struct slot_row){(unsigned char *)slabs[i]->buffer->data, row_bytes, offset};
        s->block_bytes = offset + row_bytes;
        longest = row_bytes > longest ? row_bytes : longest;
    }
    const size_t blocks = longest / (sizeof(uint4) * COPY_WORDS * COPY_THREADS) + 1;
    s->copy_blocks = blocks < COPY_BLOCKS ? (int)blocks : COPY_BLOCKS;
    enum status st = gpu_take(g, (void **)&s->rows, n_bytes, err);
    if (!st) {
        g->workspace_bytes += n_bytes;
        gpu_note(
            g,
            cudaMemcpyAsync(s->rows, rows, n_bytes, cudaMemcpyHostToDevice, g->cuda.queue.stream),
            "copying the rows of a slot");
        /* With it all slabs are as they were opened: copies need not wait for that. */
        gpu_note(g, cudaStreamSynchronize(g->cuda.queue.stream), "opening the slots");
        st = gpu_status(g, err);
    }
    free(rows);
    return st;
}

static enum status open_lanes(struct gpu *g, struct lanes *lanes, struct error *err)
{
    const struct gpu_slots *s = g->slots;
    const size_t n = PINNED_BYTES / 2 / s->block_bytes;
    lanes->n = n < 1 ? 1 : n < MAX_LANES ? (int)n : MAX_LANES;
    if (gpu_ready(g))
        gpu_note(g, cudaStreamCreateWithFlags(&lanes->stream, cudaStreamNonBlocking),
                 "cudaStreamCreate");
    for (int i = 0; i < lanes->n && gpu_ready(g); i++) {
        const cudaError_t error = cudaMallocHost((void **)&lanes->list[i].block, s->block_bytes);
        if (error == cudaErrorMemoryAllocation) {
            (void)cudaGetLastError(); /* running out is no failure of the device */
            if (i > 0) {
                lanes->n = i; /* fewer do as well */
                break;
            }
            return fail(
                err, STATUS_NOMEM,
                "%s: out of pinned host memory for a slot on its way to or from the device, %zu "
                "bytes; a container may limit it (ulimit -l)",
                g->name, s->block_bytes);
        }
        gpu_note(g, error, "cudaMallocHost");
        if (gpu_ready(g))
            gpu_note(g, cudaEventCreateWithFlags(&lanes->list[i].done, cudaEventDisableTiming),
                     "cudaEventCreate");
    }
    return gpu_status(g, err);
}

enum status gpu_slots_open(struct backend *b, const struct slab *const *slabs, int n_slabs,
                           int *most, struct error *err)
{
    struct gpu *g = gpu_of(b);
    const int n_slots = g->cuda.options.n_slots;
    struct gpu_slots *s = (struct gpu_slots *)calloc(1, sizeof(*s));
    int64_t *last_step =
        (int64_t *)malloc((size_t)(n_slots > 0 ? n_slots : 1) * sizeof(*last_step));
    CHECK(!g->slots && n_slabs > 0);
    if (!s || !last_step) {
        free(s);
        free(last_step);
        return fail(err, STATUS_NOMEM, "%s: out of memory for %d slots", g->name, n_slots);
    }
    g->slots = s; /* gpu_slots_close accepts a half-built one */
    s->n_rows = n_slabs;
    s->last_step = last_step;
    for (int i = 0; i < n_slots; i++)
        last_step[i] = -1;
    enum status st = open_rows(g, slabs, err);
    if (!st)
        st = open_lanes(g, &s->out, err);
    if (!st)
        st = open_lanes(g, &s->in, err);
    if (!st)
        *most = s->out.n;
    return st;
}

static void close_lanes(struct lanes *lanes)
{
    if (lanes->stream)
        (void)cudaStreamSynchronize(lanes->stream);
    for (int i = 0; i < MAX_LANES; i++) {
        (void)cudaFreeHost(lanes->list[i].block);
        if (lanes->list[i].done)
            (void)cudaEventDestroy(lanes->list[i].done);
    }
    if (lanes->stream)
        (void)cudaStreamDestroy(lanes->stream);
}

void gpu_slots_close(struct gpu *g)
{
    struct gpu_slots *s = g->slots;
    if (!s)
        return;
    close_lanes(&s->out);
    close_lanes(&s->in);
    (void)cudaFree(s->rows);
    free(s->last_step);
    free(s);
    g->slots = NULL;
}

/* ---- copies ---- */

static struct lane *lane_of(struct lanes *lanes, uint64_t copy)
{
    return &lanes->list[copy % (uint64_t)lanes->n];
}

void gpu_slots_step(struct gpu *g, const struct step *step)
{
    for (int i = 0; g->slots && i < step->n_seqs; i++)
        g->slots->last_step[step->seq_slot[i]] = g->n_submitted;
}

/* Queue a slot's copy behind the last step that had it; a step that was waited for is over. */
static void queue_copy(struct gpu *g, struct lanes *lanes, int slot, bool out)
{
    struct gpu_slots *s = g->slots;
    struct lane *lane = lane_of(lanes, lanes->n_begun);
    struct queue queue = g->cuda.queue;
    queue.stream = lanes->stream;
    queue.pdl = false;
    if (gpu_ready(g) && s->last_step[slot] >= g->n_waited)
        gpu_note(g,
                 cudaStreamWaitEvent(lanes->stream, g->places[s->last_step[slot] % DEPTH].done, 0),
                 "waiting for a slot's step");
    if (!gpu_ready(g))
        return;
    launch(&queue, "a slot's copy", copy_slot, dim3((unsigned)s->copy_blocks, (unsigned)s->n_rows),
           COPY_THREADS, 0, s->rows, lane->block, slot, out);
    gpu_note(g, queue.error, queue.where);
    if (gpu_ready(g))
        gpu_note(g, cudaEventRecord(lane->done, lanes->stream), "cudaEventRecord");
    lanes->n_begun++;
}

enum status gpu_fetch(struct backend *b, int slot, struct error *err)
{
    struct gpu *g = gpu_of(b);
    struct gpu_slots *s = g->slots;
    CHECK(slot >= 0 && slot < g->cuda.options.n_slots);
    CHECK(s->out.n_begun - s->out.n_over < (uint64_t)s->out.n);
    /* It may have come, and not been stepped. */
    if (gpu_ready(g) && s->in.n_begun)
        gpu_note(g, cudaStreamWaitEvent(s->out.stream, lane_of(&s->in, s->in.n_begun - 1)->done, 0),
                 "waiting for the slots that come");
    queue_copy(g, &s->out, slot, true);
    return gpu_status(g, err);
}

enum status gpu_fetched(struct backend *b, bool wait, const void **block, struct error *err)
{
    struct gpu *g = gpu_of(b);
    struct gpu_slots *s = g->slots;
    if (!gpu_ready(g))
        return gpu_status(g, err);
    CHECK(s->out.n_over != s->out.n_begun);
    const struct lane *lane = lane_of(&s->out, s->out.n_over);
    const cudaError_t error = wait ? cudaEventSynchronize(lane->done) : cudaEventQuery(lane->done);
    *block = NULL;
    if (error == cudaErrorNotReady) {
        (void)cudaGetLastError(); /* else the next failure would be taken for this */
        return STATUS_OK;
    }
    gpu_note(g, error, "a slot's copy to the host");
    if (!gpu_ready(g))
        return gpu_status(g, err);
    s->out.n_over++;
    *block = lane->block;
    return STATUS_OK;
}

enum status gpu_stage(struct backend *b, void **block, struct error *err)
{
    struct gpu *g = gpu_of(b);
    struct gpu_slots *s = g->slots;
    const struct lane *lane = lane_of(&s->in, s->in.n_begun);
    /* What went through it before; an event that was never recorded is no wait. */
    if (gpu_ready(g))
        gpu_note(g, cudaEventSynchronize(lane->done), "a slot's copy to the device");
    if (gpu_ready(g))
        *block = lane->block;
    return gpu_status(g, err);
}

enum status gpu_put(struct backend *b, int slot, struct error *err)
{
    struct gpu *g = gpu_of(b);
    struct gpu_slots *s = g->slots;
    CHECK(slot >= 0 && slot < g->cuda.options.n_slots);
    const struct lane *lane = lane_of(&s->in, s->in.n_begun);
    queue_copy(g, &s->in, slot, false);
    if (gpu_ready(g))
        gpu_note(g, cudaStreamWaitEvent(g->cuda.queue.stream, lane->done, 0),
                 "waiting for the slots that come");
    return gpu_status(g, err);
}
