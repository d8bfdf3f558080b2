/* bench_sessions.c - latte-bench sessions: what a session costs, at any age: turns, forks, export
 * and import, memory, and with a store also reloads and restarts. Starts a server of its own, a
 * process on the loopback, unless --url names one.
 *
 * A session gets to a position by being fed that many tokens, up to FED_TOKENS; above, a warmed-up
 * state is exported, its position is set, and it is imported: the cost of a turn can depend on the
 * position, if it does, but not on what the tokens before were. --real-position feeds them all.
 */
#include <curl/curl.h>
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "engine/image.h"
#include "tests/bench/bench.h"
#include "tests/bench/bench_random.h"
#include "tests/bench/bench_server.h"

enum {
    MAX_POSITIONS = 16,
    MAX_SAMPLES = 100000,
    MAX_SERVER_ARGS = 32,
    MAX_LIVE = 1 << 20,
    FED_TOKENS = 10000,
    CHUNK = 50000,    /* tokens of one request that feeds */
    FRESH_TURNS = 16, /* turns of a session, before another fork of its base takes its place */
    STREAMS = 16,
    STORED = 1000, /* sessions of a restart */
    ID_BYTES = 64,
};

struct settings {
    const char *model_dir, *random, *url, *threads, *device, *host_state_mb, *only;
    const char *store, *durability;
    char **server_args; /* what follows "--": options for the server */
    int n_server_args;
    int64_t positions[MAX_POSITIONS]; /* ascending */
    int n_positions;
    int64_t real_position;
    int samples, most_live;
    double seconds; /* of a measurement of throughput */
    bool json;
};

struct id {
    char text[ID_BYTES];
};

/* A session of some age, which is only forked. */
struct base {
    struct id id;
    int64_t position;
    bool fed; /* all of it */
};

struct run {
    const struct settings *set;
    struct bench_client client;
    pid_t pid; /* of our own server, else 0 */
    char url[64];
    const char *model_dir; /* of our own server */
    struct base bases[MAX_POSITIONS + 1];
    int n_bases;
    double state_bytes;
};

/* ---- requests ---- */

static bool failed(const struct run *r, const char *what)
{
    fprintf(stderr, "latte-bench sessions: %s: status %ld: %.300s\n", what, r->client.code,
            r->client.body.n ? r->client.body.data : "no reply");
    return false;
}

static bool take_id(const struct run *r, const char *name, struct id *out)
{
    snprintf(out->text, sizeof(out->text), "%s", bench_string(&r->client, name));
    return *out->text;
}

static bool create(struct run *r, struct id *out)
{
    if (!bench_post(&r->client, "/v1/sessions", "{}") || !take_id(r, "id", out))
        return failed(r, "a new session");
    return true;
}

static const char *path_of(const struct id *id, const char *what)
{
    static _Thread_local char path[128];
    snprintf(path, sizeof(path), "/v1/sessions/%.63s%.32s", id->text, what);
    return path;
}

static bool forget(struct run *r, const struct id *id)
{
    return bench_request(&r->client, "DELETE", path_of(id, ""), NULL, 0) ||
           failed(r, "deleting a session");
}

static bool fork_one(struct run *r, const struct id *parent, struct id *out)
{
    if (!bench_post(&r->client, path_of(parent, "/fork"), "{}") || !take_id(r, "first_id", out))
        return failed(r, "a fork");
    return true;
}

/* The body of a turn of n tokens, freed by the caller. */
static char *turn_body(const struct id *id, int n, int max_tokens, int seed)
{
    struct bytes body = {0};
    bytes_format(&body,
                 "{\"session_id\":\"%s\",\"max_tokens\":%d,\"temperature\":0,\"ignore_eos\":true,"
                 "\"prompt\":[",
                 id->text, max_tokens);
    for (int i = 0; i < n; i++)
        bytes_format(&body, "%s%d", i ? "," : "", 20 + (seed * 31 + i * 37) % 200);
    bytes_text(&body, "]}");
    return body.data;
}

