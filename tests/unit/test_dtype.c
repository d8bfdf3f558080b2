/* test_dtype.c - conversions against the definitions of the formats, every value of 16 bits. */
#include "tests/unit/unit.h"

#include <math.h>
#include <string.h>

#include "weights/dtype.h"

/* IEEE 754 binary16 read by its definition. */
static double half_by_definition(unsigned bits)
{
    int exponent = (int)(bits >> 10 & 31), fraction = (int)(bits & 1023);
    double sign = bits & 0x8000 ? -1.0 : 1.0;
    if (exponent == 31)
        return fraction ? NAN : sign * INFINITY;
    if (exponent == 0)
        return sign * ldexp(fraction, -24);
    return sign * ldexp(1024 + fraction, exponent - 25);
}

/* bfloat16: the exponent of binary32 and seven bits of fraction. */
static double bfloat_by_definition(unsigned bits)
{
    int exponent = (int)(bits >> 7 & 255), fraction = (int)(bits & 127);
    double sign = bits & 0x8000 ? -1.0 : 1.0;
    if (exponent == 255)
        return fraction ? NAN : sign * INFINITY;
    if (exponent == 0)
        return sign * ldexp(fraction, -133);
    return sign * ldexp(128 + fraction, exponent - 134);
}

static void check_all(enum dtype dtype, double (*by_definition)(unsigned))
{
    for (unsigned bits = 0; bits < 65536; bits++) {
        uint16_t stored = (uint16_t)bits;
        float got;
        double expected = by_definition(bits);
        dtype_to_f32(&got, &stored, dtype, 1);
        if (isnan(expected) ? !isnan(got)
                            : (double)got != expected || !signbit(got) != !signbit(expected))
            fail_msg("0x%04x: %a, expected %a", bits, (double)got, expected);
    }
}

static void test_halves(void **state)
{
    (void)state;
    check_all(DTYPE_F16, half_by_definition);
    check_all(DTYPE_BF16, bfloat_by_definition);
}

/* Any alignment, many values at once, and nothing outside. */
static void test_unaligned(void **state)
{
    (void)state;
    static const float values[] = {0.0f, 1.5f, -3.25f, 1e30f, 7.0f};
    static const uint16_t halves[] = {0x0000, 0x3e00, 0xc280, 0x7bff, 0x4700};
    static const float half_values[] = {0.0f, 1.5f, -3.25f, 65504.0f, 7.0f};
    char memory[64];
    float out[6];
    for (int shift = 0; shift < 4; shift++) {
        memcpy(memory + shift, values, sizeof(values));
        out[5] = 99;
        dtype_to_f32(out, memory + shift, DTYPE_F32, 5);
        assert_memory_equal(out, values, sizeof(values));
        memcpy(memory + shift, halves, sizeof(halves));
        dtype_to_f32(out, memory + shift, DTYPE_F16, 5);
        assert_memory_equal(out, half_values, sizeof(half_values));
        assert_true(out[5] == 99);
    }
    dtype_to_f32(out, NULL, DTYPE_F32, 0);
}

static void test_names(void **state)
{
    (void)state;
    static const struct {
        const char *name;
        enum dtype dtype;
        int n_bits;
    } table[] = {
        {"F32", DTYPE_F32, 32},   {"F16", DTYPE_F16, 16},   {"BF16", DTYPE_BF16, 16},
        {"I64", DTYPE_OTHER, 64}, {"BOOL", DTYPE_OTHER, 8}, {"F4", DTYPE_OTHER, 4},
        {"f32", DTYPE_OTHER, 0},  {"", DTYPE_OTHER, 0},
    };
    for (size_t i = 0; i < COUNT_OF(table); i++) {
        int n_bits = -1;
        assert_int_equal(dtype_find(table[i].name, &n_bits), table[i].dtype);
        assert_int_equal(n_bits, table[i].n_bits);
    }
    assert_string_equal(dtype_name(DTYPE_BF16), "BF16");
    assert_string_equal(dtype_name(DTYPE_OTHER), "other");
    assert_int_equal(dtype_bytes(DTYPE_F32), 4);
    assert_int_equal(dtype_bytes(DTYPE_F16), 2);
    assert_int_equal(dtype_bytes(DTYPE_OTHER), 0);
}

