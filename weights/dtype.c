/* dtype.c - see dtype.h */
#include "weights/dtype.h"

#include <stdint.h>
#include <string.h>

#include "engine/base/error.h"

static const struct {
    const char *name;
    enum dtype dtype;
    int bits;
} dtypes[] = {
    {"F32", DTYPE_F32, 32},      {"F16", DTYPE_F16, 16},      {"BF16", DTYPE_BF16, 16},
    {"F64", DTYPE_OTHER, 64},    {"I64", DTYPE_OTHER, 64},    {"U64", DTYPE_OTHER, 64},
    {"C64", DTYPE_OTHER, 64},    {"I32", DTYPE_OTHER, 32},    {"U32", DTYPE_OTHER, 32},
    {"I16", DTYPE_OTHER, 16},    {"U16", DTYPE_OTHER, 16},    {"I8", DTYPE_OTHER, 8},
    {"U8", DTYPE_OTHER, 8},      {"BOOL", DTYPE_OTHER, 8},    {"F8_E5M2", DTYPE_OTHER, 8},
    {"F8_E4M3", DTYPE_OTHER, 8}, {"F8_E8M0", DTYPE_OTHER, 8}, {"F6_E2M3", DTYPE_OTHER, 6},
    {"F6_E3M2", DTYPE_OTHER, 6}, {"F4", DTYPE_OTHER, 4},
};

const char *dtype_name(enum dtype dtype)
{
    return dtype == DTYPE_OTHER ? "other" : dtypes[dtype].name;
}

size_t dtype_bytes(enum dtype dtype)
{
    return dtype == DTYPE_OTHER ? 0 : (size_t)dtypes[dtype].bits / 8;
}

enum dtype dtype_find(const char *name, int *n_bits)
{
    *n_bits = 0;
    for (size_t i = 0; i < sizeof(dtypes) / sizeof(*dtypes); i++)
        if (!strcmp(name, dtypes[i].name)) {
            *n_bits = dtypes[i].bits;
            return dtypes[i].dtype;
        }
    return DTYPE_OTHER;
}

static float from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

static float f16_to_f32(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, magnitude = half & 0x7fff;
    if (magnitude >= 0x7c00) /* infinity and NaN keep their payload */
        return from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    if (magnitude < 0x400) { /* subnormal: units of 2^-24 */
        float value = (float)magnitude * 0x1p-24f;
        return sign ? -value : value;
    }
    return from_bits(sign | ((magnitude << 13) + (112u << 23)));
}

void dtype_to_f32(float *out, const void *src, enum dtype dtype, size_t n)
{
    const unsigned char *bytes = src;
    uint16_t half;
    CHECK(dtype != DTYPE_OTHER);
    if (!n)
        return;
    if (dtype == DTYPE_F32) {
        memcpy(out, src, n * sizeof(*out));
        return;
    }
    for (size_t i = 0; i < n; i++) {
        memcpy(&half, bytes + 2 * i, sizeof(half));
        out[i] = dtype == DTYPE_BF16 ? from_bits((uint32_t)half << 16) : f16_to_f32(half);
    }
}
