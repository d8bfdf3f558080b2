/* test_redis.c - two servers with one Redis: each goes on with what the other began, one turn at a
 * time, whatever dies meanwhile. The oracle is a server that gets the whole conversation without a
 * session, token for token.
 */
#include "tests/http/harness.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tests/http/talk.h"
#include "tests/unit/model_files.h"
#include "tests/unit/redis_server.h"

#define COMPLETIONS "/v1/completions"

enum { LEASE_MS = 1500, LONG_TURN = 100000, MAX_TURN = 400 };

static struct redis_server redis;
static struct server servers[2];
static char model_dir[128];

/* ---- the servers ----------------------------------------------------------------------------- */

static void start(struct server *s, const char *const *more)
{
    char lease[12];
    snprintf(lease, sizeof(lease), "%d", LEASE_MS);
    const char *args[32] = {"--model",    model_dir, "--store",         redis.url,
                            "--lease-ms", lease,     "--store-timeout", "1",
                            "--threads",  "1",       "--no-access-log"};
    for (int n = 11; more && *more; more++, n++)
        args[n] = *more;
    server_start(s, args);
}

static void start_both(const char *const *more)
{
    for (int i = 0; i < 2; i++)
        start(&servers[i], more);
}

static void end(struct server *s, int signal_number)
{
    if (s->pid <= 0)
        return;
    server_signal(s, signal_number);
    int code = server_wait_exit(s, 30000);
    close(s->stdout_fd);
    test_dir_remove(s->dir);
    assert_int_equal(code, signal_number == SIGTERM ? 0 : 128 + signal_number);
}

static void end_both(int signal_number)
{
    for (int i = 0; i < 2; i++)
        end(&servers[i], signal_number);
}

static int set_up(void **state)
{
    (void)state;
    if (!redis_server_is_installed())
        return 0;
    make_tiny_model(model_dir, sizeof(model_dir));
    redis_server_open(&redis, NULL);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    for (int i = 0; i < 2; i++) {
        if (servers[i].pid > 0)
            server_signal(&servers[i], SIGCONT);
        end(&servers[i], SIGKILL);
    }
    redis_server_close(&redis);
    if (*model_dir)
        test_dir_remove(model_dir);
    return 0;
}

static void ask_redis(const char *a, const char *b, const char *c, char *out, int n)
{
    redis_server_ask(&redis, (const char *const[]){a, b, c, NULL}, out, n);
}

/* ---- going on -------------------------------------------------------------------------------- */

static void test_goes_on_elsewhere(void **state)
{
    (void)state;
    struct talk t;
    if (!redis.pid)
        skip();
    start_both(NULL);
    talk_open(&t, &servers[0], NULL);
    for (int i = 0; i < 6; i++)
        assert_int_equal(talk_turn(&t, &servers[i % 2], i, 6 + i, "", NULL), 200);
    talk_check(&t, &servers[0], 7, NULL);
    talk_check(&t, &servers[1], 8, NULL);
    end(&servers[0], SIGKILL);
    start(&servers[0], NULL); /* which knows nothing but Redis */
    talk_check(&t, &servers[0], 9, NULL);
    struct answer a = talk_ask(&t, &servers[1], "GET", "", NULL, NULL);
    assert_string_equal(answer_member(a.json, "tier")->valuestring, "store");
    answer_free(&a);
    talk_check(&t, &servers[1], 10, NULL);
    end_both(SIGTERM);
}

static struct bytes export_of(const struct talk *t, const struct server *s)
{
    char path[160];
    struct reply reply;
    snprintf(path, sizeof(path), "/v1/sessions/%s/state", t->id);
    client_get(s, path, &reply);
    assert_int_equal(reply.code, 200);
    struct bytes body = reply.body;
    reply.body = (struct bytes){0};
    reply_free(&reply);
    return body;
}

static int import_to(const struct talk *t, const struct server *s, const struct bytes *file,
                     const char *header)
{
    char path[160];
    struct reply reply;
    const char *const headers[] = {"Content-Type: application/octet-stream", header, NULL};
    struct client_request request = {
        .method = "PUT", .path = path, .body = file->data, .n_body = file->n, .headers = headers};
    snprintf(path, sizeof(path), "/v1/sessions/%s/state", t->id);
    client_send(s, &request, &reply);
    int code = reply.code;
    reply_free(&reply);
    return code;
}

static void fork_of(const struct talk *t, const struct server *s, struct talk *child)
{
    struct answer a = talk_ask(t, s, "POST", "/fork", "{}", NULL);
    answer_expect(&a, 200);
    *child = *t;
    child->version = 0;
    snprintf(
        child->id, sizeof(child->id), "%s",
        answer_member(cJSON_GetArrayItem(answer_member(a.json, "data"), 0), "id")->valuestring);
    answer_free(&a);
}

