package images

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

const dirMode = fs.ModeDir | 0o755

// testRecipe asks for one program, one plug-in and one data file of testPackages.
var testRecipe = Recipe{
	Name: "test", Title: "Test", Description: "for tests", Suite: "none",
	Packages: []string{"engine"}, VersionOf: "engine",
	Programs:   []string{"/usr/bin/engine"},
	Plugins:    []string{"/usr/lib/*/engine/*.so"},
	Data:       []string{"/etc/release"},
	Entrypoint: []string{"/usr/bin/engine"},
	Licences:   map[string]string{"engine": "MIT OR Apache-2.0", "libc": "LGPL-2.1-or-later"},
}

// testPackages are an engine, its library, a package that only has papers for
// the library, and a shell that nothing asks for.
func testPackages(t *testing.T) []*Package {
	t.Helper()
	pkg := func(name string, files map[string]*entry) *Package {
		p := &Package{Name: name, Version: "1.0-1", Arch: "amd64", control: []byte("Package: " + name + "\n"), files: make(tree)}
		copy(p.SHA256[:], name)
		for n, e := range files {
			e.owner = name
			if e.mtime.IsZero() {
				e.mtime = time.Unix(1_700_000_000, 0)
			}
			p.files[n] = e
			for d := path.Dir(n); d != "/"; d = path.Dir(d) {
				p.files[d] = &entry{mode: dirMode, owner: name, mtime: time.Now()}
			}
		}
		return p
	}
	reg := func(s string) *entry { return &entry{mode: 0o644, data: []byte(s)} }
	link := func(s string) *entry { return &entry{mode: fs.ModeSymlink | 0o777, link: s} }
	const libs = "/usr/lib/x86_64-linux-gnu/"
	return []*Package{
		pkg("engine", map[string]*entry{
			"/usr/bin/engine":                  {mode: 0o755 | fs.ModeSetuid, data: makeELF(t, "/lib64/ld.so", "", "libc.so.6")},
			"/usr/bin/engine-tool":             {mode: 0o755, data: makeELF(t, "/lib64/ld.so", "")},
			libs + "engine/cpu.so":             {mode: 0o755, data: makeELF(t, "", "", "libmath.so.1")},
			libs + "libmath.so.1":              link("libmath.so.1.2"),
			libs + "libmath.so.1.2":            {mode: 0o644, data: makeELF(t, "", "", "libc.so.6"), mtime: time.Unix(1_700_000_500, 0)},
			"/usr/share/doc/engine/copyright":  reg("See /usr/share/common-licenses/GPL.\n"),
			"/usr/share/doc/engine/README":     reg("not wanted"),
			"/etc/release":                     link("../usr/lib/release"),
			"/usr/lib/release":                 reg("test 1\n"),
			"/usr/share/common-licenses/GPL":   link("GPL-3"),
			"/usr/share/common-licenses/GPL-3": reg("the licence"),
		}),
		pkg("libc", map[string]*entry{
			libs + "libc.so.6":    {mode: 0o755, data: makeELF(t, "/lib64/ld.so", "")},
			libs + "ld.so":        {mode: 0o755, data: makeELF(t, "", "")},
			"/usr/lib64/ld.so":    link("../lib/x86_64-linux-gnu/ld.so"),
			"/usr/share/doc/libc": link("libc-papers"),
		}),
		pkg("libc-papers", map[string]*entry{"/usr/share/doc/libc-papers/copyright": reg("free\n")}),
		pkg("dash", map[string]*entry{
			"/usr/bin/sh":                   {mode: 0o755, data: makeELF(t, "/lib64/ld.so", "", "libc.so.6")},
			"/usr/share/doc/dash/copyright": reg("free\n"),
		}),
	}
}

func files(t *testing.T, img v1.Image) tree {
	t.Helper()
	ls, err := img.Layers()
	if err != nil || len(ls) != 1 {
		t.Fatalf("%d layers, error %v, want one layer", len(ls), err)
	}
	r, err := ls[0].Uncompressed()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	tr, err := readLayer(r, t.Errorf)
	if err != nil {
		t.Fatal(err)
	}
	return tr
}

