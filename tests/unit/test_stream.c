/* test_stream.c - tokens to text and events, against decoding everything at once.
 *
 * The engine is played by the test: it puts tokens into the jobs that a generation submits.
 */
#include "tests/unit/unit.h"

#include <cjson/cJSON.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/utf8.h"
#include "server/http.h"
#include "server/output.h"
#include "server/stream.h"
#include "tests/unit/fail_alloc.h"

#define TOKENIZER "weights/latte-12m/tokenizer.json"
enum { EOS = 0, IM_START = 1, IM_END = 2, MAX_TOKENS = 64 };

static struct tokenizer *tokenizer;
static uint64_t random_state = 1;

static uint32_t random_below(uint32_t n)
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(random_state >> 33) % n;
}

static int open_tokenizer(void **state)
{
    (void)state;
    struct error err;
    if (tokenizer_open(&tokenizer, TOKENIZER, &err)) {
        print_error("%s\n", err.text);
        return -1;
    }
    return 0;
}

static int close_tokenizer(void **state)
{
    (void)state;
    tokenizer_close(tokenizer);
    return 0;
}

static int32_t id_of(const char *text)
{
    int32_t id = tokenizer_find(tokenizer, text, strlen(text));
    assert_true(id >= 0);
    return id;
}

/* ---- the oracle ------------------------------------------------------------------------------ */

/* The text of ids, cut at the first stop string to become complete (of two, the longer). */
static void expected_text(const int32_t *ids, size_t n, const struct codec_request *q,
                          struct bytes *out)
{
    struct error err;
    out->n = 0;
    assert_int_equal(tokenizer_decode(tokenizer, ids, n, true, out, &err), STATUS_OK);
    for (size_t end = 1; end <= out->n; end++) {
        size_t longest = 0;
        for (int j = 0; j < q->n_stops; j++) {
            size_t m = q->stops[j].n;
            if (m <= end && m > longest && !memcmp(out->data + end - m, q->stops[j].data, m))
                longest = m;
        }
        if (longest) {
            out->n = q->include_stop ? end : end - longest;
            return;
        }
    }
}

/* Tokens that make stop strings likely: two letters, a space, parts of characters, others. */
static int32_t random_token(void)
{
    switch (random_below(8)) {
    case 0:
    case 1:
        return id_of("a");
    case 2:
    case 3:
        return id_of("b");
    case 4:
        return 100 + (int32_t)random_below(160); /* bytes of characters, mostly */
    case 5:
        return IM_START;
    default:
        return 300 + (int32_t)random_below(7000);
    }
}

static void random_stops(struct codec_request *q, const struct bytes *text, char store[4][16])
{
    q->n_stops = (int)random_below(CODEC_MAX_STOPS + 1);
    for (int j = 0; j < q->n_stops; j++) {
        size_t n = 1 + random_below(6);
        if (text->n > 8 && random_below(2)) { /* whole characters out of the text itself */
            size_t at = random_below((uint32_t)(text->n - 8));
            while ((text->data[at] & 0xc0) == 0x80)
                at++;
            while (at + n < text->n && (text->data[at + n] & 0xc0) == 0x80)
                n++;
            memcpy(store[j], text->data + at, n);
        } else {
            for (size_t i = 0; i < n; i++)
                store[j][i] = random_below(2) ? 'a' : 'b';
        }
        q->stops[j] = (struct codec_text){store[j], n};
    }
}

static struct output_options options_of(const struct stop_rules *rules, int64_t n_logprobs)
{
    return (struct output_options){
        .api = CODEC_COMPLETIONS,
        .tokenizer = tokenizer,
        .rules = rules,
        .skip_special = true,
        .ids = true,
        .n_logprobs = n_logprobs,
    };
}

/* Whatever stop strings there are and whenever text is taken, the texts put together are the
 * expected one, made of whole characters, and never show a part of a stop string. */
