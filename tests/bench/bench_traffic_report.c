/* bench_traffic_report.c - see bench_traffic.h; README.md defines the figures. */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tests/bench/bench.h"
#include "tests/bench/bench_traffic.h"

enum { N_LATENCIES = 4, BAR_WIDTH = 30 };

/* Milliseconds. */
struct latency {
    const char *label, *name;
    struct samples samples;
    double mean, p50, p90, p99;
};

struct summary {
    struct latency latencies[N_LATENCIES]; /* TTFT, TPOT, ITL, E2E */
    double duration_s;
    long input_tokens, output_tokens; /* of completed requests */
    size_t n_without_usage, n_good;
};

static double ttft_ms(const struct traffic_record *r)
{
    return (r->first - r->started) * 1e3;
}

static double e2e_ms(const struct traffic_record *r)
{
    return (r->last - r->started) * 1e3;
}

/* NAN for an answer of one token, which has no time between tokens. */
static double tpot_ms(const struct traffic_record *r)
{
    if (r->output_tokens < 2)
        return NAN;
    return (r->last - r->first) * 1e3 / (double)(r->output_tokens - 1);
}

static bool is_good(const struct traffic_settings *s, const struct traffic_record *r)
{
    return ttft_ms(r) <= s->slo_ttft_ms && !(tpot_ms(r) > s->slo_tpot_ms) &&
           e2e_ms(r) <= s->slo_e2e_ms;
}

static void reduce(struct latency *l)
{
    double sum = 0;
    for (size_t i = 0; i < l->samples.n; i++)
        sum += l->samples.values[i];
    l->mean = l->samples.n ? sum / (double)l->samples.n : NAN;
    l->p50 = bench_quantile(l->samples.values, l->samples.n, 0.5);
    l->p90 = bench_quantile(l->samples.values, l->samples.n, 0.9);
    l->p99 = bench_quantile(l->samples.values, l->samples.n, 0.99);
    free(l->samples.values);
    l->samples = (struct samples){0};
}

static struct summary summarize(const struct traffic_settings *s, const struct traffic_run *run)
{
    struct summary sum = {.latencies = {{"TTFT", "ttft_ms", {0}, 0, 0, 0, 0},
                                        {"TPOT", "tpot_ms", {0}, 0, 0, 0, 0},
                                        {"ITL", "itl_ms", {0}, 0, 0, 0, 0},
                                        {"E2E", "e2e_ms", {0}, 0, 0, 0, 0}},
                          .duration_s = run->ended - run->began};
    for (size_t i = 0; i < run->n; i++) {
        const struct traffic_record *r = &run->records[i];
        if (r->reason)
            continue;
        sum.input_tokens += r->prompt_tokens;
        sum.output_tokens += r->output_tokens;
        sum.n_without_usage += !r->has_usage;
        sum.n_good += is_good(s, r);
        samples_add(&sum.latencies[0].samples, ttft_ms(r));
        if (!isnan(tpot_ms(r)))
            samples_add(&sum.latencies[1].samples, tpot_ms(r));
        samples_add(&sum.latencies[3].samples, e2e_ms(r));
    }
    for (size_t i = 0; i < run->gaps.n; i++)
        samples_add(&sum.latencies[2].samples, run->gaps.values[i] * 1e3);
    for (int i = 0; i < N_LATENCIES; i++)
        reduce(&sum.latencies[i]);
    return sum;
}

static bool has_slo(const struct traffic_settings *s)
{
    return !isinf(s->slo_ttft_ms) || !isinf(s->slo_tpot_ms) || !isinf(s->slo_e2e_ms);
}

static double per_second(double n, const struct summary *sum)
{
    return sum->duration_s > 0 ? n / sum->duration_s : 0;
}

/* The table. */

