/* harness.c - see harness.h */
#include "tests/http/harness.h"

#include <curl/curl.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cjson/cJSON.h>

#include "tests/unit/model_files.h"

enum { START_TIMEOUT_MS = 120000, REQUEST_TIMEOUT_MS = 60000 };

extern char **environ;

void sleep_ms(int ms)
{
    nanosleep(&(struct timespec){ms / 1000, ms % 1000 * 1000000L}, NULL);
}

int64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* The tiny model: three layers that have every kind of state, with the bundled vocabulary. */

static const char tiny_config[] =
    "{\"architectures\":[\"LatteForCausalLM\"],\"model_type\":\"latte\",\"vocab_size\":8192,"
    "\"hidden_size\":32,\"num_hidden_layers\":3,\"intermediate_size\":64,"
    "\"num_attention_heads\":2,\"num_latents\":8,\"layer_type\":\"macchiato\","
    "\"latent_input\":\"rglru\",\"rglru_blocks\":2,\"sliding_window\":16,\"norm\":\"rmsnorm\","
    "\"mlp\":\"gated\",\"hidden_act\":\"silu\",\"tie_word_embeddings\":true,"
    "\"eos_token_id\":[0,2]}";

static void copy_file(const char *from, const char *dir, const char *name)
{
    size_t n = 0;
    char *text = test_file_read(from, &n);
    if (!text || test_file_write(dir, name, text, n))
        fail_msg("cannot copy %s to %s/%s", from, dir, name);
    free(text);
}

static void write_tiny_model(const char *dir)
{
    if (model_files_write(dir, tiny_config, 7, NULL))
        fail_msg("cannot write a model to %s", dir);
    copy_file("weights/latte-12m/tokenizer.json", dir, "tokenizer.json");
    copy_file("weights/latte-12m/tokenizer_config.json", dir, "tokenizer_config.json");
}

void make_tiny_model(char *dir, size_t n)
{
    if (test_dir_make(dir, n))
        fail_msg("cannot make a temporary directory");
    write_tiny_model(dir);
}

/* Starting and ending. */

/* build/<variant>/latte-server, from build/<variant>/tests/http/test_x. */
static void find_binary(char *path, size_t n)
{
    const char *given = getenv("LATTE_SERVER_BINARY");
    if (given) {
        snprintf(path, n, "%s", given);
        return;
    }
    ssize_t length = readlink("/proc/self/exe", path, n - 1);
    assert_true(length > 0);
    path[length] = '\0';
    for (int up = 0; up < 3; up++)
        *strrchr(path, '/') = '\0';
    strncat(path, "/latte-server", n - strlen(path) - 1);
}

/* The test's environment without LATTE_*, which are options of the server. */
static char **clean_environment(void)
{
    static char *kept[512];
    size_t n = 0;
    for (char **e = environ; *e && n < COUNT_OF(kept) - 1; e++) {
        if (strncmp(*e, "LATTE_", 6))
            kept[n++] = *e;
    }
    kept[n] = NULL;
    return kept;
}

static pid_t spawn(char *const *argv, int out_fd, int err_fd)
{
    pid_t parent = getpid();
    pid_t pid = fork();
    if (pid)
        return pid;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent)
        _exit(127);
    dup2(out_fd, 1);
    dup2(err_fd, 2);
    execve(argv[0], argv, clean_environment());
    _exit(127);
}

static bool has_flag(const char *const *args, const char *flag, const char **value)
{
    for (; args && *args; args++) {
        if (!strcmp(*args, flag)) {
            *value = args[1];
            return true;
        }
    }
    return false;
}

static void print_log(const struct server *s)
{
    char *text = server_log(s);
    size_t n = strlen(text);
    print_error("--- log of the server (its end):\n%s\n---\n", text + (n > 6000 ? n - 6000 : 0));
    free(text);
}

/* The first line on stdout ends with the URL. */
static void read_url(struct server *s)
{
    char line[256];
    size_t n = 0;
    int64_t end = now_ms() + START_TIMEOUT_MS;
    while (n < sizeof(line) - 1 && now_ms() < end) {
        struct pollfd p = {s->stdout_fd, POLLIN, 0};
        if (poll(&p, 1, 100) <= 0)
            continue;
        if (read(s->stdout_fd, line + n, 1) != 1 || line[n] == '\n')
            break;
        n++;
    }
    line[n] = '\0';
    const char *url = strstr(line, "http");
    if (!url && !s->socket[0]) {
        print_log(s);
        fail_msg("the server printed '%s' where its URL was expected", line);
    }
    if (s->socket[0])
        snprintf(s->url, sizeof(s->url), "http://localhost");
    else
        snprintf(s->url, sizeof(s->url), "%s", url);
    if (!s->socket[0])
        s->port = atoi(strrchr(s->url, ':') + 1);
}