static void test_stop_strings(void **state)
{
    (void)state;
    struct bytes all = {0}, expected = {0}, got = {0};
    int n_stopped = 0;
    for (int round = 0; round < 3000; round++) {
        int32_t ids[MAX_TOKENS];
        size_t n = 1 + random_below(MAX_TOKENS - 1);
        for (size_t i = 0; i < n; i++)
            ids[i] = random_token();
        struct codec_request q = {.include_stop = random_below(2)};
        char store[4][16];
        expected_text(ids, n, &q, &all);
        random_stops(&q, &all, store);
        expected_text(ids, n, &q, &expected);
        static struct stop_rules rules;
        stop_rules_init(&rules, &q, NULL, 0);
        struct output_options options = options_of(&rules, -1);
        struct output o;
        output_init(&o, &options, NULL, 0);
        got.n = 0;
        size_t n_pushed = 0;
        for (; n_pushed < n && !o.stopped; n_pushed++) {
            output_push(&o, &(struct job_token){.token = ids[n_pushed]});
            if (random_below(2)) {
                bytes_append(&got, o.text.data, o.ready);
                assert_int_equal(utf8_valid_prefix(got.data, got.n), got.n);
                assert_true(got.n <= expected.n);
                output_take(&o);
            }
        }
        if (!o.stopped)
            output_finish(&o, false);
        n_stopped += o.stopped;
        bytes_append(&got, o.text.data, o.ready);
        assert_int_equal(o.n_tokens, n_pushed);
        if (got.n != expected.n || (got.n && memcmp(got.data, expected.data, got.n)))
            fail_msg("round %d: '%s', expected '%.*s'", round, got.data, (int)expected.n,
                     expected.data);
        output_free(&o);
    }
    assert_true(n_stopped > 500 && n_stopped < 2900);
    bytes_free(&all);
    bytes_free(&expected);
    bytes_free(&got);
}

static void push_text(struct output *o, const char *text, bool one_by_one)
{
    struct token_list list = {0};
    struct error err;
    for (size_t i = 0; text[i]; i += one_by_one ? 1 : strlen(text))
        assert_int_equal(
            tokenizer_encode(tokenizer, text + i, one_by_one ? 1 : strlen(text), 0, &list, &err),
            STATUS_OK);
    for (size_t i = 0; i < list.n; i++)
        output_push(o, &(struct job_token){.token = list.ids[i], .logprob = -1});
    token_list_free(&list);
}

static void assert_ready(const struct output *o, const char *text)
{
    if (o->ready != strlen(text) || (o->ready && memcmp(o->text.data, text, o->ready)))
        fail_msg("'%.*s' is ready, expected '%s'", (int)o->ready, o->text.data, text);
}

static void test_hold_back(void **state)
{
    (void)state;
    static struct stop_rules rules;
    struct codec_request q = {.n_stops = 2, .stops = {{"STOP", 4}, {"TOTAL", 5}}};
    stop_rules_init(&rules, &q, NULL, 0);
    struct output_options options = options_of(&rules, 0);
    struct output o;
    output_init(&o, &options, NULL, 0);
    push_text(&o, "x ST", true);
    assert_ready(&o, "x ");
    push_text(&o, "E", true); /* it was no stop string after all */
    assert_ready(&o, "x STE");
    push_text(&o, " STOT", true);
    assert_ready(&o, "x STE S"); /* TOT may become TOTAL */
    push_text(&o, "AL more", true);
    assert_true(o.stopped);
    assert_ready(&o, "x STE S");
    assert_string_equal(o.lists.logprobs[0].data, "\"x\",\" \",\"S\",\"T\",\"E\",\" \",\"S\"");
    assert_string_equal(o.lists.logprobs[3].data, "0,1,2,3,4,5,6");
    assert_int_equal(o.n_tokens, 12); /* those of the stop string count */
    output_free(&o);
}

/* A token that reaches into the stop string stays in the lists; later ones do not. */
static void test_cut_token(void **state)
{
    (void)state;
    static struct stop_rules rules;
    struct codec_request q = {.n_stops = 1, .stops = {{"he", 2}}};
    stop_rules_init(&rules, &q, NULL, 0);
    struct output_options options = options_of(&rules, 0);
    struct output o;
    output_init(&o, &options, NULL, 0);
    output_push(&o, &(struct job_token){.token = id_of("a"), .logprob = -1});
    output_push(&o, &(struct job_token){.token = id_of("\xc4\xa0the"), .logprob = -1});
    assert_true(o.stopped);
    assert_ready(&o, "a t");
    assert_string_equal(o.lists.logprobs[0].data, "\"a\",\" the\"");
    output_free(&o);
}

