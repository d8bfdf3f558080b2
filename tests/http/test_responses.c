/* test_responses.c - the Responses API over HTTP. Two oracles: a session that takes the same turns
 * as chats, token for token, and what a stream sent when it was live. */
#include "tests/http/harness.h"

#include <cjson/cJSON.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define RESPONSES "/v1/responses"
#define CHAT "/v1/chat/completions"

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
    cJSON *json;
};

/* Frees path and body. */
static struct answer ask(const struct server *s, const char *method, char *path, char *body,
                         const char *header)
{
    const char *const headers[] = {header, NULL};
    struct client_request request = {
        .method = method, .path = path, .body = body, .headers = header ? headers : NULL};
    struct reply reply;
    client_send(s, &request, &reply);
    struct answer a = {reply.code, cJSON_ParseWithLength(reply.body.data, reply.body.n)};
    if (!a.json)
        fail_msg("%s %s: %d %s", method, path, reply.code, reply.body.n ? reply.body.data : "");
    reply_free(&reply);
    free(path);
    free(body);
    return a;
}

#define post(path, ...) ask(&server, "POST", strdup(path), text_of(__VA_ARGS__), NULL)
#define get(...) ask(&server, "GET", text_of(__VA_ARGS__), NULL, NULL)

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

/* "output.0.content.0.text": fails when it is not there. */
static const cJSON *at(const cJSON *v, const char *path)
{
    const cJSON *found = v;
    char name[64];
    for (const char *p = path; *p && found; p += strcspn(p, ".") + (p[strcspn(p, ".")] == '.')) {
        snprintf(name, sizeof(name), "%.*s", (int)strcspn(p, "."), p);
        found = cJSON_IsArray(found) ? cJSON_GetArrayItem(found, atoi(name))
                                     : cJSON_GetObjectItemCaseSensitive(found, name);
    }
    if (!found)
        fail_msg("no %s in %s", path, cJSON_PrintUnformatted(v));
    return found;
}

static const char *text_at(const cJSON *v, const char *path)
{
    const cJSON *found = at(v, path);
    if (!cJSON_IsString(found))
        fail_msg("%s is no string in %s", path, cJSON_PrintUnformatted(v));
    return found->valuestring;
}

static int number_at(const cJSON *v, const char *path)
{
    return at(v, path)->valueint;
}

static void expect_error(struct answer *a, int code, const char *param, const char *error_code)
{
    expect_code(a, code);
    if (param)
        assert_string_equal(text_at(a->json, "error.param"), param);
    if (error_code)
        assert_string_equal(text_at(a->json, "error.code"), error_code);
    done(a);
}

struct id {
    char text[64];
};

static struct id id_of(const cJSON *object)
{
    struct id id;
    snprintf(id.text, sizeof(id.text), "%s", text_at(object, "id"));
    return id;
}

static void assert_same(const cJSON *a, const cJSON *b)
{
    if (!cJSON_Compare(a, b, true))
        fail_msg("differ: %s and %s", cJSON_PrintUnformatted(a), cJSON_PrintUnformatted(b));
}

/* A short response to "one", on which others build. */
static struct id begin_chain(const char *more)
{
    struct answer a =
        post(RESPONSES, "{\"input\":\"one\",\"max_output_tokens\":4,\"seed\":1%s}", more);
    expect_code(&a, 200);
    struct id id = id_of(a.json);
    done(&a);
    return id;
}

/* The ids that a response to "more" has after another one. */
static cJSON *ids_after(const struct id *previous, const char *settings)
{
    struct answer a =
        post(RESPONSES,
             "{\"input\":\"more\",\"previous_response_id\":\"%s\",\"ignore_eos\":true,"
             "\"max_output_tokens\":12,\"return_token_ids\":true%s}",
             previous->text, settings);
    expect_code(&a, 200);
    cJSON *ids = cJSON_Duplicate(at(a.json, "token_ids"), true);
    assert_int_equal(cJSON_GetArraySize(ids), 12);
    done(&a);
    return ids;
}

/* ---- chains ---------------------------------------------------------------------------------- */

/* A chain of responses and a session that takes the same turns: the same tokens go in and come
 * out. The i-th turn ends in the i-th of these ways. */