void server_launch(struct server *s, const char *const *args)
{
    *s = (struct server){.stdout_fd = -1};
    signal(SIGPIPE, SIG_IGN);
    if (test_dir_make(s->dir, sizeof(s->dir)))
        fail_msg("cannot make a temporary directory");

    char binary[512];
    find_binary(binary, sizeof(binary));
    const char *argv[80] = {binary, "--port", "0"};
    size_t n = 3;
    const char *value = NULL;
    if (!has_flag(args, "--model", &value)) {
        write_tiny_model(s->dir);
        snprintf(s->model, sizeof(s->model), "%s", s->dir);
        argv[n++] = "--model";
        argv[n++] = s->model;
    }
    if (has_flag(args, "--unix-socket", &value))
        snprintf(s->socket, sizeof(s->socket), "%s", value);
    if (has_flag(args, "--tls-cert", &value))
        snprintf(s->trusted, sizeof(s->trusted), "%s", value);
    for (; args && *args && n < COUNT_OF(argv) - 1; args++)
        argv[n++] = *args;

    char path[192];
    snprintf(path, sizeof(path), "%s/log", s->dir);
    int log_fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    int out[2];
    assert_true(log_fd >= 0 && !pipe2(out, O_CLOEXEC));
    s->pid = spawn((char *const *)argv, out[1], log_fd);
    close(out[1]);
    close(log_fd);
    s->stdout_fd = out[0];
    read_url(s);
}

void server_wait_ready(const struct server *s)
{
    int64_t end = now_ms() + START_TIMEOUT_MS;
    for (int code = 0; code != 200; sleep_ms(20)) {
        struct reply reply;
        client_get(s, "/health/ready", &reply);
        code = reply.code;
        reply_free(&reply);
        if (code == 200)
            return;
        if (now_ms() > end || waitpid(s->pid, NULL, WNOHANG)) {
            print_log(s);
            fail_msg("the server did not become ready: /health/ready answered %d", code);
        }
    }
}

void server_start(struct server *s, const char *const *args)
{
    server_launch(s, args);
    server_wait_ready(s);
}

int server_run(const char *const *args, struct bytes *output)
{
    char binary[512];
    find_binary(binary, sizeof(binary));
    const char *argv[80] = {binary};
    for (size_t n = 1; *args && n < COUNT_OF(argv) - 1; args++)
        argv[n++] = *args;
    int out[2];
    assert_false(pipe2(out, O_CLOEXEC));
    struct server s = {.pid = spawn((char *const *)argv, out[1], out[1])};
    close(out[1]);
    *output = (struct bytes){0};
    char piece[4096];
    for (ssize_t n; (n = read(out[0], piece, sizeof(piece))) > 0;)
        bytes_append(output, piece, (size_t)n);
    close(out[0]);
    return server_wait_exit(&s, START_TIMEOUT_MS);
}

void server_signal(const struct server *s, int signal_number)
{
    assert_true(s->pid > 0);
    kill(s->pid, signal_number);
}

int server_wait_exit(struct server *s, int timeout_ms)
{
    int64_t end = now_ms() + timeout_ms;
    int how = 0;
    while (!waitpid(s->pid, &how, WNOHANG)) {
        if (now_ms() > end) {
            kill(s->pid, SIGKILL);
            waitpid(s->pid, &how, 0);
            if (s->dir[0])
                print_log(s);
            fail_msg("the server did not end within %d ms", timeout_ms);
        }
        sleep_ms(5);
    }
    s->pid = 0;
    return WIFSIGNALED(how) ? 128 + WTERMSIG(how) : WEXITSTATUS(how);
}

void server_stop(struct server *s)
{
    int code = 0;
    if (s->pid > 0) {
        kill(s->pid, SIGTERM);
        code = server_wait_exit(s, START_TIMEOUT_MS);
    }
    if (code)
        print_log(s);
    close(s->stdout_fd);
    test_dir_remove(s->dir);
    if (code)
        fail_msg("the server ended with exit code %d", code);
}

/* Looking at it. */

char *server_log(const struct server *s)
{
    char path[192];
    snprintf(path, sizeof(path), "%s/log", s->dir);
    size_t n = 0;
    char *text = test_file_read(path, &n);
    return text ? text : strdup("");
}

double server_metric(const struct server *s, const char *sample)
{
    struct reply reply;
    client_get(s, "/metrics", &reply);
    double value = -1;
    size_t n = strlen(sample);
    for (const char *line = reply.body.data; line && *line;) {
        if (!strncmp(line, sample, n) && line[n] == ' ')
            value = strtod(line + n, NULL);
        line = strchr(line, '\n');
        line = line ? line + 1 : NULL;
    }
    reply_free(&reply);
    return value;
}

