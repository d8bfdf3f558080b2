/* test_states.c - states that come with requests and go with replies, and presets. The oracle is
 * a session on the same server: token for token, and its exported state byte for byte. */
#include "tests/http/harness.h"

#include <cjson/cJSON.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/base64.h"
#include "tests/unit/model_files.h"

#define COMPLETIONS "/v1/completions"
#define CHAT "/v1/chat/completions"

enum { MAX_IDS = 512 };

/* One whose states are small, and one whose states are over a megabyte: they are read and written
 * by workers, and a body that has one is larger than --max-body-mb. */
static struct server tiny, wide;
static char wide_model[160];

static const char wide_config[] =
    "{\"architectures\":[\"LatteForCausalLM\"],\"model_type\":\"latte\",\"vocab_size\":8192,"
    "\"hidden_size\":32,\"num_hidden_layers\":3,\"intermediate_size\":64,"
    "\"num_attention_heads\":2,\"num_latents\":8,\"layer_type\":\"macchiato\","
    "\"latent_input\":\"rglru\",\"rglru_blocks\":2,\"sliding_window\":2048,\"norm\":\"rmsnorm\","
    "\"mlp\":\"gated\",\"hidden_act\":\"silu\",\"tie_word_embeddings\":true,"
    "\"eos_token_id\":[0,2]}";

static void make_wide_model(void)
{
    static const char *const files[] = {"tokenizer.json", "tokenizer_config.json"};
    assert_int_equal(test_dir_make(wide_model, sizeof(wide_model)), 0);
    assert_int_equal(model_files_write(wide_model, wide_config, 7, NULL), 0);
    for (int i = 0; i < 2; i++) {
        char path[100];
        size_t n = 0;
        snprintf(path, sizeof(path), "weights/latte-12m/%s", files[i]);
        char *text = test_file_read(path, &n);
        assert_non_null(text);
        assert_int_equal(test_file_write(wide_model, files[i], text, n), 0);
        free(text);
    }
}

static int start_servers(void **state)
{
    (void)state;
    make_wide_model();
    server_start(&tiny, NULL);
    server_start(&wide, (const char *const[]){"--model", wide_model, "--max-body-mb", "1", NULL});
    return 0;
}

static int stop_servers(void **state)
{
    (void)state;
    server_stop(&tiny);
    server_stop(&wide);
    test_dir_remove(wide_model);
    return 0;
}

/* ---- requests -------------------------------------------------------------------------------- */

__attribute__((format(printf, 1, 2))) static char *text_of(const char *format, ...)
{
    char *text = NULL;
    va_list args;
    va_start(args, format);
    assert_true(vasprintf(&text, format, args) >= 0);
    va_end(args);
    return text;
}

struct answer {
    int code;
    cJSON *json; /* NULL: the body is none */
};

/* Frees the body. */
static struct answer send_body(const struct server *s, const char *method, const char *path,
                               char *body, const char *header)
{
    const char *const headers[] = {header, NULL};
    struct client_request request = {
        .method = method, .path = path, .body = body, .headers = header ? headers : NULL};
    struct reply reply;
    client_send(s, &request, &reply);
    struct answer a = {.code = reply.code};
    a.json = reply.body.n ? cJSON_ParseWithLength(reply.body.data, reply.body.n) : NULL;
    reply_free(&reply);
    free(body);
    return a;
}

static void done(struct answer *a)
{
    cJSON_Delete(a->json);
    a->json = NULL;
}

static void expect_code(const struct answer *a, int code)
{
    if (a->code != code)
        fail_msg("status %d, expected %d: %.400s", a->code, code, cJSON_PrintUnformatted(a->json));
}

static const cJSON *member(const cJSON *v, const char *name)
{
    const cJSON *found = cJSON_GetObjectItemCaseSensitive(v, name);
    if (!found)
        fail_msg("no %s in %.400s", name, cJSON_PrintUnformatted(v));
    return found;
}

static const char *text_member(const cJSON *v, const char *name)
{
    return member(v, name)->valuestring;
}

