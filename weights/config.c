/* config.c - see config.h
 *
 * Most keys are rows of one table; those with a form of their own are in config_parts.c; what
 * only the whole configuration can tell is checked last.
 */
#include "weights/config.h"

#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "weights/config_parts.h"
#include "weights/tree.h"

enum { MAX_CHOICES = 4 };

/* ---- the table ---- */

enum key_kind { KEY_INT32, KEY_INT64, KEY_NUMBER, KEY_BOOL, KEY_CHOICE };

struct key {
    const char *name;
    enum key_kind kind;
    bool required;
    size_t offset;                    /* of the field in struct model_config */
    double min, max;                  /* of a number, both included */
    double otherwise;                 /* the default; of a choice, its index */
    const char *choices[MAX_CHOICES]; /* in the order of the enum */
};

#define ROW(key, type, field)                                                                      \
    .name = key, .kind = type, .offset = offsetof(struct model_config, field)
#define SIZE(key, field, lo, hi) ROW(key, KEY_INT32, field), .required = true, .min = lo, .max = hi
#define WHOLE(key, field, lo, hi, value)                                                           \
    ROW(key, KEY_INT32, field), .min = lo, .max = hi, .otherwise = value
#define LONG(key, field, lo, hi, value)                                                            \
    ROW(key, KEY_INT64, field), .min = lo, .max = hi, .otherwise = value
#define NUMBER(key, field, lo, hi, value)                                                          \
    ROW(key, KEY_NUMBER, field), .min = lo, .max = hi, .otherwise = value
#define FLAG(key, field, value) ROW(key, KEY_BOOL, field), .otherwise = value
#define CHOICE(key, field, value) ROW(key, KEY_CHOICE, field), .otherwise = value

/* A default of 0 outside min..max stands for "none", or for what a later function fills in. */
static const struct key keys[] = {
    {SIZE("vocab_size", vocab_size, 1, 1 << 24)},
    {SIZE("hidden_size", hidden_size, 1, 1 << 16)},
    {SIZE("num_hidden_layers", n_layers, 1, 1024)},
    {SIZE("intermediate_size", intermediate_size, 1, 1 << 20)},
    {SIZE("num_attention_heads", n_heads, 1, 1024)},
    {WHOLE("num_key_value_heads", n_kv_heads, 1, 1024, 0)},
    {WHOLE("head_dim", head_dim, 1, 8192, 0)},
    {WHOLE("num_latents", n_latents, 0, 1 << 20, 0)},
    {CHOICE("latent_input", latent_input, LATENT_INPUT_NONE), .choices = {"none", "conv", "rglru"}},
    {WHOLE("conv_kernel", conv_kernel, 1, 64, 3)},
    {WHOLE("rglru_blocks", rglru_blocks, 1, 1 << 16, 1)},
    {WHOLE("sliding_window", sliding_window, 1, 1 << 20, 128)},
    {NUMBER("attn_logit_softcapping", attn_logit_softcapping, 1e-3, 1e6, 0)},
    {NUMBER("final_logit_softcapping", final_logit_softcapping, 1e-3, 1e6, 0)},
    {CHOICE("position_embedding", position_embedding, POSITION_NONE),
     .choices = {"none", "sinusoidal", "vapor", "rope"}},
    {FLAG("bidirectional", bidirectional, false)},
    {CHOICE("norm", norm, NORM_RMS), .required = true, .choices = {"rmsnorm", "layernorm"}},
    {NUMBER("norm_eps", norm_eps, 1e-20, 1, 1e-6)},
    {NUMBER("norm_offset", norm_offset, -16, 16, 0)},
    {FLAG("final_norm", final_norm, true)},
    {CHOICE("mlp", mlp, MLP_GATED), .required = true, .choices = {"gated", "plain"}},
    {CHOICE("hidden_act", hidden_act, ACTIVATION_SILU), .choices = {"silu", "gelu", "gelu_tanh"}},
    {FLAG("post_norms", post_norms, false)},
    {NUMBER("embedding_scale", embedding_scale, 1e-6, 1e6, 1)},
    {FLAG("tie_word_embeddings", tie_word_embeddings, false)},
    {LONG("max_position_embeddings", max_position_embeddings, 1, INT32_MAX, 4096)},
    {CHOICE("pooling", pooling, POOLING_MEAN), .choices = {"mean", "last"}},
};

