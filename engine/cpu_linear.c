/* cpu_linear.c - products with weight matrices.
 *
 * Decode rows and short chunks go through the kernels' own tiles, straight from packed
 * weights. Long chunks go to OpenBLAS, one sequence at a time and in column groups of fixed
 * size, so that neither neighbours nor the number of threads can change a result.
 */
#include <cblas.h>
#include <math.h>
#include <string.h>

#include "engine/cpu.h"

enum {
    LIBRARY_MIN_ROWS = 256, /* rows of a sequence from which on its chunk goes to the library */
    PIECE = 256,            /* inputs converted at a time while packing */
    ITEM_VALUES = 32768,    /* weights one item should at least read, to be worth handing out, */
    ITEM_INPUTS = 8192,     /* and at most: inputs of 32 outputs, so that they stay in the L2
                               cache over all rows */
};

size_t cpu_linear_scratch(const struct backend_options *options)
{
    size_t own = (size_t)PANEL * (size_t)options->max_rows;
    size_t library = (size_t)LIBRARY_DEPTH * (LIBRARY_COLUMNS + PANEL);
    return own > library ? own : library;
}

/* ---- packed weights ---- */

static int n_panels(const struct linear *w)
{
    return (w->n_out + PANEL - 1) / PANEL;
}

/* 32-bit words of a panel, and of one input of it. */
static size_t input_words(const struct linear *w)
{
    return w->dtype == DTYPE_F32 ? PANEL : PANEL_WORDS;
}

static size_t panel_words(const struct linear *w)
{
    return (size_t)w->n_in * input_words(w);
}

static const uint32_t *panel_at(const struct linear *w, int panel, int input)
{
    const uint32_t *words = w->weight->data;
    return words + (size_t)panel * panel_words(w) + (size_t)input * input_words(w);
}

struct pack_call {
    const struct linear *w;
    void *packed;
    const char *src;
    enum dtype src_dtype;
};

/* Output `column` of a panel, inputs first..first+n-1. */
static void pack_piece(const struct linear *w, void *panel, int column, int first,
                       const float *piece, int n)
{
    if (w->dtype == DTYPE_F32) {
        float *at = (float *)panel + (size_t)first * PANEL + column;
        for (int i = 0; i < n; i++)
            at[(size_t)i * PANEL] = piece[i];
        return;
    }
    uint32_t *at = (uint32_t *)panel + (size_t)first * PANEL_WORDS + column % PANEL_WORDS;
    int shift = column < PANEL_WORDS ? 0 : 16;
    for (int i = 0; i < n; i++)
        at[(size_t)i * PANEL_WORDS] |= (uint32_t)bf16_from_f32(piece[i]) << shift;
}

static void pack_panel(void *context, int panel, int thread)
{
    const struct pack_call *call = context;
    const struct linear *w = call->w;
    uint32_t *out = (uint32_t *)call->packed + (size_t)panel * panel_words(w);
    size_t value_bytes = dtype_bytes(call->src_dtype);
    float piece[PIECE];
    (void)thread;
    for (int c = 0; c < PANEL && panel * PANEL + c < w->n_out; c++) {
        const char *row = call->src + (size_t)(panel * PANEL + c) * (size_t)w->n_in * value_bytes;
        for (int k = 0; k < w->n_in; k += PIECE) {
            int n = w->n_in - k < PIECE ? w->n_in - k : PIECE;
            dtype_to_f32(piece, row + (size_t)k * value_bytes, call->src_dtype, (size_t)n);
            pack_piece(w, out, c, k, piece, n);
        }
    }
}

enum status cpu_linear_open(struct backend *b, struct linear *out, const void *src,
                            enum dtype src_dtype, struct error *err)
{
    struct cpu *c = (struct cpu *)b;
    CHECK(out->dtype == DTYPE_F32 || out->dtype == DTYPE_BF16);
    struct buffer *weight;
    size_t n_bytes = (size_t)n_panels(out) * panel_words(out) * sizeof(uint32_t);
    enum status st = host_buffer_open(b, &weight, n_bytes, err);
    if (st)
        return st;
    struct pack_call call = {out, weight->data, src, src_dtype};
    pool_run(c->pool, n_panels(out), pack_panel, &call);
    out->weight = weight;
    return STATUS_OK;
}

/* ---- rows of the step ---- */