/* The request is refused with this status, about this parameter, and says this. */
static void expect_refusal(struct answer *a, int code, const char *param, const char *words)
{
    expect_code(a, code);
    const cJSON *error = member(a->json, "error");
    if (param)
        assert_string_equal(text_member(error, "param"), param);
    if (!strstr(text_member(error, "message"), words))
        fail_msg("expected '%s' in: %s", words, text_member(error, "message"));
    done(a);
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

static void assert_same(const struct ids *a, const struct ids *b)
{
    assert_int_equal(a->n, b->n);
    assert_memory_equal(a->list, b->list, (size_t)a->n * sizeof(*a->list));
}

/* What a turn gave. */
struct turn {
    struct ids prompt, output;
    char finish[16];
    char *state; /* as text, or NULL */
};

static void take_choices(struct turn *t, const cJSON *reply)
{
    const cJSON *choice = cJSON_GetArrayItem(member(reply, "choices"), 0);
    const cJSON *at_top = cJSON_GetObjectItemCaseSensitive(reply, "prompt_token_ids");
    add_ids(&t->prompt,
            at_top ? at_top : cJSON_GetObjectItemCaseSensitive(choice, "prompt_token_ids"));
    add_ids(&t->output, cJSON_GetObjectItemCaseSensitive(choice, "token_ids"));
    const cJSON *finish = choice ? member(choice, "finish_reason") : NULL;
    const cJSON *state = cJSON_GetObjectItemCaseSensitive(reply, "state");
    if (cJSON_IsString(finish))
        snprintf(t->finish, sizeof(t->finish), "%s", finish->valuestring);
    if (state) { /* once, and beside the finish_reason */
        assert_true(cJSON_IsString(state) && cJSON_IsString(finish));
        assert_null(t->state);
        t->state = strdup(state->valuestring);
    }
}

/* Events as they were streamed; the last one says [DONE]. */
static void take_events(struct turn *t, const char *text)
{
    const char *end = NULL;
    for (; !strncmp(text, "data: ", 6) && strncmp(text, "data: [DONE]", 12); text = end + 2) {
        end = strstr(text, "\n\n");
        assert_non_null(end);
        cJSON *v = cJSON_ParseWithLength(text + 6, (size_t)(end - text - 6));
        assert_non_null(v);
        take_choices(t, v);
        cJSON_Delete(v);
    }
    assert_string_equal(text, "data: [DONE]\n\n");
}

/* A request with this body, which is freed. */
static struct turn take_turn(const struct server *s, const char *path, char *body)
{
    struct turn t = {0};
    struct reply reply;
    client_post(s, path, body, &reply);
    if (reply.code != 200)
        fail_msg("%d %s for %.300s", reply.code, reply.body.data, body);
    if (reply.body.data[0] == '{') {
        cJSON *v = cJSON_ParseWithLength(reply.body.data, reply.body.n);
        take_choices(&t, v);
        cJSON_Delete(v);
    } else {
        take_events(&t, reply.body.data);
    }
    reply_free(&reply);
    free(body);
    return t;
}

struct id {
    char text[64];
};

static struct id new_session_from(const struct server *s, const char *body)
{
    struct id id;
    struct answer a = send_body(s, "POST", "/v1/sessions", strdup(body), NULL);
    expect_code(&a, 200);
    snprintf(id.text, sizeof(id.text), "%s", text_member(a.json, "id"));
    done(&a);
    return id;
}

static void get_state(const struct server *s, const struct id *session, struct reply *out)
{
    char path[128];
    snprintf(path, sizeof(path), "/v1/sessions/%s/state", session->text);
    client_get(s, path, out);
    assert_int_equal(out->code, 200);
}

/* The session's export is this text's bytes. */
static void assert_state_of(const struct server *s, const struct id *session, const char *state)
{
    struct reply exported;
    struct bytes data = {0};
    struct error err;
    assert_non_null(state);
    get_state(s, session, &exported);
    assert_int_equal(base64_decode(state, strlen(state), &data, &err), STATUS_OK);
    assert_int_equal(data.n, exported.body.n);
    assert_memory_equal(data.data, exported.body.data, data.n);
    bytes_free(&data);
    reply_free(&exported);
}

/* `"state":"...",`, or nothing for the first turn; freed by the caller. */
static char *state_member(const char *state)
{
    return state ? text_of("\"state\":\"%s\",", state) : strdup("");
}

/* ---- turns ----------------------------------------------------------------------------------- */

/* The same turns in a session and through states: bodies are what a turn's request says besides.
 * Returns how many ended with "stop". */
static int check_turns(const struct server *s, const char *path, const char *const *bodies,
                       int n_turns)
{
    struct id session = new_session_from(s, "{}");
    char *state = NULL;
    int n_stopped = 0;
    for (int i = 0; i < n_turns; i++) {
        char *before = state_member(state);
        struct turn in = take_turn(s, path,
                                   text_of("{\"session_id\":\"%s\",\"return_token_ids\":true,%s}",
                                           session.text, bodies[i]));
        struct turn out = take_turn(s, path,
                                    text_of("{%s\"return_state\":true,\"store\":false,"
                                            "\"return_token_ids\":true,%s}",
                                            before, bodies[i]));
        assert_true(in.output.n > 0 && in.prompt.n > 0);
        assert_same(&in.prompt, &out.prompt);
        assert_same(&in.output, &out.output);
        assert_string_equal(in.finish, out.finish);
        assert_null(in.state);
        assert_state_of(s, &session, out.state);
        free(before);
        free(state);
        state = out.state;
        n_stopped += !strcmp(out.finish, "stop");
    }
    free(state);
    return n_stopped;
}

static void test_turns_equal_a_session(void **state)
{
    (void)state;
    static const char *const bodies[] = {
        "\"prompt\":[300,301,302],\"max_tokens\":7,\"temperature\":0,\"ignore_eos\":true",
        "\"prompt\":\"and then\",\"max_tokens\":9,\"seed\":5,\"ignore_eos\":true,\"stream\":true",
        "\"prompt\":[310],\"max_tokens\":1,\"temperature\":0,\"ignore_eos\":true,\"logprobs\":2",
        "\"prompt\":[311,312],\"max_tokens\":30,\"seed\":9,\"stream\":true,"
        "\"stream_options\":{\"include_usage\":true}",
        "\"prompt\":[5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22],\"max_tokens\":3,"
        "\"temperature\":0,\"ignore_eos\":true",
    };
    check_turns(&tiny, COMPLETIONS, bodies, 5);
    check_turns(&wide, COMPLETIONS, bodies, 3);
}

static void test_chat_equals_a_session(void **state)
{
    (void)state;
    static const char *const bodies[] = {
        "\"messages\":[{\"role\":\"system\",\"content\":\"be kind\"},{\"role\":\"user\","
        "\"content\":\"one\"}],\"max_tokens\":8,\"temperature\":0",
        "\"messages\":[{\"role\":\"user\",\"content\":\"two\"}],\"max_tokens\":8,\"seed\":3,"
        "\"stream\":true",
        "\"messages\":[{\"role\":\"user\",\"content\":\"three\"}],\"max_tokens\":200,\"seed\":4,"
        "\"logit_bias\":{\"2\":100},\"min_tokens\":3", /* ends with the template's token */
        "\"messages\":[{\"role\":\"user\",\"content\":\"four\"}],\"max_tokens\":4,\"seed\":4",
    };
    assert_int_equal(check_turns(&tiny, CHAT, bodies, 4), 1);
    check_turns(&wide, CHAT, bodies, 2);
}

/* A stop string makes the server compute the turn again: the state given back is that of what the
 * client got. */
static void test_stop_string(void **state)
{
    (void)state;
    static const char *const bodies[] = {
        "\"prompt\":[400,401],\"max_tokens\":200,\"temperature\":1,\"seed\":2,\"stop\":[\"e\"]",
        "\"prompt\":[402],\"max_tokens\":200,\"temperature\":1,\"seed\":3,\"stop\":[\"a\"],"
        "\"stream\":true",
        "\"prompt\":[403],\"max_tokens\":5,\"temperature\":0,\"ignore_eos\":true",
    };
    assert_int_equal(check_turns(&tiny, COMPLETIONS, bodies, 3), 2);
}

/* A session and a state in one reply are the same. */
static void test_session_and_state(void **state)
{
    (void)state;
    struct id session = new_session_from(&wide, "{}");
    for (int i = 0; i < 2; i++) {
        struct turn t = take_turn(&wide, COMPLETIONS,
                                  text_of("{\"session_id\":\"%s\",\"prompt\":[7,8],"
                                          "\"max_tokens\":3,\"return_state\":true,\"stream\":%s}",
                                          session.text, i ? "true" : "false"));
        assert_state_of(&wide, &session, t.state);
        free(t.state);
    }
}

/* Without return_state a state may be continued in several ways at once. */
static void test_many_choices(void **state)
{
    (void)state;
    struct turn first = take_turn(&tiny, COMPLETIONS,
                                  strdup("{\"prompt\":[300,301],\"max_tokens\":6,"
                                         "\"temperature\":0,\"return_state\":true}"));
    struct turn one = take_turn(&tiny, COMPLETIONS,
                                text_of("{\"state\":\"%s\",\"prompt\":[9],\"max_tokens\":8,"
                                        "\"temperature\":0,\"return_token_ids\":true,"
                                        "\"ignore_eos\":true}",
                                        first.state));
    struct answer a = send_body(&tiny, "POST", COMPLETIONS,
                                text_of("{\"state\":\"%s\",\"prompt\":[[9],[9]],\"n\":2,"
                                        "\"max_tokens\":8,\"temperature\":0,"
                                        "\"return_token_ids\":true,\"ignore_eos\":true}",
                                        first.state),
                                NULL);
    expect_code(&a, 200);
    assert_null(cJSON_GetObjectItemCaseSensitive(a.json, "state"));
    assert_null(cJSON_GetObjectItemCaseSensitive(a.json, "session"));
    assert_int_equal(cJSON_GetArraySize(member(a.json, "choices")), 4);
    for (int i = 0; i < 4; i++) {
        struct ids ids = {0};
        add_ids(&ids, member(cJSON_GetArrayItem(member(a.json, "choices"), i), "token_ids"));
        assert_same(&ids, &one.output);
    }
    assert_int_equal(member(member(a.json, "usage"), "prompt_tokens")->valueint, 2);
    done(&a);
    free(first.state);
}

/* ---- what is refused ------------------------------------------------------------------------- */

/* An exported state with the bytes at a place changed, as text. */
static char *changed_state(const struct reply *exported, size_t at, size_t n_dropped)
{
    struct bytes data = {0}, text = {0};
    bytes_append(&data, exported->body.data, exported->body.n - n_dropped);
    if (at)
        data.data[at] ^= 1;
    base64_encode(data.data, data.n, &text);
    bytes_free(&data);
    return text.data;
}

static void check_bad_states(const struct server *s)
{
    static const struct {
        size_t at, n_dropped;
        const char *words[3];
    } cases[] = {
        {3, 0, {"LATTEIMG"}},
        {8, 0, {"format version", "expected 1", "found 0"}},
        {20, 0, {"model fingerprint", "expected", "found"}},
        {40, 0, {"length", "expected", "found"}},
        {0, 1, {"length", "expected", "found"}},
        {900, 0, {"checksum", "expected", "found"}},
    };
    struct id session = new_session_from(s, "{}");
    struct turn t =
        take_turn(s, COMPLETIONS,
                  text_of("{\"session_id\":\"%s\",\"prompt\":[5],\"max_tokens\":1}", session.text));
    struct reply exported;
    (void)t;
    get_state(s, &session, &exported);
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        char *state = changed_state(&exported, cases[i].at, cases[i].n_dropped);
        for (int k = 0; k < 3 && cases[i].words[k]; k++) {
            struct answer a =
                send_body(s, "POST", k ? CHAT : COMPLETIONS,
                          text_of("{\"state\":\"%s\",\"prompt\":\"x\",\"messages\":[{\"role\":"
                                  "\"user\",\"content\":\"x\"}]}",
                                  state),
                          NULL);
            expect_refusal(&a, 400, "state", cases[i].words[k]);
        }
        free(state);
    }
    reply_free(&exported);
}

