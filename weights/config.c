/* config.c - see config.h
 *
 * Most keys are rows of one table. Those with a form of their own (lists, objects, defaults
 * that lean on other keys) have a function each; what only the whole configuration can tell
 * is checked last.
 */
#include "weights/config.h"

#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "weights/tree.h"

enum { MAX_FILE = 4 << 20, MAX_JSON_DEPTH = 16, MAX_CHOICES = 4, MAX_LABELS = 1 << 16 };

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

#define FIELD(field) offsetof(struct model_config, field)
#define SIZE(name, field, min, max)                                                                \
    {                                                                                              \
        name, KEY_INT32, true, FIELD(field), min, max, 0,                                          \
        {                                                                                          \
            0                                                                                      \
        }                                                                                          \
    }
#define WHOLE(name, field, min, max, otherwise)                                                    \
    {                                                                                              \
        name, KEY_INT32, false, FIELD(field), min, max, otherwise,                                 \
        {                                                                                          \
            0                                                                                      \
        }                                                                                          \
    }
#define NUMBER(name, field, min, max, otherwise)                                                   \
    {                                                                                              \
        name, KEY_NUMBER, false, FIELD(field), min, max, otherwise,                                \
        {                                                                                          \
            0                                                                                      \
        }                                                                                          \
    }
#define FLAG(name, field, otherwise)                                                               \
    {                                                                                              \
        name, KEY_BOOL, false, FIELD(field), 0, 0, otherwise,                                      \
        {                                                                                          \
            0                                                                                      \
        }                                                                                          \
    }
#define CHOICE(name, field, required, otherwise, ...)                                              \
    {                                                                                              \
        name, KEY_CHOICE, required, FIELD(field), 0, 0, otherwise,                                 \
        {                                                                                          \
            __VA_ARGS__                                                                            \
        }                                                                                          \
    }

/* A default of 0 outside min..max stands for "none", or for what a later function fills in. */
static const struct key keys[] = {
    SIZE("vocab_size", vocab_size, 1, 1 << 24),
    SIZE("hidden_size", hidden_size, 1, 1 << 16),
    SIZE("num_hidden_layers", n_layers, 1, 1024),
    SIZE("intermediate_size", intermediate_size, 1, 1 << 20),
    SIZE("num_attention_heads", n_heads, 1, 1024),
    WHOLE("num_key_value_heads", n_kv_heads, 1, 1024, 0),
    WHOLE("head_dim", head_dim, 1, 8192, 0),
    WHOLE("num_latents", n_latents, 0, 1 << 20, 0),
    CHOICE("latent_input", latent_input, false, LATENT_INPUT_NONE, "none", "conv", "rglru"),
    WHOLE("conv_kernel", conv_kernel, 1, 64, 3),
    WHOLE("rglru_blocks", rglru_blocks, 1, 1 << 16, 1),
    WHOLE("sliding_window", sliding_window, 1, 1 << 20, 128),
    NUMBER("attn_logit_softcapping", attn_logit_softcapping, 1e-3, 1e6, 0),
    NUMBER("final_logit_softcapping", final_logit_softcapping, 1e-3, 1e6, 0),
    CHOICE("position_embedding", position_embedding, false, POSITION_NONE, "none", "sinusoidal",
           "vapor", "rope"),
    FLAG("bidirectional", bidirectional, false),
    CHOICE("norm", norm, true, 0, "rmsnorm", "layernorm"),
    NUMBER("norm_eps", norm_eps, 1e-20, 1, 1e-6),
    NUMBER("norm_offset", norm_offset, -16, 16, 0),
    FLAG("final_norm", final_norm, true),
    CHOICE("mlp", mlp, true, 0, "gated", "plain"),
    CHOICE("hidden_act", hidden_act, false, ACTIVATION_SILU, "silu", "gelu", "gelu_tanh"),
    FLAG("post_norms", post_norms, false),
    NUMBER("embedding_scale", embedding_scale, 1e-6, 1e6, 1),
    FLAG("tie_word_embeddings", tie_word_embeddings, false),
    {"max_position_embeddings",
     KEY_INT64,
     false,
     FIELD(max_position_embeddings),
     1,
     INT32_MAX,
     4096,
     {0}},
    CHOICE("pooling", pooling, false, POOLING_MEAN, "mean", "last"),
};

