/* test_workers.c - every item is run once on a worker and done once by the reaper. */
#include "tests/unit/unit.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>

#include "server/workers.h"

enum { N_ITEMS = 2000 };

struct item {
    struct work_item work; /* first: an item is its work */
    _Atomic int n_run;
    int n_done;
    pthread_t ran_on;
};

static _Atomic int n_notified;
static struct item items[N_ITEMS];

static void notify(void *context)
{
    assert_ptr_equal(context, items);
    n_notified++;
}

static void run(struct work_item *work)
{
    struct item *item = (struct item *)work;
    item->ran_on = pthread_self();
    item->n_run++;
}

static void done(struct work_item *work)
{
    struct item *item = (struct item *)work;
    assert_int_equal(item->n_run, 1); /* run comes before done */
    assert_false(pthread_equal(item->ran_on, pthread_self()));
    item->n_done++;
}

static int reset(void **state)
{
    (void)state;
    n_notified = 0;
    for (int i = 0; i < N_ITEMS; i++) {
        items[i].work = (struct work_item){.run = run, .done = done};
        items[i].n_run = items[i].n_done = 0;
    }
    return 0;
}

static void assert_all_done(void)
{
    for (int i = 0; i < N_ITEMS; i++) {
        assert_int_equal(items[i].n_run, 1);
        assert_int_equal(items[i].n_done, 1);
    }
}

static void test_reap(void **state)
{
    (void)state;
    static const int threads[] = {1, 3, 16};
    for (size_t t = 0; t < COUNT_OF(threads); t++) {
        reset(NULL);
        struct workers *w = NULL;
        struct error err;
        assert_int_equal(workers_open(&w, threads[t], notify, items, &err), STATUS_OK);
        for (int i = 0; i < N_ITEMS; i++) {
            workers_submit(w, &items[i].work);
            if (i % 7 == 0)
                workers_reap(w);
        }
        while (n_notified < N_ITEMS)
            sched_yield();
        workers_reap(w);
        assert_all_done();
        workers_close(w);
        assert_all_done();
    }
}

/* Closing finishes what was submitted. */
static void test_close(void **state)
{
    (void)state;
    struct workers *w = NULL;
    struct error err;
    assert_int_equal(workers_open(&w, 2, notify, items, &err), STATUS_OK);
    for (int i = 0; i < N_ITEMS; i++)
        workers_submit(w, &items[i].work);
    workers_close(w);
    assert_all_done();
    assert_int_equal(n_notified, N_ITEMS);
    workers_close(NULL);
}

static struct workers *chain_workers;

/* done may free its item and submit another. */
static void done_and_submit(struct work_item *work)
{
    struct item *item = (struct item *)work;
    done(work);
    if (item + 1 < items + 50)
        workers_submit(chain_workers, &(item + 1)->work);
}

static void test_submit_from_done(void **state)
{
    (void)state;
    struct error err;
    for (int i = 0; i < 50; i++)
        items[i].work.done = done_and_submit;
    assert_int_equal(workers_open(&chain_workers, 2, notify, items, &err), STATUS_OK);
    workers_submit(chain_workers, &items[0].work);
    while (items[49].n_done == 0) {
        workers_reap(chain_workers);
        sched_yield();
    }
    workers_close(chain_workers);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(test_reap, reset),
        cmocka_unit_test_setup(test_close, reset),
        cmocka_unit_test_setup(test_submit_from_done, reset),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