static void test_bad_states(void **state)
{
    (void)state;
    check_bad_states(&tiny);
    check_bad_states(&wide);
}

static void test_refusals(void **state)
{
    (void)state;
    static const struct {
        const char *body, *param, *words;
    } cases[] = {
        {"\"state\":\"AAA\"", "state", "base64"},
        {"\"state\":\"AA-A\"", "state", "'-' as character 3"},
        {"\"state\":\"\"", "state", "LATTEIMG"},
        {"\"state\":7", "state", "a string"},
        {"\"state\":\"AAAA\",\"session_id\":\"sess_x\"", "state", "'session_id' and 'state'"},
        {"\"from\":{\"preset\":\"p\"},\"session_id\":\"sess_x\"", "from",
         "'session_id' and 'from'"},
        {"\"state\":\"AAAA\",\"from\":{\"preset\":\"p\"}", "state", "'from' and 'state'"},
        {"\"from\":\"p\"", "from", "an object"},
        {"\"from\":{}", "from.preset", "Missing"},
        {"\"from\":{\"preset\":3}", "from.preset", "a string"},
        {"\"from\":{\"session\":\"sess_x\"}", "from.session", "Unknown"},
        {"\"return_state\":1", "return_state", "a boolean"},
        {"\"return_state\":true,\"n\":2", "n", "one choice"},
        {"\"return_state\":true,\"best_of\":2", "best_of", "one choice"},
        {"\"return_state\":true,\"echo\":true", "echo", "'return_state'"},
        {"\"state\":\"AAAA\",\"echo\":true", "echo", "'state'"},
        {"\"store\":1", "store", "a boolean"},
    };
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        struct answer a = send_body(&tiny, "POST", COMPLETIONS,
                                    text_of("{\"prompt\":\"x\",%s}", cases[i].body), NULL);
        expect_refusal(&a, 400, cases[i].param, cases[i].words);
    }
}

