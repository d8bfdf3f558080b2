/* template.h - the source of every kernels table, over the vectors its includer defines.
 *
 * Included once by each kernels_*.c after vec, VL, the v_ functions, TILE_ROWS, TILE_CASES,
 * VALUE_VECS and the TABLE's names. A loop's end is loaded and stored with fewer lanes by
 * v_get and v_put; the missing lanes read as zero.
 */
#include <math.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

INLINE int lanes_left(size_t i, size_t n)
{
    return n - i < VL ? (int)(n - i) : VL;
}

INLINE vec v_get(const float *p, int lanes)
{
    return lanes == VL ? v_load(p) : v_load_n(p, lanes);
}

INLINE void v_put(float *p, vec a, int lanes)
{
    if (lanes == VL)
        v_store(p, a);
    else
        v_store_n(p, a, lanes);
}

INLINE vec v_zero(void)
{
    return v_set1(0);
}

INLINE vec v_neg(vec a)
{
    return v_sub(v_zero(), a);
}

/* c[0] + c[1] x + ... */
INLINE vec v_poly(vec x, const float *c, int n)
{
    vec y = v_set1(c[n - 1]);
    UNROLL
    for (int i = n - 2; i >= 0; i--)
        y = v_fma(y, x, v_set1(c[i]));
    return y;
}

/* ---- elementary functions ---- */

/* x = n ln2 + r with |r| <= ln2 / 2; returns e^r - 1. The polynomial is a minimax fit of
 * (e^r - 1 - r) / r^2, good to 5e-11. */
INLINE vec exp_reduced(vec x, vec *n)
{
    static const float c[] = {0.5f,         0.16666667f,   0.041666254f,
                              0.008333267f, 0.0013947256f, 0.00019917119f};
    *n = v_rint(v_mul(x, v_set1(1.442695041f)));
    vec r = v_fma(*n, v_set1(-0.693359375f), x);
    r = v_fma(*n, v_set1(2.12194440e-4f), r);
    return v_fma(v_mul(r, r), v_poly(r, c, 6), r);
}

/* The bounds are where the result is 0 or inf anyway. NaN passes: max and min return their
 * second argument when one is NaN. The power is applied in two halves so that subnormal
 * results come out rounded once. */
INLINE vec v_exp(vec x)
{
    vec n;
    x = v_min(v_set1(89), v_max(v_set1(-104), x));
    vec e = v_add(exp_reduced(x, &n), v_set1(1));
    vec half = v_floor(v_mul(n, v_set1(0.5f)));
    return v_mul(v_mul(e, v_pow2(half)), v_pow2(v_sub(n, half)));
}

/* x at most 80 */
INLINE vec v_expm1(vec x)
{
    vec n, e = exp_reduced(v_max(v_set1(-40), x), &n);
    vec power = v_pow2(n);
    return v_fma(power, e, v_sub(power, v_set1(1)));
}

INLINE vec v_sigmoid(vec x)
{
    return v_div(v_set1(1), v_add(v_set1(1), v_exp(v_neg(x))));
}

INLINE vec v_tanh(vec x)
{
    vec e = v_expm1(v_mul(v_set1(2), v_min(v_set1(10), v_abs(x))));
    vec y = v_div(e, v_add(e, v_set1(2)));
    return v_if_ge(x, v_zero(), y, v_neg(y));
}

/* log(1 + e^x) = max(x, 0) + log(1 + y), y = e^-|x|; the logarithm is 2 atanh(y / (2 + y)). */
INLINE vec v_softplus(vec x)
{
    static const float c[] = {2.f,     2.f / 3,  2.f / 5,  2.f / 7,
                              2.f / 9, 2.f / 11, 2.f / 13, 2.f / 15};
    vec y = v_exp(v_neg(v_abs(x)));
    vec s = v_div(y, v_add(y, v_set1(2)));
    return v_fma(s, v_poly(v_mul(s, s), c, 8), v_max(x, v_zero()));
}

