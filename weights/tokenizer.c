/* tokenizer.c - the public functions: opening, looking up, and encoding from end to end. */
#include "weights/tokenizer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "engine/base/file.h"
#include "engine/base/utf8.h"
#include "weights/tokenizer_internal.h"

enum { MAX_FILE_BYTES = 256 * 1024 * 1024 };

void token_list_free(struct token_list *list)
{
    free(list->ids);
    list->ids = NULL;
    list->n = list->cap = 0;
}

/* ---- opening ---- */

static void set_fingerprint(struct tokenizer *t, const struct bytes *file)
{
    XXH128_canonical_t canonical;
    XXH128_canonicalFromHash(&canonical, XXH3_128bits(file->data, file->n));
    for (size_t i = 0; i < sizeof(canonical.digest); i++)
        snprintf(t->fingerprint + 2 * i, 3, "%02x", canonical.digest[i]);
}

enum status tokenizer_open(struct tokenizer **out, const char *path, struct error *err)
{
    struct tokenizer *t = calloc(1, sizeof(*t));
    if (!t)
        return fail(err, STATUS_NOMEM, "tokenizer %s: out of memory", path);
    struct bytes file = {0};
    enum status st = file_read(&file, path, MAX_FILE_BYTES, err);
    if (!st) {
        set_fingerprint(t, &file);
        st = tokenizer_load(t, file.data ? file.data : "", file.n, err);
        if (st)
            fail_context(err, "%s", path);
    }
    bytes_free(&file);
    if (st) {
        tokenizer_close(t);
        return st;
    }
    *out = t;
    return STATUS_OK;
}

void tokenizer_close(struct tokenizer *t)
{
    if (!t)
        return;
    for (int i = 0; i < t->splitter.n_steps; i++)
        pattern_free(&t->splitter.steps[i].pattern);
    pattern_free(&t->added.word);
    arena_free(&t->arena);
    free(t);
}

/* ---- looking up ---- */

int32_t tokenizer_size(const struct tokenizer *t)
{
    return t->size;
}

const char *tokenizer_fingerprint(const struct tokenizer *t)
{
    return t->fingerprint;
}

int32_t tokenizer_find(const struct tokenizer *t, const char *content, size_t n)
{
    int32_t id = string_map_get(&t->added.ids, content, n);
    return id >= 0 ? id : string_map_get(&t->bpe.vocab, content, n);
}

bool tokenizer_is_special(const struct tokenizer *t, int32_t id)
{
    return id >= 0 && id < t->size && t->pieces[id].special;
}

/* ---- encoding: raw tokens, normalizing, normalized tokens, words, ids ---- */

static enum status visit_normalized(struct encoder *e, const struct added_part *part)
{
    if (part->id >= 0)
        return token_list_push(e->out, part->id, e->err);
    return splitter_run(e, part->text, part->first && e->at_start);
}

static enum status visit_raw(struct encoder *e, const struct added_part *part)
{
    const struct tokenizer *t = e->tokenizer;
    if (part->id >= 0)
        return token_list_push(e->out, part->id, e->err);
    struct text text;
    enum status st = normalizer_run(&t->normalizer, part->text, e->normalized, &text, e->err);
    e->at_start = part->first;
    return st ? st : added_split(&t->added, &t->added.normalized, e, text, visit_normalized);
}

static enum status push_all(struct token_list *out, const int32_t *ids, int n, struct error *err)
{
    enum status st = STATUS_OK;
    for (int i = 0; i < n && !st; i++)
        st = token_list_push(out, ids[i], err);
    return st;
}

static enum status encode(struct encoder *e, struct text text)
{
    const struct tokenizer *t = e->tokenizer;
    bool special = e->flags & TOKENIZER_ADD_SPECIAL;
    enum status st = STATUS_OK;
    if (special)
        st = push_all(e->out, t->prefix, t->n_prefix, e->err);
    if (!st)
        st = added_split(&t->added, &t->added.raw, e, text, visit_raw);
    if (!st && special)
        st = push_all(e->out, t->suffix, t->n_suffix, e->err);
    return st;
}

static void encoder_free(struct encoder *e)
{
    pcre2_match_data_free(e->match);
    bpe_scratch_free(&e->bpe);
    bytes_free(&e->normalized[0]);
    bytes_free(&e->normalized[1]);
    for (int i = 0; i < TOKENIZER_MAX_STEPS; i++)
        bytes_free(&e->step_text[i]);
}

enum status tokenizer_encode(const struct tokenizer *t, const char *text, size_t n, unsigned flags,
                             struct token_list *out, struct error *err)
{
    size_t valid = utf8_valid_prefix(text, n);
    if (valid != n)
        return fail(err, STATUS_INVALID, "the text is not valid UTF-8 at byte %zu", valid);
    size_t before = out->n;
    struct encoder e = {.tokenizer = t, .out = out, .err = err, .flags = flags};
    e.match = pcre2_match_data_create(1, NULL);
    enum status st = e.match ? encode(&e, (struct text){text, n})
                             : fail(err, STATUS_NOMEM, "tokenizer: out of memory");
    encoder_free(&e);
    if (st)
        out->n = before;
    return st;
}