static void test_stop_tokens(void **state)
{
    (void)state;
    static struct stop_rules rules;
    static const int32_t eos[] = {EOS, IM_END};
    int32_t a = id_of("a"), b = id_of("b");
    static const struct {
        bool include, ignore_eos, by_token;
        const char *text;
    } cases[] = {
        {false, false, true, "a"}, /* b is the stop token */
        {true, false, true, "ab"},
        {false, false, false, "ab"}, /* it came last, but the limit ended the job */
        {false, true, true, "a"},
    };
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        struct codec_request q = {.include_stop = cases[i].include,
                                  .ignore_eos = cases[i].ignore_eos,
                                  .n_stop_tokens = 1,
                                  .stop_tokens = {b}};
        stop_rules_init(&rules, &q, eos, 2);
        assert_int_equal(rules.n_tokens, cases[i].ignore_eos ? 1 : 3);
        struct output_options options = options_of(&rules, 0);
        struct output o;
        output_init(&o, &options, NULL, 0);
        output_push(&o, &(struct job_token){.token = a, .logprob = -1});
        output_push(&o, &(struct job_token){.token = b, .logprob = -1});
        output_finish(&o, cases[i].by_token);
        assert_ready(&o, cases[i].text);
        assert_int_equal(o.n_tokens, 2);
        char ids[32];
        snprintf(ids, sizeof(ids), "%d,%d", a, b); /* all that was generated */
        assert_string_equal(o.lists.ids.data, ids);
        assert_string_equal(o.lists.logprobs[0].data,
                            "\"a\",\"b\""); /* of b, which may have no text */
        assert_string_equal(o.lists.logprobs[3].data, "0,1");
        output_free(&o);
        if (i)
            continue;
        options.api = CODEC_CHAT; /* lists the content's tokens only */
        output_init(&o, &options, NULL, 0);
        output_push(&o, &(struct job_token){.token = b, .logprob = -1});
        output_finish(&o, true);
        assert_int_equal(o.lists.logprobs[0].n, 0);
        output_free(&o);
    }
}

static void test_min_tokens(void **state)
{
    (void)state;
    static struct stop_rules rules;
    struct codec_request q = {.n_stops = 1, .stops = {{"b", 1}}, .min_tokens = 3};
    stop_rules_init(&rules, &q, NULL, 0);
    struct output_options options = options_of(&rules, -1);
    struct output o;
    output_init(&o, &options, NULL, 0);
    push_text(&o, "bbabab", true);
    assert_true(o.stopped);
    assert_ready(&o, "bba");
    output_free(&o);
}

static void test_incomplete_character(void **state)
{
    (void)state;
    static struct stop_rules rules;
    struct codec_request q = {0};
    stop_rules_init(&rules, &q, NULL, 0);
    struct output_options options = options_of(&rules, -1);
    struct output o;
    struct bytes text = {0};
    struct token_list list = {0};
    struct error err;
    const char *faces = "\xf0\x9f\xab\xa0\xf0\x9f\xab\xa1"; /* rare enough to be bytes */
    assert_int_equal(tokenizer_encode(tokenizer, faces, 8, 0, &list, &err), STATUS_OK);
    assert_true(list.n > 4);
    output_init(&o, &options, NULL, 0);
    for (size_t i = 0; i + 1 < list.n; i++) {
        output_push(&o, &(struct job_token){.token = list.ids[i]});
        assert_int_equal(utf8_valid_prefix(o.text.data, o.ready), o.ready);
    }
    output_finish(&o, false);
    assert_int_equal(tokenizer_decode(tokenizer, list.ids, list.n - 1, true, &text, &err),
                     STATUS_OK);
    assert_ready(&o, text.data);
    output_free(&o);
    token_list_free(&list);
    bytes_free(&text);
}

