/* model.c - see model.h. The forward pass of a causal Latte model, top to bottom.
 *
 * Letters: R rows of the step, D hidden size, H heads, KV kv heads, d head width, M latents per
 * head, L = H*M, F mlp width, V vocabulary.
 */
#include "engine/model.h"

#include <stdlib.h>
#include <string.h>

#include "engine/state.h"
#include "engine/upload.h"

/* Activations of one step, f32, sized for max_rows. Those a configuration never uses are NULL. */
struct scratch {
    struct buffer *x;                  /* [R, D] the residual stream */
    struct buffer *h;                  /* [R, D] norm of x */
    struct buffer *u;                  /* [R, D] latent input, when it is not h */
    struct buffer *recurrence, *input; /* [R, D] gates of the RG-LRU */
    struct buffer *theta;              /* [R, L] */
    struct buffer *g;                  /* [R, L] or [R, H*(M+1)] */
    struct buffer *p0;                 /* [R, H] */
    struct buffer *q, *k, *v;          /* [R, H*d], [R, KV*d], [R, KV*d] */
    struct buffer *v_turned;           /* [R, H*d] R^{-s} v_s */
    struct buffer *mixed;              /* [R, H*d] */
    struct buffer *y;                  /* [R, D] what a sublayer adds to x */
    struct buffer *gate, *up;          /* [R, F] */
    struct buffer *last;               /* [n_logit_rows, D] */
    struct buffer *logits;             /* [n_logit_rows, V] */
};

/* Host arrays a step points to. */
struct step_arrays {
    int64_t *positions;  /* [max_rows] */
    int32_t *seq_slot;   /* [n_slots] */
    int32_t *seq_start;  /* [n_slots + 1] */
    int32_t *logit_rows; /* [max_logit_rows] */
};

struct model {
    struct backend *backend; /* owned */
    struct model_config config;
    struct layer_config *layers; /* [n_layers], owned; config.layers */
    struct model_options options;
    struct model_weights *weights;
    struct state *state;
    struct scratch scratch;
    struct step_arrays arrays;
    bool *slot_used; /* [n_slots] scratch of one step: each slot at most once */
    int n_queued;    /* steps not collected yet */
};

/* ---- the forward pass: weights/README.md has the equations in the same order ---- */

/* u_t: what the latents look at. */
static const struct buffer *latent_input(struct model *m, const struct layer_weights *w,
                                         const struct layer_state *state)
{
    struct backend *b = m->backend;
    const struct backend_ops *op = b->ops;
    const struct scratch *s = &m->scratch;
    const int D = m->config.hidden_size;
    const int blocks = m->config.rglru_blocks;

    switch (m->config.latent_input) {
    case LATENT_INPUT_NONE:
        return s->h;
    case LATENT_INPUT_CONV:
        op->conv(b, s->u, s->h, w->conv, w->conv_bias, &state->slabs[STATE_CONV], D,
                 m->config.conv_kernel);
        return s->u;
    case LATENT_INPUT_RGLRU:
        op->block_linear(b, s->recurrence, s->h, w->recurrence_gate, w->recurrence_bias, D, blocks);
        op->block_linear(b, s->input, s->h, w->input_gate, w->input_bias, D, blocks);
        op->rglru(b, s->u, s->h, s->recurrence, s->input, w->lambda, &state->slabs[STATE_RGLRU], D);
        op->norm(b, s->u, s->u, &w->rglru_norm, D, ROWS_STEP);
        return s->u;
    }
    return NULL;
}

/* mixed = sum_l p(l|t) s_l / alpha_l, and p0 = p(0|t) beside a window. With VAPOR the
 * sum is of R^{-s} v_s, and R^t turns it, P(eq 20). */
