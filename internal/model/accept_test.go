package model

import (
	"errors"
	"maps"
	"net/http"
	"os"
	"slices"
	"testing"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/model/format"
	"github.com/resultity/node/internal/model/modeltest"
	"github.com/resultity/node/internal/model/signature"
	"github.com/resultity/node/internal/snapshot"
)

// TestRefusedModels: what is byte for byte what the configuration names, and still
// may not be used, gets no directory. The names of its cases are stable.
func TestRefusedModels(t *testing.T) {
	key, other := modeltest.NewKey(), modeltest.NewKey()
	base := map[string][]byte{"config.json": []byte("{}"), "m.safetensors": []byte("\x02\x00\x00\x00\x00\x00\x00\x00{}")}
	sums := map[string]digest.Digest{}
	for name, b := range base {
		sums[name] = digest.Of(b)
	}
	with := func(name string, b []byte) map[string][]byte {
		m := maps.Clone(base)
		m[name] = b
		return m
	}
	signed := with("model.sig", key.Bundle(modeltest.Statement(sums)))
	trust := func(k modeltest.Key) *snapshot.Signature {
		return &snapshot.Signature{File: "model.sig", Keys: []string{k.PEM()}}
	}
	less := maps.Clone(sums)
	delete(less, "config.json")
	for name, c := range map[string]struct {
		files map[string][]byte
		trust *snapshot.Signature
		want  error
	}{
		"good":                          {base, nil, nil},
		"signed":                        {signed, trust(key), nil},
		"signed by somebody else":       {signed, trust(other), signature.ErrKey},
		"signature without a file":      {with("model.sig", key.Bundle(modeltest.Statement(less))), trust(key), signature.ErrFiles},
		"signature that is none":        {with("model.sig", []byte("{}")), trust(key), signature.ErrMalformed},
		"signature that is endless":     {with("model.sig", make([]byte, 2<<20)), trust(key), signature.ErrMalformed},
		"remote code in its config":     {with("config.json", []byte(`{"auto_map":{"AutoModel":"x.X"}}`)), nil, format.ErrCode},
		"signed remote code":            {with("config.json", []byte(`{"auto_map":{"AutoModel":"x.X"}}`)), trust(key), format.ErrCode},
		"pickle under another name":     {with("m.safetensors", []byte("\x80\x02}q\x00cos\nsystem\n")), nil, format.ErrHeader},
		"gguf whose tensors lie beyond": {with("m.gguf", []byte("GGUF\x03\x00\x00\x00\x01")), nil, format.ErrHeader},
	} {
		t.Run(name, func(t *testing.T) {
			srv := serve(t, func(w http.ResponseWriter, r *http.Request) {
				(&modeltest.Good{B: c.files[r.URL.Path[1:]]}).ServeHTTP(w, r)
			})
			m := modelOf()
			m.Signature = c.trust
			for _, path := range slices.Sorted(maps.Keys(c.files)) {
				m.Files = append(m.Files, fileOf(path, c.files[path], srv.URL+"/"+path))
			}
			s := open(t, t.TempDir(), srv)
			dir, err := s.Ensure(t.Context(), m, nil)
			t.Logf("expected: %v; got: %v", c.want, err)
			if !errors.Is(err, c.want) || errors.Is(err, ErrRefused) != (c.want != nil) {
				t.Errorf("error %v, want %v", err, c.want)
			}
			trees, readErr := os.ReadDir(s.dir + "/" + trees)
			if readErr != nil || (len(trees) == 0) != (c.want != nil) || s.Have(m) != (c.want == nil) {
				t.Errorf("directory %q, %d trees, %v", dir, len(trees), readErr)
			}
		})
	}
}