/* A byte of F8_E4M3 by its definition: (-1)^s 2^(e-7) (1 + m/8), subnormal below e = 1. */
static double f8_by_definition(int byte)
{
    const int sign = byte >> 7, e = byte >> 3 & 15, m = byte & 7;
    const double magnitude = e ? ldexp(1 + m / 8.0, e - 7) : ldexp(m / 8.0, -6);
    return sign ? -magnitude : magnitude;
}

static void test_f8_values(void **state)
{
    (void)state;
    for (int byte = 0; byte < 256; byte++) {
        const uint8_t raw = (uint8_t)byte;
        float value;
        uint8_t back;
        dtype_to_f32(&value, &raw, DTYPE_F8_E4M3, 1);
        dtype_from_f32(&back, DTYPE_F8_E4M3, &value, 1);
        assert_int_equal(back, raw);
        if ((byte & 0x7f) == 0x7f)
            assert_true(isnan(value));
        else
            assert_true(value == (float)f8_by_definition(byte));
    }
}

/* The nearest of all values, ties to the even byte, found by trying them all. */
static uint8_t nearest_f8(float x)
{
    int best = 0;
    for (int byte = 1; byte < 0x7f; byte++) {
        const double old = fabs(f8_by_definition(best) - fabs((double)x));
        const double new = fabs(f8_by_definition(byte) - fabs((double)x));
        if (new < old || (new == old &&byte % 2 == 0))
            best = byte;
    }
    return (uint8_t)(best | (signbit(x) ? 0x80 : 0));
}

static void test_f8_rounding(void **state)
{
    (void)state;
    static const float special[] = {448,       449,       464,      480,      1e30f,
                                    INFINITY,  -INFINITY, 0x1p-10f, 0x1p-11f, 0x1.8p-9f,
                                    0x1.fp-7f, 1.0625f,   1.1875f,  -432.0f};
    uint8_t byte;
    for (size_t i = 0; i < COUNT_OF(special); i++) {
        dtype_from_f32(&byte, DTYPE_F8_E4M3, &special[i], 1);
        assert_int_equal(byte, nearest_f8(special[i]));
    }
    uint32_t bits = 1;
    for (int i = 0; i < 20000; i++) {
        bits = bits * 1664525 + 1013904223;
        const float x = ldexpf((float)(int32_t)bits, (int)(bits >> 8 & 31) - 45);
        dtype_from_f32(&byte, DTYPE_F8_E4M3, &x, 1);
        assert_int_equal(byte, nearest_f8(x));
    }
}

/* Between two neighbours of BF16 the nearer one, ties to even; NaN stays NaN, infinity too. */
static void test_bf16_rounding(void **state)
{
    (void)state;
    for (uint32_t high = 0; high < 0x7f80; high += 7)
        for (uint32_t low = 0; low <= 0x10000; low += 0x1000) {
            const uint32_t bits = (high << 16) + low;
            const uint32_t up = low > 0x8000 || (low == 0x8000 && high % 2);
            float x;
            uint16_t out;
            memcpy(&x, &bits, sizeof(x));
            dtype_from_f32(&out, DTYPE_BF16, &x, 1);
            assert_int_equal(out, high + up);
        }
    const float special[] = {NAN, INFINITY, -0.0f};
    uint16_t out[3];
    dtype_from_f32(out, DTYPE_BF16, special, 3);
    assert_true((out[0] & 0x7fff) > 0x7f80);
    assert_int_equal(out[1], 0x7f80);
    assert_int_equal(out[2], 0x8000);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_halves),      cmocka_unit_test(test_unaligned),
        cmocka_unit_test(test_names),       cmocka_unit_test(test_f8_values),
        cmocka_unit_test(test_f8_rounding), cmocka_unit_test(test_bf16_rounding),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
