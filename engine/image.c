/* image.c - see image.h */
#include "engine/image.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(at, n) ((void)(at), (void)(n))
#define ASAN_UNPOISON_MEMORY_REGION(at, n) ((void)(at), (void)(n))
#endif

#include <endian.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>
#define XXH_STATIC_LINKING_ONLY /* XXH3_state_t on the stack */
#include <xxhash.h>

#include "engine/model.h"

#if __BYTE_ORDER != __LITTLE_ENDIAN
#error "tensors are written as they lie in memory"
#endif

static const char magic[8] = {'L', 'A', 'T', 'T', 'E', 'I', 'M', 'G'};

enum { FORMAT_VERSION = 1 };

/* ---- life ---- */

void image_store_init(struct image_store *store, const char *fingerprint, size_t n_values,
                      int32_t vocab_size, int64_t max_position, size_t limit_bytes)
{
    *store = (struct image_store){.n_values = n_values,
                                  .vocab_size = vocab_size,
                                  .max_position = max_position,
                                  .limit_bytes = limit_bytes,
                                  .next_id = 1};
    snprintf(store->fingerprint, sizeof(store->fingerprint), "%s", fingerprint);
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_mutex_init(&store->lock, NULL);
    pthread_cond_init(&store->changed, &attributes);
    pthread_condattr_destroy(&attributes);
}

/* Blocks for values are large, all of one size, and come and go with every turn: those that are
 * free are kept. There are never more than the limit has room for. */
static size_t block_bytes(const struct image_store *store)
{
    size_t n_bytes = store->n_values * sizeof(float);
    return n_bytes > sizeof(void *) ? n_bytes : sizeof(void *);
}

static float *take_block(struct image_store *store)
{
    void **block = store->spare;
    if (!block)
        return malloc(block_bytes(store));
    ASAN_UNPOISON_MEMORY_REGION(block, block_bytes(store));
    store->spare = *block;
    return (float *)block;
}

static void put_block(struct image_store *store, float *values)
{
    void **block = (void **)values;
    *block = store->spare;
    store->spare = block;
    ASAN_POISON_MEMORY_REGION(block, block_bytes(store)); /* nobody reads what was dropped */
}

void image_store_free(struct image_store *store)
{
    for (struct image *image; (image = image_list_take(&store->dead));)
        image_free(image);
    CHECK(store->n_images == 0);
    while (store->spare)
        free(take_block(store));
    free(store->by_name);
    pthread_cond_destroy(&store->changed);
    pthread_mutex_destroy(&store->lock);
}

void image_count(struct image_store *store, struct image_counts *out)
{
    pthread_mutex_lock(&store->lock);
    *out = (struct image_counts){
        .n_images = store->n_images,
        .n_in_memory = store->n_in_memory,
        .used_bytes = store->used_bytes,
        .n_evictions = store->n_evictions,
        .n_reloads = store->n_reloads,
        .n_replays = store->n_replays,
        .n_errors = store->n_errors,
    };
    pthread_mutex_unlock(&store->lock);
}

static size_t values_bytes(const struct image_store *store)
{
    return store->n_values * sizeof(float);
}

size_t image_bytes(const struct image_store *store)
{
    return sizeof(struct image) + values_bytes(store);
}

size_t image_file_bytes(const struct image_store *store)
{
    return IMAGE_HEAD_BYTES + values_bytes(store) + IMAGE_TAIL_BYTES;
}

/* ---- lists; with the lock held ---- */

static void unlist(struct image *image)
{
    struct image_list *list = image->list;
    if (!list)
        return;
    *(image->previous ? &image->previous->next : &list->first) = image->next;
    *(image->next ? &image->next->previous : &list->last) = image->previous;
    list->n--;
    image->list = NULL;
    image->previous = image->next = NULL;
}

static void enlist(struct image_list *list, struct image *image)
{
    if (image->list == list)
        return;
    unlist(image);
    if (!list)
        return;
    image->list = list;
    image->previous = list->last;
    *(list->last ? &list->last->next : &list->first) = image;
    list->last = image;
    list->n++;
}

struct image *image_list_take(struct image_list *list)
{
    struct image *image = list->first;
    if (image)
        unlist(image);
    return image;
}

/* ---- names; with the lock held ---- */

static struct image **bucket_of(const struct image_store *store, const uint8_t *name)
{
    uint64_t hash; /* names are random */
    memcpy(&hash, name, sizeof(hash));
    return &store->by_name[hash & (store->n_buckets - 1)];
}

