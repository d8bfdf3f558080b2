/* workers.c - see workers.h */
#include "server/workers.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>

#include "engine/base/thread.h"

struct work_list {
    struct work_item *first, **end; /* end: where the next item is linked */
};

struct workers {
    pthread_mutex_t lock; /* guards waiting, ready and closing */
    pthread_cond_t work;  /* there is a waiting item, or closing */
    struct work_list waiting, ready;
    bool closing;
    void (*notify)(void *context);
    void *context;
    int n_threads;       /* that were started */
    pthread_t threads[]; /* [n_threads] */
};

static void list_init(struct work_list *list)
{
    list->first = NULL;
    list->end = &list->first;
}

static void list_add(struct work_list *list, struct work_item *item)
{
    item->next = NULL;
    *list->end = item;
    list->end = &item->next;
}

static struct work_item *list_take(struct work_list *list)
{
    struct work_item *item = list->first;
    if (!item)
        return NULL;
    list->first = item->next;
    if (!list->first)
        list->end = &list->first;
    return item;
}

/* The next item, or NULL when closing and nothing is left. */
static struct work_item *await_work(struct workers *w)
{
    pthread_mutex_lock(&w->lock);
    while (!w->waiting.first && !w->closing)
        pthread_cond_wait(&w->work, &w->lock);
    struct work_item *item = list_take(&w->waiting);
    pthread_mutex_unlock(&w->lock);
    return item;
}

static void *work(void *context)
{
    struct workers *w = context;
    for (struct work_item *item; (item = await_work(w));) {
        item->run(item);
        pthread_mutex_lock(&w->lock);
        list_add(&w->ready, item);
        pthread_mutex_unlock(&w->lock);
        if (w->notify)
            w->notify(w->context);
    }
    return NULL;
}

enum status workers_open(struct workers **out, int n_threads, void (*notify)(void *context),
                         void *context, struct error *err)
{
    CHECK(n_threads > 0);
    struct workers *w = calloc(1, sizeof(*w) + (size_t)n_threads * sizeof(pthread_t));
    if (!w)
        return fail(err, STATUS_NOMEM, "workers: out of memory for %d threads", n_threads);
    pthread_mutex_init(&w->lock, NULL);
    pthread_cond_init(&w->work, NULL);
    list_init(&w->waiting);
    list_init(&w->ready);
    w->notify = notify;
    w->context = context;
    for (; w->n_threads < n_threads; w->n_threads++) {
        if (thread_start(&w->threads[w->n_threads], "latte-worker", work, w)) {
            fail(err, STATUS_NOMEM, "workers: only %d of %d threads could be started", w->n_threads,
                 n_threads);
            workers_close(w);
            return STATUS_NOMEM;
        }
    }
    *out = w;
    return STATUS_OK;
}

void workers_submit(struct workers *w, struct work_item *item)
{
    pthread_mutex_lock(&w->lock);
    CHECK(!w->closing);
    list_add(&w->waiting, item);
    pthread_cond_signal(&w->work);
    pthread_mutex_unlock(&w->lock);
}

void workers_reap(struct workers *w)
{
    pthread_mutex_lock(&w->lock);
    struct work_item *item = w->ready.first;
    list_init(&w->ready);
    pthread_mutex_unlock(&w->lock);
    for (struct work_item *next; item; item = next) {
        next = item->next; /* done may free the item */
        item->done(item);
    }
}

void workers_close(struct workers *w)
{
    if (!w)
        return;
    pthread_mutex_lock(&w->lock);
    w->closing = true;
    pthread_cond_broadcast(&w->work);
    pthread_mutex_unlock(&w->lock);
    for (int i = 0; i < w->n_threads; i++)
        pthread_join(w->threads[i], NULL);
    workers_reap(w);
    pthread_cond_destroy(&w->work);
    pthread_mutex_destroy(&w->lock);
    free(w);
}
