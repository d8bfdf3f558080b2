/* layer.cu - a layer as a handful of fused passes, and the head as one; fused.cuh draws it.
 *
 * The residual stream x stays f32. What passes from one product to the next is bf16; the
 * latents' logits, RG-LRU and all sums are f32. Layers of few rows and of the main configuration
 * are layer_plain.cu's; configurations that these passes do not know (see knows) are composed by
 * model.c from the single ops.
 */
#include "engine/kernels/cuda/layer.cuh"
#include "engine/kernels/cuda/mix.cuh"
#include "engine/kernels/cuda/stream.cuh"

enum {
    CLOSE_UP_THREADS = 256,
    FACTOR_THREADS = 128,
    FACTORED_ROWS = 1024, /* up to so many z's norm is a factor of the latents' logits */
    /* From and up to so many rows v, q, k go beside the RG-LRU: fewer gain more from launches that
     * overlap, and more fill the device. */
    BESIDE_LEAST = 17,
    BESIDE_ROWS = 256,
    NORMED_VALUES = 12288, /* of rows that a product's blocks norm each for themselves */
};

/* ---- what the passes know ---- */

static bool wide_rows(const struct linear *l)
{
    return !l->weight || (l->dtype != DTYPE_F32 && l->n_in % 16 == 0);
}

static bool knows(const struct layer_weights *w, const struct model_config *config, int layer)
{
    const bool full = config->layers[layer].type == LAYER_FULL_ATTENTION;
    const bool latents = !full && config->n_latents > 0;
    const struct linear *const gate_up[] = {&w->gate_proj, &w->up_proj};
    struct product_weight unused;
    if (w->vapor_theta || (!full && config->latent_input == LATENT_INPUT_CONV))
        return false;
    if (!full && !latents && config->latent_input != LATENT_INPUT_NONE)
        return false; /* q and k come from u */
    if (w->gate_proj.weight && !stack(&unused, gate_up, 2))
        return false;
    if (config->head_dim % 16 || config->head_dim > 256 || config_latents_per_head(config) > 64)
        return false;
    return wide_rows(&w->v_proj) && wide_rows(&w->o_proj) && wide_rows(&w->up_proj) &&
           wide_rows(&w->down_proj) && w->v_proj.weight && w->o_proj.weight;
}

/* ---- the passes ---- */

static struct product product_of(const struct pass *p, struct product_weight w, void *out,
                                 int64_t out_stride, enum product_output output)
{
    struct product q = {};
    q.w = w;
    q.in_stride = w.n_in;
    q.out = out;
    q.out_stride = out_stride;
    q.output = output;
    q.act = p->config->hidden_act;
    q.rows = p->c->step.rows;
    q.n_rows = &p->c->step.sizes->n_rows;
    return q;
}

static struct product normed(struct product q, const struct pass *p, const struct norm *norm)
{
    q.in = floats(p->x);
    q.norm = norm_of(norm);
    return q;
}

static struct buffer wrap(void *data)
{
    return {data, SIZE_MAX, false};
}

/* [R, D] where steps with prompts have norm(z). */
static bf16 *normed_z(const struct pass *p)
{
    return (bf16 *)p->s->input32;
}

/* The same of decode steps: bf16(z times its norm's weight), and z's squares in parts of 8. */
static bf16 *weighted_z(const struct pass *p)
{
    return normed_z(p);
}

static struct row_factors z_factors(const struct pass *p)
{
    const int D = p->config->hidden_size;
    return {p->s->recurrence32, D / 8, D, p->w->rglru_norm.eps};
}

/* Whether rows of h may leave z without its norm; a product with biases, or a norm with one, is
 * not the norm's factor times what it would be. The mixing by warps knows no factors. */
static bool may_factor(const struct pass *p)
{
    const struct layer_weights *w = p->w;
    const struct norm *norm = &w->rglru_norm;
    const struct mix m = layer_mix(p);
    return !mix_is_by_warps(&m) && p->c->step.decode && p->latents &&
           p->c->step.rows <= FACTORED_ROWS && norm->weight && !norm->bias &&
           norm->type == NORM_RMS && !w->latent_q.bias && !w->latent_k.bias;
}