static void check_chain(const char *sampling)
{
    static const char *const ends[] = {"", ",\"logit_bias\":{\"2\":100}", ",\"stop\":[\"e\"]",
                                       ",\"ignore_eos\":true", ""};
    struct answer s = post("/v1/sessions", "{}");
    struct id session = id_of(s.json), previous = {""};
    int position = 0;
    done(&s);
    for (int i = 0; i < 5; i++) {
        char *link = *previous.text ? text_of(",\"previous_response_id\":\"%s\"", previous.text)
                                    : strdup(",\"instructions\":\"be kind\"");
        struct answer a = post(RESPONSES,
                               "{\"input\":[{\"role\":\"user\",\"content\":\"turn %d\"}],"
                               "\"max_output_tokens\":9,\"return_token_ids\":true%s%s%s}",
                               i, link, sampling, ends[i]);
        struct answer b = post(CHAT,
                               "{\"messages\":[%s{\"role\":\"user\",\"content\":\"turn %d\"}],"
                               "\"max_completion_tokens\":9,\"return_token_ids\":true,"
                               "\"session_id\":\"%s\"%s%s}",
                               i ? "" : "{\"role\":\"system\",\"content\":\"be kind\"},", i,
                               session.text, sampling, ends[i]);
        expect_code(&a, 200);
        expect_code(&b, 200);
        assert_same(at(a.json, "prompt_token_ids"), at(b.json, "prompt_token_ids"));
        assert_same(at(a.json, "token_ids"), at(b.json, "choices.0.token_ids"));
        assert_string_equal(text_at(a.json, "output.0.content.0.text"),
                            text_at(b.json, "choices.0.message.content"));
        bool cut = !strcmp(text_at(b.json, "choices.0.finish_reason"), "length");
        assert_string_equal(text_at(a.json, "status"), cut ? "incomplete" : "completed");
        /* What the chain has seen is what the session has. */
        assert_int_equal(number_at(a.json, "usage.input_tokens_details.cached_tokens"), position);
        assert_int_equal(number_at(a.json, "usage.input_tokens"),
                         position + number_at(b.json, "usage.prompt_tokens"));
        position = number_at(b.json, "session.position");
        previous = id_of(a.json);
        done(&a);
        done(&b);
        free(link);
    }
}

static void test_a_chain_is_a_session(void **state)
{
    (void)state;
    check_chain(",\"temperature\":0");
    check_chain(",\"temperature\":1,\"seed\":11");
}

/* Any number of responses go on from one, each its own way, and it stays what it is. */
static void test_branches(void **state)
{
    (void)state;
    struct id root = begin_chain("");
    cJSON *first = ids_after(&root, ",\"seed\":5"), *other = ids_after(&root, ",\"seed\":6"),
          *again = ids_after(&root, ",\"seed\":5");
    assert_same(first, again);
    assert_false(cJSON_Compare(first, other, true));
    cJSON_Delete(first);
    cJSON_Delete(other);
    cJSON_Delete(again);

    /* A branch lives on when what it came from is deleted. */
    struct answer a = post(RESPONSES,
                           "{\"input\":\"x\",\"previous_response_id\":\"%s\",\"seed\":2,"
                           "\"max_output_tokens\":3}",
                           root.text);
    struct answer b = post(RESPONSES,
                           "{\"input\":\"x\",\"previous_response_id\":\"%s\",\"seed\":2,"
                           "\"max_output_tokens\":3}",
                           root.text);
    struct id one = id_of(a.json), two = id_of(b.json);
    done(&a);
    done(&b);
    first = ids_after(&one, ",\"seed\":5");
    a = ask(&server, "DELETE", text_of("%s/%s", RESPONSES, root.text), NULL, NULL);
    expect_code(&a, 200);
    done(&a);
    other = ids_after(&two, ",\"seed\":5");
    assert_same(first, other);
    cJSON_Delete(first);
    cJSON_Delete(other);
}

static void test_instructions(void **state)
{
    (void)state;
    struct id with = begin_chain(",\"instructions\":\"be kind\""), without = begin_chain("");
    /* Given again or left out: they are not read twice. */
    cJSON *first = ids_after(&with, ",\"seed\":5"),
          *second = ids_after(&with, ",\"seed\":5,\"instructions\":\"be kind\"");
    assert_same(first, second);
    cJSON_Delete(first);
    cJSON_Delete(second);
    struct answer a = post(RESPONSES,
                           "{\"input\":\"x\",\"previous_response_id\":\"%s\","
                           "\"instructions\":\"be rude\"}",
                           with.text);
    expect_error(&a, 400, "instructions", "unsupported_value");
    a = post(RESPONSES,
             "{\"input\":\"x\",\"previous_response_id\":\"%s\",\"instructions\":\"be kind\"}",
             without.text);
    expect_error(&a, 400, "instructions", "unsupported_value");
    /* The chain keeps them past a link that left them out. */
    a = post(RESPONSES, "{\"input\":\"x\",\"previous_response_id\":\"%s\",\"max_output_tokens\":2}",
             with.text);
    expect_code(&a, 200);
    assert_true(cJSON_IsNull(at(a.json, "instructions")));
    struct id link = id_of(a.json);
    done(&a);
    a = post(RESPONSES,
             "{\"input\":\"x\",\"previous_response_id\":\"%s\",\"max_output_tokens\":2,"
             "\"instructions\":\"be kind\"}",
             link.text);
    expect_code(&a, 200);
    done(&a);
    a = post(RESPONSES,
             "{\"input\":\"x\",\"previous_response_id\":\"%s\",\"instructions\":\"be rude\"}",
             link.text);
    expect_error(&a, 400, "instructions", NULL);
}

