/* chat_template.c - see chat_template.h. Templates are compared in the normal form of
 * chat_form.h with the forms listed here; what equals none of them is unknown.
 */
#include "weights/chat_template.h"

#include <cjson/cJSON.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/file.h"
#include "engine/base/json.h"
#include "engine/base/utf8.h"
#include "weights/chat_form.h"

enum { MAX_TEMPLATE_BYTES = 1 << 20, MAX_CONFIG_BYTES = 16 << 20 };

/* How a recognised template renders. */
struct chat_style {
    enum chat_template_kind kind;
    const char *name;
    const char *form;     /* normal form; CAPTURE stands for any literal text */
    bool always_prompt;   /* opens an assistant message whether asked to or not */
    bool fold_system;     /* Gemma 3: the system text goes in front of the first message */
    bool raw_role;        /* plain: the role as it is, else with a capital */
    const char *line_end; /* plain: what follows a message */
};

#define CAPTURE "\1"
#define LOOP "{%for message in messages%}"
#define PROMPT(text) "{%if add_generation_prompt%}{{'" text "'}}{%endif%}"
#define DEFINE_PROMPT                                                                              \
    "{%if not add_generation_prompt is defined%}{%set add_generation_prompt=false%}{%endif%}"

#define CHATML_MESSAGE                                                                             \
    "{{'<|im_start|>'+message.role+'\n'+message.content+'<|im_end|>\n'}}{%endfor%}"
#define CHATML_PROMPT PROMPT("<|im_start|>assistant\n")
#define CHATML_DEFAULT                                                                             \
    "{%if loop.first and messages[0].role!='system'%}"                                             \
    "{{'<|im_start|>system\n" CAPTURE "<|im_end|>\n'}}{%endif%}"

#define GEMMA_ALTERNATE                                                                            \
    "{%if(message.role=='user')!=(loop.index0%2==0)%}"                                             \
    "{{raise_exception('Conversation roles must alternate user/assistant/user/assistant/...')}}"   \
    "{%endif%}{%if(message.role=='assistant')%}{%set role='model'%}{%else%}"                       \
    "{%set role=message.role%}{%endif%}"
#define GEMMA_PROMPT PROMPT("<start_of_turn>model\n")
#define GEMMA_2                                                                                    \
    "{{bos_token}}{%if messages[0].role=='system'%}"                                               \
    "{{raise_exception('System role not supported')}}{%endif%}" LOOP GEMMA_ALTERNATE               \
    "{{'<start_of_turn>'+role+'\n'+message.content|trim+'<end_of_turn>\n'}}{%endfor%"              \
    "}" GEMMA_PROMPT
#define GEMMA_3                                                                                    \
    "{{bos_token}}{%if messages[0].role=='system'%}{%if messages[0].content is string%}"           \
    "{%set first_user_prefix=messages[0].content+'\n\n'%}{%else%}"                                 \
    "{%set first_user_prefix=messages[0].content[0].text+'\n\n'%}{%endif%}"                        \
    "{%set loop_messages=messages[1:]%}{%else%}{%set first_user_prefix=''%}"                       \
    "{%set loop_messages=messages%}{%endif%}{%for message in loop_messages%}" GEMMA_ALTERNATE      \
    "{{'<start_of_turn>'+role+'\n'+(first_user_prefix if loop.first else'')}}"                     \
    "{%if message.content is string%}{{message.content|trim}}{%elif message.content is iterable%}" \
    "{%for item in message.content%}{%if item.type=='image'%}{{'<start_of_image>'}}"               \
    "{%elif item.type=='text'%}{{item.text|trim}}{%endif%}{%endfor%}{%else%}"                      \
    "{{raise_exception('Invalid content "                                                          \
    "type')}}{%endif%}{{'<end_of_turn>\n'}}{%endfor%}" GEMMA_PROMPT

#define LLAMA3_LOOP                                                                                \
    "{%set loop_messages=messages%}{%for message in loop_messages%}{%set "                         \
    "content='<|start_header_id|>'"                                                                \
    "+message.role+'<|end_header_id|>\n\n'+message.content|trim+'<|eot_id|>'%}"                    \
    "{%if loop.index0==0%}{%set content=bos_token+content%}{%endif%}{{content}}{%endfor%}"
#define LLAMA3_HEADER "<|start_header_id|>assistant<|end_header_id|>\n\n"

