/* products.cuh - what tests of products of bf16 factors share: the device they run on, results as
 * loops in double precision give them, and whether what a kernel gives is near enough. Included
 * once by a test.
 */
#ifndef LATTE_TESTS_CUDA_PRODUCTS_CUH
#define LATTE_TESTS_CUDA_PRODUCTS_CUH

#include <math.h>

#include "engine/kernels/cuda/cuda.cuh"
#include "tests/cuda/values.cuh"

#ifdef LATTE_EMULATE
static const bool emulated = true;
#else
static const bool emulated = false;
#endif
static struct cuda c;
static int32_t *n_rows; /* device */

static int open_device(void **)
{
    struct cudaDeviceProp props;
    int n = 0;
    if (cudaGetDeviceCount(&n) != cudaSuccess || !n)
        return 0; /* each test skips */
    OK(cudaGetDeviceProperties(&props, 0));
    c.queue.capability = 10 * props.major + props.minor;
    c.queue.pdl = c.queue.capability >= 90;
    c.queue.n_sms = props.multiProcessorCount;
    OK(cudaStreamCreate(&c.queue.stream));
    OK(cudaMalloc((void **)&n_rows, sizeof(*n_rows)));
    return 0;
}

static int close_device(void **)
{
    cudaFree(n_rows);
    if (c.queue.stream)
        cudaStreamDestroy(c.queue.stream);
    return 0;
}

/* y = sum of x w over n, and what it may be off by. */
static double dot(const float *x, const float *w, int n, double *slack)
{
    double sum = 0, size = 0;
    for (int i = 0; i < n; i++) {
        sum += (double)x[i] * w[i];
        size += fabs((double)x[i] * w[i]);
    }
    *slack = 4e-7 * size;
    return sum;
}

static void check_value(double found, double expected, double slack, const char *what, int row,
                        int column)
{
    if (!(fabs(found - expected) <= slack + 1e-6 * fabs(expected)))
        fail_msg("%s: row %d, column %d: %g, expected %g (%g)", what, row, column, found, expected,
                 slack);
}

#endif
