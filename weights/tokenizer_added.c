/* tokenizer_added.c - added tokens in text: leftmost first, longest of those. */
#include <string.h>

#include "engine/base/utf8.h"
#include "weights/tokenizer_internal.h"

/* Searching takes text bytes times this at worst. */
enum { MAX_TOKEN_BYTES = 1024 };

struct trie_edge {
    uint64_t key; /* (node + 1) << 8 | byte, 0 for an empty slot */
    uint32_t to;
};

/* ---- trie ---- */

static struct trie_edge *edge_slot(const struct trie *t, uint32_t node, unsigned char byte)
{
    uint64_t key = ((uint64_t)node + 1) << 8 | byte;
    uint64_t hash = key * 0x9E3779B97F4A7C15u;
    for (size_t i = hash ^ hash >> 32;; i++) {
        struct trie_edge *edge = &t->edges[i & t->mask];
        if (edge->key == key || edge->key == 0)
            return edge;
    }
}

static bool trie_init(struct trie *t, struct arena *a, size_t n_bytes)
{
    size_t size = 16;
    while (size < 2 * n_bytes)
        size *= 2;
    t->max_nodes = n_bytes + 1;
    t->edges = arena_take_array(a, size, sizeof(*t->edges));
    t->value = arena_take_array(a, t->max_nodes, sizeof(*t->value));
    if (!t->edges || !t->value)
        return false;
    t->mask = size - 1;
    t->n_nodes = 1;
    t->value[0] = -1;
    return true;
}

/* The first of two equal contents counts, as in the reference. */
static void trie_add(struct trie *t, struct text content, int32_t value)
{
    uint32_t node = 0;
    for (size_t i = 0; i < content.n; i++) {
        unsigned char byte = (unsigned char)content.data[i];
        struct trie_edge *edge = edge_slot(t, node, byte);
        if (!edge->key) {
            CHECK(t->n_nodes < t->max_nodes);
            *edge = (struct trie_edge){((uint64_t)node + 1) << 8 | byte, (uint32_t)t->n_nodes};
            t->value[t->n_nodes++] = -1;
        }
        node = edge->to;
    }
    t->leads[(unsigned char)content.data[0]] = true;
    if (t->value[node] < 0)
        t->value[node] = value;
}

/* The longest token at text[at..n): its index and length; -1 if none. */
static int32_t trie_longest(const struct trie *t, struct text text, size_t at, size_t *length)
{
    int32_t best = -1;
    uint32_t node = 0;
    for (size_t i = at; i < text.n; i++) {
        const struct trie_edge *edge = edge_slot(t, node, (unsigned char)text.data[i]);
        if (!edge->key)
            break;
        node = edge->to;
        if (t->value[node] >= 0) {
            best = t->value[node];
            *length = i + 1 - at;
        }
    }
    return best;
}

/* ---- building ---- */

/* What token i is searched as: normalized tokens pass through the normalizer themselves. */
static enum status search_text(const struct added_token *token, const struct normalizer *z,
                               struct bytes pair[2], struct text *out, struct error *err)
{
    *out = token->content;
    if (token->normalized) {
        enum status st = normalizer_run(z, token->content, pair, out, err);
        if (st)
            return st;
    }
    if (out->n == 0 || out->n > MAX_TOKEN_BYTES)
        return fail(err, STATUS_UNSUPPORTED,
                    "added token \"%.80s\": %zu bytes to search for; 1 to %d are supported",
                    token->content.data, out->n, (int)MAX_TOKEN_BYTES);
    return STATUS_OK;
}

/* One pass over the tokens: count the bytes of their search texts, or add them to the tries. */
static enum status each_token(struct added_vocabulary *v, const struct normalizer *z, bool special,
                              size_t n_bytes[2], bool add, struct error *err)
{
    struct bytes pair[2] = {{0}};
    enum status st = STATUS_OK;
    for (size_t i = 0; i < v->n && !st; i++) {
        const struct added_token *token = &v->tokens[i];
        struct text content;
        if (token->special != special)
            continue;
        st = search_text(token, z, pair, &content, err);
        if (st)
            break;
        n_bytes[token->normalized] += content.n;
        if (add)
            trie_add(token->normalized ? &v->normalized : &v->raw, content, (int32_t)i);
    }
    bytes_free(&pair[0]);
    bytes_free(&pair[1]);
    return st;
}

enum status added_vocabulary_build(struct added_vocabulary *v, const struct normalizer *z,
                                   struct arena *a, struct error *err)
{
    size_t n_bytes[2] = {0};
    enum status st = pattern_compile_own(&v->word, tokenizer_word_class, err);
    if (!st)
        st = each_token(v, z, true, n_bytes, false, err);
    if (!st)
        st = each_token(v, z, false, n_bytes, false, err);
    if (!st && (!trie_init(&v->raw, a, n_bytes[0]) || !trie_init(&v->normalized, a, n_bytes[1])))
        st = fail(err, STATUS_NOMEM, "tokenizer: out of memory for the added tokens");
    if (!st)
        st = each_token(v, z, true, n_bytes, true, err);
    if (!st)
        st = each_token(v, z, false, n_bytes, true, err);
    return st;
}

