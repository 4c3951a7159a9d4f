package format

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"strings"
	"testing"

	"github.com/resultity/node/test/model"
)

func file(name string, b []byte) File { return File{name, int64(len(b)), bytes.NewReader(b)} }

// build writes a GGUF header: uint32, uint64 and strings as the format has them.
func build(parts ...any) []byte {
	var b []byte
	for _, p := range parts {
		switch p := p.(type) {
		case int:
			b = binary.LittleEndian.AppendUint32(b, uint32(p))
		case uint64:
			b = binary.LittleEndian.AppendUint64(b, p)
		case string:
			b = binary.LittleEndian.AppendUint64(b, uint64(len(p)))
			b = append(b, p...)
		case []byte:
			b = append(b, p...)
		}
	}
	return b
}

func u(n uint64) uint64 { return n }

var magic = []byte("GGUF")

// safe writes a safetensors file.
func safe(header string, data int) []byte {
	b := binary.LittleEndian.AppendUint64(nil, uint64(len(header)))
	return append(append(b, header...), make([]byte, data)...)
}

const twoTensors = `{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},"b":{"dtype":"F16","shape":[3],"data_offsets":[16,22]}}`

// one GGUF tensor of four F32 at an offset.
func oneTensor(dims, offset uint64, kind int) []byte {
	return append(build(magic, 3, u(1), u(0), "t", 1, dims, kind, offset), make([]byte, 7+16)...)
}

func part(no, of uint16) []byte {
	return build(magic, 3, u(0), u(2), "split.no", 2, binary.LittleEndian.AppendUint16(nil, no), "split.count", 2, binary.LittleEndian.AppendUint16(nil, of))
}