static bool grow_names(struct image_store *store)
{
    struct image_store bigger = {.n_buckets = store->n_buckets ? 2 * store->n_buckets : 256};
    bigger.by_name = calloc(bigger.n_buckets, sizeof(struct image *));
    if (!bigger.by_name)
        return false;
    for (size_t i = 0; i < store->n_buckets; i++) {
        for (struct image *image = store->by_name[i], *next; image; image = next) {
            struct image **bucket = bucket_of(&bigger, image->name);
            next = image->chain;
            image->chain = *bucket;
            *bucket = image;
        }
    }
    free(store->by_name);
    store->by_name = bigger.by_name;
    store->n_buckets = bigger.n_buckets;
    return true;
}

/* Others can find the image by its name. False: no memory. */
static bool enter_name(struct image_store *store, struct image *image)
{
    if (!store->is_shared)
        return true;
    bool is_full = (size_t)store->n_images >= store->n_buckets;
    if (is_full && !grow_names(store) && !store->n_buckets)
        return false;
    struct image **bucket = bucket_of(store, image->name);
    image->chain = *bucket;
    *bucket = image;
    return true;
}

static void leave_name(struct image *image)
{
    if (!image->store->is_shared)
        return;
    struct image **link = bucket_of(image->store, image->name);
    while (*link != image)
        link = &(*link)->chain;
    *link = image->chain;
}

/* ---- memory; with the lock held ---- */

static void free_values(struct image *image)
{
    struct image_store *store = image->store;
    if (!image->values)
        return;
    put_block(store, image->values);
    image->values = NULL;
    atomic_store_explicit(&image->is_here, false, memory_order_relaxed);
    store->used_bytes -= image_bytes(store);
    store->n_in_memory--;
    pthread_cond_broadcast(&store->changed);
}

/* Room for the values of one more image: those that nobody holds and that have a file go. */
static bool make_room(struct image_store *store)
{
    size_t n_bytes = image_bytes(store);
    while (store->used_bytes + n_bytes > store->limit_bytes && store->clean.first) {
        free_values(image_list_take(&store->clean));
        store->n_evictions++;
    }
    if (store->used_bytes + n_bytes > store->limit_bytes) {
        pthread_cond_broadcast(&store->changed);
        return false;
    }
    store->used_bytes += n_bytes;
    store->n_in_memory++;
    return true;
}

static enum status fail_full(const struct image_store *store, struct error *err)
{
    return fail(err, STATUS_BUSY,
                "states outside the device take %zu of %zu bytes; one more needs %zu",
                store->used_bytes, store->limit_bytes, image_bytes(store));
}

static enum status fail_memory(const struct image_store *store, struct error *err)
{
    return fail(err, STATUS_NOMEM, "out of memory for a state of %zu bytes", image_bytes(store));
}

/* ---- references ---- */

void image_free(struct image *image)
{
    CHECK(!image->values && !image->has_origin);
    leave_name(image);
    image->store->n_images--;
    free(image->why);
    free(image);
}

static void leave_parent(struct image *parent)
{
    if (!parent)
        return;
    parent->n_keeps--;
    parent->n_children--;
}

/* Nobody refers to it. Returns the image it comes from, with the reference it had. */
static struct image *bury(struct image *image)
{
    struct image *parent = image->has_origin ? image->origin.parent : NULL;
    free_values(image);
    free(image->has_origin ? image->origin.tokens : NULL);
    image->has_origin = false;
    bool has_remains = image->has_file && !image->store->is_shared;
    enlist(has_remains ? &image->store->dead : NULL, image);
    if (has_remains)
        pthread_cond_broadcast(&image->store->changed);
    else
        image_free(image);
    return parent;
}

/* Whether it can be had without its values, as exactly as it must. One that nobody but its children
 * needs would only be computed on the way to one of them, after a crash: then its origin does. */
static bool is_somewhere_else(const struct image *image)
{
    bool is_on_the_way = image->n_keeps == image->n_children;
    return image->has_file ||
           (image->has_origin && (is_on_the_way || image->n_replayed <= image->store->max_replay));
}

static struct image_list *place_of(struct image *image)
{
    struct image_store *store = image->store;
    if (image->wants_file && !image->has_file && !image->is_busy && image->values)
        return &store->wanted;
    if (image->n_holds || image->n_pins || image->is_busy || !image->values)
        return NULL;
    if (is_somewhere_else(image))
        return &store->clean;
    return store->has_files && !image->stays ? &store->dirty : NULL;
}

