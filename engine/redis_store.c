/* redis_store.c - see redis_store.h */
#include "engine/redis_store.h"

#include <hiredis/hiredis.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

#include "engine/base/thread.h"
#include "engine/redis.h"
#include "engine/redis_scripts.h"

enum {
    PREFIX_BYTES = 48,
    MAX_BATCH = 64,              /* changes in one exchange */
    FOR_NOW_MS = 3600 * 1000,    /* a state that no session needs yet */
    COPY_MS = 60 * 1000,         /* a state on its way into its place */
    MAX_STATE_BYTES = 512 << 20, /* Redis's limit of a value */
    EXPIRED_AT_ONCE = 100,
    EXPIRE_EVERY_MS = 1000,
    RETRY_MS = 20,
    FIRST_FIELDS = 4, /* of a fetched session, before its states */
    LEAST_VERSION = 5,
};

struct lease {
    struct lease *next;
    uint8_t key[16];
    char token[REDIS_HEX_BYTES];
    bool is_over; /* to be given back */
};

struct redis_store {
    struct redis *redis;
    struct redis_store_options options;
    char prefix[PREFIX_BYTES];
    struct redis_script fetch, put, remove, expire, lease, place, list;
    pthread_t committer, keeper;
    bool has_committer, has_keeper;

    pthread_mutex_t lock; /* guards all that follows */
    pthread_cond_t wake_committer, wake_keeper;
    struct redis_change *first, *last;           /* waiting */
    struct redis_change *done_first, *done_last; /* to be taken */
    struct lease *leases;
    bool is_stopping, gives_back; /* leases to be given back */
    int n_expired;
    struct journal_counts counts;
};

/* ---- texts ---- */

void redis_store_hex(char out[REDIS_HEX_BYTES], const uint8_t bytes[16])
{
    for (int i = 0; i < 16; i++)
        snprintf(out + 2 * i, 3, "%02x", bytes[i]);
}

void redis_store_random(char out[REDIS_HEX_BYTES])
{
    uint8_t bytes[16];
    while (getrandom(bytes, sizeof(bytes), 0) < (ssize_t)sizeof(bytes))
        ;
    redis_store_hex(out, bytes);
}

static bool parse_hex(const char *text, size_t n, uint8_t out[16])
{
    char *end = NULL;
    bool good = n == REDIS_HEX_BYTES - 1;
    for (int i = 0; good && i < 16; i++) {
        char digits[3] = {text[2 * i], text[2 * i + 1], 0};
        out[i] = (uint8_t)strtoul(digits, &end, 16);
        good = end == digits + 2;
    }
    return good;
}

static bool is_word(const redisReply *reply, const char *word)
{
    return (reply->type == REDIS_REPLY_STRING || reply->type == REDIS_REPLY_STATUS) &&
           !strcmp(reply->str, word);
}

/* The answer is one that a script of ours gives. */
static enum status strange(const struct redis_store *s, struct error *err)
{
    return fail(err, STATUS_IO, "Redis at %s answered something else than was asked",
                redis_address(s->redis));
}

/* To a request a server that does not answer is like one that is not there. */
static enum status as_io(enum status st, struct error *err)
{
    if (st == STATUS_TIMEOUT)
        st = err->status = STATUS_IO;
    return st;
}

/* One command, whose reply is not an error. */
static enum status run(struct redis_store *s, const struct redis_command *c, redisReply **out,
                       struct error *err)
{
    redisReply *reply = NULL;
    enum status st = as_io(redis_run(s->redis, c, 1, &reply, err), err);
    if (!st)
        st = redis_check(s->redis, reply, err);
    if (st && reply)
        freeReplyObject(reply);
    if (!st)
        *out = reply;
    return st;
}

static void free_reply(redisReply *reply)
{
    if (reply)
        freeReplyObject(reply);
}

/* ---- changes ---- */

