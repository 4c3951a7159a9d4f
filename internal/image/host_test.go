package image_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/resultity/node/internal/image"
	"github.com/resultity/node/internal/podman"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/test/host"
	"github.com/resultity/node/test/oci"
)

// This file shows the package a real Podman on real hosts. The agent's part is
// played there by this test binary, started again as the account's process.

const asAgent = "IMAGE_TEST_AGENT"

func TestMain(m *testing.M) {
	if os.Getenv(asAgent) != "" {
		agent()
		return
	}
	os.Exit(m.Run())
}

// order is what the agent's stand-in is told on stdin, and report its answer.
type order struct {
	Do        string // ensure, verify, retain, pull, remove or look
	Socket    string
	PolicyDir string
	CA        []byte
	Refs      []snapshot.ImageRef // what it is about
	Keep      []snapshot.ImageRef
	Trust     snapshot.ImageTrust
	Now       *snapshot.ImageTrust // nil for Trust
	Container string
}

type report struct {
	Error string   // "" if all went well
	Kinds []string // the named errors that Error is

	Version   podman.Version
	Info      podman.Info
	Container podman.ContainerState
	Gone      []snapshot.ImageRef
}

// kinds are the errors that a report can name.
var kinds = map[string]error{
	"unsigned": image.ErrUnsigned, "wrong key": image.ErrWrongKey, "other digest": image.ErrOtherDigest,
	"identity": image.ErrIdentity, "pull": image.ErrPull, "expired": image.ErrExpired, "revoked": image.ErrRevoked,
	"other bytes": image.ErrOtherBytes, "manifest": image.ErrManifest, "platform": image.ErrPlatform, "too large": image.ErrTooLarge, "altered": image.ErrAltered,
	"refused": podman.ErrRefused, "refused by its code": image.ErrStandIn, "not found": podman.ErrNotFound, "in use": podman.ErrInUse,
	"other image": podman.ErrOtherImage, "unavailable": podman.ErrUnavailable,
}

