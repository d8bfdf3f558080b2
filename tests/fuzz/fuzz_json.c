/* fuzz_json.c - json_check against cJSON: what the check accepts, the lenient parser accepts. */
#include <cjson/cJSON.h>

#include "engine/base/json.h"
#include "tests/fuzz/fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    const struct json_limits limits = {.max_depth = 32, .max_values = 10000};
    struct error err = {0};
    if (json_check((const char *)data, n, &limits, &err)) {
        fuzz_expect_reason(&err);
        return 0;
    }
    cJSON *tree = cJSON_ParseWithLength((const char *)data, n);
    CHECK(tree != NULL);
    cJSON_Delete(tree);
    return 0;
}
