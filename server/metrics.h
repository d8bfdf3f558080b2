/* metrics.h - counters, gauges and histograms in Prometheus' text format.
 *
 * All metrics are named in the .c's one table with help texts, by the conventions of the
 * field: prefix latte_, base units (seconds, bytes), _total for counters. As elsewhere in the
 * field, each choice of a request (n, best_of, many prompts) is observed as a generation of
 * its own; one that is cut short counts by its end, and is not observed.
 *
 * Threads: any (atomics). Memory: static. Errors: none.
 */
#ifndef LATTE_SERVER_METRICS_H
#define LATTE_SERVER_METRICS_H

#include <stdint.h>

#include "engine/base/bytes.h"
#include "engine/engine.h"
#include "engine/journal.h"
#include "engine/session.h"

enum metric_counter {
    METRIC_PROMPT_TOKENS,         /* latte_prompt_tokens_total: tokens of admitted prompts */
    METRIC_GENERATION_TOKENS,     /* latte_generation_tokens_total: of all choices */
    METRIC_UNKNOWN_FIELDS,        /* latte_unknown_request_fields_total */
    METRIC_CLIENT_DISCONNECTS,    /* latte_client_disconnects_total */
    METRIC_QUEUE_REJECTIONS,      /* latte_queue_rejections_total */
    METRIC_QUOTA_REJECTIONS,      /* latte_quota_rejections_total */
    METRIC_TLS_FAILURES,          /* latte_tls_failures_total: connections without a handshake */
    METRIC_CONNECTIONS,           /* latte_connections_total: accepted */
    METRIC_TURNS,                 /* latte_session_turns_total: committed */
    METRIC_TURNS_LOST,            /* latte_session_turns_abandoned_total: failed or broken off */
    METRIC_SESSIONS_EXPIRED,      /* latte_sessions_expired_total */
    METRIC_STREAMS_RESUMED,       /* latte_streams_resumed_total */
    METRIC_STREAMS_EVICTED,       /* latte_streams_evicted_total */
    METRIC_STREAM_EVENTS_DROPPED, /* latte_stream_events_dropped_total */
    METRIC_IDEMPOTENT_REPLAYS,    /* latte_idempotent_replays_total */
    METRIC_OUTCOMES_EVICTED,      /* latte_idempotency_evicted_total */
    METRIC_RESPONSES_EXPIRED,     /* latte_responses_expired_total */
    METRIC_RESPONSES_DROPPED,     /* latte_responses_dropped_total: for a limit */
    METRIC_PREFIX_HITS,   /* latte_prefix_hits_total: prompts that began from a stored state */
    METRIC_PREFIX_TOKENS, /* latte_prefix_cached_tokens_total: that those had seen */
    METRIC_COUNTER_COUNT
};

/* Ages of states, in tokens: under 1,000, 10,000, 100,000, 1,000,000, and beyond. */
enum { METRIC_POSITIONS = 5 };

enum metric_histogram {
    METRIC_TIME_TO_FIRST_TOKEN, /* latte_time_to_first_token_seconds */
    METRIC_TIME_PER_TOKEN,      /* latte_time_per_output_token_seconds: mean over a choice */
    METRIC_INTER_TOKEN,         /* latte_inter_token_latency_seconds: each gap by itself */
    METRIC_E2E_LATENCY,         /* latte_e2e_request_latency_seconds */
    METRIC_QUEUE_TIME,          /* latte_request_queue_time_seconds */
    METRIC_PROMPT_LENGTH,       /* latte_request_prompt_tokens */
    METRIC_OUTPUT_LENGTH,       /* latte_request_generation_tokens */
    METRIC_TURN_FIRST_TOKEN,    /* latte_turn_first_token_seconds{position}: see below */
    METRIC_TURN_FIRST_TOKEN_END = METRIC_TURN_FIRST_TOKEN + METRIC_POSITIONS - 1,
    METRIC_HISTOGRAM_COUNT
};

void metrics_add(enum metric_counter counter, uint64_t n);
void metrics_observe(enum metric_histogram histogram, double value);
/* From the arrival of a request that goes on from a state of so many tokens to its first token. */
void metrics_observe_turn(uint64_t position, double seconds);

/* latte_http_requests_total{method, route, code}: route is the pattern of routes.c ("other"
 * for what matched none); at most a fixed number of series. */
void metrics_count_request(const char *method, const char *route, int code);

/* latte_http_request_duration_seconds{route}: from a request's header to the end of its reply,
 * which for a stream is its last event. */
void metrics_observe_request(const char *route, double seconds);

/* latte_request_success_total{finish_reason}; stop, length, abort and error are there from the
 * start, so that the first one of a kind is an increase. */
void metrics_count_finish(const char *finish_reason);

/* What the sessions hold now, and what their store has done. */
struct metrics_sessions {
    int n_responses;
    struct session_counts sessions;
    struct image_counts images;
    bool has_store;
    bool store_is_away; /* does not answer */
    struct journal_counts journal;
    int n_prefixes; /* states after beginnings of prompts, which are not among images */
    size_t prefix_bytes;
};

/* What is kept for clients that come back. */
struct metrics_kept {
    int n_streams;
    size_t stream_bytes;
    int n_waiting;  /* requests, for their session's turn */
    int n_outcomes; /* of requests with an Idempotency-Key */
    size_t outcome_bytes;
};

/* The server as a whole. The limits are those of the options: what a gauge is to be compared with.
 */
struct metrics_service {
    bool is_ready; /* /health/ready answers 200 */
    int n_connections;
    int64_t max_connections, max_queue, max_sessions;
    size_t max_state_bytes; /* of all states on the host */
};

/* Everything in the text exposition format, with the gauges of the engine and the sessions (NULL
 * while loading). */
void metrics_write(struct bytes *out, const struct engine *engine,
                   const struct metrics_sessions *sessions, const struct metrics_kept *kept,
                   const struct metrics_service *service);

#endif
