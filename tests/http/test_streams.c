/* test_streams.c - what survives the network: streams that a client comes back to, repetitions of
 * a request, turns that wait. The oracles are the same server without a cut, and a whole reply
 * with the same seed.
 *
 * Streams are read with HTTP/1.0, whose bodies are not chunked: what comes is what was said. */
#include "tests/http/harness.h"

#include <cjson/cJSON.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define COMPLETIONS "/v1/completions"
#define CHAT "/v1/chat/completions"
#define ENDLESS "\"max_tokens\":900000,\"ignore_eos\":true,\"stream\":true"

enum { ANY_BYTES = 1 << 30, MAX_CHOICES = 4, ENOUGH_MS = 20000 };

static struct server server;

static int start_server(void **state)
{
    (void)state;
    server_start(&server, NULL);
    return 0;
}

static int stop_server(void **state)
{
    (void)state;
    server_stop(&server);
    return 0;
}

__attribute__((format(printf, 1, 2))) static char *text_of(const char *format, ...)
{
    char *text = NULL;
    va_list args;
    va_start(args, format);
    assert_true(vasprintf(&text, format, args) >= 0);
    va_end(args);
    return text;
}

/* ---- whole requests -------------------------------------------------------------------------- */

/* header: one or NULL. Frees body, which may be NULL. */
static void ask(const struct server *s, const char *method, const char *path, char *body,
                const char *header, struct reply *reply)
{
    const char *const headers[] = {header, NULL};
    struct client_request request = {
        .method = method, .path = path, .body = body, .headers = header ? headers : NULL};
    client_send(s, &request, reply);
    free(body);
}

static int code_of(const struct server *s, const char *method, const char *path, char *body,
                   const char *header)
{
    struct reply reply;
    ask(s, method, path, body, header, &reply);
    int code = reply.code;
    reply_free(&reply);
    return code;
}

/* A member along a path of names, "session.version", in JSON text. */
static cJSON *parse(const struct bytes *text)
{
    cJSON *json = cJSON_ParseWithLength(text->data, text->n);
    if (!json)
        fail_msg("no JSON: %s", text->data);
    return json;
}

static const cJSON *member(const cJSON *v, const char *name)
{
    const cJSON *found = cJSON_GetObjectItemCaseSensitive(v, name);
    if (!found)
        fail_msg("no %s in %s", name, cJSON_PrintUnformatted(v));
    return found;
}

struct id {
    char text[64];
};

static struct id new_session(const struct server *s)
{
    struct reply reply;
    struct id id;
    client_post(s, "/v1/sessions", "{}", &reply);
    cJSON *json = parse(&reply.body);
    snprintf(id.text, sizeof(id.text), "%s", member(json, "id")->valuestring);
    cJSON_Delete(json);
    reply_free(&reply);
    return id;
}

static int version_of(const struct server *s, const struct id *id)
{
    char path[128];
    struct reply reply;
    snprintf(path, sizeof(path), "/v1/sessions/%s", id->text);
    client_get(s, path, &reply);
    cJSON *json = parse(&reply.body);
    int version = member(json, "version")->valueint;
    cJSON_Delete(json);
    reply_free(&reply);
    return version;
}

/* ---- streams --------------------------------------------------------------------------------- */

/* A client that knows the events it has in whole. */
struct reader {
    int fd;
    int buffer;       /* bytes that may wait unread in the socket, 0: as usual */
    struct bytes raw; /* as received since the last request */
    int code;
    char id[64];
    char head[600];
    struct bytes events; /* whole ones, of all requests */
    unsigned long last;  /* number of the last one */
    bool is_done;        /* "[DONE]" came */
    bool has_error;      /* an event without a number */
};

static void reader_free(struct reader *r)
{
    if (r->fd >= 0)
        close(r->fd);
    bytes_free(&r->raw);
    bytes_free(&r->events);
}

static void reader_send(const struct server *s, struct reader *r, const char *head,
                        const char *body)
{
    char *text = text_of("%s HTTP/1.0\r\nHost: x\r\nContent-Type: application/json\r\n"
                         "Content-Length: %zu\r\n\r\n%s",
                         head, strlen(body), body);
    r->raw.n = 0;
    r->code = 0;
    r->fd = raw_connect(s);
    if (r->buffer)
        setsockopt(r->fd, SOL_SOCKET, SO_RCVBUF, &r->buffer, sizeof(r->buffer));
    raw_text(r->fd, text);
    free(text);
}

static void reader_post(const struct server *s, struct reader *r, const char *path, char *body)
{
    char *head = text_of("POST %s", path);
    *r = (struct reader){.fd = -1, .buffer = r->buffer};
    reader_send(s, r, head, body);
    free(head);
    free(body);
}

/* Go on behind the last event. The number is told in one way or the other. */
static void reader_resume(const struct server *s, struct reader *r, const char *id, bool by_query)
{
    char request[300];
    snprintf(request, sizeof(request),
             by_query ? "GET /v1/streams/%s?last_event_id=%lu HTTP/1.0\r\nHost: x\r\n\r\n"
                      : "GET /v1/streams/%s HTTP/1.0\r\nHost: x\r\nLast-Event-ID: %lu\r\n\r\n",
             id, r->last);
    r->raw.n = 0;
    r->code = 0;
    r->fd = raw_connect(s);
    raw_text(r->fd, request);
}

