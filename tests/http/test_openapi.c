/* test_openapi.c - openapi.yaml against the program: routes, request fields, every documented
 * status, and the bodies of replies by their schemas. */
#include "tests/http/harness.h"

#include <cjson/cJSON.h>
#include <dirent.h>
#include <math.h>
#include <regex.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <yaml.h>

#include "server/codec.h"
#include "server/routes.h"
#include "tests/unit/model_files.h"

static yaml_document_t document;

/* ---- YAML ------------------------------------------------------------------------------------ */

static const char *scalar(const yaml_node_t *node)
{
    assert_true(node && node->type == YAML_SCALAR_NODE);
    return (const char *)node->data.scalar.value;
}

static yaml_node_t *at(int index)
{
    return yaml_document_get_node(&document, index);
}

static yaml_node_t *child(const yaml_node_t *map, const char *key)
{
    if (!map || map->type != YAML_MAPPING_NODE)
        return NULL;
    for (yaml_node_pair_t *p = map->data.mapping.pairs.start; p < map->data.mapping.pairs.top; p++)
        if (!strcmp(scalar(at(p->key)), key))
            return at(p->value);
    return NULL;
}

/* Follow "#/a/b~1c" from the root. */
static yaml_node_t *resolve(yaml_node_t *node)
{
    for (yaml_node_t *ref; (ref = child(node, "$ref"));) {
        char path[200];
        snprintf(path, sizeof(path), "%s", scalar(ref));
        assert_true(!strncmp(path, "#/", 2));
        node = yaml_document_get_root_node(&document);
        char *rest = NULL;
        for (char *name = strtok_r(path + 2, "/", &rest); name; name = strtok_r(NULL, "/", &rest))
            node = child(node, name);
        if (!node)
            fail_msg("$ref %s leads nowhere", scalar(ref));
    }
    return node;
}

static yaml_node_t *member(yaml_node_t *map, const char *key)
{
    return resolve(child(resolve(map), key));
}

#define EACH_PAIR(p, map)                                                                          \
    yaml_node_pair_t *p = (map)->data.mapping.pairs.start;                                         \
    p < (map)->data.mapping.pairs.top;                                                             \
    p++
#define EACH_ITEM(i, list)                                                                         \
    yaml_node_item_t *i = (list)->data.sequence.items.start;                                       \
    i < (list)->data.sequence.items.top;                                                           \
    i++

/* A YAML value as JSON; plain scalars by their looks. */
static cJSON *to_json(yaml_node_t *node)
{
    if (node->type == YAML_SEQUENCE_NODE) {
        cJSON *list = cJSON_CreateArray();
        for (EACH_ITEM(i, node))
            cJSON_AddItemToArray(list, to_json(at(*i)));
        return list;
    }
    if (node->type == YAML_MAPPING_NODE) {
        cJSON *map = cJSON_CreateObject();
        for (EACH_PAIR(p, node))
            cJSON_AddItemToObject(map, scalar(at(p->key)), to_json(at(p->value)));
        return map;
    }
    const char *text = scalar(node);
    if (node->data.scalar.style == YAML_PLAIN_SCALAR_STYLE) {
        char *end = NULL;
        double number = strtod(text, &end);
        if (!strcmp(text, "null"))
            return cJSON_CreateNull();
        if (!strcmp(text, "true") || !strcmp(text, "false"))
            return cJSON_CreateBool(*text == 't');
        if (*text && !*end)
            return cJSON_CreateNumber(number);
    }
    return cJSON_CreateString(text);
}

/* ---- a small validator --------------------------------------------------------------------------
 */

/* The keywords it knows; another one in a schema fails the test, so that none goes unchecked. */
static const char *const keywords[] = {
    "type",       "required",      "properties",    "items",
    "enum",       "const",         "oneOf",         "anyOf",
    "allOf",      "minimum",       "maximum",       "minItems",
    "maxItems",   "minLength",     "maxLength",     "pattern",
    "default",    "$ref",          "examples",      "description",
    "deprecated", "maxProperties", "propertyNames", "additionalProperties"};

static bool is_of_type(const cJSON *v, const char *type)
{
    if (!strcmp(type, "object"))
        return cJSON_IsObject(v);
    if (!strcmp(type, "array"))
        return cJSON_IsArray(v);
    if (!strcmp(type, "string"))
        return cJSON_IsString(v);
    if (!strcmp(type, "boolean"))
        return cJSON_IsBool(v);
    if (!strcmp(type, "null"))
        return cJSON_IsNull(v);
    if (!strcmp(type, "integer"))
        return cJSON_IsNumber(v) && v->valuedouble == floor(v->valuedouble);
    assert_string_equal(type, "number");
    return cJSON_IsNumber(v);
}

static bool has_type(const cJSON *v, const yaml_node_t *type)
{
    if (!type || type->type == YAML_SCALAR_NODE)
        return !type || is_of_type(v, scalar(type));
    for (EACH_ITEM(i, type))
        if (is_of_type(v, scalar(at(*i))))
            return true;
    return false;
}

static bool equals(const cJSON *v, yaml_node_t *node)
{
    cJSON *other = to_json(node);
    bool equal = cJSON_Compare(v, other, true);
    cJSON_Delete(other);
    return equal;
}

static const char *validate(const cJSON *v, yaml_node_t *schema, bool closed);

static bool is_over(yaml_node_t *schema, const char *keyword, double value)
{
    yaml_node_t *most = child(schema, keyword);
    return most && value > atof(scalar(most));
}

static bool is_under(yaml_node_t *schema, const char *keyword, double value)
{
    yaml_node_t *least = child(schema, keyword);
    return least && value < atof(scalar(least));
}

/* Lengths are in characters. */
static const char *validate_string(const char *text, yaml_node_t *schema)
{
    yaml_node_t *pattern = child(schema, "pattern");
    int n = 0;
    for (const char *c = text; *c; c++)
        n += ((unsigned char)*c & 0xc0) != 0x80;
    if (is_under(schema, "minLength", n) || is_over(schema, "maxLength", n))
        return "length";
    if (!pattern)
        return NULL;
    regex_t regex;
    assert_int_equal(regcomp(&regex, scalar(pattern), REG_EXTENDED | REG_NOSUB), 0);
    bool found = !regexec(&regex, text, 0, NULL, 0);
    regfree(&regex);
    return found ? NULL : "pattern";
}

static const char *validate_number(double value, yaml_node_t *schema)
{
    return is_under(schema, "minimum", value) || is_over(schema, "maximum", value) ? "range" : NULL;
}

