/* draw.cu - sampling on the device: sampler.h's definition over the step's rows of logits.
 *
 * Two launches. draw_scan reads each row once, a block to a PART of it, and keeps the largest
 * value of each GROUP; the block that finishes a row last draws from it when that takes few
 * values: greedy rows, and top_k up to SHORT, where what k groups have at least bounds what can be
 * among the k best. draw_rest takes the others: the sums of weights, block by block, for
 * temperature, top_p and min_p; and for typical_p without top_k, for large top_k and for rows
 * full of equal values radix selections over the row by one block. It leaves at once when
 * there are no such rows.
 *
 * Bytes: V * 4 a row (67 us for 1,024 rows of 50,257 at 3.08 TB/s), as much again for counts
 * where penalties need them, and again for rows left to draw_rest.
 *
 * Penalties, biases and a softcap are applied to values as they are read; the logits stay as they
 * are. Weights are integers, so that any order of adding gives the host's sums and its token.
 *
 * The host's side: a step's draws are among its arrays (steps.cu), results are written by the
 * kernels into pinned memory of the step's place. An admission is a copy from a ring of pinned
 * places. A step that brings tokens of the host to slots with penalties launches draw_note_prompt
 * before its graph; so prompts are counted without a node in every graph.
 */
#include <algorithm>
#include <type_traits>

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "engine/kernels/cuda/draw_rest.cuh"
#include "engine/kernels/cuda/draw_scan.cuh"

enum {
    STAGING = 512, /* admissions whose copies may be unfinished */
};

/* Tokens of the host count as prompt. notes: in the host's memory. */
static __global__ void draw_note_prompt(struct draw_memory m, const struct draw_note *notes, int n)
{
    pdl_trigger();
    pdl_wait();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n)
        atomicOr(&m.counts[(size_t)notes[i].slot * (size_t)m.n_vocab + (size_t)notes[i].token],
                 IN_PROMPT);
}

/* ---- the host's side ---- */

/* What a draw or score of the step gets back. */
struct wanted {
    int32_t n_top, tops; /* tops: index of the row's list */
};

struct draw_place {
    unsigned char *upload;         /* pinned: header, jobs */
    struct draw_note *notes;       /* pinned [max_rows] */
    struct token_logprob *results; /* pinned [2 * R] */
    struct token_logprob *tops;    /* pinned [R, TOPS] */
    struct wanted *wanted;         /* [2 * R] */
    struct sampled *sampled;       /* [2 * R] */
    int n_results;
};

struct slot_mirror {
    int8_t n_logprobs;
    bool counts;
};

struct drawing {
    struct draw_memory memory;
    unsigned char *block; /* device, all of memory's arrays */
    size_t n_bytes, upload_bytes;
    int n_slots, max_logit_rows, max_rows;
    int32_t n_eos, eos[MODEL_MAX_EOS];
    struct draw_place places[STEP_PLACES];
    struct slot_mirror *slots;   /* [n_slots] */
    struct slot_params *staging; /* pinned [STAGING] */
    cudaEvent_t staged[STAGING]; /* the copy from it is done */
    bool ever_staged[STAGING];
    int next_staging;
    uint32_t *noted; /* [V] counts of a slot, for cuda_note */
};

static int n_parts_of(const struct model_config *config)
{
    return ceil_div(config->vocab_size, PART);
}

static size_t upload_bytes_of(const struct backend_options *o)
{
    const size_t n =
        sizeof(struct draw_header) + (size_t)o->max_logit_rows * sizeof(struct draw_job);
    return (n + sizeof(uint4) - 1) / sizeof(uint4) * sizeof(uint4);
}

