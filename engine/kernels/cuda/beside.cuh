/* beside.cuh - a second stream for what neither needs a layer's main chain nor is needed by it for
 * a while: beside_begin, launches into the queue, beside_end; later beside_join.
 *
 * In a recorded step the two become branches of the graph. Edges between them are whole: kernels
 * that begin or end a branch are launched without programmatic dependent launch.
 *
 * Threads: the engine thread. Errors: kept in queue.error.
 */
#ifndef LATTE_CUDA_BESIDE_CUH
#define LATTE_CUDA_BESIDE_CUH

#include "engine/kernels/cuda/device.cuh"

struct beside {
    cudaStream_t stream, main;
    cudaEvent_t forked, done;
    bool pdl;     /* what the queue had */
    bool is_open; /* begun and not joined */
};

/* cudaSuccess or what failed; closing one that was not opened, or not whole, is possible. */
cudaError_t beside_open(struct beside *b);
void beside_close(struct beside *b);

/* What is launched from here on waits for all that was launched before, and runs beside what is
 * launched after beside_end. */
void beside_begin(struct beside *b, struct queue *q);
void beside_end(struct beside *b, struct queue *q);

/* If one was begun: what is launched from here on waits for it. The first launch after this must
 * be made with queue.pdl off; true says so. */
bool beside_join(struct beside *b, struct queue *q);

#endif
