/* test_prefixes.c - prompts that are read once: choices that share one, and requests that begin
 * with what earlier ones began with. The oracle is the same server reading the whole prompt, as it
 * does for each choice when the prompt's scores are asked for. */
#include "tests/http/harness.h"

#include <cjson/cJSON.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tests/unit/model_files.h"

#define COMPLETIONS "/v1/completions"
#define CHAT "/v1/chat/completions"
#define IDS "\"return_token_ids\":true"
#define NINE "\"max_tokens\":9,"
#define LIVELY "\"temperature\":1.5,\"ignore_eos\":true"
/* Long enough to be worth sharing. */
#define STORY                                                                                      \
    "Once upon a time there was a little girl who had a red ball and a small brown dog. Every "    \
    "day they went to the park, and every day the dog ran after the ball until the sun was low. "

static struct server server;
static struct server *at = &server; /* where requests go */

static int start_server(void **state)
{
    (void)state;
    server_start(&server, (const char *const[]){"--prefix-min-tokens", "4", NULL});
    return 0;
}

static int stop_server(void **state)
{
    (void)state;
    server_stop(&server);
    return 0;
}

/* ---- requests -------------------------------------------------------------------------------- */

__attribute__((format(printf, 3, 4))) static cJSON *
post_to(const struct server *s, const char *path, const char *format, ...)
{
    char *body = NULL;
    struct reply reply;
    va_list args;
    va_start(args, format);
    assert_true(vasprintf(&body, format, args) >= 0);
    va_end(args);
    client_post(s, path, body, &reply);
    cJSON *v = cJSON_ParseWithLength(reply.body.data, reply.body.n);
    if (reply.code != 200 || !v)
        fail_msg("%s %s: %d %s", path, body, reply.code, reply.body.data);
    reply_free(&reply);
    free(body);
    return v;
}

#define post(...) post_to(at, __VA_ARGS__)

static const cJSON *member(const cJSON *v, const char *name)
{
    const cJSON *found = cJSON_GetObjectItemCaseSensitive(v, name);
    if (!found)
        fail_msg("no %s in %s", name, cJSON_PrintUnformatted(v));
    return found;
}

static int usage(const cJSON *v, const char *name)
{
    return member(member(v, "usage"), name)->valueint;
}

static int cached(const cJSON *v)
{
    return member(member(member(v, "usage"), "prompt_tokens_details"), "cached_tokens")->valueint;
}

/* Prompt tokens that the model has read so far. */
static int n_read(void)
{
    return (int)server_metric(at, "latte_engine_prompt_tokens_total");
}

static char *printed(const cJSON *v)
{
    char *text = cJSON_PrintUnformatted(v);
    assert_non_null(text);
    return text;
}

/* The prompt that a reply to return_token_ids is about, as JSON; the caller frees it. */
static char *prompt_of(const cJSON *v)
{
    const cJSON *ids = cJSON_GetObjectItemCaseSensitive(v, "prompt_token_ids"); /* chat's */
    return printed(ids ? ids : member(member(v, "choices")->child, "prompt_token_ids"));
}

/* The same choices, token for token. */
static void assert_same_choices(const cJSON *a, const cJSON *b)
{
    const cJSON *choice, *other = member(b, "choices")->child;
    cJSON_ArrayForEach(choice, member(a, "choices"))
    {
        assert_non_null(other);
        if (!cJSON_Compare(member(choice, "token_ids"), member(other, "token_ids"), true))
            fail_msg("%s\nis not\n%s", printed(a), printed(b));
        assert_string_equal(member(choice, "finish_reason")->valuestring,
                            member(other, "finish_reason")->valuestring);
        other = other->next;
    }
    assert_null(other);
    assert_int_equal(usage(a, "completion_tokens"), usage(b, "completion_tokens"));
}