/* ---- streams --------------------------------------------------------------------------------- */

/* The events of a stream, in order: their JSON. Checks how each is framed. */
struct events {
    int n;
    cJSON *list[600];
};

static void read_events(const struct bytes *body, int first, struct events *out)
{
    out->n = 0;
    for (const char *p = body->n ? body->data : ""; *p;) {
        char type[64];
        int length = 0;
        const char *end = strstr(p, "\n\n");
        if (*p == ':') { /* a comment, to keep the connection alive */
            p = strchr(p, '\n') + 1;
            p += *p == '\n';
            continue;
        }
        if (!end || sscanf(p, "event: %63s\ndata: %n", type, &length) != 1 || !length)
            fail_msg("no event: %s", p);
        cJSON *v = cJSON_ParseWithLength(p + length, (size_t)(end - p) - (size_t)length);
        if (!v)
            fail_msg("no JSON: %s", p);
        assert_string_equal(text_at(v, "type"), type);
        assert_int_equal(number_at(v, "sequence_number"), first + out->n);
        assert_true(out->n < (int)COUNT_OF(out->list));
        out->list[out->n++] = v;
        p = end + 2;
    }
}

static void free_events(struct events *e)
{
    while (e->n)
        cJSON_Delete(e->list[--e->n]);
}

static void post_stream(char *body, struct reply *reply)
{
    client_post(&server, RESPONSES, body, reply);
    free(body);
    assert_int_equal(reply->code, 200);
}

/* What the i-th event must be, of n. */
static const char *expected_type(int i, int n, const char *last)
{
    static const char *const firsts[] = {"response.created", "response.in_progress",
                                         "response.output_item.added",
                                         "response.content_part.added"},
                             *const lasts[] = {"response.output_text.done",
                                               "response.content_part.done",
                                               "response.output_item.done"};
    if (i < 4)
        return firsts[i];
    return i == n - 1 ? last : i >= n - 4 ? lasts[i - (n - 4)] : "response.output_text.delta";
}

/* The members that two responses to one request may differ in. */
static cJSON *without_identity(const cJSON *response)
{
    static const char *const names[] = {"id", "created_at", "completed_at"};
    cJSON *copy = cJSON_Duplicate(response, true);
    for (size_t i = 0; i < COUNT_OF(names); i++)
        cJSON_DeleteItemFromObject(copy, names[i]);
    cJSON *item = cJSON_GetArrayItem(cJSON_GetObjectItem(copy, "output"), 0);
    cJSON_DeleteItemFromObject(item, "id");
    return copy;
}

static void check_events(const char *settings, const char *status)
{
    char last[40];
    struct reply reply;
    struct events e;
    struct answer whole = post(RESPONSES, "{\"input\":\"tell\"%s}", settings);
    expect_code(&whole, 200);
    assert_string_equal(text_at(whole.json, "status"), status);
    post_stream(text_of("{\"input\":\"tell\",\"stream\":true%s}", settings), &reply);
    assert_null(strstr(reply.body.data, "[DONE]"));
    read_events(&reply.body, 0, &e);
    snprintf(last, sizeof(last), "response.%s", status);
    struct bytes text = {0};
    int n_logprobs = 0;
    for (int i = 0; i < e.n; i++) {
        assert_string_equal(text_at(e.list[i], "type"), expected_type(i, e.n, last));
        if (i >= 4 && i < e.n - 4) {
            bytes_text(&text, text_at(e.list[i], "delta"));
            n_logprobs += cJSON_GetArraySize(at(e.list[i], "logprobs"));
        }
    }
    const cJSON *created = at(e.list[0], "response"), *end = at(e.list[e.n - 1], "response"),
                *item = at(end, "output.0"), *part = at(item, "content.0");
    assert_same(created, at(e.list[1], "response"));
    assert_string_equal(text_at(created, "status"), "in_progress");
    assert_int_equal(cJSON_GetArraySize(at(created, "output")), 0);
    assert_string_equal(text_at(created, "id"), text_at(end, "id"));
    assert_string_equal(text_at(e.list[2], "item.id"), text_at(item, "id"));
    assert_string_equal(text_at(part, "text"), text.n ? text.data : "");
    assert_same(at(part, "text"), at(e.list[e.n - 4], "text"));
    assert_same(part, at(e.list[e.n - 3], "part"));
    assert_same(item, at(e.list[e.n - 2], "item"));
    assert_int_equal(cJSON_GetArraySize(at(part, "logprobs")), n_logprobs);
    /* A whole reply is what a stream ends with. */
    cJSON *a = without_identity(whole.json), *b = without_identity(end);
    assert_same(a, b);
    cJSON_Delete(a);
    cJSON_Delete(b);
    bytes_free(&text);
    free_events(&e);
    reply_free(&reply);
    done(&whole);
}

