/* test_api.c - the API's behaviour over HTTP, with a tiny model of random weights. */
#include "tests/http/harness.h"

#include <cjson/cJSON.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/base/json.h"
#include "engine/base/utf8.h"
#include "tests/unit/model_files.h"

#define COMPLETIONS "/v1/completions"
#define CHAT "/v1/chat/completions"
/* What keeps a random model from repeating one token. */
#define LIVELY "\"temperature\":2,\"frequency_penalty\":2,\"ignore_eos\":true"

static struct server server; /* shared by the tests that need nothing special */

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

/* ---- helpers ------------------------------------------------------------------------------- */

/* Strict JSON as a tree. A random model says zero characters, too, which neither json_check nor
 * cJSON takes: they are read as U+0001. */
static cJSON *parse(const char *text, size_t n)
{
    char *copy = malloc(n + 1);
    assert_non_null(copy);
    memcpy(copy, text, n);
    copy[n] = '\0';
    for (char *at = copy; (at = strchr(at, '\\')); at += 2)
        if (!strncmp(at, "\\u0000", 6))
            at[5] = '1';
    struct json_limits limits = {.max_depth = 32};
    struct error err;
    if (json_check(copy, n, &limits, &err))
        fail_msg("%s in %s", err.text, copy);
    cJSON *v = cJSON_ParseWithLength(copy, n);
    free(copy);
    return v;
}

/* POST a body that is printed from a format; the reply must be 200 and sound JSON. */
__attribute__((format(printf, 3, 4))) static cJSON *
post_to(const struct server *s, const char *path, const char *format, ...)
{
    char *text = NULL;
    va_list args;
    va_start(args, format);
    assert_true(vasprintf(&text, format, args) >= 0);
    va_end(args);
    struct reply reply;
    client_post(s, path, text, &reply);
    if (reply.code != 200)
        fail_msg("%s: %d %s\n%s", path, reply.code, reply.body.data, text);
    cJSON *v = parse(reply.body.data, reply.body.n);
    reply_free(&reply);
    free(text);
    return v;
}
#define post(...) post_to(&server, __VA_ARGS__)

static const cJSON *find(const cJSON *v, const char *path)
{
    char name[64];
    while (*path && v) {
        size_t n = strcspn(path, ".");
        snprintf(name, sizeof(name), "%.*s", (int)n, path);
        v = cJSON_IsArray(v) ? cJSON_GetArrayItem(v, atoi(name))
                             : cJSON_GetObjectItemCaseSensitive(v, name);
        path += n + (path[n] == '.');
    }
    return v;
}

static const cJSON *get(const cJSON *v, const char *path)
{
    const cJSON *found = find(v, path);
    if (!found) {
        char *text = cJSON_PrintUnformatted(v);
        fail_msg("no %s in %s", path, text);
    }
    return found;
}

static const char *get_text(const cJSON *v, const char *path)
{
    const cJSON *found = get(v, path);
    if (!cJSON_IsString(found))
        fail_msg("%s is no string", path);
    return found->valuestring;
}

static int get_int(const cJSON *v, const char *path)
{
    const cJSON *found = get(v, path);
    if (!cJSON_IsNumber(found))
        fail_msg("%s is no number", path);
    return found->valueint;
}

static int length(const cJSON *v, const char *path)
{
    return cJSON_GetArraySize(get(v, path));
}

/* What a stream said, put together per choice. */
enum { MAX_CHOICES = 8 };
struct streamed {
    struct bytes raw;
    char *text[MAX_CHOICES];
    char *finish[MAX_CHOICES];
    cJSON *tokens[MAX_CHOICES]; /* of logprobs */
    cJSON *ids[MAX_CHOICES];
    cJSON *usage, *error; /* or NULL */
    int n_chunks;
    bool done;
};

static void append(char **text, const char *more)
{
    size_t n = *text ? strlen(*text) : 0;
    *text = realloc(*text, n + strlen(more) + 1);
    assert_non_null(*text);
    strcpy(*text + n, more);
}

static void append_items(cJSON **list, const cJSON *more)
{
    if (!*list)
        *list = cJSON_CreateArray();
    const cJSON *item;
    cJSON_ArrayForEach(item, more) cJSON_AddItemToArray(*list, cJSON_Duplicate(item, true));
}

static void take_choice(struct streamed *s, const cJSON *c, bool chat)
{
    int index = get_int(c, "index");
    assert_in_range(index, 0, MAX_CHOICES - 1);
    assert_null(s->finish[index]); /* nothing after the end of a choice */
    const cJSON *text = find(c, chat ? "delta.content" : "text");
    append(&s->text[index], cJSON_IsString(text) ? text->valuestring : "");
    append_items(&s->tokens[index], find(c, chat ? "logprobs.content" : "logprobs.tokens"));
    append_items(&s->ids[index], find(c, "token_ids"));
    if (!cJSON_IsNull(get(c, "finish_reason")))
        append(&s->finish[index], get_text(c, "finish_reason"));
}

static void take_event(struct streamed *s, const char *text, size_t n)
{
    if (n >= 1 && text[0] == ':')
        return; /* a comment */
    if (n < 6 || memcmp(text, "data: ", 6))
        fail_msg("an event is '%.*s'", (int)n, text);
    assert_false(s->done);
    if (n == 12 && !memcmp(text + 6, "[DONE]", 6)) {
        s->done = true;
        return;
    }
    cJSON *v = parse(text + 6, n - 6);
    s->n_chunks++;
    if (find(v, "error")) {
        s->error = v;
        return;
    }
    bool chat = !strcmp(get_text(v, "object"), "chat.completion.chunk");
    const cJSON *c, *usage = find(v, "usage");
    cJSON_ArrayForEach(c, get(v, "choices")) take_choice(s, c, chat);
    if (cJSON_IsObject(usage)) {
        cJSON_Delete(s->usage);
        s->usage = cJSON_Duplicate(usage, true);
    }
    cJSON_Delete(v);
}

/* Parse a streamed reply, whose body it takes. */
static void take_stream(struct streamed *s, struct reply *reply)
{
    char type[100];
    *s = (struct streamed){0};
    if (reply->code != 200)
        fail_msg("%d %s", reply->code, reply->body.data);
    assert_true(reply_header(reply, "Content-Type", type, sizeof(type)));
    assert_true(!strncmp(type, "text/event-stream", 17));
    s->raw = reply->body;
    reply->body = (struct bytes){0};
    reply_free(reply);
    const char *at = s->raw.data;
    for (const char *end; at && (end = strstr(at, "\n\n")); at = end + 2)
        take_event(s, at, (size_t)(end - at));
    assert_int_equal(*at, '\0');
}

__attribute__((format(printf, 4, 5))) static void stream_from(const struct server *server_,
                                                              struct streamed *s, const char *path,
                                                              const char *format, ...)
{
    char *text = NULL;
    va_list args;
    va_start(args, format);
    assert_true(vasprintf(&text, format, args) >= 0);
    va_end(args);
    struct reply reply;
    client_post(server_, path, text, &reply);
    take_stream(s, &reply);
    free(text);
}
#define stream(s, ...) stream_from(&server, s, __VA_ARGS__)

static void streamed_free(struct streamed *s)
{
    for (int i = 0; i < MAX_CHOICES; i++) {
        free(s->text[i]);
        free(s->finish[i]);
        cJSON_Delete(s->tokens[i]);
        cJSON_Delete(s->ids[i]);
    }
    cJSON_Delete(s->usage);
    cJSON_Delete(s->error);
    bytes_free(&s->raw);
}

static int id_of(const char *text)
{
    cJSON *v = post("/tokenize", "{\"prompt\":\"%s\"}", text);
    assert_int_equal(get_int(v, "count"), 1);
    int id = get_int(v, "tokens.0");
    cJSON_Delete(v);
    return id;
}

/* ---- shapes ---------------------------------------------------------------------------------- */

static void assert_usage(const cJSON *usage, int prompt, int completion)
{
    assert_int_equal(get_int(usage, "prompt_tokens"), prompt);
    assert_int_equal(get_int(usage, "completion_tokens"), completion);
    assert_int_equal(get_int(usage, "total_tokens"), prompt + completion);
    assert_int_equal(get_int(usage, "prompt_tokens_details.cached_tokens"), 0);
    assert_int_equal(get_int(usage, "completion_tokens_details.reasoning_tokens"), 0);
}

static void assert_head(const cJSON *v, const char *object, const char *prefix)
{
    assert_string_equal(get_text(v, "object"), object);
    assert_true(!strncmp(get_text(v, "id"), prefix, strlen(prefix)));
    assert_true(get_int(v, "created") > 1700000000);
    assert_true(strlen(get_text(v, "model")) > 0);
    assert_true(!strncmp(get_text(v, "system_fingerprint"), "fp_", 3));
}

static void test_completion_shape(void **state)
{
    (void)state;
    cJSON *v = post(COMPLETIONS, "{\"prompt\":\"Once upon a time\"," LIVELY "}");
    assert_head(v, "text_completion", "cmpl-");
    assert_int_equal(length(v, "choices"), 1);
    assert_int_equal(get_int(v, "choices.0.index"), 0);
    assert_true(cJSON_IsNull(get(v, "choices.0.logprobs")));
    assert_string_equal(get_text(v, "choices.0.finish_reason"), "length");
    assert_usage(get(v, "usage"), 4, 16); /* OpenAI's default */
    assert_null(find(v, "choices.0.token_ids"));
    cJSON_Delete(v);
}

