/* bench_engine.h - what the parts of latte-bench engine share: bench_engine.c reads the options
 * and opens the model, bench_tables.c measures, bench_report.c prints.
 *
 * Threads: one. Memory: static, apart from what bench_open takes.
 * Errors:  a line on stderr and false.
 */
#ifndef LATTE_TESTS_BENCH_ENGINE_H
#define LATTE_TESTS_BENCH_ENGINE_H

#include <stdbool.h>
#include <stdint.h>

#include "engine/model.h"
#include "engine/stepper.h"

enum {
    BENCH_MAX_SAMPLES = 8192,
    BENCH_MAX_LIST = 24,
    BENCH_TURN = 1024,     /* sessions of a step, of those that decode in turn */
    BENCH_JOB_PROMPT = 20, /* the paper's Table 9: prompt tokens, generated tokens, top-k */
    BENCH_JOB_OUTPUT = 256,
    BENCH_JOB_TOP_K = 40,
};

enum bench_table {
    TABLE_PREFILL = 1,
    TABLE_DECODE = 2,
    TABLE_JOB = 4,
    TABLE_POSITION = 8,
    TABLE_MEMORY = 16,
    TABLE_SESSIONS = 32,
};

enum bench_output { OUTPUT_TABLES, OUTPUT_JSON, OUTPUT_CSV };

struct bench_settings {
    const char *model_dir, *random, *device, *weight_dtype, *window_dtype;
    int device_index; /* -1: a host backend */
    int context;      /* of full attention in a random shape, 0: its own */
    int n_threads;
    unsigned tables; /* of enum bench_table; 0: those that suit the device */
    int batches[BENCH_MAX_LIST], n_batches;
    int positions[BENCH_MAX_LIST], n_positions;
    int seconds;       /* to spend on one figure, repeats permitting */
    int real_position; /* positions up to here are reached by feeding tokens */
    int step_tokens;   /* rows of a step of prompts at most */
    int top_k;         /* of decoding; 0: greedy */
    int n_sessions;    /* 0: as many as fit */
    int bandwidth;     /* of the device, GB/s, for floors; 0: unknown */
    int tflops;        /* of the device's matrix units in bf16; 0: unknown */
    bool deterministic, composed;
    enum bench_output output;
};

struct bench {
    struct bench_settings set;
    struct model *model;
    struct stepper *stepper;
    int n_slots, max_rows, max_seqs;
    int64_t n_parameters;
    int in_flight;            /* steps queued and not yet collected */
    int32_t *tokens;          /* [max_rows] random, the same for every step; owned */
    struct stepper_seq *seqs; /* [max_seqs], owned */
    int64_t *n_output;        /* [n_slots] tokens drawn since admission, owned */
    int n_samples;
    double samples[BENCH_MAX_SAMPLES];
};

/* ---- bench_tables.c ---- */

/* Measure and report what the settings ask for. */
bool bench_measure(struct bench *b);

/* ---- bench_report.c ---- */

/* One named figure of a row; NAN for one that is not known. */
struct bench_column {
    const char *name;
    double value;
    int decimals;
};

void bench_report_setup(struct bench *b);
/* A row of the table `kind`; a new kind begins with its heading. */
void bench_report(const struct bench *b, const char *kind, const char *title,
                  const struct bench_column *columns, int n);
/* A sentence between the rows of a table. */
void bench_remark(const struct bench *b, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

#endif
