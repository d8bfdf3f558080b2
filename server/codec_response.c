/* codec_response.c - see codec.h: OpenAI's reply objects, written piece by piece. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/utf8.h"
#include "server/codec.h"

enum { TOKENS, TOKEN_LOGPROBS, TOP_LOGPROBS, TEXT_OFFSET }; /* completions' logprob lists */

/* ---- numbers and texts ------------------------------------------------------------------- */

/* OpenAI's stand-in for minus infinity keeps the field a number; NaN means "no value". */
static void write_logprob(struct bytes *out, float value)
{
    if (isnan(value)) {
        bytes_text(out, "null");
        return;
    }
    char text[24];
    float v = value < -9999.0f ? -9999.0f : value;
    for (int digits = 5; digits <= 9; digits++) {
        snprintf(text, sizeof(text), "%.*g", digits, (double)v);
        if (strtof(text, NULL) == v)
            break;
    }
    bytes_text(out, text);
}

/* As OpenAI's completions show a token that is no text by itself: bytes:\xe2\x82. */
static void write_piece_or_bytes(struct bytes *out, const struct bytes *piece)
{
    if (utf8_valid_prefix(piece->data, piece->n) == piece->n) {
        bytes_json_string(out, piece->n ? piece->data : "", piece->n);
        return;
    }
    bytes_text(out, "\"bytes:");
    for (size_t i = 0; i < piece->n; i++)
        bytes_format(out, "\\\\x%02x", (unsigned char)piece->data[i]);
    bytes_char(out, '"');
}

static void write_byte_array(struct bytes *out, const struct bytes *piece)
{
    bytes_char(out, '[');
    for (size_t i = 0; i < piece->n; i++)
        bytes_format(out, i ? ",%u" : "%u", (unsigned char)piece->data[i]);
    bytes_char(out, ']');
}

static void comma(struct bytes *list)
{
    if (list->n)
        bytes_char(list, ',');
}

void codec_write_ids(struct bytes *out, const int32_t *ids, size_t n)
{
    bytes_char(out, '[');
    for (size_t i = 0; i < n; i++)
        bytes_format(out, i ? ",%d" : "%d", ids[i]);
    bytes_char(out, ']');
}

/* ---- lists of tokens --------------------------------------------------------------------- */

/* "token":..., "logprob":..., "bytes":[...] of chat. */
static void write_chat_token(struct bytes *out, const struct tokenizer *t, int32_t id,
                             float logprob)
{
    struct bytes piece = {0};
    tokenizer_piece(t, id, &piece);
    bytes_text(out, "\"token\":");
    bytes_json_lossy(out, piece.data, piece.n);
    bytes_text(out, ",\"logprob\":");
    write_logprob(out, logprob);
    bytes_text(out, ",\"bytes\":");
    write_byte_array(out, &piece);
    out->failed |= piece.failed;
    bytes_free(&piece);
}

static void add_chat_logprob(struct bytes *out, const struct tokenizer *t,
                             const struct job_token *token, int n_top)
{
    comma(out);
    bytes_char(out, '{');
    write_chat_token(out, t, token->token, token->logprob);
    bytes_text(out, ",\"top_logprobs\":[");
    for (int i = 0; i < n_top; i++) {
        bytes_text(out, i ? ",{" : "{");
        write_chat_token(out, t, token->top[i].token, token->top[i].logprob);
        bytes_char(out, '}');
    }
    bytes_text(out, "]}");
}

static void write_completion_piece(struct bytes *out, const struct tokenizer *t, int32_t id)
{
    struct bytes piece = {0};
    tokenizer_piece(t, id, &piece);
    write_piece_or_bytes(out, &piece);
    out->failed |= piece.failed;
    bytes_free(&piece);
}

/* Whether a piece is the same as one of the n before it. */
static bool is_repeated(const struct bytes *pieces, int n)
{
    for (int i = 0; i < n; i++)
        if (pieces[i].n == pieces[n].n &&
            (!pieces[n].n || !memcmp(pieces[i].data, pieces[n].data, pieces[n].n)))
            return true;
    return false;
}

/* {"piece": logprob}: the k most likely, and the token itself when it is not among them. Of
 * tokens with one spelling the likeliest is kept: a JSON object has a key once. */
static void add_top_map(struct bytes *out, const struct tokenizer *t, const struct job_token *token,
                        int n_top)
{
    struct bytes pieces[SAMPLER_MAX_TOP_LOGPROBS + 1] = {0}; /* the token's own is the last */
    bytes_char(out, '{');
    for (int i = 0; i <= n_top; i++) {
        tokenizer_piece(t, i < n_top ? token->top[i].token : token->token, &pieces[i]);
        out->failed |= pieces[i].failed;
        if (is_repeated(pieces, i))
            continue;
        bytes_text(out, i ? "," : "");
        write_piece_or_bytes(out, &pieces[i]);
        bytes_char(out, ':');
        write_logprob(out, i < n_top ? token->top[i].logprob : token->logprob);
    }
    bytes_char(out, '}');
    for (int i = 0; i <= n_top; i++)
        bytes_free(&pieces[i]);
}

