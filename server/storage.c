/* storage.c - see storage.h */
#include "server/storage.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/redis_store.h"
#include "server/log.h"

enum { MAX_PATH = 4096 };
_Static_assert((int)REDIS_SECRET_BYTES == (int)HTTP_TAG_SECRET_BYTES, "one secret");

/* ---- owners ---- */

/* The store's secret, made when it is not there: tags of keys tell nothing without it. */
static enum status read_secret(const char *store, uint8_t secret[HTTP_TAG_SECRET_BYTES],
                               struct error *err)
{
    char path[MAX_PATH];
    snprintf(path, sizeof(path), "%s/owners.secret", store);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd >= 0) {
        ssize_t n = read(fd, secret, HTTP_TAG_SECRET_BYTES);
        close(fd);
        if (n == HTTP_TAG_SECRET_BYTES)
            return STATUS_OK;
        return fail(err, STATUS_INVALID,
                    "%s: expected %d bytes; without them no session finds its API key", path,
                    HTTP_TAG_SECRET_BYTES);
    }
    while (getrandom(secret, HTTP_TAG_SECRET_BYTES, 0) < HTTP_TAG_SECRET_BYTES)
        ;
    fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    bool good =
        fd >= 0 && write(fd, secret, HTTP_TAG_SECRET_BYTES) == HTTP_TAG_SECRET_BYTES && !fsync(fd);
    if (fd >= 0)
        close(fd);
    if (good)
        return STATUS_OK;
    fail(err, STATUS_IO, "%s: cannot be made: %s", path, strerror(errno));
    unlink(path);
    return STATUS_IO;
}

/* One tag per API key, the same after every start. */
static enum status tag_owners(struct storage *s, const struct storage_options *o, struct error *err)
{
    uint8_t secret[HTTP_TAG_SECRET_BYTES];
    int n = o->server ? http_n_keys(o->server) : 0;
    if (!n)
        return STATUS_OK;
    struct redis_store *redis = state_store_redis(s->store);
    enum status st = redis ? redis_store_secret(redis, secret, err)
                           : read_secret(o->options->store, secret, err);
    if (st)
        return st;
    s->owners = calloc((size_t)n, sizeof(*s->owners));
    if (!s->owners)
        return fail(err, STATUS_NOMEM, "out of memory for the owners of sessions");
    s->n_owners = n;
    for (int i = 0; i < n; i++)
        http_tag_key(o->server, i, secret, s->owners[i]);
    explicit_bzero(secret, sizeof(secret));
    return STATUS_OK;
}

/* ---- the store ---- */

static enum journal_mode mode_of(const char *durability)
{
    if (!strcmp(durability, "turn"))
        return JOURNAL_TURN;
    return strcmp(durability, "interval") ? JOURNAL_NONE : JOURNAL_INTERVAL;
}

static int timeout_ms(const struct options *o)
{
    int ms = (int)(o->store_timeout * 1000);
    return ms ? ms : 1;
}

static enum status open_store(struct storage *s, const struct storage_options *o, struct error *err)
{
    struct journal_options journal = {.fingerprint = s->images.fingerprint,
                                      .mode = mode_of(o->options->durability),
                                      .interval_ms = (int)o->options->durability_interval,
                                      .notify = o->notify,
                                      .context = o->context};
    struct state_store_options store = {.path = o->options->store,
                                        .images = &s->images,
                                        .journal = &journal,
                                        .timeout_ms = timeout_ms(o->options),
                                        .lease_ms = (int)o->options->lease_ms};
    enum status st = state_store_open(&s->store, &store, err);
    if (!st)
        st = tag_owners(s, o, err);
    return st ? fail_context(err, "--store") : STATUS_OK;
}

static void log_redis(struct redis_store *redis, const char *durability)
{
    char text[256];
    redis_store_warning(redis, !strcmp(durability, "turn"), text, sizeof(text));
    log_event(LOG_INFO, "store", "sessions are shared in %s", redis_store_address(redis));
    if (*text)
        log_event(LOG_WARN, "store", "%s: %s", redis_store_address(redis), text);
}

