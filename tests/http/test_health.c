/* test_health.c - what clients see when a device fails: the real routes over the real engine, in
 * this process, on a fake GPU that breaks when told to. */
#include "tests/http/harness.h"

#include <stdio.h>
#include <string.h>

#include "server/http.h"
#include "server/options.h"
#include "server/routes.h"
#include "tests/unit/fake_gpus.h"
#include "tests/unit/model_files.h"

static struct {
    struct options options;
    struct routes *routes;
    struct http_server *http;
    struct served_model model;
    struct engine *engine;
    struct tokenizer *tokenizer;
    struct chat_template *chat_template;
    struct server at; /* for the harness's clients */
    char dir[100];
} site;

static void wake(void *http)
{
    http_notify(http);
}

static void open_model(const char *device)
{
    char path[160];
    struct engine_options o;
    struct error err = {0};
    make_tiny_model(site.dir, sizeof(site.dir));
    snprintf(path, sizeof(path), "%s/tokenizer.json", site.dir);
    engine_options_init(&o);
    o.model_dir = site.dir;
    o.device = device;
    o.n_threads = 1;
    o.n_slots = 2;
    o.step_tokens = o.chunk_tokens = 16;
    o.wake = wake;
    o.wake_context = site.http;
    if (tokenizer_open(&site.tokenizer, path, &err) ||
        chat_template_open(&site.chat_template, site.dir, &err) ||
        engine_open(&site.engine, &o, &err))
        fail_msg("%s", err.text);
    site.model = (struct served_model){.name = "tiny",
                                       .engine = site.engine,
                                       .tokenizer = site.tokenizer,
                                       .chat_template = site.chat_template};
    if (routes_publish(site.routes, &site.model, &err))
        fail_msg("%s", err.text);
}

static void open_site(void)
{
    char *argv[] = {(char *)"test",   (char *)"--model", (char *)"none",
                    (char *)"--port", (char *)"0",       (char *)"--no-access-log"};
    struct error err = {0};
    if (options_parse(&site.options, 6, argv, &err) ||
        routes_open(&site.routes, &site.options, &err))
        fail_msg("%s", err.text);
    struct http_config config = {.options = &site.options,
                                 .on_notify = routes_on_notify,
                                 .on_tick = routes_on_tick,
                                 .context = site.routes};
    config.routes = routes_table(&config.n_routes);
    if (http_open(&site.http, &config, &err))
        fail_msg("%s", err.text);
    routes_set_server(site.routes, site.http);
    if (http_start(site.http, &err))
        fail_msg("%s", err.text);
    site.at.port = http_port(site.http);
    snprintf(site.at.url, sizeof(site.at.url), "%s", http_url(site.http));
}

static void close_site(void)
{
    http_stop(site.http);
    routes_close(site.routes);
    engine_close(site.engine);
    http_close(site.http);
    tokenizer_close(site.tokenizer);
    chat_template_close(site.chat_template);
    test_dir_remove(site.dir);
}

static void expect_health(const char *path, int code, const char *status)
{
    struct reply r;
    char body[64];
    client_get(&site.at, path, &r);
    snprintf(body, sizeof(body), "{\"status\":\"%s\"}", status);
    if (r.code != code || strcmp(r.body.data, body))
        fail_msg("%s: expected %d %s, found %d %s", path, code, body, r.code, r.body.data);
    reply_free(&r);
}

#define COMPLETION "{\"model\":\"tiny\",\"prompt\":\"Once\",\"max_tokens\":4,\"ignore_eos\":true}"
#define STREAM                                                                                     \
    "{\"model\":\"tiny\",\"prompt\":\"Once\",\"max_tokens\":200,\"ignore_eos\":true,\"stream\":"   \
    "true}"

static void expect_completion(int code)
{
    struct reply r;
    client_post(&site.at, "/v1/completions", COMPLETION, &r);
    if (code == 200)
        assert_int_equal(r.code, 200);
    else
        assert_error_object(&r, code, "server_error", NULL);
    if (code != 200 && !strstr(r.body.data, "device"))
        fail_msg("the reply does not name the cause: %s", r.body.data);
    reply_free(&r);
}

/* The device breaks under way: a stream that has begun tells. */
static bool break_gpu(void *context, const char *data, size_t n)
{
    bytes_append(context, data, n);
    fake_gpus[0].broken = true;
    return true;
}

static void test_a_failed_device_turns_health_red(void **state)
{
    (void)state;
    open_site();
    expect_health("/health/ready", 503, "loading");
    expect_health("/health/live", 200, "loading");
    open_model("cuda:0");
    expect_health("/health/ready", 200, "ok");
    expect_completion(200);

    struct reply r;
    struct bytes seen = {0};
    struct client_request request = {
        .path = "/v1/completions", .body = STREAM, .on_data = break_gpu, .context = &seen};
    client_send(&site.at, &request, &r);
    assert_int_equal(r.code, 200);
    bytes_append(&seen, "", 1);
    if (!strstr(seen.data, "\"error\":{") || !strstr(seen.data, "device"))
        fail_msg("the stream does not tell: %s", seen.data);
    bytes_free(&seen);
    reply_free(&r);
    expect_health("/health/ready", 503, "failed");
    expect_health("/health", 503, "failed");
    expect_health("/health/live", 503, "failed");
    for (int i = 0; i < 3; i++) /* and the server stays up */
        expect_completion(503);
    client_get(&site.at, "/metrics", &r);
    assert_int_equal(r.code, 200);
    assert_non_null(strstr(r.body.data, "\nlatte_engine_failed 1\n"));
    reply_free(&r);
    close_site();
    fake_gpus[0].broken = false;
}

/* One of two fails: red, because half of the sessions are gone, but requests are served. */
static void test_one_of_two(void **state)
{
    (void)state;
    memset(&site, 0, sizeof(site));
    open_site();
    open_model("cuda:0,cuda:1");
    fake_gpus[0].broken = true;
    expect_completion(503);
    expect_health("/health/ready", 503, "failed");
    for (int i = 0; i < 3; i++)
        expect_completion(200);
    close_site();
    fake_gpus[0].broken = false;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_failed_device_turns_health_red),
        cmocka_unit_test(test_one_of_two),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
