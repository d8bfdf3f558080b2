/* state_store.c - see state_store.h */
#include "engine/state_store.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "engine/base/thread.h"
#include "engine/engine.h"
#include "engine/redis.h"
#include "engine/redis_store.h"

enum {
    NAME_DIGITS = 2 * IMAGE_NAME_BYTES,
    FILE_NAME_BYTES = NAME_DIGITS + sizeof(".state.new"),
    RETRY_S = 1,     /* after a write that failed */
    WAIT_MS = 30000, /* for memory, before a state is computed again */
};

/* An image of the journal, while that is read. */
struct known {
    struct image *image; /* kept */
};

struct state_store {
    struct image_store *images;
    struct journal *journal;
    struct redis_store *redis; /* in place of the journal and the directory */
    char *path;
    int directory; /* of the states */
    pthread_t thread;
    bool is_started;
    bool is_stopping;    /* under the images' lock */
    struct known *known; /* [cap_known], by name, while the journal is read; a power of two */
    size_t n_known, cap_known;
};

/* ---- names ---- */

static void name_of(char out[FILE_NAME_BYTES], const uint8_t name[IMAGE_NAME_BYTES],
                    const char *ending)
{
    for (int i = 0; i < IMAGE_NAME_BYTES; i++)
        snprintf(out + 2 * i, 3, "%02x", name[i]);
    snprintf(out + NAME_DIGITS, FILE_NAME_BYTES - NAME_DIGITS, "%s", ending);
}

static bool parse_name(const char *text, uint8_t name[IMAGE_NAME_BYTES])
{
    if (strlen(text) != NAME_DIGITS + sizeof(".state") - 1 || strcmp(text + NAME_DIGITS, ".state"))
        return false;
    for (int i = 0; i < IMAGE_NAME_BYTES; i++) {
        char digits[3] = {text[2 * i], text[2 * i + 1]}, *end;
        name[i] = (uint8_t)strtoul(digits, &end, 16);
        if (*end)
            return false;
    }
    return true;
}

/* ---- files ---- */

static enum status fail_file(const struct state_store *s, const char *file, const char *what,
                             struct error *err)
{
    return fail(err, STATUS_IO, "%s/states/%s: %s: %s", s->path, file, what, strerror(errno));
}

static bool write_parts(int fd, struct iovec *parts, int n_parts)
{
    while (n_parts) {
        ssize_t n = writev(fd, parts, n_parts);
        if (n < 0 && errno != EINTR)
            return false;
        for (; n > 0 && n_parts && (size_t)n >= parts->iov_len; n_parts--)
            n -= (ssize_t)(parts++)->iov_len;
        if (n > 0) {
            parts->iov_base = (char *)parts->iov_base + n;
            parts->iov_len -= (size_t)n;
        }
    }
    return true;
}

/* The file of an image that is held. */
static enum status write_file(const struct state_store *s, const struct image *image,
                              struct error *err)
{
    unsigned char head[IMAGE_HEAD_BYTES], tail[IMAGE_TAIL_BYTES];
    char file[FILE_NAME_BYTES], new_file[FILE_NAME_BYTES];
    name_of(file, image->name, ".state");
    name_of(new_file, image->name, ".state.new");
    image_frame(image, head, tail);
    struct iovec parts[3] = {
        {head, sizeof(head)},
        {image->values, image->store->n_values * sizeof(float)},
        {tail, sizeof(tail)},
    };
    int fd = openat(s->directory, new_file, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0)
        return fail_file(s, new_file, "cannot be made", err);
    bool good = write_parts(fd, parts, 3) && !fdatasync(fd);
    if (close(fd) || !good || renameat(s->directory, new_file, s->directory, file) ||
        fsync(s->directory)) {
        fail_file(s, new_file, "cannot be written", err);
        unlinkat(s->directory, new_file, 0);
        return STATUS_IO;
    }
    return STATUS_OK;
}

