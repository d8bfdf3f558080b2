/* playground.c - see playground.h. The assembler takes the files from the repository root, where
 * make runs; the Makefile names the dependency. */
#include "server/playground.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <xxhash.h>

#include "server/call.h"

/* What the page may do is to load its own files and to talk to its own server. */
static const char policy[] = "default-src 'none'; script-src 'self'; style-src 'self'; "
                             "connect-src 'self'; img-src 'self' data:; base-uri 'none'; "
                             "form-action 'none'; frame-ancestors 'none'";

#define SCRIPT "text/javascript; charset=utf-8"

/* X(identifier, file, content type); the first one is the page. */
#define FILE_LIST(X)                                                                               \
    X(index_html, "index.html", "text/html; charset=utf-8")                                        \
    X(style_css, "style.css", "text/css; charset=utf-8")                                           \
    X(app_js, "app.js", SCRIPT)                                                                    \
    X(answer_js, "answer.js", SCRIPT)                                                              \
    X(api_js, "api.js", SCRIPT)                                                                    \
    X(branches_js, "branches.js", SCRIPT)                                                          \
    X(plot_js, "plot.js", SCRIPT)                                                                  \
    X(problems_js, "problems.js", SCRIPT)                                                          \
    X(sampling_js, "sampling.js", SCRIPT)                                                          \
    X(sessions_js, "sessions.js", SCRIPT)                                                          \
    X(store_js, "store.js", SCRIPT)                                                                \
    X(talk_js, "talk.js", SCRIPT)                                                                  \
    X(turns_js, "turns.js", SCRIPT)                                                                \
    X(view_js, "view.js", SCRIPT)

#define X(identifier, file, type)                                                                  \
    extern const char playground_##identifier[], playground_##identifier##_end[];                  \
    __asm__(".section .rodata\n"                                                                   \
            ".global playground_" #identifier ", playground_" #identifier "_end\n"                 \
            "playground_" #identifier ":\n"                                                        \
            ".incbin \"server/playground/" file "\"\n"                                             \
            "playground_" #identifier "_end:\n"                                                    \
            ".byte 0\n"                                                                            \
            ".text\n");
FILE_LIST(X)
#undef X

struct file {
    const char *name, *type, *data, *end;
};

static const struct file files[] = {
#define X(identifier, file, type)                                                                  \
    {file, type, playground_##identifier, playground_##identifier##_end},
    FILE_LIST(X)
#undef X
};

enum { N_FILES = sizeof(files) / sizeof(*files) };

/* Whether the client has this version: If-None-Match is *, or a list with its tag, weak or not. */
static bool has_tag(const char *known, const char *tag)
{
    return known && (!strcmp(known, "*") || strstr(known, tag));
}

static void reply_file(struct http_request *http, const struct file *file)
{
    size_t n = (size_t)(file->end - file->data);
    char tag[24];
    snprintf(tag, sizeof(tag), "\"%016" PRIx64 "\"", (uint64_t)XXH3_64bits(file->data, n));
    http_set_header(http, "ETag", tag);
    http_set_header(http, "Cache-Control",
                    "no-cache"); /* ask each time: a new server, a new page */
    http_set_header(http, "Content-Security-Policy", policy);
    http_set_header(http, "X-Content-Type-Options", "nosniff");
    http_set_header(http, "Referrer-Policy", "no-referrer");
    http_set_header(http, "Cross-Origin-Opener-Policy", "same-origin");
    if (has_tag(http_header(http, "If-None-Match"), tag))
        http_reply(http, 304, NULL, "", 0);
    else
        http_reply(http, 200, file->type, file->data, n);
}

/* As for a path that no route has. */
static void refuse(struct http_request *http, const char *before, const char *name)
{
    char message[120];
    snprintf(message, sizeof(message), "Invalid URL (%.8s %s%.64s)", http_method(http), before,
             name);
    http_fail_as(http, 404, message, NULL, NULL);
}

void playground_get_page(struct http_request *http, void *context)
{
    const struct routes *r = context;
    if (r->options->playground)
        reply_file(http, &files[0]);
    else
        refuse(http, "/", "");
}

void playground_get_file(struct http_request *http, void *context)
{
    const struct routes *r = context;
    const char *name = http_param(http);
    for (int i = 1; i < N_FILES && r->options->playground; i++)
        if (!strcmp(files[i].name, name)) {
            reply_file(http, &files[i]);
            return;
        }
    refuse(http, "/playground/", name);
}