/* A change as a command; text has what is not in it. */
struct put_text {
    char id[REDIS_HEX_BYTES], expires[24], max_sessions[12], max_of_owner[12];
};

static void put_command(const struct redis_store *s, const struct redis_change *c,
                        struct put_text *text, struct redis_command *out)
{
    redis_store_hex(text->id, c->key);
    redis_call(out, c->is_delete ? &s->remove : &s->put, s->prefix);
    redis_add_text(out, text->id);
    redis_add_text(out, c->expected);
    if (c->is_delete)
        return;
    snprintf(text->expires, sizeof(text->expires), "%lld", (long long)c->expires);
    snprintf(text->max_sessions, sizeof(text->max_sessions), "%d", c->max_sessions);
    snprintf(text->max_of_owner, sizeof(text->max_of_owner), "%d", c->max_of_owner);
    redis_add_text(out, c->revision);
    redis_add_text(out, c->lease);
    redis_add_text(out, c->owner);
    redis_add_text(out, text->expires);
    redis_add(out, c->record, c->n_record);
    redis_add(out, c->names.data, c->names.n);
    redis_add_text(out, text->max_sessions);
    redis_add_text(out, text->max_of_owner);
    redis_add_text(out, c->origin_name);
    redis_add(out, c->origin, c->n_origin);
}

/* changed: what it is that another change came first. */
static enum status refuse(const redisReply *reply, enum status changed, struct error *err)
{
    const redisReply *word = reply->element[0];
    const char *n = reply->elements > 1 ? reply->element[1]->str : "";
    if (is_word(word, "NONE"))
        return fail_field(err, STATUS_NOT_FOUND, "session_id",
                          "The session is gone: it was deleted, or its time was over.");
    if (is_word(word, "CHANGED"))
        return fail_field(err, changed, "session_id",
                          "Another server changed the session meanwhile; nothing was done.");
    if (is_word(word, "TURN"))
        return fail_field(err, STATUS_CONFLICT, "session_id",
                          "The session is in a turn; try again when that has ended.");
    if (is_word(word, "LATE"))
        return fail_field(err, STATUS_CONFLICT, "session_id",
                          "The turn took too long to be told of: its lease (--lease-ms) was over, "
                          "and it is not applied.");
    if (is_word(word, "LACKS"))
        return fail_field(err, STATUS_CONFLICT, "session_id",
                          "The state %s is not stored any more; nothing was done.", n);
    if (is_word(word, "FULL"))
        return fail(err, STATUS_BUSY,
                    "The servers hold %s sessions, as many as --max-sessions permits; delete one, "
                    "or wait until one expires.",
                    n);
    return fail(err, STATUS_BUSY,
                "This API key has %s sessions, as many as --max-sessions-per-key permits.", n);
}

/* What Redis said to a change. False: it is to be sent again, with its state. */
static bool settle(const struct redis_store *s, struct redis_change *c, const redisReply *reply)
{
    c->error = (struct error){0};
    if (redis_check(s->redis, reply, &c->error))
        return true;
    if (reply->type != REDIS_REPLY_ARRAY || !reply->elements) {
        strange(s, &c->error);
        return true;
    }
    if (is_word(reply->element[0], "OK"))
        return true;
    refuse(reply, c->is_versioned ? STATUS_PRECONDITION : STATUS_CONFLICT, &c->error);
    if (!is_word(reply->element[0], "LACKS") || c->is_restored || !c->restore)
        return true;
    c->is_restored = true;
    return !c->restore(c);
}

static int64_t clock_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* Until Redis has answered, or the time is over: a change that may have been done is sent again,
 * since then it is known. */
