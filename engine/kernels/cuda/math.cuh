/* math.cuh - elementary functions that several kernels share: activations, angles, norms.
 *
 * Written so that the same arguments give the same bits in every kernel: sums of products are
 * spelled fmaf, nothing is left to the compiler's contraction.
 */
#ifndef LATTE_CUDA_MATH_CUH
#define LATTE_CUDA_MATH_CUH

#include "engine/kernels/cuda/cuda.cuh"

static __device__ __forceinline__ float sigmoid(float x)
{
    return 1 / (1 + expf(-x));
}

static __device__ __forceinline__ float activate_value(float x, enum activation act)
{
    if (act == ACTIVATION_SILU)
        return x * sigmoid(x);
    if (act == ACTIVATION_GELU)
        return 0.5f * x * erfcf(-x * 0.70710678f); /* 1 + erf, without cancelling */
    /* (1 + tanh(z)) / 2 = sigmoid(2 z) */
    return x * sigmoid(2 * 0.7978845608f * fmaf(x * 0.044715f, x * x, x));
}

/* The activations of two values beside each other, good to 1e-6: for results that are bf16. No
 * branches but for erf. */
static __device__ __forceinline__ float2 quick_activate(float2 x, enum activation act)
{
    if (act == ACTIVATION_GELU)
        return make_float2(activate_value(x.x, act), activate_value(x.y, act));
    const float cube = act == ACTIVATION_SILU ? 0 : 0.044715f;
    const float factor = act == ACTIVATION_SILU ? 1 : 2 * 0.7978845608f;
    const float low = factor * fmaf(x.x * cube, x.x * x.x, x.x);
    const float high = factor * fmaf(x.y * cube, x.y * x.y, x.y);
    return make_float2(x.x * quick_reciprocal(1 + quick_exp2(-1.44269504f * low)),
                       x.y * quick_reciprocal(1 + quick_exp2(-1.44269504f * high)));
}

/* cap tanh(x / cap), to a few units in the last place, without branches: a polynomial, good to
 * 4e-8, where 1 - 2 / (1 + e^2y) would cancel. */
static __device__ __forceinline__ float softcapped(float x, float cap)
{
    const float y = x * (1 / cap), size = fabsf(y), square = y * y;
    float small = fmaf(square, 0.0164375806f, -0.0526718133f);
    small = fmaf(square, small, 0.133207251f);
    small = fmaf(square, small, -0.333329466f);
    small = fmaf(small * square, y, y);
    const float large = fmaf(-2, quick_reciprocal(1 + quick_exp2(2 * 1.44269504f * size)), 1);
    return cap * (size < 0.55f ? small : copysignf(large, y));
}

/* Sine and cosine of position * frequency, reduced modulo pi/2 in double: exact to float for
 * any position a session can reach and frequencies up to a few turns a row. */
static __device__ __forceinline__ void angle(int64_t position, double frequency, float *sine,
                                             float *cosine)
{
    const double pi_2_high = 0x1.921fb54442d18p+0, pi_2_low = 0x1.1a62633145c07p-54;
    const double quarters = 0x1.45f306dc9c883p-1; /* 2 / pi */
    /* Above 2^53 a double does not hold a position: its last 11 bits go apart. */
    const double high = (double)(position & ~(int64_t)2047), rest = (double)(position & 2047);
    const double x = high * frequency;
    const double low = fma(rest, frequency, fma(high, frequency, -x));
    const double n = rint(x * quarters);
    double r = fma(-n, pi_2_low, fma(-n, pi_2_high, x)) + low;
    const double more = rint(r * quarters);
    r = fma(-more, pi_2_low, fma(-more, pi_2_high, r));
    const double turns = (n - 4 * floor(n * 0.25)) + more;
    const int quadrant = (int)(turns - 4 * floor(turns * 0.25));

    const float y = (float)r, z = y * y; /* |y| <= pi/4: Taylor's series, good to 3e-8 */
    const float s =
        fmaf(y * z, fmaf(z, fmaf(z, fmaf(z, 1.f / 362880, -1.f / 5040), 1.f / 120), -1.f / 6), y);
    const float c = fmaf(z, fmaf(z, fmaf(z, fmaf(z, 1.f / 40320, -1.f / 720), 1.f / 24), -0.5f), 1);
    const float sine_part = quadrant & 1 ? c : s, cosine_part = quadrant & 1 ? s : c;
    *sine = quadrant & 2 ? -sine_part : sine_part;
    *cosine = quadrant == 1 || quadrant == 2 ? -cosine_part : cosine_part;
}