static void test_what_belongs_to_a_session(void **state)
{
    (void)state;
    static struct talk t, early, before, child, other;
    struct server *a = &servers[0], *b = &servers[1];
    if (!redis.pid)
        skip();
    start_both(NULL);
    talk_open(&t, a, NULL);
    assert_int_equal(talk_turn(&t, a, 1, 8, "", NULL), 200);
    talk_do(&t, b, "POST", "/snapshots", "{\"name\":\"early\"}", 200);
    talk_do(&t, a, "POST", "/snapshots", "{\"name\":\"early\"}", 409);
    early = t;
    assert_int_equal(talk_turn(&t, a, 2, 8, "", NULL), 200);
    before = t;
    assert_int_equal(talk_turn(&t, b, 3, 8, "", NULL), 200);
    fork_of(&t, a, &child);
    talk_check(&child, b, 4, NULL);
    struct bytes from_a = export_of(&t, a), from_b = export_of(&t, b);
    assert_int_equal(from_a.n, from_b.n);
    assert_memory_equal(from_a.data, from_b.data, from_a.n);
    talk_do(&t, a, "POST", "/rollback", "{}", 200); /* of a turn that b had */
    before.version = t.version + 1;
    talk_check(&before, b, 5, NULL);
    talk_do(&before, b, "POST", "/rollback", "{\"snapshot\":\"early\"}", 200);
    early.version = before.version + 1;
    talk_check(&early, a, 6, NULL);
    talk_open(&other, a, NULL);
    assert_int_equal(import_to(&other, b, &from_a, "If-Match: \"1\""), 412);
    assert_int_equal(import_to(&other, b, &from_a, "If-Match: \"0\""), 200);
    memcpy(other.ids, t.ids, sizeof(t.ids));
    other.n = t.n;
    other.version = 1;
    talk_check(&other, a, 7, NULL);
    talk_do(&other, b, "DELETE", "", NULL, 200);
    talk_do(&other, a, "GET", "", NULL, 404);
    assert_int_equal(talk_turn(&other, a, 1, 1, "", NULL), 404);
    bytes_free(&from_a);
    bytes_free(&from_b);
    end_both(SIGTERM);
}

/* The next of a chain of responses; its id goes to the caller. */
static void respond(const struct server *s, char id[64])
{
    char *body = *id ? text_of("{\"input\":\"more\",\"max_output_tokens\":16,"
                               "\"previous_response_id\":\"%s\"}",
                               id)
                     : strdup("{\"input\":\"hello\",\"max_output_tokens\":16}");
    struct answer a = answer_of(s, "POST", "/v1/responses", body, NULL);
    answer_expect(&a, 200);
    snprintf(id, 64, "%s", answer_member(a.json, "id")->valuestring);
    answer_free(&a);
}

/* A session that was made to go on from where a talk is. */
static void take_id(struct answer *made, const struct talk *t, struct talk *child)
{
    answer_expect(made, 200);
    *child = *t;
    child->version = 0;
    snprintf(child->id, sizeof(child->id), "%s", answer_member(made->json, "id")->valuestring);
    answer_free(made);
}

static void begin_from_preset(const struct server *s, const struct talk *t, struct talk *child)
{
    struct answer made =
        answer_of(s, "POST", "/v1/sessions", strdup("{\"from\":{\"preset\":\"p\"}}"), NULL);
    take_id(&made, t, child);
}

/* A preset is one server's own; a session that begins with it is everybody's, also when Redis has
 * forgotten what the preset was saved with. */
static void test_from(void **state)
{
    (void)state;
    static struct talk t, child;
    struct server *a = &servers[0], *b = &servers[1];
    char out[16];
    if (!redis.pid)
        skip();
    start_both((const char *const[]){"--open-admin", NULL});
    talk_open(&t, a, NULL);
    assert_int_equal(talk_turn(&t, a, 1, 8, "", NULL), 200);
    struct answer made =
        answer_of(b, "PUT", "/v1/presets/p", text_of("{\"session\":\"%s\"}", t.id), NULL);
    answer_expect(&made, 200);
    answer_free(&made);
    for (int i = 0; i < 2; i++) {
        begin_from_preset(b, &t, &child);
        talk_check(&child, a, 11 + i, NULL);
        talk_check(&child, b, 12 + i, NULL);
        ask_redis("FLUSHALL", NULL, NULL, out, sizeof(out)); /* and the sessions with it */
    }
    talk_open(&t, a, NULL);
    assert_int_equal(talk_turn(&t, a, 2, 8, "", NULL), 200);
    made = answer_of(b, "POST", "/v1/sessions", text_of("{\"from\":{\"session\":\"%s\"}}", t.id),
                     NULL);
    take_id(&made, &t, &child);
    talk_check(&child, a, 13, NULL);
    end_both(SIGTERM);
}