/* Lay the arrays out in a block; returns its size. With base NULL only that. */
static size_t lay_out(struct draw_memory *m, unsigned char *base, const struct backend_options *o)
{
    const size_t rows = (size_t)o->max_logit_rows, slots = (size_t)o->n_slots;
    const size_t parts = rows * (size_t)n_parts_of(o->config), groups = parts * PART_GROUPS;
    size_t at = 0;
    const auto place = [&at, base](auto **out, size_t n_bytes) {
        *out = reinterpret_cast<std::remove_reference_t<decltype(*out)>>(base + at);
        at += (n_bytes + 255) / 256 * 256;
    };
    place(&m->header, upload_bytes_of(o));
    m->jobs = reinterpret_cast<struct draw_job *>(m->header + 1);
    place(&m->params, slots * sizeof(*m->params));
    place(&m->counts, slots * (size_t)o->config->vocab_size * sizeof(*m->counts));
    place(&m->drawn, slots * sizeof(*m->drawn));
    place(&m->part_raw, parts * sizeof(*m->part_raw));
    place(&m->part_best, parts * sizeof(*m->part_best));
    place(&m->part_sum, parts * sizeof(*m->part_sum));
    place(&m->part_tops, parts * TOPS * sizeof(*m->part_tops));
    place(&m->group_best, groups * sizeof(*m->group_best));
    place(&m->group_sum, groups * sizeof(*m->group_sum));
    place(&m->bins, rows * BINS * sizeof(*m->bins));
    place(&m->state, rows * sizeof(*m->state));
    place(&m->n_scanned, rows * sizeof(*m->n_scanned));
    place(&m->n_summed, rows * sizeof(*m->n_summed));
    place(&m->slow, rows * sizeof(*m->slow));
    m->n_vocab = o->config->vocab_size;
    m->n_parts = n_parts_of(o->config);
    return at;
}

size_t drawing_bytes_of(const struct backend_options *options)
{
    struct draw_memory unused;
    return options->config ? lay_out(&unused, nullptr, options) : 0;
}

size_t drawing_bytes(const struct drawing *d)
{
    return d->n_bytes;
}

const int32_t *drawing_tokens(const struct drawing *d)
{
    return d->memory.drawn;
}

static bool succeeds(struct cuda *c, cudaError_t error, const char *where)
{
    if (error != cudaSuccess && c->queue.error == cudaSuccess) {
        c->queue.error = error;
        c->queue.where = where;
    }
    return c->queue.error == cudaSuccess;
}

static cudaError_t open_place(struct draw_place *p, size_t upload_bytes, size_t max_rows,
                              size_t max_logit_rows)
{
    cudaError_t error = cudaMallocHost((void **)&p->upload, upload_bytes);
    if (error == cudaSuccess) {
        memset(p->upload, 0, upload_bytes);
        error = cudaMallocHost((void **)&p->notes, max_rows * sizeof(*p->notes));
    }
    if (error == cudaSuccess)
        error = cudaMallocHost((void **)&p->results, 2 * max_logit_rows * sizeof(*p->results));
    if (error == cudaSuccess)
        error = cudaMallocHost((void **)&p->tops, max_logit_rows * TOPS * sizeof(*p->tops));
    p->wanted = (struct wanted *)calloc(2 * max_logit_rows, sizeof(*p->wanted));
    p->sampled = (struct sampled *)calloc(2 * max_logit_rows, sizeof(*p->sampled));
    if (error == cudaSuccess && (!p->wanted || !p->sampled))
        error = cudaErrorMemoryAllocation;
    return error;
}

static cudaError_t open_memory(struct drawing *d, struct cuda *c)
{
    const struct backend_options *o = &c->options;
    d->n_bytes = lay_out(&d->memory, nullptr, o);
    cudaError_t error = cudaMalloc((void **)&d->block, d->n_bytes);
    if (error == cudaSuccess) {
        lay_out(&d->memory, d->block, o);
        error = cudaMemsetAsync(d->block, 0, d->n_bytes, c->queue.stream);
    }
    for (int i = 0; error == cudaSuccess && i < STEP_PLACES; i++)
        error = open_place(&d->places[i], d->upload_bytes, (size_t)d->max_rows,
                           (size_t)d->max_logit_rows);
    if (error == cudaSuccess)
        error = cudaMallocHost((void **)&d->staging, STAGING * sizeof(*d->staging));
    for (int i = 0; error == cudaSuccess && i < STAGING; i++)
        error = cudaEventCreateWithFlags(&d->staged[i], cudaEventDisableTiming);
    d->slots = (struct slot_mirror *)calloc((size_t)d->n_slots, sizeof(*d->slots));
    d->noted = (uint32_t *)calloc((size_t)o->config->vocab_size, sizeof(*d->noted));
    return error == cudaSuccess && !(d->slots && d->noted) ? cudaErrorMemoryAllocation : error;
}