static const char *validate_object(const cJSON *v, yaml_node_t *schema, bool closed)
{
    yaml_node_t *names = child(schema, "propertyNames");
    if (is_over(schema, "maxProperties", cJSON_GetArraySize(v)))
        return "maxProperties";
    yaml_node_t *required = child(schema, "required"), *properties = child(schema, "properties");
    yaml_node_t *others = child(schema, "additionalProperties");
    if (required)
        for (EACH_ITEM(i, required))
            if (!cJSON_GetObjectItemCaseSensitive(v, scalar(at(*i))))
                return scalar(at(*i));
    const cJSON *item;
    cJSON_ArrayForEach(item, v)
    {
        yaml_node_t *inner = child(properties, item->string);
        if (names && validate_string(item->string, names))
            return "propertyNames";
        if (!inner && others && others->type == YAML_SCALAR_NODE)
            return item->string; /* additionalProperties: false */
        if (!inner && others)
            inner = others;
        if (!inner && closed && properties)
            return item->string; /* a reply has nothing that is not described */
        const char *wrong = inner ? validate(item, inner, closed) : NULL;
        if (wrong)
            return wrong;
    }
    return NULL;
}

static const char *validate_array(const cJSON *v, yaml_node_t *schema, bool closed)
{
    yaml_node_t *items = child(schema, "items");
    int n = cJSON_GetArraySize(v);
    if (is_under(schema, "minItems", n) || is_over(schema, "maxItems", n))
        return "length";
    const cJSON *item;
    cJSON_ArrayForEach(item, v)
    {
        const char *wrong = items ? validate(item, items, closed) : NULL;
        if (wrong)
            return wrong;
    }
    return NULL;
}

static const char *validate_enum(const cJSON *v, yaml_node_t *schema)
{
    yaml_node_t *values = child(schema, "enum"), *value = child(schema, "const");
    bool found = !values;
    if (values)
        for (EACH_ITEM(i, values))
            found |= equals(v, at(*i));
    return found && (!value || equals(v, value)) ? NULL : "enum or const";
}

/* Every one of allOf and any of anyOf (whose parts are open: they describe one object together),
 * exactly one of oneOf. */
static const char *validate_parts(const cJSON *v, yaml_node_t *schema, bool closed)
{
    yaml_node_t *all = child(schema, "allOf"), *one = child(schema, "oneOf");
    yaml_node_t *any = child(schema, "anyOf");
    int n = 0;
    if (any)
        for (EACH_ITEM(i, any))
            n += !validate(v, at(*i), false);
    if (any && !n)
        return "anyOf";
    if (all)
        for (EACH_ITEM(i, all)) {
            const char *wrong = validate(v, at(*i), false);
            if (wrong)
                return wrong;
        }
    if (!one)
        return NULL;
    n = 0;
    for (EACH_ITEM(i, one))
        n += !validate(v, at(*i), closed);
    return n == 1 ? NULL : "oneOf";
}

/* NULL when v fits, otherwise what does not. */
static const char *validate(const cJSON *v, yaml_node_t *schema, bool closed)
{
    schema = resolve(schema);
    if (!has_type(v, child(schema, "type")))
        return "type";
    const char *wrong = validate_enum(v, schema);
    if (!wrong)
        wrong = validate_parts(v, schema, closed);
    if (!wrong && cJSON_IsObject(v))
        wrong = validate_object(v, schema, closed);
    if (!wrong && cJSON_IsArray(v))
        wrong = validate_array(v, schema, closed);
    if (!wrong && cJSON_IsString(v))
        wrong = validate_string(v->valuestring, schema);
    if (!wrong && cJSON_IsNumber(v))
        wrong = validate_number(v->valuedouble, schema);
    return wrong;
}

/* Every schema uses known keywords only, and every $ref leads somewhere. */
static void check_keywords(yaml_node_t *schema)
{
    if (schema->type != YAML_MAPPING_NODE)
        return;
    for (EACH_PAIR(p, schema)) {
        const char *key = scalar(at(p->key));
        bool known = false;
        for (size_t i = 0; i < COUNT_OF(keywords); i++)
            known |= !strcmp(key, keywords[i]);
        if (!known)
            fail_msg("unknown keyword %s in a schema", key);
        yaml_node_t *value = at(p->value);
        if (!strcmp(key, "properties"))
            for (EACH_PAIR(q, value))
                check_keywords(at(q->value));
        else if (!strcmp(key, "oneOf") || !strcmp(key, "anyOf") || !strcmp(key, "allOf"))
            for (EACH_ITEM(i, value))
                check_keywords(at(*i));
        else if (!strcmp(key, "items") || !strcmp(key, "additionalProperties") ||
                 !strcmp(key, "propertyNames"))
            check_keywords(value);
        else if (!strcmp(key, "$ref"))
            resolve(schema);
    }
}

/* Both APIs take it. */
static const char endless[] = "{\"prompt\":\"x\",\"n\":2,\"max_tokens\":1000000,"
                              "\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],"
                              "\"ignore_eos\":true}";

/* ---- servers ------------------------------------------------------------------------------------
 */

#define KEY "0123456789abcdef"

static struct server plain, tight, keyed, small, full;
static struct server damaged; /* with a session that is lost */
static char damaged_id[64], damaged_model[128], damaged_store[128];
static int fillers[2]; /* connections that keep `full` full */

static void start_keyed(void)
{
    static char path[] = "/tmp/latte-test-key-XXXXXX";
    int fd = mkstemp(path);
    assert_true(fd >= 0 && write(fd, KEY "\n", sizeof(KEY)) == sizeof(KEY));
    close(fd);
    server_start(&keyed, (const char *const[]){"--api-key-file", path, NULL});
    unlink(path);
}

/* A server that is still loading answers 503. Loading is soon over, so the first attempts may
 * come too late. */
static void ask_while_loading(const struct client_request *q, struct reply *reply)
{
    for (int i = 0; i < 100; i++) {
        struct server s;
        server_launch(&s, (const char *const[]){"--model", plain.model, NULL});
        client_send(&s, q, reply);
        server_signal(&s, SIGKILL);
        server_wait_exit(&s, 10000);
        s.pid = 0;
        server_stop(&s);
        if (reply->code == 503)
            return;
        reply_free(reply);
    }
    fail_msg("%s never answered 503 while loading", q->path);
}

