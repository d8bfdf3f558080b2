/* fuzz.h - what a fuzz target is: one function that takes any bytes and must survive.
 *
 * The function has libFuzzer's name and meaning, so a target links with libFuzzer, or with
 * driver.c of this directory, which needs no special compiler. A target that finds its
 * promises broken (a result without its data, an error without a text) calls abort.
 */
#ifndef LATTE_TESTS_FUZZ_H
#define LATTE_TESTS_FUZZ_H

#include <stddef.h>
#include <stdint.h>

#include "engine/base/error.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

/* The path of a file of this process, in a directory of its own, that holds data[n]. `name` is
 * the file's name; the text stays valid until the next call. The directory goes at exit. */
const char *fuzz_file(const char *name, const uint8_t *data, size_t n);
const char *fuzz_dir(void);

/* A failure must say what went wrong. */
static inline void fuzz_expect_reason(const struct error *err)
{
    CHECK(err->text[0] != '\0');
}

#endif
