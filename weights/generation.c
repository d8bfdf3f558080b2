/* generation.c - see generation.h */
#include "weights/generation.h"

#include <math.h>

#include "weights/config_parts.h"

static enum status read_default(double *out, const cJSON *root, const char *key, double min,
                                double max, struct error *err)
{
    const cJSON *item = tree_find(root, key);
    return item ? config_number(out, key, item, min, max, err) : STATUS_OK;
}

static enum status read_default_int(int32_t *out, const cJSON *root, const char *key, int64_t min,
                                    struct error *err)
{
    const cJSON *item = tree_find(root, key);
    int64_t value;
    if (!item)
        return STATUS_OK;
    if (!tree_whole(item, min, INT32_MAX, &value))
        return config_wrong(err, key,
                            min ? "a whole number above 0" : "a whole number of 0 or more", item);
    *out = (int32_t)value;
    return STATUS_OK;
}

/* do_sample false means greedy, whatever the temperature says. */
static enum status read_do_sample(struct generation_defaults *g, const cJSON *root,
                                  struct error *err)
{
    const cJSON *item = tree_find(root, "do_sample");
    if (item && !cJSON_IsBool(item))
        return config_wrong(err, "do_sample", "true or false", item);
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
        st = read_default(&g->typical_p, root, "typical_p", 1e-6, 1, err); /* 0 keeps no token */
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
    enum status st = tree_read(&root, path, CONFIG_MAX_BYTES, CONFIG_MAX_DEPTH, err);
    if (st && st != STATUS_NOT_FOUND)
        return st;
    if (!st) {
        st = read_defaults(&g, root, err);
        if (!st)
            st = config_read_eos(config, root, err);
        cJSON_Delete(root);
        if (st) {
            fail_context(err, "%s", path);
            return st;
        }
    }
    *out = g;
    return STATUS_OK;
}
