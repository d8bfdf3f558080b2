/* tokenizer_component.c - see tokenizer_component.h */
#include "weights/tokenizer_component.h"

#include <string.h>

#include "engine/base/utf8.h"

/* Call the reader of node's type; what names the section for the error. */
enum status component_dispatch(struct tokenizer *t, const cJSON *node, const char *what,
                               const struct component_reader *readers, struct error *err)
{
    const char *type;
    if (!cJSON_IsObject(node))
        return fail(err, STATUS_INVALID, "%s: not an object", what);
    enum status st = object_string(node, what, "type", &type, err);
    for (const struct component_reader *r = readers; !st && r->type; r++)
        if (strcmp(r->type, type) == 0)
            return r->read(t, node, err);
    return st ? st
              : fail(err, STATUS_UNSUPPORTED, "%s: the type \"%.80s\" is not supported", what,
                     type);
}

/* The items of a Sequence, in order. Depth is bounded by the check of the whole file. */
enum status
component_each(struct tokenizer *t, const cJSON *node, const char *where, const char *key,
               enum status (*read)(struct tokenizer *t, const cJSON *node, struct error *err),
               struct error *err)
{
    const char *const known[] = {"type", key, NULL};
    const cJSON *items, *item;
    enum status st = object_only(node, where, known, err);
    if (!st)
        st = object_array(node, where, key, &items, err);
    if (st)
        return st;
    cJSON_ArrayForEach(item, items)
    {
        st = read(t, item, err);
        if (st)
            return st;
    }
    return STATUS_OK;
}

enum status component_text(struct tokenizer *t, const char *source, struct text *out,
                           struct error *err)
{
    size_t n = strlen(source);
    const char *copy = arena_copy(&t->arena, source, n);
    if (!copy)
        return fail(err, STATUS_NOMEM, "tokenizer: out of memory");
    *out = (struct text){copy, n};
    return STATUS_OK;
}

/* {"String": text} or {"Regex": text}. */
enum status component_pattern(const cJSON *node, const char *where, bool regex_allowed,
                              const char **text, bool *is_regex, struct error *err)
{
    static const char *const known[] = {"String", "Regex", NULL};
    const cJSON *pattern = object_get(node, "pattern");
    enum status st = object_only(pattern, where, known, err);
    if (st)
        return st;
    *is_regex = cJSON_GetObjectItemCaseSensitive(pattern, "Regex");
    st = object_string(pattern, where, *is_regex ? "Regex" : "String", text, err);
    if (!st && *is_regex && !regex_allowed)
        st = fail(err, STATUS_UNSUPPORTED, "%s: a Regex pattern is not supported here", where);
    if (!st && !**text)
        st = fail(err, STATUS_UNSUPPORTED, "%s: an empty pattern is not supported", where);
    if (!st && pattern->child && pattern->child->next)
        st = fail(err, STATUS_INVALID, "%s: both a String and a Regex", where);
    return st;
}

/* A pattern of plain text and what it becomes, copied. */
enum status component_replacement(struct tokenizer *t, const cJSON *node, const char *where,
                                  struct text *from, struct text *to, struct error *err)
{
    static const char *const known[] = {"type", "pattern", "content", NULL};
    const char *pattern, *content;
    bool is_regex;
    enum status st = object_only(node, where, known, err);
    if (!st)
        st = component_pattern(node, where, false, &pattern, &is_regex, err);
    if (!st)
        st = object_string(node, where, "content", &content, err);
    if (!st)
        st = component_text(t, pattern, from, err);
    if (!st)
        st = component_text(t, content, to, err);
    return st;
}

/* The options of ByteLevel, wherever it stands; trim_offsets changes no id. */
enum status component_byte_level(const cJSON *node, const char *where, bool *prefix,
                                 bool *use_regex, struct error *err)
{
    static const char *const known[] = {"type", "add_prefix_space", "trim_offsets", "use_regex",
                                        NULL};
    bool trim;
    *use_regex = true;
    enum status st = object_only(node, where, known, err);
    if (!st)
        st = object_bool(node, where, "add_prefix_space", true, prefix, err);
    if (!st)
        st = object_bool(node, where, "trim_offsets", true, &trim, err);
    if (!st)
        st = object_bool(node, where, "use_regex", false, use_regex, err);
    return st;
}

static enum status read_prepend_scheme(const cJSON *node, const char *where,
                                       enum prepend_scheme *out, struct error *err)
{
    const char *scheme = "always"; /* also what older files without the key mean */
    bool add_prefix_space = true;
    enum status st = object_bool(node, where, "add_prefix_space", false, &add_prefix_space, err);
    if (!st && object_get(node, "prepend_scheme"))
        st = object_string(node, where, "prepend_scheme", &scheme, err);
    if (st)
        return st;
    if (strcmp(scheme, "always") == 0)
        *out = PREPEND_ALWAYS;
    else if (strcmp(scheme, "first") == 0)
        *out = PREPEND_FIRST;
    else if (strcmp(scheme, "never") == 0)
        *out = PREPEND_NEVER;
    else
        return fail(err, STATUS_UNSUPPORTED, "%s: the prepend_scheme \"%.80s\" is not supported",
                    where, scheme);
    if (!add_prefix_space && *out != PREPEND_NEVER)
        return fail(err, STATUS_INVALID,
                    "%s: add_prefix_space false contradicts the prepend_scheme \"%s\"", where,
                    scheme);
    return STATUS_OK;
}

/* The options of Metaspace, in its older and its newer form. */
enum status component_metaspace(const cJSON *node, const char *where, const char **mark,
                                enum prepend_scheme *scheme, bool *split, struct error *err)
{
    static const char *const known[] = {
        "type", "replacement", "add_prefix_space", "prepend_scheme", "split", "str_rep", NULL};
    enum status st = object_only(node, where, known, err);
    if (!st)
        st = object_string(node, where, "replacement", mark, err);
    uint32_t c;
    size_t n = st ? 0 : strlen(*mark);
    if (!st && (!n || utf8_decode(*mark, n, &c) != (int)n))
        st = fail(err, STATUS_INVALID, "%s.replacement: expected one character", where);
    if (!st)
        st = read_prepend_scheme(node, where, scheme, err);
    *split = true;
    if (!st)
        st = object_bool(node, where, "split", false, split, err);
    return st;
}
