/* test_codec.c - request bodies by tables of cases, replies read back by a parser. */
#include "tests/unit/unit.h"

#include <cjson/cJSON.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/json.h"
#include "server/codec.h"
#include "tests/unit/fail_alloc.h"

#define TOKENIZER "weights/latte-12m/tokenizer.json"

static const struct codec_context context = {
    .vocab_size = 1000,
    .max_prompt_tokens = 5000,
    .max_tokens_limit = 10000,
    .max_choices = 16,
    .chat_max_tokens = 77,
    .temperature = 0.8,
    .top_p = 0.95,
    .min_p = 0,
    .typical_p = 1,
    .repetition_penalty = 1,
    .top_k = 40,
};

struct parsed {
    struct codec_request request;
    struct arena arena;
    struct error err;
    enum status status;
};

static void parse_with(struct parsed *p, const struct codec_context *c, enum codec_api api,
                       const char *body, size_t n)
{
    memset(p, 0, sizeof(*p));
    arena_init(&p->arena, 0);
    p->status = codec_read(&p->request, api, body, n, c, &p->arena, &p->err);
}

static void parse(struct parsed *p, enum codec_api api, const char *body)
{
    parse_with(p, &context, api, body, strlen(body));
    if (p->status)
        fail_msg("%s: %s", body, p->err.text);
}

static void drop(struct parsed *p)
{
    codec_request_free(&p->request);
    arena_free(&p->arena);
}

/* ---- what is refused ------------------------------------------------------------------------ */

#define P "\"prompt\":\"x\""
#define M "\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]"
#define MESSAGE(inside) "{\"messages\":[{" inside "}]}"

#define C CODEC_COMPLETIONS
#define H CODEC_CHAT
#define T CODEC_TOKENIZE
#define D CODEC_DETOKENIZE