/* ---- one row, one warp: every lane gets the result ---- */

struct row_scale {
    float mean, scale; /* normed = (x - mean) * scale * weight + bias */
};

static __device__ __forceinline__ float normed(float x, struct row_scale s, float weight,
                                               float bias)
{
    return fmaf((x - s.mean) * s.scale, weight, bias);
}

static __device__ __forceinline__ float4 quad_at(const float *p, int quad)
{
    return __ldg(reinterpret_cast<const float4 *>(p) + quad);
}

static __device__ __forceinline__ float4 normed_quad(float4 x, struct row_scale s, float4 w,
                                                     float4 b)
{
    return make_float4(normed(x.x, s, w.x, b.x), normed(x.y, s, w.y, b.y), normed(x.z, s, w.z, b.z),
                       normed(x.w, s, w.w, b.w));
}

static __device__ __forceinline__ float square_sum(float4 v, float mean)
{
    const float x = v.x - mean, y = v.y - mean, z = v.z - mean, w = v.w - mean;
    return fmaf(x, x, y * y) + fmaf(z, z, w * w);
}

/* 1 / sqrt(mean of squares + eps), to 2 units in the last place. */
static __device__ __forceinline__ float norm_scale(float squares, int dim, float eps)
{
    return rsqrtf(fmaf(squares, quick_reciprocal((float)dim), eps));
}

/* Mean and scale of row [dim], dim a multiple of 4, 16-byte aligned; held[p] of a lane are
 * values 4 (lane + 32 p) on, of which PER cover the row; beyond it they are 0. */
template <int PER>
static __device__ __forceinline__ struct row_scale held_scale(const float4 (&held)[PER], int dim,
                                                              bool layer, float eps)
{
    const int lane = threadIdx.x % WARP;
    struct row_scale s = {0, 0};
    float square = 0;
    if (layer) {
        float sum = 0;
#pragma unroll
        for (int p = 0; p < PER; p++)
            sum += (held[p].x + held[p].y) + (held[p].z + held[p].w);
        s.mean = warp_sum(sum) / dim;
#pragma unroll
        for (int p = 0; p < PER; p++)
            square += 4 * (lane + WARP * p) < dim ? square_sum(held[p], s.mean) : 0;
    } else { /* zeros add nothing: no branch in the way of one warp's few instructions */
#pragma unroll
        for (int p = 0; p < PER; p++)
            square += square_sum(held[p], 0);
    }
    s.scale = norm_scale(warp_sum(square), dim, eps);
    return s;
}

/* The same bits for a row of any length that is a multiple of 4, read as often as it takes. */
static __device__ __forceinline__ struct row_scale read_scale(const float *row, int dim, bool layer,
                                                              float eps)
{
    enum { AT_ONCE = 8 };
    const int lane = threadIdx.x % WARP;
    const float4 *in = reinterpret_cast<const float4 *>(row);
    struct row_scale s = {0, 0};
    for (int pass = layer ? 0 : 1; pass < 2; pass++) {
        float sum = 0;
        for (int first = lane; first < dim / 4; first += AT_ONCE * WARP) {
            float4 v[AT_ONCE];
#pragma unroll
            for (int p = 0; p < AT_ONCE; p++)
                v[p] = first + p * WARP < dim / 4 ? in[first + p * WARP] : make_float4(0, 0, 0, 0);
#pragma unroll
            for (int p = 0; p < AT_ONCE; p++) {
                if (first + p * WARP < dim / 4)
                    sum += pass ? square_sum(v[p], s.mean) : (v[p].x + v[p].y) + (v[p].z + v[p].w);
            }
        }
        sum = warp_sum(sum);
        if (pass)
            s.scale = norm_scale(sum, dim, eps);
        else
            s.mean = sum / dim;
    }
    return s;
}

#endif