static void test_echo_offsets(void **state)
{
    (void)state;
    static struct stop_rules rules;
    struct codec_request q = {0};
    stop_rules_init(&rules, &q, NULL, 0);
    struct output_options options = options_of(&rules, 0);
    struct output o;
    struct token_list list = {0};
    struct error err;
    const char *prompt = "na\xc3\xafve <|im_start|>caf\xc3\xa9";
    assert_int_equal(tokenizer_encode(tokenizer, prompt, strlen(prompt), 0, &list, &err),
                     STATUS_OK);
    output_init(&o, &options, list.ids, list.n);
    output_echo(&o, (struct codec_text){prompt, strlen(prompt)});
    /* A bos that the text does not contain takes no place. */
    output_push_prompt(&o, &(struct job_token){.token = EOS, .is_prompt = true, .logprob = NAN});
    for (size_t i = 0; i < list.n; i++)
        output_push_prompt(
            &o, &(struct job_token){.token = list.ids[i], .is_prompt = true, .logprob = -1});
    output_push(&o, &(struct job_token){.token = id_of("a"), .logprob = -2});
    output_finish(&o, false);
    char offsets[512];
    snprintf(offsets, sizeof(offsets), "[%s]", o.lists.logprobs[3].data);
    cJSON *v = cJSON_Parse(offsets);
    assert_int_equal(cJSON_GetArraySize(v), (int)list.n + 2);
    assert_int_equal(cJSON_GetArrayItem(v, 0)->valueint, 0);
    int expected = 0; /* whole characters before the token */
    struct bytes before = {0};
    for (size_t i = 0; i < list.n; i++) {
        assert_int_equal(cJSON_GetArrayItem(v, (int)i + 1)->valueint, expected);
        tokenizer_piece(tokenizer, list.ids[i], &before);
        expected = 0;
        for (size_t k = 0; k < utf8_valid_prefix(before.data, before.n); k++)
            expected += ((unsigned char)before.data[k] & 0xc0) != 0x80;
    }
    assert_int_equal(expected, 22); /* characters of the prompt */
    assert_int_equal(cJSON_GetArrayItem(v, (int)list.n + 1)->valueint, 22);
    assert_int_equal(o.text.n, strlen(prompt) + 1);
    cJSON_Delete(v);
    bytes_free(&before);
    token_list_free(&list);
    output_free(&o);
}

/* ---- generations ------------------------------------------------------------------------------
 */

struct fake_engine {
    struct job *jobs[16];
    size_t n, refuse_at;
};

static void no_bell(void *context)
{
    (void)context;
}

static enum status fake_submit(void *context, struct job *job, struct error *err)
{
    struct fake_engine *e = context;
    if (e->refuse_at && e->n + 1 == e->refuse_at)
        return fail(err, STATUS_BUSY, "the queue is full");
    job_hold(job);
    job_attach(job, no_bell, NULL);
    e->jobs[e->n++] = job;
    return STATUS_OK;
}

static void fake_release(struct fake_engine *e)
{
    for (size_t i = 0; i < e->n; i++) {
        struct job_snapshot s;
        job_snapshot(e->jobs[i], &s);
        if (s.finish == FINISH_NONE)
            job_finish(e->jobs[i], FINISH_CANCELLED, NULL);
        job_release(e->jobs[i]);
    }
    e->n = 0;
}

static void put(struct fake_engine *e, size_t i, const char *token, float logprob)
{
    job_put(e->jobs[i], &(struct job_token){.token = id_of(token), .logprob = logprob});
}

struct scene {
    struct codec_request request;
    struct stop_rules rules;
    struct fake_engine engine;
    struct stream_prompt prompts[2];
    struct stream_setup setup;
    struct generation *generation;
};

static const int32_t scene_prompt[] = {100, 101, 102};

static void scene_init(struct scene *s, enum codec_api api, bool stream)
{
    memset(s, 0, sizeof(*s));
    s->request = (struct codec_request){
        .api = api,
        .n = 1,
        .best_of = 1,
        .max_tokens = 100,
        .temperature = 1,
        .top_p = 1,
        .typical_p = 1,
        .repetition_penalty = 1,
        .n_logprobs = -1,
        .skip_special_tokens = true,
        .stream = stream,
    };
    s->prompts[0] = (struct stream_prompt){.ids = scene_prompt, .n = 3};
    s->prompts[1] = (struct stream_prompt){.ids = scene_prompt, .n = 2};
}

static enum status scene_open(struct scene *s, size_t n_prompts, struct error *err)
{
    static const int32_t eos[] = {EOS};
    stop_rules_init(&s->rules, &s->request, eos, 1);
    s->setup = (struct stream_setup){
        .request = &s->request,
        .tokenizer = tokenizer,
        .rules = &s->rules,
        .prompts = s->prompts,
        .n_prompts = n_prompts,
        .reply = {.api = s->request.api,
                  .chunk = s->request.stream,
                  .id = "id",
                  .created = 1,
                  .model = "m",
                  .fingerprint = "f",
                  .usage_field = s->request.include_usage},
        .max_bytes = 1 << 16,
        .submit = fake_submit,
        .submit_context = &s->engine,
    };
    return stream_open(&s->generation, &s->setup, err);
}

