/* bench_main.c - latte-bench: measure the engine, or a server through HTTP. */
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "engine/build_info.h"
#include "tests/bench/bench.h"

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double bench_quantile(double *values, size_t n, double p)
{
    if (n == 0)
        return __builtin_nan("");
    qsort(values, n, sizeof(*values), compare);
    double at = p * (double)(n - 1);
    size_t i = (size_t)at;
    double rest = at - (double)i;
    return i + 1 < n ? values[i] * (1 - rest) + values[i + 1] * rest : values[i];
}

double bench_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* The value of the first "key : value" line of /proc/cpuinfo. */
static void cpu_name(char *out, size_t size)
{
    snprintf(out, size, "unknown CPU");
    FILE *f = fopen("/proc/cpuinfo", "r");
    char line[256];
    while (f && fgets(line, sizeof(line), f)) {
        if (strncmp(line, "model name", 10) != 0)
            continue;
        char *value = strchr(line, ':');
        if (value)
            snprintf(out, size, "%.*s", (int)strcspn(value + 2, "\n"), value + 2);
        break;
    }
    if (f)
        fclose(f);
}

static const char *vector_unit(void)
{
    if (__builtin_cpu_supports("avx512f"))
        return "AVX-512";
    return __builtin_cpu_supports("avx2") ? "AVX2" : "no AVX2";
}

const char *bench_machine(void)
{
    static char text[320];
    char cpu[200];
    cpu_name(cpu, sizeof(cpu));
    cpu_set_t set;
    int n = sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 0;
    snprintf(text, sizeof(text), "%s, %d cores, %s", cpu, n, vector_unit());
    return text;
}

static int usage(FILE *out)
{
    fputs("usage: latte-bench engine -m DIR [options]   prefill, decode, time by position\n"
          "       latte-bench serve  -m DIR [options]   latency and throughput through HTTP\n"
          "       latte-bench load   --url URL [options] any OpenAI-compatible server under load\n"
          "       latte-bench sessions -m DIR [options] what sessions cost, at any age\n"
          "Each subcommand prints its options with --help; latte-bench --version tells of the "
          "build.\n",
          out);
    return out == stderr ? 2 : 0;
}

int main(int argc, char **argv)
{
    if (argc < 2)
        return usage(stderr);
    if (!strcmp(argv[1], "--version")) {
        build_info_print(stdout, "latte-bench");
        return 0;
    }
    if (!strcmp(argv[1], "engine"))
        return bench_engine(argc - 1, argv + 1);
    if (!strcmp(argv[1], "serve"))
        return bench_serve(argc - 1, argv + 1);
    if (!strcmp(argv[1], "load"))
        return bench_traffic(argc - 1, argv + 1);
    if (!strcmp(argv[1], "sessions"))
        return bench_sessions(argc - 1, argv + 1);
    return usage(!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h") ? stdout : stderr);
}
