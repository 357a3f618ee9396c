# The build of flexnbd. `make help` lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := all
.DELETE_ON_ERROR:

PREFIX ?= /usr/local
CARGO ?= cargo
TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)
RELEASE := $(TARGET_DIR)/release
BINARY := $(RELEASE)/flexnbd
ASSETS := $(RELEASE)/assets
# The client of the benchmarks.
LOAD := $(RELEASE)/examples/load
SOURCES := Cargo.toml Cargo.lock README.md $(shell find src -name '*.rs')

# At a terminal the deadline must not put its child into a process group of its own, or Ctrl-C would not reach it.
FOREGROUND := $(shell test -t 0 && echo --foreground)
# $(call within,SECONDS) runs a command that is killed after so long.
within = timeout $(FOREGROUND) --kill-after=10 $(1)

# The first line of what needs it; to install what is built does not.
need_cargo = @command -v $(CARGO) >/dev/null || \
	{ echo "error: there is no $(CARGO): install Rust 1.85 or newer, by rustup or as your system's package cargo" >&2; exit 1; }

.PHONY: all check test test-slow test-kernel test-cluster chaos chaos-teeth simulation-teeth tools tools-kernel tools-cluster \
	tools-fuzz demo bench bench-storms bench-migration bench-cluster bench-proxy footprint fuzz fuzz-seeds fuzz-coverage install uninstall deb \
	reproducible clean help

all: $(BINARY) ## Build the release program (the default)

