/* test_store.c - sessions that outlive the process: ended, killed at any moment, with a full disk,
 * with damaged files, with more sessions than memory has room for. The oracle is the same server
 * without sessions: a conversation that is sent whole, token for token.
 *
 * LATTE_KILLS how often the server is killed under 16 streams (3). LATTE_SESSIONS how many sessions
 * there are where memory is too small for them (150), LATTE_STORE_MODEL another model than a tiny
 * one.
 */
#include "tests/http/harness.h"

#include <cjson/cJSON.h>
#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tests/http/talk.h"
#include "tests/unit/model_files.h"

#define COMPLETIONS "/v1/completions"

enum { N_STREAMS = 16 };

static struct server server;
static char model_dir[128], store_dir[160];

/* ---- the server ------------------------------------------------------------------------------ */

static void start(const char *const *more)
{
    const char *model = getenv("LATTE_STORE_MODEL");
    const char *args[32] = {"--model", model ? model : model_dir, "--store", store_dir, "--threads",
                            "1",       "--no-access-log",         NULL};
    for (int n = 7; more && *more; more++, n++) {
        args[n] = *more;
        args[n + 1] = NULL;
    }
    server_start(&server, args);
}

/* End it one way or the other; its scratch directory goes, model and store stay. */
static void end(int signal_number)
{
    server_signal(&server, signal_number);
    int code = server_wait_exit(&server, 30000);
    assert_int_equal(code, signal_number == SIGTERM ? 0 : 128 + signal_number);
    close(server.stdout_fd);
    test_dir_remove(server.dir);
}

static int set_up(void **state)
{
    (void)state;
    make_tiny_model(model_dir, sizeof(model_dir));
    snprintf(store_dir, sizeof(store_dir), "%s/store", model_dir);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    if (server.pid > 0)
        end(SIGKILL);
    test_dir_remove(model_dir);
    return 0;
}

/* ---- requests -------------------------------------------------------------------------------- */

static struct answer send_text(const char *method, const char *path, char *body, const char *header)
{
    return answer_of(&server, method, path, body, header);
}

static struct answer ask(const char *method, const struct talk *t, const char *what,
                         const char *body, const char *header)
{
    return talk_ask(t, &server, method, what, body, header);
}

static void open_talk(struct talk *t, const char *header)
{
    talk_open(t, &server, header);
}

/* A turn that has to be answered with this code; with 200 the talk goes on. */
static void take_turn(struct talk *t, int seed, int max_tokens, int code, const char *header)
{
    assert_int_equal(talk_turn(t, &server, seed, max_tokens, "", header), code);
}

static void check_talk(struct talk *t, int seed)
{
    talk_check(t, &server, seed, NULL);
}

/* ---- the end and a new beginning ------------------------------------------------------------- */

static void test_restart(void **state)
{
    (void)state;
    static struct talk talks[4];
    static const char *const modes[] = {"turn", "interval", "none"};
    for (int m = 0; m < 3; m++) {
        const char *const args[] = {"--durability", modes[m], NULL};
        start(args);
        for (int i = 0; i < 4; i++) {
            if (!m)
                open_talk(&talks[i], NULL);
            for (int k = 0; k <= i; k++)
                take_turn(&talks[i], 10 * m + k, 6, 200, NULL);
        }
        end(m ? SIGKILL : SIGTERM);
    }
    start(NULL);
    struct answer a = ask("GET", &talks[1], "", NULL, NULL);
    assert_string_equal(answer_member(a.json, "tier")->valuestring, "store");
    assert_string_equal(answer_member(answer_member(a.json, "metadata"), "k")->valuestring, "v");
    answer_free(&a);
    for (int i = 0; i < 4; i++)
        check_talk(&talks[i], 77 + i);
    assert_true(
        server_metric(&server, "latte_turn_first_token_seconds_count{position=\"0-999\"}") == 4);
    end(SIGTERM);
}

