/* layer.cu - a layer as a handful of fused passes, and the head as one; fused.cuh draws it.
 *
 * The residual stream x stays f32. What passes from one product to the next is bf16; the
 * latents' logits, RG-LRU and all sums are f32. Configurations that these passes do not know
 * (see knows) are composed by model.c from the single ops.
 */
#include "engine/kernels/cuda/beside.cuh"
#include "engine/kernels/cuda/cluster.cuh"
#include "engine/kernels/cuda/fused.cuh"
#include "engine/kernels/cuda/stream.cuh"
#include "engine/kernels/cuda/warpgroup.cuh"

extern "C" {
#include "engine/state.h"
#include "engine/upload.h"
}

enum {
    CLOSE_UP_THREADS = 256,
    /* From and up to so many rows v, q, k go beside the RG-LRU: fewer gain more from launches that
     * overlap, and more fill the device. */
    BESIDE_LEAST = 17,
    BESIDE_ROWS = 256,
    NORMED_VALUES = 12288, /* of rows that a product's blocks norm each for themselves */
};

/* Activations between the passes, [max_rows, ...]; NULL where the configuration has no use. */
struct layer_scratch {
    bf16 *vqk;    /* [R, (H + 2 KV) d] v, q and k of a row side by side */
    bf16 *h;      /* [R, D] norm1(x), where both the RG-LRU and v, q, k want it; norm1 or norm2
                   * of x behind a post norm */
    float *z;     /* [R, D] the RG-LRU's output */
    float *gates; /* [R, columns of g + L] g, then theta */
    bf16 *mixed;  /* [R, H d] */
    bf16 *up;     /* [R, F] */
    bf16 *wide;   /* [R, 2F] what the library leaves for an activation */
    float *y;     /* [R, D] a sublayer's output that a post norm goes over */
    /* The long way of attention over whole contexts, and of gates in wide blocks. */
    float *v32, *q32, *k32, *mixed32;    /* [R, KV d], [R, H d], [R, KV d], [R, H d] */
    float *h32, *recurrence32, *input32; /* [R, D]; the latter two also for the RG-LRU of prompts:
                                          * __half products, bf16 normed z */
    float *logits; /* [max_logit_rows, V padded], where V is not a multiple of PADDED_ROWS */
    /* Layers of few rows, CLUSTER_ROWS at most. */
    float *x_between; /* [rows, D] the residual stream within the layer */
    float *shares;    /* [MIX_CLUSTERS, rows, D] what each head adds to it */
    float *scales;    /* [rows] */
    void *prepared;   /* [layers] cluster_prepare's */
    int n_prepared;   /* layers that are */
    /* Layers of up to WARPGROUP_ROWS rows: x, z, what is mixed and the mlp's features. */
    bf16 *packed_x, *packed_z, *packed_mixed, *packed_up;
    float *x_squares, *z_squares;
    int packed_layer; /* whose norm1 the layer before left in packed_x; -1: nobody's */
    size_t n_bytes;
    int h_layer; /* whose norm1(x) the layer before left in h; -1: nobody's */
    struct beside beside; /* v, q and k, while the queue has the RG-LRU */
};

/* ---- scratch ---- */

struct scratch_item {
    void **out;
    size_t row_bytes;
    int rows;
};

enum { N_ITEMS = 26 };

static int64_t padded_columns(int n)
{
    return (int64_t)ceil_div(n, PADDED_ROWS) * PADDED_ROWS;
}

static bool has_full_attention(const struct model_config *c)
{
    for (int l = 0; l < c->n_layers; l++)
        if (c->layers[l].type == LAYER_FULL_ATTENTION)
            return true;
    return false;
}

static struct cluster_shape cluster_shape_of(const struct model_config *c)
{
    return {c->hidden_size, c->n_heads, c->head_dim, c->intermediate_size, c->rglru_blocks};
}

