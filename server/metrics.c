/* metrics.c - see metrics.h */
#include "server/metrics.h"

#include <dirent.h>
#include <inttypes.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "server/options.h"

enum { MAX_BUCKETS = 20, MAX_SERIES = 256, MAX_ROUTES = 64, MAX_FINISHES = 8, MAX_LABEL = 64 };

struct counter_row {
    const char *name, *help;
};

static const struct counter_row counter_rows[METRIC_COUNTER_COUNT] = {
    [METRIC_PROMPT_TOKENS] = {"latte_prompt_tokens_total",
                              "Tokens of admitted prompts, each prompt once."},
    [METRIC_GENERATION_TOKENS] = {"latte_generation_tokens_total",
                                  "Tokens of all choices, up to where each ended."},
    [METRIC_UNKNOWN_FIELDS] = {"latte_unknown_request_fields_total",
                               "Request fields that are not known and were ignored or refused."},
    [METRIC_CLIENT_DISCONNECTS] = {"latte_client_disconnects_total",
                                   "Requests whose client left before the end."},
    [METRIC_QUEUE_REJECTIONS] = {"latte_queue_rejections_total",
                                 "Requests refused because the queue was full."},
    [METRIC_QUOTA_REJECTIONS] = {"latte_quota_rejections_total",
                                 "Requests refused because of their API key's quota or a session's "
                                 "full queue of turns."},
    [METRIC_TLS_FAILURES] = {"latte_tls_failures_total", "Connections whose TLS handshake failed."},
    [METRIC_CONNECTIONS] = {"latte_connections_total", "Connections accepted."},
    [METRIC_TURNS] = {"latte_session_turns_total", "Turns of sessions that were committed."},
    [METRIC_TURNS_LOST] = {"latte_session_turns_abandoned_total",
                           "Turns that failed or that their client broke off; not applied."},
    [METRIC_IDEMPOTENT_REPLAYS] = {"latte_idempotent_replays_total",
                                   "Requests that were answered as an earlier one with their "
                                   "Idempotency-Key was."},
    [METRIC_OUTCOMES_EVICTED] = {"latte_idempotency_evicted_total",
                                 "Idempotency-Keys forgotten before their time: memory was short."},
    [METRIC_STREAMS_RESUMED] = {"latte_streams_resumed_total",
                                "Requests that read a kept stream, from wherever."},
    [METRIC_STREAMS_EVICTED] = {"latte_streams_evicted_total",
                                "Kept streams forgotten before their time: memory was short."},
    [METRIC_STREAM_EVENTS_DROPPED] = {"latte_stream_events_dropped_total",
                                      "Events dropped from streams beyond a limit of memory."},
    [METRIC_PREFIX_HITS] = {"latte_prefix_hits_total",
                            "Prompts that began from a stored state of an earlier one."},
    [METRIC_PREFIX_TOKENS] = {"latte_prefix_cached_tokens_total",
                              "Prompt tokens that those states had seen."},
    [METRIC_SESSIONS_EXPIRED] = {"latte_sessions_expired_total",
                                 "Sessions forgotten because nobody used them."},
    [METRIC_RESPONSES_EXPIRED] = {"latte_responses_expired_total",
                                  "Stored responses forgotten at the end of their time."},
    [METRIC_RESPONSES_DROPPED] = {"latte_responses_dropped_total",
                                  "Stored responses forgotten before, for a limit."},
};

struct histogram_row {
    const char *name, *help;
    const char *label; /* name="value" of a family's member, whose rows are neighbours; or NULL */
    double bounds[MAX_BUCKETS]; /* rising, ends at the first 0; +Inf follows by itself */
};

#define FIRST_TOKEN_BOUNDS                                                                         \
    {                                                                                              \
        0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.25, 2.5, 5, 10, 20, 40, 80              \
    }
/* Half a millisecond is a small model's token; what a client notices is above 0.1 s. */
#define TOKEN_BOUNDS                                                                               \
    {                                                                                              \
        0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5   \
    }
#define TURN_ROW(i, range)                                                                         \
    [METRIC_TURN_FIRST_TOKEN + i] = {                                                              \
        "latte_turn_first_token_seconds",                                                          \
        "From the arrival of a request that goes on from a state to its first token, by the "      \
        "tokens that the state had seen.",                                                         \
        "position=\"" range "\"", FIRST_TOKEN_BOUNDS}