static void load_document(const struct reply *reply)
{
    yaml_parser_t parser;
    assert_true(yaml_parser_initialize(&parser));
    yaml_parser_set_input_string(&parser, (const unsigned char *)reply->body.data, reply->body.n);
    if (!yaml_parser_load(&parser, &document))
        fail_msg("openapi.yaml, line %zu: %s", parser.problem_mark.line + 1, parser.problem);
    yaml_parser_delete(&parser);
}

/* One request runs, one waits, so that a third is too many. */
static void fill_up(const struct server *s)
{
    static const char *const gauges[] = {"latte_requests_running", "latte_requests_waiting"};
    for (int i = 0; i < 2; i++) {
        char text[400];
        const char *body = "{\"prompt\":\"x\",\"max_tokens\":1000000,\"ignore_eos\":true}";
        int n = snprintf(text, sizeof(text),
                         "POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
                         "Content-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s",
                         strlen(body), body);
        fillers[i] = raw_connect(s);
        raw_write(fillers[i], text, (size_t)n);
        assert_true(server_await_metric(s, gauges[i], 1, 30000));
    }
}

/* A session with a turn behind it and a snapshot "taken"; of a server that has no room, none. */
static void make_session(const struct server *s, char id[64])
{
    struct reply reply;
    char body[200];
    client_post(s, "/v1/sessions", "{}", &reply);
    cJSON *v = cJSON_ParseWithLength(reply.body.data, reply.body.n);
    const cJSON *found = cJSON_GetObjectItemCaseSensitive(v, "id");
    snprintf(id, 64, "%s", found ? found->valuestring : "sess_none");
    cJSON_Delete(v);
    reply_free(&reply);
    if (s != &plain)
        return;
    snprintf(body, sizeof(body), "{\"session_id\":\"%s\",\"prompt\":[5],\"max_tokens\":1}", id);
    client_post(s, "/v1/completions", body, &reply);
    assert_int_equal(reply.code, 200);
    reply_free(&reply);
    snprintf(body, sizeof(body), "/v1/sessions/%s/snapshots", id);
    client_post(s, body, "{\"name\":\"taken\"}", &reply);
    assert_int_equal(reply.code, 200);
    reply_free(&reply);
}

/* The exported state of a session with a turn behind it. */
static void export_state(const struct server *s, struct reply *out)
{
    char id[64], path[120];
    make_session(s, id);
    char body[120];
    snprintf(body, sizeof(body), "{\"session_id\":\"%s\",\"prompt\":[5],\"max_tokens\":1}", id);
    client_post(s, "/v1/completions", body, out);
    assert_int_equal(out->code, 200);
    reply_free(out);
    snprintf(path, sizeof(path), "/v1/sessions/%s/state", id);
    client_get(s, path, out);
    assert_int_equal(out->code, 200);
}

/* It has a preset "fixed", and all may save others. */
static void start_plain(void)
{
    struct reply exported;
    char option[200];
    export_state(&tight, &exported);
    assert_int_equal(test_file_write(tight.dir, "state", exported.body.data, exported.body.n), 0);
    reply_free(&exported);
    snprintf(option, sizeof(option), "fixed=%s/state", tight.dir);
    server_start(&plain, (const char *const[]){"--preset", option, "--open-admin", NULL});
}

/* A session that the store has lost: its state's file was changed between two starts. The state is
 * an import, so there is no other way to it. */
static void start_damaged(void)
{
    char path[400], states[200];
    struct reply exported, reply;
    assert_int_equal(test_dir_make(damaged_store, sizeof(damaged_store)), 0);
    make_tiny_model(damaged_model, sizeof(damaged_model));
    const char *const args[] = {"--model", damaged_model, "--store", damaged_store, NULL};
    export_state(&plain, &exported);
    server_start(&damaged, args);
    client_post(&damaged, "/v1/sessions", "{}", &reply);
    snprintf(damaged_id, sizeof(damaged_id), "%.37s", strstr(reply.body.data, "sess_"));
    reply_free(&reply);
    snprintf(path, sizeof(path), "/v1/sessions/%s/state", damaged_id);
    client_send(
        &damaged,
        &(struct client_request){
            .method = "PUT", .path = path, .body = exported.body.data, .n_body = exported.body.n},
        &reply);
    assert_int_equal(reply.code, 200);
    reply_free(&reply);
    reply_free(&exported);
    server_stop(&damaged);
    snprintf(states, sizeof(states), "%s/states", damaged_store);
    DIR *entries = opendir(states);
    assert_non_null(entries);
    for (struct dirent *e; (e = readdir(entries));) {
        snprintf(path, sizeof(path), "%s/%.150s", states, e->d_name);
        if (e->d_name[0] != '.')
            assert_int_equal(truncate(path, 100), 0);
    }
    closedir(entries);
    server_start(&damaged, args);
}

static int start_all(void **state)
{
    (void)state;
    server_start(&tight, (const char *const[]){"--request-timeout", "1", "--max-tokens-limit",
                                               "1000000000", NULL});
    start_plain();
    server_start(&small,
                 (const char *const[]){"--max-body-mb", "1", "--stream-limit-mb", "0.1", NULL});
    server_start(&full,
                 (const char *const[]){"--max-slots", "1", "--max-queue", "2", "--max-sessions",
                                       "1", "--max-presets", "1", "--open-admin", NULL});
    fill_up(&full);
    start_keyed();
    start_damaged();
    struct reply reply;
    client_get(&plain, "/openapi.yaml", &reply);
    assert_int_equal(reply.code, 200);
    load_document(&reply);
    reply_free(&reply);
    return 0;
}

static int stop_all(void **state)
{
    (void)state;
    yaml_document_delete(&document);
    server_stop(&plain);
    server_stop(&tight);
    server_stop(&small);
    close(fillers[0]);
    close(fillers[1]);
    server_stop(&full);
    server_stop(&keyed);
    server_stop(&damaged);
    test_dir_remove(damaged_model);
    test_dir_remove(damaged_store);
    return 0;
}

/* ---- the tests
 * ------------------------------------------------------------------------------------ */

static yaml_node_t *paths(void)
{
    return child(yaml_document_get_root_node(&document), "paths");
}

static void test_document(void **state)
{
    (void)state;
    yaml_node_t *root = yaml_document_get_root_node(&document);
    assert_string_equal(scalar(child(root, "openapi")), "3.1.0");
    assert_string_equal(scalar(member(child(root, "info"), "version")), latte_version);
    for (EACH_PAIR(p, member(child(root, "components"), "schemas")))
        check_keywords(at(p->value));
    /* What is served is the file. */
    size_t n = 0;
    char *file = test_file_read("openapi.yaml", &n);
    struct reply reply;
    client_get(&plain, "/openapi.yaml", &reply);
    assert_int_equal(reply.body.n, n);
    assert_memory_equal(reply.body.data, file, n);
    reply_free(&reply);
    free(file);
}

