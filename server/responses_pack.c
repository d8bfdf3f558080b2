/* responses_pack.c - see responses.h: a response as bytes, and back.
 *
 *   version u32, id[RESPONSE_ID_BYTES], given u32, hash u64[2], created u64, completed u64,
 *   status u32, lists_ids u32, n_items u64, input, cached and output tokens u64, n_pieces u64,
 *   pieces u64[n_pieces][2], then the texts echo, items, text, logprobs, prompt ids and token ids,
 *   each with its length u64.
 */
#include <stdlib.h>
#include <string.h>

#include "engine/base/pack.h"
#include "server/responses.h"

enum { VERSION = 1 };

static void put_text(struct bytes *out, const struct bytes *text)
{
    pack_u64(out, text->n);
    bytes_append(out, text->data, text->n);
}

void response_pack(struct bytes *out, const struct response *r, enum response_status status,
                   int64_t completed)
{
    pack_u32(out, VERSION);
    bytes_append(out, r->id, sizeof(r->id));
    pack_u32(out, r->instructions.given);
    pack_u64(out, r->instructions.hash[0]);
    pack_u64(out, r->instructions.hash[1]);
    pack_u64(out, (uint64_t)r->created);
    pack_u64(out, (uint64_t)completed);
    pack_u32(out, status);
    pack_u32(out, r->lists_ids);
    pack_u64(out, r->n_items);
    pack_u64(out, (uint64_t)r->input_tokens);
    pack_u64(out, (uint64_t)r->cached_tokens);
    pack_u64(out, (uint64_t)r->output_tokens);
    pack_u64(out, r->n_pieces);
    for (size_t i = 0; i < r->n_pieces; i++) {
        pack_u64(out, r->pieces[i].text);
        pack_u64(out, r->pieces[i].logprobs);
    }
    put_text(out, &r->echo);
    put_text(out, &r->items);
    put_text(out, &r->text);
    put_text(out, &r->logprobs);
    put_text(out, &r->prompt_ids);
    put_text(out, &r->token_ids);
}

static void take_text(struct unpack *u, struct bytes *out)
{
    uint64_t n = unpack_u64(u);
    const char *at = n <= (size_t)(u->end - u->at) ? unpack_skip(u, n) : NULL;
    u->failed |= !at;
    if (at)
        bytes_append(out, at, n);
    u->failed |= out->failed;
}

static void take_pieces(struct unpack *u, struct response *r)
{
    uint64_t n = unpack_u64(u);
    u->failed |= n > (size_t)(u->end - u->at) / 16;
    r->pieces = u->failed ? NULL : calloc(n + 1, sizeof(*r->pieces));
    u->failed |= !r->pieces;
    for (uint64_t i = 0; r->pieces && i < n; i++) {
        r->pieces[i].text = unpack_u64(u);
        r->pieces[i].logprobs = unpack_u64(u);
    }
    r->n_pieces = r->cap_pieces = r->pieces ? n : 0;
}

/* Every piece lies within what it is a piece of. */
static bool pieces_fit(const struct response *r)
{
    struct response_piece before = {0};
    for (size_t i = 0; i < r->n_pieces; before = r->pieces[i++])
        if (r->pieces[i].text < before.text || r->pieces[i].text > r->text.n ||
            r->pieces[i].logprobs < before.logprobs || r->pieces[i].logprobs > r->logprobs.n)
            return false;
    return true;
}

static void take_all(struct unpack *u, struct response *r)
{
    u->failed |= unpack_u32(u) != VERSION;
    unpack_raw(u, r->id, sizeof(r->id));
    r->instructions.given = unpack_u32(u);
    r->instructions.hash[0] = unpack_u64(u);
    r->instructions.hash[1] = unpack_u64(u);
    r->created = (int64_t)unpack_u64(u);
    r->completed = (int64_t)unpack_u64(u);
    r->status = (enum response_status)unpack_u32(u);
    r->lists_ids = unpack_u32(u);
    r->n_items = unpack_u64(u);
    r->input_tokens = (int64_t)unpack_u64(u);
    r->cached_tokens = (int64_t)unpack_u64(u);
    r->output_tokens = (int64_t)unpack_u64(u);
    take_pieces(u, r);
    take_text(u, &r->echo);
    take_text(u, &r->items);
    take_text(u, &r->text);
    take_text(u, &r->logprobs);
    take_text(u, &r->prompt_ids);
    take_text(u, &r->token_ids);
    bool has_ended = r->status == RESPONSE_COMPLETED || r->status == RESPONSE_INCOMPLETE;
    u->failed |= !has_ended || r->id[RESPONSE_ID_BYTES - 1] || u->at != u->end || !pieces_fit(r);
}

enum status response_unpack(struct response **out, const char *data, size_t n, const char *model,
                            struct error *err)
{
    struct bytes none[2] = {{0}};
    struct response *r = NULL;
    struct unpack u = {.at = data, .end = data + n};
    enum status st = response_new(&r, &none[0], &none[1], 0, err);
    if (st)
        return st;
    take_all(&u, r);
    if (u.failed) {
        response_release(r);
        return fail(err, STATUS_INVALID, "%zu bytes of the store are no response", n);
    }
    r->begun = true;
    r->model = model;
    r->n_packed = n;
    *out = r;
    return STATUS_OK;
}
