/* safetensors.c - see safetensors.h. The format: https://github.com/huggingface/safetensors
 *
 * Order of work: map a file, pass its header through the strict JSON check, read the entries,
 * check that their data fill the file without gaps, sort all tensors by name, and, for
 * shards, hold them against the index.
 */
#include "weights/safetensors.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/arena.h"
#include "engine/base/file.h"
#include "weights/tree.h"

/* 100,000,000 is the format's own limit on a header. */
enum { MAX_HEADER = 100000000, MAX_SHARDS = 4096, MAX_NAME = 200, MAX_DTYPE = 16 };

#define MAX_WHOLE (INT64_C(1) << 53)

static const char SINGLE_FILE[] = "model.safetensors";
static const char INDEX_FILE[] = "model.safetensors.index.json";

struct safetensors {
    struct arena names;     /* tensor names, dtypes and paths */
    struct file_map *files; /* [n_files], owned */
    size_t n_files;
    struct tensor *tensors; /* [n], owned; sorted by name once open is through */
    size_t n, cap, n_bytes;
};

/* Names go to logs and error texts: 1 to max bytes, and no control characters. */
static bool is_short_name(const char *name, size_t max)
{
    size_t n = strlen(name);
    for (const char *c = name; *c; c++)
        if ((unsigned char)*c < ' ' || *c == 0x7f)
            return false;
    return n >= 1 && n <= max;
}

/* ---- one entry of a header ---- */

static enum status read_shape(struct tensor *t, const cJSON *shape, struct error *err)
{
    if (!cJSON_IsArray(shape))
        return fail(err, STATUS_INVALID, "\"shape\" is %s, expected an array", tree_kind(shape));
    bool empty = false, overflow = false;
    t->n_values = 1;
    for (const cJSON *item = shape->child; item; item = item->next) {
        int64_t size;
        if (t->n_dims == TENSOR_MAX_DIMS)
            return fail(err, STATUS_INVALID, "more than %d dimensions", TENSOR_MAX_DIMS);
        if (!tree_whole(item, 0, MAX_WHOLE, &size))
            return fail(err, STATUS_INVALID, "dimension %d is not a whole number of 0 to 2^53",
                        t->n_dims);
        t->shape[t->n_dims++] = size;
        empty = empty || size == 0;
        overflow = overflow || __builtin_mul_overflow(t->n_values, size, &t->n_values);
    }
    if (empty)
        t->n_values = 0;
    else if (overflow)
        return fail(err, STATUS_INVALID, "the product of the dimensions overflows");
    return STATUS_OK;
}

/* Sets data and n_bytes from offsets into data[n]. */
static enum status read_offsets(struct tensor *t, const cJSON *offsets, const unsigned char *data,
                                size_t n, struct error *err)
{
    int64_t begin, end;
    if (!cJSON_IsArray(offsets) || cJSON_GetArraySize(offsets) != 2 ||
        !tree_whole(offsets->child, 0, MAX_WHOLE, &begin) ||
        !tree_whole(offsets->child->next, 0, MAX_WHOLE, &end))
        return fail(err, STATUS_INVALID, "\"data_offsets\" is not two whole numbers");
    if (begin > end)
        return fail(err, STATUS_INVALID, "data_offsets [%lld, %lld] are in the wrong order",
                    (long long)begin, (long long)end);
    if ((uint64_t)end > n)
        return fail(err, STATUS_INVALID,
                    "data end at offset %lld, but the file holds %zu bytes of data", (long long)end,
                    n);
    t->data = data + begin;
    t->n_bytes = (size_t)(end - begin);
    return STATUS_OK;
}

static enum status check_size(const struct tensor *t, int bits, struct error *err)
{
    uint64_t n_bits;
    if (!bits)
        return STATUS_OK;
    if (__builtin_mul_overflow((uint64_t)t->n_values, (uint64_t)bits, &n_bits))
        return fail(err, STATUS_INVALID, "its size in bytes overflows");
    if (n_bits % 8 || n_bits / 8 != t->n_bytes)
        return fail(err, STATUS_INVALID,
                    "%lld values of %s take %llu bytes, but data_offsets give %zu",
                    (long long)t->n_values, t->dtype_name, (unsigned long long)((n_bits + 7) / 8),
                    t->n_bytes);
    return STATUS_OK;
}