/* 1 + erf(x): below 1 from erf(z) / z in z^2, above from -log(erfc z) = z^2 + g(z), z = |x|. */
INLINE vec v_one_plus_erf(vec x)
{
    static const float small[] = {1.1283791f,   -0.37612626f,   0.112836f,    -0.026854444f,
                                  0.005189535f, -0.0008020838f, 7.889109e-05f};
    static const float large[] = {0.00017911248f, 1.1282964f,    -0.36502093f,
                                  0.10726445f,    -0.024909362f, 0.0042585465f,
                                  -0.0004964124f, 3.490704e-05f, -1.1099638e-06f};
    vec z = v_abs(x), square = v_mul(z, z);
    vec erf = v_mul(x, v_poly(v_min(v_set1(1), square), small, 7));
    vec g = v_poly(v_min(v_set1(5.05f), z), large, 9);
    vec erfc = v_exp(v_neg(v_add(square, g)));
    vec far = v_if_ge(x, v_zero(), v_sub(v_set1(2), erfc), erfc);
    return v_if_ge(z, v_set1(1), far, v_add(v_set1(1), erf));
}

INLINE vec v_activation(vec x, enum activation act)
{
    if (act == ACTIVATION_SILU)
        return v_mul(x, v_sigmoid(x));
    if (act == ACTIVATION_GELU)
        return v_mul(v_mul(v_set1(0.5f), x), v_one_plus_erf(v_mul(x, v_set1(0.70710678f))));
    /* (1 + tanh(z)) / 2 = sigmoid(2 z) */
    vec cubic = v_fma(v_mul(x, v_set1(0.044715f)), v_mul(x, x), x);
    return v_mul(x, v_sigmoid(v_mul(v_set1(2 * 0.7978845608f), cubic)));
}

/* ---- products with packed weights ---- */

static void pack_rows(float *out, const float *in, size_t stride, int n_rows, int k)
{
    if (n_rows == 1) {
        memcpy(out, in, (size_t)k * sizeof(*out));
        return;
    }
    for (int i = 0; i < k; i++)
        for (int r = 0; r < n_rows; r++)
            out[(size_t)i * n_rows + r] = in[(size_t)r * stride + i];
}

static void widen(float *out, const uint32_t *panel, int n_in)
{
    for (int k = 0; k < n_in; k++, out += PANEL, panel += PANEL_WORDS) {
        for (int c = 0; c < PANEL_WORDS; c += VL) {
            v_store(out + c, v_widen_low(panel + c));
            v_store(out + PANEL_WORDS + c, v_widen_high(panel + c));
        }
    }
}

/* A vector of the k-th group of weights, from a column that may lie in a later panel. */
INLINE vec weight_vec(const struct gemm *g, int k, int column, bool bf16)
{
    const uint32_t *panel = (const uint32_t *)g->panels + column / PANEL * g->panel_stride;
    int c = column % PANEL;
    if (!bf16)
        return v_load((const float *)panel + (size_t)k * PANEL + c);
    panel += (size_t)k * PANEL_WORDS;
    return c < PANEL_WORDS ? v_widen_low(panel + c) : v_widen_high(panel + c - PANEL_WORDS);
}

/* Weights are read once, from memory, faster than processors fetch ahead by themselves. Past a
 * panel's end this touches the next one, or nothing that matters. */
INLINE void fetch_ahead(const struct gemm *g, int k, int column, bool bf16)
{
    size_t words = (size_t)(k + 128) * (bf16 ? PANEL_WORDS : PANEL);
    const uint32_t *panel = (const uint32_t *)g->panels + column / PANEL * g->panel_stride;
    __builtin_prefetch(panel + words);
    if (!bf16)
        __builtin_prefetch(panel + words + PANEL_WORDS);
}

/* rows x (vecs * VL) outputs from `column` on. Every output is one chain of products in order
 * of k, whatever the shape of the tile: that makes results independent of the batch. */