/* The reply is what the server says that reads the whole prompt for each choice. */
static void assert_as_whole(const cJSON *v, const char *settings)
{
    char *prompt = prompt_of(v);
    cJSON *whole = post(COMPLETIONS, "{\"prompt\":%s,\"echo\":true,\"logprobs\":0,%s," IDS "}",
                        prompt, settings);
    assert_int_equal(cached(whole), 0);
    assert_same_choices(v, whole);
    assert_int_equal(usage(v, "prompt_tokens"), usage(whole, "prompt_tokens"));
    cJSON_Delete(whole);
    free(prompt);
}

/* ---- choices --------------------------------------------------------------------------------- */

/* Choices of one prompt give what each gives that reads the prompt itself, and the prompt is read
 * once. */
static void test_choices_share_a_prompt(void **state)
{
    (void)state;
    static const char chat[] = "\"messages\":[{\"role\":\"user\",\"content\":\"" STORY "\"}]";
    static const struct {
        const char *path, *prompt, *settings;
        int n;
    } cases[] = {
        {COMPLETIONS, "\"prompt\":\"1 " STORY "\"", NINE "\"n\":5," LIVELY, 5},
        {COMPLETIONS, "\"prompt\":\"2 " STORY "\"", NINE "\"n\":2,\"best_of\":6," LIVELY, 6},
        {COMPLETIONS, "\"prompt\":\"3 " STORY "\"", NINE "\"n\":3,\"presence_penalty\":1.5," LIVELY,
         3},
        {COMPLETIONS, "\"prompt\":\"4 " STORY "\"",
         NINE "\"n\":4,\"repetition_penalty\":1.6," LIVELY, 4},
        {COMPLETIONS, "\"prompt\":\"5 " STORY "\"", NINE "\"n\":2,\"temperature\":0", 2},
        {COMPLETIONS, "\"prompt\":\"6 " STORY "\"", "\"n\":2,\"max_tokens\":0", 2},
        {CHAT, chat, NINE "\"n\":4," LIVELY, 4},
    };
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        int before = n_read();
        cJSON *v =
            post(cases[i].path, "{%s,\"seed\":3,%s," IDS "}", cases[i].prompt, cases[i].settings);
        assert_int_equal(n_read() - before, usage(v, "prompt_tokens") + cases[i].n - 1);
        char settings[200];
        snprintf(settings, sizeof(settings), "\"seed\":3,%s", cases[i].settings);
        assert_as_whole(v, settings);
        cJSON_Delete(v);
    }
}

/* Several prompts, of which one is too short to be shared. */
static void test_choices_of_prompts(void **state)
{
    (void)state;
    static const char settings[] = "\"seed\":4,\"max_tokens\":5,\"n\":3," LIVELY;
    static const char *const prompts[] = {"One. " STORY, "short", "Two. " STORY};
    int before = n_read(), n_short = 0, n_prompt = 0;
    cJSON *all = post(COMPLETIONS, "{\"prompt\":[\"%s\",\"%s\",\"%s\"],%s," IDS "}", prompts[0],
                      prompts[1], prompts[2], settings);
    int read = n_read() - before;
    for (int i = 0; i < 3; i++) {
        cJSON *one =
            post(COMPLETIONS, "{\"prompt\":\"%s\",\"echo\":true,\"logprobs\":0,%s," IDS "}",
                 prompts[i], settings);
        for (int k = 0; k < 3; k++)
            assert_true(cJSON_Compare(
                member(cJSON_GetArrayItem(member(all, "choices"), 3 * i + k), "token_ids"),
                member(cJSON_GetArrayItem(member(one, "choices"), k), "token_ids"), true));
        n_prompt += usage(one, "prompt_tokens");
        n_short = i == 1 ? usage(one, "prompt_tokens") : n_short;
        cJSON_Delete(one);
    }
    assert_int_equal(usage(all, "prompt_tokens"), n_prompt);
    assert_int_equal(read, n_prompt + 2 * n_short + 2 * 2);
    cJSON_Delete(all);
}

