/* cpu.h - what the files of the CPU backend share: backend_cpu.c, cpu_linear.c, cpu_mix.c.
 *
 * Threads: as backend.h; the ops spread over the pool and return when all is done.
 * Memory:  everything is taken in backend_cpu_open; ops use the scratch below.
 */
#ifndef LATTE_ENGINE_CPU_H
#define LATTE_ENGINE_CPU_H

#include "engine/backend.h"
#include "engine/host_memory.h"
#include "engine/kernels/kernels.h"
#include "engine/pool.h"

/* Adjacent rows that are worked on together. */
struct row_run {
    int first, n;
    int seq; /* index in the step; of no meaning where rows of several sequences meet */
};

/* How the rows of a step, or its logit rows, go through matrix products. */
struct row_plan {
    struct row_run *tiles; /* [n_tiles] for the project's own kernels, at most tile_rows each */
    int n_tiles, n_tile_rows;
    struct row_run *prompts; /* [n_prompts] rows of one sequence each, for the library's GEMM */
    int n_prompts;
};

enum {
    ROWS_PER_BLOCK = 32,   /* rows of one sequence that one item of attention takes */
    LIBRARY_DEPTH = 768,   /* inputs and outputs of one product of the library: the */
    LIBRARY_COLUMNS = 256, /* weights of it are widened before */
};

struct cpu {
    struct backend base;
    struct backend_options options;
    const struct kernels *kernels;
    struct pool *pool;
    bool library_gemm;       /* OpenBLAS is here and computes right */
    const struct step *step; /* borrowed from begin to sync */

    struct row_plan plans[2]; /* by enum row_set */
    struct row_run *blocks;   /* [n_blocks] rows of one sequence, at most ROWS_PER_BLOCK */
    int n_blocks;
    float *packed;    /* [max_rows, max_dim] rows as gemm tiles want them */
    float *vapor;     /* [H, KEY_BLOCK + 1, d] sines and cosines */
    double *sinusoid; /* [max_dim] frequencies */
    int sinusoid_dim; /* the row width they are for */
    float **scratch;  /* [n_threads] of cpu_linear_scratch or cpu_mix_scratch values, the larger */
    double **angles;  /* [n_threads] of max_dim each */
};

static inline float *values(const struct buffer *buffer)
{
    return buffer ? buffer->data : NULL;
}

static inline float *slab_row(const struct slab *slab, int slot)
{
    return values(slab->buffer) + (int64_t)slot * slab->row_values;
}

static inline struct cpu *cpu_of(struct backend *b)
{
    struct cpu *c = (struct cpu *)b;
    CHECK(c->step);
    return c;
}

/* Items of a loop whose whole work is about n_values simple steps: small ones stay on the
 * caller, because waking a thread costs more. */
void cpu_each(struct cpu *c, int n_items, size_t n_values, pool_fn *fn, void *context);

/* backend_cpu_open with the kernels chosen by the caller, for tests. */
enum status backend_cpu_open_as(struct backend **out, const struct backend_options *options,
                                const struct kernels *kernels, struct error *err);

/* ---- cpu_linear.c ---- */

/* Values of scratch that linear needs of each thread. */
size_t cpu_linear_scratch(const struct backend_options *options);
/* Compare the library's GEMM with plain loops: it has been wrong on processors it is older than. */
bool cpu_library_is_right(void);
/* Does the library compute with AVX-512 here? Otherwise the AVX-512 kernels are twice as fast. */
bool cpu_library_is_wide(void);
void cpu_plan_rows(struct cpu *c);

enum status cpu_linear_open(struct backend *b, struct linear *out, const void *src,
                            enum dtype src_dtype, struct error *err);
void cpu_linear(struct backend *b, struct buffer *out, const struct buffer *in,
                const struct linear *w, enum row_set rows);
void cpu_embed(struct backend *b, struct buffer *out, const struct linear *table, float scale,
               bool sinusoidal, const struct norm *next);

/* ---- cpu_mix.c ---- */

size_t cpu_mix_scratch(const struct backend_options *options);
void cpu_conv(struct backend *b, struct buffer *out, const struct buffer *in,
              const struct buffer *weight, const struct buffer *bias, const struct slab *state,
              int dim, int n_taps);
void cpu_rglru(struct backend *b, struct buffer *out, const struct buffer *in,
               const struct buffer *recurrence, const struct buffer *input,
               const struct buffer *lambda, const struct slab *state, int dim);
void cpu_rope(struct backend *b, struct buffer *x, const struct buffer *frequencies, int n_heads,
              int head_dim);
void cpu_vapor(struct backend *b, struct buffer *out, const struct buffer *x,
               const struct buffer *theta, int n_heads, int n_x_heads, int head_dim, int sign);
void cpu_latent(struct backend *b, struct buffer *out, struct buffer *p0,
                const struct buffer *theta, const struct buffer *g, const struct buffer *v,
                const struct slab *m, const struct slab *alpha, const struct slab *s,
                const struct latent_shape *shape);
void cpu_window(struct backend *b, struct buffer *out, const struct buffer *p0,
                const struct buffer *q, const struct buffer *k, const struct buffer *v,
                const struct slab *ring_k, const struct slab *ring_v,
                const struct buffer *vapor_theta, const struct window_shape *shape);

#endif
