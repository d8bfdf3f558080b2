/* tokenizer_pattern.c - split patterns.
 *
 * tokenizer.json writes them for Oniguruma. The common part of that dialect is copied to PCRE2
 * construct by construct; where the two mean different things (\s and U+180E, categories of
 * newer Unicode versions) the meaning is spelled out, and what is not surely the same is
 * refused.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/utf8.h"
#include "weights/tokenizer_internal.h"

/* Oniguruma's \s: Unicode White_Space. PCRE2's has U+180E too. */
#define SPACE_CLASS                                                                                \
    "\\t-\\r\\x20\\x{85}\\x{A0}\\x{1680}\\x{2000}-\\x{200A}\\x{2028}\\x{2029}\\x{202F}\\x{205F}"   \
    "\\x{3000}"

enum { MAX_PATTERN = 4096, MAX_GROUPS = 32 };

struct translation {
    const char *source;
    size_t n, at;
    struct bytes out;
    bool caseless[MAX_GROUPS]; /* by depth of groups */
    int depth;
    bool quantifiable; /* an atom stands before at */
    struct error *err;
};

static enum status refuse(struct translation *t, const char *what)
{
    return fail(t->err, STATUS_UNSUPPORTED,
                "split pattern \"%.*s\": %s at byte %zu is not supported",
                (int)(t->n > 200 ? 200 : t->n), t->source, what, t->at);
}

static bool looking_at(const struct translation *t, const char *text)
{
    size_t n = strlen(text);
    return t->n - t->at >= n && memcmp(t->source + t->at, text, n) == 0;
}

/* \p{Name}: appends the inside of a class. */
static enum status translate_category(struct translation *t, bool negated_allowed)
{
    bool negated = t->source[t->at + 1] == 'P';
    const char *open = t->source + t->at + 2;
    const char *close = t->at + 2 < t->n && *open == '{'
                            ? memchr(open, '}', t->n - (size_t)(open - t->source))
                            : NULL;
    if (!close || (negated && !negated_allowed))
        return refuse(t, "this form of \\p");
    if (t->caseless[t->depth])
        return refuse(t, "\\p inside (?i:");
    size_t length = (size_t)(close - open - 1);
    for (const struct unicode_class *c = tokenizer_classes; c->name; c++) {
        if (strlen(c->name) != length || memcmp(c->name, open + 1, length) != 0)
            continue;
        if (negated_allowed)
            bytes_text(&t->out, negated ? "[^" : "[");
        bytes_format(&t->out, "\\p{%s}%s", c->name, c->newer);
        if (negated_allowed)
            bytes_char(&t->out, ']');
        t->at = (size_t)(close - t->source) + 1;
        return STATUS_OK;
    }
    return refuse(t, "this property");
}

/* A backslash and what follows, inside or outside a class. */
static enum status translate_escape(struct translation *t, bool in_class)
{
    if (t->at + 1 >= t->n)
        return refuse(t, "a backslash at the end");
    char c = t->source[t->at + 1];
    if (c == 'p' || c == 'P')
        return translate_category(t, !in_class);
    if (c == 's')
        bytes_text(&t->out, in_class ? SPACE_CLASS : "[" SPACE_CLASS "]");
    else if (c == 'S' && !in_class)
        bytes_text(&t->out, "[^" SPACE_CLASS "]");
    else if (c == 'r' || c == 'n' || c == 't' || c == 'f' || (c >= '!' && c <= '/') ||
             (c >= ':' && c <= '@') || (c >= '[' && c <= '`') || (c >= '{' && c <= '~'))
        bytes_append(&t->out, t->source + t->at, 2);
    else
        return refuse(t, "this escape");
    t->at += 2;
    return STATUS_OK;
}

/* One plain character, whatever its length. */
static enum status copy_character(struct translation *t)
{
    uint32_t code_point;
    int n = utf8_decode(t->source + t->at, t->n - t->at, &code_point);
    if (n == 0)
        return refuse(t, "invalid UTF-8");
    if (t->caseless[t->depth] && n > 1)
        return refuse(t, "a character outside ASCII inside (?i:");
    bytes_append(&t->out, t->source + t->at, (size_t)n);
    t->at += (size_t)n;
    return STATUS_OK;
}

/* Oniguruma lets a ligature match its letters when case is ignored; PCRE2 does not. */
static bool is_ligature(const struct translation *t)
{
    static const char *const pairs[] = {"ss", "ff", "fi", "fl", "st"};
    for (size_t i = 0; i < sizeof(pairs) / sizeof(pairs[0]); i++)
        if (t->n - t->at >= 2 && strncasecmp(t->source + t->at, pairs[i], 2) == 0)
            return true;
    return false;
}