static void lower(char *out, const char *in)
{
    for (; *in; in++)
        *out++ = (char)(*in | 32);
    *out = '\0';
}

static void test_routes(void **state)
{
    (void)state;
    size_t n_routes, n_operations = 0;
    const struct http_route *routes = routes_table(&n_routes);
    for (size_t i = 0; i < n_routes; i++) {
        char method[16];
        lower(method, routes[i].method);
        yaml_node_t *operation = child(child(paths(), routes[i].path), method);
        if (!operation)
            fail_msg("%s %s is not in openapi.yaml", routes[i].method, routes[i].path);
        /* Open routes say so. */
        bool open = routes[i].flags & HTTP_ROUTE_OPEN;
        assert_int_equal(open, child(operation, "security") != NULL);
        assert_int_equal(open, child(child(operation, "responses"), "401") == NULL);
    }
    for (EACH_PAIR(p, paths()))
        for (EACH_PAIR(m, at(p->value)))
            n_operations++;
    assert_int_equal(n_operations, n_routes);
}

/* The properties of a schema and the names a function lists are the same. */
static void compare_fields(const char *what, yaml_node_t *schema, enum codec_api api,
                           const char *(*other)(size_t))
{
    yaml_node_t *properties = member(schema, "properties");
    size_t n = 0, n_described = 0;
    const char *name;
    for (; (name = other ? other(n) : codec_field(api, n)); n++)
        if (!child(properties, name))
            fail_msg("%s: field %s is not in openapi.yaml", what, name);
    for (EACH_PAIR(p, properties)) {
        bool known = false;
        for (size_t i = 0; i < n; i++)
            known |= !strcmp(scalar(at(p->key)), other ? other(i) : codec_field(api, i));
        if (!known)
            fail_msg("%s: the codec does not know %s", what, scalar(at(p->key)));
        n_described++;
    }
    assert_int_equal(n, n_described);
}

static yaml_node_t *request_schema(const char *path)
{
    yaml_node_t *body = member(member(child(paths(), path), "post"), "requestBody");
    return member(member(member(body, "content"), "application/json"), "schema");
}

static void test_request_fields(void **state)
{
    (void)state;
    static const struct {
        const char *path;
        enum codec_api api;
    } apis[] = {
        {"/v1/completions", CODEC_COMPLETIONS}, {"/v1/chat/completions", CODEC_CHAT},
        {"/v1/responses", CODEC_RESPONSES},     {"/tokenize", CODEC_TOKENIZE},
        {"/detokenize", CODEC_DETOKENIZE},
    };
    for (size_t i = 0; i < COUNT_OF(apis); i++)
        compare_fields(apis[i].path, request_schema(apis[i].path), apis[i].api, NULL);
    yaml_node_t *schemas =
        member(child(yaml_document_get_root_node(&document), "components"), "schemas");
    compare_fields("stream_options", child(schemas, "StreamOptions"), 0, codec_stream_option);
    compare_fields("message", child(schemas, "Message"), 0, codec_message_field);
    compare_fields("item", child(schemas, "InputMessage"), 0, codec_item_field);
    compare_fields("from", child(schemas, "From"), 0, codec_from_field);
}

/* The first example of an operation's request body, as JSON text; NULL without a body. */
static char *example_body(yaml_node_t *operation)
{
    yaml_node_t *body = member(operation, "requestBody");
    if (!body)
        return NULL;
    yaml_node_t *media = member(member(body, "content"), "application/json");
    if (!media)
        return NULL;
    yaml_node_t *examples = member(media, "examples");
    yaml_node_t *first = at(examples->data.mapping.pairs.start->value);
    cJSON *v = to_json(child(first, "value"));
    char *text = cJSON_PrintUnformatted(v);
    cJSON_Delete(v);
    return text;
}

/* Begin a turn of the session that ends when the connection does. */
static int hold_turn(const struct server *s, const char *id)
{
    char text[500], body[200];
    struct bytes out = {0};
    snprintf(body, sizeof(body),
             "{\"session_id\":\"%s\",\"prompt\":\"x\",\"max_tokens\":1000000,\"ignore_eos\":true,"
             "\"stream\":true}",
             id);
    int n = snprintf(text, sizeof(text),
                     "POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
                     "Content-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s",
                     strlen(body), body);
    int fd = raw_connect(s);
    raw_write(fd, text, (size_t)n);
    assert_true(raw_await(fd, &out, "data:", 30000));
    bytes_free(&out);
    return fd;
}

static void turn_body(char *out, size_t n, const char *path, const char *id)
{
    const char *input = strstr(path, "chat")
                            ? "\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]"
                            : "\"prompt\":\"x\"";
    snprintf(out, n, "{\"session_id\":\"%s\",%s}", id, input);
}