/* z by the single ops: for block-diagonal gates that the fused pass has no room for. */
static void rglru_composed(const struct pass *p)
{
    const int D = p->config->hidden_size, blocks = p->config->rglru_blocks;
    const struct layer_weights *w = p->w;
    struct buffer h = wrap(p->s->h32), r = wrap(p->s->recurrence32), i = wrap(p->s->input32);
    struct buffer z = wrap(p->s->z);
    cuda_norm(p->b, &h, p->x, &w->norm1, D, ROWS_STEP);
    cuda_block_linear(p->b, &r, &h, w->recurrence_gate, w->recurrence_bias, D, blocks);
    cuda_block_linear(p->b, &i, &h, w->input_gate, w->input_bias, D, blocks);
    cuda_rglru(p->b, &z, &h, &r, &i, w->lambda, &p->state->slabs[STATE_RGLRU], D);
    if (!p->c->step.decode)
        norm_to_bf16(p->c, normed_z(p), p->s->z, norm_of(&w->rglru_norm), D, NULL, p->c->step.rows,
                     &p->c->step.sizes->n_rows);
}

/* v, q and k; stacked: as one matrix, where they can be. */
static void products(const struct pass *p, struct product vqk, bool is_stacked)
{
    const struct linear *const linears[] = {&p->w->v_proj, &p->w->q_proj, &p->w->k_proj};
    const int n = p->window ? 3 : 1;
    int64_t column = linears[0]->n_out;
    fused_product(p->c, &vqk, p->s->wide);
    for (int i = 1; !is_stacked && i < n; column += linears[i++]->n_out) {
        struct product q = vqk;
        q.w = weight_of(linears[i]);
        q.out = p->s->vqk + column;
        fused_product(p->c, &q, p->s->wide);
    }
}

static struct rglru_front layer_rglru(const struct pass *p)
{
    const struct layer_weights *w = p->w;
    struct rglru_front f = {};
    f.products = (__half *)p->s->recurrence32;
    f.normed = normed_z(p);
    f.z_norm = norm_of(&w->rglru_norm);
    f.x = floats(p->x);
    f.norm = norm_of(&w->norm1);
    f.recurrence_gate = floats(w->recurrence_gate);
    f.recurrence_bias = floats(w->recurrence_bias);
    f.input_gate = floats(w->input_gate);
    f.input_bias = floats(w->input_bias);
    f.lambda = floats(w->lambda);
    f.state = float_slab(&p->state->slabs[STATE_RGLRU]);
    f.z = p->s->z;
    f.dim = p->config->hidden_size;
    f.n_blocks = p->config->rglru_blocks;
    return f;
}

/* Pass 1: v, q, k and the RG-LRU, all from norm1(x). */
static void front(struct pass *p)
{
    const struct layer_weights *w = p->w;
    const struct linear *const linears[] = {&w->v_proj, &w->q_proj, &w->k_proj};
    struct product_weight stacked;
    const bool is_stacked = stack(&stacked, linears, p->window ? 3 : 1);
    struct product vqk = normed(product_of(p, is_stacked ? stacked : weight_of(linears[0]),
                                           p->s->vqk, vqk_stride(p), OUTPUT_BF16),
                                p, &w->norm1);
    const bool rglru = !p->full && p->config->latent_input == LATENT_INPUT_RGLRU;
    const bool small = p->c->step.decode && p->c->step.rows <= FRONT_ROWS && !p->chained;
    struct rglru_front f = {};
    if (rglru)
        f = layer_rglru(p);
    if (rglru && is_stacked && small && fused_front(p->c, &vqk, &f))
        return;
    if (rglru && !small && !p->normed)
        norm_to_bf16(p->c, p->s->h, f.x, f.norm, f.dim, NULL, vqk.rows, vqk.n_rows);
    if (p->normed || (rglru && !small)) {
        vqk.in = f.h = p->s->h;
        vqk.norm = {};
    }
    const bool beside = rglru && f.h && vqk.rows >= BESIDE_LEAST && vqk.rows <= BESIDE_ROWS;
    if (beside) {
        beside_begin(&p->s->beside, &p->c->queue);
        products(p, vqk, is_stacked);
        beside_end(&p->s->beside, &p->c->queue);
    }
    if (rglru && f.h && may_factor(p)) {
        f.weighted = weighted_z(p);
        f.factors = z_factors(p);
        f.out_weight = f.z_norm.weight;
    }
    const bool fused = rglru && fused_rglru(p->c, &f);
    p->factored = fused && f.weighted;
    if (rglru && !fused)
        rglru_composed(p);
    if (!beside)
        products(p, vqk, is_stacked);
}

