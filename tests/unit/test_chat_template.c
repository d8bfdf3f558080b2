/* test_chat_template.c - against transformers' apply_chat_template:
 * tests/golden/chat_template/make.py says what cases.json holds.
 */
#include "tests/unit/unit.h"

#include <cjson/cJSON.h>
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/base/file.h"
#include "weights/chat_template.h"

enum { MAX_MESSAGES = 16 };

static char dir[] = "/tmp/latte-chat-XXXXXX";
static cJSON *golden;

static int setup(void **state)
{
    (void)state;
    struct bytes text = {0};
    struct error err;
    if (!mkdtemp(dir) || file_read(&text, "tests/golden/chat_template/cases.json", 1 << 24, &err))
        return -1;
    golden = cJSON_ParseWithLength(text.data, text.n);
    bytes_free(&text);
    return golden ? 0 : -1;
}

static void remove_file(const char *name)
{
    char path[FILE_PATH_BYTES];
    snprintf(path, sizeof(path), "%s/%s", dir, name);
    unlink(path);
}

static int teardown(void **state)
{
    (void)state;
    cJSON_Delete(golden);
    remove_file("tokenizer_config.json");
    remove_file("chat_template.jinja");
    return rmdir(dir);
}

static void write_file(const char *name, const char *data, size_t n)
{
    char path[FILE_PATH_BYTES];
    snprintf(path, sizeof(path), "%s/%s", dir, name);
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, n, f), n);
    assert_int_equal(fclose(f), 0);
}

/* A tokenizer_config.json with this template (none when NULL), and it opened. */
static struct chat_template *open_with(const char *source, size_t n)
{
    struct bytes config = {0};
    struct error err;
    struct chat_template *t = NULL;
    bytes_text(&config, "{\"bos_token\":{\"content\":\"<s>\"}");
    if (source) {
        bytes_text(&config, ",\"chat_template\":");
        bytes_json_string(&config, source, n);
    }
    bytes_text(&config, "}");
    write_file("tokenizer_config.json", config.data, config.n);
    bytes_free(&config);
    if (chat_template_open(&t, dir, &err))
        fail_msg("%s", err.text);
    return t;
}

static enum chat_role role_of(const cJSON *message)
{
    const char *name = message->child->valuestring;
    return name[0] == 's'   ? CHAT_ROLE_SYSTEM
           : name[0] == 'u' ? CHAT_ROLE_USER
                            : CHAT_ROLE_ASSISTANT;
}

static size_t read_chat(const cJSON *chat, struct chat_message out[MAX_MESSAGES])
{
    size_t n = 0;
    const cJSON *message;
    cJSON_ArrayForEach(message, chat)
    {
        const char *content = message->child->next->valuestring;
        assert_true(n < MAX_MESSAGES);
        out[n++] = (struct chat_message){role_of(message), content, strlen(content)};
    }
    return n;
}

static void check_text(const struct chat_template *t, int entry, int chat_index, const cJSON *chat,
                       unsigned flags, const cJSON *expected)
{
    struct chat_message messages[MAX_MESSAGES];
    struct bytes out = {0};
    struct error err = {0};
    bytes_text(&out, "before");
    enum status st =
        chat_template_render(t, messages, read_chat(chat, messages), flags, &out, &err);
    if (cJSON_IsNull(expected)) {
        if (st != STATUS_INVALID || out.n != 6 || !err.text[0])
            fail_msg("template %d chat %d flags %u: refused by the reference, here \"%s\"", entry,
                     chat_index, flags, out.data);
    } else if (st || strcmp(out.data + 6, expected->valuestring) != 0) {
        fail_msg("template %d chat %d flags %u: \"%s\" (%s), expected \"%s\"", entry, chat_index,
                 flags, out.data + 6, st ? err.text : "ok", expected->valuestring);
    }
    bytes_free(&out);
}

static void test_renders_as_transformers(void **state)
{
    (void)state;
    const cJSON *chats = cJSON_GetObjectItem(golden, "chats"), *entry, *chat;
    int index = 0, n_texts = 0;
    cJSON_ArrayForEach(entry, cJSON_GetObjectItem(golden, "known"))
    {
        const char *source = cJSON_GetObjectItem(entry, "template")->valuestring;
        const cJSON *expected = cJSON_GetObjectItem(entry, "texts")->child;
        const char *kind = cJSON_GetObjectItem(entry, "kind")->valuestring;
        struct chat_template *t = open_with(source, strlen(source));
        if (strncmp(chat_template_name(t), kind, strlen(kind)) != 0)
            fail_msg("template %d is \"%s\", expected \"%s\"", index, chat_template_name(t), kind);
        int chat_index = 0;
        cJSON_ArrayForEach(chat, chats)
        {
            for (unsigned flags = 0; flags < 3; flags++, expected = expected->next, n_texts++)
                check_text(t, index, chat_index, chat, flags, expected);
            chat_index++;
        }
        assert_null(expected);
        chat_template_close(t);
        index++;
    }
    assert_true(n_texts > 2000);
}