void image_settle(struct image *image)
{
    while (image && !image->n_holds && !image->n_keeps) {
        image = bury(image);
        leave_parent(image);
    }
    if (image)
        enlist(place_of(image), image);
}

static void change(struct image *image, int *count, int by)
{
    if (!image)
        return;
    struct image_store *store = image->store;
    pthread_mutex_lock(&store->lock);
    CHECK(image->n_holds + image->n_keeps > 0);
    *count += by;
    CHECK(*count >= 0);
    image_settle(image);
    if (by < 0)
        pthread_cond_broadcast(&store->changed);
    pthread_mutex_unlock(&store->lock);
}

void image_hold(struct image *image)
{
    CHECK(image->values);
    change(image, &image->n_holds, 1);
}

void image_release(struct image *image)
{
    change(image, image ? &image->n_holds : NULL, -1);
}

bool image_is_shared(struct image *image)
{
    pthread_mutex_lock(&image->store->lock);
    bool is_shared = image->n_holds > 1 || image->n_keeps;
    pthread_mutex_unlock(&image->store->lock);
    return is_shared;
}

void image_keep(struct image *image)
{
    change(image, &image->n_keeps, 1);
}

void image_drop(struct image *image)
{
    change(image, image ? &image->n_keeps : NULL, -1);
}

static void pin(struct image *image, int by)
{
    if (!image->store->is_shared)
        return;
    pthread_mutex_lock(&image->store->lock);
    image->n_pins += by;
    pthread_mutex_unlock(&image->store->lock);
}

void image_pin(struct image *image)
{
    pin(image, 1);
    image_keep(image);
}

void image_unpin(struct image *image)
{
    if (image)
        pin(image, -1);
    image_drop(image);
}

bool image_try_hold(struct image *image)
{
    struct image_store *store = image->store;
    pthread_mutex_lock(&store->lock);
    CHECK(image->n_keeps > 0 || image->n_holds > 0);
    bool is_here = image->values != NULL;
    image->n_holds += is_here;
    image_settle(image);
    pthread_mutex_unlock(&store->lock);
    return is_here;
}

/* ---- new ones ---- */

static void random_name(uint8_t name[IMAGE_NAME_BYTES])
{
    while (getrandom(name, IMAGE_NAME_BYTES, 0) < IMAGE_NAME_BYTES)
        ;
}

static struct image *new_node(struct image_store *store, const uint8_t *name)
{
    struct image *image = calloc(1, sizeof(*image));
    if (!image)
        return NULL;
    image->store = store;
    memcpy(image->name, name, IMAGE_NAME_BYTES);
    if (!enter_name(store, image)) {
        free(image);
        return NULL;
    }
    image->id = store->next_id++;
    store->n_images++;
    return image;
}

/* With the lock held. */
static enum status new_held(struct image **out, struct image_store *store, struct error *err)
{
    uint8_t name[IMAGE_NAME_BYTES];
    if (!make_room(store))
        return fail_full(store, err);
    random_name(name);
    float *values = take_block(store);
    struct image *image = values ? new_node(store, name) : NULL;
    if (!image) {
        if (values)
            put_block(store, values);
        store->used_bytes -= image_bytes(store);
        store->n_in_memory--;
        return fail_memory(store, err);
    }
    image->values = values;
    atomic_store_explicit(&image->is_here, true, memory_order_relaxed);
    image->n_holds = 1;
    *out = image;
    return STATUS_OK;
}

/* The same; what can be done without goes first. */
static enum status new_in_room(struct image **out, struct image_store *store, struct error *err)
{
    enum status st;
    bool more = store->give_way != NULL;
    while ((st = new_held(out, store, err)) == STATUS_BUSY && more) {
        pthread_mutex_unlock(&store->lock);
        more = store->give_way(store->give_way_context);
        pthread_mutex_lock(&store->lock);
    }
    return st;
}

enum status image_new(struct image **out, struct image_store *store, struct error *err)
{
    pthread_mutex_lock(&store->lock);
    enum status st = new_in_room(out, store, err);
    pthread_mutex_unlock(&store->lock);
    return st;
}