static void read_head(struct reader *r, const char *end)
{
    snprintf(r->head, sizeof(r->head), "%.*s", (int)(end - r->raw.data), r->raw.data);
    assert_int_equal(sscanf(r->raw.data, "HTTP/1.%*d %d", &r->code), 1);
    const char *id = strstr(r->head, "X-Stream-Id: ");
    if (id)
        sscanf(id, "X-Stream-Id: %63s", r->id);
}

/* One event, without its empty line: its number is the next one. */
static void take_event(struct reader *r, const char *event)
{
    if (event[0] == ':')
        return;
    if (strncmp(event, "id: ", 4)) {
        r->has_error = strstr(event, "\"error\"") != NULL;
        return;
    }
    unsigned long number = strtoul(event + 4, NULL, 10);
    if (number != r->last + 1 && r->last)
        fail_msg("event %lu follows event %lu", number, r->last);
    r->last = number;
    bytes_text(&r->events, event);
    bytes_text(&r->events, "\n\n");
    r->is_done = strstr(event, "data: [DONE]") != NULL;
}

/* Read up to so many bytes of the body, or until an event with this text, or to the end; then
 * hang up unless `stay`. What came of an unfinished event is forgotten, as a client would. */
static void reader_read(struct reader *r, size_t n_bytes, const char *until, bool stay)
{
    const char *end = NULL, *at;
    bool closed = false;
    while (!closed && !(end && r->raw.n - (size_t)(end + 4 - r->raw.data) >= n_bytes)) {
        char piece[4096];
        size_t n = n_bytes < sizeof(piece) && end ? n_bytes : sizeof(piece);
        ssize_t got = recv(r->fd, piece, n, 0);
        closed = got <= 0;
        if (!closed)
            bytes_append(&r->raw, piece, (size_t)got);
        end = r->raw.n ? strstr(r->raw.data, "\r\n\r\n") : NULL;
        if (until && end && strstr(end, until))
            break;
    }
    if (!end)
        fail_msg("no reply: %s", r->raw.n ? r->raw.data : "");
    read_head(r, end);
    at = end + 4;
    size_t left = r->raw.n - (size_t)(at - r->raw.data);
    if (left > n_bytes) {
        r->raw.n -= left - n_bytes;
        r->raw.data[r->raw.n] = '\0';
    }
    for (char *next; r->code == 200 && (next = strstr(at, "\n\n")); at = next + 2) {
        *next = '\0';
        take_event(r, at);
        *next = '\n';
    }
    if (stay) { /* the head and the unfinished event stay for the next call */
        struct bytes rest = {0};
        bytes_append(&rest, r->raw.data, (size_t)(end + 4 - r->raw.data));
        bytes_text(&rest, at);
        bytes_free(&r->raw);
        r->raw = rest;
        return;
    }
    close(r->fd);
    r->fd = -1;
}

/* The texts of the choices that a reader has. */
static void texts_of(const struct reader *r, struct bytes texts[MAX_CHOICES])
{
    for (const char *at = r->events.data; (at = strstr(at, "data: {"));) {
        const char *end = strstr(at, "\n\n");
        struct bytes data = {.data = (char *)(uintptr_t)at + 6, .n = (size_t)(end - at) - 6};
        cJSON *json = parse(&data);
        const cJSON *choice;
        cJSON_ArrayForEach(choice, member(json, "choices"))
        {
            const cJSON *delta = cJSON_GetObjectItem(choice, "delta");
            const cJSON *text =
                cJSON_GetObjectItem(delta ? delta : choice, delta ? "content" : "text");
            if (text)
                bytes_text(&texts[member(choice, "index")->valueint], text->valuestring);
        }
        cJSON_Delete(json);
        at = end;
    }
}

/* A whole reply's texts are what the reader has. */
static void assert_texts(const struct reader *r, const struct reply *whole)
{
    struct bytes texts[MAX_CHOICES] = {0};
    cJSON *json = parse(&whole->body);
    texts_of(r, texts);
    const cJSON *choice;
    cJSON_ArrayForEach(choice, member(json, "choices"))
    {
        const cJSON *message = cJSON_GetObjectItem(choice, "message");
        const cJSON *text = message ? member(message, "content") : member(choice, "text");
        const struct bytes *found = &texts[member(choice, "index")->valueint];
        assert_string_equal(found->data ? found->data : "", text->valuestring);
    }
    cJSON_Delete(json);
    for (int i = 0; i < MAX_CHOICES; i++)
        bytes_free(&texts[i]);
}

/* All of a stream at once, from its first event. */
static void read_all(const struct server *s, const char *id, struct reader *r)
{
    *r = (struct reader){.fd = -1};
    reader_resume(s, r, id, false);
    reader_read(r, ANY_BYTES, NULL, false);
}

static void assert_same_events(const struct reader *a, const struct reader *b)
{
    assert_int_equal(a->last, b->last);
    assert_int_equal(a->events.n, b->events.n);
    assert_memory_equal(a->events.data, b->events.data, a->events.n);
}

/* ---- coming back ----------------------------------------------------------------------------- */

static unsigned seed = 1;

static unsigned pick(unsigned n)
{
    seed = seed * 1103515245 + 12345;
    return (seed >> 16) % n;
}