enum status drawing_open(struct drawing **out, struct cuda *c, struct error *err)
{
    const struct backend_options *o = &c->options;
    CHECK(o->n_slots > 0 && o->max_logit_rows > 0 && o->max_rows > 0);
    if (o->config->vocab_size > 1 << ID_BITS)
        return fail(err, STATUS_UNSUPPORTED,
                    "drawing on the device: a vocabulary of %d; at most "
                    "%d is possible",
                    o->config->vocab_size, 1 << ID_BITS);
    struct drawing *d = (struct drawing *)calloc(1, sizeof(*d));
    if (!d)
        return fail(err, STATUS_NOMEM, "drawing on the device: out of memory");
    d->n_slots = o->n_slots;
    d->max_logit_rows = o->max_logit_rows;
    d->max_rows = o->max_rows;
    d->upload_bytes = upload_bytes_of(o);
    d->n_eos = o->config->n_eos;
    memcpy(d->eos, o->config->eos_token_id, sizeof(d->eos));
    const cudaError_t error = open_memory(d, c);
    if (error == cudaSuccess) {
        *out = d;
        return STATUS_OK;
    }
    drawing_close(d);
    if (error != cudaErrorMemoryAllocation) {
        (void)succeeds(c, error, "drawing_open");
        return fail(err, STATUS_DEVICE, "drawing on the device: %s", cudaGetErrorString(error));
    }
    (void)cudaGetLastError(); /* running out is no failure of the device */
    return fail(err, STATUS_NOMEM,
                "drawing for %d slots over %d tokens: %zu bytes of device "
                "memory are not to be had",
                o->n_slots, o->config->vocab_size, drawing_bytes_of(o));
}

void drawing_close(struct drawing *d)
{
    if (!d)
        return;
    (void)cudaFree(d->block);
    (void)cudaFreeHost(d->staging);
    for (int i = 0; i < STAGING; i++)
        if (d->staged[i])
            (void)cudaEventDestroy(d->staged[i]);
    for (int i = 0; i < STEP_PLACES; i++) {
        struct draw_place *p = &d->places[i];
        (void)cudaFreeHost(p->upload);
        (void)cudaFreeHost(p->notes);
        (void)cudaFreeHost(p->results);
        (void)cudaFreeHost(p->tops);
        free(p->wanted);
        free(p->sampled);
    }
    free(d->slots);
    free(d->noted);
    free(d);
}

/* ---- admission ---- */

static uint64_t mix(uint64_t h) /* as sampler.c */
{
    h = (h ^ h >> 33) * 0xff51afd7ed558ccdull;
    h = (h ^ h >> 33) * 0xc4ceb9fe1a85ec53ull;
    return h ^ h >> 33;
}

/* By token; those of one token stay in order, as each addition rounds. */
static void sort_bias(struct logit_bias *out, const struct logit_bias *bias, int n)
{
    uint64_t order[SAMPLER_MAX_LOGIT_BIAS];
    for (int i = 0; i < n; i++)
        order[i] = (uint64_t)(uint32_t)bias[i].token << 32 | (uint32_t)i;
    std::sort(order, order + n);
    for (int i = 0; i < n; i++)
        out[i] = bias[(uint32_t)order[i]];
}

static void fill_params(struct slot_params *out, const struct drawing *d,
                        const struct sampling_params *p)
{
    const float scale = 1.0f / p->temperature;
    out->hash = mix(mix(p->seed) + p->choice);
    out->temperature = p->temperature;
    out->scale = scale < FLT_MAX ? scale : FLT_MAX;
    out->top_p = p->top_p;
    out->min_p = p->min_p;
    out->typical_p = p->typical_p;
    out->repetition = p->repetition_penalty;
    out->presence = p->presence_penalty;
    out->frequency = p->frequency_penalty;
    out->top_k = p->top_k > 0 ? p->top_k : 0;
    out->n_logprobs = p->n_logprobs;
    out->min_tokens = p->min_tokens;
    out->counts = sampler_counts(p);
    out->n_forbidden = 0;
    for (int i = 0; i < d->n_eos && !p->ignore_eos; i++)
        out->forbidden[out->n_forbidden++] = d->eos[i];
    for (int i = 0; i < p->n_stop_tokens; i++)
        out->forbidden[out->n_forbidden++] = p->stop_tokens[i];
    out->n_bias = p->n_logit_bias;
    sort_bias(out->bias, p->logit_bias, p->n_logit_bias);
}

