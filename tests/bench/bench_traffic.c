/* bench_traffic.c - latte-bench load: its options, and the order of things. */
#include <curl/curl.h>
#include <errno.h>
#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "tests/bench/bench.h"
#include "tests/bench/bench_traffic.h"

static void usage(FILE *out)
{
    fputs("usage: latte-bench load --url URL [options]\n"
          "Streams completions from any OpenAI-compatible server and times what comes.\n"
          "      --url URL            the server, http://127.0.0.1:8080 (without /v1)\n"
          "      --model NAME         default: the first one of GET /v1/models\n"
          "      --api-key-env VAR    the environment variable with the API key\n"
          "      --cacert FILE        the certificates to trust, of an https:// URL\n"
          "      --endpoint NAME      completions (default) or chat\n"
          "      --rate R             send R requests a second, whatever comes back\n"
          "      --burstiness X       of their arrivals: 1 is Poisson (default), above steadier,\n"
          "                           below burstier, inf constant\n"
          "      --concurrency N      keep N requests open instead (default 1)\n"
          "      --requests N         how many in all (default 100, with --duration no limit)\n"
          "      --duration S         begin no request after S seconds\n"
          "      --input-tokens N     words of the prompts, about one token each; N-M: between\n"
          "                           both, uniformly (default 32)\n"
          "      --prompts FILE       a prompt a line, drawn at random, instead\n"
          "      --output-tokens N    max_tokens, N or N-M (default 64)\n"
          "      --ignore-eos         ask for all of them; servers that do not know it may refuse\n"
          "      --temperature X      default: the server's\n"
          "      --slo LIST           goodput: ttft:200,tpot:50,e2e:5000 in ms, some or all\n"
          "      --timeout S          of one request (default 600)\n"
          "      --warmup N           requests before, not measured (default 1)\n"
          "      --seed N             of prompts and arrivals (default 0)\n"
          "      --json FILE          write the results there too; - for JSON alone on stdout\n"
          "TTFT: sent to the first event with text. ITL: between two such events. TPOT: from the\n"
          "first to the last of them by (output tokens - 1), a figure a request. E2E: sent to the\n"
          "last. Tokens are those of the server's usage.\n",
          out);
}

static bool parse_number(double *out, const char *text, double low, double high)
{
    char *rest;
    double value = strtod(text, &rest);
    if (rest == text || *rest || !(value >= low && value <= high))
        return false;
    *out = value;
    return true;
}

static bool parse_count(long *out, const char *text, long low, long high)
{
    char *rest;
    errno = 0;
    long value = strtol(text, &rest, 10);
    if (errno || rest == text || *rest || value < low || value > high)
        return false;
    *out = value;
    return true;
}

static bool parse_int(int *out, const char *text, int low, int high)
{
    long value;
    if (!parse_count(&value, text, low, high))
        return false;
    *out = (int)value;
    return true;
}

/* "32" or "16-64" */
static bool parse_range(struct traffic_range *out, const char *text)
{
    enum { MOST = 10000000 };
    char *rest;
    long low = strtol(text, &rest, 10), high = low;
    if (rest != text && *rest == '-')
        high = strtol(rest + 1, &rest, 10);
    if (rest == text || *rest || low < 1 || high < low || high > MOST)
        return false;
    *out = (struct traffic_range){(int)low, (int)high};
    return true;
}

/* "ttft:200,tpot:50,e2e:5000" */
static bool parse_slo(struct traffic_settings *s, const char *text)
{
    const struct {
        const char *name;
        double *limit;
    } slos[] = {{"ttft:", &s->slo_ttft_ms}, {"tpot:", &s->slo_tpot_ms}, {"e2e:", &s->slo_e2e_ms}};
    while (*text) {
        size_t i = 0, n = sizeof(slos) / sizeof(*slos);
        while (i < n && strncmp(text, slos[i].name, strlen(slos[i].name)))
            i++;
        if (i == n)
            return false;
        char *rest;
        const char *number = text + strlen(slos[i].name);
        *slos[i].limit = strtod(number, &rest);
        if (rest == number || !(*slos[i].limit > 0) || (*rest && *rest != ','))
            return false;
        text = *rest ? rest + 1 : rest;
    }
    return true;
}

static bool parse_endpoint(struct traffic_settings *s, const char *text)
{
    s->chat = !strcmp(text, "chat");
    return s->chat || !strcmp(text, "completions");
}

static bool take_key(struct traffic_settings *s, const char *variable)
{
    s->key = getenv(variable);
    if (!s->key)
        fprintf(stderr, "latte-bench load: the environment has no %s\n", variable);
    return s->key;
}

static const struct option options[] = {{"url", 1, 0, 'u'},           {"model", 1, 0, 'm'},
                                        {"api-key-env", 1, 0, 'k'},   {"cacert", 1, 0, 'C'},
                                        {"endpoint", 1, 0, 'e'},      {"rate", 1, 0, 'r'},
                                        {"burstiness", 1, 0, 'b'},    {"concurrency", 1, 0, 'c'},
                                        {"requests", 1, 0, 'n'},      {"duration", 1, 0, 'd'},
                                        {"input-tokens", 1, 0, 'i'},  {"prompts", 1, 0, 'p'},
                                        {"output-tokens", 1, 0, 'o'}, {"ignore-eos", 0, 0, 'E'},
                                        {"temperature", 1, 0, 'T'},   {"slo", 1, 0, 's'},
                                        {"timeout", 1, 0, 't'},       {"warmup", 1, 0, 'w'},
                                        {"seed", 1, 0, 'S'},          {"json", 1, 0, 'j'},
                                        {"help", 0, 0, 'h'},          {0, 0, 0, 0}};

