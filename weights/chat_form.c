/* chat_form.c - see chat_form.h */
#include "weights/chat_form.h"

#include <string.h>

struct former {
    const char *at, *end;
    struct bytes *out;
    bool in_output;   /* out ends inside {{ }} */
    bool trim_left;   /* the last tag closed with a dash */
    bool after_block; /* the last tag was a block or comment: a newline behind it goes */
    bool line_start;  /* nothing but the template's start or such a newline lies before at */
    struct error *err;
};

static enum status refuse(struct former *f, const char *what)
{
    return fail(f->err, STATUS_UNSUPPORTED, "chat template: %s", what);
}

static bool is_space(char c)
{
    return c == ' ' || (c >= '\t' && c <= '\r');
}

static bool is_name(char c)
{
    return c == '_' || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
}

/* ---- writing ---- */

static bool ends_with(const struct bytes *b, const char *text)
{
    size_t n = strlen(text);
    return b->n >= n && memcmp(b->data + b->n - n, text, n) == 0;
}

/* Begin a literal; one that a + joins to a literal before it continues that one. */
static void open_literal(struct former *f)
{
    if (ends_with(f->out, "'+"))
        f->out->n -= 2;
    else
        bytes_char(f->out, '\'');
}

static void open_output(struct former *f)
{
    bytes_text(f->out, f->in_output ? "+" : "{{");
    f->in_output = true;
}

static void close_output(struct former *f)
{
    if (f->in_output)
        bytes_text(f->out, "}}");
    f->in_output = false;
}

static void put_text(struct former *f, const char *text, size_t n)
{
    if (n == 0)
        return;
    open_output(f);
    open_literal(f);
    for (size_t i = 0; i < n; i++)
        bytes_char(f->out, text[i] == '\'' ? CHAT_FORM_QUOTE : text[i]);
    bytes_char(f->out, '\'');
}

/* ---- tags ---- */

/* Copy the inside of the literal at *at, to its closing quote. */
static bool copy_literal(struct former *f, const char **at)
{
    char quote = *(*at)++;
    for (; *at < f->end && **at != quote; (*at)++) {
        char c = **at;
        if (c == '\\' && *at + 1 < f->end) {
            c = *++*at;
            if (c == 'n')
                bytes_char(f->out, '\n');
            else if (c == '\'' || c == '"')
                bytes_char(f->out, c == '\'' ? CHAT_FORM_QUOTE : c);
            else
                bytes_char(f->out, CHAT_FORM_ESCAPE), bytes_char(f->out, c);
        } else {
            bytes_char(f->out, c == '\'' ? CHAT_FORM_QUOTE : c);
        }
    }
    if (*at >= f->end)
        return false;
    ++*at;
    return true;
}

/* ['name'] becomes .name; false, with nothing done, when at is no such thing. */
static bool copy_attribute(struct former *f, const char **at)
{
    const char *p = *at + 1;
    while (p < f->end && is_space(*p))
        p++;
    if (p >= f->end || (*p != '\'' && *p != '"'))
        return false;
    char quote = *p++;
    const char *name = p;
    while (p < f->end && is_name(*p))
        p++;
    size_t n = (size_t)(p - name);
    if (n == 0 || p >= f->end || *p++ != quote)
        return false;
    while (p < f->end && is_space(*p))
        p++;
    if (p >= f->end || *p != ']')
        return false;
    bytes_char(f->out, '.');
    bytes_append(f->out, name, n);
    *at = p + 1;
    return true;
}

static bool is_postfix_place(const struct bytes *out)
{
    char last = out->n ? out->data[out->n - 1] : 0;
    return is_name(last) || last == ']' || last == ')';
}

/* Space counts only between two names. */
static void copy_code_char(struct former *f, const char *at)
{
    const char *next = at;
    while (next < f->end && is_space(*next))
        next++;
    bool after_name = f->out->n && is_name(f->out->data[f->out->n - 1]);
    if (next == at)
        bytes_char(f->out, *next++);
    else if (after_name && next < f->end && is_name(*next))
        bytes_char(f->out, ' ');
    f->at = next;
}