static const struct histogram_row histogram_rows[METRIC_HISTOGRAM_COUNT] = {
    [METRIC_TIME_TO_FIRST_TOKEN] = {"latte_time_to_first_token_seconds",
                                    "From a request's arrival to a choice's first token.", NULL,
                                    FIRST_TOKEN_BOUNDS},
    TURN_ROW(0, "0-999"),
    TURN_ROW(1, "1000-9999"),
    TURN_ROW(2, "10000-99999"),
    TURN_ROW(3, "100000-999999"),
    TURN_ROW(4, "1000000-"),
    [METRIC_TIME_PER_TOKEN] = {"latte_time_per_output_token_seconds",
                               "Mean time between the tokens of a choice.", NULL, TOKEN_BOUNDS},
    [METRIC_INTER_TOKEN] = {"latte_inter_token_latency_seconds",
                            "Time between two tokens of a choice, as the engine gave them.", NULL,
                            TOKEN_BOUNDS},
    [METRIC_E2E_LATENCY] = {"latte_e2e_request_latency_seconds",
                            "From a request's arrival to the end of a choice.",
                            NULL,
                            {0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320,
                             640}},
    [METRIC_QUEUE_TIME] = {"latte_request_queue_time_seconds",
                           "From submission to a slot, by choice.",
                           NULL,
                           {0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10,
                            30, 60, 120}},
    [METRIC_PROMPT_LENGTH] = {"latte_request_prompt_tokens",
                              "Prompt tokens of a choice.",
                              NULL,
                              {1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576}},
    [METRIC_OUTPUT_LENGTH] = {"latte_request_generation_tokens",
                              "Output tokens of a choice.",
                              NULL,
                              {1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576}},
};

/* Of whole requests: from a page of text to a generation of many minutes. */
static const double duration_bounds[] = {0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25,
                                         0.5,   1,      2.5,   5,    10,    30,   120, 600};
enum { DURATION_BUCKETS = sizeof(duration_bounds) / sizeof(*duration_bounds) };

struct histogram {
    _Atomic uint64_t counts[MAX_BUCKETS + 1]; /* by bucket, not cumulative; the last is +Inf */
    _Atomic uint64_t sum_bits;                /* the sum, a double's bits */
};

struct request_series {
    char method[16], route[MAX_LABEL];
    int code;
    uint64_t n;
};

struct duration_series {
    char route[MAX_LABEL];
    uint64_t counts[DURATION_BUCKETS + 1]; /* by bucket, not cumulative; the last is +Inf */
    double sum;
};

struct finish_series {
    char reason[16];
    uint64_t n;
};

static _Atomic uint64_t counters[METRIC_COUNTER_COUNT];
static struct histogram histograms[METRIC_HISTOGRAM_COUNT];

static pthread_mutex_t series_lock = PTHREAD_MUTEX_INITIALIZER; /* guards all below */
static struct request_series requests[MAX_SERIES];
static int n_requests;
static struct duration_series durations[MAX_ROUTES];
static int n_durations;
static struct finish_series finishes[MAX_FINISHES] = {
    {"stop", 0}, {"length", 0}, {"abort", 0}, {"error", 0}};
static int n_finishes = 4;

void metrics_add(enum metric_counter counter, uint64_t n)
{
    atomic_fetch_add_explicit(&counters[counter], n, memory_order_relaxed);
}