/* Cut at random places, mostly in the middle of events, until all has come. */
static int cut_and_resume(const char *path, const char *what)
{
    struct reader r = {0}, uncut;
    struct reply whole;
    int cuts = 0;
    reader_post(&server, &r, path, text_of("{%s,\"stream\":true,\"resumable\":true}", what));
    reader_read(&r, pick(3000), NULL, false);
    char *id = strdup(r.id);
    for (; !r.is_done; cuts++) {
        reader_resume(&server, &r, id, pick(2));
        reader_read(&r, 1 + pick(9000), NULL, false);
        assert_int_equal(r.code, 200);
        assert_string_equal(r.id, id);
        assert_false(r.has_error);
    }
    read_all(&server, id, &uncut);
    assert_same_events(&r, &uncut);
    ask(&server, "POST", path, text_of("{%s}", what), NULL, &whole);
    assert_int_equal(whole.code, 200);
    assert_texts(&r, &whole);
    cJSON *json = parse(&whole.body);
    assert_int_equal(strncmp(id, member(json, "id")->valuestring, 4), 0);
    cJSON_Delete(json);
    reply_free(&whole);
    reader_free(&uncut);
    reader_free(&r);
    free(id);
    return cuts;
}

static void test_cut_and_resume(void **state)
{
    (void)state;
    int cuts = 0;
    for (int i = 0; i < 20; i++) {
        char what[200];
        snprintf(what, sizeof(what),
                 i % 2 ? "\"prompt\":\"%d\",\"n\":2,\"max_tokens\":60,\"seed\":%d"
                       : "\"messages\":[{\"role\":\"user\",\"content\":\"%d\"}],"
                         "\"max_tokens\":80,\"seed\":%d,\"logprobs\":true",
                 i, i);
        cuts += cut_and_resume(i % 2 ? COMPLETIONS : CHAT, what);
    }
    assert_true(cuts > 40);
    assert_true(server_metric(&server, "latte_streams_resumed_total") > cuts);
}

/* The first reader stays, two more come at different places; one text for all. */
static void test_readers_at_once(void **state)
{
    (void)state;
    struct reader first = {0}, second, third, after;
    reader_post(&server, &first, COMPLETIONS,
                text_of("{\"prompt\":\"a\",\"max_tokens\":400,\"ignore_eos\":true,"
                        "\"stream\":true,\"resumable\":true}"));
    reader_read(&first, ANY_BYTES, "id: 5\n", true);
    second = (struct reader){.fd = -1};
    third = (struct reader){.fd = -1, .last = 3};
    reader_resume(&server, &second, first.id, false);
    reader_resume(&server, &third, first.id, true);
    reader_read(&second, ANY_BYTES, "id: 20\n", true);
    reader_read(&third, ANY_BYTES, NULL, false);
    reader_read(&second, ANY_BYTES, NULL, false);
    reader_read(&first, ANY_BYTES, NULL, false);
    read_all(&server, first.id, &after);
    assert_true(first.is_done && second.is_done && third.is_done);
    assert_same_events(&first, &second);
    assert_same_events(&first, &after);
    const char *fourth = strstr(first.events.data, "id: 4\n");
    assert_string_equal(third.events.data, fourth);
    reader_free(&first);
    reader_free(&second);
    reader_free(&third);
    reader_free(&after);
}

/* The client leaves at the first event: the generation goes on, and its turn counts. */
static void test_runs_on(void **state)
{
    (void)state;
    struct id session = new_session(&server);
    double turns = server_metric(&server, "latte_session_turns_total");
    struct reader r = {0}, all;
    reader_post(&server, &r, COMPLETIONS,
                text_of("{\"session_id\":\"%s\",\"prompt\":\"a\",\"max_tokens\":600,"
                        "\"ignore_eos\":true,\"stream\":true,\"resumable\":true}",
                        session.text));
    reader_read(&r, 1, NULL, false);
    assert_true(server_await_metric(&server, "latte_session_turns_total", turns + 1, ENOUGH_MS));
    assert_int_equal(version_of(&server, &session), 1);
    read_all(&server, r.id, &all);
    assert_true(all.is_done);
    assert_non_null(strstr(all.events.data, "\"version\":1"));
    /* Nothing is left to be said. */
    char path[160];
    snprintf(path, sizeof(path), "/v1/streams/%s?last_event_id=%lu", r.id, all.last);
    assert_int_equal(code_of(&server, "GET", path, NULL, NULL), 204);
    reader_free(&r);
    reader_free(&all);
}

static void test_refusals(void **state)
{
    (void)state;
    struct reply reply;
    struct reader r = {0};
    client_post(&server, COMPLETIONS, "{\"prompt\":\"a\",\"resumable\":true}", &reply);
    assert_error_object(&reply, 400, "invalid_request_error", "invalid_parameter_combination");
    reply_free(&reply);
    client_get(&server, "/v1/streams/cmpl-nobody", &reply);
    assert_error_object(&reply, 404, "invalid_request_error", "stream_not_found");
    reply_free(&reply);
    reader_post(&server, &r, COMPLETIONS,
                text_of("{\"prompt\":\"a\",\"stream\":true,\"resumable\":true}"));
    reader_read(&r, ANY_BYTES, NULL, false);
    static const char *const wrong[] = {"-1", "x", "1x", "", "1000", "9999999999999999999"};
    for (size_t i = 0; i < sizeof(wrong) / sizeof(*wrong); i++) {
        char path[160];
        snprintf(path, sizeof(path), "/v1/streams/%s?last_event_id=%s", r.id, wrong[i]);
        client_get(&server, path, &reply);
        assert_error_object(&reply, 400, "invalid_request_error", "invalid_value");
        reply_free(&reply);
    }
    reader_free(&r);
}

