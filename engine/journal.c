/* journal.c - see journal.h */
#include "engine/journal.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <xxhash.h>

#include "engine/base/pack.h"
#include "engine/base/thread.h"

enum {
    FILE_HEAD_BYTES = 64,
    HEAD_BYTES = 48,
    TAIL_BYTES = 32,
    FORMAT_VERSION = 1,
    LONG_BYTES = 16 << 20, /* a file below this is never written as a whole again */
    LIST_HEAD_BYTES = JOURNAL_KEY_BYTES + 4,
};

static const char file_magic[8] = {'L', 'A', 'T', 'T', 'E', 'J', 'N', 'L'};
static const uint32_t frame_magic = 0x464a544c; /* "LTJF" */

struct journal {
    struct journal_options options;
    char *path, *new_path;
    int fd, directory;
    size_t n_bytes;    /* of the file that count */
    size_t base_bytes; /* when it was last written as a whole */
    uint64_t n_frames; /* sequence number of the last frame in the file */
    pthread_t thread;
    bool is_started, is_broken; /* broken: a sync failed, and nobody knows what is there */

    pthread_mutex_t lock; /* guards all that follows */
    pthread_cond_t wake;
    struct journal_entry *first, *last;           /* waiting */
    struct journal_entry *done_first, *done_last; /* to be taken */
    uint64_t n_appended, n_done, n_durable;       /* entries */
    bool is_stopping, is_long;
    struct journal_counts counts;
};

/* ---- frames ---- */

static void put_frame(struct bytes *out, uint64_t sequence, const uint8_t key[JOURNAL_KEY_BYTES],
                      const char *payload, size_t n)
{
    struct bytes head = {0}, tail = {0};
    pack_u32(&head, frame_magic);
    pack_u32(&head, (uint32_t)n);
    pack_u64(&head, sequence);
    bytes_append(&head, key, JOURNAL_KEY_BYTES);
    pack_u64(&head, XXH3_64bits(payload, n));
    pack_u64(&head, head.failed ? 0 : XXH3_64bits(head.data, head.n));
    bytes_append(&tail, key, JOURNAL_KEY_BYTES);
    pack_u64(&tail, sequence);
    pack_u64(&tail, tail.failed ? 0 : XXH3_64bits(tail.data, tail.n));
    out->failed |= head.failed | tail.failed;
    if (!out->failed) {
        bytes_append(out, head.data, head.n);
        bytes_append(out, payload, n);
        bytes_append(out, tail.data, tail.n);
    }
    bytes_free(&head);
    bytes_free(&tail);
}

struct frame {
    uint8_t key[JOURNAL_KEY_BYTES];
    uint64_t sequence;
    const char *payload; /* [n] */
    size_t n;
    uint64_t hash;
};

/* A frame's head at data[at], if it is whole. */
static bool read_head(const char *data, size_t n, size_t at, struct frame *out)
{
    if (n - at < HEAD_BYTES)
        return false;
    struct unpack u = {.at = data + at, .end = data + at + HEAD_BYTES};
    uint32_t magic = unpack_u32(&u), length = unpack_u32(&u);
    out->n = length;
    out->sequence = unpack_u64(&u);
    unpack_raw(&u, out->key, JOURNAL_KEY_BYTES);
    out->hash = unpack_u64(&u);
    out->payload = data + at + HEAD_BYTES;
    return magic == frame_magic && unpack_u64(&u) == XXH3_64bits(data + at, HEAD_BYTES - 8);
}

/* A frame's tail that ends at data[end]. */
static bool read_tail(const char *data, size_t end, struct frame *out)
{
    if (end < TAIL_BYTES)
        return false;
    struct unpack u = {.at = data + end - TAIL_BYTES, .end = data + end};
    unpack_raw(&u, out->key, JOURNAL_KEY_BYTES);
    out->sequence = unpack_u64(&u);
    return unpack_u64(&u) == XXH3_64bits(data + end - TAIL_BYTES, TAIL_BYTES - 8);
}

/* ---- reading ---- */

struct scan {
    const char *data; /* [n], the whole file */
    size_t n, at;
    uint64_t sequence; /* of the last frame */
    journal_fn *fn;
    void *context;
    struct journal_found *found;
};

static enum status give(struct scan *s, const struct frame *f, bool is_good, struct error *err)
{
    s->sequence = f->sequence;
    s->found->n_frames++;
    s->found->n_damaged += !is_good;
    return s->fn(s->context, f->key, is_good ? f->payload : NULL, is_good ? f->n : 0, err);
}

