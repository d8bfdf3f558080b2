/* model_files.c - see model_files.h */
#include "tests/unit/model_files.h"

#include <cjson/cJSON.h>
#include <ftw.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- configurations ---- */

#define SIZES                                                                                      \
    "\"model_type\":\"latte\",\"architectures\":[\"LatteForCausalLM\"],\"vocab_size\":61,"         \
    "\"hidden_size\":32,\"num_hidden_layers\":2,\"intermediate_size\":48,"                         \
    "\"num_attention_heads\":4,\"eos_token_id\":0,\"tie_word_embeddings\":true,"
#define PLAIN SIZES "\"norm\":\"layernorm\",\"mlp\":\"plain\",\"hidden_act\":\"gelu\","
#define PLUS SIZES "\"norm\":\"rmsnorm\",\"mlp\":\"gated\","
#define LATENTS "\"num_latents\":16,"
#define LATTE "\"layer_type\":\"latte\","
#define MACCHIATO "\"layer_type\":\"macchiato\",\"sliding_window\":5,"
#define CONV "\"latent_input\":\"conv\",\"conv_kernel\":3"
#define RGLRU "\"latent_input\":\"rglru\",\"rglru_blocks\":2"
#define ENCODER                                                                                    \
    "{\"vocab_size\":61,\"hidden_size\":32,\"num_hidden_layers\":2,\"intermediate_size\":48,"      \
    "\"num_attention_heads\":4,\"norm\":\"rmsnorm\",\"mlp\":\"gated\",\"bidirectional\":true,"

const struct test_model test_models[] = {
    {"latte", "{" PLAIN LATENTS LATTE "\"position_embedding\":\"sinusoidal\"}"},
    {"latte-vapor", "{" PLAIN LATENTS LATTE "\"position_embedding\":\"vapor\"}"},
    {"latte++", "{" PLUS LATENTS LATTE "\"position_embedding\":\"vapor\"}"},
    {"latte-conv++", "{" PLUS LATENTS LATTE CONV "}"},
    {"latte-conv-swa++", "{" PLUS LATENTS MACCHIATO CONV "}"},
    {"latte-rglru++", "{" PLUS LATENTS LATTE RGLRU "}"},
    {"latte-rglru-swa++", "{" PLUS LATENTS MACCHIATO RGLRU "}"},
    {"rglru-swa++", "{" PLUS MACCHIATO RGLRU "}"},
    {"transformer++", "{" PLUS "\"layer_type\":\"full_attention\",\"position_embedding\":\"rope\","
                      "\"max_position_embeddings\":64}"},
    {"gemma-macchiato",
     "{" PLUS LATENTS MACCHIATO RGLRU ",\"post_norms\":true,\"embedding_scale\":5.65,"
     "\"norm_offset\":1.0,\"num_key_value_heads\":2,\"head_dim\":16,"
     "\"query_pre_attn_scalar\":20,\"attn_logit_softcapping\":50.0,"
     "\"final_logit_softcapping\":30.0,\"position_embedding\":\"rope\","
     "\"hidden_act\":\"gelu_tanh\"}"},
    {"mixed-layers",
     "{" PLUS LATENTS RGLRU ",\"layer_types\":[\"macchiato\",\"full_attention\"],"
     "\"sliding_window\":4,\"position_embedding\":\"vapor\",\"rope_theta\":[10000,500000],"
     "\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8.0,\"low_freq_factor\":1.0,"
     "\"high_freq_factor\":4.0,\"original_max_position_embeddings\":32}}"},
    {"classifier", ENCODER LATENTS MACCHIATO RGLRU
     ",\"architectures\":[\"LatteForSequenceClassification\"],"
     "\"id2label\":{\"0\":\"bad\",\"1\":\"fair\",\"2\":\"good\"},\"pooling\":\"last\"}"},
    {"embedder",
     ENCODER LATENTS LATTE CONV ",\"architectures\":[\"LatteModel\"],\"final_norm\":false}"},
};

const size_t n_test_models = sizeof(test_models) / sizeof(*test_models);

/* ---- random values ---- */

static uint64_t next_random(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

/* Uniform in (0, 1). */
static double uniform(uint64_t *state)
{
    return ((double)(next_random(state) >> 11) + 0.5) * 0x1p-53;
}

static double normal(uint64_t *state)
{
    double radius = sqrt(-2 * log(uniform(state)));
    return radius * cos(2 * M_PI * uniform(state));
}

static uint64_t stream_of(uint64_t seed, const char *name)
{
    uint64_t hash = 0xcbf29ce484222325u ^ seed * 0x9e3779b97f4a7c15u;
    for (; *name; name++)
        hash = (hash ^ (unsigned char)*name) * 0x100000001b3u;
    return hash;
}

/* ---- storing values ---- */

static uint32_t float_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
}