static void latent_attention(struct model *m, const struct layer_weights *w,
                             const struct layer_state *state, const struct buffer *u,
                             bool gated_window)
{
    struct backend *b = m->backend;
    const struct backend_ops *op = b->ops;
    const struct scratch *s = &m->scratch;
    const struct model_config *c = &m->config;
    const bool vapor = w->vapor_theta != NULL;
    const struct latent_shape shape = {
        .n_heads = c->n_heads,
        .n_latents = config_latents_per_head(c),
        .head_dim = c->head_dim,
        .n_kv_heads = vapor ? c->n_heads : c->n_kv_heads, /* each query head turns v its own way */
        .gated_window = gated_window,
    };

    op->linear(b, s->theta, u, &w->latent_k, ROWS_STEP);
    op->linear(b, s->g, u, &w->latent_q, ROWS_STEP);
    if (vapor)
        op->vapor(b, s->v_turned, s->v, w->vapor_theta, c->n_heads, c->n_kv_heads, c->head_dim, -1);
    op->latent(b, s->mixed, s->p0, s->theta, s->g, vapor ? s->v_turned : s->v,
               &state->slabs[STATE_LATENT_M], &state->slabs[STATE_LATENT_ALPHA],
               &state->slabs[STATE_LATENT_S], &shape);
    if (vapor)
        op->vapor(b, s->mixed, s->mixed, w->vapor_theta, c->n_heads, c->n_heads, c->head_dim, +1);
}

/* mixed = local_t, or mixed += p0 * local_t beside latents. q and k come from `in`. */
static void window_attention(struct model *m, const struct layer_weights *w,
                             const struct layer_state *state, const struct buffer *in,
                             int64_t ring_rows, bool gated)
{
    struct backend *b = m->backend;
    const struct backend_ops *op = b->ops;
    const struct scratch *s = &m->scratch;
    const struct model_config *c = &m->config;
    const struct window_shape shape = {
        .n_heads = c->n_heads,
        .n_kv_heads = c->n_kv_heads,
        .head_dim = c->head_dim,
        .ring_rows = ring_rows,
        .scale = (float)c->attention_scale,
        .softcap = (float)c->attn_logit_softcapping,
    };

    op->linear(b, s->q, in, &w->q_proj, ROWS_STEP);
    op->linear(b, s->k, in, &w->k_proj, ROWS_STEP);
    if (w->q_norm.weight)
        op->head_norm(b, s->q, &w->q_norm, c->n_heads, c->head_dim);
    if (w->k_norm.weight)
        op->head_norm(b, s->k, &w->k_norm, c->n_kv_heads, c->head_dim);
    op->rope(b, s->q, w->rope, c->n_heads, c->head_dim);
    op->rope(b, s->k, w->rope, c->n_kv_heads, c->head_dim);
    op->window(b, s->mixed, gated ? s->p0 : NULL, s->q, s->k, s->v, &state->slabs[STATE_RING_K],
               &state->slabs[STATE_RING_V], w->vapor_theta, &shape);
}

/* y = o_proj(mix(h)) for any type of layer. */
static void mix(struct model *m, int layer)
{
    struct backend *b = m->backend;
    const struct backend_ops *op = b->ops;
    const struct scratch *s = &m->scratch;
    const struct layer_weights *w = &m->weights->layers[layer];
    const struct layer_state *state = &m->state->layers[layer];
    const bool full = m->config.layers[layer].type == LAYER_FULL_ATTENTION;
    const bool latents = !full && m->config.n_latents > 0;
    const int64_t ring_rows = config_ring_rows(&m->config, layer);

    const struct buffer *u = full ? s->h : latent_input(m, w, state);
    op->linear(b, s->v, s->h, &w->v_proj, ROWS_STEP);
    if (latents)
        latent_attention(m, w, state, u, ring_rows > 0);
    if (ring_rows)
        window_attention(m, w, state, latents ? s->h : u, ring_rows, latents);
    op->linear(b, s->y, s->mixed, &w->o_proj, ROWS_STEP);
}

/* y = down(act(gate(h)) * up(h)), or down(act(up(h))). */
static void mlp(struct model *m, const struct layer_weights *w)
{
    struct backend *b = m->backend;
    const struct backend_ops *op = b->ops;
    const struct scratch *s = &m->scratch;

    if (w->gate_proj.weight)
        op->linear(b, s->gate, s->h, &w->gate_proj, ROWS_STEP);
    op->linear(b, s->up, s->h, &w->up_proj, ROWS_STEP);
    op->activate(b, s->up, w->gate_proj.weight ? s->gate : NULL, s->up, m->config.hidden_act,
                 m->config.intermediate_size);
    op->linear(b, s->y, s->up, &w->down_proj, ROWS_STEP);
}

