package evm

import (
	"fmt"
	"math/big"
	"strings"
	"testing"

	"github.com/ethereum/go-ethereum/crypto"
)

func TestRecoverReturnsSignerAndNobodyElse(t *testing.T) {
	k, err := NewKey()
	if err != nil {
		t.Fatal(err)
	}
	h := Keccak([]byte("domain"), []byte("body"))
	sig, err := k.Sign(h)
	if err != nil {
		t.Fatal(err)
	}
	if a, err := Recover(h, sig); err != nil || a != k.Address() {
		t.Fatalf("Recover = %v, %v; want %v", a, err, k.Address())
	}
	for i := range sig {
		bad := sig
		bad[i] ^= 1
		if a, err := Recover(h, bad); err == nil && a == k.Address() {
			t.Errorf("byte %d flipped and still recovered the signer", i)
		}
	}
	if a, err := Recover(Keccak([]byte("other")), sig); err == nil && a == k.Address() {
		t.Error("signature holds for another hash")
	}
}

func TestRecoverRefusesHighS(t *testing.T) {
	k, err := NewKey()
	if err != nil {
		t.Fatal(err)
	}
	h := Keccak([]byte("x"))
	sig, err := k.Sign(h)
	if err != nil {
		t.Fatal(err)
	}
	// (r, n-s, v^1) is valid ECDSA for the same key: a second spelling.
	s := new(big.Int).SetBytes(sig[32:64])
	new(big.Int).Sub(crypto.S256().Params().N, s).FillBytes(sig[32:64])
	sig[64] = 27 + 28 - sig[64]
	if a, err := Recover(h, sig); err == nil {
		t.Fatalf("second spelling accepted for %v", a)
	}
}

func TestParseAddress(t *testing.T) {
	const sum = "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed" // from EIP-55
	for _, s := range []string{sum, strings.ToLower(sum)} {
		if a, err := ParseAddress(s); err != nil || a.Hex() != sum {
			t.Errorf("ParseAddress(%q) = %v, %v", s, a, err)
		}
	}
	for _, s := range []string{"", "0x", sum[2:], sum[:41], sum + "0", "0X" + sum[2:], strings.Replace(sum, "A", "a", 1), "0x" + strings.Repeat("g", 40)} {
		if a, err := ParseAddress(s); err == nil {
			t.Errorf("ParseAddress(%q) = %v, want an error", s, a)
		}
	}
}

func TestKeyNeverPrints(t *testing.T) {
	k, err := NewKey()
	if err != nil {
		t.Fatal(err)
	}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s"} {
		if s := fmt.Sprintf(verb, k); strings.Contains(s, k.Hex()) {
			t.Errorf("%s prints the private key", verb)
		}
	}
	if _, err := ParseKey(k.Hex() + "zz"); err == nil || strings.Contains(err.Error(), k.Hex()) {
		t.Errorf("error quotes the key or is missing: %v", err)
	}
}