# What panics say of the source of a dependency does not name the folders of the machine that built it. They are known once the
# packages are there.
CARGO_HOME_DIR := $(or $(CARGO_HOME),$(HOME)/.cargo)
HOST = $$(rustc -vV | sed -n 's/^host: //p')
remapped = $(call within,900) $(CARGO) fetch --locked --quiet --target "$(HOST)" && \
	for sources in $(CARGO_HOME_DIR)/registry/src/*; do RUSTFLAGS+=" --remap-path-prefix=$$sources=."; done && export RUSTFLAGS

# The touch keeps make's view right when cargo finds nothing to do, so that `make install` never has to ask cargo.
$(BINARY): $(SOURCES)
	$(need_cargo)
	$(remapped) && $(call within,1800) $(CARGO) build --release --locked
	touch $@

$(LOAD): $(SOURCES) tests/bench/load.rs $(wildcard tests/bench/client/*.rs)
	$(need_cargo)
	$(remapped) && $(call within,1800) $(CARGO) build --release --locked --example load
	touch $@

check: tools-fuzz ## Formatting, lints as errors (the fuzz targets' as well), documentation, import directions
	$(need_cargo)
	$(call within,60) $(CARGO) fmt --check
	$(call within,60) $(CARGO) fmt --check --manifest-path fuzz/Cargo.toml
	$(call within,1800) $(CARGO) clippy --all-targets --locked -- -D warnings
	$(call within,1800) $(CARGO) clippy --all-targets --locked --manifest-path fuzz/Cargo.toml -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(call within,1800) $(CARGO) doc --no-deps --document-private-items --locked
	$(call within,60) bash tests/imports.sh
	$(call within,120) bash tests/imports_test.sh

# $(call run_tests,ARGUMENTS,ENVIRONMENT) runs tests, inside $(call report,COMMANDS): tests that a machine cannot run write why
# into a list, which comes last.
NOT_TESTED := $(abspath $(TARGET_DIR))/not-tested
run_tests = $(2) FLEXNBD_NOT_TESTED=$(NOT_TESTED) $(call within,2700) $(CARGO) test --locked $(1) || status=$$?
report = @rm -f $(NOT_TESTED); status=0; $(1); \
	if [ -s $(NOT_TESTED) ]; then echo "not tested here:"; sort -u $(NOT_TESTED) | sed 's/^/  /'; \
	else echo "not tested here: nothing"; fi; \
	exit $$status

# What touches the disk runs a second time as where there is no ring.
DISK_TESTS := bad_disk durability killswitch migration::ordinary sparse spec:: transfer
test: tools ## All tests but the slow ones, installing the tools they need
	$(need_cargo)
	$(call within,1800) $(CARGO) test --locked --doc
	$(call report,$(call run_tests,--tests); \
		$(call run_tests,--test integration -- $(DISK_TESTS),FLEXNBD_TEST_DISK_ENGINE=sync))

test-slow: tools ## The tests that take minutes of real time
	$(need_cargo)
	$(call report,$(call run_tests,--tests -- --ignored))

test-kernel: $(BINARY) tools-kernel ## A real kernel's disk on flexnbd, migrated, relayed, copied, grown, and behind a proxy (qemu; Debian on amd64, as root)
	FLEXNBD=$(BINARY) $(call within,1800) bash tests/kernel/run.sh

test-cluster: $(BINARY) tools-cluster ## Images on a volume that loses copies and its quorum (GlusterFS; Debian, as root)
	FLEXNBD=$(BINARY) $(call within,2700) bash tests/cluster/volume.sh python3 tests/cluster/exercise.py

# What the tests run, each with the Debian package it is in.
TOOLS := qemu-io:qemu-utils nbdkit:nbdkit nbdcopy:libnbd-bin nbdsh:python3-libnbd fio:fio nbd-server:nbd-server \
	nbd-client:nbd-client strace:strace mkfs.xfs:xfsprogs mkfs.btrfs:btrfs-progs mkfs.ext4:e2fsprogs ip:iproute2 \
	unshare:util-linux losetup:mount script:bsdutils systemd-analyze:systemd dpkg-deb:dpkg
tools-kernel: TOOLS := qemu-system-x86_64:qemu-system-x86 nbd-client:nbd-client busybox:busybox-static cpio:cpio \
	modprobe:kmod mkfs.ext4:e2fsprogs mkfs.btrfs:btrfs-progs fstrim:util-linux mount:mount perl:perl-base
tools-cluster: TOOLS := glusterd:glusterfs-server gluster:glusterfs-cli mount.glusterfs:glusterfs-client fio:fio \
	ip:iproute2 unshare:util-linux umount:mount
# The library that drives the fuzz targets is compiled from C++.
tools-fuzz: TOOLS := c++:g++
# System programs are not on everybody's path.
tools tools-kernel tools-cluster tools-fuzz: export PATH := $(PATH):/usr/sbin:/sbin
tools tools-kernel tools-cluster tools-fuzz: ## Install the clients and servers the tests run against (Debian, as root), or name what is missing
	@missing() { for tool in $(TOOLS); do command -v "$${tool%%:*}" >/dev/null || echo "$${tool##*:}"; done; }; \
	packages=$$(missing | xargs); \
	if [ -n "$$packages" ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing: $$packages"; \
		export DEBIAN_FRONTEND=noninteractive; \
		$(call within,300) apt-get update -qq </dev/null; \
		$(call within,900) apt-get install -y -qq --no-remove --no-install-recommends $$packages </dev/null || true; \
		packages=$$(missing | xargs); \
	fi; \
	if [ -n "$$packages" ]; then \
		echo "error: these Debian packages (or their like) must be installed: $$packages" >&2; \
		exit 1; \
	fi

chaos: ## Migrations while everything goes wrong that a seed decides (ROUNDS=1000, SEED=1)
	$(need_cargo)
	FLEXNBD_SEED=$(or $(SEED),1) FLEXNBD_ROUNDS=$(or $(ROUNDS),1000) \
		$(call within,$$((1800 + 10 * $(or $(ROUNDS),1000)))) $(CARGO) test --locked --test chaos -- --nocapture rounds

chaos-teeth: ## Show that those rounds find a program that is broken in one of five ways (ROUNDS=40, SEED=1, ONLY=regex)
	ROUNDS=$(ROUNDS) SEED=$(SEED) ONLY="$(ONLY)" $(call within,7200) bash tests/chaos/teeth.sh

simulation-teeth: ## Show that the simulation finds promises of proxies and migrations broken in twelve ways (ONLY=regex)
	ONLY="$(ONLY)" $(call within,7200) bash tests/simulation/teeth.sh

demo: $(BINARY) ## Show migrations under a client that goes on, in half a minute
	FLEXNBD=$(BINARY) $(call within,120) bash tests/demo.sh

# ROWS=regex runs some rows, BASE=binary compares with another flexnbd; all that can be set is in the script.
bench: $(BINARY) $(LOAD) tools ## Compare with other servers (QUICK=1, ROWS=regex, ROUNDS=9, SECONDS_PER_RUN=2, BASE=binary)
	FLEXNBD=$(BINARY) LOAD=$(LOAD) $(call within,10800) python3 tests/bench/bench.py

bench-storms: $(BINARY) $(LOAD) tools ## What a quiet client waits beside storming ones (QUICK=1, ROWS=regex, ROUNDS=3, BASE=binary)
	FLEXNBD=$(BINARY) LOAD=$(LOAD) $(call within,7200) python3 tests/bench/storms.py

bench-migration: $(BINARY) tools ## Migrate beside nbdcopy (QUICK=1, ROUNDS=5, SIZE_MIB=1024, BENCH_DIR=/var/tmp)
	FLEXNBD=$(BINARY) $(call within,7200) python3 tests/bench/migration.py

bench-cluster: $(BINARY) $(LOAD) tools tools-cluster ## Compare on a volume with three copies (as bench; as root)
	FLEXNBD=$(BINARY) LOAD=$(LOAD) $(call within,10800) bash tests/cluster/volume.sh python3 tests/bench/bench.py

bench-proxy: $(BINARY) $(LOAD) ## What a proxy costs between a client and its server (QUICK=1, ROUNDS=5, SECONDS_PER_RUN=2)
	FLEXNBD=$(BINARY) LOAD=$(LOAD) $(call within,3600) python3 tests/bench/proxy.py

reproducible: ## Show that two builds in two folders give the same program, which names neither
	$(need_cargo)
	CARGO="$(CARGO)" $(call within,3600) bash tests/reproducible.sh

footprint: $(BINARY) tools ## Measure size, memory and system calls
	FLEXNBD=$(BINARY) $(call within,300) bash tests/footprint.sh

# Without a sanitizer a stable compiler will do, and what the targets reach has no unsafe code.
FUZZ_CHOSEN = $(or $(TARGET),$(notdir $(basename $(wildcard fuzz/fuzz_targets/*.rs))))
FUZZ := env CARGO="$(CARGO)" bash fuzz/fuzz.sh
TIME ?= 60
fuzz: tools-fuzz ## Fuzz all targets one after another, each for TIME seconds (TIME=60, TARGET=one of them)
	$(call within,$$((900 + $(words $(FUZZ_CHOSEN)) * ($(TIME) + 900)))) $(FUZZ) run $(TIME) $(FUZZ_CHOSEN)

fuzz-seeds: tools-fuzz ## Add to fuzz/seeds what fuzzing has found and the seeds do not reach (TARGET)
	$(call within,14400) $(FUZZ) seeds $(FUZZ_CHOSEN)

fuzz-coverage: tools-fuzz ## Name the functions that no input of the fuzzers reaches (TARGET; needs rustup's llvm-tools)
	$(call within,14400) $(FUZZ) coverage $(FUZZ_CHOSEN)

BIN_DIR = $(DESTDIR)$(PREFIX)/bin
MAN_DIR = $(DESTDIR)$(PREFIX)/share/man/man1
BASH_DIR = $(DESTDIR)$(PREFIX)/share/bash-completion/completions
ZSH_DIR = $(DESTDIR)$(PREFIX)/share/zsh/site-functions
FISH_DIR = $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d
UNIT_DIR = $(DESTDIR)$(PREFIX)/lib/systemd/system
SYSUSERS = $(DESTDIR)$(PREFIX)/lib/sysusers.d/flexnbd.conf
UNITS := $(notdir $(wildcard $(foreach kind,service socket timer,src/dist/*.$(kind))))
# flexnbd-proxy is the mode proxy, by the name of the link.
PROGRAMS := flexnbd flexnbd-proxy
# For uninstall, which must not take the pages of other programs whose names begin alike.
MODES := acl break help limit listen mirror mirror-speed proxy read resize serve snapshot status switch write

install: $(BINARY) ## Install the program, manual pages, completions and units (DESTDIR, PREFIX=/usr/local)
	install -D -m 755 $(BINARY) $(BIN_DIR)/flexnbd
	ln -sf flexnbd $(BIN_DIR)/flexnbd-proxy
	install -D -m 644 -t $(MAN_DIR) $(ASSETS)/*.1
	install -D -m 644 $(ASSETS)/flexnbd.bash $(BASH_DIR)/flexnbd
	install -D -m 644 $(ASSETS)/flexnbd-proxy.bash $(BASH_DIR)/flexnbd-proxy
	install -D -m 644 -t $(ZSH_DIR) $(PROGRAMS:%=$(ASSETS)/_%)
	install -D -m 644 -t $(FISH_DIR) $(PROGRAMS:%=$(ASSETS)/%.fish)
	install -D -m 644 -t $(UNIT_DIR) $(UNITS:%=src/dist/%)
	install -D -m 644 src/dist/sysusers.conf $(SYSUSERS)

uninstall: ## Remove what install put there
	rm -f $(PROGRAMS:%=$(BIN_DIR)/%) $(MAN_DIR)/flexnbd.1 $(MODES:%=$(MAN_DIR)/flexnbd-%.1)
	rm -f $(PROGRAMS:%=$(BASH_DIR)/%) $(PROGRAMS:%=$(ZSH_DIR)/_%) $(PROGRAMS:%=$(FISH_DIR)/%.fish)
	rm -f $(UNITS:%=$(UNIT_DIR)/%) $(SYSUSERS)

PACKAGE_ROOT = $(RELEASE)/package
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml)
deb: $(BINARY) ## Build a Debian package with the program, manual pages, completions and units (dpkg-deb)
	rm -rf $(PACKAGE_ROOT)
	@$(MAKE) --no-print-directory -o $(BINARY) install DESTDIR=$(PACKAGE_ROOT) PREFIX=/usr
	$(call within,300) bash src/dist/deb/build.sh $(PACKAGE_ROOT) $(VERSION) $(RELEASE)

clean: ## Remove everything built
	$(CARGO) clean
	rm -rf fuzz/target

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z -]+:.*## / { split($$1, names, " "); printf "  make %-16s %s\n", names[1], $$2 }' Makefile