/* x += y, or post_norm(y) in Gemma-style models. */
static void add_residual(struct model *m, const struct norm *post_norm)
{
    const struct backend_ops *op = m->backend->ops;
    const struct scratch *s = &m->scratch;
    const int D = m->config.hidden_size;
    if (post_norm->weight)
        op->norm(m->backend, s->y, s->y, post_norm, D, ROWS_STEP);
    op->add(m->backend, s->x, s->y, D);
}

/* logits = head(norm(x)) of the rows whose logits are wanted. */
static void head(struct model *m)
{
    struct backend *b = m->backend;
    const struct backend_ops *op = b->ops;
    const struct scratch *s = &m->scratch;
    const struct model_weights *w = m->weights;
    const struct model_config *c = &m->config;

    op->gather(b, s->last, s->x, c->hidden_size);
    if (w->norm.weight)
        op->norm(b, s->last, s->last, &w->norm, c->hidden_size, ROWS_LOGITS);
    op->linear(b, s->logits, s->last, &w->lm_head, ROWS_LOGITS);
    if (c->final_logit_softcapping > 0)
        op->softcap(b, s->logits, (float)c->final_logit_softcapping, c->vocab_size);
}

static void layer_composed(struct model *m, int layer)
{
    struct backend *b = m->backend;
    const struct backend_ops *op = b->ops;
    const struct scratch *s = &m->scratch;
    const struct layer_weights *w = &m->weights->layers[layer];
    const int D = m->config.hidden_size;

    op->norm(b, s->h, s->x, &w->norm1, D, ROWS_STEP);
    mix(m, layer);
    add_residual(m, &w->post_norm1);
    op->norm(b, s->h, s->x, &w->norm2, D, ROWS_STEP);
    mlp(m, w);
    add_residual(m, &w->post_norm2);
}

static bool layer_fused(struct model *m, int layer)
{
    const struct backend_ops *op = m->backend->ops;
    return op->layer && op->layer(m->backend, m->scratch.x, &m->weights->layers[layer],
                                  &m->state->layers[layer], &m->config, layer);
}

static bool head_fused(struct model *m)
{
    const struct backend_ops *op = m->backend->ops;
    const struct model_weights *w = m->weights;
    return op->head && op->head(m->backend, m->scratch.logits, m->scratch.x, &w->norm, &w->lm_head,
                                (float)m->config.final_logit_softcapping);
}

static void forward(struct model *m, const struct step *step)
{
    struct backend *b = m->backend;
    const struct backend_ops *op = b->ops;
    const struct scratch *s = &m->scratch;
    const struct model_config *c = &m->config;

    op->embed(b, s->x, &m->weights->embed, (float)c->embedding_scale,
              c->position_embedding == POSITION_SINUSOIDAL, &m->weights->layers[0].norm1);
    for (int layer = 0; layer < c->n_layers; layer++)
        if (!layer_fused(m, layer))
            layer_composed(m, layer);
    if (step->n_logit_rows > 0 && !head_fused(m))
        head(m);
    if (step->n_draws + step->n_scores > 0)
        op->draw(b, s->logits);
}

/* ---- a step ---- */

/* Enter one sequence's rows into the step. */
static void add_seq(struct model *m, struct step *step, const struct model_seq *seq)
{
    CHECK(seq->slot >= 0 && seq->slot < m->options.n_slots && !m->slot_used[seq->slot]);
    CHECK(seq->n_rows >= 1 && seq->n_rows <= m->options.max_rows - step->n_rows);
    const uint64_t position = m->state->positions[seq->slot];
    const int64_t limit = model_max_position(m) ? model_max_position(m) : INT64_MAX;
    CHECK(seq->n_rows <= limit && position <= (uint64_t)(limit - seq->n_rows));

    m->slot_used[seq->slot] = true;
    m->arrays.seq_slot[step->n_seqs] = seq->slot;
    m->arrays.seq_start[step->n_seqs++] = step->n_rows;
    for (int i = 0; i < seq->n_rows; i++, step->n_rows++) {
        m->arrays.positions[step->n_rows] = (int64_t)position + i;
        const bool is_last = i == seq->n_rows - 1;
        if (seq->logits == LOGITS_ALL || (seq->logits == LOGITS_LAST && is_last)) {
            CHECK(step->n_logit_rows < m->options.max_logit_rows);
            m->arrays.logit_rows[step->n_logit_rows++] = step->n_rows;
        }
    }
    m->arrays.seq_start[step->n_seqs] = step->n_rows;
}