static void test_chat_shape(void **state)
{
    (void)state;
    cJSON *v = post(CHAT, "{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}],"
                          "\"max_tokens\":5," LIVELY "}");
    assert_head(v, "chat.completion", "chatcmpl-");
    assert_string_equal(get_text(v, "choices.0.message.role"), "assistant");
    assert_true(strlen(get_text(v, "choices.0.message.content")) > 0);
    assert_true(cJSON_IsNull(get(v, "choices.0.message.refusal")));
    assert_true(cJSON_IsNull(get(v, "choices.0.logprobs")));
    assert_string_equal(get_text(v, "choices.0.finish_reason"), "length");
    assert_int_equal(get_int(v, "usage.completion_tokens"), 5);
    cJSON_Delete(v);
}

static void test_chat_chunks(void **state)
{
    (void)state;
    struct streamed s;
    stream(&s, CHAT,
           "{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}],\"max_tokens\":5,\"n\":2,"
           "\"stream\":true,\"stream_options\":{\"include_usage\":true}," LIVELY "}");
    assert_true(s.done);
    assert_int_equal(get_int(s.usage, "completion_tokens"), 10);
    int n_roles = 0;
    for (const char *at = s.raw.data; (at = strstr(at, "\"role\":\"assistant\"")); at++)
        n_roles++;
    assert_int_equal(n_roles, 2);
    /* The first event has the role and no text; every chunk but the last has a null usage. */
    const char *first_end = strstr(s.raw.data, "\n\n");
    assert_true(strstr(s.raw.data, "\"role\"") < first_end);
    int n_null = 0;
    for (const char *at = s.raw.data; (at = strstr(at, "\"usage\":null")); at++)
        n_null++;
    assert_int_equal(n_null, s.n_chunks - 1);
    streamed_free(&s);
}

static void test_model_list(void **state)
{
    (void)state;
    struct reply reply;
    client_get(&server, "/v1/models", &reply);
    cJSON *v = parse(reply.body.data, reply.body.n);
    assert_string_equal(get_text(v, "object"), "list");
    char path[200];
    snprintf(path, sizeof(path), "/v1/models/%s", get_text(v, "data.0.id"));
    reply_free(&reply);
    client_get(&server, path, &reply);
    assert_int_equal(reply.code, 200);
    cJSON *one = parse(reply.body.data, reply.body.n);
    assert_true(cJSON_Compare(one, get(v, "data.0"), true));
    assert_string_equal(get_text(one, "object"), "model");
    /* A request may name it, or name none. */
    cJSON_Delete(post(COMPLETIONS, "{\"model\":\"%s\",\"prompt\":\"x\",\"max_tokens\":1}",
                      get_text(one, "id")));
    cJSON_Delete(one);
    cJSON_Delete(v);
    reply_free(&reply);
    client_get(&server, "/v1/models/none/such", &reply);
    assert_error_object(&reply, 404, "invalid_request_error", "model_not_found");
    reply_free(&reply);
}

/* ---- tokens and text --------------------------------------------------------------------------
 */

static void test_usage_counts_tokens(void **state)
{
    (void)state;
    const char *prompt = "The quick brown fox, na\xc3\xafve \xe2\x82\xac 42";
    cJSON *t = post("/tokenize", "{\"prompt\":\"%s\"}", prompt);
    cJSON *v =
        post(COMPLETIONS,
             "{\"prompt\":\"%s\",\"max_tokens\":9,\"n\":2,\"return_token_ids\":true," LIVELY "}",
             prompt);
    assert_usage(get(v, "usage"), get_int(t, "count"), 18);
    assert_true(cJSON_Compare(get(v, "choices.1.prompt_token_ids"), get(t, "tokens"), true));
    cJSON *text = post("/detokenize", "{\"tokens\":[%d,%d],\"skip_special_tokens\":true}",
                       get_int(v, "choices.0.token_ids.0"), get_int(v, "choices.0.token_ids.1"));
    const char *all = get_text(v, "choices.0.text"), *two = get_text(text, "prompt");
    if (!strstr(two, "\xef\xbf\xbd"))
        assert_int_equal(strncmp(all, two, strlen(two)), 0);
    cJSON_Delete(text);
    cJSON_Delete(v);
    /* The same ids as a prompt give the same prompt. */
    char *ids = cJSON_PrintUnformatted(get(t, "tokens"));
    cJSON *a = post(COMPLETIONS, "{\"prompt\":%s,\"temperature\":0}", ids);
    cJSON *b = post(COMPLETIONS, "{\"prompt\":\"%s\",\"temperature\":0}", prompt);
    assert_string_equal(get_text(a, "choices.0.text"), get_text(b, "choices.0.text"));
    cJSON_Delete(a);
    cJSON_Delete(b);
    cJSON_Delete(t);
    free(ids);
}

static void test_tokenize(void **state)
{
    (void)state;
    static const char *const texts[] = {"", "hello", "  two  spaces",
                                        "caf\xc3\xa9 \xf0\x9f\x98\x80", "<|im_start|>user"};
    for (size_t i = 0; i < COUNT_OF(texts); i++) {
        cJSON *t = post("/tokenize", "{\"prompt\":\"%s\",\"return_token_strs\":true}", texts[i]);
        assert_int_equal(length(t, "tokens"), get_int(t, "count"));
        assert_int_equal(length(t, "token_strs"), get_int(t, "count"));
        char *ids = cJSON_PrintUnformatted(get(t, "tokens"));
        cJSON *d = post("/detokenize", "{\"tokens\":%s}", ids);
        assert_string_equal(get_text(d, "prompt"), texts[i]);
        assert_string_equal(get_text(d, "content"), texts[i]);
        cJSON_Delete(d);
        cJSON_Delete(t);
        free(ids);
    }
    cJSON *special = post("/tokenize", "{\"content\":\"<|im_end|>\",\"with_pieces\":true}");
    assert_int_equal(get_int(special, "count"), 1);
    assert_int_equal(get_int(special, "tokens.0.id"), 2);
    cJSON_Delete(special);
    special = post("/tokenize", "{\"content\":\"<|im_end|>\",\"parse_special\":false}");
    assert_true(get_int(special, "count") > 1);
    cJSON_Delete(special);
}

/* A chat's prompt is what /tokenize says of its messages; developer is system, and parts of
 * text are as_expected by newlines. */
static void test_chat_prompts(void **state)
{
    (void)state;
    static const char *const same[] = {
        "[{\"role\":\"system\",\"content\":\"a\\nb\"},{\"role\":\"user\",\"content\":\"c\"}]",
        "[{\"role\":\"developer\",\"content\":[{\"type\":\"text\",\"text\":\"a\"},"
        "{\"type\":\"text\",\"text\":\"b\"}]},{\"role\":\"user\",\"content\":\"c\",\"name\":\"n\"}"
        "]",
    };
    cJSON *t = post("/tokenize", "{\"messages\":%s}", same[0]);
    for (size_t i = 0; i < COUNT_OF(same); i++) {
        cJSON *v =
            post(CHAT, "{\"messages\":%s,\"max_tokens\":1,\"return_token_ids\":true}", same[i]);
        assert_true(cJSON_Compare(get(v, "prompt_token_ids"), get(t, "tokens"), true));
        assert_int_equal(get_int(v, "usage.prompt_tokens"), get_int(t, "count"));
        cJSON_Delete(v);
    }
    cJSON *open =
        post("/tokenize", "{\"messages\":[{\"role\":\"user\",\"content\":\"c\"},{\"role\":"
                          "\"assistant\",\"content\":\"Well\"}],\"continue_final_message\":true}");
    cJSON *closed = post("/tokenize", "{\"messages\":[{\"role\":\"user\",\"content\":\"c\"},"
                                      "{\"role\":\"assistant\",\"content\":\"Well\"}],"
                                      "\"add_generation_prompt\":false}");
    assert_true(get_int(open, "count") < get_int(closed, "count"));
    for (int i = 0; i < get_int(open, "count"); i++)
        assert_int_equal(cJSON_GetArrayItem(get(open, "tokens"), i)->valueint,
                         cJSON_GetArrayItem(get(closed, "tokens"), i)->valueint);
    cJSON_Delete(open);
    cJSON_Delete(closed);
    cJSON_Delete(t);
}

/* ---- streams and whole replies ----------------------------------------------------------------
 */

static void test_stream_equals_whole(void **state)
{
    (void)state;
    static const char *const inputs[] = {
        "\"prompt\":\"Once\",\"logprobs\":2",
        "\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"logprobs\":true,"
        "\"top_logprobs\":2",
    };
    for (int seed = 0; seed < 12; seed++) {
        bool chat = seed % 2;
        char body[400];
        snprintf(body, sizeof(body),
                 "%s,\"max_tokens\":40,\"seed\":%d,\"n\":2,\"return_token_ids\":true,"
                 "\"temperature\":2,\"frequency_penalty\":2%s",
                 inputs[chat], seed, seed % 3 ? "" : ",\"stop\":[\"e\",\" the\"]");
        const char *path = chat ? CHAT : COMPLETIONS;
        cJSON *v = post(path, "{%s}", body);
        struct streamed s;
        stream(&s, path, "{%s,\"stream\":true,\"stream_options\":{\"include_usage\":true}}", body);
        assert_true(s.done);
        assert_true(cJSON_Compare(s.usage, get(v, "usage"), true));
        for (int i = 0; i < 2; i++) {
            const cJSON *c = cJSON_GetArrayItem(get(v, "choices"), i);
            assert_string_equal(get_text(c, chat ? "message.content" : "text"), s.text[i]);
            assert_string_equal(get_text(c, "finish_reason"), s.finish[i]);
            assert_true(cJSON_Compare(get(c, chat ? "logprobs.content" : "logprobs.tokens"),
                                      s.tokens[i], true));
            assert_true(cJSON_Compare(get(c, "token_ids"), s.ids[i], true));
        }
        cJSON_Delete(v);
        streamed_free(&s);
    }
}

