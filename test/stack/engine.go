package stack

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/test/oci"
)

// PushEngine makes an image with the program in the place where a unit of
// llama.cpp has its own, pushes it under a name to the stack's registry, or the
// way to it that is given, and signs it. Each of changes is made to the image before.
func (s *Stack) PushEngine(ctx context.Context, to *oci.Registry, name string, program []byte, changes ...func(v1.Image) (v1.Image, error)) (snapshot.ImageRef, error) {
	img, err := oci.Single(name+"-engine", program)
	if err != nil {
		return snapshot.ImageRef{}, err
	}
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	err = errors.Join(
		w.WriteHeader(&tar.Header{Name: "usr/", Typeflag: tar.TypeDir, Mode: 0o755}),
		w.WriteHeader(&tar.Header{Name: "usr/bin/", Typeflag: tar.TypeDir, Mode: 0o755}),
		w.WriteHeader(&tar.Header{Name: "usr/bin/llama-server", Typeflag: tar.TypeSymlink, Linkname: "/" + name + "-engine", Mode: 0o777}),
		w.Close(),
	)
	if err != nil {
		return snapshot.ImageRef{}, err
	}
	if img, err = mutate.AppendLayers(img, static.NewLayer(layer.Bytes(), types.OCIUncompressedLayer)); err != nil {
		return snapshot.ImageRef{}, err
	}
	for _, change := range changes {
		if img, err = change(img); err != nil {
			return snapshot.ImageRef{}, err
		}
	}
	pushed, err := to.Push(ctx, "resultity/"+name, img)
	if err != nil {
		return snapshot.ImageRef{}, err
	}
	if err := to.Sign(ctx, pushed, s.Key); err != nil {
		return snapshot.ImageRef{}, err
	}
	return snapshot.ParseImageRef(pushed.String())
}