static bool may_be_drawn(const struct model *m, int32_t token)
{
    return token == TOKEN_DRAWN && m->backend->ops->draw;
}

static struct step plan_step(struct model *m, const int32_t *tokens, const struct model_seq *seqs,
                             int n_seqs)
{
    CHECK(n_seqs >= 1 && n_seqs <= m->options.n_slots);
    struct step step = {
        .tokens = tokens,
        .positions = m->arrays.positions,
        .seq_slot = m->arrays.seq_slot,
        .seq_start = m->arrays.seq_start,
        .logit_rows = m->arrays.logit_rows,
    };
    memset(m->slot_used, 0, (size_t)m->options.n_slots * sizeof(*m->slot_used));
    for (int i = 0; i < n_seqs; i++)
        add_seq(m, &step, &seqs[i]);
    for (int i = 0; i < step.n_rows; i++)
        CHECK((tokens[i] >= 0 || may_be_drawn(m, tokens[i])) && tokens[i] < m->config.vocab_size);
    return step;
}

/* Hand a step to the device. Positions count what is queued. */
static enum status submit_step(struct model *m, const struct step *step, struct error *err)
{
    const struct backend_ops *op = m->backend->ops;
    if (!op->begin(m->backend, step))
        forward(m, step);
    enum status st = op->submit(m->backend, err);
    for (int i = 0; !st && i < step->n_seqs; i++)
        m->state->positions[step->seq_slot[i]] +=
            (uint64_t)(step->seq_start[i + 1] - step->seq_start[i]);
    return st;
}

enum status model_step(struct model *m, const int32_t *tokens, const struct model_seq *seqs,
                       int n_seqs, const float **logits, struct error *err)
{
    const struct backend_ops *op = m->backend->ops;
    const struct step step = plan_step(m, tokens, seqs, n_seqs);
    CHECK(m->n_queued == 0);
    enum status st = submit_step(m, &step, err);
    if (!st)
        st = op->wait(m->backend, NULL, err);
    if (st)
        return st;

    const size_t n_logits = (size_t)step.n_logit_rows * (size_t)m->config.vocab_size;
    const float *mapped =
        n_logits ? op->map(m->backend, m->scratch.logits, n_logits * sizeof(float)) : NULL;
    if (n_logits && !mapped)
        return fail(err, STATUS_DEVICE, "the device did not give %zu logits back", n_logits);
    *logits = mapped;
    return STATUS_OK;
}

int model_depth(const struct model *m)
{
    return m->backend->ops->draw ? m->backend->ops->depth : 0;
}

enum status model_admit(struct model *m, int slot, const struct sampling_params *params,
                        struct error *err)
{
    CHECK(model_depth(m) > 0 && slot >= 0 && slot < m->options.n_slots);
    return m->backend->ops->admit(m->backend, slot, params, err);
}

enum status model_note(struct model *m, int slot, const int32_t *tokens, size_t n,
                       struct error *err)
{
    CHECK(model_depth(m) > 0 && slot >= 0 && slot < m->options.n_slots);
    return m->backend->ops->note(m->backend, slot, tokens, n, err);
}

enum status model_queue(struct model *m, const int32_t *tokens, const struct model_seq *seqs,
                        int n_seqs, const struct step_draw *draws, int n_draws,
                        const struct step_score *scores, int n_scores, struct error *err)
{
    CHECK(m->n_queued < model_depth(m));
    struct step step = plan_step(m, tokens, seqs, n_seqs);
    step.draws = draws;
    step.n_draws = n_draws;
    step.scores = scores;
    step.n_scores = n_scores;
    enum status st = submit_step(m, &step, err);
    m->n_queued += !st;
    return st;
}

enum status model_collect(struct model *m, const struct sampled **results, struct error *err)
{
    CHECK(m->n_queued > 0);
    m->n_queued--;
    return m->backend->ops->wait(m->backend, results, err);
}

/* ---- opening ---- */

