/* documents.c - see documents.h */
#include "engine/run/documents.h"

#include <stdlib.h>
#include <string.h>

#include "engine/run/text.h"

static const char separator[] = "<|endoftext|>";

static bool is_blank(const char *text, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (!strchr(" \t\r\n\f\v", text[i]) || !text[i])
            return false;
    return true;
}

static enum status add(struct documents *d, size_t begin, size_t n_bytes, struct error *err)
{
    if (is_blank(d->text.data + begin, n_bytes))
        return STATUS_OK;
    if ((d->n & (d->n - 1)) == 0) { /* full at each power of two */
        size_t cap = d->n ? 2 * d->n : 1;
        struct document *grown = realloc(d->items, cap * sizeof(*grown));
        if (!grown)
            return fail(err, STATUS_NOMEM, "out of memory for %zu documents", cap);
        d->items = grown;
    }
    d->items[d->n++] = (struct document){.begin = begin, .n_bytes = n_bytes};
    return STATUS_OK;
}

/* Whether a line, which is given without its newline, ends a document. */
static bool is_separator(const char *line, size_t n)
{
    if (n && line[n - 1] == '\r')
        n--;
    return n == sizeof(separator) - 1 && !memcmp(line, separator, n);
}

/* Where the text from begin to end ends without the newline that may be its last. */
static size_t before_newline(const char *text, size_t begin, size_t end)
{
    if (end > begin && text[end - 1] == '\n')
        end--;
    if (end > begin && text[end - 1] == '\r')
        end--;
    return end;
}

static enum status split(struct documents *d, struct error *err)
{
    const char *text = d->text.data;
    size_t begin = 0, next;
    enum status st = STATUS_OK;
    for (size_t line = 0; !st && line < d->text.n; line = next) {
        const char *newline = memchr(text + line, '\n', d->text.n - line);
        size_t end = newline ? (size_t)(newline - text) : d->text.n;
        next = newline ? end + 1 : end;
        if (!is_separator(text + line, end - line))
            continue;
        st = add(d, begin, before_newline(text, begin, line) - begin, err);
        begin = next;
    }
    if (!st && begin < d->text.n)
        st = add(d, begin, d->text.n - begin, err);
    return st;
}

enum status documents_read(struct documents *out, const char *path, struct error *err)
{
    enum status st = text_read(&out->text, path, err);
    return st ? st : split(out, err);
}

enum status documents_encode(struct documents *d, const struct tokenizer *t, struct error *err)
{
    enum status st = STATUS_OK;
    for (size_t i = 0; !st && i < d->n; i++) {
        struct document *item = &d->items[i];
        st = tokenizer_encode(t, d->text.data + item->begin, item->n_bytes, TOKENIZER_ADD_SPECIAL,
                              &item->tokens, err);
    }
    return st;
}

void documents_cut(struct documents *d, size_t n)
{
    size_t kept = 0;
    for (size_t i = 0; i < d->n; i++) {
        struct document item = d->items[i];
        if (item.tokens.n < n) {
            token_list_free(&item.tokens);
            continue;
        }
        item.tokens.n = n;
        item.n_bytes = 0;
        d->items[kept++] = item;
    }
    d->n = kept;
}

size_t documents_tokens(const struct documents *d)
{
    size_t n = 0;
    for (size_t i = 0; i < d->n; i++)
        n += d->items[i].tokens.n;
    return n;
}

size_t documents_bytes(const struct documents *d)
{
    size_t n = 0;
    for (size_t i = 0; i < d->n; i++)
        n += d->items[i].n_bytes;
    return n;
}

void documents_free(struct documents *d)
{
    for (size_t i = 0; i < d->n; i++)
        token_list_free(&d->items[i].tokens);
    free(d->items);
    bytes_free(&d->text);
    *d = (struct documents){0};
}
