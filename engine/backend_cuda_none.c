/* backend_cuda_none.c - the CUDA backend of a build without CUDA: it says so. */
#include "engine/backend.h"

static enum status no_cuda(struct error *err)
{
    return fail(err, STATUS_UNSUPPORTED,
                "this build has no CUDA: it was made without nvcc, or with CUDA=0");
}

enum status backend_cuda_open(struct backend **out, const struct backend_options *options,
                              struct error *err)
{
    (void)out;
    (void)options;
    return no_cuda(err);
}

int backend_cuda_count(void)
{
    return 0;
}

enum status backend_cuda_probe(const struct backend_options *options, struct backend_memory *out,
                               struct error *err)
{
    (void)options;
    (void)out;
    return no_cuda(err);
}
