/* test_sessions.c - sessions over HTTP. The oracle is the same server without sessions: a
 * conversation that is sent whole, token for token. */
#include "tests/http/harness.h"

#include <cjson/cJSON.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define COMPLETIONS "/v1/completions"
#define CHAT "/v1/chat/completions"

enum { MAX_IDS = 512 };

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

/* ---- requests -------------------------------------------------------------------------------- */

struct answer {
    int code;
    cJSON *json;
    char etag[32];
};

/* Frees the text of the body. */
static struct answer send_text(const struct server *s, const char *method, const char *path,
                               char *body, const char *header)
{
    const char *const headers[] = {header, NULL};
    struct client_request request = {
        .method = method, .path = path, .body = body, .headers = header ? headers : NULL};
    struct reply reply;
    struct answer a = {0};
    client_send(s, &request, &reply);
    a.code = reply.code;
    a.json = cJSON_ParseWithLength(reply.body.data, reply.body.n);
    reply_header(&reply, "ETag", a.etag, sizeof(a.etag));
    if (!a.json)
        fail_msg("%s %s: %d %s", method, path, reply.code, reply.body.data);
    reply_free(&reply);
    free(body);
    return a;
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

#define post(path, ...) send_text(&server, "POST", path, text_of(__VA_ARGS__), NULL)

static void done(struct answer *a)
{
    cJSON_Delete(a->json);
    a->json = NULL;
}

static void expect_code(const struct answer *a, int code)
{
    if (a->code != code)
        fail_msg("status %d, expected %d: %s", a->code, code, cJSON_PrintUnformatted(a->json));
}

static const cJSON *member(const cJSON *v, const char *name)
{
    const cJSON *found = cJSON_GetObjectItemCaseSensitive(v, name);
    if (!found)
        fail_msg("no %s in %s", name, cJSON_PrintUnformatted(v));
    return found;
}

static int number(const cJSON *v, const char *name)
{
    return member(v, name)->valueint;
}

struct id {
    char text[64];
};

static struct id id_of(const cJSON *session)
{
    struct id id;
    snprintf(id.text, sizeof(id.text), "%s", member(session, "id")->valuestring);
    return id;
}

static struct id new_session(void)
{
    struct answer a = post("/v1/sessions", "{}");
    expect_code(&a, 200);
    struct id id = id_of(a.json);
    done(&a);
    return id;
}

/* "/v1/sessions/sess_.../what", valid until the next few calls. */
static const char *path_of(const struct id *id, const char *what)
{
    static char paths[4][128];
    static int n;
    char *path = paths[n++ % 4];
    snprintf(path, sizeof(paths[0]), "/v1/sessions/%s%s", id->text, what);
    return path;
}

struct ids {
    int32_t list[MAX_IDS];
    int n;
};

static void add_ids(struct ids *ids, const cJSON *array)
{
    const cJSON *item;
    cJSON_ArrayForEach(item, array)
    {
        assert_true(ids->n < MAX_IDS);
        ids->list[ids->n++] = item->valueint;
    }
}

static char *print_ids(const struct ids *ids)
{
    cJSON *array = cJSON_CreateIntArray(ids->list, ids->n);
    char *text = cJSON_PrintUnformatted(array);
    cJSON_Delete(array);
    return text;
}

/* A turn of a session with a prompt of ids: its output is appended to all, and where the session
 * is then is checked. settings: more members of the request. */
static void take_turn(const struct id *session, const struct ids *prompt, const char *settings,
                      struct ids *all)
{
    char *ids = print_ids(prompt);
    struct answer a =
        post(COMPLETIONS, "{\"session_id\":\"%s\",\"prompt\":%s,\"return_token_ids\":true%s}",
             session->text, ids, settings);
    expect_code(&a, 200);
    const cJSON *choice = cJSON_GetArrayItem(member(a.json, "choices"), 0);
    assert_int_equal(number(member(a.json, "usage"), "prompt_tokens"), prompt->n);
    for (int i = 0; i < prompt->n; i++)
        all->list[all->n++] = prompt->list[i];
    add_ids(all, member(choice, "token_ids"));
    assert_int_equal(number(member(a.json, "session"), "position"), all->n);
    done(&a);
    free(ids);
}

/* What the server says without a session to all these tokens at once. */
static void say_once(const struct ids *all, int max_tokens, const char *settings, struct ids *out)
{
    char *ids = print_ids(all);
    struct answer a =
        post(COMPLETIONS, "{\"prompt\":%s,\"max_tokens\":%d,\"return_token_ids\":true%s}", ids,
             max_tokens, settings);
    expect_code(&a, 200);
    out->n = 0;
    add_ids(out, member(cJSON_GetArrayItem(member(a.json, "choices"), 0), "token_ids"));
    done(&a);
    free(ids);
}

static void make_prompt(struct ids *prompt, int turn)
{
    prompt->n = 1 + turn * 5 % 7;
    for (int i = 0; i < prompt->n; i++)
        prompt->list[i] = 300 + (turn * 37 + i * 11) % 500;
}

/* ---- continuing ------------------------------------------------------------------------------ */

/* Five turns, and each says what the whole conversation says when it is sent at once. */
static void check_turns(const char *settings, int max_tokens)
{
    struct id session = new_session();
    struct ids all = {0};
    char more[200];
    snprintf(more, sizeof(more), ",\"max_tokens\":%d%s", max_tokens, settings);
    for (int turn = 0; turn < 5; turn++) {
        struct ids prompt, before = all, expected;
        make_prompt(&prompt, turn);
        int start = all.n + prompt.n;
        take_turn(&session, &prompt, more, &all);
        memcpy(before.list + before.n, prompt.list, (size_t)prompt.n * sizeof(*prompt.list));
        before.n += prompt.n;
        say_once(&before, max_tokens, settings, &expected);
        assert_int_equal(expected.n, all.n - start);
        assert_memory_equal(expected.list, all.list + start,
                            (size_t)expected.n * sizeof(*expected.list));
    }
}

static void test_turns_equal_the_whole(void **state)
{
    (void)state;
    check_turns(",\"temperature\":0,\"ignore_eos\":true", 9);
    /* The draw of a token depends on the seed and on where in the session it is. */
    check_turns(",\"temperature\":1,\"seed\":7,\"ignore_eos\":true", 9);
    check_turns(",\"temperature\":0,\"ignore_eos\":true", 0); /* only read */
}

/* The text of ids, which the caller frees. */
static char *detokenize(const int32_t *list, int n)
{
    struct ids ids = {.n = n};
    memcpy(ids.list, list, (size_t)n * sizeof(*list));
    char *printed = print_ids(&ids);
    struct answer a = post("/detokenize", "{\"tokens\":%s}", printed);
    expect_code(&a, 200);
    char *text = strdup(member(a.json, "prompt")->valuestring);
    done(&a);
    free(printed);
    return text;
}

/* An output token whose text is plain, of two characters or more, and new in the text. */
static int plain_token(const struct ids *all, int n_prompt)
{
    for (int i = n_prompt + 3; i < all->n; i++) {
        char *before = detokenize(all->list + n_prompt, i - n_prompt);
        char *text = detokenize(all->list + i, 1);
        size_t n = strlen(text), plain = 0;
        while (plain < n && text[plain] >= ' ' && text[plain] <= '~')
            plain++;
        bool good = n >= 2 && plain == n && !strstr(before, text + 1);
        free(before);
        free(text);
        if (good)
            return i;
    }
    fail_msg("no output token has plain text that is new");
    return 0;
}

/* What a stop string cuts off the session has not seen: it goes on from the tokens before the
 * string, and where that begins inside a token, from the part of the token's text before it. */
static void check_stop_string(int skip)
{
    static const char settings[] = ",\"temperature\":0,\"frequency_penalty\":2,\"ignore_eos\":true";
    struct id whole = new_session(), cut = new_session();
    struct ids all = {0}, prompt = {.list = {400, 401, 402}, .n = 3}, seen, expected, found = {0};
    char more[120];
    snprintf(more, sizeof(more), ",\"max_tokens\":40%s", settings);
    take_turn(&whole, &prompt, more, &all);
    const int at = plain_token(&all, prompt.n);
    char *text = detokenize(all.list + at, 1);
    cJSON *stop = cJSON_CreateString(text + skip);
    char *printed = cJSON_PrintUnformatted(stop);
    struct answer a =
        post(COMPLETIONS, "{\"session_id\":\"%s\",\"prompt\":[400,401,402],\"stop\":[%s]%s}",
             cut.text, printed, more);
    expect_code(&a, 200);
    assert_string_equal(
        member(cJSON_GetArrayItem(member(a.json, "choices"), 0), "finish_reason")->valuestring,
        "stop");
    seen = all;
    seen.n = at;
    if (skip) {
        struct answer b =
            post("/tokenize", "{\"prompt\":\"%.*s\",\"add_special_tokens\":false}", skip, text);
        expect_code(&b, 200);
        add_ids(&seen, member(b.json, "tokens"));
        done(&b);
    }
    assert_int_equal(number(member(a.json, "session"), "position"), seen.n);
    seen.list[seen.n++] = 410;
    say_once(&seen, 8, ",\"temperature\":0,\"ignore_eos\":true", &expected);
    struct answer c = post(COMPLETIONS,
                           "{\"session_id\":\"%s\",\"prompt\":[410],\"max_tokens\":8,"
                           "\"temperature\":0,\"ignore_eos\":true,\"return_token_ids\":true}",
                           cut.text);
    expect_code(&c, 200);
    add_ids(&found, member(cJSON_GetArrayItem(member(c.json, "choices"), 0), "token_ids"));
    assert_int_equal(found.n, expected.n);
    assert_memory_equal(expected.list, found.list, (size_t)found.n * sizeof(*found.list));
    done(&a);
    done(&c);
    cJSON_Delete(stop);
    free(printed);
    free(text);
}

static void test_stop_string(void **state)
{
    (void)state;
    check_stop_string(0);
    check_stop_string(1);
}

/* The prompts of two turns of a chat, with the answer between, are the whole conversation. */
static void test_chat_renders_once(void **state)
{
    (void)state;
    static const char *const firsts[] = {
        "{\"role\":\"user\",\"content\":\"one\"}",
        "{\"role\":\"system\",\"content\":\"be kind\"},{\"role\":\"user\",\"content\":\"one\"}"};
    for (int i = 0; i < 2; i++) {
        struct id session = new_session();
        struct ids all = {0}, whole = {0};
        struct answer a = post(CHAT,
                               "{\"session_id\":\"%s\",\"messages\":[%s],\"max_tokens\":6,"
                               "\"temperature\":0,\"return_token_ids\":true}",
                               session.text, firsts[i]);
        expect_code(&a, 200);
        const cJSON *choice = cJSON_GetArrayItem(member(a.json, "choices"), 0);
        add_ids(&all, member(a.json, "prompt_token_ids"));
        add_ids(&all, member(choice, "token_ids"));
        struct answer b = post(CHAT,
                               "{\"session_id\":\"%s\",\"messages\":[{\"role\":\"user\","
                               "\"content\":\"two\"}],\"max_tokens\":6,\"return_token_ids\":true}",
                               session.text);
        expect_code(&b, 200);
        add_ids(&all, member(b.json, "prompt_token_ids"));
        char *answer = cJSON_PrintUnformatted(member(member(choice, "message"), "content"));
        struct answer c = post("/tokenize",
                               "{\"messages\":[%s,{\"role\":\"assistant\",\"content\":%s},"
                               "{\"role\":\"user\",\"content\":\"two\"}]}",
                               firsts[i], answer);
        expect_code(&c, 200);
        add_ids(&whole, member(c.json, "tokens"));
        /* A random model's answer need not retokenize equally; the turns around it do. */
        int n_last = cJSON_GetArraySize(member(b.json, "prompt_token_ids"));
        assert_true(n_last < whole.n);
        assert_memory_equal(all.list + all.n - n_last, whole.list + whole.n - n_last,
                            (size_t)n_last * sizeof(*all.list));
        int n_first = cJSON_GetArraySize(member(a.json, "prompt_token_ids"));
        assert_memory_equal(all.list, whole.list, (size_t)n_first * sizeof(*all.list));
        done(&a);
        done(&b);
        done(&c);
        free(answer);
    }
}

/* ---- copies ---------------------------------------------------------------------------------- */

static void say(const struct id *session, struct ids *out)
{
    struct ids prompt = {.list = {333}, .n = 1}, all = {0};
    char *ids = print_ids(&prompt);
    struct answer a = post(COMPLETIONS,
                           "{\"session_id\":\"%s\",\"prompt\":%s,\"max_tokens\":10,\"seed\":3,"
                           "\"ignore_eos\":true,\"return_token_ids\":true}",
                           session->text, ids);
    expect_code(&a, 200);
    add_ids(&all, member(cJSON_GetArrayItem(member(a.json, "choices"), 0), "token_ids"));
    *out = all;
    done(&a);
    free(ids);
}

static void assert_same(const struct ids *a, const struct ids *b)
{
    assert_int_equal(a->n, b->n);
    assert_memory_equal(a->list, b->list, (size_t)a->n * sizeof(*a->list));
}

static struct id session_with_turns(void)
{
    struct id session = new_session();
    struct ids all = {0}, prompt;
    for (int turn = 0; turn < 2; turn++) {
        make_prompt(&prompt, turn);
        take_turn(&session, &prompt, ",\"max_tokens\":5,\"temperature\":0,\"ignore_eos\":true",
                  &all);
    }
    return session;
}

static void test_forks_go_their_own_ways(void **state)
{
    (void)state;
    struct id session = session_with_turns();
    struct ids first, second, third;
    struct answer a = post(path_of(&session, "/fork"), "{\"n\":2}");
    expect_code(&a, 200);
    const cJSON *children = member(a.json, "data");
    assert_int_equal(cJSON_GetArraySize(children), 2);
    struct id one = id_of(cJSON_GetArrayItem(children, 0)),
              two = id_of(cJSON_GetArrayItem(children, 1));
    done(&a);
    say(&one, &first);
    say(&one, &second); /* the child goes on */
    say(&two, &third);
    assert_same(&first, &third);
    say(&session, &third); /* and the parent has not moved */
    assert_same(&first, &third);
    say(&session, &third);
    assert_same(&second, &third);
}

static void test_rollback(void **state)
{
    (void)state;
    struct id session = session_with_turns();
    struct ids first, again;
    struct answer a = post(path_of(&session, "/snapshots"), "{\"name\":\"here\"}");
    expect_code(&a, 200);
    done(&a);
    say(&session, &first);
    a = post(path_of(&session, "/rollback"), "{}"); /* regenerate */
    expect_code(&a, 200);
    done(&a);
    say(&session, &again);
    assert_same(&first, &again);
    say(&session, &again);
    a = post(path_of(&session, "/rollback"), "{\"snapshot\":\"here\"}");
    expect_code(&a, 200);
    done(&a);
    say(&session, &again);
    assert_same(&first, &again);

    a = post(path_of(&session, "/snapshots"), "{\"name\":\"here\"}"); /* snapshots do not change */
    expect_code(&a, 409);
    done(&a);
    a = post(path_of(&session, "/rollback"), "{\"snapshot\":\"there\"}");
    expect_code(&a, 409);
    done(&a);
}

static struct reply put_state(const struct id *session, const char *data, size_t n,
                              const char *if_match)
{
    const char *const headers[] = {"Content-Type: application/octet-stream", if_match, NULL};
    struct client_request request = {.method = "PUT",
                                     .path = path_of(session, "/state"),
                                     .body = data,
                                     .n_body = n,
                                     .headers = headers};
    struct reply reply;
    client_send(&server, &request, &reply);
    return reply;
}

static void assert_put_refused(const struct id *session, const char *data, size_t n, int code,
                               const char *if_match, const char *word)
{
    struct reply reply = put_state(session, data, n, if_match);
    if (reply.code != code || !strstr(reply.body.data, word))
        fail_msg("status %d, expected %d about %s: %s", reply.code, code, word, reply.body.data);
    reply_free(&reply);
}

static void test_export_and_import(void **state)
{
    (void)state;
    struct id session = session_with_turns(), other = new_session();
    struct reply exported, reply;
    struct ids first, again;
    char etag[32], if_match[64];
    client_get(&server, path_of(&session, "/state"), &exported);
    assert_int_equal(exported.code, 200);
    assert_true(reply_header(&exported, "ETag", etag, sizeof(etag)));
    assert_string_equal(etag, "\"2\"");

    reply = put_state(&other, exported.body.data, exported.body.n, "If-Match: \"0\"");
    assert_int_equal(reply.code, 200);
    reply_free(&reply);
    say(&session, &first);
    say(&other, &again);
    assert_same(&first, &again);

    /* What does not fit is refused by name, and the session stays. */
    char *bad = malloc(exported.body.n);
    const struct {
        size_t at;
        const char *word;
    } places[] = {
        {3, "LATTEIMG"}, {8, "version"}, {20, "fingerprint"}, {40, "length"}, {900, "checksum"}};
    for (size_t i = 0; i < sizeof(places) / sizeof(*places); i++) {
        memcpy(bad, exported.body.data, exported.body.n);
        bad[places[i].at] ^= 1;
        assert_put_refused(&other, bad, exported.body.n, 400, NULL, places[i].word);
    }
    assert_put_refused(&other, exported.body.data, exported.body.n - 1, 400, NULL, "length");
    assert_put_refused(&other, exported.body.data, 0, 400, NULL, "LATTEIMG");
    assert_put_refused(&other, exported.body.data, exported.body.n, 412, "If-Match: \"77\"",
                       "version");
    assert_put_refused(&other, exported.body.data, exported.body.n, 400, "If-Match: seven",
                       "If-Match");
    struct id none = {"sess_00000000000000000000000000000000"};
    assert_put_refused(&none, exported.body.data, exported.body.n, 404, NULL, "no session");
    snprintf(if_match, sizeof(if_match), "If-Match: %s", "\"2\"");
    reply = put_state(&other, exported.body.data, exported.body.n, if_match);
    assert_int_equal(reply.code, 200);
    reply_free(&reply);
    say(&other, &again);
    assert_same(&first, &again);
    free(bad);
    reply_free(&exported);

    struct id empty = new_session();
    client_get(&server, path_of(&empty, "/state"), &reply);
    assert_int_equal(reply.code, 404);
    reply_free(&reply);
}

/* ---- one turn at a time ---------------------------------------------------------------------- */

struct watch {
    const struct id *session;
    bool tried, hang_up;
    int n_pieces;
};

/* In the middle of a stream: a second turn, a deletion, and a rollback are refused. */
static bool interfere(void *context, const char *data, size_t n)
{
    struct watch *w = context;
    (void)data, (void)n;
    if (w->tried)
        return true;
    w->tried = true;
    struct answer a = post(COMPLETIONS, "{\"session_id\":\"%s\",\"prompt\":[5],\"max_tokens\":1}",
                           w->session->text);
    expect_code(&a, 409);
    done(&a);
    a = post(path_of(w->session, "/rollback"), "{}");
    expect_code(&a, 409);
    done(&a);
    a = send_text(&server, "DELETE", path_of(w->session, ""), NULL, NULL);
    expect_code(&a, 409);
    done(&a);
    return !w->hang_up;
}

static int position_of(const struct id *session, bool *in_turn)
{
    struct answer a = send_text(&server, "GET", path_of(session, ""), NULL, NULL);
    expect_code(&a, 200);
    int position = number(a.json, "position");
    if (in_turn)
        *in_turn = cJSON_IsTrue(member(a.json, "in_turn"));
    done(&a);
    return position;
}

static void stream(const struct id *session, bool hang_up, int max_tokens)
{
    struct watch watch = {.session = session, .hang_up = hang_up};
    char *body = text_of("{\"session_id\":\"%s\",\"prompt\":[400,401],\"max_tokens\":%d,"
                         "\"ignore_eos\":true,\"stream\":true}",
                         session->text, max_tokens);
    struct client_request request = {
        .path = COMPLETIONS, .body = body, .on_data = interfere, .context = &watch};
    struct reply reply;
    client_send(&server, &request, &reply);
    reply_free(&reply);
    free(body);
    assert_true(watch.tried);
}

/* A turn that the client broke off is not applied: the session is where it was. */
static void test_one_turn_at_a_time(void **state)
{
    (void)state;
    struct id session = session_with_turns();
    int before = position_of(&session, NULL);
    stream(&session, false, 3000);
    assert_int_equal(position_of(&session, NULL), before + 2 + 3000);
    struct ids first, again;
    struct id other = session_with_turns();
    struct answer a = post(path_of(&other, "/fork"), "{}");
    struct id twin = id_of(cJSON_GetArrayItem(member(a.json, "data"), 0));
    done(&a);
    stream(&other, true, 200000);
    bool in_turn = true;
    for (int i = 0; i < 500 && in_turn; i++) {
        position_of(&other, &in_turn);
        sleep_ms(10);
    }
    assert_false(in_turn);
    say(&other, &first);
    say(&twin, &again);
    assert_same(&first, &again);
}

static void expect_status(const char *body, const char *const *headers, int code)
{
    struct client_request request = {.path = COMPLETIONS, .body = body, .headers = headers};
    struct reply reply;
    client_send(&server, &request, &reply);
    if (reply.code != code)
        fail_msg("status %d, expected %d: %s", reply.code, code, reply.body.data);
    reply_free(&reply);
}

static void test_if_match(void **state)
{
    (void)state;
    struct id session = session_with_turns();
    char *body = text_of("{\"session_id\":\"%s\",\"prompt\":[5],\"max_tokens\":1}", session.text);
    struct answer a = send_text(&server, "POST", COMPLETIONS, strdup(body), "If-Match: \"1\"");
    expect_code(&a, 412);
    done(&a);
    a = send_text(&server, "POST", COMPLETIONS, strdup(body), "If-Match: \"2\"");
    expect_code(&a, 200);
    assert_int_equal(number(member(a.json, "session"), "version"), 3);
    done(&a);
    /* An unreadable one is told also to a repetition. */
    static const char *const once[] = {"Idempotency-Key: matched", NULL};
    static const char *const wrong[] = {"Idempotency-Key: matched", "If-Match: three", NULL};
    expect_status(body, once, 200);
    expect_status(body, once, 200);
    expect_status(body, wrong, 400);
    free(body);
}

static int count_sessions(void)
{
    struct answer a = send_text(&server, "GET", "/v1/sessions?limit=100", NULL, NULL);
    int n = cJSON_GetArraySize(member(a.json, "data"));
    assert_true(n < 100);
    done(&a);
    return n;
}

/* What is asked of a session at a version that it is not at leaves it as it was. */
static void test_if_match_of_changes(void **state)
{
    (void)state;
    static const struct {
        const char *method, *what, *body, *good;
    } cases[] = {
        {"POST", "/rollback", "{}", "If-Match: \"2\""},
        {"POST", "/snapshots", "{\"name\":\"a\"}", "If-Match: 3"},
        {"POST", "/fork", "{}", "If-Match: \"3\""},
        {"GET", "/state", NULL, NULL}, /* its bytes are below */
        {"DELETE", "", NULL, "If-Match: \"3\""},
    };
    struct id session = session_with_turns();
    const int n_sessions = count_sessions();
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        const char *body = cases[i].body, *path = path_of(&session, cases[i].what);
        struct answer a = send_text(&server, cases[i].method, path, body ? strdup(body) : NULL,
                                    "If-Match: \"1\"");
        expect_code(&a, 412);
        done(&a);
        a = send_text(&server, cases[i].method, path, body ? strdup(body) : NULL, "If-Match: one");
        expect_code(&a, 400);
        assert_string_equal(member(member(a.json, "error"), "param")->valuestring, "If-Match");
        done(&a);
    }
    struct answer a = send_text(&server, "GET", path_of(&session, ""), NULL, NULL);
    assert_int_equal(number(a.json, "version"), 2);
    done(&a);
    a = send_text(&server, "GET", path_of(&session, "/snapshots"), NULL, NULL);
    assert_int_equal(cJSON_GetArraySize(member(a.json, "data")), 0);
    done(&a);
    assert_int_equal(count_sessions(), n_sessions);
    static const char *const at_2[] = {"If-Match: \"2\"", NULL};
    struct client_request request = {.path = path_of(&session, "/state"), .headers = at_2};
    struct reply exported;
    client_send(&server, &request, &exported);
    assert_int_equal(exported.code, 200);
    assert_true(exported.body.n > 1000);
    reply_free(&exported);
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        const char *body = cases[i].body;
        if (!cases[i].good)
            continue;
        a = send_text(&server, cases[i].method, path_of(&session, cases[i].what),
                      body ? strdup(body) : NULL, cases[i].good);
        expect_code(&a, 200);
        done(&a);
    }
}

