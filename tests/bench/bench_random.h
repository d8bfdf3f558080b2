/* bench_random.h - model directories of known shapes with random weights, for measuring.
 *
 * Speed does not depend on what the weights say, so a shape can be measured before anybody has
 * trained it, through the same files and loading as a real model. Value i of tensor t depends
 * on i and t alone: the same shape is the same file everywhere.
 *
 * Threads: one caller; writing uses every core. Memory: 2 MB a core while writing.
 * Errors:  -1 with a line on stderr.
 */
#ifndef LATTE_TESTS_BENCH_RANDOM_H
#define LATTE_TESTS_BENCH_RANDOM_H

#include <stddef.h>

/* "156m, 12m, ...": names for --help. */
const char *random_model_names(void);

/* Write config.json, model.safetensors (BF16, seeded) and tokenizer.json (a token a byte, the
 * rest of the vocabulary made-up words) of a named shape to a fresh directory below $TMPDIR or
 * /tmp; its path in dir[n]. context: positions of full attention, 0 for the
 * shape's own; other shapes have no use for it. */
int random_model_write(const char *name, int context, char *dir, size_t n);
void random_model_remove(const char *dir);

#endif
