/* unit.h - what every unit test includes first: cmocka with its prerequisites.
 *
 * cmocka defines a macro fail(), which would hide fail() of engine/base/error.h; fail_msg
 * is given again without it.
 */
#ifndef LATTE_TESTS_UNIT_H
#define LATTE_TESTS_UNIT_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#undef fail
#undef fail_msg

/* End the test with a printf-formatted sentence. */
#define fail_msg(...)                                                                              \
    do {                                                                                           \
        print_error("ERROR: " __VA_ARGS__);                                                        \
        print_error("\n");                                                                         \
        _fail(__FILE__, __LINE__);                                                                 \
    } while (0)

/* A repeatable sequence (xorshift32); *state starts as anything but 0. */
static inline uint32_t test_random(uint32_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 17;
    *state ^= *state << 5;
    return *state;
}

#define COUNT_OF(array) (sizeof(array) / sizeof(*(array)))

#endif
