package images

import (
	"archive/tar"
	"bytes"
	"cmp"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// Annotations beside those of the OCI image specification. Labels of the same
// names carry the same values.
const (
	// AnnotationPackages lists the packages that files in the image came
	// from, one "name=version sha256:hash" a line, sorted by name.
	AnnotationPackages = "com.resultity.image.packages"

	sourceURL = "https://github.com/resultity/node"
)

// licenceFile matches the paths by which Debian's copyright files refer to a
// licence text that is not repeated in them.
var licenceFile = regexp.MustCompile(`/usr/share/common-licenses/[A-Za-z0-9.+-]*[A-Za-z0-9+]`)

// Assemble makes the recipe's image out of the packages. It is a pure function:
// the same recipe and packages, in any order, give the same digest.
func Assemble(r Recipe, ps []*Package) (v1.Image, error) {
	s, err := newSelection(ps)
	if err != nil {
		return nil, err
	}
	for _, list := range []struct {
		patterns []string
		add      func(string) error
	}{{r.Programs, s.addProgram}, {r.Plugins, s.addObject}, {r.Data, s.add}} {
		for _, pat := range list.patterns {
			matches, err := s.match(pat)
			if err != nil {
				return nil, err
			}
			for _, p := range matches {
				if err := list.add(p); err != nil {
					return nil, err
				}
			}
		}
	}
	if err := s.addPapers(); err != nil {
		return nil, err
	}
	used := s.used()
	created := s.newest()
	s.addScaffold()
	layer, err := writeLayer(s.dst, created)
	if err != nil {
		return nil, err
	}
	return describe(r, used, layer, created)
}

// selection picks from the packages' files.
type selection struct {
	src  tree                // all files of all packages
	dst  tree                // the image
	pkgs map[string]*Package // by name
}

// newSelection lays all packages over one another.
func newSelection(ps []*Package) (*selection, error) {
	s := &selection{src: make(tree), dst: make(tree), pkgs: make(map[string]*Package)}
	for _, p := range ps {
		if s.pkgs[p.Name] != nil {
			return nil, fmt.Errorf("package %s is there twice", p.Name)
		}
		s.pkgs[p.Name] = p
		for name, e := range p.files {
			old := s.src[name]
			if old != nil && !(old.mode.IsDir() && e.mode.IsDir()) {
				return nil, fmt.Errorf("packages %s and %s both have %s", old.owner, p.Name, name)
			}
			s.src[name] = e
		}
	}
	// Debian's /lib and its like are links that an installed system has and
	// no package needs to bring.
	for _, name := range []string{"/lib", "/lib64"} {
		if s.src[name] == nil && s.src["/usr"+name] != nil {
			s.src[name] = &entry{mode: fs.ModeSymlink | 0o777, link: "usr" + name}
		}
	}
	return s, nil
}

// match returns the paths that fit the pattern, at least one.
func (s *selection) match(pattern string) ([]string, error) {
	var found []string
	for p, e := range s.src {
		ok, err := path.Match(pattern, p)
		if err != nil {
			return nil, fmt.Errorf("pattern %q: %w", pattern, err)
		}
		if ok && !e.mode.IsDir() {
			found = append(found, p)
		}
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("no package has a file like %s", pattern)
	}
	slices.Sort(found)
	return found, nil
}

// add takes the file that p leads to, and every link and directory on the way.
func (s *selection) add(p string) error {
	if _, _, err := s.src.file(p); err != nil {
		return err
	}
	_, err := s.src.walk(p, func(p string, e *entry) {
		if s.dst[p] != nil {
			return
		}
		n := &entry{mode: e.mode.Type() | 0o644, link: e.link, data: e.data, mtime: e.mtime, owner: e.owner}
		switch {
		case e.mode.IsDir():
			// Every package has the same directories: whose time it is
			// would hang on their order.
			n = &entry{mode: fs.ModeDir | 0o755}
		case e.mode.Type() == fs.ModeSymlink:
			n.mode = fs.ModeSymlink | 0o777
		}
		s.dst[p] = n
	})
	return err
}

// addProgram is addObject for a file that may be executed.
func (s *selection) addProgram(p string) error {
	if err := s.addObject(p); err != nil {
		return err
	}
	real, e, err := s.dst.file(p)
	if err != nil {
		return err
	}
	if !isELF(e.data) {
		return fmt.Errorf("%s is not an ELF program", real)
	}
	e.mode |= 0o111
	return nil
}

// addObject takes p and, if it is ELF, all that it cannot be loaded without.
func (s *selection) addObject(p string) error {
	real, _, err := s.src.file(p)
	if err != nil {
		return err
	}
	seen := s.dst[real] != nil
	if err := s.add(p); err != nil {
		return err
	}
	if seen {
		return nil // and so are its libraries
	}
	loader, libs, err := s.src.requires(real)
	if err != nil {
		return err
	}
	if loader != "" {
		if err := s.addObject(loader); err != nil {
			return err
		}
		_, e, err := s.dst.file(loader)
		if err != nil {
			return err
		}
		e.mode |= 0o111 // the kernel executes it
	}
	for _, lib := range libs {
		if err := s.addObject(lib); err != nil {
			return err
		}
	}
	return nil
}

// addPapers takes what must go along with the files that are there: each
// package's copyright file, the licence texts it points to, and its control
// paragraph, in the place where scanners look for packages in images that have
// no package manager.
func (s *selection) addPapers() error {
	done := make(map[string]bool)
	for {
		var todo []*Package
		for _, p := range s.used() {
			if !done[p.Name] {
				todo = append(todo, p)
			}
		}
		if len(todo) == 0 {
			return nil
		}
		for _, p := range todo {
			done[p.Name] = true
			name := "/usr/share/doc/" + p.Name + "/copyright"
			if err := s.add(name); err != nil {
				return fmt.Errorf("licence of package %s: %w", p.Name, err)
			}
			_, e, err := s.dst.file(name)
			if err != nil {
				return err
			}
			for _, text := range licenceFile.FindAllString(string(e.data), -1) {
				if err := s.add(text); err != nil {
					return fmt.Errorf("licence of package %s: %w", p.Name, err)
				}
			}
			s.put("/var/lib/dpkg/status.d/"+p.Name, &entry{mode: 0o644, data: p.control, owner: p.Name})
		}
	}
}

// used returns the packages that something in the image came from, by name.
func (s *selection) used() []*Package {
	set := make(map[string]*Package)
	for _, e := range s.dst {
		if e.owner != "" {
			set[e.owner] = s.pkgs[e.owner]
		}
	}
	return slices.SortedFunc(maps.Values(set), func(a, b *Package) int { return cmp.Compare(a.Name, b.Name) })
}

// newest is when the youngest file in the image was made. It stands for the
// time of the whole image, since it changes with the packages only.
func (s *selection) newest() time.Time {
	var t time.Time
	for _, e := range s.dst {
		if e.mtime.After(t) {
			t = e.mtime
		}
	}
	return t.UTC().Truncate(time.Second)
}

// put adds an entry of our own and the directories above it.
func (s *selection) put(p string, e *entry) {
	for d := path.Dir(p); d != "/" && s.dst[d] == nil; d = path.Dir(d) {
		s.dst[d] = &entry{mode: fs.ModeDir | 0o755}
	}
	s.dst[p] = e
}

// scaffold is what every runtime image has beside its engine: the promises in
// the package's constants, and places for the file systems and files that a
// container manager mounts, so that nobody has to write to the root to make
// them.
var scaffold = tree{
	"/dev":             {mode: fs.ModeDir | 0o755},
	"/proc":            {mode: fs.ModeDir | 0o755},
	"/run":             {mode: fs.ModeDir | 0o755},
	"/sys":             {mode: fs.ModeDir | 0o755},
	"/tmp":             {mode: fs.ModeDir | fs.ModeSticky | 0o777},
	"/var/tmp":         {mode: fs.ModeDir | fs.ModeSticky | 0o777},
	ModelsDir:          {mode: fs.ModeDir | 0o755},
	SocketDir:          {mode: fs.ModeDir | 0o755},
	BridgeFile:         {mode: 0o644},
	"/etc/hostname":    {mode: 0o644},
	"/etc/hosts":       {mode: 0o644},
	"/etc/resolv.conf": {mode: 0o644},
	"/etc/passwd":      {mode: 0o644, data: []byte("root:x:0:0:root:/:/nonexistent\nruntime:x:1000:1000:runtime:/:/nonexistent\n")},
	"/etc/group":       {mode: 0o644, data: []byte("root:x:0:\nruntime:x:1000:\n")},
}

// addScaffold puts the scaffold over what the packages brought.
func (s *selection) addScaffold() {
	for p, e := range scaffold {
		s.put(p, e)
	}
}

// writeLayer writes the tree as a tar archive that holds no trace of its
// making: sorted, one time, no owners, no extended headers. It stays
// uncompressed, so that no compressor, which may change with the toolchain,
// has a say in the digest.
func writeLayer(t tree, at time.Time) (v1.Layer, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, p := range slices.Sorted(maps.Keys(t)) {
		e := t[p]
		h := &tar.Header{
			Format:  tar.FormatUSTAR,
			Name:    strings.TrimPrefix(p, "/"),
			Mode:    int64(e.mode.Perm()),
			ModTime: at,
		}
		if e.mode&fs.ModeSticky != 0 {
			h.Mode |= 0o1000
		}
		switch e.mode.Type() {
		case fs.ModeDir:
			h.Typeflag, h.Name = tar.TypeDir, h.Name+"/"
		case fs.ModeSymlink:
			h.Typeflag, h.Linkname = tar.TypeSymlink, e.link
		case 0:
			h.Typeflag, h.Size = tar.TypeReg, int64(len(e.data))
		default:
			return nil, fmt.Errorf("%s: unsupported kind of file %v", p, e.mode.Type())
		}
		if err := w.WriteHeader(h); err != nil {
			return nil, fmt.Errorf("%s: %w", p, err)
		}
		if _, err := w.Write(e.data); err != nil {
			return nil, fmt.Errorf("%s: %w", p, err)
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return static.NewLayer(b.Bytes(), types.OCIUncompressedLayer), nil
}

// describe wraps the layer in a configuration and a manifest.
func describe(r Recipe, ps []*Package, layer v1.Layer, created time.Time) (v1.Image, error) {
	var version string
	var list []string
	licences := make(map[string]bool)
	for _, p := range ps {
		if p.Name == r.VersionOf {
			version = p.Version
		}
		list = append(list, fmt.Sprintf("%s=%s sha256:%s", p.Name, p.Version, hex.EncodeToString(p.SHA256[:])))
		l := cmp.Or(r.Licences[p.Name], "LicenseRef-"+p.Name)
		if strings.Contains(l, " OR ") {
			l = "(" + l + ")"
		}
		licences[l] = true
	}
	if version == "" {
		return nil, fmt.Errorf("package %s, which gives the version, has no file in the image", r.VersionOf)
	}
	if len(r.Entrypoint) == 0 {
		return nil, errors.New("no entry point")
	}
	notes := map[string]string{
		"org.opencontainers.image.title":       r.Title,
		"org.opencontainers.image.description": r.Description,
		"org.opencontainers.image.version":     version,
		"org.opencontainers.image.created":     created.Format(time.RFC3339),
		"org.opencontainers.image.licenses":    strings.Join(slices.Sorted(maps.Keys(licences)), " AND "),
		"org.opencontainers.image.source":      sourceURL,
		AnnotationPackages:                     strings.Join(list, "\n"),
	}
	img := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
	img = mutate.ConfigMediaType(img, types.OCIConfigJSON)
	img, err := mutate.Append(img, mutate.Addendum{
		Layer:   layer,
		History: v1.History{Created: v1.Time{Time: created}, CreatedBy: "packaging/images " + r.Name},
	})
	if err != nil {
		return nil, err
	}
	cf, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	cf = cf.DeepCopy()
	cf.OS, cf.Architecture = "linux", runtime.GOARCH
	cf.Created = v1.Time{Time: created}
	cf.Config = v1.Config{User: User, WorkingDir: "/", Entrypoint: r.Entrypoint, Labels: notes}
	if img, err = mutate.ConfigFile(img, cf); err != nil {
		return nil, err
	}
	return mutate.Annotations(img, notes).(v1.Image), nil
}