#define PLAIN(role, end, prompt)                                                                   \
    LOOP "{{" role "+': '+message.content+'" end "'}}{%endfor%}" PROMPT(prompt)
#define CAPITAL_ROLE "message.role|capitalize"
#define TITLE_ROLE "message.role|title"
#define RAW_ROLE "message.role"

static const struct chat_style STYLES[] = {
    {.kind = CHAT_TEMPLATE_CHATML, .name = "chatml", .form = LOOP CHATML_MESSAGE CHATML_PROMPT},
    {.kind = CHAT_TEMPLATE_CHATML,
     .name = "chatml",
     .form = DEFINE_PROMPT LOOP CHATML_MESSAGE CHATML_PROMPT},
    {.kind = CHAT_TEMPLATE_CHATML,
     .name = "chatml",
     .form = LOOP CHATML_DEFAULT CHATML_MESSAGE CHATML_PROMPT},
    {.kind = CHAT_TEMPLATE_GEMMA, .name = "gemma", .form = GEMMA_2},
    {.kind = CHAT_TEMPLATE_GEMMA, .name = "gemma3", .form = GEMMA_3, .fold_system = true},
    {.kind = CHAT_TEMPLATE_LLAMA3,
     .name = "llama3",
     .form = LLAMA3_LOOP "{{'" LLAMA3_HEADER "'}}",
     .always_prompt = true},
    {.kind = CHAT_TEMPLATE_LLAMA3, .name = "llama3", .form = LLAMA3_LOOP PROMPT(LLAMA3_HEADER)},
    {.kind = CHAT_TEMPLATE_PLAIN,
     .name = "plain",
     .form = PLAIN(CAPITAL_ROLE, "\n", "Assistant:"),
     .line_end = "\n"},
    {.kind = CHAT_TEMPLATE_PLAIN,
     .name = "plain",
     .form = PLAIN(CAPITAL_ROLE, "\n\n", "Assistant:"),
     .line_end = "\n\n"},
    {.kind = CHAT_TEMPLATE_PLAIN,
     .name = "plain",
     .form = PLAIN(TITLE_ROLE, "\n", "Assistant:"),
     .line_end = "\n"},
    {.kind = CHAT_TEMPLATE_PLAIN,
     .name = "plain",
     .form = PLAIN(TITLE_ROLE, "\n\n", "Assistant:"),
     .line_end = "\n\n"},
    {.kind = CHAT_TEMPLATE_PLAIN,
     .name = "plain",
     .form = PLAIN(RAW_ROLE, "\n", "assistant:"),
     .line_end = "\n",
     .raw_role = true},
};

static const struct chat_style NO_STYLE = {.kind = CHAT_TEMPLATE_NONE, .name = "none"};
static const struct chat_style UNKNOWN_STYLE = {.kind = CHAT_TEMPLATE_UNKNOWN, .name = "unknown"};

struct chat_template {
    const struct chat_style *style;
    char *default_system; /* owned; NULL when there is none */
    char *bos;            /* owned; NULL when the configuration names none */
};

/* ---- recognising ---- */

/* Compare with a form that may hold one CAPTURE; what it stands for goes to *captured. */
static bool matches(const char *form, const char *text, size_t n, const char **captured,
                    size_t *n_captured)
{
    const char *wild = strchr(form, CAPTURE[0]);
    size_t head = wild ? (size_t)(wild - form) : strlen(form);
    size_t tail = wild ? strlen(wild + 1) : 0;
    *captured = NULL;
    if (!wild)
        return n == head && memcmp(text, form, n) == 0;
    if (n < head + tail || memcmp(text, form, head) != 0 ||
        memcmp(text + n - tail, wild + 1, tail) != 0)
        return false;
    *captured = text + head;
    *n_captured = n - head - tail;
    for (size_t i = 0; i < *n_captured; i++)
        if (strchr("'\2\3", (*captured)[i])) /* a zero byte, too */
            return false;
    return true;
}

static enum status recognise(struct chat_template *t, const char *source, size_t n,
                             struct error *err)
{
    struct bytes form = {0};
    t->style = &UNKNOWN_STYLE;
    enum status st = chat_form(source, n, &form, err);
    for (size_t i = 0; !st && i < sizeof(STYLES) / sizeof(STYLES[0]); i++) {
        const char *captured;
        size_t n_captured = 0;
        if (!form.n || !matches(STYLES[i].form, form.data, form.n, &captured, &n_captured))
            continue;
        t->style = &STYLES[i];
        if (captured && !(t->default_system = strndup(captured, n_captured)))
            st = fail(err, STATUS_NOMEM, "chat template: out of memory");
        break;
    }
    bytes_free(&form);
    return st == STATUS_UNSUPPORTED ? STATUS_OK : st;
}

