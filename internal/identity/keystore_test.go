package identity

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/ethereum/go-ethereum/accounts/keystore"
	"github.com/google/uuid"

	"github.com/resultity/node/internal/evm"
)

// A keystore file says itself what it costs to open. It must cost no more than
// wallets make it, and end in an error whatever it says.
func TestKeystoreCost(t *testing.T) {
	key, err := evm.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	raw, err := keystore.EncryptKey(&keystore.Key{Id: uuid.New(), Address: key.Address(), PrivateKey: key.ECDSA()}, "secret", 2, 1)
	if err != nil {
		t.Fatal(err)
	}
	type object = map[string]any
	file := func(change func(file, crypto, kdf object)) []byte {
		var f object
		if err := json.Unmarshal(raw, &f); err != nil {
			t.Fatal(err)
		}
		crypto := f["crypto"].(object)
		change(f, crypto, crypto["kdfparams"].(object))
		b, err := json.Marshal(f)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	if got, err := ParseKeystore(raw, "secret"); err != nil || got.Address() != key.Address() {
		t.Fatalf("%v, %v", got, err)
	}
	if _, err := ParseKeystore(raw, "other"); !errors.Is(err, keystore.ErrDecrypt) {
		t.Errorf("another passphrase: %v", err)
	}
	kdf := func(name string, v any) func(_, _, kdf object) { return func(_, _, kdf object) { kdf[name] = v } }
	for _, c := range []struct {
		name, want string
		change     func(file, crypto, kdf object)
	}{
		{"memory", "MiB", func(_, _, kdf object) { kdf["n"], kdf["r"] = 2*maxMemory/(128*8), 8 }},
		{"memory by r", "MiB", func(_, _, kdf object) { kdf["n"], kdf["r"] = 2*maxMemory/(128*1024), 1024 }},
		{"time", "steps", func(_, _, kdf object) {
			kdf["n"], kdf["r"], kdf["p"] = maxMemory/(128*8), 8, maxSteps/(maxMemory/128)+1
		}},
		{"n beyond all", "kdfparams.n", kdf("n", 1<<40)},
		{"n that overflows", "kdfparams.n", kdf("n", 1e300)},
		{"n negative", "kdfparams.n", kdf("n", -2)},
		{"n between", "kdfparams.n", kdf("n", 2.5)},
		{"n a text", "kdfparams.n", kdf("n", strings.Repeat("9", 1000))},
		{"n no power of two", "scrypt", kdf("n", 3)},
		{"no r", "kdfparams.r", kdf("r", nil)},
		{"short key", "kdfparams.dklen", kdf("dklen", 16)},
		{"long key", "kdfparams.dklen", kdf("dklen", 1<<31)},
		{"salt", "kdfparams.salt", kdf("salt", 7)},
		{"PBKDF2 for hours", "kdfparams.c", func(_, crypto, kdf object) {
			crypto["kdf"], kdf["c"], kdf["prf"] = "pbkdf2", maxIterations+1, "hmac-sha256"
		}},
		{"PBKDF2 without a function", "kdfparams.prf", func(_, crypto, kdf object) { crypto["kdf"], kdf["c"] = "pbkdf2", 1 }},
		{"another KDF", "want scrypt or pbkdf2", func(_, crypto, _ object) { crypto["kdf"] = "argon2" }},
		{"vector", "iv", func(_, crypto, _ object) { crypto["cipherparams"] = object{"iv": "00"} }},
		{"version", "version", func(file, _, _ object) { file["version"] = 2 }},
		{"version 1", "version", func(file, _, _ object) { file["version"] = "1" }},
		{"no crypto", "iv", func(file, _, _ object) { delete(file, "crypto") }},
	} {
		_, err := ParseKeystore(file(c.change), "secret")
		if err == nil || !strings.Contains(err.Error(), c.want) || len(err.Error()) > 500 {
			t.Errorf("%s: %v, want it to say %s", c.name, err, c.want)
		}
	}
	// What is at the bounds is taken; to try it would cost that much.
	for _, c := range []keystore.CryptoJSON{
		{KDF: "scrypt", KDFParams: object{"n": float64(maxMemory / (128 * 8)), "r": 8.0, "p": float64(maxSteps / (maxMemory / 128))}},
		{KDF: "pbkdf2", KDFParams: object{"c": float64(maxIterations), "prf": "hmac-sha256"}},
	} {
		c.CipherParams.IV, c.KDFParams["salt"], c.KDFParams["dklen"] = strings.Repeat("0", 32), "00", 32.0
		if err := checkCost(&c); err != nil {
			t.Errorf("%s at its bounds: %v", c.KDF, err)
		}
	}
}
