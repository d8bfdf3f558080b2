/* config_parts.c - see config_parts.h */
#include "weights/config_parts.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_LABELS = 1 << 16 };

enum status config_wrong(struct error *err, const char *key, const char *expected,
                         const cJSON *item)
{
    char shown[64];
    return fail_field(err, STATUS_INVALID, key, "%s: expected %s, found %s", key, expected,
                      tree_show(item, shown));
}

enum status config_read_architecture(struct model_config *c, const cJSON *root, struct error *err)
{
    static const char *const names[] = {"LatteForCausalLM", "LatteForSequenceClassification",
                                        "LatteModel"};
    const cJSON *type = tree_find(root, "model_type");
    if (type && (!cJSON_IsString(type) || strcmp(type->valuestring, "latte")))
        return config_wrong(err, "model_type", "\"latte\"", type);
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
    return config_wrong(
        err, "architectures",
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
    return config_wrong(err, key, "\"latte\", \"macchiato\" or \"full_attention\"", item);
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
        return config_wrong(err, "layer_types", "a list", many);
    enum status st = many ? check_length(c, "layer_types", many, err) : STATUS_OK;
    const cJSON *item = many ? many->child : one;
    for (int i = 0; !st && i < c->n_layers; i++) {
        st = read_layer_type(&c->layers[i].type, many ? "layer_types" : "layer_type", item, err);
        item = many ? item->next : one;
    }
    return st;
}

enum status config_number(double *out, const char *key, const cJSON *item, double min, double max,
                          struct error *err)
{
    char expected[80];
    if (cJSON_IsNumber(item) && item->valuedouble >= min && item->valuedouble <= max) {
        *out = item->valuedouble;
        return STATUS_OK;
    }
    snprintf(expected, sizeof(expected), "a number of %g to %g", min, max);
    return config_wrong(err, key, expected, item);
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
            st = config_number(&c->layers[i].rope_theta, "rope_theta", value, 1, 1e15, err);
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
    return config_number(out, name, tree_find(object, key), 1e-3, max, err);
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
        st = config_wrong(err, "rope_scaling.original_max_position_embeddings",
                          "a whole number above 0",
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
        return config_wrong(err, "rope_scaling", "an object", object);
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
        return config_wrong(err, "rope_scaling.rope_type", "\"linear\", \"llama3\" or \"default\"",
                            type);
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
        st = config_number(&scalar, "query_pre_attn_scalar", item, 1e-6, 1e9, err);
    c->attention_scale = 1 / sqrt(scalar);
    return st;
}

static enum status add_eos(struct model_config *c, const cJSON *item, struct error *err)
{
    int64_t id;
    if (!tree_whole(item, 0, c->vocab_size - 1, &id))
        return config_wrong(err, "eos_token_id", "token ids below vocab_size", item);
    for (int i = 0; i < c->n_eos; i++)
        if (c->eos_token_id[i] == id)
            return STATUS_OK;
    if (c->n_eos == MODEL_MAX_EOS)
        return fail_field(err, STATUS_INVALID, "eos_token_id",
                          "eos_token_id: expected at most %d ids", MODEL_MAX_EOS);
    c->eos_token_id[c->n_eos++] = (int32_t)id;
    return STATUS_OK;
}

enum status config_read_eos(struct model_config *c, const cJSON *root, struct error *err)
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
        return config_wrong(err, "bos_token_id", "a token id below vocab_size", item);
    c->bos_token_id = (int32_t)id;
    return STATUS_OK;
}

/* id2label is {"0": name, "1": name, ...}; its length is the default of num_labels. */
static enum status read_labels(struct model_config *c, const cJSON *root, struct error *err)
{
    const cJSON *count = tree_find(root, "num_labels"), *names = tree_find(root, "id2label");
    int64_t n = names ? cJSON_GetArraySize(names) : 2;
    char key[16], shown[64];
    if (names && !cJSON_IsObject(names))
        return config_wrong(err, "id2label", "an object", names);
    if (count && !tree_whole(count, 1, MAX_LABELS, &n))
        return config_wrong(err, "num_labels", "a whole number of 1 to 65536", count);
    if (names && (n != cJSON_GetArraySize(names) || n < 1 || n > MAX_LABELS))
        return fail_field(err, STATUS_INVALID, "id2label",
                          "id2label: expected %lld entries (num_labels), found %d", (long long)n,
                          cJSON_GetArraySize(names));
    const cJSON *item = names ? names->child : NULL;
    for (int i = 0; item; i++, item = item->next) {
        snprintf(key, sizeof(key), "%d", i);
        if (!cJSON_IsString(item) || strcmp(item->string, key))
            return fail_field(err, STATUS_INVALID, "id2label",
                              "id2label: expected \"%s\" and a name, found \"%s\" and %s", key,
                              tree_key(item, shown), tree_kind(item));
    }
    c->num_labels = c->head == HEAD_SEQUENCE_CLASSIFICATION ? (int32_t)n : 0;
    return STATUS_OK;
}

enum status config_read_parts(struct model_config *c, const cJSON *root, struct error *err)
{
    static enum status (*const parts[])(struct model_config *, const cJSON *, struct error *) = {
        read_layer_types, read_rope_theta, read_rope_scaling, read_scale,
        read_bos,         config_read_eos, read_labels,
    };
    c->layers = calloc((size_t)c->n_layers, sizeof(*c->layers));
    if (!c->layers)
        return fail(err, STATUS_NOMEM, "out of memory");
    enum status st = STATUS_OK;
    for (size_t i = 0; !st && i < sizeof(parts) / sizeof(*parts); i++)
        st = parts[i](c, root, err);
    return st;
}