static uint16_t to_bf16(float value)
{
    uint32_t bits = float_bits(value);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* To half precision, nearest, for finite values; too large ones become infinite. */
static uint16_t to_f16(float value)
{
    uint16_t sign = signbit(value) ? 0x8000 : 0;
    double magnitude = fabs((double)value);
    if (magnitude >= 65520)
        return sign | 0x7c00;
    int exponent = magnitude < 0x1p-14 ? -14 : ilogb(magnitude);
    long units = lrint(ldexp(magnitude, 10 - exponent)); /* 1024..2048 when normal */
    return (uint16_t)(sign + ((exponent + 14) << 10) + units);
}

static void store(struct test_tensor *t, size_t i, double value)
{
    if (!strcmp(t->dtype, "BF16"))
        ((uint16_t *)t->data)[i] = to_bf16((float)value);
    else if (!strcmp(t->dtype, "F16"))
        ((uint16_t *)t->data)[i] = to_f16((float)value);
    else
        ((float *)t->data)[i] = (float)value;
}

static void *must(void *memory)
{
    if (!memory)
        abort();
    return memory;
}

/* ---- the list ---- */

static size_t count_values(const struct test_tensor *t)
{
    size_t n = 1;
    for (int i = 0; i < t->n_dims; i++)
        n *= (size_t)t->shape[i];
    return n;
}

static struct test_tensor *add_empty(struct test_tensors *list, const char *name, const char *dtype,
                                     const int64_t shape[8])
{
    if (list->n == list->cap) {
        list->cap = list->cap ? 2 * list->cap : 64;
        list->items = must(realloc(list->items, list->cap * sizeof(*list->items)));
    }
    struct test_tensor *t = &list->items[list->n++];
    *t = (struct test_tensor){0};
    snprintf(t->name, sizeof(t->name), "%s", name);
    snprintf(t->dtype, sizeof(t->dtype), "%s", dtype);
    while (t->n_dims < 8 && shape[t->n_dims]) {
        t->shape[t->n_dims] = shape[t->n_dims];
        t->n_dims++;
    }
    t->n_bytes = count_values(t) * (strcmp(dtype, "F32") ? 2 : 4);
    t->data = must(malloc(t->n_bytes + 1));
    return t;
}

struct test_tensor *test_tensors_add(struct test_tensors *list, const char *name, const char *dtype,
                                     const int64_t shape[8], uint64_t seed, double mean,
                                     double deviation)
{
    struct test_tensor *t = add_empty(list, name, dtype, shape);
    uint64_t state = stream_of(seed, name);
    for (size_t i = 0, n = count_values(t); i < n; i++)
        store(t, i, mean + deviation * normal(&state));
    return t;
}

struct test_tensor *test_tensors_find(const struct test_tensors *list, const char *name)
{
    for (size_t i = 0; i < list->n; i++)
        if (!strcmp(list->items[i].name, name))
            return &list->items[i];
    return NULL;
}

void test_tensors_remove(struct test_tensors *list, const char *name)
{
    struct test_tensor *t = test_tensors_find(list, name);
    if (!t)
        return;
    free(t->data);
    size_t after = (size_t)(list->items + list->n - t) - 1;
    memmove(t, t + 1, after * sizeof(*t));
    list->n--;
}

void test_tensors_free(struct test_tensors *list)
{
    for (size_t i = 0; i < list->n; i++)
        free(list->items[i].data);
    free(list->items);
    *list = (struct test_tensors){0};
}

/* ---- the tensors a configuration asks for ---- */

struct maker {
    struct test_tensors *list;
    const cJSON *config;
    struct model_files_options options;
    uint64_t seed;
    char prefix[64];
    int64_t D, F, H, KV, d, L, M, K, B;
    double norm_mean;
    bool layernorm, bidirectional;
};

static double number(const cJSON *config, const char *key, double otherwise)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(config, key);
    return cJSON_IsNumber(item) ? item->valuedouble : otherwise;
}

static const char *text(const cJSON *config, const char *key, const char *otherwise)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(config, key);
    return cJSON_IsString(item) ? item->valuestring : otherwise;
}

static bool truth(const cJSON *config, const char *key, bool otherwise)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(config, key);
    return cJSON_IsBool(item) ? cJSON_IsTrue(item) : otherwise;
}

