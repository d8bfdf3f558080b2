/* call_queue.c - see call_queue.h */
#include "server/call_queue.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "server/call_private.h"

/* Those who wait for one session. */
struct line {
    struct line *next;
    char id[SESSION_ID_BYTES];
    int owner, n;
    struct call *first; /* by line_next */
    bool is_due;        /* the session may be free */
};

struct call_queue {
    pthread_mutex_t lock; /* held to change the lines, and by other threads to read them */
    struct line *lines;
    int n;
};

enum status queue_open(struct call_queue **out, struct error *err)
{
    struct call_queue *q = calloc(1, sizeof(*q));
    if (!q)
        return fail(err, STATUS_NOMEM, "the queue of turns: out of memory");
    pthread_mutex_init(&q->lock, NULL);
    *out = q;
    return STATUS_OK;
}

void queue_close(struct call_queue *q)
{
    if (!q)
        return;
    CHECK(!q->lines);
    pthread_mutex_destroy(&q->lock);
    free(q);
}

static struct line *find(struct call_queue *q, const char *id)
{
    struct line *line = q->lines;
    while (line && strcmp(line->id, id))
        line = line->next;
    return line;
}

bool queue_is_ahead(struct call_queue *q, const char *session_id, int owner)
{
    pthread_mutex_lock(&q->lock);
    const struct line *line = find(q, session_id);
    bool is_ahead = line && line->owner == owner;
    pthread_mutex_unlock(&q->lock);
    return is_ahead;
}

static struct line *add_line(struct call_queue *q, const struct call *c)
{
    struct line *line = calloc(1, sizeof(*line));
    if (!line)
        return NULL;
    snprintf(line->id, sizeof(line->id), "%s", c->waits_for);
    line->owner = c->owner;
    pthread_mutex_lock(&q->lock);
    line->next = q->lines;
    q->lines = line;
    pthread_mutex_unlock(&q->lock);
    return line;
}

static void remove_line(struct call_queue *q, struct line *line)
{
    struct line **link = &q->lines;
    while (*link != line)
        link = &(*link)->next;
    pthread_mutex_lock(&q->lock);
    *link = line->next;
    pthread_mutex_unlock(&q->lock);
    free(line);
}

enum status queue_join(struct routes *r, struct call *c, struct error *err)
{
    struct call_queue *q = r->queue;
    int64_t limit = r->options->max_queued_turns;
    struct line *line = find(q, c->waits_for);
    if ((line ? line->n : 0) >= limit)
        return fail_field(err, STATUS_BUSY, "session_id",
                          "%lld requests wait for a turn of session '%s' already.",
                          (long long)limit, c->waits_for);
    if (!line)
        line = add_line(q, c);
    if (!line)
        return fail(err, STATUS_NOMEM, "out of memory for a request that waits");
    struct call **link = &line->first;
    while (*link)
        link = &(*link)->line_next;
    *link = c;
    c->line_next = NULL;
    line->n++;
    q->n++;
    queue_note_end(r, line->id); /* it may have ended before the call was in line */
    return STATUS_OK;
}

void queue_leave(struct routes *r, struct call *c)
{
    struct call_queue *q = r->queue;
    struct line *line = *c->waits_for ? find(q, c->waits_for) : NULL;
    struct call **link = line ? &line->first : NULL;
    while (link && *link && *link != c)
        link = &(*link)->line_next;
    if (!link || !*link)
        return;
    *link = c->line_next;
    *c->waits_for = '\0';
    q->n--;
    if (!--line->n)
        remove_line(q, line);
}

void queue_note_end(struct routes *r, const char *session_id)
{
    struct line *line = find(r->queue, session_id);
    if (!line)
        return;
    line->is_due = true;
    http_notify(r->server);
}

/* The first in line has begun its turn, or not. */
static void end_try(struct call *c, enum status st, const struct error *err)
{
    struct routes *r = c->routes;
    struct line *line = find(r->queue, c->waits_for);
    if (st == STATUS_CONFLICT)
        return;
    line->is_due = st != STATUS_OK; /* then it is the next one's turn */
    if (st)
        http_notify(r->server);
    queue_leave(r, c); /* the line may be gone */
    if (st)
        call_fail(c, err, NULL);
    else
        call_start(c);
}

static void begin_on_worker(struct work_item *item)
{
    struct call *c = (struct call *)item;
    c->status = session_begin(c->routes->storage.sessions, c->session.id, c->owner, c->version,
                              &c->turn, &c->error);
}

static void on_begun(struct work_item *item)
{
    struct call *c = (struct call *)item;
    c->working = false;
    if (c->http)
        end_try(c, c->status, &c->error);
    else
        call_free(c);
}

/* The first in line begins its turn, if it can now. */
static void try_first(struct routes *r, struct line *line)
{
    struct call *c = line->first;
    struct error err;
    line->is_due = false;
    if (sessions_are_shared(r->storage.sessions)) { /* there it may have to wait for the store */
        memcpy(c->session.id, line->id, sizeof(c->session.id));
        c->item = (struct work_item){.run = begin_on_worker, .done = on_begun};
        c->working = true;
        workers_submit(r->workers, &c->item);
        return;
    }
    enum status st =
        session_begin(r->storage.sessions, line->id, line->owner, c->version, &c->turn, &err);
    end_try(c, st, &err);
}

void queue_run(struct routes *r)
{
    struct line *next;
    for (struct line *line = r->queue->lines; line; line = next) {
        next = line->next;
        if (line->is_due && !line->first->working)
            try_first(r, line);
    }
}

/* The first of a line whose time is over, or NULL. */
static struct call *find_late(const struct line *line, int64_t before_ns)
{
    struct call *c = line->first;
    while (c && (c->working || http_arrival_ns(c->http) > before_ns))
        c = c->line_next;
    return c;
}

/* The line may be gone afterwards. */
static void end_late(struct routes *r, struct line *line, int64_t timeout_s)
{
    int64_t before_ns = job_clock_ns() - timeout_s * 1000000000;
    struct error err;
    fail(&err, STATUS_TIMEOUT, "the request's time of %lld s was over before its turn came",
         (long long)timeout_s);
    struct call *c;
    for (int n = line->n; n && (c = find_late(line, before_ns)); n--) {
        queue_leave(r, c);
        call_fail(c, &err, NULL);
    }
}

void queue_on_tick(struct routes *r)
{
    int64_t timeout_s = r->options->request_timeout;
    struct line *next;
    for (struct line *line = r->queue->lines; line; line = next) {
        next = line->next;
        line->is_due = true;
        if (timeout_s)
            end_late(r, line, timeout_s);
    }
}

int queue_length(const struct call_queue *q)
{
    return q->n;
}