/* ---- going on ---- */

static void check_end(const char *whole, const struct bytes *turn, const char *what)
{
    size_t n = strlen(whole);
    if (turn->n > n || strcmp(whole + n - turn->n, turn->data) != 0)
        fail_msg("%s: \"%s\" is not the end of \"%s\"", what, turn->data, whole);
}

/* A turn is the end of what transformers makes of the whole conversation; what is before it ends
 * with the answer before (tail open), or with the template's end of it (closed). */
static void check_turn(const struct chat_template *t, const struct chat_message *messages, size_t n,
                       size_t n_before, const char *whole)
{
    const struct chat_message *answer = &messages[n_before - 1];
    const char *stops[4];
    struct error err;
    struct bytes open = {0}, closed = {0};
    if (chat_template_render_turn(t, CHAT_TAIL_OPEN, messages + n_before, n - n_before,
                                  CHAT_ADD_GENERATION_PROMPT, &open, &err) ||
        chat_template_render_turn(t, CHAT_TAIL_CLOSED, messages + n_before, n - n_before,
                                  CHAT_ADD_GENERATION_PROMPT, &closed, &err))
        fail_msg("%s", err.text);
    check_end(whole, &open, "open");
    check_end(whole, &closed, "closed");
    const char *before = whole + strlen(whole) - open.n - answer->n;
    assert_true(before >= whole);
    assert_memory_equal(before, answer->content, answer->n);
    int n_stops = chat_template_stops(t, stops);
    if (n_stops && stops[0][0] != '\n') {
        assert_int_equal(open.n - closed.n, strlen(stops[0]));
        assert_memory_equal(open.data, stops[0], strlen(stops[0]));
    } else {
        assert_string_equal(open.data, closed.data);
    }
    bytes_free(&open);
    bytes_free(&closed);
}

/* The last answer after which the conversation goes on with a user's message: what is before
 * it, 0 for none. Space at its ends is not looked at here: templates trim it. */
static size_t find_answer(const struct chat_message *messages, size_t n)
{
    for (size_t i = n - 1; i > 0; i--) {
        const struct chat_message *m = &messages[i - 1];
        if (m->role == CHAT_ROLE_ASSISTANT && messages[i].role == CHAT_ROLE_USER && m->n &&
            isgraph((unsigned char)m->content[0]) && isgraph((unsigned char)m->content[m->n - 1]))
            return i;
    }
    return 0;
}

static void test_turns(void **state)
{
    (void)state;
    const cJSON *chats = cJSON_GetObjectItem(golden, "chats"), *entry, *chat;
    int n_turns = 0;
    cJSON_ArrayForEach(entry, cJSON_GetObjectItem(golden, "known"))
    {
        const char *source = cJSON_GetObjectItem(entry, "template")->valuestring;
        const cJSON *text = cJSON_GetObjectItem(entry, "texts")->child;
        struct chat_template *t = open_with(source, strlen(source));
        cJSON_ArrayForEach(chat, chats)
        {
            struct chat_message messages[MAX_MESSAGES];
            size_t n = read_chat(chat, messages), n_before = n ? find_answer(messages, n) : 0;
            const cJSON *whole = text->next; /* CHAT_ADD_GENERATION_PROMPT */
            if (n_before && cJSON_IsString(whole)) {
                check_turn(t, messages, n, n_before, whole->valuestring);
                n_turns++;
            }
            text = text->next->next->next;
        }
        chat_template_close(t);
    }
    assert_true(n_turns > 40);
}

/* ---- recognising ---- */

static uint32_t crc32_of(uint32_t crc, const void *data, size_t n)
{
    crc = ~crc;
    for (size_t i = 0; i < n; i++) {
        crc ^= ((const unsigned char *)data)[i];
        for (int k = 0; k < 8; k++)
            crc = crc & 1 ? 0xEDB88320u ^ crc >> 1 : crc >> 1;
    }
    return ~crc;
}