/* ---- the resource ---------------------------------------------------------------------------- */

static void test_refusals(void **state)
{
    (void)state;
    struct id session = new_session();
    static const struct {
        const char *path, *body;
        int code;
        const char *param;
    } cases[] = {
        {"/v1/sessions", "{\"metadata\":[]}", 400, "metadata"},
        {"/v1/sessions", "{\"metadata\":{\"a\":1}}", 400, "metadata"},
        {"/v1/sessions", "{\"idle_ttl\":0}", 400, "idle_ttl"},
        {"/v1/sessions", "{\"idle_ttl\":1.5}", 400, "idle_ttl"},
        {"/v1/sessions", "{\"colour\":1}", 400, "colour"},
        {"/v1/sessions", "[]", 400, NULL},
        {"/v1/sessions", "{", 400, NULL},
        {"fork", "{\"n\":65}", 400, "n"},
        {"fork", "{\"n\":0}", 400, "n"},
        {"snapshots", "{}", 400, "name"},
        {"snapshots", "{\"name\":\"\"}", 400, "name"},
        {"rollback", "{}", 409, "snapshot"},
        {"rollback", "{\"snapshot\":\"none\"}", 409, "snapshot"},
        {"rollback", "{\"snapshot\":3}", 400, "snapshot"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        char what[32];
        snprintf(what, sizeof(what), "/%s", cases[i].path);
        const char *path = *cases[i].path == '/' ? cases[i].path : path_of(&session, what);
        struct answer a = send_text(&server, "POST", path, strdup(cases[i].body), NULL);
        expect_code(&a, cases[i].code);
        const cJSON *param = member(member(a.json, "error"), "param");
        if (cases[i].param)
            assert_string_equal(param->valuestring, cases[i].param);
        done(&a);
    }
    static const char *const bodies[] = {
        "{\"session_id\":\"%s\",\"prompt\":\"a\",\"n\":2}",
        "{\"session_id\":\"%s\",\"prompt\":\"a\",\"best_of\":2}",
        "{\"session_id\":\"%s\",\"prompt\":[\"a\",\"b\"]}",
        "{\"session_id\":\"%s\",\"prompt\":\"a\",\"echo\":true}",
    };
    for (size_t i = 0; i < sizeof(bodies) / sizeof(*bodies); i++) {
        char body[200];
        snprintf(body, sizeof(body), bodies[i], session.text);
        struct answer a = send_text(&server, "POST", COMPLETIONS, strdup(body), NULL);
        expect_code(&a, 400);
        done(&a);
    }
    struct answer a = post(COMPLETIONS, "{\"session_id\":\"sess_nobody\",\"prompt\":\"a\"}");
    expect_code(&a, 404);
    assert_string_equal(member(member(a.json, "error"), "code")->valuestring, "session_not_found");
    done(&a);
    bool in_turn = true;
    assert_int_equal(position_of(&session, &in_turn), 0); /* a refused turn is over */
    assert_false(in_turn);
}

static void test_list_and_delete(void **state)
{
    (void)state;
    struct id made[5];
    for (int i = 0; i < 5; i++)
        made[i] = new_session();
    struct answer a = send_text(&server, "GET", "/v1/sessions?limit=2", NULL, NULL);
    expect_code(&a, 200);
    assert_string_equal(member(a.json, "first_id")->valuestring, made[4].text);
    assert_true(cJSON_IsTrue(member(a.json, "has_more")));
    char next[160];
    snprintf(next, sizeof(next), "/v1/sessions?limit=2&after=%s",
             member(a.json, "last_id")->valuestring);
    done(&a);
    a = send_text(&server, "GET", next, NULL, NULL);
    assert_string_equal(member(a.json, "first_id")->valuestring, made[2].text);
    done(&a);
    a = send_text(&server, "DELETE", path_of(&made[2], ""), NULL, NULL);
    expect_code(&a, 200);
    done(&a);
    a = send_text(&server, "GET", path_of(&made[2], ""), NULL, NULL);
    expect_code(&a, 404);
    done(&a);
    a = send_text(&server, "GET", "/v1/sessions?limit=0", NULL, NULL);
    expect_code(&a, 400);
    done(&a);
}

/* On a CPU slots are host memory: a session is in no other tier, before its first turn and after,
 * as long as there is no store. */
static void test_tiers(void **state)
{
    (void)state;
    struct id session = new_session();
    struct ids prompt, all = {0};
    make_prompt(&prompt, 0);
    for (int i = 0; i < 2; i++) {
        struct answer a = send_text(&server, "GET", path_of(&session, ""), NULL, NULL);
        expect_code(&a, 200);
        assert_string_equal(member(a.json, "tier")->valuestring, "host");
        done(&a);
        take_turn(&session, &prompt, ",\"max_tokens\":2", &all);
    }
    double n = server_metric(&server, "latte_sessions");
    assert_true(n > 0);
    assert_true(server_metric(&server, "latte_sessions_by_tier{tier=\"host\"}") == n);
    assert_true(server_metric(&server, "latte_sessions_by_tier{tier=\"device\"}") == 0);
    assert_true(server_metric(&server, "latte_sessions_by_tier{tier=\"store\"}") == 0);
}

/* ---- limits and owners ----------------------------------------------------------------------- */

static void test_limits(void **state)
{
    (void)state;
    struct server small;
    const char *const args[] = {"--max-sessions", "3", "--session-idle-ttl", "1", NULL};
    server_start(&small, args);
    for (int i = 0; i < 4; i++) {
        struct answer a = send_text(&small, "POST", "/v1/sessions", strdup("{}"), NULL);
        expect_code(&a, i < 3 ? 200 : 429);
        done(&a);
    }
    bool free_again = false; /* they expire by themselves */
    for (int i = 0; i < 600 && !free_again; i++) {
        struct answer a = send_text(&small, "POST", "/v1/sessions", strdup("{}"), NULL);
        free_again = a.code == 200;
        done(&a);
        sleep_ms(10);
    }
    assert_true(free_again);
    server_stop(&small);
}

/* Another key's session is not there, for anything. */
static void test_owners(void **state)
{
    (void)state;
    char keys[200];
    struct server keyed;
    snprintf(keys, sizeof(keys), "/tmp/latte-keys-%d", (int)getpid());
    FILE *f = fopen(keys, "w");
    assert_non_null(f);
    fputs("first-key-1\nsecond-key-2\n", f);
    fclose(f);
    const char *const args[] = {"--api-key-file", keys, NULL};
    server_start(&keyed, args);
    const char *first = "Authorization: Bearer first-key-1",
               *second = "Authorization: Bearer second-key-2";
    struct answer a = send_text(&keyed, "POST", "/v1/sessions", strdup("{}"), first);
    expect_code(&a, 200);
    struct id id = id_of(a.json);
    done(&a);
    a = send_text(&keyed, "GET", path_of(&id, ""), NULL, first);
    expect_code(&a, 200);
    done(&a);
    const struct {
        const char *method, *what;
        const char *body;
    } cases[] = {{"GET", "", NULL},           {"DELETE", "", NULL},
                 {"POST", "/fork", "{}"},     {"POST", "/snapshots", "{\"name\":\"a\"}"},
                 {"GET", "/snapshots", NULL}, {"POST", "/rollback", "{}"},
                 {"GET", "/state", NULL}};
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        a = send_text(&keyed, cases[i].method, path_of(&id, cases[i].what),
                      cases[i].body ? strdup(cases[i].body) : NULL, second);
        expect_code(&a, 404);
        done(&a);
    }
    a = send_text(&keyed, "POST", COMPLETIONS,
                  text_of("{\"session_id\":\"%s\",\"prompt\":\"a\"}", id.text), second);
    expect_code(&a, 404);
    done(&a);
    a = send_text(&keyed, "GET", "/v1/sessions", NULL, second);
    assert_int_equal(cJSON_GetArraySize(member(a.json, "data")), 0);
    done(&a);
    server_stop(&keyed);
    remove(keys);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_turns_equal_the_whole),
        cmocka_unit_test(test_stop_string),
        cmocka_unit_test(test_chat_renders_once),
        cmocka_unit_test(test_forks_go_their_own_ways),
        cmocka_unit_test(test_rollback),
        cmocka_unit_test(test_export_and_import),
        cmocka_unit_test(test_one_turn_at_a_time),
        cmocka_unit_test(test_if_match),
        cmocka_unit_test(test_if_match_of_changes),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_list_and_delete),
        cmocka_unit_test(test_tiers),
        cmocka_unit_test(test_limits),
        cmocka_unit_test(test_owners),
    };
    return cmocka_run_group_tests(tests, start_server, stop_server);
}