/* What only this server has stays in its memory, however short that is: Redis has it as long as a
 * session needs it, and not longer. */
static void test_what_is_not_shared(void **state)
{
    (void)state;
    enum { N = 150 }; /* states are too many for 1 MB */
    static struct talk t, child, many;
    struct server *s = &servers[0];
    char response[64] = "";
    if (!redis.pid)
        skip();
    start(s, (const char *const[]){"--open-admin", "--host-state-mb", "1", NULL});
    respond(s, response);
    talk_open(&t, s, NULL);
    assert_int_equal(talk_turn(&t, s, 1, 8, "", NULL), 200);
    struct answer saved =
        answer_of(s, "PUT", "/v1/presets/p", text_of("{\"session\":\"%s\"}", t.id), NULL);
    answer_expect(&saved, 200);
    answer_free(&saved);
    begin_from_preset(s, &t, &child);
    talk_do(&child, s, "DELETE", "", NULL, 200);
    for (int i = 0; i < N; i++) {
        talk_open(&many, s, NULL);
        assert_int_equal(talk_turn(&many, s, i, 2, "", NULL), 200);
    }
    assert_true(server_metric(s, "latte_state_evictions_total") > 0);
    begin_from_preset(s, &t, &child);
    talk_check(&child, s, 3, NULL);
    respond(s, response);
    respond(s, response);
    end(s, SIGTERM);
}

/* ---- one turn at a time ---------------------------------------------------------------------- */

/* A long turn on a thread of its own, which can be hung up on. */
struct stream {
    pthread_t thread;
    const struct server *server;
    const struct talk *talk;
    int max_tokens;
    atomic_int n_events;
    atomic_bool hangs_up;
    struct bytes said;
    int code;
};

static bool on_data(void *context, const char *data, size_t n)
{
    struct stream *s = context;
    bytes_append(&s->said, data, n);
    atomic_fetch_add(&s->n_events, 1);
    return !atomic_load(&s->hangs_up);
}

static void *run_stream(void *context)
{
    struct stream *s = context;
    int32_t prompt[TALK_PROMPT];
    int n = talk_prompt(prompt, 21);
    char *body = talk_body(s->talk, prompt, n, s->max_tokens, ",\"stream\":true");
    struct client_request request = {
        .path = COMPLETIONS, .body = body, .on_data = on_data, .context = s};
    struct reply reply;
    client_send(s->server, &request, &reply);
    s->code = reply.code;
    reply_free(&reply);
    free(body);
    return NULL;
}

static void begin_stream(struct stream *s, const struct talk *t, const struct server *server,
                         int max_tokens)
{
    *s = (struct stream){.server = server, .talk = t, .max_tokens = max_tokens};
    assert_int_equal(pthread_create(&s->thread, NULL, run_stream, s), 0);
    for (int i = 0; !atomic_load(&s->n_events); i++) {
        assert_true(i < 10000);
        sleep_ms(1);
    }
}

static void end_stream(struct stream *s, bool hangs_up)
{
    atomic_store(&s->hangs_up, hangs_up);
    pthread_join(s->thread, NULL);
}

static bool says(const struct stream *s, const char *text)
{
    return s->said.n && strstr(s->said.data, text);
}

/* The turn succeeds when the other one's end has been told; not before min_ms, within max_ms. */
static void await_turn(struct talk *t, const struct server *s, int min_ms, int max_ms)
{
    int64_t begin = now_ms();
    int code;
    while ((code = talk_turn(t, s, 31, 4, "", NULL)) == 409 && now_ms() - begin < max_ms)
        sleep_ms(10);
    assert_int_equal(code, 200);
    assert_true(now_ms() - begin >= min_ms);
}

static void test_a_turn_elsewhere(void **state)
{
    (void)state;
    static struct talk t, child;
    struct stream stream;
    struct server *a = &servers[0], *b = &servers[1];
    if (!redis.pid)
        skip();
    start_both(NULL);
    talk_open(&t, a, NULL);
    assert_int_equal(talk_turn(&t, b, 1, 4, "", NULL), 200);
    begin_stream(&stream, &t, a, LONG_TURN);
    assert_int_equal(talk_turn(&t, b, 2, 4, "", NULL), 409);
    talk_do(&t, b, "POST", "/rollback", "{}", 409);
    talk_do(&t, b, "POST", "/snapshots", "{\"name\":\"x\"}", 409);
    talk_do(&t, b, "DELETE", "", NULL, 409);
    struct answer shown = talk_ask(&t, b, "GET", "", NULL, NULL);
    assert_true(cJSON_IsTrue(answer_member(shown.json, "in_turn")));
    answer_free(&shown);
    fork_of(&t, b, &child); /* of where it is */
    talk_check(&child, b, 3, NULL);
    sleep_ms(LEASE_MS + 200); /* it is renewed */
    assert_int_equal(talk_turn(&t, b, 2, 4, "", NULL), 409);
    end_stream(&stream, true);
    bytes_free(&stream.said);
    await_turn(&t, b, 0, 5000);
    talk_check(&t, a, 4, NULL);
    end_both(SIGTERM);
}

