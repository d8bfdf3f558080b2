/* tokenizer_output.c - the sections of a tokenizer.json that follow the words: post_processor,
 * which adds ids, and decoder, which leads back to text.
 */
#include <string.h>

#include "engine/base/utf8.h"
#include "weights/tokenizer_component.h"

/* ---- post_processor ---- */

static enum status read_post_processor(struct tokenizer *t, const cJSON *node, struct error *err);

static enum status read_post_processors(struct tokenizer *t, const cJSON *node, struct error *err)
{
    return component_each(t, node, "post_processor.Sequence", "processors", read_post_processor,
                          err);
}

/* Only offsets are its concern. */
static enum status read_post_byte_level(struct tokenizer *t, const cJSON *node, struct error *err)
{
    (void)t;
    bool prefix, use_regex;
    return component_byte_level(node, "post_processor.ByteLevel", &prefix, &use_regex, err);
}

/* Collect the ids of special_tokens[name]. */
static enum status template_ids(const cJSON *special_tokens, const char *name, int32_t *ids, int *n,
                                struct error *err)
{
    const cJSON *entry = cJSON_GetObjectItemCaseSensitive(special_tokens, name), *id;
    const cJSON *list = object_get(entry, "ids");
    if (!cJSON_IsArray(list))
        return fail(err, STATUS_INVALID,
                    "post_processor.TemplateProcessing: the special token \"%.80s\" has no ids",
                    name);
    cJSON_ArrayForEach(id, list)
    {
        if (*n == TOKENIZER_MAX_AFFIX)
            return fail(err, STATUS_UNSUPPORTED,
                        "post_processor.TemplateProcessing: more than %d ids",
                        (int)TOKENIZER_MAX_AFFIX);
        if (!node_integer(id, TOKENIZER_MAX_ID, &ids[*n]))
            return fail(err, STATUS_INVALID,
                        "post_processor.TemplateProcessing: an id of \"%.80s\" is no token id",
                        name);
        ++*n;
    }
    return STATUS_OK;
}

/* {"SpecialToken": {"id": ..}} adds ids; {"Sequence": {"id": "A"}} must come exactly once. */
static enum status template_item(const cJSON *item, const cJSON *special_tokens,
                                 int32_t ids[2][TOKENIZER_MAX_AFFIX], int n[2], bool *seen,
                                 struct error *err)
{
    static const char where[] = "post_processor.TemplateProcessing";
    static const char *const known[] = {"SpecialToken", "Sequence", NULL};
    static const char *const known_inside[] = {"id", "type_id", NULL};
    const cJSON *inside = cJSON_IsObject(item) ? item->child : NULL;
    const char *id;
    enum status st = object_only(item, where, known, err);
    if (!st)
        st = object_only(inside, where, known_inside, err);
    if (!st)
        st = object_string(inside, where, "id", &id, err);
    if (st)
        return st;
    if (inside->next)
        return fail(err, STATUS_INVALID, "%s: an item with two keys", where);
    if (strcmp(inside->string, "SpecialToken") == 0)
        return template_ids(special_tokens, id, ids[*seen], &n[*seen], err);
    if (*seen || strcmp(id, "A") != 0)
        return fail(err, STATUS_UNSUPPORTED, "%s: the sequence \"%.20s\" is not supported here",
                    where, id);
    *seen = true;
    return STATUS_OK;
}

/* Put a new template's ids around what earlier processors added. */
static enum status wrap_affixes(struct tokenizer *t, int32_t ids[2][TOKENIZER_MAX_AFFIX],
                                const int n[2], struct error *err)
{
    if (t->n_prefix + n[0] > TOKENIZER_MAX_AFFIX || t->n_suffix + n[1] > TOKENIZER_MAX_AFFIX)
        return fail(err, STATUS_UNSUPPORTED, "post_processor: more than %d ids",
                    (int)TOKENIZER_MAX_AFFIX);
    memmove(t->prefix + n[0], t->prefix, (size_t)t->n_prefix * sizeof(int32_t));
    memcpy(t->prefix, ids[0], (size_t)n[0] * sizeof(int32_t));
    memcpy(t->suffix + t->n_suffix, ids[1], (size_t)n[1] * sizeof(int32_t));
    t->n_prefix += n[0];
    t->n_suffix += n[1];
    return STATUS_OK;
}