func agent() {
	var orders []order
	var rs []report
	err := json.NewDecoder(os.Stdin).Decode(&orders)
	for _, o := range orders {
		var r report
		if err := o.carryOut(context.Background(), &r); err != nil {
			r.Error = err.Error()
			for k, e := range kinds {
				if errors.Is(err, e) {
					r.Kinds = append(r.Kinds, k)
				}
			}
			slices.Sort(r.Kinds)
		}
		rs = append(rs, r)
	}
	if err := errors.Join(err, json.NewEncoder(os.Stdout).Encode(rs)); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func (o *order) carryOut(ctx context.Context, r *report) error {
	p, err := podman.Dial(ctx, o.Socket)
	if err != nil {
		return err
	}
	defer p.Close()
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(o.CA)
	tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}
	images, err := image.New(tr, p, o.PolicyDir, o.CA, slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	switch o.Do {
	case "ensure":
		now := o.Now
		if now == nil {
			now = &o.Trust
		}
		return images.Ensure(ctx, o.Refs[0], &o.Trust, now)
	case "verify":
		return images.Verify(ctx, o.Refs[0])
	case "retain":
		return images.Retain(ctx, o.Keep...)
	case "pull":
		return p.Pull(ctx, o.Refs[0], io.Discard)
	case "remove":
		r.Gone, err = p.RemoveImages(ctx, o.Refs, o.Keep)
		return err
	case "look":
		if r.Version, err = p.Version(ctx); err != nil {
			return err
		}
		if r.Info, err = p.Info(ctx); err != nil {
			return err
		}
		r.Container, err = p.Container(ctx, o.Container)
		return err
	}
	return fmt.Errorf("cannot %q", o.Do)
}

func TestOnHosts(t *testing.T) {
	program := filepath.Join(t.TempDir(), "pause")
	build := exec.Command("go", "build", "-trimpath", "-o", program, "./testdata/pause")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	pause, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	lab, err := host.Create(t.Context(), host.Options{Name: fmt.Sprintf("image-%d", os.Getpid()), Reachable: true, Progress: t.Output()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := lab.Close(); err != nil {
			t.Error(err)
		}
	})
	for _, release := range []host.Release{host.Trixie, host.Forky} {
		t.Run(string(release), func(t *testing.T) {
			t.Parallel()
			onHost(t, lab, release, pause)
		})
	}
}

const (
	account = "op"
	goarch  = goruntime.GOARCH
)

// site is a host with an account, a registry that it reaches, and what the two
// are asked to do.
type site struct {
	t     *testing.T
	h     *host.Host
	reg   *oci.Registry
	host  string // the registry's
	log   *requests
	order order // what all orders have in common
}

func newSite(t *testing.T, lab *host.Lab, release host.Release) *site {
	t.Helper()
	h, err := lab.Up(t.Context(), host.Config{Name: string(release), Release: release})
	if err != nil {
		t.Fatal(err)
	}
	s := &site{t: t, h: h, log: &requests{}}
	var addr string
	addr, s.order.CA = s.log.serve(t, lab.Addr())
	s.host = addr
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(s.order.CA)
	s.reg = oci.NewRegistry(addr, pool)
	t.Cleanup(s.reg.Close)

	// An ordinary account, whose own Podman lets everything in.
	s.root("useradd", "--create-home", account)
	s.root("loginctl", "enable-linger", account)
	uid := s.root("id", "-u", account)
	s.root("systemctl", "start", "user@"+uid+".service")
	home := "/home/" + account
	s.as("mkdir", "-p", home+"/.config/containers/registries.d")
	s.as("sh", "-c", `echo '{"default":[{"type":"insecureAcceptAnything"}]}' >~/.config/containers/policy.json`)
	// The account takes part: the units ask for this file.
	s.as("sh", "-c", "mkdir ~/.config/resultity && touch ~/.config/resultity/agent.toml")
	for _, unit := range []string{"resultity-podman.socket", "resultity-podman.service"} {
		raw, err := os.ReadFile(filepath.Join("../../units", unit))
		if err != nil {
			t.Fatal(err)
		}
		if err := h.WriteFile("/etc/systemd/user/"+unit, raw, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	s.as("systemctl", "--user", "daemon-reload")
	s.as("systemctl", "--user", "start", "resultity-podman.socket")
	s.order.Socket = "/run/user/" + uid + "/resultity-podman/podman.sock"
	s.order.PolicyDir = home + "/.local/state/resultity/agent/podman/.config/containers"

	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := h.CopyTo(self, "/usr/local/bin/agent"); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *site) root(args ...string) string {
	s.t.Helper()
	out, err := s.h.Output(s.t.Context(), args...)
	if err != nil {
		s.t.Fatalf("%q: %v: %s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

func (s *site) as(args ...string) string {
	s.t.Helper()
	out, err := s.h.OutputAs(s.t.Context(), account, args...)
	if err != nil {
		s.t.Fatalf("%q: %v: %s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// do has the agent's stand-in carry out an order.
func (s *site) do(o order) report {
	s.t.Helper()
	return s.all(o)[0]
}

// all has it carry out several, one after the other.
func (s *site) all(orders ...order) []report {
	s.t.Helper()
	for i := range orders {
		o := &orders[i]
		o.Socket, o.PolicyDir, o.CA = s.order.Socket, s.order.PolicyDir, s.order.CA
	}
	in, err := json.Marshal(orders)
	if err != nil {
		s.t.Fatal(err)
	}
	var out bytes.Buffer
	err = s.h.Exec(s.t.Context(), host.Cmd{User: account, Args: []string{"/usr/local/bin/agent"}, Env: []string{asAgent + "=1"}, Stdin: bytes.NewReader(in), Stdout: &out})
	if err != nil {
		s.t.Fatalf("%s: %v", orders[0].Do, err)
	}
	var rs []report
	if err := json.Unmarshal(out.Bytes(), &rs); err != nil || len(rs) != len(orders) {
		s.t.Fatalf("%s: %v: %s", orders[0].Do, err, out.Bytes())
	}
	for i, r := range rs {
		s.t.Logf("%s %v: %s", orders[i].Do, orders[i].Refs, r.Error)
	}
	return rs
}

// err is the error that was reported.
func (r report) err() error {
	var errs []error
	for _, k := range r.Kinds {
		errs = append(errs, kinds[k])
	}
	if r.Error != "" {
		errs = append(errs, errors.New(r.Error))
	}
	return errors.Join(errs...)
}

// in is the site for a part of its test.
func (s *site) in(t *testing.T) *site {
	part := *s
	part.t = t
	return &part
}

// want fails the test unless the report names exactly these errors.
func (s *site) want(r report, kinds ...string) {
	s.t.Helper()
	slices.Sort(kinds)
	if !slices.Equal(r.Kinds, kinds) || (r.Error == "") != (len(kinds) == 0) {
		s.t.Errorf("error %q is %q, want %q", r.Error, r.Kinds, kinds)
	}
}

func (s *site) push(repo, what string, program []byte) (name.Digest, snapshot.ImageRef) {
	s.t.Helper()
	img, err := oci.Single("program", append(slices.Clone(program), what...))
	if err != nil {
		s.t.Fatal(err)
	}
	d, err := s.reg.Push(s.t.Context(), repo, img)
	if err != nil {
		s.t.Fatal(err)
	}
	ref, err := snapshot.ParseImageRef(d.String())
	if err != nil {
		s.t.Fatal(err)
	}
	return d, ref
}

func onHost(t *testing.T, lab *host.Lab, release host.Release, pause []byte) {
	s := newSite(t, lab, release)
	sign := func(d name.Digest, k *oci.Key) {
		t.Helper()
		if err := s.reg.Sign(t.Context(), d, k); err != nil {
			t.Fatal(err)
		}
	}
	ours, err := oci.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	pub, err := ours.PublicPEM()
	if err != nil {
		t.Fatal(err)
	}
	trust := snapshot.ImageTrust{Keys: []string{string(pub)}}

	// Before there is a configuration, nothing comes in. The registry's
	// authority is not known either by then, so the machine lends it.
	good, goodRef := s.push("net/runtime", "good", pause)
	authority := "/etc/containers/certs.d/" + good.RegistryStr() + "/ca.crt"
	if err := s.h.WriteFile(authority, s.order.CA, 0o644); err != nil {
		t.Fatal(err)
	}
	s.want(s.do(order{Do: "pull", Refs: []snapshot.ImageRef{goodRef}}), "refused")
	sign(good, ours)
	s.want(s.do(order{Do: "pull", Refs: []snapshot.ImageRef{goodRef}}), "refused")

	s.root("rm", "-r", filepath.Dir(authority))

	// Signed: it comes, into the account's own storage, and its Podman runs it.
	s.want(s.do(order{Do: "ensure", Refs: []snapshot.ImageRef{goodRef}, Trust: trust}))
	s.as("podman", "image", "exists", goodRef.String())
	s.as("podman", "run", "--detach", "--pull=never", "--name=r", "--network=none", "--read-only", "--cap-drop=all", goodRef.String())

	// What is stored is looked at: a byte of a layer, a file more, a file less. It
	// is removed then, and fetched again.
	s.as("podman", "rm", "--force", "--time=0", "r")
	diff := "$(ls -d ~/.local/share/containers/storage/overlay/*/diff | grep -v '/l/' | while read d; do test -e $d/program && echo $d; done)"
	for _, how := range []string{
		"printf X | dd of=" + diff + "/program conv=notrunc bs=1 status=none",
		"d=" + diff + "; t=$(stat -c %y $d/etc); touch $d/etc/ld.so.preload; touch -d \"$t\" $d/etc",
		"d=" + diff + "; chmod u+w $d; rm $d/program; chmod u-w $d",
	} {
		s.want(s.do(order{Do: "verify", Refs: []snapshot.ImageRef{goodRef}}))
		s.as("sh", "-ec", how)
		r := s.all(order{Do: "verify", Refs: []snapshot.ImageRef{goodRef}}, order{Do: "ensure", Refs: []snapshot.ImageRef{goodRef}, Trust: trust}, order{Do: "verify", Refs: []snapshot.ImageRef{goodRef}})
		s.want(r[0], "altered")
		s.want(r[1])
		s.want(r[2])
	}
	s.as("podman", "run", "--detach", "--pull=never", "--name=r", "--network=none", "--read-only", "--cap-drop=all", goodRef.String())

	// The table of all images, to each lock alone.
	m := newMaker(t, s.reg, s.log, s.host, pause)
	for _, c := range lockCases {
		t.Run(c.name, func(t *testing.T) {
			c.try(t, m, func(ref snapshot.ImageRef, own, now *snapshot.ImageTrust) (agent, podman error) {
				refs := []snapshot.ImageRef{ref}
				orders := []order{{Do: "ensure", Refs: refs, Trust: *own, Now: now}, {Do: "pull", Refs: refs}}
				if c.agent != nil && c.podman == nil {
					orders = append(orders, order{Do: "remove", Refs: refs}) // nobody else would
				}
				r := s.in(t).all(orders...)
				return r[0].err(), r[1].err()
			})
		})
	}
	s.want(s.do(order{Do: "ensure", Refs: []snapshot.ImageRef{goodRef}, Trust: trust}))
	// Signed by the right key, in a repository that the configuration does not name.
	elsewhere, elsewhereRef := s.push("net/else", "else", nil)
	sign(elsewhere, ours)
	s.want(s.do(order{Do: "pull", Refs: []snapshot.ImageRef{elsewhereRef}}), "refused")
	// Signed in the format that Podman cannot read.
	bundled, bundledRef := s.push("net/runtime", "bundled", nil)
	if err := s.reg.SignBundle(t.Context(), bundled, ours); err != nil {
		t.Fatal(err)
	}
	r := s.do(order{Do: "ensure", Refs: []snapshot.ImageRef{bundledRef}, Trust: trust})
	if !strings.Contains(r.Error, "--new-bundle-format=false") {
		t.Errorf("does not say what to do: %s", r.Error)
	}
	_, unsignedRef := s.push("net/runtime", "unsigned", nil)
	// The account's own Podman has the policy that it had.
	s.as("podman", "pull", "--quiet", "--tls-verify=false", unsignedRef.String())

	// What Podman knows.
	r = s.do(order{Do: "look", Container: "r"})
	s.want(r)
	if want := s.as("podman", "version", "--format={{.Client.Version}}"); r.Version.String() != want || r.Info.Version != r.Version {
		t.Errorf("version %v and %v, want %s", r.Version, r.Info.Version, want)
	}
	i := r.Info
	if i.GraphDriver != "overlay" || !i.Rootless || i.StorageFree <= 0 || i.CgroupVersion != "v2" || i.SubordinateUIDs < 65536 ||
		!strings.HasPrefix(i.OCIRuntime, "crun") || !strings.HasPrefix(i.GraphRoot, "/home/"+account+"/") || !i.Seccomp {
		t.Errorf("info %+v", i)
	}
	c := r.Container
	if pid := s.as("podman", "inspect", "--format={{.State.Pid}}", "r"); !c.Running || fmt.Sprint(c.PID) != pid ||
		c.ImageDigest != goodRef.Digest() || c.Network != "none" || !c.ReadOnly || c.Privileged || len(c.Capabilities) != 0 || time.Since(c.Started) > time.Hour {
		t.Errorf("container %+v, pid %s", c, pid)
	}
	s.want(s.do(order{Do: "look", Container: "nobody"}), "not found")

	// Nothing that a container needs, and nothing that we did not bring, goes.
	s.want(s.do(order{Do: "retain"}), "in use")
	s.as("podman", "image", "exists", goodRef.String())
	s.want(s.do(order{Do: "retain", Keep: []snapshot.ImageRef{goodRef}}))
	s.as("podman", "rm", "--force", "--time=0", "r")
	s.want(s.do(order{Do: "retain"}))
	if left := s.as("podman", "images", "--quiet", "--no-trunc"); strings.Count(left, "\n") != 0 {
		t.Errorf("images left: %s", left)
	}
	s.as("podman", "image", "exists", unsignedRef.String())

	// A service that is not there.
	s.as("systemctl", "--user", "stop", "resultity-podman.socket", "resultity-podman.service")
	s.want(s.do(order{Do: "look"}), "unavailable")
}

// requests counts what a registry is asked, and can answer what it does not have.
type requests struct {
	mu    sync.Mutex
	layer int // and of a large one
	lies  map[string]document
	inner http.Handler
}

// lie makes the registry answer something else for a manifest.
func (r *requests) lie(digest string, kind types.MediaType, raw []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.lies == nil {
		r.lies = map[string]document{}
	}
	r.lies[digest] = document{raw, kind}
}

// honest ends all lies.
func (r *requests) honest() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lies = nil
}

// layers returns how many blobs were fetched that are no signature.
func (r *requests) layers() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.layer
}

func (r *requests) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	r.mu.Lock()
	told, lies := r.lies[path.Base(req.URL.Path)]
	r.mu.Unlock()
	if lies && req.Method == http.MethodGet || lies && req.Method == http.MethodHead {
		w.Header().Set("Content-Type", string(told.kind))
		w.Header().Set("Content-Length", fmt.Sprint(len(told.raw)))
		w.Header().Set("Docker-Content-Digest", path.Base(req.URL.Path))
		if req.Method == http.MethodGet {
			_, _ = w.Write(told.raw) // whoever has gone does not want it
		}
		return
	}
	if req.Method == http.MethodGet && strings.Contains(req.URL.Path, "/blobs/sha256:") {
		c := &counter{ResponseWriter: w}
		r.inner.ServeHTTP(c, req)
		r.mu.Lock()
		defer r.mu.Unlock()
		if c.n > 8<<10 {
			r.layer++
		}
		return
	}
	r.inner.ServeHTTP(w, req)
}

// counter counts the bytes of an answer.
type counter struct {
	http.ResponseWriter
	n int
}

func (c *counter) Write(p []byte) (int, error) {
	c.n += len(p)
	return c.ResponseWriter.Write(p)
}

// serve runs a registry on the machine's address in the lab, with a certificate
// of an authority of its own.
func (r *requests) serve(t *testing.T, addr netip.Addr) (hostport string, ca []byte) {
	t.Helper()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(err)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{addr.AsSlice()}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	check(err)
	l, err := net.Listen("tcp", netip.AddrPortFrom(addr, 0).String())
	check(err)
	r.inner = registry.New(registry.WithReferrersSupport(true), registry.Logger(log.New(io.Discard, "", 0)))
	srv := httptest.NewUnstartedServer(r)
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	check(srv.Listener.Close())
	srv.Listener = l
	srv.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
	srv.StartTLS()
	t.Cleanup(srv.Close)
	return l.Addr().String(), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}
