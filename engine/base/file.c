/* file.c - see file.h */
#include "engine/base/file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum status file_path(char out[FILE_PATH_BYTES], const char *dir, const char *name,
                      struct error *err)
{
    int n = snprintf(out, FILE_PATH_BYTES, "%s/%s", dir, name);
    if (n < 0 || n >= FILE_PATH_BYTES)
        return fail(err, STATUS_INVALID, "the path of %s has more than %d bytes", name,
                    FILE_PATH_BYTES - 1);
    return STATUS_OK;
}

static enum status fail_errno(struct error *err, const char *what, const char *path)
{
    enum status status = errno == ENOENT ? STATUS_NOT_FOUND : STATUS_IO;
    return fail(err, status, "cannot %s %s: %s", what, path, strerror(errno));
}

/* A descriptor of a regular file and its size. O_NONBLOCK: opening a FIFO must not wait. */
static enum status open_regular(int *fd, size_t *n, const char *path, struct error *err)
{
    int opened = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (opened < 0)
        return fail_errno(err, "open", path);
    struct stat info;
    enum status st = STATUS_OK;
    if (fstat(opened, &info))
        st = fail_errno(err, "examine", path);
    else if (!S_ISREG(info.st_mode))
        st = fail(err, STATUS_INVALID, "%s is not a regular file", path);
    else if ((uintmax_t)info.st_size > SIZE_MAX / 2)
        st = fail(err, STATUS_TOO_LARGE, "%s is too large to be mapped", path);
    if (st) {
        close(opened);
        return st;
    }
    *fd = opened;
    *n = (size_t)info.st_size;
    return STATUS_OK;
}

static enum status read_all(struct bytes *out, int fd, const char *path, size_t max_bytes,
                            struct error *err)
{
    char chunk[65536];
    size_t total = 0;
    for (;;) {
        ssize_t n = read(fd, chunk, sizeof(chunk));
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return fail_errno(err, "read", path);
        if (n == 0)
            return STATUS_OK;
        total += (size_t)n;
        if (total > max_bytes)
            return fail(err, STATUS_TOO_LARGE, "%s has more than %zu bytes", path, max_bytes);
        bytes_append(out, chunk, (size_t)n);
        if (out->failed)
            return fail(err, STATUS_NOMEM, "%s: out of memory", path);
    }
}

enum status file_read(struct bytes *out, const char *path, size_t max_bytes, struct error *err)
{
    int fd = -1;
    size_t n = 0, before = out->n;
    enum status st = open_regular(&fd, &n, path, err);
    if (st)
        return st;
    if (n > max_bytes)
        st = fail(err, STATUS_TOO_LARGE, "%s has %zu bytes, at most %zu are read", path, n,
                  max_bytes);
    else
        st = read_all(out, fd, path, max_bytes, err);
    close(fd);
    if (st)
        out->n = before;
    return st;
}

static enum status write_all(int fd, const char *path, const char *data, size_t n,
                             struct error *err)
{
    for (ssize_t done; n; data += done, n -= (size_t)done) {
        done = write(fd, data, n);
        if (done < 0 && errno == EINTR)
            done = 0;
        if (done < 0)
            return fail_errno(err, "write", path);
    }
    return fsync(fd) ? fail_errno(err, "write", path) : STATUS_OK; /* before the name is there */
}

/* What is at path may be replaced by a file. */
static enum status check_replaceable(const char *path, struct error *err)
{
    struct stat info;
    if (!stat(path, &info))
        return S_ISREG(info.st_mode) ? STATUS_OK
                                     : fail(err, STATUS_INVALID, "%s is not a regular file", path);
    return errno == ENOENT ? STATUS_OK : fail_errno(err, "examine", path);
}

enum status file_write(const char *path, const void *data, size_t n, struct error *err)
{
    char new_path[FILE_PATH_BYTES];
    int length = snprintf(new_path, sizeof(new_path), "%s.new", path);
    if (length < 0 || length >= FILE_PATH_BYTES)
        return fail(err, STATUS_INVALID, "the path %.40s... has more than %d bytes", path,
                    FILE_PATH_BYTES - 5);
    enum status st = check_replaceable(path, err);
    if (st)
        return st;
    int fd = open(new_path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0)
        return fail_errno(err, "make", new_path);
    st = write_all(fd, new_path, data, n, err);
    if (close(fd) && !st)
        st = fail_errno(err, "write", new_path);
    if (!st && rename(new_path, path))
        st = fail_errno(err, "replace", path);
    if (st)
        unlink(new_path);
    return st;
}

enum status file_map(struct file_map *out, const char *path, struct error *err)
{
    int fd = -1;
    size_t n = 0;
    enum status st = open_regular(&fd, &n, path, err);
    if (st)
        return st;
    void *data = n ? mmap(NULL, n, PROT_READ, MAP_PRIVATE, fd, 0) : NULL;
    if (data == MAP_FAILED)
        st = fail_errno(err, "map", path);
    close(fd);
    if (!st)
        *out = (struct file_map){.data = data, .n = n};
    return st;
}

void file_unmap(struct file_map *map)
{
    if (map->data)
        munmap((void *)map->data, map->n);
    *map = (struct file_map){0};
}
