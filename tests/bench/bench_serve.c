/* bench_serve.c - latte-bench serve: time to first token, time between events and throughput
 * through HTTP, with N streams at once. A closed loop: each stream sends its next request when
 * the last one ended. Starts a server of its own on the loopback unless --url names one. */
#include <arpa/inet.h>
#include <curl/curl.h>
#include <errno.h>
#include <getopt.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "engine/base/bytes.h"
#include "tests/bench/bench.h"

enum {
    MAX_STREAMS = 4096,
    MAX_LEVELS = 16,
    MIN_REQUESTS = 32, /* of a level: a median of two says nothing */
    START_TIMEOUT_S = 120,
    LEVEL_TIMEOUT_S = 600,
};

struct settings {
    const char *model_dir, *url, *threads;
    int levels[MAX_LEVELS], n_levels; /* numbers of streams */
    int rounds;                       /* requests each stream sends, one after the other */
    int prompt_tokens, max_tokens;
    bool json;
};

/* Growing array of seconds. */
struct samples {
    double *values;
    size_t n, cap;
};

struct level {
    const struct settings *settings;
    const char *url;
    struct curl_slist *headers;
    struct samples ttft, gaps;
    long n_tokens, n_requests, n_failed;
};

struct stream {
    struct level *level;
    CURL *curl;
    struct bytes line;          /* the part of an SSE line seen so far */
    char *body;                 /* owned */
    double started, last_event; /* seconds; last_event 0 before the first */
    long n_tokens;
    bool done, broken;
    int rounds_left;
};

static void add_sample(struct samples *s, double value)
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
        add_sample(&s->level->ttft, now - s->started);
    else
        add_sample(&s->level->gaps, now - s->last_event);
    s->last_event = now;
}

static size_t on_body(char *data, size_t size, size_t n, void *context)
{
    struct stream *s = context;
    for (size_t i = 0; i < size * n; i++) {
        if (data[i] != '\n') {
            bytes_char(&s->line, data[i]);
            continue;
        }
        if (s->line.n)
            take_event(s, s->line.data);
        s->line.n = 0;
    }
    return size * n;
}

/* A prompt of about n tokens; streams and rounds differ, so nothing can be reused. */
static char *make_body(const struct settings *settings, int seed)
{
    static const char *const words[] = {"the",   "old",   "house", "stood", "by",     "a",
                                        "river", "and",   "a",     "girl",  "looked", "at",
                                        "it",    "every", "day",   "while", "birds",  "sang"};
    struct bytes b = {0};
    bytes_text(&b, "{\"prompt\":\"");
    unsigned state = (unsigned)seed * 2654435761u + 1;
    for (int i = 0; i < settings->prompt_tokens; i++) {
        state = state * 1664525u + 1013904223u;
        bytes_format(&b, "%s%s", i ? " " : "", words[(state >> 16) % 18]);
    }
    bytes_format(&b,
                 "\",\"max_tokens\":%d,\"ignore_eos\":true,\"seed\":%d,\"stream\":true,"
                 "\"stream_options\":{\"include_usage\":true}}",
                 settings->max_tokens, seed);
    return b.data;
}

static bool start_request(struct stream *s, CURLM *multi, int seed)
{
    free(s->body);
    s->body = make_body(s->level->settings, seed);
    s->line.n = 0;
    s->started = bench_now();
    s->last_event = 0;
    s->n_tokens = 0;
    s->done = s->broken = false;
    curl_easy_reset(s->curl);
    curl_easy_setopt(s->curl, CURLOPT_URL, s->level->url);
    curl_easy_setopt(s->curl, CURLOPT_HTTPHEADER, s->level->headers);
    curl_easy_setopt(s->curl, CURLOPT_POSTFIELDS, s->body);
    curl_easy_setopt(s->curl, CURLOPT_WRITEFUNCTION, on_body);
    curl_easy_setopt(s->curl, CURLOPT_WRITEDATA, s);
    curl_easy_setopt(s->curl, CURLOPT_PRIVATE, s);
    curl_easy_setopt(s->curl, CURLOPT_TIMEOUT, (long)LEVEL_TIMEOUT_S);
    return s->body && curl_multi_add_handle(multi, s->curl) == CURLM_OK;
}