static double as_double(uint64_t bits)
{
    double value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

static uint64_t as_bits(double value)
{
    uint64_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
}

void metrics_observe(enum metric_histogram histogram, double value)
{
    if (!isfinite(value))
        return;
    struct histogram *h = &histograms[histogram];
    const double *bounds = histogram_rows[histogram].bounds;
    int bucket = 0;
    while (bucket < MAX_BUCKETS && bounds[bucket] > 0 && value > bounds[bucket])
        bucket++;
    if (bucket < MAX_BUCKETS && bounds[bucket] <= 0)
        bucket = MAX_BUCKETS;
    atomic_fetch_add_explicit(&h->counts[bucket], 1, memory_order_relaxed);
    uint64_t old = atomic_load_explicit(&h->sum_bits, memory_order_relaxed);
    while (!atomic_compare_exchange_weak(&h->sum_bits, &old, as_bits(as_double(old) + value)))
        continue;
}

void metrics_observe_turn(uint64_t position, double seconds)
{
    int i = 0;
    for (uint64_t bound = 1000; i < METRIC_POSITIONS - 1 && position >= bound; bound *= 10)
        i++;
    metrics_observe(METRIC_TURN_FIRST_TOKEN + i, seconds);
}

/* Methods are the client's to choose: what is not usual counts as "other". */
static const char *known_method(const char *method)
{
    static const char *const known[] = {"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"};
    for (size_t i = 0; i < sizeof(known) / sizeof(*known); i++) {
        if (!strcmp(method, known[i]))
            return method;
    }
    return "other";
}

static struct request_series *find_series(const char *method, const char *route, int code)
{
    for (int i = 0; i < n_requests; i++) {
        struct request_series *s = &requests[i];
        if (s->code == code && !strcmp(s->method, method) && !strcmp(s->route, route))
            return s;
    }
    if (n_requests == MAX_SERIES)
        return NULL;
    struct request_series *s = &requests[n_requests++];
    s->code = code;
    snprintf(s->method, sizeof(s->method), "%s", method);
    snprintf(s->route, sizeof(s->route), "%s", route);
    return s;
}

void metrics_count_request(const char *method, const char *route, int code)
{
    pthread_mutex_lock(&series_lock);
    struct request_series *s = find_series(known_method(method), route, code);
    if (s)
        s->n++;
    pthread_mutex_unlock(&series_lock);
}

static struct duration_series *find_durations(const char *route)
{
    for (int i = 0; i < n_durations; i++) {
        if (!strcmp(durations[i].route, route))
            return &durations[i];
    }
    if (n_durations == MAX_ROUTES)
        return NULL;
    struct duration_series *s = &durations[n_durations++];
    snprintf(s->route, sizeof(s->route), "%s", route);
    return s;
}

void metrics_observe_request(const char *route, double seconds)
{
    if (!isfinite(seconds))
        return;
    int bucket = 0;
    while (bucket < DURATION_BUCKETS && seconds > duration_bounds[bucket])
        bucket++;
    pthread_mutex_lock(&series_lock);
    struct duration_series *s = find_durations(route);
    if (s) {
        s->counts[bucket]++;
        s->sum += seconds;
    }
    pthread_mutex_unlock(&series_lock);
}

void metrics_count_finish(const char *finish_reason)
{
    pthread_mutex_lock(&series_lock);
    int i = 0;
    while (i < n_finishes && strcmp(finishes[i].reason, finish_reason))
        i++;
    if (i == n_finishes && n_finishes < MAX_FINISHES) {
        snprintf(finishes[i].reason, sizeof(finishes[i].reason), "%s", finish_reason);
        n_finishes++;
    }
    if (i < n_finishes)
        finishes[i].n++;
    pthread_mutex_unlock(&series_lock);
}

/* The text format. */

static void write_head(struct bytes *out, const char *name, const char *type, const char *help)
{
    bytes_format(out, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, type);
}

static void write_value(struct bytes *out, const char *name, const char *type, const char *help,
                        double value)
{
    write_head(out, name, type, help);
    bytes_format(out, "%s %.15g\n", name, value);
}

static void write_histogram(struct bytes *out, enum metric_histogram which)
{
    const struct histogram_row *row = &histogram_rows[which];
    struct histogram *h = &histograms[which];
    const char *label = row->label ? row->label : "", *comma = row->label ? "," : "";
    if (!which || strcmp(row->name, row[-1].name) != 0)
        write_head(out, row->name, "histogram", row->help);
    uint64_t total = 0;
    for (int i = 0; i < MAX_BUCKETS && row->bounds[i] > 0; i++) {
        total += atomic_load_explicit(&h->counts[i], memory_order_relaxed);
        bytes_format(out, "%s_bucket{%s%sle=\"%g\"} %" PRIu64 "\n", row->name, label, comma,
                     row->bounds[i], total);
    }
    total += atomic_load_explicit(&h->counts[MAX_BUCKETS], memory_order_relaxed);
    bytes_format(out, "%s_bucket{%s%sle=\"+Inf\"} %" PRIu64 "\n", row->name, label, comma, total);
    const char *open = row->label ? "{" : "", *close = row->label ? "}" : "";
    double sum = as_double(atomic_load_explicit(&h->sum_bits, memory_order_relaxed));
    bytes_format(out, "%s_sum%s%s%s %.15g\n", row->name, open, label, close, sum);
    bytes_format(out, "%s_count%s%s%s %" PRIu64 "\n", row->name, open, label, close, total);
}

static void write_durations(struct bytes *out, const struct duration_series *s)
{
    static const char name[] = "latte_http_request_duration_seconds";
    uint64_t total = 0;
    for (int i = 0; i < DURATION_BUCKETS; i++) {
        total += s->counts[i];
        bytes_format(out, "%s_bucket{route=\"%s\",le=\"%g\"} %" PRIu64 "\n", name, s->route,
                     duration_bounds[i], total);
    }
    total += s->counts[DURATION_BUCKETS];
    bytes_format(out, "%s_bucket{route=\"%s\",le=\"+Inf\"} %" PRIu64 "\n", name, s->route, total);
    bytes_format(out, "%s_sum{route=\"%s\"} %.15g\n", name, s->route, s->sum);
    bytes_format(out, "%s_count{route=\"%s\"} %" PRIu64 "\n", name, s->route, total);
}

static void write_series(struct bytes *out)
{
    pthread_mutex_lock(&series_lock);
    write_head(out, "latte_http_requests_total", "counter", "HTTP requests by answer.");
    for (int i = 0; i < n_requests; i++)
        bytes_format(
            out, "latte_http_requests_total{method=\"%s\",route=\"%s\",code=\"%d\"} %" PRIu64 "\n",
            requests[i].method, requests[i].route, requests[i].code, requests[i].n);
    write_head(out, "latte_http_request_duration_seconds", "histogram",
               "From a request's header to the end of its reply or stream.");
    for (int i = 0; i < n_durations; i++)
        write_durations(out, &durations[i]);
    write_head(out, "latte_request_success_total", "counter",
               "Choices by their end: stop, length, abort (the client left), error.");
    for (int i = 0; i < n_finishes; i++)
        bytes_format(out, "latte_request_success_total{finish_reason=\"%s\"} %" PRIu64 "\n",
                     finishes[i].reason, finishes[i].n);
    pthread_mutex_unlock(&series_lock);
}

static void write_engine(struct bytes *out, const struct engine *engine)
{
    struct engine_stats stats;
    struct engine_info info;
    engine_stats(engine, &stats);
    engine_info(engine, &info);
    write_value(out, "latte_requests_running", "gauge", "Jobs in a slot.", stats.n_running);
    write_value(out, "latte_requests_waiting", "gauge", "Jobs queued for a slot.", stats.n_waiting);
    write_value(out, "latte_slots", "gauge", "Sequences that can be held together.", stats.n_slots);
    write_value(out, "latte_slots_used", "gauge", "Slots that hold a sequence.", stats.n_running);
    write_value(out, "latte_engine_steps_total", "counter", "Steps of the model.",
                (double)stats.n_steps);
    write_value(out, "latte_engine_prompt_tokens_total", "counter",
                "Prompt tokens the model has read: one that several choices share only once, and "
                "none that a stored state had seen.",
                (double)stats.n_prompt_tokens);
    write_value(out, "latte_engine_dropped_tokens_total", "counter",
                "Tokens drawn ahead for choices that had ended by then.",
                (double)stats.n_dropped_tokens);
    write_value(out, "latte_state_loads_total", "counter",
                "Jobs that began from a state which was copied to a device.",
                (double)stats.n_state_loads);
    write_value(out, "latte_state_hits_total", "counter",
                "Jobs that began from a state which was still on a device.",
                (double)stats.n_state_hits);
    write_value(out, "latte_engine_step_seconds_total", "counter", "Time spent in steps.",
                (double)stats.step_ns * 1e-9);
    write_value(out, "latte_engine_failed", "gauge", "1 when a device has failed.", stats.failed);
    write_value(out, "latte_weight_bytes", "gauge", "Memory of the weights, on each device.",
                (double)info.weight_bytes);
    write_value(out, "latte_state_bytes_per_slot", "gauge", "Memory of one sequence's state.",
                (double)info.state_bytes);
    write_value(out, "latte_devices", "gauge", "Devices that compute.", info.n_devices);
    write_head(out, "latte_model_info", "gauge", "What is served; always 1.");
    bytes_format(out,
                 "latte_model_info{fingerprint=\"%s\",backend=\"%s\",weight_dtype=\"%s\","
                 "window_dtype=\"%s\"} 1\n",
                 info.fingerprint, info.backend, info.weight_dtype, info.window_dtype);
}

static int count_open_fds(void)
{
    DIR *dir = opendir("/proc/self/fd");
    if (!dir)
        return -1;
    int n = -1; /* the directory's own */
    for (const struct dirent *entry; (entry = readdir(dir));)
        n += entry->d_name[0] != '.';
    closedir(dir);
    return n;
}

static double boot_s; /* set once */

static void read_boot_time(void)
{
    struct timespec now, since_boot;
    clock_gettime(CLOCK_REALTIME, &now);
    clock_gettime(CLOCK_BOOTTIME, &since_boot);
    boot_s = (double)(now.tv_sec - since_boot.tv_sec) +
             (double)(now.tv_nsec - since_boot.tv_nsec) * 1e-9;
}

/* Read once: each reading differs by a little, and a start that moves reads as a restart. */
static double boot_time_s(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, read_boot_time);
    return boot_s;
}

