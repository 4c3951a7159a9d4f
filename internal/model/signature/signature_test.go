package signature

import (
	"bytes"
	"encoding/json"
	"errors"
	"maps"
	"os"
	"testing"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/model/modeltest"
)

func of(s string) digest.Digest { return digest.Of([]byte(s)) }

var model = map[string]digest.Digest{"config.json": of("c"), "model.safetensors": of("m"), "sub/tokenizer.json": of("t")}

// TestVerify has one case for each way in which a signature does not count. The names
// of its cases are stable.
func TestVerify(t *testing.T) {
	key, other := modeltest.NewKey(), modeltest.NewKey()
	with := func(change func(map[string]any)) []byte {
		s := modeltest.Statement(model)
		change(s)
		return key.Bundle(s)
	}
	predicate := func(s map[string]any, name string) map[string]any {
		return s["predicate"].(map[string]any)[name].(map[string]any)
	}
	resources := func(s map[string]any) []any { return s["predicate"].(map[string]any)["resources"].([]any) }
	changed := func(name, content string) map[string]digest.Digest {
		m := maps.Clone(model)
		if content == "" {
			delete(m, name)
		} else {
			m[name] = of(content)
		}
		return m
	}
	good := with(func(map[string]any) {})
	for name, c := range map[string]struct {
		raw   []byte
		keys  []string
		files map[string]digest.Digest
		want  error
	}{
		"signed":                   {good, []string{key.PEM()}, model, nil},
		"signed by the second key": {good, []string{other.PEM(), key.PEM()}, model, nil},
		"signed by another key":    {good, []string{other.PEM()}, model, ErrKey},
		"no key":                   {good, nil, model, ErrKey},
		"flipped payload":          {bytes.Replace(good, []byte(`"payload":"eyJ`), []byte(`"payload":"eyK`), 1), []string{key.PEM()}, model, ErrKey},
		"a changed file":           {good, []string{key.PEM()}, changed("model.safetensors", "x"), ErrFiles},
		"a file more":              {good, []string{key.PEM()}, changed("modeling.json", "x"), ErrFiles},
		"a file less":              {good, []string{key.PEM()}, changed("config.json", ""), ErrFiles},
		"two files exchanged":      {good, []string{key.PEM()}, map[string]digest.Digest{"config.json": of("m"), "model.safetensors": of("c"), "sub/tokenizer.json": of("t")}, ErrFiles},
		"a file listed twice": {with(func(s map[string]any) {
			s["predicate"].(map[string]any)["resources"] = append(resources(s), resources(s)[0])
		}), []string{key.PEM()}, model, ErrFiles},
		"another predicate":     {with(func(s map[string]any) { s["predicateType"] = "https://slsa.dev/provenance/v1" }), []string{key.PEM()}, model, ErrStatement},
		"another statement":     {with(func(s map[string]any) { s["_type"] = "x" }), []string{key.PEM()}, model, ErrStatement},
		"symbolic links":        {with(func(s map[string]any) { predicate(s, "serialization")["allow_symlinks"] = true }), []string{key.PEM()}, model, ErrStatement},
		"shards":                {with(func(s map[string]any) { predicate(s, "serialization")["method"] = "shards" }), []string{key.PEM()}, model, ErrStatement},
		"another hash":          {with(func(s map[string]any) { resources(s)[0].(map[string]any)["algorithm"] = "blake2b" }), []string{key.PEM()}, model, ErrStatement},
		"a digest that is none": {with(func(s map[string]any) { resources(s)[0].(map[string]any)["digest"] = "00" }), []string{key.PEM()}, model, ErrStatement},
		"two subjects":          {with(func(s map[string]any) { s["subject"] = append(s["subject"].([]any), s["subject"].([]any)[0]) }), []string{key.PEM()}, model, ErrStatement},
		"subject of other files": {with(func(s map[string]any) {
			s["subject"].([]any)[0].(map[string]any)["digest"] = map[string]any{"sha256": of("").Hex()}
		}), []string{key.PEM()}, model, ErrStatement},
		"no bundle":                  {[]byte("{}"), []string{key.PEM()}, model, ErrMalformed},
		"empty":                      {nil, []string{key.PEM()}, model, ErrMalformed},
		"too large":                  {make([]byte, MaxSize+1), []string{key.PEM()}, model, ErrMalformed},
		"a message signature":        {[]byte(`{"mediaType":"application/vnd.dev.sigstore.bundle.v0.3+json","verificationMaterial":{"publicKey":{"hint":"x"}},"messageSignature":{"messageDigest":{"algorithm":"SHA2_256","digest":"AA=="},"signature":"AA=="}}`), []string{key.PEM()}, model, ErrMalformed},
		"no signature in it":         {bytes.Replace(good, []byte(`"signatures":[{`), []byte(`"signatures":[],"x":[{`), 1), []string{key.PEM()}, model, ErrMalformed},
		"a key that is none":         {good, []string{"x"}, model, ErrKey},
		"an empty list of resources": {with(func(s map[string]any) { s["predicate"].(map[string]any)["resources"] = []any{} }), []string{key.PEM()}, model, ErrFiles},
	} {
		t.Run(name, func(t *testing.T) {
			err := Verify(c.raw, c.keys, c.files)
			t.Logf("expected: %v; got: %v", c.want, err)
			if !errors.Is(err, c.want) {
				t.Errorf("error %v, want %v", err, c.want)
			}
		})
	}
}

// Nothing passes but what the key has signed. Key and signature are files, so that
// each process that fuzzes has the same.
func FuzzVerify(f *testing.F) {
	read := func(name string) []byte {
		raw, err := os.ReadFile("testdata/" + name)
		if err != nil {
			f.Fatal(err)
		}
		return raw
	}
	genuine, keys := read("bundle.json"), []string{string(read("key.pem"))}
	if err := Verify(genuine, keys, model); err != nil {
		f.Fatal(err)
	}
	payload := func(raw []byte) []byte {
		var b struct {
			DSSE struct {
				Payload []byte `json:"payload"`
			} `json:"dsseEnvelope"`
		}
		_ = json.Unmarshal(raw, &b) // what cannot be read has none
		return b.DSSE.Payload
	}
	if len(payload(genuine)) == 0 {
		f.Fatal("no payload")
	}
	f.Add(genuine)
	f.Add([]byte(`{"mediaType":"application/vnd.dev.sigstore.bundle.v0.3+json","dsseEnvelope":null}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if Verify(raw, keys, model) == nil && !bytes.Equal(payload(raw), payload(genuine)) {
			t.Error("took what nobody has signed")
		}
		if Verify(raw, keys, map[string]digest.Digest{"config.json": of("x")}) == nil {
			t.Error("took it for other files")
		}
	})
}