struct racer {
    pthread_t thread;
    const struct server *server;
    struct talk talk;
    int seed, code;
    pthread_barrier_t *barrier;
};

static void *race(void *context)
{
    struct racer *r = context;
    char header[40];
    snprintf(header, sizeof(header), "If-Match: \"%d\"", r->talk.version);
    pthread_barrier_wait(r->barrier);
    r->code = talk_turn(&r->talk, r->server, r->seed, 200, "", header);
    return NULL;
}

/* One of them has it; the others come while it runs (409), or too late for this version (412). */
static void test_turns_at_the_same_time(void **state)
{
    (void)state;
    enum { N = 6, ROUNDS = 6 };
    static struct talk t;
    static struct racer racers[N];
    pthread_barrier_t barrier;
    int n_refused = 0;
    if (!redis.pid)
        skip();
    start_both(NULL);
    talk_open(&t, &servers[0], NULL);
    pthread_barrier_init(&barrier, NULL, N);
    for (int round = 0; round < ROUNDS; round++) {
        const struct racer *winner = NULL;
        for (int i = 0; i < N; i++) {
            racers[i] = (struct racer){
                .server = &servers[i % 2], .talk = t, .seed = 1 + i, .barrier = &barrier};
            assert_int_equal(pthread_create(&racers[i].thread, NULL, race, &racers[i]), 0);
        }
        for (int i = 0; i < N; i++) {
            pthread_join(racers[i].thread, NULL);
            bool has_won = racers[i].code == 200;
            assert_true(has_won || racers[i].code == 409 || racers[i].code == 412);
            assert_false(has_won && winner);
            winner = has_won ? &racers[i] : winner;
            n_refused += racers[i].code == 409;
        }
        assert_non_null(winner);
        t = winner->talk;
    }
    assert_true(n_refused > 0);
    pthread_barrier_destroy(&barrier);
    talk_check(&t, &servers[0], 50, NULL);
    talk_check(&t, &servers[1], 51, NULL);
    end_both(SIGTERM);
}

static void *wait_in_line(void *context)
{
    struct racer *r = context;
    r->code = talk_turn(&r->talk, r->server, r->seed, 4, ",\"queue\":true", NULL);
    return NULL;
}

/* Those who wait are told of a turn's end on another server within about a second. */
static void test_queue(void **state)
{
    (void)state;
    static struct talk t;
    static struct racer waiter;
    struct stream stream;
    if (!redis.pid)
        skip();
    start_both(NULL);
    talk_open(&t, &servers[0], NULL);
    begin_stream(&stream, &t, &servers[0], LONG_TURN);
    waiter = (struct racer){.server = &servers[1], .talk = t, .seed = 3};
    assert_int_equal(pthread_create(&waiter.thread, NULL, wait_in_line, &waiter), 0);
    sleep_ms(1300);
    end_stream(&stream, true);
    bytes_free(&stream.said);
    pthread_join(waiter.thread, NULL);
    assert_int_equal(waiter.code, 200);
    talk_check(&waiter.talk, &servers[0], 4, NULL);
    end_both(SIGTERM);
}

/* ---- lists and owners ------------------------------------------------------------------------ */

/* All pages of a list, as ids in a row. */
static char *list_of(const struct server *s, int limit, const char *header)
{
    struct bytes ids = {0};
    char after[64] = "";
    for (bool has_more = true; has_more;) {
        char path[160];
        snprintf(path, sizeof(path), "/v1/sessions?limit=%d%s%s", limit, *after ? "&after=" : "",
                 after);
        struct answer a = answer_of(s, "GET", path, NULL, header);
        answer_expect(&a, 200);
        const cJSON *item;
        cJSON_ArrayForEach(item, answer_member(a.json, "data"))
        {
            snprintf(after, sizeof(after), "%s", answer_member(item, "id")->valuestring);
            bytes_format(&ids, "%s v%d p%d\n", after, answer_member(item, "version")->valueint,
                         answer_member(item, "position")->valueint);
        }
        has_more = cJSON_IsTrue(answer_member(a.json, "has_more"));
        answer_free(&a);
    }
    return ids.n ? ids.data : strdup("");
}

