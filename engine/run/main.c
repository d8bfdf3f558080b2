/* main.c - latte-run: one prompt on the terminal, a chat, or the perplexity of a text.
 *
 * The completion goes to stdout as it comes, everything else to stderr. Exit code 0; 1 with one
 * sentence on any error; 130 after Ctrl-C, which ends the generation and still reports.
 *
 * Threads: main, the engine's, and one that acts on SIGINT and SIGTERM.
 */
#include <stdio.h>

#include "engine/build_info.h"
#include "engine/run/interrupt.h"
#include "engine/run/run.h"

static enum status act(struct run *r, struct error *err)
{
    switch (r->options.mode) {
    case RUN_PERPLEXITY:
        return perplexity(r, err);
    case RUN_EXPLAIN:
        return explain(r, err);
    case RUN_CHAT:
        return chat(r, err);
    case RUN_COMPLETE:
        break;
    }
    return complete(r, err);
}

static enum status run(struct run *r, struct error *err)
{
    enum status st = interrupt_catch(err);
    if (!st)
        st = act(r, err);
    run_close(r);
    return st;
}

int main(int argc, char **argv)
{
    struct run r = {0};
    struct error err;
    enum status st = run_options_parse(&r.options, argc, argv, &err);
    if (!st && r.options.help) {
        run_options_help();
        return 0;
    }
    if (!st && r.options.version) {
        build_info_print(stdout, "latte-run");
        return 0;
    }
    if (!st)
        st = run(&r, &err);
    if (st) {
        fprintf(stderr, "latte-run: %s\n", err.text);
        return 1;
    }
    return interrupt_happened() ? INTERRUPTED_EXIT : 0;
}