/* Scores of the prompt are the same for all choices. */
static void test_choices_with_scores(void **state)
{
    (void)state;
    cJSON *one = post(COMPLETIONS, "{\"prompt\":\"" STORY "\",\"echo\":true,\"logprobs\":2,"
                                   "\"max_tokens\":3,\"seed\":1," LIVELY "}");
    cJSON *all = post(COMPLETIONS, "{\"prompt\":\"" STORY "\",\"echo\":true,\"logprobs\":2,"
                                   "\"max_tokens\":3,\"seed\":1,\"n\":3," LIVELY "}");
    int n_prompt = usage(one, "prompt_tokens");
    const cJSON *scores =
        member(member(member(one, "choices")->child, "logprobs"), "token_logprobs");
    const cJSON *choice;
    int n = 0;
    cJSON_ArrayForEach(choice, member(all, "choices"))
    {
        const cJSON *found = member(member(choice, "logprobs"), "token_logprobs");
        assert_int_equal(cJSON_GetArraySize(found), n_prompt + 3);
        assert_true(cJSON_IsNull(found->child));
        for (int i = 1; i < n_prompt; i++)
            assert_true(cJSON_GetArrayItem(found, i)->valuedouble ==
                        cJSON_GetArrayItem(scores, i)->valuedouble);
        n++;
    }
    assert_int_equal(n, 3);
    cJSON_Delete(one);
    cJSON_Delete(all);
}

static bool hang_up(void *context, const char *data, size_t n)
{
    (void)context, (void)data, (void)n;
    return false;
}

/* A client that leaves takes all choices along, those too that wait for the first to read. */
static void test_choices_of_a_client_that_leaves(void **state)
{
    (void)state;
    static const char body[] = "{\"prompt\":\"Leave. " STORY "\",\"n\":100,\"max_tokens\":100000,"
                               "\"stream\":true," LIVELY "}";
    struct reply reply;
    client_send(at, &(struct client_request){.path = COMPLETIONS, .body = body, .on_data = hang_up},
                &reply);
    reply_free(&reply);
    assert_true(server_await_metric(at, "latte_requests_running", 0, 20000));
    assert_true(server_await_metric(at, "latte_requests_waiting", 0, 20000));
    cJSON *v = post(COMPLETIONS, "{\"prompt\":\"Still there?\",\"max_tokens\":2}");
    cJSON_Delete(v);
}

/* All choices have a place in the queue from the beginning, or none has. */
static void test_choices_and_a_full_queue(void **state)
{
    (void)state;
    static const char four[] = "{\"prompt\":\"" STORY "\",\"n\":4,\"max_tokens\":2}";
    static const char busy[] = "{\"prompt\":\"" STORY "\",\"max_tokens\":100000,\"stream\":true,"
                               "\"ignore_eos\":true}";
    struct server s;
    struct reply reply;
    int others[2];
    server_start(&s, (const char *const[]){"--max-slots", "1", "--max-queue", "4", NULL});
    cJSON *v = post_to(&s, COMPLETIONS, four);
    assert_int_equal(usage(v, "completion_tokens"), 8); /* with one slot, one after the other */
    cJSON_Delete(v);
    for (int i = 0; i < 2; i++) {
        char request[1000];
        snprintf(request, sizeof(request),
                 "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                 "Content-Length: %zu\r\n\r\n%s",
                 strlen(busy), busy);
        others[i] = raw_connect(&s);
        raw_text(others[i], request);
    }
    assert_true(server_await_metric(&s, "latte_requests_waiting", 1, 20000));
    client_post(&s, COMPLETIONS, four, &reply); /* one place is wanting */
    assert_int_equal(reply.code, 429);
    reply_free(&reply);
    assert_true(server_await_metric(&s, "latte_requests_waiting", 1, 20000));
    for (int i = 0; i < 2; i++)
        close(others[i]);
    assert_true(server_await_metric(&s, "latte_requests_running", 0, 20000));
    v = post_to(&s, COMPLETIONS, four);
    cJSON_Delete(v);
    server_stop(&s);
}

/* ---- prompts that begin as earlier ones ------------------------------------------------------ */

static cJSON *message(const char *role, const char *content)
{
    cJSON *m = cJSON_CreateObject();
    cJSON_AddStringToObject(m, "role", role);
    cJSON_AddStringToObject(m, "content", content);
    return m;
}

