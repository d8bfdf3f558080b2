/* error.h - the one way in which functions of this project fail.
 *
 * A fallible function returns enum status (0 is success) and takes a struct error * last.
 * On failure it fills the error with a sentence that says what failed, where, what was
 * expected and what was found; its other out-parameters are left as they were.
 *
 * Threads: no shared state.
 * Memory:  struct error is a plain value of fixed size; nothing is allocated.
 */
#ifndef LATTE_BASE_ERROR_H
#define LATTE_BASE_ERROR_H

/* code, name. The server maps codes to HTTP statuses in one table of its own. */
#define STATUS_LIST(X)                                                                             \
    X(OK, "ok")                                                                                    \
    X(INVALID, "invalid")           /* a file, request or argument is wrong */                     \
    X(UNAUTHORIZED, "unauthorized") /* no credentials, or wrong ones */                            \
    X(FORBIDDEN, "forbidden")                                                                      \
    X(NOT_FOUND, "not found")                                                                      \
    X(CONFLICT, "conflict")                                                                        \
    X(PRECONDITION, "precondition failed")                                                         \
    X(TOO_LARGE, "too large")                                                                      \
    X(UNSUPPORTED, "unsupported")                                                                  \
    X(BUSY, "busy")         /* a bounded queue is full: try again later */                         \
    X(TIMEOUT, "timeout")   /* a deadline passed */                                                \
    X(SHUTDOWN, "shutdown") /* draining: no new work */                                            \
    X(DEVICE, "device")     /* the compute device failed; sticky */                                \
    X(NOMEM, "out of memory")                                                                      \
    X(LOST, "lost") /* it was here, and cannot be read any more */                                 \
    X(IO, "i/o")                                                                                   \
    X(INTERNAL, "internal")

enum status {
#define X(code, name) STATUS_##code,
    STATUS_LIST(X)
#undef X
        STATUS_COUNT
};

struct error {
    enum status status;
    char field[80]; /* the request field, tensor or key at fault; empty when there is none */
    char text[432]; /* one sentence, no trailing newline, valid UTF-8 as far as the inputs were */
};

/* The name of a status in lower case, for logs. Never NULL. */
const char *status_name(enum status status);

/* Fill *err (which may be NULL) with a printf-formatted sentence and return status. */
enum status fail(struct error *err, enum status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* The same, naming the field at fault. */
enum status fail_field(struct error *err, enum status status, const char *field, const char *format,
                       ...) __attribute__((format(printf, 4, 5)));

/* Put "prefix: " before the text of an error that is already filled; returns its status. */
enum status fail_context(struct error *err, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* Our own mistakes: checked in every build. Prints the place and aborts. */
#define CHECK(condition) ((condition) ? (void)0 : check_failed(#condition, __FILE__, __LINE__))
void check_failed(const char *condition, const char *file, int line) __attribute__((noreturn));

#endif
