/* layer_plain.cu - layers of few rows, up to CLUSTER_ROWS by clusters (cluster.cuh) and up to
 * WARPGROUP_ROWS by warpgroups (warpgroup.cuh): of the main configuration in its plainest form, of
 * a shape that there are kernels for.
 */
#include "engine/kernels/cuda/layer.cuh"

/* ---- which layers ---- */

static bool plain_matrix(const struct linear *l)
{
    return l->weight && l->dtype == DTYPE_BF16 && !l->bias;
}

static bool plain_norm(const struct norm *n)
{
    return n->weight && !n->bias && n->type == NORM_RMS;
}

/* The main configuration in its plainest form, of a shape that there are kernels for. */
static bool plain_layer(const struct pass *p)
{
    const struct layer_weights *w = p->w;
    const struct model_config *c = p->config;
    const struct linear *const matrices[] = {&w->v_proj,    &w->q_proj,   &w->k_proj,
                                             &w->o_proj,    &w->latent_q, &w->latent_k,
                                             &w->gate_proj, &w->up_proj,  &w->down_proj};
    const struct cluster_shape shape = cluster_shape_of(c);
    if (!p->c->step.decode || p->c->queue.deterministic || !p->latents || !p->window ||
        c->latent_input != LATENT_INPUT_RGLRU || !cluster_has(&shape))
        return false;
    if (w->vapor_theta || w->q_norm.weight || w->k_norm.weight || w->post_norm1.weight ||
        w->post_norm2.weight || c->n_kv_heads != c->n_heads ||
        config_latents_per_head(c) > CLUSTER_LATENTS ||
        config_ring_rows(c, p->layer) > CLUSTER_RING_ROWS)
        return false;
    for (size_t i = 0; i < sizeof(matrices) / sizeof(*matrices); i++)
        if (!plain_matrix(matrices[i]))
            return false;
    return plain_norm(&w->norm1) && plain_norm(&w->norm2) && plain_norm(&w->rglru_norm);
}

static bool for_clusters(const struct pass *p)
{
    const struct cluster_shape shape = cluster_shape_of(p->config);
    const enum dtype ring = p->state->slabs[STATE_RING_K].dtype;
    return p->c->step.rows <= CLUSTER_ROWS && plain_layer(p) && cluster_knows(p->c, &shape) &&
           (ring == DTYPE_BF16 || ring == DTYPE_F8_E4M3);
}

static const bf16 *matrix(const struct linear *l)
{
    return (const bf16 *)l->weight->data;
}

/* The layer's RG-LRU as the mixing wants it. Weights do not change: once is enough, and the
 * first step of any form is not one that is recorded. */
static const void *prepared_gates(const struct pass *p, const struct cluster_shape *shape)
{
    const struct layer_weights *w = p->w;
    struct layer_scratch *s = p->c->layer;
    void *to = (char *)s->prepared + (size_t)p->layer * cluster_prepared_bytes(shape);
    const struct cluster_gates g = {floats(w->recurrence_gate), floats(w->recurrence_bias),
                                    floats(w->input_gate),      floats(w->input_bias),
                                    floats(w->lambda),          floats(w->rglru_norm.weight)};
    if (p->layer >= s->n_prepared) {
        cluster_prepare(p->c, shape, &g, to);
        s->n_prepared = p->layer + 1;
    }
    return to;
}

static void mix_by_clusters(const struct pass *p, const struct cluster_shape *shape,
                            const struct packed_rows *x, const struct packed_rows *mixed)
{
    const struct layer_weights *w = p->w;
    const struct slab *slabs = p->state->slabs;
    struct layer_scratch *const s = p->s;
    struct cluster_mix m = {};
    const bool overlaps = p->c->queue.pdl; /* with what prepares its weights it must not */
    p->c->queue.pdl &= p->layer < s->n_prepared;
    m.in = *x;
    m.q = matrix(&w->q_proj);
    m.k = matrix(&w->k_proj);
    m.v = matrix(&w->v_proj);
    m.prepared = prepared_gates(p, shape);
    m.rglru = float_slab(&slabs[STATE_RGLRU]);
    m.z = s->z;
    m.z_eps = w->rglru_norm.eps;
    m.latent_q = matrix(&w->latent_q);
    m.latent_k = matrix(&w->latent_k);
    m.n_latents = config_latents_per_head(p->config);
    m.m = float_slab(&slabs[STATE_LATENT_M]);
    m.alpha = float_slab(&slabs[STATE_LATENT_ALPHA]);
    m.s = float_slab(&slabs[STATE_LATENT_S]);
    m.frequencies = (const double *)w->rope->data;
    m.ring_k = slabs[STATE_RING_K].buffer->data;
    m.ring_v = slabs[STATE_RING_V].buffer->data;
    m.ring_dtype = slabs[STATE_RING_K].dtype;
    m.ring_values = slabs[STATE_RING_K].row_values;
    m.ring_rows = (int)config_ring_rows(p->config, p->layer);
    m.scale = (float)p->config->attention_scale;
    m.softcap = (float)p->config->attn_logit_softcapping;
    m.mixed = *mixed;
    m.o = matrix(&w->o_proj);
    m.shares = s->shares;
    cluster_mix_launch(p->c, shape, &m);
    p->c->may_be_late |= p->layer == 0;
    p->c->step.late = false;
    p->c->queue.pdl = overlaps;
}