enum status cuda_admit(struct backend *b, int slot, const struct sampling_params *params,
                       struct error *err)
{
    struct cuda *c = cuda_of(b);
    struct drawing *d = c->drawing;
    CHECK(d && slot >= 0 && slot < d->n_slots);
    cudaStream_t stream = c->queue.stream;
    const int at = d->next_staging++ % STAGING;
    struct slot_params *p = &d->staging[at];
    bool good = succeeds(c, cudaSetDevice(c->options.device), "cudaSetDevice");
    if (good && d->ever_staged[at])
        good = succeeds(c, cudaEventSynchronize(d->staged[at]), "an admission");
    if (good) {
        fill_params(p, d, params);
        d->slots[slot] = {(int8_t)params->n_logprobs, p->counts != 0};
        const size_t n_bytes = (size_t)((char *)(p->bias + p->n_bias) - (char *)p);
        good = succeeds(
            c, cudaMemcpyAsync(&d->memory.params[slot], p, n_bytes, cudaMemcpyHostToDevice, stream),
            "copying an admission");
    }
    if (good)
        good = succeeds(c, cudaEventRecord(d->staged[at], stream), "an admission");
    d->ever_staged[at] = true;
    const size_t row = (size_t)d->memory.n_vocab;
    if (good && p->counts)
        good = succeeds(c,
                        cudaMemsetAsync(d->memory.counts + (size_t)slot * row, 0,
                                        row * sizeof(uint32_t), stream),
                        "forgetting counts");
    d->next_staging %= STAGING;
    if (good)
        return STATUS_OK;
    return fail(err, STATUS_DEVICE, "cuda:%d: %s: %s", c->options.device, c->queue.where,
                cudaGetErrorString(c->queue.error));
}

/* The counts after an admission are all zero, so they can be written whole. Their copy may be used
 * again at once: it is not pinned. */
enum status cuda_note(struct backend *b, int slot, const int32_t *tokens, size_t n,
                      struct error *err)
{
    struct cuda *c = cuda_of(b);
    struct drawing *d = c->drawing;
    const size_t row = (size_t)d->memory.n_vocab;
    CHECK(slot >= 0 && slot < d->n_slots);
    if (!n || !d->slots[slot].counts)
        return STATUS_OK;
    memset(d->noted, 0, row * sizeof(*d->noted));
    for (size_t i = 0; i < n; i++)
        d->noted[tokens[i]] = IN_PROMPT;
    if (succeeds(c, cudaSetDevice(c->options.device), "cudaSetDevice") &&
        succeeds(c,
                 cudaMemcpyAsync(d->memory.counts + (size_t)slot * row, d->noted,
                                 row * sizeof(*d->noted), cudaMemcpyHostToDevice, c->queue.stream),
                 "copying a prompt's counts"))
        return STATUS_OK;
    return fail(err, STATUS_DEVICE, "cuda:%d: %s: %s", c->options.device, c->queue.where,
                cudaGetErrorString(c->queue.error));
}

/* ---- a step ---- */

static void want_draws(struct draw_job *jobs, struct draw_place *p, const struct drawing *d,
                       const struct step *step)
{
    for (int i = 0; i < step->n_draws; i++) {
        const struct step_draw *draw = &step->draws[i];
        CHECK(draw->slot >= 0 && draw->slot < d->n_slots && draw->logit_row >= 0 &&
              draw->logit_row < step->n_logit_rows);
        struct draw_job *job = &jobs[draw->logit_row];
        CHECK(job->slot < 0);
        job->slot = draw->slot;
        job->draw = i;
        job->position = draw->position;
        job->n_output = draw->n_output;
        const int n_top = d->slots[draw->slot].n_logprobs;
        p->wanted[i] = {n_top > 0 ? n_top : 0, draw->logit_row};
        job->n_top = p->wanted[i].n_top;
    }
}

