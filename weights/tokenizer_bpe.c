/* tokenizer_bpe.c - byte pair encoding of one word, in O(n log n).
 *
 * Symbols form a doubly linked list; a heap holds the pairs that can be merged, by rank, then by
 * position. A merge leaves stale pairs in the heap, which are recognised when they come up.
 */
#include <stdlib.h>
#include <string.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "engine/base/utf8.h"
#include "weights/tokenizer_internal.h"

struct symbol {
    int32_t id; /* -1: merged into its left neighbour */
    uint32_t previous, next;
};

struct candidate {
    uint64_t order; /* rank << 32 | position */
    int32_t id;     /* of the merged token */
};

enum { NONE = UINT32_MAX };

/* ---- string_map ---- */

bool string_map_init(struct string_map *m, struct arena *a, size_t cap)
{
    size_t size = 16;
    while (size < 2 * cap)
        size *= 2;
    m->keys = arena_take_array(a, cap + 1, sizeof(*m->keys));
    m->values = arena_take_array(a, cap + 1, sizeof(*m->values));
    m->slots = arena_take_array(a, size, sizeof(*m->slots));
    m->mask = size - 1;
    m->cap = cap;
    return m->keys && m->values && m->slots;
}

/* The slot that holds key, or the empty one where it would go. */
static uint32_t *find_slot(const struct string_map *m, const char *key, size_t n)
{
    for (size_t i = XXH3_64bits(key, n);; i++) {
        uint32_t *slot = &m->slots[i & m->mask];
        if (!*slot)
            return slot;
        const struct text *other = &m->keys[*slot - 1];
        if (other->n == n && memcmp(other->data, key, n) == 0)
            return slot;
    }
}

bool string_map_add(struct string_map *m, const char *key, size_t n, int32_t value)
{
    CHECK(m->n < m->cap);
    uint32_t *slot = find_slot(m, key, n);
    if (*slot)
        return false;
    m->keys[m->n] = (struct text){key, n};
    m->values[m->n] = value;
    *slot = (uint32_t)++m->n;
    return true;
}

int32_t string_map_get(const struct string_map *m, const char *key, size_t n)
{
    if (!m->slots)
        return -1;
    uint32_t slot = *find_slot(m, key, n);
    return slot ? m->values[slot - 1] : -1;
}

/* ---- merge_map ---- */

