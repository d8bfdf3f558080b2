/* openapi.h - the API's description, openapi.yaml, as it was when the program was built.
 *
 * Threads: constant. Memory: static. Errors: none.
 */
#ifndef LATTE_SERVER_OPENAPI_H
#define LATTE_SERVER_OPENAPI_H

extern const char openapi_text[];     /* not zero-terminated */
extern const char openapi_text_end[]; /* one past the last byte */

#endif
