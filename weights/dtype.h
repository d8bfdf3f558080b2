/* dtype.h - the number formats of tensor files.
 *
 * Threads: no state. Memory: none. Errors: none.
 */
#ifndef LATTE_WEIGHTS_DTYPE_H
#define LATTE_WEIGHTS_DTYPE_H

#include <stddef.h>

/* OTHER: a format that files may hold but models here do not use (I64, F8_E4M3, ...). */
enum dtype { DTYPE_F32, DTYPE_F16, DTYPE_BF16, DTYPE_OTHER };

/* "F32", "F16", "BF16" or "other". */
const char *dtype_name(enum dtype dtype);
size_t dtype_bytes(enum dtype dtype); /* 4, 2, 2; 0 for other */

/* The dtype a safetensors file calls `name`; sets *n_bits to the size of one value, 0 when the
 * name is unknown. */
enum dtype dtype_find(const char *name, int *n_bits);

/* Convert n values at src (dtype, any alignment) to float. dtype is not OTHER. */
void dtype_to_f32(float *out, const void *src, enum dtype dtype, size_t n);

#endif