static uint64_t pair_of(int32_t left, int32_t right)
{
    return (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
}

static struct merge *merge_slot(const struct merge_map *m, uint64_t pair)
{
    uint64_t hash = pair * 0x9E3779B97F4A7C15u;
    for (size_t i = hash ^ hash >> 32;; i++) {
        struct merge *slot = &m->slots[i & m->mask];
        if (slot->pair == pair || slot->pair == UINT64_MAX)
            return slot;
    }
}

bool merge_map_init(struct merge_map *m, struct arena *a, size_t n)
{
    size_t size = 16;
    while (size < 2 * n)
        size *= 2;
    m->slots = arena_take_array(a, size, sizeof(*m->slots));
    m->mask = size - 1;
    for (size_t i = 0; m->slots && i < size; i++)
        m->slots[i].pair = UINT64_MAX;
    return m->slots;
}

void merge_map_set(struct merge_map *m, int32_t left, int32_t right, uint32_t rank, int32_t id)
{
    uint64_t pair = pair_of(left, right);
    *merge_slot(m, pair) = (struct merge){pair, rank, id};
}

static const struct merge *merge_get(const struct merge_map *m, int32_t left, int32_t right)
{
    const struct merge *slot = merge_slot(m, pair_of(left, right));
    return slot->pair == UINT64_MAX ? NULL : slot;
}

/* ---- memory ---- */

enum status token_list_push(struct token_list *list, int32_t id, struct error *err)
{
    if (list->limit && list->n >= list->limit)
        return fail(err, STATUS_TOO_LARGE, "the text has more than %zu tokens", list->limit);
    if (list->n == list->cap) {
        size_t cap = list->cap ? 2 * list->cap : 64;
        int32_t *ids = cap > SIZE_MAX / 8 ? NULL : realloc(list->ids, cap * sizeof(*ids));
        if (!ids)
            return fail(err, STATUS_NOMEM, "tokenizer: out of memory for %zu ids", cap);
        list->ids = ids;
        list->cap = cap;
    }
    list->ids[list->n++] = id;
    return STATUS_OK;
}

/* Grow to hold n items of a size; *cap counts items. */
static bool grow(void **items, size_t *cap, size_t n, size_t size)
{
    if (n <= *cap)
        return true;
    size_t new_cap = *cap ? *cap : 64;
    while (new_cap < n)
        new_cap *= 2;
    void *moved = new_cap > SIZE_MAX / size / 2 ? NULL : realloc(*items, new_cap * size);
    if (!moved)
        return false;
    *items = moved;
    *cap = new_cap;
    return true;
}

void bpe_scratch_free(struct bpe_scratch *s)
{
    free(s->symbols);
    free(s->heap);
    *s = (struct bpe_scratch){0};
}

/* ---- word -> first symbols ---- */

/* Appends symbols; the unknown token waits in pending until a known character or the end. */
struct symbol_writer {
    const struct bpe *bpe;
    struct bpe_scratch *scratch;
    size_t n;
    bool pending;
};

static bool put(struct symbol_writer *w, int32_t id)
{
    if (!grow((void **)&w->scratch->symbols, &w->scratch->cap_symbols, w->n + 1,
              sizeof(struct symbol)))
        return false;
    w->scratch->symbols[w->n] =
        (struct symbol){id, w->n ? (uint32_t)(w->n - 1) : NONE, (uint32_t)(w->n + 1)};
    w->n++;
    return true;
}

static bool has_byte_tokens(const struct bpe *b, const char *character, int n)
{
    for (int i = 0; i < n; i++)
        if (b->byte_ids[(unsigned char)character[i]] < 0)
            return false;
    return true;
}

/* A character that is no token: its bytes, the unknown token, or nothing. As in the reference,
 * bytes do not release a pending unknown token, which therefore comes after them. */
static enum status put_unknown(struct symbol_writer *w, const char *character, int n,
                               struct error *err)
{
    const struct bpe *b = w->bpe;
    bool ok = true;
    if (b->byte_fallback && has_byte_tokens(b, character, n)) {
        for (int i = 0; i < n && ok; i++)
            ok = put(w, b->byte_ids[(unsigned char)character[i]]);
    } else if (b->unk_token.data) {
        if (b->unk_id < 0)
            return fail(err, STATUS_INVALID, "tokenizer: unk_token \"%s\" is not in the vocabulary",
                        b->unk_token.data);
        if (w->pending && !b->fuse_unk)
            ok = put(w, b->unk_id);
        w->pending = true;
    }
    return ok ? STATUS_OK : fail(err, STATUS_NOMEM, "tokenizer: out of memory");
}

static int32_t character_id(const struct bpe *b, const char *character, int n, uint32_t code_point)
{
    return code_point < DIRECT_CHARS ? b->direct[code_point]
                                     : string_map_get(&b->vocab, character, (size_t)n);
}

static enum status split_characters(struct symbol_writer *w, const char *word, size_t n,
                                    struct error *err)
{
    uint32_t code_point = 0;
    int step;
    for (size_t at = 0; at < n; at += (size_t)step) {
        step = utf8_decode(word + at, n - at, &code_point);
        CHECK(step > 0);
        int32_t id = character_id(w->bpe, word + at, step, code_point);
        if (id < 0) {
            enum status st = put_unknown(w, word + at, step, err);
            if (st)
                return st;
            continue;
        }
        if ((w->pending && !put(w, w->bpe->unk_id)) || !put(w, id))
            return fail(err, STATUS_NOMEM, "tokenizer: out of memory");
        w->pending = false;
    }
    if (w->pending && !put(w, w->bpe->unk_id))
        return fail(err, STATUS_NOMEM, "tokenizer: out of memory");
    return STATUS_OK;
}

/* ---- the heap: smallest order first ---- */

static bool heap_push(struct bpe_scratch *s, struct candidate c)
{
    if (!grow((void **)&s->heap, &s->cap_heap, s->n_heap + 1, sizeof(*s->heap)))
        return false;
    size_t i = s->n_heap++;
    while (i && s->heap[(i - 1) / 2].order > c.order) {
        s->heap[i] = s->heap[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    s->heap[i] = c;
    return true;
}

static struct candidate heap_pop(struct bpe_scratch *s)
{
    struct candidate top = s->heap[0], last = s->heap[--s->n_heap];
    size_t i = 0;
    for (;;) {
        size_t child = 2 * i + 1;
        if (child >= s->n_heap)
            break;
        if (child + 1 < s->n_heap && s->heap[child + 1].order < s->heap[child].order)
            child++;
        if (s->heap[child].order >= last.order)
            break;
        s->heap[i] = s->heap[child];
        i = child;
    }
    s->heap[i] = last;
    return top;
}

/* Offer the pair of the symbol at and its right neighbour. */
static bool offer(const struct bpe *b, struct bpe_scratch *s, uint32_t at)
{
    uint32_t next = s->symbols[at].next;
    if (next == NONE)
        return true;
    const struct merge *m = merge_get(&b->merges, s->symbols[at].id, s->symbols[next].id);
    return !m || heap_push(s, (struct candidate){(uint64_t)m->rank << 32 | at, m->id});
}

/* Merge the symbol at with its right neighbour, unless the candidate is stale. */
static bool apply(const struct bpe *b, struct bpe_scratch *s, struct candidate c)
{
    struct symbol *symbols = s->symbols;
    uint32_t at = (uint32_t)c.order, next = symbols[at].next;
    if (symbols[at].id < 0 || next == NONE)
        return true;
    const struct merge *m = merge_get(&b->merges, symbols[at].id, symbols[next].id);
    if (!m || m->id != c.id)
        return true;
    symbols[at].id = c.id;
    symbols[at].next = symbols[next].next;
    symbols[next].id = -1;
    if (symbols[at].next != NONE)
        symbols[symbols[at].next].previous = at;
    return (symbols[at].previous == NONE || offer(b, s, symbols[at].previous)) && offer(b, s, at);
}

static enum status merge_all(const struct bpe *b, struct bpe_scratch *s, size_t n,
                             struct error *err)
{
    s->n_heap = 0;
    bool ok = true;
    for (size_t i = 0; i + 1 < n && ok; i++)
        ok = offer(b, s, (uint32_t)i);
    while (ok && s->n_heap)
        ok = apply(b, s, heap_pop(s));
    return ok ? STATUS_OK : fail(err, STATUS_NOMEM, "tokenizer: out of memory");
}

enum status bpe_encode(const struct bpe *b, struct bpe_scratch *s, const char *word, size_t n,
                       struct token_list *out, struct error *err)
{
    if (n == 0)
        return STATUS_OK;
    int32_t whole = b->ignore_merges ? string_map_get(&b->vocab, word, n) : -1;
    if (whole >= 0)
        return token_list_push(out, whole, err);
    if (n >= NONE)
        return fail(err, STATUS_TOO_LARGE, "tokenizer: a word of %zu bytes", n);

    struct symbol_writer w = {.bpe = b, .scratch = s};
    enum status st = split_characters(&w, word, n, err);
    if (st || w.n == 0)
        return st;
    s->symbols[w.n - 1].next = NONE;
    st = merge_all(b, s, w.n, err);
    for (uint32_t at = 0; !st && at != NONE; at = s->symbols[at].next)
        st = token_list_push(out, s->symbols[at].id, err);
    return st;
}
