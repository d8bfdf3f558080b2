/* cores.c - see cores.h */
#include "engine/cores.h"

#include <limits.h>
#include <math.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static bool read_line(const char *path, char line[256])
{
    FILE *f = fopen(path, "r");
    if (!f)
        return false;
    bool read = fgets(line, 256, f) != NULL;
    fclose(f);
    return read;
}

static double ratio(long long quota, long long period)
{
    return quota > 0 && period > 0 ? (double)quota / (double)period : INFINITY;
}

/* The quota that one directory's files state. */
static double quota_of(const char *dir)
{
    char path[PATH_MAX + 32], line[256];
    long long quota = 0, period = 0;
    snprintf(path, sizeof(path), "%s/cpu.max", dir);
    if (read_line(path, line)) /* "150000 100000", or "max 100000" */
        return sscanf(line, "%lld %lld", &quota, &period) == 2 ? ratio(quota, period) : INFINITY;
    snprintf(path, sizeof(path), "%s/cpu.cfs_quota_us", dir);
    if (!read_line(path, line) || sscanf(line, "%lld", &quota) != 1)
        return INFINITY;
    snprintf(path, sizeof(path), "%s/cpu.cfs_period_us", dir);
    if (!read_line(path, line) || sscanf(line, "%lld", &period) != 1)
        return INFINITY;
    return ratio(quota, period);
}

/* The smallest quota on the way from root/group up to root. In a container the group's path may
 * be the host's, which is not there: then only its end, the root itself, counts. */
static double quota_upwards(const char *root, const char *group)
{
    char dir[PATH_MAX];
    int n = snprintf(dir, sizeof(dir), "%s%s", root, group);
    double least = INFINITY;
    if (n < 0 || (size_t)n >= sizeof(dir))
        return quota_of(root);
    for (;;) {
        least = fmin(least, quota_of(dir));
        char *slash = strrchr(dir, '/');
        if (!slash || (size_t)(slash - dir) < strlen(root))
            return least;
        *slash = 0;
    }
}

/* A line is "id:controllers:path"; version 2 has id 0 and no controllers. */
static double quota_of_line(const char *sys_dir, char *line)
{
    line[strcspn(line, "\n")] = 0;
    char *controllers = strchr(line, ':');
    char *path = controllers ? strchr(controllers + 1, ':') : NULL;
    if (!path || path[1] != '/')
        return INFINITY;
    *path++ = 0;
    controllers++;
    if (!*controllers)
        return quota_upwards(sys_dir, path);
    bool cpu = !strcmp(controllers, "cpu") || strstr(controllers, "cpu,") == controllers ||
               strstr(controllers, ",cpu");
    if (!cpu)
        return INFINITY;
    char root[PATH_MAX];
    int n = snprintf(root, sizeof(root), "%s/%s", sys_dir, controllers);
    return n < 0 || (size_t)n >= sizeof(root) ? INFINITY : quota_upwards(root, path);
}

double cores_quota(const char *sys_dir, const char *cgroup_file)
{
    FILE *f = fopen(cgroup_file, "r");
    if (!f)
        return INFINITY;
    double least = INFINITY;
    char line[PATH_MAX];
    while (fgets(line, sizeof(line), f))
        least = fmin(least, quota_of_line(sys_dir, line));
    fclose(f);
    return least;
}

int cores_available(void)
{
    cpu_set_t mask;
    int n = sched_getaffinity(0, sizeof(mask), &mask) == 0 ? CPU_COUNT(&mask) : 1;
    double quota = cores_quota("/sys/fs/cgroup", "/proc/self/cgroup");
    if (quota < n)
        n = quota < 1 ? 1 : (int)quota;
    return n < 1 ? 1 : n;
}