/* DELETE stops what runs, says so to its readers, and leaves the session as it was. */
static void test_delete(void **state)
{
    (void)state;
    struct id session = new_session(&server);
    struct reader r = {0};
    char path[160];
    reader_post(&server, &r, COMPLETIONS,
                text_of("{\"session_id\":\"%s\",\"prompt\":\"a\",\"resumable\":true," ENDLESS "}",
                        session.text));
    reader_read(&r, ANY_BYTES, "id: 3\n", true);
    snprintf(path, sizeof(path), "/v1/streams/%s", r.id);
    assert_int_equal(code_of(&server, "DELETE", path, NULL, NULL), 200);
    reader_read(&r, ANY_BYTES, NULL, false);
    assert_true(r.has_error);
    assert_false(r.is_done);
    assert_non_null(strstr(r.raw.data, "stream_deleted"));
    assert_true(server_await_metric(&server, "latte_requests_running", 0, ENOUGH_MS));
    assert_int_equal(version_of(&server, &session), 0);
    assert_int_equal(code_of(&server, "GET", path, NULL, NULL), 404);
    assert_int_equal(code_of(&server, "DELETE", path, NULL, NULL), 404);
    reader_free(&r);
}

/* ---- owners, limits -------------------------------------------------------------------------- */

static void write_keys(char *path, size_t n)
{
    snprintf(path, n, "/tmp/latte-streams-keys-%d", (int)getpid());
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fputs("first-key-1\nsecond-key-2\n", f);
    fclose(f);
}

static const char first_key[] = "Authorization: Bearer first-key-1",
                  second_key[] = "Authorization: Bearer second-key-2";

static void test_owners(void **state)
{
    (void)state;
    struct server keyed;
    struct reply reply;
    char keys[64], path[160], id[64];
    write_keys(keys, sizeof(keys));
    const char *const args[] = {"--api-key-file", keys, NULL};
    server_start(&keyed, args);
    ask(&keyed, "POST", COMPLETIONS,
        strdup("{\"prompt\":\"a\",\"stream\":true,\"resumable\":true}"), first_key, &reply);
    assert_int_equal(reply.code, 200);
    assert_true(reply_header(&reply, "X-Stream-Id", id, sizeof(id)));
    reply_free(&reply);
    snprintf(path, sizeof(path), "/v1/streams/%s", id);
    assert_int_equal(code_of(&keyed, "GET", path, NULL, second_key), 404);
    assert_int_equal(code_of(&keyed, "DELETE", path, NULL, second_key), 404);
    assert_int_equal(code_of(&keyed, "GET", path, NULL, NULL), 401);
    assert_int_equal(code_of(&keyed, "GET", path, NULL, first_key), 200);
    server_stop(&keyed);
    remove(keys);
}

static void assert_gone(const struct server *s, const char *id, unsigned long after)
{
    char path[160];
    struct reply reply;
    snprintf(path, sizeof(path), "/v1/streams/%s?last_event_id=%lu", id, after);
    client_get(s, path, &reply);
    assert_error_object(&reply, 410, "invalid_request_error", "stream_events_dropped");
    reply_free(&reply);
}

/* More events than are kept: what is gone is said, to those who come and to those who are there. */
static void test_bounded(void **state)
{
    (void)state;
    const char *const args[] = {"--stream-limit-mb", "0.25", "--stream-retention-mb", "0.5", NULL};
    static const char body[] = "{\"prompt\":\"a\",\"n\":2,\"max_tokens\":800,\"ignore_eos\":true,"
                               "\"logprobs\":20,\"stream\":true,\"resumable\":true}";
    struct server small;
    struct reader slow = {.buffer = 16 << 10}, late;
    char path[160], first_id[64];
    server_start(&small, args);
    reader_post(&small, &slow, COMPLETIONS, strdup(body)); /* and reads nothing more than that */
    reader_read(&slow, ANY_BYTES, "id: 1\n", true);
    snprintf(first_id, sizeof(first_id), "%s", slow.id);
    assert_true(server_await_metric(&small, "latte_request_success_total{finish_reason=\"length\"}",
                                    2, ENOUGH_MS));
    assert_true(server_metric(&small, "latte_stream_bytes") < 400 << 10);
    assert_true(server_metric(&small, "latte_stream_events_dropped_total") > 0);
    assert_gone(&small, first_id, 0);
    reader_read(&slow, ANY_BYTES, NULL, false);
    assert_true(slow.has_error);
    assert_false(slow.is_done);
    assert_non_null(strstr(slow.raw.data, "stream_events_dropped"));
    assert_gone(&small, first_id, slow.last);
    /* What is kept is whole. */
    int code = 410;
    late = (struct reader){.fd = -1, .last = slow.last};
    while (code == 410) {
        late.last += 10;
        snprintf(path, sizeof(path), "/v1/streams/%s?last_event_id=%lu", first_id, late.last);
        code = code_of(&small, "GET", path, NULL, NULL);
    }
    assert_int_equal(code, 200);
    reader_resume(&small, &late, first_id, true);
    reader_read(&late, ANY_BYTES, NULL, false);
    assert_true(late.is_done);
    /* Of many streams the oldest go. */
    for (int i = 0; i < 3; i++) {
        struct reply reply;
        client_post(&small, COMPLETIONS, body, &reply);
        assert_int_equal(reply.code, 200);
        reply_free(&reply);
    }
    snprintf(path, sizeof(path), "/v1/streams/%s", first_id);
    assert_int_equal(code_of(&small, "GET", path, NULL, NULL), 404);
    assert_true(server_metric(&small, "latte_streams_evicted_total") >= 1);
    assert_true(server_metric(&small, "latte_stream_bytes") < 660 << 10);
    reader_free(&slow);
    reader_free(&late);
    server_stop(&small);
}

