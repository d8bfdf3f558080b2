/* thread.c - see thread.h */
#include "engine/base/thread.h"

#include <string.h>

#include "engine/base/error.h"

int thread_start(pthread_t *out, const char *name, void *(*run)(void *context), void *context)
{
    CHECK(strlen(name) < THREAD_NAME_BYTES);
    const int failed = pthread_create(out, NULL, run, context);
    if (!failed)
        (void)pthread_setname_np(*out, name); /* a name less is no failure */
    return failed;
}