/* ---- splitting ---- */

/* White_Space, as the reference strips it. */
static bool is_space(uint32_t c)
{
    return (c >= 9 && c <= 13) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F ||
           c == 0x205F || c == 0x3000;
}

/* The beginning of the character that ends at end. */
static size_t previous_character(struct text text, size_t end)
{
    do
        end--;
    while (end && ((unsigned char)text.data[end] & 0xC0) == 0x80);
    return end;
}

/* lowest bounds the walk: spaces before it belong to an earlier token anyway. */
static size_t skip_spaces_back(struct text text, size_t end, size_t lowest)
{
    while (end > lowest) {
        uint32_t c = 0;
        size_t start = previous_character(text, end);
        utf8_decode(text.data + start, end - start, &c);
        if (!is_space(c))
            break;
        end = start;
    }
    return end;
}

static size_t skip_spaces(struct text text, size_t at)
{
    uint32_t c = 0;
    int n;
    while ((n = utf8_decode(text.data + at, text.n - at, &c)) > 0 && is_space(c))
        at += (size_t)n;
    return at;
}

static enum status is_word_at(const struct added_vocabulary *v, struct encoder *e, const char *text,
                              size_t n, bool *is_word)
{
    uint32_t c;
    size_t start, end;
    int length = utf8_decode(text, n, &c);
    *is_word = false;
    return pattern_find(&v->word, e->match, text, (size_t)length, 0, is_word, &start, &end, e->err);
}

/* Whether a match between word characters is to be passed over. */
static enum status is_inside_word(const struct added_vocabulary *v, struct encoder *e,
                                  struct text text, size_t start, size_t end, bool *inside)
{
    bool before = false, after = false;
    enum status st = STATUS_OK;
    if (start) {
        size_t previous = previous_character(text, start);
        st = is_word_at(v, e, text.data + previous, start - previous, &before);
    }
    if (!st && end < text.n)
        st = is_word_at(v, e, text.data + end, text.n - end, &after);
    *inside = before || after;
    return st;
}

/* Whether the token found at start..end counts here. */
static enum status accepts(const struct added_vocabulary *v, struct encoder *e, struct text text,
                           const struct added_token *token, size_t start, size_t end, bool *yes)
{
    bool inside = false;
    enum status st = STATUS_OK;
    *yes = !(token->special && (e->flags & TOKENIZER_NO_PARSE_SPECIAL));
    if (*yes && token->single_word)
        st = is_inside_word(v, e, text, start, end, &inside);
    *yes = *yes && !inside;
    return st;
}

static size_t next_lead(const struct trie *trie, struct text text, size_t at)
{
    while (at < text.n && !trie->leads[(unsigned char)text.data[at]])
        at++;
    return at;
}

/* A text being cut. */
struct cutter {
    struct encoder *e;
    struct text text;
    enum status (*visit)(struct encoder *e, const struct added_part *part);
    size_t done;                     /* text before this was visited */
    size_t spaces_start, spaces_end; /* the run skipped last: tokens that are spaces themselves
                                      * would walk through it again and again */
};

static size_t skip_spaces_once(struct cutter *c, size_t at)
{
    if (at < c->spaces_start || at >= c->spaces_end) {
        c->spaces_start = at;
        c->spaces_end = skip_spaces(c->text, at);
    }
    return c->spaces_end;
}

/* Visit the text before the token at start..end, and the token. */
static enum status cut_token(struct cutter *c, const struct added_token *token, size_t start,
                             size_t end)
{
    if (token->lstrip)
        start = skip_spaces_back(c->text, start, c->done);
    if (token->rstrip)
        end = skip_spaces_once(c, end);
    enum status st = STATUS_OK;
    if (start > c->done) {
        struct text before = {c->text.data + c->done, start - c->done};
        st = c->visit(c->e, &(struct added_part){before, -1, c->done == 0});
    }
    struct text found = {c->text.data + start, end - start};
    if (!st)
        st = c->visit(c->e, &(struct added_part){found, token->id, start == 0});
    c->done = end;
    return st;
}

enum status added_split(const struct added_vocabulary *v, const struct trie *trie,
                        struct encoder *e, struct text text,
                        enum status (*visit)(struct encoder *e, const struct added_part *part))
{
    struct cutter c = {.e = e, .text = text, .visit = visit};
    enum status st = STATUS_OK;
    for (size_t at = next_lead(trie, text, 0); !st && at < text.n; at = next_lead(trie, text, at)) {
        size_t length = 1;
        bool accepted = false;
        int32_t i = trie_longest(trie, text, at, &length);
        if (i >= 0)
            st = accepts(v, e, text, &v->tokens[i], at, at + length, &accepted);
        if (!st && accepted)
            st = cut_token(&c, &v->tokens[i], at, at + length);
        at += length; /* of the bare match: the search goes on inside stripped spaces */
    }
    struct text rest = {text.data + c.done, text.n - c.done};
    return st || !rest.n ? st : visit(e, &(struct added_part){rest, -1, c.done == 0});
}