// TestCheck has one case for each way in which a file is refused. The names of its
// cases are stable.
func TestCheck(t *testing.T) {
	index := func(name string) []byte {
		return fmt.Appendf(nil, `{"metadata":{"total_size":1},"weight_map":{"a":%q}}`, name)
	}
	good := file("model.safetensors", safe(twoTensors, 22))
	for name, c := range map[string]struct {
		files []File
		want  error
	}{
		"a real gguf":                                  {[]File{file("m.gguf", model.GGUF())}, nil},
		"gguf without tensors":                         {[]File{file("m.gguf", build(magic, 3, u(0), u(0)))}, nil},
		"gguf with a tensor":                           {[]File{file("m.gguf", oneTensor(4, 0, 0))}, nil},
		"gguf parts":                                   {[]File{file("m-00001-of-00002.gguf", part(0, 2)), file("m-00002-of-00002.gguf", part(1, 2))}, nil},
		"safetensors":                                  {[]File{good}, nil},
		"safetensors and index":                        {[]File{good, file("model.safetensors.index.json", index("model.safetensors"))}, nil},
		"config":                                       {[]File{file("config.json", []byte(`{"architectures":["X"],"auto_map":null,"trust_remote_code":false}`))}, nil},
		"a vocabulary of that":                         {[]File{file("tokenizer.json", []byte(`{"model":{"vocab":{"auto_map":17,"trust_remote_code":18}}}`))}, nil},
		"texts":                                        {[]File{file("merges.txt", []byte("auto_map")), file("LICENSE", nil)}, nil},
		"pickle as gguf":                               {[]File{file("m.gguf", []byte("\x80\x02}q\x00."))}, ErrMagic},
		"zip as gguf":                                  {[]File{file("m.gguf", []byte("PK\x03\x04 a checkpoint"))}, ErrMagic},
		"empty gguf":                                   {[]File{file("m.gguf", nil)}, ErrMagic},
		"gguf of version 1":                            {[]File{file("m.gguf", build(magic, 1, u(0), u(0)))}, ErrHeader},
		"gguf cut in its header":                       {[]File{file("m.gguf", model.GGUF()[:1000])}, ErrHeader},
		"gguf cut in its tensors":                      {[]File{file("m.gguf", model.GGUF()[:len(model.GGUF())-100_000])}, ErrTensors},
		"gguf with endless values":                     {[]File{file("m.gguf", build(magic, 3, u(0), u(math.MaxUint64)))}, ErrHeader},
		"gguf with endless tensors":                    {[]File{file("m.gguf", build(magic, 3, u(math.MaxUint64), u(0)))}, ErrHeader},
		"gguf with a name too long":                    {[]File{file("m.gguf", build(magic, 3, u(0), u(1), strings.Repeat("k", maxKey+1), 4, 1))}, ErrHeader},
		"an index too long":                            {[]File{good, {Path: "model.safetensors.index.json", Size: maxIndex + 1}}, ErrHeader},
		"flags that ask for nothing":                   {[]File{file("config.json", []byte(`{"auto_map":{},"trust_remote_code":null,"custom_pipelines":{ },"x":[1]}`))}, nil},
		"auto_map that is cut":                         {[]File{file("config.json", []byte(`{"auto_map":{`))}, ErrMagic},
		"gguf with an endless name":                    {[]File{file("m.gguf", build(magic, 3, u(0), u(1), u(1<<63)))}, ErrHeader},
		"gguf with an endless text":                    {[]File{file("m.gguf", build(magic, 3, u(0), u(1), "k", 8, u(math.MaxUint64)))}, ErrHeader},
		"gguf with an endless list":                    {[]File{file("m.gguf", build(magic, 3, u(0), u(1), "k", 9, 10, u(1<<61)))}, ErrHeader},
		"gguf with a list too long":                    {[]File{file("m.gguf", build(magic, 3, u(0), u(1), "k", 9, 10, u(1<<20)))}, ErrHeader},
		"gguf with nested lists":                       {[]File{file("m.gguf", build(magic, 3, u(0), u(1), "k", 9, 9, u(1), 9, u(1), 9, u(1), 9, u(1), 9, u(1), 0, u(0)))}, ErrHeader},
		"gguf with an unknown value":                   {[]File{file("m.gguf", build(magic, 3, u(0), u(1), "k", 99))}, ErrHeader},
		"gguf with a value twice":                      {[]File{file("m.gguf", build(magic, 3, u(0), u(2), "k", 4, 1, "k", 4, 1))}, ErrHeader},
		"gguf with alignment 0":                        {[]File{file("m.gguf", build(magic, 3, u(0), u(1), "general.alignment", 4, 0))}, ErrHeader},
		"gguf tensor behind the end":                   {[]File{file("m.gguf", oneTensor(4, 32, 0))}, ErrTensors},
		"gguf tensor far behind":                       {[]File{file("m.gguf", oneTensor(4, math.MaxUint64&^31, 0))}, ErrTensors},
		"gguf tensor too large":                        {[]File{file("m.gguf", oneTensor(5, 0, 0))}, ErrTensors},
		"gguf tensor that overflows":                   {[]File{file("m.gguf", oneTensor(1<<62, 0, 0))}, ErrTensors},
		"gguf tensor not aligned":                      {[]File{file("m.gguf", oneTensor(1, 1, 0))}, ErrTensors},
		"gguf tensor of 5 dimensions":                  {[]File{file("m.gguf", build(magic, 3, u(1), u(0), "t", 5))}, ErrHeader},
		"gguf part that is another":                    {[]File{file("m-00001-of-00002.gguf", part(1, 2))}, ErrParts},
		"gguf part of another whole":                   {[]File{file("m-00001-of-00002.gguf", part(0, 3))}, ErrParts},
		"gguf part that says nothing":                  {[]File{file("m-00001-of-00002.gguf", build(magic, 3, u(0), u(0)))}, ErrParts},
		"gguf part as the whole":                       {[]File{file("m.gguf", part(0, 2))}, ErrParts},
		"pickle as safetensors":                        {[]File{file("m.safetensors", []byte("\x80\x02}q\x00cos\nsystem\n"))}, ErrHeader},
		"empty safetensors":                            {[]File{file("m.safetensors", nil)}, ErrMagic},
		"safetensors with a header longer than itself": {[]File{file("m.safetensors", build(u(1<<20), []byte("{}")))}, ErrHeader},
		"safetensors with an endless header":           {[]File{file("m.safetensors", build(u(math.MaxUint64), []byte("{}")))}, ErrHeader},
		"safetensors without JSON":                     {[]File{file("m.safetensors", safe("[1]", 0))}, ErrMagic},
		"safetensors with two objects":                 {[]File{file("m.safetensors", safe("{}{}", 0))}, ErrHeader},
		"safetensors with a tensor twice":              {[]File{file("m.safetensors", safe(`{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}`, 1))}, ErrHeader},
		"safetensors with metadata that are no texts":  {[]File{file("m.safetensors", safe(`{"__metadata__":{"a":1}}`, 0))}, ErrHeader},
		"safetensors with metadata that are a list":    {[]File{file("m.safetensors", safe(`{"__metadata__":["a"]}`, 0))}, ErrHeader},
		"safetensors with metadata in metadata":        {[]File{file("m.safetensors", safe(`{"__metadata__":{"a":{}}}`, 0))}, ErrHeader},
		"safetensors with metadata that are null":      {[]File{file("m.safetensors", safe(`{"__metadata__":null}`, 0))}, ErrHeader},
		"safetensors with a hole":                      {[]File{file("m.safetensors", safe(`{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}`, 2))}, ErrTensors},
		"safetensors with something behind":            {[]File{file("m.safetensors", safe(twoTensors, 23))}, ErrTensors},
		"safetensors cut":                              {[]File{file("m.safetensors", safe(twoTensors, 21))}, ErrTensors},
		"safetensors with overlap":                     {[]File{file("m.safetensors", safe(`{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}`, 3))}, ErrTensors},
		"safetensors with another shape":               {[]File{file("m.safetensors", safe(`{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}`, 4))}, ErrTensors},
		"safetensors with a shape that overflows":      {[]File{file("m.safetensors", safe(`{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}`, 0))}, ErrTensors},
		"safetensors with a negative offset":           {[]File{file("m.safetensors", safe(`{"a":{"dtype":"U8","shape":[1],"data_offsets":[-1,0]}}`, 1))}, ErrHeader},
		"safetensors with offsets reversed":            {[]File{file("m.safetensors", safe(`{"a":{"dtype":"X","shape":[],"data_offsets":[2,1]}}`, 1))}, ErrTensors},
		"index of a file that is not there":            {[]File{good, file("model.safetensors.index.json", index("model-2.safetensors"))}, ErrParts},
		"index of a pickle":                            {[]File{good, file("model.safetensors.index.json", index("pytorch_model.bin"))}, ErrParts},
		"index out of the directory":                   {[]File{good, file("d/model.safetensors.index.json", index("../model.safetensors"))}, ErrParts},
		"index of nothing":                             {[]File{good, file("model.safetensors.index.json", []byte(`{"weight_map":{}}`))}, ErrParts},
		"auto_map":                                     {[]File{file("config.json", []byte(`{"auto_map":{"AutoModel":"modeling.X"}}`))}, ErrCode},
		"auto_map of another repository":               {[]File{file("config.json", []byte(`{"auto_map":{"AutoModel":"evil/repo--modeling.X"}}`))}, ErrCode},
		"auto_map in a nested object":                  {[]File{file("tokenizer_config.json", []byte(`{"a":[{"auto_map":["x",null]}]}`))}, ErrCode},
		"auto_map with escapes":                        {[]File{file("config.json", []byte(`{"auto\u005fmap":{"AutoModel":"modeling.X"}}`))}, ErrCode},
		"trust_remote_code":                            {[]File{file("config.json", []byte(`{"trust_remote_code":true}`))}, ErrCode},
		"trust_remote_code as text":                    {[]File{file("generation_config.json", []byte(`{"trust_remote_code":"true"}`))}, ErrCode},
		"custom pipelines":                             {[]File{file("config.json", []byte(`{"custom_pipelines":{"x":{"impl":"x.X"}}}`))}, ErrCode},
		"custom code in an index":                      {[]File{good, file("model.safetensors.index.json", []byte(`{"auto_map":{"a":"b"},"weight_map":{"a":"model.safetensors"}}`))}, ErrCode},
		"config that is no JSON":                       {[]File{file("config.json", []byte(`{"a":`))}, ErrMagic},
		"config with something behind":                 {[]File{file("config.json", []byte(`{} {}`))}, ErrMagic},
		"config that is deep":                          {[]File{file("config.json", []byte(strings.Repeat("[", 1000)+strings.Repeat("]", 1000)))}, ErrHeader},
	} {
		t.Run(name, func(t *testing.T) {
			err := Check(c.files)
			t.Logf("expected: %v; got: %v", c.want, err)
			if !errors.Is(err, c.want) {
				t.Errorf("error %v, want %v", err, c.want)
			}
		})
	}
}

