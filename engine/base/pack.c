/* pack.c - see pack.h */
#include "engine/base/pack.h"

#include <endian.h>
#include <string.h>

void pack_u32(struct bytes *out, uint32_t value)
{
    value = htole32(value);
    bytes_append(out, &value, sizeof(value));
}

void pack_u64(struct bytes *out, uint64_t value)
{
    value = htole64(value);
    bytes_append(out, &value, sizeof(value));
}

const char *unpack_skip(struct unpack *u, size_t n)
{
    if (u->failed || (size_t)(u->end - u->at) < n) {
        u->failed = true;
        return NULL;
    }
    const char *at = u->at;
    u->at += n;
    return at;
}

void unpack_raw(struct unpack *u, void *out, size_t n)
{
    const char *at = unpack_skip(u, n);
    if (at)
        memcpy(out, at, n);
    else
        memset(out, 0, n);
}

uint32_t unpack_u32(struct unpack *u)
{
    uint32_t value;
    unpack_raw(u, &value, sizeof(value));
    return le32toh(value);
}

uint64_t unpack_u64(struct unpack *u)
{
    uint64_t value;
    unpack_raw(u, &value, sizeof(value));
    return le64toh(value);
}
