/* layer_scratch.cu - the memory of fused layers, sized when the backend opens. */
#include <stdlib.h>

#include "engine/kernels/cuda/layer.cuh"

struct scratch_item {
    void **out;
    size_t row_bytes;
    int rows;
    /* Products read whole tiles of packed rows, also what no step has written; and initcheck does
     * not see what the library stores by tensor maps. */
    bool is_cleared;
};

enum {
    N_ITEMS = 23,
    SPENT_PART = 16, /* of L2: what fills less of it is as well written to memory */
};

static bool has_full_attention(const struct model_config *c)
{
    for (int l = 0; l < c->n_layers; l++)
        if (c->layers[l].type == LAYER_FULL_ATTENTION)
            return true;
    return false;
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
        {(void **)&s->vqk, (q + 2 * kv) * sizeof(bf16), rows, true},
        {(void **)&s->h, rglru || c->post_norms ? D * sizeof(bf16) : 0, rows},
        {(void **)&s->z, D * rglru, rows},
        {(void **)&s->gates, (2 * (size_t)c->n_latents + (size_t)c->n_heads) * sizeof(float), rows,
         true},
        {(void **)&s->mixed, q * sizeof(bf16), rows},
        {(void **)&s->up, F * sizeof(bf16), rows},
        {(void **)&s->wide, 2 * F * sizeof(bf16), rows, true},
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
        {(void **)&s->shares, MIX_CLUSTERS * D * rglru, FEW_ALONE},
        {&s->prepared, prepared, c->n_layers},
        {(void **)&s->packed_x, D * packed, WARPGROUP_ROWS, true},
        {(void **)&s->packed_mixed, q * packed, WARPGROUP_ROWS, true},
        {(void **)&s->packed_up, F * packed, WARPGROUP_ROWS, true},
        {(void **)&s->x_squares, packed ? WARPGROUP_PARTS * sizeof(float) : 0, WARPGROUP_ROWS},
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
    s->n_vocab = c->options.config->vocab_size;
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
        if (n_bytes && items[i].is_cleared && cudaMemset(*items[i].out, 0, n_bytes) != cudaSuccess)
            return fail(err, STATUS_DEVICE, "fused layers: %zu bytes cannot be cleared", n_bytes);
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

struct spent_lines layer_spent(const struct cuda *c, int n_logit_rows)
{
    if (!c->layer || !c->layer->logits)
        return {};
    const size_t n_bytes =
        (size_t)n_logit_rows * (size_t)padded_columns(c->layer->n_vocab) * sizeof(float);
    const size_t room = c->queue.l2_bytes;
    const bool pays = n_bytes >= room / SPENT_PART && n_bytes <= room;
    return {(char *)c->layer->logits, pays ? (int)(n_bytes / LINE) : 0};
}

size_t layer_scratch_bytes(const struct cuda *c)
{
    return c->layer ? c->layer->n_bytes : 0;
}
