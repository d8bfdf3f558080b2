/* kernels.c - see kernels.h */
#include "engine/kernels/kernels.h"

#include <string.h>

#include "engine/kernels/tables.h"

#if defined(__x86_64__)
static bool has_avx2(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

static bool has_avx512(void)
{
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq");
}
#endif

static bool always(void)
{
    return true;
}

/* Best first. */
static const struct {
    const struct kernels *table;
    bool (*runs_here)(void);
} choices[] = {
#if defined(__x86_64__)
    {&kernels_avx512, has_avx512},
    {&kernels_avx2, has_avx2},
#endif
    {&kernels_portable, always},
};

enum { N_CHOICES = sizeof(choices) / sizeof(*choices) };

const struct kernels *kernels_pick(void)
{
    int i = 0;
    while (!choices[i].runs_here())
        i++;
    return choices[i].table;
}

const struct kernels *kernels_find(const char *name)
{
    for (int i = 0; i < N_CHOICES; i++)
        if (!strcmp(choices[i].table->name, name) && choices[i].runs_here())
            return choices[i].table;
    return NULL;
}