static void test_retention(void **state)
{
    (void)state;
    const char *const args[] = {"--stream-retention", "0", NULL};
    struct server brief;
    struct reader r = {0};
    char path[160];
    server_start(&brief, args);
    reader_post(&brief, &r, COMPLETIONS,
                text_of("{\"prompt\":\"a\",\"resumable\":true," ENDLESS "}"));
    reader_read(&r, ANY_BYTES, "id: 2\n", false);
    snprintf(path, sizeof(path), "/v1/streams/%s", r.id);
    assert_int_equal(server_metric(&brief, "latte_streams_kept"), 1);
    assert_int_equal(code_of(&brief, "DELETE", path, NULL, NULL), 200);
    reader_free(&r);
    reader_post(&brief, &r, COMPLETIONS,
                text_of("{\"prompt\":\"a\",\"stream\":true,\"resumable\":true}"));
    reader_read(&r, ANY_BYTES, NULL, false);
    assert_true(server_await_metric(&brief, "latte_streams_kept", 0, ENOUGH_MS));
    assert_int_equal(server_metric(&brief, "latte_stream_bytes"), 0);
    snprintf(path, sizeof(path), "/v1/streams/%s", r.id);
    assert_int_equal(code_of(&brief, "GET", path, NULL, NULL), 404);
    reader_free(&r);
    server_stop(&brief);
}

/* A stop waits for a stream without a client as for any other; not for ever. */
static void test_drain(void **state)
{
    (void)state;
    const char *const args[] = {"--drain-timeout", "1", NULL};
    for (int endless = 0; endless < 2; endless++) {
        struct server s;
        struct reader r = {0};
        server_start(&s, endless ? args : NULL);
        reader_post(&s, &r, COMPLETIONS,
                    text_of("{\"prompt\":\"a\",\"max_tokens\":%d,\"ignore_eos\":true,"
                            "\"stream\":true,\"resumable\":true}",
                            endless ? 900000 : 1000));
        reader_read(&r, 1, NULL, false);
        reader_free(&r);
        server_signal(&s, SIGTERM);
        assert_int_equal(server_wait_exit(&s, ENOUGH_MS), endless);
        char *log = server_log(&s);
        assert_int_equal(strstr(log, "1 detached streams are cut off") != NULL, endless);
        free(log);
        server_stop(&s);
    }
}

/* ---- repetitions ----------------------------------------------------------------------------- */

static bool is_replay(const struct reply *reply)
{
    char value[16];
    return reply_header(reply, "Idempotent-Replayed", value, sizeof(value)) &&
           !strcmp(value, "true");
}

/* Of a whole completion. */
static const char *text_in(const cJSON *completion)
{
    return member(cJSON_GetArrayItem(member(completion, "choices"), 0), "text")->valuestring;
}

static void ask_again(const struct server *s, const char *body, const char *header,
                      const struct reply *first)
{
    struct reply reply;
    ask(s, "POST", COMPLETIONS, strdup(body), header, &reply);
    assert_int_equal(reply.code, first->code);
    assert_true(is_replay(&reply));
    assert_int_equal(reply.body.n, first->body.n);
    assert_memory_equal(reply.body.data, first->body.data, first->body.n);
    reply_free(&reply);
}

/* A turn is applied once, however often it is sent. */
static void test_replay(void **state)
{
    (void)state;
    struct id session = new_session(&server);
    struct reply first, other;
    char *body = text_of("{\"session_id\":\"%s\",\"prompt\":\"a\"}", session.text);
    ask(&server, "POST", COMPLETIONS, strdup(body), "Idempotency-Key: replay-1", &first);
    assert_int_equal(first.code, 200);
    assert_false(is_replay(&first));
    for (int i = 0; i < 3; i++)
        ask_again(&server, body, "Idempotency-Key: replay-1", &first);
    assert_int_equal(version_of(&server, &session), 1);
    /* Another key is another turn; the same key with another body is a mistake. */
    ask(&server, "POST", COMPLETIONS, strdup(body), "Idempotency-Key: replay-2", &other);
    assert_int_equal(other.code, 200);
    assert_false(is_replay(&other));
    reply_free(&other);
    assert_int_equal(version_of(&server, &session), 2);
    ask(&server, "POST", COMPLETIONS, text_of("%s ", body), "Idempotency-Key: replay-1", &other);
    assert_error_object(&other, 422, "invalid_request_error", "idempotency_key_reused");
    reply_free(&other);
    /* On another path it is another request. */
    ask(&server, "POST", CHAT, strdup(body), "Idempotency-Key: replay-1", &other);
    assert_int_equal(other.code, 400);
    assert_false(is_replay(&other));
    reply_free(&other);
    assert_int_equal(version_of(&server, &session), 2);
    reply_free(&first);
    free(body);
}