enum { N_KEYS = sizeof(keys) / sizeof(*keys) };

/* Read in config_parts.c. */
static const char *const special_keys[] = {
    "model_type",   "architectures", "layer_type",   "layer_types", "query_pre_attn_scalar",
    "rope_theta",   "rope_scaling",  "bos_token_id", "num_labels",  "id2label",
    "eos_token_id",
};

/* Written by common tools; they say nothing about what is computed here. */
static const char *const harmless_keys[] = {
    "_name_or_path", "auto_map",     "dtype",        "initializer_range", "label2id",
    "license",       "pad_token_id", "problem_type", "torch_dtype",       "transformers_version",
    "unk_token_id",  "use_cache",
};

/* ---- rows of the table ---- */

static void *field_of(struct model_config *c, const struct key *k)
{
    return (char *)c + k->offset;
}

static void set_number(struct model_config *c, const struct key *k, double value)
{
    void *field = field_of(c, k);
    if (k->kind == KEY_NUMBER)
        *(double *)field = value;
    else if (k->kind == KEY_INT64)
        *(int64_t *)field = (int64_t)value;
    else if (k->kind == KEY_BOOL)
        *(bool *)field = value != 0;
    else /* enums are as wide as int32_t here: asserted below */
        *(int32_t *)field = (int32_t)value;
}

_Static_assert(sizeof(enum norm_type) == sizeof(int32_t), "choices are stored as int32_t");

static enum status read_choice(struct model_config *c, const struct key *k, const cJSON *item,
                               struct error *err)
{
    char expected[100] = "one of";
    for (int i = 0; i < MAX_CHOICES && k->choices[i]; i++) {
        if (cJSON_IsString(item) && !strcmp(item->valuestring, k->choices[i])) {
            set_number(c, k, i);
            return STATUS_OK;
        }
        size_t n = strlen(expected);
        snprintf(expected + n, sizeof(expected) - n, "%s \"%s\"", i ? "," : "", k->choices[i]);
    }
    return config_wrong(err, k->name, expected, item);
}

static enum status read_key(struct model_config *c, const struct key *k, const cJSON *item,
                            struct error *err)
{
    char expected[100];
    int64_t whole;
    if (k->kind == KEY_CHOICE)
        return read_choice(c, k, item, err);
    if (k->kind == KEY_BOOL) {
        if (!cJSON_IsBool(item))
            return config_wrong(err, k->name, "true or false", item);
        set_number(c, k, cJSON_IsTrue(item));
        return STATUS_OK;
    }
    bool is_number = k->kind == KEY_NUMBER;
    bool good = is_number ? cJSON_IsNumber(item) && item->valuedouble >= k->min &&
                                item->valuedouble <= k->max
                          : tree_whole(item, (int64_t)k->min, (int64_t)k->max, &whole);
    if (!good) {
        snprintf(expected, sizeof(expected), "a %snumber of %.10g to %.10g",
                 is_number ? "" : "whole ", k->min, k->max);
        return config_wrong(err, k->name, expected, item);
    }
    set_number(c, k, item->valuedouble);
    return STATUS_OK;
}

/* A soft cap of 0 means none, as a null does. */
static bool is_absent(const cJSON *item, const struct key *k)
{
    return !item || (strstr(k->name, "softcapping") && cJSON_IsNumber(item) && !item->valuedouble);
}

static enum status read_table(struct model_config *c, const cJSON *root, struct error *err)
{
    for (int i = 0; i < N_KEYS; i++) {
        const struct key *k = &keys[i];
        const cJSON *item = tree_find(root, k->name);
        if (!item && k->required)
            return fail_field(err, STATUS_INVALID, k->name, "%s: this key is required", k->name);
        enum status st = STATUS_OK;
        if (is_absent(item, k))
            set_number(c, k, k->otherwise);
        else
            st = read_key(c, k, item, err);
        if (st)
            return st;
    }
    if ((int)c->position_embedding == POSITION_VAPOR + 1) /* "rope": the windows always have it */
        c->position_embedding = POSITION_NONE;
    return STATUS_OK;
}

/* ---- the configuration as a whole ---- */