static const struct {
    enum codec_api api;
    const char *body, *field, *code; /* code NULL: none */
} refused[] = {
    /* not JSON, or not what JSON should be */
    {C, "", "", NULL},
    {C, "{", "", NULL},
    {C, "[]", "", NULL},
    {C, "\"prompt\"", "", NULL},
    {C, "null", "", NULL},
    {C, "{" P "} x", "", NULL},
    {C, "{" P ",}", "", NULL},
    {C, "{" P ",\"temperature\":NaN}", "", NULL},
    {C, "{" P ",\"temperature\":1e999}", "", NULL},
    {C, "{" P ",\"temperature\":01}", "", NULL},
    {C, "{" P "," P "}", "", NULL},
    {C, "{" P ",\"p\\u0072ompt\":\"y\"}", "", NULL},
    {C, "{\"prompt\":\"a\\u0000b\"}", "", NULL},
    {C, "{\"prompt\":\"\xff\"}", "", NULL},
    {C, "{\"prompt\":\"\\ud800\"}", "", NULL},
    {C, "{\"prompt\":\"a\nb\"}", "", NULL},
    /* prompt */
    {C, "{}", "prompt", "missing_required_parameter"},
    {C, "{\"Prompt\":\"x\"}", "prompt", "missing_required_parameter"},
    {C, "{\"prompt\":null}", "prompt", "missing_required_parameter"},
    {C, "{\"prompt\":5}", "prompt", "invalid_type"},
    {C, "{\"prompt\":{}}", "prompt", "invalid_type"},
    {C, "{\"prompt\":true}", "prompt", "invalid_type"},
    {C, "{\"prompt\":[]}", "prompt", "empty_array"},
    {C, "{\"prompt\":[null]}", "prompt[0]", "invalid_type"},
    {C, "{\"prompt\":[1,\"a\"]}", "prompt[1]", "invalid_type"},
    {C, "{\"prompt\":[\"a\",1]}", "prompt[1]", "invalid_type"},
    {C, "{\"prompt\":[\"a\",[1,-1]]}", "prompt[1][1]", "invalid_token_id"},
    {C, "{\"prompt\":[1,1000]}", "prompt[1]", "invalid_token_id"},
    {C, "{\"prompt\":[1.5]}", "prompt[0]", "invalid_type"},
    {C, "{\"prompt\":[1e300]}", "prompt[0]", "invalid_token_id"},
    {C,
     "{\"prompt\":[\"\",\"\",\"\",\"\",\"\",\"\",\"\",\"\",\"\",\"\",\"\",\"\",\"\",\"\",\"\",\"\","
     "\"\"]}",
     "prompt", "array_above_max_length"},
    /* numbers and their ranges */
    {C, "{" P ",\"model\":7}", "model", "invalid_type"},
    {C, "{" P ",\"n\":0}", "n", "integer_below_min_value"},
    {C, "{" P ",\"n\":129}", "n", "integer_above_max_value"},
    {C, "{" P ",\"n\":17}", "n", "integer_above_max_value"},
    {C, "{" P ",\"n\":1.5}", "n", "invalid_type"},
    {C, "{" P ",\"n\":\"1\"}", "n", "invalid_type"},
    {C, "{" P ",\"n\":true}", "n", "invalid_type"},
    {C, "{\"prompt\":[\"a\",\"b\"],\"n\":9}", "n", "integer_above_max_value"},
    {C, "{" P ",\"best_of\":0}", "best_of", "integer_below_min_value"},
    {C, "{" P ",\"n\":3,\"best_of\":2}", "best_of", "invalid_value"},
    {C, "{" P ",\"n\":1,\"best_of\":2,\"stream\":true}", "best_of",
     "invalid_parameter_combination"},
    {C, "{" P ",\"max_tokens\":-1}", "max_tokens", "integer_below_min_value"},
    {C, "{" P ",\"max_tokens\":10001}", "max_tokens", "integer_above_max_value"},
    {C, "{" P ",\"max_tokens\":99999999999999999999}", "max_tokens", "integer_above_max_value"},
    {C, "{" P ",\"temperature\":-0.1}", "temperature", "decimal_below_min_value"},
    {C, "{" P ",\"temperature\":2.1}", "temperature", "decimal_above_max_value"},
    {C, "{" P ",\"temperature\":\"hot\"}", "temperature", "invalid_type"},
    {C, "{" P ",\"top_p\":1.01}", "top_p", "decimal_above_max_value"},
    {C, "{" P ",\"top_k\":-2}", "top_k", "integer_below_min_value"},
    {C, "{" P ",\"min_p\":-1}", "min_p", "decimal_below_min_value"},
    {C, "{" P ",\"typical_p\":0}", "typical_p", "decimal_below_min_value"},
    {C, "{" P ",\"repetition_penalty\":0}", "repetition_penalty", "decimal_below_min_value"},
    {C, "{" P ",\"presence_penalty\":-2.5}", "presence_penalty", "decimal_below_min_value"},
    {C, "{" P ",\"frequency_penalty\":3}", "frequency_penalty", "decimal_above_max_value"},
    {C, "{" P ",\"logprobs\":21}", "logprobs", "integer_above_max_value"},
    {C, "{" P ",\"logprobs\":true}", "logprobs", "invalid_type"},
    {C, "{" P ",\"min_tokens\":17}", "min_tokens", "invalid_value_or_default"},
    {C, "{" P ",\"min_tokens\":6,\"max_tokens\":5}", "min_tokens", "invalid_value"},
    {C, "{" P ",\"seed\":1.5}", "seed", "invalid_type"},
    {C, "{" P ",\"seed\":\"1\"}", "seed", "invalid_type"},
    {C, "{" P ",\"seed\":9223372036854775809}", "seed", "integer_out_of_range"},
    {C, "{" P ",\"seed\":-9223372036854775809}", "seed", "integer_out_of_range"},
    {C, "{" P ",\"seed\":1e300}", "seed", "integer_out_of_range"},
    /* flags and objects */
    {C, "{" P ",\"stream\":1}", "stream", "invalid_type"},
    {C, "{" P ",\"echo\":\"yes\"}", "echo", "invalid_type"},
    {C, "{" P ",\"stream_options\":{\"include_usage\":true}}", "stream_options",
     "invalid_parameter_combination"},
    {C, "{" P ",\"stream\":true,\"stream_options\":[]}", "stream_options", "invalid_type"},
    {C, "{" P ",\"stream\":true,\"stream_options\":{\"include_usage\":1}}",
     "stream_options.include_usage", "invalid_type"},
    {C, "{" P ",\"logit_bias\":[]}", "logit_bias", "invalid_type"},
    {C, "{" P ",\"logit_bias\":{\"a\":1}}", "logit_bias.a", "invalid_token_id"},
    {C, "{" P ",\"logit_bias\":{\"01\":1}}", "logit_bias.01", "invalid_token_id"},
    {C, "{" P ",\"logit_bias\":{\"-1\":1}}", "logit_bias.-1", "invalid_token_id"},
    {C, "{" P ",\"logit_bias\":{\"1000\":1}}", "logit_bias.1000", "invalid_token_id"},
    {C, "{" P ",\"logit_bias\":{\"99999999999999999999\":1}}", "logit_bias.99999999999999999999",
     "invalid_token_id"},
    {C, "{" P ",\"logit_bias\":{\"1\":101}}", "logit_bias.1", "decimal_above_max_value"},
    {C, "{" P ",\"logit_bias\":{\"1\":\"x\"}}", "logit_bias.1", "invalid_type"},
    {C, "{" P ",\"stop\":5}", "stop", "invalid_type"},
    {C, "{" P ",\"stop\":\"\"}", "stop", "empty_string"},
    {C, "{" P ",\"stop\":[\"a\",\"\"]}", "stop[1]", "empty_string"},
    {C, "{" P ",\"stop\":[\"a\",null]}", "stop[1]", "invalid_type"},
    {C, "{" P ",\"stop\":[\"a\",\"b\",\"c\",\"d\",\"e\"]}", "stop", "array_above_max_length"},
    {C, "{" P ",\"stop_token_ids\":5}", "stop_token_ids", "invalid_type"},
    {C, "{" P ",\"stop_token_ids\":[1,1000]}", "stop_token_ids[1]", "invalid_token_id"},
    {C, "{" P ",\"stop_token_ids\":[\"1\"]}", "stop_token_ids[0]", "invalid_type"},
    {C, "{" P ",\"suffix\":\"end\"}", "suffix", "unsupported_parameter"},
    {C, "{" P ",\"use_beam_search\":true}", "use_beam_search", "unsupported_parameter"},
    {C, "{" P ",\"response_format\":{\"type\":\"json_object\"}}", "response_format.type",
     "invalid_value"},
    {C, "{" P ",\"response_format\":{}}", "response_format.type", "missing_required_parameter"},
    {C, "{" P ",\"response_format\":\"text\"}", "response_format", "invalid_type"},
    {C, "{" P ",\"user\":5}", "user", "invalid_type"},
    /* chat */
    {H, "{}", "messages", "missing_required_parameter"},
    {H, "{\"messages\":[]}", "messages", "empty_array"},
    {H, "{\"messages\":\"hi\"}", "messages", "invalid_type"},
    {H, "{\"messages\":[5]}", "messages[0]", "invalid_type"},
    {H, MESSAGE("\"content\":\"x\""), "messages[0].role", "missing_required_parameter"},
    {H, MESSAGE("\"role\":\"user\""), "messages[0].content", "missing_required_parameter"},
    {H, MESSAGE("\"role\":\"user\",\"content\":null"), "messages[0].content",
     "missing_required_parameter"},
    {H, MESSAGE("\"role\":\"user\",\"content\":5"), "messages[0].content", "invalid_type"},
    {H, MESSAGE("\"role\":\"robot\",\"content\":\"x\""), "messages[0].role", "invalid_value"},
    {H, MESSAGE("\"role\":\"tool\",\"content\":\"x\""), "messages[0].role", "invalid_value"},
    {H, MESSAGE("\"role\":1,\"content\":\"x\""), "messages[0].role", "invalid_type"},
    {H, MESSAGE("\"role\":\"user\",\"content\":[]"), "messages[0].content", "empty_array"},
    {H, MESSAGE("\"role\":\"user\",\"content\":[\"x\"]"), "messages[0].content[0]", "invalid_type"},
    {H, MESSAGE("\"role\":\"user\",\"content\":[{\"text\":\"x\"}]"), "messages[0].content[0].type",
     "missing_required_parameter"},
    {H, MESSAGE("\"role\":\"user\",\"content\":[{\"type\":\"text\"}]"),
     "messages[0].content[0].text", "missing_required_parameter"},
    {H,
     MESSAGE("\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"a\"},"
             "{\"type\":\"image_url\",\"image_url\":{\"url\":\"http://x\"}}]"),
     "messages[0].content[1].type", "invalid_value"},
    {H, MESSAGE("\"role\":\"assistant\",\"content\":\"x\",\"tool_calls\":[{}]"),
     "messages[0].tool_calls", "unsupported_parameter"},
    {H, "{" M ",\"max_tokens\":0}", "max_tokens", "integer_below_min_value"},
    {H, "{" M ",\"max_completion_tokens\":-5}", "max_completion_tokens", "integer_below_min_value"},
    {H, "{" M ",\"max_tokens\":5,\"max_completion_tokens\":5}", "max_tokens",
     "invalid_parameter_combination"},
    {H, "{" M ",\"logprobs\":1}", "logprobs", "invalid_type"},
    {H, "{" M ",\"top_logprobs\":1}", "top_logprobs", "invalid_parameter_combination"},
    {H, "{" M ",\"logprobs\":true,\"top_logprobs\":21}", "top_logprobs", "integer_above_max_value"},
    {H, "{" M ",\"tools\":[{\"type\":\"function\"}]}", "tools", "unsupported_parameter"},
    {H, "{" M ",\"tool_choice\":\"required\"}", "tool_choice", "unsupported_parameter"},
    {H, "{" M ",\"modalities\":[\"audio\"]}", "modalities", "invalid_value"},
    {H, "{" M ",\"metadata\":5}", "metadata", "invalid_type"},
    {H, "{" M ",\"add_generation_prompt\":true,\"continue_final_message\":true}",
     "continue_final_message", "invalid_parameter_combination"},
    /* the small endpoints */
    {T, "{}", "prompt", "missing_required_parameter"},
    {T, "{\"prompt\":[1]}", "prompt", "invalid_type"},
    {T, "{\"prompt\":\"a\",\"content\":\"b\"}", "content", "invalid_parameter_combination"},
    {T, "{\"prompt\":\"a\"," M "}", "messages", "invalid_parameter_combination"},
    {D, "{}", "tokens", "missing_required_parameter"},
    {D, "{\"tokens\":\"1\"}", "tokens", "invalid_type"},
    {D, "{\"tokens\":[-1]}", "tokens[0]", "invalid_token_id"},
};

