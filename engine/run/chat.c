/* chat.c - a conversation, line by line, on one state. See run.h.
 *
 * A turn feeds what is new and leaves an image, from which the next one goes on: nothing is
 * rendered, tokenized or fed twice, however long the conversation. Images are those of the server
 * (image.h), so a session exported there goes on here, and the other way round. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/base/bytes.h"
#include "engine/base/file.h"
#include "engine/image.h"
#include "engine/run/answer.h"
#include "engine/run/interrupt.h"
#include "engine/run/run.h"

enum { MAX_LINE_BYTES = 1 << 20 };

#define PROMPT "> " /* before each line that is typed */

static const char help_text[] =
    "/reset      forget the conversation\n"
    "/save FILE  write its state to FILE\n"
    "/load FILE  go on from such a state, or from one that the server exported\n"
    "/help       this\n"
    "/quit       end; so does the end of the input\n"
    "Ctrl-C stops an answer, which is kept as far as it came.\n";

struct chat {
    struct run *r;
    struct image_store store;
    struct image *image; /* the state after the last turn, held; NULL before the first */
    bool is_terminal;    /* somebody types */
};

/* ---- A turn ---- */

/* One job of the conversation. */
struct turn {
    struct bytes tokens; /* [n] int32: what the model is fed, then what it has drawn */
    size_t n_prompt;     /* tokens that are fed */
    struct image *into;
    struct job_snapshot end;
};

static size_t count(const struct bytes *tokens)
{
    return tokens->n / sizeof(int32_t);
}

static enum status render_line(const struct chat *c, const char *line, struct bytes *out,
                               struct error *err)
{
    const struct run *r = c->r;
    const char *system = r->options.system;
    struct chat_message messages[2];
    size_t n = 0;
    if (system && !c->image)
        messages[n++] = (struct chat_message){CHAT_ROLE_SYSTEM, system, strlen(system)};
    messages[n++] = (struct chat_message){CHAT_ROLE_USER, line, strlen(line)};
    return c->image ? chat_template_render_turn(r->template, (enum chat_tail)c->image->tail,
                                                messages, n, CHAT_ADD_GENERATION_PROMPT, out, err)
                    : chat_template_render(r->template, messages, n, CHAT_ADD_GENERATION_PROMPT,
                                           out, err);
}

/* What the state has not seen, then the user's line as the template writes it. */
static enum status encode_line(const struct chat *c, const char *line, struct turn *t,
                               struct error *err)
{
    struct bytes text = {0};
    struct token_list ids = {0};
    enum status st = render_line(c, line, &text, err);
    if (!st)
        st = tokenizer_encode(c->r->tokenizer, text.data, text.n, 0, &ids, err);
    if (!st && c->image)
        bytes_append(&t->tokens, c->image->pending,
                     (size_t)c->image->n_pending * sizeof(*c->image->pending));
    if (!st)
        bytes_append(&t->tokens, ids.ids, ids.n * sizeof(*ids.ids));
    if (!st && t->tokens.failed)
        st = fail(err, STATUS_NOMEM, "out of memory for %zu tokens", ids.n);
    t->n_prompt = count(&t->tokens);
    token_list_free(&ids);
    bytes_free(&text);
    return st;
}

/* Feed the turn's tokens to the state of the turn before, and draw up to max_tokens. */
static enum status run_turn(struct chat *c, struct turn *t, int64_t max_tokens, struct error *err)
{
    struct job_request request = {
        .prompt = (const int32_t *)t->tokens.data,
        .n_prompt = t->n_prompt,
        .max_tokens = max_tokens,
        .prompt_logprobs = -1,
        .from = c->image,
    };
    struct job *job;
    enum status st = image_new(&t->into, &c->store, err);
    if (st)
        return st;
    request.into = t->into;
    answer_fill_sampling(c->r, &request.sampling);
    st = run_start(c->r, &request, &job, err);
    if (st)
        return st;
    st = answer_stream(c->r, job, &t->tokens, err);
    enum status ended = run_end(job, &t->end, st ? NULL : err);
    if (!st && !ended && t->tokens.failed)
        st = fail(err, STATUS_NOMEM, "out of memory for the answer's tokens");
    return st ? st : ended;
}

static void say_forgotten(const char *why)
{
    fprintf(stderr, "latte-run: %s; the last line is forgotten\n", why);
}

/* An answer that was stopped is part of the conversation as far as it came: a job that was
 * cancelled leaves no state, so what the user has seen is fed once more. Where there is nothing
 * to see, or that is stopped as well, the conversation goes on without this turn. */
static enum status apply_stopped(struct chat *c, struct turn *t, struct error *err)
{
    interrupt_forget();
    if (t->n_prompt == count(&t->tokens)) {
        say_forgotten("stopped before the answer began");
        return STATUS_OK;
    }
    image_release(t->into);
    t->into = NULL;
    t->n_prompt = count(&t->tokens);
    enum status st = run_turn(c, t, 0, err);
    if (!st && t->end.finish == FINISH_CANCELLED)
        say_forgotten("stopped before the answer was kept");
    return st;
}

/* How the answer ended, for the rendering of the next turn. */
static enum chat_tail tail_of(const struct chat *c, const struct turn *t)
{
    const char *stops[4];
    int n = t->end.stopped_by_token ? chat_template_stops(c->r->template, stops) : 0;
    int32_t last = ((const int32_t *)t->tokens.data)[count(&t->tokens) - 1];
    for (int i = 0; i < n; i++)
        if (tokenizer_find(c->r->tokenizer, stops[i], strlen(stops[i])) == last)
            return CHAT_TAIL_CLOSED;
    return CHAT_TAIL_OPEN;
}