static void print_load(const struct traffic_settings *s)
{
    printf("%s  %s  %s\n", s->url, s->model, s->chat ? "chat" : "completions");
    if (s->rate > 0 && isinf(s->burstiness))
        printf("load        %g requests/s, constant\n", s->rate);
    else if (s->rate > 0)
        printf("load        %g requests/s, %s", s->rate,
               s->burstiness == 1 ? "Poisson\n" : "gamma arrivals, ");
    else
        printf("load        %d requests at once\n", s->concurrency);
    if (s->rate > 0 && !isinf(s->burstiness) && s->burstiness != 1)
        printf("burstiness %g\n", s->burstiness);
}

static void print_counts(const struct traffic_run *run, const struct summary *sum)
{
    printf("requests    %zu sent, %zu completed, %zu failed", run->n_sent, run->n_completed,
           run->n - run->n_completed);
    for (int i = 0; i < run->n_reasons; i++)
        printf("%s%ld %s", i ? ", " : ": ", run->reasons[i].n, run->reasons[i].text);
    printf("\nduration    %.2f s\n", sum->duration_s);
    printf("throughput  %.2f requests/s, %.1f output tokens/s",
           per_second((double)run->n_completed, sum), per_second((double)sum->output_tokens, sum));
    if (sum->n_without_usage)
        printf("\n            output tokens are COUNTED EVENTS for %zu requests without usage; "
               "input is unknown\n",
               sum->n_without_usage);
    else
        printf(", %.1f tokens/s with input\n",
               per_second((double)(sum->input_tokens + sum->output_tokens), sum));
    if (!sum->n_without_usage && run->n_completed)
        printf("tokens      %.1f in, %.1f out for each request\n",
               (double)sum->input_tokens / (double)run->n_completed,
               (double)sum->output_tokens / (double)run->n_completed);
}

static void print_slo(const struct traffic_settings *s, const struct traffic_run *run,
                      const struct summary *sum)
{
    printf("goodput     %.2f requests/s, %.1f %% of those sent, within",
           per_second((double)sum->n_good, sum),
           run->n_sent ? 100.0 * (double)sum->n_good / (double)run->n_sent : 0);
    if (!isinf(s->slo_ttft_ms))
        printf(" TTFT %g ms", s->slo_ttft_ms);
    if (!isinf(s->slo_tpot_ms))
        printf(" TPOT %g ms", s->slo_tpot_ms);
    if (!isinf(s->slo_e2e_ms))
        printf(" E2E %g ms", s->slo_e2e_ms);
    printf("\n");
}

void traffic_table(const struct traffic_settings *s, const struct traffic_run *run)
{
    struct summary sum = summarize(s, run);
    print_load(s);
    print_counts(run, &sum);
    if (has_slo(s))
        print_slo(s, run, &sum);
    if (s->rate > 0 && run->max_lag_s > 0.05)
        printf("note        a request left %.0f ms later than planned: this client was busy\n",
               run->max_lag_s * 1e3);
    printf("\n%-6s %10s %10s %10s %10s\n", "ms", "mean", "p50", "p90", "p99");
    for (int i = 0; i < N_LATENCIES; i++) {
        const struct latency *l = &sum.latencies[i];
        if (isnan(l->mean))
            printf("%-6s %10s %10s %10s %10s\n", l->label, "-", "-", "-", "-");
        else
            printf("%-6s %10.2f %10.2f %10.2f %10.2f\n", l->label, l->mean, l->p50, l->p90, l->p99);
    }
    fflush(stdout);
}

/* JSON. */

static void add_number(struct bytes *out, const char *name, double value)
{
    bytes_format(out, ",\"%s\":", name);
    bytes_json_number(out, value); /* null for what is no number */
}

static void add_string(struct bytes *out, const char *name, const char *value)
{
    bytes_format(out, ",\"%s\":", name);
    bytes_json_lossy(out, value, strlen(value));
}

