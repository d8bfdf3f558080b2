/* beside.cu - the second stream of a layer; see beside.cuh. */
#include "engine/kernels/cuda/beside.cuh"

cudaError_t beside_open(struct beside *b)
{
    *b = {};
    cudaError_t error = cudaStreamCreateWithFlags(&b->stream, cudaStreamNonBlocking);
    if (error == cudaSuccess)
        error = cudaEventCreateWithFlags(&b->forked, cudaEventDisableTiming);
    if (error == cudaSuccess)
        error = cudaEventCreateWithFlags(&b->done, cudaEventDisableTiming);
    return error;
}

void beside_close(struct beside *b)
{
    if (b->stream) {
        (void)cudaStreamSynchronize(b->stream);
        (void)cudaStreamDestroy(b->stream);
    }
    if (b->forked)
        (void)cudaEventDestroy(b->forked);
    if (b->done)
        (void)cudaEventDestroy(b->done);
    *b = {};
}

static void note(struct queue *q, cudaError_t error)
{
    if (q->error != cudaSuccess || error == cudaSuccess)
        return;
    q->error = error;
    q->where = "beside";
}

/* `waits` goes on when what `runs` has so far is done. */
static void order(struct queue *q, cudaStream_t runs, cudaEvent_t event, cudaStream_t waits)
{
    if (q->error == cudaSuccess)
        note(q, cudaEventRecord(event, runs));
    if (q->error == cudaSuccess)
        note(q, cudaStreamWaitEvent(waits, event, 0));
}

void beside_begin(struct beside *b, struct queue *q)
{
    order(q, q->stream, b->forked, b->stream);
    b->main = q->stream;
    b->pdl = q->pdl;
    b->is_open = true;
    q->stream = b->stream;
    q->pdl = false;
}

void beside_end(struct beside *b, struct queue *q)
{
    q->stream = b->main;
    q->pdl = b->pdl;
}

bool beside_join(struct beside *b, struct queue *q)
{
    if (!b->is_open)
        return false;
    order(q, b->stream, b->done, q->stream);
    b->is_open = false;
    return true;
}