static cJSON *chat(const cJSON *messages, const char *settings)
{
    char *text = printed(messages);
    int before = n_read();
    cJSON *v = post(CHAT, "{\"messages\":%s,%s," IDS "}", text, settings);
    assert_int_equal(n_read() - before, usage(v, "prompt_tokens") - cached(v));
    free(text);
    return v;
}

/* Tokens of the conversation before the generation prompt. */
static int messages_end(const cJSON *messages)
{
    char *text = printed(messages);
    cJSON *v = post("/tokenize", "{\"messages\":%s,\"add_generation_prompt\":false}", text);
    int n = member(v, "count")->valueint;
    cJSON_Delete(v);
    free(text);
    return n;
}

/* Tokens that prompt has in common with prompt and output of the reply before. */
static int common_with(const cJSON *prompt, const cJSON *before)
{
    const cJSON *ids = member(before, "prompt_token_ids")->child;
    const cJSON *output = member(member(before, "choices")->child, "token_ids")->child;
    int n = 0;
    for (const cJSON *id = prompt->child; id; id = id->next, n++) {
        if (!ids) {
            ids = output;
            output = NULL;
        }
        if (!ids || ids->valueint != id->valueint)
            break;
        ids = ids->next;
    }
    return n;
}

/* A client that sends all of its conversation every time. Returns how many answers came back as the
 * tokens they were. */
static int converse(const char *settings, int n_turns)
{
    cJSON *messages = cJSON_CreateArray(), *before = NULL;
    int n_same = 0, end = 0;
    cJSON_AddItemToArray(messages, message("system", "You tell stories. " STORY));
    for (int turn = 0; turn < n_turns; turn++) {
        char text[100];
        snprintf(text, sizeof(text), "What did the dog do on day %d?", turn + 1);
        cJSON_AddItemToArray(messages, message("user", text));
        cJSON *v = chat(messages, settings);
        if (before) {
            int n_before = usage(before, "prompt_tokens");
            int n_output = usage(before, "completion_tokens");
            int n_common = common_with(member(v, "prompt_token_ids"), before);
            /* The last token of an answer may not have been fed. */
            bool same = n_common >= n_before + n_output - 1;
            int least = same ? n_before + n_output - 1 : end;
            if (cached(v) < least || cached(v) > n_common)
                fail_msg("turn %d: %d of %d tokens cached, expected %d", turn, cached(v),
                         usage(v, "prompt_tokens"), least);
            n_same += same;
        }
        assert_as_whole(v, settings);
        end = messages_end(messages);
        const cJSON *answer = member(member(v, "choices")->child, "message");
        cJSON_AddItemToArray(messages,
                             message("assistant", member(answer, "content")->valuestring));
        cJSON_Delete(before);
        before = v;
    }
    cJSON_Delete(before);
    cJSON_Delete(messages);
    return n_same;
}

static void test_conversations(void **state)
{
    (void)state;
    double hits = server_metric(at, "latte_prefix_hits_total");
    double tokens = server_metric(at, "latte_prefix_cached_tokens_total");
    converse("\"max_tokens\":9,\"temperature\":0", 5);
    converse("\"max_tokens\":7,\"seed\":3," LIVELY, 4);
    converse("\"max_tokens\":7,\"seed\":3,\"repetition_penalty\":1.5," LIVELY, 4);
    converse("\"max_tokens\":1,\"seed\":3," LIVELY, 3);
    assert_true(server_metric(at, "latte_prefix_hits_total") >= hits + 12);
    assert_true(server_metric(at, "latte_prefix_cached_tokens_total") >= tokens + 12 * 40);
    assert_true(server_metric(at, "latte_prefix_entries") > 0);
    assert_true(server_metric(at, "latte_prefix_bytes") > 0);
}

