/* fail_alloc.h - an allocator that fails the n-th call, to walk every way out of a constructor.
 *
 * Linking fail_alloc.c puts malloc, calloc, realloc, the aligned ones and free of this program
 * and of its shared libraries in front of libc's. They only count and pass on until armed.
 * Under the sanitizers, which need malloc themselves, nothing is in front and a walk is one
 * plain call.
 *
 * Threads: counts and failures concern the arming thread alone.
 */
#ifndef LATTE_TESTS_FAIL_ALLOC_H
#define LATTE_TESTS_FAIL_ALLOC_H

#include <stdbool.h>

#include "engine/base/error.h"

/* Whether this build can make allocations fail. */
bool fail_alloc_works(void);

/* Make the n-th allocation from now on fail (n is 1 or more; 0: count only), and with `onwards`
 * all that follow it. */
void fail_alloc_start(long n, bool onwards);

/* Back to normal. Returns the allocations asked for since start; *balance (may be NULL) is
 * blocks taken minus blocks freed, 0 when nothing leaked. */
long fail_alloc_stop(long *balance);

/* Count the allocations of all threads but the caller's, until the next call; returns how many
 * there were since the last one. For threads that promise to allocate nothing. */
long fail_alloc_count_others(void);

/* Call attempt with its first, second, ... allocation failing, once alone and once with all
 * that follow, until it runs through. The test fails when a call that ran short returns
 * anything but OK or NOMEM, leaves err empty, or leaks. attempt undoes what it did when it
 * succeeded. */
void fail_alloc_walk(enum status (*attempt)(void *context, struct error *err), void *context);

#endif
