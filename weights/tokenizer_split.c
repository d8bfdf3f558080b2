/* tokenizer_split.c - pre-tokenizers: one text goes through the steps depth first, so that only
 * the current piece of each step is in memory; what leaves the last step is a word for BPE.
 */
#include <string.h>

#include "engine/base/utf8.h"
#include "weights/tokenizer_internal.h"

/* ---- byte level ---- */

/* Printable Latin-1 stands for itself; the other 68 bytes take U+0100 and up, in order. */
static bool stands_for_itself(uint32_t c)
{
    return (c >= '!' && c <= '~') || (c >= 0xA1 && c <= 0xAC) || (c >= 0xAE && c <= 0xFF);
}

/* How many bytes below this one are not printable. */
static uint32_t rank_of_unprintable(uint32_t byte)
{
    return byte <= 0x20 ? byte : byte <= 0xA0 ? byte - 0x7F + 0x21 : 0x21 + 0x22;
}

uint32_t byte_to_char(unsigned char byte)
{
    return stands_for_itself(byte) ? byte : 0x100 + rank_of_unprintable(byte);
}

int char_to_byte(uint32_t c)
{
    if (c < 0x100)
        return stands_for_itself(c) ? (int)c : -1;
    uint32_t rank = c - 0x100;
    if (rank <= 0x20)
        return (int)rank;
    if (rank < 0x21 + 0x22)
        return (int)(rank - 0x21 + 0x7F);
    return rank == 0x21 + 0x22 ? 0xAD : -1;
}

static void map_bytes(struct text text, struct bytes *out)
{
    for (size_t i = 0; i < text.n; i++) {
        char character[4];
        int n = utf8_encode(byte_to_char((unsigned char)text.data[i]), character);
        bytes_append(out, character, (size_t)n);
    }
}

/* ---- steps ---- */

static enum status run_from(struct encoder *e, int step, struct text text, bool first);

/* A piece in the making, while matches and the text between them come in. */
struct piece_merger {
    struct encoder *e;
    int step; /* that gets the pieces */
    enum split_behavior behavior;
    const char *base;
    size_t start, end; /* of the pending piece */
    bool pending, previous_match;
    bool first;
};

static enum status emit(struct piece_merger *m)
{
    if (!m->pending || m->start == m->end)
        return STATUS_OK;
    struct text piece = {m->base + m->start, m->end - m->start};
    return run_from(m->e, m->step, piece, m->first && m->start == 0);
}

/* Whether a segment extends the pending piece instead of beginning another. */
static bool joins(const struct piece_merger *m, bool is_match)
{
    switch (m->behavior) {
    case SPLIT_MERGED_WITH_PREVIOUS:
        return is_match && !m->previous_match;
    case SPLIT_MERGED_WITH_NEXT:
        return !is_match && m->previous_match;
    case SPLIT_CONTIGUOUS:
        return is_match == m->previous_match;
    default:
        return false;
    }
}

static enum status add_segment(struct piece_merger *m, size_t start, size_t end, bool is_match)
{
    if (m->pending && joins(m, is_match)) {
        m->end = end;
        m->previous_match = is_match;
        return STATUS_OK;
    }
    enum status st = emit(m);
    m->start = start;
    m->end = end;
    m->pending = !(is_match && m->behavior == SPLIT_REMOVED);
    m->previous_match = is_match;
    return st;
}

static enum status split(struct encoder *e, int step, struct text text, bool first)
{
    const struct word_step *s = &e->tokenizer->splitter.steps[step];
    struct piece_merger m = {
        .e = e, .step = step + 1, .behavior = s->behavior, .base = text.data, .first = first};
    size_t at = 0;
    enum status st = STATUS_OK;
    while (!st && at < text.n) {
        bool found = false;
        size_t start = text.n, end = text.n;
        st = pattern_find(&s->pattern, e->match, text.data, text.n, at, &found, &start, &end,
                          e->err);
        if (!st && (!found || start > at))
            st = add_segment(&m, at, found ? start : text.n, s->invert);
        if (!st && found)
            st = add_segment(&m, start, end, !s->invert);
        at = found ? end : text.n;
    }
    return st ? st : emit(&m);
}

static bool starts_with(struct text text, struct text start)
{
    return text.n >= start.n && memcmp(text.data, start.data, start.n) == 0;
}

/* Steps that rewrite their piece, into the step's own buffer. */
static enum status rewrite(struct encoder *e, int step, struct text text, bool first)
{
    static const struct text space = {" ", 1};
    const struct word_step *s = &e->tokenizer->splitter.steps[step];
    struct bytes *out = &e->step_text[step];
    out->n = 0;
    if (s->kind == WORDS_BYTES) {
        map_bytes(text, out);
    } else if (s->kind == WORDS_SPACE) {
        if (starts_with(text, space))
            return run_from(e, step + 1, text, first);
        bytes_append(out, space.data, space.n);
        bytes_append(out, text.data, text.n);
    } else {
        bool wanted = s->prepend == PREPEND_ALWAYS || (s->prepend == PREPEND_FIRST && first);
        if (wanted && !starts_with(text, s->text) && !starts_with(text, space))
            bytes_append(out, s->text.data, s->text.n);
        text_replace(text, space, s->text, out);
    }
    if (out->failed)
        return fail(e->err, STATUS_NOMEM, "tokenizer: out of memory splitting %zu bytes", text.n);
    return run_from(e, step + 1, (struct text){out->data, out->n}, first);
}

static enum status run_from(struct encoder *e, int step, struct text text, bool first)
{
    const struct tokenizer *t = e->tokenizer;
    if (step == t->splitter.n_steps)
        return bpe_encode(&t->bpe, &e->bpe, text.data, text.n, e->out, e->err);
    if (t->splitter.steps[step].kind == WORDS_SPLIT)
        return split(e, step, text, first);
    return rewrite(e, step, text, first);
}

enum status splitter_run(struct encoder *e, struct text text, bool first)
{
    return text.n ? run_from(e, 0, text, first) : STATUS_OK;
}
