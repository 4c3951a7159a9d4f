package images

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"
	"time"
)

// A tree is a file system in memory. Keys are absolute and clean; the root
// itself is not in it.
type tree map[string]*entry

// entry is a directory, a regular file or a symbolic link.
type entry struct {
	mode  fs.FileMode // type and permissions
	link  string      // a link's target, as written
	data  []byte      // a regular file's content, never changed
	mtime time.Time
	owner string // the package that it came with, "" for none
}

// maxLinks is how many links one path may lead through, as in the kernel.
const maxLinks = 40

// walk follows p as the kernel would with the tree as its root, and calls see
// for each entry on the way: every link, every directory, and the last one. It
// returns the path that holds no link any more. No link leads out of the
// tree, since there is nothing above its root.
func (t tree) walk(p string, see func(p string, e *entry)) (string, error) {
	if !path.IsAbs(p) {
		return "", fmt.Errorf("%q is not an absolute path", p)
	}
	at, rest := "/", p
	for links := 0; rest != ""; {
		var name string
		name, rest, _ = strings.Cut(rest, "/")
		switch name {
		case "", ".":
			continue
		case "..":
			at = path.Dir(at)
			continue
		}
		next := path.Join(at, name)
		e := t[next]
		if e == nil {
			return "", &fs.PathError{Op: "find", Path: next, Err: fs.ErrNotExist}
		}
		if see != nil {
			see(next, e)
		}
		if e.mode.Type() != fs.ModeSymlink {
			if rest != "" && !e.mode.IsDir() {
				return "", &fs.PathError{Op: "find", Path: next, Err: errors.New("not a directory")}
			}
			at = next
			continue
		}
		if links++; links > maxLinks {
			return "", &fs.PathError{Op: "find", Path: p, Err: errors.New("too many links")}
		}
		if path.IsAbs(e.link) {
			at = "/"
		}
		rest = e.link + "/" + rest
	}
	return at, nil
}

// climbs reports whether following the link would at some point go above the
// root, where only the kernel's treatment of ".." at the root keeps it inside.
func climbs(at, link string) bool {
	if path.IsAbs(link) {
		return false
	}
	depth := strings.Count(path.Dir(at), "/")
	if path.Dir(at) == "/" {
		depth = 0
	}
	for name := range strings.SplitSeq(link, "/") {
		switch name {
		case "", ".":
		case "..":
			if depth--; depth < 0 {
				return true
			}
		default:
			depth++
		}
	}
	return false
}

// file returns the regular file that p leads to and the path it has without
// links.
func (t tree) file(p string) (string, *entry, error) {
	real, err := t.walk(p, nil)
	if err != nil {
		return "", nil, err
	}
	e := t[real]
	if e == nil || !e.mode.IsRegular() {
		return "", nil, &fs.PathError{Op: "find", Path: p, Err: errors.New("not a regular file")}
	}
	return real, e, nil
}
