/* test_pool.c - every item once, whatever the threads, the loop's size and the items' cost. */
#include "unit.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#include "engine/pool.h"

enum { MOST_ITEMS = 5000 };

struct tally {
    int times[MOST_ITEMS]; /* written by whoever runs the item: no atomics, so that */
    _Atomic int inside[POOL_MAX_THREADS]; /* a missing barrier is a race TSan sees */
    int n_threads, work;
};

static void count_item(void *context, int item, int thread)
{
    struct tally *t = context;
    if (thread < 0 || thread >= t->n_threads || atomic_fetch_add(&t->inside[thread], 1) != 0)
        abort(); /* a thread number out of range, or two items under one number */
    volatile int sink = 0;
    for (int i = 0; i < t->work * (item % 7); i++)
        sink += i;
    t->times[item]++;
    atomic_fetch_sub(&t->inside[thread], 1);
}

static void run_loops(int n_threads, int n_loops, int work)
{
    static struct tally t;
    static const int sizes[] = {0, 1, 2, 3, 7, 64, 1000, MOST_ITEMS};
    struct pool *p;
    assert_int_equal(pool_open(&p, n_threads, NULL), STATUS_OK);
    assert_int_equal(pool_n_threads(p), n_threads);
    for (int loop = 0; loop < n_loops; loop++) {
        int n = sizes[loop % (int)COUNT_OF(sizes)];
        t = (struct tally){.n_threads = n_threads, .work = work};
        pool_run(p, n, count_item, &t);
        for (int i = 0; i < MOST_ITEMS; i++)
            if (t.times[i] != (i < n))
                fail_msg("%d threads, loop %d of %d items: item %d ran %d times", n_threads, loop,
                         n, i, t.times[i]);
    }
    pool_close(p);
}

static void test_every_item_once(void **state)
{
    (void)state;
    static const int threads[] = {1, 2, 3, 8};
    for (size_t i = 0; i < COUNT_OF(threads); i++) {
        run_loops(threads[i], 400, 0);
        run_loops(threads[i], 40, 300);
    }
}

/* Workers fall asleep between loops and are woken again. */
static void test_after_a_pause(void **state)
{
    (void)state;
    static struct tally t;
    struct pool *p;
    assert_int_equal(pool_open(&p, 4, NULL), STATUS_OK);
    for (int loop = 0; loop < 20; loop++) {
        usleep(2000);
        t = (struct tally){.n_threads = 4, .work = 200};
        pool_run(p, 100, count_item, &t);
        for (int i = 0; i < 100; i++)
            assert_int_equal(t.times[i], 1);
    }
    pool_close(p);
}

/* A worker that is put aside while it holds an item: the loop waits for it, and the caller
 * then works alone for a while. Nothing is lost or done twice on the way there and back. */
static void stall_item(void *context, int item, int thread)
{
    if (thread > 0)
        usleep(1000);
    count_item(context, item, thread);
}

static void test_after_a_stall(void **state)
{
    (void)state;
    static struct tally t;
    struct pool *p;
    assert_int_equal(pool_open(&p, 3, NULL), STATUS_OK);
    for (int loop = 0; loop < 300; loop++) {
        t = (struct tally){.n_threads = 3, .work = 200};
        pool_run(p, 50, loop % 100 ? count_item : stall_item, &t);
        for (int i = 0; i < 50; i++)
            assert_int_equal(t.times[i], 1);
    }
    pool_close(p);
}

static void test_bad_sizes(void **state)
{
    (void)state;
    static const int sizes[] = {0, -1, POOL_MAX_THREADS + 1};
    struct pool *p = NULL;
    struct error err;
    for (size_t i = 0; i < COUNT_OF(sizes); i++) {
        assert_int_equal(pool_open(&p, sizes[i], &err), STATUS_INVALID);
        assert_null(p);
    }
    pool_close(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_item_once),
        cmocka_unit_test(test_after_a_pause),
        cmocka_unit_test(test_after_a_stall),
        cmocka_unit_test(test_bad_sizes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