static void scene_start(struct scene *s, size_t n_prompts)
{
    struct error err;
    if (scene_open(s, n_prompts, &err))
        fail_msg("%s", err.text);
}

static void scene_end(struct scene *s)
{
    stream_close(s->generation); /* NULL when it was refused */
    fake_release(&s->engine);
}

/* Read until the source parks or ends, in pieces of at most max bytes. */
static bool read_all(struct scene *s, struct bytes *out, size_t max)
{
    char piece[4096];
    for (;;) {
        ssize_t n = stream_read(s->generation, piece, max);
        assert_true(n != HTTP_SOURCE_ABORT);
        if (n <= 0)
            return n == HTTP_SOURCE_END;
        bytes_append(out, piece, (size_t)n);
    }
}

/* The i-th event's JSON; NULL for [DONE]; fails when there are fewer. */
static cJSON *event(const struct bytes *events, int i)
{
    const char *at = events->data;
    for (; at && i > 0; i--) {
        at = strstr(at, "\n\n");
        at = at ? at + 2 : NULL;
    }
    if (!at || strncmp(at, "data: ", 6))
        fail_msg("no such event in %s", events->data);
    return strncmp(at + 6, "[DONE]\n\n", 8) ? cJSON_ParseWithOpts(at + 6, NULL, false) : NULL;
}

static int count_events(const struct bytes *events)
{
    int n = 0;
    for (const char *at = events->data; at && (at = strstr(at, "\n\n")); at += 2)
        n++;
    return n;
}

static const cJSON *get(const cJSON *v, const char *path)
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

static void assert_text(const cJSON *v, const char *path, const char *expected)
{
    const cJSON *found = get(v, path);
    if (!cJSON_IsString(found))
        fail_msg("%s is no string", path);
    assert_string_equal(found->valuestring, expected);
}

static void test_chat_events(void **state)
{
    (void)state;
    struct scene s;
    scene_init(&s, CODEC_CHAT, true);
    s.request.include_usage = true;
    scene_start(&s, 1);
    assert_int_equal(stream_poll(s.generation), STREAM_WAITING);
    put(&s.engine, 0, "a", NAN);
    assert_int_equal(stream_poll(s.generation), STREAM_READY);
    struct bytes out = {0};
    assert_false(read_all(&s, &out, 7)); /* parks between two events */
    assert_memory_equal(out.data + out.n - 2, "\n\n", 2);
    put(&s.engine, 0, "b", NAN);
    put(&s.engine, 0, "a", NAN);
    job_put(s.engine.jobs[0], &(struct job_token){.token = EOS});
    job_finish(s.engine.jobs[0], FINISH_STOP, NULL);
    assert_true(read_all(&s, &out, 4096));
    assert_int_equal(count_events(&out), 6);
    static const struct {
        const char *path, *value;
    } expected[] = {
        {"choices.0.delta.role", "assistant"},
        {"choices.0.delta.content", "a"},
        {"choices.0.delta.content", "ba"},
        {"choices.0.finish_reason", "stop"},
    };
    for (int i = 0; i < 4; i++) {
        cJSON *v = event(&out, i);
        assert_text(v, "object", "chat.completion.chunk");
        assert_text(v, expected[i].path, expected[i].value);
        assert_true(cJSON_IsNull(get(v, "usage")));
        assert_int_equal(cJSON_IsNull(get(v, "choices.0.finish_reason")), i < 3);
        cJSON_Delete(v);
    }
    cJSON *v = event(&out, 4);
    assert_int_equal(cJSON_GetArraySize(get(v, "choices")), 0);
    assert_int_equal(get(v, "usage.prompt_tokens")->valueint, 3);
    assert_int_equal(get(v, "usage.completion_tokens")->valueint, 4);
    cJSON_Delete(v);
    assert_null(event(&out, 5));
    bytes_free(&out);
    scene_end(&s);
}

/* Two prompts, two choices each, tokens in any order: every choice has its own. */
static void feed_four(struct scene *s)
{
    static const char *const letters[] = {"a", "b", "c", "d"};
    for (int round = 0; round < 3; round++)
        for (size_t i = 4; i-- > 0;)
            put(&s->engine, i, letters[(i + (size_t)round) % 4], -1);
    for (size_t i = 0; i < 4; i++)
        job_finish(s->engine.jobs[i], FINISH_LENGTH, NULL);
}

