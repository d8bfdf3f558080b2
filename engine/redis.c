/* redis.c - see redis.h */
#include "engine/redis.h"

#include <ctype.h>
#include <errno.h>
#include <hiredis/hiredis.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/time.h>
#include <time.h>

enum {
    MAX_IDLE = 16, /* connections that are kept open */
    DEFAULT_PORT = 6379,
    FIRST_PAUSE_MS = 20,
    MAX_PAUSE_MS = 1000,
};

/* Where the server is. */
struct place {
    char *text; /* the parts below lie in it */
    const char *user, *password, *host, *path;
    int port, db;
    char shown[160];
};

struct redis {
    struct place place;
    int timeout_ms;

    pthread_mutex_t lock; /* guards all that follows */
    redisContext *idle[MAX_IDLE];
    int n_idle;
    bool is_up;
    bool is_probing;                 /* somebody finds out whether it is up again */
    int64_t not_before_ms, pause_ms; /* no new connection before */
    struct error last;               /* why */
};

static int64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* ---- addresses ---- */

bool redis_is_url(const char *text)
{
    return !strncmp(text, "redis:", 6) || !strncmp(text, "rediss:", 7) ||
           !strncmp(text, "unix:", 5);
}

/* %41 as A, in place; false for what is no hex digit. */
static bool decode(char *text)
{
    char *out = text;
    for (const char *at = text; *at; at++) {
        if (*at != '%') {
            *out++ = *at;
            continue;
        }
        char digits[3] = {at[1], at[1] ? at[2] : 0}, *end = digits;
        char c = (char)strtoul(digits, &end, 16);
        if (!isxdigit((unsigned char)*digits) || end != digits + 2 || !c)
            return false;
        *out++ = c;
        at += 2;
    }
    *out = 0;
    return true;
}

static bool parse_number(const char *text, int max, int *out)
{
    char *end;
    long value = strtol(text, &end, 10);
    bool good = *text >= '0' && *text <= '9' && !*end && value <= max;
    *out = good ? (int)value : 0;
    return good;
}

/* "USER:PASSWORD@" at the beginning; returns what is behind. */
static char *take_login(struct place *p, char *at)
{
    char *end = strrchr(at, '@');
    if (!end)
        return at;
    *end = 0;
    char *colon = strchr(at, ':');
    if (colon)
        *colon = 0;
    p->user = *at ? at : NULL;
    p->password = colon ? colon + 1 : NULL;
    return end + 1;
}

/* HOST[:PORT][/DB], where an IPv6 address is in brackets. */
static bool take_host(struct place *p, char *at)
{
    char *slash = strchr(at, '/'), *bracket = *at == '[' ? strchr(at, ']') : NULL;
    if (slash)
        *slash = 0;
    char *colon = strchr(bracket ? bracket : at, ':');
    p->port = DEFAULT_PORT;
    bool good = !colon || parse_number(colon + 1, 65535, &p->port);
    if (slash && slash[1])
        good &= parse_number(slash + 1, 1 << 20, &p->db);
    if (colon)
        *colon = 0;
    if (bracket)
        *bracket = 0;
    p->host = at + (bracket != NULL);
    snprintf(p->shown, sizeof(p->shown), "redis://%.100s:%d/%d", p->host, p->port, p->db);
    return good && *p->host;
}

/* /PATH[?db=DB] */
static bool take_path(struct place *p, char *at)
{
    char *query = strchr(at, '?');
    if (query)
        *query = 0;
    p->path = at;
    bool good =
        !query || (!strncmp(query + 1, "db=", 3) && parse_number(query + 4, 1 << 20, &p->db));
    snprintf(p->shown, sizeof(p->shown), "unix://%.120s?db=%d", p->path, p->db);
    return good && *at == '/';
}