/* /proc/self/stat fields by the numbers of proc(5): 22 start time in ticks, 23 virtual bytes,
 * 24 resident pages. */
static void read_stat(double *start_s, double *virtual_bytes, double *resident_bytes)
{
    char text[1024];
    unsigned long long ticks = 0, virtual = 0;
    long pages = 0;
    FILE *f = fopen("/proc/self/stat", "re");
    size_t n = f ? fread(text, 1, sizeof(text) - 1, f) : 0;
    if (f)
        fclose(f);
    text[n] = '\0';
    const char *after_name = strrchr(text, ')');
    if (after_name)
        sscanf(after_name + 1,
               " %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %*d %*d"
               " %llu %llu %ld",
               &ticks, &virtual, &pages);
    *start_s = boot_time_s() + (double)ticks / (double)sysconf(_SC_CLK_TCK);
    *virtual_bytes = (double)virtual;
    *resident_bytes = (double)pages * (double)sysconf(_SC_PAGESIZE);
}

static void write_process(struct bytes *out)
{
    struct rusage use;
    struct rlimit files;
    double start_s, virtual_bytes, resident_bytes;
    getrusage(RUSAGE_SELF, &use);
    getrlimit(RLIMIT_NOFILE, &files);
    read_stat(&start_s, &virtual_bytes, &resident_bytes);
    double cpu_s = (double)(use.ru_utime.tv_sec + use.ru_stime.tv_sec) +
                   (double)(use.ru_utime.tv_usec + use.ru_stime.tv_usec) * 1e-6;
    write_value(out, "process_cpu_seconds_total", "counter", "User and system time.", cpu_s);
    write_value(out, "process_resident_memory_bytes", "gauge", "Resident memory.", resident_bytes);
    write_value(out, "process_virtual_memory_bytes", "gauge", "Virtual memory.", virtual_bytes);
    write_value(out, "process_open_fds", "gauge", "Open file descriptors.", count_open_fds());
    write_value(out, "process_max_fds", "gauge", "Limit of open file descriptors.",
                (double)files.rlim_cur);
    write_value(out, "process_start_time_seconds", "gauge", "Start, in Unix time.", start_s);
}