static void go_on_from(struct chat *c, struct image *image)
{
    image_release(c->image);
    c->image = image;
}

/* Answer a line. The conversation is as it was if that fails. */
static enum status answer_line(struct chat *c, const char *line, struct error *err)
{
    struct turn t = {0};
    enum status st = encode_line(c, line, &t, err);
    if (!st)
        st = run_turn(c, &t, answer_max_tokens(c->r), err);
    if (!st) {
        fputc('\n', stdout);
        fflush(stdout);
        if (c->r->options.verbose)
            answer_report(c->r, &t.end);
    }
    if (!st && t.end.finish == FINISH_CANCELLED)
        st = apply_stopped(c, &t, err);
    if (!st && t.end.finish != FINISH_CANCELLED) {
        t.into->tail = tail_of(c, &t);
        go_on_from(c, t.into);
        t.into = NULL;
    }
    interrupt_forget(); /* it may have come as the answer ended by itself */
    image_release(t.into);
    bytes_free(&t.tokens);
    return st;
}

/* ---- Commands ---- */

static enum status save(struct chat *c, const char *path, struct error *err)
{
    struct bytes data = {0};
    if (!c->image)
        return fail(err, STATUS_INVALID, "/save: nothing has been said yet");
    image_write(c->image, &data);
    enum status st = data.failed ? fail(err, STATUS_NOMEM, "/save: out of memory")
                                 : file_write(path, data.data, data.n, err);
    bytes_free(&data);
    return st;
}

static enum status load(struct chat *c, const char *path, struct error *err)
{
    struct bytes data = {0};
    struct image *image;
    enum status st = file_read(&data, path, image_file_bytes(&c->store), err);
    if (!st)
        st = image_parse(&image, &c->store, data.data ? data.data : "", data.n, 0, err);
    bytes_free(&data);
    if (!st)
        go_on_from(c, image);
    return st;
}

/* Whether line is this command; then *argument is what follows, NULL for nothing. */
static bool is_command(const char *line, const char *name, const char **argument)
{
    size_t n = strlen(name);
    if (strncmp(line, name, n) || (line[n] && line[n] != ' '))
        return false;
    const char *at = line + n + strspn(line + n, " ");
    *argument = *at ? at : NULL;
    return true;
}

static enum status run_command(struct chat *c, const char *line, struct error *err)
{
    const char *argument;
    if (is_command(line, "/reset", &argument)) {
        go_on_from(c, NULL);
        return STATUS_OK;
    }
    if (is_command(line, "/help", &argument)) {
        fputs(help_text, stderr);
        return STATUS_OK;
    }
    if (is_command(line, "/save", &argument) && argument)
        return save(c, argument, err);
    if (is_command(line, "/load", &argument) && argument)
        return load(c, argument, err);
    return fail(err, STATUS_INVALID, "%.40s: /save FILE, /load FILE, /reset, /help or /quit", line);
}

/* ---- Lines ---- */

/* The next line without its end; false when there is none. */
static bool read_line(const struct chat *c, char **line, size_t *cap)
{
    if (c->is_terminal && !c->r->options.quiet)
        fputs(PROMPT, stderr);
    ssize_t n = getline(line, cap, stdin);
    while (n > 0 && ((*line)[n - 1] == '\n' || (*line)[n - 1] == '\r'))
        (*line)[--n] = 0;
    return n >= 0;
}

static enum status take_line(struct chat *c, const char *line, struct error *err)
{
    if (strlen(line) > MAX_LINE_BYTES)
        return fail(err, STATUS_TOO_LARGE, "a line has more than %d bytes", MAX_LINE_BYTES);
    if (line[0] == '/')
        return run_command(c, line, err);
    return line[0] ? answer_line(c, line, err) : STATUS_OK;
}

/* Somebody who types hears of an error and goes on; a script ends with it. */
static enum status converse(struct chat *c, struct error *err)
{
    char *line = NULL;
    const char *argument;
    size_t cap = 0;
    enum status st = STATUS_OK;
    while (!st && read_line(c, &line, &cap) && !is_command(line, "/quit", &argument)) {
        st = take_line(c, line, err);
        if (st && st != STATUS_DEVICE && c->is_terminal) {
            fprintf(stderr, "latte-run: %s\n", err->text);
            st = STATUS_OK;
        }
    }
    if (!st && c->is_terminal && feof(stdin))
        fputc('\n', stderr);
    free(line);
    return st;
}

/* A template that renders nothing is better known before anybody has typed. */
static enum status try_template(const struct run *r, struct error *err)
{
    const struct chat_message message = {CHAT_ROLE_USER, "?", 1};
    struct bytes text = {0};
    enum status st = chat_template_render(r->template, &message, 1, 0, &text, err);
    bytes_free(&text);
    return st;
}

enum status chat(struct run *r, struct error *err)
{
    struct chat c = {.r = r, .is_terminal = isatty(STDIN_FILENO)};
    enum status st = run_load(r, 1, err);
    if (!st)
        st = try_template(r, err);
    if (st)
        return st;
    image_store_init(&c.store, r->info.fingerprint, r->info.n_state_values,
                     r->info.config->vocab_size, r->info.max_position, SIZE_MAX);
    if (c.is_terminal && !r->options.quiet)
        fputs("/help lists the commands.\n", stderr);
    interrupt_in_chat(!c.is_terminal     ? NULL
                      : r->options.quiet ? "\n/quit or Ctrl-D ends the chat\n"
                                         : "\n/quit or Ctrl-D ends the chat\n" PROMPT);
    st = converse(&c, err);
    image_release(c.image);
    engine_close(r->engine); /* before the store: it holds images, too */
    r->engine = NULL;
    image_store_free(&c.store);
    return st;
}
