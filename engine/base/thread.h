/* thread.h - threads with names, which top -H, ps -T and debuggers show.
 *
 * Threads: any.
 * Errors:  as pthread_create's number; 0 for none.
 */
#ifndef LATTE_ENGINE_BASE_THREAD_H
#define LATTE_ENGINE_BASE_THREAD_H

#include <pthread.h>

enum { THREAD_NAME_BYTES = 16 }; /* the kernel's limit, with the zero */

/* name: for people, "latte-io". */
int thread_start(pthread_t *out, const char *name, void *(*run)(void *context), void *context);

#endif