static void test_continuous_usage(void **state)
{
    (void)state;
    struct streamed s;
    stream(&s, COMPLETIONS,
           "{\"prompt\":\"x\",\"max_tokens\":4,\"stream\":true,\"stream_options\":"
           "{\"include_usage\":true,\"continuous_usage_stats\":true}," LIVELY "}");
    assert_null(strstr(s.raw.data, "\"usage\":null"));
    assert_int_equal(get_int(s.usage, "completion_tokens"), 4);
    streamed_free(&s);
}

/* Text of characters that come in pieces: forced bytes, alone and in order. */
static void test_utf8_pieces(void **state)
{
    (void)state;
    cJSON *t = post("/tokenize", "{\"prompt\":\"\xf0\x9f\xab\xa0\"}");
    int n = get_int(t, "count");
    assert_true(n > 1);
    int lead = get_int(t, "tokens.0");
    for (int streaming = 0; streaming < 2; streaming++) {
        struct streamed s = {0};
        cJSON *v = NULL;
        if (streaming)
            stream(&s, COMPLETIONS,
                   "{\"prompt\":\"x\",\"max_tokens\":6,\"logit_bias\":{\"%d\":100},"
                   "\"temperature\":0,\"stream\":true}",
                   lead);
        else
            v = post(COMPLETIONS,
                     "{\"prompt\":\"x\",\"max_tokens\":6,\"logit_bias\":{\"%d\":100},"
                     "\"temperature\":0}",
                     lead);
        const char *text = streaming ? s.text[0] : get_text(v, "choices.0.text");
        assert_string_equal(text, "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd"
                                  "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd");
        if (streaming)
            streamed_free(&s);
        cJSON_Delete(v);
    }
    /* With byte tokens at random, every event is sound UTF-8 (parse checks it). */
    struct bytes bias = {0};
    for (int id = 100; id < 200; id++)
        bytes_format(&bias, "%s\"%d\":50", bias.n ? "," : "", id);
    struct streamed s;
    stream(&s, COMPLETIONS,
           "{\"prompt\":\"x\",\"max_tokens\":200,\"logit_bias\":{%s},\"stream\":true,"
           "\"seed\":3,\"logprobs\":0," LIVELY "}",
           bias.data);
    assert_int_equal(cJSON_GetArraySize(s.tokens[0]), 200);
    streamed_free(&s);
    bytes_free(&bias);
    cJSON_Delete(t);
}

/* ---- logprobs ----------------------------------------------------------------------------------
 */

static double number_at(const cJSON *v, const char *path, int i)
{
    const cJSON *item = cJSON_GetArrayItem(get(v, path), i);
    assert_true(cJSON_IsNumber(item));
    return item->valuedouble;
}

/* Scoring prompt and output as one prompt gives what generating said. Not to the bit: chunks
 * of a prompt sum in another order than single tokens. */
static void test_echo_agrees_with_generation(void **state)
{
    (void)state;
    cJSON *v =
        post(COMPLETIONS, "{\"prompt\":\"Once upon a time\",\"max_tokens\":24,\"logprobs\":3,"
                          "\"return_token_ids\":true,\"seed\":5," LIVELY "}");
    struct bytes ids = {0};
    const cJSON *id;
    cJSON_ArrayForEach(id, get(v, "choices.0.prompt_token_ids"))
        bytes_format(&ids, "%s%d", ids.n ? "," : "", id->valueint);
    cJSON_ArrayForEach(id, get(v, "choices.0.token_ids")) bytes_format(&ids, ",%d", id->valueint);
    cJSON *e = post(COMPLETIONS,
                    "{\"prompt\":[%s],\"max_tokens\":0,\"echo\":true,\"logprobs\":3,"
                    "\"return_token_ids\":true}",
                    ids.data);
    int n = length(e, "choices.0.logprobs.tokens");
    assert_int_equal(n, 28);
    assert_int_equal(length(e, "choices.0.logprobs.token_logprobs"), n);
    assert_int_equal(length(e, "choices.0.logprobs.top_logprobs"), n);
    assert_true(cJSON_IsNull(get(e, "choices.0.logprobs.token_logprobs.0")));
    assert_true(cJSON_IsNull(get(e, "choices.0.logprobs.top_logprobs.0")));
    for (int i = 0; i < 24; i++) {
        double a = number_at(v, "choices.0.logprobs.token_logprobs", i);
        double b = number_at(e, "choices.0.logprobs.token_logprobs", i + 4);
        if (fabs(a - b) > 2e-3)
            fail_msg("token %d: generated with %g, scored with %g", i, a, b);
    }
    assert_usage(get(e, "usage"), 28, 0);
    assert_int_equal(length(e, "choices.0.token_ids"), 0);
    assert_string_equal(get_text(e, "choices.0.finish_reason"), "length");
    cJSON_Delete(v);
    cJSON_Delete(e);
    bytes_free(&ids);
}

static void test_echo(void **state)
{
    (void)state;
    const char *prompt = "Caf\xc3\xa9 au lait";
    cJSON *v = post(
        COMPLETIONS,
        "{\"prompt\":\"%s\",\"max_tokens\":3,\"echo\":true,\"logprobs\":0,\"seed\":1," LIVELY "}",
        prompt);
    const char *text = get_text(v, "choices.0.text");
    assert_int_equal(strncmp(text, prompt, strlen(prompt)), 0);
    assert_true(strlen(text) > strlen(prompt));
    int n_prompt = get_int(v, "usage.prompt_tokens");
    assert_int_equal(length(v, "choices.0.logprobs.tokens"), n_prompt + 3);
    assert_int_equal(number_at(v, "choices.0.logprobs.text_offset", 0), 0);
    assert_int_equal(number_at(v, "choices.0.logprobs.text_offset", n_prompt), 12);
    struct streamed s;
    stream(&s, COMPLETIONS,
           "{\"prompt\":\"%s\",\"max_tokens\":3,\"echo\":true,\"logprobs\":0,\"seed\":1,"
           "\"stream\":true," LIVELY "}",
           prompt);
    assert_string_equal(s.text[0], text);
    assert_true(cJSON_Compare(s.tokens[0], get(v, "choices.0.logprobs.tokens"), true));
    streamed_free(&s);
    cJSON_Delete(v);
}

static void test_top_logprobs(void **state)
{
    (void)state;
    cJSON *v = post(CHAT, "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"max_tokens\":4,"
                          "\"logprobs\":true,\"top_logprobs\":20,\"temperature\":0}");
    const cJSON *t;
    cJSON_ArrayForEach(t, get(v, "choices.0.logprobs.content"))
    {
        assert_int_equal(length(t, "top_logprobs"), 20);
        /* Greedy: the token is the likeliest one. The others follow in order, as probabilities. */
        double sum = 0, last = 0;
        assert_true(get(t, "logprob")->valuedouble ==
                    get(t, "top_logprobs.0.logprob")->valuedouble);
        const cJSON *top;
        cJSON_ArrayForEach(top, get(t, "top_logprobs"))
        {
            double p = get(top, "logprob")->valuedouble;
            assert_true(p <= last);
            last = p;
            sum += exp(p);
        }
        assert_true(sum <= 1 + 1e-5);
    }
    cJSON_Delete(v);
}

/* ---- choices -----------------------------------------------------------------------------------
 */

static double mean_logprob(const cJSON *choice)
{
    const cJSON *item;
    double sum = 0;
    cJSON_ArrayForEach(item, get(choice, "logprobs.token_logprobs")) sum += item->valuedouble;
    return sum / length(choice, "logprobs.token_logprobs");
}

/* best_of gives the best of what n alone would have given, in order. */
static void test_best_of(void **state)
{
    (void)state;
    cJSON *all = post(COMPLETIONS, "{\"prompt\":\"x\",\"n\":6,\"logprobs\":0,\"seed\":9,"
                                   "\"max_tokens\":8," LIVELY "}");
    cJSON *best = post(COMPLETIONS, "{\"prompt\":\"x\",\"n\":3,\"best_of\":6,\"logprobs\":0,"
                                    "\"seed\":9,\"max_tokens\":8," LIVELY "}");
    assert_int_equal(length(all, "choices"), 6);
    assert_int_equal(length(best, "choices"), 3);
    assert_int_equal(get_int(best, "usage.completion_tokens"), 48);
    double scores[6];
    for (int i = 0; i < 6; i++)
        scores[i] = mean_logprob(cJSON_GetArrayItem(get(all, "choices"), i));
    for (int i = 0; i < 3; i++) {
        const cJSON *c = cJSON_GetArrayItem(get(best, "choices"), i);
        assert_int_equal(get_int(c, "index"), i);
        int top = 0;
        for (int j = 1; j < 6; j++)
            top = scores[j] > scores[top] ? j : top;
        assert_string_equal(get_text(c, "text"),
                            get_text(cJSON_GetArrayItem(get(all, "choices"), top), "text"));
        scores[top] = -INFINITY;
    }
    cJSON_Delete(all);
    cJSON_Delete(best);
}

