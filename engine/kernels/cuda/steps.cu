/* steps.cu - see gpu.cuh: the forms of steps, and how they are queued, recorded and replayed.
 *
 * A step begins with a kernel that takes its arrays out of pinned memory. Copies of the stream's
 * own would stand between two graphs: an H200 took 14 us from the end of one step to the beginning
 * of the next for two of them.
 */
#include <string.h>

#include "engine/kernels/cuda/gpu.cuh"

enum {
    TAKE_THREADS = 1024,
    TAKE_AT_ONCE = 4, /* of 16 bytes, a thread's reads on their way together */
    DISCARD_BLOCKS = 64,
};

/* ---- a step's arrays ---- */

/* Both arrays' as one: what is read comes all at once. */
static __device__ __forceinline__ void take_arrays(const struct step_arrays &a,
                                                   const struct step_arrays &b, int place)
{
    const uint4 *const from_a = place ? a.from[1] : a.from[0];
    const uint4 *const from_b = place ? b.from[1] : b.from[0];
    for (int first = threadIdx.x; first < a.n + b.n; first += TAKE_THREADS * TAKE_AT_ONCE) {
        uint4 held[TAKE_AT_ONCE];
#pragma unroll
        for (int i = 0; i < TAKE_AT_ONCE; i++) {
            const int at = first + i * TAKE_THREADS;
            if (at < a.n + b.n)
                held[i] = __ldcv(at < a.n ? from_a + at : from_b + (at - a.n));
        }
#pragma unroll
        for (int i = 0; i < TAKE_AT_ONCE; i++) {
            const int at = first + i * TAKE_THREADS;
            if (at < a.n + b.n)
                *(at < a.n ? a.to + at : b.to + (at - a.n)) = held[i];
        }
    }
}

/* One block, and with SPENT others, for what the step before has left: memory answers the first
 * only when they have ended. Steps take turns with the places; a recorded one does not know which
 * it has. Most kernels read the arrays before pdl_wait: what follows does not overlap with this
 * one, but for those that know them to be late. */
template <bool SPENT>
static __global__ void __launch_bounds__(TAKE_THREADS)
    take_step_kernel(const __grid_constant__ struct step_arrays step,
                     const __grid_constant__ struct step_arrays draws, int32_t *turn,
                     const struct spent_lines spent)
{
    static_assert(DEPTH == 2, "the other place's turn");
    pdl_trigger();
    pdl_wait();
    if (SPENT && blockIdx.x > 0) {
        const int first = ((int)blockIdx.x - 1) * TAKE_THREADS + (int)threadIdx.x;
        for (int i = first; i < spent.n; i += DISCARD_BLOCKS * TAKE_THREADS)
            discard_line(spent.first + (int64_t)i * LINE);
        return;
    }
    const int place = *turn;
    __syncthreads();
    if (threadIdx.x == 0)
        *turn = 1 - place;
    take_arrays(step, draws, place);
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

int gpu_next_rows(const struct backend *b, int n)
{
    const int most = ((const struct gpu *)b)->cuda.options.max_rows;
    return n < most ? bucket(n + 1, most) : 0;
}

const char *gpu_layers(const struct backend *b)
{
    return ((const struct gpu *)b)->cuda.layers;
}

static struct form form_of(const struct gpu *g, const struct step *step)
{
    const struct backend_options *o = &g->cuda.options;
    struct form f = {};
    /* Beside a prompt a decode row takes the prompt's kernels: where bits must not depend on the
     * company it always does. */
    f.decode = step->n_rows == step->n_seqs && !o->deterministic;
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
    l.tokens = place((size_t)f->rows * sizeof(int32_t));
    l.positions = place((size_t)f->rows * sizeof(int64_t));
    l.row_slot = place((size_t)f->rows * sizeof(int32_t));
    l.seq_slot = place((size_t)f->seqs * sizeof(int32_t));
    l.seq_start = place((size_t)(f->seqs + 1) * sizeof(int32_t));
    l.pieces = place((size_t)f->n_pieces * sizeof(struct piece));
    l.logit_rows = place((size_t)f->logits * sizeof(int32_t));
    l.n_bytes = at;
    return l;
}

size_t gpu_block_bytes(const struct backend_options *o)
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

/* Rows of the form beyond the step's are slot 0, position 0: kernels may read what these name
 * before they know how many rows there are. */
static void fill_block(unsigned char *at, const struct form *f, const struct layout *l,
                       const struct step *step)
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
    memcpy(at + l->tokens, step->tokens, n_rows * sizeof(int32_t));
    memcpy(at + l->positions, step->positions, n_rows * sizeof(int64_t));
    memset(at + l->positions + n_rows * sizeof(int64_t), 0,
           ((size_t)f->rows - n_rows) * sizeof(int64_t));
    memset(row_slot + n_rows, 0, ((size_t)f->rows - n_rows) * sizeof(int32_t));
    memcpy(at + l->seq_slot, step->seq_slot, n_seqs * sizeof(int32_t));
    memset(at + l->seq_slot + n_seqs * sizeof(int32_t), 0,
           ((size_t)f->seqs - n_seqs) * sizeof(int32_t));
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
        .drawn = g->cuda.drawing ? drawing_tokens(g->cuda.drawing) : NULL,
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
        .drawn_from = f->draws || f->scores,
    };
    g->cuda.logits = NULL;
    g->cuda.logits_stride = 0;
    g->cuda.logits_cap = 0;
    g->cuda.may_be_late = false;
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
    *r = (struct recorded){*f, 0, NULL, false, NULL};
    return r;
}

