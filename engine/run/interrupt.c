/* interrupt.c - see interrupt.h */
#include "engine/run/interrupt.h"

#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

static struct {
    pthread_mutex_t lock; /* guards all that follows */
    struct job *job;      /* borrowed; NULL before and between jobs */
    bool interrupted, is_awaited;
    bool in_chat;
    const char *hint; /* in a chat that is typed, else NULL */
} current = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* The handler may run on any thread, also one that a library started before main and whose
 * signal mask is its own; all it does is post. */
static sem_t signals;
static volatile sig_atomic_t terminated;

static void post_signal(int number)
{
    if (number == SIGTERM)
        terminated = 1;
    sem_post(&signals);
}

/* With the lock held: what a signal does. */
static void act(void)
{
    bool ends = current.in_chat ? terminated || (!current.job && !current.hint)
                                : current.interrupted || !(current.job || current.is_awaited);
    if (ends)
        _exit(INTERRUPTED_EXIT);
    if (current.job || current.is_awaited)
        current.interrupted = true;
    else if (write(STDERR_FILENO, current.hint, strlen(current.hint)) < 0)
        _exit(INTERRUPTED_EXIT); /* nobody is there */
    if (current.job)
        job_cancel(current.job);
}

static void *wait_for_signals(void *context)
{
    for (;;) {
        if (sem_wait(&signals)) /* EINTR: the handler ran on this thread */
            continue;
        pthread_mutex_lock(&current.lock);
        act();
        pthread_mutex_unlock(&current.lock);
    }
    return context;
}

enum status interrupt_catch(struct error *err)
{
    struct sigaction action = {.sa_handler = post_signal, .sa_flags = SA_RESTART};
    pthread_t thread;
    sem_init(&signals, 0, 0);
    int failed = pthread_create(&thread, NULL, wait_for_signals, NULL);
    if (failed)
        return fail(err, STATUS_NOMEM, "signal thread: %s", strerror(failed));
    pthread_detach(thread);
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    return STATUS_OK;
}

void interrupt_set_job(struct job *job)
{
    pthread_mutex_lock(&current.lock);
    current.job = job;
    pthread_mutex_unlock(&current.lock);
}

void interrupt_await(void)
{
    pthread_mutex_lock(&current.lock);
    current.is_awaited = true;
    pthread_mutex_unlock(&current.lock);
}

void interrupt_in_chat(const char *hint)
{
    pthread_mutex_lock(&current.lock);
    current.in_chat = true;
    current.hint = hint;
    pthread_mutex_unlock(&current.lock);
}

bool interrupt_happened(void)
{
    pthread_mutex_lock(&current.lock);
    bool interrupted = current.interrupted;
    pthread_mutex_unlock(&current.lock);
    return interrupted;
}

void interrupt_forget(void)
{
    pthread_mutex_lock(&current.lock);
    current.interrupted = false;
    pthread_mutex_unlock(&current.lock);
}
