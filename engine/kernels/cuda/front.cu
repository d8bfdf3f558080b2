/* front.cu - launch 1 of a decode layer: v, q and k, and the RG-LRU, from the same rows of x in
 * one grid. Neither waits for the other, and a node of a graph, which costs as much as 3 MB of
 * memory, is saved.
 *
 * The RG-LRU's blocks come first: their chain (norm, gates, recurrence, state) is the longer one.
 * Both kinds ask for their weights before pdl_wait. Results have the bits of skinny_product and
 * fused_rglru, which the grid is made of. Bytes: theirs together; at D = 768 and few rows 3.5 MB
 * of product weights and 0.6 MB of gates: floor 1.4 us.
 */
#include "engine/kernels/cuda/rglru.cuh"
#include "engine/kernels/cuda/skinny.cuh"

struct front_call {
    struct product p;
    struct rglru_decode d;
    int n_items; /* blocks of the RG-LRU */
};

template <class W, int HALVES, int TILES>
static __global__ void __launch_bounds__(SKINNY_THREADS, HALVES *TILES <= 16 ? 2 : 1)
    front_kernel(const __grid_constant__ struct front_call c)
{
    DYNAMIC_SHARED(unsigned char, shared);
    pdl_trigger();
    const int block = (int)blockIdx.x - c.n_items;
    if (block < 0)
        rglru_item<1>(c.d, blockIdx.x, shared);
    else
        skinny_block<W, HALVES, TILES, true>(c.p, block, (int)gridDim.x - c.n_items, 0, shared);
}

template <class W, int HALVES, int TILES> static bool run_front(struct cuda *c, front_call *call)
{
    const int n_tiles = skinny_n_tiles(&call->p, TILES);
    const size_t product =
        (size_t)skinny<W, HALVES, TILES, true>::layout(call->p.w.n_in, false).bytes;
    const size_t rglru = rglru_shared_bytes(&call->d);
    const size_t shared = product > rglru ? product : rglru;
    if (shared > shared_limit(&c->queue))
        return false;
    launch(&c->queue, "fused_front", front_kernel<W, HALVES, TILES>,
           dim3((unsigned)(call->n_items + n_tiles)), SKINNY_THREADS, shared, *call);
    return true;
}

template <class W, int TILES> static bool run_rows(struct cuda *c, front_call *call)
{
    if (call->p.rows <= 8)
        return run_front<W, 1, TILES>(c, call);
    return run_front<W, 2, TILES>(c, call);
}

/* Tiles as skinny_product chooses them, or the bits would differ. More than 4: so many weights
 * that a launch saved does not count. */
template <class W> static bool run_tiles(struct cuda *c, front_call *call)
{
    switch (skinny_tiles(c->queue.n_sms, &call->p.w, call->p.output)) {
    case 1:
        return run_rows<W, 1>(c, call);
    case 2:
        return run_rows<W, 2>(c, call);
    case 4:
        return run_rows<W, 4>(c, call);
    default:
        return false;
    }
}

bool fused_front(struct cuda *c, const struct product *p, const struct rglru_front *f)
{
    if (!c->step.decode || p->rows > FRONT_ROWS || !p->norm.weight ||
        p->output == OUTPUT_ACTIVATE || !skinny_possible(p) || !rglru_possible(f))
        return false;
    struct front_call call = {*p, rglru_decode_of(c, f), 0};
    call.n_items = rglru_items(&call.d);
    return p->w.dtype == DTYPE_I8 ? run_tiles<int8_t>(c, &call) : run_tiles<bf16>(c, &call);
}
