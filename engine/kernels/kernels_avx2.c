/* kernels_avx2.c - the kernels over 8 lanes, AVX2 and FMA. */
#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#include <immintrin.h>

#include "engine/kernels/kernels.h"
#include "engine/kernels/tables.h"

enum { VL = 8 };
typedef __m256 vec;

#define TABLE kernels_avx2
#define TABLE_NAME "avx2"

/* Ones for the first n lanes. */
static inline __attribute__((always_inline)) __m256i first(int n)
{
    __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lanes);
}

#define V_FN static inline __attribute__((always_inline)) vec
V_FN v_set1(float x)
{
    return _mm256_set1_ps(x);
}
V_FN v_load(const float *p)
{
    return _mm256_loadu_ps(p);
}
V_FN v_load_n(const float *p, int n)
{
    return _mm256_maskload_ps(p, first(n));
}
V_FN v_add(vec a, vec b)
{
    return _mm256_add_ps(a, b);
}
V_FN v_sub(vec a, vec b)
{
    return _mm256_sub_ps(a, b);
}
V_FN v_mul(vec a, vec b)
{
    return _mm256_mul_ps(a, b);
}
V_FN v_div(vec a, vec b)
{
    return _mm256_div_ps(a, b);
}
V_FN v_fma(vec a, vec b, vec c)
{
    return _mm256_fmadd_ps(a, b, c);
}
V_FN v_max(vec a, vec b)
{
    return _mm256_max_ps(a, b);
}
V_FN v_min(vec a, vec b)
{
    return _mm256_min_ps(a, b);
}
V_FN v_sqrt(vec a)
{
    return _mm256_sqrt_ps(a);
}
V_FN v_abs(vec a)
{
    return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a);
}
V_FN v_rint(vec a)
{
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
V_FN v_floor(vec a)
{
    return _mm256_round_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
/* a >= b ? x : y */
V_FN v_if_ge(vec a, vec b, vec x, vec y)
{
    return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_GE_OQ));
}
/* 2^n for whole n in -126..127 */
V_FN v_pow2(vec n)
{
    __m256i bits = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 23));
}
V_FN v_widen_low(const uint32_t *p)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256((const __m256i *)p), 16));
}
V_FN v_widen_high(const uint32_t *p)
{
    __m256i high = _mm256_set1_epi32((int)0xffff0000u);
    __m256i words = _mm256_loadu_si256((const __m256i *)p);
    return _mm256_castsi256_ps(_mm256_and_si256(words, high));
}
/* Lane i is the sum of the lanes of v[i]. */
V_FN v_sums(const vec *v)
{
    vec low = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    vec high = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
    return v_add(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}
static inline void v_store(float *p, vec a)
{
    _mm256_storeu_ps(p, a);
}
static inline void v_store_n(float *p, vec a, int n)
{
    _mm256_maskstore_ps(p, first(n), a);
}
static inline __m128 v_halves(vec a, __m128 (*join)(__m128, __m128))
{
    __m128 x = join(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = join(x, _mm_movehl_ps(x, x));
    return join(x, _mm_shuffle_ps(x, x, 1));
}
static inline __m128 join_add(__m128 a, __m128 b)
{
    return _mm_add_ps(a, b);
}
static inline __m128 join_max(__m128 a, __m128 b)
{
    return _mm_max_ps(a, b);
}
static inline float v_sum(vec a)
{
    return _mm_cvtss_f32(v_halves(a, join_add));
}
static inline float v_top(vec a)
{
    return _mm_cvtss_f32(v_halves(a, join_max));
}

/* A gemm tile is up to 6 rows of 2 vectors, or fewer rows of more: 12 of 16 registers. */
enum { TILE_ROWS = 6 };
#define TILE_CASES(X) X(1, 8) X(2, 4) X(3, 4) X(4, 2) X(5, 2) X(6, 2)
/* Rows of 4 queries by this many vectors of values stay in registers. */
enum { VALUE_VECS = 2 };

#include "engine/kernels/template.h"
#endif