static void test_refused(void **state)
{
    (void)state;
    for (size_t i = 0; i < COUNT_OF(refused); i++) {
        struct parsed p;
        const char *body = refused[i].body, *code = refused[i].code;
        parse_with(&p, &context, refused[i].api, body, strlen(body));
        if (code && !strcmp(code, "invalid_value_or_default")) {
            assert_int_equal(p.status, STATUS_OK); /* the default limit makes room */
            assert_int_equal(p.request.max_tokens, 17);
            drop(&p);
            continue;
        }
        if (p.status != STATUS_INVALID)
            fail_msg("%s: status %d", body, p.status);
        if (strcmp(p.err.field, refused[i].field))
            fail_msg("%s: field '%s', expected '%s'", body, p.err.field, refused[i].field);
        if ((code == NULL) != (p.request.code == NULL) || (code && strcmp(code, p.request.code)))
            fail_msg("%s: code %s, expected %s", body, p.request.code, code);
        assert_true(strlen(p.err.text) > 10);
        drop(&p);
    }
}

static void test_deep_and_many(void **state)
{
    (void)state;
    char deep[400] = "{\"prompt\":\"x\",\"z\":";
    size_t start = strlen(deep);
    struct parsed p;
    for (int levels = 63; levels <= 64; levels++) {
        memset(deep + start, '[', (size_t)levels);
        memset(deep + start + levels, ']', (size_t)levels);
        strcpy(deep + start + 2 * levels, "}");
        parse_with(&p, &context, C, deep, strlen(deep));
        assert_int_equal(p.status, levels == 63 ? STATUS_OK : STATUS_INVALID);
        drop(&p);
    }
    /* More values than a prompt may have tokens, with some to spare. */
    size_t n = 5000 + 65536;
    struct bytes many = {0};
    bytes_text(&many, "{\"prompt\":[");
    for (size_t i = 0; i < n; i++)
        bytes_text(&many, i ? ",1" : "1");
    bytes_text(&many, "]}");
    parse_with(&p, &context, C, many.data, many.n);
    assert_int_equal(p.status, STATUS_INVALID);
    assert_non_null(strstr(p.err.text, "values"));
    drop(&p);
    bytes_free(&many);
    char *stop = malloc(2000);
    int head = sprintf(stop, "{\"prompt\":\"x\",\"stop\":\"");
    memset(stop + head, 's', CODEC_MAX_STOP_BYTES + 1);
    strcpy(stop + head + CODEC_MAX_STOP_BYTES + 1, "\"}");
    parse_with(&p, &context, C, stop, strlen(stop));
    assert_string_equal(p.request.code, "string_above_max_length");
    drop(&p);
    free(stop);
}

