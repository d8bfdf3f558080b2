/* presets.c - see presets.h */
#include "server/presets.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct preset {
    struct preset_info about;
    struct image *image;
};

struct presets {
    pthread_mutex_t lock; /* guards the rest */
    struct preset *items; /* [n], oldest first, of max */
    int n, max;
};

enum status presets_open(struct presets **out, int max_presets, struct error *err)
{
    CHECK(max_presets > 0);
    struct presets *p = calloc(1, sizeof(*p));
    struct preset *items = calloc((size_t)max_presets, sizeof(*items));
    if (!p || !items) {
        free(p);
        free(items);
        return fail(err, STATUS_NOMEM, "out of memory for %d presets", max_presets);
    }
    p->items = items;
    p->max = max_presets;
    pthread_mutex_init(&p->lock, NULL);
    *out = p;
    return STATUS_OK;
}

void presets_close(struct presets *p)
{
    if (!p)
        return;
    for (int i = 0; i < p->n; i++)
        image_unpin(p->items[i].image);
    pthread_mutex_destroy(&p->lock);
    free(p->items);
    free(p);
}

static enum status check_name(const char *name, struct error *err)
{
    static const char allowed[] =
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-";
    size_t n = strlen(name);
    if (n && n < PRESET_NAME_BYTES && !name[strspn(name, allowed)])
        return STATUS_OK;
    return fail_field(err, STATUS_INVALID, "name",
                      "The name of a preset: expected 1 to %d letters, digits, '.', '_' and '-'.",
                      PRESET_NAME_BYTES - 1);
}

/* With the lock held, as the next few. */
static struct preset *find(const struct presets *p, const char *name)
{
    for (int i = 0; i < p->n; i++)
        if (!strcmp(p->items[i].about.name, name))
            return &p->items[i];
    return NULL;
}

static enum status not_found(const char *name, struct error *err)
{
    return fail_field(err, STATUS_NOT_FOUND, "preset", "There is no preset '%.64s'.", name);
}

static enum status fixed(const char *name, struct error *err)
{
    return fail_field(err, STATUS_CONFLICT, "preset",
                      "The preset '%s' was given at the server's start and does not change.", name);
}

static enum status make_room(const struct presets *p, const char *name, bool is_fixed,
                             struct error *err)
{
    const struct preset *old = find(p, name);
    if (old && is_fixed)
        return fail_field(err, STATUS_INVALID, "preset", "the preset '%s' is given twice", name);
    if (old && old->about.is_fixed)
        return fixed(name, err);
    if (!old && p->n == p->max)
        return fail_field(err, STATUS_BUSY, "preset",
                          "This server holds %d presets, as many as --max-presets permits; delete "
                          "one.",
                          p->n);
    return STATUS_OK;
}

enum status presets_check(struct presets *p, const char *name, bool is_fixed, struct error *err)
{
    enum status st = check_name(name, err);
    if (st)
        return st;
    pthread_mutex_lock(&p->lock);
    st = make_room(p, name, is_fixed, err);
    pthread_mutex_unlock(&p->lock);
    return st;
}

/* Without the lock. about: all but the position. */
static enum status put(struct presets *p, struct preset_info *about, struct image *image,
                       struct error *err)
{
    struct image *before = NULL;
    pthread_mutex_lock(&p->lock);
    enum status st = make_room(p, about->name, about->is_fixed, err);
    if (!st) {
        struct preset *old = find(p, about->name), *item = old ? old : &p->items[p->n++];
        before = item->image;
        image_pin(image);
        about->position = image_length(image);
        *item = (struct preset){.image = image, .about = *about};
    }
    pthread_mutex_unlock(&p->lock);
    image_unpin(before);
    return st;
}

enum status presets_put(struct presets *p, const char *name, struct image *image, bool is_fixed,
                        struct preset_info *out, struct error *err)
{
    *out = (struct preset_info){.created = (int64_t)time(NULL), .is_fixed = is_fixed};
    snprintf(out->name, sizeof(out->name), "%s", name);
    enum status st = check_name(name, err); /* of the whole, which may be longer */
    return st ? st : put(p, out, image, err);
}

enum status presets_restore(struct presets *p, const char *name, struct image *image,
                            int64_t created, struct error *err)
{
    struct preset_info about = {.created = created};
    snprintf(about.name, sizeof(about.name), "%s", name);
    return put(p, &about, image, err);
}

enum status presets_find(struct presets *p, const char *name, struct image **image,
                         struct preset_info *info, struct error *err)
{
    pthread_mutex_lock(&p->lock);
    const struct preset *found = find(p, name);
    enum status st = found ? STATUS_OK : not_found(name, err);
    if (found && image) {
        image_keep(found->image);
        *image = found->image;
    }
    if (found && info)
        *info = found->about;
    pthread_mutex_unlock(&p->lock);
    return st;
}

enum status presets_delete(struct presets *p, const char *name, struct error *err)
{
    struct image *image = NULL;
    pthread_mutex_lock(&p->lock);
    struct preset *found = find(p, name);
    enum status st = !found                  ? not_found(name, err)
                     : found->about.is_fixed ? fixed(name, err)
                                             : STATUS_OK;
    if (!st) {
        image = found->image;
        memmove(found, found + 1, (size_t)(&p->items[--p->n] - found) * sizeof(*found));
    }
    if (!st)
        p->items[p->n] = (struct preset){0};
    pthread_mutex_unlock(&p->lock);
    image_unpin(image);
    return st;
}

enum status presets_list(struct presets *p, struct preset_info **out, int *n, struct error *err)
{
    pthread_mutex_lock(&p->lock);
    struct preset_info *list = malloc(((size_t)p->n + 1) * sizeof(*list));
    for (int i = 0; list && i < p->n; i++)
        list[i] = p->items[i].about;
    if (list)
        *n = p->n;
    pthread_mutex_unlock(&p->lock);
    if (!list)
        return fail(err, STATUS_NOMEM, "out of memory for the list of presets");
    *out = list;
    return STATUS_OK;
}