/* The rows the latents look at: before their norm, or after it. */
static void set_latent_input(const struct pass *p, struct product *q)
{
    const bool rglru = p->config->latent_input == LATENT_INPUT_RGLRU;
    if (rglru && !p->c->step.decode) {
        q->in = normed_z(p);
        return;
    }
    if (p->factored) {
        q->in = weighted_z(p);
        return;
    }
    q->in = rglru ? p->s->z : floats(p->x);
    q->norm = norm_of(rglru ? &p->w->rglru_norm : &p->w->norm1);
}

/* The latents' logits as a product of their own: g, then theta, for each row. */
static void gates(const struct pass *p, struct mix *m)
{
    const struct linear *const linears[] = {&p->w->latent_q, &p->w->latent_k};
    const int columns = linears[0]->n_out + linears[1]->n_out;
    struct product_weight stacked;
    const bool is_stacked = stack(&stacked, linears, 2);
    struct product q = product_of(p, is_stacked ? stacked : weight_of(linears[0]), p->s->gates,
                                  columns, OUTPUT_F32);
    set_latent_input(p, &q);
    struct queue *const queue = &p->c->queue;
    const bool pdl = queue->pdl, joined = beside_join(&p->s->beside, queue);
    const bool many = p->c->step.decode && (int64_t)q.rows * q.w.n_in > NORMED_VALUES;
    queue->pdl = pdl && !joined; /* for the first launch that waits for both */
    if ((joined || many) && q.norm.weight) {
        norm_to_bf16(p->c, p->c->converted, (const float *)q.in, q.norm, q.w.n_in, NULL, q.rows,
                     q.n_rows);
        queue->pdl = pdl;
        q.in = p->c->converted;
        q.norm = {};
    }
    fused_product(p->c, &q, p->s->wide);
    queue->pdl = pdl;
    if (!is_stacked) {
        q.w = weight_of(linears[1]);
        q.out = p->s->gates + linears[0]->n_out;
        fused_product(p->c, &q, p->s->wide);
    }
    m->g = p->s->gates;
    m->theta = p->s->gates + linears[0]->n_out;
    m->gate_stride = columns;
    if (p->factored)
        m->gate_factors = z_factors(p);
}

/* A block a row: the factors of the latents' logits, for a mixing that takes them with theirs. */
static __global__ void __launch_bounds__(FACTOR_THREADS)
    factor_kernel(float *gates, int columns, const __grid_constant__ struct row_factors f,
                  const int32_t *n_rows)
{
    pdl_trigger();
    pdl_wait();
    const int row = blockIdx.x;
    if (row >= *n_rows)
        return;
    const float factor = factor_of_row(f, row);
    for (int i = threadIdx.x; i < columns; i += FACTOR_THREADS)
        gates[(int64_t)row * columns + i] *= factor;
}

struct mix layer_mix(const struct pass *p)
{
    const struct model_config *c = p->config;
    const struct slab *slabs = p->state->slabs;
    struct mix m = {};
    m.v = p->s->vqk;
    m.q = p->window ? p->s->vqk + head_values(p, c->n_kv_heads) : NULL;
    m.k = p->window ? m.q + head_values(p, c->n_heads) : NULL;
    m.stride = vqk_stride(p);
    m.q_norm = floats(p->w->q_norm.weight);
    m.k_norm = floats(p->w->k_norm.weight);
    m.qk_eps = p->w->q_norm.eps;
    m.latents = {c->n_heads, p->latents ? config_latents_per_head(c) : 0, c->head_dim,
                 c->n_kv_heads, p->latents && p->window};
    if (p->window) {
        m.frequencies = (const double *)p->w->rope->data;
        m.window = {c->n_heads,
                    c->n_kv_heads,
                    c->head_dim,
                    config_ring_rows(c, p->layer),
                    (float)c->attention_scale,
                    (float)c->attn_logit_softcapping};
        m.ring_k = slabs[STATE_RING_K];
        m.ring_v = slabs[STATE_RING_V];
    }
    if (p->latents) {
        m.m = float_slab(&slabs[STATE_LATENT_M]);
        m.alpha = float_slab(&slabs[STATE_LATENT_ALPHA]);
        m.s = float_slab(&slabs[STATE_LATENT_S]);
    }
    m.out = p->s->mixed;
    return m;
}

/* Pass 2 for any step. */
static void mix(const struct pass *p)
{
    struct mix m = layer_mix(p);
    if (p->latents)
        gates(p, &m);
    if (p->c->step.decode && fused_mix(p->c, &m))
        return;
    if (p->factored)
        launch(&p->c->queue, "factor", factor_kernel, dim3(p->c->step.rows), FACTOR_THREADS, 0,
               p->s->gates, (int)m.gate_stride, m.gate_factors, &p->c->step.sizes->n_rows);
    CHECK(prompt_mix(p->c, &m));
}

