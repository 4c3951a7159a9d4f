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
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"

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
	Do        string // ensure, retain, pull, remove or look
	Socket    string
	PolicyDir string
	CA        []byte
	Refs      []snapshot.ImageRef // what it is about
	Keep      []snapshot.ImageRef
	Keys      []string
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
	"identity": image.ErrIdentity, "pull": image.ErrPull,
	"refused": podman.ErrRefused, "not found": podman.ErrNotFound, "in use": podman.ErrInUse,
	"other image": podman.ErrOtherImage, "unavailable": podman.ErrUnavailable,
}

func agent() {
	var o order
	var r report
	err := json.NewDecoder(os.Stdin).Decode(&o)
	if err == nil {
		err = o.carryOut(context.Background(), &r)
	}
	if err != nil {
		r.Error = err.Error()
		for k, e := range kinds {
			if errors.Is(err, e) {
				r.Kinds = append(r.Kinds, k)
			}
		}
		slices.Sort(r.Kinds)
	}
	if err := json.NewEncoder(os.Stdout).Encode(r); err != nil {
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
		return images.Ensure(ctx, o.Refs[0], o.Keys)
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

const account = "op"

// site is a host with an account, a registry that it reaches, and what the two
// are asked to do.
type site struct {
	t     *testing.T
	h     *host.Host
	reg   *oci.Registry
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
	o.Socket, o.PolicyDir, o.CA = s.order.Socket, s.order.PolicyDir, s.order.CA
	in, err := json.Marshal(o)
	if err != nil {
		s.t.Fatal(err)
	}
	var out bytes.Buffer
	err = s.h.Exec(s.t.Context(), host.Cmd{User: account, Args: []string{"/usr/local/bin/agent"}, Env: []string{asAgent + "=1"}, Stdin: bytes.NewReader(in), Stdout: &out})
	if err != nil {
		s.t.Fatalf("%s: %v", o.Do, err)
	}
	var r report
	if err := json.Unmarshal(out.Bytes(), &r); err != nil {
		s.t.Fatalf("%s: %v: %s", o.Do, err, out.Bytes())
	}
	s.t.Logf("%s %v: %s", o.Do, o.Refs, r.Error)
	return r
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
	theirs, err := oci.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	pub, err := ours.PublicPEM()
	if err != nil {
		t.Fatal(err)
	}
	keys := []string{string(pub)}

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
	s.want(s.do(order{Do: "ensure", Refs: []snapshot.ImageRef{goodRef}, Keys: keys}))
	s.as("podman", "image", "exists", goodRef.String())
	s.as("podman", "run", "--detach", "--pull=never", "--name=r", "--network=none", "--read-only", "--cap-drop=all", goodRef.String())

	// Each distrusted image, to each lock alone. The last order wrote the
	// policy for its repository and key.
	unsigned, unsignedRef := s.push("net/runtime", "unsigned", nil)
	stranger, strangerRef := s.push("net/runtime", "stranger", nil)
	sign(stranger, theirs)
	moved, movedRef := s.push("net/runtime", "moved", nil)
	if err := s.reg.SignAs(t.Context(), moved, unsigned, ours); err != nil {
		t.Fatal(err)
	}
	foreign, foreignRef := s.push("net/runtime", "foreign", nil)
	if err := s.reg.SignAs(t.Context(), foreign, foreign.Registry.Repo("net/else").Digest(foreign.DigestStr()), ours); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		ref  snapshot.ImageRef
		kind string
	}{{unsignedRef, "unsigned"}, {strangerRef, "wrong key"}, {movedRef, "other digest"}, {foreignRef, "identity"}} {
		refs := []snapshot.ImageRef{c.ref}
		before := s.log.blobs()
		s.want(s.do(order{Do: "ensure", Refs: refs, Keys: keys}), c.kind)
		// Signatures are blobs, too: one, where there is one.
		if n := s.log.blobs() - before; n > 1 {
			t.Errorf("%s: %d blobs were fetched before it was trusted", c.kind, n)
		}
		s.want(s.do(order{Do: "pull", Refs: refs}), "refused")
	}
	// Signed by the right key, in a repository that the configuration does not name.
	elsewhere, elsewhereRef := s.push("net/else", "else", nil)
	sign(elsewhere, ours)
	s.want(s.do(order{Do: "pull", Refs: []snapshot.ImageRef{elsewhereRef}}), "refused")
	// Signed in the format that Podman cannot read.
	bundled, bundledRef := s.push("net/runtime", "bundled", nil)
	if err := s.reg.SignBundle(t.Context(), bundled, ours); err != nil {
		t.Fatal(err)
	}
	r := s.do(order{Do: "ensure", Refs: []snapshot.ImageRef{bundledRef}, Keys: keys})
	s.want(r, "pull", "refused")
	if !strings.Contains(r.Error, "--new-bundle-format=false") {
		t.Errorf("does not say what to do: %s", r.Error)
	}
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

// requests counts what a registry is asked.
type requests struct {
	mu    sync.Mutex
	blob  int // GET of a blob
	inner http.Handler
}

func (r *requests) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	if req.Method == http.MethodGet && strings.Contains(req.URL.Path, "/blobs/sha256:") {
		r.mu.Lock()
		r.blob++
		r.mu.Unlock()
	}
	r.inner.ServeHTTP(w, req)
}

func (r *requests) blobs() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.blob
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