static void list_items(struct scratch_item out[N_ITEMS], struct layer_scratch *s,
                       const struct backend_options *o)
{
    const struct model_config *c = o->config;
    const int rows = o->max_rows;
    const size_t logits = c->vocab_size % PADDED_ROWS ? sizeof(float) : 0;
    const size_t D = (size_t)c->hidden_size, F = (size_t)c->intermediate_size;
    const size_t q = (size_t)c->n_heads * (size_t)c->head_dim;
    const size_t kv = (size_t)c->n_kv_heads * (size_t)c->head_dim;
    const size_t full = has_full_attention(c) ? sizeof(float) : 0;
    const size_t rglru = c->latent_input == LATENT_INPUT_RGLRU ? sizeof(float) : 0;
    const struct cluster_shape shape = cluster_shape_of(c);
    const size_t prepared = rglru && cluster_has(&shape) ? cluster_prepared_bytes(&shape) : 0;
    const int few = rows < CLUSTER_ROWS ? rows : CLUSTER_ROWS;
    const size_t packed = rglru && cluster_has(&shape) ? sizeof(bf16) : 0;
    const struct scratch_item items[N_ITEMS] = {
        {(void **)&s->vqk, (q + 2 * kv) * sizeof(bf16), rows},
        {(void **)&s->h, rglru || c->post_norms ? D * sizeof(bf16) : 0, rows},
        {(void **)&s->z, D * rglru, rows},
        {(void **)&s->gates, (2 * (size_t)c->n_latents + (size_t)c->n_heads) * sizeof(float), rows},
        {(void **)&s->mixed, q * sizeof(bf16), rows},
        {(void **)&s->up, F * sizeof(bf16), rows},
        {(void **)&s->wide, 2 * F * sizeof(bf16), rows},
        {(void **)&s->y, c->post_norms ? D * sizeof(float) : 0, rows},
        {(void **)&s->v32, kv * full, rows},
        {(void **)&s->q32, q * full, rows},
        {(void **)&s->k32, kv * full, rows},
        {(void **)&s->mixed32, q * full, rows},
        {(void **)&s->h32, D * rglru, rows},
        {(void **)&s->recurrence32, D * rglru, rows},
        {(void **)&s->input32, D * rglru, rows},
        {(void **)&s->logits, (size_t)padded_columns(c->vocab_size) * logits, o->max_logit_rows},
        {(void **)&s->x_between, D * rglru, few},
        {(void **)&s->shares, MIX_CLUSTERS * D * rglru, few},
        {(void **)&s->scales, rglru, few},
        {&s->prepared, prepared, c->n_layers},
        {(void **)&s->packed_x, D * packed, WARPGROUP_ROWS},
        {(void **)&s->packed_z, D * packed, WARPGROUP_ROWS},
        {(void **)&s->packed_mixed, q * packed, WARPGROUP_ROWS},
        {(void **)&s->packed_up, F * packed, WARPGROUP_ROWS},
        {(void **)&s->x_squares, packed ? WARPGROUP_PARTS * sizeof(float) : 0, WARPGROUP_ROWS},
        {(void **)&s->z_squares, packed ? D / 8 * sizeof(float) : 0, WARPGROUP_ROWS},
    };
    for (int i = 0; i < N_ITEMS; i++)
        out[i] = items[i];
}

size_t layer_scratch_bytes_of(const struct backend_options *o)
{
    struct layer_scratch unused;
    struct scratch_item items[N_ITEMS];
    list_items(items, &unused, o);
    size_t n = 0;
    for (int i = 0; i < N_ITEMS; i++)
        n += items[i].row_bytes * (size_t)items[i].rows;
    return n;
}

enum status layer_scratch_open(struct cuda *c, struct error *err)
{
    struct layer_scratch *s = (struct layer_scratch *)calloc(1, sizeof(*s));
    struct scratch_item items[N_ITEMS];
    if (!s)
        return fail(err, STATUS_NOMEM, "fused layers: out of memory");
    c->layer = s;
    s->h_layer = s->packed_layer = -1;
    const cudaError_t error = beside_open(&s->beside);
    if (error != cudaSuccess)
        return fail(err, STATUS_DEVICE, "fused layers: a stream: %s", cudaGetErrorString(error));
    list_items(items, s, &c->options);
    for (int i = 0; i < N_ITEMS; i++) {
        const size_t n_bytes = items[i].row_bytes * (size_t)items[i].rows;
        if (n_bytes && cudaMalloc(items[i].out, n_bytes) != cudaSuccess) {
            (void)cudaGetLastError();
            return fail(err, STATUS_NOMEM, "fused layers: %zu bytes for %d rows are not to be had",
                        layer_scratch_bytes_of(&c->options), c->options.max_rows);
        }
        s->n_bytes += n_bytes;
    }
    return STATUS_OK;
}