static void write_store(struct bytes *out, const struct metrics_sessions *s)
{
    const struct image_counts *i = &s->images;
    const struct journal_counts *j = &s->journal;
    write_value(out, "latte_state_evictions_total", "counter",
                "States that left memory, since they are in the store.", (double)i->n_evictions);
    write_value(out, "latte_state_reloads_total", "counter", "States read back from the store.",
                (double)i->n_reloads);
    write_value(out, "latte_state_replays_total", "counter",
                "States computed again from one in the store and the tokens since.",
                (double)i->n_replays);
    write_value(out, "latte_store_errors_total", "counter",
                "Reads and writes of the store that failed.", (double)(i->n_errors + j->n_errors));
    write_value(out, "latte_journal_entries_total", "counter", "Changes of sessions written.",
                (double)j->n_entries);
    write_value(out, "latte_journal_writes_total", "counter",
                "Writes of the journal, each of all changes that waited.", (double)j->n_writes);
    write_value(out, "latte_journal_bytes", "gauge", "Length of the journal.", (double)j->n_bytes);
    write_value(out, "latte_store_up", "gauge", "1 while the store answers, else 0.",
                !s->store_is_away);
}

static void write_sessions(struct bytes *out, const struct metrics_sessions *s)
{
    const struct session_counts *c = &s->sessions;
    write_value(out, "latte_sessions", "gauge", "Sessions there are.", c->n_sessions);
    write_value(out, "latte_responses", "gauge", "Responses that are stored.", s->n_responses);
    write_head(out, "latte_sessions_by_tier", "gauge",
               "Sessions by where their state is: in a slot of a GPU and in memory, in memory, or "
               "in the store only.");
    bytes_format(out, "latte_sessions_by_tier{tier=\"device\"} %d\n", c->n_on_device);
    bytes_format(out, "latte_sessions_by_tier{tier=\"host\"} %d\n", c->n_in_memory);
    bytes_format(out, "latte_sessions_by_tier{tier=\"store\"} %d\n",
                 c->n_sessions - c->n_on_device - c->n_in_memory);
    write_value(
        out, "latte_session_states", "gauge",
        "States of sessions, of the turns before, of snapshots, presets, stored responses and "
        "requests under way, each once.",
        s->images.n_images);
    write_value(out, "latte_session_state_bytes", "gauge", "Host memory of those states.",
                (double)s->images.used_bytes);
    write_value(out, "latte_prefix_entries", "gauge", "Stored states of beginnings of prompts.",
                s->n_prefixes);
    write_value(out, "latte_prefix_bytes", "gauge",
                "Host memory of those states, their tokens, and of states still to be computed.",
                (double)s->prefix_bytes);
    if (s->has_store)
        write_store(out, s);
}

