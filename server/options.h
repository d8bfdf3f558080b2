/* options.h - every knob of the server: flag, environment variable, range, default, help.
 *
 * One table gives all five. Precedence: command line, then LATTE_<NAME> in the environment
 * (flag name in capitals, '-' as '_'), then the default.
 *
 * Threads: filled once by main; read-only afterwards.
 * Memory:  strings are borrowed from argv, the environment, or the table.
 */
#ifndef LATTE_SERVER_OPTIONS_H
#define LATTE_SERVER_OPTIONS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "engine/base/error.h"

/* X(field, kind, flag, default, minimum, maximum, value name, help)
 * kinds: STRING (char const *; default a string or NULL), INT (int64_t), NUMBER (double), FLAG
 * (bool), STRINGS (struct option_strings; the flag may be repeated, the variable has one).
 * A STRING whose value name is a list "a|b|c" takes one of those words only. */
#define OPTION_LIST(X)                                                                             \
    X(model, STRING, "model", NULL, 0, 0, "DIR", "model directory to serve (required)")            \
    X(served_model_name, STRING, "served-model-name", NULL, 0, 0, "NAME",                          \
      "id of the model in the API (default: the directory's name)")                                \
    X(host, STRING, "host", "127.0.0.1", 0, 0, "ADDR", "address to listen on; IPv6 as ::1 or ::")  \
    X(port, INT, "port", "8080", 0, 65535, "N", "TCP port; 0 picks a free one and prints it")      \
    X(unix_socket, STRING, "unix-socket", NULL, 0, 0, "PATH", "listen on this socket instead")     \
    X(device, STRING, "device", "auto", 0, 0, "NAME",                                              \
      "auto, cpu, ref, cuda, cuda:N, or several GPUs as cuda:0,cuda:1; auto: a GPU if there is "   \
      "one")                                                                                       \
    X(weight_dtype, STRING, "weight-dtype", "auto", 0, 0, "auto|f32|bf16|int8",                    \
      "how weights are held; auto: as the file has them; int8: on a GPU")                          \
    X(window_dtype, STRING, "window-dtype", "auto", 0, 0, "auto|f32|bf16|f8",                      \
      "how attention windows are held; bf16 (a GPU's auto, unless weights are f32) and f8: on a "  \
      "GPU")                                                                                       \
    X(deterministic, FLAG, "deterministic", "0", 0, 1, NULL,                                       \
      "on a GPU: the same bits in a batch of any size")                                            \
    X(no_warmup, FLAG, "no-warmup", "0", 0, 1, NULL,                                               \
      "on a GPU: serve at once; the first step of each size then takes up to 0.1 s longer")        \
    X(threads, INT, "threads", "0", 0, 1024, "N", "compute threads; 0: one per usable core")       \
    X(max_slots, INT, "max-slots", "0", 0, 65536, "N",                                             \
      "sequences held on each device; 0: 64 on a CPU, as many as fit on a GPU")                    \
    X(device_memory_share, NUMBER, "device-memory-share", "0.9", 0, 1, "X",                        \
      "how much of a GPU's free memory may be taken")                                              \
    X(max_batch, INT, "max-batch", "0", 0, 65536, "N",                                             \
      "sequences decoded in one step, in turns if there are more; 0: all on a CPU, 1024 on a GPU") \
    X(max_queue, INT, "max-queue", "1024", 1, 1000000, "N",                                        \
      "jobs waiting for a slot; beyond it requests get 429")                                       \
    X(max_running_per_key, INT, "max-running-per-key", "0", 0, 1000000, "N",                       \
      "sequences that an API key may have running or queued; beyond it its requests get 429; 0: "  \
      "no "                                                                                        \
      "limit")                                                                                     \
    X(step_tokens, INT, "step-tokens", "0", 0, 65536, "N",                                         \
      "rows of one engine step at most; 0: 256 on a CPU, 8192 on a GPU")                           \
    X(chunk_tokens, INT, "chunk-tokens", "0", 0, 65536, "N",                                       \
      "prompt tokens of one request processed in a step at most; 0: 128 on a CPU, 4096 on a GPU")  \
    X(max_sessions, INT, "max-sessions", "10000", 1, 10000000, "N", "sessions held at once")       \
    X(max_sessions_per_key, INT, "max-sessions-per-key", "0", 0, 10000000, "N",                    \
      "sessions that one API key may have; beyond it requests get 429; 0: no limit")               \
    X(max_stored_mb_per_key, INT, "max-stored-mb-per-key", "0", 0, 16777216, "MB",                 \
      "states that the sessions and snapshots of one API key may have; 0: no limit")               \
    X(session_idle_ttl, INT, "session-idle-ttl", "0", 0, 31536000, "SECONDS",                      \
      "a session unused so long is forgotten, unless it says otherwise; 0: never")                 \
    X(max_queued_turns, INT, "max-queued-turns", "32", 0, 1000000, "N",                            \
      "requests that may wait for a turn of one session")                                          \
    X(response_ttl, INT, "response-ttl", "2592000", 1, 315360000, "SECONDS",                       \
      "how long a stored response can be retrieved and continued")                                 \
    X(max_responses, INT, "max-responses", "1000", 1, 10000000, "N",                               \
      "responses stored for each API key; beyond it the oldest goes")                              \
    X(response_mb, INT, "response-mb", "512", 1, 16777216, "MB",                                   \
      "memory of all stored responses with their states; beyond it, and beyond half of "           \
      "--host-state-mb, the oldest go")                                                            \
    X(host_state_mb, INT, "host-state-mb", "1024", 1, 16777216, "MB",                              \
      "memory of all states of sessions, snapshots and presets; beyond it those used least go "    \
      "to --store, and without one requests get 429")                                              \
    X(store, STRING, "store", NULL, 0, 0, "DIR or URL",                                            \
      "directory in which sessions outlive the process, or a Redis that servers share: "           \
      "redis://[USER][:PASSWORD]@HOST[:PORT][/DB] or unix:///SOCKET; without it they do not")      \
    X(store_timeout, NUMBER, "store-timeout", "5", 0, 3600, "SECONDS",                             \
      "for Redis to answer; then requests get 503")                                                \
    X(lease_ms, INT, "lease-ms", "10000", 100, 3600000, "MS",                                      \
      "a session in Redis is free so long after the server that had its turn was lost")            \
    X(durability, STRING, "durability", "turn", 0, 0, "turn|interval|none",                        \
      "turn: a turn is on the disk before its reply ends; interval: soon after; none: when the "   \
      "system writes it")                                                                          \
    X(replay_tokens, INT, "replay-tokens", "64", 0, 512, "N",                                      \
      "a state that so few tokens give again leaves memory without being written to --store "      \
      "(a GPU: only with --deterministic)")                                                        \
    X(durability_interval, INT, "durability-interval", "1000", 1, 3600000, "MS",                   \
      "time in which --durability interval writes")                                                \
    X(preset, STRINGS, "preset", NULL, 0, 0, "NAME=FILE",                                          \
      "an exported state that sessions and requests may begin from, under this name; several "     \
      "with commas, or repeat it")                                                                 \
    X(max_presets, INT, "max-presets", "256", 1, 65536, "N", "presets held at once")               \
    X(open_admin, FLAG, "open-admin", "0", 0, 1, NULL,                                             \
      "without --api-key-file: let everybody save and delete presets")                             \
    X(prefix_cache_mb, INT, "prefix-cache-mb", "256", 0, 16777216, "MB",                           \
      "of that, for states after the beginnings of prompts that come again; 0: keep none")         \
    X(prefix_min_tokens, INT, "prefix-min-tokens", "0", 0, 1000000000, "N",                        \
      "keep a state only where it saves so many tokens; 0: 32 on a CPU, 512 on a GPU")             \
    X(share_prefixes, FLAG, "share-prefixes", "0", 0, 1, NULL,                                     \
      "API keys find each other's beginnings of prompts")                                          \
    X(max_prompt_tokens, INT, "max-prompt-tokens", "1000000", 1, 1000000000, "N",                  \
      "longest prompt accepted")                                                                   \
    X(default_max_tokens, INT, "default-max-tokens", "4096", 1, 1000000000, "N",                   \
      "output limit of a chat request that names none (completions: OpenAI's 16)")                 \
    X(max_tokens_limit, INT, "max-tokens-limit", "1000000", 1, 1000000000, "N",                    \
      "largest max_tokens a request may ask for")                                                  \
    X(max_choices, INT, "max-choices", "128", 1, 1024, "N",                                        \
      "most sequences (prompts x best_of) one request may ask for; never over --max-queue")        \
    X(request_timeout, INT, "request-timeout", "0", 0, 86400, "SECONDS",                           \
      "deadline of a request from its arrival; 0: none")                                           \
    X(max_body_mb, INT, "max-body-mb", "32", 1, 1024, "MB",                                        \
      "largest request body; one with a state may be longer by that")                              \
    X(max_buffered_mb, INT, "max-buffered-mb", "256", 1, 1048576, "MB",                            \
      "memory of all request bodies and prompts together; beyond it 503")                          \
    X(max_connections, INT, "max-connections", "4096", 1, 65536, "N", "open connections")          \
    X(header_timeout, INT, "header-timeout", "10", 1, 3600, "SECONDS",                             \
      "time a client has to send a request's headers")                                             \
    X(idle_timeout, INT, "idle-timeout", "75", 1, 3600, "SECONDS",                                 \
      "a connection without traffic is closed after this")                                         \
    X(drain_timeout, INT, "drain-timeout", "30", 0, 3600, "SECONDS",                               \
      "after SIGTERM, time running requests have to finish")                                       \
    X(keepalive_interval, INT, "keepalive-interval", "15", 1, 3600, "SECONDS",                     \
      "a comment is sent on a stream that was silent this long")                                   \
    X(stream_retention, INT, "stream-retention", "300", 0, 2592000, "SECONDS",                     \
      "the events of a resumable stream are kept so long after its end")                           \
    X(stream_retention_mb, NUMBER, "stream-retention-mb", "256", 0, 16777216, "MB",                \
      "memory of all kept streams; beyond it those that ended first are forgotten")                \
    X(stream_limit_mb, NUMBER, "stream-limit-mb", "16", 0, 16777216, "MB",                         \
      "events kept of one stream; beyond it its oldest are dropped")                               \
    X(idempotency_ttl, INT, "idempotency-ttl", "86400", 1, 2592000, "SECONDS",                     \
      "what a request with an Idempotency-Key was answered is kept so long")                       \
    X(idempotency_mb, NUMBER, "idempotency-mb", "64", 0, 16777216, "MB",                           \
      "memory of those answers; beyond it the oldest are forgotten")                               \
    X(workers, INT, "workers", "2", 1, 64, "N", "threads that parse and tokenize large bodies")    \
    X(api_key_file, STRING, "api-key-file", NULL, 0, 0, "FILE",                                    \
      "one API key of 8 to 255 characters per line, behind an admin's a blank and 'admin'; "       \
      "without it the API is open")                                                                \
    X(tls_cert, STRING, "tls-cert", NULL, 0, 0, "FILE",                                            \
      "speak HTTPS with this certificate (PEM, its issuers' behind it); SIGHUP reads it again")    \
    X(tls_key, STRING, "tls-key", NULL, 0, 0, "FILE", "the certificate's key (PEM)")               \
    X(cors_origin, STRING, "cors-origin", NULL, 0, 0, "ORIGIN",                                    \
      "send CORS headers for this origin, or * for any")                                           \
    X(strict_fields, FLAG, "strict-fields", "0", 0, 1, NULL,                                       \
      "refuse requests with unknown fields instead of ignoring them")                              \
    X(openapi, STRING, "openapi", NULL, 0, 0, "FILE",                                              \
      "serve this file at /openapi.yaml instead of the built-in copy")                             \
    X(playground, FLAG, "playground", "1", 0, 1, NULL, "serve the page at / to try the server on") \
    X(log_level, STRING, "log-level", "info", 0, 0, "debug|info|warn|error",                       \
      "least severe lines to log")                                                                 \
    X(access_log, FLAG, "access-log", "1", 0, 1, NULL, "log one JSON line per request")            \
    X(healthcheck, FLAG, "healthcheck", "0", 0, 1, NULL,                                           \
      "start nothing: exit with 0 if the server at --port (or --unix-socket) says that it is "     \
      "ready, else with 1")                                                                        \
    X(help, FLAG, "help", "0", 0, 1, NULL, "print this help")                                      \
    X(version, FLAG, "version", "0", 0, 1, NULL,                                                   \
      "print the version, the build's facts and the libraries'")

#define OPTION_TYPE_STRING const char *
#define OPTION_TYPE_INT int64_t
#define OPTION_TYPE_NUMBER double
#define OPTION_TYPE_FLAG bool
#define OPTION_TYPE_STRINGS struct option_strings

enum { OPTION_MAX_STRINGS = 64 };

struct option_strings {
    int n;
    const char *values[OPTION_MAX_STRINGS];
    bool by_flag; /* not from the environment */
};

struct options {
#define X(field, kind, ...) OPTION_TYPE_##kind field;
    OPTION_LIST(X)
#undef X
};

/* Fill *out from argv and the environment. INVALID names the flag or variable, what was
 * expected and found. Flags: --name VALUE, --name=VALUE, --flag, --no-flag. */
enum status options_parse(struct options *out, int argc, char **argv, struct error *err);

/* Write the help text to a stream. */
void options_print_help(FILE *out);

/* The version of this build, "0.1.0". */
extern const char latte_version[];

#endif