/* Pass 2 of attention over whole contexts, one row a sequence: the single op splits the keys
 * over the device, which a tile per head does not. */
static void attention_by_splits(const struct pass *p)
{
    const struct model_config *c = p->config;
    const struct layer_weights *w = p->w;
    const struct linear *const linears[] = {&w->v_proj, &w->q_proj, &w->k_proj};
    float *const outs[] = {p->s->v32, p->s->q32, p->s->k32};
    for (int i = 0; i < 3; i++) {
        const struct product q =
            normed(product_of(p, weight_of(linears[i]), outs[i], linears[i]->n_out, OUTPUT_F32), p,
                   &w->norm1);
        fused_product(p->c, &q, p->s->wide);
    }
    struct buffer v = wrap(p->s->v32), q = wrap(p->s->q32), k = wrap(p->s->k32);
    struct buffer mixed = wrap(p->s->mixed32);
    const struct mix m = layer_mix(p);
    if (w->q_norm.weight)
        cuda_head_norm(p->b, &q, &w->q_norm, c->n_heads, c->head_dim);
    if (w->k_norm.weight)
        cuda_head_norm(p->b, &k, &w->k_norm, c->n_kv_heads, c->head_dim);
    cuda_rope(p->b, &q, w->rope, c->n_heads, c->head_dim);
    cuda_rope(p->b, &k, w->rope, c->n_kv_heads, c->head_dim);
    cuda_window(p->b, &mixed, NULL, &q, &k, &v, &m.ring_k, &m.ring_v, NULL, &m.window);
    norm_to_bf16(p->c, p->s->mixed, p->s->mixed32, {}, head_values(p, c->n_heads), NULL,
                 p->c->step.rows, &p->c->step.sizes->n_rows);
}

/* The same where a norm follows: next, of the sublayer that comes, if that is known. */
static void chained_product(const struct pass *p, struct product q, const struct norm *post_norm,
                            const struct norm *next)
{
    const int n_parts = stream_partial_sums(p->c, &q), D = p->config->hidden_size;
    if (!n_parts)
        fused_product(p->c, &q, p->s->wide);
    struct residual r = {};
    r.x = floats(p->x);
    r.y = n_parts ? p->c->partials : p->s->y;
    r.n_parts = n_parts ? n_parts : 1;
    r.part_values = (int64_t)q.rows * D;
    r.dim = D;
    r.post = norm_of(post_norm);
    if (next)
        r.next = norm_of(next);
    r.h = p->s->h;
    r.n_rows = q.n_rows;
    residual_norm(p->c, &r);
}

/* Passes 3 and 5: x += W in, through the post norm where there is one. */
static void add_product(const struct pass *p, const struct linear *l, const bf16 *in,
                        const struct norm *post_norm, const struct norm *next)
{
    const bool post = post_norm->weight != NULL;
    const int D = p->config->hidden_size;
    struct product q = product_of(p, weight_of(l), post ? p->s->y : floats(p->x), D,
                                  post ? OUTPUT_F32 : OUTPUT_ADD);
    q.in = in;
    if (p->chained) {
        chained_product(p, q, post_norm, next);
        return;
    }
    fused_product(p->c, &q, p->s->wide);
    if (post)
        norm_add(p->c, floats(p->x), p->s->y, norm_of(post_norm), D);
}

/* Pass 4. */
static void mlp_in(const struct pass *p)
{
    const struct linear *const gate_up[] = {&p->w->gate_proj, &p->w->up_proj};
    const bool gated = p->w->gate_proj.weight != NULL;
    struct product_weight w = weight_of(&p->w->up_proj);
    if (gated)
        CHECK(stack(&w, gate_up, 2));
    struct product q = normed(product_of(p, w, p->s->up, p->w->up_proj.n_out,
                                         gated ? OUTPUT_ACTIVATE : OUTPUT_ACTIVATE_PLAIN),
                              p, &p->w->norm2);
    if (p->chained) {
        q.in = p->s->h;
        q.norm = {};
    }
    fused_product(p->c, &q, p->s->wide);
}

static bool is_chained(const struct pass *p)
{
    const struct layer_weights *w = p->w;
    return p->s->h && w->norm1.weight && w->norm2.weight && w->post_norm1.weight &&
           w->post_norm2.weight && residual_possible(p->config->hidden_size);
}