static void test_choices_differ(void **state)
{
    (void)state;
    cJSON *v =
        post(COMPLETIONS, "{\"prompt\":\"x\",\"n\":4,\"seed\":1,\"max_tokens\":12," LIVELY "}");
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < i; j++)
            assert_string_not_equal(get_text(cJSON_GetArrayItem(get(v, "choices"), i), "text"),
                                    get_text(cJSON_GetArrayItem(get(v, "choices"), j), "text"));
    cJSON_Delete(v);
}

static void test_many_prompts(void **state)
{
    (void)state;
    static const char *const prompts[] = {"\"one\"", "[5,6,7]", "\"a third prompt\""};
    cJSON *v = post(COMPLETIONS,
                    "{\"prompt\":[%s,%s,%s],\"n\":2,\"seed\":4,\"max_tokens\":6,"
                    "\"return_token_ids\":true," LIVELY "}",
                    prompts[0], prompts[1], prompts[2]);
    assert_int_equal(length(v, "choices"), 6);
    int n_prompt = 0;
    for (int i = 0; i < 3; i++) {
        cJSON *one =
            post(COMPLETIONS, "{\"prompt\":%s,\"n\":2,\"seed\":4,\"max_tokens\":6," LIVELY "}",
                 prompts[i]);
        n_prompt += get_int(one, "usage.prompt_tokens");
        for (int k = 0; k < 2; k++) {
            const cJSON *c = cJSON_GetArrayItem(get(v, "choices"), 2 * i + k);
            assert_int_equal(get_int(c, "index"), 2 * i + k);
            assert_string_equal(get_text(c, "text"),
                                get_text(cJSON_GetArrayItem(get(one, "choices"), k), "text"));
        }
        cJSON_Delete(one);
    }
    assert_usage(get(v, "usage"), n_prompt, 36);
    cJSON_Delete(v);
}

/* ---- stopping ----------------------------------------------------------------------------------
 */

/* Any piece of a text, used as a stop string, ends the same text where it first occurs. */
static void test_stop_strings(void **state)
{
    (void)state;
    cJSON *v = post(COMPLETIONS, "{\"prompt\":\"Once\",\"max_tokens\":40,\"seed\":2," LIVELY "}");
    const char *text = get_text(v, "choices.0.text");
    size_t n = strlen(text);
    assert_true(n > 40);
    int n_tried = 0;
    for (size_t at = 3; at + 12 < n && n_tried < 6; at += n / 8) {
        char stop[16] = {0};
        memcpy(stop, text + at, 7);
        bool plain = utf8_valid_prefix(stop, 7) == 7;
        for (int i = 0; i < 7; i++)
            plain = plain && (unsigned char)stop[i] >= ' ' && !strchr("\"\\\x7f", stop[i]);
        if (!plain)
            continue;
        n_tried++;
        size_t expected = (size_t)(strstr(text, stop) - text);
        for (int include = 0; include < 2; include++) {
            cJSON *cut = post(COMPLETIONS,
                              "{\"prompt\":\"Once\",\"max_tokens\":40,\"seed\":2,\"stop\":\"%s\","
                              "\"logprobs\":0,\"include_stop_str_in_output\":%s," LIVELY "}",
                              stop, include ? "true" : "false");
            const char *found = get_text(cut, "choices.0.text");
            assert_int_equal(strlen(found), expected + (include ? 7 : 0));
            assert_int_equal(strncmp(found, text, strlen(found)), 0);
            assert_string_equal(get_text(cut, "choices.0.finish_reason"), "stop");
            assert_true(get_int(cut, "usage.completion_tokens") >=
                        length(cut, "choices.0.logprobs.tokens"));
            cJSON_Delete(cut);
        }
    }
    assert_true(n_tried >= 2);
    cJSON_Delete(v);
}

static void test_end_tokens(void **state)
{
    (void)state;
    static const struct {
        const char *extra, *finish;
        int n;
    } cases[] = {
        {"\"n\":1", "stop", 1},
        {"\"min_tokens\":5", "stop", 6},
        {"\"ignore_eos\":true", "length", 16},
        {"\"ignore_eos\":true,\"stop_token_ids\":[0]", "stop", 1},
        {"\"max_tokens\":0", "length", 0},
    };
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        cJSON *v = post(COMPLETIONS,
                        "{\"prompt\":\"x\",\"temperature\":0,\"logit_bias\":{\"0\":100},"
                        "\"return_token_ids\":true,\"logprobs\":0,%s}",
                        cases[i].extra);
        assert_string_equal(get_text(v, "choices.0.finish_reason"), cases[i].finish);
        assert_int_equal(get_int(v, "usage.completion_tokens"), cases[i].n);
        assert_int_equal(length(v, "choices.0.token_ids"), cases[i].n);
        assert_int_equal(length(v, "choices.0.logprobs.tokens"), cases[i].n);
        cJSON_Delete(v);
    }
    /* Scores of a text: the generated token is the last entry, whatever it is. */
    cJSON *scored = post(COMPLETIONS, "{\"prompt\":[5,6,7],\"echo\":true,\"logprobs\":1,"
                                      "\"max_tokens\":1,\"temperature\":0,"
                                      "\"logit_bias\":{\"0\":100}}");
    assert_string_equal(get_text(scored, "choices.0.finish_reason"), "stop");
    assert_int_equal(length(scored, "choices.0.logprobs.tokens"), 4);
    assert_int_equal(length(scored, "choices.0.logprobs.token_logprobs"), 4);
    assert_string_equal(get_text(scored, "choices.0.logprobs.tokens.3"), "<|endoftext|>");
    assert_int_equal(get_int(scored, "choices.0.logprobs.text_offset.3"),
                     strlen(get_text(scored, "choices.0.text")));
    cJSON_Delete(scored);
    /* The template's end of turn ends a chat. */
    cJSON *v = post(CHAT, "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],"
                          "\"logit_bias\":{\"2\":100},\"temperature\":0}");
    assert_string_equal(get_text(v, "choices.0.finish_reason"), "stop");
    assert_string_equal(get_text(v, "choices.0.message.content"), "");
    assert_int_equal(get_int(v, "usage.completion_tokens"), 1);
    cJSON_Delete(v);
    int x = id_of("x");
    v = post(COMPLETIONS,
             "{\"prompt\":\"y\",\"temperature\":0,\"logit_bias\":{\"%d\":100},"
             "\"stop_token_ids\":[%d],\"include_stop_str_in_output\":true}",
             x, x);
    assert_string_equal(get_text(v, "choices.0.text"), "x");
    cJSON_Delete(v);
}

static void test_skip_special(void **state)
{
    (void)state;
    for (int skip = 0; skip < 2; skip++) {
        cJSON *v = post(COMPLETIONS,
                        "{\"prompt\":\"x\",\"temperature\":0,\"logit_bias\":{\"1\":100},"
                        "\"max_tokens\":2,\"skip_special_tokens\":%s}",
                        skip ? "true" : "false");
        assert_string_equal(get_text(v, "choices.0.text"), skip ? "" : "<|im_start|><|im_start|>");
        cJSON_Delete(v);
    }
}

/* ---- sampling ----------------------------------------------------------------------------------
 */

static int most_frequent(const cJSON *ids)
{
    int most = 0;
    for (const cJSON *a = ids->child; a; a = a->next) {
        int n = 0;
        for (const cJSON *b = ids->child; b; b = b->next)
            n += a->valueint == b->valueint;
        most = n > most ? n : most;
    }
    return most;
}

static void test_penalties(void **state)
{
    (void)state;
    static const char *const extras[] = {"\"n\":1", "\"repetition_penalty\":50",
                                         "\"presence_penalty\":2,\"frequency_penalty\":2"};
    int most[3];
    for (int i = 0; i < 3; i++) {
        cJSON *v = post(COMPLETIONS,
                        "{\"prompt\":\"the\",\"temperature\":0,\"max_tokens\":40,"
                        "\"ignore_eos\":true,\"return_token_ids\":true,%s}",
                        extras[i]);
        most[i] = most_frequent(get(v, "choices.0.token_ids"));
        cJSON_Delete(v);
    }
    assert_true(most[0] > 3); /* left alone, greedy repeats itself */
    assert_true(most[1] < most[0]);
    assert_true(most[2] < most[0]);
}

static void test_logit_bias(void **state)
{
    (void)state;
    cJSON *v = post(COMPLETIONS, "{\"prompt\":\"x\",\"logit_bias\":{\"777\":100},"
                                 "\"return_token_ids\":true,\"max_tokens\":5,\"temperature\":1}");
    for (int i = 0; i < 5; i++)
        assert_int_equal(number_at(v, "choices.0.token_ids", i), 777);
    cJSON_Delete(v);
    /* -100 forbids what greedy would take. */
    v = post(COMPLETIONS, "{\"prompt\":\"x\",\"temperature\":0,\"max_tokens\":1,"
                          "\"return_token_ids\":true}");
    int id = get_int(v, "choices.0.token_ids.0");
    cJSON_Delete(v);
    v = post(COMPLETIONS,
             "{\"prompt\":\"x\",\"temperature\":0,\"max_tokens\":9,\"return_token_ids\":true,"
             "\"logit_bias\":{\"%d\":-100}}",
             id);
    const cJSON *item;
    cJSON_ArrayForEach(item, get(v, "choices.0.token_ids")) assert_true(item->valueint != id);
    cJSON_Delete(v);
}