static void test_what_belongs_to_a_session(void **state)
{
    (void)state;
    struct talk parent, child;
    start(NULL);
    open_talk(&parent, NULL);
    take_turn(&parent, 1, 8, 200, NULL);
    struct answer a = ask("POST", &parent, "/snapshots", "{\"name\":\"early\"}", NULL);
    answer_expect(&a, 200);
    answer_free(&a);
    struct talk early = parent;
    take_turn(&parent, 2, 8, 200, NULL);
    struct talk before = parent;
    take_turn(&parent, 3, 8, 200, NULL);
    a = ask("POST", &parent, "/fork", "{\"n\":2}", NULL);
    answer_expect(&a, 200);
    child = parent;
    child.version = 0;
    snprintf(
        child.id, sizeof(child.id), "%s",
        answer_member(cJSON_GetArrayItem(answer_member(a.json, "data"), 0), "id")->valuestring);
    struct talk deleted;
    snprintf(
        deleted.id, sizeof(deleted.id), "%s",
        answer_member(cJSON_GetArrayItem(answer_member(a.json, "data"), 1), "id")->valuestring);
    answer_free(&a);
    a = ask("DELETE", &deleted, "", NULL, NULL);
    answer_expect(&a, 200);
    answer_free(&a);
    end(SIGKILL);
    start(NULL);
    a = ask("GET", &deleted, "", NULL, NULL);
    answer_expect(&a, 404);
    answer_free(&a);
    check_talk(&child, 5);
    a = ask("POST", &parent, "/rollback", "{}", NULL);
    answer_expect(&a, 200);
    answer_free(&a);
    before.version = parent.version + 1;
    check_talk(&before, 6);
    a = ask("POST", &parent, "/rollback", "{\"snapshot\":\"early\"}", NULL);
    answer_expect(&a, 200);
    answer_free(&a);
    early.version = before.version + 1;
    check_talk(&early, 7);
    end(SIGTERM);
}

/* ---- what is no session ---------------------------------------------------------------------- */

static struct answer respond(const char *input, const char *previous)
{
    return send_text("POST", "/v1/responses",
                     text_of("{\"input\":\"%s\",\"previous_response_id\":%s%s%s,"
                             "\"max_output_tokens\":6,\"temperature\":0}",
                             input, previous ? "\"" : "", previous ? previous : "null",
                             previous ? "\"" : ""),
                     NULL);
}

static struct answer response_of(const char *method, const char *id, const char *what)
{
    char path[160];
    snprintf(path, sizeof(path), "/v1/responses/%.63s%.40s", id, what);
    return send_text(method, path, NULL, NULL);
}

static char *text_said(const struct answer *a)
{
    const cJSON *message = cJSON_GetArrayItem(answer_member(a->json, "output"), 0);
    return strdup(answer_member(cJSON_GetArrayItem(answer_member(message, "content"), 0), "text")
                      ->valuestring);
}

/* Stored responses are read again, and gone on from. */
static void test_responses(void **state)
{
    (void)state;
    char first[64], second[64], deleted[64];
    char *said[2], *whole[2], *items[2];
    start(NULL);
    struct answer a = respond("How are you?", NULL);
    answer_expect(&a, 200);
    snprintf(first, sizeof(first), "%s", answer_member(a.json, "id")->valuestring);
    answer_free(&a);
    a = respond("Why?", first);
    answer_expect(&a, 200);
    snprintf(second, sizeof(second), "%s", answer_member(a.json, "id")->valuestring);
    answer_free(&a);
    a = respond("Nobody needs this.", NULL);
    snprintf(deleted, sizeof(deleted), "%s", answer_member(a.json, "id")->valuestring);
    answer_free(&a);
    a = response_of("DELETE", deleted, "");
    answer_expect(&a, 200);
    answer_free(&a);
    for (int round = 0; round < 2; round++) {
        a = response_of("GET", second, "");
        answer_expect(&a, 200);
        whole[round] = cJSON_PrintUnformatted(a.json);
        answer_free(&a);
        a = response_of("GET", second, "/input_items");
        items[round] = cJSON_PrintUnformatted(a.json);
        answer_free(&a);
        a = respond("And then?", second);
        answer_expect(&a, 200);
        said[round] = text_said(&a);
        answer_free(&a);
        end(SIGKILL);
        start(NULL);
    }
    assert_string_equal(whole[0], whole[1]);
    assert_string_equal(items[0], items[1]);
    assert_string_equal(said[0], said[1]);
    for (int round = 0; round < 2; round++) {
        cJSON_free(whole[round]);
        cJSON_free(items[round]);
        free(said[round]);
    }
    a = response_of("GET", deleted, "");
    answer_expect(&a, 404);
    answer_free(&a);
    a = response_of("DELETE", first, ""); /* the next one does not need it any more */
    answer_expect(&a, 200);
    answer_free(&a);
    end(SIGTERM);
    start(NULL);
    a = respond("Still there?", first);
    answer_expect(&a, 400);
    answer_free(&a);
    a = respond("Still there?", second);
    answer_expect(&a, 200);
    answer_free(&a);
    static const char *const fewer[] = {"--max-responses", "1", NULL};
    for (int round = 0; round < 2;
         round++) { /* the newest stays; the store is told of the others */
        end(SIGTERM);
        start(fewer);
        a = response_of("GET", second, "");
        answer_expect(&a, 404);
        answer_free(&a);
    }
    end(SIGTERM);
}

