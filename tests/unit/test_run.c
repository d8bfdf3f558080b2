/* test_run.c - latte-run as a user runs it: what it prints and refuses, seeds, Ctrl-C, chats, and
 * its perplexity against a sum of log softmaxes in double, and against PyTorch. The program is
 * ../../latte-run of this test; the model has random weights behind the bundled model's tokenizer.
 */
#include "tests/unit/unit.h"

#include <cjson/cJSON.h>
#include <math.h>
#include <poll.h>
#include <pty.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "engine/base/bytes.h"
#include "engine/job.h"
#include "tests/unit/model_files.h"
#include "tests/unit/model_run.h"
#include "weights/tokenizer.h"

enum { MAX_ARGUMENTS = 24, MAX_OUTPUT = 65536, CHILD_SECONDS = 150, AWAIT_MS = 60000 };

static const char tokenizer_path[] = "weights/latte-12m/tokenizer.json";
static const char bundled_dir[] = "weights/latte-12m";
static char program[4096], dir[100], short_dir[100]; /* the second has a context of 32 */

struct result {
    int code; /* exit code, or -signal */
    char out[MAX_OUTPUT], err[MAX_OUTPUT];
};

static void read_back(FILE *f, char *text)
{
    rewind(f);
    text[fread(text, 1, MAX_OUTPUT - 1, f)] = 0;
    fclose(f);
}

/* In the child: become the program, which SIGALRM ends should it hang. */
static void become(char *const *argv)
{
    alarm(CHILD_SECONDS);
    execv(program, argv);
    _exit(126);
}

/* Run the program on arguments that end with NULL. With interrupt, SIGINT follows the first
 * output. */
static void run(struct result *r, const char *input, bool interrupt, const char *const *arguments)
{
    char *argv[MAX_ARGUMENTS] = {program};
    for (int i = 0; arguments[i]; i++)
        argv[i + 1] = (char *)arguments[i];
    FILE *in = tmpfile(), *err = tmpfile();
    int out[2];
    assert_true(in && err && pipe(out) == 0);
    fputs(input ? input : "", in);
    rewind(in);
    pid_t pid = fork();
    if (pid == 0) {
        dup2(fileno(in), 0);
        dup2(out[1], 1);
        dup2(fileno(err), 2);
        close(out[0]);
        close(out[1]);
        become(argv);
    }
    assert_true(pid > 0);
    close(out[1]);
    size_t n = 0;
    for (ssize_t got;
         n < MAX_OUTPUT - 1 && (got = read(out[0], r->out + n, MAX_OUTPUT - 1 - n)) > 0;) {
        n += (size_t)got;
        if (interrupt)
            kill(pid, SIGINT);
        interrupt = false;
    }
    r->out[n] = 0;
    close(out[0]);
    int status;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    r->code = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
    read_back(err, r->err);
    fclose(in);
}

/* The program at a terminal that neither echoes nor cuts long lines. */
struct terminal {
    pid_t pid;
    int fd;
    size_t n;
    char text[MAX_OUTPUT]; /* what it has written and nobody has waited for; of much, the end */
};

static void terminal_start(struct terminal *t, const char *const *arguments)
{
    char *argv[MAX_ARGUMENTS] = {program};
    struct termios raw = {0};
    for (int i = 0; arguments[i]; i++)
        argv[i + 1] = (char *)arguments[i];
    cfmakeraw(&raw);
    cfsetspeed(&raw, B38400);
    t->n = 0;
    t->pid = forkpty(&t->fd, NULL, &raw, NULL);
    if (t->pid == 0)
        become(argv);
    assert_true(t->pid > 0);
}

/* Take what comes within 10 ms; false once the program has ended. */
static bool terminal_read(struct terminal *t)
{
    enum { KEPT = 1000 };
    struct pollfd ready = {.fd = t->fd, .events = POLLIN};
    if (t->n > MAX_OUTPUT / 2) {
        memmove(t->text, t->text + t->n - KEPT, KEPT);
        t->n = KEPT;
    }
    ssize_t got = 0;
    if (poll(&ready, 1, 10) > 0 && (got = read(t->fd, t->text + t->n, MAX_OUTPUT / 2 - 1)) <= 0)
        return false;
    for (ssize_t i = 0; i < got; i++, t->n++) /* random weights draw zero bytes, too */
        t->text[t->n] = t->text[t->n] ? t->text[t->n] : '?';
    t->text[t->n] = 0;
    return true;
}

/* Wait at most this long for these words; the text with them, or NULL. */
static char *terminal_find(struct terminal *t, const char *words, int milliseconds)
{
    char *found;
    int64_t end_ns = job_clock_ns() + milliseconds * INT64_C(1000000);
    t->text[t->n] = 0;
    while (!(found = strstr(t->text, words)) && job_clock_ns() < end_ns)
        if (!terminal_read(t))
            fail_msg("it ended without \"%s\": \"%s\"", words, t->text);
    return found;
}

