/* http_route.c - which route a request is for; see http.h on patterns. */
#include <stdbool.h>
#include <string.h>

#include "server/http_private.h"

/* Whether a path is the route's; *param is then inside the path, or NULL. */
static bool match(const struct http_route *route, const char *path, const char **param,
                  size_t *n_param)
{
    const char *brace = strchr(route->path, '{');
    *param = NULL;
    *n_param = 0;
    if (!brace)
        return !strcmp(route->path, path);
    size_t before = (size_t)(brace - route->path);
    if (strncmp(route->path, path, before))
        return false;
    const char *rest = strchr(brace, '}') + 1;
    *param = path + before;
    *n_param = route->flags & HTTP_ROUTE_SLASHES ? strlen(*param) : strcspn(*param, "/");
    return *n_param && !strcmp(rest, *param + *n_param);
}

struct route_match route_find(const struct http_route *routes, size_t n, const char *method,
                              const char *path)
{
    struct route_match found = {0};
    if (!strcmp(method, "HEAD"))
        method = "GET";
    for (size_t i = 0; i < n; i++) {
        const char *param;
        size_t n_param;
        if (!match(&routes[i], path, &param, &n_param))
            continue;
        found.path_exists = true;
        if (strcmp(routes[i].method, method))
            continue;
        found.route = &routes[i];
        found.param = param;
        found.n_param = n_param;
        return found;
    }
    return found;
}

void route_allow(const struct http_route *routes, size_t n, const char *path, struct bytes *out)
{
    for (size_t i = 0; i < n; i++) {
        const char *param;
        size_t n_param;
        if (!match(&routes[i], path, &param, &n_param))
            continue;
        bytes_text(out, routes[i].method);
        bytes_text(out, strcmp(routes[i].method, "GET") ? ", " : ", HEAD, ");
    }
    bytes_text(out, "OPTIONS");
}