static void save_preset(const char *name, const struct talk *t)
{
    char path[100];
    snprintf(path, sizeof(path), "/v1/presets/%s", name);
    struct answer a = send_text("PUT", path, text_of("{\"session\":\"%s\"}", t->id), NULL);
    answer_expect(&a, 200);
    assert_int_equal(answer_member(a.json, "position")->valueint, t->n);
    answer_free(&a);
}

static void expect_preset(const char *name, int code)
{
    char path[100];
    snprintf(path, sizeof(path), "/v1/presets/%s", name);
    struct answer a = send_text("GET", path, NULL, NULL);
    answer_expect(&a, code);
    answer_free(&a);
}

/* A session that begins with a preset goes on where that was saved. */
static void check_preset(const char *name, const struct talk *saved, int seed)
{
    struct answer a =
        send_text("POST", "/v1/sessions", text_of("{\"from\":{\"preset\":\"%s\"}}", name), NULL);
    answer_expect(&a, 200);
    struct talk t = *saved;
    t.version = answer_member(a.json, "version")->valueint;
    snprintf(t.id, sizeof(t.id), "%s", answer_member(a.json, "id")->valuestring);
    answer_free(&a);
    check_talk(&t, seed);
}

static void test_presets(void **state)
{
    (void)state;
    static const char *const args[] = {"--open-admin", NULL};
    struct talk one, other;
    start(args);
    open_talk(&one, NULL);
    take_turn(&one, 1, 6, 200, NULL);
    save_preset("stays", &one);
    save_preset("changes", &one);
    save_preset("goes", &one);
    other = one;
    take_turn(&one, 2, 6, 200, NULL);
    save_preset("changes", &one);
    struct answer a = send_text("DELETE", "/v1/presets/goes", NULL, NULL);
    answer_expect(&a, 200);
    answer_free(&a);
    a = ask("DELETE", &one, "", NULL, NULL); /* a preset is not its session's */
    answer_expect(&a, 200);
    answer_free(&a);
    for (int round = 0; round < 2; round++) {
        end(round ? SIGTERM : SIGKILL);
        start(args);
        check_preset("stays", &other, 3);
        check_preset("changes", &one, 4);
        expect_preset("goes", 404);
    }
    end(SIGTERM);
}

/* A turn that was carried out is not carried out again when its client asks once more. */
static void test_repeated_turns(void **state)
{
    (void)state;
    static const char key[] = "Idempotency-Key: once-only", streamed[] = "Idempotency-Key: stream";
    struct talk t;
    int32_t prompt[8];
    char *said[2];
    int n = talk_prompt(prompt, 5);
    start(NULL);
    open_talk(&t, NULL);
    for (int round = 0; round < 2; round++) {
        struct answer a = send_text("POST", COMPLETIONS, talk_body(&t, prompt, n, 6, ""), key);
        answer_expect(&a, 200);
        said[round] = cJSON_PrintUnformatted(a.json);
        answer_free(&a);
        end(SIGKILL);
        start(NULL);
    }
    assert_string_equal(said[0], said[1]);
    cJSON_free(said[0]);
    cJSON_free(said[1]);
    char *body = talk_body(&t, prompt, n, 6, ",\"stream\":true");
    const char *const headers[] = {streamed, NULL};
    struct client_request request = {.path = COMPLETIONS, .body = body, .headers = headers};
    struct reply reply;
    client_send(&server, &request, &reply);
    assert_int_equal(reply.code, 200);
    assert_non_null(strstr(reply.body.data, "[DONE]"));
    reply_free(&reply);
    end(SIGKILL);
    start(NULL);
    struct answer a = send_text("POST", COMPLETIONS, body, streamed);
    answer_expect(&a, 410);
    answer_free(&a);
    a = ask("GET", &t, "", NULL, NULL);
    assert_int_equal(answer_member(a.json, "version")->valueint, 2);
    answer_free(&a);
    end(SIGTERM);
}