static enum status run_changes(struct redis_store *s, const struct redis_command *commands, int n,
                               redisReply **replies, struct error *err)
{
    int64_t end_ms = clock_ms() + s->options.timeout_ms;
    bool may_be_done = false;
    for (;;) {
        enum status st = redis_run(s->redis, commands, n, replies, err);
        bool passes = false, is_late = clock_ms() >= end_ms;
        for (int i = 0; !st && i < n; i++)
            passes |= redis_is_passing(replies[i]);
        may_be_done |= st == STATUS_TIMEOUT;
        if (!st && (!passes || (is_late && !may_be_done)))
            return STATUS_OK;
        if (!st) {
            redis_free_replies(replies, n);
            st = fail(err, STATUS_IO, "Redis at %s is not ready", redis_address(s->redis));
        }
        if (is_late)
            return may_be_done ? fail_context(err, "It is not known whether this was done; the "
                                                   "session's version will tell")
                               : st;
        nanosleep(&(struct timespec){0, RETRY_MS * 1000000}, NULL);
    }
}

/* Commit so many; afterwards their errors are set. */
static void commit(struct redis_store *s, struct redis_change **changes, int n)
{
    struct redis_command commands[MAX_BATCH];
    struct put_text texts[MAX_BATCH];
    redisReply *replies[MAX_BATCH];
    while (n) {
        int n_again = 0;
        struct error err;
        for (int i = 0; i < n; i++)
            put_command(s, changes[i], &texts[i], &commands[i]);
        enum status st = as_io(run_changes(s, commands, n, replies, &err), &err);
        for (int i = 0; i < n; i++) {
            if (st)
                changes[i]->error = err;
            else if (!settle(s, changes[i], replies[i]))
                changes[n_again++] = changes[i];
        }
        if (!st)
            redis_free_replies(replies, n);
        n = n_again;
    }
}

/* With the lock held: a lease is not renewed any more; and, unless its change ended it, goes. */
static void end_lease(struct redis_store *s, const char *token, bool gives_back)
{
    struct lease **link = &s->leases;
    while (*link && strcmp((*link)->token, token))
        link = &(*link)->next;
    struct lease *lease = *link;
    if (!lease)
        return;
    if (gives_back) {
        lease->is_over = s->gives_back = true;
        pthread_cond_signal(&s->wake_keeper);
    } else {
        *link = lease->next;
        free(lease);
    }
}

static void finish(struct redis_store *s, struct redis_change **changes, int n)
{
    pthread_mutex_lock(&s->lock);
    for (int i = 0; i < n; i++) {
        struct redis_change *c = changes[i];
        if (*c->lease)
            end_lease(s, c->lease, c->error.status != STATUS_OK);
        *(s->done_last ? &s->done_last->next : &s->done_first) = c;
        s->done_last = c;
        s->counts.n_errors += c->error.status != STATUS_OK;
    }
    s->counts.n_entries += (uint64_t)n;
    s->counts.n_writes++;
    pthread_mutex_unlock(&s->lock);
    if (s->options.notify)
        s->options.notify(s->options.context);
}

static void *run_committer(void *context)
{
    struct redis_store *s = context;
    struct redis_change *batch[MAX_BATCH], *rest[MAX_BATCH];
    for (;;) {
        int n = 0;
        pthread_mutex_lock(&s->lock);
        while (!s->first && !s->is_stopping)
            pthread_cond_wait(&s->wake_committer, &s->lock);
        for (struct redis_change *c; n < MAX_BATCH && (c = s->first); n++) {
            if (!(s->first = c->next))
                s->last = NULL;
            c->next = NULL;
            batch[n] = rest[n] = c;
        }
        pthread_mutex_unlock(&s->lock);
        if (!n)
            return NULL;
        commit(s, rest, n);
        finish(s, batch, n);
    }
}

void redis_store_append(struct redis_store *s, struct redis_change *change)
{
    change->next = NULL;
    pthread_mutex_lock(&s->lock);
    *(s->last ? &s->last->next : &s->first) = change;
    s->last = change;
    pthread_cond_signal(&s->wake_committer);
    pthread_mutex_unlock(&s->lock);
}