INLINE void gemm_tile(const struct gemm *g, int column, int rows, int vecs, bool bf16)
{
    vec acc[TILE_ROWS][8];
    float *out = g->out + column;
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
    for (int v = 0; v < vecs; v++)
        acc[r][v] = v_zero();
    const float *x = g->x;
    int n_in = g->n_in;
    for (int k = 0; k < n_in; k++, x += rows) {
        vec w[8];
        UNROLL
        for (int v = 0; v < vecs; v += PANEL / VL)
            fetch_ahead(g, k, column + v * VL, bf16);
        UNROLL
        for (int v = 0; v < vecs; v++)
            w[v] = weight_vec(g, k, column + v * VL, bf16);
        UNROLL
        for (int r = 0; r < rows; r++)
            UNROLL
        for (int v = 0; v < vecs; v++)
            acc[r][v] = v_fma(v_set1(x[r]), w[v], acc[r][v]);
    }
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
    for (int v = 0; v < vecs; v++)
        v_store(out + r * g->out_stride + v * VL, acc[r][v]);
}

/* Wide tiles while they fit, then narrow ones. */
#define GEMM_CASE(rows, vecs)                                                                      \
    case rows:                                                                                     \
        for (; column + vecs * VL <= n_columns; column += vecs * VL)                               \
            gemm_tile(g, column, rows, vecs, GEMM_BF16);                                           \
        for (; column < n_columns; column += 2 * VL)                                               \
            gemm_tile(g, column, rows, 2, GEMM_BF16);                                              \
        break;

#define GEMM_BF16 false
static void gemm_f32(const struct gemm *g)
{
    int column = 0, n_columns = g->n_panels * PANEL;
    switch (g->n_rows) {
        TILE_CASES(GEMM_CASE)
    }
}
#undef GEMM_BF16

#define GEMM_BF16 true
static void gemm_bf16(const struct gemm *g)
{
    int column = 0, n_columns = g->n_panels * PANEL;
    switch (g->n_rows) {
        TILE_CASES(GEMM_CASE)
    }
}
#undef GEMM_BF16

/* ---- dot products of rows with rows ---- */

/* VL dot products at once, n_a x VL/n_a of them; sums[i * VL/n_a + j] = a_i . b_j. */
INLINE vec dots_block(const float *const *a, const float *const *b, size_t ahead, int n_a, int k)
{
    vec acc[VL];
    int n_b = VL / n_a;
    UNROLL
    for (int i = 0; i < VL; i++)
        acc[i] = v_zero();
    for (int at = 0; at < k; at += VL) {
        int lanes = lanes_left((size_t)at, (size_t)k);
        vec x[4];
        UNROLL
        for (int i = 0; i < n_a; i++)
            x[i] = v_get(a[i] + at, lanes);
        UNROLL
        for (int j = 0; j < n_b; j++) {
            vec y = v_get(b[j] + at, lanes);
            if (n_a == 1) /* one row does too little work for the keys to arrive unasked */
                __builtin_prefetch(b[j] + at + ahead);
            UNROLL
            for (int i = 0; i < n_a; i++)
                acc[i * n_b + j] = v_fma(x[i], y, acc[i * n_b + j]);
        }
    }
    return v_sums(acc);
}

/* Rows past the end repeat the last one: computed, not stored. */
INLINE void row_pointers(const float **rows, const float *base, size_t stride, int first, int n,
                         int n_all)
{
    for (int i = 0; i < n; i++) {
        int row = first + i < n_all ? first + i : n_all - 1;
        rows[i] = base + (size_t)row * stride;
    }
}

/* Store what is inside the n_a x n_b results that are left. */
INLINE void store_dots(float *out, size_t out_stride, vec sums, int step_a, int n_a, int n_b,
                       const float *bias)
{
    if (step_a == 1) {
        int lanes = n_b < VL ? n_b : VL;
        v_put(out, bias ? v_add(sums, v_get(bias, lanes)) : sums, lanes);
        return;
    }
    float results[VL];
    int step_b = VL / step_a;
    v_store(results, sums);
    for (int r = 0; r < step_a && r < n_a; r++)
        for (int c = 0; c < step_b && c < n_b; c++)
            out[(size_t)r * out_stride + c] = results[r * step_b + c] + (bias ? bias[c] : 0);
}

