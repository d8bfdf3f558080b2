/* model_files.h - model directories with seeded random weights, for tests.
 *
 * The list of tensors is written here from the rules of weights/README.md, apart from
 * checkpoint.c, so that one checks the other. Values have a sane scale: activations stay near
 * 1 at any depth, so greedy tokens do not hang on rounding.
 *
 * Threads: no shared state.
 * Memory:  a tensor list owns its data; test_tensors_free releases it.
 * Errors:  0 for success, -1 with a line on stderr. For tests only: memory that runs out aborts.
 */
#ifndef LATTE_TESTS_MODEL_FILES_H
#define LATTE_TESTS_MODEL_FILES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct test_tensor {
    char name[120];
    char dtype[8]; /* as the file spells it */
    int n_dims;
    int64_t shape[8];
    size_t n_bytes;
    void *data; /* [n_bytes] little-endian, owned */
};

struct test_tensors {
    struct test_tensor *items; /* [n], owned */
    size_t n, cap;
};

struct model_files_options {
    const char *dtype; /* "F32" (NULL), "F16" or "BF16" */
    bool biases;       /* write every optional bias */
    bool qk_norms;     /* write q_norm and k_norm */
    int n_shards;      /* 0 or 1: model.safetensors; more: shards and an index */
    double theta;      /* factor on latent_k.weight, to widen the latents' logits; 0 for 1 */
};

/* Small configurations of every kind of model in the paper, and of the options beyond it. */
struct test_model {
    const char *name, *config_json;
};
extern const struct test_model test_models[];
extern const size_t n_test_models;

/* Write DIR/config.json (the text as given) and the tensors it asks for. options may be NULL. */
int model_files_write(const char *dir, const char *config_json, uint64_t seed,
                      const struct model_files_options *options);

/* The tensors alone, in the order they are written; a test may change them before writing. */
int test_tensors_make(struct test_tensors *list, const char *config_json, uint64_t seed,
                      const struct model_files_options *options);

/* Write the list as DIR/model.safetensors, or as n_shards > 1 shards and their index. */
int test_tensors_write(const struct test_tensors *list, const char *dir, int n_shards);

/* Append a tensor of normal values of the given deviation and mean. Shape ends at the first 0;
 * values depend on seed and name only. */
struct test_tensor *test_tensors_add(struct test_tensors *list, const char *name, const char *dtype,
                                     const int64_t shape[8], uint64_t seed, double mean,
                                     double deviation);
struct test_tensor *test_tensors_find(const struct test_tensors *list, const char *name);
void test_tensors_remove(struct test_tensors *list, const char *name);
void test_tensors_free(struct test_tensors *list);

/* A fresh directory below $TMPDIR or /tmp; its path in path[n]. remove takes the files directly
 * inside it and the directory itself. */
int test_dir_make(char *path, size_t n);
void test_dir_remove(const char *path);

/* Write DIR/NAME. */
int test_file_write(const char *dir, const char *name, const void *data, size_t n);

/* Read a whole file into malloc'ed memory with a zero byte behind it; NULL on failure. */
char *test_file_read(const char *path, size_t *n);

#endif
