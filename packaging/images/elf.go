package images

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"
)

// object is what an ELF file says about the files it cannot do without.
type object struct {
	interp string   // the dynamic loader, "" if none
	needed []string // names of shared libraries
	dirs   []string // directories to look in first
	system []string // directories that the loader looks in by itself
}

const elfMagic = "\x7fELF"

// isELF tells by the first bytes.
func isELF(b []byte) bool { return bytes.HasPrefix(b, []byte(elfMagic)) }

// triplets are Debian's directory names for machines.
var triplets = map[elf.Machine]string{
	elf.EM_X86_64:  "x86_64-linux-gnu",
	elf.EM_AARCH64: "aarch64-linux-gnu",
}

// parseELF reads the ELF file b, which lies in the directory origin.
func parseELF(b []byte, origin string) (*object, error) {
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		return nil, err
	}
	triplet, ok := triplets[f.Machine]
	if !ok {
		return nil, fmt.Errorf("machine %v is not supported", f.Machine)
	}
	o := &object{system: []string{"/lib/" + triplet, "/usr/lib/" + triplet, "/lib", "/usr/lib"}}
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP {
			continue
		}
		if p.Filesz == 0 || p.Filesz > 4096 {
			return nil, errors.New("bad size of the loader's path")
		}
		s := make([]byte, p.Filesz)
		if _, err := p.ReadAt(s, 0); err != nil {
			return nil, fmt.Errorf("loader's path: %w", err)
		}
		o.interp = strings.TrimRight(string(s), "\x00")
	}
	if f.SectionByType(elf.SHT_DYNAMIC) == nil {
		return o, nil // static
	}
	if o.needed, err = f.DynString(elf.DT_NEEDED); err != nil {
		return nil, fmt.Errorf("needed libraries: %w", err)
	}
	// The older DT_RPATH only counts where there is no DT_RUNPATH.
	dirs, err := f.DynString(elf.DT_RUNPATH)
	if err == nil && len(dirs) == 0 {
		dirs, err = f.DynString(elf.DT_RPATH)
	}
	if err != nil {
		return nil, fmt.Errorf("library path: %w", err)
	}
	for _, d := range strings.Split(strings.Join(dirs, ":"), ":") {
		d = strings.NewReplacer("$ORIGIN", origin, "${ORIGIN}", origin).Replace(d)
		if path.IsAbs(d) { // a relative one depends on where the program is started
			o.dirs = append(o.dirs, d)
		}
	}
	return o, nil
}

// requires returns the paths of the loader and the libraries that the object
// at real, a path without links, gets in the tree t. A file that is not ELF
// requires nothing. Libraries that those libraries need are not in the answer.
func (t tree) requires(real string) (loader string, libs []string, err error) {
	e := t[real]
	if !isELF(e.data) {
		return "", nil, nil
	}
	o, err := parseELF(e.data, path.Dir(real))
	if err != nil {
		return "", nil, fmt.Errorf("%s: %w", real, err)
	}
	if o.interp != "" {
		if _, _, err := t.file(o.interp); err != nil {
			return "", nil, fmt.Errorf("%s: loader: %w", real, err)
		}
	}
	for _, lib := range o.needed {
		p, err := t.library(lib, o)
		if err != nil {
			return "", nil, fmt.Errorf("%s: %w", real, err)
		}
		libs = append(libs, p)
	}
	return o.interp, libs, nil
}

// library returns the first path that leads to the library in the directories
// where the dynamic loader would look.
func (t tree) library(name string, o *object) (string, error) {
	if strings.Contains(name, "/") {
		_, _, err := t.file(name)
		return name, err
	}
	for _, dirs := range [][]string{o.dirs, o.system} {
		for _, d := range dirs {
			p := path.Join(d, name)
			if _, _, err := t.file(p); err == nil {
				return p, nil
			}
		}
	}
	return "", fmt.Errorf("library %s: %w", name, fs.ErrNotExist)
}