/* A key finds its sessions although the file of keys was put in another order. */
static void test_owners(void **state)
{
    (void)state;
    char path[200];
    struct talk mine, others;
    snprintf(path, sizeof(path), "%s/keys", model_dir);
    const char *const args[] = {"--api-key-file", path, NULL};
    static const char a_key[] = "Authorization: Bearer key-of-alice";
    static const char b_key[] = "Authorization: Bearer key-of-bob-1";
    for (int round = 0; round < 2; round++) {
        FILE *f = fopen(path, "w");
        fprintf(f, "%s",
                round ? "another-key\nkey-of-bob-1\nkey-of-alice\n"
                      : "key-of-alice\nkey-of-bob-1\n");
        fclose(f);
        start(args);
        if (!round) {
            open_talk(&mine, a_key);
            open_talk(&others, b_key);
        }
        take_turn(&mine, 1, 4, 200, a_key);
        take_turn(&others, 2, 4, 200, b_key);
        take_turn(&mine, 1, 4, 404, b_key);
        struct answer a = ask("GET", &others, "/state", NULL, a_key);
        answer_expect(&a, 404);
        answer_free(&a);
        end(SIGKILL);
    }
    unlink(path);
}

/* ---- killed ---------------------------------------------------------------------------------- */

/* One session and its stream. What the client was told of the turn that was cut off is kept. */
struct teller {
    struct talk talk;
    pthread_t thread;
    int number, seed;
    int32_t prompt[8], told[64];
    int n_prompt, n_told, max_tokens;
    struct bytes line;
    bool is_acknowledged;
};

static atomic_bool is_killed;
static atomic_int n_acknowledged;

static void on_event(struct teller *t, const char *line)
{
    if (!strcmp(line, "data: [DONE]"))
        t->is_acknowledged = true;
    cJSON *event = strncmp(line, "data: {", 7) ? NULL : cJSON_Parse(line + 6);
    const cJSON *choice = cJSON_GetArrayItem(cJSON_GetObjectItem(event, "choices"), 0);
    const cJSON *ids = cJSON_GetObjectItem(choice, "token_ids");
    if (ids)
        t->n_told += read_ids(ids, t->told + t->n_told, 64 - t->n_told);
    cJSON_Delete(event);
}

static bool on_data(void *context, const char *data, size_t n)
{
    struct teller *t = context;
    for (size_t i = 0; i < n; i++) {
        if (data[i] != '\n') {
            bytes_char(&t->line, data[i]);
            continue;
        }
        on_event(t, t->line.n ? t->line.data : "");
        t->line.n = 0;
    }
    return true;
}

static void append_turn(struct talk *t, const int32_t *prompt, int n_prompt, const int32_t *output,
                        int n_output)
{
    assert_true(t->n + n_prompt + n_output < TALK_MAX_IDS);
    memcpy(t->ids + t->n, prompt, (size_t)n_prompt * sizeof(*prompt));
    memcpy(t->ids + t->n + n_prompt, output, (size_t)n_output * sizeof(*output));
    t->n += n_prompt + n_output;
    t->version++;
}

