/* redis_server.h - a Redis of a test's own: in a temporary directory, on a unix socket and a free
 * loopback port, ended with the test.
 *
 * Errors:  whatever goes wrong fails the running test.
 */
#ifndef LATTE_TESTS_REDIS_SERVER_H
#define LATTE_TESTS_REDIS_SERVER_H

#include <stdbool.h>
#include <sys/types.h>

struct redis_server {
    pid_t pid;
    int port;
    char dir[100];
    char url[160];        /* redis://127.0.0.1:PORT/0, with a password if there is one */
    char socket_url[160]; /* unix://... */
    char password[32];
};

/* False, with a line that says so: there is no redis-server on this machine. */
bool redis_server_is_installed(void);
/* Begins with an empty directory. password NULL: none. Every write is on the disk before its
 * reply. */
void redis_server_open(struct redis_server *s, const char *password);
/* Kill it; and begin again with the same port, files and so data. */
void redis_server_kill(struct redis_server *s);
void redis_server_start(struct redis_server *s);
/* One command's reply as text: a string, a number, "(nil)", the first of an array. */
void redis_server_ask(const struct redis_server *s, const char *const *words, char *out, int n);
void redis_server_close(struct redis_server *s); /* and its files; accepts one that is closed */

#endif
