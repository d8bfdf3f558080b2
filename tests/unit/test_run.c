/* test_run.c - latte-run as a user runs it: what it prints and refuses, seeds, Ctrl-C, and its
 * perplexity against a sum of log softmaxes in double. The program is ../../latte-run of this
 * test; the model has random weights behind the bundled model's tokenizer. */
#include "tests/unit/unit.h"

#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "engine/base/bytes.h"
#include "tests/unit/model_files.h"
#include "tests/unit/model_run.h"
#include "weights/tokenizer.h"

enum { MAX_ARGUMENTS = 24, MAX_OUTPUT = 65536 };

static const char tokenizer_path[] = "weights/latte-12m/tokenizer.json";
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
        execv(program, argv);
        _exit(126);
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

#define ARGS(...) ((const char *const[]){__VA_ARGS__, NULL})

static void test_refusals(void **state)
{
    (void)state;
    static const struct {
        const char *arguments[8], *words;
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
    };
    for (size_t c = 0; c < COUNT_OF(cases); c++) {
        const char *arguments[9] = {NULL};
        static struct result r;
        for (int i = 0; cases[c].arguments[i]; i++)
            arguments[i] = strcmp(cases[c].arguments[i], "DIR") ? cases[c].arguments[i] : dir;
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
        cmocka_unit_test(test_refusals),      cmocka_unit_test(test_help_and_version),
        cmocka_unit_test(test_completions),   cmocka_unit_test(test_chat),
        cmocka_unit_test(test_interrupt),     cmocka_unit_test(test_perplexity),
        cmocka_unit_test(test_context_limit),
    };
    (void)argc;
    const char *slash = strrchr(argv[0], '/');
    snprintf(program, sizeof(program), "%.*s/../../latte-run", slash ? (int)(slash - argv[0]) : 1,
             slash ? argv[0] : ".");
    return cmocka_run_group_tests(tests, make_models, remove_models);
}