static enum status read_entry(struct safetensors *s, struct tensor *t, const cJSON *entry,
                              const unsigned char *data, size_t n, struct error *err)
{
    const cJSON *dtype = NULL, *shape = NULL, *offsets = NULL;
    char shown[64];
    if (!cJSON_IsObject(entry))
        return fail(err, STATUS_INVALID, "the entry is %s, expected an object", tree_kind(entry));
    for (const cJSON *item = entry->child; item; item = item->next) {
        if (!strcmp(item->string, "dtype"))
            dtype = item;
        else if (!strcmp(item->string, "shape"))
            shape = item;
        else if (!strcmp(item->string, "data_offsets"))
            offsets = item;
        else
            return fail(err, STATUS_INVALID,
                        "unknown key \"%s\", expected dtype, shape and data_offsets",
                        tree_key(item, shown));
    }
    if (!cJSON_IsString(dtype) || !is_short_name(dtype->valuestring, MAX_DTYPE))
        return fail(err, STATUS_INVALID, "\"dtype\" is %s, expected a short name",
                    tree_show(dtype, shown));
    int bits;
    t->dtype = dtype_find(dtype->valuestring, &bits);
    t->dtype_name = arena_copy(&s->names, dtype->valuestring, strlen(dtype->valuestring));
    if (!t->dtype_name)
        return fail(err, STATUS_NOMEM, "out of memory");
    enum status st = read_shape(t, shape, err);
    if (!st)
        st = read_offsets(t, offsets, data, n, err);
    return st ? st : check_size(t, bits, err);
}

/* ---- one file ---- */

static struct tensor *push_tensor(struct safetensors *s)
{
    if (s->n == s->cap) {
        size_t cap = s->cap ? 2 * s->cap : 128;
        struct tensor *tensors = realloc(s->tensors, cap * sizeof(*tensors));
        if (!tensors)
            return NULL;
        s->tensors = tensors;
        s->cap = cap;
    }
    struct tensor *t = &s->tensors[s->n++];
    *t = (struct tensor){0};
    return t;
}

static enum status add_tensor(struct safetensors *s, const char *file, const cJSON *entry,
                              const unsigned char *data, size_t n, struct error *err)
{
    if (!is_short_name(entry->string, MAX_NAME))
        return fail(err, STATUS_INVALID,
                    "a tensor's name has %zu bytes or a control character, expected 1 to %d bytes",
                    strlen(entry->string), MAX_NAME);
    struct tensor *t = push_tensor(s);
    if (t)
        t->name = arena_copy(&s->names, entry->string, strlen(entry->string));
    if (!t || !t->name)
        return fail(err, STATUS_NOMEM, "out of memory");
    t->file = file;
    enum status st = read_entry(s, t, entry, data, n, err);
    if (st)
        fail_context(err, "tensor %s", t->name);
    return st;
}

static enum status check_metadata(const cJSON *metadata, struct error *err)
{
    if (!cJSON_IsObject(metadata))
        return fail(err, STATUS_INVALID, "\"__metadata__\" is %s, expected an object",
                    tree_kind(metadata));
    for (const cJSON *item = metadata->child; item; item = item->next) {
        if (!cJSON_IsString(item))
            return fail(err, STATUS_INVALID, "\"__metadata__\" holds %s, expected strings only",
                        tree_kind(item));
    }
    return STATUS_OK;
}

static int compare_data(const void *left, const void *right)
{
    const struct tensor *a = left, *b = right;
    if (a->data != b->data)
        return a->data < b->data ? -1 : 1;
    return (a->n_bytes > b->n_bytes) - (a->n_bytes < b->n_bytes);
}

/* The format demands that tensors lie side by side from the first byte of data to the last. */
static enum status check_layout(struct tensor *tensors, size_t n_tensors, const unsigned char *data,
                                size_t n, struct error *err)
{
    size_t at = 0;
    if (n_tensors)
        qsort(tensors, n_tensors, sizeof(*tensors), compare_data);
    for (size_t i = 0; i < n_tensors; i++) {
        size_t begin = (size_t)((const unsigned char *)tensors[i].data - data);
        if (begin != at)
            return fail(err, STATUS_INVALID,
                        "tensor %s begins at offset %zu, but the one before it ends at %zu: %s",
                        tensors[i].name, begin, at,
                        begin < at ? "they overlap" : "a hole between them");
        at += tensors[i].n_bytes;
    }
    if (at != n)
        return fail(err, STATUS_INVALID, "tensors cover %zu bytes of data, but the file holds %zu",
                    at, n);
    return STATUS_OK;
}

static enum status read_entries(struct safetensors *s, const char *file, const cJSON *header,
                                const unsigned char *data, size_t n, struct error *err)
{
    size_t first = s->n;
    enum status st = STATUS_OK;
    for (const cJSON *item = header->child; item; item = item->next) {
        if (!strcmp(item->string, "__metadata__"))
            st = check_metadata(item, err);
        else
            st = add_tensor(s, file, item, data, n, err);
        if (st)
            return st;
    }
    s->n_bytes += n;
    return check_layout(s->tensors ? s->tensors + first : NULL, s->n - first, data, n, err);
}

static uint64_t read_u64(const unsigned char *bytes)
{
    uint64_t value = 0;
    for (int i = 7; i >= 0; i--)
        value = value << 8 | bytes[i];
    return value;
}

