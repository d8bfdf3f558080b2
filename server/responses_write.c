/* responses_write.c - a response as JSON: its object, its events, and its input. See responses.h.
 */
#include <stdio.h>
#include <string.h>

#include "server/http.h"
#include "server/responses.h"

/* The events of a response that ends well:
 *
 *   0, 1          response.created, response.in_progress
 *   2, 3          response.output_item.added, response.content_part.added     with the first token
 *   4 ..          response.output_text.delta, one a piece
 *   and then      response.output_text.done, response.content_part.done,
 *                 response.output_item.done, response.completed or response.incomplete
 *
 * One that fails has response.failed after what there was. */
enum { FIRST_OF_ITEM = 2, FIRST_PIECE = 4 };
enum { TEXT_DONE, PART_DONE, ITEM_DONE, RESPONSE_DONE, N_LAST };

static void write_text(struct bytes *out, const char *text)
{
    bytes_json_string(out, text, strlen(text));
}

static bool ended_well(const struct response *r)
{
    return r->status == RESPONSE_COMPLETED || r->status == RESPONSE_INCOMPLETE;
}

/* ---- the output's one message -----------------------------------------------------------------
 */

/* The digits of the response's id are the message's, too. */
static void write_item_id(struct bytes *out, const struct response *r)
{
    bytes_format(out, "\"msg_%s\"", r->id + strlen("resp_"));
}

static void write_logprobs(struct bytes *out, const struct response *r, size_t from, size_t to)
{
    bytes_text(out, "\"logprobs\":[");
    if (from && from < to)
        from++; /* the comma between the pieces */
    bytes_append(out, r->logprobs.n ? r->logprobs.data + from : "", to - from);
    bytes_char(out, ']');
}

static void write_span(struct bytes *out, const struct response *r, size_t from, size_t to)
{
    bytes_json_string(out, r->text.n ? r->text.data + from : "", to - from);
}

/* full: with the text there is. */
static void write_part(struct bytes *out, const struct response *r, bool full)
{
    bytes_text(out, "{\"type\":\"output_text\",\"annotations\":[],");
    write_logprobs(out, r, 0, full ? r->logprobs.n : 0);
    bytes_text(out, ",\"text\":");
    write_span(out, r, 0, full ? r->text.n : 0);
    bytes_char(out, '}');
}

static void write_item(struct bytes *out, const struct response *r, bool full)
{
    const char *status = !full                             ? "in_progress"
                         : r->status == RESPONSE_COMPLETED ? "completed"
                                                           : "incomplete";
    bytes_text(out, "{\"id\":");
    write_item_id(out, r);
    bytes_format(out,
                 ",\"type\":\"message\",\"status\":\"%s\",\"role\":\"assistant\",\"content\":[",
                 status);
    if (full)
        write_part(out, r, true);
    bytes_text(out, "]}");
}

/* ---- the object -------------------------------------------------------------------------------
 */

static const char *status_text(enum response_status status)
{
    static const char *const texts[] = {
        [RESPONSE_IN_PROGRESS] = "in_progress",
        [RESPONSE_COMPLETED] = "completed",
        [RESPONSE_INCOMPLETE] = "incomplete",
        [RESPONSE_FAILED] = "failed",
    };
    return texts[status];
}

static void write_error(struct bytes *out, const struct response *r)
{
    const char *code =
        http_status_of(r->error.status) == 429 ? "rate_limit_exceeded" : "server_error";
    bytes_format(out, ",\"error\":{\"code\":\"%s\",\"message\":", code);
    write_text(out, r->error.text);
    bytes_char(out, '}');
}

static void write_usage(struct bytes *out, const struct response *r)
{
    bytes_format(out,
                 ",\"usage\":{\"input_tokens\":%lld,"
                 "\"input_tokens_details\":{\"cached_tokens\":%lld,\"cache_write_tokens\":0},"
                 "\"output_tokens\":%lld,\"output_tokens_details\":{\"reasoning_tokens\":0},"
                 "\"total_tokens\":%lld}",
                 (long long)r->input_tokens, (long long)r->cached_tokens,
                 (long long)r->output_tokens, (long long)(r->input_tokens + r->output_tokens));
}

static void write_ids(struct bytes *out, const char *name, const struct bytes *ids)
{
    bytes_format(out, ",\"%s\":[", name);
    bytes_append(out, ids->data, ids->n);
    bytes_char(out, ']');
}

