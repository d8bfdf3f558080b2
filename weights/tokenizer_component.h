/* tokenizer_component.h - what the sections of a tokenizer.json have in common: components
 * chosen by their type, sequences of them, and the options that several sections share.
 *
 * Threads: the loading one. Memory: texts are copied into the tokenizer's arena where said.
 * Errors:  UNSUPPORTED for types and options not understood, INVALID, NOMEM; all name the place.
 */
#ifndef LATTE_WEIGHTS_TOKENIZER_COMPONENT_H
#define LATTE_WEIGHTS_TOKENIZER_COMPONENT_H

#include "weights/tokenizer_internal.h"
#include "weights/tokenizer_json.h"

/* A reader of one component, found by its type; lists end with a NULL type. */
struct component_reader {
    const char *type;
    enum status (*read)(struct tokenizer *t, const cJSON *node, struct error *err);
};

/* Call the reader of node's type; section is its name for the error. */
enum status component_dispatch(struct tokenizer *t, const cJSON *node, const char *section,
                               const struct component_reader *readers, struct error *err);

/* Read the items of a Sequence, which are at key, in order. */
enum status
component_each(struct tokenizer *t, const cJSON *node, const char *where, const char *key,
               enum status (*read)(struct tokenizer *t, const cJSON *node, struct error *err),
               struct error *err);

/* Copy a zero-terminated text into the arena. */
enum status component_text(struct tokenizer *t, const char *source, struct text *out,
                           struct error *err);

/* node's pattern: {"String": text} or, where allowed, {"Regex": text}; text is borrowed. */
enum status component_pattern(const cJSON *node, const char *where, bool regex_allowed,
                              const char **text, bool *is_regex, struct error *err);

/* A Replace: its pattern, plain text, and content, both copied. */
enum status component_replacement(struct tokenizer *t, const cJSON *node, const char *where,
                                  struct text *from, struct text *to, struct error *err);

/* The options of a ByteLevel; trim_offsets is checked and changes no id. */
enum status component_byte_level(const cJSON *node, const char *where, bool *prefix,
                                 bool *use_regex, struct error *err);

/* The options of a Metaspace in its older (add_prefix_space) or newer form (prepend_scheme,
 * split); mark is borrowed. */
enum status component_metaspace(const cJSON *node, const char *where, const char **mark,
                                enum prepend_scheme *scheme, bool *split, struct error *err);

#endif