bool server_await_metric(const struct server *s, const char *sample, double value, int timeout_ms)
{
    int64_t end = now_ms() + timeout_ms;
    do {
        if (server_metric(s, sample) == value)
            return true;
        sleep_ms(5);
    } while (now_ms() < end);
    return false;
}

/* Requests through libcurl. */

struct transfer {
    const struct client_request *request;
    struct reply *reply;
    size_t sent, n_body;
};

static size_t take_body(char *data, size_t size, size_t n, void *context)
{
    struct transfer *t = context;
    bytes_append(&t->reply->body, data, size * n);
    if (t->request->on_data && !t->request->on_data(t->request->context, data, size * n))
        return 0;
    return size * n;
}

static size_t take_header(char *data, size_t size, size_t n, void *context)
{
    struct transfer *t = context;
    bytes_append(&t->reply->headers, data, size * n);
    return size * n;
}

static size_t give_body(char *out, size_t size, size_t n, void *context)
{
    struct transfer *t = context;
    size_t left = t->n_body - t->sent;
    size_t now = left < size * n ? left : size * n;
    memcpy(out, t->request->body + t->sent, now);
    t->sent += now;
    return now;
}

static struct curl_slist *request_headers(const struct client_request *request)
{
    struct curl_slist *list = NULL;
    bool has_type = false;
    for (const char *const *h = request->headers; h && *h; h++) {
        has_type |= !strncasecmp(*h, "Content-Type", 12);
        list = curl_slist_append(list, *h);
    }
    if (request->body && !has_type)
        list = curl_slist_append(list, "Content-Type: application/json");
    if (request->chunked)
        list = curl_slist_append(list, "Transfer-Encoding: chunked");
    return curl_slist_append(list, "Expect:");
}

static void set_body(CURL *curl, struct transfer *t)
{
    const struct client_request *request = t->request;
    if (!request->body)
        return;
    t->n_body = request->n_body ? request->n_body : strlen(request->body);
    curl_easy_setopt(curl, CURLOPT_POST, 1L);
    if (request->chunked) {
        curl_easy_setopt(curl, CURLOPT_READFUNCTION, give_body);
        curl_easy_setopt(curl, CURLOPT_READDATA, t);
    } else {
        curl_easy_setopt(curl, CURLOPT_POSTFIELDSIZE_LARGE, (curl_off_t)t->n_body);
        curl_easy_setopt(curl, CURLOPT_POSTFIELDS, request->body);
    }
}

void client_send(const struct server *s, const struct client_request *request, struct reply *reply)
{
    *reply = (struct reply){0};
    struct transfer t = {.request = request, .reply = reply};
    CURL *curl = curl_easy_init();
    assert_non_null(curl);
    char url[4096];
    snprintf(url, sizeof(url), "%s%s", s->url, request->path);
    struct curl_slist *headers = request_headers(request);
    curl_easy_setopt(curl, CURLOPT_URL, url);
    curl_easy_setopt(curl, CURLOPT_NOSIGNAL, 1L);
    curl_easy_setopt(curl, CURLOPT_PATH_AS_IS, 1L);
    curl_easy_setopt(curl, CURLOPT_NOPROXY, "*");
    curl_easy_setopt(curl, CURLOPT_HTTPHEADER, headers);
    curl_easy_setopt(curl, CURLOPT_WRITEFUNCTION, take_body);
    curl_easy_setopt(curl, CURLOPT_WRITEDATA, &t);
    curl_easy_setopt(curl, CURLOPT_HEADERFUNCTION, take_header);
    curl_easy_setopt(curl, CURLOPT_HEADERDATA, &t);
    curl_easy_setopt(curl, CURLOPT_TIMEOUT_MS,
                     request->timeout_ms ? (long)request->timeout_ms : (long)REQUEST_TIMEOUT_MS);
    if (s->socket[0])
        curl_easy_setopt(curl, CURLOPT_UNIX_SOCKET_PATH, s->socket);
    if (s->trusted[0])
        curl_easy_setopt(curl, CURLOPT_CAINFO, s->trusted);
    set_body(curl, &t);
    if (request->method)
        curl_easy_setopt(curl, CURLOPT_CUSTOMREQUEST, request->method);
    if (request->method && !strcmp(request->method, "HEAD"))
        curl_easy_setopt(curl, CURLOPT_NOBODY, 1L);

    reply->curl_error = (int)curl_easy_perform(curl);
    long code = 0;
    curl_easy_getinfo(curl, CURLINFO_RESPONSE_CODE, &code);
    reply->code = (int)code;
    curl_slist_free_all(headers);
    curl_easy_cleanup(curl);
}