static void test_events(void **state)
{
    (void)state;
    check_events(",\"max_output_tokens\":30,\"seed\":3,\"ignore_eos\":true,"
                 "\"return_token_ids\":true,\"include\":[\"message.output_text.logprobs\"],"
                 "\"top_logprobs\":2",
                 "incomplete");
    check_events(",\"max_output_tokens\":500,\"seed\":3,\"stop\":[\"e\",\"a\"],\"min_tokens\":5",
                 "completed");
    /* One that says nothing. */
    check_events(",\"max_output_tokens\":1,\"temperature\":0,\"logit_bias\":{\"2\":100},"
                 "\"stop_token_ids\":[2]",
                 "completed");
}

/* A stored response tells its events again: after each number what the stream sent after it. */
static void test_replay(void **state)
{
    (void)state;
    struct reply live, again;
    struct events e;
    post_stream(strdup("{\"input\":\"tell\",\"stream\":true,\"max_output_tokens\":20,\"seed\":4,"
                       "\"ignore_eos\":true,\"include\":[\"message.output_text.logprobs\"]}"),
                &live);
    read_events(&live.body, 0, &e);
    struct id id = id_of(at(e.list[0], "response"));
    const char *rest = live.body.data;
    for (int after = -1; after < e.n + 1; after++) {
        char path[160];
        snprintf(path, sizeof(path), "%s/%s?stream=true", RESPONSES, id.text);
        if (after >= 0)
            snprintf(path + strlen(path), 40, "&starting_after=%d", after);
        client_get(&server, path, &again);
        assert_int_equal(again.code, 200);
        assert_string_equal(again.body.n ? again.body.data : "", rest);
        reply_free(&again);
        if (*rest)
            rest = strstr(rest, "\n\n") + 2;
    }
    struct answer a = get("%s/%s", RESPONSES, id.text);
    expect_code(&a, 200);
    assert_same(a.json, at(e.list[e.n - 1], "response"));
    done(&a);
    free_events(&e);
    reply_free(&live);

    /* One that was asked for as a whole has events as well. */
    a = post(RESPONSES, "{\"input\":\"tell\",\"max_output_tokens\":20,\"seed\":4}");
    id = id_of(a.json);
    char path[160];
    snprintf(path, sizeof(path), "%s/%s?stream=true", RESPONSES, id.text);
    client_get(&server, path, &again);
    read_events(&again.body, 0, &e);
    assert_true(e.n > 8);
    assert_same(a.json, at(e.list[e.n - 1], "response"));
    free_events(&e);
    reply_free(&again);
    done(&a);

    static const char *const wrong[][2] = {{"starting_after=1", "starting_after"},
                                           {"stream=true&starting_after=x", "starting_after"},
                                           {"stream=yes", "stream"},
                                           {"include_obfuscation=true", "include_obfuscation"}};
    for (size_t i = 0; i < COUNT_OF(wrong); i++) {
        a = get("%s/%s?%s", RESPONSES, id.text, wrong[i][0]);
        expect_error(&a, 400, wrong[i][1], NULL);
    }
}

/* In the middle of a stream: the response is there, it can be followed to its end, and only then
 * can others continue it. */
struct follower {
    struct id id;
    struct reply reply;
};

static bool follow(void *context, const char *data, size_t n)
{
    struct follower *f = context;
    if (*f->id.text)
        return true;
    char *piece = strndup(data, n), *found = strstr(piece, "resp_");
    assert_non_null(found);
    snprintf(f->id.text, sizeof(f->id.text), "%.37s", found);
    free(piece);
    struct answer a = get("%s/%s", RESPONSES, f->id.text);
    expect_code(&a, 200);
    assert_string_equal(text_at(a.json, "status"), "in_progress");
    assert_true(cJSON_IsNull(at(a.json, "usage")));
    done(&a);
    a = post(RESPONSES, "{\"input\":\"x\",\"previous_response_id\":\"%s\"}", f->id.text);
    expect_error(&a, 409, "previous_response_id", NULL);
    char path[160];
    snprintf(path, sizeof(path), "%s/%s?stream=true", RESPONSES, f->id.text);
    client_get(&server, path, &f->reply);
    return true;
}

static void test_follow_a_running_one(void **state)
{
    (void)state;
    struct follower f = {0};
    struct reply reply;
    struct client_request request = {
        .path = RESPONSES,
        .body = "{\"input\":\"tell\",\"stream\":true,\"max_output_tokens\":500,\"seed\":4,"
                "\"ignore_eos\":true}",
        .on_data = follow,
        .context = &f};
    client_send(&server, &request, &reply);
    assert_int_equal(f.reply.code, 200);
    struct events e;
    read_events(&f.reply.body, 0, &e);
    assert_string_equal(text_at(e.list[e.n - 1], "type"), "response.incomplete");
    struct bytes text = {0};
    for (int i = 4; i < e.n - 4; i++)
        bytes_text(&text, text_at(e.list[i], "delta"));
    assert_string_equal(text.data, text_at(e.list[e.n - 1], "response.output.0.content.0.text"));
    free_events(&e);
    bytes_free(&text);
    reply_free(&f.reply);
    reply_free(&reply);
    struct answer a =
        post(RESPONSES, "{\"input\":\"x\",\"previous_response_id\":\"%s\",\"max_output_tokens\":1}",
             f.id.text);
    expect_code(&a, 200);
    done(&a);
}