/* The same for what is about a session, and for turns that are refused because of it. */
static void provoke_session(const char *path, const char *method, int status, const char *example,
                            struct reply *reply)
{
    char id[64], real_path[200], body[300], upper[16];
    static const char *const xml[] = {"Content-Type: text/xml", NULL};
    static const char *const stale[] = {"If-Match: \"99\"", NULL};
    static const char *const unreadable[] = {"If-Match: seven", NULL};
    const struct server *s = status == 401   ? &keyed
                             : status == 410 ? &damaged
                             : status == 413 ? &small
                             : status == 429 ? &full
                                             : &plain;
    bool turn = !strstr(path, "sessions"), import = !strcmp(method, "put");
    struct reply exported = {0};
    char *big = NULL;
    int held = -1;
    snprintf(id, sizeof(id), "sess_none");
    if (status == 410)
        snprintf(id, sizeof(id), "%s", damaged_id);
    else if (status != 404 && status != 401 && status != 503)
        make_session(s, id);
    const char *brace = strchr(path, '{');
    snprintf(real_path, sizeof(real_path), "%.*s%s%s", brace ? (int)(brace - path) : 100, path,
             brace ? id : "", brace ? strchr(path, '}') + 1 : "");
    for (size_t i = 0; i <= strlen(method); i++)
        upper[i] = method[i] ? (char)(method[i] & ~32) : '\0';
    struct client_request q = {.method = upper, .path = real_path, .body = example};
    if (import) {
        char state_path[200];
        snprintf(state_path, sizeof(state_path), "/v1/sessions/%s/state", id);
        client_get(&plain, state_path, &exported);
        q.body = exported.body.data ? exported.body.data : "x";
        q.n_body = exported.body.n;
    }
    if (turn) {
        turn_body(body, sizeof(body), path, id);
        q.body = body;
    }
    if (status == 400 && example)
        q.body = "{";
    if (status == 400 && import)
        q.body = "x", q.n_body = 1;
    if (status == 400 && brace && !example && !import)
        q.headers = unreadable;
    else if (status == 400 && !strcmp(upper, "GET"))
        strcat(real_path, "?limit=0");
    if (status == 404 && !brace && !strcmp(upper, "GET"))
        strcat(real_path, "?after=none");
    if (status == 404 && !brace && example)
        q.body = "{\"from\":{\"preset\":\"none\"}}";
    if (status == 409 && strstr(path, "snapshots"))
        q.body = "{\"name\":\"taken\"}";
    else if (status == 409)
        held = hold_turn(s, id);
    if (status == 412)
        q.headers = stale;
    if (status == 415)
        q.headers = xml;
    if (status == 413) {
        big = malloc(3 << 20);
        memset(big, ' ', 3 << 20);
        q.body = big;
        q.n_body = 3 << 20;
    }
    if (status == 429 && brace) { /* its one session is there: a fork is too many */
        struct reply list;
        client_get(s, "/v1/sessions", &list);
        const char *found = strstr(list.body.data, "sess_");
        assert_non_null(found);
        snprintf(real_path, sizeof(real_path), "/v1/sessions/%.37s/fork", found);
        reply_free(&list);
    }
    if (status == 503)
        ask_while_loading(&q, reply);
    else
        client_send(s, &q, reply);
    if (held >= 0)
        close(held);
    reply_free(&exported);
    free(big);
}

/* The same for what is about a stream, which is there but for 401 and 404, and which is longer than
 * what is kept of it for 410. */
static void provoke_stream(const char *method, int status, struct reply *reply)
{
    const struct server *s = status == 401 ? &keyed : status == 410 ? &small : &plain;
    char id[64] = "cmpl-none", path[160], body[200];
    struct reply made;
    if (status != 401 && status != 404) {
        snprintf(body, sizeof(body),
                 "{\"prompt\":\"x\",\"n\":2,\"logprobs\":20,\"max_tokens\":%d,"
                 "\"ignore_eos\":true,\"stream\":true,\"resumable\":true}",
                 status == 410 ? 200 : 1);
        client_post(s, "/v1/completions", body, &made);
        assert_true(reply_header(&made, "X-Stream-Id", id, sizeof(id)));
        reply_free(&made);
    }
    /* Each of the two choices of one token is an event, and so is the end. */
    snprintf(path, sizeof(path), "/v1/streams/%s%s", id,
             status == 204   ? "?last_event_id=3"
             : status == 400 ? "?last_event_id=x"
                             : "");
    client_send(
        s,
        &(struct client_request){.method = strcmp(method, "get") ? "DELETE" : "GET", .path = path},
        reply);
}

/* A key that stands for another body, or for a stream that was deleted. */
static void provoke_key(const char *path, int status, const char *example, struct reply *reply)
{
    char key[100], id[64], stream_path[100];
    struct reply first;
    snprintf(key, sizeof(key), "Idempotency-Key: %d%s", status, path);
    const char *const headers[] = {key, NULL};
    bool responses = strstr(path, "responses") != NULL;
    const char *text = strstr(path, "chat") ? "\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]"
                       : responses          ? "\"input\":\"x\""
                                            : "\"prompt\":\"x\"";
    char body[200];
    snprintf(body, sizeof(body), "{%s,\"%s\":1,\"stream\":true}", text,
             responses ? "max_output_tokens" : "max_tokens");
    struct client_request q = {.path = path, .body = body, .headers = headers};
    client_send(&plain, &q, &first);
    assert_true(reply_header(&first, "X-Stream-Id", id, sizeof(id)));
    reply_free(&first);
    snprintf(stream_path, sizeof(stream_path), "/v1/streams/%s", id);
    client_send(&plain, &(struct client_request){.method = "DELETE", .path = stream_path}, &first);
    reply_free(&first);
    if (status == 422)
        q.body = example;
    client_send(&plain, &q, reply);
}

/* Begin a response that ends when the connection does; its id. */
static int hold_response(const struct server *s, char id[64])
{
    static const char body[] = "{\"input\":\"x\",\"max_output_tokens\":1000000,"
                               "\"ignore_eos\":true,\"stream\":true}";
    char text[400];
    struct bytes out = {0};
    int n = snprintf(text, sizeof(text),
                     "POST /v1/responses HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                     "Content-Length: %zu\r\n\r\n%s",
                     strlen(body), body);
    int fd = raw_connect(s);
    raw_write(fd, text, (size_t)n);
    if (id) {
        assert_true(raw_await(fd, &out, "response.in_progress", 30000));
        snprintf(id, 64, "%.37s", strstr(out.data, "resp_"));
    } else {
        assert_true(server_await_metric(s, "latte_requests_waiting", 2, 30000));
    }
    bytes_free(&out);
    return fd;
}

/* The id of a stored response; "resp_none" where none can be made. */
static void make_response(char id[64])
{
    struct reply reply;
    client_post(&plain, "/v1/responses", "{\"input\":\"x\",\"max_output_tokens\":1}", &reply);
    assert_int_equal(reply.code, 200);
    snprintf(id, 64, "%.37s", strstr(reply.body.data, "resp_"));
    reply_free(&reply);
}