/* Cut n rows into tiles of nearly equal size. */
static void add_tiles(struct row_plan *plan, int first, int n, int tile_rows)
{
    int n_tiles = (n + tile_rows - 1) / tile_rows;
    for (int i = 0; i < n_tiles; i++) {
        int from = (int)((int64_t)n * i / n_tiles), to = (int)((int64_t)n * (i + 1) / n_tiles);
        plan->tiles[plan->n_tiles++] = (struct row_run){.first = first + from, .n = to - from};
    }
    plan->n_tile_rows += n;
}

/* Take n rows of one sequence, beginning at first; *short_first is where the run of short
 * sequences before them began. */
static void plan_sequence(struct cpu *c, struct row_plan *plan, int seq, int first, int n,
                          int *short_first)
{
    if (!c->library_gemm || n < LIBRARY_MIN_ROWS)
        return;
    add_tiles(plan, *short_first, first - *short_first, c->kernels->tile_rows);
    plan->prompts[plan->n_prompts++] = (struct row_run){first, n, seq};
    *short_first = first + n;
}

/* Logit rows of the sequence whose rows end at `end`, from logit row `first` on. */
static int count_logit_rows(const struct step *step, int first, int end)
{
    int n = 0;
    while (first + n < step->n_logit_rows && step->logit_rows[first + n] < end)
        n++;
    return n;
}

void cpu_plan_rows(struct cpu *c)
{
    const struct step *step = c->step;
    for (int set = ROWS_STEP; set <= ROWS_LOGITS; set++) {
        struct row_plan *plan = &c->plans[set];
        plan->n_tiles = plan->n_tile_rows = plan->n_prompts = 0;
        int row = 0, short_first = 0;
        for (int i = 0; i < step->n_seqs; i++) {
            int end = step->seq_start[i + 1];
            int n = set == ROWS_STEP ? end - row : count_logit_rows(step, row, end);
            plan_sequence(c, plan, i, row, n, &short_first);
            row += n;
        }
        add_tiles(plan, short_first, row - short_first, c->kernels->tile_rows);
    }
}

/* ---- the project's own kernels ---- */

struct linear_call {
    struct cpu *cpu;
    const struct linear *w;
    const struct row_plan *plan;
    const float *in;
    float *out;
    int panels_per_item;
};

/* A single row is packed as it is. */
static const float *tile_input(const struct linear_call *call, const struct row_run *tile)
{
    const float *base = tile->n == 1 ? call->in : call->cpu->packed;
    return base + (size_t)tile->first * call->w->n_in;
}

static void pack_tile(void *context, int item, int thread)
{
    const struct linear_call *call = context;
    const struct row_run *tile = &call->plan->tiles[item];
    size_t n_in = (size_t)call->w->n_in;
    (void)thread;
    if (tile->n > 1)
        call->cpu->kernels->pack_rows(call->cpu->packed + tile->first * n_in,
                                      call->in + tile->first * n_in, n_in, tile->n, (int)n_in);
}

/* Panels times all tiles. */
static void run_panels(const struct linear_call *call, float *out, size_t out_stride, int panel,
                       int count)
{
    const struct kernels *k = call->cpu->kernels;
    const struct linear *w = call->w;
    for (int i = 0; i < call->plan->n_tiles; i++) {
        const struct row_run *tile = &call->plan->tiles[i];
        struct gemm g = {
            .out = out + (size_t)tile->first * out_stride,
            .out_stride = out_stride,
            .x = tile_input(call, tile),
            .n_rows = tile->n,
            .panels = panel_at(w, panel, 0),
            .panel_stride = panel_words(w),
            .n_panels = count,
            .n_in = w->n_in,
        };
        if (w->dtype == DTYPE_BF16)
            k->gemm_bf16(&g);
        else
            k->gemm_f32(&g);
    }
}

static void add_biases(const struct linear_call *call, int column, int n)
{
    if (!call->w->bias)
        return;
    for (int i = 0; i < call->plan->n_tiles; i++) {
        const struct row_run *tile = &call->plan->tiles[i];
        size_t stride = (size_t)call->w->n_out;
        call->cpu->kernels->add_bias(call->out + tile->first * stride + column, stride,
                                     values(call->w->bias) + column, tile->n, n);
    }
}

/* The last panel has fewer outputs than the kernels write: it goes by way of scratch. */
static void run_last_panel(const struct linear_call *call, int panel, float *edge)
{
    size_t n_out = (size_t)call->w->n_out, column = (size_t)panel * PANEL;
    run_panels(call, edge, PANEL, panel, 1);
    for (int i = 0; i < call->plan->n_tiles; i++) {
        const struct row_run *tile = &call->plan->tiles[i];
        for (int r = tile->first; r < tile->first + tile->n; r++)
            memcpy(call->out + (size_t)r * n_out + column, edge + (size_t)r * PANEL,
                   (n_out - column) * sizeof(float));
    }
}

