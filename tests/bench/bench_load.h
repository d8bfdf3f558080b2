/* bench_load.h - streams of completions from client threads, and what they see of time.
 *
 * Threads: load_run by one thread; it starts its own and joins them.
 * Memory:  samples are the caller's to release with load_free.
 * Errors:  false, when memory, a thread or time ran out; a request that fails is counted.
 */
#ifndef LATTE_TESTS_BENCH_LOAD_H
#define LATTE_TESTS_BENCH_LOAD_H

#include <stdbool.h>
#include <stddef.h>

enum { LOAD_MAX_CLIENTS = 64 };

struct load {
    const char *base; /* "http://127.0.0.1:8080" */
    int n_clients;    /* threads, 1..LOAD_MAX_CLIENTS; the streams are shared out to them */
    int rounds;       /* requests each stream sends, one after the other */
    int prompt_tokens, max_tokens;
    bool token_ids; /* the prompt as ids below 256, else about so many words */
};

/* Growing array of seconds. */
struct samples {
    double *values;
    size_t n, cap;
};

/* Without memory the sample is lost: that does not stop a measurement. */
void samples_add(struct samples *s, double value);

struct load_counts {
    struct samples ttft, gaps; /* to the first event of a request; between events */
    long n_tokens, n_requests, n_failed;
};

/* Keep n_streams streams busy until all have had their rounds. */
bool load_run(const struct load *load, int n_streams, struct load_counts *out);
void load_free(struct load_counts *counts);

#endif
