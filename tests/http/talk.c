/* talk.c - see talk.h */
#include "tests/http/talk.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- answers ---- */

struct answer answer_of(const struct server *s, const char *method, const char *path, char *body,
                        const char *header)
{
    const char *const headers[] = {header, NULL};
    struct client_request request = {
        .method = method, .path = path, .body = body, .headers = header ? headers : NULL};
    struct reply reply;
    struct answer a = {0};
    client_send(s, &request, &reply);
    a.code = reply.code;
    a.json = reply.body.n ? cJSON_ParseWithLength(reply.body.data, reply.body.n) : NULL;
    if (!reply_header(&reply, "ETag", a.etag, sizeof(a.etag)))
        *a.etag = 0;
    reply_free(&reply);
    free(body);
    return a;
}

void answer_expect(const struct answer *a, int code)
{
    if (a->code != code)
        fail_msg("status %d, expected %d: %s", a->code, code, cJSON_PrintUnformatted(a->json));
}

void answer_free(struct answer *a)
{
    cJSON_Delete(a->json);
    a->json = NULL;
}

const cJSON *answer_member(const cJSON *v, const char *name)
{
    const cJSON *found = cJSON_GetObjectItemCaseSensitive(v, name);
    if (!found)
        fail_msg("no %s in %s", name, cJSON_PrintUnformatted(v));
    return found;
}

char *text_of(const char *format, ...)
{
    char *text = NULL;
    va_list args;
    va_start(args, format);
    assert_true(vasprintf(&text, format, args) >= 0);
    va_end(args);
    return text;
}

static char *print_ids(const int32_t *ids, int n)
{
    cJSON *array = cJSON_CreateIntArray(ids, n);
    char *text = cJSON_PrintUnformatted(array);
    cJSON_Delete(array);
    return text;
}

int read_ids(const cJSON *array, int32_t *out, int max)
{
    int n = 0;
    const cJSON *item;
    cJSON_ArrayForEach(item, array)
    {
        assert_true(n < max);
        out[n++] = item->valueint;
    }
    return n;
}

static int read_choice(const struct answer *a, int32_t *out, int max)
{
    const cJSON *choice = cJSON_GetArrayItem(answer_member(a->json, "choices"), 0);
    return read_ids(answer_member(choice, "token_ids"), out, max);
}

/* ---- talks ---- */

void talk_open(struct talk *t, const struct server *s, const char *header)
{
    struct answer a =
        answer_of(s, "POST", "/v1/sessions", strdup("{\"metadata\":{\"k\":\"v\"}}"), header);
    answer_expect(&a, 200);
    *t = (struct talk){0};
    snprintf(t->id, sizeof(t->id), "%s", answer_member(a.json, "id")->valuestring);
    answer_free(&a);
}

struct answer talk_ask(const struct talk *t, const struct server *s, const char *method,
                       const char *what, const char *body, const char *header)
{
    char path[160];
    snprintf(path, sizeof(path), "/v1/sessions/%.63s%.40s", t->id, what);
    return answer_of(s, method, path, body ? strdup(body) : NULL, header);
}

void talk_do(const struct talk *t, const struct server *s, const char *method, const char *what,
             const char *body, int code)
{
    struct answer a = talk_ask(t, s, method, what, body, NULL);
    answer_expect(&a, code);
    answer_free(&a);
}

int talk_prompt(int32_t ids[TALK_PROMPT], int seed)
{
    int n = 1 + seed * 3 % 7;
    for (int i = 0; i < n; i++)
        ids[i] = 280 + (seed * 41 + i * 13) % 600;
    return n;
}

char *talk_body(const struct talk *t, const int32_t *prompt, int n, int max_tokens,
                const char *more)
{
    char *ids = print_ids(prompt, n);
    char *body =
        text_of("{\"session_id\":\"%s\",\"prompt\":%s,\"max_tokens\":%d,\"temperature\":0,"
                "\"ignore_eos\":true,\"repetition_penalty\":1,\"return_token_ids\":true%s}",
                t->id, ids, max_tokens, more);
    free(ids);
    return body;
}

void talk_append(struct talk *t, const int32_t *ids, int n)
{
    assert_true(t->n + n <= TALK_MAX_IDS);
    memcpy(t->ids + t->n, ids, (size_t)n * sizeof(*ids));
    t->n += n;
}

int talk_turn(struct talk *t, const struct server *s, int seed, int max_tokens, const char *more,
              const char *header)
{
    int32_t prompt[TALK_PROMPT];
    int n = talk_prompt(prompt, seed);
    struct answer a =
        answer_of(s, "POST", "/v1/completions", talk_body(t, prompt, n, max_tokens, more), header);
    int code = a.code;
    if (code == 200) {
        const cJSON *session = answer_member(a.json, "session");
        talk_append(t, prompt, n);
        t->n += read_choice(&a, t->ids + t->n, TALK_MAX_IDS - t->n);
        assert_int_equal(answer_member(session, "position")->valueint, t->n);
        assert_int_equal(answer_member(session, "version")->valueint, ++t->version);
    }
    answer_free(&a);
    return code;
}

int talk_once(const struct server *s, const int32_t *ids, int n, int max_tokens, int32_t *out)
{
    char *list = print_ids(ids, n);
    struct answer a =
        answer_of(s, "POST", "/v1/completions",
                  text_of("{\"prompt\":%s,\"max_tokens\":%d,\"temperature\":0,"
                          "\"ignore_eos\":true,\"repetition_penalty\":1,\"return_token_ids\":true}",
                          list, max_tokens),
                  NULL);
    answer_expect(&a, 200);
    int n_out = read_choice(&a, out, max_tokens);
    answer_free(&a);
    free(list);
    return n_out;
}

void talk_check(struct talk *t, const struct server *s, int seed, const char *header)
{
    enum { N = 4 };
    int32_t said[N];
    struct answer a = talk_ask(t, s, "GET", "", NULL, header);
    answer_expect(&a, 200);
    assert_int_equal(answer_member(a.json, "position")->valueint, t->n);
    assert_int_equal(answer_member(a.json, "version")->valueint, t->version);
    answer_free(&a);
    int before = t->n;
    assert_int_equal(talk_turn(t, s, seed, N, "", header), 200);
    assert_true(t->n - N > before);
    if (header)
        return; /* what follows would need the key as well */
    assert_int_equal(talk_once(s, t->ids, t->n - N, N, said), N);
    assert_memory_equal(said, t->ids + t->n - N, sizeof(said));
}