static enum status read_file(struct safetensors *s, const char *file, const struct file_map *map,
                             struct error *err)
{
    if (map->n < 8)
        return fail(err, STATUS_INVALID, "the file has %zu bytes, a header needs at least 8",
                    map->n);
    uint64_t n_header = read_u64(map->data);
    if (n_header > MAX_HEADER)
        return fail(err, STATUS_INVALID, "a header of %llu bytes, expected at most %d",
                    (unsigned long long)n_header, MAX_HEADER);
    if (n_header > map->n - 8)
        return fail(err, STATUS_INVALID, "a header of %llu bytes, but only %zu follow: truncated?",
                    (unsigned long long)n_header, map->n - 8);
    if (!n_header || map->data[8] != '{')
        return fail(err, STATUS_INVALID, "the header does not begin with '{'");
    cJSON *header = NULL;
    enum status st = tree_parse(&header, (const char *)map->data + 8, n_header, 3, err);
    if (st) {
        fail_context(err, "header");
        return st;
    }
    st = read_entries(s, file, header, map->data + 8 + n_header, map->n - 8 - n_header, err);
    cJSON_Delete(header);
    return st;
}

/* Map DIR/NAME as the next of s->files and read it. */
static enum status add_file(struct safetensors *s, const char *dir, const char *name,
                            struct error *err)
{
    char path[FILE_PATH_BYTES];
    enum status st = file_path(path, dir, name, err);
    if (!st)
        st = file_map(&s->files[s->n_files], path, err);
    if (st)
        return st;
    s->n_files++;
    const char *file = arena_copy(&s->names, path, strlen(path));
    st = file ? read_file(s, file, &s->files[s->n_files - 1], err)
              : fail(err, STATUS_NOMEM, "out of memory");
    if (st)
        fail_context(err, "%s", path);
    return st;
}

/* ---- the whole set ---- */

static int compare_names(const void *left, const void *right)
{
    return strcmp(((const struct tensor *)left)->name, ((const struct tensor *)right)->name);
}

static enum status sort_tensors(struct safetensors *s, struct error *err)
{
    if (!s->n)
        return fail(err, STATUS_INVALID, "no tensors");
    qsort(s->tensors, s->n, sizeof(*s->tensors), compare_names);
    for (size_t i = 1; i < s->n; i++)
        if (!compare_names(&s->tensors[i - 1], &s->tensors[i]))
            return fail(err, STATUS_INVALID, "tensor %s is in two files, %s and %s",
                        s->tensors[i].name, s->tensors[i - 1].file, s->tensors[i].file);
    return STATUS_OK;
}

static enum status open_single(struct safetensors *s, const char *dir, struct error *err)
{
    s->files = calloc(1, sizeof(*s->files));
    if (!s->files)
        return fail(err, STATUS_NOMEM, "%s: out of memory", dir);
    enum status st = add_file(s, dir, SINGLE_FILE, err);
    return st ? st : sort_tensors(s, err);
}

/* A plain name of a file beside the index: nothing that leads elsewhere. */
static bool is_plain_name(const char *name)
{
    return is_short_name(name, MAX_NAME) && *name != '.' && !strchr(name, '/') &&
           !strchr(name, '\\');
}

static int compare_strings(const void *left, const void *right)
{
    return strcmp(*(const char *const *)left, *(const char *const *)right);
}

/* The distinct file names of the map, sorted, borrowed from it, in names[n_entries]. */
static enum status list_shards(const char **names, size_t *n_names, const cJSON *map,
                               struct error *err)
{
    size_t n = 0, kept = 0;
    char key[64], shown[64];
    for (const cJSON *item = map->child; item; item = item->next) {
        if (!cJSON_IsString(item) || !is_plain_name(item->valuestring))
            return fail(err, STATUS_INVALID,
                        "weight_map: %s is mapped to %s, expected a plain file name",
                        tree_key(item, key), tree_show(item, shown));
        names[n++] = item->valuestring;
    }
    qsort(names, n, sizeof(*names), compare_strings);
    for (size_t i = 0; i < n; i++)
        if (!kept || strcmp(names[kept - 1], names[i]))
            names[kept++] = names[i];
    if (kept > MAX_SHARDS)
        return fail(err, STATUS_INVALID, "weight_map names %zu files, at most %d are opened", kept,
                    MAX_SHARDS);
    *n_names = kept;
    return STATUS_OK;
}

static const char *base_name(const char *path)
{
    return strrchr(path, '/') + 1;
}