// Each bound is held before anything is read or kept for what is beyond it: most of
// these files end right behind the number.
func TestBounds(t *testing.T) {
	gguf := func(parts ...any) File { return file("m.gguf", build(append([]any{magic, 3}, parts...)...)) }
	key := func(parts ...any) File { return gguf(append([]any{u(0), u(1)}, parts...)...) }
	sized := func(path string, n int) File { return File{path, int64(n), bytes.NewReader(nil)} }
	nested := func(n int) File {
		return file("config.json", []byte(strings.Repeat("[", n)+strings.Repeat("]", n)))
	}
	lists := func(n int) File {
		parts := []any{"k"}
		for range n {
			parts = append(parts, 9) // a list of one
			if len(parts) > 2 {
				parts = append(parts, u(1))
			}
		}
		return key(append(parts, 0, u(0))...)
	}
	for name, c := range map[string]struct {
		bound int
		want  string // beyond it
		file  func(n int) File
	}{
		"JSON":                  {maxJSON, "bytes of JSON", func(n int) File { return sized("config.json", n) }},
		"index":                 {maxIndex, "an index of", func(n int) File { return sized("model.safetensors.index.json", n) }},
		"nested JSON":           {maxDepth + 1, "JSON deeper than", nested},
		"GGUF values":           {maxPairs, "0 tensors and", func(n int) File { return gguf(u(0), u(uint64(n))) }},
		"GGUF tensors":          {maxTensors, "tensors and 0 values", func(n int) File { return gguf(u(uint64(n)), u(0)) }},
		"GGUF key":              {maxKey, "a name of", func(n int) File { return key(u(uint64(n))) }},
		"GGUF name of a tensor": {maxName, "a name of", func(n int) File { return gguf(u(1), u(0), u(uint64(n))) }},
		"GGUF text":             {maxString, "a text of", func(n int) File { return key("k", 8, u(uint64(n))) }},
		"GGUF list":             {maxArray, "a list of", func(n int) File { return key("k", 9, 10, u(uint64(n))) }},
		"GGUF nested lists":     {maxNested, "or too deep", lists},
		"GGUF dimensions":       {maxDims, "dimensions", func(n int) File { return gguf(u(1), u(0), "t", n) }},
		"safetensors header": {maxSafetensorsHeader, "a header of", func(n int) File {
			return File{"m.safetensors", 1 << 40, bytes.NewReader(build(u(uint64(n))))}
		}},
		"safetensors shape": {maxShape, "a shape of", func(n int) File {
			return file("m.safetensors", safe(`{"a":{"dtype":"U8","shape":[1`+strings.Repeat(",1", n-1)+`],"data_offsets":[0,1]}}`, 1))
		}},
	} {
		t.Run(name, func(t *testing.T) {
			if err := Check([]File{c.file(c.bound)}); err != nil && strings.Contains(err.Error(), c.want) {
				t.Errorf("%d: %v", c.bound, err)
			}
			err := Check([]File{c.file(c.bound + 1)})
			t.Logf("expected: %v: … %s; got: %v", ErrHeader, c.want, err)
			if !errors.Is(err, ErrHeader) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%d: %v", c.bound+1, err)
			}
		})
	}
}

