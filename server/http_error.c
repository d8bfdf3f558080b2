/* http_error.c - OpenAI's error object, and which HTTP status an error of ours becomes. */
#include "server/http.h"

#include <string.h>

#include "server/http_private.h"

/* Statuses with no line of their own are our fault: 500. */
static const int http_statuses[STATUS_COUNT] = {
    [STATUS_OK] = 200,           [STATUS_INVALID] = 400,   [STATUS_UNAUTHORIZED] = 401,
    [STATUS_FORBIDDEN] = 403,    [STATUS_NOT_FOUND] = 404, [STATUS_CONFLICT] = 409,
    [STATUS_PRECONDITION] = 412, [STATUS_TOO_LARGE] = 413, [STATUS_UNSUPPORTED] = 415,
    [STATUS_BUSY] = 429,         [STATUS_TIMEOUT] = 504,   [STATUS_SHUTDOWN] = 503,
    [STATUS_DEVICE] = 503,       [STATUS_NOMEM] = 503,     [STATUS_IO] = 503,
    [STATUS_LOST] = 410,
};

int http_status_of(enum status status)
{
    return status < STATUS_COUNT && http_statuses[status] ? http_statuses[status] : 500;
}

static const char *error_type(int http_code)
{
    if (http_code >= 500)
        return "server_error";
    return http_code == 429 ? "rate_limit_error" : "invalid_request_error";
}

const char *http_error_code(int http_code)
{
    switch (http_code) {
    case 401:
        return "invalid_api_key";
    case 405:
        return "method_not_supported";
    case 408:
        return "request_timeout";
    case 411:
        return "length_required";
    case 413:
        return "request_too_large";
    case 414:
        return "url_too_long";
    case 415:
        return "unsupported_media_type";
    case 429:
        return "rate_limit_exceeded";
    case 431:
        return "headers_too_large";
    case 503:
        return "service_unavailable";
    default:
        return NULL;
    }
}

const char *http_reason(int http_code)
{
    switch (http_code) {
    case 408:
        return "Request Timeout";
    case 413:
        return "Content Too Large";
    case 414:
        return "URI Too Long";
    case 417:
        return "Expectation Failed";
    case 431:
        return "Request Header Fields Too Large";
    case 501:
        return "Not Implemented";
    case 503:
        return "Service Unavailable";
    case 505:
        return "HTTP Version Not Supported";
    default:
        return "Bad Request";
    }
}

static void string_or_null(struct bytes *out, const char *text)
{
    if (text && *text)
        bytes_json_string(out, text, strlen(text));
    else
        bytes_text(out, "null");
}

void http_error_json(struct bytes *out, int http_code, const char *message, const char *param,
                     const char *code)
{
    bytes_text(out, "{\"error\":{\"message\":");
    bytes_json_string(out, message, strlen(message));
    bytes_format(out, ",\"type\":\"%s\",\"param\":", error_type(http_code));
    string_or_null(out, param);
    bytes_text(out, ",\"code\":");
    string_or_null(out, code);
    bytes_text(out, "}}");
}