/* With a real model answers come back as the tokens they were: only what is new is read. */
static void test_conversation_with_bundled_model(void **state)
{
    (void)state;
    struct server bundled;
    server_start(&bundled, (const char *const[]){"--model", "weights/latte-12m", "--threads", "1",
                                                 "--max-slots", "2", NULL});
    at = &bundled;
    assert_true(converse("\"max_tokens\":16,\"temperature\":0", 3) >= 1);
    at = &server;
    server_stop(&bundled);
}

/* Another conversation with the same system prompt does not read that again. */
static void test_shared_system_prompt(void **state)
{
    (void)state;
    static const char settings[] = "\"max_tokens\":3,\"temperature\":0";
    static const char *const questions[] = {"Who are you?", "Where is the ball?", "When?"};
    int n_cached[3];
    for (int i = 0; i < 3; i++) {
        cJSON *messages = cJSON_CreateArray();
        cJSON_AddItemToArray(messages, message("system", "Be brief. " STORY));
        int n_system = messages_end(messages);
        cJSON_AddItemToArray(messages, message("user", questions[i]));
        cJSON *v = chat(messages, settings);
        n_cached[i] = cached(v);
        assert_true(i ? n_cached[i] >= n_system : n_cached[i] == 0);
        assert_as_whole(v, settings);
        cJSON_Delete(v);
        cJSON_Delete(messages);
    }
    assert_int_equal(n_cached[1], n_cached[2]);
}

static void test_completions(void **state)
{
    (void)state;
    static const char settings[] = "\"max_tokens\":6,\"seed\":1," LIVELY;
    static const char *const more[] = {"", "", " And then", " And then the end.", " But"};
    int n[5], n_cached[5];
    for (int i = 0; i < 5; i++) {
        cJSON *v =
            post(COMPLETIONS, "{\"prompt\":\"Again. " STORY "%s\",%s," IDS "}", more[i], settings);
        n[i] = usage(v, "prompt_tokens");
        n_cached[i] = cached(v);
        assert_as_whole(v, settings);
        cJSON_Delete(v);
    }
    assert_int_equal(n_cached[0], 0);
    assert_int_equal(n_cached[1], n[0] - 1); /* the last token gives the first draw */
    assert_int_equal(n_cached[2], n[0] - 1);
    assert_true(n_cached[3] >= n[0] - 1 && n_cached[3] < n[3]);
    assert_int_equal(n_cached[4], n[0] - 1);

    /* Choices begin there as well, and share what is left. */
    int before = n_read();
    cJSON *v =
        post(COMPLETIONS, "{\"prompt\":\"Again. " STORY STORY "\",\"n\":3,%s," IDS "}", settings);
    assert_int_equal(cached(v), n[0] - 1);
    assert_int_equal(n_read() - before, usage(v, "prompt_tokens") - cached(v) + 2);
    assert_as_whole(v, "\"n\":3,\"max_tokens\":6,\"seed\":1," LIVELY);
    cJSON_Delete(v);
}

/* What a stop string cut off is not taken for said: the next prompt has the text before it. */
static void test_stop_string(void **state)
{
    (void)state;
    static const char settings[] = "\"max_tokens\":20,\"seed\":8," LIVELY;
    cJSON *v = post(COMPLETIONS, "{\"prompt\":\"Stop. " STORY "\",%s," IDS "}", settings);
    const char *text = member(member(v, "choices")->child, "text")->valuestring;
    char stop[8] = {0};
    size_t n = strlen(text), from = n / 2;
    while (from + 3 < n &&
           (text[from] < 'a' || text[from] > 'z' || text[from + 1] < 'a' || text[from + 1] > 'z'))
        from++;
    assert_true(from + 3 < n);
    memcpy(stop, text + from, 2);
    for (int i = 0; i < 2; i++) {
        cJSON *cut =
            post(COMPLETIONS, "{\"prompt\":\"Stop. " STORY "\",\"stop\":\"%s\",%s," IDS "}", stop,
                 settings);
        assert_int_equal(cached(cut), usage(cut, "prompt_tokens") - 1);
        char *ids = printed(member(member(cut, "choices")->child, "token_ids"));
        char *prompt = prompt_of(cut);
        prompt[strlen(prompt) - 1] = 0;
        cJSON *next = post(COMPLETIONS, "{\"prompt\":%s,%s,%s," IDS "}", prompt, ids + 1, settings);
        assert_as_whole(next, settings);
        cJSON_Delete(next);
        cJSON_Delete(cut);
        free(prompt);
        free(ids);
    }
    cJSON_Delete(v);
}

