/* tokenizer_pipeline.c - the sections of a tokenizer.json that lead from text to words:
 * normalizer and pre_tokenizer. Each component's options are read in full, or refused by name.
 */
#include <string.h>

#include "weights/tokenizer_component.h"

static const char GPT2_PATTERN[] =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+"
    "|\\s+(?!\\S)|\\s+";

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
    return component_each(t, node, "normalizer.Sequence", "normalizers", read_normalizer, err);
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
        st = component_text(t, text, &step.to, err);
    return st ? st : add_normalizer(t, step, err);
}

static enum status read_normalizer_replace(struct tokenizer *t, const cJSON *node,
                                           struct error *err)
{
    struct normalize_step step = {.kind = NORMALIZE_REPLACE};
    enum status st =
        component_replacement(t, node, "normalizer.Replace", &step.from, &step.to, err);
    return st ? st : add_normalizer(t, step, err);
}

static enum status read_normalizer(struct tokenizer *t, const cJSON *node, struct error *err)
{
    static const struct component_reader readers[] = {{"Sequence", read_normalizers},
                                                      {"NFC", read_nfc},
                                                      {"Prepend", read_prepend},
                                                      {"Replace", read_normalizer_replace},
                                                      {NULL, NULL}};
    return component_dispatch(t, node, "normalizer", readers, err);
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
    return component_each(t, node, "pre_tokenizer.Sequence", "pretokenizers", read_pre_tokenizer,
                          err);
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
        st = component_pattern(node, where, true, &pattern, &is_regex, err);
    if (!st && is_regex)
        st = pattern_compile(&step.pattern, pattern, strlen(pattern), err);
    else if (!st)
        st = component_text(t, pattern, &step.pattern.literal, err);
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

static enum status read_words_byte_level(struct tokenizer *t, const cJSON *node, struct error *err)
{
    bool prefix = false, use_regex = true;
    enum status st =
        component_byte_level(node, "pre_tokenizer.ByteLevel", &prefix, &use_regex, err);
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

static enum status read_words_metaspace(struct tokenizer *t, const cJSON *node, struct error *err)
{
    struct word_step step = {.kind = WORDS_METASPACE};
    const char *mark;
    bool split = true;
    enum status st =
        component_metaspace(node, "pre_tokenizer.Metaspace", &mark, &step.prepend, &split, err);
    if (!st)
        st = component_text(t, mark, &step.text, err);
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
    static const struct component_reader readers[] = {{"Sequence", read_pre_tokenizers},
                                                      {"Split", read_split},
                                                      {"Digits", read_digits},
                                                      {"ByteLevel", read_words_byte_level},
                                                      {"Metaspace", read_words_metaspace},
                                                      {NULL, NULL}};
    return component_dispatch(t, node, "pre_tokenizer", readers, err);
}

enum status pipeline_load(struct tokenizer *t, const cJSON *root, struct error *err)
{
    const cJSON *normalizer = object_get(root, "normalizer");
    const cJSON *pre_tokenizer = object_get(root, "pre_tokenizer");
    enum status st = STATUS_OK;
    if (normalizer)
        st = read_normalizer(t, normalizer, err);
    if (!st && pre_tokenizer)
        st = read_pre_tokenizer(t, pre_tokenizer, err);
    return st;
}