enum { N_KEYS = sizeof(keys) / sizeof(*keys) };

/* Read elsewhere in this file. */
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

/* ---- errors ---- */

static enum status wrong(struct error *err, const char *key, const char *expected,
                         const cJSON *item)
{
    char shown[64];
    return fail_field(err, STATUS_INVALID, key, "%s: expected %s, found %s", key, expected,
                      tree_show(item, shown));
}

static enum status out_of_memory(struct error *err)
{
    return fail(err, STATUS_NOMEM, "out of memory");
}

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
    return wrong(err, k->name, expected, item);
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
            return wrong(err, k->name, "true or false", item);
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
        return wrong(err, k->name, expected, item);
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

/* ---- keys with a form of their own ---- */

static enum status read_architecture(struct model_config *c, const cJSON *root, struct error *err)
{
    static const char *const names[] = {"LatteForCausalLM", "LatteForSequenceClassification",
                                        "LatteModel"};
    const cJSON *type = tree_find(root, "model_type");
    if (type && (!cJSON_IsString(type) || strcmp(type->valuestring, "latte")))
        return wrong(err, "model_type", "\"latte\"", type);
    const cJSON *list = tree_find(root, "architectures");
    c->head = HEAD_CAUSAL_LM;
    if (!list)
        return STATUS_OK;
    const cJSON *name = cJSON_IsArray(list) && cJSON_GetArraySize(list) == 1 ? list->child : NULL;
    for (int i = 0; i < 3; i++)
        if (cJSON_IsString(name) && !strcmp(name->valuestring, names[i])) {
            c->head = (enum model_head)i;
            return STATUS_OK;
        }
    return wrong(err, "architectures",
                 "a list of one of LatteForCausalLM, LatteForSequenceClassification, LatteModel",
                 name ? name : list);
}

static enum status read_layer_type(enum layer_type *out, const char *key, const cJSON *item,
                                   struct error *err)
{
    static const char *const names[] = {"latte", "macchiato", "full_attention"};
    for (int i = 0; i < 3; i++)
        if (cJSON_IsString(item) && !strcmp(item->valuestring, names[i])) {
            *out = (enum layer_type)i;
            return STATUS_OK;
        }
    return wrong(err, key, "\"latte\", \"macchiato\" or \"full_attention\"", item);
}

/* A list for a key must have one item a layer. */
static enum status check_length(const struct model_config *c, const char *key, const cJSON *list,
                                struct error *err)
{
    int n = cJSON_GetArraySize(list);
    if (n == c->n_layers)
        return STATUS_OK;
    return fail_field(err, STATUS_INVALID, key, "%s: expected %d items, one a layer, found %d", key,
                      c->n_layers, n);
}

static enum status read_layer_types(struct model_config *c, const cJSON *root, struct error *err)
{
    const cJSON *one = tree_find(root, "layer_type"), *many = tree_find(root, "layer_types");
    if (!one == !many)
        return fail_field(err, STATUS_INVALID, "layer_type",
                          "layer_type: expected either layer_type or layer_types, found %s",
                          one ? "both" : "neither");
    if (many && !cJSON_IsArray(many))
        return wrong(err, "layer_types", "a list", many);
    enum status st = many ? check_length(c, "layer_types", many, err) : STATUS_OK;
    const cJSON *item = many ? many->child : one;
    for (int i = 0; !st && i < c->n_layers; i++) {
        st = read_layer_type(&c->layers[i].type, many ? "layer_types" : "layer_type", item, err);
        item = many ? item->next : one;
    }
    return st;
}

