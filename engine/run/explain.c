/* explain.c - where the model looks: p(l|t) by layer and head, P(eq 11), as CSV. See run.h.
 *
 * The model runs on the CPU backend with one op of its table exchanged: `latent` is called with the
 * latent queries of a layer, which are counted before the backend's own op does its work. So
 * nothing is asked of those who serve. */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/backend.h"
#include "engine/base/file.h"
#include "engine/cores.h"
#include "engine/host_memory.h"
#include "engine/model.h"
#include "engine/run/run.h"
#include "engine/run/text.h"
#include "weights/checkpoint.h"

enum { STEP_ROWS = 128 };

/* Sums over tokens. G = M + 1 rows a head: first p(0|t) of the window, 0 where there is none. */
struct probe {
    struct backend_ops ops;          /* the backend's, with the exchanged one */
    const struct backend_ops *inner; /* the backend's own */
    int n_rows;                      /* of the step under way */
    int *layers, n_layers;           /* those with latents; [n_layers], owned */
    int next;                        /* which of them is called next */
    int n_heads, n_gates;            /* H, G */
    bool *has_window;                /* [n_layers], owned */
    double *p, *entropy;             /* [n_layers, H, G], [n_layers, H], owned */
    double n_tokens;
};

static struct probe *current; /* an op is given no place for one */

/* ---- Counting ---- */

/* p = softmax(g[n]), its entropy in nats returned. */
static double softmax(double *p, const float *g, int n)
{
    double most = -INFINITY, sum = 0, entropy = 0;
    for (int i = 0; i < n; i++)
        most = fmax(most, g[i]);
    for (int i = 0; i < n; i++)
        sum += p[i] = exp(g[i] - most);
    for (int i = 0; i < n; i++) {
        p[i] /= sum;
        entropy -= p[i] > 0 ? p[i] * log(p[i]) : 0;
    }
    return entropy;
}

static void count_rows(struct probe *probe, const float *g)
{
    const int G = probe->n_gates, H = probe->n_heads;
    const int first = probe->has_window[probe->next] ? 0 : 1, n = G - first;
    double p[G];
    for (int row = 0; row < probe->n_rows; row++)
        for (int h = 0; h < H; h++) {
            const int head = probe->next * H + h;
            const size_t at = (size_t)row * (size_t)H + (size_t)h;
            probe->entropy[head] += softmax(p, g + at * (size_t)n, n);
            for (int k = 0; k < n; k++)
                probe->p[(size_t)head * (size_t)G + (size_t)(first + k)] += p[k];
        }
    probe->next = (probe->next + 1) % probe->n_layers;
}

static void latent_probed(struct backend *b, struct buffer *out, struct buffer *p0,
                          const struct buffer *theta, const struct buffer *g,
                          const struct buffer *v, const struct slab *m, const struct slab *alpha,
                          const struct slab *s, const struct latent_shape *shape)
{
    count_rows(current, g->data);
    current->inner->latent(b, out, p0, theta, g, v, m, alpha, s, shape);
}

/* ---- The model ---- */

static enum status probe_open(struct probe *probe, const struct model_config *c, struct error *err)
{
    probe->layers = calloc((size_t)c->n_layers, sizeof(*probe->layers));
    probe->has_window = calloc((size_t)c->n_layers, sizeof(*probe->has_window));
    if (!probe->layers || !probe->has_window)
        return fail(err, STATUS_NOMEM, "out of memory for %d layers", c->n_layers);
    for (int i = 0; i < c->n_layers; i++)
        if (c->n_latents > 0 && c->layers[i].type != LAYER_FULL_ATTENTION) {
            probe->has_window[probe->n_layers] = config_ring_rows(c, i) > 0;
            probe->layers[probe->n_layers++] = i;
        }
    if (probe->n_layers == 0)
        return fail(err, STATUS_UNSUPPORTED, "--explain: the model has no layer with latents");
    probe->n_heads = c->n_heads;
    probe->n_gates = config_latents_per_head(c) + 1;
    const size_t n_heads = (size_t)probe->n_layers * (size_t)c->n_heads;
    probe->entropy = calloc(n_heads, sizeof(*probe->entropy));
    probe->p = calloc(n_heads * (size_t)probe->n_gates, sizeof(*probe->p));
    return probe->entropy && probe->p
               ? STATUS_OK
               : fail(err, STATUS_NOMEM, "out of memory for %zu heads", n_heads);
}

static void probe_close(struct probe *probe)
{
    free(probe->layers);
    free(probe->has_window);
    free(probe->entropy);
    free(probe->p);
}

static void exchange_op(struct probe *probe, struct backend *b)
{
    probe->inner = b->ops;
    probe->ops = *b->ops;
    probe->ops.latent = latent_probed;
    probe->ops.layer = NULL; /* a fused layer would not call it */
    b->ops = &probe->ops;
    current = probe;
}