/* As it is in this status: in progress is also how one begins that has ended since. */
static void write_object(struct bytes *out, const struct response *r, enum response_status status)
{
    bool in_progress = status == RESPONSE_IN_PROGRESS;
    bytes_format(out,
                 "{\"id\":\"%s\",\"object\":\"response\",\"created_at\":%lld,\"status\":\"%s\"",
                 r->id, (long long)r->created, status_text(status));
    if (status == RESPONSE_COMPLETED)
        bytes_format(out, ",\"completed_at\":%lld", (long long)r->completed);
    else
        bytes_text(out, ",\"completed_at\":null");
    bytes_text(out, ",\"background\":false");
    if (status == RESPONSE_FAILED)
        write_error(out, r);
    else
        bytes_text(out, ",\"error\":null");
    bytes_format(out, ",\"incomplete_details\":%s",
                 status == RESPONSE_INCOMPLETE ? "{\"reason\":\"max_output_tokens\"}" : "null");
    bytes_text(out, ",\"model\":");
    write_text(out, r->model);
    bytes_text(out, ",\"output\":[");
    if (!in_progress && r->begun)
        write_item(out, r, true);
    bytes_char(out, ']');
    bytes_append(out, r->echo.data, r->echo.n);
    if (ended_well(r) && !in_progress)
        write_usage(out, r);
    else
        bytes_text(out, ",\"usage\":null");
    if (r->lists_ids && !in_progress) {
        write_ids(out, "prompt_token_ids", &r->prompt_ids);
        write_ids(out, "token_ids", &r->token_ids);
    }
    bytes_char(out, '}');
}

void response_write(struct bytes *out, const struct response *r)
{
    write_object(out, r, r->status);
}

/* ---- events -----------------------------------------------------------------------------------
 */

static size_t n_before_end(const struct response *r)
{
    return r->begun ? FIRST_PIECE + r->n_pieces : FIRST_OF_ITEM;
}

size_t response_n_events(const struct response *r)
{
    size_t n = n_before_end(r);
    if (r->status == RESPONSE_IN_PROGRESS)
        return n;
    return n + (r->status == RESPONSE_FAILED ? 1 : N_LAST);
}

static void open_event(struct bytes *out, const char *type, size_t number)
{
    bytes_format(out, "event: %s\ndata: {\"type\":\"%s\",\"sequence_number\":%zu", type, type,
                 number);
}

static void close_event(struct bytes *out)
{
    bytes_text(out, "}\n\n");
}

static void write_response_event(struct bytes *out, const struct response *r, const char *type,
                                 size_t number, enum response_status status)
{
    open_event(out, type, number);
    bytes_text(out, ",\"response\":");
    write_object(out, r, status);
    close_event(out);
}

static void write_item_event(struct bytes *out, const struct response *r, const char *type,
                             size_t number, bool full)
{
    open_event(out, type, number);
    bytes_text(out, ",\"output_index\":0,\"item\":");
    write_item(out, r, full);
    close_event(out);
}

/* The beginning of the events about the text. */
static void open_text_event(struct bytes *out, const struct response *r, const char *type,
                            size_t number)
{
    open_event(out, type, number);
    bytes_text(out, ",\"item_id\":");
    write_item_id(out, r);
    bytes_text(out, ",\"output_index\":0,\"content_index\":0,");
}

static void write_part_event(struct bytes *out, const struct response *r, const char *type,
                             size_t number, bool full)
{
    open_text_event(out, r, type, number);
    bytes_text(out, "\"part\":");
    write_part(out, r, full);
    close_event(out);
}

static void write_delta_event(struct bytes *out, const struct response *r, size_t number)
{
    size_t i = number - FIRST_PIECE;
    const struct response_piece none = {0, 0}, *from = i ? &r->pieces[i - 1] : &none,
                                *to = &r->pieces[i];
    open_text_event(out, r, "response.output_text.delta", number);
    bytes_text(out, "\"delta\":");
    write_span(out, r, from->text, to->text);
    bytes_char(out, ',');
    write_logprobs(out, r, from->logprobs, to->logprobs);
    close_event(out);
}

static void write_text_done(struct bytes *out, const struct response *r, size_t number)
{
    open_text_event(out, r, "response.output_text.done", number);
    bytes_text(out, "\"text\":");
    write_span(out, r, 0, r->text.n);
    bytes_char(out, ',');
    write_logprobs(out, r, 0, r->logprobs.n);
    close_event(out);
}

