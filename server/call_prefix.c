/* call_prefix.c - the states of earlier prompts that a call begins from, and those that it leaves.
 * See call.h.
 *
 * Where states are left decides only how much of later prompts they save: what is found there is
 * compared token by token. So places are chosen where later conversations will agree: after the
 * system messages, which other conversations share; before the generation prompt, where the same
 * conversation goes on whatever the answer was; before the last token of a completion's prompt; and
 * after the answer, where the client gives it back as it was.
 */
#include "server/call.h"

#include <stdlib.h>
#include <string.h>

enum { MIN_TOKENS_CPU = 32, MIN_TOKENS_GPU = 512 };

/* Tokens a state must save to be worth its copy. */
static size_t min_tokens(const struct routes *r)
{
    if (r->options->prefix_min_tokens)
        return (size_t)r->options->prefix_min_tokens;
    return strcmp(r->info.backend, "cuda") ? MIN_TOKENS_CPU : MIN_TOKENS_GPU;
}

/* Not where the prompt continues a state or leaves one (as responses do), nor where its scores are
 * wanted. */
static bool may_begin_later(const struct call *c)
{
    const struct codec_request *q = &c->request;
    bool scored = q->echo && q->n_logprobs >= 0;
    bool plain = c->api != CODEC_RESPONSES && !c->turn.active && !call_from(c) && !q->return_state;
    return c->routes->storage.prefixes && plain && !scored;
}

/* ---- places ---------------------------------------------------------------------------------- */

static size_t common(const char *a, size_t n_a, const char *b, size_t n_b)
{
    size_t n = 0;
    while (n < n_a && n < n_b && a[n] == b[n])
        n++;
    return n;
}

/* How many ids end within the first n_text bytes of the text. Tokenizing that again would cost as
 * much as all the rest; where a token stands for other bytes than the text has, it is a few less.
 */
static size_t ids_within(const struct call *c, const int32_t *ids, size_t n, size_t n_text)
{
    struct bytes text = {0};
    size_t k = 0;
    while (k < n) {
        tokenizer_piece(c->model->tokenizer, ids[k], &text);
        if (text.failed || text.n > n_text)
            break;
        k++;
    }
    bytes_free(&text);
    return k;
}

/* A message of the user that nobody sends. */
static const char other_message[] = "9c0e5b7d-another-message";

static bool render(const struct call *c, const struct chat_message *messages, size_t n,
                   unsigned flags, struct bytes *out)
{
    struct error err;
    return !chat_template_render(c->model->chat_template, messages, n, flags, out, &err) &&
           !out->failed;
}

/* How many ids the conversation has in common with another one of the same system messages. */
static size_t system_end(const struct call *c, const int32_t *ids, size_t n)
{
    const struct codec_request *q = &c->request;
    struct chat_message *other = NULL;
    struct bytes ours = {0}, theirs = {0};
    size_t n_system = 0, end = 0;
    while (n_system < q->n_messages && q->messages[n_system].role == CHAT_ROLE_SYSTEM)
        n_system++;
    if (n_system && n_system < q->n_messages)
        other = malloc((n_system + 1) * sizeof(*other));
    if (!other)
        return 0;
    memcpy(other, q->messages, n_system * sizeof(*other));
    other[n_system] =
        (struct chat_message){CHAT_ROLE_USER, other_message, sizeof(other_message) - 1};
    if (render(c, q->messages, n_system + 1, 0, &ours) &&
        render(c, other, n_system + 1, 0, &theirs))
        end = ids_within(c, ids, n, common(ours.data, ours.n, theirs.data, theirs.n));
    bytes_free(&ours);
    bytes_free(&theirs);
    free(other);
    return end;
}

/* The ids before the generation prompt; n - 1 where it cannot be told. */
static size_t messages_end(const struct call *c, const int32_t *ids, size_t n)
{
    const struct codec_request *q = &c->request;
    static const struct chat_message any = {CHAT_ROLE_USER, other_message,
                                            sizeof(other_message) - 1};
    struct bytes with = {0}, without = {0};
    struct token_list list = {0};
    struct error err;
    size_t end = n - 1;
    if (q->add_generation_prompt && render(c, &any, 1, CHAT_ADD_GENERATION_PROMPT, &with) &&
        render(c, &any, 1, 0, &without) && with.n > without.n &&
        common(with.data, with.n, without.data, without.n) == without.n &&
        !tokenizer_encode(c->model->tokenizer, with.data + without.n, with.n - without.n, 0, &list,
                          &err) &&
        list.n < n && !memcmp(ids + n - list.n, list.ids, list.n * sizeof(*ids)))
        end = n - list.n;
    token_list_free(&list);
    bytes_free(&with);
    bytes_free(&without);
    return end;
}

int call_prefix_marks(const struct call *c, const int32_t *ids, size_t n,
                      size_t marks[STREAM_MAX_MARKS])
{
    int n_marks = 0;
    if (!may_begin_later(c) || n < min_tokens(c->routes))
        return 0;
    size_t end = messages_end(c, ids, n), shared = system_end(c, ids, n);
    if (shared && shared < end)
        marks[n_marks++] = shared;
    if (end)
        marks[n_marks++] = end;
    return n_marks;
}

/* ---- plans ----------------------------------------------------------------------------------- */

void call_prefix_plan(struct call *c, size_t i, const size_t *marks, int n_marks)
{
    struct routes *r = c->routes;
    struct stream_prompt *p = &c->prompts[i];
    size_t worth = min_tokens(r);
    if (!may_begin_later(c))
        return;
    p->from = prefixes_find(r->storage.prefixes, c->owner, p->ids, p->n, &p->n_seen);
    size_t last = p->n_seen;
    for (int k = 0; k < n_marks; k++) {
        size_t at = marks[k];
        if (at <= p->n_seen)
            prefixes_has(r->storage.prefixes, c->owner, p->ids,
                         at); /* is in use by this conversation */
        struct image *image = at >= last + worth ? prefixes_reserve(r->storage.prefixes) : NULL;
        if (!image)
            continue;
        p->marks[p->n_marks++] = (struct job_mark){at, image};
        last = at;
    }
    /* An answer is likely to come back in a long conversation, or in one that has come back. */
    if (c->request.best_of == 1 && (p->n_seen || p->n >= worth))
        p->answer = prefixes_reserve(r->storage.prefixes);
}

/* The one of the call that is this image; it is not the call's any more. */
static bool take(struct call *c, const struct image *image)
{
    for (size_t i = 0; i < c->n_prompts; i++) {
        struct stream_prompt *p = &c->prompts[i];
        for (int k = 0; k < p->n_marks; k++)
            if (p->marks[k].image == image) {
                p->marks[k].image = NULL;
                return true;
            }
        if (p->answer == image) {
            p->answer = NULL;
            return true;
        }
    }
    return false;
}

void call_prefix_keep(void *call, struct image *image, const int32_t *ids, size_t n)
{
    struct call *c = call;
    CHECK(take(c, image));
    prefixes_add(c->routes->storage.prefixes, c->owner, ids, n, image);
}

void call_prefix_free(struct call *c)
{
    for (size_t i = 0; i < c->n_prompts; i++) {
        struct stream_prompt *p = &c->prompts[i];
        image_release(p->from);
        for (int k = 0; k < p->n_marks; k++)
            prefixes_cancel(c->routes->storage.prefixes, p->marks[k].image);
        prefixes_cancel(c->routes->storage.prefixes, p->answer);
    }
}