/* ---- what is read --------------------------------------------------------------------------- */

static void test_defaults(void **state)
{
    (void)state;
    struct parsed p;
    parse(&p, C, "{" P ",\"temperature\":null,\"stop\":null,\"n\":null}");
    const struct codec_request *q = &p.request;
    assert_null(q->model);
    assert_int_equal(q->n_prompts, 1);
    assert_int_equal(q->prompts[0].text.n, 1);
    assert_int_equal(q->n, 1);
    assert_int_equal(q->best_of, 1);
    assert_int_equal(q->max_tokens, 16);
    assert_true(q->temperature == 0.8 && q->top_p == 0.95 && q->top_k == 40);
    assert_int_equal(q->n_logprobs, -1);
    assert_true(q->add_special_tokens && q->skip_special_tokens);
    assert_false(q->has_seed || q->stream || q->echo || q->ignore_eos);
    drop(&p);
    parse(&p, H, "{" M "}");
    assert_int_equal(p.request.max_tokens, 77);
    assert_true(p.request.add_generation_prompt);
    assert_false(p.request.add_special_tokens);
    drop(&p);
}

static void test_values(void **state)
{
    (void)state;
    struct parsed p;
    parse(&p, C,
          "{\"model\":\"m\",\"prompt\":[\"a\",[3,4,5],\"\"],\"n\":2,\"best_of\":4,"
          "\"max_tokens\":0,\"echo\":true,\"logprobs\":20,\"temperature\":0,\"top_p\":0.5,"
          "\"top_k\":-1,\"min_p\":0.1,\"typical_p\":0.9,\"repetition_penalty\":1.2,"
          "\"presence_penalty\":-2,\"frequency_penalty\":2,\"stop\":[\"x\",\"\\u00e9\"],"
          "\"stop_token_ids\":[7,8],\"ignore_eos\":true,\"include_stop_str_in_output\":true,"
          "\"skip_special_tokens\":false,\"return_token_ids\":true,"
          "\"logit_bias\":{\"5\":-100,\"6\":1.5},\"user\":\"u\",\"suffix\":\"\"}");
    const struct codec_request *q = &p.request;
    assert_string_equal(q->model, "m");
    assert_int_equal(q->n_prompts, 3);
    assert_null(q->prompts[1].text.data);
    assert_int_equal(q->prompts[1].n_tokens, 3);
    assert_int_equal(q->prompts[1].tokens[2], 5);
    assert_int_equal(q->prompts[2].text.n, 0);
    assert_true(q->n == 2 && q->best_of == 4 && q->max_tokens == 0 && q->n_logprobs == 20);
    assert_true(q->temperature == 0 && q->top_p == 0.5 && q->top_k == -1 && q->min_p == 0.1);
    assert_true(q->typical_p == 0.9 && q->repetition_penalty == 1.2);
    assert_true(q->presence_penalty == -2 && q->frequency_penalty == 2);
    assert_int_equal(q->n_stops, 2);
    assert_memory_equal(q->stops[1].data, "\xc3\xa9", 2);
    assert_true(q->n_stop_tokens == 2 && q->stop_tokens[1] == 8);
    assert_true(q->n_logit_bias == 2 && isinf(q->logit_bias[0].bias) && q->logit_bias[0].bias < 0 &&
                q->logit_bias[1].token == 6);
    assert_true(q->echo && q->ignore_eos && q->include_stop && q->return_token_ids &&
                !q->skip_special_tokens);
    assert_int_equal(q->n_unknown_fields, 0);
    codec_request_free(&p.request); /* what says how to generate is still there */
    assert_null(q->model);
    assert_int_equal(q->n_prompts, 0);
    assert_memory_equal(q->stops[0].data, "x", 1);
    assert_memory_equal(q->stops[1].data, "\xc3\xa9", 2);
    assert_int_equal(q->logit_bias[1].token, 6);
    drop(&p);
}

