/* template_products.h - products with packed weights, and dot products of rows; a part of
 * template.h, which says what it stands on. */
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
