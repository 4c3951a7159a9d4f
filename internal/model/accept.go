package model

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/model/format"
	"github.com/resultity/node/internal/model/signature"
	"github.com/resultity/node/internal/snapshot"
)

// ErrRefused says that a model is what the configuration names, byte for byte, and
// may not be used: it is not of its format, would have code run, or is not signed as
// the configuration asks for. No source can mend it.
var ErrRefused = errors.New("model is refused")

// accept looks into the verified files of m.
func (s *Store) accept(m *snapshot.Model) (err error) {
	var files []format.File
	var opened []*os.File
	defer func() {
		for _, f := range opened {
			_ = f.Close() // read only: nothing can be lost
		}
	}()
	for i := range m.Files {
		f := &m.Files[i]
		b, err := s.root.Open(path.Join(blobs, f.SHA256.Hex()))
		if err != nil {
			return err
		}
		opened = append(opened, b)
		files = append(files, format.File{Path: f.Path, Size: f.Size, ReaderAt: b})
	}
	if err := format.Check(files); err != nil {
		return fmt.Errorf("%w: %w", ErrRefused, err)
	}
	if m.Signature == nil {
		return nil
	}
	covered := map[string]digest.Digest{}
	var bundle []byte
	for i := range m.Files {
		if m.Files[i].Path != m.Signature.File {
			covered[m.Files[i].Path] = m.Files[i].SHA256
			continue
		}
		if bundle, err = io.ReadAll(io.NewSectionReader(opened[i], 0, signature.MaxSize+1)); err != nil {
			return err
		}
	}
	if err := signature.Verify(bundle, m.Signature.Keys, covered); err != nil {
		return fmt.Errorf("%w: %w", ErrRefused, err)
	}
	return nil
}