static enum status parse_url(struct place *p, const char *url, struct error *err)
{
    static const char *const schemes[] = {"redis://", "unix://"};
    if (!strncmp(url, "rediss:", 7))
        return fail(err, STATUS_INVALID,
                    "rediss://: this server speaks to Redis without TLS; put a tunnel between");
    if (!(p->text = strdup(url)))
        return fail(err, STATUS_NOMEM, "out of memory for the address of Redis");
    bool is_path = !strncmp(url, schemes[1], strlen(schemes[1]));
    char *at = p->text + strlen(schemes[is_path]);
    bool good = !strncmp(url, schemes[is_path], strlen(schemes[is_path]));
    if (good) {
        at = take_login(p, at);
        good = is_path ? take_path(p, at) : take_host(p, at);
    }
    if (good && p->user)
        good = decode((char *)p->user);
    if (good && p->password)
        good = decode((char *)p->password);
    return good ? STATUS_OK
                : fail(err, STATUS_INVALID,
                       "expected redis://[USER][:PASSWORD@]HOST[:PORT][/DB] or "
                       "unix://[USER][:PASSWORD@]/PATH[?db=DB]");
}

/* ---- connections ---- */

static struct timeval timeout_of(const struct redis *r)
{
    return (struct timeval){r->timeout_ms / 1000, r->timeout_ms % 1000 * 1000};
}

/* One command of a new connection, which has to be answered well. */
static enum status say(const struct redis *r, redisContext *c, int n, const char **words,
                       struct error *err)
{
    redisReply *reply = redisCommandArgv(c, n, words, NULL);
    if (!reply)
        return fail(err, STATUS_IO, "Redis at %s: %s", r->place.shown, c->errstr);
    enum status st = redis_check(r, reply, err);
    freeReplyObject(reply);
    return st;
}

static enum status log_in(const struct redis *r, redisContext *c, struct error *err)
{
    const struct place *p = &r->place;
    enum status st = STATUS_OK;
    char db[16];
    if (p->password && p->user)
        st = say(r, c, 3, (const char *[]){"AUTH", p->user, p->password}, err);
    else if (p->password)
        st = say(r, c, 2, (const char *[]){"AUTH", p->password}, err);
    snprintf(db, sizeof(db), "%d", p->db);
    if (!st && p->db)
        st = say(r, c, 2, (const char *[]){"SELECT", db}, err);
    return st ? st : say(r, c, 1, (const char *[]){"PING"}, err);
}

static enum status connect_to(const struct redis *r, redisContext **out, struct error *err)
{
    const struct place *p = &r->place;
    redisContext *c = p->path ? redisConnectUnixWithTimeout(p->path, timeout_of(r))
                              : redisConnectWithTimeout(p->host, p->port, timeout_of(r));
    if (!c)
        return fail(err, STATUS_NOMEM, "out of memory for a connection to Redis");
    enum status st = STATUS_OK;
    if (c->err)
        st = fail(err, STATUS_IO, "Redis at %s cannot be reached: %s", p->shown, c->errstr);
    else if (redisSetTimeout(c, timeout_of(r)) != REDIS_OK)
        st = fail(err, STATUS_IO, "Redis at %s: %s", p->shown, c->errstr);
    if (!st)
        st = log_in(r, c, err);
    if (st)
        redisFree(c);
    else
        *out = c;
    return st;
}

/* With the lock held. The next attempt waits, twice as long as the one before. */
static void note_failure(struct redis *r, const struct error *err)
{
    r->is_up = false;
    r->last = *err;
    r->pause_ms = r->pause_ms ? 2 * r->pause_ms : FIRST_PAUSE_MS;
    if (r->pause_ms > MAX_PAUSE_MS)
        r->pause_ms = MAX_PAUSE_MS;
    r->not_before_ms = now_ms() + r->pause_ms;
}

/* was_idle: it has been used before, and the server may have closed it meanwhile. While the server
 * is away one at a time waits for it, and the others are told at once. */