static void test_usage_in_streams(void **state)
{
    (void)state;
    static const char body[] =
        "{\"prompt\":\"Streamed. " STORY "\",\"max_tokens\":3,\"stream\":true,"
        "\"stream_options\":{\"include_usage\":true}}";
    for (int i = 0; i < 2; i++) {
        struct reply reply;
        client_post(at, COMPLETIONS, body, &reply);
        assert_int_equal(reply.code, 200);
        bool none = strstr(reply.body.data, "\"cached_tokens\":0,") != NULL;
        assert_true(strstr(reply.body.data, "\"cached_tokens\":") != NULL);
        assert_int_equal(none, i == 0);
        reply_free(&reply);
    }
}

/* ---- where nothing is reused ----------------------------------------------------------------- */

/* What the same request finds when it comes again. */
static int found_again(const struct server *s, const char *request)
{
    int found = 0;
    for (int i = 0; i < 2; i++) {
        cJSON *v = post_to(s, COMPLETIONS, "{%s,\"max_tokens\":4,\"temperature\":0}", request);
        found = cached(v);
        cJSON_Delete(v);
    }
    return found;
}

static void test_nothing_is_kept(void **state)
{
    (void)state;
    struct server s;
    server_start(&s, (const char *const[]){"--prefix-cache-mb", "0", NULL});
    assert_int_equal(found_again(&s, "\"prompt\":\"" STORY "\""), 0);
    server_stop(&s);
    server_start(&s, NULL);
    assert_int_equal(found_again(&s, "\"prompt\":\"Too short to be kept.\""), 0);
    assert_int_equal(found_again(&s, "\"prompt\":\"" STORY "\",\"echo\":true,\"logprobs\":1"), 0);
    assert_true(found_again(&s, "\"prompt\":\"" STORY "\"") > 30);
    assert_int_equal(found_again(&s, "\"prompt\":\"" STORY "\",\"echo\":true,\"logprobs\":1"), 0);
    server_stop(&s);
}

/* Tokens that continue a state are not the beginning of a prompt, whoever has sent the same. */
static void test_states_are_not_beginnings(void **state)
{
    (void)state;
    static const char rest[] = "\"prompt\":\"State. " STORY "\",\"max_tokens\":4,\"temperature\":0";
    assert_true(found_again(at, "\"prompt\":\"State. " STORY "\"") > 0);
    cJSON *first = post(COMPLETIONS, "{%s,\"return_state\":true}", rest);
    assert_int_equal(cached(first), 0);
    const char *kept = member(first, "state")->valuestring;
    int n_prompt = usage(first, "prompt_tokens");
    cJSON *second = post(COMPLETIONS, "{%s,\"state\":\"%s\"," IDS "}", rest, kept);
    assert_int_equal(cached(second), 0);
    int before = n_read();
    cJSON *choices = post(COMPLETIONS, "{%s,\"state\":\"%s\",\"n\":3," IDS "}", rest, kept);
    assert_true(n_read() - before <= n_prompt + 1 + 2); /* a pending token, and two last ones */
    for (int i = 0; i < 3; i++)
        assert_true(
            cJSON_Compare(member(cJSON_GetArrayItem(member(choices, "choices"), i), "token_ids"),
                          member(member(second, "choices")->child, "token_ids"), true));
    cJSON_Delete(choices);
    cJSON_Delete(second);
    cJSON_Delete(first);
}

static cJSON *post_as(const struct server *s, const char *key, const char *body)
{
    const char *const headers[] = {key, NULL};
    struct reply reply;
    client_send(s, &(struct client_request){.path = COMPLETIONS, .body = body, .headers = headers},
                &reply);
    cJSON *v = cJSON_ParseWithLength(reply.body.data, reply.body.n);
    if (reply.code != 200 || !v)
        fail_msg("%d %s", reply.code, reply.body.data);
    reply_free(&reply);
    return v;
}

