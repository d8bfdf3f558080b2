/* bench_load.c - see bench_load.h. A closed loop: each stream sends its next request when the
 * last one ended. */
#include "tests/bench/bench_load.h"

#include <curl/curl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/bytes.h"
#include "tests/bench/bench.h"

enum { TIMEOUT_S = 600 };

struct level {
    const struct load *load;
    const char *url;
    struct curl_slist *headers;
};

struct client {
    const struct level *level;
    pthread_t thread;
    CURLM *multi;
    struct stream *streams; /* [n_streams], owned */
    int n_streams, seed;
    struct load_counts counts;
    bool ok;
};

struct stream {
    struct client *client;
    CURL *curl;
    struct bytes line;          /* the part of an SSE line seen so far */
    char *body;                 /* owned */
    double started, last_event; /* seconds; last_event 0 before the first */
    long n_tokens;
    bool done, broken;
    int rounds_left;
};

void samples_add(struct samples *s, double value)
{
    if (s->n == s->cap) {
        size_t cap = s->cap ? 2 * s->cap : 1024;
        double *values = realloc(s->values, cap * sizeof(*values));
        if (!values)
            return; /* a lost sample does not stop a measurement */
        s->values = values;
        s->cap = cap;
    }
    s->values[s->n++] = value;
}

/* One "data: ..." line. Usage arrives in the last event, which has no choices. */
static void take_event(struct stream *s, const char *line)
{
    if (strncmp(line, "data: ", 6) != 0)
        return;
    const char *data = line + 6;
    if (!strcmp(data, "[DONE]")) {
        s->done = true;
        return;
    }
    if (strstr(data, "\"error\":")) {
        s->broken = true;
        return;
    }
    if (strstr(data, "\"choices\":[]")) {
        const char *count = strstr(data, "\"completion_tokens\":");
        s->n_tokens = count ? atol(count + strlen("\"completion_tokens\":")) : 0;
        return;
    }
    double now = bench_now();
    if (s->last_event == 0)
        samples_add(&s->client->counts.ttft, now - s->started);
    else
        samples_add(&s->client->counts.gaps, now - s->last_event);
    s->last_event = now;
}

/* Whole lines go to take_event; what is left waits for more. */
static size_t on_body(char *data, size_t size, size_t n, void *context)
{
    struct stream *s = context;
    const char *at = data, *end = data + size * n;
    for (const char *newline; (newline = memchr(at, '\n', (size_t)(end - at))); at = newline + 1) {
        bytes_append(&s->line, at, (size_t)(newline - at));
        if (s->line.n)
            take_event(s, s->line.data);
        s->line.n = 0;
    }
    bytes_append(&s->line, at, (size_t)(end - at));
    return size * n;
}

/* Streams and rounds differ, so nothing can be reused. */
static void add_prompt(struct bytes *b, const struct load *load, int seed)
{
    static const char *const words[] = {"the",   "old",   "house", "stood", "by",     "a",
                                        "river", "and",   "a",     "girl",  "looked", "at",
                                        "it",    "every", "day",   "while", "birds",  "sang"};
    unsigned state = (unsigned)seed * 2654435761u + 1;
    bytes_char(b, load->token_ids ? '[' : '"');
    for (int i = 0; i < load->prompt_tokens; i++) {
        state = state * 1664525u + 1013904223u;
        if (load->token_ids)
            bytes_format(b, "%s%u", i ? "," : "", 1 + (state >> 16) % 255);
        else
            bytes_format(b, "%s%s", i ? " " : "", words[(state >> 16) % 18]);
    }
    bytes_char(b, load->token_ids ? ']' : '"');
}

static char *make_body(const struct load *load, int seed)
{
    struct bytes b = {0};
    bytes_text(&b, "{\"prompt\":");
    add_prompt(&b, load, seed);
    bytes_format(&b,
                 ",\"max_tokens\":%d,\"ignore_eos\":true,\"seed\":%d,\"stream\":true,"
                 "\"stream_options\":{\"include_usage\":true}}",
                 load->max_tokens, seed);
    return b.data;
}

static bool start_request(struct stream *s)
{
    const struct level *level = s->client->level;
    free(s->body);
    s->body = make_body(level->load, ++s->client->seed);
    s->line.n = 0;
    s->started = bench_now();
    s->last_event = 0;
    s->n_tokens = 0;
    s->done = s->broken = false;
    curl_easy_reset(s->curl);
    curl_easy_setopt(s->curl, CURLOPT_URL, level->url);
    curl_easy_setopt(s->curl, CURLOPT_HTTPHEADER, level->headers);
    curl_easy_setopt(s->curl, CURLOPT_POSTFIELDS, s->body);
    curl_easy_setopt(s->curl, CURLOPT_WRITEFUNCTION, on_body);
    curl_easy_setopt(s->curl, CURLOPT_WRITEDATA, s);
    curl_easy_setopt(s->curl, CURLOPT_PRIVATE, s);
    curl_easy_setopt(s->curl, CURLOPT_TIMEOUT, (long)TIMEOUT_S);
    return s->body && curl_multi_add_handle(s->client->multi, s->curl) == CURLM_OK;
}