func digest(t *testing.T, img v1.Image) v1.Hash {
	t.Helper()
	d, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestAssemble(t *testing.T) {
	img, err := Assemble(testRecipe, testPackages(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := Verify(testRecipe, img); err != nil {
		t.Errorf("verify: %v", err)
	}
	var got []string
	for p, e := range files(t, img) {
		if !e.mode.IsDir() && scaffold[p] == nil {
			got = append(got, e.mode.String()+" "+p)
		}
	}
	slices.SortFunc(got, func(a, b string) int { return strings.Compare(strings.Fields(a)[1], strings.Fields(b)[1]) })
	want := strings.Fields(`
		Lrwxrwxrwx /etc/release
		Lrwxrwxrwx /lib
		Lrwxrwxrwx /lib64
		-rwxr-xr-x /usr/bin/engine
		-rw-r--r-- /usr/lib/release
		-rw-r--r-- /usr/lib/x86_64-linux-gnu/engine/cpu.so
		-rwxr-xr-x /usr/lib/x86_64-linux-gnu/ld.so
		-rw-r--r-- /usr/lib/x86_64-linux-gnu/libc.so.6
		Lrwxrwxrwx /usr/lib/x86_64-linux-gnu/libmath.so.1
		-rw-r--r-- /usr/lib/x86_64-linux-gnu/libmath.so.1.2
		Lrwxrwxrwx /usr/lib64/ld.so
		Lrwxrwxrwx /usr/share/common-licenses/GPL
		-rw-r--r-- /usr/share/common-licenses/GPL-3
		-rw-r--r-- /usr/share/doc/engine/copyright
		Lrwxrwxrwx /usr/share/doc/libc
		-rw-r--r-- /usr/share/doc/libc-papers/copyright
		-rw-r--r-- /var/lib/dpkg/status.d/engine
		-rw-r--r-- /var/lib/dpkg/status.d/libc
		-rw-r--r-- /var/lib/dpkg/status.d/libc-papers`)
	if g := strings.Fields(strings.Join(got, " ")); !slices.Equal(g, want) {
		t.Errorf("files:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, " "))
	}

	m, err := img.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	hash := func(name string) string {
		var sum [32]byte // testPackages has the name in place of a hash
		copy(sum[:], name)
		return " sha256:" + hex.EncodeToString(sum[:])
	}
	for k, want := range map[string]string{
		"org.opencontainers.image.version":  "1.0-1",
		"org.opencontainers.image.created":  "2023-11-14T22:21:40Z", // the youngest file's time
		"org.opencontainers.image.licenses": "(MIT OR Apache-2.0) AND LGPL-2.1-or-later AND LicenseRef-libc-papers",
		AnnotationPackages: "engine=1.0-1" + hash("engine") + "\nlibc=1.0-1" + hash("libc") +
			"\nlibc-papers=1.0-1" + hash("libc-papers"),
	} {
		if got := m.Annotations[k]; got != want {
			t.Errorf("annotation %s is %q, want %q", k, got, want)
		}
	}
	cf, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	if !maps.Equal(cf.Config.Labels, m.Annotations) {
		t.Errorf("labels %q differ from annotations %q", cf.Config.Labels, m.Annotations)
	}
}

// TestDigest checks what the digest hangs on and what it does not.
func TestDigest(t *testing.T) {
	assemble := func(change func([]*Package)) v1.Hash {
		t.Helper()
		ps := testPackages(t)
		change(ps)
		img, err := Assemble(testRecipe, ps)
		if err != nil {
			t.Fatal(err)
		}
		return digest(t, img)
	}
	want := assemble(func([]*Package) {})
	for name, change := range map[string]func([]*Package){
		"order":                func(ps []*Package) { slices.Reverse(ps) },
		"unused package":       func(ps []*Package) { ps[3].Version = "2" },
		"unused file":          func(ps []*Package) { ps[0].files["/usr/share/doc/engine/README"].data = nil },
		"times of directories": func(ps []*Package) { ps[1].files["/usr"].mtime = time.Unix(9e9, 0) },
		"mode in the package":  func(ps []*Package) { ps[0].files["/usr/bin/engine"].mode = 0o700 },
	} {
		if got := assemble(change); got != want {
			t.Errorf("%s changes the digest", name)
		}
	}
	for name, change := range map[string]func([]*Package){
		"content":      func(ps []*Package) { ps[0].files["/usr/lib/release"].data = []byte("test 2\n") },
		"version":      func(ps []*Package) { ps[1].Version = "2" },
		"package hash": func(ps []*Package) { ps[1].SHA256[0]++ },
		"licence":      func(ps []*Package) { ps[2].files["/usr/share/doc/libc-papers/copyright"].data = []byte("x") },
	} {
		if assemble(change) == want {
			t.Errorf("%s does not change the digest", name)
		}
	}
}

func TestAssembleRefuses(t *testing.T) {
	for _, tt := range []struct {
		want   string
		change func(r *Recipe, ps []*Package)
	}{
		{"no package has a file like /usr/bin/none", func(r *Recipe, _ []*Package) { r.Programs = []string{"/usr/bin/none"} }},
		{"library libc.so.6", func(_ *Recipe, ps []*Package) { delete(ps[1].files, "/usr/lib/x86_64-linux-gnu/libc.so.6") }},
		{"loader", func(_ *Recipe, ps []*Package) { delete(ps[1].files, "/usr/lib/x86_64-linux-gnu/ld.so") }},
		{"licence of package libc", func(_ *Recipe, ps []*Package) { delete(ps[1].files, "/usr/share/doc/libc") }},
		{"licence of package engine", func(_ *Recipe, ps []*Package) { delete(ps[0].files, "/usr/share/common-licenses/GPL-3") }},
		{"not an ELF program", func(_ *Recipe, ps []*Package) { ps[0].files["/usr/bin/engine"].data = []byte("#!/bin/sh\n") }},
		{"both have /usr/bin/engine", func(_ *Recipe, ps []*Package) { ps[3].files["/usr/bin/engine"] = &entry{mode: 0o755} }},
		{"is there twice", func(_ *Recipe, ps []*Package) { ps[3].Name = "libc" }},
		{"too many links", func(_ *Recipe, ps []*Package) {
			ps[0].files["/usr/lib/release"] = &entry{mode: fs.ModeSymlink, link: "release"}
		}},
		{"not a regular file", func(_ *Recipe, ps []*Package) { ps[0].files["/etc/release"].link = "/usr" }},
		{"which gives the version", func(r *Recipe, _ []*Package) { r.VersionOf = "dash" }},
		{"no entry point", func(r *Recipe, _ []*Package) { r.Entrypoint = nil }},
	} {
		r, ps := testRecipe, testPackages(t)
		tt.change(&r, ps)
		if _, err := Assemble(r, ps); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("error %v, want one with %q", err, tt.want)
		}
	}
}

// header is one entry of a layer in the making.
type header struct {
	tar.Header
	data []byte
}

// headers returns the entries of a good image's layer.
func headers(t *testing.T) []header {
	t.Helper()
	img, err := Assemble(testRecipe, testPackages(t))
	if err != nil {
		t.Fatal(err)
	}
	tr := files(t, img)
	var hs []header
	for _, p := range slices.Sorted(maps.Keys(tr)) {
		e := tr[p]
		h := header{tar.Header{Name: p[1:], Mode: int64(e.mode.Perm()), Format: tar.FormatUSTAR, ModTime: time.Unix(1, 0), Typeflag: tar.TypeReg}, e.data}
		switch e.mode.Type() {
		case fs.ModeDir:
			h.Typeflag, h.Name = tar.TypeDir, h.Name+"/"
		case fs.ModeSymlink:
			h.Typeflag, h.Linkname = tar.TypeSymlink, e.link
		}
		if e.mode&fs.ModeSticky != 0 {
			h.Mode |= 0o1000
		}
		hs = append(hs, h)
	}
	return hs
}

// wrap makes an image with one layer of the given entries.
func wrap(t *testing.T, hs []header, mt types.MediaType) v1.Image {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range hs {
		h.Size = int64(len(h.data))
		if err := w.WriteHeader(&h.Header); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(h.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	img, err := mutate.AppendLayers(img, static.NewLayer(b.Bytes(), mt))
	if err != nil {
		t.Fatal(err)
	}
	img, err = mutate.Config(img, v1.Config{User: User, Entrypoint: testRecipe.Entrypoint})
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// TestVerifyRefuses spoils a good image in one way at a time.
func TestVerifyRefuses(t *testing.T) {
	find := func(hs []header, name string) *header {
		i := slices.IndexFunc(hs, func(h header) bool { return strings.TrimSuffix(h.Name, "/") == name })
		if i < 0 {
			t.Fatalf("no %s in the layer", name)
		}
		return &hs[i]
	}
	// insert puts an entry where it belongs by its name.
	insert := func(hs *[]header, h tar.Header, data string) {
		h.Format, h.ModTime = tar.FormatUSTAR, time.Unix(1, 0)
		i, _ := slices.BinarySearchFunc(*hs, h.Name, func(a header, n string) int {
			return strings.Compare(strings.TrimSuffix(a.Name, "/"), strings.TrimSuffix(n, "/"))
		})
		*hs = slices.Insert(*hs, i, header{h, []byte(data)})
	}
	const libs = "usr/lib/x86_64-linux-gnu/"
	for _, tt := range []struct {
		want  string
		spoil func(hs *[]header)
	}{
		{"/usr/bin/engine is setuid", func(hs *[]header) { find(*hs, "usr/bin/engine").Mode |= 0o4000 }},
		{"/usr/bin/engine is setuid or setgid", func(hs *[]header) { find(*hs, "usr/bin/engine").Mode |= 0o2000 }},
		{"can be written by others", func(hs *[]header) { find(*hs, "usr/bin/engine").Mode |= 0o002 }},
		{"can be written by others", func(hs *[]header) { find(*hs, "etc").Mode |= 0o020 }},
		{"/tmp can be written by others", func(hs *[]header) { find(*hs, "tmp").Mode = 0o777 }},
		{"belongs to 1000:0", func(hs *[]header) { find(*hs, "etc/passwd").Uid = 1000 }},
		{"belongs to 0:1000", func(hs *[]header) { find(*hs, "etc/passwd").Gid = 1000 }},
		{`belongs to 0:0 "root"`, func(hs *[]header) { find(*hs, "etc/passwd").Uname = "root" }},
		{"time of its own", func(hs *[]header) { find(*hs, "etc/passwd").ModTime = time.Unix(2, 0) }},
		{"has extended headers", func(hs *[]header) {
			h := find(*hs, "etc/passwd")
			h.Format, h.PAXRecords = tar.FormatPAX, map[string]string{"SCHILY.xattr.user.x": "y"}
		}},
		{"/dev comes after /etc", func(hs *[]header) { (*hs)[0], (*hs)[1] = (*hs)[1], (*hs)[0] }},
		{"/etc comes after /etc", func(hs *[]header) { *hs = slices.Insert(*hs, 2, (*hs)[1]) }},
		{"comes before the directory", func(hs *[]header) { insert(hs, tar.Header{Name: "x/y", Typeflag: tar.TypeReg, Mode: 0o644}, "") }},
		{`bad name "etc/../x"`, func(hs *[]header) { insert(hs, tar.Header{Name: "etc/../x", Typeflag: tar.TypeReg, Mode: 0o644}, "") }},
		{`bad name "../x"`, func(hs *[]header) { insert(hs, tar.Header{Name: "../x", Typeflag: tar.TypeReg, Mode: 0o644}, "") }},
		{`bad name "/x"`, func(hs *[]header) { insert(hs, tar.Header{Name: "/x", Typeflag: tar.TypeReg, Mode: 0o644}, "") }},
		{"not a directory, file or link", func(hs *[]header) { insert(hs, tar.Header{Name: "dev/mem", Typeflag: tar.TypeChar, Mode: 0o600}, "") }},
		{"not a directory, file or link", func(hs *[]header) {
			insert(hs, tar.Header{Name: "etc/shadow", Typeflag: tar.TypeLink, Linkname: "etc/passwd", Mode: 0o600}, "")
		}},
		{"leads out of the image", func(hs *[]header) { find(*hs, "etc/release").Linkname = "../../usr/lib/release" }},
		{"link /etc/release", func(hs *[]header) { find(*hs, "etc/release").Linkname = "/nowhere" }},
		{"/usr/bin/sh may be executed", func(hs *[]header) {
			insert(hs, tar.Header{Name: "usr/bin/sh", Typeflag: tar.TypeReg, Mode: 0o755}, string(makeELF(t, "/lib64/ld.so", "")))
		}},
		{"libc.so.6 may be executed", func(hs *[]header) { find(*hs, libs+"libc.so.6").Mode = 0o755 }},
		{"/etc/passwd may be executed", func(hs *[]header) { find(*hs, "etc/passwd").Mode = 0o744 }},
		{"program /usr/bin/engine is not ELF", func(hs *[]header) { find(*hs, "usr/bin/engine").data = []byte("#!/bin/sh\n") }},
		{"/usr/bin/engine: library libc.so.6", func(hs *[]header) {
			*hs = slices.DeleteFunc(*hs, func(h header) bool { return h.Name == libs+"libc.so.6" })
		}},
		{"cpu.so: library libmath.so.1", func(hs *[]header) {
			*hs = slices.DeleteFunc(*hs, func(h header) bool { return h.Name == libs+"libmath.so.1" })
		}},
		{"loader: ", func(hs *[]header) {
			*hs = slices.DeleteFunc(*hs, func(h header) bool { return h.Name == "lib64" })
		}},
		{"no directory /models", func(hs *[]header) {
			*hs = slices.DeleteFunc(*hs, func(h header) bool { return h.Name == "models/" })
		}},
		{"/run/resultity is not empty", func(hs *[]header) {
			insert(hs, tar.Header{Name: "run/resultity/x", Typeflag: tar.TypeReg, Mode: 0o644}, "")
		}},
		{"no empty file /resultity-bridge", func(hs *[]header) { find(*hs, "resultity-bridge").data = []byte("x") }},
		{"entry point: ", func(hs *[]header) {
			*hs = slices.DeleteFunc(*hs, func(h header) bool { return h.Name == "usr/bin/engine" })
		}},
		{"entry point /usr/bin/engine may not be executed", func(hs *[]header) { find(*hs, "usr/bin/engine").Mode = 0o644 }},
	} {
		hs := headers(t)
		tt.spoil(&hs)
		if err := Verify(testRecipe, wrap(t, hs, types.OCIUncompressedLayer)); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("error %v, want one with %q", err, tt.want)
		}
	}

	good := headers(t)
	if err := Verify(testRecipe, wrap(t, good, types.OCIUncompressedLayer)); err != nil {
		t.Fatalf("unspoilt: %v", err)
	}
	config := func(c v1.Config) func(v1.Image) (v1.Image, error) {
		return func(i v1.Image) (v1.Image, error) { return mutate.Config(i, c) }
	}
	for _, tt := range []struct {
		want  string
		mt    types.MediaType
		spoil func(v1.Image) (v1.Image, error)
	}{
		{"user is \"0\"", types.OCIUncompressedLayer, config(v1.Config{User: "0", Entrypoint: testRecipe.Entrypoint})},
		{"entry point is", types.OCIUncompressedLayer, config(v1.Config{User: User, Entrypoint: []string{"/usr/bin/sh"}})},
		{"entry point is", types.OCIUncompressedLayer, config(v1.Config{User: User, Entrypoint: testRecipe.Entrypoint, Cmd: []string{"x"}})},
		{"want it uncompressed", types.DockerUncompressedLayer, func(i v1.Image) (v1.Image, error) { return i, nil }},
		{"are not OCI's", types.OCIUncompressedLayer, func(i v1.Image) (v1.Image, error) { return mutate.MediaType(i, types.DockerManifestSchema2), nil }},
		{"2 layers", types.OCIUncompressedLayer, func(i v1.Image) (v1.Image, error) {
			return mutate.AppendLayers(i, static.NewLayer([]byte("x"), types.OCIUncompressedLayer))
		}},
	} {
		img, err := tt.spoil(wrap(t, good, tt.mt))
		if err != nil {
			t.Fatal(err)
		}
		if err := Verify(testRecipe, img); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("error %v, want one with %q", err, tt.want)
		}
	}
}

// TestLoad reads a real package file.
func TestLoad(t *testing.T) {
	src, dir := t.TempDir(), t.TempDir()
	for name, data := range map[string]string{
		"DEBIAN/control": "Package: demo\nVersion: 1:2-3\nArchitecture: all\nMaintainer: nobody <nobody@example.org>\nDescription: demo\n",
		"usr/bin/demo":   "demo",
	} {
		p := filepath.Join(src, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(data), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Link(filepath.Join(src, "usr/bin/demo"), filepath.Join(src, "usr/bin/other")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("demo", filepath.Join(src, "usr/bin/link")); err != nil {
		t.Fatal(err)
	}
	deb := filepath.Join(dir, "demo.deb")
	if out, err := exec.Command("dpkg-deb", "--root-owner-group", "--build", src, deb).CombinedOutput(); err != nil {
		t.Fatalf("dpkg-deb: %v\n%s", err, out)
	}
	ps, err := Load(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	p := ps[0]
	if p.Name != "demo" || p.Version != "1:2-3" || p.Arch != "all" {
		t.Errorf("package is %s %s %s, want demo 1:2-3 all", p.Name, p.Version, p.Arch)
	}
	for _, name := range []string{"/usr/bin/demo", "/usr/bin/other", "/usr/bin/link"} {
		if _, e, err := p.files.file(name); err != nil || string(e.data) != "demo" {
			t.Errorf("%s: %v, want the file", name, err)
		}
	}

	b, err := os.ReadFile(deb)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(deb, b[:len(b)-100], 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(t.Context(), dir); err == nil || !strings.Contains(err.Error(), "demo.deb") {
		t.Errorf("cut package: error %v, want one that names it", err)
	}
	if _, err := Load(t.Context(), t.TempDir()); err == nil {
		t.Error("no packages at all: no error")
	}
}

// TestSetup looks at what somebody is told whose machine lacks a program.
func TestSetup(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	if err := Setup(t.Context()); err == nil || !strings.Contains(err.Error(), "dpkg package") {
		t.Errorf("error %v, want one that says what is missing", err)
	}
}

// TestBounds feeds a package, and a layer, that unpack to more than is allowed. Nothing
// is kept for it.
func TestBounds(t *testing.T) {
	for name, read := range map[string]func(io.Reader) error{
		"package": func(r io.Reader) error {
			left := int64(maxPackages)
			_, err := readTar(r, "big", &left)
			return err
		},
		"layer": func(r io.Reader) error { _, err := readLayer(r, t.Errorf); return err },
	} {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		if err := w.WriteHeader(&tar.Header{Name: "big", Typeflag: tar.TypeReg, Size: maxPackages + 1, Format: tar.FormatUSTAR}); err != nil {
			t.Fatal(err)
		}
		if err := read(&b); err == nil || !strings.Contains(err.Error(), "more than") {
			t.Errorf("%s: %v, want that it is too much", name, err)
		}
	}
}

func TestUnpack(t *testing.T) {
	c := cache{dir: t.TempDir(), log: slog.New(slog.DiscardHandler)}
	img := put(t, c, "img")
	dir := t.TempDir()
	if err := img.Unpack(dir); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "usr/lib/release")); err != nil || string(b) != "test 1\n" {
		t.Errorf("usr/lib/release is %q, error %v", b, err)
	}
	if fi, err := os.Stat(filepath.Join(dir, "tmp")); err != nil || fi.Mode() != fs.ModeDir|fs.ModeSticky|0o777 {
		t.Errorf("tmp: %v %v, want a sticky directory", fi.Mode(), err)
	}

	// A link in the layer must not carry a later file out of the directory.
	out := t.TempDir()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range []tar.Header{
		{Name: "x", Typeflag: tar.TypeSymlink, Linkname: out},
		{Name: "x/evil", Typeflag: tar.TypeReg, Mode: 0o644},
	} {
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
	}
	root, err := os.OpenRoot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	if err := unpack(root, &b); err == nil {
		t.Error("a file through a link out of the root: no error")
	}
	if es, _ := os.ReadDir(out); len(es) > 0 {
		t.Errorf("%v was written outside", es)
	}
}

// put writes the test image into the cache under the given name.
func put(t *testing.T, c cache, name string) Image {
	t.Helper()
	var img Image
	var err error
	img.Layout, err = c.entry(name, false, func(dir string) error { return writeTest(t, dir) }, func(dir string) error {
		i, d, err := open(dir)
		if err != nil {
			return err
		}
		img.Digest = d
		return intact(i, d)
	})
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// TestCache plays what can happen to an entry between two builds.
func TestCache(t *testing.T) {
	c := cache{dir: t.TempDir(), log: slog.New(slog.DiscardHandler)}
	want := put(t, c, "img")
	blob := func(img Image) string {
		t.Helper()
		i, _, err := open(img.Layout)
		if err != nil {
			t.Fatal(err)
		}
		m, err := i.Manifest()
		if err != nil {
			t.Fatal(err)
		}
		return filepath.Join(img.Layout, "blobs/sha256", m.Layers[0].Digest.Hex)
	}
	if fi, err := os.Stat(blob(want)); err != nil || fi.Mode() != 0o644 {
		t.Errorf("layer's mode is %v, error %v, want it readable for all", fi.Mode(), err)
	}

	made := 0
	anew := false
	get := func() error {
		_, err := c.entry("img", anew, func(dir string) error { made++; return writeTest(t, dir) }, func(dir string) error {
			i, d, err := open(dir)
			if err != nil {
				return err
			}
			return intact(i, d)
		})
		return err
	}
	if err := get(); err != nil || made != 0 {
		t.Errorf("made %d times, error %v, want it from the cache", made, err)
	}
	for i, spoil := range []func(img Image) error{
		func(img Image) error { return os.Truncate(blob(img), 100) },
		func(img Image) error { return flip(blob(img)) },
		func(img Image) error { return flip(filepath.Join(img.Layout, "blobs/sha256", img.Digest.Hex)) },
		func(img Image) error { return os.Remove(filepath.Join(img.Layout, "index.json")) },
		func(img Image) error {
			return os.WriteFile(filepath.Join(img.Layout, "index.json"), []byte("{}"), 0o644)
		},
	} {
		made = 0
		if err := spoil(want); err != nil {
			t.Fatal(err)
		}
		if err := get(); err != nil || made != 1 {
			t.Errorf("damage %d: made %d times, error %v, want it made anew", i, made, err)
		}
	}

	boom := errors.New("boom")
	if _, err := c.entry("half", false, func(dir string) error {
		if err := os.WriteFile(filepath.Join(dir, "x"), nil, 0o644); err != nil {
			t.Fatal(err)
		}
		return boom
	}, func(dir string) error { _, err := os.Stat(dir); return err }); !errors.Is(err, boom) {
		t.Errorf("error %v, want %v", err, boom)
	}
	if _, err := c.entry("refused", false, func(dir string) error { return nil }, func(string) error { return boom }); !errors.Is(err, boom) {
		t.Errorf("error %v, want %v", err, boom)
	}
	if es, _ := os.ReadDir(c.dir); len(es) != 1 {
		t.Errorf("entries %v, want only img", es)
	}

	// A dead build and an entry that nobody asked for go, the others stay.
	for _, name := range []string{"dead.partial", "old"} {
		if err := os.Mkdir(filepath.Join(c.dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	long := time.Now().Add(-keep - time.Hour)
	if err := os.Chtimes(filepath.Join(c.dir, "old"), long, long); err != nil {
		t.Fatal(err)
	}
	if err := c.sweep(); err != nil {
		t.Fatal(err)
	}
	if es, _ := os.ReadDir(c.dir); len(es) != 1 || es[0].Name() != "img" {
		t.Errorf("entries %v, want only img", es)
	}

	made, anew = 0, true
	if err := get(); err != nil || made != 1 {
		t.Errorf("anew: made %d times, error %v, want once", made, err)
	}
}

// TestCachedPackages spoils the packages in the cache, which must then be
// fetched again, and cannot be: there is no such suite.
func TestCachedPackages(t *testing.T) {
	c := cache{dir: t.TempDir(), log: slog.New(slog.DiscardHandler)}
	dir := filepath.Join(c.dir, "packages-"+hash(testRecipe.Suite, testRecipe.Packages, runtime.GOARCH))
	deb := filepath.Join(dir, "x_1_all.deb")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string]string{
		deb:                          "x",
		filepath.Join(dir, sumsFile): "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881  x_1_all.deb\n",
	} {
		if err := os.WriteFile(name, []byte(data), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, sums, err := c.packages(t.Context(), testRecipe)
	if err != nil || got != dir || !bytes.HasPrefix(sums, []byte("2d71")) {
		t.Fatalf("packages in %s with sums %s, error %v, want those in the cache", got, sums, err)
	}
	t.Setenv("PATH", t.TempDir()) // nothing can be fetched
	for name, spoil := range map[string]func() error{
		"foreign package": func() error { return os.WriteFile(filepath.Join(dir, "y_1_all.deb"), nil, 0o644) },
		"flipped bit":     func() error { return flip(deb) },
		"missing package": func() error { return os.Remove(deb) },
	} {
		if err := spoil(); err != nil {
			t.Fatal(err)
		}
		if _, _, err := c.packages(t.Context(), testRecipe); err == nil {
			t.Errorf("%s: no error", name)
		}
		if err := os.RemoveAll(filepath.Join(dir, "y_1_all.deb")); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(deb, []byte("x"), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, _, err := c.packages(t.Context(), testRecipe); err != nil {
			t.Errorf("sound again after %s: %v", name, err)
		}
	}
}

func writeTest(t *testing.T, dir string) error {
	img, err := Assemble(testRecipe, testPackages(t))
	if err != nil {
		return err
	}
	return writeLayout(img, dir)
}

func flip(name string) error {
	b, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	b[len(b)/2] ^= 1
	return os.WriteFile(name, b, 0o644)
}

func TestLock(t *testing.T) {
	name := filepath.Join(t.TempDir(), "lock")
	unlock, err := lock(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := lock(ctx, name); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("second lock: error %v, want the deadline's", err)
		}
		time.AfterFunc(time.Second, unlock)
		again, err := lock(t.Context(), name)
		if err != nil {
			t.Fatalf("after unlock: %v", err)
		}
		again()
	})
}

// TestSource keeps the list of embedded files whole: a file that is missing
// there could change without the cached images noticing.
func TestSource(t *testing.T) {
	all, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	want := slices.DeleteFunc(all, func(n string) bool { return strings.HasSuffix(n, "_test.go") })
	es, err := source.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range es {
		got = append(got, e.Name())
	}
	if !slices.Equal(got, want) {
		t.Errorf("embedded %q, want %q", got, want)
	}
}

func TestWalk(t *testing.T) {
	link := func(to string) *entry { return &entry{mode: fs.ModeSymlink, link: to} }
	tr := tree{
		"/a": {mode: dirMode}, "/a/b": {mode: dirMode}, "/a/b/file": {},
		"/up": link("../../a"), "/abs": link("/a/b"), "/a/rel": link("b/../b/file"),
		"/x": link("y"), "/y": link("x"),
	}
	for p, want := range map[string]string{
		"/a/b/file": "/a/b/file", "/abs/file": "/a/b/file", "/a/rel": "/a/b/file",
		"/up/b/./file": "/a/b/file", "/abs/../rel": "/a/b/file", "/": "/", "/../a": "/a",
	} {
		if got, err := tr.walk(p, nil); err != nil || got != want {
			t.Errorf("%s leads to %s, error %v, want %s", p, got, err, want)
		}
	}
	// As many links as there may be, and one more.
	for i := range maxLinks {
		tr[fmt.Sprintf("/l%d", i+1)] = link(fmt.Sprintf("l%d", i))
	}
	tr["/l0"], tr["/more"] = &entry{}, link(fmt.Sprintf("l%d", maxLinks))
	if got, err := tr.walk(fmt.Sprintf("/l%d", maxLinks), nil); err != nil || got != "/l0" {
		t.Errorf("%d links lead to %s, %v", maxLinks, got, err)
	}
	for _, p := range []string{"/none", "/a/b/file/x", "/x", "/more", "relative", ""} {
		if got, err := tr.walk(p, nil); err == nil {
			t.Errorf("%q leads to %s, want an error", p, got)
		}
	}
	for _, tt := range []struct {
		at, link string
		want     bool
	}{
		{"/a", "b", false}, {"/a", "../b", true}, {"/a/b", "../c", false}, {"/a/b", "../../c", true},
		{"/a/b", "c/../../../d", true}, {"/a/b/c", "../../d", false}, {"/a", "/../b", false}, {"/a", ".", false},
	} {
		if got := climbs(tt.at, tt.link); got != tt.want {
			t.Errorf("climbs(%s, %s) = %v, want %v", tt.at, tt.link, got, tt.want)
		}
	}
}

func TestCacheDir(t *testing.T) {
	t.Setenv("RESULTITY_CACHE", "/some/where")
	if got, err := CacheDir(); err != nil || got != "/some/where" {
		t.Errorf("cache directory %s, error %v, want /some/where", got, err)
	}
}
