/* draw_row.cuh - one value of a row of logits, as sampler.h defines it: the device's row.h.
 *
 * Every f32 operation is spelled with its rounding, so that nothing is fused and the bits are
 * those of row.c. Weights are integers; their sums do not depend on the order of adding.
 */
#ifndef LATTE_CUDA_DRAW_ROW_CUH
#define LATTE_CUDA_DRAW_ROW_CUH

#include <float.h>

#include "engine/kernels/cuda/math.cuh"

enum {
    GROUP = 128,                /* values whose largest is remembered: a warp's, four a lane */
    PART = 4096,                /* values of a row that a block of the scan takes */
    PART_GROUPS = PART / GROUP, /* 32 */
    MAX_FORBIDDEN = SAMPLER_MAX_STOP_TOKENS + MODEL_MAX_EOS,
    TOUCHED_BITS = 2048, /* of the filter over groups: exact up to 262,144 tokens */
    IN_PROMPT_BIT = 31,  /* of a count: the prompt had the token */
    ID_BITS = 22,        /* a token's id in a rank */
};

#define IN_PROMPT (1u << IN_PROMPT_BIT)

/* A slot's parameters on the device; what of them is not a list. */
struct slot_options {
    uint64_t hash; /* of seed and choice: the key of Philox */
    float temperature, scale, top_p, min_p, typical_p;
    float repetition, presence, frequency;
    int32_t top_k; /* 0: all */
    int32_t n_logprobs, min_tokens;
    int32_t counts; /* penalties need the slot's counts */
    int32_t n_forbidden, n_bias;
};

/* Only the first n_bias biases are ever copied. */
struct slot_params : slot_options {
    int32_t forbidden[MAX_FORBIDDEN];               /* before min_tokens */
    struct logit_bias bias[SAMPLER_MAX_LOGIT_BIAS]; /* by token; equal ones as they came */
};

/* NaN as -inf, +inf as the largest, -0 as 0. */
static __device__ __forceinline__ float tidy(float x)
{
    return __fadd_rn(fminf(fmaxf(x, -INFINITY), FLT_MAX), 0.0f);
}

/* An unsigned integer in the order of the (tidy) floats; above 0 for all of them. */
static __device__ __forceinline__ uint32_t height(float x)
{
    const uint32_t bits = __float_as_uint(x);
    return bits ^ ((uint32_t)((int32_t)bits >> 31) | 0x80000000u);
}

static __device__ __forceinline__ float value_at(uint32_t height)
{
    return __uint_as_float(height & 0x80000000u ? height ^ 0x80000000u : ~height);
}

static __device__ __forceinline__ bool is_out(float x)
{
    return __float_as_uint(x) == 0xff800000u; /* -inf */
}

/* Larger for what ranks first: a larger value, then a lower id. No token has key 0. */
static __device__ __forceinline__ uint64_t key_of(uint32_t height, int32_t id)
{
    return (uint64_t)height << 32 | (0xffffffffu - (uint32_t)id);
}
static __device__ __forceinline__ uint64_t key_of(float x, int32_t id)
{
    return key_of(height(x), id);
}
static __device__ __forceinline__ int32_t id_of(uint64_t key)
{
    return (int32_t)(0xffffffffu - (uint32_t)key);
}
static __device__ __forceinline__ float value_of(uint64_t key)
{
    return value_at((uint32_t)(key >> 32));
}

