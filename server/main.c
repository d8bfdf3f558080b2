/* main.c - latte-server: start order, signals, stop order.
 *
 * HTTP is up at once, so that /health/live answers while the model loads in a thread of its
 * own; main itself only waits: for that thread and for signals, through an eventfd. Stop: refuse
 * new work, let running requests finish within --drain-timeout (a second signal ends the wait),
 * stop HTTP, then the engine, then the workers; the HTTP object goes last, because the other
 * threads may notify it to their end.
 */
#include <errno.h>
#include <inttypes.h>
#include <libgen.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "engine/base/thread.h"
#include "engine/build_info.h"
#include "engine/engine.h"
#include "server/http.h"
#include "server/log.h"
#include "server/options.h"
#include "server/routes.h"
#include "weights/chat_template.h"
#include "weights/checkpoint.h"
#include "weights/tokenizer.h"

enum { EXIT_USAGE = 2, DRAIN_POLL_MS = 20, SPARE_FILES = 128 };

struct program {
    struct options options;
    struct routes *routes;
    struct http_server *http;
    struct served_model model;
    struct engine *engine;
    struct tokenizer *tokenizer;
    struct chat_template *chat_template;
    char name[NAME_MAX + 1];
    enum status load_status;
    struct error load_error; /* filled when load_status is not OK */
    bool is_terminal;
    int last_percent;
    int64_t load_start_ms;
    pthread_t loader;
};

/* Shared with the signal handler and the loading thread. */
static int event_fd = -1; /* written when one of those below has changed */
static atomic_int n_signals;
static atomic_bool is_hung_up; /* SIGHUP */
static atomic_bool is_loaded;  /* or failed to load */

static int64_t monotonic_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static void send_event(void)
{
    const uint64_t one = 1;
    if (write(event_fd, &one, sizeof(one)) < 0)
        return; /* only when the counter is full, and then main is awake */
}

static void await_event(int timeout_ms)
{
    struct pollfd p = {event_fd, POLLIN, 0};
    uint64_t count;
    if (poll(&p, 1, timeout_ms) > 0 && read(event_fd, &count, sizeof(count)) < 0)
        return;
}

/* Loading. */

static void show_progress(void *context, uint64_t done, uint64_t total)
{
    struct program *p = context;
    int percent = total ? (int)(100.0 * (double)done / (double)total) : 100;
    if (!p->is_terminal || percent == p->last_percent)
        return;
    p->last_percent = percent;
    static const char bar[] = "########################################";
    fprintf(stderr, "\rloading %s [%-40.*s] %3d%%", p->name, percent * 40 / 100, bar, percent);
    if (percent == 100)
        fputc('\n', stderr);
}

static void wake_http(void *http)
{
    http_notify(http);
}

static enum status open_engine(struct program *p, struct error *err)
{
    const struct options *o = &p->options;
    struct engine_options e;
    engine_options_init(&e);
    e.model_dir = o->model;
    e.device = o->device;
    e.weight_dtype = o->weight_dtype;
    e.window_dtype = o->window_dtype;
    e.deterministic = o->deterministic;
    e.n_threads = (int)o->threads;
    e.n_slots = (int)o->max_slots;
    e.device_memory_share = o->device_memory_share;
    e.max_batch = (int)o->max_batch;
    e.max_queue = (int)o->max_queue;
    e.step_tokens = (int)o->step_tokens;
    e.chunk_tokens = (int)o->chunk_tokens;
    e.warm_up = !o->no_warmup;
    e.max_prompt_tokens = (size_t)o->max_prompt_tokens;
    e.progress = show_progress;
    e.progress_context = p;
    e.wake = wake_http;
    e.wake_context = p->http;
    return engine_open(&p->engine, &e, err);
}

/* The model's date is that of its files, so that it stays the same over restarts. */
static int64_t model_time(const char *dir)
{
    char path[PATH_MAX];
    struct stat info;
    snprintf(path, sizeof(path), "%s/config.json", dir);
    return stat(path, &info) ? (int64_t)time(NULL) : (int64_t)info.st_mtime;
}

