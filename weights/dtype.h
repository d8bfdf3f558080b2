/* dtype.h - the number formats of tensor files.
 *
 * Threads: no state. Memory: none. Errors: none.
 */
#ifndef LATTE_WEIGHTS_DTYPE_H
#define LATTE_WEIGHTS_DTYPE_H

#include <stddef.h>

/* OTHER: a format that files may hold but models here do not read (I64, F8_E4M3, ...). I8 and
 * F8_E4M3 are forms in which an engine keeps weights and state; files are never read as them. */
enum dtype { DTYPE_F32, DTYPE_F16, DTYPE_BF16, DTYPE_OTHER, DTYPE_I8, DTYPE_F8_E4M3 };

/* "F32", "F16", "BF16", "other", "I8", "F8_E4M3". */
const char *dtype_name(enum dtype dtype);
size_t dtype_bytes(enum dtype dtype); /* 4, 2, 2; 0 for other; 1, 1 */

/* The dtype a safetensors file calls `name`; sets *n_bits to the size of one value, 0 when the
 * name is unknown. */
enum dtype dtype_find(const char *name, int *n_bits);

/* Convert n values at src (dtype, any alignment) to float. dtype is not OTHER, nor I8, whose
 * values mean nothing without their scale. */
void dtype_to_f32(float *out, const void *src, enum dtype dtype, size_t n);

/* Convert floats to F32, BF16 or F8_E4M3, rounding to nearest, ties to even. F8_E4M3 has no
 * infinity: what is larger than 448 becomes 448, as GPUs convert. NaN stays NaN. */
void dtype_from_f32(void *out, enum dtype dtype, const float *src, size_t n);

#endif