/* make.py's PROBES. */
static uint32_t probe(const struct chat_template *t)
{
    static const struct chat_message first[] = {{CHAT_ROLE_USER, " Q ", 3},
                                                {CHAT_ROLE_ASSISTANT, "A ", 2}};
    static const struct chat_message second[] = {{CHAT_ROLE_SYSTEM, "S", 1},
                                                 {CHAT_ROLE_USER, "Q", 1}};
    uint32_t crc = 0;
    for (int i = 0; i < 2; i++) {
        struct bytes out = {0};
        struct error err;
        enum status st = chat_template_render(t, i ? second : first, 2,
                                              i ? 0 : CHAT_ADD_GENERATION_PROMPT, &out, &err);
        crc = st ? crc32_of(crc, "", 1) : crc32_of(crc, out.data, out.n);
        bytes_free(&out);
    }
    return crc;
}

/* Without one of its bytes a template is unknown, or renders what Jinja makes of it. */
static void test_changed_templates(void **state)
{
    (void)state;
    const cJSON *entry;
    int recognised = 0, unknown = 0;
    cJSON_ArrayForEach(entry, cJSON_GetObjectItem(golden, "known"))
    {
        const char *source = cJSON_GetObjectItem(entry, "template")->valuestring;
        const cJSON *expected = cJSON_GetObjectItem(entry, "changed")->child;
        char changed[8192];
        size_t n = strlen(source);
        assert_true(n < sizeof(changed));
        for (size_t i = 0; i < n; i++, expected = expected->next) {
            if ((source[i] & 0x80) != 0)
                continue;
            memcpy(changed, source, i);
            memcpy(changed + i, source + i + 1, n - i - 1);
            struct chat_template *t = open_with(changed, n - 1);
            if (chat_template_kind(t) == CHAT_TEMPLATE_UNKNOWN)
                unknown++;
            else if (probe(t) != (uint32_t)expected->valuedouble)
                fail_msg("without byte %zu a template is \"%s\" and renders otherwise: %s", i,
                         chat_template_name(t), changed);
            else
                recognised++;
            chat_template_close(t);
        }
    }
    assert_true(recognised > 100 && unknown > 1000);
}

static void test_unknown_templates(void **state)
{
    (void)state;
    const cJSON *source;
    const struct chat_message message = {CHAT_ROLE_USER, "x", 1};
    cJSON_ArrayForEach(source, cJSON_GetObjectItem(golden, "unknown"))
    {
        struct chat_template *t = open_with(source->valuestring, strlen(source->valuestring));
        struct bytes out = {0};
        struct error err;
        const char *stops[4];
        if (chat_template_kind(t) != CHAT_TEMPLATE_UNKNOWN)
            fail_msg("taken for \"%s\": %s", chat_template_name(t), source->valuestring);
        assert_int_equal(chat_template_render(t, &message, 1, 0, &out, &err), STATUS_UNSUPPORTED);
        assert_int_equal(chat_template_stops(t, stops), 0);
        assert_int_equal(out.n, 0);
        chat_template_close(t);
    }
}

/* ---- files ---- */

static const char CHATML[] = "{% for message in messages %}{{'<|im_start|>' + message['role'] + "
                             "'\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
                             "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
                             "{% endif %}";