__attribute__((format(printf, 2, 3))) static void name_of(char out[120], const char *format, ...)
{
    va_list args;
    va_start(args, format);
    if (vsnprintf(out, 120, format, args) >= 120)
        abort();
    va_end(args);
}

static struct test_tensor *add(struct maker *m, const char *name, int64_t a, int64_t b, int64_t c,
                               double mean, double deviation)
{
    char full[120];
    name_of(full, "%s%s", m->prefix, name);
    return test_tensors_add(m->list, full, m->options.dtype, (int64_t[8]){a, b, c}, m->seed, mean,
                            deviation);
}

static void add_bias(struct maker *m, const char *name, int64_t n)
{
    char full[120];
    name_of(full, "%s.bias", name);
    if (m->options.biases)
        add(m, full, n, 0, 0, 0, 0.1);
}

static void add_linear(struct maker *m, const char *name, int64_t out, int64_t in, double gain)
{
    char full[120];
    name_of(full, "%s.weight", name);
    add(m, full, out, in, 0, 0, gain / sqrt((double)in));
    add_bias(m, name, out);
}

static void add_norm(struct maker *m, const char *name)
{
    char full[120];
    name_of(full, "%s.weight", name);
    add(m, full, m->D, 0, 0, m->norm_mean, 0.1);
    if (m->layernorm)
        add_bias(m, name, m->D);
}

/* RG-LRU units whose decay lies between 0.8 and 0.999 when the gate is half open. */
static void add_rglru(struct maker *m, const char *unit)
{
    static const char *const gates[] = {"input_gate", "recurrence_gate"};
    char name[120];
    int64_t width = m->D / m->B;
    for (int i = 0; i < 2; i++) {
        name_of(name, "mix.%s.%s.weight", unit, gates[i]);
        add(m, name, m->B, width, width, 0, 1 / sqrt((double)width));
        name_of(name, "mix.%s.%s", unit, gates[i]);
        add_bias(m, name, m->D);
    }
    name_of(name, "%smix.%s.lambda", m->prefix, unit);
    struct test_tensor *t = add_empty(m->list, name, m->options.dtype, (int64_t[8]){m->D, 0});
    uint64_t state = stream_of(m->seed, name);
    for (int64_t i = 0; i < m->D; i++) {
        double decay = 0.8 + 0.199 * uniform(&state);
        store(t, (size_t)i, log(expm1(-log(decay) / 4)));
    }
}

static void add_latent_input(struct maker *m)
{
    const char *input = text(m->config, "latent_input", "none");
    if (!strcmp(input, "conv")) {
        add(m, "mix.conv.weight", m->D, m->K, 0, 0, 1 / sqrt((double)m->K));
        add_bias(m, "mix.conv", m->D);
    } else if (!strcmp(input, "rglru")) {
        add_rglru(m, "rglru");
        if (m->bidirectional)
            add_rglru(m, "rglru_backward");
        add(m, "mix.rglru_norm.weight", m->D, 0, 0, m->norm_mean, 0.1);
    }
}

static void add_mix(struct maker *m, const char *layer_type)
{
    bool full = !strcmp(layer_type, "full_attention");
    bool window = full || !strcmp(layer_type, "macchiato");
    if (!full) {
        add_latent_input(m);
        if (!strcmp(text(m->config, "position_embedding", "none"), "vapor"))
            add(m, "mix.vapor.theta", m->H, m->d / 2, 0, 0, 0.05);
    }
    if (!full && m->L) {
        add_linear(m, "mix.latent_q", m->H * (m->M + window), m->D, 1);
        add_linear(m, "mix.latent_k", m->L, m->D, m->options.theta);
    }
    if (window) {
        add_linear(m, "mix.q_proj", m->H * m->d, m->D, 1);
        add_linear(m, "mix.k_proj", m->KV * m->d, m->D, 1);
        if (m->options.qk_norms) {
            add(m, "mix.q_norm.weight", m->d, 0, 0, m->norm_mean, 0.1);
            add(m, "mix.k_norm.weight", m->d, 0, 0, m->norm_mean, 0.1);
        }
    }
    add_linear(m, "mix.v_proj", m->KV * m->d, m->D, 1);
    add_linear(m, "mix.o_proj", m->D, m->H * m->d, 1);
}

