/* tokenizer_load.c - tokenizer.json to struct tokenizer: model, added tokens, id table.
 *
 * Lists are walked child by child: cJSON finds by position in linear time.
 */
#include <stdio.h>
#include <string.h>

#include "engine/base/json.h"
#include "engine/base/utf8.h"
#include "weights/tokenizer_internal.h"
#include "weights/tokenizer_json.h"

static enum status no_memory(struct error *err)
{
    return fail(err, STATUS_NOMEM, "tokenizer: out of memory");
}

static size_t count_children(const cJSON *node)
{
    size_t n = 0;
    const cJSON *child;
    cJSON_ArrayForEach(child, node) n++;
    return n;
}

/* ---- model ---- */

static enum status read_vocab(struct tokenizer *t, const cJSON *model, struct error *err)
{
    const cJSON *vocab = object_get(model, "vocab"), *entry;
    if (!cJSON_IsObject(vocab))
        return fail(err, STATUS_INVALID, "model.vocab: expected an object");
    struct string_map *map = &t->bpe.vocab;
    if (!string_map_init(map, &t->arena, count_children(vocab)))
        return no_memory(err);
    cJSON_ArrayForEach(entry, vocab)
    {
        int32_t id;
        if (!node_integer(entry, TOKENIZER_MAX_ID, &id))
            return fail(err, STATUS_INVALID,
                        "model.vocab: the id of \"%.80s\" is not an integer of 0 to %d",
                        entry->string, (int)TOKENIZER_MAX_ID);
        size_t n = strlen(entry->string);
        char *key = arena_copy(&t->arena, entry->string, n);
        if (!key)
            return no_memory(err);
        if (!string_map_add(map, key, n, id))
            return fail(err, STATUS_INVALID, "model.vocab: \"%.80s\" is there twice", key);
        if (id >= t->size)
            t->size = id + 1;
    }
    return STATUS_OK;
}

/* The two halves of a merge: ["a", "b"] or "a b". Halves point into node or into line. */
static enum status merge_halves(const cJSON *node, size_t i, struct text half[2], struct error *err)
{
    if (cJSON_IsArray(node) && count_children(node) == 2 && cJSON_IsString(node->child) &&
        cJSON_IsString(node->child->next)) {
        const char *left = node->child->valuestring, *right = node->child->next->valuestring;
        half[0] = (struct text){left, strlen(left)};
        half[1] = (struct text){right, strlen(right)};
        return STATUS_OK;
    }
    const char *space = cJSON_IsString(node) ? strchr(node->valuestring, ' ') : NULL;
    if (!space || strchr(space + 1, ' '))
        return fail(err, STATUS_INVALID, "model.merges[%zu]: expected \"a b\" or [\"a\", \"b\"]",
                    i);
    half[0] = (struct text){node->valuestring, (size_t)(space - node->valuestring)};
    half[1] = (struct text){space + 1, strlen(space + 1)};
    return STATUS_OK;
}

static enum status add_merge(struct tokenizer *t, const cJSON *node, size_t i, uint32_t rank,
                             struct bytes *whole, struct error *err)
{
    const struct string_map *vocab = &t->bpe.vocab;
    struct text half[2] = {{0}};
    enum status st = merge_halves(node, i, half, err);
    if (st)
        return st;
    whole->n = 0;
    bytes_append(whole, half[0].data, half[0].n);
    bytes_append(whole, half[1].data, half[1].n);
    if (whole->failed)
        return no_memory(err);
    int32_t left = string_map_get(vocab, half[0].data, half[0].n);
    int32_t right = string_map_get(vocab, half[1].data, half[1].n);
    int32_t id = string_map_get(vocab, whole->data, whole->n);
    if (left < 0 || right < 0 || id < 0) {
        struct text missing = left < 0    ? half[0]
                              : right < 0 ? half[1]
                                          : (struct text){whole->data, whole->n};
        return fail(err, STATUS_INVALID, "model.merges[%zu]: \"%.*s\" is not in the vocabulary", i,
                    (int)(missing.n > 80 ? 80 : missing.n), missing.data);
    }
    merge_map_set(&t->bpe.merges, left, right, rank, id);
    return STATUS_OK;
}