/* What the request itself is to blame for is kept, what may pass is not. */
static void test_kept_errors(void **state)
{
    (void)state;
    static const char wrong[] = "{\"prompt\":\"a\",\"temperature\":9}";
    struct reply first;
    ask(&server, "POST", COMPLETIONS, strdup(wrong), "Idempotency-Key: wrong", &first);
    assert_error_object(&first, 400, "invalid_request_error", "decimal_above_max_value");
    ask_again(&server, wrong, "Idempotency-Key: wrong", &first);
    reply_free(&first);

    struct id session = new_session(&server);
    struct reader r = {0};
    reader_post(&server, &r, COMPLETIONS,
                text_of("{\"session_id\":\"%s\",\"prompt\":\"a\"," ENDLESS "}", session.text));
    reader_read(&r, ANY_BYTES, "data: ", true);
    char *body = text_of("{\"session_id\":\"%s\",\"prompt\":\"a\"}", session.text);
    assert_int_equal(code_of(&server, "POST", COMPLETIONS, strdup(body), "Idempotency-Key: later"),
                     409);
    reader_free(&r);
    assert_true(server_await_metric(&server, "latte_requests_running", 0, ENOUGH_MS));
    ask(&server, "POST", COMPLETIONS, body, "Idempotency-Key: later", &first);
    assert_int_equal(first.code, 200);
    assert_false(is_replay(&first));
    reply_free(&first);

    char longest[300] = "Idempotency-Key: ";
    memset(longest + strlen(longest), 'k', 256);
    static const char body_text[] = "{\"prompt\":\"a\"}";
    const char *const bad[] = {longest, "Idempotency-Key: a b", "Idempotency-Key: \xc3\xa9",
                               "Idempotency-Key;"}; /* libcurl's way to send an empty one */
    for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
        ask(&server, "POST", COMPLETIONS, strdup(body_text), bad[i], &first);
        assert_error_object(&first, 400, "invalid_request_error", "invalid_idempotency_key");
        reply_free(&first);
    }
    longest[strlen("Idempotency-Key: ") + 255] = '\0';
    assert_int_equal(code_of(&server, "POST", COMPLETIONS, strdup(body_text), longest), 200);
}

/* Send a request with a key and leave before its answer. */
static void post_and_leave(const struct server *s, const char *body, const char *key)
{
    double n_keys = server_metric(s, "latte_idempotency_keys");
    char *text = text_of("POST " COMPLETIONS " HTTP/1.1\r\nHost: x\r\nIdempotency-Key: %s\r\n"
                         "Content-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s",
                         key, strlen(body), body);
    int fd = raw_connect(s);
    raw_text(fd, text);
    assert_true(server_await_metric(s, "latte_idempotency_keys", n_keys + 1, ENOUGH_MS));
    close(fd);
    free(text);
}

/* The client leaves in the middle and asks again, as an SDK does by itself. */
static void test_retry_of_a_whole_reply(void **state)
{
    (void)state;
    struct id session = new_session(&server);
    struct reply retry, plain;
    static const char what[] = "\"prompt\":\"a\",\"max_tokens\":600,\"ignore_eos\":true,\"seed\":9";
    char *body = text_of("{\"session_id\":\"%s\",%s}", session.text, what);
    post_and_leave(&server, body, "left");
    ask(&server, "POST", COMPLETIONS, strdup(body), "Idempotency-Key: left", &retry);
    assert_int_equal(retry.code, 200);
    assert_true(is_replay(&retry));
    assert_int_equal(version_of(&server, &session), 1);
    ask_again(&server, body, "Idempotency-Key: left", &retry);
    /* The text is what a request without all this gets. */
    ask(&server, "POST", COMPLETIONS, text_of("{%s}", what), NULL, &plain);
    cJSON *got = parse(&retry.body), *expected = parse(&plain.body);
    assert_string_equal(text_in(got), text_in(expected));
    cJSON_Delete(got);
    cJSON_Delete(expected);
    reply_free(&plain);
    reply_free(&retry);
    free(body);
}

/* Cut off in the middle of a stream: the repetition gets it from the start. */
static void test_retry_of_a_stream(void **state)
{
    (void)state;
    struct id session = new_session(&server);
    struct reply retry, again, whole;
    struct bytes begun = {0};
    char *body = text_of("{\"session_id\":\"%s\",\"prompt\":\"a\",\"max_tokens\":300,"
                         "\"ignore_eos\":true,\"seed\":5,\"stream\":true}",
                         session.text);
    char *text = text_of("POST " COMPLETIONS " HTTP/1.0\r\nHost: x\r\nIdempotency-Key: cut\r\n"
                         "Content-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s",
                         strlen(body), body);
    int fd = raw_connect(&server);
    raw_text(fd, text);
    assert_true(raw_await(fd, &begun, "id: 2\n", ENOUGH_MS));
    close(fd);
    ask(&server, "POST", COMPLETIONS, strdup(body), "Idempotency-Key: cut", &retry);
    assert_int_equal(retry.code, 200);
    assert_true(is_replay(&retry));
    assert_non_null(strstr(retry.body.data, "data: [DONE]"));
    const char *events = strstr(begun.data, "\r\n\r\n") + 4;
    size_t n = (size_t)(strstr(events, "id: 2\n") - events);
    assert_memory_equal(retry.body.data, events, n);
    ask(&server, "POST", COMPLETIONS, strdup(body), "Idempotency-Key: cut", &again);
    assert_string_equal(again.body.data, retry.body.data);
    assert_int_equal(version_of(&server, &session), 1);
    client_post(&server, COMPLETIONS,
                "{\"prompt\":\"a\",\"max_tokens\":300,\"ignore_eos\":true,\"seed\":5}", &whole);
    struct reader all = {.fd = -1, .events = retry.body};
    assert_texts(&all, &whole);
    reply_free(&whole);
    reply_free(&again);
    reply_free(&retry);
    bytes_free(&begun);
    free(text);
    free(body);
}

struct twin {
    const char *body;
    struct reply reply;
};

static void *run_twin(void *context)
{
    struct twin *t = context;
    ask(&server, "POST", COMPLETIONS, strdup(t->body), "Idempotency-Key: twins", &t->reply);
    return NULL;
}

