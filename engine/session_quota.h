/* session_quota.h - how much of sessions and their states each owner has, and may have.
 *
 * A state counts once for an owner, however many of its sessions and snapshots are at it; one
 * that several owners have counts for each. Owner -1, everybody where the API is open, has no
 * quota.
 *
 * Threads: one at a time (the session table's lock).
 * Memory:  an entry for each state that an owner has. Where memory for one runs out it is not
 *          counted, which errs on the owner's side.
 * Errors:  BUSY naming the quota.
 */
#ifndef LATTE_ENGINE_SESSION_QUOTA_H
#define LATTE_ENGINE_SESSION_QUOTA_H

#include <stddef.h>

#include "engine/base/error.h"

struct session_quota;

struct session_quota_options {
    int max_sessions;   /* of an owner; 0: no limit */
    size_t max_bytes;   /* of its states; 0: no limit */
    size_t image_bytes; /* of each */
};

enum status session_quota_open(struct session_quota **out,
                               const struct session_quota_options *options, struct error *err);
void session_quota_close(struct session_quota *q); /* accepts NULL */

/* May the owner have one session more; one state more, in place of `gone` (NULL: of none), which
 * one of its references gives up. */
enum status session_quota_check_session(const struct session_quota *q, int owner,
                                        struct error *err);
enum status session_quota_check_state(const struct session_quota *q, int owner, const void *gone,
                                      struct error *err);

void session_quota_count_session(struct session_quota *q, int owner, int change); /* 1 or -1 */
/* A reference of the owner's to a state came or went; image NULL is none. */
void session_quota_count_state(struct session_quota *q, int owner, const void *image, int change);

#endif
