/* json.c - see json.h. A recursive descent over the grammar of RFC 8259, section 2 to 7. */
#include "engine/base/json.h"

#include <math.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/utf8.h"

/* cJSON reads at most 63 characters of a number and nests 1000 levels. */
enum { MAX_NUMBER = 63, MAX_DEPTH = 1000 };

struct key {
    const char *text; /* [n], still escaped, without quotes; borrowed from the input */
    size_t n;
};

struct parser {
    const char *text;
    size_t n, at;
    struct json_limits limits;
    int depth;
    size_t n_values;
    struct key *keys; /* of all objects that are open, innermost last */
    size_t n_keys, cap_keys;
    bool any_keys; /* do not remember them: the text has passed before */
    struct error *err;
};

/* "line L, column C: sentence", where C counts bytes. */
__attribute__((format(printf, 3, 4))) static enum status wrong(struct parser *p, size_t at,
                                                               const char *format, ...)
{
    size_t line = 1, start = 0;
    for (size_t i = 0; i < at; i++)
        if (p->text[i] == '\n') {
            line++;
            start = i + 1;
        }
    char sentence[200];
    va_list args;
    va_start(args, format);
    vsnprintf(sentence, sizeof(sentence), format, args);
    va_end(args);
    return fail(p->err, STATUS_INVALID, "line %zu, column %zu: %s", line, at - start + 1, sentence);
}

/* What stands at the offset, for an error text. */
static const char *found(const struct parser *p, size_t at, char out[24])
{
    if (at >= p->n)
        return "the end of the text";
    unsigned char c = (unsigned char)p->text[at];
    if (c > ' ' && c < 0x7f)
        snprintf(out, 24, "'%c'", c);
    else
        snprintf(out, 24, "byte 0x%02x", c);
    return out;
}

static enum status expected(struct parser *p, const char *what)
{
    char text[24];
    return wrong(p, p->at, "expected %s, found %s", what, found(p, p->at, text));
}

static int peek(const struct parser *p)
{
    return p->at < p->n ? (unsigned char)p->text[p->at] : -1;
}

static bool is_digit(int c)
{
    return c >= '0' && c <= '9';
}

static void skip_space(struct parser *p)
{
    for (int c = peek(p); c == ' ' || c == '\t' || c == '\n' || c == '\r'; c = peek(p))
        p->at++;
}

/* The value of four hexadecimal digits, or -1. */
static int32_t hex4(const char *text, size_t n)
{
    int32_t value = 0;
    if (n < 4)
        return -1;
    for (int i = 0; i < 4; i++) {
        int c = (unsigned char)text[i];
        if (is_digit(c))
            value = value * 16 + c - '0';
        else if ((c | 32) >= 'a' && (c | 32) <= 'f')
            value = value * 16 + (c | 32) - 'a' + 10;
        else
            return -1;
    }
    return value;
}

/* Decode the escape at text, which begins with a backslash. Returns its length, 0 when it is
 * none, and sets *code_point; a lone surrogate is given as it stands. */