static void *tell(void *context)
{
    struct teller *t = context;
    while (!atomic_load(&is_killed)) {
        t->seed++;
        t->n_prompt = talk_prompt(t->prompt, t->seed * N_STREAMS + t->number);
        t->max_tokens = 1 + (t->seed * 7 + t->number) % 24;
        t->n_told = 0;
        t->is_acknowledged = false;
        t->line.n = 0;
        char *body = talk_body(&t->talk, t->prompt, t->n_prompt, t->max_tokens, ",\"stream\":true");
        struct client_request request = {
            .path = COMPLETIONS, .body = body, .on_data = on_data, .context = t};
        struct reply reply;
        client_send(&server, &request, &reply);
        reply_free(&reply);
        free(body);
        if (!t->is_acknowledged)
            break;
        assert_int_equal(t->n_told, t->max_tokens);
        append_turn(&t->talk, t->prompt, t->n_prompt, t->told, t->n_told);
        t->n_told = 0;
        t->n_prompt = 0;
        atomic_fetch_add(&n_acknowledged, 1);
    }
    bytes_free(&t->line);
    return NULL;
}

/* The turn that was cut off is there whole, or not at all. */
static void settle(struct teller *t)
{
    struct answer a = ask("GET", &t->talk, "", NULL, NULL);
    answer_expect(&a, 200);
    int version = answer_member(a.json, "version")->valueint;
    answer_free(&a);
    if (version == t->talk.version)
        return;
    assert_int_equal(version, t->talk.version + 1);
    assert_true(t->n_prompt > 0);
    int32_t whole[TALK_MAX_IDS], said[64];
    memcpy(whole, t->talk.ids, (size_t)t->talk.n * sizeof(*whole));
    memcpy(whole + t->talk.n, t->prompt, (size_t)t->n_prompt * sizeof(*whole));
    int n = talk_once(&server, whole, t->talk.n + t->n_prompt, t->max_tokens, said);
    assert_int_equal(n, t->max_tokens);
    assert_memory_equal(said, t->told, (size_t)t->n_told * sizeof(*said));
    append_turn(&t->talk, t->prompt, t->n_prompt, said, n);
}

static void test_kills(void **state)
{
    (void)state;
    static struct teller tellers[N_STREAMS];
    const char *asked = getenv("LATTE_KILLS");
    int n_kills = asked ? atoi(asked) : 3;
    unsigned seed = 20261128;
    const char *const args[] = {"--host-state-mb", "1", "--replay-tokens", "16", NULL};
    start(args);
    for (int i = 0; i < N_STREAMS; i++) {
        tellers[i] = (struct teller){.number = i};
        open_talk(&tellers[i].talk, NULL);
    }
    for (int k = 0; k < n_kills; k++) {
        atomic_store(&is_killed, false);
        for (int i = 0; i < N_STREAMS; i++)
            assert_int_equal(pthread_create(&tellers[i].thread, NULL, tell, &tellers[i]), 0);
        sleep_ms(20 + rand_r(&seed) % 400);
        atomic_store(&is_killed, true);
        end(SIGKILL);
        for (int i = 0; i < N_STREAMS; i++)
            pthread_join(tellers[i].thread, NULL);
        start(args);
        assert_true(server_metric(&server, "latte_sessions") == N_STREAMS);
        for (int i = 0; i < N_STREAMS; i++) {
            struct teller *t = &tellers[i];
            settle(t);
            check_talk(&t->talk, ++t->seed * N_STREAMS + i);
            t->n_prompt = 0;
            if (t->talk.n > TALK_MAX_IDS - 1000) { /* a new one in its place */
                struct answer a = ask("DELETE", &t->talk, "", NULL, NULL);
                answer_expect(&a, 200);
                answer_free(&a);
                open_talk(&t->talk, NULL);
            }
        }
    }
    print_message("seed 20261128, %d kills, %d turns acknowledged\n", n_kills,
                  atomic_load(&n_acknowledged));
    end(SIGTERM);
}

/* ---- the disk -------------------------------------------------------------------------------- */

static void limit_files(rlim_t n_bytes)
{
    struct rlimit limit;
    assert_int_equal(prlimit(server.pid, RLIMIT_FSIZE, NULL, &limit), 0);
    limit.rlim_cur = n_bytes;
    assert_int_equal(prlimit(server.pid, RLIMIT_FSIZE, &limit, NULL), 0);
}

