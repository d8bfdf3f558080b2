/* http_route.c - which route a request is for; see http.h on patterns. */
#include <string.h>

#include "server/http_private.h"

/* The parameter inside path when the pattern matches, "" for a pattern without one, else NULL. */
static const char *match(const char *pattern, const char *path)
{
    const char *brace = strchr(pattern, '{');
    if (!brace)
        return strcmp(pattern, path) ? NULL : "";
    size_t n = (size_t)(brace - pattern);
    return !strncmp(pattern, path, n) && path[n] ? path + n : NULL;
}

struct route_match route_find(const struct http_route *routes, size_t n, const char *method,
                              const char *path)
{
    struct route_match found = {0};
    if (!strcmp(method, "HEAD"))
        method = "GET";
    for (size_t i = 0; i < n; i++) {
        const char *param = match(routes[i].path, path);
        if (!param)
            continue;
        found.path_exists = true;
        if (strcmp(routes[i].method, method))
            continue;
        found.route = &routes[i];
        found.param = *param ? param : NULL;
        return found;
    }
    return found;
}

void route_allow(const struct http_route *routes, size_t n, const char *path, struct bytes *out)
{
    for (size_t i = 0; i < n; i++) {
        if (!match(routes[i].path, path))
            continue;
        bytes_text(out, routes[i].method);
        bytes_text(out, strcmp(routes[i].method, "GET") ? ", " : ", HEAD, ");
    }
    bytes_text(out, "OPTIONS");
}
