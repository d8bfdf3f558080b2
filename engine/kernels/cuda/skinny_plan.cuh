/* skinny_plan.cuh - kernels around skinny_block and the choice of one. Many instances, so each
 * weight type has a file of its own, which this is included in.
 */
#ifndef LATTE_CUDA_SKINNY_PLAN_CUH
#define LATTE_CUDA_SKINNY_PLAN_CUH

#include "engine/kernels/cuda/skinny.cuh"

typedef void product_kernel(struct product);

struct skinny_launch {
    product_kernel *kernel;
    int n_blocks, n_groups; /* of a group of rows; groups of rows */
    size_t shared_bytes;
};

/* How to launch p, which satisfies skinny_possible. False: not enough shared memory. */
bool skinny_plan_bf16(const struct cuda *c, const struct product *p, struct skinny_launch *out);
bool skinny_plan_int8(const struct cuda *c, const struct product *p, struct skinny_launch *out);

template <class W, int HALVES, int TILES, bool NORM>
static __global__ void __launch_bounds__(SKINNY_THREADS,
                                         (skinny<W, HALVES, TILES, NORM>::MIN_BLOCKS))
    skinny_kernel(const __grid_constant__ struct product p)
{
    DYNAMIC_SHARED(unsigned char, shared);
    pdl_trigger();
    skinny_block<W, HALVES, TILES, NORM>(p, blockIdx.x, gridDim.x, blockIdx.y, shared);
}

/* A tile a block, or where there are more tiles than SMs have room for, as many as make blocks
 * equally long. False: not enough shared memory. */
template <class W, int HALVES, int TILES, bool NORM>
static bool plan_launch(const struct cuda *c, const struct product *p, struct skinny_launch *out)
{
    typedef skinny<W, HALVES, TILES, NORM> S;
    const int most = skinny_most_shared(&c->queue), n_tiles = skinny_n_tiles(p, TILES);
    const struct skinny_layout single = S::layout(p->w.n_in, false);
    const struct skinny_layout several = S::layout(p->w.n_in, true);
    const auto room = [&](const struct skinny_layout &l) {
        return c->queue.n_sms * (S::MIN_BLOCKS == 2 && l.bytes <= SKINNY_PAIRED ? 2 : 1);
    };
    out->kernel = skinny_kernel<W, HALVES, TILES, NORM>;
    out->n_groups = ceil_div(p->rows, 8 * HALVES);
    out->n_blocks = n_tiles;
    out->shared_bytes = (size_t)single.bytes;
    if (out->n_groups == 1 && n_tiles > room(single) && several.bytes <= most) {
        const int rounds = ceil_div(n_tiles, room(several));
        if (rounds > 1) {
            out->n_blocks = ceil_div(n_tiles, rounds);
            out->shared_bytes = (size_t)several.bytes;
        }
    }
    return single.bytes <= most;
}

/* Groups of as many rows as there are, up to 64, or as shared memory allows. */
template <class W, int TILES, bool NORM>
static bool plan_rows(const struct cuda *c, const struct product *p, struct skinny_launch *out)
{
    return (p->rows > 32 && plan_launch<W, 8, TILES, NORM>(c, p, out)) ||
           (p->rows > 16 && plan_launch<W, 4, TILES, NORM>(c, p, out)) ||
           (p->rows > 8 && plan_launch<W, 2, TILES, NORM>(c, p, out)) ||
           plan_launch<W, 1, TILES, NORM>(c, p, out);
}

/* Six and eight tiles are for large matrices; the host that emulates a device does without these
 * instances, which take minutes to compile. */
#ifdef LATTE_EMULATE
static constexpr bool SKINNY_LARGE = false;
#else
static constexpr bool SKINNY_LARGE = true;
#endif

/* Tiles as skinny_tiles says, or fewer that give the same bits. */
template <class W, bool NORM>
static bool plan_tiles(const struct cuda *c, const struct product *p, struct skinny_launch *out)
{
    const int tiles = skinny_tiles(c->queue.n_sms, &p->w, p->output);
    if (tiles <= 2)
        return (tiles == 2 && plan_rows<W, 2, NORM>(c, p, out)) ||
               (p->output != OUTPUT_ACTIVATE && plan_rows<W, 1, NORM>(c, p, out));
    if constexpr (SKINNY_LARGE)
        if ((tiles == 8 && plan_rows<W, 8, NORM>(c, p, out)) ||
            (tiles >= 6 && plan_rows<W, 6, NORM>(c, p, out)))
            return true;
    return plan_rows<W, 4, NORM>(c, p, out);
}

template <class W>
static bool plan_weights(const struct cuda *c, const struct product *p, struct skinny_launch *out)
{
    return p->norm.weight ? plan_tiles<W, true>(c, p, out) : plan_tiles<W, false>(c, p, out);
}

#endif