static void test_seed(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        int64_t value;
    } cases[] = {
        {"0", 0},
        {"-1", -1},
        {"9007199254740993", 9007199254740993}, /* 2^53 + 1, which a double cannot hold */
        {"9223372036854775807", INT64_MAX},
        {"-9223372036854775808", INT64_MIN},
        {"1e3", 1000},
        {"12.0", 12},
    };
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        char body[200];
        snprintf(body, sizeof(body), "{\"a\":{\"seed\":5},\"s\\u0065ed\" : %s ,\"prompt\":\"x\"}",
                 cases[i].text);
        struct parsed p;
        parse(&p, C, body);
        assert_true(p.request.has_seed);
        assert_int_equal((int64_t)p.request.seed, cases[i].value);
        drop(&p);
    }
}

static void test_messages(void **state)
{
    (void)state;
    struct parsed p;
    parse(&p, H,
          "{\"messages\":[{\"role\":\"developer\",\"content\":\"be brief\",\"name\":\"x\"},"
          "{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"one\"},"
          "{\"type\":\"text\",\"text\":\"two\"}]},"
          "{\"role\":\"assistant\",\"content\":\"\",\"refusal\":null,\"tool_calls\":[],"
          "\"annotations\":[]}],\"continue_final_message\":true,\"max_completion_tokens\":9,"
          "\"logprobs\":true,\"top_logprobs\":3,\"tools\":[],\"tool_choice\":\"none\","
          "\"modalities\":[\"text\"],\"metadata\":{\"k\":\"v\"}}");
    const struct codec_request *q = &p.request;
    assert_int_equal(q->n_messages, 3);
    assert_int_equal(q->messages[0].role, CHAT_ROLE_SYSTEM);
    assert_int_equal(q->messages[1].n, 7);
    assert_string_equal(q->messages[1].content, "one\ntwo");
    assert_int_equal(q->messages[2].role, CHAT_ROLE_ASSISTANT);
    assert_int_equal(q->messages[2].n, 0);
    assert_true(q->continue_final_message && !q->add_generation_prompt);
    assert_int_equal(q->max_tokens, 9);
    assert_int_equal(q->n_logprobs, 3);
    drop(&p);
    parse(&p, H, "{" M ",\"logprobs\":true}");
    assert_int_equal(p.request.n_logprobs, 0);
    drop(&p);
}

static void test_unknown_fields(void **state)
{
    (void)state;
    const char *body = "{" P ",\"foo\":1,\"stream\":true,\"stream_options\":{\"bar\":2},"
                       "\"Temperature\":9}";
    struct parsed p;
    parse(&p, C, body);
    assert_int_equal(p.request.n_unknown_fields, 3);
    drop(&p);
    struct codec_context strict = context;
    strict.strict_fields = true;
    parse_with(&p, &strict, C, body, strlen(body));
    assert_int_equal(p.status, STATUS_INVALID);
    assert_string_equal(p.err.field, "foo");
    assert_string_equal(p.request.code, "unknown_parameter");
    drop(&p);
    /* A name longer than the error's field is cut between characters. */
    struct bytes huge = {0};
    bytes_text(&huge, "{" P ",\"a");
    for (int i = 0; i < 200; i++)
        bytes_text(&huge, "\xc3\xa9");
    bytes_text(&huge, "\":1}");
    parse_with(&p, &strict, C, huge.data, huge.n);
    assert_int_equal(p.status, STATUS_INVALID);
    assert_int_equal(strlen(p.err.field), 39);
    bytes_free(&huge);
    drop(&p);
}

static void test_tokenize_forms(void **state)
{
    (void)state;
    static const struct {
        const char *body;
        bool special;
    } cases[] = {
        {"{\"prompt\":\"a\"}", true},
        {"{\"prompt\":\"a\",\"add_special_tokens\":false}", false},
        {"{\"content\":\"a\"}", false},
        {"{\"content\":\"a\",\"add_special\":true}", true},
        {"{" M "}", false},
    };
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        struct parsed p;
        parse(&p, T, cases[i].body);
        assert_int_equal(p.request.add_special_tokens, cases[i].special);
        drop(&p);
    }
    struct parsed p;
    parse(&p, D, "{\"tokens\":[]}");
    assert_int_equal(p.request.prompts[0].n_tokens, 0);
    drop(&p);
}

/* The input as messages, and as items whose lines are JSON once they are put into braces; what is
 * repeated of a request is JSON behind a first member. */