/* ---- a client that leaves -------------------------------------------------------------------- */

static bool leave(void *context, const char *data, size_t n)
{
    struct id *id = context;
    char *piece = strndup(data, n), *found = strstr(piece, "resp_");
    assert_non_null(found);
    snprintf(id->text, sizeof(id->text), "%.37s", found);
    free(piece);
    return false;
}

/* A response that its client broke off has failed; nothing goes on from it. */
static void test_hang_up(void **state)
{
    (void)state;
    struct id id;
    struct reply reply;
    struct client_request request = {
        .path = RESPONSES,
        .body = "{\"input\":\"tell\",\"stream\":true,\"max_output_tokens\":200000,"
                "\"ignore_eos\":true}",
        .on_data = leave,
        .context = &id};
    client_send(&server, &request, &reply);
    reply_free(&reply);
    bool failed = false;
    for (int i = 0; i < 500 && !failed; i++) {
        struct answer a = get("%s/%s", RESPONSES, id.text);
        expect_code(&a, 200);
        failed = !strcmp(text_at(a.json, "status"), "failed");
        if (failed) {
            assert_string_equal(text_at(a.json, "error.code"), "server_error");
            assert_string_equal(text_at(a.json, "output.0.status"), "incomplete");
        }
        done(&a);
        sleep_ms(10);
    }
    assert_true(failed);
    struct answer a = post(RESPONSES, "{\"input\":\"x\",\"previous_response_id\":\"%s\"}", id.text);
    expect_error(&a, 400, "previous_response_id", "previous_response_not_found");
    char path[160];
    struct events e;
    snprintf(path, sizeof(path), "%s/%s?stream=true", RESPONSES, id.text);
    client_get(&server, path, &reply);
    read_events(&reply.body, 0, &e);
    assert_string_equal(text_at(e.list[e.n - 1], "type"), "response.failed");
    free_events(&e);
    reply_free(&reply);
}

/* ---- the resource ---------------------------------------------------------------------------- */

static void test_object(void **state)
{
    (void)state;
    struct answer a =
        post(RESPONSES, "{\"input\":\"x\",\"max_output_tokens\":3,\"ignore_eos\":true,"
                        "\"temperature\":0.25,\"top_p\":0.5,\"metadata\":{\"k\":\"v\\n\"},"
                        "\"user\":\"me\",\"truncation\":\"auto\",\"tools\":[],"
                        "\"tool_choice\":\"none\",\"parallel_tool_calls\":false,"
                        "\"text\":{\"format\":{\"type\":\"text\"},\"verbosity\":\"low\"},"
                        "\"reasoning\":{\"effort\":null},\"background\":false,"
                        "\"instructions\":\"say \\\"yes\\\"\"}");
    expect_code(&a, 200);
    cJSON *expected = cJSON_Parse(
        "{\"object\":\"response\",\"status\":\"incomplete\",\"completed_at\":null,"
        "\"background\":false,\"error\":null,"
        "\"incomplete_details\":{\"reason\":\"max_output_tokens\"},"
        "\"temperature\":0.25,\"top_p\":0.5,\"metadata\":{\"k\":\"v\\n\"},\"user\":\"me\","
        "\"truncation\":\"auto\",\"tools\":[],\"tool_choice\":\"none\","
        "\"parallel_tool_calls\":false,"
        "\"text\":{\"format\":{\"type\":\"text\"},\"verbosity\":\"low\"},"
        "\"reasoning\":{\"effort\":null,\"summary\":null},\"store\":true,"
        "\"previous_response_id\":null,\"max_output_tokens\":3,"
        "\"instructions\":\"say \\\"yes\\\"\"}");
    const cJSON *item;
    cJSON_ArrayForEach(item, expected) assert_same(at(a.json, item->string), item);
    cJSON_Delete(expected);
    struct answer b = get("%s/%s", RESPONSES, text_at(a.json, "id"));
    expect_code(&b, 200);
    assert_same(a.json, b.json);
    done(&a);
    done(&b);
}