static void dots(float *out, size_t out_stride, const float *a, size_t a_stride, int n_a,
                 const float *b, size_t b_stride, int n_b, const float *bias, int k)
{
    int step_a = n_a > 1 ? 4 : 1, step_b = VL / step_a;
    size_t ahead = (size_t)step_b * b_stride;
    for (int i = 0; i < n_a; i += step_a) {
        const float *x[4], *y[VL];
        row_pointers(x, a, a_stride, i, step_a, n_a);
        for (int j = 0; j < n_b; j += step_b) {
            row_pointers(y, b, b_stride, j, step_b, n_b);
            vec sums = step_a == 4 ? dots_block(x, y, ahead, 4, k) : dots_block(x, y, ahead, 1, k);
            store_dots(out + (size_t)i * out_stride + j, out_stride, sums, step_a, n_a - i, n_b - j,
                       bias ? bias + j : NULL);
        }
    }
}

/* ---- rows of activations ---- */

/* Sum of x, or of (x - mean)^2, in four chains. */
INLINE float row_sum(const float *in, int n, bool squares, float mean)
{
    vec acc[4] = {v_zero(), v_zero(), v_zero(), v_zero()}, m = v_set1(mean);
    int i = 0;
    for (; i + 4 * VL <= n; i += 4 * VL) {
        UNROLL
        for (int j = 0; j < 4; j++) {
            vec x = v_sub(v_load(in + i + j * VL), m);
            acc[j] = squares ? v_fma(x, x, acc[j]) : v_add(acc[j], x);
        }
    }
    float rest = 0;
    for (; i < n; i++)
        rest += squares ? (in[i] - mean) * (in[i] - mean) : in[i];
    return v_sum(v_add(v_add(acc[0], acc[1]), v_add(acc[2], acc[3]))) + rest;
}

static void norm(float *out, const float *in, const float *weight, const float *bias,
                 enum norm_type type, float eps, int n)
{
    float mean = type == NORM_LAYER ? row_sum(in, n, false, 0) / n : 0;
    float scale = 1 / sqrtf(row_sum(in, n, true, mean) / n + eps);
    for (int i = 0; i < n; i += VL) {
        int lanes = lanes_left((size_t)i, (size_t)n);
        vec x = v_mul(v_sub(v_get(in + i, lanes), v_set1(mean)), v_set1(scale));
        x = v_mul(x, v_get(weight + i, lanes));
        v_put(out + i, bias ? v_add(x, v_get(bias + i, lanes)) : x, lanes);
    }
}

static void add(float *x, const float *y, size_t n)
{
    for (size_t i = 0; i < n; i += VL) {
        int lanes = lanes_left(i, n);
        v_put(x + i, v_add(v_get(x + i, lanes), v_get(y + i, lanes)), lanes);
    }
}

static void add_bias(float *x, size_t stride, const float *bias, int n_rows, int n)
{
    for (int r = 0; r < n_rows; r++)
        add(x + (size_t)r * stride, bias, (size_t)n);
}

INLINE void activate_as(float *out, const float *gate, const float *up, enum activation act,
                        size_t n)
{
    for (size_t i = 0; i < n; i += VL) {
        int lanes = lanes_left(i, n);
        vec u = v_get(up + i, lanes);
        vec y = gate ? v_mul(v_activation(v_get(gate + i, lanes), act), u) : v_activation(u, act);
        v_put(out + i, y, lanes);
    }
}

static void activate(float *out, const float *gate, const float *up, enum activation act, size_t n)
{
    if (act == ACTIVATION_SILU)
        activate_as(out, gate, up, ACTIVATION_SILU, n);
    else if (act == ACTIVATION_GELU)
        activate_as(out, gate, up, ACTIVATION_GELU, n);
    else
        activate_as(out, gate, up, ACTIVATION_GELU_TANH, n);
}

INLINE vec cap_vec(vec x, float cap)
{
    return v_mul(v_set1(cap), v_tanh(v_div(x, v_set1(cap))));
}

