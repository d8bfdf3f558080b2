/* version.h - the version of this source tree, for --version, /version and logs. */
#ifndef LATTE_BASE_VERSION_H
#define LATTE_BASE_VERSION_H

#define LATTE_VERSION "0.1.0"

#endif