static void test_response_input(void **state)
{
    (void)state;
    struct parsed p;
    parse(&p, CODEC_RESPONSES,
          "{\"instructions\":\"be "
          "\\\"kind\\\"\",\"input\":[{\"role\":\"developer\",\"content\":\"a\\nb\"},"
          "{\"type\":\"message\",\"role\":\"user\",\"content\":[{\"type\":\"input_text\",\"text\":"
          "\"c\"},"
          "{\"type\":\"input_text\",\"text\":\"d\"}]},{\"role\":\"assistant\",\"content\":\"e\"}],"
          "\"metadata\":{\"k\":\"v\"}}");
    const struct codec_request *q = &p.request;
    static const struct {
        enum chat_role role;
        const char *content;
    } expected[] = {{CHAT_ROLE_SYSTEM, "be \"kind\""},
                    {CHAT_ROLE_SYSTEM, "a\nb"},
                    {CHAT_ROLE_USER, "c\nd"},
                    {CHAT_ROLE_ASSISTANT, "e"}};
    assert_int_equal(q->n_messages, COUNT_OF(expected));
    for (size_t i = 0; i < COUNT_OF(expected); i++) {
        assert_int_equal(q->messages[i].role, expected[i].role);
        assert_int_equal(q->messages[i].n, strlen(expected[i].content));
        assert_memory_equal(q->messages[i].content, expected[i].content, q->messages[i].n);
    }
    assert_int_equal(q->max_tokens, context.chat_max_tokens);
    assert_true(q->store);

    static const char *const roles[] = {"developer", "user", "assistant"};
    assert_int_equal(q->n_items, COUNT_OF(roles));
    const char *line = q->items.data;
    char text[300];
    for (size_t i = 0; i < COUNT_OF(roles); i++) {
        size_t n = strcspn(line, "\n");
        snprintf(text, sizeof(text), "{%.*s}", (int)n, line);
        cJSON *item = cJSON_Parse(text);
        assert_non_null(item);
        assert_string_equal(cJSON_GetObjectItem(item, "role")->valuestring, roles[i]);
        assert_int_equal(cJSON_GetArraySize(cJSON_GetObjectItem(item, "content")), i == 1 ? 2 : 1);
        cJSON_Delete(item);
        line += n + 1;
    }
    assert_int_equal(*line, '\0');

    struct bytes object = {0};
    bytes_format(&object, "{\"a\":0%s}", q->repeated.data);
    struct json_limits limits = {.max_depth = 10};
    assert_int_equal(json_check(object.data, object.n, &limits, &p.err), STATUS_OK);
    cJSON *v = cJSON_Parse(object.data);
    assert_string_equal(cJSON_GetObjectItem(v, "instructions")->valuestring, "be \"kind\"");
    assert_string_equal(cJSON_GetObjectItem(cJSON_GetObjectItem(v, "metadata"), "k")->valuestring,
                        "v");
    assert_true(cJSON_GetObjectItem(v, "temperature")->valuedouble == context.temperature);
    cJSON_Delete(v);
    bytes_free(&object);
    drop(&p);

    /* A chain has read its instructions. */
    parse(&p, CODEC_RESPONSES,
          "{\"instructions\":\"i\",\"input\":\"x\",\"previous_response_id\":\"resp_1\"}");
    assert_int_equal(p.request.n_messages, 1);
    assert_string_equal(p.request.previous_response_id, "resp_1");
    drop(&p);
}

/* Any body, cut and changed anywhere, is read or refused, and nothing else. */
static void test_mutations(void **state)
{
    (void)state;
    const char *body = "{\"prompt\":[\"a\",[1,2]],\"n\":2,\"logit_bias\":{\"5\":-1.5e1},\"stop\":"
                       "[\"x\\u00e9\"],\"stream\":true,\"stream_options\":{\"include_usage\":true},"
                       "\"seed\":-12,\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":"
                       "\"text\",\"text\":\"q\"}]}],\"input\":[{\"role\":\"assistant\",\"content\":"
                       "[{\"type\":\"refusal\",\"refusal\":\"q\"}]}],\"metadata\":{\"a\":\"b\"}}";
    static const char replacements[] = "\"{}[]:,0-.e\\un\xc3 \x01";
    size_t n = strlen(body);
    char *copy = malloc(n);
    for (size_t i = 0; i < n; i++)
        for (size_t k = 0; k < sizeof(replacements); k++) {
            memcpy(copy, body, n);
            copy[i] = replacements[k];
            for (int api = 0; api < CODEC_API_COUNT; api++) {
                struct parsed p;
                parse_with(&p, &context, (enum codec_api)api, copy, k ? n : i);
                assert_true(p.status == STATUS_OK || p.status == STATUS_INVALID);
                drop(&p);
            }
        }
    free(copy);
}

static enum status read_once(void *body, struct error *err)
{
    struct parsed p;
    enum codec_api api = *(const char *)body == 'c'   ? H
                         : *(const char *)body == 'r' ? CODEC_RESPONSES
                                                      : C;
    parse_with(&p, &context, api, (const char *)body + 1, strlen(body) - 1);
    *err = p.err;
    drop(&p);
    return p.status;
}

static void test_out_of_memory(void **state)
{
    (void)state;
    static char bodies[][200] = {
        "p{\"prompt\":[\"a\",[1,2]],\"logit_bias\":{\"5\":1},\"stop\":[\"x\"],\"seed\":7}",
        "c{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"q\"}]}]}",
        "r{\"input\":[{\"role\":\"user\",\"content\":[{\"type\":\"input_text\",\"text\":\"q\"}]}],"
        "\"instructions\":\"i\",\"metadata\":{\"a\":\"b\"}}",
    };
    for (size_t i = 0; i < COUNT_OF(bodies); i++)
        fail_alloc_walk(read_once, bodies[i]);
}

/* ---- replies -------------------------------------------------------------------------------- */

static struct tokenizer *tokenizer;

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