/* What one key has sent another does not find, unless the server was told to share. */
static void check_owners(bool share)
{
    static const char file[] = "one-key-of-a-test\nanother-key-of-a-test\n";
    static const char one[] = "Authorization: Bearer one-key-of-a-test";
    static const char other[] = "Authorization: Bearer another-key-of-a-test";
    static const char body[] = "{\"prompt\":\"" STORY "\",\"max_tokens\":2,\"temperature\":0}";
    char dir[100], path[140];
    struct server s;
    assert_int_equal(test_dir_make(dir, sizeof(dir)), 0);
    assert_int_equal(test_file_write(dir, "keys", file, strlen(file)), 0);
    snprintf(path, sizeof(path), "%s/keys", dir);
    server_start(
        &s, (const char *const[]){"--api-key-file", path, share ? "--share-prefixes" : NULL, NULL});
    const char *const keys[] = {one, other, other, one};
    const bool found[] = {false, share, true, true};
    for (int i = 0; i < 4; i++) {
        cJSON *v = post_as(&s, keys[i], body);
        assert_int_equal(cached(v) > 0, found[i]);
        cJSON_Delete(v);
    }
    server_stop(&s);
    test_dir_remove(dir);
}

static void test_owners(void **state)
{
    (void)state;
    check_owners(false);
    check_owners(true);
}

/* Sessions get the memory that prefixes have. */
static void test_sessions_come_first(void **state)
{
    (void)state;
    struct server s;
    int n_sessions = 0, code;
    server_start(&s, (const char *const[]){"--host-state-mb", "1", "--prefix-cache-mb", "1",
                                           "--prefix-min-tokens", "4", NULL});
    for (int i = 0; i < 150; i++) {
        cJSON *v =
            post_to(&s, COMPLETIONS, "{\"prompt\":\"Number %d of those\",\"max_tokens\":1}", i);
        cJSON_Delete(v);
    }
    double n_kept = server_metric(&s, "latte_prefix_entries");
    assert_true(n_kept > 10);
    do {
        struct reply reply;
        char body[200];
        cJSON *v = post_to(&s, "/v1/sessions", "{}");
        snprintf(body, sizeof(body),
                 "{\"session_id\":\"%s\",\"prompt\":\"Hello\",\"max_tokens\":1}",
                 member(v, "id")->valuestring);
        client_post(&s, COMPLETIONS, body, &reply);
        code = reply.code;
        n_sessions += code == 200;
        reply_free(&reply);
        cJSON_Delete(v);
    } while (code == 200);
    assert_int_equal(code, 429);
    double bytes = server_metric(&s, "latte_session_state_bytes") / n_sessions;
    assert_true(bytes * (n_sessions + 1) > 1 << 20); /* all of it */
    assert_true(n_sessions >= n_kept);
    assert_true(server_metric(&s, "latte_prefix_entries") == 0);
    server_stop(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_choices_share_a_prompt),
        cmocka_unit_test(test_choices_of_prompts),
        cmocka_unit_test(test_choices_with_scores),
        cmocka_unit_test(test_choices_of_a_client_that_leaves),
        cmocka_unit_test(test_choices_and_a_full_queue),
        cmocka_unit_test(test_conversations),
        cmocka_unit_test(test_conversation_with_bundled_model),
        cmocka_unit_test(test_shared_system_prompt),
        cmocka_unit_test(test_completions),
        cmocka_unit_test(test_stop_string),
        cmocka_unit_test(test_usage_in_streams),
        cmocka_unit_test(test_nothing_is_kept),
        cmocka_unit_test(test_states_are_not_beginnings),
        cmocka_unit_test(test_owners),
        cmocka_unit_test(test_sessions_come_first),
    };
    return cmocka_run_group_tests(tests, start_server, stop_server);
}