static void write_kept(struct bytes *out, const struct metrics_kept *k)
{
    write_value(out, "latte_streams_kept", "gauge",
                "Resumable streams whose events are kept, running ones too.", k->n_streams);
    write_value(out, "latte_stream_bytes", "gauge", "Memory of those events.",
                (double)k->stream_bytes);
    write_value(out, "latte_session_turns_waiting", "gauge",
                "Requests that wait for their session's turn.", k->n_waiting);
    write_value(out, "latte_idempotency_keys", "gauge",
                "Idempotency-Keys whose outcome is kept, or that run.", k->n_outcomes);
    write_value(out, "latte_idempotency_bytes", "gauge", "Memory of those outcomes.",
                (double)k->outcome_bytes);
}

static void write_service(struct bytes *out, const struct metrics_service *s)
{
    write_value(out, "latte_ready", "gauge", "1 while /health/ready answers 200, else 0.",
                s->is_ready);
    write_value(out, "latte_connections", "gauge", "Open connections.", s->n_connections);
    write_value(out, "latte_connections_limit", "gauge", "--max-connections.",
                (double)s->max_connections);
    write_value(out, "latte_requests_waiting_limit", "gauge", "--max-queue.", (double)s->max_queue);
    write_value(out, "latte_sessions_limit", "gauge", "--max-sessions.", (double)s->max_sessions);
    write_value(out, "latte_session_state_bytes_limit", "gauge", "--host-state-mb, in bytes.",
                (double)s->max_state_bytes);
}

void metrics_write(struct bytes *out, const struct engine *engine,
                   const struct metrics_sessions *sessions, const struct metrics_kept *kept,
                   const struct metrics_service *service)
{
    for (int i = 0; i < METRIC_COUNTER_COUNT; i++)
        write_value(out, counter_rows[i].name, "counter", counter_rows[i].help,
                    (double)atomic_load_explicit(&counters[i], memory_order_relaxed));
    write_series(out);
    for (int i = 0; i < METRIC_HISTOGRAM_COUNT; i++)
        write_histogram(out, i);
    write_service(out, service);
    if (engine)
        write_engine(out, engine);
    if (sessions)
        write_sessions(out, sessions);
    if (kept)
        write_kept(out, kept);
    write_process(out);
    write_head(out, "latte_build_info", "gauge", "This build; always 1.");
    bytes_format(out, "latte_build_info{version=\"%s\"} 1\n", latte_version);
}