static void softcap(float *x, float cap, size_t n)
{
    for (size_t i = 0; i < n; i += VL) {
        int lanes = lanes_left(i, n);
        v_put(x + i, cap_vec(v_get(x + i, lanes), cap), lanes);
    }
}

static void exp_all(float *out, const float *in, size_t n)
{
    for (size_t i = 0; i < n; i += VL) {
        int lanes = lanes_left(i, n);
        v_put(out + i, v_exp(v_get(in + i, lanes)), lanes);
    }
}

/* ---- rotations ---- */

/* The rest of x modulo pi/2 and the quadrant it is in. pi/2 as the sum of two doubles takes
 * quotients up to 2^53; a second pass mends a quotient that was rounded off by one. */
INLINE double quarter_turn(double x, double low, double *quadrant)
{
    const double pi_2_high = 0x1.921fb54442d18p+0, pi_2_low = 0x1.1a62633145c07p-54;
    double n = __builtin_rint(x * 0x1.45f306dc9c883p-1);
    double r = __builtin_fma(-n, pi_2_low, __builtin_fma(-n, pi_2_high, x)) + low;
    double more = __builtin_rint(r * 0x1.45f306dc9c883p-1);
    r = __builtin_fma(-more, pi_2_high, r);
    n = (n - 4 * __builtin_floor(n * 0.25)) + more;
    *quadrant = n - 4 * __builtin_floor(n * 0.25);
    return r;
}

static void angles(float *sine, float *cosine, const double *frequency, double position, int n)
{
    for (int i = 0; i < n; i++) {
        double x = position * frequency[i], q;
        double r = quarter_turn(x, __builtin_fma(position, frequency[i], -x), &q);
        double z = r * r; /* Taylor's series: 1e-11 at pi/4 */
        double s = r + r * z * (-1. / 6 + z * (1. / 120 + z * (-1. / 5040 + z * (1. / 362880))));
        double c =
            1 +
            z * (-0.5 + z * (1. / 24 + z * (-1. / 720 + z * (1. / 40320 - z * (1. / 3628800)))));
        bool odd = q == 1 || q == 3;
        double sine_part = odd ? c : s, cosine_part = odd ? s : c;
        sine[i] = (float)(q >= 2 ? -sine_part : sine_part);
        cosine[i] = (float)(q == 1 || q == 2 ? -cosine_part : cosine_part);
    }
}

static void turn(float *out, const float *x, const float *sine, const float *cosine, int half)
{
    for (int i = 0; i < half; i += VL) {
        int lanes = lanes_left((size_t)i, (size_t)half);
        vec a = v_get(x + i, lanes), b = v_get(x + half + i, lanes);
        vec s = v_get(sine + i, lanes), c = v_get(cosine + i, lanes);
        v_put(out + i, v_fma(a, c, v_neg(v_mul(b, s))), lanes);
        v_put(out + half + i, v_fma(a, s, v_mul(b, c)), lanes);
    }
}

/* ---- latent inputs ---- */

/* Row r of a sequence, counted from its first row of this step; negative rows come from the
 * state, and those before position 0 are never read. */
INLINE vec conv_row(const struct conv_run *c, int r, int i, int lanes)
{
    if (c->position + r < 0)
        return v_zero();
    if (r >= 0)
        return v_get(c->in + (size_t)r * c->stride + i, lanes);
    return v_get(c->state + (size_t)(c->n_taps - 1 + r) * c->stride + i, lanes);
}

INLINE vec conv_weight(const struct conv_run *c, int i, int tap, int lanes)
{
    float w[VL];
    for (int j = 0; j < lanes; j++)
        w[j] = c->weight[(size_t)(i + j) * c->n_taps + tap];
    return v_get(w, lanes);
}

