/* http_tls_pair.c - reading a certificate and its key; see http_tls.h. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <gnutls/gnutls.h>
#include <gnutls/x509.h>

#include "server/http_tls.h"
#include "server/log.h"

enum { MAX_CHAIN = 16 }; /* certificates in a file */

void tls_pair_drop(struct tls_pair *c)
{
    if (!c || --c->n_users)
        return;
    gnutls_certificate_free_credentials(c->loaded);
    free(c);
}

static enum status fail_file(struct error *err, const char *flag, const char *path, int code)
{
    const char *reason = code == GNUTLS_E_FILE_ERROR ? strerror(errno) : gnutls_strerror(code);
    return fail_field(err, STATUS_INVALID, flag, "--%s: %s: %s", flag, path, reason);
}

static void forget_file(gnutls_datum_t *text)
{
    if (text->data)
        gnutls_memset(text->data, 0, text->size);
    gnutls_free(text->data);
    text->data = NULL;
}

static enum status read_chain(const char *path, gnutls_x509_crt_t **chain, unsigned *n,
                              struct error *err)
{
    gnutls_datum_t text = {0};
    int code = gnutls_load_file(path, &text);
    if (!code)
        code = gnutls_x509_crt_list_import2(chain, n, &text, GNUTLS_X509_FMT_PEM, 0);
    enum status st = code < 0 ? fail_file(err, "tls-cert", path, code) : STATUS_OK;
    forget_file(&text);
    if (!st && *n > MAX_CHAIN) /* the caller frees them */
        st = fail_field(err, STATUS_INVALID, "tls-cert",
                        "--tls-cert: %s: expected at most %d certificates, found %u", path,
                        MAX_CHAIN, *n);
    return st;
}

static enum status read_key(const char *path, gnutls_x509_privkey_t key, struct error *err)
{
    gnutls_datum_t text = {0};
    int code = gnutls_load_file(path, &text);
    if (!code)
        code = gnutls_x509_privkey_import2(key, &text, GNUTLS_X509_FMT_PEM, NULL, 0);
    enum status st = code < 0 ? fail_file(err, "tls-key", path, code) : STATUS_OK;
    forget_file(&text);
    return st;
}

/* A day's date, for the log. */
static void warn_of_dates(const char *path, gnutls_x509_crt_t certificate)
{
    time_t now = time(NULL), end = gnutls_x509_crt_get_expiration_time(certificate);
    struct tm date = {0};
    char text[32] = "";
    gmtime_r(&end, &date);
    strftime(text, sizeof(text), "%Y-%m-%d %H:%M UTC", &date);
    if (end < now)
        log_event(LOG_WARN, "tls", "%s expired on %s", path, text);
    else if (gnutls_x509_crt_get_activation_time(certificate) > now)
        log_event(LOG_WARN, "tls", "%s is not valid yet", path);
    else
        log_event(LOG_INFO, "tls", "%s is valid until %s", path, text);
}

static enum status join(const char *cert_path, const char *key_path, struct tls_pair *c,
                        gnutls_x509_crt_t *chain, unsigned n, gnutls_x509_privkey_t key,
                        struct error *err)
{
    int code = gnutls_certificate_set_x509_key(c->loaded, chain, (int)n, key);
    if (code == GNUTLS_E_CERTIFICATE_KEY_MISMATCH)
        return fail_field(err, STATUS_INVALID, "tls-key",
                          "--tls-key: %s is not the key of the certificate in %s", key_path,
                          cert_path);
    return code < 0 ? fail_file(err, "tls-cert", cert_path, code) : STATUS_OK;
}

enum status tls_pair_load(const char *cert_path, const char *key_path, struct tls_pair **out,
                          struct error *err)
{
    struct tls_pair *c = calloc(1, sizeof(*c));
    gnutls_x509_crt_t *chain = NULL;
    gnutls_x509_privkey_t key = NULL;
    unsigned n = 0;
    if (!c || gnutls_certificate_allocate_credentials(&c->loaded) ||
        gnutls_x509_privkey_init(&key)) {
        if (c && c->loaded)
            gnutls_certificate_free_credentials(c->loaded);
        free(c);
        return fail(err, STATUS_NOMEM, "tls: out of memory");
    }
    c->n_users = 1;
    enum status st = read_chain(cert_path, &chain, &n, err);
    if (!st)
        st = read_key(key_path, key, err);
    if (!st)
        st = join(cert_path, key_path, c, chain, n, key, err);
    if (!st)
        warn_of_dates(cert_path, chain[0]);
    for (unsigned i = 0; i < n; i++)
        gnutls_x509_crt_deinit(chain[i]);
    gnutls_free(chain);
    gnutls_x509_privkey_deinit(key);
    if (st)
        tls_pair_drop(c);
    else
        *out = c;
    return st;
}