func FuzzGGUF(f *testing.F) {
	f.Add(model.GGUF()[:64<<10])
	f.Add(oneTensor(4, 0, 0))
	f.Add(part(0, 2))
	f.Fuzz(func(_ *testing.T, b []byte) { _ = Check([]File{file("m.gguf", b), file("m-00001-of-00002.gguf", b)}) }) // it returns
}

func FuzzSafetensors(f *testing.F) {
	f.Add(safe(twoTensors, 22))
	f.Add(safe(`{"a":{"dtype":"X","shape":[],"data_offsets":[2,1]}}`, 1))
	f.Fuzz(func(t *testing.T, b []byte) {
		if Check([]File{file("m.safetensors", b)}) == nil && int64(binary.LittleEndian.Uint64(b)) > int64(len(b)) {
			t.Error("took a header that is longer than the file")
		}
	})
}

func FuzzJSON(f *testing.F) {
	f.Add([]byte(`{"auto_map":{"AutoModel":"modeling.X"}}`))
	f.Add([]byte(`{"weight_map":{"a":"model.safetensors"}}`))
	f.Fuzz(func(_ *testing.T, b []byte) {
		_ = Check([]File{file("config.json", b)}) // it returns
		_ = Check([]File{file("model.safetensors.index.json", b)})
	})
}