/* Past bytes that are no frame's head, to the next one that is. Damaged frames on the way tell
 * whom they were about by their tails. Without a frame behind, the rest is what was being
 * written when the process ended, unless whole tails say otherwise. */
static enum status skip(struct scan *s, struct error *err)
{
    struct frame f;
    enum status st = STATUS_OK;
    size_t begin = s->at, good = begin;
    for (size_t at = begin + 1; at <= s->n && !st; at++) {
        if (read_tail(s->data, at, &f) && at >= begin + TAIL_BYTES && f.sequence > s->sequence) {
            st = give(s, &f, false, err);
            good = at;
        }
        if (!st && read_head(s->data, s->n, at, &f) && f.sequence > s->sequence) {
            s->at = at;
            return STATUS_OK;
        }
    }
    s->at = good;
    s->found->n_cut_bytes = s->n - good;
    s->n = good;
    return st;
}

static enum status scan(struct scan *s, struct error *err)
{
    enum status st = STATUS_OK;
    while (!st && s->at < s->n) {
        struct frame f;
        if (!read_head(s->data, s->n, s->at, &f)) {
            st = skip(s, err);
            continue;
        }
        size_t left = s->n - s->at;
        if (left < HEAD_BYTES + f.n + TAIL_BYTES) { /* cut off, or its length is a lie */
            struct frame next;
            size_t at = s->at;
            st = skip(s, err);
            if (!st && s->at > at && read_head(s->data, s->n, s->at, &next) &&
                f.sequence < next.sequence && f.sequence > s->sequence)
                st = give(s, &f, false, err);
            continue;
        }
        size_t end = s->at + HEAD_BYTES + f.n + TAIL_BYTES;
        struct frame tail;
        bool is_good = f.hash == XXH3_64bits(f.payload, f.n);
        if (!is_good && end == s->n && !read_tail(s->data, end, &tail)) {
            s->found->n_cut_bytes = s->n - s->at; /* its pages did not all reach the disk */
            s->n = s->at;
            break;
        }
        st = give(s, &f, is_good, err);
        s->at = end;
    }
    return st;
}

static enum status check_file_head(const struct journal *j, const char *data, size_t n,
                                   struct error *err)
{
    char fingerprint[33] = {0};
    if (n < FILE_HEAD_BYTES || memcmp(data, file_magic, sizeof(file_magic)))
        return fail(err, STATUS_INVALID, "%s: this is not a journal of sessions", j->path);
    struct unpack u = {.at = data + 8, .end = data + FILE_HEAD_BYTES};
    uint32_t version = unpack_u32(&u);
    if (version != FORMAT_VERSION)
        return fail(err, STATUS_INVALID, "%s: format version: expected %d, found %" PRIu32, j->path,
                    FORMAT_VERSION, version);
    memcpy(fingerprint, data + 16, 32);
    if (strcmp(fingerprint, j->options.fingerprint))
        return fail(err, STATUS_INVALID,
                    "%s: the sessions are another model's: expected fingerprint %s, found %.32s",
                    j->path, j->options.fingerprint, fingerprint);
    return STATUS_OK;
}

static void put_file_head(const struct journal *j, struct bytes *out)
{
    static const char padding[FILE_HEAD_BYTES];
    size_t begin = out->n;
    bytes_append(out, file_magic, sizeof(file_magic));
    pack_u32(out, FORMAT_VERSION);
    pack_u32(out, 0);
    bytes_append(out, j->options.fingerprint, 32);
    bytes_append(out, padding, FILE_HEAD_BYTES - (out->n - begin));
}

enum status journal_replay(struct journal *j, journal_fn *fn, void *context,
                           struct journal_found *found, struct error *err)
{
    *found = (struct journal_found){.n_bytes = j->n_bytes};
    char *data = mmap(NULL, j->n_bytes, PROT_READ, MAP_PRIVATE, j->fd, 0);
    if (data == MAP_FAILED)
        return fail(err, STATUS_IO, "%s: cannot be read: %s", j->path, strerror(errno));
    struct scan s = {.data = data,
                     .n = j->n_bytes,
                     .at = FILE_HEAD_BYTES,
                     .fn = fn,
                     .context = context,
                     .found = found};
    enum status st = scan(&s, err);
    munmap(data, j->n_bytes);
    if (!st && s.n < j->n_bytes && ftruncate(j->fd, (off_t)s.n))
        st = fail(err, STATUS_IO, "%s: cannot be cut: %s", j->path, strerror(errno));
    if (!st) {
        j->n_bytes = s.n;
        j->base_bytes = 0; /* written as a whole soon */
        j->n_frames = s.sequence;
        j->is_long = true;
    }
    return st;
}