static bool turn(struct bench_client *c, const struct id *id, int n, int max_tokens, int seed)
{
    char *body = turn_body(id, n, max_tokens, seed);
    bool ok = body && bench_request(c, "POST", "/v1/completions", body, strlen(body));
    free(body);
    return ok;
}

static bool feed(struct run *r, const struct id *id, int64_t n)
{
    for (int seed = 0; n > 0; seed++) {
        int piece = n < CHUNK ? (int)n : CHUNK;
        if (!turn(&r->client, id, piece, 0, seed))
            return failed(r, "feeding a session");
        n -= piece;
    }
    return true;
}

/* ---- output ---- */

/* A line of a measurement: what, of which kind, and the seconds of its samples, which get sorted.
 */
static void report(const struct run *r, const char *what, const char *of, int64_t number,
                   double *seconds, int n, double ratio)
{
    const double p50 = bench_quantile(seconds, (size_t)n, 0.5) * 1e3;
    const double p99 = bench_quantile(seconds, (size_t)n, 0.99) * 1e3;
    if (r->set->json) {
        printf("{\"kind\":\"sessions\",\"what\":\"%s\",\"of\":\"%s\",\"number\":%" PRId64
               ",\"samples\":%d,\"p50_ms\":%.4f,\"p99_ms\":%.4f",
               what, of, number, n, p50, p99);
        if (ratio > 0)
            printf(",\"ratio\":%.4f", ratio);
        puts("}");
    } else {
        char text[32] = "";
        if (ratio > 0)
            snprintf(text, sizeof(text), "%.3f", ratio);
        printf("| %-20s | %-18s | %10" PRId64 " | %7d | %9.3f | %9.3f | %6s |\n", what, of, number,
               n, p50, p99, text);
    }
    fflush(stdout);
}

/* A measurement that is one number. */
static void report_value(const struct run *r, const char *what, const char *unit, double value)
{
    if (r->set->json)
        printf("{\"kind\":\"sessions\",\"what\":\"%s\",\"unit\":\"%s\",\"value\":%.6g}\n", what,
               unit, value);
    else
        printf("| %-20s | %-18s | %10.10g |\n", what, unit, value);
    fflush(stdout);
}

static void heading(const struct run *r)
{
    const struct settings *s = r->set;
    if (s->json)
        return;
    printf(
        "%s; %s; %s\n\n"
        "| what                 | of                 | number     | samples | p50 ms    | p99 ms  "
        "  | to 1st |\n"
        "|----------------------|--------------------|------------|---------|-----------|---------"
        "--|--------|\n",
        bench_machine(),
        s->model_dir ? s->model_dir
        : s->random  ? s->random
                     : s->url,

        s->store ? s->durability ? s->durability : "a store, its default durability"
                 : "no store: nothing outlives the server");
    fflush(stdout);
}

/* ---- sessions of any age ---- */

/* The exported state with another position: see engine/image.h. */
static void set_position(struct bytes *file, int64_t position)
{
    for (int i = 0; i < 8; i++)
        file->data[32 + i] = (char)((uint64_t)position >> 8 * i);
    uint64_t hash = XXH3_64bits(file->data, file->n - IMAGE_TAIL_BYTES);
    for (int i = 0; i < 8; i++)
        file->data[file->n - IMAGE_TAIL_BYTES + (size_t)i] = (char)(hash >> 8 * i);
}

static bool export_state(struct run *r, const struct id *id, struct bytes *out)
{
    if (!bench_request(&r->client, "GET", path_of(id, "/state"), NULL, 0))
        return failed(r, "an export");
    out->n = 0;
    bytes_append(out, r->client.body.data, r->client.body.n);
    return !out->failed && out->n > IMAGE_HEAD_BYTES + IMAGE_TAIL_BYTES;
}

static bool import_state(struct run *r, const struct id *id, const struct bytes *file)
{
    return bench_request(&r->client, "PUT", path_of(id, "/state"), file->data, file->n);
}

