/* test_tls.c - --tls-cert and --tls-key: what holds over plain HTTP holds over TLS, as libcurl (by
 * OpenSSL) and GnuTLS clients see it, and SIGHUP changes the certificate.
 *
 * Certificates are made here, each signed by itself, so that the file of one is also what a
 * client trusts. */
#include "tests/http/harness.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <arpa/inet.h>
#include <curl/curl.h>
#include <gnutls/gnutls.h>
#include <gnutls/x509.h>

#include "tests/unit/model_files.h"

enum { LONG_MS = 20000, DAY_S = 86400 };

static struct server site; /* of all tests but those that start one */
static char dir[100], cert_path[128], key_path[128], other_cert[128], other_key[128];

/* Certificates. */

static gnutls_x509_privkey_t make_key(void)
{
    gnutls_x509_privkey_t key;
    assert_int_equal(gnutls_x509_privkey_init(&key), 0);
    assert_int_equal(gnutls_x509_privkey_generate(
                         key, GNUTLS_PK_ECDSA, GNUTLS_CURVE_TO_BITS(GNUTLS_ECC_CURVE_SECP256R1), 0),
                     0);
    return key;
}

static gnutls_x509_crt_t make_certificate(gnutls_x509_privkey_t key, int serial)
{
    gnutls_x509_crt_t c;
    struct in_addr loopback = {htonl(INADDR_LOOPBACK)};
    unsigned char number[1] = {(unsigned char)serial};
    assert_int_equal(gnutls_x509_crt_init(&c), 0);
    int failed = gnutls_x509_crt_set_version(c, 3) || gnutls_x509_crt_set_serial(c, number, 1) ||
                 gnutls_x509_crt_set_dn(c, "CN=localhost", NULL) ||
                 gnutls_x509_crt_set_subject_alt_name(c, GNUTLS_SAN_IPADDRESS, &loopback,
                                                      sizeof(loopback), GNUTLS_FSAN_SET) ||
                 gnutls_x509_crt_set_activation_time(c, time(NULL) - DAY_S) ||
                 gnutls_x509_crt_set_expiration_time(c, time(NULL) + DAY_S) ||
                 gnutls_x509_crt_set_key(c, key) ||
                 gnutls_x509_crt_sign2(c, c, key, GNUTLS_DIG_SHA256, 0);
    assert_false(failed);
    return c;
}

static void write_pem(const char *path, const gnutls_datum_t *text)
{
    char next[160]; /* renamed, so that nobody reads half a file */
    snprintf(next, sizeof(next), "%s.next", path);
    FILE *f = fopen(next, "w");
    assert_non_null(f);
    assert_int_equal(fwrite(text->data, 1, text->size, f), text->size);
    assert_int_equal(fclose(f), 0);
    assert_int_equal(rename(next, path), 0);
}

static void write_pair(const char *cert, const char *key, int serial)
{
    gnutls_x509_privkey_t k = make_key();
    gnutls_x509_crt_t c = make_certificate(k, serial);
    gnutls_datum_t text = {0};
    assert_int_equal(gnutls_x509_crt_export2(c, GNUTLS_X509_FMT_PEM, &text), 0);
    write_pem(cert, &text);
    gnutls_free(text.data);
    assert_int_equal(gnutls_x509_privkey_export2(k, GNUTLS_X509_FMT_PEM, &text), 0);
    write_pem(key, &text);
    gnutls_free(text.data);
    gnutls_x509_crt_deinit(c);
    gnutls_x509_privkey_deinit(k);
}

static void start(struct server *s)
{
    const char *args[] = {"--tls-cert",       cert_path, "--tls-key", key_path,
                          "--header-timeout", "1",       NULL};
    server_start(s, args);
}

static int open_site(void **state)
{
    (void)state;
    if (test_dir_make(dir, sizeof(dir)))
        return -1;
    snprintf(cert_path, sizeof(cert_path), "%s/cert.pem", dir);
    snprintf(key_path, sizeof(key_path), "%s/key.pem", dir);
    snprintf(other_cert, sizeof(other_cert), "%s/other-cert.pem", dir);
    snprintf(other_key, sizeof(other_key), "%s/other-key.pem", dir);
    write_pair(cert_path, key_path, 1);
    write_pair(other_cert, other_key, 2);
    start(&site);
    return 0;
}

static int close_site(void **state)
{
    (void)state;
    server_stop(&site);
    test_dir_remove(dir);
    return 0;
}

/* The code of a GET by a client that trusts this file, or minus curl's error. */
static int get_trusting(const struct server *s, const char *trusted)
{
    struct server as = *s;
    struct reply r;
    snprintf(as.trusted, sizeof(as.trusted), "%s", trusted);
    client_get(&as, "/v1/models", &r);
    int code = r.curl_error ? -r.curl_error : r.code;
    reply_free(&r);
    return code;
}