static void add_completion_logprob(struct bytes lists[4], const struct tokenizer *t,
                                   const struct job_token *token, int n_top, int64_t text_offset)
{
    for (int i = 0; i < 4; i++)
        comma(&lists[i]);
    write_completion_piece(&lists[TOKENS], t, token->token);
    write_logprob(&lists[TOKEN_LOGPROBS], token->logprob);
    if (isnan(token->logprob)) /* the first token of a prompt has nothing before it */
        bytes_text(&lists[TOP_LOGPROBS], "null");
    else
        add_top_map(&lists[TOP_LOGPROBS], t, token, n_top);
    bytes_format(&lists[TEXT_OFFSET], "%lld", (long long)text_offset);
}

void codec_add_logprob(struct codec_lists *l, enum codec_api api, const struct tokenizer *t,
                       const struct job_token *token, int64_t n_top, int64_t text_offset)
{
    int n = n_top < token->n_top ? (int)n_top : token->n_top;
    if (api == CODEC_COMPLETIONS)
        add_completion_logprob(l->logprobs, t, token, n, text_offset);
    else
        add_chat_logprob(&l->logprobs[0], t, token, n);
}

void codec_add_id(struct codec_lists *l, int32_t id)
{
    comma(&l->ids);
    bytes_format(&l->ids, "%d", id);
}

void codec_lists_clear(struct codec_lists *l)
{
    for (int i = 0; i < 4; i++)
        l->logprobs[i].n = 0;
    l->ids.n = 0;
}

void codec_lists_free(struct codec_lists *l)
{
    for (int i = 0; i < 4; i++)
        bytes_free(&l->logprobs[i]);
    bytes_free(&l->ids);
}

bool codec_lists_failed(const struct codec_lists *l)
{
    bool failed = l->ids.failed;
    for (int i = 0; i < 4; i++)
        failed |= l->logprobs[i].failed;
    return failed;
}

/* ---- completions and chat ----------------------------------------------------------------- */

static void write_quoted(struct bytes *out, const char *text)
{
    bytes_json_string(out, text, strlen(text));
}

static const char *object_name(const struct codec_reply *r)
{
    if (r->api == CODEC_COMPLETIONS)
        return "text_completion";
    return r->chunk ? "chat.completion.chunk" : "chat.completion";
}

void codec_write_head(struct bytes *out, const struct codec_reply *r, const int32_t *prompt_ids,
                      size_t n_prompt_ids)
{
    bytes_format(out, "{\"id\":\"%s\",\"object\":\"%s\",\"created\":%lld,\"model\":", r->id,
                 object_name(r), (long long)r->created);
    write_quoted(out, r->model);
    bytes_text(out, ",\"system_fingerprint\":");
    write_quoted(out, r->fingerprint);
    if (prompt_ids) {
        bytes_text(out, ",\"prompt_token_ids\":");
        codec_write_ids(out, prompt_ids, n_prompt_ids);
    }
    bytes_text(out, ",\"choices\":[");
}

static void write_array(struct bytes *out, const char *name, const struct bytes *inside)
{
    bytes_format(out, "\"%s\":[", name);
    bytes_append(out, inside->data, inside->n);
    bytes_char(out, ']');
}

static void write_logprobs(struct bytes *out, const struct codec_reply *r,
                           const struct codec_choice *c)
{
    const struct bytes *lists = c->lists->logprobs;
    bytes_text(out, ",\"logprobs\":");
    if (!c->logprobs || (r->chunk && !lists[0].n)) {
        bytes_text(out, "null");
    } else if (r->api == CODEC_CHAT) {
        bytes_char(out, '{');
        write_array(out, "content", &lists[0]);
        bytes_text(out, ",\"refusal\":null}");
    } else {
        static const char *const names[] = {"tokens", "token_logprobs", "top_logprobs",
                                            "text_offset"};
        for (int i = 0; i < 4; i++) {
            bytes_char(out, i ? ',' : '{');
            write_array(out, names[i], &lists[i]);
        }
        bytes_char(out, '}');
    }
}

static void write_text(struct bytes *out, const struct codec_choice *c)
{
    bytes_json_string(out, c->text.n ? c->text.data : "", c->text.n);
}

static void write_delta(struct bytes *out, const struct codec_choice *c)
{
    bytes_text(out, "\"delta\":{");
    if (c->role)
        bytes_text(out, "\"role\":\"assistant\",\"content\":\"\",\"refusal\":null");
    else if (c->text.n || !c->finish) {
        bytes_text(out, "\"content\":");
        write_text(out, c);
    }
    bytes_char(out, '}');
}