/* All at once: one runs, the others wait for it. */
static void test_twins(void **state)
{
    (void)state;
    enum { N = 5 };
    struct id session = new_session(&server);
    struct twin twins[N];
    pthread_t threads[N];
    int n_replays = 0;
    char *body = text_of("{\"session_id\":\"%s\",\"prompt\":\"a\",\"max_tokens\":500,"
                         "\"ignore_eos\":true}",
                         session.text);
    for (int i = 0; i < N; i++) {
        twins[i].body = body;
        assert_false(pthread_create(&threads[i], NULL, run_twin, &twins[i]));
    }
    for (int i = 0; i < N; i++)
        pthread_join(threads[i], NULL);
    for (int i = 0; i < N; i++) {
        assert_int_equal(twins[i].reply.code, 200);
        assert_string_equal(twins[i].reply.body.data, twins[0].reply.body.data);
        n_replays += is_replay(&twins[i].reply);
    }
    assert_int_equal(n_replays, N - 1);
    assert_int_equal(version_of(&server, &session), 1);
    for (int i = 0; i < N; i++)
        reply_free(&twins[i].reply);
    free(body);
}

/* A reply that is no longer kept is not made again while its key is known; other owners' keys are
 * others. */
static void test_replays_are_bounded(void **state)
{
    (void)state;
    struct server keyed;
    struct reply reply;
    static const char body[] = "{\"prompt\":\"a\",\"max_tokens\":1}";
    char keys[64];
    write_keys(keys, sizeof(keys));
    const char *const args[] = {"--api-key-file", keys, "--idempotency-mb", "0.02", NULL};
    server_start(&keyed, args);
    for (int i = 0; i < 100; i++) {
        char key[64];
        snprintf(key, sizeof(key), "Idempotency-Key: many-%d", i);
        const char *const headers[] = {first_key, key, NULL};
        client_send(&keyed,
                    &(struct client_request){.path = COMPLETIONS, .body = body, .headers = headers},
                    &reply);
        assert_int_equal(reply.code, 200);
        reply_free(&reply);
    }
    assert_true(server_metric(&keyed, "latte_idempotency_bytes") <= 20972);
    assert_true(server_metric(&keyed, "latte_idempotency_evicted_total") > 10);
    const struct {
        const char *owner, *key;
        int code;
    } cases[] = {{first_key, "Idempotency-Key: many-99", 200},
                 {first_key, "Idempotency-Key: many-64", 410},
                 {second_key, "Idempotency-Key: many-64", 200}};
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        const char *const headers[] = {cases[i].owner, cases[i].key, NULL};
        client_send(&keyed,
                    &(struct client_request){.path = COMPLETIONS, .body = body, .headers = headers},
                    &reply);
        assert_int_equal(reply.code, cases[i].code);
        assert_int_equal(is_replay(&reply), i == 0);
        reply_free(&reply);
    }
    server_stop(&keyed);
    remove(keys);
}

/* ---- turns in line --------------------------------------------------------------------------- */

/* A turn of the session that lasts until release_turn. */
static struct id hold_turn(const struct server *s, const struct id *session)
{
    struct reader r = {0};
    struct id stream;
    reader_post(s, &r, COMPLETIONS,
                text_of("{\"session_id\":\"%s\",\"prompt\":\"a\",\"resumable\":true," ENDLESS "}",
                        session->text));
    reader_read(&r, ANY_BYTES, "id: 1\n", false);
    snprintf(stream.text, sizeof(stream.text), "%s", r.id);
    reader_free(&r);
    return stream;
}

static void release_turn(const struct server *s, const struct id *stream)
{
    char path[128];
    snprintf(path, sizeof(path), "/v1/streams/%s", stream->text);
    assert_int_equal(code_of(s, "DELETE", path, NULL, NULL), 200);
}

/* Send a turn that waits, and see that it does. */
static int wait_in_line(const struct id *session, const char *header, const char *more)
{
    double n = server_metric(&server, "latte_session_turns_waiting");
    char *body =
        text_of("{\"session_id\":\"%s\",\"prompt\":\"a\",\"queue\":true%s}", session->text, more);
    char *text = text_of("POST " COMPLETIONS " HTTP/1.0\r\nHost: x\r\n%s"
                         "Content-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s",
                         header, strlen(body), body);
    int fd = raw_connect(&server);
    raw_text(fd, text);
    assert_true(server_await_metric(&server, "latte_session_turns_waiting", n + 1, ENOUGH_MS));
    free(text);
    free(body);
    return fd;
}

/* The answer of one that waited; its version, or 0. */
static int read_turn(int fd, int code)
{
    struct bytes reply = {0};
    int found = 0;
    assert_true(raw_read(fd, &reply, ENOUGH_MS));
    close(fd);
    assert_int_equal(sscanf(reply.data, "HTTP/1.%*d %d", &found), 1);
    if (found != code)
        fail_msg("expected %d: %s", code, reply.data);
    const char *version = strstr(reply.data, "\"version\":");
    int n = version ? atoi(version + 10) : 0;
    bytes_free(&reply);
    return n;
}

