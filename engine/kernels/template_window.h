/* template_window.h - attention over a window; a part of template.h, which says what it stands on.
 */
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