static void test_whole_and_stream_agree(void **state)
{
    (void)state;
    static const char *const texts[] = {"abc", "bcd", "cda", "dab"};
    for (int stream = 0; stream < 2; stream++) {
        struct scene s;
        scene_init(&s, CODEC_COMPLETIONS, stream);
        s.request.n = s.request.best_of = 2;
        s.request.n_logprobs = 0;
        s.request.return_token_ids = true;
        scene_start(&s, 2);
        assert_int_equal(s.engine.n, 4);
        assert_int_equal(job_request(s.engine.jobs[3])->sampling.choice, 1);
        assert_int_equal(job_request(s.engine.jobs[3])->n_prompt, 2);
        feed_four(&s);
        struct bytes out = {0};
        char joined[4][8] = {{0}};
        int n_ids[4] = {0}, n_logprobs[4] = {0};
        if (stream) {
            assert_true(read_all(&s, &out, 100));
        } else {
            assert_int_equal(stream_poll(s.generation), STREAM_DONE);
            bytes_text(&out, "data: ");
            stream_write(s.generation, &out);
            bytes_text(&out, "\n\n");
        }
        for (int i = 0; i < count_events(&out) - stream; i++) {
            cJSON *v = event(&out, i);
            const cJSON *c;
            cJSON_ArrayForEach(c, get(v, "choices"))
            {
                int index = get(c, "index")->valueint;
                strcat(joined[index], get(c, "text")->valuestring);
                n_ids[index] += cJSON_GetArraySize(get(c, "token_ids"));
                n_logprobs[index] += cJSON_GetArraySize(get(c, "logprobs.tokens"));
                assert_text(c, "finish_reason", "length");
                assert_int_equal(cJSON_GetArraySize(get(c, "prompt_token_ids")), index < 2 ? 3 : 2);
            }
            cJSON_Delete(v);
        }
        for (int i = 0; i < 4; i++) {
            assert_string_equal(joined[i], texts[i]);
            assert_int_equal(n_ids[i], 3);
            assert_int_equal(n_logprobs[i], 3);
        }
        struct codec_usage usage = stream_usage(s.generation);
        assert_int_equal(usage.prompt_tokens, 5);
        assert_int_equal(usage.completion_tokens, 12);
        bytes_free(&out);
        scene_end(&s);
    }
}

static void test_best_of(void **state)
{
    (void)state;
    struct scene s;
    scene_init(&s, CODEC_COMPLETIONS, false);
    s.request.n = 2;
    s.request.best_of = 3;
    scene_start(&s, 1);
    assert_int_equal(job_request(s.engine.jobs[0])->sampling.n_logprobs, 0);
    put(&s.engine, 0, "a", -3);
    put(&s.engine, 1, "b", -1);
    put(&s.engine, 1, "b", -1.5f); /* a lower sum than c's, a higher mean */
    put(&s.engine, 2, "c", -1.75f);
    for (size_t i = 0; i < 3; i++)
        job_finish(s.engine.jobs[i], FINISH_LENGTH, NULL);
    assert_int_equal(stream_poll(s.generation), STREAM_DONE);
    struct bytes out = {0};
    stream_write(s.generation, &out);
    cJSON *v = cJSON_Parse(out.data);
    assert_int_equal(cJSON_GetArraySize(get(v, "choices")), 2);
    assert_text(v, "choices.0.text", "bb");
    assert_text(v, "choices.1.text", "c");
    assert_int_equal(get(v, "choices.1.index")->valueint, 1);
    assert_true(cJSON_IsNull(get(v, "choices.0.logprobs")));
    assert_int_equal(get(v, "usage.completion_tokens")->valueint, 4);
    cJSON_Delete(v);
    bytes_free(&out);
    scene_end(&s);
}