static void test_delete_and_store(void **state)
{
    (void)state;
    struct id id = begin_chain("");
    struct answer a = ask(&server, "DELETE", text_of("%s/%s", RESPONSES, id.text), NULL, NULL);
    expect_code(&a, 200);
    assert_string_equal(text_at(a.json, "id"), id.text);
    assert_string_equal(text_at(a.json, "object"), "response");
    assert_true(cJSON_IsTrue(at(a.json, "deleted")));
    done(&a);
    struct id kept = begin_chain(""), unstored = begin_chain(",\"store\":false");
    const struct id *gone[] = {&id, &unstored};
    for (int i = 0; i < 2; i++) {
        a = get("%s/%s", RESPONSES, gone[i]->text);
        expect_error(&a, 404, NULL, NULL);
        a = get("%s/%s/input_items", RESPONSES, gone[i]->text);
        expect_error(&a, 404, NULL, NULL);
        a = ask(&server, "DELETE", text_of("%s/%s", RESPONSES, gone[i]->text), NULL, NULL);
        expect_error(&a, 404, NULL, NULL);
        a = post(RESPONSES, "{\"input\":\"x\",\"previous_response_id\":\"%s\"}", gone[i]->text);
        expect_error(&a, 400, "previous_response_id", "previous_response_not_found");
    }
    /* What is not stored can still go on from what is. */
    cJSON *first = ids_after(&kept, ",\"seed\":5"),
          *second = ids_after(&kept, ",\"seed\":5,\"store\":false");
    assert_same(first, second);
    cJSON_Delete(first);
    cJSON_Delete(second);
}

/* One page: its texts, joined, are as expected. Returns the last id. */
static struct id check_page(const struct id *id, const char *query, const char *texts, bool more)
{
    struct answer a = get("%s/%s/input_items%s", RESPONSES, id->text, query);
    struct bytes found = {0};
    expect_code(&a, 200);
    const cJSON *item, *data = at(a.json, "data");
    cJSON_ArrayForEach(item, data) bytes_text(&found, text_at(item, "content.0.text"));
    assert_string_equal(found.n ? found.data : "", texts);
    assert_int_equal(cJSON_IsTrue(at(a.json, "has_more")), more);
    struct id last = {""};
    if (found.n) {
        last = id_of(cJSON_GetArrayItem(data, cJSON_GetArraySize(data) - 1));
        assert_string_equal(text_at(a.json, "last_id"), last.text);
        assert_string_equal(text_at(a.json, "first_id"), text_at(data, "0.id"));
    }
    bytes_free(&found);
    done(&a);
    return last;
}

static void test_input_items(void **state)
{
    (void)state;
    struct answer a =
        post(RESPONSES,
             "{\"max_output_tokens\":1,\"input\":[{\"role\":\"developer\",\"content\":\"a\"},"
             "{\"role\":\"user\",\"content\":[{\"type\":\"input_text\",\"text\":\"b\"},"
             "{\"type\":\"input_text\",\"text\":\"\\u00e9\\n\\\"\"}]},"
             "{\"type\":\"message\",\"id\":\"msg_1\",\"status\":\"completed\","
             "\"role\":\"assistant\",\"content\":[{\"type\":\"output_text\",\"text\":\"c\","
             "\"annotations\":[]}]},"
             "{\"role\":\"assistant\",\"content\":\"d\"},{\"role\":\"user\",\"content\":\"e\"}]}");
    expect_code(&a, 200);
    struct id id = id_of(a.json);
    done(&a);
    check_page(&id, "", "edcba", false);
    check_page(&id, "?order=asc", "abcde", false);
    for (int ascending = 0; ascending < 2; ascending++) {
        static const char *const pages[2][3] = {{"ed", "cb", "a"}, {"ab", "cd", "e"}};
        struct id after = {""};
        for (int i = 0; i < 3; i++) {
            char query[120];
            snprintf(query, sizeof(query), "?limit=2&order=%s%s%s", ascending ? "asc" : "desc",
                     i ? "&after=" : "", after.text);
            after = check_page(&id, query, pages[ascending][i], i < 2);
        }
        char query[120];
        snprintf(query, sizeof(query), "?order=%s&after=%s", ascending ? "asc" : "desc",
                 after.text);
        check_page(&id, query, "", false);
    }
    a = get("%s/%s/input_items?order=asc&limit=3", RESPONSES, id.text);
    const cJSON *data = at(a.json, "data");
    assert_string_equal(text_at(data, "0.role"), "developer");
    assert_string_equal(text_at(data, "1.content.1.text"), "\xc3\xa9\n\"");
    assert_string_equal(text_at(data, "1.content.1.type"), "input_text");
    assert_string_equal(text_at(data, "2.content.0.type"), "output_text");
    assert_string_equal(text_at(data, "2.type"), "message");
    done(&a);
    static const char *const wrong[][2] = {
        {"limit=0", "limit"}, {"limit=101", "limit"}, {"limit=x", "limit"}, {"order=up", "order"}};
    for (size_t i = 0; i < COUNT_OF(wrong); i++) {
        a = get("%s/%s/input_items?%s", RESPONSES, id.text, wrong[i][0]);
        expect_error(&a, 400, wrong[i][1], NULL);
    }
    a = get("%s/%s/input_items?after=msg_none", RESPONSES, id.text);
    expect_error(&a, 404, "after", NULL);
}