/* Requests. */

static size_t ignore(char *data, size_t size, size_t n, void *context)
{
    (void)data;
    (void)context;
    return size * n;
}

static void test_keep_alive(void **state)
{
    (void)state;
    assert_non_null(strstr(site.url, "https://127.0.0.1:"));
    char url[160];
    snprintf(url, sizeof(url), "%s/v1/models", site.url);
    CURL *curl = curl_easy_init();
    curl_easy_setopt(curl, CURLOPT_URL, url);
    curl_easy_setopt(curl, CURLOPT_CAINFO, cert_path);
    curl_easy_setopt(curl, CURLOPT_NOPROXY, "*");
    curl_easy_setopt(curl, CURLOPT_WRITEFUNCTION, ignore);
    for (int i = 0; i < 3; i++) {
        long n_connects = -1, code = 0, version = 0;
        assert_int_equal(curl_easy_perform(curl), CURLE_OK);
        curl_easy_getinfo(curl, CURLINFO_NUM_CONNECTS, &n_connects);
        curl_easy_getinfo(curl, CURLINFO_RESPONSE_CODE, &code);
        curl_easy_getinfo(curl, CURLINFO_HTTP_VERSION, &version);
        assert_int_equal(code, 200);
        assert_int_equal(n_connects, i ? 0 : 1);
        assert_int_equal(version, CURL_HTTP_VERSION_1_1);
    }
    curl_easy_cleanup(curl);
}

struct pieces {
    struct server *server;
    int n, leave_after;
    void (*on_first)(struct server *s);
};

static bool count_piece(void *context, const char *data, size_t n)
{
    (void)data;
    (void)n;
    struct pieces *p = context;
    if (p->n++ == 0 && p->on_first)
        p->on_first(p->server);
    return !p->leave_after || p->n < p->leave_after;
}

static void stream(struct server *s, int n_tokens, struct pieces *p, struct reply *r)
{
    char body[160];
    snprintf(body, sizeof(body),
             "{\"prompt\":\"Once\",\"max_tokens\":%d,\"stream\":true,\"temperature\":0,"
             "\"ignore_eos\":true,\"return_token_ids\":true}",
             n_tokens);
    p->server = s;
    client_send(s,
                &(struct client_request){
                    .path = "/v1/completions", .body = body, .on_data = count_piece, .context = p},
                r);
}

static void expect_whole_stream(const struct reply *r)
{
    assert_int_equal(r->curl_error, 0);
    assert_int_equal(r->code, 200);
    assert_non_null(r->body.data);
    assert_non_null(strstr(r->body.data, "\"finish_reason\":\"length\""));
    assert_string_equal(r->body.data + r->body.n - strlen("data: [DONE]\n\n"), "data: [DONE]\n\n");
}

static void test_stream(void **state)
{
    (void)state;
    struct reply r;
    struct pieces p = {0};
    stream(&site, 300, &p, &r);
    expect_whole_stream(&r);
    assert_true(p.n > 3); /* as it is made, not at the end */
    reply_free(&r);
}

/* The body passes in many pieces, each way, and is what it was. */
static void test_large_bodies(void **state)
{
    (void)state;
    struct reply r;
    size_t n_text = 1200000;
    char *body = malloc(n_text + 100);
    size_t n = (size_t)sprintf(body, "{\"prompt\":\"");
    for (size_t i = 0; i < n_text; i++) /* words of one letter */
        body[n++] = i % 2 ? ' ' : (char)('a' + i / 2 % 26);
    strcpy(body + n, "\"}");
    client_post(&site, "/tokenize", body, &r);
    assert_int_equal(r.code, 200);
    const char *count = strstr(r.body.data, "\"count\":");
    assert_non_null(count);
    assert_true(atoi(count + 8) >= 600000);
    assert_true(r.body.n > (1 << 20));
    assert_int_equal(r.body.data[r.body.n - 1], '}');
    reply_free(&r);
    free(body);
}

static void test_hang_up_frees_the_job(void **state)
{
    (void)state;
    struct reply r;
    double before = server_metric(&site, "latte_client_disconnects_total");
    struct pieces p = {.leave_after = 2};
    stream(&site, 500000, &p, &r);
    assert_int_equal(r.curl_error, CURLE_WRITE_ERROR);
    assert_true(server_await_metric(&site, "latte_client_disconnects_total", before + 1, LONG_MS));
    assert_true(server_await_metric(&site, "latte_requests_running", 0, LONG_MS));
    reply_free(&r);
}

static void stop_softly(struct server *s)
{
    server_signal(s, SIGTERM);
}

