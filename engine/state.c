/* state.c - see state.h */
#include "engine/state.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const kind_names[STATE_KINDS] = {
    "latent_m", "latent_alpha", "latent_s", "ring_k", "ring_v", "conv", "rglru",
};

/* The shape of a layer's tensor, or n_dims 0 when the layer has none of that kind. */
static int shape_of(int64_t shape[3], const struct model_config *c, int layer, enum state_kind kind)
{
    const enum layer_type type = c->layers[layer].type;
    const bool full = type == LAYER_FULL_ATTENTION;
    const int64_t latents = full ? 0 : config_latents_per_head(c);
    const enum latent_input input = full ? LATENT_INPUT_NONE : c->latent_input;

    switch (kind) {
    case STATE_LATENT_M:
    case STATE_LATENT_ALPHA:
        shape[0] = c->n_heads, shape[1] = latents;
        return latents ? 2 : 0;
    case STATE_LATENT_S:
        shape[0] = c->n_heads, shape[1] = latents, shape[2] = c->head_dim;
        return latents ? 3 : 0;
    case STATE_RING_K:
    case STATE_RING_V:
        shape[0] = c->n_kv_heads, shape[1] = config_ring_rows(c, layer), shape[2] = c->head_dim;
        return shape[1] ? 3 : 0;
    case STATE_CONV:
        shape[0] = c->conv_kernel - 1, shape[1] = c->hidden_size;
        return input == LATENT_INPUT_CONV && shape[0] ? 2 : 0;
    case STATE_RGLRU:
        shape[0] = c->hidden_size;
        return input == LATENT_INPUT_RGLRU ? 1 : 0;
    case STATE_KINDS:
        break;
    }
    return 0;
}

static bool is_ring(enum state_kind kind)
{
    return kind == STATE_RING_K || kind == STATE_RING_V;
}

static enum status open_slab(struct state *s, struct slab *slab, const struct state_tensor *t,
                             struct error *err)
{
    size_t n_bytes;
    if (__builtin_mul_overflow((size_t)t->n_values, dtype_bytes(slab->dtype), &n_bytes) ||
        __builtin_mul_overflow(n_bytes, (size_t)s->n_slots, &n_bytes))
        return fail(err, STATUS_NOMEM,
                    "model state: %d slots of %s are more bytes than a size holds", s->n_slots,
                    t->name);
    enum status st = s->backend->ops->buffer_open(s->backend, &slab->buffer, n_bytes, err);
    if (st)
        return fail_context(err, "model state: %zu bytes for %d slots of %s", n_bytes, s->n_slots,
                            t->name);
    slab->row_values = t->n_values;
    return STATUS_OK;
}

static enum status open_slots(struct state *s, struct error *err)
{
    const struct backend_ops *op = s->backend->ops;
    s->max_saves = 1;
    if (!op->slots_open)
        return STATUS_OK;
    const struct slab **slabs = calloc((size_t)s->n_entries + 1, sizeof(*slabs));
    if (!slabs)
        return fail(err, STATUS_NOMEM, "model state: out of memory for %d slabs", s->n_entries);
    for (int i = 0; i < s->n_entries; i++)
        slabs[i] = s->entries[i].slab;
    enum status st = op->slots_open(s->backend, slabs, s->n_entries, &s->max_saves, err);
    free(slabs);
    if (s->max_saves > STATE_MAX_SAVES)
        s->max_saves = STATE_MAX_SAVES;
    return st;
}

static enum status add_entry(struct state *s, const struct model_config *c, int layer,
                             enum state_kind kind, struct error *err)
{
    struct state_entry *e = &s->entries[s->n_entries];
    struct state_tensor *t = &e->tensor;
    t->n_dims = shape_of(t->shape, c, layer, kind);
    if (!t->n_dims)
        return STATUS_OK;

    snprintf(t->name, sizeof(t->name), "layers.%d.%s", layer, kind_names[kind]);
    t->n_values = 1;
    for (int i = 0; i < t->n_dims; i++)
        if (__builtin_mul_overflow(t->n_values, t->shape[i], &t->n_values))
            return fail(err, STATUS_NOMEM, "model state: the shape of %s overflows", t->name);
    struct slab *slab = &s->layers[layer].slabs[kind];
    slab->dtype = is_ring(kind) ? s->window_dtype : DTYPE_F32;
    e->kind = kind;
    e->slab = slab;
    s->n_entries++;
    s->n_values += (size_t)t->n_values;
    return open_slab(s, slab, t, err);
}

enum status state_open(struct state **out, const struct model_config *config,
                       struct backend *backend, int n_slots, enum dtype window_dtype,
                       struct error *err)
{
    struct state *s = calloc(1, sizeof(*s));
    if (!s)
        return fail(err, STATUS_NOMEM, "model state: out of memory");
    s->backend = backend;
    s->n_slots = n_slots;
    s->window_dtype = window_dtype;
    s->n_layers = config->n_layers;
    s->positions = calloc((size_t)n_slots, sizeof(*s->positions));
    s->layers = calloc((size_t)s->n_layers, sizeof(*s->layers));
    s->entries = calloc((size_t)s->n_layers * STATE_KINDS, sizeof(*s->entries));

