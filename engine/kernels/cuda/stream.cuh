/* stream.cuh - passes for large matrices and few rows, where memory's bandwidth is everything. */
#ifndef LATTE_CUDA_STREAM_CUH
#define LATTE_CUDA_STREAM_CUH

#include "engine/kernels/cuda/fused.cuh"

/* Activation rows at most. */
enum { STREAM_ROWS = 16, STREAM_INT8_ROWS = 64 };

/* p without a norm, for bf16 or int8 weights of any size. False: not for this shape. A row's result has
 * the same bits whatever the number of rows, but not skinny_product's. */
bool stream_product(struct cuda *c, const struct product *p);

/* The same for p with or without a norm, but only where it is the faster way. */
bool stream_large(struct cuda *c, const struct product *p);

/* Whether stream_large is the way for p without its norm, and takes factors. */
bool stream_factors(const struct cuda *c, const struct product *p);

/* Partial sums of p's results, [n][p.rows][n_out] f32 in c->partials, which are to be added in
 * order, then the bias; p->out is not written. 0: not for this shape, nothing was done. */
int stream_partial_sums(struct cuda *c, const struct product *p);

/* Values of c->partials that products of such a model may want. */
size_t stream_partials(const struct backend_options *options);

/* The end of a sublayer with a post norm and the beginning of the next one:
 * x[rows, dim] += post(y), h = bf16(next(x)). y is the sum of n_parts arrays, part_values apart.
 * next.weight NULL: h is not written. */
struct residual {
    float *x;
    const float *y;
    int64_t part_values;
    int n_parts, dim;
    struct device_norm post, next;
    bf16 *h;
    const int32_t *n_rows;
};
bool residual_possible(int dim);
void residual_norm(struct cuda *c, const struct residual *r);

#endif
