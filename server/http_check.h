/* http_check.h - is this the header of one HTTP/1 request, and can two readers disagree on it?
 *
 * libmicrohttpd accepts Content-Length beside Transfer-Encoding, two Content-Lengths and two
 * Hosts; a proxy in front may read such a request otherwise (request smuggling). The check
 * looks at raw bytes, which also gives our own error for what the library would answer with a
 * page of its own.
 *
 * Threads: no state. Memory: none. Errors: an HTTP status and a sentence.
 */
#ifndef LATTE_SERVER_HTTP_CHECK_H
#define LATTE_SERVER_HTTP_CHECK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    HTTP_TARGET_LIMIT = 8192,  /* bytes of a request's target: 414 beyond */
    HTTP_HEADER_LIMIT = 15360, /* bytes of the whole header: 431 beyond */
    HTTP_FIELDS_LIMIT = 100,
};

/* code 0: all is well. */
struct http_verdict {
    int code;
    const char *message; /* static */
};

/* How a request says where its body ends, gathered field by field. */
struct http_framing {
    bool is_http_1_0;
    int n_host, n_length, n_coding, n_fields;
    bool chunked;          /* Transfer-Encoding is exactly "chunked" */
    bool bad_length;       /* Content-Length is not a plain number */
    bool trailing_blank;   /* behind one of these values: the library would not see past it */
    bool closes;           /* Connection: anything but keep-alive */
    bool expects_continue; /* Expect: 100-continue */
    bool bad_expect;       /* another expectation */
    int64_t length;        /* of Content-Length, -1 without one */
};

void http_framing_init(struct http_framing *f, bool is_http_1_0);
/* name and value need no terminator; surrounding blanks of the value are ignored. */
void http_framing_add(struct http_framing *f, const char *name, size_t n_name, const char *value,
                      size_t n_value);
/* 400, 413 (length over max_body_bytes), 417, 431 or 501. */
struct http_verdict http_framing_verdict(const struct http_framing *f, int64_t max_body_bytes);

/* Look at the first n bytes of a request. Returns the length of its header when that is
 * complete, 0 when more bytes are needed; framing is filled then. The verdict may be known
 * before the end: then its code is set, whatever is returned. */
size_t http_check_header(const char *data, size_t n, int64_t max_body_bytes,
                         struct http_framing *framing, struct http_verdict *verdict);

/* Walking through a header that passed the check and begins with its request line. */
struct http_slice {
    const char *data; /* in the header */
    size_t n;
};
/* Returns where the fields begin. */
const char *http_header_line(const char *header, struct http_slice *method,
                             struct http_slice *target);
/* The field at *at, without blanks around its value; false at the end. */
bool http_header_field(const char **at, struct http_slice *name, struct http_slice *value);
void http_trim(struct http_slice *text); /* blanks at both ends */

#endif