static void test_turns_in_line(void **state)
{
    (void)state;
    enum { N = 6, GONE = 3, STALE = 4 };
    struct id session = new_session(&server), stream = hold_turn(&server, &session);
    int fds[N], version = 0;
    char large[90000] = ",\"user\":\"";
    struct reply reply;
    size_t n = strlen(large);
    memset(large + n, 'u', sizeof(large) - n - 2);
    memcpy(large + sizeof(large) - 2, "\"", 2);
    for (int i = 0; i < N; i++)
        fds[i] = wait_in_line(&session, i == STALE ? "If-Match: \"0\"\r\n" : "",
                              i == 1   ? large
                              : i == 2 ? ",\"stream\":true"
                                       : "");
    close(fds[GONE]);
    assert_true(server_await_metric(&server, "latte_session_turns_waiting", N - 1, ENOUGH_MS));
    /* Who does not wait gets what it got before. */
    ask(&server, "POST", COMPLETIONS,
        text_of("{\"session_id\":\"%s\",\"prompt\":\"a\"}", session.text), NULL, &reply);
    assert_error_object(&reply, 409, "invalid_request_error", NULL);
    reply_free(&reply);
    release_turn(&server, &stream);
    for (int i = 0; i < N; i++) {
        if (i == STALE)
            read_turn(fds[i], 412);
        else if (i != GONE)
            assert_int_equal(read_turn(fds[i], 200), ++version);
    }
    assert_int_equal(version_of(&server, &session), N - 2);
    assert_int_equal(server_metric(&server, "latte_session_turns_waiting"), 0);
    client_post(&server, COMPLETIONS, "{\"prompt\":\"a\",\"queue\":true}", &reply);
    assert_error_object(&reply, 400, "invalid_request_error", "invalid_parameter_combination");
    reply_free(&reply);
}

/* ---- quotas ---------------------------------------------------------------------------------- */

/* What a key may have running, and how many may wait for a session. */
static void test_quotas(void **state)
{
    (void)state;
    struct server keyed;
    struct reply reply;
    char keys[64], path[160], id[64], session[64];
    write_keys(keys, sizeof(keys));
    const char *const args[] = {
        "--api-key-file", keys, "--max-running-per-key", "2", "--max-queued-turns", "0", NULL};
    static const char two[] = "{\"prompt\":\"a\",\"n\":2,\"max_tokens\":2}",
                      three[] = "{\"prompt\":\"a\",\"n\":3,\"max_tokens\":2}";
    server_start(&keyed, args);
    /* One after the other, they are never in each other's way. */
    for (int i = 0; i < 20; i++) {
        static const char *const streams[] = {"", ",\"stream\":true",
                                              ",\"stream\":true,\"resumable\":true"};
        assert_int_equal(
            code_of(&keyed, "POST", COMPLETIONS,
                    text_of("{\"prompt\":\"a\",\"n\":2,\"max_tokens\":2%s}", streams[i % 3]),
                    first_key),
            200);
    }
    ask(&keyed, "POST", COMPLETIONS, strdup(three), first_key, &reply);
    assert_error_object(&reply, 400, "invalid_request_error", "running_quota_exceeded");
    reply_free(&reply);

    ask(&keyed, "POST", "/v1/sessions", strdup("{}"), first_key, &reply);
    cJSON *json = parse(&reply.body);
    snprintf(session, sizeof(session), "%s", member(json, "id")->valuestring);
    cJSON_Delete(json);
    reply_free(&reply);
    /* A stream that runs on counts, though its client is gone. */
    struct reader r = {.fd = raw_connect(&keyed)};
    char *body =
        text_of("{\"session_id\":\"%s\",\"prompt\":\"a\",\"resumable\":true," ENDLESS "}", session);
    char *text = text_of("POST " COMPLETIONS " HTTP/1.0\r\nHost: x\r\n%s\r\n"
                         "Content-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s",
                         first_key, strlen(body), body);
    raw_text(r.fd, text);
    reader_read(&r, ANY_BYTES, "id: 1\n", false);
    snprintf(id, sizeof(id), "%s", r.id);
    reader_free(&r);
    ask(&keyed, "POST", COMPLETIONS, strdup(two), first_key, &reply);
    assert_error_object(&reply, 429, "rate_limit_error", "running_quota_exceeded");
    char after[8];
    assert_true(reply_header(&reply, "Retry-After", after, sizeof(after)));
    reply_free(&reply);
    assert_int_equal(code_of(&keyed, "POST", COMPLETIONS, strdup(two), second_key), 200);
    ask(&keyed, "POST", COMPLETIONS,
        text_of("{\"session_id\":\"%s\",\"prompt\":\"a\",\"queue\":true}", session), first_key,
        &reply);
    assert_error_object(&reply, 429, "rate_limit_error", "session_queue_full");
    reply_free(&reply);
    snprintf(path, sizeof(path), "/v1/streams/%s", id);
    assert_int_equal(code_of(&keyed, "DELETE", path, NULL, first_key), 200);
    assert_int_equal(code_of(&keyed, "POST", COMPLETIONS, strdup(two), first_key), 200);
    assert_int_equal(server_metric(&keyed, "latte_quota_rejections_total"), 2);
    free(text);
    free(body);
    server_stop(&keyed);
    remove(keys);
}

int main(int argc, char **argv)
{
    if (argc > 1)
        cmocka_set_test_filter(argv[1]);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_cut_and_resume),
        cmocka_unit_test(test_readers_at_once),
        cmocka_unit_test(test_runs_on),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_delete),
        cmocka_unit_test(test_owners),
        cmocka_unit_test(test_bounded),
        cmocka_unit_test(test_retention),
        cmocka_unit_test(test_drain),
        cmocka_unit_test(test_replay),
        cmocka_unit_test(test_kept_errors),
        cmocka_unit_test(test_retry_of_a_whole_reply),
        cmocka_unit_test(test_retry_of_a_stream),
        cmocka_unit_test(test_twins),
        cmocka_unit_test(test_replays_are_bounded),
        cmocka_unit_test(test_turns_in_line),
        cmocka_unit_test(test_quotas),
    };
    return cmocka_run_group_tests(tests, start_server, stop_server);
}