struct redis_change *redis_store_take_done(struct redis_store *s)
{
    pthread_mutex_lock(&s->lock);
    struct redis_change *c = s->done_first;
    if (c && !(s->done_first = c->next))
        s->done_last = NULL;
    pthread_mutex_unlock(&s->lock);
    return c;
}

/* ---- leases, and sessions that are overdue ---- */

/* Renew it from now on, if that is not done already. */
static enum status keep_lease(struct redis_store *s, const uint8_t key[16], const char *token,
                              struct error *err)
{
    pthread_mutex_lock(&s->lock);
    struct lease *lease = s->leases;
    while (lease && strcmp(lease->token, token))
        lease = lease->next;
    bool is_new = !lease;
    lease = is_new ? calloc(1, sizeof(*lease)) : lease;
    if (lease && is_new) {
        memcpy(lease->key, key, sizeof(lease->key));
        snprintf(lease->token, sizeof(lease->token), "%s", token);
        lease->next = s->leases;
        s->leases = lease;
    }
    pthread_mutex_unlock(&s->lock);
    return lease ? STATUS_OK : fail(err, STATUS_NOMEM, "out of memory for the turn of a session");
}

void redis_store_release(struct redis_store *s, const char lease[REDIS_HEX_BYTES])
{
    pthread_mutex_lock(&s->lock);
    end_lease(s, lease, true);
    pthread_mutex_unlock(&s->lock);
}

/* Up to MAX_BATCH leases from place `from` on: copies, and those to be given back are taken off. */
static int copy_leases(struct redis_store *s, bool renews, int from, struct lease *out)
{
    int n = 0, at = 0;
    pthread_mutex_lock(&s->lock);
    for (struct lease **link = &s->leases, *lease; (lease = *link) && n < MAX_BATCH;) {
        if (lease->is_over) {
            out[n++] = *lease;
            *link = lease->next;
            free(lease);
            continue;
        }
        if (renews && at++ >= from)
            out[n++] = *lease;
        link = &lease->next;
    }
    pthread_mutex_unlock(&s->lock);
    return n;
}

/* What cannot be said to Redis now needs not be said: leases end by themselves. */
static void tell_leases(struct redis_store *s, bool renews)
{
    struct lease leases[MAX_BATCH];
    struct redis_command commands[MAX_BATCH];
    redisReply *replies[MAX_BATCH];
    char ids[MAX_BATCH][REDIS_HEX_BYTES], ms[16];
    snprintf(ms, sizeof(ms), "%d", s->options.lease_ms);
    for (int n, from = 0; (n = copy_leases(s, renews, from, leases)) > 0;) {
        for (int i = 0; i < n; i++) {
            redis_store_hex(ids[i], leases[i].key);
            redis_call(&commands[i], &s->lease, s->prefix);
            redis_add_text(&commands[i], ids[i]);
            redis_add_text(&commands[i], leases[i].token);
            redis_add_text(&commands[i], leases[i].is_over ? "0" : ms);
            from += !leases[i].is_over;
        }
        if (redis_run(s->redis, commands, n, replies, NULL))
            return;
        redis_free_replies(replies, n);
    }
}

static void expire(struct redis_store *s)
{
    struct redis_command c;
    redisReply *reply = NULL;
    char most[12];
    struct error ignored;
    snprintf(most, sizeof(most), "%d", EXPIRED_AT_ONCE);
    redis_call(&c, &s->expire, s->prefix);
    redis_add_text(&c, most);
    if (run(s, &c, &reply, &ignored))
        return;
    pthread_mutex_lock(&s->lock);
    s->n_expired += reply->type == REDIS_REPLY_INTEGER ? (int)reply->integer : 0;
    pthread_mutex_unlock(&s->lock);
    free_reply(reply);
}

/* With the lock held, until the clock is there or a lease is to be given back. */
static void sleep_until(struct redis_store *s, int64_t until_ms)
{
    struct timespec t = {until_ms / 1000, until_ms % 1000 * 1000000};
    while (!s->is_stopping && !s->gives_back && clock_ms() < until_ms)
        pthread_cond_timedwait(&s->wake_keeper, &s->lock, &t);
}

