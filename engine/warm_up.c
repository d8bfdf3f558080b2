/* warm_up.c - see warm_up.h */
#include "engine/warm_up.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/stepper.h"

enum {
    FIRST_TOKENS = 64, /* of the one prompt that every model is given */
    N_RECORDED = 2,    /* steps of a form until it is recorded (backend_cuda.cu) */
    MAX_SIZES = 128,   /* of steps that decode: far more than devices round to */
};

struct warming {
    struct model *model;
    struct stepper *stepper;
    const struct warm_up *options;
    int most_rows;            /* that a sequence may have, where contexts are limited */
    int32_t *tokens;          /* [max_rows] zeros */
    struct stepper_seq *seqs; /* [most of a step] */
    char *layers;             /* [WARM_UP_LAYERS] */
};

static int least(int a, int b)
{
    return a < b ? a : b;
}

/* n_seqs sequences in slots 0.. of n_rows each, of which all draw. */
static enum status step(struct warming *w, int n_seqs, int n_rows, struct error *err)
{
    const struct sampled *results;
    for (int i = 0; i < n_seqs; i++)
        w->seqs[i] = (struct stepper_seq){.slot = i,
                                          .n_rows = n_rows,
                                          .tokens = w->tokens,
                                          .draws = true,
                                          .draw_position = (uint64_t)n_rows,
                                          .n_top = -1};
    enum status st = stepper_queue(w->stepper, w->seqs, n_seqs, err);
    return st ? st : stepper_collect(w->stepper, &results, err);
}

static enum status admit(struct warming *w, int n_seqs, struct error *err)
{
    struct sampling_params params;
    sampling_params_init(&params);
    enum status st = STATUS_OK;
    for (int i = 0; i < n_seqs && !st; i++)
        st = stepper_admit(w->stepper, i, &params, true, err);
    return st;
}

/* A prompt of n rows. */
static enum status read_prompt(struct warming *w, int n, struct error *err)
{
    enum status st = admit(w, 1, err);
    return st ? st : step(w, 1, n, err);
}

/* Steps in which n sequences decode. */
static enum status decode(struct warming *w, int n, int n_steps, struct error *err)
{
    enum status st = admit(w, n, err);
    for (int i = 0; i < n_steps && !st; i++)
        st = step(w, n, 1, err);
    return st;
}

static bool is_power_of_two(int n)
{
    return (n & (n - 1)) == 0;
}

/* Powers of two come first: what is found for their products the others choose from
 * (library.cu). */
enum { POWERS_OF_TWO, OTHERS, N_PASSES };

static bool is_of_pass(int size, int pass)
{
    return is_power_of_two(size) == (pass == POWERS_OF_TWO);
}

/* Prompts of all sizes up to n rows. */
static enum status read_every_size(struct warming *w, int n, struct error *err)
{
    enum status st = STATUS_OK;
    for (int pass = 0; pass < N_PASSES; pass++)
        for (int size = model_next_rows(w->model, 0); size && size <= n && !st;
             size = model_next_rows(w->model, size))
            if (is_of_pass(size, pass))
                st = read_prompt(w, size, err);
    return st;
}

static void say_layers(struct warming *w, const char *how, int n)
{
    const size_t at = strlen(w->layers);
    snprintf(w->layers + at, WARM_UP_LAYERS - at, at ? ", %s to %d" : "%s to %d rows", how, n);
}

/* How sizes are decoded, in their order. */
struct size_layers {
    int rows;
    const char *how;
};

static void say_all_layers(struct warming *w, const struct size_layers *sizes, int n)
{
    for (int i = 0; i < n; i++)
        if (i + 1 == n || strcmp(sizes[i].how, sizes[i + 1].how))
            say_layers(w, sizes[i].how, sizes[i].rows);
}

/* The last size may be rounded up from n. */
static enum status decode_every_size(struct warming *w, int n, struct error *err)
{
    struct size_layers sizes[MAX_SIZES];
    enum status st = STATUS_OK;
    int n_sizes = 0;
    for (int pass = 0; pass < N_PASSES; pass++) {
        n_sizes = 0;
        for (int size = model_next_rows(w->model, 0), done = 0;
             size && done < n && n_sizes < MAX_SIZES && !st;
             size = model_next_rows(w->model, size), n_sizes++) {
            done = least(size, n);
            if (!is_of_pass(size, pass))
                continue;
            st = decode(w, done, N_RECORDED, err);
            sizes[n_sizes] = (struct size_layers){done, model_layers(w->model)};
        }
    }
    if (!st)
        say_all_layers(w, sizes, n_sizes);
    return st;
}

static enum status run(struct warming *w, struct error *err)
{
    const struct warm_up *o = w->options;
    enum status st = read_prompt(w, least(least(o->chunk, FIRST_TOKENS), w->most_rows), err);
    if (!st)
        st = decode(w, 1, 1, err);
    if (!st && o->every_size)
        st = read_every_size(w, least(o->max_rows, w->most_rows), err);
    if (!st && o->every_size)
        st = decode_every_size(w, least(o->max_batch, least(o->n_slots, o->max_logit_rows)), err);
    return st;
}

enum status warm_up(struct model *model, const struct warm_up *o, char layers[WARM_UP_LAYERS],
                    struct error *err)
{
    const struct stepper_options options = {
        .n_slots = o->n_slots, .max_rows = o->max_rows, .max_logit_rows = o->max_logit_rows};
    const int64_t limit = model_max_position(model);
    const int n_seqs = least(o->n_slots, o->max_rows);
    struct warming w = {.model = model, .options = o, .most_rows = o->max_rows, .layers = layers};
    layers[0] = 0;
    if (limit && limit <= w.most_rows)
        w.most_rows = (int)limit - 1;
    if (limit && limit <= N_RECORDED) /* a session decodes so often */
        return STATUS_OK;
    w.tokens = calloc((size_t)o->max_rows, sizeof(*w.tokens));
    w.seqs = calloc((size_t)n_seqs, sizeof(*w.seqs));
    enum status st = STATUS_OK;
    if (!w.tokens || !w.seqs)
        st = fail(err, STATUS_NOMEM, "steps of %d rows to begin with: out of memory", o->max_rows);
    if (!st)
        st = stepper_open(&w.stepper, model, &options, err);
    if (!st)
        st = run(&w, err);
    stepper_close(w.stepper);
    for (int slot = 0; slot < n_seqs && !st; slot++)
        model_reset(model, slot);
    free(w.tokens);
    free(w.seqs);
    return st;
}