/* Every entry of the index has its tensor, in that file. `listed` marks the tensors met. */
static enum status check_entries(const struct safetensors *s, const cJSON *map, bool *listed,
                                 struct error *err)
{
    char key[64];
    for (const cJSON *item = map->child; item; item = item->next) {
        const struct tensor *t = safetensors_find(s, item->string);
        if (!t)
            return fail(err, STATUS_INVALID, "tensor %s is missing in %s", tree_key(item, key),
                        item->valuestring);
        if (strcmp(base_name(t->file), item->valuestring))
            return fail(err, STATUS_INVALID, "tensor %s is in %s, but the index says %s", t->name,
                        base_name(t->file), item->valuestring);
        listed[t - s->tensors] = true;
    }
    for (size_t i = 0; i < s->n; i++)
        if (!listed[i])
            return fail(err, STATUS_INVALID, "tensor %s of %s is not in the index",
                        s->tensors[i].name, base_name(s->tensors[i].file));
    return STATUS_OK;
}

static enum status check_index(const struct safetensors *s, const cJSON *map, struct error *err)
{
    bool *listed = calloc(s->n, sizeof(*listed));
    if (!listed)
        return fail(err, STATUS_NOMEM, "out of memory");
    enum status st = check_entries(s, map, listed, err);
    free(listed);
    return st;
}

static enum status open_listed(struct safetensors *s, const char *dir, const char **names,
                               const cJSON *map, struct error *err)
{
    size_t n_names = 0;
    enum status st = list_shards(names, &n_names, map, err);
    if (st)
        return st;
    s->files = calloc(n_names, sizeof(*s->files));
    if (!s->files)
        return fail(err, STATUS_NOMEM, "out of memory");
    for (size_t i = 0; !st && i < n_names; i++)
        st = add_file(s, dir, names[i], err);
    if (st == STATUS_NOT_FOUND)
        st =
            fail(err, STATUS_INVALID, "weight_map names %s, which is not there", names[s->n_files]);
    if (!st)
        st = sort_tensors(s, err);
    return st ? st : check_index(s, map, err);
}

static enum status open_map(struct safetensors *s, const char *dir, const cJSON *index,
                            struct error *err)
{
    const cJSON *map = cJSON_GetObjectItemCaseSensitive(index, "weight_map");
    if (!cJSON_IsObject(map) || !map->child)
        return fail(err, STATUS_INVALID, "\"weight_map\" is %s, expected an object with entries",
                    map && cJSON_IsObject(map) ? "empty" : tree_kind(map));
    const char **names = calloc((size_t)cJSON_GetArraySize(map), sizeof(*names));
    if (!names)
        return fail(err, STATUS_NOMEM, "out of memory");
    enum status st = open_listed(s, dir, names, map, err);
    free(names);
    return st;
}

static enum status open_sharded(struct safetensors *s, const char *dir, const char *index_path,
                                struct error *err)
{
    cJSON *index = NULL;
    enum status st = tree_read(&index, index_path, MAX_HEADER, 8, err);
    if (st)
        return st;
    st = open_map(s, dir, index, err);
    cJSON_Delete(index);
    if (st)
        fail_context(err, "%s", index_path);
    return st;
}

enum status safetensors_open(struct safetensors **out, const char *dir, struct error *err)
{
    char single[FILE_PATH_BYTES], index[FILE_PATH_BYTES];
    enum status st = file_path(single, dir, SINGLE_FILE, err);
    if (!st)
        st = file_path(index, dir, INDEX_FILE, err);
    if (st)
        return st;
    struct safetensors *s = calloc(1, sizeof(*s));
    if (!s)
        return fail(err, STATUS_NOMEM, "%s: out of memory", dir);
    st = open_single(s, dir, err);
    if (st == STATUS_NOT_FOUND) {
        free(s->files);
        s->files = NULL;
        st = open_sharded(s, dir, index, err);
    }
    if (st == STATUS_NOT_FOUND)
        st = fail(err, STATUS_NOT_FOUND, "%s: neither %s nor %s is there", dir, SINGLE_FILE,
                  INDEX_FILE);
    if (st) {
        safetensors_close(s);
        return st;
    }
    *out = s;
    return STATUS_OK;
}

void safetensors_close(struct safetensors *s)
{
    if (!s)
        return;
    for (size_t i = 0; i < s->n_files; i++)
        file_unmap(&s->files[i]);
    free(s->files);
    free(s->tensors);
    arena_free(&s->names);
    free(s);
}

size_t safetensors_count(const struct safetensors *s)
{
    return s->n;
}

size_t safetensors_n_bytes(const struct safetensors *s)
{
    return s->n_bytes;
}

const struct tensor *safetensors_get(const struct safetensors *s, size_t i)
{
    CHECK(i < s->n);
    return &s->tensors[i];
}

const struct tensor *safetensors_find(const struct safetensors *s, const char *name)
{
    const struct tensor key = {.name = name};
    return bsearch(&key, s->tensors, s->n, sizeof(*s->tensors), compare_names);
}
