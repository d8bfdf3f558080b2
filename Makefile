# latte-server: build, test and serve. `make help` lists the targets.
#
#   SAN=address|thread   build with AddressSanitizer + UBSan, or ThreadSanitizer
#   OPT=-O2              optimisation flags
#   V=1                  print whole commands
#
# Objects go to build/<variant>/, so changing a variable never needs a clean.

SAN    ?=
OPT    ?= -O3
MODEL  ?= weights/latte-12m
ARGS   ?=

VARIANT := $(if $(SAN),san-$(SAN),release)
BUILD   := build/$(VARIANT)

# One short line a file, or with V=1 the commands.
Q   := $(if $(V),,@)
say := @$(if $(V),:,echo " ")

SAN_FLAGS_address := -fsanitize=address,undefined -fno-sanitize-recover=all
SAN_FLAGS_thread  := -fsanitize=thread
SAN_FLAGS := $(SAN_FLAGS_$(SAN))

CFLAGS   ?= $(OPT) -g
CFLAGS   += -std=gnu11 -Wall -Wextra -Wshadow -Wmissing-prototypes -Wstrict-prototypes \
            -Werror -Wno-error=maybe-uninitialized -fno-omit-frame-pointer -pthread $(if $(SAN),-fno-optimize-sibling-calls)
CPPFLAGS += -I. -D_GNU_SOURCE
LDFLAGS  += -pthread $(SAN_FLAGS)
LIBS     := -lmicrohttpd -lcjson -lpcre2-8 -lutf8proc -lxxhash -lopenblas -lm
TEST_LIBS := -lcmocka -lcurl -lyaml