void layer_scratch_close(struct cuda *c)
{
    struct scratch_item items[N_ITEMS];
    struct model_config config = {};
    struct backend_options none = {};
    none.config = &config;
    if (!c->layer)
        return;
    beside_close(&c->layer->beside);
    list_items(items, c->layer, &none);
    for (int i = 0; i < N_ITEMS; i++)
        (void)cudaFree(*items[i].out);
    free(c->layer);
    c->layer = NULL;
}

size_t layer_scratch_bytes(const struct cuda *c)
{
    return c->layer ? c->layer->n_bytes : 0;
}

/* ---- what the passes know ---- */

static struct device_norm norm_of(const struct norm *n)
{
    return {floats(n->weight), floats(n->bias), n->type, n->eps};
}

static struct product_weight weight_of(const struct linear *l)
{
    return {l->weight->data, l->dtype, floats(l->scales), floats(l->bias), l->n_out, l->n_in};
}

/* Matrices that lie one behind the other, without biases, are one matrix. */
static bool stack(struct product_weight *out, const struct linear *const *linears, int n)
{
    *out = weight_of(linears[0]);
    for (int i = 1; i < n; i++) {
        const struct product_weight next = weight_of(linears[i]);
        const char *end = (const char *)out->data +
                          (size_t)out->n_out * (size_t)out->n_in * dtype_bytes(out->dtype);
        if (out->bias || next.bias || next.n_in != out->n_in || end != next.data ||
            (out->scales && out->scales + out->n_out != next.scales))
            return false;
        out->n_out += next.n_out;
    }
    return true;
}

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

/* What the functions below share. */
struct pass {
    struct cuda *c;
    struct backend *b;
    struct layer_scratch *s;
    const struct layer_weights *w; /* an element of the model's array of layers */
    const struct layer_state *state;
    const struct model_config *config;
    struct buffer *x;
    bool full, latents, window;
    bool chained; /* each sublayer ends with the norm that the next one begins with */
    bool normed;  /* h is norm1(x) already */
    bool packed;  /* packed_x is norm1's already */
    int layer;
};

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

static int head_values(const struct pass *p, int n_heads)
{
    return n_heads * p->config->head_dim;
}

static int64_t vqk_stride(const struct pass *p)
{
    return head_values(p, p->config->n_heads + 2 * p->config->n_kv_heads);
}

/* [R, D] where steps with prompts have norm(z). */
static bf16 *normed_z(const struct pass *p)
{
    return (bf16 *)p->s->input32;
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

static device_slab<float> float_slab(const struct slab *slab)
{
    return {floats(slab->buffer), slab->row_values};
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

static struct rglru_front rglru_of(const struct pass *p)
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
static void front(const struct pass *p)
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
        f = rglru_of(p);
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
    if (rglru && !fused_rglru(p->c, &f))
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
}

static struct mix mix_of(const struct pass *p)
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
    struct mix m = mix_of(p);
    if (p->latents)
        gates(p, &m);
    if (p->c->step.decode && fused_mix(p->c, &m))
        return;
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
    const struct mix m = mix_of(p);
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

/* ---- few rows, and not many ---- */

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
    return p->c->step.rows <= CLUSTER_ROWS && plain_layer(p) && cluster_knows(p->c, &shape) &&
           p->state->slabs[STATE_RING_K].dtype == DTYPE_BF16;
}

static const bf16 *matrix(const struct linear *l)
{
    return (const bf16 *)l->weight->data;
}