bool cuda_layer(struct backend *b, struct buffer *x, const struct layer_weights *w,
                const struct layer_state *state, const struct model_config *config, int layer)
{
    struct cuda *c = cuda_of(b);
    if (!c->layer)
        return false;
    struct pass p = {};
    p.c = c;
    p.b = b;
    p.s = c->layer;
    p.w = w;
    p.state = state;
    p.config = config;
    p.x = x;
    p.full = config->layers[layer].type == LAYER_FULL_ATTENTION;
    p.latents = !p.full && config->n_latents > 0;
    p.window = config_ring_rows(config, layer) > 0;
    p.layer = layer;
    p.packed = p.s->packed_layer == layer;
    p.s->packed_layer = -1;
    p.s->h_is_heads = false;
    p.s->packed_heads.values = NULL;
    c->layers = layer_plain(&p);
    if (c->layers)
        return true;
    if (!knows(w, config, layer))
        return false;
    c->layers = "passes";
    p.chained = is_chained(&p);
    p.normed = p.chained && layer > 0 && p.s->h_layer == layer;
    const bool is_last = layer + 1 >= config->n_layers;
    p.s->h_layer = p.chained && !is_last && w[1].norm1.weight ? layer + 1 : -1;
    if (p.full && c->step.decode) {
        attention_by_splits(&p);
    } else {
        front(&p);
        mix(&p);
    }
    add_product(&p, &w->o_proj, p.s->mixed, &w->post_norm1, &w->norm2);
    mlp_in(&p);
    add_product(&p, &w->down_proj, p.s->up, &w->post_norm2, is_last ? NULL : &w[1].norm1);
    return true;
}

/* ---- the head ---- */

static __global__ void close_up_kernel(float *out, const float *in, int64_t stride, int n,
                                       const int32_t *n_rows)
{
    pdl_trigger();
    pdl_wait();
    const int row = blockIdx.x, column = blockIdx.y * blockDim.x + threadIdx.x;
    if (row < *n_rows && column < n)
        out[(int64_t)row * n + column] = in[row * stride + column];
}

/* Rows of an odd number of logits are padded: the library's products of many rows are several
 * times faster for it, and rows can be read 16 bytes at a time. For the host to see they are
 * put into the model's buffer without the padding. */
static bool pad_logits(const struct cuda *c, struct product *q, const struct linear *lm_head)
{
    const int64_t padded = padded_columns(lm_head->n_out);
    const size_t n_bytes = (size_t)padded * (size_t)lm_head->n_in * dtype_bytes(lm_head->dtype);
    if (!c->layer->logits || padded == lm_head->n_out)
        return false;
    q->out = c->layer->logits;
    q->out_stride = padded;
    q->n_padded = lm_head->weight->n_bytes >= n_bytes ? (int)padded : 0;
    return true;
}

bool cuda_head(struct backend *b, struct buffer *logits, const struct buffer *x,
               const struct norm *norm, const struct linear *lm_head, float softcap)
{
    struct cuda *c = cuda_of(b);
    if (!c->layer || !norm->weight || !wide_rows(lm_head))
        return false;
    struct product q = {};
    q.in = floats(x);
    q.in_stride = lm_head->n_in;
    q.norm = norm_of(norm);
    q.in_rows = c->step.logit_rows;
    q.w = weight_of(lm_head);
    q.out = logits->data;
    q.out_stride = lm_head->n_out;
    q.output = OUTPUT_F32;
    if (c->step.drawn_from) /* a pass over all logits less */
        c->logits_cap = softcap;
    else
        q.softcap = softcap;
    q.rows = c->step.logits;
    q.n_rows = &c->step.sizes->n_logit_rows;
    const bool padded = pad_logits(c, &q, lm_head);
    if (c->layer->h_is_heads && stream_factors(c, &q)) {
        q.in = c->layer->h;
        q.norm = {};
        q.factors = c->layer->heads;
    }
    if (!c->layer->packed_heads.values || !warpgroup_head(c, &q, &c->layer->packed_heads))
        fused_product(c, &q, c->layer->wide);
    if (padded && c->step.drawn_from) {
        c->logits = c->layer->logits;
        c->logits_stride = q.out_stride;
    } else if (padded) {
        launch(&c->queue, "close_up", close_up_kernel,
               dim3(q.rows, ceil_div(lm_head->n_out, CLOSE_UP_THREADS)), CLOSE_UP_THREADS, 0,
               floats(logits), (const float *)c->layer->logits, q.out_stride, lm_head->n_out,
               q.n_rows);
    }
    return true;
}
