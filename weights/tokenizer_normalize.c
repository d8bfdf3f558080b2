/* tokenizer_normalize.c - normalizers: Prepend, Replace and NFC.
 *
 * NFC takes decompositions, classes and compositions from utf8proc, but orders marks itself:
 * utf8proc's own ordering is quadratic in the length of a run of marks.
 */
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

#include "engine/base/utf8.h"
#include "weights/tokenizer_internal.h"

void text_replace(struct text text, struct text from, struct text to, struct bytes *out)
{
    const char *at = text.data, *end = text.data + text.n;
    while (at < end) {
        const char *hit = memmem(at, (size_t)(end - at), from.data, from.n);
        if (!hit)
            break;
        bytes_append(out, at, (size_t)(hit - at));
        bytes_append(out, to.data, to.n);
        at = hit + from.n;
    }
    bytes_append(out, at, (size_t)(end - at));
}

/* ---- NFC ---- */

/* A code point that the reference's older tables do not know: nothing composes across it. */
static bool is_unknown(uint32_t c)
{
    const struct code_range *r = tokenizer_nfc_unknown;
    if (c < r->first)
        return false;
    for (; r->last; r++)
        if (c <= r->last)
            return c >= r->first;
    return false;
}

/* Below U+0300 everything is in NFC already, whatever stands beside it. */
static bool is_surely_nfc(struct text text)
{
    for (size_t i = 0; i < text.n; i++)
        if ((unsigned char)text.data[i] >= 0xCC)
            return false;
    return true;
}

struct marked {
    int32_t code_point;
    uint8_t class;
};

/* Order runs of marks (class not 0) by class, keeping equals in order: a counting sort. */
static void order_marks(struct marked *m, size_t n, struct marked *spare)
{
    for (size_t start = 0; start < n;) {
        size_t end = start;
        size_t place[256] = {0};
        while (end < n && m[end].class)
            place[m[end++].class]++;
        size_t run = end - start;
        if (run > 1) {
            for (size_t c = 0, sum = 0; c < 256; c++) {
                size_t count = place[c];
                place[c] = sum;
                sum += count;
            }
            for (size_t i = start; i < end; i++)
                spare[place[m[i].class]++] = m[i];
            memcpy(m + start, spare, run * sizeof(*m));
        }
        start = end + 1;
        while (start < n && !m[start].class)
            start++;
    }
}

/* Memory of one NFC pass, grown to the longest segment. A code point decomposes into at most
 * four, and takes at least one byte. */
struct nfc_work {
    struct marked *marks, *spare; /* [cap] */
    int32_t *points;              /* [cap] */
    size_t cap;
};

static void nfc_work_free(struct nfc_work *w)
{
    free(w->marks);
    free(w->spare);
    free(w->points);
    *w = (struct nfc_work){0};
}

static bool nfc_work_reserve(struct nfc_work *w, size_t n_bytes)
{
    if (n_bytes <= w->cap / 4)
        return true;
    nfc_work_free(w);
    if (n_bytes > SIZE_MAX / 64)
        return false;
    w->cap = 4 * n_bytes;
    w->marks = calloc(w->cap, sizeof(*w->marks));
    w->spare = calloc(w->cap, sizeof(*w->spare));
    w->points = calloc(w->cap, sizeof(*w->points));
    return w->marks && w->spare && w->points;
}

static size_t decompose(const char *text, size_t n, struct marked *out, size_t cap)
{
    size_t count = 0;
    for (size_t at = 0; at < n;) {
        uint32_t code_point = 0;
        int step = utf8_decode(text + at, n - at, &code_point);
        int32_t parts[8];
        utf8proc_ssize_t n_parts = utf8proc_decompose_char(
            (int32_t)code_point, parts, 8, UTF8PROC_DECOMPOSE | UTF8PROC_STABLE, NULL);
        CHECK(step > 0 && n_parts > 0 && n_parts <= 8 && count + (size_t)n_parts <= cap);
        for (utf8proc_ssize_t i = 0; i < n_parts; i++) {
            const utf8proc_property_t *p = utf8proc_get_property(parts[i]);
            out[count++] = (struct marked){parts[i], (uint8_t)p->combining_class};
        }
        at += (size_t)step;
    }
    return count;
}

