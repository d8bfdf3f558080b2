/* bench_traffic_send.c - see bench_traffic.h. One thread, one curl multi handle: events are
 * timed when their bytes are handed over by libcurl. */
#include <curl/curl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cjson/cJSON.h>

#include "tests/bench/bench.h"
#include "tests/bench/bench_traffic.h"

enum { MAX_LINE_BYTES = 16 << 20, POLL_MS = 100, NAME_TIMEOUT_S = 30 };

/* One request on its way. */
struct flight {
    CURL *curl;
    struct flight *next; /* of those open */
    struct bytes body, line;
    struct samples gaps;
    struct traffic_record record;
    bool done, is_error; /* [DONE], or an error in the stream */
    bool has_finish;
};

struct sender {
    const struct traffic_settings *settings;
    const struct traffic_prompts *prompts;
    struct traffic_run *run;
    CURLM *multi;
    struct curl_slist *headers;
    char url[600];
    struct flight *open;
    size_t n_open;
    uint64_t random;
};

/* The stream. */

static const cJSON *member(const cJSON *object, const char *name)
{
    return cJSON_GetObjectItemCaseSensitive(object, name);
}

static bool has_text(const cJSON *value)
{
    return cJSON_IsString(value) && value->valuestring[0];
}

/* Whether the model said something in this event: of a completion, or of a chat. */
static bool carries_text(const cJSON *choice)
{
    const cJSON *delta = member(choice, "delta");
    return has_text(member(choice, "text")) || has_text(member(delta, "content")) ||
           has_text(member(delta, "reasoning_content")) ||
           cJSON_IsArray(member(delta, "tool_calls"));
}

static void take_usage(struct traffic_record *r, const cJSON *usage)
{
    const cJSON *prompt = member(usage, "prompt_tokens"), *output;
    output = member(usage, "completion_tokens");
    if (!cJSON_IsNumber(prompt) || !cJSON_IsNumber(output))
        return;
    r->has_usage = true;
    r->prompt_tokens = (long)prompt->valuedouble;
    r->output_tokens = (long)output->valuedouble;
}

static void take_event(struct flight *f, const char *data)
{
    const double now = bench_now();
    struct traffic_record *r = &f->record;
    if (!strcmp(data, "[DONE]")) {
        f->done = true;
        return;
    }
    cJSON *event = cJSON_Parse(data);
    const cJSON *choice = cJSON_GetArrayItem(member(event, "choices"), 0);
    if (!event || cJSON_IsObject(member(event, "error")))
        f->is_error = true;
    take_usage(r, member(event, "usage"));
    f->has_finish |= has_text(member(choice, "finish_reason"));
    if (carries_text(choice)) {
        if (r->n_events++)
            samples_add(&f->gaps, now - r->last);
        else
            r->first = now;
        r->last = now;
    }
    cJSON_Delete(event);
}

/* A field of an event is "data:", and a blank that is not part of it. */
static void take_line(struct flight *f)
{
    struct bytes *line = &f->line;
    if (line->n && line->data[line->n - 1] == '\r')
        line->data[--line->n] = '\0';
    if (line->n >= 5 && !strncmp(line->data, "data:", 5))
        take_event(f, line->data + 5 + (line->data[5] == ' '));
    line->n = 0;
}

static size_t on_body(char *data, size_t size, size_t n, void *context)
{
    struct flight *f = context;
    const char *at = data, *end = data + size * n;
    for (const char *newline; (newline = memchr(at, '\n', (size_t)(end - at))); at = newline + 1) {
        bytes_append(&f->line, at, (size_t)(newline - at));
        take_line(f);
    }
    bytes_append(&f->line, at, (size_t)(end - at));
    return f->line.failed ? 0 : size * n;
}

/* Requests. */

static void set_common(const struct sender *s, CURL *curl, const char *url)
{
    curl_easy_setopt(curl, CURLOPT_URL, url);
    curl_easy_setopt(curl, CURLOPT_NOSIGNAL, 1L);
    curl_easy_setopt(curl, CURLOPT_HTTPHEADER, s->headers);
    curl_easy_setopt(curl, CURLOPT_HTTP_VERSION, (long)CURL_HTTP_VERSION_1_1);
    if (s->settings->cacert)
        curl_easy_setopt(curl, CURLOPT_CAINFO, s->settings->cacert);
}

static void flight_free(struct flight *f)
{
    curl_easy_cleanup(f->curl);
    bytes_free(&f->body);
    bytes_free(&f->line);
    free(f->gaps.values);
    free(f);
}