static enum status need(bool condition, struct error *err, const char *key, const char *sentence)
{
    if (condition)
        return STATUS_OK;
    return fail_field(err, STATUS_INVALID, key, "%s: %s", key, sentence);
}

static enum status check_divides(struct error *err, const char *key, int32_t divisor,
                                 const char *of_key, int32_t of)
{
    if (of % divisor == 0)
        return STATUS_OK;
    return fail_field(err, STATUS_INVALID, key, "%s: expected a divisor of %s (%d), found %d", key,
                      of_key, of, divisor);
}

/* Defaults of KV and d, and what they must satisfy. */
static enum status check_heads(struct model_config *c, struct error *err)
{
    enum status st = STATUS_OK;
    if (!c->n_kv_heads)
        c->n_kv_heads = c->n_heads;
    if (!c->head_dim) {
        st = check_divides(err, "num_attention_heads", c->n_heads, "hidden_size", c->hidden_size);
        c->head_dim = c->hidden_size / c->n_heads;
    }
    if (!st)
        st = check_divides(err, "num_key_value_heads", c->n_kv_heads, "num_attention_heads",
                           c->n_heads);
    return st;
}

bool config_has_layer(const struct model_config *c, enum layer_type type)
{
    for (int i = 0; i < c->n_layers; i++)
        if (c->layers[i].type == type)
            return true;
    return false;
}

static enum status check_latents(const struct model_config *c, struct error *err)
{
    bool latte = config_has_layer(c, LAYER_LATTE);
    bool mixed = latte || config_has_layer(c, LAYER_MACCHIATO);
    enum status st = STATUS_OK;
    if (c->n_latents % c->n_heads)
        st = fail_field(err, STATUS_INVALID, "num_latents",
                        "num_latents: expected a multiple of num_attention_heads (%d), found %d",
                        c->n_heads, c->n_latents);
    if (!st)
        st = need(!latte || c->n_latents, err, "num_latents",
                  "expected above 0 for layers of type \"latte\", found 0");
    if (!st)
        st = need(mixed || !c->n_latents, err, "num_latents",
                  "expected 0 when all layers are \"full_attention\"");
    if (!st)
        st = need(mixed || c->latent_input == LATENT_INPUT_NONE, err, "latent_input",
                  "expected \"none\" when all layers are \"full_attention\"");
    if (!st)
        st = need(mixed || c->position_embedding != POSITION_VAPOR, err, "position_embedding",
                  "\"vapor\" has no use when all layers are \"full_attention\"");
    return st;
}

static enum status check_whole(struct model_config *c, struct error *err)
{
    bool turned = config_has_layer(c, LAYER_MACCHIATO) ||
                  config_has_layer(c, LAYER_FULL_ATTENTION) ||
                  c->position_embedding == POSITION_VAPOR;
    enum status st = check_latents(c, err);
    if (!st && c->latent_input == LATENT_INPUT_RGLRU)
        st = check_divides(err, "rglru_blocks", c->rglru_blocks, "hidden_size", c->hidden_size);
    if (!st)
        st = need(!turned || c->head_dim % 2 == 0, err, "head_dim",
                  "expected an even number, since pairs of values are rotated");
    if (!st)
        st = need(!c->bidirectional || c->head != HEAD_CAUSAL_LM, err, "bidirectional",
                  "a LatteForCausalLM cannot be bidirectional");
    return st;
}

/* ---- config.json ---- */

static bool in_list(const char *const *list, size_t n, const char *text)
{
    for (size_t i = 0; i < n; i++)
        if (!strcmp(list[i], text))
            return true;
    return false;
}

static bool is_known(const char *name)
{
    for (int i = 0; i < N_KEYS; i++)
        if (!strcmp(keys[i].name, name))
            return true;
    return in_list(special_keys, sizeof(special_keys) / sizeof(*special_keys), name) ||
           in_list(harmless_keys, sizeof(harmless_keys) / sizeof(*harmless_keys), name);
}

static enum status note_unknown(struct bytes *ignored, const cJSON *root, struct error *err)
{
    for (const cJSON *item = root->child; item; item = item->next) {
        if (is_known(item->string))
            continue;
        if (ignored->n)
            bytes_text(ignored, ", ");
        bytes_json_string(ignored, item->string, strlen(item->string));
    }
    return ignored->failed ? fail(err, STATUS_NOMEM, "out of memory") : STATUS_OK;
}