enum status image_new_wait(struct image **out, struct image_store *store, int wait_ms,
                           struct error *err)
{
    struct timespec end;
    clock_gettime(CLOCK_MONOTONIC, &end);
    end.tv_sec += wait_ms / 1000;
    end.tv_nsec += wait_ms % 1000 * 1000000L;
    if (end.tv_nsec >= 1000000000) {
        end.tv_sec++;
        end.tv_nsec -= 1000000000;
    }
    pthread_mutex_lock(&store->lock);
    enum status st = new_in_room(out, store, err);
    while (st == STATUS_BUSY && store->has_files &&
           !pthread_cond_timedwait(&store->changed, &store->lock, &end))
        st = new_in_room(out, store, err);
    pthread_mutex_unlock(&store->lock);
    return st;
}

enum status image_new_named(struct image **out, struct image_store *store,
                            const uint8_t name[IMAGE_NAME_BYTES], struct error *err)
{
    pthread_mutex_lock(&store->lock);
    struct image *image = new_node(store, name);
    if (image)
        image->n_keeps = 1;
    pthread_mutex_unlock(&store->lock);
    if (!image)
        return fail(err, STATUS_NOMEM, "out of memory for a state");
    *out = image;
    return STATUS_OK;
}

struct image *image_find(struct image_store *store, const uint8_t name[IMAGE_NAME_BYTES])
{
    pthread_mutex_lock(&store->lock);
    struct image *image = store->n_buckets ? *bucket_of(store, name) : NULL;
    while (image && memcmp(image->name, name, IMAGE_NAME_BYTES))
        image = image->chain;
    if (image) {
        image->n_keeps++;
        image_settle(image);
    }
    pthread_mutex_unlock(&store->lock);
    return image;
}

/* ---- where their values are ---- */

enum status image_set_origin(struct image *image, struct image *parent, const int32_t *tokens,
                             size_t n_chunked, size_t n_single, struct error *err)
{
    CHECK(!image->has_origin && !image->has_file);
    size_t n = n_chunked + n_single;
    int32_t *copy = malloc((n ? n : 1) * sizeof(*copy));
    if (!copy)
        return fail(err, STATUS_NOMEM, "out of memory for the origin of a state");
    memcpy(copy, tokens, n * sizeof(*copy));
    if (parent)
        image_keep(parent);
    pthread_mutex_lock(&image->store->lock);
    image->origin = (struct image_origin){parent, copy, n_chunked, n_single};
    image->has_origin = true;
    image->n_replayed = n + (parent && !parent->has_file ? parent->n_replayed : 0);
    if (parent)
        parent->n_children++;
    image_settle(parent);
    pthread_mutex_unlock(&image->store->lock);
    return STATUS_OK;
}

void image_set_file(struct image *image)
{
    struct image_store *store = image->store;
    pthread_mutex_lock(&store->lock);
    struct image *parent = image->has_origin ? image->origin.parent : NULL;
    free(image->has_origin ? image->origin.tokens : NULL);
    image->has_origin = false;
    image->has_file = true;
    image->n_replayed = 0;
    image_settle(image);
    leave_parent(parent);
    image_settle(parent);
    pthread_cond_broadcast(&store->changed);
    pthread_mutex_unlock(&store->lock);
}

void image_move_values(struct image *from, struct image *to)
{
    struct image_store *store = to->store;
    pthread_mutex_lock(&store->lock);
    CHECK(from->n_holds == 1 && !from->n_keeps && from->values && !to->values);
    to->values = from->values;
    from->values = NULL;
    atomic_store_explicit(&to->is_here, true, memory_order_relaxed);
    atomic_store_explicit(&from->is_here, false, memory_order_relaxed);
    image_settle(to);
    pthread_mutex_unlock(&store->lock);
}

size_t image_replay_length(struct image *image)
{
    pthread_mutex_lock(&image->store->lock);
    size_t n = image->n_replayed;
    pthread_mutex_unlock(&image->store->lock);
    return n;
}

void image_want_file(struct image *image)
{
    struct image_store *store = image->store;
    pthread_mutex_lock(&store->lock);
    image->wants_file = store->has_files;
    image_settle(image);
    pthread_cond_broadcast(&store->changed);
    pthread_mutex_unlock(&store->lock);
}

void image_set_lost(struct image *image, const char *why)
{
    pthread_mutex_lock(&image->store->lock);
    if (!image->why)
        image->why = strdup(why);
    pthread_mutex_unlock(&image->store->lock);
}

