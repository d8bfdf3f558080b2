/* bench_traffic.h - latte-bench load: requests to any OpenAI-compatible server at a rate or a
 * concurrency, and what a client sees of them. README.md beside this file defines the figures.
 *
 *   bench_traffic.c         options, the order of things
 *   bench_traffic_prompt.c  when requests come, and what they say
 *   bench_traffic_send.c    sending them, timing what comes back
 *   bench_traffic_report.c  table and JSON
 *
 * Threads: one.
 * Memory:  a run's records are freed by traffic_free; settings borrow from argv.
 * Errors:  false, after a sentence on stderr. A request that fails is a record.
 */
#ifndef LATTE_TESTS_BENCH_TRAFFIC_H
#define LATTE_TESTS_BENCH_TRAFFIC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/base/bytes.h"
#include "tests/bench/bench_load.h"

enum { TRAFFIC_MAX_CONCURRENCY = 16384, TRAFFIC_REASON_BYTES = 64, TRAFFIC_MAX_REASONS = 16 };

struct traffic_range {
    int low, high; /* uniform between both, inclusive */
};

struct traffic_settings {
    const char *url, *model, *cacert;
    const char *key;         /* of the API, or NULL */
    const char *prompt_file; /* one prompt a line, or NULL for random words */
    const char *json_path;   /* "-": standard output; or NULL */
    bool chat, ignore_eos;
    double rate;       /* requests a second, 0 for a closed loop */
    double burstiness; /* 1: Poisson; larger is steadier; INFINITY: constant */
    int concurrency;   /* of a closed loop */
    long n_requests;   /* 0: as many as the duration allows */
    double duration_s; /* 0: until all are sent */
    double timeout_s;
    int n_warmup;
    struct traffic_range input, output; /* tokens (words, for random ones) */
    double temperature;                 /* negative: the server's default */
    uint64_t seed;
    double slo_ttft_ms, slo_tpot_ms, slo_e2e_ms; /* INFINITY: none */
};

/* bench_traffic_prompt.c */
struct traffic_prompts {
    char *text;   /* the file, its line ends as zeros */
    char **lines; /* [n] */
    size_t n;
};
bool traffic_prompts_open(struct traffic_prompts *p, const char *path);
void traffic_prompts_free(struct traffic_prompts *p);
uint64_t traffic_random(uint64_t *state); /* 64 uniform bits */
/* Seconds from one request to the next: gamma distributed with mean 1 / rate and shape
 * burstiness, so that 1 is a Poisson process. */
double traffic_gap(uint64_t *state, double rate, double burstiness);
/* The JSON of one request. */
void traffic_body(const struct traffic_settings *s, const struct traffic_prompts *p,
                  uint64_t *state, struct bytes *out);

/* bench_traffic_send.c */
struct traffic_record {
    double started, first, last; /* bench_now; first and last event with text, 0 before one */
    long prompt_tokens, output_tokens;
    long n_events;
    bool has_usage;
    int reason; /* why it failed: index of traffic_run.reasons plus 1; 0 when it did not */
};
struct traffic_run {
    struct traffic_record *records; /* [n] in the order they ended */
    size_t n, cap;
    size_t n_sent, n_completed;
    struct samples gaps; /* seconds between events with text, of completed requests */
    double began, ended; /* bench_now */
    double max_lag_s;    /* by which a request left later than its time had come */
    struct {
        char text[TRAFFIC_REASON_BYTES]; /* "HTTP 500", "timeout", "stream cut", ... */
        long n;
    } reasons[TRAFFIC_MAX_REASONS];
    int n_reasons;
};
/* Send all; false when the warm-up failed or memory ran out. */
bool traffic_send(const struct traffic_settings *s, const struct traffic_prompts *p,
                  struct traffic_run *run);
void traffic_free(struct traffic_run *run);
/* The first model that the server lists, in name[n]. */
bool traffic_find_model(const struct traffic_settings *s, char *name, size_t n);

/* bench_traffic_report.c */
void traffic_table(const struct traffic_settings *s, const struct traffic_run *run);
bool traffic_json(const struct traffic_settings *s, const struct traffic_run *run);
/* Over the last line of a terminal on stderr; nothing elsewhere. */
void traffic_progress(const struct traffic_settings *s, const struct traffic_run *run,
                      size_t n_open, bool is_last);

#endif
