/* template.h - the source of every kernels table, over the vectors its includer defines.
 *
 * Included once by each kernels_*.c after vec, VL, the v_ functions, TILE_ROWS, TILE_CASES,
 * VALUE_VECS and the TABLE's names. A loop's end is loaded and stored with fewer lanes by
 * v_get and v_put; the missing lanes read as zero.
 */
#include <math.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

INLINE int lanes_left(size_t i, size_t n)
{
    return n - i < VL ? (int)(n - i) : VL;
}

INLINE vec v_get(const float *p, int lanes)
{
    return lanes == VL ? v_load(p) : v_load_n(p, lanes);
}

INLINE void v_put(float *p, vec a, int lanes)
{
    if (lanes == VL)
        v_store(p, a);
    else
        v_store_n(p, a, lanes);
}

INLINE vec v_zero(void)
{
    return v_set1(0);
}

INLINE vec v_neg(vec a)
{
    return v_sub(v_zero(), a);
}

/* c[0] + c[1] x + ... */
INLINE vec v_poly(vec x, const float *c, int n)
{
    vec y = v_set1(c[n - 1]);
    UNROLL
    for (int i = n - 2; i >= 0; i--)
        y = v_fma(y, x, v_set1(c[i]));
    return y;
}

/* Each part stands on those before it. */
/* clang-format off */
#include "engine/kernels/template_math.h"
#include "engine/kernels/template_products.h"
#include "engine/kernels/template_rows.h"
#include "engine/kernels/template_latent.h"
#include "engine/kernels/template_window.h"
/* clang-format on */

const struct kernels TABLE = {
    .name = TABLE_NAME,
    .tile_rows = TILE_ROWS,
    .pack_rows = pack_rows,
    .gemm_f32 = gemm_f32,
    .gemm_bf16 = gemm_bf16,
    .widen = widen,
    .dots = dots,
    .norm = norm,
    .add = add,
    .add_bias = add_bias,
    .activate = activate,
    .softcap = softcap,
    .exp = exp_all,
    .angles = angles,
    .turn = turn,
    .conv = conv,
    .rglru = rglru,
    .latent = latent,
    .soft_block = soft_block,
    .accumulate = accumulate,
    .blend = blend,
};