static void test_lists_and_owners(void **state)
{
    (void)state;
    enum { N = 7 };
    static const char a_key[] = "Authorization: Bearer key-of-alice";
    static const char b_key[] = "Authorization: Bearer key-of-bob-1";
    static struct talk talks[N], others;
    char path[200];
    if (!redis.pid)
        skip();
    snprintf(path, sizeof(path), "%s/keys", model_dir);
    for (int i = 0; i < 2; i++) { /* each server has the keys in another order */
        FILE *f = fopen(path, "w");
        fprintf(f,
                i ? "another-key\nkey-of-bob-1\nkey-of-alice\n" : "key-of-alice\nkey-of-bob-1\n");
        fclose(f);
        start(&servers[i], (const char *const[]){"--api-key-file", path, NULL});
    }
    struct bytes expected = {0};
    talk_open(&others, &servers[0], b_key);
    for (int i = 0; i < N; i++) {
        talk_open(&talks[i], &servers[i % 2], a_key);
        if (i % 3)
            assert_int_equal(talk_turn(&talks[i], &servers[i / 2 % 2], i, 3, "", a_key), 200);
    }
    for (int i = N; i--;)
        bytes_format(&expected, "%s v%d p%d\n", talks[i].id, talks[i].version, talks[i].n);
    for (int i = 0; i < 2; i++)
        for (int limit = 2; limit < 10; limit += 5) {
            char *found = list_of(&servers[i], limit, a_key);
            assert_string_equal(found, expected.data);
            free(found);
        }
    for (int i = 0; i < 2; i++) {
        struct answer a = talk_ask(&others, &servers[i], "GET", "", NULL, a_key);
        answer_expect(&a, 404);
        answer_free(&a);
        assert_int_equal(talk_turn(&others, &servers[i], 1, 2, "", a_key), 404);
        snprintf(path, sizeof(path), "/v1/sessions?after=%s", others.id);
        a = answer_of(&servers[i], "GET", path, NULL, a_key);
        answer_expect(&a, 404);
        answer_free(&a);
    }
    assert_int_equal(talk_turn(&others, &servers[1], 1, 2, "", b_key), 200);
    bytes_free(&expected);
    end_both(SIGTERM);
}

/* The one that is overdue goes for all; one in use stays. */
static void test_expiry_and_limits(void **state)
{
    (void)state;
    static struct talk t, kept;
    if (!redis.pid)
        skip();
    start_both((const char *const[]){"--max-sessions", "3", NULL});
    struct answer a =
        answer_of(&servers[0], "POST", "/v1/sessions", strdup("{\"idle_ttl\":1}"), NULL);
    answer_expect(&a, 200);
    t = (struct talk){0};
    snprintf(t.id, sizeof(t.id), "%s", answer_member(a.json, "id")->valuestring);
    answer_free(&a);
    talk_do(&t, &servers[1], "GET", "", NULL, 200);
    talk_open(&kept, &servers[1], NULL);
    talk_open(&kept, &servers[1], NULL);
    a = answer_of(&servers[0], "POST", "/v1/sessions", strdup("{}"), NULL);
    answer_expect(&a, 429);
    answer_free(&a);
    int64_t begin = now_ms();
    for (int code = 200; code == 200; sleep_ms(50)) {
        a = talk_ask(&t, &servers[1], "GET", "", NULL, NULL);
        code = a.code;
        answer_free(&a);
        assert_true(code == 404 || now_ms() - begin < 10000);
    }
    talk_do(&t, &servers[0], "GET", "", NULL, 404);
    talk_open(&t, &servers[0], NULL);
    talk_do(&kept, &servers[0], "GET", "", NULL, 200);
    end_both(SIGTERM);
}

/* ---- servers that die ------------------------------------------------------------------------ */

static void test_killed_in_a_turn(void **state)
{
    (void)state;
    static struct talk t;
    struct stream stream;
    if (!redis.pid)
        skip();
    start_both(NULL);
    talk_open(&t, &servers[0], NULL);
    for (int i = 0; i < 3; i++)
        assert_int_equal(talk_turn(&t, &servers[0], i, 8, "", NULL), 200);
    begin_stream(&stream, &t, &servers[0], LONG_TURN);
    end(&servers[0], SIGKILL);
    end_stream(&stream, false);
    bytes_free(&stream.said);
    await_turn(&t, &servers[1], LEASE_MS / 3, LEASE_MS + 3000); /* not before the lease is over */
    talk_check(&t, &servers[1], 5, NULL);
    end(&servers[1], SIGTERM);
}

/* A server that hangs longer than its lease: what it says afterwards comes to nothing. */
static void test_a_late_commit(void **state)
{
    (void)state;
    static struct talk t;
    struct stream stream;
    if (!redis.pid)
        skip();
    start_both(NULL);
    talk_open(&t, &servers[0], NULL);
    assert_int_equal(talk_turn(&t, &servers[0], 1, 4, "", NULL), 200);
    for (int takes_it = 0; takes_it < 2; takes_it++) {
        begin_stream(&stream, &t, &servers[0], 400);
        server_signal(&servers[0], SIGSTOP);
        if (takes_it)
            await_turn(&t, &servers[1], LEASE_MS / 3, LEASE_MS + 3000);
        else
            sleep_ms(LEASE_MS + 300); /* nobody else comes: it is over all the same */
        server_signal(&servers[0], SIGCONT);
        end_stream(&stream, false);
        if (!says(&stream, "lease") || says(&stream, "[DONE]"))
            fail_msg("the late turn ended with %s", stream.said.data + stream.said.n - 300);
        bytes_free(&stream.said);
        talk_check(&t, &servers[takes_it], 2 + takes_it, NULL);
    }
    end_both(SIGTERM);
}

