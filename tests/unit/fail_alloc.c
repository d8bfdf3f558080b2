/* fail_alloc.c - see fail_alloc.h */
#include "tests/unit/unit.h"

#include "tests/unit/fail_alloc.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>

#ifndef __has_feature
#define __has_feature(name) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) ||                               \
    __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define INTERPOSED 0
#else
#define INTERPOSED 1
#endif

static __thread struct {
    bool armed, onwards;
    long fail_at, n_calls, balance;
} watch;

/* The thread whose allocations do not count as another's; NULL before the first count. */
static __thread char my_place;
static char *_Atomic counting_thread;
static atomic_long n_others;

long fail_alloc_count_others(void)
{
    atomic_store(&counting_thread, &my_place);
    return atomic_exchange(&n_others, 0);
}

bool fail_alloc_works(void)
{
    return INTERPOSED;
}

void fail_alloc_start(long n, bool onwards)
{
    watch.fail_at = n;
    watch.onwards = onwards;
    watch.n_calls = watch.balance = 0;
    watch.armed = true;
}

long fail_alloc_stop(long *balance)
{
    watch.armed = false;
    if (balance)
        *balance = watch.balance;
    return watch.n_calls;
}

#if INTERPOSED

/* The names under which glibc offers its allocator to those who stand in front of it. */
void *__libc_malloc(size_t n);
void *__libc_calloc(size_t count, size_t size);
void *__libc_realloc(void *block, size_t n);
void *__libc_memalign(size_t alignment, size_t n);
void __libc_free(void *block);

static bool fails(void)
{
    char *counting = atomic_load(&counting_thread);
    if (counting && counting != &my_place)
        atomic_fetch_add(&n_others, 1);
    if (!watch.armed)
        return false;
    watch.n_calls++;
    bool now = watch.fail_at &&
               (watch.onwards ? watch.n_calls >= watch.fail_at : watch.n_calls == watch.fail_at);
    if (now)
        errno = ENOMEM;
    return now;
}

static void *counted(void *block)
{
    if (block && watch.armed)
        watch.balance++;
    return block;
}

void *malloc(size_t n)
{
    return fails() ? NULL : counted(__libc_malloc(n));
}

void *calloc(size_t count, size_t size)
{
    return fails() ? NULL : counted(__libc_calloc(count, size));
}

void *realloc(void *block, size_t n)
{
    if (fails())
        return NULL;
    return block ? __libc_realloc(block, n) : counted(__libc_realloc(NULL, n));
}

void *aligned_alloc(size_t alignment, size_t n)
{
    return fails() ? NULL : counted(__libc_memalign(alignment, n));
}

int posix_memalign(void **out, size_t alignment, size_t n)
{
    void *block = aligned_alloc(alignment, n);
    if (!block)
        return ENOMEM;
    *out = block;
    return 0;
}

void free(void *block)
{
    if (block && watch.armed)
        watch.balance--;
    __libc_free(block);
}

#endif

/* One call with the n-th allocation failing; returns whether it got that far. */
static bool attempt_once(enum status (*attempt)(void *, struct error *), void *context, long n,
                         bool onwards)
{
    struct error err = {0};
    long balance;
    fail_alloc_start(n, onwards);
    enum status st = attempt(context, &err);
    bool reached = fail_alloc_stop(&balance) >= n;
    if (st && (!reached || st != STATUS_NOMEM))
        fail_msg("allocation %ld failing: %s (%s)", n, status_name(st), err.text);
    if (st && !err.text[0])
        fail_msg("allocation %ld failing: no error text", n);
    if (balance)
        fail_msg("allocation %ld failing: %ld blocks leaked", n, balance);
    return reached;
}

void fail_alloc_walk(enum status (*attempt)(void *context, struct error *err), void *context)
{
    struct error err = {0};
    if (attempt(context, &err)) /* also lets libraries set up what they keep */
        fail_msg("with all allocations: %s", err.text);
    for (int onwards = 0; INTERPOSED && onwards < 2; onwards++)
        for (long n = 1; attempt_once(attempt, context, n, onwards); n++)
            ;
}