static struct base *add_base(struct run *r, int64_t position, bool fed)
{
    struct base *b = &r->bases[r->n_bases++];
    *b = (struct base){.position = position, .fed = fed};
    return b;
}

static bool make_bases(struct run *r)
{
    const struct settings *s = r->set;
    struct id fed;
    struct bytes file = {0};
    int64_t at = 0;
    bool ok = create(r, &fed);
    for (int i = 0; i < s->n_positions && ok; i++) {
        const int64_t wanted = s->positions[i], goal = wanted < FED_TOKENS ? wanted : FED_TOKENS;
        ok = feed(r, &fed, goal - at) && export_state(r, &fed, &file);
        at = goal;
        if (!ok)
            break;
        if (wanted > goal)
            set_position(&file, wanted);
        struct base *b = add_base(r, wanted, wanted == goal);
        ok = create(r, &b->id) && (import_state(r, &b->id, &file) || failed(r, "an import"));
    }
    if (ok && s->real_position > at) {
        const double started = bench_now();
        ok = feed(r, &fed, s->real_position - at);
        if (ok)
            report_value(r, "feeding", "tokens per second",
                         (double)(s->real_position - at) / (bench_now() - started));
        add_base(r, s->real_position, true)->id = fed;
    } else {
        ok = ok && forget(r, &fed);
    }
    r->state_bytes = (double)file.n;
    bytes_free(&file);
    return ok;
}

/* ---- continuing ---- */

struct samples {
    double *seconds; /* [cap] */
    int n;
};

/* One turn of a session of each age, beginning with another one each time: what else goes on on
 * the machine then hits all ages alike. */
static bool continue_all(struct run *r, struct id *ids, struct samples *out, int round, int prompt,
                         int output, bool counts)
{
    for (int k = 0; k < r->n_bases; k++) {
        int i = (k + round) % r->n_bases;
        if (!turn(&r->client, &ids[i], prompt, output, round))
            return failed(r, "a turn");
        if (counts)
            out[i].seconds[out[i].n++] = r->client.seconds;
    }
    return true;
}

/* Forks of the bases, so that an age stays what it is called; their first turn, which loads the
 * state, does not count. */
static bool renew(struct run *r, struct id *ids, struct samples *out, int round, int prompt,
                  int output)
{
    bool ok = true;
    for (int i = 0; i < r->n_bases && ok; i++)
        ok = (round == 0 || forget(r, &ids[i])) && fork_one(r, &r->bases[i].id, &ids[i]);
    return ok && continue_all(r, ids, out, round, prompt, output, false);
}

static bool measure_turns(struct run *r, int prompt, int output)
{
    struct samples out[MAX_POSITIONS + 1] = {{0}};
    struct id ids[MAX_POSITIONS + 1];
    char of[32];
    bool ok = true;
    for (int i = 0; i < r->n_bases; i++) {
        out[i].seconds = malloc((size_t)r->set->samples * sizeof(double));
        ok &= out[i].seconds != NULL;
    }
    for (int round = 0; round < r->set->samples && ok; round++) {
        if (round % FRESH_TURNS == 0)
            ok = renew(r, ids, out, round, prompt, output);
        ok = ok && continue_all(r, ids, out, round, prompt, output, true);
    }
    double first = 0;
    for (int i = 0; i < r->n_bases && ok; i++) {
        const double median = bench_quantile(out[i].seconds, (size_t)out[i].n, 0.5);
        first = i ? first : median;
        snprintf(of, sizeof(of), "%d + %d, %s", prompt, output, r->bases[i].fed ? "fed" : "set");
        report(r, "continue", of, r->bases[i].position, out[i].seconds, out[i].n, median / first);
        ok = forget(r, &ids[i]);
    }
    for (int i = 0; i < r->n_bases; i++)
        free(out[i].seconds);
    return ok;
}

static bool measure_continue(struct run *r)
{
    return measure_turns(r, 8, 1) && measure_turns(r, 16, 16);
}

/* ---- copies ---- */