static enum status read_template(struct tokenizer *t, const cJSON *node, struct error *err)
{
    static const char where[] = "post_processor.TemplateProcessing";
    static const char *const known[] = {"type", "single", "pair", "special_tokens", NULL};
    int32_t ids[2][TOKENIZER_MAX_AFFIX];
    int n[2] = {0};
    bool seen = false;
    const cJSON *single, *item, *special_tokens = object_get(node, "special_tokens");
    enum status st = object_only(node, where, known, err);
    if (!st)
        st = object_array(node, where, "single", &single, err);
    if (st)
        return st;
    cJSON_ArrayForEach(item, single)
    {
        st = template_item(item, special_tokens, ids, n, &seen, err);
        if (st)
            return st;
    }
    if (!seen)
        return fail(err, STATUS_UNSUPPORTED, "%s: single has no sequence A", where);
    return wrap_affixes(t, ids, n, err);
}

static enum status read_post_processor(struct tokenizer *t, const cJSON *node, struct error *err)
{
    static const struct component_reader readers[] = {{"Sequence", read_post_processors},
                                                      {"ByteLevel", read_post_byte_level},
                                                      {"TemplateProcessing", read_template},
                                                      {NULL, NULL}};
    return component_dispatch(t, node, "post_processor", readers, err);
}

static enum status check_affixes(const struct tokenizer *t, const int32_t *ids, int n,
                                 struct error *err)
{
    for (int i = 0; i < n; i++)
        if (ids[i] >= t->size || !t->pieces[ids[i]].text.data)
            return fail(err, STATUS_INVALID, "post_processor: no token has the id %d", (int)ids[i]);
    return STATUS_OK;
}

/* ---- decoder ---- */

static enum status read_decoder(struct tokenizer *t, const cJSON *node, struct error *err);

/* The one order that is understood; each stage at most once, replacements as often as liked. */
enum decode_stage { STAGE_REPLACE = 1, STAGE_BYTES, STAGE_METASPACE, STAGE_JOIN, STAGE_STRIP };

static enum status enter_stage(struct tokenizer *t, enum decode_stage stage, const char *name,
                               struct error *err)
{
    int reached = t->chain.stage;
    if (reached > (int)stage || (reached == (int)stage && stage != STAGE_REPLACE))
        return fail(err, STATUS_UNSUPPORTED, "decoder: %s at this place is not supported", name);
    t->chain.stage = (int)stage;
    return STATUS_OK;
}

static enum status read_decoders(struct tokenizer *t, const cJSON *node, struct error *err)
{
    return component_each(t, node, "decoder.Sequence", "decoders", read_decoder, err);
}

static enum status read_decode_replace(struct tokenizer *t, const cJSON *node, struct error *err)
{
    struct decode_chain *c = &t->chain;
    enum status st = enter_stage(t, STAGE_REPLACE, "Replace", err);
    if (!st && c->n_replace == TOKENIZER_MAX_STEPS)
        st = fail(err, STATUS_UNSUPPORTED, "decoder: too many Replace steps");
    if (!st)
        st = component_replacement(t, node, "decoder.Replace", &c->from[c->n_replace],
                                   &c->to[c->n_replace], err);
    if (!st)
        c->n_replace++;
    return st;
}

static enum status read_byte_fallback(struct tokenizer *t, const cJSON *node, struct error *err)
{
    static const char *const known[] = {"type", NULL};
    enum status st = object_only(node, "decoder.ByteFallback", known, err);
    if (!st)
        st = enter_stage(t, STAGE_BYTES, "ByteFallback", err);
    t->chain.byte_fallback = true;
    return st;
}

