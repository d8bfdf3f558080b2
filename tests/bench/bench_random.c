/* bench_random.c - see bench_random.h */
#include "tests/bench/bench_random.h"

#include <fcntl.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/base/bytes.h"
#include "engine/cores.h"
#include "engine/pool.h"

enum kind {
    KIND_LATTE,       /* Latte-RGLRU-SWA++ with a tied head */
    KIND_GEMMA,       /* the same inside Gemma 2's block */
    KIND_TRANSFORMER, /* Transformer++: full attention */
};

/* Letters as in weights/README.md. */
struct shape {
    const char *name;
    enum kind kind;
    int V, D, n_layers, F, H, KV, d, L, w, B;
    int context;
};

static const struct shape shapes[] = {
    {"156m", KIND_LATTE, 50257, 768, 12, 3072, 8, 8, 96, 128, 128, 8, 0},
    {"12m", KIND_LATTE, 8192, 320, 7, 864, 5, 5, 64, 80, 256, 5, 0},
    {"tiny", KIND_LATTE, 256, 32, 2, 64, 4, 4, 8, 16, 16, 4, 0},
    {"gemma-2.6b", KIND_GEMMA, 256000, 2304, 26, 9216, 8, 4, 256, 128, 128, 8, 0},
    {"transformer-151m", KIND_TRANSFORMER, 50257, 768, 12, 3072, 8, 8, 96, 0, 0, 0, 4096},
};
enum { N_SHAPES = sizeof(shapes) / sizeof(*shapes) };

const char *random_model_names(void)
{
    return "156m, 12m, tiny, gemma-2.6b, transformer-151m";
}

/* ---- the tensors of a shape ---- */

/* Values are mean + uniform in +-spread. */
struct spec {
    char name[96];
    int64_t shape[3]; /* ends at the first 0 */
    float mean, spread;
    int64_t n_values, offset; /* in values, of the data behind the header */
};

struct specs {
    struct spec *items; /* [n], owned */
    int n, cap;
    int64_t n_values;
    bool failed;
};

static void add(struct specs *list, int layer, const char *name, int64_t a, int64_t b, int64_t c,
                float mean, float spread)
{
    if (list->n == list->cap) {
        list->cap = list->cap ? 2 * list->cap : 64;
        struct spec *items = realloc(list->items, (size_t)list->cap * sizeof(*items));
        if (!items) {
            list->failed = true;
            return;
        }
        list->items = items;
    }
    struct spec *s = &list->items[list->n++];
    *s = (struct spec){.shape = {a, b, c}, .mean = mean, .spread = spread};
    s->n_values = a * (b ? b : 1) * (c ? c : 1);
    s->offset = list->n_values;
    list->n_values += s->n_values;
    if (layer < 0)
        snprintf(s->name, sizeof(s->name), "model.%s", name);
    else
        snprintf(s->name, sizeof(s->name), "model.layers.%d.%s", layer, name);
}

/* A product of n_in values of deviation 1 has deviation 1. */
static void add_linear(struct specs *list, int layer, const char *name, int64_t n_out, int64_t n_in)
{
    add(list, layer, name, n_out, n_in, 0, 0, sqrtf(3.0f / (float)n_in));
}

static void add_norm(struct specs *list, int layer, const char *name, const struct shape *s)
{
    add(list, layer, name, s->D, 0, 0, s->kind == KIND_GEMMA ? 0 : 1, 0); /* norm_offset 1 */
}

static void add_latents(struct specs *list, int layer, const struct shape *s)
{
    const int b = s->D / s->B;
    const float spread = sqrtf(3.0f / (float)b);
    add_linear(list, layer, "mix.latent_q.weight", s->L + s->H, s->D);
    add_linear(list, layer, "mix.latent_k.weight", s->L, s->D);
    add(list, layer, "mix.rglru.input_gate.weight", s->B, b, b, 0, spread);
    add(list, layer, "mix.rglru.recurrence_gate.weight", s->B, b, b, 0, spread);
    add(list, layer, "mix.rglru.lambda", s->D, 0, 0, -3, 1);
    add_norm(list, layer, "mix.rglru_norm.weight", s);
}

