/* output.c - see output.h */
#include "server/output.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* How many of the last prompt tokens are looked at to see whether there is text before. */
enum { CONTEXT_TOKENS = 8 };

/* ---- stop rules --------------------------------------------------------------------------- */

static void build_fallback(struct stop_string *s)
{
    const char *text = s->text.data;
    int k = 0;
    s->fallback[0] = 0;
    for (size_t i = 1; i < s->text.n; i++) {
        while (k && text[k] != text[i])
            k = s->fallback[k - 1];
        k += text[k] == text[i];
        s->fallback[i] = (int16_t)k;
    }
}

void stop_rules_init(struct stop_rules *rules, const struct codec_request *q, const int32_t *eos,
                     int n_eos)
{
    rules->n_strings = q->n_stops;
    rules->include = q->include_stop;
    rules->min_tokens = q->min_tokens;
    for (int i = 0; i < q->n_stops; i++) {
        rules->strings[i].text = q->stops[i];
        build_fallback(&rules->strings[i]);
    }
    rules->n_tokens = 0;
    for (int i = 0; i < q->n_stop_tokens; i++)
        rules->tokens[rules->n_tokens++] = q->stop_tokens[i];
    for (int i = 0; i < n_eos && !q->ignore_eos; i++)
        rules->tokens[rules->n_tokens++] = eos[i];
}

static bool is_stop_token(const struct stop_rules *rules, int32_t token)
{
    for (int i = 0; i < rules->n_tokens; i++)
        if (rules->tokens[i] == token)
            return true;
    return false;
}

/* Bytes of s that end the text once c is appended, given that k did before. */
static int advance(const struct stop_string *s, int k, char c)
{
    while (k && s->text.data[k] != c)
        k = s->fallback[k - 1];
    return k + (s->text.data[k] == c);
}

/* Follow the stop strings through text[from..]. Returns the length of the text up to where the
 * first of them is complete (of two, the longer), or 0; *length is then its own. */
static size_t find_stop(struct output *o, size_t from, size_t *length)
{
    const struct stop_rules *rules = o->options.rules;
    *length = 0;
    for (size_t i = from; i < o->text.n; i++) {
        for (int j = 0; j < rules->n_strings; j++) {
            const struct stop_string *s = &rules->strings[j];
            o->matched[j] = advance(s, o->matched[j], o->text.data[i]);
            if ((size_t)o->matched[j] == s->text.n) {
                *length = s->text.n > *length ? s->text.n : *length;
                o->matched[j] = s->fallback[s->text.n - 1];
            }
        }
        if (*length)
            return i + 1;
    }
    return 0;
}

/* Bytes at the end of the text that may be the beginning of a stop string. */
static size_t n_held_back(const struct output *o)
{
    int most = 0;
    for (int j = 0; j < o->options.rules->n_strings; j++)
        if (o->matched[j] > most)
            most = o->matched[j];
    return (size_t)most;
}

/* ---- lists -------------------------------------------------------------------------------- */

static int64_t count_chars(const char *text, size_t n)
{
    int64_t count = 0;
    for (size_t i = 0; i < n; i++)
        count += ((unsigned char)text[i] & 0xc0) != 0x80;
    return count;
}

static void list_token(struct output *o, const struct job_token *token, int64_t char_start)
{
    if (o->options.n_logprobs >= 0)
        codec_add_logprob(&o->lists, o->options.api, o->options.tokenizer, token,
                          o->options.n_logprobs, char_start);
    if (o->options.ids && !token->is_prompt)
        codec_add_id(&o->lists, token->token);
}

static void add_pending(struct output *o, const struct output_token *t)
{
    if (o->n_pending == o->cap_pending) {
        size_t cap = o->cap_pending ? 2 * o->cap_pending : 4;
        struct output_token *pending = realloc(o->pending, cap * sizeof(*pending));
        if (!pending) {
            o->lost = true;
            return;
        }
        o->pending = pending;
        o->cap_pending = cap;
    }
    o->pending[o->n_pending++] = *t;
}

/* List the pending tokens whose text is ready. */
static void list_ready(struct output *o)
{
    int64_t limit = o->n_taken_bytes + (int64_t)o->ready;
    size_t n = 0;
    while (n < o->n_pending && o->pending[n].end <= limit) {
        list_token(o, &o->pending[n].token, o->pending[n].char_start);
        n++;
    }
    o->n_pending -= n;
    if (n && o->n_pending)
        memmove(o->pending, o->pending + n, o->n_pending * sizeof(*o->pending));
}

/* The text ends at its first n bytes. Tokens that begin before that stay in the lists, cut or
 * not; later ones leave only their ids, which count what was generated. */
static void cut_text(struct output *o, size_t n)
{
    int64_t limit = o->n_taken_bytes + (int64_t)n;
    o->text.n = o->ready = n;
    for (size_t i = 0; i < o->n_pending; i++) {
        const struct output_token *t = &o->pending[i];
        if (t->start < limit)
            list_token(o, &t->token, t->char_start);
        else if (o->options.ids)
            codec_add_id(&o->lists, t->token.token);
    }
    o->n_pending = 0;
}

/* Text was appended behind `from`: look for stop strings, see what is ready. */
static void scan(struct output *o, size_t from)
{
    if (o->n_tokens > o->options.rules->min_tokens) {
        size_t length, end = find_stop(o, from, &length);
        if (end) {
            o->stopped = true;
            cut_text(o, o->options.rules->include ? end : end - length);
            return;
        }
    }
    o->ready = o->text.n - n_held_back(o);
    list_ready(o);
}