/* Nothing can be written: turns are refused and leave their sessions; with room they go on. */
static void test_full_disk(void **state)
{
    (void)state;
    struct talk talk, other;
    start(NULL);
    open_talk(&talk, NULL);
    open_talk(&other, NULL);
    take_turn(&talk, 1, 6, 200, NULL);
    limit_files(100);
    take_turn(&talk, 2, 6, 503, NULL);
    take_turn(&other, 3, 6, 503, NULL);
    struct answer a = ask("POST", &talk, "/rollback", "{}", NULL);
    answer_expect(&a, 503);
    answer_free(&a);
    a = send_text("POST", "/v1/sessions", strdup("{}"), NULL);
    answer_expect(&a, 503);
    answer_free(&a);
    assert_true(server_metric(&server, "latte_store_errors_total") >= 4);
    limit_files(RLIM_INFINITY);
    check_talk(&talk, 4);
    check_talk(&other, 5);
    limit_files(100);
    take_turn(&talk, 6, 6, 503, NULL);
    end(SIGKILL);
    start(NULL);
    check_talk(&talk, 7);
    check_talk(&other, 8);
    end(SIGTERM);
}

/* The one file of a state; false: there is none. */
static bool state_file(char *path, size_t n)
{
    char dir[200];
    bool found = false;
    snprintf(dir, sizeof(dir), "%s/states", store_dir);
    DIR *entries = opendir(dir);
    for (struct dirent *e; entries && (e = readdir(entries));) {
        if (e->d_name[0] == '.')
            continue;
        found = true;
        snprintf(path, n, "%s/%s", dir, e->d_name);
    }
    if (entries)
        closedir(entries);
    return found;
}

static void change_byte(const char *path, off_t at)
{
    unsigned char byte;
    int fd = open(path, O_RDWR);
    assert_true(fd >= 0 && pread(fd, &byte, 1, at) == 1);
    byte ^= 0x10;
    assert_int_equal(pwrite(fd, &byte, 1, at), 1);
    close(fd);
}

static void expect_lost(const struct talk *t)
{
    int32_t prompt[8];
    int n = talk_prompt(prompt, 1);
    struct answer a = send_text("POST", COMPLETIONS, talk_body(t, prompt, n, 4, ""), NULL);
    answer_expect(&a, 410);
    if (!strstr(answer_member(answer_member(a.json, "error"), "message")->valuestring, t->id))
        fail_msg("the error does not name the session");
    answer_free(&a);
}

/* A state's file that was cut or changed, an entry of the journal that was: that session is refused
 * by its name, the others go on, and it can be deleted. */
static void test_damage(void **state)
{
    (void)state;
    char path[512], journal[200];
    snprintf(journal, sizeof(journal), "%s/sessions.journal", store_dir);
    for (int kind = 0; kind < 3; kind++) {
        struct talk large, small;
        start(NULL);
        open_talk(&large, NULL);
        open_talk(&small, NULL);
        take_turn(&small, 1, 6, 200, NULL);
        take_turn(&large, 2, 600, 200, NULL); /* more than is ever computed again */
        for (int i = 0; !state_file(path, sizeof(path)); i++) {
            assert_true(i < 5000);
            sleep_ms(2);
        }
        while (strstr(path, ".new") && state_file(path, sizeof(path)))
            sleep_ms(2);
        end(SIGTERM);
        if (kind < 2) { /* so that the journal, written as a whole, has no other way to the state */
            start(NULL);
            assert_true(server_await_metric(&server, "latte_journal_writes_total", 1, 10000));
            end(SIGTERM);
        }
        struct stat about;
        assert_int_equal(stat(kind == 2 ? journal : path, &about), 0);
        if (kind == 0)
            assert_int_equal(truncate(path, about.st_size / 2), 0);
        else if (kind == 1)
            change_byte(path, about.st_size / 2);
        else
            change_byte(journal, about.st_size - 500); /* within the last turn's tokens */
        start(NULL);
        expect_lost(&large);
        check_talk(&small, 3);
        end(SIGKILL);
        start(NULL);
        expect_lost(&large);
        check_talk(&small, 4);
        struct answer a = ask("DELETE", &large, "", NULL, NULL);
        answer_expect(&a, 200);
        answer_free(&a);
        a = ask("DELETE", &small, "", NULL, NULL);
        answer_expect(&a, 200);
        answer_free(&a);
        end(SIGTERM);
    }
}