/* A stop string ends its job at once; the others go on. */
static void test_stop_cancels(void **state)
{
    (void)state;
    struct scene s;
    scene_init(&s, CODEC_COMPLETIONS, true);
    s.request.n = s.request.best_of = 2;
    s.request.n_stops = 1;
    s.request.stops[0] = (struct codec_text){"ba", 2};
    scene_start(&s, 1);
    put(&s.engine, 0, "a", -1);
    put(&s.engine, 0, "b", -1);
    put(&s.engine, 0, "a", -1);
    put(&s.engine, 0, "c", -1);
    put(&s.engine, 1, "c", -1);
    struct bytes out = {0};
    assert_false(read_all(&s, &out, 4096));
    assert_true(job_is_cancelled(s.engine.jobs[0]));
    assert_null(job_user(s.engine.jobs[0]));
    assert_false(job_is_cancelled(s.engine.jobs[1]));
    cJSON *v = event(&out, 0);
    assert_text(v, "choices.0.text", "a");
    assert_text(v, "choices.0.finish_reason", "stop");
    cJSON_Delete(v);
    assert_int_equal(stream_usage(s.generation).completion_tokens, 4);
    bytes_free(&out);
    scene_end(&s);
}

static void test_errors(void **state)
{
    (void)state;
    struct error late;
    fail(&late, STATUS_TIMEOUT, "the deadline passed");
    for (int begun = 0; begun < 2; begun++) {
        struct scene s;
        scene_init(&s, CODEC_COMPLETIONS, true);
        s.request.n = s.request.best_of = 2;
        scene_start(&s, 1);
        struct bytes out = {0};
        if (begun) {
            put(&s.engine, 1, "a", -1);
            assert_false(read_all(&s, &out, 4096));
        }
        job_finish(s.engine.jobs[0], FINISH_ERROR, &late);
        if (begun) {
            assert_true(read_all(&s, &out, 4096));
            cJSON *v = event(&out, count_events(&out) - 1);
            assert_text(v, "error.message", "the deadline passed");
            cJSON_Delete(v);
            assert_null(strstr(out.data, "[DONE]"));
        } else {
            assert_int_equal(stream_poll(s.generation), STREAM_FAILED);
            assert_int_equal(stream_error(s.generation)->status, STATUS_TIMEOUT);
        }
        assert_true(job_is_cancelled(s.engine.jobs[1]));
        bytes_free(&out);
        scene_end(&s);
    }
}

static void test_refused_submission(void **state)
{
    (void)state;
    struct scene s;
    scene_init(&s, CODEC_COMPLETIONS, false);
    s.request.n = s.request.best_of = 3;
    s.engine.refuse_at = 3;
    struct error err;
    assert_int_equal(scene_open(&s, 1, &err), STATUS_BUSY);
    assert_null(s.generation);
    assert_true(job_is_cancelled(s.engine.jobs[0]) && job_is_cancelled(s.engine.jobs[1]));
    fake_release(&s.engine);
}

/* The echo of a stream is no reason to begin it: the status is open until the first token. */
static void test_echo_waits(void **state)
{
    (void)state;
    struct scene s;
    scene_init(&s, CODEC_COMPLETIONS, true);
    s.request.echo = true;
    s.prompts[0].echo = (struct codec_text){"echo ", 5};
    scene_start(&s, 1);
    assert_int_equal(stream_poll(s.generation), STREAM_WAITING);
    put(&s.engine, 0, "a", -1);
    assert_int_equal(stream_poll(s.generation), STREAM_READY);
    struct bytes out = {0};
    assert_false(read_all(&s, &out, 4096));
    cJSON *v = event(&out, 0);
    assert_text(v, "choices.0.text", "echo a");
    cJSON_Delete(v);
    bytes_free(&out);
    scene_end(&s);
}

/* The limit holds for all choices together, and for a whole reply only. */
static void test_reply_limit(void **state)
{
    (void)state;
    for (int stream = 0; stream < 2; stream++) {
        struct scene s;
        scene_init(&s, CODEC_COMPLETIONS, stream);
        s.request.n = s.request.best_of = 4;
        s.request.n_logprobs = 0;
        s.request.max_tokens = 10000;
        scene_start(&s, 1);
        enum stream_state last = STREAM_WAITING;
        struct bytes out = {0};
        size_t n_put = 0;
        for (; n_put < 2000 && last != STREAM_FAILED; n_put++) {
            for (size_t i = 0; i < 4; i++)
                put(&s.engine, i, "a", -1);
            last = stream_poll(s.generation);
            if (stream)
                assert_false(read_all(&s, &out, 4096));
        }
        assert_int_equal(last == STREAM_FAILED, !stream);
        if (!stream) {
            assert_int_equal(stream_error(s.generation)->status, STATUS_TOO_LARGE);
            assert_true(n_put > 200); /* 64 KB over 4 choices of some 20 bytes a token */
        }
        bytes_free(&out);
        scene_end(&s);
    }
}

