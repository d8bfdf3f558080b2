/* complete.c - a completion, or the answer of a chat, as it comes. See run.h. */
#include <stdio.h>
#include <string.h>

#include "engine/base/bytes.h"
#include "engine/run/answer.h"
#include "engine/run/run.h"
#include "engine/run/text.h"

/* The conversation that the prompt opens, as the template writes it. */
static enum status render_chat(const struct run *r, const struct bytes *prompt, struct bytes *out,
                               struct error *err)
{
    const char *system = r->options.system, *text = prompt->data ? prompt->data : "";
    struct chat_message messages[2];
    size_t n = 0;
    if (system)
        messages[n++] = (struct chat_message){CHAT_ROLE_SYSTEM, system, strlen(system)};
    messages[n++] = (struct chat_message){CHAT_ROLE_USER, text, prompt->n};
    return chat_template_render(r->template, messages, n, CHAT_ADD_GENERATION_PROMPT, out, err);
}

/* A template writes the beginning of the text itself: no special tokens are added to it. */
static enum status encode_prompt(const struct run *r, const struct bytes *prompt,
                                 struct token_list *out, struct error *err)
{
    struct bytes rendered = {0};
    const struct bytes *text = prompt;
    enum status st = STATUS_OK;
    if (r->options.chat) {
        st = render_chat(r, prompt, &rendered, err);
        text = &rendered;
    }
    if (!st)
        st = tokenizer_encode(r->tokenizer, text->data ? text->data : "", text->n,
                              r->options.chat ? 0 : TOKENIZER_ADD_SPECIAL, out, err);
    bytes_free(&rendered);
    return st;
}

static enum status complete_tokens(struct run *r, const struct token_list *prompt,
                                   struct error *err)
{
    struct job_request request = {
        .prompt = prompt->ids,
        .n_prompt = prompt->n,
        .max_tokens = answer_max_tokens(r),
        .prompt_logprobs = -1,
    };
    struct job *job;
    struct job_snapshot snapshot;
    answer_fill_sampling(r, &request.sampling);
    enum status st = run_start(r, &request, &job, err);
    if (st)
        return st;
    st = answer_stream(r, job, NULL, err);
    enum status ended = run_end(job, &snapshot, st ? NULL : err);
    if (st || ended)
        return st ? st : ended;
    fputc('\n', stdout);
    fflush(stdout);
    answer_report(r, &snapshot);
    return STATUS_OK;
}

enum status complete(struct run *r, struct error *err)
{
    struct bytes text = {0};
    struct token_list prompt = {0};
    enum status st = run_load(r, 1, err);
    if (!st)
        st = r->options.prompt ? text_take(&text, r->options.prompt, err)
                               : text_read(&text, r->options.prompt_file, err);
    if (!st && r->options.echo && text.n)
        fwrite(text.data, 1, text.n, stdout);
    if (!st)
        st = encode_prompt(r, &text, &prompt, err);
    if (!st)
        st = complete_tokens(r, &prompt, err);
    token_list_free(&prompt);
    bytes_free(&text);
    return st;
}