static enum status recover(struct storage *s, const struct options *o, struct error *err)
{
    struct session_found found;
    enum status st = sessions_recover(s->sessions, &found, err);
    if (!st)
        st = state_store_start(s->store, err);
    if (st)
        return fail_context(err, "--store");
    if (state_store_redis(s->store)) {
        log_redis(state_store_redis(s->store), o->durability);
        return STATUS_OK;
    }
    log_event(found.n_lost ? LOG_WARN : LOG_INFO, "store",
              "%s: %d sessions, %d of them lost; %" PRIu64 " journal entries, %" PRIu64
              " damaged, %" PRIu64 " bytes cut off at the end",
              o->store, found.n_sessions, found.n_lost, found.n_entries, found.n_damaged,
              found.n_cut_bytes);
    return STATUS_OK;
}

/* They make room for the states of sessions. */
static enum status open_prefixes(struct storage *s, const struct options *o, struct error *err)
{
    const struct prefix_options prefixes = {.limit_bytes = (size_t)o->prefix_cache_mb << 20,
                                            .shared = o->share_prefixes};
    if (!o->prefix_cache_mb)
        return STATUS_OK;
    enum status st = prefixes_open(&s->prefixes, &prefixes, &s->images, err);
    if (st)
        return st;
    s->images.give_way = prefixes_give_way;
    s->images.give_way_context = s->prefixes;
    return STATUS_OK;
}

static bool is_on_device(void *context, const struct image *image)
{
    return engine_state_is_resident(context, image);
}

enum status storage_open(struct storage *s, const struct storage_options *o, struct error *err)
{
    *s = (struct storage){0};
    image_store_init(&s->images, o->model->fingerprint, o->model->n_state_values,
                     o->model->config->vocab_size, o->model->max_position,
                     (size_t)o->options->host_state_mb << 20);
    s->images.is_on_device = is_on_device;
    s->images.on_device_context = (void *)o->engine;
    s->is_open = true;
    bool repeats_bits = o->options->deterministic || strncmp(o->model->backend, "cuda", 4) != 0;
    if (o->options->store && repeats_bits)
        s->images.max_replay = (size_t)o->options->replay_tokens;
    enum status st = open_prefixes(s, o->options, err);
    if (!st && o->options->store)
        st = open_store(s, o, err);
    struct session_options sessions = {
        .max_sessions = (int)o->options->max_sessions,
        .idle_s = o->options->session_idle_ttl,
        .store = s->store,
        .owners = (const uint8_t(*)[SESSION_OWNER_BYTES])s->owners,
        .n_owners = s->n_owners,
        .quota = {.max_sessions = (int)o->options->max_sessions_per_key,
                  .max_bytes = (size_t)o->options->max_stored_mb_per_key << 20,
                  .image_bytes = image_file_bytes(&s->images)},
    };
    if (!st)
        st = sessions_open(&s->sessions, &sessions, err);
    if (!st && s->store)
        st = recover(s, o->options, err);
    if (st)
        storage_close(s);
    return st;
}

bool storage_has_items(const struct storage *s)
{
    return s->store && !state_store_redis(s->store);
}

bool storage_is_away(const struct storage *s)
{
    struct redis_store *redis = s->store ? state_store_redis(s->store) : NULL;
    return redis && !redis_store_is_up(redis);
}

void storage_on_tick(struct storage *s)
{
    bool is_away = storage_is_away(s);
    if (is_away == s->is_away)
        return;
    s->is_away = is_away;
    log_event(is_away ? LOG_WARN : LOG_INFO, "store", "%s %s",
              redis_store_address(state_store_redis(s->store)),
              is_away ? "does not answer: requests about sessions get 503" : "answers again");
}

void storage_leave_engine(struct storage *s)
{
    s->images.is_on_device = NULL;
}

void storage_stop(struct storage *s)
{
    if (!s->is_open || !s->store)
        return;
    state_store_stop(s->store);
    if (s->sessions)
        sessions_shut(s->sessions);
}

void storage_close(struct storage *s)
{
    if (!s->is_open)
        return;
    storage_stop(s);
    s->images.give_way = NULL;
    prefixes_close(s->prefixes);
    sessions_close(s->sessions);
    state_store_close(s->store);
    image_store_free(&s->images);
    free(s->owners);
    *s = (struct storage){0};
}