static enum status read_root(struct model_config *c, const cJSON *root, struct error *err)
{
    if (!cJSON_IsObject(root))
        return fail(err, STATUS_INVALID, "expected an object, found %s", tree_kind(root));
    enum status st = config_read_architecture(c, root, err);
    if (!st)
        st = read_table(c, root, err);
    if (!st)
        st = check_heads(c, err);
    if (!st)
        st = config_read_parts(c, root, err);
    return st ? st : check_whole(c, err);
}

enum status config_read(struct model_config *out, struct bytes *ignored, const char *path,
                        struct error *err)
{
    cJSON *root = NULL;
    struct model_config c = {0};
    enum status st = tree_read(&root, path, CONFIG_MAX_BYTES, CONFIG_MAX_DEPTH, err);
    if (st)
        return st;
    st = read_root(&c, root, err);
    if (!st)
        st = note_unknown(ignored, root, err);
    cJSON_Delete(root);
    if (st) {
        fail_context(err, "%s", path);
        config_free(&c);
        return st;
    }
    *out = c;
    return STATUS_OK;
}

void config_free(struct model_config *config)
{
    free(config->layers);
    config->layers = NULL;
}

/* ---- the canonical text ---- */

static void put_number(struct bytes *out, const char *key, double value)
{
    bytes_format(out, "%s=", key);
    bytes_json_number(out, value);
    bytes_char(out, '\n');
}

/* Keys whose use depends on others; the rest of the table is always written. */
static bool is_unused(const struct model_config *c, const char *key)
{
    if (!strcmp(key, "conv_kernel"))
        return c->latent_input != LATENT_INPUT_CONV;
    if (!strcmp(key, "rglru_blocks"))
        return c->latent_input != LATENT_INPUT_RGLRU;
    if (!strcmp(key, "sliding_window"))
        return !config_has_layer(c, LAYER_MACCHIATO);
    if (!strcmp(key, "max_position_embeddings"))
        return !config_has_layer(c, LAYER_FULL_ATTENTION);
    if (!strcmp(key, "pooling"))
        return c->head == HEAD_CAUSAL_LM;
    return false;
}

static double number_of(const struct model_config *c, const struct key *k)
{
    const void *field = (const char *)c + k->offset;
    if (k->kind == KEY_NUMBER)
        return *(const double *)field;
    if (k->kind == KEY_INT64)
        return (double)*(const int64_t *)field;
    return k->kind == KEY_BOOL ? *(const bool *)field : *(const int32_t *)field;
}

static void put_layers(const struct model_config *c, struct bytes *out)
{
    static const char *const names[] = {"latte", "macchiato", "full_attention"};
    for (int i = 0; i < c->n_layers; i++) {
        bytes_format(out, "layer=%s", names[c->layers[i].type]);
        if (c->layers[i].type != LAYER_LATTE) {
            bytes_text(out, ",rope_theta=");
            bytes_json_number(out, c->layers[i].rope_theta);
        }
        bytes_char(out, '\n');
    }
}

void config_canonical(const struct model_config *c, struct bytes *out)
{
    const struct rope_scaling *s = &c->rope_scaling;
    put_number(out, "head", c->head);
    for (int i = 0; i < N_KEYS; i++) {
        const struct key *k = &keys[i];
        if (is_unused(c, k->name))
            continue;
        if (k->kind == KEY_CHOICE)
            bytes_format(out, "%s=%s\n", k->name, k->choices[(int)number_of(c, k)]);
        else
            put_number(out, k->name, number_of(c, k));
    }
    put_layers(c, out);
    if (config_has_layer(c, LAYER_MACCHIATO) || config_has_layer(c, LAYER_FULL_ATTENTION)) {
        put_number(out, "attention_scale", c->attention_scale);
        put_number(out, "rope_scaling", s->type);
        put_number(out, "factor", s->factor);
        put_number(out, "low_freq_factor", s->low_freq_factor);
        put_number(out, "high_freq_factor", s->high_freq_factor);
        put_number(out, "original_max_position_embeddings",
                   (double)s->original_max_position_embeddings);
    }
}