/* row_exp of row.h, operation for operation. */
static __device__ __forceinline__ float exact_exp(float y)
{
    const uint32_t minus_40 = 0xc2200000u;
    const uint32_t bits = __float_as_uint(y);
    const float x = __uint_as_float(bits < minus_40 ? bits : minus_40);
    const float to_integer = 0x1.8p23f;
    const float n = __fsub_rn(__fadd_rn(__fmul_rn(x, 0x1.715476p+0f), to_integer), to_integer);
    const float r =
        __fsub_rn(__fsub_rn(x, __fmul_rn(n, 0x1.62ep-1f)), __fmul_rn(n, 0x1.0bfbe8p-15f));
    float p = 1.0f / 5040;
    p = __fadd_rn(__fmul_rn(p, r), 1.0f / 720);
    p = __fadd_rn(__fmul_rn(p, r), 1.0f / 120);
    p = __fadd_rn(__fmul_rn(p, r), 1.0f / 24);
    p = __fadd_rn(__fmul_rn(p, r), 1.0f / 6);
    p = __fadd_rn(__fmul_rn(p, r), 0.5f);
    p = __fadd_rn(__fmul_rn(p, r), 1.0f);
    p = __fadd_rn(__fmul_rn(p, r), 1.0f);
    const float e = __fmul_rn(p, __int_as_float(((int32_t)n + 127) * (1 << 23)));
    return e >= 0x1p-44f ? e : 0;
}

static __device__ __forceinline__ uint64_t weight_of(float e)
{
    return (uint64_t)(int64_t)__fmul_rn(e, 0x1p44f);
}

/* Where the exponentials of a row start: y = (x - top) * scale. */
struct exponent {
    float top, scale;
};

static __device__ __forceinline__ float y_of(struct exponent by, float x)
{
    return __fmul_rn(__fsub_rn(x, by.top), by.scale);
}

/* Tokens that make up at least p of the total. */
static __device__ __forceinline__ uint64_t part_of(uint64_t total, float p)
{
    const uint64_t part = (uint64_t)ceil((double)p * (double)total);
    return part < 1 ? 1 : part < total ? part : total;
}

static __device__ __forceinline__ float log_prob(float x, float top, double log_sum)
{
    return is_out(x) ? x : (float)((double)x - top - log_sum);
}

/* Philox 4x32-10; 64 of its bits. */
static __device__ __forceinline__ uint64_t random_bits(uint64_t key, uint64_t position)
{
    uint32_t c0 = (uint32_t)position, c1 = (uint32_t)(position >> 32), c2 = 0, c3 = 0;
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    for (int round = 0; round < 10; round++) {
        const uint64_t a = (uint64_t)0xD2511F53u * c0, b = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(b >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)b;
        c2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return (uint64_t)c1 << 32 | c0;
}

/* What a request's options change of its row, in shared memory. */
struct changes {
    bool any;
    const uint32_t *counts; /* of the slot [V], or NULL */
    float repetition, presence, frequency;
    int n_forbidden, n_bias;
    uint32_t touched[TOUCHED_BITS / 32]; /* groups with a bias or a forbidden token */
    int32_t forbidden[MAX_FORBIDDEN];
    struct logit_bias bias[SAMPLER_MAX_LOGIT_BIAS];
};

static __device__ __forceinline__ void touch(struct changes *c, int32_t token)
{
    const uint32_t group = (uint32_t)token / GROUP % TOUCHED_BITS;
    atomicOr(&c->touched[group / 32], 1u << group % 32);
}

static __device__ __forceinline__ int active_forbidden(const struct slot_options *p,
                                                       int64_t n_output)
{
    return n_output < p->min_tokens ? p->n_forbidden : 0;
}

/* Whether there are any. */
static __device__ __forceinline__ bool has_changes(const struct slot_options *p, int64_t n_output)
{
    return p->counts || p->n_bias || active_forbidden(p, n_output);
}

/* By all threads of a block; ends with a barrier. */
static __device__ void load_changes(struct changes *c, const struct slot_params *p,
                                    const uint32_t *counts, int64_t n_output)
{
    const int n_forbidden = active_forbidden(p, n_output), n_bias = p->n_bias;
    if (threadIdx.x == 0) {
        c->counts = p->counts ? counts : nullptr;
        c->any = has_changes(p, n_output);
        c->repetition = p->repetition;
        c->presence = p->presence;
        c->frequency = p->frequency;
        c->n_forbidden = n_forbidden;
        c->n_bias = n_bias;
    }
    for (int i = threadIdx.x; i < TOUCHED_BITS / 32; i += blockDim.x)
        c->touched[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n_forbidden; i += blockDim.x)
        touch(c, c->forbidden[i] = p->forbidden[i]);
    for (int i = threadIdx.x; i < n_bias; i += blockDim.x) {
        c->bias[i] = p->bias[i];
        touch(c, c->bias[i].token);
    }
    __syncthreads();
}

static __device__ float changed_by_list(const struct changes *c, float x, int32_t id)
{
    int low = 0, high = c->n_bias;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (c->bias[middle].token < id)
            low = middle + 1;
        else
            high = middle;
    }
    for (; low < c->n_bias && c->bias[low].token == id; low++)
        x = tidy(__fadd_rn(x, c->bias[low].bias));
    for (int i = 0; i < c->n_forbidden; i++)
        if (c->forbidden[i] == id)
            x = -INFINITY;
    return x;
}