/* ---- reading the directory ---- */

/* Read DIR/NAME when it is there. */
static enum status read_optional(const char *dir, const char *name, size_t max, struct bytes *out,
                                 bool *present, struct error *err)
{
    char path[FILE_PATH_BYTES];
    enum status st = file_path(path, dir, name, err);
    if (!st)
        st = file_read(out, path, max, err);
    *present = st == STATUS_OK;
    return st == STATUS_NOT_FOUND ? STATUS_OK : st;
}

/* The text of chat_template: a string, or of a list of named ones the one called "default". */
static const char *template_text(const cJSON *value)
{
    const cJSON *item;
    if (cJSON_IsString(value))
        return value->valuestring;
    cJSON_ArrayForEach(item, value)
    {
        const char *name = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(item, "name"));
        if (name && strcmp(name, "default") == 0)
            return cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(item, "template"));
    }
    return NULL;
}

/* bos_token: a string, or an object with its content. */
static enum status read_bos(struct chat_template *t, const cJSON *root, struct error *err)
{
    const cJSON *bos = cJSON_GetObjectItemCaseSensitive(root, "bos_token");
    if (cJSON_IsObject(bos))
        bos = cJSON_GetObjectItemCaseSensitive(bos, "content");
    if (cJSON_IsString(bos) && !(t->bos = strdup(bos->valuestring)))
        return fail(err, STATUS_NOMEM, "chat template: out of memory");
    return STATUS_OK;
}

static enum status read_config_tree(struct chat_template *t, const cJSON *root, struct error *err)
{
    const cJSON *value = cJSON_GetObjectItemCaseSensitive(root, "chat_template");
    if (!cJSON_IsObject(root))
        return fail(err, STATUS_INVALID, "expected an object");
    enum status st = read_bos(t, root, err);
    if (st || !value || cJSON_IsNull(value))
        return st;
    const char *text = template_text(value);
    t->style = &UNKNOWN_STYLE;
    return text ? recognise(t, text, strlen(text), err) : STATUS_OK;
}

static enum status read_config(struct chat_template *t, const char *dir, struct error *err)
{
    static const char name[] = "tokenizer_config.json";
    static const struct json_limits limits = {.max_depth = 32, .max_values = 4000000};
    struct bytes file = {0};
    bool present;
    enum status st = read_optional(dir, name, MAX_CONFIG_BYTES, &file, &present, err);
    if (!st && present) {
        st = json_check(file.data ? file.data : "", file.n, &limits, err);
        cJSON *root = st ? NULL : cJSON_ParseWithLength(file.data, file.n);
        if (!st)
            st = root ? read_config_tree(t, root, err)
                      : fail(err, STATUS_NOMEM, "chat template: out of memory");
        cJSON_Delete(root);
        if (st)
            fail_context(err, "%s/%s", dir, name);
    }
    bytes_free(&file);
    return st;
}

/* A chat_template.jinja counts more than tokenizer_config.json, as in transformers. */
static enum status read_jinja(struct chat_template *t, const char *dir, struct error *err)
{
    struct bytes file = {0};
    bool present;
    enum status st =
        read_optional(dir, "chat_template.jinja", MAX_TEMPLATE_BYTES, &file, &present, err);
    if (!st && present) {
        free(t->default_system);
        t->default_system = NULL;
        st = recognise(t, file.data ? file.data : "", file.n, err);
    }
    bytes_free(&file);
    return st;
}

enum status chat_template_open(struct chat_template **out, const char *dir, struct error *err)
{
    struct chat_template *t = calloc(1, sizeof(*t));
    if (!t)
        return fail(err, STATUS_NOMEM, "chat template of %s: out of memory", dir);
    t->style = &NO_STYLE;
    enum status st = read_config(t, dir, err);
    if (!st)
        st = read_jinja(t, dir, err);
    if (st) {
        chat_template_close(t);
        return st;
    }
    *out = t;
    return STATUS_OK;
}

void chat_template_close(struct chat_template *t)
{
    if (!t)
        return;
    free(t->default_system);
    free(t->bos);
    free(t);
}

