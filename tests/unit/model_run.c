/* model_run.c - see model_run.h */
#include "tests/unit/unit.h"

#include "tests/unit/model_run.h"

#include <dirent.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MODELS "tests/golden/models"

const char *const *run_backends(void)
{
    static const char *const all[] = {"ref", "cpu", "cuda", NULL};
    static const char *const hosts[] = {"ref", "cpu", NULL};
    return backend_cuda_count() > 0 ? all : hosts;
}

bool run_emulated(void)
{
    const struct model_config config = {.vocab_size = 8,
                                        .hidden_size = 8,
                                        .intermediate_size = 8,
                                        .n_heads = 1,
                                        .n_kv_heads = 1,
                                        .head_dim = 8};
    const struct backend_options options = {.n_threads = 1,
                                            .max_rows = 1,
                                            .max_seqs = 1,
                                            .max_dim = 8,
                                            .config = &config,
                                            .n_slots = 1,
                                            .max_logit_rows = 1};
    struct backend_memory memory;
    struct error err;
    return backend_cuda_count() > 0 && !backend_cuda_probe(&options, &memory, &err) &&
           strstr(memory.device, "emulated");
}

bool run_quick(void)
{
    const char *quick = getenv("LATTE_TEST_QUICK");
    return (quick && !strcmp(quick, "1")) || run_least() || run_emulated();
}

bool run_least(void)
{
    const char *quick = getenv("LATTE_TEST_QUICK");
    return quick && !strcmp(quick, "2");
}

bool run_skips(const char *backend, const char *dir)
{
    static const char *const kept[] = {
        "latte-conv-plus",  "macchiato",    "gemma-macchiato", "mixed-conv",
        "transformer-plus", "vapor-window", "latte",           NULL};
    if (strcmp(backend, "cuda") != 0 || !run_quick())
        return false;
    const char *name = strrchr(dir, '/') ? strrchr(dir, '/') + 1 : dir;
    for (int i = 0; kept[i]; i++)
        if (!strcmp(name, kept[i]))
            return false;
    return true;
}

enum status run_try_backend(struct backend **out, const char *name,
                            const struct backend_options *options, struct error *err)
{
    if (!strcmp(name, "ref"))
        return backend_ref_open(out, options, err);
    if (!strcmp(name, "cuda"))
        return backend_cuda_open(out, options, err);
    return backend_cpu_open(out, options, err);
}

void run_open_as(struct run *r, const char *dir, const struct run_options *options,
                 const struct run_form *form)
{
    struct error err;
    struct checkpoint *c = NULL;
    struct backend *backend = NULL;
    const struct model_options mo = {.n_slots = options->n_slots,
                                     .max_rows = form->max_rows ? form->max_rows : RUN_MAX_ROWS,
                                     .max_logit_rows = form->max_logit_rows,
                                     .weight_dtype = options->dtype,
                                     .window_dtype = form->window_dtype};
    struct backend_options bo = {.n_threads = options->n_threads,
                                 .device = form->device,
                                 .deterministic = form->deterministic,
                                 .composed = form->composed};
    enum status st = checkpoint_open(&c, dir, NULL, NULL, &err);
    if (!st) {
        model_backend_options(&c->config, &mo, &bo);
        st = run_try_backend(&backend, options->backend, &bo, &err);
    }
    if (!st)
        st = model_open(&r->model, c, backend, &mo, NULL, NULL, &err);
    if (st)
        fail_msg("%s: %s", dir, err.text);
    r->vocab_size = c->config.vocab_size;
    snprintf(r->label, sizeof(r->label), "%s (%s, %s, window %s, %d threads%s%s)", dir,
             options->backend, dtype_name(options->dtype), dtype_name(form->window_dtype),
             options->n_threads, form->deterministic ? ", deterministic" : "",
             form->composed ? ", composed" : "");
    checkpoint_close(c);
}

void run_open(struct run *r, const char *dir, const struct run_options *options)
{
    run_open_as(r, dir, options, &(struct run_form){.window_dtype = DTYPE_F32});
}

void run_close(struct run *r)
{
    model_close(r->model);
}

static int compare_dirs(const void *a, const void *b)
{
    return strcmp(a, b);
}

void run_list_models(struct run_models *out)
{
    out->n = 0;
    DIR *dir = opendir(MODELS);
    if (!dir)
        fail_msg("%s: not found; tests run in the root of the repository", MODELS);
    for (struct dirent *e; (e = readdir(dir)) && out->n < RUN_MAX_MODELS;) {
        char config[300];
        snprintf(config, sizeof(config), "%s/%s/config.json", MODELS, e->d_name);
        if (access(config, R_OK) == 0)
            snprintf(out->dirs[out->n++], sizeof(out->dirs[0]), "%s/%.100s", MODELS, e->d_name);
    }
    closedir(dir);
    qsort(out->dirs, (size_t)out->n, sizeof(out->dirs[0]), compare_dirs);
}

void run_feed(struct run *r, int slot, const int32_t *tokens, int n, enum logits_wanted wanted,
              float *out)
{
    const struct model_seq seq = {slot, n, wanted};
    const float *logits = NULL;
    struct error err;
    if (model_step(r->model, tokens, &seq, 1, &logits, &err))
        fail_msg("%s: %s", r->label, err.text);
    size_t n_rows = wanted == LOGITS_ALL ? (size_t)n : wanted == LOGITS_LAST;
    if (n_rows && out)
        memcpy(out, logits, n_rows * (size_t)r->vocab_size * sizeof(float));
}

double run_difference(const float *a, const float *b, size_t n)
{
    double worst = 0;
    for (size_t i = 0; i < n; i++) {
        double difference = fabs((double)a[i] - b[i]);
        if (!isfinite(difference))
            return INFINITY;
        worst = fmax(worst, difference);
    }
    return worst;
}

float *run_state(struct run *r, int slot, size_t *n)
{
    struct error err;
    *n = 0;
    for (int i = 0; i < model_n_state_tensors(r->model); i++)
        *n += (size_t)model_state_tensor(r->model, i)->n_values;
    float *state = calloc(*n + 1, sizeof(*state)), *at = state;
    assert_non_null(state);
    for (int i = 0; i < model_n_state_tensors(r->model); i++) {
        if (model_state_read(r->model, slot, i, at, &err))
            fail_msg("%s: %s", r->label, err.text);
        at += model_state_tensor(r->model, i)->n_values;
    }
    return state;
}

static double excess(double a, double b, double tolerance)
{
    if (a == b)
        return 0;
    double difference = fabs(a - b);
    return isfinite(difference) ? difference / (tolerance * (1 + fabs(b))) : INFINITY;
}

double run_state_excess(struct run *r, const float *a, const float *b, double tolerance)
{
    double worst = 0;
    const float *m_a = NULL, *m_b = NULL; /* maxima of the layer at hand, which come first */
    for (int i = 0; i < model_n_state_tensors(r->model); i++) {
        const struct state_tensor *t = model_state_tensor(r->model, i);
        int64_t width = t->n_dims == 3 ? t->shape[2] : 1;
        bool sums = strstr(t->name, "latent_alpha") || strstr(t->name, "latent_s");
        if (strstr(t->name, "latent_m"))
            m_a = a, m_b = b;
        for (int64_t j = 0; j < t->n_values; j++) {
            double scale = sums ? exp((double)m_a[j / width] - m_b[j / width]) : 1;
            worst = fmax(worst, excess(a[j] * scale, b[j], tolerance));
        }
        a += t->n_values;
        b += t->n_values;
    }
    return worst;
}