static void test_greedy_forms(void **state)
{
    (void)state;
    static const char *const forms[] = {"\"temperature\":0", "\"top_k\":1", "\"top_p\":0",
                                        "\"min_p\":1"};
    char *first = NULL;
    for (size_t i = 0; i < COUNT_OF(forms); i++) {
        cJSON *v = post(COMPLETIONS, "{\"prompt\":\"the cat\",%s}", forms[i]);
        if (!first)
            first = strdup(get_text(v, "choices.0.text"));
        assert_string_equal(get_text(v, "choices.0.text"), first);
        cJSON_Delete(v);
    }
    free(first);
}

enum { N_THREADS = 8, N_ROUNDS = 4 };
struct runner {
    pthread_t thread;
    char *texts[N_ROUNDS];
    int seed;
};

static void *run_requests(void *context)
{
    struct runner *r = context;
    for (int i = 0; i < N_ROUNDS; i++) {
        char body[300];
        snprintf(body, sizeof(body), "{\"prompt\":\"%s\",\"max_tokens\":%d,\"seed\":%d," LIVELY "}",
                 r->seed % 2 ? "Once upon" : "A", 30, r->seed);
        struct reply reply;
        client_post(&server, COMPLETIONS, body, &reply);
        cJSON *v = reply.code == 200 ? cJSON_ParseWithLength(reply.body.data, reply.body.n) : NULL;
        const cJSON *text = find(v, "choices.0.text");
        r->texts[i] = text ? strdup(text->valuestring) : NULL;
        cJSON_Delete(v);
        reply_free(&reply);
    }
    return NULL;
}

/* A seed gives the same text alone and among others. */
static void test_seeds_under_load(void **state)
{
    (void)state;
    struct runner runners[N_THREADS], alone[N_THREADS];
    for (int i = 0; i < N_THREADS; i++) {
        runners[i] = alone[i] = (struct runner){.seed = i / 2};
        run_requests(&alone[i]);
    }
    for (int i = 0; i < N_THREADS; i++)
        assert_false(pthread_create(&runners[i].thread, NULL, run_requests, &runners[i]));
    for (int i = 0; i < N_THREADS; i++) {
        pthread_join(runners[i].thread, NULL);
        for (int k = 0; k < N_ROUNDS; k++) {
            assert_non_null(runners[i].texts[k]);
            assert_string_equal(runners[i].texts[k], alone[i].texts[0]);
        }
        for (int k = 0; k < N_ROUNDS; k++) {
            free(runners[i].texts[k]);
            free(alone[i].texts[k]);
        }
    }
    /* Without a seed texts differ. */
    cJSON *a = post(COMPLETIONS, "{\"prompt\":\"A\",\"max_tokens\":30," LIVELY "}");
    cJSON *b = post(COMPLETIONS, "{\"prompt\":\"A\",\"max_tokens\":30," LIVELY "}");
    assert_string_not_equal(get_text(a, "choices.0.text"), get_text(b, "choices.0.text"));
    cJSON_Delete(a);
    cJSON_Delete(b);
}

/* ---- large bodies ------------------------------------------------------------------------------
 */

static char *long_prompt(size_t n_words)
{
    struct bytes text = {0};
    for (size_t i = 0; i < n_words; i++)
        bytes_text(&text, i % 7 ? "word " : "sentence. ");
    return text.data;
}

static void test_large_bodies(void **state)
{
    (void)state;
    char *text = long_prompt(20000); /* over 64 KB, so read on a worker */
    cJSON *t = post("/tokenize", "{\"prompt\":\"%s\"}", text);
    cJSON *v = post(COMPLETIONS, "{\"prompt\":\"%s\",\"max_tokens\":1}", text);
    assert_int_equal(get_int(v, "usage.prompt_tokens"), get_int(t, "count"));
    cJSON_Delete(v);
    char *ids = cJSON_PrintUnformatted(get(t, "tokens"));
    cJSON *d = post("/detokenize", "{\"tokens\":%s}", ids);
    assert_string_equal(get_text(d, "prompt"), text);
    cJSON_Delete(d);
    struct streamed s;
    stream(&s, CHAT,
           "{\"messages\":[{\"role\":\"user\",\"content\":\"%s\"}],\"max_tokens\":2,"
           "\"stream\":true,\"ignore_eos\":true}",
           text);
    assert_true(s.done);
    assert_string_equal(s.finish[0], "length");
    streamed_free(&s);
    /* Its texts are there as long as they are needed. */
    v = post(COMPLETIONS,
             "{\"prompt\":\"%s\",\"echo\":true,\"max_tokens\":9,\"stop\":\" the\","
             "\"logit_bias\":{\"%d\":100}}",
             text, id_of(" the"));
    assert_string_equal(get_text(v, "choices.0.text"), text);
    assert_string_equal(get_text(v, "choices.0.finish_reason"), "stop");
    cJSON_Delete(v);
    /* A fault in one is found there as well. */
    struct bytes bad = {0};
    bytes_format(&bad, "{\"prompt\":\"%s\",\"temperature\":3}", text);
    struct reply reply;
    client_post(&server, COMPLETIONS, bad.data, &reply);
    assert_error_object(&reply, 400, "invalid_request_error", "decimal_above_max_value");
    reply_free(&reply);
    bad.data[bad.n - 1] = ' ';
    client_post(&server, COMPLETIONS, bad.data, &reply);
    assert_error_object(&reply, 400, "invalid_request_error", NULL);
    reply_free(&reply);
    bytes_free(&bad);
    free(ids);
    free(text);
    cJSON_Delete(t);
}

/* ---- bad input ---------------------------------------------------------------------------------
 */

#define P "\"prompt\":\"x\""
#define ENDLESS P ",\"max_tokens\":900000,\"ignore_eos\":true,\"stream\":true"
#define ABORTED "latte_request_success_total{finish_reason=\"abort\"}"
#define DURATIONS "latte_http_request_duration_seconds_count{route=\"/v1/completions\"}"
#define M "\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]"

