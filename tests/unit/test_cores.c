/* test_cores.c - CPU quotas, read from cgroup trees made for the test. */
#include "tests/unit/unit.h"

#include <math.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/cores.h"

static void write_file(const char *path, const char *text)
{
    FILE *f = fopen(path, "w");
    if (!f || fputs(text, f) < 0 || fclose(f))
        fail_msg("%s cannot be written", path);
}

/* Files are "path=text" below the test's directory; directories are made as needed. */
static void make_tree(const char *root, const char *const files[4])
{
    for (int i = 0; i < 4 && files[i]; i++) {
        char path[300];
        const char *text = strchr(files[i], '=');
        int n = snprintf(path, sizeof(path), "%s/%.*s", root, (int)(text - files[i]), files[i]);
        assert_true(n > 0 && (size_t)n < sizeof(path));
        for (char *slash = path + strlen(root) + 1; (slash = strchr(slash, '/')); slash++) {
            *slash = 0;
            mkdir(path, 0700);
            *slash = '/';
        }
        write_file(path, text + 1);
    }
}

static void test_quota(void **state)
{
    (void)state;
    static const struct {
        const char *what, *cgroup, *files[4];
        double expected;
    } cases[] = {
        {"nothing", "0::/\n", {NULL}, INFINITY},
        {"no limit", "0::/\n", {"cpu.max=max 100000\n"}, INFINITY},
        {"a container's root", "0::/\n", {"cpu.max=150000 100000\n"}, 1.5},
        {"a nested group", "0::/a/b\n", {"a/b/cpu.max=200000 100000\n"}, 2},
        {"the parent has less",
         "0::/a/b\n",
         {"a/b/cpu.max=200000 100000\n", "a/cpu.max=50000 100000\n"},
         0.5},
        {"a path of the host", "0::/not/here\n", {"cpu.max=300000 100000\n"}, 3},
        {"version 1",
         "4:memory:/m\n3:cpu,cpuacct:/x\n",
         {"cpu,cpuacct/x/cpu.cfs_quota_us=250000\n", "cpu,cpuacct/x/cpu.cfs_period_us=100000\n"},
         2.5},
        {"version 1 without limit",
         "3:cpu:/\n",
         {"cpu/cpu.cfs_quota_us=-1\n", "cpu/cpu.cfs_period_us=100000\n"},
         INFINITY},
        {"cpuset is not cpu",
         "3:cpuset:/\n",
         {"cpuset/cpu.cfs_quota_us=100000\n", "cpuset/cpu.cfs_period_us=100000\n"},
         INFINITY},
        {"garbage", "0\n::\nx:y\n0::relative\n", {"cpu.max=100000 100000\n"}, INFINITY},
        {"garbage in the file", "0::/\n", {"cpu.max=-5 0\n"}, INFINITY},
    };
    for (size_t c = 0; c < COUNT_OF(cases); c++) {
        char root[] = "/tmp/latte-cores-XXXXXX", file[64], command[64];
        assert_non_null(mkdtemp(root));
        make_tree(root, cases[c].files);
        snprintf(file, sizeof(file), "%s/cgroup", root);
        write_file(file, cases[c].cgroup);
        double found = cores_quota(root, file);
        if (found != cases[c].expected)
            fail_msg("%s: %g cores, expected %g", cases[c].what, found, cases[c].expected);
        snprintf(command, sizeof(command), "rm -r %s", root);
        assert_int_equal(system(command), 0);
    }
    assert_true(cores_quota("/nowhere", "/nowhere/cgroup") == INFINITY);
}

/* With one core in the mask there is one; the mask is put back. */
static void test_affinity(void **state)
{
    (void)state;
    cpu_set_t before, one;
    assert_int_equal(sched_getaffinity(0, sizeof(before), &before), 0);
    assert_in_range(cores_available(), 1, CPU_COUNT(&before));
    CPU_ZERO(&one);
    for (int i = 0; i < CPU_SETSIZE && !CPU_COUNT(&one); i++)
        if (CPU_ISSET(i, &before))
            CPU_SET(i, &one);
    assert_int_equal(sched_setaffinity(0, sizeof(one), &one), 0);
    assert_int_equal(cores_available(), 1);
    assert_int_equal(sched_setaffinity(0, sizeof(before), &before), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_quota),
        cmocka_unit_test(test_affinity),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
