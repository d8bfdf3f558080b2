/* devices.h - which devices an engine computes on, from what the user wrote.
 *
 * Threads: no shared state. Memory: none. Errors: INVALID, naming the devices that exist.
 */
#ifndef LATTE_ENGINE_DEVICES_H
#define LATTE_ENGINE_DEVICES_H

#include "engine/base/error.h"
#include "engine/engine.h"

enum device_kind { DEVICE_CPU, DEVICE_REF, DEVICE_CUDA };

struct device {
    enum device_kind kind;
    int index; /* of a GPU */
};

struct device_list {
    int n; /* at least 1; several are all GPUs, all different */
    struct device items[ENGINE_MAX_DEVICES];
};

/* Read "auto", "cpu", "ref", "cuda", "cuda:N" or a list of GPUs, on a machine with n_cuda GPUs
 * that can be used. auto is cuda:0 where there is one, else cpu; cuda is cuda:0. */
enum status devices_parse(struct device_list *out, const char *text, int n_cuda, struct error *err);

#endif