/* Strict JSON, as a tree. */
static cJSON *read_back(const struct bytes *text)
{
    struct json_limits limits = {.max_depth = 32};
    struct error err;
    assert_false(text->failed);
    if (json_check(text->data, text->n, &limits, &err))
        fail_msg("%s\n%s", err.text, text->data);
    return cJSON_ParseWithLength(text->data, text->n);
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
    if (!v)
        fail_msg("no member %s", path);
    return v;
}

static const struct codec_reply reply_base = {
    .api = CODEC_COMPLETIONS,
    .id = "cmpl-1",
    .created = 1700000000,
    .model = "a \"model\"",
    .fingerprint = "fp_1",
};

static void write_one(struct bytes *out, const struct codec_reply *r, const struct codec_choice *c,
                      const struct codec_usage *usage)
{
    codec_write_head(out, r, NULL, 0);
    codec_write_choice(out, r, c, true);
    codec_write_tail(out, r, usage);
}

static void test_completion_reply(void **state)
{
    (void)state;
    struct codec_lists lists = {0};
    struct job_token token = {.token = 33, .logprob = NAN};
    codec_add_logprob(&lists, CODEC_COMPLETIONS, tokenizer, &token, 2, 0);
    token = (struct job_token){
        .token = 34, .logprob = -0.5f, .n_top = 2, .top = {{35, -0.25f}, {36, -INFINITY}}};
    codec_add_logprob(&lists, CODEC_COMPLETIONS, tokenizer, &token, 2, 1);
    codec_add_id(&lists, 33);
    codec_add_id(&lists, 34);
    int32_t prompt[] = {7, 8};
    struct codec_choice c = {.index = 3,
                             .text = {"a\"\n\xc3\xa9", 5},
                             .lists = &lists,
                             .logprobs = true,
                             .ids = true,
                             .prompt_ids = prompt,
                             .n_prompt_ids = 2,
                             .finish = "length"};
    struct codec_usage usage = {10, 5, 4};
    struct bytes out = {0};
    write_one(&out, &reply_base, &c, &usage);
    cJSON *v = read_back(&out);
    assert_string_equal(get(v, "object")->valuestring, "text_completion");
    assert_string_equal(get(v, "model")->valuestring, "a \"model\"");
    assert_int_equal(get(v, "created")->valueint, 1700000000);
    assert_string_equal(get(v, "choices.0.text")->valuestring, "a\"\n\xc3\xa9");
    assert_int_equal(get(v, "choices.0.index")->valueint, 3);
    assert_string_equal(get(v, "choices.0.finish_reason")->valuestring, "length");
    assert_string_equal(get(v, "choices.0.logprobs.tokens.0")->valuestring, "?");
    assert_true(cJSON_IsNull(get(v, "choices.0.logprobs.token_logprobs.0")));
    assert_true(cJSON_IsNull(get(v, "choices.0.logprobs.top_logprobs.0")));
    assert_true(get(v, "choices.0.logprobs.token_logprobs.1")->valuedouble == -0.5);
    assert_true(get(v, "choices.0.logprobs.top_logprobs.1.A")->valuedouble == -0.25);
    assert_true(get(v, "choices.0.logprobs.top_logprobs.1.B")->valuedouble == -9999);
    assert_true(get(v, "choices.0.logprobs.top_logprobs.1.@")->valuedouble == -0.5);
    assert_int_equal(get(v, "choices.0.logprobs.text_offset.1")->valueint, 1);
    assert_int_equal(get(v, "choices.0.token_ids.1")->valueint, 34);
    assert_int_equal(get(v, "choices.0.prompt_token_ids.0")->valueint, 7);
    assert_int_equal(get(v, "usage.total_tokens")->valueint, 15);
    assert_int_equal(get(v, "usage.prompt_tokens_details.cached_tokens")->valueint, 4);
    cJSON_Delete(v);
    bytes_free(&out);
    codec_lists_free(&lists);
}

/* A JSON object has a key once: of tokens that look the same the likeliest is shown. */
static void test_repeated_pieces(void **state)
{
    (void)state;
    static const struct {
        struct job_token token;
        const char *map;
    } table[] = {
        {{.token = 35, .logprob = -3, .n_top = 2, .top = {{35, -0.25f}, {35, -1}}},
         "{\"A\":-0.25}"},
        {{.token = 35, .logprob = -1, .n_top = 2, .top = {{36, -0.5f}, {35, -1}}},
         "{\"B\":-0.5,\"A\":-1}"},
        {{.token = 35, .logprob = -3, .n_top = 0}, "{\"A\":-3}"},
    };
    for (size_t i = 0; i < COUNT_OF(table); i++) {
        struct codec_lists lists = {0};
        codec_add_logprob(&lists, CODEC_COMPLETIONS, tokenizer, &table[i].token, 2, 0);
        assert_string_equal(lists.logprobs[2].data, table[i].map);
        codec_lists_free(&lists);
    }
}