/* The codec's own test has more; these go all the way. param NULL: null. */
static const struct {
    const char *path, *body;
    int code;
    const char *param;
} bad_inputs[] = {
    {COMPLETIONS, "", 400, NULL},
    {COMPLETIONS, "{", 400, NULL},
    {COMPLETIONS, "[1]", 400, NULL},
    {COMPLETIONS, "\xff\xfe{}", 400, NULL},
    {COMPLETIONS, "\xef\xbb\xbf{" P "}", 400, NULL},
    {COMPLETIONS, "{" P "}{" P "}", 400, NULL},
    {COMPLETIONS, "{" P ",\"n\":NaN}", 400, NULL},
    {COMPLETIONS, "{" P ",\"n\":Infinity}", 400, NULL},
    {COMPLETIONS, "{" P ",\"n\":1e400}", 400, NULL},
    {COMPLETIONS, "{" P ",\"n\":+1}", 400, NULL},
    {COMPLETIONS, "{" P "," P "}", 400, NULL},
    {COMPLETIONS, "{\"prompt\":\"\\u0000\"}", 400, NULL},
    {COMPLETIONS, "{\"prompt\":\"\xc3\x28\"}", 400, NULL},
    {COMPLETIONS, "{\"prompt\":\"\\udc00\"}", 400, NULL},
    {COMPLETIONS, "{'prompt':'x'}", 400, NULL},
    {COMPLETIONS, "{" P " /* comment */}", 400, NULL},
    {COMPLETIONS, "{}", 400, "prompt"},
    {COMPLETIONS, "{\"prompt\":null}", 400, "prompt"},
    {COMPLETIONS, "{\"prompt\":\"\"}", 400, "prompt"},
    {COMPLETIONS, "{\"prompt\":[]}", 400, "prompt"},
    {COMPLETIONS, "{\"prompt\":[[]]}", 400, "prompt"},
    {COMPLETIONS, "{\"prompt\":[\"\"]}", 400, "prompt"},
    {COMPLETIONS, "{\"prompt\":[8192]}", 400, "prompt[0]"},
    {COMPLETIONS, "{\"prompt\":[-1]}", 400, "prompt[0]"},
    {COMPLETIONS, "{\"prompt\":[[1,2.5]]}", 400, "prompt[0][1]"},
    {COMPLETIONS, "{\"prompt\":{\"a\":1}}", 400, "prompt"},
    {COMPLETIONS, "{" P ",\"model\":\"gpt-4\"}", 404, "model"},
    {COMPLETIONS, "{" P ",\"model\":5}", 400, "model"},
    {COMPLETIONS, "{" P ",\"max_tokens\":-1}", 400, "max_tokens"},
    {COMPLETIONS, "{" P ",\"max_tokens\":\"5\"}", 400, "max_tokens"},
    {COMPLETIONS, "{" P ",\"max_tokens\":1e18}", 400, "max_tokens"},
    {COMPLETIONS, "{" P ",\"max_tokens\":99999999999999999999999}", 400, "max_tokens"},
    {COMPLETIONS, "{" P ",\"n\":0}", 400, "n"},
    {COMPLETIONS, "{" P ",\"n\":129}", 400, "n"},
    {COMPLETIONS, "{" P ",\"n\":2,\"best_of\":1}", 400, "best_of"},
    {COMPLETIONS, "{" P ",\"best_of\":2,\"stream\":true}", 400, "best_of"},
    {COMPLETIONS, "{" P ",\"temperature\":-1}", 400, "temperature"},
    {COMPLETIONS, "{" P ",\"temperature\":2.5}", 400, "temperature"},
    {COMPLETIONS, "{" P ",\"temperature\":[]}", 400, "temperature"},
    {COMPLETIONS, "{" P ",\"top_p\":-0.5}", 400, "top_p"},
    {COMPLETIONS, "{" P ",\"top_k\":-5}", 400, "top_k"},
    {COMPLETIONS, "{" P ",\"min_p\":2}", 400, "min_p"},
    {COMPLETIONS, "{" P ",\"typical_p\":0}", 400, "typical_p"},
    {COMPLETIONS, "{" P ",\"typical_p\":1e-60}", 400, "typical_p"},
    {COMPLETIONS, "{" P ",\"repetition_penalty\":5e-324}", 400, "repetition_penalty"},
    {COMPLETIONS, "{" P ",\"repetition_penalty\":1e-30}", 400, "repetition_penalty"},
    {COMPLETIONS, "{" P ",\"repetition_penalty\":-1}", 400, "repetition_penalty"},
    {COMPLETIONS, "{" P ",\"presence_penalty\":2.5}", 400, "presence_penalty"},
    {COMPLETIONS, "{" P ",\"frequency_penalty\":-3}", 400, "frequency_penalty"},
    {COMPLETIONS, "{" P ",\"seed\":1.25}", 400, "seed"},
    {COMPLETIONS, "{" P ",\"seed\":99999999999999999999}", 400, "seed"},
    {COMPLETIONS, "{" P ",\"logprobs\":-1}", 400, "logprobs"},
    {COMPLETIONS, "{" P ",\"logprobs\":21}", 400, "logprobs"},
    {COMPLETIONS, "{" P ",\"echo\":1}", 400, "echo"},
    {COMPLETIONS, "{" P ",\"stream\":\"true\"}", 400, "stream"},
    {COMPLETIONS, "{" P ",\"stream_options\":{}}", 400, "stream_options"},
    {COMPLETIONS, "{" P ",\"stop\":\"\"}", 400, "stop"},
    {COMPLETIONS, "{" P ",\"stop\":[\"1\",\"2\",\"3\",\"4\",\"5\"]}", 400, "stop"},
    {COMPLETIONS, "{" P ",\"stop\":{}}", 400, "stop"},
    {COMPLETIONS, "{" P ",\"stop_token_ids\":[99999]}", 400, "stop_token_ids[0]"},
    {COMPLETIONS, "{" P ",\"logit_bias\":{\"x\":1}}", 400, "logit_bias.x"},
    {COMPLETIONS, "{" P ",\"logit_bias\":{\"9000\":1}}", 400, "logit_bias.9000"},
    {COMPLETIONS, "{" P ",\"logit_bias\":{\"5\":-101}}", 400, "logit_bias.5"},
    {COMPLETIONS, "{" P ",\"min_tokens\":20,\"max_tokens\":10}", 400, "min_tokens"},
    {COMPLETIONS, "{" P ",\"suffix\":\"x\"}", 400, "suffix"},
    {COMPLETIONS, "{" P ",\"response_format\":{\"type\":\"json_schema\"}}", 400,
     "response_format.type"},
    {CHAT, "{}", 400, "messages"},
    {CHAT, "{\"messages\":[]}", 400, "messages"},
    {CHAT, "{\"messages\":\"x\"}", 400, "messages"},
    {CHAT, "{\"messages\":[null]}", 400, "messages[0]"},
    {CHAT, "{\"messages\":[{\"role\":\"user\"}]}", 400, "messages[0].content"},
    {CHAT, "{\"messages\":[{\"content\":\"x\"}]}", 400, "messages[0].role"},
    {CHAT, "{\"messages\":[{\"role\":\"tool\",\"content\":\"x\"}]}", 400, "messages[0].role"},
    {CHAT,
     "{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"image_url\",\"image_url\":{}}]}]}",
     400, "messages[0].content[0].type"},
    {CHAT, "{" M ",\"max_tokens\":0}", 400, "max_tokens"},
    {CHAT, "{" M ",\"max_tokens\":1,\"max_completion_tokens\":1}", 400, "max_tokens"},
    {CHAT, "{" M ",\"top_logprobs\":5}", 400, "top_logprobs"},
    {CHAT, "{" M ",\"logprobs\":5}", 400, "logprobs"},
    {CHAT, "{" M ",\"tools\":[{}]}", 400, "tools"},
    {CHAT, "{" M ",\"add_generation_prompt\":true,\"continue_final_message\":true}", 400,
     "continue_final_message"},
    {CHAT, "{" M ",\"model\":\"other\"}", 404, "model"},
    {"/tokenize", "{}", 400, "prompt"},
    {"/tokenize", "{\"prompt\":5}", 400, "prompt"},
    {"/tokenize", "{" P ",\"model\":\"other\"}", 404, "model"},
    {"/detokenize", "{}", 400, "tokens"},
    {"/detokenize", "{\"tokens\":[\"a\"]}", 400, "tokens[0]"},
    {"/detokenize", "{\"tokens\":[8192]}", 400, "tokens[0]"},
};

static void test_bad_input(void **state)
{
    (void)state;
    for (size_t i = 0; i < COUNT_OF(bad_inputs); i++) {
        struct reply reply;
        client_post(&server, bad_inputs[i].path, bad_inputs[i].body, &reply);
        if (reply.code != bad_inputs[i].code)
            fail_msg("%s: %d %s", bad_inputs[i].body, reply.code, reply.body.data);
        assert_error_object(&reply, bad_inputs[i].code, "invalid_request_error", NULL);
        cJSON *v = parse(reply.body.data, reply.body.n);
        const cJSON *param = get(v, "error.param");
        const char *expected = bad_inputs[i].param;
        if (expected ? !cJSON_IsString(param) || strcmp(param->valuestring, expected)
                     : !cJSON_IsNull(param))
            fail_msg("%s: param is not %s in %s", bad_inputs[i].body, expected, reply.body.data);
        cJSON_Delete(v);
        reply_free(&reply);
    }
    cJSON_Delete(post(COMPLETIONS, "{" P ",\"max_tokens\":1}")); /* and it still answers */
}

/* A long stream that others cannot tell from any other client's. */
struct watched {
    const char *body;
    struct reply reply;
    atomic_bool done;
};

static void *run_watched(void *context)
{
    struct watched *w = context;
    client_post(&server, COMPLETIONS, w->body, &w->reply);
    atomic_store(&w->done, true);
    return NULL;
}

/* While bad requests are refused, a stream goes on: whole, and token for token as it is alone. */
static void test_bad_input_beside_a_stream(void **state)
{
    (void)state;
    struct watched w = {.body = "{\"prompt\":\"A\",\"max_tokens\":500,\"seed\":7," LIVELY
                                ",\"stream\":true}"};
    struct streamed alone, beside;
    stream(&alone, COMPLETIONS, "%s", w.body);
    pthread_t thread;
    assert_false(pthread_create(&thread, NULL, run_watched, &w));
    bool as_expected = true;
    for (size_t i = 0; as_expected && (i < COUNT_OF(bad_inputs) || !atomic_load(&w.done)); i++) {
        struct reply reply;
        const size_t k = i % COUNT_OF(bad_inputs);
        client_post(&server, bad_inputs[k].path, bad_inputs[k].body, &reply);
        as_expected = reply.code == bad_inputs[k].code;
        reply_free(&reply);
    }
    pthread_join(thread, NULL);
    assert_true(as_expected);
    take_stream(&beside, &w.reply);
    assert_true(beside.done);
    assert_string_equal(beside.finish[0], "length");
    assert_string_equal(beside.text[0], alone.text[0]);
    streamed_free(&alone);
    streamed_free(&beside);
}

static void test_deep_nesting(void **state)
{
    (void)state;
    char *body = malloc(200100);
    strcpy(body, "{\"prompt\":\"x\",\"z\":");
    size_t n = strlen(body);
    memset(body + n, '[', 200000);
    body[n + 200000] = '\0';
    struct reply reply;
    client_post(&server, COMPLETIONS, body, &reply);
    assert_error_object(&reply, 400, "invalid_request_error", NULL);
    reply_free(&reply);
    free(body);
}

/* ---- servers with other options
 * ------------------------------------------------------------------ */

static void test_unknown_fields(void **state)
{
    (void)state;
    double before = server_metric(&server, "latte_unknown_request_fields_total");
    cJSON_Delete(post(COMPLETIONS, "{" P ",\"max_tokens\":1,\"foo\":1,\"bar\":{}}"));
    assert_true(server_metric(&server, "latte_unknown_request_fields_total") == before + 2);
    struct server strict;
    server_start(&strict, (const char *const[]){"--strict-fields", NULL});
    struct reply reply;
    client_post(&strict, COMPLETIONS, "{" P ",\"foo\":1}", &reply);
    assert_error_object(&reply, 400, "invalid_request_error", "unknown_parameter");
    assert_non_null(strstr(reply.body.data, "\"param\":\"foo\""));
    reply_free(&reply);
    server_stop(&strict);
}

