/* template_rows.h - norms, sums, activations and rotations of rows; a part of template.h, which
 * says what it stands on. */
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