static enum status read_positive(double *out, const char *key, const cJSON *item, double min,
                                 double max, struct error *err)
{
    char expected[80];
    if (cJSON_IsNumber(item) && item->valuedouble >= min && item->valuedouble <= max) {
        *out = item->valuedouble;
        return STATUS_OK;
    }
    snprintf(expected, sizeof(expected), "a number of %g to %g", min, max);
    return wrong(err, key, expected, item);
}

static enum status read_rope_theta(struct model_config *c, const cJSON *root, struct error *err)
{
    const cJSON *item = tree_find(root, "rope_theta");
    bool list = cJSON_IsArray(item);
    enum status st = list ? check_length(c, "rope_theta", item, err) : STATUS_OK;
    const cJSON *value = list ? item->child : item;
    for (int i = 0; !st && i < c->n_layers; i++) {
        c->layers[i].rope_theta = 10000;
        if (value)
            st = read_positive(&c->layers[i].rope_theta, "rope_theta", value, 1, 1e15, err);
        value = list ? value->next : item;
    }
    return st;
}

/* One number of the rope_scaling object; `used` counts the keys that were understood. */
static enum status read_scaling(double *out, const cJSON *object, const char *key, double max,
                                int *used, struct error *err)
{
    char name[64];
    snprintf(name, sizeof(name), "rope_scaling.%s", key);
    ++*used;
    return read_positive(out, name, tree_find(object, key), 1e-3, max, err);
}

static enum status read_llama3_scaling(struct rope_scaling *s, const cJSON *object, int *used,
                                       struct error *err)
{
    double length = 0;
    enum status st = read_scaling(&s->low_freq_factor, object, "low_freq_factor", 1e6, used, err);
    if (!st)
        st = read_scaling(&s->high_freq_factor, object, "high_freq_factor", 1e6, used, err);
    if (!st)
        st = read_scaling(&length, object, "original_max_position_embeddings", 1e9, used, err);
    if (!st && s->low_freq_factor >= s->high_freq_factor)
        st = fail_field(err, STATUS_INVALID, "rope_scaling",
                        "rope_scaling: expected low_freq_factor below high_freq_factor, found %g "
                        "and %g",
                        s->low_freq_factor, s->high_freq_factor);
    if (!st && (length < 1 || length != floor(length)))
        st = wrong(err, "rope_scaling.original_max_position_embeddings", "a whole number above 0",
                   tree_find(object, "original_max_position_embeddings"));
    s->original_max_position_embeddings = (int64_t)length;
    return st;
}

static enum status read_rope_scaling(struct model_config *c, const cJSON *root, struct error *err)
{
    const cJSON *object = tree_find(root, "rope_scaling");
    struct rope_scaling *s = &c->rope_scaling;
    if (!object)
        return STATUS_OK;
    if (!cJSON_IsObject(object))
        return wrong(err, "rope_scaling", "an object", object);
    const cJSON *type = tree_find(object, "rope_type");
    int used = (type != NULL) + (tree_find(object, "type") != NULL);
    if (!type)
        type = tree_find(object, "type");
    const char *name = cJSON_IsString(type) ? type->valuestring : "";
    enum status st = STATUS_OK;
    if (!strcmp(name, "linear"))
        s->type = ROPE_SCALING_LINEAR;
    else if (!strcmp(name, "llama3"))
        s->type = ROPE_SCALING_LLAMA3;
    else if (strcmp(name, "default"))
        return wrong(err, "rope_scaling.rope_type", "\"linear\", \"llama3\" or \"default\"", type);
    if (s->type != ROPE_SCALING_NONE)
        st = read_scaling(&s->factor, object, "factor", 1e6, &used, err);
    if (!st && s->type == ROPE_SCALING_LLAMA3)
        st = read_llama3_scaling(s, object, &used, err);
    if (!st && cJSON_GetArraySize(object) != used)
        st = fail_field(err, STATUS_INVALID, "rope_scaling",
                        "rope_scaling: expected %d keys for \"%s\", found %d", used, name,
                        cJSON_GetArraySize(object));
    return st;
}