static void test_stop_sends_what_is_on_its_way(void **state)
{
    (void)state;
    struct server s;
    struct reply r;
    start(&s);
    struct pieces p = {.on_first = stop_softly};
    stream(&s, 500, &p, &r);
    expect_whole_stream(&r);
    assert_int_equal(server_wait_exit(&s, LONG_MS), 0);
    reply_free(&r);
    server_stop(&s);
}

/* Handshakes. */

/* The version that a client with these priorities gets, or GnuTLS's error. */
static int shake_hands(const struct server *s, const char *priorities, char *protocol, size_t n)
{
    gnutls_session_t session;
    gnutls_certificate_credentials_t any;
    const gnutls_datum_t offered[] = {{(unsigned char *)"h2", 2}, {(unsigned char *)"http/1.1", 8}};
    gnutls_datum_t chosen = {0};
    int fd = raw_connect(s), code;
    assert_int_equal(gnutls_init(&session, GNUTLS_CLIENT), 0);
    assert_int_equal(gnutls_priority_set_direct(session, priorities, NULL), 0);
    assert_int_equal(gnutls_certificate_allocate_credentials(&any), 0);
    gnutls_credentials_set(session, GNUTLS_CRD_CERTIFICATE, any);
    gnutls_alpn_set_protocols(session, offered, 2, 0);
    gnutls_transport_set_int(session, fd);
    gnutls_handshake_set_timeout(session, LONG_MS);
    do {
        code = gnutls_handshake(session);
    } while (code < 0 && !gnutls_error_is_fatal(code));
    if (!code && !gnutls_alpn_get_selected_protocol(session, &chosen))
        snprintf(protocol, n, "%.*s", (int)chosen.size, chosen.data);
    int version = code ? code : (int)gnutls_protocol_get_version(session);
    gnutls_deinit(session);
    gnutls_certificate_free_credentials(any);
    close(fd);
    return version;
}

static void test_versions(void **state)
{
    (void)state;
    char protocol[16] = "";
    assert_int_equal(shake_hands(&site, "NORMAL", protocol, sizeof(protocol)), GNUTLS_TLS1_3);
    assert_string_equal(protocol, "http/1.1");
    assert_int_equal(
        shake_hands(&site, "NORMAL:-VERS-ALL:+VERS-TLS1.2", protocol, sizeof(protocol)),
        GNUTLS_TLS1_2);
    double before = server_metric(&site, "latte_tls_failures_total");
    assert_true(shake_hands(&site, "NORMAL:-VERS-ALL:+VERS-TLS1.1:+VERS-TLS1.0", protocol,
                            sizeof(protocol)) < 0);
    assert_true(server_await_metric(&site, "latte_tls_failures_total", before + 1, LONG_MS));
}

static void test_a_stranger_is_not_trusted(void **state)
{
    (void)state;
    assert_int_equal(get_trusting(&site, cert_path), 200);
    assert_int_equal(get_trusting(&site, other_cert), -CURLE_PEER_FAILED_VERIFICATION);
}

static void test_plain_http_is_told(void **state)
{
    (void)state;
    struct bytes out = {0};
    static const char request[] = "GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n";
    int64_t begin = now_ms();
    raw_exchange(&site, request, strlen(request), &out);
    assert_true(now_ms() - begin < LONG_MS);
    assert_non_null(out.data);
    assert_non_null(strstr(out.data, "HTTP/1.1 400 "));
    assert_non_null(strstr(out.data, "\"message\":\"This port speaks TLS: use https://.\""));
    bytes_free(&out);
}

static int healthcheck(const char *const flags[4], struct bytes *said)
{
    char port[16];
    snprintf(port, sizeof(port), "%d", site.port);
    const char *args[] = {"--healthcheck", "--port", port,     "--host", "127.0.0.1",
                          flags[0],        flags[1], flags[2], flags[3], NULL};
    return server_run(args, said);
}

/* What a health check is told is what the server is told. */
static void test_healthcheck(void **state)
{
    (void)state;
    struct bytes said = {0};
    assert_int_equal(
        healthcheck((const char *const[4]){"--tls-cert", cert_path, "--tls-key", key_path}, &said),
        0);
    bytes_free(&said);
    assert_int_equal(healthcheck((const char *const[4]){NULL}, &said), 1);
    assert_non_null(strstr(said.data, "This port speaks TLS"));
    bytes_free(&said);
}

