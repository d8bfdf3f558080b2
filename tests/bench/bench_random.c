/* bench_random.c - see bench_random.h */
#include "tests/bench/bench_random.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/base/bytes.h"

/* A Latte-RGLRU-SWA++ with a tied head; letters as in weights/README.md. */
struct shape {
    const char *name;
    int V, D, n_layers, F, H, L, w, B;
};

static const struct shape shapes[] = {
    {"156m", 50257, 768, 12, 3072, 8, 128, 128, 8},
    {"12m", 8192, 320, 7, 864, 5, 80, 256, 5},
    {"tiny", 256, 32, 2, 64, 4, 16, 16, 4},
};
enum { N_SHAPES = sizeof(shapes) / sizeof(*shapes) };

const char *random_model_names(void)
{
    return "156m, 12m, tiny";
}

/* A tensor's values are mean + uniform in +-spread. */
struct spec {
    char name[96];
    int64_t shape[3]; /* ends at the first 0 */
    float mean, spread;
};

typedef bool visit_fn(void *context, const struct spec *spec);

static bool visit(visit_fn *f, void *context, int layer, const char *name, int64_t a, int64_t b,
                  int64_t c, float mean, float spread)
{
    struct spec s = {.shape = {a, b, c}, .mean = mean, .spread = spread};
    if (layer < 0)
        snprintf(s.name, sizeof(s.name), "model.%s", name);
    else
        snprintf(s.name, sizeof(s.name), "model.layers.%d.%s", layer, name);
    return f(context, &s);
}

static bool visit_layer(const struct shape *s, int layer, visit_fn *f, void *context)
{
    const int D = s->D, F = s->F, L = s->L, B = s->B, b = s->D / s->B;
    const struct {
        const char *name;
        int64_t shape[3];
        float mean, spread;
    } tensors[] = {
        {"norm1.weight", {D}, 1, 0},
        {"norm2.weight", {D}, 1, 0},
        {"mix.latent_q.weight", {L + s->H, D}, 0, 0.06f},
        {"mix.latent_k.weight", {L, D}, 0, 0.06f},
        {"mix.v_proj.weight", {D, D}, 0, 0.06f},
        {"mix.q_proj.weight", {D, D}, 0, 0.06f},
        {"mix.k_proj.weight", {D, D}, 0, 0.06f},
        {"mix.o_proj.weight", {D, D}, 0, 0.06f},
        {"mix.rglru.input_gate.weight", {B, b, b}, 0, 0.17f},
        {"mix.rglru.recurrence_gate.weight", {B, b, b}, 0, 0.17f},
        {"mix.rglru.lambda", {D}, -3, 1},
        {"mix.rglru_norm.weight", {D}, 1, 0},
        {"mlp.gate_proj.weight", {F, D}, 0, 0.06f},
        {"mlp.up_proj.weight", {F, D}, 0, 0.06f},
        {"mlp.down_proj.weight", {D, F}, 0, 0.03f},
    };
    bool ok = true;
    for (size_t i = 0; ok && i < sizeof(tensors) / sizeof(*tensors); i++)
        ok = visit(f, context, layer, tensors[i].name, tensors[i].shape[0], tensors[i].shape[1],
                   tensors[i].shape[2], tensors[i].mean, tensors[i].spread);
    return ok;
}

static bool visit_all(const struct shape *s, visit_fn *f, void *context)
{
    bool ok = visit(f, context, -1, "embed_tokens.weight", s->V, s->D, 0, 0, 0.06f);
    for (int layer = 0; ok && layer < s->n_layers; layer++)
        ok = visit_layer(s, layer, f, context);
    return ok && visit(f, context, -1, "norm.weight", s->D, 0, 0, 1, 0);
}

static int64_t n_values(const struct spec *s)
{
    int64_t n = 1;
    for (int i = 0; i < 3 && s->shape[i]; i++)
        n *= s->shape[i];
    return n;
}

struct header {
    struct bytes text;
    int64_t offset;
};

static bool add_to_header(void *context, const struct spec *s)
{
    struct header *h = context;
    const int64_t end = h->offset + 2 * n_values(s);
    bytes_format(&h->text, "%s\"%s\":{\"dtype\":\"BF16\",\"shape\":[%lld", h->offset ? "," : "",
                 s->name, (long long)s->shape[0]);
    for (int i = 1; i < 3 && s->shape[i]; i++)
        bytes_format(&h->text, ",%lld", (long long)s->shape[i]);
    bytes_format(&h->text, "],\"data_offsets\":[%lld,%lld]}", (long long)h->offset, (long long)end);
    h->offset = end;
    return true;
}