static bool parse_option(struct traffic_settings *s, int option)
{
    long seed;
    switch (option) {
    case 'u':
        s->url = optarg;
        return !strncmp(optarg, "http://", 7) || !strncmp(optarg, "https://", 8);
    case 'm':
        s->model = optarg;
        return *optarg;
    case 'k':
        return take_key(s, optarg);
    case 'C':
        s->cacert = optarg;
        return true;
    case 'e':
        return parse_endpoint(s, optarg);
    case 'r':
        return parse_number(&s->rate, optarg, 1e-3, 1e5);
    case 'b':
        return parse_number(&s->burstiness, optarg, 1e-3, INFINITY);
    case 'c':
        return parse_int(&s->concurrency, optarg, 1, TRAFFIC_MAX_CONCURRENCY);
    case 'n':
        return parse_count(&s->n_requests, optarg, 1, 100000000);
    case 'd':
        return parse_number(&s->duration_s, optarg, 1e-3, 1e7);
    case 'i':
        return parse_range(&s->input, optarg);
    case 'p':
        s->prompt_file = optarg;
        return true;
    case 'o':
        return parse_range(&s->output, optarg);
    case 'E':
        return s->ignore_eos = true;
    case 'T':
        return parse_number(&s->temperature, optarg, 0, 100);
    case 's':
        return parse_slo(s, optarg);
    case 't':
        return parse_number(&s->timeout_s, optarg, 1e-3, 1e5);
    case 'w':
        return parse_int(&s->n_warmup, optarg, 0, 100000);
    case 'S':
        s->seed = parse_count(&seed, optarg, 0, 1L << 62) ? (uint64_t)seed : 0;
        return parse_count(&seed, optarg, 0, 1L << 62);
    case 'j':
        s->json_path = optarg;
        return true;
    default:
        return false;
    }
}

/* 0 to go on, else the exit code plus one. */
static int parse(struct traffic_settings *s, int argc, char **argv)
{
    for (int c, i = 0; (c = getopt_long(argc, argv, "h", options, &i)) != -1;) {
        if (c == 'h') {
            usage(stdout);
            return 1;
        }
        if (c == '?')
            return 3;
        if (!parse_option(s, c)) {
            fprintf(stderr, "latte-bench load: --%s: '%s' is not what it takes; see --help\n",
                    options[i].name, optarg);
            return 3;
        }
    }
    const char *wrong = NULL;
    if (optind != argc)
        wrong = "expected options alone";
    else if (!s->url)
        wrong = "expected --url URL, found none";
    else if (s->rate > 0 && s->concurrency)
        wrong = "expected --rate or --concurrency, found both";
    else if (s->prompt_file && s->input.low)
        wrong = "expected --prompts or --input-tokens, found both";
    if (wrong)
        fprintf(stderr, "latte-bench load: %s; see --help\n", wrong);
    return wrong ? 3 : 0;
}

static void fill_defaults(struct traffic_settings *s)
{
    if (!s->concurrency)
        s->concurrency = 1;
    if (!s->n_requests && s->duration_s <= 0)
        s->n_requests = 100;
    if (!s->input.low)
        s->input = (struct traffic_range){32, 32};
}

/* A request is a socket here. */
static void raise_file_limit(void)
{
    struct rlimit limit;
    if (!getrlimit(RLIMIT_NOFILE, &limit)) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
}

static bool run_load(struct traffic_settings *s)
{
    static char name[300];
    struct traffic_prompts prompts = {0};
    struct traffic_run run = {0};
    if (!s->model && traffic_find_model(s, name, sizeof(name)))
        s->model = name;
    bool ok = s->model && traffic_prompts_open(&prompts, s->prompt_file) &&
              traffic_send(s, &prompts, &run);
    if (ok && !(s->json_path && !strcmp(s->json_path, "-")))
        traffic_table(s, &run);
    if (ok && s->json_path)
        ok = traffic_json(s, &run);
    ok = ok && run.n_completed > 0;
    traffic_free(&run);
    traffic_prompts_free(&prompts);
    return ok;
}

int bench_traffic(int argc, char **argv)
{
    struct traffic_settings s = {.burstiness = 1,
                                 .timeout_s = 600,
                                 .n_warmup = 1,
                                 .temperature = -1,
                                 .output = {64, 64},
                                 .slo_ttft_ms = INFINITY,
                                 .slo_tpot_ms = INFINITY,
                                 .slo_e2e_ms = INFINITY};
    int code = parse(&s, argc, argv);
    if (code)
        return code - 1;
    fill_defaults(&s);
    raise_file_limit();
    curl_global_init(CURL_GLOBAL_DEFAULT);
    const bool ok = run_load(&s);
    curl_global_cleanup();
    return ok ? 0 : 1;
}