static void write_last_event(struct bytes *out, const struct response *r, size_t number)
{
    static const char *const types[] = {
        [RESPONSE_COMPLETED] = "response.completed",
        [RESPONSE_INCOMPLETE] = "response.incomplete",
        [RESPONSE_FAILED] = "response.failed",
    };
    write_response_event(out, r, types[r->status], number, r->status);
}

void response_write_event(struct bytes *out, const struct response *r, size_t number)
{
    CHECK(number < response_n_events(r));
    size_t n_before = n_before_end(r);
    if (number < FIRST_OF_ITEM) {
        write_response_event(out, r, number ? "response.in_progress" : "response.created", number,
                             RESPONSE_IN_PROGRESS);
        return;
    }
    if (number >= n_before) {
        size_t last = r->status == RESPONSE_FAILED ? RESPONSE_DONE : number - n_before;
        if (last == TEXT_DONE)
            write_text_done(out, r, number);
        else if (last == PART_DONE)
            write_part_event(out, r, "response.content_part.done", number, true);
        else if (last == ITEM_DONE)
            write_item_event(out, r, "response.output_item.done", number, true);
        else
            write_last_event(out, r, number);
        return;
    }
    if (number == FIRST_OF_ITEM)
        write_item_event(out, r, "response.output_item.added", number, false);
    else if (number < FIRST_PIECE)
        write_part_event(out, r, "response.content_part.added", number, false);
    else
        write_delta_event(out, r, number);
}

/* ---- input ------------------------------------------------------------------------------------
 */

struct item_id {
    char text[40];
};

/* The id of the i-th item of the input: digits of the response's, and i. */
static struct item_id id_of_item(const struct response *r, size_t i)
{
    struct item_id id;
    snprintf(id.text, sizeof(id.text), "msg_%.24s%08x", r->id + strlen("resp_"), (unsigned)i);
    return id;
}

/* The place of an item, n_items when there is none with that id. */
static size_t find_item(const struct response *r, const char *id)
{
    size_t i = 0;
    while (i < r->n_items && strcmp(id_of_item(r, i).text, id))
        i++;
    return i;
}

/* Where the lines of items [first, first + n) begin, and where the last one ends. */
static void find_lines(const struct response *r, size_t first, size_t n, size_t *starts)
{
    const char *at = r->items.data;
    for (size_t i = 0; i <= first + n; i++) {
        if (i >= first)
            starts[i - first] = (size_t)(at - r->items.data);
        if (i < first + n)
            at = (char *)memchr(at, '\n', r->items.n - (size_t)(at - r->items.data)) + 1;
    }
}

static void write_page(struct bytes *out, const struct response *r, size_t first, size_t n,
                       bool ascending)
{
    size_t starts[RESPONSE_MAX_PAGE + 1];
    find_lines(r, first, n, starts);
    for (size_t k = 0; k < n; k++) {
        size_t i = ascending ? k : n - 1 - k;
        bytes_format(out, "%s{\"id\":\"%s\",", k ? "," : "", id_of_item(r, first + i).text);
        bytes_append(out, r->items.data + starts[i], starts[i + 1] - 1 - starts[i]);
        bytes_char(out, '}');
    }
}

enum status response_write_items(struct bytes *out, const struct response *r,
                                 const struct response_page *page, struct error *err)
{
    size_t first = 0, n = r->n_items; /* of what may be listed */
    CHECK(page->limit <= RESPONSE_MAX_PAGE);
    if (page->after) {
        size_t after = find_item(r, page->after);
        if (after == n)
            return fail_field(err, STATUS_NOT_FOUND, "after",
                              "Item with id '%.64s' not found in the input of response '%s'.",
                              page->after, r->id);
        first = page->ascending ? after + 1 : 0;
        n = page->ascending ? n - first : after;
    }
    size_t n_page = n < page->limit ? n : page->limit;
    if (!page->ascending)
        first += n - n_page;
    bytes_text(out, "{\"object\":\"list\",\"data\":[");
    write_page(out, r, first, n_page, page->ascending);
    size_t last = n_page ? first + n_page - 1 : 0;
    if (n_page)
        bytes_format(out, "],\"first_id\":\"%s\",\"last_id\":\"%s\"",
                     id_of_item(r, page->ascending ? first : last).text,
                     id_of_item(r, page->ascending ? last : first).text);
    else
        bytes_text(out, "],\"first_id\":\"\",\"last_id\":\"\"");
    bytes_format(out, ",\"has_more\":%s}", n > n_page ? "true" : "false");
    return STATUS_OK;
}