/* Forget the sessions of the list that was just got. */
static bool forget_listed(struct run *r)
{
    static const char begin[] = "\"id\":\"sess_";
    struct bytes list = r->client.body;
    bool ok = true;
    r->client.body = (struct bytes){0};
    for (const char *at = list.data; ok && (at = strstr(at, begin));) {
        struct id id;
        at += strlen("\"id\":\"");
        snprintf(id.text, sizeof(id.text), "%.*s", (int)strcspn(at, "\""), at);
        ok = forget(r, &id);
    }
    bytes_free(&list);
    return ok;
}

static bool measure_fork(struct run *r)
{
    static const int children[] = {1, 8, 64};
    const int n = r->set->samples < 50 ? r->set->samples : 50;
    double seconds[50];
    bool ok = true;
    for (int k = 0; k < 3 && ok; k++) {
        for (int i = 0; i < n && ok; i++) {
            ok = bench_post(&r->client, path_of(&r->bases[0].id, "/fork"), "{\"n\":%d}",
                            children[k]) ||
                 failed(r, "a fork");
            seconds[i] = r->client.seconds;
            ok = ok && forget_listed(r);
        }
        if (ok)
            report(r, "fork", "children", children[k], seconds, n, 0);
    }
    return ok;
}

static bool measure_export(struct run *r)
{
    const int n = r->set->samples < 50 ? r->set->samples : 50;
    double out[50], in[50];
    struct bytes file = {0};
    struct id id;
    bool ok = create(r, &id);
    for (int i = 0; i < n && ok; i++) {
        ok = export_state(r, &r->bases[0].id, &file);
        out[i] = r->client.seconds;
        ok = ok && (import_state(r, &id, &file) || failed(r, "an import"));
        in[i] = r->client.seconds;
    }
    if (ok) {
        report(r, "export", "bytes", (int64_t)file.n, out, n, 0);
        report(r, "import", "bytes", (int64_t)file.n, in, n, 0);
        report_value(r, "a session", "bytes exported", r->state_bytes);
    }
    bytes_free(&file);
    return ok && forget(r, &id);
}

/* ---- how many there can be ---- */

/* Sessions with states of their own, as many as the server takes, at most `most`; or -1. */
static int fill(struct run *r, struct id *ids, int most)
{
    struct bytes file = {0};
    int n = 0;
    bool ok = export_state(r, &r->bases[0].id, &file), full = false;
    while (ok && !full && n < most) {
        ok = create(r, &ids[n]);
        if (!ok)
            break;
        full = !import_state(r, &ids[n], &file);
        if (full && r->client.code != 429)
            ok = failed(r, "an import");
        if (full)
            ok = ok && forget(r, &ids[n]);
        n += !full;
    }
    bytes_free(&file);
    return ok ? n : -1;
}

static bool measure_live(struct run *r)
{
    struct id *ids = malloc((size_t)r->set->most_live * sizeof(*ids));
    int n = ids ? fill(r, ids, r->set->most_live) : -1;
    bool ok = n >= 0;
    if (ok)
        report_value(r, "live sessions",
                     n == r->set->most_live ? "held, more fit" : "the most that fit", n);
    for (int i = 0; i < n; i++)
        ok &= forget(r, &ids[i]);
    free(ids);
    return ok;
}

/* ---- many at once ---- */

struct stream {
    pthread_t thread;
    const struct run *run;
    struct id id;
    double deadline;
    long n_turns;
    bool ok;
};

static void *run_stream(void *context)
{
    struct stream *s = context;
    struct bench_client client;
    s->ok = bench_client_open(&client, s->run->client.base);
    while (s->ok && bench_now() < s->deadline) {
        s->ok = turn(&client, &s->id, 8, 8, (int)s->n_turns);
        s->n_turns += s->ok;
    }
    bench_client_close(&client);
    return NULL;
}

