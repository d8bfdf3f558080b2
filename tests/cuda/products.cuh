/* products.cuh - results of products of bf16 factors as loops in double precision give them, and
 * whether what a kernel gives is near enough. Included once by a test.
 */
#ifndef LATTE_TESTS_CUDA_PRODUCTS_CUH
#define LATTE_TESTS_CUDA_PRODUCTS_CUH

#include <math.h>

#include "tests/cuda/values.cuh"

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