static bool is_version_line(const cJSON *node)
{
    return cJSON_IsString(node) && strncmp(node->valuestring, "#version", 8) == 0;
}

static enum status read_merges(struct tokenizer *t, const cJSON *model, struct error *err)
{
    const cJSON *merges, *node;
    enum status st = object_array(model, "model", "merges", &merges, err);
    if (st)
        return st;
    if (!merge_map_init(&t->bpe.merges, &t->arena, count_children(merges)))
        return no_memory(err);
    struct bytes whole = {0};
    size_t i = 0;
    uint32_t rank = 0;
    cJSON_ArrayForEach(node, merges)
    {
        if (!st && !is_version_line(node))
            st = add_merge(t, node, i, rank++, &whole, err);
        i++;
    }
    bytes_free(&whole);
    return st;
}

/* Options whose value would change the result in a way that is not built. */
static enum status check_model_options(const cJSON *model, struct error *err)
{
    static const char *const affixes[] = {"continuing_subword_prefix", "end_of_word_suffix"};
    const cJSON *type = object_get(model, "type"), *dropout = object_get(model, "dropout");
    if (type && (!cJSON_IsString(type) || strcmp(type->valuestring, "BPE") != 0))
        return fail(err, STATUS_UNSUPPORTED, "model: the type \"%.80s\" is not supported, only BPE",
                    cJSON_IsString(type) ? type->valuestring : "?");
    if (dropout && !(cJSON_IsNumber(dropout) && dropout->valuedouble == 0))
        return fail(err, STATUS_UNSUPPORTED, "model.dropout: only null is supported");
    for (size_t i = 0; i < 2; i++) {
        const cJSON *affix = object_get(model, affixes[i]);
        if (affix && !(cJSON_IsString(affix) && !*affix->valuestring))
            return fail(err, STATUS_UNSUPPORTED, "model.%s: only null is supported", affixes[i]);
    }
    return STATUS_OK;
}

static enum status read_model_options(struct tokenizer *t, const cJSON *model, struct error *err)
{
    struct bpe *b = &t->bpe;
    enum status st = check_model_options(model, err);
    if (!st)
        st = object_bool(model, "model", "fuse_unk", false, &b->fuse_unk, err);
    if (!st)
        st = object_bool(model, "model", "byte_fallback", false, &b->byte_fallback, err);
    if (!st)
        st = object_bool(model, "model", "ignore_merges", false, &b->ignore_merges, err);
    if (st || !object_get(model, "unk_token"))
        return st;
    const char *unk = NULL;
    st = object_string(model, "model", "unk_token", &unk, err);
    if (st)
        return st;
    b->unk_token.n = strlen(unk);
    b->unk_token.data = arena_copy(&t->arena, unk, b->unk_token.n);
    return b->unk_token.data ? STATUS_OK : no_memory(err);
}

/* Tables for what encode looks up most. */
static void fill_tables(struct bpe *b)
{
    for (uint32_t c = 0; c < DIRECT_CHARS; c++) {
        char text[4];
        b->direct[c] = string_map_get(&b->vocab, text, (size_t)utf8_encode(c, text));
    }
    for (unsigned byte = 0; byte < 256; byte++) {
        char text[8];
        snprintf(text, sizeof(text), "<0x%02X>", byte);
        b->byte_ids[byte] = string_map_get(&b->vocab, text, 6);
    }
    b->unk_id =
        b->unk_token.data ? string_map_get(&b->vocab, b->unk_token.data, b->unk_token.n) : -1;
}

