/* bench_report.c - see bench_engine.h: tables for people, JSON or CSV lines for programs. */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "engine/base/bytes.h"
#include "tests/bench/bench.h"
#include "tests/bench/bench_engine.h"

static const char *model_name(const struct bench *b)
{
    return b->set.random ? b->set.random : b->set.model_dir;
}

/* The GPU's name, or the processor's. */
static const char *machine_of(const struct bench *b)
{
    static struct backend_memory memory;
    return model_memory(b->model, &memory) ? memory.device : bench_machine();
}

static void put_line(struct bytes *line)
{
    puts(line->failed ? "" : line->data);
    fflush(stdout);
    bytes_free(line);
}

static void json_member(struct bytes *out, const char *name, const char *value)
{
    bytes_format(out, ",\"%s\":", name);
    bytes_json_string(out, value, strlen(value));
}

static void setup_json(const struct bench *b)
{
    struct backend_memory memory = {0};
    struct bytes line = {0};
    model_memory(b->model, &memory);
    bytes_text(&line, "{\"kind\":\"setup\"");
    json_member(&line, "machine", machine_of(b));
    json_member(&line, "model", model_name(b));
    json_member(&line, "backend", model_backend_name(b->model));
    json_member(&line, "weight_dtype", b->set.weight_dtype);
    json_member(&line, "window_dtype", b->set.window_dtype);
    bytes_format(&line,
                 ",\"parameters\":%lld,\"threads\":%d,\"slots\":%d,\"step_rows\":%d,"
                 "\"deterministic\":%s,\"composed\":%s,\"weight_bytes\":%zu,\"state_bytes\":%zu,"
                 "\"workspace_bytes\":%zu,\"free_bytes\":%zu}",
                 (long long)b->n_parameters, b->set.n_threads, b->n_slots, b->max_rows,
                 b->set.deterministic ? "true" : "false", b->set.composed ? "true" : "false",
                 model_weight_bytes(b->model), model_state_bytes(b->model), memory.workspace_bytes,
                 memory.free_bytes);
    put_line(&line);
}

static void setup_text(const struct bench *b)
{
    const struct model *m = b->model;
    struct backend_memory memory;
    printf("machine  %s\n", machine_of(b));
    printf("model    %s%s, %.1fM parameters\n", model_name(b),
           b->set.random ? " (random weights)" : "", (double)b->n_parameters / 1e6);
    printf("engine   %s backend%s%s, %s weights of %.1f MB, %d slots of %.2f MB (%s window), steps "
           "of up to %d rows\n",
           model_backend_name(m), b->set.deterministic ? ", deterministic" : "",
           b->set.composed ? ", no fused layers" : "", b->set.weight_dtype,
           (double)model_weight_bytes(m) / 1e6, b->n_slots, (double)model_state_bytes(m) / 1e6,
           b->set.window_dtype, b->max_rows);
    if (model_memory(m, &memory))
        printf("memory   %.2f GB: matrices %.2f, states and activations %.2f, workspace %.2f, free "
               "%.2f\n",
               (double)memory.total_bytes / 1e9, (double)memory.weight_bytes / 1e9,
               (double)memory.buffer_bytes / 1e9, (double)memory.workspace_bytes / 1e9,
               (double)memory.free_bytes / 1e9);
    else
        printf("threads  %d\n", b->set.n_threads);
    if (b->set.bandwidth)
        printf("floor    bytes of weights and states at %d GB/s; prompts: or products at %d "
               "TFLOP/s\n",
               b->set.bandwidth, b->set.tflops);
}

void bench_report_setup(struct bench *b)
{
    if (b->set.output == OUTPUT_JSON)
        setup_json(b);
    if (b->set.output == OUTPUT_TABLES)
        setup_text(b);
    fflush(stdout);
}

static void append_number(struct bytes *line, const struct bench_column *c, const char *unknown)
{
    if (isnan(c->value))
        bytes_text(line, unknown);
    else
        bytes_format(line, "%.*f", c->decimals, c->value);
}

static void report_json(const char *kind, const struct bench_column *columns, int n)
{
    struct bytes line = {0};
    bytes_format(&line, "{\"kind\":\"%s\"", kind);
    for (int i = 0; i < n; i++) {
        bytes_format(&line, ",\"%s\":", columns[i].name);
        append_number(&line, &columns[i], "null");
    }
    bytes_char(&line, '}');
    put_line(&line);
}

static void report_csv(const struct bench *b, const char *kind, const struct bench_column *columns,
                       int n)
{
    struct bytes line = {0};
    bytes_format(&line, "%s,%s,\"%s\"", kind, model_name(b), machine_of(b));
    for (int i = 0; i < n; i++) {
        bytes_char(&line, ',');
        append_number(&line, &columns[i], "");
    }
    put_line(&line);
}

static int width_of(const struct bench_column *c)
{
    const int n = (int)strlen(c->name);
    return n > 10 ? n : 10;
}

static void report_row(const struct bench_column *columns, int n)
{
    for (int i = 0; i < n; i++) {
        if (isnan(columns[i].value))
            printf("%*s  ", width_of(&columns[i]), "-");
        else
            printf("%*.*f  ", width_of(&columns[i]), columns[i].decimals, columns[i].value);
    }
    putchar('\n');
    fflush(stdout);
}

static void heading(const struct bench *b, const char *title, const struct bench_column *columns,
                    int n)
{
    if (b->set.output == OUTPUT_CSV) {
        fputs("kind,model,machine", stdout);
        for (int i = 0; i < n; i++)
            printf(",%s", columns[i].name);
        putchar('\n');
    }
    if (b->set.output == OUTPUT_TABLES) {
        printf("\n%s\n", title);
        for (int i = 0; i < n; i++)
            printf("%*s  ", width_of(&columns[i]), columns[i].name);
        putchar('\n');
    }
}

void bench_report(const struct bench *b, const char *kind, const char *title,
                  const struct bench_column *columns, int n)
{
    static const char *last_kind = "";
    if (strcmp(last_kind, kind) != 0)
        heading(b, title, columns, n);
    last_kind = kind;
    if (b->set.output == OUTPUT_JSON)
        report_json(kind, columns, n);
    else if (b->set.output == OUTPUT_CSV)
        report_csv(b, kind, columns, n);
    else
        report_row(columns, n);
}

void bench_remark(const struct bench *b, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    FILE *out = b->set.output == OUTPUT_TABLES ? stdout : stderr;
    vfprintf(out, format, args);
    fputc('\n', out);
    va_end(args);
}