static void begin_capture(struct gpu *g)
{
    g->capturing = true;
    gpu_note(g, cudaStreamBeginCapture(g->cuda.queue.stream, cudaStreamCaptureModeThreadLocal),
             "cudaStreamBeginCapture");
}

static void take_step(struct gpu *g, const struct form *f, const struct layout *l)
{
    struct queue *q = &g->cuda.queue;
    struct step_arrays step = {(uint4 *)g->block, {}, (int)(l->n_bytes / sizeof(uint4))};
    struct step_arrays draws = {};
    for (int i = 0; i < DEPTH; i++)
        step.from[i] = (const uint4 *)g->places[i].staging;
    if (g->cuda.drawing && (f->draws || f->scores))
        draws = drawing_arrays(g->cuda.drawing, f->logits);
    const struct spent_lines spent = layer_spent(&g->cuda, f->logits);
    q->alone = true;
    launch(q, "take_step", spent.n ? take_step_kernel<true> : take_step_kernel<false>,
           dim3(spent.n ? 1 + DISCARD_BLOCKS : 1), TAKE_THREADS, 0, step, draws, g->turn, spent);
    g->cuda.step.late = g->current && g->current->may_be_late;
    q->alone = !g->cuda.step.late; /* the next one, too */
}

bool gpu_begin(struct backend *b, const struct step *step)
{
    struct gpu *g = gpu_of(b);
    step_check(step, &g->cuda.options);
    CHECK(step->n_logit_rows <= g->cuda.options.max_logit_rows);
    CHECK(g->n_submitted - g->n_waited < DEPTH);
    const struct form form = form_of(g, step);
    const struct layout layout = layout_of(&form);
    CHECK(layout.n_bytes <= g->block_bytes);
    const int place = (int)(g->n_submitted % DEPTH);
    point_step(g, &form, &layout);
    if (!gpu_ready(g))
        return true;

    CHECK(g->n_begun == g->n_submitted); /* or take_step would take the other place */
    gpu_slots_step(g, step);
    fill_block(g->places[place].staging, &form, &layout, step);
    if (g->cuda.drawing)
        drawing_begin(&g->cuda, place, step);
    g->n_begun++;
    g->current = find_form(g, &form);
    g->replaying = g->current && g->current->graph;
    g->cuda.layers = g->replaying ? g->current->layers : NULL;
    if (g->replaying)
        return true;
    if (g->current && g->current->n_seen++ > 0)
        begin_capture(g);
    take_step(g, &form, &layout);
    return false;
}

static void end_capture(struct gpu *g)
{
    cudaGraph_t graph = NULL;
    g->capturing = false;
    gpu_note(g, cudaStreamEndCapture(g->cuda.queue.stream, &graph), "cudaStreamEndCapture");
    if (graph && g->cuda.queue.error == cudaSuccess)
        gpu_note(g, cudaGraphInstantiate(&g->current->graph, graph, 0), "cudaGraphInstantiate");
    if (graph)
        (void)cudaGraphDestroy(graph);
}

enum status gpu_submit(struct backend *b, struct error *err)
{
    struct gpu *g = gpu_of(b);
    const int place = (int)(g->n_submitted % DEPTH);
    if (g->current && !g->replaying) {
        g->current->layers = g->cuda.layers;
        g->current->may_be_late = g->cuda.may_be_late;
    }
    if (g->capturing) {
        end_capture(g);
        g->replaying = true;
    }
    if (gpu_ready(g) && g->replaying)
        gpu_note(g, cudaGraphLaunch(g->current->graph, g->cuda.queue.stream), "cudaGraphLaunch");
    if (gpu_ready(g))
        gpu_note(g, cudaEventRecord(g->places[place].done, g->cuda.queue.stream),
                 "cudaEventRecord");
    g->replaying = false;
    if (g->cuda.queue.error == cudaSuccess)
        g->n_submitted++;
    return gpu_status(g, err);
}

enum status gpu_wait(struct backend *b, const struct sampled **results, struct error *err)
{
    struct gpu *g = gpu_of(b);
    if (!gpu_ready(g))
        return gpu_status(g, err);
    CHECK(g->n_waited < g->n_submitted);
    const int place = (int)(g->n_waited % DEPTH);
    gpu_note(g, cudaEventSynchronize(g->places[place].done), "a step");
    if (!gpu_ready(g))
        return gpu_status(g, err);
    g->n_waited++;
    if (results)
        *results = g->cuda.drawing ? drawing_results(&g->cuda, place) : NULL;
    return STATUS_OK;
}