static void terminal_skip(struct terminal *t, const char *to)
{
    t->n -= (size_t)(to - t->text);
    memmove(t->text, to, t->n + 1);
}

/* Wait for these words, and leave what follows them. */
static void terminal_await(struct terminal *t, const char *words)
{
    char *found = terminal_find(t, words, AWAIT_MS);
    if (!found)
        fail_msg("no \"%s\" came: \"%s\"", words, t->text);
    terminal_skip(t, found + strlen(words));
}

/* The same, with Ctrl-C again and again meanwhile: each has its effect before the next. */
static void terminal_interrupt(struct terminal *t, const char *words)
{
    char *found = NULL;
    int64_t end_ns = job_clock_ns() + AWAIT_MS * INT64_C(1000000);
    while (!found && job_clock_ns() < end_ns) {
        kill(t->pid, SIGINT);
        found = terminal_find(t, words, 100);
    }
    if (!found)
        fail_msg("Ctrl-C brought no \"%s\": it ends with \"%s\"", words,
                 t->n > 500 ? t->text + t->n - 500 : t->text);
    terminal_skip(t, found + strlen(words));
}

static void terminal_type(struct terminal *t, const char *line)
{
    size_t n = strlen(line);
    for (ssize_t done; n; line += done, n -= (size_t)done)
        if ((done = write(t->fd, line, n)) < 0)
            fail_msg("it reads no more: \"%s\"", t->text);
}