static void add_settings(struct bytes *out, const struct traffic_settings *s)
{
    bytes_text(out, "{\"kind\":\"load\"");
    add_string(out, "url", s->url);
    add_string(out, "model", s->model);
    add_string(out, "endpoint", s->chat ? "chat/completions" : "completions");
    add_number(out, "request_rate", s->rate > 0 ? s->rate : NAN);
    add_number(out, "burstiness", s->rate > 0 ? s->burstiness : NAN);
    add_number(out, "concurrency", s->rate > 0 ? NAN : s->concurrency);
    bytes_format(out, ",\"ignore_eos\":%s", s->ignore_eos ? "true" : "false");
    bytes_text(out, ",\"slo_ms\":{\"ttft\":");
    bytes_json_number(out, s->slo_ttft_ms);
    add_number(out, "tpot", s->slo_tpot_ms);
    add_number(out, "e2e", s->slo_e2e_ms);
    bytes_char(out, '}');
}

static void add_results(struct bytes *out, const struct traffic_settings *s,
                        const struct traffic_run *run)
{
    struct summary sum = summarize(s, run);
    const double input = sum.n_without_usage ? NAN : (double)sum.input_tokens;
    add_number(out, "n_sent", (double)run->n_sent);
    add_number(out, "n_completed", (double)run->n_completed);
    add_number(out, "n_failed", (double)(run->n - run->n_completed));
    bytes_text(out, ",\"errors\":{");
    for (int i = 0; i < run->n_reasons; i++) {
        bytes_text(out, i ? "," : "");
        bytes_json_lossy(out, run->reasons[i].text, strlen(run->reasons[i].text));
        bytes_format(out, ":%ld", run->reasons[i].n);
    }
    bytes_char(out, '}');
    add_number(out, "duration_s", sum.duration_s);
    add_number(out, "max_send_lag_ms", run->max_lag_s * 1e3);
    add_string(out, "tokens_from", sum.n_without_usage ? "events" : "usage");
    add_number(out, "input_tokens", input);
    add_number(out, "output_tokens", (double)sum.output_tokens);
    add_number(out, "request_throughput", per_second((double)run->n_completed, &sum));
    add_number(out, "output_token_throughput", per_second((double)sum.output_tokens, &sum));
    add_number(out, "total_token_throughput", per_second(input + (double)sum.output_tokens, &sum));
    add_number(out, "goodput", has_slo(s) ? per_second((double)sum.n_good, &sum) : NAN);
    for (int i = 0; i < N_LATENCIES; i++) {
        const struct latency *l = &sum.latencies[i];
        bytes_format(out, ",\"%s\":{\"mean\":", l->name);
        bytes_json_number(out, l->mean);
        add_number(out, "p50", l->p50);
        add_number(out, "p90", l->p90);
        add_number(out, "p99", l->p99);
        bytes_char(out, '}');
    }
    bytes_text(out, "}\n");
}

bool traffic_json(const struct traffic_settings *s, const struct traffic_run *run)
{
    struct bytes out = {0};
    const bool to_stdout = !strcmp(s->json_path, "-");
    add_settings(&out, s);
    add_results(&out, s, run);
    FILE *f = to_stdout ? stdout : fopen(s->json_path, "w");
    bool ok = f && !out.failed && fwrite(out.data, 1, out.n, f) == out.n && !fflush(f);
    if (!ok)
        fprintf(stderr, "latte-bench load: %s: %s\n", s->json_path, strerror(errno));
    if (f && !to_stdout)
        fclose(f);
    bytes_free(&out);
    return ok;
}

/* Progress. */

void traffic_progress(const struct traffic_settings *s, const struct traffic_run *run,
                      size_t n_open, bool is_last)
{
    if (!isatty(STDERR_FILENO))
        return;
    static const char bar[] = "##############################";
    double share = 0, elapsed = bench_now() - run->began;
    if (s->n_requests)
        share = (double)run->n / (double)s->n_requests;
    if (s->duration_s > 0)
        share = fmax(share, fmin(1, elapsed / s->duration_s));
    fprintf(stderr, "\r[%-*.*s] %zu done, %zu open, %zu failed, %.0f s \033[K", BAR_WIDTH,
            (int)(fmin(1, share) * BAR_WIDTH), bar, run->n, n_open, run->n - run->n_completed,
            elapsed);
    if (is_last)
        fprintf(stderr, "\r\033[K");
    fflush(stderr);
}
