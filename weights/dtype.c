/* dtype.c - see dtype.h */
#include "weights/dtype.h"

#include <math.h>
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
    static const char *const names[] = {"F32", "F16", "BF16", "other", "I8", "F8_E4M3"};
    return names[dtype];
}

size_t dtype_bytes(enum dtype dtype)
{
    static const size_t bytes[] = {4, 2, 2, 0, 1, 1};
    return bytes[dtype];
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

/* One sign bit, four exponent bits (bias 7), three of mantissa; 0x7f is NaN. */
static float f8_to_f32(uint8_t byte)
{
    uint32_t sign = (uint32_t)(byte & 0x80) << 24, magnitude = byte & 0x7f;
    if (magnitude == 0x7f)
        return from_bits(sign | 0x7fc00000);
    if (magnitude < 8) { /* subnormal: units of 2^-9 */
        float value = (float)magnitude * 0x1p-9f;
        return sign ? -value : value;
    }
    return from_bits(sign | ((magnitude << 20) + (120u << 23)));
}

static uint8_t f8_from_f32(float value)
{
    const uint8_t sign = signbit(value) ? 0x80 : 0;
    const float magnitude = fabsf(value);
    if (isnan(value))
        return sign | 0x7f;
    if (magnitude >= 448)
        return sign | 0x7e;
    if (magnitude < 0x1p-6f) /* rintf rounds ties to even; 8 units are the smallest normal */
        return sign | (uint8_t)rintf(magnitude * 0x1p9f);
    int exponent;
    const float mantissa = frexpf(magnitude, &exponent); /* in [1/2, 1) */
    /* 16 units carry into the exponent, as they should. */
    return sign | (uint8_t)(((exponent + 6) << 3) + (int)rintf(mantissa * 16) - 8);
}

static uint16_t bf16_from_bits(uint32_t bits)
{
    if ((bits & 0x7fffffff) > 0x7f800000)
        return (uint16_t)(bits >> 16 | 0x40); /* a NaN whose payload is in the low half stays one */
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

void dtype_from_f32(void *out, enum dtype dtype, const float *src, size_t n)
{
    CHECK(dtype == DTYPE_F32 || dtype == DTYPE_BF16 || dtype == DTYPE_F8_E4M3);
    if (dtype == DTYPE_F32 && n)
        memcpy(out, src, n * sizeof(*src));
    for (size_t i = 0; dtype == DTYPE_BF16 && i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &src[i], sizeof(bits));
        ((uint16_t *)out)[i] = bf16_from_bits(bits);
    }
    for (size_t i = 0; dtype == DTYPE_F8_E4M3 && i < n; i++)
        ((uint8_t *)out)[i] = f8_from_f32(src[i]);
}

void dtype_to_f32(float *out, const void *src, enum dtype dtype, size_t n)
{
    const unsigned char *bytes = src;
    uint16_t half;
    CHECK(dtype != DTYPE_OTHER && dtype != DTYPE_I8);
    if (!n)
        return;
    if (dtype == DTYPE_F32) {
        memcpy(out, src, n * sizeof(*out));
        return;
    }
    if (dtype == DTYPE_F8_E4M3) {
        for (size_t i = 0; i < n; i++)
            out[i] = f8_to_f32(bytes[i]);
        return;
    }
    for (size_t i = 0; i < n; i++) {
        memcpy(&half, bytes + 2 * i, sizeof(half));
        out[i] = dtype == DTYPE_BF16 ? from_bits((uint32_t)half << 16) : f16_to_f32(half);
    }
}
