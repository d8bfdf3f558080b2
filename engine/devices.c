/* devices.c - see devices.h */
#include "engine/devices.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_LISTED = 400 };

/* ` there are auto, cpu, ref, cuda:0 and cuda:1`, or why there is no GPU. */
static enum status no_device(const char *name, size_t n, int n_cuda, struct error *err)
{
    char gpus[MAX_LISTED] = "";
    size_t used = 0;
    for (int i = 0; i < n_cuda && i < ENGINE_MAX_DEVICES; i++)
        used += (size_t)snprintf(gpus + used, sizeof(gpus) - used, ", cuda:%d", i);
    return fail_field(err, STATUS_INVALID, "device",
                      "device \"%.*s\" does not exist; there are auto, cpu, ref%s%s",
                      n < 40 ? (int)n : 40, name, gpus,
                      n_cuda ? "" : ", and no GPU that this build and machine can use");
}

/* "cuda" or "cuda:N"; -1 for anything else. */
static int cuda_index(const char *name, size_t n)
{
    if (n == 4 && !strncmp(name, "cuda", 4))
        return 0;
    if (n < 6 || n > 9 || strncmp(name, "cuda:", 5))
        return -1;
    for (size_t i = 5; i < n; i++)
        if (!isdigit((unsigned char)name[i]))
            return -1;
    return atoi(name + 5);
}

static bool is_word(const char *name, size_t n, const char *word)
{
    return n == strlen(word) && !strncmp(name, word, n);
}

static enum status parse_one(struct device *out, const char *name, size_t n, int n_cuda,
                             struct error *err)
{
    int index = cuda_index(name, n);
    if (is_word(name, n, "cpu") || (is_word(name, n, "auto") && n_cuda == 0))
        *out = (struct device){DEVICE_CPU, 0};
    else if (is_word(name, n, "ref"))
        *out = (struct device){DEVICE_REF, 0};
    else if (is_word(name, n, "auto"))
        *out = (struct device){DEVICE_CUDA, 0};
    else if (index >= 0 && index < n_cuda)
        *out = (struct device){DEVICE_CUDA, index};
    else
        return no_device(name, n, n_cuda, err);
    return STATUS_OK;
}

static enum status add(struct device_list *list, struct device device, struct error *err)
{
    if (list->n == ENGINE_MAX_DEVICES)
        return fail_field(err, STATUS_INVALID, "device", "at most %d devices can be used",
                          ENGINE_MAX_DEVICES);
    for (int i = 0; i < list->n; i++) {
        if (list->items[i].kind != DEVICE_CUDA || device.kind != DEVICE_CUDA)
            return fail_field(err, STATUS_INVALID, "device",
                              "several devices must all be GPUs, such as cuda:0,cuda:1");
        if (list->items[i].index == device.index)
            return fail_field(err, STATUS_INVALID, "device", "device cuda:%d is named twice",
                              device.index);
    }
    list->items[list->n++] = device;
    return STATUS_OK;
}

enum status devices_parse(struct device_list *out, const char *text, int n_cuda, struct error *err)
{
    struct device_list list = {0};
    for (const char *name = text; name;) {
        size_t n = strcspn(name, ",");
        struct device device = {DEVICE_CPU, 0};
        enum status st = parse_one(&device, name, n, n_cuda, err);
        if (!st)
            st = add(&list, device, err);
        if (st)
            return st;
        name = name[n] ? name + n + 1 : NULL;
    }
    *out = list;
    return STATUS_OK;
}
