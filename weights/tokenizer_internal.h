/* tokenizer_internal.h - what the tokenizer's own files share; nobody else includes it.
 *
 *   tokenizer_load.c      tokenizer.json -> struct tokenizer: model, added tokens, id table
 *   tokenizer_pipeline.c  its normalizer and pre_tokenizer
 *   tokenizer_output.c    its post_processor and decoder
 *   tokenizer_component.c what those sections have in common
 *   tokenizer_json.c      reading objects whose every key must be understood
 *   tokenizer_pattern.c   split patterns: Oniguruma's dialect -> PCRE2, and matching
 *   tokenizer_unicode.c   where the reference's Unicode tables differ (generated)
 *   tokenizer_normalize.c normalizers
 *   tokenizer_split.c     pre-tokenizers: text -> words
 *   tokenizer_bpe.c       vocabulary and merges: word -> ids
 *   tokenizer_added.c     added tokens in text
 *   tokenizer.c           the public functions: encode from end to end
 *   detokenizer.c         ids -> text
 *
 * "The reference" in these files is Hugging Face's `tokenizers` package: equal ids, oddities
 * included, are the aim.
 */
#ifndef LATTE_WEIGHTS_TOKENIZER_INTERNAL_H
#define LATTE_WEIGHTS_TOKENIZER_INTERNAL_H

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "engine/base/arena.h"
#include "weights/tokenizer.h"

enum {
    TOKENIZER_MAX_STEPS = 16,   /* of one pipeline, sequences counted flat */
    TOKENIZER_MAX_ID = 4194303, /* keeps a hostile file from sizing the id table */
    TOKENIZER_MAX_AFFIX = 64,   /* ids the post-processor puts before or after */
};

/* Text of known length; may hold zero bytes. Memory belongs to whoever the field says. */
struct text {
    const char *data;
    size_t n;
};

/* ---- tokenizer_unicode.c ---- */

struct unicode_class {
    const char *name;  /* of a general category, "L" */
    const char *newer; /* ranges to add, as the inside of a PCRE2 class */
};
struct code_range {
    uint32_t first, last;
};
extern const struct unicode_class tokenizer_classes[];  /* ends with a NULL name */
extern const char tokenizer_digit_class[];              /* the reference's char.is_numeric */
extern const char tokenizer_word_class[];               /* \w of single_word tokens */
extern const struct code_range tokenizer_nfc_unknown[]; /* sorted; ends with {0, 0} */

/* ---- tokenizer_pattern.c ---- */

/* What a Split looks for: a literal text or a compiled pattern. */
struct pattern {
    struct text literal;
    pcre2_code *code; /* owned, NULL for a literal */
};

/* Compile source[n], in Oniguruma's syntax. UNSUPPORTED names the construct not understood. */
enum status pattern_compile(struct pattern *p, const char *source, size_t n, struct error *err);
/* Compile a pattern of PCRE2's own, written in this program. */
enum status pattern_compile_own(struct pattern *p, const char *source, struct error *err);
void pattern_free(struct pattern *p);

/* The first match at or after from; *found says whether there is one. data is a match block
 * for one pair. UNSUPPORTED when the pattern needs unreasonably many steps on this text. */
enum status pattern_find(const struct pattern *p, pcre2_match_data *data, const char *text,
                         size_t n, size_t from, bool *found, size_t *start, size_t *end,
                         struct error *err);

/* ---- string keys, used for the vocabulary and the added tokens ---- */

struct string_map {
    struct text *keys; /* [cap], arena */
    int32_t *values;   /* [cap], arena */
    size_t n, cap;
    uint32_t *slots; /* [mask + 1] index + 1, 0 empty; arena */
    size_t mask;
};

/* Room for cap keys; false when out of memory. */
bool string_map_init(struct string_map *m, struct arena *a, size_t cap);
/* Keys are borrowed. False when the key is there already. */
bool string_map_add(struct string_map *m, const char *key, size_t n, int32_t value);
int32_t string_map_get(const struct string_map *m, const char *key, size_t n); /* -1 if absent */

/* ---- tokenizer_bpe.c ---- */

struct merge {
    uint64_t pair; /* left id << 32 | right id; UINT64_MAX marks an empty slot */
    uint32_t rank;
    int32_t id;
};

struct merge_map {
    struct merge *slots; /* [mask + 1], arena */
    size_t mask;
};

bool merge_map_init(struct merge_map *m, struct arena *a, size_t n);
void merge_map_set(struct merge_map *m, int32_t left, int32_t right, uint32_t rank, int32_t id);

enum { DIRECT_CHARS = 0x400 };

struct bpe {
    struct string_map vocab;
    struct merge_map merges;
    int32_t direct[DIRECT_CHARS]; /* ids of the first code points, -1 if absent */
    int32_t byte_ids[256];        /* of <0x00>..<0xFF>, -1 if absent */
    struct text unk_token;        /* data NULL for none */
    int32_t unk_id;               /* -1: none, or not in the vocabulary */
    bool fuse_unk, byte_fallback, ignore_merges;
};

/* Memory of one encode call, reused from word to word. */
struct bpe_scratch {
    struct symbol *symbols;
    struct candidate *heap;
    size_t cap_symbols, n_heap, cap_heap;
};

enum status bpe_encode(const struct bpe *b, struct bpe_scratch *s, const char *word, size_t n,
                       struct token_list *out, struct error *err);
void bpe_scratch_free(struct bpe_scratch *s);
enum status token_list_push(struct token_list *list, int32_t id, struct error *err);

/* ---- tokenizer_normalize.c ---- */

enum normalize_kind { NORMALIZE_PREPEND, NORMALIZE_REPLACE, NORMALIZE_NFC };