static enum status read_decode_metaspace(struct tokenizer *t, const cJSON *node, struct error *err)
{
    const char *mark;
    enum prepend_scheme scheme = PREPEND_ALWAYS;
    bool split;
    enum status st = component_metaspace(node, "decoder.Metaspace", &mark, &scheme, &split, err);
    if (!st)
        st = enter_stage(t, STAGE_METASPACE, "Metaspace", err);
    if (st)
        return st;
    utf8_decode(mark, strlen(mark), &t->chain.metaspace);
    t->chain.metaspace_prefix = scheme != PREPEND_NEVER;
    return STATUS_OK;
}

static enum status read_fuse(struct tokenizer *t, const cJSON *node, struct error *err)
{
    static const char *const known[] = {"type", NULL};
    enum status st = object_only(node, "decoder.Fuse", known, err);
    return st ? st : enter_stage(t, STAGE_JOIN, "Fuse", err);
}

static enum status read_decode_byte_level(struct tokenizer *t, const cJSON *node, struct error *err)
{
    bool prefix, use_regex;
    enum status st = component_byte_level(node, "decoder.ByteLevel", &prefix, &use_regex, err);
    if (!st && t->chain.stage > STAGE_REPLACE)
        st = fail(err, STATUS_UNSUPPORTED, "decoder: ByteLevel at this place is not supported");
    t->chain.stage = STAGE_JOIN;
    t->chain.join = JOIN_BYTES;
    return st;
}

static enum status read_strip(struct tokenizer *t, const cJSON *node, struct error *err)
{
    static const char *const known[] = {"type", "content", "start", "stop", NULL};
    static const char where[] = "decoder.Strip";
    const char *content;
    int32_t start, stop;
    uint32_t c = 0;
    enum status st = object_only(node, where, known, err);
    if (!st)
        st = object_string(node, where, "content", &content, err);
    if (!st && (!*content || utf8_decode(content, strlen(content), &c) != (int)strlen(content)))
        st = fail(err, STATUS_INVALID, "%s.content: expected one character", where);
    if (!st)
        st = object_integer(node, where, "start", 1000000, &start, err);
    if (!st)
        st = object_integer(node, where, "stop", 1000000, &stop, err);
    if (!st && stop)
        st = fail(err, STATUS_UNSUPPORTED, "%s.stop: only 0 is supported", where);
    if (!st && t->chain.stage < STAGE_JOIN)
        st = fail(err, STATUS_UNSUPPORTED, "decoder: Strip before Fuse is not supported");
    if (!st)
        st = enter_stage(t, STAGE_STRIP, "a second Strip", err);
    if (!st)
        t->chain.strip_start = (uint32_t)start;
    t->chain.strip = c;
    return st;
}

static enum status read_decoder(struct tokenizer *t, const cJSON *node, struct error *err)
{
    static const struct component_reader readers[] = {{"Sequence", read_decoders},
                                                      {"Replace", read_decode_replace},
                                                      {"ByteFallback", read_byte_fallback},
                                                      {"Metaspace", read_decode_metaspace},
                                                      {"Fuse", read_fuse},
                                                      {"ByteLevel", read_decode_byte_level},
                                                      {"Strip", read_strip},
                                                      {NULL, NULL}};
    return component_dispatch(t, node, "decoder", readers, err);
}

enum status output_load(struct tokenizer *t, const cJSON *root, struct error *err)
{
    const cJSON *post_processor = object_get(root, "post_processor");
    const cJSON *decoder = object_get(root, "decoder");
    enum status st = STATUS_OK;
    if (post_processor)
        st = read_post_processor(t, post_processor, err);
    if (!st)
        st = check_affixes(t, t->prefix, t->n_prefix, err);
    if (!st)
        st = check_affixes(t, t->suffix, t->n_suffix, err);
    t->chain.join = decoder ? JOIN_PLAIN : JOIN_SPACES;
    if (!st && decoder)
        st = read_decoder(t, decoder, err);
    return st;
}