static void linear_item(void *context, int item, int thread)
{
    const struct linear_call *call = context;
    int whole = call->w->n_out / PANEL, panel = item * call->panels_per_item;
    int n = call->panels_per_item;
    if (panel >= whole) {
        run_last_panel(call, whole, call->cpu->scratch[thread]);
        add_biases(call, whole * PANEL, call->w->n_out - whole * PANEL);
        return;
    }
    if (n > whole - panel)
        n = whole - panel;
    run_panels(call, call->out + (size_t)panel * PANEL, (size_t)call->w->n_out, panel, n);
    add_biases(call, panel * PANEL, n * PANEL);
}

/* Enough items that the threads finish together, each worth the handing out. Results do not
 * depend on the choice. */
static int choose_panels(const struct linear *w, int n_threads)
{
    int n = w->n_out / PANEL / (4 * n_threads);
    int least = ITEM_VALUES / (w->n_in * PANEL) + 1, most = ITEM_INPUTS / w->n_in + 1;
    n = n < most ? n : most;
    return n > least ? n : least;
}

static void run_own(struct linear_call *call)
{
    struct cpu *c = call->cpu;
    int n_rows = call->plan->n_tile_rows, whole = call->w->n_out / PANEL;
    size_t n_in = (size_t)call->w->n_in;
    call->panels_per_item = choose_panels(call->w, pool_n_threads(c->pool));
    if (n_rows > 1)
        cpu_each(c, call->plan->n_tiles, n_in * (size_t)n_rows, pack_tile, call);
    int n_groups = (whole + call->panels_per_item - 1) / call->panels_per_item;
    int n_items = n_groups + (call->w->n_out % PANEL != 0);
    cpu_each(c, n_items, n_in * (size_t)call->w->n_out, linear_item, call);
}

/* ---- the library ---- */

/* Inputs from..from+n-1 of a group of columns as a plain f32 matrix [n, n_columns]. */
static void unpack_columns(const struct linear_call *call, float *out, int column, int n_columns,
                           int from, int n)
{
    const struct linear *w = call->w;
    float *widened = out + LIBRARY_DEPTH * LIBRARY_COLUMNS;
    for (int c = 0; c < n_columns; c += PANEL) {
        int width = n_columns - c < PANEL ? n_columns - c : PANEL;
        const void *panel = panel_at(w, (column + c) / PANEL, from);
        if (w->dtype == DTYPE_BF16)
            call->cpu->kernels->widen(widened, panel, n);
        const float *group = w->dtype == DTYPE_BF16 ? widened : panel;
        for (int k = 0; k < n; k++, group += PANEL)
            memcpy(out + (size_t)k * (size_t)n_columns + c, group, (size_t)width * sizeof(float));
    }
}

static void library_item(void *context, int item, int thread)
{
    const struct linear_call *call = context;
    const struct linear *w = call->w;
    int n_groups = (w->n_out + LIBRARY_COLUMNS - 1) / LIBRARY_COLUMNS;
    const struct row_run *rows = &call->plan->prompts[item / n_groups];
    int column = item % n_groups * LIBRARY_COLUMNS;
    int width = w->n_out - column < LIBRARY_COLUMNS ? w->n_out - column : LIBRARY_COLUMNS;
    float *out = call->out + (size_t)rows->first * w->n_out + column;
    float *block = call->cpu->scratch[thread];
    for (int from = 0; from < w->n_in; from += LIBRARY_DEPTH) {
        int n = w->n_in - from < LIBRARY_DEPTH ? w->n_in - from : LIBRARY_DEPTH;
        unpack_columns(call, block, column, width, from, n);
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, rows->n, width, n, 1,
                    call->in + (size_t)rows->first * w->n_in + from, w->n_in, block, width,
                    from > 0, out, w->n_out);
    }
    if (w->bias)
        call->cpu->kernels->add_bias(out, (size_t)w->n_out, values(w->bias) + column, rows->n,
                                     width);
}