/* ---- writing ---- */

static enum status write_all(const struct journal *j, int fd, const char *path,
                             const struct bytes *b, size_t at, struct error *err)
{
    (void)j;
    for (size_t n = 0; n < b->n;) {
        ssize_t more = pwrite(fd, b->data + n, b->n - n, (off_t)(at + n));
        if (more < 0 && errno == EINTR)
            continue;
        if (more <= 0)
            return fail(err, STATUS_IO, "%s: %zu bytes cannot be written: %s", path, b->n,
                        more ? strerror(errno) : "no room");
        n += (size_t)more;
    }
    return STATUS_OK;
}

static enum status sync_file(struct journal *j, struct error *err)
{
    if (!fdatasync(j->fd)) {
        j->counts.n_syncs++;
        return STATUS_OK;
    }
    j->is_broken = true;
    return fail(err, STATUS_IO, "%s: cannot be made durable: %s", j->path, strerror(errno));
}

static enum status append_bytes(struct journal *j, const struct bytes *b, struct error *err)
{
    if (b->failed)
        return fail(err, STATUS_NOMEM, "%s: out of memory", j->path);
    if (j->is_broken)
        return fail(err, STATUS_IO, "%s: could not be made durable before; restart the server",
                    j->path);
    enum status st = write_all(j, j->fd, j->path, b, j->n_bytes, err);
    if (!st && j->options.mode == JOURNAL_TURN)
        st = sync_file(j, err);
    if (!st)
        j->n_bytes += b->n;
    else if (!j->is_broken && ftruncate(j->fd, (off_t)j->n_bytes))
        j->is_broken = true; /* half an entry may be in it */
    return st;
}

/* A new file takes the old one's place. */
static enum status replace_file(struct journal *j, const struct bytes *b, struct error *err)
{
    if (b->failed)
        return fail(err, STATUS_NOMEM, "%s: out of memory", j->new_path);
    int fd = open(j->new_path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0 || flock(fd, LOCK_EX | LOCK_NB)) {
        enum status st =
            fail(err, STATUS_IO, "%s: cannot be made: %s", j->new_path, strerror(errno));
        if (fd >= 0)
            close(fd);
        return st;
    }
    enum status st = write_all(j, fd, j->new_path, b, 0, err);
    if (!st && (fdatasync(fd) || rename(j->new_path, j->path) || fsync(j->directory)))
        st = fail(err, STATUS_IO, "%s: cannot take its place: %s", j->path, strerror(errno));
    if (st) {
        close(fd);
        unlink(j->new_path);
        return st;
    }
    close(j->fd);
    j->fd = fd;
    j->is_broken = false;
    j->n_bytes = j->base_bytes = b->n;
    return STATUS_OK;
}

static enum status write_whole(struct journal *j, const struct journal_entry *entry,
                               struct error *err)
{
    struct bytes file = {0};
    struct unpack u = {.at = entry->payload.data, .end = entry->payload.data + entry->payload.n};
    uint64_t sequence = j->n_frames;
    put_file_head(j, &file);
    while (u.at < u.end && !u.failed) {
        uint8_t key[JOURNAL_KEY_BYTES];
        unpack_raw(&u, key, sizeof(key));
        size_t n = unpack_u32(&u);
        const char *payload = unpack_skip(&u, n);
        if (!u.failed)
            put_frame(&file, ++sequence, key, payload, n);
    }
    CHECK(!u.failed);
    enum status st = entry->payload.failed ? fail(err, STATUS_NOMEM, "%s: out of memory", j->path)
                                           : replace_file(j, &file, err);
    if (!st)
        j->n_frames = sequence;
    bytes_free(&file);
    return st;
}

/* ---- the thread ---- */

static void finish(struct journal *j, struct journal_entry *first, enum status st,
                   const struct error *err)
{
    for (struct journal_entry *e = first; e; e = e->next) {
        e->error = st ? *err : (struct error){0};
        j->n_done++;
        j->counts.n_errors += st != STATUS_OK;
        j->counts.n_entries++;
    }
    if (j->options.mode != JOURNAL_INTERVAL)
        j->n_durable = j->n_done;
    *(j->done_last ? &j->done_last->next : &j->done_first) = first;
    while (first->next)
        first = first->next;
    j->done_last = first;
}