static bool measure_streams(struct run *r)
{
    struct stream streams[STREAMS] = {{0}};
    int n = 0;
    bool ok = true;
    for (; n < STREAMS && ok; n++) {
        streams[n].run = r;
        ok = fork_one(r, &r->bases[0].id, &streams[n].id);
    }
    const double started = bench_now();
    int n_started = 0;
    for (int i = 0; i < n && ok; i++) {
        streams[i].deadline = started + r->set->seconds;
        ok = !pthread_create(&streams[i].thread, NULL, run_stream, &streams[i]);
        n_started += ok;
    }
    long n_turns = 0;
    for (int i = 0; i < n_started; i++) {
        pthread_join(streams[i].thread, NULL);
        n_turns += streams[i].n_turns;
        ok &= streams[i].ok;
    }
    const double took = bench_now() - started;
    if (!ok)
        return failed(r, "turns of several sessions at once");
    char what[64];
    snprintf(what, sizeof(what), "turns/s, %s",
             r->set->store ? r->set->durability ? r->set->durability : "store" : "no store");
    report_value(r, what, "16 streams, 8 + 8", (double)n_turns / took);
    for (int i = 0; i < n && ok; i++)
        ok = forget(r, &streams[i].id);
    return ok;
}

/* ---- with a store ---- */

/* More sessions than memory holds: those that were not used for longest have left it, and their
 * next turn brings them back. */
static bool measure_reload(struct run *r)
{
    enum { N = 50 };
    double seconds[N];
    const int most = r->set->most_live;
    struct id *ids = malloc((size_t)most * sizeof(*ids));
    int n = ids ? fill(r, ids, most) : -1;
    bool ok = n >= N;
    for (int i = 0; i < N && ok; i++) {
        ok = turn(&r->client, &ids[i], 8, 1, i) || failed(r, "a turn after a reload");
        seconds[i] = r->client.seconds;
    }
    if (ok)
        report(r, "continue, reloaded", "of so many", n, seconds, N, 0);
    for (int i = 0; i < n; i++)
        ok &= forget(r, &ids[i]);
    free(ids);
    return ok;
}

static bool start_own(struct run *r);

/* From the start of a server whose store has STORED sessions to the end of a turn of one. */
static bool measure_restart(struct run *r)
{
    struct id *ids = malloc(STORED * sizeof(*ids));
    bool ok = ids && r->pid > 0;
    int n = ok ? fill(r, ids, STORED) : -1;
    ok = ok && n > 0;
    if (ok) {
        bench_client_close(&r->client);
        bench_server_stop(r->pid);
        const double started = bench_now();
        ok = start_own(r) && (turn(&r->client, &ids[n / 2], 8, 1, 1) || failed(r, "a turn"));
        double seconds = bench_now() - started;
        if (ok)
            report(r, "restart, first token", "stored sessions", n, &seconds, 1, 0);
    }
    for (int i = 0; i < n && ok; i++)
        ok = forget(r, &ids[i]);
    free(ids);
    return ok;
}

/* ---- the program ---- */

static const struct step {
    const char *name;
    bool needs_store;
    bool (*measure)(struct run *r);
} steps[] = {
    {"continue", false, measure_continue}, {"fork", false, measure_fork},
    {"export", false, measure_export},     {"streams", false, measure_streams},
    {"live", false, measure_live},         {"reload", true, measure_reload},
    {"restart", true, measure_restart},
};

enum { N_STEPS = sizeof(steps) / sizeof(*steps) };

/* Whether the name is in a comma separated list; NULL has all. */
static bool is_listed(const char *list, const char *name)
{
    size_t n = strlen(name);
    for (const char *at = list; at; at = strchr(at, ',')) {
        at += *at == ',';
        if (!strncmp(at, name, n) && (!at[n] || at[n] == ','))
            return true;
    }
    return !list;
}

static bool measure(struct run *r)
{
    heading(r);
    bool ok = make_bases(r);
    for (int i = 0; i < N_STEPS && ok; i++) {
        if (steps[i].needs_store && !r->set->store)
            continue;
        if (is_listed(r->set->only, steps[i].name))
            ok = steps[i].measure(r);
    }
    return ok;
}

