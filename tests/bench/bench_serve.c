/* bench_serve.c - latte-bench serve: time to first token, time between events and throughput
 * through HTTP, with N streams at once. Starts a server of its own, a process on the loopback,
 * unless --url names one. The streams are shared out to client threads, so that the server is what
 * is measured. */
#include <curl/curl.h>
#include <errno.h>
#include <getopt.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "engine/cores.h"
#include "tests/bench/bench.h"
#include "tests/bench/bench_load.h"
#include "tests/bench/bench_random.h"
#include "tests/bench/bench_server.h"

enum {
    MAX_STREAMS = 4096,
    MAX_LEVELS = 16,
    MIN_REQUESTS = 32, /* of a level: a median of two says nothing */
    MAX_SERVER_ARGS = 32,
};

struct settings {
    const char *model_dir, *random, *url, *threads, *device;
    char **server_args; /* what follows "--": options for the server */
    int n_server_args, n_clients;
    int levels[MAX_LEVELS], n_levels; /* numbers of streams */
    int rounds;                       /* requests each stream sends, one after the other */
    int prompt_tokens, max_tokens;
    bool json;
};

static void print_level(const struct settings *settings, struct load_counts *c, int n,
                        double seconds)
{
    double t50 = bench_quantile(c->ttft.values, c->ttft.n, 0.5) * 1e3;
    double t99 = bench_quantile(c->ttft.values, c->ttft.n, 0.99) * 1e3;
    double g50 = bench_quantile(c->gaps.values, c->gaps.n, 0.5) * 1e3;
    double g99 = bench_quantile(c->gaps.values, c->gaps.n, 0.99) * 1e3;
    double rate = (double)c->n_tokens / seconds;
    if (settings->json)
        printf("{\"kind\":\"serve\",\"streams\":%d,\"requests\":%ld,\"failed\":%ld,"
               "\"ttft_p50_ms\":%.3f,\"ttft_p99_ms\":%.3f,\"itl_p50_ms\":%.3f,"
               "\"itl_p99_ms\":%.3f,\"events_per_second\":%.1f,\"tokens_per_second\":%.1f}\n",
               n, c->n_requests, c->n_failed, t50, t99, g50, g99,
               (double)(c->gaps.n + c->ttft.n) / seconds, rate);
    else
        printf("| %7d | %8ld | %6ld | %9.1f | %9.1f | %9.2f | %9.2f | %8.0f |\n", n, c->n_requests,
               c->n_failed, t50, t99, g50, g99, rate);
    fflush(stdout);
}

static bool run_level(const struct settings *settings, const char *base, int n)
{
    const int least = (MIN_REQUESTS + n - 1) / n;
    const struct load load = {.base = base,
                              .n_clients = settings->n_clients,
                              .rounds = settings->rounds > least ? settings->rounds : least,
                              .prompt_tokens = settings->prompt_tokens,
                              .max_tokens = settings->max_tokens,
                              .token_ids = settings->random != NULL};
    struct load_counts counts;
    const double started = bench_now();
    bool ok = load_run(&load, n, &counts);
    if (ok)
        print_level(settings, &counts, n, bench_now() - started);
    ok = ok && counts.n_failed == 0;
    load_free(&counts);
    return ok;
}

/* The server's arguments: the bench's own, and those behind "--". */
static void fill_args(const struct settings *settings, const char *model_dir, char slots[16],
                      const char **args)
{
    int n = 0, most = 1;
    for (int i = 0; i < settings->n_levels; i++)
        most = settings->levels[i] > most ? settings->levels[i] : most;
    snprintf(slots, 16, "%d", most);
    const char *const fixed[] = {"--model",     model_dir,       "--max-slots", slots,
                                 "--max-queue", "4096",          "--threads",   settings->threads,
                                 "--device",    settings->device};
    for (size_t i = 0; i < sizeof(fixed) / sizeof(*fixed); i++)
        args[n++] = fixed[i];
    for (int i = 0; i < settings->n_server_args; i++)
        args[n++] = settings->server_args[i];
    args[n] = NULL;
}

