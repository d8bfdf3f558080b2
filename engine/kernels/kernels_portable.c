/* kernels_portable.c - the kernels over 4 lanes in plain C, for processors without AVX2. */
#include <math.h>
#include <string.h>

#include "engine/kernels/kernels.h"
#include "engine/kernels/tables.h"

enum { VL = 4 };
typedef float vec __attribute__((vector_size(16)));

#define TABLE kernels_portable
#define TABLE_NAME "portable"

#define V_FN static inline __attribute__((always_inline)) vec
V_FN v_set1(float x)
{
    return (vec){x, x, x, x};
}
V_FN v_load_n(const float *p, int n)
{
    vec a = {0};
    for (int i = 0; i < n; i++)
        a[i] = p[i];
    return a;
}
V_FN v_load(const float *p)
{
    vec a;
    memcpy(&a, p, sizeof(a));
    return a;
}
V_FN v_add(vec a, vec b)
{
    return a + b;
}
V_FN v_sub(vec a, vec b)
{
    return a - b;
}
V_FN v_mul(vec a, vec b)
{
    return a * b;
}
V_FN v_div(vec a, vec b)
{
    return a / b;
}
V_FN v_fma(vec a, vec b, vec c)
{
    return a * b + c;
}
#define EACH_LANE(name, parameters, expression)                                                    \
    V_FN name parameters                                                                           \
    {                                                                                              \
        vec out = {0};                                                                             \
        for (int i = 0; i < VL; i++)                                                               \
            out[i] = expression;                                                                   \
        return out;                                                                                \
    }
EACH_LANE(v_max, (vec a, vec b), a[i] > b[i] ? a[i] : b[i])
EACH_LANE(v_min, (vec a, vec b), a[i] < b[i] ? a[i] : b[i])
EACH_LANE(v_sqrt, (vec a), sqrtf(a[i]))
EACH_LANE(v_abs, (vec a), fabsf(a[i]))
EACH_LANE(v_rint, (vec a), rintf(a[i]))
EACH_LANE(v_floor, (vec a), floorf(a[i]))
/* a >= b ? x : y */
EACH_LANE(v_if_ge, (vec a, vec b, vec x, vec y), a[i] >= b[i] ? x[i] : y[i])

static inline float from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}
/* 2^n for whole n in -126..127; a NaN's n is anything. */
EACH_LANE(v_pow2, (vec n), n[i] == n[i] ? from_bits((uint32_t)((int)n[i] + 127) << 23) : n[i])
EACH_LANE(v_widen_low, (const uint32_t *p), from_bits(p[i] << 16))
EACH_LANE(v_widen_high, (const uint32_t *p), from_bits(p[i] & 0xffff0000u))
/* Lane i is the sum of the lanes of v[i]. */
EACH_LANE(v_sums, (const vec *v), (v[i][0] + v[i][1]) + (v[i][2] + v[i][3]))

static inline void v_store(float *p, vec a)
{
    memcpy(p, &a, sizeof(a));
}
static inline void v_store_n(float *p, vec a, int n)
{
    for (int i = 0; i < n; i++)
        p[i] = a[i];
}
static inline float v_sum(vec a)
{
    return (a[0] + a[1]) + (a[2] + a[3]);
}
static inline float v_top(vec a)
{
    float low = a[0] > a[1] ? a[0] : a[1], high = a[2] > a[3] ? a[2] : a[3];
    return low > high ? low : high;
}

/* A gemm tile is up to 4 rows of 2 vectors: 8 of 16 registers. */
enum { TILE_ROWS = 4 };
#define TILE_CASES(X) X(1, 8) X(2, 4) X(3, 2) X(4, 2)
enum { VALUE_VECS = 2 };

#include "engine/kernels/template.h"