static bool start_own(struct run *r)
{
    const struct settings *s = r->set;
    const char *args[MAX_SERVER_ARGS + 24];
    const int port = bench_free_port();
    int n = 0;
    const char *const fixed[] = {"--model",  r->model_dir, "--threads",       s->threads,
                                 "--device", s->device,    "--host-state-mb", s->host_state_mb};
    for (size_t i = 0; i < sizeof(fixed) / sizeof(*fixed); i++)
        args[n++] = fixed[i];
    if (s->store) {
        args[n++] = "--store";
        args[n++] = s->store;
    }
    if (s->store && s->durability) {
        args[n++] = "--durability";
        args[n++] = s->durability;
    }
    for (int i = 0; i < s->n_server_args; i++)
        args[n++] = s->server_args[i];
    args[n] = NULL;
    snprintf(r->url, sizeof(r->url), "http://127.0.0.1:%d", port);
    r->pid = bench_server_start(args, port);
    if (r->pid > 0 && bench_server_await(r->url, r->pid))
        return bench_client_open(&r->client, r->url);
    fprintf(stderr, "latte-bench sessions: no server became ready at %s\n", r->url);
    return false;
}

static bool measure_own(struct run *r, const char *model_dir)
{
    r->model_dir = model_dir;
    bool ok = start_own(r) && measure(r);
    bench_client_close(&r->client);
    bench_server_stop(r->pid);
    return ok;
}

static bool measure_random(struct run *r)
{
    char dir[4000];
    if (random_model_write(r->set->random, 0, dir, sizeof(dir)))
        return false;
    const bool ok = measure_own(r, dir);
    random_model_remove(dir);
    return ok;
}

static bool measure_other(struct run *r)
{
    bool ok = bench_server_await(r->set->url, 0) && bench_client_open(&r->client, r->set->url);
    if (!ok)
        fprintf(stderr, "latte-bench sessions: no server is ready at %s\n", r->set->url);
    ok = ok && measure(r);
    bench_client_close(&r->client);
    return ok;
}

static void usage(FILE *out)
{
    fprintf(
        out,
        "usage: latte-bench sessions (-m DIR | --random SHAPE | --url URL) [options]\n"
        "                            [-- options of latte-server]\n"
        "  -m, --model DIR      start latte-server with this model on a free loopback port\n"
        "      --random SHAPE   the same with random weights: %s\n"
        "      --url URL        measure a server that runs already (http://127.0.0.1:8080)\n"
        "      --device NAME    of the server (default auto)\n"
        "      --threads N      the server's compute threads (default 0: all cores)\n"
        "      --positions LIST  ages, ascending (default 1000,10000,100000,1000000,10000000);\n"
        "                       above %d tokens the position of a state is set\n"
        "      --real-position N  feed a session so many tokens, too\n"
        "      --samples N      turns of each age (default 200)\n"
        "      --seconds X      that turns of 16 streams are counted (default 5)\n"
        "      --host-state-mb MB  memory for states, of a server of our own (default 1024)\n"
        "      --most-live N    stop counting live sessions there (default 2000)\n"
        "      --store DIR      the server's store; also measures reloads and restarts\n"
        "      --durability MODE  of the store: turn, interval or none\n"
        "      --only LIST      some of: continue,fork,export,streams,live,reload,restart\n"
        "      --json           one JSON object a line instead of a table\n",
        random_model_names(), FED_TOKENS);
}

static bool parse_number(int64_t *out, const char *text, int64_t most)
{
    char *end;
    errno = 0;
    long long n = strtoll(text, &end, 10);
    if (errno || end == text || *end || n < 1 || n > most)
        return false;
    *out = n;
    return true;
}

static bool parse_count(int *out, const char *text, int most)
{
    int64_t n;
    bool ok = parse_number(&n, text, most);
    *out = ok ? (int)n : *out;
    return ok;
}

static bool parse_positions(struct settings *s, const char *text)
{
    s->n_positions = 0;
    for (const char *p = text; *p;) {
        char *end;
        long long n = strtoll(p, &end, 10);
        int64_t before = s->n_positions ? s->positions[s->n_positions - 1] : 0;
        if (end == p || n <= before || s->n_positions == MAX_POSITIONS || (*end && *end != ','))
            return false;
        s->positions[s->n_positions++] = n;
        p = *end ? end + 1 : end;
    }
    return s->n_positions > 0;
}

