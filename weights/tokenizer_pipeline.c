/* tokenizer_pipeline.c - normalizer, pre_tokenizer, post_processor and decoder of a
 * tokenizer.json: each component's options read in full, or refused by name.
 */
#include <string.h>

#include "engine/base/utf8.h"
#include "weights/tokenizer_internal.h"
#include "weights/tokenizer_json.h"

static const char GPT2_PATTERN[] =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+"
    "|\\s+(?!\\S)|\\s+";

/* A reader of one component, found by its type. */
struct reader {
    const char *type;
    enum status (*read)(struct tokenizer *t, const cJSON *node, struct error *err);
};

/* Call the reader of node's type; what names the section for the error. */
static enum status dispatch(struct tokenizer *t, const cJSON *node, const char *what,
                            const struct reader *readers, struct error *err)
{
    const char *type;
    if (!cJSON_IsObject(node))
        return fail(err, STATUS_INVALID, "%s: not an object", what);
    enum status st = object_string(node, what, "type", &type, err);
    for (const struct reader *r = readers; !st && r->type; r++)
        if (strcmp(r->type, type) == 0)
            return r->read(t, node, err);
    return st ? st
              : fail(err, STATUS_UNSUPPORTED, "%s: the type \"%.80s\" is not supported", what,
                     type);
}

