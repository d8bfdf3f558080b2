/* arena.c - see arena.h */
#include "engine/base/arena.h"

#include <stdalign.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { BLOCK_BYTES = 8192 };

struct arena_block {
    struct arena_block *next;
    size_t used, size;
    alignas(max_align_t) unsigned char data[];
};

void arena_init(struct arena *a, size_t cap_bytes)
{
    *a = (struct arena){.cap_bytes = cap_bytes};
}

static struct arena_block *add_block(struct arena *a, size_t n_bytes)
{
    size_t size = n_bytes > BLOCK_BYTES ? n_bytes : BLOCK_BYTES;
    size_t total = size + sizeof(struct arena_block);
    if (a->cap_bytes && (total > a->cap_bytes || a->used_bytes > a->cap_bytes - total))
        return NULL;
    struct arena_block *b = calloc(1, total);
    if (!b)
        return NULL;
    b->size = size;
    b->next = a->blocks;
    a->blocks = b;
    a->used_bytes += total;
    return b;
}

void *arena_take(struct arena *a, size_t n_bytes)
{
    const size_t align = alignof(max_align_t);
    if (n_bytes > SIZE_MAX / 2)
        return NULL;
    n_bytes = (n_bytes + align - 1) / align * align;
    struct arena_block *b = a->blocks;
    if (!b || b->size - b->used < n_bytes)
        b = add_block(a, n_bytes);
    if (!b)
        return NULL;
    void *p = b->data + b->used;
    b->used += n_bytes;
    return p;
}

void *arena_take_array(struct arena *a, size_t count, size_t size)
{
    if (size && count > SIZE_MAX / 2 / size)
        return NULL;
    return arena_take(a, count * size);
}

char *arena_copy(struct arena *a, const char *text, size_t n)
{
    if (n == SIZE_MAX)
        return NULL;
    char *copy = arena_take(a, n + 1);
    if (copy && n)
        memcpy(copy, text, n);
    return copy;
}

void arena_free(struct arena *a)
{
    for (struct arena_block *b = a->blocks, *next; b; b = next) {
        next = b->next;
        free(b);
    }
    arena_init(a, a->cap_bytes);
}
