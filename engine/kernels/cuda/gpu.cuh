/* gpu.cuh - the CUDA backend as its own four files see it: backend_cuda.cu opens and closes it,
 * memory.cu has buffers and weights, steps.cu steps and graphs, slots.cu slots that come and go.
 *
 * Threads: as backend.h. Memory: see each field. Errors: the device's first failure is kept in
 * cuda.queue.error and stays; device_status words it.
 */
#ifndef LATTE_CUDA_GPU_CUH
#define LATTE_CUDA_GPU_CUH

#include "engine/kernels/cuda/cuda.cuh"

enum {
    DEPTH = STEP_PLACES, /* steps in flight */
    MAX_GRAPHS = 256,    /* recorded forms; later ones are launched kernel by kernel */
    ALIGNMENT = 256,     /* of buffers and of arrays in the step's block */
    ROW_ALIGNMENT = 16,  /* of matrices in a group: stacked when their bytes allow */
};

/* What one graph is good for. Compared as bytes: no padding, unused fields zero. */
struct form {
    int32_t rows, seqs, n_pieces, logits;
    int32_t decode, draws, scores;
};

struct recorded {
    struct form form;
    int n_seen;
    const char *layers;    /* as cuda.layers; NULL until submitted */
    bool may_be_late;      /* as cuda.may_be_late; false until submitted */
    cudaGraphExec_t graph; /* NULL until captured */
};

/* Byte offsets of a step's arrays in its block. */
struct layout {
    size_t sizes, tokens, positions, row_slot, seq_slot, seq_start, pieces, logit_rows;
    size_t n_bytes;
};

/* Where one of the steps in flight lives on the host. */
struct place {
    unsigned char *staging; /* pinned, [block_bytes] */
    cudaEvent_t done;       /* the step, whose results are with the host then */
};

struct linear_block {
    char *data, *scales;
    size_t used, n_bytes, n_scales_used;
    int n_left; /* linears still to come */
};

struct gpu_slots; /* slots.cu's own */

struct gpu {
    struct cuda cuda;     /* first: a struct backend, too */
    unsigned char *block; /* device, [block_bytes] the step's arrays */
    size_t block_bytes;
    struct place places[DEPTH];
    int32_t *turn;                          /* device: the place of the step that begins next */
    int64_t n_begun, n_submitted, n_waited; /* steps; place = count % DEPTH */
    struct recorded *recorded;              /* [MAX_GRAPHS] */
    int n_recorded;
    struct recorded *current; /* of the step being queued */
    bool capturing, replaying;
    struct linear_block group;
    struct gpu_slots *slots; /* NULL until slots_open */
    float *mapped;           /* host, what map returns */
    size_t mapped_bytes;
    size_t weight_bytes, buffer_bytes, workspace_bytes;
    char name[128];
};

static inline struct gpu *gpu_of(struct backend *b)
{
    return (struct gpu *)b;
}

static inline size_t align_up(size_t n, size_t alignment)
{
    return (n + alignment - 1) / alignment * alignment;
}

/* ---- errors, in backend_cuda.cu ---- */

/* Keep a failure, if it is the first. */
void gpu_note(struct gpu *g, cudaError_t error, const char *where);
/* OK, or DEVICE with the first failure. */
enum status gpu_status(struct gpu *g, struct error *err);
/* Whether the device still works; makes it this thread's current one. */
bool gpu_ready(struct gpu *g);

/* ---- memory.cu: ops, and device memory that is nobody's buffer ---- */

/* NOMEM says how much is free. The block is released with cudaFree. */
enum status gpu_take(struct gpu *g, void **out, size_t n_bytes, struct error *err);
enum status gpu_take_zeroed(struct gpu *g, void **out, size_t n_bytes, struct error *err);

enum status gpu_buffer_open(struct backend *b, struct buffer **out, size_t n_bytes,
                            struct error *err);
void gpu_buffer_close(struct backend *b, struct buffer *buffer);
enum status gpu_write(struct backend *b, struct buffer *dst, size_t offset, const void *src,
                      size_t n_bytes, struct error *err);
enum status gpu_read(struct backend *b, void *dst, const struct buffer *src, size_t offset,
                     size_t n_bytes, struct error *err);
enum status gpu_copy(struct backend *b, struct buffer *dst, size_t dst_offset,
                     const struct buffer *src, size_t src_offset, size_t n_bytes,
                     struct error *err);
const void *gpu_map(struct backend *b, const struct buffer *buffer, size_t n_bytes);
enum status gpu_linear_group(struct backend *b, int n, size_t n_bytes, size_t n_rows,
                             struct error *err);
enum status gpu_linear_open(struct backend *b, struct linear *out, const void *src,
                            enum dtype src_dtype, struct error *err);
void gpu_linear_close(struct backend *b, struct linear *l);

/* ---- slots.cu ---- */

enum status gpu_slots_open(struct backend *b, const struct slab *const *slabs, int n_slabs,
                           int *most, struct error *err);
void gpu_slots_close(struct gpu *g); /* accepts one that was not opened, or half */
void gpu_slots_step(struct gpu *g, const struct step *step); /* the step that is begun has these */
enum status gpu_fetch(struct backend *b, int slot, struct error *err);
enum status gpu_fetched(struct backend *b, bool wait, const void **block, struct error *err);
enum status gpu_stage(struct backend *b, void **block, struct error *err);
enum status gpu_put(struct backend *b, int slot, struct error *err);

/* ---- steps.cu ---- */

size_t gpu_block_bytes(const struct backend_options *options); /* of the largest step's arrays */
int gpu_next_rows(const struct backend *b, int n);
const char *gpu_layers(const struct backend *b);
bool gpu_begin(struct backend *b, const struct step *step);
enum status gpu_submit(struct backend *b, struct error *err);
enum status gpu_wait(struct backend *b, const struct sampled **results, struct error *err);

#endif