/* The items of a Sequence, in order. Depth is bounded by the check of the whole file. */
static enum status
each_item(struct tokenizer *t, const cJSON *node, const char *where, const char *key,
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

static enum status copy_text(struct tokenizer *t, const char *source, struct text *out,
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
static enum status read_pattern(const cJSON *node, const char *where, bool regex_allowed,
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
static enum status read_replacement(struct tokenizer *t, const cJSON *node, const char *where,
                                    struct text *from, struct text *to, struct error *err)
{
    static const char *const known[] = {"type", "pattern", "content", NULL};
    const char *pattern, *content;
    bool is_regex;
    enum status st = object_only(node, where, known, err);
    if (!st)
        st = read_pattern(node, where, false, &pattern, &is_regex, err);
    if (!st)
        st = object_string(node, where, "content", &content, err);
    if (!st)
        st = copy_text(t, pattern, from, err);
    if (!st)
        st = copy_text(t, content, to, err);
    return st;
}

/* ---- normalizer ---- */

static enum status read_normalizer(struct tokenizer *t, const cJSON *node, struct error *err);

static enum status add_normalizer(struct tokenizer *t, struct normalize_step step,
                                  struct error *err)
{
    if (t->normalizer.n_steps == TOKENIZER_MAX_STEPS)
        return fail(err, STATUS_UNSUPPORTED, "normalizer: more than %d steps",
                    (int)TOKENIZER_MAX_STEPS);
    t->normalizer.steps[t->normalizer.n_steps++] = step;
    return STATUS_OK;
}

static enum status read_normalizers(struct tokenizer *t, const cJSON *node, struct error *err)
{
    return each_item(t, node, "normalizer.Sequence", "normalizers", read_normalizer, err);
}

static enum status read_nfc(struct tokenizer *t, const cJSON *node, struct error *err)
{
    static const char *const known[] = {"type", NULL};
    enum status st = object_only(node, "normalizer.NFC", known, err);
    return st ? st : add_normalizer(t, (struct normalize_step){.kind = NORMALIZE_NFC}, err);
}

static enum status read_prepend(struct tokenizer *t, const cJSON *node, struct error *err)
{
    static const char *const known[] = {"type", "prepend", NULL};
    struct normalize_step step = {.kind = NORMALIZE_PREPEND};
    const char *text;
    enum status st = object_only(node, "normalizer.Prepend", known, err);
    if (!st)
        st = object_string(node, "normalizer.Prepend", "prepend", &text, err);
    if (!st)
        st = copy_text(t, text, &step.to, err);
    return st ? st : add_normalizer(t, step, err);
}

static enum status read_normalizer_replace(struct tokenizer *t, const cJSON *node,
                                           struct error *err)
{
    struct normalize_step step = {.kind = NORMALIZE_REPLACE};
    enum status st = read_replacement(t, node, "normalizer.Replace", &step.from, &step.to, err);
    return st ? st : add_normalizer(t, step, err);
}

static enum status read_normalizer(struct tokenizer *t, const cJSON *node, struct error *err)
{
    static const struct reader readers[] = {{"Sequence", read_normalizers},
                                            {"NFC", read_nfc},
                                            {"Prepend", read_prepend},
                                            {"Replace", read_normalizer_replace},
                                            {NULL, NULL}};
    return dispatch(t, node, "normalizer", readers, err);
}

/* ---- pre_tokenizer ---- */

static enum status read_pre_tokenizer(struct tokenizer *t, const cJSON *node, struct error *err);

/* Takes over the step's pattern, on failure too. */
static enum status add_word_step(struct tokenizer *t, struct word_step step, struct error *err)
{
    struct splitter *s = &t->splitter;
    const char *wrong = NULL;
    if (s->n_steps == TOKENIZER_MAX_STEPS)
        wrong = "too many steps";
    else if (s->n_steps && s->steps[s->n_steps - 1].kind == WORDS_BYTES)
        wrong = "a step behind ByteLevel";
    if (wrong) {
        pattern_free(&step.pattern);
        return fail(err, STATUS_UNSUPPORTED, "pre_tokenizer: %s is not supported", wrong);
    }
    s->steps[s->n_steps++] = step;
    return STATUS_OK;
}

static enum status read_pre_tokenizers(struct tokenizer *t, const cJSON *node, struct error *err)
{
    return each_item(t, node, "pre_tokenizer.Sequence", "pretokenizers", read_pre_tokenizer, err);
}

static enum status read_behavior(const char *name, enum split_behavior *out, struct error *err)
{
    static const char *const names[] = {
        [SPLIT_REMOVED] = "Removed",
        [SPLIT_ISOLATED] = "Isolated",
        [SPLIT_MERGED_WITH_PREVIOUS] = "MergedWithPrevious",
        [SPLIT_MERGED_WITH_NEXT] = "MergedWithNext",
        [SPLIT_CONTIGUOUS] = "Contiguous",
    };
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++)
        if (strcmp(name, names[i]) == 0) {
            *out = (enum split_behavior)i;
            return STATUS_OK;
        }
    return fail(err, STATUS_UNSUPPORTED,
                "pre_tokenizer.Split: the behavior \"%.80s\" is not supported", name);
}

static enum status read_split(struct tokenizer *t, const cJSON *node, struct error *err)
{
    static const char *const known[] = {"type", "pattern", "behavior", "invert", NULL};
    static const char where[] = "pre_tokenizer.Split";
    struct word_step step = {.kind = WORDS_SPLIT};
    const char *pattern, *behavior;
    bool is_regex = false;
    enum status st = object_only(node, where, known, err);
    if (!st)
        st = object_string(node, where, "behavior", &behavior, err);
    if (!st)
        st = read_behavior(behavior, &step.behavior, err);
    if (!st)
        st = object_bool(node, where, "invert", true, &step.invert, err);
    if (!st)
        st = read_pattern(node, where, true, &pattern, &is_regex, err);
    if (!st && is_regex)
        st = pattern_compile(&step.pattern, pattern, strlen(pattern), err);
    else if (!st)
        st = copy_text(t, pattern, &step.pattern.literal, err);
    return st ? st : add_word_step(t, step, err);
}

static enum status read_digits(struct tokenizer *t, const cJSON *node, struct error *err)
{
    static const char *const known[] = {"type", "individual_digits", NULL};
    struct word_step step = {.kind = WORDS_SPLIT};
    bool individual = false;
    enum status st = object_only(node, "pre_tokenizer.Digits", known, err);
    if (!st)
        st = object_bool(node, "pre_tokenizer.Digits", "individual_digits", true, &individual, err);
    if (!st)
        st = pattern_compile_own(&step.pattern, tokenizer_digit_class, err);
    step.behavior = individual ? SPLIT_ISOLATED : SPLIT_CONTIGUOUS;
    return st ? st : add_word_step(t, step, err);
}

/* The options of ByteLevel, wherever it stands; trim_offsets changes no id. */
static enum status read_byte_level_options(const cJSON *node, const char *where, bool *prefix,
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

static enum status read_words_byte_level(struct tokenizer *t, const cJSON *node, struct error *err)
{
    bool prefix = false, use_regex = true;
    enum status st =
        read_byte_level_options(node, "pre_tokenizer.ByteLevel", &prefix, &use_regex, err);
    if (!st && prefix)
        st = add_word_step(t, (struct word_step){.kind = WORDS_SPACE}, err);
    if (!st && use_regex) {
        struct word_step step = {.kind = WORDS_SPLIT, .behavior = SPLIT_ISOLATED};
        st = pattern_compile(&step.pattern, GPT2_PATTERN, strlen(GPT2_PATTERN), err);
        if (!st)
            st = add_word_step(t, step, err);
    }
    return st ? st : add_word_step(t, (struct word_step){.kind = WORDS_BYTES}, err);
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
static enum status read_metaspace_options(const cJSON *node, const char *where, const char **mark,
                                          enum prepend_scheme *scheme, bool *split,
                                          struct error *err)
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

static enum status read_words_metaspace(struct tokenizer *t, const cJSON *node, struct error *err)
{
    struct word_step step = {.kind = WORDS_METASPACE};
    const char *mark;
    bool split = true;
    enum status st =
        read_metaspace_options(node, "pre_tokenizer.Metaspace", &mark, &step.prepend, &split, err);
    if (!st)
        st = copy_text(t, mark, &step.text, err);
    if (!st)
        st = add_word_step(t, step, err);
    if (st || !split)
        return st;
    struct word_step cut = {.kind = WORDS_SPLIT, .behavior = SPLIT_MERGED_WITH_NEXT};
    cut.pattern.literal = step.text;
    return add_word_step(t, cut, err);
}

static enum status read_pre_tokenizer(struct tokenizer *t, const cJSON *node, struct error *err)
{
    static const struct reader readers[] = {{"Sequence", read_pre_tokenizers},
                                            {"Split", read_split},
                                            {"Digits", read_digits},
                                            {"ByteLevel", read_words_byte_level},
                                            {"Metaspace", read_words_metaspace},
                                            {NULL, NULL}};
    return dispatch(t, node, "pre_tokenizer", readers, err);
}

/* ---- post_processor ---- */

static enum status read_post_processor(struct tokenizer *t, const cJSON *node, struct error *err);

static enum status read_post_processors(struct tokenizer *t, const cJSON *node, struct error *err)
{
    return each_item(t, node, "post_processor.Sequence", "processors", read_post_processor, err);
}

/* Only offsets are its concern. */
static enum status read_post_byte_level(struct tokenizer *t, const cJSON *node, struct error *err)
{
    (void)t;
    bool prefix, use_regex;
    return read_byte_level_options(node, "post_processor.ByteLevel", &prefix, &use_regex, err);
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
    static const struct reader readers[] = {{"Sequence", read_post_processors},
                                            {"ByteLevel", read_post_byte_level},
                                            {"TemplateProcessing", read_template},
                                            {NULL, NULL}};
    return dispatch(t, node, "post_processor", readers, err);
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
    return each_item(t, node, "decoder.Sequence", "decoders", read_decoder, err);
}

static enum status read_decode_replace(struct tokenizer *t, const cJSON *node, struct error *err)
{
    struct decode_chain *c = &t->chain;
    enum status st = enter_stage(t, STAGE_REPLACE, "Replace", err);
    if (!st && c->n_replace == TOKENIZER_MAX_STEPS)
        st = fail(err, STATUS_UNSUPPORTED, "decoder: too many Replace steps");
    if (!st)
        st = read_replacement(t, node, "decoder.Replace", &c->from[c->n_replace],
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
    enum status st = read_metaspace_options(node, "decoder.Metaspace", &mark, &scheme, &split, err);
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
    enum status st = read_byte_level_options(node, "decoder.ByteLevel", &prefix, &use_regex, err);
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
    static const struct reader readers[] = {{"Sequence", read_decoders},
                                            {"Replace", read_decode_replace},
                                            {"ByteFallback", read_byte_fallback},
                                            {"Metaspace", read_decode_metaspace},
                                            {"Fuse", read_fuse},
                                            {"ByteLevel", read_decode_byte_level},
                                            {"Strip", read_strip},
                                            {NULL, NULL}};
    return dispatch(t, node, "decoder", readers, err);
}

/* ---- the whole ---- */

enum status pipeline_load(struct tokenizer *t, const cJSON *root, struct error *err)
{
    const cJSON *normalizer = object_get(root, "normalizer");
    const cJSON *pre_tokenizer = object_get(root, "pre_tokenizer");
    const cJSON *post_processor = object_get(root, "post_processor");
    const cJSON *decoder = object_get(root, "decoder");
    enum status st = STATUS_OK;
    if (normalizer)
        st = read_normalizer(t, normalizer, err);
    if (!st && pre_tokenizer)
        st = read_pre_tokenizer(t, pre_tokenizer, err);
    if (!st && post_processor)
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