static void add_layer(struct maker *m, int layer)
{
    const cJSON *types = cJSON_GetObjectItemCaseSensitive(m->config, "layer_types");
    const cJSON *type = cJSON_GetArrayItem(types, layer);
    snprintf(m->prefix, sizeof(m->prefix), "model.layers.%d.", layer);
    add_norm(m, "norm1");
    add_mix(m, cJSON_IsString(type) ? type->valuestring : text(m->config, "layer_type", ""));
    add_norm(m, "norm2");
    if (truth(m->config, "post_norms", false)) {
        add(m, "post_norm1.weight", m->D, 0, 0, m->norm_mean, 0.1);
        add(m, "post_norm2.weight", m->D, 0, 0, m->norm_mean, 0.1);
    }
    if (strcmp(text(m->config, "mlp", ""), "plain"))
        add_linear(m, "mlp.gate_proj", m->F, m->D, 1);
    add_linear(m, "mlp.up_proj", m->F, m->D, 1);
    add_linear(m, "mlp.down_proj", m->D, m->F, 1);
    m->prefix[0] = '\0';
}

static int64_t count_labels(const cJSON *config)
{
    const cJSON *names = cJSON_GetObjectItemCaseSensitive(config, "id2label");
    return (int64_t)number(config, "num_labels", names ? cJSON_GetArraySize(names) : 2);
}

static void add_heads(struct maker *m)
{
    const cJSON *names = cJSON_GetObjectItemCaseSensitive(m->config, "architectures");
    const cJSON *first = cJSON_GetArrayItem(names, 0);
    const char *name = cJSON_IsString(first) ? first->valuestring : "LatteForCausalLM";
    if (truth(m->config, "final_norm", true))
        add_norm(m, "model.norm");
    if (!strcmp(name, "LatteForSequenceClassification"))
        add_linear(m, "score", count_labels(m->config), m->D, 1);
    else if (!strcmp(name, "LatteForCausalLM") && !truth(m->config, "tie_word_embeddings", false))
        add_linear(m, "lm_head", (int64_t)number(m->config, "vocab_size", 0), m->D, 2);
}

static void read_sizes(struct maker *m)
{
    const cJSON *c = m->config;
    m->D = (int64_t)number(c, "hidden_size", 0);
    m->F = (int64_t)number(c, "intermediate_size", 0);
    m->H = (int64_t)number(c, "num_attention_heads", 1);
    m->KV = (int64_t)number(c, "num_key_value_heads", (double)m->H);
    m->d = (int64_t)number(c, "head_dim", (double)(m->D / m->H));
    m->L = (int64_t)number(c, "num_latents", 0);
    m->M = m->L / m->H;
    m->K = (int64_t)number(c, "conv_kernel", 3);
    m->B = (int64_t)number(c, "rglru_blocks", 1);
    m->norm_mean = 1 - number(c, "norm_offset", 0);
    m->layernorm = !strcmp(text(c, "norm", ""), "layernorm");
    m->bidirectional = truth(c, "bidirectional", false);
}

int test_tensors_make(struct test_tensors *list, const char *config_json, uint64_t seed,
                      const struct model_files_options *options)
{
    cJSON *config = cJSON_Parse(config_json);
    if (!config) {
        fprintf(stderr, "model_files: the config is not JSON: %s\n", config_json);
        return -1;
    }
    struct maker m = {.list = list, .config = config, .seed = seed};
    if (options)
        m.options = *options;
    if (!m.options.dtype)
        m.options.dtype = "F32";
    if (m.options.theta == 0)
        m.options.theta = 1;
    *list = (struct test_tensors){0};
    read_sizes(&m);
    add(&m, "model.embed_tokens.weight", (int64_t)number(config, "vocab_size", 0), m.D, 0, 0,
        2 / sqrt((double)m.D));
    for (int i = 0, n = (int)number(config, "num_hidden_layers", 0); i < n; i++)
        add_layer(&m, i);
    add_heads(&m);
    cJSON_Delete(config);
    return 0;
}

/* ---- files ---- */

static int complain(const char *what, const char *path)
{
    fprintf(stderr, "model_files: %s ", what);
    perror(path);
    return -1;
}

int test_file_write(const char *dir, const char *name, const void *data, size_t n)
{
    char path[4096];
    snprintf(path, sizeof(path), "%s/%s", dir, name);
    FILE *file = fopen(path, "wb");
    if (!file)
        return complain("cannot write", path);
    size_t written = fwrite(data, 1, n, file);
    return fclose(file) || written != n ? complain("cannot write", path) : 0;
}

