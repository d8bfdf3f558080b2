/* detokenizer.c - ids to text, one id at a time.
 *
 * Every id's piece went through the stateless steps at load. What is left here is what depends
 * on neighbours: runs of bytes, the first token, incomplete characters, strips at the ends.
 */
#include <string.h>

#include "engine/base/utf8.h"
#include "weights/tokenizer_internal.h"

static const char REPLACEMENT[] = "\xEF\xBF\xBD";

/* ---- pieces ---- */

static int hex_value(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    if (c >= 'a' && c <= 'f')
        return c - 'a' + 10;
    return c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

/* The byte that <0xAB> stands for, -1 for other texts. The reference's number parser takes a
 * plus sign, too. */
static int byte_token(struct text text)
{
    if (text.n != 6 || memcmp(text.data, "<0x", 3) != 0 || text.data[5] != '>')
        return -1;
    int high = text.data[3] == '+' ? 0 : hex_value(text.data[3]), low = hex_value(text.data[4]);
    return high < 0 || low < 0 ? -1 : 16 * high + low;
}

/* Byte-level characters back to bytes; a text with any other character stays as it is. */
static void unmap_bytes(struct text text, struct bytes *out)
{
    size_t before = out->n;
    for (size_t at = 0; at < text.n;) {
        uint32_t c = 0;
        at += (size_t)utf8_decode(text.data + at, text.n - at, &c);
        int byte = char_to_byte(c);
        if (byte < 0) {
            out->n = before;
            bytes_append(out, text.data, text.n);
            return;
        }
        bytes_char(out, (char)byte);
    }
}

static bool build_piece(const struct decode_chain *chain, struct piece *piece, struct bytes pair[2])
{
    int turn = 0;
    for (int i = 0; i < chain->n_replace; i++, turn = 1 - turn) {
        pair[turn].n = 0;
        text_replace(piece->text, chain->from[i], chain->to[i], &pair[turn]);
        piece->text = (struct text){pair[turn].data ? pair[turn].data : "", pair[turn].n};
    }
    struct bytes *out = &pair[turn];
    int byte = chain->byte_fallback ? byte_token(piece->text) : -1;
    if (byte >= 0 || chain->join == JOIN_BYTES) {
        out->n = 0;
        if (byte >= 0)
            bytes_char(out, (char)byte);
        else
            unmap_bytes(piece->text, out);
        piece->text = (struct text){out->data ? out->data : "", out->n};
    }
    piece->byte = byte >= 0;
    return !pair[0].failed && !pair[1].failed;
}

enum status pieces_build(struct tokenizer *t, struct error *err)
{
    struct bytes pair[2] = {{0}};
    bool ok = true;
    for (int32_t id = 0; id < t->size && ok; id++) {
        struct piece *piece = &t->pieces[id];
        if (!piece->text.data)
            continue;
        const char *before = piece->text.data;
        ok = build_piece(&t->chain, piece, pair);
        if (ok && piece->text.data != before) {
            piece->text.data = arena_copy(&t->arena, piece->text.data, piece->text.n);
            ok = piece->text.data;
        }
    }
    bytes_free(&pair[0]);
    bytes_free(&pair[1]);
    return ok ? STATUS_OK : fail(err, STATUS_NOMEM, "tokenizer: out of memory for the pieces");
}

void tokenizer_piece(const struct tokenizer *t, int32_t id, struct bytes *out)
{
    if (id < 0 || id >= t->size || !t->pieces[id].text.data)
        return;
    struct text text = t->pieces[id].text;
    char character[4];
    uint32_t mark = t->chain.metaspace;
    if (mark && !t->pieces[id].byte)
        text_replace(text, (struct text){character, (size_t)utf8_encode(mark, character)},
                     (struct text){" ", 1}, out);
    else
        bytes_append(out, text.data, text.n);
}

/* ---- output ---- */

/* text is whole characters; the first few may have to be stripped. */
static void put_text(struct detokenizer *d, const char *text, size_t n, struct bytes *out)
{
    size_t at = 0;
    while (at < n && d->strip_left) {
        uint32_t c = 0;
        int step = utf8_decode(text + at, n - at, &c);
        if (c != d->tokenizer->chain.strip) {
            d->strip_left = 0;
            break;
        }
        d->strip_left--;
        at += (size_t)step;
    }
    bytes_append(out, text + at, n - at);
}

/* ---- joining ---- */

/* Bytes that may be parts of characters; what is wrong becomes U+FFFD. */
static void put_bytes(struct detokenizer *d, const char *bytes, size_t n, struct bytes *out)
{
    size_t at = 0;
    while (d->n_held && at < n) { /* complete the character held back, byte by byte */
        d->held[d->n_held++] = (unsigned char)bytes[at++];
        int step = utf8_next((char *)d->held, (size_t)d->n_held);
        if (step > 0) {
            put_text(d, (char *)d->held, (size_t)step, out);
            d->n_held = 0;
        } else if (step < 0) { /* the new byte does not belong to it: look at it again */
            put_text(d, REPLACEMENT, 3, out);
            d->n_held = 0;
            at--;
        }
    }
    while (at < n) {
        size_t valid = utf8_valid_prefix(bytes + at, n - at);
        put_text(d, bytes + at, valid, out);
        at += valid;
        if (at == n)
            break;
        int step = utf8_next(bytes + at, n - at);
        if (step == 0) {
            d->n_held = (int)(n - at);
            memcpy(d->held, bytes + at, n - at);
            break;
        }
        put_text(d, REPLACEMENT, 3, out);
        at += (size_t)-step;
    }
}

/* The metaspace step: in the first token the mark disappears, elsewhere it is a space. */
static void put_metaspace(struct detokenizer *d, const char *text, size_t n, struct bytes *out)
{
    const struct decode_chain *chain = &d->tokenizer->chain;
    bool drop = !d->started && chain->metaspace_prefix;
    for (size_t at = 0; at < n;) {
        uint32_t c = 0;
        int step = utf8_decode(text + at, n - at, &c);
        if (c != chain->metaspace)
            put_text(d, text + at, (size_t)step, out);
        else if (!drop)
            put_text(d, " ", 1, out);
        at += (size_t)step;
    }
}

static void put_token(struct detokenizer *d, const char *text, size_t n, struct bytes *out)
{
    const struct decode_chain *chain = &d->tokenizer->chain;
    if (chain->metaspace)
        put_metaspace(d, text, n, out);
    else if (chain->join == JOIN_BYTES)
        put_bytes(d, text, n, out);
    else
        put_text(d, text, n, out);
    d->started = true;
}

/* A run of byte tokens is a text, or as many U+FFFD as it has bytes. */
static void flush_run(struct detokenizer *d, struct bytes *out)
{
    struct bytes *run = &d->run;
    if (run->n == 0)
        return;
    if (utf8_valid_prefix(run->data, run->n) == run->n)
        put_token(d, run->data, run->n, out);
    else
        for (size_t i = 0; i < run->n; i++)
            put_token(d, REPLACEMENT, 3, out);
    run->n = 0;
}

/* ---- the public functions ---- */

void detokenizer_init(struct detokenizer *d, const struct tokenizer *t, bool skip_special)
{
    *d = (struct detokenizer){.tokenizer = t, .skip_special = skip_special};
    d->strip_left = t->chain.strip_start;
}

void detokenizer_push(struct detokenizer *d, int32_t id, struct bytes *out)
{
    const struct tokenizer *t = d->tokenizer;
    if (id < 0 || id >= t->size || !t->pieces[id].text.data)
        return;
    const struct piece *piece = &t->pieces[id];
    if (piece->skipped && d->skip_special)
        return;
    if (piece->byte) {
        bytes_append(&d->run, piece->text.data, piece->text.n);
        out->failed |= d->run.failed;
        return;
    }
    flush_run(d, out);
    if (t->chain.join == JOIN_SPACES && d->started)
        put_text(d, " ", 1, out);
    put_token(d, piece->text.data, piece->text.n, out);
}

void detokenizer_finish(struct detokenizer *d, struct bytes *out)
{
    flush_run(d, out);
    if (d->n_held)
        put_text(d, REPLACEMENT, 3, out);
    d->n_held = 0;
    detokenizer_free(d);
}

void detokenizer_free(struct detokenizer *d)
{
    bytes_free(&d->run);
}

enum status tokenizer_decode(const struct tokenizer *t, const int32_t *ids, size_t n,
                             bool skip_special, struct bytes *out, struct error *err)
{
    struct detokenizer d;
    detokenizer_init(&d, t, skip_special);
    for (size_t i = 0; i < n; i++)
        detokenizer_push(&d, ids[i], out);
    detokenizer_finish(&d, out);
    return out->failed ? fail(err, STATUS_NOMEM, "decoding %zu tokens: out of memory", n)
                       : STATUS_OK;
}