static enum status read_model(struct tokenizer *t, const cJSON *root, struct error *err)
{
    static const char *const known[] = {"type",
                                        "dropout",
                                        "unk_token",
                                        "continuing_subword_prefix",
                                        "end_of_word_suffix",
                                        "fuse_unk",
                                        "byte_fallback",
                                        "ignore_merges",
                                        "vocab",
                                        "merges",
                                        NULL};
    const cJSON *model = object_get(root, "model");
    /* The type first: another model's options would only blur the message. */
    enum status st = cJSON_IsObject(model) ? check_model_options(model, err) : STATUS_OK;
    if (!st)
        st = object_only(model, "model", known, err);
    if (!st)
        st = read_model_options(t, model, err);
    if (!st)
        st = read_vocab(t, model, err);
    if (!st)
        st = read_merges(t, model, err);
    if (!st)
        fill_tables(&t->bpe);
    return st;
}

/* ---- added tokens ---- */

static enum status read_added_token(struct tokenizer *t, const cJSON *node,
                                    struct added_token *token, struct error *err)
{
    static const char *const known[] = {"id",     "content",    "single_word", "lstrip",
                                        "rstrip", "normalized", "special",     NULL};
    static const char where[] = "added_tokens";
    const char *content = NULL;
    enum status st = object_only(node, where, known, err);
    if (!st)
        st = object_string(node, where, "content", &content, err);
    if (!st)
        st = object_integer(node, where, "id", TOKENIZER_MAX_ID, &token->id, err);
    if (!st)
        st = object_bool(node, where, "single_word", true, &token->single_word, err);
    if (!st)
        st = object_bool(node, where, "lstrip", true, &token->lstrip, err);
    if (!st)
        st = object_bool(node, where, "rstrip", true, &token->rstrip, err);
    if (!st)
        st = object_bool(node, where, "normalized", true, &token->normalized, err);
    if (!st)
        st = object_bool(node, where, "special", true, &token->special, err);
    if (st)
        return st;
    token->content.n = strlen(content);
    token->content.data = arena_copy(&t->arena, content, token->content.n);
    return token->content.data ? STATUS_OK : no_memory(err);
}

/* The id the reference would give: it numbers tokens itself and only warns when the file says
 * otherwise. Such a file means something else there than it says: refused. */
static enum status check_added_id(const struct tokenizer *t, const struct added_token *token,
                                  int32_t highest, struct error *err)
{
    const struct string_map *vocab = &t->bpe.vocab;
    int32_t size = (int32_t)vocab->n;
    int32_t id = string_map_get(vocab, token->content.data, token->content.n);
    if (id < 0)
        id = highest >= 0 && (highest >= size || size == 0) ? highest + 1 : size;
    if (id == token->id)
        return STATUS_OK;
    return fail(err, STATUS_INVALID,
                "added_tokens: \"%.80s\" has the id %d, but its place in the vocabulary is %d",
                token->content.data, (int)token->id, (int)id);
}

static enum status read_added_tokens(struct tokenizer *t, const cJSON *root, struct error *err)
{
    const cJSON *list = object_get(root, "added_tokens"), *node;
    struct added_vocabulary *v = &t->added;
    if (list && !cJSON_IsArray(list))
        return fail(err, STATUS_INVALID, "added_tokens: expected a list");
    size_t n = count_children(list);
    v->tokens = arena_take_array(&t->arena, n + 1, sizeof(*v->tokens));
    if (!v->tokens || !string_map_init(&v->ids, &t->arena, n))
        return no_memory(err);
    int32_t highest = -1;
    cJSON_ArrayForEach(node, list)
    {
        struct added_token *token = &v->tokens[v->n];
        enum status st = read_added_token(t, node, token, err);
        if (!st && !token->content.n)
            continue; /* ignored by the reference */
        if (!st)
            st = check_added_id(t, token, highest, err);
        if (!st && !string_map_add(&v->ids, token->content.data, token->content.n, token->id))
            st = fail(err, STATUS_INVALID, "added_tokens: \"%.80s\" is there twice",
                      token->content.data);
        if (st)
            return st;
        highest = token->id > highest ? token->id : highest;
        t->size = token->id >= t->size ? token->id + 1 : t->size;
        v->n++;
    }
    return STATUS_OK;
}

/* ---- the id table ---- */

