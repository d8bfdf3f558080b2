/* values.cuh - random values and device memory for tests of single kernels against loops in double
 * precision. Included once by a test; its seed is the test's to set.
 *
 * Memory: whoever calls frees, with free() what is the host's, with cudaFree() what is the
 * device's. Errors: end the cmocka test.
 */
#ifndef LATTE_TESTS_CUDA_VALUES_CUH
#define LATTE_TESTS_CUDA_VALUES_CUH

#include <math.h>
#include <stdlib.h>

#include "engine/kernels/cuda/device.cuh"

extern "C" {
#include "tests/unit/unit.h"
}

#define OK(call) assert_int_equal((call), cudaSuccess)

static uint32_t seed;

/* From -1 up to 1. */
static float random_value(void)
{
    return (float)(int32_t)test_random(&seed) * 0x1p-31f;
}

static float rounded(float x)
{
    return __bfloat162float(__float2bfloat16_rn(x));
}

static float *random_values(size_t n, bool as_bf16)
{
    float *x = (float *)malloc((n + 1) * sizeof(*x));
    for (size_t i = 0; i < n; i++)
        x[i] = as_bf16 ? rounded(random_value()) : random_value();
    return x;
}

template <class T> static T *on_device(const T *host, size_t n)
{
    T *p;
    OK(cudaMalloc((void **)&p, (n ? n : 1) * sizeof(T)));
    OK(cudaMemcpy(p, host, n * sizeof(T), cudaMemcpyHostToDevice));
    return p;
}

static bf16 *device_bf16(const float *x, size_t n)
{
    bf16 *y = (bf16 *)malloc(n * sizeof(*y) + 1);
    for (size_t i = 0; i < n; i++)
        y[i] = __float2bfloat16_rn(x[i]);
    bf16 *p = on_device(y, n);
    free(y);
    return p;
}

static inline double activation(double x, enum activation act)
{
    if (act == ACTIVATION_SILU)
        return x / (1 + exp(-x));
    if (act == ACTIVATION_GELU)
        return 0.5 * x * erfc(-x / sqrt(2));
    return 0.5 * x * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

#endif