/* Write these entries, up to one that is whole, which is written alone. Returns the rest. */
static struct journal_entry *write_some(struct journal *j, struct journal_entry *first)
{
    struct bytes b = {0};
    struct error err;
    enum status st;
    struct journal_entry *e = first, *last = first;
    uint64_t sequence = j->n_frames;
    if (first->is_whole) {
        e = first->next;
        st = write_whole(j, first, &err);
    } else {
        for (; e && !e->is_whole; last = e, e = e->next)
            put_frame(&b, ++sequence, e->key, e->payload.data, e->payload.n);
        st = append_bytes(j, &b, &err);
        if (!st)
            j->n_frames = sequence;
    }
    last->next = NULL;
    pthread_mutex_lock(&j->lock);
    j->counts.n_writes++;
    j->counts.n_bytes = j->n_bytes;
    j->is_long = j->n_bytes > LONG_BYTES && j->n_bytes > 4 * j->base_bytes;
    finish(j, first, st, &err);
    pthread_mutex_unlock(&j->lock);
    bytes_free(&b);
    if (j->options.notify)
        j->options.notify(j->options.context);
    return e;
}

static struct timespec after_ms(int ms)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    t.tv_sec += ms / 1000;
    t.tv_nsec += ms % 1000 * 1000000L;
    if (t.tv_nsec >= 1000000000) {
        t.tv_sec++;
        t.tv_nsec -= 1000000000;
    }
    return t;
}

/* Make durable all that was written in mode INTERVAL. */
static void sync_interval(struct journal *j, size_t *n_synced)
{
    struct error ignored; /* what comes next will tell */
    pthread_mutex_lock(&j->lock);
    uint64_t n = j->n_done;
    pthread_mutex_unlock(&j->lock);
    *n_synced = j->n_bytes;
    if (sync_file(j, &ignored))
        return;
    pthread_mutex_lock(&j->lock);
    j->n_durable = n;
    pthread_mutex_unlock(&j->lock);
}

/* Wait for entries; between them INTERVAL makes durable what was written. */
static struct journal_entry *await_entries(struct journal *j, size_t *n_synced)
{
    pthread_mutex_lock(&j->lock);
    struct timespec end = after_ms(j->options.interval_ms);
    while (!j->first && !j->is_stopping) {
        bool is_dirty = j->options.mode == JOURNAL_INTERVAL && *n_synced != j->n_bytes;
        if (!is_dirty) {
            pthread_cond_wait(&j->wake, &j->lock);
            end = after_ms(j->options.interval_ms);
        } else if (pthread_cond_timedwait(&j->wake, &j->lock, &end) == ETIMEDOUT) {
            pthread_mutex_unlock(&j->lock);
            sync_interval(j, n_synced);
            pthread_mutex_lock(&j->lock);
        }
    }
    struct journal_entry *first = j->first;
    j->first = j->last = NULL;
    pthread_mutex_unlock(&j->lock);
    return first;
}

static void *run(void *context)
{
    struct journal *j = context;
    size_t n_synced = j->n_bytes;
    struct timespec last = after_ms(0);
    for (struct journal_entry *e; (e = await_entries(j, &n_synced));) {
        while (e)
            e = write_some(j, e);
        struct timespec now = after_ms(0);
        int64_t ms = (now.tv_sec - last.tv_sec) * 1000 + (now.tv_nsec - last.tv_nsec) / 1000000;
        if (j->options.mode == JOURNAL_INTERVAL && ms >= j->options.interval_ms) {
            sync_interval(j, &n_synced); /* a stream of entries leaves no pause */
            last = now;
        }
    }
    return NULL;
}

/* ---- for its users ---- */

void journal_append(struct journal *j, struct journal_entry *entry)
{
    CHECK(entry->payload.n <= JOURNAL_MAX_PAYLOAD || entry->is_whole);
    entry->next = NULL;
    pthread_mutex_lock(&j->lock);
    *(j->last ? &j->last->next : &j->first) = entry;
    j->last = entry;
    j->n_appended++;
    pthread_cond_signal(&j->wake);
    pthread_mutex_unlock(&j->lock);
}

struct journal_entry *journal_take_done(struct journal *j)
{
    pthread_mutex_lock(&j->lock);
    struct journal_entry *entry = j->done_first;
    if (entry && !(j->done_first = entry->next))
        j->done_last = NULL;
    pthread_mutex_unlock(&j->lock);
    return entry;
}

void journal_list(struct bytes *list, const uint8_t key[JOURNAL_KEY_BYTES], const char *payload,
                  size_t n)
{
    bytes_append(list, key, JOURNAL_KEY_BYTES);
    pack_u32(list, (uint32_t)n);
    bytes_append(list, payload, n);
}

bool journal_is_long(struct journal *j)
{
    pthread_mutex_lock(&j->lock);
    bool is_long = j->is_long && !j->is_stopping; /* nobody would write it any more */
    pthread_mutex_unlock(&j->lock);
    return is_long;
}

