/* fuzz_request.c - any bytes as the body of a request; the first byte picks the API. What is
 * accepted keeps the promises that routes and scheduler build on. */
#include <math.h>
#include <string.h>

#include "server/codec.h"
#include "tests/fuzz/fuzz.h"

static const struct codec_context context = {
    .vocab_size = 1000,
    .max_prompt_tokens = 4096,
    .max_tokens_limit = 4096,
    .max_choices = 128,
    .chat_max_tokens = 512,
    .temperature = 1,
    .top_p = 1,
    .typical_p = 1,
    .repetition_penalty = 1,
};

static void check_prompts(const struct codec_request *q)
{
    for (size_t i = 0; i < q->n_prompts; i++) {
        const struct codec_prompt *p = &q->prompts[i];
        if (p->text.data)
            CHECK(strlen(p->text.data) == p->text.n);
        for (size_t k = 0; !p->text.data && k < p->n_tokens; k++)
            CHECK(p->tokens[k] >= 0 && p->tokens[k] < context.vocab_size);
    }
    for (size_t i = 0; i < q->n_messages; i++)
        CHECK(q->messages[i].n == 0 || q->messages[i].content);
}

static void check_promises(const struct codec_request *q)
{
    check_prompts(q);
    CHECK(q->n_stops >= 0 && q->n_stops <= CODEC_MAX_STOPS);
    CHECK(q->n_stop_tokens >= 0 && q->n_stop_tokens <= SAMPLER_MAX_STOP_TOKENS);
    if (q->api >= CODEC_TOKENIZE)
        return;
    CHECK(q->n >= 1 && q->best_of >= q->n && q->best_of <= CODEC_MAX_N);
    CHECK(q->max_tokens >= 0 && q->max_tokens <= context.max_tokens_limit);
    CHECK(isfinite(q->temperature) && q->temperature >= 0);
    CHECK(q->top_p >= 0 && q->top_p <= 1 && q->min_p >= 0 && q->min_p <= 1);
    CHECK(isfinite(q->presence_penalty) && isfinite(q->frequency_penalty));
    CHECK(q->repetition_penalty > 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    struct codec_request q = {0};
    struct error err = {0};
    struct arena a;
    if (!n)
        return 0;
    arena_init(&a, 16 << 20);
    enum codec_api api = (enum codec_api)(data[0] % CODEC_API_COUNT);
    if (codec_read(&q, api, (const char *)data + 1, n - 1, &context, &a, &err))
        fuzz_expect_reason(&err);
    else
        check_promises(&q);
    codec_request_free(&q);
    arena_free(&a);
    return 0;
}