/* A session of two turns. */
static struct id session_with_turns(const struct server *s, const char *key)
{
    struct id id;
    struct answer a = send_body(s, "POST", "/v1/sessions", strdup("{}"), key);
    expect_code(&a, 200);
    snprintf(id.text, sizeof(id.text), "%s", text_member(a.json, "id"));
    done(&a);
    for (int i = 0; i < 2; i++) {
        a = send_body(s, "POST", COMPLETIONS,
                      text_of("{\"session_id\":\"%s\",\"prompt\":[%d],\"max_tokens\":4,\"seed\":1}",
                              id.text, 300 + i),
                      key);
        expect_code(&a, 200);
        done(&a);
    }
    return id;
}

/* ---- what is kept, and how much may come ------------------------------------------------------
 */

static void test_nothing_is_kept(void **state)
{
    (void)state;
    struct server s;
    server_start(&s, NULL);
    struct turn t = take_turn(&s, COMPLETIONS,
                              strdup("{\"prompt\":[300,301],\"max_tokens\":6,\"store\":true,"
                                     "\"return_state\":true,\"stream\":true}"));
    struct turn u =
        take_turn(&s, CHAT,
                  text_of("{\"state\":\"%s\",\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],"
                          "\"max_tokens\":2,\"return_state\":true}",
                          t.state));
    assert_non_null(u.state);
    assert_true(server_await_metric(&s, "latte_session_states", 0, 5000));
    assert_true(server_metric(&s, "latte_session_state_bytes") == 0);
    assert_true(server_metric(&s, "latte_sessions") == 0);
    free(t.state);
    free(u.state);
    server_stop(&s);
}

