package receipt

import (
	"bytes"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/ethereum/go-ethereum/signer/core/apitypes"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
)

func sample(t testing.TB) (*evm.Key, Receipt) {
	t.Helper()
	key, err := evm.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	d := func() digest.Digest { return digest.Of([]byte{byte(rand.N(256)), byte(rand.N(256))}) }
	return key, Receipt{
		Job: NewJobID(), Node: key.Address(),
		Measured: Measured{ConfigDigest: d(), ImageDigest: d(), ModelDigest: d(), SandboxDigest: d(), RequestHash: d(), ResponseHash: d()},
		Claimed:  Claimed{ClassDigest: d(), PromptTokens: rand.Uint64(), CompletionTokens: rand.Uint64(), StartedAt: rand.Uint64(), FinishedAt: rand.Uint64()},
		Sequence: rand.Uint64(),
	}
}

// The oracle is go-ethereum's own EIP-712 code, fed with our JSON.
func TestHashEqualsGoEthereum(t *testing.T) {
	for range 50 {
		key, r := sample(t)
		chain := rand.Uint64N(1 << 53)
		s, err := r.Sign(chain, key)
		if err != nil {
			t.Fatal(err)
		}
		raw, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		var outer struct {
			TypedData apitypes.TypedData `json:"typedData"`
		}
		if err := json.Unmarshal(raw, &outer); err != nil {
			t.Fatal(err)
		}
		want, _, err := apitypes.TypedDataAndHash(outer.TypedData)
		if err != nil {
			t.Fatal(err)
		}
		if got := r.Hash(chain); !bytes.Equal(got[:], want) {
			t.Fatalf("hash %x, go-ethereum says %x", got, want)
		}
		back, err := Verify(raw)
		if err != nil || back != s {
			t.Fatalf("Verify = %+v, %v", back, err)
		}
	}
}

// Every value of the JSON form is changed in turn; none may survive.
func TestVerifyRefusesEveryChange(t *testing.T) {
	key, r := sample(t)
	s, err := r.Sign(31337, key)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	var tree any
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.UseNumber()
	if err := dec.Decode(&tree); err != nil {
		t.Fatal(err)
	}
	changed := 0
	var walk func(path string, v any, set func(any))
	walk = func(path string, v any, set func(any)) {
		switch v := v.(type) {
		case map[string]any:
			for k, x := range v {
				walk(path+"."+k, x, func(y any) { v[k] = y })
			}
		case []any:
			for i, x := range v {
				walk(path, x, func(y any) { v[i] = y })
			}
		case string:
			set(strings.TrimSuffix(v, v[len(v)-1:]) + string("0123456789abcdef1"[strings.IndexByte("0123456789abcdef", v[len(v)-1])+1]))
		case json.Number:
			set(v + "1")
		}
		if _, ok := v.(map[string]any); ok {
			return
		}
		if _, ok := v.([]any); ok {
			return
		}
		bad, err := json.Marshal(tree)
		if err != nil {
			t.Fatal(err)
		}
		_, err = Verify(bad)
		t.Logf("%s changed: expected: %v; got: %v", path, ErrInvalid, err)
		if !errors.Is(err, ErrInvalid) {
			t.Errorf("%s changed: Verify = %v, want ErrInvalid", path, err)
		}
		changed++
		set(v)
	}
	walk("", tree, nil)
	if changed < 40 {
		t.Fatalf("only %d values were tried", changed)
	}
	for name, bad := range map[string][]byte{
		"truncated": raw[:len(raw)-1], "trailing": append(bytes.Clone(raw), "{}"...), "empty": nil,
		"a field twice":          bytes.Replace(raw, []byte(`"claimed":{`), []byte(`"claimed":{"completionTokens":"999999"},"claimed":{`), 1),
		"a field in other case":  bytes.Replace(raw, []byte(`"claimed":{`), []byte(`"claimed":{"completionTokens":"999999"},"Claimed":{`), 1),
		"a claim as measured":    bytes.Replace(raw, []byte(`"},"claimed":{"classDigest":"`), []byte(`","classDigest":"`), 1),
		"another case alone":     bytes.Replace(raw, []byte(`"completionTokens":"`), []byte(`"CompletionTokens":"`), 1),
		"a value in two escapes": bytes.Replace(raw, []byte(`"primaryType":"Receipt"`), []byte(`"primaryType":"\u0052eceipt"`), 1),
		"unknown field":          bytes.Replace(raw, []byte(`"node"`), []byte(`"x":1,"node"`), 1), "huge": bytes.Repeat([]byte(" "), MaxSize+1),
	} {
		_, err := Verify(bad)
		t.Logf("%s: expected: %v; got: %v", name, ErrInvalid, err)
		if !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: Verify = %v, want ErrInvalid", name, err)
		}
	}
}

// What is printed is read the short way, and means there what it means to the
// reader of any spelling; so does whatever else goes the short way.
func TestPrinted(t *testing.T) {
	key, r := sample(t)
	signed, err := r.Sign(rand.Uint64(), key)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := signed.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	var j signedJSON
	if err := json.Unmarshal(raw, &j); err != nil {
		t.Fatal(err)
	}
	if want, err := json.Marshal(j); err != nil || !bytes.Equal(raw, want) {
		t.Errorf("printed %s, want %s", raw, want)
	}
	if most := len(printedHead) + printedRest; len(raw) > most || most > len(raw)+400 {
		t.Errorf("%d bytes are printed, in room for %d", len(raw), most)
	}
	if s, ok := printed(raw); !ok || s.check() != nil || s != signed {
		t.Errorf("%+v %v, want %+v", s, ok, signed)
	}
	for i := range raw {
		for _, c := range []byte{'0', '1', 'a', 'A', '"', ' ', raw[i] ^ ' '} {
			changed := bytes.Clone(raw)
			changed[i] = c
			agree(t, changed)
		}
		agree(t, raw[:i])
		agree(t, append(bytes.Clone(raw[:i]), raw[min(i+1, len(raw)):]...))
		agree(t, append(append(bytes.Clone(raw[:i]), raw[i]), raw[i:]...))
	}
}

