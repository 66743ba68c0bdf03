# Builds a provider from C. A project's Makefile says what, and includes this:
#
#   COMPONENT = NAME              builds NAME.wasm
#   SOURCES = NAME.c …
#   WORLD = blind-provider        or `provider`, for one that reads the bytes
#   TESTS = test.c …              run by `make test`, natively: see mock.h
#
# It needs a clang and an lld that know wasm32, with their runtime library, a C library for it, and what makes a
# component of a module: `wasm-component-ld`, which is part of every Rust toolchain. On Debian:
#
#   apt-get install make clang-19 lld-19 libclang-rt-19-dev-wasm32 wasi-libc
#
# Set CC, WASM_LD and WASM_COMPONENT_LD where yours are called otherwise; OUT for another folder.

# A make of its own default is no choice of anybody's.
ifeq ($(origin CC),default)
CC = clang-19
endif
WASM_LD ?= wasm-ld-19
# Beside the compiler of a Rust toolchain; it is on nobody's PATH.
WASM_COMPONENT_LD ?= $(shell command -v wasm-component-ld || \
	echo "$$(rustc --print sysroot)/lib/rustlib/$$(rustc -vV | sed -n 's/^host: //p')/bin/wasm-component-ld")
OUT ?= build

SDK_FOLDER := $(dir $(lastword $(MAKEFILE_LIST)))
BINDINGS = $(SDK_FOLDER)bindings/$(WORLD)
# The C library is the one of WASI, for its strings and its memory; what of it would import something is not used.
TARGET = --target=wasm32-wasi
WARNINGS = -Wall -Wextra -Wno-unused-parameter
DEFINES = $(if $(filter blind-provider,$(WORLD)),-DFLEECEBOX_BLIND)
CFLAGS ?= -O2
OBJECTS = $(SOURCES:%.c=$(OUT)/%.o) $(OUT)/fleecebox-bindings.o $(BINDINGS)/fleecebox_component_type.o

$(OUT)/$(COMPONENT).wasm: $(OBJECTS)
	$(WASM_COMPONENT_LD) --wasm-ld-path "$$(command -v $(WASM_LD))" -m wasm32 --no-entry --gc-sections --strip-all \
		-L"$$(dirname "$$($(CC) $(TARGET) -print-file-name=libc.a)")" \
		$^ -lc "$$($(CC) $(TARGET) -print-libgcc-file-name)" -o $@

$(OUT)/%.o: %.c $(SDK_FOLDER)fleecebox-guest.h
	@mkdir -p $(@D)
	$(CC) $(TARGET) -std=c17 $(WARNINGS) $(CFLAGS) $(DEFINES) -I$(SDK_FOLDER) -c $< -o $@

# The parts of the bindings that nobody calls are left out when it is linked.
$(OUT)/fleecebox-bindings.o: $(BINDINGS)/fleecebox.c
	@mkdir -p $(@D)
	$(CC) $(TARGET) -std=c17 $(CFLAGS) -ffunction-sections -fdata-sections -c $< -o $@

# The machine's own compiler.
HOST_CC ?= cc

$(OUT)/test: $(SOURCES) $(TESTS) $(SDK_FOLDER)mock.c $(SDK_FOLDER)mock.h $(SDK_FOLDER)fleecebox-guest.h
	@mkdir -p $(@D)
	$(HOST_CC) -std=c17 -g $(WARNINGS) $(DEFINES) -I$(SDK_FOLDER) $(filter %.c,$^) -o $@

.PHONY: test
test: $(OUT)/test
	$<

.PHONY: clean
clean:
	rm -rf $(OUT)
