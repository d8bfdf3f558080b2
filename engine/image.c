/* image.c - see image.h */
#include "engine/image.h"

#include <endian.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
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
    snprintf(store->fingerprint, sizeof(store->fingerprint), "%s", fingerprint);
    store->n_values = n_values;
    store->vocab_size = vocab_size;
    store->max_position = max_position;
    store->limit_bytes = limit_bytes;
    atomic_init(&store->used_bytes, 0);
    atomic_init(&store->n_images, 0);
    atomic_init(&store->next_id, 1);
}

size_t image_bytes(const struct image_store *store)
{
    return sizeof(struct image) + store->n_values * sizeof(float);
}

size_t image_file_bytes(const struct image_store *store)
{
    return IMAGE_HEAD_BYTES + store->n_values * sizeof(float) + IMAGE_TAIL_BYTES;
}

enum status image_new(struct image **out, struct image_store *store, struct error *err)
{
    size_t n_bytes = image_bytes(store);
    size_t before = atomic_fetch_add(&store->used_bytes, n_bytes);
    struct image *image = NULL;
    if (before + n_bytes > store->limit_bytes)
        fail(err, STATUS_BUSY,
             "states outside the device take %zu of %zu bytes; one more needs %zu", before,
             store->limit_bytes, n_bytes);
    else if (!(image = malloc(n_bytes)))
        fail(err, STATUS_NOMEM, "out of memory for a state of %zu bytes", n_bytes);
    if (!image) {
        atomic_fetch_sub(&store->used_bytes, n_bytes);
        return err->status;
    }
    *image = (struct image){.store = store, .id = atomic_fetch_add(&store->next_id, 1)};
    atomic_init(&image->n_references, 1);
    atomic_fetch_add(&store->n_images, 1);
    *out = image;
    return STATUS_OK;
}

void image_hold(struct image *image)
{
    CHECK(atomic_fetch_add(&image->n_references, 1) > 0);
}

void image_release(struct image *image)
{
    if (!image)
        return;
    int before = atomic_fetch_sub(&image->n_references, 1);
    CHECK(before > 0);
    if (before > 1)
        return;
    atomic_fetch_sub(&image->store->used_bytes, image_bytes(image->store));
    atomic_fetch_sub(&image->store->n_images, 1);
    free(image);
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
    const float *at = image->values;
    for (int i = 0; i < model_n_state_tensors(model); i++) {
        enum status st = model_state_write(model, slot, i, at, err);
        if (st)
            return st;
        at += model_state_tensor(model, i)->n_values;
    }
    CHECK(at == image->values + image->store->n_values);
    model_set_position(model, slot, image->position);
    return STATUS_OK;
}

enum status image_save(struct model *model, int slot, struct image *image, struct error *err)
{
    float *at = image->values;
    image->position = model_position(model, slot);
    for (int i = 0; i < model_n_state_tensors(model); i++) {
        enum status st = model_state_read(model, slot, i, at, err);
        if (st)
            return st;
        at += model_state_tensor(model, i)->n_values;
    }
    CHECK(at == image->values + image->store->n_values);
    return STATUS_OK;
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

void image_write(const struct image *image, struct bytes *out)
{
    const struct image_store *store = image->store;
    unsigned char head[IMAGE_HEAD_BYTES] = {0}, hash[IMAGE_TAIL_BYTES];
    memcpy(head, magic, sizeof(magic));
    put_u32(head + 8, FORMAT_VERSION);
    put_u32(head + 12, image->tail);
    put_fingerprint(head + 16, store->fingerprint);
    put_u64(head + 32, image->position);
    put_u64(head + 40, store->n_values);
    put_u32(head + 48, (uint32_t)image->n_pending);
    put_u32(head + 52, image->n_pending ? (uint32_t)image->pending[0] : 0);
    size_t start = out->n;
    bytes_append(out, head, sizeof(head));
    bytes_append(out, image->values, store->n_values * sizeof(float));
    if (out->failed)
        return;
    put_u64(hash, XXH3_64bits(out->data + start, out->n - start));
    bytes_append(out, hash, sizeof(hash));
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
    if (memcmp(data + 16, fingerprint, sizeof(fingerprint)))
        return fail(err, STATUS_INVALID,
                    "model fingerprint of the state: expected %s, found another model's",
                    store->fingerprint);
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

enum status image_parse(struct image **out, struct image_store *store, const char *data, size_t n,
                        struct error *err)
{
    struct image *image = NULL;
    enum status st = check_file(store, data, n, err);
    if (!st)
        st = check_numbers(store, data, err);
    if (!st)
        st = image_new(&image, store, err);
    if (st)
        return st;
    image->tail = get_u32(data + 12);
    image->position = get_u64(data + 32);
    image->n_pending = (int)get_u32(data + 48);
    image->pending[0] = (int32_t)get_u32(data + 52);
    memcpy(image->values, data + IMAGE_HEAD_BYTES, store->n_values * sizeof(float));
    *out = image;
    return STATUS_OK;
}
