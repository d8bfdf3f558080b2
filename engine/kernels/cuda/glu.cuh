/* glu.cuh - the mlp's first product of many rows with what follows it inside, on the tensor cores
 * of capability 9.0: a gated linear unit.
 *
 *   out [rows, F] bf16 = act(in W_gate^T) (in W_up^T), W bf16 [2F, n_in]: F rows of gate, then of
 * up
 *
 * The library writes its 2F columns to memory and a pass of its own reads them back; here they stay
 * in registers, and F results a row are all that is written.
 *
 * Blocks stay on their SM and take one tile of 128 rows and 128 features (256 columns of the
 * product) after the other, in clusters of two that have the same features: each loads its rows and
 * half of the weights, which it sends to both. One thread keeps four chunks of 64 columns of n_in
 * on their way by tensor maps; two warpgroups have 64 rows each and multiply.
 *
 * Bytes of a tile, for every 64 columns of n_in: 16 KB of rows and 16 KB of weights from L2, and
 * the other block's 16 KB of weights. To memory 2 F a row. Floor: 4 F n_in operations a row.
 */
#ifndef LATTE_CUDA_GLU_CUH
#define LATTE_CUDA_GLU_CUH

#include "engine/kernels/cuda/fused.cuh"

/* Whether the device has the kernel, and the kernel is for p: OUTPUT_ACTIVATE of bf16 weights without bias, of
 * silu or gelu's tanh form, F a multiple of 128, n_in of 64, rows in place and not to be normed. */
bool glu_possible(const struct cuda *c, const struct product *p);
/* Whether tiles of that many rows fill the device: if not, the library's smaller ones are faster.
 */
bool glu_pays(const struct cuda *c, const struct product *p);
/* A row's result has the same bits whatever the number of rows. False, and nothing is queued: the
 * driver has no such tensor maps (addresses that are not 16-byte aligned, say). */
bool glu_product(struct cuda *c, const struct product *p);

#endif
