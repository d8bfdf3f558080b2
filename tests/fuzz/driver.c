/* driver.c - a fuzz driver for any compiler: mutates seeds for a while.
 *
 *   fuzz_X [-t SECONDS] [-s SEED] PATH...    seeds are files, or all files of directories
 *
 * -t 0 only runs the seeds as they are, which is how a saved input is tried again. The input
 * under way is kept in the mapped file fuzz_X.input, so that it is there after a crash.
 */
#include "tests/fuzz/fuzz.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { INPUT_BYTES = 1 << 20, MAX_SEEDS = 256 };

struct seed {
    uint8_t *data; /* [n] */
    size_t n;
};

static struct seed seeds[MAX_SEEDS];
static size_t n_seeds;
static uint64_t random_state = 1;

static uint64_t next_random(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

static size_t below(size_t n)
{
    return n ? next_random() % n : 0;
}

/* ---- seeds ---- */

static void add_file(const char *path)
{
    FILE *file = fopen(path, "rb");
    CHECK(file && n_seeds < MAX_SEEDS);
    struct seed *s = &seeds[n_seeds++];
    s->data = malloc(INPUT_BYTES);
    CHECK(s->data);
    s->n = fread(s->data, 1, INPUT_BYTES, file);
    fclose(file);
}

static void add_path(const char *path)
{
    struct stat info;
    char inside[4096];
    CHECK(!stat(path, &info));
    if (!S_ISDIR(info.st_mode)) {
        add_file(path);
        return;
    }
    DIR *dir = opendir(path);
    CHECK(dir);
    for (struct dirent *entry = readdir(dir); entry; entry = readdir(dir)) {
        if (entry->d_name[0] == '.')
            continue;
        CHECK(snprintf(inside, sizeof(inside), "%s/%s", path, entry->d_name) < 4096);
        add_path(inside);
    }
    closedir(dir);
}

/* ---- mutations: each changes data[n] within INPUT_BYTES and returns the new length ---- */

static size_t insert(uint8_t *data, size_t n, const uint8_t *piece, size_t length)
{
    size_t at = below(n + 1);
    if (length > INPUT_BYTES - n)
        length = INPUT_BYTES - n;
    memmove(data + at + length, data + at, n - at);
    memcpy(data + at, piece, length);
    return n + length;
}

static size_t insert_token(uint8_t *data, size_t n)
{
    static const char *const tokens[] = {
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        "\"",
        "\\",
        "\\u0000",
        "\\ud83d",
        "null",
        "true",
        "false",
        "0",
        "-1",
        "1e999",
        "01",
        "1.5",
        "\xff",
        "\xc3",
        "\n",
        "\"\"",
        "[[[[[[",
        "{\"a\":",
        "2147483648",
        "9007199254740993",
        "18446744073709551615",
    };
    const char *token = tokens[below(sizeof(tokens) / sizeof(*tokens))];
    return insert(data, n, (const uint8_t *)token, strlen(token));
}

static size_t remove_piece(uint8_t *data, size_t n)
{
    size_t at = below(n), length = below(n - at < 64 ? n - at : 64);
    memmove(data + at, data + at + length, n - at - length);
    return n - length;
}

/* A piece of this or another seed. */
static size_t add_piece(uint8_t *data, size_t n)
{
    const struct seed *s = &seeds[below(n_seeds)];
    size_t at = below(s->n), length = below(s->n - at < 256 ? s->n - at : 256);
    return insert(data, n, s->data + at, length);
}

static size_t mutate(uint8_t *data, size_t n)
{
    switch (below(8)) {
    case 0:
        return insert_token(data, n);
    case 1:
        return n ? remove_piece(data, n) : n;
    case 2:
        return add_piece(data, n);
    case 3:
        return below(16) ? n : below(n + 1);
    case 4:
        if (n)
            data[below(n)] = "{}[],:\"0123456789-.e\\"[below(21)];
        return n;
    default:
        if (n)
            data[below(n)] ^= (uint8_t)(1u << below(8));
        return n;
    }
}

/* ---- the run ---- */

/* A shared mapping: what it holds survives a crash of this process. */
static uint8_t *map_input(const char *program)
{
    char path[4096];
    CHECK(snprintf(path, sizeof(path), "%s.input", program) < 4096);
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    CHECK(fd >= 0 && !ftruncate(fd, INPUT_BYTES));
    uint8_t *data = mmap(NULL, INPUT_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(data != MAP_FAILED);
    close(fd);
    return data;
}

/* A copy of exactly n bytes, so that the sanitizer sees any read beyond them. */
static void run_exactly(const uint8_t *data, size_t n)
{
    uint8_t *exact = malloc(n ? n : 1);
    CHECK(exact);
    memcpy(exact, data, n);
    LLVMFuzzerTestOneInput(exact, n);
    free(exact);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static long run_mutations(uint8_t *input, double seconds)
{
    long runs = 0;
    for (double end = now() + seconds; now() < end; runs++) {
        const struct seed *s = &seeds[below(n_seeds)];
        size_t n = s->n;
        memcpy(input, s->data, n);
        for (size_t k = below(4) + 1; k; k--)
            n = mutate(input, n);
        run_exactly(input, n);
    }
    return runs;
}

int main(int argc, char **argv)
{
    double seconds = 10;
    for (int option = getopt(argc, argv, "t:s:"); option != -1;
         option = getopt(argc, argv, "t:s:")) {
        if (option == 't')
            seconds = atof(optarg);
        else if (option == 's')
            random_state = strtoull(optarg, NULL, 10) * 2 + 1;
        else
            return 2;
    }
    for (int i = optind; i < argc; i++)
        add_path(argv[i]);
    if (!n_seeds) {
        fprintf(stderr, "usage: %s [-t SECONDS] [-s SEED] PATH...\n", argv[0]);
        return 2;
    }
    for (size_t i = 0; i < n_seeds; i++)
        run_exactly(seeds[i].data, seeds[i].n);
    long runs = run_mutations(map_input(argv[0]), seconds);
    printf("%s: %zu seeds, %ld mutations, no failure\n", argv[0], n_seeds, runs);
    for (size_t i = 0; i < n_seeds; i++)
        free(seeds[i].data);
    return 0;
}