    enum status st = STATUS_OK;
    if (!s->positions || !s->layers || !s->entries)
        st = fail(err, STATUS_NOMEM, "model state: out of memory for %d slots of %d layers",
                  n_slots, s->n_layers);
    for (int l = 0; !st && l < s->n_layers; l++)
        for (int kind = 0; !st && kind < STATE_KINDS; kind++)
            st = add_entry(s, config, l, (enum state_kind)kind, err);
    if (!st)
        st = open_slots(s, err);
    if (st) {
        state_close(s);
        return st;
    }
    *out = s;
    return STATUS_OK;
}

void state_close(struct state *s)
{
    if (!s)
        return;
    for (int i = 0; i < s->n_entries; i++)
        s->backend->ops->buffer_close(s->backend, s->entries[i].slab->buffer);
    free(s->entries);
    free(s->layers);
    free(s->positions);
    free(s);
}

static size_t row_bytes(const struct slab *slab)
{
    return (size_t)slab->row_values * dtype_bytes(slab->dtype);
}

size_t state_bytes_of(const struct model_config *config, enum dtype window_dtype)
{
    size_t n = 0;
    for (int l = 0; l < config->n_layers; l++)
        for (int kind = 0; kind < STATE_KINDS; kind++) {
            int64_t shape[3];
            const int n_dims = shape_of(shape, config, l, (enum state_kind)kind);
            size_t n_bytes =
                n_dims ? dtype_bytes(is_ring((enum state_kind)kind) ? window_dtype : DTYPE_F32) : 0;
            for (int i = 0; i < n_dims; i++)
                n_bytes *= (size_t)shape[i];
            n += n_bytes;
        }
    return n;
}

size_t state_bytes(const struct state *s)
{
    size_t n = 0;
    for (int i = 0; i < s->n_entries; i++)
        n += row_bytes(s->entries[i].slab);
    return n;
}

/* Zero rows begin..end-1 of each of n_groups groups [rows, width]. */
static void zero_rows(float *values, int64_t n_groups, int64_t rows, int64_t width, int64_t begin,
                      int64_t end)
{
    for (int64_t g = 0; begin < end && g < n_groups; g++)
        memset(values + (g * rows + begin) * width, 0,
               (size_t)((end - begin) * width) * sizeof(float));
}

/* Hide what the slot's session has not written itself: it belongs to an earlier one. */
static void hide_unreached(const struct state_entry *e, uint64_t position, float *values)
{
    const struct state_tensor *t = &e->tensor;
    const bool ring = is_ring(e->kind);
    const int64_t rows = ring ? t->shape[1] : t->shape[0];
    const int64_t reached = position < (uint64_t)rows ? (int64_t)position : rows;

    if (ring)
        zero_rows(values, t->shape[0], rows, t->shape[2], reached, rows);
    else if (e->kind == STATE_CONV)
        zero_rows(values, 1, rows, t->shape[1], 0, rows - reached);
    else if (position == 0)
        for (int64_t i = 0; i < t->n_values; i++)
            values[i] = e->kind == STATE_LATENT_M ? -INFINITY : 0.0f;
}

/* raw are narrow values at the end of out: a block of them is taken before others are written, and
 * what is written never reaches what was not taken. */
static void widen(float *out, const unsigned char *raw, enum dtype dtype, size_t n_values)
{
    enum { BLOCK = 256 };
    unsigned char block[BLOCK * sizeof(float)];
    const size_t width = dtype_bytes(dtype);
    for (size_t i = 0; i < n_values; i += BLOCK) {
        size_t n = n_values - i < BLOCK ? n_values - i : BLOCK;
        memcpy(block, raw + i * width, n * width);
        dtype_to_f32(out + i, block, dtype, n);
    }
}

enum status state_read(const struct state *s, int slot, int entry, float *out, struct error *err)
{
    CHECK(slot >= 0 && slot < s->n_slots && entry >= 0 && entry < s->n_entries);
    const struct state_entry *e = &s->entries[entry];
    const size_t n_values = (size_t)e->slab->row_values, n = row_bytes(e->slab);
    /* Narrow values are read into the end of out and widened from the front. */
    unsigned char *raw = (unsigned char *)(out + n_values) - n;
    enum status st =
        s->backend->ops->read(s->backend, raw, e->slab->buffer, n * (size_t)slot, n, err);
    if (st)
        return st;
    if (e->slab->dtype != DTYPE_F32)
        widen(out, raw, e->slab->dtype, n_values);
    hide_unreached(e, s->positions[slot], out);
    return STATUS_OK;
}