/* Count a finished request; true when the stream has another one to send. */
static bool end_request(struct stream *s, CURLcode result)
{
    long code = 0;
    curl_easy_getinfo(s->curl, CURLINFO_RESPONSE_CODE, &code);
    s->level->n_requests++;
    s->level->n_tokens += s->n_tokens;
    if (result != CURLE_OK || code != 200 || !s->done || s->broken)
        s->level->n_failed++;
    return --s->rounds_left > 0;
}

static bool drive(struct stream *streams, int n_streams, CURLM *multi, int *seed)
{
    double deadline = bench_now() + LEVEL_TIMEOUT_S;
    int live = 0;
    for (int i = 0; i < n_streams; i++)
        live += start_request(&streams[i], multi, ++*seed);
    while (live > 0 && bench_now() < deadline) {
        int running, left;
        if (curl_multi_perform(multi, &running) != CURLM_OK)
            return false;
        for (CURLMsg *m; (m = curl_multi_info_read(multi, &left));) {
            struct stream *s;
            CURLcode result = m->data.result;
            curl_easy_getinfo(m->easy_handle, CURLINFO_PRIVATE, (char **)&s);
            curl_multi_remove_handle(multi, s->curl);
            if (!end_request(s, result) || !start_request(s, multi, ++*seed))
                live--;
        }
        curl_multi_poll(multi, NULL, 0, 100, NULL);
    }
    return live == 0;
}

static void print_level(const struct settings *settings, struct level *l, int n, double seconds)
{
    double t50 = bench_quantile(l->ttft.values, l->ttft.n, 0.5) * 1e3;
    double t99 = bench_quantile(l->ttft.values, l->ttft.n, 0.99) * 1e3;
    double g50 = bench_quantile(l->gaps.values, l->gaps.n, 0.5) * 1e3;
    double g99 = bench_quantile(l->gaps.values, l->gaps.n, 0.99) * 1e3;
    double rate = (double)l->n_tokens / seconds;
    if (settings->json)
        printf("{\"streams\":%d,\"requests\":%ld,\"failed\":%ld,\"ttft_p50_ms\":%.3f,"
               "\"ttft_p99_ms\":%.3f,\"itl_p50_ms\":%.3f,\"itl_p99_ms\":%.3f,"
               "\"tokens_per_second\":%.1f}\n",
               n, l->n_requests, l->n_failed, t50, t99, g50, g99, rate);
    else
        printf("| %7d | %8ld | %6ld | %9.1f | %9.1f | %9.2f | %9.2f | %8.0f |\n", n, l->n_requests,
               l->n_failed, t50, t99, g50, g99, rate);
    fflush(stdout);
}

static bool run_level(const struct settings *settings, const char *base, int n, int *seed)
{
    char url[600];
    snprintf(url, sizeof(url), "%s/v1/completions", base);
    struct level level = {.settings = settings, .url = url};
    level.headers = curl_slist_append(NULL, "Content-Type: application/json");
    struct stream *streams = calloc((size_t)n, sizeof(*streams));
    CURLM *multi = curl_multi_init();
    bool ok = streams && multi && level.headers;
    int least = (MIN_REQUESTS + n - 1) / n;
    int rounds = settings->rounds > least ? settings->rounds : least;
    for (int i = 0; ok && i < n; i++) {
        streams[i] = (struct stream){.level = &level, .rounds_left = rounds};
        ok = (streams[i].curl = curl_easy_init()) != NULL;
    }
    double started = bench_now();
    ok = ok && drive(streams, n, multi, seed);
    if (ok)
        print_level(settings, &level, n, bench_now() - started);
    for (int i = 0; streams && i < n; i++) {
        curl_easy_cleanup(streams[i].curl);
        bytes_free(&streams[i].line);
        free(streams[i].body);
    }
    ok = ok && level.n_failed == 0;
    curl_multi_cleanup(multi);
    curl_slist_free_all(level.headers);
    free(streams);
    free(level.ttft.values);
    free(level.gaps.values);
    return ok;
}