static enum status read_exactly(const struct state_store *s, const char *file, char *data, size_t n,
                                struct error *err)
{
    int fd = openat(s->directory, file, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return fail_file(s, file, "cannot be opened", err);
    size_t at = 0;
    while (at < n) {
        ssize_t more = read(fd, data + at, n - at);
        if (more < 0 && errno == EINTR)
            continue;
        if (more <= 0) {
            errno = more ? errno : EIO;
            break;
        }
        at += (size_t)more;
    }
    close(fd);
    return at == n ? STATUS_OK : fail_file(s, file, "cannot be read", err);
}

/* The bytes of an image, as they were written. */
static enum status read_bytes(const struct state_store *s, const struct image *image, char *data,
                              size_t n, struct error *err)
{
    char file[FILE_NAME_BYTES];
    name_of(file, image->name, ".state");
    enum status st = s->redis ? redis_store_read(s->redis, image->name, data, n, err)
                              : read_exactly(s, file, data, n, err);
    if (!st)
        st = image_check_file(image, data, n, err);
    if (st != STATUS_INVALID)
        return st;
    fail_context(err, s->redis ? "%s, state %s" : "%s/states/%s", s->path, file);
    return err->status = STATUS_LOST;
}

/* A new image with what the file of another one has. */
static enum status read_file(const struct state_store *s, const struct image *image,
                             struct image **out, struct error *err)
{
    size_t n = image_file_bytes(s->images);
    struct image *copy = NULL;
    char *data = malloc(n);
    if (!data)
        return fail(err, STATUS_NOMEM, "out of memory for a state of %zu bytes", n);
    enum status st = read_bytes(s, image, data, n, err);
    if (!st)
        st = image_new_wait(&copy, s->images, WAIT_MS, err);
    if (!st) {
        copy->position = image->position;
        memcpy(copy->values, data + IMAGE_HEAD_BYTES, s->images->n_values * sizeof(float));
        *out = copy;
    }
    free(data);
    return st;
}

/* ---- computing a state again ---- */

/* The way from a state that can be read to one that cannot. */
struct way {
    struct image *base; /* kept; NULL: the state before any token */
    struct job_run *runs;
    int n_runs;
    int32_t *tokens;
    size_t n_tokens;
};

static void free_way(struct way *way)
{
    image_drop(way->base);
    free(way->runs);
    free(way->tokens);
}

/* With the images' lock held. The first image on the way back that is somewhere. */
static struct image *base_of(struct image *image, int *n_runs, size_t *n_tokens)
{
    *n_runs = 0;
    *n_tokens = 0;
    struct image *at = image;
    do {
        if (!at->has_origin)
            break;
        ++*n_runs;
        *n_tokens += at->origin.n_chunked + at->origin.n_single;
        at = at->origin.parent;
    } while (at && !at->values && !at->has_file);
    return at;
}

static enum status find_way(struct image *image, struct way *way, struct error *err)
{
    struct image_store *images = image->store;
    enum status st = STATUS_OK;
    pthread_mutex_lock(&images->lock);
    struct image *base = base_of(image, &way->n_runs, &way->n_tokens), *at = image;
    if (base && !base->values && !base->has_file)
        st = fail(err, STATUS_LOST, "%s", base->why ? base->why : "its beginning is not stored");
    way->runs = calloc((size_t)way->n_runs + 1, sizeof(*way->runs));
    way->tokens = calloc(way->n_tokens + 1, sizeof(*way->tokens));
    if (!st && (!way->runs || !way->tokens))
        st = fail(err, STATUS_NOMEM, "out of memory for the replay of a state");
    size_t end = way->n_tokens;
    for (int i = way->n_runs; !st && i--; at = at->origin.parent) {
        const struct image_origin *o = &at->origin;
        size_t n = o->n_chunked + o->n_single;
        way->runs[i] = (struct job_run){o->n_chunked, o->n_single};
        memcpy(way->tokens + (end -= n), o->tokens, n * sizeof(*o->tokens));
    }
    if (!st && base) {
        way->base = base;
        base->n_keeps++;
    }
    pthread_mutex_unlock(&images->lock);
    return st;
}

/* Whatever becomes of the job; the engine ends every one. */
static enum status run_job(struct engine *engine, struct job *job, struct error *err)
{
    struct job_token tokens[16];
    struct job_snapshot snapshot;
    enum status st = engine_submit(engine, job, err);
    if (st)
        return st;
    do {
        job_wait(job);
        job_read(job, tokens, 16);
        job_snapshot(job, &snapshot);
    } while (snapshot.finish == FINISH_NONE);
    if (snapshot.finish == FINISH_LENGTH)
        return STATUS_OK;
    *err = snapshot.error;
    return snapshot.finish == FINISH_ERROR
               ? err->status
               : fail(err, STATUS_SHUTDOWN, "the replay of a state was cancelled");
}

static enum status replay(struct state_store *s, struct engine *engine, struct image *image,
                          struct image **out, struct error *err)
{
    struct way way = {0};
    struct image *copy = NULL;
    struct job *job = NULL;
    bool holds_base = false;
    enum status st = find_way(image, &way, err);
    if (!st && way.base) {
        st = state_store_hold(s, engine, way.base, err);
        holds_base = !st;
    }
    if (!st)
        st = image_new_wait(&copy, s->images, WAIT_MS, err);
    if (!st) {
        struct job_request request = {.prompt = way.tokens,
                                      .n_prompt = way.n_tokens,
                                      .prompt_logprobs = -1,
                                      .from = way.base,
                                      .into = copy,
                                      .runs = way.runs,
                                      .n_runs = way.n_runs};
        sampling_params_init(&request.sampling);
        st = job_new(&job, &request, err);
    }
    if (!st)
        st = run_job(engine, job, err);
    if (!st && copy->position != image->position)
        st = fail(err, STATUS_LOST, "a replay of %zu tokens ends at position %llu, expected %llu",
                  way.n_tokens, (unsigned long long)copy->position,
                  (unsigned long long)image->position);
    job_release(job);
    if (holds_base)
        image_release(way.base);
    if (st)
        image_release(copy);
    else
        *out = copy;
    free_way(&way);
    return st;
}

/* ---- holding ---- */

/* With the lock held: wait until nobody else is at the image. */
static void become_busy(struct image *image)
{
    while (image->is_busy)
        pthread_cond_wait(&image->store->changed, &image->store->lock);
    image->is_busy = true;
    image_settle(image); /* off the lists: nobody drops its values meanwhile */
}

static void end_busy(struct image *image)
{
    image->is_busy = false;
    pthread_cond_broadcast(&image->store->changed);
    image_settle(image);
}

static enum status fetch(struct state_store *s, struct engine *engine, struct image *image,
                         struct error *err)
{
    struct image *copy = NULL;
    bool has_file = image->has_file; /* others do not change it while it is busy */
    enum status st =
        has_file ? read_file(s, image, &copy, err) : replay(s, engine, image, &copy, err);
    if (st == STATUS_LOST)
        image_set_lost(image, err->text);
    if (st)
        return st;
    /* A copy that waited for the engine may be held by its job for a moment longer. */
    pthread_mutex_lock(&s->images->lock);
    while (copy->n_holds > 1)
        pthread_cond_wait(&s->images->changed, &s->images->lock);
    (*(has_file ? &s->images->n_reloads : &s->images->n_replays))++;
    pthread_mutex_unlock(&s->images->lock);
    image_move_values(copy, image);
    image_release(copy);
    return STATUS_OK;
}

enum status state_store_hold(struct state_store *s, struct engine *engine, struct image *image,
                             struct error *err)
{
    struct image_store *images = image->store;
    if (image_try_hold(image))
        return STATUS_OK;
    enum status st = STATUS_OK;
    pthread_mutex_lock(&images->lock);
    become_busy(image);
    bool is_here = image->values != NULL;
    if (!is_here && image->why)
        st = fail(err, STATUS_LOST, "%s", image->why);
    pthread_mutex_unlock(&images->lock);
    if (!st && !is_here)
        st = s ? fetch(s, engine, image, err)
               : fail(err, STATUS_LOST, "the state is not in memory, and there is no store");
    pthread_mutex_lock(&images->lock);
    image->n_holds += !st;
    images->n_errors += st == STATUS_LOST || st == STATUS_IO;
    end_busy(image);
    pthread_mutex_unlock(&images->lock);
    return st;
}

/* ---- writing ---- */

enum reason {
    BEHIND,  /* if a session needs it */
    FOR_NOW, /* since one is going to */
    AGAIN,   /* since it has gone from the store */
};

/* Give a held image its file. */
static enum status write_image(struct state_store *s, struct image *image, enum reason reason,
                               struct error *err)
{
    struct image_store *images = s->images;
    enum status st = STATUS_OK;
    pthread_mutex_lock(&images->lock);
    become_busy(image);
    bool is_needed = reason == AGAIN || (!image->has_file && image->n_keeps), is_written = true;
    pthread_mutex_unlock(&images->lock);
    if (is_needed) {
        st = s->redis ? redis_store_write(s->redis, image, reason != BEHIND, &is_written, err)
                      : write_file(s, image, err);
        if (!st && is_written)
            image_set_file(image);
    }
    pthread_mutex_lock(&images->lock);
    image->stays = !st && !is_written;
    images->n_errors += st != STATUS_OK;
    end_busy(image);
    pthread_mutex_unlock(&images->lock);
    return st;
}

enum status state_store_secure(struct state_store *s, struct image *image, struct error *err)
{
    if (!s)
        return STATUS_OK;
    pthread_mutex_lock(&s->images->lock);
    bool is_safe = image->has_file || image->has_origin;
    pthread_mutex_unlock(&s->images->lock);
    if (is_safe)
        return STATUS_OK;
    image_keep(image);
    enum status st = write_image(s, image, FOR_NOW, err);
    image_drop(image);
    return st;
}

enum status state_store_restore(struct state_store *s, struct image *image, struct error *err)
{
    return write_image(s, image, AGAIN, err);
}

/* With the lock held: what to write next, held. Memory is short when three quarters are used and
 * less than a quarter could be dropped at once. */
static struct image *next_to_write(struct image_store *images)
{
    struct image *image = images->wanted.first;
    size_t clean = (size_t)images->clean.n * image_bytes(images);
    if (!image && images->used_bytes > images->limit_bytes / 4 * 3 &&
        clean < images->limit_bytes / 4)
        image = images->dirty.first;
    if (image) {
        image->n_holds++;
        image->wants_file = false;
        image_settle(image);
    }
    return image;
}

static void remove_files(struct state_store *s, struct image *dead)
{
    for (struct image *next; dead; dead = next) {
        char file[FILE_NAME_BYTES];
        next = dead->next;
        dead->next = NULL;
        name_of(file, dead->name, ".state");
        unlinkat(s->directory, file, 0);
        pthread_mutex_lock(&s->images->lock);
        image_free(dead);
        pthread_mutex_unlock(&s->images->lock);
    }
}

/* With the lock held: the dead, as a chain by `next`. */
static struct image *take_dead(struct image_store *images)
{
    struct image *chain = NULL;
    for (struct image *image; (image = image_list_take(&images->dead));) {
        image->next = chain;
        chain = image;
    }
    return chain;
}

static void pause_a_second(struct image_store *images)
{
    struct timespec end;
    clock_gettime(CLOCK_MONOTONIC, &end);
    end.tv_sec += RETRY_S;
    pthread_cond_timedwait(&images->changed, &images->lock, &end);
}

static void *run(void *context)
{
    struct state_store *s = context;
    struct image_store *images = s->images;
    struct image *waiting = NULL; /* dead, until the journal is as far */
    uint64_t sequence = 0;
    pthread_mutex_lock(&images->lock);
    while (!s->is_stopping) {
        struct image *image = next_to_write(images);
        struct error err;
        if (!image && !waiting && images->dead.first) {
            waiting = take_dead(images);
            sequence = journal_sequence(s->journal);
        }
        bool removes = waiting && journal_is_durable(s->journal, sequence);
        if (!image && !removes) {
            if (waiting)
                pause_a_second(images);
            else
                pthread_cond_wait(&images->changed, &images->lock);
            continue;
        }
        pthread_mutex_unlock(&images->lock);
        enum status st = image ? write_image(s, image, BEHIND, &err) : STATUS_OK;
        if (st)
            image_want_file(image);
        image_release(image);
        if (removes) {
            remove_files(s, waiting);
            waiting = NULL;
        }
        pthread_mutex_lock(&images->lock);
        if (st)
            pause_a_second(images);
    }
    pthread_mutex_unlock(&images->lock);
    for (struct image *next; waiting; waiting = next) { /* found again at the next start */
        next = waiting->next;
        waiting->next = NULL;
        image_free(waiting);
    }
    return NULL;
}

/* ---- what the journal names ---- */

static struct known *place_of(const struct state_store *s, const uint8_t name[IMAGE_NAME_BYTES])
{
    uint64_t hash;
    memcpy(&hash, name, sizeof(hash));
    size_t at = hash & (s->cap_known - 1);
    while (s->known[at].image && memcmp(s->known[at].image->name, name, IMAGE_NAME_BYTES))
        at = (at + 1) & (s->cap_known - 1);
    return &s->known[at];
}

static enum status grow_known(struct state_store *s, struct error *err)
{
    struct state_store bigger = {.cap_known = s->cap_known ? 2 * s->cap_known : 1024};
    bigger.known = calloc(bigger.cap_known, sizeof(*bigger.known));
    if (!bigger.known)
        return fail(err, STATUS_NOMEM, "out of memory for the states of a store");
    for (size_t i = 0; i < s->cap_known; i++)
        if (s->known[i].image)
            *place_of(&bigger, s->known[i].image->name) = s->known[i];
    free(s->known);
    s->known = bigger.known;
    s->cap_known = bigger.cap_known;
    return STATUS_OK;
}

/* Position and the like from the file, if it is one of ours. */
static bool read_about(const struct state_store *s, struct image *image)
{
    struct stat about;
    char file[FILE_NAME_BYTES], head[IMAGE_HEAD_BYTES];
    struct error ignored;
    name_of(file, image->name, ".state");
    if (fstatat(s->directory, file, &about, 0) ||
        (size_t)about.st_size != image_file_bytes(s->images) ||
        read_exactly(s, file, head, sizeof(head), &ignored))
        return false;
    return image_read_head(image, head);
}

enum status state_store_find(struct state_store *s, const uint8_t name[IMAGE_NAME_BYTES],
                             struct image **out, struct error *err)
{
    enum status st = STATUS_OK;
    if (s->redis) {
        struct image *image = image_find(s->images, name);
        if (image)
            *out = image;
        return image ? STATUS_OK : image_new_named(out, s->images, name, err);
    }
    if (2 * (s->n_known + 1) > s->cap_known)
        st = grow_known(s, err);
    if (st)
        return st;
    struct known *known = place_of(s, name);
    if (!known->image) {
        st = image_new_named(&known->image, s->images, name, err);
        if (st)
            return st;
        s->n_known++;
        if (read_about(s, known->image))
            image_set_file(known->image);
    }
    image_keep(known->image);
    *out = known->image;
    return STATUS_OK;
}

static void forget_known(struct state_store *s)
{
    for (size_t i = 0; i < s->cap_known; i++)
        image_drop(s->known[i].image);
    free(s->known);
    s->known = NULL;
    s->n_known = s->cap_known = 0;
}

/* Files that are no image's: of states that were written but never told of, and halves. */
static enum status remove_strangers(struct state_store *s, struct error *err)
{
    int fd = openat(s->directory, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *entries = fd < 0 ? NULL : fdopendir(fd);
    if (!entries) {
        if (fd >= 0)
            close(fd);
        return fail(err, STATUS_IO, "%s/states: cannot be listed: %s", s->path, strerror(errno));
    }
    for (struct dirent *entry; (entry = readdir(entries));) {
        uint8_t name[IMAGE_NAME_BYTES];
        if (entry->d_name[0] == '.')
            continue;
        if (!parse_name(entry->d_name, name) || !s->cap_known || !place_of(s, name)->image)
            unlinkat(s->directory, entry->d_name, 0);
    }
    closedir(entries);
    return STATUS_OK;
}

/* ---- life ---- */

static enum status make_directory(const char *path, struct error *err)
{
    if (mkdir(path, 0700) && errno != EEXIST)
        return fail(err, STATUS_IO, "%s: cannot be made: %s", path, strerror(errno));
    return STATUS_OK;
}

static enum status open_files(struct state_store *s, const struct state_store_options *options,
                              struct error *err)
{
    size_t n = strlen(options->path) + sizeof("/sessions.journal");
    char *path = malloc(n);
    s->path = strdup(options->path);
    if (!path || !s->path) {
        free(path);
        return fail(err, STATUS_NOMEM, "%s: out of memory", options->path);
    }
    enum status st = make_directory(options->path, err);
    snprintf(path, n, "%s/states", options->path);
    if (!st)
        st = make_directory(path, err);
    if (!st) {
        s->directory = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        if (s->directory < 0)
            st = fail(err, STATUS_IO, "%s: cannot be opened: %s", path, strerror(errno));
    }
    snprintf(path, n, "%s/sessions.journal", options->path);
    struct journal_options journal = *options->journal;
    journal.path = path;
    if (!st)
        st = journal_open(&s->journal, &journal, err);
    free(path);
    return st;
}

static enum status open_redis(struct state_store *s, const struct state_store_options *options,
                              struct error *err)
{
    struct redis_store_options redis = {.url = options->path,
                                        .fingerprint = options->journal->fingerprint,
                                        .timeout_ms = options->timeout_ms,
                                        .lease_ms = options->lease_ms,
                                        .notify = options->journal->notify,
                                        .context = options->journal->context};
    enum status st = redis_store_open(&s->redis, &redis, image_file_bytes(s->images), err);
    if (st)
        return st;
    s->images->is_shared = true;
    s->path = strdup(redis_store_address(s->redis));
    return s->path ? STATUS_OK : fail(err, STATUS_NOMEM, "out of memory for the store");
}

enum status state_store_open(struct state_store **out, const struct state_store_options *options,
                             struct error *err)
{
    struct state_store *s = calloc(1, sizeof(*s));
    if (!s)
        return fail(err, STATUS_NOMEM, "%s: out of memory", options->path);
    s->images = options->images;
    s->directory = -1;
    enum status st =
        redis_is_url(options->path) ? open_redis(s, options, err) : open_files(s, options, err);
    if (st) {
        state_store_close(s);
        return st;
    }
    *out = s;
    return STATUS_OK;
}

struct journal *state_store_journal(struct state_store *s)
{
    return s->journal;
}

struct redis_store *state_store_redis(struct state_store *s)
{
    return s->redis;
}

void state_store_count(struct state_store *s, struct journal_counts *out)
{
    if (s->redis)
        redis_store_count(s->redis, out);
    else
        journal_count(s->journal, out);
}

enum status state_store_start(struct state_store *s, struct error *err)
{
    enum status st = s->redis ? redis_store_start(s->redis, err) : remove_strangers(s, err);
    if (!st && !s->redis)
        st = journal_start(s->journal, err);
    if (st)
        return st;
    s->images->has_files = true;
    forget_known(s);
    int failed = thread_start(&s->thread, "latte-states", run, s);
    if (failed)
        return fail(err, STATUS_NOMEM, "%s: no thread: %s", s->path, strerror(failed));
    s->is_started = true;
    return STATUS_OK;
}

void state_store_stop(struct state_store *s)
{
    if (s->is_started) {
        pthread_mutex_lock(&s->images->lock);
        s->is_stopping = true;
        pthread_cond_broadcast(&s->images->changed);
        pthread_mutex_unlock(&s->images->lock);
        pthread_join(s->thread, NULL);
        s->is_started = false;
    }
    if (s->journal)
        journal_stop(s->journal);
    if (s->redis)
        redis_store_stop(s->redis);
}

void state_store_close(struct state_store *s)
{
    if (!s)
        return;
    state_store_stop(s);
    forget_known(s);
    journal_close(s->journal);
    redis_store_close(s->redis);
    if (s->directory >= 0)
        close(s->directory);
    free(s->path);
    free(s);
}