static bool begin(struct sender *s)
{
    struct flight *f = calloc(1, sizeof(*f));
    if (!f)
        return false;
    f->line.limit = MAX_LINE_BYTES;
    traffic_body(s->settings, s->prompts, &s->random, &f->body);
    f->curl = curl_easy_init();
    if (!f->curl || f->body.failed) {
        flight_free(f);
        return false;
    }
    set_common(s, f->curl, s->url);
    curl_easy_setopt(f->curl, CURLOPT_POSTFIELDS, f->body.data);
    curl_easy_setopt(f->curl, CURLOPT_POSTFIELDSIZE_LARGE, (curl_off_t)f->body.n);
    curl_easy_setopt(f->curl, CURLOPT_WRITEFUNCTION, on_body);
    curl_easy_setopt(f->curl, CURLOPT_WRITEDATA, f);
    curl_easy_setopt(f->curl, CURLOPT_PRIVATE, f);
    curl_easy_setopt(f->curl, CURLOPT_TIMEOUT_MS, (long)(s->settings->timeout_s * 1e3));
    f->record.started = bench_now();
    if (curl_multi_add_handle(s->multi, f->curl) != CURLM_OK) {
        flight_free(f);
        return false;
    }
    f->next = s->open;
    s->open = f;
    s->n_open++;
    return true;
}

static int count_reason(struct traffic_run *run, const char *text)
{
    int i = 0;
    while (i < run->n_reasons && strncmp(run->reasons[i].text, text, TRAFFIC_REASON_BYTES - 1))
        i++;
    if (i == TRAFFIC_MAX_REASONS)
        i--; /* more kinds of failure than anyone reads */
    if (i == run->n_reasons) {
        run->n_reasons++;
        snprintf(run->reasons[i].text, TRAFFIC_REASON_BYTES, "%s", text);
    }
    run->reasons[i].n++;
    return i + 1;
}

/* Why a request counts as failed, or NULL. */
static const char *reason_of(const struct flight *f, CURLcode result, char text[64])
{
    long code = 0;
    curl_easy_getinfo(f->curl, CURLINFO_RESPONSE_CODE, &code);
    if (result == CURLE_OPERATION_TIMEDOUT)
        return "timeout";
    if (result == CURLE_OK && code != 200) {
        snprintf(text, 64, "HTTP %ld", code);
        return text;
    }
    if (f->is_error)
        return "error in the stream";
    if (code == 200 && !f->done && (result != CURLE_OK || !f->has_finish))
        return "stream cut";
    if (result != CURLE_OK)
        return curl_easy_strerror(result);
    return f->record.n_events ? NULL : "no text";
}

static bool keep(struct traffic_run *run, const struct traffic_record *record)
{
    if (run->n == run->cap) {
        size_t cap = run->cap ? 2 * run->cap : 1024;
        struct traffic_record *records = realloc(run->records, cap * sizeof(*records));
        if (!records)
            return false;
        run->records = records;
        run->cap = cap;
    }
    run->records[run->n++] = *record;
    return true;
}

static bool end(struct sender *s, CURL *curl, CURLcode result)
{
    struct flight *f = NULL, **link = &s->open;
    char text[64];
    curl_easy_getinfo(curl, CURLINFO_PRIVATE, (char **)&f);
    while (*link != f)
        link = &(*link)->next;
    *link = f->next;
    s->n_open--;
    const char *reason = reason_of(f, result, text);
    if (reason)
        f->record.reason = count_reason(s->run, reason);
    else
        s->run->n_completed++;
    if (!f->record.has_usage)
        f->record.output_tokens = f->record.n_events;
    for (size_t i = 0; !reason && i < f->gaps.n; i++)
        samples_add(&s->run->gaps, f->gaps.values[i]);
    bool ok = keep(s->run, &f->record);
    curl_multi_remove_handle(s->multi, f->curl);
    flight_free(f);
    return ok;
}

/* Let the network work for at most so long; end what has ended. */
static bool turn(struct sender *s, double wait_s)
{
    int running, left;
    double wait_ms = wait_s * 1e3;
    int poll_ms = wait_ms < 0 ? 0 : wait_ms > POLL_MS ? POLL_MS : (int)ceil(wait_ms);
    if (curl_multi_perform(s->multi, &running) != CURLM_OK)
        return false;
    bool ok = true, any = false;
    for (CURLMsg *m; (m = curl_multi_info_read(s->multi, &left)); any = true)
        ok = end(s, m->easy_handle, m->data.result) && ok;
    if (ok && !any && poll_ms)
        curl_multi_poll(s->multi, NULL, 0, poll_ms, NULL);
    return ok;
}

/* The schedule. */

static bool wants_more(const struct sender *s)
{
    const struct traffic_settings *set = s->settings;
    return (!set->n_requests || s->run->n_sent < (size_t)set->n_requests) &&
           (set->duration_s <= 0 || bench_now() - s->run->began < set->duration_s);
}

