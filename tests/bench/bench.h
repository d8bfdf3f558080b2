/* bench.h - what the subcommands of latte-bench share.
 *
 * Threads: one. Memory: stats own nothing; values arrays are the caller's and get sorted.
 * Errors:  a subcommand prints one sentence on stderr and returns an exit code.
 */
#ifndef LATTE_TESTS_BENCH_H
#define LATTE_TESTS_BENCH_H

#include <stddef.h>
#include <stdint.h>

/* Subcommands: argv[0] is the subcommand's name. Exit code 0, 1 (failed), 2 (usage). */
int bench_engine(int argc, char **argv);
int bench_serve(int argc, char **argv);
int bench_sessions(int argc, char **argv);
int bench_traffic(int argc, char **argv); /* "load" */

/* The p-th quantile (0..1) of n values by linear interpolation; sorts them. NAN when n is 0. */
double bench_quantile(double *values, size_t n, double p);

/* CLOCK_MONOTONIC in seconds. */
double bench_now(void);

/* "AMD EPYC 9B45, 2 cores, avx512" for table headings; static storage. */
const char *bench_machine(void);

#endif