static void conv(const struct conv_run *c)
{
    for (int i = 0; i < c->n; i += VL) {
        int lanes = lanes_left((size_t)i, (size_t)c->n);
        for (int tap = 0; tap < c->n_taps; tap++) {
            vec w = conv_weight(c, i, tap, lanes);
            for (int r = 0; r < c->n_rows; r++) {
                float *out = c->out + (size_t)r * c->stride + i;
                vec sum = tap ? v_get(out, lanes) : v_zero();
                v_put(out, v_fma(w, conv_row(c, r - tap, i, lanes), sum), lanes);
            }
        }
        for (int r = 0; c->bias && r < c->n_rows; r++)
            add(c->out + (size_t)r * c->stride + i, c->bias + i, (size_t)lanes);
    }
}

static void rglru(const struct rglru_run *g)
{
    for (int i = 0; i < g->n; i += VL) {
        int lanes = lanes_left((size_t)i, (size_t)g->n);
        vec rate = v_mul(v_set1(-8), v_softplus(v_get(g->lambda + i, lanes)));
        vec z = g->fresh ? v_zero() : v_get(g->z + i, lanes);
        for (int r = 0; r < g->n_rows; r++) {
            size_t at = (size_t)r * g->stride + i;
            vec gated = v_mul(v_sigmoid(v_get(g->input + at, lanes)), v_get(g->in + at, lanes));
            vec log_a = v_mul(rate, v_sigmoid(v_get(g->recurrence + at, lanes)));
            vec rest = v_sqrt(v_neg(v_expm1(v_mul(v_set1(2), log_a))));
            if (g->fresh && r == 0)
                z = gated;
            else
                z = v_fma(v_exp(log_a), z, v_mul(rest, gated));
            v_put(g->out + at, z, lanes);
        }
        v_put(g->z + i, z, lanes);
    }
}

/* ---- causal Latte, P(eq 19) ---- */

/* p = softmax(g) over n values. */
INLINE void softmax(float *p, const float *g, int n)
{
    vec top = v_set1(-INFINITY), sum = v_zero();
    float highest = -INFINITY;
    int whole = n / VL * VL;
    for (int i = 0; i < whole; i += VL)
        top = v_max(top, v_load(g + i));
    for (int i = whole; i < n; i++)
        highest = g[i] > highest ? g[i] : highest;
    float lanes_top = v_top(top);
    vec shift = v_set1(lanes_top > highest ? lanes_top : highest);
    for (int i = 0; i < n; i += VL) {
        int lanes = lanes_left((size_t)i, (size_t)n);
        v_put(p + i, v_exp(v_sub(v_get(g + i, lanes), shift)), lanes);
    }
    float rest = 0;
    for (int i = 0; i < whole; i += VL)
        sum = v_add(sum, v_load(p + i));
    for (int i = whole; i < n; i++)
        rest += p[i];
    vec scale = v_set1(1 / (v_sum(sum) + rest));
    for (int i = 0; i < n; i += VL) {
        int lanes = lanes_left((size_t)i, (size_t)n);
        v_put(p + i, v_mul(v_get(p + i, lanes), scale), lanes);
    }
}

/* The scalars of all latents of the head: keep and take for s, and weight = p / alpha.
 * One of keep and take is always 1; equal infinities give 1 for both. */
INLINE void latent_weights(const struct latent_run *l, const float *theta, bool fresh, float *keep,
                           float *take, float *weight)
{
    for (int i = 0; i < l->n_latents; i += VL) {
        int lanes = lanes_left((size_t)i, (size_t)l->n_latents);
        vec now = v_get(theta + i, lanes), one = v_set1(1);
        vec before = fresh ? v_set1(-INFINITY) : v_get(l->m + i, lanes);
        vec alpha = fresh ? v_zero() : v_get(l->alpha + i, lanes);
        vec e = v_exp(v_neg(v_abs(v_sub(before, now))));
        vec k = fresh ? v_zero() : v_if_ge(before, now, one, e), t = v_if_ge(now, before, one, e);
        alpha = v_fma(alpha, k, t);
        v_put(l->m + i, v_max(before, now), lanes);
        v_put(l->alpha + i, alpha, lanes);
        v_put(keep + i, k, lanes);
        v_put(take + i, t, lanes);
        v_put(weight + i, v_div(v_get(weight + i, lanes), alpha), lanes);
    }
}