static void test_files(void **state)
{
    (void)state;
    struct bytes quoted = {0};
    bytes_json_string(&quoted, CHATML, strlen(CHATML));
    static const struct {
        const char *config; /* %s is the template as a JSON string; NULL: no file */
        const char *jinja;  /* NULL: no file */
        enum status status;
        enum chat_template_kind kind;
    } cases[] = {
        {NULL, NULL, STATUS_OK, CHAT_TEMPLATE_NONE},
        {"{}", NULL, STATUS_OK, CHAT_TEMPLATE_NONE},
        {"{\"chat_template\":null}", NULL, STATUS_OK, CHAT_TEMPLATE_NONE},
        {"{\"chat_template\":%s}", NULL, STATUS_OK, CHAT_TEMPLATE_CHATML},
        {"{\"chat_template\":[{\"name\":\"rag\",\"template\":\"x\"},{\"name\":\"default\","
         "\"template\":%s}]}",
         NULL, STATUS_OK, CHAT_TEMPLATE_CHATML},
        {"{\"chat_template\":[{\"name\":\"rag\",\"template\":%s}]}", NULL, STATUS_OK,
         CHAT_TEMPLATE_UNKNOWN},
        {"{\"chat_template\":17}", NULL, STATUS_OK, CHAT_TEMPLATE_UNKNOWN},
        {"{\"chat_template\":%s}", "other", STATUS_OK, CHAT_TEMPLATE_UNKNOWN},
        {"{\"chat_template\":\"other\"}", CHATML, STATUS_OK, CHAT_TEMPLATE_CHATML},
        {NULL, CHATML, STATUS_OK, CHAT_TEMPLATE_CHATML},
        {NULL, "", STATUS_OK, CHAT_TEMPLATE_UNKNOWN},
        {"{\"chat_template\":%s", NULL, STATUS_INVALID, 0},
        {"[]", NULL, STATUS_INVALID, 0},
        {"", NULL, STATUS_INVALID, 0},
        {"{\"chat_template\":\"a\\u0000b\"}", NULL, STATUS_INVALID, 0},
    };
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        remove_file("tokenizer_config.json");
        remove_file("chat_template.jinja");
        struct bytes config = {0};
        const char *hole = cases[i].config ? strstr(cases[i].config, "%s") : NULL;
        if (hole) {
            bytes_append(&config, cases[i].config, (size_t)(hole - cases[i].config));
            bytes_append(&config, quoted.data, quoted.n);
        }
        if (cases[i].config) {
            bytes_text(&config, hole ? hole + 2 : cases[i].config);
            write_file("tokenizer_config.json", config.data ? config.data : "", config.n);
        }
        if (cases[i].jinja)
            write_file("chat_template.jinja", cases[i].jinja, strlen(cases[i].jinja));
        struct chat_template *t = NULL;
        struct error err = {0};
        enum status st = chat_template_open(&t, dir, &err);
        if (st != cases[i].status)
            fail_msg("case %zu: %s (%s)", i, status_name(st), err.text);
        if (!st)
            assert_int_equal(chat_template_kind(t), cases[i].kind);
        else
            assert_non_null(strstr(err.text, "tokenizer_config.json"));
        chat_template_close(t);
        bytes_free(&config);
    }
    bytes_free(&quoted);
    remove_file("chat_template.jinja");
}

static void test_arguments(void **state)
{
    (void)state;
    struct chat_template *t = open_with(CHATML, strlen(CHATML));
    const struct chat_message message = {CHAT_ROLE_ASSISTANT, "a\0b", 3};
    struct bytes out = {0}, small = {.limit = 8};
    struct error err;
    const char *stops[4];
    assert_int_equal(chat_template_render(t, &message, 0, 0, &out, &err), STATUS_INVALID);
    assert_int_equal(chat_template_render(t, &message, 1, 3, &out, &err), STATUS_INVALID);
    assert_int_equal(out.n, 0);
    assert_int_equal(chat_template_render(t, &message, 1, 0, &small, &err), STATUS_NOMEM);
    assert_int_equal(chat_template_render(t, &message, 1, CHAT_CONTINUE_FINAL_MESSAGE, &out, &err),
                     STATUS_OK);
    assert_int_equal(out.n, 25);
    assert_memory_equal(out.data, "<|im_start|>assistant\na\0b", 25);
    bytes_consume(&out, out.n);
    assert_int_equal(chat_template_render_turn(t, CHAT_TAIL_CLOSED, &message, 1, 0, &out, &err),
                     STATUS_OK);
    assert_int_equal(out.n, 37);
    assert_memory_equal(out.data, "\n<|im_start|>assistant\na\0b<|im_end|>\n", 37);
    assert_int_equal(chat_template_stops(t, stops), 1);
    assert_string_equal(stops[0], "<|im_end|>");
    bytes_free(&out);
    bytes_free(&small);
    chat_template_close(t);
    chat_template_close(NULL);
}

/* The bundled model speaks ChatML. */
static void test_bundled(void **state)
{
    (void)state;
    struct chat_template *t = NULL;
    struct error err;
    if (chat_template_open(&t, "weights/latte-12m", &err))
        fail_msg("%s", err.text);
    assert_int_equal(chat_template_kind(t), CHAT_TEMPLATE_CHATML);
    chat_template_close(t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_renders_as_transformers),
        cmocka_unit_test(test_turns),
        cmocka_unit_test(test_changed_templates),
        cmocka_unit_test(test_unknown_templates),
        cmocka_unit_test(test_files),
        cmocka_unit_test(test_arguments),
        cmocka_unit_test(test_bundled),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