static enum status take(struct model *m, struct buffer **out, const char *what, int rows, int dim,
                        struct error *err)
{
    const struct backend_ops *op = m->backend->ops;
    if (dim == 0)
        return STATUS_OK;
    size_t n_bytes;
    if (__builtin_mul_overflow((size_t)rows * sizeof(float), (size_t)dim, &n_bytes))
        return fail(err, STATUS_NOMEM, "model: %s [%d, %d] is more bytes than a size holds", what,
                    rows, dim);
    enum status st = op->buffer_open(m->backend, out, n_bytes, err);
    if (st)
        return fail_context(err, "model: %zu bytes for %s [%d, %d]", n_bytes, what, rows, dim);
    return STATUS_OK;
}

/* Widths of the scratch rows: 0 for what this configuration has no use for. */
struct widths {
    int hidden, mlp, heads, kv_heads; /* D, F, H*d, KV*d */
    int latents, latent_gates;        /* L, columns of g */
};

static bool has_layer(const struct model_config *c, enum layer_type type)
{
    for (int l = 0; l < c->n_layers; l++)
        if (c->layers[l].type == type)
            return true;
    return false;
}

static struct widths widths_of(const struct model_config *c)
{
    const bool window = has_layer(c, LAYER_MACCHIATO);
    return (struct widths){
        .hidden = c->hidden_size,
        .mlp = c->intermediate_size,
        .heads = c->n_heads * c->head_dim,
        .kv_heads = c->n_kv_heads * c->head_dim,
        .latents = c->n_latents,
        .latent_gates = c->n_latents + (window && c->n_latents ? c->n_heads : 0),
    };
}

/* A buffer of the forward pass; dim 0: this configuration has no use for it. */
struct scratch_buffer {
    struct buffer **out;
    const char *what;
    int rows, dim;
};

enum { N_SCRATCH = 18 };

static void list_scratch(struct scratch_buffer out[N_SCRATCH], struct scratch *s,
                         const struct model_config *c, const struct model_options *options)
{
    const struct widths n = widths_of(c);
    const int rows = options->max_rows;
    const int logit_rows = options->max_logit_rows ? options->max_logit_rows : rows;
    const bool rglru = c->latent_input == LATENT_INPUT_RGLRU;
    const bool vapor = c->position_embedding == POSITION_VAPOR;
    const bool window = has_layer(c, LAYER_MACCHIATO) || has_layer(c, LAYER_FULL_ATTENTION);
    const struct scratch_buffer list[N_SCRATCH] = {
        {&s->x, "the residual stream", rows, n.hidden},
        {&s->h, "normed rows", rows, n.hidden},
        {&s->u, "the latent input", rows, c->latent_input == LATENT_INPUT_NONE ? 0 : n.hidden},
        {&s->recurrence, "recurrence gates", rows, rglru ? n.hidden : 0},
        {&s->input, "input gates", rows, rglru ? n.hidden : 0},
        {&s->theta, "latent keys", rows, n.latents},
        {&s->g, "latent queries", rows, n.latent_gates},
        {&s->p0, "window gates", rows, c->n_heads},
        {&s->q, "queries", rows, window ? n.heads : 0},
        {&s->k, "keys", rows, window ? n.kv_heads : 0},
        {&s->v, "values", rows, n.kv_heads},
        {&s->v_turned, "turned values", rows, vapor ? n.heads : 0},
        {&s->mixed, "attention", rows, n.heads},
        {&s->y, "sublayer outputs", rows, n.hidden},
        {&s->gate, "mlp gates", rows, c->mlp == MLP_GATED ? n.mlp : 0},
        {&s->up, "mlp rows", rows, n.mlp},
        {&s->last, "rows of the head", logit_rows, n.hidden},
        {&s->logits, "logits", logit_rows, c->vocab_size},
    };
    memcpy(out, list, sizeof(list));
}

static enum status take_scratch(struct model *m, struct error *err)
{
    struct scratch_buffer list[N_SCRATCH];
    list_scratch(list, &m->scratch, &m->config, &m->options);
    enum status st = STATUS_OK;
    for (int i = 0; !st && i < N_SCRATCH; i++)
        st = take(m, list[i].out, list[i].what, list[i].rows, list[i].dim, err);
    return st;
}