enum image_tier image_tier(const struct image *image)
{
    const struct image_store *store = image->store;
    if (!atomic_load_explicit(&image->is_here, memory_order_relaxed))
        return IMAGE_IN_STORE;
    bool on_device = store->is_on_device && store->is_on_device(store->on_device_context, image);
    return on_device ? IMAGE_ON_DEVICE : IMAGE_IN_MEMORY;
}

uint64_t image_length(const struct image *image)
{
    return image ? image->position + (uint64_t)image->n_pending : 0;
}

/* ---- slots ---- */

size_t image_values_of(const struct model *model)
{
    size_t n = 0;
    for (int i = 0; i < model_n_state_tensors(model); i++)
        n += (size_t)model_state_tensor(model, i)->n_values;
    return n;
}

enum status image_load(struct model *model, int slot, const struct image *image, struct error *err)
{
    CHECK(image->store->n_values == image_values_of(model));
    return model_load(model, slot, image->values, image->position, err);
}

enum status image_begin_save(struct model *model, int slot, struct image *image, struct error *err)
{
    CHECK(image->store->n_values == image_values_of(model));
    image->position = model_position(model, slot);
    return model_begin_save(model, slot, err);
}

enum status image_finish_save(struct model *model, struct image *image, bool wait, bool *done,
                              struct error *err)
{
    return model_finish_save(model, wait, image->values, done, err);
}

/* ---- bytes ---- */

static void put_u32(unsigned char *at, uint32_t value)
{
    value = htole32(value);
    memcpy(at, &value, sizeof(value));
}

static void put_u64(unsigned char *at, uint64_t value)
{
    value = htole64(value);
    memcpy(at, &value, sizeof(value));
}

static uint32_t get_u32(const char *at)
{
    uint32_t value;
    memcpy(&value, at, sizeof(value));
    return le32toh(value);
}

static uint64_t get_u64(const char *at)
{
    uint64_t value;
    memcpy(&value, at, sizeof(value));
    return le64toh(value);
}

/* 32 hex digits as 16 bytes. */
static void put_fingerprint(unsigned char *at, const char *fingerprint)
{
    for (int i = 0; i < 16; i++) {
        const char digits[3] = {fingerprint[2 * i], fingerprint[2 * i + 1]};
        at[i] = (unsigned char)strtoul(digits, NULL, 16);
    }
}

void image_frame(const struct image *image, unsigned char head[IMAGE_HEAD_BYTES],
                 unsigned char tail[IMAGE_TAIL_BYTES])
{
    const struct image_store *store = image->store;
    XXH3_state_t hash;
    memset(head, 0, IMAGE_HEAD_BYTES);
    memcpy(head, magic, sizeof(magic));
    put_u32(head + 8, FORMAT_VERSION);
    put_u32(head + 12, image->tail);
    put_fingerprint(head + 16, store->fingerprint);
    put_u64(head + 32, image->position);
    put_u64(head + 40, store->n_values);
    put_u32(head + 48, (uint32_t)image->n_pending);
    put_u32(head + 52, image->n_pending ? (uint32_t)image->pending[0] : 0);
    XXH3_64bits_reset(&hash);
    XXH3_64bits_update(&hash, head, IMAGE_HEAD_BYTES);
    XXH3_64bits_update(&hash, image->values, values_bytes(store));
    put_u64(tail, XXH3_64bits_digest(&hash));
}

void image_write(const struct image *image, struct bytes *out)
{
    unsigned char head[IMAGE_HEAD_BYTES], tail[IMAGE_TAIL_BYTES];
    image_frame(image, head, tail);
    bytes_append(out, head, sizeof(head));
    bytes_append(out, image->values, values_bytes(image->store));
    bytes_append(out, tail, sizeof(tail));
}