/* A loopback port nobody listens on at the moment. */
static int free_port(void)
{
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t n = sizeof(a);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    int port = 0;
    if (fd >= 0 && !bind(fd, (struct sockaddr *)&a, n) &&
        !getsockname(fd, (struct sockaddr *)&a, &n))
        port = ntohs(a.sin_port);
    if (fd >= 0)
        close(fd);
    return port;
}

/* Start the latte-server that stands beside this program. Returns its pid, or -1. */
static pid_t start_server(const struct settings *settings, int port)
{
    char path[4096], port_text[16], slots[16];
    ssize_t n = readlink("/proc/self/exe", path, sizeof(path) - 32);
    if (n < 0)
        return -1;
    path[n] = '\0';
    strcpy(strrchr(path, '/'), "/latte-server");
    snprintf(port_text, sizeof(port_text), "%d", port);
    int most = 1;
    for (int i = 0; i < settings->n_levels; i++)
        most = settings->levels[i] > most ? settings->levels[i] : most;
    snprintf(slots, sizeof(slots), "%d", most);
    pid_t pid = fork();
    if (pid == 0) {
        dup2(STDERR_FILENO, STDOUT_FILENO); /* stdout is for the table */
        execl(path, path, "--model", settings->model_dir, "--port", port_text, "--max-slots", slots,
              "--threads", settings->threads, "--no-access-log", "--log-level", "warn",
              (char *)NULL);
        perror(path);
        _exit(127);
    }
    return pid;
}

static size_t ignore_body(char *data, size_t size, size_t n, void *context)
{
    (void)data, (void)context;
    return size * n;
}

static bool wait_ready(const char *base, pid_t pid)
{
    char url[600];
    snprintf(url, sizeof(url), "%s/health/ready", base);
    double deadline = bench_now() + START_TIMEOUT_S;
    CURL *curl = curl_easy_init();
    curl_easy_setopt(curl, CURLOPT_URL, url);
    curl_easy_setopt(curl, CURLOPT_WRITEFUNCTION, ignore_body);
    curl_easy_setopt(curl, CURLOPT_TIMEOUT, 5L);
    long code = 0;
    while (code != 200 && bench_now() < deadline &&
           (pid <= 0 || waitpid(pid, NULL, WNOHANG) == 0)) {
        if (curl_easy_perform(curl) == CURLE_OK)
            curl_easy_getinfo(curl, CURLINFO_RESPONSE_CODE, &code);
        if (code != 200)
            usleep(50000);
    }
    curl_easy_cleanup(curl);
    return code == 200;
}

static void usage(FILE *out)
{
    fputs("usage: latte-bench serve (-m DIR | --url URL) [options]\n"
          "  -m, --model DIR      start latte-server with this model on a free loopback port\n"
          "      --url URL        measure a server that runs already (http://127.0.0.1:8080)\n"
          "      --streams LIST   streams at once, comma separated (default 1,16,128,512)\n"
          "      --rounds N       requests each stream sends (default 2; at least 32 in all)\n"
          "      --prompt-tokens N  about so many tokens of prompt (default 32)\n"
          "      --max-tokens N   tokens generated per request (default 64)\n"
          "      --threads N      the server's compute threads (default 0: all cores)\n"
          "      --json           one JSON object a line instead of a table\n",
          out);
}

