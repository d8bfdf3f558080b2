/* fake_gpus.h - two GPUs that are the reference backend under another name. To be included by
 * one file of a test, whose functions then stand in for the CUDA backend's.
 *
 * A step can be held, and made to fail; what a device would hold is reported, not checked.
 *
 * Threads: the fields of a GPU may be changed by any.
 */
#ifndef LATTE_TESTS_FAKE_GPUS_H
#define LATTE_TESTS_FAKE_GPUS_H

#include <stdatomic.h>
#include <stdio.h>
#include <time.h>

#include "engine/backend.h"

enum { FAKE_GPUS = 2, FAKE_PER_SLOT = 1000, FAKE_PER_ROW = 100 };

static struct fake_gpu {
    size_t free_bytes;
    atomic_bool held;   /* steps wait */
    atomic_bool broken; /* and fail */
    atomic_int n_begun; /* sequences that began here */
    atomic_int n_rows;  /* of all steps */
    struct backend_options opened;
    struct backend *backend; /* borrowed while it is open */
    struct backend_ops ops;
    const struct backend_ops *ref;
} fake_gpus[FAKE_GPUS] = {{.free_bytes = 1 << 30}, {.free_bytes = 1 << 30}};

static int n_fake_gpus = FAKE_GPUS;

static struct fake_gpu *fake_of(const struct backend *b)
{
    for (int i = 0; i < FAKE_GPUS; i++)
        if (fake_gpus[i].backend == b)
            return &fake_gpus[i];
    CHECK(false);
    return NULL;
}

static bool fake_begin(struct backend *b, const struct step *step)
{
    struct fake_gpu *gpu = fake_of(b);
    for (int i = 0; i < step->n_seqs; i++)
        gpu->n_begun += step->positions[step->seq_start[i]] == 0;
    gpu->n_rows += step->n_rows;
    return gpu->ref->begin(b, step);
}

static enum status fake_wait(struct backend *b, const struct sampled **results, struct error *err)
{
    struct fake_gpu *gpu = fake_of(b);
    while (gpu->held)
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    if (gpu->broken)
        return fail(err, STATUS_DEVICE, "fake GPU %d is broken", (int)(gpu - fake_gpus));
    return gpu->ref->wait(b, results, err);
}

static void fake_memory(struct backend *b, struct backend_memory *out)
{
    const struct fake_gpu *gpu = fake_of(b);
    *out = (struct backend_memory){.total_bytes = 2 * gpu->free_bytes,
                                   .free_bytes = gpu->free_bytes / 8};
    snprintf(out->device, sizeof(out->device), "Fake (cuda:%d)", (int)(gpu - fake_gpus));
}

enum status backend_cuda_open(struct backend **out, const struct backend_options *options,
                              struct error *err)
{
    struct fake_gpu *gpu = &fake_gpus[options->device];
    CHECK(options->device >= 0 && options->device < n_fake_gpus);
    enum status st = backend_ref_open(out, options, err);
    if (st)
        return st;
    gpu->opened = *options;
    gpu->backend = *out;
    gpu->ref = (*out)->ops;
    gpu->ops = *gpu->ref;
    gpu->ops.name = "cuda";
    gpu->ops.is_device = true;
    gpu->ops.begin = fake_begin;
    gpu->ops.wait = fake_wait;
    gpu->ops.memory = fake_memory;
    (*out)->ops = &gpu->ops;
    return STATUS_OK;
}

int backend_cuda_count(void)
{
    return n_fake_gpus;
}

enum status backend_cuda_probe(const struct backend_options *options, struct backend_memory *out,
                               struct error *err)
{
    (void)err;
    size_t n_slots = (size_t)options->n_slots, n_rows = (size_t)options->max_rows;
    *out =
        (struct backend_memory){.total_bytes = 2 * fake_gpus[options->device].free_bytes,
                                .free_bytes = fake_gpus[options->device].free_bytes,
                                .workspace_bytes = FAKE_PER_SLOT * n_slots + FAKE_PER_ROW * n_rows};
    snprintf(out->device, sizeof(out->device), "Fake (cuda:%d)", options->device);
    return STATUS_OK;
}

#endif