struct normalize_step {
    enum normalize_kind kind;
    struct text from; /* REPLACE */
    struct text to;   /* REPLACE, PREPEND */
};

struct normalizer {
    struct normalize_step steps[TOKENIZER_MAX_STEPS];
    int n_steps;
};

/* Set *out to the normalized text: text itself when nothing changes, else memory of pair. */
enum status normalizer_run(const struct normalizer *z, struct text in, struct bytes pair[2],
                           struct text *out, struct error *err);
/* Append text with every from replaced by to. */
void text_replace(struct text text, struct text from, struct text to, struct bytes *out);

/* ---- tokenizer_split.c ---- */

enum split_behavior {
    SPLIT_REMOVED,
    SPLIT_ISOLATED,
    SPLIT_MERGED_WITH_PREVIOUS,
    SPLIT_MERGED_WITH_NEXT,
    SPLIT_CONTIGUOUS,
};

enum word_step_kind {
    WORDS_SPLIT,     /* pattern, behavior, invert */
    WORDS_SPACE,     /* a space in front of what has none (ByteLevel's add_prefix_space) */
    WORDS_METASPACE, /* spaces become text, and text goes in front as prepend says */
    WORDS_BYTES,     /* each byte becomes its printable character; always last */
};

enum prepend_scheme { PREPEND_NEVER, PREPEND_FIRST, PREPEND_ALWAYS };

struct word_step {
    enum word_step_kind kind;
    struct pattern pattern;
    enum split_behavior behavior;
    bool invert;
    struct text text;
    enum prepend_scheme prepend;
};

struct splitter {
    struct word_step steps[TOKENIZER_MAX_STEPS];
    int n_steps;
};

/* One encode call. */
struct encoder {
    const struct tokenizer *tokenizer;
    struct token_list *out;
    struct error *err;
    unsigned flags;
    pcre2_match_data *match;
    bool at_start; /* the section at hand begins where the input began */
    struct bytes normalized[2];
    struct bytes step_text[TOKENIZER_MAX_STEPS];
    struct bpe_scratch bpe;
};

/* Split text into words and append their ids. first: text begins where the input began. */
enum status splitter_run(struct encoder *e, struct text text, bool first);

/* The character that stands for a byte in byte-level vocabularies, and back (-1: none). */
uint32_t byte_to_char(unsigned char byte);
int char_to_byte(uint32_t code_point);

/* ---- tokenizer_added.c ---- */

struct added_token {
    struct text content; /* arena */
    int32_t id;
    bool special, lstrip, rstrip, single_word, normalized;
};

/* A trie over bytes. Edges live in one hash table: most nodes have a single child. */
struct trie {
    struct trie_edge *edges; /* [mask + 1], arena */
    size_t mask, n_nodes;
    int32_t *value;  /* [max nodes] index of an added token, -1; arena */
    bool leads[256]; /* bytes that begin a token */
    size_t max_nodes;
};

struct added_vocabulary {
    struct added_token *tokens; /* [n], arena, in the file's order */
    size_t n;
    struct string_map ids;
    struct trie raw;        /* matched against the text as it is */
    struct trie normalized; /* matched against the normalized text */
    struct pattern word;    /* one character of \w */
};

/* Build both tries. */
enum status added_vocabulary_build(struct added_vocabulary *v, const struct normalizer *z,
                                   struct arena *a, struct error *err);

/* One part of a text: an added token, or text between two of them. */
struct added_part {
    struct text text;
    int32_t id; /* -1 for plain text */
    bool first; /* begins where the whole text began */
};

/* Cut text at the tokens of one trie; visit is called for each part in order. */
enum status added_split(const struct added_vocabulary *v, const struct trie *trie,
                        struct encoder *e, struct text text,
                        enum status (*visit)(struct encoder *e, const struct added_part *part));

/* ---- detokenizer.c ---- */

enum decode_join { JOIN_SPACES, JOIN_PLAIN, JOIN_BYTES };

/* The decoder chain, in the one order that is understood: replacements, byte fallback,
 * metaspace, joining, strip. */
struct decode_chain {
    struct text from[TOKENIZER_MAX_STEPS], to[TOKENIZER_MAX_STEPS];
    int n_replace;
    bool byte_fallback;
    uint32_t metaspace;    /* the character that becomes a space, 0 for none */
    bool metaspace_prefix; /* the first token loses it instead */
    enum decode_join join;
    uint32_t strip, strip_start; /* cut this character at the start, so many times at most */
    int stage;                   /* how far loading has come */
};

/* What an id stands for once the stateless steps are done. */
struct piece {
    struct text text; /* data NULL: no such id */
    bool special;
    bool skipped; /* when decoding without special tokens */
    bool byte;    /* one byte of byte fallback */
};

enum status pieces_build(struct tokenizer *t, struct error *err);

struct tokenizer {
    struct arena arena;
    char fingerprint[33];
    struct normalizer normalizer;
    struct splitter splitter;
    struct bpe bpe;
    struct added_vocabulary added;
    int32_t prefix[TOKENIZER_MAX_AFFIX], suffix[TOKENIZER_MAX_AFFIX];
    int n_prefix, n_suffix;
    struct decode_chain chain;
    struct piece *pieces; /* [size], arena */
    int32_t size;
};

/* ---- tokenizer_load.c, tokenizer_pipeline.c, tokenizer_output.c ---- */

/* Fill a zeroed tokenizer from the text of tokenizer.json. */
enum status tokenizer_load(struct tokenizer *t, const char *json, size_t n, struct error *err);

/* Read the sections of the file's root. The output needs the id table. */
struct cJSON;
enum status pipeline_load(struct tokenizer *t, const struct cJSON *root, struct error *err);
enum status output_load(struct tokenizer *t, const struct cJSON *root, struct error *err);

#endif
