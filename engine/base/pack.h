/* pack.h - whole numbers as little-endian bytes, into a buffer and back out of one.
 *
 * Reading never needs a check at each call: what is not there reads as 0 and is remembered in
 * `failed`, and the reader looks once at the end.
 *
 * Threads: one at a time.
 * Memory:  a reader borrows its bytes.
 */
#ifndef LATTE_BASE_PACK_H
#define LATTE_BASE_PACK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/base/bytes.h"

void pack_u32(struct bytes *out, uint32_t value);
void pack_u64(struct bytes *out, uint64_t value);

struct unpack {
    const char *at, *end;
    bool failed;
};
uint32_t unpack_u32(struct unpack *u);
uint64_t unpack_u64(struct unpack *u);
void unpack_raw(struct unpack *u, void *out, size_t n);
/* The next n bytes, borrowed; NULL if they are not there. */
const char *unpack_skip(struct unpack *u, size_t n);

#endif
