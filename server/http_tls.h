/* http_tls.h - TLS in front of the HTTP server, by GnuTLS: --tls-cert and --tls-key.
 *
 * A thread of its own decrypts what clients send and encrypts what they are sent; the io thread
 * sees plain sockets. TLS 1.2 is the oldest version spoken, HTTP/1.1 the only protocol offered.
 * Clients are not asked for certificates.
 *
 * Threads: tls_wrap by the io thread, the other functions by main; tunnels and the pair in use
 *          belong to the TLS thread.
 * Memory:  about 70 KB and two more descriptors a connection.
 * Errors:  a file that cannot be used is INVALID, and is named with its flag and the reason.
 */
#ifndef LATTE_SERVER_HTTP_TLS_H
#define LATTE_SERVER_HTTP_TLS_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/socket.h>

#include <gnutls/gnutls.h>

#include "engine/base/error.h"

struct tls;

/* Read both files (PEM; the certificate first, then those of its issuers). The paths are
 * borrowed until tls_close. */
enum status tls_open(struct tls **out, const char *cert_path, const char *key_path,
                     struct error *err);
enum status tls_start(struct tls *s, struct error *err);
/* Read both files again, for handshakes that begin from now on. After an error the pair in use
 * stays in use. */
enum status tls_reload(struct tls *s, struct error *err);
/* Take over a client's connected, non-blocking socket. Returns the socket to use in its place, or
 * -1 (the client's is closed): its end is the client's end, and closing it closes that. */
int tls_wrap(struct tls *s, int fd, const struct sockaddr_storage *address);
/* Send what is on its way, for 3 s at most, and release. Every socket from tls_wrap must be
 * closed before. Accepts NULL. */
void tls_close(struct tls *s);

/* The other side, for the health check: send a request over a connected, blocking socket that has
 * limits of its own, and take what is answered until the server closes. Returns the bytes, cap at
 * most; 0: none. The certificate is not verified: the asker is beside the server, and has nothing
 * to hide. */
size_t tls_ask(int fd, const char *question, char *answer, size_t cap);

/* A certificate with its key. One that is loaded has one user; connections that began with it
 * are more. The last one that drops it frees it. */
struct tls_pair {
    gnutls_certificate_credentials_t loaded;
    int n_users;
};
enum status tls_pair_load(const char *cert_path, const char *key_path, struct tls_pair **out,
                          struct error *err);
void tls_pair_drop(struct tls_pair *c); /* accepts NULL */

#endif