static enum status read_scale(struct model_config *c, const cJSON *root, struct error *err)
{
    const cJSON *item = tree_find(root, "query_pre_attn_scalar");
    double scalar = c->head_dim;
    enum status st = STATUS_OK;
    if (item)
        st = read_positive(&scalar, "query_pre_attn_scalar", item, 1e-6, 1e9, err);
    c->attention_scale = 1 / sqrt(scalar);
    return st;
}

static enum status add_eos(struct model_config *c, const cJSON *item, struct error *err)
{
    int64_t id;
    if (!tree_whole(item, 0, c->vocab_size - 1, &id))
        return wrong(err, "eos_token_id", "token ids below vocab_size", item);
    for (int i = 0; i < c->n_eos; i++)
        if (c->eos_token_id[i] == id)
            return STATUS_OK;
    if (c->n_eos == MODEL_MAX_EOS)
        return fail_field(err, STATUS_INVALID, "eos_token_id",
                          "eos_token_id: expected at most %d ids", MODEL_MAX_EOS);
    c->eos_token_id[c->n_eos++] = (int32_t)id;
    return STATUS_OK;
}

/* A number or a list, added to those that are there. */
static enum status read_eos(struct model_config *c, const cJSON *root, struct error *err)
{
    const cJSON *item = tree_find(root, "eos_token_id");
    if (!item)
        return STATUS_OK;
    if (!cJSON_IsArray(item))
        return add_eos(c, item, err);
    enum status st = STATUS_OK;
    for (const cJSON *id = item->child; !st && id; id = id->next)
        st = add_eos(c, id, err);
    return st;
}

static enum status read_bos(struct model_config *c, const cJSON *root, struct error *err)
{
    const cJSON *item = tree_find(root, "bos_token_id");
    int64_t id = -1;
    if (item && !tree_whole(item, 0, c->vocab_size - 1, &id))
        return wrong(err, "bos_token_id", "a token id below vocab_size", item);
    c->bos_token_id = (int32_t)id;
    return STATUS_OK;
}

/* id2label is {"0": name, "1": name, ...}; its length is the default of num_labels. */
static enum status read_labels(struct model_config *c, const cJSON *root, struct error *err)
{
    const cJSON *count = tree_find(root, "num_labels"), *names = tree_find(root, "id2label");
    int64_t n = names ? cJSON_GetArraySize(names) : 2;
    char key[16];
    if (names && !cJSON_IsObject(names))
        return wrong(err, "id2label", "an object", names);
    if (count && !tree_whole(count, 1, MAX_LABELS, &n))
        return wrong(err, "num_labels", "a whole number of 1 to 65536", count);
    if (names && (n != cJSON_GetArraySize(names) || n < 1 || n > MAX_LABELS))
        return fail_field(err, STATUS_INVALID, "id2label",
                          "id2label: expected %lld entries (num_labels), found %d", (long long)n,
                          cJSON_GetArraySize(names));
    const cJSON *item = names ? names->child : NULL;
    for (int i = 0; item; i++, item = item->next) {
        snprintf(key, sizeof(key), "%d", i);
        if (!cJSON_IsString(item) || strcmp(item->string, key))
            return fail_field(err, STATUS_INVALID, "id2label",
                              "id2label: expected \"%s\" and a name, found \"%.40s\" and %s", key,
                              item->string, tree_kind(item));
    }
    c->num_labels = c->head == HEAD_SEQUENCE_CLASSIFICATION ? (int32_t)n : 0;
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
    return ignored->failed ? out_of_memory(err) : STATUS_OK;
}

