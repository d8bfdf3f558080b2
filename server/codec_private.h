/* codec_private.h - what the files that read requests share; for no one else.
 *
 *   codec_request.c  a body becomes a request; rules between fields
 *   codec_fields.c   one table of fields per API
 *   codec_input.c    prompts and messages
 *   codec_items.c    the input of responses, and what they repeat of a request
 *   codec_values.c   types, ranges, error texts
 *
 * Threads, memory, errors: as codec.h says.
 */
#ifndef LATTE_SERVER_CODEC_PRIVATE_H
#define LATTE_SERVER_CODEC_PRIVATE_H

#include <cjson/cJSON.h>

#include "server/codec.h"

/* One request being read. */
struct reader {
    struct codec_request *q;
    const struct codec_context *context;
    struct arena *arena;
    struct error *err;
    const char *body; /* [n_body] */
    size_t n_body;
};

struct field;

/* Read v, which is not null, into its place in the target. path names it in errors. */
typedef enum status field_read(struct reader *r, const struct field *f, const cJSON *v,
                               const char *path, void *target);

/* A member of an object: how to read it, and where its value goes. */
struct field {
    const char *name;
    field_read *read;
    size_t offset; /* in the target */
    double min, max;
};

/* A place inside a request, "messages[3].role". */
struct path {
    char text[80];
};
struct path codec_index(const char *path, size_t i);
struct path codec_path(const char *path, const char *name);

/* Fail at a path with OpenAI's error code. */
enum status codec_wrong(struct reader *r, const char *path, const char *code, const char *format,
                        ...) __attribute__((format(printf, 4, 5)));
enum status codec_wrong_type(struct reader *r, const char *path, const char *expected,
                             const cJSON *v);
enum status codec_missing(struct reader *r, const char *path);
enum status codec_no_memory(struct reader *r);
const char *codec_type_name(const cJSON *v); /* "a string" */

/* Fields of plain types: bool, int64_t, double, const char *. */
field_read field_bool, field_int, field_number, field_string;
field_read field_text; /* struct codec_text, for long ones */
/* Fields that change nothing here: only their types are checked. */
field_read field_ignore_string, field_ignore_bool, field_ignore_int, field_ignore_object;
/* Fields that would change the answer in a way this server cannot: only what asks for nothing
 * is accepted. */
field_read field_refuse, field_refuse_choice;
/* Input; the target is the request. */
field_read field_prompt, field_text_prompt, field_token_list, field_messages, field_role;
/* Of responses. */
field_read field_input, field_include, field_metadata, field_reasoning, field_text_options;
field_read field_truncation, field_obfuscation;

enum status codec_check_length(struct reader *r, const char *path, const cJSON *array, int max);
enum status codec_read_id(struct reader *r, const cJSON *v, const char *path, int32_t *out);

/* A member that is there and not null, or NULL. */
const cJSON *codec_member(const cJSON *object, const char *name);
/* The text of a member of the object at path that must be there, and a string. */
enum status codec_required_text(struct reader *r, const cJSON *object, const char *path,
                                const char *name, const char **out);
/* Read the members of an object by a table that ends with a NULL name; null means absent,
 * unknown ones are counted or refused. */
enum status codec_read_members(struct reader *r, const struct field *table, const cJSON *object,
                               const char *path, void *target);

/* The text of one part of a message's content, whose role is known. */
typedef enum status part_read(struct reader *r, const cJSON *part, const char *path,
                              const struct chat_message *message, const char **text);
/* Make the text parts of an array a message's content, joined with newlines. */
enum status codec_join_parts(struct reader *r, const cJSON *parts, const char *path,
                             part_read *read, struct chat_message *out);

/* The last step of a request for a response: instructions, echo, items. */
enum status codec_finish_response(struct reader *r);

extern const struct field *const codec_tables[CODEC_API_COUNT];
extern const struct field codec_message_fields[];

#endif