void client_get(const struct server *s, const char *path, struct reply *reply)
{
    client_send(s, &(struct client_request){.path = path}, reply);
}

void client_post(const struct server *s, const char *path, const char *json, struct reply *reply)
{
    client_send(s, &(struct client_request){.path = path, .body = json}, reply);
}

bool reply_header(const struct reply *reply, const char *name, char *value, size_t n)
{
    size_t length = strlen(name);
    for (const char *line = reply->headers.data; line && *line;) {
        const char *end = strstr(line, "\r\n");
        if (!end)
            return false;
        if (!strncasecmp(line, name, length) && line[length] == ':') {
            const char *start = line + length + 1;
            start += strspn(start, " ");
            snprintf(value, n, "%.*s", (int)(end - start), start);
            return true;
        }
        line = end + 2;
    }
    return false;
}

void reply_free(struct reply *reply)
{
    bytes_free(&reply->headers);
    bytes_free(&reply->body);
}

/* The string of a member, "" when it is null; fails the test when it is neither. */
static const char *error_member(const cJSON *error, const char *name, const struct reply *reply)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(error, name);
    if (!cJSON_IsString(item) && !cJSON_IsNull(item))
        fail_msg("error.%s is neither string nor null: %s", name, reply->body.data);
    return cJSON_IsString(item) ? item->valuestring : "";
}

void assert_error_object(const struct reply *reply, int http_code, const char *type,
                         const char *code)
{
    const char *body = reply->body.data ? reply->body.data : "";
    if (reply->code != http_code)
        fail_msg("expected %d, found %d (curl %d): %s", http_code, reply->code, reply->curl_error,
                 body);
    char content_type[128] = "";
    reply_header(reply, "Content-Type", content_type, sizeof(content_type));
    assert_string_equal(content_type, "application/json");
    cJSON *root = cJSON_Parse(body);
    const cJSON *error = cJSON_GetObjectItemCaseSensitive(root, "error");
    if (!cJSON_IsObject(error))
        fail_msg("no error object in: %s", body);
    assert_string_not_equal(error_member(error, "message", reply), "");
    assert_string_equal(error_member(error, "type", reply), type);
    error_member(error, "param", reply);
    const char *found = error_member(error, "code", reply);
    if (code)
        assert_string_equal(found, code);
    cJSON_Delete(root);
}

/* Raw sockets. */

int raw_connect(const struct server *s)
{
    int fd;
    if (s->socket[0]) {
        struct sockaddr_un at = {.sun_family = AF_UNIX};
        snprintf(at.sun_path, sizeof(at.sun_path), "%s", s->socket);
        fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        assert_false(connect(fd, (struct sockaddr *)&at, sizeof(at)));
        return fd;
    }
    struct sockaddr_in at = {.sin_family = AF_INET,
                             .sin_port = htons((uint16_t)s->port),
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_false(connect(fd, (struct sockaddr *)&at, sizeof(at)));
    return fd;
}

void raw_write(int fd, const char *data, size_t n)
{
    while (n) {
        ssize_t sent = send(fd, data, n, MSG_NOSIGNAL);
        if (sent < 0)
            return; /* the server may have closed already; what it answered decides */
        data += sent;
        n -= (size_t)sent;
    }
}

void raw_text(int fd, const char *text)
{
    raw_write(fd, text, strlen(text));
}

/* One piece: 1 for data, 0 for closed, -1 for silence. */
static int read_piece(int fd, struct bytes *out, int timeout_ms)
{
    struct pollfd p = {fd, POLLIN, 0};
    if (poll(&p, 1, timeout_ms) <= 0)
        return -1;
    char piece[65536];
    ssize_t n = recv(fd, piece, sizeof(piece), 0);
    if (n <= 0)
        return 0;
    bytes_append(out, piece, (size_t)n);
    return 1;
}

bool raw_read(int fd, struct bytes *out, int timeout_ms)
{
    int got;
    while ((got = read_piece(fd, out, timeout_ms)) > 0)
        continue;
    return got == 0;
}

bool raw_await(int fd, struct bytes *out, const char *text, int timeout_ms)
{
    int64_t end = now_ms() + timeout_ms;
    while (!out->data || !strstr(out->data, text)) {
        int64_t left = end - now_ms();
        if (left <= 0 || read_piece(fd, out, (int)left) <= 0)
            return false;
    }
    return true;
}

void raw_exchange(const struct server *s, const char *data, size_t n, struct bytes *out)
{
    *out = (struct bytes){0};
    int fd = raw_connect(s);
    raw_write(fd, data, n);
    if (!raw_read(fd, out, 10000))
        print_message("note: the server left the connection open\n");
    close(fd);
}
