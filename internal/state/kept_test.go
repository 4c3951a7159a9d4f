package state

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/resultity/node/internal/durable"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/wire"
)

func openKept(t *testing.T, path string, most int) *Kept {
	t.Helper()
	k, err := OpenKept(path, most)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// keep keeps a new job with requests and responses of n bytes.
func keep(t *testing.T, k *Kept, n int) (*wire.Job, *wire.Result) {
	t.Helper()
	j := newJob(n)
	r := success(t, j, n)
	if err := k.Put(j, r); err != nil {
		t.Fatal(err)
	}
	return j, r
}

func wantKept(t *testing.T, k *Kept, newestFirst ...*wire.Job) {
	t.Helper()
	want := []receipt.JobID{}
	for _, j := range newestFirst {
		want = append(want, j.ID)
	}
	if got := k.IDs(); !reflect.DeepEqual(got, want) {
		t.Fatalf("kept are %v, want %v", got, want)
	}
	files, err := os.ReadDir(k.dir)
	if err != nil || len(files) != len(want) {
		t.Fatalf("%d files (%v), want %d", len(files), err, len(want))
	}
}

func TestKeptOverRestarts(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "replay")
	k := openKept(t, dir, 2)
	a, _ := keep(t, k, 10)
	b, _ := keep(t, k, 20)
	c, result := keep(t, k, 30)
	wantKept(t, k, c, b)
	if _, _, err := k.Get(a.ID); !errors.Is(err, ErrNotKept) {
		t.Errorf("the oldest: %v", err)
	}
	k = openKept(t, dir, 2)
	wantKept(t, k, c, b)
	j, r, err := k.Get(c.ID)
	if err != nil || !reflect.DeepEqual(j, c) || !bytes.Equal(r.Response, result.Response) || r.Receipt.Receipt() != result.Receipt.Receipt() {
		t.Errorf("%+v, %+v, %v", j, r, err)
	}
	if err := k.Put(b, success(t, b, 5)); err != nil { // once more, with another result
		t.Fatal(err)
	}
	wantKept(t, k, b, c)
	if _, r, err := k.Get(b.ID); err != nil || len(r.Response) != 5 {
		t.Errorf("%v %v", r, err)
	}
	k = openKept(t, dir, 1)
	wantKept(t, k, b)
	d, _ := keep(t, k, 1)
	wantKept(t, k, d)
}

func TestKeptIsNobodyElses(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "replay")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	k := openKept(t, dir, 3)
	keep(t, k, 10)
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err == nil && info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %v", d.Name(), info.Mode())
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// Who wants no more kept has nothing left on the disk.
func TestKeptGoesWithTheSetting(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "replay")
	keep(t, openKept(t, dir, 3), 10)
	k := openKept(t, dir, 0)
	if _, err := os.Lstat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the directory is there: %v", err)
	}
	j, _ := keep(t, k, 10)
	if _, _, err := k.Get(j.ID); !errors.Is(err, ErrNotKept) || len(k.IDs()) != 0 {
		t.Errorf("%v", err)
	}
	if _, err := os.Lstat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the directory is there again: %v", err)
	}
}

func TestKeptIsBoundedInBytes(t *testing.T) {
	k := openKept(t, filepath.Join(t.TempDir(), "replay"), 100)
	if k.bytes != maxKeptBytes {
		t.Errorf("%d bytes may be kept", k.bytes)
	}
	k.bytes = 10_000
	for range 20 {
		keep(t, k, 1000)
	}
	if n := len(k.IDs()); n == 0 || n > 5 || k.size > k.bytes {
		t.Errorf("%d jobs of %d bytes", n, k.size)
	}
	large, _ := keep(t, k, 6000) // more than all may have
	if _, _, err := k.Get(large.ID); !errors.Is(err, ErrNotKept) || k.size != 0 {
		t.Errorf("%v, %d bytes", err, k.size)
	}
}

// A job that could not be made durable is not kept: neither on the disk, nor in
// what is counted. Where it cannot be removed either, it counts as the others.
func TestKeptAfterAFailedSync(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "replay")
	k := openKept(t, dir, 2)
	a, _ := keep(t, k, 10)
	errSync := errors.New("sync of the directory")
	fail := func(name string, data []byte, mode fs.FileMode) error {
		return errors.Join(durable.WriteFile(name, data, mode), errSync) // it is there, and nobody knows for how long
	}
	whole := k.write
	for range 5 {
		k.write = fail
		j := newJob(10)
		if err := k.Put(j, success(t, j, 10)); !errors.Is(err, errSync) {
			t.Fatalf("Put = %v", err)
		}
		if err := k.Put(a, success(t, a, 20)); !errors.Is(err, errSync) {
			t.Fatalf("Put of another result = %v", err)
		}
		wantKept(t, k, a)
	}
	if _, r, err := k.Get(a.ID); err != nil || len(r.Response) != 10 {
		t.Errorf("the result before: %+v, %v", r, err)
	}
	k.write = whole
	b, _ := keep(t, k, 10)
	c, _ := keep(t, k, 10)
	wantKept(t, k, c, b)

	// What cannot be removed, here a directory with something in it, stays counted.
	k.write = func(name string, _ []byte, mode fs.FileMode) error {
		return errors.Join(os.MkdirAll(filepath.Join(name, "x"), 0o700), errSync)
	}
	d := newJob(10)
	if err := k.Put(d, success(t, d, 10)); !errors.Is(err, errSync) {
		t.Fatalf("Put = %v", err)
	}
	wantKept(t, k, d, c)
	k = openKept(t, dir, 2) // which takes what is no file of ours away
	wantKept(t, k, c)
}

// A crash leaves a temporary file with a prompt in it, a disk a damaged one.
func TestKeptCleansUp(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "replay")
	k := openKept(t, dir, 3)
	a, _ := keep(t, k, 10)
	b, _ := keep(t, k, 10)
	for _, name := range []string{k.list[0].file() + ".tmp123", "x", "0-1.job"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("secret words"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	k = openKept(t, dir, 3)
	wantKept(t, k, b, a)
	name := filepath.Join(dir, k.list[0].file())
	whole, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	for i := range whole {
		bad := bytes.Clone(whole)
		bad[i] ^= 1
		if j, r, err := decodeKept(bad); err == nil && (j.ID == a.ID || r.Job == a.ID) {
			t.Errorf("byte %d: not noticed", i)
		}
		if j, r, err := decodeKept(whole[:i]); err == nil {
			t.Errorf("cut at %d: %v %v", i, j, r)
		}
	}
	if err := os.WriteFile(name, whole[:len(whole)-1], 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := k.Get(a.ID); !errors.Is(err, ErrNotKept) {
		t.Errorf("damaged: %v", err)
	}
	wantKept(t, k, b)
	if _, _, err := k.Get(b.ID); err != nil {
		t.Error(err)
	}
}