/* ---- the way of a token -------------------------------------------------------------------- */

static void append_token(struct output *o, const struct job_token *token)
{
    size_t before = o->text.n;
    struct output_token t = {*token, o->n_taken_bytes + (int64_t)before, 0, o->n_chars};
    detokenizer_push(&o->detokenizer, token->token, &o->text);
    o->n_chars += count_chars(o->text.data + before, o->text.n - before);
    t.end = o->n_taken_bytes + (int64_t)o->text.n;
    if (o->options.n_logprobs >= 0 || o->options.ids)
        add_pending(o, &t);
    scan(o, before);
}

void output_push(struct output *o, const struct job_token *token)
{
    if (o->stopped)
        return;
    if (o->has_held) {
        o->has_held = false;
        append_token(o, &o->held);
        if (o->stopped)
            return;
    }
    o->n_tokens++;
    o->sum_logprob += isfinite(token->logprob) ? (double)token->logprob : 0;
    if (!o->options.rules->include && is_stop_token(o->options.rules, token->token)) {
        o->held = *token;
        o->has_held = true;
        return;
    }
    append_token(o, token);
}

/* It has no text, but completions list it all the same: who scores a text with echo asks for one
 * token more and takes the last entry for that one. Chat lists what is content. */
static void list_stop_token(struct output *o)
{
    if (o->options.api == CODEC_COMPLETIONS)
        list_token(o, &o->held, o->n_chars);
    else if (o->options.ids)
        codec_add_id(&o->lists, o->held.token);
}

void output_finish(struct output *o, bool by_token)
{
    if (o->has_held && !by_token && !o->stopped)
        append_token(o, &o->held);
    if (!o->stopped) {
        size_t before = o->text.n;
        detokenizer_finish(&o->detokenizer, &o->text);
        scan(o, before);
    }
    if (!o->stopped) {
        o->ready = o->text.n;
        list_ready(o);
        if (o->has_held && by_token)
            list_stop_token(o);
    }
    o->has_held = false;
}

/* ---- the prompt ---------------------------------------------------------------------------- */

/* Whether the prompt ends in text, which the output then continues: the rules about the space
 * in front of a text's first word are over. */
static bool has_text(const struct tokenizer *t, const int32_t *prompt, size_t n_prompt)
{
    bool found = false;
    struct bytes piece = {0};
    for (size_t i = n_prompt; i-- > 0 && n_prompt - i <= CONTEXT_TOKENS && !found;) {
        if (!tokenizer_is_special(t, prompt[i]))
            tokenizer_piece(t, prompt[i], &piece);
        found = piece.n > 0;
    }
    bytes_free(&piece);
    return found;
}

void output_init(struct output *o, const struct output_options *options, const int32_t *prompt,
                 size_t n_prompt)
{
    *o = (struct output){.options = *options, .echo = {"", 0}};
    detokenizer_init(&o->detokenizer, options->tokenizer, options->skip_special);
    detokenizer_init(&o->echo_detokenizer, options->tokenizer, false);
    if (has_text(options->tokenizer, prompt, n_prompt)) {
        o->detokenizer.started = true;
        o->detokenizer.strip_left = 0;
    }
}

void output_free(struct output *o)
{
    detokenizer_free(&o->detokenizer);
    detokenizer_free(&o->echo_detokenizer);
    bytes_free(&o->text);
    codec_lists_free(&o->lists);
    free(o->pending);
    o->pending = NULL;
}

void output_echo(struct output *o, struct codec_text text)
{
    if (text.n)
        o->echo = text;
    bytes_append(&o->text, text.data, text.n);
    o->ready = o->text.n;
    o->n_chars = count_chars(text.data, text.n);
}

/* Where a prompt token stands in the echoed text. A special token that the tokenizer added by
 * itself (bos) is not in the text and takes no place. */
void output_push_prompt(struct output *o, const struct job_token *token)
{
    list_token(o, token, o->echo_chars);
    size_t left = o->echo.n - o->echo_at;
    struct bytes piece = {0};
    bool special = tokenizer_is_special(o->options.tokenizer, token->token);
    if (special)
        tokenizer_piece(o->options.tokenizer, token->token, &piece);
    else
        detokenizer_push(&o->echo_detokenizer, token->token, &piece);
    bool absent = special && (piece.n > left || memcmp(o->echo.data + o->echo_at,
                                                       piece.n ? piece.data : "", piece.n));
    size_t n = absent ? 0 : piece.n < left ? piece.n : left;
    if (n)
        o->echo_chars += count_chars(o->echo.data + o->echo_at, n);
    o->echo_at += n;
    o->lost |= piece.failed;
    bytes_free(&piece);
}

void output_take(struct output *o)
{
    o->n_taken_bytes += (int64_t)o->ready;
    bytes_consume(&o->text, o->ready);
    o->ready = 0;
    codec_lists_clear(&o->lists);
}

size_t output_bytes(const struct output *o)
{
    size_t n = o->text.n + o->detokenizer.run.n + o->lists.ids.n;
    for (int i = 0; i < 4; i++)
        n += o->lists.logprobs[i].n;
    return n + o->n_pending * sizeof(*o->pending);
}

bool output_failed(const struct output *o)
{
    return o->lost || o->text.failed || codec_lists_failed(&o->lists);
}