void codec_write_choice(struct bytes *out, const struct codec_reply *r,
                        const struct codec_choice *c, bool is_first)
{
    bytes_format(out, "%s{\"index\":%lld,", is_first ? "" : ",", (long long)c->index);
    if (r->api == CODEC_COMPLETIONS) {
        bytes_text(out, "\"text\":");
        write_text(out, c);
    } else if (r->chunk) {
        write_delta(out, c);
    } else {
        bytes_text(out, "\"message\":{\"role\":\"assistant\",\"content\":");
        write_text(out, c);
        bytes_text(out, ",\"refusal\":null,\"annotations\":[]}");
    }
    write_logprobs(out, r, c);
    bytes_text(out, ",\"finish_reason\":");
    if (c->finish)
        write_quoted(out, c->finish);
    else
        bytes_text(out, "null");
    if (c->ids && !c->role) {
        bytes_char(out, ',');
        write_array(out, "token_ids", &c->lists->ids);
    }
    if (c->prompt_ids) {
        bytes_text(out, ",\"prompt_token_ids\":");
        codec_write_ids(out, c->prompt_ids, c->n_prompt_ids);
    }
    bytes_char(out, '}');
}

void codec_write_tail(struct bytes *out, const struct codec_reply *r,
                      const struct codec_usage *usage)
{
    bytes_char(out, ']');
    if (usage)
        bytes_format(out,
                     ",\"usage\":{\"prompt_tokens\":%lld,\"completion_tokens\":%lld,"
                     "\"total_tokens\":%lld,"
                     "\"prompt_tokens_details\":{\"cached_tokens\":%lld,\"audio_tokens\":0},"
                     "\"completion_tokens_details\":{\"reasoning_tokens\":0,\"audio_tokens\":0,"
                     "\"accepted_prediction_tokens\":0,\"rejected_prediction_tokens\":0}}",
                     (long long)usage->prompt_tokens, (long long)usage->completion_tokens,
                     (long long)(usage->prompt_tokens + usage->completion_tokens),
                     (long long)usage->cached_tokens);
    else if (r->usage_field)
        bytes_text(out, ",\"usage\":null");
    if (*r->session.id)
        bytes_format(out, ",\"session\":{\"id\":\"%s\",\"position\":%llu,\"version\":%llu}",
                     r->session.id, (unsigned long long)r->session.position,
                     (unsigned long long)r->session.version);
    if (r->state.data) {
        bytes_text(out, ",\"state\":\"");
        bytes_append(out, r->state.data, r->state.n);
        bytes_char(out, '"');
    }
    bytes_char(out, '}');
}

/* ---- the small endpoints ------------------------------------------------------------------ */

/* llama-server's with_pieces: a piece that is no text is an array of its bytes. */
static void write_pieces(struct bytes *out, const struct tokenizer *t, const int32_t *ids, size_t n)
{
    struct bytes piece = {0};
    bytes_char(out, '[');
    for (size_t i = 0; i < n; i++) {
        piece.n = 0;
        tokenizer_piece(t, ids[i], &piece);
        bytes_format(out, "%s{\"id\":%d,\"piece\":", i ? "," : "", ids[i]);
        if (utf8_valid_prefix(piece.data, piece.n) == piece.n)
            bytes_json_string(out, piece.n ? piece.data : "", piece.n);
        else
            write_byte_array(out, &piece);
        bytes_char(out, '}');
    }
    bytes_char(out, ']');
    out->failed |= piece.failed;
    bytes_free(&piece);
}

static void write_token_strings(struct bytes *out, const struct tokenizer *t, const int32_t *ids,
                                size_t n)
{
    struct bytes piece = {0};
    bytes_char(out, '[');
    for (size_t i = 0; i < n; i++) {
        piece.n = 0;
        tokenizer_piece(t, ids[i], &piece);
        bytes_text(out, i ? "," : "");
        bytes_json_lossy(out, piece.data, piece.n);
    }
    bytes_char(out, ']');
    out->failed |= piece.failed;
    bytes_free(&piece);
}

void codec_write_tokenized(struct bytes *out, const struct codec_request *q,
                           const struct tokenizer *t, const int32_t *ids, size_t n,
                           int64_t max_model_len)
{
    bytes_format(out, "{\"count\":%zu,\"max_model_len\":%lld,\"tokens\":", n,
                 (long long)max_model_len);
    if (q->with_pieces)
        write_pieces(out, t, ids, n);
    else
        codec_write_ids(out, ids, n);
    bytes_text(out, ",\"token_strs\":");
    if (q->return_token_strings)
        write_token_strings(out, t, ids, n);
    else
        bytes_text(out, "null");
    bytes_char(out, '}');
}

void codec_write_detokenized(struct bytes *out, const char *text, size_t n)
{
    bytes_text(out, "{\"prompt\":");
    bytes_json_string(out, text, n);
    bytes_text(out, ",\"content\":");
    bytes_json_string(out, text, n);
    bytes_char(out, '}');
}

void codec_write_model(struct bytes *out, const char *id, int64_t created, int64_t max_model_len)
{
    bytes_text(out, "{\"id\":");
    write_quoted(out, id);
    bytes_format(out, ",\"object\":\"model\",\"created\":%lld,\"owned_by\":\"latte-server\"",
                 (long long)created);
    if (max_model_len)
        bytes_format(out, ",\"max_model_len\":%lld", (long long)max_model_len);
    bytes_char(out, '}');
}