/* s_l = keep_l s_l + take_l v and out = sum_l weight_l s_l, for vecs vectors of columns. */
INLINE void latent_columns(const struct latent_run *l, float *out, const float *v, float *s,
                           const float *keep, const float *take, const float *weight, bool fresh,
                           int vecs, int lanes)
{
    vec value[4], sum[4];
    UNROLL
    for (int j = 0; j < vecs; j++) {
        value[j] = v_get(v + j * VL, lanes);
        sum[j] = v_zero();
    }
    for (int i = 0; i < l->n_latents; i++, s += l->head_dim) {
        vec k = v_set1(keep[i]), t = v_set1(take[i]), w = v_set1(weight[i]);
        UNROLL
        for (int j = 0; j < vecs; j++) {
            vec taken = v_mul(t, value[j]);
            vec next = fresh ? taken : v_fma(v_get(s + j * VL, lanes), k, taken);
            v_put(s + j * VL, next, lanes);
            sum[j] = v_fma(w, next, sum[j]);
        }
    }
    UNROLL
    for (int j = 0; j < vecs; j++)
        v_put(out + j * VL, sum[j], lanes);
}

INLINE void latent_row(const struct latent_run *l, int r, bool fresh)
{
    int n = l->n_latents, window = l->p0 != NULL, d = l->head_dim, i = 0;
    float *keep = l->scratch, *take = keep + n, *p = take + n;
    const float *v = l->v + (size_t)r * l->v_stride;
    float *out = l->out + (size_t)r * l->out_stride;
    softmax(p, l->g + (size_t)r * l->g_stride, n + window);
    if (window)
        l->p0[(size_t)r * l->p0_stride] = p[0];
    p += window;
    latent_weights(l, l->theta + (size_t)r * l->theta_stride, fresh, keep, take, p);
    for (; i + 4 * VL <= d; i += 4 * VL)
        latent_columns(l, out + i, v + i, l->s + i, keep, take, p, fresh, 4, VL);
    for (; i + VL <= d; i += VL)
        latent_columns(l, out + i, v + i, l->s + i, keep, take, p, fresh, 1, VL);
    if (i < d)
        latent_columns(l, out + i, v + i, l->s + i, keep, take, p, fresh, 1, d - i);
}

static void latent(const struct latent_run *l)
{
    int r = 0;
    if (l->fresh)
        latent_row(l, r++, true);
    for (; r < l->n_rows; r++)
        latent_row(l, r, false);
}

/* ---- attention over a window ---- */

static float exp_one(float x)
{
    float lanes[VL];
    v_store(lanes, v_exp(v_set1(x)));
    return lanes[0];
}

INLINE void scale_scores(float *scores, int lo, int hi, float scale, float cap)
{
    for (int i = 0; i < KEY_BLOCK; i += VL) {
        vec x = v_mul(v_load(scores + i), v_set1(scale));
        v_store(scores + i, cap > 0 ? cap_vec(x, cap) : x);
    }
    for (int i = 0; i < lo; i++)
        scores[i] = -INFINITY;
    for (int i = hi; i < KEY_BLOCK; i++)
        scores[i] = -INFINITY;
}

static float soft_block(float *scores, int lo, int hi, float scale, float cap, float *top,
                        float *sum)
{
    if (lo >= hi) {
        memset(scores, 0, KEY_BLOCK * sizeof(*scores));
        return 1;
    }
    scale_scores(scores, lo, hi, scale, cap);
    vec highest = v_load(scores), total = v_zero();
    for (int i = VL; i < KEY_BLOCK; i += VL)
        highest = v_max(highest, v_load(scores + i));
    float before = *top, block_top = v_top(highest);
    *top = before > block_top ? before : block_top;
    for (int i = 0; i < KEY_BLOCK; i += VL) {
        vec weight = v_exp(v_sub(v_load(scores + i), v_set1(*top)));
        v_store(scores + i, weight);
        total = v_add(total, weight);
    }
    float keep = before == *top ? 1 : exp_one(before - *top);
    *sum = *sum * keep + v_sum(total);
    return keep;
}

