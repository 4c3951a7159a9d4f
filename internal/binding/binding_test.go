package binding

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/ethereum/go-ethereum/signer/core/apitypes"

	"github.com/resultity/node/internal/evm"
)

var now = time.UnixMilli(1_800_000_000_000)

func sample(t testing.TB) (*evm.Key, Statement) {
	t.Helper()
	key, err := evm.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	return key, Statement{
		Network: "testnet", Node: evm.Address{7}, Owner: key.Address(), Action: Bind, Nonce: evm.Hash{1, 2, 3},
		IssuedAt: now.UnixMilli(), ExpiresAt: now.Add(10 * time.Minute).UnixMilli(),
	}
}

func sign(t testing.TB, key *evm.Key, s Statement, chain uint64) Signed {
	t.Helper()
	sig, err := key.Sign(s.Hash(chain))
	if err != nil {
		t.Fatal(err)
	}
	return Signed{s, sig}
}

// The oracle is go-ethereum's own EIP-712 code, fed with what wallets get.
func TestHashEqualsGoEthereum(t *testing.T) {
	_, s := sample(t)
	for _, chain := range []uint64{1, 31337, 1 << 52} {
		for _, change := range []func(*Statement){
			func(*Statement) {}, func(s *Statement) { s.Network = "ünï\"code" }, func(s *Statement) { s.Action = Unbind },
			func(s *Statement) { s.Node = evm.Address{19: 1} }, func(s *Statement) { s.ExpiresAt = 1<<63 - 1 },
		} {
			s := s
			change(&s)
			var data apitypes.TypedData
			if err := json.Unmarshal(s.TypedData(chain), &data); err != nil {
				t.Fatal(err)
			}
			want, _, err := apitypes.TypedDataAndHash(data)
			if err != nil {
				t.Fatal(err)
			}
			if got := s.Hash(chain); !bytes.Equal(got[:], want) {
				t.Errorf("hash %x, go-ethereum says %x", got, want)
			}
		}
	}
}

