/* safetensors.h - memory-mapped tensor files in the safetensors format, single or sharded.
 *
 * A file is an 8-byte little-endian header length, a JSON header {name: {dtype, shape,
 * data_offsets}} and raw little-endian data. Every field is checked, with overflow guards,
 * before it is used: a truncated, corrupt or hostile file is an error, never a crash. A file
 * that shrinks while it is mapped is not guarded against (SIGBUS): replace model files by
 * renaming new ones into place, as every downloader does.
 *
 * Threads: open and close by one thread; a set that is open may be read by any number.
 * Memory:  the set owns the mappings; tensors and their names are borrowed until close.
 * Errors:  NOT_FOUND, INVALID (malformed), TOO_LARGE, IO, NOMEM; texts name file, tensor, expected
 * and found.
 */
#ifndef LATTE_WEIGHTS_SAFETENSORS_H
#define LATTE_WEIGHTS_SAFETENSORS_H

#include <stddef.h>
#include <stdint.h>

#include "engine/base/error.h"
#include "weights/dtype.h"

enum { TENSOR_MAX_DIMS = 8 };

struct tensor {
    const char *name; /* borrowed from the set */
    const char *file; /* path of the file it is in, borrowed from the set */
    enum dtype dtype;
    const char *dtype_name; /* as the file spells it, "BF16" */
    int n_dims;
    int64_t shape[TENSOR_MAX_DIMS]; /* row-major, outermost first */
    int64_t n_values;               /* product of the shape */
    const void *data;               /* [n_bytes] little-endian, in the mapping; may be unaligned */
    size_t n_bytes;
};

struct safetensors;

/* Open DIR/model.safetensors, or else the shards that DIR/model.safetensors.index.json names:
 * plain file names in DIR only, and exactly the tensors it lists. */
enum status safetensors_open(struct safetensors **out, const char *dir, struct error *err);
void safetensors_close(struct safetensors *s); /* accepts NULL */

size_t safetensors_count(const struct safetensors *s);
size_t safetensors_n_bytes(const struct safetensors *s); /* of all tensors' data */

/* Tensors in ascending order of their names (bytewise). i is 0..count-1. */
const struct tensor *safetensors_get(const struct safetensors *s, size_t i);

/* The tensor of that name, or NULL. O(log n). */
const struct tensor *safetensors_find(const struct safetensors *s, const char *name);

#endif