static void want_scores(struct draw_job *jobs, struct draw_place *p, const struct drawing *d,
                        const struct step *step)
{
    for (int i = 0; i < step->n_scores; i++) {
        const struct step_score *score = &step->scores[i];
        CHECK(score->target >= 0 && score->target < d->memory.n_vocab && score->logit_row >= 0 &&
              score->logit_row < step->n_logit_rows);
        struct draw_job *job = &jobs[score->logit_row];
        CHECK(job->target < 0 && score->n_top >= 0 && score->n_top <= TOPS);
        job->target = score->target;
        job->score = step->n_draws + i;
        p->wanted[job->score] = {score->n_top, score->logit_row};
        if (job->n_top < score->n_top)
            job->n_top = score->n_top;
    }
}

/* Tokens of the host for slots whose penalties count them. */
static int fill_notes(struct draw_note *notes, const struct drawing *d, const struct step *step)
{
    int n = 0;
    for (int s = 0; s < step->n_seqs; s++) {
        const int slot = step->seq_slot[s];
        if (!d->slots[slot].counts)
            continue;
        for (int r = step->seq_start[s]; r < step->seq_start[s + 1]; r++)
            if (step->tokens[r] != TOKEN_DRAWN)
                notes[n++] = {slot, step->tokens[r]};
    }
    return n;
}

void drawing_begin(struct cuda *c, int place, const struct step *step)
{
    struct drawing *d = c->drawing;
    struct draw_place *p = &d->places[place];
    struct draw_header *header = (struct draw_header *)p->upload;
    struct draw_job *jobs = (struct draw_job *)(header + 1);
    const bool draws = step->n_draws || step->n_scores;
    const int n_jobs = draws ? step->n_logit_rows : 0;
    p->n_results = step->n_draws + step->n_scores;
    for (int i = 0; i < n_jobs; i++)
        jobs[i] = {-1, 0, -1, 0, 0, i, 0, 0};
    want_draws(jobs, p, d, step);
    want_scores(jobs, p, d, step);
    const int n_notes = fill_notes(p->notes, d, step);
    *header = {p->results, p->tops, 0, {0, 0, 0}};
    if (n_notes)
        launch(&c->queue, "draw_note_prompt", draw_note_prompt, dim3(ceil_div(n_notes, 256)), 256,
               0, d->memory, (const struct draw_note *)p->notes, n_notes);
}

struct step_arrays drawing_arrays(const struct drawing *d, int n_logit_rows)
{
    const int n_bytes = (int)(sizeof(struct draw_header) + n_logit_rows * sizeof(struct draw_job));
    struct step_arrays a = {(uint4 *)d->memory.header, {}, ceil_div(n_bytes, sizeof(uint4))};
    for (int i = 0; i < STEP_PLACES; i++)
        a.from[i] = (const uint4 *)d->places[i].upload;
    return a;
}

void cuda_draw(struct backend *b, const struct buffer *logits)
{
    struct cuda *c = cuda_of(b);
    const struct drawing *d = c->drawing;
    if (!d || !c->step.logits)
        return;
    const struct step_sizes *sizes = c->step.sizes;
    const struct logit_rows rows = {c->logits ? c->logits : floats(logits),
                                    c->logits ? c->logits_stride : d->memory.n_vocab,
                                    c->logits || d->memory.n_vocab % 4 == 0, c->logits_cap};
    const dim3 grid((unsigned)d->memory.n_parts, (unsigned)c->step.logits);
    launch(&c->queue, "draw_scan", draw_scan, grid, SCAN_THREADS, 0, d->memory, rows, sizes);
    const int most = c->step.logits * d->memory.n_parts, blocks = REST_BLOCKS * c->queue.n_sms;
    launch(&c->queue, "draw_rest", draw_rest, dim3(most < blocks ? most : blocks), REST_THREADS, 0,
           d->memory, rows, sizes);
}

const struct sampled *drawing_results(struct cuda *c, int place)
{
    const struct drawing *d = c->drawing;
    const struct draw_place *p = &d->places[place];
    for (int i = 0; i < p->n_results; i++) {
        const struct wanted *w = &p->wanted[i];
        struct sampled *out = &p->sampled[i];
        out->token = p->results[i].token;
        out->logprob = p->results[i].logprob;
        out->n_top = w->n_top < d->memory.n_vocab ? w->n_top : d->memory.n_vocab;
        memcpy(out->top, p->tops + (size_t)w->tops * TOPS, (size_t)out->n_top * sizeof(*out->top));
    }
    return p->sampled;
}