/* Conversations that are had with both servers in turns, while one of them is killed. */
struct teller {
    pthread_t thread;
    struct talk talk;
    int number, n_acknowledged;
    int32_t prompt[TALK_PROMPT];
    int n_prompt, max_tokens; /* of the turn that was not answered; 0: none */
};

static atomic_bool is_killed;

static void *tell(void *context)
{
    struct teller *t = context;
    for (int i = 0; !atomic_load(&is_killed) && t->talk.n < TALK_MAX_IDS - 100; i++) {
        int seed = 100 * t->number + i, max_tokens = 1 + (seed * 7) % 24;
        struct server *s = &servers[(t->number + i) % 2];
        t->n_prompt = talk_prompt(t->prompt, seed);
        t->max_tokens = max_tokens;
        int code = talk_turn(&t->talk, s, seed, max_tokens, "", NULL);
        if (code != 200)
            return NULL;
        t->n_acknowledged++;
        t->max_tokens = 0;
    }
    return NULL;
}

/* The turn that was cut off is there whole, or not at all. */
static void settle(struct teller *t, const struct server *s)
{
    int32_t said[MAX_TURN];
    struct answer a = talk_ask(&t->talk, s, "GET", "", NULL, NULL);
    answer_expect(&a, 200);
    int version = answer_member(a.json, "version")->valueint;
    answer_free(&a);
    if (version == t->talk.version)
        return;
    assert_int_equal(version, t->talk.version + 1);
    assert_true(t->max_tokens > 0);
    talk_append(&t->talk, t->prompt, t->n_prompt);
    int n = talk_once(s, t->talk.ids, t->talk.n, t->max_tokens, said);
    talk_append(&t->talk, said, n);
    t->talk.version++;
}

static void test_kills(void **state)
{
    (void)state;
    enum { N = 8, ROUNDS = 3 };
    static struct teller tellers[N];
    int n_acknowledged = 0;
    if (!redis.pid)
        skip();
    static const char *const more[] = {"--host-state-mb", "1", "--replay-tokens", "0", NULL};
    start_both(more);
    for (int i = 0; i < N; i++)
        talk_open(&tellers[i].talk, &servers[0], NULL);
    for (int round = 0; round < ROUNDS; round++) {
        struct server *dies = &servers[round % 2], *lives = &servers[1 - round % 2];
        atomic_store(&is_killed, false);
        for (int i = 0; i < N; i++) {
            tellers[i].number = i;
            tellers[i].n_acknowledged = tellers[i].max_tokens = 0;
            assert_int_equal(pthread_create(&tellers[i].thread, NULL, tell, &tellers[i]), 0);
        }
        sleep_ms(700);
        end(dies, SIGKILL);
        atomic_store(&is_killed, true);
        for (int i = 0; i < N; i++)
            pthread_join(tellers[i].thread, NULL);
        sleep_ms(LEASE_MS + 100);
        for (int i = 0; i < N; i++) {
            n_acknowledged += tellers[i].n_acknowledged;
            settle(&tellers[i], lives);
            talk_check(&tellers[i].talk, lives, 7 * i, NULL);
        }
        start(dies, more);
        for (int i = 0; i < N; i++) {
            struct talk *t = &tellers[i].talk;
            talk_check(t, dies, 7 * i + 1, NULL);
            if (t->n > TALK_MAX_IDS / 3) { /* a fast machine's: a new one in its place */
                talk_do(t, dies, "DELETE", "", NULL, 200);
                talk_open(t, dies, NULL);
            }
        }
    }
    print_message("%d kills, %d turns were acknowledged before\n", ROUNDS, n_acknowledged);
    assert_true(n_acknowledged > N);
    end_both(SIGTERM);
}

/* ---- Redis goes, and comes back -------------------------------------------------------------- */

static void expect_away(const struct talk *t, const struct server *s)
{
    struct answer a = talk_ask(t, s, "GET", "", NULL, NULL);
    answer_expect(&a, 503);
    const char *text = answer_member(answer_member(a.json, "error"), "message")->valuestring;
    if (!strstr(text, "Redis at redis://127.0.0.1:"))
        fail_msg("the message does not say which store is away: %s", text);
    answer_free(&a);
    assert_int_equal(talk_turn((struct talk *)t, s, 1, 4, "", NULL), 503);
    a = answer_of(s, "POST", "/v1/sessions", strdup("{}"), NULL);
    answer_expect(&a, 503);
    answer_free(&a);
    a = answer_of(s, "GET", "/v1/sessions", NULL, NULL);
    answer_expect(&a, 503);
    answer_free(&a);
    a = answer_of(s, "GET", "/health/ready", NULL, NULL);
    answer_expect(&a, 200);
    assert_string_equal(answer_member(a.json, "store")->valuestring, "unreachable");
    answer_free(&a);
}

