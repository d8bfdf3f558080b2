/* template_latent.h - conv, RG-LRU and causal Latte; a part of template.h, which says what it
 * stands on. */
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