static size_t unescape(const char *text, size_t n, uint32_t *code_point)
{
    static const char letters[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
    if (n < 2 || !text[1])
        return 0;
    const char *letter = strchr(letters, text[1]);
    if (letter) {
        *code_point = (unsigned char)values[letter - letters];
        return 2;
    }
    int32_t high = text[1] == 'u' ? hex4(text + 2, n - 2) : -1;
    if (high < 0)
        return 0;
    *code_point = (uint32_t)high;
    if (high < 0xd800 || high > 0xdbff || n < 8 || text[6] != '\\' || text[7] != 'u')
        return 6;
    int32_t low = hex4(text + 8, n - 8);
    if (low < 0xdc00 || low > 0xdfff)
        return 6;
    *code_point = 0x10000 + ((uint32_t)(high - 0xd800) << 10) + (uint32_t)(low - 0xdc00);
    return 12;
}

static enum status check_escape(struct parser *p)
{
    uint32_t code_point = 0;
    size_t length = unescape(p->text + p->at, p->n - p->at, &code_point);
    if (!length)
        return wrong(p, p->at, "unknown or cut escape in a string");
    if (code_point == 0)
        return wrong(p, p->at, "the escape \\u0000 is not permitted");
    if (code_point >= 0xd800 && code_point <= 0xdfff)
        return wrong(p, p->at, "unpaired surrogate \\u%04x", (unsigned)code_point);
    p->at += length;
    return STATUS_OK;
}

/* At an opening quote; leaves p->at behind the closing one. */
static enum status check_string(struct parser *p)
{
    size_t start = p->at++;
    for (;;) {
        int c = peek(p);
        if (c < 0)
            return wrong(p, start, "this string is never closed");
        if (c < 0x20)
            return wrong(p, p->at, "raw control byte 0x%02x in a string", (unsigned)c);
        if (c == '"')
            break;
        if (c == '\\') {
            enum status st = check_escape(p);
            if (st)
                return st;
        } else if (c < 0x80) {
            p->at++;
        } else {
            uint32_t code_point;
            int length = utf8_decode(p->text + p->at, p->n - p->at, &code_point);
            if (!length)
                return wrong(p, p->at, "invalid UTF-8: byte 0x%02x", (unsigned)c);
            p->at += (size_t)length;
        }
    }
    p->at++;
    return STATUS_OK;
}

static enum status check_digits(struct parser *p)
{
    if (!is_digit(peek(p)))
        return expected(p, "a digit");
    while (is_digit(peek(p)))
        p->at++;
    return STATUS_OK;
}

/* The grammar of a number; sets *is_integer. */
static enum status scan_number(struct parser *p, bool *is_integer)
{
    *is_integer = true;
    if (peek(p) == '-')
        p->at++;
    size_t first = p->at;
    enum status st = check_digits(p);
    if (!st && p->text[first] == '0' && p->at - first > 1)
        st = wrong(p, first, "a number with a leading zero");
    if (!st && peek(p) == '.') {
        *is_integer = false;
        p->at++;
        st = check_digits(p);
    }
    if (!st && (peek(p) == 'e' || peek(p) == 'E')) {
        *is_integer = false;
        p->at++;
        if (peek(p) == '+' || peek(p) == '-')
            p->at++;
        st = check_digits(p);
    }
    return st;
}

static enum status check_number(struct parser *p)
{
    size_t start = p->at;
    bool is_integer;
    enum status st = scan_number(p, &is_integer);
    if (st)
        return st;
    if (p->at - start > MAX_NUMBER)
        return wrong(p, start, "a number of more than %d characters", MAX_NUMBER);
    char text[MAX_NUMBER + 1], exact[400];
    memcpy(text, p->text + start, p->at - start);
    text[p->at - start] = '\0';
    double value = strtod(text, NULL);
    if (!isfinite(value))
        return wrong(p, start, "the number %s is out of range", text);
    if (is_integer && !p->limits.any_integer && fabs(value) >= 0x1p53) {
        snprintf(exact, sizeof(exact), "%.0f", value);
        if (strcmp(exact, text))
            return wrong(p, start, "the integer %s cannot be read without rounding", text);
    }
    return STATUS_OK;
}

static enum status check_word(struct parser *p, const char *word)
{
    size_t n = strlen(word);
    if (p->n - p->at < n || memcmp(p->text + p->at, word, n))
        return expected(p, "a value");
    p->at += n;
    return STATUS_OK;
}

/* The next character of a key that has been checked, unescaped. */
static uint32_t next_of_key(struct key *k)
{
    uint32_t code_point = (unsigned char)*k->text;
    size_t length = 1;
    if (code_point == '\\')
        length = unescape(k->text, k->n, &code_point);
    else if (code_point >= 0x80)
        length = (size_t)utf8_decode(k->text, k->n, &code_point);
    k->text += length;
    k->n -= length;
    return code_point;
}

static int compare_keys(const void *left, const void *right)
{
    struct key a = *(const struct key *)left, b = *(const struct key *)right;
    while (a.n && b.n) {
        uint32_t x = next_of_key(&a), y = next_of_key(&b);
        if (x != y)
            return x < y ? -1 : 1;
    }
    return (a.n > 0) - (b.n > 0);
}

static enum status push_key(struct parser *p, const char *text, size_t n)
{
    if (p->any_keys)
        return STATUS_OK;
    if (p->n_keys == p->cap_keys) {
        size_t cap = p->cap_keys ? 2 * p->cap_keys : 32;
        struct key *keys = realloc(p->keys, cap * sizeof(*keys));
        if (!keys)
            return fail(p->err, STATUS_NOMEM, "out of memory while checking JSON");
        p->keys = keys;
        p->cap_keys = cap;
    }
    p->keys[p->n_keys++] = (struct key){text, n};
    return STATUS_OK;
}

/* The keys from first on belong to the object that ends here: compare and drop them. */
static enum status close_keys(struct parser *p, size_t first)
{
    size_t n = p->n_keys - first;
    p->n_keys = first;
    if (n < 2)
        return STATUS_OK;
    struct key *keys = p->keys + first;
    qsort(keys, n, sizeof(*keys), compare_keys);
    for (size_t i = 1; i < n; i++) {
        if (compare_keys(&keys[i - 1], &keys[i]))
            continue;
        const struct key *later = keys[i].text > keys[i - 1].text ? &keys[i] : &keys[i - 1];
        size_t shown = utf8_valid_prefix(later->text, later->n < 64 ? later->n : 64);
        return wrong(p, (size_t)(later->text - p->text), "duplicate key \"%.*s\"", (int)shown,
                     later->text);
    }
    return STATUS_OK;
}

static enum status check_value(struct parser *p);

/* "key": value */
static enum status check_member(struct parser *p)
{
    if (peek(p) != '"')
        return expected(p, "a key in quotes");
    size_t start = p->at + 1;
    enum status st = check_string(p);
    if (!st)
        st = push_key(p, p->text + start, p->at - 1 - start);
    if (st)
        return st;
    skip_space(p);
    if (peek(p) != ':')
        return expected(p, "':' after a key");
    p->at++;
    skip_space(p);
    return check_value(p);
}

/* At an opening bracket; the items are members of an object or values of an array. */
static enum status check_items(struct parser *p, char close, enum status (*item)(struct parser *))
{
    if (++p->depth > p->limits.max_depth)
        return wrong(p, p->at, "more than %d nested arrays and objects", p->limits.max_depth);
    size_t first_key = p->n_keys;
    p->at++;
    skip_space(p);
    bool empty = peek(p) == close;
    while (!empty) {
        enum status st = item(p);
        if (st)
            return st;
        skip_space(p);
        if (peek(p) == close)
            break;
        if (peek(p) != ',')
            return expected(p, close == '}' ? "',' or '}'" : "',' or ']'");
        p->at++;
        skip_space(p);
    }
    p->at++;
    p->depth--;
    return close_keys(p, first_key);
}

static enum status check_value(struct parser *p)
{
    if (p->limits.max_values && ++p->n_values > p->limits.max_values)
        return wrong(p, p->at, "more than %zu values", p->limits.max_values);
    int c = peek(p);
    switch (c) {
    case '{':
        return check_items(p, '}', check_member);
    case '[':
        return check_items(p, ']', check_value);
    case '"':
        return check_string(p);
    case 't':
        return check_word(p, "true");
    case 'f':
        return check_word(p, "false");
    case 'n':
        return check_word(p, "null");
    default:
        return c == '-' || is_digit(c) ? check_number(p) : expected(p, "a value");
    }
}

enum status json_check(const char *text, size_t n, const struct json_limits *limits,
                       struct error *err)
{
    CHECK(limits->max_depth >= 1 && limits->max_depth <= MAX_DEPTH);
    struct parser p = {.text = text, .n = n, .limits = *limits, .err = err};
    if (n >= 3 && !memcmp(text, "\xef\xbb\xbf", 3))
        return wrong(&p, 0, "a byte order mark is not permitted");
    skip_space(&p);
    enum status st = check_value(&p);
    if (!st) {
        skip_space(&p);
        if (p.at < n)
            st = expected(&p, "the end of the text");
    }
    free(p.keys);
    return st;
}

const char *json_member(const char *text, size_t n, const char *key, size_t *n_value)
{
    struct json_limits limits = {.max_depth = MAX_DEPTH, .any_integer = true};
    struct parser p = {.text = text, .n = n, .limits = limits, .any_keys = true};
    const char *found_at = NULL;
    skip_space(&p);
    bool more = peek(&p) == '{';
    while (more && !found_at) {
        p.at++;
        skip_space(&p);
        struct key name = {p.text + p.at + 1, 0}, wanted = {key, strlen(key)};
        if (peek(&p) != '"' || check_string(&p))
            break;
        name.n = (size_t)(p.text + p.at - 1 - name.text);
        skip_space(&p);
        p.at++;
        skip_space(&p);
        size_t start = p.at;
        if (check_value(&p))
            break;
        if (!compare_keys(&name, &wanted)) {
            found_at = text + start;
            *n_value = p.at - start;
        }
        skip_space(&p);
        more = peek(&p) == ',';
    }
    return found_at;
}
