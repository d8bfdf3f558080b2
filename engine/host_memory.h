/* host_memory.h - buffers of the backends that compute on the host.
 *
 * The CPU backends share this half of the ops table: a buffer is a block of ordinary memory,
 * and write, read and copy are memmove with the range checked.
 *
 * Threads: as backend.h.
 * Memory:  a buffer owns its block; blocks are aligned to 64 bytes, large ones to huge pages.
 * Errors:  NOMEM from opening; INTERNAL for a range outside the buffer.
 */
#ifndef LATTE_ENGINE_HOST_MEMORY_H
#define LATTE_ENGINE_HOST_MEMORY_H

#include "engine/backend.h"

struct buffer {
    void *data; /* [n_bytes], owned */
    size_t n_bytes;
};

/* A zeroed block, 64 bytes of slack after its end so that vector loads may run over. */
void *host_block(size_t n_bytes);

/* The ops of these names in backend.h; the backend is not looked at. */
enum status host_buffer_open(struct backend *b, struct buffer **out, size_t n_bytes,
                             struct error *err);
void host_buffer_close(struct backend *b, struct buffer *buffer);
enum status host_write(struct backend *b, struct buffer *dst, size_t offset, const void *src,
                       size_t n_bytes, struct error *err);
enum status host_read(struct backend *b, void *dst, const struct buffer *src, size_t offset,
                      size_t n_bytes, struct error *err);
enum status host_copy(struct backend *b, struct buffer *dst, size_t dst_offset,
                      const struct buffer *src, size_t src_offset, size_t n_bytes,
                      struct error *err);
void host_linear_close(struct backend *b, struct linear *l);
const void *host_map(struct backend *b, const struct buffer *buffer, size_t n_bytes);

/* Round to the nearest bf16, ties to even; NaN stays NaN. */
uint16_t bf16_from_f32(float value);
float bf16_to_f32(uint16_t bits);

/* The rows an op works on. */
static inline int step_rows(const struct step *step, enum row_set rows)
{
    return rows == ROWS_STEP ? step->n_rows : step->n_logit_rows;
}

#endif
