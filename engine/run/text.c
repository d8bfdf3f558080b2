/* text.c - see text.h */
#include "engine/run/text.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "engine/base/file.h"
#include "engine/base/utf8.h"

enum { MAX_TEXT_BYTES = 1 << 30 };

static enum status check_utf8(const struct bytes *text, const char *name, struct error *err)
{
    size_t valid = utf8_valid_prefix(text->data, text->n);
    if (valid < text->n)
        return fail(err, STATUS_INVALID, "%s is not UTF-8: byte %zu is 0x%02x", name, valid,
                    (unsigned char)text->data[valid]);
    return STATUS_OK;
}

static enum status read_stdin(struct bytes *out, struct error *err)
{
    char piece[65536];
    size_t n;
    out->limit = MAX_TEXT_BYTES;
    while ((n = fread(piece, 1, sizeof(piece), stdin)) > 0 && !out->failed)
        bytes_append(out, piece, n);
    if (ferror(stdin))
        return fail(err, STATUS_IO, "stdin: %s", strerror(errno));
    if (out->failed)
        return fail(err, STATUS_TOO_LARGE, "stdin has more than %d bytes", MAX_TEXT_BYTES);
    return STATUS_OK;
}

enum status text_read(struct bytes *out, const char *path, struct error *err)
{
    enum status st =
        strcmp(path, "-") ? file_read(out, path, MAX_TEXT_BYTES, err) : read_stdin(out, err);
    return st ? st : check_utf8(out, path, err);
}

enum status text_take(struct bytes *out, const char *text, struct error *err)
{
    bytes_append(out, text, strlen(text));
    return out->failed ? fail(err, STATUS_NOMEM, "prompt: out of memory")
                       : check_utf8(out, "the prompt", err);
}