static void test_limits(void **state)
{
    (void)state;
    struct server s;
    server_start(&s, (const char *const[]){"--max-prompt-tokens", "20", "--max-tokens-limit", "50",
                                           "--max-choices", "4", "--default-max-tokens", "7",
                                           "--served-model-name", "some/name", NULL});
    static const struct {
        const char *path, *body, *code, *param;
    } cases[] = {
        {COMPLETIONS,
         "{\"prompt\":\"one two three four five six seven eight nine ten eleven twelve thirteen "
         "fourteen fifteen sixteen seventeen eighteen nineteen twenty twenty-one\"}",
         "context_length_exceeded", "prompt"},
        {COMPLETIONS, "{\"prompt\":[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1]}",
         "context_length_exceeded", "prompt"},
        {CHAT,
         "{\"messages\":[{\"role\":\"user\",\"content\":\"one two three four five six seven eight "
         "nine ten eleven twelve thirteen fourteen fifteen sixteen\"}]}",
         "context_length_exceeded", "messages"},
        {COMPLETIONS, "{" P ",\"max_tokens\":51}", "integer_above_max_value", "max_tokens"},
        {COMPLETIONS, "{" P ",\"n\":5}", "integer_above_max_value", "n"},
        {COMPLETIONS, "{\"prompt\":[\"a\",\"b\",\"c\"],\"n\":2}", "integer_above_max_value", "n"},
        {COMPLETIONS, "{\"prompt\":[\"a\",\"b\",\"c\",\"d\",\"e\"]}", "array_above_max_length",
         "prompt"},
    };
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        struct reply reply;
        client_post(&s, cases[i].path, cases[i].body, &reply);
        assert_error_object(&reply, 400, "invalid_request_error", cases[i].code);
        cJSON *v = parse(reply.body.data, reply.body.n);
        assert_string_equal(get_text(v, "error.param"), cases[i].param);
        cJSON_Delete(v);
        reply_free(&reply);
    }
    cJSON *v = post_to(&s, CHAT, "{" M ",\"ignore_eos\":true,\"model\":\"some/name\"}");
    assert_int_equal(get_int(v, "usage.completion_tokens"), 7);
    assert_string_equal(get_text(v, "model"), "some/name");
    cJSON_Delete(v);
    struct reply reply;
    client_get(&s, "/v1/models/some/name", &reply);
    assert_int_equal(reply.code, 200);
    reply_free(&reply);
    server_stop(&s);
}

/* POST to completions on a connection of its own, left open. */
static int raw_post(const struct server *s, const char *body)
{
    char head[200];
    int n =
        snprintf(head, sizeof(head),
                 "POST " COMPLETIONS " HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                 "Content-Length: %zu\r\n\r\n",
                 strlen(body));
    int fd = raw_connect(s);
    raw_write(fd, head, (size_t)n);
    raw_write(fd, body, strlen(body));
    return fd;
}

/* A request for as many tokens as n, given as ids. */
static void write_long_request(struct bytes *out, size_t n, const char *rest)
{
    bytes_text(out, "{\"prompt\":[5");
    for (size_t i = 1; i < n; i++)
        bytes_text(out, ",5");
    bytes_format(out, "],%s}", rest);
    assert_false(out->failed);
}

/* Prompts count against --max-buffered-mb as long as their requests live, once for all choices. */
static void test_prompt_memory(void **state)
{
    (void)state;
    struct server s;
    server_start(&s, (const char *const[]){"--max-slots", "1", "--max-buffered-mb", "3", NULL});
    struct bytes half = {0}, whole = {0};
    write_long_request(&half, 400000, "\"n\":8,\"max_tokens\":1"); /* 1.6 MB */
    write_long_request(&whole, 800000, "\"max_tokens\":1");        /* 3.2 MB */
    struct reply reply;
    client_post(&s, COMPLETIONS, whole.data, &reply); /* would never fit */
    assert_error_object(&reply, 413, "invalid_request_error", NULL);
    reply_free(&reply);
    for (int round = 0; round < 2; round++) { /* what was held is given back */
        int first = raw_post(&s, half.data);
        assert_true(server_await_metric(&s, "latte_requests_waiting", 7, 30000));
        client_post(&s, COMPLETIONS, half.data, &reply);
        assert_error_object(&reply, 429, "rate_limit_error", NULL);
        reply_free(&reply);
        close(first);
        assert_true(server_await_metric(&s, "latte_requests_running", 0, 30000));
    }
    bytes_free(&half);
    bytes_free(&whole);
    server_stop(&s);
}

/* One slot, two places in the queue: what does not fit is refused at once, nothing lingers. */
static void test_queue_full(void **state)
{
    (void)state;
    struct server s;
    server_start(&s, (const char *const[]){"--max-slots", "1", "--max-queue", "2", NULL});
    int running = raw_post(&s, "{" ENDLESS "}");
    assert_true(server_await_metric(&s, "latte_requests_running", 1, 30000));
    int waiting = raw_post(&s, "{" ENDLESS "}");
    assert_true(server_await_metric(&s, "latte_requests_waiting", 1, 30000));
    struct reply reply;
    client_post(&s, COMPLETIONS, "{" P ",\"n\":2}", &reply);
    assert_error_object(&reply, 429, "rate_limit_error", NULL);
    char after[32];
    assert_true(reply_header(&reply, "Retry-After", after, sizeof(after)));
    reply_free(&reply);
    assert_true(server_metric(&s, "latte_queue_rejections_total") == 1);
    /* Of the refused request nothing is left in the queue. */
    assert_true(server_await_metric(&s, "latte_requests_waiting", 1, 30000));
    /* What never has room is not told to come again. */
    client_post(&s, COMPLETIONS, "{" P ",\"n\":3}", &reply);
    assert_error_object(&reply, 400, "invalid_request_error", "integer_above_max_value");
    reply_free(&reply);
    close(running);
    close(waiting);
    assert_true(server_await_metric(&s, "latte_requests_running", 0, 30000));
    cJSON_Delete(post_to(&s, COMPLETIONS, "{" P ",\"n\":2,\"max_tokens\":2}"));
    server_stop(&s);
}

static void test_request_timeout(void **state)
{
    (void)state;
    struct server s;
    server_start(&s, (const char *const[]){"--request-timeout", "1", "--max-tokens-limit",
                                           "1000000000", NULL});
    struct reply reply;
    client_post(&s, COMPLETIONS, "{" P ",\"max_tokens\":1000000000,\"ignore_eos\":true}", &reply);
    assert_error_object(&reply, 504, "server_error", NULL);
    reply_free(&reply);
    /* A stream that has begun ends with an error event, and no [DONE]. */
    struct streamed st;
    stream_from(&s, &st, COMPLETIONS,
                "{" P ",\"max_tokens\":1000000000,\"ignore_eos\":true,\"stream\":true}");
    assert_non_null(st.error);
    assert_false(st.done);
    assert_string_equal(get_text(st.error, "error.type"), "server_error");
    streamed_free(&st);
    server_stop(&s);
}

static bool hang_up(void *context, const char *data, size_t n)
{
    (void)data;
    *(size_t *)context += n;
    return false;
}