static enum status read_root(struct model_config *c, const cJSON *root, struct error *err)
{
    if (!cJSON_IsObject(root))
        return fail(err, STATUS_INVALID, "expected an object, found %s", tree_kind(root));
    static enum status (*const steps[])(struct model_config *, const cJSON *, struct error *) = {
        read_layer_types, read_rope_theta, read_rope_scaling, read_scale,
        read_bos,         read_eos,        read_labels,
    };
    enum status st = read_architecture(c, root, err);
    if (!st)
        st = read_table(c, root, err);
    if (!st)
        st = check_heads(c, err);
    if (st)
        return st;
    c->layers = calloc((size_t)c->n_layers, sizeof(*c->layers));
    if (!c->layers)
        return out_of_memory(err);
    for (size_t i = 0; !st && i < sizeof(steps) / sizeof(*steps); i++)
        st = steps[i](c, root, err);
    return st ? st : check_whole(c, err);
}

enum status config_read(struct model_config *out, struct bytes *ignored, const char *path,
                        struct error *err)
{
    cJSON *root = NULL;
    struct model_config c = {0};
    enum status st = tree_read(&root, path, MAX_FILE, MAX_JSON_DEPTH, err);
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

/* ---- generation_config.json ---- */

static enum status read_default(double *out, const cJSON *root, const char *key, double min,
                                double max, struct error *err)
{
    const cJSON *item = tree_find(root, key);
    return item ? read_positive(out, key, item, min, max, err) : STATUS_OK;
}

static enum status read_default_int(int32_t *out, const cJSON *root, const char *key, int64_t min,
                                    struct error *err)
{
    const cJSON *item = tree_find(root, key);
    int64_t value;
    if (!item)
        return STATUS_OK;
    if (!tree_whole(item, min, INT32_MAX, &value))
        return wrong(err, key, min ? "a whole number above 0" : "a whole number of 0 or more",
                     item);
    *out = (int32_t)value;
    return STATUS_OK;
}

/* do_sample false means greedy, whatever the temperature says. */
static enum status read_do_sample(struct generation_defaults *g, const cJSON *root,
                                  struct error *err)
{
    const cJSON *item = tree_find(root, "do_sample");
    if (item && !cJSON_IsBool(item))
        return wrong(err, "do_sample", "true or false", item);
    if (cJSON_IsFalse(item))
        g->temperature = 0;
    return STATUS_OK;
}

static enum status read_defaults(struct generation_defaults *g, const cJSON *root,
                                 struct error *err)
{
    if (!cJSON_IsObject(root))
        return fail(err, STATUS_INVALID, "expected an object, found %s", tree_kind(root));
    enum status st = read_default(&g->temperature, root, "temperature", 0, 100, err);
    if (!st)
        st = read_default(&g->top_p, root, "top_p", 0, 1, err);
    if (!st)
        st = read_default(&g->min_p, root, "min_p", 0, 1, err);
    if (!st)
        st = read_default(&g->typical_p, root, "typical_p", 0, 1, err);
    if (!st)
        st = read_default(&g->repetition_penalty, root, "repetition_penalty", 1e-2, 100, err);
    if (!st)
        st = read_default_int(&g->top_k, root, "top_k", 0, err);
    if (!st)
        st = read_default_int(&g->max_new_tokens, root, "max_new_tokens", 1, err);
    return st ? st : read_do_sample(g, root, err);
}

enum status generation_read(struct generation_defaults *out, struct model_config *config,
                            const char *path, struct error *err)
{
    struct generation_defaults g = {NAN, NAN, NAN, NAN, NAN, -1, -1};
    cJSON *root = NULL;
    enum status st = tree_read(&root, path, MAX_FILE, MAX_JSON_DEPTH, err);
    if (st && st != STATUS_NOT_FOUND)
        return st;
    if (!st) {
        st = read_defaults(&g, root, err);
        if (!st)
            st = read_eos(config, root, err);
        cJSON_Delete(root);
        if (st) {
            fail_context(err, "%s", path);
            return st;
        }
    }
    *out = g;
    return STATUS_OK;
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