/* Its exit code, or -signal, with its last words in text. */
static int terminal_end(struct terminal *t)
{
    int status;
    while (terminal_read(t))
        ;
    close(t->fd);
    assert_int_equal(waitpid(t->pid, &status, 0), t->pid);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

#define ARGS(...) ((const char *const[]){__VA_ARGS__, NULL})

static void test_refusals(void **state)
{
    (void)state;
    static const struct {
        const char *arguments[9], *words;
    } cases[] = {
        {{NULL}, "no model"},
        {{"-m", "DIR"}, "-p TEXT"},
        {{"-m", "DIR", "-p", "x", "-f", "-"}, "not several"},
        {{"-m", "DIR", "-p"}, "-p needs a value"},
        {{"-m", "DIR", "-p", "x", "--no-such"}, "--no-such is no option"},
        {{"-m", "DIR", "-p", "two", "words"}, "\"words\""},
        {{"-m", "DIR", "-p", "x", "-t", "warm"}, "--temperature: \"warm\""},
        {{"-m", "DIR", "-p", "x", "-t", "nan"}, "--temperature: \"nan\""},
        {{"-m", "DIR", "-p", "x", "-t", "-1"}, "temperature is -1"},
        {{"-m", "DIR", "-p", "x", "-n", "-1"}, "--max-tokens is -1"},
        {{"-m", "DIR", "-p", "x", "-n", "99999999999"}, "--max-tokens: \"99999999999\""},
        {{"-m", "DIR", "-p", "x", "--top-p", "0"}, "top_p is 0"},
        {{"-m", "DIR", "-p", "x", "--threads", "-2"}, "threads is -2"},
        {{"-m", "DIR", "-p", "x", "--device", "tpu"}, "\"tpu\""},
        {{"-m", "DIR", "-p", "x", "--weight-dtype", "int3"}, "\"int3\""},
        {{"-m", "DIR", "-p", "x", "--system", "y"}, "--chat"},
        {{"-m", "DIR", "-p", ""}, "no tokens"},
        {{"-m", "DIR", "-p", "a\xFF"}, "byte 1 is 0xff"},
        {{"-m", "/nowhere", "-p", "x"}, "/nowhere"},
        {{"-m", "DIR", "-f", "/nowhere"}, "/nowhere"},
        {{"-m", "DIR", "--perplexity", "/nowhere"}, "/nowhere"},
        {{"-m", "DIR", "--chat", "--perplexity", "-", "-p", "x"}, "not several"},
        {{"-m", "DIR", "-p", "x", "--json"}, "--perplexity"},
        {{"-m", "DIR", "--chat", "--explain", "x.csv"}, "--explain reads -p"},
        {{"-m", "SHORT", "-p", "x", "--explain", "x.csv"}, "no layer with latents"},
        {{"-m", "DIR", "-p", "x", "--explain", "/nowhere/x.csv"}, "/nowhere/x.csv"},
        {{"-m", "DIR", "--perplexity", "-", "--slots", "2000"}, "--slots is 2000"},
        {{"-m", "DIR", "--perplexity", "-", "--slots", "0"}, "--slots is 0"},
        {{"-m", "DIR", "--perplexity", "-", "--chat"}, "--chat is not for --perplexity"},
        {{"-m", "DIR", "--perplexity", "-", "-t", "1"}, "--temperature is not for --perplexity"},
        {{"-m", "DIR", "--chat", "--slots", "4"}, "--slots is for --perplexity"},
        {{"-m", "DIR", "--chat", "--echo"}, "--echo is not for --chat"},
        {{"-m", "DIR", "-p", "x", "--explain", "x", "--device", "cpu"},
         "--device is not for --explain"},
        {{"-m", "DIR", "-p", "x", "--explain", "x", "-n", "8"}, "--max-tokens is not for"},
        {{"-m", "DIR", "--perplexity", "-", "--lengths", "8,"}, "--lengths: \"8,\""},
        {{"-m", "DIR", "--perplexity", "-", "--lengths", "8,8"}, "--lengths: \"8,8\""},
        {{"-m", "DIR", "--perplexity", "-", "--lengths", "8"}, "no document has more"},
        {{"-m", "SHORT", "--perplexity", "-", "--lengths", "32"}, "reads 32 tokens at most"},
    };
    for (size_t c = 0; c < COUNT_OF(cases); c++) {
        const char *arguments[10] = {NULL};
        static struct result r;
        for (int i = 0; cases[c].arguments[i]; i++)
            arguments[i] = !strcmp(cases[c].arguments[i], "DIR")     ? dir
                           : !strcmp(cases[c].arguments[i], "SHORT") ? short_dir
                                                                     : cases[c].arguments[i];
        run(&r, NULL, false, arguments);
        const char *line = strstr(r.err, "latte-run: ");
        if (r.code != 1 || !line || !strstr(line, cases[c].words) || r.out[0])
            fail_msg("case %zu: code %d, \"%s\", expected \"%s\"", c, r.code, r.err,
                     cases[c].words);
        assert_ptr_equal(strchr(line, '\n'), line + strlen(line) - 1); /* one sentence */
    }
}

static void test_help_and_version(void **state)
{
    (void)state;
    static struct result r;
    run(&r, NULL, false, ARGS("--help"));
    assert_true(r.code == 0 && strstr(r.out, "--repetition-penalty") && !r.err[0]);
    run(&r, NULL, false, ARGS("--version"));
    assert_true(r.code == 0 && strncmp(r.out, "latte-run ", 10) == 0);
}

static void test_completions(void **state)
{
    (void)state;
    static struct result a, b;
    run(&a, NULL, false, ARGS("-m", dir, "-p", "Once upon", "-n", "12", "--seed", "5"));
    assert_int_equal(a.code, 0);
    assert_non_null(strstr(a.err, "loaded "));
    assert_non_null(strstr(a.err, "output 12 tokens"));
    assert_non_null(strstr(a.err, "seed 5\n"));
    assert_true(strlen(a.out) > 12 && a.out[strlen(a.out) - 1] == '\n');

    /* the same from stdin, quietly, on another number of threads, with the prompt in front */
    run(&b, "Once upon", false,
        ARGS("-m", dir, "-f", "-", "-n", "12", "-s", "5", "-q", "--echo", "--threads", "1"));
    assert_true(b.code == 0 && !b.err[0]);
    assert_memory_equal(b.out, "Once upon", 9);
    assert_string_equal(b.out + 9, a.out);

    run(&b, NULL, false, ARGS("-m", dir, "-p", "Once upon", "-n", "12", "-s", "6"));
    assert_string_not_equal(b.out, a.out);
    run(&b, NULL, false, ARGS("-m", dir, "-p", "Once upon", "-n", "0"));
    assert_true(b.code == 0 && strcmp(b.out, "\n") == 0);

    run(&a, NULL, false, ARGS("-m", dir, "-p", "Once upon", "-n", "12", "-t", "0"));
    run(&b, NULL, false, ARGS("-m", dir, "-p", "Once upon", "-n", "12", "--top-k", "1"));
    assert_string_equal(a.out, b.out);
}

/* --chat is the completion of what the template writes, up to its end of turn. */
static void test_chat(void **state)
{
    (void)state;
    static const char *const rendered =
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\n";
    static struct result a, b;
    run(&a, NULL, false,
        ARGS("-m", dir, "-c", "-p", "Hello", "--system", "Be brief.", "-n", "12", "-s", "5"));
    run(&b, NULL, false, ARGS("-m", dir, "-p", rendered, "-n", "12", "-s", "5"));
    assert_true(a.code == 0 && b.code == 0);
    assert_string_equal(a.out, b.out);
    assert_true(strlen(a.out) > 2);
    run(&a, NULL, false, ARGS("-m", short_dir, "-c", "-p", "Hello"));
    assert_true(a.code == 1 && strstr(a.err, "template"));
}

/* A greedy turn of the bundled model, whose answers are text that is tokenized as it was drawn. */
#define TALK(...)                                                                                  \
    ARGS("-m", bundled_dir, "--chat", "-t", "0", "--repetition-penalty", "1", "-n", "8",           \
         __VA_ARGS__)

/* Turns on one state are the completion of the whole conversation as the template writes it. */
static void test_chat_turns(void **state)
{
    (void)state;
    static struct result talk, whole;
    char rendered[MAX_OUTPUT + 1000], *second;
    run(&talk, "I have a dog.\nWhat do I have?\n", false, TALK("--system", "Be brief.", "-q"));
    assert_int_equal(talk.code, 0);
    second = strchr(talk.out, '\n');
    assert_non_null(second);
    *second++ = 0;
    snprintf(rendered, sizeof(rendered),
             "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nI have a dog.<|im_end|>\n"
             "<|im_start|>assistant\n%s<|im_end|>\n<|im_start|>user\nWhat do I have?<|im_end|>\n"
             "<|im_start|>assistant\n",
             talk.out);
    run(&whole, NULL, false,
        ARGS("-m", bundled_dir, "-t", "0", "--repetition-penalty", "1", "-n", "8", "-q", "-p",
             rendered));
    assert_string_equal(second, whole.out);
    assert_true(strlen(second) > 2);
}

/* The last line of a text that ends with a newline. */
static const char *last_line(char *text)
{
    text[strlen(text) - 1] = 0;
    const char *newline = strrchr(text, '\n');
    return newline ? newline + 1 : text;
}

static void test_chat_commands(void **state)
{
    (void)state;
    static struct result a, b;
    char input[400];
    /* after /reset a line is the first one */
    run(&a, "The sea is calm.\n", false, TALK("-q"));
    run(&b, "I am Tom.\n\n/reset\nThe sea is calm.\n/quit\nnever\n", false, TALK("-q"));
    assert_true(a.code == 0 && b.code == 0);
    assert_string_equal(last_line(a.out), last_line(b.out));

    /* a conversation goes on in another process as it does in its own */
    snprintf(input, sizeof(input), "I am Tom.\n/save %s/talk\nThe sea is calm.\n", dir);
    run(&a, input, false, TALK("-q"));
    snprintf(input, sizeof(input), "/load %s/talk\nThe sea is calm.\n", dir);
    run(&b, input, false, TALK("-q"));
    assert_true(a.code == 0 && b.code == 0);
    assert_string_equal(last_line(a.out), last_line(b.out));
}

/* A state that cannot be saved leaves the one that was there. */
static void test_chat_save(void **state)
{
    (void)state;
    static struct result r;
    char input[400], path[120], new_path[130];
    size_t n_first, n;
    snprintf(path, sizeof(path), "%s/kept", dir);
    snprintf(new_path, sizeof(new_path), "%s.new", path);
    snprintf(input, sizeof(input), "One.\n/save %s\n", path);
    run(&r, input, false, ARGS("-m", dir, "--chat", "-n", "1"));
    char *first = test_file_read(path, &n_first);
    assert_true(r.code == 0 && first && access(new_path, F_OK) != 0);

    assert_int_equal(mkdir(new_path, 0700), 0); /* nothing can be written there */
    snprintf(input, sizeof(input), "Two and three.\n/save %s\n", path);
    run(&r, input, false, ARGS("-m", dir, "--chat", "-n", "1"));
    assert_true(r.code == 1 && strstr(r.err, new_path));
    char *second = test_file_read(path, &n);
    assert_true(second && n == n_first && !memcmp(first, second, n));
    free(second);

    assert_int_equal(rmdir(new_path), 0);
    run(&r, input, false, ARGS("-m", dir, "--chat", "-n", "1"));
    second = test_file_read(path, &n);
    assert_true(r.code == 0 && second && memcmp(first, second, n));
    free(first);
    free(second);

    snprintf(input, sizeof(input), "One.\n/save %s\n", dir);
    run(&r, input, false, ARGS("-m", dir, "--chat", "-n", "1"));
    assert_true(r.code == 1 && strstr(r.err, "is not a regular file"));
}

static void test_chat_refusals(void **state)
{
    (void)state;
    static const struct {
        const char *input, *words;
    } cases[] = {
        {"/what now\n", "/what now: /save FILE"},    {"/save\n", "/save: /save FILE"},
        {"/save /tmp/x\n", "nothing has been said"}, {"/load /nowhere\n", "/nowhere"},
        {"/load README.md\n", "README.md"},          {"a\xFF\n", "UTF-8"},
    };
    static struct result r;
    for (size_t c = 0; c < COUNT_OF(cases); c++) {
        run(&r, cases[c].input, false, ARGS("-m", dir, "--chat"));
        const char *line = strstr(r.err, "latte-run: ");
        if (r.code != 1 || !line || !strstr(line, cases[c].words))
            fail_msg("\"%s\": code %d, \"%s\"", cases[c].input, r.code, r.err);
    }
    run(&r, "Hello\n", false, ARGS("-m", short_dir, "--chat"));
    assert_true(r.code == 1 && strstr(r.err, "template") && !r.out[0]);
}

/* Ctrl-C stops the answer; the conversation has it as far as it came, and goes on. */
static void test_chat_interrupt(void **state)
{
    (void)state;
    static struct result r;
    char input[200], name[120];
    size_t n = 0;
    snprintf(name, sizeof(name), "%s/stopped", dir);
    snprintf(input, sizeof(input), "Hello\n/save %s\n", name);
    run(&r, input, true, ARGS("-m", dir, "--chat", "-n", "2000000000", "--ignore-eos", "-v"));
    assert_int_equal(r.code, 0);
    const char *output = strstr(r.err, "output ");
    assert_true(output && strstr(output, "interrupted"));
    /* image.h: the position is 8 bytes at 32, the tail 4 at 12, pending tokens 4 at 48 */
    unsigned char *image = (unsigned char *)test_file_read(name, &n);
    assert_true(image && n > 56);
    uint64_t position;
    memcpy(&position, image + 32, sizeof(position));
    size_t n_prompt = strtoul(strstr(r.err, "prompt ") + 7, NULL, 10);
    size_t n_output = strtoul(output + 7, NULL, 10);
    assert_int_equal(position + image[48], n_prompt + n_output);
    assert_int_equal(image[12], 1); /* the answer is open */
    free(image);
}

/* A line that takes a while to read. */
static char *long_line(void)
{
    struct bytes line = {0};
    for (int i = 0; i < 40000; i++)
        bytes_format(&line, "The %d cats sat. ", i);
    bytes_text(&line, "\n");
    assert_false(line.failed);
    return line.data;
}

#define HINT "\n/quit or Ctrl-D ends the chat\n"

/* Wait for output that is not a prompt, nor the hint of a Ctrl-C that came late. */
static void terminal_await_answer(struct terminal *t)
{
    int64_t end_ns = job_clock_ns() + AWAIT_MS * INT64_C(1000000);
    do {
        if (job_clock_ns() > end_ns || !terminal_read(t))
            fail_msg("no answer came: \"%s\"", t->text);
        while (t->n >= strlen(HINT) && !strncmp(t->text, HINT, strlen(HINT)))
            terminal_skip(t, t->text + strlen(HINT));
        while (t->n >= 2 && !strncmp(t->text, "> ", 2))
            terminal_skip(t, t->text + 2);
    } while (!t->n);
}

/* Ctrl-C before there is an answer to keep, or before it is kept: the conversation is as it was,
 * and says so. */
static void test_chat_interrupt_forgets(void **state)
{
    (void)state;
    static struct terminal t;
    char *line = long_line();
    terminal_start(&t, ARGS("-m", dir, "--chat", "-n", "2000000000", "--ignore-eos"));
    terminal_await(&t, "> ");
    terminal_type(&t, line);
    terminal_interrupt(&t, "stopped before the answer began; the last line is forgotten");
    terminal_await(&t, "> ");
    terminal_type(&t, "/save /nowhere/talk\n");
    terminal_await(&t, "nothing has been said yet");

    terminal_await(&t, "> ");
    terminal_type(&t, line);
    terminal_await_answer(&t);
    terminal_interrupt(&t, "stopped before the answer was kept; the last line is forgotten");
    terminal_await(&t, "> ");
    terminal_type(&t, "/save /nowhere/talk\n");
    terminal_await(&t, "nothing has been said yet");
    terminal_type(&t, "/quit\n");
    assert_int_equal(terminal_end(&t), 0);
    free(line);
}

/* Between answers Ctrl-C says how to end; the prompt is not for --quiet. */
static void test_chat_hint(void **state)
{
    (void)state;
    static struct terminal t;
    terminal_start(&t, ARGS("-m", dir, "--chat"));
    terminal_await(&t, "> ");
    terminal_interrupt(&t, HINT "> ");
    terminal_type(&t, "/quit\n");
    assert_int_equal(terminal_end(&t), 0);

    terminal_start(&t, ARGS("-m", dir, "--chat", "-q", "-n", "0"));
    terminal_type(&t, "Hello\n");
    terminal_await(&t, "\n"); /* before there is a chat, a signal would end it */
    terminal_interrupt(&t, HINT);
    terminal_type(&t, "/quit\n");
    assert_int_equal(terminal_end(&t), 0);
    assert_null(strstr(t.text, "> "));
}

static void test_interrupt(void **state)
{
    (void)state;
    static struct result r;
    run(&r, NULL, true, ARGS("-m", dir, "-p", "a", "-n", "2000000000", "--ignore-eos"));
    assert_int_equal(r.code, 130);
    assert_non_null(strstr(r.err, "interrupted; seed "));
}

/* Sum of -log p of every token that has one before it, each from the model alone, which starts
 * anew after every `stretch` tokens. */
static double sum_nats(const char *model_dir, const struct token_list *tokens, size_t stretch)
{
    struct run model;
    run_open(&model, model_dir, &(struct run_options){"ref", 1, DTYPE_F32, 1});
    float *logits = calloc((size_t)model.vocab_size, sizeof(*logits));
    double nats = 0;
    for (size_t i = 0; i + 1 < tokens->n; i++) {
        double sum = 0;
        if (i % stretch == 0)
            model_reset(model.model, 0);
        if (i % stretch == stretch - 1)
            continue;
        run_feed(&model, 0, &tokens->ids[i], 1, LOGITS_LAST, logits);
        for (int32_t t = 0; t < model.vocab_size; t++)
            sum += exp(logits[t]);
        nats += log(sum) - logits[tokens->ids[i + 1]];
    }
    free(logits);
    run_close(&model);
    return nats;
}

static void check_perplexity(const char *model_dir, const char *text, size_t stretch)
{
    static struct result r;
    struct tokenizer *tokenizer = NULL;
    struct token_list tokens = {0};
    struct bytes unscored = {0};
    struct error err;
    if (tokenizer_open(&tokenizer, tokenizer_path, &err) ||
        tokenizer_encode(tokenizer, text, strlen(text), TOKENIZER_ADD_SPECIAL, &tokens, &err))
        fail_msg("%s", err.text);
    size_t n_scored = tokens.n;
    for (size_t i = 0; i < tokens.n; i += stretch, n_scored--)
        tokenizer_piece(tokenizer, tokens.ids[i], &unscored);
    double nats = sum_nats(model_dir, &tokens, stretch);
    double expected = exp(nats / (double)n_scored);
    double bits = nats / M_LN2 / (double)(strlen(text) - unscored.n);

    run(&r, text, false, ARGS("-m", model_dir, "--perplexity", "-", "--weight-dtype", "f32"));
    double perplexity = 0, bits_found = 0;
    size_t n = 0;
    assert_int_equal(r.code, 0);
    if (sscanf(r.out, "perplexity %lf a token, %lf bits a byte; %zu tokens", &perplexity,
               &bits_found, &n) != 3)
        fail_msg("it prints \"%s\"", r.out);
    assert_int_equal(n, tokens.n);
    if (fabs(perplexity / expected - 1) > 1e-4 || fabs(bits_found - bits) > 1e-4)
        fail_msg("perplexity %f and %f bits, expected %f and %f", perplexity, bits_found, expected,
                 bits);
    token_list_free(&tokens);
    bytes_free(&unscored);
    tokenizer_close(tokenizer);
}

static void test_perplexity(void **state)
{
    (void)state;
    static struct result r;
    char text[2000] = "";
    for (int i = 0; i < 40; i++)
        snprintf(text + strlen(text), sizeof(text) - strlen(text), "The %d cats sat. ", i * i);
    check_perplexity(dir, text, SIZE_MAX);
    check_perplexity(short_dir, text, 32);
    run(&r, "", false, ARGS("-m", dir, "--perplexity", "-"));
    assert_true(r.code == 0 && strstr(r.out, "nothing to score"));
}

static double golden_number(const cJSON *object, const char *name)
{
    const cJSON *item = cJSON_GetObjectItem(object, name);
    if (!cJSON_IsNumber(item))
        fail_msg("no number \"%s\"", name);
    return item->valuedouble;
}

static void check_near(const char *what, double found, double expected)
{
    if (fabs(found / expected - 1) > 1e-4)
        fail_msg("%s is %.8g, expected %.8g", what, found, expected);
}

/* tests/golden/models/perplexity.py says what is expected. */
static void test_perplexity_of_documents(void **state)
{
    (void)state;
    static const char file[] = "tests/golden/models/bundled/documents.txt";
    static struct result r;
    size_t n;
    char *text = test_file_read("tests/golden/models/bundled/perplexity.json", &n);
    cJSON *golden = cJSON_Parse(text);
    assert_non_null(golden);
    const char *const slots[] = {"1", "2", "16"};
    for (size_t i = 0; i < COUNT_OF(slots); i++) {
        run(&r, NULL, false,
            ARGS("-m", bundled_dir, "--perplexity", file, "--weight-dtype", "f32", "--json",
                 "--slots", slots[i]));
        cJSON *found = cJSON_Parse(r.out);
        assert_true(r.code == 0 && found);
        static const char *const names[] = {"documents", "tokens", "perplexity", "bits_per_byte"};
        for (size_t k = 0; k < COUNT_OF(names); k++)
            check_near(names[k], golden_number(found, names[k]), golden_number(golden, names[k]));
        assert_true(cJSON_IsTrue(cJSON_GetObjectItem(found, "complete")));
        cJSON_Delete(found);
    }
    run(&r, NULL, false,
        ARGS("-m", bundled_dir, "--perplexity", file, "--weight-dtype", "f32", "--json",
             "--lengths", "8,20,40"));
    cJSON *found = cJSON_Parse(r.out);
    assert_true(r.code == 0 && found);
    check_near("documents", golden_number(found, "documents"),
               golden_number(golden, "long_documents"));
    const cJSON *length;
    cJSON_ArrayForEach(length, cJSON_GetObjectItem(found, "lengths"))
    {
        char name[20];
        snprintf(name, sizeof(name), "%d", (int)golden_number(length, "tokens"));
        check_near(name, golden_number(length, "perplexity"),
                   golden_number(cJSON_GetObjectItem(golden, "first"), name));
    }
    cJSON_Delete(found);
    cJSON_Delete(golden);
    free(text);
}

/* Ctrl-C ends the scoring with a report of what there is. */
static void test_perplexity_interrupt(void **state)
{
    (void)state;
    static struct terminal t;
    static const char *const slots[] = {"1", "4"};
    struct bytes text = {0};
    char path[120];
    size_t n_tokens;
    for (int i = 0; i < 100000; i++)
        bytes_text(&text, "The cat sat.\n<|endoftext|>\n");
    snprintf(path, sizeof(path), "%s/documents", dir);
    assert_true(!text.failed && !test_file_write(dir, "documents", text.data, text.n));
    for (size_t i = 0; i < COUNT_OF(slots); i++) {
        terminal_start(&t, ARGS("-m", dir, "--perplexity", path, "--slots", slots[i]));
        terminal_await(&t, "scoring [");
        terminal_await(&t, "]   1%"); /* something is scored */
        kill(t.pid, SIGINT);
        assert_int_equal(terminal_end(&t), 130);
        const char *report = strstr(t.text, "perplexity ");
        if (!report || sscanf(report, "perplexity %*f a token; %zu tokens", &n_tokens) != 1 ||
            !strstr(report, " (interrupted)\n"))
            fail_msg("it prints \"%s\"", t.text);
    }
    bytes_free(&text);
}

/* However the separating lines are written, the documents are these two: the first form is that of
 * the golden text above, and all score alike. */
static void test_separators(void **state)
{
    (void)state;
    static const char end[] = "<|endoftext|>";
    static const char *const forms[] = {
        "A red fox.\n%s\nB\nlue sky.",         /* between documents */
        "%s\nA red fox.\n%s\nB\nlue sky.",     /* the first line */
        "A red fox.\n%s\nB\nlue sky.\n%s",     /* the last, which has no newline */
        "A red fox.\n%s\nB\nlue sky.\n%s\n",   /* the last */
        "A red fox.\n%s\n%s\n%s\nB\nlue sky.", /* one after the other */
        "%s\n%s\nA red fox.\n%s\n \n\n%s\nB\nlue sky.\n%s\n%s",
        "%s\r\nA red fox.\r\n%s\r\n%s\r\nB\nlue sky.\r\n%s\r\n", /* CR LF */
    };
    double perplexity = 0;
    for (size_t i = 0; i < COUNT_OF(forms); i++) {
        static struct result r;
        char text[200];
        snprintf(text, sizeof(text), forms[i], end, end, end, end, end, end);
        run(&r, text, false, ARGS("-m", dir, "--perplexity", "-", "--json", "--slots", "1"));
        cJSON *found = cJSON_Parse(r.out);
        if (r.code || !found || golden_number(found, "documents") != 2 ||
            golden_number(found, "bytes") != strlen("A red fox.") + strlen("B\nlue sky."))
            fail_msg("form %zu: code %d, %s", i, r.code, r.out);
        perplexity = i ? perplexity : golden_number(found, "perplexity");
        check_near("perplexity", golden_number(found, "perplexity"), perplexity);
        cJSON_Delete(found);
    }
    /* a line that has more than the separator is text */
    static struct result r;
    run(&r, "A red fox.\n<|endoftext|> \nx<|endoftext|>\nBlue.", false,
        ARGS("-m", dir, "--perplexity", "-", "--json"));
    assert_non_null(strstr(r.out, "\"documents\":1,"));
}

/* tests/golden/models/latents.py says what is expected. */
static void test_explain(void **state)
{
    (void)state;
    static struct result r;
    char csv[120];
    size_t n;
    char *text = test_file_read("tests/golden/models/bundled/latents.json", &n);
    cJSON *golden = cJSON_Parse(text);
    assert_non_null(golden);
    snprintf(csv, sizeof(csv), "%s/latents.csv", dir);
    run(&r, NULL, false,
        ARGS("-m", bundled_dir, "--explain", csv, "-p",
             cJSON_GetObjectItem(golden, "prompt")->valuestring));
    assert_true(r.code == 0 && !r.out[0]);
    char *table = test_file_read(csv, &n), *rest = table;
    assert_string_equal(strsep(&rest, "\n"), "layer,head,latent,p,head_entropy");
    int n_rows = 0;
    for (char *line; (line = strsep(&rest, "\n")) && line[0]; n_rows++) {
        int layer, head, latent;
        double p, entropy;
        assert_int_equal(sscanf(line, "%d,%d,%d,%lf,%lf", &layer, &head, &latent, &p, &entropy), 5);
        const cJSON *expected = cJSON_GetArrayItem(
            cJSON_GetArrayItem(cJSON_GetArrayItem(cJSON_GetObjectItem(golden, "p"), layer), head),
            latent);
        assert_non_null(expected);
        const cJSON *expected_entropy = cJSON_GetArrayItem(
            cJSON_GetArrayItem(cJSON_GetObjectItem(golden, "entropy"), layer), head);
        if (fabs(p - expected->valuedouble) > 1e-4 ||
            fabs(entropy - expected_entropy->valuedouble) > 1e-3)
            fail_msg("\"%s\": expected %g and %g", line, expected->valuedouble,
                     expected_entropy->valuedouble);
    }
    assert_int_equal(n_rows, 7 * 5 * 17);
    free(table);
    free(text);
    cJSON_Delete(golden);
}

/* At a terminal it shows how far it is, and takes that away again. */
static void test_explain_progress(void **state)
{
    (void)state;
    static struct terminal t;
    char csv[120];
    snprintf(csv, sizeof(csv), "%s/latents.csv", dir);
    terminal_start(&t, ARGS("-m", bundled_dir, "--explain", csv, "-p", "A red fox."));
    terminal_await(&t, "reading [");
    terminal_await(&t, "\r\033[K");
    assert_int_equal(terminal_end(&t), 0);
    terminal_start(&t, ARGS("-m", bundled_dir, "--explain", csv, "-p", "A red fox.", "-q"));
    assert_true(terminal_end(&t) == 0 && t.n == 0);
}

static void test_context_limit(void **state)
{
    (void)state;
    static struct result r;
    run(&r, NULL, false, ARGS("-m", short_dir, "-p", "a", "-n", "1000", "--ignore-eos"));
    assert_int_equal(r.code, 0);
    assert_non_null(strstr(r.err, "output 31 tokens"));
    assert_non_null(strstr(r.err, "length"));
}

static void make_dir(char path[100], const char *layers)
{
    char config[500];
    size_t n;
    char *tokenizer = test_file_read(tokenizer_path, &n);
    snprintf(config, sizeof(config),
             "{\"vocab_size\":8192,\"hidden_size\":16,\"num_hidden_layers\":2,"
             "\"intermediate_size\":24,\"num_attention_heads\":2,%s,\"norm\":\"rmsnorm\","
             "\"mlp\":\"gated\",\"tie_word_embeddings\":true}",
             layers);
    if (!tokenizer || test_dir_make(path, 100) || model_files_write(path, config, 3, NULL) ||
        test_file_write(path, "tokenizer.json", tokenizer, n))
        fail_msg("the model cannot be written");
    free(tokenizer);
}

static int make_models(void **state)
{
    (void)state;
    make_dir(dir, "\"num_latents\":8,\"layer_type\":\"macchiato\",\"latent_input\":\"rglru\","
                  "\"sliding_window\":8");
    size_t n;
    char *chat = test_file_read("weights/latte-12m/tokenizer_config.json", &n);
    assert_true(chat && !test_file_write(dir, "tokenizer_config.json", chat, n));
    free(chat);
    make_dir(short_dir, "\"layer_type\":\"full_attention\",\"max_position_embeddings\":32");
    return 0;
}

static int remove_models(void **state)
{
    (void)state;
    test_dir_remove(dir);
    test_dir_remove(short_dir);
    return 0;
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_help_and_version),
        cmocka_unit_test(test_completions),
        cmocka_unit_test(test_chat),
        cmocka_unit_test(test_interrupt),
        cmocka_unit_test(test_perplexity),
        cmocka_unit_test(test_context_limit),
        cmocka_unit_test(test_chat_turns),
        cmocka_unit_test(test_chat_commands),
        cmocka_unit_test(test_chat_refusals),
        cmocka_unit_test(test_chat_interrupt),
        cmocka_unit_test(test_perplexity_of_documents),
        cmocka_unit_test(test_separators),
        cmocka_unit_test(test_explain),
        cmocka_unit_test(test_chat_interrupt_forgets),
        cmocka_unit_test(test_chat_hint),
        cmocka_unit_test(test_chat_save),
        cmocka_unit_test(test_explain_progress),
        cmocka_unit_test(test_perplexity_interrupt),
    };
    if (argc > 1)
        cmocka_set_test_filter(argv[1]);
    const char *slash = strrchr(argv[0], '/');
    snprintf(program, sizeof(program), "%.*s/../../latte-run", slash ? (int)(slash - argv[0]) : 1,
             slash ? argv[0] : ".");
    return cmocka_run_group_tests(tests, make_models, remove_models);
}