static void test_echo_limit(void **state)
{
    (void)state;
    for (int n = 2; n < 4; n++) {
        struct scene s;
        struct error err;
        static char text[1 << 15];
        memset(text, 'x', sizeof(text));
        scene_init(&s, CODEC_COMPLETIONS, false);
        s.request.echo = true;
        s.request.n = s.request.best_of = n;
        s.prompts[0].echo = (struct codec_text){text, sizeof(text)};
        assert_int_equal(scene_open(&s, 1, &err), n == 2 ? STATUS_OK : STATUS_TOO_LARGE);
        assert_int_equal(s.engine.n, n == 2 ? 2 : 0);
        scene_end(&s);
    }
}

/* A reader that does not read leaves the tokens in the ring. */
static void test_slow_reader(void **state)
{
    (void)state;
    struct scene s;
    scene_init(&s, CODEC_COMPLETIONS, true);
    s.request.max_tokens = 1000;
    scene_start(&s, 1);
    put(&s.engine, 0, "a", -1);
    char piece[16];
    assert_int_equal(stream_read(s.generation, piece, 16), 16);
    size_t room = 0;
    for (; job_has_room(s.engine.jobs[0], 1); room++)
        put(&s.engine, 0, "b", -1);
    for (int i = 0; i < 3; i++) /* what is framed is sent before more is taken */
        assert_int_equal(stream_read(s.generation, piece, 16), 16);
    assert_false(job_has_room(s.engine.jobs[0], 1));
    struct bytes out = {0};
    assert_false(read_all(&s, &out, 4096));
    assert_true(job_has_room(s.engine.jobs[0], room));
    bytes_free(&out);
    scene_end(&s);
}

/* From the first job to the last byte with every allocation failing once. The jobs' tokens are
 * put by hand, so what the engine would do is out of the walk. */
static enum status run_once(void *streamed, struct error *err)
{
    struct scene s;
    scene_init(&s, CODEC_COMPLETIONS, *(bool *)streamed);
    s.request.n = s.request.best_of = 2;
    s.request.n_logprobs = 1;
    s.request.return_token_ids = true;
    s.request.n_stops = 1;
    s.request.stops[0] = (struct codec_text){"bac", 3};
    enum status st = scene_open(&s, 1, err);
    struct bytes out = {0};
    if (!st) {
        for (size_t i = 0; i < 2; i++) {
            put(&s.engine, i, "b", -1);
            put(&s.engine, i, "a", -1);
            job_finish(s.engine.jobs[i], FINISH_LENGTH, NULL);
        }
        enum stream_state state = stream_poll(s.generation);
        if (state == STREAM_FAILED)
            st = stream_error(s.generation)->status;
        else if (state == STREAM_DONE)
            stream_write(s.generation, &out);
        if (st)
            *err = *stream_error(s.generation);
        else if (out.failed)
            st = fail(err, STATUS_NOMEM, "the reply was lost");
    }
    bytes_free(&out);
    scene_end(&s);
    return st;
}

static void test_out_of_memory(void **state)
{
    (void)state;
    for (int streamed = 0; streamed < 2; streamed++)
        fail_alloc_walk(run_once, &(bool){streamed});
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_stop_strings),
        cmocka_unit_test(test_hold_back),
        cmocka_unit_test(test_cut_token),
        cmocka_unit_test(test_stop_tokens),
        cmocka_unit_test(test_min_tokens),
        cmocka_unit_test(test_incomplete_character),
        cmocka_unit_test(test_echo_offsets),
        cmocka_unit_test(test_chat_events),
        cmocka_unit_test(test_whole_and_stream_agree),
        cmocka_unit_test(test_best_of),
        cmocka_unit_test(test_stop_cancels),
        cmocka_unit_test(test_errors),
        cmocka_unit_test(test_refused_submission),
        cmocka_unit_test(test_echo_waits),
        cmocka_unit_test(test_reply_limit),
        cmocka_unit_test(test_echo_limit),
        cmocka_unit_test(test_slow_reader),
        cmocka_unit_test(test_out_of_memory),
    };
    return cmocka_run_group_tests(tests, open_tokenizer, close_tokenizer);
}