static void *run_keeper(void *context)
{
    struct redis_store *s = context;
    int64_t renew_ms = 0, expire_ms = 0;
    pthread_mutex_lock(&s->lock);
    while (!s->is_stopping) {
        sleep_until(s, renew_ms < expire_ms ? renew_ms : expire_ms);
        s->gives_back = false;
        pthread_mutex_unlock(&s->lock);
        int64_t now = clock_ms();
        bool renews = now >= renew_ms;
        tell_leases(s, renews);
        if (renews)
            renew_ms = now + s->options.lease_ms / 3;
        if (now >= expire_ms) {
            expire(s);
            expire_ms = now + EXPIRE_EVERY_MS;
        }
        pthread_mutex_lock(&s->lock);
    }
    pthread_mutex_unlock(&s->lock);
    tell_leases(s, false);
    return NULL;
}

int redis_store_take_expired(struct redis_store *s)
{
    pthread_mutex_lock(&s->lock);
    int n = s->n_expired;
    s->n_expired = 0;
    pthread_mutex_unlock(&s->lock);
    return n;
}

void redis_store_count(struct redis_store *s, struct journal_counts *out)
{
    pthread_mutex_lock(&s->lock);
    *out = s->counts;
    pthread_mutex_unlock(&s->lock);
}

/* ---- sessions ---- */

static enum status read_fetched(const struct redis_store *s, struct redis_fetched *out,
                                struct error *err)
{
    redisReply *reply = out->reply;
    size_t n = reply->type == REDIS_REPLY_ARRAY ? reply->elements : 0;
    if (n && is_word(reply->element[0], "NONE"))
        return STATUS_OK;
    if (n && is_word(reply->element[0], "TURN"))
        return refuse(reply, STATUS_CONFLICT, err);
    if (n < 3 || !reply->element[1]->str)
        return strange(s, err);
    out->is_there = true;
    out->is_same = n == 3;
    out->is_leased = reply->element[2]->integer;
    snprintf(out->revision, sizeof(out->revision), "%s", reply->element[1]->str);
    if (out->is_same)
        return STATUS_OK;
    if (!reply->element[3]->str || (n - FIRST_FIELDS) % 3)
        return strange(s, err);
    out->record = reply->element[3]->str;
    out->n_record = reply->element[3]->len;
    out->n_states = (n - FIRST_FIELDS) / 3;
    return STATUS_OK;
}

enum status redis_store_fetch(struct redis_store *s, const uint8_t key[16], const char *known,
                              const char *owner, const char *lease, struct redis_fetched *out,
                              struct error *err)
{
    struct redis_command c;
    struct redis_fetched f = {0};
    char id[REDIS_HEX_BYTES], ms[16];
    redis_store_hex(id, key);
    snprintf(ms, sizeof(ms), "%d", s->options.lease_ms);
    redis_call(&c, &s->fetch, s->prefix);
    redis_add_text(&c, id);
    redis_add_text(&c, known);
    redis_add_text(&c, lease ? owner : "");
    redis_add_text(&c, lease ? lease : "");
    redis_add_text(&c, ms);
    enum status st = run(s, &c, &f.reply, err);
    if (!st)
        st = read_fetched(s, &f, err);
    if (!st && lease && f.is_there)
        st = keep_lease(s, key, lease, err);
    if (st)
        redis_fetched_free(&f);
    else
        *out = f;
    return st;
}

void redis_fetched_state(const struct redis_fetched *f, size_t i, struct redis_state *out)
{
    redisReply **part = f->reply->element + FIRST_FIELDS + 3 * i;
    *out = (struct redis_state){0};
    parse_hex(part[0]->str ? part[0]->str : "", part[0]->len, out->name);
    if (part[1]->len == IMAGE_HEAD_BYTES)
        out->head = part[1]->str;
    else if (part[2]->len)
        out->origin = part[2]->str;
    out->n_origin = out->origin ? part[2]->len : 0;
}