enum status state_write(struct state *s, int slot, int entry, const float *in, struct error *err)
{
    CHECK(slot >= 0 && slot < s->n_slots && entry >= 0 && entry < s->n_entries);
    const struct slab *slab = s->entries[entry].slab;
    const struct backend_ops *op = s->backend->ops;
    const size_t n = row_bytes(slab);
    if (slab->dtype == DTYPE_F32)
        return op->write(s->backend, slab->buffer, n * (size_t)slot, in, n, err);
    void *narrow = malloc(n);
    if (!narrow)
        return fail(err, STATUS_NOMEM, "model state: out of memory for %zu bytes of %s", n,
                    s->entries[entry].tensor.name);
    dtype_from_f32(narrow, slab->dtype, in, (size_t)slab->row_values);
    enum status st = op->write(s->backend, slab->buffer, n * (size_t)slot, narrow, n, err);
    free(narrow);
    return st;
}

/* ---- whole slots ---- */

/* Where the entry's row begins in a block that holds a slot; *at: where the one before ended. */
static size_t place_row(const struct slab *slab, size_t *at)
{
    const size_t begin = (*at + SLOT_ROW_ALIGNMENT - 1) / SLOT_ROW_ALIGNMENT * SLOT_ROW_ALIGNMENT;
    *at = begin + row_bytes(slab);
    return begin;
}

static enum status load_beside(struct state *s, int slot, const float *values, struct error *err)
{
    const struct backend_ops *op = s->backend->ops;
    unsigned char *block = NULL;
    void *staged = NULL;
    size_t at = 0;
    enum status st = op->stage(s->backend, &staged, err);
    if (st)
        return st;
    block = staged;
    for (int i = 0; i < s->n_entries; i++) {
        const struct slab *slab = s->entries[i].slab;
        unsigned char *row = block + place_row(slab, &at);
        if (slab->dtype == DTYPE_F32)
            memcpy(row, values, row_bytes(slab));
        else
            dtype_from_f32(row, slab->dtype, values, (size_t)slab->row_values);
        values += slab->row_values;
    }
    return op->put(s->backend, slot, err);
}

enum status state_load(struct state *s, int slot, const float *values, uint64_t position,
                       struct error *err)
{
    CHECK(slot >= 0 && slot < s->n_slots);
    enum status st = STATUS_OK;
    if (s->backend->ops->stage)
        st = load_beside(s, slot, values, err);
    for (int i = 0; !s->backend->ops->stage && i < s->n_entries && !st; i++) {
        st = state_write(s, slot, i, values, err);
        values += s->entries[i].slab->row_values;
    }
    if (!st)
        s->positions[slot] = position;
    return st;
}

enum status state_begin_save(struct state *s, int slot, struct error *err)
{
    CHECK(slot >= 0 && slot < s->n_slots && s->n_saves < s->max_saves);
    enum status st = s->backend->ops->fetch ? s->backend->ops->fetch(s->backend, slot, err)
                                            : STATUS_OK; /* read when it is finished */
    if (st)
        return st;
    s->saves[(s->oldest_save + s->n_saves++) % STATE_MAX_SAVES] =
        (struct state_save){slot, s->positions[slot]};
    return STATUS_OK;
}

/* The values of a slot out of a block that holds it. */
static void unpack(const struct state *s, const unsigned char *block, uint64_t position,
                   float *values)
{
    size_t at = 0;
    for (int i = 0; i < s->n_entries; i++) {
        const struct slab *slab = s->entries[i].slab;
        const unsigned char *row = block + place_row(slab, &at);
        if (slab->dtype == DTYPE_F32)
            memcpy(values, row, row_bytes(slab));
        else
            dtype_to_f32(values, row, slab->dtype, (size_t)slab->row_values);
        hide_unreached(&s->entries[i], position, values);
        values += slab->row_values;
    }
}

enum status state_finish_save(struct state *s, bool wait, float *values, bool *done,
                              struct error *err)
{
    CHECK(s->n_saves > 0);
    const struct state_save *save = &s->saves[s->oldest_save];
    const void *block = NULL;
    enum status st = STATUS_OK;
    CHECK(s->positions[save->slot] == save->position);
    if (s->backend->ops->fetched)
        st = s->backend->ops->fetched(s->backend, wait, &block, err);
    if (!st && block)
        unpack(s, block, save->position, values);
    for (int i = 0; !s->backend->ops->fetched && i < s->n_entries && !st; i++) {
        st = state_read(s, save->slot, i, values, err);
        values += s->entries[i].slab->row_values;
    }
    if (st)
        return st;
    *done = block || !s->backend->ops->fetched;
    if (*done) {
        s->oldest_save = (s->oldest_save + 1) % STATE_MAX_SAVES;
        s->n_saves--;
    }
    return STATUS_OK;
}

enum status state_copy(struct state *s, int dst, int src, struct error *err)
{
    CHECK(dst >= 0 && dst < s->n_slots && src >= 0 && src < s->n_slots);
    for (int i = 0; dst != src && i < s->n_entries; i++) {
        const struct slab *slab = s->entries[i].slab;
        const size_t n = row_bytes(slab);
        enum status st = s->backend->ops->copy(s->backend, slab->buffer, n * (size_t)dst,
                                               slab->buffer, n * (size_t)src, n, err);
        if (st)
            return st;
    }
    s->positions[dst] = s->positions[src];
    return STATUS_OK;
}