/* A state is over the megabyte that other bodies may have. With as much as that beside it, it is
 * still accepted, and more is not; nor is a body that long on a route that takes no state. */
static void test_body_limits(void **state)
{
    (void)state;
    struct turn t =
        take_turn(&wide, COMPLETIONS,
                  strdup("{\"prompt\":[300,301],\"max_tokens\":2,\"return_state\":true}"));
    size_t n_state = strlen(t.state);
    assert_true(n_state > 1 << 20);
    const size_t most = n_state + (1 << 20);
    for (int i = 0; i < 4; i++) {
        char *body = text_of("{\"prompt\":\"x\",\"max_tokens\":1,\"state\":\"%s\"}", t.state);
        size_t n = i == 0 ? most : i == 1 ? most + 1 : i == 2 ? 1 << 20 : (1 << 20) + 1;
        size_t n_body = strlen(body);
        if (i > 1) {
            free(body);
            body = text_of("{\"prompt\":\"x\"}");
            n_body = strlen(body);
        }
        body = realloc(body, n + 1);
        memset(body + n_body, ' ', n - n_body);
        body[n] = '\0';
        struct answer a = send_body(&wide, "POST", i > 1 ? "/tokenize" : COMPLETIONS, body, NULL);
        expect_code(&a, i % 2 ? 413 : 200);
        done(&a);
    }
    free(t.state);
}

/* A client that leaves while its state is being computed, written or sent leaves nothing behind. */
static bool leave(void *context, const char *data, size_t n)
{
    size_t *left = context;
    (void)data;
    *left -= n < *left ? n : *left;
    return *left > 0;
}

static void test_hang_up(void **state)
{
    (void)state;
    double before = server_metric(&wide, "latte_session_states");
    for (size_t i = 0; i < 24; i++) {
        size_t left = 1 + i * i * i * 200; /* bytes, up to more than there are */
        struct client_request request = {
            .path = i % 2 ? CHAT : COMPLETIONS,
            .body = "{\"prompt\":\"x\",\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],"
                    "\"max_tokens\":3,\"return_state\":true,\"stream\":true}",
            .on_data = leave,
            .context = &left};
        struct reply reply;
        client_send(&wide, &request, &reply);
        reply_free(&reply);
    }
    assert_true(server_await_metric(&wide, "latte_session_states", before, 30000));
}

/* An import may be as long as a state, and a little longer, so that it is told what is wrong. */
static void test_import_limits(void **state)
{
    (void)state;
    struct id session = session_with_turns(&wide, NULL);
    struct reply exported, reply;
    char path[128], *long_body = calloc(1, 3 << 20);
    get_state(&wide, &session, &exported);
    snprintf(path, sizeof(path), "/v1/sessions/%s/state", session.text);
    assert_true(exported.body.n > 1 << 20);
    memcpy(long_body, exported.body.data, exported.body.n);
    static const struct {
        size_t more;
        int code;
        const char *words;
    } cases[] = {
        {0, 200, ""}, {1, 400, "length"}, {64 << 10, 400, "length"}, {65537, 413, "bytes"}};
    for (int i = 0; i < 8; i++) {
        bool chunked = i % 2; /* its length is known only when it has come */
        struct client_request request = {.method = "PUT",
                                         .path = path,
                                         .body = long_body,
                                         .n_body = exported.body.n + cases[i / 2].more,
                                         .chunked = chunked};
        client_send(&wide, &request, &reply);
        if (reply.code != cases[i / 2].code || !strstr(reply.body.data, cases[i / 2].words))
            fail_msg("%zu bytes more: %d %s", cases[i / 2].more, reply.code, reply.body.data);
        reply_free(&reply);
    }
    free(long_body);
    reply_free(&exported);
}

/* The states of requests under way count against --host-state-mb. */
static void test_memory(void **state)
{
    (void)state;
    struct server s;
    server_start(&s, (const char *const[]){"--model", wide_model, "--host-state-mb", "1", NULL});
    struct answer a =
        send_body(&s, "POST", COMPLETIONS,
                  strdup("{\"prompt\":[5],\"max_tokens\":1,\"return_state\":true}"), NULL);
    expect_code(&a, 429);
    done(&a);
    a = send_body(&s, "POST", COMPLETIONS, strdup("{\"prompt\":[5],\"max_tokens\":1}"), NULL);
    expect_code(&a, 200);
    done(&a);
    server_stop(&s);
}

/* ---- presets ----------------------------------------------------------------------------------
 */

#define USER "Authorization: Bearer user-key-1"
#define OTHER "Authorization: Bearer other-key-2"
#define ADMIN "Authorization: Bearer admin-key-3"