INLINE void accumulate_columns(float *out, size_t out_stride, const float *keep, const float *p,
                               int rows, const float *v, size_t v_stride, int n_keys, int vecs,
                               int lanes)
{
    vec acc[4][8];
    UNROLL
    for (int i = 0; i < rows; i++)
        UNROLL
    for (int j = 0; j < vecs; j++) {
        vec x = v_get(out + i * out_stride + j * VL, lanes);
        acc[i][j] = keep ? v_mul(x, v_set1(keep[i])) : x;
    }
    for (int k = 0; k < n_keys; k++, v += v_stride)
        UNROLL
    for (int j = 0; j < vecs; j++) {
        vec value = v_get(v + j * VL, lanes);
        UNROLL
        for (int i = 0; i < rows; i++)
            acc[i][j] = v_fma(v_set1(p[i * KEY_BLOCK + k]), value, acc[i][j]);
    }
    UNROLL
    for (int i = 0; i < rows; i++)
        UNROLL
    for (int j = 0; j < vecs; j++)
        v_put(out + i * out_stride + j * VL, acc[i][j], lanes);
}

#define ACCUMULATE_WHILE(vecs)                                                                     \
    for (; i + vecs * VL <= d; i += vecs * VL)                                                     \
    accumulate_columns(out + i, out_stride, keep, p, rows, v + i, v_stride, n_keys, vecs, VL)

INLINE void accumulate_rows(float *out, size_t out_stride, const float *keep, const float *p,
                            int rows, const float *v, size_t v_stride, int n_keys, int d)
{
    int i = 0;
    /* As many sums at a time as there are registers: each waits for its own last product. */
    if (rows == 1)
        ACCUMULATE_WHILE(8);
    if (rows == 1)
        ACCUMULATE_WHILE(6);
    ACCUMULATE_WHILE(VALUE_VECS);
    ACCUMULATE_WHILE(2);
    ACCUMULATE_WHILE(1);
    if (i < d)
        accumulate_columns(out + i, out_stride, keep, p, rows, v + i, v_stride, n_keys, 1, d - i);
}

static void accumulate(float *out, size_t out_stride, const float *keep, const float *p, int n_rows,
                       const float *v, size_t v_stride, int n_keys, int d)
{
    for (; n_rows >= 4; n_rows -= 4) {
        accumulate_rows(out, out_stride, keep, p, 4, v, v_stride, n_keys, d);
        out += 4 * out_stride;
        p += 4 * KEY_BLOCK;
        keep = keep ? keep + 4 : NULL;
    }
    for (; n_rows > 0; n_rows--) {
        accumulate_rows(out, out_stride, keep, p, 1, v, v_stride, n_keys, d);
        out += out_stride;
        p += KEY_BLOCK;
        keep = keep ? keep + 1 : NULL;
    }
}

static void blend(float *out, const float *x, float keep, float scale, int n)
{
    for (int i = 0; i < n; i += VL) {
        int lanes = lanes_left((size_t)i, (size_t)n);
        vec y = v_mul(v_set1(scale), v_get(x + i, lanes));
        if (keep != 0)
            y = v_fma(v_set1(keep), v_get(out + i, lanes), y);
        v_put(out + i, y, lanes);
    }
}

const struct kernels TABLE = {
    .name = TABLE_NAME,
    .tile_rows = TILE_ROWS,
    .pack_rows = pack_rows,
    .gemm_f32 = gemm_f32,
    .gemm_bf16 = gemm_bf16,
    .widen = widen,
    .dots = dots,
    .norm = norm,
    .add = add,
    .add_bias = add_bias,
    .activate = activate,
    .softcap = softcap,
    .exp = exp_all,
    .angles = angles,
    .turn = turn,
    .conv = conv,
    .rglru = rglru,
    .latent = latent,
    .soft_block = soft_block,
    .accumulate = accumulate,
    .blend = blend,
};
