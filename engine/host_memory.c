/* host_memory.c - see host_memory.h */
#include "engine/host_memory.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { CACHE_LINE = 64, HUGE_PAGE = 2 << 20 };

void *host_block(size_t n_bytes)
{
    size_t align = n_bytes >= HUGE_PAGE ? HUGE_PAGE : CACHE_LINE;
    if (n_bytes > PTRDIFF_MAX / 2) /* no such block exists; keeps the sum below from wrapping */
        return NULL;
    size_t padded = (n_bytes + CACHE_LINE + align - 1) / align * align;
    void *data = aligned_alloc(align, padded);
    if (!data)
        return NULL;
    /* Weights are streamed from end to end: huge pages spare the TLB. Only a hint. */
    if (align == HUGE_PAGE)
        madvise(data, padded, MADV_HUGEPAGE);
    memset(data, 0, padded);
    return data;
}

enum status host_buffer_open(struct backend *b, struct buffer **out, size_t n_bytes,
                             struct error *err)
{
    (void)b;
    struct buffer *buffer = malloc(sizeof(*buffer));
    void *data = buffer ? host_block(n_bytes) : NULL;
    if (!data) {
        free(buffer);
        return fail(err, STATUS_NOMEM, "buffer of %zu bytes: out of memory", n_bytes);
    }
    *buffer = (struct buffer){data, n_bytes};
    *out = buffer;
    return STATUS_OK;
}

void host_buffer_close(struct backend *b, struct buffer *buffer)
{
    (void)b;
    if (!buffer)
        return;
    free(buffer->data);
    free(buffer);
}

static enum status check_range(const struct buffer *buffer, size_t offset, size_t n_bytes,
                               const char *what, struct error *err)
{
    if (offset <= buffer->n_bytes && n_bytes <= buffer->n_bytes - offset)
        return STATUS_OK;
    return fail(err, STATUS_INTERNAL, "%s of %zu bytes at %zu in a buffer of %zu", what, n_bytes,
                offset, buffer->n_bytes);
}

enum status host_write(struct backend *b, struct buffer *dst, size_t offset, const void *src,
                       size_t n_bytes, struct error *err)
{
    (void)b;
    enum status st = check_range(dst, offset, n_bytes, "write", err);
    if (!st && n_bytes)
        memcpy((char *)dst->data + offset, src, n_bytes);
    return st;
}

enum status host_read(struct backend *b, void *dst, const struct buffer *src, size_t offset,
                      size_t n_bytes, struct error *err)
{
    (void)b;
    enum status st = check_range(src, offset, n_bytes, "read", err);
    if (!st && n_bytes)
        memcpy(dst, (const char *)src->data + offset, n_bytes);
    return st;
}

enum status host_copy(struct backend *b, struct buffer *dst, size_t dst_offset,
                      const struct buffer *src, size_t src_offset, size_t n_bytes,
                      struct error *err)
{
    (void)b;
    enum status st = check_range(src, src_offset, n_bytes, "copy", err);
    if (!st)
        st = check_range(dst, dst_offset, n_bytes, "copy", err);
    if (!st && n_bytes)
        memmove((char *)dst->data + dst_offset, (const char *)src->data + src_offset, n_bytes);
    return st;
}

void host_linear_close(struct backend *b, struct linear *l)
{
    host_buffer_close(b, l->weight);
    host_buffer_close(b, l->bias);
    l->weight = NULL;
    l->bias = NULL;
}

const void *host_map(struct backend *b, const struct buffer *buffer, size_t n_bytes)
{
    (void)b;
    CHECK(n_bytes <= buffer->n_bytes);
    return buffer->data;
}

uint16_t bf16_from_f32(float value)
{
    uint16_t bits;
    dtype_from_f32(&bits, DTYPE_BF16, &value, 1);
    return bits;
}

float bf16_to_f32(uint16_t bits)
{
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof(value));
    return value;
}