static bool parse_only(struct settings *s, const char *text)
{
    s->only = text;
    for (int i = 0; i < N_STEPS; i++)
        if (is_listed(text, steps[i].name))
            return true;
    return false;
}

static bool parse_seconds(struct settings *s, const char *text)
{
    char *end;
    s->seconds = strtod(text, &end);
    return end != text && !*end && s->seconds > 0 && s->seconds <= 3600;
}

static bool parse_option(struct settings *s, int option)
{
    const char **texts[128] = {
        ['m'] = &s->model_dir, ['R'] = &s->random,    ['u'] = &s->url,
        ['d'] = &s->device,    ['t'] = &s->threads,   ['M'] = &s->host_state_mb,
        ['S'] = &s->store,     ['D'] = &s->durability};
    if (option > 0 && option < 128 && texts[option]) {
        *texts[option] = optarg;
        return true;
    }
    switch (option) {
    case 'p':
        return parse_positions(s, optarg);
    case 'r':
        return parse_number(&s->real_position, optarg, INT64_C(1) << 40);
    case 'n':
        return parse_count(&s->samples, optarg, MAX_SAMPLES);
    case 'x':
        return parse_seconds(s, optarg);
    case 'l':
        return parse_count(&s->most_live, optarg, MAX_LIVE);
    case 'o':
        return parse_only(s, optarg);
    case 'j':
        return s->json = true;
    default:
        return false;
    }
}

/* 0 to go on, else the exit code plus one. */
static int parse(struct settings *s, int argc, char **argv)
{
    static const struct option options[] = {{"model", 1, 0, 'm'},
                                            {"random", 1, 0, 'R'},
                                            {"url", 1, 0, 'u'},
                                            {"device", 1, 0, 'd'},
                                            {"threads", 1, 0, 't'},
                                            {"positions", 1, 0, 'p'},
                                            {"real-position", 1, 0, 'r'},
                                            {"samples", 1, 0, 'n'},
                                            {"seconds", 1, 0, 'x'},
                                            {"host-state-mb", 1, 0, 'M'},
                                            {"most-live", 1, 0, 'l'},
                                            {"store", 1, 0, 'S'},
                                            {"durability", 1, 0, 'D'},
                                            {"only", 1, 0, 'o'},
                                            {"json", 0, 0, 'j'},
                                            {"help", 0, 0, 'h'},
                                            {0, 0, 0, 0}};
    bool ok = true;
    for (int c; ok && (c = getopt_long(argc, argv, "m:h", options, NULL)) != -1;) {
        if (c == 'h') {
            usage(stdout);
            return 1;
        }
        ok = parse_option(s, c);
    }
    if (optind > 1 && !strcmp(argv[optind - 1], "--")) {
        s->server_args = argv + optind;
        s->n_server_args = argc - optind;
        optind = argc;
    }
    if (ok && optind == argc && s->n_server_args <= MAX_SERVER_ARGS &&
        !!s->model_dir + !!s->random + !!s->url == 1 && !(s->url && s->store))
        return 0;
    usage(stderr);
    return 3;
}

int bench_sessions(int argc, char **argv)
{
    struct settings s = {.threads = "0",
                         .device = "auto",
                         .host_state_mb = "1024",
                         .positions = {1000, 10000, 100000, 1000000, 10000000},
                         .n_positions = 5,
                         .samples = 200,
                         .most_live = 2000,
                         .seconds = 5};
    int code = parse(&s, argc, argv);
    if (code)
        return code - 1;
    struct run r = {.set = &s};
    curl_global_init(CURL_GLOBAL_DEFAULT);
    const bool ok = s.url      ? measure_other(&r)
                    : s.random ? measure_random(&r)
                               : measure_own(&r, s.model_dir);
    curl_global_cleanup();
    return ok ? 0 : 1;
}