static enum status load(struct program *p, struct error *err)
{
    char path[PATH_MAX];
    snprintf(path, sizeof(path), "%s/tokenizer.json", p->options.model);
    enum status st = tokenizer_open(&p->tokenizer, path, err);
    if (!st)
        st = chat_template_open(&p->chat_template, p->options.model, err);
    if (!st)
        st = open_engine(p, err);
    if (st)
        return st;
    struct engine_info info;
    engine_info(p->engine, &info);
    if (tokenizer_size(p->tokenizer) > info.config->vocab_size)
        return fail(err, STATUS_INVALID,
                    "%s: expected a tokenizer of at most %d ids (vocab_size), found %d",
                    p->options.model, info.config->vocab_size, tokenizer_size(p->tokenizer));
    p->model = (struct served_model){.name = p->name,
                                     .created = model_time(p->options.model),
                                     .engine = p->engine,
                                     .tokenizer = p->tokenizer,
                                     .chat_template = p->chat_template};
    return STATUS_OK;
}

static void *run_loader(void *context)
{
    struct program *p = context;
    p->load_status = load(p, &p->load_error);
    atomic_store(&is_loaded, true);
    send_event();
    return NULL;
}

/* A table, a line for each device. */
static void log_memory(const struct engine *engine, int n_devices)
{
    char text[256];
    engine_device_head(text, sizeof(text));
    log_event(LOG_INFO, "memory", "%s", text);
    for (int i = 0; i < n_devices; i++) {
        struct engine_device device;
        engine_device(engine, i, &device);
        engine_device_row(&device, text, sizeof(text));
        log_event(LOG_INFO, "memory", "%s", text);
        if (*device.layers)
            log_event(LOG_INFO, "kernels", "%s decodes by %s", device.name, device.layers);
    }
}

static void log_listening(const struct program *p)
{
    struct engine_info info;
    engine_info(p->engine, &info);
    log_memory(p->engine, info.n_devices);
    log_event(LOG_INFO, "listening",
              "%s serves %s: %.1fM parameters, weights %s, windows %s, %s backend, %d threads, "
              "%d slots, chat template %s, loaded in %.1f s",
              http_url(p->http), p->name, (double)info.n_parameters * 1e-6, info.weight_dtype,
              info.window_dtype, info.backend, info.n_threads, info.n_slots,
              chat_template_name(p->chat_template),
              (double)(monotonic_ms() - p->load_start_ms) * 1e-3);
}

/* Starting. */

static void choose_name(struct program *p)
{
    char path[PATH_MAX];
    if (p->options.served_model_name) {
        snprintf(p->name, sizeof(p->name), "%s", p->options.served_model_name);
        return;
    }
    if (!realpath(p->options.model, path))
        snprintf(path, sizeof(path), "%s", p->options.model);
    snprintf(p->name, sizeof(p->name), "%s", basename(path));
}

/* Each connection is a descriptor, with TLS it is three, and the soft limit is often 1024. */
static void raise_file_limit(const struct options *o)
{
    struct rlimit files;
    rlim_t each = o->tls_cert ? 3 : 1;
    rlim_t wanted = (rlim_t)o->max_connections * each + SPARE_FILES;
    if (getrlimit(RLIMIT_NOFILE, &files) || files.rlim_cur >= wanted)
        return;
    files.rlim_cur = wanted < files.rlim_max ? wanted : files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    if (files.rlim_cur < wanted)
        log_event(LOG_WARN, "start",
                  "--max-connections %" PRId64 " needs %llu file descriptors, the limit is %llu",
                  o->max_connections, (unsigned long long)wanted,
                  (unsigned long long)files.rlim_cur);
}

static void choose_log_level(const char *name)
{
    static const char *const names[] = {"debug", "info", "warn", "error"};
    for (int i = 0; i < 4; i++) {
        if (!strcmp(name, names[i]))
            log_set_level(i);
    }
}

static void on_signal(int signal_number)
{
    int saved = errno;
    if (signal_number == SIGHUP)
        is_hung_up = true;
    else
        n_signals++;
    send_event();
    errno = saved;
}

/* A handler, not sigwait: libraries start threads before main, which block nothing, and a
 * signal that such a thread gets would end the process. */
static enum status catch_signals(struct error *err)
{
    event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    if (event_fd < 0 || sigaction(SIGTERM, &action, NULL) || sigaction(SIGINT, &action, NULL) ||
        sigaction(SIGHUP, &action, NULL))
        return fail(err, STATUS_IO, "signals cannot be caught: %s", strerror(errno));
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN); /* a file that may not grow is an error like a full disk */
    return STATUS_OK;
}

/* Wait for something to happen; SIGHUP is dealt with here. A lost terminal sends it too, which
 * cuts off no request. */
static void await_change(struct program *p)
{
    struct error err;
    await_event(-1);
    if (!atomic_exchange(&is_hung_up, false) || !p->options.tls_cert)
        return;
    if (http_reload(p->http, &err))
        log_event(LOG_ERROR, "reload", "the certificate in use stays: %s", err.text);
    else
        log_event(LOG_INFO, "reload", "new connections get the certificate in %s",
                  p->options.tls_cert);
}

