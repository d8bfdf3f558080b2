/* chat_turn.c - what a conversation that goes on adds to its text. See chat_template.h. */
#include <stdlib.h>
#include <string.h>

#include "weights/chat_template.h"

/* Cannot be part of a template, and is no message that anybody sends. */
static const char answer_before[] = "74c1aa2e-answer-before";

/* The template's end of a message, where text begins with it, else 0. */
static size_t end_bytes(const struct chat_template *t, const char *text)
{
    const char *stops[4];
    int n = chat_template_stops(t, stops);
    for (int i = 0; i < n; i++) {
        size_t length = strlen(stops[i]);
        if (!strncmp(text, stops[i], length) && stops[i][0] != '\n')
            return length;
    }
    return 0;
}

/* Some conversation with the new messages at its end. */
static enum status render_whole(const struct chat_template *t, const struct chat_message *messages,
                                size_t n_messages, unsigned flags, struct bytes *out,
                                struct error *err)
{
    struct chat_message *all = calloc(n_messages + 2, sizeof(*all));
    if (!all)
        return fail(err, STATUS_NOMEM, "out of memory for %zu messages", n_messages);
    all[0] = (struct chat_message){CHAT_ROLE_USER, "?", 1};
    all[1] = (struct chat_message){CHAT_ROLE_ASSISTANT, answer_before, strlen(answer_before)};
    memcpy(all + 2, messages, n_messages * sizeof(*all));
    enum status st = chat_template_render(t, all, n_messages + 2, flags, out, err);
    free(all);
    return st;
}

enum status chat_template_render_turn(const struct chat_template *t, enum chat_tail tail,
                                      const struct chat_message *messages, size_t n_messages,
                                      unsigned flags, struct bytes *out, struct error *err)
{
    struct bytes whole = {.limit = out->limit};
    enum status st = render_whole(t, messages, n_messages, flags, &whole, err);
    const char *at =
        st || !whole.n ? NULL : memmem(whole.data, whole.n, answer_before, strlen(answer_before));
    if (at) {
        at += strlen(answer_before);
        if (tail != CHAT_TAIL_OPEN)
            at += end_bytes(t, at);
        bytes_append(out, at, (size_t)(whole.data + whole.n - at)); /* may have zero bytes */
        if (out->failed)
            st = fail(err, STATUS_NOMEM, "chat template: out of memory, or over the limit");
    } else if (!st) {
        st = fail(err, STATUS_INVALID, "The model's chat template does not let a session go on.");
    }
    bytes_free(&whole);
    return st;
}