/* Count a finished request; true when the stream has another one to send. */
static bool end_request(struct stream *s, CURLcode result)
{
    long code = 0;
    curl_easy_getinfo(s->curl, CURLINFO_RESPONSE_CODE, &code);
    s->client->counts.n_requests++;
    s->client->counts.n_tokens += s->n_tokens;
    if (result != CURLE_OK || code != 200 || !s->done || s->broken)
        s->client->counts.n_failed++;
    return --s->rounds_left > 0;
}

/* A client thread: all rounds of its streams. */
static void *drive(void *context)
{
    struct client *c = context;
    double deadline = bench_now() + TIMEOUT_S;
    int live = 0;
    for (int i = 0; i < c->n_streams; i++)
        live += start_request(&c->streams[i]);
    while (live > 0 && bench_now() < deadline) {
        int running, left;
        if (curl_multi_perform(c->multi, &running) != CURLM_OK)
            return NULL;
        for (CURLMsg *m; (m = curl_multi_info_read(c->multi, &left));) {
            struct stream *s;
            CURLcode result = m->data.result;
            curl_easy_getinfo(m->easy_handle, CURLINFO_PRIVATE, (char **)&s);
            curl_multi_remove_handle(c->multi, s->curl);
            if (!end_request(s, result) || !start_request(s))
                live--;
        }
        curl_multi_poll(c->multi, NULL, 0, 100, NULL);
    }
    c->ok = live == 0;
    return NULL;
}

static bool open_client(struct client *c, const struct level *level, int id, int n_streams)
{
    *c = (struct client){.level = level, .n_streams = n_streams, .seed = id * 10000000};
    c->streams = calloc((size_t)n_streams, sizeof(*c->streams));
    c->multi = curl_multi_init();
    bool ok = c->streams && c->multi;
    for (int i = 0; ok && i < n_streams; i++) {
        c->streams[i] = (struct stream){.client = c, .rounds_left = level->load->rounds};
        ok = (c->streams[i].curl = curl_easy_init()) != NULL;
    }
    return ok;
}

static void close_client(struct client *c)
{
    for (int i = 0; c->streams && i < c->n_streams; i++) {
        curl_easy_cleanup(c->streams[i].curl);
        bytes_free(&c->streams[i].line);
        free(c->streams[i].body);
    }
    curl_multi_cleanup(c->multi);
    free(c->streams);
    free(c->counts.ttft.values);
    free(c->counts.gaps.values);
}

static void add_counts(struct load_counts *sum, const struct load_counts *c)
{
    for (size_t i = 0; i < c->ttft.n; i++)
        samples_add(&sum->ttft, c->ttft.values[i]);
    for (size_t i = 0; i < c->gaps.n; i++)
        samples_add(&sum->gaps, c->gaps.values[i]);
    sum->n_tokens += c->n_tokens;
    sum->n_requests += c->n_requests;
    sum->n_failed += c->n_failed;
}

/* Open the clients' shares of n streams, run them all, add up what they saw. */
static bool run_clients(struct client *clients, int n_clients, const struct level *level, int n,
                        struct load_counts *sum)
{
    static int n_levels; /* no two levels send the same prompts */
    int n_open = 0, n_started = 0;
    bool ok = true;
    n_levels++;
    for (; ok && n_open < n_clients; n_open++)
        ok = open_client(&clients[n_open], level, n_levels * LOAD_MAX_CLIENTS + n_open,
                         (n + n_open) / n_clients);
    while (ok && n_started < n_clients) {
        ok = !pthread_create(&clients[n_started].thread, NULL, drive, &clients[n_started]);
        n_started += ok;
    }
    for (int i = 0; i < n_started; i++) {
        pthread_join(clients[i].thread, NULL);
        ok = ok && clients[i].ok;
        add_counts(sum, &clients[i].counts);
    }
    for (int i = 0; i < n_open; i++)
        close_client(&clients[i]);
    return ok;
}

bool load_run(const struct load *load, int n_streams, struct load_counts *out)
{
    static struct client clients[LOAD_MAX_CLIENTS];
    char url[600];
    struct level level = {.load = load, .url = url};
    snprintf(url, sizeof(url), "%s/v1/completions", load->base);
    *out = (struct load_counts){0};
    level.headers = curl_slist_append(NULL, "Content-Type: application/json");
    const int n_clients = load->n_clients < n_streams ? load->n_clients : n_streams;
    const bool ok = level.headers && run_clients(clients, n_clients, &level, n_streams, out);
    curl_slist_free_all(level.headers);
    return ok;
}

void load_free(struct load_counts *counts)
{
    free(counts->ttft.values);
    free(counts->gaps.values);
}
