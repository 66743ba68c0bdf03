# `make` alone says what there is.

MAKEFLAGS += --no-print-directory
CARGO_TARGET_DIR ?= target
export CARGO_TARGET_DIR
# Where things go that are slow to make and do not depend on our code: the wasm target's standard library, the tests'
# guest.
FLEECEBOX_CACHE ?= .cache
# Absolute: what is called from here runs in other folders too, and would begin a cache of its own there.
override FLEECEBOX_CACHE := $(abspath $(FLEECEBOX_CACHE))
export FLEECEBOX_CACHE

COMPONENTS = $(CARGO_TARGET_DIR)/components
FLEECEBOX = $(CARGO_TARGET_DIR)/release/fleecebox
PROVIDERS = chunked image
# Those in other languages, and the projects that `fleecebox provider new` writes in them.
LANGUAGES = qcow2 numbered watchful
NEW_PROJECTS = $(foreach language,c python javascript,$(language)-sighted $(language)-blind)
# What only the benchmark and the tests need.
TEST_PROVIDERS = splices-everything asks-everything
# Hostile ones, and those with one mistake each that the conformance kit has to find.
HOSTILE = $(basename $(notdir $(wildcard tests/hostile/examples/*.rs tests/planted/examples/*.rs)))
WASM = $(CARGO_TARGET_DIR)/wasm32-unknown-unknown/release

# One step after the other: cargo uses all processors by itself.
.NOTPARALLEL:
.PHONY: help setup demo demo-vm test zoo soak bench bench-languages fuzz lint providers languages programs build clean

help:
	@echo "make demo       back up a live disk, restore it, and let hostile providers try; under a minute once built"
	@echo "make demo-vm    the same on a Linux guest that boots under QEMU"
	@echo "make test       all tests"
	@echo "make zoo        only the hostile providers, with a table of what each came to; WORDS=… for some of them"
	@echo "make soak       random writes, backups, kills, restarts, restores, for SECONDS=60 and with SEED=… if given"
	@echo "make bench      measure against nbdcopy and qemu-img"
	@echo "make bench-languages  what a provider's language costs"
	@echo "make fuzz       feed rubbish to all that reads bytes from outside, SECONDS=60 for each part; needs nightly"
	@echo "make lint       formatting, clippy, the code's documentation, and cargo-deny where it is installed"
	@echo "make providers  build the providers into $(COMPONENTS)"
	@echo "make languages  build those that are not in Rust"
	@echo "make setup      only see to the Debian packages that the tests need"
	@echo "tests/setup/fresh.sh  run one of these in a fresh Debian 12: tests/setup/fresh.sh nothing make demo"
	@echo "make clean      remove what was built, and the cache in .cache"
	@echo
	@echo "Each of them first sees to what it needs, and says so."

setup:
	@tests/setup/packages.sh test

demo:
	@tests/setup/packages.sh demo
	@$(MAKE) programs providers
	$(FLEECEBOX) demo --components $(COMPONENTS)

demo-vm:
	@tests/setup/packages.sh demo-vm
	@$(MAKE) programs providers
	$(FLEECEBOX) demo --vm --components $(COMPONENTS)

# No failure hides what else there is to see: not one of a suite's, nor that of a provider's build, which may need a
# registry of packages.
test: setup
	@$(MAKE) build providers
	@rm -f $(CARGO_TARGET_DIR)/worst-writes.tsv $(CARGO_TARGET_DIR)/not-shown.tsv
	@$(MAKE) languages || languages=failed; \
	echo "cargo test --release --locked --workspace --no-fail-fast"; \
	cargo test --release --locked --workspace --no-fail-fast; tests=$$?; \
	tests/setup/worst-writes.sh $(CARGO_TARGET_DIR)/worst-writes.tsv; \
	tests/setup/not-shown.sh $(CARGO_TARGET_DIR)/not-shown.tsv; \
	[ -z "$$languages" ] || echo "Not all providers in other languages than Rust could be built; why is told before the tests."; \
	[ $$tests = 0 ] && [ -z "$$languages" ]

zoo: setup
	@$(MAKE) build providers
	cargo test --release --locked --workspace --test zoo -- $(WORDS)

SECONDS ?= 60
soak: setup
	@$(MAKE) build providers
	cargo test --release --locked --workspace --test soak -- --seconds $(SECONDS) $(SEED:%=--seed %)

# With the tests' program: one row stops it at a step.
bench:
	@tests/setup/packages.sh bench
	@$(MAKE) build providers
	TMPDIR=$${FLEECEBOX_BENCH_FOLDER:-/dev/shm} cargo bench --locked --workspace --bench speed

bench-languages:
	@tests/setup/packages.sh bench
	@$(MAKE) programs providers languages
	TMPDIR=$${FLEECEBOX_BENCH_FOLDER:-/dev/shm} cargo bench --locked --workspace --bench languages

fuzz:
	@tests/fuzz/fuzz.sh $(SECONDS)

lint:
	cargo fmt --all --check
	cargo clippy --release --locked --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --release --locked --workspace --no-deps --document-private-items
	RUSTFLAGS="--cfg fuzzing" cargo check --locked --manifest-path tests/fuzz/Cargo.toml --target-dir $(CARGO_TARGET_DIR)/fuzz-check
	@if ! cargo deny --version >/dev/null 2>&1; then \
		echo "the licences and sources of what is depended on are not checked (deny.toml): there is no cargo-deny; type: cargo install --locked cargo-deny"; \
		exit; fi; \
	cargo deny --locked check licenses bans sources || exit; \
	if ls -d $${CARGO_HOME:-$$HOME/.cargo}/advisory-dbs/*/ >/dev/null 2>&1; then \
		cargo deny --locked --offline check advisories; \
	else echo "no known advisories are looked for: there is no copy of their database; type: cargo deny fetch"; fi

# Always the whole workspace: cargo settles the features of dependencies for all that it builds at once, so that another
# choice of packages would compile wasmtime again. What only tests need turns on no more (tests/Cargo.toml).
programs:
	@echo "building fleecebox; the first time takes some minutes, most of them for wasmtime"
	cargo build --release --locked --workspace --bins

# Besides the tests, fleecebox itself as they need it: it can be stopped at a step (the feature `stops`).
build:
	@echo "building fleecebox and its tests; the first time takes some minutes, most of them for wasmtime"
	cargo test --release --locked --workspace --no-run

# Flags for all targets would hide those for this one. The hostile providers are for tests and the demonstration.
providers:
	@config=$$(guest-sdk/wasm-std.sh) && unset RUSTFLAGS CARGO_ENCODED_RUSTFLAGS CARGO_BUILD_TARGET && \
	build="cargo build --release --locked --target wasm32-unknown-unknown" && \
	echo "building the providers" && \
	$$build --config "$$config" $(PROVIDERS:%=-p %) $(TEST_PROVIDERS:%=-p %) && \
	$$build --config "$$config" -p hostile -p planted --examples
	@mkdir -p $(COMPONENTS)
	@for name in $(PROVIDERS) $(TEST_PROVIDERS); do \
		install -C -m 644 "$(WASM)/$$(echo $$name | tr - _).wasm" "$(COMPONENTS)/$$name.wasm" || exit; done
	@for name in $(HOSTILE); do \
		install -C -m 644 "$(WASM)/examples/$$(echo $$name | tr - _).wasm" "$(COMPONENTS)/$$name.wasm" || exit; done
	@echo "the providers are in $(COMPONENTS)"

languages:
	@test -x $(FLEECEBOX) || $(MAKE) programs
	@new=$$(mktemp -d) && trap 'rm -rf "$$new"' EXIT && fleecebox=$$(realpath $(FLEECEBOX)) && export PATH="$${fleecebox%/*}:$$PATH" && \
	for name in $(NEW_PROJECTS); do \
		case $$name in *-blind) blind=--blind ;; *) blind= ;; esac; \
		(cd "$$new" && fleecebox provider new "$$name" --lang "$${name%-*}" $$blind >/dev/null) || exit; \
	done && \
	providers/build.sh $(COMPONENTS) $(foreach name,$(LANGUAGES),$(name) providers/$(name)) \
		$$(for name in $(NEW_PROJECTS); do echo "$$name $$new/$$name"; done)

clean:
	cargo clean
	rm -rf .cache
