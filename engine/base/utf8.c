/* utf8.c - one table-free decoder; everything else is built on utf8_next. */
#include "engine/base/utf8.h"

/* Length that a lead byte announces, 0 for a byte that cannot lead; sets the range allowed for
 * the second byte, which is where overlong forms, surrogates and values past U+10FFFF show. */
static int lead_length(unsigned char lead, unsigned char *low, unsigned char *high)
{
    *low = 0x80;
    *high = 0xBF;
    if (lead < 0x80)
        return 1;
    if (lead < 0xC2)
        return 0;
    if (lead < 0xE0)
        return 2;
    if (lead < 0xF0) {
        if (lead == 0xE0)
            *low = 0xA0;
        if (lead == 0xED)
            *high = 0x9F;
        return 3;
    }
    if (lead > 0xF4)
        return 0;
    if (lead == 0xF0)
        *low = 0x90;
    if (lead == 0xF4)
        *high = 0x8F;
    return 4;
}

int utf8_next(const char *text, size_t n)
{
    const unsigned char *s = (const unsigned char *)text;
    unsigned char low, high;
    int length = lead_length(s[0], &low, &high);
    if (length == 0)
        return -1;
    for (int i = 1; i < length; i++) {
        if ((size_t)i >= n)
            return 0;
        if (s[i] < low || s[i] > high)
            return -i;
        low = 0x80;
        high = 0xBF;
    }
    return length;
}

int utf8_decode(const char *text, size_t n, uint32_t *code_point)
{
    const unsigned char *s = (const unsigned char *)text;
    int length = n ? utf8_next(text, n) : 0;
    if (length <= 0)
        return 0;
    uint32_t value = length == 1 ? s[0] : s[0] & (0xFFu >> (length + 1));
    for (int i = 1; i < length; i++)
        value = value << 6 | (s[i] & 0x3F);
    *code_point = value;
    return length;
}

int utf8_encode(uint32_t code_point, char *out)
{
    if (code_point < 0x80) {
        out[0] = (char)code_point;
        return 1;
    }
    int length = code_point < 0x800 ? 2 : code_point < 0x10000 ? 3 : 4;
    for (int i = length - 1; i > 0; i--) {
        out[i] = (char)(0x80 | (code_point & 0x3F));
        code_point >>= 6;
    }
    out[0] = (char)(0xF00u >> length | code_point);
    return length;
}

size_t utf8_valid_prefix(const char *text, size_t n)
{
    size_t at = 0;
    while (at < n) {
        if ((unsigned char)text[at] < 0x80) {
            at++;
            continue;
        }
        int length = utf8_next(text + at, n - at);
        if (length <= 0)
            break;
        at += (size_t)length;
    }
    return at;
}