static void give_scratch(struct model *m)
{
    struct scratch_buffer list[N_SCRATCH];
    list_scratch(list, &m->scratch, &m->config, &m->options);
    for (int i = 0; i < N_SCRATCH; i++)
        m->backend->ops->buffer_close(m->backend, *list[i].out);
}

static enum status take_arrays(struct model *m, struct error *err)
{
    const size_t n_rows = (size_t)m->options.max_rows, n_slots = (size_t)m->options.n_slots;
    struct step_arrays *a = &m->arrays;
    a->positions = calloc(n_rows, sizeof(*a->positions));
    a->seq_slot = calloc(n_slots, sizeof(*a->seq_slot));
    a->seq_start = calloc(n_slots + 1, sizeof(*a->seq_start));
    a->logit_rows = calloc((size_t)m->options.max_logit_rows, sizeof(*a->logit_rows));
    m->slot_used = calloc(n_slots, sizeof(*m->slot_used));
    if (!a->positions || !a->seq_slot || !a->seq_start || !a->logit_rows || !m->slot_used)
        return fail(err, STATUS_NOMEM, "model: out of memory for steps of %zu rows, %zu slots",
                    n_rows, n_slots);
    return STATUS_OK;
}

/* The checkpoint may be closed after opening, so the model keeps a configuration of its own. */
static enum status copy_config(struct model *m, const struct model_config *c, struct error *err)
{
    m->layers = calloc((size_t)c->n_layers, sizeof(*m->layers));
    if (!m->layers)
        return fail(err, STATUS_NOMEM, "model: out of memory for %d layers", c->n_layers);
    memcpy(m->layers, c->layers, (size_t)c->n_layers * sizeof(*m->layers));
    m->config = *c;
    m->config.layers = m->layers;
    return STATUS_OK;
}

static enum status check_kind(const struct model_config *c, struct error *err)
{
    if (c->head != HEAD_CAUSAL_LM)
        return fail(err, STATUS_UNSUPPORTED,
                    "model: architectures is not LatteForCausalLM: only language models generate");
    if (c->bidirectional)
        return fail(err, STATUS_UNSUPPORTED, "model: bidirectional layers cannot generate");
    return STATUS_OK;
}

enum status model_open(struct model **out, const struct checkpoint *checkpoint,
                       struct backend *backend, const struct model_options *options,
                       progress_fn *progress, void *context, struct error *err)
{
    CHECK(options->n_slots >= 1 && options->max_rows >= 1 && options->max_logit_rows >= 0);
    CHECK(options->weight_dtype == DTYPE_F32 || options->weight_dtype == DTYPE_BF16 ||
          options->weight_dtype == DTYPE_I8);
    struct model *m = calloc(1, sizeof(*m));
    if (!m) {
        backend->ops->close(backend);
        return fail(err, STATUS_NOMEM, "model: out of memory");
    }
    m->backend = backend;
    m->options = *options;
    if (!m->options.max_logit_rows)
        m->options.max_logit_rows = m->options.max_rows;

    enum status st = check_kind(&checkpoint->config, err);
    if (!st)
        st = copy_config(m, &checkpoint->config, err);
    if (!st)
        st = take_arrays(m, err);
    if (!st)
        st = state_open(&m->state, &m->config, backend, options->n_slots, options->window_dtype,
                        err);
    if (!st)
        st = take_scratch(m, err);
    if (!st)
        st = weights_open(&m->weights, checkpoint, backend, options->weight_dtype, progress,
                          context, err);
    if (st) {
        model_close(m);
        return st;
    }
    *out = m;
    return STATUS_OK;
}

void model_close(struct model *m)
{
    if (!m)
        return;
    weights_close(m->weights);
    give_scratch(m);
    state_close(m->state);
    m->backend->ops->close(m->backend);
    free(m->arrays.positions);
    free(m->arrays.seq_slot);
    free(m->arrays.seq_start);
    free(m->arrays.logit_rows);
    free(m->slot_used);
    free(m->layers);
    free(m);
}