/* Compose text, which holds no unknown code point. */
static bool compose(struct nfc_work *w, const char *text, size_t n, struct bytes *out)
{
    if (!nfc_work_reserve(w, n))
        return false;
    size_t count = decompose(text, n, w->marks, w->cap);
    order_marks(w->marks, count, w->spare);
    for (size_t i = 0; i < count; i++)
        w->points[i] = w->marks[i].code_point;
    utf8proc_ssize_t length = utf8proc_normalize_utf32(w->points, (utf8proc_ssize_t)count,
                                                       UTF8PROC_COMPOSE | UTF8PROC_STABLE);
    for (utf8proc_ssize_t i = 0; i < length; i++) {
        char character[4];
        bytes_append(out, character, (size_t)utf8_encode((uint32_t)w->points[i], character));
    }
    return true;
}

/* Whether text may be cut before c without changing its NFC: a starter of a block in which
 * nothing composes with what stands before it. Common letters suffice; cutting saves memory. */
static bool may_cut_before(uint32_t c)
{
    return c < 0x300 || (((c >= 0x370 && c < 0x530) || (c >= 0x3040 && c < 0xA000) ||
                          (c >= 0xAC00 && c < 0xD7A4)) &&
                         utf8proc_get_property((int32_t)c)->combining_class == 0);
}

/* The end of the segment that begins at from: an unknown code point of length *step, or, with
 * *step 0, a place to cut or the end of the text. */
static size_t segment_end(struct text in, size_t from, int *step)
{
    enum { SEGMENT_BYTES = 4096 };
    uint32_t code_point = 0;
    for (size_t at = from; at < in.n; at += (size_t)*step) {
        *step = utf8_decode(in.data + at, in.n - at, &code_point);
        if (is_unknown(code_point))
            return at;
        if (at - from >= SEGMENT_BYTES && may_cut_before(code_point)) {
            *step = 0;
            return at;
        }
    }
    *step = 0;
    return in.n;
}

static bool nfc(struct text in, struct bytes *out)
{
    struct nfc_work w = {0};
    bool ok = true;
    for (size_t at = 0; ok && at < in.n;) {
        int step = 0;
        size_t end = segment_end(in, at, &step);
        ok = compose(&w, in.data + at, end - at, out);
        bytes_append(out, in.data + end, (size_t)step);
        at = end + (size_t)step;
    }
    nfc_work_free(&w);
    return ok && !out->failed;
}

/* ---- the pipeline ---- */

/* Whether a step leaves text as it is; spares the copy. */
static bool is_idle(const struct normalize_step *s, struct text text)
{
    switch (s->kind) {
    case NORMALIZE_PREPEND:
        return text.n == 0;
    case NORMALIZE_REPLACE:
        return !memmem(text.data, text.n, s->from.data, s->from.n);
    case NORMALIZE_NFC:
        return is_surely_nfc(text);
    }
    return false;
}

static bool run_step(const struct normalize_step *s, struct text in, struct bytes *out)
{
    out->n = 0;
    switch (s->kind) {
    case NORMALIZE_PREPEND:
        bytes_append(out, s->to.data, s->to.n);
        bytes_append(out, in.data, in.n);
        break;
    case NORMALIZE_REPLACE:
        text_replace(in, s->from, s->to, out);
        break;
    case NORMALIZE_NFC:
        return nfc(in, out);
    }
    return !out->failed;
}

enum status normalizer_run(const struct normalizer *z, struct text in, struct bytes pair[2],
                           struct text *out, struct error *err)
{
    int turn = 0;
    for (int i = 0; i < z->n_steps; i++) {
        if (is_idle(&z->steps[i], in))
            continue;
        if (!run_step(&z->steps[i], in, &pair[turn]))
            return fail(err, STATUS_NOMEM, "tokenizer: out of memory normalizing %zu bytes", in.n);
        in = (struct text){pair[turn].data ? pair[turn].data : "", pair[turn].n};
        turn = 1 - turn;
    }
    *out = in;
    return STATUS_OK;
}
