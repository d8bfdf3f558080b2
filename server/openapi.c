/* openapi.c - see openapi.h. The assembler takes the file from the repository root, where make
 * runs; the Makefile names the dependency. */
#include "server/openapi.h"

__asm__(".section .rodata\n"
        ".global openapi_text, openapi_text_end\n"
        "openapi_text:\n"
        ".incbin \"openapi.yaml\"\n"
        "openapi_text_end:\n"
        ".byte 0\n"
        ".text\n");