/* A dash in a class stands first, last, or between two plain characters. */
static bool dash_is_plain(const struct translation *t, bool first, bool after_class)
{
    if (t->source[t->at] != '-' || first)
        return true;
    if (t->at + 1 < t->n && t->source[t->at + 1] == ']')
        return true;
    return !after_class && t->at + 1 < t->n && t->source[t->at + 1] != '\\';
}

static enum status translate_class(struct translation *t)
{
    bytes_char(&t->out, '[');
    t->at++;
    if (looking_at(t, "^")) {
        bytes_char(&t->out, '^');
        t->at++;
    }
    bool first = true, after_class = false;
    while (t->at < t->n && (t->source[t->at] != ']' || first)) {
        char c = t->source[t->at];
        if (c == '[' || c == ']' || looking_at(t, "&&") || !dash_is_plain(t, first, after_class))
            return refuse(t, "this form of a class");
        after_class = c == '\\';
        enum status st = c == '\\' ? translate_escape(t, true) : copy_character(t);
        if (st)
            return st;
        first = false;
    }
    if (t->at >= t->n)
        return refuse(t, "a class without an end");
    bytes_char(&t->out, ']');
    t->at++;
    return STATUS_OK;
}

static enum status translate_group(struct translation *t)
{
    static const char *const openings[] = {"(?i:", "(?:", "(?=", "(?!", "(?<=", "(?<!"};
    if (t->depth + 1 >= MAX_GROUPS)
        return refuse(t, "deeper nesting");
    const char *opening = NULL;
    for (size_t i = 0; i < sizeof(openings) / sizeof(openings[0]) && !opening; i++)
        if (looking_at(t, openings[i]))
            opening = openings[i];
    if (!opening && looking_at(t, "(?"))
        return refuse(t, "this kind of group");
    if (!opening)
        opening = "(";
    t->caseless[t->depth + 1] = t->caseless[t->depth] || strcmp(opening, "(?i:") == 0;
    t->depth++;
    bytes_text(&t->out, opening);
    t->at += strlen(opening);
    return STATUS_OK;
}

/* {n}, {n,} or {n,m}; other uses of braces differ between the dialects. */
static bool read_braces(struct translation *t)
{
    size_t at = t->at + 1, digits = 0;
    for (bool comma = false; at < t->n; at++) {
        char c = t->source[at];
        if (c >= '0' && c <= '9')
            digits++;
        else if (c == ',' && digits && !comma)
            comma = true;
        else
            break;
    }
    if (!digits || digits > 8 || at >= t->n || t->source[at] != '}')
        return false;
    at++;
    if (at < t->n && strchr("+?*{", t->source[at]))
        return false;
    bytes_append(&t->out, t->source + t->at, at - t->at);
    t->at = at;
    return true;
}

static enum status translate_quantifier(struct translation *t)
{
    if (!t->quantifiable)
        return refuse(t, "a quantifier without an atom");
    t->quantifiable = false;
    if (t->source[t->at] == '{')
        return read_braces(t) ? STATUS_OK : refuse(t, "this form of {}");
    bytes_char(&t->out, t->source[t->at++]);
    if (t->at < t->n && (t->source[t->at] == '+' || t->source[t->at] == '?'))
        bytes_char(&t->out, t->source[t->at++]); /* possessive, lazy */
    return STATUS_OK;
}

static enum status translate_one(struct translation *t)
{
    char c = t->source[t->at];
    if (strchr("*+?{", c))
        return translate_quantifier(t);
    if (strchr(".^$}]", c))
        return refuse(t, "this character");
    t->quantifiable = c != '|' && c != '(';
    if (c == '(')
        return translate_group(t);
    if (c == ')') {
        if (t->depth == 0)
            return refuse(t, "an unopened group");
        t->depth--;
    }
    if (c == '[')
        return translate_class(t);
    if (c == '\\')
        return translate_escape(t, false);
    if (t->caseless[t->depth] && is_ligature(t))
        return refuse(t, "a pair with a ligature inside (?i:");
    return copy_character(t);
}

/* ---- compiling ---- */

