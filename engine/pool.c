/* pool.c - see pool.h
 *
 * One 64-bit word says what there is to take: the loop's number above, the items left below.
 * Taking an item is a compare-and-swap on it, so a worker that wakes up late can only take an
 * item of the loop that is running now, never one of a loop it once saw.
 */
#include "engine/pool.h"

#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "engine/base/thread.h"

/* About 20 microseconds: longer than the gap between two ops of a step, shorter than what
 * another process would miss. */
enum { N_SPINS = 600 };

/* When another process has put aside a worker that holds an item, the loop waits for as long
 * as that process may run. The caller then works alone for a while, in proportion to what it
 * lost, instead of losing as much in every loop. */
enum { STALL_NS = 300000, ALONE_FACTOR = 8 };

struct pool {
    _Alignas(64) _Atomic uint64_t left; /* loop number << 32 | items not yet taken */
    _Alignas(64) _Atomic uint32_t n_done;
    _Atomic uint32_t caller_sleeps;
    _Alignas(64) _Atomic uint32_t epoch; /* changes with every loop; workers sleep on it */
    _Atomic uint32_t n_sleeping;
    _Atomic bool stop;

    /* The running loop: written before left, read by whoever has taken an item. */
    pool_fn *fn;
    void *context;
    uint32_t n_items;

    int64_t alone_until_ns; /* the caller's own; 0: not alone */
    int n_threads;
    int n_started;
    struct worker *workers; /* [n_threads - 1], owned */
};

struct worker {
    struct pool *pool;
    pthread_t thread;
    int number;
};

static void pause_cpu(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

static void futex_wait(_Atomic uint32_t *word, uint32_t expected)
{
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, expected, NULL, NULL, 0);
}

static void futex_wake(_Atomic uint32_t *word, int n)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, n, NULL, NULL, 0);
}

/* Take an item of the running loop; false when none is left. */
static bool take_item(struct pool *p, uint32_t *item)
{
    uint64_t left = atomic_load_explicit(&p->left, memory_order_acquire);
    do {
        if ((uint32_t)left == 0)
            return false;
    } while (!atomic_compare_exchange_weak_explicit(&p->left, &left, left - 1, memory_order_acquire,
                                                    memory_order_acquire));
    *item = p->n_items - (uint32_t)left;
    return true;
}

/* Work until nothing is left to take. */
static void work(struct pool *p, int thread)
{
    uint32_t item;
    while (take_item(p, &item)) {
        uint32_t n_items = p->n_items; /* before the count: afterwards the loop may be over */
        p->fn(p->context, (int)item, thread);
        uint32_t done = atomic_fetch_add(&p->n_done, 1) + 1;
        if (done == n_items && atomic_load(&p->caller_sleeps))
            futex_wake(&p->n_done, 1);
    }
}

static bool work_in_sight(struct pool *p, uint32_t epoch)
{
    return atomic_load(&p->epoch) != epoch || atomic_load(&p->stop);
}

static void wait_for_loop(struct pool *p, uint32_t epoch)
{
    for (int i = 0; i < N_SPINS; i++) {
        if (work_in_sight(p, epoch))
            return;
        pause_cpu();
    }
    /* Announce first, look again, then sleep: pool_run does it the other way round. */
    atomic_fetch_add(&p->n_sleeping, 1);
    while (!work_in_sight(p, epoch))
        futex_wait(&p->epoch, epoch);
    atomic_fetch_sub(&p->n_sleeping, 1);
}

static void *worker_main(void *argument)
{
    struct worker *w = argument;
    struct pool *p = w->pool;
    sigset_t all; /* signals are for the thread that started the process */
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, NULL);
    while (!atomic_load(&p->stop)) {
        uint32_t epoch = atomic_load(&p->epoch);
        work(p, w->number);
        wait_for_loop(p, epoch);
    }
    return NULL;
}

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void note_wait(struct pool *p, int64_t since_ns)
{
    int64_t now = now_ns(), lost = now - since_ns;
    if (lost > STALL_NS)
        p->alone_until_ns = now + lost * ALONE_FACTOR / (p->n_threads - 1);
}

/* Is the caller still to work alone? */
static bool is_alone(struct pool *p)
{
    if (p->alone_until_ns && now_ns() >= p->alone_until_ns)
        p->alone_until_ns = 0;
    return p->alone_until_ns != 0;
}

static void wait_for_items(struct pool *p, uint32_t n_items)
{
    for (int i = 0; i < N_SPINS; i++) {
        if (atomic_load(&p->n_done) == n_items)
            return;
        pause_cpu();
    }
    int64_t since_ns = now_ns();
    atomic_store(&p->caller_sleeps, 1);
    for (;;) {
        uint32_t done = atomic_load(&p->n_done);
        if (done == n_items)
            break;
        futex_wait(&p->n_done, done);
    }
    atomic_store(&p->caller_sleeps, 0);
    note_wait(p, since_ns);
}

static void wake_workers(struct pool *p, int n_wanted)
{
    atomic_fetch_add(&p->epoch, 1);
    if (atomic_load(&p->n_sleeping))
        futex_wake(&p->epoch, n_wanted);
}

void pool_run(struct pool *p, int n_items, pool_fn *fn, void *context)
{
    if (n_items <= 1 || p->n_threads == 1 || is_alone(p)) {
        for (int i = 0; i < n_items; i++)
            fn(context, i, 0);
        return;
    }
    p->fn = fn;
    p->context = context;
    p->n_items = (uint32_t)n_items;
    atomic_store(&p->n_done, 0);
    uint64_t loop = (atomic_load(&p->left) >> 32) + 1;
    atomic_store(&p->left, loop << 32 | (uint32_t)n_items);
    wake_workers(p, n_items - 1);
    work(p, 0);
    wait_for_items(p, (uint32_t)n_items);
}

int pool_n_threads(const struct pool *p)
{
    return p->n_threads;
}

static enum status start_workers(struct pool *p, struct error *err)
{
    for (int i = 0; i < p->n_threads - 1; i++) {
        p->workers[i] = (struct worker){.pool = p, .number = i + 1};
        if (thread_start(&p->workers[i].thread, "latte-compute", worker_main, &p->workers[i]))
            return fail(err, STATUS_INTERNAL, "thread pool: cannot start thread %d of %d", i + 2,
                        p->n_threads);
        p->n_started++;
    }
    return STATUS_OK;
}

enum status pool_open(struct pool **out, int n_threads, struct error *err)
{
    if (n_threads < 1 || n_threads > POOL_MAX_THREADS)
        return fail(err, STATUS_INVALID, "thread pool: expected 1 to %d threads, found %d",
                    POOL_MAX_THREADS, n_threads);
    struct pool *p = aligned_alloc(64, (sizeof(*p) + 63) / 64 * 64);
    if (!p)
        return fail(err, STATUS_NOMEM, "thread pool: out of memory");
    *p = (struct pool){.n_threads = n_threads};
    p->workers = calloc((size_t)n_threads, sizeof(*p->workers));
    enum status st =
        p->workers ? start_workers(p, err) : fail(err, STATUS_NOMEM, "thread pool: out of memory");
    if (st) {
        pool_close(p);
        return st;
    }
    *out = p;
    return STATUS_OK;
}

void pool_close(struct pool *p)
{
    if (!p)
        return;
    atomic_store(&p->stop, true);
    wake_workers(p, INT_MAX);
    for (int i = 0; i < p->n_started; i++)
        pthread_join(p->workers[i].thread, NULL);
    free(p->workers);
    free(p);
}