/* x packed for the layer's first sublayer, unless the layer before has left it: as the path, which
 * has n_parts of squares a row, wants it. */
static struct packed_rows packed_x(const struct pass *p, int n_parts)
{
    const struct norm *norm = &p->w->norm1;
    const struct packed_rows x = {p->s->packed_x, p->config->hidden_size, p->s->x_squares, n_parts,
                                  norm->eps};
    if (!p->packed || p->s->packed_parts != n_parts)
        pack_rows(p->c, &x, floats(p->x), floats(norm->weight), p->c->step.rows,
                  &p->c->step.sizes->n_rows);
    p->s->packed_parts = n_parts;
    return x;
}

bool packed_first(struct cuda *c, const struct norm *norm, int n, struct packed_rows *out)
{
    struct layer_scratch *const s = c->layer;
    const int rows = c->step.rows;
    if (!s || !s->packed_x || !c->step.decode || c->queue.deterministic || rows > WARPGROUP_ROWS ||
        !plain_norm(norm))
        return false;
    s->packed_layer = 0;
    s->packed_parts = rows <= CLUSTER_ROWS ? n / FEW_PART : WARPGROUP_PARTS;
    *out = {s->packed_x, n, s->x_squares, s->packed_parts, norm->eps};
    return true;
}

/* The norm after this layer; NULL: its rows are not left for it. */
static const struct norm *norm_after(const struct pass *p)
{
    return plain_norm(&p->w[1].norm1) ? &p->w[1].norm1 : NULL;
}

/* What follows the layer's last sublayer: the next layer, or the head. */
static struct few_sum end_of_few(const struct pass *p, const struct packed_rows *x)
{
    struct layer_scratch *const s = p->s;
    const struct norm *const next = norm_after(p);
    struct few_sum to = {s->x_between, floats(p->x), NULL, *x, NULL};
    if (!next)
        return to;
    to.weight = floats(next->weight);
    if (p->layer + 1 < p->config->n_layers) {
        s->packed_layer = p->layer + 1;
        return to;
    }
    to.plain = s->h;
    s->h_is_heads = true;
    s->heads = {x->squares, x->n_parts, x->n, next->eps};
    return to;
}

/* A layer of few rows: see cluster.cuh. */
static void layer_by_clusters(const struct pass *p)
{
    const struct layer_weights *w = p->w;
    struct layer_scratch *const s = p->s;
    const int D = p->config->hidden_size;
    const struct cluster_shape shape = cluster_shape_of(p->config);
    const struct packed_rows x = packed_x(p, D / FEW_PART);
    const struct packed_rows mixed = {s->packed_mixed, D, NULL, 0, 0};
    mix_by_clusters(p, &shape, &x, &mixed);

    struct few_mlp m = {};
    m.in = x;
    m.in.eps = w->norm2.eps;
    const struct few_output o = {
        mixed, matrix(&w->o_proj), {floats(p->x), s->x_between, floats(w->norm2.weight), m.in}};
    if (p->c->step.rows > FEW_ALONE)
        few_output_launch(p->c, &shape, &o);
    m.alone = {floats(p->x), s->shares, floats(w->norm2.weight), s->x_between};

    m.gate = matrix(&w->gate_proj);
    m.up = matrix(&w->up_proj);
    m.down = matrix(&w->down_proj);
    m.act = p->config->hidden_act;
    m.middle = s->up;
    m.to = end_of_few(p, &x);
    m.z = s->z;
    m.rglru = float_slab(&p->state->slabs[STATE_RGLRU]);
    few_mlp_launch(p->c, &shape, &m);
}

static bool for_warpgroups(const struct pass *p)
{
    const struct layer_weights *w = p->w;
    const struct linear *const vqk[] = {&w->v_proj, &w->q_proj, &w->k_proj};
    const struct linear *const logits[] = {&w->latent_q, &w->latent_k};
    const struct linear *const gate_up[] = {&w->gate_proj, &w->up_proj};
    struct product_weight a, b, c;
    return p->c->step.rows <= WARPGROUP_ROWS && plain_layer(p) && warpgroups_are_there(p->c) &&
           stack(&a, vqk, 3) && stack(&b, logits, 2) && stack(&c, gate_up, 2) &&
           warpgroup_has(OUTPUT_BF16, a.n_out, a.n_in) && warpgroup_has_logits(b.n_out, b.n_in) &&
           warpgroup_has(OUTPUT_ACTIVATE, c.n_out, c.n_in) &&
           warpgroup_has(OUTPUT_ADD, w->o_proj.n_out, w->o_proj.n_in) &&
           warpgroup_has(OUTPUT_ADD, w->down_proj.n_out, w->down_proj.n_in);
}

