/* build_info.c - see build_info.h.
 *
 * Libraries are asked by name in the running process, so that this file belongs to every program,
 * includes none of their headers, and tells what is used and not what was there at build time. */
#include "engine/build_info.h"

#include <dlfcn.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "build_facts.h" /* LATTE_COMMIT, LATTE_BUILD, LATTE_FLAGS; made by the Makefile */
#include "engine/base/version.h"

/* How a library tells its version. */
enum version_kind {
    VERSION_TEXT,   /* const char *f(void) */
    VERSION_CHECK,  /* const char *f(const char *), given NULL */
    VERSION_WORD,   /* the second word of const char *f(void) */
    VERSION_NUMBER, /* unsigned f(void): 10000 * major + 100 * minor + release */
    VERSION_PCRE,   /* int f(uint32_t, void *), given 11 and a buffer; its first word */
};

static const struct library {
    const char *name, *symbol;
    enum version_kind kind;
} libraries[] = {
    {"libmicrohttpd", "MHD_get_version", VERSION_TEXT},
    {"GnuTLS", "gnutls_check_version", VERSION_CHECK},
    {"cJSON", "cJSON_Version", VERSION_TEXT},
    {"OpenBLAS", "openblas_get_config", VERSION_WORD},
    {"PCRE2", "pcre2_config_8", VERSION_PCRE},
    {"utf8proc", "utf8proc_version", VERSION_TEXT},
    {"xxHash", "XXH_versionNumber", VERSION_NUMBER},
};

typedef void any_function(void);

static any_function *find(const char *symbol)
{
    void *found = dlsym(RTLD_DEFAULT, symbol);
    any_function *function = NULL;
    memcpy(&function, &found, sizeof(function)); /* ISO C has no cast for this */
    return function;
}

/* The version in out[n]; false when the library is not there. */
static bool version_of(const struct library *library, char *out, size_t n)
{
    enum { PCRE2_CONFIG_VERSION_CODE = 11 };
    any_function *f = find(library->symbol);
    const char *text = "";
    char buffer[64] = "";
    unsigned number;
    if (!f)
        return false;
    switch (library->kind) {
    case VERSION_NUMBER:
        number = ((unsigned (*)(void))f)();
        snprintf(out, n, "%u.%u.%u", number / 10000, number / 100 % 100, number % 100);
        return true;
    case VERSION_PCRE:
        ((int (*)(unsigned, void *))f)(PCRE2_CONFIG_VERSION_CODE, buffer);
        text = buffer;
        break;
    case VERSION_CHECK:
        text = ((const char *(*)(const char *))f)(NULL);
        break;
    case VERSION_WORD:
        text = ((const char *(*)(void))f)();
        text += strcspn(text, " ");
        text += strspn(text, " ");
        break;
    case VERSION_TEXT:
        text = ((const char *(*)(void))f)();
        break;
    }
    snprintf(out, n, "%.*s", (int)strcspn(text, " "), text);
    return true;
}

/* The CUDA runtime is linked statically, where there is one. */
int cudaRuntimeGetVersion(int *version) __attribute__((weak));

static void print_cuda(FILE *out)
{
    int version = 0;
    any_function *f = find("cublasLtGetVersion");
    if (!cudaRuntimeGetVersion || cudaRuntimeGetVersion(&version)) {
        fputs("CUDA       not built in\n", out);
        return;
    }
    fprintf(out, "CUDA       runtime %d.%d", version / 1000, version % 1000 / 10);
    if (f) { /* 10000 * major + 100 * minor + release */
        size_t number = ((size_t(*)(void))f)();
        fprintf(out, ", cuBLASLt %zu.%zu.%zu", number / 10000, number / 100 % 100, number % 100);
    }
    fputc('\n', out);
}

void build_info_print(FILE *out, const char *program)
{
    fprintf(out, "%s %s\n", program, LATTE_VERSION);
    fprintf(out, "commit     %s\n", LATTE_COMMIT);
#ifdef __clang__
    fprintf(out, "compiler   %s\n", __VERSION__);
#else
    fprintf(out, "compiler   gcc %s\n", __VERSION__);
#endif
    fprintf(out, "build      %s, %s\n", LATTE_BUILD, LATTE_FLAGS);
    print_cuda(out);
    fputs("libraries ", out);
    const char *separator = " ";
    for (size_t i = 0; i < sizeof(libraries) / sizeof(*libraries); i++) {
        char version[64];
        if (!version_of(&libraries[i], version, sizeof(version)))
            continue;
        fprintf(out, "%s%s %s", separator, libraries[i].name, version);
        separator = ", ";
    }
    fputc('\n', out);
}