func TestTypedDataComesBack(t *testing.T) {
	_, s := sample(t)
	raw := s.TypedData(31337)
	got, chain, err := ParseTypedData(raw)
	if err != nil || got != s || chain != 31337 {
		t.Fatalf("%+v, %d, %v", got, chain, err)
	}
	var compact bytes.Buffer
	if err := json.Compact(&compact, raw); err != nil {
		t.Fatal(err)
	}
	if _, _, err := ParseTypedData(compact.Bytes()); err != nil {
		t.Error(err)
	}
	replace := func(old, new string) []byte {
		b := bytes.Replace(raw, []byte(old), []byte(new), 1)
		if bytes.Equal(b, raw) {
			t.Fatalf("%s is not in the typed data", old)
		}
		return b
	}
	for name, bad := range map[string][]byte{
		"empty": nil, "cut": raw[:len(raw)/2], "more": append(bytes.Clone(raw), "{}"...), "huge": bytes.Repeat([]byte(" "), MaxSize+1),
		"another type":    replace(`"uint64"`, `"uint32"`),
		"another domain":  replace(`"Resultity"`, `"resultity"`),
		"other case":      replace(`"message"`, `"Message"`),
		"a field twice":   replace(`"action": "bind"`, `"action": "unbind", "action": "bind"`),
		"unknown field":   replace(`"message": {`, `"message": {"x": 1,`),
		"bad address":     replace(s.Owner.Hex(), "0x12"),
		"number in words": replace(`"chainId": 31337`, `"chainId": "31337"`),
	} {
		if _, _, err := ParseTypedData(bad); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestParseSignature(t *testing.T) {
	key, s := sample(t)
	good := sign(t, key, s, 1)
	zero := good.Signature
	zero[64] -= 27
	plain := hex.EncodeToString(good.Signature[:])
	for name, text := range map[string]string{
		"plain": good.Signature.String(), "v of 0 or 1": zero.String(), "without 0x": plain, "quoted": `  "0x` + strings.ToUpper(plain) + "\"\r\n",
	} {
		got, err := ParseSignature(text)
		if err != nil || got != good.Signature {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
	for name, c := range map[string]struct{ text, says string }{
		"empty": {"", "130"}, "no hex": {"0x" + strings.Repeat("zz", 65), "130"}, "short": {"0x1234", "EIP-1271"},
		"compact": {"0x" + plain[:128], "EIP-1271"}, "contract": {"0x" + plain + plain, "EIP-1271"}, "odd": {plain[:129], "130"},
	} {
		if _, err := ParseSignature(c.text); !errors.Is(err, evm.ErrSignature) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestCheckRefuses(t *testing.T) {
	key, s := sample(t)
	other, _ := sample(t)
	terms := Terms{Network: s.Network, ChainID: 31337, Node: s.Node, Action: Bind, Nonce: s.Nonce, Now: now.Add(time.Minute), Window: time.Minute}
	good := sign(t, key, s, 31337)
	if err := good.CheckTerms(terms); err != nil {
		t.Fatal(err)
	}
	order, _ := new(big.Int).SetString("fffffffffffffffffffffffffffffffebaaedce6af48a03bbfd25e8cd0364141", 16)
	high := good.Signature
	new(big.Int).Sub(order, new(big.Int).SetBytes(high[32:64])).FillBytes(high[32:64])
	high[64] = 55 - high[64] // 27 becomes 28, and 28 becomes 27: the same signature in its other spelling
	v29 := good.Signature
	v29[64] = 29
	resigned := func(change func(*Statement)) Signed {
		st := s
		change(&st)
		return sign(t, key, st, 31337)
	}
	for name, c := range map[string]struct {
		signed Signed
		says   string
	}{
		"wrong wallet":      {sign(t, other, s, 31337), other.Address().Hex()},
		"other chain":       {sign(t, key, s, 1), "signature is that of"},
		"high s":            {Signed{s, high}, "lower half"},
		"v of 29":           {Signed{s, v29}, "27 or 28"},
		"zero":              {Signed{s, evm.Signature{}}, "27 or 28"},
		"other network":     {resigned(func(s *Statement) { s.Network = "mainnet" }), `"mainnet"`},
		"another node's":    {resigned(func(s *Statement) { s.Node = evm.Address{8} }), "about node"},
		"other action":      {resigned(func(s *Statement) { s.Action = Unbind }), "unbind"},
		"other nonce":       {resigned(func(s *Statement) { s.Nonce = evm.Hash{9} }), "nonce"},
		"future":            {resigned(func(s *Statement) { s.IssuedAt = now.Add(time.Hour).UnixMilli() }), "future"},
		"before time began": {resigned(func(s *Statement) { s.IssuedAt = -1 }), "future"},
		"expired":           {resigned(func(s *Statement) { s.ExpiresAt = now.UnixMilli() }), "expired"},
		"for too long":      {resigned(func(s *Statement) { s.ExpiresAt = s.IssuedAt + MaxAge.Milliseconds() + 1 }), "more than"},
		"for ever":          {resigned(func(s *Statement) { s.ExpiresAt = 1<<63 - 1 }), "more than"},
		"nobody's":          {resigned(func(s *Statement) { s.Owner = evm.Address{} }), "no owner"},
	} {
		err := c.signed.CheckTerms(terms)
		t.Logf("%s: expected: %s; got: %v", name, c.says, err)
		if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, want %q", name, err, c.says)
		}
	}
	if s := resigned(func(s *Statement) { s.ExpiresAt = s.IssuedAt + MaxAge.Milliseconds() }); s.CheckTerms(terms) != nil {
		t.Errorf("as long as it may: %v", s.CheckTerms(terms))
	}
	// Every field counts.
	for i, change := range []func(*Statement){
		func(s *Statement) { s.Network += "x" }, func(s *Statement) { s.Node[0]++ }, func(s *Statement) { s.Action = Unbind },
		func(s *Statement) { s.Nonce[31]++ }, func(s *Statement) { s.IssuedAt++ }, func(s *Statement) { s.ExpiresAt++ },
	} {
		bad := good
		change(&bad.Statement)
		err := bad.Check(31337)
		t.Logf("field %d changed: expected: %v; got: %v", i, ErrInvalid, err)
		if !errors.Is(err, ErrInvalid) {
			t.Errorf("change %d: %v", i, err)
		}
	}
}

func FuzzParseTypedData(f *testing.F) {
	_, s := sample(f)
	f.Add(s.TypedData(1))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, chain, err := ParseTypedData(b)
		if err != nil {
			return
		}
		if again, c, err := ParseTypedData(s.TypedData(chain)); err != nil || again != s || c != chain {
			t.Fatalf("does not survive printing: %v", err)
		}
	})
}