static void test_redis_away(void **state)
{
    (void)state;
    static struct talk t;
    struct stream stream;
    int32_t said[4];
    if (!redis.pid)
        skip();
    start_both(NULL);
    talk_open(&t, &servers[0], NULL);
    assert_int_equal(talk_turn(&t, &servers[0], 1, 8, "", NULL), 200);
    redis_server_kill(&redis);
    for (int i = 0; i < 2; i++) {
        expect_away(&t, &servers[i]);
        talk_once(&servers[i], (int32_t[]){300, 301}, 2, 4, said); /* the others go on */
    }
    redis_server_start(&redis);
    sleep_ms(1100);
    for (int i = 0; i < 2; i++)
        talk_check(&t, &servers[i], 2 + i, NULL);
    /* Restarted within the time that a turn takes: it is applied. */
    begin_stream(&stream, &t, &servers[0], 500);
    redis_server_kill(&redis);
    redis_server_start(&redis);
    end_stream(&stream, false);
    assert_true(says(&stream, "[DONE]"));
    bytes_free(&stream.said);
    struct answer a = talk_ask(&t, &servers[1], "GET", "", NULL, NULL);
    answer_expect(&a, 200);
    assert_int_equal(answer_member(a.json, "version")->valueint, t.version + 1);
    answer_free(&a);
    end_both(SIGTERM);
}

/* Redis has no room: nothing is done, in its own words; and then it has. */
static void test_redis_full(void **state)
{
    (void)state;
    static struct talk t;
    char out[32];
    if (!redis.pid)
        skip();
    start_both(NULL);
    talk_open(&t, &servers[0], NULL);
    assert_int_equal(talk_turn(&t, &servers[0], 1, 8, "", NULL), 200);
    redis_server_ask(&redis, (const char *const[]){"CONFIG", "SET", "maxmemory", "1", NULL}, out,
                     sizeof(out));
    struct answer a = answer_of(&servers[1], "POST", "/v1/sessions", strdup("{}"), NULL);
    answer_expect(&a, 503);
    assert_non_null(
        strstr(answer_member(answer_member(a.json, "error"), "message")->valuestring, "OOM"));
    answer_free(&a);
    assert_int_equal(talk_turn(&t, &servers[1], 2, 8, "", NULL), 503);
    redis_server_ask(&redis, (const char *const[]){"CONFIG", "SET", "maxmemory", "0", NULL}, out,
                     sizeof(out));
    for (int i = 0; i < 2; i++)
        talk_check(&t, &servers[i], 2 + i, NULL);
    end_both(SIGTERM);
}

/* It hangs: requests are answered when their time is over, and afterwards all is as it was. */
static void test_redis_hangs(void **state)
{
    (void)state;
    static struct talk t;
    if (!redis.pid)
        skip();
    start_both(NULL);
    talk_open(&t, &servers[0], NULL);
    assert_int_equal(talk_turn(&t, &servers[0], 1, 8, "", NULL), 200);
    kill(redis.pid, SIGSTOP);
    int64_t begin = now_ms();
    struct answer a = talk_ask(&t, &servers[0], "GET", "", NULL, NULL);
    answer_expect(&a, 503);
    answer_free(&a);
    assert_true(now_ms() - begin < 4000);
    a = answer_of(&servers[0], "GET", "/health/live", NULL, NULL);
    answer_expect(&a, 200);
    answer_free(&a);
    kill(redis.pid, SIGCONT);
    sleep_ms(1100);
    for (int i = 0; i < 2; i++)
        talk_check(&t, &servers[i], 2 + i, NULL);
    end_both(SIGTERM);
}

/* It hangs when a turn is to be applied: the client is told that this is not known, and then that
 * the turn is there whole, or not at all, is what all servers say. */
