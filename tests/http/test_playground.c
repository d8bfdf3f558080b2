/* test_playground.c - the page at / and its files over HTTP; tests/playground has it in a browser.
 */
#include "tests/http/harness.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/unit/model_files.h"

static const struct {
    const char *path, *file, *type;
} files[] = {
    {"/", "index.html", "text/html; charset=utf-8"},
    {"/playground/style.css", "style.css", "text/css; charset=utf-8"},
    {"/playground/app.js", "app.js", "text/javascript; charset=utf-8"},
    {"/playground/api.js", "api.js", "text/javascript; charset=utf-8"},
};

static struct server server;

static int start_server(void **state)
{
    (void)state;
    /* The page needs no key. */
    char keys[160];
    static char dir[128];
    test_dir_make(dir, sizeof(dir));
    test_file_write(dir, "keys", "a-key-of-ours\n", 14);
    snprintf(keys, sizeof(keys), "%s/keys", dir);
    server_start(&server, (const char *const[]){"--api-key-file", keys, NULL});
    test_dir_remove(dir);
    return 0;
}

static int stop_server(void **state)
{
    (void)state;
    server_stop(&server);
    return 0;
}

static void header_of(const struct reply *reply, const char *name, char value[300])
{
    if (!reply_header(reply, name, value, 300))
        fail_msg("no header %s", name);
}

/* What is served is the file, with what keeps others' scripts out. */
static void test_files(void **state)
{
    (void)state;
    for (size_t i = 0; i < COUNT_OF(files); i++) {
        char path[100], value[300];
        size_t n;
        struct reply reply;
        snprintf(path, sizeof(path), "server/playground/%s", files[i].file);
        char *file = test_file_read(path, &n);
        client_get(&server, files[i].path, &reply);
        assert_int_equal(reply.code, 200);
        assert_int_equal(reply.body.n, n);
        assert_memory_equal(reply.body.data, file, n);
        header_of(&reply, "Content-Type", value);
        assert_string_equal(value, files[i].type);
        header_of(&reply, "Content-Security-Policy", value);
        assert_string_equal(value, "default-src 'none'; script-src 'self'; style-src 'self'; "
                                   "connect-src 'self'; img-src 'self' data:; base-uri 'none'; "
                                   "form-action 'none'; frame-ancestors 'none'");
        header_of(&reply, "X-Content-Type-Options", value);
        assert_string_equal(value, "nosniff");
        header_of(&reply, "Cache-Control", value);
        assert_string_equal(value, "no-cache");
        reply_free(&reply);
        free(file);
    }
}

/* A client asks again with the tag it has, in the forms that browsers and proxies give it. */
static void test_tags(void **state)
{
    (void)state;
    static const struct {
        const char *format;
        int code;
    } cases[] = {
        {"If-None-Match: %s", 304},        {"If-None-Match: W/%s", 304},
        {"If-None-Match: \"a\", %s", 304}, {"If-None-Match: *", 304},
        {"If-None-Match: \"a\"", 200},     {"X-Other: %s", 200},
    };
    char tag[300], other[300], again[300];
    struct reply reply;
    client_get(&server, "/playground/style.css", &reply);
    header_of(&reply, "ETag", other);
    reply_free(&reply);
    client_get(&server, "/", &reply);
    header_of(&reply, "ETag", tag);
    reply_free(&reply);
    assert_string_not_equal(tag, other);
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        char header[400];
        snprintf(header, sizeof(header), cases[i].format, tag);
        client_send(
            &server,
            &(struct client_request){.path = "/", .headers = (const char *const[]){header, NULL}},
            &reply);
        assert_int_equal(reply.code, cases[i].code);
        assert_true(cases[i].code == 200 || !reply.body.n);
        header_of(&reply, "ETag", again);
        assert_string_equal(again, tag);
        reply_free(&reply);
    }
}

static void test_methods(void **state)
{
    (void)state;
    char length[300], value[300];
    struct reply whole, reply;
    client_get(&server, "/", &whole);
    header_of(&whole, "Content-Length", length);
    struct bytes out = {0};
    static const char head[] = "HEAD / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    raw_exchange(&server, head, sizeof(head) - 1, &out);
    assert_non_null(strstr(out.data, "HTTP/1.1 200"));
    snprintf(value, sizeof(value), "Content-Length: %.20s\r\n", length);
    assert_non_null(strstr(out.data, value));
    assert_string_equal(strstr(out.data, "\r\n\r\n"), "\r\n\r\n");
    bytes_free(&out);
    reply_free(&whole);
    for (int i = 0; i < 2; i++) {
        client_post(&server, files[i].path, "{}", &reply);
        assert_error_object(&reply, 405, "invalid_request_error", "method_not_supported");
        header_of(&reply, "Allow", value);
        assert_string_equal(value, "GET, HEAD, OPTIONS");
        reply_free(&reply);
    }
}

static void test_no_such_file(void **state)
{
    (void)state;
    static const char *const paths[] = {"/playground/none.js",
                                        "/playground/index.html",
                                        "/playground/%2e%2e%2fapp.js",
                                        "/playground/",
                                        "/playground",
                                        "/index.html"};
    for (size_t i = 0; i < COUNT_OF(paths); i++) {
        struct reply reply;
        client_get(&server, paths[i], &reply);
        assert_error_object(&reply, 404, "invalid_request_error", NULL);
        reply_free(&reply);
    }
}

static void test_no_playground(void **state)
{
    (void)state;
    struct server other;
    server_start(&other, (const char *const[]){"--no-playground", NULL});
    for (size_t i = 0; i < COUNT_OF(files); i++) {
        struct reply reply;
        client_get(&other, files[i].path, &reply);
        assert_error_object(&reply, 404, "invalid_request_error", NULL);
        reply_free(&reply);
    }
    server_stop(&other);
}

int main(int argc, char **argv)
{
    if (argc > 1)
        cmocka_set_test_filter(argv[1]);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_files),         cmocka_unit_test(test_tags),
        cmocka_unit_test(test_methods),       cmocka_unit_test(test_no_such_file),
        cmocka_unit_test(test_no_playground),
    };
    return cmocka_run_group_tests(tests, start_server, stop_server);
}