/* Clients that begin no handshake, or do not go on with it, are let go of. */
static void test_half_open_handshakes_end(void **state)
{
    (void)state;
    int fds[6];
    for (int i = 0; i < 6; i++) {
        fds[i] = raw_connect(&site);
        if (i % 2) /* the beginning of a ClientHello of 512 bytes */
            raw_write(fds[i], "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 11);
    }
    assert_int_equal(get_trusting(&site, cert_path), 200); /* meanwhile */
    for (int i = 0; i < 6; i++) {
        struct bytes out = {0};
        assert_true(raw_read(fds[i], &out, LONG_MS));
        bytes_free(&out);
        close(fds[i]);
    }
    assert_true(server_await_metric(&site, "latte_connections", 1, LONG_MS)); /* that which asks */
}

/* Reloading. */

static char stayed[128]; /* a copy of the certificate in use */

static void await_log(const struct server *s, const char *text)
{
    for (int64_t end = now_ms() + LONG_MS; now_ms() < end; sleep_ms(10)) {
        char *log = server_log(s);
        bool found = strstr(log, text);
        free(log);
        if (found)
            return;
    }
    fail_msg("the log does not say '%s'", text);
}

static void copy(const char *from, const char *to)
{
    size_t n;
    char *text = test_file_read(from, &n);
    assert_non_null(text);
    write_pem(to, &(gnutls_datum_t){(unsigned char *)text, (unsigned)n});
    free(text);
}

/* New connections get the new certificate, while the stream whose first piece came goes on. */
static void change_certificate(struct server *s)
{
    char old[128];
    snprintf(old, sizeof(old), "%s/old.pem", dir);
    copy(cert_path, old);
    write_pair(cert_path, key_path, 3);
    assert_int_equal(get_trusting(s, old), 200); /* not before it is told to */
    server_signal(s, SIGHUP);
    await_log(s, "new connections get the certificate in");
    assert_int_equal(get_trusting(s, old), -CURLE_PEER_FAILED_VERIFICATION);
    assert_int_equal(get_trusting(s, cert_path), 200);
}

static void test_sighup_changes_the_certificate(void **state)
{
    (void)state;
    struct reply r;
    struct pieces p = {.on_first = change_certificate};
    stream(&site, 3000, &p, &r);
    expect_whole_stream(&r);
    reply_free(&r);

    snprintf(stayed, sizeof(stayed), "%s/stayed.pem", dir);
    copy(cert_path, stayed);
    copy(other_cert, cert_path); /* the key is of another */
    server_signal(&site, SIGHUP);
    await_log(&site, "is not the key of the certificate in");
    assert_int_equal(get_trusting(&site, stayed), 200);
    write_pem(cert_path, &(gnutls_datum_t){(unsigned char *)"nothing\n", 8});
    server_signal(&site, SIGHUP);
    await_log(&site, "cert.pem: ");
    assert_int_equal(get_trusting(&site, stayed), 200);
    copy(stayed, cert_path);
}

/* Starting. */

static void expect_refusal(const char *cert, const char *key, const char *text)
{
    char model[100];
    struct bytes output;
    make_tiny_model(model, sizeof(model));
    const char *args[] = {"--model",
                          model,
                          "--port",
                          "0",
                          cert ? "--tls-cert" : "--tls-key",
                          cert ? cert : key,
                          cert && key ? "--tls-key" : NULL,
                          key,
                          NULL};
    assert_int_not_equal(server_run(args, &output), 0);
    if (!output.data || !strstr(output.data, text))
        fail_msg("expected '%s', found '%s'", text, output.data ? output.data : "");
    bytes_free(&output);
    test_dir_remove(model);
}

static void test_wrong_files(void **state)
{
    (void)state;
    char missing[128], text[400];
    snprintf(missing, sizeof(missing), "%s/missing.pem", dir);
    snprintf(text, sizeof(text), "--tls-cert: %s: No such file or directory", missing);
    expect_refusal(missing, key_path, text);
    snprintf(text, sizeof(text), "--tls-key: %s: No such file or directory", missing);
    expect_refusal(cert_path, missing, text);
    snprintf(text, sizeof(text), "--tls-cert: %s: ", key_path);
    expect_refusal(key_path, key_path, text); /* no certificate in it */
    snprintf(text, sizeof(text), "--tls-key: %s is not the key of the certificate in %s", other_key,
             cert_path);
    expect_refusal(cert_path, other_key, text);
    expect_refusal(cert_path, NULL, "--tls-cert: expected --tls-key FILE beside it");
    expect_refusal(NULL, key_path, "--tls-key: expected --tls-cert FILE beside it");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_keep_alive),
        cmocka_unit_test(test_stream),
        cmocka_unit_test(test_large_bodies),
        cmocka_unit_test(test_hang_up_frees_the_job),
        cmocka_unit_test(test_stop_sends_what_is_on_its_way),
        cmocka_unit_test(test_versions),
        cmocka_unit_test(test_a_stranger_is_not_trusted),
        cmocka_unit_test(test_plain_http_is_told),
        cmocka_unit_test(test_healthcheck),
        cmocka_unit_test(test_half_open_handshakes_end),
        cmocka_unit_test(test_sighup_changes_the_certificate),
        cmocka_unit_test(test_wrong_files),
    };
    return cmocka_run_group_tests(tests, open_site, close_site);
}