static bool product_is_right(int m, int n, int k)
{
    float a[m * k], b[k * n], c[m * n];
    for (int i = 0; i < m * k; i++)
        a[i] = (float)(i * 7 % 31 - 15) / 16;
    for (int i = 0; i < k * n; i++)
        b[i] = (float)(i * 11 % 29 - 14) / 16;
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, m, n, k, 1, a, k, b, n, 0, c, n);
    for (int i = 0; i < m; i++) {
        for (int j = 0; j < n; j++) {
            double sum = 0; /* exact: small multiples of 1/256 */
            for (int l = 0; l < k; l++)
                sum += (double)a[i * k + l] * b[l * n + j];
            if (!(fabs(sum - c[i * n + j]) < 1e-3))
                return false;
        }
    }
    return true;
}

bool cpu_library_is_wide(void)
{
    static const char *const wide[] = {"SkylakeX", "Cooperlake", "SapphireRapids"};
    const char *core = openblas_get_corename();
    for (size_t i = 0; i < sizeof(wide) / sizeof(*wide); i++)
        if (!strcmp(core, wide[i]))
            return true;
    return false;
}

bool cpu_library_is_right(void)
{
    static const int sizes[][3] = {{1, 1, 1},     {3, 17, 5},     {16, 16, 16}, {33, 65, 97},
                                   {64, 48, 128}, {40, 100, 300}, {130, 70, 64}};
    for (size_t i = 0; i < sizeof(sizes) / sizeof(*sizes); i++)
        if (!product_is_right(sizes[i][0], sizes[i][1], sizes[i][2]))
            return false;
    return true;
}

/* ---- ops ---- */

void cpu_linear(struct backend *b, struct buffer *out, const struct buffer *in,
                const struct linear *w, enum row_set rows)
{
    struct cpu *c = cpu_of(b);
    struct linear_call call = {
        .cpu = c, .w = w, .plan = &c->plans[rows], .in = values(in), .out = values(out)};
    CHECK(w->n_in <= c->options.max_dim);
    if (call.plan->n_prompts) {
        int n_groups = (w->n_out + LIBRARY_COLUMNS - 1) / LIBRARY_COLUMNS;
        pool_run(c->pool, n_groups * call.plan->n_prompts, library_item, &call);
    }
    if (call.plan->n_tiles)
        run_own(&call);
}

struct embed_call {
    struct cpu *cpu;
    const struct linear *table;
    float *out;
    float scale;
    bool sinusoidal;
};

static void add_sinusoids(const struct embed_call *call, float *out, int64_t position, int thread)
{
    int dim = call->table->n_in, n = (dim + 1) / 2;
    float *sine = call->cpu->scratch[thread], *cosine = sine + n;
    call->cpu->kernels->angles(sine, cosine, call->cpu->sinusoid, (double)position, n);
    for (int i = 0; i < dim; i++)
        out[i] += i % 2 ? cosine[i / 2] : sine[i / 2];
}

static void embed_row(void *context, int r, int thread)
{
    const struct embed_call *call = context;
    const struct linear *t = call->table;
    const struct step *step = call->cpu->step;
    int token = step->tokens[r], column = token % PANEL;
    CHECK(token >= 0 && token < t->n_out);
    const uint32_t *words = panel_at(t, token / PANEL, 0);
    float *out = call->out + (size_t)r * t->n_in;
    if (t->dtype == DTYPE_F32) {
        const float *group = (const float *)words;
        for (int i = 0; i < t->n_in; i++)
            out[i] = call->scale * group[(size_t)i * PANEL + column];
    } else {
        int shift = column < PANEL_WORDS ? 0 : 16;
        words += column % PANEL_WORDS;
        for (int i = 0; i < t->n_in; i++)
            out[i] = call->scale * bf16_to_f32((uint16_t)(words[(size_t)i * PANEL_WORDS] >> shift));
    }
    if (call->sinusoidal)
        add_sinusoids(call, out, step->positions[r], thread);
}

static void prepare_sinusoids(struct cpu *c, int dim)
{
    if (c->sinusoid_dim == dim)
        return;
    for (int i = 0; i < (dim + 1) / 2; i++)
        c->sinusoid[i] = pow(10000.0, -2.0 * i / dim);
    c->sinusoid_dim = dim;
}

void cpu_embed(struct backend *b, struct buffer *out, const struct linear *table, float scale,
               bool sinusoidal, const struct norm *next)
{
    struct cpu *c = cpu_of(b);
    (void)next;
    CHECK(table->n_in <= c->options.max_dim);
    if (sinusoidal)
        prepare_sinusoids(c, table->n_in);
    struct embed_call call = {c, table, values(out), scale, sinusoidal};
    size_t n_values = 4 * (size_t)c->step->n_rows * (size_t)table->n_in;
    cpu_each(c, c->step->n_rows, n_values, embed_row, &call);
}