/* A client that leaves frees its slots; so does one that never gets to see a token. */
static void test_hang_up(void **state)
{
    (void)state;
    size_t n_seen = 0;
    const char *body = "{" P ",\"max_tokens\":900000,\"ignore_eos\":true,\"n\":3,\"stream\":true}";
    struct client_request request = {
        .path = COMPLETIONS, .body = body, .on_data = hang_up, .context = &n_seen};
    struct reply reply;
    client_send(&server, &request, &reply);
    assert_true(n_seen > 0);
    reply_free(&reply);
    assert_true(server_await_metric(&server, "latte_requests_running", 0, 10000));
    request =
        (struct client_request){.path = COMPLETIONS,
                                .body = "{" P ",\"max_tokens\":900000,\"ignore_eos\":true,\"n\":3}",
                                .timeout_ms = 200};
    client_send(&server, &request, &reply);
    assert_int_equal(reply.code, 0);
    reply_free(&reply);
    assert_true(server_await_metric(&server, "latte_requests_running", 0, 10000));
    /* Gone while a worker has the body. */
    char *text = long_prompt(50000);
    struct bytes large = {0};
    bytes_format(&large,
                 "POST " COMPLETIONS " HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                 "Content-Length: %zu\r\n\r\n{\"prompt\":\"%s\"}",
                 strlen(text) + 13, text);
    for (int i = 0; i < 5; i++) {
        int fd = raw_connect(&server);
        raw_write(fd, large.data, large.n);
        sleep_ms(i);
        close(fd);
    }
    bytes_free(&large);
    free(text);
    cJSON_Delete(post(COMPLETIONS, "{" P ",\"max_tokens\":1}"));
    assert_true(server_await_metric(&server, "latte_requests_running", 0, 10000));
}

/* A model without a chat template, or with one that nobody knows, completes but does not chat. */
static void test_no_template(void **state)
{
    (void)state;
    static const char *const configs[] = {"{}", "{\"chat_template\":\"{{ something(else) }}\"}"};
    for (size_t i = 0; i < COUNT_OF(configs); i++) {
        char dir[160];
        struct server s;
        struct reply reply;
        make_tiny_model(dir, sizeof(dir));
        test_file_write(dir, "tokenizer_config.json", configs[i], strlen(configs[i]));
        server_start(&s, (const char *const[]){"--model", dir, NULL});
        cJSON_Delete(post_to(&s, COMPLETIONS, "{" P ",\"max_tokens\":1}"));
        client_post(&s, CHAT, "{" M "}", &reply);
        assert_error_object(&reply, 400, "invalid_request_error", NULL);
        assert_non_null(strstr(reply.body.data, "template"));
        reply_free(&reply);
        server_stop(&s);
        test_dir_remove(dir);
    }
}

/* A template whose turns end with no token of their own: their texts end the answer. */
static void test_plain_template(void **state)
{
    (void)state;
    static const char config[] =
        "{\"chat_template\":\"{% for message in messages %}{{ message['role'] + ': ' + "
        "message['content'] + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ "
        "'assistant:' }}{% endif %}\"}";
    char dir[160];
    struct server s;
    make_tiny_model(dir, sizeof(dir));
    test_file_write(dir, "tokenizer_config.json", config, strlen(config));
    server_start(&s, (const char *const[]){"--model", dir, NULL});
    for (int ignore = 0; ignore < 2; ignore++) {
        /* Nothing but three tokens in any order, until they happen to say "\nuser:". */
        cJSON *v = post_to(
            &s, CHAT,
            "{" M ",\"max_tokens\":400,\"temperature\":2,\"frequency_penalty\":0.5,\"seed\":1,"
            "\"ignore_eos\":%s,"
            "\"logit_bias\":{\"%d\":100,\"%d\":100,\"%d\":100}}",
            ignore ? "true" : "false", id_of("\\n"), id_of("user"), id_of(":"));
        const char *text = get_text(v, "choices.0.message.content");
        assert_int_equal(strstr(text, "\nuser:") != NULL, ignore);
        assert_string_equal(get_text(v, "choices.0.finish_reason"), ignore ? "length" : "stop");
        cJSON_Delete(v);
    }
    server_stop(&s);
    test_dir_remove(dir);
}

/* A stream that waits long for its first token begins without it, and is kept alive. When the
 * one in front of it leaves, it goes on. */
static void test_waiting_stream(void **state)
{
    (void)state;
    struct server s;
    server_start(&s, (const char *const[]){"--max-slots", "1", "--keepalive-interval", "1", NULL});
    struct bytes first_out = {0}, out = {0};
    int first = raw_post(&s, "{" ENDLESS "}");
    assert_true(raw_await(first, &first_out, "data: ", 30000));
    int fd = raw_post(&s, "{" P ",\"max_tokens\":3,\"ignore_eos\":true,\"stream\":true}");
    assert_true(raw_await(fd, &out, ": keep-alive", 30000));
    assert_true(!strncmp(out.data, "HTTP/1.1 200", 12));
    const char *caching = strstr(out.data, "Cache-Control: no-store");
    assert_non_null(caching);
    assert_null(strstr(caching + 1, "Cache-Control"));
    assert_null(strstr(out.data, "data: "));
    close(first);
    assert_true(raw_await(fd, &out, "data: [DONE]", 30000));
    close(fd);
    bytes_free(&out);
    bytes_free(&first_out);
    server_stop(&s);
}

/* The end of the access log tells tokens as usage does; -1: the line has none. */
static void assert_logged_tokens(int prompt, int output)
{
    char tokens[80] = "";
    if (prompt >= 0)
        snprintf(tokens, sizeof(tokens), ",\"prompt_tokens\":%d,\"output_tokens\":%d", prompt,
                 output);
    bool found = false;
    for (int i = 0; i < 500 && !found; i++, sleep_ms(10)) { /* written after the reply */
        char *log = server_log(&server), *line = NULL;
        for (char *at = log; (at = strstr(at, "\"route\":\"/v1/completions\"")); at++)
            line = at;
        found = line && strstr(line, tokens) && (prompt >= 0 || !strstr(line, "_tokens"));
        free(log);
    }
    assert_true(found);
}

static void test_logged_tokens(void **state)
{
    (void)state;
    cJSON_Delete(post(COMPLETIONS,
                      "{\"prompt\":[[5,6,7],[8]],\"n\":2,\"best_of\":3,\"max_tokens\":4,"
                      "\"ignore_eos\":true}"));
    assert_logged_tokens(4, 24);
    struct streamed s;
    stream(&s, COMPLETIONS,
           "{\"prompt\":[5,6],\"max_tokens\":5,\"ignore_eos\":true,\"stream\":true}");
    streamed_free(&s);
    assert_logged_tokens(2, 5);
    struct reply reply;
    client_post(&server, COMPLETIONS, "{}", &reply);
    reply_free(&reply);
    assert_logged_tokens(-1, -1);
}

static void test_metrics(void **state)
{
    (void)state;
    double prompt = server_metric(&server, "latte_prompt_tokens_total");
    double output = server_metric(&server, "latte_generation_tokens_total");
    double first = server_metric(&server, "latte_time_to_first_token_seconds_count");
    double whole = server_metric(&server, "latte_e2e_request_latency_seconds_count");
    double gaps = server_metric(&server, "latte_inter_token_latency_seconds_count");
    double replies = server_metric(&server, DURATIONS);
    cJSON_Delete(post(COMPLETIONS, "{\"prompt\":[5,6,7],\"max_tokens\":9,\"ignore_eos\":true}"));
    assert_true(server_metric(&server, "latte_prompt_tokens_total") == prompt + 3);
    assert_true(server_metric(&server, "latte_generation_tokens_total") == output + 9);
    assert_true(server_metric(&server, "latte_time_to_first_token_seconds_count") == first + 1);
    assert_true(server_metric(&server, "latte_e2e_request_latency_seconds_count") == whole + 1);
    assert_true(server_metric(&server, "latte_inter_token_latency_seconds_count") == gaps + 8);
    assert_true(server_await_metric(&server, DURATIONS, (replies < 0 ? 0 : replies) + 1, 10000));
    /* A prompt counts once; every choice is observed, and one that is left counts as such. */
    double aborted = server_metric(&server, ABORTED);
    cJSON_Delete(post(COMPLETIONS, "{\"prompt\":[5,6],\"n\":3,\"max_tokens\":2,\"stream\":false,"
                                   "\"ignore_eos\":true}"));
    assert_true(server_metric(&server, "latte_prompt_tokens_total") == prompt + 5);
    assert_true(server_metric(&server, "latte_generation_tokens_total") == output + 15);
    assert_true(server_metric(&server, "latte_time_to_first_token_seconds_count") == first + 4);
    assert_true(server_metric(&server, "latte_e2e_request_latency_seconds_count") == whole + 4);
    struct client_request request = {.path = COMPLETIONS,
                                     .body = "{" ENDLESS ",\"n\":2}",
                                     .on_data = hang_up,
                                     .context = &(size_t){0}};
    struct reply reply;
    client_send(&server, &request, &reply);
    reply_free(&reply);
    assert_true(server_await_metric(&server, ABORTED, (aborted < 0 ? 0 : aborted) + 2, 10000));
}

int main(int argc, char **argv)
{
    if (argc > 1)
        cmocka_set_test_filter(argv[1]);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_completion_shape),
        cmocka_unit_test(test_chat_shape),
        cmocka_unit_test(test_chat_chunks),
        cmocka_unit_test(test_model_list),
        cmocka_unit_test(test_usage_counts_tokens),
        cmocka_unit_test(test_tokenize),
        cmocka_unit_test(test_chat_prompts),
        cmocka_unit_test(test_stream_equals_whole),
        cmocka_unit_test(test_continuous_usage),
        cmocka_unit_test(test_utf8_pieces),
        cmocka_unit_test(test_echo_agrees_with_generation),
        cmocka_unit_test(test_echo),
        cmocka_unit_test(test_top_logprobs),
        cmocka_unit_test(test_best_of),
        cmocka_unit_test(test_choices_differ),
        cmocka_unit_test(test_many_prompts),
        cmocka_unit_test(test_stop_strings),
        cmocka_unit_test(test_end_tokens),
        cmocka_unit_test(test_skip_special),
        cmocka_unit_test(test_penalties),
        cmocka_unit_test(test_logit_bias),
        cmocka_unit_test(test_greedy_forms),
        cmocka_unit_test(test_seeds_under_load),
        cmocka_unit_test(test_large_bodies),
        cmocka_unit_test(test_bad_input),
        cmocka_unit_test(test_bad_input_beside_a_stream),
        cmocka_unit_test(test_deep_nesting),
        cmocka_unit_test(test_unknown_fields),
        cmocka_unit_test(test_limits),
        cmocka_unit_test(test_prompt_memory),
        cmocka_unit_test(test_queue_full),
        cmocka_unit_test(test_request_timeout),
        cmocka_unit_test(test_no_template),
        cmocka_unit_test(test_plain_template),
        cmocka_unit_test(test_hang_up),
        cmocka_unit_test(test_waiting_stream),
        cmocka_unit_test(test_logged_tokens),
        cmocka_unit_test(test_metrics),
    };
    return cmocka_run_group_tests(tests, start_server, stop_server);
}