static enum status take(struct redis *r, redisContext **out, bool *was_idle, struct error *err)
{
    pthread_mutex_lock(&r->lock);
    *was_idle = r->n_idle > 0;
    bool must_wait = !*was_idle && (r->is_probing || now_ms() < r->not_before_ms);
    bool is_probe = !*was_idle && !must_wait && !r->is_up;
    r->is_probing |= is_probe;
    if (*was_idle)
        *out = r->idle[--r->n_idle];
    else if (must_wait)
        *err = r->last;
    pthread_mutex_unlock(&r->lock);
    if (*was_idle)
        return STATUS_OK;
    if (must_wait)
        return err->status = STATUS_IO;
    enum status st = connect_to(r, out, err);
    pthread_mutex_lock(&r->lock);
    r->is_probing &= !is_probe;
    r->is_up |= !st;
    if (st)
        note_failure(r, err);
    pthread_mutex_unlock(&r->lock);
    return st;
}

static void give_back(struct redis *r, redisContext *c)
{
    pthread_mutex_lock(&r->lock);
    r->is_up = true;
    r->pause_ms = r->not_before_ms = 0;
    bool is_kept = r->n_idle < MAX_IDLE;
    if (is_kept)
        r->idle[r->n_idle++] = c;
    pthread_mutex_unlock(&r->lock);
    if (!is_kept)
        redisFree(c);
}

/* When one of them was found broken the others are, too. */
static void drop_idle(struct redis *r)
{
    pthread_mutex_lock(&r->lock);
    while (r->n_idle)
        redisFree(r->idle[--r->n_idle]);
    pthread_mutex_unlock(&r->lock);
}

/* ---- commands ---- */

void redis_add(struct redis_command *c, const void *data, size_t n)
{
    CHECK(c->n < REDIS_MAX_ARGUMENTS);
    c->arguments[c->n] = data ? data : "";
    c->lengths[c->n++] = data ? n : 0;
}

void redis_add_text(struct redis_command *c, const char *text)
{
    redis_add(c, text, strlen(text));
}

void redis_command(struct redis_command *c, const char *word, ...)
{
    va_list more;
    c->script = NULL;
    c->n = 0;
    va_start(more, word);
    for (const char *at = word; at; at = va_arg(more, const char *))
        redis_add_text(c, at);
    va_end(more);
}

void redis_call(struct redis_command *c, const struct redis_script *script, const char *key)
{
    redis_command(c, "EVALSHA", script->sha, "1", key, NULL);
    c->script = script;
}

static enum status append(redisContext *connection, const struct redis_command *c)
{
    return redisAppendCommandArgv(connection, c->n, (const char **)c->arguments, c->lengths) ==
                   REDIS_OK
               ? STATUS_OK
               : STATUS_IO;
}

/* The server has forgotten its scripts: it gets this one whole. */
static bool run_whole(redisContext *connection, const struct redis_command *c, redisReply **reply)
{
    struct redis_command whole = *c;
    whole.arguments[0] = "EVAL";
    whole.lengths[0] = 4;
    whole.arguments[1] = c->script->text;
    whole.lengths[1] = strlen(c->script->text);
    void *again = NULL;
    if (append(connection, &whole) || redisGetReply(connection, &again) != REDIS_OK)
        return false;
    freeReplyObject(*reply);
    *reply = again;
    return true;
}

static bool is_error(const redisReply *reply, const char *word)
{
    return reply->type == REDIS_REPLY_ERROR && !strncmp(reply->str, word, strlen(word));
}

/* All commands on this connection. False: it is broken, and there are no replies. */
static bool exchange(redisContext *connection, const struct redis_command *commands, int n,
                     redisReply **replies)
{
    int n_replies = 0;
    bool good = true;
    for (int i = 0; good && i < n; i++)
        good = !append(connection, &commands[i]);
    for (void *reply = NULL; good && n_replies < n; n_replies += good) {
        good = redisGetReply(connection, &reply) == REDIS_OK && reply;
        if (good)
            replies[n_replies] = reply;
    }
    for (int i = 0; good && i < n; i++)
        if (commands[i].script && is_error(replies[i], "NOSCRIPT"))
            good = run_whole(connection, &commands[i], &replies[i]);
    if (!good)
        redis_free_replies(replies, n_replies);
    return good;
}

static bool has_timed_out(const redisContext *c)
{
    return c->err == REDIS_ERR_IO &&
           (errno == EAGAIN || errno == EWOULDBLOCK || errno == ETIMEDOUT);
}