static void add_layer(struct specs *list, int layer, const struct shape *s)
{
    add_norm(list, layer, "norm1.weight", s);
    add_norm(list, layer, "norm2.weight", s);
    if (s->kind == KIND_GEMMA) {
        add_norm(list, layer, "post_norm1.weight", s);
        add_norm(list, layer, "post_norm2.weight", s);
    }
    if (s->L)
        add_latents(list, layer, s);
    add_linear(list, layer, "mix.q_proj.weight", s->H * s->d, s->D);
    add_linear(list, layer, "mix.k_proj.weight", s->KV * s->d, s->D);
    add_linear(list, layer, "mix.v_proj.weight", s->KV * s->d, s->D);
    add_linear(list, layer, "mix.o_proj.weight", s->D, s->H * s->d);
    add_linear(list, layer, "mlp.gate_proj.weight", s->F, s->D);
    add_linear(list, layer, "mlp.up_proj.weight", s->F, s->D);
    add_linear(list, layer, "mlp.down_proj.weight", s->D, s->F);
}

static struct specs list_tensors(const struct shape *s)
{
    struct specs list = {0};
    add_linear(&list, -1, "embed_tokens.weight", s->V, s->D);
    for (int layer = 0; layer < s->n_layers; layer++)
        add_layer(&list, layer, s);
    add_norm(&list, -1, "norm.weight", s);
    return list;
}

/* ---- model.safetensors ---- */

static void print_header(struct bytes *out, const struct specs *list)
{
    bytes_char(out, '{');
    for (int t = 0; t < list->n; t++) {
        const struct spec *s = &list->items[t];
        bytes_format(out, "%s\"%s\":{\"dtype\":\"BF16\",\"shape\":[%lld", t ? "," : "", s->name,
                     (long long)s->shape[0]);
        for (int i = 1; i < 3 && s->shape[i]; i++)
            bytes_format(out, ",%lld", (long long)s->shape[i]);
        bytes_format(out, "],\"data_offsets\":[%lld,%lld]}", (long long)(2 * s->offset),
                     (long long)(2 * (s->offset + s->n_values)));
    }
    bytes_char(out, '}');
    while (!out->failed && out->n % 8)
        bytes_char(out, ' ');
}

enum { PART_VALUES = 1 << 20 }; /* what a thread makes and writes at a time */

struct writer {
    const struct specs *list;
    uint16_t *parts; /* [n_threads, PART_VALUES] */
    int fd;
    int64_t begin; /* of the data, bytes */
    bool failed;   /* set by any thread, never cleared */
};

/* The finaliser of MurmurHash3: every output bit depends on every input bit. */
static inline uint32_t hash32(uint32_t x)
{
    x = (x ^ x >> 16) * 0x85ebca6bu;
    x = (x ^ x >> 13) * 0xc2b2ae35u;
    return x ^ x >> 16;
}

static void fill(uint16_t *out, const struct spec *s, int tensor, int64_t first, int n)
{
    const uint32_t key = hash32((uint32_t)tensor + 156) + (uint32_t)first;
    for (int i = 0; i < n; i++) {
        const float uniform = (float)(int32_t)hash32(key + (uint32_t)i) * 0x1p-31f;
        const float value = s->mean + s->spread * uniform;
        uint32_t bits;
        memcpy(&bits, &value, sizeof(bits));
        out[i] = (uint16_t)((bits + 0x8000u) >> 16);
    }
}

static bool write_at(int fd, const void *data, size_t n, int64_t at)
{
    for (const char *p = data; n;) {
        const ssize_t done = pwrite(fd, p, n, at);
        if (done <= 0)
            return false;
        p += done;
        at += done;
        n -= (size_t)done;
    }
    return true;
}

/* One tensor's values from part to part. A pool's item is a part of the whole file; parts do not
 * cross tensors, so item numbers count those of the tensors before it too. */