/* Send what is due; *due is when the next one is, with a rate. */
static bool send_due(struct sender *s, double *due)
{
    const struct traffic_settings *set = s->settings;
    while (wants_more(s)) {
        const double now = bench_now();
        if (set->rate > 0 ? now < *due : s->n_open >= (size_t)set->concurrency)
            return true;
        if (s->n_open >= TRAFFIC_MAX_CONCURRENCY)
            return true; /* the lag tells */
        if (set->rate > 0) {
            s->run->max_lag_s = fmax(s->run->max_lag_s, now - *due);
            *due += traffic_gap(&s->random, set->rate, set->burstiness);
        }
        if (!begin(s))
            return false;
        s->run->n_sent++;
    }
    return true;
}

static bool send_all(struct sender *s)
{
    double due = s->run->began = bench_now(), shown = 0;
    bool ok = true;
    while (ok && (wants_more(s) || s->n_open)) {
        ok = send_due(s, &due);
        const double wait_s = s->settings->rate > 0 && wants_more(s) ? due - bench_now() : 1;
        ok = ok && turn(s, wait_s);
        if (bench_now() - shown > 0.1) {
            shown = bench_now();
            traffic_progress(s->settings, s->run, s->n_open, false);
        }
    }
    s->run->ended = bench_now();
    traffic_progress(s->settings, s->run, s->n_open, true);
    return ok;
}

/* Requests that are not measured, one after the other; the first that fails ends it. */
static bool warm_up(struct sender *s)
{
    struct traffic_run *measured = s->run, warm = {0};
    bool ok = true;
    s->run = &warm;
    for (int i = 0; i < s->settings->n_warmup && ok; i++) {
        ok = begin(s);
        while (ok && s->n_open)
            ok = turn(s, 1);
        if (warm.n_reasons) {
            fprintf(stderr, "latte-bench load: the first request to %s failed: %s\n", s->url,
                    warm.reasons[0].text);
            ok = false;
        }
    }
    s->run = measured;
    traffic_free(&warm);
    return ok;
}

static bool open_sender(struct sender *s)
{
    char line[600];
    s->multi = curl_multi_init();
    s->headers = curl_slist_append(NULL, "Content-Type: application/json");
    if (s->headers && s->settings->key) {
        snprintf(line, sizeof(line), "Authorization: Bearer %s", s->settings->key);
        s->headers = curl_slist_append(s->headers, line);
    }
    return s->multi && s->headers;
}

static void close_sender(struct sender *s)
{
    for (struct flight *f = s->open, *next; f; f = next) {
        next = f->next;
        curl_multi_remove_handle(s->multi, f->curl);
        flight_free(f);
    }
    curl_multi_cleanup(s->multi);
    curl_slist_free_all(s->headers);
}

bool traffic_send(const struct traffic_settings *settings, const struct traffic_prompts *prompts,
                  struct traffic_run *run)
{
    struct sender s = {
        .settings = settings, .prompts = prompts, .run = run, .random = settings->seed};
    *run = (struct traffic_run){0};
    snprintf(s.url, sizeof(s.url), "%s/v1/%s", settings->url,
             settings->chat ? "chat/completions" : "completions");
    bool ok = open_sender(&s);
    if (ok && settings->n_warmup)
        ok = warm_up(&s);
    ok = ok && send_all(&s);
    close_sender(&s);
    return ok;
}

void traffic_free(struct traffic_run *run)
{
    free(run->records);
    free(run->gaps.values);
}

static size_t collect(char *data, size_t size, size_t n, void *context)
{
    bytes_append(context, data, size * n);
    return size * n;
}

bool traffic_find_model(const struct traffic_settings *settings, char *name, size_t n)
{
    struct sender s = {.settings = settings};
    struct bytes body = {.limit = MAX_LINE_BYTES};
    CURL *curl = curl_easy_init();
    bool ok = curl && open_sender(&s);
    snprintf(s.url, sizeof(s.url), "%s/v1/models", settings->url);
    if (ok) {
        set_common(&s, curl, s.url);
        curl_easy_setopt(curl, CURLOPT_TIMEOUT, (long)NAME_TIMEOUT_S);
        curl_easy_setopt(curl, CURLOPT_WRITEFUNCTION, collect);
        curl_easy_setopt(curl, CURLOPT_WRITEDATA, &body);
        CURLcode result = curl_easy_perform(curl);
        cJSON *json = body.data ? cJSON_Parse(body.data) : NULL;
        const cJSON *id = member(cJSON_GetArrayItem(member(json, "data"), 0), "id");
        ok = has_text(id);
        if (ok)
            snprintf(name, n, "%s", id->valuestring);
        else
            fprintf(stderr, "latte-bench load: %s lists no model (%s); name it with --model\n",
                    s.url, curl_easy_strerror(result));
        cJSON_Delete(json);
    }
    bytes_free(&body);
    curl_easy_cleanup(curl);
    close_sender(&s);
    return ok;
}