static void usage(FILE *out)
{
    fprintf(out,
            "usage: latte-bench serve (-m DIR | --random SHAPE | --url URL) [options]\n"
            "                         [-- options of latte-server]\n"
            "  -m, --model DIR      start latte-server with this model on a free loopback port\n"
            "      --random SHAPE   the same with random weights: %s\n"
            "      --url URL        measure a server that runs already (http://127.0.0.1:8080)\n"
            "      --device NAME    of the server (default auto)\n"
            "      --streams LIST   streams at once, comma separated (default 1,16,128,512)\n"
            "      --rounds N       requests each stream sends (default 2; at least 32 in all)\n"
            "      --prompt-tokens N  words of prompt, with --random tokens (default 32)\n"
            "      --max-tokens N   tokens generated per request (default 64)\n"
            "      --threads N      the server's compute threads (default 0: all cores)\n"
            "      --clients N      client threads (default: a quarter of the cores)\n"
            "      --json           one JSON object a line instead of a table\n",
            random_model_names());
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

static bool parse_option(struct settings *s, int option)
{
    switch (option) {
    case 'm':
        s->model_dir = optarg;
        return true;
    case 'R':
        s->random = optarg;
        return true;
    case 'u':
        s->url = optarg;
        return true;
    case 'd':
        s->device = optarg;
        return true;
    case 's':
        return parse_levels(s, optarg);
    case 'r':
        return parse_count(&s->rounds, optarg, 1000);
    case 'p':
        return parse_count(&s->prompt_tokens, optarg, 100000);
    case 'n':
        return parse_count(&s->max_tokens, optarg, 100000);
    case 'c':
        return parse_count(&s->n_clients, optarg, LOAD_MAX_CLIENTS);
    case 't':
        s->threads = optarg;
        return true;
    case 'j':
        return s->json = true;
    default:
        return false;
    }
}

/* 0 to go on, else the exit code plus one. */
static int parse(struct settings *s, int argc, char **argv)
{
    static const struct option options[] = {{"model", 1, 0, 'm'},
                                            {"random", 1, 0, 'R'},
                                            {"url", 1, 0, 'u'},
                                            {"device", 1, 0, 'd'},
                                            {"streams", 1, 0, 's'},
                                            {"rounds", 1, 0, 'r'},
                                            {"prompt-tokens", 1, 0, 'p'},
                                            {"max-tokens", 1, 0, 'n'},
                                            {"threads", 1, 0, 't'},
                                            {"clients", 1, 0, 'c'},
                                            {"json", 0, 0, 'j'},
                                            {"help", 0, 0, 'h'},
                                            {0, 0, 0, 0}};
    bool ok = true;
    for (int c; ok && (c = getopt_long(argc, argv, "m:h", options, NULL)) != -1;) {
        if (c == 'h') {
            usage(stdout);
            return 1;
        }
        ok = parse_option(s, c);
    }
    if (optind > 1 && !strcmp(argv[optind - 1], "--")) {
        s->server_args = argv + optind;
        s->n_server_args = argc - optind;
        optind = argc;
    }
    if (ok && optind == argc && s->n_server_args <= MAX_SERVER_ARGS &&
        !!s->model_dir + !!s->random + !!s->url == 1)
        return 0;
    usage(stderr);
    return 3;
}

/* A stream is a socket here. */
static void raise_file_limit(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
}

static bool measure(const struct settings *s, const char *base)
{
    if (!s->json)
        printf("%s; %s; prompts of %d, %d tokens generated; %d client threads on the same "
               "machine\n\n"
               "| streams | requests | failed | TTFT p50 | TTFT p99 | gap p50   | gap p99   | "
               "tokens/s |\n"
               "|---------|----------|--------|----ms-----|----ms-----|----ms-----|----ms-----|----"
               "------|\n",
               bench_machine(),
               s->model_dir ? s->model_dir
               : s->random  ? s->random
                            : s->url,
               s->prompt_tokens, s->max_tokens, s->n_clients);
    bool good = true;
    for (int i = 0; i < s->n_levels; i++)
        good &= run_level(s, base, s->levels[i]);
    return good;
}

/* Serve a model directory for as long as the measurement takes. */
static bool measure_own(const struct settings *s, const char *model_dir)
{
    char base[64], slots[16];
    const char *args[MAX_SERVER_ARGS + 16];
    const int port = bench_free_port();
    snprintf(base, sizeof(base), "http://127.0.0.1:%d", port);
    fill_args(s, model_dir, slots, args);
    const pid_t pid = bench_server_start(args, port);
    bool ok = pid >= 0 && bench_server_await(base, pid);
    if (!ok)
        fprintf(stderr, "latte-bench serve: no server became ready at %s\n", base);
    ok = ok && measure(s, base);
    bench_server_stop(pid);
    return ok;
}

static bool measure_random(const struct settings *s)
{
    char dir[4000];
    if (random_model_write(s->random, 0, dir, sizeof(dir)))
        return false;
    const bool ok = measure_own(s, dir);
    random_model_remove(dir);
    return ok;
}

static bool measure_other(const struct settings *s)
{
    if (bench_server_await(s->url, 0))
        return measure(s, s->url);
    fprintf(stderr, "latte-bench serve: no server is ready at %s\n", s->url);
    return false;
}

int bench_serve(int argc, char **argv)
{
    struct settings s = {.threads = "0",
                         .device = "auto",
                         .n_clients = (cores_available() + 3) / 4,
                         .levels = {1, 16, 128, 512},
                         .n_levels = 4,
                         .rounds = 2,
                         .prompt_tokens = 32,
                         .max_tokens = 64};
    if (s.n_clients > LOAD_MAX_CLIENTS)
        s.n_clients = LOAD_MAX_CLIENTS;
    int code = parse(&s, argc, argv);
    if (code)
        return code - 1;
    raise_file_limit();
    curl_global_init(CURL_GLOBAL_DEFAULT);
    const bool ok = s.url      ? measure_other(&s)
                    : s.random ? measure_random(&s)
                               : measure_own(&s, s.model_dir);
    curl_global_cleanup();
    return ok ? 0 : 1;
}