/* The same for what is about responses. */
static void provoke_response(const char *path, const char *method, int status, const char *example,
                             struct reply *reply)
{
    static const char *const xml[] = {"Content-Type: text/xml", NULL};
    static const char endless_response[] = "{\"input\":\"x\",\"max_output_tokens\":1000000,"
                                           "\"ignore_eos\":true}";
    const struct server *s = status == 401   ? &keyed
                             : status == 413 ? &small
                             : status == 429 ? &full
                             : status == 504 ? &tight
                                             : &plain;
    char id[64] = "resp_none", real_path[200], body[200], upper[16], *big = NULL;
    int held = -1;
    const char *brace = strchr(path, '{');
    if (brace && (status == 200 || status == 400))
        make_response(id);
    snprintf(real_path, sizeof(real_path), "%.*s%s%s%s", brace ? (int)(brace - path) : 100, path,
             brace ? id : "", brace ? strchr(path, '}') + 1 : "",
             status == 400 && brace ? "?limit=x&stream=x" : "");
    for (size_t i = 0; i <= strlen(method); i++)
        upper[i] = method[i] ? (char)(method[i] & ~32) : '\0';
    struct client_request q = {.method = upper, .path = real_path, .body = example};
    if (status == 400 && example)
        q.body = "{";
    if (status == 404 && example)
        q.body = "{\"input\":\"x\",\"model\":\"none\"}";
    if (status == 409) {
        held = hold_response(s, id);
        snprintf(body, sizeof(body), "{\"input\":\"x\",\"previous_response_id\":\"%s\"}", id);
        q.body = body;
    }
    if (status == 413) {
        big = malloc(3 << 20);
        memset(big, ' ', 3 << 20);
        q.body = big;
        q.n_body = 3 << 20;
    }
    if (status == 415)
        q.headers = xml;
    if (status == 429)
        held = hold_response(s, NULL); /* it takes the last place */
    if (status == 504)
        q.body = endless_response;
    if (status == 503)
        ask_while_loading(&q, reply);
    else
        client_send(s, &q, reply);
    if (held >= 0)
        close(held);
    free(big);
}

/* The same for presets. */
static void provoke_preset(const char *path, const char *method, int status, struct reply *reply)
{
    char upper[16], real_path[100];
    struct reply exported;
    const struct server *s = status == 401   ? &keyed
                             : status == 413 ? &small
                             : status == 403 ? &small
                             : status == 429 ? &full
                                             : &plain;
    bool put = !strcmp(method, "put"), remove = !strcmp(method, "delete");
    export_state(&plain, &exported);
    for (size_t i = 0; i <= strlen(method); i++)
        upper[i] = method[i] ? (char)(method[i] & ~32) : '\0';
    struct client_request q = {.method = "PUT",
                               .path = "/v1/presets/old",
                               .body = exported.body.data,
                               .n_body = exported.body.n};
    if (status == 429 || (status == 200 && remove)) {
        client_send(s, &q, reply);
        assert_int_equal(reply->code, 200);
        reply_free(reply);
    }
    const char *name = status == 409               ? "fixed"
                       : status == 404 && !put     ? "none"
                       : status == 200 && (remove) ? "old"
                       : status == 200 && !put     ? "fixed"
                                                   : "new";
    bool one = strchr(path, '{') != NULL;
    snprintf(real_path, sizeof(real_path), "/v1/presets%s%s", one ? "/" : "", one ? name : "");
    q.method = upper;
    q.path = real_path;
    char *big = status == 413 ? calloc(1, 3 << 20) : NULL;
    if (!put)
        q.body = NULL, q.n_body = 0;
    else if (big)
        q.body = big, q.n_body = 3 << 20;
    else if (status == 404)
        q.body = "{\"session\":\"sess_none\"}", q.n_body = 0;
    else if (status == 400)
        q.body = "x", q.n_body = 1;
    if (status == 503)
        ask_while_loading(&q, reply);
    else
        client_send(s, &q, reply);
    free(big);
    reply_free(&exported);
}

/* Send what makes an operation answer with a status; false when nothing here can. */
static bool provoke(const char *path, const char *method, int status, const char *example,
                    struct reply *reply)
{
    bool get = !strcmp(method, "get"), one = strstr(path, "{id}") != NULL;
    if (strstr(path, "/streams")) {
        provoke_stream(method, status, reply);
        return true;
    }
    /* A turn's 410 has two reasons: completions show the lost session, the others the lost reply.
     */
    bool by_key = strstr(path, "/chat") || strstr(path, "/responses");
    if (status == 422 || (status == 410 && by_key)) {
        provoke_key(path, status, example, reply);
        return true;
    }
    if (strstr(path, "/responses")) {
        provoke_response(path, method, status, example, reply);
        return true;
    }
    if (strstr(path, "/presets")) {
        provoke_preset(path, method, status, reply);
        return true;
    }
    if (strstr(path, "/sessions") || status == 409 || status == 410 || status == 412) {
        provoke_session(path, method, status, example, reply);
        return true;
    }
    char real_path[300], *big = NULL;
    static const char *const xml[] = {"Content-Type: text/xml", NULL};
    struct client_request q = {.path = path, .body = get ? NULL : example};
    const struct server *s = &plain;
    snprintf(real_path, sizeof(real_path), "/v1/models/%s",
             strrchr(status == 404 ? "/none" : plain.model, '/') + 1);
    if (one)
        q.path = real_path;
    if (strstr(path, "{file}"))
        q.path = status == 404 ? "/playground/none" : "/playground/style.css";
    switch (status) {
    case 200:
        break;
    case 400:
        q.body = "{";
        break;
    case 401:
        s = &keyed;
        break;
    case 404:
        q.body = get ? NULL
                     : "{\"model\":\"none\",\"prompt\":\"x\",\"tokens\":[1],\"messages\":"
                       "[{\"role\":\"user\",\"content\":\"x\"}]}";
        if (!strcmp(path, "/tokenize"))
            q.body = "{\"model\":\"none\",\"prompt\":\"x\"}";
        break;
    case 413:
        s = &small;
        big = malloc(3 << 20);
        memset(big, ' ', 3 << 20);
        q.body = big;
        q.n_body = 3 << 20;
        break;
    case 415:
        q.headers = xml;
        break;
    case 429:
        s = &full;
        q.body = endless;
        break;
    case 503:
        ask_while_loading(&q, reply);
        return true;
    case 504:
        s = &tight;
        q.body = endless;
        break;
    default:
        return false;
    }
    client_send(s, &q, reply);
    free(big);
    return true;
}

/* A POST that says nothing of its length, which libcurl does not send. */
static void provoke_411(const char *path, struct reply *reply)
{
    char text[300];
    struct bytes out = {0};
    int n = snprintf(text, sizeof(text),
                     "POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                     "Connection: close\r\n\r\n",
                     path);
    raw_exchange(&plain, text, (size_t)n, &out);
    *reply = (struct reply){.code = out.n > 12 ? atoi(out.data + 9) : 0};
    const char *body = out.n ? strstr(out.data, "\r\n\r\n") : NULL;
    if (body)
        bytes_text(&reply->body, body + 4);
    bytes_free(&out);
}

/* The body fits the schema of its media type. */
static void check_body(const char *what, yaml_node_t *response, const struct reply *reply)
{
    yaml_node_t *content = member(response, "content");
    yaml_node_t *schema = member(member(content, "application/json"), "schema");
    if (!schema || !reply->body.n || (reply->body.data[0] != '{'))
        return;
    cJSON *v = cJSON_ParseWithLength(reply->body.data, reply->body.n);
    assert_non_null(v);
    const char *wrong = validate(v, schema, true);
    if (wrong)
        fail_msg("%s: '%s' does not fit the schema in %s", what, wrong, reply->body.data);
    cJSON_Delete(v);
}

