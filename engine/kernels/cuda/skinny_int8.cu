/* skinny_int8.cu - products of few rows with int8 weights: see skinny_plan.cuh. */
#include "engine/kernels/cuda/skinny_plan.cuh"

bool skinny_plan_int8(const struct cuda *c, const struct product *p, struct skinny_launch *out)
{
    return plan_weights<int8_t>(c, p, out);
}