static enum status start_http(struct program *p, struct error *err)
{
    struct http_config config = {
        .options = &p->options, .on_notify = routes_on_notify, .on_tick = routes_on_tick};
    enum status st = routes_open(&p->routes, &p->options, err);
    if (st)
        return st;
    config.context = p->routes;
    config.routes = routes_table(&config.n_routes);
    st = http_open(&p->http, &config, err);
    if (st)
        return st;
    routes_set_server(p->routes, p->http);
    return http_start(p->http, err);
}

static enum status start(struct program *p, struct error *err)
{
    choose_log_level(p->options.log_level);
    raise_file_limit(&p->options);
    choose_name(p);
    p->is_terminal = isatty(STDERR_FILENO);
    p->last_percent = -1;
    p->load_start_ms = monotonic_ms();
    enum status st = catch_signals(err);
    if (!st)
        st = start_http(p, err);
    if (st)
        return st;
    printf("latte-server %s listening on %s\n", latte_version, http_url(p->http));
    fflush(stdout);
    if (!p->is_terminal)
        log_event(LOG_INFO, "loading", "%s from %s", p->name, p->options.model);
    if (thread_start(&p->loader, "latte-load", run_loader, p))
        return fail(err, STATUS_NOMEM, "the loading thread did not start");
    return STATUS_OK;
}

/* The exit code. */
static int check_health(const struct options *o)
{
    struct error err;
    if (http_healthcheck(o, &err)) {
        fprintf(stderr, "latte-server: %s\n", err.text);
        return 1;
    }
    puts("ready");
    return 0;
}

/* Stopping. */

/* True when every request could finish. */
static bool drain(struct program *p)
{
    log_event(LOG_INFO, "draining", "%d requests have %" PRId64 " s to finish",
              http_n_active(p->http), p->options.drain_timeout);
    routes_drain(p->routes);
    http_drain(p->http);
    int64_t end_ms = monotonic_ms() + p->options.drain_timeout * 1000;
    while (http_n_active(p->http) || routes_n_detached(p->routes)) {
        await_event(DRAIN_POLL_MS);
        bool again = n_signals > 1;
        if (again || monotonic_ms() > end_ms) {
            log_event(LOG_WARN, "stopping", "%s: %d requests and %d detached streams are cut off",
                      again ? "second signal" : "drain timeout", http_n_active(p->http),
                      routes_n_detached(p->routes));
            return false;
        }
    }
    return true;
}

static void stop(struct program *p)
{
    if (p->http)
        http_stop(p->http);
    routes_stop(p->routes);
    engine_close(p->engine);
    routes_close(p->routes);
    http_close(p->http);
    tokenizer_close(p->tokenizer);
    chat_template_close(p->chat_template);
}

/* From loading to the end; the exit code. */
static int serve(struct program *p)
{
    while (!atomic_load(&is_loaded) && !n_signals)
        await_change(p);
    if (!atomic_load(&is_loaded)) { /* nothing is served yet, and loading cannot be cut short */
        http_stop(p->http);
        log_event(LOG_INFO, "stopped", "by a signal while loading");
        _exit(0);
    }
    pthread_join(p->loader, NULL);
    if (p->load_status) {
        fprintf(stderr, "latte-server: %s\n", p->load_error.text);
        return 1;
    }
    struct error err;
    if (routes_publish(p->routes, &p->model, &err)) {
        fprintf(stderr, "latte-server: %s\n", err.text);
        return 1;
    }
    log_listening(p);
    while (!n_signals)
        await_change(p);
    return drain(p) ? 0 : 1;
}

int main(int argc, char **argv)
{
    static struct program program; /* threads and the library hold pointers into it */
    struct program *p = &program;
    struct error err = {0};
    if (options_parse(&p->options, argc, argv, &err)) {
        fprintf(stderr, "latte-server: %s\n", err.text);
        return EXIT_USAGE;
    }
    if (p->options.help)
        options_print_help(stdout);
    else if (p->options.version)
        build_info_print(stdout, "latte-server");
    if (p->options.help || p->options.version)
        return 0;
    if (p->options.healthcheck)
        return check_health(&p->options);

    int code = 1;
    if (start(p, &err))
        fprintf(stderr, "latte-server: %s\n", err.text);
    else
        code = serve(p);
    stop(p);
    log_event(LOG_INFO, "stopped", "exit code %d", code);
    return code;
}