struct data {
    FILE *file;
    uint64_t random;
};

static uint16_t next_value(struct data *d, const struct spec *s)
{
    d->random = d->random * 6364136223846793005u + 1442695040888963407u;
    float value = s->mean + s->spread * ((float)(d->random >> 40) * 0x1p-23f - 1);
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return (uint16_t)((bits + 0x8000u) >> 16);
}

static bool write_data(void *context, const struct spec *s)
{
    struct data *d = context;
    uint16_t values[4096];
    for (int64_t left = n_values(s), n; left > 0; left -= n) {
        n = left < 4096 ? left : 4096;
        for (int64_t i = 0; i < n; i++)
            values[i] = next_value(d, s);
        if (fwrite(values, sizeof(*values), (size_t)n, d->file) != (size_t)n)
            return false;
    }
    return true;
}

static bool write_weights(const struct shape *s, FILE *file)
{
    struct header h = {0};
    bytes_char(&h.text, '{');
    visit_all(s, add_to_header, &h);
    bytes_char(&h.text, '}');
    while (!h.text.failed && h.text.n % 8)
        bytes_char(&h.text, ' ');
    const uint64_t n = h.text.n; /* little-endian, as every machine this runs on */
    bool ok = !h.text.failed && fwrite(&n, sizeof(n), 1, file) == 1 &&
              fwrite(h.text.data, 1, h.text.n, file) == h.text.n;
    bytes_free(&h.text);
    struct data d = {file, 156};
    return ok && visit_all(s, write_data, &d);
}

static bool write_config(const struct shape *s, FILE *file)
{
    return fprintf(file,
                   "{\"model_type\": \"latte\", \"architectures\": [\"LatteForCausalLM\"],\n"
                   " \"vocab_size\": %d, \"hidden_size\": %d, \"num_hidden_layers\": %d,\n"
                   " \"intermediate_size\": %d, \"num_attention_heads\": %d, \"num_latents\": %d,\n"
                   " \"layer_type\": \"macchiato\", \"sliding_window\": %d,\n"
                   " \"latent_input\": \"rglru\", \"rglru_blocks\": %d, \"norm\": \"rmsnorm\",\n"
                   " \"mlp\": \"gated\", \"tie_word_embeddings\": true, \"eos_token_id\": 0}\n",
                   s->V, s->D, s->n_layers, s->F, s->H, s->L, s->w, s->B) > 0;
}

static bool write_file(const struct shape *s, const char *dir, const char *name,
                       bool (*write)(const struct shape *, FILE *))
{
    char path[4096];
    snprintf(path, sizeof(path), "%s/%s", dir, name);
    FILE *file = fopen(path, "wb");
    if (!file) {
        perror(path);
        return false;
    }
    bool ok = write(s, file);
    ok = fclose(file) == 0 && ok;
    if (!ok)
        fprintf(stderr, "%s: cannot be written\n", path);
    return ok;
}

int random_model_write(const char *name, char *dir, size_t n)
{
    const struct shape *s = NULL;
    for (int i = 0; i < N_SHAPES; i++)
        if (!strcmp(name, shapes[i].name))
            s = &shapes[i];
    if (!s) {
        fprintf(stderr, "no shape is called %s: there are %s\n", name, random_model_names());
        return -1;
    }
    const char *tmp = getenv("TMPDIR");
    if ((size_t)snprintf(dir, n, "%s/latte-bench-XXXXXX", tmp && *tmp ? tmp : "/tmp") >= n ||
        !mkdtemp(dir)) {
        perror("a temporary directory");
        return -1;
    }
    if (write_file(s, dir, "config.json", write_config) &&
        write_file(s, dir, "model.safetensors", write_weights))
        return 0;
    random_model_remove(dir);
    return -1;
}

void random_model_remove(const char *dir)
{
    const char *const names[] = {"config.json", "model.safetensors"};
    char path[4096];
    for (size_t i = 0; i < sizeof(names) / sizeof(*names); i++) {
        snprintf(path, sizeof(path), "%s/%s", dir, names[i]);
        unlink(path);
    }
    rmdir(dir);
}