void redis_fetched_free(struct redis_fetched *f)
{
    free_reply(f->reply);
    *f = (struct redis_fetched){0};
}

enum status redis_store_list(struct redis_store *s, const char *owner, const uint8_t *after,
                             int max, uint8_t (*keys)[16], int *n, struct error *err)
{
    struct redis_command c;
    redisReply *reply = NULL;
    char id[REDIS_HEX_BYTES] = "", most[12];
    if (after)
        redis_store_hex(id, after);
    snprintf(most, sizeof(most), "%d", max);
    redis_call(&c, &s->list, s->prefix);
    redis_add_text(&c, owner);
    redis_add_text(&c, id);
    redis_add_text(&c, most);
    enum status st = run(s, &c, &reply, err);
    if (st)
        return st;
    if (reply->type != REDIS_REPLY_ARRAY)
        st = fail(err, STATUS_NOT_FOUND, "there is no such session");
    *n = 0;
    for (size_t i = 0; !st && i < reply->elements && *n < max; i++)
        *n += reply->element[i]->str &&
              parse_hex(reply->element[i]->str, reply->element[i]->len, keys[*n]);
    free_reply(reply);
    return st;
}

/* ---- states ---- */

static void state_key(const struct redis_store *s, char kind, const uint8_t name[IMAGE_NAME_BYTES],
                      char *out, size_t n)
{
    char digits[REDIS_HEX_BYTES];
    redis_store_hex(digits, name);
    snprintf(out, n, "%s%c:%s", s->prefix, kind, digits);
}

/* Under another name first: its place is taken by a whole one, and only if it is needed. */
static enum status write_copy(struct redis_store *s, const struct image *image, const char *key,
                              struct error *err)
{
    struct redis_command c;
    struct bytes file = {0};
    redisReply *reply = NULL;
    char ms[16];
    snprintf(ms, sizeof(ms), "%d", COPY_MS);
    image_write(image, &file);
    if (file.failed) {
        bytes_free(&file);
        return fail(err, STATUS_NOMEM, "out of memory for a state on its way to Redis");
    }
    redis_command(&c, "SET", key, NULL);
    redis_add(&c, file.data, file.n);
    redis_add_text(&c, "PX");
    redis_add_text(&c, ms);
    enum status st = run(s, &c, &reply, err);
    free_reply(reply);
    bytes_free(&file);
    return st;
}

enum status redis_store_write(struct redis_store *s, const struct image *image, bool for_now,
                              bool *out, struct error *err)
{
    struct redis_command c;
    redisReply *reply = NULL;
    char name[REDIS_HEX_BYTES], key[128], nonce[REDIS_HEX_BYTES], ms[16];
    redis_store_hex(name, image->name);
    redis_store_random(nonce);
    snprintf(key, sizeof(key), "%st:%s", s->prefix, nonce);
    snprintf(ms, sizeof(ms), "%d", for_now ? FOR_NOW_MS : 0);
    enum status st = write_copy(s, image, key, err);
    if (st)
        return st;
    redis_call(&c, &s->place, s->prefix);
    redis_add_text(&c, name);
    redis_add_text(&c, key);
    redis_add_text(&c, ms);
    st = run(s, &c, &reply, err);
    if (!st)
        *out = reply->type == REDIS_REPLY_INTEGER && reply->integer == 1;
    free_reply(reply);
    return st;
}

/* Why a state is not there. */
static enum status missing(struct redis_store *s, const uint8_t name[IMAGE_NAME_BYTES],
                           struct error *err)
{
    struct redis_command c;
    redisReply *reply = NULL;
    char key[128];
    state_key(s, 'r', name, key, sizeof(key));
    redis_command(&c, "EXISTS", key, NULL);
    enum status st = run(s, &c, &reply, err);
    if (!st && reply->integer)
        st = fail(err, STATUS_LOST, "Redis at %s: %si:%s is missing", redis_address(s->redis),
                  s->prefix, strrchr(key, ':') + 1);
    else if (!st)
        st = fail_field(err, STATUS_CONFLICT, "session_id",
                        "Another server changed the session meanwhile; try again.");
    free_reply(reply);
    return st;
}

