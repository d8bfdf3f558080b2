/* file.h - reading and writing whole files, and mapping large ones.
 *
 * Only regular files are taken: a FIFO or a device in a model directory is refused instead of
 * waited for. A mapped file must not shrink while it is mapped: touching what was cut off
 * raises SIGBUS, as for every mapping.
 *
 * Threads: no shared state; two writers of one path at a time are not meant.
 * Memory:  file_read fills the caller's buffer; a mapping lives until file_unmap.
 * Errors:  NOT_FOUND (no such file), IO, INVALID (not a regular file, path too long),
 *          TOO_LARGE, NOMEM; texts name the path.
 */
#ifndef LATTE_BASE_FILE_H
#define LATTE_BASE_FILE_H

#include <stddef.h>

#include "engine/base/bytes.h"
#include "engine/base/error.h"

enum { FILE_PATH_BYTES = 4096 };

/* "DIR/NAME" with its terminator. */
enum status file_path(char out[FILE_PATH_BYTES], const char *dir, const char *name,
                      struct error *err);

/* Append the whole file, which holds at most max_bytes. On failure out is left as it was. */
enum status file_read(struct bytes *out, const char *path, size_t max_bytes, struct error *err);

/* Write a file whole: to PATH.new, which then takes its place. What was at path is still there if
 * that fails, or if the process is killed; only a regular file is replaced. */
enum status file_write(const char *path, const void *data, size_t n, struct error *err);

struct file_map {
    const unsigned char *data; /* [n], read-only; NULL when n is 0 */
    size_t n;
};

enum status file_map(struct file_map *out, const char *path, struct error *err);
void file_unmap(struct file_map *map); /* accepts a zeroed struct */

#endif