/* Matrices from `first` on, which lie one behind the other. */
static struct warpgroup_product group_product(const struct pass *p, const struct packed_rows *in,
                                              const struct linear *first, int n_out,
                                              enum product_output output)
{
    struct warpgroup_product q = {};
    q.in = *in;
    q.weights = matrix(first);
    q.n_out = n_out;
    q.output = output;
    q.act = p->config->hidden_act;
    q.rows = p->c->step.rows;
    q.n_rows = &p->c->step.sizes->n_rows;
    return q;
}

/* x += the product, and what the next sublayer begins with, unless there is none. */
static void group_add(const struct pass *p, const struct packed_rows *in, const struct linear *l,
                      const struct packed_rows *x, const struct norm *next)
{
    struct warpgroup_product q = group_product(p, in, l, l->n_out, OUTPUT_ADD);
    q.out = floats(p->x);
    q.out_stride = l->n_out;
    if (next) {
        q.next = *x;
        q.next_weight = floats(next->weight);
    }
    warpgroup_product(p->c, &q);
}

/* From the packed rows x to what the output projection is given: the front, the mixing. */
static void group_mix(const struct pass *p, const struct packed_rows *x,
                      const struct packed_rows *mixed)
{
    const struct layer_weights *w = p->w;
    const struct layer_scratch *s = p->s;
    const int columns = w->latent_q.n_out + w->latent_k.n_out;
    const struct cluster_shape shape = cluster_shape_of(p->config);
    const bool overlaps = p->c->queue.pdl; /* as in mix_by_clusters */
    struct warpgroup_front f = {};
    p->c->queue.pdl &= p->layer < s->n_prepared;
    f.vqk = group_product(p, x, &w->v_proj, (int)vqk_stride(p), OUTPUT_BF16);
    f.vqk.out = s->vqk;
    f.vqk.out_stride = vqk_stride(p);
    f.prepared = prepared_gates(p, &shape);
    f.state = float_slab(&p->state->slabs[STATE_RGLRU]);
    f.z_eps = w->rglru_norm.eps;
    f.logit_weights = matrix(&w->latent_q);
    f.n_logits = columns;
    f.logits = s->gates;
    f.logit_stride = columns;
    warpgroup_front(p->c, &f);
    p->c->may_be_late |= p->layer == 0;
    p->c->step.late = false;
    p->c->queue.pdl = overlaps;

    struct mix m = layer_mix(p);
    m.g = s->gates;
    m.theta = s->gates + w->latent_q.n_out;
    m.gate_stride = columns;
    m.packed = *mixed;
    CHECK(fused_mix(p->c, &m));
}

/* A layer of up to WARPGROUP_ROWS rows: see warpgroup.cuh. */
static void layer_by_warpgroups(const struct pass *p)
{
    const struct layer_weights *w = p->w;
    struct layer_scratch *s = p->s;
    const struct model_config *config = p->config;
    const int D = config->hidden_size;
    const bool is_last = p->layer + 1 >= config->n_layers;
    const bool is_left = !is_last || p->c->step.rows <= WARPGROUP_HEAD_ROWS;
    const struct norm *next = is_left ? norm_after(p) : NULL;
    const struct packed_rows x = packed_x(p, WARPGROUP_PARTS);
    struct packed_rows x2 = x;
    x2.eps = w->norm2.eps;
    const struct packed_rows mixed = {s->packed_mixed, D, NULL, 0, 0};
    const struct packed_rows up = {s->packed_up, config->intermediate_size, NULL, 0, 0};
    s->packed_layer = next && !is_last ? p->layer + 1 : -1;

    group_mix(p, &x, &mixed);
    group_add(p, &mixed, &w->o_proj, &x2, &w->norm2);
    struct warpgroup_product features =
        group_product(p, &x2, &w->gate_proj, 2 * config->intermediate_size, OUTPUT_ACTIVATE);
    features.next = up;
    warpgroup_product(p->c, &features);
    group_add(p, &up, &w->down_proj, &x, next);
    if (is_last && next) {
        s->packed_heads = x;
        s->packed_heads.eps = next->eps;
    }
}

const char *layer_plain(const struct pass *p)
{
    if (for_clusters(p)) {
        layer_by_clusters(p);
        return "clusters";
    }
    if (for_warpgroups(p)) {
        layer_by_warpgroups(p);
        return "warpgroups";
    }
    return NULL;
}
