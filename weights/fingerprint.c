/* fingerprint.c - see fingerprint.h
 *
 * The hash runs over these bytes, one part behind the other:
 *   "latte fingerprint 1\n"
 *   the text of config_canonical: lines of "key=value\n"
 *   for each tensor, in ascending bytewise order of names:
 *     "NAME DTYPE [n,n,...]\n", where DTYPE is F32, F16 or BF16
 *     the tensor's bytes as they lie in the file
 * Names hold no line feeds and DTYPE and shape give the number of bytes that follow, so no two
 * models share a byte sequence. The result is written big-endian, as xxhsum prints it.
 */
#include "weights/fingerprint.h"

#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>
#include <xxhash.h>

#include "engine/base/bytes.h"
#include "weights/config.h"

enum { CHUNK_BYTES = 4 << 20 }; /* between two calls of progress */

struct reading {
    XXH3_state_t *hash;
    progress_fn *progress; /* may be NULL */
    void *context;
    uint64_t done, total;
};

/* Ask the kernel to read ahead; only a hint, so a refusal means nothing. */
static void prefetch(const struct tensor *t)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), begin = (uintptr_t)t->data / page * page;
    if (t->n_bytes)
        madvise((void *)begin, (uintptr_t)t->data + t->n_bytes - begin, MADV_WILLNEED);
}

static void add_data(struct reading *r, const struct tensor *t)
{
    const unsigned char *data = t->data;
    prefetch(t);
    for (size_t at = 0, n; at < t->n_bytes; at += n) {
        n = t->n_bytes - at < CHUNK_BYTES ? t->n_bytes - at : CHUNK_BYTES;
        XXH3_128bits_update(r->hash, data + at, n);
        r->done += n;
        if (r->progress)
            r->progress(r->context, r->done, r->total);
    }
}

/* "[2,3]" */
static void put_shape(struct bytes *out, const struct tensor *t)
{
    bytes_char(out, '[');
    for (int i = 0; i < t->n_dims; i++)
        bytes_format(out, "%s%lld", i ? "," : "", (long long)t->shape[i]);
    bytes_char(out, ']');
}

static bool add_all(struct reading *r, struct bytes *text, const struct model_config *config,
                    const struct safetensors *tensors)
{
    bytes_text(text, "latte fingerprint 1\n");
    config_canonical(config, text);
    for (size_t i = 0; i < safetensors_count(tensors); i++) {
        const struct tensor *t = safetensors_get(tensors, i);
        bytes_format(text, "%s %s ", t->name, t->dtype_name);
        put_shape(text, t);
        bytes_char(text, '\n');
        if (text->failed)
            return false;
        XXH3_128bits_update(r->hash, text->data, text->n);
        text->n = 0;
        add_data(r, t);
    }
    return true;
}

static void write_hex(char out[FINGERPRINT_BYTES], XXH128_hash_t hash)
{
    XXH128_canonical_t digest;
    XXH128_canonicalFromHash(&digest, hash);
    for (int i = 0; i < 16; i++)
        snprintf(out + 2 * i, 3, "%02x", digest.digest[i]);
}

enum status fingerprint_compute(char out[FINGERPRINT_BYTES], const struct model_config *config,
                                const struct safetensors *tensors, progress_fn *progress,
                                void *context, struct error *err)
{
    struct reading r = {XXH3_createState(), progress, context, 0, safetensors_n_bytes(tensors)};
    struct bytes text = {0};
    bool whole = r.hash != NULL;
    if (whole) {
        XXH3_128bits_reset(r.hash);
        whole = add_all(&r, &text, config, tensors);
    }
    if (whole)
        write_hex(out, XXH3_128bits_digest(r.hash));
    XXH3_freeState(r.hash);
    bytes_free(&text);
    return whole ? STATUS_OK : fail(err, STATUS_NOMEM, "out of memory while reading tensors");
}