char *test_file_read(const char *path, size_t *n)
{
    FILE *file = fopen(path, "rb");
    if (!file)
        return NULL;
    fseek(file, 0, SEEK_END);
    long size = ftell(file);
    rewind(file);
    char *data = must(calloc(1, (size_t)size + 1));
    *n = fread(data, 1, (size_t)size, file);
    fclose(file);
    return data;
}

int test_dir_make(char *path, size_t n)
{
    const char *base = getenv("TMPDIR");
    snprintf(path, n, "%s/latte-test-XXXXXX", base && *base ? base : "/tmp");
    return mkdtemp(path) ? 0 : complain("cannot make", path);
}

static int remove_entry(const char *path, const struct stat *about, int type, struct FTW *where)
{
    (void)about;
    (void)type;
    (void)where;
    return remove(path);
}

void test_dir_remove(const char *path)
{
    nftw(path, remove_entry, 8, FTW_DEPTH | FTW_PHYS);
}

/* The header entry of one tensor whose data begin at offset. */
static void print_entry(FILE *out, const struct test_tensor *t, size_t offset)
{
    fprintf(out, "\"%s\":{\"dtype\":\"%s\",\"shape\":[", t->name, t->dtype);
    for (int i = 0; i < t->n_dims; i++)
        fprintf(out, "%s%lld", i ? "," : "", (long long)t->shape[i]);
    fprintf(out, "],\"data_offsets\":[%zu,%zu]}", offset, offset + t->n_bytes);
}

/* One file with every n_shards-th tensor from first on. */
static int write_shard(const struct test_tensors *list, size_t first, size_t n_shards,
                       const char *dir, const char *name)
{
    char *header = NULL, path[4096];
    size_t length = 0, offset = 0;
    FILE *text_file = must(open_memstream(&header, &length));
    fprintf(text_file, "{\"__metadata__\":{\"format\":\"pt\"}");
    for (size_t i = first; i < list->n; offset += list->items[i].n_bytes, i += n_shards) {
        fputc(',', text_file);
        print_entry(text_file, &list->items[i], offset);
    }
    fputc('}', text_file);
    while (ftell(text_file) % 8)
        fputc(' ', text_file);
    fclose(text_file);
    snprintf(path, sizeof(path), "%s/%s", dir, name);
    FILE *file = fopen(path, "wb");
    if (!file) {
        free(header);
        return complain("cannot write", path);
    }
    uint64_t size = length; /* tests run on little-endian machines */
    fwrite(&size, 1, sizeof(size), file);
    fwrite(header, 1, length, file);
    for (size_t i = first; i < list->n; i += n_shards)
        fwrite(list->items[i].data, 1, list->items[i].n_bytes, file);
    free(header);
    return fclose(file) ? complain("cannot write", path) : 0;
}

static void shard_name(char out[64], size_t shard, size_t n_shards)
{
    snprintf(out, 64, "model-%05zu-of-%05zu.safetensors", shard + 1, n_shards);
}

static int write_index(const struct test_tensors *list, size_t n_shards, const char *dir)
{
    char *index = NULL, name[64];
    size_t length = 0, total = 0;
    for (size_t i = 0; i < list->n; i++)
        total += list->items[i].n_bytes;
    FILE *out = must(open_memstream(&index, &length));
    fprintf(out, "{\"metadata\":{\"total_size\":%zu},\"weight_map\":{", total);
    for (size_t i = 0; i < list->n; i++) {
        shard_name(name, i % n_shards, n_shards);
        fprintf(out, "%s\"%s\":\"%s\"", i ? "," : "", list->items[i].name, name);
    }
    fprintf(out, "}}");
    fclose(out);
    int failed = test_file_write(dir, "model.safetensors.index.json", index, length);
    free(index);
    return failed;
}

int test_tensors_write(const struct test_tensors *list, const char *dir, int n_shards)
{
    if (n_shards <= 1)
        return write_shard(list, 0, 1, dir, "model.safetensors");
    char name[64];
    for (int i = 0; i < n_shards; i++) {
        shard_name(name, (size_t)i, (size_t)n_shards);
        if (write_shard(list, (size_t)i, (size_t)n_shards, dir, name))
            return -1;
    }
    return write_index(list, (size_t)n_shards, dir);
}

int model_files_write(const char *dir, const char *config_json, uint64_t seed,
                      const struct model_files_options *options)
{
    struct test_tensors list;
    if (test_tensors_make(&list, config_json, seed, options))
        return -1;
    int failed = test_file_write(dir, "config.json", config_json, strlen(config_json));
    if (!failed)
        failed = test_tensors_write(&list, dir, options ? options->n_shards : 1);
    test_tensors_free(&list);
    return failed;
}