static int64_t share_stride(const struct pass *p)
{
    const int most = p->c->options.max_rows;
    return (int64_t)(most < CLUSTER_ROWS ? most : CLUSTER_ROWS) * p->config->hidden_size;
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

static void mix_by_clusters(const struct pass *p, const struct cluster_shape *shape)
{
    const struct layer_weights *w = p->w;
    const struct slab *slabs = p->state->slabs;
    const struct layer_scratch *s = p->s;
    struct cluster_mix m = {};
    const bool overlaps = p->c->queue.pdl; /* with what prepares its weights it must not */
    p->c->queue.pdl &= p->layer < s->n_prepared;
    m.x = floats(p->x);
    m.norm = {floats(w->norm1.weight), w->norm1.eps};
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
    m.ring_k = (bf16 *)slabs[STATE_RING_K].buffer->data;
    m.ring_v = (bf16 *)slabs[STATE_RING_V].buffer->data;
    m.ring_values = slabs[STATE_RING_K].row_values;
    m.ring_rows = (int)config_ring_rows(p->config, p->layer);
    m.scale = (float)p->config->attention_scale;
    m.softcap = (float)p->config->attn_logit_softcapping;
    m.o = matrix(&w->o_proj);
    m.partials = s->shares;
    m.partial_stride = share_stride(p);
    cluster_mix_launch(p->c, shape, &m);
    p->c->queue.pdl = overlaps;
}

static void mlp_of_few(const struct pass *p, const struct cluster_shape *shape)
{
    const struct layer_weights *w = p->w;
    const struct layer_scratch *s = p->s;
    struct few_mlp m = {};
    m.x = floats(p->x);
    m.partials = s->shares;
    m.partial_stride = share_stride(p);
    m.norm = {floats(w->norm2.weight), w->norm2.eps};
    m.between = s->x_between;
    m.h = s->h;
    m.scales = s->scales;
    m.gate = matrix(&w->gate_proj);
    m.up = matrix(&w->up_proj);
    m.down = matrix(&w->down_proj);
    m.act = p->config->hidden_act;
    m.middle = s->up;
    m.z = s->z;
    m.rglru = float_slab(&p->state->slabs[STATE_RGLRU]);
    few_mlp_launch(p->c, shape, &m);
}

/* A layer of few rows: see cluster.cuh. */
static void layer_by_clusters(const struct pass *p)
{
    const struct cluster_shape shape = cluster_shape_of(p->config);
    mix_by_clusters(p, &shape);
    mlp_of_few(p, &shape);
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
           warpgroup_has(OUTPUT_BF16, a.n_out, a.n_in) &&
           warpgroup_has(OUTPUT_F32, b.n_out, b.n_in) &&
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
    warpgroup_products(p->c, &q, 1);
}

/* From the packed rows x to what the output projection is given: RG-LRU, products, mixing. */
static void group_mix(const struct pass *p, const struct packed_rows *x,
                      const struct packed_rows *mixed)
{
    const struct layer_weights *w = p->w;
    const struct layer_scratch *s = p->s;
    const int D = p->config->hidden_size, columns = w->latent_q.n_out + w->latent_k.n_out;
    const struct packed_rows z = {s->packed_z, D, s->z_squares, D / 8, w->rglru_norm.eps};
    struct rglru_front f = rglru_of(p);
    f.packed = *x;
    f.out = z;
    f.out_weight = floats(w->rglru_norm.weight);
    CHECK(fused_rglru(p->c, &f));

    struct warpgroup_product front[] = {
        group_product(p, x, &w->v_proj, (int)vqk_stride(p), OUTPUT_BF16),
        group_product(p, &z, &w->latent_q, columns, OUTPUT_F32)};
    front[0].out = s->vqk;
    front[0].out_stride = vqk_stride(p);
    front[1].out = s->gates;
    front[1].out_stride = columns;
    warpgroup_products(p->c, front, 2);

    struct mix m = mix_of(p);
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
    const struct norm *next = is_last || !plain_norm(&w[1].norm1) ? NULL : &w[1].norm1;
    const struct packed_rows x = {s->packed_x, D, s->x_squares, WARPGROUP_PARTS, w->norm1.eps};
    const struct packed_rows x2 = {s->packed_x, D, s->x_squares, WARPGROUP_PARTS, w->norm2.eps};
    const struct packed_rows mixed = {s->packed_mixed, D, NULL, 0, 0};
    const struct packed_rows up = {s->packed_up, config->intermediate_size, NULL, 0, 0};
    if (!p->packed)
        pack_rows(p->c, &x, floats(p->x), floats(w->norm1.weight), p->c->step.rows,
                  &p->c->step.sizes->n_rows);
    s->packed_layer = next ? p->layer + 1 : -1;

    group_mix(p, &x, &mixed);
    group_add(p, &mixed, &w->o_proj, &x2, &w->norm2);
    struct warpgroup_product features = group_product(
        p, &x2, &w->gate_proj, 2 * config->intermediate_size, OUTPUT_ACTIVATE);
    features.next = up;
    warpgroup_products(p->c, &features, 1);
    group_add(p, &up, &w->down_proj, &x, next);
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
    if (for_clusters(&p)) {
        c->layers = "clusters";
        layer_by_clusters(&p);
        return true;
    }
    if (for_warpgroups(&p)) {
        c->layers = "warpgroups";
        layer_by_warpgroups(&p);
        return true;
    }
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
    q.softcap = softcap;
    q.rows = c->step.logits;
    q.n_rows = &c->step.sizes->n_logit_rows;
    const bool padded = pad_logits(c, &q, lm_head);
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