/* What a request with this member says. */
static struct ids say(const struct server *s, const char *path, const char *member_text,
                      const char *key)
{
    struct ids ids = {0};
    struct answer a =
        send_body(s, "POST", path,
                  text_of("{%s,\"%s\":%s,\"max_tokens\":8,\"seed\":3,"
                          "\"logit_bias\":{\"0\":-100,\"2\":-100},"
                          "\"return_token_ids\":true}",
                          member_text, strcmp(path, CHAT) ? "prompt" : "messages",
                          strcmp(path, CHAT) ? "[40]" : "[{\"role\":\"user\",\"content\":\"x\"}]"),
                  key);
    expect_code(&a, 200);
    add_ids(&ids, member(cJSON_GetArrayItem(member(a.json, "choices"), 0), "token_ids"));
    assert_int_equal(ids.n, 8);
    done(&a);
    return ids;
}

/* A file in the server's scratch directory. */
static void write_file(const struct server *s, const char *name, const char *data, size_t n,
                       char path[200])
{
    assert_int_equal(test_file_write(s->dir, name, data, n), 0);
    snprintf(path, 200, "%s/%s", s->dir, name);
}

static struct answer put_preset(const struct server *s, const char *name, const char *data,
                                size_t n, const char *key)
{
    char path[200];
    const char *const headers[] = {"Content-Type: application/octet-stream", key, NULL};
    snprintf(path, sizeof(path), "/v1/presets/%s", name);
    struct client_request request = {
        .method = "PUT", .path = path, .body = data, .n_body = n, .headers = headers};
    struct reply reply;
    client_send(s, &request, &reply);
    struct answer a = {reply.code, cJSON_ParseWithLength(reply.body.data, reply.body.n)};
    reply_free(&reply);
    return a;
}

static void expect_preset(struct answer *a, const char *name, int position)
{
    expect_code(a, 200);
    assert_string_equal(text_member(a->json, "name"), name);
    assert_int_equal(member(a->json, "position")->valueint, position);
    done(a);
}

/* Whatever continues a state and whatever begins from a preset of it says the same. */
static void check_from(const struct server *s, const struct id *session, const char *preset)
{
    char text[200];
    snprintf(text, sizeof(text), "\"from\":{\"preset\":\"%s\"}", preset);
    struct ids completion = say(s, COMPLETIONS, text, OTHER);
    struct ids chat = say(s, CHAT, text, OTHER), found;
    const char *const origins[] = {text, "\"from\":{\"session\":\"%s\"}",
                                   "\"from\":{\"session\":\"%s\",\"snapshot\":\"kept\"}"};
    for (int i = 0; i < 6; i++) {
        char body[200];
        snprintf(body, sizeof(body), origins[i / 2], session->text);
        const char *key = i < 2 ? OTHER : USER;
        struct answer a = send_body(s, "POST", "/v1/sessions", text_of("{%s}", body), key);
        expect_code(&a, 200);
        assert_int_equal(member(a.json, "position")->valueint, 10);
        assert_int_equal(member(a.json, "version")->valueint, 0);
        snprintf(body, sizeof(body), "\"session_id\":\"%s\"", text_member(a.json, "id"));
        done(&a);
        found = say(s, i % 2 ? CHAT : COMPLETIONS, body, key);
        assert_same(&found, i % 2 ? &chat : &completion);
    }
}

static void check_preset_refusals(const struct server *s, const struct id *session,
                                  const struct reply *exported)
{
    static const struct {
        const char *name, *body, *key;
        int code;
        const char *words;
    } cases[] = {
        {"two", NULL, USER, 403, "admin"},
        {"base", NULL, ADMIN, 409, "given at the server's start"},
        {"a%20b", NULL, ADMIN, 400, "letters"},
        {"x", "LATTEIMG", ADMIN, 400, "header"},
        {"x", "{\"session\":\"%s\"}", ADMIN, 404, "no session"}, /* of another key */
        {"x", "{\"session\":\"sess_none\"}", ADMIN, 404, "no session"},
        {"x", "{\"preset\":\"base\"}", ADMIN, 400, "Unknown"},
        {"x", "{}", ADMIN, 400, "'session'"},
        {"x", "{", ADMIN, 400, "parse"},
        {"three", NULL, ADMIN, 200, ""},
        {"four", NULL, ADMIN, 429, "--max-presets"},
    };
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        char body[200];
        snprintf(body, sizeof(body), cases[i].body ? cases[i].body : "", session->text);
        struct answer a =
            cases[i].body
                ? put_preset(s, cases[i].name, body, strlen(body), cases[i].key)
                : put_preset(s, cases[i].name, exported->body.data, exported->body.n, cases[i].key);
        if (cases[i].code == 200)
            expect_preset(&a, cases[i].name, 10);
        else
            expect_refusal(&a, cases[i].code, NULL, cases[i].words);
    }
}