# What belongs to one program is linked into it; everything else goes into one archive.
MAINS    := server/main.c
LIB_SRC  := $(filter-out $(MAINS),$(wildcard engine/base/*.c engine/*.c engine/kernels/*.c weights/*.c server/*.c))
LIB_OBJ  := $(LIB_SRC:%.c=$(BUILD)/%.o)
LIB      := $(BUILD)/liblatte.a
PROGRAMS := $(BUILD)/latte-server $(BUILD)/latte-run $(BUILD)/latte-bench

UNIT_TESTS := $(patsubst tests/unit/%.c,$(BUILD)/tests/unit/%,$(wildcard tests/unit/test_*.c))
HTTP_TESTS := $(patsubst tests/http/%.c,$(BUILD)/tests/http/%,$(wildcard tests/http/test_*.c))
HTTP_HELP  := $(patsubst %.c,$(BUILD)/%.o,$(filter-out $(wildcard tests/http/test_*.c),$(wildcard tests/http/*.c)) tests/unit/model_files.c)
UNIT_HELP  := $(patsubst %.c,$(BUILD)/%.o,$(filter-out $(wildcard tests/unit/test_*.c),$(wildcard tests/unit/*.c)))
RUN_SRC    := $(wildcard engine/run/*.c)
BENCH_SRC  := $(wildcard tests/bench/*.c)
FUZZERS    := $(patsubst %.c,$(BUILD)/%,$(wildcard tests/fuzz/fuzz_*.c))
FUZZ_HELP  := $(BUILD)/tests/fuzz/driver.o $(BUILD)/tests/fuzz/files.o
FUZZ_SEEDS := tests/fuzz/seeds tests/golden/safetensors/model.safetensors \
              $(wildcard tests/golden/tokenizer/*.json)
FUZZ_SECONDS ?= 20

.PHONY: all help packages serve test unit-test http-test unit-tests http-tests bench fuzz fuzz-run deps format clean
all: $(PROGRAMS)

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

packages: ## install the Debian packages that are missing (sudo when not root)
	@sh deploy/packages.sh build

serve: packages ## build and serve the bundled model on 127.0.0.1:8080 (MODEL=dir ARGS="...")
	@$(MAKE) --no-print-directory -j$$(nproc) $(BUILD)/latte-server $(BUILD)/latte-run
	$(BUILD)/latte-server --model $(MODEL) $(ARGS)

test: ## install what is missing, build, and run all tests
	@sh deploy/packages.sh test
	@$(MAKE) --no-print-directory -j$$(nproc) all unit-tests http-tests
	@sh tests/run.sh $(BUILD)

unit-test: ## the unit tests alone (TEST_ONLY=name picks some)
	@sh deploy/packages.sh test
	@$(MAKE) --no-print-directory -j$$(nproc) unit-tests
	@sh tests/run.sh $(BUILD) unit

http-test: ## the HTTP tests alone
	@sh deploy/packages.sh test
	@$(MAKE) --no-print-directory -j$$(nproc) http-tests
	@sh tests/run.sh $(BUILD) http

unit-tests: $(UNIT_TESTS)
http-tests: $(HTTP_TESTS) $(BUILD)/latte-server

$(LIB): $(LIB_OBJ)
	@rm -f $@
	$(say) AR $@
	$(Q)ar rcs $@ $^

$(BUILD)/latte-server: $(BUILD)/server/main.o $(LIB)
	$(say) LD $@
	$(Q)$(CC) $(LDFLAGS) -o $@ $^ $(LIBS)

$(BUILD)/latte-run: $(RUN_SRC:%.c=$(BUILD)/%.o) $(LIB)
	$(say) LD $@
	$(Q)$(CC) $(LDFLAGS) -o $@ $^ $(LIBS)

$(BUILD)/latte-bench: $(BENCH_SRC:%.c=$(BUILD)/%.o) $(LIB)
	$(say) LD $@
	$(Q)$(CC) $(LDFLAGS) -o $@ $^ $(LIBS) -lcurl

# An archive, so that a test which stands in for a file (test_scheduler for model.c) can.
$(BUILD)/libunit.a: $(UNIT_HELP)
	@rm -f $@
	$(say) AR $@
	$(Q)ar rcs $@ $^

$(BUILD)/tests/unit/test_%: $(BUILD)/tests/unit/test_%.o $(BUILD)/libunit.a $(LIB)
	$(say) LD $@
	$(Q)$(CC) $(LDFLAGS) -o $@ $^ $(LIBS) $(TEST_LIBS)

$(BUILD)/tests/unit/test_run: | $(BUILD)/latte-run

$(BUILD)/tests/http/test_%: $(BUILD)/tests/http/test_%.o $(HTTP_HELP) $(LIB)
	$(say) LD $@
	$(Q)$(CC) $(LDFLAGS) -o $@ $^ $(LIBS) $(TEST_LIBS)

$(BUILD)/server/openapi.o: openapi.yaml

$(BUILD)/%.o: %.c
	@mkdir -p $(@D)
	$(say) CC $<
	$(Q)$(CC) $(CPPFLAGS) $(CFLAGS) $(SAN_FLAGS) -MMD -MP -c -o $@ $<

$(BUILD)/tests/fuzz/fuzz_%: $(BUILD)/tests/fuzz/fuzz_%.o $(FUZZ_HELP) $(LIB)
	$(say) LD $@
	$(Q)$(CC) $(LDFLAGS) -o $@ $^ $(LIBS)

fuzz: packages ## mutate the inputs of every parser under ASan (FUZZ_SECONDS each)
	@$(MAKE) --no-print-directory -j$$(nproc) SAN=address fuzz-run
fuzz-run: $(FUZZERS)
	@set -e; for f in $(FUZZERS); do $$f -t $(FUZZ_SECONDS) $(FUZZ_SEEDS); done

bench: ## print the tables of latte-bench for the bundled model
	@sh deploy/packages.sh test
	@$(MAKE) --no-print-directory -j$$(nproc) all
	$(BUILD)/latte-bench engine -m $(MODEL)
	$(BUILD)/latte-bench serve -m $(MODEL)

deps: ## print which layer includes which
	@grep -rhoE --include='*.[ch]' '^#include "[a-z0-9_/]+' server engine weights --with-filename \
	  | sed -E 's|/[^/:]*:#include "| -> |' | sort | uniq -c

format: ## clang-format every C file
	clang-format -i $$(git ls-files '*.c' '*.h')

clean: ## remove build/
	rm -rf build

.SECONDARY:
-include $(shell find build -name '*.d' 2>/dev/null)
