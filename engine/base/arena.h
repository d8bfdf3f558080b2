/* arena.h - bump memory with a cap, released as a whole.
 *
 * Threads: one at a time.
 * Memory:  the arena owns every block it hands out; pointers live until arena_free.
 * Errors:  NULL when the cap is reached or the system is out of memory.
 */
#ifndef LATTE_BASE_ARENA_H
#define LATTE_BASE_ARENA_H

#include <stddef.h>

struct arena_block;

struct arena {
    struct arena_block *blocks; /* newest first, owned */
    size_t used_bytes;          /* taken from the system, headers included */
    size_t cap_bytes;           /* 0 means no cap */
};

void arena_init(struct arena *a, size_t cap_bytes);

/* n_bytes of zeroed memory aligned for any type; NULL at the cap. n_bytes 0 gives a valid pointer.
 */
void *arena_take(struct arena *a, size_t n_bytes);

/* count * size with an overflow check. */
void *arena_take_array(struct arena *a, size_t count, size_t size);

/* A zero-terminated copy of n bytes. */
char *arena_copy(struct arena *a, const char *text, size_t n);

/* Release everything; the arena may be used again with the same cap. */
void arena_free(struct arena *a);

#endif
