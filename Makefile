# What each target does is in README.md. Everything a target needs, it sets up.
# One set of flags for every command: another one would compile everything again.
export GOFLAGS := -tags=remote,containers_image_openpgp,exclude_graphdriver_btrfs -trimpath
export CGO_ENABLED := 0

PROGRAMS := resultity-agent resultity-bridge resultity-signer resultityctl resultity-network
BUILD    := go build -ldflags '-s -w'

.PHONY: all build test attack fuzz fuzz-short lint bench soak demo demo-down clean
all: build

build: $(PROGRAMS:%=build/bin/%)

.PHONY: $(PROGRAMS:%=build/bin/%)
$(PROGRAMS:%=build/bin/%): build/bin/%:
	$(BUILD) -o $@ ./cmd/$*

# What a package contains, of what `make build` has built: root need not have Go.
# packaging/scripts/postinstall.sh does the rest.
.PHONY: install
install:
	install -C -D -m 0755 -t $(DESTDIR)/usr/bin build/bin/resultity-agent build/bin/resultityctl
	install -C -D -m 0755 -t $(DESTDIR)/usr/libexec/resultity build/bin/resultity-bridge build/bin/resultity-signer packaging/scripts/postinstall.sh
	install -d -m 0755 $(DESTDIR)/usr/libexec/resultity/empty
	install -C -D -m 0644 -t $(DESTDIR)/usr/lib/systemd/user units/resultity-agent.service units/resultity-podman.socket units/resultity-podman.service units/resultity-scrub.timer units/resultity-scrub.service
	install -C -D -m 0644 -t $(DESTDIR)/usr/lib/systemd/system units/resultity-signer.socket units/resultity-signer.service
	install -C -D -m 0644 units/sysusers.conf $(DESTDIR)/usr/lib/sysusers.d/resultity.conf
	install -C -D -m 0644 units/tmpfiles.conf $(DESTDIR)/usr/lib/tmpfiles.d/resultity.conf
	install -C -D -m 0644 units/user.preset $(DESTDIR)/usr/lib/systemd/user-preset/90-resultity.preset
	install -C -D -m 0644 units/system.preset $(DESTDIR)/usr/lib/systemd/system-preset/90-resultity.preset
	install -C -D -m 0644 -t $(DESTDIR)/usr/lib/systemd/catalog units/resultity.catalog
	install -C -D -m 0644 -t $(DESTDIR)/usr/share/doc/resultity-agent internal/config/agent.toml README.md LICENSE

# What a package of the network service contains, likewise.
.PHONY: install-network
install-network:
	install -C -D -m 0755 -t $(DESTDIR)/usr/bin build/bin/resultity-network
	install -C -D -m 0644 -t $(DESTDIR)/usr/lib/systemd/system units/resultity-network.service
	install -C -D -m 0644 units/network-sysusers.conf $(DESTDIR)/usr/lib/sysusers.d/resultity-network.conf
	install -C -D -m 0644 -t $(DESTDIR)/usr/lib/systemd/catalog units/resultity-network.catalog
	install -C -D -m 0644 units/network-tmpfiles.conf $(DESTDIR)/usr/lib/tmpfiles.d/resultity-network.conf
	install -C -D -m 0644 -t $(DESTDIR)/usr/share/doc/resultity-network internal/network/network.toml README.md LICENSE

# The network service checks every node's signatures; with cgo and libsecp256k1
# that is five times faster.
build/bin/resultity-network: export CGO_ENABLED := 1

test:
	CGO_ENABLED=1 go test -race -timeout 20m $$(go list ./internal/... ./cmd/...)
	go test -count=1 -timeout 45m ./test/... ./packaging/...

lint:
	.ci/lint

# Every hostile case that there is, as one table. HOSTS= leaves out those on hosts.
HOSTS := -hosts
attack:
	go run ./test/attack $(HOSTS)

# Every fuzz target for five minutes; FOR=1m for less. `go test` alone tries what
# was found before.
fuzz:
	go run ./test/fuzz $(if $(FOR),-for $(FOR))

# As many inputs for each on every machine: for CI, with what it has built already.
fuzz-short:
	go run ./test/fuzz -blind -for 2000x

demo: build
	go run ./test/demo $(if $(KEEP),-keep)

demo-down:
	go run ./test/demo -down

bench: build
	go run ./test/bench

# An hour of faults in an order that SEED decides; FOR=10m for less.
soak: build
	go run ./test/faults/soak $(if $(FOR),-for $(FOR)) $(if $(SEED),-seed $(SEED))

clean:
	rm -rf build dist