/* Copy a tag's code up to close ("%}" or "}}"), past it, and note a dash before it. */
static enum status copy_code(struct former *f, const char *close)
{
    while (f->at < f->end) {
        const char *at = f->at;
        bool dash = *at == '-' && f->end - at > 2;
        if (f->end - at >= 2 && memcmp(at + dash, close, 2) == 0) {
            f->trim_left = dash;
            f->at = at + dash + 2;
            return STATUS_OK;
        }
        if (*at == '\'' || *at == '"') {
            open_literal(f);
            if (!copy_literal(f, &f->at))
                break;
            bytes_char(f->out, '\'');
        } else if (*at != '[' || !is_postfix_place(f->out) || !copy_attribute(f, &f->at)) {
            copy_code_char(f, at);
        }
    }
    return refuse(f, "a tag without an end");
}

static enum status skip_comment(struct former *f)
{
    const char *close = memmem(f->at, (size_t)(f->end - f->at), "#}", 2);
    if (!close)
        return refuse(f, "a comment without an end");
    f->trim_left = close > f->at && close[-1] == '-';
    f->at = close + 2;
    f->after_block = true;
    return STATUS_OK;
}

static enum status read_tag(struct former *f)
{
    char kind = f->at[1];
    f->at += 2;
    if (f->at < f->end && *f->at == '+')
        return refuse(f, "whitespace control with a plus sign");
    f->at += f->at < f->end && *f->at == '-';
    f->after_block = kind == '%';
    f->line_start = false;
    if (kind == '#')
        return skip_comment(f);
    if (kind == '%') {
        close_output(f);
        bytes_text(f->out, "{%");
        enum status st = copy_code(f, "%}");
        bytes_text(f->out, "%}");
        return st;
    }
    open_output(f);
    return copy_code(f, "}}");
}

/* ---- text between tags ---- */

static const char *find_tag(const char *at, const char *end)
{
    for (; end - at >= 2; at++)
        if (at[0] == '{' && (at[1] == '%' || at[1] == '{' || at[1] == '#'))
            return at;
    return end;
}

/* Blanks before a block that begins its line go (lstrip_blocks). */
static const char *strip_line_start(const struct former *f, const char *begin, const char *end)
{
    const char *p = end;
    while (p > begin && (p[-1] == ' ' || p[-1] == '\t'))
        p--;
    return (p > begin && p[-1] == '\n') || (p == begin && f->line_start) ? p : end;
}

static void read_text(struct former *f, const char *tag)
{
    const char *begin = f->at, *end = tag;
    if (f->trim_left) {
        while (begin < end && is_space(*begin))
            begin++;
    } else if (f->after_block && begin < end && *begin == '\n') {
        begin++;
        f->line_start = true;
    }
    if (tag == f->end) {
        if (end > begin && end[-1] == '\n')
            end--;
    } else if (tag + 2 < f->end && tag[2] == '-') {
        while (end > begin && is_space(end[-1]))
            end--;
    } else if (tag[1] != '{') {
        end = strip_line_start(f, begin, end);
    }
    put_text(f, begin, (size_t)(end - begin));
    f->at = tag;
    f->trim_left = false;
}

enum status chat_form(const char *source, size_t n, struct bytes *out, struct error *err)
{
    struct former f = {.at = source, .end = source + n, .out = out, .line_start = true, .err = err};
    enum status st = STATUS_OK;
    while (!st && f.at < f.end) {
        read_text(&f, find_tag(f.at, f.end));
        if (f.at < f.end)
            st = read_tag(&f);
    }
    close_output(&f);
    if (!st && out->failed)
        return fail(err, STATUS_NOMEM, "chat template: out of memory");
    return st;
}