static enum status set_piece(struct tokenizer *t, int32_t id, struct text text, bool special,
                             struct error *err)
{
    struct piece *piece = &t->pieces[id];
    if (piece->text.data &&
        (piece->text.n != text.n || memcmp(piece->text.data, text.data, text.n)))
        return fail(err, STATUS_INVALID, "tokenizer: \"%.80s\" and \"%.80s\" share the id %d",
                    piece->text.data, text.data, (int)id);
    *piece = (struct piece){.text = text, .special = special, .skipped = special};
    return STATUS_OK;
}

static enum status fill_pieces(struct tokenizer *t, struct error *err)
{
    const struct string_map *vocab = &t->bpe.vocab;
    t->pieces = arena_take_array(&t->arena, (size_t)t->size + 1, sizeof(*t->pieces));
    if (!t->pieces)
        return no_memory(err);
    enum status st = STATUS_OK;
    for (size_t i = 0; i < vocab->n && !st; i++)
        st = set_piece(t, vocab->values[i], vocab->keys[i], false, err);
    for (size_t i = 0; i < t->added.n && !st; i++)
        st = set_piece(t, t->added.tokens[i].id, t->added.tokens[i].content,
                       t->added.tokens[i].special, err);
    return st;
}

/* The reference decodes a normalized token to its normalized text, and then does not find that
 * among the special contents: it is skipped only when normalizing left it alone. */
static enum status normalize_pieces(struct tokenizer *t, struct error *err)
{
    struct bytes pair[2] = {{0}};
    enum status st = STATUS_OK;
    for (size_t i = 0; i < t->added.n && !st; i++) {
        const struct added_token *token = &t->added.tokens[i];
        struct piece *piece = &t->pieces[token->id];
        struct text text;
        if (!token->normalized)
            continue;
        st = normalizer_run(&t->normalizer, token->content, pair, &text, err);
        if (st || text.data == token->content.data)
            continue;
        piece->skipped = false;
        piece->text = (struct text){arena_copy(&t->arena, text.data, text.n), text.n};
        if (!piece->text.data)
            st = no_memory(err);
    }
    bytes_free(&pair[0]);
    bytes_free(&pair[1]);
    return st;
}

/* ---- the whole ---- */

static enum status check_root(const cJSON *root, struct error *err)
{
    static const char *const known[] = {
        "version",       "truncation",     "padding", "added_tokens", "normalizer",
        "pre_tokenizer", "post_processor", "decoder", "model",        NULL};
    const cJSON *version = object_get(root, "version");
    enum status st = object_only(root, "tokenizer.json", known, err);
    if (st)
        return st;
    if (version && !(cJSON_IsString(version) && strcmp(version->valuestring, "1.0") == 0))
        return fail(err, STATUS_UNSUPPORTED, "version: only \"1.0\" is supported");
    if (object_get(root, "truncation") || object_get(root, "padding"))
        return fail(err, STATUS_UNSUPPORTED, "truncation and padding: only null is supported");
    return STATUS_OK;
}

static enum status load_tree(struct tokenizer *t, const cJSON *root, struct error *err)
{
    enum status st = check_root(root, err);
    if (!st)
        st = read_model(t, root, err);
    if (!st)
        st = read_added_tokens(t, root, err);
    if (!st)
        st = fill_pieces(t, err);
    if (!st)
        st = pipeline_load(t, root, err);
    if (!st)
        st = output_load(t, root, err);
    if (!st)
        st = added_vocabulary_build(&t->added, &t->normalizer, &t->arena, err);
    if (!st)
        st = normalize_pieces(t, err);
    return st ? st : pieces_build(t, err);
}

enum status tokenizer_load(struct tokenizer *t, const char *json, size_t n, struct error *err)
{
    static const struct json_limits limits = {.max_depth = 32, .max_values = 8000000};
    arena_init(&t->arena, 0);
    enum status st = json_check(json, n, &limits, err);
    if (st)
        return st;
    cJSON *root = cJSON_ParseWithLength(json, n);
    if (!root)
        return no_memory(err);
    st = load_tree(t, root, err);
    cJSON_Delete(root);
    return st;
}