enum status redis_store_read(struct redis_store *s, const uint8_t name[IMAGE_NAME_BYTES],
                             char *data, size_t n, struct error *err)
{
    struct redis_command c;
    redisReply *reply = NULL;
    char key[128];
    state_key(s, 'i', name, key, sizeof(key));
    redis_command(&c, "GET", key, NULL);
    enum status st = run(s, &c, &reply, err);
    if (st)
        return st;
    if (reply->type != REDIS_REPLY_STRING)
        st = missing(s, name, err);
    else if (reply->len != n)
        st = fail(err, STATUS_LOST, "Redis at %s: %s: expected %zu bytes, found %zu",
                  redis_address(s->redis), key, n, reply->len);
    else
        memcpy(data, reply->str, n);
    free_reply(reply);
    return st;
}

/* ---- what Redis is like ---- */

enum status redis_store_secret(struct redis_store *s, uint8_t secret[REDIS_SECRET_BYTES],
                               struct error *err)
{
    struct redis_command c;
    redisReply *reply = NULL;
    char key[PREFIX_BYTES + 8];
    snprintf(key, sizeof(key), "%ssecret", s->prefix);
    while (getrandom(secret, REDIS_SECRET_BYTES, 0) < REDIS_SECRET_BYTES)
        ;
    redis_command(&c, "SETNX", key, NULL);
    redis_add(&c, secret, REDIS_SECRET_BYTES);
    enum status st = run(s, &c, &reply, err);
    free_reply(reply);
    reply = NULL;
    redis_command(&c, "GET", key, NULL);
    if (!st)
        st = run(s, &c, &reply, err);
    if (!st && (reply->type != REDIS_REPLY_STRING || reply->len != REDIS_SECRET_BYTES))
        st = fail(err, STATUS_INVALID,
                  "Redis at %s: %s: expected %d bytes; without them no session finds its API key",
                  redis_address(s->redis), key, REDIS_SECRET_BYTES);
    if (!st)
        memcpy(secret, reply->str, REDIS_SECRET_BYTES);
    free_reply(reply);
    return st;
}

/* A setting, or "" where it cannot be asked for. */
static void read_setting(struct redis_store *s, const char *name, char *out, size_t n)
{
    struct redis_command c;
    struct error ignored;
    redisReply *reply = NULL;
    *out = 0;
    redis_command(&c, "CONFIG", "GET", name, NULL);
    if (run(s, &c, &reply, &ignored))
        return;
    if (reply->type == REDIS_REPLY_ARRAY && reply->elements == 2 && reply->element[1]->str)
        snprintf(out, n, "%s", reply->element[1]->str);
    free_reply(reply);
}

void redis_store_warning(struct redis_store *s, bool durable, char *out, size_t n)
{
    char policy[40], append_only[8], sync[16];
    read_setting(s, "maxmemory-policy", policy, sizeof(policy));
    read_setting(s, "appendonly", append_only, sizeof(append_only));
    read_setting(s, "appendfsync", sync, sizeof(sync));
    *out = 0;
    if (*policy && strcmp(policy, "noeviction"))
        snprintf(out, n, "maxmemory-policy is %s: Redis may forget sessions; expected noeviction",
                 policy);
    else if (durable && (!strcmp(append_only, "no") || (*sync && strcmp(sync, "always"))))
        snprintf(out, n,
                 "appendonly is %s and appendfsync is %s: --durability turn holds when they are "
                 "yes and always",
                 append_only, sync);
}

