/* template_math.h - exp, log, erf and their kin by the lane; a part of template.h, which says what
 * it stands on. */
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