/* ---- refusals -------------------------------------------------------------------------------- */

static void test_refusals(void **state)
{
    (void)state;
    static const struct {
        const char *body, *param;
    } cases[] = {
        {"{}", "input"},
        {"{\"input\":null}", "input"},
        {"{\"input\":1}", "input"},
        {"{\"input\":[]}", "input"},
        {"{\"input\":[1]}", "input[0]"},
        {"{\"input\":[{\"role\":\"user\"}]}", "input[0].content"},
        {"{\"input\":[{\"content\":\"x\"}]}", "input[0].role"},
        {"{\"input\":[{\"role\":\"tool\",\"content\":\"x\"}]}", "input[0].role"},
        {"{\"input\":[{\"role\":\"user\",\"content\":[]}]}", "input[0].content"},
        {"{\"input\":[{\"role\":\"user\",\"content\":2}]}", "input[0].content"},
        {"{\"input\":[{\"role\":\"user\",\"content\":[{\"type\":\"input_image\"}]}]}",
         "input[0].content[0].type"},
        {"{\"input\":[{\"role\":\"user\",\"content\":[{\"type\":\"output_text\",\"text\":\"x\"}]}]"
         "}",
         "input[0].content[0].type"},
        {"{\"input\":[{\"role\":\"assistant\",\"content\":[{\"type\":\"input_text\","
         "\"text\":\"x\"}]}]}",
         "input[0].content[0].type"},
        {"{\"input\":[{\"role\":\"user\",\"content\":[{\"type\":\"input_text\"}]}]}",
         "input[0].content[0].text"},
        {"{\"input\":[{\"role\":\"user\",\"content\":\"x\"},{\"type\":\"function_call_output\","
         "\"call_id\":\"c\",\"output\":\"o\"}]}",
         "input[1].type"},
        {"{\"input\":[{\"type\":\"item_reference\",\"id\":\"msg_1\"}]}", "input[0].type"},
        {"{\"input\":[{\"type\":\"reasoning\",\"summary\":[]}]}", "input[0].type"},
        {"{\"input\":\"x\",\"instructions\":[]}", "instructions"},
        {"{\"input\":\"x\",\"previous_response_id\":7}", "previous_response_id"},
        {"{\"input\":\"x\",\"previous_response_id\":\"resp_0\"}", "previous_response_id"},
        {"{\"input\":\"x\",\"previous_response_id\":\"\"}", "previous_response_id"},
        {"{\"input\":\"x\",\"store\":\"no\"}", "store"},
        {"{\"input\":\"x\",\"temperature\":3}", "temperature"},
        {"{\"input\":\"x\",\"top_p\":2}", "top_p"},
        {"{\"input\":\"x\",\"max_output_tokens\":0}", "max_output_tokens"},
        {"{\"input\":\"x\",\"top_logprobs\":21}", "top_logprobs"},
        {"{\"input\":\"x\",\"include\":[\"everything\"]}", "include[0]"},
        {"{\"input\":\"x\",\"metadata\":{\"a\":1}}", "metadata.a"},
        {"{\"input\":\"x\",\"metadata\":[]}", "metadata"},
        {"{\"input\":\"x\",\"truncation\":\"some\"}", "truncation"},
        {"{\"input\":\"x\",\"text\":{\"format\":{\"type\":\"json_schema\"}}}", "text.format.type"},
        {"{\"input\":\"x\",\"text\":{\"verbosity\":\"none\"}}", "text.verbosity"},
        {"{\"input\":\"x\",\"tools\":[{\"type\":\"web_search\"}]}", "tools"},
        {"{\"input\":\"x\",\"tool_choice\":\"required\"}", "tool_choice"},
        {"{\"input\":\"x\",\"reasoning\":{\"effort\":\"high\"}}", "reasoning.effort"},
        {"{\"input\":\"x\",\"reasoning\":{\"summary\":\"auto\"}}", "reasoning.summary"},
        {"{\"input\":\"x\",\"background\":true}", "background"},
        {"{\"input\":\"x\",\"conversation\":\"conv_1\"}", "conversation"},
        {"{\"input\":\"x\",\"prompt\":{\"id\":\"p\"}}", "prompt"},
        {"{\"input\":\"x\",\"stream_options\":{}}", "stream_options"},
        {"{\"input\":\"x\",\"stream\":true,\"stream_options\":{\"include_obfuscation\":true}}",
         "stream_options.include_obfuscation"},
        {"{\"input\":\"x\",\"top_k\":-2}", "top_k"},
        {"{\"input\":\"x\",\"stop\":[\"\"]}", "stop[0]"},
    };
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        struct answer a = post(RESPONSES, "%s", cases[i].body);
        if (a.code != 400)
            fail_msg("%s: %d", cases[i].body, a.code);
        expect_error(&a, 400, cases[i].param, NULL);
    }
    struct answer a = post(RESPONSES, "{\"input\":\"x\",\"model\":\"other\"}");
    expect_error(&a, 404, "model", "model_not_found");
    struct reply reply;
    client_post(&server, "/v1/responses/resp_0/cancel", "{}", &reply);
    assert_int_equal(reply.code, 404);
    reply_free(&reply);
}