static enum status check_version(struct redis_store *s, struct error *err)
{
    struct redis_command c;
    redisReply *reply = NULL;
    redis_command(&c, "INFO", "server", NULL);
    enum status st = run(s, &c, &reply, err);
    if (st)
        return st;
    const char *at = reply->str ? strstr(reply->str, "redis_version:") : NULL;
    if (at && atoi(at + strlen("redis_version:")) < LEAST_VERSION)
        st = fail(err, STATUS_INVALID, "Redis at %s: expected version %d or later, found %.10s",
                  redis_address(s->redis), LEAST_VERSION, at + strlen("redis_version:"));
    free_reply(reply);
    return st;
}

/* ---- life ---- */

static enum status load_scripts(struct redis_store *s, struct error *err)
{
    struct {
        struct redis_script *script;
        const char *text;
    } all[] = {{&s->fetch, script_fetch},   {&s->put, script_put},     {&s->remove, script_delete},
               {&s->expire, script_expire}, {&s->lease, script_lease}, {&s->place, script_place},
               {&s->list, script_list}};
    enum status st = STATUS_OK;
    for (size_t i = 0; !st && i < sizeof(all) / sizeof(*all); i++) {
        all[i].script->text = all[i].text;
        st = redis_load(s->redis, all[i].script, err);
    }
    return as_io(st, err);
}

enum status redis_store_open(struct redis_store **out, const struct redis_store_options *options,
                             size_t file_bytes, struct error *err)
{
    if (file_bytes > MAX_STATE_BYTES)
        return fail(err, STATUS_INVALID,
                    "a state of this model has %zu bytes; Redis holds at most %d in one value",
                    file_bytes, MAX_STATE_BYTES);
    struct redis_store *s = calloc(1, sizeof(*s));
    if (!s)
        return fail(err, STATUS_NOMEM, "out of memory for the sessions in Redis");
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->wake_committer, &attributes);
    pthread_cond_init(&s->wake_keeper, &attributes);
    pthread_condattr_destroy(&attributes);
    s->options = *options;
    snprintf(s->prefix, sizeof(s->prefix), "latte:{%.32s}:", options->fingerprint);
    struct redis_options redis = {options->url, options->timeout_ms};
    enum status st = redis_open(&s->redis, &redis, err);
    if (!st)
        st = check_version(s, err);
    if (!st)
        st = load_scripts(s, err);
    if (st)
        redis_store_close(s);
    else
        *out = s;
    return st;
}

enum status redis_store_start(struct redis_store *s, struct error *err)
{
    int failed = thread_start(&s->committer, "latte-commit", run_committer, s);
    s->has_committer = !failed;
    if (!failed)
        failed = thread_start(&s->keeper, "latte-lease", run_keeper, s);
    s->has_keeper = s->has_committer && !failed;
    return failed ? fail(err, STATUS_NOMEM, "no thread for Redis: %s", strerror(failed))
                  : STATUS_OK;
}

void redis_store_stop(struct redis_store *s)
{
    pthread_mutex_lock(&s->lock);
    s->is_stopping = true;
    pthread_cond_signal(&s->wake_committer);
    pthread_cond_signal(&s->wake_keeper);
    pthread_mutex_unlock(&s->lock);
    if (s->has_committer)
        pthread_join(s->committer, NULL);
    if (s->has_keeper)
        pthread_join(s->keeper, NULL);
    s->has_committer = s->has_keeper = false;
}

void redis_store_close(struct redis_store *s)
{
    if (!s)
        return;
    redis_store_stop(s);
    for (struct lease *next; s->leases; s->leases = next) {
        next = s->leases->next;
        free(s->leases);
    }
    redis_close(s->redis);
    pthread_cond_destroy(&s->wake_committer);
    pthread_cond_destroy(&s->wake_keeper);
    pthread_mutex_destroy(&s->lock);
    free(s);
}

const char *redis_store_address(const struct redis_store *s)
{
    return redis_address(s->redis);
}

bool redis_store_is_up(struct redis_store *s)
{
    return redis_is_up(s->redis);
}
