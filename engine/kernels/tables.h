/* tables.h - the tables kernels.c chooses from; each is defined by the file of its name. */
#ifndef LATTE_KERNELS_TABLES_H
#define LATTE_KERNELS_TABLES_H

#include "engine/kernels/kernels.h"

extern const struct kernels kernels_portable;
#if defined(__x86_64__)
extern const struct kernels kernels_avx2;   /* needs AVX2 and FMA */
extern const struct kernels kernels_avx512; /* needs AVX-512 F and DQ */
#endif

#endif
