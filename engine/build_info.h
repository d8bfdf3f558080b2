/* build_info.h - what a program was built from and runs with, for --version.
 *
 * Threads: any. Memory: none. Errors: what is not known is left out or "unknown".
 */
#ifndef LATTE_ENGINE_BUILD_INFO_H
#define LATTE_ENGINE_BUILD_INFO_H

#include <stdio.h>

/* "latte-server 0.1.0", then a line each for the commit, the compiler, the kind of build, CUDA and
 * the versions of the shared libraries that this process has loaded. */
void build_info_print(FILE *out, const char *program);

#endif