enum chat_template_kind chat_template_kind(const struct chat_template *t)
{
    return t->style->kind;
}

const char *chat_template_name(const struct chat_template *t)
{
    return t->style->name;
}

/* ---- rendering ---- */

/* One rendering. cut is where the text ends when the final message is to be continued. */
struct rendering {
    const struct chat_template *t;
    const struct chat_message *messages;
    size_t n;
    unsigned flags;
    struct bytes *out;
    size_t start; /* of this rendering in out */
    struct error *err;
};

/* What Python's str.isspace takes for a space, and so Jinja's trim. */
static bool is_python_space(uint32_t c)
{
    return (c >= 9 && c <= 13) || (c >= 0x1C && c <= 0x20) || c == 0x85 || c == 0xA0 ||
           c == 0x1680 || (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 ||
           c == 0x202F || c == 0x205F || c == 0x3000;
}

static size_t trimmed_start(const char *text, size_t n)
{
    size_t at = 0;
    uint32_t c = 0;
    int step;
    while ((step = utf8_decode(text + at, n - at, &c)) > 0 && is_python_space(c))
        at += (size_t)step;
    return at;
}

static size_t trimmed_end(const char *text, size_t n)
{
    while (n) {
        size_t at = n - 1;
        uint32_t c = 0;
        while (at && ((unsigned char)text[at] & 0xC0) == 0x80)
            at--;
        if (!utf8_decode(text + at, n - at, &c) || !is_python_space(c))
            break;
        n = at;
    }
    return n;
}

static void cut(struct bytes *b, size_t n)
{
    b->n = n;
    if (b->data)
        b->data[n] = '\0';
}

static const char *role_name(enum chat_role role)
{
    static const char *const names[] = {"system", "user", "assistant"};
    return names[role];
}

static bool is_continued(const struct rendering *r, size_t i)
{
    return (r->flags & CHAT_CONTINUE_FINAL_MESSAGE) && i + 1 == r->n;
}

/* The content of message i, and what closes it unless it is to be continued. */
static void put_content(struct rendering *r, size_t i, bool trim, const char *close)
{
    const struct chat_message *m = &r->messages[i];
    size_t start = trim ? trimmed_start(m->content, m->n) : 0;
    size_t end = trim && !is_continued(r, i) ? trimmed_end(m->content, m->n) : m->n;
    bytes_append(r->out, m->content + start, end > start ? end - start : 0);
    if (!is_continued(r, i))
        bytes_text(r->out, close);
    else if (trim && !r->out->failed) /* as transformers: all space at the cut goes */
        cut(r->out, r->start + trimmed_end(r->out->data + r->start, r->out->n - r->start));
}

static bool wants_prompt(const struct rendering *r)
{
    return r->flags & CHAT_ADD_GENERATION_PROMPT;
}

static enum status render_chatml(struct rendering *r)
{
    if (r->t->default_system && r->messages[0].role != CHAT_ROLE_SYSTEM) {
        bytes_text(r->out, "<|im_start|>system\n");
        bytes_text(r->out, r->t->default_system);
        bytes_text(r->out, "<|im_end|>\n");
    }
    for (size_t i = 0; i < r->n; i++) {
        bytes_text(r->out, "<|im_start|>");
        bytes_text(r->out, role_name(r->messages[i].role));
        bytes_char(r->out, '\n');
        put_content(r, i, false, "<|im_end|>\n");
    }
    if (wants_prompt(r))
        bytes_text(r->out, "<|im_start|>assistant\n");
    return STATUS_OK;
}

static enum status render_gemma(struct rendering *r)
{
    bool system = r->messages[0].role == CHAT_ROLE_SYSTEM;
    size_t first = system ? 1 : 0;
    if (system && !r->t->style->fold_system)
        return fail_field(r->err, STATUS_INVALID, "messages",
                          "the model's chat template has no system role");
    if (first == r->n && (r->flags & CHAT_CONTINUE_FINAL_MESSAGE))
        return fail_field(r->err, STATUS_INVALID, "messages",
                          "the model's chat template cannot continue a system message");
    bytes_text(r->out, r->t->bos ? r->t->bos : "");
    for (size_t i = first; i < r->n; i++) {
        enum chat_role role = r->messages[i].role;
        if ((role == CHAT_ROLE_USER) != ((i - first) % 2 == 0))
            return fail_field(r->err, STATUS_INVALID, "messages",
                              "message %zu: roles must alternate between user and assistant", i);
        bytes_text(r->out, "<start_of_turn>");
        bytes_text(r->out, role == CHAT_ROLE_ASSISTANT ? "model" : role_name(role));
        bytes_char(r->out, '\n');
        if (system && i == first) {
            bytes_append(r->out, r->messages[0].content, r->messages[0].n);
            bytes_text(r->out, "\n\n");
        }
        put_content(r, i, true, "<end_of_turn>\n");
    }
    if (wants_prompt(r))
        bytes_text(r->out, "<start_of_turn>model\n");
    return STATUS_OK;
}

static enum status render_llama3(struct rendering *r)
{
    if (!r->t->bos)
        return fail(r->err, STATUS_INVALID,
                    "the chat template needs a bos_token, and tokenizer_config.json has none");
    bytes_text(r->out, r->t->bos);
    for (size_t i = 0; i < r->n; i++) {
        bytes_text(r->out, "<|start_header_id|>");
        bytes_text(r->out, role_name(r->messages[i].role));
        bytes_text(r->out, "<|end_header_id|>\n\n");
        put_content(r, i, true, "<|eot_id|>");
    }
    bool continued = r->flags & CHAT_CONTINUE_FINAL_MESSAGE;
    if (wants_prompt(r) || (r->t->style->always_prompt && !continued))
        bytes_text(r->out, LLAMA3_HEADER);
    return STATUS_OK;
}

static void put_plain_role(struct rendering *r, const char *role)
{
    bytes_char(r->out, (char)(r->t->style->raw_role ? role[0] : role[0] - 'a' + 'A'));
    bytes_text(r->out, role + 1);
}

static enum status render_plain(struct rendering *r)
{
    for (size_t i = 0; i < r->n; i++) {
        put_plain_role(r, role_name(r->messages[i].role));
        bytes_text(r->out, ": ");
        put_content(r, i, false, r->t->style->line_end);
    }
    if (wants_prompt(r)) {
        put_plain_role(r, "assistant");
        bytes_char(r->out, ':');
    }
    return STATUS_OK;
}

static enum status render(struct rendering *r)
{
    switch (r->t->style->kind) {
    case CHAT_TEMPLATE_CHATML:
        return render_chatml(r);
    case CHAT_TEMPLATE_GEMMA:
        return render_gemma(r);
    case CHAT_TEMPLATE_LLAMA3:
        return render_llama3(r);
    case CHAT_TEMPLATE_PLAIN:
        return render_plain(r);
    case CHAT_TEMPLATE_NONE:
        return fail(r->err, STATUS_UNSUPPORTED, "the model has no chat template");
    case CHAT_TEMPLATE_UNKNOWN:
        break;
    }
    return fail(r->err, STATUS_UNSUPPORTED,
                "the model's chat template is none of those this server knows");
}

enum status chat_template_render(const struct chat_template *t, const struct chat_message *messages,
                                 size_t n_messages, unsigned flags, struct bytes *out,
                                 struct error *err)
{
    const unsigned both = CHAT_ADD_GENERATION_PROMPT | CHAT_CONTINUE_FINAL_MESSAGE;
    if (n_messages == 0)
        return fail_field(err, STATUS_INVALID, "messages", "the list of messages is empty");
    if ((flags & both) == both)
        return fail_field(err, STATUS_INVALID, "continue_final_message",
                          "add_generation_prompt and continue_final_message exclude each other");
    struct rendering r = {t, messages, n_messages, flags, out, out->n, err};
    enum status st = render(&r);
    if (!st && out->failed)
        st = fail(err, STATUS_NOMEM, "chat template: out of memory, or over the limit");
    if (st)
        cut(out, r.start);
    return st;
}

int chat_template_stops(const struct chat_template *t, const char *texts[4])
{
    switch (t->style->kind) {
    case CHAT_TEMPLATE_CHATML:
        texts[0] = "<|im_end|>";
        return 1;
    case CHAT_TEMPLATE_GEMMA:
        texts[0] = "<end_of_turn>";
        return 1;
    case CHAT_TEMPLATE_LLAMA3:
        texts[0] = "<|eot_id|>";
        return 1;
    case CHAT_TEMPLATE_PLAIN:
        texts[0] = t->style->raw_role ? "\nuser:" : "\nUser:";
        texts[1] = t->style->raw_role ? "\nsystem:" : "\nSystem:";
        return 2;
    default:
        return 0;
    }
}