static enum status open_model(struct model **out, struct probe *probe, const struct run *r,
                              const struct checkpoint *c, struct error *err)
{
    const struct model_options mo = {
        .n_slots = 1,
        .max_rows = STEP_ROWS,
        .max_logit_rows = 1,
        .weight_dtype = c->embed_tokens->dtype == DTYPE_BF16 ? DTYPE_BF16 : DTYPE_F32,
        .window_dtype = DTYPE_F32};
    struct backend_options bo = {.n_threads = r->options.threads ? (int)r->options.threads
                                                                 : cores_available()};
    struct backend *backend;
    model_backend_options(&c->config, &mo, &bo);
    enum status st = backend_cpu_open(&backend, &bo, err);
    if (st)
        return st;
    exchange_op(probe, backend);
    return model_open(out, c, backend, &mo, NULL, NULL, err);
}

static enum status feed(struct run *r, struct model *m, struct probe *probe,
                        const struct token_list *tokens, struct error *err)
{
    enum status st = STATUS_OK;
    for (size_t i = 0; !st && i < tokens->n; i += STEP_ROWS) {
        const size_t rest = tokens->n - i;
        const struct model_seq seq = {.n_rows = rest < STEP_ROWS ? (int)rest : STEP_ROWS,
                                      .logits = LOGITS_NONE};
        const float *logits;
        probe->n_rows = seq.n_rows;
        st = model_step(m, tokens->ids + i, &seq, 1, &logits, err);
        run_show_bar(r, "reading", (int)(100 * (i + (size_t)seq.n_rows) / tokens->n));
    }
    run_clear_bar(r);
    probe->n_tokens = (double)tokens->n;
    return st;
}

/* ---- The report ---- */

static enum status write_csv(const struct probe *probe, const char *path, struct error *err)
{
    const int G = probe->n_gates;
    FILE *f = fopen(path, "w");
    if (!f)
        return fail(err, STATUS_IO, "%s: %s", path, strerror(errno));
    fputs("layer,head,latent,p,head_entropy\n", f);
    for (int i = 0; i < probe->n_layers; i++)
        for (int h = 0; h < probe->n_heads; h++) {
            const int head = i * probe->n_heads + h;
            for (int g = probe->has_window[i] ? 0 : 1; g < G; g++)
                fprintf(f, "%d,%d,%d,%.9g,%.9g\n", probe->layers[i], h, g,
                        probe->p[(size_t)head * (size_t)G + (size_t)g] / probe->n_tokens,
                        probe->entropy[head] / probe->n_tokens);
        }
    const bool failed = ferror(f);
    if (fclose(f) || failed)
        return fail(err, STATUS_IO, "%s cannot be written: %s", path, strerror(errno));
    return STATUS_OK;
}

static enum status read_tokens(const struct run *r, struct token_list *out, struct error *err)
{
    struct bytes text = {0};
    struct tokenizer *tokenizer = NULL;
    char path[FILE_PATH_BYTES];
    enum status st = r->options.prompt ? text_take(&text, r->options.prompt, err)
                                       : text_read(&text, r->options.prompt_file, err);
    if (!st)
        st = file_path(path, r->options.model_dir, "tokenizer.json", err);
    if (!st)
        st = tokenizer_open(&tokenizer, path, err);
    if (!st)
        st = tokenizer_encode(tokenizer, text.data ? text.data : "", text.n, TOKENIZER_ADD_SPECIAL,
                              out, err);
    if (!st && out->n == 0)
        st = fail(err, STATUS_INVALID, "--explain: the prompt has no tokens");
    tokenizer_close(tokenizer);
    bytes_free(&text);
    return st;
}

static enum status check_tokens(const struct checkpoint *c, const struct token_list *tokens,
                                const struct model *m, struct error *err)
{
    const int64_t most = model_max_position(m);
    for (size_t i = 0; i < tokens->n; i++)
        if (tokens->ids[i] >= c->config.vocab_size)
            return fail(err, STATUS_INVALID, "token %d of the tokenizer: the model has %d",
                        tokens->ids[i], c->config.vocab_size);
    if (most && tokens->n > (size_t)most)
        return fail(err, STATUS_TOO_LARGE,
                    "the prompt has %zu tokens, the model reads %lld at most", tokens->n,
                    (long long)most);
    return STATUS_OK;
}

enum status explain(struct run *r, struct error *err)
{
    struct probe probe = {0};
    struct token_list tokens = {0};
    struct checkpoint *c = NULL;
    struct model *m = NULL;
    run_begin_bar(r);
    enum status st = read_tokens(r, &tokens, err);
    if (!st)
        st = checkpoint_open(&c, r->options.model_dir, NULL, NULL, err);
    if (!st)
        st = probe_open(&probe, &c->config, err);
    if (!st)
        st = open_model(&m, &probe, r, c, err);
    if (!st)
        st = check_tokens(c, &tokens, m, err);
    if (!st)
        st = feed(r, m, &probe, &tokens, err);
    if (!st)
        st = write_csv(&probe, r->options.explain_file, err);
    if (!st && !r->options.quiet)
        fprintf(stderr, "%s: %d layers of %d heads, over %zu tokens\n", r->options.explain_file,
                probe.n_layers, probe.n_heads, tokens.n);
    model_close(m);
    checkpoint_close(c);
    probe_close(&probe);
    token_list_free(&tokens);
    return st;
}
