/* bench_traffic_prompt.c - see bench_traffic.h. */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/bench/bench_traffic.h"

enum { MAX_FILE_BYTES = 256 << 20 };

/* A linear congruential step, its bits mixed: the same requests for the same seed. */
uint64_t traffic_random(uint64_t *state)
{
    uint64_t x = *state = *state * 6364136223846793005u + 1442695040888963407u;
    x = (x ^ (x >> 33)) * 0xff51afd7ed558ccdu;
    x = (x ^ (x >> 33)) * 0xc4ceb9fe1a85ec53u;
    return x ^ (x >> 33);
}

/* In (0, 1). */
static double uniform(uint64_t *state)
{
    return ((double)(traffic_random(state) >> 11) + 0.5) * 0x1p-53;
}

static double normal(uint64_t *state)
{
    double radius = sqrt(-2 * log(uniform(state)));
    return radius * cos(2 * M_PI * uniform(state));
}

/* Gamma of scale 1, by Marsaglia and Tsang's method; a shape below 1 is raised by one and the
 * value scaled down. */
static double gamma_value(uint64_t *state, double shape)
{
    double scale = shape < 1 ? pow(uniform(state), 1 / shape) : 1;
    double d = (shape < 1 ? shape + 1 : shape) - 1.0 / 3, c = 1 / sqrt(9 * d);
    for (;;) {
        double x = normal(state), v = 1 + c * x;
        if (v <= 0)
            continue;
        v = v * v * v;
        if (log(uniform(state)) < x * x / 2 + d - d * v + d * log(v))
            return d * v * scale;
    }
}

double traffic_gap(uint64_t *state, double rate, double burstiness)
{
    if (isinf(burstiness))
        return 1 / rate;
    return gamma_value(state, burstiness) / (rate * burstiness);
}

/* Prompts. */

static bool split_lines(struct traffic_prompts *p, size_t n_bytes)
{
    size_t most = 1;
    for (size_t i = 0; i < n_bytes; i++)
        most += p->text[i] == '\n';
    p->lines = calloc(most, sizeof(*p->lines));
    if (!p->lines)
        return false;
    for (char *line = strtok(p->text, "\r\n"); line; line = strtok(NULL, "\r\n"))
        p->lines[p->n++] = line;
    return true;
}

bool traffic_prompts_open(struct traffic_prompts *p, const char *path)
{
    *p = (struct traffic_prompts){0};
    if (!path)
        return true;
    FILE *f = fopen(path, "rb");
    long n = f && !fseek(f, 0, SEEK_END) ? ftell(f) : -1;
    if (n >= 0 && n <= MAX_FILE_BYTES && !fseek(f, 0, SEEK_SET))
        p->text = calloc(1, (size_t)n + 1);
    bool ok = p->text && fread(p->text, 1, (size_t)n, f) == (size_t)n && split_lines(p, (size_t)n);
    if (!ok)
        fprintf(stderr, "latte-bench load: %s: %s\n", path,
                n > MAX_FILE_BYTES ? "over 256 MB" : strerror(errno));
    else if (!p->n)
        fprintf(stderr, "latte-bench load: %s: expected a prompt a line, found none\n", path);
    if (f)
        fclose(f);
    return ok && p->n;
}

void traffic_prompts_free(struct traffic_prompts *p)
{
    free(p->text);
    free(p->lines);
}

static int pick(uint64_t *state, struct traffic_range range)
{
    return range.low + (int)(traffic_random(state) % (uint64_t)(range.high - range.low + 1));
}

/* Short words that most tokenizers have whole. */
static void add_words(struct bytes *out, uint64_t *state, int n)
{
    static const char *const words[] = {
        "the",   "old",  "house", "stood", "by",   "a",     "river", "and",   "girl", "looked",
        "at",    "it",   "every", "day",   "when", "birds", "sang",  "under", "tree", "water",
        "light", "hand", "long",  "way",   "home", "night", "snow",  "road",  "town", "green"};
    for (int i = 0; i < n; i++) {
        bytes_text(out, i ? " " : "");
        bytes_text(out, words[traffic_random(state) % (sizeof(words) / sizeof(*words))]);
    }
}

static void add_prompt(const struct traffic_settings *s, const struct traffic_prompts *p,
                       uint64_t *state, struct bytes *out)
{
    if (p->n) {
        const char *line = p->lines[traffic_random(state) % p->n];
        bytes_json_lossy(out, line, strlen(line));
        return;
    }
    bytes_char(out, '"');
    add_words(out, state, pick(state, s->input));
    bytes_char(out, '"');
}

void traffic_body(const struct traffic_settings *s, const struct traffic_prompts *p,
                  uint64_t *state, struct bytes *out)
{
    bytes_text(out, "{\"model\":");
    bytes_json_lossy(out, s->model, strlen(s->model));
    bytes_text(out, s->chat ? ",\"messages\":[{\"role\":\"user\",\"content\":" : ",\"prompt\":");
    add_prompt(s, p, state, out);
    bytes_format(out, "%s,\"max_tokens\":%d", s->chat ? "}]" : "", pick(state, s->output));
    if (s->temperature >= 0)
        bytes_format(out, ",\"temperature\":%g", s->temperature);
    if (s->ignore_eos)
        bytes_text(out, ",\"ignore_eos\":true");
    bytes_text(out, ",\"stream\":true,\"stream_options\":{\"include_usage\":true}}");
}