static void check_preset_deletion(const struct server *s)
{
    struct answer a = send_body(s, "DELETE", "/v1/presets/three", NULL, USER);
    expect_refusal(&a, 403, NULL, "admin");
    a = send_body(s, "DELETE", "/v1/presets/base", NULL, ADMIN);
    expect_refusal(&a, 409, "preset", "given at the server's start");
    a = send_body(s, "DELETE", "/v1/presets/three", NULL, ADMIN);
    expect_code(&a, 200);
    done(&a);
    a = send_body(s, "DELETE", "/v1/presets/three", NULL, ADMIN);
    expect_refusal(&a, 404, "preset", "three");
    a = send_body(s, "GET", "/v1/presets/three", NULL, USER);
    expect_refusal(&a, 404, "preset", "three");
    a = send_body(s, "POST", COMPLETIONS,
                  strdup("{\"from\":{\"preset\":\"three\"},\"prompt\":\"x\"}"), USER);
    expect_refusal(&a, 404, "from.preset", "three");
    a = send_body(s, "POST", "/v1/sessions", strdup("{\"from\":{\"preset\":\"three\"}}"), USER);
    expect_refusal(&a, 404, "from.preset", "three");
    a = send_body(s, "GET", "/v1/presets", NULL, OTHER);
    expect_code(&a, 200);
    const cJSON *list = member(a.json, "data");
    assert_int_equal(cJSON_GetArraySize(list), 2);
    assert_string_equal(text_member(cJSON_GetArrayItem(list, 0), "name"), "base");
    assert_string_equal(text_member(cJSON_GetArrayItem(list, 1), "name"), "two");
    assert_true(cJSON_IsTrue(member(cJSON_GetArrayItem(list, 0), "fixed")));
    done(&a);
}

static void test_presets(void **state)
{
    (void)state;
    static const char keys[] = "user-key-1\nother-key-2\nadmin-key-3 admin\n";
    char key_path[200], preset_path[200], option[240];
    struct server s;
    struct reply exported;
    struct id first = session_with_turns(&tiny, NULL);
    get_state(&tiny, &first, &exported);
    write_file(&tiny, "keys", keys, sizeof(keys) - 1, key_path);
    write_file(&tiny, "state", exported.body.data, exported.body.n, preset_path);
    snprintf(option, sizeof(option), "base=%s", preset_path);
    server_start(&s, (const char *const[]){"--preset", option, "--api-key-file", key_path,
                                           "--max-presets", "3", NULL});
    struct answer a = put_preset(&s, "two", exported.body.data, exported.body.n, ADMIN);
    expect_preset(&a, "two", 10);

    struct id session = session_with_turns(&s, USER);
    char path[128];
    snprintf(path, sizeof(path), "/v1/sessions/%s/snapshots", session.text);
    a = send_body(&s, "POST", path, strdup("{\"name\":\"kept\"}"), USER);
    expect_code(&a, 200);
    done(&a);
    check_from(&s, &session, "base");
    check_from(&s, &session, "two");
    check_preset_refusals(&s, &session, &exported);
    check_preset_deletion(&s);

    /* From a session of the admin's; it is another state then, in the same place. */
    struct id own = session_with_turns(&s, ADMIN);
    char body[200];
    snprintf(body, sizeof(body), "\"session_id\":\"%s\"", own.text);
    say(&s, COMPLETIONS, body, ADMIN);
    snprintf(body, sizeof(body), " {\"session\":\"%s\"}", own.text);
    a = put_preset(&s, "two", body, strlen(body), ADMIN);
    expect_preset(&a, "two", 19);
    a = send_body(&s, "GET", "/v1/presets/two", NULL, USER);
    expect_preset(&a, "two", 19);
    server_stop(&s);
    reply_free(&exported);
}

/* Without keys nobody is an admin, or everybody. */
static void test_open_admin(void **state)
{
    (void)state;
    struct server s;
    struct reply exported;
    struct id session = session_with_turns(&wide, NULL);
    get_state(&wide, &session, &exported);
    struct answer a = put_preset(&wide, "p", exported.body.data, exported.body.n, NULL);
    expect_refusal(&a, 403, NULL, "--open-admin");
    server_start(&s, (const char *const[]){"--model", wide_model, "--open-admin", NULL});
    a = put_preset(&s, "p", exported.body.data, exported.body.n, NULL);
    expect_preset(&a, "p", 10);
    char origin[128];
    snprintf(origin, sizeof(origin), "\"session_id\":\"%s\"", session.text);
    struct ids one = say(&wide, COMPLETIONS, origin, NULL);
    struct ids two = say(&s, COMPLETIONS, "\"from\":{\"preset\":\"p\"}", NULL);
    assert_same(&one, &two);
    exported.body.data[900] ^= 1;
    a = put_preset(&s, "p", exported.body.data, exported.body.n, NULL);
    expect_refusal(&a, 400, NULL, "checksum");
    reply_free(&exported);
    server_stop(&s);
}

/* ---- quotas ------------------------------------------------------------------------------------
 */

static struct answer one_turn(const struct server *s, const struct id *session, const char *key)
{
    return send_body(
        s, "POST", COMPLETIONS,
        text_of("{\"session_id\":\"%s\",\"prompt\":[7],\"max_tokens\":1}", session->text), key);
}

static struct id session_of(const struct server *s, const char *key)
{
    struct id id;
    struct answer a = send_body(s, "POST", "/v1/sessions", strdup("{}"), key);
    expect_code(&a, 200);
    snprintf(id.text, sizeof(id.text), "%s", text_member(a.json, "id"));
    done(&a);
    return id;
}

