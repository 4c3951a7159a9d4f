package bridge

import (
	"bytes"
	"encoding/json"
	"net"
	"path/filepath"
	"testing"

	"github.com/resultity/node/internal/bridge/contract"
)

func TestProbe(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	gone, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = gone.Close() // so that nobody listens there
	var out, said bytes.Buffer
	targets := []string{"tcp " + l.Addr().String(), "tcp " + gone.Addr().String(), "unix " + filepath.Join(t.TempDir(), "none"), "nonsense"}
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
	for _, ts := range [][]string{nil, make([]string, contract.MaxProbes+1)} {
		if code := Probe(ts, &out, &said); code != contract.ExitConfig {
			t.Errorf("%d targets: %d", len(ts), code)
		}
	}
}
