/* test_prefixes.c - prompts that are read once: choices that share one, and requests that begin
 * with what earlier ones began with. The oracle is the same server reading the whole prompt: a
 * repetition penalty next to none makes it do that. */
#include "tests/http/harness.h"

#include <cjson/cJSON.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define COMPLETIONS "/v1/completions"
#define CHAT "/v1/chat/completions"
/* As if there were no penalty, but every token must be seen. */
#define WHOLE "\"repetition_penalty\":1.0000001"
#define LIVELY "\"temperature\":1.5,\"ignore_eos\":true"
/* Long enough to be worth sharing. */
#define STORY                                                                                      \
    "Once upon a time there was a little girl who had a red ball and a small brown dog. Every "    \
    "day they went to the park, and every day the dog ran after the ball until the sun was low. "

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

#define post(...) post_to(&server, __VA_ARGS__)

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

/* Prompt tokens that the model has read so far. */
static int n_read(void)
{
    return (int)server_metric(&server, "latte_engine_prompt_tokens_total");
}

/* All choices, apart from the ids and times of the replies. */
static void assert_same_choices(const cJSON *a, const cJSON *b)
{
    if (!cJSON_Compare(member(a, "choices"), member(b, "choices"), true))
        fail_msg("%s\nis not\n%s", cJSON_PrintUnformatted(a), cJSON_PrintUnformatted(b));
    assert_int_equal(usage(a, "prompt_tokens"), usage(b, "prompt_tokens"));
    assert_int_equal(usage(a, "completion_tokens"), usage(b, "completion_tokens"));
}

/* ---- choices --------------------------------------------------------------------------------- */

/* Choices of one prompt give what each gives that reads the prompt itself, and the prompt is read
 * once. */
static void test_choices_share_a_prompt(void **state)
{
    (void)state;
    static const char *const cases[][2] = {
        {COMPLETIONS, "\"prompt\":\"" STORY "\",\"n\":5"},
        {COMPLETIONS, "\"prompt\":\"" STORY "\",\"n\":2,\"best_of\":6"},
        {COMPLETIONS, "\"prompt\":\"" STORY "\",\"n\":3,\"presence_penalty\":1.5"},
        {COMPLETIONS, "\"prompt\":\"" STORY "\",\"n\":3,\"echo\":true"},
        {COMPLETIONS, "\"prompt\":[\"" STORY "\",\"short\",\"Two. " STORY "\"],\"n\":3"},
        {CHAT, "\"messages\":[{\"role\":\"user\",\"content\":\"" STORY "\"}],\"n\":4"},
    };
    static const int n_choices[] = {5, 6, 3, 3, 3, 4}, n_forked[] = {1, 1, 1, 1, 2, 1};
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        cJSON *whole = post(cases[i][0], "{%s,\"max_tokens\":9,\"seed\":%zu," LIVELY "," WHOLE "}",
                            cases[i][1], i);
        int before = n_read();
        cJSON *shared =
            post(cases[i][0], "{%s,\"max_tokens\":9,\"seed\":%zu," LIVELY "}", cases[i][1], i);
        int read = n_read() - before, n_prompt = usage(shared, "prompt_tokens");
        assert_same_choices(shared, whole);
        if (read > n_prompt + n_forked[i] * (n_choices[i] - 1) + 2 * 4) /* the short prompt's */
            fail_msg("case %zu: %d tokens read for a prompt of %d", i, read, n_prompt);
        cJSON_Delete(shared);
        cJSON_Delete(whole);
    }
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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_choices_share_a_prompt),
        cmocka_unit_test(test_choices_with_scores),
    };
    return cmocka_run_group_tests(tests, start_server, stop_server);
}