static void write_part(void *context, int item, int thread)
{
    struct writer *w = context;
    int tensor = 0;
    int64_t part = item;
    for (int64_t n; part >= (n = (w->list->items[tensor].n_values + PART_VALUES - 1) / PART_VALUES);
         tensor++)
        part -= n;
    const struct spec *s = &w->list->items[tensor];
    const int64_t first = part * PART_VALUES, left = s->n_values - first;
    const int n = left < PART_VALUES ? (int)left : PART_VALUES;
    uint16_t *out = w->parts + (size_t)thread * PART_VALUES;
    fill(out, s, tensor, first, n);
    if (!write_at(w->fd, out, 2 * (size_t)n, w->begin + 2 * (s->offset + first)))
        __atomic_store_n(&w->failed, true, __ATOMIC_RELAXED);
}

static bool write_values(struct writer *w)
{
    struct pool *pool = NULL;
    struct error err;
    const int n_threads = cores_available();
    int n_parts = 0;
    for (int t = 0; t < w->list->n; t++)
        n_parts += (int)((w->list->items[t].n_values + PART_VALUES - 1) / PART_VALUES);
    w->parts = malloc((size_t)n_threads * PART_VALUES * sizeof(*w->parts));
    const bool ok = w->parts && !pool_open(&pool, n_threads, &err);
    if (ok)
        pool_run(pool, n_parts, write_part, w);
    pool_close(pool);
    free(w->parts);
    return ok && !w->failed;
}

static bool write_weights(const struct shape *s, int fd)
{
    struct specs list = list_tensors(s);
    struct bytes header = {0};
    print_header(&header, &list);
    const uint64_t n = header.n; /* little-endian, as every machine this runs on */
    struct writer w = {.list = &list, .fd = fd, .begin = (int64_t)(sizeof(n) + n)};
    const bool ok = !list.failed && !header.failed && write_at(fd, &n, sizeof(n), 0) &&
                    write_at(fd, header.data, header.n, sizeof(n)) && write_values(&w);
    bytes_free(&header);
    free(list.items);
    return ok;
}

/* ---- config.json ---- */

static bool write_config(const struct shape *s, int fd)
{
    struct bytes b = {0};
    bytes_format(&b,
                 "{\"model_type\": \"latte\", \"architectures\": [\"LatteForCausalLM\"],\n"
                 " \"vocab_size\": %d, \"hidden_size\": %d, \"num_hidden_layers\": %d,\n"
                 " \"intermediate_size\": %d, \"num_attention_heads\": %d,\n"
                 " \"num_key_value_heads\": %d, \"head_dim\": %d, \"norm\": \"rmsnorm\",\n"
                 " \"mlp\": \"gated\", \"tie_word_embeddings\": true, \"eos_token_id\": 0,\n",
                 s->V, s->D, s->n_layers, s->F, s->H, s->KV, s->d);
    if (s->kind == KIND_TRANSFORMER)
        bytes_format(&b,
                     " \"layer_type\": \"full_attention\", \"position_embedding\": \"rope\",\n"
                     " \"max_position_embeddings\": %d}\n",
                     s->context);
    else
        bytes_format(
            &b,
            "%s \"layer_type\": \"macchiato\", \"num_latents\": %d,\n"
            " \"sliding_window\": %d, \"latent_input\": \"rglru\", \"rglru_blocks\": %d}\n",
            s->kind == KIND_GEMMA
                ? " \"post_norms\": true, \"norm_offset\": 1.0, \"embedding_scale\": 48,\n"
                  " \"query_pre_attn_scalar\": 256, \"attn_logit_softcapping\": 50,\n"
                  " \"final_logit_softcapping\": 30, \"hidden_act\": \"gelu_tanh\",\n"
                  " \"position_embedding\": \"rope\",\n"
                : "",
            s->L, s->w, s->B);
    const bool ok = !b.failed && write_at(fd, b.data, b.n, 0);
    bytes_free(&b);
    return ok;
}

/* ---- tokenizer.json ---- */