static enum status check_file(const struct image_store *store, const char *data, size_t n,
                              struct error *err)
{
    unsigned char fingerprint[16];
    if (n < IMAGE_HEAD_BYTES || memcmp(data, magic, sizeof(magic)))
        return fail(err, STATUS_INVALID,
                    "this is not an exported state: expected a header of %d bytes that begins "
                    "with LATTEIMG, found %zu bytes",
                    IMAGE_HEAD_BYTES, n);
    if (get_u32(data + 8) != FORMAT_VERSION)
        return fail(err, STATUS_INVALID, "format version of the state: expected %d, found %" PRIu32,
                    FORMAT_VERSION, get_u32(data + 8));
    put_fingerprint(fingerprint, store->fingerprint);
    if (memcmp(data + 16, fingerprint, sizeof(fingerprint))) {
        char found[2 * sizeof(fingerprint) + 1];
        for (size_t i = 0; i < sizeof(fingerprint); i++)
            snprintf(found + 2 * i, 3, "%02x", (unsigned char)data[16 + i]);
        return fail(err, STATUS_INVALID,
                    "model fingerprint of the state: expected %s, found %s, another model's",
                    store->fingerprint, found);
    }
    if (get_u64(data + 40) != store->n_values || n != image_file_bytes(store))
        return fail(err, STATUS_INVALID,
                    "length of the state: expected %zu values in %zu bytes, found %" PRIu64
                    " values in %zu bytes",
                    store->n_values, image_file_bytes(store), get_u64(data + 40), n);
    uint64_t found = get_u64(data + n - IMAGE_TAIL_BYTES);
    uint64_t hash = XXH3_64bits(data, n - IMAGE_TAIL_BYTES);
    if (hash != found)
        return fail(err, STATUS_INVALID,
                    "checksum of the state: expected %016" PRIx64 ", found %016" PRIx64, hash,
                    found);
    return STATUS_OK;
}

/* What a checksum cannot tell: a file may be made by hand. */
static enum status check_numbers(const struct image_store *store, const char *data,
                                 struct error *err)
{
    uint64_t position = get_u64(data + 32);
    uint64_t most = store->max_position ? (uint64_t)store->max_position : INT64_MAX / 2;
    uint32_t n_pending = get_u32(data + 48), pending = get_u32(data + 52);
    if (n_pending > IMAGE_MAX_PENDING || position > most - n_pending)
        return fail(err, STATUS_INVALID,
                    "position of the state: expected at most %" PRIu64
                    " and up to %d pending tokens, found %" PRIu64 " and %" PRIu32,
                    most, IMAGE_MAX_PENDING, position, n_pending);
    if (n_pending && pending >= (uint32_t)store->vocab_size)
        return fail(err, STATUS_INVALID,
                    "pending token of the state: expected 0..%d, found %" PRIu32,
                    store->vocab_size - 1, pending);
    return STATUS_OK;
}

static void take_head(struct image *image, const char *head)
{
    image->tail = get_u32(head + 12);
    image->position = get_u64(head + 32);
    image->n_pending = (int)get_u32(head + 48);
    image->pending[0] = (int32_t)get_u32(head + 52);
}

bool image_read_head(struct image *image, const char head[IMAGE_HEAD_BYTES])
{
    unsigned char fingerprint[16];
    put_fingerprint(fingerprint, image->store->fingerprint);
    if (memcmp(head, magic, sizeof(magic)) || get_u32(head + 8) != FORMAT_VERSION ||
        memcmp(head + 16, fingerprint, sizeof(fingerprint)) ||
        get_u64(head + 40) != image->store->n_values || check_numbers(image->store, head, NULL))
        return false;
    take_head(image, head);
    return true;
}

enum status image_parse(struct image **out, struct image_store *store, const char *data, size_t n,
                        int wait_ms, struct error *err)
{
    struct image *image = NULL;
    enum status st = check_file(store, data, n, err);
    if (!st)
        st = check_numbers(store, data, err);
    if (!st)
        st = wait_ms ? image_new_wait(&image, store, wait_ms, err) : image_new(&image, store, err);
    if (st)
        return st;
    take_head(image, data);
    memcpy(image->values, data + IMAGE_HEAD_BYTES, values_bytes(store));
    *out = image;
    return STATUS_OK;
}

enum status image_check_file(const struct image *image, const char *data, size_t n,
                             struct error *err)
{
    const struct image_store *store = image->store;
    enum status st = check_file(store, data, n, err);
    if (!st)
        st = check_numbers(store, data, err);
    if (st)
        return st;
    if (get_u64(data + 32) != image->position || get_u32(data + 12) != image->tail ||
        get_u32(data + 48) != (uint32_t)image->n_pending ||
        (image->n_pending && get_u32(data + 52) != (uint32_t)image->pending[0]))
        return fail(err, STATUS_INVALID,
                    "the state is another one: expected position %" PRIu64 " with %d pending, "
                    "found %" PRIu64 " with %" PRIu32,
                    image->position, image->n_pending, get_u64(data + 32), get_u32(data + 48));
    return STATUS_OK;
}