uint64_t journal_sequence(struct journal *j)
{
    pthread_mutex_lock(&j->lock);
    uint64_t n = j->n_appended;
    pthread_mutex_unlock(&j->lock);
    return n;
}

bool journal_is_durable(struct journal *j, uint64_t sequence)
{
    pthread_mutex_lock(&j->lock);
    bool is_durable = j->n_durable >= sequence;
    pthread_mutex_unlock(&j->lock);
    return is_durable;
}

void journal_count(struct journal *j, struct journal_counts *out)
{
    pthread_mutex_lock(&j->lock);
    *out = j->counts;
    pthread_mutex_unlock(&j->lock);
}

/* ---- opening and closing ---- */

/* The file, locked, with a head if it was not there. */
static enum status open_file(struct journal *j, struct error *err)
{
    struct stat about;
    j->fd = open(j->path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (j->fd < 0 || fstat(j->fd, &about))
        return fail(err, STATUS_IO, "%s: cannot be opened: %s", j->path, strerror(errno));
    if (flock(j->fd, LOCK_EX | LOCK_NB))
        return fail(err, STATUS_CONFLICT, "%s: another server uses it", j->path);
    j->n_bytes = (size_t)about.st_size;
    if (!about.st_size) {
        struct bytes head = {0};
        put_file_head(j, &head);
        enum status st = write_all(j, j->fd, j->path, &head, 0, err);
        bytes_free(&head);
        if (!st && (fdatasync(j->fd) || fsync(j->directory)))
            st = fail(err, STATUS_IO, "%s: cannot be made durable: %s", j->path, strerror(errno));
        j->n_bytes = j->base_bytes = FILE_HEAD_BYTES;
        return st;
    }
    char head[FILE_HEAD_BYTES];
    ssize_t n = pread(j->fd, head, sizeof(head), 0);
    return check_file_head(j, head, n < 0 ? 0 : (size_t)n, err);
}

static enum status open_directory(struct journal *j, struct error *err)
{
    char *path = strdup(j->path), *slash = path ? strrchr(path, '/') : NULL;
    if (!path)
        return fail(err, STATUS_NOMEM, "%s: out of memory", j->path);
    if (slash)
        *slash = 0;
    j->directory = open(slash ? path : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    free(path);
    if (j->directory < 0)
        return fail(err, STATUS_IO, "%s: its directory cannot be opened: %s", j->path,
                    strerror(errno));
    return STATUS_OK;
}

enum status journal_open(struct journal **out, const struct journal_options *options,
                         struct error *err)
{
    struct journal *j = calloc(1, sizeof(*j));
    if (!j)
        return fail(err, STATUS_NOMEM, "%s: out of memory", options->path);
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_mutex_init(&j->lock, NULL);
    pthread_cond_init(&j->wake, &attributes);
    pthread_condattr_destroy(&attributes);
    j->options = *options;
    j->fd = j->directory = -1;
    j->path = strdup(options->path);
    size_t n = strlen(options->path) + sizeof(".new");
    j->new_path = malloc(n);
    enum status st = STATUS_OK;
    if (!j->path || !j->new_path)
        st = fail(err, STATUS_NOMEM, "%s: out of memory", options->path);
    else
        snprintf(j->new_path, n, "%s.new", options->path);
    if (!st)
        st = open_directory(j, err);
    if (!st)
        st = open_file(j, err);
    if (st) {
        journal_close(j);
        return st;
    }
    *out = j;
    return STATUS_OK;
}

enum status journal_start(struct journal *j, struct error *err)
{
    int failed = thread_start(&j->thread, "latte-journal", run, j);
    if (failed)
        return fail(err, STATUS_NOMEM, "%s: no thread: %s", j->path, strerror(failed));
    j->is_started = true;
    return STATUS_OK;
}

void journal_stop(struct journal *j)
{
    if (!j->is_started)
        return;
    pthread_mutex_lock(&j->lock);
    j->is_stopping = true;
    pthread_cond_signal(&j->wake);
    pthread_mutex_unlock(&j->lock);
    pthread_join(j->thread, NULL);
    j->is_started = false;
    if (j->options.mode == JOURNAL_INTERVAL)
        fdatasync(j->fd);
}

void journal_close(struct journal *j)
{
    if (!j)
        return;
    journal_stop(j);
    if (j->fd >= 0)
        close(j->fd);
    if (j->directory >= 0)
        close(j->directory);
    pthread_cond_destroy(&j->wake);
    pthread_mutex_destroy(&j->lock);
    free(j->path);
    free(j->new_path);
    free(j);
}