static bool parse_levels(struct settings *s, const char *text)
{
    s->n_levels = 0;
    for (const char *p = text; *p;) {
        char *end;
        long n = strtol(p, &end, 10);
        if (end == p || n < 1 || n > MAX_STREAMS || s->n_levels == MAX_LEVELS ||
            (*end && *end != ','))
            return false;
        s->levels[s->n_levels++] = (int)n;
        p = *end ? end + 1 : end;
    }
    return s->n_levels > 0;
}

static bool parse_count(int *out, const char *text, int most)
{
    char *end;
    errno = 0;
    long n = strtol(text, &end, 10);
    if (errno || end == text || *end || n < 1 || n > most)
        return false;
    *out = (int)n;
    return true;
}

/* 0 to go on, else the exit code plus one. */
static int parse(struct settings *s, int argc, char **argv)
{
    static const struct option options[] = {{"model", 1, 0, 'm'},         {"url", 1, 0, 'u'},
                                            {"streams", 1, 0, 's'},       {"rounds", 1, 0, 'r'},
                                            {"prompt-tokens", 1, 0, 'p'}, {"max-tokens", 1, 0, 'n'},
                                            {"threads", 1, 0, 't'},       {"json", 0, 0, 'j'},
                                            {"help", 0, 0, 'h'},          {0, 0, 0, 0}};
    bool ok = true;
    for (int c; ok && (c = getopt_long(argc, argv, "m:h", options, NULL)) != -1;) {
        switch (c) {
        case 'm':
            s->model_dir = optarg;
            break;
        case 'u':
            s->url = optarg;
            break;
        case 's':
            ok = parse_levels(s, optarg);
            break;
        case 'r':
            ok = parse_count(&s->rounds, optarg, 1000);
            break;
        case 'p':
            ok = parse_count(&s->prompt_tokens, optarg, 100000);
            break;
        case 'n':
            ok = parse_count(&s->max_tokens, optarg, 100000);
            break;
        case 't':
            s->threads = optarg;
            break;
        case 'j':
            s->json = true;
            break;
        case 'h':
            usage(stdout);
            return 1;
        default:
            ok = false;
        }
    }
    if (ok && optind == argc && (s->model_dir != NULL) != (s->url != NULL))
        return 0;
    usage(stderr);
    return 3;
}

int bench_serve(int argc, char **argv)
{
    struct settings s = {.threads = "0",
                         .levels = {1, 16, 128, 512},
                         .n_levels = 4,
                         .rounds = 2,
                         .prompt_tokens = 32,
                         .max_tokens = 64};
    int code = parse(&s, argc, argv);
    if (code)
        return code - 1;
    curl_global_init(CURL_GLOBAL_DEFAULT);
    char base[512];
    pid_t pid = 0;
    if (s.url) {
        snprintf(base, sizeof(base), "%s", s.url);
    } else {
        int port = free_port();
        snprintf(base, sizeof(base), "http://127.0.0.1:%d", port);
        pid = start_server(&s, port);
    }
    bool ok = pid >= 0 && wait_ready(base, pid);
    if (!ok)
        fprintf(stderr, "latte-bench serve: no server became ready at %s\n", base);
    if (ok && !s.json)
        printf("%s; %s; %d prompt words, %d tokens generated; the client runs on the same "
               "cores\n\n"
               "| streams | requests | failed | TTFT p50 | TTFT p99 | gap p50   | gap p99   | "
               "tokens/s |\n"
               "|---------|----------|--------|----ms-----|----ms-----|----ms-----|----ms-----|----"
               "------|\n",
               bench_machine(), s.model_dir ? s.model_dir : s.url, s.prompt_tokens, s.max_tokens);
    int seed = 0;
    bool good = ok;
    for (int i = 0; ok && i < s.n_levels; i++)
        good &= run_level(&s, base, s.levels[i], &seed);
    if (pid > 0) {
        kill(pid, SIGTERM);
        waitpid(pid, NULL, 0);
    }
    curl_global_cleanup();
    return good ? 0 : 1;
}