static void test_another_models_store(void **state)
{
    (void)state;
    struct talk talk;
    struct bytes output;
    char dir[128];
    start(NULL);
    open_talk(&talk, NULL);
    end(SIGTERM);
    assert_int_equal(test_dir_make(dir, sizeof(dir)), 0);
    const char *const args[] = {"--model", "weights/latte-12m", "--port", "0",
                                "--store", store_dir,           NULL};
    assert_int_equal(server_run(args, &output), 1);
    if (!strstr(output.data, "another model"))
        fail_msg("the server said: %s", output.data);
    bytes_free(&output);
    test_dir_remove(dir);
}

/* ---- more sessions than memory has room for -------------------------------------------------- */

/* What LATTE_SESSIONS and LATTE_STORE_MODEL ask for: the full-size run. */
struct many {
    struct talk *talks; /* [n] */
    int *order;         /* [n] */
    int n, round;
    atomic_int next;
};

static void *continue_some(void *context)
{
    struct many *m = context;
    for (int i; (i = atomic_fetch_add(&m->next, 1)) < m->n;)
        take_turn(&m->talks[m->order[i]], 31 * m->round + m->order[i], 3, 200, NULL);
    return NULL;
}

/* Each session once, in a random order, by many clients. */
static void continue_all(struct many *m, unsigned *seed)
{
    pthread_t threads[N_STREAMS];
    for (int i = 0; i < m->n; i++) {
        int at = rand_r(seed) % (i + 1);
        m->order[i] = m->order[at];
        m->order[at] = i;
    }
    atomic_store(&m->next, 0);
    m->round++;
    for (int i = 0; i < N_STREAMS; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, continue_some, m), 0);
    for (int i = 0; i < N_STREAMS; i++)
        pthread_join(threads[i], NULL);
    double bytes = server_metric(&server, "latte_session_state_bytes");
    print_message(
        "%d sessions continued, %d times each: states take %.0f MB, the process %.0f MB\n", m->n,
        m->round, bytes / 1e6, server_metric(&server, "process_resident_memory_bytes") / 1e6);
}

static void check_many(const char *replay_tokens, const char *memory_mb)
{
    const char *asked = getenv("LATTE_SESSIONS");
    struct many m = {.n = asked ? atoi(asked) : 150};
    const char *const args[] = {"--host-state-mb", memory_mb,         "--replay-tokens",
                                replay_tokens,     "--max-slots",     "64",
                                "--threads",       asked ? "2" : "1", NULL};
    unsigned seed = 7;
    m.talks = calloc((size_t)m.n, sizeof(*m.talks));
    m.order = calloc((size_t)m.n, sizeof(*m.order));
    start(args);
    double before = server_metric(&server, "latte_sessions");
    for (int i = 0; i < m.n; i++)
        open_talk(&m.talks[i], NULL);
    for (int round = 0; round < 3; round++)
        continue_all(&m, &seed);
    double bytes = server_metric(&server, "latte_session_state_bytes");
    assert_true(bytes > 0 && bytes <= atof(memory_mb) * (1 << 20));
    assert_true(server_metric(&server, "latte_state_evictions_total") > 0);
    end(SIGKILL);
    start(args);
    assert_true(server_metric(&server, "latte_sessions") == before + m.n);
    for (int i = 0; i < m.n; i += 1 + m.n / 15)
        check_talk(&m.talks[i], i);
    end(SIGTERM);
    free(m.talks);
    free(m.order);
}

static void test_many_sessions(void **state)
{
    (void)state;
    const char *mb = getenv("LATTE_SESSIONS") ? "1024" : "1";
    check_many("64", mb);
    if (!getenv("LATTE_SESSIONS") || getenv("LATTE_WRITE_ALL"))
        check_many("0", mb);
}

int main(int argc, char **argv)
{
    if (argc > 1)
        cmocka_set_test_filter(argv[1]);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_restart, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_what_belongs_to_a_session, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_responses, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_presets, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_repeated_turns, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_owners, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_kills, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_full_disk, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_damage, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_another_models_store, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_many_sessions, set_up, tear_down),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