static void test_chat_reply(void **state)
{
    (void)state;
    struct codec_lists lists = {0};
    struct job_token token = {.token = 34, .logprob = -1.5f, .n_top = 1, .top = {{35, -1}}};
    codec_add_logprob(&lists, CODEC_CHAT, tokenizer, &token, 1, 0);
    struct codec_reply r = reply_base;
    r.api = CODEC_CHAT;
    struct codec_choice c = {.text = {"@", 1}, .lists = &lists, .logprobs = true, .finish = "stop"};
    struct codec_usage usage = {1, 1, 0};
    struct bytes out = {0};
    write_one(&out, &r, &c, &usage);
    cJSON *v = read_back(&out);
    assert_string_equal(get(v, "object")->valuestring, "chat.completion");
    assert_string_equal(get(v, "choices.0.message.role")->valuestring, "assistant");
    assert_string_equal(get(v, "choices.0.message.content")->valuestring, "@");
    assert_true(cJSON_IsNull(get(v, "choices.0.message.refusal")));
    assert_string_equal(get(v, "choices.0.logprobs.content.0.token")->valuestring, "@");
    assert_int_equal(get(v, "choices.0.logprobs.content.0.bytes.0")->valueint, '@');
    assert_true(get(v, "choices.0.logprobs.content.0.logprob")->valuedouble == -1.5);
    assert_string_equal(get(v, "choices.0.logprobs.content.0.top_logprobs.0.token")->valuestring,
                        "A");
    assert_true(cJSON_IsNull(get(v, "choices.0.logprobs.refusal")));
    cJSON_Delete(v);
    bytes_free(&out);
    codec_lists_free(&lists);
}

static void test_chunks(void **state)
{
    (void)state;
    struct codec_lists none = {0};
    struct codec_reply r = reply_base;
    r.api = CODEC_CHAT;
    r.chunk = r.usage_field = true;
    struct bytes out = {0};
    write_one(&out, &r, &(struct codec_choice){.lists = &none, .role = true}, NULL);
    cJSON *v = read_back(&out);
    assert_string_equal(get(v, "object")->valuestring, "chat.completion.chunk");
    assert_string_equal(get(v, "choices.0.delta.role")->valuestring, "assistant");
    assert_string_equal(get(v, "choices.0.delta.content")->valuestring, "");
    assert_true(cJSON_IsNull(get(v, "choices.0.finish_reason")));
    assert_true(cJSON_IsNull(get(v, "usage")));
    cJSON_Delete(v);
    out.n = 0;
    write_one(&out, &r, &(struct codec_choice){.lists = &none, .finish = "stop"}, NULL);
    v = read_back(&out);
    assert_null(get(v, "choices.0.delta")->child);
    assert_string_equal(get(v, "choices.0.finish_reason")->valuestring, "stop");
    cJSON_Delete(v);
    bytes_free(&out);
}

/* Pieces that are no text by themselves keep their bytes. */
static void test_broken_pieces(void **state)
{
    (void)state;
    struct bytes piece = {0};
    int32_t id = 0;
    for (; id < tokenizer_size(tokenizer); id++) {
        piece.n = 0;
        tokenizer_piece(tokenizer, id, &piece);
        if (piece.n == 1 && (unsigned char)piece.data[0] == 0xe2)
            break;
    }
    assert_true(id < tokenizer_size(tokenizer));
    struct job_token token = {.token = id, .logprob = -1};
    struct codec_lists lists = {0};
    codec_add_logprob(&lists, CODEC_COMPLETIONS, tokenizer, &token, 0, 0);
    assert_string_equal(lists.logprobs[0].data, "\"bytes:\\\\xe2\"");
    codec_lists_clear(&lists);
    codec_add_logprob(&lists, CODEC_CHAT, tokenizer, &token, 0, 0);
    assert_string_equal(lists.logprobs[0].data,
                        "{\"token\":\"\xef\xbf\xbd\",\"logprob\":-1,\"bytes\":[226],"
                        "\"top_logprobs\":[]}");
    codec_lists_free(&lists);
    bytes_free(&piece);
}

static void test_tokenized(void **state)
{
    (void)state;
    struct codec_request q = {.api = CODEC_TOKENIZE, .return_token_strings = true};
    int32_t ids[] = {33, 34};
    struct bytes out = {0};
    codec_write_tokenized(&out, &q, tokenizer, ids, 2, 99);
    assert_string_equal(out.data, "{\"count\":2,\"max_model_len\":99,\"tokens\":[33,34],"
                                  "\"token_strs\":[\"?\",\"@\"]}");
    q = (struct codec_request){.with_pieces = true};
    out.n = 0;
    codec_write_tokenized(&out, &q, tokenizer, ids, 1, 99);
    assert_string_equal(out.data, "{\"count\":1,\"max_model_len\":99,\"tokens\":[{\"id\":33,"
                                  "\"piece\":\"?\"}],\"token_strs\":null}");
    bytes_free(&out);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_refused),
        cmocka_unit_test(test_deep_and_many),
        cmocka_unit_test(test_defaults),
        cmocka_unit_test(test_values),
        cmocka_unit_test(test_seed),
        cmocka_unit_test(test_messages),
        cmocka_unit_test(test_unknown_fields),
        cmocka_unit_test(test_tokenize_forms),
        cmocka_unit_test(test_response_input),
        cmocka_unit_test(test_mutations),
        cmocka_unit_test(test_out_of_memory),
        cmocka_unit_test(test_completion_reply),
        cmocka_unit_test(test_repeated_pieces),
        cmocka_unit_test(test_chat_reply),
        cmocka_unit_test(test_chunks),
        cmocka_unit_test(test_broken_pieces),
        cmocka_unit_test(test_tokenized),
    };
    return cmocka_run_group_tests(tests, open_tokenizer, close_tokenizer);
}