/* On a connection that was used before, or a new one. *again: the server had closed it. */
static enum status try_run(struct redis *r, const struct redis_command *commands, int n,
                           redisReply **replies, bool *again, struct error *err)
{
    redisContext *c = NULL;
    bool was_idle;
    enum status st = take(r, &c, &was_idle, err);
    *again = false;
    if (st)
        return st;
    if (exchange(c, commands, n, replies)) {
        give_back(r, c);
        return STATUS_OK;
    }
    bool is_late = has_timed_out(c);
    st = fail(err, STATUS_TIMEOUT, "Redis at %s did not answer: %s", r->place.shown,
              is_late ? "the time of --store-timeout is over" : c->errstr);
    redisFree(c);
    drop_idle(r);
    *again = was_idle && !is_late;
    if (*again)
        return st;
    pthread_mutex_lock(&r->lock);
    note_failure(r, err);
    pthread_mutex_unlock(&r->lock);
    return st;
}

enum status redis_run(struct redis *r, const struct redis_command *commands, int n,
                      redisReply **replies, struct error *err)
{
    struct error why;
    bool again = true, was_sent = false;
    enum status st = STATUS_OK;
    while (again) {
        st = try_run(r, commands, n, replies, &again, &why);
        was_sent |= st == STATUS_TIMEOUT;
    }
    if (!st)
        return STATUS_OK;
    why.status = was_sent ? STATUS_TIMEOUT : st;
    if (err)
        *err = why;
    return why.status;
}

void redis_free_replies(redisReply **replies, int n)
{
    for (int i = 0; i < n; i++) {
        freeReplyObject(replies[i]);
        replies[i] = NULL;
    }
}

enum status redis_check(const struct redis *r, const redisReply *reply, struct error *err)
{
    if (reply->type != REDIS_REPLY_ERROR)
        return STATUS_OK;
    return fail(err, STATUS_IO, "Redis at %s refuses: %.300s", r->place.shown, reply->str);
}

bool redis_is_passing(const redisReply *reply)
{
    static const char *const words[] = {"LOADING",     "READONLY", "MASTERDOWN",
                                        "CLUSTERDOWN", "TRYAGAIN", "BUSY "};
    for (size_t i = 0; i < sizeof(words) / sizeof(*words); i++)
        if (is_error(reply, words[i]))
            return true;
    return false;
}

enum status redis_load(struct redis *r, struct redis_script *script, struct error *err)
{
    struct redis_command c;
    redisReply *reply = NULL;
    redis_command(&c, "SCRIPT", "LOAD", script->text, NULL);
    enum status st = redis_run(r, &c, 1, &reply, err);
    if (!st)
        st = redis_check(r, reply, err);
    if (!st)
        snprintf(script->sha, sizeof(script->sha), "%s", reply->str ? reply->str : "");
    redis_free_replies(&reply, reply != NULL);
    return st;
}

/* ---- life ---- */

const char *redis_address(const struct redis *r)
{
    return r->place.shown;
}

bool redis_is_up(struct redis *r)
{
    pthread_mutex_lock(&r->lock);
    bool is_up = r->is_up;
    pthread_mutex_unlock(&r->lock);
    return is_up;
}

enum status redis_open(struct redis **out, const struct redis_options *options, struct error *err)
{
    struct redis *r = calloc(1, sizeof(*r));
    redisContext *c = NULL;
    if (!r)
        return fail(err, STATUS_NOMEM, "out of memory for the connections to Redis");
    pthread_mutex_init(&r->lock, NULL);
    r->timeout_ms = options->timeout_ms;
    enum status st = parse_url(&r->place, options->url, err);
    if (!st)
        st = connect_to(r, &c, err);
    if (st) {
        redis_close(r);
        return st;
    }
    give_back(r, c);
    *out = r;
    return STATUS_OK;
}

void redis_close(struct redis *r)
{
    if (!r)
        return;
    drop_idle(r);
    pthread_mutex_destroy(&r->lock);
    if (r->place.text)
        explicit_bzero(r->place.text, strlen(r->place.text));
    free(r->place.text);
    free(r);
}