func agree(t *testing.T, b []byte) {
	t.Helper()
	if s, ok := printed(b); ok {
		if want, err := read(b); err != nil || s != want {
			t.Errorf("%s is read as %+v; the reader of any spelling says %+v, %v", b, s, want, err)
		}
	}
}

func TestSignRefusesAnotherNodesReceipt(t *testing.T) {
	_, r := sample(t)
	other, _ := sample(t)
	_, err := r.Sign(1, other)
	t.Logf("expected: an error about another node; got: %v", err)
	if err == nil {
		t.Fatal("signed a receipt that names another node")
	}
}

// What nobody would read is neither signed nor printed.
func TestSignRefusesWhatIsNotRead(t *testing.T) {
	key, whole := sample(t)
	for name, lacks := range map[string]func(*Receipt){
		"job": func(r *Receipt) { r.Job = JobID{} }, "node": func(r *Receipt) { r.Node = evm.Address{} },
		"configDigest": func(r *Receipt) { r.Measured.ConfigDigest = digest.Digest{} }, "imageDigest": func(r *Receipt) { r.Measured.ImageDigest = digest.Digest{} },
		"modelDigest": func(r *Receipt) { r.Measured.ModelDigest = digest.Digest{} }, "sandboxDigest": func(r *Receipt) { r.Measured.SandboxDigest = digest.Digest{} },
		"requestHash": func(r *Receipt) { r.Measured.RequestHash = digest.Digest{} }, "responseHash": func(r *Receipt) { r.Measured.ResponseHash = digest.Digest{} },
		"classDigest": func(r *Receipt) { r.Claimed.ClassDigest = digest.Digest{} },
	} {
		r := whole
		lacks(&r)
		if _, err := r.Sign(1, key); !errors.Is(err, ErrInvalid) {
			t.Errorf("without %s: Sign = %v", name, err)
		}
		if _, err := r.With(1, evm.Signature{}); !errors.Is(err, ErrInvalid) {
			t.Errorf("without %s: With = %v", name, err)
		}
		sig, err := key.Sign(r.Hash(1))
		if err != nil {
			t.Fatal(err)
		}
		s := Signed{receipt: r, chainID: 1, sig: sig}
		if _, err := Verify(s.print(nil)); !errors.Is(err, ErrInvalid) { // else to refuse it was wrong
			t.Errorf("without %s: Verify = %v", name, err)
		}
	}
	whole = Receipt{Job: whole.Job, Node: whole.Node, Measured: whole.Measured, Claimed: Claimed{ClassDigest: whole.Claimed.ClassDigest}}
	s, err := whole.Sign(1, key)
	if err != nil {
		t.Fatalf("a receipt without numbers: %v", err)
	}
	if s.Hash() != whole.Hash(1) {
		t.Error("the hash of what was signed is another one")
	}
	var nobodys Signed
	if b, err := json.Marshal(nobodys); err == nil {
		t.Errorf("what nobody has signed is printed: %s", b)
	}
}

// The hash that a receipt has with it is never what somebody else says.
func TestHashIsThatOfTheReceipt(t *testing.T) {
	key, r := sample(t)
	made, err := r.Sign(7, key)
	if err != nil {
		t.Fatal(err)
	}
	given, err := r.With(7, made.Signature())
	if err != nil {
		t.Fatal(err)
	}
	read, err := Verify(made.print(nil))
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []Signed{made, given, read} {
		if stated := s.Receipt(); s.Hash() != stated.Hash(s.ChainID()) || stated != r {
			t.Errorf("%+v", s)
		}
	}
}

func FuzzVerify(f *testing.F) {
	key, err := evm.ParseKey(strings.Repeat("1", 64)) // the same in each process that fuzzes
	if err != nil {
		f.Fatal(err)
	}
	d := digest.Of(nil)
	r := Receipt{
		Job: JobID{1}, Node: key.Address(), Sequence: 1<<32 + 1,
		Measured: Measured{ConfigDigest: d, ImageDigest: d, ModelDigest: d, SandboxDigest: d, RequestHash: d, ResponseHash: d},
		Claimed:  Claimed{ClassDigest: d, PromptTokens: 3},
	}
	s, err := r.Sign(1, key)
	if err != nil {
		f.Fatal(err)
	}
	raw, err := json.Marshal(s)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw)
	f.Fuzz(func(t *testing.T, b []byte) {
		agree(t, b)
		s, err := Verify(b)
		if err != nil {
			return
		}
		again, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		if stated := s.Receipt(); s.Hash() != stated.Hash(s.ChainID()) {
			t.Fatal("it has another hash")
		}
		if back, err := Verify(again); err != nil || back != s {
			t.Fatalf("does not survive printing: %v", err)
		}
	})
}

func BenchmarkSign(b *testing.B) {
	key, r := sample(b)
	for b.Loop() {
		if _, err := r.Sign(31337, key); err != nil {
			b.Fatal(err)
		}
	}
}
