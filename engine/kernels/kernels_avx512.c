/* kernels_avx512.c - the kernels over 16 lanes, AVX-512 F and DQ. */
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512dq,avx2,fma")
#include <immintrin.h>

#include "engine/kernels/kernels.h"
#include "engine/kernels/tables.h"

enum { VL = 16 };
typedef __m512 vec;

#define TABLE kernels_avx512
#define TABLE_NAME "avx512"

static inline __attribute__((always_inline)) __mmask16 first(int n)
{
    return (__mmask16)(0xffffu >> (16 - n));
}

#define V_FN static inline __attribute__((always_inline)) vec
V_FN v_set1(float x)
{
    return _mm512_set1_ps(x);
}
V_FN v_load(const float *p)
{
    return _mm512_loadu_ps(p);
}
V_FN v_load_n(const float *p, int n)
{
    return _mm512_maskz_loadu_ps(first(n), p);
}
V_FN v_add(vec a, vec b)
{
    return _mm512_add_ps(a, b);
}
V_FN v_sub(vec a, vec b)
{
    return _mm512_sub_ps(a, b);
}
V_FN v_mul(vec a, vec b)
{
    return _mm512_mul_ps(a, b);
}
V_FN v_div(vec a, vec b)
{
    return _mm512_div_ps(a, b);
}
V_FN v_fma(vec a, vec b, vec c)
{
    return _mm512_fmadd_ps(a, b, c);
}
V_FN v_max(vec a, vec b)
{
    return _mm512_max_ps(a, b);
}
V_FN v_min(vec a, vec b)
{
    return _mm512_min_ps(a, b);
}
V_FN v_sqrt(vec a)
{
    return _mm512_sqrt_ps(a);
}
V_FN v_abs(vec a)
{
    return _mm512_abs_ps(a);
}
V_FN v_rint(vec a)
{
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
V_FN v_floor(vec a)
{
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
/* a >= b ? x : y */
V_FN v_if_ge(vec a, vec b, vec x, vec y)
{
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GE_OQ), y, x);
}
/* 2^n for whole n in -126..127 */
V_FN v_pow2(vec n)
{
    __m512i bits = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 23));
}
V_FN v_widen_low(const uint32_t *p)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16));
}
V_FN v_widen_high(const uint32_t *p)
{
    __m512i high = _mm512_set1_epi32((int)0xffff0000u);
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), high));
}
/* Lane i is the sum of the lanes of v[i]. */
V_FN v_sums(const vec *v)
{
    vec quads[4];
    for (int i = 0; i < 4; i++) {
        vec a = v[4 * i], b = v[4 * i + 1], c = v[4 * i + 2], d = v[4 * i + 3];
        __m512d ab = (__m512d)v_add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        __m512d cd = (__m512d)v_add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        quads[i] = v_add((vec)_mm512_unpacklo_pd(ab, cd), (vec)_mm512_unpackhi_pd(ab, cd));
    }
    vec low = v_add(_mm512_shuffle_f32x4(quads[0], quads[1], 0x88),
                    _mm512_shuffle_f32x4(quads[0], quads[1], 0xdd));
    vec high = v_add(_mm512_shuffle_f32x4(quads[2], quads[3], 0x88),
                     _mm512_shuffle_f32x4(quads[2], quads[3], 0xdd));
    return v_add(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
}
static inline void v_store(float *p, vec a)
{
    _mm512_storeu_ps(p, a);
}
static inline void v_store_n(float *p, vec a, int n)
{
    _mm512_mask_storeu_ps(p, first(n), a);
}
static inline float v_sum(vec a)
{
    return _mm512_reduce_add_ps(a);
}
static inline float v_top(vec a)
{
    return _mm512_reduce_max_ps(a);
}

/* A gemm tile is up to 12 rows of 2 vectors, or fewer rows of more: 24 of 32 registers. */
enum { TILE_ROWS = 12 };
#define TILE_CASES(X)                                                                              \
    X(1, 8)                                                                                        \
    X(2, 8) X(3, 8) X(4, 4) X(5, 4) X(6, 4) X(7, 2) X(8, 2) X(9, 2) X(10, 2) X(11, 2) X(12, 2)
/* Rows of 4 queries by this many vectors of values stay in registers. */
enum { VALUE_VECS = 4 };

#include "engine/kernels/template.h"
#endif