void model_backend_options(const struct model_config *config, const struct model_options *options,
                           struct backend_options *out)
{
    const struct widths n = widths_of(config);
    const int widths[] = {n.mlp, n.heads, n.latents, n.latent_gates};
    out->config = config;
    out->n_slots = options->n_slots;
    out->max_logit_rows = options->max_logit_rows ? options->max_logit_rows : options->max_rows;
    out->max_rows = options->max_rows;
    out->max_seqs = options->n_slots < options->max_rows ? options->n_slots : options->max_rows;
    out->max_dim = n.hidden;
    for (size_t i = 0; i < sizeof(widths) / sizeof(*widths); i++)
        if (widths[i] > out->max_dim)
            out->max_dim = widths[i];
}

void model_needs(const struct checkpoint *checkpoint, const struct model_options *options,
                 struct model_needs *out)
{
    struct scratch unused;
    struct scratch_buffer list[N_SCRATCH];
    list_scratch(list, &unused, &checkpoint->config, options);
    out->weight_bytes = weights_bytes_of(checkpoint, options->weight_dtype);
    out->slot_bytes = state_bytes_of(&checkpoint->config, options->window_dtype);
    out->scratch_bytes = 0;
    for (int i = 0; i < N_SCRATCH; i++)
        out->scratch_bytes += (size_t)list[i].rows * (size_t)list[i].dim * sizeof(float);
}

/* ---- slots and facts ---- */

bool model_memory(const struct model *m, struct backend_memory *out)
{
    if (!m->backend->ops->memory)
        return false;
    m->backend->ops->memory(m->backend, out);
    return true;
}

int model_next_rows(const struct model *m, int n)
{
    const struct backend_ops *ops = m->backend->ops;
    return ops->next_rows ? ops->next_rows(m->backend, n) : 0;
}

const char *model_layers(const struct model *m)
{
    const struct backend_ops *ops = m->backend->ops;
    const char *layers = ops->layers ? ops->layers(m->backend) : NULL;
    return layers ? layers : "ops";
}

bool model_is_on_device(const struct model *m)
{
    return m->backend->ops->is_device;
}

static void check_slot(const struct model *m, int slot)
{
    CHECK(slot >= 0 && slot < m->options.n_slots);
}

uint64_t model_position(const struct model *m, int slot)
{
    check_slot(m, slot);
    return m->state->positions[slot];
}

/* The ops begin afresh at position 0 and state_read hides the rest: nothing needs clearing. */
void model_reset(struct model *m, int slot)
{
    model_set_position(m, slot, 0);
}

void model_set_position(struct model *m, int slot, uint64_t position)
{
    check_slot(m, slot);
    CHECK(position < INT64_MAX);
    m->state->positions[slot] = position;
}

enum status model_copy(struct model *m, int dst, int src, struct error *err)
{
    return state_copy(m->state, dst, src, err);
}

int model_n_state_tensors(const struct model *m)
{
    return m->state->n_entries;
}

const struct state_tensor *model_state_tensor(const struct model *m, int i)
{
    CHECK(i >= 0 && i < m->state->n_entries);
    return &m->state->entries[i].tensor;
}

enum status model_state_read(struct model *m, int slot, int i, float *out, struct error *err)
{
    return state_read(m->state, slot, i, out, err);
}

enum status model_state_write(struct model *m, int slot, int i, const float *in, struct error *err)
{
    return state_write(m->state, slot, i, in, err);
}

enum status model_load(struct model *m, int slot, const float *values, uint64_t position,
                       struct error *err)
{
    CHECK(position < INT64_MAX);
    return state_load(m->state, slot, values, position, err);
}

int model_max_saves(const struct model *m)
{
    return m->state->max_saves;
}

enum status model_begin_save(struct model *m, int slot, struct error *err)
{
    return state_begin_save(m->state, slot, err);
}

enum status model_finish_save(struct model *m, bool wait, float *values, bool *done,
                              struct error *err)
{
    return state_finish_save(m->state, wait, values, done, err);
}

const struct model_config *model_config(const struct model *m)
{
    return &m->config;
}

int64_t model_max_position(const struct model *m)
{
    return has_layer(&m->config, LAYER_FULL_ATTENTION) ? m->config.max_position_embeddings : 0;
}

size_t model_state_bytes(const struct model *m)
{
    return state_bytes(m->state);
}

size_t model_weight_bytes(const struct model *m)
{
    return m->weights->n_bytes;
}

const char *model_backend_name(const struct model *m)
{
    return m->backend->ops->name;
}