/* A key may have two sessions, and two states of over a megabyte: one session's before and after
 * its last turn. Also after a restart. */
static void check_quotas(const struct server *s, const struct id *first, const struct id *second)
{
    struct answer a = send_body(s, "POST", "/v1/sessions", strdup("{}"), USER);
    expect_refusal(&a, 429, NULL, "--max-sessions-per-key");
    a = one_turn(s, second, USER);
    expect_refusal(&a, 429, NULL, "--max-stored-mb-per-key");
    a = one_turn(s, first, USER); /* another pair in place of the one before */
    expect_code(&a, 200);
    done(&a);
    struct id other = session_of(s, OTHER); /* another key's quota is its own */
    a = one_turn(s, &other, OTHER);
    expect_code(&a, 200);
    done(&a);
}

static void delete_session(const struct server *s, const struct id *id, const char *key)
{
    char path[128];
    snprintf(path, sizeof(path), "/v1/sessions/%s", id->text);
    struct answer a = send_body(s, "DELETE", path, NULL, key);
    expect_code(&a, 200);
    done(&a);
}

static void test_quotas(void **state)
{
    (void)state;
    static const char keys[] = "user-key-1\nother-key-2\n";
    char key_path[200], store[200];
    struct server s;
    write_file(&tiny, "quota-keys", keys, sizeof(keys) - 1, key_path);
    snprintf(store, sizeof(store), "%s.store", tiny.dir);
    const char *const args[] = {"--model",
                                wide_model,
                                "--api-key-file",
                                key_path,
                                "--max-sessions-per-key",
                                "2",
                                "--max-stored-mb-per-key",
                                "4",
                                "--store",
                                store,
                                NULL};
    server_start(&s, args);
    struct id first = session_of(&s, USER), second = session_of(&s, USER);
    for (int i = 0; i < 3; i++) {
        struct answer a = one_turn(&s, &first, USER);
        expect_code(&a, 200);
        done(&a);
    }
    check_quotas(&s, &first, &second);
    server_stop(&s);
    server_start(&s, args);
    check_quotas(&s, &first, &second);
    delete_session(&s, &first, USER);
    struct answer a = one_turn(&s, &second, USER);
    expect_code(&a, 200);
    done(&a);
    session_of(&s, USER);
    server_stop(&s);
    char command[300];
    snprintf(command, sizeof(command), "rm -rf '%s'", store);
    assert_int_equal(system(command), 0);
}

/* A preset that does not fit is named, and nothing is served. */
static void test_presets_at_start(void **state)
{
    (void)state;
    struct reply exported;
    struct id session = session_with_turns(&tiny, NULL);
    char good[200], bad[200], options[6][500];
    get_state(&tiny, &session, &exported);
    write_file(&tiny, "good", exported.body.data, exported.body.n, good);
    exported.body.data[900] ^= 1;
    write_file(&tiny, "bad", exported.body.data, exported.body.n, bad);
    reply_free(&exported);
    snprintf(options[0], sizeof(options[0]), "a=%s/none", tiny.dir);
    snprintf(options[1], sizeof(options[1]), "a=%s,b=%s", good, bad);
    snprintf(options[2], sizeof(options[2]), "a=%s,a=%s", good, good);
    snprintf(options[3], sizeof(options[3]), "a b=%s", good);
    snprintf(options[4], sizeof(options[4]), "%s", good);
    snprintf(options[5], sizeof(options[5]), "a=%s", tiny.dir);
    static const char *const words[] = {"--preset a=", "checksum of the state",
                                        "given twice", "letters",
                                        "NAME=FILE",   "--preset a="};
    for (int i = 0; i < 6; i++) {
        struct bytes output = {0};
        int code = server_run((const char *const[]){"--model", tiny.model, "--port", "0",
                                                    "--preset", options[i], NULL},
                              &output);
        if (code != 1 || !strstr(output.data, words[i]) || !strstr(output.data, "--preset"))
            fail_msg("exit code %d, expected '%s' in: %s", code, words[i], output.data);
        bytes_free(&output);
    }
}

int main(int argc, char **argv)
{
    if (argc > 1)
        cmocka_set_test_filter(argv[1]);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_turns_equal_a_session),
        cmocka_unit_test(test_chat_equals_a_session),
        cmocka_unit_test(test_stop_string),
        cmocka_unit_test(test_session_and_state),
        cmocka_unit_test(test_many_choices),
        cmocka_unit_test(test_bad_states),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_nothing_is_kept),
        cmocka_unit_test(test_body_limits),
        cmocka_unit_test(test_hang_up),
        cmocka_unit_test(test_import_limits),
        cmocka_unit_test(test_memory),
        cmocka_unit_test(test_presets),
        cmocka_unit_test(test_open_admin),
        cmocka_unit_test(test_quotas),
        cmocka_unit_test(test_presets_at_start),
    };
    return cmocka_run_group_tests(tests, start_servers, stop_servers);
}