static __device__ __forceinline__ float penalized(const struct changes *c, float x, uint32_t count)
{
    const uint32_t n_output = count & ~IN_PROMPT;
    x = x > 0 ? __fdiv_rn(x, c->repetition) : __fmul_rn(x, c->repetition);
    if (n_output) {
        x = __fsub_rn(x, c->presence);
        x = __fsub_rn(x, __fmul_rn(c->frequency, (float)n_output));
    }
    return tidy(x);
}

static __device__ __forceinline__ bool is_touched(const struct changes *c, int32_t id)
{
    const uint32_t group = (uint32_t)id / GROUP % TOUCHED_BITS;
    return c->touched[group / 32] >> group % 32 & 1;
}

/* The step's logits. */
struct logit_rows {
    const float *data; /* [n, V] */
    int64_t stride;
    bool aligned; /* rows begin at multiples of 16 bytes, and may be read up to the next one */
    float cap;    /* they are to be capped as they are read (math.cuh's softcapped); 0: not */
};

/* A row as the draw sees it: adjusted values by id, -inf beyond its end. Nothing is written
 * back: the untouched values stay for logprobs. */
struct row {
    const float *logits; /* [V] */
    int32_t n;
    float cap;                     /* as logit_rows' */
    const struct changes *changes; /* NULL: none */
};

/* An untouched value, from what lies in memory. */
static __device__ __forceinline__ float logit_of(const struct row &row, float x)
{
    return tidy(row.cap != 0 ? softcapped(x, row.cap) : x);
}

/* Values first, first + STEP, ... with all loads in flight together. */
template <int N, int STEP>
static __device__ __forceinline__ void load_values(float (&x)[N], struct row row, int32_t first)
{
#pragma unroll
    for (int i = 0; i < N; i++)
        x[i] = first + i * STEP < row.n ? __ldcg(row.logits + first + i * STEP) : 0;
#pragma unroll
    for (int i = 0; i < N; i++)
        x[i] = first + i * STEP < row.n ? logit_of(row, x[i]) : -INFINITY;
}

/* Everything that comes before temperature. */
template <int N, int STEP>
static __device__ __forceinline__ void change_values(float (&x)[N], struct row row, int32_t first)
{
    enum { AT_ONCE = N < 8 ? N : 8 };
    const struct changes *c = row.changes;
    if (!c)
        return;
#pragma unroll
    for (int i = 0; i < N; i++)
        if (is_touched(c, first + i * STEP))
            x[i] = changed_by_list(c, x[i], first + i * STEP);
    if (!c->counts)
        return;
#pragma unroll
    for (int start = 0; start < N; start += AT_ONCE) {
        uint32_t count[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const int32_t id = first + (start + i) * STEP;
            count[i] = id < row.n ? __ldcg(c->counts + id) : 0;
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
            if (count[i])
                x[start + i] = penalized(c, x[start + i], count[i]);
    }
}

template <int N, int STEP>
static __device__ __forceinline__ void row_values(float (&x)[N], struct row row, int32_t first)
{
    load_values<N, STEP>(x, row, first);
    change_values<N, STEP>(x, row, first);
}

#endif