/* What no test can bring about from outside: the compute device would have to fail, or another
 * server to change a session at the right moment. */
static bool is_out_of_reach(const char *path, const char *method, int status)
{
    static const char *const raced[] = {"post /v1/sessions", "post /v1/sessions/{id}/fork",
                                        "get /v1/sessions/{id}/state"};
    char what[120];
    snprintf(what, sizeof(what), "%s %s", method, path);
    for (size_t i = 0; status == 409 && i < COUNT_OF(raced); i++)
        if (!strcmp(what, raced[i]))
            return true;
    return status == 503 && !strcmp(path, "/health/live");
}

static int check_operation(const char *path, const char *method, yaml_node_t *operation)
{
    int n = 0;
    char *example = example_body(operation);
    for (EACH_PAIR(p, child(operation, "responses"))) {
        int status = atoi(scalar(at(p->key)));
        char what[120];
        snprintf(what, sizeof(what), "%s %s %d", method, path, status);
        struct reply reply;
        if (is_out_of_reach(path, method, status))
            continue;
        if (status == 411)
            provoke_411(path, &reply);
        else if (!provoke(path, method, status, example, &reply))
            fail_msg("%s is documented, but the test does not know how to provoke it", what);
        if (reply.code != status)
            fail_msg("%s: answered %d %s", what, reply.code, reply.body.data);
        check_body(what, resolve(at(p->value)), &reply);
        reply_free(&reply);
        n++;
    }
    free(example);
    return n;
}

static void test_statuses(void **state)
{
    (void)state;
    int n = 0;
    for (EACH_PAIR(p, paths()))
        for (EACH_PAIR(m, at(p->value)))
            n += check_operation(scalar(at(p->key)), scalar(at(m->key)), at(m->value));
    print_message("%d documented statuses provoked\n", n);
    assert_true(n > 50);
}

/* Replies with everything that can be asked for, by their schemas; chunks too. */
static void test_full_replies(void **state)
{
    (void)state;
    static const char *const extras[] = {
        "", ",\"stream\":true,\"stream_options\":{\"include_usage\":true}", "", ",\"stream\":true"};
    static const struct {
        const char *path, *body, *schemas[2];
    } cases[] = {
        {"/v1/completions",
         "{\"prompt\":[\"a\",\"b\"],\"n\":2,\"logprobs\":3,\"echo\":true,\"return_token_ids\":true,"
         "\"max_tokens\":5%s}",
         {"Completion", "Completion"}},
        {"/v1/chat/completions",
         "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"n\":2,\"logprobs\":true,"
         "\"top_logprobs\":2,\"return_token_ids\":true,\"max_tokens\":5%s}",
         {"ChatCompletion", "ChatChunk"}},
        {"/v1/responses",
         "{\"input\":\"x\",\"include\":[\"message.output_text.logprobs\"],\"top_logprobs\":2,"
         "\"return_token_ids\":true,\"max_output_tokens\":5%s}",
         {"Response", "ResponseEvent"}},
        {"/v1/completions",
         "{\"prompt\":\"a\",\"return_state\":true,\"max_tokens\":5%s}",
         {"Completion", "Completion"}},
        {"/v1/chat/completions",
         "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"return_state\":true,"
         "\"max_tokens\":5%s}",
         {"ChatCompletion", "ChatChunk"}},
    };
    yaml_node_t *schemas =
        member(child(yaml_document_get_root_node(&document), "components"), "schemas");
    for (size_t i = 0; i < 2 * COUNT_OF(cases); i++) {
        char body[600];
        bool streamed = i % 2;
        snprintf(body, sizeof(body), cases[i / 2].body, extras[i < 4 ? streamed : 2 + streamed]);
        struct reply reply;
        client_post(&plain, cases[i / 2].path, body, &reply);
        assert_int_equal(reply.code, 200);
        yaml_node_t *schema = child(schemas, cases[i / 2].schemas[streamed]);
        const char *text = reply.body.data;
        for (; text && *text; text = streamed ? strstr(text, "\n\n") + 2 : NULL) {
            const char *json = streamed ? strstr(text, "data: ") + 6 : text;
            cJSON *v = cJSON_ParseWithOpts(json, NULL, false);
            if (!v) /* [DONE] is an array to be, and no JSON */
                continue;
            const char *wrong = validate(v, schema, true);
            if (wrong)
                fail_msg("%s: '%s' does not fit in %s", body, wrong, text);
            cJSON_Delete(v);
        }
        reply_free(&reply);
    }
}

/* Examples in the document fit their own schemas. */
static void test_examples(void **state)
{
    (void)state;
    int n = 0;
    for (EACH_PAIR(p, paths()))
        for (EACH_PAIR(m, at(p->value))) {
            yaml_node_t *body = member(at(m->value), "requestBody");
            yaml_node_t *media = body ? member(member(body, "content"), "application/json") : NULL;
            if (!media)
                continue;
            for (EACH_PAIR(e, member(media, "examples"))) {
                cJSON *v = to_json(child(at(e->value), "value"));
                const char *wrong = validate(v, member(media, "schema"), true);
                if (wrong)
                    fail_msg("example %s: %s", scalar(at(e->key)), wrong);
                cJSON_Delete(v);
                n++;
            }
        }
    assert_true(n >= 4);
}

/* What a request may combine, as the document says it and as the server does: bodies that both
 * accept, and bodies that both refuse. %s is a session. */