/* Bytes in the alphabet of byte-level tokenizers: those that print stand for themselves, the
 * others for U+0100 onwards in their order. */
static void print_byte(struct bytes *b, int byte, int *n_others)
{
    const bool prints = (byte > 32 && byte < 127) || (byte > 160 && byte != 173);
    const int code = prints ? byte : 256 + (*n_others)++;
    char text[3] = {(char)code};
    if (code > 127) {
        text[0] = (char)(0xc0 | code >> 6);
        text[1] = (char)(0x80 | (code & 63));
    }
    bytes_json_string(b, text, strlen(text));
}

/* The words have no merges: no text becomes them, but drawn tokens are text. */
static bool write_tokenizer(const struct shape *s, int fd)
{
    struct bytes b = {0};
    int n_others = 0;
    bytes_text(&b, "{\"version\":\"1.0\",\"added_tokens\":[],\"normalizer\":null,"
                   "\"pre_tokenizer\":{\"type\":\"ByteLevel\",\"add_prefix_space\":false,"
                   "\"trim_offsets\":true,\"use_regex\":true},\"post_processor\":null,"
                   "\"decoder\":{\"type\":\"ByteLevel\",\"add_prefix_space\":true,"
                   "\"trim_offsets\":true,\"use_regex\":true},\"model\":{\"type\":\"BPE\","
                   "\"dropout\":null,\"unk_token\":null,\"continuing_subword_prefix\":null,"
                   "\"end_of_word_suffix\":null,\"fuse_unk\":false,\"byte_fallback\":false,"
                   "\"ignore_merges\":false,\"vocab\":{");
    for (int t = 0; t < s->V; t++) {
        if (t)
            bytes_char(&b, ',');
        if (t < 256)
            print_byte(&b, t, &n_others);
        else
            bytes_format(&b, "\"\u0120w%d\"", t);
        bytes_format(&b, ":%d", t);
    }
    bytes_text(&b, "},\"merges\":[]}}");
    const bool ok = !b.failed && write_at(fd, b.data, b.n, 0);
    bytes_free(&b);
    return ok;
}

/* ---- the directory ---- */

static bool write_file(const struct shape *s, const char *dir, const char *name,
                       bool (*write)(const struct shape *, int))
{
    char path[4096];
    snprintf(path, sizeof(path), "%s/%s", dir, name);
    const int fd = open(path, O_WRONLY | O_CREAT | O_EXCL, 0644);
    if (fd < 0) {
        perror(path);
        return false;
    }
    bool ok = write(s, fd);
    ok = close(fd) == 0 && ok;
    if (!ok)
        perror(path);
    return ok;
}

static bool find_shape(struct shape *out, const char *name, int context)
{
    for (int i = 0; i < N_SHAPES; i++)
        if (!strcmp(name, shapes[i].name)) {
            *out = shapes[i];
            if (context)
                out->context = context;
            return true;
        }
    fprintf(stderr, "no shape is called %s: there are %s\n", name, random_model_names());
    return false;
}

int random_model_write(const char *name, int context, char *dir, size_t n)
{
    struct shape s;
    if (!find_shape(&s, name, context))
        return -1;
    const char *tmp = getenv("TMPDIR");
    if ((size_t)snprintf(dir, n, "%s/latte-bench-XXXXXX", tmp && *tmp ? tmp : "/tmp") >= n ||
        !mkdtemp(dir)) {
        perror("a temporary directory");
        return -1;
    }
    if (write_file(&s, dir, "config.json", write_config) &&
        write_file(&s, dir, "tokenizer.json", write_tokenizer) &&
        write_file(&s, dir, "model.safetensors", write_weights))
        return 0;
    random_model_remove(dir);
    return -1;
}

void random_model_remove(const char *dir)
{
    const char *const names[] = {"config.json", "tokenizer.json", "model.safetensors"};
    char path[4096];
    for (size_t i = 0; i < sizeof(names) / sizeof(*names); i++) {
        snprintf(path, sizeof(path), "%s/%s", dir, names[i]);
        unlink(path);
    }
    rmdir(dir);
}