static enum status compile(struct pattern *p, const char *source, size_t n, struct error *err)
{
    int code = 0;
    PCRE2_SIZE offset = 0;
    pcre2_code *compiled =
        pcre2_compile((PCRE2_SPTR)source, n, PCRE2_UTF | PCRE2_UCP, &code, &offset, NULL);
    if (code == PCRE2_ERROR_HEAP_FAILED)
        return fail(err, STATUS_NOMEM, "split pattern: out of memory");
    if (!compiled && code == PCRE2_ERROR_HEAP_FAILED)
        return fail(err, STATUS_NOMEM, "split pattern: out of memory");
    if (!compiled) {
        PCRE2_UCHAR message[128] = "";
        pcre2_get_error_message(code, message, sizeof(message));
        return fail(err, STATUS_INVALID, "split pattern: %s at byte %zu of \"%.200s\"",
                    (const char *)message, (size_t)offset, source);
    }
    uint32_t matches_empty = 0;
    pcre2_pattern_info(compiled, PCRE2_INFO_MATCHEMPTY, &matches_empty);
    if (matches_empty) {
        pcre2_code_free(compiled);
        return fail(err, STATUS_UNSUPPORTED,
                    "split pattern \"%.200s\": patterns that match the empty text are not "
                    "supported",
                    source);
    }
    pcre2_jit_compile(compiled, PCRE2_JIT_COMPLETE); /* without JIT it is slower, that is all */
    *p = (struct pattern){.code = compiled};
    return STATUS_OK;
}

enum status pattern_compile_own(struct pattern *p, const char *source, struct error *err)
{
    return compile(p, source, strlen(source), err);
}

enum status pattern_compile(struct pattern *p, const char *source, size_t n, struct error *err)
{
    if (n == 0 || n > MAX_PATTERN)
        return fail(err, STATUS_UNSUPPORTED, "split pattern of %zu bytes: 1 to %d are supported", n,
                    (int)MAX_PATTERN);
    struct translation t = {.source = source, .n = n, .err = err};
    enum status st = STATUS_OK;
    while (!st && t.at < n)
        st = translate_one(&t);
    if (!st && t.depth)
        st = refuse(&t, "an unclosed group");
    if (!st && t.out.failed)
        st = fail(err, STATUS_NOMEM, "split pattern: out of memory");
    if (!st)
        st = compile(p, t.out.data, t.out.n, err);
    bytes_free(&t.out);
    return st;
}

void pattern_free(struct pattern *p)
{
    pcre2_code_free(p->code);
    *p = (struct pattern){0};
}

/* ---- matching ---- */

/* Steps grow with the text: a greedy run may be walked back once per alternative. Beyond that
 * a pattern is backtracking wildly, and the text is refused rather than waited for. */
static pcre2_match_context *match_limits(size_t n)
{
    pcre2_match_context *context = pcre2_match_context_create(NULL);
    if (!context)
        return NULL;
    size_t steps = 10000000 + (n < UINT32_MAX / 64 ? 32 * n : UINT32_MAX / 2);
    pcre2_set_match_limit(context, (uint32_t)steps);
    pcre2_set_heap_limit(context, 256 * 1024);
    return context;
}

/* Texts too long for the defaults, or for the compiled code's stack, go through the
 * interpreter, whose memory is on the heap. */
static int match_slowly(const struct pattern *p, pcre2_match_data *data, const char *text, size_t n,
                        size_t from)
{
    pcre2_match_context *context = match_limits(n);
    if (!context)
        return PCRE2_ERROR_NOMEMORY;
    int rc = pcre2_match(p->code, (PCRE2_SPTR)text, n, from, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT,
                         data, context);
    pcre2_match_context_free(context);
    return rc;
}

static enum status find_code(const struct pattern *p, pcre2_match_data *data, const char *text,
                             size_t n, size_t from, bool *found, struct error *err)
{
    int rc = pcre2_match(p->code, (PCRE2_SPTR)text, n, from, PCRE2_NO_UTF_CHECK, data, NULL);
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT || rc == PCRE2_ERROR_MATCHLIMIT ||
        rc == PCRE2_ERROR_HEAPLIMIT)
        rc = match_slowly(p, data, text, n, from);
    *found = rc >= 0;
    if (rc >= 0 || rc == PCRE2_ERROR_NOMATCH)
        return STATUS_OK;
    if (rc == PCRE2_ERROR_NOMEMORY)
        return fail(err, STATUS_NOMEM, "tokenizer: out of memory splitting %zu bytes", n);
    return fail(err, STATUS_UNSUPPORTED,
                "tokenizer: the split pattern gives up on a text of %zu bytes (PCRE2 error %d)", n,
                rc);
}

enum status pattern_find(const struct pattern *p, pcre2_match_data *data, const char *text,
                         size_t n, size_t from, bool *found, size_t *start, size_t *end,
                         struct error *err)
{
    if (!p->code) {
        const char *hit = memmem(text + from, n - from, p->literal.data, p->literal.n);
        *found = hit;
        *start = hit ? (size_t)(hit - text) : n;
        *end = *start + (hit ? p->literal.n : 0);
        return STATUS_OK;
    }
    enum status st = find_code(p, data, text, n, from, found, err);
    if (!st && *found) {
        PCRE2_SIZE *pair = pcre2_get_ovector_pointer(data);
        *start = pair[0];
        *end = pair[1];
    }
    return st;
}
