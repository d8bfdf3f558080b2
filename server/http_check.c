/* http_check.c - see http_check.h */
#include "server/http_check.h"

#include <ctype.h>
#include <string.h>
#include <strings.h>

enum { METHOD_LIMIT = 32 };

static const struct http_verdict fine = {0, NULL};

static struct http_verdict verdict_of(int code, const char *message)
{
    return (struct http_verdict){code, message};
}

static bool is_token_char(char c)
{
    return isalnum((unsigned char)c) || (c && strchr("!#$%&'*+-.^_`|~", c));
}

static bool same_name(const char *name, size_t n, const char *wanted)
{
    return n == strlen(wanted) && !strncasecmp(name, wanted, n);
}

void http_trim(struct http_slice *text)
{
    for (; text->n && (*text->data == ' ' || *text->data == '\t'); text->n--)
        text->data++;
    while (text->n && (text->data[text->n - 1] == ' ' || text->data[text->n - 1] == '\t'))
        text->n--;
}

void http_framing_init(struct http_framing *f, bool is_http_1_0)
{
    *f = (struct http_framing){.is_http_1_0 = is_http_1_0, .length = -1};
}

/* Digits only; 18 of them fit. */
static bool read_length(const char *value, size_t n, int64_t *out)
{
    int64_t length = 0;
    for (size_t i = 0; i < n; i++) {
        if (!isdigit((unsigned char)value[i]))
            return false;
        length = length * 10 + (value[i] - '0');
    }
    *out = length;
    return n > 0 && n <= 18;
}

void http_framing_add(struct http_framing *f, const char *name, size_t n_name, const char *value,
                      size_t n_value)
{
    struct http_slice trimmed = {value, n_value};
    http_trim(&trimmed);
    bool trailing_blank = trimmed.data + trimmed.n != value + n_value;
    value = trimmed.data;
    n_value = trimmed.n;
    f->n_fields++;
    if (same_name(name, n_name, "Host")) {
        f->n_host++;
    } else if (same_name(name, n_name, "Content-Length")) {
        f->n_length++;
        f->trailing_blank |= trailing_blank;
        f->bad_length |= n_value > 18 || !read_length(value, n_value, &f->length);
    } else if (same_name(name, n_name, "Transfer-Encoding")) {
        f->n_coding++;
        f->trailing_blank |= trailing_blank;
        f->chunked = same_name(value, n_value, "chunked");
    } else if (same_name(name, n_name, "Expect")) {
        f->expects_continue = same_name(value, n_value, "100-continue");
        f->bad_expect |= !f->expects_continue;
    } else if (same_name(name, n_name, "Connection")) {
        f->closes |= !same_name(value, n_value, "keep-alive");
    }
}

struct http_verdict http_framing_verdict(const struct http_framing *f, int64_t max_body_bytes)
{
    if (f->n_fields > HTTP_FIELDS_LIMIT)
        return verdict_of(431, "The request has too many header fields.");
    if (f->n_host > 1)
        return verdict_of(400, "The request has more than one Host header.");
    if (!f->n_host && !f->is_http_1_0)
        return verdict_of(400, "The request has no Host header.");
    if (f->n_length && f->n_coding)
        return verdict_of(400, "The request has both Content-Length and Transfer-Encoding.");
    if (f->n_length > 1 || f->n_coding > 1)
        return verdict_of(400, "The request says more than once how long its body is.");
    if (f->trailing_blank)
        return verdict_of(400, "A blank follows the value of Content-Length or "
                               "Transfer-Encoding.");
    if (f->bad_length)
        return verdict_of(400, "Content-Length is not a number.");
    if (f->n_coding && f->is_http_1_0)
        return verdict_of(400, "Transfer-Encoding does not exist in HTTP/1.0.");
    if (f->n_coding && !f->chunked)
        return verdict_of(501, "The only Transfer-Encoding supported is chunked.");
    if (f->bad_expect)
        return verdict_of(417, "The only expectation supported is 100-continue.");
    if (f->length > max_body_bytes)
        return verdict_of(413, "The request body is larger than the server accepts.");
    return fine;
}

/* METHOD SP target SP HTTP/1.x, without the line's end. */
static struct http_verdict check_request_line(const char *line, size_t n, bool *is_http_1_0)
{
    const char *target = memchr(line, ' ', n);
    const char *end = line + n;
    if (!target)
        return verdict_of(400, "The request line is not that of an HTTP request.");
    target++;
    const char *version = memchr(target, ' ', (size_t)(end - target));
    if (!version)
        return verdict_of(400, "The request line names no HTTP version.");
    if (version - target > HTTP_TARGET_LIMIT)
        return verdict_of(414, "The request's URL is too long.");
    if (version == target)
        return verdict_of(400, "The request line names no target.");
    for (const char *c = target; c < version; c++) {
        if (*c <= ' ' || *c >= 0x7f)
            return verdict_of(400, "The request's URL has a character that must be escaped.");
    }
    version++;
    size_t n_version = (size_t)(end - version);
    if (n_version != 8 || strncmp(version, "HTTP/", 5) || !isdigit((unsigned char)version[5]) ||
        version[6] != '.' || !isdigit((unsigned char)version[7]))
        return verdict_of(400, "The request line names no HTTP version.");
    if (version[5] != '1' || version[7] > '1')
        return verdict_of(505, "Only HTTP/1.1 and HTTP/1.0 are spoken here.");
    *is_http_1_0 = version[7] == '0';
    return fine;
}

