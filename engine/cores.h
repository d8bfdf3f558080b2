/* cores.h - how many processor cores this process may use.
 *
 * Threads: no shared state. Memory: none kept. Errors: none; what cannot be read is no limit.
 */
#ifndef LATTE_ENGINE_CORES_H
#define LATTE_ENGINE_CORES_H

/* The cores of the affinity mask, or fewer where a cgroup's quota gives less time than that
 * (1.5 cores' time is 1: threads beyond it would be stopped in the middle of a step). */
int cores_available(void);

/* The smallest quota, in cores, of the cgroup that cgroup_file (/proc/self/cgroup) names and of
 * those above it, below sys_dir (/sys/fs/cgroup); INFINITY for none. Reads cpu.max of version 2
 * and cpu.cfs_quota_us of version 1. */
double cores_quota(const char *sys_dir, const char *cgroup_file);

#endif
