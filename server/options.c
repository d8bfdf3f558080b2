/* options.c - see options.h */
#include "server/options.h"

#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/version.h"

const char latte_version[] = LATTE_VERSION;

enum option_kind { OPTION_STRING, OPTION_INT, OPTION_NUMBER, OPTION_FLAG, OPTION_STRINGS };

struct option_row {
    const char *flag, *initial, *value_name, *help;
    enum option_kind kind;
    int64_t minimum, maximum;
    size_t offset; /* in struct options */
};

static const struct option_row rows[] = {
#define X(field, kind, flag, initial, minimum, maximum, value_name, help)                          \
    {flag,          initial, value_name, help,                                                     \
     OPTION_##kind, minimum, maximum,    offsetof(struct options, field)},
    OPTION_LIST(X)
#undef X
};

enum { N_ROWS = sizeof(rows) / sizeof(rows[0]), ENV_NAME_BYTES = 64 };

/* "max-slots" -> "LATTE_MAX_SLOTS" */
static void env_name(const struct option_row *row, char out[ENV_NAME_BYTES])
{
    snprintf(out, ENV_NAME_BYTES, "LATTE_%s", row->flag);
    for (char *c = out; *c; c++)
        *c = *c == '-' ? '_' : (char)toupper((unsigned char)*c);
}

static enum status parse_int(const struct option_row *row, const char *source, const char *text,
                             int64_t *out, struct error *err)
{
    char *end = NULL;
    errno = 0;
    int64_t value = strtoll(text, &end, 10);
    bool is_number = (isdigit((unsigned char)*text) || *text == '-') && !*end;
    if (!is_number || errno || value < row->minimum || value > row->maximum)
        return fail_field(err, STATUS_INVALID, row->flag,
                          "%s: expected a whole number from %" PRId64 " to %" PRId64 ", found '%s'",
                          source, row->minimum, row->maximum, text);
    *out = value;
    return STATUS_OK;
}

static enum status parse_number(const struct option_row *row, const char *source, const char *text,
                                double *out, struct error *err)
{
    char *end = NULL;
    double value = strtod(text, &end);
    bool is_number = (isdigit((unsigned char)*text) || *text == '.') && !*end;
    if (!is_number || !(value >= (double)row->minimum && value <= (double)row->maximum))
        return fail_field(err, STATUS_INVALID, row->flag,
                          "%s: expected a number from %" PRId64 " to %" PRId64 ", found '%s'",
                          source, row->minimum, row->maximum, text);
    *out = value;
    return STATUS_OK;
}

static enum status parse_flag(const struct option_row *row, const char *source, const char *text,
                              bool *out, struct error *err)
{
    static const char *const yes[] = {"1", "true", "yes", "on"};
    static const char *const no[] = {"0", "false", "no", "off"};
    for (size_t i = 0; i < sizeof(yes) / sizeof(*yes); i++) {
        if (strcmp(text, yes[i]) && strcmp(text, no[i]))
            continue;
        *out = !strcmp(text, yes[i]);
        return STATUS_OK;
    }
    return fail_field(err, STATUS_INVALID, row->flag, "%s: expected true or false, found '%s'",
                      source, text);
}

/* Whether word is one of "a|b|c". */
static bool is_choice(const char *choices, const char *word)
{
    size_t n = strchr(word, '|') ? 0 : strlen(word);
    for (const char *c = choices; c; c = strchr(c, '|')) {
        c += *c == '|';
        if (n && !strncmp(c, word, n) && (c[n] == '|' || !c[n]))
            return true;
    }
    return false;
}

static enum status parse_string(const struct option_row *row, const char *source, const char *text,
                                const char **out, struct error *err)
{
    if (!*text)
        return fail_field(err, STATUS_INVALID, row->flag, "%s: expected %s, found nothing", source,
                          row->value_name);
    if (strchr(row->value_name, '|') && !is_choice(row->value_name, text))
        return fail_field(err, STATUS_INVALID, row->flag, "%s: expected one of %s, found '%s'",
                          source, row->value_name, text);
    *out = text;
    return STATUS_OK;
}

/* One more value; the first one from the command line replaces the environment's. */
static enum status add_string(const struct option_row *row, const char *source, const char *text,
                              struct option_strings *out, struct error *err)
{
    bool by_flag = !strncmp(source, "--", 2);
    if (by_flag && !out->by_flag)
        out->n = 0;
    out->by_flag = by_flag;
    if (out->n == OPTION_MAX_STRINGS)
        return fail_field(err, STATUS_INVALID, row->flag, "%s: expected at most %d times", source,
                          OPTION_MAX_STRINGS);
    enum status st = parse_string(row, source, text, &out->values[out->n], err);
    out->n += !st;
    return st;
}

/* Set one option; source is how the user wrote it, for the error. */
static enum status set_option(struct options *o, const struct option_row *row, const char *source,
                              const char *text, struct error *err)
{
    void *field = (char *)o + row->offset;
    switch (row->kind) {
    case OPTION_INT:
        return parse_int(row, source, text, field, err);
    case OPTION_NUMBER:
        return parse_number(row, source, text, field, err);
    case OPTION_FLAG:
        return parse_flag(row, source, text, field, err);
    case OPTION_STRINGS:
        return add_string(row, source, text, field, err);
    case OPTION_STRING:
        break;
    }
    return parse_string(row, source, text, field, err);
}

/* "*" or an origin as browsers send it: scheme://host[:port], nothing behind. The value goes
 * into a header of every reply as it is. */
static enum status check_cors_origin(const char *origin, struct error *err)
{
    static const char letters[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789";
    char allowed[sizeof(letters) + 8];
    if (!origin || !strcmp(origin, "*"))
        return STATUS_OK;
    snprintf(allowed, sizeof(allowed), "%s+-.", letters);
    size_t n_scheme = strspn(origin, allowed);
    snprintf(allowed, sizeof(allowed), "%s.-_:[]", letters);
    const char *host = origin + n_scheme + 3;
    if (n_scheme && !strncmp(origin + n_scheme, "://", 3) && *host && !host[strspn(host, allowed)])
        return STATUS_OK;
    return fail_field(err, STATUS_INVALID, "cors-origin",
                      "--cors-origin: expected * or an origin such as https://app.example:8443, "
                      "found '%s'",
                      origin);
}

static enum status check_tls(const struct options *o, struct error *err)
{
    if (!o->tls_cert != !o->tls_key)
        return fail_field(err, STATUS_INVALID, o->tls_cert ? "tls-key" : "tls-cert",
                          "--tls-%s: expected --tls-%s FILE beside it, found nothing",
                          o->tls_cert ? "cert" : "key", o->tls_cert ? "key" : "cert");
    if (o->tls_cert && o->unix_socket)
        return fail_field(err, STATUS_INVALID, "tls-cert",
                          "--tls-cert: expected a TCP port, found --unix-socket");
    return STATUS_OK;
}

static enum status set_defaults(struct options *o, struct error *err)
{
    *o = (struct options){0};
    enum status st = STATUS_OK;
    for (int i = 0; i < N_ROWS && !st; i++) {
        if (rows[i].initial)
            st = set_option(o, &rows[i], rows[i].flag, rows[i].initial, err);
    }
    return st;
}

/* An empty variable is as good as none, so that compose files can pass ${NAME:-} through. */
static enum status read_environment(struct options *o, struct error *err)
{
    enum status st = STATUS_OK;
    for (int i = 0; i < N_ROWS && !st; i++) {
        char name[ENV_NAME_BYTES];
        env_name(&rows[i], name);
        const char *text = getenv(name);
        if (text && *text)
            st = set_option(o, &rows[i], name, text, err);
    }
    return st;
}

static const struct option_row *find_row(const char *name, size_t n)
{
    for (int i = 0; i < N_ROWS; i++) {
        if (strlen(rows[i].flag) == n && !strncmp(rows[i].flag, name, n))
            return &rows[i];
    }
    return NULL;
}

/* The two letters that everybody expects. */
static const char *long_form(const char *text)
{
    if (!strcmp(text, "-m"))
        return "--model";
    return strcmp(text, "-h") ? text : "--help";
}

/* argv[*i] and, when it needs one, the value behind it. */
static enum status read_argument(struct options *o, int argc, char **argv, int *i,
                                 struct error *err)
{
    const char *text = long_form(argv[*i]);
    if (strncmp(text, "--", 2) || !text[2])
        return fail_field(err, STATUS_INVALID, text,
                          "expected a flag such as --model DIR, found '%s'", text);
    size_t n = strcspn(text + 2, "=");
    const char *value = text[2 + n] ? text + 3 + n : NULL;
    const struct option_row *row = find_row(text + 2, n);
    if (!row && !strncmp(text, "--no-", 5) && !value) {
        row = find_row(text + 5, n - 3);
        if (row && row->kind == OPTION_FLAG)
            return set_option(o, row, text, "0", err);
        row = NULL;
    }
    if (!row)
        return fail_field(err, STATUS_INVALID, text, "unknown flag '%s'; --help lists them", text);
    char source[ENV_NAME_BYTES];
    snprintf(source, sizeof(source), "--%s", row->flag);
    if (!value && row->kind == OPTION_FLAG)
        value = "1";
    if (!value && *i + 1 < argc)
        value = argv[++*i];
    if (!value)
        return fail_field(err, STATUS_INVALID, row->flag, "%s: expected %s, found nothing", source,
                          row->value_name);
    return set_option(o, row, source, value, err);
}

enum status options_parse(struct options *out, int argc, char **argv, struct error *err)
{
    struct options o;
    enum status st = set_defaults(&o, err);
    if (!st)
        st = read_environment(&o, err);
    for (int i = 1; i < argc && !st; i++)
        st = read_argument(&o, argc, argv, &i, err);
    if (!st)
        st = check_cors_origin(o.cors_origin, err);
    if (!st)
        st = check_tls(&o, err);
    if (!st && !o.model && !o.healthcheck && !o.help && !o.version)
        st = fail_field(err, STATUS_INVALID, "model",
                        "--model: expected a model directory, found nothing; --help lists the "
                        "flags");
    if (!st)
        *out = o;
    return st;
}

static void print_row(const struct option_row *row, FILE *out)
{
    char flag[96], name[ENV_NAME_BYTES];
    env_name(row, name);
    const char *head = row->kind == OPTION_FLAG && row->initial[0] == '1' ? "[no-]" : "";
    snprintf(flag, sizeof(flag), "--%s%s%s%s", head, row->flag, row->value_name ? " " : "",
             row->value_name ? row->value_name : "");
    fprintf(out, "  %-34s %s\n", flag, row->help);
    fprintf(out, "  %-34s", "");
    if (row->kind == OPTION_INT || row->kind == OPTION_NUMBER)
        fprintf(out, " %" PRId64 " to %" PRId64 ", default %s,", row->minimum, row->maximum,
                row->initial);
    else if (row->kind == OPTION_STRING && row->initial)
        fprintf(out, " default %s,", row->initial);
    fprintf(out, " %s\n", name);
}

void options_print_help(FILE *out)
{
    fprintf(out,
            "latte-server %s: serve a Latte language model over HTTP\n\n"
            "usage: latte-server --model DIR [flags]   (or -m DIR)\n\n"
            "Each flag may also be given as --flag=VALUE or as the environment variable named "
            "below it;\nthe command line wins.\n\n",
            latte_version);
    for (int i = 0; i < N_ROWS; i++)
        print_row(&rows[i], out);
    fprintf(out,
            "\nexit codes: 0 after a clean stop (SIGTERM or SIGINT), 1 when starting failed or the "
            "stop cut\nrequests off (--drain-timeout passed, or a second signal), 2 for wrong "
            "flags.\nSIGHUP reads --tls-cert and --tls-key again; a changed --api-key-file is read "
            "at the next "
            "start.\n");
}
