package state

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/resultity/node/internal/wire"
)

func TestRegistrationIsBounded(t *testing.T) {
	s := open(t, newPath(t))
	r := &wire.Registered{Network: "testnet", Node: key.Address(), Time: 1, Account: "a"}
	text := fmt.Sprintf(`{"network":"testnet","node":"%s","account":"","time":1}`, strings.ToLower(r.Node.Hex()))
	r.Account = strings.Repeat("a", maxRegistration-len(text))
	if err := s.SetRegistration(r); err != nil {
		t.Errorf("of %d bytes: %v", maxRegistration, err)
	}
	r.Account += "a"
	if err := s.SetRegistration(r); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("at most %d", maxRegistration)) {
		t.Errorf("one byte more: %v", err)
	}
}

// Who is on the way out is waited for, and not for ever.
func TestLockIsWaitedFor(t *testing.T) {
	path := newPath(t)
	s := open(t, path)
	began := time.Now()
	if _, err := Open(path, Bounds{}, now); !errors.Is(err, ErrLocked) || time.Since(began) < lockWait {
		t.Errorf("%v, after %v", err, time.Since(began))
	}
	opened := make(chan error)
	go func() {
		second, err := Open(path, Bounds{}, now)
		if err == nil {
			err = second.Close()
		}
		opened <- err
	}()
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if err := <-opened; err != nil {
		t.Error(err)
	}
}

// A file that is larger than any segment is none, and is not read.
func TestSegmentIsBounded(t *testing.T) {
	path := newPath(t)
	s := open(t, path)
	j := newJob(1)
	accept(t, s, j, New)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(filepath.Join(path, segmentName(1)), maxSegment+1); err != nil {
		t.Fatal(err)
	}
	s = open(t, path)
	if found := s.Salvage(); found == nil || len(found.Aside) != 1 {
		t.Errorf("found %+v", found)
	}
	accept(t, s, j, Forgotten)
}

func TestHolesAreBounded(t *testing.T) {
	for more, want := range []error{nil, ErrCorrupt} {
		d, _ := several(t, true, 1)
		files := d.files()
		names := logs(files)
		last := names[len(names)-1]
		first, _ := segmentNumber(names[0])
		n, _ := segmentNumber(last)
		head, _, err := decodeHead(files[last][:headRoom], n)
		if err != nil {
			t.Fatal(err)
		}
		head.Number = first + maxHoles + 1 + uint64(more)
		text, err := head.encode()
		if err != nil {
			t.Fatal(err)
		}
		moved := append(text, files[last][len(text):]...)
		s, err := modelLoad(image(map[string][]byte{names[0]: files[names[0]], segmentName(head.Number): moved}), Bounds{})
		if !errors.Is(err, want) {
			t.Errorf("%d segments are missing: %v, want %v", maxHoles+more, err, want)
		}
		if err == nil {
			abandon(s)
		}
	}
}

// What was set aside does not fill the disk, and goes in time.
func TestAsideIsBounded(t *testing.T) {
	d, _ := several(t, true, 1)
	files := d.files()
	old, younger, youngest := asideName(at.Add(-asideAge-time.Second), 1, 1), asideName(at.Add(-2*time.Hour), 1, 2), asideName(at.Add(-time.Hour), 1, 3)
	files[old], files[younger], files[youngest] = []byte("x"), make([]byte, 1), make([]byte, maxAside)
	d = image(files)
	s, err := modelLoad(d, Bounds{})
	if err != nil {
		t.Fatal(err)
	}
	abandon(s)
	if d.names[old] != nil || d.names[younger] != nil || d.names[youngest] == nil {
		t.Errorf("the old one is there: %t; the one that is too much: %t; the youngest: %t", d.names[old] != nil, d.names[younger] != nil, d.names[youngest] != nil)
	}
}

// As many jobs as are lost are refused; so many of them are named.
func TestNamesOfLostJobsAreBounded(t *testing.T) {
	d := newMemory(1)
	s, err := loadWith(d, Bounds{Jobs: maxNamed + 10}, now, 4<<20, modelLeaf)
	if err != nil {
		t.Fatal(err)
	}
	var jobs []*wire.Job
	for range maxNamed + 1 {
		j := newJob(1)
		jobs = append(jobs, j)
		accept(t, s, j, New)
	}
	damaged := s.current().end
	accept(t, s, newJob(1), New)
	accept(t, s, newJob(1), New)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	d = image(d.files())
	clear(d.names[segmentName(1)].now[damaged : damaged+frameAlign])
	d.settle()
	if s, err = loadWith(d, Bounds{Jobs: maxNamed + 10}, now, 4<<20, modelLeaf); err != nil {
		t.Fatal(err)
	}
	defer abandon(s)
	if n := len(s.Salvage().Lost); n != maxNamed {
		t.Errorf("%d jobs are named, want %d", n, maxNamed)
	}
	for _, j := range jobs {
		accept(t, s, j, Settled)
	}
}
