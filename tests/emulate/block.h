/* block.h - what the parts of the emulator ask of each other: emulate.cc runs the blocks of one
 * kernel, runtime.cc queues work on streams.
 *
 * Threads: run() one at a time, under the lock of runtime.cc.
 */
#ifndef LATTE_TESTS_EMULATE_BLOCK_H
#define LATTE_TESTS_EMULATE_BLOCK_H

#include <functional>
#include <vector>

#include <cuda_runtime.h>

namespace emulate
{

enum {
    SHARED_LIMIT = 227 * 1024,
    MAX_CLUSTER = 16, /* blocks */
};

struct kernel_run {
    const void *kernel; /* for messages */
    dim3 grid;
    int cluster; /* blocks of each, along x; 0: launched without */
    int block;
    size_t shared_bytes;
    std::function<void()> body; /* what each thread calls */
    bool early;                 /* may begin before the kernels before it have ended */
};

struct range {
    unsigned char *start;
    size_t n_bytes;
};

/* Run all blocks, now, on this thread. `number` is the launch's, from 1. What is hidden is NaN
 * until a thread of the block calls pdl_wait. */
void run(const kernel_run &launch, long number, const std::vector<range> &hidden);

/* Queue a library's kernel on a stream, or record it where the stream is being captured. */
typedef std::function<cudaError_t()> work;
cudaError_t enqueue(cudaStream_t stream, work todo);

} // namespace emulate

#endif