/* ---- owners and limits ----------------------------------------------------------------------- */

static struct answer make(const struct server *s, const char *key)
{
    struct answer a =
        ask(s, "POST", strdup(RESPONSES), strdup("{\"input\":\"x\",\"max_output_tokens\":1}"), key);
    expect_code(&a, 200);
    return a;
}

static bool is_there(const struct server *s, const struct answer *response, const char *key)
{
    struct answer a =
        ask(s, "GET", text_of("%s/%s", RESPONSES, text_at(response->json, "id")), NULL, key);
    bool there = a.code == 200;
    if (!there)
        expect_code(&a, 404);
    done(&a);
    return there;
}

/* Another key's response is not there, for anything, and takes no place of one's own. */
static void test_owners_and_limits(void **state)
{
    (void)state;
    char keys[64];
    struct server keyed;
    snprintf(keys, sizeof(keys), "/tmp/latte-keys-%d", (int)getpid());
    FILE *f = fopen(keys, "w");
    assert_non_null(f);
    fputs("first-key-1\nsecond-key-2\n", f);
    fclose(f);
    const char *const args[] = {"--api-key-file", keys, "--max-responses", "2", NULL};
    server_start(&keyed, args);
    const char *first = "Authorization: Bearer first-key-1",
               *second = "Authorization: Bearer second-key-2";
    struct answer mine = make(&keyed, first), theirs = make(&keyed, second);
    const char *id = text_at(mine.json, "id");
    static const struct {
        const char *method, *what;
    } cases[] = {{"GET", ""}, {"GET", "?stream=true"}, {"GET", "/input_items"}, {"DELETE", ""}};
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        struct answer a = ask(&keyed, cases[i].method,
                              text_of("%s/%s%s", RESPONSES, id, cases[i].what), NULL, second);
        expect_error(&a, 404, NULL, NULL);
    }
    struct answer a = ask(&keyed, "POST", strdup(RESPONSES),
                          text_of("{\"input\":\"x\",\"previous_response_id\":\"%s\"}", id), second);
    expect_error(&a, 400, "previous_response_id", "previous_response_not_found");
    assert_true(is_there(&keyed, &mine, first));

    struct answer next = make(&keyed, first);
    assert_true(is_there(&keyed, &mine, first));
    struct answer last = make(&keyed, first); /* one too many: the oldest goes */
    assert_false(is_there(&keyed, &mine, first));
    assert_true(is_there(&keyed, &next, first));
    assert_true(is_there(&keyed, &last, first));
    assert_true(is_there(&keyed, &theirs, second));
    assert_true(server_metric(&keyed, "latte_responses") == 3);
    done(&mine);
    done(&theirs);
    done(&next);
    done(&last);
    server_stop(&keyed);
    remove(keys);
}

/* A chain does not fill the memory for states: old responses go, and its end goes on. */
static void test_memory(void **state)
{
    (void)state;
    struct server small;
    const char *const args[] = {"--host-state-mb", "1", NULL};
    server_start(&small, args);
    struct id previous = {""};
    for (int i = 0; i < 60; i++) {
        char *link = *previous.text ? text_of(",\"previous_response_id\":\"%s\"", previous.text)
                                    : strdup("");
        struct answer a =
            ask(&small, "POST", strdup(RESPONSES),
                text_of("{\"input\":\"%d\",\"max_output_tokens\":1%s}", i, link), NULL);
        expect_code(&a, 200);
        previous = id_of(a.json);
        done(&a);
        free(link);
    }
    double n = server_metric(&small, "latte_responses");
    assert_true(n >= 1 && n < 60);
    assert_true(server_metric(&small, "latte_session_state_bytes") <= 1 << 19);
    server_stop(&small);
}

int main(int argc, char **argv)
{
    if (argc > 1)
        cmocka_set_test_filter(argv[1]);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_chain_is_a_session),
        cmocka_unit_test(test_branches),
        cmocka_unit_test(test_instructions),
        cmocka_unit_test(test_events),
        cmocka_unit_test(test_replay),
        cmocka_unit_test(test_follow_a_running_one),
        cmocka_unit_test(test_hang_up),
        cmocka_unit_test(test_object),
        cmocka_unit_test(test_delete_and_store),
        cmocka_unit_test(test_input_items),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_owners_and_limits),
        cmocka_unit_test(test_memory),
    };
    return cmocka_run_group_tests(tests, start_server, stop_server);
}