static void test_outcome_unknown(void **state)
{
    (void)state;
    static struct teller t;
    struct stream stream;
    if (!redis.pid)
        skip();
    start_both(NULL);
    talk_open(&t.talk, &servers[0], NULL);
    for (int round = 0; round < 3; round++) {
        assert_int_equal(talk_turn(&t.talk, &servers[round % 2], round, 8, "", NULL), 200);
        begin_stream(&stream, &t.talk, &servers[round % 2], MAX_TURN);
        kill(redis.pid, SIGSTOP);
        end_stream(&stream, false);
        /* It was sent and not answered; or, where a lease was to be renewed just then, Redis was
         * known to be away, and nothing was sent. */
        bool is_open = says(&stream, "not known"), is_refused = says(&stream, "Redis at ");
        if (!(is_open || is_refused) || says(&stream, "[DONE]"))
            fail_msg("the turn ended with %s", stream.said.data + stream.said.n - 400);
        bytes_free(&stream.said);
        if (round == 2)
            sleep_ms(LEASE_MS);
        kill(redis.pid, SIGCONT);
        sleep_ms(LEASE_MS + 1100);
        t.n_prompt = talk_prompt(t.prompt, 21);
        t.max_tokens = MAX_TURN;
        settle(&t, &servers[0]);
        for (int i = 0; i < 2; i++)
            talk_check(&t.talk, &servers[1 - i], 2 + i, NULL);
    }
    end_both(SIGTERM);
}

/* The longest key of a kind. */
static void find_key(const char *pattern, char *out, int n)
{
    for (int i = 0; i < 500; i++) {
        ask_redis("KEYS", pattern, NULL, out, n);
        if (strcmp(out, "(nil)"))
            return;
        sleep_ms(10);
    }
    fail_msg("Redis has no key like %s", pattern);
}

static void test_damage(void **state)
{
    (void)state;
    static struct talk t, healthy;
    char key[160], out[32];
    if (!redis.pid)
        skip();
    start_both(NULL);
    talk_open(&healthy, &servers[0], NULL);
    assert_int_equal(talk_turn(&healthy, &servers[0], 1, 8, "", NULL), 200);
    talk_open(&t, &servers[0], NULL);
    assert_int_equal(talk_turn(&t, &servers[0], 1, 600, "", NULL), 200); /* written behind */
    find_key("latte:*:i:*", key, sizeof(key));
    for (int is_gone = 0; is_gone < 2; is_gone++) {
        end_both(SIGTERM);
        if (is_gone)
            ask_redis("DEL", key, NULL, out, sizeof(out));
        else
            redis_server_ask(&redis,
                             (const char *const[]){"SETRANGE", key, "3000", "damaged", NULL}, out,
                             sizeof(out));
        start_both(NULL);
        for (int i = 0; i < 2; i++) {
            assert_int_equal(talk_turn(&t, &servers[i], 2, 4, "", NULL), is_gone ? 200 : 410);
            talk_check(&healthy, &servers[i], 3 + i, NULL);
            if (is_gone)
                break;
        }
        if (is_gone) /* it was computed again from where it came from */
            talk_check(&t, &servers[1], 5, NULL);
    }
    end_both(SIGTERM);
}

/* ---- what is refused at the start ------------------------------------------------------------ */

static void expect_refused(const char *url, const char *reason)
{
    struct bytes output;
    const char *args[] = {"--model", model_dir, "--port", "0", "--store", url, NULL};
    int code = server_run(args, &output);
    assert_int_equal(code, 1);
    if (!strstr(output.data, reason) || strstr(output.data, "wrong-password"))
        fail_msg("the server said: %s", output.data);
    bytes_free(&output);
}

static void test_start(void **state)
{
    (void)state;
    static struct talk t;
    char url[200];
    if (!redis.pid)
        skip();
    redis_server_close(&redis);
    redis_server_open(&redis, "right-password");
    snprintf(url, sizeof(url), "redis://:wrong-password@127.0.0.1:%d/0", redis.port);
    expect_refused(url, "WRONGPASS");
    snprintf(url, sizeof(url), "redis://127.0.0.1:%d", redis.port);
    expect_refused(url, "NOAUTH");
    snprintf(url, sizeof(url), "redis://:right-password@127.0.0.1:%d/99", redis.port);
    expect_refused(url, "DB index is out of range");
    expect_refused("redis://127.0.0.1:1/0", "cannot be reached");
    expect_refused("redis://127.0.0.1:x/0", "expected redis://");
    expect_refused("rediss://127.0.0.1/0", "TLS");
    start(&servers[0], NULL);
    snprintf(redis.url, sizeof(redis.url), "%s", redis.socket_url);
    start(&servers[1], NULL);
    talk_open(&t, &servers[0], NULL);
    assert_int_equal(talk_turn(&t, &servers[0], 1, 4, "", NULL), 200);
    talk_check(&t, &servers[1], 2, NULL);
    end_both(SIGTERM);
}

int main(int argc, char **argv)
{
    if (argc > 1)
        cmocka_set_test_filter(argv[1]);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_goes_on_elsewhere, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_what_belongs_to_a_session, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_from, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_what_is_not_shared, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_a_turn_elsewhere, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_turns_at_the_same_time, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_queue, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_lists_and_owners, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_expiry_and_limits, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_killed_in_a_turn, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_a_late_commit, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_kills, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_redis_away, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_redis_full, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_redis_hangs, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_outcome_unknown, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_damage, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_start, set_up, tear_down),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
