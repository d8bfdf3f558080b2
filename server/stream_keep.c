/* stream_keep.c - states that a generation leaves for later prompts: at the marks of its prompts,
 * and after an answer. See stream_private.h. */
#include <stdlib.h>
#include <string.h>

#include "server/stream_private.h"

/* The marks of a prompt are the first of its first choice's job. */
void stream_keep_marks(struct generation *g, struct sequence *s,
                       const struct job_snapshot *snapshot)
{
    const struct stream_prompt *prompt = s->prompt;
    if (s->index % g->setup.request->best_of)
        return;
    for (; s->n_kept < prompt->n_marks && s->n_kept < snapshot->n_marks_done; s->n_kept++) {
        const struct job_mark *mark = &prompt->marks[s->n_kept];
        g->setup.keep(g->setup.keep_context, mark->image, prompt->ids, mark->at);
    }
}

void stream_keep_note(struct sequence *s, int32_t id)
{
    if (s->n_answer == s->cap_answer) {
        size_t cap = s->cap_answer ? 2 * s->cap_answer : 64;
        int32_t *answer = realloc(s->answer, cap * sizeof(*answer));
        s->answer_lost |= !answer;
        if (!answer)
            return;
        s->answer = answer;
        s->cap_answer = cap;
    }
    s->answer[s->n_answer++] = id;
}

/* The state has seen the answer, at times without its last token. */
void stream_keep_answer(struct generation *g, struct sequence *s)
{
    const struct stream_prompt *prompt = s->prompt;
    struct image *image = prompt->answer;
    if (!image || s->answer_lost || s->output.stopped)
        return;
    size_t n = (size_t)image->position;
    CHECK(n >= prompt->n && n <= prompt->n + s->n_answer);
    int32_t *ids = malloc(n * sizeof(*ids));
    if (!ids)
        return;
    memcpy(ids, prompt->ids, prompt->n * sizeof(*ids));
    if (n > prompt->n)
        memcpy(ids + prompt->n, s->answer, (n - prompt->n) * sizeof(*ids));
    g->setup.keep(g->setup.keep_context, image, ids, n);
    free(ids);
}