static const struct {
    const char *path, *body;
    bool good;
} rules[] = {
#define TEXT "{\"prompt\":\"x\",\"max_tokens\":1,"
#define TURN "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"max_tokens\":1,"
#define SAID(role, type) "{\"input\":[{\"role\":\"" role "\",\"content\":[{\"type\":\"" type "\","
    {"/v1/completions", TEXT "\"session_id\":\"%s\",\"queue\":true}", true},
    {"/v1/completions", TEXT "\"queue\":true}", false},
    {"/v1/completions", TEXT "\"queue\":true,\"session_id\":null}", false},
    {"/v1/completions", TEXT "\"session_id\":\"%s\",\"from\":{\"preset\":\"fixed\"}}", false},
    {"/v1/completions", TEXT "\"session_id\":null,\"from\":{\"preset\":\"fixed\"}}", true},
    {"/v1/completions", TEXT "\"from\":{\"preset\":\"fixed\",\"more\":1}}", false},
    {"/v1/completions", TEXT "\"session_id\":\"%s\",\"state\":\"AA==\"}", false},
    {"/v1/completions", TEXT "\"session_id\":\"%s\",\"echo\":true}", false},
    {"/v1/completions", TEXT "\"session_id\":\"%s\",\"echo\":false,\"n\":1,\"best_of\":null}",
     true},
    {"/v1/completions", TEXT "\"session_id\":\"%s\",\"n\":2}", false},
    {"/v1/completions", TEXT "\"session_id\":\"%s\",\"best_of\":2}", false},
    {"/v1/completions", TEXT "\"return_state\":true,\"n\":2}", false},
    {"/v1/completions", TEXT "\"return_state\":true,\"echo\":true}", false},
    {"/v1/completions", "{\"prompt\":[\"x\",\"y\"],\"max_tokens\":1,\"return_state\":true}", false},
    {"/v1/completions", "{\"prompt\":[\"x\"],\"max_tokens\":1,\"return_state\":true}", true},
    {"/v1/completions", "{\"prompt\":[5,6],\"max_tokens\":1,\"return_state\":true}", true},
    {"/v1/completions", "{\"prompt\":[\"x\",[5]],\"max_tokens\":1}", true},
    {"/v1/completions", "{\"prompt\":\"\"}", false},
    {"/v1/completions", "{\"prompt\":[\"x\",\"\"]}", false},
    {"/v1/completions", TEXT "\"stream_options\":{}}", false},
    {"/v1/completions", TEXT "\"stream_options\":{},\"stream\":true}", true},
    {"/v1/completions", TEXT "\"resumable\":true,\"stream\":false}", false},
    {"/v1/completions", TEXT "\"resumable\":true,\"stream\":true}", true},
    {"/v1/completions", TEXT "\"logit_bias\":{\"5\":-100,\"0\":1.5}}", true},
    {"/v1/completions", TEXT "\"logit_bias\":{\"05\":1}}", false},
    {"/v1/completions", TEXT "\"typical_p\":0}", false},
    {"/v1/completions", TEXT "\"temperature\":2.5}", false},
    {"/v1/completions", TEXT "\"suffix\":\"\",\"use_beam_search\":false}", true},
    {"/v1/completions", TEXT "\"suffix\":\"x\"}", false},
    {"/v1/chat/completions", TURN "\"max_completion_tokens\":1}", false},
    {"/v1/chat/completions", TURN "\"max_completion_tokens\":null}", true},
    {"/v1/chat/completions", TURN "\"top_logprobs\":1}", false},
    {"/v1/chat/completions", TURN "\"top_logprobs\":1,\"logprobs\":true}", true},
    {"/v1/chat/completions", TURN "\"continue_final_message\":true}", true},
    {"/v1/chat/completions", TURN "\"continue_final_message\":true,\"add_generation_prompt\":true}",
     false},
    {"/v1/chat/completions", TURN "\"session_id\":\"%s\",\"n\":2}", false},
    {"/v1/chat/completions", TURN "\"tools\":[],\"audio\":{}}", true},
    {"/v1/chat/completions", TURN "\"tools\":[{}]}", false},
    {"/v1/responses", SAID("user", "input_text") "\"text\":\"x\"}]}],\"max_output_tokens\":1}",
     true},
    {"/v1/responses", SAID("user", "output_text") "\"text\":\"x\"}]}]}", false},
    {"/v1/responses",
     SAID("assistant", "output_text") "\"text\":\"x\"}]}],\"max_output_tokens\":1}", true},
    {"/v1/responses", SAID("assistant", "refusal") "\"refusal\":\"x\"}]}],\"max_output_tokens\":1}",
     true},
    {"/v1/responses", SAID("assistant", "input_text") "\"text\":\"x\"}]}]}", false},
    {"/v1/responses", "{\"input\":\"x\",\"stream_options\":{\"include_obfuscation\":false}}",
     false},
    {"/v1/responses", "{\"input\":\"x\",\"reasoning\":{\"effort\":\"high\"}}", false},
    {"/v1/responses",
     "{\"input\":\"x\",\"max_output_tokens\":1,\"reasoning\":{\"effort\":\"none\",\"summary\":null}"
     "}",
     true},
    {"/tokenize", "{\"prompt\":\"x\",\"content\":null}", true},
    {"/tokenize", "{\"prompt\":\"x\",\"content\":\"x\"}", false},
    {"/tokenize", "{}", false},
    {"/v1/sessions", "{\"from\":{\"session\":\"%s\",\"snapshot\":\"taken\"}}", true},
    {"/v1/sessions", "{\"from\":{\"preset\":\"fixed\",\"session\":null}}", true},
    {"/v1/sessions", "{\"from\":{\"preset\":\"fixed\",\"session\":\"%s\"}}", false},
    {"/v1/sessions", "{\"from\":{\"snapshot\":\"taken\"}}", false},
    {"/v1/sessions", "{\"idle_ttl\":1,\"more\":1}", false},
    {"/v1/sessions",
     "{\"metadata\":{\"12345678901234567890123456789012345678901234567890123456789012345\":\"x\"}}",
     false},
};

static void test_rules(void **state)
{
    (void)state;
    char id[64], body[400];
    make_session(&plain, id);
    for (size_t i = 0; i < COUNT_OF(rules); i++) {
        snprintf(body, sizeof(body), rules[i].body, id);
        cJSON *v = cJSON_Parse(body);
        assert_non_null(v);
        const char *wrong = validate(v, request_schema(rules[i].path), false);
        if (!wrong != rules[i].good)
            fail_msg("%s %s: the document says %s", rules[i].path, body, wrong ? wrong : "yes");
        cJSON_Delete(v);
        struct reply reply;
        client_post(&plain, rules[i].path, body, &reply);
        if (reply.code != (rules[i].good ? 200 : 400))
            fail_msg("%s %s: answered %d %s", rules[i].path, body, reply.code, reply.body.data);
        reply_free(&reply);
    }
}

int main(int argc, char **argv)
{
    if (argc > 1)
        cmocka_set_test_filter(argv[1]);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_document),       cmocka_unit_test(test_routes),
        cmocka_unit_test(test_request_fields), cmocka_unit_test(test_examples),
        cmocka_unit_test(test_full_replies),   cmocka_unit_test(test_statuses),
        cmocka_unit_test(test_rules),
    };
    return cmocka_run_group_tests(tests, start_all, stop_all);
}