/* Name ":" value, without the line's end. */
static struct http_verdict check_field(const char *line, size_t n, struct http_framing *f)
{
    size_t n_name = 0;
    while (n_name < n && is_token_char(line[n_name]))
        n_name++;
    if (!n_name || n_name == n || line[n_name] != ':')
        return verdict_of(400, "A header line is not of the form 'Name: value'.");
    for (size_t i = n_name + 1; i < n; i++) {
        unsigned char c = (unsigned char)line[i];
        if ((c < ' ' && c != '\t') || c == 0x7f)
            return verdict_of(400, "A header has a control character in its value.");
    }
    http_framing_add(f, line, n_name, line + n_name + 1, n - n_name - 1);
    return fine;
}

/* What can be said before the first line has ended. */
static struct http_verdict check_beginning(const char *data, size_t n)
{
    size_t i = 0;
    while (i < n && i < METHOD_LIMIT && is_token_char(data[i]))
        i++;
    if (n >= 2 && data[0] == 0x16 && data[1] == 3)
        return verdict_of(400, "This port speaks plain HTTP, not TLS: use http://.");
    if (i < n && (i == 0 || data[i] != ' '))
        return verdict_of(400, "This is not an HTTP request.");
    if (n > HTTP_TARGET_LIMIT + METHOD_LIMIT)
        return verdict_of(414, "The request's URL is too long.");
    return fine;
}

/* The line at data[at..n): its length without CR LF, or -1 when it has not ended. A line that
 * ends otherwise sets the verdict. */
static long line_length(const char *data, size_t n, size_t at, struct http_verdict *verdict)
{
    const char *feed = memchr(data + at, '\n', n - at);
    if (!feed)
        return -1;
    long length = feed - (data + at);
    if (!length || feed[-1] != '\r') {
        *verdict = verdict_of(400, "A header line does not end with CR LF.");
        return -1;
    }
    return length - 1;
}

static size_t check_lines(const char *data, size_t n, int64_t max_body_bytes,
                          struct http_framing *framing, struct http_verdict *verdict)
{
    size_t at = 0;
    /* One empty line before a request is an old client's, and is forgiven. */
    if (n && data[0] == '\r') {
        if (n == 1)
            return 0;
        at = data[1] == '\n' ? 2 : 0;
    }
    long length = line_length(data, n, at, verdict);
    if (verdict->code)
        return 0;
    if (n > at)
        *verdict = check_beginning(data + at, length < 0 ? n - at : (size_t)length);
    if (verdict->code || length < 0)
        return 0;
    bool is_http_1_0 = false;
    *verdict = check_request_line(data + at, (size_t)length, &is_http_1_0);
    http_framing_init(framing, is_http_1_0);
    while (!verdict->code) {
        at += (size_t)length + 2;
        length = line_length(data, n, at, verdict);
        if (length < 0)
            return 0;
        if (!length) {
            *verdict = http_framing_verdict(framing, max_body_bytes);
            return at + 2;
        }
        *verdict = check_field(data + at, (size_t)length, framing);
    }
    return 0;
}

size_t http_check_header(const char *data, size_t n, int64_t max_body_bytes,
                         struct http_framing *framing, struct http_verdict *verdict)
{
    *verdict = fine;
    size_t length = check_lines(data, n, max_body_bytes, framing, verdict);
    if (!verdict->code && (length > HTTP_HEADER_LIMIT || (!length && n > HTTP_HEADER_LIMIT)))
        *verdict = verdict_of(431, "The request's header fields are too large.");
    return length;
}

static struct http_slice slice_to(const char *begin, const char *end)
{
    return (struct http_slice){begin, (size_t)(end - begin)};
}

const char *http_header_line(const char *header, struct http_slice *method,
                             struct http_slice *target)
{
    const char *space = strchr(header, ' '), *second = strchr(space + 1, ' ');
    *method = slice_to(header, space);
    *target = slice_to(space + 1, second);
    return strchr(second, '\n') + 1;
}

bool http_header_field(const char **at, struct http_slice *name, struct http_slice *value)
{
    if (**at == '\r')
        return false;
    const char *colon = strchr(*at, ':'), *end = strchr(colon, '\r');
    *name = slice_to(*at, colon);
    *value = slice_to(colon + 1, end);
    http_trim(value);
    *at = end + 2;
    return true;
}
