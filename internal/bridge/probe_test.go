package bridge

import (
	"bytes"
	"encoding/json"
	"errors"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/resultity/node/internal/bridge/contract"
)

func TestProbe(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	gone, err := net.Listen("tcp", "127.11.77.4:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = gone.Close() // so that nobody listens there, nor will another test
	var out, said bytes.Buffer
	targets := []string{"tcp " + l.Addr().String(), "tcp " + gone.Addr().String(), "unix " + filepath.Join(t.TempDir(), "none"), "nonsense"}
	defer func(d time.Duration) { probeTimeout = d }(probeTimeout)
	probeTimeout = 100 * time.Millisecond
	targets = append(targets, "tcp "+full(t))
	if code := Probe(targets, &out, &said); code != 0 || said.Len() > 0 {
		t.Fatalf("%d, %s", code, said.String())
	}
	var rs []contract.Reach
	if err := json.Unmarshal(out.Bytes(), &rs); err != nil || len(rs) != len(targets) {
		t.Fatalf("%v: %s", err, out.String())
	}
	for i, r := range rs {
		if r.Target != targets[i] || r.Reached != (i == 0) || r.Reached == (r.Error != "") {
			t.Errorf("%+v", r)
		}
	}
	if last := rs[len(rs)-1]; !strings.Contains(last.Error, "i/o timeout") {
		t.Errorf("%+v", last)
	}
	for _, ts := range [][]string{nil, make([]string, contract.MaxProbes+1)} {
		if code := Probe(ts, &out, &said); code != contract.ExitConfig {
			t.Errorf("%d targets: %d", len(ts), code)
		}
	}
}

// full returns an address that swallows packets: of a listener who accepts nobody, and
// has no more room for who waits.
func full(t *testing.T) string {
	t.Helper()
	l, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Close(l) })
	if err := errors.Join(syscall.Bind(l, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), syscall.Listen(l, 0)); err != nil {
		t.Fatal(err)
	}
	at, err := syscall.Getsockname(l)
	if err != nil {
		t.Fatal(err)
	}
	address := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), uint16(at.(*syscall.SockaddrInet4).Port)).String()
	c, err := net.Dial("tcp", address) // the one that there is room for
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return address
}
