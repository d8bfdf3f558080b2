/* redis.h - commands to one Redis server, over a few connections that are kept open.
 *
 * A command is a list of arguments, or a script with its arguments; several are sent at once and
 * their replies come in order. A connection that breaks is replaced and the commands are sent
 * again, so a command must be one that may be done twice. While the server cannot be reached
 * commands fail at once, and a connection is tried again after a pause that grows to a second.
 *
 * Threads: any; a command has a connection for itself.
 * Memory:  replies are the caller's, freed by redis_free_replies.
 * Errors:  IO when there is no connection, TIMEOUT when a command was sent and not answered in
 *          time (it may have been done, or may be yet); both name the server's address, which
 *          never has the password in it. What Redis refuses is a reply (redis_check).
 */
#ifndef LATTE_ENGINE_REDIS_H
#define LATTE_ENGINE_REDIS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/base/error.h"

struct redis;
struct redisReply;

enum { REDIS_MAX_ARGUMENTS = 24, REDIS_SHA_BYTES = 41 };

struct redis_options {
    const char *url; /* redis://[USER][:PASSWORD]@HOST[:PORT][/DB], unix://[...@]/PATH[?db=DB] */
    int timeout_ms;  /* for a connection, and for each read and write */
};

/* Whether a text is an address of redis_options, and not a path. */
bool redis_is_url(const char *text);
/* Connects once, so that a wrong address or password is told at the start. INVALID for an
 * address that cannot be read. */
enum status redis_open(struct redis **out, const struct redis_options *options, struct error *err);
void redis_close(struct redis *r); /* accepts NULL */
/* For messages: "redis://HOST:PORT/DB". */
const char *redis_address(const struct redis *r);
/* The last command was answered. */
bool redis_is_up(struct redis *r);

struct redis_script {
    const char *text;
    char sha[REDIS_SHA_BYTES]; /* by redis_load */
};
enum status redis_load(struct redis *r, struct redis_script *script, struct error *err);

/* Arguments are borrowed until the command has been run. */
struct redis_command {
    const struct redis_script *script; /* NULL: a command by its name */
    int n;
    const char *arguments[REDIS_MAX_ARGUMENTS];
    size_t lengths[REDIS_MAX_ARGUMENTS];
};
/* A command of these words, ended by NULL; more arguments may be added. */
void redis_command(struct redis_command *c, const char *word, ...) __attribute__((sentinel));
/* A script's call with its one key. */
void redis_call(struct redis_command *c, const struct redis_script *script, const char *key);
void redis_add(struct redis_command *c, const void *data, size_t n);
void redis_add_text(struct redis_command *c, const char *text);

/* Run commands[n]; on success there is a reply to each, to be freed. */
enum status redis_run(struct redis *r, const struct redis_command *commands, int n,
                      struct redisReply **replies, struct error *err);
void redis_free_replies(struct redisReply **replies, int n);
/* IO with Redis's own words when the reply is an error. */
enum status redis_check(const struct redis *r, const struct redisReply *reply, struct error *err);
/* The reply says that the server cannot answer yet, but will: it is loading, or being replaced. */
bool redis_is_passing(const struct redisReply *reply);

#endif
