/* skinny_bf16.cu - products of few rows with bf16 weights: see skinny_plan.cuh. */
#include "engine/kernels/cuda/skinny_plan.cuh"

bool skinny_plan_bf16(const struct cuda *c, const struct product *p, struct skinny_launch *out)
{
    return plan_weights<bf16>(c, p, out);
}
