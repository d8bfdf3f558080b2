/* documents.h - a text as the documents it is made of, in tokens.
 *
 * A line <|endoftext|> ends a document, as in the files that models here are trained on. That line
 * and the newline before it belong to none; lines may end with CR LF. Documents of white space
 * alone are left out. A text without such a line is one document.
 *
 * Threads: main only. Memory: documents_free. Errors: those of text.h and the tokenizer.
 */
#ifndef LATTE_RUN_DOCUMENTS_H
#define LATTE_RUN_DOCUMENTS_H

#include <stddef.h>

#include "engine/base/bytes.h"
#include "engine/base/error.h"
#include "weights/tokenizer.h"

struct document {
    size_t begin, n_bytes;    /* in the text */
    struct token_list tokens; /* owned */
};

struct documents {
    struct bytes text;
    struct document *items; /* [n], owned */
    size_t n;
};

/* Read a file, or stdin for "-". out is zeroed; documents_free is due whatever is returned. */
enum status documents_read(struct documents *out, const char *path, struct error *err);
enum status documents_encode(struct documents *d, const struct tokenizer *t, struct error *err);
/* Keep the first n tokens of those that have as many; their n_bytes are no longer known: 0. */
void documents_cut(struct documents *d, size_t n);
size_t documents_tokens(const struct documents *d);
size_t documents_bytes(const struct documents *d);
void documents_free(struct documents *d);

#endif
