package snapshot

import (
	"bytes"
	"cmp"
	"errors"
	"reflect"
	"strings"
	"testing"

	"github.com/resultity/node/internal/chunk"
	"github.com/resultity/node/internal/digest"
)

func TestModelDigestIsThatOfSha256sum(t *testing.T) {
	a, b := digest.Of([]byte("a")), digest.Of([]byte("b"))
	m := Model{Files: []File{{Path: "z/b", SHA256: b}, {Path: "a", SHA256: a}}}
	if got, want := m.Digest(), digest.Of([]byte(a.Hex()+"  a\n"+b.Hex()+"  z/b\n")); got != want {
		t.Errorf("digest %s, want %s", got, want)
	}
	if m.Files[0].Path != "z/b" {
		t.Error("Digest sorted the caller's files")
	}
}

// TestFilesOfModels has what may be among a model's files. The names of its cases
// are stable.
func TestFilesOfModels(t *testing.T) {
	const code, split = "such files can run code", "split gguf"
	for _, c := range []struct {
		name   string
		format Format
		paths  string
		want   string // in the error; "" for none
	}{
		{"one gguf", GGUF, "m.gguf", ""},
		{"split gguf", GGUF, "d/m-00001-of-00003.gguf d/m-00002-of-00003.gguf d/m-00003-of-00003.gguf", ""},
		{"safetensors directory", Safetensors, "config.json generation_config.json merges.txt model-00001-of-00001.safetensors model.safetensors.index.json tokenizer.model tokenizer.json chat_template.jinja README.md LICENSE", ""},
		{"split gguf without its last part", GGUF, "m-00001-of-00002.gguf", split},
		{"split gguf without its first part", GGUF, "m-00002-of-00002.gguf", split},
		{"split gguf with a part of another", GGUF, "m-00001-of-00002.gguf n-00002-of-00002.gguf", split},
		{"split gguf with another beside it", GGUF, "m-00001-of-00002.gguf m-00002-of-00002.gguf m.gguf", split},
		{"split gguf with other numbers", GGUF, "m-00001-of-00003.gguf m-00002-of-00003.gguf", split},
		{"two gguf", GGUF, "a.gguf b.gguf", split},
		{"safetensors without weights", Safetensors, "config.json", "no file of format safetensors"},
		{"pickle bin", Safetensors, "model.safetensors pytorch_model.bin", code},
		{"pickle pt", Safetensors, "model.safetensors model.pt", code},
		{"pickle pth", Safetensors, "model.safetensors consolidated.00.pth", code},
		{"pickle ckpt", Safetensors, "model.safetensors model.ckpt", code},
		{"pickle pkl", Safetensors, "model.safetensors x.pkl", code},
		{"python", Safetensors, "model.safetensors modeling_custom.py", code},
		{"python package", Safetensors, "model.safetensors custom/__init__.py", "path"},
		{"shared object", Safetensors, "model.safetensors libx.so", code},
		{"keras", Safetensors, "model.safetensors m.h5", code},
		{"gguf with a script", GGUF, "m.gguf run.sh", code},
		{"upper case", Safetensors, "model.safetensors MODEL.PY", code},
		{"two suffixes", Safetensors, "model.safetensors model.safetensors.bin", code},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := Model{Name: "m", Version: "1", Format: c.format}
			for _, p := range strings.Fields(c.paths) {
				f, err := NewFile(p, strings.NewReader(p), "https://h/"+p)
				if err != nil {
					t.Fatal(err)
				}
				m.Files = append(m.Files, f)
			}
			err := m.check()
			t.Logf("expected: %s; got: %v", cmp.Or(c.want, "<nil>"), err)
			if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
			if err == nil && m.Main() != strings.Fields(c.paths)[0] && c.format == GGUF {
				t.Errorf("main file %s", m.Main())
			}
		})
	}
}

func TestEngineTakesModel(t *testing.T) {
	raw := golden(t)
	part := func(p string) File {
		f, err := NewFile(p, strings.NewReader(p), "https://h/"+p)
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	split := []File{part("m-00001-of-00002.gguf"), part("m-00002-of-00002.gguf")}
	for engine, want := range map[Engine]string{LlamaCpp: "", "ollama": "this agent drives llamacpp and vllm", VLLM: "takes a model of format safetensors"} {
		c, err := Parse(raw)
		if err != nil {
			t.Fatal(err)
		}
		c.Models[0].Files, c.Runtime.Engine = split, engine
		err = c.check()
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", engine, err)
		}
	}
}

func TestNewFile(t *testing.T) {
	b := bytes.Repeat([]byte("x"), chunk.Size+1)
	f, err := NewFile("m.gguf", bytes.NewReader(b), "https://h/m.gguf")
	if err != nil || f.check() != nil {
		t.Fatal(err, f.check())
	}
	if f.Size != int64(len(b)) || f.SHA256 != digest.Of(b) || len(f.Chunks.Hashes) != 2*chunk.HashSize {
		t.Errorf("%+v", f)
	}
	small, err := NewFile("m.gguf", strings.NewReader("x"), "https://h/m.gguf")
	if err != nil || small.check() != nil || !reflect.DeepEqual(small.Chunks, Chunks{Root: digest.FromSum(chunk.Hash([]byte("x")))}) {
		t.Errorf("%+v, %v", small, err)
	}
	if _, err := NewFile("m.gguf", strings.NewReader("")); err == nil || errors.Is(err, ErrInvalid) {
		t.Errorf("empty: %v", err)
	}
}

func TestMemory(t *testing.T) {
	files := []File{{Path: "a.gguf", Size: 100}, {Path: "sig.json", Size: 7}}
	shards := []File{{Path: "a-1.safetensors", Size: 60}, {Path: "a-2.safetensors", Size: 41}, {Path: "config.json", Size: 7}}
	gpu := []string{"amd.com/gpu=0"}
	for name, c := range map[string]struct {
		m    Model
		r    Runtime
		want Memory
	}{
		"gguf":                      {Model{Format: GGUF, Files: files}, Runtime{}, Memory{Machine: 100}},
		"gguf, device without work": {Model{Format: GGUF, Files: files}, Runtime{Devices: gpu}, Memory{Machine: 100}},
		"gguf, layers on a device":  {Model{Format: GGUF, Files: files}, Runtime{Devices: gpu, Settings: Settings{GPULayers: 1}}, Memory{Together: 100}},
		"safetensors":               {Model{Format: Safetensors, Files: shards}, Runtime{}, Memory{Machine: 50}},
		"safetensors on a device":   {Model{Format: Safetensors, Files: shards}, Runtime{Devices: gpu}, Memory{Devices: 50}},
		"stated":                    {Model{Format: GGUF, Files: files}, Runtime{MemoryBytes: 3}, Memory{Machine: 3, Stated: true}},
		"stated of devices":         {Model{Format: GGUF, Files: files}, Runtime{Devices: gpu, DeviceBytes: 4}, Memory{Devices: 4, Stated: true}},
	} {
		c.m.Name, c.r.Model = "m", "m"
		if got := (&Config{Models: []Model{{Name: "other"}, c.m}, Runtime: c.r}).Memory(); got != c.want {
			t.Errorf("%s: %+v, want %+v", name, got, c.want)
		}
	}
}
